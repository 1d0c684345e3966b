"""The network: OLMo 1.0, its losses on tensors, its sampler, and its weights in and out.

    python model.py export RUN OUT     # write a run as a Hugging Face directory

Paper: OLMo (arXiv 2402.00838), section 2.1 and table 1. Parts, in order: configuration, blocks, the
model, initialisation, losses, generation, weights.

Dims: B batch, T time, S time with the cache, D d_model, H heads, K head_dim, F mlp_hidden_size,
V vocabulary.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.files import UserError, read_json, run_main

LAYER_NORM_EPS = 1e-5


# ---- Configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class ModelConfig:
    """The shape of an OLMo; paper, table 1."""

    d_model: int = 256
    """Width D of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    n_heads: int = 4
    """Attention heads H; each is d_model / n_heads wide."""
    mlp_hidden_size: int = 704
    """Width F of the MLP's activation (OLMo's own key of this name holds 2F, both halves)."""
    max_seq_len: int = 256
    """Context length T in tokens, and the length of a training instance."""
    vocab_size: int = 4096
    """Ids that the tokenizer knows."""
    embedding_size: int = 4096
    """Rows of the embedding: vocab_size padded up (50,280 to 50,304), for speed on GPUs."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    weight_tying: bool = False
    """Use the embedding as the output head (OLMo-1B does, OLMo-7B does not)."""
    eos_token_id: int = 4095
    """End of document; also the only separator between documents."""
    pad_token_id: int = 4094
    """Padding; never trained on."""

    def __post_init__(self):
        def require(condition, remedy):
            if not condition:
                raise UserError(f"model shape: {remedy}")
        require(min(self.d_model, self.n_layers, self.n_heads, self.mlp_hidden_size,
                    self.max_seq_len - 1, self.vocab_size) > 0, "all sizes must be positive")
        require(self.d_model % (2 * self.n_heads) == 0,
                f"d_model={self.d_model} must be a multiple of 2 * n_heads={2 * self.n_heads}")
        require(self.embedding_size >= self.vocab_size,
                f"embedding_size={self.embedding_size} is below vocab_size={self.vocab_size}")
        require(0 <= min(self.eos_token_id, self.pad_token_id)
                and max(self.eos_token_id, self.pad_token_id) < self.vocab_size,
                f"eos_token_id={self.eos_token_id} and pad_token_id={self.pad_token_id} must be "
                f"ids below vocab_size={self.vocab_size}")

    @property
    def head_dim(self):
        return self.d_model // self.n_heads


# ---- Blocks --------------------------------------------------------------------------------------

class Linear(nn.Linear):
    """A projection without bias; its float32 weight is cast to the stream's dtype at each use.

    packed: in generation, the copy of the weight that `pack_weights` made.
    """

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)
        self.packed = None

    def forward(self, x):
        return project(x, self.weight, self.packed)


def project(x, weight, packed=None):
    """x (..., D_in) by a weight (D_out, D_in), or by the copy of it that `pack_weights` made."""
    if packed is None or torch.is_grad_enabled():
        return F.linear(x, weight.to(x.dtype))
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def at_least_float32(x):
    """bfloat16 is upcast, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(x):
    """LayerNorm without gain or bias (paper 2.1): (..., D) -> (..., D); statistics in float32."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def rope_table(positions, head_dim, theta):
    """Cosines and sines, (..., K/2) float32 each, of the rotations at int64 `positions` (...)."""
    # subtle: theta ** -x rounds otherwise, and a thousand tokens on that shows in the logits
    pairs = torch.arange(0, head_dim, 2, device=positions.device)
    inv_freq = 1.0 / theta ** (pairs.float() / head_dim)
    angles = positions.float()[..., None] * inv_freq
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate each pair (x[k], x[k + K/2]) of x (B, H, T, K) by its angle, in float32 at least."""
    first, second = at_least_float32(x).chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat([half.to(x.dtype) for half in turned], dim=-1)


QUERIES = 128  # that look at the keys together: up to their own end, so that half is left out


def plain_attention(q, k, v):
    """Causal attention of q on k and v, (B, H, T, K) each, in plain matrix products.

    In bfloat16 the scores are rounded to it before the softmax, which SDPA does not do.
    """
    T, y = q.shape[2], []
    for start in range(0, T, QUERIES):
        end = min(start + QUERIES, T)
        hidden = ~causal_mask(start, end - start, q.device)
        scores = at_least_float32(q[:, :, start:end] @ k[:, :, :end].transpose(-2, -1))
        scores = (scores / q.shape[-1] ** 0.5).masked_fill(hidden, -math.inf)
        y.append(scores.softmax(-1).to(q.dtype) @ v[:, :, :end])
    return torch.cat(y, dim=2)


