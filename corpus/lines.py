"""The lines and parts of one file: plain or compressed, with their numbers, checks and limits."""

import gzip
import re
import zlib

from support.text import UserError, decoded, other_encoding, signature_of

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")  # an object a line
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")  # a document a file

ONE_LIST = "convert a file that is one list: jq -c '.[]' OLD > NEW"
A_LIST = re.compile(rb'\[\s*\{(?!\s*"(role|content|from|value)")')  # of objects
MOST_BYTES = 2**30  # of one document: the rules and the tokenizer hold all of it in memory
CHUNK_BYTES = 2**20  # of a text file that is cut at a separator: read at a time


class Truncated(UserError):
    """A .gz file that is damaged or ends early."""


def check_kind(file, line):
    """UserError for a file whose first line is that of an encoding or format that is not read.

    One for the whole file, where each line of it would be an error.
    """
    head = line[:1000]
    if other_encoding(head):
        decoded(head, f"{file}:1")  # raises the error that names it
    if not file.name.endswith(JSON_SUFFIXES):
        return
    name = signature_of(head)
    if name:
        raise UserError(f"{file}: not lines of JSON but {name}; "
                        + (f"rename it to {file.name}.gz" if name == "gzip" else "convert it"))
    # JSON over several lines, or a list of all the objects
    value = line.removeprefix(b"\xef\xbb\xbf").strip()
    if value == b"{":
        raise UserError(f"{file}:1: an object over several lines, where each must have a line of "
                        "its own; convert the file: jq -c . OLD > NEW")
    # a list of messages is a chat, and an error of its line alone
    if value.startswith(b"[") and not value.endswith(b"]") or A_LIST.match(value):
        raise UserError(f"{file}:1: a list, where each line must be an object; {ONE_LIST}")


def check_gzip(file, raw):
    """UserError for a .gz file that is none; `raw`, the open file, is left at its beginning."""
    head = raw.read(1000)
    raw.seek(0)
    if not head:  # subtle: gzip would take 0 bytes for an empty file
        raise EOFError("0 bytes")
    kind = signature_of(head)
    if kind == "gzip":
        return
    if not kind and head.lstrip()[:1] in (b"{", b"["):
        raise UserError(f"{file}: not gzip but plain JSON; rename it to {file.stem}")
    raise UserError(f"{file}: not gzip{f' but {kind}' if kind else ''}; fetch it again, or take it "
                    "out")


def read_lines(file, bar):
    """Yield (line number, bytes) of a plain or gzipped file; `bar` moves with the bytes read.

    Raises UserError where a .gz file is damaged or ends early: Dolma's reader stops there without
    an error, and the rest of the file is lost.
    """
    line = 0
    done = 0
    is_checked = False
    with open(file, "rb") as raw:
        try:
            lines = raw
            if file.suffix == ".gz":
                check_gzip(file, raw)
                lines = gzip.open(raw)
            for content in iter(lambda: lines.readline(MOST_BYTES), b""):
                line += 1
                if not is_checked and content.strip():
                    check_kind(file, content)
                    is_checked = True
                if len(content) == MOST_BYTES:
                    raise UserError(f"{file}:{line}: one line of over {MOST_BYTES:,} bytes; write "
                                    "an object a line, or remove the line")
                yield line, content
                bar.update(raw.tell() - done)  # compressed bytes: the bar's total counts them
                done = raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise Truncated(f"{file}: corrupt or cut off after line {line} ({error}); fetch it "
                            "again, or read what is there: --allow_truncated=true") from None


def read_parts(file, separator, bar):
    """Yield (line, number, bytes) of a text file's parts between separators; blank ones are none.

    line: where the part's first character is that is no space; number: which of the parts that
    begin on this line it is, from 1. With separator "" the whole file is one part.
    """
    if not separator:
        for _, content in cut(file, b"", bar):
            yield 1, 1, content
        return
    last = None
    number = 0
    for line, part in cut(file, separator.encode(), bar):
        text = part.lstrip()
        if text:
            line += part.count(b"\n", 0, len(part) - len(text))
            number = number + 1 if line == last else 1
            last = line
            yield line, number, part


def cut(file, mark, bar):
    """Yield (line number of its begin, bytes) of all parts of a file between marks."""
    line = 1
    part = bytearray()  # what is read of the file and not yielded
    is_checked = False
    with open(file, "rb") as raw:
        while chunk := raw.read(CHUNK_BYTES):
            if not is_checked:
                check_kind(file, chunk[:1000])
                is_checked = True
            # a mark may lie across the end of what was read before
            begin = max(0, len(part) - len(mark))
            part += chunk
            bar.update(len(chunk))
            while mark and (end := part.find(mark, begin)) >= 0:
                yield line, bytes(part[:end])
                line += part.count(b"\n", 0, end + len(mark))
                del part[:end + len(mark)]  # subtle: takes no time, as a bytearray keeps its start
                begin = 0
            if len(part) > MOST_BYTES:
                raise UserError(f"{file}:{line}: one document of over {MOST_BYTES:,} bytes; cut it "
                                "into several: a source's separator, or several files")
    yield line, bytes(part)
