"""The forms in which chats, preferences and prompts lie on the hubs, and how each is read.

A row's form is known by its keys. What is read of a row is checked under the user's own keys, so
that a fault is named as `file:12: conversations[3].value`.
"""

import re
from typing import NamedTuple

from corpus.documents import print_line
from support.fields import (OF_MESSAGE, check_text, is_given, is_untrained, refuse_fields, require,
                            without_nulls)
from support.files import UserError
from support.text import json_type, shown


# ---- The forms -----------------------------------------------------------------------------------

class Forms(NamedTuple):
    """The forms of one kind of rows."""

    what: str  # what such a row is, for a row that has none of the forms
    names: dict  # {keys: the form's name}; a row has the first form of which it has all keys
    others: dict  # {a key of rows of another kind: what to do}


# The pairs of a question and an answer are those that Open Instruct converts: get_datasets in its
# open_instruct/utils.py, and scripts/data/sft. A pair that it does not know may mean anything.
CHATS = Forms("a chat is an object with a list of them: the user's and the assistant's", {
    ("messages",): "messages",
    ("conversations",): "ShareGPT (conversations)",
    ("conversation",): "ShareGPT (conversation)",  # WildChat and LMSYS-Chat
    ("instruction", "output"): "Alpaca (instruction, output)",
    ("instruction", "response"): "Dolly (instruction, response)",  # and Magicoder's Evol-Instruct
    ("prompt", "completion"): "prompt and completion",  # TRL, CodeAlpaca, Table-GPT
    ("question", "response"): "question and response",  # OpenOrca
    ("question", "answer"): "question and answer",  # WebInstruct, GSM8K
    ("query", "response"): "query and response",  # MetaMathQA
    ("query", "answer"): "query and answer",  # CodeFeedback
    ("inputs", "targets"): "inputs and targets",  # FLAN and Aya
}, {"chosen": "these are preferences, for DPO: take a config such as configs/tiny_dpo.py"})
PREFERENCES = Forms("a preference has both", {("chosen", "rejected"): "chosen and rejected"}, {
    "completion": "DPO needs two answers to a prompt; a row of one answer, with a label as for "
                  "KTO, is not read",
    **dict.fromkeys(("messages", "conversations", "output", "response"),
                    "these are chats, for SFT: take a config such as configs/tiny_sft.py")})
PROMPTS = Forms("a prompt is an object with one of messages, conversations, prompt, instruction, "
                "question, query and inputs", {
    ("messages",): "messages",
    ("conversations",): "ShareGPT (conversations)",
    ("conversation",): "ShareGPT (conversation)",
    ("prompt",): "prompts",
    ("instruction",): "Alpaca (instruction)",
    ("question",): "questions",
    ("query",): "queries",
    ("inputs",): "inputs",
}, {})
HH = "HH-RLHF (texts with Human: and Assistant:)"  # known by the text; the keys are as above
OURS = ("messages", "chosen and rejected", "prompts")  # nanOLMo's own: they need no word

# under which key the prompt of two answers stands: TRL's; LLaMA-Factory's; Intel's Orca pairs
BEFORE_ANSWERS = ("prompt", "conversations", "question", "instruction")


def form_of(row, forms):
    """The keys by which a row has one of the forms; None if it has none of them."""
    has_all = [keys for keys in forms.names if all(key in row for key in keys)]
    # a column that is empty in this row may belong to other rows of a table
    filled = [keys for keys in has_all if all(is_given(row[key]) for key in keys)]
    return next(iter(filled + has_all), None)


def recognised(row, forms, place):
    """Returns (row, keys): a row without its nulls, and the keys of its form.

    UserError, with what is there instead and a remedy, if it has none of the forms.
    """
    first = next(iter(forms.names))
    if not isinstance(row, dict):
        remedy = "correct or delete it"
        if isinstance(row, list) and row and isinstance(row[0], dict) and "role" in row[0]:
            remedy = 'make an object of the list: {"messages": [...]}'
        raise UserError(f"{place}: {' or '.join(first)} is missing; {forms.what}, and this line "
                        f"holds {json_type(row)}; {remedy}")
    given, row = row, without_nulls(row)
    keys = form_of(row, forms)
    if keys is None:
        nearest = first
        remedy = next((forms.others[key] for key in forms.others if key in row), None)
        if not remedy:
            refuse_nulls(given, form_of(given, forms) or (), place)
            remedy = "make it of what the row holds, or name another file"
            # a form of which the half is there
            nearest = next((keys for keys in forms.names if keys[0] in row), first)
        missing = " or ".join(key for key in nearest if key not in row)
        found = ", ".join(row)[:80] or "none"
        nulls = ", ".join(key for key in given if key not in row)[:80]
        raise UserError(f"{place}: {missing} is missing; {forms.what}, and the row's keys are: "
                        f"{found}{f' (and without a value: {nulls})' * bool(nulls)}; {remedy}")
    return row, keys


