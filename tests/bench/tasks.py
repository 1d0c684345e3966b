"""The bench of the ranked-choice tasks: eval.py against lm-eval's HFLM, on the same requests."""

import logging
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from tests.bench.__main__ import alternate, library_texts, ratios_of
from configs import ROOT, load_config
from corpus.bpe import train_bpe
from corpus.tokenizer import Tokenizer, tokenizer_file
from eval import EvalConfig, encode_request
from model import ModelConfig, build_model
from support.scoring import score_requests
from support.tasks import PAPER_METRIC, packaged_task
from support.weights import load_model, save_hf
from train import SCHEMAS


def models(folder):
    """{name: Hugging Face directory} of two untrained models of the shape in configs/tiny.py."""
    [tiny] = load_config([str(ROOT / "configs/tiny.py")], ModelConfig, other=SCHEMAS)
    tokenizer = folder / "tokenizer.json"
    train_bpe(library_texts(2_000_000), tiny.vocab_size).save(tokenizer)
    save_hf(build_model(tiny, seed=1), folder / "tiny", tokenizer)
    olmo = replace(tiny, max_seq_len=2048, vocab_size=50280, embedding_size=50304,
                   eos_token_id=50279, pad_token_id=1)
    save_hf(build_model(olmo, seed=1), folder / "olmo", tokenizer_file("olmo"))
    return {"its own tokenizer, 4,096 ids, 256 tokens of context": folder / "tiny",
            "OLMo's tokenizer, 50,280 ids, 2,048 tokens of context": folder / "olmo"}


def groups_of(every):
    """The requests of each every-th question of the eight tasks, the unconditional ones too."""
    tasks = [packaged_task(name, "rc_0shot", EvalConfig()) for name in PAPER_METRIC]
    groups = []
    for task in tasks:
        for question in task.questions[::every]:
            groups.append(question.choices)
            if question.unconditional:
                groups.append(question.unconditional)
    return groups


def sides_of(path):
    """{name: a function of groups of requests that returns their log-probabilities}."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model = load_model(path)
    tokenizer = Tokenizer.load(path / "tokenizer.json")

    def encode(request):
        return encode_request(request, tokenizer, model.config.max_seq_len)

    def ours(groups):
        encoded = [list(map(encode, group)) for group in groups]
        return score_requests(model, encoded)[:, 0].tolist()

    def theirs(batch_size):
        harness = HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=batch_size)

        def score(groups):
            instances = [Instance("loglikelihood", {}, request, 0)
                         for group in groups for request in group]
            scores = harness.loglikelihood(instances, disable_tqdm=True)
            return [log_prob for log_prob, _ in scores]
        return score

    sides = {"ours": ours}
    for batch_size in (1, 16, 64):
        sides[f"HFLM, batch {batch_size}"] = theirs(batch_size)
    return sides


def time_sides(sides, groups):
    """Run the sides in turns on the same groups and print their times; returns them."""
    def call(side):
        return lambda: sides[side](groups)
    seconds = alternate({side: call(side) for side in sides}, rounds=3)
    for side, times in seconds.items():
        ratio = median(ratios_of(seconds, side, "ours"))
        print(f"  {side:<16} {median(times):7.2f} s   ratio {ratio:.2f}", flush=True)
    return seconds


def bench_eval(every=10):
    """Requests of the eight core tasks, 0-shot, float32, a tiny model. The bar: a ratio of 2.5.

    The requests of every 200th question (or fewer) tell which batch size suits lm-eval best. With
    OLMo's tokenizer each every-th question follows, once, at that batch size; 1 is the full sets.
    """
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        few = max(200, 10 * every)
        groups = groups_of(few)
        conditional = [group for group in groups if group[0][0] != "Answer:"]
        for name, path in models(Path(folder)).items():
            sides = sides_of(path)
            print(f"{name}; each {few}th question")
            print(f"without the unconditional ones, {sum(map(len, conditional)):,} requests:")
            time_sides(sides, conditional)
            print(f"all {sum(map(len, groups)):,} requests:")
            seconds = time_sides(sides, groups)
        best = min(list(sides)[1:], key=lambda side: median(seconds[side]))
        groups = groups_of(every)
        start = time.perf_counter()
        our_scores = sides["ours"](groups)
        between = time.perf_counter()
        their_scores = sides[best](groups)
        ours = between - start
        theirs = time.perf_counter() - between
    worst = max(abs(a - b) for a, b in zip(our_scores, their_scores, strict=True))
    print(f"each {every}th question, {len(our_scores):,} requests: ours {ours:.0f} s, {best} "
          f"{theirs:.0f} s, ratio {theirs / ours:.2f}; largest difference {worst:.1e} nats")
