"""The entries of the config's `sources`: a path, the rules it needs, its weight."""

import difflib
import math
import re
from os.path import realpath
from pathlib import Path
from typing import NamedTuple

from corpus.rules import CONTENT_SCORERS, DEDUPLICATIONS, LANGUAGE_SCORERS, RULES
from support.files import UserError

# A word of `rules` that stands for several rules.
RULE_SETS = {
    "gopher": " ".join(rule for rule in RULES if rule.startswith("gopher")),
    "c4": "c4_punctuation c4_short_lines c4_document",
    # what Dolma v1.6 does with its sources: the toolkit's configs/dolma-v1_6/mixing at 669f534
    "code": " ".join(rule for rule in RULES if rule.startswith("code"))
            + " repeated_tokens document",
    "web": "language c4_punctuation gopher repeated_tokens content pii url document paragraph",
    "books": "language min_words repeated_tokens",
    "wiki": "min_words repeated_tokens",  # its dump is of one language already
}


class Source(NamedTuple):
    """One entry of the config's `sources`."""
    name: str
    path: str
    rules: tuple = ()  # names, in the order in which they run; no rule sets
    weight: float = 1.0
    text: str = "text"  # the key of the text in a file of JSON
    separator: str = ""  # cuts a text file into documents


def parse_source(name, entry):
    """The Source of an entry of `sources`: a path, or a dict of the fields of a Source."""
    if isinstance(entry, str):
        entry = {"path": entry}
    place = f"sources: {name}"
    # the name becomes part of file names, which must stay in the folder of the build
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"sources: {name!r} cannot name files; use letters, digits, . _ -")
    keys = Source._fields[1:]
    for key in entry:
        if key not in keys:
            raise UserError(f"{place}: unknown key {key!r}; there are {', '.join(keys)}")
    path = entry.get("path")
    rules = entry.get("rules", "")
    weight = entry.get("weight", 1.0)
    if not isinstance(path, str) or not path:
        raise UserError(f"{place}: path {path!r}; write a path as a string")
    if not isinstance(rules, str):
        raise UserError(f"{place}: rules {rules!r}; write the names in one string")
    text = entry.get("text", "text")
    separator = entry.get("separator", "")
    for key, value in (("text", text), ("separator", separator)):
        if not isinstance(value, str) or (key == "text" and not value):
            raise UserError(f"{place}: {key} {value!r}; write a string")
    # subtle: True is an int in Python, and no weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < 1e6:
        raise UserError(f"{place}: weight {weight!r}; write a number above 0, below 1e6")
    return Source(name, path, expand_rules(rules, name), float(weight), text, separator)


def expand_rules(words, source):
    """The names of rules in `words`, rule sets expanded, each once, in the order they run."""
    chosen = {"empty"}  # for every source
    for word in words.replace(",", " ").split():
        if word in RULE_SETS:
            chosen |= set(expand_rules(RULE_SETS[word], source))
        elif word in RULES or word in DEDUPLICATIONS:
            chosen.add(word)
        else:
            raise UserError(f"sources: {source}: unknown rule {word!r}; {suggestion(word)}")
    return tuple(rule for rule in (*RULES, *DEDUPLICATIONS) if rule in chosen)


def suggestion(word):
    """The rule whose name is nearest to `word`, as a question, or all of them."""
    known = [*RULE_SETS, *RULES, *DEDUPLICATIONS]
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else "there are " + ", ".join(known)


def parse_sources(sources, mix_tokens):
    """A list of Source from the config's `sources`; the weights must be shares with mix_tokens."""
    parsed = [parse_source(name, entry) for name, entry in sources.items()]
    if not parsed:
        raise UserError("sources={}: name at least one, --sources=\"{'name': 'path'}\"")
    total = sum(source.weight for source in parsed)
    if mix_tokens and abs(total - 1) > 1e-6:
        raise UserError(f"sources: with mix_tokens={mix_tokens} the weights are shares of it; make "
                        f"them sum to 1, not to {total:g}")
    return parsed


def check_outside(folder, key, sources):
    """UserError if `folder`, the value of `key`, lies in a source: it would be read as its text."""
    for source in sources:
        # os.path.realpath and not resolve, which stops at a link that leads to itself
        inside = Path(realpath(folder)).is_relative_to(realpath(source.path))
        if inside and source.path != "stdlib":
            raise UserError(f"{key}={folder}: lies in {source.path}, the path of source "
                            f"{source.name}, whose files are read as text; choose another --{key}")


def check_data_config(config):
    """Raise UserError for the first value of a DataConfig that makes no sense."""
    checks = [
        (config.language_scorer in LANGUAGE_SCORERS, "language_scorer",
         "write one of " + ", ".join(LANGUAGE_SCORERS)),
        (config.content_scorer in CONTENT_SCORERS, "content_scorer",
         "write one of " + ", ".join(CONTENT_SCORERS)),
        ("stdlib" not in config.decontaminate.values(), "decontaminate",
         "write a file or folder for each set"),
        (0 <= config.eval_share <= 1, "eval_share", "write a share from 0 to 1"),
        (0 < config.bloom_fp_rate < 1, "bloom_fp_rate", "write a rate between 0 and 1"),
        (0 < config.max_repeats < math.inf, "max_repeats",
         "write a number above 0, such as 1e9 for no limit"),
    ]
    for key in ("seed", "mix_tokens", "bloom_items", "workers"):
        checks.append((getattr(config, key) >= 0, key, "write 0 or more"))
    # each worker is a process, and a Bloom filter takes 29 bits an item
    checks.append((config.workers <= 1000, "workers", "write 0 to 1000, or 0 for one a core"))
    checks.append((config.bloom_items < 1e12, "bloom_items", "write a number below 1e12"))
    for is_fine, key, remedy in checks:
        if not is_fine:
            raise UserError(f"{key}={getattr(config, key)}: {remedy}")
    config.parse_sources()
