"""Chats, preferences and prompts: each row is checked.

The chat format lies in three files: these are its checks. data.py's render_chat makes ids of it;
# CHAT_TEMPLATE in support/hf_tokenizer.py is the same in Jinja, for an exported model.
"""

from support.fields import (NO_MARGIN, NO_PLACE, OF_MESSAGE, check_scores, check_text, check_texts,
                            is_given, is_untrained, refuse_fields, refuse_weight, require,
                            with_system)
from support.files import UserError
from support.text import json_type, shown

ROLES = ("system", "user", "assistant")

# which roles may follow a role; a chat begins with what may follow None
NEXT = {None: ("system", "user"), "system": ("user",), "user": ("assistant",),
        "assistant": ("user",)}

# what to do about a row of another form, by a key that it has
SHAREGPT = ('rename "from" to role (human is user, gpt is assistant) and "value" to content; the '
            "list of them is messages")
OTHER_CHATS = {"conversations": SHAREGPT, "chosen": "these are preferences: --method=dpo",
               "instruction": "the user's is the instruction with the input, if there is one, "
                              "behind a blank line; the assistant's is the output"}
OTHER_PREFERENCES = {"messages": "these are chats: --method=sft",
                     "completion": "DPO needs two answers to a prompt; a row of one answer, with "
                                   "a label as for KTO, is not read"}
OTHER_PROMPTS = {"conversations": SHAREGPT, "question": "rename it to prompt"}


# ---- Chats ---------------------------------------------------------------------------------------

def checked_chat(row, place):
    """The messages of a chat in Tulu's format; the last is an assistant's.

    A message that shall not be trained has a weight of 0.
    """
    row = checked_form(row, ("messages",), place, "a chat is an object with a list of them: the "
                       "user's and the assistant's", OTHER_CHATS)
    refuse_fields(row, f"{place}: ", NO_PLACE)
    refuse_weight(row, place)
    messages = checked_messages(row["messages"], f"{place}: messages", "assistant")
    messages = with_system(row, messages, place)
    check_texts(row, messages, place)
    check_prompt(row.get("prompt"), messages, place)
    trained = [message for message in messages if is_trained(message)]
    require(trained, f"{place}: messages: none is trained, as each weight is 0; remove the row")
    return messages


def is_trained(message):
    return message["role"] == "assistant" and "weight" not in message


def checked_form(row, keys, place, form, remedies):
    """The row without its nulls.

    UserError, with what is there instead and a remedy, if it has not all of these keys.
    """
    missing = f"{' or '.join(keys)} is missing; {form}"
    if not isinstance(row, dict):
        remedy = "correct or delete it"
        if isinstance(row, list) and row and isinstance(row[0], dict) and "role" in row[0]:
            remedy = 'make an object of the list: {"messages": [...]}'
        raise UserError(f"{place}: {missing}, and this line holds {json_type(row)}; {remedy}")
    found = ", ".join(row)[:80] or "none"
    row = {key: value for key, value in row.items() if value is not None}
    if not all(key in row for key in keys):
        remedy = next((remedies[key] for key in remedies if key in row),
                      "make it of what the row holds, or name another file")
        raise UserError(f"{place}: {missing}, and the row's keys are: {found}; {remedy}")
    return row


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
    require(before == last, f"{place}[{len(messages) - 1}].role: {before}, where the "
            f"last message must be the {last}'s")
    return checked


def checked_message(message, place, before):
    """{role, content} of a message that comes after one of role `before`."""
    require(isinstance(message, dict), f"{place}: {json_type(message)}, not an object with a "
            "role and content")
    role = message.get("role")
    # 1. each by itself
    if role not in ROLES:
        raise UserError(f"{place}.role: {shown(role)} is not one of {', '.join(ROLES)}; "
                        f"{role_remedy(message)}")
    # Open Instruct writes an empty system message for rows of OpenOrca, and OLMo trained them so.
    is_empty_system = role == "system" and message.get("content") == ""
    if not is_empty_system:
        check_text(message.get("content"), f"{place}.content")
    refuse_fields(message, f"{place}.", OF_MESSAGE)
    # 2. the role after the one before it
    due = " or ".join(NEXT[before])
    require(role in NEXT[before], f"{place}.role: {role}, where {due} must come; users and "
            "assistants take turns")
    checked = {"role": role, "content": message["content"]}
    if is_untrained(message, place) and role == "assistant":
        checked["weight"] = 0  # render_chat reads it
    return checked


def role_remedy(message):
    """What to do about a message whose role is none of ROLES."""
    role = message.get("role")
    if role is None and "from" in message:
        return SHAREGPT
    if role in ("tool", "function", "ipython", "observation", "tool_call", "tool_response"):
        return "the chat format of OLMo has no tools; remove the row"
    return "rename it"


# ---- Preferences ---------------------------------------------------------------------------------

