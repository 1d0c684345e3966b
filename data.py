"""The data: raw documents -> a clean mix -> tokens -> batches, and back from any step to its text.

    python data.py configs/tiny.py                          # build; print what every rule dropped
    python data.py configs/tiny.py --show=gopher_repetition # look at some of what it dropped
    python data.py trace runs/tiny --step=100               # the documents in that step
    python data.py find runs/tiny --text="Return a new"     # the steps that saw such documents

`trace --help` and `find --help` print their options.

Paper: OLMo (arXiv 2402.00838), section 2.2, and Dolma (arXiv 2402.00159), whose curation this is.
Parts, in order: configuration, documents, the embedded corpus, filters, the funnel, deduplication
and decontamination, tokenizer, clean documents and shards, the mix, building, batches, trace.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configs import load_config
from corpus.dedup import (BloomFilter, DigestSet, decontaminate, deduplicate, evaluation_paragraphs,
                          evaluation_sets)
from corpus.documents import as_document, input_files, is_held_out, read_records, size_of, warn
from corpus.funnel import Funnel, ShowOptions, print_dropped, print_table
from corpus.questions import leaked_docstrings
from corpus.rules import (CONTENT_SCORERS, DEDUPLICATIONS, LANGUAGE_SCORERS, RULES, Drop,
                          filter_documents)
from corpus.sources import parse_source
from corpus.stages import (DOCUMENT_INDEX, DocumentWriter, ShardWriter, ages_of, blocks_of,
                           building_code, finished, hash_of, hash_of_id, in_batches, input_ages,
                           link_files, ordered_map, read_block, stored_documents, taken)
from corpus.tokenizer import BPE_SAMPLE_CHARS, Tokenizer, tokenizer_at, tokenizer_file, train_bpe
from support.files import Lock, UserError, file_sha256, read_json, run_main, write_json


@dataclass(frozen=True)
class DataConfig:
    """What the model reads, and in which order."""

    data_dir: str = "datasets/stdlib"
    """Where built data lies; each set of sources and settings gets a folder of its own in it."""
    sources: dict[str, str | dict] = field(default_factory=lambda: {
        "reference": "stdlib", "docstrings": "stdlib", "code": "stdlib"})
    """Name -> {"path": ..., "rules": "web", "weight": 1}, or the path alone: a file or folder of
    .jsonl(.gz), .txt; "stdlib" is the embedded source of that name. rules: names in RULES and
    RULE_SETS; weight: how often a source is shown (0.5: half of it), or its share of mix_tokens."""
    mix_tokens: int = 0
    """Tokens in the mix; the weights are then shares that sum to 1. 0: weights are repetitions."""
    max_repeats: float = 1.0
    """How often a source may be shown to fill its share; one that needs more is an error."""
    token_files: str = ""
    """A list of ready token files (of the Dolma toolkit), one path a line; instead of sources."""
    decontaminate: dict[str, str] = field(default_factory=dict)
    """Evaluation set -> file or folder; no document with a paragraph of it stays (code aside)."""
    language_scorer: str = "stand-in"
    """One of LANGUAGE_SCORERS in data.py; the stand-in, no model, counts common words."""
    content_scorer: str = "none"
    """One of CONTENT_SCORERS in data.py, where there is no built-in one."""
    bloom_items: int = 0
    """Items (URLs, texts, paragraphs) of a source that each Bloom filter expects; 0: exact sets."""
    bloom_fp_rate: float = 1e-6
    """Share of new items that a Bloom filter may take for old ones; 1e-6 is Dolma's for the web."""
    allow_truncated: bool = False
    """Read a .gz file that is cut off as far as it goes, and count it, instead of stopping."""
    workers: int = 0
    """Processes that filter and tokenise, 0 for one a core; the result does not depend on it."""
    tokenizer: str = "bpe:4096"
    """bpe:N trains N ids on the sources; olmo is OLMo's own; else the path of a tokenizer.json."""
    seed: int = 6198
    """Seed of the data order and of the initial weights."""
    eval_share: float = 0.05
    """Share of the groups (modules, topics; else documents) held out, chosen by their hash."""

    def __post_init__(self):
        wrong = [(self.language_scorer not in LANGUAGE_SCORERS, "language_scorer",
                  "one of " + ", ".join(LANGUAGE_SCORERS)),
                 (self.content_scorer not in CONTENT_SCORERS, "content_scorer",
                  "one of " + ", ".join(CONTENT_SCORERS)),
                 ("stdlib" in self.decontaminate.values(), "decontaminate",
                  "a file or folder for each set"),
                 (not 0 <= self.eval_share <= 1, "eval_share", "a share between 0 and 1"),
                 (not 0 < self.bloom_fp_rate < 1, "bloom_fp_rate", "a rate between 0 and 1"),
                 (not self.max_repeats > 0, "max_repeats", "more than 0"),
                 *((getattr(self, key) < 0, key, "0 or more")
                   for key in ("seed", "mix_tokens", "bloom_items", "workers"))]
        for is_wrong, key, wanted in wrong:
            if is_wrong:
                raise UserError(f"{key}={getattr(self, key)}: {wanted} is wanted")
        self.parse_sources()

    def parse_sources(self):
        """The sources as a list of Source. Raises UserError for a name, key or rule unknown."""
        sources = [parse_source(name, entry) for name, entry in self.sources.items()]
        if self.token_files:
            return []
        if not sources:
            raise UserError("sources: none; name at least one, --sources=\"{'name': 'path'}\"")
        if self.mix_tokens and abs(sum(source.weight for source in sources) - 1) > 1e-6:
            raise UserError("sources: with mix_tokens the weights are shares; they must sum to 1, "
                            f"not to {sum(source.weight for source in sources):g}")
        return sources


