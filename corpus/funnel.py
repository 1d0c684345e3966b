"""The funnel: how many documents and bytes each rule dropped or edited, with examples."""

import json
import re
import sys
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass

from configs import setting
from corpus.documents import size_of, warn
from corpus.lines import TEXT_SUFFIXES, ends_in
from corpus.rules import DEDUPLICATIONS, RULES
from support.files import UserError, read_json
from support.text import PLAIN, REVERSE, counted, noted


EXAMPLES = 10  # kept for each rule

TEXTS = "documents in text files left out"  # of a reason why

EXAMPLE_CHARS = 20_000  # of an example's text, from its beginning

SHOWN_LINES = 30  # of an example


class Funnel:
    """What came in, and what each rule dropped or edited: documents, bytes and a few examples."""

    def __init__(self):
        self.counts = Counter()  # "documents in", "bytes in", "bad lines", ...
        self.notes = Counter()  # what was repaired or skipped
        self.rules = defaultdict(Counter)  # rule -> dropped, edited, bytes
        self.examples = defaultdict(list)
        self.bad_lines = []  # messages, of the first EXAMPLES
        self.bad_reasons = Counter()  # of all of them
        self.bad_first = {}  # the first message of each reason

    def drop(self, rule, document, verdict):
        """Count a document that a rule dropped."""
        self.rules[rule].update(dropped=1, bytes=size_of(document["text"]))
        marks = [verdict.mark] if verdict.mark else []
        self.add_example(rule, document, "dropped", verdict.why, marks)

    def edit(self, rule, document, verdict):
        """Count an edit; returns the edited document.

        Its metadata.edited_by says how many cuts each rule made in it.
        """
        # below 0 if a mask is longer than what it masks
        change = size_of(document["text"]) - size_of(verdict.text)
        self.rules[rule].update(edited=1, bytes=change)
        self.add_example(rule, document, "edited", verdict.why, list(verdict.marks))
        metadata = document["metadata"]
        edits = {**metadata.get("edited_by", {}), rule: len(verdict.marks)}
        return {**document, "text": verdict.text, "metadata": {**metadata, "edited_by": edits}}

    def add_example(self, rule, document, outcome, why, marks):
        if len(self.examples[rule]) < EXAMPLES:
            self.examples[rule].append({
                "id": document["id"], "provenance": document["metadata"]["provenance"],
                "outcome": outcome, "why": why, "marks": marks[:EXAMPLES],
                "text": document["text"][:EXAMPLE_CHARS]})

    def bad_line(self, message, place):
        """Count a line of input that is no document; `message` begins with its place."""
        self.counts["bad lines"] += 1
        message_alone = message.removeprefix(place.rpartition(":")[0])  # the line may be another
        reason = re.split(r"[;(]", re.sub(r"^:[\d.]+: ", "", message_alone))[0].strip()
        if ends_in(place.rpartition(":")[0], TEXT_SUFFIXES):  # no line: a whole document is lost
            reason = f"{TEXTS}: {reason}"
        self.bad_reasons[reason] += 1
        self.bad_first.setdefault(reason, message)
        if len(self.bad_lines) < EXAMPLES:
            self.bad_lines.append(message)

    def add(self, other):
        """Add the funnel of the documents that come next; warn of its bad lines."""
        self.counts.update(other.counts)
        self.notes.update(other.notes)
        for rule, counts in other.rules.items():
            self.rules[rule].update(counts)
        # subtle: parts are added in the order of the documents, so that the examples do not depend
        # on which worker was first
        for rule, examples in other.examples.items():
            room = EXAMPLES - len(self.examples[rule])
            self.examples[rule] += examples[:room]
        self.bad_reasons.update(other.bad_reasons)
        self.bad_first = {**other.bad_first, **self.bad_first}
        for message in other.bad_lines[:EXAMPLES - len(self.bad_lines)]:
            warn(f"left out: {message}")
            self.bad_lines.append(message)
            if len(self.bad_lines) == EXAMPLES:
                warn("further bad lines of this source are only counted")

    def as_json(self):
        notes = {note: n for note, n in sorted(self.notes.items()) if n}
        by_rule = {rule: dict(counts) for rule, counts in self.rules.items()}
        commonest = self.bad_reasons.most_common(EXAMPLES)
        return {**self.counts, "notes": notes, "by_rule": by_rule, "bad_lines": self.bad_lines,
                "bad_reasons": dict(commonest),
                "bad_first": [self.bad_first[reason] for reason, _ in commonest]}


