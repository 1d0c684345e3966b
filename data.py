"""The data: documents -> rules -> mix -> tokens -> shards -> the batch of any step.

    python data.py configs/tiny.py                          # build; print what every rule dropped
    python data.py configs/tiny.py --show=gopher_repetition # look at some of what it dropped
    python data.py trace runs/tiny --step=100               # the documents in that step
    python data.py find runs/tiny --text="Return a new"     # the steps that saw such documents

`trace --help` and `find --help` print their options.

Paper: OLMo (arXiv 2402.00838), section 2.2, and Dolma (arXiv 2402.00159), whose curation this is.
Start with two: `build_data`, from documents to shards, and `Batches`, from shards to the batch of
a step. `Batches` and its helpers follow `build_data`; the helpers of `build_data` come after them,
in the order of its calls.
"""

from support.command import UserError, run_main  # first: Ctrl-C is quiet from here on
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from configs import load_config, setting
from corpus.bpe import sample_texts, train_bpe
from corpus.dedup import (copies_marked, decontaminate, evaluation_paragraphs, evaluation_sets,
                          keys_of, without_copies)
from corpus.documents import parse_documents, read_records, size_of, split_held_out
from corpus.funnel import Funnel, ShowOptions, print_dropped
from corpus.manifest import write_manifest
from corpus.questions import leaked_docstrings
from corpus.rules import CONTENT_SCORERS, LANGUAGE_SCORERS, RULES, Drop, filter_documents
from corpus.sources import check_data_config, parse_sources
from corpus.stages import Stages, Workers, build_once, in_batches, link_files, written_aside
from corpus.storage import (DOCUMENT_INDEX, ShardWriter, blocks_of, hash_of_id, mapped_order,
                            read_block, shards_of, store_documents, token_dtype, tokenizer_digest,
                            vocabulary_of)
from corpus.token_files import write_token_list
from corpus.tokenizer import Tokenizer, tokenizer_at, tokenizer_file
from support.bars import bar
from support.files import read_json, to_json, write_json

SHARD_TOKENS = 2**28  # a shard is closed before the document that would exceed this


@dataclass(frozen=True)
class DataConfig:
    """What the model reads, and in which order."""

    # what is read, and where the result goes
    data_dir: str = setting(
        "datasets/stdlib", "Folder for built data; each set of sources and settings gets a folder "
        "of its own in it.")
    sources: dict[str, str | dict] = setting(
        {"reference": "stdlib", "docstrings": "stdlib", "code": "stdlib"},
        'Name -> {"path": ..., "rules": "web", "weight": 1}, or the path alone: files of .jsonl, '
        '.json or .txt; "stdlib" is the embedded source of that name. rules: names in RULES '
        "and RULE_SETS; weight: how often a source is shown (0.5: half of it), or its share of "
        'mix_tokens; text: the key of the text in JSON; separator: cuts a .txt into documents.')
    token_files: str = setting(
        "", "A list of ready token files (the Dolma toolkit's), one path a line; used instead of "
        "sources.")
    allow_truncated: bool = setting(
        False, "Read a file that is cut off as far as it goes, and count it, instead of stopping.")

    # what the rules need to know
    decontaminate: dict[str, str] = setting(
        {}, "Evaluation set -> file or folder; a document that holds a paragraph of it is dropped "
        "(code is exempt).")
    language_scorer: str = setting(
        "stand-in", "One of LANGUAGE_SCORERS in corpus/rules.py; the stand-in is no model, it "
        "counts common words.")
    content_scorer: str = setting(
        "none", "A name in CONTENT_SCORERS (corpus/rules.py); none is built in, add your own.")
    bloom_items: int = setting(
        0, "Items (URLs, texts, paragraphs) of a source in a Bloom filter; 0: exact sets.")
    bloom_fp_rate: float = setting(
        1e-6, "Share of new items that a Bloom filter may take for old ones; 1e-6 is Dolma's for "
        "the web.")
    eval_share: float = setting(
        0.05, "Share of the groups (modules, topics; else documents) held out, by their hash; "
        "of a source that is one text, its end.")

    # the mix and its tokens
    mix_tokens: int = setting(
        0, "Tokens in the mix; the weights are then shares that sum to 1. 0: the weights are "
        "repetitions.")
    max_repeats: float = setting(
        1.0, "How often a source may be shown to fill its share; more is an error.")
    tokenizer: str = setting(
        "bpe:4096", "bpe:N trains N ids on the sources; olmo is OLMo's own; anything else is the "
        "path of a tokenizer.json.")
    seed: int = setting(6198, "Seed of the data order and of the initial weights.")  # OLMo's own
    workers: int = setting(
        0, "Processes that filter and tokenise, 0 for one a core; all give the same result.")

    def __post_init__(self):
        check_data_config(self)

    def parse_sources(self):
        """The sources, a list of Source (name, path, rules, weight); none with token_files."""
        return [] if self.token_files else parse_sources(self.sources, self.mix_tokens)