def render_chat(messages, tokenizer, reply=False):
    """The ids of a chat and, as long, whether each is trained: an assistant's text and its EOS.

    messages: [{role: system, user or assistant, content}]. The template is that of Tulu and OLMo
    (paper, section 4.3; Open Instruct): EOS stands for BOS, then for each message `<|role|>`, a
    line break, the stripped content, and a line break, with EOS before it where an assistant ends.
    After the last EOS there is none. reply=True ends with the header of the answer that is wanted.

    Each part is encoded by itself. It is as if the whole were: no token reaches over a line break
    that stripped text stands beside.
    """
    ids, trained = [tokenizer.eos_token_id], [False]

    def add(more, train=False):
        ids.extend(more)
        trained.extend([train] * len(more))
    for number, message in enumerate(messages):
        add(tokenizer.encode(f"<|{message['role']}|>\n"))
        content = tokenizer.encode(message["content"].strip())
        if message["role"] == "assistant":
            add([*content, tokenizer.eos_token_id], train=True)
        else:
            add(content)
        if message["role"] != "assistant" or reply or number < len(messages) - 1:
            add(tokenizer.encode("\n"))
    if reply:
        add(tokenizer.encode("<|assistant|>\n"))
    return ids, trained

SHARD_TOKENS = 2**28  # a shard is closed before the document that would exceed this


