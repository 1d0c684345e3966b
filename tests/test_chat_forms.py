"""Chats, preferences and prompts in the forms in which the hubs hold them."""

import copy
import json
import math
from collections import Counter

import pytest
from conftest import ROOT, manifest_of, refusal, say, write_jsonl, write_lines

import adapt
import train
from corpus.tokenizer import Tokenizer
from support.chat_forms import CHATS as CHAT_FORMS
from support.chat_forms import PROMPTS as PROMPT_FORMS
from support.chat_forms import form_of
from support.chats import checked_chat, checked_preference, checked_request
from support.fields import without_nulls
from support.models import open_base
from support.rows import Faults, checked_rows, read_set
from support.tuned import fingerprint_of


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
    ({"id": "1", "conversations": SHARED, "tools": "[]"}, TWO, "ShareGPT (conversations)"),
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
    ({"conversations": sent("human: q")}, say("u: q"), "ShareGPT (conversations)"),
    ({"conversation": LONG[:4]}, LONG[:4], "ShareGPT (conversation)"),
    ({"conversations": SHARED, "prompt": "q"}, say("u: q"), "ShareGPT (conversations)"),
    ({"instruction": "Add.", "context": "1 2", "response": "3"}, SUM[:1], "Alpaca (instruction)"),
    ({"system_prompt": "be", "question": "q", "response": "a"}, LONG[:2], "questions"),
    ({"query": "q", "answer": "a"}, say("u: q"), "queries"),
    ({"inputs": "q", "targets": "a"}, say("u: q"), "inputs"),
    ({"prompt": "q", "completion": "a", "label": False}, say("u: q"), None),
    ({"prompt": transcript("q", "a", "r") + "\n\nAssistant:"}, say("u: q", "a: a", "u: r"),
     "HH-RLHF (texts with Human: and Assistant:)")]


def test_preferences_beside_messages_are_said_to_be_unused(tmp_path, capsys):
    """UltraFeedback's rows are both; once for a file, also where its first row has none."""
    both = {"messages": TWO, "chosen": TWO, "rejected": say("u: q", "a: b")}
    rows = [{**both, "rejected": None}, both, both]
    for name, given in (("both.jsonl", rows), ("chats.jsonl", rows[:1])):
        write_lines(tmp_path / name, given)
    read_set(str(tmp_path), adapt.AdaptConfig(), False, 0.1, Counter())
    said = [line for line in capsys.readouterr().out.splitlines() if "not used" in line]
    assert len(said) == 1 and said[0].startswith(f"{tmp_path / 'both.jsonl'}: chosen and rejected")


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
def test_prompts_are_read_in_the_same_forms(row, wanted, name, tmp_path, capsys):
    file = write_lines(tmp_path / "prompts.jsonl", [row, {"messages": None, **row}])
    found = list(checked_rows(str(file), PROMPT_FORMS, checked_request, Counter(), Faults()))
    assert [checked for *_, checked in found] == [wanted, wanted]
    assert capsys.readouterr().out == (f"{file}: read as {name}\n" if name else "")


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
    ({"conversations": sent("human: q", "human: r", "gpt: a")},
     "conversations[1].from: human, where gpt must come"),
    ({"conversations": sent("gpt: a", "human: q")},
     "conversations[0].from: gpt, where system or human must"),
    ({"conversations": sent("human: q")},
     "conversations[0].from: human, where the last message must be from gpt"),
    ({"conversations": [{"from": "user", "value": "q"}]},
     "conversations[0].from: user, where the last message must be from assistant"),
    ({"messages": None, "conversations": []}, "conversations: an empty list"),
    ({"conversations": None, "id": 3}, "conversations: null, and no value; give one"),
    ({"messages": math.nan, "text": "x"}, "messages: NaN, and no value"),
    ({"prompt": "q", "chosen": None, "rejected": "a"}, "chosen: null, and no value"),
    ({"conversations": ["q", "a"]}, "conversations[0]: a string"),  # LIMA
    ({"conversations": [SHARED[0], {**SHARED[1], "weight": 0}]}, "conversations: none is trained"),
    ({"conversations": SHARED, "tools": "[{}]"}, "tools: "),
    ({**ALPACA, "output": " "}, "output: an empty text"),
    ({**ALPACA, "output": None}, "output: null, and no value; give one"),
    ({**ALPACA, "instruction": 3}, "instruction: a number"),
    ({**ALPACA, "input": ["1"]}, "input: a list"),
    ({**ALPACA, "history": [["before", "then"]]}, "history: no message"),
    ({**ALPACA, "prompt": "Below is an instruction that describes a task. Divide."},
     "prompt is not the first message"),
    ({**ALPACA, "prompt": "Add. But first, subtract."}, "prompt is not the first message"),
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
    ({"question": "q", "chosen": SHARED[0], "rejected": SHARED[1]},
     "chosen.from: human, where gpt"),
    ({"question": "q", "chosen": {**SHARED[1], "weight": 0}, "rejected": SHARED[1]},
     "chosen.weight: 0, and only"),
    ({"prompt": "q", "chosen": sent("gpt: a"), "rejected": sent("gpt: b", "gpt: c")},
     "rejected[1].from: gpt, where human"),
    ({"conversations": SHARED, "chosen": "a", "rejected": "b"},
     "conversations[1].from: gpt")])
