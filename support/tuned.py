"""Around a tuning: its command line, its base, what a resumed run must find unchanged, printing."""

import hashlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from configs import setting
from corpus.lineage import data_of_run
from corpus.storage import held_out_files, tokenizer_digest
from data import DataConfig
from scaling.directory import check_directory, resumed_argv
from scaling.log import best_in
from support.config_text import read_assignments
from support.files import UserError, read_json
from support.outcome import print_next, say_if_untuned, tuning_table, without_blank_runs
from support.records import tasks_table
from support.rows import sequences_of
from support.text import BOLD_GREEN, PLAIN, counted, harmless

FEW_STEPS = 40  # a tuning of fewer is warned of
SMALL_BATCH = 8  # examples a step, for a small set
ENOUGH_STEPS = 80  # what the warning aims at


# ---- Configuration and command line --------------------------------------------------------------

def check_adapt_config(config):
    """UserError for a key of AdaptConfig that is out of its range."""
    if not 0 < config.epochs < math.inf:
        raise UserError(f"epochs={config.epochs}: it must be above 0")
    if not 0 <= config.warmup_share < 1:
        raise UserError(f"warmup_share={config.warmup_share}: it must be at least 0 and below 1")
    if not 0 < config.beta < math.inf:
        raise UserError(f"beta={config.beta}: it must be above 0")
    if config.eval_answers < 0:
        raise UserError(f"eval_answers={config.eval_answers}: it must be at least 0")


def checked_argv(argv, derived):
    """The command line of a tuning, with the config of the run in place of --resume=RUN.

    derived: the keys that follow from others here; UserError for one of them, and for no config.
    """
    refuse_derived(argv, derived)
    return resumed_argv(argv, "adapt.py", "configs/tiny_sft.py", is_tuned=True)


def refuse_derived(argv, derived):
    """UserError for a key of `derived` on the command line, and for prompts, which no tuning uses;
    a config file may name them.
    """
    # 1. the command line
    given = [word for word in argv if word.removeprefix("--").partition("=")[0] in derived]
    if given:
        raise UserError(f"{' '.join(given)}: here it follows from --epochs and --warmup_share; set "
                        "those, such as --epochs=0.1")
    prompts = [word for word in argv if word.startswith("--prompts=")]
    if prompts:
        raise UserError(f"{prompts[0]}: a tuning answers prompts of its eval_data; afterwards, "
                        "adapt.py generate RUN PROMPTS OUT answers a file")
    # 2. config files, which other commands may share
    for word in argv:
        if not word.endswith(".py") or not Path(word).is_file():
            continue
        for line, key, _ in read_assignments(Path(word)):
            if key in derived:
                print(f"{word}:{line}: {key} is not used; epochs and warmup_share set it")


# ---- The base ------------------------------------------------------------------------------------

def check_not_base(run, base):
    """UserError for a run_dir that is no place for a run, such as the run that is tuned."""
    check_directory(run)
    if run.resolve() in (base.home.resolve(), base.weights.resolve()):
        raise UserError(f"run_dir={run}: it is the run that is tuned; choose another --run_dir")


def held_out_of_base(base):
    """{source: file} of the text that the base's pretraining held out; {} for others' models."""
    if not (base.home / "manifest.json").is_file():
        return {}
    return held_out_files(data_of_run(base.home, DataConfig(**base.settings)))


def fingerprint_of(base, train_set, eval_set, batch_size):
    """What a resumed run must find unchanged: weights, examples, order."""
    sizes = [len(train_set), len(eval_set)]
    digest = hashlib.sha256(str(sizes).encode())
    for example in sequences_of(train_set + eval_set):
        digest.update(example.ids.tobytes())
        digest.update(example.trained.tobytes())
    return {
        "base_sha256": base.digest,  # the weights that are tuned
        "tokenizer_sha256": tokenizer_digest(base.home / "tokenizer.json"),
        "data_sha256": digest.hexdigest(),  # what is trained on and evaluated, in this order
        "instances": len(train_set),
        "seq_len": base.model_config.max_seq_len,
        "batch_size": batch_size,
        "seed": DataConfig(**base.settings).seed,  # the order of the epochs
    }


