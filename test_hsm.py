"""Each test states one fact, in its name. Run with:  pytest -q

The tests that go over PAIRS or MODELS take a new pair function up the moment it has a name there.
"""

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
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import decode
import hsm
import prepare_data
import sample
import train
from decode import Decoder
from hsm import GPT, PAIRS, BadInput, DelayLine, GPTConfig, KVCache, delay, receptive_field
from results import robust

torch.set_num_threads(1)  # small tensors: threads that wait for each other are far slower

HYBRIDS = ["softmax", "ab,softmax", "gate2,ab,softmax", "softmax,vec"]
MODELS = [*PAIRS, *HYBRIDS]


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


# ------------------------------------------------------------------------------------------------
# The delay


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 6, 7, 8, 100])
def test_delay_moves_tokens_by_shift_and_fills_with_zeros_also_beyond_T(shift):
    x = torch.randn(2, 7, 3)
    y = delay(x, shift)
    assert y.shape == x.shape
    for t in range(7):
        expected = x[:, t - shift] if t >= shift else torch.zeros(2, 3)
        assert torch.equal(y[:, t], expected)


@pytest.mark.parametrize("shift", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("seed", range(3))
def test_delay_line_equals_delay_for_any_chunks(shift, seed):
    x = torch.randn(2, 30, 3)
    line = DelayLine(shift)
    y = torch.cat([line(chunk) for chunk in x.split(random_chunks(30, seed), dim=1)], dim=1)
    assert torch.equal(y, delay(x, shift))


def test_delay_line_keeps_shift_inputs_however_long_the_stream():
    line = DelayLine(5)
    for _ in range(200):
        line(torch.randn(2, 3, 4))
    assert line.ring.shape == (2, 5, 4)


def test_kv_cache_takes_no_more_than_its_capacity_however_long_the_stream():
    cache = KVCache(window=8, capacity=16)
    k = torch.arange(200.0)[None, None, :, None]
    for t in range(200):
        seen, _ = cache(k[:, :, t : t + 1], k[:, :, t : t + 1])
        assert torch.equal(seen.flatten(), torch.arange(max(0, t - 7), t + 1.0))
        assert cache.kv.size(3) == 16


# ------------------------------------------------------------------------------------------------
# Causality


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
    for t in (0, 9, 15):
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        touched = gradient[0].abs().sum(-1) > 0  # (T,)
        reach = len(receptive_field(model.config)) - 1
        expected = [0 <= t - k <= reach for k in range(16)]
        assert touched.tolist() == expected


# ------------------------------------------------------------------------------------------------
# Streaming


STREAMS = [
    {},
    {"shifts": "layer"},
    {"shifts": "3,1+7"},
    {"proj": False},
    {"in_proj": True},
    {"n_head": 4, "bias": True},
    {"pos_emb": "none"},
    {"pos_emb": "learned", "block_size": 64},
]


@pytest.mark.parametrize("fields", STREAMS, ids=str)
@pytest.mark.parametrize("mixers", MODELS)
def test_streaming_equals_parallel(mixers, fields):
    idx = tokens(2, 50)  # three windows of a softmax layer and a bit
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = tiny(mixers, dtype, **fields)
        with torch.no_grad():
            parallel, _ = model(idx)
            scale = parallel.abs().max()
            for sizes in ([50], [1] * 50, [17, 33], random_chunks(50, 0), random_chunks(50, 1)):
                streamed = stream(model, idx, sizes)
                assert (streamed - parallel).abs().max() <= tolerance * scale


def test_a_cache_that_was_told_its_length_takes_longer_streams_too():
    model, idx = tiny("ab,softmax", torch.float64), tokens(1, 50)
    streamed = stream(model, idx, [1] * 50, max_len=5)
    assert torch.allclose(streamed, model(idx)[0], atol=1e-10)


@pytest.mark.parametrize("mixers", MODELS)
def test_last_only_gives_the_last_logits(mixers):
    model, idx = tiny(mixers), tokens(2, 9)
    last, _ = model(idx, last_only=True)
    assert last.shape == (2, 1, 31)
    assert torch.allclose(last, model(idx)[0][:, -1:], atol=1e-5)


@pytest.mark.parametrize("pos_emb", ["none", "rope", "learned"])
@pytest.mark.parametrize("mixers", MODELS)
def test_greedy_text_is_the_same_with_and_without_the_cache_far_past_block_size(mixers, pos_emb):
    model, idx = tiny(mixers, torch.float64, pos_emb=pos_emb), tokens(2, 5)
    cached, naive = (list(model.generate(idx, 40, 0.0, use_cache=c)) for c in (True, False))
    assert torch.equal(torch.stack(cached), torch.stack(naive))


def test_a_prompt_longer_than_learned_positions_is_cut_to_its_end():
    model, idx = tiny("ab", pos_emb="learned"), tokens(1, 40)
    whole, end = (list(model.generate(i, 10, 0.0)) for i in (idx, idx[:, -16:]))
    assert whole == end


def test_learned_positions_past_block_size_are_an_error_in_forward():
    model = tiny("ab", pos_emb="learned")
    with pytest.raises(BadInput, match="block_size=16"):
        model(tokens(1, 17))
    cache = model.init_cache(1)
    model(tokens(1, 16), cache=cache)
    with pytest.raises(BadInput, match="block_size=16"):
        model(tokens(1, 1), cache=cache)


def test_a_softmax_layer_sees_block_size_tokens_and_no_more():
    model, idx = tiny("softmax", torch.float64, n_layer=1), tokens(1, 30)
    changed = idx.clone()
    changed[0, 13] = (idx[0, 13] + 1) % 31
    same = (model(idx)[0] == model(changed)[0]).all(dim=-1)[0]  # (T,)
    assert same.tolist() == [t < 13 or t >= 13 + 16 for t in range(30)]


@pytest.mark.parametrize("mixers", MODELS)
@pytest.mark.parametrize("length", [3, 16, 50])
def test_state_bytes_is_what_a_stream_must_keep(mixers, length):
    model = tiny(mixers)
    cache = model.init_cache(2)
    model(tokens(2, length), cache=cache)
    kept = 0
    for state in cache.layers:
        if isinstance(state, KVCache):
            _, B, H, _, D = state.kv.shape
            kept += 2 * B * H * min(state.n_seen, state.window) * D
        else:
            kept += sum(line.ring.numel() for line in state)
    assert model.state_bytes(2, length) == 4 * kept


# ------------------------------------------------------------------------------------------------
# decode.py: the same stream in fixed shapes, its position on the device


def after(model, prompt, max_len=math.inf, n_before=0):
    """A Decoder for a stream that has read the prompt; its first token has number n_before."""
    cache = model.init_cache(len(prompt))
    cache.n_seen = n_before
    for state in cache.layers:
        for part in [state] if isinstance(state, KVCache) else state:
            part.n_seen = n_before
    model(prompt, cache=cache)
    return Decoder(model, cache, max_len)


@torch.no_grad()
def decoded(decoder, idx):
    """Logits of the tokens in idx, fed one by one: (B, T, V)."""
    return torch.cat([decoder(token).clone() for token in idx.split(1, dim=1)], dim=1)


STATIC = [
    {},
    {"shifts": "layer", "in_proj": True},
    {"shifts": "3,40,7"},  # 40 is longer than all prompts but one
    {"n_head": 4, "bias": True, "proj": False},
    {"pos_emb": "none"},
    {"block_size": 1},
]


@pytest.mark.parametrize("fields", STATIC, ids=str)
@pytest.mark.parametrize("mixers", MODELS)
def test_a_decoder_goes_on_where_the_prompt_ended(mixers, fields):
    model = tiny(mixers, torch.float64, **fields)
    for batch, n_prompt in [(3, 1), (1, 9), (1, 14), (3, 15), (1, 16), (3, 45)]:
        idx = tokens(batch, n_prompt + 40)
        with torch.no_grad():
            parallel = model(idx)[0]
            streamed = stream(model, idx, [n_prompt] + [1] * 40)
            logits = decoded(after(model, idx[:, :n_prompt]), idx[:, n_prompt:])
        for expected in (parallel, streamed):
            assert (logits - expected[:, n_prompt:]).abs().max() <= 1e-10 * parallel.abs().max()


@pytest.mark.parametrize("mixers", ["ab", "softmax", "gate2,ab,softmax"])
def test_a_decoder_is_right_a_thousand_tokens_past_the_window_and_takes_no_memory(mixers):
    model, idx = tiny(mixers, shifts="3,40,7"), tokens(2, 1500)
    decoder = after(model, idx[:, :5])
    parts = [layer[0] if isinstance(layer, list) else layer for layer in decoder.cache.layers]
    state = [t for part in parts for t in vars(part).values() if torch.is_tensor(t)]
    places = [t.data_ptr() for t in state]
    logits = decoded(decoder, idx[:, 5:])
    with torch.no_grad():
        expected = stream(model, idx, 100)[:, 5:]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert [t.data_ptr() for t in state] == places
    numbers = sum(t.numel() for t in state if t.is_floating_point())
    assert 4 * numbers == model.state_bytes(2, 1500)
    assert decoder.cache.n_seen == 1500


@pytest.mark.parametrize("mixers", ["ab", "softmax", "ab,softmax"])
def test_a_decoder_is_right_beyond_2_to_the_31_tokens(mixers):
    model, idx = tiny(mixers, torch.float64, shifts="3,1,7"), tokens(2, 60)
    with torch.no_grad():
        expected = model(idx)[0][:, 20:]  # a stream that begins later differs in no logit
    logits = decoded(after(model, idx[:, :20], n_before=2**31 - 30), idx[:, 20:])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    decoder = after(model, idx[:, :20], n_before=2**40)
    logits = decoded(decoder, idx[:, 20:])  # an angle of 2^40 is good to 1e-4 in float64
    assert (logits - expected).abs().max() <= 1e-2 * expected.abs().max()
    assert decoder.cache.n_seen == 2**40 + 60


def test_a_decoder_told_its_length_takes_memory_for_no_more_and_ends_there():
    model, idx = tiny("ab,softmax", torch.float64), tokens(2, 13)
    decoder = after(model, idx[:, :4], max_len=12)
    expected = model(idx)[0][:, 4:12]
    assert torch.allclose(decoded(decoder, idx[:, 4:12]), expected, atol=1e-10)
    with pytest.raises(BadInput, match="length that its cache was made for"):
        decoder(idx[:, 12:])
    assert torch.isfinite(decoded(after(model, idx, max_len=16), tokens(2, 40))).all()
    assert torch.isfinite(decoded(after(tiny("ab"), idx, max_len=13), tokens(2, 40))).all()


def test_a_decoder_refuses_another_batch_and_a_cache_without_a_prompt():
    model = tiny("ab")
    for shape in ((1, 1), (2, 2), (2,)):  # any of them could be taken for (2, 1) by broadcasting
        with pytest.raises(BadInput, match="takes 2 x 1 tokens"):
            after(model, tokens(2, 3))(tokens(*shape))
    with pytest.raises(BadInput, match="has read a token"):
        Decoder(model, model.init_cache(2))


def test_a_decoder_takes_memory_over_layer_by_layer(monkeypatch):
    taken = []

    def begin(self, plain, *_):
        assert not any(before() for before in taken)  # none of the layers before is still there
        taken.append(weakref.ref(plain))

    monkeypatch.setattr(decode.StaticKV, "__init__", begin)
    after(tiny("softmax"), tokens(2, 3))
    assert len(taken) == 4


def test_a_decoder_without_a_user_frees_its_memory_at_once():
    gone = weakref.ref(after(tiny("ab,softmax"), tokens(2, 3)).idx)
    assert gone() is None


@pytest.mark.parametrize("mixers", ["ab", "gate2,ab,softmax"])
def test_a_compiled_decoder_has_no_graph_break_and_compiles_once(mixers):
    torch.compiler.reset()
    model, idx = tiny(mixers, shifts="3,40,7"), tokens(2, 60)
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    cache = model.init_cache(2)
    with torch.no_grad():
        expected = stream(model, idx, 60)[:, 5:]
        model(idx[:, :5], cache=cache)
        logits = decoded(
            Decoder(torch.compile(model, fullgraph=True, backend=backend), cache), idx[:, 5:]
        )
    assert len(compiled) == 1
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


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
    """Tensors claim to be on CUDA, and decode.py's calls there meet the stand-in. Its graphs."""
    graphs = []

    class Stream:
        def __init__(self, *_):
            pass

        def wait_stream(self, other):
            assert isinstance(other, Stream) and other is not self

    def new_graph():
        graphs.append(FakeGraph())
        return graphs[-1]

    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return graphs


@pytest.mark.parametrize("n_prompt", [1, 13, 20])  # 13: the keys' ring gets full while it replays
@pytest.mark.parametrize("mixers", MODELS)
def test_generate_on_cuda_replays_one_graph_and_draws_the_same_tokens(
    mixers, n_prompt, fake_cuda, monkeypatch
):
    model, idx = tiny(mixers, torch.float64), tokens(2, n_prompt)

    def text():
        generator = torch.Generator().manual_seed(1)
        return torch.stack(list(model.generate(idx, 60, 0.8, top_k=9, generator=generator)))

    replayed = text()
    (graph,) = fake_cuda
    assert graph.n_replays == 60 - 1 - decode.WARM_UP
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    assert torch.equal(text(), replayed)
    assert len(fake_cuda) == 1


def test_the_stand_in_for_a_graph_shows_what_a_capture_forbids_or_freezes(fake_cuda):
    count, plain = torch.zeros((), dtype=torch.int64), [0]

    def step():
        count.add_(1)
        plain[0] += 1
        return count * 100 + plain[0]

    call = decode.as_graph(step, "cpu")
    seen = [call().item() for _ in range(decode.WARM_UP + 3)]
    assert seen[: decode.WARM_UP + 1] == [100 * i + i for i in range(1, decode.WARM_UP + 2)]
    assert seen[-1] == 100 * (decode.WARM_UP + 3) + decode.WARM_UP + 1  # a Python number stays
    waits = decode.as_graph(lambda: count.item(), "cpu")
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        for _ in range(decode.WARM_UP + 1):
            waits()


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [({"pos_emb": "learned"}, {}), ({}, {"use_cache": False}), ({}, {"max_new_tokens": 1})],
    ids=["learned positions", "no cache", "a single token"],
)
def test_generate_captures_nothing_where_shapes_change_or_nothing_follows(
    fields, arguments, fake_cuda
):
    model = tiny("ab,softmax", **fields)
    text = list(model.generate(tokens(2, 3), **{"max_new_tokens": 30} | arguments))
    assert len(text) == arguments.get("max_new_tokens", 30)
    assert not fake_cuda


