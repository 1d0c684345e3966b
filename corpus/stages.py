"""The stages of build_data: each built once, complete or absent after a crash, in processes.

    data_dir/stages/clean-SOURCE-HASH/      documents/, held_out/, dropped/, the funnel's counts
    data_dir/stages/tokenizer-HASH/         tokenizer.json
    data_dir/stages/tokens-SOURCE-HASH/     the shards of a source
    data_dir/HASH/                          hard links to all of these, and manifest.json
    data_dir/inputs.json                    the input files' digests (corpus/inputs.py)
"""

import ast
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path

from corpus.dedup import evaluation_sets
from corpus.documents import alone_marked
from corpus.inputs import check_unchanged, input_digests, inputs_of, state_of
from corpus.rules import DEDUPLICATIONS
from corpus.sources import check_outside
from corpus.storage import hash_of, in_groups
from corpus.token_files import listed_token_files
from corpus.tokenizer import tokenizer_file
from support.files import (UserError, disk_remedy, file_sha256, fsync, fsync_all,
                           link_or_copy)
from support.lock import Lock

ROOT = Path(__file__).resolve().parent.parent
BATCH_BYTES = 2**19  # of records that a worker receives at a time

# The files whose code decides what a stage contains.
STAGE_FILES = {
    "clean": ("data.py", "corpus/arrow_values.py", "corpus/dedup.py", "corpus/documents.py",
              "corpus/funnel.py", "corpus/gopher.py", "corpus/hub_folders.py",
              "corpus/json_lists.py", "corpus/left_out.py", "corpus/lines.py", "corpus/pages.py",
              "corpus/questions.py", "corpus/rules.py", "corpus/source_files.py",
              "corpus/sources.py", "corpus/stages.py", "corpus/stdlib.py", "corpus/storage.py",
              "corpus/tables.py", "corpus/tokenizer.py", "corpus/words.py", "support/text.py"),
    "tokens": ("data.py", "corpus/bpe.py", "corpus/stages.py", "corpus/storage.py",
               "corpus/tokenizer.py"),
    "mix": ("data.py", "corpus/manifest.py", "corpus/storage.py"),
    "token files": ("corpus/storage.py", "corpus/token_files.py", "corpus/tokenizer.py"),
}
# The parts of data.py that build nothing: settings (hashed themselves) and readers of built data.
# A change there rebuilds nothing.
NOT_BUILDING = ("DataConfig", "Batches", "TokenShards", "instance_order", "check_world_size",
                "check_size", "render_chat", "main")


class Stages:
    """The folders of the stages that build the data of `config`.

    The name of each ends with the hash of everything that its content depends on: settings, input
    files (name and content) and code. So a change rebuilds what depends on it, and only
    that: another tokenizer leaves the clean documents, another weight leaves everything but the
    mix. `folder` is that of the built data; `settings` is what its name is the hash of.
    """

    def __init__(self, config):
        self.config = config
        self.data_dir = Path(config.data_dir)
        if config.token_files:
            # their bytes are not hashed: Dolma's have terabytes
            files = listed_token_files(config.token_files)
            ages = [(str(file), *state_of(file)) for file in files]
            self.settings = {"code": building_code("token files"), "token_files": ages}
        else:
            sources = config.parse_sources()
            check_outside(config.data_dir, "data_dir", sources)
            # the path is in the manifest: text that has moved is mixed again, and not cleaned again
            weights = [(source.name, source.weight, source.path) for source in sources]
            self.settings = {
                "code": code_of_mix(),
                "clean": {source.name: clean_settings(config, source) for source in sources},
                "mix": [weights, config.mix_tokens]}
        self.settings["tokenizer"] = tokenizer_settings(config)
        # 12 hex digits, 48 bits: enough to tell a few thousand folders apart
        self.folder = self.data_dir / hash_of(self.settings)[:12]

    def clean(self, source):
        """The folder of a source's clean documents."""
        return self.stage(f"clean-{source.name}", self.settings["clean"][source.name])

    def checked(self, source, records):
        """Yield the records of a source; UserError at their end if its text has changed meanwhile.

        A record that comes alone is marked. The source's stage is named by the digests of its
        files and must hold the text of these very files.
        """
        yield from alone_marked(records)
        for _, path, known in inputs_of(source, self.settings["clean"][source.name]):
            check_unchanged(path, known, self.config.data_dir)

    def tokenizer(self):
        """The folder of the tokenizer."""
        return self.stage("tokenizer", self.tokenizer_inputs())

    def shards(self, source):
        """The folder of a source's shards."""
        inputs = [self.tokenizer_inputs(), self.settings["clean"][source.name]]
        return self.stage(f"tokens-{source.name}", inputs)

    def tokenizer_inputs(self):
        """What a tokenizer depends on: a trained one on the clean documents of all sources."""
        is_trained = self.config.tokenizer.startswith("bpe:")
        documents = self.settings["clean"] if is_trained else None
        return [building_code("tokens"), self.settings["tokenizer"], documents]

    def stage(self, name, settings):
        return self.data_dir / "stages" / f"{name}-{hash_of(settings)[:12]}"

    def are_done(self):
        return (self.folder / "manifest.json").is_file()

    @contextmanager
    def building(self):
        """Hold data_dir for this process and clear what killed builds have left there.

        A second process waits. Raises UserError for a full disk and for a worker that was killed.
        """
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            with Lock(self.data_dir / ".lock", on_wait=print_wait):
                # what has a name without .tmp is complete, so all else may go
                for pattern in ("*.tmp", "stages/*.tmp"):
                    for leftover in self.data_dir.glob(pattern):
                        shutil.rmtree(leftover, ignore_errors=True)
                # write_manifest comes last, so a folder without one was damaged by hand
                if not self.are_done():
                    shutil.rmtree(self.folder, ignore_errors=True)
                yield
        except BrokenProcessPool:  # the system kills a process when memory runs out
            raise UserError("a worker process was killed, most likely because memory ran out; try "
                            "fewer: --workers=1") from None
        except PermissionError as error:  # others' data: built for other settings than these
            raise UserError(f"{self.data_dir}: does not hold the data of this config, and may only "
                            f"be read ({error}); choose another --data_dir") from None
        except OSError as error:
            raise UserError(f"{self.folder}: the data could not be built ({error}); "
                            + disk_remedy(error)) from None