def refuse_nulls(row, keys, place):
    """UserError if a row has these keys, those of a form, and a null at one of them."""
    if not all(key in row for key in keys):
        return
    for key in keys:
        if key not in without_nulls(row):
            raise UserError(f"{place}: {key}: {shown(row[key])}, and no value; give one, or remove "
                            "the row")


class FormOfFile:
    """The form of the file that is read now: that of its first row. Another one is a fault."""

    def __init__(self, forms):
        self.forms = forms
        self.file = self.form = self.first = None
        self.keys = ()

    def check(self, row, place):
        """UserError if the row has another form than the file; one without a form is left alone."""
        file = place.rpartition(":")[0]
        given = row if isinstance(row, dict) else {}
        row = without_nulls(given)
        keys = form_of(row, self.forms)
        if keys is None:  # what else it lacks is said when it is read
            if file == self.file:
                refuse_nulls(given, self.keys, place)
            return
        if self.forms is CHATS and is_given(row.get("chosen")) and is_given(row.get("rejected")):
            print_line(f"{file}: chosen and rejected beside {' and '.join(keys)} are not "
                       "used: SFT learns from chats, --method=dpo from preferences")
        is_hh = is_transcript(text_of_transcript(row, keys[0]))
        form = HH if is_hh else self.forms.names[keys]
        if file != self.file:
            self.file = file
            self.keys = keys
            self.form = form
            self.first = place
            if form not in OURS:
                print(f"{file}: read as {form}")
        require(form == self.form, f"{place}: it holds {form}, and the file is read as "
                f"{self.form}, which {self.first} holds; move it to a file of its own")


# ---- Messages ------------------------------------------------------------------------------------

ROLES = ("system", "user", "assistant")

# which roles may follow a role; a chat begins with what may follow None
NEXT = {None: ("system", "user"), "system": ("user",), "user": ("assistant",),
        "assistant": ("user",)}

# the names in ShareGPT's "from", in small letters. Source: role_map in Open Instruct's
# scripts/data/sft/sharegpt.py; conversations_to_messages in its utils.py has them in capitals too
SENDERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
           "bard": "assistant", "bing": "assistant", "assistant": "assistant", "system": "system"}
TOOLS = ("tool", "function", "ipython", "observation", "environment", "tool_call", "tool_response",
         "function_call", "function_response")


def checked_messages(messages, place, last, before=None):
    """[{role, content}]: perhaps a system message, then user and assistant in turn.

    place: file:line and key, for the message of a UserError. last: whose message must end them.
    before: the role of the message before them.
    """
    require(isinstance(messages, list), f"{place}: {json_type(messages)}, not a list; give a "
            "list of {role, content}")
    require(messages, f"{place}: an empty list; give at least one message")
    checked = []
    for number, message in enumerate(messages):
        message = checked_message(message, f"{place}[{number}]", before)
        before = message["role"]
        checked.append(message)
    role_key = keys_of(messages[-1])[0]
    word = messages[-1][role_key]
    require(before == last, f"{place}[{len(messages) - 1}].{role_key}: {word}, where the last "
            f"message must be from {as_in_file(last, role_key, word)}")
    return checked


def checked_message(message, place, before):
    """{role, content} of a message that comes after one of role `before`."""
    require(isinstance(message, dict), f"{place}: {json_type(message)}, not an object with a "
            "role and content")
    role_key, content_key = keys_of(message)
    role = role_of(message)
    content = message.get(content_key)
    # 1. each by itself
    if role not in ROLES:
        names = ROLES if role_key == "role" else SENDERS
        remedy = ("the chat format of OLMo has no tools; remove the row" if role in TOOLS
                  else "rename it")
        raise UserError(f"{place}.{role_key}: {shown(role)} is not one of {', '.join(names)}; "
                        f"{remedy}")
    # Open Instruct writes an empty system message for rows of OpenOrca, and OLMo trained them so.
    is_empty_system = role == "system" and content == ""
    if not is_empty_system:
        check_text(content, f"{place}.{content_key}")
    refuse_fields(message, f"{place}.", OF_MESSAGE)
    # 2. the role after the one before it
    word = message[role_key]
    due = " or ".join(as_in_file(each, role_key, word) for each in NEXT[before])
    require(role in NEXT[before], f"{place}.{role_key}: {word}, where {due} must come; users and "
            "assistants take turns")
    checked = {"role": role, "content": content}
    if is_untrained(message, role, place) and role == "assistant":
        checked["weight"] = 0  # render_chat reads it
    return checked


