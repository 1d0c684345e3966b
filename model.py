"""The network: OLMo 1.0, its losses on tensors, its sampler, and its weights in and out.

    python model.py export RUN OUT     # write a run as a Hugging Face directory

Paper: OLMo (arXiv 2402.00838), section 2.1 and table 1. Parts, in order: configuration, blocks, the
model, initialisation, losses, generation, weights.

Dims: B batch, T time, S time with the cache, D d_model, H heads, K head_dim, F mlp_hidden_size,
V vocabulary.
"""

import hashlib
import itertools
import json
import math
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from configs import UserError, file_sha256, read_json, run_main, write_json

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


def choose_device(name="auto"):
    """The device named, or with "auto" the GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA GPU here; --device=cpu runs anywhere")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: torch sees no Apple GPU here; --device=cpu runs anywhere")
    return torch.device(name)


def choose_dtype(name, device):
    """The forward's dtype: the one named, or with "auto" bfloat16 where the chip is fast at it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    fast = device.type == "cpu" and "avx512_bf16" in cpu_flags()
    return torch.bfloat16 if fast else torch.float32


def cpu_flags():
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.is_file() else ""


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


# ---- Weights -------------------------------------------------------------------------------------

# (ours, official OLMo's, Hugging Face's parts) inside a block. Where we have one tensor and HF
# several, its rows are theirs, one after another. Nothing is permuted: all three rotate halves.
BLOCK_TABLE = (
    ("attn.att_proj", "att_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("attn.attn_out", "attn_out", ("self_attn.o_proj",)),
    ("mlp.ff_proj", "ff_proj", ("mlp.up_proj", "mlp.gate_proj")),
    ("mlp.ff_out", "ff_out", ("mlp.down_proj",)),
)


def name_table(config):
    """Rows (our name, official name, [HF names]) for every tensor of the model."""
    table = [("wte.weight", "transformer.wte.weight", ["model.embed_tokens.weight"])]
    if not config.weight_tying:
        table.append(("ff_out.weight", "transformer.ff_out.weight", ["lm_head.weight"]))
    for i in range(config.n_layers):
        for ours, official, parts in BLOCK_TABLE:
            table.append((f"blocks.{i}.{ours}.weight", f"transformer.blocks.{i}.{official}.weight",
                          [f"model.layers.{i}.{part}.weight" for part in parts]))
    return table


def load_model(path, device="cpu"):
    """The OLMo, in float32, that lies in a directory of any of four kinds.

    A run directory (its newest step), a step directory of it, a Hugging Face directory (one
    safetensors file or several), or an official OLMo unsharded checkpoint (model.pt beside
    config.yaml). Raises UserError that names what is missing, unexpected or misshapen. No file's
    content is run.
    """
    path = Path(path)
    config_file = path / "config.json"
    if (path / "state.json").is_file():
        return load_step(path, verify_step(path), device)
    if (path / "model.pt").is_file():
        return load_official(path, device)
    if config_file.is_file() and "model_type" in read_json(config_file):
        return load_hf(path, device)
    if config_file.is_file():
        return load_step(*newest_step(path), device)
    raise UserError(f"{path}: no model here; a run directory, a step directory, a Hugging Face "
                    "directory or an official OLMo directory (model.pt, config.yaml) is wanted")


def assemble(config, tensors, place, device):
    """An OLMo filled with `tensors`, {our name: tensor}; every name and shape must fit."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_tensors(parameter_shapes(config), found, place)
    with torch.device("meta"):
        model = OLMo(config)
    tensors = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model


def parameter_shapes(config):
    """{name: shape} of the model's parameters; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in OLMo(config).named_parameters()}


def count_parameters(config):
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def check_tensors(wanted, found, place):
    """Compare two {name: shape}; UserError lists what is missing, unexpected or misshapen."""
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in wanted]
    faults += [f"{name} has shape {found[name]}, wanted {wanted[name]}" for name in wanted
               if name in found and found[name] != wanted[name]]
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{place}: these weights do not fit the model's shape: "
                        f"{'; '.join(faults[:5])}{more}")


# -- Step directories (train.py writes them) --

