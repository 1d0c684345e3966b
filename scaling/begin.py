"""What a new run begins with: the directory that `start_from` names, and the shape of its network.

    RUN/step000500                        whole: weights, optimiser, place in the data (an anneal)
    RUN, RUN/step... --fresh_optimizer    the weights alone: a new run from step 1 on
    a Hugging Face directory              the same, --fresh_optimizer is implied
    an official OLMo checkpoint           whole, if optim.pt and train.pt are there; else the same

The shape lies under the config files, so that a config need not say it, and one that says another
is an error. Here no weight is read until Run.load does it. Of a run that begins with new weights,
what follows from the tokenizer lies there: vocab_size, embedding_size, eos_token_id, pad_token_id.
"""

from dataclasses import field, fields, make_dataclass, replace
from functools import partial
from pathlib import Path

from configs import fields_of, load_config
from corpus.stdlib import stdlib_documents
from corpus.tokenizer import tokenizer_file
from data import DataConfig
from model import ModelConfig
from scaling.checkpoint import load_checkpoint, run_of, step_directories
from scaling.directory import last_value
from scaling.ranks import launched
from support.config_text import read_assignments
from support.files import UserError, here, read_json
from support.models import Base, fill_weights
from support.official_place import notes
from support.official_run import TAKEN, settings_to_go_on
from support.official_state import fill_optimizer, has_training_state
from support.run_hints import hub_remedy
from support.vocabulary import IDS, ids_of_tokenizer
from support.weights import (check_weights, find_step, is_ours, kind_of, read_model_config,
                             step_config)

KINDS = {"run": "a step of ours", "hf": "a Hugging Face directory",
         "official": "an official checkpoint"}
SHAPE = [each.name for each in fields(ModelConfig)]


# ---- The shape -----------------------------------------------------------------------------------

def settings_of_start(argv, schemas):
    """{key: value} that lies under the config files: what follows from start_from and tokenizer.

    schemas: all of train.py's. Raises UserError for a key that says another shape.
    """
    if {"-h", "--help"} & set(argv):
        return {}
    given = settings_given(argv, schemas)
    run = run_of_config(given, schemas)
    found = settings_under(argv, given, run)
    if given.tokenizer is None:
        given = replace(given, tokenizer=fields_of(schemas)["tokenizer"].default)
    return {**ids_under(argv, given, run, found), **found}


def data_settings_of_start(argv, schemas):
    """The same for data.py: the tokenizer of start_from, or with --resume=RUN all settings of RUN.

    Raises UserError if the command line does not say what to read.
    """
    if {"-h", "--help"} & set(argv):
        return {}
    given = settings_given(argv, schemas)
    if given.tokenizer and (given.tokenizer[:4] == "bpe:" or given.tokenizer.isdecimal()):
        ids_of_tokenizer(given.tokenizer)  # a UserError now, not after the text is cleaned
    if given.resume:
        settings = data_settings_of_run(given.resume)
        for key, value in vars(given).items():
            if value is not None:
                settings[key] = value
        return settings
    has_config = not all(word.startswith("-") for word in argv)
    if not has_config and given.sources is None and given.token_files is None:
        raise UserError("name a config file (python data.py configs/tiny.py), --resume=RUN or "
                        "--sources")
    found = settings_under(argv, given, run_of_config(given, schemas))
    return {key: found[key] for key in ("tokenizer", "start_from") if key in found}


def data_settings_of_run(path):
    """{key: value} of DataConfig of a run, or of a run's step."""
    home = run_of(path)
    if not (home / "config.json").is_file():
        raise UserError(f"--resume={path}{here(home)}: no run there")
    [config] = load_config([str(home / "config.json")], DataConfig)
    return dict(vars(config))


def say_other_data(argv, folder):
    """A line if data.py --resume=RUN has built other data than RUN was trained on."""
    resume = last_value(argv, "--resume=")
    if not resume:
        return
    home = run_of(resume)
    trained = home / "manifest.json"
    built = read_json(folder / "manifest.json")
    if trained.is_file() and read_json(trained)["sha256"] != built["sha256"]:
        print(f"warning: {folder}: not the data on which {home} was trained, as the text, the "
              "settings or the code has changed since")


