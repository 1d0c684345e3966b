"""The network: OLMo 1.0, its initialisation, its losses and its sampler.

    python model.py export RUN OUT     # write a run as a Hugging Face directory

Paper: OLMo (arXiv 2402.00838), section 2.1 and tables 1 and 2. The comments name each dimension by
one letter:

    B  sequences of a batch          D  width of the residual stream (d_model)
    T  tokens of a sequence          H  attention heads
    S  tokens that attention sees:   K  width of a head, D / H
       T, and those in the cache     F  width of the MLP (mlp_hidden_size)
    V  rows of the embedding         N  chosen positions of a batch
"""

from support.command import UserError, run_main  # first: Ctrl-C is quiet from here on
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from configs import setting
from support.finite import check_logits
from support.nucleus import least_of_nucleus

LAYER_NORM_EPS = 1e-5  # added to the variance, which may be 0


# ---- Configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class ModelConfig:
    """The shape of an OLMo (paper, tables 1 and 2); the defaults are a toy for a laptop."""

    d_model: int = setting(256, "Width D of the residual stream.")
    n_layers: int = setting(4, "Number of blocks.")
    n_heads: int = setting(4, "Attention heads H; each is d_model / n_heads wide.")
    # OLMo's own key of this name counts both halves of the gated MLP, 2F.
    mlp_hidden_size: int = setting(704, "Width F of the MLP (the paper: about 8/3 of d_model).")
    max_seq_len: int = setting(256, "Context T in tokens, and the length of a training instance.")
    vocab_size: int = setting(4096, "Number of ids; train.py: the tokenizer's, if not set.")
    # A GPU multiplies fastest where sizes are multiples of 128: OLMo pads 50,280 ids to 50,304.
    embedding_size: int = setting(4096, "Rows V; train.py: vocab_size, padded, if not set.")
    rope_theta: float = setting(10000.0, "Base of the rotary frequencies.", least=1.0)
    # Sharing one matrix saves OLMo-1B 8 % of its weights; it would save a 7B 3 %.
    weight_tying: bool = setting(False, "Use the embedding as the output head, as OLMo-1B does.")
    # Neither OLMo nor this code has a token for the beginning of a text.
    eos_token_id: int = setting(4095, "End of a document; train.py: the tokenizer's, if not set.")
    pad_token_id: int = setting(4094, "Padding, untrained; train.py: the tokenizer's, if not set.")

    def __post_init__(self):
        for key in ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size"):
            self.require(getattr(self, key) > 0, key, "must be positive")
        # An instance of one token has no next token to learn from.
        self.require(self.max_seq_len > 1, "max_seq_len", "must be at least 2")
        # RoPE turns pairs of dimensions, so a head needs an even width.
        pairs = 2 * self.n_heads
        self.require(self.d_model % pairs == 0, "d_model",
                     f"must be a multiple of {pairs}, which is 2 * n_heads")
        self.require(self.embedding_size >= self.vocab_size, "embedding_size",
                     f"is below vocab_size={self.vocab_size}")
        for key in ("eos_token_id", "pad_token_id"):
            is_id = 0 <= getattr(self, key) < self.vocab_size
            self.require(is_id, key, f"must be an id below vocab_size={self.vocab_size}")

    def require(self, condition, key, remedy):
        if not condition:
            raise UserError(f"model shape: {key}={getattr(self, key)} {remedy}")

    @property
    def head_dim(self):
        return self.d_model // self.n_heads


# ---- Blocks --------------------------------------------------------------------------------------

class Linear(nn.Linear):
    """A projection without bias; its float32 weight is cast to the dtype of x at each use.

    The paper drops every bias, as PaLM and LLaMA do, for the stability of training (paper 2.1).
    """

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x):
        return linear(x, self.weight)


def linear(x, weight):
    """x (..., d_in) times a weight (d_out, d_in) that is cast to the dtype of x."""
    return F.linear(x, weight.to(x.dtype))


