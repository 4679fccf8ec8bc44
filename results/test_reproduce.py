"""Facts about the grid: its logs, its statistics, and that a killed grid ends as if undisturbed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import reproduce  # noqa: E402

import hsm  # noqa: E402
import train  # noqa: E402
from prepare_data import prepare, write_stdlib  # noqa: E402

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
    assert reproduce.main(grid) == 0
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
        assert reproduce.read_logs(tmp_path / "results/logs") == {}
        assert f"warning: {path.name} is damaged" in capsys.readouterr().out
    reproduce.main(flags)
    assert without_times(logs_of(tmp_path)) == without_times(logs)


def test_a_log_counts_if_it_is_of_this_configuration_and_of_a_recipe_with_its_numbers(
    grid, tmp_path, capsys
):
    reproduce.main([*grid, "--only", "linrec", "--seeds", "1"])
    name, run = "text.linrec.6.s1", reproduce.make_run("text", "linrec", 1)
    whole = tmp_path / f"results/logs/cpu/{name}.jsonl"
    text = whole.read_bytes()

    def counts(change):
        whole.write_bytes(text)
        return reproduce.read_log(edit_log(tmp_path, name, change), run) is not None

    assert counts(lambda head, _: head.update(recipe=2))  # the same numbers
    assert counts(lambda head, _: head["model"].pop("rope_base"))  # before there was such a field
    capsys.readouterr()
    assert not counts(lambda head, _: head.update(recipe=1))
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


def test_again_trains_what_a_log_says_and_finds_the_last_bit(grid, tmp_path, capsys):
    reproduce.main([*grid, "--only", "linrec", "--seeds", "1"])
    flags = [*grid, "--again", str(tmp_path / "results/logs/cpu/text.linrec.6.s1.jsonl")]
    assert reproduce.main(flags) == 0 and "same to the bit" in capsys.readouterr().out

    def change(head, rows):
        rows[-1]["val_loss"] += 1e-15

    edit_log(tmp_path, "text.linrec.6.s1", change)
    assert reproduce.main(flags) == 1 and "step 6: val_loss was" in capsys.readouterr().out


def test_the_committed_tables_are_those_of_the_committed_logs(tmp_path):
    """--table-only, in a copy, changes no byte."""
    copy = tmp_path / "hsm"
    shutil.copytree(HERE, copy / "results", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*HERE.parent.glob("*.py"), HERE.parent / "README.md"):
        shutil.copy(path, copy)
    (copy / "results/table.md").write_text("old", encoding="utf-8")
    words = [sys.executable, "-B", "results/reproduce.py", "--table-only"]
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "warning" not in done.stdout, done.stdout + done.stderr
    for path in (copy / "README.md", *(p for p in (copy / "results").rglob("*.*") if p.is_file())):
        assert path.read_bytes() == (HERE.parent / path.relative_to(copy)).read_bytes(), path


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


def test_code_is_the_library_with_its_modules_shuffled_the_same_each_time(tmp_path):
    names = [tmp_path / "one", tmp_path / "two"]
    for name in names:
        write_stdlib(name, reproduce.by_hash)
    one, two = (name.read_bytes() for name in names)
    assert one == two and len(one) > 10**6
    modules = [sysconfig.get_path("stdlib") + f"/{name}.py" for name in ("abc", "zipapp")]
    assert all(Path(module).read_bytes().replace(b"\r\n", b"\n") in one for module in modules)


def test_intervals_are_students_with_a_pooled_spread_and_one_seed_has_none():
    for df, t in ((1, 12.706), (2, 4.303), (10, 2.228), (60, 2.000)):
        assert reproduce.t95(df) == pytest.approx(t, abs=1e-3)
    losses = {"a": [0.99, 1.01], "b": [1.98, 2.00, 2.02], "c": [0.5]}
    s, df = reproduce.spread(losses)
    assert df == 3 and s == pytest.approx((4 / 3) ** 0.5)  # squares: 1 + 1 and 1 + 0 + 1
    half = 3.182 * s * (1 / 2 + 1 / 3) ** 0.5
    assert reproduce.over(losses, "b", "a") == f"+100.00 ± {half:.2f} (3)"
    assert reproduce.over(losses, "c", "a") == "-50.00 (1)"
    assert reproduce.over(losses, "a", "d") == "-"
    assert reproduce.plain({"softmax-rope": [1.0], "softmax-100": [0.9], "ab-in": [0.1]}) == (
        "softmax-100"
    )
    random = {**losses, reproduce.RANDOM: [1.0, 9.0]}  # its seeds have other shifts
    assert reproduce.spread(random) == (s, df)


def test_recall_is_told_by_the_median_seed_at_the_best_rate():
    ends = {1e-3: [(300, 1.0), (900, 1.0), (2000, 0.5)], 2e-3: [(400, 1.0), (500, 1.0), (600, 1.0)]}
    rows = [
        {"model": "ab", "size": 4, "lr": lr, "seed": seed, "step": step, "accuracy": right}
        for lr, last in ends.items()
        for seed, (step, right) in enumerate(last)
    ]
    assert "| `ab` | 500 (0.002; 3) |" in reproduce.recall_table(rows)
    never = [row for row in rows if row["accuracy"] < 1]
    assert "| `ab` | never: 0.50 (1) |" in reproduce.recall_table(never)
