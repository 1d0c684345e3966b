"""The files of a source: which of a folder's are read, what is left out and why."""

import os
from collections import Counter, deque
from pathlib import Path

from corpus.hub_folders import check_splits, files_with_rows, is_card
from corpus.json_lists import holds_rows, list_inside
from corpus.left_out import ANY_OTHER, LeftOut, remedy_for
from corpus.lines import JSON_SUFFIXES, TEXT_SUFFIXES, ends_in
from corpus.tables import TABLE_SUFFIXES
from support.files import here
from support.hints import command
from support.text import UserError, noted

SUFFIXES = JSON_SUFFIXES + TABLE_SUFFIXES + TEXT_SUFFIXES
FIRST_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".txt", ".md", ".rst", ".py")

READ = (f"name what ends in {', '.join(JSON_SUFFIXES)} (objects), {', '.join(TABLE_SUFFIXES)} "
        f"(a document a row) or {', '.join(TEXT_SUFFIXES)} (a document a file)")


def input_files(root, counts):
    """The files at `root` that are read, sorted; `counts` receives how many others there are.

    root: a file, a folder or a pattern, such as data/train-*.parquet. Links are followed. Raises
    UserError if nothing there can be read.
    """
    top = root.parent if is_pattern(root) else root
    left_out = LeftOut(top)
    files = []
    for each in matches(root) if is_pattern(root) else [root]:
        found = LeftOut(top)
        files += files_at(each, found)
        left_out.update(found)
    counts.update(left_out.notes())
    return files


def files_at(root, left_out):
    """The same for a file or folder; `left_out` receives what is not read."""
    if root.is_file():
        if ends_in(root, SUFFIXES):
            return [root]
        raise UserError(f"{root}: cannot read this kind of file; {READ}; to make one: "
                        + (remedy_for(root) or ANY_OTHER))
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
    files = files_with_rows(files_in(root, left_out), left_out)
    others = [file for file in files if not ends_in(file, SUFFIXES)]
    left_out.add_endings(sorted(others))
    readable = readable_files(sorted(set(files) - set(others)), left_out)
    check_splits(root, readable, left_out.counts)
    if not readable:
        reasons = "; ".join(noted(n, reason) for reason, n in left_out.notes().items())
        has_remedy = others and all(map(remedy_for, others))
        raise UserError(f"{root}: holds no file that can be read ({reasons or 'no file at all'}); "
                        + READ + f"; {ANY_OTHER}" * (not has_remedy))
    return readable


def files_in(root, left_out):
    """All files in a folder but hidden ones, and of Dolma's layout those of documents."""
    files = files_below(root, left_out)
    if (root / "documents").is_dir():  # the taggers' results are in attributes/
        results = [file for file in files if root / "attributes" in file.parents]
        left_out.add_files("Dolma's attributes", results)
        files = [file for file in files if root / "attributes" not in file.parents]
    return files


def readable_files(files, left_out):
    """Those of a folder's files, all of kinds that are read, that are no settings and no card."""
    has_text = any(map(is_text, files))
    readable = []
    for file in files:
        why_not = why_not_read(file, has_text)
        if why_not:
            left_out.add_files(why_not, [file])
        else:
            readable.append(file)
    rows = [file for file in readable if not is_card(file)]
    if has_text or not rows:
        return readable
    left_out.add_files("README, license or changelog beside data", filter(is_card, readable))
    return rows


def files_of_first_rules(root):
    """The files at `root` that the first versions of data.py read, sorted; data they built is used.
    """
    if not root.is_dir():
        return input_files(root, Counter())
    files = [file for file in files_in(root, LeftOut(root)) if file.name.endswith(FIRST_SUFFIXES)]
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
    return ends_in(file, TEXT_SUFFIXES) and not is_card(file)


def why_not_read(file, has_text):
    """Why a file of a folder is not read though its ending is right; "" if it is read.

    has_text: whether the folder holds texts. A .json file may be anything: beside texts and code
    it configures something, elsewhere it is data if it holds several objects.
    """
    # an empty .txt is an empty document; an empty .gz a download that failed, and an error
    if ends_in(file, (".jsonl", ".json")) and not file.stat().st_size:
        return "empty"
    if not ends_in(file, ".json"):
        return ""
    if has_text:
        return ".json beside text or code; to read one, name it"
    if holds_rows(file):
        return ""
    key = list_inside(file)
    if key:
        return f".json of one object; if {key} holds the rows: jq -c '.{key}[]' OLD > NEW.jsonl"
    return ".json of at most one object; to read one, name it"


def name_in(root, file):
    """A file's name in the source `root`; ids and provenance need one without the source's place.
    """
    above = root.parent if is_pattern(root) else root
    return file.relative_to(above).as_posix() if file != root else file.name


def files_below(root, left_out):
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
                left_out.add("links not followed: to a folder above", path)
                continue
        if real in seen:
            left_out.add("links not followed: to what is read already", path)
            continue
        seen.add(real)
        if not path.is_dir():  # a link to a file
            files.append(path)
            continue
        for entry in entries_of(path, left_out):
            if entry.is_symlink():
                links.append((Path(entry.path), real))
            elif entry.is_dir():
                folders.append(Path(entry.path))
            else:
                seen.add(os.path.join(real, entry.name))
                files.append(Path(entry.path))
    return files


def entries_of(folder, left_out):
    """The entries of a folder that may be read, sorted by name."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        left_out.add("folders not read: no right to read", folder)
        return []
    usable = []
    for entry in entries:
        if entry.name.startswith("."):  # .git, .cache, macOS's ._a.jsonl
            kind = "folders" if entry.is_dir() else "files"
            left_out.add(f"{kind} not read: hidden", Path(entry.path))
        elif entry.is_symlink() and not os.path.exists(entry.path):
            left_out.add("links not followed: broken", Path(entry.path))
        elif not (entry.is_file() or entry.is_dir()):
            left_out.add_files("pipes, sockets or devices", [Path(entry.path)])
        else:
            usable.append(entry)
    return usable