def at_least_float32(x):
    """x in float32; float64 is left alone. bfloat16 keeps 8 bits: too few for sums and angles."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(x):
    """LayerNorm without gain and bias: (..., D) -> (..., D) of mean 0 and variance 1.

    Of three forms (LayerNorm with a gain, RMSNorm, this one) the authors judged this one the safest
    and measured it as the fastest (paper 2.1).
    """
    # torch takes the mean and the variance of a bfloat16 x in float32 by itself.
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def rope_table(positions, head_dim, theta):
    """Cosines and sines of RoPE's angles at int64 `positions` (...): float32 (..., K/2) each.

    Pair k turns by position * theta^(-2k/K): fast pairs tell near tokens apart, slow ones far ones.
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device)
    # subtle: theta ** -x rounds differently, and after 1,000 tokens the logits show it
    inv_freq = 1.0 / theta ** (pairs.float() / head_dim)
    # Angles stay float32: bfloat16 cannot tell position 1,000 from 1,001.
    angles = positions.float()[..., None] * inv_freq
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate each pair (x[k], x[k + K/2]) of x (B, H, T, K) by its angle, in at least float32.

    A query and a key that are both rotated have a product that depends on their distance alone:
    attention learns "three tokens back" once, for all positions (arXiv 2104.09864).
    """
    # Pairs lie half a head apart, as in GPT-NeoX and transformers; RoPE's paper takes neighbours.
    # It is the same function with the columns permuted, so weights fit only one of the two.
    first, second = at_least_float32(x).chunk(2, dim=-1)  # (B, H, T, K/2) each
    turned_first = (first * cos - second * sin).to(x.dtype)
    turned_second = (second * cos + first * sin).to(x.dtype)
    return torch.cat([turned_first, turned_second], dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        # One product for q, k and v keeps a GPU busier than three; rows: q, then k, then v.
        self.att_proj = Linear(config.d_model, 3 * config.d_model)
        self.attn_out = Linear(config.d_model, config.d_model)
        # softmax(q k' / sqrt(K)) v; support/ may put faster versions of the two here
        self.rotate = apply_rope
        self.attend = F.scaled_dot_product_attention

    def forward(self, x, cos, sin, attn_mask=None, cache=None):
        B, T, D = x.shape
        H = self.n_heads
        heads = self.att_proj(x).view(B, T, 3 * H, -1)
        heads = heads.transpose(1, 2)  # (B, 3H, T, K): attention works on each head by itself
        # Only queries and keys are turned: positions steer who looks where, not what is read.
        queries_and_keys, v = heads.split((2 * H, H), dim=1)
        q, k = self.rotate(queries_and_keys, cos, sin).chunk(2, dim=1)  # (B, H, T, K) each
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, K) each
        # Causal: a token that saw the next one could copy it, and learn nothing. A lone query is
        # the newest token and may look at every key, so it needs no mask.
        is_causal = attn_mask is None and T > 1
        y = self.attend(q, k, v, attn_mask, is_causal=is_causal)  # (B, H, T, K)
        y = y.transpose(1, 2).reshape(B, T, D)  # the heads side by side again
        return self.attn_out(y)


class SwiGLU(nn.Module):
    """The gated MLP (arXiv 2002.05202): (..., D) -> (..., D).

    A ReLU switches a value on or off; here a second projection, the gate, scales each value
    smoothly. A third matrix comes with it, hence F of about 8/3 D where a ReLU network has 4 D: as
    many weights (paper 2.1). OLMo-7B keeps to that, OLMo-1B has 4 D.
    """

    def __init__(self, config):
        super().__init__()
        # Both input projections in one product; rows: the values, then the gates.
        self.ff_proj = Linear(config.d_model, 2 * config.mlp_hidden_size)
        self.ff_out = Linear(config.mlp_hidden_size, config.d_model)  # back to the stream

    def forward(self, x):
        value, gate = self.ff_proj(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.ff_out(F.silu(gate) * value)  # silu(g) = g sigmoid(g)


class Block(nn.Module):
    """One transformer block: attention mixes tokens, the MLP works on each token by itself.

    Pre-norm: each half reads a normed copy and adds to a stream that is never normed. The gradient
    reaches block 0 along plain sums, and deep models train stably. `wanted` (N, 2), the rows and
    columns of some tokens, cuts the stream from (B, T, D) to (N, D) before the MLP.
    """

    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin, attn_mask=None, cache=None, wanted=None):
        x = x + self.attn(layer_norm(x), cos, sin, attn_mask, cache)  # (B, T, D)
        if wanted is not None:
            x = x[wanted.unbind(dim=1)]  # (N, D): no token is read by others from here on
        x = x + self.mlp(layer_norm(x))  # (B, T, D)
        return x


# ---- The model -----------------------------------------------------------------------------------

class OLMo(nn.Module):
    """OLMo 1.0: no biases, no learned norm, no dropout, no table of positions (paper 2.1).

    Weights keep the dtype they are given (float32 in training). `compute_dtype`, when set, is the
    dtype of the residual stream; each weight is cast to it at its use, as in OLMo's FSDP runs.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = None  # bfloat16 where the hardware multiplies it faster
        # nn.Embedding(V, D) would draw numbers; on the meta device that imports the compiler: 1.2 s
        rows = torch.zeros(config.embedding_size, config.d_model)
        self.wte = nn.Embedding.from_pretrained(rows, freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        # OLMo-1B reads its logits off the embedding; OLMo-7B has a matrix of its own for them.
        if not config.weight_tying:
            self.lm_head = Linear(config.d_model, config.embedding_size)
        self.head_product = linear  # support/generation.py may put a faster one here
        self.token_losses = token_losses  # an attribute, so that a compiled one can replace it

    def forward(self, tokens, targets=None, attn_mask=None, cache=None, positions=None,
                positions_wanted=None):
        """Logits (B, T, V) of int64 `tokens` (B, T), or the losses (B, T) of `targets` (B, T).

        attn_mask: bool, broadcastable to (B, H, T, S), True where a query may look; None is causal.
        cache: one KVCache a layer; `tokens` then follow those that it holds.
        positions: int64 (B, T), the position of each token; None counts them one after another.
        positions_wanted: int64 (N, 2), row and column of the tokens whose logits (N, V) to return.
        Raises ValueError for more tokens than the context holds, unless a mask may hide some.
        """
        config = self.config
        T = tokens.shape[1]
        start = cache[0].length if cache else 0
        end = start + T
        if end > config.max_seq_len and attn_mask is None:
            raise ValueError(f"{end} tokens exceed max_seq_len={config.max_seq_len}")
        if start and T > 1 and attn_mask is None:
            # subtle: SDPA's is_causal would align the first query with the first key
            attn_mask = causal_mask(start, T, tokens.device)
        if positions is None:
            positions = torch.arange(start, end, device=tokens.device)
        cos, sin = rope_table(positions, config.head_dim, config.rope_theta)  # (T, K/2) each
        if positions.dim() == 2:  # each row has its own, the same for all heads
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, K/2)

        # The embedding is not scaled and gets no position vector: RoPE carries the positions.
        x = self.wte(tokens).to(self.stream_dtype)  # (B, T, D)
        caches = cache or [None] * len(self.blocks)
        for block, layer_cache in zip(self.blocks, caches, strict=True):
            # The last MLP and the head, the largest matrix, spare tokens that nobody asks about.
            wanted = positions_wanted if block is self.blocks[-1] else None
            x = block(x, cos, sin, attn_mask, layer_cache, wanted)
        if targets is None:
            return self.logits(x)
        return self.token_losses(x, self.head_weight(), targets)

    @property
    def stream_dtype(self):
        return self.compute_dtype or self.wte.weight.dtype

    def head_weight(self):
        """The output matrix (V, D)."""
        return self.wte.weight if self.config.weight_tying else self.lm_head.weight

    def logits(self, x):
        """The scores (..., V) of all ids after a residual stream x (..., D)."""
        return head_logits(x, self.head_weight(), self.head_product)