def keys_of(message):
    """The keys of a message's role and content: ShareGPT's, or else the usual ones.

    A table of both has all four, with nulls.
    """
    if message.get("from") is not None and message.get("role") is None:
        return "from", "value"
    return "role", "content"


def role_of(message):
    """The role of a message as ROLES call it; what is there, if they know no such role."""
    role_key, _ = keys_of(message)
    role = message.get(role_key)
    if role_key == "from" and isinstance(role, str):
        return SENDERS.get(role.lower(), role)
    return role


def as_in_file(role, role_key, word):
    """What a role is called in a file that calls another one `word`: ShareGPT has its own names."""
    is_ours = role_key == "role" or word in ("user", "assistant")
    return role if is_ours else {"user": "human", "assistant": "gpt"}.get(role, role)


def begins_with_an_answer(messages):
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and role_of(first) == "assistant"


# ---- Questions and answers -----------------------------------------------------------------------

def chat_of(row, keys, place):
    """The messages of a row that has one of CHATS, the form of these keys."""
    if len(keys) == 1:
        return checked_messages(row[keys[0]], f"{place}: {keys[0]}", "assistant")
    asked, answered = keys
    # WikiQA and sets for KTO also hold bad answers
    require(row.get("label") not in (0, 1), f"{place}: label: it says whether the answer is good, "
            "and SFT imitates every answer; keep the good ones, and remove the field")
    prompt = question_of(row, asked, place)
    for message in prompt:
        if message["role"] == "assistant":
            message["weight"] = 0  # TRL trains the completion alone
    return prompt + answer_of(row[answered], f"{place}: {answered}")


def question_of(row, key, place):
    """The messages that row[key], a text or messages, asks; the last one is the user's."""
    asked = row[key]
    place_of_key = f"{place}: {key}"
    if isinstance(asked, list):
        return checked_messages(asked, place_of_key, "user")
    check_text(asked, place_of_key)
    if is_transcript(asked):
        turns = turns_of(asked)
        if not turns[-1]["content"].strip():  # it ends with "Assistant:", for the answer
            turns.pop()
        return checked_messages(turns, place_of_key, "user")
    if key == "instruction":
        asked = instruction_of(row, place)
    return [{"role": "user", "content": asked}]


def answer_of(answer, place):
    """The messages that a text, a message or messages answer; the last one is the assistant's."""
    if isinstance(answer, list):
        return checked_messages(answer, place, "assistant", before="user")
    if isinstance(answer, dict):
        return [checked_message(answer, place, before="user")]
    check_text(answer, place)
    return [{"role": "assistant", "content": answer}]


def instruction_of(row, place):
    """An instruction and its input, which Dolly calls a context.

    # DIFFERS FROM OLMo: joined as encode_instruction_example in Open Instruct's
    # scripts/data/sft_v1_v2/reformat_datasets.py joins them without a template. Tulu 2 was made
    # with one of 14 templates for each row, drawn at random.
    """
    name = "input" if is_given(row.get("input")) else "context"
    if not is_given(row.get(name)):
        return row["instruction"]
    check_text(row[name], f"{place}: {name}")
    return f"{row['instruction'].strip()}\n\n{row[name].strip()}"


# ---- Transcripts, as in HH-RLHF ------------------------------------------------------------------

def is_transcript(text):
    """Whether a text is a whole conversation, as in HH-RLHF and in what is made of it."""
    return (isinstance(text, str) and text.lstrip().startswith("Human:")
            and "\n\nAssistant:" in text)


def text_of_transcript(row, key):
    """The text in which a conversation may stand: an answer also has a prompt before it."""
    text = row[key]
    prompt = row.get("prompt", "")
    if key in ("chosen", "rejected") and isinstance(text, str) and isinstance(prompt, str):
        return prompt + text
    return text


def turns_of(transcript):
    """[{role, content}] of a transcript, cut where Open Instruct's preferences/hh-helpful.py does.

    A speaker who says "Human:" after an empty line cannot be told from the next speaker.
    """
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + transcript.lstrip())
    turns = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        turns.append({"role": "user" if speaker == "Human" else "assistant",
                      "content": content.strip()})
    return turns
