"""The embedded chats and preferences, made of docstrings, for fine-tuning without a network."""

import random
from functools import lru_cache

from corpus.documents import is_held_out
from corpus.stdlib import stdlib_documents
from support.bars import bar


def stdlib_chats(held_out, eval_share):
    """Yield (id, {messages}): a question about a function, class or module, and its answer.

    One chat in four has two turns: the question before, on the same module, comes first. That one's
    answer is then in two chats.
    """
    module_before = None
    turn_before = None
    for name, module, question, answer in stdlib_answers(held_out, eval_share):
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages = turn
        if module == module_before and random.Random(f"turn {name}").random() < 0.25:
            messages = turn_before + turn
        yield name, {"messages": messages}
        module_before = module
        turn_before = turn


def stdlib_preferences(held_out, eval_share):
    """Yield (id, {prompt, chosen, rejected}) with a docstring's answer as the chosen one.

    A rejected answer is the answer to another question, the right one without its last two words,
    or its words in random order. In training a third of the questions come, with one of the three;
    held out, each question comes with all three.
    """
    answers = list(stdlib_answers(held_out, eval_share))
    for name, _, question, answer in answers:
        dice = random.Random(f"preference {name}")  # subtle: the order of the draws must not change
        if not held_out and dice.random() > 1 / 3:
            continue
        words = answer.split()
        rejected = {"another": dice.choice(answers)[3],
                    "cut": " ".join(words[:-2]),
                    "disorder": " ".join(dice.sample(words, len(words)))}
        kinds = list(rejected) if held_out else [dice.choice(list(rejected))]
        for kind in kinds:
            if rejected[kind] != answer:
                pair = {"prompt": question, "chosen": answer, "rejected": rejected[kind]}
                yield f"{name} {kind}", pair


def stdlib_answers(held_out, eval_share):
    """Yield (id, module, question, answer); an answer is the first paragraph of a docstring.

    Held out are the modules that pretraining holds out with the same eval_share, without the
    answers that a training document or another answer holds.
    """
    leaked = set()
    trained_answers = set()
    if held_out:
        leaked = leaked_docstrings(eval_share)
        trained_answers = {answer for *_, answer in stdlib_answers(False, eval_share)}
    for document in stdlib_documents("docstrings"):
        if is_held_out(document, eval_share) != held_out or document["id"] in leaked:
            continue
        heading, docstring = document["text"].split("\n\n", 1)
        first_paragraph = docstring.strip().split("\n\n")[0]
        answer = " ".join(first_paragraph.split())
        # a sentence or two: what a model as small as configs/tiny.py can learn to write
        if answer in trained_answers or not 6 <= len(answer.split()) <= 30:
            continue
        question = question_about(heading, document["id"])
        yield document["id"], document["metadata"]["split_group"], question, answer


def question_about(heading, seed):
    """A question whose answer is the docstring under `heading`; `seed` chooses its form."""
    kind, _, name = heading.partition(" ")
    if kind in ("class", "module"):
        return f"What is the {kind} {name.split('(')[0]}?"
    form = random.Random(seed).choice(("What does {} do?", "Explain {}."))
    if len(heading) > 80:  # leave out the arguments
        heading = heading.split("(")[0] + "()"
    return form.format(heading)


@lru_cache(maxsize=2)
def leaked_docstrings(eval_share):
    """The ids of the held-out docstrings that a training document holds too, spacing aside.

    Modules copy docstrings from each other, and a copy that was trained on tests only the memory.
    """
    def squeeze(text):
        return " ".join(text.split()).encode()  # bytes: one wide character makes a str search slow

    training = []
    held_out = {}  # id -> docstring
    for source in ("reference", "docstrings", "code"):
        for document in stdlib_documents(source):
            if not is_held_out(document, eval_share):
                training.append(squeeze(document["text"]))
            elif source == "docstrings":
                _, docstring = document["text"].split("\n\n", 1)
                held_out[document["id"]] = squeeze(docstring)
    training = b"\n".join(training)
    docstrings = bar(held_out.items(), "looking for copies of held-out docstrings", unit="texts")
    return {name for name, docstring in docstrings if docstring in training}
