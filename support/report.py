"""The HTML page of one or several runs: curves, tables, samples; one file, without scripts."""

import html
import io
import math
import os
from pathlib import Path
from typing import NamedTuple

from configs import load_config
from corpus.funnel import funnel_rows
from model import ModelConfig, count_parameters
from support.bars import stage
from support.files import read_json, to_json
from support.measured import dict_at, read_evaluations, read_metrics
from support.records import bits_per_byte, cell, domains_table, tasks_table

STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1b1f24;background:#fff;max-width:1120px;
margin:2rem auto;padding:0 1.2rem}h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:2.2rem 0
.6rem;border-bottom:1px solid #d8dee4;padding-bottom:.25rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:.8rem}
figure{margin:0}svg{width:100%;height:auto}table{border-collapse:collapse;font-variant-numeric:
tabular-nums;font-size:.86rem;margin:.5rem 0}td,th{padding:.16rem .5rem;text-align:right;
border-bottom:1px solid #eaeef2}th{font-weight:600;background:#f6f8fa}td:first-child,
th:first-child{text-align:left;white-space:nowrap}pre{background:#f6f8fa;border-radius:6px;
padding:.7rem .9rem;font-size:.82rem;line-height:1.4;white-space:pre-wrap;overflow-wrap:anywhere;
margin:.3rem 0 1rem}.note{color:#57606a}.scroll{overflow-x:auto;white-space:pre}"""


# ---- The page ------------------------------------------------------------------------------------

@stage("drawing the report")
def report(paths):
    """Write one HTML page about some runs into the first one's directory; returns its path."""
    logs = {str(path): read_metrics(path) for path in paths}
    runs = {name: rows for name, (rows, _) in logs.items()}
    found = {name: read_evaluations(name, *log) for name, log in logs.items()}
    configs = {name: read_json(Path(name) / "config.json") for name in runs}
    names = [Path(name).resolve().name for name in runs]
    title = html.escape(" and ".join(names))
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
             "<meta name=viewport content='width=device-width'>"
             f"<style>{STYLE}</style><h1>{title}</h1>", summary(runs, configs), *best_steps(runs)]
    pyplot = drawing()
    if not pyplot:
        parts.append("<p class=note>There are no pictures: they are drawn with matplotlib "
                     "(pip install matplotlib).</p>")
        print("no pictures: pip install matplotlib draws them")
    parts += ["<h2>Training</h2>", grid(pyplot, training_panels(runs))]
    parts += ["<h2>Held-out text</h2>",
              "<p class=note>Bits per byte over the tokens trained on; lower is better.</p>",
              grid(pyplot, domain_panels(found)),
              last_results(found, "sums", domains_table),
              *verdicts(found),
              *left_out(found)]
    if any(evaluations.tasks for evaluations in found.values()):
        parts += ["<h2>Tasks</h2>", "<p class=note>Accuracy in percent; dashed is chance.</p>",
                  grid(pyplot, task_panels(found)),
                  last_results(found, "tasks", tasks_table)]
    parts += settings_part(configs)
    for name, evaluations in found.items():
        parts += samples_and_data(name, evaluations, several=len(found) > 1)
    parts.append("<h2>All settings</h2>" + all_settings(configs))
    suffix = ""
    if len(runs) > 1:
        suffix = "".join(f"_{name}" for name in names)
        suffix = os.fsdecode(os.fsencode(suffix)[:200])  # a file's name is at most 255 bytes
    out = Path(paths[0]) / f"report{suffix}.html"
    # "replace": a name may be no text, such as a folder's that is not UTF-8
    out.write_text("\n".join(parts) + "\n", encoding="utf-8", errors="replace")
    return out


def table(head, rows):
    """An HTML table of strings, escaped."""
    lines = [table_line(head, "th")]
    for row in rows:
        lines.append(table_line(row, "td"))
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def table_line(cells, tag):
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}" for cell in cells)


def summary(runs, configs):
    """A table with a line for each run: its size, how far it came, what it took."""
    lines = []
    for name, rows in runs.items():
        last = rows["train"][-1] if rows["train"] else {}
        end = rows["end"][-1] if rows["end"] else {}
        [model_config] = load_config([str(Path(name) / "config.json")], ModelConfig)
        lines.append([
            name,
            f"{count_parameters(model_config) / 1e6:,.1f} M",
            f"{last.get('step', 0):,} of {cell(configs[name].get('max_steps'), ',')}",
            f"{last.get('tokens', 0) / 1e6:,.2f} M",
            cell(last.get("loss"), ".3f"),
            cell(last.get("seconds"), ",.1f", 1 / 60),
            cell(end.get("kwh", last.get("kwh")), ".3g"),
            cell(end.get("kg_co2"), ".3g")])
    return table(["run", "parameters", "steps", "tokens", "training loss", "minutes", "kWh",
                  "kg CO2eq"], lines)


