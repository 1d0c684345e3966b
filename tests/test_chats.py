"""Rows of chats, preferences and prompts: what is used, what is refused and how that is said."""

import math
from collections import Counter

import pytest
from conftest import refusal, say, write_lines

import adapt
import data
from support.chats import checked_chat, checked_preference, checked_request
from support.rows import Faults, read_examples, read_set

# ---- Faulty rows ---------------------------------------------------------------------------------

class ByteTokenizer:
    """A token a byte."""

    eos_token_id = 256

    def encode(self, text):
        return list(text.encode())


A_CHAT, ANSWER = say("u: q", "a: a"), say("a: b")[0]
CHATS = [  # (a line of a file of chats, the key that the error names): one for each check
    ("[1", ""), (b'"\xff"', ""), ("[]", "messages"), ("{}", "messages"),
    ({"messages": "hi"}, "messages"), ({"messages": []}, "messages: an empty"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "human", "content": "q"}]}, 'messages[0].role: "human" is'),
    ({"messages": [{"role": "user", "content": ["q"]}]}, "messages[0].content: a list"),
    ({"messages": say("u: q", "a:  \n\u00a0 ")}, "messages[1].content"),
    ({"messages": say("u: \ud83d q", "a: a")}, "messages[0].content"),  # a lone surrogate
    ({"messages": say("u: q", "u: q", "a: a")}, "messages[1].role: user"),
    ({"messages": say("a: a")}, "messages[0].role: assistant"),
    ({"messages": say("u: q", "a: a", "s: s")}, "messages[2].role: system"),
    ({"messages": say("s: s", "a: a")}, "messages[1].role: assistant"),
    ({"messages": say("u: q")}, "messages[0].role: user")]
