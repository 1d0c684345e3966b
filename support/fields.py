"""Fields of a row that change what it means: they are used, or the row is refused by their name.

Any other field only describes the row (id, source, score, ...), and is ignored: real sets of chats
and preferences have many columns. A field without a value (null, "", [], {}, false) says nothing.
"""

from corpus.documents import without_surrogates
from support.files import UserError
from support.text import json_type, shown

# ---- The fields ----------------------------------------------------------------------------------

# of a row: what the model would not see, and what would not be done
NO_PLACE = {
    "the chat format of OLMo has no tools": ("tools", "functions", "tool_choice", "function_call"),
    "the model reads text alone": ("image", "images", "audio", "video", "videos"),
    "the chat format is one for all rows": ("chat_template_kwargs",)}
NO_MARGIN = {"the loss knows no margin": ("margin",),
             "a tie has no answer to prefer": ("tie", "is_tie")}

# of a message
OF_MESSAGE = {
    # functions and function_calls: OLMo 3's, which has a chat format of its own
    "the chat format of OLMo has no tools": (
        "tool_calls", "tool_call_id", "function_call", "functions", "function_calls", "tools"),
    # name: one who talks under two names would be two in the data, and one for the model
    "the chat format has a role and a content alone, which can hold it too": (
        "name", "reasoning", "reasoning_content", "thinking"),
    "the model reads text alone": ("image", "images", "audio", "video", "videos"),
    "only weight, loss and train say whether a message is trained": ("mask", "loss_mask")}

SYSTEM = ("system", "system_prompt")  # the system's message, beside the others
TRAINED = ("weight", "loss", "train")  # of a message: OpenAI's name, ms-swift's, Axolotl's
# texts that a row's messages must hold, where it has both, but for what they are called there
TEXTS = ("instruction", "question", "input", "context", "documents", "history", "choices",
         "options")
NO_TEXTS = ("role", "from", "label", "name")


# ---- The checks ----------------------------------------------------------------------------------

def require(condition, fault):
    if not condition:
        raise UserError(fault)


def without_nulls(row):
    """A row or message without the fields that are null, or NaN, as pandas writes a missing number.

    A table has a value in each of its columns for each row; JSON lines leave them out.
    """
    # subtle: only NaN differs from itself
    return {key: value for key, value in row.items() if value is not None and value == value}


def is_given(value):
    """Whether a field has a value; a number is one, also 0."""
    if isinstance(value, str):
        return bool(value.strip())
    return value not in (None, [], {}) and value is not False


def refuse_fields(row, place, *tables):
    """UserError for the first field with a value that a table {reason: names} has."""
    for name, value in row.items():
        for table in tables:
            for reason, names in table.items():
                # "[]": LLaMA-Factory writes the list of tools as a text
                if name in names and is_given(value) and value not in ("[]", "{}"):
                    raise UserError(f"{place}{name}: {reason}; remove the field, or the row if "
                                    "it depends on it")


def refuse_weight(row, place):
    """UserError for a row that has another weight than 1."""
    require(row.get("weight", 1) == 1, f"{place}: weight: rows have no weights of their own; "
            "remove the field, or the row if its weight is 0")


def check_text(text, place):
    """UserError for a text of a row that is none, is empty or cannot be encoded."""
    remedy = "join the texts of its parts" if isinstance(text, list) else "give one"
    require(isinstance(text, str), f"{place}: {json_type(text)}, not a text; {remedy}")
    require(text.strip(), f"{place}: an empty text; give one, or remove it")
    # JSON can hold half of a surrogate pair; UTF-8, and so the tokenizer, cannot
    require(text == without_surrogates(text),
            f"{place}: half a character (a lone surrogate); remove it")


def with_system(row, messages, place):
    """Messages, checked, with the system's message that the row holds beside them."""
    for key in SYSTEM:
        text = row.get(key)
        # DIFFERS FROM OLMo: Open Instruct makes a message also of an empty one in OpenOrca's rows
        if not is_given(text):
            continue
        check_text(text, f"{place}: {key}")
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": text}, *messages]
        require(messages[0]["content"].strip() == text.strip(), f"{place}: {key}: is not the "
                "system's message that is there too; remove one of the two")
    return messages


def check_texts(row, messages, place):
    """UserError for a text beside the messages that none of them holds: nobody would read it."""
    said = "\n".join(message["content"] for message in messages)
    for name in TEXTS:
        for text in texts_in(row.get(name)):
            require(text.strip() in said, f"{place}: {name}: no message holds this text, so the "
                    "model would not see it; put it into a message, or remove the field")


def texts_in(value):
    """The texts in a JSON value, however deep, but those under NO_TEXTS."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [inner for key, inner in value.items() if key not in NO_TEXTS]
    return [text for each in value for text in texts_in(each)] if isinstance(value, list) else []


def is_untrained(message, role, place):
    """Whether a message says that it shall not be trained: weight, loss or train is 0."""
    message = without_nulls(message)
    found = {key: message[key] for key in TRAINED if key in message}
    for key, value in found.items():
        require(value in (0, 1), f"{place}.{key}: {shown(value)}, where 1 trains a message and "
                "0 does not; choose one of the two")
        require(value == 0 or role == "assistant", f"{place}.{key}: "
                "only the assistant's messages are trained; remove it")
    require(len(set(found.values())) < 2, f"{place}: {', '.join(found)} disagree; keep one of them")
    return 0 in found.values()


def check_scores(row, place):
    """UserError for a preference whose scores say that the rejected answer is the better one.

    Each set has its own name for them: score_chosen, chosen-rating, ... NaN says that one is
    missing.
    """
    for key, score in row.items():
        other = key.replace("chosen", "rejected")
        is_score = other != key and ("score" in key or "rating" in key)
        numbers = [as_number(score), as_number(row.get(other))]
        if is_score and None not in numbers:
            require(not numbers[0] < numbers[1], f"{place}: {key}: {shown(score)}, and {other} is "
                    f"{shown(row[other])}, which is higher; swap the answers, or remove the scores")


def as_number(value):
    """The number that a JSON value is, or that its text is; else None."""
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except (ValueError, OverflowError):
        return None
