"""Chats, preferences and prompts: each row is checked.

The chat format lies in three files: these are its checks. data.py's render_chat makes ids of it;
# CHAT_TEMPLATE in support/hf_tokenizer.py is the same in Jinja, for an exported model.
"""

from support.chat_forms import (BEFORE_ANSWERS, CHATS, PREFERENCES, PROMPTS, answer_of,
                                begins_with_an_answer, chat_of, checked_messages, is_transcript,
                                question_of, recognised, text_of_transcript, turns_of)
from support.fields import (NO_MARGIN, NO_PLACE, check_scores, check_texts, is_given, refuse_fields,
                            refuse_weight, require, with_system)
from support.text import json_type


# ---- Chats ---------------------------------------------------------------------------------------

def checked_chat(row, place):
    """The messages of a chat in one of the forms CHATS; the last is an assistant's.

    A message that shall not be trained has a weight of 0.
    """
    row, keys = recognised(row, CHATS, place)
    refuse_fields(row, f"{place}: ", NO_PLACE)
    refuse_weight(row, place)
    messages = chat_of(row, keys, place)
    if "prompt" not in keys and not has_alpacas_template(row):
        check_prompt(row.get("prompt"), messages, place)
    messages = with_system(row, messages, place)
    check_texts(row, messages, place)
    trained = [message for message in messages if is_trained(message)]
    require(trained, f"{place}: {keys[0]}: none is trained, as each weight is 0; remove the row")
    return messages


def is_trained(message):
    return message["role"] == "assistant" and "weight" not in message


def has_alpacas_template(row):
    """Whether a row's prompt is Alpaca's template with the row's instruction: it says no more."""
    prompt = row.get("prompt")
    instruction = row.get("instruction")
    if not isinstance(prompt, str) or not isinstance(instruction, str):
        return False
    is_template = prompt.startswith("Below is an instruction that describes a task")
    return is_template and instruction.strip() in prompt


# ---- Preferences ---------------------------------------------------------------------------------

def checked_preference(row, place):
    """{prompt: messages, chosen: text, rejected: text} of a row in one of the hubs' forms.

    chosen and rejected are two lists of messages with the prompt at their head; two answers, texts
    or messages, beside a prompt; or two transcripts as in HH-RLHF.
    """
    row, _ = recognised(row, PREFERENCES, place)
    refuse_fields(row, f"{place}: ", NO_PLACE, NO_MARGIN)
    refuse_weight(row, place)
    kind = json_type(row["chosen"])
    other = json_type(row["rejected"])
    require(kind == other, f"{place}: chosen is {kind} and rejected {other}; both must be lists "
            "of messages, or both texts")
    chosen = checked_side(row, "chosen", place)
    rejected = checked_side(row, "rejected", place)
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


def checked_side(row, side, place):
    """The messages of a preference's side, with the prompt."""
    answer = row[side]
    place_of_side = f"{place}: {side}"
    transcript = text_of_transcript(row, side)
    if is_transcript(transcript):
        return checked_messages(turns_of(transcript), place_of_side, "assistant")
    if isinstance(answer, list) and not begins_with_an_answer(answer):
        messages = checked_messages(answer, place_of_side, "assistant")
        check_prompt(row.get("prompt"), messages, place)
    else:
        answers = answer_of(answer, place_of_side)
        asked = next((key for key in BEFORE_ANSWERS if is_given(row.get(key))), None)
        require(asked, f"{place}: prompt is missing; {side} is an answer alone, which needs one; "
                f"the row's keys are: {', '.join(row)[:80]}")
        messages = question_of(row, asked, place) + answers
    last = f"[{len(answer) - 1}]" if isinstance(answer, list) else ""
    require(is_trained(messages[-1]), f"{place_of_side}{last}.weight: 0, and only the last answer "
            "is compared; remove the row")
    return messages


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

def checked_request(row, place):
    """The messages that a row of a prompt file asks to be answered; the last is the user's."""
    row, (key,) = recognised(row, PROMPTS, place)
    refuse_fields(row, f"{place}: ", NO_PLACE)
    if (key,) in CHATS.names:  # a list of messages
        messages = asked_in(row, key, place)
    else:
        messages = question_of(row, key, place)
    messages = with_system(row, messages, place)
    check_texts(row, messages, place)
    return messages


def asked_in(row, key, place):
    """The request in a row's messages.

    Messages that end with an answer, beside their prompt, are a row of training data: the request
    is the prompt, and the model answers it itself.
    """
    messages, prompt = row[key], row.get("prompt")
    has_answer = isinstance(messages, list) and begins_with_an_answer(messages[-1:])
    last = "assistant" if prompt is not None and has_answer else "user"
    messages = checked_messages(messages, f"{place}: {key}", last)
    check_prompt(prompt, messages, place)
    if last == "user":
        return messages
    if isinstance(prompt, list):
        return checked_messages(prompt, f"{place}: prompt", "user")
    return messages[:first_question(messages) + 1]
