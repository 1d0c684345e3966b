"""The network against transformers' OlmoForCausalLM, numpy, and arithmetic by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import difference, random_ids, random_model, same_weights, small_config

import model as m
from scaling.machine import choose_device, choose_dtype
from support import cpu
from support.files import UserError
from support.packing import NO_TARGET, dense_mask
from support.weights import config_to_hf, load_model, name_table, save_hf

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_B = dict(d_model=2048, n_layers=16, n_heads=16, mlp_hidden_size=8192, max_seq_len=2048,
             vocab_size=50280, embedding_size=50304, weight_tying=True, eos_token_id=50279,
             pad_token_id=1)
SEVEN_B = ONE_B | dict(d_model=4096, n_layers=32, n_heads=32, mlp_hidden_size=11008,
                       weight_tying=False)


# ---- Parity with transformers --------------------------------------------------------------------

SHAPES = [  # every head width, tied and not, padded and not, odd lengths
    pytest.param(dict(d_model=64, n_heads=4, mlp_hidden_size=100), 7, id="K16-untied-padded-T7"),
    pytest.param(dict(d_model=48, n_heads=2, mlp_hidden_size=72, n_layers=3, embedding_size=50,
                      weight_tying=True), 33, id="K24-tied-T33"),
    pytest.param(dict(d_model=128, n_heads=2, mlp_hidden_size=90), 61, id="K64-untied-padded-T61"),
    pytest.param(dict(d_model=128, n_heads=1, weight_tying=True), 1, id="K128-tied-padded-T1"),
    pytest.param(dict(d_model=256, n_heads=2, rope_theta=500.0), 33, id="K128-theta500-T33")]


def same_function(ours, hf, T):
    """Logits and every tensor's gradient of the summed next-token loss agree within 1e-5."""
    tokens = random_ids(3, T + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    out = hf(inputs, output_attentions=True)
    if T > 1:
        peaks = torch.stack(out.attentions)[..., 4:, :].amax(-1).mean()
        assert peaks > 0.5, "attention is too near uniform for this comparison to mean much"
    assert difference(ours(inputs), out.logits) < 1e-5
    F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    m.next_token_loss(ours(inputs, targets), torch.ones(3, T, dtype=torch.bool))[0].backward()
    theirs = {name: parameter.grad for name, parameter in hf.named_parameters()}
    mine = dict(ours.named_parameters())
    table = name_table(ours.config)
    assert len(theirs) == sum(len(names.parts) for names in table)
    for names in table:
        fused = torch.cat([theirs[part] for part in names.parts])
        pieces = mine[names.ours].grad.chunk(len(names.parts))
        for part, piece in zip(names.parts, pieces, strict=True):
            # With one position softmax has no gradient: q's and k's are noise next to v's.
            reference = theirs[part] if T > 1 else fused
            assert difference(piece, theirs[part], reference) < 1e-5, part


@pytest.mark.parametrize("changes, T", SHAPES)
def test_our_weights_do_the_same_in_transformers(transformers, tmp_path, changes, T):
    ours = random_model(**changes)
    save_hf(ours, tmp_path / "hf")
    hf = transformers.OlmoForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    same_function(ours, hf, T)


@pytest.mark.parametrize("changes, T", SHAPES)
def test_weights_of_transformers_do_the_same_here(transformers, tmp_path, changes, T):
    config = small_config(**changes)
    torch.manual_seed(1)
    hf = transformers.OlmoForCausalLM._from_config(
        transformers.OlmoConfig(**config_to_hf(config)), attn_implementation="eager")
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter *= 2 / (0.02 * math.sqrt(config.d_model))  # from HF's 0.02 to 2 / sqrt(D)
    hf.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config == config
    same_function(ours, hf, T)


def test_rotary_angles_equal_those_of_transformers_bit_for_bit(transformers):
    """At position 2,047 a frequency that is off by its last bit, 6e-8, turns the angle by 1e-4.

    `theta ** -x` rounds differently from `1.0 / theta ** x`, which transformers and official OLMo
    compute; with it the logits drift by up to 2e-4 at 1,024 tokens.
    """
    from transformers.models.olmo.modeling_olmo import OlmoRotaryEmbedding
    for heads in (16, 8, 2, 1):  # K = 8, 16, 64, 128
        config = small_config(d_model=128, n_heads=heads, max_seq_len=2048)
        rotary = OlmoRotaryEmbedding(transformers.OlmoConfig(**config_to_hf(config)))
        cos, sin = rotary(torch.zeros(1), torch.arange(2048)[None])
        ours = m.rope_table(torch.arange(2048), config.head_dim, config.rope_theta)
        for half in range(2):  # theirs are written twice, one for each half of a head
            assert all(torch.equal(x, theirs[0].chunk(2, dim=-1)[half])
                       for x, theirs in zip(ours, (cos, sin), strict=True))


# ---- Cached decoding -----------------------------------------------------------------------------

@pytest.mark.parametrize("chunks", [[1] * 21, [5, 3, 1, 5, 3, 1, 3], [13, 8], [21]])
def test_cached_chunks_give_the_logits_of_the_full_forward(chunks):
    """A chunk after the first must not use SDPA's is_causal, which aligns it to the first key."""
    model, tokens = random_model(), random_ids(2, 21)
    cache = [m.KVCache(model.config, 2, 7) for _ in model.blocks]  # it has to grow
    with torch.no_grad():
        pieces = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
        full = model(tokens)
    assert cache[0].length == 21
    assert difference(torch.cat(pieces, dim=1), full) < 1e-5


def test_the_mask_of_padding_is_causal_and_lets_every_query_see_itself():
    """One row of 2 padding ids and 2 real ones; a query that saw nothing would be 0/0."""
    visible = torch.tensor([[False, False, True, True]])
    rows = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert m.padded_mask(visible).int().tolist() == [[rows]]


@pytest.mark.parametrize("cached", [0, 60])
def test_more_tokens_than_the_context_are_refused(cached):
    model = random_model()
    cache = [m.KVCache(model.config, 1, 70) for _ in model.blocks]
    if cached:
        model(random_ids(1, cached), cache=cache)
    with pytest.raises(ValueError, match="65 .*max_seq_len=64"):
        model(random_ids(1, 65 - cached), cache=cache)


# ---- Generation ----------------------------------------------------------------------------------

PROMPTS = [[7, 3, 9, 22, 40], [5], [11, 30, 2, 2, 48, 17, 21, 33, 8], [44, 13]]


def test_greedy_generation_equals_that_of_transformers(transformers, tmp_path):
    model = random_model()
    save_hf(model, tmp_path / "hf")
    hf = transformers.OlmoForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    hf.generation_config.eos_token_id = None
    prompts = random_ids(4, 6)
    theirs = hf.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                         max_new_tokens=20, suppress_tokens=list(range(50, 64)))
    assert m.generate(model, prompts.tolist(), 20) == theirs[:, 6:].tolist()


