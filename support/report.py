"""The HTML page of one or several runs: curves, tables, samples; one file, without scripts."""

import os
from pathlib import Path

from scaling.code_files import MAIN_FILES
from scaling.starts import noted_files
from support.bars import stage
from support.data_pictures import data_part
from support.files import log_rows, read_json, replace_file, to_json
from support.measured import after_their_bases, dict_at, read_evaluations, read_metrics
from support.page import escaped, folded, page, section, table
from support.panels import domain_panels, runs_by_method, task_panels, training_panels
from support.pictures import drawing, grid, looks_of
from support.records import domains_table, tasks_table
from support.runs_table import amount, runs_table, written
from support.text import counted
from support.xz import xz_levels

METHODS = {  # of adapt.py, "" for train.py: the heading of its curves and a note
    "": ("Training", ""),
    "sft": ("SFT: training on chats",
            "The loss is the mean over the tokens of the answers; the questions do not count."),
    "dpo": ("DPO: training on pairs of answers",
            "Dashed: ln 2 = 0.693, the loss of a pair before the first step; and 0.5, the share of "
            "pairs that a random choice gets right.")}


# ---- The page ------------------------------------------------------------------------------------

@stage("drawing the report")
def report(paths):
    """Write one HTML page about some runs into the first one's directory; returns its path."""
    logs = {str(path): read_metrics(path) for path in paths}
    runs = {name: rows for name, (rows, _) in logs.items()}
    configs = {name: read_json(Path(name) / "config.json") for name in runs}
    found = {name: read_evaluations(name, *log) for name, log in logs.items()}
    found = after_their_bases(found, configs)
    looks = looks_of([Path(name) for name in runs])
    pyplot = drawing()
    parts = [
        runs_table(runs, found, configs, looks),
        *best_steps(runs, looks),
        *without_pictures(pyplot),
        *training_parts(pyplot, runs, configs, looks),
        *held_out_part(pyplot, found, looks),
        *tasks_part(pyplot, found, looks),
        *settings_part(configs, looks),
        *samples_parts(found, looks),
        *data_parts(looks),
        *section("All settings", all_settings(configs, looks))]
    out = Path(paths[0]) / file_name(runs)
    title = " and ".join(look.label for look in looks.values())
    # "replace": a name may be no text, such as a folder's that is not UTF-8
    replace_file(out, page(title, parts).encode("utf-8", "replace"))
    return out


def file_name(runs):
    """report.html, or for several runs report_A_B.html."""
    if len(runs) == 1:
        return "report.html"
    suffix = "".join(f"_{Path(name).resolve().name}" for name in runs)
    return f"report{os.fsdecode(os.fsencode(suffix)[:200])}.html"  # a name has at most 255 bytes


def without_pictures(pyplot):
    """A line, also printed, if there is nothing to draw with."""
    if pyplot:
        return []
    print("no pictures: pip install matplotlib draws them")
    return ["<p class=note>There are no pictures: they are drawn with matplotlib "
            "(pip install matplotlib).</p>"]


def training_parts(pyplot, runs, configs, looks):
    """The curves of each kind of training."""
    parts = []
    for method, of_method in runs_by_method(runs, configs).items():
        heading, note = METHODS.get(method, (f"Training: {method}", ""))
        panels = training_panels(of_method, configs, method)
        parts += section(heading, grid(pyplot, panels, looks), note=note)
    return parts


def held_out_part(pyplot, found, looks):
    """Bits per byte of each domain as curves and tables."""
    levels = xz_levels(found)
    notes = ["Bits per byte over the tokens trained on; lower is better.",
             *xz_notes(levels),
             *base_notes(found, looks)]
    return section(
        "Held-out text",
        grid(pyplot, domain_panels(found, levels), looks),
        last_results(found, "sums", domains_table, looks),
        verdicts(found, looks),
        left_out(found, looks),
        note="<br>".join(notes))


def tasks_part(pyplot, found, looks):
    """Accuracy of each task as curves and tables."""
    return section(
        "Tasks",
        grid(pyplot, task_panels(found), looks),
        last_results(found, "tasks", tasks_table, looks),
        note="Accuracy in percent; dashed is chance.")


# ---- Its parts -----------------------------------------------------------------------------------

def best_steps(runs, looks):
    """A line for each run that keeps its best step: which it is (scaling/kept.py)."""
    lines = []
    for name, rows in runs.items():
        best = dict_at(rows["eval"][-1], "best") if rows["eval"] else {}
        if isinstance(best.get("path"), str) and type(best.get("value")) is float:
            said = f"{looks[name].label}: the best step: {best['path']}, {best.get('measure')} "
            lines.append(f"<p>{escaped(said)}{best['value']:.4f}</p>")
    return lines


def last_results(found, kind, to_text, looks):
    """Each run's last results of its domains or tasks, in the table that a terminal shows.

    Those of several runs are folded: their numbers are side by side at the top of the page.
    """
    parts = []
    for run, evaluations in found.items():
        last = {}  # {tokens: {domain or task: result}}
        for name, points in getattr(evaluations, kind).items():
            tokens = max(points)
            last.setdefault(tokens, {})[name] = points[tokens]
        for tokens, results in sorted(last.items()):
            heading = f"{looks[run].label}, after {written(amount(tokens))} tokens"
            shown = f"<pre class=scroll tabindex=0>{escaped(to_text(results))}</pre>"
            if len(found) > 1:
                parts.append(folded(heading, shown))
            else:
                parts.append(f"<h3>{escaped(heading)}</h3>{shown}")
    return "".join(parts)


