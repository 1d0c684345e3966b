"""From a step to its documents, and from a document to the steps that saw it."""

import bisect
import csv
import gzip
import itertools
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configs import load_config
from corpus.stages import DOCUMENT_INDEX, blocks_of, hash_of_id, held_out_files, read_block
from corpus.tokenizer import Tokenizer
from data import Batches, DataConfig, TokenShards
from support.files import UserError, log_rows, read_json


@dataclass(frozen=True)
class TraceOptions:
    """What `trace` shows."""

    step: int = 1
    """The step, counted from 1."""
    rank: int = -1
    """Only the sequences of this rank of world_size; -1 for all."""
    world_size: int = 0
    """How many ranks the step had; 0 is what the log says."""
    chars: int = 200
    """Characters of each document's part that are printed; 0 for all."""


@dataclass(frozen=True)
class FindOptions:
    """What `find` looks for: one of the two."""

    doc: str = ""
    """The id of a document."""
    text: str = ""
    """Text that stands in a document, exactly so."""
    limit: int = 10
    """Documents that are shown; the rest are counted."""


class Span(NamedTuple):
    """The part of a document that stands in one sequence of a step's batch."""
    sequence: int  # of the global batch; rank = sequence % world_size
    instance: int
    tokens: tuple  # begin and end in the sequence
    document_tokens: tuple  # begin and end in the document, EOS included
    document: dict  # id, text, source, metadata: the clean document