def causal_mask(start, length, device):
    """(T, S) bool: the query at position start + t sees the keys up to itself."""
    keys = torch.arange(start + length, device=device)
    queries = keys[start:, None]
    return keys <= queries


def head_logits(x, head_weight, product=linear):
    # Nothing norms the stream on its way up (pre-norm), so one norm comes before the head.
    return product(layer_norm(x), head_weight)


def token_losses(x, head_weight, targets):
    """-ln p (B, T) in at least float32 of int64 `targets` (B, T) after a stream x (B, T, D).

    The softmax runs over all V rows; those from vocab_size on, never targets, become unlikely.
    """
    # A softmax sums V exponentials: in bfloat16 most of them would round away (paper 3.1).
    logits = at_least_float32(head_logits(x, head_weight)).flatten(0, 1)  # (B T, V)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return losses.view_as(targets)


# ---- Initialisation ------------------------------------------------------------------------------

# subtle: the head keeps the random stream of its former name: old seeds give the same weights
STREAM_NAMES = {"lm_head.weight": "ff_out.weight"}


@torch.no_grad()
def init_weights(model, seed, local_part=lambda full, parameter: full):
    """Give every parameter its initial value, the same on any device and any number of ranks.

    local_part(full, parameter): the part of the tensor `full` that this process keeps in
    `parameter`. Full tensors are drawn one at a time, so a large model never lies in one process.

    # DIFFERS FROM OLMo: official OLMo draws from one running stream, so that its start depends on
    # the number of ranks. Here each full tensor has a stream of its own, seeded by (seed, name).
    """
    for name, parameter in model.named_parameters():
        full = initial_tensor(name, parameter.shape, seed)
        parameter.copy_(local_part(full, parameter))


