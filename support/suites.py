"""The suites that a config names: held-out text, Paloma, files and folders, tasks."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from corpus.documents import (as_document, parse, print_line, read_documents, read_records,
                              why_no_text)
from corpus.source_files import input_files, is_there
from support.bars import stage
from support.files import UserError, file_sha256
from support.prompts import read_prompts
from support.tasks import PAPER_METRIC, REQUEST, mmlu, packaged_task, read_task

# The sources of Paloma that the paper reports (4.2). It leaves out those that are not public, code,
# which is not decontaminated, and fringe forums.
PALOMA = ("c4_en", "mc4", "wikitext_103", "ptb", "redpajama", "falcon-refinedweb", "dolma-v1_5",
          "m2d2_s2orc_unsplit", "m2d2_wikipedia_unsplit", "c4_100_domains", "dolma_100_subreddits")


@dataclass(frozen=True)
class Suite:
    """What one word of --suite stands for: domains of documents, or tasks."""

    name: str
    domains: dict  # {name: file or folder}
    tasks: list

    def files(self):
        """The files that it is read from."""
        files = []
        for path in self.domains.values():
            files += input_files(path, Counter())
        for task in self.tasks:
            files += task.files
        return files

    @cached_property
    def digests(self):
        """The SHA-256 of each file, sorted; computed once."""
        return sorted(map(file_sha256, self.files()))


# ---- Suites by their names -----------------------------------------------------------------------

@stage("checking the evaluation sets")
def check_suites(config):
    """UserError for a suite or prompts that config misspells, or whose files hold a fault."""
    read_suites(config, held_out=dict)
    read_prompts(config.prompts)


@stage("reading the evaluation sets")
def open_suites(config, held_out=dict):
    """The Suites that config.suite names, with the digests of their files; see read_suites."""
    suites = read_suites(config, held_out)
    for suite in suites:
        _ = suite.digests  # taken now: a file that changes later was not what is measured
    return suites


def read_suites(config, held_out):
    """The Suites that config.suite names; held_out() returns {source: file} for "domains".

    Every document is read once, so that a faulty one stops the run now, not after hours of
    training. Raises UserError.
    """
    words = [word.strip() for word in config.suite.split(",")]
    if not all(words):
        raise UserError(f"suite={config.suite}: a name is empty; domains is the held-out text")
    suites = [open_suite(word, config, held_out) for word in words]
    names = []
    for suite in suites:
        names += [("domain", name) for name in suite.domains]
        names += [("task", task.name) for task in suite.tasks]
    for kind, name in names:
        if names.count((kind, name)) > 1:
            raise UserError(f"suite={config.suite}: two {kind}s are called {name}; leave one out, "
                            "or rename its file")
    for suite in suites:
        for name, path in suite.domains.items():
            parts = documents_at(path, name, config.subdomain)
            check_not_empty(suite.name, name, path, sum(map(count, parts.values())))
    return suites


def count(documents):
    return sum(1 for _ in documents)


def check_not_empty(suite, name, path, documents):
    """UserError for a domain without documents; a source that holds nothing out is only said."""
    if documents:
        return
    if suite != "domains":
        raise UserError(f"suite={suite}: {path} holds no document; leave it out, or name another")
    print_line(f"suite=domains: {name} holds no document out, so it is not measured; eval_share in "
               "the config is the share that is held out")


def open_suite(word, config, held_out):
    """The Suite of one word. A known name takes precedence over a path: write ./core for a path."""
    kind, _, variant = word.partition(":")
    if word == "domains":
        return Suite(word, held_out(), [])
    if kind == "paloma":
        return paloma(word, variant)
    if kind == "core":
        tasks = [packaged_task(name, variant or "rc_0shot", config) for name in PAPER_METRIC]
    elif kind == "mmlu":
        tasks = [mmlu(variant, config)]
    elif is_there(word):
        return suite_at(word, config)
    else:
        tasks = [packaged_task(kind, variant, config)]
    return Suite(word, {}, tasks)


def suite_at(word, config):
    """The Suite of a path: a task for each request file, or one domain of documents."""
    path = Path(word)
    first = next(read_records(path), None)  # tells which of the two it is
    entry = parse(first) if first else {"text": ""}
    if not isinstance(entry, dict) or not {"text", "request"} & entry.keys():
        why = f"; {why_no_text(entry, None, first.file)}" if isinstance(entry, dict) else ""
        raise UserError(f"{first.place}: neither a document, {{\"text\": text}}, nor a request"
                        f"{why}; {REQUEST}")
    if "request" not in entry:
        return Suite(word, {path.name: path}, [])
    return Suite(word, {}, [read_task(file, config) for file in input_files(path, Counter())])


def paloma(word, folder):
    """The Suite of Paloma's test split: a domain for each source that the paper reports."""
    if not folder:
        raise UserError("suite=paloma: name its folder, --suite=paloma:DIR; the files are gated: "
                        "huggingface.co/datasets/allenai/paloma")
    domains = {name: Path(folder) / name / "test" for name in PALOMA}
    missing = [str(path) for path in domains.values() if not path.is_dir()]
    if missing:
        raise UserError(f"suite={word}: no such folder: {', '.join(missing)}; Paloma's files lie "
                        "in SOURCE/test/*.jsonl.gz")
    return Suite(word, domains, [])


def documents_at(path, name, field=""):
    """{name: documents} of a file or folder; with a field {name/value of the field: documents}."""
    if not field:
        return {name: read_documents(path, name)}
    parts = {}
    for record in read_records(path):
        entry = parse(record)
        document = as_document(record, name, Counter())
        part = entry.get(field, document["metadata"].get(field))
        if not isinstance(part, (str, int)):
            raise UserError(f"{record.place}: subdomain={field}: the document has no such field of "
                            "text; name one that it has")
        parts.setdefault(f"{name}/{part}", []).append(document)
    return dict(sorted(parts.items()))
