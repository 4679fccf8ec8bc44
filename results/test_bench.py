"""Facts about bench.py; gpu.sh rehearsed; the kernel compiled for four cards."""

import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import bench  # noqa: E402

TINY = "--lengths 8 16 --n-layer 1 --n-head 2 --n-embd 16 --tokens 16 --rounds 2 --device cpu"


def measured(out, *flags):
    bench.main([*TINY.split(), "--out", str(out), *flags])
    lines = (out / "logs" / "bench.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines], (out / "bench.md").read_text("utf-8")


def test_each_part_has_a_row_a_length_and_each_card_a_table_from_the_log_alone(tmp_path):
    rows, table = measured(tmp_path)
    parts = ("train", "decode", "forward", "backward")
    assert [(row["part"], row["T"]) for row in rows] == list(product(parts, (8, 16)))
    assert all(len(times) == 2 for row in rows for times in row["seconds"].values())
    assert "not run yet" in table and table.count("| train | 8 | 2 |") == 2
    slow, card = {"seconds": {"hsm": [2.0, 2.0], "softmax": [8.0, 8.0]}}, {"device": "cuda"}
    with open(tmp_path / "logs" / "bench.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(rows[0] | more | slow) + "\n" for more in ({}, card))
        file.write(json.dumps(rows[0] | card | {"name": "Some GPU"}))
    table = measured(tmp_path, "--table")[1]
    assert table.count("| train | 8 | 2 | hsm | 2,000 | 8 | 4.00 (4.00 .. 4.00) |") == 1
    assert "## Some GPU" in table and "not run yet" not in table


def test_a_ratio_is_the_median_of_the_rounds_ratios_compiled_beside_compiled():
    row = {"seconds": {"hsm": [1.0, 4.0, 2.0], "softmax": [3.0, 4.0, 8.0], "copy": None}}
    assert bench.times_as_fast(row, "hsm", "softmax") == "3.00 (2.00 .. 3.50)"  # of medians: 2
    assert bench.times_as_fast(row, "copy", "hsm") == bench.times_as_fast(row, "hsm", "hsm") == ""
    row["seconds"]["hsm compiled"] = [1.0, 1.0, 1.0]
    assert bench.times_as_fast(row, "hsm compiled", "softmax") == ""


def test_one_that_fails_says_why_and_the_others_go_on_in_turns():
    turns = []

    def make(name):
        if name == "b":
            raise RuntimeError("out of\nmemory")
        return lambda: turns.append(name) or time.sleep(0.05), 0

    facts = bench.race({n: lambda n=n: make(n) for n in "abc"}, 3, torch.device("cpu"))
    assert turns[-6:] == ["a", "c"] * 3 and facts["seconds"]["b"] is None
    assert facts["errors"] == {"b": "out of memory"}


def rehearsal(out):
    command = ["bash", str(HERE / "gpu.sh"), "--rehearse", "--out", str(out)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        command, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_gpu_sh_rehearses_every_part_on_a_cpu(tmp_path):
    said = rehearsal(tmp_path).communicate(timeout=300)[0]
    for part in ("there", "mixing", "decoding-2", "training", "softmax-1", "ab,ab,softmax-1"):
        assert f"{part}: done" in said and "right: skipped: needs CUDA" in said, said
    assert "| hsm kernel |" in (tmp_path / "bench.md").read_text("utf-8")
    assert (tmp_path / "runs.md").read_text("utf-8").count("-1 | 4 |") == 3


@pytest.mark.slow
def test_what_gpu_sh_has_done_stands_when_it_is_stopped(tmp_path):
    process = rehearsal(tmp_path)
    while not (line := process.stdout.readline()).startswith("mixing: done"):
        assert line
    process.terminate()
    assert "training" not in process.communicate(timeout=20)[0] and process.returncode == 130
    assert '"torch"' in (tmp_path / "there.log").read_text("utf-8")
    assert "| backward |" in measured(tmp_path, "--table")[1]


COMPILE = """
import pathlib, re, subprocess
import hsm, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
names = hsm.mix_kernel.arg_names
for card, number, ahead in CASES:
    constants = {n: value for n, value in {"AHEAD": ahead, "COLS": 64}.items() if n in names}
    types = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("x", "p", "q", "y"), "*" + number) | {"shifts": "*i64"}
    even = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n not in constants}
    source = ASTSource(hsm.mix_kernel, types, constants, even)
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32))
    pathlib.Path("cubin").write_bytes(compiled.asm["cubin"])
    said = subprocess.run([tool, "-res-usage", "cubin"], capture_output=True, text=True).stdout
    print(card, number, ahead, *re.search(r"REG:(\\d+) STACK:(\\d+) .*LOCAL:(\\d+)", said).groups())
"""


@pytest.mark.slow
def test_the_kernel_compiles_without_spills_for_t4_a100_l4_and_h100(tmp_path):
    pytest.importorskip("triton", reason="needs Triton")
    cases = list(product((75, 80, 89, 90), ("fp32", "bf16", "fp16"), (False, True)))
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE.replace("CASES", repr(cases))]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    lines = [line.split() for line in run.stdout.splitlines()]
    assert run.returncode == 0 and len(lines) == len(cases), run.stderr
    assert all(line[4:] == ["0", "0"] for line in lines), lines  # bytes of stack and local memory
