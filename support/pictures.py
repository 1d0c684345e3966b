"""The pictures of a report, drawn with matplotlib: each is a Panel, an SVG in the page."""

import io
import math
from typing import NamedTuple

from support.page import escaped

# Of the first run, of the second, ...: a run has its colour in all pictures
COLORS = ("#1f6fb4", "#d9660f", "#2a9d45", "#8f57b5", "#b0383c", "#4f9fa6", "#a3822a", "#6b7280")


DASHED = {"color": "0.5", "linestyle": "--", "linewidth": 1}
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 1}


class Look(NamedTuple):
    """How a run is shown everywhere on the page."""

    label: str
    color: str


class Panel(NamedTuple):
    """One picture: a line for each run over the tokens trained on, or over FLOPs."""

    title: str
    lines: dict  # {run: (tokens, values)}
    level: float = None  # a dashed line, such as chance
    limits: dict = None  # {run: (tokens, values)}, dashed: what a value is held below
    errors: dict = None  # {run: standard errors}
    marker: str = None
    x: str = "tokens"


def looks_of(paths):
    """{run: Look} of the paths of runs: the name of a directory, or the path of equal ones."""
    names = [path.resolve().name for path in paths]
    looks = {}
    for number, path in enumerate(paths):
        run = str(path)
        label = names[number]
        if names.count(label) > 1:
            label = run
        color = COLORS[number % len(COLORS)]
        looks[run] = Look(label, color)
    return looks


def legend(looks):
    """The runs' names in their colours, as HTML."""
    names = []
    for look in looks.values():
        line = f"<i style='background:{look.color}' aria-hidden=true></i>"
        names.append(f"<span>{line}{escaped(look.label)}</span>")
    return f"<p class=legend>{''.join(names)}</p>"


# ---- Drawing -------------------------------------------------------------------------------------

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


def grid(pyplot, panels, looks):
    """The panels as inline SVG, side by side; "" without panels or pyplot.

    If the page is about several runs, a legend names those that are drawn.
    """
    panels = list(panels)
    if not pyplot or not panels:
        return ""
    figures = []
    for panel in panels:
        figures.append(f"<figure>{svg(pyplot, panel, looks)}</figure>")
    drawn = {}
    for run, look in looks.items():
        if any(run in panel.lines for panel in panels):
            drawn[run] = look
    names = legend(drawn) if len(looks) > 1 else ""
    return f"{names}<div class=grid>{''.join(figures)}</div>"


def svg(pyplot, panel, looks):
    """A Panel as the text of an SVG element, with a description for those who cannot see it."""
    height = min(2.7, 0.8 + 0.3 * len(panel.lines)) if is_one_point(panel) else 2.7
    figure, axes = pyplot.subplots(figsize=(4.2, height), layout="constrained")
    draw(axes, panel, looks)
    text = svg_text(figure)
    pyplot.close(figure)
    described = escaped(description(panel, looks))
    return f'<svg role="img" aria-label="{described}"{text[len("<svg"):]}'


def svg_text(figure):
    """A figure of matplotlib as the text of an SVG element."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg"):]


def draw(axes, panel, looks):
    """A Panel on the axes of a figure: as lines, or as bars where each run has one point."""
    if is_one_point(panel):
        draw_bars(axes, panel, looks)
    else:
        draw_lines(axes, panel, looks)
    axes.set_title(panel.title)


def is_one_point(panel):
    """Whether each run has one value: a curve of it would be an empty picture."""
    return all(len(tokens) == 1 for tokens, _ in panel.lines.values())


def draw_lines(axes, panel, looks):
    """A line for each run; the first ones are wider, so that a later one does not hide them."""
    ends = [0]
    for tokens, _ in panel.lines.values():
        ends += tokens
    most = max(ends)
    unit, label = unit_of(most, panel.x)
    for place, (name, (tokens, values)) in enumerate(panel.lines.items()):
        color = looks[name].color
        width = 1.2 + min(3, len(panel.lines) - 1 - place)
        x = [count / unit for count in tokens]
        every = max(1, math.ceil(len(x) / 2000))  # the page of a long run stays small
        axes.plot(x[::every], values[::every],
                  color=color, linewidth=width, marker=panel.marker, markersize=3.5,
                  clip_on=False)  # a point at 0 is seen too
        if panel.errors:
            errors = panel.errors[name]
            axes.errorbar(x, values, errors, linewidth=0, elinewidth=1, capsize=2, color=color)
    draw_limits(axes, panel, unit)
    if panel.level is not None:
        axes.axhline(panel.level, **DASHED)
    axes.set_xlabel(label)
    axes.locator_params(axis="x", nbins=7)  # so that the numbers do not touch
    axes.set_xlim(0, 1.03 * most / unit or 1)


def draw_limits(axes, panel, unit):
    """What the values are held below: a dashed line for each run, one line for equal ones."""
    drawn = []
    for tokens, values in (panel.limits or {}).values():
        if (tokens, values) not in drawn:
            drawn.append((tokens, values))
            x = [count / unit for count in tokens]
            axes.plot(x, values, **DASHED)


def draw_bars(axes, panel, looks):
    """A bar for each run, and on its right its value: the bar may be too short to hold it."""
    labels = []
    ends = [0]  # the axis holds all of them
    for place, (name, (_, [value])) in enumerate(panel.lines.items()):
        labels.append(looks[name].label)
        error = panel.errors[name][0] if panel.errors else 0
        color = looks[name].color
        axes.barh(place, value, 0.6, xerr=error or None, color=color, ecolor="0.3",
                  capsize=2)
        left = value - error
        right = max(0, value + error)
        ends += [left, right]
        axes.annotate(
            f"{value:.4g}", (right, place), (5, 0),
            textcoords="offset points",
            va="center",
            bbox=BEHIND_TEXT)
    if panel.level is not None:
        axes.axvline(panel.level, **DASHED)
        ends.append(panel.level)
    axes.set_yticks(range(len(labels)), labels)
    least = min(ends)
    most = max(ends)
    width = most - least or 1
    axes.set_xlim(least - 0.02 * width, most + 0.25 * width)  # room for the last value
    axes.locator_params(axis="x", nbins=6)
    axes.invert_yaxis()


def unit_of(most, x):
    """Returns (unit, label) of an axis of tokens or FLOPs that ends at `most`."""
    if x == "tokens":
        for unit, label in ((1e9, "billion tokens"), (1e6, "million tokens")):
            if most > 0.1 * unit:
                return unit, label
        return 1e3, "thousand tokens"
    power = math.floor(math.log10(most)) if most else 0
    return 10 ** power, f"1e{power} {x}"


def description(panel, looks):
    """What a picture shows, in words: where each line begins and ends."""
    parts = []
    for name, (tokens, values) in panel.lines.items():
        label = looks[name].label
        said = f"{label} {values[0]:.4g} at {tokens[0]:,.4g} {panel.x}"
        if len(tokens) > 1:
            said += f", {values[-1]:.4g} at {tokens[-1]:,.4g}"
        parts.append(said)
    if panel.level is not None:
        parts.append(f"the dashed line at {panel.level:.4g}")
    return f"{panel.title}: {'; '.join(parts)}"
