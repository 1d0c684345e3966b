"""Speed, measured side by side: python -m tests.bench VERB

    cpu [W]   our training step against transformers', and against the models of adapter files (as
              tests/bench/nanogpt.py); the loop of train.py against its bare step; 10 minutes.
              tiny, small, bfloat16, float32: only these, in 3 minutes each
    generate  greedy answers against transformers' generate, float32 and bfloat16; 2 minutes
    tune      the steps of SFT and of DPO against pretraining's; 2 minutes
    data      the tokenizer against HF `tokenizers`; the rules, tokenisation, the loader
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
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median

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


def library_documents():
    """The topics, and the docstrings of each module as one document: prose of web pages' length."""
    from corpus.stdlib import stdlib_documents
    texts = [document["text"] for document in stdlib_documents("reference")]
    modules = {}
    for document in stdlib_documents("docstrings"):
        modules.setdefault(document["metadata"]["split_group"], []).append(document["text"])
    texts += ["\n".join(docstrings) for docstrings in modules.values()]
    return [{"id": str(i), "text": text, "source": "bench", "metadata": {"provenance": f":{i}"}}
            for i, text in enumerate(texts)]


# ---- Verbs ---------------------------------------------------------------------------------------

def bench_data():
    bench_tokenizer()
    bench_stages()


