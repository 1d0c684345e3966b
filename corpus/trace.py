"""From a step to its documents, and from a document to the steps that saw it.

    step -> instances (Batches) -> tokens of a shard (TokenShards) -> documents (the shard's index)
    -> their text (a block of the clean documents); find goes the same way back.

Both ways are arithmetic and a few look-ups, as the data order is a pure function of the step: no
log of what was read is needed, and it takes seconds in a million instances.
"""

import bisect
import json
import math
import re
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from configs import load_config, setting
from corpus.lineage import data_of_run, order_at, ranks_at
from corpus.storage import DOCUMENT_INDEX, blocks_of, hash_of_id, held_out_files, read_block
from corpus.token_files import read_sidecar
from corpus.tokenizer import Tokenizer
from corpus.trace_lines import print_document, print_texts, print_trace
from corpus.trace_page import write_batch_page
from data import Batches, DataConfig, TokenShards
from scaling.checkpoint import run_of
from support.bars import bar
from support.files import UserError, here, log_rows, read_json
from support.run_hints import not_one_run, runs_below


@dataclass(frozen=True)
class TraceOptions:
    """What `trace` shows."""

    step: int = setting(1, "The step, counted from 1.")
    rank: int = setting(-1, "Only the sequences of this rank of world_size; -1 for all.")
    world_size: int = setting(0, "How many ranks the step had; 0 is what the log says.")
    chars: int = setting(200, "Characters of each document's part to print; 0 for all.", least=0)
    html: str = setting("", "An .html file: write the batch to it as a page, with all characters.")
    data_dir: str = setting("", "Where the run's built data is now, if it has moved.")


@dataclass(frozen=True)
class FindOptions:
    """What `find` looks for: doc or text."""

    doc: str = setting("", "The id of a document.")
    text: str = setting("", "Text that a document holds, with the same spelling and spaces.")
    limit: int = setting(10, "Documents that are shown; the rest are counted.", least=0)
    data_dir: str = setting("", "Where the run's built data is now, if it has moved.")


class Span(NamedTuple):
    """The part of a document that is in one sequence of a step's batch."""
    sequence: int  # its row in the global batch; rank = sequence % world_size
    instance: int
    tokens: tuple  # (begin, end) in the sequence, end exclusive
    document_tokens: tuple  # (begin, end) in the document, whose last token is EOS
    document: dict  # id, text, source, metadata: the clean document


# ---- Looking things up ----------------------------------------------------------------------

