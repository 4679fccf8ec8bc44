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
           H heads (n_head): equal slices of the C channels, D = C / H wide.   V vocabulary size.
           s shift, in tokens.   x a token's vector.   z what the delay brought.

No scrolling back is needed: delay, pair functions, configuration, mixers, block, model. You may
stop there; what follows counts paths, and makes it faster on a GPU. This is our reading of
arXiv:2601.22852 (R. Forchheimer, 2026); the README lists what we chose where we could not know.
"""

import math
import os
from collections import ChainMap, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- The delay: z[t] = x[t - s] ------------------------------------------------------------------


def delay(x, shift):
    """Move a sequence `shift` tokens later: y[:, t] = x[:, t - shift], and 0 before the start.

    x: (B, T, C).  shift: an int >= 0, also beyond T (then all is 0).  Returns (B, T, C).
    """
    shift = min(shift, x.size(1))
    return F.pad(x, (0, 0, shift, 0))[:, : x.size(1)]


def delay_heads(x, shifts):
    """The same with a shift of its own for each of len(shifts) equal slices of the channels."""
    heads = x.chunk(len(shifts), dim=-1)
    return torch.cat([delay(head, s) for head, s in zip(heads, shifts, strict=True)], dim=-1)


class DelayRings:
    """The same for a stream, where the past is gone: each head keeps its last s inputs in a ring.

    Called on chunks of any length, (B, T, C) -> (B, T, C), it returns what `delay_heads` would on
    all chunks joined. Input p lies in slot p mod s; input p + s finds and overwrites it: work and
    memory for a token never grow. position: () int64, the next token's number, of all layers.
    """

    def __init__(self, shifts, position):
        self.shifts, self.position, self.rings = shifts, position, None
        self.sizes = torch.tensor(shifts, device=position.device)  # (H,)
        self.first = self.sizes.cumsum(0) - self.sizes  # where each ring begins, all in one tensor

    def __call__(self, x):
        (B, T, C), H = x.shape, len(self.shifts)
        if self.rings is None:
            self.rings = x.new_zeros(B, sum(self.shifts), C // H)
        if T == 1:
            slots = self.first + self.position % self.sizes  # (H,)
            z = self.rings.index_select(1, slots)  # (B, H, D)
            self.rings.index_copy_(1, slots, x.detach().view_as(z))
            return z.view(B, T, C)
        t = torch.arange(T, device=x.device)[:, None]
        slots, heads = self.first + (self.position + t) % self.sizes, x.detach().view(B, T, H, -1)
        z = self.rings[:, slots]  # (B, T, H, D), right for the first s tokens of the chunk
        z = torch.where((t < self.sizes)[..., None], z, delay_heads(x, self.shifts).view_as(z))
        last = t >= T - self.sizes  # (T, H): what the next chunk looks back at
        self.rings[:, slots[last]] = heads[:, last]
        return z.view(B, T, C)


# ---- The pair functions: y = f(x, z), all (B, T, C). They know nothing of time -------------------
# Yours is a class like these and a line in PAIRS: trainer, sampler and tests then take it by name.


def init(layer, scale=1.0):
    """Normal weights (n, n_in), std 0.02 at GPT-2's n_in of 768: sums over fewer stay as large."""
    nn.init.normal_(layer.weight, std=scale * 0.02 * math.sqrt(768 / layer.weight.size(1)))
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return layer


def linear(n_in, n_out, bias=False, scale=1.0):
    return init(nn.Linear(n_in, n_out, bias=bias), scale)


