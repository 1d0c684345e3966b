"""What a report draws: the Panels of training, of held-out text and of tasks."""

import math
from pathlib import Path

from configs import load_config
from model import ModelConfig
from scaling.machine import flops_per_token
from support.pictures import Panel, is_one_point
from support.records import bits_per_byte


TRAINING_PANELS = (  # kind of row, key, title, level
    ("train", "loss", "training loss", None),
    ("eval", "loss", "loss of held-out answers, nats", None),  # adapt.py, under "tuned"
    ("eval", "dpo_loss", "loss of held-out pairs", math.log(2)),
    ("eval", "accuracy", "share of held-out pairs whose chosen answer is likelier", 0.5),
    ("train", "rewards/margins", "margin of the rewards", None),
    ("train", "lr", "learning rate", None),
    ("train", "grad_norm", "norm of the gradient", None),
    ("train", "tokens_per_second", "tokens/s", None),
    ("train", "kwh", "energy, kWh", None))


# ---- Training ------------------------------------------------------------------------------------

def runs_by_method(runs, configs):
    """{method of adapt.py, "" for train.py: its runs}, as each method has panels of its own:
    tuning has few tokens beside pretraining, and its loss measures something else.
    """
    found = {}
    for run, rows in runs.items():
        found.setdefault(configs[run].get("method", ""), {})[run] = rows
    return found


def training_panels(runs, configs, method):
    """The Panels of what train.py or one method of adapt.py logs; without those of no point."""
    for kind, key, title, level in TRAINING_PANELS:
        lines = logged_lines(runs, kind, key)
        if not lines:
            continue
        panel = Panel(title, lines, level, marker="o" if kind == "eval" else None)
        if (kind, key) == ("train", "loss"):
            yield from loss_panels(panel, method)
        elif key == "grad_norm":
            yield with_clip_limits(panel, runs, configs)
        else:
            yield panel


def loss_panels(panel, method):
    """The training loss in its unit; that of pretraining over FLOPs too."""
    if method == "dpo":
        yield panel._replace(title=f"{panel.title} of a pair", level=math.log(2))
        return
    in_nats = panel._replace(title=f"{panel.title}, nats")
    yield in_nats
    if not method:  # adapt.py's steps have other FLOPs: DPO runs two models
        title = f"{in_nats.title}, over FLOPs"
        yield in_nats._replace(title=title, lines=over_flops(panel.lines), x="FLOPs")


def logged_lines(runs, kind, key):
    """{run: (tokens, values)} of a key in the rows of a kind; without runs that lack it."""
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
    return lines


def over_flops(lines):
    """{run: (FLOPs, losses)} of {run: (tokens, losses)}: equal tokens cost a larger model more."""
    found = {}
    for run, (tokens, losses) in lines.items():
        [config] = load_config([str(Path(run) / "config.json")], ModelConfig)
        per_token = flops_per_token(config)
        found[run] = ([count * per_token for count in tokens], losses)
    return found


def with_clip_limits(panel, runs, configs):
    """The Panel of the gradient's norm with the limit at which each run clips it, if it does."""
    limits = {}
    for run in panel.lines:
        tokens = []
        values = []
        for row in runs[run]["train"]:
            limit = clip_limit(row["step"], configs[run]) if "step" in row else None
            if limit is not None:
                tokens.append(row["tokens"])
                values.append(limit)
        if tokens:
            limits[run] = (tokens, values)
    if not limits:
        return panel
    return panel._replace(title=f"{panel.title}; dashed: the clip limit", limits=limits)


def clip_limit(step, config):
    """The limit of the gradient's norm at a step, as train.clip_at_step has it; None without one.

    config: a run's config.json, which may be of another version.
    """
    limit, warmup_steps, factor = (config.get(key) for key in (
        "grad_clip", "grad_clip_warmup_steps", "grad_clip_warmup_factor"))
    if type(limit) not in (int, float) or limit <= 0:  # 0 does not clip
        return None
    is_warm = type(warmup_steps) is int and 2 <= step <= warmup_steps + 1 and warmup_steps > 0
    return limit * factor if is_warm and type(factor) in (int, float) else limit


# ---- Evaluations ---------------------------------------------------------------------------------

def domain_panels(found, levels):
    """Bits per byte of each domain; levels: {domain: that of xz -9, a dashed line}."""
    for domain in names_in(found, "sums"):
        if "/" not in domain:  # a part of a domain has no picture of its own
            lines = lines_of(found, "sums", domain, bits_per_byte)
            if lines:
                title = domain + unlike(found, "sums", domain, "bytes")
                panel = Panel(title, lines, levels.get(domain), marker="o")
                yield from on_their_axes(panel, found)


def task_panels(found):
    """Accuracy with chance and standard errors; bits per byte for a set without choices."""
    for task in names_in(found, "tasks"):
        accuracy = lines_of(found, "tasks", task, lambda result: percent(result, "accuracy"))
        if accuracy:
            errors = lines_of(found, "tasks", task, error_of)
            errors = {run: values for run, (_, values) in errors.items()}
            chance = lines_of(found, "tasks", task, lambda result: percent(result, "chance"))
            level = next((values[0] for _, values in chance.values()), None)
            title = task + unlike(found, "tasks", task, "questions")
            panel = Panel(title, accuracy, level, errors=errors, marker="o")
            yield from on_their_axes(panel, found)
            continue
        bits = lines_of(found, "tasks", task, lambda result: result.get("bits_per_byte"))
        if bits:
            panel = Panel(f"{task}, bits per byte", bits, marker="o")
            yield from on_their_axes(panel, found)


def on_their_axes(panel, found):
    """The Panel; or two, where some of its runs were tuned and their base is not on the page.

    Their tokens begin at 0, as if they were trained from scratch.
    """
    tuned = {}
    others = {}
    for run, line in panel.lines.items():
        group = tuned if found[run].lacks_base else others
        group[run] = line
    if is_one_point(panel) or not tuned or not others:
        return [panel]
    title = f"{panel.title}; tuned"
    return [panel._replace(lines=others), panel._replace(lines=tuned, title=title)]


def unlike(found, kind, name, size):
    """Words behind the title of a picture whose lines are not of equal text or questions."""
    sizes = set()
    for evaluations in found.values():
        points = getattr(evaluations, kind).get(name)
        if points:
            newest = points[max(points)]
            sizes.add(newest.get(size))
    return f"; the runs' {size} differ" if len(sizes) > 1 else ""


def percent(result, key):
    """100 x a share of a task's result; None if the result lacks it."""
    return 100 * result[key] if key in result else None


def error_of(result):
    """The standard error of an accuracy in percent, 0 if it is not known; None without accuracy."""
    return 100 * abs(result.get("stderr") or 0) if "accuracy" in result else None


def names_in(found, kind):
    """The domains or tasks of all runs, each once, in the order in which they were measured."""
    return ordered(getattr(evaluations, kind) for evaluations in found.values())


def ordered(dicts):
    """The keys of all dicts, each once: those of the first one first."""
    return list(dict.fromkeys(key for each in dicts for key in each))


def lines_of(found, kind, name, value):
    """{run: (tokens, values)} of a domain or a task; value(result) may be None or NaN: no point.

    The tokens of a tuned run begin at those of its base, if the base is on the page.
    """
    lines = {}
    for run, evaluations in found.items():
        tokens = []
        values = []
        for count, result in sorted(getattr(evaluations, kind).get(name, {}).items()):
            measured = value(result)
            if measured is not None and not math.isnan(measured):
                tokens.append(evaluations.before + count)
                values.append(measured)
        if tokens:
            lines[run] = (tokens, values)
    return lines
