"""Stages of a build: cached, locked, in worker processes, and whole or absent after a crash."""

import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from corpus.documents import input_files
from support.files import file_sha256


BLOCK_BYTES = 2**16  # of JSON lines compressed together: what is read to get one document

FILE_BYTES = 2**30  # of compressed JSON lines in one file of clean documents

DOCUMENT_INDEX = np.dtype([
    ("start", "<i8"), ("end", "<i8"),  # tokens of the shard, EOS included
    ("id", "<u8"),  # hash of the document's id
    ("file", "<i4"), ("line", "<i4"), ("block", "<i8")])  # where its text is: see read_block


class DocumentWriter:
    """Clean documents in Dolma's layout, SOURCE-00000.jsonl.gz, in blocks that read by themselves.

    A gzip file may have many members; `blocks` lists the (file, first byte) of each.
    """

    def __init__(self, folder, source):
        self.folder, self.source, self.blocks = folder, source, []
        self.lines, self.bytes, self.files, self.out = [], 0, 0, None

    def add(self, document):
        self.lines.append(json.dumps(document).encode() + b"\n")
        self.bytes += len(self.lines[-1])
        if self.bytes >= BLOCK_BYTES:
            self.write_block()

    def write_block(self):
        if self.out is None or self.out.tell() > FILE_BYTES:
            if self.out:
                self.out.close()
            self.out = open(self.folder / f"{self.source}-{self.files:05d}.jsonl.gz", "wb")
            self.files += 1
        self.blocks.append((self.files - 1, self.out.tell()))
        self.out.write(gzip.compress(b"".join(self.lines), 3, mtime=0))
        self.lines, self.bytes = [], 0

    def close(self):
        if self.lines:
            self.write_block()
        if self.out:
            self.out.close()


def read_block(folder, source, file, begin):
    """The JSON lines (bytes) of the block of clean documents that begins there."""
    member, lines = zlib.decompressobj(wbits=31), b""  # 31: one gzip member
    with open(folder / f"{source}-{file:05d}.jsonl.gz", "rb") as compressed:
        compressed.seek(begin)
        while not member.eof and (part := compressed.read(BLOCK_BYTES)):
            lines += member.decompress(part)
    return lines.splitlines()


def blocks_of(folder, source):
    """[(file, first byte)] of the blocks of a source."""
    return np.fromfile(folder / f"{source}.blocks", "<i8").reshape(-1, 2).tolist()


def hash_of_id(name):
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


class ShardWriter:
    """The two open files of one shard."""

    def __init__(self, folder, name):
        self.path, self.tokens, self.documents = folder / f"{name}.bin", 0, 0
        self.files = [open(self.path.with_suffix(suffix), "wb") for suffix in (".bin", ".index")]

    def add(self, ids, row):
        row = row.copy()
        row["start"], row["end"] = self.tokens, self.tokens + len(ids)
        for file, array in zip(self.files, (ids, row), strict=True):
            file.write(array.tobytes())
        self.tokens += len(ids)
        self.documents += 1

    def close(self):
        for file in self.files:
            file.close()
        return {"file": self.path.name, "tokens": self.tokens, "documents": self.documents,
                "sha256": file_sha256(self.path)}


def finished(folder, build):
    """`folder`, made by `build(aside)` if it is not there; one that is there is whole."""
    aside = folder.with_name(folder.name + ".tmp")
    if not folder.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            build(aside)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def hash_of(settings):
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def input_ages(path):
    """[(name, size, age)] of the input files at a path; for "stdlib" the Python that it is of."""
    if path == "stdlib":
        return sys.version
    return ages_of(input_files(Path(path), Counter()))


def ages_of(files):
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


ROOT = Path(__file__).resolve().parent.parent
BUILDING_FILES = ("data.py", "corpus/dedup.py", "corpus/documents.py", "corpus/funnel.py",
                  "corpus/questions.py", "corpus/rules.py", "corpus/sources.py", "corpus/stages.py",
                  "corpus/stdlib.py", "corpus/tokenizer.py")


@lru_cache
def building_code():
    """Hash of the code from the documents to the batches: who edits a rule has it run anew."""
    return hash_of([file_sha256(ROOT / file) for file in BUILDING_FILES])


def link_files(stage, folder):
    """Give `folder` the files of a stage, without a copy where the file system can."""
    for file in sorted(file for file in stage.rglob("*") if file.is_file()):
        target = folder / file.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copy(file, target)


BATCH_BYTES = 2**19  # of records that a worker gets at a time


def in_batches(records):
    """Lists of records, of about BATCH_BYTES."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record.content if isinstance(record.content, bytes) else record.content["text"])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def taken(filtered, funnel):
    for documents, part in filtered:
        funnel.add(part)
        yield from documents


def ordered_map(function, items, workers):
    """map(function, items) in worker processes (0: one a core), in order, a few items ahead."""
    if not workers:
        workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    if workers == 1:
        yield from map(function, items)
        return
    start = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, start, follow_parent, [os.getpid()]) as pool:
        ahead = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def follow_parent(parent):
    """In a worker: leave Ctrl-C to the parent, and end when it is gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def stored_documents(folder, source):
    """The clean documents of a source, in their order."""
    for block in blocks_of(folder, source):
        yield from map(json.loads, read_block(folder / "documents", source, *block))


def held_out_files(folder):
    """{source: file} of the held-out text of a built data folder."""
    return {path.stem: path for path in sorted((folder / "held_out").glob("*.jsonl"))}