PLAIN_AT_MOST = 512  # tokens of a sequence


def suits_plain_attention(q):
    """On a CPU SDPA multiplies in small tiles; without it a step takes 0.8 times as long
    (python -m tests.bench cpu). Of long sequences the scores would take too much memory."""
    return q.device.type == "cpu" and q.shape[2] <= PLAIN_AT_MOST


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions and one fused q, k, v projection."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.att_proj = Linear(config.d_model, 3 * config.d_model)  # rows: q, then k, then v
        self.attn_out = Linear(config.d_model, config.d_model)

    def forward(self, x, cos, sin, attn_mask=None, cache=None):
        B, T, D = x.shape
        heads = self.att_proj(x).view(B, T, 3 * self.n_heads, -1).transpose(1, 2)  # (B, 3H, T, K)
        turned, v = heads.split((2 * self.n_heads, self.n_heads), dim=1)
        q, k = apply_rope(turned, cos, sin).chunk(2, dim=1)  # (B, H, T, K) each
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, K)
        if attn_mask is None and cache is None and suits_plain_attention(q):
            y = plain_attention(q, k, v)
        else:
            causal = attn_mask is None and T > 1  # one query sees all keys
            y = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=causal)
        return self.attn_out(y.transpose(1, 2).reshape(B, T, D))


class SwiGLU(nn.Module):
    """The gated MLP; its input projections are fused, value half first, gate half second."""

    def __init__(self, config):
        super().__init__()
        self.ff_proj = Linear(config.d_model, 2 * config.mlp_hidden_size)
        self.ff_out = Linear(config.mlp_hidden_size, config.d_model)

    def forward(self, x):
        value, gate = self.ff_proj(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.ff_out(F.silu(gate) * value)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin, attn_mask=None, cache=None):
        x = x + self.attn(layer_norm(x), cos, sin, attn_mask, cache)
        return x + self.mlp(layer_norm(x))


# ---- The model -----------------------------------------------------------------------------------

class OLMo(nn.Module):
    """OLMo 1.0: no biases, no learned norm, no dropout, no position table (paper 2.1).

    Weights keep the dtype they are given (float32 in training); `compute_dtype`, when set, is the
    dtype of the residual stream, to which each weight is cast at its use: as in OLMo's FSDP runs.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = None
        self.wte = nn.Embedding(config.embedding_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        if not config.weight_tying:
            self.ff_out = Linear(config.d_model, config.embedding_size)
        self.packed_head = None
        self.head_nats = head_nats  # train.py may put its compiled self here

    def forward(self, tokens, targets=None, attn_mask=None, cache=None, positions=None, only=None):
        """Logits (B, T, V) of int64 `tokens` (B, T), or the nats (B, T) of int64 `targets` (B, T).

        attn_mask: bool, broadcastable to (B, H, T, S), True where a query may look; None is causal.
        cache: one KVCache a layer; `tokens` then follow what it holds.
        positions: int64 (B, T), where each token stands; None is one after another.
        only: int64 (N, 2), row and column of each token whose logits (N, V) are wanted.
        """
        B, T = tokens.shape
        config, device = self.config, tokens.device
        start = cache[0].length if cache else 0
        if start + T > config.max_seq_len and attn_mask is None:  # a mask may hide padding
            raise ValueError(f"{start + T} tokens exceed max_seq_len={config.max_seq_len}")
        if start and T > 1 and attn_mask is None:
            # subtle: SDPA's is_causal would align the first query with the first key
            attn_mask = causal_mask(start, T, device)
        if positions is None:
            positions = torch.arange(start, start + T, device=device)
        cos, sin = rope_table(positions, config.head_dim, config.rope_theta)
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, K/2): alike for all heads
        x = self.wte(tokens).to(self.compute_dtype or self.wte.weight.dtype)  # (B, T, D)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, attn_mask, cache[i] if cache else None)
        if only is not None:
            x = x[only[:, 0], only[:, 1]]  # (N, D)
        head = self.wte.weight if config.weight_tying else self.ff_out.weight
        if targets is None:
            return project(layer_norm(x), head, self.packed_head)  # (B, T, V)
        return self.head_nats(x, head, targets)


def causal_mask(start, length, device):
    """(T, S) bool: query t stands at position start + t and sees the keys up to itself."""
    queries = torch.arange(start, start + length, device=device)[:, None]
    return torch.arange(start + length, device=device) <= queries


def head_nats(x, head, targets):
    """Nats (B, T) of `targets` under the final norm, the head and a softmax in at least float32."""
    logits = project(layer_norm(x), head)  # (B, T, V)
    logits = at_least_float32(logits).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


# ---- Initialisation ------------------------------------------------------------------------------

@torch.no_grad()
def init_weights(model, seed, part=lambda tensor, parameter: tensor):
    """Fill every parameter with its Mitchell start, the same on any device and number of ranks.

    part(tensor, parameter): of the full tensor, drawn one at a time, what the parameter holds.

    # DIFFERS FROM OLMo: official OLMo draws from one running stream, so that its start depends on
    # the number of ranks. Here each full tensor has a stream of its own, seeded by (seed, name).
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(part(initial_tensor(name, parameter.shape, seed), parameter))


