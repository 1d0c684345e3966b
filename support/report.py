"""The HTML page of one or several runs: curves, tables, samples."""

import html
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

from configs import load_config
from corpus.funnel import funnel_rows
from model import ModelConfig, count_parameters
from support.files import UserError, log_rows, read_json
from support.records import bits_per_byte, domains_table, tasks_table


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


def read_metrics(run):
    """The rows of a run's metrics.jsonl, by kind."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: missing; name a run directory that train.py wrote")
    rows = {"train": [], "eval": [], "end": []}
    for row in log_rows(run):
        rows.setdefault(row["kind"], []).append(row)
    return rows


class Evaluations(NamedTuple):
    """What was measured of a run, in the loop and after it, by step."""

    sums: dict  # {domain: {tokens: sums}}
    tasks: dict  # {task: {tokens: result}}
    samples: list  # (step, text), the oldest first
    said: dict  # {suite: whether the data was decontaminated against it}


def read_evaluations(run, rows):
    """The Evaluations in a run's logs: of the most questions or bytes, of each step the latest."""
    sums, tasks, samples, said = {}, {}, {}, {}
    for row in [*rows["eval"], *log_rows(run, "eval.jsonl")]:
        try:
            for found, kind, size in (sums, "sums", "bytes"), (tasks, "tasks", "questions"):
                for name, result in row.get(kind, {}).items():
                    key = name, result[size]
                    found.setdefault(key, {})[row["tokens"]] = result
            for text in [row["text"]] if row["kind"] == "sample" else row.get("samples", []):
                samples[row["step"], text] = None
            if "said" in row:
                said[row["of"]["suite"]] = row["said"]
        except (KeyError, TypeError, AttributeError):
            continue  # no row of ours
    largest = [{name: found[max(key for key in found if key[0] == name)] for name, _ in found}
               for found in (sums, tasks)]
    return Evaluations(*largest, sorted(samples), said)


def report(paths):
    """Write one HTML file about some runs, laid over each other, into the first one's directory."""
    runs = {str(path): read_metrics(path) for path in paths}
    found = {name: read_evaluations(name, rows) for name, rows in runs.items()}
    configs = {name: read_json(Path(name) / "config.json") for name in runs}
    title = " and ".join(Path(name).name for name in runs)
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
             "<meta name=viewport content='width=device-width'>"
             f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>", summary(runs, configs)]
    draw = drawing()
    if not draw:
        parts.append("<p class=note>There are no pictures: they are drawn with matplotlib "
                     "(pip install matplotlib).</p>")
        print("no pictures: pip install matplotlib draws them")
    parts += ["<h2>Training</h2>", grid(draw, training_panels(runs))]
    parts += ["<h2>Held-out text</h2>", "<p class=note>Bits per byte over the tokens trained on; "
              "lower is better.</p>", grid(draw, domain_panels(found)),
              last_results(found, "sums", domains_table),
              *verdicts(found)]
    if any(evaluations.tasks for evaluations in found.values()):
        parts += ["<h2>Tasks</h2>", "<p class=note>Accuracy in percent; dashed is chance.</p>",
                  grid(draw, task_panels(found)),
                  last_results(found, "tasks", tasks_table)]
    parts += settings_part(configs)
    for name, evaluations in found.items():
        heading = f", {html.escape(name)}" if len(found) > 1 else ""
        parts += [f"<h2>Samples{heading}</h2>"] + [
            f"<h3>step {step:,}</h3><pre>{html.escape(text)}</pre>"
            for step, text in evaluations.samples]
        parts += [f"<h2>The data{heading}</h2>", funnel_part(Path(name))]
    parts.append("<h2>All settings</h2>" + "".join(
        f"<details><summary>{html.escape(name)}</summary><pre>"
        f"{html.escape(json.dumps(config, indent=1))}</pre></details>"
        for name, config in configs.items()))
    names = "".join(f"_{Path(name).name}" for name in runs) if len(runs) > 1 else ""
    out = Path(paths[0]) / f"report{names[:200]}.html"
    out.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return out


def table(head, rows):
    """An HTML table of strings."""
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}" for cell in cells)
    return ("<div class=scroll><table>" + line(head, "th")
            + "".join(line(row, "td") for row in rows) + "</table></div>")


def summary(runs, configs):
    """A line on each run: its size, how far it came, what it took."""
    lines = []
    for name, rows in runs.items():
        config, last = configs[name], rows["train"][-1] if rows["train"] else {}
        [shape] = load_config([str(Path(name) / "config.json")], ModelConfig)
        end = rows["end"][-1] if rows["end"] else {}
        lines.append([name, f"{count_parameters(shape) / 1e6:,.1f} M",
                      f"{last.get('step', 0):,} of {config['max_steps']:,}",
                      f"{last.get('tokens', 0) / 1e6:,.2f} M",
                      f"{last.get('loss', math.nan):.3f}", f"{last.get('seconds', 0) / 60:,.1f}",
                      f"{end.get('kwh', last.get('kwh', 0)):.3g}", f"{end['kg_co2']:.3g}"
                      if end.get("kg_co2") is not None else "-"])
    return table(["run", "parameters", "steps", "tokens", "training loss", "minutes", "kWh",
                  "kg CO2eq"], lines)


