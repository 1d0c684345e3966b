"""Chats and preferences: read from files, checked row by row.

# The chat format lies in three files: these are its checks. data.py's render_chat makes ids of it;
# CHAT_TEMPLATE in support/hf_tokenizer.py is the same in Jinja, for an exported model.
"""

from collections import Counter

from corpus.documents import parse, read_records, without_surrogates
from corpus.questions import stdlib_chats, stdlib_preferences
from support.files import UserError

ROLES = ("system", "user", "assistant")

# which roles may follow a role; a chat begins with what may follow None
NEXT = {None: ("system", "user"), "system": ("user",), "user": ("assistant",),
        "assistant": ("user",)}

NAMED_FAULTS = 5  # a message names so many faulty rows, and counts the others


def require(condition, fault):
    if not condition:
        raise UserError(fault)


# ---- A set ---------------------------------------------------------------------------------------

def read_examples(config, key, encode, eval_share):
    """The examples of the set that `key` names, in its order; [] if it names none.

    key: "train_data" or "eval_data". encode(row, place=, counts=) makes an example of a row, or
    None. Prints how many rows were cut or dropped.
    """
    path = getattr(config, key)
    if not path:
        return []
    counts = Counter()  # {what was done to rows: how many}; nothing is dropped in silence
    examples = []
    for place, row in read_set(path, config, key == "eval_data", eval_share, counts):
        example = encode(row, place=place, counts=counts)
        if example is not None:
            examples.append(example)
    if not examples:
        raise UserError(f"{key}={path}: none of its rows can be used ({dict(counts)}); name "
                        "another file")
    kind = "chats" if config.method == "sft" else "pairs"
    print_set(key, path, kind, sequences_of(examples), len(examples), counts)
    return examples


def sequences_of(examples):
    """The Examples of a set; for Pairs all the chosen ones, and then all the rejected ones."""
    if examples and hasattr(examples[0], "chosen"):
        chosen = [pair.chosen for pair in examples]
        rejected = [pair.rejected for pair in examples]
        return chosen + rejected
    return list(examples)


def print_set(key, path, kind, sequences, examples, counts):
    """A line on a set that was read: its size, what of it is trained, what was cut or dropped."""
    tokens = sum(len(sequence.ids) for sequence in sequences)
    trained = sum(int(sequence.trained.sum()) for sequence in sequences)
    line = (f"{key}={path}: {examples:,} {kind} of {tokens:,} tokens, {trained / tokens:.0%} of "
            "them in answers")
    for what, count in counts.items():
        if count:
            line += f"; {count:,} {what}"
    print(line)


def read_set(path, config, held_out, eval_share, counts):
    """[(place, row)] of a set: messages for SFT, {prompt, chosen, rejected} for DPO.

    UserError names the faulty rows; with config.faulty "skip" they are dropped and counted.
    """
    if config.method == "sft":
        check = checked_chat
        embedded = stdlib_chats
    else:
        check = checked_preference
        embedded = stdlib_preferences
    rows = []
    if path == "stdlib":
        for name, row in embedded(held_out, eval_share):
            place = f"stdlib:{name}"
            rows.append((place, check(row, place)))
        return rows
    faults = []
    for record in read_records(path, "", counts):
        place = record.place  # file:line
        try:
            row = check(parse(record), place)
        except UserError as fault:  # go on: the user wants to know all of them
            faults.append(str(fault))
        else:
            rows.append((place, row))
    if faults and config.faulty == "stop":
        raise UserError(said_of(faults, len(faults) + len(rows)))
    if faults:
        counts["faulty rows skipped"] += len(faults)
        print(f"skipped {len(faults):,} rows; the first: {faults[0]}")
    return rows


def said_of(faults, rows):
    """The message for faulty rows: the first of them, their number, the remedy."""
    message = "; ".join(faults[:NAMED_FAULTS])
    if len(faults) > NAMED_FAULTS:
        message += f"\n  and {len(faults) - NAMED_FAULTS:,} more"
    return (f"{message}; mend {len(faults):,} of {rows:,} rows, or drop them with --faulty=skip")


# ---- Chats ---------------------------------------------------------------------------------------

def checked_chat(row, place):
    """The messages of a chat in Tulu's format; the last is an assistant's."""
    require(isinstance(row, dict) and "messages" in row,
            f"{place}: messages is missing; a chat is an object with a list of them")
    return checked_messages(row["messages"], f"{place}: messages", "assistant")


