"""With which data a run goes on, and with which tokenizer: before anything is built.

The weights have learned what each id of their tokenizer means. So whatever goes on from weights
keeps their tokenizer, also where `bpe:N` would train another one on the text as it is now.
"""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from configs import load_config
from corpus.lineage import data_of_run, text_behind
from corpus.source_files import is_there
from corpus.sources import check_outside
from corpus.stages import Stages, is_built_by_this_code
from corpus.storage import tokenizer_digest
from corpus.tokenizer import tokenizer_at, tokenizer_file
from data import DataConfig
from model import ModelConfig
from scaling.begin import check_files, is_whole_official, takes_step
from scaling.checkpoint import run_of, step_directories
from scaling.directory import check_directory, check_overwrite, forked_from
from scaling.same_run import check_before_build
from support.bars import prepared
from support.files import UserError, here, read_json
from support.official_place import check_place
from support.vocabulary import NAME_IT, open_tokenizer

BUILD_PATIENCE = timedelta(days=2)  # of the ranks that wait while rank 0 builds the data


def data_for_run(config, data_config, settings, free_keys, build_data):
    """On rank 0: build_data, with the tokenizer of what the run goes on from; returns the folder.

    Where that run's own data is there and cannot be built again, it returns its folder.

    settings: every key of the run; free_keys: see find_start in scaling/start.py. Raises UserError,
    before anything is built, for a run_dir or a start_from that cannot be used, or that holds
    another run.
    """
    check_directory(config.run_dir, config.overwrite)
    tokens = data_config.token_files
    if tokens and not Path(tokens).is_file() and data_config.sources != DataConfig().sources:
        raise UserError(f"token_files={tokens}{here(tokens)}: no such file, but "
                        "token_files replaces the sources; --token_files= reads them")
    if config.overwrite:
        check_overwrite(Path(config.run_dir), config.start_from)
    check_outside(config.run_dir, "run_dir", data_config.parse_sources())
    origin = origin_of(config)
    if origin is None:
        return prepared(build_data, data_config)
    home = run_of(origin)
    if not config.fresh_optimizer and is_whole_official(origin):
        check_place(origin, settings)
    is_step = (origin / "state.json").is_file()
    likely_step = origin if is_step else next(reversed(step_directories(origin)), None)
    if likely_step:
        check_before_build(likely_step, config, settings, free_keys)
    folder = data_already_built(home, data_config, config.accept_changes)
    if folder:
        return folder
    # a step that is taken whole brings its data, which is compared later
    if config.start_from and origin == Path(config.start_from) and not takes_step(config):
        check_named(home, data_config.tokenizer, settings)
    return prepared(build_data, with_tokenizer_of(home, data_config))


def origin_of(config):
    """What holds the weights from which the run of `config` goes on; None for a new one.

    Its own run, the run or step that it is a fork of, or the step that start_from names.
    """
    run = Path(config.run_dir)
    if step_directories(run) and not config.overwrite:
        return run
    if not config.start_from or forked_from(config):
        return forked_from(config)
    start = Path(config.start_from)
    if takes_step(config):
        check_start_from(start, config.max_steps)
    else:
        check_files(start)
    return start


def check_start_from(start, max_steps):
    """UserError unless the step `start` is before max_steps."""
    step = read_json(start / "state.json").get("step", 0)
    if step >= max_steps:
        raise UserError(f"max_steps={max_steps}: start_from={start} has taken {step} steps "
                        "already, and max_steps counts them too; raise it")


