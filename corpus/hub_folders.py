"""Folders as the hubs and `datasets` make them: which of their files hold the rows of one data set.

A table's folder may also hold its card, files that an earlier run of `datasets` cached, and rows
that are kept apart for tests.
"""

import re
from collections import Counter, defaultdict

from corpus.lines import TEXT_SUFFIXES, ends_in
from corpus.tables import TABLE_SUFFIXES
from support.files import read_json
from support.text import UserError, counted

# The names that `datasets` knows (SPLIT_KEYWORDS of its data_files.py), as words of a file's name.
SPLITS = {"train": "train", "training": "train",
          "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation",
          "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
DESCRIBE = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json")
DESCRIBES = "written by datasets to describe its tables"
SHARD = re.compile(r"-\d{5}-of-\d{5}.*")


def files_with_rows(files, left_out_files):
    """`files` of a folder without those that only describe or cache its tables.

    left_out_files: receives those that are left out. Raises UserError for tables that are not the
    listed ones.
    """
    tables = [file for file in files if ends_in(file, TABLE_SUFFIXES)]
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
                left_out[file] = DESCRIBES
                left_out |= dict.fromkeys(sorted(unlisted), "not in the list of a state.json")
    for file in files:
        if file.match("cache-*.arrow"):
            left_out.setdefault(file, "caches of datasets")
        elif file.name in DESCRIBE:
            left_out[file] = DESCRIBES
    for file, why in left_out.items():
        left_out_files.add_files(why, [file])
    return [file for file in files if file not in left_out]


def is_card(file):
    """Whether a file is a text that only describes the files beside it."""
    is_named = file.name.lower().startswith(("readme", "license", "changelog"))
    return is_named and ends_in(file, TEXT_SUFFIXES)


def check_single(file):
    """UserError if a folder of DatasetDict.save_to_disk holds several splits."""
    splits = read_json(file).get("splits")
    if isinstance(splits, list) and len(splits) > 1:
        names = list(map(str, splits))
        raise UserError(f"{file.parent}: holds the splits {', '.join(names)}; name one: "
                        f"{file.parent / names[0]}")


def saved_files(file, tables):
    """The tables that the state.json of Dataset.save_to_disk lists; empty if it is of another kind.

    Raises UserError for a table that is not there, and for rows that are not in their order there.
    """
    state = read_json(file)
    entries = state.get("_data_files")
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        return set()
    if state.get("_indices_data_files"):  # before datasets 1.16: the numbers of the chosen rows
        raise UserError(f"{file}: the rows are chosen by a list of numbers, which is not read; "
                        "write them in their order: datasets.load_from_disk(OLD)"
                        ".flatten_indices().save_to_disk(NEW)")
    listed = {file.parent / str(entry.get("filename")) for entry in entries}
    missing = sorted(str(each) for each in listed - set(tables))
    if missing:
        raise UserError(f"{missing[0]}: is not there, and {file} lists it; copy the whole folder "
                        "again")
    return listed


# ---- Splits --------------------------------------------------------------------------------------

def check_splits(root, files, counts):
    """Count the files of each split, if there are several. UserError if one of them is a table.

    Nobody wants to train on test rows. Folders of JSON alone were always read whole, and the name
    of a text, such as test_train.py, says nothing.
    """
    splits = defaultdict(Counter)  # {split: {path to its files: how many}}
    tables = []
    for file in files:
        split, path = split_of(file.relative_to(root))
        if split and not ends_in(file, TEXT_SUFFIXES):
            splits[split][root / path] += 1
            tables += [file] * ends_in(file, TABLE_SUFFIXES)
    if len(splits) < 2:
        return
    if not tables:
        counts.update({f"files read of the split {split} (to read one split, name its files)":
                       paths.total() for split, paths in splits.items()})
        return
    names = ", ".join(f"{split} ({counted(paths.total(), 'file')})"
                      for split, paths in splits.items())
    training = [split for split in splits if "train" in split]
    path = min(splits[training[0] if training else min(splits)])
    raise UserError(f"{root}: holds several splits: {names}; name one of them: {path}; a pattern "
                    f"reads several, such as *{tables[0].suffix}")


def split_of(path):
    """Returns (split, path): which split a file is of, and a path to all of its files.

    The name of the file says it, or that of the nearest folder; else split is None.
    """
    is_shard = SHARD.search(path.name)
    name = SHARD.sub("", path.name) if is_shard else path.stem
    kind = kind_of(name)
    if kind:
        # such as train_sft-00000-of-00001.parquet: the hub's, where train_prefs is another split
        is_hubs = is_shard and re.fullmatch(r"\w+", name)
        pattern = f"{name}-*{path.suffix}" if is_shard else path.name
        return name if is_hubs else kind, path.with_name(pattern)
    for folder in path.parents:
        kind = kind_of(folder.name)
        if kind:
            return kind, folder
    return None, path


def kind_of(name):
    """The kind of split that a word of a name stands for; None if no word does."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)