class AB(nn.Module):
    """y = a x + b z with one pair of numbers a head: a two-tap dilated convolution."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.head_size = n_embd // n_head
        self.a = nn.Parameter(torch.full((n_head,), 0.5))
        self.b = nn.Parameter(torch.full((n_head,), 0.5))

    def taps(self, x):  # where y = p x + q z: p and q, for the fast path below
        return (w.repeat_interleave(self.head_size) for w in (self.a, self.b))  # (H,) -> (C,)

    def forward(self, x, z):
        a, b = self.taps(x)
        return a * x + b * z


class Vec(AB):
    """y = a x + b z with one pair of numbers a channel: as many heads as channels."""

    def __init__(self, n_embd, n_head):
        super().__init__(n_embd, n_head=n_embd)


class Matrix(nn.Module):
    """y = A x + B z: channels mix as time does."""

    def __init__(self, n_embd, n_head, bias=False):
        super().__init__()
        self.A = linear(n_embd, n_embd, bias)
        self.B = linear(n_embd, n_embd)

    def forward(self, x, z):
        return self.A(x) + self.B(z)


class Gate1(nn.Module):
    """y = g x + (1 - g) z, g = sigmoid(W x): the token decides how much of the past it lets in."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.W = linear(n_embd, n_embd, bias=True)

    def taps(self, x):
        g = torch.sigmoid(self.W(x))
        return g, 1 - g

    def forward(self, x, z):
        p, q = self.taps(x)
        return p * x + q * z


class Gate2(nn.Module):
    """y = g x + (1 - g) z, g = sigmoid(A x + B z): both tokens decide."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.both = Matrix(n_embd, n_head, bias=True)

    def forward(self, x, z):
        g = torch.sigmoid(self.both(x, z))
        return g * x + (1 - g) * z


class Fusion(nn.Module):
    """y = V gelu(A x + B z): a small MLP on the pair, C units wide."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.both = Matrix(n_embd, n_head, bias=True)
        self.V = linear(n_embd, n_embd)

    def forward(self, x, z):
        return self.V(F.gelu(self.both(x, z)))


