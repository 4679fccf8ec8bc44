"""Each test states one fact, in its name.

    pytest -q            the quick ones: about a minute
    pytest -q -m slow    kills, long streams, several processes: minutes
    pytest -q -m gpu     what needs a CUDA device

The tests that go over MIXERS take a new mixer, or a new pair function, up the moment it has a name.
"""

import http.client
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from functools import partial
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # the kernel then runs in Triton's interpreter, slowly
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hsm
import prepare_data
import sample
import train

sys.path.append(str(Path(__file__).resolve().parent / "results"))
import neighbours  # noqa: F401  six more names in MIXERS

from hsm import GPT, MIXERS, PAIRS, BadInput, DelayRings, GPTConfig, delay, receptive_field

torch.set_num_threads(1)  # small tensors: threads that wait for each other are far slower
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none

HERE = Path(__file__).resolve().parent
HYBRIDS = ["ab,softmax", "gate2,ab,softmax", "softmax,vec"]
MODELS = [*MIXERS, *HYBRIDS]
needs_triton = pytest.mark.skipif(hsm.triton is None, reason="Triton is not installed")
gpu = pytest.mark.gpu


def skip_without(device):
    torch.cuda.is_available() or device == "cpu" or pytest.skip("needs a CUDA device")


def tiny(mixers="ab", dtype=torch.float32, seed=0, **fields):
    """A small model in evaluation mode. Its weights are large, so that no path is lost in noise."""
    torch.manual_seed(seed)
    fields = {"vocab_size": 31, "block_size": 16, "n_layer": 4, "n_head": 2, "n_embd": 16} | fields
    model = GPT(GPTConfig(mixers=mixers, **fields)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape, vocab_size=31, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stream(model, idx, sizes, max_len=None):
    """Logits of idx fed through a cache in chunks of the given sizes."""
    cache = model.init_cache(idx.size(0), max_len)
    return torch.cat([model(chunk, cache=cache)[0] for chunk in idx.split(sizes, dim=1)], dim=1)


def random_chunks(total, seed):
    """Random positive sizes that add up to total."""
    generator, sizes = np.random.default_rng(seed), []
    while sum(sizes) < total:
        sizes.append(int(min(generator.integers(1, 12), total - sum(sizes))))
    return sizes


# ---- The delay -----------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", [0, 1, 3, 6, 7, 8, 100])
def test_delay_moves_tokens_by_shift_and_fills_with_zeros_also_beyond_T(shift):
    x = torch.randn(2, 7, 3)
    y = delay(x, shift)
    assert y.shape == x.shape
    for t in range(7):
        assert torch.equal(y[:, t], x[:, t - shift] if t >= shift else torch.zeros(2, 3))


@pytest.mark.parametrize("shifts", [(1,), (5,), (40,), (3, 1), (1, 2, 4, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_rings_equal_the_delay_for_any_chunks(shifts, seed):
    x, position = torch.randn(2, 30, 12), torch.tensor(0)
    rings, parts = DelayRings(shifts, position), []
    for chunk in x.split(random_chunks(30, seed), dim=1):
        parts.append(rings(chunk))
        position += chunk.size(1)
    assert torch.equal(torch.cat(parts, dim=1), hsm.delay_heads(x, shifts))
    assert rings.rings.numel() == 2 * sum(shifts) * 12 // len(shifts)


# ---- Causality -----------------------------------------------------------------------------------
@pytest.mark.parametrize("mixers", MODELS)
def test_logits_do_not_depend_on_later_tokens_bit_for_bit(mixers):
    model, idx = tiny(mixers), tokens(2, 16)
    logits, _ = model(idx)
    for t in (1, 7, 15):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 31
        assert torch.equal(model(changed)[0][:, :t], logits[:, :t])
        assert not torch.equal(model(changed)[0][:, t], logits[:, t])


@pytest.mark.parametrize("mixers", MODELS)
def test_gradients_reach_every_earlier_token_in_reach_and_no_later_one(mixers):
    model = tiny(mixers, torch.float64, shifts="layer", pos_emb="none")
    x = torch.randn(1, 16, 16, dtype=torch.float64, requires_grad=True)
    y = x
    for block in model.blocks:
        y = block(y)
    reach = len(receptive_field(model.config)) - 1
    for t in (0, 9, 15):
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        touched = gradient[0].abs().sum(-1) > 0  # (T,)
        assert touched.tolist() == [0 <= t - k <= reach for k in range(16)]


# ---- Streaming -----------------------------------------------------------------------------------
STREAMS = [
    {},
    {"shifts": "layer"},
    {"shifts": "3,1+7"},
    {"proj": False},
    {"in_proj": True},
    {"n_head": 4, "bias": True},
    {"pos_emb": "none"},
    {"pos_emb": "learned", "block_size": 64},
    {"block_size": 1},
]


@pytest.mark.parametrize("fields", STREAMS, ids=str)
@pytest.mark.parametrize("mixers", MODELS)
def test_streaming_equals_parallel(mixers, fields):
    model, idx = tiny(mixers, torch.float64, n_layer=3, **fields), tokens(2, 35)  # two windows, 3
    with torch.no_grad():
        parallel, _ = model(idx)
    ways = ([35], None), ([1] * 35, 35), ([17, 18], None), (random_chunks(35, 0), 35)
    for sizes, max_len in ways:
        difference = (stream(model, idx, sizes, max_len) - parallel).abs().max()
        assert difference <= 1e-9 * parallel.abs().max()


@torch.no_grad()
def naive(model, idx, n):
    """The likeliest n tokens, everything computed anew for each of them: (n, B)."""
    for _ in range(n):
        window = idx[:, -model.config.block_size :] if model.wpe is not None else idx
        idx = torch.cat([idx, model(window)[0][:, -1:].argmax(-1)], dim=1)
    return idx[:, -n:].T


@pytest.mark.parametrize("pos_emb", ["none", "rope", "learned"])
@pytest.mark.parametrize("mixers", MODELS)
def test_greedy_text_is_the_same_with_and_without_the_cache_far_past_block_size(mixers, pos_emb):
    model, idx = tiny(mixers, torch.float64, n_layer=3, pos_emb=pos_emb), tokens(2, 15)
    assert torch.equal(torch.stack(list(model.generate(idx, 30, 0))), naive(model, idx, 30))


def test_a_softmax_layer_sees_block_size_tokens_and_no_more():
    model, idx = tiny("softmax", torch.float64, n_layer=1), tokens(1, 30)
    changed = idx.clone()
    changed[0, 13] = (idx[0, 13] + 1) % 31
    same = (model(idx)[0] == model(changed)[0]).all(dim=-1)[0]  # (T,)
    assert same.tolist() == [t < 13 or t >= 13 + 16 for t in range(30)]


@pytest.mark.parametrize("mixers", MODELS)
@pytest.mark.parametrize("length", [3, 16, 50])
def test_state_bytes_is_what_a_stream_keeps_that_is_told_its_length(mixers, length):
    model = tiny(mixers)
    cache = model.init_cache(2, max_len=length)
    model(tokens(2, length), cache=cache)

    def kept(state):
        if isinstance(state, list | tuple):
            return sum(map(kept, state))
        return getattr(state, "kv", getattr(state, "rings", state)).numel()

    assert model.state_bytes(2, length) == 4 * kept(cache.layers)


# ---- A token as a CUDA graph, and compiled -------------------------------------------------------
@pytest.mark.parametrize("mixers", ["ab", "softmax", "gate2,ab,softmax"])
def test_a_compiled_token_has_no_graph_break_and_compiles_once(mixers):
    torch.compiler.reset()
    model, idx, compiled = tiny(mixers, shifts="3,40,7"), tokens(2, 60), []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    step = torch.compile(model, fullgraph=True, backend=backend)
    cache = model.init_cache(2)
    with torch.no_grad():
        expected = model(idx)[0][:, 5:]
        model(idx[:, :5], cache=cache)
        logits = [step(token, cache=cache)[0].clone() for token in idx[:, 5:].split(1, dim=1)]
    assert len(compiled) == 1
    assert (torch.cat(logits, dim=1) - expected).abs().max() <= 1e-5 * expected.abs().max()


class FakeGraph(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: it records operators, and replays them on the same tensors.

    As in a capture, what is recorded has no effect before the first replay, and the device can't be
    waited for.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.undo, self.n_replays = [], [], 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        if operator._schema.is_mutable:
            self.undo.append((args[0], args[0].clone()))
        output = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, output))
        return output

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.undo):
            tensor.copy_(before)

    def replay(self):
        self.n_replays += 1
        for operator, args, kwargs, output in self.calls:
            again = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Tensors claim to be on CUDA, and the calls there meet the stand-in. Its graphs."""
    graphs = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(FakeGraph()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return graphs


@pytest.mark.parametrize("n_prompt", [1, 13, 20])  # 13: the keys' ring gets full while it replays
@pytest.mark.parametrize("mixers", ["ab", "mult", "softmax", "gate2,ab,softmax"])
def test_generate_on_cuda_replays_one_graph_and_draws_the_same_tokens(
    mixers, n_prompt, fake_cuda, monkeypatch
):
    model, idx = tiny(mixers, torch.float64), tokens(2, n_prompt)

    def text():
        generator = torch.Generator().manual_seed(1)
        return torch.stack(list(model.generate(idx, 60, 0.8, top_k=9, generator=generator)))

    replayed = text()
    (graph,) = fake_cuda
    assert graph.n_replays == 60 - 1 - 3  # the prompt, and three calls before the capture
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    assert torch.equal(text(), replayed)


# ---- The kernel ----------------------------------------------------------------------------------
def plain_and_fast(pair, x, shifts, e):
    """Values and gradients of the pair function itself, and of the kernel."""
    inputs = [x, *pair.parameters()]
    for y in (
        pair(x, hsm.delay_heads(x, shifts)),
        hsm.fast_mix(pair, x, torch.tensor(shifts, device=x.device)),
    ):
        yield [y, *torch.autograd.grad(y, inputs, e.to(y.dtype))]


DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", ["ab", "vec", "gate1"])
def test_the_kernel_equals_the_pair_function_in_values_and_gradients(name, dtype, device):
    skip_without(device)
    for seed in range(17 if dtype == torch.float32 else 4):
        generator = np.random.default_rng(seed)
        B, T, H, D = (int(generator.integers(1, high)) for high in (4, 70, 5, 9))
        shifts = tuple(int(s) for s in generator.integers(1, 80, size=H))
        torch.manual_seed(seed)
        pair = PAIRS[name](H * D, H).to(device, dtype)
        x, e = (torch.randn(B, T, H * D, device=device, dtype=dtype) for _ in range(2))
        for a, b in zip(*plain_and_fast(pair, x.requires_grad_(), shifts, e), strict=True):
            assert (a - b).abs().max() <= 10 * ROUNDING[dtype] * max(1, a.abs().max())


@needs_triton
def test_the_operator_is_what_pytorch_asks_of_one():
    x, p, q = (torch.randn(s, requires_grad=True) for s in ((2, 7, 12), (12,), (12,)))
    torch.library.opcheck(hsm.mix, (x, p, q, torch.tensor((1, 2, 4)), False))


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
def test_a_fast_model_is_one_graph_and_gives_the_plain_models_loss_and_gradients(device):
    skip_without(device)
    torch.compiler.reset()
    model, idx = tiny("ab,gate1,softmax").to(device).train(), tokens(2, 17).to(device)
    losses, gradients = [], []
    for fast in (False, True):
        if fast:
            hsm.use_fast(model)
            backend = "aot_eager" if device == "cpu" else "inductor"
            model = torch.compile(model, fullgraph=True, backend=backend)
        losses.append(model(idx[:, :-1], idx[:, 1:])[1])
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    assert torch.allclose(*losses, atol=1e-4)
    for plain, fast in zip(*gradients, strict=True):
        assert torch.allclose(plain, fast, atol=1e-3)


@pytest.mark.parametrize("mixers", ["gate2", "softmax", "ab,mult", "own"])
def test_the_kernel_is_refused_where_it_knows_no_mixer_or_there_is_no_gpu(mixers, monkeypatch):
    monkeypatch.setitem(PAIRS, "own", type("Own", (hsm.AB,), {}))  # it may mix in its own way
    with pytest.raises(BadInput, match="--no-fast"):
        hsm.use_fast(tiny(mixers))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="needs Triton, CUDA"):
            hsm.use_fast(tiny("ab"))


# ---- Receptive field -----------------------------------------------------------------------------
def paths_by_gradient(config):
    """Count paths with autograd: the mixers alone, each made to pass on 1 x + 1 z."""
    H, reach = config.n_head, sum(max(shifts) for _, shifts in config.layers)
    x = torch.zeros(1, reach + 1, config.n_embd, dtype=torch.float64, requires_grad=True)
    y = x
    for name, shifts in config.layers:
        mixer = hsm.ShiftMixer(config, name, shifts).double()
        with torch.no_grad():
            n = len(shifts)  # every head carries the sum over heads: x counts once, each z once
            mixer.pair.a.fill_(1 / n), mixer.pair.b.fill_(1)
            block = torch.eye(config.n_embd // H, dtype=torch.float64)
            mixer.proj.weight.copy_(block.repeat(H, H) if n > 1 else torch.eye(config.n_embd))
        y = mixer(y)
    (gradient,) = torch.autograd.grad(y[0, -1, 0], x)
    counts = gradient[0].view(reach + 1, H, -1)[..., 0]  # (T, H)
    return counts.sum(-1).flip(0).round().long()


@pytest.mark.parametrize(
    "fields",
    [
        {"shifts": "layer", "n_layer": 5},
        {"shifts": "heads", "n_head": 4, "n_layer": 5},
        {"shifts": "1,3,3,10", "n_layer": 5},
        {"shifts": "1+3,2+5,7", "n_layer": 4},
    ],
)
def test_receptive_field_equals_what_autograd_sees_on_a_linear_model(fields):
    config = GPTConfig(**{"block_size": 32, "n_layer": 3, "n_head": 2, "n_embd": 8} | fields)
    assert receptive_field(config).tolist() == paths_by_gradient(config).tolist()


@pytest.mark.parametrize("n_layer", [1, 3, 7, 10])
def test_each_distance_has_exactly_one_path(n_layer):
    config = GPTConfig(block_size=2**n_layer, n_layer=n_layer, shifts="layer")
    assert [s for _, (s,) in config.layers] == [2**j for j in range(n_layer)]
    assert receptive_field(config).tolist() == [1] * 2**n_layer


# ---- Configuration, mixers by name ---------------------------------------------------------------
def test_layers_tile_the_mixers_are_cut_at_the_last_and_softmax_uses_up_no_shift():
    config = GPTConfig(n_layer=5, mixers="ab,softmax", shifts="layer", block_size=128)
    names, shifts = zip(*config.layers, strict=True)
    assert names == ("ab", "softmax", "ab", "softmax", "ab")
    assert shifts == ((1,), (), (2,), (), (4,))
    config = GPTConfig(n_layer=2, mixers="ab,vec,softmax")
    assert [name for name, _ in config.layers] == ["ab", "vec"]


def test_shifts_are_a_ladder_that_starts_again_a_row_of_heads_or_a_list():
    def shifts(**fields):
        return [s for _, s in GPTConfig(**fields).layers]

    ladder = shifts(n_layer=6, shifts="layer", block_size=10)
    assert ladder == [(1,), (2,), (4,), (8,), (1,), (2,)]
    heads = shifts(n_layer=3, n_head=3, n_embd=6, block_size=16)
    assert heads == [(1, 2, 4), (2, 4, 8), (4, 8, 1)]
    listed = shifts(n_layer=4, n_head=2, mixers="ab,ab,softmax", shifts="5+1,2")
    assert listed == [(5, 1), (2,), (), (5, 1)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mixers": "abc"}, "abc.*ab, vec, matrix, gate1, gate2, fusion, mult, softmax"),
        ({"shifts": "0,1"}, "from 1"),
        ({"shifts": "1+2"}, "a head each .4 of them"),
        ({"shifts": "99999999"}, "99999999"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"n_embd": 2**30}, "at most"),
        ({"dropout": 1.0}, "dropout"),
        ({"pos_emb": "sine"}, "learned, rope or none"),
        ({"mixers": "softmax", "n_embd": 12, "n_head": 4}, "even"),
    ],
)
def test_contradicting_configurations_say_what_is_wrong(fields, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**fields)


class MaxPair(torch.nn.Module):
    """y = max(x, z)."""

    def __init__(self, n_embd, n_head):
        super().__init__()

    def forward(self, x, z):
        return torch.maximum(x, z)


class Echo(torch.nn.Module):
    """A mixer of somebody else's on the contract: y = x, and no memory."""

    offsets, uses_shifts = (0,), False

    def __init__(self, config, shifts):
        super().__init__()

    def forward(self, x, cache=None):
        return x

    def init_cache(self, position, max_len=None):
        return None

    def state_size(self, length):
        return 0


def test_one_line_makes_a_pair_function_or_a_mixer_usable_by_name(monkeypatch, data, tmp_path):
    monkeypatch.setitem(PAIRS, "max", MaxPair)
    monkeypatch.setitem(MIXERS, "echo", Echo)
    config = GPTConfig(mixers="echo,max", n_layer=4, shifts="layer")
    assert config.layers == [("echo", ()), ("max", (1,)), ("echo", ()), ("max", (2,))]
    assert receptive_field(config).tolist() == [1, 1, 1, 1]
    model, idx = tiny("max,echo", torch.float64), tokens(2, 20)
    assert torch.allclose(stream(model, idx, [7, 13]), model(idx)[0], atol=1e-9)
    assert "echo" in hsm.layer_table(model) and "max" in MIXERS
    assert train.main([*flags(small(data, tmp_path)), "--mixers", "echo,max"]) == 0
    assert sample.main(["--out", str(tmp_path), "--tokens", "5"]) is None


ALONE = """
import torch
from hsm import GPT, GPTConfig

torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=31, n_layer=3, n_embd=16, n_head=2, mixers="ab,ab,softmax"))
idx = torch.randint(31, (2, 17))
optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
for _ in range(20):
    losses.append(model(idx[:, :-1], idx[:, 1:])[1])
    optimizer.zero_grad()
    losses[-1].backward()
    optimizer.step()
cache = model.init_cache(2)
streamed = torch.cat([model(chunk, cache=cache)[0] for chunk in idx.split(5, dim=1)], dim=1)
assert torch.allclose(streamed, model(idx)[0], atol=1e-5) and losses[-1] < losses[0]
print(len(list(model.generate(idx, 7))))
"""


def test_hsm_py_alone_in_an_empty_folder_trains_streams_and_generates(tmp_path):
    write(tmp_path / "hsm.py", (HERE / "hsm.py").read_bytes())
    running = command("-c", ALONE, cwd=tmp_path)
    out, errors = running.communicate(timeout=60)
    assert out == "7\n", errors


# ---- Parameters and initialisation ---------------------------------------------------------------
SIZES = [
    {"n_layer": 7, "n_head": 4, "n_embd": 64, "block_size": 128},
    {"n_layer": 3, "n_head": 12, "n_embd": 768, "block_size": 1024},
]


@pytest.mark.parametrize("size", SIZES, ids=["small", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"in_proj": True}, {"proj": False}, {"bias": True}])
def test_every_model_has_a_softmax_models_parameters_within_1_percent(size, more):
    def n_params(mixers):
        with torch.device("meta"):
            return GPT(GPTConfig(mixers=mixers, **size, **more)).num_params()

    sizes = [n_params(mixers) for mixers in ("softmax", *MODELS)]
    assert all(abs(size / sizes[0] - 1) < 0.01 for size in sizes), sizes


@pytest.mark.parametrize("mixers", MODELS)
def test_loss_at_initialisation_is_ln_V_and_half_the_logits_variance(mixers):
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(mixers=mixers, vocab_size=65)), tokens(8, 128, vocab_size=65)
    expected = math.log(65) + 0.02**2 * 768 / 2  # ln(sum of V exponentials of normal numbers)
    assert abs(model(idx, idx.roll(-1, 1))[1].item() - expected) < 0.1