def drawing():
    """pyplot, set up for SVG in a page; None where matplotlib is not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    pyplot.rcParams.update({"svg.hashsalt": "nanolmo", "text.parse_math": False, "font.size": 9,
                            "axes.titlesize": 10,
                            "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                            "axes.spines.right": False, "legend.frameon": False})
    return pyplot


class Panel(NamedTuple):
    """One picture: a line for each run over the tokens trained on."""

    title: str
    lines: dict  # {run: (tokens, values)}
    level: float = None  # a dashed line, such as chance
    errors: dict = None  # {run: standard errors}
    marker: str = None


def grid(pyplot, panels):
    """The panels as inline SVG, side by side; nothing without pyplot."""
    if not pyplot:
        return ""
    return "<div class=grid>" + "".join(f"<figure>{svg(pyplot, panel)}</figure>"
                                        for panel in panels) + "</div>"


def svg(pyplot, panel):
    figure, axes = pyplot.subplots(figsize=(4.2, 2.7), layout="constrained")
    most = max((max(tokens) for tokens, _ in panel.lines.values() if tokens), default=0)
    unit, word = (1e9, "billion") if most > 2e9 else (1e6, "million")
    for name, (tokens, values) in panel.lines.items():
        every = -(-len(tokens) // 2000) or 1  # points; a page of a long run stays small
        axes.plot([count / unit for count in tokens[::every]], values[::every], label=name,
                  marker=panel.marker, markersize=3.5, linewidth=1.2)
        if panel.errors:
            axes.errorbar([count / unit for count in tokens], values, panel.errors[name],
                          color=axes.lines[-1].get_color(), linewidth=0, elinewidth=1, capsize=2)
    if panel.level is not None:
        axes.axhline(panel.level, color="0.5", linestyle="--", linewidth=1)
    axes.set(title=panel.title, xlabel=f"{word} tokens", xlim=(0, 1.03 * most / unit or 1))
    if len(panel.lines) > 1:
        axes.legend(fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return out.getvalue()[out.getvalue().index("<svg"):]


def training_panels(runs):
    """Of the rows of kind train, and what adapt.py measures of held-out answers; none is empty."""
    for kind, key, title in (
            ("train", "loss", "training loss, nats"), ("train", "lr", "learning rate"),
            ("train", "grad_norm", "norm of the gradient"),
            ("train", "tokens_per_second", "tokens/s"), ("train", "kwh", "energy, kWh"),
            ("train", "rewards/margins", "DPO: margin of the rewards"),
            ("eval", "loss", "loss of held-out answers, nats"),
            ("eval", "dpo_loss", "DPO: loss of held-out pairs"),
            ("eval", "accuracy", "held-out pairs that are told right")):
        lines = {}
        for name, rows in runs.items():
            points = [(row["tokens"], measured[key]) for row in rows[kind]
                      for measured in [row if kind == "train" else row.get("tuned", {})]
                      if key in measured]
            if points:
                lines[name] = [list(column) for column in zip(*points, strict=True)]
        if lines:
            yield Panel(title, lines, marker="o" if kind == "eval" else None)


def names_in(found, kind):
    """The domains or tasks of all runs, in the order in which they were met; no domain's parts."""
    return [name for name in dict.fromkeys(name for evaluations in found.values()
                                           for name in getattr(evaluations, kind))
            if kind == "tasks" or "/" not in name]


def lines_of(found, kind, name, value):
    """{run: (tokens, values)} of a domain or a task."""
    points = {run: getattr(evaluations, kind).get(name, {}) for run, evaluations in found.items()}
    return {run: (sorted(of), [value(of[tokens]) for tokens in sorted(of)])
            for run, of in points.items() if of}


def domain_panels(found):
    for domain in names_in(found, "sums"):
        yield Panel(domain, lines_of(found, "sums", domain, bits_per_byte), marker="o")


def task_panels(found):
    for task in names_in(found, "tasks"):
        def of(key, times=1, task=task):
            return lines_of(found, "tasks", task, lambda result: times * result.get(key, 0))
        [chance, *_] = next(iter(of("chance", 100).values()))[1]
        if not chance:
            yield Panel(f"{task}, bits per byte", of("bits_per_byte"), marker="o")
            continue
        errors = {name: values for name, (_, values) in of("stderr", 100).items()}
        yield Panel(task, of("accuracy", 100), chance, errors, "o")


def last_results(found, kind, lines):
    """The last results of each run's domains or tasks, in the table that a terminal shows."""
    parts = []
    for name, evaluations in found.items():
        last = {}  # {tokens: {domain or task: result}}
        for what, points in getattr(evaluations, kind).items():
            last.setdefault(max(points), {})[what] = points[max(points)]
        parts += [f"<h3>{html.escape(name)}, after {tokens / 1e6:,.2f} M tokens</h3><pre "
                  f"class=scroll>{html.escape(lines(results))}</pre>"
                  for tokens, results in sorted(last.items())]
    return "".join(parts)


def verdicts(found):
    """A line on each suite that eval.py measured: was the training data decontaminated of it."""
    return [f"<p class=note>{html.escape(f'{name}, ' * (len(found) > 1) + f'{suite}: {said}')}</p>"
            for name, evaluations in found.items() for suite, said in evaluations.said.items()]


def settings_part(configs):
    """Of several runs, the settings that all have and that differ."""
    every = list(configs.values())
    different = [[key, *(str(config[key]) for config in every)] for key in every[0]
                 if key != "run_dir" and all(key in config for config in every)
                 and len({str(config[key]) for config in every}) > 1]
    return ["<h2>Settings that differ</h2>", table(["", *configs], different)] if different else []


def funnel_part(run):
    manifest = read_json(run / "manifest.json")
    if not manifest["sources"]:
        return f"<p>{len(manifest['shards'])} ready token files</p>"
    (_, sources), *rows = funnel_rows(manifest["sources"])
    return table(["", *sources], [[label, *cells] for label, cells in rows])
