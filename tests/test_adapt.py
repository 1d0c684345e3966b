"""adapt.py against transformers' chat template, losses and schedule, hand numbers, brute force, and
runs that nothing disturbed."""

import bisect
import itertools
import math
import os
import random
from collections import Counter
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import HOUSE
from test_scale import end_of, torchrun

import adapt
import data
import model as m
import train
from configs import UserError

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
SHAPE = m.ModelConfig(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, max_seq_len=64,
                      vocab_size=64, embedding_size=80, eos_token_id=63, pad_token_id=62)
EOS, PAD = SHAPE.eos_token_id, SHAPE.pad_token_id
BETA = 0.3


# ---- Helpers -------------------------------------------------------------------------------------

def say(*turns):
    """Messages of "role: text" strings, the role by its first letter."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


def an_example(dice, prompt=None, answer=None, again=False):
    """Random ids, a prompt and then an answer that is trained; again: a turn of both before."""
    parts = [(1, False)] + again * [(dice.randint(1, 6), False), (dice.randint(2, 5), True)]
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


def nats_of(model, example):
    """Nats of the trained tokens of an example by itself, by plain log_softmax of its logits."""
    ids = torch.from_numpy(example.ids).long()
    log_probs = model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return -log_probs[torch.from_numpy(example.trained[1:])]


def sft_by_hand(model, examples):
    """Nats a trained token."""
    return torch.cat([nats_of(model, example) for example in examples]).mean()


def dpo_by_hand(model, pairs, reference):
    """Rafailov et al., equation 7, pair by pair."""
    losses = []
    for (chosen, rejected), known in zip(pairs, reference.tolist(), strict=True):
        ratios = (-nats_of(model, chosen).sum() - known[0],
                  -nats_of(model, rejected).sum() - known[1])
        losses.append(torch.log1p(torch.exp(-BETA * (ratios[0] - ratios[1]))))
    return sum(losses) / len(losses)


def gradients(model, loss):
    """{name: gradient} of a scalar."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def ours(model, batch, loss_fn=adapt.sft_loss):
    """(mean loss, {name: gradient}) of a batch by one of adapt's losses."""
    summed, count, *_ = loss_fn(model, batch)
    return (summed / count).item(), gradients(model, summed / count)


def same(one, other, tolerance):
    """Two (loss, {name: gradient}) agree."""
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=0, atol=tolerance, msg=name)


def hf_of(model, tmp_path):
    """The model in transformers, and {our name: its gradient} after a backward."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    m.save_hf(model, tmp_path / "hf")
    hf = transformers.OlmoForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)

    def found():
        theirs = {name: parameter.grad for name, parameter in hf.named_parameters()}
        return {name: torch.cat([theirs[part] for part in parts])
                for name, _, parts in m.name_table(model.config)}
    return hf, found


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


@pytest.fixture(scope="module")
def bpe(base):
    return base / "tokenizer.json"


@pytest.fixture(params=["bpe", pytest.param("olmo", marks=pytest.mark.skipif(
    not find_spec("olmo_eval"), reason="needs ai2-olmo-eval"))])
def tokenizer_json(request, bpe):
    return data.tokenizer_file("olmo") if request.param == "olmo" else bpe


GOLDEN = say("s: Be  brief. \n", "u:\n你好, “Wörld”!\u00a0", "a:  Hi|\n\nthere <|user|>\t",
             "u: x", "a: \u2003e\u0301 y\n")


def test_the_text_of_a_chat_is_tulus_to_the_byte(tokenizer_json):
    """facts/adapt.md, 2.2. The second tokenizer's EOS is 50279, as in released OLMo."""
    tokenizer = data.Tokenizer.load(tokenizer_json)
    ids, trained = data.render_chat(GOLDEN, tokenizer)
    text = ("<|endoftext|><|system|>\nBe  brief.\n<|user|>\n你好, “Wörld”!\n<|assistant|>\nHi|\n\n"
            "there <|user|><|endoftext|>\n<|user|>\nx\n<|assistant|>\n\u00e9 y<|endoftext|>")
    assert tokenizer.decode(ids) == text and ids == tokenizer.encode(text, specials=True)
    assert all(type(i) is int for i in ids) and len(ids) == len(trained)
    asked, _ = data.render_chat(GOLDEN[:2], tokenizer, reply=True)
    assert tokenizer.decode(asked) == text[:text.index("Hi|")]
    if tokenizer.vocab_size == 50280:
        assert ids[0] == ids[-1] == 50279 and ids[1:6] == [29, 93, 10394, 49651, 187]  # < | system |>