def token_dtype(vocab_size):
    """The narrowest unsigned type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def encode_block(block, folder, source, tokenizer_path):
    """(ids, index) of a block's documents, EOS after each; places count from the block's start."""
    tokenizer, parts, index, end = tokenizer_at(tokenizer_path), [], [], 0
    eos = np.array([tokenizer.eos_token_id], np.uint32)
    for line, row in enumerate(read_block(folder, source, *block)):
        document, start = json.loads(row), end
        parts += [tokenizer.encode_text(document["text"].strip()), eos]
        end = start + len(parts[-2]) + 1
        index.append((start, end, hash_of_id(document["id"]), block[0], line, block[1]))
    ids = np.concatenate(parts)
    # subtle: numpy wraps silently when a wide id goes into uint16, so look before the cast
    if ids.max() >= tokenizer.vocab_size:
        raise AssertionError(f"{source}: id {ids.max()} is beyond the vocabulary")
    return ids.astype(token_dtype(tokenizer.vocab_size)), np.array(index, DOCUMENT_INDEX)


def write_shards(encoded, folder, name, shard_tokens=SHARD_TOKENS):
    """Write (ids, index) parts as headerless token files; no document straddles two files.

    # DIFFERS FROM OLMo: its script cuts a document at a file's cap, and lost what came after.
    NAME-00000.bin holds the tokens and .index a DOCUMENT_INDEX row for each document in it.
    Returns the records of the shards.
    """
    shards, out = [], None
    for ids, index in encoded:
        for row in index:
            document = ids[row["start"]:row["end"]]
            if out is None or out.tokens + len(document) > shard_tokens:
                if out:
                    shards.append(out.close())
                out = ShardWriter(folder, f"{name}-{len(shards):05d}")
            out.add(document, row)
    return [*shards, out.close()] if out else shards


# ---- The mix -------------------------------------------------------------------------------------

def repetitions(config, tokens):
    """{source: how often it is shown}, of its weight and {source: tokens}.

    Raises UserError where a source is too small for its share of mix_tokens.
    """
    repeats = {source.name: source.weight for source in config.parse_sources()}
    if not config.mix_tokens:
        return repeats
    for name, part in repeats.items():
        wanted = part * config.mix_tokens
        repeats[name] = wanted / tokens[name]
        if repeats[name] > config.max_repeats:
            raise UserError(f"sources: {name} holds {tokens[name]:,} tokens; its share of "
                            f"mix_tokens={config.mix_tokens:,}, {wanted:,.0f}, would show it "
                            f"{repeats[name]:.2f} times, over max_repeats={config.max_repeats:g}")
    return repeats


def mixed_shards(folder, source, shards, repeats, dtype):
    """The shards that show a source `repeats` times: all of them, over and over, then a part.

    The part, SOURCE+part-00000.bin, is of documents drawn by the hash of their ids, as many as
    bring its tokens within one document of the target.
    """
    whole, part = int(repeats), repeats % 1
    mixed = shards * whole
    if part:
        mixed = mixed + write_shards(some_documents(folder, shards, part, dtype), folder,
                                     f"{source}+part")
    return mixed


def some_documents(folder, shards, part, dtype):
    """(ids, index) of each shard's documents that make `part` of the source's tokens."""
    paths = [folder / shard["file"] for shard in shards]
    indexes = [np.fromfile(path.with_suffix(".index"), DOCUMENT_INDEX) for path in paths]
    every = np.concatenate(indexes)
    lengths, order = every["end"] - every["start"], np.argsort(every["id"], kind="stable")
    reached = np.concatenate([[0], np.cumsum(lengths[order])])
    chosen = np.zeros(len(every), bool)
    chosen[order[:np.abs(reached - part * lengths.sum()).argmin()]] = True
    for path, index in zip(paths, indexes, strict=True):
        yield np.memmap(path, dtype, "r"), index[chosen[:len(index)]]
        chosen = chosen[len(index):]


# ---- Building: stages ----------------------------------------------------------------------------

def build_data(config):
    """The folder of the built data of `config`; built first if it is not there.

    It holds tokenizer.json, the shards (.bin, .index), documents/ (the clean ones), held_out/,
    dropped/ (examples of each rule) and manifest.json: settings, funnel, hashes. Stages that are
    finished are kept in data_dir/stages, each named by the hash of its settings and inputs; every
    folder is written under another name and renamed when whole.
    """
    folder, settings = data_folder(config)
    if (folder / "manifest.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Lock(folder.parent / ".lock", on_wait=print_wait):  # it may find it built
            for leftover in (*folder.parent.glob("*.tmp"), *folder.parent.glob("stages/*.tmp")):
                shutil.rmtree(leftover, ignore_errors=True)
            if not (folder / "manifest.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
            build = write_token_list if config.token_files else write_data
            return finished(folder, partial(build, config, settings))
    except BrokenProcessPool:
        raise UserError("a worker process was killed, most likely for want of memory; try fewer: "
                        "--workers=1") from None
    except OSError as error:
        raise UserError(f"{folder}: the data could not be built ({error})") from None


def print_wait(holder):
    print(f"data: waiting for another process that builds here ({holder})")


def data_folder(config):
    """(folder, settings) of the data of `config`, built or not: the name is the settings' hash."""
    settings = {"code": building_code()}
    if config.token_files:
        settings["token_files"] = ages_of(listed_token_files(config))
    else:
        sources = config.parse_sources()
        settings["clean"] = {source.name: clean_settings(config, source) for source in sources}
        settings["mix"] = [(source.name, source.weight) for source in sources], config.mix_tokens
    settings["tokenizer"] = tokenizer_settings(config)
    return Path(config.data_dir) / hash_of(settings)[:12], settings


