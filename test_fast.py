"""fast.py and bench.py: each test states one fact, in its name. Run with:  pytest -q test_fast.py

The kernels run on a CUDA device, or, where there is none, on the CPU in Triton's interpreter.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks once, when it is imported
# Triton 3.2's interpreter, torch 2.6's, fails with NumPy 2; 3.7, torch 2.13's, is what we tested.
pytest.importorskip("triton", minversion="3.7", reason="fast.py is optional; needs Triton 3.7")

import bench
import fast
import hsm
import prepare_data
import train
from hsm import GPT, PAIRS, BadInput, GPTConfig

torch.set_num_threads(1)

FUSED = ["ab", "vec", "gate1", "gate2"]
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def on_device():
    """Tensors are made on DEVICE, except where a test says otherwise."""
    with torch.device(DEVICE):
        yield


def mixers(pair, C, n_head, shifts, dtype=torch.float32, seed=0):
    """The same mixer twice: on the plain path, and fused. Its weights are random."""
    config = GPTConfig(mixers=pair, n_embd=C, n_head=n_head, n_layer=1, proj=False, pos_emb="none")
    torch.manual_seed(seed)
    plain = hsm.ShiftMixer(config, pair, shifts).to(dtype)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape) / max(1, parameter.dim() - 1) ** 0.5)
    fused = hsm.ShiftMixer(config, pair, shifts).to(dtype)
    fused.load_state_dict(plain.state_dict())
    fused.fused = fast.Fused(shifts)  # as fast.enable does
    return plain, fused


def values_and_gradients(mixer, x, e):
    """y, dx and the parameters' gradients for sum(e * y)."""
    x = x.detach().requires_grad_()
    y = mixer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *mixer.parameters()], e.to(y.dtype))]