def one_by_one(model, prompt, max_new_tokens, stop_ids=()):
    """Greedy generation by its definition: a full forward for each id, no cache, no padding."""
    ids = list(prompt)
    end = min(len(prompt) + max_new_tokens, model.config.max_seq_len)
    while len(ids) < end:
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]))[0, -1, :50].argmax().item())
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("context, count, stop_ids", [
    (64, 0, ()), (64, 20, ()), (64, 20, range(0, 50, 7)), (16, 100, ())])
def test_greedy_rows_are_those_that_a_full_forward_gives_each_alone(context, count, stop_ids):
    model = random_model(max_seq_len=context)
    rows = [one_by_one(model, prompt, count, stop_ids) for prompt in PROMPTS]
    assert m.generate(model, PROMPTS, count, stop_ids=stop_ids) == rows
    if stop_ids or context == 16:
        assert len(set(map(len, rows))) > 1  # they end at different places


def test_sampled_rows_depend_on_seed_and_row_only():
    """Row i among others of other lengths equals row i of i + 1 copies, where nothing is padded."""
    model = random_model()
    settings = dict(temperature=1.0, top_p=0.9, seed=3)
    batch = m.generate(model, PROMPTS, 20, **settings)
    for row, prompt in enumerate(PROMPTS):
        assert m.generate(model, [prompt] * (row + 1), 20, **settings)[row] == batch[row]
    assert m.generate(model, PROMPTS, 20, **settings | dict(seed=4)) != batch
    first, second = m.generate(model, [PROMPTS[0]] * 2, 20, **settings)
    assert first != second  # each row has its own stream
    for row, prompt in enumerate(PROMPTS):  # the number of a row is not its place in a batch
        assert m.generate(model, [prompt], 20, **settings, numbers=[row]) == [batch[row]]