def clean_settings(config, source):
    """All that the clean documents of a source depend on, the code of the rules included."""
    settings = {"path": source.path, "rules": source.rules, "inputs": input_ages(source.path),
                "eval_share": config.eval_share, "allow_truncated": config.allow_truncated,
                "code": building_code()}
    if set(source.rules) & set(DEDUPLICATIONS):
        settings["bloom"] = config.bloom_items, config.bloom_fp_rate
    if sets := evaluation_sets(config, source):
        settings["decontaminate"] = sets
    settings.update((rule, name) for rule, name in scorer_names(config).items()
                    if rule in source.rules)
    return settings


def scorer_names(config):
    return {"language": config.language_scorer, "content": config.content_scorer}


def tokenizer_settings(config):
    kind, _, size = config.tokenizer.partition(":")
    if kind == "bpe" and not size.isdigit():
        raise UserError(f"tokenizer={config.tokenizer}: write bpe:N, N ids, such as bpe:4096")
    return config.tokenizer if kind == "bpe" else file_sha256(tokenizer_file(config.tokenizer))


def write_data(config, settings, folder):
    """Clean, tokenise and mix every source into `folder`, and write the manifest."""
    sources, stages, clean = config.parse_sources(), folder.parent / "stages", settings["clean"]
    announce_memory(config, sources)
    cleaned = {source.name: finished(
        stages / f"clean-{source.name}-{hash_of(clean[source.name])[:12]}",
        partial(write_clean_documents, config, source)) for source in sources}
    # a trained tokenizer depends on all the clean documents, another one on none
    made = [settings["code"], settings["tokenizer"], config.tokenizer.startswith("bpe:") and clean]
    tokenizer = finished(stages / f"tokenizer-{hash_of(made)[:12]}",
                         partial(write_tokenizer, config, cleaned))
    tokenised = {name: finished(
        stages / f"tokens-{name}-{hash_of([made, clean[name]])[:12]}",
        partial(write_tokens, config, name, cleaned[name], tokenizer / "tokenizer.json"))
        for name in cleaned}
    for stage in (*cleaned.values(), tokenizer, *tokenised.values()):
        link_files(stage, folder)
    write_manifest(config, settings, folder)


def announce_memory(config, sources):
    """Say what the Bloom filters will take, before anything is read."""
    if config.bloom_items:
        size = BloomFilter.bits_for(config.bloom_items, config.bloom_fp_rate) / 8e6
        most = max(len(set(source.rules) & set(DEDUPLICATIONS)) for source in sources)
        print(f"data: up to {most} Bloom filters at a time of {size:,.1f} MB each, for "
              f"{config.bloom_items:,} items at a false-positive rate of {config.bloom_fp_rate:g}")


# -- the clean stage of a source