class Mult(nn.Module):
    """y = (A x) * (B z) + a x + b z: a product can compare two tokens, a sum cannot."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.A = linear(n_embd, n_embd)
        self.B = linear(n_embd, n_embd)
        self.vec = Vec(n_embd, n_head)

    def forward(self, x, z):
        return self.A(x) * self.B(z) + self.vec(x, z)


PAIRS = dict(ab=AB, vec=Vec, matrix=Matrix, gate1=Gate1, gate2=Gate2, fusion=Fusion, mult=Mult)

# ---- The configuration ---------------------------------------------------------------------------


class BadInput(ValueError):
    """What the person at the keyboard can put right. The command lines print it and exit with 2."""


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
    rope_base: float = 10_000.0  # rotary positions turn from 1 to 1/base radians a token
    dropout: float = 0.0  # share of values dropped in training
    bias: bool = False  # constants in linear maps and norms

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "d_ff"):
            value, least = getattr(self, name), int(name not in ("vocab_size", "d_ff"))
            if not isinstance(value, int) or not least <= value <= 2**24:
                raise BadInput(f"{name} must be at least {least} and at most 2^24, not {value!r}")
        if self.n_embd % self.n_head:
            raise BadInput(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.pos_emb not in ("learned", "rope", "none"):
            raise BadInput(f"unknown pos_emb {self.pos_emb!r}; choose learned, rope or none")
        if not 0 <= self.dropout < 1 or not 1 <= self.rope_base < math.inf:
            raise BadInput("dropout must be in [0, 1), and rope_base at least 1")
        turns = any(getattr(MIXERS[name], "uses_angles", False) for name, _ in self.layers)
        if turns and self.pos_emb == "rope" and self.n_embd // self.n_head % 2:
            raise BadInput("rotary positions need an even head width n_embd / n_head")

    @property
    def layers(self):
        """A (mixer name, shifts) a layer: a shift for all channels, one a head, or () for none."""
        names, rungs = [name.strip() for name in self.mixers.split(",")], cycle(self.ladder)
        if not set(names) <= set(MIXERS):
            raise BadInput(f"unknown mixer in {self.mixers!r}; choose from {', '.join(MIXERS)}")
        return [
            (name, next(rungs) if getattr(MIXERS[name], "uses_shifts", True) else ())
            for name in islice(cycle(names), self.n_layer)
        ]

    @property
    def ladder(self):
        """The shifts of the HSM layers, from the lowest on; after the last they start again."""
        n = max(1, (self.block_size - 1).bit_length())  # ceil(log2 block_size)
        if self.shifts in ("layer", "heads"):
            heads = range(self.n_head if self.shifts == "heads" else 1)
            return [tuple(2 ** ((j + h) % n) for h in heads) for j in range(n)]
        try:
            ladder = [tuple(map(int, rung.split("+"))) for rung in self.shifts.split(",")]
            good = all(len(r) in (1, self.n_head) and min(r) >= 1 for r in ladder)
        except ValueError:
            good = False
        if not good or max(map(max, ladder)) > 2**24:
            raise BadInput(
                "shifts must be layer, heads, or numbers from 1: a layer each like 1,2,4,8, or a "
                f"head each ({self.n_head} of them), joined by +; not {self.shifts!r}"
            )
        return ladder


# ---- The mixers. Their contract, in place of a base class ---------------------------------------
#   forward(x, cache=None) -> y    both (B, T, C). Without a cache x is a whole sequence (training);
#                                  with one it is the next chunk, of any length; no gradients.
#   init_cache(position, max_len)  what a stream must remember; forward updates it in place.
#   offsets                        the distances that it reaches in one layer, 0 among them.
#   state_size(length)             numbers a sequence in the cache after `length` tokens.
# A class may say uses_shifts = False: the ladder passes it by. Or uses_angles = True: forward takes
# a third argument, the angles of rotary positions or None.


def residual_scale(config):
    """How small a map that writes to the residual stream starts: 2 n_layer add up (GPT-2)."""
    return 1 / math.sqrt(2 * config.n_layer)


class ShiftMixer(nn.Module):
    """HSM's mixer: DELAY, then PAIR (a name in PAIRS), between two optional linear maps."""

    def __init__(self, config, pair, shifts):
        super().__init__()
        C, bias = config.n_embd, config.bias
        self.shifts, self.n_embd, self.offsets = shifts, C, sorted({0, *shifts})
        # With in_proj each head chooses what it sends through time, as attention's values do.
        self.in_proj = linear(C, C, bias) if config.in_proj else nn.Identity()
        self.pair = PAIRS[pair](C, config.n_head)
        self.proj = linear(C, C, bias, residual_scale(config)) if config.proj else nn.Identity()
        if not config.proj:  # then the pair writes to the residual stream; linear ones start small
            with torch.no_grad():
                for weight in self.pair.parameters():
                    weight.mul_(residual_scale(config))
        self.fast = None  # the shifts as a tensor, where one kernel mixes: the last section

    def forward(self, x, cache=None):
        x = self.in_proj(x)
        if cache is None and self.fast is not None and self.fast.device == x.device:
            return self.proj(fast_mix(self.pair, x, self.fast))
        z = delay_heads(x, self.shifts) if cache is None else cache(x)
        return self.proj(self.pair(x, z))

    def init_cache(self, position, max_len=None):
        return DelayRings(self.shifts, position)

    def state_size(self, length):
        return sum(self.shifts) * self.n_embd // len(self.shifts)


def rotary_angles(config, start, T, like):
    """cos and sin, (T, D/2), of the angles by which tokens start .. start + T - 1 turn.

    float64 within: a float32 position of a million is good to 0.06. like: whose type to return.
    """
    D, device = config.n_embd // config.n_head, like.device
    exact = torch.float32 if device.type == "mps" else torch.float64
    t = start + torch.arange(T, device=device, dtype=exact)
    speed = config.rope_base ** -(torch.arange(0, D, 2, device=device, dtype=exact) / D)
    angle = torch.outer(t, speed)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x, angles):
    """Rotary positions (arXiv:2104.09864): turn channels i and i + D/2 of x, (B, H, T, D)."""
    (cos, sin), (left, right) = angles, x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).type_as(x)


