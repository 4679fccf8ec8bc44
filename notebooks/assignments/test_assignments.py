"""The assignments keep what they promise. Run with:  pytest -q notebooks/assignments

Each solution gets all points; each of the wrong solutions below, which are plausible ones, is told
by the right test what is wrong with it; an untouched student version gets nothing. Training is
short here (SMOKE=1), and no cell is skipped. What needs nbgrader is skipped where it is missing.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

import grade  # noqa: E402 (the path comes first)
from check import Different, Failed, check, raises, same  # noqa: E402

import hsm  # noqa: E402

POINTS = {
    "1_delay": 12,
    "2_reach": 14,
    "3_pair": 14,
    "4_ring": 14,
    "5_budget": 12,
    "6_hybrid": 16,
    "7_recall": 18,
}
needs_nbgrader = pytest.mark.skipif(
    importlib.util.find_spec("nbgrader") is None, reason="nbgrader is not installed"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short training, pictures without a window, and hsm.py as it was after each test."""
    monkeypatch.setenv("SMOKE", "1")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(hsm, "PAIRS", dict(hsm.PAIRS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.set_num_threads(1)
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def cells_of(name):
    return grade.read(HERE / "source" / name / f"{name}.ipynb")["cells"]


def settings(cell):
    """What nbgrader knows of a cell."""
    return cell["metadata"].get("nbgrader", {})


def play(name, answers, monkeypatch):
    """Run a notebook in this process, as nbgrader would: an error ends its cell only.

    answers: {grade id: source} in place of a solution.  Returns the points and all the errors.
    """
    monkeypatch.chdir(HERE / "source" / name)
    assert set(answers) <= {grade.grade_id(cell) for cell in cells_of(name)}
    points, errors, names = 0, [], {"__name__": "__main__"}
    for cell in cells_of(name):
        if cell["cell_type"] != "code":
            continue
        source = answers.get(grade.grade_id(cell), "".join(cell["source"]))
        try:
            exec(compile(source, f"<{grade.grade_id(cell)}>", "exec"), names)
            points += settings(cell).get("points", 0)
        except Exception as error:
            errors.append(error)
    return points, errors


# ------------------------------------------------------------------------------------------------
# Wrong solutions: assignment -> [(what is wrong, the cell, its source, the test that says so)]

WRONG = {
    "1_delay": [
        (
            "the end comes round to the start: the future leaks",
            "shift_right",
            "def shift_right(x, shift): return x.roll(shift, dims=1)",
            "A2",
        ),
        (
            "off by one",
            "shift_right",
            "def shift_right(x, shift):\n"
            "    return torch.cat([0 * x[:, : shift + 1], x], dim=1)[:, : x.size(1)]",
            "A3",
        ),
        (
            "a shift of 0 gives an empty slice",
            "shift_right",
            "def shift_right(x, shift):\n"
            "    return torch.cat([0 * x[:, :shift], x[:, :-shift]], dim=1)",
            "A4",
        ),
        (
            "writes into x",
            "shift_right",
            "def shift_right(x, shift):\n"
            "    old = x.clone()\n"
            "    x[:, :shift] = 0\n"
            "    if shift < x.size(1): x[:, shift:] = old[:, : x.size(1) - shift]\n"
            "    return x",
            "A",
        ),
        (
            "every layer delays the first input",
            "ladder",
            "def ladder(x, shifts, a, b):\n"
            "    y = x\n"
            "    for s in shifts: y = a * y + b * shift_right(x, s)\n"
            "    return y",
            "B2",
        ),
        (
            "changes the last token only",
            "is_causal",
            "def is_causal(f, T=16, C=4):\n"
            "    x = torch.randn(1, T, C)\n"
            "    changed = x.clone()\n"
            "    changed[:, -1] += 1\n"
            "    return torch.equal(f(x)[:, :-1], f(changed)[:, :-1])",
            "C3",
        ),
        (
            "looks at the first output only",
            "is_causal",
            "def is_causal(f, T=16, C=4):\n"
            "    x = torch.randn(1, T, C)\n"
            "    changed = x.clone()\n"
            "    changed[:, 1:] += 1\n"
            "    return torch.equal(f(x)[:, 0], f(changed)[:, 0])",
            "C3",
        ),
    ],
    "2_reach": [
        (
            "reach off by one",
            "path",
            "def path(k, n_layer):\n"
            "    if not 0 <= k <= 2**n_layer: raise ValueError('out of reach')\n"
            "    return [j for j in range(n_layer) if k >> j & 1]",
            "A5",
        ),
        (
            "counts the residual twice: the mixer's stay and one more",
            "count_paths",
            "def count_paths(layers):\n"
            "    paths = [1]\n"
            "    for shifts in layers:\n"
            "        longer = [0] * (len(paths) + max(shifts))\n"
            "        for step in [0, 0, *shifts]:\n"
            "            for k, n in enumerate(paths): longer[k + step] += n\n"
            "        paths = longer\n"
            "    return paths",
            "B2",
        ),
        (
            "heads with the same shift count twice",
            "count_paths",
            "def count_paths(layers):\n"
            "    paths = [1]\n"
            "    for shifts in layers:\n"
            "        longer = [0] * (len(paths) + max(shifts))\n"
            "        for step in [0, *shifts]:\n"
            "            for k, n in enumerate(paths): longer[k + step] += n\n"
            "        paths = longer\n"
            "    return paths",
            "B6",
        ),
        (
            "64-bit numbers overflow",
            "count_paths",
            "import numpy as np\n"
            "def count_paths(layers):\n"
            "    paths = np.ones(1, dtype=np.int64)\n"
            "    for shifts in layers:\n"
            "        step = np.zeros(max(shifts) + 1, dtype=np.int64)\n"
            "        step[[0, *shifts]] = 1\n"
            "        paths = np.convolve(paths, step)\n"
            "    return paths",
            "B7",
        ),
        (
            "loops in place of a closed form",
            "closed-forms",
            "def paths_of_ones(n, k):\n"
            "    return math.comb(n, k) if k >= 0 else 0\n"
            "def paths_of_two_ladders(rungs, k):\n"
            "    return sum(0 <= k - i < 2**rungs for i in range(2**rungs))",
            "C8",
        ),
        (
            "stays twice where it shifts, too",
            "paths_with_residual",
            "def paths_with_residual(n_layer, k):\n"
            "    return 2**n_layer if 0 <= k < 2**n_layer else 0",
            "D1",
        ),
        (
            "the residual counted twice: three ways to stay",
            "paths_with_residual",
            "def paths_with_residual(n_layer, k):\n"
            "    return 3 ** (n_layer - k.bit_count()) if 0 <= k < 2**n_layer else 0",
            "D1",
        ),
    ],
    "3_pair": [
        (
            "the gate belongs to z",
            "HeadGate",
            "class HeadGate(nn.Module):\n"
            "    def __init__(self, n_embd, n_head):\n"
            "        super().__init__()\n"
            "        self.n = n_embd // n_head\n"
            "        self.w = nn.Parameter(torch.zeros(n_head, n_embd))\n"
            "        self.u = nn.Parameter(torch.zeros(n_head, n_embd))\n"
            "        self.c = nn.Parameter(torch.zeros(n_head))\n"
            "    def forward(self, x, z):\n"
            "        g = torch.sigmoid(x @ self.w.T + z @ self.u.T + self.c)\n"
            "        return torch.lerp(x, z, g.repeat_interleave(self.n, -1))",
            "A3",
        ),
        (
            "heads interleaved",
            "HeadGate",
            "class HeadGate(nn.Module):\n"
            "    def __init__(self, n_embd, n_head):\n"
            "        super().__init__()\n"
            "        self.n = n_embd // n_head\n"
            "        self.w = nn.Parameter(torch.zeros(n_head, n_embd))\n"
            "        self.u = nn.Parameter(torch.zeros(n_head, n_embd))\n"
            "        self.c = nn.Parameter(torch.zeros(n_head))\n"
            "    def forward(self, x, z):\n"
            "        g = torch.sigmoid(x @ self.w.T + z @ self.u.T + self.c)\n"
            "        return torch.lerp(z, x, g.repeat(1, 1, self.n))",
            "A4",
        ),
        (
            "a sum can't compare",
            "Mine",
            "class Mine(nn.Module):\n"
            "    def __init__(self, n_embd, n_head):\n"
            "        super().__init__()\n"
            "        self.A, self.B = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, n_embd)\n"
            "    def forward(self, x, z): return self.A(x) + self.B(z)",
            "B2",
        ),
        (
            "a mean over time leaks the future",
            "Mine",
            "class Mine(nn.Module):\n"
            "    def __init__(self, n_embd, n_head):\n"
            "        super().__init__()\n"
            "        self.A = nn.Linear(n_embd, n_embd)\n"
            "    def forward(self, x, z):\n"
            "        y = self.A(x) * z + x\n"
            "        return y - 0.1 * y.mean(1, keepdim=True)",
            "B5",
        ),
        (
            "the name is not entered",
            "learns",
            "def learns(steps): return 4.9, 1.0",
            "C1",
        ),
        (
            "trains, and forgets zero_grad and step",
            "learns",
            "hsm.PAIRS['mine'] = Mine\n"
            "def learns(steps):\n"
            "    model = hsm.GPT(hsm.GPTConfig(mixers='mine', **SHAPE))\n"
            "    before = model(*text_batch())[1].item()\n"
            "    for _ in range(steps): model(*text_batch())[1].backward()\n"
            "    return before, model(*text_batch())[1].item()",
            "C2",
        ),
    ],
    "4_ring": [
        (
            "one slot too many: off by one",
            "Ring",
            "class Ring:\n"
            "    def __init__(self, shift): self.n, self.t, self.ring = shift + 1, 0, None\n"
            "    def __call__(self, token):\n"
            "        if self.ring is None: self.ring = token.new_zeros(self.n, *token.shape)\n"
            "        old = self.ring[self.t % self.n].clone()\n"
            "        self.ring[self.t % self.n] = token\n"
            "        self.t += 1\n"
            "        return old",
            "A2",
        ),
        (
            "hands out a view that the next line overwrites",
            "Ring",
            "class Ring:\n"
            "    def __init__(self, shift): self.n, self.t, self.ring = shift, 0, None\n"
            "    def __call__(self, token):\n"
            "        if self.ring is None: self.ring = token.new_zeros(self.n, *token.shape)\n"
            "        old = self.ring[self.t % self.n]\n"
            "        self.ring[self.t % self.n] = token\n"
            "        self.t += 1\n"
            "        return old",
            "A1",
        ),
        (
            "keeps the whole history",
            "Ring",
            "class Ring:\n"
            "    def __init__(self, shift): self.shift, self.all = shift, []\n"
            "    def __call__(self, token):\n"
            "        self.all.append(token.clone())\n"
            "        if len(self.all) <= self.shift: return torch.zeros_like(token)\n"
            "        return self.all[-1 - self.shift]",
            "A5",
        ),
        (
            "one state for all objects",
            "Ring",
            "from collections import deque\n"
            "class Ring:\n"
            "    kept = {}\n"
            "    def __init__(self, shift):\n"
            "        self.shift = shift\n"
            "        Ring.kept[shift] = deque()\n"
            "    def __call__(self, token):\n"
            "        kept = Ring.kept[self.shift]\n"
            "        kept.append(token.clone())\n"
            "        if len(kept) <= self.shift: return torch.zeros_like(token)\n"
            "        return kept.popleft()",
            "A4",
        ),
        (
            "forgets the state between chunks",
            "Stream",
            "class Stream:\n"
            "    def __init__(self, shift): self.shift = shift\n"
            "    def __call__(self, x): return hsm.delay(x, self.shift)",
            "B2",
        ),
        (
            "wrong for chunks shorter than the shift",
            "Stream",
            "class Stream:\n"
            "    def __init__(self, shift): self.shift, self.past = shift, None\n"
            "    def __call__(self, x):\n"
            "        if self.past is None: self.past = x.new_zeros(len(x), self.shift, x.size(2))\n"
            "        y = torch.cat([self.past, x], 1)[:, : x.size(1)].clone()\n"
            "        self.past = x[:, -self.shift :].clone()\n"
            "        return y",
            "B3",
        ),
        (
            "a slice keeps its chunk alive",
            "Stream",
            "class Stream:\n"
            "    def __init__(self, shift): self.shift, self.past = shift, None\n"
            "    def __call__(self, x):\n"
            "        if self.past is None: self.past = x.new_zeros(len(x), self.shift, x.size(2))\n"
            "        joined = torch.cat([self.past, x], 1)\n"
            "        self.past = joined[:, -self.shift :]\n"
            "        return joined[:, : x.size(1)]",
            "B4",
        ),
        (
            "the ladder has 2^L shifts",
            "state",
            "def hsm_state(n_layer, C): return 2**n_layer * C\n"
            "def softmax_state(n_layer, C, length): return 2 * n_layer * C * length\n"
            "def break_even(n_layer): return 2**n_layer // (2 * n_layer) + 1",
            "C1",
        ),
        (
            "values without keys",
            "state",
            "def hsm_state(n_layer, C): return (2**n_layer - 1) * C\n"
            "def softmax_state(n_layer, C, length): return n_layer * C * length\n"
            "def break_even(n_layer): return (2**n_layer - 1) // n_layer + 1",
            "C2",
        ),
    ],
    "5_budget": [
        (
            "forgets the output projection",
            "mixer_params",
            "def mixer_params(name, C, H):\n"
            "    return {'softmax': 3 * C * C, 'ab': 2 * H, 'vec': 2 * C, 'matrix': 2 * C * C,\n"
            "            'gate2': 2 * C * C + C}[name]",
            "A1",
        ),
        (
            "forgets the gate's constants",
            "mixer_params",
            "def mixer_params(name, C, H):\n"
            "    return C * C + {'softmax': 3 * C * C, 'ab': 2 * H, 'vec': 2 * C,\n"
            "                    'matrix': 2 * C * C, 'gate2': 2 * C * C}[name]",
            "A3",
        ),
        (
            "a unit of width costs C, not 2 C",
            "matched_width",
            "def matched_width(mixer_size, C): return 4 * C + round((4 * C * C - mixer_size) / C)",
            "B2",
        ),
        (
            "rounds down",
            "matched_width",
            "def matched_width(mixer_size, C):\n"
            "    width = 4 * C + (4 * C * C - mixer_size) // (2 * C)\n"
            "    if width < 1: raise ValueError('too large')\n"
            "    return width",
            "B3",
        ),
        (
            "counts the vocabulary's table",
            "fair",
            "def fair(a, b):\n"
            "    n, m = (hsm.GPT(c).num_params(non_embedding=False) for c in (a, b))\n"
            "    return abs(n - m) <= 0.01 * max(n, m)",
            "C3",
        ),
        (
            "only one of the two may be larger",
            "fair",
            "def fair(a, b):\n"
            "    n, m = (hsm.GPT(c).num_params() for c in (a, b))\n"
            "    return n - m <= 0.01 * n",
            "C5",
        ),
        (
            "every token sees all T",
            "attention_products",
            "def attention_products(C, T): return 2 * C * T",
            "D2",
        ),
    ],
    "6_hybrid": [
        (
            "leaves the tiling to hsm: several softmax layers",
            "placements",
            "def placements(n_layer): return [','.join(['ab'] * i + ['softmax']) for i in "
            "range(n_layer)]",
            "A1",
        ),
        (
            "the whole budget for each candidate",
            "compare",
            "def compare(run, candidates, budget, seeds):\n"
            "    if budget < len(candidates) * len(seeds): raise ValueError('too small')\n"
            "    steps = budget // len(seeds)\n"
            "    return {c: [run(c, steps, s) for s in seeds] for c in candidates}",
            "B2",
        ),
        (
            "spends the rest on the last run: unequal steps",
            "compare",
            "def compare(run, candidates, budget, seeds):\n"
            "    runs = len(candidates) * len(seeds)\n"
            "    if budget < runs: raise ValueError('too small')\n"
            "    rest, results = budget % runs, {}\n"
            "    for c in candidates:\n"
            "        results[c] = []\n"
            "        for s in seeds:\n"
            "            last = (c, s) == (candidates[-1], seeds[-1])\n"
            "            results[c].append(run(c, budget // runs + rest * last, s))\n"
            "    return results",
            "B3",
        ),
        (
            "the luckiest run decides",
            "verdict",
            "def verdict(results):\n"
            "    best = min(results, key=lambda c: min(results[c]))\n"
            "    return best, all(all(a < b for a, b in zip(results[best], r))\n"
            "                     for c, r in results.items() if c != best)",
            "C3",
        ),
        (
            "agreement from the ranges, not seed by seed",
            "verdict",
            "def verdict(results):\n"
            "    best = min(results, key=lambda c: sum(results[c]))\n"
            "    return best, all(max(results[best]) < min(r)\n"
            "                     for c, r in results.items() if c != best)",
            "C4",
        ),
        (
            "a diverged run wins",
            "verdict",
            "def verdict(results):\n"
            "    best = min(results, key=lambda c: sum(results[c]))\n"
            "    return best, all(all(a < b for a, b in zip(results[best], r))\n"
            "                     for c, r in results.items() if c != best)",
            "C6",
        ),
        (
            "claims more than the losses show",
            "experiment",
            "RUNS.clear()\n"
            "results = compare(run, placements(4), BUDGET, SEEDS)\n"
            "best, agreed = verdict(results)[0], not verdict(results)[1]",
            "D4",
        ),
    ],
    "7_recall": [
        (
            "one period for the whole batch: a fixed distance",
            "repeats",
            "def repeats(B, T, rng):\n"
            "    P = torch.randint(SHORTEST, LONGEST + 1, (1,), generator=rng).item()\n"
            "    block = torch.rand(B, SYMBOLS, generator=rng).argsort(1)\n"
            "    place = torch.arange(T + 1)\n"
            "    s = block[:, place % P]\n"
            "    return s[:, :-1], torch.where(place[1:] > P, s[:, 1:], -1)",
            "A4",
        ),
        (
            "targets are the input itself: off by one",
            "repeats",
            "def repeats(B, T, rng):\n"
            "    P = torch.randint(SHORTEST, LONGEST + 1, (B, 1), generator=rng)\n"
            "    block = torch.rand(B, SYMBOLS, generator=rng).argsort(1)\n"
            "    place = torch.arange(T)\n"
            "    s = block.gather(1, place % P)\n"
            "    return s, torch.where(place > P, s, -1)",
            "A3",
        ),
        (
            "asks for what can't be known",
            "repeats",
            "def repeats(B, T, rng):\n"
            "    P = torch.randint(SHORTEST, LONGEST + 1, (B, 1), generator=rng)\n"
            "    block = torch.rand(B, SYMBOLS, generator=rng).argsort(1)\n"
            "    place = torch.arange(T + 1)\n"
            "    s = block.gather(1, place % P)\n"
            "    return s[:, :-1], torch.where(place[1:] >= P, s[:, 1:], -1)",
            "A6",
        ),
        (
            "divides by all tokens",
            "accuracy",
            "def accuracy(logits, targets):\n"
            "    return (logits.argmax(-1) == targets).float().mean().item()",
            "B1",
        ),
        (
            "the highest over time, not over symbols",
            "accuracy",
            "def accuracy(logits, targets):\n"
            "    known = targets != -1\n"
            "    return (logits.argmax(1)[:, : targets.size(1)] == targets)[known]"
            ".float().mean().item()",
            "B",
        ),
        (
            "leaves failed runs out",
            "experiment",
            "def experiment(run, models, seeds):\n"
            "    results = {m: [] for m in models}\n"
            "    for m in models:\n"
            "        for s in seeds:\n"
            "            try: results[m].append(run(m, s))\n"
            "            except Exception: pass\n"
            "    return results",
            "C5",
        ),
        (
            "a winner although the ranges overlap",
            "report",
            "def report(results, steps):\n"
            "    n = len(next(iter(results.values())))\n"
            "    lines, means = [f'{steps} steps, {n} seeds'], {}\n"
            "    for m, v in results.items():\n"
            "        good = [x for x in v if x == x]\n"
            "        if not good:\n"
            "            lines.append(f'{m}: all {n} runs failed')\n"
            "            continue\n"
            "        means[m] = sum(good) / len(good)\n"
            "        failed = f'; {n - len(good)} of {n} runs failed' if len(good) < n else ''\n"
            "        lines.append(f'{m}: mean {means[m]:.3f}, lowest {min(good):.3f}, '\n"
            "                     f'highest {max(good):.3f}{failed}')\n"
            "    x, y = sorted(means, key=means.get, reverse=True)[:2]\n"
            "    failed = any(v != v for v in results[x] + results[y])\n"
            "    lines.append(f'verdict: no difference shown between {x} and {y}' if failed\n"
            "                 else f'verdict: {x} is better than {y}')\n"
            "    return '\\n'.join(lines)",
            "D3",
        ),
        (
            "failures are hidden",
            "report",
            "def report(results, steps):\n"
            "    good = {m: [x for x in v if x == x] for m, v in results.items()}\n"
            "    return '\\n'.join(f'{m}: {max(v):.3f}' for m, v in good.items() if v)",
            "D1",
        ),
    ],
}


@pytest.mark.parametrize("name", POINTS)
def test_the_solution_gets_all_points_and_no_error(name, monkeypatch):
    points, errors = play(name, {}, monkeypatch)
    assert not errors
    assert points == POINTS[name]


@pytest.mark.parametrize(
    "name, wrong", [(name, wrong) for name in WRONG for wrong in WRONG[name]], ids=lambda x: x[0]
)
def test_a_wrong_solution_loses_points_and_is_told_why_by_the_right_test(name, wrong, monkeypatch):
    _, cell, source, test = wrong
    points, errors = play(name, {cell: source}, monkeypatch)
    assert points < POINTS[name]
    said = [str(error) for error in errors if isinstance(error, Failed)]
    assert said[0].startswith(f"FAILED {test}")
    assert all("\n" not in line and len(line) < 600 for line in said)


def test_every_assignment_has_two_wrong_solutions_or_more():
    assert set(WRONG) == set(POINTS) == set(grade.NAMES)
    assert all(len(wrong) >= 2 for wrong in WRONG.values())


# ------------------------------------------------------------------------------------------------
# The notebooks as files


@pytest.mark.parametrize("name", POINTS)
def test_a_source_notebook_is_well_formed(name):
    notebook, cells = grade.read(HERE / "source" / name / f"{name}.ipynb"), cells_of(name)
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids)
    assert sum(settings(cell).get("points", 0) for cell in cells) == POINTS[name]
    assert notebook["nbformat"] == 4
    for cell in cells:
        source, how = "".join(cell["source"]), settings(cell)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            ast.parse(source)
        assert source.count("### BEGIN SOLUTION") == source.count("### END SOLUTION")
        assert source.count("### BEGIN HIDDEN TESTS") == source.count("### END HIDDEN TESTS")
        assert ("### BEGIN SOLUTION" in source) == how.get("solution", False)
        assert "HIDDEN" not in source or how["grade"]
        if how:
            assert how["grade_id"] == cell["id"] and how["schema_version"] == 3
            assert how["locked"] != how["solution"] and not (how["grade"] and how["solution"])
            assert how["grade"] == (how.get("points", 0) > 0)


@pytest.mark.parametrize("name", POINTS)
def test_what_is_asked_fits_one_screen_and_there_is_one_hint_section(name):
    first, *others = ("".join(c["source"]) for c in cells_of(name) if c["cell_type"] == "markdown")
    assert len(first.splitlines()) <= 36 and all(len(line) <= 110 for line in first.splitlines())
    for words in ("**Goal**", "| time | points | CPU budget |", "**You write**"):
        assert words in first
    assert f"| {POINTS[name]} |" in first
    assert sum("## Hints" in text for text in others) == 1 and "## Hints" in others[-1]


def test_the_teachers_page_agrees_with_the_notebooks():
    page = (HERE / "README.md").read_text(encoding="utf-8")
    for name, points in POINTS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| [{name}]")]
        title = "".join(cells_of(name)[0]["source"])
        minutes, _, budget = [part.strip() for part in title.split("| --- |\n|")[1].split("|")[:3]]
        assert [part.strip() for part in row.split("|")][3:6] == [minutes, str(points), budget]
    assert f"| {sum(POINTS.values())} |" in page


# ------------------------------------------------------------------------------------------------
# The one line


def said(test, **options):
    """What check() says of a test, or None if it passes."""
    try:
        check("name", test, **options)
    except Failed as failed:
        assert failed._render_traceback_() == [str(failed)]
        assert "\n" not in str(failed)
        return str(failed).removeprefix("FAILED name: ")


def test_a_right_answer_passes():
    assert said(lambda: True) is None
    assert said(lambda: torch.tensor(True)) is None
    assert said(lambda: same(torch.ones(2, 3), torch.ones(2, 3))) is None
    assert said(lambda: same([1, 2], (1, 2)) and same(3, 3)) is None


def test_a_wrong_answer_is_told_why():
    assert said(lambda: False, why="count from 0") == "count from 0"
    assert said(lambda: None) == "the answer is wrong"
    one = torch.zeros(1, 2, 3)
    assert "at [0, 1, 2] it must be 1, not 0 (look)" in said(
        lambda: same(
            one,
            one.index_put((torch.tensor(0), torch.tensor(1), torch.tensor(2)), one[0, 0, 0] + 1),
        ),
        why="look",
    )
    assert "the shape must be (1, 2, 3), not (2, 3)" in said(lambda: same(one[0], one))
    assert "float64, not torch.float32" in said(lambda: same(one, one.double()))
    assert "a tensor was expected, not list" in said(lambda: same([1], one))
    assert "a tensor was expected, not NoneType" in said(lambda: same(None, one))
    assert "entry 1 must be 5, not 6" in said(lambda: same([1, 6], [1, 5]))
    assert "2 entries, not 1" in said(lambda: same([1], [1, 5]))
    assert "a list was expected, not NoneType" in said(lambda: same(None, [1]))
    assert "it must be 3, not 4" in said(lambda: same(4, 3))
    assert "at [0] it must be 1, not nan" in said(
        lambda: same(torch.tensor([float("nan")]), torch.ones(1))
    )
    assert "ambiguous" in said(lambda: torch.ones(3))


def test_an_error_is_told_with_its_type_and_line():
    names = {}
    exec(compile("def f():\n    x = 1\n    return x / 0\n", "<cell>", "exec"), names)
    assert said(names["f"]) == (
        "your code raised ZeroDivisionError in f, line 3 of its cell: division by zero"
    )
    exec(compile("def g():\n    raise NotImplementedError()\n", "<cell>", "exec"), names)
    assert "nothing is written here yet" in said(names["g"])
    assert "NameError" in said(lambda: not_there) and "the cell above" in said(lambda: not_there)  # noqa: F821
    assert "your code raised SystemExit" in said(lambda: sys.exit("bye"))
    long = said(lambda: (_ for _ in ()).throw(ValueError("many\nlines " * 1000)))
    assert "many lines" in long and len(long) < 600


def test_a_loop_without_end_is_told_and_ended():
    def loop():
        while True:
            pass

    n_threads = threading.active_count()
    assert said(loop, seconds=0.3) == "no answer within 0.3 s; is there a loop that does not end?"
    assert threading.active_count() == n_threads


def test_what_cannot_be_ended_still_gets_its_line():
    end = threading.Event()

    def stubborn():
        while not end.is_set():
            with suppress(BaseException):
                time.sleep(0.01)

    began = time.monotonic()
    assert "no answer within 0.2 s" in said(stubborn, seconds=0.2)
    assert time.monotonic() - began < 5
    end.set()


def test_warnings_and_stderr_cost_no_points(capsys):
    def noisy():
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        print("to stderr", file=sys.stderr)
        print("to stdout")
        return True

    assert said(noisy) is None
    captured = capsys.readouterr()
    assert captured.err == "" and "to stdout" in captured.out and "ok   name" in captured.out


def test_raises_and_different():
    def wrong():
        raise Different("this and\nthat")

    assert raises(ValueError, lambda: int("x")) is True
    assert raises(ValueError, lambda: int("1")) is False
    assert "TypeError" in said(lambda: raises(ValueError, lambda: int(None)))
    assert said(wrong) == "this and that"


# ------------------------------------------------------------------------------------------------
# nbgrader itself


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course with all seven released; and three students, who have been graded.

    "untouched" hands in what was released, "solved" the solutions, "slips" the first wrong solution
    of each assignment.  In 1_delay "slips" also never ends, and prints to stderr.
    """
    folder = tmp_path_factory.mktemp("course").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOKE", "1")
        grade.copy_course(folder, list(POINTS))
        grade.nbgrader(folder, "generate_assignment", "*")
        for name in POINTS:
            _, cell, source, _ = WRONG[name][0]
            solved = grade.solutions(name)
            slips = solved | {cell: source}
            if name == "1_delay":
                slips["ladder"] = "def ladder(x, shifts, a, b):\n    while True: pass"
                slips["is_causal"] = "import sys\n" + solved["is_causal"].replace(
                    "rng =", "print('here', file=sys.stderr)\n    rng ="
                )
            grade.submit(folder, "untouched", name, {})
            grade.submit(folder, "solved", name, solved)
            grade.submit(folder, "slips", name, slips)
        grade.nbgrader(folder, "autograde", "*")
    return folder


@needs_nbgrader
def test_the_autograder_gives_zero_full_marks_and_something_between(course):
    rows = {(name, student): (points, most) for name, student, points, most in grade.scores(course)}
    assert len(rows) == 3 * len(POINTS)
    for name, most in POINTS.items():
        assert rows[name, "untouched"] == (0, most)
        assert rows[name, "solved"] == (most, most)
        assert 0 < rows[name, "slips"][0] < most


@needs_nbgrader
def test_the_autograder_says_one_line_even_for_a_loop_without_end(course):
    graded = grade.read(course / "autograded" / "slips" / "1_delay" / "1_delay.ipynb")
    lines = {}
    for cell in graded["cells"]:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr"
            if output["output_type"] == "error":
                (lines[grade.grade_id(cell)],) = output["traceback"]
    assert lines["shift_right-visible"].startswith("FAILED A2 before the start there are zeros: at")
    assert lines["ladder-visible"].startswith("FAILED B1 one layer: no answer within 10 s")
    assert "is_causal-visible" not in lines  # it prints to stderr, and has its points


@needs_nbgrader
@pytest.mark.parametrize("name", POINTS)
def test_the_student_version_holds_no_answer(name, course):
    text = (course / "release" / name / f"{name}.ipynb").read_text(encoding="utf-8")
    for marker in ("BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN", "END HIDDEN"):
        assert marker not in text
    released = {grade.grade_id(cell): "".join(cell["source"]) for cell in json.loads(text)["cells"]}
    for cell in cells_of(name):
        source = "".join(cell["source"])
        for begin, end in (("BEGIN SOLUTION", "END SOLUTION"), ("BEGIN HIDDEN", "END HIDDEN")):
            for part in source.split(f"### {begin}")[1:]:
                secret = part.split("\n", 1)[1].split(f"### {end}")[0].strip()
                assert secret and secret not in released[grade.grade_id(cell)]
        if settings(cell).get("solution"):
            assert "# YOUR CODE HERE" in released[grade.grade_id(cell)]


@needs_nbgrader
def test_the_handout_is_enough_and_has_no_answers(course, tmp_path):
    handout = tmp_path / "handout"
    grade.hand_out(course / "release", handout)
    assert sorted(path.parent.name for path in handout.glob("*/*.ipynb")) == list(POINTS)
    assert not list(handout.rglob("source")) and not list(handout.rglob("test_*"))
    environment = {k: v for k, v in os.environ.items() if k not in ("HSM_ROOT", "PYTHONPATH")}
    for name in POINTS:
        cells = grade.read(handout / name / f"{name}.ipynb")["cells"]
        setup = ["".join(c["source"]) for c in cells if c["id"] in ("setup-path", "setup")]
        script = "\n".join(
            [*setup, "import check; print(hsm.__file__ if 'hsm' in dir() else root)"]
        )
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command, cwd=handout / name, env=environment, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).is_relative_to(handout)


@needs_nbgrader
def test_the_command_line(capsys):
    assert grade.main(["selftest", "2_reach"]) == 0
    assert "2_reach    solved" in capsys.readouterr().out
    with pytest.raises(hsm.BadInput, match="unknown assignment '9_none'; choose from 1_delay"):
        grade.main(["release", "9_none"])
