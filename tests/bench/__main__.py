"""Speed, measured side by side: python -m tests.bench VERB

    cpu [W]   our training step against transformers', and against the models of adapter files (as
              tests/bench/nanogpt.py); the loop of train.py against its bare step; 10 minutes.
              tiny, small, bfloat16, float32: only these, in 3 minutes each
    generate  greedy answers against transformers' generate, float32 and bfloat16; 2 minutes
    tune      the steps of SFT and of DPO against pretraining's; 2 minutes
    data [P]  the tokenizer against HF `tokenizers`; the rules and other stages; whole builds on 2
              workers against 1; P: one part, tokenizer, stages or builds; 3 minutes
    memory    peak memory of a build that deduplicates with Bloom filters: 100 MB and 2 GB of input
    checkpoint  what saving every 100 steps costs a run of configs/tiny.py
    plan      the memory that --plan computes against that of real processes on a CPU
    eval [N]  each N-th (10th) question of the core tasks, against lm-eval's HFLM; 10 minutes
    gpu       the official 1B and 7B on one GPU against transformers': tokens/s, MFU, peak memory

Sides that are compared run in turns, so that a slow minute of the machine slows both (in cpu and
gpu each has a process of its own). Figures are medians over the rounds, a ratio is the median of
the rounds' ratios. Nothing is kept.
"""

import importlib
import random
import sys
import time

ROUNDS = 7


def alternate(sides, rounds=ROUNDS):
    """{name: [seconds of each round]} of the functions in `sides`, run in turns after a warm-up."""
    seconds = {name: [] for name in sides}
    for function in sides.values():
        function()
    for i in range(rounds):
        order = list(sides)
        if i % 2 == 0:
            order.reverse()
        for name in order:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios_of(seconds, slow, fast):
    """The ratio slow / fast of each round of `alternate`."""
    return [b / a for a, b in zip(seconds[fast], seconds[slow], strict=True)]


def library_texts(size):
    """About `size` bytes of the running Python's topics, docstrings and code, in shuffled order."""
    from corpus.stdlib import stdlib_documents
    texts = [document["text"] for source in ("reference", "docstrings", "code")
             for document in stdlib_documents(source)]
    random.Random(0).shuffle(texts)
    chosen = []
    room = size
    while texts and room > 0:
        chosen.append(texts.pop())
        room -= len(chosen[-1].encode())
    return chosen


# ---- Verbs ---------------------------------------------------------------------------------------

VERBS = {  # verb: the module of its function bench_VERB, imported when it is asked for
    "cpu": "speed", "generate": "generation", "data": "data", "memory": "data",
    "checkpoint": "gpu", "plan": "gpu", "gpu": "gpu", "eval": "tasks", "tune": "tune"}

PROCESSES = {  # what the benches themselves start: verb: (module, function)
    "build": ("data", "build_in"), "stages": ("data", "print_stages"),
    "allocated": ("gpu", "print_allocated"), "peer": ("gpu", "print_peer"),
    "side": ("speed", "serve")}


def main(argv):
    verb, *words = argv or [""]
    if verb in PROCESSES:
        module, function = PROCESSES[verb]
    elif verb in VERBS and (not words or verb in ("cpu", "data", "eval")):
        module = VERBS[verb]
        function = f"bench_{verb}"
    else:
        raise SystemExit(f"{__doc__}\nverbs: {', '.join(VERBS)}")
    if verb == "eval":
        words = map(int, words)
    module = importlib.import_module(f"tests.bench.{module}")
    return getattr(module, function)(*words)


if __name__ == "__main__":
    main(sys.argv[1:])
