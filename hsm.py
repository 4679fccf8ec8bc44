"""Hierarchical Shift Mixing (HSM): a GPT in which no layer looks at all earlier tokens.

Softmax attention compares each token with every earlier one, in every layer: T * T pairs a layer.
HSM spreads those pairs over the depth. Layer j combines each token with ONE earlier token, the one
s = 2^j places back. The equation, all that is new here:

    z[t] = x[t - s]          the DELAY: the only code that touches time; 0 before the start
    y[t] = f(x[t], z[t])     the PAIR function: any f; the simplest, (a,b), is  a x[t] + b z[t]

Around it stands the usual block:  x = x + W y(norm x);  x = x + MLP(norm x).  It costs T pairs.

Why the whole past is still reached: L layers with shifts 1, 2, 4 .. each stay or shift, so they add
up to any distance k < 2^L, in exactly one way: the binary digits of k. For k = 13 = 1101b, upward:

    position   t-13 t-12            t-8                                     t
                                                                            o   arrived
    layer 3, s = 8      bit 1       +---------------------------------------+   shifts
    layer 2, s = 4      bit 1  +----+                                           shifts
    layer 1, s = 2      bit 0  |                                                stays
    layer 0, s = 1      bit 1 ++                                                shifts
    input                     o   x[t-13]

(That path is unique among the mixers' paths. The residual stream and the MLPs carry data too, but
never sideways in time: k is reached through the mixers or not at all.)

Glossary:  B batch size.   T tokens in a sequence, or in a chunk of a stream.   C width (n_embd).
           H heads (n_head): equal slices of the C channels; each may have a shift of its own.
           s shift, in tokens.   V vocabulary size.   x a token's vector; z what the delay brought.

Order of this file, which needs no scrolling back: the delay, twice (in parallel for training, as a
ring buffer for streams); the pair functions; the configuration; the mixers; the block; the model;
receptive field and layer table; checkpoints.

Not in this file: data and tokenizers (prepare_data.py), the training loop (train.py), fused kernels
(fast.py), CUDA graphs (decode.py), more than one GPU, weights of others. This is our reading of
arXiv:2601.22852 (R. Forchheimer, 2026); the README lists what we chose where we could not know.
"""

import math
import os
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------
# The delay: z[t] = x[t - s]


def delay(x, shift):
    """Move a sequence `shift` tokens later, in parallel: y[:, t] = x[:, t - shift], else 0.

    x: (B, T, C).  shift: an int >= 0, also beyond T (then all is 0).  Returns (B, T, C).
    """
    shift = min(shift, x.size(1))
    return F.pad(x, (0, 0, shift, 0))[:, : x.size(1)]


class DelayLine:
    """The same delay for a stream, where the past is gone: it keeps the last `shift` inputs.

    Called on chunks of any length, (B, T, C) -> (B, T, C), it returns what `delay` would return on
    all chunks joined. Input number i lives in slot i mod shift of a ring, so it is found there, and
    overwritten, by input i + shift: work and memory for a token do not depend on how many came
    before. The ring is made at the first chunk, with its batch size, width, type and device.
    """

    def __init__(self, shift):
        self.shift, self.n_seen, self.ring = shift, 0, None

    def __call__(self, x):
        B, T, C = x.shape
        if self.ring is None:
            self.ring = x.new_zeros(B, self.shift, C)
        n = min(T, self.shift)  # so many outputs come from the ring, the rest from this chunk
        oldest, latest = self.slots(self.n_seen, n), self.slots(self.n_seen + T - n, n)
        z = torch.cat([self.ring[:, oldest], x[:, : T - n]], dim=1)  # (B, T, C)
        self.ring[:, latest] = x[:, T - n :].detach()
        self.n_seen += T
        return z

    def slots(self, first, n):
        """Where n inputs from number `first` on lie. Side by side (a single one is): a slice."""
        first %= self.shift
        if first + n <= self.shift:
            return slice(first, first + n)
        return torch.arange(first, first + n, device=self.ring.device) % self.shift


# ------------------------------------------------------------------------------------------------
# The pair functions: y = f(x, z). They know nothing of time; all of x, z, y are (B, T, C).
# Yours is a class like these and a line in PAIRS: trainer, sampler and tests then take it by name.


