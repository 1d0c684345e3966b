"""The configs in configs/ have the values of the official runs, each with its source."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from adapt import AdaptConfig
from configs import load_config
from data import render_chat
from model import ModelConfig, OLMo
from scaling.begin import settings_of_start
from support.config_text import read_assignments
from support.files import UserError
from train import SCHEMAS, TrainConfig, clip_at_step, lr_at_step


ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("[a-z]*.py"))

# A variant names only what differs from the file to its left.
ALONE = ["olmo_7b", "olmo_1b", "olmo_7b_sft", "olmo_7b_dpo", "small", "tiny", "tiny_sft",
         "tiny_dpo", "continue"]
VARIANTS = ["olmo_7b olmo_7b_tail", "olmo_7b olmo_7b_anneal", "olmo_7b_sft olmo_1b_sft",
            "olmo_7b_dpo olmo_1b_dpo"]


def paths_of(names):
    return [str(ROOT / f"configs/{name}.py") for name in names.split()]


def config_of(names):
    """{key: value} of all schemas, as config files set them."""
    found = {}
    for config in load_config(paths_of(names), *SCHEMAS, AdaptConfig):
        found |= dataclasses.asdict(config)
    return found


# ---- The files -----------------------------------------------------------------------------------

def test_every_shipped_config_is_read_and_says_what_it_is():
    for names in ALONE + VARIANTS:
        assert config_of(names)
        assert ast.get_docstring(ast.parse(Path(paths_of(names)[-1]).read_text()))
    assert {names.split()[-1] + ".py" for names in ALONE + VARIANTS} == set(CONFIGS)


@pytest.mark.parametrize("names", VARIANTS)
def test_a_variant_alone_names_the_file_that_it_adds_to(names):
    base, variant = paths_of(names)
    with pytest.raises(UserError) as caught:
        config_of(names.split()[1])
    assert str(caught.value).startswith(f"{variant}:")
    assert str(caught.value).endswith(f"{base} {variant}")


def test_continue_fits_any_directory():
    """It names neither a shape nor a tokenizer, as those are the directory's."""
    named = {key for _, key, _ in read_assignments(Path(paths_of("continue")[0]))}
    assert not named & {*vars(ModelConfig()), "tokenizer", "start_from"}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("olmo_")])
def test_every_setting_names_its_source(name):
    """As a comment beside it. Names of places, and how often to evaluate a tuning, need none."""
    free = ("run_dir", "start_from", "data_dir", "method", "eval_data", "max_new_tokens",
            "eval_every_steps", "save_every_steps")
    for line in (ROOT / "configs" / name).read_text().splitlines():
        key, is_setting, rest = line.partition(" = ")
        if is_setting and key.isidentifier() and key not in free:
            assert "  # " in rest, line


# ---- The values ----------------------------------------------------------------------------------