def test_a_chat_is_what_transformers_makes_of_the_tulu_template(tokenizer_json):
    """Ids and mask of 150 random chats; the oracle strips nothing, so it gets stripped contents."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    ours = data.Tokenizer.load(tokenizer_json)
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
        for end, reply in ((len(messages) - 1, True), (len(messages), True)):
            asked = theirs.apply_chat_template(stripped[:end], add_generation_prompt=True,
                                               return_dict=True)["input_ids"]
            assert data.render_chat(messages[:end], ours, reply)[0] == asked


PIECES = ["a", "Word", "é", "你好", "👩‍💻", " ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u2003", "|",
          "|>", "<|", "<|user|>", "<|assistant|>", '"', "'s", "“", "**b**", "123", "-", ".", "\u200b"]


def fuzz(dice, more=()):
    """A text of up to eight pieces that is not empty when stripped, as NFC."""
    text = dice.choice(["", " ", "\n", " \u00a0"]) + "".join(
        dice.choices([*PIECES, *more], k=dice.randint(1, 8))) + dice.choice(["", "  ", "\n", "\t "])
    return text if text.strip() else "x"


def test_no_text_of_a_user_or_an_assistant_becomes_a_special_token(tokenizer_json):
    """And what is trained is each answer and its EOS, encoded by itself; the prompt's ids begin
    those that were trained on. With combining marks at either end and with the names of EOS."""
    tokenizer, dice = data.Tokenizer.load(tokenizer_json), random.Random(6)
    for _ in range(150):
        turns = []
        for _ in range(dice.randint(1, 3)):
            turns += [f"{who}: {fuzz(dice, ['<|endoftext|>', chr(0x301), '<|padding|>'])}"
                      for who in "ua"]
        messages = say(*turns)
        ids, trained = data.render_chat(messages, tokenizer)
        answers = [message["content"].strip() for message in messages[1::2]]
        wanted = [i for answer in answers
                  for i in [*tokenizer.encode(answer), tokenizer.eos_token_id]]
        assert [i for i, kind in zip(ids, trained, strict=True) if kind] == wanted
        assert ids.count(tokenizer.eos_token_id) == 1 + len(answers)
        assert tokenizer.pad_token_id not in ids
        for turn in range(1, len(messages), 2):
            asked, before = data.render_chat(messages[:turn], tokenizer, reply=True)
            assert asked == ids[:len(asked)] and before == trained[:len(asked)]
            assert not trained[len(asked) - 1] and trained[len(asked)]


def test_an_example_is_cut_at_the_right_and_counted(bpe):
    """Its EOS is trained where the whole answer fits; nothing of an answer leaves it out."""
    tokenizer, messages = data.Tokenizer.load(bpe), say("u: one", "a: two", "u: three", "a: four")
    ids, trained = data.render_chat(messages, tokenizer)
    prompt = len(data.render_chat(messages[:3], tokenizer, reply=True)[0])
    first = trained.index(True)
    for length in range(1, len(ids) + 3):
        counts = Counter()
        for answer_only in (False, True):
            example = adapt.encode_example(messages, tokenizer, length, "", counts, answer_only)
            if length <= (prompt if answer_only else first):
                assert example is None
                continue
            assert example.ids.tolist() == ids[:length] and example.prompt == prompt
            assert example.trained.tolist() == [
                kind and not (answer_only and i < prompt) for i, kind in enumerate(trained[:length])]
        assert counts["cut, so that the last answer has no end"] == 2 * (length < len(ids))
        assert counts["left out, as nothing of an answer fits"] == (length <= prompt) + (
            length <= first)


def test_pairs_that_are_cut_to_one_or_to_their_prompt_are_left_out(bpe):
    tokenizer = data.Tokenizer.load(bpe)
    row = {"prompt": say("u: why"), "chosen": "because of it", "rejected": "because of me"}
    prompt = len(data.render_chat(row["prompt"], tokenizer, reply=True)[0])
    shared = len(os.path.commonprefix([tokenizer.encode("because of it"),
                                       tokenizer.encode("because of me")]))
    for length, left_out in ((prompt, "left out, as nothing of an answer fits"),
                             (prompt + shared, "left out, as both answers are cut to the same"),
                             (prompt + shared + 1, None), (100, None)):
        counts = Counter()
        pair = adapt.encode_pair(row, tokenizer, length, "", counts)
        assert (pair is None) == bool(left_out) and (not left_out or counts[left_out] >= 1)
    assert tokenizer.decode(pair.rejected.ids[pair.rejected.trained].tolist()) == (
        "because of me<|endoftext|>")


# ---- The loss of SFT -----------------------------------------------------------------------------

def packed(examples, seq_len=64, pad=PAD):
    """The batch of an epoch's one step; several examples lie in a row."""
    batches = adapt.sft_batches(examples, len(examples), 0, seq_len, pad, 1)
    batch = batches(1)
    assert len(batch["tokens"]) < len(examples)
    return batch


