"""What a reader would use in the place of HSM: its neighbours, as mixers on hsm.py's contract.

    import neighbours                                after that hsm.MIXERS knows their names:
    GPTConfig(mixers="shift-softmax")                attention on a x[t] + b x[t-1]
    GPTConfig(mixers="shifts-softmax")               the same with HSM's ladder over the heads
    GPTConfig(mixers="window")                       attention to the last 32 tokens
    GPTConfig(mixers="all-shifts")                   HSM, each channel with the shifts of all heads
    GPTConfig(mixers="conv4", in_proj=True)          a short convolution between two linear maps
    GPTConfig(mixers="linrec")                       a gated linear recurrence, as in Mamba's kin

They stream, with caches and in chunks of any length, and have equal parameters as every mixer: what
they save or need goes to or comes from the feed-forward network (Block in hsm.py). reproduce.py
trains them beside HSM. Each is short, because the contract is: forward, init_cache, offsets,
state_size.
"""

import math
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from hsm import (  # noqa: E402
    MIXERS,
    DelayRings,
    SoftmaxMixer,
    Vec,
    delay,
    delay_heads,
    linear,
    residual_scale,
)

# ---- Attention with a shift inside ---------------------------------------------------------------


class ShiftSoftmax(SoftmaxMixer):
    """Softmax attention whose queries, keys and values come from a x[t] + b x[t-1].

    One pair (a, b) a channel, of one half each at the start, as in HSM's `vec`: with a = 1, b = 0
    it would start as plain attention. A key can tell what stood before its token, so that one layer
    finds "what followed the last time" (Primer, arXiv:2109.08668, has 3 taps after the map).
    """

    shifts = (1,)

    def __init__(self, config, shifts=()):
        super().__init__(config)
        self.shifts = shifts or self.shifts
        self.pair = Vec(config.n_embd, config.n_head)
        self.offsets = sorted({k + s for k in range(self.window) for s in (0, *self.shifts)})

    def forward(self, x, cache=None, angles=None):
        rings, ring = cache or (None, None)
        z = delay_heads(x, self.shifts) if cache is None else rings(x)
        return super().forward(self.pair(x, z), ring, angles)

    def init_cache(self, position, max_len=None):
        return DelayRings(self.shifts, position), super().init_cache(position, max_len)

    def state_size(self, length):
        rings = sum(self.shifts) * self.n_embd // len(self.shifts)
        return rings + super().state_size(length)


class ShiftsSoftmax(ShiftSoftmax):
    """The same with HSM's ladder: the slice of channels of head h comes from its own shift back."""

    uses_shifts = True


# ---- Attention in a window -----------------------------------------------------------------------


class Window(SoftmaxMixer):
    """Softmax attention to the last 32 tokens (Longformer, arXiv:2004.05150; Mistral)."""

    def __init__(self, config, shifts=()):
        super().__init__(config)
        self.window = min(32, config.block_size)
        self.offsets = range(self.window)


# ---- Several shifts in a layer -------------------------------------------------------------------


class AllShifts(nn.Module):
    """y[t] = w_0 x[t] + sum of w_s x[t-s] over all shifts s of the layer, numbers w a channel.

    In HSM's `vec` each head has a shift of its own; here each channel sees them all. Between the
    linear maps that config.in_proj and config.proj ask for. w starts as nn.Conv1d's weights.
    """

    def __init__(self, config, shifts):
        super().__init__()
        C, bias, scale = config.n_embd, config.bias, residual_scale(config)
        self.n_embd, self.offsets = C, sorted({0, *shifts})
        # From one offset to the next: shifts 1, 2, 4, 8 are a delay of 1, 1, 2 and 4 more.
        self.steps = [s - before for before, s in pairwise(self.offsets)]
        self.in_proj = linear(C, C, bias) if config.in_proj else nn.Identity()
        start = (1 if config.proj else scale) / math.sqrt(len(self.offsets))
        self.taps = nn.ParameterList(torch.empty(C).uniform_(-start, start) for _ in self.offsets)
        self.proj = linear(C, C, bias, scale) if config.proj else nn.Identity()

    def forward(self, x, cache=None):
        z = self.in_proj(x)
        y = self.taps[0] * z
        for i, step in enumerate(self.steps):
            z = delay(z, step) if cache is None else cache[i](z)
            y = y + self.taps[i + 1] * z
        return self.proj(y)

    def init_cache(self, position, max_len=None):
        return [DelayRings((step,), position) for step in self.steps]

    def state_size(self, length):
        return max(self.offsets) * self.n_embd


