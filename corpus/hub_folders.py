"""Folders as the hubs and `datasets` make them: which of their files hold the rows of one data set.

A table's folder may also hold its card, files that an earlier run of `datasets` cached, and rows
that are kept apart for tests.
"""

import re
from collections import Counter, defaultdict

from corpus.lines import JSON_SUFFIXES, TEXT_SUFFIXES
from corpus.tables import TABLE_SUFFIXES
from support.files import read_json
from support.text import UserError, counted

# The names that `datasets` knows (SPLIT_KEYWORDS of its data_files.py), as words of a file's name.
SPLITS = {"train": "train", "training": "train",
          "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation",
          "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
DESCRIBE = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json")
SHARD = re.compile(r"-\d{5}-of-\d{5}.*")


def files_with_rows(root, files, counts):
    """`files` of the folder `root` without those that only describe or cache its tables.

    counts: receives how many were left out, by reason. Raises UserError for several splits.
    """
    tables = [file for file in files if file.name.endswith(TABLE_SUFFIXES)]
    count_splits(root, [file for file in files if file.name.endswith(JSON_SUFFIXES)], counts)
    if not tables:
        return files
    left_out = {}  # {file: why}
    for file in files:
        if file.name == "dataset_dict.json":
            check_single(file)
        elif file.name == "state.json":
            listed = saved_files(file, tables)
            unlisted = {table for table in tables if table.parent == file.parent} - listed
            if listed:
                left_out[file] = "they describe tables"
                left_out |= dict.fromkeys(unlisted, "not in the list of a state.json")
    for file in files:
        if file.match("cache-*.arrow"):
            left_out.setdefault(file, "caches of datasets")
        elif file.name in DESCRIBE or is_card(file):
            left_out[file] = "they describe tables"
    counts.update(f"files not read: {why}" for why in left_out.values())
    check_splits(root, [table for table in tables if table not in left_out])
    return [file for file in files if file not in left_out]


def is_card(file):
    """Whether a file is a text that only describes the files beside it."""
    is_named = file.name.lower().startswith(("readme", "license", "changelog"))
    return is_named and file.name.endswith(TEXT_SUFFIXES)


def check_single(file):
    """UserError if a folder of DatasetDict.save_to_disk holds several splits."""
    content = read_json(file)
    splits = content.get("splits", []) if isinstance(content, dict) else []
    if len(splits) > 1:
        raise UserError(f"{file.parent}: holds the splits {', '.join(splits)}; name one: "
                        f"{file.parent / splits[0]}")


def saved_files(file, tables):
    """The tables that the state.json of Dataset.save_to_disk lists; empty if it is of another kind.

    Raises UserError for a table that is not there, and for rows that are not in their order there.
    """
    state = read_json(file)
    if not isinstance(state, dict) or not isinstance(state.get("_data_files"), list):
        return set()
    # before datasets 1.16 the chosen rows of a shuffled or filtered set were a list of numbers, and
    # before 1.6 a renamed column was a note
    history = state.get("_inplace_history") or []
    if state.get("_indices_data_files") or any(each.get("transforms") for each in history):
        raise UserError(f"{file}: the rows were chosen or changed, and its tables hold those from "
                        "before; write them anew: datasets.load_from_disk(OLD).flatten_indices()"
                        ".save_to_disk(NEW)")
    listed = {file.parent / str(entry.get("filename")) for entry in state["_data_files"]}
    missing = sorted(str(each) for each in listed - set(tables))
    if missing:
        raise UserError(f"{missing[0]}: is not there, and {file} lists it; copy the whole folder "
                        "again")
    return listed


# ---- Splits --------------------------------------------------------------------------------------

def check_splits(root, tables):
    """UserError if tables of training and of test rows are there, which nobody wants to mix."""
    splits, kinds = splits_of(root, tables)
    if len(kinds) < 2:
        return
    names = ", ".join(f"{name} ({counted(len(paths), 'file')})" for name, paths in splits.items())
    training = [name for name in splits if "train" in name.lower()]
    [path, *_] = splits[training[0] if training else min(splits)]
    raise UserError(f"{root}: holds several splits: {names}; name one of them: {path}")


def count_splits(root, files, counts):
    """Count the files of each kind of split, if there are several; such files may be mixed."""
    _, kinds = splits_of(root, files)
    if len(kinds) > 1:
        counts.update({f"files read of the split {kind}": n for kind, n in kinds.items()})


def splits_of(root, files):
    """Returns ({name of a split: [path to its files, for each of them]}, {kind: files})."""
    splits = defaultdict(list)
    kinds = Counter()
    for file in sorted(files):
        kind, name, path = split_of(file.relative_to(root))
        if kind:
            kinds[kind] += 1
            splits[name].append(root / path)
    return splits, kinds


def split_of(path):
    """Returns (kind, name, path): the split that a file is of, and a path to all of its files.

    The name of the file says it, or that of the nearest folder; else kind is None.
    """
    name = SHARD.sub("", path.name) if SHARD.search(path.name) else path.stem
    kind = kind_of(name)
    if kind:
        pattern = f"{name}-*{path.suffix}" if SHARD.search(path.name) else path.name
        return kind, name, path.with_name(pattern)
    for folder in path.parents:
        kind = kind_of(folder.name)
        if kind:
            return kind, folder.name, folder
    return None, "", path


def kind_of(name):
    """The kind of split that a word of a name stands for; None if no word does."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)