class KVRing:
    """Keys and values of a stream's last `window` tokens: token p lies in slot p mod window."""

    def __init__(self, window, position):
        self.window, self.position, self.kv = window, position, None
        self.slots = torch.arange(window, device=position.device)

    def __call__(self, k, v):
        """k, v: (B, H, T, D).  Returns keys, values (B, H, S, D), mask (T, S) or None: causal."""
        new, T, is_first = torch.stack([k, v]).detach(), k.size(2), self.kv is None
        if is_first:
            self.kv = new.new_zeros(*new.shape[:3], self.window, new.size(4))
        t = self.position + torch.arange(T, device=k.device)
        if T == 1:
            self.kv.index_copy_(3, t % self.window, new)  # to softmax the keys' order is the same
            return *self.kv.unbind(), (self.slots <= t)[None]
        # The numbers of the ring's tokens, below 0 where there is none yet, then of the chunk's.
        number = torch.cat([t[:1] - 1 - (t[:1] - 1 - self.slots) % self.window, t])  # (S,)
        distance = t[:, None] - number  # (T, S)
        mask = (number >= 0) & (distance >= 0) & (distance < self.window)
        both = torch.cat([self.kv, new], dim=3)
        self.kv.index_copy_(3, t[-self.window :] % self.window, new[:, :, :, -self.window :])
        return (k, v, None) if is_first and self.window >= T else (*both.unbind(), mask)


class SoftmaxMixer(nn.Module):
    """Causal softmax attention (arXiv:1706.03762), the baseline and the other half of hybrids.

    A token sees itself and the block_size - 1 tokens before it, however long the stream is.
    """

    uses_shifts, uses_angles = False, True

    def __init__(self, config, shifts=()):
        super().__init__()
        C, bias = config.n_embd, config.bias
        self.n_head, self.n_embd, self.window = config.n_head, C, config.block_size
        self.offsets, self.dropout = range(config.block_size), config.dropout
        self.qkv = linear(C, 3 * C, bias)
        self.proj = linear(C, C, bias, residual_scale(config))

    def forward(self, x, cache=None, angles=None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        mask = None
        if cache is not None:
            k, v, mask = cache(k, v)  # (B, H, S, D)
        elif self.window < T:
            t = torch.arange(T, device=x.device)
            mask = (t <= t[:, None]) & (t > t[:, None] - self.window)  # (T, T)
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and T > 1  # a mask that fast kernels know and need not be drawn
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))

    def init_cache(self, position, max_len=None):
        return KVRing(min(self.window, max_len or self.window), position)

    def state_size(self, length):
        return 2 * self.n_embd * min(length, self.window)


class PairMixers(Mapping):
    """PAIRS, those added later too, as mixers."""

    def __getitem__(self, name):
        if name not in PAIRS:
            raise KeyError(name)
        return lambda config, shifts: ShiftMixer(config, name, shifts)

    def __iter__(self):
        return iter(PAIRS)

    def __len__(self):
        return len(PAIRS)


# Name -> callable(config, shifts) that makes a mixer. A line here makes yours usable by name.
MIXERS = ChainMap({"softmax": SoftmaxMixer}, PairMixers())

# ---- The block: mix over time, then think about each token ---------------------------------------


def n_params(module):
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


class Block(nn.Module):
    """x = x + mixer(norm x);  x = x + MLP(norm x).  (B, T, C) -> (B, T, C)."""

    def __init__(self, config, mixer, shifts):
        super().__init__()
        C, bias = config.n_embd, config.bias
        self.norm1 = nn.LayerNorm(C, bias=bias)
        self.mixer = MIXERS[mixer](config, shifts)
        self.norm2 = nn.LayerNorm(C, bias=bias)
        # d_ff = 0: what the mixer has less than softmax, the MLP has more, 2 C weights a unit
        saved = 4 * C * C + 4 * C * bias - n_params(self.mixer)
        width = config.d_ff or 4 * C + round(saved / (2 * C + bias))
        if width < 1:
            raise BadInput(f"{mixer} alone has more parameters than a whole layer of softmax")
        self.up = linear(C, width, bias)
        self.down = linear(width, C, bias, residual_scale(config))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, angles=None):
        more = (angles,) if getattr(self.mixer, "uses_angles", False) else ()
        x = x + self.dropout(self.mixer(self.norm1(x), cache, *more))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