def step_directories(run):
    """The step directories of a run, oldest first."""
    steps = [path for path in Path(run).glob("step*") if path.name[4:].isdigit() and path.is_dir()]
    return sorted(steps, key=lambda path: int(path.name[4:]))


def newest_step(run, digests=True):
    """(path, state) of a run's newest whole step directory; damaged ones are named and skipped."""
    for path in reversed(step_directories(run)):
        try:
            return path, verify_step(path, digests)
        except UserError as error:
            print(f"warning: {error}; trying the step before it")
    raise UserError(f"{run}: holds no whole step directory")


def state_digest(state):
    """SHA-256 of a step's state.json, its own digest left out."""
    body = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def verify_step(path, digests=True):
    """The state.json of a step directory whose every file has its recorded size and SHA-256.

    digests=False leaves the files' SHA-256 out.
    """
    state = read_json(path / "state.json")
    if state.get("sha256") != state_digest(state):
        raise UserError(f"{path / 'state.json'}: damaged, its digest differs")
    if not isinstance(state.get("files"), dict):
        raise UserError(f"{path / 'state.json'}: lists no files")
    for name, record in state["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: missing from this checkpoint")
        if file.stat().st_size != record["size"]:
            raise UserError(f"{file}: damaged, {file.stat().st_size} bytes, not {record['size']}")
        if digests and file_sha256(file) != record["sha256"]:
            raise UserError(f"{file}: damaged, its SHA-256 differs")
    return state