def test_the_loss_of_packed_rows_is_transformers_of_each_example(tmp_path):
    """Loss and every gradient, within 1e-5 in float32; labels -100 where nothing is trained."""
    model, examples = a_model(torch.float32), some_examples(9)
    hf, theirs = hf_of(model, tmp_path)
    count = sum(int(example.trained.sum()) for example in examples)
    total = 0.0
    for example in examples:
        ids = torch.from_numpy(example.ids).long()[None]
        labels = ids.masked_fill(~torch.from_numpy(example.trained), -100)
        loss = hf(input_ids=ids, labels=labels).loss * int(example.trained.sum()) / count
        loss.backward()
        total += loss.item()
    same(ours(model, packed(examples)), (total, theirs()), 1e-5)


def test_packed_is_unpacked_and_no_padding_counts():
    """In float64, whatever the rows' length and the id of the padding."""
    model, examples = a_model(), some_examples(9)
    loss = sft_by_hand(model, examples)
    wanted = loss.item(), gradients(model, loss)
    for seq_len, pad in ((64, PAD), (61, PAD), (90, 5), (64, EOS)):
        same(ours(model, packed(examples, seq_len, pad)), wanted, 1e-10)
    same(ours(model, adapt.packed_rows([[example] for example in examples], 64, PAD)), wanted, 1e-10)
    batch = packed(examples)
    empty = adapt.packed_rows([[], []], 64, PAD)
    same(ours(model, {key: torch.cat((empty[key], batch[key])) for key in batch}), wanted, 1e-10)


def seen_nats(model, batch):
    """The nats (B, T) that sft_loss sums."""
    seen = []
    hook = model.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    adapt.sft_loss(model, batch)
    hook.remove()
    return seen[0]


def test_an_example_does_not_see_its_neighbours():
    """Bit for bit, whichever of three is edited; without the isolation it does see them."""
    model, dice = a_model(torch.float32), random.Random(0)
    examples = [an_example(dice, 6, 10) for _ in range(3)]
    row = adapt.packed_rows([examples], 64, PAD)
    ends = np.cumsum([0] + [len(example.ids) for example in examples]).tolist()
    for edited, neighbour in itertools.permutations(range(3), 2):
        other = {key: value.clone() for key, value in row.items()}
        other["tokens"][0, ends[edited]:ends[edited + 1]] += 1
        own = slice(ends[neighbour], ends[neighbour + 1])
        assert torch.equal(seen_nats(model, row)[0, own], seen_nats(model, other)[0, own])
        leaky = [seen_nats(model, {**batch, "documents": torch.zeros_like(batch["documents"])})
                 for batch in (row, other)]
        assert torch.equal(*(nats[0, own] for nats in leaky)) == (edited > neighbour)


def test_only_trained_targets_count():
    """To the last bit no other does, and each of them does."""
    model, batch = a_model(torch.float32), packed(some_examples(9))
    summed, count = adapt.sft_loss(model, batch)
    trained = torch.nonzero(batch["loss_mask"])
    assert len(trained) == count == sum(e.trained.sum() for e in some_examples(9))
    targets = batch["targets"] + ~batch["loss_mask"]
    assert torch.equal(adapt.sft_loss(model, {**batch, "targets": targets})[0], summed)
    for place in trained[::7]:
        targets = batch["targets"].clone()
        targets[tuple(place)] -= 1
        assert adapt.sft_loss(model, {**batch, "targets": targets})[0] != summed


# ---- Packing and batches -------------------------------------------------------------------------

def best_fit_decreasing(lengths, room):
    """How many bins TRL's packing opens: it bisects the sorted free spaces of the open ones."""
    free = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(free, length)
        left = free.pop(place) if place < len(free) else room
        bisect.insort(free, left - length)
    return len(free)