def settings_under(argv, given, run):
    """{key: value}: shape and tokenizer of the weights that start_from names; {} without them.

    For an official run that is gone on with, also its batch size, schedule and optimiser. A run
    that has begun has them in its own config.json, so that what it began with may be gone.
    """
    if not given.start_from:
        if given.fresh_optimizer:
            raise no_start(argv, run)
        return {}
    if step_directories(run) and not given.overwrite:
        return settings_of_run(run)
    if given.resume and Path(given.resume).resolve() != run.resolve():  # a fork
        return {}  # the config of the other run says all
    comes_later = given.plan or hasattr(given, "show")  # data.py and --plan may come before it
    if comes_later and given.d_model is not None and not Path(given.start_from).exists():
        return {}
    return settings_of_weights(argv, given)


def ids_under(argv, given, run, found):
    """{key: value} of what follows from the tokenizer, and is neither given nor found; printed.

    found: what settings_under returned. A run that has begun keeps its own values.
    """
    keys = [key for key in IDS if key not in found]
    for key in keys:
        value = getattr(given, key)
        least = 1 if key in ("vocab_size", "embedding_size") else 0
        if value is not None and value < least:
            raise UserError(f"{place_of(key, argv)}{key}={value}: leave it out; it follows from "
                            "the tokenizer")
    keys = [key for key in keys if getattr(given, key) is None]
    if not keys:
        return {}
    if step_directories(run) and not given.overwrite and (run / "config.json").is_file():
        before = read_json(run / "config.json")
        return {key: before[key] for key in keys if key in before}
    name = found.get("tokenizer", given.tokenizer)
    follow = ids_of_tokenizer(name)
    if given.vocab_size not in (None, follow["vocab_size"]):
        raise UserError(f"{place_of('vocab_size', argv)}vocab_size={given.vocab_size}: tokenizer="
                        f"{name} has {follow['vocab_size']} ids; leave it out, and choose the "
                        "tokenizer: --tokenizer=bpe:N has N ids")
    ids = {key: follow[key] for key in keys}
    if launched().rank == 0:
        values = ", ".join(f"{key}={value}" for key, value in ids.items())
        print(f"from tokenizer={name}: {values}")
    return ids


def settings_of_weights(argv, given):
    """settings_of_start for a new run; given: what settings_given returns."""
    start = given.start_from
    shape, weights_alone = read_start(given)
    file = run_of(start) / "tokenizer.json"
    tokenizer = {"tokenizer": str(file), "start_from": start} if file.is_file() else {}
    if not weights_alone and not is_ours(Path(start)):
        place = partial(place_of, argv=argv)
        return {**settings_to_go_on(Path(start), vars(given), place, shape), **tokenizer}
    check_shape(argv, given, shape)
    if not weights_alone:
        return shape
    return {**shape, **tokenizer, "fresh_optimizer": True}


def settings_given(argv, schemas):
    """An object with every key of the schemas: what the command line sets, else None."""
    keys = []
    for name, each in fields_of(schemas).items():
        unset = field(default=None, metadata=each.metadata | {"default": each.default})
        keys.append((name, each.type, unset))
    [given] = load_config(argv, make_dataclass("Given", keys))
    for name, entry in (given.sources or {}).items():
        is_embedded = "stdlib" in (entry, isinstance(entry, dict) and entry.get("path"))
        if is_embedded and name not in ("reference", "docstrings", "code"):
            next(stdlib_documents(name))  # its UserError now, not after seconds of reading
    return given


def run_of_config(given, schemas):
    """The run's directory: what the command line sets, else the default."""
    return Path(given.run_dir or fields_of(schemas)["run_dir"].default)


def no_start(argv, run):
    """The UserError about a config that begins with weights, when nobody says whose."""
    files = [word for word in argv if not word.startswith("-")]
    config = files[0] if files else "CONFIG"
    goes_on = ""
    if step_directories(run):
        goes_on = f"; --resume={run} continues the run that is there"
    return UserError("start_from: missing, and fresh_optimizer is for a run that begins with "
                     "somebody's weights; name a run or a Hugging Face directory: python train.py "
                     f"{config} --start_from=OLMo-1B-hf{goes_on}")


def settings_of_run(run):
    """What settings_of_start gave when the run began, as its config.json has it."""
    if not (run / "config.json").is_file():
        return {}
    saved = read_json(run / "config.json")
    if not saved.get("start_from"):
        return {}
    keys = [*SHAPE, "tokenizer", "start_from", "fresh_optimizer"]
    manifest = run / "manifest.json"
    began = read_json(manifest).get("began", {}) if manifest.is_file() else {}
    if "official_step" in began:
        keys += TAKEN
    return {key: saved[key] for key in keys if key in saved}