def write_clean_documents(config, source, folder):
    """Decontaminate, filter and deduplicate a source, and set its held-out share aside."""
    funnel, counts = Funnel(), Counter()
    for name in ("documents", "held_out", "dropped"):
        (folder / name).mkdir()
    writer = DocumentWriter(folder / "documents", source.name)
    with open(folder / "held_out" / f"{source.name}.jsonl", "w") as held_out:
        for document in clean_documents(config, source, funnel):
            size = size_of(document["text"])
            if not is_held_out(document, config.eval_share):
                counts.update({"documents": 1, "bytes": size})
                writer.add(document)
            elif is_leaked(document, source, config):
                funnel.drop("leaked", document, Drop("held out, but also in a training document"))
            else:
                counts.update({"held-out documents": 1, "held-out bytes": size})
                held_out.write(json.dumps(document) + "\n")
    writer.close()
    if not writer.blocks:
        dropped_by = ", ".join(funnel.rules) or "none"
        raise UserError(
            f"sources: {source.name} ({source.path}) holds no document with text to train on: "
            f"{funnel.counts['documents in']} documents and {funnel.counts['bad lines']} bad lines "
            f"were read; eval_share={config.eval_share} and the rules (those that dropped some: "
            f"{dropped_by}) left none")
    np.array(writer.blocks, "<i8").tofile(folder / f"{source.name}.blocks")
    with open(folder / "dropped" / f"{source.name}.jsonl", "w") as dropped:
        dropped.writelines(json.dumps({"rule": rule, **example}) + "\n"
                           for rule, examples in funnel.examples.items() for example in examples)
    write_json(folder / f"{source.name}.funnel.json", {**funnel.as_json(), **counts})


def is_leaked(document, source, config):
    return source.path == "stdlib" and document["id"] in leaked_docstrings(config.eval_share)


def clean_documents(config, source, funnel):
    """Yield what decontamination, filters and deduplication leave of a source, in its order."""
    seen = {level: BloomFilter(config.bloom_items, config.bloom_fp_rate) if config.bloom_items
            else DigestSet() for level in source.rules if level in DEDUPLICATIONS}
    sets = evaluation_sets(config, source)
    evaluation_paragraphs(sets)
    ages = input_ages(source.path)
    total = None if source.path == "stdlib" else sum(size for _, size, _ in ages)
    with tqdm(desc=f"cleaning {source.name}", total=total, unit="B", unit_scale=True,
              leave=False) as bar:
        records = read_records(source.path, source.name, funnel.notes, config.allow_truncated,
                               bar.update)
        filtered = ordered_map(partial(filter_batch, source=source, scorers=scorer_names(config),
                                       sets=sets), in_batches(records), config.workers)
        yield from deduplicate(taken(filtered, funnel), seen, funnel)
    for level, items in seen.items():
        if config.bloom_items and items.count > config.bloom_items:
            warn(f"{source.name}: the {level} filter took {items.count:,} items; its rate of false "
                 f"positives is now {items.fp_rate():.2g}; raise bloom_items")


def filter_batch(records, source, scorers, sets):
    """(documents that stay, funnel of the rest) of a batch of records: what workers do."""
    funnel = Funnel()
    scorers = {"language": LANGUAGE_SCORERS[scorers["language"]],
               "content": CONTENT_SCORERS[scorers["content"]]}
    rules = [rule for rule in source.rules if rule in RULES]
    documents = decontaminate(sound_documents(records, source.name, funnel),
                              evaluation_paragraphs(sets), funnel)
    return list(filter_documents(documents, rules, funnel, scorers)), funnel


def sound_documents(records, source, funnel):
    """The documents in `records`; a bad one is counted and reported."""
    for record in records:
        try:
            document = as_document(record, source, funnel.notes)
        except UserError as error:
            funnel.bad_line(str(error))
            continue
        funnel.counts.update({"documents in": 1, "bytes in": size_of(document["text"])})
        yield document


# -- the tokenizer, the tokens, the manifest

