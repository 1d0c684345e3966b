"""The table at the top of a report: how each run was started, and its numbers with differences."""

import math
import re
from pathlib import Path
from typing import NamedTuple

from configs import load_config
from model import ModelConfig, count_parameters
from scaling.code_files import MAIN_FILES, code_version
from scaling.starts import changed_files
from support.files import log_rows, read_json
from support.measured import dict_at, last_step
from support.page import escaped, folded, table
from support.panels import names_in, ordered
from support.records import bits_per_byte, summed_up
from support.text import counted

LOSS_UNITS = {"": " nats", "sft": " nats (answers)", "dpo": " (of a pair)"}  # method: unit
SEED_SPREAD = "0.0031"  # of the variant `unchanged` in assets/experiments/results.md


class Number(NamedTuple):
    """A number of a run, and how it is written."""

    value: float
    form: str  # of format()
    unit: str = ""
    of: dict = None  # {what: what it was measured on}, of a number that is compared between runs
    at: int = None  # the step at which it was measured, if the run has taken later ones


def runs_table(runs, found, configs, looks):
    """HTML: a column for each run, under its name in its colour; one run's numbers as tiles.

    runs: {run: {kind: rows}} of read_metrics. found: {run: Evaluations}. configs: {run: its
    config.json}. looks: {run: Look}. A run is the path of its directory, as text.
    """
    starts = {run: list(log_rows(run, "starts.jsonl")) for run in looks}
    facts = {run: facts_of(run, starts[run]) for run in looks}
    numbers = {run: numbers_of(run, runs[run], configs[run], found) for run in looks}
    lines = []
    for name in ordered(facts.values()):
        cells = [of_run.get(name, "-") for of_run in facts.values()]
        if set(cells) != {"-"}:
            lines.append(command_line(name, cells) if "command" in name else line_of(name, cells))
    if len(looks) == 1:
        [of_run] = numbers.values()
        return tiles(of_run) + runs_in_columns(looks, lines) + all_starts(starts, looks)
    differences = 0
    for name in ordered(numbers.values()):
        cells = compared([of_run.get(name) for of_run in numbers.values()])
        differences += any(re.search(r"\([+-]", cell) for cell in cells)
        if set(cells) != {"-"}:
            lines.append(line_of(name, cells))
    note = spread_note(looks) if differences else ""
    return runs_in_columns(looks, lines) + note + all_starts(starts, looks)


def spread_note(looks):
    """What a reader must know of the differences in the table."""
    first = next(iter(looks.values())).label
    return (f"<p class=note>In brackets: the difference from {escaped(first)}. It may be chance if "
            "it is as small as the spread between seeds: for configs/tiny.py after 150 steps, the "
            f"standard deviation over three seeds is {SEED_SPREAD} bits per byte "
            "(docs/experiments.md).</p>")


def tiles(numbers):
    """The Numbers of one run, side by side."""
    parts = []
    for name, number in numbers.items():
        if number:
            parts.append(f"<div><b>{escaped(written(number))}</b> {escaped(name)}</div>")
    return f"<div class=tiles>{''.join(parts)}</div>"


def runs_in_columns(looks, lines):
    """A table with these lines under the runs' names; "" without lines."""
    if not lines:
        return ""
    head = ["<th>"]
    for look in looks.values():
        head.append(f"<th style='border-top:4px solid {look.color}'>{escaped(look.label)}")
    rows = "".join(f"<tr>{line}" for line in ["".join(head), *lines])
    return f"<div class=scroll><table class=runs>{rows}</table></div>"


def line_of(name, cells):
    return "".join(f"<td>{escaped(cell)}" for cell in [name, *cells])


def command_line(name, commands):
    """A line of commands: each breaks between its words, and not behind the -- of an option."""
    line = f"<td>{escaped(name)}"
    for command in commands:
        words = [f"<span>{escaped(word)}</span>" for word in command.split(" ")]
        line += f"<td>{' '.join(words)}"
    return line


def compared(numbers):
    """The Numbers of a line as text; behind each but the first one its difference from the first.
    """
    first = numbers[0]
    cells = []
    for place, number in enumerate(numbers):
        text = written(number)
        is_alike = first and number and number.unit == first.unit
        if place > 0 and is_alike and number.of:
            text += f" ({difference(number, first)})"
        cells.append(text)
    return cells


def difference(number, first):
    """A Number minus the first run's, as text; or what differs, so that they cannot be compared."""
    if number.at != first.at:
        return "other step"
    for what, of_run in number.of.items():
        if of_run != first.of[what]:
            return f"other {what}"
    return f"{number.value - first.value:+{number.form}}"


def written(number):
    """A Number as text; "-" for none."""
    if not number:
        return "-"
    at = "" if number.at is None else f" at step {number.at:,}"
    return f"{number.value:{number.form}}{number.unit}{at}"


# ---- How a run was started -----------------------------------------------------------------------

def facts_of(run, starts):
    """{fact: text} of the starts of a run (scaling/starts.py); {} where no start is noted.

    The command is the first one, which a reader repeats; the machine is that of the newest start.
    """
    if not starts:
        return {}
    newest_start = starts[-1]

    def said(key, start=newest_start):
        return str(start.get(key, "-"))
    continued = "-"
    newest_command = "-"
    if len(starts) > 1:
        continued = f"{said('date')}, after step {said('step')}; {len(starts):,} starts in all"
        newest_command = said("command")
    machine = said("machine")
    for key, what in (("threads", "thread"), ("ranks", "rank")):
        if type(newest_start.get(key)) is int:
            machine += f", {counted(newest_start[key], what)}"
    compiled = "compiled" if newest_start.get("compiled") else "not compiled"
    return {
        "started": said("date", starts[0]),
        "command": said("command", starts[0]),
        "continued": continued,
        "newest command": newest_command,
        "machine": machine,
        "what auto became": f"{said('device')}, {said('dtype')}, {compiled}",
        "Python, torch": f"{said('python')}, {said('torch')}",
        "code": code_of(run, starts)}


