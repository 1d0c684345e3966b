"""The experiments: what each one changes, what we expect, and which figure is compared.

To add one, add an Experiment to the list at the end. If it changes code, change the code, write
`git diff > experiments/NAME.patch`, take the change back, and name the patch in a Variant.
"""

from typing import NamedTuple

# ---- The runs ------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """A run: the same in every experiment that names it, so that it is trained once."""

    name: str
    options: tuple = ()  # what it changes; {corpora} is the folder that corpora.py fills
    patch: str = ""  # experiments/PATCH.patch, applied to a copy of the code
    after: "Variant | None" = None  # the run whose model it tunes
    config: str = "configs/tiny.py"
    common: tuple = ()  # what it shares with the others, unless `options` say otherwise


# A quarter of the tiny run: 150 steps of 4,096 tokens.
SHORT = ("--max_steps=150", "--warmup_steps=25", "--eval_every_steps=0", "--save_every_steps=50",
         "--keep_last=1", "--max_new_tokens=50")
# SFT and DPO on a part of an epoch; only the model's own answers are few
TUNING = ("--epochs=0.5", "--save_every_steps=0", "--max_new_tokens=50")


def short(name, *options, patch=""):
    return Variant(name, options, patch, common=SHORT)


def tuned(name, after, kind, *options, patch=""):
    return Variant(name, options, patch, after, f"configs/tiny_{kind}.py", TUNING)


def on_docstrings(name, folder, rules, *options):
    """A run on the docstrings alone: one source, so that 150 steps read about all of it."""
    sources = {"docstrings": {"path": f"{{corpora}}/{folder}", "rules": rules}}
    return short(name, f"--sources={sources}", *options)


UNCHANGED = short("unchanged")
SFT = tuned("sft_answers", UNCHANGED, "sft")
LEAKED = "{corpora}/leaked_set.jsonl"


# ---- The figures ---------------------------------------------------------------------------------

# Figure -> where it is in the last evaluation of a run's metrics.jsonl; see results.py
BITS = "bits per byte"
NATS = "nats per token"
DOCSTRING_BITS = "bits per byte of docstrings"
LEAKED_BITS = "bits per byte of the leaked set"
ANSWER_NATS = "nats per token of held-out answers"
ENDED = "answers that end by themselves"
PREFERRED = "pairs whose right answer is likelier"


# ---- The experiments -----------------------------------------------------------------------------

class Experiment(NamedTuple):
    """Variants of one thing; the first is what the others are compared with."""

    name: str
    hypothesis: str
    figures: tuple
    variants: tuple


EXPERIMENTS = [
    Experiment(
        "learning_rate",
        "The loss has a minimum over the peak learning rate: a rate that is ten times smaller "
        "learns too little in 150 steps, and one that is three times larger is no better.",
        (BITS,),
        (UNCHANGED,
         short("lr_0.0003", "--lr=3e-4", "--min_lr=3e-5"),
         short("lr_0.001", "--lr=1e-3", "--min_lr=1e-4"),
         short("lr_0.009", "--lr=9e-3", "--min_lr=9e-4"))),
    Experiment(
        "no_warmup",
        "AdamW's first steps rest on few batches; at the full learning rate they harm the model, "
        "and 150 steps do not repair it.",
        (BITS,),
        (UNCHANGED, short("no_warmup", "--warmup_steps=0"))),
    Experiment(
        "wsd",
        "A constant rate with a short decay at the end (warm-up, stable, decay) reaches what the "
        "linear decay reaches, and its end need not be known at the start.",
        (BITS,),
        (UNCHANGED, short("wsd", "--schedule=wsd", patch="wsd"))),
    Experiment(
        "learned_gain",
        "A gain that is learned in the norms of the blocks changes little: the next matrix can "
        "learn the same.",
        (BITS,),
        (UNCHANGED, short("learned_gain", patch="learned_gain"))),
    Experiment(
        "no_rope",
        "Without rotary positions, attention learns the order of tokens from the causal mask "
        "alone, and predicts worse.",
        (BITS,),
        (UNCHANGED, short("no_rope", patch="no_rope"))),
    Experiment(
        "gelu",
        "At equal parameters, SwiGLU predicts slightly better than an MLP with GELU.",
        (BITS,),
        (UNCHANGED, short("gelu", "--mlp_hidden_size=1056", patch="gelu"))),
    Experiment(
        "document_mask",
        "A token that attends to its own document alone loses no useful context, as the documents "
        "of a window have nothing to do with each other.",
        (BITS,),
        (UNCHANGED, short("document_mask", patch="document_mask"))),
    Experiment(
        "repeated_text",
        "If a tenth of the documents is there twenty times, most of a run reads the same text, and "
        "held-out text is predicted worse; deduplication restores the first result.",
        (DOCSTRING_BITS,),
        (on_docstrings("no_copies", "clean", "gopher_repetition pii document"),
         on_docstrings("copies", "copies", "gopher_repetition pii"),
         on_docstrings("copies_dropped", "copies", "gopher_repetition pii document"))),
    Experiment(
        "leaked_set",
        "An evaluation set that is in the training text ten times looks easy; another held-out "
        "text does not. Decontamination removes the documents with a paragraph of 13 words or more "
        "of the set, and its short documents remain.",
        (LEAKED_BITS, DOCSTRING_BITS),
        (on_docstrings("not_leaked", "clean", "gopher_repetition pii", f"--suite=domains,{LEAKED}"),
         on_docstrings("leaked", "leaked", "gopher_repetition pii", f"--suite=domains,{LEAKED}"),
         on_docstrings("decontaminated", "leaked", "gopher_repetition pii",
                       f"--suite=domains,{LEAKED}", f"--decontaminate={{'leaked': '{LEAKED}'}}"))),
    Experiment(
        "vocabulary",
        "A larger vocabulary cuts text into fewer tokens, each harder to predict: at equal bytes "
        "of training text, nats per token rank the three differently from bits per byte.",
        (BITS, NATS),
        (UNCHANGED,
         short("vocabulary_1024", "--tokenizer=bpe:1024", "--vocab_size=1024",
               "--embedding_size=1024", "--eos_token_id=1023", "--pad_token_id=1022",
               "--max_steps=198"),
         short("vocabulary_16384", "--tokenizer=bpe:16384", "--vocab_size=16384",
               "--embedding_size=16384", "--eos_token_id=16383", "--pad_token_id=16382",
               "--max_steps=131"))),
    Experiment(
        "sft_all_tokens",
        "SFT that also learns the questions spends a part of each step on text that the model will "
        "never write: held-out answers are predicted worse.",
        (ANSWER_NATS, ENDED),
        (SFT, tuned("sft_all_tokens", UNCHANGED, "sft", patch="sft_all_tokens"))),
    Experiment(
        "dpo_beta",
        "A small beta lets DPO move far from the reference: more held-out pairs are ranked right, "
        "and general text is predicted worse. Per token, beta must be larger.",
        (PREFERRED, BITS),
        (tuned("dpo_beta_0.1", SFT, "dpo"),
         tuned("dpo_beta_0.01", SFT, "dpo", "--beta=0.01"),
         tuned("dpo_beta_0.3", SFT, "dpo", "--beta=0.3"),
         tuned("dpo_per_token", SFT, "dpo", "--length_normalized=true", "--beta=5"))),
]