# ---- The model -----------------------------------------------------------------------------------


# What a stream remembers: an entry a layer, and how many tokens have passed, () int64.
Cache = namedtuple("Cache", "batch_size layers position")


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token a row: logits (B, V) -> (B,) int64. temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        worst_kept = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < worst_kept, -math.inf)
    if top_p is not None and top_p < 1:  # keep the likeliest until their sum reaches top_p
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
        self.config = config
        V, T, C = config.vocab_size, config.block_size, config.n_embd
        self.wte = init(nn.Embedding(V, C))
        self.wpe = init(nn.Embedding(T, C)) if config.pos_emb == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, *layer) for layer in config.layers)
        self.norm = nn.LayerNorm(C, bias=config.bias)
        uses_angles = any(getattr(block.mixer, "uses_angles", False) for block in self.blocks)
        self.rotates = config.pos_emb == "rope" and uses_angles

    def forward(self, idx, targets=None, cache=None, last_only=False):
        """idx, targets: (B, T) int64. Returns logits (B, T, V), or (B, 1, V), and the loss or None.

        The loss is the mean over tokens in nats; targets of -1 do not count. With a cache, idx is
        the stream's next chunk, and the cache is updated in place.
        """
        B, T = idx.shape
        start = 0 if cache is None else cache.position
        if T < 1 or (targets is not None and (last_only or targets.shape != idx.shape)):
            raise BadInput("idx needs a token, targets its shape, and last_only no targets")
        if cache is not None and cache.batch_size != B:
            raise BadInput(f"the cache holds {cache.batch_size} sequences, idx has {B}")
        x, angles = self.wte(idx), None  # (B, T, C)
        if self.wpe is not None:
            if start + T > self.config.block_size:
                raise BadInput(f"learned positions end at block_size={self.config.block_size}")
            x = x + self.wpe(start + torch.arange(T, device=idx.device))
        if self.rotates:
            angles = rotary_angles(self.config, start, T, x)
        x = self.dropout(x)
        for j, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.layers[j], angles)
        if cache is not None:
            cache.position.add_(T)
        x = self.norm(x[:, -1:] if last_only else x)
        logits = F.linear(x, self.wte.weight)  # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, loss

    def init_cache(self, batch_size, max_len=None):
        """An empty memory for an endless stream of batch_size sequences.

        max_len: tokens that you expect. Softmax layers then keep, and see, no more than these.
        """
        position = torch.zeros((), dtype=torch.int64, device=self.wte.weight.device)
        layers = [block.mixer.init_cache(position, max_len) for block in self.blocks]
        return Cache(batch_size, layers, position)

    def generate(self, idx, max_new_tokens, temperature=1, top_k=None, top_p=None, generator=None):
        """Continue idx (B, T): an iterator over max_new_tokens tensors (B,) int64, without dropout.

        The stream may be of any length: softmax layers see the last block_size tokens, which are
        read anew for each token where positions are learned. BadInput for values out of range.
        """
        if max_new_tokens < 0 or idx.size(1) < 1:
            raise BadInput(f"generate goes on from at least one token, not by {max_new_tokens}")
        if temperature and not 1e-6 <= temperature < math.inf:
            raise BadInput(f"temperature must be 0 (greedy), or from 1e-6 up, not {temperature}")
        if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise BadInput(f"top_k must be at least 1, top_p in (0, 1], not {top_k} and {top_p}")
        return self._generate(idx, max_new_tokens, (temperature, top_k, top_p, generator))

    @torch.no_grad()
    def _generate(self, idx, max_new_tokens, settings):
        cache = self.init_cache(idx.size(0), idx.size(1) + max_new_tokens)
        learned, T = self.wpe is not None, self.config.block_size  # prompts: T tokens at a time
        step = partial(self, cache=None if learned else cache, last_only=True)
        for i in range(max_new_tokens):
            if i == 1 and not learned and idx.is_cuda and not torch.is_autocast_enabled("cuda"):
                step = as_graph(step, idx)  # the prompt is read: now each call takes one token
            training = self.training
            if training:
                self.eval()
            logits, _ = [step(x) for x in (idx[:, -T:] if learned else idx).split(T, dim=1)][-1]
            if training:  # already here: whoever stops early finds the model as it was
                self.train()
            token = sample_token(logits[:, -1], *settings)  # (B,)
            yield token
            idx = torch.cat([idx[:, -T:], token[:, None]], dim=1) if learned else token[:, None]

    def num_params(self, non_embedding=True):
        """Number of parameters; by default without the tables for tokens and positions."""
        tables = n_params(self.wte) + (n_params(self.wpe) if self.wpe is not None else 0)
        return n_params(self) - non_embedding * tables

    def state_bytes(self, batch_size, length):
        """Bytes that batch_size streams must keep to go on after `length` tokens."""
        size = sum(block.mixer.state_size(length) for block in self.blocks)
        return batch_size * size * self.wte.weight.element_size()