def checked_preference(row, place):
    """{prompt: messages, chosen: text, rejected: text} of a row of UltraFeedback's or TRL's form.

    chosen and rejected are two texts beside a `prompt`, two lists of messages with the prompt at
    their head, or two such answers beside the prompt as a list.
    """
    row = checked_form(row, ("chosen", "rejected"), place, "a preference has both",
                       OTHER_PREFERENCES)
    refuse_fields(row, f"{place}: ", NO_PLACE, NO_MARGIN)
    refuse_weight(row, place)
    kind, other = json_type(row["chosen"]), json_type(row["rejected"])
    require(kind == other, f"{place}: chosen is {kind} and rejected {other}; both must be lists "
            "of messages, or both texts")
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        prompt = checked_messages(prompt, f"{place}: prompt", "user")
    chosen = checked_side(row, "chosen", prompt, place)
    rejected = checked_side(row, "rejected", prompt, place)
    # DPO compares two answers to one prompt: any other difference would be scored with them
    require(stripped(chosen[:-1]) == stripped(rejected[:-1]),
            f"{place}: chosen and rejected answer different prompts; only their last messages may "
            "differ")
    require(stripped(chosen) != stripped(rejected),
            f"{place}: chosen and rejected are the same; change or remove the row")
    check_scores(row, place)
    messages = with_system(row, chosen[:-1], place)
    check_texts(row, messages, place)
    return {"prompt": messages, "chosen": chosen[-1]["content"],
            "rejected": rejected[-1]["content"]}


def checked_side(row, side, prompt, place):
    """The messages of a preference's side, with the prompt; a prompt that is a list is checked."""
    answer = row[side]
    place_of_side = f"{place}: {side}"
    if isinstance(answer, str):
        require(prompt is not None, f"{place}: prompt is missing; chosen and rejected are texts, "
                "which need one; the row's keys are: " + ", ".join(row)[:80])
        check_text(answer, place_of_side)
        return [*question_of(prompt, place), {"role": "assistant", "content": answer}]
    if prompt is not None and begins_with_an_answer(answer):  # TRL's form
        answers = checked_messages(answer, place_of_side, "assistant", before="user")
        messages = [*question_of(prompt, place), *answers]
    else:
        messages = checked_messages(answer, place_of_side, "assistant")
        check_prompt(prompt, messages, place)
    require(is_trained(messages[-1]), f"{place_of_side}[{len(answer) - 1}].weight: 0, and only the "
            "last answer is compared; remove the row")
    return messages


def begins_with_an_answer(messages):
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and first.get("role") == "assistant"


def question_of(prompt, place):
    """The messages of a prompt: a text is one question of the user's, a list is checked already."""
    if isinstance(prompt, list):
        return prompt
    check_text(prompt, f"{place}: prompt")
    return [{"role": "user", "content": prompt}]


def check_prompt(prompt, messages, place):
    """UserError if a prompt beside messages, as in UltraFeedback, is not how they begin."""
    if not is_given(prompt):
        return
    if isinstance(prompt, list):
        prompt = checked_messages(prompt, f"{place}: prompt", "user")
        same = stripped(messages[:len(prompt)]) == stripped(prompt)
    else:
        # the user's first message; No Robots repeats the system's
        first = messages[:first_question(messages) + 1]
        contents = [message["content"].strip() for message in first]
        same = isinstance(prompt, str) and prompt.strip() in contents
    require(same, f"{place}: prompt is not the first message beside it; remove one of the two")


def first_question(messages):
    """The index of the user's first message."""
    return [message["role"] for message in messages].index("user")


def stripped(messages):
    """What a model sees of messages: their roles, and their contents without outer spaces."""
    return [(message["role"], message["content"].strip()) for message in messages]


# ---- Prompts -------------------------------------------------------------------------------------

PROMPTS = ("messages", "prompt", "instruction")


def checked_request(row, place):
    """The messages that a row of a prompt file asks to be answered; the last is the user's."""
    found = [key for key in PROMPTS if isinstance(row, dict) and row.get(key) is not None]
    row = checked_form(row, found or PROMPTS, place, "a prompt is an object with one of them",
                       OTHER_PROMPTS)
    refuse_fields(row, f"{place}: ", NO_PLACE)
    if "messages" in row:
        messages = asked_in(row, place)
    elif "prompt" in row:
        messages = row["prompt"]
        if isinstance(messages, list):
            messages = checked_messages(messages, f"{place}: prompt", "user")
        messages = question_of(messages, place)
    else:
        messages = [{"role": "user", "content": instruction_of(row, place)}]
    messages = with_system(row, messages, place)
    check_texts(row, messages, place)
    return messages


def asked_in(row, place):
    """The request in a row's messages.

    Messages that end with an answer, beside their prompt, are a row of training data: the request
    is the prompt, and the model answers it itself.
    """
    messages, prompt = row["messages"], row.get("prompt")
    has_answer = isinstance(messages, list) and begins_with_an_answer(messages[-1:])
    last = "assistant" if prompt is not None and has_answer else "user"
    messages = checked_messages(messages, f"{place}: messages", last)
    check_prompt(prompt, messages, place)
    if last == "user":
        return messages
    if isinstance(prompt, list):
        return checked_messages(prompt, f"{place}: prompt", "user")
    return messages[:first_question(messages) + 1]


def instruction_of(row, place):
    """An Alpaca row's instruction and input, joined as Open Instruct joins them without templates.

    Source: encode_instruction_example in its instruction_encode_templates.py.
    """
    check_text(row["instruction"], f"{place}: instruction")
    if not is_given(row.get("input")):
        return row["instruction"]
    check_text(row["input"], f"{place}: input")
    return f"{row['instruction'].strip()}\n\n{row['input'].strip()}"