class SafeUnpickler(pickle.Unpickler):
    """Unpickles only what DCP writes in `.metadata`: plain records of names, shapes and dtypes."""

    ALLOWED = {
        "torch": {"Size", "float32", "float64", "bfloat16", "int64"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath"}, "pathlib._local": {"PosixPath"},
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING", "BytesStorageMetadata"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    }

    def find_class(self, module, name):
        if name not in self.ALLOWED.get(module, ()):
            raise UserError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, which by itself unpickles `.metadata` and byte entries without limits."""

    def read_metadata(self, *args, **kwargs):
        file = Path(self.path) / ".metadata"
        try:
            with open(file, "rb") as stream:
                metadata = SafeUnpickler(stream).load()
            if not isinstance(metadata, Metadata):
                raise UserError(f"it holds {type(metadata).__name__}")
        except Exception as error:
            raise UserError(f"{file}: refused, not plain metadata ({error})") from None
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                raise UserError(f"{file}: refused, {name} is pickled bytes, not a tensor")
        return metadata


def read_step(path, tensors):
    """Fill `tensors`, {name: tensor or DTensor}, in place from a step directory."""
    reader = SafeReader(str(path))
    entries = reader.read_metadata().state_dict_metadata
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    prefixes = {name.split(".")[0] for name in wanted}
    check_tensors(wanted, {name: tuple(entry.size) for name, entry in entries.items()
                           if name.split(".")[0] in prefixes}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is but one process
        try:
            dcp.load(tensors, storage_reader=reader)
        except CheckpointException as error:
            raise UserError(f"{path}: its tensors cannot be read ({root_cause(error)})") from None


def root_cause(error):
    """The error inside DCP's wrapper, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def load_step(path, state, device):
    """The model of one step directory, whose verified state.json is `state`."""
    lost = [key for key in ModelConfig.__dataclass_fields__ if key not in state.get("config", ())]
    if lost:
        raise UserError(f"{path / 'state.json'}: its config lacks {', '.join(lost)}")
    config = ModelConfig(**{key: state["config"][key] for key in ModelConfig.__dataclass_fields__})
    with torch.device("meta"):
        model = OLMo(config)
    model.to_empty(device="cpu")
    read_step(path, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    return model.to(device)


# -- Hugging Face --

def read_model_config(path):
    """The configuration of a Hugging Face directory, or of an official OLMo checkpoint."""
    if (path / "model.pt").is_file():
        return official_config(path / "config.yaml")
    return hf_to_config(read_json(path / "config.json"), path / "config.json")


def load_hf(path, device):
    """The model of a Hugging Face directory of an OLMo 1.0."""
    config = read_model_config(path)
    found, table, shapes = read_safetensors(path), name_table(config), parameter_shapes(config)
    tied_head = found.pop("lm_head.weight", None) if config.weight_tying else None
    wanted = {name: (shapes[ours][0] // len(names), shapes[ours][1])  # the parts' rows are equal
              for ours, _, names in table for name in names}
    check_tensors(wanted, {name: tuple(tensor.shape) for name, tensor in found.items()}, path)
    if tied_head is not None and not torch.equal(tied_head, found["model.embed_tokens.weight"]):
        raise UserError(f"{path}: lm_head.weight differs from the embedding that it is tied to")
    return assemble(config, {ours: torch.cat([found[name] for name in names])
                             for ours, _, names in table}, path, device)


def read_safetensors(path):
    """{name: tensor} of model.safetensors, or of the files that its index lists."""
    load_file = import_safetensors().load_file
    index = path / "model.safetensors.index.json"
    files = ([path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
             if index.is_file() else [path / "model.safetensors"])
    tensors = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing; the directory must hold its safetensors files")
        try:
            tensors.update(load_file(file))
        except Exception as error:
            raise UserError(f"{file}: damaged or not safetensors ({error})") from None
    return tensors


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("Hugging Face weights need the package safetensors: "
                        "pip install safetensors") from None
    return safetensors.torch


def hf_to_config(hf, place):
    """Our configuration from HF's; UserError for a setting that OLMo 1.0 does not have."""
    heads = hf.get("num_attention_heads")
    for key, wanted in (("model_type", "olmo"), ("hidden_act", "silu"), ("attention_bias", False),
                        ("clip_qkv", None), ("num_key_value_heads", heads), ("rope_scaling", None)):
        if hf.get(key, wanted) != wanted:
            raise UserError(f"{place}: {key}={hf[key]} is not OLMo 1.0, which has {key}={wanted}")
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{place}: rope_type={rope['rope_type']} is not OLMo 1.0's plain rotation")
    for key in HF_SIZES:
        if type(hf.get(key)) is not int:
            raise UserError(f"{place}: {key} is {hf.get(key)}, a whole number is wanted")
    sizes = {ours: hf[theirs] for theirs, ours in HF_SIZES.items()}
    sizes["vocab_size"] = hf.get("unpadded_vocab_size", sizes["embedding_size"])
    return ModelConfig(**sizes, weight_tying=hf.get("tie_word_embeddings", False),
                       rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))))


HF_SIZES = {"hidden_size": "d_model", "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads", "intermediate_size": "mlp_hidden_size",
            "max_position_embeddings": "max_seq_len", "vocab_size": "embedding_size",
            "eos_token_id": "eos_token_id", "pad_token_id": "pad_token_id"}


def config_to_hf(config):
    """Hugging Face's config.json for our configuration."""
    return {
        **{theirs: getattr(config, ours) for theirs, ours in HF_SIZES.items()},
        "architectures": ["OlmoForCausalLM"], "model_type": "olmo", "hidden_act": "silu",
        "num_key_value_heads": config.n_heads, "tie_word_embeddings": config.weight_tying,
        "unpadded_vocab_size": config.vocab_size,  # ours; HF's own knows only the padded one
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "use_cache": True,
        "initializer_range": 0.02, "torch_dtype": "float32", "bos_token_id": None,
    }


# data.py's render_chat in Jinja, for transformers' apply_chat_template
CHAT_TEMPLATE = (
    "{{ eos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'].strip() }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if message['role'] != 'assistant' or not loop.last or add_generation_prompt %}{{ '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")


def save_hf(model, out, tokenizer=None, tuned=False):
    """Write `model`, and the tokenizer.json at `tokenizer`, as a Hugging Face directory at `out`.

    AutoModelForCausalLM and AutoTokenizer load it as it is; if `tuned`, with the template of chats.
    `out` must not exist or be empty; it is written under another name first, so that it is whole or
    not there.
    """
    out, config = Path(out).resolve(), model.config
    refuse_existing(out)
    save_file = import_safetensors().save_file
    state, tensors = model.state_dict(), {}
    for ours, _, names in name_table(config):
        pieces = state[ours].cpu().float().chunk(len(names))
        tensors.update((name, piece.contiguous())
                       for name, piece in zip(names, pieces, strict=True))
    aside = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        write_json(aside / "config.json", config_to_hf(config))
        write_json(aside / "generation_config.json", ends)
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), aside, config, tuned)
        aside.replace(out)  # an empty directory gives way
    except OSError as error:
        raise UserError(f"{out}: could not be written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_existing(out):
    """UserError if a directory to be written holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another name or delete it")


def copy_tokenizer(file, out, config, tuned):
    """Copy tokenizer.json and name its special tokens the way that AutoTokenizer reads them."""
    added = {token["id"]: token["content"] for token in read_json(file).get("added_tokens", ())}
    if not {config.eos_token_id, config.pad_token_id} <= added.keys():
        raise UserError(f"{file}: has no added tokens with the model's ids of EOS "
                        f"({config.eos_token_id}) and padding ({config.pad_token_id})")
    shutil.copyfile(file, out / "tokenizer.json")
    special = {"eos_token": added[config.eos_token_id], "pad_token": added[config.pad_token_id]}
    write_json(out / "special_tokens_map.json", special)
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False, **special,
        **({"chat_template": CHAT_TEMPLATE} if tuned else {})})


# -- Official OLMo --

def load_official(path, device):
    """The model of an official OLMo unsharded checkpoint: model.pt beside config.yaml."""
    config = read_model_config(path)
    try:
        found = torch.load(path / "model.pt", map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch's message runs over lines, and advises to run what is in the file
        found = None
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        raise UserError(f"{path / 'model.pt'}: damaged, or holds more than named tensors")
    ours = {official: name for name, official, _ in name_table(config)}
    tensors = {ours.get(name, name): tensor for name, tensor in found.items()}
    return assemble(config, tensors, path, device)


def official_config(path):
    """Our configuration from the `model:` block of an official config.yaml."""
    if not path.is_file():
        raise UserError(f"{path}: missing; an official checkpoint needs it beside model.pt")
    settings = read_model_block(path)
    for key, wanted in (("block_type", "sequential"), ("activation_type", "swiglu"),
                        ("rope", "true"), ("alibi", "false"), ("include_bias", "false"),
                        ("layer_norm_type", "default"), ("layer_norm_with_affine", "false"),
                        ("attention_layer_norm", "false"), ("multi_query_attention", "false"),
                        ("clip_qkv", None)):
        if settings.get(key) not in (wanted, None):
            raise UserError(f"{path}: {key}: {settings[key]} is not OLMo 1.0, which has {wanted}")
    try:
        d_model, vocab_size = int(settings["d_model"]), int(settings["vocab_size"])
        fused = int(settings.get("mlp_hidden_size") or int(settings["mlp_ratio"]) * d_model)
        return ModelConfig(
            d_model=d_model, n_layers=int(settings["n_layers"]), n_heads=int(settings["n_heads"]),
            mlp_hidden_size=fused // 2,  # of both halves
            max_seq_len=int(settings["max_sequence_length"]),
            vocab_size=vocab_size, embedding_size=int(settings.get("embedding_size") or vocab_size),
            rope_theta=float(settings.get("rope_theta") or 10000),
            weight_tying=settings.get("weight_tying") != "false",
            # the frozen yaml says 50279; the one in use then said 0, the converter rewrites it
            eos_token_id=int(settings["eos_token_id"]) or vocab_size - 1,
            pad_token_id=int(settings["pad_token_id"]))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: the model block lacks or garbles {error}") from None


def read_model_block(path):
    """{key: text} of the flat `model:` block of a YAML file; a null has no key here."""
    lines = [line.split(" #")[0].rstrip() for line in path.read_text().splitlines()]
    lines = [line for line in lines if line.strip()]
    if "model:" not in lines:
        raise UserError(f"{path}: has no `model:` block")
    block = itertools.takewhile(lambda line: line.startswith(" "),
                                lines[lines.index("model:") + 1:])
    pairs = [line.strip().partition(":") for line in block]
    return {key: value.strip() for key, _, value in pairs if value.strip() not in ("", "null")}


def main(argv):
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    if argv[:1] != ["export"] or len(argv) != 3:
        raise UserError(f"{' '.join(argv) or 'no command'}: the form is export RUN OUT")
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