def initial_tensor(name, shape, seed):
    """The float32 start of one parameter (OLMo's init_fn "mitchell")."""
    # OLMo has matrices only. A fork's bias or gain of one dimension starts without an effect.
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = initial_std(name, shape)
    stream_name = STREAM_NAMES.get(name, name)
    digest = hashlib.sha256(f"{seed}:{stream_name}".encode()).digest()
    stream_seed = int.from_bytes(digest[:8], "little") >> 1  # 63 bits: a signed integer
    stream = torch.Generator().manual_seed(stream_seed)
    # Cut at 3 std, as in official OLMo: no weight begins as a far outlier.
    limit = 3 * std
    tensor = torch.empty(shape)
    return nn.init.trunc_normal_(tensor, std=std, a=-limit, b=limit, generator=stream)


def initial_std(name, shape):
    """Standard deviation of a matrix (d_out, d_in): 1/sqrt(d_in), or less in block l, see below.

    The embedding (V, D) sums nothing and gets 1/sqrt(D) too, as in OLMo.
    """
    # A sum of d_in products with this std has the variance of one input: signals keep their size.
    std = 1 / math.sqrt(shape[1])
    parts = name.split(".")  # such as blocks, 3, mlp, ff_out, weight
    if parts[0] == "blocks" and parts[-2] in ("attn_out", "ff_out"):
        # These two add to the stream: 2 (l + 1) sums by the end of block l, which counts from 0.
        # Variances divided by this count add up only to the logarithm of the depth.
        block = int(parts[1])
        std /= math.sqrt(2 * (block + 1))  # the variance is the square
    return std


def build_model(config, seed, device="cpu"):
    """A freshly initialised OLMo on `device`."""
    with torch.device("meta"):  # shapes without memory: nothing is allocated twice
        model = OLMo(config).to_empty(device=device)
    init_weights(model, seed)
    return model