def test_what_cannot_be_trained_is_named_by_the_rows_own_keys(row, place, tmp_path):
    """And dropped and counted on request."""
    method = "dpo" if "chosen" in row else "sft"
    if method == "dpo":
        sound = PREFERENCES[5 if "Human" in str(row["chosen"]) else 0][0]
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


def test_a_null_is_told_under_the_key_of_the_files_form(tmp_path):
    """A table may have both columns."""
    rows = [{"conversations": SHARED, "messages": None}, {"conversations": None, "messages": None}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    message = refusal(read_set, str(file), adapt.AdaptConfig(), False, 0.1, Counter())
    assert message.startswith(f"{file}:2: conversations: null, and no value; give one, or remove")


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


# ---- The hubs' own tables ------------------------------------------------------------------------

def told(count):
    """Chats, the last one with a system's message and two turns."""
    chats = [say(f"u: What is {i}?", f"a: {i} is a number.") for i in range(count - 1)]
    chats.append(say("s: Be brief.", "u: Ünd?", "a: Ja.", "u: So?", "a: So."))
    return chats


def preferred(chats):
    """(prompt, chosen, rejected) of chats: the text of the first question, and two lists."""
    for chat in chats:
        prompt = next(message["content"] for message in chat if message["role"] == "user")
        yield prompt, chat, [*chat[:-1], *say(f"a: {len(prompt)}?")]


def as_sharegpt(chat):
    senders = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": senders[message["role"]], "value": message["content"],
             "weight": None if message["role"] == "system" else float(message["role"] != "user")}
            for message in chat]


ULTRA = [{"prompt": prompt, "prompt_id": f"{number:064x}", "chosen": chosen, "rejected": rejected,
          "messages": chosen, "score_chosen": 8.0 - number, "score_rejected": 1.5}
         for number, (prompt, chosen, rejected) in enumerate(preferred(told(4)))]
# {data set: (method, {column: type}, rows)}; the columns and types are those of the sets' cards. A
# message is a struct of strings, in the order that the card has.
HUBS = {
    "allenai/tulu-v2-sft-mixture": ("sft", {"dataset": "", "id": "", "messages": "role content"}, [
        {"dataset": "open_orca", "id": f"open_orca_{i}", "messages": chat}
        for i, chat in enumerate(told(4) + [say("s: ", "u: q", "a: a")])]),
    "allenai/tulu-3-sft-mixture": ("sft", {"id": "", "messages": "content role", "source": ""}, [
        {"id": f"oasst1_{i}", "messages": chat, "source": "ai2-adapt-dev/oasst1_converted"}
        for i, chat in enumerate(told(4))]),
    "HuggingFaceH4/ultrafeedback_binarized": ("dpo", {
        "prompt": "", "prompt_id": "", "chosen": "content role", "rejected": "content role",
        "messages": "content role", "score_chosen": 1.0, "score_rejected": 1.0}, ULTRA),
    "the same, for SFT": ("sft", {
        "prompt": "", "prompt_id": "", "chosen": "content role", "rejected": "content role",
        "messages": "content role", "score_chosen": 1.0, "score_rejected": 1.0}, ULTRA),
    "allenai/ultrafeedback_binarized_cleaned": ("dpo", {
        "prompt": "", "prompt_id": "", "chosen": "content role", "rejected": "content role",
        "messages": "content role", "score_chosen": 1.0, "score_rejected": 1.0, "source": ""},
        [{**row, "source": "flan_v2_cot", "score_chosen": score}
         for row, score in zip(ULTRA, (8.0, 7.5, None, math.nan), strict=True)]),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": ("dpo", {
        "id": "", "prompt": "", "chosen": "content role", "rejected": "content role",
        "source": ""}, [
        {"id": f"{i}", "prompt": prompt, "chosen": chosen, "rejected": rejected, "source": "s"}
        for i, (prompt, chosen, rejected) in enumerate(preferred(told(4)))]),
    "Open-Orca/SlimOrca": ("sft", {"conversations": "from value weight"}, [
        {"conversations": as_sharegpt(chat)} for chat in told(4)]),
    "tatsu-lab/alpaca": ("sft", {"instruction": "", "input": "", "output": "", "text": ""}, [
        {"instruction": "Add.", "input": each, "output": "3", "text": "Below is an instruction"}
        for each in ("1 2", "", "2 1", None)]),
    "Anthropic/hh-rlhf": ("dpo", {"chosen": "", "rejected": ""}, [
        {"chosen": transcript("q", "a", "r", f"good {i}"),
         "rejected": transcript("q", "a", "r", f"bad {i}")} for i in range(4)])}


