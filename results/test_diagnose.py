"""Tests of the diagnostics: the made-up tasks say what they claim, and a silent tap is silent."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import diagnose  # noqa: E402
import reproduce  # noqa: E402
import tables  # noqa: E402

from hsm import GPT, GPTConfig  # noqa: E402
from prepare_data import prepare  # noqa: E402

torch.set_num_threads(1)


def draw(name, size, n=200):
    task = diagnose.TASKS[name]
    return task.make(n, size, torch.Generator().manual_seed(1))


def test_copy_asks_for_what_stood_size_back():
    idx, known = draw("copy", 13)
    assert known.sum() == 200 * (3 * 13 - 13)
    rows, t = known.nonzero(as_tuple=True)
    assert torch.equal(idx[rows, t], idx[rows, t - 13])


def test_repeat_asks_for_what_followed_the_same_letter_and_its_periods_vary():
    idx, known = draw("repeat", 12)
    periods = set()
    for row, counts in zip(idx.tolist(), known.tolist(), strict=True):
        for t in (i for i, known_here in enumerate(counts) if known_here):
            earlier = max(i for i in range(t - 1) if row[i] == row[t - 1])
            assert row[earlier + 1] == row[t]
            periods.add(t - 1 - earlier)
    assert periods == set(range(4, 13))


def test_recall_asks_for_values_of_keys_seen_and_what_was_told_before_is_no_help():
    idx, known = draw("recall", 8)
    distances, repeats = set(), 0
    for row, counts in zip(idx.tolist(), known.tolist(), strict=True):
        pairs = dict(zip(row[:16:2], row[1:16:2], strict=True))
        asked = [t for t, known_here in enumerate(counts) if known_here]
        assert len(pairs) == 8 and asked == list(range(17, 64, 2))
        assert not set(pairs) & set(row[1:16:2])
        assert all(pairs[row[t - 1]] == row[t] for t in asked)
        distances |= {t - 1 - row.index(row[t - 1]) for t in asked}
        repeats += sum(row[t] == row[t - 2] for t in asked[1:])
    assert len(distances) > 20
    assert abs(repeats / (200 * 23) - 1 / 8) < 0.03  # each question may be of any key


@pytest.mark.parametrize("name", list(diagnose.TASKS))
def test_a_learner_is_measured_until_it_is_right_or_the_steps_are_over(name, monkeypatch):
    task = replace(diagnose.TASKS[name], steps=2)
    rows = list(diagnose.learn(task, task.sizes[0], "ab,softmax", 1))
    assert [step for step, _ in rows] == [2] and 0 <= rows[0][1] <= 1
    monkeypatch.setattr(diagnose, "accuracy", lambda *_: 1.0)
    task = replace(task, steps=1000, every=3)
    assert list(diagnose.learn(task, task.sizes[0], "ab", 1)) == [(3, 1.0)]


def test_every_learner_is_a_model_of_four_layers():
    for mixers in diagnose.LEARNERS.values():
        names = [name for name, _ in GPTConfig(n_layer=4, mixers=mixers).layers]
        assert ",".join(names).startswith(mixers)


def test_a_silent_tap_is_a_head_whose_b_is_zero():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=16, n_layer=3, n_head=2, n_embd=8)).eval()
    idx = torch.randint(11, (2, 16))
    whole = model(idx)[0]
    hooks = diagnose.without(model, [(1, 1)])
    silent = model(idx)[0]
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(idx)[0], whole) and not torch.allclose(silent, whole)
    with torch.no_grad():
        model.blocks[1].mixer.pair.b[1] = 0
    assert torch.allclose(model(idx)[0], silent)


def test_with_every_tap_silent_a_token_sees_itself_alone():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=16, n_layer=3, n_head=2, n_embd=8)).eval()
    idx = torch.randint(11, (1, 16))
    diagnose.without(model, [(layer, head) for layer in range(3) for head in range(2)])
    assert torch.allclose(model(idx)[0][:, -1], model(idx[:, -1:])[0][:, -1], atol=1e-6)


@pytest.fixture
def tiny_grid(tmp_path, monkeypatch):
    """The grid's models, tiny, on a text of a few lines."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    line = "the quick brown fox jumps over the lazy dog, and nobody knows why it does so.\n"
    (folder / "input.txt").write_text(line * 40, encoding="utf-8")
    prepare("file", folder / "input.txt", "char", folder)
    base = reproduce.CPU
    shape = replace(base.model, n_layer=3, n_embd=16, block_size=16, n_head=2)
    few = {"steps": 2, "batch_size": 2, "eval_interval": 2, "warmup": 1, "eval_tokens": 64}
    base = replace(base, model=shape, data=str(folder), **few)
    scale = reproduce.Scale({"shakespeare": base}, tuple(reproduce.MODELS))
    monkeypatch.setattr(reproduce, "SCALES", {"cpu": scale})
    return tmp_path