def test_no_two_streams_of_the_sampler_meet():
    """Seeds and rows that a sum, a product, 32 bits or numpy's seed sequences would confuse."""
    numbers = [0, 1, 2, 8, 9, 1_000_003, 2**32, 2**32 + 1]
    keys = [(seed, row) for seed in [*numbers, -1] for row in numbers]
    streams = [m.stream_of(*key).standard_exponential(100) for key in keys]
    assert len(set(np.concatenate(streams).tolist())) == 100 * len(keys)


def test_another_rounding_of_the_logits_hardly_changes_a_draw():
    """Logits of 4,096 ids that differ by 1e-5, as in another batch: of 1,000 draws from slices of
    [0, 1) four were other ids, of 20,000 races none."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 4096, generator=generator)
    rounded = logits + 1e-5 * torch.randn(1, 4096, generator=generator)
    draws = [[m.choose_next(each, 1.0, 1.0, [m.stream_of(0, i)]) for i in range(3000)]
             for each in (logits, rounded)]
    assert sum(one != other for one, other in zip(*draws, strict=True)) <= 1


def draw(logits, count, temperature, top_p):
    """How often each id came in `count` draws."""
    ids = m.choose_next(logits.expand(count, -1), temperature, top_p, [m.stream_of(0, 0)] * count)
    return np.bincount(ids, minlength=len(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampling_frequencies_are_those_of_the_softmax(temperature):
    """Chi-square over 8 ids, 7 degrees of freedom: above 24.3 once in 1,000 (the seed is fixed)."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.2, -0.4, 0.9, -2.0])
    exponentials = np.exp(logits.double().numpy() / temperature)
    expected = 20_000 * exponentials / exponentials.sum()
    counts = draw(logits, 20_000, temperature, 1.0)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


def test_the_nucleus_is_the_smallest_set_that_holds_top_p():
    """Of 0.05, 0.5, 0.15, 0.3 the nucleus for 0.75 is ids 1 and 3, drawn 5 : 3.

    Of 16,000 draws 10,000 are id 1, give or take 4 * sqrt(16,000 * 5/8 * 3/8) = 245.
    """
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    counts = draw(logits, 16_000, 1.0, 0.75)
    assert abs(counts[1] - 10_000) < 245
    for top_p, nucleus in ((0.75, {1, 3}), (0.85, {1, 2, 3}), (1e-6, {1})):
        counts = draw(logits, 16_000, 1.0, top_p)
        assert set(np.flatnonzero(counts)) == nucleus
    assert np.flatnonzero(draw(torch.zeros(4), 4_000, 1.0, 0.3)).tolist() == [0, 1, 2, 3]  # a tie


def test_padding_rows_of_the_embedding_are_never_generated():
    """Rows 50 to 63 of the head are +-100 times one row, so one of them has the largest logit."""
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[50:64:2] = 100 * model.lm_head.weight[3]
        model.lm_head.weight[51:64:2] = -100 * model.lm_head.weight[3]
        assert (model(torch.tensor([PROMPTS[0]])).argmax(-1) >= 50).all()
    for settings in (dict(), dict(temperature=1.0), dict(temperature=5.0, top_p=0.9)):
        rows = m.generate(model, PROMPTS, 12, **settings)
        assert all(len(row) == 12 and max(row) < 50 for row in rows)


