"""Warnings above the funnel's table: rules that took out more than half, a separator that cut none.

And an error for `--show` of a rule that no source has.
"""

from pathlib import Path

from corpus.funnel import print_table
from corpus.rules import DEDUPLICATIONS, RULES
from support.files import UserError, read_json

MOST_LOST = 0.5  # of a source's bytes
NAMED_RULES = 3


def print_funnel(folder, run=None, overwrite=False):
    """Print the warnings about built data and its table; a line alone if `run` has it already."""
    if run and not overwrite and is_data_of(folder, run):
        print(f"data: {folder}, the same as before; python eval.py report {run} shows its table")
        return
    print_large_drops(folder)
    print_idle_separators(folder)
    print_table(folder)


def is_data_of(folder, run):
    """Whether a run was trained on this built data, as the run's manifest.json has it."""
    known = Path(run) / "manifest.json"
    data = read_json(folder / "manifest.json")
    return known.is_file() and read_json(known).get("sha256") == data["sha256"]


def print_large_drops(folder):
    """Print a line for each source of which the rules took out more than half."""
    sources = read_json(folder / "manifest.json")["sources"]
    for name, source in sources.items():
        lost = {}  # {rule: megabytes}
        for rule, counts in source["by_rule"].items():
            megabytes = counts.get("bytes", 0) / 1e6
            if megabytes > 0:
                lost[rule] = megabytes
        total = sum(lost.values())
        whole = source.get("bytes in", 0) / 1e6
        if total <= MOST_LOST * whole:
            continue
        rules = sorted(lost, key=lost.get, reverse=True)
        rules = rules[:NAMED_RULES]
        listed = ", ".join(f"{rule} {lost[rule]:,.2f}" for rule in rules)
        print(f"warning: {name}: rules took out {total:,.2f} of {whole:,.2f} MB ({listed}); to "
              f"see what: python data.py CONFIG --show={rules[0]}")


def print_idle_separators(folder):
    """Print a line for each source whose separator has cut none of its files."""
    manifest = read_json(folder / "manifest.json")
    for name, source in manifest["sources"].items():
        settings = manifest["settings"].get("clean", {}).get(name, {})
        if "separator" in settings and source["documents in"] == len(settings["inputs"]):
            print(f"warning: {name}: the separator {settings['separator']!r} cut no file; each is "
                  "one document")


def checked_rule(folder, rule):
    """The rule that --show names; UserError if it is one of ours that no source of the data has."""
    sources = read_json(folder / "manifest.json")["sources"]
    rows = set().union(*(source["by_rule"] for source in sources.values()))
    known = {*RULES, *DEDUPLICATIONS, *rows, *(row.partition(":")[0] for row in rows)}
    if rule not in known:
        parts = sorted(row for row in rows if row.startswith(rule))
        which = f"did you mean {', '.join(parts)}?" if parts else (
            f"the table has {', '.join(sorted(rows)) or 'none'}")
        raise UserError(f"--show={rule}: no rule has this name; {which}")
    is_used = any(rule in source["rules"] for source in sources.values())
    if is_used or not sources or rule not in {*RULES, *DEDUPLICATIONS}:
        return rule
    listed = []
    for name, source in sources.items():
        rules = [each for each in source["rules"] if each != "empty"]  # which every source has
        listed.append(f"{name} has {', '.join(rules) or 'no rules'}")
    raise UserError(f"--show={rule}: no source has this rule ({'; '.join(listed)}); a source takes "
                    f"rules in the config: \"{name}\": {{\"path\": ..., \"rules\": \"{rule}\"}}")