# ---- What a model can reach, and what its layers are ---------------------------------------------


def receptive_field(config):
    """Count the mixers' paths: entry k is the number of ways from x[t - k] to the last y[t].

    On a path each layer goes one of its mixer's offsets back, 0 among them. As a polynomial a layer
    is 1 + X^s, and the layers multiply: with shifts 1, 2, 4 .. each distance comes once, as its
    binary number. Exact: int64, or Python's integers where int64 would overflow.
    """
    with torch.device("meta"):  # shapes without memory
        offsets = [MIXERS[name](config, shifts).offsets for name, shifts in config.layers]
    fits = math.prod(map(len, offsets)) < 2**63
    paths = np.ones(1, dtype=np.int64 if fits else object)
    for steps in offsets:
        longer = np.zeros(len(paths) + max(steps), dtype=paths.dtype)
        for s in steps:
            longer[s : s + len(paths)] += paths
        paths = longer
    return paths


def layer_table(model):
    """A text table of the layers: mixer, shifts, reach so far, d_ff, parameters, state."""
    config, reach = model.config, 0
    rows = [("layer", "mixer", "shifts", "reach", "d_ff", "parameters", "state")]
    for j, (block, (name, shifts)) in enumerate(zip(model.blocks, config.layers, strict=True)):
        reach += max(block.mixer.offsets)
        shifts, width = ",".join(map(str, shifts)) or "-", block.up.out_features
        state = f"{block.mixer.state_size(config.block_size):,}"
        rows.append((j, name, shifts, reach, width, f"{n_params(block):,}", state))
    state = sum(block.mixer.state_size(config.block_size) for block in model.blocks)
    rows.append(("all", "", "", reach, "", f"{model.num_params():,}", f"{state:,}"))
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(str(c).rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    tables = model.num_params(non_embedding=False) - model.num_params()
    last = f"(reach in tokens; state in numbers a sequence; {tables:,} more in embeddings)"
    return "\n".join([*lines, last])


# ---- Optional: the fast path, on a GPU. Its reference is the plain path above --------------------
# Mixing takes as long as its data travel: at least x in and y out; plain PyTorch moves z, too. If
# y = p x + q z (`taps`: ab, vec, gate1) one kernel does it all, and the gradient to x, its shift
# turned round. NOT YET RUN ON A GPU. It stays if it makes a compiled training step 3% faster.

try:  # PyTorch for CUDA brings Triton along
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def mix_kernel(x, p, q, shifts, y, n, T, H, D, step, AHEAD: tl.constexpr, COLS: tl.constexpr):
        """y[t] = p[t] x[t] + q[t] x[t-s];  AHEAD, its adjoint: p[t] x[t] + q[t+s] x[t+s]."""
        ROWS: tl.constexpr = (1023 + COLS) // COLS  # tokens, of n = B T, in one head: one shift
        block, head = tl.program_id(0) // H, tl.program_id(0) % H
        row, d = block * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None]
        t, c, s = row % T, head * D + d, tl.load(shifts + head)
        s = -s if AHEAD else s
        here = (row < n) & (d < D)
        there = here & (t >= s) & (t - s < T)
        i, w = row.to(tl.int64) * (H * D) + c, row.to(tl.int64) * step + c
        p_t = tl.load(p + w, here, 0).to(tl.float32)
        q_t = tl.load(q + (w - s * step if AHEAD else w), there, 0).to(tl.float32)
        x_t = tl.load(x + i, here, 0).to(tl.float32)
        z_t = tl.load(x + i - s * (H * D), there, 0).to(tl.float32)
        tl.store(y + i, p_t * x_t + q_t * z_t, here)

    @torch.library.custom_op("hsm::mix", mutates_args=())
    def mix(x: Tensor, p: Tensor, q: Tensor, shifts: Tensor, ahead: bool) -> Tensor:
        """p x + q z in one kernel. x: (B, T, C).  p, q: (C,) or (B, T, C).  shifts: (H,) int64."""
        x, p, q = x.contiguous(), p.contiguous(), q.contiguous()
        y, (B, T, C), H = torch.empty_like(x), x.shape, len(shifts)
        step, cols = C if p.dim() > 1 else 0, triton.next_power_of_2(C // H)
        grid = (triton.cdiv(B * T, triton.cdiv(1024, cols)) * H,)
        mix_kernel[grid](x, p, q, shifts, y, B * T, T, H, C // H, step, ahead, cols)
        return y

    @mix.register_fake
    def _(x, *_):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def mix_backward(ctx, e):
        x, p, q, shifts = ctx.saved_tensors
        one = x.new_ones(x.size(2))
        z = mix(x, 0 * one, one, shifts, False)
        dp, dq = (e * x).sum_to_size(p.shape), (e * z).sum_to_size(q.shape)
        return mix(e, p, q, shifts, True), dp, dq, None, None

    mix.register_autograd(
        mix_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:4])
    )


