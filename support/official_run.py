"""An official run's config.yaml in our keys, and what of it this code cannot go on with.

Official OLMo takes batch size, schedule, weight decay and clipping from the config at each start,
AdamW's betas and epsilon from optim.pt, and the place in the data from train.pt. Read:
olmo/config.py, olmo/train.py, olmo/optim.py, scripts/train.py at v0.2.5 and v0.6.0.
"""

import math
from typing import NamedTuple

from support.files import UserError
from support.official_state import read_optimizer
from support.yaml_text import read_yaml

# The keys of each block that decide what is learned, each with the texts with which official OLMo
# does as we do. None: the key is missing or null.
FIXED = {
    "": {"softmax_auxiliary_loss": ("false", None), "max_grad_norm_ratio": (None,),
         "reset_optimizer_state": ("false", None), "fast_forward_batches": (None, "0"),
         "module_outputs_save_steps": (None, [])},
    "model": {"attention_dropout": ("0.0", "0"), "residual_dropout": ("0.0", "0"),
              "embedding_dropout": ("0.0", "0")},
    "optimizer": {"name": ("adamw",), "decay_embeddings": ("false", None),
                  "no_decay_norm_and_bias": ("true", None), "selective_updates": ("false", None)},
    "scheduler": {"warmup_min_lr": (None,), "units": ("steps", "tokens", None)},
    "data": {"label_mask_paths": (None, []), "generate_attention_mask": ("false", None),
             "generate_doc_lengths": ("false", None), "instance_filter": (None,),
             "memmap_dtype": ("uint16", None), "custom_dataset": (None,)}}

# Keys that are read below, and keys that change neither a batch nor an update.
KNOWN = {
    "optimizer": {"learning_rate", "weight_decay", "betas", "eps", "decay_norm_and_bias",
                  "metrics_log_interval", "record_update_metrics"},
    "scheduler": {"name", "t_warmup", "t_max", "alpha_f", "grad_clip_warmup_steps",
                  "grad_clip_warmup_factor"},
    "data": {"paths", "datasets", "seed", "pad_direction", "num_workers", "drop_last",
             "pin_memory", "prefetch_factor", "persistent_workers", "timeout"}}

# Official schedule -> ours. A constant one is our linear decay from the peak to the peak.
SCHEDULES = {"linear_with_warmup": "linear", "cosine_with_warmup": "cosine",
             "constant_with_warmup": "linear", "constant": "linear"}

# Our keys that are taken from an official run, besides the shape of its network.
TAKEN = ["batch_size", "seed", "lr", "min_lr", "schedule", "warmup_steps", "decay_steps",
         "max_steps", "weight_decay", "beta1", "beta2", "eps", "grad_clip",
         "grad_clip_warmup_steps", "grad_clip_warmup_factor"]


class Theirs(NamedTuple):
    """The value that one of our keys must have, and what the official files say of it."""

    value: object
    said: str  # such as "global_train_batch_size: 4 in config.yaml"


# ---- config.yaml in our keys ---------------------------------------------------------------------

def official_settings(path):
    """{our key: Theirs} of an official checkpoint that is to be gone on with.

    Raises UserError that names, all at once, what this code does not do as official OLMo.
    """
    file = path / "config.yaml"
    yaml = read_yaml(file)
    blocks = {name: yaml.get(name) for name in ("model", *KNOWN)}
    for name, block in blocks.items():
        if not isinstance(block, dict):
            raise UserError(f"{file}: has no `{name}:` block; fetch the file again")
    check_can_go_on({"": yaml, **blocks}, file)
    try:
        found = {**batch_settings(yaml), **optimizer_settings(yaml, path),
                 **schedule_settings(yaml)}
        end, _, line = end_of_schedule(yaml)
        if end and not yaml["scheduler"]["name"].startswith("constant"):
            found["decay_steps"] = Theirs(end, line)
        return found
    except KeyError as error:
        raise UserError(f"{file}: {error.args[0]}: missing; fetch the file again") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{file}: cannot be understood ({error}); fetch the file again") from None


