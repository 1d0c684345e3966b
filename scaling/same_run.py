"""Is it the same run? What must not differ between a saved run and what goes on from it.

Settings and data may differ only with --accept_changes. The shape of the weights, the tokenizer
whose ids they have learned and what the run began with may not differ at all.
"""

from dataclasses import fields
from pathlib import Path

from corpus.lineage import changed_texts
from corpus.storage import tokenizer_digest
from model import ModelConfig
from scaling.checkpoint import run_of
from scaling.directory import forked_from
from support.files import UserError, read_json

# Keys that may change when a run continues: they do not change what is learned from a batch. The
# keys of EvalConfig and all *_every_steps and keep_* are free as well. Where the data lies is free:
# its content is compared.
MAY_CHANGE = {"run_dir", "data_dir", "max_steps", "device", "dtype", "compile", "micro_batch_size",
              "workers", "shard", "activation_checkpointing", "reduce_every_micro_batch",
              "not_finite", "save_every_minutes", "watts", "pue", "kg_co2_per_kwh"}
# Keys that give the weights their shapes.
SHAPE = {"d_model", "n_layers", "mlp_hidden_size", "embedding_size", "weight_tying"}
# What a run began with is over. A tuning still needs its base, which may move: it compares digests.
START = {"start_from", "fresh_optimizer"}


# ---- Before the data is built --------------------------------------------------------------------

def check_before_build(step, config, settings, free_keys):
    """UserError for what differs from a saved run and is known before the data is built.

    step: the directory that the run goes on from, not verified yet.
    """
    try:
        saved = read_json(step / "state.json")
        before, known = saved.get("config", {}), saved.get("data", {}).get("tokenizer_sha256")
    except (UserError, AttributeError):
        return  # a damaged step, which is told when it is verified
    if not starts_another(config, step):
        check_changes(step.parent, before, settings, config, free_keys)
    file = step.parent / "tokenizer.json"
    if known and file.is_file():
        check_digest(file, known, tokenizer_digest(file))


def starts_another(config, step):
    """True if the run of `config` is a new one that begins with the weights of `step`."""
    return bool(config.start_from and not forked_from(config)
                and step.resolve().parent != Path(config.run_dir).resolve())


# ---- Settings ------------------------------------------------------------------------------------

def check_settings(place, saved, settings, config, free_keys):
    """UserError for settings that differ from a saved run's; a printed line with accept_changes."""
    before = saved["config"]
    check_model_keys(saved, place)
    unknown = [f"{key}={before[key]}" for key in before if key not in settings]
    if unknown:
        print(f"warning: {place}: settings that this code does not know, and does not use: "
              f"{', '.join(unknown)}")
    changes = check_changes(place, before, settings, config, free_keys)
    if changes:
        print(f"{place}: continues with changes: {'; '.join(changes)}")


def check_changes(place, before, settings, config, free_keys):
    """Returns the changes of settings as text; UserError if they are not accepted."""
    keys = [key for key, value in settings.items()
            if key in before and before[key] != value and not may_change(key, free_keys)]
    if "start_from" in keys and is_same_path(before["start_from"], settings["start_from"]):
        keys.remove("start_from")
    changes = [f"{key}: {given(before[key])} there, {given(settings[key])} now" for key in keys]
    fixed = SHAPE if "method" in settings else SHAPE | START
    is_fixed = bool(fixed & set(keys))
    if changes and (is_fixed or not config.accept_changes):
        accept = "" if is_fixed else " or --accept_changes (continues it with what is given now)"
        # with --resume every value that is not named is the run's, in any run_dir
        remedy = f"choose another --run_dir, or use --overwrite (deletes that run){accept}"
        if config.resume:
            remedy = f"leave out what sets {', '.join(keys)}: the values of {place} are then used"
            remedy += "" if is_fixed else "; or continue with the new: --accept_changes"
        raise UserError(f"{place}: holds another run ({'; '.join(changes)}); {remedy}")
    return changes


