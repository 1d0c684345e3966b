"""Read this first: the recipe in seven small tests, each against another way to the same number.

A batch, a loss, a step, a checkpoint, an evaluation, a step of SFT and one of DPO. The witnesses
are numpy, transformers and a few lines of arithmetic. The other files test the same in depth.
"""

import json
import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from conftest import same_weights

import adapt
import train
from corpus.bpe import train_bpe
from data import Batches, TokenShards
from eval import evaluate_perplexity
from model import ModelConfig, build_model, next_token_loss, token_losses
from scaling.checkpoint import load_checkpoint, save_checkpoint
from support.records import bits_per_byte
from support.weights import save_hf

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

TEXT = "the wörld is everything that is the case, and the word is the wörld of the word. "
TOKENIZER = train_bpe([TEXT], 300)  # 256 bytes, 28 tokens that OLMo adds, 16 merges
CONFIG = ModelConfig(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, max_seq_len=64,
                     vocab_size=300, embedding_size=320, eos_token_id=TOKENIZER.eos_token_id,
                     pad_token_id=TOKENIZER.pad_token_id)


def a_model():
    """A small OLMo with its initial weights, in float64: nothing hides behind rounding."""
    return build_model(CONFIG, seed=0).double()


def a_batch(seed=0):
    """Four sequences of random ids, in the form in which `Batches` gives them."""
    tokens = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(seed))
    loss_mask = torch.ones(4, 64, dtype=torch.bool)
    loss_mask[:, -1] = False  # the last token has no next one
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "loss_mask": loss_mask}


def log_probs_by_hand(model, ids):
    """ln p of ids[1], ids[2], ... given all ids before each, by a plain softmax."""
    logits = model(torch.tensor([ids[:-1]]))[0]  # (T - 1, V)
    log_probs = torch.log(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
    return log_probs[range(len(ids) - 1), ids[1:]]


def test_one_batch(tmp_path):
    """Step 2 is the second slice of numpy's PCG64 shuffle; T tokens have T - 1 targets."""
    corpus = np.arange(1000, dtype=np.uint16)  # each token is its own place in the corpus
    corpus.tofile(tmp_path / "shard.bin")
    shards = [{"file": "shard.bin", "tokens": 1000}]
    manifest = {"sha256": "", "eos_token_id": 0, "dtype": "uint16", "shards": shards}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    batches = Batches(TokenShards(tmp_path, seq_len=16), 4, seed=6198, order_dir=tmp_path)
    batch = batches(2)

    order = np.arange(62, dtype=np.uint32)  # 1000 / 16: 62 windows, and 8 tokens are left out
    np.random.Generator(np.random.PCG64(6198)).shuffle(order)
    windows = [range(16 * i, 16 * i + 16) for i in order[4:8].tolist()]
    assert batch["tokens"].tolist() == [list(window) for window in windows]
    assert batch["loss_mask"].sum() == 4 * 15
    trained = batch["targets"][batch["loss_mask"]]
    assert trained.tolist() == [token for window in windows for token in window[1:]]


def test_one_loss(tmp_path, transformers):
    """The mean of the token losses is what transformers' OLMo computes from the same weights."""
    model = build_model(CONFIG, seed=0)
    save_hf(model, tmp_path / "hf")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    batch = a_batch()

    losses = model(batch["tokens"], targets=batch["targets"])
    summed, count = next_token_loss(losses, batch["loss_mask"])

    theirs = hf(input_ids=batch["tokens"], labels=batch["tokens"]).loss
    assert (summed / count).item() == pytest.approx(theirs.item(), rel=1e-6)
    # At the start the logits are normal with variance 1: no token is likelier than another.
    assert theirs.item() == pytest.approx(math.log(320) + 0.5, abs=0.2)


def test_one_step():
    """Gradient by autograd, clipped to norm 1; then AdamW's first update, written out."""
    model, by_hand = a_model(), a_model()
    optimizer = train.build_optimizer(model, train.TrainConfig(weight_decay=0.1, eps=1e-5))
    batch = a_batch()

    # two micro-batches, which must count like one batch
    metrics = train.train_step(model, optimizer, train.cut_batch(batch, 2, "cpu"),
                               train.pretraining_loss, lr=0.01, max_norm=1.0)

    log_probs = [log_probs_by_hand(by_hand, ids) for ids in batch["tokens"].tolist()]
    loss = -torch.cat(log_probs).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-12) and norm > 1
    for (name, ours), weight in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        gradient = weight.grad / (norm + 1e-6)
        # In the first step the two moments are, after their correction, g and g^2.
        update = gradient / (gradient.abs() + 1e-5)
        decay = 0.0 if name == "wte.weight" else 0.1
        expected = weight - 0.01 * decay * weight - 0.01 * update
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10, msg=name)