def read_start(given):
    """Returns ({key: value} of the shape, whether weights alone are taken) of given.start_from."""
    start = Path(given.start_from)
    try:
        if not (start.exists() or step_directories(start.parent)):
            remedy = hub_remedy(start) or "name a run, a step of one, or another model's directory"
            raise UserError(f"no such directory; {remedy}")
        run_of(start)  # a UserError for a file, and for a step that is gone
        if is_ours(start):
            return read_own(start, given.fresh_optimizer)
        shape = read_model_config(start, named_tokenizer(start, given.tokenizer))
        return vars(shape), given.fresh_optimizer or not is_whole_official(start)
    except UserError as error:
        raise UserError(f"start_from={start}{here(start)}: {error}") from None


def read_own(start, fresh_optimizer):
    """What read_start returns, for a run of ours or one of its steps."""
    step, state = find_step(start, digests=False)
    if not fresh_optimizer and step != start:
        raise UserError(f"a run; name one of its steps, such as {step}, to go on with its "
                        "optimiser and its data, or add --fresh_optimizer, to begin with the "
                        "weights of its newest step alone")
    return vars(step_config(state, step)), bool(fresh_optimizer)


def named_tokenizer(start, name):
    """The tokenizer.json that a config names for a directory that has none; else None."""
    if (start / "tokenizer.json").is_file() or not name or name.startswith("bpe:"):
        return None
    return tokenizer_file(name)


def check_shape(argv, given, shape):
    """UserError for a key of the command line that says another shape than the weights have.

    max_seq_len may differ, as RoPE has no table of positions that would end.
    """
    start = given.start_from
    for key, there in shape.items():
        now = getattr(given, key)
        if now is None or now == there:
            continue
        place = place_of(key, argv)
        if key != "max_seq_len":
            raise UserError(f"{place}{key}={now}: the weights of start_from={start} have "
                            f"{key}={there}; leave it out, as the shape comes from there")
        if launched().rank == 0:
            print(f"{place}max_seq_len={now}: not {there}, with which {start} was trained; RoPE "
                  "has no longest context, but the weights have learned none above theirs")


def place_of(key, argv):
    """Where a command line sets a key: "--" or "FILE:LINE: "."""
    if any(word.partition("=")[0] == f"--{key}" for word in argv):
        return "--"
    files = [word for word in argv if not word.startswith("-")]
    for word in reversed(files):
        if word.endswith(".json") and key in read_json(word):
            return f"{word}: "
        if not word.endswith(".json"):
            lines = [line for line, name, _ in read_assignments(Path(word)) if name == key]
            if lines:
                return f"{word}:{lines[-1]}: "
    return ""


# ---- Before the data is built --------------------------------------------------------------------

def takes_step(config):
    """True if the new run of `config` takes a step of ours whole."""
    return (Path(config.start_from) / "state.json").is_file() and not config.fresh_optimizer


def is_whole_official(start):
    """True for an official checkpoint with the state of its training beside the weights."""
    is_described = (start / "config.yaml").is_file() and not is_ours(start)
    return is_described and kind_of(start) == "official" and has_training_state(start)


def check_files(start):
    """UserError if the weights of a directory from elsewhere do not fit its configuration."""
    if not is_ours(start):
        check_weights(start, read_model_config(start))


# ---- The weights ---------------------------------------------------------------------------------

def load_start(run, model, optimizer):
    """Fill a model with what `run` begins from; where that is a step whole, the optimiser too."""
    start = run.checkpoint
    if not isinstance(start, Base):
        load_checkpoint(start, model, optimizer)
        print(f"{run.path}: continues after step {run.step}")
        return
    fill_weights(model, start)
    if "official_step" in run.state["began"]:
        fill_optimizer(start.weights, model, optimizer)
        print(f"{run.path}: goes on after step {run.step} of the official run in {start.weights}: "
              "weights, AdamW's moments, place in the data, settings")
        for note in notes(start.weights, run.settings):
            print(f"  {note}")
        return
    lacks = " without optim.pt and train.pt" * (start.kind == "official"
                                                and not has_training_state(start.weights))
    print(f"{run.path}: begins at step 1 with the weights of {start.weights}, "
          f"{KINDS[start.kind]}{lacks}; the optimiser is new, and the data begins at its start")
