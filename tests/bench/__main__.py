"""Speed, measured side by side: python -m tests.bench VERB

    data    our Tokenizer against HF `tokenizers`, one thread each, a document at a time

Both sides run in turns in one process, so that a machine's bad minute hits both; the figures are
medians over the rounds, the ratio the median of the rounds' ratios. Nothing is written.
"""

import os
import random
import sys
import time
from statistics import median

ROUNDS = 7


def alternate(sides, rounds=ROUNDS):
    """{name: [seconds of each round]} of the functions in `sides`, run in turns after a warm-up."""
    seconds = {name: [] for name in sides}
    for function in sides.values():
        function()
    for i in range(rounds):
        for name in list(sides)[::1 if i % 2 else -1]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def library_texts(size):
    """About `size` bytes of the running Python's topics, docstrings and code, in shuffled order."""
    from data import stdlib_documents
    texts = [document["text"] for source in ("reference", "docstrings", "code")
             for document in stdlib_documents(source)]
    random.Random(0).shuffle(texts)
    chosen, room = [], size
    while texts and room > 0:
        chosen.append(texts.pop())
        room -= len(chosen[-1].encode())
    return chosen


# ---- Verbs ---------------------------------------------------------------------------------------

def bench_data():
    """Text to ids with OLMo's own tokenizer file. The bar: a ratio of at least 4."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    from data import Tokenizer, olmo_tokenizer_file
    file, texts = olmo_tokenizer_file(), library_texts(3_000_000)
    ours, theirs = Tokenizer.load(file), tokenizers.Tokenizer.from_file(str(file))
    ids = [ours.encode(text) for text in texts]
    if ids != [theirs.encode(text).ids for text in texts]:
        raise SystemExit("the two sides give other ids, so their speeds do not compare")
    megabytes, tokens = sum(len(text.encode()) for text in texts) / 1e6, sum(map(len, ids)) / 1e6
    name = f"HF tokenizers {tokenizers.__version__}"
    seconds = alternate({"data.py": lambda: [ours.encode(text) for text in texts],
                         name: lambda: [theirs.encode(text) for text in texts]})
    ratios = [slow / fast for fast, slow in zip(seconds["data.py"], seconds[name], strict=True)]
    print(f"{len(texts):,} documents, {megabytes:.2f} MB, {tokens:.2f} M tokens, {ROUNDS} rounds, "
          "one thread\n")
    print("| tokenizer | MB/s | Mtokens/s | ratio | ratio, least to most |")
    print("|---|---|---|---|---|")
    for side, taken in seconds.items():
        speed = f"| {side} | {megabytes / median(taken):.2f} | {tokens / median(taken):.2f} "
        print(speed + (f"| {median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
                       if side == "data.py" else "| 1 | |"))


VERBS = {"data": bench_data}


def main(argv):
    if len(argv) != 1 or argv[0] not in VERBS:
        raise SystemExit(f"{__doc__}\nverbs: {', '.join(VERBS)}")
    VERBS[argv[0]]()


if __name__ == "__main__":
    main(sys.argv[1:])
