"""Speed, measured side by side: python -m tests.bench VERB

    cpu [F]   our training step beside transformers', and the model of an adapter file F; the loop
              beside its bare step; 10 minutes
    generate  greedy answers beside transformers' generate
    data      the tokenizer beside HF `tokenizers`, the filter chain, tokenisation, the loader
    memory    peak memory of a build that deduplicates with Bloom filters: 100 MB and 2 GB of input
    checkpoint  what saving every 100 steps costs a run of configs/tiny.py
    plan      the memory that --plan reckons beside that of real processes on a CPU
    eval [N]  each N-th (10th) question of the core tasks, beside lm-eval's HFLM; 10 minutes
    gpu       the official 1B and 7B on one GPU beside transformers': tokens/s, MFU, peak memory

Sides that are compared run in turns, so that a machine's bad minute hits both (of cpu and gpu each
in a process of its own); the figures are medians over the rounds, a ratio is the median of the
rounds' ratios. Nothing is kept.
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
from pathlib import Path
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
    from corpus.stdlib import stdlib_documents
    texts = [document["text"] for source in ("reference", "docstrings", "code")
             for document in stdlib_documents(source)]
    random.Random(0).shuffle(texts)
    chosen, room = [], size
    while texts and room > 0:
        chosen.append(texts.pop())
        room -= len(chosen[-1].encode())
    return chosen


def library_documents():
    """The topics, and the docstrings of each module as one document: prose, long as pages."""
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
    """Text to ids with OLMo's own tokenizer file. The bar: a ratio of at least 4."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    from corpus.tokenizer import Tokenizer, tokenizer_file
    file, texts = tokenizer_file("olmo"), library_texts(3_000_000)
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


def bench_stages():
    """Filters, tokenisation from clean documents, batches; one process. The bars: 1.5 MB/s,
    12 MB/s, 10 M tokens/s."""
    import numpy as np

    from corpus.rules import Page, RULES, english_score
    from corpus.dedup import deduplicate_source
    from corpus.documents import read_records
    from corpus.funnel import Funnel
    from corpus.storage import DOCUMENT_INDEX, DocumentWriter, store_documents
    from corpus.tokenizer import tokenizer_file
    from data import (Batches, DataConfig, TokenShards, decontaminate_and_filter, encode_block,
                      hold_out)
    from support.files import write_json
    documents = library_documents()
    megabytes = sum(len(document["text"].encode()) for document in documents) / 1e6
    scorers = {"language": english_score, "content": lambda sentence: 0.0}
    web = [rule for rule in RULES if not rule.startswith("code")]

    def run_rules():
        for document in documents:
            page = Page(document, scorers)
            for rule in web:
                RULES[rule](page)  # whatever it says, the next one runs as well

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        writer = DocumentWriter(folder, "bench")
        for document in documents:
            writer.add(document)
        writer.close()
        tokens = np.random.default_rng(0).integers(0, 50_000, 10**8, dtype="<u2")
        tokens.tofile(folder / "bench-00000.bin")
        np.zeros(0, DOCUMENT_INDEX).tofile(folder / "bench-00000.index")
        write_json(folder / "manifest.json", {
            "dtype": "uint16", "sha256": "", "eos_token_id": 0, "shards": [
            {"file": "bench-00000.bin", "tokens": len(tokens)}]})
        batches = Batches(TokenShards(folder, 2048), 16, 0, folder)
        write_random_documents(folder / "in.jsonl", 20)
        config = DataConfig(bloom_items=10**7, sources={
            "random": {"path": f"{folder}/in.jsonl", "rules": "url document paragraph"}})

        def write_clean():
            [source], funnel = config.parse_sources(), Funnel()
            records = read_records(source.path, source.name, funnel.notes)
            documents = decontaminate_and_filter(records, config, source, funnel)
            documents = deduplicate_source(documents, config, source, funnel)
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                store_documents(Path(aside), hold_out(documents, config, source, funnel), source,
                                funnel)
        seconds = alternate({
            f"filter chain, all {len(web)} rules but code's on every document": run_rules,
            "reading, Bloom deduplication, writing, beside workers that parse": write_clean,
            "tokenisation, from compressed clean documents": lambda: [
                encode_block(block, folder, "bench", tokenizer_file("olmo"))
                for block in writer.blocks],
            "loader, batches of 16 x 2,048": lambda: [batches(step) for step in range(1, 301)]})
    print(f"\n{len(documents)} documents, {megabytes:.2f} MB; one process\n\n| stage | speed |"
          "\n|---|---|")
    for name, taken in seconds.items():
        speed = (f"{300 * 16 * 2048 / median(taken) / 1e6:,.0f} M tokens/s" if "loader" in name
                 else f"{(20 if 'reading' in name else megabytes) / median(taken):.2f} MB/s")
        print(f"| {name} | {speed} |")


