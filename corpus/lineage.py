"""The data behind a run: where it is, and what the weights saw before this run."""

import sys
from pathlib import Path

from corpus.inputs import input_digests, inputs_of, is_same_text
from corpus.source_files import is_there
from support.files import UserError, here, log_rows, read_json
from support.text import counted


def data_of_run(run, config, sha256=None):
    """The folder of built data that holds what a run was trained on; raw sources are not needed.

    Found by its content's hash: data that was built again by other code has another folder.
    sha256: that hash, for data that the run has changed since.
    """
    expected = sha256 or read_json(run / "manifest.json")["sha256"]
    for manifest in sorted(Path(config.data_dir).glob("*/manifest.json")):
        if read_json(manifest)["sha256"] == expected:
            return manifest.parent
    place = f"{config.data_dir}{here(config.data_dir)}"
    raise UserError(f"{place}: does not hold the data that {run} was trained on; restore "
                    f"it, or, if its sources have not changed, build it again: python data.py "
                    f"{run / 'config.json'} --tokenizer={run / 'tokenizer.json'} ; or "
                    f"note the folder where it is now: python train.py --resume={run} "
                    "--data_dir=PATH (trace, find and eval.py take --data_dir=PATH too)")


def text_behind(settings, config):
    """Compare the text that built data of `config` was made of with the text that is here now.

    settings: of the data's manifest. Returns three lists without doubles: paths that are gone,
    other Pythons whose library the embedded sources were, names of sources and evaluation sets
    whose text has changed.
    """
    gone, libraries, changed = {}, {}, {}
    inputs = []
    for source in config.parse_sources():
        inputs += inputs_of(source, settings["clean"][source.name])
    for name, path, known in inputs:
        if path == "stdlib":
            if known != sys.version:
                libraries[f"Python {known.split()[0]}"] = True
        elif not is_there(path):
            gone[path] = True
        elif not is_same_text(path, known, config.data_dir):
            changed[name] = True
    return list(gone), list(libraries), list(changed)


def changed_texts(run, data_dir):
    """[a sentence for each source or evaluation set whose text is not that of the run's data].

    It names the first file that differs. data_dir: where the digests of files are remembered.
    """
    manifest = read_json(run / "manifest.json")
    said = []
    settings = manifest.get("settings", {}).get("clean", {})  # {}: an old manifest names no text
    for name, clean in settings.items():
        source = manifest["sources"][name]
        inputs = (name, source["path"], clean["inputs"])
        for label, path, known in (inputs, *clean.get("decontaminate", ())):
            difference = difference_of(path, known, data_dir)
            if difference:
                said.append(f"{label}: {difference}")
    return list(dict.fromkeys(said))


def difference_of(path, known, data_dir):
    """How the files at `path` differ from those `known`, in name or digest; "" if they do not."""
    if path == "stdlib":
        is_same = known == sys.version
        return "" if is_same else f"built from the library of Python {known.split()[0]}"
    if not is_there(path):
        return f"{path} is gone"
    if known and len(known[0]) == 3:  # of old data: (path, size, time) and no digest
        return ""
    before = {name: digest for name, *_, digest in known}
    now = dict(input_digests(path, data_dir))
    names = sorted(name for name in before | now if before.get(name) != now.get(name))
    if not names:
        return ""
    first = names[0]
    what = "has changed" if first in before else "is new"
    others = f" (and {counted(len(names) - 1, 'other file')})" if names[1:] else ""
    return f"{first} {what if first in now else 'is gone'}{others}"


def order_at(run, step):
    """Returns (order, first step): what a step's batch was drawn from, and since which step.

    order: data_sha256, seq_len, batch_size and seed. --accept_changes may have changed them.
    """
    manifest = read_json(run / "manifest.json")
    settings = read_json(run / "config.json")
    first = 1
    for before in manifest.get("before", []):
        if step <= before["until_step"]:
            return before, first
        first = before["until_step"] + 1
    return {"data_sha256": manifest["sha256"], "seq_len": settings["max_seq_len"],
            "batch_size": settings["batch_size"], "seed": settings["seed"]}, first


def ranks_at(run, step):
    """How many ranks took a step, as the log says: its first row from that step on, or its
    last one; 1 without a log."""
    ranks = 1
    for row in log_rows(run):
        if type(row.get("world_size")) is int:
            ranks = row["world_size"]
            if row["step"] >= step:
                break
    return ranks


def manifests_behind(run, state):
    """Yield the manifests of all data behind a step's weights: of its run, and of those before it.

    state: the content of the step's state.json. Raises UserError where the data is not known.
    """
    seen = set()
    while True:
        if not state or not (run / "manifest.json").is_file():
            raise UserError(f"{run} has no manifest of its training data")
        if "method" in state["config"]:
            raise UserError(f"{run} was tuned, and what it was tuned on was not searched")
        manifest = read_json(run / "manifest.json")
        if state["data"]["data_sha256"] != manifest["sha256"] or state.get("earlier_data"):
            raise UserError(f"the data of {run} changed during the run (--accept_changes)")
        yield manifest
        # a run that started from another one's weights has also seen that one's data
        start = start_of(state)
        if not start or start in seen:  # a circle of runs, which only an edited file can make
            return
        seen.add(start)
        run = start.parent
        state = read_json(start / "state.json")


def start_of(state):
    """The step directory from whose weights a run started; None for a new one.

    state: of a step of that run. Raises UserError where nobody knows what those weights have seen.
    """
    began = state.get("began")
    if began:  # with the weights alone
        start = Path(began["weights"])
        if not (start / "state.json").is_file():
            raise UserError(f"what the weights of {start}, with which it began, were trained on is "
                            "not known")
        if read_json(start / "state.json").get("sha256") != began["sha256"]:
            raise UserError(f"{start} is not what it was when the run began with its weights")
        return start
    start = state["config"].get("start_from")
    if not start:
        return None
    if read_json(Path(start) / "state.json")["step"] >= state["step"]:
        raise UserError(f"{start} is not what a run at step {state['step']} can have started from")
    return Path(start)
