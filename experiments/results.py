"""The figures of a run, and the Markdown tables with their mean and spread over the seeds."""

import math
from statistics import mean, stdev

from experiments.catalogue import (ANSWER_NATS, BITS, DOCSTRING_BITS, ENDED, LEAKED_BITS, NATS,
                                   PREFERRED)
from support.files import UserError, log_rows
from support.records import bits_per_byte, pooled
from support.text import counted

SOURCES = ("reference", "docstrings", "code")


# ---- Figures -------------------------------------------------------------------------------------

def figures_of(run, name):
    """{figure: number} of the last evaluation of a run, those that it has."""
    rows = [row for row in log_rows(run) if row["kind"] == "eval"]
    if not rows:
        raise UserError(f"{run}: has no evaluation; {name} cannot be compared")
    sums = rows[-1].get("sums", {})
    tuned = rows[-1].get("tuned", {})
    figures = {
        **of_all_sources(sums),
        DOCSTRING_BITS: of_domain(sums, "docstrings"),
        LEAKED_BITS: of_domain(sums, "leaked_set.jsonl"),
        ANSWER_NATS: tuned.get("loss"),
        ENDED: tuned.get("ended"),
        PREFERRED: tuned.get("accuracy"),
    }
    return {figure: number for figure, number in figures.items() if is_number(number)}


def of_all_sources(sums):
    """Bits per byte and nats per token over the held-out text of the three sources together."""
    text = pooled(sums[source] for source in SOURCES if source in sums)
    if not text["tokens"]:
        return {}
    return {
        BITS: bits_per_byte(text),
        NATS: text["nats"] / text["tokens"],
    }


def of_domain(sums, domain):
    """Bits per byte of one domain; None if it was not measured."""
    return bits_per_byte(sums[domain]) if domain in sums else None


def is_number(value):
    return value is not None and not math.isnan(value)


# ---- Tables --------------------------------------------------------------------------------------

def table(experiment, records, seeds):
    """The Markdown lines of an experiment's table.

    records: {variant name: {seed: record}}, finished ones. seeds: how many were asked for.
    """
    first = experiment.variants[0].name
    header = ["variant"]
    for figure in experiment.figures:
        header += [figure, f"difference from {first}"]
    header.append("seconds a run")
    lines = [row(header), "|---" * len(header) + "|"]
    for variant in experiment.variants:
        of_variant = records[variant.name]
        cells = [said_name(variant.name, len(of_variant), seeds)]
        for figure in experiment.figures:
            numbers = numbers_of(figure, of_variant)
            cells.append(with_spread(numbers))
            if variant.name == first:
                cells.append("")
            else:
                cells.append(difference(figure, of_variant, records[first]))
        cells.append(mean_seconds(of_variant))
        lines.append(row(cells))
    return lines


def mean_seconds(records):
    """How long the seeds' runs took on average; "" without any."""
    seconds = [record["seconds"] for record in records.values()]
    return f"{mean(seconds):.0f}" if seconds else ""


def said_name(name, finished, seeds):
    """The name of a variant; says how many seeds are finished while some are not."""
    return name if finished in (0, seeds) else f"{name} ({finished} of {seeds} seeds)"


def row(cells):
    return "| " + " | ".join(cells) + " |"


def numbers_of(figure, records):
    """A figure of each seed, in the seeds' order."""
    return [records[seed]["figures"][figure] for seed in sorted(records)]


def with_spread(numbers, sign=""):
    """The mean of the seeds' numbers, and their standard deviation if there are several."""
    if not numbers:
        return "not yet run"
    text = f"{mean(numbers):{sign}.4f}"
    if len(numbers) > 1:
        text += f" ± {stdev(numbers):.4f}"
    return text


def difference(figure, records, first):
    """The mean difference over the seeds that both have; says if it is within the spread.

    It is taken seed by seed, so that what a seed does to both variants is not in its spread.
    """
    numbers = []
    for seed in sorted(records):
        if seed in first:
            number = records[seed]["figures"][figure]
            base = first[seed]["figures"][figure]
            numbers.append(number - base)
    if not numbers:
        return ""
    text = with_spread(numbers, "+")
    if len(numbers) > 1 and abs(mean(numbers)) <= stdev(numbers):
        text += ", within the spread"
    return text


# ---- results.md and the doc ----------------------------------------------------------------------

HEAD = """# Results

A run that several experiments share was trained once; each of them counts it.
"""


def section(experiment, records, seeds):
    """The text of an experiment's section in results.md."""
    lines = [f"## {experiment.name}", "", experiment.hypothesis, "",
             *table(experiment, records, seeds)]
    said = how_run(records)
    if said:
        lines += ["", said]
    return "\n".join(lines) + "\n"


def how_run(records):
    """How many runs took how long, and on which machines; "" without a finished run."""
    count = 0
    seconds = 0.0
    machines = {}  # as an ordered set
    for of_variant in records.values():
        for record in of_variant.values():
            count += 1
            seconds += record["seconds"]
            machines.update(dict.fromkeys(record["machines"]))
    if not count:
        return ""
    return f"{counted(count, 'run')}, {seconds / 60:.0f} minutes, on {' and on '.join(machines)}."


def with_section(text, experiment, section):
    """The text of results.md with this section in place of an experiment's older one, or last."""
    _, *older = f"\n{text}".split("\n## ")
    sections = {}
    for old in older:
        name = old.partition("\n")[0]
        sections[name] = f"## {old.strip()}\n"
    sections[experiment.name] = section
    return "\n".join([HEAD, *sections.values()])


def with_table(doc, experiment, lines):
    """The text of docs/experiments.md with these lines as the experiment's table of outcomes.

    Its table there begins with the same words: "| variant | " and the first figure.
    """
    before, heading, after = doc.partition(f"### {experiment.name}\n")
    section, next_heading, rest = after.partition("\n### ")
    begin = section.find(f"| variant | {experiment.figures[0]} |")
    if begin < 0:
        raise UserError(f"docs/experiments.md: {experiment.name}: has no table of outcomes")
    end = section.find("\n\n", begin)
    if end < 0:
        end = len(section)
    section = section[:begin] + "\n".join(lines) + section[end:]
    return before + heading + section + next_heading + rest