def test_generate_under_autocast_captures_nothing(fake_cuda, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert len(list(tiny().generate(tokens(2, 3), 10))) == 10
    assert not fake_cuda


def test_on_cuda_the_bench_decodes_both_models_as_graphs_and_times_replays_alone(fake_cuda):
    config = bench.BenchConfig(n_layer=1, n_head=2, n_embd=16, rounds=3, positions=(8, 24))
    times, facts = bench.measure_decode(config, 8, 2, torch.device("cpu"), torch.float32)
    assert facts["graph"] and len(times["hsm"]) == len(times["softmax"]) == 3
    assert [graph.n_replays for graph in fake_cuda] == [1 + 3 * 8] * 2
    masks = [torch.ops.aten.le.Tensor in [call[0] for call in graph.calls] for graph in fake_cuda]
    assert masks == [False, False]  # softmax reads filled slots alone
    assert facts["state_bytes"]["softmax"] == 4 * 2 * 2 * 16 * 8
    row = {"T": 8, "batch": 2, "seconds": times} | facts
    assert facts["steps"] == {"hsm": "static", "softmax": "static"}
    assert "A token is one CUDA graph." in bench.decode_table([row])
    del row["graph"], row["steps"]  # a log's row from before
    assert "graph" not in bench.decode_table([row])


def test_with_compile_the_bench_decodes_each_model_in_its_fastest_way(monkeypatch):
    """Each way is tried; here the clock says that HSM is fastest compiled and softmax plain."""
    tried, compiled = [], []

    def seconds(call, repeats, device):
        call()
        step = ["plain", "static", "compiled"][len(tried) % 3]
        tried.append(step)
        is_softmax = len(tried) > 9
        return 1.0 if step == ("plain" if is_softmax else "compiled") else 2.0

    monkeypatch.setattr(bench, "seconds", seconds)
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    monkeypatch.setattr(
        bench, "race", lambda makers, *_, **__: ({m: makers[m]() for m in makers}, {})
    )
    config = bench.BenchConfig(n_layer=1, n_head=2, n_embd=16, positions=(8, 24), compile=True)
    _, facts = bench.measure_decode(config, 8, 2, torch.device("cpu"), torch.float32)
    assert facts["steps"] == {"hsm": "compiled", "softmax": "plain"}
    assert len(tried) == 18 and len(compiled) == 2
    row = {"T": 8, "batch": 2, "seconds": {"hsm": [1.0, 1.0], "softmax": [2.0, 2.0]}} | facts
    text = bench.decode_table([row])
    assert "step for HSM: compiled." in text and "step for softmax: plain." in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: a real capture")
@pytest.mark.parametrize("mixers", MODELS)
def test_a_real_cuda_graph_draws_the_plain_paths_tokens(mixers):
    for n_prompt in (1, 13, 20):
        model, idx = tiny(mixers, torch.float64).cuda(), tokens(2, n_prompt).cuda()
        replayed = torch.stack(list(model.generate(idx, 60, 0.0)))
        plain = torch.stack(list(model.cpu().generate(idx.cpu(), 60, 0.0)))
        assert torch.equal(replayed.cpu(), plain)


# ------------------------------------------------------------------------------------------------
# Receptive field


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
        {"shifts": "layer", "n_layer": 9},
        {"shifts": "heads"},
        {"shifts": "heads", "n_head": 4, "n_layer": 5},
        {"shifts": "1,3,3,10", "n_layer": 5},
        {"shifts": "1+3,2+5,7", "n_layer": 4},
    ],
)
def test_receptive_field_equals_what_autograd_sees_on_a_linear_model(fields):
    config = GPTConfig(**{"block_size": 32, "n_layer": 3, "n_head": 2, "n_embd": 8} | fields)
    counted = paths_by_gradient(config)
    assert receptive_field(config).tolist() == counted.tolist()


@pytest.mark.parametrize("n_layer", [1, 2, 3, 7, 10])
def test_each_distance_has_exactly_one_path(n_layer):
    config = GPTConfig(block_size=2**n_layer, n_layer=n_layer, shifts="layer")
    assert [s for _, (s,) in config.layers] == [2**j for j in range(n_layer)]
    assert receptive_field(config).tolist() == [1] * 2**n_layer