def checked_messages(messages, place, last):
    """[{role, content}]: perhaps a system message, then user and assistant in turn.

    place: file:line and key, for the message of a UserError. last: whose message must end them.
    """
    require(isinstance(messages, list), f"{place}: {type(messages).__name__}, not a list; give a "
            "list of {role, content}")
    require(messages, f"{place}: an empty list; give at least one message")
    checked = []
    before = None  # the role of the last message
    for number, message in enumerate(messages):
        message = checked_message(message, f"{place}[{number}]", before)
        before = message["role"]
        checked.append(message)
    require(before == last, f"{place}[{len(checked) - 1}].role: {before}, where the "
            f"last message must be the {last}'s")
    return checked


def checked_message(message, place, before):
    """{role, content} of a message that comes after one of role `before`."""
    require(isinstance(message, dict), f"{place}: {type(message).__name__}, not an object with a "
            "role and content")
    role = message.get("role")
    content = message.get("content")
    # 1. each by itself
    require(role in ROLES, f"{place}.role: {repr(role)[:20]} is not one of {', '.join(ROLES)}; "
            "rename it")
    require(isinstance(content, str), f"{place}.content: {type(content).__name__}, not a text; "
            "give one")
    require(content.strip(), f"{place}.content: an empty text; give one, or remove the turn")
    # JSON can hold half of a surrogate pair; UTF-8, and so the tokenizer, cannot
    require(content == without_surrogates(content),
            f"{place}.content: half a character (a lone surrogate); remove it")
    # 2. the role after the one before it
    due = " or ".join(NEXT[before])
    require(role in NEXT[before], f"{place}.role: {role}, where {due} must come; users and "
            "assistants take turns")
    return {"role": role, "content": content}


# ---- Preferences ---------------------------------------------------------------------------------

def checked_preference(row, place):
    """{prompt: messages, chosen: text, rejected: text} of a row in UltraFeedback's format.

    chosen and rejected are lists of messages, the prompt included, or texts with a `prompt`.
    """
    require(isinstance(row, dict) and {"chosen", "rejected"} <= row.keys(),
            f"{place}: chosen or rejected is missing; a preference has both")
    kind = type(row["chosen"]).__name__
    other = type(row["rejected"]).__name__
    require(kind == other, f"{place}: chosen is {kind} and rejected {other}; both must be lists "
            "of messages, or both texts")
    if kind == "str":
        chosen, rejected = checked_texts(row, place)
    else:
        chosen = checked_messages(row["chosen"], f"{place}: chosen", "assistant")
        rejected = checked_messages(row["rejected"], f"{place}: rejected", "assistant")
        check_prompt(row.get("prompt"), chosen, place)
    # DPO compares two answers to one prompt: any other difference would be scored with them
    require(stripped(chosen[:-1]) == stripped(rejected[:-1]),
            f"{place}: chosen and rejected answer different prompts; only their last messages may "
            "differ")
    require(stripped(chosen) != stripped(rejected),
            f"{place}: chosen and rejected are the same; change or remove the row")
    return {"prompt": chosen[:-1], "chosen": chosen[-1]["content"],
            "rejected": rejected[-1]["content"]}


def checked_texts(row, place):
    """Returns (chosen, rejected) as lists of messages, of a row whose answers are texts."""
    prompt = row.get("prompt")
    require(prompt is not None, f"{place}: prompt is missing; chosen and rejected are texts, which "
            "need one")
    if not isinstance(prompt, list):  # a text: one question
        prompt = [{"role": "user", "content": prompt}]
    prompt = checked_messages(prompt, f"{place}: prompt", "user")
    sides = []
    for side in ("chosen", "rejected"):
        answer = {"role": "assistant", "content": row[side]}
        sides.append(checked_messages([*prompt, answer], f"{place}: {side}", "assistant"))
    return sides


def check_prompt(prompt, chosen, place):
    """UserError if a prompt, which UltraFeedback repeats, is not the one in `chosen`."""
    if prompt is None:
        return
    first = next(message for message in chosen if message["role"] == "user")
    require(isinstance(prompt, str) and prompt.strip() == first["content"].strip(),
            f"{place}: prompt is not the first user's message in chosen; remove one of the two")


def stripped(messages):
    """What a model sees of messages: their roles, and their contents without outer spaces."""
    return [(message["role"], message["content"].strip()) for message in messages]
