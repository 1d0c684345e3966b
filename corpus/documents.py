"""Documents: JSONL, gzip and text files in, one checked dict a document out."""

import gzip
import hashlib
import json
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from corpus.stdlib import stdlib_documents
from support.files import UserError


JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")


def read_documents(path, source, counts=None):
    """Yield {id, text, source, metadata} from a file, a folder (sorted, recursive) or "stdlib".

    metadata.provenance is file:line; metadata.split_group, where there is one, keeps kin on one
    side of the held-out split. `counts`, a Counter, takes in what was repaired or skipped. Raises
    UserError with file and line for input that cannot be read.
    """
    counts = Counter() if counts is None else counts
    for record in read_records(path, source, counts):
        yield as_document(record, source, counts)


class Record(NamedTuple):
    """A document as it lies in its file: not parsed yet, so that workers can do it."""
    file: str  # relative to the source's path
    line: int
    place: str  # the file as the user knows it, with the line: for messages
    content: bytes | dict  # a line of JSON, a whole text file, or a finished document


def read_records(path, source, counts, allow_truncated=False, advance=lambda size: None):
    """Yield the Records of a source; `advance` is told how many bytes of its files were read."""
    if path == "stdlib":
        for document in stdlib_documents(source):
            yield Record("", 0, "", document)
        return
    root = Path(path)
    for file in input_files(root, counts):
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        if not name.endswith(JSON_SUFFIXES):  # a text file is one document
            yield Record(name, 1, str(file), file.read_bytes())
            advance(file.stat().st_size)
            continue
        try:
            for line, content in read_lines(file, advance):
                if content.strip():
                    yield Record(name, line, f"{file}:{line}", content)
        except UserError as error:
            if not allow_truncated:
                raise
            counts["files cut off"] += 1
            warn(str(error))


def input_files(root, counts):
    """The readable files at `root`; others in a folder are counted."""
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; put your files there (.jsonl, .jsonl.gz, "
                        '.txt) or name others: --sources=\'{"name": "path"}\', of a tuning '
                        "--train_data and --eval_data")
    if root.is_file() and root.name.endswith(JSON_SUFFIXES + TEXT_SUFFIXES):
        return [root]
    if root.is_file():
        raise UserError(f"{root}: a file of another kind; read are {', '.join(JSON_SUFFIXES)} (an "
                        f"object a line) and {', '.join(TEXT_SUFFIXES)} (a document a file)")
    files = sorted(file for file in root.rglob("*") if file.is_file())
    readable = [file for file in files if file.name.endswith(JSON_SUFFIXES + TEXT_SUFFIXES)]
    if (root / "documents").is_dir():  # Dolma's layout: beside it lie the taggers' attributes
        readable = [file for file in readable if root / "attributes" not in file.parents]
    counts["files of another kind skipped"] += len(files) - len(readable)
    return readable


def read_lines(file, advance):
    """(number, bytes) of every line of a plain or gzipped file."""
    line = done = 0
    with open(file, "rb") as raw:
        try:
            if file.suffix == ".gz" and not file.stat().st_size:
                raise EOFError("0 bytes")
            for line, content in enumerate(gzip.open(raw) if file.suffix == ".gz" else raw, 1):
                yield line, content
                advance(raw.tell() - done)
                done = raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: corrupt or cut off after line {line} ({error}); fetch it "
                            "anew, or read what is there: --allow_truncated=true") from None


def as_document(record, source, counts):
    """A Record as a document. Raises UserError with its place and the remedy."""
    if isinstance(record.content, dict):  # an embedded one, finished already
        return record.content
    return checked_document(parse(record), source, record, counts)


def parse(record):
    """The JSON value in a Record; of a text file, an object with its text."""
    try:
        if record.file.endswith(JSON_SUFFIXES):
            return json.loads(record.content)
        return {"text": record.content.decode("utf-8")}
    except UnicodeDecodeError as error:
        raise UserError(f"{record.place}: not UTF-8 ({error.reason} at byte {error.start}); "
                        "convert it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{record.place}: not JSON ({error}); mend or delete the line") from None


def checked_document(entry, source, record, counts):
    """The fields that a document keeps (Dolma's); UserError for one of a wrong type."""
    place, provenance = record.place, f"{record.file}:{record.line}"
    if not isinstance(entry, dict):
        raise UserError(f"{place}: holds {type(entry).__name__}, not a JSON object with a text")
    text, name = entry.get("text"), entry.get("id", provenance)
    metadata = entry.get("metadata") or {}
    if not isinstance(text, str):
        raise UserError(f"{place}: text is {type(text).__name__}, not a string; "
                        "mend or delete the line")
    if not isinstance(name, (str, int)) or not isinstance(metadata, dict):
        raise UserError(f"{place}: id must be a string and metadata an object; mend the line")
    whole = without_surrogates(text)
    counts["texts with lone surrogates repaired"] += whole != text
    metadata = {**metadata, "provenance": provenance}
    metadata.pop("edited_by", None)  # of an earlier build
    dates = {key: entry[key] for key in ("added", "created") if key in entry}
    return {"id": without_surrogates(str(name)), "text": whole, "source": source, **dates,
            "metadata": metadata}


def without_surrogates(text):
    """`text` with U+FFFD for each lone surrogate, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def warn(message):
    """One line on stderr, above any progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def is_held_out(document, eval_share):
    """Whether the hash of the document's group falls into the held-out share."""
    group = str(document["metadata"].get("split_group", document["id"]))
    digest = hashlib.sha256(group.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < eval_share * 2**64


def size_of(text):
    """UTF-8 bytes of a text."""
    return len(text) if text.isascii() else len(text.encode())
