"""Chats, preferences and prompts in the forms in which the hubs hold them."""

import copy
import math
from collections import Counter

import pytest
from conftest import refusal, say, write_jsonl, write_lines

import adapt
from support.chat_forms import CHATS as CHAT_FORMS
from support.chat_forms import form_of
from support.chats import checked_chat, checked_preference, checked_request
from support.fields import without_nulls
from support.rows import read_set


def sent(*turns):
    """ShareGPT's messages of "sender: text" strings."""
    pairs = [turn.split(": ", 1) for turn in turns]
    return [{"from": sender, "value": text} for sender, text in pairs]


def transcript(*texts):
    """A conversation as in HH-RLHF."""
    speakers = ["\n\nHuman: ", "\n\nAssistant: "]
    return "".join(speakers[i % 2] + text for i, text in enumerate(texts))


SHARED = sent("human: q", "gpt: a")
TWO, LONG = say("u: q", "a: a"), say("s: be", "u: q", "a: a", "u: r", "a: b")
ALPACA = {"instruction": " Add. ", "input": "1 2\n", "output": "3", "text": "Below is ..."}
SUM = say("u: Add.\n\n1 2", "a: 3")

# ---- What is read --------------------------------------------------------------------------------

# (row, its messages, what its file is said to be read as). The messages of all but the two rows of
# OpenOrca and of TRL's messages are what Open Instruct (e6c3044) makes of them: the conversions of
# its utils.py, scripts/data/sft, scripts/data/sft_v1_v2 and scripts/data/preferences were run, and
# TRL 0.28.0's maybe_convert_to_chatml and maybe_extract_prompt.
CHATS = [
    ({"id": "1", "conversations": SHARED}, TWO, "ShareGPT (conversations)"),
    ({"conversations": sent("system: be", "human: q", "chatgpt: a", "user: r", "bing: b")}, LONG,
     "ShareGPT (conversations)"),
    ({"conversations": sent("User: q", "Assistant: a", "human: r", "bard: b"), "system": "be"},
     LONG, "ShareGPT (conversations)"),
    ({"conversations": LONG, "source": "s"}, LONG, "ShareGPT (conversations)"),
    ({"conversations": [{**message, "weight": float(message["from"] == "gpt")}
                        for message in SHARED]}, TWO, "ShareGPT (conversations)"),  # SlimOrca
    ({"conversation": TWO, "model": "m", "turn": 1}, TWO, "ShareGPT (conversation)"),  # WildChat
    ({"messages": SHARED}, TWO, None),
    (ALPACA, SUM, "Alpaca (instruction, output)"),
    ({**ALPACA, "messages": [], "prompt": "Below is an instruction that describes a task: Add."},
     SUM, "Alpaca (instruction, output)"),
    ({**ALPACA, "input": ""}, say("u:  Add. ", "a: 3"), "Alpaca (instruction, output)"),
    ({"instruction": "Add.", "context": "1 2", "response": "3", "category": "closed_qa"}, SUM,
     "Dolly (instruction, response)"),
    ({"prompt": "q", "completion": "a"}, TWO, "prompt and completion"),
    ({"prompt": TWO[:1], "completion": TWO[1:]}, TWO, "prompt and completion"),
    ({"prompt": SHARED[:1], "completion": "a"}, TWO, "prompt and completion"),
    ({"prompt": transcript("q") + "\n\nAssistant:", "completion": " a"}, say("u: q", "a:  a"),
     "HH-RLHF (texts with Human: and Assistant:)"),
    ({"id": "niv.1", "system_prompt": "be", "question": "q", "response": "a"}, LONG[:3],
     "question and response"),
    ({"id": "niv.1", "system_prompt": "", "question": "q", "response": "a"}, TWO,
     "question and response"),
    ({"question": "q", "answer": "a", "source": "s"}, TWO, "question and answer"),
    ({"query": "q", "response": "a", "original_question": "o"}, TWO, "query and response"),
    ({"query": "q", "answer": "a", "lang": "python"}, TWO, "query and answer"),
    ({"inputs": "q", "targets": "a", "language_code": "eng"}, TWO, "inputs and targets")]

