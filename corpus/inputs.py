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

from corpus.source_files import files_of_first_rules, input_files, name_in
from support.bars import bar
from support.files import UserError, file_sha256


def input_digests(path, data_dir):
    """[(name, SHA-256)] of a source's files; for "stdlib", the version of Python it is part of.

    A name is relative to `path`: it enters the documents' ids and provenance, the path does not.
    """
    if path == "stdlib":
        return sys.version
    return digests_of(path, input_files(Path(path), Counter()), data_dir)


def digests_of(path, files, data_dir):
    """[(name, SHA-256)] of these files of a source; those that are not remembered are read."""
    remembered = read_digests(data_dir)
    files = with_states(path, files)
    unknown = [entry for entry in files if remembered.get(entry[1], [])[:2] != entry[2]]
    total = sum(size for _, _, (size, _) in unknown)
    with bar(None, f"hashing {path}", total, "B", hidden=not unknown) as shown:
        for _, key, state in unknown:
            try:
                remembered[key] = [*state, file_sha256(key)]
            except OSError as error:
                raise UserError(f"{key}: cannot be read ({error.strerror}); restore it or its "
                                "rights, or take it out") from None
            shown.update(state[0])
    if unknown:
        write_digests(data_dir, remembered)
    return [(name, remembered[key][2]) for name, key, _ in files]


def check_unchanged(path, known, data_dir):
    """UserError if the files at `path` have changed since input_digests returned `known`.

    Also if they were put back: their time tells, and nobody knows what was read in between.
    """
    if path == "stdlib":
        return
    remembered = read_digests(data_dir)
    files = with_states(path, input_files(Path(path), Counter()))
    changed = [key for _, key, state in files if remembered.get(key, [])[:2] != state]
    if changed or [(name, remembered[key][2]) for name, key, _ in files] != list(known):
        raise UserError(f"{changed[0] if changed else path}: changed while it was read; run the "
                        "same command again when nothing writes to it")


def is_same_text(path, known, data_dir):
    """Whether the files at `path` are those that built data knows: by digest; of old data, by age.

    known: what the manifest of the data keeps of them. Of a folder it may be what the first
    versions read there.
    """
    def as_known(files):
        if known and len(known[0]) == 3:  # (path, size, time), until built data kept digests
            return [[str(file), *state_of(file)] for file in files]
        return [list(entry) for entry in digests_of(path, files, data_dir)]

    root = Path(path)
    return (known == as_known(files_of_first_rules(root))
            or known == as_known(input_files(root, Counter())))


def inputs_of(source, clean):
    """Yield (name, path, its files as the built data knows them): a source, its evaluation sets.

    clean: the settings of the source's clean documents.
    """
    yield source.name, source.path, clean["inputs"]
    yield from clean.get("decontaminate", ())


def with_states(path, files):
    """[(name, absolute path, state)] of a source's files; see input_digests and state_of."""
    root = Path(path)
    return [(name_in(root, file), str(file.absolute()), state_of(file)) for file in files]


def state_of(file):
    """[size, time of the last change in ns]; equal for a file that nobody has written."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def read_digests(data_dir):
    """{file: [size, time, SHA-256]} as remembered; what is damaged or not there is left out."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        found = json.loads((Path(data_dir) / "inputs.json").read_text()).items()
        return {file: entry for file, entry in found
                if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str)}
    return {}


def write_digests(data_dir, digests):
    """Remember digests. Where data_dir cannot be written, the files are hashed again next time."""
    aside = Path(data_dir) / f"inputs-{os.getpid()}.tmp"
    with suppress(OSError):
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(digests, indent=0, sort_keys=True) + "\n")
        aside.replace(aside.with_name("inputs.json"))
