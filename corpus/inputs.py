"""The input files of built data, known by their content: what tells whether a source has changed.

A file is hashed once. data_dir/inputs.json remembers its size, its time of change and its SHA-256;
while the first two are the same, the file is not read again. So a copy of the same text, which has
another time, costs one reading and builds nothing again.
"""

import json
import os
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from corpus.source_files import input_files
from support.files import file_sha256


def input_digests(path, data_dir):
    """[(name, SHA-256)] of a source's files; for "stdlib", the version of Python it is part of.

    A name is relative to `path`: it enters the documents' ids and provenance, the path does not.
    """
    if path == "stdlib":
        return sys.version
    root = Path(path)
    files = input_files(root, Counter())
    remembered = read_digests(data_dir)
    unknown = [file for file in files if remembered.get(key_of(file), [])[:2] != state_of(file)]
    total = sum(file.stat().st_size for file in unknown)
    with tqdm(desc=f"hashing {path}", total=total, unit="B", unit_scale=True, leave=False,
              disable=not unknown) as bar:
        for file in unknown:
            size, changed = state_of(file)
            remembered[key_of(file)] = [size, changed, file_sha256(file)]
            bar.update(size)
    if unknown:
        write_digests(data_dir, remembered)
    names = [file.relative_to(root).as_posix() if root.is_dir() else file.name for file in files]
    return [(name, remembered[key_of(file)][2]) for name, file in zip(names, files, strict=True)]


def is_same_text(path, known, data_dir):
    """Whether the files at `path` are those that built data knows: by digest; of old data, by age.

    known: what the manifest of the data keeps of them.
    """
    if known and len(known[0]) == 3:  # (path, size, time), until built data kept digests
        files = input_files(Path(path), Counter())
        return known == [[str(file), *state_of(file)] for file in files]
    return known == [list(entry) for entry in input_digests(path, data_dir)]


def key_of(file):
    return str(file.absolute())


def state_of(file):
    """[size, time of the last change in ns]; equal for a file that nobody has written."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def read_digests(data_dir):
    """{file: [size, time, SHA-256]} as remembered; {} if the list is damaged or not there."""
    with suppress(OSError, ValueError, AttributeError):
        return dict(json.loads((Path(data_dir) / "inputs.json").read_text()).items())
    return {}


def write_digests(data_dir, digests):
    """Remember digests. Where data_dir cannot be written, the files are hashed again next time."""
    aside = Path(data_dir) / f"inputs-{os.getpid()}.tmp"
    with suppress(OSError):
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(digests, indent=0, sort_keys=True) + "\n")
        aside.replace(aside.with_name("inputs.json"))
