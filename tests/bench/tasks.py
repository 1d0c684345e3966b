"""The bench of the ranked-choice tasks: eval.py beside lm-eval's HFLM, on the same rows."""

import logging
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from tests.bench.__main__ import alternate, library_texts
from configs import ROOT, load_config
from corpus.tokenizer import Tokenizer, tokenizer_file, train_bpe
from eval import EvalConfig, encode_request, score_requests
from model import ModelConfig, build_model
from train import SCHEMAS
from support.tasks import PAPER_METRIC, packaged_task
from support.weights import load_model, save_hf


def models(folder):
    """{name: Hugging Face directory} of two untrained models of the shape in configs/tiny.py."""
    [tiny] = load_config([str(ROOT / "configs/tiny.py")], ModelConfig, other=SCHEMAS)
    own = folder / "tokenizer.json"
    train_bpe(library_texts(2_000_000), tiny.vocab_size).save(own)
    save_hf(build_model(tiny, seed=1), folder / "tiny", own)
    olmo = replace(tiny, max_seq_len=2048, vocab_size=50280, embedding_size=50304,
                   eos_token_id=50279, pad_token_id=1)
    save_hf(build_model(olmo, seed=1), folder / "olmo", tokenizer_file("olmo"))
    return {"its own tokenizer, 4,096 ids, 256 tokens of context": folder / "tiny",
            "OLMo's tokenizer, 50,280 ids, 2,048 tokens of context": folder / "olmo"}


def groups_of(every):
    """The requests of each every-th question of the eight tasks, the unconditional ones too."""
    tasks = [packaged_task(name, "rc_0shot", EvalConfig()) for name in PAPER_METRIC]
    questions = [question for task in tasks for question in task.questions[::every]]
    return [group for question in questions
            for group in (question.choices, question.unconditional) if group]


def sides_of(path):
    """{name: a function of groups of requests, which gives their log-probabilities}."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = load_model(path), Tokenizer.load(path / "tokenizer.json")

    def ours(groups):
        return score_requests(model, [[encode_request(request, tokenizer, model.config.max_seq_len)
                                       for request in group] for group in groups])[:, 0].tolist()

    def theirs(size):
        harness = HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=size)
        return lambda groups: [log_prob for log_prob, _ in harness.loglikelihood(
            [Instance("loglikelihood", {}, request, 0) for group in groups for request in group],
            disable_tqdm=True)]
    return {"ours": ours} | {f"HFLM, batch {size}": theirs(size) for size in (1, 16, 64)}


def bench_eval(every=10):
    """Requests of the eight core tasks, 0-shot, float32, a tiny model. The bar: a ratio of 2.

    Which batch size suits lm-eval best is found on all requests of every 200th question (or fewer);
    with OLMo's tokenizer each every-th question follows, once; 1 is the full sets.
    """
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        for name, path in models(Path(folder)).items():
            sides, fewer = sides_of(path), max(200, 10 * every)
            few = groups_of(fewer)
            for words, groups in (("the conditional ones", [
                    group for group in few if group[0][0] != "Answer:"]), ("all requests", few)):
                seconds = alternate({side: lambda function=function, groups=groups: function(groups)
                                     for side, function in sides.items()}, rounds=3)
                print(f"{name}; {words} of every {fewer}th question, {sum(map(len, groups)):,}:")
                for side, times in seconds.items():
                    ratio = median(b / a for a, b in zip(seconds["ours"], times, strict=True))
                    print(f"  {side:<16} {median(times):7.2f} s   ratio {ratio:.2f}", flush=True)
        best = min(list(sides)[1:], key=lambda side: median(seconds[side]))
        everything = groups_of(every)
        begin = time.perf_counter()
        own = sides["ours"](everything)
        between = time.perf_counter()
        other = sides[best](everything)
        took, theirs = between - begin, time.perf_counter() - between
        worst = max(abs(a - b) for a, b in zip(own, other, strict=True))
        print(f"each {every}th question, {len(own):,} requests: ours {took:.0f} s, "
              f"{best} {theirs:.0f} s, ratio {theirs / took:.2f}; largest difference {worst:.1e} "
              "nats")
