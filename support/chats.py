"""Chats and preferences as they lie in files, checked row by row."""

from corpus.documents import parse, read_records, without_surrogates
from corpus.questions import stdlib_chats, stdlib_preferences
from support.files import UserError

ROLES = ("system", "user", "assistant")


def require(condition, fault):
    if not condition:
        raise UserError(fault)


def read_set(path, config, held_out, eval_share, counts):
    """[(place, row)] of a set that was checked: {messages} for SFT, {prompt, chosen, rejected}.

    UserError for the faulty rows, with their places and the remedy; skipped ones are counted.
    """
    check = {"sft": checked_chat, "dpo": checked_preference}[config.method]
    if path == "stdlib":
        embedded = {"sft": stdlib_chats, "dpo": stdlib_preferences}[config.method]
        return [(f"stdlib:{name}", check(row, name)) for name, row in embedded(held_out,
                                                                               eval_share)]
    rows, faults = [], []
    for record in read_records(path, "", counts):
        try:
            rows.append((record.place, check(parse(record), record.place)))
        except UserError as fault:
            faults.append(str(fault))
    counts["faulty rows skipped"] += len(faults)
    if faults and config.faulty == "stop":
        more = f"\n  and {len(faults) - 5:,} more" if len(faults) > 5 else ""
        raise UserError("; ".join(faults[:5]) + more + f"; mend {len(faults):,} of "
                        f"{len(faults) + len(rows):,} rows, or leave them out: --faulty=skip")
    for fault in faults[:1]:
        print(f"skipped, to name one: {fault}")
    return rows


def checked_chat(row, place):
    """{messages} of a chat in Tulu's format; its last message is an assistant's."""
    require(isinstance(row, dict) and "messages" in row,
            f"{place}: messages is missing; a chat is an object with a list of them")
    return {"messages": checked_messages(row["messages"], f"{place}: messages", "assistant")}


def checked_messages(messages, place, last):
    """[{role, content}]: perhaps a system message, then user and assistant in turn."""
    require(isinstance(messages, list) and messages,
            f"{place} is no list of messages, or an empty one")
    checked = []
    for number, message in enumerate(messages):
        here = f"{place}[{number}]"
        require(isinstance(message, dict), f"{here} is no object with a role and content")
        role, content = message.get("role"), message.get("content")
        require(role in ROLES, f"{here}.role: {repr(role)[:20]} is none of {', '.join(ROLES)}")
        require(isinstance(content, str) and content.strip(), f"{here}.content is no text or empty")
        require(content == without_surrogates(content), f"{here}.content holds half a character")
        before = checked[-1]["role"] if checked else None
        wanted = {None: ("system", "user"), "user": ("assistant",)}.get(before, ("user",))
        require(role in wanted, f"{here}.role: {role} comes where {' or '.join(wanted)} is due")
        checked.append({"role": role, "content": content})
    require(checked[-1]["role"] == last,
            f"{place}: the last message is the {checked[-1]['role']}'s, not the {last}'s")
    return checked


def checked_preference(row, place):
    """{prompt: messages, chosen: text, rejected: text} of a row in UltraFeedback's format."""
    require(isinstance(row, dict) and {"chosen", "rejected"} <= row.keys(),
            f"{place}: chosen and rejected are wanted, two lists of messages or, with a prompt, "
            "two texts")
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    require(type(chosen) is type(rejected), f"{place}: chosen is {type(chosen).__name__} and "
            f"rejected {type(rejected).__name__}; both must be lists of messages, or both texts")
    if isinstance(chosen, str):
        require(prompt is not None, f"{place}: prompt is missing; chosen and rejected are texts")
        if not isinstance(prompt, list):
            prompt = [{"role": "user", "content": prompt}]
        prompt = checked_messages(prompt, f"{place}: prompt", "user")
        chosen, rejected = ([*prompt, {"role": "assistant", "content": answer}]
                            for answer in (chosen, rejected))
        prompt = None
    chosen = checked_messages(chosen, f"{place}: chosen", "assistant")
    rejected = checked_messages(rejected, f"{place}: rejected", "assistant")

    def texts(messages):
        return [(message["role"], message["content"].strip()) for message in messages]
    require(texts(chosen[:-1]) == texts(rejected[:-1]),
            f"{place}: chosen and rejected answer different prompts; they may differ in their last "
            "message alone")
    require(texts(chosen) != texts(rejected), f"{place}: chosen and rejected are the same")
    if prompt is not None:  # as UltraFeedback repeats it
        first = next(text for role, text in texts(chosen) if role == "user")
        require(isinstance(prompt, str) and prompt.strip() == first,
                f"{place}: prompt is not the first user's message of chosen")
    return {"prompt": chosen[:-1], "chosen": chosen[-1]["content"],
            "rejected": rejected[-1]["content"]}
