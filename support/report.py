"""The HTML page of one or several runs: curves, tables, samples; one file, without scripts."""

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


# ---- What was measured ---------------------------------------------------------------------------

def read_metrics(run):
    """{kind: rows} of a run's metrics.jsonl."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: missing; name a run directory that train.py wrote")
    rows = {"train": [], "eval": [], "end": []}
    for row in log_rows(run):
        rows.setdefault(row["kind"], []).append(row)
    return rows


class Evaluations(NamedTuple):
    """What was measured of a run, during training and after it, by the tokens trained on."""

    sums: dict  # {domain: {tokens: sums}}
    tasks: dict  # {task: {tokens: result}}
    samples: list  # (step, text), the oldest first
    said: dict  # {suite: whether the training data was decontaminated}


def read_evaluations(run, rows):
    """The Evaluations in a run's logs; `rows` are those of read_metrics.

    A task may have been evaluated with different limits, and a domain grown: the results with the
    most questions or bytes count, and of each step the latest.
    """
    sums = {}
    tasks = {}
    samples = {}  # as an ordered set
    said = {}
    for row in [*rows["eval"], *log_rows(run, "eval.jsonl")]:
        try:
            for name, result in row.get("sums", {}).items():
                sums.setdefault((name, result["bytes"]), {})[row["tokens"]] = result
            for name, result in row.get("tasks", {}).items():
                tasks.setdefault((name, result["questions"]), {})[row["tokens"]] = result
            texts = [row["text"]] if row["kind"] == "sample" else row.get("samples", [])
            for text in texts:
                samples[row["step"], text] = None
            if "said" in row:
                said[row["of"]["suite"]] = row["said"]
        except (KeyError, TypeError, AttributeError):
            continue  # somebody else wrote this row
    return Evaluations(largest_only(sums), largest_only(tasks), sorted(samples), said)


def largest_only(found):
    """{name: results} of {(name, size): results}: those of each name's largest size."""
    sizes = {}
    for name, size in found:
        sizes[name] = max(size, sizes.get(name, size))
    return {name: found[name, size] for name, size in sizes.items()}


# ---- The page ------------------------------------------------------------------------------------

def report(paths):
    """Write one HTML page about some runs into the first one's directory; returns its path."""
    runs = {str(path): read_metrics(path) for path in paths}
    found = {name: read_evaluations(name, rows) for name, rows in runs.items()}
    configs = {name: read_json(Path(name) / "config.json") for name in runs}
    names = [Path(name).name for name in runs]
    title = html.escape(" and ".join(names))
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
             "<meta name=viewport content='width=device-width'>"
             f"<style>{STYLE}</style><h1>{title}</h1>", summary(runs, configs)]
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
              *verdicts(found)]
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
        suffix = "".join(f"_{name}" for name in names)[:200]  # a file's name is at most 255 bytes
    out = Path(paths[0]) / f"report{suffix}.html"
    out.write_text("\n".join(parts) + "\n", encoding="utf-8")
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
        kwh = end.get("kwh", last.get("kwh", 0))
        kg_co2 = end.get("kg_co2")
        lines.append([
            name,
            f"{count_parameters(model_config) / 1e6:,.1f} M",
            f"{last.get('step', 0):,} of {configs[name]['max_steps']:,}",
            f"{last.get('tokens', 0) / 1e6:,.2f} M",
            f"{last.get('loss', math.nan):.3f}",
            f"{last.get('seconds', 0) / 60:,.1f}",
            f"{kwh:.3g}",
            "-" if kg_co2 is None else f"{kg_co2:.3g}"])
    return table(["run", "parameters", "steps", "tokens", "training loss", "minutes", "kWh",
                  "kg CO2eq"], lines)


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
    manifest = read_json(run / "manifest.json")
    if not manifest["sources"]:
        return f"<p>{len(manifest['shards'])} ready token files</p>"
    (_, sources), *rows = funnel_rows(manifest["sources"])
    return table(["", *sources], [[label, *cells] for label, cells in rows])


def all_settings(configs):
    parts = []
    for name, config in configs.items():
        parts.append(f"<details><summary>{html.escape(name)}</summary><pre>"
                     f"{html.escape(json.dumps(config, indent=1))}</pre></details>")
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
                measured = row if kind == "train" else row.get("tuned", {})
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
        def percent(key, task=task):
            return lines_of(found, "tasks", task, lambda result: 100 * result.get(key, 0))
        first_line = next(iter(percent("chance").values()))
        chance = first_line[1][0]
        if chance:
            errors = {run: values for run, (_, values) in percent("stderr").items()}
            yield Panel(task, percent("accuracy"), chance, errors, "o")
        else:
            bits = lines_of(found, "tasks", task, lambda result: result.get("bits_per_byte", 0))
            yield Panel(f"{task}, bits per byte", bits, marker="o")


def names_in(found, kind):
    """The domains or tasks of all runs, each once, in the order in which they were measured."""
    names = {}  # as an ordered set
    for evaluations in found.values():
        names.update(dict.fromkeys(getattr(evaluations, kind)))
    return list(names)


def lines_of(found, kind, name, value):
    """{run: (tokens, values)} of a domain or a task; `value(result)` is what is drawn."""
    lines = {}
    for run, evaluations in found.items():
        points = getattr(evaluations, kind).get(name)
        if points:
            tokens = sorted(points)
            lines[run] = (tokens, [value(points[count]) for count in tokens])
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
