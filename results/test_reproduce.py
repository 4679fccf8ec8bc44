"""Facts about the grid: its logs, its statistics, and that a killed grid ends as if undisturbed."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import diagnose  # noqa: E402
import reproduce  # noqa: E402

import hsm  # noqa: E402
import train  # noqa: E402
from prepare_data import prepare  # noqa: E402

torch.set_num_threads(1)
LINE = "the quick brown fox jumps over the lazy dog, and nobody knows why it does so.\n"


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A grid of two rows and one text that trains in a second; returns the command's flags."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    (folder / "input.txt").write_text(LINE * 40, encoding="utf-8")
    prepare("file", folder / "input.txt", "char", folder)
    shape = replace(reproduce.CPU.model, n_layer=3, n_embd=16, block_size=16)
    tiny = {"steps": 6, "batch_size": 2, "eval_interval": 2, "warmup": 1, "eval_tokens": 64}
    base = replace(reproduce.CPU, model=shape, data=str(folder), **tiny)
    setting = reproduce.Setting(base, ("softmax-rope", "linrec"), seeds=2)
    monkeypatch.setattr(reproduce, "SETTINGS", {"text": setting})
    return ["--dir", str(tmp_path / "results"), "--out", str(tmp_path / "out")]


def logs_of(tmp_path):
    """name -> bytes of each log."""
    return {path.stem: path.read_bytes() for path in (tmp_path / "results/logs/cpu").iterdir()}


def without_times(logs):
    """The lines of the logs, without what a clock says, nor the checksum that covers it."""
    clocks = ("elapsed_s", "tokens_per_s", "date")
    return {
        name: [
            {k: v for k, v in json.loads(line).items() if k not in clocks}
            for line in text.splitlines()[:-1]
        ]
        for name, text in logs.items()
    }


def edit_log(tmp_path, name, change):
    path = tmp_path / f"results/logs/cpu/{name}.jsonl"
    head, rows = reproduce.read_log(path)
    change(head, rows)
    reproduce.write_log(path, head, rows)
    return path


def test_a_grid_leaves_whole_logs_and_trains_nothing_twice(grid, tmp_path, monkeypatch, capsys):
    beside = tmp_path / "README.md"  # of somebody's project: not the grid's to fill
    beside.write_text("<!-- found -->\nmine\n<!-- /found -->\n", encoding="utf-8")
    assert reproduce.main(grid) == 0 and "mine" in beside.read_text(encoding="utf-8")
    logs = logs_of(tmp_path)
    names = {f"text.{row}.6.s{seed}" for row in ("softmax-rope", "linrec") for seed in (1, 2)}
    assert set(logs) == names
    for name, (head, *rows) in without_times(logs).items():
        assert head["run"] == name and head["torch"] == torch.__version__ and head["threads"] == 1
        assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert logs["text.linrec.6.s1"] != logs["text.linrec.6.s2"]  # the seed matters
    monkeypatch.setattr(reproduce, "train", None)
    assert reproduce.main(grid) == 0 and logs_of(tmp_path) == logs
    capsys.readouterr()
    reproduce.main([*grid, "--list"])
    assert capsys.readouterr().out.count(": done\n") == 4
    table = (tmp_path / "results/table.md").read_text(encoding="utf-8")
    assert "## text" in table and "| `linrec` | linrec; " in table


@pytest.mark.parametrize(
    "stop", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_killed_grid_goes_on_to_the_same_logs(grid, tmp_path, monkeypatch, stop):
    reproduce.main(grid)
    undisturbed = without_times(logs_of(tmp_path))
    for folder in ("results", "out"):
        shutil.rmtree(tmp_path / folder)
    stopped = "text.linrec.6.s1"  # the second run is stopped in its fourth step
    if (child := os.fork()) == 0:
        learning_rate = train.learning_rate

        def rate_or_die(config, step):
            if step == 3 and config.out.endswith(stopped):
                os.kill(os.getpid(), stop)
            return learning_rate(config, step)

        train.learning_rate = rate_or_die
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(reproduce.main(grid))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (-stop if stop == signal.SIGKILL else 128 + stop)
    assert set(logs_of(tmp_path)) == {"text.softmax-rope.6.s1"}
    begun = reproduce.saved_step(reproduce.make_run("text", "linrec", 1, tmp_path / "out"))
    assert begun == (2 if stop == signal.SIGKILL else 4)
    reproduce.main(grid)
    assert without_times(logs_of(tmp_path)) == undisturbed


def test_a_damaged_log_is_named_not_counted_and_made_again(grid, tmp_path, capsys):
    flags = [*grid, "--only", "linrec", "--seeds", "1"]
    reproduce.main(flags)
    path, logs = tmp_path / "results/logs/cpu/text.linrec.6.s1.jsonl", logs_of(tmp_path)
    whole = path.read_bytes()
    changed = whole.replace(b'"val_loss": ', b'"val_loss": 1', 1)
    for damaged in (b"", b"1\n2\n", b"\xff" + whole, whole[:-30], changed):
        path.write_bytes(damaged)
        capsys.readouterr()
        assert reproduce.read_logs(tmp_path / "results/logs/cpu") == {}
        assert f"warning: {path.name} is damaged" in capsys.readouterr().out
    reproduce.main(flags)
    assert without_times(logs_of(tmp_path)) == without_times(logs)


def test_a_log_counts_if_it_is_of_this_configuration(grid, tmp_path, capsys):
    reproduce.main([*grid, "--only", "linrec", "--seeds", "1"])
    name, run = "text.linrec.6.s1", reproduce.make_run("text", "linrec", 1)
    whole = tmp_path / f"results/logs/cpu/{name}.jsonl"
    text = whole.read_bytes()

    def counts(change):
        whole.write_bytes(text)
        return reproduce.read_log(edit_log(tmp_path, name, change), run) is not None

    assert counts(lambda head, _: head.update(date="2026-01-01"))
    assert counts(lambda head, _: head["model"].pop("rope_base"))  # before there was such a field
    capsys.readouterr()
    assert not counts(lambda head, _: head["model"].update(no_such_field=1))
    assert not counts(lambda head, _: head["train"].update(lr=1.0))
    assert not counts(lambda head, _: head["model"].update(mixers="vec"))
    assert capsys.readouterr().out.count("another configuration") == 3


def test_another_text_is_refused_and_two_commands_share_the_runs(grid, tmp_path, capsys):
    with reproduce.claim(tmp_path / "out" / "text.linrec.6.s1"):
        reproduce.main([*grid, "--only", "linrec"])
    assert list(logs_of(tmp_path)) == ["text.linrec.6.s2"]
    assert "another process is at it" in capsys.readouterr().out
    folder = tmp_path / "data" / "text"
    (folder / "input.txt").write_text(LINE * 41, encoding="utf-8")
    prepare("file", folder / "input.txt", "char", folder)
    with pytest.raises(hsm.BadInput, match="not the text"):
        reproduce.main([*grid, "--only", "linrec"])


def test_the_committed_tables_are_those_of_the_committed_logs(tmp_path, capsys):
    """--table-only, in a copy, changes no byte."""
    copy = tmp_path / "hsm" / "results"
    shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copy(HERE.parent / "README.md", copy.parent)
    (copy / "table.md").write_text("old", encoding="utf-8")
    reproduce.main(["--table-only", "--dir", str(copy)])
    diagnose.main(["--table-only", "--dir", str(copy)])
    assert "warning" not in capsys.readouterr().out
    for path in (copy.parent / "README.md", *filter(Path.is_file, copy.rglob("*"))):
        assert path.read_bytes() == (HERE.parent / path.relative_to(copy.parent)).read_bytes(), path


@pytest.mark.parametrize("setting", reproduce.SETTINGS)
def test_every_row_has_the_parameters_of_softmax_within_one_percent(setting):
    shapes = {
        row: replace(reproduce.make_run(setting, row, 1).model, vocab_size=65)
        for row in (*reproduce.SETTINGS[setting].rows, "softmax-rope")
    }
    with torch.device("meta"):
        sizes = {row: hsm.GPT(shape).num_params() for row, shape in shapes.items()}
    for row, size in sizes.items():
        assert abs(size / sizes["softmax-rope"] - 1) < 0.01, row
    if "hybrid-b0" in sizes:  # its vec layers mix nothing
        mixer, x = hsm.GPT(shapes["hybrid-b0"]).blocks[0].mixer, torch.randn(1, 128, 64)
        assert torch.allclose(mixer(x), mixer.pair.a * x)


def test_intervals_are_students_with_a_pooled_spread_and_one_seed_has_none():
    for df, t in ((1, 12.706), (2, 4.303), (10, 2.228), (60, 2.000)):
        assert reproduce.t95(df) == pytest.approx(t, abs=1e-3)
    losses = {"a": [0.99, 1.01], "b": [1.98, 2.00, 2.02], "c": [0.5], "softmax": [1.96, 2, 2.04]}
    s, df = reproduce.spread(losses, "b")
    assert df == 3 and s == pytest.approx((4 / 3) ** 0.5)  # squares: 1 + 1 and 1 + 0 + 1
    assert reproduce.spread(losses, "softmax") == (pytest.approx(2), 2)  # its kind by itself
    half = 4.303 * (4 / 3 / 3 + 4 / 3) ** 0.5
    assert reproduce.over(losses, "b", ["softmax"]) == f"+0.00 ± {half:.2f} (3)"
    half = 3.182 * s * (1 / 2 + 1 / 3) ** 0.5
    assert reproduce.over(losses, "b", ["a"]) == f"+100.00 ± {half:.2f} (3)"
    assert reproduce.over(losses, "c", ["a"]) == "-50.00 (1)"
    assert reproduce.over(losses, "a", ["d"]) == "-"
    seeds = {"softmax-rope": [1.0, 1.0], "softmax-100": [0.9, 0.9], "softmax-deep": [0.8]}
    assert reproduce.best({**seeds, "ab-in": [0.1]}) == "softmax-100"
    assert reproduce.best({"softmax-deep": [0.8]}) == "softmax-deep"
