"""Whether our loop goes on where official OLMo stopped: token files, place in them, last step.

Here the place follows from the step alone (data.Batches). Official OLMo saves it, in train.pt.
"""

from corpus.storage import token_dtype
from corpus.token_files import listed_token_files
from support.files import UserError
from support.official_run import end_of_schedule, said
from support.official_state import read_progress
from support.text import counted
from support.yaml_text import read_yaml


def check_place(path, settings):
    """UserError unless our loop, with the token files, goes on where official OLMo stopped.

    settings: every key of our run. All that differs is named at once.
    # DIFFERS FROM OLMo: before v0.4.0 it began the epoch after a restart as far in as it restarted.
    """
    yaml = read_yaml(path / "config.yaml")
    progress = read_progress(path)
    faults = faults_of_files(yaml, settings)
    instances = instances_of(settings)
    per_epoch = instances // settings["batch_size"]
    if not faults and not per_epoch:
        faults.append(f"token_files={settings['token_files']} has less than one batch")
    if not faults:
        faults += faults_of_length(path, progress, instances)
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


def order_file(path):
    """Where official OLMo keeps the order of an epoch's instances, beside its checkpoints."""
    return path.parent / "train_data" / "global_indices.npy"


def faults_of_length(path, progress, instances):
    """What differs in the number of instances: a token file that is cut off would move them all.

    Only that order tells it. Its length is a multiple of the ranks, so it may differ by some.
    """
    file = order_file(path)
    if not file.is_file():
        return []
    there = file.stat().st_size // 4  # each is a uint32
    dropped = instances // progress.ranks * progress.ranks
    padded = -(-instances // progress.ranks) * progress.ranks
    if there in (dropped, padded):
        return []
    return [f"{file} lists {there:,} sequences, and the token files hold {instances:,}: compare "
            "their sizes"]


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
    tokens = progress.step * batch_size * settings["max_seq_len"]
    if progress.tokens != tokens:  # the schedule may count them
        return [f"train.pt: after step {progress.step:,} it had seen {progress.tokens:,} tokens, "
                f"and {tokens:,} are so many steps of this batch size and length"]
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
    if not all(isinstance(path, str) for path in theirs):
        return ["data.paths in config.yaml is no list of paths"]
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
    datasets = data.get("datasets") or {}
    if data.get("paths") or not isinstance(datasets, dict):
        datasets = {"": data.get("paths")}
    lists = [datasets[label] for label in sorted(datasets)]
    return [path for each in lists for path in (each if isinstance(each, list) else [None])]


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


def notes(path, settings):
    """What could not be compared with an official run, or is not the same here; a line each."""
    yaml = read_yaml(path / "config.yaml")
    compared = "names and order" if order_file(path).is_file() else (
        "names and order: cut-off files would not be seen without train_data/global_indices.npy of "
        "that run beside the checkpoint")
    found = [f"what the token files hold could not be compared, only their {compared}"]
    if "distributed_strategy" in yaml:  # a key since v0.4.0
        found.append("its code, OLMo 0.4 or later, divides the loss by the tokens of a sequence, "
                     f"{settings['max_seq_len']:,}, and this code by one less, its targets: "
                     "gradients are that much larger here")
    if yaml.get("precision") not in ("fp32", None):
        found.append(f"precision: {yaml['precision']} there, and --dtype={settings['dtype']} here")
    return found
