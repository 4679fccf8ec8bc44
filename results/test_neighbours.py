"""Facts about the neighbours, each by itself; what all mixers promise, test_hsm.py tests."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import neighbours  # noqa: E402

import hsm  # noqa: E402

torch.set_num_threads(1)


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
