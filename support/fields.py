"""Fields of a row that change what it means: they are used, or the row is refused by their name.

Any other field only describes the row (id, source, score, ...), and is ignored: real sets of chats
and preferences have many columns. A field without a value (null, "", [], {}, false) says nothing.
"""

from corpus.documents import without_surrogates
from support.files import UserError

# ---- The fields ----------------------------------------------------------------------------------

# of a row: what the model would not see, and what would not be done
NO_PLACE = {
    "the chat format of OLMo has no tools": ("tools", "functions", "tool_choice", "function_call"),
    "the model reads text alone": ("image", "images", "audio", "audios", "video", "videos"),
    "the chat format is one for all rows": ("chat_template", "chat_template_kwargs",
                                            "continue_final_message"),
}
NO_WEIGHTS = {"rows have no weights of their own": ("weight", "sample_weight", "loss_weight")}
NO_MARGIN = {"the loss knows no margin": ("margin",),
             "a tie has no answer to prefer": ("tie", "is_tie")}
NO_OPTIONS = {
    "the command's options draw the answers": (
        "max_tokens", "max_completion_tokens", "max_length", "stop", "top_k", "min_p", "logit_bias",
        "presence_penalty", "frequency_penalty", "repetition_penalty", "num_beams", "do_sample",
        "response_format"),
    "an answer begins where the model begins it": ("prefix", "prefill", "assistant_prefix")}

# of a message
OF_MESSAGE = {
    "the chat format of OLMo has no tools": ("tool_calls", "tool_call_id", "function_call"),
    "the chat format has a role and a content alone": (
        "name", "reasoning", "reasoning_content", "thinking", "refusal", "channel", "recipient"),
    "an answer begins where the model begins it": ("prefix", "partial"),
    "the model reads text alone": ("image", "images", "audio", "video", "videos", "files",
                                   "attachments"),
    "only weight, loss and train say whether a message is trained": (
        "mask", "loss_mask", "loss_weight", "train_detail", "training_detail"),
}

SYSTEM = ("system", "system_prompt")  # the system's message, beside the others
TRAINED = ("weight", "loss", "train")  # of a message: OpenAI's name, ms-swift's, Axolotl's
# texts that a row's messages must hold, where it has both
TEXTS = ("instruction", "question", "input", "context", "documents", "history", "choices",
         "options")
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
          ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"),
          ("rating_chosen", "rating_rejected"))


# ---- The checks ----------------------------------------------------------------------------------

def require(condition, fault):
    if not condition:
        raise UserError(fault)


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
                if name in names and is_given(value):
                    raise UserError(f"{place}{name}: {reason}; remove the field, or the row if it "
                                    "depends on it")


def refuse_weights(row, place):
    """UserError for a row that has another weight than 1."""
    refuse_fields({key: row[key] for key in row if row[key] != 1}, place, NO_WEIGHTS)


def check_text(text, place):
    """UserError for a text of a row that is none, is empty or cannot be encoded."""
    remedy = "join the texts of its parts" if isinstance(text, list) else "give one"
    require(isinstance(text, str), f"{place}: {type(text).__name__}, not a text; {remedy}")
    require(text.strip(), f"{place}: an empty text; give one, or remove it")
    # JSON can hold half of a surrogate pair; UTF-8, and so the tokenizer, cannot
    require(text == without_surrogates(text),
            f"{place}: half a character (a lone surrogate); remove it")


def with_system(row, messages, place):
    """Messages, checked, with the system's message that the row holds beside them."""
    for key in SYSTEM:
        text = row.get(key)
        if not is_given(text):
            continue
        check_text(text, f"{place}: {key}")
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": text}, *messages]
        require(messages[0]["content"].strip() == text.strip(), f"{place}: {key}: is not the "
                "system's message that is there too; remove one of the two")
    return messages


def check_texts(row, messages, place, names=TEXTS):
    """UserError for a text beside the messages that none of them holds: nobody would read it."""
    said = "\n".join(message["content"] for message in messages)
    for name in names:
        for text in texts_in(row.get(name)):
            require(text.strip() in said, f"{place}: {name}: no message holds this text, so the "
                    "model would not see it; put it into a message, or remove the field")


def texts_in(value):
    """The texts in a JSON value, however deep."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)):
        return []
    return [text for each in inner for text in texts_in(each)]


def is_untrained(message, place):
    """Whether a message says that it shall not be trained: weight, loss or train is 0."""
    wanted = set()
    for key in TRAINED:
        value = message.get(key)
        if value is None:
            continue
        require(isinstance(value, (int, float)) and value in (0, 1),
                f"{place}.{key}: {str(value)[:20]}, where 1 trains a message and 0 does not; "
                "choose one of the two")
        require(value == 0 or message.get("role") == "assistant", f"{place}.{key}: "
                "only the assistant's messages are trained; remove it")
        wanted.add(bool(value))
    require(len(wanted) < 2, f"{place}: {', '.join(TRAINED)} disagree; keep one of them")
    return wanted == {False}


def check_scores(row, place):
    """UserError for a preference whose scores say that the rejected answer is the better one."""
    for better, worse in SCORES:
        numbers = (row.get(better), row.get(worse))
        if all(isinstance(number, (int, float)) for number in numbers):
            require(not numbers[0] < numbers[1], f"{place}: {better}: {numbers[0]}, below the "
                    f"{worse} of {numbers[1]}; swap the answers, or remove the scores")