def bench_tokenizer():
    """Text to ids with OLMo's own tokenizer file. The bar: at least 4 times as fast as HF."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    from corpus.tokenizer import Tokenizer, tokenizer_file
    file = tokenizer_file("olmo")
    texts = library_texts(3_000_000)
    ours = Tokenizer.load(file)
    theirs = tokenizers.Tokenizer.from_file(str(file))
    ids = [ours.encode(text) for text in texts]
    if ids != [theirs.encode(text).ids for text in texts]:
        raise SystemExit("the two sides give different ids, so their speeds do not compare")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokens = sum(map(len, ids)) / 1e6
    name = f"HF tokenizers {tokenizers.__version__}"
    seconds = alternate({"nanOLMo": lambda: [ours.encode(text) for text in texts],
                         name: lambda: [theirs.encode(text) for text in texts]})
    ratios = ratios_of(seconds, name, "nanOLMo")
    notes = {"nanOLMo": f"{median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}",
             name: "1 |"}
    print(f"{len(texts):,} documents, {megabytes:.2f} MB, {tokens:.2f} M tokens, {ROUNDS} rounds, "
          "one thread\n")
    print("| tokenizer | MB/s | Mtokens/s | ratio | lowest to highest ratio |")
    print("|---|---|---|---|---|")
    for side in seconds:
        took = median(seconds[side])
        print(f"| {side} | {megabytes / took:.2f} | {tokens / took:.2f} | {notes[side]} |")


def bench_stages():
    """Rules, cleaning, tokenisation, batches; one process. The bars for the rules, tokenisation and
    batches: 1.5 MB/s, 12 MB/s, 10 M tokens/s."""
    import numpy as np

    from corpus.dedup import deduplicate_source
    from corpus.documents import read_records
    from corpus.funnel import Funnel
    from corpus.rules import RULES, Page, english_score
    from corpus.storage import DOCUMENT_INDEX, DocumentWriter, store_documents
    from corpus.tokenizer import tokenizer_file
    from data import (Batches, DataConfig, TokenShards, decontaminate_and_filter, encode_block,
                      hold_out)
    from support.files import write_json
    documents = library_documents()
    megabytes = sum(len(document["text"].encode()) for document in documents) / 1e6
    scorers = {"language": english_score, "content": lambda sentence: 0.0}
    rules = [rule for rule in RULES if not rule.startswith("code")]

    def run_rules():
        for document in documents:
            page = Page(document, scorers)
            for rule in rules:
                RULES[rule](page)  # whatever it says, the next rule runs as well

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        # clean documents, for tokenisation
        writer = DocumentWriter(folder, "bench")
        for document in documents:
            writer.add(document)
        writer.close()

        def tokenise():
            for block in writer.blocks:
                encode_block(block, folder, "bench", tokenizer_file("olmo"))

        # one shard of random tokens, for the loader
        tokens = np.random.default_rng(0).integers(0, 50_000, 10**8, dtype="<u2")
        tokens.tofile(folder / "bench-00000.bin")
        np.zeros(0, DOCUMENT_INDEX).tofile(folder / "bench-00000.index")
        shard = {"file": "bench-00000.bin", "tokens": len(tokens)}
        write_json(folder / "manifest.json", {"dtype": "uint16", "sha256": "", "eos_token_id": 0,
                                              "shards": [shard]})
        batches = Batches(TokenShards(folder, 2048), 16, 0, folder)

        def load():
            for step in range(1, 301):
                batches(step)

        # raw documents with duplicates, for the first stage of a build
        write_random_documents(folder / "in.jsonl", 20)
        config = DataConfig(bloom_items=10**7, sources={
            "random": {"path": f"{folder}/in.jsonl", "rules": "url document paragraph"}})

        def clean():
            [source] = config.parse_sources()
            funnel = Funnel()
            records = read_records(source.path, source.name, funnel.notes)
            documents = decontaminate_and_filter(records, config, source, funnel)
            documents = deduplicate_source(documents, config, source, funnel)
            split = hold_out(documents, config, source, funnel)
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                store_documents(Path(aside), split, source, funnel)

        with redirect_stdout(None):  # the size of the Bloom filters, each time
            seconds = alternate({"rules": run_rules, "clean": clean, "tokenise": tokenise,
                                 "load": load})
    took = {name: median(times) for name, times in seconds.items()}
    print(f"\n{len(documents)} documents, {megabytes:.2f} MB; one process\n")
    print("| stage | speed |\n|---|---|")
    print(f"| all {len(rules)} rules but code's, on every document "
          f"| {megabytes / took['rules']:.2f} MB/s |")
    print("| reading, Bloom deduplication and writing; workers parse "
          f"| {20 / took['clean']:.2f} MB/s |")
    print("| tokenisation of compressed clean documents "
          f"| {megabytes / took['tokenise']:.2f} MB/s |")
    print("| loader, batches of 16 x 2,048 "
          f"| {300 * 16 * 2048 / took['load'] / 1e6:,.0f} M tokens/s |")


def bench_memory():
    """Peak memory of `build_data` with Bloom filters. The bar: flat from 100 MB to 2 GB."""
    print("| input | peak of the main process, MB | of a worker | minutes |\n|---|---|---|---|")
    for megabytes in (100, 2000):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            write_random_documents(Path(folder) / "in.jsonl", megabytes)
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "tests.bench", "build", folder],
                                  capture_output=True, text=True, check=True)
            minutes = (time.perf_counter() - start) / 60
            main_peak, worker_peak = done.stdout.split()[-2:]
            print(f"| {megabytes:,} MB | {main_peak} | {worker_peak} | {minutes:.1f} |", flush=True)


def write_random_documents(path, megabytes):
    """Write JSONL of random words; each document has a URL, and a tenth of the paragraphs occur in
    several documents."""
    dice = random.Random(0)
    words = ["".join(dice.choices("etaoinshrdlu", k=dice.randint(2, 9))) for _ in range(5000)]
    common = [" ".join(dice.choices(words, k=30)) for _ in range(1000)]

    def paragraph():
        if dice.random() < 0.1:
            return dice.choice(common)
        return " ".join(dice.choices(words, k=60))

    size = 0
    number = 0
    with open(path, "w") as out:
        while size < megabytes * 1e6:
            text = "\n".join(paragraph() for _ in range(8))
            document = {"id": str(number), "text": text,
                        "metadata": {"url": f"http://site/{number}"}}
            size += out.write(json.dumps(document) + "\n")
            number += 1


def build_in(folder):
    """A process of `bench_memory`: build; print the peaks of this process and of a worker, MB."""
    from data import DataConfig, build_data
    build_data(DataConfig(
        data_dir=f"{folder}/data", tokenizer="bpe:512", bloom_items=10_000_000, eval_share=0.001,
        sources={"bench": {"path": f"{folder}/in.jsonl", "rules": "url document paragraph"}}))
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print(round(resource.getrusage(who).ru_maxrss / 1e3))


VERBS = {  # verb: the module of its function bench_VERB, imported when it is asked for
    "cpu": "speed", "generate": "generation", "data": "__main__", "memory": "__main__",
    "checkpoint": "gpu", "plan": "gpu", "gpu": "gpu", "eval": "tasks", "tune": "tune"}

PROCESSES = {  # what the benches themselves start: verb: (module, function)
    "build": ("__main__", "build_in"), "allocated": ("gpu", "print_allocated"),
    "peer": ("gpu", "print_peer"), "side": ("speed", "serve")}


def main(argv):
    verb, *words = argv or [""]
    if verb in PROCESSES:
        module, function = PROCESSES[verb]
    elif verb in VERBS and (not words or verb in ("cpu", "eval")):
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