PAIR = {"prompt": say("u: q"), "chosen": "a", "rejected": "b"}
DEEP = {"prompt": say("u: q", "a: a", "u: r"), "chosen": "b", "rejected": "c"}
PREFERENCES = [
    ({"chosen": sent("user: q", "assistant: a"), "rejected": sent("user: q", "assistant: b")},
     PAIR, None),
    ({"prompt": sent("human: q"), "chosen": sent("gpt: a"), "rejected": sent("gpt: b")},
     PAIR, None),
    # LLaMA-Factory's and Intel's Orca pairs
    ({"conversations": sent("human: q"), "chosen": sent("gpt: a")[0],
      "rejected": sent("gpt: b")[0]}, PAIR, None),
    ({"question": "q", "chosen": "a", "rejected": "b", "system": "", "prompt": ""}, PAIR, None),
    ({"instruction": "Add.", "input": "1 2", "chosen": "a", "rejected": "b"},
     {**PAIR, "prompt": SUM[:1]}, None),
    ({"chosen": transcript("q", "a", "r", "b"), "rejected": transcript("q", "a", "r", "c")}, DEEP,
     "HH-RLHF (texts with Human: and Assistant:)"),
    ({"chosen": transcript("Human: or\nAssistant: ?", "a"),
      "rejected": transcript("Human: or\nAssistant: ?", "b")},
     {**PAIR, "prompt": say("u: Human: or\nAssistant: ?")},
     "HH-RLHF (texts with Human: and Assistant:)"),
    ({"prompt": transcript("q", "a", "r") + "\n\nAssistant:", "chosen": " b", "rejected": " c",
      "response": " b"}, DEEP, "HH-RLHF (texts with Human: and Assistant:)")]

PROMPTS = [
    ({"conversations": sent("human: q")}, say("u: q"), "ShareGPT"),
    ({"conversation": LONG[:4]}, LONG[:4], "ShareGPT"),
    ({"conversations": SHARED, "prompt": "q"}, say("u: q"), "ShareGPT"),
    ({"instruction": "Add.", "context": "1 2", "response": "3"}, SUM[:1], "instruction"),
    ({"system_prompt": "be", "question": "q", "response": "a"}, LONG[:2], "question"),
    ({"query": "q", "answer": "a"}, say("u: q"), "query"),
    ({"inputs": "q", "targets": "a"}, say("u: q"), "inputs"),
    ({"prompt": transcript("q", "a", "r") + "\n\nAssistant:"}, say("u: q", "a: a", "u: r"), "HH")]


def without_weights(messages):
    return [{key: message[key] for key in ("role", "content")} for message in messages]


@pytest.mark.parametrize("row, wanted, name", CHATS + PREFERENCES)
def test_a_form_of_the_hubs_is_read_and_named_once(row, wanted, name, tmp_path, capsys):
    """Also with the columns of other rows of the same table, which are null or NaN in this one."""
    method = "dpo" if "chosen" in row else "sft"
    columns = dict.fromkeys(("messages", "conversations", "prompt", "completion", "instruction",
                             "output", "label", "weight", "system", "tools", "margin"))
    file = write_lines(tmp_path / "rows.jsonl", [row, {**columns, **row}])
    config = adapt.AdaptConfig(method=method)
    found = read_set(str(file), config, False, 0.1, Counter())
    assert [place for place, _ in found] == [f"{file}:1", f"{file}:2"]
    for _, checked in found:
        assert (checked if method == "dpo" else without_weights(checked)) == wanted
    said = [line for line in capsys.readouterr().out.splitlines() if "read as" in line]
    assert said == ([f"{file}: read as {name}"] if name else [])
    check = checked_preference if method == "dpo" else checked_chat
    scores = {"score_chosen": math.nan, "score_rejected": 5.0, "num_turns": math.nan}
    assert check({**columns, **scores, **copy.deepcopy(row)}, "") == found[0][1]


@pytest.mark.parametrize("row, wanted, name", PROMPTS)
def test_prompts_are_read_in_the_same_forms(row, wanted, name):
    assert checked_request(row, "") == wanted