def check_model_keys(state, path):
    """UserError for a setting of the network that this code does not have, as it would ignore it.

    The code that wrote the step may be another version, or a fork, whose network computes something
    else from the same tensors. (Steps of older code do not list the network's keys.)
    """
    known = {field.name for field in fields(ModelConfig)}
    unknown = [key for key in state.get("model_keys", ()) if key not in known]
    if unknown:
        given = ", ".join(f"{key}={state['config'].get(key)}" for key in unknown)
        raise UserError(f"{path}: config: {given}: this code's network has no such setting; use "
                        "the code that trained it")


def is_same_path(one, other):
    """Whether two texts name one directory, such as OUT and ./OUT/, which may be gone."""
    return bool(one and other) and Path(one).resolve() == Path(other).resolve()


def given(value):
    """A setting for a message; an empty text would not be seen."""
    return "nothing" if value == "" else value


def may_change(key, free_keys):
    """True if a run may continue with another value of this key."""
    by_pattern = key.endswith("_every_steps") or key.startswith("keep_")
    return by_pattern or key in MAY_CHANGE or key in free_keys


# ---- Data ----------------------------------------------------------------------------------------

def check_data(place, saved, fingerprint, config):
    """UserError for data that differs from a saved run's; a printed line with accept_changes."""
    check_tokenizer(run_of(place) / "tokenizer.json", saved["data"], fingerprint)
    keys = differing(saved, fingerprint)
    if not keys:
        return
    said = changed_sources(run_of(place), saved["config"], keys)
    for key in keys:
        said.append(f"{key}: {short(saved['data'].get(key))} there, {short(fingerprint[key])} now")
    said = "; ".join(said)
    if config.accept_changes:
        print(f"{place}: continues with changed data: {said}")
        return
    is_own = run_of(place).resolve() == Path(config.run_dir).resolve()
    remedy = "use --overwrite (deletes the run) or" if is_own and not config.resume else "use"
    if starts_another(config, Path(place)):
        remedy = "take its weights alone (--fresh_optimizer), or use"
    restore = "restore the text, or the data that was built from it, or"
    if "train_data" in saved["config"]:  # of a tuning
        restore = "restore it, or"
    raise UserError(f"{place}: its data has changed ({said}); {restore} {remedy} --accept_changes")


def changed_sources(run, settings, keys):
    """[a sentence for each source or file whose content has changed], as far as they are known.

    settings: the saved ones. keys: those of the fingerprint that differ.
    """
    if settings.get("train_data"):  # of a tuning; the manifest beside it is its base's
        held_out = settings.get("eval_data")
        also = f" or eval_data={held_out}" if held_out else ""
        base = f"start_from={settings['start_from']} has other weights, such as a later step's"
        rows = f"other rows in train_data={settings['train_data']}{also}"
        return [base] * ("base_sha256" in keys) + [rows] * ("data_sha256" in keys)
    if not (run / "manifest.json").is_file():
        return []
    return changed_texts(run, settings["data_dir"])


def differing(saved, fingerprint):
    """The keys of a saved run's data that have changed, but for the tokenizer's, which may not."""
    return [key for key, value in fingerprint.items()
            if key != "tokenizer_sha256" and saved["data"].get(key) != value]


def short(value):
    """The first digits of a SHA-256; any other value as it is."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def check_tokenizer(file, before, now):
    """UserError if the data has another tokenizer than the weights; it is accepted in no case.

    file: the run's tokenizer.json; before, now: fingerprints. Older runs did not save the digest:
    their file stands for it.
    """
    known = before.get("tokenizer_sha256")
    if not known and file.is_file():
        known = tokenizer_digest(file)
    if not known and before["data_sha256"] != now["data_sha256"]:
        raise UserError(f"{file}: missing, so nobody knows which ids the weights have learned; "
                        "restore it")
    if known:
        check_digest(file, known, now["tokenizer_sha256"])


def check_digest(file, known, now):
    """UserError unless `now` is the digest of the tokenizer that the weights have learned."""
    if known != now:
        raise UserError(f"tokenizer_sha256: {short(known)} there, {short(now)} now: the weights "
                        f"have learned another tokenizer; restore {file}, or begin a new run in "
                        "another --run_dir")
