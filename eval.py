"""Evaluation: bits per byte of held-out text, samples, and curves; every number without a gradient.

    python eval.py RUN [--suite=PATH]               # bits per byte of each source's held-out text
    python eval.py sample RUN --prompt="def read_"  # let the model go on from a prompt
    python eval.py report RUN                       # draw the run's curves into RUN/curves.svg

RUN is a run directory, one of its step directories, or a Hugging Face directory. Paper: OLMo (arXiv
2402.00838), section 2.4.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from configs import UserError, load_config, run_main
from data import DataConfig, Tokenizer, data_of_run, log_rows, read_documents
from model import choose_device, generate, load_model, next_token_loss


@dataclass(frozen=True)
class EvalConfig:
    """What is measured and how samples are drawn."""

    suite: str = "domains"
    """"domains" is the held-out text of the run's sources; else a file or folder of documents."""
    eval_batch_tokens: int = 8192
    """Tokens of one forward pass of an evaluation."""
    eval_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the forward in eval.py; in the loop, train.py's own."""
    prompt: str = "class "
    """What the sample starts with."""
    max_new_tokens: int = 200
    """Longest sample in tokens; the context length ends it too."""
    temperature: float = 0.6
    """0 takes the likeliest token each time; 1 samples from the model as it is."""
    top_p: float = 0.95
    """Sample from the smallest set of tokens that holds this much of the probability."""
    sample_seed: int = 1
    """Seed of the sample."""

    def __post_init__(self):
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise UserError(f"temperature={self.temperature} must be at least 0 and "
                            f"top_p={self.top_p} above 0 and at most 1")
        if min(self.max_new_tokens, self.eval_batch_tokens) < 1:
            raise UserError("max_new_tokens and eval_batch_tokens must be at least 1")


# ---- Perplexity ----------------------------------------------------------------------------------

def rolling_windows(ids, eos_token_id, max_seq_len):
    """(inputs, targets, scored) windows over one document; the last `scored` targets count.

    Every id is scored once, the first from EOS, which is never scored itself. The last window
    reaches back over ids already scored, to give its own a full context: as Paloma's official code
    and lm-eval do it.
    """
    stream = [eos_token_id, *ids]
    windows = []
    for begin in range(0, len(ids), max_seq_len):
        end = min(begin + max_seq_len, len(ids))
        left = max(0, end - max_seq_len)
        windows.append((stream[left:end], stream[left + 1:end + 1], end - begin))
    return windows


@torch.no_grad()
def evaluate_perplexity(model, tokenizer, documents, batch_tokens=8192, rank=0, world_size=1):
    """Sums over `documents` ({text, ...}): {documents, tokens, bytes, nats}.

    Documents are never joined; `bytes` are those of the raw UTF-8 text and `nats` is the total
    negative log-likelihood, so that bits per byte = nats / ln 2 / bytes over any set (paper 2.4).
    With a rank, `nats` is of its share of the forward passes; each rank makes as many.
    """
    sums = {"documents": 0, "tokens": 0, "bytes": 0, "nats": 0.0}
    windows = []
    for document in documents:
        ids = tokenizer.encode(document["text"])
        sums["documents"] += 1
        sums["tokens"] += len(ids)
        sums["bytes"] += len(document["text"].encode())
        windows += rolling_windows(ids, tokenizer.eos_token_id, model.config.max_seq_len)
        if len(windows) > 4096:  # enough to sort by length; text streams
            sums["nats"] += score_windows(model, windows, batch_tokens, rank, world_size)
            windows = []
    sums["nats"] += score_windows(model, windows, batch_tokens, rank, world_size)
    return sums


