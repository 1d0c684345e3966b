"""Faster forwards without gradients compute what the network computes, and leave no trace; the
sampler draws what numpy drew."""

import numpy as np
import pytest
import torch
from conftest import difference, random_ids, random_model

import model as m
from scaling.sharding import evaluating
from support import generation
from support.files import UserError
from support.finite import check_logits
from support.nucleus import least_of_nucleus

PROMPTS = [[7, 3, 9, 22, 40], [5], [11, 30, 2, 2, 48, 17, 21, 33, 8], [44, 13]]
PRODUCTS = 1 + 4 * 2  # the head's, and four of each of two blocks


@pytest.fixture(autouse=True)
def another_maker(monkeypatch):
    """A chip on which oneDNN's products are taken in float32 too."""
    monkeypatch.setattr(generation, "cpu_flags", lambda: "vendor_id : AuthenticAMD")


def put_on(model):
    """How many products and forwards are not those of their classes."""
    changed = sum("forward" in vars(module) for module in model.modules())
    return changed + (model.head_product is not m.linear)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_fast_forwards_give_the_same_logits_and_leave_with_the_block(tied, dtype):
    model = random_model(weight_tying=tied)
    model.compute_dtype = dtype
    if not generation.is_packable(model):
        pytest.skip("this torch or this chip lacks oneDNN's products")
    casts = PRODUCTS if dtype else 0
    tokens, ids = random_ids(3, 7), random_ids(3, 1)
    tolerance = 0.05 if dtype else 1e-5
    with torch.no_grad():
        plain = model(tokens).float()
        plain_ids = model(ids).float()
        with pytest.raises(KeyError), generation.fixed_weights(model):
            assert difference(model(tokens).float(), plain) < 1e-6  # a prompt is never packed
            assert put_on(model) == 1 + casts
            assert difference(model(ids).float(), plain_ids) < tolerance
            assert put_on(model) == 1 + PRODUCTS
            raise KeyError
        assert put_on(model) == 0
    with generation.fixed_weights(model):
        stream = m.generate_stream(model, PROMPTS, 9)
        next(stream), next(stream)
        model(tokens, tokens).sum().backward()  # between two ids of a stream
        assert torch.equal(model(tokens).detach().float(), plain)  # with gradients: no copies
        assert all(p.grad is not None for p in model.parameters())
    other = random_model(seed=1, weight_tying=tied)
    other.compute_dtype = dtype
    model.load_state_dict(other.state_dict())
    with generation.fixed_weights(model), generation.fixed_weights(other):  # no copy of before
        assert m.generate(model, PROMPTS, 9) == m.generate(other, PROMPTS, 9)


@pytest.mark.parametrize("block, fits", [(generation.fixed_weights, True),
                                         (generation.fixed_weights, False), (evaluating, True)])
def test_weights_of_another_dtype_are_cast_once_if_the_copies_fit(monkeypatch, block, fits):
    monkeypatch.setattr(generation, "copies_fit", lambda model: fits)
    model, tokens = random_model(), random_ids(2, 7)
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        plain = model(tokens)
        with block(model):
            assert torch.equal(model(tokens), plain)
            for weight in model.blocks.parameters():
                weight.zero_()  # who casts at each use sees it
            assert torch.equal(model(tokens), plain) == fits
        assert not torch.equal(model(tokens), plain)


def test_a_copy_that_fails_is_seen_and_leaves_the_model_as_it_was(monkeypatch):
    """Memory runs out, or Ctrl-C comes, in the middle of the casts."""
    model, tokens = random_model(), random_ids(2, 7)
    model.compute_dtype = torch.bfloat16
    products = iter([m.linear, m.linear])

    def fails_at_the_third(self, weight):
        for product in products:
            return product
        raise MemoryError
    monkeypatch.setattr(generation.Copies, "product_of", fails_at_the_third)
    with pytest.raises(MemoryError), generation.fixed_weights(model), torch.no_grad():
        model(tokens)
    assert put_on(model) == 0