def start(weight, width, scale=1.0):
    """Fill with normal numbers: std 0.02 at GPT-2's width of 768; sums over fewer stay as large."""
    nn.init.normal_(weight, std=scale * 0.02 * math.sqrt(768 / width))


def linear(n_in, n_out, bias=False, scale=1.0):
    """A linear map whose weights start as above, its bias at 0."""
    layer = nn.Linear(n_in, n_out, bias=bias)
    start(layer.weight, n_in, scale)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class AB(nn.Module):
    """y = a x + b z with one pair of numbers a head: a two-tap dilated convolution."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.head_size = n_embd // n_head
        self.a = nn.Parameter(torch.full((n_head,), 0.5))
        self.b = nn.Parameter(torch.full((n_head,), 0.5))

    def forward(self, x, z):
        a, b = (w.repeat_interleave(self.head_size) for w in (self.a, self.b))  # (H,) -> (C,)
        return a * x + b * z


class Vec(nn.Module):
    """y = a x + b z with one pair of numbers a channel."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.a = nn.Parameter(torch.full((n_embd,), 0.5))
        self.b = nn.Parameter(torch.full((n_embd,), 0.5))

    def forward(self, x, z):
        return self.a * x + self.b * z


class Matrix(nn.Module):
    """y = A x + B z: channels mix as time does."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.A = linear(n_embd, n_embd)
        self.B = linear(n_embd, n_embd)

    def forward(self, x, z):
        return self.A(x) + self.B(z)


class Gate1(nn.Module):
    """y = g x + (1 - g) z, g = sigmoid(W x): the token decides how much of the past it lets in."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.W = linear(n_embd, n_embd, bias=True)

    def forward(self, x, z):
        g = torch.sigmoid(self.W(x))
        return g * x + (1 - g) * z


class Gate2(nn.Module):
    """y = g x + (1 - g) z, g = sigmoid(W x + U z): both tokens decide."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.W = linear(n_embd, n_embd, bias=True)
        self.U = linear(n_embd, n_embd)

    def forward(self, x, z):
        g = torch.sigmoid(self.W(x) + self.U(z))
        return g * x + (1 - g) * z


class Fusion(nn.Module):
    """y = V gelu(A x + B z): a small MLP on the pair, C units wide."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.A = linear(n_embd, n_embd, bias=True)
        self.B = linear(n_embd, n_embd)
        self.V = linear(n_embd, n_embd)

    def forward(self, x, z):
        return self.V(F.gelu(self.A(x) + self.B(z)))