# ---- Generation ----------------------------------------------------------------------------------
def test_top_k_and_top_p_keep_only_the_likeliest_tokens():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

    def drawn(**limits):
        generator = torch.Generator().manual_seed(0)
        return set(hsm.sample_token(logits.expand(500, 4), generator=generator, **limits).tolist())

    assert drawn() == drawn(top_k=9) == drawn(top_p=1.0) == {0, 1, 2, 3}
    assert drawn(top_k=2) == drawn(top_p=0.65) == {0, 1}
    assert drawn(top_p=0.75) == {0, 1, 2}
    assert drawn(top_p=0.01) == drawn(temperature=0) == {0}
    flat = torch.full((1, 2**16), 0.1)  # float32's sum of these reaches 1 before the end
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    tokens = [hsm.sample_token(flat, 1, None, p, seeds.pop()) for p in (1.0, None)]
    assert torch.equal(*tokens)


def test_generate_turns_dropout_off_and_the_models_mode_back_also_when_its_user_stops_early():
    model, idx = tiny("ab", dropout=0.5), tokens(1, 3)
    expected = list(model.generate(idx, 10, 0.0))
    model.train()
    assert list(model.generate(idx, 10, 0.0)) == expected
    unfinished = model.generate(idx, 10, 0.0)
    next(unfinished)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_new_tokens": -1}, "-1"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
    ],
)
def test_generate_refuses_values_out_of_range_before_the_first_token(arguments, words):
    with pytest.raises(BadInput, match=words):
        tiny().generate(**{"idx": tokens(1, 3), "max_new_tokens": 2} | arguments)