def difference(ours, exact):
    """Largest difference, as a share of the largest number."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9)).item()
        for a, b in zip(ours, exact, strict=True)
        if b.numel()
    )


def random_case(seed):
    """Odd sizes, any shifts (some at T and beyond), one for all or one a head, odd strides."""
    draw = np.random.default_rng(seed)
    n_head = int(draw.integers(1, 5))
    C = n_head * int(draw.integers(1, 40))
    B, T = int(draw.integers(1, 5)), (1, 2, 3, 7, 16, 31, 65, 100)[seed % 8]
    n_shifts = int(draw.choice([1, n_head]))
    shifts = tuple(int(s) for s in draw.integers(1, 2 * T + 2, n_shifts))
    torch.manual_seed(seed)
    x, e = torch.randn(B, T, C), torch.randn(B, T, C)
    strides = seed // 2 % 4
    if strides == 1:  # time is the slowest
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif strides == 2:  # channels are the slowest
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif strides == 3:  # every second token of a longer, wider one
        x = torch.cat([x, x], dim=-1).repeat_interleave(2, dim=1)[:, ::2, :C]
    return x, e, n_head, shifts


# ------------------------------------------------------------------------------------------------
# Kernels


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("pair", FUSED)
def test_values_and_gradients_are_the_plain_paths_for_any_shape(pair, seed):
    x, e, n_head, shifts = random_case(seed)
    plain, fused = mixers(pair, x.size(2), n_head, shifts, seed=seed)
    ours = values_and_gradients(fused, x, e)
    plainly = values_and_gradients(plain, x, e)
    exact = values_and_gradients(plain.double(), x.double(), e.double())
    assert [a.shape for a in ours] == [a.shape for a in plainly]
    assert [a.dtype for a in ours] == [a.dtype for a in plainly]
    # Float32 rounds at 6e-8; sums over B T numbers and products over C add up more of that.
    assert difference(ours, exact) < max(3e-6, 3 * difference(plainly, exact))


def test_the_random_shapes_hold_the_hard_cases():
    cases = [random_case(seed) for seed in range(16)]
    assert any(x.size(1) == 1 for x, *_ in cases)
    assert any(max(shifts) >= x.size(1) > 1 for x, _, _, shifts in cases)
    assert any(len(set(shifts)) > 1 for *_, shifts in cases)
    assert sum(not x.is_contiguous() for x, *_ in cases) >= 4
    assert any(x.stride(2) > 1 for x, *_ in cases)
    assert any(x.size(2) // n_head > 1 and x.size(2) % 2 for x, _, n_head, _ in cases)


@pytest.mark.parametrize("pair", FUSED)
def test_more_rows_than_a_program_takes_and_heads_wider_than_a_tile(pair):
    x, e = torch.randn(3, 300, 70), torch.randn(3, 300, 70)
    plain, fused = mixers(pair, 70, 1, (37,))
    assert x.size(0) * x.size(1) > fast.TILES * fast.tile_size(x, (37,))[0]
    assert x.size(2) > fast.tile_size(x, (37,))[1]
    ours, plainly = (values_and_gradients(mixer, x, e) for mixer in (fused, plain))
    exact = values_and_gradients(plain.double(), x.double(), e.double())
    assert difference(ours, exact) < max(1e-5, 3 * difference(plainly, exact))


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("pair", FUSED)
def test_16_bit_numbers_are_no_worse_than_the_plain_path(pair, dtype, step):
    x, e = torch.randn(2, 40, 24, dtype=dtype), torch.randn(2, 40, 24, dtype=dtype)
    plain, fused = mixers(pair, 24, 2, (3, 16), dtype)
    ours, plainly = (values_and_gradients(mixer, x, e) for mixer in (fused, plain))
    exact = values_and_gradients(plain.double(), x.double(), e.double())
    assert [a.dtype for a in ours] == [dtype] * len(ours)
    assert difference(ours, exact) < max(2 * step, 1.5 * difference(plainly, exact))


def test_sums_over_many_tokens_keep_float32s_precision_in_16_bits():
    x = torch.ones(1, 1000, 2, dtype=torch.bfloat16)
    _, fused = mixers("vec", 2, 1, (1,), torch.bfloat16)
    _, _, da, db = values_and_gradients(fused, x, x)
    assert da.tolist() == [1000, 1000]  # adding ones in bfloat16 stops at 256
    assert db.tolist() == [torch.tensor(999.0).bfloat16().item()] * 2


@pytest.mark.parametrize("pair", FUSED)
def test_two_runs_agree_bit_for_bit(pair):
    x, e, n_head, shifts = random_case(6)
    _, fused = mixers(pair, x.size(2), n_head, shifts)
    first, second = (values_and_gradients(fused, x, e) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("pair", FUSED)
def test_no_output_depends_on_a_later_input(pair):
    x = torch.randn(1, 20, 6)
    _, fused = mixers(pair, 6, 2, (1, 5))
    for t in (0, 7, 19):
        changed = x.clone()
        changed[:, t] += 1
        differs = (fused(changed) != fused(x)).any(-1)[0]
        assert not differs[:t].any() and differs[t]


@pytest.mark.parametrize("size", [(0, 5, 4), (2, 0, 4)])
@pytest.mark.parametrize("pair", FUSED)
def test_an_empty_batch_gives_an_empty_result_and_gradients_of_zero(pair, size):
    _, fused = mixers(pair, 4, 2, (1, 2))
    y, dx, *gradients = values_and_gradients(fused, torch.randn(size), torch.randn(size))
    assert y.shape == dx.shape == size
    assert all((gradient == 0).all() for gradient in gradients)


def operator_inputs(dtype):
    x, u, v = (torch.randn(2, 7, 6, dtype=dtype, requires_grad=True) for _ in range(3))
    a, b = (torch.randn(6, requires_grad=True) for _ in range(2))
    shifts = torch.tensor([1, 9])
    yield fast.taps, (x, shifts, a, b, dtype)
    yield fast.gate, (x, shifts, u, None, dtype)
    yield fast.gate, (x, shifts, u, v, torch.float32)
    with torch.no_grad():
        e = torch.randn_like(x)
        yield fast.taps_gradients, (x.detach(), shifts, a.detach(), b.detach(), e)
        yield fast.gate_gradients, (x.detach(), shifts, u.detach(), v.detach(), e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(dtype):
    for operator, arguments in operator_inputs(dtype):
        results = torch.library.opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}, (operator, results)


COMPILE = """
import re, fast, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