def fewest_bins(lengths, room):
    """By brute force: the fewest bins that any order of first fit finds, which is the optimum."""
    best = len(lengths)
    for order in set(itertools.permutations(lengths)):
        free = []
        for length in order:
            place = next((i for i, left in enumerate(free) if left >= length), None)
            if place is None:
                free.append(room - length)
            else:
                free[place] -= length
        best = min(best, len(free))
    return best


def test_bins_hold_each_example_once_and_are_as_few_as_trls():
    dice = random.Random(0)
    for case in range(150):
        room, n = dice.choice([(10, 6), (64, 40), (2048, 120)])
        lengths = [dice.randint(1, room) if case % 2 else min(room, int(dice.expovariate(4 / room)) + 1)
                   for _ in range(dice.randint(1, n))]
        bins = adapt.best_fit(lengths, room)
        assert sorted(i for numbers in bins for i in numbers) == list(range(len(lengths)))
        assert all(numbers and sum(lengths[i] for i in numbers) <= room for numbers in bins)
        assert len(bins) == best_fit_decreasing(lengths, room)
        assert bins == adapt.best_fit(list(lengths), room)
        if n == 6:  # the bound of best fit decreasing
            assert len(bins) <= (11 * fewest_bins(lengths, room) + 6) / 9
    assert adapt.best_fit([], 5) == [] and adapt.best_fit([5, 5], 5) == [[0], [1]]


def found_in(batch):
    """The (ids, trained) of every example in packed rows, in no order."""
    found = []
    for row in range(len(batch["tokens"])):
        documents = batch["documents"][row]
        for number in range(documents.max() + 1):
            own = documents == number
            ids, loss_mask = batch["tokens"][row, own], batch["loss_mask"][row, own]
            assert batch["positions"][row, own].tolist() == list(range(len(ids)))
            assert torch.equal(batch["targets"][row, own][:-1], ids[1:]) and not loss_mask[-1]
            found.append((tuple(ids.tolist()), (False, *loss_mask[:-1].tolist())))
        assert not batch["loss_mask"][row, documents < 0].any()
        assert (batch["tokens"][row, documents < 0] == PAD).all()
    return Counter(found)


def rows_of(batches, step, world_size):
    """The ranks' shares of a step, each as many rows, and all of them as one batch."""
    shares = [batches(step, rank, world_size) for rank in range(world_size)]
    assert len({len(share["tokens"]) for share in shares}) == 1
    return len(shares[0]["tokens"]), {key: torch.cat([share[key] for share in shares])
                                      for key in shares[0]}


@pytest.mark.parametrize("n, batch_size, n_rows", [(12, 4, 1), (23, 5, 2), (7, 16, 3), (9, 9, 4)])
def test_an_epoch_of_chats_has_each_once_on_any_number_of_ranks(n, batch_size, n_rows):
    """In numpy's PCG64(seed + epoch) order; a step is a pure function of its number."""
    examples = some_examples(n)
    keys = [(tuple(e.ids.tolist()), tuple(e.trained.tolist())) for e in examples]
    batches = adapt.sft_batches(examples, batch_size, 3, 64, PAD, n_rows)
    per_epoch = math.ceil(n / batch_size)
    for epoch in (1, 0, 2):
        order = np.arange(n, dtype=np.uint32)
        np.random.Generator(np.random.PCG64(3 + epoch)).shuffle(order)
        seen = Counter()
        for position in range(per_epoch):
            own = order[position * batch_size:(position + 1) * batch_size]
            wanted = Counter(keys[i] for i in own)
            for world_size in (1, 2, 3):
                share, whole = rows_of(batches, 1 + epoch * per_epoch + position, world_size)
                assert share % n_rows == 0 and found_in(whole) == wanted
            seen += wanted
        assert seen == Counter(keys)