def write_tokenizer(config, cleaned, folder):
    """The tokenizer that the config names, trained first if it says bpe:N."""
    kind, _, size = config.tokenizer.partition(":")
    if kind == "bpe":
        tokenizer = train_bpe(sample_texts(cleaned), int(size))
    else:
        tokenizer = Tokenizer.load(tokenizer_file(config.tokenizer))
    tokenizer.save(folder / "tokenizer.json")


def sample_texts(cleaned):
    """The first clean texts of each source, to learn a tokenizer from."""
    for source, folder in cleaned.items():
        room = BPE_SAMPLE_CHARS
        for document in stored_documents(folder, source):
            if room <= 0:
                break
            room -= len(document["text"])
            yield document["text"]


def write_tokens(config, source, cleaned, tokenizer_path, folder):
    """Tokenise the clean documents of a source into shards."""
    blocks = blocks_of(cleaned, source)
    encoded = ordered_map(partial(encode_block, folder=cleaned / "documents", source=source,
                                  tokenizer_path=tokenizer_path), blocks, config.workers)
    bar = tqdm(encoded, desc=f"tokenising {source}", total=len(blocks), leave=False)
    write_json(folder / f"{source}.shards.json", write_shards(bar, folder, source))


def write_manifest(config, settings, folder):
    """Mix the shards and write manifest.json; its sha256 stands for all that training reads."""
    vocabulary = vocabulary_of(Tokenizer.load(folder / "tokenizer.json"))
    shards = {source.name: json.loads((folder / f"{source.name}.shards.json").read_text())
              for source in config.parse_sources()}
    tokens = {name: sum(shard["tokens"] for shard in shards[name]) for name in shards}
    repeats = repetitions(config, tokens)
    mixed = [{**shard, "source": name} for name in shards for shard in mixed_shards(
        folder, name, shards[name], repeats[name], np.dtype(vocabulary["dtype"]))]
    mix_tokens = Counter()
    for shard in mixed:
        mix_tokens[shard["source"]] += shard["tokens"]
    for name in set(shards) - set(mix_tokens):
        raise UserError(f"sources: {name}, shown {repeats[name]:g} times, leaves no document; give "
                        "it more weight")
    sources = {source.name: {
        "path": source.path, "rules": source.rules,
        **read_json(folder / f"{source.name}.funnel.json"), "tokens": tokens[source.name],
        "repeats": repeats[source.name], "mix_tokens": mix_tokens[source.name],
        "share": mix_tokens[source.name] / mix_tokens.total(),
        "decontaminated": [name for name, *_ in settings["clean"][source.name].get(
            "decontaminate", ())]}
        for source in config.parse_sources()}
    identity = [file_sha256(folder / "tokenizer.json"),
                [(shard["file"], shard["sha256"]) for shard in mixed],
                [file_sha256(folder / "held_out" / f"{name}.jsonl") for name in sources]]
    write_json(folder / "manifest.json", {
        "sha256": hash_of(identity), **vocabulary, "sources": sources,
        "scorers": scorer_names(config), "decontaminate": config.decontaminate,
        "evaluation_files": {
            name: [file_sha256(file) for file in input_files(Path(path), Counter())]
            for name, path in config.decontaminate.items()},
        "shards": mixed, "settings": settings})


def vocabulary_of(tokenizer):
    return {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "dtype": token_dtype(tokenizer.vocab_size).name}


def listed_token_files(config):
    """The paths in the list of token files, which is relative to its own folder."""
    if not Path(config.token_files).is_file():
        raise UserError(f"token_files={config.token_files}: no such list of token files; the "
                        "README tells under Real Dolma how to get one")
    root, paths = Path(config.token_files).absolute().parent, []
    for line in map(str.strip, Path(config.token_files).read_text().splitlines()):
        if line and not line.startswith("#"):
            paths.append(root / line)
            if not paths[-1].is_file():
                raise UserError(f"{paths[-1]}: named in {config.token_files} but not there; fetch "
                                "it")
    if not paths:
        raise UserError(f"token_files={config.token_files}: names no file; write one path a line")
    return paths