# ---- The table -----------------------------------------------------------------------------------

def print_table(folder):
    """Print the funnel of a built data folder: a column for each source, then remarks."""
    manifest = read_json(folder / "manifest.json")
    print(f"data: {folder}  ({manifest['vocab_size']} ids, {manifest['dtype']})")
    if not manifest["sources"]:
        tokens = sum(shard["tokens"] for shard in manifest["shards"])
        print(f"  {counted(len(manifest['shards']), 'ready token file')}, {tokens:,} tokens")
        return
    rows = list(funnel_rows(manifest["sources"]))
    label_width = max(len(label) for label, _ in rows)
    width = max(10, *(len(cell) for _, cells in rows for cell in cells))
    for label, cells in rows:
        padded = "".join(cell.rjust(width + 2) for cell in cells)
        print("  " + label.ljust(label_width) + padded)
    for remark in remarks(manifest):
        has_command = " OLD" in remark or "'OLD'" in remark  # it is copied, so it is not broken
        print(f"  {remark}" if has_command else textwrap.fill(
            remark, 98, initial_indent="  ", subsequent_indent="    "))


def funnel_rows(sources):
    """Yield (label, [a cell for each source]) for each line of the table."""
    def count(label, key, form="{:,}"):
        values = [source.get(key) for source in sources.values()]
        return label, ["-" if value is None else form.format(value) for value in values]

    def megabytes(label, key):
        sizes = [source.get(key, 0) / 1e6 for source in sources.values()]
        return label, [f"{size:,.2f}" for size in sizes]

    all_counts = [source["by_rule"] for source in sources.values()]
    yield "", list(sources)
    yield count("documents in", "documents in")
    yield megabytes("MB in", "bytes in")
    yield count("bad lines left out", "bad lines")
    for rule in rules_that_acted(sources):
        for outcome in ("dropped", "edited"):
            counts = [by_rule.get(rule, {}).get(outcome, 0) for by_rule in all_counts]
            if any(counts):
                yield f"  {rule} {outcome}", [f"{n:,}" if n else "-" for n in counts]
    yield count("documents held out", "held-out documents")
    yield megabytes("MB held out", "held-out bytes")
    yield count("documents kept", "documents")
    yield megabytes("MB kept", "bytes")
    yield count("tokens", "tokens")
    yield count("times shown", "repeats", "{:.3g}")
    yield count("share of the mix", "share", "{:.2%}")


def rules_that_acted(sources):
    """The rules that dropped or edited anything, as they run: decontamination, RULES, leaked."""
    order = [*RULES, *DEDUPLICATIONS, "leaked"]

    def position(rule):
        return order.index(rule) if rule in order else -1  # decontaminate:SET runs first

    acted = {rule for source in sources.values() for rule in source["by_rule"]}
    return sorted(acted, key=lambda rule: (position(rule), rule))


def remarks(manifest):
    """Yield what a reader of the table should know besides."""
    sources = manifest["sources"]
    chosen = {rule for source in sources.values() for rule in source["rules"]}
    idle = chosen - {"empty", *rules_that_acted(sources)}
    if idle:
        in_order = [rule for rule in (*RULES, *DEDUPLICATIONS) if rule in idle]
        yield "nothing to do for " + ", ".join(in_order)
    if "language" in chosen and manifest["scorers"]["language"] == "stand-in":
        yield "language was scored by a stand-in, not a model; language_scorer names another"
    if "content" in chosen and manifest["scorers"]["content"] == "none":
        yield "content was not scored: there is no built-in model; content_scorer names one"
    for name, source in sources.items():
        if manifest["decontaminate"]:
            against = ", ".join(source["decontaminated"]) or "nothing: it is code"
            yield f"{name}: decontaminated against {against}"
        for note, n in source["notes"].items():
            yield f"{name}: {noted(n, note)}"
        for reason, n in source.get("bad_reasons", {}).items():
            is_text = reason.startswith(TEXTS)
            yield f"{name}: {noted(n, reason if is_text else f'bad lines: {reason}')}"
        # bad_first: old data lacks it
        for message in source.get("bad_first", source["bad_lines"][:3]):
            yield f"{name}: left out: {message}"
        if source["documents"] and not source.get("held-out documents"):
            yield from nothing_held_out(name, source, manifest)