def build_data(config):
    """Build the data of `config` and return its folder; data that is already built is reused.

    The steps are those of Dolma (OLMo paper, section 2.2): read, decontaminate, filter,
    deduplicate, hold out, tokenise, write shards, mix, and write the manifest.

    The folder holds tokenizer.json, the shards (.bin, .index), documents/ (the clean ones),
    held_out/, dropped/ (examples for each rule) and manifest.json (settings, counts, hashes).
    """
    # Each stage has a folder, named by a hash of its inputs, settings and code. So a changed rule
    # cleans its source again, and a changed weight only mixes again.
    stages = Stages(config)
    if stages.are_done():
        return stages.folder
    with stages.building():  # one process at a time; a crash leaves nothing that is half built
        if stages.are_done():
            return stages.folder  # another process built it while this one waited
        if config.token_files:
            return build_once(stages.folder, write_token_list, config, stages.settings)

        # 1. Documents. The lines from `records` to `lines` only connect generators: store_documents
        # pulls one batch after another through them. A stage that is finished reads nothing.
        clean = {}  # source -> the folder of its clean documents
        for source in config.parse_sources():
            with Workers(config.workers) as workers:
                funnel = Funnel()  # counts what comes in and what each rule drops
                records = stages.checked(source, read_records(
                    source.path, source.name, funnel.notes, config.allow_truncated, progress=True,
                    separator=source.separator, text_key=source.text))
                filtered = decontaminate_and_filter(records, config, source, workers)
                marked = copies_marked(filtered, config, source)  # which texts came before
                lines = workers.map(partial(finish_batch, config=config, source=source), marked)
                clean[source.name] = build_once(stages.clean(source), store_documents, lines,
                                                workers, source, funnel)

        # 2. Tokens, when all sources are clean: they train the tokenizer; held-out text does not.
        tokenizer = build_once(stages.tokenizer(), write_tokenizer, config, clean)
        shards = {}  # source -> the folder of its shards
        with Workers(config.workers) as workers:
            for source in config.parse_sources():
                encoded = tokenise(source.name, clean[source.name], tokenizer, workers)
                shards[source.name] = build_once(stages.shards(source), store_shards, encoded,
                                                 source.name)

        # 3. The mix, when all sources are tokens: the weights are measured in tokens.
        with written_aside(stages.folder) as folder:
            for stage in (*clean.values(), tokenizer, *shards.values()):
                link_files(stage, folder)
            repeats = repetitions(config, folder)
            mixed = mix_sources(repeats, folder)
            write_manifest(folder, config, repeats, mixed, stages.settings)
    return stages.folder


# ---- The batch of any step ----------------------------------------------------------------------
#
# The data order is a pure function of the step; no loader has a state. The shards are cut into N
# instances of T tokens, and each epoch takes them in an order of its own, G of them a step:
#
#     instance_order    7 2 9   4 0 5   1 8 3   6           N = 10 instances, G = batch_size = 3
#     step of the epoch   1       2       3     not used
#
# So one saved integer resumes a run, another number of GPUs sees the same batches, and `trace`
# finds the documents of any step, with no log of what was read.