def code_of(run, starts):
    """The hash of the code of a run's newest start, and which files have changed before and since.
    """
    code = str(starts[-1].get("code", "-"))
    between = [name for name in MAIN_FILES if is_changed(name, starts)]
    if between:
        code += f"; changed between its starts: {', '.join(between)}"
    since = changed_files(run)
    if since:
        code += f"; changed in the code here: {', '.join(since)}"
    elif code != code_version() and not between:
        code += "; this page was drawn by other code"
    return code


def is_changed(name, starts):
    """Whether a main file was another one at two starts of a run."""
    digests = {str(dict_at(start, "files").get(name)) for start in starts}
    return len(digests - {"None"}) > 1  # an older version noted none


def all_starts(starts, looks):
    """A folded list of the starts of each run that has several."""
    parts = []
    for run, of_run in starts.items():
        if len(of_run) < 2:
            continue
        rows = []
        for start in of_run:
            rows.append([str(start.get(key, "-")) for key in ("date", "step", "code", "command")])
        listed = table(["started", "after step", "code", "command"], rows, "runs")
        parts.append(folded(f"{looks[run].label}: its {len(of_run):,} starts", listed))
    return "".join(parts)


# ---- Its numbers ---------------------------------------------------------------------------------

def numbers_of(run, rows, config, found):
    """{name: Number} of a run: its size, how far it came, what it reached and what it took.

    None: a number that another run has; so all runs have their numbers in the same order.
    """
    last = last_step(run, rows)
    logged = newest(rows["train"])
    end = newest(rows["end"])
    [model_config] = load_config([str(Path(run) / "config.json")], ModelConfig)
    millions = count_parameters(model_config) / 1e6
    of_steps = config.get("max_steps")
    of_steps = f" of {of_steps:,}" if type(of_steps) is int else ""
    kwh = end.get("kwh", last.get("kwh", math.nan))
    unit = LOSS_UNITS.get(config.get("method", ""), "")
    numbers = {
        "parameters": Number(millions, ",.1f", " M"),
        "steps": Number(last.get("step", 0), ",", of_steps),
        "tokens": amount(last.get("tokens", 0)),
        "training loss": Number(logged.get("loss", math.nan), ".4f", unit, trained_on(run),
                                earlier(logged.get("step"), last)),
        **domain_numbers(run, found, last),
        **task_numbers(run, found, last),
        "minutes of training": Number(last.get("seconds", math.nan) / 60, ",.1f"),
        "kWh": Number(kwh, ".3g"),
        "kg CO2eq": Number(end.get("kg_co2", math.nan), ".3g")}
    return {name: number for name, number in numbers.items()
            if number is None or not math.isnan(number.value)}


def amount(tokens):
    """The Number of some tokens, in millions if they are many."""
    return Number(tokens, ",") if tokens < 1e5 else Number(tokens / 1e6, ",.2f", " M")


def earlier(step, last):
    """The step, if it is not the run's last one; else None."""
    return None if step == last.get("step") else step


def newest(rows):
    return rows[-1] if rows else {}


def trained_on(run):
    """What a training loss is of: the tokens of the data, or the chats or pairs of tuning."""
    file = Path(run) / "manifest.json"
    manifest = read_json(file) if file.is_file() else {}
    tuned_on = dict_at(manifest, "tuned_on")  # its seed and its base are no part of the data
    if tuned_on:
        return {"tokenizer": tuned_on.get("tokenizer_sha256"), "data": tuned_on.get("data_sha256")}
    return {"tokenizer": None, "data": manifest.get("sha256")}


def domain_numbers(run, found, last):
    """Bits per byte of each domain, and over all of them, after the most tokens."""
    results = {}
    steps = {}  # {domain: at which it was measured}
    for domain in names_in(found, "sums"):
        points = found[run].sums.get(domain)
        if points and "/" not in domain:
            results[domain] = points[max(points)]
            steps[domain] = found[run].steps.get(max(points))
    both = summed_up(results)
    if both and len(set(steps.values())) == 1:  # a sum over several steps is of no model
        results["all bytes"], _ = both
        steps["all bytes"] = max(steps.values())
    names = [name for name in names_in(found, "sums") if "/" not in name]
    numbers = {f"bits per byte, {name}": None for name in names}
    for domain, sums in results.items():
        bits = bits_per_byte(sums)
        text = {"text": (sums["documents"], sums["bytes"])}
        numbers[f"bits per byte, {domain}"] = Number(
            bits, ".4f", "", text, earlier(steps[domain], last))
    return numbers


def task_numbers(run, found, last):
    """Accuracy of each task in percent, after the most tokens."""
    numbers = dict.fromkeys(names_in(found, "tasks"))
    for task in names_in(found, "tasks"):
        points = found[run].tasks.get(task)
        result = points[max(points)] if points else {}
        if "accuracy" in result:
            of = {
                "questions": result["questions"],
                "metric": result.get("metric"),
                "prompt": result.get("answer_begins")}
            percent = 100 * result["accuracy"]
            step = found[run].steps.get(max(points))
            numbers[task] = Number(percent, ".1f", " %", of, earlier(step, last))
    return numbers