def write_parquet(path, columns, rows):
    """A table with the hubs' types, in two row groups."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def type_of(words):
        if isinstance(words, float):
            return pa.float64()
        kinds = {"weight": pa.float64()}
        fields = [(name, kinds.get(name, pa.string())) for name in words.split()]
        return pa.list_(pa.struct(fields)) if words else pa.string()

    schema = pa.schema([(name, type_of(words)) for name, words in columns.items()])
    parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=2)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_config):
    """A run of 256 tokens of context that is hardly trained."""
    run = tmp_path_factory.mktemp("base") / "run"
    train.main([str(tiny_config(run, max_seq_len=256, max_steps=1, warmup_steps=1,
                                eval_every_steps=0))])
    return run


@pytest.mark.parametrize("name", HUBS)
def test_a_table_of_the_hub_is_trained_as_its_rows_of_json(name, base, tmp_path, call):
    """Through the command that a user types; the digest of all ids and masks is the run's."""
    method, columns, rows = HUBS[name]
    table = write_parquet(tmp_path / "train-00000-of-00001.parquet", columns, rows)
    run = tmp_path / "run"
    result = call(adapt, ROOT / f"configs/tiny_{method}.py", f"--start_from={base}",
                  f"--run_dir={run}", f"--train_data={table}", "--eval_data=", "--epochs=1",
                  "--batch_size=4", "--device=cpu", "--dtype=float32", "--compile=false")
    assert result.returncode == 0, result.stderr
    kind = "chats" if method == "sft" else "pairs"
    assert f"train_data={table}: {len(rows)} {kind} of " in result.stdout
    assert "cut" not in result.stdout and "dropped" not in result.stdout
    opened = open_base(str(base), "size")
    lines = write_lines(tmp_path / "train.jsonl", rows)
    config = adapt.AdaptConfig(method=method, train_data=str(lines))
    train_set, _ = adapt.read_sets(config, opened, Tokenizer.load(base / "tokenizer.json"))
    assert manifest_of(run)["tuned_on"] == fingerprint_of(opened, train_set, [], 4)


def test_prompts_of_a_table_are_answered_and_gone_on_with(base, tmp_path, call):
    """Also with columns that JSON does not know."""
    pa = pytest.importorskip("pyarrow")
    rows = [{"conversations": sent("human: q"), "digest": b"\xff\xd8", "score": math.nan},
            {"conversations": sent("system: be", "human: r"), "digest": None, "score": 1.0}]
    table = tmp_path / "prompts.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), table)
    out = tmp_path / "out.jsonl"
    words = ["generate", base, table, out, "--max_new_tokens=4"]
    result = call(adapt, *words)
    assert f"{table}: read as ShareGPT" in result.stdout and "wrote" in result.stdout
    first = out.read_bytes()
    assert "2 answers, 2 of them were there" in call(adapt, *words).stdout
    assert out.read_bytes() == first
    messages = [{"messages": say("u: q")}, {"messages": say("s: be", "u: r")}]
    again = tmp_path / "again.jsonl"
    call(adapt, "generate", base, write_lines(tmp_path / "prompts.jsonl", messages), again,
         "--max_new_tokens=4")
    outputs = [[json.loads(line)["output"] for line in path.read_text().splitlines()]
               for path in (out, again)]
    assert outputs[0] == outputs[1] and len(outputs[0]) == 2