def test_one_checkpoint(tmp_path):
    """A step after loading gives the very bits of the same step without saving and loading."""
    def step(number, model, optimizer):
        train.train_step(model, optimizer, [a_batch(number)], train.pretraining_loss, 0.01, 1.0)

    model = build_model(CONFIG, seed=0)
    optimizer = train.build_optimizer(model, train.TrainConfig())
    step(1, model, optimizer)
    path = save_checkpoint(tmp_path, {"step": 1}, model, optimizer)
    step(2, model, optimizer)

    resumed = build_model(CONFIG, seed=99)
    optimizer = train.build_optimizer(resumed, train.TrainConfig())
    assert not same_weights(resumed, model)
    load_checkpoint(path, resumed, optimizer)
    step(2, resumed, optimizer)
    assert same_weights(resumed, model)


def test_one_evaluation():
    """Bits per byte = -sum of log2 p over the tokens / UTF-8 bytes of the text."""
    model = a_model()
    sums = evaluate_perplexity(model, TOKENIZER, [{"text": TEXT}])

    ids = [CONFIG.eos_token_id, *TOKENIZER.encode(TEXT)]  # EOS is before every document
    assert len(ids) <= CONFIG.max_seq_len  # one window
    bits = -log_probs_by_hand(model, ids).sum().item() / math.log(2)
    assert len(TEXT.encode()) == len(TEXT) + 2  # ö is two bytes
    assert bits_per_byte(sums) == pytest.approx(bits / (len(TEXT) + 2), rel=1e-12)
    assert sums["tokens"] == len(ids) - 1


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_one_sft_step():
    """The loss is the mean over the answer and its EOS; the question gets no gradient."""
    model = a_model()
    example = adapt.encode_example(chat("is it?", "the word"), TOKENIZER, 64, "", Counter())
    answer = TOKENIZER.encode("the word") + [CONFIG.eos_token_id]
    assert example.ids.tolist()[-len(answer):] == answer
    log_probs = log_probs_by_hand(model, example.ids.tolist())[-len(answer):]

    streams = []  # what the output head reads: (B, T, D)

    def losses_of(x, head_weight, targets):
        x.retain_grad()
        streams.append(x)
        return token_losses(x, head_weight, targets)
    model.token_losses = losses_of
    batch = adapt.packed_rows([[[example]]], 64, CONFIG.pad_token_id)
    optimizer = train.build_optimizer(model, train.TrainConfig())
    metrics = train.train_step(model, optimizer, [batch], adapt.sft_loss, 0.01, 1.0)

    assert metrics["loss"] == pytest.approx(-log_probs.mean().item(), rel=1e-12)
    # The token before the answer predicts its first id, so that gradients begin one place earlier.
    has_gradient = streams[0].grad[0].any(-1).tolist()
    before = len(example.ids) - len(answer) - 1
    assert has_gradient == ([False] * before + [True] * len(answer)
                            + [False] * (64 - before - len(answer)))


def test_one_dpo_step():
    """The loss starts at ln 2. Its gradient pulls the chosen answer up and the rejected one down.

    It is -beta * sigmoid(0) * gradient of (ln p(chosen) - ln p(rejected)); arXiv 2305.18290, 4.
    """
    model, by_hand = a_model(), a_model()
    row = {"prompt": chat("is it?", "")[:1], "chosen": "the word", "rejected": "the case"}
    pair = adapt.encode_pair(row, TOKENIZER, 64, "", Counter())

    def answer_log_probs(model):
        """ln p of the chosen answer, and of the rejected one."""
        chosen, rejected = (log_probs_by_hand(model, side.ids.tolist()) for side in pair)
        return chosen[pair.chosen.prompt - 1:].sum(), rejected[pair.rejected.prompt - 1:].sum()

    chosen, rejected = answer_log_probs(by_hand)
    (chosen - rejected).backward()
    reference = np.array([[chosen.item(), rejected.item()]])
    batches = adapt.PreferenceBatches([pair], batch_size=1, seed=0, model_config=CONFIG,
                                      micro_batch_size=1, reference=reference)
    batch = batches(step=1)
    optimizer = torch.optim.SGD(model.parameters())
    loss_fn = partial(adapt.preference_loss, beta=0.1)
    metrics = train.train_step(model, optimizer, [batch], loss_fn, lr=0.01, max_norm=math.inf)

    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for ours, weight in zip(model.parameters(), by_hand.parameters(), strict=True):
        expected = weight + 0.01 * 0.1 * 0.5 * weight.grad
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-8)
    chosen_after, rejected_after = answer_log_probs(model)
    assert chosen_after - chosen > rejected_after - rejected