def data_already_built(home, data_config, accept_changes):
    """The built data of the run `home`, if build_data could not find it or make it; else None.

    That is so where its text is gone, where that is the library of another Python, and where our
    code has changed since. Other settings and changed text are left to build_data; with
    accept_changes, so are this Python's library and today's code.
    """
    if not all((home / name).is_file() for name in ("config.json", "manifest.json")):
        return None  # such as a step that was copied alone
    [before] = load_config([str(home / "config.json")], DataConfig)
    same_place = dict(data_dir=before.data_dir, workers=before.workers)
    if data_config.token_files or replace(data_config, **same_place) != before:
        return None
    try:
        folder = data_of_run(home, data_config)
    except UserError:
        gone = [source.path for source in data_config.parse_sources()
                if source.path != "stdlib" and not is_there(source.path)]
        if gone:
            raise UserError(f"{home}: the data on which it was trained is not in "
                            f"{data_config.data_dir}{here(data_config.data_dir)}, and its text is "
                            f"gone: {', '.join(gone)}; restore one of them, or name where the data "
                            "is now: --data_dir=PATH") from None
        return None  # build_data builds it again
    settings = read_json(folder / "manifest.json").get("settings", {})
    if "clean" not in settings:  # an old manifest does not name its text
        return None
    gone, libraries, changed = text_behind(settings, data_config)
    if changed:
        print(f"data: {', '.join(changed)}: not the text on which {home} was trained")
        return None
    why = [f"{path}: not here" for path in gone]
    if not accept_changes:
        why += [f"the library of {python}: not here" for python in libraries]
        why += ["built by other code"] * (not is_built_by_this_code(settings))
    if not why:
        return None
    print(f"data: {folder}, on which {home} was trained; {'; '.join(why)}")
    return folder


def with_tokenizer_of(home, data_config):
    """`data_config` with the tokenizer of `home` in place of one that would be trained.

    home: a run, or a directory from elsewhere. UserError if the config names the file of another
    tokenizer, or one that is not there. A run that goes on may have lost the file that it names.
    """
    file = home / "tokenizer.json"
    name = data_config.tokenizer
    if not file.is_file():  # of a run, check_tokenizer decides, by the digest in its state.json
        return data_config
    kept = tokenizer_digest(file)
    if name.startswith("bpe:"):
        stages = Stages(data_config)  # was it trained on this very text? then nothing is built
        same = stages.are_done() and tokenizer_digest(stages.folder / "tokenizer.json") == kept
    else:
        is_here = name_is_file(name)
        if not is_here and name not in ("olmo", name_saved(home)):
            raise UserError(f"tokenizer={name}: no such file{here(name)}; leave it out: {file} "
                            "is used")
        same = is_here and tokenizer_digest(tokenizer_file(name)) == kept
        if is_here and not same and not have_same_ids(file, tokenizer_file(name)):
            raise UserError(f"tokenizer={name}: not that of {home}, whose weights have learned "
                            f"other ids; leave it out, so that {file} is used, or begin a new run")
    if same:
        return data_config
    print(f"tokenizer: {file} is kept, in place of tokenizer={name}")
    return replace(data_config, tokenizer=str(file))


def check_named(home, name, settings):
    """UserError unless a config names the tokenizer of weights that have no tokenizer.json."""
    if (home / "tokenizer.json").is_file():
        return
    if name.startswith("bpe:"):
        raise UserError(f"{home}: has no tokenizer.json, and its weights have learned one; "
                        f"{NAME_IT}")
    keys = ModelConfig.__dataclass_fields__
    open_tokenizer(tokenizer_file(name), ModelConfig(**{key: settings[key] for key in keys}),
                   NAME_IT)


def have_same_ids(file, other):
    """Whether two files of tokenizers, which transformers may have written anew, give equal ids."""
    one, two = tokenizer_at(file), tokenizer_at(other)
    return all(getattr(one, part) == getattr(two, part)
               for part in ("token_bytes", "specials", "markers", "raw_markers"))


def name_saved(home):
    """The `tokenizer` in the settings of the run `home`, whose file may be gone; else None."""
    file = home / "config.json"
    return read_json(file).get("tokenizer") if file.is_file() else None


def name_is_file(name):
    """True if the tokenizer that a config names is here."""
    try:
        return tokenizer_file(name).is_file()
    except UserError:
        return False
