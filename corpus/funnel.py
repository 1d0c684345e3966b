"""The funnel: what each rule dropped or edited, counted, with examples, as a table."""

import json
import re
import sys
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass

from corpus.documents import size_of, warn
from corpus.rules import DEDUPLICATIONS, RULES
from support.files import UserError, read_json


EXAMPLES = 10  # kept of each rule

EXAMPLE_CHARS = 20_000


class Funnel:
    """What came in, and what each rule dropped or edited: documents, bytes and a few examples."""

    def __init__(self):
        self.counts, self.notes, self.rules = Counter(), Counter(), defaultdict(Counter)
        self.examples, self.bad_lines = defaultdict(list), []

    def drop(self, rule, document, verdict):
        self.rules[rule].update(dropped=1, bytes=size_of(document["text"]))
        self.show(rule, document, "dropped", verdict.why, [verdict.mark] if verdict.mark else [])

    def edit(self, rule, document, verdict):
        """The edited document; its metadata.edited_by says how many cuts each rule made in it."""
        change = size_of(document["text"]) - size_of(verdict.text)
        self.rules[rule].update(edited=1, bytes=change)
        self.show(rule, document, "edited", verdict.why, list(verdict.marks))
        edits = {**document["metadata"].get("edited_by", {}), rule: len(verdict.marks)}
        return {**document, "text": verdict.text,
                "metadata": {**document["metadata"], "edited_by": edits}}

    def show(self, rule, document, outcome, why, marks):
        if len(self.examples[rule]) < EXAMPLES:
            self.examples[rule].append({
                "id": document["id"], "provenance": document["metadata"]["provenance"],
                "outcome": outcome, "why": why, "marks": marks[:EXAMPLES],
                "text": document["text"][:EXAMPLE_CHARS]})

    def bad_line(self, message):
        self.counts["bad lines"] += 1
        self.bad_lines.append(message)

    def add(self, other):
        """Take in the funnel of the next documents."""
        self.counts.update(other.counts)
        self.notes.update(other.notes)
        for rule, counts in other.rules.items():
            self.rules[rule].update(counts)
        for rule, examples in other.examples.items():
            self.examples[rule] += examples[:EXAMPLES - len(self.examples[rule])]
        for message in other.bad_lines:
            warn(f"left out: {message}")
        self.bad_lines = (self.bad_lines + other.bad_lines)[:1000]

    def as_json(self):
        return {**self.counts, "notes": {note: n for note, n in sorted(self.notes.items()) if n},
                "by_rule": {rule: dict(counts) for rule, counts in self.rules.items()},
                "bad_lines": self.bad_lines}


def print_table(folder):
    """The funnel: what came in, what each rule dropped or edited, what is left, by source."""
    manifest = read_json(folder / "manifest.json")
    print(f"data: {folder}  ({manifest['vocab_size']} ids, {manifest['dtype']})")
    if manifest["sources"]:
        rows = list(funnel_rows(manifest["sources"]))
        wide = max(len(label) for label, _ in rows)
        cell_wide = max(10, *(len(cell) for _, cells in rows for cell in cells))
        for label, cells in rows:
            print(f"  {label:<{wide}}" + "".join(f"  {cell:>{cell_wide}}" for cell in cells))
        for remark in remarks(manifest):
            print(textwrap.fill(remark, 98, initial_indent="  ", subsequent_indent="    "))
    else:
        tokens = sum(shard["tokens"] for shard in manifest["shards"])
        print(f"  {len(manifest['shards'])} ready token files, {tokens:,} tokens")