@pytest.mark.parametrize("n, batch_size, n_rows", [(12, 4, 1), (23, 5, 2), (7, 16, 3)])
def test_an_epoch_of_pairs_has_each_once_on_any_number_of_ranks(n, batch_size, n_rows):
    """Each with its own reference; those that fill up are not real; few lengths, no id is cut."""
    pairs, reference = some_pairs(n)
    batches = adapt.preference_batches(pairs, reference, batch_size, 3, 100, PAD, n_rows)
    keys = [(tuple(map(tuple, (p.chosen.ids.tolist(), p.rejected.ids.tolist()))), tuple(known))
            for p, known in zip(pairs, reference.tolist(), strict=True)]
    for world_size in (1, 2, 3):
        seen = Counter()
        for step in range(1, 1 + math.ceil(n / batch_size)):
            share, whole = rows_of(batches, step, world_size)
            assert share % n_rows == 0 and whole["tokens"].shape[2] in (64, 100)
            numbers = adapt.examples_of_step(step, n, batch_size, 3)
            found = Counter()
            for tokens, loss_mask, known, real in zip(*(whole[key].tolist() for key in (
                    "tokens", "loss_mask", "reference", "real")), strict=True):
                sides = tuple(tuple(ids[:ids.index(PAD)] if PAD in ids else ids) for ids in tokens)
                found[sides, tuple(known)] += real
                pair = pairs[[key[0] for key in keys].index(sides)]
                assert [sum(side) for side in loss_mask] == [s.trained.sum() for s in pair]
            assert +found == Counter(keys[i] for i in numbers)
            seen += found
        assert seen == Counter(keys)


# ---- The step ------------------------------------------------------------------------------------

METHODS = ["sft", "dpo"]


def adaptation(method, n=8):
    """(examples or pairs, a batch of one a row, its loss_fn, its loss by hand)."""
    if method == "sft":
        examples = some_examples(n)
        return (examples, adapt.packed_rows([[example] for example in examples], 64, PAD),
                adapt.sft_loss, partial(sft_by_hand, examples=examples))
    pairs, reference = some_pairs(n)
    return (pairs, adapt.preference_batches(pairs, reference, n, 0, 64, PAD, 1)(1),
            partial(adapt.preference_loss, beta=BETA),
            partial(dpo_by_hand, pairs=pairs, reference=reference))


def step_by_sgd(model, micro_batches, loss_fn):
    """(loss, {name: how far each weight went}) of a train_step by plain descent at lr 1."""
    before = {name: weight_of(p).clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    metrics = train.train_step(model, optimizer, micro_batches, loss_fn, 1.0, math.inf)
    return metrics, {name: before[name] - weight_of(p) for name, p in model.named_parameters()}


def weight_of(parameter):
    whole = getattr(parameter, "full_tensor", None)
    return (whole() if whole else parameter).detach()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [8, 1, 3])
def test_no_way_of_cutting_the_batch_changes_loss_or_gradient(method, size):
    """Rows of unequal lengths, in float64, against autograd over plain logits."""
    _, batch, loss_fn, by_hand = adaptation(method)
    model = a_model()
    loss = by_hand(model)
    wanted = loss.item(), gradients(model, loss)
    metrics, way = step_by_sgd(model, train.cut_batch(batch, size, "cpu"), loss_fn)
    same((metrics["loss"], way), wanted, 1e-10)


RANKS = """
import sys
sys.path[:0] = {paths!r}
import test_adapt
test_adapt.compare_as_a_rank()
"""


def compare_as_a_rank():
    """In one of two ranks: 7 examples, so that one row of a rank only fills up; sharded."""
    from torch.distributed.fsdp import fully_shard
    dist.init_process_group("gloo")
    for method in METHODS:
        examples, _, loss_fn, by_hand = adaptation(method, 7)
        model = a_model()
        loss = by_hand(model)
        wanted = loss.item(), gradients(model, loss)
        order = len(examples), 0, 64, PAD
        for n_rows in (1, 2):
            sharded = a_model()
            for module in (*sharded.blocks, sharded):
                fully_shard(module)
            batches = (adapt.sft_batches(examples, *order, n_rows) if method == "sft" else
                       adapt.preference_batches(examples, some_pairs(7)[1], *order, n_rows))
            batch = batches(1, dist.get_rank(), 2)
            metrics, way = step_by_sgd(sharded, train.cut_batch(batch, n_rows, "cpu"), loss_fn)
            same((metrics["loss"], way), wanted, 1e-10)
    dist.barrier()
    print(f"rank {dist.get_rank()} agrees", flush=True)
    dist.destroy_process_group()


