"""The HTML page of one or several runs: curves, tables, samples; one file, without scripts."""

import os
from pathlib import Path

from configs import load_config
from model import ModelConfig, count_parameters
from support.bars import stage
from support.data_pictures import data_part
from support.files import read_json, to_json
from support.measured import dict_at, read_evaluations, read_metrics
from support.page import escaped, page, table
from support.pictures import domain_panels, drawing, grid, task_panels, training_panels
from support.records import cell, domains_table, tasks_table
from support.xz import xz_levels

# ---- The page ------------------------------------------------------------------------------------

@stage("drawing the report")
def report(paths):
    """Write one HTML page about some runs into the first one's directory; returns its path."""
    logs = {str(path): read_metrics(path) for path in paths}
    runs = {name: rows for name, (rows, _) in logs.items()}
    found = {name: read_evaluations(name, *log) for name, log in logs.items()}
    configs = {name: read_json(Path(name) / "config.json") for name in runs}
    names = [Path(name).resolve().name for name in runs]
    parts = [summary(runs, configs), *best_steps(runs)]
    pyplot = drawing()
    if not pyplot:
        parts.append("<p class=note>There are no pictures: they are drawn with matplotlib "
                     "(pip install matplotlib).</p>")
        print("no pictures: pip install matplotlib draws them")
    parts += ["<h2>Training</h2>", grid(pyplot, training_panels(runs, configs))]
    levels = xz_levels(found)
    parts += ["<h2>Held-out text</h2>",
              "<p class=note>Bits per byte over the tokens trained on; lower is better.</p>",
              *xz_notes(levels),
              grid(pyplot, domain_panels(found, levels)),
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
    out.write_text(page(" and ".join(names), parts), encoding="utf-8", errors="replace")
    return out


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
            lines.append(f"<p>{escaped(said)}{best['value']:.4f}</p>")
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
            parts.append(f"<h3>{escaped(run)}, after {tokens / 1e6:,.2f} M tokens</h3>"
                         f"<pre class=scroll>{escaped(to_text(results))}</pre>")
    return "".join(parts)


def verdicts(found):
    """A line for each suite that eval.py measured: was the training data decontaminated?"""
    lines = []
    for run, evaluations in found.items():
        for suite, said in evaluations.said.items():
            line = f"{suite}: {said}"
            if len(found) > 1:
                line = f"{run}, {line}"
            lines.append(f"<p class=note>{escaped(line)}</p>")
    return lines


def left_out(found):
    """A line, also printed, for what a run's logs hold and the page does not show."""
    lines = []
    for run, evaluations in found.items():
        for said in evaluations.left_out:
            print(f"{run}: {said}")
            lines.append(f"<p class=note>{escaped(f'{run}: {said}')}</p>")
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


def xz_notes(levels):
    """A line that says what `xz -9` needs for the same text: a model should need less."""
    if not levels:
        return []
    said = ", ".join(f"{domain} {level:.3f}" for domain, level in levels.items())
    return [f"<p class=note>The dashed line is <code>xz -9</code>, which compresses the same text "
            f"and has seen no other: {escaped(said)}.</p>"]


def samples_and_data(name, evaluations, several):
    """A run's samples and its funnel; with its name if there are several runs."""
    heading = f", {escaped(name)}" if several else ""
    return [f"<h2>Samples{heading}</h2>", samples_part(evaluations.samples),
            f"<h2>The data{heading}</h2>", *data_part(Path(name))]


def samples_part(samples):
    """(step, text) pairs, a column for each step, so that a reader compares checkpoints."""
    columns = {}
    for step, text in samples:
        columns.setdefault(step, []).append(f"<pre>{escaped(text)}</pre>")
    parts = [f"<div><h3>step {step:,}</h3>{''.join(texts)}</div>"
             for step, texts in columns.items()]
    return f"<div class=columns>{''.join(parts)}</div>"


def all_settings(configs):
    parts = []
    for name, config in configs.items():
        parts.append(f"<details><summary>{escaped(name)}</summary><pre>"
                     f"{escaped(to_json(config, indent=1))}</pre></details>")
    return "".join(parts)