def funnel_rows(sources):
    """(label, a cell for each source) of each line of the table."""
    def row(label, key, form="{:,}"):
        if "bytes" in key:
            return label, [f"{source.get(key, 0) / 1e6:,.2f}" for source in sources.values()]
        return label, [form.format(source[key]) if key in source else "-"
                       for source in sources.values()]
    yield "", list(sources)
    yield row("documents in", "documents in")
    yield row("MB in", "bytes in")
    yield row("bad lines left out", "bad lines")
    for rule in rules_that_acted(sources):
        for outcome in ("dropped", "edited"):
            cells = [source["by_rule"].get(rule, {}).get(outcome) for source in sources.values()]
            if any(cells):
                yield f"  {rule} {outcome}", [f"{n:,}" if n else "-" for n in cells]
    yield row("documents held out", "held-out documents")
    yield row("MB held out", "held-out bytes")
    yield row("documents kept", "documents")
    yield row("MB kept", "bytes")
    yield row("tokens", "tokens")
    yield row("times shown", "repeats", "{:.3g}")
    yield row("share of the mix", "share", "{:.2%}")


def rules_that_acted(sources):
    order = [*RULES, *DEDUPLICATIONS]
    acted = {rule for source in sources.values() for rule in source["by_rule"]}
    return sorted(acted, key=lambda rule: (  # as they run: decontamination, rules, the leaked
        order.index(rule) if rule in order else len(order) if rule == "leaked" else -1, rule))


def remarks(manifest):
    """What a reader of the table should know besides."""
    sources = manifest["sources"]
    chosen = {rule for source in sources.values() for rule in source["rules"]} - {"empty"}
    idle = [rule for rule in (*RULES, *DEDUPLICATIONS)
            if rule in chosen - set(rules_that_acted(sources))]
    if idle:
        yield "nothing to do for " + ", ".join(idle)
    if "language" in chosen and manifest["scorers"]["language"] == "stand-in":
        yield "language was scored by a stand-in, not a model; language_scorer names another"
    if "content" in chosen and manifest["scorers"]["content"] == "none":
        yield "content was not scored: there is no built-in model; content_scorer names one"
    for name, source in sources.items():
        if manifest["decontaminate"]:
            against = ", ".join(source["decontaminated"]) or "nothing: it is code"
            yield f"{name}: decontaminated against {against}"
        for note, n in source["notes"].items():
            yield f"{name}: {n:,} {note}"
        for message in source["bad_lines"][:3]:
            yield f"{name}: left out: {message}"


@dataclass(frozen=True)
class ShowOptions:
    """What `python data.py CONFIG` shows instead of the funnel."""

    show: str = ""
    """A rule: a few of the documents that it dropped or edited, with the reason."""


def print_dropped(folder, rule):
    """A few documents that a rule dropped or edited, with the reason and the place marked."""
    examples = [json.loads(row) for path in sorted((folder / "dropped").glob("*.jsonl"))
                for row in path.read_text().splitlines()]
    chosen = [example for example in examples
              if rule in (example["rule"], example["rule"].partition(":")[0])]
    acted = sorted({example["rule"] for example in examples})
    if not chosen:
        raise UserError(f"--show={rule}: it dropped and edited nothing; there is "
                        f"{', '.join(acted) or 'no rule that did'}")
    on, off = ("\033[7m", "\033[0m") if sys.stdout.isatty() else (">>>", "<<<")
    for example in chosen:
        print(f"\n{example['outcome']} by {example['rule']}: {example['why']}\n  "
              f"{example['id']} ({example['provenance']})")
        lines = marked(example["text"], example["marks"], on, off).splitlines()
        begin = max(0, next((i for i, line in enumerate(lines) if on in line), 0) - 5)
        for line in lines[begin:begin + SHOWN_LINES]:
            print(f"    | {line}")
        if len(lines) > SHOWN_LINES:
            print(f"    (lines {begin + 1} to {min(len(lines), begin + SHOWN_LINES)} of "
                  f"{len(lines)})")


def marked(text, marks, on, off):
    """`text` with every whole mark in it between `on` and `off`, however its words are spaced."""
    for mark in sorted(filter(str.strip, set(marks)), key=len, reverse=True):
        pattern = r"\s+".join(map(re.escape, mark.split()))
        if mark[0].isalnum() and mark[-1].isalnum():  # no part of a longer word
            pattern = rf"(?<!\w){pattern}(?!\w)"
        text = re.sub(pattern, lambda found: f"{on}{found[0]}{off}", text)
    return text


SHOWN_LINES = 30