def initial_tensor(name, shape, seed):
    """The float32 start of one parameter: normal, cut at 3 std (OLMo's init_fn "mitchell")."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = initial_std(name, shape)
    tensor = torch.empty(shape)
    return nn.init.trunc_normal_(tensor, std=std, a=-3 * std, b=3 * std, generator=generator)


def initial_std(name, shape):
    """1/sqrt(fan-in); less by sqrt(2(l + 1)) for what writes to the residual stream in block l."""
    fan_in = shape[1]
    parts = name.split(".")
    if parts[0] == "blocks" and parts[3] in ("attn_out", "ff_out"):
        return 1 / math.sqrt(2 * fan_in * (int(parts[1]) + 1))
    return 1 / math.sqrt(fan_in)


def build_model(config, seed, device="cpu"):
    """A freshly initialised OLMo on `device`; nothing is allocated twice."""
    with torch.device("meta"):
        model = OLMo(config)
    model.to_empty(device=device)
    init_weights(model, seed)
    return model


# ---- Losses --------------------------------------------------------------------------------------

def next_token_loss(nats, loss_mask):
    """Summed nats and count of the targets that `loss_mask` (B, T) bool keeps, of `nats` (B, T)."""
    return (at_least_float32(nats) * loss_mask).sum(), loss_mask.sum()


def sequence_log_probs(nats, loss_mask):
    """Log-probability (B,) in nats of each row's kept targets, and their counts (B,)."""
    return -(at_least_float32(nats) * loss_mask).sum(-1), loss_mask.sum(-1)


# ---- Generation ----------------------------------------------------------------------------------

