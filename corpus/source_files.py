"""The files of a source: which of a folder's are read, what is left out and why, their lines."""

import gzip
import os
import re
import zlib
from collections import Counter, deque
from pathlib import Path

from support.files import here
from support.hints import command
from support.text import UserError, decoded, other_encoding, signature_of

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")  # an object a line
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")  # a document a file

ONE_LIST = "convert a file that is one list: jq -c '.[]' OLD > NEW"
A_LIST = re.compile(rb'\[\s*\{(?!\s*"(role|content|from|value)")')  # of objects
MOST_BYTES = 2**30  # of one document: the rules and the tokenizer hold all of it in memory
CHUNK_BYTES = 2**20  # of a text file that is cut at a separator: read at a time
NAMED_ENDINGS = 5  # the commonest of the files that are not read; the others are counted together

# How a file of another kind becomes one that is read, by its ending.
TABLE = ('python -c "import pandas; pandas.read_{}(\'OLD\').to_json(\'NEW.jsonl\', '
         'orient=\'records\', lines=True)"')
REMEDIES = {
    ".json": "jq -c '.[]' OLD > NEW.jsonl, for a list of objects", ".zst": "zstd -d OLD",
    ".gz": "gunzip OLD", ".xz": "unxz OLD", ".bz2": "bunzip2 OLD", ".zip": "unzip OLD",
    ".parquet": TABLE.format("parquet"), ".csv": TABLE.format("csv"),
    ".arrow": 'python -c "import datasets; '
              "datasets.Dataset.from_file('OLD').to_json('NEW.jsonl')\""}


class Truncated(UserError):
    """A .gz file that is damaged or ends early."""


def input_files(root, counts):
    """The files at `root` that are read, sorted; `counts` receives how many others there are.

    Links are followed. Raises UserError if nothing there can be read.
    """
    if root.is_file():
        if root.name.endswith(JSON_SUFFIXES + TEXT_SUFFIXES):
            return [root]
        raise UserError(f"{root}: cannot read this kind of file; {remedy_for([root])}")
    if root.is_symlink() and not root.exists():
        raise UserError(f"{root}: a broken link: there is no {os.path.realpath(root)}")
    if not root.exists():
        others = '--sources=\'{"name": "path"}\''
        if command() == "adapt.py":
            others = "--train_data, --eval_data"
        raise UserError(f"{root}: no such file or folder{here(root)}; put .jsonl, .jsonl.gz or "
                        '.txt files there, or name others: ' + others)
    if not root.is_dir():
        raise UserError(f"{root}: neither a file nor a folder; save what it holds in a file")
    found = Counter()  # what is not read: {why: files}
    files = files_below(root, found)
    if (root / "documents").is_dir():  # Dolma's layout: the taggers' results are in attributes/
        found["files not read: Dolma's attributes"] = len(files)
        files = [file for file in files if root / "attributes" not in file.parents]
        found["files not read: Dolma's attributes"] -= len(files)
    others = [file for file in files if not file.name.endswith(JSON_SUFFIXES + TEXT_SUFFIXES)]
    found.update(counted_endings(others))
    readable = []
    for file in sorted(set(files) - set(others)):
        # an empty .txt is an empty document; an empty .gz a download that failed, and an error
        if file.suffix == ".jsonl" and not file.stat().st_size:
            found["files not read: empty"] += 1
        else:
            readable.append(file)
    if not readable:
        reasons = "; ".join(f"{n:,} {reason}" for reason, n in (+found).items())
        raise UserError(f"{root}: holds no file that can be read ({reasons or 'no file at all'}); "
                        + remedy_for(others))
    counts.update(+found)
    return readable


def name_in(root, file):
    """A file's name in the source `root`; ids and provenance need one without the source's place.
    """
    return file.relative_to(root).as_posix() if file != root else file.name


def files_below(root, counts):
    """All files in a folder and the folders in it, but hidden ones; links are followed.

    Each file and folder is taken once, by its path without links if it has one: a link back to a
    folder above it would never end, and a second path would show its documents twice.
    """
    files = []
    seen = set()  # real paths
    folders = deque([root])
    links = deque()  # (path, its folder's real path); they come last
    while folders or links:
        if folders:
            path = folders.popleft()
            real = os.path.realpath(path)
        else:
            path, above = links.popleft()
            real = os.path.realpath(path)
            if above == real or above.startswith(os.path.join(real, "")):
                counts["links not followed: to a folder above them"] += 1
                continue
        if real in seen:
            counts["links not followed: what they lead to is read already"] += 1
            continue
        seen.add(real)
        if not path.is_dir():  # a link to a file
            files.append(path)
            continue
        for entry in entries_of(path, counts):
            if entry.is_symlink():
                links.append((Path(entry.path), real))
            elif entry.is_dir():
                folders.append(Path(entry.path))
            else:
                seen.add(os.path.join(real, entry.name))
                files.append(Path(entry.path))
    return files


def entries_of(folder, counts):
    """The entries of a folder that may be read, sorted by name."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        counts["folders not read: no right to read them"] += 1
        return []
    usable = []
    for entry in entries:
        if entry.name.startswith("."):  # .git, .cache, macOS's ._a.jsonl
            counts["files and folders not read: hidden"] += 1
        elif entry.is_symlink() and not os.path.exists(entry.path):
            counts["links not followed: broken"] += 1
        elif not (entry.is_file() or entry.is_dir()):
            counts["files not read: pipes, sockets or devices"] += 1
        else:
            usable.append(entry)
    return usable


def counted_endings(files):
    """{why they are not read: how many} of files of other kinds, by the ends of their names."""
    endings = Counter(ending_of(file) or "a name without an ending" for file in files)
    counts = {}
    for ending, n in endings.most_common(NAMED_ENDINGS):
        counts[f"files not read: {ending}"] = n
    others = endings.total() - sum(counts.values())
    if others:
        counts["files not read: other endings"] = others
    return counts


def ending_of(file):
    """.png, or .csv.gz of a compressed file; "" if there is none."""
    is_compressed = file.suffix in (".gz", ".zst", ".xz", ".bz2", ".zip")
    return "".join(file.suffixes[-2:]) if is_compressed else file.suffix


def remedy_for(files):
    """What to do with files of other kinds: how the first of them become readable."""
    remedy = (f"name what ends in {', '.join(JSON_SUFFIXES)} (an object a line) or "
              f"{', '.join(TEXT_SUFFIXES)} (a document a file)")
    ways = [REMEDIES[file.suffix] for file in files if file.suffix in REMEDIES]
    return f"{remedy}; to make one: {ways[0]}" if ways else remedy


# ---- Their content -------------------------------------------------------------------------------

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