def test_receptive_field_is_exact_where_int64_is_not():
    field = receptive_field(GPTConfig(block_size=2, n_layer=100, shifts="layer"))
    assert field.tolist() == [math.comb(100, k) for k in range(101)]


def test_receptive_field_of_softmax_is_every_distance_in_its_window():
    field = receptive_field(GPTConfig(block_size=8, n_layer=2, mixers="ab,softmax", shifts="layer"))
    assert field.tolist() == [1, 2, 2, 2, 2, 2, 2, 2, 1]


# ------------------------------------------------------------------------------------------------
# Configuration


def test_layers_tile_the_mixers_and_softmax_uses_up_no_shift():
    config = GPTConfig(n_layer=5, mixers="ab,softmax", shifts="layer", block_size=128)
    names, shifts = zip(*config.layers, strict=True)
    assert names == ("ab", "softmax", "ab", "softmax", "ab")
    assert shifts == ((1,), (), (2,), (), (4,))


def test_mixers_are_cut_at_the_last_layer():
    config = GPTConfig(n_layer=2, mixers="ab,vec,softmax")
    assert [name for name, _ in config.layers] == ["ab", "vec"]


def test_layer_shifts_start_again_after_ceil_log2_of_block_size():
    config = GPTConfig(n_layer=6, shifts="layer", block_size=10)
    assert [s for _, (s,) in config.layers] == [1, 2, 4, 8, 1, 2]


def test_head_shifts_are_2_to_the_j_plus_h():
    config = GPTConfig(n_layer=3, n_head=3, n_embd=6, shifts="heads", block_size=16)
    assert [s for _, s in config.layers] == [(1, 2, 4), (2, 4, 8), (4, 8, 1)]


def test_explicit_shifts_tile_over_the_hsm_layers():
    config = GPTConfig(n_layer=5, mixers="ab,ab,softmax", shifts="5,1,2")
    assert [s for _, s in config.layers] == [(5,), (1,), (), (2,), (5,)]
    config = GPTConfig(n_layer=4, n_head=2, mixers="ab,ab,softmax", shifts="5+1,2")
    assert [s for _, s in config.layers] == [(5, 1), (2,), (), (5, 1)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mixers": "abc"}, "abc.*ab, vec, matrix, gate1, gate2, fusion, mult, softmax"),
        ({"mixers": ""}, "choose from"),
        ({"mixers": "ab,"}, "choose from"),
        ({"shifts": "1,two"}, "1,two"),
        ({"shifts": "1,,2"}, "1,,2"),
        ({"shifts": ""}, "shifts"),
        ({"shifts": "0,1"}, "from 1"),
        ({"shifts": "-1"}, "from 1"),
        ({"shifts": "1+2"}, "a head each .4 of them"),
        ({"shifts": "1+2+4+"}, "1.2.4."),
        ({"shifts": "1+2+4+0"}, "from 1"),
        ({"shifts": "99999999"}, "99999999"),
        ({"n_embd": 30}, "multiple of n_head"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"n_head": 0}, "n_head must be at least 1"),
        ({"n_embd": -4}, "n_embd must be at least 1"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"d_ff": -1}, "d_ff"),
        ({"dropout": 1.0}, "dropout"),
        ({"pos_emb": "sine"}, "learned, rope or none"),
        ({"mixers": "softmax", "n_embd": 12, "n_head": 4}, "even"),
    ],
)
def test_contradicting_configurations_say_what_is_wrong(fields, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**fields)


# ------------------------------------------------------------------------------------------------
# Parameters and initialisation


SIZES = [
    {"n_layer": 7, "n_head": 4, "n_embd": 64, "block_size": 128},
    {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
]


@pytest.mark.parametrize("size", SIZES, ids=["small", "gpt2"])
@pytest.mark.parametrize("flags", [{}, {"in_proj": True}, {"proj": False}, {"bias": True}])
@pytest.mark.parametrize("mixers", MODELS)
def test_every_model_has_a_softmax_models_parameters_within_1_percent(mixers, size, flags):
    with torch.device("meta"):
        model, baseline = (GPT(GPTConfig(mixers=m, **size, **flags)) for m in (mixers, "softmax"))
    assert abs(model.num_params() / baseline.num_params() - 1) < 0.01


def test_num_params_counts_tables_only_when_asked():
    model = tiny("ab", pos_emb="learned")
    everything = sum(p.numel() for p in model.parameters())
    assert model.num_params(non_embedding=False) == everything
    assert model.num_params() == everything - 31 * 16 - 16 * 16


VARIANCE = 0.02**2 * 768  # of the logits at the start, at any width


@pytest.mark.parametrize("mixers", MODELS)
def test_loss_at_initialisation_is_ln_V_and_half_the_logits_variance(mixers):
    torch.manual_seed(0)
    model = GPT(GPTConfig(mixers=mixers, vocab_size=65))
    idx = tokens(8, 128, vocab_size=65)
    expected = math.log(65) + VARIANCE / 2  # ln(sum of V exponentials of normal numbers)
    assert abs(model(idx, idx.roll(-1, 1))[1].item() - expected) < 0.1


@pytest.mark.parametrize("n_embd", [32, 256])
@pytest.mark.parametrize("mixers", ["ab", "matrix", "softmax"])
def test_what_a_linear_map_makes_of_a_norm_does_not_depend_on_the_width(mixers, n_embd):
    torch.manual_seed(0)
    model = GPT(GPTConfig(mixers=mixers, vocab_size=500, n_embd=n_embd, pos_emb="learned"))
    for linear in [model.blocks[0].mlp.up, model.wte]:
        y = F.linear(F.layer_norm(torch.randn(500, n_embd), (n_embd,)), linear.weight)
        assert y.var().item() == pytest.approx(VARIANCE, rel=0.1)
    down = model.blocks[0].mlp.down.weight
    scale = 1 / (2 * model.config.n_layer)
    assert down.var().item() * down.size(1) == pytest.approx(scale * VARIANCE, rel=0.1)
    assert model.wpe.weight.var().item() * n_embd == pytest.approx(VARIANCE, rel=0.1)


@pytest.mark.parametrize("mixers", ["ab", "vec", "matrix"])
def test_what_writes_to_the_residual_stream_starts_small_with_and_without_a_projection(mixers):
    x, std = torch.randn(8, 100, 256), {}
    for proj in (True, False):
        torch.manual_seed(0)
        model = GPT(GPTConfig(mixers=mixers, vocab_size=9, n_embd=256, n_layer=18, proj=proj))
        std[proj] = model.blocks[3].mixer(x).std().item()
    assert 0.05 < std[True] < 0.15 and 0.05 < std[False] < 0.15  # 1 / sqrt(2 n_layer) = 0.17


@pytest.mark.parametrize("mixers", MODELS)
def test_overfits_one_batch(mixers):
    torch.manual_seed(0)
    model = GPT(GPTConfig(mixers=mixers, vocab_size=31, block_size=16, n_layer=4, n_embd=32))
    idx = tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_targets_of_minus_one_do_not_count():
    model, idx = tiny("ab"), tokens(1, 8)
    targets = idx.clone()
    targets[:, 3:] = -1
    logits, loss = model(idx, targets)
    expected = torch.nn.functional.cross_entropy(logits[0, :3], targets[0, :3])
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("mixers", MODELS)
def test_layer_table_names_every_layer_and_its_parameters(mixers):
    model = tiny(mixers)
    rows = hsm.layer_table(model).splitlines()
    for row, (name, _), block in zip(rows[1:], model.config.layers, model.blocks, strict=False):
        assert row.split()[1] == name
        assert f"{hsm.n_params(block):,}" in row
    assert str(len(receptive_field(model.config)) - 1) in rows[-2]


# ------------------------------------------------------------------------------------------------
# Generation


def test_generate_is_repeatable_with_a_seed_and_differs_without():
    model, idx = tiny("ab"), tokens(2, 3)

    def text(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack(list(model.generate(idx, 20, generator=generator)))

    assert torch.equal(text(1), text(1))
    assert not torch.equal(text(1), text(2))


def test_top_k_and_top_p_keep_only_the_likeliest_tokens():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

    def drawn(**limits):
        generator = torch.Generator().manual_seed(0)
        rows = logits.expand(500, 4)
        return set(hsm.sample_token(rows, generator=generator, **limits).tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_k=9) == {0, 1, 2, 3}
    assert drawn(top_p=0.65) == {0, 1}
    assert drawn(top_p=0.75) == {0, 1, 2}
    assert drawn(top_p=0.01) == {0}
    assert drawn(temperature=0) == {0}


def test_generate_turns_dropout_off_and_the_models_mode_back():
    model, idx = tiny("ab", dropout=0.5), tokens(1, 3)
    expected = list(model.generate(idx, 10, 0.0))
    model.train()
    assert list(model.generate(idx, 10, 0.0)) == expected
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_new_tokens": -1}, "-1"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": 0.0}, "top_p"),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
    ],
)
def test_generate_refuses_values_out_of_range_before_the_first_token(arguments, words):
    with pytest.raises(BadInput, match=words):
        tiny().generate(**{"idx": tokens(1, 3), "max_new_tokens": 2} | arguments)


