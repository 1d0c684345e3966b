"""The curves of a report, drawn with matplotlib: each is a Panel, an SVG picture in the page."""

import io
import math
from pathlib import Path
from typing import NamedTuple

from configs import load_config
from model import ModelConfig
from scaling.machine import flops_per_token
from support.records import bits_per_byte


class Panel(NamedTuple):
    """One picture: a line for each run over the tokens trained on, or over FLOPs."""

    title: str
    lines: dict  # {run: (tokens, values)}
    level: float = None  # a dashed line, such as chance
    errors: dict = None  # {run: standard errors}
    marker: str = None
    x: str = "tokens"


TRAINING_PANELS = (  # kind of row, key, title
    ("train", "loss", "training loss, nats"),
    ("train", "lr", "learning rate"),
    ("train", "grad_norm", "norm of the gradient"),
    ("train", "tokens_per_second", "tokens/s"),
    ("train", "kwh", "energy, kWh"),
    ("train", "rewards/margins", "DPO: margin of the rewards"),
    ("eval", "loss", "loss of held-out answers, nats"),  # adapt.py, under "tuned"
    ("eval", "dpo_loss", "DPO: loss of held-out pairs"),
    ("eval", "accuracy", "held-out pairs that are told right"))


def training_panels(runs, configs):
    """The Panels of what train.py and adapt.py log; one without any point is left out."""
    for kind, key, title in TRAINING_PANELS:
        lines = {}
        for name, rows in runs.items():
            tokens = []
            values = []
            for row in rows[kind]:
                measured = row if kind == "train" else row["tuned"]
                if key in measured:
                    tokens.append(row["tokens"])
                    values.append(measured[key])
            if tokens:
                lines[name] = (tokens, values)
        if not lines:
            continue
        if key == "grad_norm":
            yield with_clip_limit(Panel(title, lines), configs)
        else:
            yield Panel(title, lines, marker="o" if kind == "eval" else None)
        if kind == "train" and key == "loss":
            trained = {run: line for run, line in lines.items() if "method" not in configs[run]}
            if trained:  # adapt.py's steps have other FLOPs: DPO runs two models
                yield Panel(f"{title}, over FLOPs", over_flops(trained), x="FLOPs")


def over_flops(lines):
    """{run: (FLOPs, losses)} of {run: (tokens, losses)}: equal tokens cost a larger model more."""
    found = {}
    for run, (tokens, losses) in lines.items():
        [config] = load_config([str(Path(run) / "config.json")], ModelConfig)
        per_token = flops_per_token(config)
        found[run] = ([count * per_token for count in tokens], losses)
    return found


def with_clip_limit(panel, configs):
    """The Panel of the gradient's norm with grad_clip as its level, if all its runs have one."""
    limits = {configs[run].get("grad_clip") for run in panel.lines}
    limit = limits.pop()
    if limits or type(limit) not in (int, float) or limit <= 0:  # 0 does not clip
        return panel
    return panel._replace(title=f"{panel.title}; dashed: grad_clip", level=limit)


def domain_panels(found, levels):
    """Bits per byte of each domain; levels: {domain: that of xz -9, a dashed line}."""
    for domain in names_in(found, "sums"):
        if "/" not in domain:  # a part of a domain has no picture of its own
            lines = lines_of(found, "sums", domain, bits_per_byte)
            yield Panel(domain, lines, levels.get(domain), marker="o")


def task_panels(found):
    """Accuracy with chance and standard errors; bits per byte for a set without choices."""
    for task in names_in(found, "tasks"):
        accuracy = lines_of(found, "tasks", task, lambda result: percent(result, "accuracy"))
        if accuracy:
            errors = lines_of(found, "tasks", task, error_of)
            errors = {run: values for run, (_, values) in errors.items()}
            chance = lines_of(found, "tasks", task, lambda result: percent(result, "chance"))
            level = next((values[0] for _, values in chance.values()), None)
            yield Panel(task, accuracy, level, errors, "o")
        else:
            bits = lines_of(found, "tasks", task, lambda result: result.get("bits_per_byte"))
            yield Panel(f"{task}, bits per byte", bits, marker="o")


def percent(result, key):
    """100 x a share of a task's result; None if the result lacks it."""
    return 100 * result[key] if key in result else None


def error_of(result):
    """The standard error of an accuracy in percent, 0 if it is not known; None without accuracy."""
    return 100 * abs(result.get("stderr") or 0) if "accuracy" in result else None


def names_in(found, kind):
    """The domains or tasks of all runs, each once, in the order in which they were measured."""
    names = {}  # as an ordered set
    for evaluations in found.values():
        names.update(dict.fromkeys(getattr(evaluations, kind)))
    return list(names)


def lines_of(found, kind, name, value):
    """{run: (tokens, values)} of a domain or a task; value(result) may be None or NaN: no point."""
    lines = {}
    for run, evaluations in found.items():
        tokens = []
        values = []
        for count, result in sorted(getattr(evaluations, kind).get(name, {}).items()):
            measured = value(result)
            if measured is not None and not math.isnan(measured):
                tokens.append(count)
                values.append(measured)
        if tokens:
            lines[run] = (tokens, values)
    return lines


def drawing():
    """pyplot, set up for SVG in a page; None where matplotlib is not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")  # without a screen
        from matplotlib import pyplot
    except ImportError:
        return None
    pyplot.rcParams.update({
        "svg.hashsalt": "nanolmo",  # so that equal pictures are equal bytes
        "text.parse_math": False,  # a $ in a name is a $
        "font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    return pyplot


def grid(pyplot, panels):
    """The panels as inline SVG, side by side; nothing without pyplot."""
    if not pyplot:
        return ""
    figures = "".join(f"<figure>{svg(pyplot, panel)}</figure>" for panel in panels)
    return f"<div class=grid>{figures}</div>"


def unit_of(most, x):
    """Returns (unit, label) of an axis of tokens or FLOPs that ends at `most`."""
    if x == "tokens":
        return (1e9, "billion tokens") if most > 2e9 else (1e6, "million tokens")
    power = math.floor(math.log10(most)) if most else 0
    return 10 ** power, f"1e{power} {x}"


def svg(pyplot, panel):
    """A Panel as the text of an SVG element."""
    figure, axes = pyplot.subplots(figsize=(4.2, 2.7), layout="constrained")
    most = max((max(tokens) for tokens, _ in panel.lines.values() if tokens), default=0)
    unit, label = unit_of(most, panel.x)
    for name, (tokens, values) in panel.lines.items():
        every = max(1, math.ceil(len(tokens) / 2000))  # the page of a long run stays small
        x = [count / unit for count in tokens]
        axes.plot(x[::every], values[::every], label=name, marker=panel.marker, markersize=3.5,
                  linewidth=1.2)
        if panel.errors:
            axes.errorbar(x, values, panel.errors[name], color=axes.lines[-1].get_color(),
                          linewidth=0, elinewidth=1, capsize=2)
    if panel.level is not None:
        axes.axhline(panel.level, color="0.5", linestyle="--", linewidth=1)
    axes.set(title=panel.title, xlabel=label, xlim=(0, 1.03 * most / unit or 1))
    if len(panel.lines) > 1:
        axes.legend(fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = out.getvalue()
    return text[text.index("<svg"):]
