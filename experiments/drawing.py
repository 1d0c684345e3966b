"""The picture of an experiment: the training loss as a report draws it, and each seed's figures."""

import re
from pathlib import Path
from statistics import mean

from experiments.results import numbers_of
from experiments.runs import run_of
from support.files import replace_file
from support.measured import read_metrics
from support.panels import logged_lines
from support.pictures import COLORS, Look, Panel, draw, drawing, svg_text

# What tells the variants of tuning apart better than their training loss does
TUNING_CURVES = {"dpo": ("train", "rewards/margins", "DPO: margin of the rewards"),
                 "sft": ("train", "loss", "training loss, nats")}


def draw_pictures(experiments, records, out, folder):
    """Write FOLDER/NAME.svg for each experiment of which runs are finished.

    records: {experiment name: {variant name: {seed: record}}}, finished ones. Returns whether
    matplotlib is there.
    """
    pyplot = drawing()
    if pyplot is None:
        return False
    pyplot.rcParams["svg.fonttype"] = "none"  # text stays text: half of the bytes
    for experiment in experiments:
        of_variants = records[experiment.name]
        if any(of_variants.values()):
            text = picture(pyplot, experiment, of_variants, out)
            file = Path(folder) / f"{experiment.name}.svg"
            replace_file(file, text.encode())
    return True


def picture(pyplot, experiment, records, out):
    """An SVG: the curves of the first seed on the left, then a panel for each figure."""
    count = 1 + len(experiment.figures)
    size = (4.2 * count, 3)
    figure, axes = pyplot.subplots(1, count, figsize=size, layout="constrained")
    looks = {}
    for number, variant in enumerate(experiment.variants):
        looks[variant.name] = Look(variant.name, COLORS[number])
    draw_curves(axes[0], experiment, records, out, looks)
    for place, name in enumerate(experiment.figures, start=1):
        draw_seeds(axes[place], name, records, looks)
    text = svg_text(figure)
    pyplot.close(figure)
    return re.sub(r"\n +", "\n", text)  # without its indentation


def draw_curves(axes, experiment, records, out, looks):
    """What the report draws of the first seed of each variant."""
    rows = {}
    for variant in experiment.variants:
        of_variant = records[variant.name]
        if of_variant:
            run = run_of(variant, min(of_variant), out)
            rows[variant.name], _ = read_metrics(run)
    kind, key, title = curve_of(experiment)
    lines = logged_lines(rows, kind, key)
    draw(axes, Panel(title, lines), looks)


def curve_of(experiment):
    """(kind of row, key, title) of the curve that is drawn of an experiment's runs."""
    config = experiment.variants[0].config
    for method, curve in TUNING_CURVES.items():
        if config.endswith(f"_{method}.py"):
            return curve
    return "train", "loss", "training loss, nats"


def draw_seeds(axes, figure, records, looks):
    """A dot for each seed of each variant, and a line at their mean."""
    for place, (name, look) in enumerate(looks.items()):
        numbers = numbers_of(figure, records[name])
        places = [place] * len(numbers)
        axes.scatter(numbers, places, color=look.color, s=22, zorder=3)
        if numbers:
            middle = mean(numbers)
            axes.vlines(middle, place - 0.25, place + 0.25, color=look.color, linewidth=2)
    axes.set_title(figure)
    axes.locator_params(axis="x", nbins=6)
    axes.set_yticks(range(len(looks)), list(looks))
    axes.set_ylim(len(looks) - 0.4, -0.6)  # the first variant is at the top