def test_what_comes_before_a_completion_is_not_trained():
    """TRL's default for prompt and completion: an answer in the prompt is seen alone."""
    row = {"prompt": LONG[:4], "completion": say("a: b", "u: s", "a: c")}
    found = checked_chat(row, "")
    assert [message.get("weight") for message in found] == [None, None, 0, None, None, None, None]
    assert without_weights(found) == LONG[:4] + row["completion"]


def test_messages_from_a_table_of_both_kinds_have_nulls():
    """Arrow gives each message all the keys, and each row all the columns."""
    rows = [{"conversations": [{"role": None, "content": None, "name": None, "weight": math.nan,
                                **message} for message in SHARED]},
            {"messages": [{"from": None, "value": None, "tool_calls": None, **message}
                          for message in TWO]},
            {"messages": [{"from": "the web", "value": 3, **message} for message in TWO]}]
    for row in rows:
        assert checked_chat({"id": None, **row}, "") == TWO
    assert without_nulls({"a": None, "b": math.nan, "c": [None], "d": 0}) == {"c": [None], "d": 0}


# ---- What cannot be trained ----------------------------------------------------------------------

@pytest.mark.parametrize("row, place", [
    ({"conversations": sent("human: q", "function_call: f", "observation: o", "gpt: a")},
     'conversations[1].from: "function_call" is not one of human, user, gpt, chatgpt, bard, bing, '
     "assistant, system; the chat format of OLMo has no tools"),
    ({"conversations": sent("human: q", "tool: 4", "gpt: a")}, 'conversations[1].from: "tool" is'),
    ({"conversations": sent("human: q", "Bob: a")},
     'conversations[1].from: "Bob" is not one of human, user, gpt, '),
    ({"conversations": sent("human: q", "gpt:  \n")}, "conversations[1].value: an empty text"),
    ({"conversations": [SHARED[0], {"from": "gpt", "value": [{"type": "text", "text": "a"}]}]},
     "conversations[1].value: a list, not a text; join the texts"),
    ({"conversations": sent("human: q", "human: r", "gpt: a")}, "conversations[1].from: user"),
    ({"conversations": sent("gpt: a", "human: q")}, "conversations[0].from: assistant, where"),
    ({"conversations": sent("human: q")}, "conversations[0].from: user, where the last"),
    ({"messages": None, "conversations": []}, "conversations: an empty list"),
    ({"conversations": ["q", "a"]}, "conversations[0]: a string"),  # LIMA
    ({"conversations": [SHARED[0], {**SHARED[1], "weight": 0}]}, "conversations: none is trained"),
    ({"conversations": SHARED, "tools": "[{}]"}, "tools: "),
    ({**ALPACA, "output": " "}, "output: an empty text"),
    ({**ALPACA, "output": None}, "output is missing"),
    ({**ALPACA, "instruction": 3}, "instruction: a number"),
    ({**ALPACA, "input": ["1"]}, "input: a list"),
    ({**ALPACA, "history": [["before", "then"]]}, "history: no message"),
    ({**ALPACA, "prompt": "Below is an instruction that describes a task. Divide."},
     "prompt is not the first message"),
    ({"instruction": "i", "input": "x", "context": "y", "response": "r"}, "context: no message"),
    ({"prompt": "q", "completion": ""}, "completion: an empty text"),
    ({"prompt": "q", "completion": TWO}, "completion[0].role: user, where assistant"),
    ({"prompt": TWO, "completion": "b"}, "prompt[1].role: assistant, where the last"),
    ({"prompt": "q", "completion": "a", "label": False}, "label: it says whether"),
    ({"question": "q", "answer": "a", "label": 1}, "label: it says whether"),
    ({"question": "q", "answer": True}, "answer: true or false"),
    ({"question": "q", "answer": "a", "context": {"text": ["read this"]}}, "context: no message"),
    ({"prompt": "q", "response": "a", "is_safe": False}, "completion is missing"),
    ({"chosen": transcript("q", "a"), "rejected": transcript("q", "a")},
     "chosen and rejected are the same"),
    ({"chosen": transcript("q", "a"), "rejected": transcript("q", " ")}, "rejected[1].content: an"),
    ({"chosen": transcript("q", "a"), "rejected": transcript("q", "a", "r")}, "rejected[2].role"),
    ({"chosen": transcript("q", "a"), "rejected": transcript("p", "a")},
     "chosen and rejected answer different"),
    ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "prompt is missing"),
    ({"question": "q", "chosen": {"from": "gpt", "value": ""}, "rejected": SHARED[1]},
     "chosen.value: an empty"),
    ({"question": "q", "chosen": SHARED[0], "rejected": SHARED[1]}, "chosen.from: user, where"),
    ({"question": "q", "chosen": {**SHARED[1], "weight": 0}, "rejected": SHARED[1]},
     "chosen.weight: 0, and only"),
    ({"prompt": "q", "chosen": sent("gpt: a"), "rejected": sent("gpt: b", "gpt: c")},
     "rejected[1].from: assistant"),
    ({"conversations": SHARED, "chosen": "a", "rejected": "b"},
     "conversations[1].from: assistant")])
