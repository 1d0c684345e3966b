"""Ready token files, as the Dolma toolkit tokenised them: checked and listed in a manifest."""

import csv
import gzip
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from corpus.storage import DOCUMENT_INDEX, hash_of, hash_of_id, token_dtype, vocabulary_of
from corpus.tokenizer import Tokenizer, tokenizer_file
from support.files import UserError, here, write_json
from support.text import read_text, refuse_pointer

SAMPLE_BYTES = 2**20  # at each end of a file: what is checked and hashed, as a file may have 4 GB


def listed_token_files(list_file):
    """The paths in a list of token files, one a line, relative to the list's own folder."""
    list_file = Path(list_file)
    if not list_file.is_file():
        raise UserError(f"token_files={list_file}: no such list of token files"
                        f"{here(list_file)}; the documentation of real Dolma says how to get one")
    paths = []  # in the list's order, which decides where each instance is
    for line in read_text(list_file).splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        path = list_file.absolute().parent / line
        if not path.is_file():
            raise UserError(f"{path}: named in {list_file} but not there; fetch it")
        paths.append(path)
    if not paths:
        raise UserError(f"token_files={list_file}: names no file; write one path a line")
    return paths


def write_token_list(folder, config, settings):
    """Write a manifest for ready token files, which stay where they are; their order counts."""
    tokenizer = Tokenizer.load(tokenizer_file(config.tokenizer))
    tokenizer.save(folder / "tokenizer.json")
    shards = [token_file(path, tokenizer) for path in listed_token_files(config.token_files)]
    # the tokenizer and each file's size and ends identify the content, which is too long to hash
    identity = [[shard["tokens"], shard["ends"]] for shard in shards]
    write_json(folder / "manifest.json", {
        "sha256": hash_of([settings["tokenizer"], identity]), **vocabulary_of(tokenizer),
        "sources": {}, "shards": shards, "settings": settings})


def token_file(path, tokenizer):
    """The manifest's entry of a raw token file. Raises UserError for a file of another kind.

    The toolkit and OLMo write ids without a header, also into files that they call .npy.
    """
    refuse_pointer(path)
    dtype = token_dtype(tokenizer.vocab_size)
    with open(path, "rb") as file:
        first = file.read(SAMPLE_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SAMPLE_BYTES))
        last = file.read()
    has_header = first.startswith(b"\x93NUMPY")  # of a real .npy file
    if size == 0 or size % dtype.itemsize or has_header:
        raise UserError(f"{path}: not a raw file of {dtype.name} ids, as the Dolma toolkit writes "
                        "them; convert it or take it off the list")
    # an id outside the vocabulary shows that another tokenizer made the file
    largest = max(np.frombuffer(part, dtype).max() for part in (first, last))
    if largest >= tokenizer.vocab_size:
        raise UserError(f"{path}: id {largest} is outside the tokenizer's vocabulary of "
                        f"{tokenizer.vocab_size}; name the tokenizer that it was made with")
    return {"file": str(path), "tokens": size // dtype.itemsize,
            "ends": hashlib.sha256(first + last).hexdigest()}


def read_sidecar(path):
    """Returns (DOCUMENT_INDEX, [(id, file, line)]) of the Dolma toolkit's .csv.gz for a token file.

    Without that file, one document without a name that never ends.
    """
    index = []
    names = []  # DOCUMENT_INDEX.line counts them
    if not path.is_file():
        index.append((0, 2**62, 0, 0, 0, 0))
        names.append((f"(no {path.name})", "?", "?"))
        return np.array(index, DOCUMENT_INDEX), names
    try:
        if not path.stat().st_size:
            raise EOFError("0 bytes")
        with gzip.open(path, "rt", newline="", encoding="utf-8") as rows:
            for start, end, name, origin, line in csv.reader(rows):
                index.append((int(start), int(end), hash_of_id(name), 0, len(names), 0))
                names.append((name, origin, line))
    except (EOFError, ValueError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
        raise UserError(f"{path}:{len(names) + 1}: not a row of the Dolma toolkit's ({error}); "
                        "fetch the file again, or delete it: then documents have no names"
                        ) from None
    return np.array(index, DOCUMENT_INDEX), names