def choose_rows(config, model_config):
    """The micro-batch size in packed rows: as configured, or rows of about 4,096 tokens."""
    return config.micro_batch_size or max(1, 4096 // model_config.max_seq_len)


# ---- What is printed -----------------------------------------------------------------------------

def print_run(run, base, adapt_config, config, micro_batch_size):
    kind = "chats" if adapt_config.method == "sft" else "pairs"
    print(f"run: {run}, {adapt_config.method} of {base.weights}, {config.max_steps:,} steps of "
          f"{config.batch_size} {kind}, {micro_batch_size} packed rows at a time")
    say_few_steps(adapt_config, config, kind)
    say_odd_choices(base, adapt_config)


def say_odd_choices(base, adapt_config):
    """Lines for a DPO without SFT, and for own chats that are measured on Python's docstrings."""
    train_data = adapt_config.train_data
    if adapt_config.method == "dpo":
        say_if_untuned(base.weights, base.home, d_model=base.model_config.d_model,
                       train_data=train_data)
    if adapt_config.eval_data == "stdlib" != train_data:
        print("warning: eval_data=stdlib: the answers that are measured come from Python's "
              f"docstrings, not from {train_data}; name --eval_data=FILE, or --eval_data= for none")


def say_few_steps(adapt_config, config, kind):
    """A line for a tuning of so few steps that it learns next to nothing, with what to set."""
    if config.max_steps >= FEW_STEPS:
        return
    batch_size = min(config.batch_size, SMALL_BATCH)
    examples = config.max_steps / adapt_config.epochs * config.batch_size  # of an epoch, about
    epochs = math.ceil(ENOUGH_STEPS * batch_size / examples)
    lr = f" --lr={5 * config.lr:g}" if kind == "chats" else ""  # pairs are told apart in few steps
    print(f"warning: {counted(config.max_steps, 'step')} may be too few to learn anything; for few "
          f"{kind}, try --batch_size={batch_size} --epochs={epochs}{lr}")


def print_results(run, step, results):
    eval_data = read_json(run / "config.json")["eval_data"]
    print(f"\nafter step {step}:\n{tuning_table(run, results, eval_data)}")
    if results["tasks"]:
        print(tasks_table(results["tasks"]))
    for text in results.get("samples", []):
        print(f"\n{without_blank_runs(harmless(text))}")
    chosen = run
    if results.get("best"):
        chosen = run / results["best"]["path"]
        print(f"\nthe best step: {best_in(results)}")
    print_next(run, chosen)


# ---- Show ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ShowOptions:
    """What `show` prints."""

    examples: int = setting(3, "How many examples, from all over the set.")

    def __post_init__(self):
        if self.examples < 1:
            raise UserError(f"examples={self.examples} must be at least 1")


def show_examples(examples, at_most, tokenizer):
    """Print up to `at_most` examples from all over a set: Examples or Pairs of adapt.py."""
    every = max(1, len(examples) // at_most)
    for example in examples[::every][:at_most]:
        if hasattr(example, "chosen"):
            show(example.chosen, "chosen", tokenizer)
            show(example.rejected, "rejected", tokenizer)
        else:
            show(example, "", tokenizer)


def show(example, side, tokenizer):
    """Print an Example; `side` is "chosen", "rejected" or "" for a chat."""
    print(f"\n---- {side} {example.place}: {len(example.ids)} tokens, {sum(example.trained)} of "
          "them trained")
    if sys.stdout.isatty():
        print(marked(example, tokenizer, BOLD_GREEN, PLAIN))
    else:
        print(marked(example, tokenizer, "[[", "]]"))


def marked(example, tokenizer, on, off):
    """The text of an Example, with its special tokens; `on` and `off` enclose what is trained."""
    text = ""
    begin = 0  # of the stretch of ids that are all trained, or all not
    for end in range(1, len(example.ids) + 1):
        if end < len(example.ids) and example.trained[end] == example.trained[begin]:
            continue  # the stretch goes on
        part = harmless(tokenizer.decode(example.ids[begin:end]))
        text += f"{on}{part}{off}" if example.trained[begin] else part
        begin = end
    return text