constants = {"ROWS": 32, "COLS": 64}
for name in ("taps_forward", "taps_backward", "gate_forward", "gate_backward"):
    kernel = getattr(fast, name)
    types = {n: "i32" for n in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    types |= {n: "*bf16" for n in ("x", "u", "v", "y", "e", "dx", "du") if n in types}
    types |= {n: "*fp32" for n in ("a", "b", "sums") if n in types} | {"shifts": "*i64"}
    even = [n for n, kind in types.items() if kind != "constexpr"]  # multiples of 16
    at = {n: (i,) for i, n in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        types,
        {at[n]: value for n, value in constants.items()},
        {at[n]: [["tt.divisibility", 16]] for n in even},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", CARD, 32)).asm["ptx"]
    large = [n for n in re.findall(r"(?:ld|st)[.]global[.](\\S+)", ptx) if "64" not in n]
    print(name, sum(n == "v4.b32" for n in large), sum(n != "v4.b32" for n in large))
"""


@pytest.mark.parametrize("card", [80, 90])  # A100, H100
def test_the_compiler_takes_the_kernels_and_moves_16_bytes_at_a_time(card, tmp_path):
    code = COMPILE.replace("CARD", str(card))
    status, output, errors = command(code=code, cwd=tmp_path, TRITON_INTERPRET=None)
    assert status == 0, errors
    counts = {
        name: (int(wide), int(narrow)) for name, wide, narrow in map(str.split, output.splitlines())
    }
    assert counts == {
        "taps_forward": (10, 0),
        "taps_backward": (12, 2),  # the sums: a number a channel
        "gate_forward": (10, 0),
        "gate_backward": (20, 0),
    }


# ------------------------------------------------------------------------------------------------
# In a model


def model(mixers="ab", enabled=True, **fields):
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16} | fields
    gpt = GPT(GPTConfig(mixers=mixers, **shape))
    if enabled:
        fast.enable(gpt)
    return gpt


def tokens(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.randint(31, shape)


@pytest.mark.parametrize(
    ("backend", "autocast"), [("eager", False), ("aot_eager", False), ("aot_eager", True)]
)
@pytest.mark.parametrize("pair", ["ab", "gate1", "vec,gate2,softmax"])
def test_a_compiled_model_has_no_graph_break_and_the_same_loss_and_gradients(
    pair, backend, autocast
):
    torch.compiler.reset()
    idx, gpt = tokens(2, 16), model(pair, n_layer=pair.count(",") + 1)
    compiled = torch.compile(gpt, fullgraph=True, backend=backend)
    losses, gradients = [], []
    for function in (gpt, compiled):
        gpt.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = function(idx, idx)[1]
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in gpt.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert difference(*gradients) < (2e-2 if autocast else 1e-5)


@pytest.mark.parametrize("in_proj", [False, True])
@pytest.mark.parametrize("pair", FUSED)
def test_under_autocast_a_layer_gives_what_the_plain_path_gives(pair, in_proj):
    idx = tokens(2, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        plain, fused = (model(pair, on, in_proj=in_proj)(idx, idx)[1] for on in (False, True))
    assert fused.item() == pytest.approx(plain.item(), rel=1e-3)


def test_training_is_the_same_with_and_without_after_200_steps():
    losses = []
    for enabled in (False, True):
        gpt = model("ab,gate1", enabled, shifts="layer")
        optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
        text = (torch.arange(400) ** 2 % 31) ^ tokens(400)[0:400] % 2  # half rule, half noise
        for step in range(200):
            start = torch.arange(4)[:, None] * 90 + step % 70
            window = text[start + torch.arange(17)]
            loss = gpt(window[:, :-1], window[:, 1:])[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] < 2.5  # it has learnt something: from ln 31 = 3.4
    assert abs(losses[0] - losses[1]) < 1e-3


def test_streams_checkpoints_and_parameters_are_the_plain_paths():
    plain, fused = model("ab,softmax", False), model("ab,softmax", True)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert fused.num_params() == plain.num_params()
    plain.load_state_dict(fused.state_dict())
    idx, cache = tokens(2, 16), fused.init_cache(2)
    streamed = torch.cat([fused(chunk, cache=cache)[0] for chunk in idx.split(5, dim=1)], dim=1)
    torch.testing.assert_close(streamed, fused(idx)[0], rtol=1e-5, atol=1e-5)
    fast.disable(fused)
    assert torch.equal(fused(idx)[0], plain(idx)[0])


# ------------------------------------------------------------------------------------------------
# Refusals: one line, and nothing changed


@pytest.mark.parametrize("pair", sorted({*PAIRS, "softmax"} - {*FUSED}))
def test_a_pair_function_without_a_kernel_is_refused_by_name(pair):
    gpt = model(f"{pair},ab" if pair != "softmax" else pair, enabled=False)
    with pytest.raises(BadInput, match=f"ab, vec, gate1 and gate2, not {pair}"):
        fast.enable(gpt)
    assert all(getattr(block.mixer, "fused", None) is None for block in gpt.blocks)


def test_float64_is_refused():
    with pytest.raises(BadInput, match=r"not torch\.float64"):
        fast.enable(model(enabled=False).double())
    with pytest.raises(BadInput, match=r"not torch\.float64"):
        model().double()(tokens(1, 4))


def test_a_cpu_is_refused_where_kernels_are_compiled(monkeypatch):
    monkeypatch.setattr(fast, "INTERPRETED", False)
    with pytest.raises(BadInput, match="needs a CUDA device, not cpu; use --no-fast"):
        fast.enable(model(enabled=False).cpu())


def command(*arguments, cwd, code=None, **environment):
    """Run a program of ours, or Python code, as a user does. Returns (status, output, errors)."""
    environment = {k: v for k, v in (os.environ | environment).items() if v is not None}
    what = ["-c", code] if code else [str(HERE / arguments[0])]
    done = subprocess.run(
        [sys.executable, *what, *arguments[not code :]],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small prepared text."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "input.txt").write_text("the cat sat on the mat. " * 200, encoding="utf-8")
    prepare_data.prepare("file", folder / "input.txt", folder=folder / "n")
    return folder / "n"


SMALL = f"""--n-layer 2 --n-embd 16 --n-head 2 --block-size 16 --batch-size 4 --steps 3
    --eval-interval 3 --eval-tokens 64 --sample-tokens 5 --device {DEVICE}""".split()


def test_train_takes_fast_and_computes_the_same(data, tmp_path):
    losses = []
    for flag in ("--fast", "--no-fast"):
        arguments = ["--data", str(data), "--out", str(tmp_path / flag), *SMALL, flag]
        config = prepare_data.parse(train.TrainConfig, arguments, "")
        losses.append(train.train(config).best_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_kernels_are_chosen_by_themselves_where_all_hsm_layers_have_one():
    for mixers, taken in (("ab,softmax", True), ("ab,matrix", False), ("softmax", False)):
        gpt = model(mixers, enabled=False)
        words = train.choose_kernels(gpt, None, torch.device("cuda"))
        kernels = [b.mixer.fused for b in gpt.blocks if isinstance(b.mixer, hsm.ShiftMixer)]
        assert [kernel is not None for kernel in kernels] == [taken] * len(kernels)
        what = "softmax alone" if mixers == "softmax" else "matrix"
        reason = f"(the fast path knows ab, vec, gate1 and gate2, not {what})"
        assert words == ("; fused kernels" if taken else f"; without fused kernels {reason}")


def test_train_refuses_fast_on_a_cpu_in_one_line(data, tmp_path):
    arguments = ["--fast", "--data", str(data), "--out", "out", *SMALL, "--device", "cpu"]
    status, _, errors = command("train.py", *arguments, cwd=tmp_path, TRITON_INTERPRET=None)
    assert status == 2
    assert re.fullmatch(r"train\.py: the fast path needs a CUDA device, not cpu.*\n", errors)
    assert not (tmp_path / "out").exists()


def test_without_triton_the_rest_works_and_fast_is_refused_in_one_line(data, tmp_path):
    arguments = ["--fast", "--data", str(data), "--out", "out", *SMALL]
    code = (
        "import sys; sys.modules['triton'] = None\n"  # as if it were not installed
        "import train, prepare_data, sample\n"  # and hsm, without a complaint
        "prepare_data.run(train.main)"
    )
    status, _, errors = command(*arguments, code=code, cwd=tmp_path)
    assert status == 2
    assert re.fullmatch(r".*: the fast path needs Triton: pip install triton.*\n", errors)


# ------------------------------------------------------------------------------------------------
# bench.py

TINY = f"""--n-layer 1 --n-head 2 --n-embd 16 --tokens 32 --rounds 2 --device {DEVICE}
    --lengths 16 32 --positions 8 24""".split()


@pytest.fixture(scope="session")
def benched(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    bench.main([*TINY, "--out", str(out)])
    return out


def test_bench_writes_log_table_and_picture_and_the_table_comes_from_the_log(benched, capsys):
    assert (benched / "bench.png").stat().st_size > 10_000
    written = (benched / "bench.md").read_bytes()
    (benched / "bench.md").unlink()
    bench.main(["--table", "--out", str(benched)])
    assert (benched / "bench.md").read_bytes() == written
    text = written.decode("utf-8")
    for words in ("### Training", "### Mixing", "### Decoding", "not run", torch.__version__):
        assert words in text
    rows = bench.read_log(benched)
    assert [(row["part"], row["T"]) for row in rows] == [
        *[(part, T) for part in ("mix", "train") for T in (16, 32)], ("decode", 8), ("decode", 24)
    ]  # fmt: skip
    for row in rows:
        assert all(len(s) == 2 and min(s) > 0 for s in row["seconds"].values())
    for row in rows[2:4]:  # equal parameters, by a unit of the feed-forward network
        assert abs(row["parameters"]["hsm"] - row["parameters"]["softmax"]) < 3 * 16
        assert row["saved_bytes"]["hsm"] < row["saved_bytes"]["softmax"] * 2


def test_a_measurement_repeated_adds_its_rounds(benched, tmp_path):
    lines = (benched / "logs" / "bench.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "bench.jsonl"
    log.write_text("\n".join([lines[2], lines[3], lines[2]]) + "\n", encoding="utf-8")
    rows = bench.read_log(tmp_path)
    assert [(row["part"], row["T"], len(row["seconds"]["hsm"])) for row in rows] == [
        ("train", 16, 4), ("train", 32, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_a_length_without_memory_says_so_and_the_bench_goes_on(error, tmp_path, monkeypatch):
    forward = GPT.forward

    def fails(self, idx, *arguments, **named):
        if idx.size(1) == 32 and self.config.mixers == "softmax":
            raise error
        return forward(self, idx, *arguments, **named)

    monkeypatch.setattr(GPT, "forward", fails)
    bench.main([*TINY, "--lengths", "32", "16", "--parts", "train", "--out", str(tmp_path)])
    short, long = sorted(bench.read_log(tmp_path), key=lambda row: row["T"])
    assert long["seconds"]["softmax"] is None and len(long["seconds"]["hsm"]) == 2
    assert all(short["seconds"].values())
    line = next(li for li in bench.report([short, long]).splitlines() if li.startswith("| 32 |"))
    assert "| out of memory | - |" in line


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def fails():
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        bench.race({"hsm": lambda: fails}, 2, torch.device(DEVICE))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_its_power(power):
    lengths = [1024, 4096, 16384]
    assert bench.exponent(lengths, [3 * T**power for T in lengths]) == pytest.approx(power)


def test_ratios_are_paired_by_round():
    row = {"seconds": {"hsm": [1.0, 2.0, 4.0], "softmax": [2.0, 4.0, 8.0], "copy": None}}
    assert bench.ratio(row, "softmax", "hsm") == (2, 2, 2)
    assert bench.ratio(row, "softmax", "copy") is None


def test_an_unknown_card_gets_no_share_of_its_peak():
    row = {
        "name": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "batch": 1, "T": 1000, "n_layer": 2,
        "n_embd": 10, "parameters": {"hsm": 10**6, "softmax": 10**6},
        "seconds": {"hsm": [1e-3], "softmax": [1e-3]},
    }  # fmt: skip
    flops = 6 * 10**6 * 1000 / 1e-3
    assert bench.share_of_peak(row, "hsm") == pytest.approx(flops / 989.4e12)
    assert bench.share_of_peak(row, "softmax") > bench.share_of_peak(row, "hsm")
    assert bench.share_of_peak(row | {"name": "NVIDIA Unknown"}, "hsm") is None
    assert bench.share_of_peak(row | {"dtype": "float32"}, "hsm") is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "1"], "rounds must be at least 2"),
        (["--lengths", "0"], "lengths must be at least 1"),
        (["--lengths", "many"], "many"),
        (["--parts", "mixx"], "mixx"),
        (["--mixer", "abc"], "unknown mixer 'abc'"),
        (["--n-embd", "31"], "multiple of n_head"),
        (["--quik"], "--quick"),
        (["--table"], "measure first"),
        (["--dtype", "float16", "--device", "cpu"], "float16 does not train on a CPU"),
        (["--mixer", "matrix", "--fast"], "not matrix"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bench_refuses(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        prepare_data.run(lambda: bench.main(arguments))
    errors = capsys.readouterr().err
    assert end.value.code == 2
    assert re.search(words, errors) and errors.count("\n") == 1, errors
    assert not list(tmp_path.iterdir())


def test_a_damaged_log_is_refused_with_its_line(benched, tmp_path):
    (tmp_path / "logs").mkdir()
    line = (benched / "logs" / "bench.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "logs" / "bench.jsonl").write_text(f"{line}\n{line[:50]}\n", encoding="utf-8")
    with pytest.raises(BadInput, match="line 2, is no measurement"):
        bench.read_log(tmp_path)


def test_quick_keeps_the_sizes_that_were_asked_for():
    quick = bench.configure(["--quick", "--rounds", "9"])
    assert quick == replace(bench.BenchConfig(quick=True, **bench.QUICK), rounds=9)


def test_the_committed_table_comes_from_the_committed_log():
    rows = bench.read_log(HERE / "results")
    assert (HERE / "results" / "bench.md").read_text(encoding="utf-8") == bench.report(rows)
