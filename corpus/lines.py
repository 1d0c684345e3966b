"""What one file holds, unpacked: its lines and parts, with their numbers, checks and limits."""

import gzip
import io
import re
import zlib
from contextlib import contextmanager

from support.text import BYTE_ORDER_MARK, UserError, decoded, other_encoding, signature_of

# Of objects: one a line, one list of them, or some after one another.
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst")
TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".md", ".rst", ".py")  # a document a file

MOST_BYTES = 2**30  # of one document: the rules and the tokenizer hold all of it in memory
CHUNK_BYTES = 2**20  # that are read at a time
HEAD_BYTES = 2**20  # that tell how a file is read
# zstd makes up to 128 KiB of 4 bytes, and zstandard returns all that it makes of its input. So a
# bomb gives 16 MiB at a time. Measured: larger inputs are hardly faster.
ZSTD_BYTES = 2**9
ZSTD_WINDOW = 2**31  # the most that zstd --long=31 uses; such a file takes as much memory
PACKED = {".gz": "gzip", ".zst": "zstd"}
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
TABLES = {"Parquet": ".parquet", "Arrow": ".arrow"}  # kinds of files that corpus/tables.py reads
SUFFIXES = {name: suffix for suffix, name in PACKED.items()}


def ends_in(file, suffixes):
    """Whether a file's name (text or Path) has one of these suffixes, also in capitals."""
    return str(file).lower().endswith(suffixes)


class Truncated(UserError):
    """A packed file that is damaged, or a file that ends early."""


# ---- The bytes of a file -------------------------------------------------------------------------

@contextmanager
def opened(file, bar):
    """Yields a stream, Content, of what a file holds, unpacked and without a byte-order mark.

    `bar` moves with the bytes read. Raises UserError for a file that is not what its name says, and
    Truncated where a packed file is damaged or ends early: Dolma's reader stops there without an
    error, and the rest of the file is lost.
    """
    with open(file, "rb") as raw:
        check_packed(file, raw)
        content = Content(unpacked(file, raw, bar))
        head = content.head()[:1000]
        check_kind(file, head)
        if head.startswith(BYTE_ORDER_MARK):
            content.held = content.held[len(BYTE_ORDER_MARK):]
        yield content