# (key, value, place, what stands there). "run" and "start" are the files of the A100 run at commit
# 148ca062 of allenai/OLMo; see configs/olmo_7b.py.
SEVEN_B = [
    ("d_model", 4096, "run:11", "d_model: 4096"), ("n_layers", 32, "run:13", "n_layers: 32"),
    ("n_heads", 32, "run:12", "n_heads: 32"),
    ("mlp_hidden_size", 22016 // 2, "run:15", "mlp_hidden_size: 22016"),
    ("max_seq_len", 2048, "run:32", "max_sequence_length: 2048"),
    ("vocab_size", 50280, "run:33", "vocab_size: 50280"),
    ("embedding_size", 50304, "run:34", "embedding_size: 50304"),
    ("weight_tying", False, "run:16", "weight_tying: false"),
    ("eos_token_id", 50279, "frozen:34", "eos_token_id: 50279"),
    ("pad_token_id", 1, "run:36", "pad_token_id: 1"), ("seed", 6198, "run:2", "seed: 6198"),
    ("batch_size", 2160, "start:32", "--global_train_batch_size=2160"),
    ("micro_batch_size", 2, "run:75", "device_train_microbatch_size: 2"),
    ("activation_checkpointing", "none", "", "neither file names it"),
    ("max_steps", 501_000, "start:37", "--scheduler.t_warmup=501000"),
    ("lr", 3e-4, "run:45", "learning_rate: 3.0e-4"),
    ("min_lr", 0.1 * 3e-4, "run:55", "alpha_f: 0.1"),
    ("warmup_steps", 5000, "run:54", "t_warmup: 5000"),
    ("schedule", "linear", "run:53", "name: linear_with_warmup"),
    ("decay_steps", 476_837, "run:73", "max_duration: 476837  # 2T tokens"),
    ("weight_decay", 0.1, "run:46", "weight_decay: 0.1"), ("beta1", 0.9, "run:48", "- 0.9"),
    ("beta2", 0.95, "run:49", "- 0.95"), ("eps", 1e-5, "olmo/optim.py:643", "eps=1e-5,"),
    ("grad_clip", 1.0, "run:84", "max_grad_norm: 1.0"),
    ("grad_clip_warmup_steps", 0, "", "not in olmo/optim.py, not in the file"),
    ("eval_every_steps", 1000, "run:90", "eval_interval: ${save_interval}"),
    ("save_every_steps", 1000, "run:65", "save_interval: 1000"),
    ("keep_last", 0, "run:66", "save_num_checkpoints_to_keep: -1"),
    ("keep_every", 0, "", "all are kept"), ("dtype", "bfloat16", "run:78", "precision: amp_bf16"),
    ("token_files", "dolma/olmo_7b.txt", "run:180", "paths:")]
TAIL = [
    ("start_from", "runs/olmo_7b/step501000", "", "t_warmup"),
    ("lr", 3e-5, "start:36", "--optimizer.learning_rate=0.00003"),
    ("min_lr", 0.1 * 3e-5, "", "alpha_f: 0.1"),
    ("warmup_steps", 501_000, "start:37", "--scheduler.t_warmup=501000"),
    ("decay_steps", 700_000, "start:38", "--scheduler.t_max=700000"),
    ("max_steps", 556_000, "", "where the next run starts")]
# The same file at commit 87a8b702.
ANNEAL = [
    ("start_from", "runs/olmo_7b_tail/step556000", "start:37",
     "--load_path=s3://ai2-llm/checkpoints/7b/v1_5-mix-mitch-ish/step556000"),
    ("lr", 2.3e-5, "start:40", "--optimizer.learning_rate=0.000023"),
    ("min_lr", 0.001 * 2.3e-5, "start:43", "--scheduler.alpha_f=0.001"),
    ("warmup_steps", 556_000, "start:41", "--scheduler.t_warmup=556000"),
    ("decay_steps", 557_000, "start:42", "--scheduler.t_max=557000"),
    ("max_steps", 557_000, "start:44", "--stop_at=557001"),
    ("eval_every_steps", 100, "start:35", "--eval_interval=100"),
    ("save_every_steps", 500, "start:36", "--save_interval=500")]
# configs/official-0724/OLMo-1B.yaml at v0.6.0
ONE_B = [
    ("d_model", 2048, "yaml:10", "d_model: 2048"), ("n_layers", 16, "yaml:12", "n_layers: 16"),
    ("n_heads", 16, "yaml:11", "n_heads: 16"),
    ("mlp_hidden_size", 8 * 2048 // 2, "yaml:13", "mlp_ratio: 8"),
    ("max_seq_len", 2048, "yaml:30", "max_sequence_length: 2048"),
    ("vocab_size", 50280, "yaml:31", "vocab_size: 50280"),
    ("embedding_size", 50304, "yaml:32", "embedding_size: 50304"),
    ("weight_tying", True, "yaml:14", "weight_tying: true"),
    ("eos_token_id", 50279, "yaml:33", "eos_token_id: 50279"),
    ("pad_token_id", 1, "yaml:34", "pad_token_id: 1"), ("seed", 6198, "yaml:2", "seed: 6198"),
    ("batch_size", 2048, "yaml:70", "global_train_batch_size: 2048"),
    ("micro_batch_size", 8, "yaml:71", "device_train_microbatch_size: 8"),
    ("activation_checkpointing", "none", "", "the yaml does not name it"),
    ("max_steps", 739_328, "yaml:69", "max_duration: 739_328  # 3.1T tokens"),
    ("lr", 4e-4, "yaml:42", "learning_rate: 4.0e-4"),
    ("min_lr", 0.1 * 4e-4, "yaml:52", "alpha_f: 0.1"),
    ("warmup_steps", 2000, "yaml:51", "t_warmup: 2000"),
    ("schedule", "cosine", "yaml:50", "name: cosine_with_warmup"),
    ("decay_steps", 0, "", "the end"), ("weight_decay", 0.1, "yaml:43", "weight_decay: 0.1"),
    ("beta1", 0.9, "yaml:45", "- 0.9"), ("beta2", 0.95, "yaml:46", "- 0.95"),
    ("eps", 1e-5, "olmo/optim.py:716", "eps=1e-5,"),
    ("grad_clip", 1.0, "yaml:79", "max_grad_norm: 1.0"),
    ("grad_clip_warmup_steps", 0, "", "the yaml does not name it"),
    ("eval_every_steps", 1000, "yaml:85", "eval_interval: ${save_interval}"),
    ("save_every_steps", 1000, "yaml:61", "save_interval: 1000"),
    ("keep_last", 9, "yaml:62", "save_num_checkpoints_to_keep: 9"),
    ("keep_every", 10_000, "yaml:64", "save_interval_unsharded: 10000"),
    ("token_files", "dolma/olmo_1b.txt", "yaml:197", "paths:")]
# allenai/open-instruct: olmo_7b_sft.yaml at 84a9c55d, olmo_7b_17_inst.yaml at 6e31d541
SFT = [
    ("method", "sft", "", ""), ("start_from", "runs/olmo_7b_anneal", "", ""),
    ("train_data", "tulu/train.jsonl", "yaml:6", "tulu-v2-sft-mixture-olmo-2048"),
    ("epochs", 3.0, "yaml:15", "num_train_epochs: 3"),
    ("batch_size", 8 * 16, "yaml:9, 10", "per_device_train_batch_size: 1, on 8 GPUs"),
    ("lr", 2e-6, "yaml:11", "learning_rate: 2.0e-06"), ("min_lr", 0.0, "yaml:12", "linear"),
    ("schedule", "linear", "", "lr_scheduler_type: linear"),
    ("warmup_share", 0.03, "yaml:13", "warmup_ratio: 0.03"),
    ("weight_decay", 0.0, "yaml:14", "weight_decay: 0.0"),
    ("grad_clip", 0.0, "paper", "no clipping"), ("beta1", 0.9, "", "PyTorch's default"),
    ("beta2", 0.999, "code:656", "torch.optim.AdamW(..., lr=args.learning_rate)"),
    ("eps", 1e-8, "code:656", "the same"), ("suite", "mmlu", "paper", ""), ("chat", True, "", "")]
DPO = [
    ("method", "dpo", "", ""), ("start_from", "runs/olmo_7b_sft", "", ""),
    ("train_data", "ultrafeedback/train_prefs.jsonl", "yaml:5", "ultrafeedback_binarized_cleaned"),
    ("epochs", 3.0, "yaml:16", "num_train_epochs: 3"),
    ("batch_size", 8 * 4, "yaml:9, 10", "per_device_train_batch_size: 1, on 8 GPUs"),
    ("lr", 5e-7, "yaml:11", "learning_rate: 5.0e-7"), ("beta", 0.1, "yaml:12", "dpo_beta: 0.1"),
    ("warmup_share", 0.1, "yaml:14", "warmup_ratio: 0.1"),
    ("weight_decay", 0.0, "yaml:15", "weight_decay: 0.0"),
    ("grad_clip", 0.0, "paper", "no clipping"), ("beta2", 0.999, "code:633", "PyTorch's default"),
    ("eps", 1e-8, "code:633", "the same"),
    ("activation_checkpointing", "whole_layer", "yaml:7", "gradient_checkpointing: true")]
# configs/mitchish-instruct.yaml at commit 321c4994 ("tune"), and the anneal of OLMo-7B
CONTINUE = [
    ("fresh_optimizer", True, "configs/mcli/mitchish-instruct.yml:93", "--reset_optimizer_state"),
    ("lr", 0.1 * 4e-4, "a tenth of OLMo-1B's peak", "learning_rate: 4.0e-4"),
    ("min_lr", 0.001 * 4e-5, "tune:55", "alpha_f: 0.001"),
    ("warmup_steps", 100, "tune:54", "t_warmup: 100"),
    ("schedule", "linear", "tune:53", "name: linear_with_warmup"),
    ("max_steps", 557_000 - 556_000, "anneal", "t_max=557000, t_warmup=556000"),
    ("weight_decay", 0.1, "stage 2:47", "weight_decay: 0.1"), ("decay_steps", 0, "", "the end"),
    ("eval_every_steps", 100, "anneal", "--eval_interval=100"),
    ("save_every_steps", 500, "anneal", "--save_interval=500")]
# Ours: Open Instruct's settings for a model that is a thousand times smaller.
TINY = [("min_lr", 0.0, "", ""), ("weight_decay", 0.0, "", ""), ("grad_clip", 0.0, "", ""),
        ("beta2", 0.999, "", ""), ("eps", 1e-8, "", ""), ("epochs", 3.0, "", ""),
        ("batch_size", 32, "", ""), ("train_data", "stdlib", "", "")]


@pytest.mark.parametrize("names, wanted", [
    ("olmo_7b", SEVEN_B), ("olmo_7b olmo_7b_tail", SEVEN_B + TAIL),
    ("olmo_7b olmo_7b_anneal", SEVEN_B + ANNEAL), ("olmo_1b", ONE_B), ("olmo_7b_sft", SFT),
    ("olmo_7b_dpo", DPO), ("continue", CONTINUE),
    ("olmo_7b_sft olmo_1b_sft", SFT + [("start_from", "runs/olmo_1b", "", ""),
                                       ("epochs", 5.0, "card", ""), ("lr", 1e-5, "card", "")]),
    ("olmo_7b_dpo olmo_1b_dpo", DPO + [("start_from", "runs/olmo_1b_sft", "", ""),
                                       ("activation_checkpointing", "none", "", "")]),
    ("tiny_sft", [*TINY, ("start_from", "runs/tiny", "", ""), ("lr", 2e-4, "", ""),
                  ("method", "sft", "", ""), ("warmup_share", 0.03, "", "")]),
    ("tiny_dpo", [*TINY, ("start_from", "runs/tiny_sft", "", ""), ("lr", 1e-4, "", ""),
                  ("method", "dpo", "", ""), ("warmup_share", 0.1, "", ""),
                  ("beta", 0.1, "", "")])])
def test_the_recipes_have_the_values_of_their_sources(names, wanted):
    """And the file names the place beside the setting."""
    found = config_of(names)
    last = {row[0]: row for row in wanted}  # a variant's row counts, as its file does
    assert {key: found[key] for key in last} == {
        key: pytest.approx(value, rel=1e-12) if type(value) is float else value
        for key, value, _, _ in last.values()}
    text = "".join(Path(path).read_text() for path in paths_of(names))
    for key, _, place, _ in last.values():
        assert any(place in line for line in text.splitlines() if line.startswith(f"{key} = ")) \
            or not place, f"{key}: {place}"


# ---- The schedules -------------------------------------------------------------------------------

# What the schedulers of olmo/optim.py at 148ca062 return, run with the settings above.
RATES = {
    "olmo_7b": {1: 3.0054e-05, 2500: 0.000165, 5000: 0.0003, 100_000: 0.0002456380063454116,
                400_000: 7.396855269934324e-05, 452_112: 4.4148424137996844e-05,
                476_836: 3.00005722315122e-05, 476_837: 3e-5, 476_838: 3e-5, 501_000: 3e-5},
    "olmo_7b olmo_7b_tail": {501_001: 2.999986432160804e-05, 528_500: 2.626884422110553e-05,
                             556_000: 2.2537688442211056e-05},
    "olmo_7b olmo_7b_anneal": {556_001: 2.2977023e-05, 556_500: 1.15115e-05, 557_000: 2.3e-08},
    "olmo_1b": {1: 4.018e-05, 1000: 0.00022, 2000: 0.0004, 100_000: 0.0003845348655775134,
                370_664: 0.00022, 738_020: 4.0002795343389185e-05, 739_328: 4e-05}}


@pytest.mark.parametrize("names", RATES)
def test_the_learning_rate_is_that_of_the_official_scheduler(names):
    [config] = load_config(paths_of(names), TrainConfig, other=SCHEMAS)
    for step, lr in RATES[names].items():
        assert lr_at_step(step, config) == pytest.approx(lr, rel=1e-12), step


def test_the_runs_of_the_7b_follow_each_other_and_clip_at_one():
    ends = []
    for names in ("olmo_7b", "olmo_7b olmo_7b_tail", "olmo_7b olmo_7b_anneal"):
        [config] = load_config(paths_of(names), TrainConfig, other=SCHEMAS)
        if ends:
            assert config.start_from == f"{ends[-1].run_dir}/step{ends[-1].max_steps:06d}"
        assert {clip_at_step(step, config) for step in (1, 2, 500, 1001, 1002)} == {1.0}
        ends.append(config)
    tokens = [config.batch_size * 2048 * config.max_steps for config in ends]
    assert tokens == pytest.approx([2.216e12, 2.460e12, 2.464e12], rel=1e-3)


# ---- What differs --------------------------------------------------------------------------------

class ByteTokenizer:
    """Each byte is an id, and 256 the end of text."""

    eos_token_id = 256

    def encode(self, text):
        return list(text.encode())


def open_instructs_mask(messages, tokenizer):
    """(ids, trained) as finetune.py of Open Instruct at ecf0c508 has them with add_bos.

    It masks what is not an answer, from the length of the text before it to that of the text with
    it and the header of the answer; but these texts have no BOS, and the ids have one.
    """
    def ids_of(messages):
        ids = []
        for message in messages:
            ids += tokenizer.encode(f"<|{message['role']}|>\n{message['content'].strip()}")
            ids += [tokenizer.eos_token_id] if message["role"] == "assistant" else []
            ids += tokenizer.encode("\n")
        return ids

    ids = [tokenizer.eos_token_id, *ids_of(messages)[:-1]]
    trained = [True] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            begin = len(ids_of(messages[:i]))
            end = len(ids_of(messages[:i + 1]) + tokenizer.encode("<|assistant|>\n"))
            trained[begin:end] = [False] * (end - begin)
    return ids, trained


def test_open_instruct_also_trains_the_line_break_before_each_answer():
    """docs/differences.md; seen by running its function with OLMo's tokenizer, with these ids."""
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A list."},
                {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "A dict."}]
    ids, trained = render_chat(messages, ByteTokenizer())
    their_ids, theirs = open_instructs_mask(messages, ByteTokenizer())
    assert their_ids == ids
    more = [i for i in range(len(ids)) if theirs[i] and not trained[i]]
    assert [bytes(ids[i:i + 3]) for i in more] == [b"\nA ", b"\nA "]
    assert not any(own and not other for own, other in zip(trained, theirs, strict=True))


# ---- The models ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, parameters", [
    ("olmo_1b.py", 1_176_764_416), ("olmo_7b.py", 6_888_095_744), ("small.py", 151_879_680),
    ("tiny.py", 5_308_416)])
def test_parameter_counts(name, parameters):
    """Untied: 2 V D + L (4 D^2 + 3 D F); tied: V D less. Nothing else has parameters.

    1B: 50304 * 2048 + 16 * (4 * 2048^2 + 3 * 2048 * 8192) = 1,176,764,416, the official count.
    """
    words = [str(ROOT / "configs" / name)]
    base = settings_of_start(words, SCHEMAS)
    [config] = load_config(words, ModelConfig, other=SCHEMAS, base=base)
    with torch.device("meta"):
        model = OLMo(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_missing_folder_is_named_with_the_remedy(call, refused, tmp_path, monkeypatch):
    import train
    monkeypatch.chdir(tmp_path)
    refused(call(train, ROOT / "configs/small.py"), "documents: ", "--sources")
    assert not any(tmp_path.iterdir())