# ---- prepare_data.py -----------------------------------------------------------------------------
def story(n_words, seed=0):
    """Made-up text with something to learn: words of a small vocabulary, one with an accent."""
    words = "the|cat|sat|on|a|mat|and|saw|naïve|dogs;|then,|it|ran.\n"
    words = np.array(words.split("|"))
    return " ".join(words[np.random.default_rng(seed).integers(len(words), size=n_words)])


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder: characters of a made-up story."""
    folder = tmp_path_factory.mktemp("data")
    prepare_data.prepare("file", write(folder / "story.txt", story(4000)), folder=folder / "ready")
    return folder / "ready"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(tiktoken, "get_encoding", refuse)


def has_gpt2():
    try:
        return bool(prepare_data.Tokenizer({"tokenizer": "gpt2"}))
    except BadInput:
        return False


needs_gpt2 = pytest.mark.skipif(not has_gpt2(), reason="no GPT-2 vocabulary: TIKTOKEN_CACHE_DIR")
TOKENIZERS = ["char", "byte", pytest.param("gpt2", marks=needs_gpt2)]


def prepared_text(folder):
    """What the numbers of both splits say, and the meta."""
    meta = prepare_data.read_meta(folder)
    tokenizer = prepare_data.Tokenizer(meta)
    splits = [train.open_tokens(folder, split, meta) for split in ("train", "val")]
    return "".join(tokenizer.decode(numbers) for numbers in splits), meta


@pytest.mark.parametrize("chunk", [3, 50, 2**20])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prepared_tokens_are_the_texts_tokens_however_it_is_read(
    kind, chunk, tmp_path, monkeypatch
):
    text = story(500) + "\n\n  two  blanks \n<|endoftext|> 你好 🙂\r\n\tend   "
    monkeypatch.setattr(prepare_data, "CHUNK", chunk)
    meta = prepare_data.prepare("file", write(tmp_path / "a.txt", text), kind, tmp_path / "out")
    tokenizer, size = prepare_data.Tokenizer(meta), len(text.encode())
    head, tail = (train.open_tokens(tmp_path / "out", s, meta) for s in ("train", "val"))
    train_text = text.encode()[: size * 9 // 10].decode("utf-8", "ignore")
    if kind != "gpt2" or chunk > 3:  # a piece without any blank is cut as it comes
        assert head.tolist() == tokenizer.encode(train_text).tolist()
        assert tail.tolist() == tokenizer.encode(text[len(train_text) :]).tolist()
    assert tokenizer.decode(head) + tokenizer.decode(tail) == text
    assert meta["train_bytes"] + meta["val_bytes"] == size


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("piece", ["ACGT", "你好世界", " ", "x\t"])
def test_reading_takes_a_time_that_grows_with_the_size_alone(piece, kind, tmp_path):
    began = time.process_time()
    prepare_data.prepare("file", write(tmp_path / "a.txt", piece * 300_000), kind, tmp_path / "out")
    assert time.process_time() - began < 10  # one pass takes one or two seconds


def test_a_folder_means_its_visible_txt_files_in_the_order_of_names(tmp_path, capsys):
    home = tmp_path / "in"
    for name in ("b.txt", "a.TXT", "sub/c.txt"):
        write(home / name, Path(name).stem * 50)
    for name in (".ipynb_checkpoints/b-checkpoint.txt", "._b.txt", "notes.md", "old.txt/x.md"):
        write(home / name, b"\xff no text")
    (home / "a0.txt").symlink_to(home / "b.txt")
    prepare_data.prepare("file", home, folder=home)  # what is made lies beside the texts
    prepare_data.prepare("file", home, folder=home)
    assert prepared_text(home)[0] == "a" * 50 + "b" * 50 + "c" * 50
    assert capsys.readouterr().out.count("3 visible .txt files") == 2


def test_the_same_bytes_are_the_same_tokens_in_a_text_and_in_a_prompt_file(tmp_path):
    text = "\ufefftwo\r\nlines\rand \ufeff more\n" * 30
    path = write(tmp_path / "a.txt", text)
    prepare_data.prepare("file", path, folder=tmp_path / "out")
    read, meta = prepared_text(tmp_path / "out")
    prompt = sample.read_prompt(sample.SampleConfig(prompt_file=str(path)))
    assert prompt == read == text[1:]  # a BOM at the start is no text; elsewhere it is
    assert len(prepare_data.Tokenizer(meta).encode(prompt)) == len(text) - 1


def test_two_programs_that_prepare_one_folder_both_end_well_and_delete_nothing_of_others(tmp_path):
    text, out = write(tmp_path / "a.txt", story(20_000)), tmp_path / "out"
    write(out / "thesis.tmp", "mine")
    with ThreadPoolExecutor() as two:
        with train.FileLock(out / ".lock"):  # as a third one has it
            both = [two.submit(prepare_data.prepare, "file", text, folder=out) for _ in range(2)]
            time.sleep(0.3)
            assert not list(out.glob("train.bin*"))
        assert both[0].result() == both[1].result()
    assert prepared_text(tmp_path / "out")[0] == story(20_000)
    assert (tmp_path / "out" / "thesis.tmp").read_text("utf-8") == "mine"


class Reply(io.BytesIO):
    """What urlopen gives back."""

    def __init__(self, content, length, kind="text/plain"):
        super().__init__(content)
        self.headers = Message()
        self.headers["Content-Length"], self.headers["Content-Type"] = str(length), kind

    def info(self):
        return self.headers


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(b"hello", 5), "cannot download .*not the text"),
        (Reply(b"<html>", 6, "text/html"), "cannot download .*a web page"),
        (Reply(b"hello", 9), "cannot download .*incomplete"),
        (urllib.error.URLError("unreachable"), "cannot download .*unreachable.*stdlib"),
        (http.client.BadStatusLine("garbage"), "cannot download .*garbage"),
        (UnicodeError("label too long"), "cannot download .*too long"),
    ],
)
def test_a_failed_download_says_so_and_leaves_nothing(reply, words, tmp_path, monkeypatch):
    def urlopen(*_, **__):
        if isinstance(reply, Exception):
            raise reply
        return reply

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(BadInput, match=words):
        sha256 = "1234" * ("not the text" in words)
        prepare_data.download("https://example.org/a", tmp_path / "input.txt", sha256)
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_newer_than_its_numbers_is_said(tmp_path, capsys):
    path = write(tmp_path / "input.txt", story(500))
    prepare_data.prepare("shakespeare", folder=tmp_path)
    prepare_data.read_meta(tmp_path)
    assert "newer than what was" not in capsys.readouterr().out
    os.utime(path, (time.time() + 10,) * 2)
    prepare_data.read_meta(tmp_path)
    assert "newer than what was prepared" in capsys.readouterr().out


# ---- train.py ------------------------------------------------------------------------------------
def small(data, out, **more):
    """A run of a few seconds."""
    shape = {"vocab_size": 0, "block_size": 16, "n_layer": 3, "n_head": 2, "n_embd": 16}
    shape |= {name: more.pop(name) for name in list(more) if name in vars(GPTConfig())}
    settings = {"steps": 12, "eval_interval": 5, "warmup": 2, "sample_tokens": 20, "batch_size": 4}
    settings |= {"threads": 1} | more
    return train.TrainConfig(GPTConfig(**shape), data=str(data), out=str(out), **settings)


def flags(config):
    """The command-line words of a configuration."""
    words = []
    for name, value in ({**vars(config.model), **vars(config)}).items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        elif value is not None and name != "model":
            words += [f"--{name}", str(value)]
    return words


def log(out):
    return [json.loads(row) for row in (out / "log.jsonl").read_text("utf-8").splitlines()]


def same_but_for_the_clock(a, b):
    """All tensors bit for bit, and all else but the clock."""
    if isinstance(a, dict):
        names = a.keys() - {"seconds", "elapsed_s", "tokens_per_s", "out", "resume"}
        return a.keys() == b.keys() and all(same_but_for_the_clock(a[n], b[n]) for n in names)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_but_for_the_clock, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """Press Ctrl-C in the middle of that step, or send another signal."""
    batch = train.Windows.batch

    def batch_and_press(self, size, seed, n, *ranks):
        if n == step:
            signal.raise_signal(number)
        return batch(self, size, seed, n, *ranks)

    monkeypatch.setattr(train.Windows, "batch", batch_and_press)


@pytest.mark.parametrize("mixers", ["ab", "gate1", "softmax", "gate2,ab,softmax"])
def test_resuming_after_ctrl_c_equals_an_uninterrupted_run_bit_for_bit(
    mixers, data, tmp_path, monkeypatch, capsys
):
    fields = {"mixers": mixers, "dropout": 0.1, "grad_accum": 2, "optimizer": "muon"}
    assert train.train(small(data, tmp_path / "whole", **fields)).stopped_by == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 14)  # the first batch of step 7
        assert train.train(small(data, tmp_path / "cut", **fields)).stopped_by == signal.SIGINT
    assert f"train.py --resume --out {tmp_path / 'cut'}" in capsys.readouterr().out
    assert train.load_checkpoint(tmp_path / "cut" / "ckpt.pt")["step"] == 8  # the step was ended
    assert train.main(["--resume", "--out", str(tmp_path / "cut")]) == 0  # flags come from there
    for name in ("ckpt.pt", "best.pt"):
        cut, whole = (train.load_checkpoint(tmp_path / run / name) for run in ("cut", "whole"))
        assert same_but_for_the_clock(cut, whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_or_a_closed_terminal_saves_and_ends_with_128_and_its_number_but_not_under_nohup(
    name, data, tmp_path, monkeypatch
):
    number = getattr(signal, name, None) or pytest.skip(f"this system has no {name}")
    interrupt_at(monkeypatch, 7, number)
    before = signal.signal(number, signal.SIG_DFL)
    assert train.main(flags(small(data, tmp_path))) == 128 + number
    assert train.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 8
    signal.signal(number, signal.SIG_IGN)  # what nohup does
    assert train.main(flags(small(data, tmp_path))) == 0
    signal.signal(number, before)


def test_flags_on_resume_are_laid_over_what_the_run_had_and_a_run_that_trained_ends_well(
    data, tmp_path
):
    resume = ["--resume", f"--out={tmp_path}"]
    assert train.main(flags(small(data, tmp_path, block_size=8, eval_tokens=64))) == 0
    assert train.main([*resume, "--eval-tokens", "32", "--steps=13"]) == 0
    (tmp_path / "best.pt").unlink()
    assert train.main([*resume, "--dropout", "0.1", "--weight-decay=0.7", "--steps=15"]) == 0
    best = train.load_checkpoint(tmp_path / "best.pt")
    assert best["config"]["dropout"] == 0.1
    assert best["optimizer"][0]["param_groups"][0]["weight_decay"] == 0.7
    assert [row["step"] for row in log(tmp_path)] == [0, 5, 10, 12, 13, 15]


def test_a_run_leaves_checkpoints_log_picture_and_says_what_came_of_it(data, tmp_path, capsys):
    result = train.train(small(data, tmp_path, steps=150, n_embd=32, lr=1e-2, batch_size=16))
    names = ["step", "train_loss", "val_loss", "val_bpb", "lr", "tokens_per_s", "elapsed_s"]
    assert log(tmp_path) == result.history and all(list(row) == names for row in log(tmp_path))
    assert result.best_loss < 1.2 < 2.5 < result.history[0]["val_loss"]  # it learned
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    best = train.load_checkpoint(tmp_path / "best.pt")
    assert best["best_loss"] == min(row["val_loss"] for row in log(tmp_path)) == result.best_loss
    printed = capsys.readouterr().out
    assert f"python sample.py --out {tmp_path}" in printed
    assert f"{result.best_loss:.4f} nats a token = {result.best_bpb:.4f} bits a byte" in printed
    assert hsm.layer_table(result.model) in printed
    train.train(small(data, tmp_path))  # a second run keeps the first one
    first = {path.name: path for path in (tmp_path / "previous").iterdir()}
    assert first.keys() == {"best.pt", "ckpt.pt", "log.jsonl", "loss.png"}
    assert train.load_checkpoint(first["best.pt"])["best_loss"] == result.best_loss


def test_batches_are_the_corpus_one_token_on_and_depend_on_the_seed_and_the_step_alone(data):
    meta = prepare_data.read_meta(data)
    drawn = train.Windows(data, "train", meta, 16, torch.device("cpu"))
    numbers = torch.from_numpy(train.open_tokens(data, "train", meta).astype(np.int64))
    idx, targets = drawn.at(np.array([5, len(numbers) - 17]))
    assert torch.equal(idx, torch.stack([numbers[5:21], numbers[-17:-1]]))
    assert torch.equal(targets, torch.stack([numbers[6:22], numbers[-16:]]))
    batch = {(seed, n): drawn.batch(4, seed, n)[0] for seed in (1, 2) for n in (0, 1, 2**33)}
    assert torch.equal(batch[1, 1], drawn.batch(4, 1, 1)[0])
    assert len({tuple(idx.flatten().tolist()) for idx in batch.values()}) == len(batch)


def test_a_compiled_run_saves_the_plain_names(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for name, compiles in (("fast", True), ("plain", False)):
        train.train(small(data, tmp_path / name, steps=5, compile=compiles))
    fast, plain = (train.load_checkpoint(tmp_path / d / "ckpt.pt") for d in ("fast", "plain"))
    assert fast["model"].keys() == plain["model"].keys()
    for name, weight in plain["model"].items():
        assert torch.allclose(fast["model"][name], weight, atol=1e-5)


def test_flags_are_choices_of_three_also_in_nanogpts_words_and_a_preset_may_stand_behind(
    monkeypatch,
):
    for words, wanted in (([], None), (["--fast"], True), (["--no-fast"], False)):
        for before in (None, True, False):  # as a checkpoint has it
            default = train.TrainConfig(fast=before)
            config = prepare_data.parse(train.TrainConfig, words, "", default)
            assert config.fast is (wanted if words else before)
    seen, ended = [], train.Result(*[None] * 7, 0)
    monkeypatch.setattr(train, "train", lambda config, saved: seen.append(config) or ended)
    train.main(["--batch_size=4", "shakespeare"])
    train.main(["shakespeare", "--compile=False"])
    train.main(["--compile=True", "--out", "shakespeare"])  # here it is a folder
    assert [config.steps for config in seen] == [5000, 5000, 2600]
    assert [config.batch_size for config in seen] == [4, 64, 8]
    assert [config.compile for config in seen] == [None, False, True]


def test_the_best_device_is_taken_and_a_card_without_bfloat16_computes_in_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = train.pick_device("auto")
    assert device.type == "mps" and train.pick_dtype("auto", device) == torch.float32
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **_: has)
        assert train.pick_dtype("auto", torch.device("cuda")) == dtype


def test_one_thread_is_taken_where_more_of_them_are_slower(monkeypatch):
    now, threads = [0.0], [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for seconds_with_4, expected in ((0.001, 4), (0.01, 1)):

        def clock(seconds_with_4=seconds_with_4):
            now[0] += 0.002 if threads[-1] == 1 else seconds_with_4
            return now[0]

        monkeypatch.setattr(time, "perf_counter", clock)
        assert train.pick_threads() == expected


def losses_are_nan_at(monkeypatch, steps):
    forward, n_calls = GPT.forward, [0]

    def forward_or_nan(self, *arguments, **more):
        logits, loss = forward(self, *arguments, **more)
        n_calls[0] += self.training
        broken = self.training and n_calls[0] - 1 in steps
        return logits, loss * math.nan if broken else loss

    monkeypatch.setattr(GPT, "forward", forward_or_nan)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_whose_gradients_are_no_numbers_changes_no_weight(name, data, tmp_path, monkeypatch):
    losses_are_nan_at(monkeypatch, range(4))
    result = train.train(small(data, tmp_path, steps=4, eval_interval=4, optimizer=name))
    torch.manual_seed(1)
    untouched = GPT(result.model.config).state_dict()
    for name, weight in result.model.state_dict().items():
        assert torch.equal(weight, untouched[name])
    assert result.history[-1]["train_loss"] is None


def test_ten_such_steps_in_a_row_or_too_high_a_rate_leave_the_last_good_checkpoint(
    data, tmp_path, monkeypatch
):
    losses_are_nan_at(monkeypatch, {2, 3, *range(13, 10**6)})
    with pytest.raises(BadInput, match=r"not finite .* in a row.*smaller --lr"):
        train.train(small(data, tmp_path, steps=1000, eval_interval=10))
    assert train.load_checkpoint(tmp_path / "ckpt.pt")["step"] in (10, 20)  # 2, 3 were left out
    monkeypatch.undo()
    with pytest.raises(BadInput, match="smaller --lr"):
        train.main(["--resume", "--out", str(tmp_path), "--steps", "60", "--lr", "1e9"])
    checkpoint = train.load_checkpoint(tmp_path / "ckpt.pt")
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())


def test_a_second_training_into_the_same_folder_is_refused(data, tmp_path, capsys):
    with train.FileLock(tmp_path / ".lock"):
        line = refused(capsys, train, *flags(small(data, tmp_path)))
        assert "another training writes" in line
    train.train(small(data, tmp_path))  # and now it is free


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
@pytest.mark.parametrize("name", ["ckpt.pt", "train.bin"])
def test_a_full_disk_names_the_file_and_what_was_there_survives(name, data, tmp_path, capsys):
    import resource

    train.train(small(data, tmp_path, steps=5))
    source = write(tmp_path / "a.txt", story(40_000))
    prepare_data.prepare("file", source, folder=tmp_path)
    before = (tmp_path / name).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        resume = (train, "--resume", "--out", tmp_path, "--steps", 9)
        again = (prepare_data, "file", source, "--out", tmp_path)
        line = refused(capsys, *(resume if name == "ckpt.pt" else again))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search("cannot write .*[.](pt|bin) .*File too large", line), line
    assert (tmp_path / name).read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_train_prepares_its_corpus_from_input_txt_but_makes_no_folder_elsewhere(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "shakespeare_char"
    write(folder / "input.txt", story(2000)), (tmp_path / "elsewhere").mkdir()
    train.train(small("data/shakespeare_char", "out"))
    assert prepare_data.read_meta(folder)["corpus"] == "shakespeare"
    monkeypatch.chdir(tmp_path / "elsewhere")
    line = refused(capsys, train, "--resume", "--out", tmp_path / "out", "--steps", 14)
    assert "no data/shakespeare_char here; go where it is" in line
    line = refused(capsys, train, "--data", "shakespeare_char")
    assert "--data data/shakespeare_char prepares itself" in line
    assert not list(Path().iterdir())


def test_without_shakespeare_and_network_training_takes_the_standard_library_and_says_so(
    no_network, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    result = train.train(small("data/shakespeare_char", "out", eval_tokens=2000))
    assert "standard library in its place" in capsys.readouterr().out
    assert result.model.config.vocab_size == 256
    assert "class JSONDecoder" in Path("data/stdlib_byte/input.txt").read_text("utf-8")
    assert train.main(["--resume", "--out", "out", "--steps", "14"]) == 0  # it knows where to look


def test_a_damaged_or_foreign_checkpoint_says_so_and_runs_nobodys_code(data, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    train.train(small(data, tmp_path))
    commands = {"ckpt.pt": (train, "--resume", "--steps", 20), "best.pt": (sample,)}
    for name, (module, *words) in commands.items():
        path, whole = tmp_path / name, (tmp_path / name).read_bytes()
        other = train.load_checkpoint(path)
        flipped = whole[: len(whole) // 2] + b"?!" + whole[len(whole) // 2 + 2 :]
        for content in (whole[:3000], b"hello", flipped):
            path.write_bytes(content)
            assert "is no checkpoint" in refused(capsys, module, "--out", tmp_path, *words)
        for items in ({"weights": torch.zeros(2)}, other | {"meta": Trap()}):
            torch.save(items, path)
            assert "is no checkpoint" in refused(capsys, module, "--out", tmp_path, *words)
    train.save_checkpoint(path, **other | {"config": other["config"] | {"n_embd": 32}})
    assert "does not fit" in refused(capsys, sample, "--out", tmp_path)
    assert not (tmp_path / "sprung").exists()


# ---- sample.py -----------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """The folder of a small trained hybrid."""
    out = tmp_path_factory.mktemp("out")
    train.train(small(data, out, mixers="ab,softmax", steps=60))
    return str(out)


def sampled(capsys, *arguments):
    capsys.readouterr()  # what came before
    sample.main(list(arguments))
    return capsys.readouterr()


def test_greedy_text_is_what_the_model_says_without_its_cache_then_comes_speed_and_state(
    trained, capsys
):
    words = ["--out", trained, "--tokens", "60", "--temperature", "0", "--prompt", "the cat"]
    model, tokenizer = sample.load(trained)
    idx = torch.from_numpy(tokenizer.encode("the cat").astype(np.int64))[None]
    text = tokenizer.decode(naive(model, idx, 60)[:, 0].tolist())
    printed = sampled(capsys, *words)
    assert printed.out == f"the cat{text}\n"
    line = printed.err.splitlines()[-1]
    assert re.search(r"[\d,]+ tokens/s", line)
    assert f"state {model.state_bytes(1, 67):,} bytes" in line
    assert f"softmax layers alone keep {2 * 3 * 16 * 16 * 4:,}]" in line  # K, V, 3 layers, window


def test_a_prompt_from_a_file_an_empty_one_and_one_with_a_dash_work_and_a_seed_repeats(
    tmp_path, capsys
):
    prepare_data.prepare("file", write(tmp_path / "a.txt", "- naïve True=\n" * 99), folder=tmp_path)
    train.train(small(tmp_path, tmp_path, steps=1))
    words = ["--out", str(tmp_path), "--tokens", "9"]
    file = str(write(tmp_path / "prompt.txt", "naïve"))
    assert sampled(capsys, *words, "--prompt-file", file).out.startswith("naïve")
    texts = [sampled(capsys, *words, "--seed", seed).out for seed in "112"]
    assert len(texts[0]) == 9 + 1 and texts[0] == texts[1] != texts[2]
    for prompt in ("-a", "nTrue=True", "True"):
        assert sampled(capsys, *words, "--prompt", prompt).out.startswith(prompt)
    line = refused(capsys, sample, *words, "--prompt", "a\\n\udcff", lines=2)
    assert re.search("two characters.*the prompt is not UTF-8", line), line


def test_half_characters_wait_for_their_other_half(tmp_path, capsys):
    prepare_data.prepare("file", write(tmp_path / "a.txt", "你好🙂" * 300), "byte", tmp_path / "d")
    train.train(small(tmp_path / "d", tmp_path / "out", steps=60, n_embd=32, lr=1e-2))
    words = ["--out", str(tmp_path / "out"), "--prompt", "你好", "--temperature", "0"]
    printed = sampled(capsys, *words)
    assert "🙂" in printed.out and printed.out.count("\ufffd") <= 1  # the end may cut one


# ---- Bad input: what was wrong, exit status 2, no traceback, nothing half-written ----------------
def refused(capsys, module, *arguments, lines=1):
    """What a command prints when it refuses: a line of ours, or tyro's box without its frame."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        prepare_data.run(lambda: module.main(list(map(str, arguments))))
    printed = capsys.readouterr()
    assert end.value.code == 2 and "Traceback" not in printed.err, printed
    assert "--help" in printed.err or len(printed.err.splitlines()) == lines, printed
    return " ".join(re.sub(r"[│─╭╮╰╯|+]", " ", printed.err).split())