class Content(io.RawIOBase):
    """A stream of byte strings that come one after another."""

    def __init__(self, chunks):
        self.chunks = chunks
        self.held = memoryview(b"")  # what came and was not taken
        self.fault = None  # what ended the chunks

    def head(self):
        """Up to about HEAD_BYTES that are read next; they are not taken."""
        found = bytearray(self.held)
        try:
            while len(found) < HEAD_BYTES and (chunk := next(self.chunks, b"")):
                found += chunk
        except Truncated as fault:  # what came before it is read first
            self.fault = fault
        head = bytes(found)
        self.held = memoryview(head)
        return head

    def take(self):
        """What comes next, as many bytes as there are; b"" at the end."""
        if self.held:
            taken = bytes(self.held)
            self.held = memoryview(b"")
            return taken
        if self.fault:
            raise self.fault
        return next(self.chunks, b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self.held:
            self.held = memoryview(self.take())
        n = min(len(buffer), len(self.held))
        buffer[:n] = self.held[:n]
        self.held = self.held[n:]
        return n


def unpacked(file, raw, bar):
    """Yield the bytes of an open file, as they come; see `opened`."""
    chunks = {".gz": gzip_chunks, ".zst": zstd_chunks}.get(file.suffix.lower(), plain_chunks)
    lines = 0
    done = 0
    try:
        for chunk in chunks(raw):
            bar.update(raw.tell() - done)  # packed bytes: the bar's total counts them
            done = raw.tell()
            if chunk:  # none may come of the first bytes of a block
                yield chunk
            lines += chunk.count(b"\n")
    except ImportError:
        raise UserError(f"{file}: needs the package zstandard: pip install -U zstandard") from None
    except MemoryError as error:
        raise UserError(f"{file}: unpacking takes more memory than there is ({error}); unpack it "
                        f"elsewhere: zstd -d --long=31 {file.name}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Truncated(f"{file}: corrupt or cut off after line {lines} ({error}); fetch it again"
                        ) from None


def plain_chunks(raw):
    return iter(lambda: raw.read(CHUNK_BYTES), b"")


def gzip_chunks(raw):
    content = gzip.open(raw)
    # subtle: read would lose what it has when the file turns out to be damaged
    return iter(lambda: content.read1(CHUNK_BYTES), b"")


def zstd_chunks(raw):
    """Yield what the frames of a zstd file hold.

    By decompressobj, as zstandard's stream_reader takes a file that ends in a frame for complete.
    """
    import zstandard
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    if not hasattr(decompressor.decompressobj(), "eof"):
        raise ImportError("zstandard 0.19 is the first that tells where a frame ends")
    frame = None
    while packed := raw.read(ZSTD_BYTES):
        while packed:
            frame = frame or decompressor.decompressobj()
            try:
                yield frame.decompress(packed)
            except zstandard.ZstdError as error:
                kind = MemoryError if "memory" in str(error) else EOFError
                raise kind(error) from None
            packed = b""
            if frame.eof:
                packed = frame.unused_data
                frame = None
    if frame:
        raise EOFError("it ends within a frame")


def check_packed(file, raw):
    """UserError for a .gz or .zst file that is none; `raw`, the open file, stays at its begin."""
    wanted = PACKED.get(file.suffix.lower())
    if not wanted:
        return
    head = raw.read(1000)
    raw.seek(0)
    if not head:  # subtle: gzip would take 0 bytes for an empty file
        raise Truncated(f"{file}: 0 bytes, which no {wanted} file has; fetch it again")
    kind = signature_of(head)
    # zstd may begin with a frame for the data of other programs, which it skips
    is_skippable = wanted == "zstd" and SKIPPABLE.match(head)
    if kind == wanted or is_skippable:
        return
    # packed bytes hold control characters; the page of a failed download begins with <
    if not kind and min(head) >= 9 and not head.lstrip().startswith(b"<"):
        raise UserError(f"{file}: not {wanted} but plain text; rename it to {file.stem}")
    remedy = "fetch it again, or take it out"
    if kind in SUFFIXES:
        remedy = f"rename it to {file.stem}{SUFFIXES[kind]}"
    raise UserError(f"{file}: not {wanted}{f' but {kind}' if kind else ''}; {remedy}")


def check_kind(file, head):
    """UserError for a file that begins like an encoding or format that is not read.

    One for the whole file, where each line of it would be an error.
    """
    if other_encoding(head):
        decoded(head, f"{file}:1")  # raises the error that names it
    name = signature_of(head) if ends_in(file, JSON_SUFFIXES) else None
    if name:
        remedy = "convert it"
        if name in TABLES:
            remedy = f"rename it to {file.stem}{TABLES[name]}"
        if name in SUFFIXES and file.suffix.lower() not in PACKED:
            remedy = f"rename it to {file.name}{SUFFIXES[name]}"
        raise UserError(f"{file}: not JSON but {name}; {remedy}")


# ---- Lines and parts -----------------------------------------------------------------------------

def read_lines(file, content):
    """Yield (line number, bytes) of the lines in a stream that are not blank."""
    line = 0
    stream = io.BufferedReader(content, CHUNK_BYTES)
    while piece := stream.readline(CHUNK_BYTES):
        line += 1
        pieces = [piece]
        size = len(piece)
        while not piece.endswith(b"\n") and (piece := stream.readline(CHUNK_BYTES)):
            pieces.append(piece)
            size += len(piece)
            if size > MOST_BYTES:
                raise UserError(f"{file}:{line}: one line of over {MOST_BYTES:,} bytes; write an "
                                "object a line, or remove the line")
        whole = b"".join(pieces)
        if whole.strip():
            yield line, whole


def read_parts(file, separator, bar):
    """Yield (line, number, bytes) of a text file's parts between separators; blank ones are none.

    line: where the part's first character is that is no space; number: which of the parts that
    begin on this line it is, from 1. With separator "" the whole file is one part.
    """
    with opened(file, bar) as content:
        if not separator:
            for _, whole in cut(file, content, b""):
                yield 1, 1, whole
            return
        yield from numbered(without_blank(cut(file, content, separator.encode())))


def numbered(parts):
    """Yield (line, number, bytes) of (line, bytes); number: which of the line's it is, from 1."""
    last = None
    number = 0
    for line, part in parts:
        number = number + 1 if line == last else 1
        last = line
        yield line, number, part


def line_number(line, number):
    """A line as places name it: 7, or 7.2 for the second document that begins on line 7."""
    return f"{line}.{number}" if number > 1 else str(line)


def without_blank(parts):
    """Yield (line, part) of those that are not blank; line: of the first that is no space."""
    for line, part in parts:
        text = part.lstrip()
        if text:
            yield line + part.count(b"\n", 0, len(part) - len(text)), part


def cut(file, content, mark):
    """Yield (line number of its begin, bytes) of all parts of a stream between marks."""
    line = 1
    part = bytearray()  # what is read of the stream and not yielded
    while chunk := content.take():
        # a mark may lie across the end of what was read before
        begin = max(0, len(part) - len(mark))
        part += chunk
        while mark and (end := part.find(mark, begin)) >= 0:
            yield line, bytes(part[:end])
            line += part.count(b"\n", 0, end + len(mark))
            del part[:end + len(mark)]  # subtle: takes no time, as a bytearray keeps its start
            begin = 0
        if len(part) > MOST_BYTES:
            raise UserError(f"{file}:{line}: one document of over {MOST_BYTES:,} bytes; cut it "
                            "into several: a source's separator, or several files")
    yield line, bytes(part)