def test_copies_take_at_most_half_of_the_free_memory(monkeypatch):
    model = random_model()
    model.compute_dtype = torch.bfloat16
    size = 2 * generation.count_weights(model)
    for free, fits in ((2 * size + 2, True), (2 * size, False)):
        monkeypatch.setattr(generation, "free_memory", lambda free=free: free)
        assert generation.copies_fit(model) == fits
    monkeypatch.undo()
    assert generation.free_memory() > 2**20
    monkeypatch.setattr(generation.Path, "read_text", lambda path: "MemTotal: 8000 kB\n")
    assert generation.free_memory() == 2**32  # an old kernel, and WSL 1, do not say it


def test_what_is_too_large_or_too_precise_is_not_packed(monkeypatch):
    large, precise = random_model(), random_model().double()
    greedy = m.generate(large, PROMPTS, 9)
    assert not generation.is_packable(precise)
    with generation.fixed_weights(precise):
        assert m.generate(precise, PROMPTS, 9) == greedy and put_on(precise) == 1
    monkeypatch.setattr(generation, "PACKED_AT_MOST", 100)
    with generation.fixed_weights(large):
        assert m.generate(large, PROMPTS, 9) == greedy and put_on(large) == 1


def test_generation_computes_what_a_fork_computes():
    """A Linear with a forward of its own, and changed logits, stay in force."""
    class Tripled(m.Linear):
        def forward(self, x):
            return 3 * super().forward(x)
    model = random_model()
    model.blocks[0].attn.attn_out.__class__ = Tripled
    logits = model.logits
    model.logits = lambda x: logits(x).tanh()
    ids = random_ids(2, 1)
    with torch.no_grad():
        expected = model(ids)
        with generation.fixed_weights(model):
            for _ in range(2):
                torch.testing.assert_close(model(ids), expected)


# ---- The sampler ---------------------------------------------------------------------------------

def numpy_sampler(logits, temperature, top_p, streams):
    """The sampler as it was before it worked on tensors, with a complete sort, in numpy."""
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1).numpy()
    if top_p < 1:
        ordered = -np.sort(-probs)
        likelier = ordered.cumsum(-1, dtype=np.float64) - ordered
        least = ordered.min(-1, keepdims=True, where=likelier < top_p, initial=1)
        probs = np.where(probs < least, 0, probs)
    waits = [stream.standard_exponential(logits.shape[-1]) for stream in streams]
    return (probs / np.stack(waits)).argmax(-1).tolist()


@pytest.mark.parametrize("temperature, top_p", [(0.6, 0.95), (1.0, 1.0), (2.0, 0.99), (9.0, 0.9)])
def test_a_seed_draws_the_ids_that_it_drew_in_numpy(temperature, top_p):
    """At temperature 9 the nucleus holds more than the 256 ids that are looked at first."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(8, 4096, generator=generator)
    drawn = [[sampler(logits, temperature, top_p, streams) for _ in range(20)]
             for sampler in (m.choose_next, numpy_sampler)
             for streams in [[m.stream_of(5, row) for row in range(8)]]]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_the_least_of_the_nucleus_is_that_of_a_complete_sort(top_p):
    generator = torch.Generator().manual_seed(1)
    for scale in (0.1, 1.0, 5.0):  # flat to peaked
        probs = (scale * torch.randn(3, 3000, generator=generator)).softmax(-1)
        for row, found in zip(probs.tolist(), least_of_nucleus(probs, top_p), strict=True):
            total = 0.0
            for probability in sorted(row, reverse=True):
                if total >= top_p:
                    break
                total += probability
                least = probability
            assert abs(found.item() / least - 1) < 1e-3  # the neighbour, where rounding decides


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_with_their_row(bad):
    logits = torch.full((3, 5), 2e38)
    check_logits(logits, 4)  # their sum overflows
    logits[1, 3] = bad
    with pytest.raises(UserError, match="prompt 2 of 3, token 5 "):
        check_logits(logits, 4)


def test_a_cache_that_grew_holds_what_was_stored():
    stored = torch.randn(2, 3, 40, 8)
    cache = m.KVCache(m.ModelConfig(d_model=24, n_heads=3), 2, 4)
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 25), (25, 40)):
        keys, values = cache.append(stored[:, :, start:end], -stored[:, :, start:end])
        assert torch.equal(keys, stored[:, :, :end]) and torch.equal(values, -keys)
        assert cache.keys.shape[2] == {3: 4, 4: 4, 5: 6, 25: 25, 40: 40}[end]  # it grows by half
    assert cache.length == 40