PREFERENCES = [
    ("3", "chosen or rejected"), ({"chosen": "a", "prompt": "q"}, "rejected is missing"),
    ({"chosen": "a", "rejected": "b"}, "prompt is missing"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt: a number"),
    ({"prompt": 7, "chosen": A_CHAT, "rejected": [A_CHAT[0], ANSWER]}, "prompt"),
    ({"prompt": "p", "chosen": A_CHAT, "rejected": [A_CHAT[0], ANSWER]}, "prompt"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "rejected: an empty"),
    ({"prompt": "q", "chosen": "a ", "rejected": "a"}, "chosen and rejected are the same"),
    ({"chosen": A_CHAT, "rejected": "b"}, "chosen is a list and rejected a string"),
    ({"chosen": 1, "rejected": 2}, "chosen: a number"),
    ({"chosen": A_CHAT, "rejected": say("u: p", "a: b")}, "chosen and rejected answer different"),
    ({"chosen": A_CHAT, "rejected": [ANSWER]}, "prompt is missing; rejected is an answer alone")]
SOUND = {"sft": {"messages": say("s: s", "u: q", "a: a"), "id": 3},
         "dpo": {"prompt": "q", "chosen": A_CHAT, "rejected": [A_CHAT[0], ANSWER], "score": 1}}


@pytest.mark.parametrize("method, line, key", [("sft", *case) for case in CHATS]
                         + [("dpo", *case) for case in PREFERENCES])
def test_a_faulty_row_is_named_with_its_place_and_the_remedy(tmp_path, method, line, key):
    """Or dropped and counted, on request; the sound rows around it are kept."""
    file = write_lines(tmp_path / "rows.jsonl", [SOUND[method], line, "", SOUND[method], line])
    message = refusal(read_set, str(file), adapt.AdaptConfig(method=method), False, 0.1, Counter())
    for words in (f"{file}:2: {key}", f"{file}:5: {key}", "2 of 4 rows", "--faulty=skip"):
        assert words in message
    skipping, counts = adapt.AdaptConfig(method=method, faulty="skip"), Counter()
    found = read_set(str(file), skipping, False, 0.1, counts)
    assert [place for place, _ in found] == [f"{file}:1", f"{file}:4"]
    assert counts["faulty rows skipped"] == 2


def test_many_faults_are_ten_examples_and_counts_by_reason(tmp_path, capsys):
    """Numbers and places are no reasons; with "skip" all reasons are named too."""
    empty = [{"messages": say(*["u: q", "a: a"] * i, "u: q", "a: ")} for i in range(9)]
    file = write_lines(tmp_path / "rows.jsonl", [{}, *empty] * 200 + [SOUND["sft"]])
    config = adapt.AdaptConfig()
    message = refusal(read_set, str(file), config, False, 0.1, Counter())
    for words in (f"{file}:1: messages", "2,000 of 2,001 rows", "--faulty=skip"):
        assert words in message
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 14 and [line.split(":")[1] for line in shown[1:11]] == [
        str(i) for i in range(1, 11)]
    assert shown[12].startswith(f"  1,800 rows, the first {file}:2: messages[N].content: ")
    assert shown[13].startswith(f"  200 rows, the first {file}:1: messages is missing")
    counts = Counter()
    assert len(read_set(str(file), adapt.AdaptConfig(faulty="skip"), False, 0.1, counts)) == 1
    assert counts["faulty rows skipped"] == 2_000
    assert capsys.readouterr().out.splitlines()[1:] == shown[12:]


def test_a_file_of_another_kind_is_one_fault(tmp_path, capsys):
    """Said once, with no word of skipping rows: none would be left."""
    file = write_lines(tmp_path / "rows.jsonl", [SOUND["dpo"]] * 20)
    message = refusal(read_set, str(file), adapt.AdaptConfig(), False, 0.1, Counter())
    assert message.startswith(f"{file}:1: messages") and "configs/tiny_dpo.py" in message
    assert message.endswith(" (all 20 rows have this fault)")
    assert capsys.readouterr().out == ""


def test_one_row_is_said_in_the_singular():
    faults = Faults()
    for place, fault in (("f:1", "f:1: one"), ("f:2", "f:2: two"), ("f:3", "f:3: two")):
        faults.add(place, fault)
    assert faults.table().splitlines() == ["  2 rows, the first f:2: two",
                                           "  1 row, the first f:1: one"]


# ---- Other forms ---------------------------------------------------------------------------------

@pytest.mark.parametrize("check, row, words", [
    (checked_chat, A_CHAT, ["messages is missing", "a list", '{"messages": [...]}']),
    (checked_chat, {"prompt": "q", "completion": None}, ["completion: null, and no value"]),
    (checked_chat, {"prompt": "q", "chosen": "a", "rejected": "b"}, ["configs/tiny_dpo.py"]),
    (checked_chat, A_CHAT[0], ["messages is missing", "role, content"]),
    (checked_chat, {"text": "a document"}, ["messages is missing", "are: text"]),
    (checked_chat, {"messages": [{"role": "tool", "content": "4"}]}, ['"tool"', "no tools"]),
    (checked_chat, {"messages": [{"role": "environment", "content": "4"}]}, ["no tools"]),
    (checked_chat, {"messages": say("s: ")}, ["messages[0].role: system"]),
    (checked_preference, {"messages": A_CHAT}, ["chosen or rejected", "configs/tiny_sft.py"]),
    (checked_preference, {"input": "q", "chosen": "a", "rejected": "b"},
     ["prompt is missing", "input, chosen, rejected"]),
    (checked_preference, {"prompt": "q", "completion": "a", "label": True}, ["KTO"]),
    (checked_request, {"custom_id": 1, "body": {}}, ["prompt", "custom_id, body"]),
    (checked_request, "q", ["prompt", "a string"]), (checked_request, [], ["prompt", "a list"]),
    (checked_request, {"prompt": None, "id": 1}, ["prompt: null, and no value; give one"])])
def test_a_row_of_another_form_is_told_what_it_holds_and_what_to_do(check, row, words):
    message = refusal(check, row, "file:3")
    assert message.startswith("file:3: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize("content", ["", "\n\n"])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_file_without_rows_is_no_set(method, content, tmp_path):
    file = tmp_path / "empty.jsonl"
    file.write_text(content)
    config = adapt.AdaptConfig(method=method, train_data=str(file))
    message = refusal(read_examples, config, "train_data", None, 0.1)
    assert f"{file}: holds no rows" in message
    config = adapt.AdaptConfig(method=method)  # nobody named a set: nothing is tuned by default
    assert "train_data" in refusal(read_examples, config, "train_data", None, 0.1)
    assert read_examples(config, "eval_data", None, 0.1) == []


def test_all_forms_of_a_preference_are_one():
    """Two lists with or without a prompt, two texts beside a text or beside messages."""
    rejected = [A_CHAT[0], ANSWER]
    forms = [{"chosen": A_CHAT, "rejected": rejected},
             {"prompt": " q", "chosen": A_CHAT, "rejected": rejected},
             {"prompt": "q", "chosen": "a", "rejected": "b"},
             {"prompt": A_CHAT[:1], "chosen": "a", "rejected": "b", "score_chosen": 3}]
    wanted = {"prompt": A_CHAT[:1], "chosen": "a", "rejected": "b"}
    assert [checked_preference(form, "") for form in forms] == [wanted] * 4
    longer = [*A_CHAT, *say("u: r")]
    row = {"chosen": [*longer, ANSWER], "rejected": [*longer, *say("a: c")], "prompt": "q"}
    assert checked_preference(row, "") == {"prompt": longer, "chosen": "b", "rejected": "c"}


def test_trls_conversational_preferences_are_read():
    """A prompt as messages, the answers alone in both sides. It is the row with the prompt in both:
    TRL 0.28.0's maybe_extract_prompt splits that one into this one."""
    prompt = say("s: be", "u: q", "a: a", "u: r")
    one = {"prompt": prompt, "chosen": say("a: b"), "rejected": say("a: c")}
    whole = {"chosen": prompt + say("a: b"), "rejected": prompt + say("a: c")}
    wanted = {"prompt": prompt, "chosen": "b", "rejected": "c"}
    for row in (one, whole, {**whole, "prompt": prompt}, {**one, "chosen": "b", "rejected": "c"}):
        assert checked_preference(row, "") == wanted
    text = {"prompt": "q", "chosen": say("a: b"), "rejected": say("a: c")}
    assert checked_preference(text, "")["prompt"] == say("u: q")
    for wrong, key in (({**whole, "prompt": prompt[:2]}, None),
                       ({**whole, "prompt": say("u: x")}, "prompt"),
                       ({**one, "chosen": say("a: b", "u: s")}, "chosen[1].role: user"),
                       ({**one, "rejected": say("a: b", "a: c")}, "rejected[1].role: assistant"),
                       ({**one, "prompt": prompt[:3]}, "prompt[2].role: assistant"),
                       ({**one, "chosen": say("a: b", "u: s", "a: t")}, "chosen and rejected")):
        if key:
            assert refusal(checked_preference, wrong, "f:1").startswith(f"f:1: {key}")
        else:
            assert checked_preference(wrong, "") == wanted


# ---- Fields that change what a row means ---------------------------------------------------------

TOOL = [{"type": "function", "function": {"name": "f"}}]
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHECKS = [(checked_chat, {"messages": A_CHAT}), (checked_preference, PAIR),
          (checked_request, {"prompt": "q"}), (checked_request, {"messages": A_CHAT[:1]}),
          (checked_request, {"instruction": "q", "input": "i"})]


@pytest.mark.parametrize("check, row", CHECKS)
@pytest.mark.parametrize("field, value", [
    ("tools", TOOL), ("functions", TOOL), ("tool_choice", "auto"), ("images", ["a.png"]),
    ("documents", [{"title": "t", "text": "some"}]), ("context", "more"), ("system", ["be"]),
    ("history", [["before", "then"]]), ("choices", {"text": ["one", "two"], "label": ["A", "B"]}),
    ("chat_template_kwargs", {"thinking": True})])
def test_a_field_that_changes_what_a_row_means_is_refused_by_name(check, row, field, value):
    """Null and empty ones say nothing; other columns describe the row."""
    message = refusal(check, {**row, field: value}, "f:1")
    assert message.startswith(f"f:1: {field}: ")
    columns = {"id": 3, "source": "s", "dataset": "d", "prompt_id": "x", "score_chosen": 7.5,
               "score_rejected": 7.5, "category": None, "language": "en", "key": 1, "kwargs": [{}]}
    plain = check(row, "")
    for nothing in (None, "", " ", [], {}, False):
        assert check({**row, field: nothing, **columns}, "") == plain


@pytest.mark.parametrize("field, value", [
    ("tool_calls", TOOL), ("function_call", {"name": "f"}), ("function_calls", "f(x=1)"),
    ("functions", '[{"name": "f"}]'), ("name", "Ann"),
    ("reasoning_content", "so"), ("reasoning", "so"), ("mask", 1), ("loss_mask", [1]),
    ("weight", 0.5), ("loss", "yes"), ("train", 2), ("images", ["a"])])
def test_a_field_that_changes_what_a_message_means_is_refused_by_name(field, value):
    messages = [A_CHAT[0], {**A_CHAT[1], field: value}]
    for check, row, key in (
            (checked_chat, {"messages": messages}, "messages"),
            (checked_preference, {"chosen": messages, "rejected": say("u: q", "a: b")}, "chosen"),
            (checked_request, {"messages": [*messages, A_CHAT[0]]}, "messages")):
        assert refusal(check, row, "f:1").startswith(f"f:1: {key}[1].{field}: ")
    for nothing in (None, "", []) if field not in ("weight", "loss", "train") else (None, 1, True):
        messages[1][field] = nothing
        row = {"messages": [{**turn, "id": 3, "timestamp": "t"} for turn in messages]}
        assert checked_chat(row, "") == A_CHAT


def test_rows_of_known_sets_are_read():
    """With the columns that their cards show: many describe a row, and some repeat a part of it."""
    whole, other = say("s: be", "u: q", "a: a"), say("s: be", "u: q", "a: b")
    for row in ({"dataset": "open_orca", "id": "open_orca_1", "messages": whole},  # Tulu 2
                {"id": "1", "messages": whole, "source": "ai2-adapt-dev/flan"},  # Tulu 3
                {"prompt": "q", "prompt_id": "f0", "messages": whole},  # UltraChat
                {"prompt": "be", "prompt_id": "f0", "messages": whole, "category": "Chat"},
                {"prompt": "q", "prompt_id": "f0", "chosen": whole, "rejected": other,
                 "messages": whole, "score_chosen": 8.0, "score_rejected": 2.5}):
        assert checked_chat(row, "") == whole
    for row in ({"prompt": "q", "prompt_id": "f0", "chosen": whole, "rejected": other,
                 "messages": whole, "score_chosen": 7.0, "score_rejected": 7.0},  # UltraFeedback
                {"source": "s", "prompt": "q", "chosen": whole, "chosen-rating": 5.0,
                 "chosen-model": "m", "rejected": other, "rejected-rating": 3.75}):  # Argilla's
        assert checked_preference(row, "") == {"prompt": whole[:2], "chosen": "a", "rejected": "b"}
    for row in ({"dataset": "helpful_base", "instruction": "q", "output": "a", "datasplit": "eval",
                 "generator": "text_davinci_003"},  # AlpacaEval
                {"key": 1000, "prompt": "q", "instruction_id_list": ["punctuation:no_comma"],
                 "kwargs": [{}]},  # IFEval
                {"instruction": "q", "input": "", "output": "a"}):  # Alpaca
        assert checked_request(row, "") == say("u: q")


def test_null_columns_beside_what_a_row_asks_say_nothing():
    """One table of several sets, as parquet and datasets make it, has null where a row has none."""
    columns = dict.fromkeys(("messages", "prompt", "instruction", "weight", "system", "chosen"))
    for row in ({"prompt": "q"}, {"instruction": "q"}, {"messages": A_CHAT[:1]},
                {"messages": A_CHAT[:1], "prompt": ""}):
        assert checked_request({**columns, **row}, "") == say("u: q")
    assert checked_chat({**columns, "messages": A_CHAT, "prompt": ""}, "") == A_CHAT
    assert checked_preference({**columns, **PAIR}, "")["prompt"] == say("u: q")


def test_names_of_texts_are_no_texts():
    """Beside the messages: the letters of choices, the roles of a history, its speakers."""
    chat = say("u: Which? A. red B. blue", "a: A")
    row = {"messages": chat, "choices": {"label": ["1", "2"], "text": ["red", "blue"]},
           "history": [{"role": "human", "name": "Ann", "content": "Which?"},
                       {"from": "human", "value": "red"}]}
    assert checked_chat(row, "") == chat
    row["choices"]["text"][1] = "green"
    assert refusal(checked_chat, row, "f:1").startswith("f:1: choices: ")


@pytest.mark.parametrize("row, key", [
    ({**PAIR, "score_chosen": 3, "score_rejected": 8.5}, "score_chosen: 3"),
    ({**PAIR, "chosen-rating": 1, "rejected-rating": 2}, "chosen-rating: 1"),
    ({**PAIR, "score_chosen": "7.5", "score_rejected": "10"}, 'score_chosen: "7.5"'),
    ({**PAIR, "margin": 0.5}, "margin"), ({**PAIR, "is_tie": True}, "is_tie"),
    ({**PAIR, "weight": 0.5}, "weight"), ({**PAIR, "weight": 0}, "weight"),
    ({"chosen": [A_CHAT[0], {**A_CHAT[1], "weight": 0}], "rejected": say("u: q", "a: b")},
     "chosen[1].weight: 0")])
def test_a_preference_that_contradicts_itself_is_refused(row, key):
    assert refusal(checked_preference, row, "f:1").startswith(f"f:1: {key}")
    assert checked_preference({**PAIR, "weight": 1.0, "margin": None}, "")
    # "10" is above "9"; the others are no numbers
    for score in ("10", "N/A", [1], 10**400, math.nan, "nan"):
        assert checked_preference({**PAIR, "score_chosen": score, "score_rejected": "9"}, "")


def test_the_system_beside_the_messages_is_used():
    """At their head; the same text there is no second one, another one is refused."""
    brief, other = say("s: be brief"), say("s: be long")
    for key in ("system", "system_prompt"):
        row = {key: " be brief"}
        wanted = [{"role": "system", "content": " be brief"}]
        assert checked_chat({**row, "messages": A_CHAT}, "") == wanted + A_CHAT
        assert checked_chat({**row, "messages": brief + A_CHAT}, "") == brief + A_CHAT
        empty = {**row, "messages": say("s: ") + A_CHAT}
        assert f"f:1: {key}: is not the system's" in refusal(checked_chat, empty, "f:1")
        assert checked_preference({**row, **PAIR}, "")["prompt"] == wanted + A_CHAT[:1]
        for prompt in ({"prompt": "q"}, {"instruction": "q"}, {"messages": A_CHAT[:1]}):
            assert checked_request({**row, **prompt}, "") == wanted + A_CHAT[:1]
        message = refusal(checked_chat, {**row, "messages": other + A_CHAT}, "f:1")
        assert message.startswith(f"f:1: {key}: ")


def test_a_turn_of_weight_0_is_read_and_not_trained(tmp_path):
    """Under the names that OpenAI, ms-swift and Axolotl give it."""
    tokenizer = ByteTokenizer()
    chat = say("u: q", "a: one", "u: r", "a: two")
    ids, trained = data.render_chat(chat, tokenizer)
    for key in ("weight", "loss", "train"):
        for off in (0, False, 0.0):
            row = {"messages": [chat[0], {**chat[1], key: off}, chat[2], {**chat[3], key: 1}]}
            found = data.render_chat(checked_chat(row, ""), tokenizer)
            assert found[0] == ids and sum(trained) == 8
            assert [i for i, kind in enumerate(found[1]) if kind] == [
                i for i, kind in enumerate(trained) if kind][4:]
        silent = {"messages": [chat[0], {**chat[1], key: 0}]}
        assert refusal(checked_chat, silent, "f:1").startswith("f:1: messages: none is trained")
        asked = {"messages": [{**chat[0], key: 1}, chat[1]]}
        assert refusal(checked_chat, asked, "f:1").startswith(f"f:1: messages[0].{key}: ")
    both = {"messages": [chat[0], {**chat[1], "weight": 0, "train": True}]}
    assert "messages[1]: weight, train" in refusal(checked_chat, both, "f:1")


def test_an_empty_message_of_the_system_is_read_as_olmo_read_it(tmp_path):
    """Open Instruct's converter writes one for rows of OpenOrca (reformat_datasets.py); the ids are
    those of prepare_tulu_data.py and of Open Instruct's finetune.py, which were both run.
    """
    empty = {"role": "system", "content": ""}
    file = write_lines(tmp_path / "orca.jsonl", [{"messages": [empty, *A_CHAT]}])
    [(_, messages)] = read_set(str(file), adapt.AdaptConfig(), False, 0.1, Counter())
    assert messages == [empty, *A_CHAT]
    pair = {"prompt": say("s: ", "u: q"), "chosen": say("a: a"), "rejected": say("a: b")}
    assert checked_preference(pair, "")["prompt"] == say("s: ", "u: q")
    assert checked_request({"messages": say("s: ", "u: q")}, "") == say("s: ", "u: q")
    for content in (None, 3):
        row = {"messages": [{"role": "system", "content": content}, *A_CHAT]}
        assert refusal(checked_chat, row, "f:1").startswith("f:1: messages[0].content: ")
    late = {"messages": [*A_CHAT, *say("s: "), *A_CHAT]}
    assert refusal(checked_chat, late, "f:1").startswith("f:1: messages[2].role: system")


# ---- Prompts -------------------------------------------------------------------------------------

def test_a_request_is_what_the_row_asks():
    """The input of an Alpaca row, as encode_instruction_example of Open Instruct joins it without
    templates; the prompt of a row of training data, whose answer the model gives itself."""
    alpaca = {"instruction": " Add. ", "input": "1 2\n", "output": "3"}
    assert checked_request(alpaca, "") == say("u: Add.\n\n1 2")
    assert checked_request({**alpaca, "input": " "}, "") == say("u:  Add. ")
    longer = say("s: be", "u: q", "a: a", "u: r")
    assert checked_request({"messages": longer}, "") == longer
    assert checked_request({"prompt": longer}, "") == longer
    assert checked_request({"messages": longer, "prompt": " q"}, "") == longer
    assert checked_request({"messages": longer, "prompt": "be"}, "") == longer  # No Robots
    ultra = {"prompt": "q", "messages": [*longer, *say("a: b")], "chosen": [*longer, *say("a: b")],
             "rejected": [*longer, *say("a: c")], "score_chosen": 8.0, "score_rejected": 2.0}
    assert checked_request(ultra, "") == longer[:2]
    assert checked_request({**ultra, "prompt": longer}, "") == longer
    for row, key in (({"messages": longer, "prompt": "r"}, "prompt"),
                     ({**ultra, "prompt": "x"}, "prompt"),
                     ({**ultra, "prompt": None}, "messages[4].role: assistant"),
                     ({"prompt": "q", "instruction": "i"}, "instruction"),
                     ({"prompt": "q", "input": "x"}, "input"),
                     ({**alpaca, "input": 3}, "input: a number")):
        assert refusal(checked_request, row, "f:1").startswith(f"f:1: {key}"), row