class RunData:
    """The data of a run as it was trained on, for looking things up in it.

    A run may have changed its data (--accept_changes): then it is the data of `step`, by default
    the newest. first_step: the first step that was taken on it. data_dir: where it is now, if it
    has moved.
    """

    def __init__(self, run, step=math.inf, data_dir=""):
        self.run = run_of(run)
        if not (self.run / "manifest.json").is_file():
            raise UserError(runs_below(run) or f"{run}{here(run)}: no run is there (no "
                            "manifest.json); name another")
        self.settings = read_json(self.run / "config.json")
        if "method" in self.settings:
            raise UserError(f"{run}: was tuned by adapt.py; name the run that it started from, "
                            f"{self.settings.get('start_from')}")
        [config] = load_config([str(self.run / "config.json")], DataConfig)
        if data_dir:
            config = replace(config, data_dir=data_dir)
        order, self.first_step = order_at(self.run, step)
        self.folder = data_of_run(self.run, config, order["data_sha256"])
        self.manifest = read_json(self.folder / "manifest.json")
        self.shards = TokenShards(self.folder, order["seq_len"])
        self.batches = Batches(self.shards, order["batch_size"], order["seed"], self.folder)
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        self.index = lru_cache(maxsize=8)(self.read_index)  # one shard's may have gigabytes
        self.block = lru_cache(self.read_block)

    def read_index(self, shard):
        """Returns (DOCUMENT_INDEX, names) of a shard; names: see read_sidecar, None for ours."""
        entry = self.manifest["shards"][shard]
        path = self.folder / entry["file"]
        if "source" in entry:
            return np.memmap(path.with_suffix(".index"), DOCUMENT_INDEX, "r"), None
        return read_sidecar(path.with_suffix(".csv.gz"))

    def read_block(self, source, file, begin):
        return read_block(self.folder / "documents", source, file, begin)

    def document(self, shard, entry):
        """The clean document of an index entry; for a ready token file its name alone."""
        names = self.index(shard)[1]
        if names:
            name, origin, line = names[entry["line"]]
            return {"id": name, "source": "", "metadata": {"provenance": f"{origin}:{line}"}}
        source = self.manifest["shards"][shard]["source"]
        block = self.block(source, int(entry["file"]), int(entry["block"]))
        return json.loads(block[entry["line"]])

    def trace(self, step, rank=0, world_size=1):
        """The Spans of a rank's part of a step, sequence by sequence."""
        # numbered in the global batch first, so that a rank's sequences keep their numbers
        instances = self.batches.instances(step).tolist()
        sequences = list(enumerate(instances))[rank::world_size]
        sequences.sort(key=lambda entry: entry[1])  # by instance: each index is then read once
        found = [span for entry in sequences for span in self.spans(*entry)]
        return sorted(found, key=lambda span: (span.sequence, span.tokens))

    def spans(self, sequence, instance):
        """Yield the Spans of one sequence."""
        shard, row = self.shards.locate(instance)
        begin = row * self.shards.seq_len
        end = begin + self.shards.seq_len
        index, _ = self.index(shard)
        # subtle: bisect looks at a few rows, where np.searchsorted would copy the whole column
        first = bisect.bisect_right(index["end"], begin)
        last = bisect.bisect_left(index["start"], end)
        for entry in index[first:last]:  # the documents that overlap [begin, end)
            document_start = int(entry["start"])
            start = max(begin, document_start)
            stop = min(end, int(entry["end"]))
            yield Span(sequence, instance, (start - begin, stop - begin),
                       (start - document_start, stop - document_start),
                       self.document(shard, entry))

    def find(self, name, text=""):
        """Yield (document, [instance]) of each document with the id `name`.

        The instances are those that hold any of the document, or any of `text` in it.
        """
        found = {}  # (source, provenance) -> (document, instances): an id may occur twice
        for shard in range(len(self.shards.files)):
            index, _ = self.index(shard)
            for entry in index[index["id"] == hash_of_id(name)]:
                document = self.document(shard, entry)
                if document["id"] != name:  # another id with the same hash
                    continue
                key = (document["source"], document["metadata"]["provenance"])
                _, instances = found.setdefault(key, (document, []))
                start = int(entry["start"])
                ranges = [(0, int(entry["end"]) - start)]
                if text:
                    ranges = self.token_ranges(document, text)
                for first, last in ranges:
                    instances += self.shards.instances_of(shard, start + first, start + last)
        yield from found.values()

    def token_ranges(self, document, text):
        """[(begin, end)] of the document's tokens that hold `text`, once for each occurrence."""
        # in NFC, as the tokenizer reads it, and in bytes, as its tokens are
        content = unicodedata.normalize("NFC", document["text"].strip())
        needle = unicodedata.normalize("NFC", text)
        ids = self.tokenizer.encode_text(content).tolist()
        sizes = [len(self.tokenizer.token_bytes[i]) for i in ids]
        ends = np.cumsum(sizes)  # of each token, in bytes of the text
        ranges = []
        for match in re.finditer(re.escape(needle.encode()), content.encode()):
            # the tokens of the first and of the last byte of the match
            begin = int(np.searchsorted(ends, match.start(), side="right"))
            end = int(np.searchsorted(ends, match.end())) + 1
            ranges.append((begin, end))
        return ranges

    def steps_of(self, instances, last_step):
        """[(step, sequence, instance)] of the batches up to `last_step` that hold `instances`.

        Steps before first_step were taken on other data, and hold none of them.
        """
        seen = []
        per_epoch = self.batches.steps_per_epoch
        epochs = -(-last_step // per_epoch)  # rounded up
        for epoch in range((self.first_step - 1) // per_epoch, epochs):
            # without the instances at the end of the order, which no step of the epoch uses
            order = self.batches.order(epoch)[:per_epoch * self.batches.batch_size]
            for position in np.flatnonzero(np.isin(order, instances)).tolist():
                step, sequence = divmod(position, self.batches.batch_size)
                step += epoch * per_epoch + 1
                if self.first_step <= step <= last_step:
                    seen.append((step, sequence, int(order[position])))
        return seen

    def search(self, text):
        """Yield the clean documents that hold `text`; ready token files have none."""
        needle = json.dumps(text)[1:-1].encode()  # as it is in a line of JSON: parses few lines
        for source in self.manifest["sources"]:
            blocks = blocks_of(self.folder, source)
            for file, begin in bar(blocks, f"searching {source}", unit="blocks"):
                for line in self.read_block(source, file, begin):
                    if needle not in line:
                        continue
                    document = json.loads(line)
                    if text in document["text"]:  # not in its metadata
                        yield document

    def steps_done(self):
        """The last step that the run has logged or saved."""
        names = [path.name.removeprefix("step") for path in self.run.glob("step*")]
        saved = [int(name) for name in names if name.isdecimal()]  # not step000500.tmp
        return max([0, *saved, *(row["step"] for row in log_rows(self.run))])


def held_out_of(run, data_dir=""):
    """{source: file} of the text that a run held out; data_dir: as for RunData."""
    if not (run / "manifest.json").is_file():
        raise UserError(f"{run}: not a run directory, so it has no held-out text; name something "
                        "else: --suite=PATH, a file or folder of documents, or --suite=core")
    [config] = load_config([str(run / "config.json")], DataConfig)
    config = replace(config, data_dir=data_dir or config.data_dir)
    return held_out_files(data_of_run(run, config))


def places_of_step(run, step):
    """Lines that name the documents in a step's batch and where they come from, for the log."""
    data = RunData(run)
    if not data.manifest["sources"]:  # the side files of ready token files are slow to search
        return [f"sequence {sequence}: instance {instance}"
                for sequence, instance in enumerate(data.batches.instances(step).tolist())]
    places = []
    for span in data.trace(step):
        document = span.document
        places.append(f"sequence {span.sequence}: {document['source']}/{document['id']} "
                      f"{document['metadata']['provenance']}")
    return places


# ---- The commands ---------------------------------------------------------------------------

def main(argv):
    """python data.py trace RUN [--step=N ...]; python data.py find RUN --doc=ID | --text=..."""
    verb = argv[0]
    runs = [word for word in argv[1:] if not word.startswith("-")]
    words = [word for word in argv[1:] if word.startswith("-")]
    [options] = load_config(words, TraceOptions if verb == "trace" else FindOptions)
    if len(runs) != 1:
        raise not_one_run(verb, runs)
    if verb == "trace":
        data = RunData(runs[0], options.step, options.data_dir)
        heading, spans = part_of_step(data, options)
        if options.html:
            write_batch_page(options.html, heading, data, spans)
        else:
            print_trace(heading, data, spans, options.chars)
    else:
        print_found(runs[0], options)


def part_of_step(data, options):
    """Returns (heading, [Span]) of the step and the rank in the options."""
    step = options.step
    rank = options.rank
    world_size = options.world_size or ranks_at(data.run, step)
    # a step that the run has not reached is shown too: the order is known before
    if step < 1:
        raise UserError(f"--step={step}: steps count from 1; {data.run} is at step "
                        f"{data.steps_done()}")
    if options.world_size < 0 or not -1 <= rank < world_size:
        raise UserError(f"--rank={rank} --world_size={world_size}: ranks count from 0 to "
                        "world_size - 1")
    heading = f"step {step}, epoch {(step - 1) // data.batches.steps_per_epoch}"
    if rank >= 0:
        heading += f", rank {rank} of {world_size}"
    spans = data.trace(step, rank, world_size) if rank >= 0 else data.trace(step)
    done = data.steps_done()
    if step > done:
        last = data.settings.get("max_steps", "?")
        heading += f" (not seen: the run is at step {done} of {last})"
    return heading, spans


def print_found(run, options):
    """Print the steps that saw a document, or documents that hold a text."""
    if bool(options.doc) == bool(options.text):
        raise UserError("find: write --doc=ID or --text=\"...\", one of the two")
    data = RunData(run, data_dir=options.data_dir)
    if options.doc:
        print_document(data, options.doc)
    elif data.manifest["sources"]:
        print_texts(data, options.text, options.limit)
    else:
        raise UserError(f"{run}: --text: trained on ready token files, whose text is not here; "
                        "--doc=ID finds documents by their .csv.gz files")