# ------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("mixers", MODELS)
def test_checkpoint_gives_back_the_same_model(mixers, tmp_path):
    model, idx = tiny(mixers), tokens(2, 9)
    config = vars(model.config)
    hsm.save_checkpoint(tmp_path / "ckpt.pt", model=model.state_dict(), config=config, step=7)
    checkpoint = hsm.load_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint["step"] == 7
    assert torch.equal(hsm.model_from(checkpoint).eval()(idx)[0], model(idx)[0])


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "ckpt.pt"
    hsm.save_checkpoint(path, model={}, config={}, step=1)
    with pytest.raises(Exception, match="local object"):
        hsm.save_checkpoint(path, model={}, config=lambda: None, step=2)
    assert hsm.load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_missing_cut_off_or_of_others_says_so(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(BadInput, match="no checkpoint"):
        hsm.load_checkpoint(path)
    hsm.save_checkpoint(path, model=tiny().state_dict(), config={})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match="cut off"):
        hsm.load_checkpoint(path)
    path.write_bytes(b"hello")
    with pytest.raises(BadInput, match="no checkpoint of ours"):
        hsm.load_checkpoint(path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(BadInput, match="no checkpoint of ours"):
        hsm.load_checkpoint(path)


def test_a_checkpoint_of_another_shape_says_so():
    model = tiny()
    checkpoint = {"model": model.state_dict(), "config": vars(model.config) | {"n_embd": 32}}
    with pytest.raises(BadInput, match="does not fit"):
        hsm.model_from(checkpoint)


# ------------------------------------------------------------------------------------------------
# prepare_data.py


def story(n_words, seed=0):
    """Made-up text with something to learn: words of a small vocabulary, one with an accent."""
    generator = np.random.default_rng(seed)
    words = np.array(
        re.findall(r"[^ ]+", "the cat sat on a mat and saw naïve dogs; then, it ran.\n")
    )
    return " ".join(words[generator.integers(len(words), size=n_words)])


def write(path, text):
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


def has_gpt2():
    try:
        prepare_data.load_gpt2()
    except BadInput:
        return False
    return True


needs_gpt2 = pytest.mark.skipif(not has_gpt2(), reason="no GPT-2 vocabulary: TIKTOKEN_CACHE_DIR")
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)
TOKENIZERS = ["char", "byte", pytest.param("gpt2", marks=needs_gpt2)]


@pytest.mark.parametrize("chunk", [3, 50, 2**20])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prepared_tokens_are_the_texts_tokens_however_it_is_read(
    kind, chunk, tmp_path, monkeypatch
):
    text = story(500) + "\n\n  two  blanks \n<|endoftext|> 你好 🙂\r\n\tend   "
    monkeypatch.setattr(prepare_data, "CHUNK", chunk)
    path = write(tmp_path / "text.txt", text)
    meta = prepare_data.prepare("file", path, kind, tmp_path / "out")
    tokenizer = prepare_data.Tokenizer(prepare_data.read_meta(tmp_path / "out"))
    head, tail = (prepare_data.open_tokens(tmp_path / "out", s, meta) for s in ("train", "val"))
    size = len(text.encode())
    train_text = text.encode()[: size * 9 // 10].decode("utf-8", "ignore")
    assert head.tolist() == tokenizer.encode(train_text).tolist()
    assert tail.tolist() == tokenizer.encode(text[len(train_text) :]).tolist()
    assert tokenizer.decode(head) + tokenizer.decode(tail) == text
    assert meta["train_bytes"] + meta["val_bytes"] == size
    assert meta["bytes_per_token"] == pytest.approx(size / (len(head) + len(tail)), abs=1e-4)


def test_shakespeare_splits_as_elsewhere_nine_tenths_of_the_characters(tmp_path):
    write(tmp_path / "input.txt", "abcdefghi\n" * 111539 + "abcd")  # 1,115,394 bytes
    meta = prepare_data.prepare("shakespeare", folder=tmp_path)
    assert (meta["train_tokens"], meta["val_tokens"]) == (1003854, 111540)


def test_meta_names_the_sha256_of_the_source(tmp_path):
    meta = prepare_data.prepare("file", write(tmp_path / "a.txt", "hello " * 10), folder=tmp_path)
    assert meta["sha256"] == "895e4dd43de1abe1fa344c858372e8beece8e78b1debefc192a2b2c67f1295c3"


def test_more_than_65536_characters_take_four_bytes_each(tmp_path):
    text = "".join(map(chr, [*range(32, 0xD800), *range(0xE000, 0x14000)]))
    folder = tmp_path / "out"
    meta = prepare_data.prepare("file", write(tmp_path / "all.txt", text), folder=folder)
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == len(text) > 65536
    numbers = prepare_data.open_tokens(folder, "val", meta)
    assert prepare_data.Tokenizer(meta).decode(numbers) == text[-len(numbers) :]


def test_a_folder_of_text_files_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "in").mkdir()
    for name, text in (("b.txt", "b" * 50), ("a.txt", "a" * 50), ("c.md", "c")):
        write(tmp_path / "in" / name, text)
    meta = prepare_data.prepare("file", tmp_path / "in", folder=tmp_path / "out")
    tokens = prepare_data.open_tokens(tmp_path / "out", "train", meta)
    assert prepare_data.Tokenizer(meta).decode(tokens) == "a" * 50 + "b" * 40


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_openwebtext_is_streamed_from_a_local_copy_and_max_docs_ends_it(form, tmp_path):
    datasets = pytest.importorskip("datasets", reason='needs: pip install "datasets>=3,<6"')
    rows = [{"text": f"document {i} " + story(20, i)} for i in range(9)]
    source = tmp_path / f"docs.{form}"
    if form == "jsonl":
        write(source, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(source))
    prepare_data.prepare("openwebtext", source, "char", tmp_path / "out", max_docs=7)
    text = (tmp_path / "out" / "input.txt").read_text(encoding="utf-8")
    assert text == "".join(row["text"] + "<|endoftext|>" for row in rows[:7])


def test_the_standard_library_is_a_corpus_without_a_network(no_network, tmp_path):
    meta = prepare_data.prepare("stdlib", folder=tmp_path)
    assert meta["tokenizer"] == "byte" and meta["train_bytes"] > 5_000_000
    assert "class JSONDecoder" in (tmp_path / "input.txt").read_text(encoding="utf-8")


class Reply(io.BytesIO):
    """What urlopen gives back."""

    def __init__(self, content, length=None):
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content) if length is None else length)}


@pytest.mark.parametrize(
    ("reply", "sha256", "words"),
    [
        (Reply(b"hello"), "1234", "sha256 differs"),
        (Reply(b"hello", length=9), "", "broke off"),
        (urllib.error.URLError("unreachable"), "", "cannot download .*unreachable.*stdlib"),
        (TimeoutError("timed out"), "", "cannot download .*timed out"),
    ],
)
def test_a_failed_download_says_so_and_leaves_nothing(reply, sha256, words, tmp_path, monkeypatch):
    def urlopen(*_, timeout):
        if isinstance(reply, Exception):
            raise reply
        return reply

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(BadInput, match=words):
        prepare_data.download("https://example.org/a", tmp_path / "input.txt", sha256)
    assert not list(tmp_path.iterdir())


def test_a_good_download_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Reply(b"hello"))
    prepare_data.download("https://example.org/a", tmp_path / "input.txt")
    assert (tmp_path / "input.txt").read_bytes() == b"hello"


@pytest.mark.parametrize("text", ["", "ROMEO: naïve 🙂", "\udce9"])  # the last: a stray byte
def test_bytes_take_any_text(text):
    tokenizer = prepare_data.Tokenizer({"tokenizer": "byte"})
    tokens = tokenizer.encode(text)
    assert tokenizer.decode_bytes(tokens) == text.encode("utf-8", "surrogateescape")
    assert (tokens < tokenizer.vocab_size).all()


# ------------------------------------------------------------------------------------------------
# train.py


def small(data, out, **fields):
    """A run of a few seconds."""
    shape = {"vocab_size": 0, "block_size": 16, "n_layer": 3, "n_head": 2, "n_embd": 16}
    shape |= {name: fields.pop(name) for name in list(fields) if name in vars(GPTConfig())}
    settings = {"steps": 12, "eval_interval": 5, "warmup": 2, "sample_tokens": 20, "batch_size": 4}
    return train.TrainConfig(
        model=GPTConfig(**shape), data=str(data), out=str(out), **settings | fields
    )