REFUSED = [
    (train, "quik", "quik.*quick, shakespeare, tinystories, openwebtext"),
    (train, "--mixers abc", "unknown mixer .*abc.*ab, vec, matrix.*softmax"),
    (train, "--n-layr 5", "--n-layr.*Perhaps.*--n-layer"),
    (train, "--n-embd 30", "multiple of n_head"),
    (train, "--n-embd 200000 --n-head 2", "too little memory.*--n-embd"),
    (train, "--steps 0", "steps must be 1"),
    (train, "--batch-size 10000000", "batch_size must be 1"),
    (train, "--lr nan", "lr must be"),
    (train, "--device tpu", "tpu.*auto.*cpu"),
    (train, "--vocab-size 3", "vocab_size=3"),
    (train, "--data nowhere", "nowhere.meta.json is missing.*prepare_data.py"),
    (train, "--resume --out nowhere", "no checkpoint nowhere.*train one first"),
    (prepare_data, "file nowhere.txt", "no text at 'nowhere.txt'"),
    (prepare_data, "stdlib extra", "a path for file alone"),
    (prepare_data, "shakespeare --max-docs 5", "openwebtext alone"),
    (prepare_data, "stdlib --tokenizer gpt2", "TIKTOKEN_CACHE_DIR.*--tokenizer char"),
    (prepare_data, "shakespeare", "cannot download.*input.txt"),
    (sample, "--top-p 1.5", "top_p"),
    (sample, "--prompt Ж", "'Ж' is not among"),
    (sample, "--prompt a --prompt-file b", "not both"),
]