def write_token_list(config, settings, folder):
    """A manifest for ready token files, which stay where they are: the Dolma toolkit's and OLMo's.

    They are raw ids without a header, whatever their suffix says; the order of the list counts.
    """
    tokenizer = Tokenizer.load(tokenizer_file(config.tokenizer))
    tokenizer.save(folder / "tokenizer.json")
    shards = [token_file(path, tokenizer) for path in listed_token_files(config)]
    identity = [[shard["tokens"], shard["ends"]] for shard in shards]
    write_json(folder / "manifest.json", {
        "sha256": hash_of([settings["tokenizer"], identity]), **vocabulary_of(tokenizer),
        "sources": {}, "shards": shards, "settings": settings})


def token_file(path, tokenizer):
    """The record of a raw token file, with a hash of its two ends; UserError if it is none."""
    dtype, sample = token_dtype(tokenizer.vocab_size), 2**20
    with open(path, "rb") as file:
        first = file.read(sample)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - sample))
        last = file.read()
    if not size or size % dtype.itemsize or first.startswith(b"\x93NUMPY"):
        raise UserError(f"{path}: not a raw file of {dtype.name} ids, as the Dolma toolkit writes")
    most = max(np.frombuffer(part, dtype).max() for part in (first, last))
    if most >= tokenizer.vocab_size:
        raise UserError(f"{path}: id {most} is beyond the tokenizer's {tokenizer.vocab_size}")
    return {"file": str(path), "tokens": size // dtype.itemsize,
            "ends": hashlib.sha256(first + last).hexdigest()}


# ---- Batches -------------------------------------------------------------------------------------

class TokenShards:
    """The built shards as `len(shards)` instances of `seq_len` tokens, in memory-mapped files.

    As in official OLMo an instance never spans files and a file's tail is dropped, while documents
    flow across instances. Raises UserError for a file that is missing or of the wrong size.
    """

    def __init__(self, folder, seq_len):
        folder = Path(folder)
        manifest = read_json(folder / "manifest.json")
        dtype = np.dtype(manifest["dtype"])
        self.files, sizes, self.tail_tokens = [], [], 0
        for shard in manifest["shards"]:
            path = folder / shard["file"]
            size = path.stat().st_size if path.is_file() else 0
            if size != shard["tokens"] * dtype.itemsize:
                raise UserError(f"{path}: {size} bytes, not {shard['tokens'] * dtype.itemsize}; "
                                f"restore it, or delete {folder} and {folder.parent / 'stages'}: "
                                "the data is then built anew")
            n = shard["tokens"] // seq_len
            tokens = np.memmap(path, dtype, "r")[:n * seq_len]
            self.files.append(tokens.reshape(n, seq_len))
            sizes.append(n)
            self.tail_tokens += shard["tokens"] % seq_len
        self.seq_len, self.sha256 = seq_len, manifest["sha256"]
        self.ends = np.cumsum(sizes)  # of each file, in instances

    def __len__(self):
        return int(self.ends[-1])

    def locate(self, instance):
        """(which file, which instance in it) of an instance."""
        file = int(np.searchsorted(self.ends, instance, side="right"))
        return file, int(instance - (self.ends[file - 1] if file else 0))

    def instances_of(self, file, start, end):
        """The instances that hold tokens start to end of a file; its tail is in none."""
        first = int(self.ends[file]) - len(self.files[file])
        rows = range(start // self.seq_len, -(-end // self.seq_len))
        return [first + row for row in rows if row < len(self.files[file])]

    def __getitem__(self, instance):
        """The tokens of one instance, int64 (T,)."""
        file, row = self.locate(instance)
        return self.files[file][row].astype(np.int64)


def instance_order(n, seed, epoch):
    """The order of epoch `epoch`, uint32 (n,): official OLMo's PCG64(seed + epoch) shuffle."""
    order = np.arange(n, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed + epoch)).shuffle(order)
    return order


