"""The files of a source: which of a folder's are read, what is left out and why."""

import os
from collections import Counter, deque
from pathlib import Path

from corpus.hub_folders import check_splits, files_with_rows, is_card
from corpus.json_lists import holds_rows
from corpus.lines import JSON_SUFFIXES, TEXT_SUFFIXES
from corpus.tables import TABLE_SUFFIXES
from support.files import here
from support.hints import command
from support.text import UserError

SUFFIXES = JSON_SUFFIXES + TABLE_SUFFIXES + TEXT_SUFFIXES
FIRST_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".txt", ".md", ".rst", ".py")
NAMED_ENDINGS = 5  # the commonest of the files that are not read; the others are counted together

# How a file of another kind becomes one that is read, by its ending.
TABLE = ('python -c "import pandas; pandas.read_{}(\'OLD\').to_json(\'NEW.jsonl\', '
         'orient=\'records\', lines=True)"')
REMEDIES = {
    ".zst": "zstd -d OLD; what holds JSON may be packed, as NAME.jsonl.zst",
    ".gz": "gunzip OLD; what holds JSON may be packed, as NAME.jsonl.gz",
    ".xz": "unxz OLD", ".bz2": "bunzip2 OLD", ".zip": "unzip OLD",
    ".csv": TABLE.format("csv")}


def input_files(root, counts):
    """The files at `root` that are read, sorted; `counts` receives how many others there are.

    root: a file, a folder or a pattern, such as data/train-*.parquet. Links are followed. Raises
    UserError if nothing there can be read.
    """
    if is_pattern(root):
        return [file for each in matches(root) for file in input_files(each, counts)]
    if root.is_file():
        if root.name.endswith(SUFFIXES):
            return [root]
        raise UserError(f"{root}: cannot read this kind of file; {remedy_for([root])}")
    if root.is_symlink() and not root.exists():
        raise UserError(f"{root}: a broken link: there is no {os.path.realpath(root)}")
    if not root.exists():
        others = '--sources=\'{"name": "path"}\''
        if command() == "adapt.py":
            others = "--train_data, --eval_data"
        raise UserError(f"{root}: no such file or folder{here(root)}; put .jsonl, .json, "
                        '.parquet or .txt files there, or name others: ' + others)
    if not root.is_dir():
        raise UserError(f"{root}: neither a file nor a folder; save what it holds in a file")
    found = Counter()  # what is not read: {why: files}
    files = files_with_rows(files_in(root, found), found)
    others = [file for file in files if not file.name.endswith(SUFFIXES)]
    found.update(counted_endings(others))
    readable = readable_files(sorted(set(files) - set(others)), found)
    check_splits(root, readable, found)
    if not readable:
        reasons = "; ".join(f"{n:,} {reason}" for reason, n in (+found).items())
        raise UserError(f"{root}: holds no file that can be read ({reasons or 'no file at all'}); "
                        + remedy_for(others))
    counts.update(+found)
    return readable


def files_in(root, counts):
    """All files in a folder but hidden ones, and of Dolma's layout those of documents."""
    files = files_below(root, counts)
    if (root / "documents").is_dir():  # the taggers' results are in attributes/
        counts["files not read: Dolma's attributes"] = len(files)
        files = [file for file in files if root / "attributes" not in file.parents]
        counts["files not read: Dolma's attributes"] -= len(files)
    return files


def readable_files(files, counts):
    """Those of a folder's files, all of kinds that are read, that are no settings and no card."""
    has_text = any(map(is_text, files))
    readable = []
    for file in files:
        why_not = why_not_read(file, has_text)
        if why_not:
            counts[f"files not read: {why_not}"] += 1
        else:
            readable.append(file)
    rows = [file for file in readable if not is_card(file)]
    if has_text or not rows:
        return readable
    counts["files not read: they describe the others"] += len(readable) - len(rows)
    return rows


def files_of_first_rules(root):
    """The files at `root` that the first versions of data.py read, sorted; data they built is used.
    """
    if not root.is_dir():
        return input_files(root, Counter())
    files = [file for file in files_in(root, Counter()) if file.name.endswith(FIRST_SUFFIXES)]
    return sorted(file for file in files if file.suffix != ".jsonl" or file.stat().st_size)


def is_there(path):
    """Whether a path leads to a file or folder, or is a pattern of some."""
    path = Path(path)
    return path.exists() or is_pattern(path)


def is_pattern(path):
    """Whether a path stands for files by a * in its last part."""
    return "*" in path.name and not path.exists() and bool(matches(path))


def matches(pattern):
    """The files and folders that a pattern stands for, sorted; as in a shell, no hidden ones."""
    return sorted(path for path in pattern.parent.glob(pattern.name)
                  if not path.name.startswith(".") or pattern.name.startswith("."))


def is_text(file):
    """Whether a file is a text, and not one that only describes the files of a folder."""
    return file.name.endswith(TEXT_SUFFIXES) and not is_card(file)


def why_not_read(file, has_text):
    """Why a file of a folder is not read though its ending is right; "" if it is read.

    has_text: whether the folder holds texts. A .json file may be anything: beside texts and code
    it configures something, elsewhere it is data if it holds several objects.
    """
    # an empty .txt is an empty document; an empty .gz a download that failed, and an error
    if file.suffix in (".jsonl", ".json") and not file.stat().st_size:
        return "empty"
    if file.suffix != ".json":
        return ""
    if has_text:
        return ".json beside text or code; to read one, name it"
    return "" if holds_rows(file) else ".json of at most one object; to read one, name it"


def name_in(root, file):
    """A file's name in the source `root`; ids and provenance need one without the source's place.
    """
    above = root.parent if is_pattern(root) else root
    return file.relative_to(above).as_posix() if file != root else file.name


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
    remedy = (f"name what ends in {', '.join(JSON_SUFFIXES)} (objects), "
              f"{', '.join(TABLE_SUFFIXES)} (a document a row) or "
              f"{', '.join(TEXT_SUFFIXES)} (a document a file)")
    ways = [REMEDIES[file.suffix] for file in files if file.suffix in REMEDIES]
    return f"{remedy}; to make one: {ways[0]}" if ways else remedy