@pytest.mark.parametrize(("module", "arguments", "words"), REFUSED)
def test_bad_input_is_refused_in_clear_words(
    module, arguments, words, data, trained, no_network, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    more = {train: f"--data={data}", sample: f"--out={trained}"}.get(module, "")
    more = [] if not more or more.split("=")[0] in arguments or "--resume" in arguments else [more]
    line = refused(capsys, module, *arguments.split(), *more)
    assert re.search(words, line), line
    assert not [path for path in tmp_path.rglob("*.*") if path.name not in (".lock", "input.txt")]


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("train.bin", lambda meta: b"odd", "train.bin has not"),
        ("val.bin", lambda meta: b"", "val.bin has not"),
        ("meta.json", lambda meta: json.dumps(meta)[:50], "meta.json is damaged"),
        ("meta.json", lambda meta: "[]", "meta.json is damaged"),
        ("meta.json", lambda meta: json.dumps(meta | {"vocab": "z"}), "meta.json is damaged"),
    ],
)
def test_damaged_data_are_refused(name, damage, words, tmp_path, capsys):
    meta = prepare_data.prepare("file", write(tmp_path / "a.txt", story(500)), folder=tmp_path)
    write(tmp_path / name, damage(meta))
    line = refused(capsys, train, *flags(small(tmp_path, tmp_path / "out")))
    assert words in line, line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too short .0 bytes"),
        (b"ab", "too short .2 bytes"),
        (b"good text \xff bad", "not UTF-8 text .near byte 10"),
        (b"cut in a character " * 5 + "ü".encode()[:1], "not UTF-8"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_prepare_refuses_files_that_are_no_text(content, words, tokenizer, tmp_path, capsys):
    source, out = write(tmp_path / "a.txt", content), tmp_path / "out"
    line = refused(capsys, prepare_data, "file", source, "--tokenizer", tokenizer, "--out", out)
    assert re.search(words, line), line
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_resume_refuses_another_shape_or_other_data_and_touches_nothing(data, tmp_path, capsys):
    train.train(small(data, tmp_path / "out"))
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    resume = ["--resume", "--out", tmp_path / "out"]
    assert "n_layer=3, not 4" in refused(capsys, train, *resume, "--n-layer", 4)
    assert "mixers=ab, not vec" in refused(capsys, train, *resume, "--mixers", "vec")
    assert "optimizer=adamw, not muon" in refused(capsys, train, *resume, "--optimizer=muon")
    assert "at step 12 already" in refused(capsys, train, *resume, "--steps", 5)
    prepare_data.prepare("file", write(tmp_path / "b.txt", story(999, 1)), folder=tmp_path / "b")
    assert "other data" in refused(capsys, train, *resume, "--data", tmp_path / "b")
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


# ---- As a user: real processes -------------------------------------------------------------------
def command(*arguments, cwd, environment=(), **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment)
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"} | more
    words = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(words, cwd=cwd, env=environment, **more)


TINY = "--n-layer=2 --n_embd=16 --n-head=2 --block-size=16 --batch-size=4 --threads=1 --out=out"
TINY = TINY.split(" ")


def test_the_three_commands_as_a_user_types_them_and_ctrl_c_between(tmp_path):
    write(tmp_path / "novel.txt", story(3000))
    words = (HERE / "prepare_data.py", "file", "novel.txt", "--out", "data/n")
    prepare = command(*words, cwd=tmp_path)
    out, errors = prepare.communicate(timeout=60)
    assert not errors and prepare.returncode == 0 and "tokens train" in out and "data/n" in out
    words = ("--data", "data/n", "--steps", 100000, "--eval-interval", 1)
    training = command(HERE / "train.py", *words, *TINY, cwd=tmp_path)
    said = [training.stdout.readline() for _ in range(4)]  # the model, then evaluations
    assert re.search(r"step \d+: loss .* bits a byte; [\d,]+ tokens/s, \d+ s left", said[-1])
    training.send_signal(signal.SIGINT)
    out, errors = training.communicate(timeout=60)
    assert training.returncode == 130 and "python train.py --resume --out out" in out
    assert not errors  # no bar where there is no terminal
    writing = command(HERE / "sample.py", "--out", "out", "--tokens", "20", cwd=tmp_path)
    out, line = writing.communicate(timeout=60)
    assert writing.returncode == 0 and len(out) == 21 and "tokens/s" in line


@pytest.mark.skipif(os.name == "nt", reason="descriptors are closed in another way there")
@pytest.mark.slow
@pytest.mark.parametrize("closed", ["reader", "stdout and stderr"])
def test_output_that_nobody_takes_costs_no_steps(closed, data, tmp_path):
    words = ("--data", data, "--steps", 100000, "--eval-interval", 1, *TINY)
    more = {} if closed == "reader" else {"preexec_fn": lambda: os.closerange(1, 3)}
    running = command(HERE / "train.py", *words, cwd=tmp_path, **more)

    def wait_for(condition):
        while not condition():
            assert running.poll() is None
            time.sleep(0.05)

    wait_for((tmp_path / "out" / "log.jsonl").exists)
    if closed == "reader":
        running.stdout.close()
    step = log(tmp_path / "out")[-1]["step"]
    wait_for(lambda: log(tmp_path / "out")[-1]["step"] > step + 5)  # it goes on
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    saved = train.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert saved["step"] >= log(tmp_path / "out")[-1]["step"]


def test_a_word_that_nobody_reads_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as file:
        prepare_data.say("hello", file), prepare_data.say("is anybody there?", file)


def test_a_notebooks_streams_will_do(data, tmp_path, monkeypatch):
    streams = io.StringIO(), io.StringIO()  # they have no reconfigure, no descriptor
    monkeypatch.setattr(sys, "stdout", streams[0]), monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit) as end:
        prepare_data.run(lambda: train.main(flags(small(data, tmp_path))))
    assert end.value.code == 0 and "python sample.py" in streams[0].getvalue()