def check_can_go_on(blocks, file):
    """UserError that names each setting of which this code has no like."""
    faults = []
    for name, fixed in FIXED.items():
        block = blocks[name]
        prefix = f"{name}." * bool(name)
        faults += [f"{prefix}{key}: {block.get(key) or 'null'}, not {accepted[0] or 'null'}"
                   for key, accepted in fixed.items() if block.get(key) not in accepted]
        unknown = block.keys() - KNOWN.get(name, block.keys()) - fixed.keys()
        faults += [f"{prefix}{key} is unknown" for key in sorted(unknown)
                   if block[key] not in (None, "false", [])]
    schedule = blocks["scheduler"].get("name")
    if str(schedule) not in SCHEDULES:
        faults.append(f"scheduler.name: {schedule}, not one of {', '.join(SCHEDULES)}")
    if faults:
        raise UserError(f"{file}: this code cannot go on as official OLMo would "
                        f"({'; '.join(faults)}); correct a line that says what did not happen, or "
                        "begin with the weights alone: --fresh_optimizer")


def batch_settings(yaml):
    """What decides which instances a step sees. (The token files: support/official_place.py.)"""
    length = yaml["model"]["max_sequence_length"]
    batch_size = yaml["global_train_batch_size"]
    seed = yaml["data"].get("seed") or yaml["seed"]
    if int(seed) < 0:
        raise ValueError(f"seed: {seed}")
    return {"batch_size": Theirs(count(batch_size), said("global_train_batch_size", batch_size)),
            "max_seq_len": Theirs(count(length), said("model.max_sequence_length", length)),
            "seed": Theirs(int(seed), said("seed", seed))}


def optimizer_settings(yaml, path):
    """AdamW and the clipping."""
    decay = yaml["optimizer"]["weight_decay"]
    clip = yaml.get("max_grad_norm")
    found = {"weight_decay": Theirs(number(decay), said("optimizer.weight_decay", decay)),
             "grad_clip": Theirs(number(clip or 0), said("max_grad_norm", clip))}
    return {**found, **kind_of_adamw(read_optimizer(path))}


def kind_of_adamw(optimizer):
    """Betas and epsilon, which official OLMo takes from optim.pt."""
    try:
        [(beta1, beta2, eps)] = {(*map(number, group["betas"]), number(group["eps"]))
                                 for group in optimizer.groups}
        if any(group.get("amsgrad") or group.get("maximize") for group in optimizer.groups):
            raise ValueError("has amsgrad or maximize")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{optimizer.file}: betas or eps are missing, or differ between its groups "
                        f"of parameters, or it is another optimiser ({error}); begin with the "
                        "weights alone: --fresh_optimizer") from None
    file = optimizer.file.name
    return {"beta1": Theirs(beta1, f"beta: {beta1} in {file}"),
            "beta2": Theirs(beta2, f"beta: {beta2} in {file}"),
            "eps": Theirs(eps, f"eps: {eps} in {file}")}


def schedule_settings(yaml):
    """The learning rate and the warm-up of the clipping, in steps.

    # DIFFERS FROM OLMo: of a schedule in tokens that begins or ends within a step, the nearest step
    # is taken.
    """
    schedule = yaml["scheduler"]
    unit = tokens_of_step(yaml) if schedule.get("units") == "tokens" else 1
    name = schedule["name"]
    peak = number(yaml["optimizer"]["learning_rate"])
    # a key that is missing has official OLMo's default
    floor = number(schedule.get("alpha_f") or 0.1)
    warmup = schedule.get("t_warmup") or 100
    clip_factor = schedule.get("grad_clip_warmup_factor")
    clip_steps = schedule.get("grad_clip_warmup_steps") if clip_factor else None
    found = {
        "lr": Theirs(peak, said("optimizer.learning_rate", yaml["optimizer"]["learning_rate"])),
        "schedule": Theirs(SCHEDULES[name], said("scheduler.name", name)),
        "warmup_steps": Theirs(round(number(warmup) / unit), said("scheduler.t_warmup", warmup)),
        "min_lr": Theirs(peak * floor, said("scheduler.alpha_f", floor)),
        "grad_clip_warmup_steps": Theirs(int(number(clip_steps or 0) / unit),
                                         said("scheduler.grad_clip_warmup_steps", clip_steps))}
    if clip_steps:
        found["grad_clip_warmup_factor"] = Theirs(
            number(clip_factor), said("scheduler.grad_clip_warmup_factor", clip_factor))
    if name.startswith("constant"):
        found["min_lr"] = Theirs(peak, said("scheduler.name", name))
    if name == "constant":
        found["warmup_steps"] = Theirs(0, said("scheduler.name", name))
    return found


