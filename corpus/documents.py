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
from support.files import UserError, here

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")  # an object a line
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")  # a document a file


def read_documents(path, source, counts=None):
    """Yield {id, text, source, metadata} from a file, a folder (sorted, recursive) or "stdlib".

    metadata.provenance is file:line. Documents with the same metadata.split_group are held out
    together or not at all. `counts`, a Counter, receives how much was repaired or skipped.
    Raises UserError with file and line for input that cannot be read.
    """
    if counts is None:
        counts = Counter()
    for record in read_records(path, source, counts):
        yield as_document(record, source, counts)


class Record(NamedTuple):
    """A document as it is in its file: unparsed, so that worker processes can parse it."""
    file: str  # relative to the source's path
    line: int
    place: str  # file:line as the user knows it, for messages
    content: bytes | dict  # a line of JSON, a text file, or an embedded document (finished)


def read_records(path, source, counts, allow_truncated=False, progress=False):
    """Yield the Records of a source.

    allow_truncated: read a .gz file that is cut off as far as it goes, warn and count it.
    progress: show a bar of the bytes read.
    """
    if path == "stdlib":
        for document in stdlib_documents(source):
            yield Record("", 0, "", document)
        return
    root = Path(path)
    files = input_files(root, counts)
    total = sum(file.stat().st_size for file in files)
    with tqdm(desc=f"cleaning {source}", total=total, unit="B", unit_scale=True, leave=False,
              disable=not progress) as bar:
        for file in files:
            # relative, so that ids and provenance do not depend on where the source is
            name = file.relative_to(root).as_posix() if root.is_dir() else file.name
            if not name.endswith(JSON_SUFFIXES):
                yield Record(name, 1, str(file), file.read_bytes())
                bar.update(file.stat().st_size)
                continue
            # JSON: a document a line
            try:
                for line, content in read_lines(file, bar):
                    if content.strip():
                        yield Record(name, line, f"{file}:{line}", content)
            except UserError as error:
                if not allow_truncated:
                    raise
                counts["files cut off"] += 1
                warn(str(error))


def input_files(root, counts):
    """The readable files at `root`, sorted; `counts` receives how many others a folder has."""
    if not root.exists():
        raise UserError(f"{root}: no such file or folder{here(root)}; put .jsonl, .jsonl.gz or "
                        '.txt files there, or name others: --sources=\'{"name": "path"}\', for '
                        "tuning --train_data and --eval_data")
    if root.is_file():
        if root.name.endswith(JSON_SUFFIXES + TEXT_SUFFIXES):
            return [root]
        raise UserError(f"{root}: cannot read this kind of file; name one that ends in "
                        f"{', '.join(JSON_SUFFIXES)} (an object a line) or "
                        f"{', '.join(TEXT_SUFFIXES)} (a document a file)")
    files = sorted(file for file in root.rglob("*") if file.is_file())
    readable = [file for file in files if file.name.endswith(JSON_SUFFIXES + TEXT_SUFFIXES)]
    if (root / "documents").is_dir():  # Dolma's layout: the taggers' results are in attributes/
        readable = [file for file in readable if root / "attributes" not in file.parents]
    counts["files of another kind skipped"] += len(files) - len(readable)
    return readable


def read_lines(file, bar):
    """Yield (line number, bytes) of a plain or gzipped file; `bar` moves with the bytes read.

    Raises UserError where a .gz file is damaged or ends early: Dolma's reader stops there without
    an error, and the rest of the file is lost.
    """
    line = 0
    done = 0
    with open(file, "rb") as raw:
        try:
            # subtle: gzip takes 0 bytes for an empty file, but they are a download that failed
            if file.suffix == ".gz" and not file.stat().st_size:
                raise EOFError("0 bytes")
            lines = gzip.open(raw) if file.suffix == ".gz" else raw
            for line, content in enumerate(lines, 1):
                yield line, content
                bar.update(raw.tell() - done)  # compressed bytes: the bar's total counts them
                done = raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: corrupt or cut off after line {line} ({error}); fetch it "
                            "again, or read what is there: --allow_truncated=true") from None


def parse(record):
    """The JSON value in a Record; for a text file, an object with its text."""
    try:
        if record.file.endswith(JSON_SUFFIXES):
            return json.loads(record.content)
        return {"text": record.content.decode("utf-8")}
    except UnicodeDecodeError as error:
        raise UserError(f"{record.place}: not UTF-8 ({error.reason} at byte {error.start}); "
                        "convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{record.place}: not JSON ({error}); correct or delete the line") from None


def as_document(record, source, counts):
    """The document in a Record: the fields that Dolma's format keeps, checked.

    Raises UserError with file:line and the remedy for a field of the wrong type.
    """
    if isinstance(record.content, dict):  # an embedded document is finished already
        return record.content
    entry = parse(record)
    place = record.place
    if not isinstance(entry, dict):
        raise UserError(f"{place}: holds {type(entry).__name__}, not a JSON object with a text; "
                        "correct or delete the line")
    text = entry.get("text")
    if not isinstance(text, str):
        raise UserError(f"{place}: text is {type(text).__name__}, not a string; "
                        "correct or delete the line")
    # where it was read, as in Dolma: trace leads back to this line
    provenance = f"{record.file}:{record.line}"
    name = entry.get("id", provenance)
    metadata = entry.get("metadata") or {}  # null means none
    if not isinstance(name, (str, int)):
        raise UserError(f"{place}: id is {type(name).__name__}, not a string; correct the line")
    if not isinstance(metadata, dict):
        raise UserError(f"{place}: metadata is {type(metadata).__name__}, not an object; "
                        "correct the line")
    metadata = {**metadata, "provenance": provenance}
    metadata.pop("edited_by", None)  # written by an earlier build
    repaired = without_surrogates(text)
    counts["texts with lone surrogates repaired"] += repaired != text
    dates = {key: entry[key] for key in ("added", "created") if key in entry}
    return {"id": without_surrogates(str(name)), "text": repaired, "source": source, **dates,
            "metadata": metadata}


def without_surrogates(text):
    """`text` with U+FFFD for each lone surrogate, which JSON can hold and UTF-8 cannot."""
    # through UTF-16, as a proper pair of surrogates becomes its character there
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_held_out(document, eval_share):
    """Whether the hash of the document's group falls into the held-out share.

    A hash, not a random draw: a document is on the same side when others are added or removed, and
    in every later build (Dolma's held-out sets are drawn by hash too).
    """
    # kept together: near copies on both sides would make the held-out text too easy
    group = str(document["metadata"].get("split_group", document["id"]))
    digest = hashlib.sha256(group.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < eval_share * 2**64  # 64 bits as a fraction of 1


def size_of(text):
    """UTF-8 bytes of a text."""
    return len(text) if text.isascii() else len(text.encode())


def warn(message):
    """One line on stderr, above any progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