def score_windows(model, windows, batch_tokens, rank=0, world_size=1):
    """Total nats (float) of the scored targets, in batches of windows of like length.

    With a rank, of the batches rank, rank + world_size, ...; where they are one fewer than another
    rank's, the last batch comes once more, for nothing: a sharded model needs all its ranks.
    """
    batches = list(length_batches(windows, batch_tokens))
    nats = 0.0
    for number in range(rank, -(-len(batches) // world_size) * world_size, world_size):
        batch_nats = score_batch(model, batches[min(number, len(batches) - 1)])
        nats += batch_nats if number < len(batches) else 0.0
    return nats


def length_batches(windows, batch_tokens):
    """Lists of windows of like length, longest first, each within `batch_tokens` when padded."""
    windows = sorted(windows, key=lambda window: -len(window[0]))
    while windows:
        n = max(1, batch_tokens // len(windows[0][0]))
        yield windows[:n]
        windows = windows[n:]


def score_batch(model, windows):
    """Total nats (float) of the scored targets of windows, the longest first, in one forward."""
    device, longest = model.wte.weight.device, len(windows[0][0])
    tokens = torch.full((len(windows), longest), model.config.pad_token_id)
    targets, loss_mask = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
    for row, (inputs, wanted, scored) in enumerate(windows):
        tokens[row, :len(inputs)] = torch.tensor(inputs)
        targets[row, :len(inputs)] = torch.tensor(wanted)
        loss_mask[row, len(inputs) - scored:len(inputs)] = True
    row_nats = model(tokens.to(device), targets=targets.to(device))
    return next_token_loss(row_nats, loss_mask.to(device))[0].item()


def bits_per_byte(sums):
    """Total bits over total raw bytes; nan where there are none."""
    return sums["nats"] / math.log(2) / sums["bytes"] if sums["bytes"] else math.nan


def held_out_domains(folder):
    """{source: documents} of the held-out text of a built data folder."""
    return {path.stem: read_documents(path, path.stem)
            for path in sorted((folder / "held_out").glob("*.jsonl"))}


def evaluate_domains(model, tokenizer, domains, batch_tokens, rank=0, world_size=1):
    """{domain: sums} for {domain: documents}; a domain without documents is left out."""
    results = {name: evaluate_perplexity(model, tokenizer, documents, batch_tokens, rank,
                                         world_size)
               for name, documents in domains.items()}
    return {name: sums for name, sums in results.items() if sums["documents"]}


def domains_table(results):
    """The lines of a table of {domain: sums}."""
    lines = [f"{'domain':<14}{'documents':>10}{'tokens':>12}{'KB':>10}"
             f"{'nats/token':>12}{'bits/byte':>11}"]
    for name, sums in results.items():
        nats = sums["nats"] / max(1, sums["tokens"])
        lines.append(f"{name:<14}{sums['documents']:>10,}{sums['tokens']:>12,}"
                     f"{sums['bytes'] / 1e3:>10,.1f}{nats:>12.4f}{bits_per_byte(sums):>11.4f}")
    return "\n".join(lines)


# ---- Samples -------------------------------------------------------------------------------------

def sample_text(model, tokenizer, config):
    """The prompt and the model's continuation of it, as text; it starts a document, after EOS."""
    ids = [tokenizer.eos_token_id, *tokenizer.encode(config.prompt)]
    try:
        [new] = generate(model, [ids], config.max_new_tokens, config.temperature, config.top_p,
                         stop_ids=(tokenizer.eos_token_id,), seed=config.sample_seed)
    except ValueError as error:
        raise UserError(f"prompt: {error}") from None
    return config.prompt + tokenizer.decode(i for i in new if i != tokenizer.eos_token_id)


# ---- Report --------------------------------------------------------------------------------------

def read_metrics(run):
    """The rows of a run's metrics.jsonl, by kind."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: missing; name a run directory that train.py wrote")
    rows = {"train": [], "eval": [], "end": []}
    for row in log_rows(run):
        rows.setdefault(row["kind"], []).append(row)
    return rows


def draw_curves(run, out):
    """Draw training loss and held-out bits per byte over tokens into the file `out`."""
    rows = read_metrics(run)
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("report draws with matplotlib: pip install matplotlib") from None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([row["tokens"] / 1e6 for row in rows["train"]],
              [row["loss"] for row in rows["train"]], linewidth=1)
    left.set(title="training loss", xlabel="million tokens", ylabel="nats per token")
    for name in rows["eval"][0]["bits_per_byte"] if rows["eval"] else ():
        right.plot([row["tokens"] / 1e6 for row in rows["eval"]],
                   [row["bits_per_byte"][name] for row in rows["eval"]], marker="o", label=name)
        right.legend()
    right.set(title="held-out text", xlabel="million tokens", ylabel="bits per byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)
    pyplot.close(figure)


# ---- Commands ------------------------------------------------------------------------------------

def run_of(path):
    """The directory that holds config.json and tokenizer.json: `path`, or its parent for a step."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; train.py configs/tiny.py makes runs/tiny")
    return path.parent if (path / "state.json").is_file() else path


def suite_domains(run, suite):
    """{domain: documents}: the run's own held-out sources, or the documents at a path."""
    if suite != "domains":
        return {Path(suite).name: read_documents(suite, Path(suite).name)}
    if not (run / "manifest.json").is_file():
        raise UserError(f"{run}: not a run directory, so it has no held-out text; name a file or "
                        "folder of documents: --suite=PATH")
    [config] = load_config([str(run / "config.json")], DataConfig)
    return held_out_domains(data_of_run(run, config))


def main(argv):
    verb, paths = "evaluate", [word for word in argv if not word.startswith("-")]
    if paths and paths[0] in ("sample", "report"):
        verb = paths.pop(0)
    options = [word for word in argv if word.startswith("-")]
    [config] = load_config(options, EvalConfig)
    if len(paths) != 1:
        raise UserError(f"{' '.join(paths) or 'no run'}: name one run; --help shows the form")
    run = run_of(paths[0])
    if verb == "report":
        draw_curves(run, run / "curves.svg")
        print(f"wrote {run / 'curves.svg'}")
        return
    model = load_model(paths[0], choose_device())
    if config.eval_dtype == "bfloat16":
        model.compute_dtype = torch.bfloat16
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    if verb == "sample":
        print(sample_text(model, tokenizer, config))
        return
    domains = suite_domains(run, config.suite)
    print(domains_table(evaluate_domains(model, tokenizer, domains, config.eval_batch_tokens)))


if __name__ == "__main__":
    run_main(main)