def test_generation_stops_working_once_every_row_has_ended(monkeypatch):
    model, calls = random_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    assert all(len(row) == 1 for row in m.generate(model, PROMPTS, 9, stop_ids=range(50)))
    assert len(calls) == 1


@pytest.mark.parametrize("prompts, settings, words", [
    ([], {}, "one id"), ([[]], {}, "one id"), ([[5], []], {}, "one id"),
    ([list(range(16))], {}, "16 ids .*max_seq_len=16"), ([[5]], dict(temperature=-1), "=-1"),
    ([[5]], dict(temperature=math.nan), "=nan"), ([[5]], dict(temperature=math.inf), "=inf"),
    ([[5]], dict(top_p=0), "top_p=0"), ([[5]], dict(top_p=1.1), "top_p=1.1")])
def test_what_cannot_be_generated_is_refused(prompts, settings, words):
    with pytest.raises(ValueError, match=words):
        m.generate(random_model(max_seq_len=16), prompts, 5, **settings)


# ---- Architecture, part by part ------------------------------------------------------------------

def complex_rotation(x, start, theta):
    """RoPE in complex numbers: x[k] + i x[k + K/2] turns by position * theta^(-2k/K)."""
    first, second = np.split(x.double().numpy(), 2, axis=-1)
    T, half = first.shape[-2:]
    angles = np.arange(start, start + T)[:, None] * theta ** (-np.arange(half) / half)
    turned = (first + 1j * second) * np.exp(1j * angles)
    return torch.from_numpy(np.concatenate([turned.real, turned.imag], axis=-1))