def bench_memory():
    """Peak memory of `build_data` with Bloom filters. The bar: flat from 100 MB to 2 GB."""
    print("| input | peak of the main process, MB | of a worker | minutes |\n|---|---|---|---|")
    for megabytes in (100, 2000):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            write_random_documents(Path(folder) / "in.jsonl", megabytes)
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "tests.bench", "build", folder],
                                  capture_output=True, text=True, check=True)
            own, worker = done.stdout.split()[-2:]
            print(f"| {megabytes:,} MB | {own} | {worker} "
                  f"| {(time.perf_counter() - start) / 60:.1f} |", flush=True)


def write_random_documents(path, megabytes):
    """JSONL of random words; each has an URL, and a tenth of the paragraphs stand in others too."""
    dice, size, number = random.Random(0), 0, 0
    words = ["".join(dice.choices("etaoinshrdlu", k=dice.randint(2, 9))) for _ in range(5000)]
    common = [" ".join(dice.choices(words, k=30)) for _ in range(1000)]
    with open(path, "w") as out:
        while size < megabytes * 1e6:
            paragraphs = [dice.choice(common) if dice.random() < 0.1 else
                          " ".join(dice.choices(words, k=60)) for _ in range(8)]
            size += out.write(json.dumps({"id": str(number), "text": "\n".join(paragraphs),
                                          "metadata": {"url": f"http://site/{number}"}}) + "\n")
            number += 1


def build_in(folder):
    """Build the data of `bench_memory`, print the peaks: this process's and a worker's, in MB."""
    from data import DataConfig, build_data
    build_data(DataConfig(
        data_dir=f"{folder}/data", tokenizer="bpe:512", bloom_items=10_000_000, eval_share=0.001,
        sources={"bench": {"path": f"{folder}/in.jsonl", "rules": "url document paragraph"}}))
    print(*(round(resource.getrusage(who).ru_maxrss / 1e3)
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


VERBS = {"data": bench_data, "memory": bench_memory}
FILES = {"cpu": "speed", "generate": "speed", "checkpoint": "gpu", "plan": "gpu", "gpu": "gpu",
         "eval": "tasks"}  # imported when asked


def main(argv):
    if argv[:1] == ["build"]:  # what bench_memory starts
        return build_in(argv[1])
    if argv[:1] == ["allocated"]:  # what the bench of the plan starts
        from tests.bench import gpu
        return gpu.print_allocated(argv[1])
    if argv[:1] == ["peer"]:  # and that of a GPU
        from tests.bench import gpu
        return gpu.print_peer(*argv[1:])
    if argv[:1] == ["side"]:  # what the benches of speed start
        from tests.bench import speed
        return speed.serve(argv[1])
    verb, *words = argv or [""]
    if verb not in (*VERBS, *FILES) or words and verb not in ("eval", "cpu"):
        raise SystemExit(f"{__doc__}\nverbs: {', '.join((*VERBS, *FILES))}")
    if verb in FILES:
        module = importlib.import_module(f"tests.bench.{FILES[verb]}")
        words = map(int, words) if verb == "eval" else words
        return getattr(module, f"bench_{verb}")(*words)
    VERBS[verb]()


if __name__ == "__main__":
    main(sys.argv[1:])
