"""The figures of a run, and the Markdown tables with their mean and spread over the seeds."""

import math
from statistics import mean, stdev

from experiments import catalogue
from support.files import UserError, log_rows
from support.records import bits_per_byte, pooled

SOURCES = ("reference", "docstrings", "code")


def figures_of(run, name):
    """{figure: number} of the last evaluation of a run, those that it has."""
    rows = [row for row in log_rows(run) if row["kind"] == "eval"]
    if not rows:
        raise UserError(f"{run}: has no evaluation; {name} cannot be compared")
    sums = rows[-1].get("sums", {})
    tuned = rows[-1].get("tuned", {})
    text = pooled(sums[source] for source in SOURCES if source in sums)
    figures = {
        catalogue.BITS: bits_per_byte(text),
        catalogue.NATS: text["nats"] / text["tokens"] if text["tokens"] else math.nan,
        catalogue.ANSWER_NATS: tuned.get("loss"),
        catalogue.ENDED: tuned.get("ended"),
        catalogue.PREFERRED: tuned.get("accuracy"),
    }
    for figure, domain in ((catalogue.DOCSTRING_BITS, "docstrings"),
                           (catalogue.LEAKED_BITS, "leaked_set.jsonl")):
        figures[figure] = bits_per_byte(sums[domain]) if domain in sums else None
    return {figure: number for figure, number in figures.items()
            if number is not None and not math.isnan(number)}


def table(experiment, records):
    """The Markdown lines of an experiment. records: {variant name: {seed: record}}, finished ones.

    The difference from the first variant is taken seed by seed, so that what a seed does to both
    of them is not in its spread.
    """
    first = experiment.variants[0].name
    header = ["variant"]
    for figure in experiment.figures:
        header += [figure, f"difference from {first}"]
    lines = [f"## {experiment.name}", "", experiment.hypothesis, "",
             row([*header, "seconds a run"]), "|---" * (len(header) + 1) + "|"]
    for variant in experiment.variants:
        of_variant = records[variant.name]
        cells = [variant.name]
        for figure in experiment.figures:
            cells.append(with_spread([each["figures"][figure] for each in of_variant.values()]))
            cells.append(difference(figure, of_variant, records[first])
                         if variant.name != first else "")
        seconds = [each["seconds"] for each in of_variant.values()]
        lines.append(row([*cells, f"{mean(seconds):.0f}" if seconds else ""]))
    return lines + [""]


def row(cells):
    return "| " + " | ".join(cells) + " |"


def with_spread(numbers, sign=""):
    """The mean of the seeds' numbers, and their standard deviation if there are several."""
    if not numbers:
        return "not yet run"
    text = f"{mean(numbers):{sign}.4f}"
    return text + (f" ± {stdev(numbers):.4f}" if len(numbers) > 1 else "")


def difference(figure, records, first):
    """The mean difference over the seeds that both have; says if it is within the spread."""
    both = [seed for seed in records if seed in first]
    numbers = [records[seed]["figures"][figure] - first[seed]["figures"][figure] for seed in both]
    if not numbers:
        return ""
    text = with_spread(numbers, "+")
    if len(numbers) > 1 and abs(mean(numbers)) <= stdev(numbers):
        text += ", within the spread"
    return text