def print_wait(holder):
    print(f"data: waiting for another process that builds here ({holder})")


def clean_settings(config, source):
    """Everything that the clean documents of a source depend on."""
    settings = {"rules": source.rules, "inputs": input_digests(source.path, config.data_dir),
                "eval_share": config.eval_share, "allow_truncated": config.allow_truncated,
                "code": building_code("clean")}
    # only what this source uses: a change of the rest keeps its documents
    if set(source.rules) & set(DEDUPLICATIONS):
        settings["bloom"] = [config.bloom_items, config.bloom_fp_rate]
    sets = evaluation_sets(config, source)
    if sets:
        settings["decontaminate"] = sets
    # only where they are set, so that other sources keep the documents they have
    if source.separator:
        settings["separator"] = source.separator
    if source.text != "text":
        settings["text"] = source.text
    if "language" in source.rules:
        settings["language"] = config.language_scorer
    if "content" in source.rules:
        settings["content"] = config.content_scorer
    return settings


def tokenizer_settings(config):
    """bpe:N as it is; for a tokenizer in a file, the file's hash."""
    kind, _, size = config.tokenizer.partition(":")
    if kind != "bpe":
        return file_sha256(tokenizer_file(config.tokenizer))
    if not size.isdecimal():  # "²".isdigit(), and int() does not take it
        raise UserError(f"tokenizer={config.tokenizer}: write bpe:N, N ids, such as bpe:4096")
    return config.tokenizer


@lru_cache
def building_code(stage):
    """Hash of the code that builds a stage: whoever edits a rule has the documents filtered again.

    Comments and layout are left out, and of data.py what only reads the data, so that a change of
    those rebuilds nothing. A changed docstring or another Python builds again, to be safe.
    """
    code = []
    for file in STAGE_FILES[stage]:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        if file == "data.py":
            tree.body = [node for node in tree.body
                         if getattr(node, "name", "") not in NOT_BUILDING]
        code.append(ast.unparse(tree))  # the code without its comments and layout
    return hash_of(code)


def code_of_mix():
    """The code of the tokens and of their mix; that of the clean documents is in their settings."""
    return [building_code("mix"), building_code("tokens")]


def is_built_by_this_code(settings):
    """Whether the code that built data, by the settings in its manifest, is that of today."""
    codes = [settings["code"], *(clean["code"] for clean in settings["clean"].values())]
    return codes == [code_of_mix()] + [building_code("clean")] * len(settings["clean"])


# ---- Complete or absent ---------------------------------------------------------------------

def build_once(folder, build, *inputs):
    """`folder`; if it does not exist, build(folder under another name, *inputs) makes it first."""
    if not folder.is_dir():
        with written_aside(folder) as aside:
            build(aside, *inputs)
    return folder


@contextmanager
def written_aside(folder):
    """Yields a folder to write into; it gets its name when the block ends, and none if it fails."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        fsync_all(aside)  # first the contents, then the name: a power cut leaves no empty files
        aside.rename(folder)  # one step for the file system: there or not there
        fsync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def link_files(stage, folder):
    """Give `folder` the files of a stage, as hard links where the file system has them."""
    for file in sorted(stage.rglob("*")):
        if not file.is_file():
            continue
        target = folder / file.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(file, target)


# ---- Worker processes -----------------------------------------------------------------------

def in_batches(records):
    """Yield lists of records, each of about BATCH_BYTES: one message to a worker costs less."""
    return in_groups(records, lambda record: size_in_memory(record.content), BATCH_BYTES)


def size_in_memory(content):
    """About the bytes of a Record's content."""
    if isinstance(content, bytes):
        return len(content)
    return sum(len(value) for value in content.values() if isinstance(value, str))


class Workers:
    """Processes that share the work of a stage (0: one a core); they start at the first use.

    `with Workers(2) as workers:` ends them at the end of the block. One is this process itself.
    """

    def __init__(self, count):
        if not count:
            is_linux = sys.platform == "linux"
            count = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count()
        self.count = count
        self.pool = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)  # what an error or Ctrl-C left

    def map(self, function, items, together=1):
        """map(function, items) in order, a few items ahead; `together` of them are a message.

        In order: so the result does not depend on how many workers there are. A few items: so
        memory does not grow with the input. The items of one map may be the results of another:
        messages are worked on in the order in which they are sent, so that none waits for long.
        """
        if self.count == 1:
            yield from map(function, items)
            return
        if not self.pool:
            # forked workers inherit what this process has read; only Linux forks safely
            start = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self.pool = ProcessPoolExecutor(self.count, start, follow_parent, [os.getpid()])
        items = iter(items)
        ahead = deque()  # results that are not taken yet, oldest first
        while group := list(islice(items, together)):
            ahead.append(self.pool.submit(map_all, function, group))
            if len(ahead) > 2 * self.count:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def map_all(function, items):
    return list(map(function, items))


def follow_parent(parent):
    """In a worker: leave Ctrl-C to the parent, and end when the parent does, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all of them

    def end_with_parent():
        while os.getppid() == parent:  # a process without a parent is given another one
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