def test_two_ranks_have_the_gradient_of_one(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(RANKS.format(paths=[str(HOUSE), str(HOUSE / "tests")]))
    code, stdout, stderr = end_of(torchrun(2, file=file))
    assert code == 0, stderr[-3000:]
    assert "rank 0 agrees" in stdout and "rank 1 agrees" in stdout


# ---- The loss of DPO -----------------------------------------------------------------------------

def float64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_the_hand_numbers_of_the_facts():
    """facts/adapt.md, 3.1: beta 0.1, policy (-10, -12), reference (-11, -11); and swapped."""
    policy, reference = float64(-10), float64(-11)
    policy.requires_grad_()
    loss, metrics = adapt.dpo_loss(policy, float64(-12), reference, float64(-11), 0.1)
    assert loss.item() == pytest.approx(0.5981388693815918, abs=1e-9)
    loss.backward()
    assert policy.grad.item() == pytest.approx(-0.0450166003, abs=1e-9)
    assert {name: round(value.item(), 12) for name, value in metrics.items()} == {
        "rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/margins": 0.2,
        "rewards/accuracies": 1.0, "logps/chosen": -10.0, "logps/rejected": -12.0}
    assert not any(value.requires_grad for value in metrics.values())
    swapped, metrics = adapt.dpo_loss(float64(-12), float64(-10), float64(-11), reference, 0.1)
    assert swapped.item() == pytest.approx(0.7981388693815918, abs=1e-9)
    assert metrics["rewards/margins"].item() == pytest.approx(-0.2, abs=1e-12)
    level, metrics = adapt.dpo_loss(float64(-7), float64(-9), float64(-7), float64(-9), 0.1)
    assert level.item() == pytest.approx(math.log(2), abs=1e-12)
    assert metrics["rewards/accuracies"] == 0  # strictly more


def test_dpo_loss_is_its_formula_and_its_swap_the_mirror():
    """The mean over pairs; gradients -beta sigmoid(-beta h) / N; loss(h) - loss(-h) = -beta h."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(2, 50, generator=generator, dtype=torch.float64) * 20 - 60
                         for _ in range(2))
    policy.requires_grad_()
    loss, metrics = adapt.dpo_loss(*policy, *reference, BETA)
    h = ((policy[0] - reference[0]) - (policy[1] - reference[1])).detach()
    assert loss.item() == pytest.approx(np.log1p(np.exp(-BETA * h.numpy())).mean(), abs=1e-12)
    loss.backward()
    wanted = -BETA / (1 + torch.exp(BETA * h)) / 50
    torch.testing.assert_close(policy.grad, torch.stack((wanted, -wanted)), rtol=0, atol=1e-14)
    swapped, mirrored = adapt.dpo_loss(*policy.flip(0), *reference.flip(0), BETA)
    assert (loss - swapped).item() == pytest.approx(-BETA * h.mean().item(), abs=1e-12)
    assert mirrored["rewards/margins"] == -metrics["rewards/margins"]
    assert mirrored["rewards/accuracies"] == 1 - metrics["rewards/accuracies"]


def test_preference_loss_is_of_the_real_pairs_and_their_answers_alone():
    """Padding, its id and pairs that only fill up change nothing; nor do the prompt's targets."""
    pairs, reference = some_pairs(7)
    model, loss_fn = a_model(), partial(adapt.preference_loss, beta=BETA)
    loss = dpo_by_hand(model, pairs, reference)
    wanted = loss.item(), gradients(model, loss)
    for seq_len, pad, n_rows in ((64, PAD, 1), (50, 5, 1), (64, EOS, 5), (64, PAD, 16)):
        batch = adapt.preference_batches(pairs, reference, 7, 0, seq_len, pad, n_rows)(1)
        assert len(batch["tokens"]) == -(-7 // n_rows) * n_rows
        same(ours(model, batch, loss_fn), wanted, 1e-10)
    targets = batch["targets"] + ~batch["loss_mask"]
    same(ours(model, {**batch, "targets": targets}, loss_fn), wanted, 1e-10)
    summed, count, sums = loss_fn(model, {**batch, "real": torch.zeros_like(batch["real"])})
    assert summed == count == 0 and not any(sums.values())
    assert all((gradient == 0).all() for gradient in gradients(model, summed).values())


def test_normalised_by_length_is_by_the_mean_over_the_answers_tokens():
    pairs, reference = some_pairs(5)
    model, batch = a_model(), adapt.preference_batches(*some_pairs(5), 5, 0, 64, PAD, 1)(1)
    ratios = [(-nats_of(model, side).sum() - known) / side.trained.sum()
              for pair, own in zip(pairs, reference.tolist(), strict=True)
              for side, known in zip(pair, own, strict=True)]
    h = torch.stack(ratios[::2]) - torch.stack(ratios[1::2])
    loss, _ = ours(model, batch, partial(adapt.preference_loss, beta=5.0, length_normalized=True))
    assert loss == pytest.approx(torch.log1p(torch.exp(-5 * h)).mean().item(), abs=1e-10)


def test_the_log_prob_of_an_answer_is_transformers(tmp_path):
    """The sum over its tokens in float32, of batches in any order and of either side."""
    model, (pairs, _) = a_model(torch.float32), some_pairs(9)
    hf, _ = hf_of(model, tmp_path)
    sequences = adapt.sequences_of(pairs)
    assert [side.ids[-2] for side in sequences] == [
        side.ids[-2] for k in (0, 1) for side in (pair[k] for pair in pairs)]
    for batch_tokens in (1, 100, 5000):
        found = adapt.completion_log_probs(model, sequences, batch_tokens)
        assert found.dtype == torch.float64
        for example, (log_prob, count) in zip(sequences, found.tolist(), strict=True):
            ids = torch.from_numpy(example.ids).long()
            logits = hf(input_ids=ids[None]).logits[0, :-1].detach()
            each = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            assert log_prob == pytest.approx(each[example.prompt - 1:].sum().item(), abs=1e-4)
            assert count == len(ids) - example.prompt


# ---- The reference -------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, width", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_first_loss_is_ln_2(tmp_path, dtype, width, normalized):
    """Cached, live, padded; rewards and margins are then 0, within rounding."""
    model, (pairs, _) = a_model(dtype), some_pairs(23)
    cached = adapt.reference_log_probs(tmp_path / "reference.npy", model, pairs, 200)
    live = np.array([[-nats_of(model, side).sum().item() for side in pair] for pair in pairs])
    np.testing.assert_allclose(cached, live, rtol=0, atol=width)
    for reference, seq_len, n_rows in ((cached, 64, 1), (live, 64, 4), (cached, 100, 16)):
        batches = adapt.preference_batches(pairs, reference, 8, 0, seq_len, PAD, n_rows)
        for step in (1, 3):
            summed, count, sums = adapt.preference_loss(model, batches(step), 0.1, normalized)
            assert (summed / count).item() == pytest.approx(math.log(2), abs=width)
            for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
                assert (sums[name] / count).item() == pytest.approx(0, abs=width)


def test_the_reference_is_computed_once_and_must_be_whole(tmp_path):
    file, (pairs, _) = tmp_path / "reference.npy", some_pairs(5)
    first = adapt.reference_log_probs(file, a_model(), pairs, 200)
    again = adapt.reference_log_probs(file, a_model(seed=1), pairs, 200)
    assert np.array_equal(first, again)
    for wrong in (first[:4], np.where(first == first[2, 1], -math.inf, first)):
        np.save(file, wrong)
        with pytest.raises(UserError, match=f"{file}: does not hold"):
            adapt.reference_log_probs(file, a_model(), pairs, 200)


@pytest.mark.parametrize("loss, step, raises", [
    (0.6931, 1, False), (0.69326, 1, True), (0.6929, 1, True), (math.log(2) * 6, 1, True),
    (0.5, 2, False)])
def test_a_first_loss_that_is_not_ln_2_stops(loss, step, raises, capsys):
    if not raises:
        return adapt.check_first_loss(step, {"loss": loss}, 1e-4)
    with pytest.raises(UserError, match="must be ln 2"):
        adapt.check_first_loss(step, {"loss": loss}, 1e-4)
    assert f"{loss:.4f}" in capsys.readouterr().out


# ---- The schedule --------------------------------------------------------------------------------

@pytest.mark.parametrize("examples, batch_size, epochs, share", [
    (1000, 32, 3.0, 0.03), (61_135, 32, 3.0, 0.1), (10, 32, 0.2, 0.1), (100, 8, 1.5, 0.0)])
def test_the_learning_rate_falls_as_transformers_linear_schedule(examples, batch_size, epochs,
                                                                 share):
    """Of one step more, and indexed by the step; the warm-up is OLMo's, from a tenth."""
    transformers = pytest.importorskip("transformers")
    config = adapt.by_epochs(adapt.AdaptConfig(epochs=epochs, warmup_share=share),
                             train.TrainConfig(batch_size=batch_size, lr=5e-7, min_lr=0.0), examples)
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