@pytest.mark.parametrize("head_dim, start, theta", [(8, 0, 1e4), (24, 5, 1e4), (64, 31, 500.0)])
def test_rope_is_a_complex_rotation(head_dim, start, theta):
    """Angles are float32, so up to position 64 they are off by at most 64 * 2e-7, 1.3e-5."""
    x = torch.randn(2, 3, 33, head_dim, dtype=torch.float64)
    cos, sin = m.rope_table(torch.arange(start, start + 33), head_dim, theta)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (33, head_dim // 2)
    assert difference(m.apply_rope(x, cos, sin), complex_rotation(x, start, theta)) < 2e-5
    exact = cos.double()
    scaled = x * torch.cat((exact, exact), dim=-1)
    assert torch.equal(m.apply_rope(x, exact, 0 * exact), scaled)  # nothing falls to float32


def test_rope_rotates_bfloat16_in_float32():
    """Rounded once, at the end: equal to the float32 rotation cast down."""
    x = torch.randn(1, 2, 20, 16).bfloat16()
    table = m.rope_table(torch.arange(40, 60), 16, 10000.0)
    turned = m.apply_rope(x, *table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, m.apply_rope(x.float(), *table).bfloat16())
    # Allowed: half a step of bfloat16, and float32's error in an angle of up to 60.
    exact = complex_rotation(x, 40, 10000.0)
    assert ((turned.double() - exact).abs() <= exact.abs() * 2 ** -8 + 2e-5).all()


def test_swiglu_gates_with_the_second_half():
    """F = 1, value weight 3, gate weight 2, out 5: at x = 1, 5 * 3 * silu(2) = 30 / (1 + e^-2)."""
    mlp = m.SwiGLU(small_config(d_model=4, mlp_hidden_size=1))
    mlp.ff_proj.weight.data = torch.tensor([[3.0, 0, 0, 0], [2.0, 0, 0, 0]])
    mlp.ff_out.weight.data = torch.tensor([[5.0], [0], [0], [0]])
    y = mlp(torch.ones(1, 1, 4))[0, 0, 0].item()
    assert math.isclose(y, 30 / (1 + math.exp(-2)), rel_tol=1e-6)


def test_layer_norm_is_plain_with_eps_1e_5():
    """Scaled to a variance near eps, where a wrong eps or an unbiased variance shows."""
    x = torch.randn(3, 5, 16, dtype=torch.float64) * 3e-3 + 0.1
    rows = x.numpy()
    expected = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
    assert np.allclose(m.layer_norm(x).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_token_losses_are_the_log_softmax_of_all_rows_in_float64():
    """All 64 rows of the embedding, also those above vocab_size, are in the denominator."""
    model, tokens, targets = random_model().double(), random_ids(3, 9), random_ids(3, 9, seed=1)
    with torch.no_grad():
        logits = model(tokens).numpy()
        losses = model(tokens, targets)
    assert losses.dtype == torch.float64 and losses.shape == (3, 9) and logits.shape == (3, 9, 64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, targets.numpy()[..., None], -1)[..., 0]
    assert np.allclose(losses.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_losses_and_log_probs_sum_what_the_mask_keeps():
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    kept = torch.tensor([[True, False, True], [True, True, True]])
    total, count = m.next_token_loss(losses, kept)
    log_probs, counts = m.sequence_log_probs(losses, kept)
    assert (total.item(), count.item()) == (1 + 4 + 8 + 16 + 32, 5)
    assert log_probs.tolist() == [-5, -56] and counts.tolist() == [2, 3]


# ---- Precision -----------------------------------------------------------------------------------

def test_compute_dtype_is_the_dtype_of_the_stream_but_not_of_the_weights():
    """bfloat16 keeps 8 bits: the mean of 128 losses stays within 1 % of float32's."""
    model, tokens, targets = random_model(scale=1.0), random_ids(4, 32), random_ids(4, 32, seed=1)
    exact = model(tokens, targets)
    exact.sum().backward()
    exact_grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.compute_dtype = torch.bfloat16
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend((args[0].dtype, out.dtype)))
    assert model(tokens).dtype == torch.bfloat16
    losses = model(tokens, targets)
    assert seen == [torch.bfloat16] * 8
    assert losses.dtype == torch.float32  # the softmax and the log are not rounded
    assert not torch.equal(losses, losses.bfloat16().float())
    assert abs(losses.mean().item() / exact.mean().item() - 1) < 0.01
    assert difference(losses, exact) < 0.05
    everything = torch.ones_like(losses, dtype=torch.bool)
    rounded = losses.bfloat16()
    assert m.next_token_loss(rounded, everything)[0].dtype == torch.float32
    assert m.sequence_log_probs(rounded, everything)[0].dtype == torch.float32
    losses.sum().backward()
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), exact_grads[name].flatten(), dim=0) > 0.99
    assert list(map(len, m.generate(model, PROMPTS, 6))) == [6] * 4