def test_the_readmes_own_mixer_runs_and_its_links_and_commands_name_real_files():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    running = command("-c", example, cwd=HERE)
    out, errors = running.communicate(timeout=60)
    assert running.returncode == 0 and out.count("max") == GPTConfig().n_layer, errors
    rows = re.findall(r"^[|] (?:train|decode) .*$", readme, re.MULTILINE)
    assert rows and set(rows) <= {*(HERE / "results" / "bench.md").read_text("utf-8").split("\n")}
    for page in (HERE / "README.md", HERE / "results" / "README.md"):
        text = page.read_text(encoding="utf-8")
        names = re.findall(r"\]\((?!http|#)([^)#]+)", text)
        names += re.findall(r"(?:python|bash) ([\w/]+\.(?:py|sh))", text)
        for name in names:
            assert (page.parent / name).exists() or (HERE / name).exists(), name


# ---- Slow: kills, damage, several processes ------------------------------------------------------
@pytest.mark.slow
def test_twelve_kills_at_random_moments_end_in_the_weights_of_an_undisturbed_run(data, tmp_path):
    words = (HERE / "train.py", "--data", data, "--steps", 2000, "--eval-interval", 20, *TINY)
    whole = command(*words, "--out=whole", cwd=tmp_path)
    assert whole.wait(timeout=200) == 0
    generator, more, out = np.random.default_rng(0), [], tmp_path / "out"
    for _ in range(12):
        n_before = len(log(out)) if more else 0
        running = command(*words, *more, cwd=tmp_path)
        while not (out / "log.jsonl").exists() or len(log(out)) == n_before:
            assert running.poll() is None
        time.sleep(generator.uniform(0, 0.5))
        running.kill()
        running.communicate()
        more = ["--resume"] if (out / "ckpt.pt").exists() else []
    assert command(*words, *more, cwd=tmp_path).wait(timeout=200) == 0
    cut, whole = (train.load_checkpoint(tmp_path / run / "ckpt.pt") for run in ("out", "whole"))
    assert same_but_for_the_clock(cut, whole)


