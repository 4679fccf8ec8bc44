"""Decoding as one CUDA graph: hsm.py's caches in fixed shapes, their position on the device.

    model.generate(...)              takes it by itself on CUDA
    Decoder(model, cache, max_len)   the same from Python, on any device
    Decoder(torch.compile(model), cache)   for long texts on a CPU: compiling takes a while, then
                                           HSM's tokens come faster (results/bench.md)

Why? A token of a small model is hundreds of kernels of a few microseconds, and Python takes longer
to start one than the GPU to run it. A CUDA graph starts them all at once. But it runs the same
kernels on the same addresses with the same numbers, again and again: nothing that differs from
token to token may be a Python number, a slice or a shape. So here the position is a tensor, a ring
is read and written at an index computed from it, and the keys' ring has its full length from the
start, with a mask over what is not filled yet.

The model's code is hsm.py's own. These caches are called as DelayLine and KVCache are, on one
token, and GPT.forward counts the position up where it would count a number. A prompt is read
before, in one pass through the plain caches; `static` takes over what they hold.

It has a file of its own because hsm.py is to stay a one-sitting read, and because fast.py needs
Triton and this does not. Tested on a CPU, where a stand-in for the graph replays the recorded
operators on the same tensors. NOT YET RUN ON A GPU.
"""

import math

import torch

from hsm import BadInput, Cache, KVCache

WARM_UP = 3  # tokens that run as they are before the capture: libraries load, workspaces are made

# ------------------------------------------------------------------------------------------------
# Caches. `position`, () int64, is the number of the token at hand: all layers' caches share it.


class StaticDelay:
    """All DelayLines of a layer, for one token a call: (B, 1, C) -> (B, 1, C).

    The heads' rings lie in one tensor, one after the other, so that a single operator reads all H
    slots and a single one writes them.
    """

    def __init__(self, lines, position):
        self.position = position
        self.rings = torch.cat([line.ring for line in lines], dim=1)  # (B, sum of shifts, C / H)
        self.shifts = torch.tensor([line.shift for line in lines], device=position.device)  # (H,)
        self.first = self.shifts.cumsum(0) - self.shifts  # (H,) where each head's ring begins

    def __call__(self, x):
        slots = self.first + self.position % self.shifts  # (H,)
        z = self.rings.index_select(1, slots)  # (B, H, C / H)
        self.rings.index_copy_(1, slots, x.detach().view_as(z))
        return z.view_as(x)


class StaticKV:
    """KVCache for one token a call: k, v (B, H, 1, D) -> keys, values (B, H, S, D) and a mask.

    A ring of S slots, the window's, or fewer in a stream that ends before. To softmax the order of
    the keys does not matter, so they stay where they are.
    """

    def __init__(self, plain, position, max_len):
        n_seen, n_slots = plain.n_seen, min(plain.window, max_len)
        n = min(plain.end, n_slots)
        slots = torch.arange(n_seen - n, n_seen, device=position.device) % n_slots
        kept = plain.kv[:, :, :, plain.end - n : plain.end]  # (2, B, H, n, D)
        self.kv = kept.new_zeros(*kept.shape[:3], n_slots, kept.size(4))
        self.kv.index_copy_(3, slots, kept)
        self.n_seen = position  # the name by which SoftmaxMixer asks for it
        self.slots = torch.arange(n_slots, device=position.device)
        self.is_full = n_seen >= n_slots - 1  # then kernels that know no mask may run: faster ones

    def __call__(self, k, v):
        slot = (self.n_seen % len(self.slots)).view(1)
        self.kv[0].index_copy_(2, slot, k.detach())
        self.kv[1].index_copy_(2, slot, v.detach())
        return self.kv.unbind()

    @property
    def mask(self):
        """(1, S) bool: the slots that are filled, this token's included. None: all are."""
        return None if self.is_full else (self.slots <= self.n_seen)[None]


def static(cache, device, max_len=math.inf):
    """A Cache of the same stream for one token a call, in fixed shapes; `cache` is used up.

    The stream may then be max_len tokens long, prompt included, or go on for ever if that is at
    least the softmax layers' window. Raises BadInput where no token has been read.
    """
    if not cache.n_seen:
        raise BadInput("a static cache takes over from one that has read a token or more")
    position, layers = torch.tensor(cache.n_seen, device=device), []
    while cache.layers:  # layer by layer, so that only one of them needs its memory twice
        plain = cache.layers.pop(0)
        if isinstance(plain, KVCache):
            layers.append(StaticKV(plain, position, max_len))
        else:
            layers.append([StaticDelay(plain, position)])
    return Cache(cache.batch_size, layers, position)


# ------------------------------------------------------------------------------------------------
# The step


class Decoder:
    """Called with a token for each sequence, (B, 1) int64, it returns the next logits, (B, 1, V).

    cache: what model.init_cache gave, with the prompt read; it is used up.  max_len: see `static`.
    On CUDA the logits lie at one address: the next call writes over them. Call it in evaluation
    mode and without gradients. Raises BadInput past max_len.
    """

    def __init__(self, model, cache, max_len=math.inf):
        has_end = max_len < model.config.block_size and "softmax" in dict(model.config.layers)
        self.n_left = max_len - cache.n_seen if has_end else math.inf
        device = model.wte.weight.device
        self.cache = cache = static(cache, device, max_len)
        self.idx = idx = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)

        def step():  # without self, whose memory would otherwise wait for the garbage collector
            return model(idx, cache=cache, last_only=True)[0]

        self.step = as_graph(step, device) if idx.is_cuda else step

    def __call__(self, idx):
        if idx.shape != self.idx.shape:
            raise BadInput(f"a decoder takes {len(self.idx)} x 1 tokens, not {list(idx.shape)}")
        if self.n_left < 1:
            raise BadInput("the stream is at the length that its cache was made for")
        self.n_left -= 1
        self.idx.copy_(idx)
        return self.step()


def as_graph(step, device):
    """step, a function without arguments on tensors that stay where they are, as a CUDA graph.

    The first calls run it as it is, on a stream beside the current one, as a capture wants it. The
    next one captures, which computes nothing, and replays, as all later ones do. What cannot be
    captured raises torch's own error.
    """
    beside, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    n_calls, output = 0, None

    def call():
        nonlocal n_calls, output
        n_calls += 1
        current = torch.cuda.current_stream(device)
        if n_calls <= WARM_UP:
            beside.wait_stream(current)
            with torch.cuda.stream(beside):
                output = step()
            current.wait_stream(beside)
            return output
        if n_calls == WARM_UP + 1:
            with torch.cuda.graph(graph, stream=beside):
                output = step()
        graph.replay()
        return output

    return call