def test_a_stream_takes_the_ids_that_all_agree_on():
    model = random_model()
    wanted = m.generate(model, [[5, 7]], 1) + m.generate(model, [[5, 7, 7]], 1)
    given = []

    def sync(chosen):
        given.append(chosen)
        return [7]
    assert m.generate(model, [[5, 7]], 2, sync=sync) == [[7, 7]]
    assert given == wanted


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_plain_attention_is_as_near_to_float64_as_sdpa():
    """Outputs and gradients; the scores are rounded to bfloat16, as transformers' eager ones."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, 300, 16, dtype=torch.float64) for _ in range(4)]  # 3 blocks

    def results(attend, dtype):
        q, k, v, grad = (x.to(dtype).requires_grad_() for x in exact)
        y = attend(q, k, v)
        return [y, *torch.autograd.grad(y, (q, k, v), grad)]

    truths = results(sdpa, torch.float64)
    for found, truth in zip(results(cpu.plain_attention, torch.float32), truths, strict=True):
        assert difference(found, truth) < 1e-5
    for found, library, truth in zip(results(cpu.plain_attention, torch.bfloat16),
                                     results(sdpa, torch.bfloat16), truths, strict=True):
        assert difference(found, truth) < 2 * difference(library, truth) < 0.1


def test_large_scores_do_not_overflow():
    q, k, v = torch.randn(3, 2, 3, 40, 16, dtype=torch.float64)
    q = (1000 * q).requires_grad_()  # scores of up to some thousands: no exponential holds them
    found, wanted = cpu.plain_attention(q, k, v), sdpa(q, k, v)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), q) for y in (found, wanted)))


def test_plain_attention_keeps_documents_apart():
    """Outputs and gradients are SDPA's with a mask that is made token by token: two documents, one
    whose halves both see its first part and not each other, and padding; 3 blocks of queries."""
    torch.manual_seed(0)
    parts = [(0, 40, 40), (40, 170, 170), (170, 200, 290), (200, 240, 240), (240, 290, 290),
             (290, 300, 300)]  # begin, end, and where it is seen no longer
    until = [seen for begin, end, seen in parts for _ in range(begin, end)]
    sees = torch.tensor([[key <= query < until[key] for key in range(300)]
                         for query in range(300)])
    seen_until = torch.tensor([until, [300] * 300], dtype=torch.int32)
    mask = torch.stack([sees, torch.ones_like(sees).tril()])[:, None]
    assert torch.equal(dense_mask(seen_until), mask)
    q, k, v = (torch.randn(2, 3, 300, 16, dtype=torch.float64, requires_grad=True)
               for _ in range(3))
    grad = torch.randn(2, 3, 300, 16, dtype=torch.float64)
    found = cpu.fast_attention(q, k, v, cpu.packed_mask(seen_until))
    wanted = F.scaled_dot_product_attention(q, k, v, mask)
    assert difference(found, wanted) < 1e-12
    for ours, theirs in zip(torch.autograd.grad(found, (q, k, v), grad),
                            torch.autograd.grad(wanted, (q, k, v), grad), strict=True):
        assert difference(ours, theirs) < 1e-12
    assert cpu.packed_mask(torch.full((1, 513), 513)).dtype == torch.bool  # too long for it


@pytest.mark.parametrize("targets, computed", [(0, 256), (256, 256), (257, 512), (513, 600)])
def test_the_head_is_computed_where_there_is_a_target(targets, computed):
    torch.manual_seed(0)
    x = torch.randn(2, 300, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.full((600,), NO_TARGET)
    ids[torch.randperm(600)[:targets]] = torch.randint(50, (targets,))
    sizes = []

    def counted(x, weight, ids):
        sizes.append(ids.numel())
        return m.token_losses(x, weight, ids)
    found = cpu.only_of_targets(counted)(x, weight, ids.view(2, 300))
    wanted = m.token_losses(x, weight, ids.view(2, 300))
    assert sizes == [computed]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert (found > 0).sum() == targets
    grad = torch.randn(2, 300, dtype=torch.float64)
    for ours, theirs in zip(torch.autograd.grad(found, (x, weight), grad),
                            torch.autograd.grad(wanted, (x, weight), grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-6),
                                         (torch.bfloat16, 4e-3)])
def test_the_fast_losses_and_their_gradients_are_those_of_cross_entropy(dtype, atol):
    """Also where a token has no target, where its logits are large, and twice on one target."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, dtype=dtype)
    x[1] *= 30
    x.requires_grad_()
    weight = torch.randn(50, 8, dtype=dtype, requires_grad=True)
    targets = torch.tensor([[3, 3, 49, 0, 7, NO_TARGET], [NO_TARGET, 1, 2, 3, 4, 49]])
    found = cpu.fast_token_losses(x, weight, targets)
    wanted = m.token_losses(x, weight, targets)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)
    grad = torch.randn_like(found)
    for ours, theirs in zip(torch.autograd.grad(found, (x, weight), grad),
                            torch.autograd.grad(wanted, (x, weight), grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=atol, atol=atol)


MASK = torch.ones(16, 16, dtype=torch.bool)


@pytest.mark.parametrize("q_len, k_len, mask, is_causal, trains, plain", [
    (16, 16, None, True, True, True), (512, 512, None, True, True, True),
    (513, 513, None, True, True, False), (16, 16, None, True, False, False),
    (16, 16, None, False, True, False), (4, 16, None, True, True, False),
    (16, 16, MASK, False, True, False)])
def test_plain_attention_is_for_short_causal_rows_that_train(monkeypatch, q_len, k_len, mask,
                                                             is_causal, trains, plain):
    """Everything else is SDPA's, with the same answer."""
    calls = []
    attend = cpu.plain_attention
    monkeypatch.setattr(cpu, "plain_attention", lambda *qkv: calls.append(1) or attend(*qkv))
    q = torch.randn(2, 3, q_len, 16, requires_grad=trains)
    k, v = torch.randn(2, 2, 3, k_len, 16)
    found = cpu.fast_attention(q, k, v, mask, is_causal=is_causal)
    wanted = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
    assert len(calls) == plain and difference(found, wanted) < 1e-5


def test_fast_attention_is_put_on_every_block():
    model = random_model()
    cpu.use_fast_attention(model)
    assert all(block.attn.attend is cpu.fast_attention for block in model.blocks)


def put_on(model):
    """Names of the modules whose forward or logits is not their class's own."""
    return [name for name, module in model.named_modules()
            if {"forward", "logits"} & vars(module).keys()]


def test_choose_dtype_takes_bfloat16_on_a_cpu_only_where_it_is_fast(monkeypatch):
    for name, flags, dtype in (("bfloat16", "", torch.bfloat16), ("float32", "", torch.float32),
                               ("auto", "avx2 avx512_bf16", torch.bfloat16),
                               ("auto", "avx2 avx512f", torch.float32)):
        monkeypatch.setattr("scaling.machine.cpu_flags", lambda flags=flags: f"flags: {flags}")
        assert choose_dtype(name, torch.device("cpu")) == dtype


def test_choose_device_names_a_device_that_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device() == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"device={name}"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device().type == "cuda"


# ---- Initialisation ------------------------------------------------------------------------------

STDS = {  # of OLMo-1B, d_model 2,048, and OLMo-7B, d_model 4,096
    ("wte", 2048): 0.0220971, ("blocks.15.attn.att_proj", 2048): 0.0220971,
    ("blocks.15.mlp.ff_proj", 2048): 0.0220971, ("blocks.0.attn.attn_out", 2048): 0.015625,
    ("blocks.15.attn.attn_out", 2048): 0.00390625, ("blocks.0.mlp.ff_out", 8192): 0.0078125,
    ("blocks.15.mlp.ff_out", 8192): 0.001953125, ("lm_head", 4096): 0.015625,
    ("blocks.31.attn.att_proj", 4096): 0.015625, ("blocks.0.attn.attn_out", 4096): 0.0110485,
    ("blocks.31.attn.attn_out", 4096): 0.001953125, ("blocks.0.mlp.ff_out", 11008): 0.0067395,
    ("blocks.31.mlp.ff_out", 11008): 0.0011914}


def test_nominal_std_is_that_of_the_released_models():
    for (name, d_in), std in STDS.items():
        assert math.isclose(m.initial_std(f"{name}.weight", (1, d_in)), std, rel_tol=2e-5), name


@pytest.mark.parametrize("tied", [False, True])
def test_every_matrix_has_its_std_and_is_cut_at_three(tied):
    """A normal cut at 3 std keeps 0.9866 of it; n >= 16,384 draws tell that to 1/sqrt(2n) = 0.6%.

    Of so many some lie beyond 2.9 std (one of 970 does), so that a cut at 2 would show.
    """
    model = m.build_model(small_config(d_model=128, n_layers=3, mlp_hidden_size=176, vocab_size=200,
                                       embedding_size=200, weight_tying=tied), seed=5)
    named = dict(model.named_parameters())
    assert len(named) == 1 + 3 * 4 + (not tied)
    for name, weight in named.items():
        block = int(name.split(".")[1]) if name.startswith("blocks") else None
        fan_in = 176 if name.endswith("mlp.ff_out.weight") else 128
        narrower = 2 * (block + 1) if name.endswith(("attn_out.weight", "mlp.ff_out.weight")) else 1
        scaled = weight.detach() * math.sqrt(fan_in * narrower)
        assert abs(scaled.std().item() / 0.9866 - 1) < 0.025, name
        assert abs(scaled.mean().item()) < 0.03, name
        assert 2.9 < scaled.abs().max() <= 3.0001, name


def test_a_start_depends_on_name_and_seed_and_on_nothing_else():
    torch.manual_seed(1)
    one = m.build_model(small_config(n_layers=2), seed=7).state_dict()
    torch.manual_seed(2)
    deeper = m.build_model(small_config(n_layers=3), seed=7).state_dict()  # drawn among others
    assert all(torch.equal(one[name], deeper[name]) for name in one)
    other = m.build_model(small_config(n_layers=2), seed=8).state_dict()
    assert not any(torch.equal(one[name], other[name]) for name in one)
    pairs = torch.stack([deeper[f"blocks.{i}.attn.att_proj.weight"].flatten() for i in range(3)])
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 0.1  # a stream for each name


RECORDED_SUMS = {  # of a seed's weights, by the code of the time when the head was called ff_out
    "wte.weight": -11.803145, "blocks.0.attn.att_proj.weight": 19.145043,
    "blocks.0.mlp.ff_proj.weight": 7.403578, "blocks.1.attn.attn_out.weight": 2.094933,
    "blocks.1.mlp.ff_out.weight": -0.865951, "lm_head.weight": -3.664619}


@pytest.mark.parametrize("tied", [False, True])
def test_a_seed_still_gives_the_weights_that_it_gave(tied):
    """A sum, not a digest: chips without AVX-512 round the last bit of some weights differently."""
    weights = dict(m.build_model(small_config(weight_tying=tied), 7).named_parameters())
    for name in RECORDED_SUMS.keys() & weights.keys():
        assert abs(weights[name].double().sum().item() - RECORDED_SUMS[name]) < 1e-4
    assert RECORDED_SUMS.keys() - weights.keys() == ({"lm_head.weight"} if tied else set())


def test_a_parameter_of_one_dimension_starts_without_an_effect():
    """A fork's learned gain or bias; OLMo 1.0 has neither."""
    assert m.initial_tensor("blocks.0.norm.gain", (5,), 0).tolist() == [1] * 5
    assert m.initial_tensor("blocks.0.attn.attn_out.bias", (5,), 0).tolist() == [0] * 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_start_is_the_same_on_a_gpu():
    here, there = m.build_model(small_config(), 7), m.build_model(small_config(), 7, "cuda")
    assert same_weights(here, there.cpu())


def test_the_first_loss_is_about_ln_v():
    """A normed stream times the head gives logits of variance 0.987^2 = 0.973.

    The mean of -log softmax over V such is ln V + 0.973/2: for 512, 6.24 + 0.49; 1,024 targets
    tell it to 0.03.
    """
    model = m.build_model(small_config(d_model=128, vocab_size=512, embedding_size=512), seed=0)
    tokens, targets = random_ids(16, 64, high=512), random_ids(16, 64, seed=1, high=512)
    with torch.no_grad():
        loss = model(tokens, targets).mean().item()
    assert abs(loss - (math.log(512) + 0.487)) < 0.15


def test_parameter_counts_of_the_released_models():
    assert m.count_parameters(m.ModelConfig(**ONE_B)) == 1_176_764_416
    assert m.count_parameters(m.ModelConfig(**SEVEN_B)) == 6_888_095_744


@pytest.mark.parametrize("key, value", [
    ("d_model", 30), ("d_model", 36),  # 30 / 4 heads; heads of 9, where RoPE turns pairs
    ("embedding_size", 49), ("eos_token_id", 50), ("pad_token_id", -1), ("n_layers", 0),
    ("max_seq_len", 1)])
def test_an_impossible_shape_is_refused(key, value):
    with pytest.raises(UserError, match=f"{key}={value} "):
        small_config(**dict(n_heads=4) | {key: value})
