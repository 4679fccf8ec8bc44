"""Each test states one fact, in its name. Run with:  pytest -q

The tests that go over PAIRS or MODELS take a new pair function up the moment it has a name there.
"""

import math

import numpy as np
import pytest
import torch

import hsm
from hsm import GPT, PAIRS, BadInput, DelayLine, GPTConfig, KVCache, delay, receptive_field

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
                parameter.mul_(10)
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
    {"shifts": "3,1,7"},
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


def test_layer_shifts_start_again_after_ceil_log2_of_block_size():
    config = GPTConfig(n_layer=6, shifts="layer", block_size=10)
    assert [s for _, (s,) in config.layers] == [1, 2, 4, 8, 1, 2]


def test_head_shifts_are_2_to_the_j_plus_h():
    config = GPTConfig(n_layer=3, n_head=3, n_embd=6, shifts="heads", block_size=16)
    assert [s for _, s in config.layers] == [(1, 2, 4), (2, 4, 8), (4, 8, 1)]


def test_explicit_shifts_tile_over_the_hsm_layers():
    config = GPTConfig(n_layer=5, mixers="ab,ab,softmax", shifts="5,1,2")
    assert [s for _, s in config.layers] == [(5,), (1,), (), (2,), (5,)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mixers": "abc"}, "abc.*ab, vec, matrix, gate1, gate2, fusion, mult, softmax"),
        ({"mixers": ""}, "choose from"),
        ({"mixers": "ab,"}, "choose from"),
        ({"mixers": "ab,ab,ab", "n_layer": 2}, "n_layer=2"),
        ({"shifts": "1,two"}, "1,two"),
        ({"shifts": "1,,2"}, "1,,2"),
        ({"shifts": ""}, "shifts"),
        ({"shifts": "0,1"}, "from 1"),
        ({"shifts": "-1"}, "from 1"),
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


@pytest.mark.parametrize("mixers", MODELS)
def test_loss_at_initialisation_is_ln_V(mixers):
    torch.manual_seed(0)
    model = GPT(GPTConfig(mixers=mixers, vocab_size=65))
    idx = tokens(8, 128, vocab_size=65)
    assert abs(model(idx, idx.roll(-1, 1))[1].item() - math.log(65)) < 0.1


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
    with pytest.raises(Exception, match="pickle"):
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