has_gloo = torch.distributed.is_gloo_available()
needs_gloo = pytest.mark.skipif(not has_gloo, reason="this torch has no gloo")


def processes(n, *arguments, cwd):
    """The same command as n processes that find each other, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_PORT": str(free.getsockname()[1]), "MASTER_ADDR": "127.0.0.1"}
    place |= {"WORLD_SIZE": str(n)}
    ranks = [place | {"RANK": f"{r}", "LOCAL_RANK": f"{r}"} for r in range(n)]
    return [command(*arguments, cwd=cwd, environment=environment) for environment in ranks]


@pytest.mark.slow
@needs_gloo
def test_two_processes_train_like_one_with_the_same_batch(data, tmp_path):
    one = train.train(small(data, tmp_path / "one", steps=50, grad_accum=2))
    words = flags(small(data, tmp_path / "two", steps=50, grad_accum=2))
    for more in ([], ["--resume", "--steps", "55"]):
        both = processes(2, HERE / "train.py", *words, *more, cwd=tmp_path)
        outputs = [process.communicate(timeout=120) for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        assert not outputs[1][0]  # only rank 0 speaks
    assert [row["step"] for row in log(tmp_path / "two")] == [*range(0, 56, 5)]
    for a, b in zip(one.history, log(tmp_path / "two"), strict=False):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-4)


@pytest.mark.slow
@needs_gloo
def test_when_one_process_dies_the_other_ends_with_a_line(data, tmp_path):
    words = flags(small(data, tmp_path / "out", steps=10**6))
    left, right = processes(2, HERE / "train.py", *words, cwd=tmp_path)
    while not (tmp_path / "out" / "ckpt.pt").exists():
        assert left.poll() is None and right.poll() is None
        time.sleep(0.05)
    right.kill()
    _, errors = left.communicate(timeout=60)
    right.communicate()
    assert left.returncode == 2
    assert "if another process ended: --resume" in errors.splitlines()[-1]


# ---- On a GPU ------------------------------------------------------------------------------------
@gpu
@pytest.mark.parametrize("mixers", ["ab", "softmax", "gate2,ab,softmax"])
def test_on_cuda_a_real_graph_draws_the_plain_paths_tokens_and_a_seed_repeats_them(mixers):
    skip_without("cuda")
    for n_prompt in (1, 13, 20):
        model, idx = tiny(mixers, torch.float64).cuda(), tokens(2, n_prompt).cuda()
        replayed = torch.stack(list(model.generate(idx, 60, 0.0)))
        assert torch.equal(replayed, naive(model, idx, 60))
        seeds = [torch.Generator("cuda").manual_seed(1) for _ in range(2)]
        once, twice = (torch.stack(list(model.generate(idx, 60, generator=g))) for g in seeds)
        assert torch.equal(once, twice)


@gpu
def test_on_cuda_a_run_saves_is_read_on_a_cpu_and_resumes(data, tmp_path):
    skip_without("cuda")
    result = train.train(small(data, tmp_path, mixers="ab,softmax", dropout=0.1))
    assert result.model.cpu()(torch.zeros(1, 9, dtype=torch.int64))[0].isfinite().all()
    model, _ = sample.load(tmp_path, "last", "cpu")
    assert not model.wte.weight.is_cuda
    assert train.main(["--resume", "--out", str(tmp_path), "--steps", "20"]) == 0


@gpu
def test_on_cuda_half_precision_learns_as_float32_does(data, tmp_path):
    skip_without("cuda")
    losses = {}
    for dtype in ("float32", "bfloat16", "float16"):  # float16 with its scaler: as on a T4
        config = small(data, tmp_path / dtype, steps=50, dtype=dtype, compile=False)
        losses[dtype] = train.train(config).history[-1]["val_loss"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    assert losses["float16"] == pytest.approx(losses["float32"], rel=0.01)


# ---- Properties of any configuration -------------------------------------------------------------
numbers = st.integers(1, 5)  # what contradicts has a test of its own
configurations = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 9),
        "n_layer": numbers,
        "n_head": st.integers(1, 3),
        "n_embd": st.sampled_from([6, 12, 13]),
        "mixers": st.lists(st.sampled_from([*MIXERS]), min_size=1, max_size=3).map(",".join),
        "shifts": st.one_of(
            st.sampled_from(["layer", "heads", "x"]),
            st.lists(numbers, min_size=1, max_size=3).map(lambda s: ",".join(map(str, s))),
            st.lists(numbers, min_size=2, max_size=3).map(lambda s: "+".join(map(str, s))),
        ),
        "proj": st.booleans(),
        "in_proj": st.booleans(),
        "d_ff": st.integers(0, 7),
        "pos_emb": st.sampled_from(["learned", "rope", "none"]),
        "bias": st.booleans(),
    }
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(configurations, st.integers(1, 9), st.integers(0, 10**6))
def test_any_configuration_is_causal_and_streams_exactly_or_says_what_is_wrong(fields, T, seed):
    try:
        model = tiny(dtype=torch.float64, **fields)
    except BadInput as error:
        assert "\n" not in str(error) and len(str(error)) > 10
        return
    T = min(T, model.config.block_size)
    idx = tokens(2, T, seed=seed)
    with torch.no_grad():
        logits, _ = model(idx)
        streamed = stream(model, idx, random_chunks(T, seed))
        changed = idx.clone()
        changed[:, -1] = (idx[:, -1] + 1) % 31
        assert torch.equal(model(changed)[0][:, :-1], logits[:, :-1])
        assert (streamed - logits).abs().max() <= 1e-10 * max(1, logits.abs().max())