class Batches:
    """The batch of any step, a pure function: `batches(step, rank, world_size)`.

    Step s, counted from 1, takes slice [(s-1)G, sG) of its epoch's order, G = batch_size sequences;
    the N mod G instances at the end of an epoch's order are not seen in it. The orders are written
    once into `order_dir` and memory-mapped. Raises UserError for a corpus below one batch.
    """

    def __init__(self, shards, batch_size, seed, order_dir):
        self.shards, self.batch_size, self.seed = shards, batch_size, seed
        self.order_dir = Path(order_dir)
        self.steps_per_epoch = len(shards) // batch_size
        self.orders = {}
        if not self.steps_per_epoch:
            raise UserError(f"the corpus makes {len(shards)} sequences of {shards.seq_len} tokens, "
                            f"fewer than one batch of {batch_size}; lower batch_size or add text")

    def order(self, epoch):
        """The memory-mapped order of an epoch."""
        if epoch not in self.orders:
            n = len(self.shards)
            path = self.order_dir / f"order-n{n}-seed{self.seed}-epoch{epoch}.bin"
            with Lock(self.order_dir / ".lock", on_wait=print_wait):
                if not path.is_file() or path.stat().st_size != 4 * n:
                    aside = path.with_name(path.name + ".tmp")
                    aside.write_bytes(instance_order(n, self.seed, epoch).tobytes())
                    aside.rename(path)
            self.orders = {epoch: np.memmap(path, np.uint32, "r")}
        return self.orders[epoch]

    def instances(self, step):
        """The instances (G,) of a step's global batch."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        return self.order(epoch)[position * self.batch_size:(position + 1) * self.batch_size]

    def __call__(self, step, rank=0, world_size=1):
        """{tokens, targets: int64 (B, T), loss_mask: bool (B, T)}: this rank's share of the step.

        Targets are the tokens shifted inside the window, as in official OLMo: T - 1 a window.
        """
        if self.batch_size % world_size:
            near = min((n for n in range(world_size, 2 * self.batch_size + world_size, world_size)),
                       key=lambda n: abs(n - self.batch_size))
            raise UserError(f"batch_size={self.batch_size} does not divide by {world_size} ranks; "
                            f"the nearest that does is {near}")
        rows = [self.shards[i] for i in self.instances(step)[rank::world_size]]
        tokens = torch.from_numpy(np.stack(rows))
        loss_mask = torch.ones_like(tokens, dtype=torch.bool)
        loss_mask[:, -1] = False  # its target would be the next window's first token
        return {"tokens": tokens, "targets": tokens.roll(-1, 1), "loss_mask": loss_mask}

    def fingerprint(self):
        """What a resumed run must find unchanged: the data, the order and how it is cut."""
        return {"data_sha256": self.shards.sha256, "seq_len": self.shards.seq_len,
                "instances": len(self.shards), "batch_size": self.batch_size, "seed": self.seed,
                "order_sha256": hashlib.sha256(self.order(0)).hexdigest()}


def main(argv):
    verb = argv[0] if argv and argv[0] in ("trace", "find") else None
    if not verb:
        config, options = load_config(argv, DataConfig, ShowOptions)
        folder = build_data(config)
        print_dropped(folder, options.show) if options.show else print_table(folder)
        return
    from corpus.trace import FindOptions, TraceOptions, print_found, print_trace
    runs = [word for word in argv[1:] if not word.startswith("-")]
    options = [word for word in argv[1:] if word.startswith("-")]
    [options] = load_config(options, TraceOptions if verb == "trace" else FindOptions)
    if len(runs) != 1:
        raise UserError(f"{verb}: name one run, such as runs/tiny; --help shows the form")
    (print_trace if verb == "trace" else print_found)(runs[0], options)


if __name__ == "__main__":
    run_main(main)