def count_parameters(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in OLMo(config).parameters())


# ---- Losses --------------------------------------------------------------------------------------

def next_token_loss(token_losses, loss_mask):
    """(sum of the losses, their count) over the targets that bool `loss_mask` (B, T) keeps.

    A sum and not a mean: the step divides by the count of its complete batch, so that each token
    weighs the same however the batch is cut.
    """
    kept = at_least_float32(token_losses) * loss_mask
    return kept.sum(), loss_mask.sum()


def sequence_log_probs(token_losses, loss_mask):
    """(log-probability (B,) in nats of each row's kept targets, their counts (B,)).

    The log-probability of a text is the sum over its tokens: DPO compares two answers by it.
    """
    kept = at_least_float32(token_losses) * loss_mask
    return -kept.sum(-1), loss_mask.sum(-1)


# ---- Generation ----------------------------------------------------------------------------------

class KVCache:
    """The keys and values that one layer has seen: two buffers (B, H, capacity, K) and a length.

    A new token looks at old keys and values, which never change: each is computed once. A full
    buffer grows by half.
    """

    def __init__(self, config, batch_size, capacity, device=None, dtype=None):
        shape = (batch_size, config.n_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, k, v):
        """Store k and v (B, H, T, K); returns all keys and values so far, (B, H, S, K) each."""
        start, T = self.length, k.shape[2]
        self.length += T
        missing = self.length - self.keys.shape[2]
        if missing > 0:
            room = (0, 0, 0, max(missing, start // 2))  # at the end of the dimension `capacity`
            self.keys = F.pad(self.keys, room)
            self.values = F.pad(self.values, room)
        self.keys.narrow(2, start, T).copy_(k)
        self.values.narrow(2, start, T).copy_(v)
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)


def generate(model, prompts, *arguments, **keywords):
    """The new ids of each list of ids in `prompts`; the arguments are generate_stream's."""
    new = [[] for _ in prompts]
    for chosen in generate_stream(model, prompts, *arguments, **keywords):
        for row, token in chosen.items():
            new[row].append(token)
    return new


@torch.no_grad()
def generate_stream(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, stop_ids=(),
                    seed=0, numbers=None, sync=lambda ids: ids):
    """Continue each list of ids in `prompts`; yields {row: its next id} of the rows that go on.

    temperature: 0 takes the likeliest id; else ids are drawn from softmax(logits / temperature).
    top_p: draw from the smallest set of ids whose probabilities reach this sum.
    stop_ids: a row ends after one of them (which is yielded), or where its context is full.
    seed: prompt i draws from a stream of its own, (seed, numbers[i]), by default (seed, i).
    sync(ids): makes all ranks take rank 0's ids; one process has nothing to do.
    The weights must not change until the stream ends or is closed.
    Raises UserError for a prompt that fills the context, and for logits that are not finite.
    """
    config = model.config
    device = model.wte.weight.device
    check_sampling(config, prompts, temperature, top_p)
    B = len(prompts)
    T = max(map(len, prompts))
    streams = [stream_of(seed, number) for number in numbers or range(B)]
    # The shortest prompt has the most room: it may grow until it has max_seq_len ids.
    end = T + min(max_new_tokens, config.max_seq_len - min(map(len, prompts)))
    tokens, visible = pad_left(prompts, end, config.pad_token_id, device)
    attn_mask = None if visible is None else padded_mask(visible[:, :T])
    cache = [KVCache(config, B, T + 32, device, model.stream_dtype) for _ in model.blocks]
    wanted = torch.tensor([[row, -1] for row in range(B)], device=device)  # -1: the last column
    running = range(B)
    for length in range(T, end):  # `length` columns are known; the next one is to be chosen
        # The first pass reads the prompts, each later one the newest id of each row.
        logits = model(tokens, attn_mask=attn_mask, cache=cache, positions_wanted=wanted)
        # The padding rows of the embedding are no ids: they are never chosen.
        logits = logits.view(B, -1)[:, :config.vocab_size].float()
        check_logits(logits, length - T)  # a NaN would be the likeliest
        chosen = sync(choose_next(logits, temperature, top_p, streams))
        yield {row: chosen[row] for row in running}
        # A finished row is still computed; its new ids are ignored.
        running = [row for row in running if chosen[row] not in stop_ids
                   and len(prompts[row]) + length - T + 1 < config.max_seq_len]
        if not running:
            break
        tokens = torch.tensor(chosen, device=device)[:, None]  # (B, 1)
        wanted = None
        attn_mask = None if visible is None else visible[:, None, None, :length + 1]


def check_sampling(config, prompts, temperature, top_p):
    if not prompts or not all(prompts):
        raise ValueError("generate needs prompts of at least one id each, such as eos_token_id")
    longest = max(map(len, prompts))
    if longest >= config.max_seq_len:
        raise UserError(f"prompt: {longest} ids leave no room in max_seq_len={config.max_seq_len}")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be at least 0, top_p={top_p} in (0, 1]")


def pad_left(prompts, capacity, pad_token_id, device):
    """(ids (B, T), bool (B, capacity) where a token is no padding), None if nothing is padded.

    Padding is on the left, so that the last column is every row's newest token. RoPE sees
    distances alone: rows that begin late compute what they would compute without padding.
    """
    T = max(map(len, prompts))
    tokens = torch.full((len(prompts), T), pad_token_id)
    visible = torch.ones(len(prompts), capacity, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        begin = T - len(prompt)
        tokens[row, begin:] = torch.tensor(prompt)
        visible[row, :begin] = False
    if visible.all():
        return tokens.to(device), None  # a plain causal mask will do, which is faster
    return tokens.to(device), visible.to(device)


def padded_mask(visible):
    """(B, 1, T, T) causal mask that hides the padding: `visible` (B, T) is False there."""
    T = visible.shape[1]
    # subtle: a query of the padding would see nothing, and its softmax be 0 / 0: it sees itself
    itself = torch.eye(T, dtype=torch.bool, device=visible.device)
    return (causal_mask(0, T, visible.device) & visible[:, None, None, :]) | itself


def choose_next(logits, temperature, top_p, streams):
    """One id a row of float32 `logits` (B, V); row i draws from the generator streams[i]."""
    if temperature == 0:
        return logits.max(-1).indices.tolist()  # argmax, in a third of its time on a CPU
    # Shifted first, as a large logit over a small temperature overflows.
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        # An id belongs to the nucleus if the likelier ones together stay below top_p.
        probs = probs.masked_fill(probs < least_of_nucleus(probs, top_p), 0)
    # A race: id i arrives after a random time, waits[i] / probs[i]. The first wins: each id does so
    # with its probability. The usual way looks up a random number among the running sums of
    # probs. The rounding of a logit moves all these sums; in a race it matters only for near ties.
    # numpy draws the waits, so that a seed means the same on every device.
    waits = np.stack([stream.standard_exponential(logits.shape[-1]) for stream in streams])
    waits = torch.from_numpy(waits).to(probs)  # its dtype and device
    return (probs / waits).max(-1).indices.tolist()  # the smallest waits / probs


def stream_of(seed, number):
    """The random stream of prompt `number`; by a hash, so that no two (seed, number) share one."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


# ---- The command ---------------------------------------------------------------------------------

def main(argv):
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    if argv[:1] != ["export"] or len(argv) != 3:
        raise UserError(f"{' '.join(argv) or 'no command'}: the form is export RUN OUT")
    from support.weights import export  # only here: nothing above needs a file format
    export(*argv[1:])


if __name__ == "__main__":
    run_main(main)