def base_notes(found, looks):
    """A line on where the curves of tuned runs begin."""
    lines = []
    if any(evaluations.before for evaluations in found.values()):
        lines.append("The curve of a tuned run begins where its base ended. It often rises, "
                     "because chats are unlike this text.")
    lacking = [looks[run].label for run, each in found.items() if each.lacks_base]
    if lacking:
        lines.append(f"The tokens of {escaped(' and '.join(lacking))} are those of tuning alone: "
                     "the base is not on this page.")
    return lines


def verdicts(found, looks):
    """Folded, a line for each suite that eval.py measured: was the training data decontaminated?"""
    lines = []
    for run, evaluations in found.items():
        for suite, said in evaluations.said.items():
            line = f"{suite}: {said}"
            if len(found) > 1:
                line = f"{looks[run].label}, {line}"
            lines.append(f"<p class=note>{escaped(line)}</p>")
    heading = "Decontamination: was the training data searched for these texts?"
    return folded(heading, "".join(lines)) if lines else ""


def left_out(found, looks):
    """A line, also printed, for what a run's logs hold and the page does not show."""
    lines = []
    for run, evaluations in found.items():
        for said in evaluations.left_out:
            print(f"{run}: {said}")
            shown = escaped(f"{looks[run].label}: {said}")
            lines.append(f"<p class=note>{shown}</p>")
    heading = f"{counted(len(lines), 'note')} on what is not shown"
    return folded(heading, "".join(lines)) if lines else ""


def settings_part(configs, looks):
    """What differs: a table of settings and code that all runs have; the names of the others."""
    keys = {}  # {key: how many runs have it}
    for config in configs.values():
        for key in config:
            keys[key] = keys.get(key, 0) + 1
    keys.pop("run_dir", None)
    lacking = [key for key, count in keys.items() if count < len(configs)]
    differing = [*differing_rows(configs, keys.keys() - lacking), *differing_code(configs)]
    parts = []
    if differing:
        labels = [look.label for look in looks.values()]
        parts.append(table(["", *labels], differing, "runs"))
    if lacking:
        heading = f"{counted(len(lacking), 'setting')} that not every run has"
        names = escaped(", ".join(lacking))
        parts.append(folded(heading, f"<p>{names}</p>"))
    return section("Settings and code that differ", *parts)


def differing_code(runs):
    """The main files that differ; where a run of an older version noted none, the whole code."""
    files = {run: noted_files(run) for run in runs}
    if all(files.values()):
        return differing_rows(files, MAIN_FILES)
    newest = {run: list(log_rows(run, "starts.jsonl"))[-1:] for run in runs}
    if not all(newest.values()):
        return []
    return differing_rows({run: start for run, [start] in newest.items()}, ["code"])


def differing_rows(configs, shared):
    """[key, a value for each run] of the settings in `shared` whose values differ."""
    every = []
    for config in configs.values():
        of_run = {key: config[key] for key in config if key in shared}
        every.append(flat_settings(of_run))
    keys = {}  # as an ordered set
    for settings in every:
        keys.update(dict.fromkeys(settings))
    rows = []
    for key in keys:
        values = [str(settings.get(key, "-")) or '""' for settings in every]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return rows


def flat_settings(config, before=""):
    """{key.key: value} of nested settings, such as sources.docstrings.path."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found.update(flat_settings(value, f"{before}{key}."))
        else:
            found[before + key] = value
    return found


def xz_notes(levels):
    """A line that says what `xz -9` needs for the same text: a model should need less."""
    if not levels:
        return []
    said = ", ".join(f"{domain} {level:.3f}" for domain, level in levels.items())
    return ["The dashed line is what <code>xz -9</code> needs for the same text, without any "
            f"training: {escaped(said)}."]


def samples_parts(found, looks):
    """Each run's samples; with its name if there are several runs."""
    parts = []
    for name, evaluations in found.items():
        heading = f"Samples, {looks[name].label}" if len(found) > 1 else "Samples"
        parts += section(heading, samples_part(evaluations.samples))
    return parts


def samples_part(samples):
    """(step, text) pairs, a column for each step, so that a reader compares checkpoints."""
    columns = {}
    for step, text in samples:
        columns.setdefault(step, []).append(f"<pre>{escaped(text)}</pre>")
    parts = []
    for step, texts in columns.items():
        parts.append(f"<div><h3>step {step:,}</h3>{''.join(texts)}</div>")
    return f"<div class=columns>{''.join(parts)}</div>" if parts else ""


def data_parts(looks):
    """The funnel and the mix of each run's data; runs that share their data are shown together."""
    together = {}  # {what is shown of the data: labels of its runs}
    for run, look in looks.items():
        shown = "".join(data_part(Path(run)))
        together.setdefault(shown, []).append(look.label)
    parts = []
    for shown, labels in together.items():
        heading = f"The data, {' and '.join(labels)}" if len(looks) > 1 else "The data"
        parts += section(heading, shown)
    return parts


def all_settings(configs, looks):
    parts = []
    for name, config in configs.items():
        settings = f"<pre>{escaped(to_json(config, indent=1))}</pre>"
        parts.append(folded(looks[name].label, settings))
    return "".join(parts)
