"""An official run's config.yaml in our keys, and what of it this code cannot go on with.

Official OLMo takes batch size, schedule, weight decay and clipping from the config at each start,
AdamW's betas and epsilon from optim.pt, and the place in the data from train.pt. Read:
olmo/config.py, olmo/train.py, olmo/optim.py, scripts/train.py at v0.2.5 and v0.6.0.
"""

import math
from typing import NamedTuple

from corpus.storage import token_dtype
from corpus.token_files import listed_token_files
from support.files import UserError
from support.official_state import read_optimizer, read_progress
from support.text import counted
from support.yaml_text import read_yaml

# The keys of each block that decide what is learned, each with the texts with which official OLMo
# does as we do. None: the key is missing or null.
FIXED = {
    "": {"softmax_auxiliary_loss": ("false", None), "max_grad_norm_ratio": (None,),
         "reset_optimizer_state": ("false", None), "module_outputs_save_steps": (None, [])},
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
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{file}: cannot be understood ({error}); fetch the file again") from None


def check_can_go_on(blocks, file):
    """UserError that names each setting of which this code has no like."""
    faults = []
    for name, fixed in FIXED.items():
        block = blocks[name]
        prefix = f"{name}." * bool(name)
        faults += [f"{prefix}{key}: {block.get(key)}, not {accepted[0]}"
                   for key, accepted in fixed.items() if block.get(key) not in accepted]
        unknown = block.keys() - KNOWN.get(name, block.keys()) - fixed.keys()
        faults += [f"{prefix}{key} is unknown" for key in sorted(unknown)
                   if block[key] not in (None, "false", [])]
    schedule = blocks["scheduler"].get("name")
    if schedule not in SCHEDULES:
        faults.append(f"scheduler.name: {schedule}, not one of {', '.join(SCHEDULES)}")
    if faults:
        raise UserError(f"{file}: this code cannot go on as official OLMo would "
                        f"({'; '.join(faults)}); correct a line that says what did not happen, or "
                        "begin with the weights alone: --fresh_optimizer")


def batch_settings(yaml):
    """What decides which instances a step sees. (The names of the files: check_token_files.)"""
    length = yaml["model"]["max_sequence_length"]
    batch_size = yaml["global_train_batch_size"]
    seed = yaml["data"].get("seed") or yaml["seed"]
    return {"batch_size": Theirs(count(batch_size), said("global_train_batch_size", batch_size)),
            "max_seq_len": Theirs(count(length), said("model.max_sequence_length", length)),
            "seed": Theirs(int(seed), said("seed", seed))}


def optimizer_settings(yaml, path):
    """AdamW and the clipping."""
    decay = yaml["optimizer"]["weight_decay"]
    clip = yaml.get("max_grad_norm")
    found = {"weight_decay": Theirs(number(decay), said("optimizer.weight_decay", decay)),
             "grad_clip": Theirs(number(clip or 0), said("max_grad_norm", clip))}
    optimizer = read_optimizer(path)
    kinds = {(*group["betas"], group["eps"]) for group in optimizer.groups}
    if len(kinds) != 1 or any(group.get("amsgrad") or group.get("maximize")
                              for group in optimizer.groups):
        raise UserError(f"{optimizer.file}: its groups of parameters differ in betas or eps, or "
                        "have amsgrad or maximize; begin with the weights alone: --fresh_optimizer")
    for key, value in zip(("beta1", "beta2", "eps"), *kinds, strict=True):
        found[key] = Theirs(number(value), f"{key.rstrip('12')}: {value} in {optimizer.file.name}")
    return found


def schedule_settings(yaml):
    """The learning rate and the warm-up of the clipping, in steps.

    Counted in tokens, a schedule may begin or end within a step: the nearest step is taken.
    """
    schedule = yaml["scheduler"]
    unit = 1
    if schedule.get("units") == "tokens":
        unit = count(yaml["global_train_batch_size"]) * count(yaml["model"]["max_sequence_length"])
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
    per_step = count(yaml["global_train_batch_size"]) * count(yaml["model"]["max_sequence_length"])
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
        return int(float(duration[:-1])) // tokens_per_step
    if duration.endswith("ep"):
        return steps_per_epoch and int(duration[:-2]) * steps_per_epoch
    return int(float(duration))


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


def check_place(path, settings):
    """UserError unless our loop, with the token files, goes on where official OLMo stopped.

    settings: every key of our run. All that differs is named at once.
    """
    yaml = read_yaml(path / "config.yaml")
    progress = read_progress(path)
    faults = faults_of_files(yaml, settings)
    per_epoch = instances_of(settings) // settings["batch_size"]
    if not faults and not per_epoch:
        faults.append(f"token_files={settings['token_files']} has less than one batch")
    if not faults:
        faults += faults_of_position(progress, settings, per_epoch)
        faults += faults_of_end(yaml, settings, per_epoch)
    if settings["max_steps"] <= progress.step:
        faults.append(f"max_steps={settings['max_steps']}, and it is at step {progress.step:,} "
                      "already; max_steps counts from the first step of that run")
    if faults:
        raise UserError(f"start_from={path}: official OLMo would go on differently "
                        f"({'; '.join(faults)}); correct that, or begin with the weights alone: "
                        "--fresh_optimizer")


def instances_of(settings):
    """How many sequences the listed token files have; 0 without a list."""
    if not settings["token_files"]:
        return 0
    bytes_each = settings["max_seq_len"] * token_dtype(settings["vocab_size"]).itemsize
    paths = listed_token_files(settings["token_files"])
    return sum(path.stat().st_size // bytes_each for path in paths)


def faults_of_end(yaml, settings, per_epoch):
    """What differs in the last step, and in the step at which the learning rate has fallen."""
    end, last, line = end_of_schedule(yaml, per_epoch)
    now = settings["decay_steps"] or settings["max_steps"]
    faults = []
    if now != end and not yaml["scheduler"]["name"].startswith("constant"):
        faults.append(f"the learning rate falls until step {now:,} here, and there until step "
                      f"{end:,} ({line}): --decay_steps={end}")
    if settings["max_steps"] > last:
        duration = said("max_duration", yaml["max_duration"])
        faults.append(f"max_steps={settings['max_steps']}, and that run ends at step {last:,} "
                      f"({duration}): --max_steps={last}")
    return faults


def faults_of_position(progress, settings, per_epoch):
    """What differs between the place in the data in train.pt and ours, which follows from the step.

    The last step of an epoch may be saved as the end of that epoch or as the start of the next.
    """
    batch_size = settings["batch_size"]
    seen = progress.epoch * per_epoch * batch_size + progress.examples
    if seen == progress.step * batch_size and progress.examples <= per_epoch * batch_size:
        return []
    epoch, steps = divmod(progress.step, per_epoch)
    return [f"train.pt: after step {progress.step:,} it stood at example {progress.examples:,} of "
            f"epoch {progress.epoch}; with these token files an epoch has "
            f"{counted(per_epoch, 'step')}, so that it would stand at example "
            f"{steps * batch_size:,} of epoch {epoch}"]


def faults_of_files(yaml, settings):
    """What differs between the token files' names in config.yaml and in our list, in their order.

    They lie elsewhere now, so that names are compared: the last part where all are distinct, else
    the path below the folder that holds them all.
    """
    theirs = official_paths(yaml["data"])
    if not settings["token_files"]:
        return ["token_files is empty, and config.yaml reads "
                f"{counted(len(theirs), 'token file')}: --token_files=LIST names them"]
    ours = list(map(str, listed_token_files(settings["token_files"])))
    place = f"token_files={settings['token_files']}"
    if len(ours) != len(theirs):
        return [f"{place} names {counted(len(ours), 'file')}, and config.yaml {len(theirs)}"]
    for number, (our, their) in enumerate(zip(short_names(ours), short_names(theirs), strict=True)):
        if our != their:
            return [f"{place}: file {number + 1} is {our}, and {their} in config.yaml"]
    return []


def official_paths(data):
    """The token files of an official run, in their order."""
    if data.get("paths"):
        return data["paths"]
    datasets = data.get("datasets") or {}
    return [path for label in sorted(datasets) for path in datasets[label]]


def short_names(paths):
    """What is compared of each path."""
    names = [path.rpartition("/")[2] for path in paths]
    if len(set(names)) == len(names):
        return names
    parts = [path.split("/") for path in paths]
    shared = 0
    while shared < min(map(len, parts)) - 1 and len({each[shared] for each in parts}) == 1:
        shared += 1
    return ["/".join(each[shared:]) for each in parts]