def instance_order(n, seed, epoch):
    """The order of the n instances in an epoch: uint32 (n,), as in official OLMo.

    Source: olmo/data/iterable_dataset.py. OLMo-7B's seed is 6198; it saw its data somewhat more
    than once, and its second epoch is shuffled with seed + 1.
    """
    order = np.arange(n, dtype=np.uint32)  # 4 bytes an instance: OLMo-7B has about 1e9 of them
    # PCG64 is named, and is not "the default generator": numpy may change its default
    np.random.Generator(np.random.PCG64(seed + epoch)).shuffle(order)
    return order


class Batches:
    """The batch of any step: `batches(step, rank, world_size)`; steps count from 1.

    Step s of an epoch takes the slice [(s-1)G, sG) of that epoch's order; rank r takes elements r,
    r + world_size, r + 2 world_size, ... of the slice. The last N mod G instances of the order
    are not used in that epoch.

    Each epoch's order is computed once, written to `order_dir` and memory-mapped by all ranks. A
    process that may only read it holds the order in memory. UserError for less than one batch.
    """

    def __init__(self, shards, batch_size, seed, order_dir):
        self.shards = shards
        self.batch_size = batch_size
        self.seed = seed
        self.order_dir = Path(order_dir)
        self.orders = {}  # epoch -> its order, of one epoch at a time
        self.steps_per_epoch = len(shards) // batch_size
        if not self.steps_per_epoch:
            lower = "batch_size" if len(shards) else "max_seq_len"
            raise UserError(f"batch_size={batch_size}: the corpus has {len(shards)} sequences of "
                            f"{shards.seq_len} tokens; lower {lower} or add text")

    def __call__(self, step, rank=0, world_size=1):
        """{tokens, targets: int64 (B, T), loss_mask: bool (B, T)}: this rank's part of the batch.

        B = batch_size / world_size. The target of a token is the next token of its own window, as
        in official OLMo: a window of T tokens has T - 1 targets.
        """
        check_world_size(self.batch_size, world_size)
        # every world_size-th instance, so that the ranks' parts together are the global batch
        instances = self.instances(step)[rank::world_size]
        rows = [self.shards[i] for i in instances]
        tokens = torch.from_numpy(np.stack(rows))
        targets = tokens.roll(-1, dims=1)
        loss_mask = torch.ones_like(tokens, dtype=torch.bool)
        loss_mask[:, -1] = False  # roll put the window's first token there
        # OLMo 1 attends across the documents in a window, and so do we. A document mask is a change
        # here: with ends = (tokens == self.shards.eos_token_id).long(), ends.cumsum(1) - ends
        # numbers the documents of a window; let a token attend only to tokens with its own number
        # (adapt.sft_loss does that, through the network's attn_mask).
        return {"tokens": tokens, "targets": targets, "loss_mask": loss_mask}

    def instances(self, step):
        """The instances of a step's global batch: uint32 (G,)."""
        # epochs count from 0, steps from 1
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        begin = position * self.batch_size
        return self.order(epoch)[begin:begin + self.batch_size]

    def order(self, epoch):
        """The memory-mapped order of an epoch: uint32 (N,)."""
        if epoch in self.orders:
            return self.orders[epoch]
        n = len(self.shards)
        path = self.order_dir / f"order-n{n}-seed{self.seed}-epoch{epoch}.bin"
        self.orders = {epoch: mapped_order(path, lambda: instance_order(n, self.seed, epoch), n)}
        return self.orders[epoch]

    def fingerprint(self):
        """What a resumed run must find unchanged: the data, its order and how it is cut."""
        # of the order too: numpy does not promise that another version shuffles the same way
        return {
            "data_sha256": self.shards.sha256,
            "tokenizer_sha256": tokenizer_digest(self.shards.folder / "tokenizer.json"),
            "seq_len": self.shards.seq_len,
            "instances": len(self.shards),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "order_sha256": hashlib.sha256(self.order(0)).hexdigest(),
        }