def tokens_of_step(yaml):
    return count(yaml["global_train_batch_size"]) * count(yaml["model"]["max_sequence_length"])


def count(text):
    """A whole number of 1 or more; ValueError for any other text."""
    if int(text) < 1:
        raise ValueError(f"{text} is no count")
    return int(text)


def number(text):
    """A finite number of 0 or more; ValueError for any other text."""
    if not 0 <= float(text) < math.inf:
        raise ValueError(f"{text} is no number of 0 or more")
    return float(text)


def said(key, value):
    """The line of config.yaml, for messages."""
    return f"{key}: {'null' if value is None else value} in config.yaml"


# ---- Where the schedule ends ---------------------------------------------------------------------

def end_of_schedule(yaml, steps_per_epoch=None):
    """Returns (step at which the decay ends, last step of the run, their line in config.yaml).

    Both are None where max_duration counts epochs and steps_per_epoch is not known yet.
    """
    schedule = yaml["scheduler"]
    per_step = tokens_of_step(yaml)
    unit = per_step if schedule.get("units") == "tokens" else 1
    duration = yaml["max_duration"]
    last = duration_in_steps(duration, per_step, steps_per_epoch)
    end = schedule.get("t_max")
    if end:
        if float(end) <= 0:
            raise ValueError(f"scheduler.t_max: {end}")
        return round(float(end) / unit), last, said("scheduler.t_max", end)
    if unit > 1 and duration.endswith("T"):  # the tokens themselves, not those of whole steps
        last_token = int(float(duration[:-1]))
        return round(last_token / unit), last, said("max_duration", duration)
    return last, last, said("max_duration", duration)


def duration_in_steps(duration, tokens_per_step, steps_per_epoch):
    """The steps of a max_duration: "1000", "2e12T" (tokens) or "1ep" (epochs, if known)."""
    if duration.endswith("T"):
        return int(number(duration[:-1])) // tokens_per_step
    if duration.endswith("ep"):
        epochs = count(duration[:-2])
        return steps_per_epoch and epochs * steps_per_epoch
    return int(number(duration))


# ---- Comparing -----------------------------------------------------------------------------------

def settings_to_go_on(path, given, place_of, shape):
    """{our key: value} of an official checkpoint's run, for the keys that nobody has set.

    given: {our key: what the command line or a config file sets, or None}. place_of(key): where it
    does, such as "FILE:1: ". shape: {key: value} of the weights. Raises UserError that names
    everything that is set to another value.
    """
    theirs = {key: Theirs(value, "the shape of the weights") for key, value in shape.items()}
    theirs |= official_settings(path)
    faults = [f"{place_of(key)}{key}={given[key]}, not {wanted.value} ({wanted.said})"
              for key, wanted in theirs.items()
              if given[key] is not None and not same(given[key], wanted.value)]
    if faults:
        raise UserError(f"start_from={path}: official OLMo would go on with other settings "
                        f"({'; '.join(faults)}); leave them out, as its values are taken, or begin "
                        "with the weights alone: --fresh_optimizer")
    taken = {key: wanted.value for key, wanted in theirs.items()}
    _, last, _ = end_of_schedule(read_yaml(path / "config.yaml"))
    return {**taken, "max_steps": last} if last else taken


def same(value, other):
    is_number = isinstance(value, int | float) and isinstance(other, int | float)
    return math.isclose(value, other, rel_tol=1e-9) if is_number else value == other