def checkpoints_equal(a, b):
    """All tensors bit for bit, and all else but the clock."""
    if isinstance(a, dict):
        clock = {"seconds", "elapsed_s", "tokens_per_s", "out"}
        return a.keys() == b.keys() and all(
            checkpoints_equal(a[k], b[k]) for k in a if k not in clock
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(checkpoints_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """Press Ctrl-C in the middle of that step, or send another signal."""
    update = train.Trainer.update

    def update_and_press(trainer):
        if trainer.step == step:
            signal.raise_signal(number)
        update(trainer)

    monkeypatch.setattr(train.Trainer, "update", update_and_press)


@pytest.mark.parametrize("mixers", MODELS)
def test_resuming_after_ctrl_c_equals_an_uninterrupted_run_bit_for_bit(
    mixers, data, tmp_path, monkeypatch, capsys
):
    fields = {"mixers": mixers, "dropout": 0.1, "grad_accum": 2}
    assert train.train(small(data, tmp_path / "whole", **fields)).stopped_by == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        assert train.train(small(data, tmp_path / "cut", **fields)).stopped_by == signal.SIGINT
    assert f"train.py --resume --out {tmp_path / 'cut'}" in capsys.readouterr().out
    assert hsm.load_checkpoint(tmp_path / "cut" / "ckpt.pt")["step"] == 8  # the step was ended
    assert train.main(["--resume", "--out", str(tmp_path / "cut")]) == 0  # flags come from there
    for name in ("ckpt.pt", "best.pt"):
        cut, whole = (hsm.load_checkpoint(tmp_path / run / name) for run in ("cut", "whole"))
        assert checkpoints_equal(cut, whole)
    assert sample.main(["--out", str(tmp_path / "cut"), "--tokens", "5"]) is None


def test_a_finished_run_goes_on_with_more_steps(data, tmp_path):
    train.train(small(data, tmp_path))
    assert train.main(["--resume", "--out", str(tmp_path), "--steps", "15"]) == 0
    rows = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == [0, 5, 10, 12, 15]
    assert hsm.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 15


def test_a_run_leaves_checkpoints_log_picture_and_says_what_came_of_it(data, tmp_path, capsys):
    result = train.train(small(data, tmp_path))
    rows = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert rows == result.history
    names = [
        "step",
        "train_loss",
        "val_loss",
        "val_bpb",
        "lr",
        "tokens_per_s",
        "elapsed_s",
        "skipped",
    ]
    assert all(list(row) == names for row in rows)
    expected = math.log(result.model.config.vocab_size) + VARIANCE / 2
    assert rows[0]["val_loss"] == pytest.approx(expected, abs=0.1)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    best = hsm.load_checkpoint(tmp_path / "best.pt")
    assert best["best_loss"] == min(row["val_loss"] for row in rows) == result.best_loss
    printed = capsys.readouterr().out
    assert f"python sample.py --out {tmp_path}" in printed
    assert f"{result.best_loss:.4f} nats a token = {result.best_bpb:.4f} bits a byte" in printed
    assert hsm.layer_table(result.model) in printed


def test_training_learns(data, tmp_path):
    result = train.train(small(data, tmp_path, steps=150, n_embd=32, lr=1e-2, batch_size=16))
    assert result.best_loss < 1.2 < 2.5 < result.history[0]["val_loss"]


def test_a_second_run_keeps_the_first_one_in_previous(data, tmp_path):
    first = train.train(small(data, tmp_path))
    train.train(small(data, tmp_path, seed=2))
    kept = hsm.load_checkpoint(tmp_path / "previous" / "best.pt")
    assert kept["best_loss"] == first.best_loss
    assert sorted(p.name for p in (tmp_path / "previous").iterdir()) == [
        "best.pt",
        "ckpt.pt",
        "log.jsonl",
        "loss.png",
    ]


def test_the_batch_of_a_step_depends_on_the_seed_and_the_step_alone(data):
    meta = prepare_data.read_meta(data)
    windows = train.Windows(data, "train", meta, 16, torch.device("cpu"))
    batch = {(seed, n): windows.batch(4, seed, n)[0] for seed in (1, 2) for n in (0, 1, 2**33)}
    assert torch.equal(batch[1, 1], windows.batch(4, 1, 1)[0])
    different = {tuple(idx.flatten().tolist()) for idx in batch.values()}
    assert len(different) == len(batch)


def test_batches_are_the_corpus_and_targets_are_one_token_on(data, monkeypatch):
    meta = prepare_data.read_meta(data)
    device = torch.device("cpu")
    tokens = torch.from_numpy(prepare_data.open_tokens(data, "train", meta).astype(np.int64))
    in_memory = train.Windows(data, "train", meta, 16, device)
    on_disk = train.Windows(data, "train", meta, 16, device)
    on_disk.on_device, on_disk.tokens = False, prepare_data.open_tokens(data, "train", meta)
    for windows in (in_memory, on_disk):
        idx, targets = windows.at(torch.tensor([5, len(tokens) - 17]))
        assert torch.equal(idx, torch.stack([tokens[5:21], tokens[-17:-1]]))
        assert torch.equal(targets, torch.stack([tokens[6:22], tokens[-16:]]))
        assert idx.dtype == torch.int64


def test_every_place_of_the_corpus_can_be_drawn(data):
    meta = prepare_data.read_meta(data)
    windows = train.Windows(data, "train", meta, meta["train_tokens"] - 3, torch.device("cpu"))
    firsts = set()
    windows.at = lambda starts: firsts.update(starts.tolist())
    for number in range(50):
        windows.batch(4, 1, number)
    assert firsts == {0, 1, 2}  # three windows of T + 1 tokens fit


def test_evaluation_takes_all_windows_or_evenly_spread_ones(data):
    meta = prepare_data.read_meta(data)
    windows = train.Windows(data, "val", meta, 16, torch.device("cpu"))
    every = windows.evenly(10**9)
    assert every.tolist() == list(range(0, meta["val_tokens"] - 16, 16))
    some = windows.evenly(160)
    assert len(some) == 10 and set(some.tolist()) <= set(every.tolist())
    assert some[1:].sub(some[:-1]).unique().numel() <= 2


def test_matrices_decay_and_vectors_do_not():
    for mixers in MODELS:
        model = tiny(mixers, bias=True)
        matrices, vectors = train.make_optimizer(
            model, train.TrainConfig(), torch.device("cpu")
        ).param_groups
        assert matrices["weight_decay"] > 0 == vectors["weight_decay"]
        names = {id(p): name for name, p in model.named_parameters()}
        still = {names[id(p)].rpartition(".")[2] for p in vectors["params"]}
        assert still <= {"a", "b", "weight", "bias"}
        assert len(matrices["params"]) + len(vectors["params"]) == len(names)
        assert all(names[id(p)].endswith("weight") for p in matrices["params"])


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine():
    config = train.TrainConfig(steps=110, warmup=10, lr=1.0, lr_end=0.1)
    rates = [train.learning_rate(config, step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert (
        rates[10] == 1.0 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    )
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_bits_a_byte_are_nats_a_token_over_ln_2_times_tokens_a_byte():
    meta = {"val_tokens": 100, "val_bytes": 400}
    assert prepare_data.bits_per_byte(4 * math.log(2), meta) == pytest.approx(1.0)


def test_a_compiled_run_saves_the_plain_names(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    train.train(small(data, tmp_path / "fast", steps=5, compile=True))
    train.train(small(data, tmp_path / "plain", steps=5))
    fast, plain = (hsm.load_checkpoint(tmp_path / d / "ckpt.pt") for d in ("fast", "plain"))
    assert fast["model"].keys() == plain["model"].keys()
    assert all(
        torch.allclose(fast["model"][k], plain["model"][k], atol=1e-5) for k in plain["model"]
    )


def test_fused_kernels_are_a_choice_of_three():
    for words, wanted in (([], None), (["--fast"], True), (["--no-fast"], False)):
        for before in (None, True, False):  # as a checkpoint has it
            config = train.TrainConfig(fast=before)
            config = prepare_data.parse(train.TrainConfig, words, "", config)
            assert config.fast is (wanted if words else before)


def test_fused_kernels_are_taken_by_themselves_on_cuda_alone_and_a_reason_is_given(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    enabled = []
    monkeypatch.setitem(sys.modules, "fast", SimpleNamespace(enable=enabled.append))
    for wanted, device, taken in [
        (None, cpu, False),
        (None, cuda, True),
        (True, cuda, True),
        (False, cuda, False),
    ]:
        assert train.choose_kernels("model", wanted, device) == "; fused kernels" * taken
        assert enabled == ["model"] * taken
        enabled.clear()
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "fast")
    words = train.choose_kernels("model", None, cuda)
    assert "without fused kernels (the fast path needs Triton" in words
    with pytest.raises(BadInput, match="needs Triton"):
        train.choose_kernels("model", True, cuda)


@pytest.mark.parametrize("before", [None, False, True])
def test_a_run_resumes_whatever_it_was_told_about_kernels(
    before, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "fast", raising=False)
    train.train(small(data, tmp_path / "out"))
    path = tmp_path / "out" / "ckpt.pt"
    checkpoint = hsm.load_checkpoint(path)
    assert checkpoint["train"]["fast"] is None
    hsm.save_checkpoint(path, **checkpoint | {"train": checkpoint["train"] | {"fast": before}})
    words = ["--resume", "--out", str(tmp_path / "out"), "--steps", "14", "--device", "cpu"]
    if before:
        assert "the fast path needs Triton" in refused(capsys, train, *words)
    assert train.main([*words, *(["--no-fast"] if before else [])]) == 0
    assert hsm.load_checkpoint(path)["step"] == 14


def test_a_known_cards_peak_is_known_and_no_others(monkeypatch):
    cuda = torch.device("cuda", 0)

    def peak(name, dtype=torch.bfloat16, device=cuda):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda asked: name * (asked == cuda))
        return train.peak_flops(device, dtype)

    assert peak("NVIDIA H100 80GB HBM3") == pytest.approx(989.4e12)
    assert peak("Tesla T4", torch.float16) == pytest.approx(65e12)
    assert peak("NVIDIA H100 80GB HBM3", torch.float32) is None  # the table is of 16 bits
    assert peak("NVIDIA H100 80GB") is None
    assert peak("NVIDIA H100 80GB HBM3", device=torch.device("cpu")) is None


@pytest.mark.parametrize("mixers", ["ab", "ab,softmax"])
def test_useful_operations_are_those_of_the_products(mixers, data):
    # Here, because it imports Triton, and test_fast.py must be the first to do so.
    from torch.utils.flop_counter import FlopCounterMode

    fields = {"n_embd": 32, "n_layer": 4, "pos_emb": "learned"}
    trainer = trainer_of(small(data, "out", mixers=mixers, **fields))
    idx = tokens(2, 16, vocab_size=5)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer.model(idx, idx)[1].backward()
    counted = counter.get_total_flops() / idx.numel()
    n_softmax = 2 * mixers.count("softmax")
    not_causal = 6 * n_softmax * 32 * 16  # PyTorch counts masked pairs, too
    vectors = 6 * sum(p.numel() for p in trainer.model.parameters() if p.dim() < 2)
    assert trainer.flops == counted - not_causal + vectors


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_run_on_a_known_card_logs_and_shows_its_share_of_the_peak(
    n_ranks, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "peak_flops", lambda device, dtype: 1e9)
    result = train.train(small(data, tmp_path / "out"))
    trainer = trainer_of(small(data, tmp_path / "out"))
    trainer.n_ranks = n_ranks
    assert re.search(r"tokens/s, \d+\.\d% of peak", capsys.readouterr().err)
    for row in result.history[1:]:
        share = row["tokens_per_s"] * trainer.flops / 1e9
        assert row["share_of_peak"] == pytest.approx(share, rel=0.01)
        assert trainer.share_of_peak(row["tokens_per_s"]) == pytest.approx(share / n_ranks)


def test_a_run_on_an_unknown_device_names_no_share(data, tmp_path, capsys):
    result = train.train(small(data, tmp_path / "out"))
    assert not any("share_of_peak" in row for row in result.history)
    errors = capsys.readouterr().err
    assert "tokens/s" in errors and "peak" not in errors


def test_a_run_compiles_on_cuda_unless_told_otherwise(data, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    train.train(small(data, tmp_path, steps=1))
    assert not compiled
    train.train(small(data, tmp_path, steps=1, compile=True))
    assert len(compiled) == 1
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [train.wants(choice, cuda) for choice in (None, True, False)] == [True, True, False]
    assert [train.wants(choice, cpu) for choice in (None, True, False)] == [False, True, False]


def test_a_failing_compiler_is_named(data, tmp_path, monkeypatch):
    def backend(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with pytest.raises(BadInput, match="--no-compile"):
        train.train(small(data, tmp_path, compile=True))


@pytest.mark.parametrize("mixers", MODELS)
def test_bfloat16_trains_and_the_weights_stay_float32(mixers, data, tmp_path):
    result = train.train(small(data, tmp_path, mixers=mixers, dtype="bfloat16", sample_tokens=0))
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert result.history[-1]["val_loss"] < result.history[0]["val_loss"]


@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(True, "bfloat16"), (False, "float16")])
def test_a_card_without_bfloat16_computes_in_float16(has_bfloat16, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert train.pick_dtype("auto", torch.device("cuda")) == getattr(torch, dtype)


def finite(checkpoint):
    return all(weight.isfinite().all() for weight in checkpoint["model"].values())


def test_weights_that_are_no_numbers_are_never_saved(data, tmp_path):
    train.train(small(data, tmp_path, steps=5))
    with pytest.raises(BadInput, match="smaller --lr"):
        train.main(["--resume", "--out", str(tmp_path), "--steps", "50", "--lr", "1e30"])
    trainer = trainer_of(small(data, tmp_path))
    with torch.no_grad():
        trainer.model.norm.weight[3] = math.inf
    with pytest.raises(BadInput, match="smaller --lr"):
        trainer.save()
    checkpoint = hsm.load_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint["step"] == 5 and finite(checkpoint)


def losses_are_nan_at(monkeypatch, steps):
    loss = train.Trainer.loss

    def loss_or_nan(trainer, *batch):
        broken = trainer.model.training and trainer.step in steps
        return loss(trainer, *batch) * (math.nan if broken else 1)

    monkeypatch.setattr(train.Trainer, "loss", loss_or_nan)


def test_steps_with_gradients_that_are_no_numbers_are_left_out_and_counted(
    data, tmp_path, monkeypatch
):
    losses_are_nan_at(monkeypatch, {2, 3, 8})
    result = train.train(small(data, tmp_path))
    assert [row["skipped"] for row in result.history] == [0, 2, 3, 3]
    assert finite(hsm.load_checkpoint(tmp_path / "ckpt.pt"))
    assert all(math.isfinite(row["train_loss"]) for row in result.history[1:])


def test_a_left_out_step_changes_no_weight(data, tmp_path, monkeypatch):
    losses_are_nan_at(monkeypatch, {0, 1, 2})
    trainer = trainer_of(small(data, tmp_path))
    before = {name: w.clone() for name, w in trainer.model.state_dict().items()}
    for step in range(4):
        trainer.update()
        same = [torch.equal(w, before[name]) for name, w in trainer.model.state_dict().items()]
        assert all(same) if step < 3 else not any(same)


def trainer_of(config, device="cpu"):
    meta = prepare_data.read_meta(config.data)
    config.model.vocab_size = meta["vocab_size"]
    return train.Trainer(config, meta, torch.device(device))


def test_ten_such_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(
    data, tmp_path, monkeypatch
):
    losses_are_nan_at(monkeypatch, range(13, 10**6))
    with pytest.raises(BadInput, match=r"not finite .* in a row.*smaller --lr"):
        train.train(small(data, tmp_path, steps=1000, eval_interval=100))
    assert hsm.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 0


def test_overflows_in_float16_are_the_scalers_and_not_counted(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "pick_dtype", lambda *_: torch.float16)
    trainer = trainer_of(small(data, tmp_path))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for _ in range(30):
        trainer.update()
    loss, skipped = trainer.look()
    assert skipped == 0 and math.isfinite(loss)
    assert trainer.scaler.get_scale() < 2.0**40  # it did overflow


def test_an_apple_gpu_is_taken_for_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = train.pick_device("auto")
    assert device.type == "mps" and train.pick_dtype("auto", device) == torch.float32


def test_a_second_training_into_the_same_folder_is_refused(data, tmp_path, capsys):
    with train.lock_out(tmp_path):
        line = refused(capsys, train, "--out", tmp_path, *flags(small(data, tmp_path)))
        assert "another training writes to" in line
    train.train(small(data, tmp_path))  # and now it is free


def flags(config):
    return robust.flags(config)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_full_disk_is_said_in_a_line_and_the_last_checkpoint_survives(data, tmp_path, capsys):
    import resource

    train.train(small(data, tmp_path, steps=5))
    before = (tmp_path / "ckpt.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        line = refused(capsys, train, "--resume", "--out", tmp_path, "--steps", 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search("cannot write .*ckpt.pt .*File too large", line), line
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_sigterm_saves_and_ends_with_143(data, tmp_path, monkeypatch):
    train.train(small(data, tmp_path, steps=5))
    interrupt_at(monkeypatch, 7, signal.SIGTERM)
    assert train.main(["--resume", "--out", str(tmp_path), "--steps", "20"]) == 143
    assert hsm.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 8


def test_train_prepares_its_corpus_from_input_txt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "shakespeare_char"
    folder.mkdir(parents=True)
    write(folder / "input.txt", story(2000))
    train.train(small("data/shakespeare_char", "out"))
    assert prepare_data.read_meta(folder)["corpus"] == "shakespeare"


def test_without_shakespeare_and_network_training_takes_the_standard_library_and_says_so(
    no_network, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    result = train.train(small("data/shakespeare_char", "out", eval_tokens=2000))
    assert "standard library in its place" in capsys.readouterr().out
    assert result.model.config.vocab_size == 256
    assert train.main(["--resume", "--out", "out", "--steps", "14"]) == 0  # it knows where to look


# ------------------------------------------------------------------------------------------------
# sample.py


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


def test_greedy_text_is_the_same_with_and_without_naive(trained, capsys):
    flags = ["--out", trained, "--tokens", "60", "--temperature", "0", "--prompt", "the cat"]
    streamed, naive = sampled(capsys, *flags), sampled(capsys, *flags, "--naive")
    assert streamed.out == naive.out
    assert streamed.out.startswith("the cat") and len(streamed.out) == 7 + 60 + 1


def test_the_same_seed_gives_the_same_text(trained, capsys):
    one, again, other = (
        sampled(capsys, "--out", trained, "--seed", seed).out for seed in ("1", "1", "2")
    )
    assert one == again != other


def test_a_prompt_from_a_file_and_an_empty_one_work(trained, capsys, tmp_path):
    file = write(tmp_path / "prompt.txt", "naïve")
    flags = ["--out", trained, "--tokens", "4"]
    assert sampled(capsys, *flags, "--prompt-file", str(file)).out.startswith("naïve")
    assert len(sampled(capsys, *flags).out) == 4 + 1
    assert sampled(capsys, *flags[:2], "--prompt", "the", "--tokens", "0").out == "the\n"


def test_after_the_text_comes_a_line_on_speed_and_state(trained, capsys):
    line = sampled(capsys, "--out", trained, "--tokens", "50").err.splitlines()[-1]
    model, _ = sample.load(trained)
    assert re.search(r"[\d,]+ tokens/s; first token after [\d.]+ ms", line)
    assert f"state {model.state_bytes(1, 51):,} bytes" in line
    assert f"{2 * 3 * 16 * 51 * 4:,}]" in line  # K and V, 3 layers, 16 wide, 51 tokens, float32


def test_half_characters_wait_for_their_other_half(tmp_path, capsys):
    folder = tmp_path / "data"
    text = write(tmp_path / "a.txt", "你好🙂" * 300)
    prepare_data.prepare("file", text, "byte", folder)
    train.train(small(folder, tmp_path / "out", steps=60, n_embd=32, lr=1e-2))
    printed = sampled(
        capsys, "--out", str(tmp_path / "out"), "--prompt", "你好", "--temperature", "0"
    )
    assert "🙂" in printed.out and printed.out.count("\ufffd") <= 1  # the end may cut one


@needs_gpt2
def test_gpt2_tokens_train_and_sample(tmp_path, capsys):
    text = write(tmp_path / "a.txt", "One day a cat sat down. <|endoftext|>" * 60)
    prepare_data.prepare("file", text, "gpt2", tmp_path / "data")
    train.train(small(tmp_path / "data", tmp_path / "out", steps=30, lr=1e-2))
    printed = sampled(capsys, "--out", str(tmp_path / "out"), "--prompt", "One day")
    assert printed.out.startswith("One day")


def test_a_long_text_needs_no_more_memory_than_a_short_one():
    model = GPT(GPTConfig(vocab_size=31, block_size=16, n_layer=4, n_embd=16, pos_emb="none"))
    cache = model.init_cache(1)
    sizes = set()
    with torch.no_grad():
        for _ in range(100):
            model(tokens(1, 20), cache=cache)
            sizes.add(sum(line.ring.numel() for state in cache.layers for line in state))
    assert sizes == {model.state_bytes(1, 10**6) // 4}


# ------------------------------------------------------------------------------------------------
# Bad input: one line that says what was wrong, exit status 2, nothing half-written


def refused(capsys, module, *arguments):
    """The one line that a command prints when it refuses its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        prepare_data.run(lambda: module.main(list(map(str, arguments))))
    printed = capsys.readouterr()
    lines = [line for line in re.split(r"[\n\r]", printed.err) if line.strip()]
    lines = [
        line for line in lines if not re.search(r"\d%\||[\d?](chunk|B|step)[/ ]", line)
    ]  # bars
    assert end.value.code == 2, printed
    assert len(lines) == 1, printed
    assert "Traceback" not in printed.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quik"], "quik.*quick, deep, pure, shakespeare, tinystories, openwebtext"),
        (["--mixers", "abc"], "unknown mixer 'abc'.*ab, vec, matrix.*softmax"),
        (["--n-layr", "5"], "--n-layr.*Perhaps.*--n-layer"),
        (["--n_layr", "5"], "--n_layr.*Perhaps.*--n-layer"),
        (["--shifts", "1,x"], "1,x"),
        (["--shifts", "0"], "from 1"),
        (["--n-embd", "30"], "multiple of n_head"),
        (["--n-layer", "0"], "n_layer must be at least 1"),
        (["--n-layer", "two"], "n-layer.*two"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--steps", "-3"], "steps must be at least 1"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--grad-accum", "0"], "grad_accum must be at least 1"),
        (["--eval-interval", "0"], "eval_interval must be at least 1"),
        (["--eval-tokens", "5"], "eval_tokens"),
        (["--lr", "0"], "lr must be over 0"),
        (["--lr", "nan"], "lr must be over 0"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--beta2", "1"], "beta2"),
        (["--dropout", "1"], "dropout"),
        (["--device", "tpu"], "tpu.*auto.*cpu"),
        (["--dtype", "int8"], "int8.*float32"),
        (["--dtype", "float16", "--device", "cpu"], "float16 does not train on a CPU"),
        (["--block-size", "100000", "--eval-tokens", "100000"], "block_size=100000"),
        (["--vocab-size", "3"], "vocab_size=3"),
        (["--data", "nowhere"], "nowhere has no meta.json.*prepare_data.py"),
        (["--resume", "--out", "nowhere"], "no checkpoint nowhere.*train one first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses(arguments, words, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    at = [] if "--data" in arguments else ["--data", data]
    head = arguments[:1] if not arguments[0].startswith("-") else []
    line = refused(capsys, train, *head, *at, *arguments[len(head) :])
    assert re.search(words, line), line
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("module", [train, sample])
def test_a_device_that_is_not_there_is_refused(module, trained, data, capsys):
    line = refused(capsys, module, "--device", "cuda", "--out", trained)
    assert "no cuda device" in line and "cpu" in line


def test_a_folder_that_cannot_be_written_is_refused(data, tmp_path, capsys):
    write(tmp_path / "file", "in the way")
    assert "cannot write" in refused(
        capsys, train, "--data", data, "--out", tmp_path / "file" / "x"
    )
    source = write(tmp_path / "a.txt", story(100))
    refused(capsys, prepare_data, "file", source, "--out", tmp_path / "file" / "x")
    assert (tmp_path / "file").read_text("utf-8") == "in the way"


def damage(folder, how):
    """A copy of a prepared folder, damaged."""
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    if how == "odd size":
        (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-1])
    elif how == "missing":
        (folder / "val.bin").unlink()
    elif how == "meta cut off":
        write(folder / "meta.json", json.dumps(meta)[:50])
    elif how == "meta is a list":
        write(folder / "meta.json", "[]")
    elif how == "meta claims more":
        write(folder / "meta.json", json.dumps(meta | {"train_tokens": 10**12}))
    elif how == "no vocabulary":
        write(folder / "meta.json", json.dumps(meta | {"vocab": "zzz"}))
    elif how == "beyond the vocabulary":
        (folder / "train.bin").write_bytes(b"\xff\xff" * meta["train_tokens"])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("odd size", "train.bin has .* bytes, meta.json says"),
        ("missing", "val.bin is missing"),
        ("meta cut off", "meta.json is damaged"),
        ("meta is a list", "meta.json is damaged"),
        ("meta claims more", "train.bin has .* bytes, meta.json says"),
        ("no vocabulary", "meta.json is damaged"),
        ("beyond the vocabulary", "token 65535, beyond its vocabulary"),
    ],
)
def test_damaged_data_are_refused(how, words, tmp_path, capsys):
    prepare_data.prepare("file", write(tmp_path / "a.txt", story(500)), folder=tmp_path / "data")
    damage(tmp_path / "data", how)
    line = refused(capsys, train, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert re.search(words, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"ab", "too short .2 bytes"),
        (b"good text \xff bad", "not UTF-8 text .near byte 10"),
        (b"cut in a character " * 5 + "ü".encode()[:1], "not UTF-8"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_prepare_refuses_files_that_are_no_text(content, words, tokenizer, tmp_path, capsys):
    source = write(tmp_path / "a.txt", content)
    out = tmp_path / "out"
    line = refused(capsys, prepare_data, "file", source, "--tokenizer", tokenizer, "--out", out)
    assert re.search(words, line), line
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "corpus"),
        (["shakespear"], "shakespear.*shakespeare.*file"),
        (["file"], "say which file"),
        (["file", "nowhere.txt"], "no file or folder nowhere.txt"),
        (["file", "."], "no .txt files"),
        (["stdlib", "extra"], "one word too many"),
        (["stdlib", "--tokenizer", "words"], "words.*char.*byte.*gpt2"),
        (["openwebtext", "--max-docs", "-1"], "max-docs"),
        (["shakespeare"], "cannot download.*input.txt"),
    ],
)
def test_prepare_refuses(arguments, words, no_network, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, prepare_data, *arguments)
    assert re.search(words, line), line
    assert not list(tmp_path.rglob("*.*"))


def test_gpt2_without_a_network_says_what_to_do(monkeypatch, tmp_path, capsys):
    import tiktoken

    def refuse(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    source = write(tmp_path / "a.txt", story(100))
    out = tmp_path / "out"
    line = refused(capsys, prepare_data, "file", source, "--tokenizer", "gpt2", "--out", out)
    assert "TIKTOKEN_CACHE_DIR" in line and "--tokenizer char" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "-1"], "--tokens"),
        (["--temperature", "-0.5"], "temperature"),
        (["--top-k", "0"], "top_k"),
        (["--top-p", "1.5"], "top_p"),
        (["--prompt", "Ж"], "'Ж' is not among"),
        (["--prompt", "a", "--prompt-file", "b"], "not both"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--topk", "3"], "--topk.*Perhaps.*--top-k"),
        (["--out", "nowhere"], "no checkpoint nowhere"),
    ],
)
def test_sample_refuses(arguments, words, trained, capsys):
    line = refused(capsys, sample, "--out", trained, *arguments)
    assert re.search(words, line), line


def test_a_prompt_file_that_is_no_text_is_refused(trained, tmp_path, capsys):
    file = write(tmp_path / "a.txt", b"\xff\xfe")
    assert "not UTF-8" in refused(capsys, sample, "--out", trained, "--prompt-file", file)


def test_resume_and_sample_refuse_checkpoints_cut_off_or_of_others(data, tmp_path, capsys):
    train.train(small(data, tmp_path))
    whole = {name: (tmp_path / name).read_bytes() for name in ("ckpt.pt", "best.pt")}
    commands = {"ckpt.pt": (train, "--resume"), "best.pt": (sample,)}
    for name, (module, *flags) in commands.items():
        for content in (whole[name][:3000], b"hello"):
            (tmp_path / name).write_bytes(content)
            assert "is no checkpoint" in refused(capsys, module, "--out", tmp_path, *flags)
        hsm.save_checkpoint(tmp_path / name, model={}, config={})
        assert "not a checkpoint of train.py" in refused(capsys, module, "--out", tmp_path, *flags)


def test_resume_refuses_another_shape_or_other_data_and_touches_nothing(data, tmp_path, capsys):
    train.train(small(data, tmp_path / "out"))
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    resume = ["--resume", "--out", tmp_path / "out"]
    assert "n_layer=3, not 4" in refused(capsys, train, *resume, "--n-layer", 4)
    assert "mixers=ab, not vec" in refused(capsys, train, *resume, "--mixers", "vec")
    assert "at step 12 already" in refused(capsys, train, *resume, "--steps", 5)
    prepare_data.prepare("file", write(tmp_path / "b.txt", story(999, 1)), folder=tmp_path / "b")
    assert "other data" in refused(capsys, train, *resume, "--data", tmp_path / "b")
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


# ------------------------------------------------------------------------------------------------
# As a user: real processes


HERE = Path(__file__).parent


def command(*arguments, cwd, environment=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment)
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def test_the_three_commands_as_a_user_types_them_and_ctrl_c_between(tmp_path):
    write(tmp_path / "novel.txt", story(3000))
    small = "--n-layer 2 --n_embd 16 --n-head 2 --block-size 16 --eval-interval 1 --batch-size 4"
    prepare = command(
        HERE / "prepare_data.py", "file", "novel.txt", "--out", "data/n", cwd=tmp_path
    )
    out, _ = prepare.communicate(timeout=60)
    assert prepare.returncode == 0 and "tokens to train on" in out
    flags = f"--data data/n --out out --steps 100000 {small}".split()
    training = command(HERE / "train.py", *flags, cwd=tmp_path)
    for _ in range(4):  # it lives: the line on the model, then evaluations
        assert training.stdout.readline()
    training.send_signal(signal.SIGINT)
    out, _ = training.communicate(timeout=60)
    assert training.returncode == 130
    assert "python train.py --resume --out out" in out
    writing = command(HERE / "sample.py", "--out", "out", "--tokens", "20", cwd=tmp_path)
    out, line = writing.communicate(timeout=60)
    assert writing.returncode == 0 and len(out) == 21 and "tokens/s" in line


@pytest.mark.parametrize("name", ["prepare_data.py", "train.py", "sample.py"])
def test_help_shows_fields_with_defaults_and_what_they_mean(name, capsys):
    module = sys.modules[name.removesuffix(".py")]
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "default:" in printed and "--out" in printed


def test_the_readmes_own_mixer_runs_and_its_commands_name_real_files(tmp_path):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    running = command("-c", example, cwd=HERE)
    out, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors
    assert out.count("max") == GPTConfig().n_layer
    for name in re.findall(r"python ([\w/]+\.py)", readme) + re.findall(r"\]\(([\w/.]+)\)", readme):
        assert (HERE / name).exists(), name


# ------------------------------------------------------------------------------------------------
# Hostile surroundings: results/robust.py, in short


def test_kills_at_random_moments_lose_nothing(tmp_path):
    assert robust.kills(tmp_path, n=1, steps=200) > 0


def test_damaged_files_end_in_a_clear_line_or_a_correct_run(tmp_path):
    table = robust.mutations(tmp_path, n=12)
    assert all(seen.total() == 12 for seen in table.values())
    assert sum(seen["clean error"] for seen in table.values()) > 12


def test_a_long_stream_ends_exact_and_takes_no_memory():
    seen = robust.million(n=30_000)
    assert not seen["growth_mib"] >= 5


def test_a_checkpoint_that_claims_a_giant_is_refused_at_once(trained, tmp_path, capsys):
    checkpoint = hsm.load_checkpoint(Path(trained) / "best.pt")
    for claim in ({"n_layer": 10**9}, {"n_embd": 2**20}, {"d_ff": 2**24}, {"block_size": 2**60}):
        hsm.save_checkpoint(
            tmp_path / "best.pt", **checkpoint | {"config": checkpoint["config"] | claim}
        )
        assert "does not fit" in refused(capsys, sample, "--out", tmp_path)


def test_a_checkpoint_runs_nobodys_code(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"model": {}, "config": {}, "meta": Trap()}, tmp_path / "best.pt")
    assert "no checkpoint of ours" in refused(capsys, sample, "--out", tmp_path)
    assert not (tmp_path / "sprung").exists()


# ------------------------------------------------------------------------------------------------
# Several processes


def processes(n, *arguments, cwd):
    """The same command as n processes that find each other, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n)}
    return [
        command(*arguments, cwd=cwd, environment=place | {"RANK": f"{r}", "LOCAL_RANK": f"{r}"})
        for r in range(n)
    ]


SHARDED = """
import os, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hsm import GPT, GPTConfig

def trained(shard):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=31, block_size=16, n_layer=3, n_embd=16, mixers="ab,softmax"))
    if shard:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        idx = torch.randint(31, (4, 17), generator=torch.Generator().manual_seed(step))
        if shard:
            idx = idx[dist.get_rank() :: dist.get_world_size()]
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()

whole = trained(False)
dist.init_process_group("gloo")
for name, weight in trained(True).items():
    assert weight.to_local().numel() < weight.numel()
    assert torch.allclose(weight.full_tensor(), whole[name], atol=1e-5), name
print("the same", flush=True)
dist.barrier()
os._exit(0)  # gloo's threads may abort a process that ends in the usual way
"""


@needs_gloo
@pytest.mark.skipif(torch.__version__ < "2.8", reason="this torch shards on GPUs only")
def test_a_model_sharded_over_processes_trains_like_a_whole_one(tmp_path):
    both = processes(2, "-c", SHARDED, cwd=HERE)
    for process in both:
        out, errors = process.communicate(timeout=120)
        assert out == "the same\n", errors


@needs_gloo
def test_two_processes_train_like_one_with_the_same_batch(data, tmp_path):
    one = train.train(small(data, tmp_path / "one", steps=50, grad_accum=2))
    words = flags(small(data, tmp_path / "two", steps=50, grad_accum=2))
    for more in ([], ["--resume", "--steps", "55"]):
        both = processes(2, HERE / "train.py", *words, *more, cwd=tmp_path)
        outputs = [process.communicate(timeout=120) for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        assert not outputs[1][0]  # only rank 0 speaks
    two = hsm.load_checkpoint(tmp_path / "two" / "ckpt.pt")["history"]
    assert [row["step"] for row in two] == [*range(0, 56, 5)]
    for a, b in zip(one.history, two, strict=False):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-4)
        assert (a["train_loss"] or 0) == pytest.approx(b["train_loss"] or 0, abs=1e-4)


@needs_gloo
def test_when_one_process_dies_the_other_ends_with_a_line(data, tmp_path):
    words = flags(small(data, tmp_path / "out", steps=10**6))
    left, right = processes(2, HERE / "train.py", *words, cwd=tmp_path)
    while not (tmp_path / "out" / "ckpt.pt").exists():
        assert left.poll() is None and right.poll() is None
        time.sleep(0.05)
    right.kill()
    _, errors = left.communicate(timeout=30)
    right.communicate()
    assert left.returncode == 2
    assert "another process of this training has ended" in errors.splitlines()[-1]


# ------------------------------------------------------------------------------------------------
# Properties of any configuration


numbers = st.integers(-1, 5)
configurations = st.fixed_dictionaries(
    {
        "vocab_size": st.just(11),
        "block_size": st.integers(0, 9),
        "n_layer": numbers,
        "n_head": st.integers(0, 3),
        "n_embd": st.sampled_from([0, 1, 2, 6, 12, 13]),
        "mixers": st.lists(st.sampled_from([*PAIRS, "softmax", "?"]), max_size=3).map(",".join),
        "shifts": st.one_of(
            st.sampled_from(["layer", "heads", "", "1,", "x"]),
            st.lists(numbers, min_size=1, max_size=3).map(lambda s: ",".join(map(str, s))),
            st.lists(numbers, min_size=2, max_size=3).map(lambda s: "+".join(map(str, s))),
        ),
        "proj": st.booleans(),
        "in_proj": st.booleans(),
        "d_ff": st.integers(-1, 7),
        "pos_emb": st.sampled_from(["learned", "rope", "none", "sine"]),
        "bias": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.5, 1.0]),
    }
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(configurations, st.integers(1, 9), st.integers(0, 10**6))
def test_any_configuration_is_causal_and_streams_exactly_or_says_what_is_wrong(fields, T, seed):
    try:
        model = tiny(dtype=torch.float64, **fields)
    except BadInput as error:
        assert "\n" not in str(error) and len(str(error)) > 10
        return
    T = min(T, model.config.block_size)
    idx = tokens(2, T, vocab_size=11, seed=seed)
    with torch.no_grad():
        logits, _ = model(idx)
        streamed = stream(model, idx, random_chunks(T, seed))
        changed = idx.clone()
        changed[:, -1] = (idx[:, -1] + 1) % 11
        assert torch.equal(model(changed)[0][:, :-1], logits[:, :-1])
        assert (streamed - logits).abs().max() <= 1e-10 * max(1, logits.abs().max())
        field = receptive_field(model.config)
        far = tokens(1, len(field) + 1, vocab_size=11, seed=seed)  # one token out of reach
        if model.wpe is None:
            moved = far.clone()
            moved[0, 0] = (far[0, 0] + 1) % 11
            assert torch.equal(model(moved)[0][0, -1], model(far)[0][0, -1])


def test_the_readmes_table_of_speed_is_the_benchs():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Speed")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    made = (HERE / "results" / "bench.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) > 8 and set(rows) <= set(made)
