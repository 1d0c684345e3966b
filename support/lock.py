"""A lock file: one process at a time works in a directory."""

import fcntl
import math
import os
import socket
import time
import uuid
from pathlib import Path

from support.files import UserError


class Lock:
    """A lock file that one process holds at a time.

    `with Lock(path):` holds it for a block; `lock = Lock(path)` until lock.release() or until the
    process ends, however it ends: a killed process leaves no lock behind.

    patience: seconds to wait for another process; after them UserError names that process.
    on_wait(holder): called once when this process has to wait; holder is the other one's `text`.
    text: what this process wrote into the file. It is unique, so that a rank on another node can
    read the file and tell whether it sees the same directory.

    A disk without locks (some network file systems) is reported, and the work goes on.
    """

    def __init__(self, path, patience=math.inf, on_wait=None):
        self.text = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex}"
        # subtle: closing any handle on this file unlocks it, so a holder must not open it again
        self.file = open(path, "a+")  # "a+": the holder's text must survive that others open it
        try:
            self.wait(patience, on_wait)
        except OSError:
            print(f"{path}: its disk has no locks; make sure that only one process works there")
        except BaseException:
            self.file.close()
            raise
        self.file.truncate(0)
        self.file.write(self.text)
        self.file.flush()
        os.fsync(self.file.fileno())

    def wait(self, patience, on_wait):
        """Try to lock the file until it works; UserError when `patience` seconds have passed."""
        deadline = time.monotonic() + patience
        while True:
            try:
                # subtle: lockf takes a POSIX lock, which forked workers do not inherit; a worker
                # that outlives its parent would keep a flock
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self.file.seek(0)
                holder = self.file.read() or "it left no name"
            if time.monotonic() >= deadline:
                folder = Path(self.file.name).parent
                raise UserError(f"{folder}: another process works there ({holder}); wait until it "
                                "ends, or choose another directory")
            if on_wait:
                on_wait(holder)
                on_wait = None
            time.sleep(0.1)

    def release(self):
        """Let the next process have the lock."""
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()