def fast_mix(pair, x, shifts):
    """pair(x, z) in one kernel, in x's type or autocast's. shifts: (H,) int64 on x's device."""
    p, q = pair.taps(x)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return mix(x, p.to(x.dtype), q.to(x.dtype), shifts, False)


def use_fast(model):
    """Let the model's HSM layers mix in the kernel, except in streams. BadInput if they cannot."""
    mixers = [block.mixer for block in model.blocks if isinstance(block.mixer, ShiftMixer)]
    runs = triton and (model.wte.weight.is_cuda or os.environ.get("TRITON_INTERPRET"))
    if not runs or not mixers or {type(mixer.pair) for mixer in mixers} - {AB, Vec, Gate1}:
        raise BadInput("the fast path needs Triton, CUDA and ab, vec or gate1; use --no-fast")
    for mixer in mixers:
        mixer.fast = torch.tensor(mixer.shifts, device=model.wte.weight.device)


def as_graph(step, chunk):
    """step: (B, 1) -> (logits (B, 1, V), None), as one CUDA graph. chunk: a first token.

    A token is hundreds of kernels that each take longer to start than to run. A graph starts them
    at once, on the same addresses each time, once it has recorded a call.
    """
    idx, graph = chunk.clone(), torch.cuda.CUDAGraph()

    def outputs():
        for _ in range(3):  # libraries load, and take the memory that they work in
            yield step(idx)
        with torch.cuda.graph(graph):
            output = step(idx)  # recorded, not computed
        while True:
            graph.replay()
            yield output

    stream = outputs()

    def replay(token):
        idx.copy_(token)
        return next(stream)

    return replay
