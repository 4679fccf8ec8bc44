"""Facts about the diagnostics: the task asks what it says, and a silent tap is silent."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import diagnose  # noqa: E402
import reproduce  # noqa: E402
from test_reproduce import grid  # noqa: E402, F401

from hsm import GPT, GPTConfig  # noqa: E402

torch.set_num_threads(1)


@pytest.mark.parametrize("size", [4, 32])
def test_recall_asks_for_values_of_keys_seen_and_what_was_told_before_is_no_help(size):
    idx, known = diagnose.recall_task(200, size, torch.Generator().manual_seed(1))
    distances, repeats, n_asked = set(), 0, 0
    for row, counts in zip(idx.tolist(), known.tolist(), strict=True):
        told = row[: 2 * size]
        pairs = dict(zip(told[::2], told[1::2], strict=True))
        asked = [t for t, known_here in enumerate(counts) if known_here]
        assert len(pairs) == size and asked == list(range(2 * size + 1, len(row), 2))
        assert not set(pairs) & set(pairs.values())
        assert all(pairs[row[t - 1]] == row[t] for t in asked)
        distances |= {t - 1 - row.index(row[t - 1]) for t in asked}
        repeats += sum(row[t - 1] == row[t - 3] for t in asked[1:])
        n_asked += len(asked) - 1
    assert len(distances) > 20
    assert abs(repeats / n_asked - 1 / size) < 0.03  # each question may be of any key


def test_a_learner_is_measured_until_it_is_right_or_the_steps_are_over(monkeypatch):
    rows = list(diagnose.learn(4, "ab,shift-softmax", 1e-3, seed=1, steps=2))
    assert [step for step, _ in rows] == [2] and 0 <= rows[0][1] <= 1
    monkeypatch.setattr(diagnose, "accuracy", lambda *_: 0.995)
    monkeypatch.setattr(diagnose, "EVERY", 3)
    assert list(diagnose.learn(4, "ab", 1e-3, seed=1)) == [(3, 0.995)]


def test_a_silent_tap_adds_nothing_and_without_all_of_them_a_token_sees_itself_alone():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=16, n_layer=3, n_head=2, n_embd=8)).eval()
    idx = torch.randint(11, (2, 16))
    whole, silent = model(idx)[0], diagnose.without(model, [(1, 1)])(idx)[0]
    x, z = torch.randn(2, 1, 1, 8)
    pair = diagnose.without(model, [(1, 1)]).blocks[1].mixer.pair
    assert torch.equal(pair(x, z)[..., 4:], pair(x, 0 * z)[..., 4:])
    assert torch.equal(model(idx)[0], whole) and not torch.allclose(silent, whole)
    deaf = diagnose.without(model, [(layer, head) for layer in range(3) for head in range(2)])
    assert torch.allclose(deaf(idx)[0][:, -1], deaf(idx[:, -1:])[0][:, -1], atol=1e-6)


def test_recall_is_told_by_the_median_seed_at_the_best_rate():
    ends = {1e-3: [(300, 1.0), (900, 1.0), (2000, 0.5)], 2e-3: [(400, 1.0), (500, 1.0), (600, 1.0)]}
    rows = [
        {"model": "ab", "size": 4, "lr": lr, "seed": seed, "step": step, "accuracy": right}
        for lr, last in ends.items()
        for seed, end in enumerate(last)
        for step, right in ((50, 0.1), end)
    ]
    assert "| `ab` | 500 (0.002; 3) | - | - | - |" in diagnose.recall_table(rows)
    never = [row for row in rows if row["accuracy"] < 1]
    assert "| `ab` | never: 0.50 (0.001; 3) | - | - | - |" in diagnose.recall_table(never)


@pytest.mark.parametrize("part", ["positions", "taps"])
def test_a_part_measures_once_and_draws_from_its_log(grid, part, tmp_path, monkeypatch, capsys):  # noqa: F811
    text = reproduce.SETTINGS["text"]
    small = replace(text.config, model=replace(text.config.model, n_head=8), steps=2)
    monkeypatch.setattr(reproduce, "SETTINGS", {"shakespeare": replace(text, config=small)})
    flags = [part, "--dir", str(tmp_path), "--out", str(tmp_path / "out")]
    diagnose.main(flags)
    log, picture = tmp_path / f"logs/diagnose/{part}.s1.jsonl", tmp_path / f"{part}.png"
    before = log.read_bytes(), picture.read_bytes()
    picture.unlink()
    diagnose.main(flags)
    assert (log.read_bytes(), picture.read_bytes()) == before
    log.write_bytes(before[0][:-40])
    diagnose.main(flags)
    assert f"{log.name} is damaged: not counted" in capsys.readouterr().out
    assert reproduce.read_log(log)