class Mult(nn.Module):
    """y = (A x) * (B z) + a x + b z: a product can compare two tokens, a sum cannot."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.A = linear(n_embd, n_embd)
        self.B = linear(n_embd, n_embd)
        self.vec = Vec(n_embd, n_head)

    def forward(self, x, z):
        return self.A(x) * self.B(z) + self.vec(x, z)


PAIRS = {
    "ab": AB,
    "vec": Vec,
    "matrix": Matrix,
    "gate1": Gate1,
    "gate2": Gate2,
    "fusion": Fusion,
    "mult": Mult,
}

# ------------------------------------------------------------------------------------------------
# The configuration


class BadInput(ValueError):
    """What the person at the keyboard can put right. The command lines print it and exit with 2."""


LARGEST = dict.fromkeys(("vocab_size", "block_size", "n_embd", "d_ff"), 2**24)
LARGEST |= {"n_layer": 1000, "n_head": 1000}


@dataclass
class GPTConfig:
    """The shape of a model. Raises BadInput (a ValueError) where the fields contradict."""

    vocab_size: int = 256  # number of different tokens; train.py: 0 takes the tokenizer's
    block_size: int = 128  # tokens in a training sequence, and a softmax layer's window
    n_layer: int = 7  # blocks
    n_head: int = 4  # heads: slices of the channels with their own shift or attention
    n_embd: int = 64  # width C
    mixers: str = "ab"  # names, tiled over the layers and cut at the last: "ab", "ab,ab,softmax"
    # "layer" (2^j in the j-th HSM layer), "heads" (2^(j+h) in head h), or a list, "1,2,4,8", tiled
    # over the HSM layers; "1+2+4+8" names the heads' of a layer
    shifts: str = "heads"
    proj: bool = True  # linear map after the pair function
    in_proj: bool = False  # linear map before the delay
    d_ff: int = 0  # feed-forward width; 0: as many parameters as a softmax layer with 4 n_embd
    pos_emb: str = "rope"  # "learned" | "rope" (in softmax layers only; HSM needs none) | "none"
    dropout: float = 0.0  # share of values dropped in training
    bias: bool = False  # constants in linear maps and norms

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "d_ff"):
            value, least = getattr(self, name), int(name not in ("vocab_size", "d_ff"))
            if not isinstance(value, int) or value < least:
                raise BadInput(f"{name} must be at least {least}, not {value!r}")
            if value > LARGEST[name]:  # a stranger's checkpoint may say anything
                raise BadInput(f"{name}={value} is beyond {LARGEST[name]}, the most we build")
        if self.n_embd % self.n_head:
            raise BadInput(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.pos_emb not in ("learned", "rope", "none"):
            raise BadInput(f"unknown pos_emb {self.pos_emb!r}; choose learned, rope or none")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout must be in [0, 1), not {self.dropout}")
        has_softmax = any(name == "softmax" for name, _ in self.layers)
        if has_softmax and self.pos_emb == "rope" and self.n_embd // self.n_head % 2:
            raise BadInput("rotary positions need an even head width n_embd / n_head")

    @property
    def layers(self):
        """What both strings mean: a list of (mixer name, shifts), a layer each.

        The shifts are one number for all channels, or one a head; () for softmax, which uses none.
        """
        names = [name.strip() for name in self.mixers.split(",")]
        for name in names:
            if name not in (*PAIRS, "softmax"):
                valid = ", ".join((*PAIRS, "softmax"))
                raise BadInput(f"unknown mixer {name!r} in {self.mixers!r}; choose from {valid}")
        layers, j = [], 0  # j counts the HSM layers
        for i in range(self.n_layer):
            name = names[i % len(names)]
            layers.append((name, () if name == "softmax" else self._shifts(j)))
            j += name != "softmax"
        return layers

    def _shifts(self, j):
        K = max(1, (self.block_size - 1).bit_length())  # ceil(log2(block_size)) rungs of the ladder
        if self.shifts == "layer":
            return (2 ** (j % K),)
        if self.shifts == "heads":
            return tuple(2 ** ((j + h) % K) for h in range(self.n_head))
        try:
            ladder = [tuple(map(int, rung.split("+"))) for rung in self.shifts.split(",")]
        except ValueError:
            ladder = [()]
        longest = LARGEST["block_size"]
        for rung in ladder:
            if len(rung) not in (1, self.n_head) or not 1 <= min(rung) <= max(rung) <= longest:
                raise BadInput(
                    "shifts must be layer, heads, or numbers from 1: a layer each like 1,2,4,8, or "
                    f"a head each ({self.n_head} of them), joined by +; not {self.shifts!r}"
                )
        return ladder[j % len(ladder)]


# ------------------------------------------------------------------------------------------------
# The mixers. Their contract, in place of a base class:
#   forward(x, cache=None) -> y    both (B, T, C). Without a cache x is a whole sequence (training);
#                                  with one it is the next chunk of a stream, of any length.
#   init_cache(max_len) -> cache   what a stream must remember, updated in place by forward.
#   offsets                        the distances that it reaches in one layer, 0 among them.
#   state_size(length)             numbers a sequence in the cache after `length` tokens.


def residual_scale(config):
    """How small a map that writes to the residual stream starts: 2 n_layer add up (GPT-2)."""
    return 1 / math.sqrt(2 * config.n_layer)


class ShiftMixer(nn.Module):
    """HSM's mixer: DELAY, then PAIR, between two optional linear maps.

    pair: a name in PAIRS.  shifts: a tuple, one shift for all channels or one a head.
    """

    def __init__(self, config, pair, shifts):
        super().__init__()
        C, bias = config.n_embd, config.bias
        self.shifts, self.n_embd = shifts, C
        self.offsets = sorted({0, *shifts})
        # With in_proj each head chooses what it sends through time, as attention's values do.
        self.in_proj = linear(C, C, bias) if config.in_proj else nn.Identity()
        self.pair = PAIRS[pair](C, config.n_head)
        self.proj = linear(C, C, bias, residual_scale(config)) if config.proj else nn.Identity()
        if not config.proj:  # then the pair itself writes to the residual stream, and starts small
            with torch.no_grad():
                for weight in self.pair.parameters():
                    weight.mul_(residual_scale(config))
        self.fused = None  # delay and pair in one kernel, where fast.py has put it

    def forward(self, x, cache=None):
        x = self.in_proj(x)
        if self.fused is not None and cache is None:
            return self.proj(self.fused(self.pair, x))
        delays = cache or [partial(delay, shift=s) for s in self.shifts]
        heads = x.chunk(len(delays), dim=-1)  # each (B, T, C / len(delays))
        z = torch.cat([d(head) for d, head in zip(delays, heads, strict=True)], dim=-1)  # (B, T, C)
        return self.proj(self.pair(x, z))

    def init_cache(self, max_len):
        return [DelayLine(s) for s in self.shifts]

    def state_size(self, length):
        return sum(self.shifts) * self.n_embd // len(self.shifts)


def rotate(x, start):
    """Rotary positions (arXiv:2104.09864): turn x (B, H, T, D), its first token number `start`.

    Channels i and i + D/2 turn together, by an angle that grows with position: a dot product of two
    turned vectors depends on their distance alone. Angles are float64 where the device has it,
    because a float32 position of a million is good to 0.06 only. start: an int, or a () int64
    tensor on the device.
    """
    T, D = x.shape[-2:]
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    t = start + torch.arange(T, device=x.device, dtype=exact)
    speed = 10000.0 ** -(torch.arange(0, D, 2, device=x.device, dtype=exact) / D)
    angle = torch.outer(t, speed)  # (T, D/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class KVCache:
    """Keys and values of the tokens that a softmax layer can still see, the last `window`.

    Called on a chunk's k and v, (B, H, T, D), it returns both with their past, (B, H, S, D).
    Memory for `capacity` tokens is taken once; when it is full, what is still in sight moves to its
    front. With capacity = 2 window that costs one copied token a token.
    """

    mask = None  # a single token sees all that it gives (of decode.py's ring, what is filled)

    def __init__(self, window, capacity):
        self.window, self.capacity = window, capacity
        self.n_seen, self.end, self.kv = 0, 0, None

    def __call__(self, k, v):
        B, H, T, D = k.shape
        past = min(self.end, self.window - 1)  # tokens before this chunk that its first token sees
        if self.kv is None or self.end + T > self.kv.size(3):
            room = k.new_empty(2, B, H, max(self.capacity, past + T), D)
            if past:
                room[:, :, :, :past] = self.kv[:, :, :, self.end - past : self.end]
            self.kv, self.end = room, past
        self.kv[0, :, :, self.end : self.end + T] = k.detach()
        self.kv[1, :, :, self.end : self.end + T] = v.detach()
        self.n_seen += T
        self.end += T
        return self.kv[:, :, :, self.end - past - T : self.end].unbind()


class SoftmaxMixer(nn.Module):
    """Causal softmax attention (arXiv:1706.03762), the baseline and the other half of hybrids.

    A token sees itself and the block_size - 1 tokens before it, however long the stream is.
    """

    def __init__(self, config):
        super().__init__()
        C, bias = config.n_embd, config.bias
        self.n_head, self.n_embd, self.window = config.n_head, C, config.block_size
        self.offsets = range(config.block_size)
        self.rope, self.dropout = config.pos_emb == "rope", config.dropout
        self.qkv = linear(C, 3 * C, bias)
        self.proj = linear(C, C, bias, residual_scale(config))

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if self.rope:
            start = 0 if cache is None else cache.n_seen
            q, k = rotate(q, start), rotate(k, start)
        mask = None
        if cache is not None:
            k, v = cache(k, v)  # (B, H, S, D)
            mask = cache.mask
        S = k.size(2)
        causal = S == T <= self.window  # the mask that fast kernels know; else we draw it
        if T > 1 and not causal:  # query t is key number S - T + t
            t = torch.arange(S, device=x.device)
            distance = t[S - T :, None] - t  # (T, S)
            mask = (distance >= 0) & (distance < self.window)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))

    def init_cache(self, max_len):
        return KVCache(self.window, min(max_len or math.inf, 2 * self.window))

    def state_size(self, length):
        return 2 * self.n_embd * min(length, self.window)


# ------------------------------------------------------------------------------------------------
# The block: mix over time, then think about each token


def n_params(module):
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def feed_forward_width(config, mixer):
    """The width at which mixer and feed-forward have a softmax layer's parameters (d_ff = 0)."""
    if config.d_ff:
        return config.d_ff
    C, bias = config.n_embd, int(config.bias)
    saved = 4 * C * C + 4 * C * bias - n_params(mixer)  # what the mixer has less than softmax
    width = 4 * C + round(saved / (2 * C + bias))  # a unit of width: C weights in, C out
    if width < 1:
        raise BadInput(
            f"the mixer alone has {n_params(mixer):,} parameters, over a softmax layer's"
        )
    return width