class RunData:
    """The data of a run as it was trained on, for looking things up in it."""

    def __init__(self, run):
        run = Path(run)
        if not (run / "manifest.json").is_file():
            raise UserError(f"{run}: no run is there (no manifest.json); train.py makes one")
        settings = read_json(run / "config.json")
        if "method" in settings:
            raise UserError(f"{run}: was tuned by adapt.py; ask for the run that it started from")
        [config] = load_config([str(run / "config.json")], DataConfig)
        self.run, self.settings = run, settings
        self.folder = data_of_run(run, config)
        self.manifest = read_json(self.folder / "manifest.json")
        self.shards = TokenShards(self.folder, settings["max_seq_len"])
        self.batches = Batches(self.shards, settings["batch_size"], config.seed, self.folder)
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        self.index, self.block = lru_cache(8)(self.read_index), lru_cache(self.read_block)

    def steps_done(self):
        """The last step that the run has logged or saved."""
        saved = [int(step.name[4:]) for step in self.run.glob("step*") if step.name[4:].isdigit()]
        return max([0, *saved, *(row["step"] for row in log_rows(self.run))])

    def ranks_at(self, step):
        """How many ranks took a step, by the log's first row from it on, or its last; else 1."""
        rows = [row for row in log_rows(self.run) if "world_size" in row]
        return next((row for row in rows if row["step"] >= step),
                    rows[-1] if rows else {"world_size": 1})["world_size"]

    def read_index(self, shard):
        """(DOCUMENT_INDEX, names) of shard number `shard`; names: of a ready token file's rows."""
        path = self.folder / self.manifest["shards"][shard]["file"]
        if "source" in self.manifest["shards"][shard]:
            return np.memmap(path.with_suffix(".index"), DOCUMENT_INDEX, "r"), None
        return read_sidecar(path.with_suffix(".csv.gz"))

    def trace(self, step, rank=0, world_size=1):
        """The Spans of a rank's share of a step, sequence by sequence."""
        sequences = list(enumerate(self.batches.instances(step).tolist()))[rank::world_size]
        sequences.sort(key=lambda entry: entry[1])  # each shard's index is then read once
        return sorted(span for entry in sequences for span in self.spans(*entry))

    def spans(self, sequence, instance):
        shard, row = self.shards.locate(instance)
        begin, end = row * self.shards.seq_len, (row + 1) * self.shards.seq_len
        index, _ = self.index(shard)
        # subtle: bisect looks at a few rows, where np.searchsorted would copy the whole column
        first = bisect.bisect_right(index["end"], begin)
        last = bisect.bisect_left(index["start"], end)
        for entry in index[first:last]:
            start, stop = max(begin, int(entry["start"])), min(end, int(entry["end"]))
            yield Span(sequence, instance, (start - begin, stop - begin),
                       (start - int(entry["start"]), stop - int(entry["start"])),
                       self.document(shard, entry))

    def document(self, shard, entry):
        """The clean document of an index entry; of a ready token file its name alone."""
        names = self.index(shard)[1]
        if names:
            name, origin, line = names[entry["line"]]
            return {"id": name, "source": "", "metadata": {"provenance": f"{origin}:{line}"}}
        return json.loads(self.block(self.manifest["shards"][shard]["source"],
                                     int(entry["file"]), int(entry["block"]))[entry["line"]])

    def read_block(self, source, file, begin):
        return read_block(self.folder / "documents", source, file, begin)

    def find(self, name, text=""):
        """Yield (document, [instance]) of each document with the id `name`: the instances that hold
        any of it, or of `text` in it.
        """
        found = {}
        for shard in range(len(self.shards.files)):
            index, _ = self.index(shard)
            for entry in index[index["id"] == hash_of_id(name)]:
                document = self.document(shard, entry)
                key = document["source"], document["metadata"]["provenance"]
                if document["id"] == name:
                    start, end = int(entry["start"]), int(entry["end"])
                    ranges = self.token_ranges(document, text) if text else [(0, end - start)]
                    instances = found.setdefault(key, (document, []))[1]
                    for first, last in ranges:
                        instances += self.shards.instances_of(shard, start + first, start + last)
        yield from found.values()

    def token_ranges(self, document, text):
        """[(begin, end)] of the document's tokens in which `text` stands."""
        whole, part = (unicodedata.normalize("NFC", string).encode()
                       for string in (document["text"].strip(), text))
        ids = self.tokenizer.encode_text(document["text"].strip()).tolist()
        ends = np.cumsum([len(self.tokenizer.token_bytes[i]) for i in ids])  # bytes of the text
        return [(int(np.searchsorted(ends, match.start(), side="right")),
                 int(np.searchsorted(ends, match.end())) + 1)
                for match in re.finditer(re.escape(part), whole)]

    def steps_of(self, instances, last_step):
        """[(step, sequence, instance)] up to `last_step` of the batches that hold `instances`."""
        seen, per_epoch = [], self.batches.steps_per_epoch
        for epoch in range(-(-last_step // per_epoch)):
            order = self.batches.order(epoch)[:per_epoch * self.batches.batch_size]
            for position in np.flatnonzero(np.isin(order, instances)).tolist():
                step, sequence = divmod(position, self.batches.batch_size)
                seen.append((epoch * per_epoch + step + 1, sequence, int(order[position])))
        return [where for where in seen if where[0] <= last_step]

    def search(self, text):
        """Yield the clean documents that hold `text`; of ready token files there are none."""
        needle = json.dumps(text)[1:-1].encode()
        for source in self.manifest["sources"]:
            for block in tqdm(blocks_of(self.folder, source), desc=f"searching {source}",
                              leave=False):
                for row in read_block(self.folder / "documents", source, *block):
                    if needle in row and text in (document := json.loads(row))["text"]:
                        yield document


def read_sidecar(path):
    """(DOCUMENT_INDEX, [(id, file, line)]) of a Dolma toolkit's .csv.gz; one nameless if none."""
    if not path.is_file():
        return np.array([(0, 2**62, 0, 0, 0, 0)], DOCUMENT_INDEX), [(f"(no {path.name})", "?", "?")]
    with gzip.open(path, "rt", newline="", encoding="utf-8") as rows:
        rows = [(int(start), int(end), name, origin, line)
                for start, end, name, origin, line in csv.reader(rows)]
    index = [(start, end, hash_of_id(name), 0, i, 0)
             for i, (start, end, name, _, _) in enumerate(rows)]
    return np.array(index, DOCUMENT_INDEX), [row[2:] for row in rows]


def data_of_run(run, config):
    """A built data folder that holds what a run was trained on; the raw sources are not needed."""
    wanted = read_json(run / "manifest.json")["sha256"]
    for manifest in sorted(Path(config.data_dir).glob("*/manifest.json")):
        if read_json(manifest)["sha256"] == wanted:
            return manifest.parent
    raise UserError(f"{config.data_dir}: not the data that {run} was trained on, or none; restore "
                    f"it, or if its sources are as they were: python data.py {run / 'config.json'} "
                    "builds it again (eval.py also takes other text, --suite=PATH)")


def manifests_behind(run, state):
    """Yield the manifests of all data behind a step's weights: its run's, and of those before.

    `state` is of its state.json. UserError where they are not known.
    """
    while True:
        if not state or not (run / "manifest.json").is_file():
            raise UserError(f"{run} has no manifest of its training data")
        if "method" in state["config"]:
            raise UserError(f"what {run} was tuned on was not searched")
        manifest = read_json(run / "manifest.json")
        if state["data"]["data_sha256"] != manifest["sha256"] or state.get("earlier_data"):
            raise UserError(f"the data of {run} changed on the way (--accept_changes)")
        yield manifest
        start, step = state["config"].get("start_from"), state["step"]
        if not start:
            return
        run, state = Path(start).parent, read_json(Path(start) / "state.json")
        if state["step"] >= step:
            raise UserError(f"{start} is not what a run at step {step} can have started from")


def print_trace(run, options):
    """The documents in a step, sequence by sequence."""
    data = RunData(run)
    ranks = options.world_size or data.ranks_at(options.step)
    if options.step < 1 or options.world_size < 0 or not -1 <= options.rank < ranks:
        raise UserError(f"--step={options.step} --rank={options.rank} --world_size={ranks}: steps "
                        "count from 1, ranks from 0 to world_size - 1")
    done = data.steps_done()
    print(f"step {options.step}, epoch {(options.step - 1) // data.batches.steps_per_epoch}"
          + (f", rank {options.rank} of {ranks}" if options.rank >= 0 else "")
          + (f" (not seen: the run is at step {done} of {data.settings.get('max_steps', '?')})"
             if options.step > done else ""))
    share = (0, 1) if options.rank == -1 else (options.rank, ranks)
    for sequence, spans in itertools.groupby(data.trace(options.step, *share),
                                             key=lambda span: span[:2]):
        print("\nsequence {}, instance {}".format(*sequence))
        for span in spans:
            print_span(data, span, options.chars)


def print_span(data, span, chars):
    document, (begin, end) = span.document, span.document_tokens
    edits = document["metadata"].get("edited_by", {})
    print(f"  tokens {span.tokens[0]}-{span.tokens[1]}: {document['id']}  ({document['source']}, "
          f"{document['metadata']['provenance']}, its tokens {begin}-{end}"
          + "".join(f", {rule} cut {n}" for rule, n in edits.items()) + ")")
    text = data.tokenizer.decode(data.shards[span.instance][slice(*span.tokens)].tolist())
    for line in (text[:chars] if chars else text).splitlines():
        print(f"    | {line}")
    if chars and len(text) > chars:
        print(f"    ... {len(text) - chars:,} more characters")


def print_found(run, options):
    """The steps that saw a document, or those with a text in them."""
    if bool(options.doc) == bool(options.text):
        raise UserError("find takes --doc=ID or --text=\"...\", one of them")
    data = RunData(run)
    done = data.steps_done()
    if options.text and not data.manifest["sources"]:
        raise UserError(f"{run}: made of ready token files, whose text is not at hand; --doc=ID "
                        "finds documents by their .csv.gz files")
    if options.doc:
        found = list(data.find(options.doc))
        print(f"{len(found)} documents of the mix have the id {options.doc}")
        print_steps(data, found, done)
        for path in sorted((data.folder / "held_out").glob("*.jsonl")):
            if any(json.loads(row)["id"] == options.doc for row in path.open()):
                print(f"one of {path.stem} is held out")
        return
    count = 0
    for count, wanted in enumerate(data.search(options.text), 1):
        if count <= options.limit:  # an id may stand for several documents
            print_steps(data, [entry for entry in data.find(wanted["id"], options.text)
                               if entry[0] == wanted], done)
    print(f"{count} clean documents hold {options.text!r}"
          + (f"; the first {options.limit} are shown" if count > options.limit else ""))


def print_steps(data, found, done):
    """Where each (document, instances) was seen in the steps 1 to `done`."""
    for document, instances in found:
        steps = data.steps_of(instances, done)
        print(f"{document['id']}  ({document['source']}, {document['metadata']['provenance']})\n"
              f"  in {len(steps)} sequences of steps 1 to {done}"
              + "".join(f"\n  step {step}, sequence {sequence}, instance {instance}"
                        for step, sequence, instance in steps))


def held_out_of(run):
    """{source: file} of the text that a run held out."""
    if not (run / "manifest.json").is_file():
        raise UserError(f"{run}: not a run directory, so it has no held-out text; name something "
                        "else: --suite=PATH, a file or folder of documents, or --suite=core")
    [config] = load_config([str(run / "config.json")], DataConfig)
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