def check_world_size(batch_size, world_size):
    """Raise UserError if the ranks' parts differ in size; it names the nearest batch size."""
    rest = batch_size % world_size
    if not rest:
        return
    nearest = batch_size - rest
    if nearest == 0 or world_size - rest < rest:
        nearest += world_size
    raise UserError(f"batch_size={batch_size} is not divisible by {world_size} ranks; the "
                    f"nearest that is: {nearest}")


class TokenShards:
    """The shards as `len(shards)` instances of `seq_len` tokens, in memory-mapped files.

    As in official OLMo, the tokens of a file are cut into windows of seq_len, no matter where
    documents begin or end. The last tokens of a file, too few for a window, are never trained on:
    the end of its last document, or more. UserError for a file that is missing or of a wrong size.
    """

    def __init__(self, folder, seq_len):
        self.folder = Path(folder)
        manifest = read_json(self.folder / "manifest.json")
        self.seq_len = seq_len
        self.sha256 = manifest["sha256"]
        self.eos_token_id = manifest["eos_token_id"]  # ends each document in the shards
        self.tail_tokens = 0  # dropped at the ends of files
        self.files = []  # for each an array (instances, seq_len)
        dtype = np.dtype(manifest["dtype"])
        for shard in manifest["shards"]:
            path = self.folder / shard["file"]
            check_size(path, shard["tokens"] * dtype.itemsize, folder)
            n = shard["tokens"] // seq_len
            # mapped, not read: the operating system loads the pages that a batch touches
            tokens = np.memmap(path, dtype, "r")[:n * seq_len]
            self.files.append(tokens.reshape(n, seq_len))
            self.tail_tokens += shard["tokens"] % seq_len
        # the instances of file i are numbered from starts[i] to ends[i] - 1
        sizes = [len(file) for file in self.files]
        self.ends = np.cumsum(sizes)
        self.starts = self.ends - sizes

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, instance):
        """The tokens of one instance: int64 (T,)."""
        file, row = self.locate(instance)
        return self.files[file][row].astype(np.int64)  # torch indexes embeddings with int64

    def locate(self, instance):
        """Returns (file, row): an instance is row `row` of file number `file`."""
        file = int(np.searchsorted(self.ends, instance, side="right"))
        row = int(instance) - self.starts[file]  # subtle: int, as the uint32 of an order may wrap
        return file, int(row)

    def instances_of(self, file, start, end):
        """The instances that hold any of a file's tokens [start, end); its tail is in none."""
        first_row = start // self.seq_len
        end_row = -(-end // self.seq_len)  # rounded up
        end_row = min(end_row, len(self.files[file]))
        first_of_file = int(self.starts[file])
        return list(range(first_of_file + first_row, first_of_file + end_row))


def check_size(path, expected, folder):
    """Raise UserError if a shard is missing or does not have the `expected` number of bytes."""
    # sizes are checked at every start; hashes are not, as they would read terabytes
    size = path.stat().st_size if path.is_file() else 0
    if size == expected:
        return
    remedy = "restore it"
    if path.parent == folder:  # one that we built; ready token files lie elsewhere
        stages = folder.parent / "stages"
        remedy += f", or delete {folder} and {stages}: the data is then built again"
    raise UserError(f"{path}: {size} bytes, not {expected}; {remedy}")


# ---- Clean documents ----------------------------------------------------------------------------
#
# Workers do what looks at one document at a time, before and after deduplication. That must know
# what came before, and is one pass in the order of the input, in this process: with threads,
# chance decides which copy of a paragraph is kept (it does in Dolma's toolkit).

def decontaminate_and_filter(records, config, source, workers):
    """Yield (documents that pass, what deduplication compares of them, Funnel) of each batch."""
    sets = evaluation_sets(config, source)
    evaluation_paragraphs(sets)  # subtle: fills a cache before the workers are forked from here
    if source.path == "stdlib" and config.eval_share:
        leaked_docstrings(config.eval_share)  # likewise
    work = partial(filter_batch, config=config, source=source, sets=sets)
    yield from workers.map(work, in_batches(records))


def filter_batch(records, config, source, sets):
    """What a worker does first. Returns a batch of decontaminate_and_filter."""
    funnel = Funnel()
    # looked up here, in the worker: a scorer may be a loaded model, which cannot be pickled
    scorers = {"language": LANGUAGE_SCORERS[config.language_scorer],
               "content": CONTENT_SCORERS[config.content_scorer]}
    rules = [rule for rule in source.rules if rule in RULES]
    documents = parse_documents(records, source, funnel)
    # decontamination is first: it must see the text that the rules may edit as it was written
    documents = decontaminate(documents, evaluation_paragraphs(sets), funnel)
    documents = list(filter_documents(documents, rules, funnel, scorers))
    return documents, keys_of(documents, source.rules), funnel


def finish_batch(batch, config, source):
    """What a worker does when the copies are known. Returns (lines, held-out lines, Funnel)."""
    documents, copies, funnel = batch
    lines = {False: [], True: []}  # whether held out -> documents in JSON
    documents = without_copies(documents, copies, funnel)
    for document, held_out in hold_out(documents, config, source, funnel):
        kind = "held-out " if held_out else ""
        funnel.counts[kind + "documents"] += 1
        funnel.counts[kind + "bytes"] += size_of(document["text"])
        lines[held_out].append(to_json(document).encode() + b"\n")
    return lines[False], lines[True], funnel


def hold_out(documents, config, source, funnel):
    """Yield (document, whether it is held out): the text for measuring bits per byte.

    A held-out docstring of the embedded corpus whose text is also in a training document is
    dropped: measured on it, the model would look better than it is.
    """
    # by a hash of its group: the same side in every build, whatever else is in the source
    for document, held_out in split_held_out(documents, config.eval_share, funnel.notes):
        if held_out and source.path == "stdlib":
            if document["id"] in leaked_docstrings(config.eval_share):
                funnel.drop("leaked", document, Drop("held out, but also in a training document"))
                continue
        yield document, held_out


# ---- Tokens and shards --------------------------------------------------------------------------
#
# A shard is a file of token ids without a header, documents one after another with an EOS after
# each, as the Dolma toolkit and OLMo have it. Training maps it into memory: no parsing, no copies.

def write_tokenizer(folder, config, clean):
    """Save the tokenizer that the config names; bpe:N is trained first."""
    kind, _, size = config.tokenizer.partition(":")  # bpe:4096
    if kind == "bpe":
        tokenizer = train_bpe(sample_texts(clean), int(size))
    else:
        tokenizer = Tokenizer.load(tokenizer_file(config.tokenizer))
    tokenizer.save(folder / "tokenizer.json")


def tokenise(source, clean, tokenizer, workers):
    """Yield (ids, index) of each block of a source's clean documents; worker processes encode."""
    blocks = blocks_of(clean, source)  # 64 KiB of JSON lines each
    work = partial(encode_block, folder=clean / "documents", source=source,
                   tokenizer_path=tokenizer / "tokenizer.json")
    encoded = workers.map(work, blocks, together=8)  # 512 KiB a message
    yield from bar(encoded, f"tokenising {source}", len(blocks), "blocks")


def encode_block(block, folder, source, tokenizer_path):
    """Returns (ids, index) of a block of documents, an EOS after each.

    ids: uint16 or uint32 (n,). index: DOCUMENT_INDEX, its tokens counted from the block's start.
    """
    tokenizer = tokenizer_at(tokenizer_path)
    file, begin = block
    eos = np.array([tokenizer.eos_token_id], np.uint32)
    parts = []
    index = []
    end = 0
    for line, row in enumerate(read_block(folder, source, file, begin)):
        document = json.loads(row)
        ids = tokenizer.encode_text(document["text"].strip())  # stripped, as in the toolkit
        start = end
        end = start + len(ids) + 1
        parts += [ids, eos]  # an EOS separates documents; OLMo has no BOS
        index.append((start, end, hash_of_id(document["id"]), file, line, begin))
    ids = np.concatenate(parts)
    # subtle: numpy wraps silently when a large id is cast to uint16, so look before the cast
    if ids.max() >= tokenizer.vocab_size:
        raise AssertionError(f"{source}: id {ids.max()} is beyond the vocabulary")
    return ids.astype(token_dtype(tokenizer.vocab_size)), np.array(index, DOCUMENT_INDEX)


def store_shards(folder, encoded, source):
    """Write the shards of a source and the list of them."""
    shards = write_shards(encoded, folder, source)
    write_json(folder / f"{source}.shards.json", shards)


def write_shards(encoded, folder, name, shard_tokens=SHARD_TOKENS):
    """Write (ids, index) parts as token files without a header; returns the manifest's entries.

    # DIFFERS FROM OLMo: its script cuts a document at a file's cap and loses the rest of it; here
    no document spans two files. NAME-00000.bin holds tokens, .index a DOCUMENT_INDEX row for each
    document.
    """
    shards = []
    writer = None
    for ids, index in encoded:
        for row in index:
            document = ids[row["start"]:row["end"]]  # its EOS included
            # a document that is longer than shard_tokens has a shard of its own
            if writer is None or writer.tokens + len(document) > shard_tokens:
                if writer:
                    shards.append(writer.close())
                writer = ShardWriter(folder, f"{name}-{len(shards):05d}")
            writer.add(document, row)
    if writer:
        shards.append(writer.close())
    return shards


# ---- The mix ------------------------------------------------------------------------------------
#
# The mix is a list of shards. A source that is shown twice has its shards in the list twice: no
# token is copied. Nothing is shuffled here: instance_order shuffles the complete mix in each epoch.

def repetitions(config, folder):
    """{source: how often the mix shows it}, from the weights.

    OLMo 1 showed every source once, in Dolma's natural proportions (82 % web, 13 % code; paper,
    section 2.2); weights came with Dolma 1.7. Raises UserError if a source is too small.
    """
    repeats = {source.name: source.weight for source in config.parse_sources()}
    if not config.mix_tokens:
        return repeats  # weights are repetitions
    for name, share in repeats.items():  # weights are shares of mix_tokens
        tokens = sum(shard["tokens"] for shard in shards_of(folder, name))
        target = share * config.mix_tokens
        repeats[name] = target / tokens
        # a cap, as in OLMo-core: nobody should repeat a small source without knowing it
        if repeats[name] > config.max_repeats:
            raise UserError(f"sources: {name} holds {tokens:,} tokens; its share of mix_tokens="
                            f"{config.mix_tokens:,}, {target:,.0f} tokens, would show it "
                            f"{repeats[name]:.2f} times, over max_repeats={config.max_repeats:g}; "
                            "lower its weight or raise max_repeats")
    return repeats


def mix_sources(repeats, folder):
    """The mix, a list of shards: {file, tokens, documents, sha256, source}, source after source."""
    mixed = []
    for source, times in repeats.items():
        shards = repeat_shards(folder, source, times)
        if not shards:
            raise UserError(f"sources: {source}: its weight shows it {times:g} times, which leaves "
                            "no document; give it more weight")
        mixed += [{**shard, "source": source} for shard in shards]
    return mixed


def repeat_shards(folder, source, times):
    """A source's shards int(times) times, then one shard for the fraction: SOURCE+part-00000.bin.

    That shard holds the documents with the smallest hashes of their ids, until the number of tokens
    is as close to the target as possible.
    """
    shards = shards_of(folder, source)
    repeated = shards * int(times)
    fraction = times % 1  # 2.5 times: all of it twice, then half of its tokens
    if fraction:
        sample = sample_documents(folder, shards, fraction)
        repeated = repeated + write_shards(sample, folder, f"{source}+part")
    return repeated


def sample_documents(folder, shards, fraction):
    """Yield (ids, index) of the sampled documents of each shard: `fraction` of all tokens."""
    dtype = vocabulary_of(Tokenizer.load(folder / "tokenizer.json"))["dtype"]
    paths = [folder / shard["file"] for shard in shards]
    indexes = [np.fromfile(path.with_suffix(".index"), DOCUMENT_INDEX) for path in paths]
    documents = np.concatenate(indexes)
    lengths = documents["end"] - documents["start"]

    # order the documents by their hash, which knows nothing of their length or place in the files
    order = np.argsort(documents["id"], kind="stable")
    # take the first of them, as many as come nearest to the target
    target = fraction * lengths.sum()
    tokens = np.cumsum(lengths[order])
    tokens = np.concatenate([[0], tokens])  # tokens[k]: in the first k documents
    count = np.abs(tokens - target).argmin()
    is_chosen = np.zeros(len(documents), bool)
    is_chosen[order[:count]] = True

    # give them back in the order of the files
    begin = 0
    for path, index in zip(paths, indexes, strict=True):
        end = begin + len(index)
        ids = np.memmap(path, dtype, "r")
        yield ids, index[is_chosen[begin:end]]
        begin = end


# ---- Chats (adapt.py, eval.py --chat, support/talk.py) -------------------------------------------

# The format also lies in support/hf_tokenizer.py (in Jinja) and support/chats.py (its checks).
def render_chat(messages, tokenizer, reply=False):
    """Returns (ids, trained): the token ids of a chat, and for each whether the loss counts it.

    messages: [{role: system, user or assistant, content}]. Trained are the assistant's content and
    the EOS after it; weight=0 beside them leaves both out. The template is Tulu's and OLMo's
    (paper, section 4.3; Open Instruct): EOS in place of a BOS; then for each message `<|role|>`, a
    newline, the stripped content, EOS if it is an assistant's, and a newline; no newline after the
    last EOS. reply=True ends with the header of the answer to be generated.
    """
    ids = [tokenizer.eos_token_id]
    trained = [False]  # the model learns to answer, not to write the user's part

    def add(more, train=False):
        ids.extend(more)
        trained.extend([train] * len(more))

    # Each part is encoded separately, so that we know which ids the loss counts. That gives the
    # same ids as encoding the joined string: no token spans a newline next to stripped text.
    for i, message in enumerate(messages):
        is_assistant = message["role"] == "assistant"
        is_trained = is_assistant and message.get("weight", 1) > 0
        add(tokenizer.encode(f"<|{message['role']}|>\n"))
        add(tokenizer.encode(message["content"].strip()), train=is_trained)
        if is_assistant:
            add([tokenizer.eos_token_id], train=is_trained)  # the model must learn to stop
        if not is_assistant or reply or i < len(messages) - 1:  # none after the chat's last EOS
            add(tokenizer.encode("\n"))
    if reply:
        add(tokenizer.encode("<|assistant|>\n"))
    return ids, trained


def main(argv):
    if argv and argv[0] in ("trace", "find"):
        from corpus.trace import main as trace_main  # only here: it imports this file
        return trace_main(argv)
    from corpus.large_drops import checked_rule, print_funnel
    from scaling.begin import data_settings_of_start, say_other_data  # only here: knows train.py
    from support.bars import prepared
    from train import SCHEMAS  # its keys, which a config file may hold
    config, options = load_config(argv, DataConfig, ShowOptions, siblings=SCHEMAS,
                                  base=data_settings_of_start(argv, (*SCHEMAS, ShowOptions)))
    folder = prepared(build_data, config)
    say_other_data(argv, folder)
    if options.show:
        return print_dropped(folder, checked_rule(folder, options.show))
    print_funnel(folder)


if __name__ == "__main__":
    run_main(main)