class KVCache:
    """The keys and values that one layer has seen: two buffers (B, H, capacity, K) and a length."""

    def __init__(self, config, batch_size, capacity, device=None, dtype=None):
        shape = (batch_size, config.n_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, k, v):
        """Take in k and v (B, H, T, K); return all so far, (B, H, S, K) each."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length:end] = k
        self.values[:, :, self.length:end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, stop_ids=(), seed=0,
             agree=lambda chosen: chosen):
    """Continue each list of ids in `prompts`; returns the new ids. See `generate_stream`."""
    new = [[] for _ in prompts]
    for chosen in generate_stream(model, prompts, max_new_tokens, temperature, top_p, stop_ids,
                                  seed, agree):
        for row, i in chosen.items():
            new[row].append(i)
    return new


@torch.no_grad()
def generate_stream(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, stop_ids=(),
                    seed=0, agree=lambda chosen: chosen):
    """Continue each list of ids in `prompts` by up to `max_new_tokens` ids, yielding as they come
    {row: its next id} of the rows that still go on.

    temperature 0 is greedy; otherwise sample from the smallest set of ids that holds `top_p` of the
    mass. A row ends after one of `stop_ids` (kept), or where the context length ends. Row i draws
    from a stream of its own, (seed, i): its text does not depend on its neighbours.
    agree(ids): what is taken of the ids chosen here, where several processes must take the same.
    The weights must stay as they are until the stream ends or is closed.
    Raises ValueError for a prompt that is empty or fills the context.
    """
    config, device = model.config, model.wte.weight.device
    B, T = len(prompts), max(map(len, prompts), default=0)
    if B == 0 or min(map(len, prompts)) == 0:
        raise ValueError("generate needs prompts of at least one id each, such as eos_token_id")
    if T >= config.max_seq_len:
        raise ValueError(f"a prompt of {T} ids leaves no room in max_seq_len={config.max_seq_len}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be at least 0, top_p={top_p} in (0, 1]")
    room = config.max_seq_len - min(map(len, prompts))  # of the shortest prompt
    capacity = T + min(max_new_tokens, room)
    tokens = torch.full((B, T), config.pad_token_id)
    visible = torch.ones(B, capacity, dtype=torch.bool)  # the left padding is not
    for row, prompt in enumerate(prompts):  # rotary positions are relative: padding shifts nothing
        tokens[row, T - len(prompt):] = torch.tensor(prompt)
        visible[row, :T - len(prompt)] = False
    padded = not visible.all()
    tokens, visible = tokens.to(device), visible.to(device)
    dtype = model.compute_dtype or model.wte.weight.dtype
    cache = [KVCache(config, B, capacity, device, dtype) for _ in range(config.n_layers)]
    streams = [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in range(B)]
    running, sharded = set(range(B)), is_sharded(model)
    begin_packed = T if B * T >= 256 else T + 1  # few tokens are read sooner without
    last = torch.tensor([(row, -1) for row in range(B)], device=device)
    try:
        for length in range(T, capacity):  # `length` tokens are known, the next one is wanted
            if length == begin_packed:
                pack_weights(model, B)
            start = length - tokens.shape[1]
            attn_mask = padded_mask(visible[:, :length], start) if padded else None
            with torch.inference_mode(not sharded):  # 1.07 times as fast at batch 1
                logits = model(tokens, attn_mask=attn_mask, cache=cache, only=last)  # (B, V)
            chosen = agree(choose_next(logits[:, :config.vocab_size].float().cpu(), temperature,
                                       top_p, streams))
            yield {row: chosen[row] for row in sorted(running)}
            running -= {row for row in running if chosen[row] in stop_ids
                        or len(prompts[row]) + length - T + 1 == config.max_seq_len}
            if not running:
                break
            tokens = torch.tensor(chosen, device=device)[:, None]
    finally:
        unpack_weights(model)


PACKED_AT_MOST = 2**29  # weights: of a larger model a second copy costs more than it gains


def pack_weights(model, batch_size):
    """On a CPU, give each projection a second copy of its weight, in the order in which oneDNN
    reads it: few rows are then multiplied 1.3 to 3 times as fast (python -m tests.bench generate).
    """
    embedding = model.wte.weight
    dtype = model.compute_dtype or embedding.dtype
    if (embedding.device.type != "cpu" or is_sharded(model) or not can_pack(dtype)
            or sum(p.numel() for p in model.parameters()) > PACKED_AT_MOST):
        return

    def reordered(weight):
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), batch_size)
    for linear in linears_of(model):
        linear.packed = reordered(linear.weight)
    tied = model.config.weight_tying
    model.packed_head = reordered(embedding) if tied else model.ff_out.packed


def can_pack(dtype):
    """Whether this torch and this chip have oneDNN's products in `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16
                                      and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_sharded(model):
    """Whether FSDP has put tensors of its own in place of the parameters."""
    return not all(type(parameter) is nn.Parameter for parameter in model.parameters())


def unpack_weights(model):
    for linear in linears_of(model):
        linear.packed = None
    model.packed_head = None


def linears_of(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def padded_mask(visible, start):
    """(B, 1, T, S) causal mask that hides the padding; each query sees at least itself."""
    S = visible.shape[1]
    causal = causal_mask(start, S - start, visible.device)
    itself = torch.eye(S, dtype=torch.bool, device=visible.device)[start:]
    return (causal & visible[:, None, None, :]) | itself


def choose_next(logits, temperature, top_p, streams):
    """One id a row of float32 `logits` (B, V), each drawn from its row's generator."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the least may overflow
    probs, ids = logits.softmax(-1).sort(descending=True, stable=True)
    mass = probs.cumsum(-1)
    kept = (mass - probs < top_p).sum(-1, keepdim=True)  # how many ids the nucleus holds
    total = mass.gather(1, kept - 1)
    draws = torch.stack([torch.rand(1, generator=stream) for stream in streams]) * total
    rank = torch.minimum((mass <= draws).sum(-1, keepdim=True), kept - 1)
    return ids.gather(1, rank).squeeze(1).tolist()


def parameter_shapes(config):
    """{name: shape} of the model's parameters; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in OLMo(config).named_parameters()}


def count_parameters(config):
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def main(argv):
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    if argv[:1] != ["export"] or len(argv) != 3:
        raise UserError(f"{' '.join(argv) or 'no command'}: the form is export RUN OUT")
    from support.weights import load_model, refuse_existing, save_hf
    run, out = map(Path, argv[1:])
    refuse_existing(out)  # before the long part
    model = load_model(run)
    tokenizer = next((folder / "tokenizer.json" for folder in (run, run.parent)
                      if (folder / "tokenizer.json").is_file()), None)
    tuned = tokenizer and "method" in read_json(tokenizer.with_name("config.json"))  # by adapt.py
    save_hf(model, out, tokenizer, tuned)
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()):,} parameters"
          + ("" if tokenizer else "; no tokenizer.json was found beside the model"))


if __name__ == "__main__":
    run_main(main)