class MLP(nn.Module):
    """The feed-forward network, for each token by itself."""

    def __init__(self, config, width):
        super().__init__()
        self.up = linear(config.n_embd, width, config.bias)
        self.down = linear(width, config.n_embd, config.bias, residual_scale(config))

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """x = x + mixer(norm x);  x = x + MLP(norm x).  (B, T, C) -> (B, T, C)."""

    def __init__(self, config, mixer, shifts):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        if mixer == "softmax":
            self.mixer = SoftmaxMixer(config)
        else:
            self.mixer = ShiftMixer(config, mixer, shifts)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config, feed_forward_width(config, self.mixer))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        x = x + self.dropout(self.mixer(self.norm1(x), cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


# ------------------------------------------------------------------------------------------------
# The model


@dataclass
class Cache:
    """What a stream remembers: an entry a layer, and how many tokens have passed."""

    batch_size: int
    layers: list
    n_seen: int = 0


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token a row: logits (B, V) -> (B,) int64. temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        worst_kept = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < worst_kept, -math.inf)
    if top_p is not None:  # keep the likeliest tokens until their sum reaches top_p
        probs, order = logits.softmax(dim=-1).sort(descending=True)
        surplus = probs.cumsum(dim=-1) - probs >= top_p  # (B, V); never the first
        logits = logits.masked_fill(surplus.scatter(-1, order, surplus), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


class GPT(nn.Module):
    """The language model: embed, mix and think n_layer times, predict the next token.

    One call for all uses: training (targets), a whole sequence, or the next chunk of a stream
    (cache). Input and output embeddings are one matrix, as in GPT-2.
    """

    def __init__(self, config):
        super().__init__()
        if config.vocab_size < 1:
            raise BadInput("vocab_size must be at least 1 to build a model")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        start(self.wte.weight, config.n_embd)
        self.wpe = None
        if config.pos_emb == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
            start(self.wpe.weight, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, *layer) for layer in config.layers)
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, idx, targets=None, cache=None, last_only=False):
        """idx, targets: (B, T) int64. Returns logits (B, T, V), or (B, 1, V), and the loss or None.

        The loss is the mean over tokens in nats; targets of -1 do not count. With a cache, idx is
        the stream's next chunk, and the cache is updated in place.
        """
        B, T = idx.shape
        start = 0 if cache is None else cache.n_seen
        if T < 1 or (targets is not None and (last_only or targets.shape != idx.shape)):
            raise BadInput("idx needs a token, targets its shape, and last_only no targets")
        if cache is not None and cache.batch_size != B:
            raise BadInput(f"the cache holds {cache.batch_size} sequences, idx has {B}")
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            if start + T > self.config.block_size:
                raise BadInput(
                    f"learned positions end at block_size={self.config.block_size}, but this needs "
                    f"{start + T}; shorten the input, or train with --pos-emb rope or none"
                )
            x = x + self.wpe(torch.arange(start, start + T, device=idx.device))
        x = self.dropout(x)
        states = [None] * len(self.blocks) if cache is None else cache.layers
        for block, state in zip(self.blocks, states, strict=True):
            x = block(x, state)
        if cache is not None:
            cache.n_seen += T
        x = self.norm(x[:, -1:] if last_only else x)
        logits = F.linear(x, self.wte.weight)  # (B, T, V)
        loss = None
        if targets is not None:
            flat = logits.flatten(0, 1).float()  # (B * T, V)
            loss = F.cross_entropy(flat, targets.flatten(), ignore_index=-1)
        return logits, loss

    def init_cache(self, batch_size, max_len=None):
        """An empty memory for a stream of batch_size sequences.

        max_len: tokens you expect, so that softmax layers take no memory for more. No limit.
        """
        return Cache(batch_size, [block.mixer.init_cache(max_len) for block in self.blocks])

    def generate(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        generator=None,
        use_cache=True,
    ):
        """Continue idx (B, T): an iterator over max_new_tokens tensors (B,) int64.

        Dropout is off meanwhile. The stream may be of any length: HSM layers go on, softmax layers
        see the last block_size tokens. Learned positions end at block_size; there the model
        starts again from the last block_size / 2 tokens. use_cache=False computes everything anew
        for each token: the same tokens, slowly. On CUDA a token is one graph (decode.py), where
        positions are not learned. Raises BadInput for values out of range.
        """
        if max_new_tokens < 0:
            raise BadInput(f"the number of tokens must not be negative, but is {max_new_tokens}")
        if not 0 <= temperature < math.inf:
            raise BadInput(f"temperature must be 0 (greedy) or more, not {temperature}")
        if top_k is not None and top_k < 1:
            raise BadInput(f"top_k must be at least 1, not {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise BadInput(f"top_p must be over 0 and at most 1, not {top_p}")
        if idx.size(1) < 1:
            raise BadInput("generate needs at least one token to start from")
        choose = partial(
            sample_token, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        return self._generate(idx, max_new_tokens, choose, use_cache)

    @torch.no_grad()
    def _generate(self, idx, max_new_tokens, choose, use_cache):
        limit = self.config.block_size if self.wpe is not None else math.inf
        context = chunk = idx if idx.size(1) <= limit else idx[:, -limit:]  # what positions count
        cache = self.init_cache(idx.size(0)) if use_cache else None
        graphs = use_cache and limit == math.inf and idx.is_cuda
        graphs = graphs and not torch.is_autocast_enabled("cuda")  # its copies die with it
        decoder = None
        was_training = self.training
        self.eval()
        try:
            for i in range(max_new_tokens):
                if graphs and i == 1:  # the prompt is read; from now on a token is one CUDA graph
                    from decode import Decoder  # here, because it imports this file

                    decoder = Decoder(self, cache, idx.size(1) + max_new_tokens)
                if decoder is None:
                    logits, _ = self(chunk if use_cache else context, cache=cache, last_only=True)
                else:
                    logits = decoder(chunk)
                token = choose(logits[:, -1])  # (B,)
                yield token
                chunk = token[:, None]
                if limit < math.inf or not use_cache:  # else nothing grows with the stream
                    context = torch.cat([context, chunk], dim=1)
                if context.size(1) > limit:
                    context = chunk = context[:, -max(1, limit // 2) :]
                    cache = self.init_cache(idx.size(0)) if use_cache else None
        finally:
            self.train(was_training)

    def num_params(self, non_embedding=True):
        """Number of parameters; by default without the tables for tokens and positions."""
        tables = [t for t in (self.wte, self.wpe) if t is not None]
        return n_params(self) - non_embedding * sum(map(n_params, tables))

    def state_bytes(self, batch_size, length):
        """Bytes that batch_size streams must keep to go on after `length` tokens."""
        size = sum(block.mixer.state_size(length) for block in self.blocks)
        return batch_size * size * self.wte.weight.element_size()


# ------------------------------------------------------------------------------------------------
# What a model can reach, and what its layers are


def receptive_field(config):
    """Count the mixers' paths: entry k is the number of ways from x[t - k] to the last y[t].

    On a path each layer stays, or goes one of its different shifts back (softmax: any distance
    below block_size). Written as a polynomial, a layer is 1 + X^s, and the layers multiply. With
    "layer" shifts over L powers of two that gives 2^L ones: each distance once, as its binary
    number. Exact: int64, or Python's integers where int64 would overflow.
    """
    steps = [
        range(config.block_size) if name == "softmax" else {0, *s} for name, s in config.layers
    ]
    fits = math.prod(len(step) for step in steps) < 2**63
    paths = np.ones(1, dtype=np.int64 if fits else object)
    for step in steps:
        longer = np.zeros(len(paths) + max(step), dtype=paths.dtype)
        for s in step:
            longer[s : s + len(paths)] += paths
        paths = longer
    return paths


def layer_table(model):
    """A text table of the layers: mixer, shifts, reach so far, d_ff, parameters, state."""
    config = model.config
    head = ("layer", "mixer", "shifts", "reach", "d_ff", "parameters", "state")
    rows, reach = [head], 0
    for j, ((name, shifts), block) in enumerate(zip(config.layers, model.blocks, strict=True)):
        reach += max(block.mixer.offsets)
        state = block.mixer.state_size(config.block_size)
        shifts = ",".join(map(str, shifts)) or "any"
        width = block.mlp.up.out_features
        rows.append((j, name, shifts, reach, width, f"{n_params(block):,}", f"{state:,}"))
    state = sum(block.mixer.state_size(config.block_size) for block in model.blocks)
    rows.append(("all", "", "", reach, "", f"{model.num_params():,}", f"{state:,}"))
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(head))]
    lines = ["  ".join(str(c).rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    embeddings = model.num_params(non_embedding=False) - model.num_params()
    lines.append(
        f"(reach in tokens; state in numbers a sequence; {embeddings:,} more in embeddings)"
    )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Checkpoints: tensors and plain types, so that loading one runs nobody's code


def first_line(error):
    """The first line of an error's text: ours are messages of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; it becomes `path` at the end, or is gone on error."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def save_checkpoint(path, **items):
    """Write items (tensors, state dicts, plain types) to path, whole or not at all.

    Raises BadInput if the system refuses (a full disk); an earlier file at path then stays whole.
    """
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save(items, file)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        reason = first_line(error.__context__ if isinstance(error, RuntimeError) else error)
        raise BadInput(f"cannot write {path} ({reason}); what was there before is whole") from error


def load_checkpoint(path, device="cpu"):
    """Read what save_checkpoint wrote, a dict, its tensors on `device`. BadInput if it can't be."""
    if not os.path.isfile(path):
        raise BadInput(f"there is no checkpoint {path}; train one first: python train.py")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
            if file.testzip() or any(i.compress_type for i in file.infolist()):
                raise ValueError("damaged, or packed into more than it looks")
        items = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # zip, pickle and torch each have errors of their own for torn files
        raise BadInput(f"{path} is no checkpoint of ours, or it is damaged or cut off") from error
    if not isinstance(items, dict) or not all(
        isinstance(items.get(name), dict) for name in ("model", "config")
    ):
        raise BadInput(f"{path} is no checkpoint of ours: it has no model and config")
    return items


def model_from(checkpoint, device="cpu"):
    """The GPT in a checkpoint, ready to run on `device`.

    Raises BadInput if weights and configuration do not fit each other; this is found out on the
    meta device, before memory is taken for what a stranger's file claims.
    """
    try:
        config, state = GPTConfig(**checkpoint["config"]), checkpoint["model"]
        with torch.device("meta"):
            claimed = {name: w.shape for name, w in GPT(config).state_dict().items()}
        if claimed != {name: w.shape for name, w in state.items() if w.isfinite().all()}:
            raise BadInput("its weights are not those of its configuration, or not finite")
        model = GPT(config)
        model.load_state_dict(state)
    except (TypeError, AttributeError, RuntimeError, BadInput) as error:
        reason = first_line(error)
        raise BadInput(f"the checkpoint does not fit this version of hsm.py: {reason}") from error
    return model.to(device)
