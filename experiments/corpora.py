"""The texts of the experiments on data: Python's docstrings with copies, and with a leaked set.

    clean/docstrings.jsonl     all docstrings but those of the evaluation set
    copies/                    the same, and nineteen copies of a tenth of them
    leaked/                    the same as clean/, and ten copies of the evaluation set
    leaked_set.jsonl           the evaluation set: half of the modules that are held out
"""

import hashlib
import os

from corpus.documents import is_held_out
from corpus.questions import leaked_docstrings
from corpus.stdlib import stdlib_documents
from support.files import write_rows

EVAL_SHARE = 0.05  # the default of eval_share: what a build of these files holds out
COPIES = 20  # how often a repeated document is there in all
LEAKS = 10  # how often a document of the evaluation set is in the training text
TRAINED = "not held out"  # a split_group; its hash is above EVAL_SHARE


def write_corpora(folder):
    """Write the files into `folder`, which must not exist; it is complete or absent."""
    if folder.is_dir():
        return
    print("experiments: writing the texts with copies and with a leaked set")
    aside = folder.with_name(folder.name + ".tmp")
    documents, evaluation_set = docstrings()
    repeated = [document for document in documents
                if share_of(document) < 0.1 and not is_held_out(document, EVAL_SHARE)]
    for name, extra in (("clean", []), ("copies", (COPIES - 1) * repeated),
                        ("leaked", LEAKS * evaluation_set)):
        (aside / name).mkdir(parents=True, exist_ok=True)
        write_rows(aside / name / "docstrings.jsonl", documents)
        if extra:
            write_rows(aside / name / "more.jsonl", map(trained, extra))
    write_rows(aside / "leaked_set.jsonl", evaluation_set)
    os.rename(aside, folder)


def docstrings():
    """Returns (documents, evaluation set): the embedded docstrings, in their order.

    Held-out docstrings that a training document holds as well are left out.
    """
    known = leaked_docstrings(EVAL_SHARE)
    documents = []
    evaluation_set = []
    for document in stdlib_documents("docstrings"):
        if document["id"] in known:
            continue
        # whole modules: docstrings of one module resemble each other
        is_chosen = is_held_out(document, EVAL_SHARE / 2)
        (evaluation_set if is_chosen else documents).append(document)
    return documents, evaluation_set


def share_of(document):
    """A number from 0 to 1 that depends on the document's text alone."""
    digest = hashlib.sha256(document["text"].encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def trained(document):
    """The document in a group that is not held out."""
    return document | {"metadata": document["metadata"] | {"split_group": TRAINED}}
