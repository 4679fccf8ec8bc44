"""Facts about the neighbours: what the contract of a mixer promises, for each by its name."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import neighbours  # noqa: E402

import hsm  # noqa: E402

torch.set_num_threads(1)
NAMES = tuple(neighbours.NEIGHBOURS)
SHAPES = [*NAMES, *(f"vec,{name}" for name in NAMES)]


def make(mixers, **fields):
    """A small model in float64, its weights far from where they start."""
    torch.manual_seed(0)
    shape = {"vocab_size": 11, "block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 8, **fields}
    model = hsm.GPT(hsm.GPTConfig(mixers=mixers, **shape)).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("mixers", SHAPES)
@pytest.mark.parametrize("fields", [{}, {"in_proj": True, "pos_emb": "none"}, {"proj": False}])
def test_a_stream_in_random_chunks_is_the_parallel_pass(mixers, fields):
    model = make(mixers, **fields)
    idx = torch.randint(11, (2, 45))
    whole = model(idx)[0]
    for seed in range(4):
        torch.manual_seed(seed)
        cache, pieces, start = model.init_cache(2), [], 0
        while start < 45:
            size = int(torch.randint(1, 1 + (1, 4, 16, 45)[seed], ()))
            pieces.append(model(idx[:, start : start + size], cache=cache)[0])
            start += size
        assert (torch.cat(pieces, dim=1) - whole).abs().max() < 1e-9


@pytest.mark.parametrize("mixers", SHAPES)
def test_a_token_changes_nothing_before_it_to_the_bit_and_only_what_receptive_field_says(mixers):
    model = make(mixers, shifts="1,2", n_layer=2, block_size=8)
    idx, t = torch.randint(11, (1, 24)), 5
    other = idx.clone()
    other[0, t] = (idx[0, t] + 1) % 11
    same = (model(idx)[0] == model(other)[0])[0].all(dim=-1)  # (T,)
    assert same[:t].all() and not same[t]
    if "linrec" not in mixers:  # which sees on and on, ever less
        assert same[t + len(hsm.receptive_field(model.config)) :].all()


@pytest.mark.parametrize("name", NAMES)
def test_equal_parameters_within_one_percent(name):
    sizes = [hsm.GPT(hsm.GPTConfig(mixers=m, n_layer=3)).num_params() for m in (name, "softmax")]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_state_size_is_what_the_cache_holds(name):
    model = make(name, n_layer=1)
    cache = model.init_cache(1)
    model(torch.randint(11, (1, 100)), cache=cache)

    def numbers(item):
        if isinstance(item, (list, tuple)):
            return sum(map(numbers, item))
        kinds = (getattr(item, "rings", None), getattr(item, "kv", None), item)
        return next(tensor for tensor in kinds if tensor is not None).numel()

    assert numbers(cache.layers[0]) == model.blocks[0].mixer.state_size(100)


def test_shift_softmax_with_a_1_and_b_0_is_softmax():
    torch.manual_seed(0)
    config, x = hsm.GPTConfig(n_embd=8, n_head=2), torch.randn(2, 9, 8)
    one = neighbours.ShiftSoftmax(config)
    two = hsm.SoftmaxMixer(config)
    two.load_state_dict(one.state_dict(), strict=False)
    one.pair.a.data.fill_(1.0)
    one.pair.b.data.zero_()
    assert torch.equal(one(x), two(x))
    one.pair.b.data.fill_(1.0)
    assert torch.allclose(one(x), two(x + hsm.delay(x, 1)))


def test_shifts_softmax_takes_the_ladders_shifts_and_shift_softmax_none():
    config = hsm.GPTConfig(mixers="shifts-softmax,shift-softmax,vec", shifts="1+2+4+8,2", n_layer=3)
    mixers = [block.mixer for block in hsm.GPT(config).blocks]
    assert [mixer.shifts for mixer in mixers] == [(1, 2, 4, 8), (1,), (2,)]


@pytest.mark.parametrize("T", [1, 2, 7, 64])
def test_the_scan_is_the_recurrence_with_gates_of_zero_and_one_too(T):
    torch.manual_seed(0)
    g, v = torch.rand(2, T, 3, dtype=torch.float64), torch.randn(2, T, 3, dtype=torch.float64)
    g[:, ::3] = g[:, ::3].round()
    state = torch.randn(2, 3, dtype=torch.float64)
    h = neighbours.scan(g, v, state)
    for t in range(T):
        state = g[:, t] * state + v[:, t]
        assert torch.allclose(h[:, t], state, rtol=0, atol=1e-12)


def test_conv4_is_the_convolution():
    mixer, x = neighbours.Conv4(hsm.GPTConfig(n_embd=8, n_head=2, proj=False)), torch.randn(2, 9, 8)
    kernel = torch.stack([*mixer.taps], dim=1).flip(1)[:, None]  # (C, 1, 4), the oldest first
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    y = torch.nn.functional.conv1d(padded, kernel, groups=8).transpose(1, 2)
    assert torch.allclose(mixer(x), y, atol=1e-6)
