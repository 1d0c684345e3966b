"""Speed of the data: the tokenizer, the rules and the other stages, whole builds; peak memory."""

import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from tests.bench.__main__ import ROUNDS, alternate, library_texts, ratios_of


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


# ---- python -m tests.bench data ------------------------------------------------------------------

def bench_data(part=""):
    parts = {"tokenizer": bench_tokenizer, "stages": bench_stages, "builds": bench_builds}
    if part and part not in parts:
        raise SystemExit(f"data {part}: the parts are {', '.join(parts)}")
    for bench in [parts[part]] if part else parts.values():
        bench()


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
    batches: 3 MB/s, 12 MB/s, 10 M tokens/s."""
    import numpy as np

    from corpus.rules import RULES, Page, english_score
    from corpus.storage import DOCUMENT_INDEX, DocumentWriter, in_blocks, pack
    from corpus.tokenizer import tokenizer_file
    from data import Batches, DataConfig, TokenShards, encode_block
    from support.files import to_json, write_json
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
        lines = (to_json(document).encode() + b"\n" for document in documents)
        for member in pack(in_blocks(lines)):
            writer.add(member)
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

        # and documents like those of the web
        write_web_documents(folder / "web.jsonl", 4)
        web = DataConfig(sources={"web": {"path": f"{folder}/web.jsonl", "rules": "web"}})

        with redirect_stdout(None):  # the size of the Bloom filters, each time
            seconds = alternate({
                "rules": run_rules, "web": lambda: clean(web, folder),
                "random": lambda: clean(config, folder), "tokenise": tokenise, "load": load})
    took = {name: median(times) for name, times in seconds.items()}
    print(f"\n{len(documents)} documents, {megabytes:.2f} MB; one process\n")
    print("| stage | speed |\n|---|---|")
    print(f"| all {len(rules)} rules but code's, on every document "
          f"| {megabytes / took['rules']:.2f} MB/s |")
    print("| the clean stage with Dolma's rules for the web, on a core "
          f"| {4 / took['web']:.2f} MB/s |")
    print("| the clean stage without rules: reading, Bloom deduplication, writing "
          f"| {20 / took['random']:.2f} MB/s |")
    print("| tokenisation of compressed clean documents "
          f"| {megabytes / took['tokenise']:.2f} MB/s |")
    print("| loader, batches of 16 x 2,048 "
          f"| {300 * 16 * 2048 / took['load'] / 1e6:,.0f} M tokens/s |")


def clean(config, folder):
    """Run the clean stage of the one source of `config`; nothing of it is kept."""
    from corpus.dedup import copies_marked
    from corpus.documents import read_records
    from corpus.funnel import Funnel
    from corpus.stages import Workers
    from corpus.storage import store_documents
    from data import decontaminate_and_filter, finish_batch
    [source] = config.parse_sources()
    funnel = Funnel()
    records = read_records(source.path, source.name, funnel.notes)
    with Workers(1) as workers, tempfile.TemporaryDirectory(dir=folder) as aside:
        filtered = decontaminate_and_filter(records, config, source, workers)
        marked = copies_marked(filtered, config, source)
        lines = workers.map(partial(finish_batch, config=config, source=source), marked)
        store_documents(Path(aside), lines, workers, source, funnel)


def bench_builds(megabytes=30, rounds=3):
    """Whole builds on 1 and 2 workers, each in a process of its own. The bar: 1.7 times as fast."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        write_web_documents(Path(folder) / "web.jsonl", megabytes)
        for name in ("web", "stdlib"):
            seconds = {1: [], 2: []}
            for i in range(rounds):
                for workers in (1, 2) if i % 2 else (2, 1):
                    done = subprocess.run(
                        [sys.executable, "-m", "tests.bench", "stages", folder, name,
                         str(workers)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                        text=True, check=True)
                    seconds[workers].append(json.loads(done.stdout.splitlines()[-1]))
            print_builds(name, seconds, megabytes if name == "web" else None)


def print_builds(name, seconds, megabytes):
    """The table of bench_builds; seconds: {workers: [{stage: seconds} of each round]}."""
    title = f"{megabytes} MB like the web, Dolma's rules" if megabytes else "the data of tiny.py"
    print(f"\nBuild of {title}; {len(seconds[1])} rounds\n")
    print("| stage | s on 1 worker | on 2 | MB/s of input on 1 | on 2 | times as fast |")
    print("|---|---|---|---|---|---|")
    for stage in seconds[1][0]:
        one, two = (median(each[stage] for each in seconds[workers]) for workers in (1, 2))
        ratios = sorted(a[stage] / b[stage] for a, b in zip(seconds[1], seconds[2], strict=True))
        speeds = f"{megabytes / one:.1f} | {megabytes / two:.1f}" if megabytes else " | "
        print(f"| {stage} | {one:.2f} | {two:.2f} | {speeds} | {median(ratios):.2f} "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |")


def print_stages(folder, name, workers):
    """A process of `bench_builds`: build; print {stage: seconds} as JSON."""
    import data
    import train
    from configs import ROOT, load_config
    took = {"clean": 0, "tokenizer": 0, "tokens": 0}
    once = data.build_once

    def timed(stage, *arguments):
        begin = time.perf_counter()
        once(stage, *arguments)
        took[stage.name.split("-")[0]] += time.perf_counter() - begin
        return stage

    data.build_once = timed
    [config] = load_config([str(ROOT / "configs/tiny.py")], data.DataConfig, other=train.SCHEMAS)
    if name == "web":
        sources = {"web": {"path": f"{folder}/web.jsonl", "rules": "web"}}
        config = data.DataConfig(sources=sources)
    with tempfile.TemporaryDirectory(dir=folder) as data_dir:
        begin = time.perf_counter()
        data.build_data(replace(config, data_dir=data_dir, workers=int(workers)))
        took["the whole build"] = time.perf_counter() - begin
    print(json.dumps(took))


def write_web_documents(path, megabytes):
    """Write JSONL of prose like the web's: sentences of the library in random order, menus, a few
    addresses and numbers, text said three times, and other languages."""
    dice = random.Random(0)
    texts = [" ".join(document["text"].split()) for document in library_documents()]
    sentences = [sentence for text in texts for sentence in re.split(r"(?<=[.!?])\s", text)
                 if 20 < len(sentence) < 300]
    menu = ["Home | About | Contact", "Click here to read more", "All rights reserved.", "Share:"]
    german = "der die das und ist nicht wir über grün Haus Stadt Land gehen".split()
    size = 0
    number = 0
    with open(path, "w") as out:
        while size < megabytes * 1e6:
            lines = menu[:dice.choice([0, 0, 1, 2, 4])]
            for _ in range(1 + int(dice.lognormvariate(2.2, 0.9))):
                lines.append(" ".join(dice.choices(sentences, k=dice.randint(1, 6))))
                if dice.random() < 0.01:
                    lines.append(f"Write to user{number}@mail.example.org or call (555) 123-4567.")
                if dice.random() < 0.05:
                    lines.append("Café “quoted” — naïve…")
            if dice.random() < 0.03:
                lines = lines * 3
            if dice.random() < 0.05:
                lines = [" ".join(dice.choices(german, k=80))]
            page = number if dice.random() > 0.02 else dice.randint(0, number)
            document = {"id": str(number), "text": "\n".join(lines),
                        "metadata": {"url": f"http://site/{page}"}}
            size += out.write(json.dumps(document) + "\n")
            number += 1


# ---- python -m tests.bench memory ----------------------------------------------------------------

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