class Conv4(AllShifts):
    """The same with shifts of 1, 2 and 3: a causal depthwise convolution of four taps.

    Mamba and H3 have it before their long memory (arXiv:2212.14052).
    """

    uses_shifts = False

    def __init__(self, config, shifts=()):
        super().__init__(config, (1, 2, 3))


# ---- A gated linear recurrence -------------------------------------------------------------------


class LinRec(nn.Module):
    """h[t] = g h[t-1] + (1 - g) v, with g = sigmoid(G x[t]), v = V x[t];  y = W h.

    The minimal gated recurrence (minGRU, arXiv:2410.01201); Mamba's and Griffin's are of this kind.
    The gates start so that the channels remember from 2 to block_size tokens.
    """

    uses_shifts = False

    def __init__(self, config, shifts=()):
        super().__init__()
        C, T = config.n_embd, config.block_size
        self.n_embd, self.offsets = C, range(T)
        self.V, self.G = linear(C, C, config.bias), linear(C, C, bias=True)
        self.proj = linear(C, C, config.bias, residual_scale(config))
        memory = torch.logspace(1, math.log2(max(2, T)), C, base=2)  # 1 / (1 - g), in tokens
        self.G.bias.data = (memory - 1).log()

    def forward(self, x, cache=None):
        g = torch.sigmoid(self.G(x))
        h = scan(g, (1 - g) * self.V(x), cache[0] if cache else torch.zeros_like(x[:, 0]))
        if cache is not None:
            if not cache:
                cache.append(torch.empty_like(h[:, -1]))
            cache[0].copy_(h[:, -1].detach())
        return self.proj(h)

    def init_cache(self, position, max_len=None):
        return []  # h of the last token, once there is one

    def state_size(self, length):
        return self.n_embd


def scan(g, v, h):
    """h[t] = g[t] h[t-1] + v[t].  g, v: (B, T, C).  h: (B, C), from before.  Returns (B, T, C).

    About sqrt T blocks of sqrt T tokens: first a step in all blocks at once, from 0; then what each
    block gets from the ones before it. So 2 sqrt T steps in place of T. No division, so it is exact
    whatever the gates are.
    """
    (B, T, C), n = v.shape, math.isqrt(v.size(1) - 1) + 1
    g, v = (F.pad(u, (0, 0, 0, n * n - T)).view(B, n, n, C).unbind(2) for u in (g, v))
    inner, product = [v[0]], [g[0]]  # each (B, n, C): all blocks' first tokens
    for i in range(1, n):
        inner.append(g[i] * inner[-1] + v[i])
        product.append(g[i] * product[-1])
    before = [h]
    for last, decay in zip(inner[-1].unbind(1)[:-1], product[-1].unbind(1), strict=False):
        before.append(decay * before[-1] + last)
    h = torch.stack(inner, 2) + torch.stack(product, 2) * torch.stack(before, 1)[:, :, None]
    return h.view(B, n * n, C)[:, :T]


NEIGHBOURS = {
    "shift-softmax": ShiftSoftmax,
    "shifts-softmax": ShiftsSoftmax,
    "window": Window,
    "all-shifts": AllShifts,
    "conv4": Conv4,
    "linrec": LinRec,
}
MIXERS.update(NEIGHBOURS)