def best_steps(runs):
    """A line for each run that keeps its best step: which it is (scaling/kept.py)."""
    lines = []
    for name, rows in runs.items():
        best = dict_at(rows["eval"][-1], "best") if rows["eval"] else {}
        if isinstance(best.get("path"), str) and type(best.get("value")) is float:
            said = f"{name}: the best step: {best['path']}, {best.get('measure')} "
            lines.append(f"<p>{html.escape(said)}{best['value']:.4f}</p>")
    return lines


def last_results(found, kind, to_text):
    """Each run's last results of its domains or tasks, in the table that a terminal shows."""
    parts = []
    for run, evaluations in found.items():
        last = {}  # {tokens: {domain or task: result}}
        for name, points in getattr(evaluations, kind).items():
            tokens = max(points)
            last.setdefault(tokens, {})[name] = points[tokens]
        for tokens, results in sorted(last.items()):
            parts.append(f"<h3>{html.escape(run)}, after {tokens / 1e6:,.2f} M tokens</h3>"
                         f"<pre class=scroll>{html.escape(to_text(results))}</pre>")
    return "".join(parts)


def verdicts(found):
    """A line for each suite that eval.py measured: was the training data decontaminated?"""
    lines = []
    for run, evaluations in found.items():
        for suite, said in evaluations.said.items():
            line = f"{suite}: {said}"
            if len(found) > 1:
                line = f"{run}, {line}"
            lines.append(f"<p class=note>{html.escape(line)}</p>")
    return lines


def left_out(found):
    """A line, also printed, for what a run's logs hold and the page does not show."""
    lines = []
    for run, evaluations in found.items():
        for said in evaluations.left_out:
            print(f"{run}: {said}")
            lines.append(f"<p class=note>{html.escape(f'{run}: {said}')}</p>")
    return lines


def settings_part(configs):
    """A table of the settings that all runs have and that differ between them."""
    every = list(configs.values())
    differing = []
    for key in every[0]:
        if key == "run_dir" or not all(key in config for config in every):
            continue
        values = [str(config[key]) for config in every]
        if len(set(values)) > 1:
            differing.append([key, *values])
    if not differing:
        return []
    return ["<h2>Settings that differ</h2>", table(["", *configs], differing)]


def samples_and_data(name, evaluations, several):
    """A run's samples and its funnel; with its name if there are several runs."""
    heading = f", {html.escape(name)}" if several else ""
    parts = [f"<h2>Samples{heading}</h2>"]
    for step, text in evaluations.samples:
        parts.append(f"<h3>step {step:,}</h3><pre>{html.escape(text)}</pre>")
    return [*parts, f"<h2>The data{heading}</h2>", funnel_part(Path(name))]


def funnel_part(run):
    """What each curation rule kept and dropped of each source."""
    if not (run / "manifest.json").is_file():
        return "<p class=note>The run has no manifest.json: its data is not known.</p>"
    manifest = read_json(run / "manifest.json")
    try:
        if not manifest["sources"]:
            return f"<p>{len(manifest['shards'])} ready token files</p>"
        (_, sources), *rows = funnel_rows(manifest["sources"])
    except (KeyError, TypeError, AttributeError, ValueError):
        return "<p class=note>manifest.json is not in the form of this version.</p>"
    return table(["", *sources], [[label, *cells] for label, cells in rows])


def all_settings(configs):
    parts = []
    for name, config in configs.items():
        parts.append(f"<details><summary>{html.escape(name)}</summary><pre>"
                     f"{html.escape(to_json(config, indent=1))}</pre></details>")
    return "".join(parts)


# ---- Pictures ------------------------------------------------------------------------------------

class Panel(NamedTuple):
    """One picture: a line for each run over the tokens trained on."""

    title: str
    lines: dict  # {run: (tokens, values)}
    level: float = None  # a dashed line, such as chance
    errors: dict = None  # {run: standard errors}
    marker: str = None


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


def training_panels(runs):
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
        if lines:
            yield Panel(title, lines, marker="o" if kind == "eval" else None)


def domain_panels(found):
    for domain in names_in(found, "sums"):
        if "/" not in domain:  # a part of a domain has no picture of its own
            yield Panel(domain, lines_of(found, "sums", domain, bits_per_byte), marker="o")


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


def svg(pyplot, panel):
    """A Panel as the text of an SVG element."""
    figure, axes = pyplot.subplots(figsize=(4.2, 2.7), layout="constrained")
    most = max((max(tokens) for tokens, _ in panel.lines.values() if tokens), default=0)
    unit, word = (1e9, "billion") if most > 2e9 else (1e6, "million")
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
    axes.set(title=panel.title, xlabel=f"{word} tokens", xlim=(0, 1.03 * most / unit or 1))
    if len(panel.lines) > 1:
        axes.legend(fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = out.getvalue()
    return text[text.index("<svg"):]
