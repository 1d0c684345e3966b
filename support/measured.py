"""What the logs of a run hold, read for its report.

A row may be of an older version, torn by a crash, or written by a person. What cannot be shown is
left out, and counted.
"""

from pathlib import Path
from typing import NamedTuple

from scaling.checkpoint import step_directories
from support.files import UserError, read_json, read_log
from support.records import bits_per_byte, cell
from support.run_hints import runs_below
from support.text import counted


WORDS = ("metric", "answer_begins")  # of a task's result


class Evaluations(NamedTuple):
    """What was measured of a run, during training and after it, by the tokens trained on."""

    sums: dict  # {domain: {tokens: sums}}
    tasks: dict  # {task: {tokens: result}}
    samples: list  # (step, text), the oldest first
    said: dict  # {suite: whether the training data was decontaminated}
    left_out: tuple = ()  # sentences about what is not shown
    steps: dict = {}  # {tokens: the step after which they were trained on}
    before: int = 0  # tokens that the base of a tuned run was trained on, if it is on the page
    lacks_base: bool = False  # a tuned run whose base, or its base's base, is not on the page


def read_metrics(run):
    """Returns ({kind: rows} of a run's metrics.jsonl, sentences about what is left out).

    Each row has its tokens, its place in a picture.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(runs_below(run) or (
            f"{path}: missing; a report is drawn from the log of a training: name the directory of "
            f"a run of train.py or adapt.py; python eval.py {run} measures another model"))
    rows = {"train": [], "eval": [], "end": []}
    placed, left_out = placed_rows(run, path.name)
    for row in placed:
        if row["kind"] == "eval":
            row["tuned"] = numbers(row.get("tuned"))
        else:
            row = {"kind": row["kind"], **numbers(row)}
        rows.setdefault(row["kind"], []).append(row)
    return rows, left_out


def placed_rows(run, name):
    """(rows, sentences): the rows of a log that say their tokens, and how many lines do not."""
    rows, skipped = read_log(run, name)
    placed = [row for row in rows if is_count(row.get("tokens"))]
    skipped += len(rows) - len(placed)
    if not skipped:
        return placed, []
    return placed, [f"{name}: left out are lines that are no complete rows: {skipped:,}"]


def read_evaluations(run, rows, left_out=()):
    """The Evaluations in a run's logs; `rows` and `left_out` are read_metrics'.

    A task may have been evaluated with different limits, and a domain grown: the results with the
    most questions or bytes count. Results of another metric, dtype or prompt cannot be compared:
    the largest group of comparable ones counts. Of each step the latest result counts.
    """
    later, skipped = placed_rows(run, "eval.jsonl")
    left_out = [*left_out, *skipped]
    measured = {"sums": {}, "tasks": {}}  # {(name, size): {conditions: {tokens: result}}}
    samples = {}  # as an ordered set
    said = {}
    steps = {}
    faulty = 0
    for row in [*rows["eval"], *later]:
        if is_count(row["step"]):
            steps[row["tokens"]] = row["step"]
        for kind, size in (("sums", "bytes"), ("tasks", "questions")):
            for name, result in dict_at(row, kind).items():
                result = sound(result, kind)
                if result is None:
                    faulty += 1
                    continue
                groups = measured[kind].setdefault((name, result[size]), {})
                groups.setdefault(conditions(row, result), {})[row["tokens"]] = result
        for text in texts_in(row):
            samples[row["step"], text] = None
        suite = dict_at(row, "of").get("suite")
        if isinstance(suite, str) and isinstance(row.get("said"), str):
            said[suite] = row["said"]
    if faulty:
        left_out.append(f"left out are results without their size or sums: {faulty:,}")
    sums = comparable(measured["sums"], left_out)
    tasks = comparable(measured["tasks"], left_out)
    return Evaluations(sums, tasks, sorted(samples), said, tuple(left_out), steps)


# ---- The base of a tuned run ---------------------------------------------------------------------

def after_their_bases(found, configs):
    """{run: Evaluations} with what each must know of its base, whose curve a tuning continues."""
    weights = {}  # {their SHA-256: (run, tokens)} of all steps
    for run in found:
        for path in step_directories(run):
            state = read_state(path)
            if isinstance(state.get("sha256"), str):
                weights[state["sha256"]] = (run, state["tokens"])
    bases = {run: weights.get(base_of(run)) for run in found}
    placed = {}
    for run, evaluations in found.items():
        first, before = before_tuning(run, bases)
        lacks_base = "method" in configs[first]
        placed[run] = evaluations._replace(before=before, lacks_base=lacks_base)
    return placed


def base_of(run):
    """The SHA-256 of the weights that adapt.py tuned; "" for another run."""
    file = Path(run) / "manifest.json"
    manifest = read_json(file) if file.is_file() else {}
    return str(dict_at(manifest, "tuned_on").get("base_sha256", ""))


def before_tuning(run, bases):
    """(the first run of a chain of bases, the tokens of all runs before `run`)."""
    base = bases[run]
    if base is None:
        return run, 0
    name, tokens = base
    first, before = before_tuning(name, bases | {run: None})  # None: a circle of bases ends
    return first, before + tokens


# ---- The last step -------------------------------------------------------------------------------

def last_step(run, rows):
    """What is known of the last step that a run has taken: its step, tokens, seconds and kwh.

    rows: read_metrics'. A run that was stopped has saved a step after the last row of its log.
    """
    last = {}
    for row in [*rows["eval"], *saved_states(run), *rows["train"]]:
        row = numbers(row)
        if row.get("step", -1) >= last.get("step", 0):
            last = row
    return last


def saved_states(run):
    """The state.json of the newest step directory of a run, in a list; [] where none can be read.
    """
    for path in reversed(step_directories(run)):
        state = read_state(path)
        if state:
            return [state]
    return []


def read_state(path):
    """The state.json of a step directory; {} if it cannot be read or lacks its step or tokens."""
    try:
        state = read_json(path / "state.json")
    except (UserError, OSError):
        return {}
    if not isinstance(state, dict):
        return {}
    is_complete = is_count(state.get("step")) and is_count(state.get("tokens"))
    return state if is_complete else {}


# ---- Values --------------------------------------------------------------------------------------

def is_count(value):
    """Whether a value is a number of tokens, bytes or questions that can be drawn."""
    return type(value) is int and 0 <= value < 1e18


def numbers(row):
    """The numbers in a row, of a size that a measurement can have; {} if it is none."""
    row = row if isinstance(row, dict) else {}
    return {key: value for key, value in row.items()
            if type(value) in (int, float) and abs(value) < 1e18}


def sound(result, kind):
    """The numbers and words of a result that can be shown; None without those that it must have."""
    found = numbers(result)
    counts = ("documents", "tokens", "bytes") if kind == "sums" else ("questions",)
    if not all(is_count(found.get(key)) for key in counts):
        return None
    if kind == "sums" and "nats" not in found:
        return None
    return found | {key: result[key] for key in WORDS if isinstance(result.get(key), str)}


def dict_at(row, key):
    """row[key] if that is a dict, else {}."""
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def texts_in(row):
    """The samples of a row, which is one of eval.jsonl or of training."""
    texts = [row.get("text")] if row["kind"] == "sample" else row.get("samples")
    if not isinstance(texts, list):
        return []
    return [text for text in texts if isinstance(text, str)]


def conditions(row, result):
    """What a result was measured by, as text: results can be compared if theirs are equal."""
    keys = row.get("of")  # a row of training has a list of them, one for each suite, of one dtype
    [key] = (keys if isinstance(keys, list) else [keys])[:1] or [None]
    dtype = key.get("dtype") if isinstance(key, dict) else None
    found = {"": result.get("metric"), "dtype ": dtype, "prompt ": result.get("answer_begins")}
    return ", ".join(name + text for name, text in found.items() if text and isinstance(text, str))


def comparable(measured, left_out):
    """{name: results} of {(name, size): groups}: of each name's largest size the largest group, or
    the latest of equal ones; left_out receives sentences about the others.
    """
    sizes = {}
    for name, size in measured:
        sizes[name] = max(size, sizes.get(name, size))
    found = {}
    hidden = {}  # {conditions and steps of both: {name: results}}
    for name, size in sizes.items():
        groups = measured[name, size]
        latest_first = reversed(groups)
        shown = max(latest_first, key=lambda group: len(groups[group]))
        found[name] = groups[shown]
        for other in groups:
            if other != shown:
                key = (shown, steps(groups[shown]), other, steps(groups[other]))
                hidden.setdefault(key, {})[name] = groups[other]
    for key, of_names in hidden.items():
        left_out.append(measured_twice(key, of_names))
    return found


def measured_twice(key, hidden):
    """A sentence for all domains or tasks that were measured by the same two conditions.

    hidden: {name: {tokens: result}} of what the page does not show.
    """
    shown, shown_at, other, other_at = key
    last = ", ".join(in_words(results) for results in hidden.values())
    if shown.startswith("dtype") and other.startswith("dtype"):
        other_at += " (a run evaluates in its dtype, eval.py in eval_dtype)"
    return (f"{', '.join(hidden)}: measured by {shown} at {shown_at} and by {other} at {other_at} "
            f"(at last {last}); the page shows the first, because the two cannot be compared; the "
            "run's logs have both")


def steps(results):
    return counted(len(results), "step")


def in_words(results):
    """The number for which a result is read, of the most tokens in {tokens: result}."""
    newest = results[max(results)]
    if "nats" in newest:
        return f"{bits_per_byte(newest):.4f} bits/byte"
    if "accuracy" in newest:
        return f"{newest['accuracy']:.1%} right"
    return f"{cell(newest.get('bits_per_byte'), '.4f')} bits/byte"