def nothing_held_out(name, source, manifest):
    """Yield a remark on a source that was to have held-out text and has none."""
    settings = manifest["settings"].get("clean", {}).get(name, {})
    share = settings.get("eval_share", 0)
    if share:
        cut = ", or cut the text with separator" * (not settings.get("separator"))
        yield (f"{name}: nothing is held out: eval_share={share:g} chose none of "
               f"{counted(source['documents'], 'document')}, so that no domain of it is evaluated; "
               f"raise eval_share, add documents{cut}")


def why_nothing_is_left(source, funnel):
    """What became of the documents of a source that has none to train on, and the remedy."""
    counts = funnel.counts
    where = f"sources: {source.name}: {source.path}"
    if funnel.bad_lines and not counts["documents in"]:
        reasons = ", ".join(f"{n:,}: {why}" for why, n in funnel.bad_reasons.most_common(3))
        return (f"{where}: {counted(counts['bad lines'], 'line')}, and no document ({reasons}); "
                f"the first: {funnel.bad_lines[0]}")
    if not counts["documents in"]:
        return f"{where}: holds no document: it is empty, or all its lines are; add text"
    if counts["held-out documents"] == counts["documents in"]:
        cut = "cut the text into more of them with separator, " * (not source.separator)
        held_out = counted(counts["held-out documents"], "document")
        return (f"{where}: all it has, {held_out}, is held out, chosen by the hashes of "
                f"their ids; add documents, {cut}or hold nothing out: --eval_share=0")
    dropped = ", ".join(f"{rule} {rule_counts['dropped']:,}"
                        for rule, rule_counts in funnel.rules.items() if rule_counts["dropped"])
    read = counted(counts["documents in"], "document")
    return (f"{where}: no text to train on is left of {read} and "
            f"{counted(counts['bad lines'], 'bad line')}; dropped by: {dropped or 'no rule'}; "
            f"held out: {counts['held-out documents']:,}; add text, or take out rules")


# ---- Examples ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ShowOptions:
    """What `python data.py CONFIG` shows instead of the funnel."""

    show: str = setting("", "A rule: print a few documents that it dropped or edited, and why.")


def print_dropped(folder, rule):
    """Print the examples of a rule in a built data folder, with the reason and the place marked."""
    examples = []
    for path in sorted((folder / "dropped").glob("*.jsonl")):
        examples += map(json.loads, path.read_text().splitlines())
    # "decontaminate" means all of its sets
    chosen = [example for example in examples
              if rule in (example["rule"], example["rule"].partition(":")[0])]
    if not chosen:
        acted = ", ".join(sorted({example["rule"] for example in examples}))
        raise UserError(f"--show={rule}: this rule dropped and edited nothing; "
                        f"these did: {acted or 'none'}")
    for example in chosen:
        print_example(example)


def print_example(example):
    """Print up to SHOWN_LINES lines of an example, from a little before its first mark."""
    on, off = ">>>", "<<<"
    if sys.stdout.isatty():
        on, off = REVERSE, PLAIN
    print(f"\n{example['outcome']} by {example['rule']}: {example['why']}")
    print(f"  {example['id']} ({example['provenance']})")
    lines = marked(example["text"], example["marks"], on, off).splitlines()
    with_mark = [i for i, line in enumerate(lines) if on in line]
    begin = max(0, with_mark[0] - 5) if with_mark else 0
    for line in lines[begin:begin + SHOWN_LINES]:
        print(f"    | {line}")
    if len(lines) > SHOWN_LINES:
        end = min(len(lines), begin + SHOWN_LINES)
        print(f"    (lines {begin + 1} to {end} of {len(lines)})")


def marked(text, marks, on, off):
    """`text` with each of the marks in it between `on` and `off`, however its words are spaced."""
    # long marks first: a short one may be part of a long one
    for mark in sorted(filter(str.strip, set(marks)), key=len, reverse=True):
        pattern = r"\s+".join(map(re.escape, mark.split()))
        if mark[0].isalnum() and mark[-1].isalnum():  # not as a part of a longer word
            pattern = rf"(?<!\w){pattern}(?!\w)"
        text = re.sub(pattern, lambda found: f"{on}{found[0]}{off}", text)
    return text
