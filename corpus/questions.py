"""Chats and preferences made of docstrings, and the held-out docstrings that leak."""

import random
from functools import lru_cache

from corpus.documents import is_held_out
from corpus.stdlib import stdlib_documents


@lru_cache(maxsize=2)
def leaked_docstrings(eval_share):
    """Ids of held-out docstrings that also stand, spacing aside, in a training document."""
    def squeeze(text):
        return " ".join(text.split()).encode()  # bytes: one wide character makes a str search slow
    documents = [document for source in ("reference", "docstrings", "code")
                 for document in stdlib_documents(source)]
    training = b"\n".join(squeeze(document["text"]) for document in documents
                         if not is_held_out(document, eval_share))
    return {document["id"] for document in documents
            if document["source"] == "docstrings" and is_held_out(document, eval_share)
            and squeeze(document["text"].split("\n\n", 1)[1]) in training}


def stdlib_answers(held_out, eval_share):
    """(id, module, question, answer): what a docstring's first paragraph says of its owner.

    Held out are those of the modules whose text pretraining held out, with the same eval_share, but
    none whose answer stands among the others.
    """
    leaked, others = (), ()
    if held_out:
        leaked = leaked_docstrings(eval_share)
        others = {answer for *_, answer in stdlib_answers(False, eval_share)}
    for document in stdlib_documents("docstrings"):
        heading, docstring = document["text"].split("\n\n", 1)
        answer = " ".join(docstring.strip().split("\n\n")[0].split())
        if (is_held_out(document, eval_share) != held_out or document["id"] in leaked
                or answer in others or not 6 <= len(answer.split()) <= 30):
            continue
        kind, _, name = heading.partition(" ")
        if kind in ("class", "module"):
            question = f"What is the {kind} {name.split('(')[0]}?"
        else:
            ask = random.Random(document["id"]).choice(("What does {} do?", "Explain {}."))
            question = ask.format(heading if len(heading) <= 80 else heading.split("(")[0] + "()")
        yield document["id"], document["metadata"]["split_group"], question, answer


def stdlib_chats(held_out, eval_share):
    """(id, {messages}); one question in four is asked after another on the same module, whose
    answer then stands in two chats."""
    before = None
    for name, module, question, answer in stdlib_answers(held_out, eval_share):
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if before and before[0] == module and random.Random(f"turn {name}").random() < 0.25:
            yield name, {"messages": before[1] + turn}
        else:
            yield name, {"messages": turn}
        before = module, turn


def stdlib_preferences(held_out, eval_share):
    """(id, {prompt, chosen, rejected}): in training one of a third of the questions.

    Rejected is the answer to another question, the right one without its last two words, or its
    words in disorder; held out, each question comes with all three.
    """
    answers = list(stdlib_answers(held_out, eval_share))
    for name, _, question, answer in answers:
        dice, words = random.Random(f"preference {name}"), answer.split()
        if not held_out and dice.random() > 1 / 3:
            continue
        rejected = {"another": dice.choice(answers)[3], "cut": " ".join(words[:-2]),
                    "disorder": " ".join(dice.sample(words, len(words)))}
        for kind in rejected if held_out else [dice.choice(list(rejected))]:
            if rejected[kind] != answer:
                yield f"{name} {kind}", {"prompt": question, "chosen": answer,
                                         "rejected": rejected[kind]}