def test_what_cannot_be_trained_is_named_by_the_rows_own_keys(row, place, tmp_path):
    """And dropped and counted on request."""
    method = "dpo" if "chosen" in row else "sft"
    if method == "dpo":
        sound = PREFERENCES[5 if "Human" in row["chosen"] else 0][0]
    else:  # of the row's form, if it has one
        form = form_of(without_nulls(row), CHAT_FORMS)
        sound = next((chat for chat, *_ in CHATS if form_of(chat, CHAT_FORMS) == form), ALPACA)
    file = write_lines(tmp_path / "rows.jsonl", [sound, row])
    config = adapt.AdaptConfig(method=method)
    message = refusal(read_set, str(file), config, False, 0.1, Counter())
    assert f"{file}:2: {place}" in message and "mend 1 of 2 rows" in message
    counts = Counter()
    config = adapt.AdaptConfig(method=method, faulty="skip")
    assert len(read_set(str(file), config, False, 0.1, counts)) == 1
    assert counts["faulty rows skipped"] == 1


def test_a_row_of_another_form_is_an_error_at_its_line(tmp_path, capsys):
    """A folder may hold files of several forms, and each is said."""
    folder = tmp_path / "chats"
    folder.mkdir()
    forms = {"a.jsonl": {"conversations": SHARED}, "b.jsonl": ALPACA, "c.jsonl": {"messages": TWO},
             "d.jsonl.gz": {"prompt": "q", "completion": "a"}}
    for name, row in forms.items():
        write_jsonl(folder / name, [row, row])
    config = adapt.AdaptConfig()
    found = read_set(str(folder), config, False, 0.1, Counter())
    assert [messages[-1]["content"] for _, messages in found] == ["a", "a", "3", "3", "a", "a",
                                                                  "a", "a"]
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}/a.jsonl: read as ShareGPT (conversations)",
        f"{folder}/b.jsonl: read as Alpaca (instruction, output)",
        f"{folder}/d.jsonl.gz: read as prompt and completion"]
    mixed = write_lines(tmp_path / "mixed.jsonl", [
        {}, {"conversations": SHARED}, ALPACA, {"conversations": None, "messages": TWO},
        {"conversations": SHARED}])
    message = refusal(read_set, str(mixed), config, False, 0.1, Counter())
    assert f"{mixed}:1: messages is missing" in message
    assert (f"{mixed}:3: it holds Alpaca (instruction, output), and the file is read as ShareGPT "
            f"(conversations), which {mixed}:2 holds") in message
    assert f"{mixed}:4: it holds messages, and" in message
    assert "mend 3 of 5 rows" in message
    counts = Counter()
    skipping = adapt.AdaptConfig(faulty="skip")
    assert len(read_set(str(mixed), skipping, False, 0.1, counts)) == 2
    assert counts["faulty rows skipped"] == 3
    texts = write_lines(tmp_path / "texts.jsonl", [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": transcript("q") + "\n\nAssistant:", "chosen": " a", "rejected": " b"}])
    message = refusal(read_set, str(texts), adapt.AdaptConfig(method="dpo"), False, 0.1, Counter())
    assert f"{texts}:2: it holds HH-RLHF (texts with Human: and Assistant:), and" in message