@pytest.mark.parametrize("part", ["positions", "taps", "weights"])
def test_a_part_trains_its_models_measures_once_and_draws_from_its_log(tiny_grid, part, capsys):
    flags = [part, "--dir", str(tiny_grid)]
    diagnose.main(flags)
    log, picture = tiny_grid / f"logs/diagnose/{part}.s1.jsonl", tiny_grid / f"{part}.png"
    before = log.read_bytes(), picture.read_bytes()
    picture.unlink()
    diagnose.main(flags)
    assert (log.read_bytes(), picture.read_bytes()) == before
    assert "damaged" not in capsys.readouterr().out
    log.write_bytes(before[0][:-40])
    diagnose.main(flags)
    assert f"{log.name} is damaged: not counted; measuring it again" in capsys.readouterr().out
    head, rows = reproduce.read_log(log)
    assert rows == [json.loads(row) for row in before[0].splitlines()[1:-1]]
    reproduce.write_log(log, head, [{**row, "model": "of old"} for row in rows])
    diagnose.main([*flags, "--table-only"])
    assert f"{log.name} is of other models: not counted\n" in capsys.readouterr().out
    assert picture.read_bytes() == before[1]  # left as it was
    diagnose.main(flags)
    assert reproduce.read_log(log)[1] == rows and picture.read_bytes() == before[1]


def test_the_committed_pictures_are_those_of_the_committed_logs(tmp_path):
    for name, (_, _, draw_it, size) in diagnose.PARTS.items():
        rows = diagnose.read_rows(name, HERE / "logs" / "diagnose")
        if rows:
            tables.save_picture(draw_it, rows, tmp_path / "new.png", size)
            new, old = (tmp_path / "new.png").read_bytes(), (HERE / f"{name}.png").read_bytes()
            assert old[: old.index(b"IDAT")].count(b"Description") == 1
            digest = new[new.index(b"Description") + 12 :][:64]
            assert digest in old, name
            (tmp_path / "new.png").unlink()


def test_the_readmes_figures_of_recall_are_the_logs():
    last = {
        (row["size"], row["model"]): row
        for row in diagnose.read_rows("recall", HERE / "logs" / "diagnose")
        if row["seed"] == 1
    }
    page = (HERE.parent / "README.md").read_text(encoding="utf-8")
    for size in diagnose.TASKS["recall"].sizes:
        cells = next(row for row in page.splitlines() if row.startswith(f"| {size} | ")).split(
            " | "
        )
        for text, model in zip(cells[1:], ("softmax-rope", "ab", "mult", "hybrid"), strict=True):
            row = last[size, model]
            assert f"{row['accuracy']:.3f}" in text, (size, model)
            if row["accuracy"] > 0.999:
                assert f"after {row['step']:,}" in text, (size, model)
            else:
                assert row["step"] == diagnose.TASKS["recall"].steps and "after" not in text


def test_the_readmes_figures_of_silent_taps_are_the_logs():
    rows = diagnose.read_rows("taps", HERE / "logs" / "diagnose")
    loss = {(r["model"], r["kind"], r["shift"]): r["loss"] for r in rows if r["kind"] != "one"}
    page = " ".join((HERE.parent / "README.md").read_text(encoding="utf-8").split())
    for model, goes, left, reach in (
        ("ab-in", "`ab-in` goes", "leaves it 28 characters back", 28),
        ("ab-in-layer", "it goes", "leaves seven", 7),
    ):
        before, after = loss[model, "none", 0], loss[model, "from", 8]
        assert f"{goes} from {before:.3f} to {after:.3f}" in page and left in page
        config = reproduce.MODELS[model].config(reproduce.CPU.model, 1)
        layers = [shifts for _, shifts in config.layers]
        assert sum(max((s for s in its if s < 8), default=0) for its in layers) == reach
