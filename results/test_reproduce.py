"""Tests of the grid: its logs, its tables, and that a killed grid ends like an undisturbed one."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import reproduce  # noqa: E402
import tables  # noqa: E402

from hsm import GPT, BadInput  # noqa: E402
from prepare_data import prepare  # noqa: E402

torch.set_num_threads(1)
LINE = "the quick brown fox jumps over the lazy dog, and nobody knows why it does so.\n"
TINY = {"batch_size": 2, "eval_interval": 2, "warmup": 1, "eval_tokens": 64}


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A grid of two models and one corpus that trains in a second; returns the command's flags."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    (folder / "input.txt").write_text(LINE * 40, encoding="utf-8")
    prepare("file", folder / "input.txt", "char", folder)
    base = reproduce.CPU
    shape = replace(base.model, n_layer=3, n_embd=16, block_size=16, n_head=2)
    base = replace(base, model=shape, data=str(folder), steps=6, **TINY)
    scale = reproduce.Scale({"text": base}, ("softmax-rope", "ab"), seeds=2)
    monkeypatch.setattr(reproduce, "SCALES", {"cpu": scale})
    return ["--dir", str(tmp_path / "results"), "--out", str(tmp_path / "out")]


def logs_of(tmp_path):
    """name -> bytes of each log."""
    return {path.name: path.read_bytes() for path in (tmp_path / "results/logs/cpu").iterdir()}


def without_times(text):
    """The lines of a log, without what a clock says, nor the checksum that covers it."""
    rows = [json.loads(line) for line in text.splitlines()[:-1]]
    clocks = ("elapsed_s", "tokens_per_s", "date")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


def test_a_grid_leaves_whole_logs_and_trains_nothing_twice(grid, tmp_path, monkeypatch, capsys):
    assert reproduce.main(grid) == 0
    logs = logs_of(tmp_path)
    names = [f"text.{model}.6.s{seed}.jsonl" for model in ("softmax-rope", "ab") for seed in (1, 2)]
    assert sorted(logs) == sorted(names)
    for name, text in logs.items():
        head, *rows = map(json.loads, text.splitlines()[:-1])
        assert head["run"] + ".jsonl" == name and head["torch"] == torch.__version__
        assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert logs[names[0]] != logs[names[1]]  # the seed matters
    monkeypatch.setattr(reproduce, "train", None)
    assert reproduce.main(grid) == 0 and logs_of(tmp_path) == logs
    capsys.readouterr()
    reproduce.main([*grid, "--list"])
    assert capsys.readouterr().out.count(": done\n") == 4


def test_the_gpus_grid_runs_at_a_tiny_size_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    its = reproduce.SCALES["gpu"]
    for corpus, base in its.corpora.items():
        folder = tmp_path / "data" / corpus
        folder.mkdir(parents=True)
        (folder / "input.txt").write_text(LINE * 40, encoding="utf-8")
        prepare("file", folder / "input.txt", "byte", folder)
        assert (base.device, base.dtype, base.compile) == ("cuda", "auto", None)
        small = {"n_layer": 3, "n_embd": 12, "n_head": 2, "block_size": 16}
        changes = {"data": str(folder), "steps": 2, "device": "cpu", **TINY}
        changes["model"] = replace(base.model, **small)
        monkeypatch.setitem(its.corpora, corpus, replace(base, **changes))
    flags = ["--scale", "gpu", "--seeds", "1"]
    reproduce.main([*flags, "--dir", str(tmp_path / "results"), "--out", str(tmp_path / "out")])
    n_logs = len(list((tmp_path / "results/logs/gpu").glob("*.jsonl")))
    assert n_logs == len(its.models) * len(its.corpora)
    table = (tmp_path / "results/table.md").read_text(encoding="utf-8")
    assert "## tinystories, gpu scale" in table and table.count("| softmax, rotary") == 2


def test_other_steps_have_logs_of_their_own_and_stay_out_of_the_tables(grid, tmp_path):
    reproduce.main([*grid, "--steps", "3", "--only", "ab", "--seeds", "1"])
    assert list(logs_of(tmp_path)) == ["text.ab.3.s1.jsonl"]
    assert "Not yet run" in (tmp_path / "results/table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_grid_goes_on_to_the_same_logs(grid, tmp_path, monkeypatch, stop):
    reproduce.main(grid)
    undisturbed = {name: without_times(text) for name, text in logs_of(tmp_path).items()}
    shutil.rmtree(tmp_path / "results")
    shutil.rmtree(tmp_path / "out")
    # The second run is stopped in its fourth step, and so is the one after it.
    for stopped in ("text.ab.6.s1", "text.softmax-rope.6.s2"):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            update = __import__("train").Trainer.update

            def update_or_die(trainer, update=update, stopped=stopped):
                update(trainer)
                if trainer.step == 4 and stopped in trainer.config.out:
                    os.kill(os.getpid(), stop)

            monkeypatch.setattr("train.Trainer.update", update_or_die)
            os._exit(reproduce.main(grid))
        status = os.waitpid(child, 0)[1]
        if stop == signal.SIGKILL:
            assert os.WTERMSIG(status) == stop
        else:
            assert os.waitstatus_to_exitcode(status) == 128 + stop
        assert f"{stopped}.jsonl" not in logs_of(tmp_path)
    reproduce.main(grid)
    assert {name: without_times(text) for name, text in logs_of(tmp_path).items()} == undisturbed


def test_a_checkpoint_of_another_configuration_is_not_gone_on_from(grid, tmp_path):
    its = reproduce.make_runs("cpu", ("ab",), ("text",), 1, 0, tmp_path / "out")[0]
    reproduce.train(replace(its.config, steps=2))
    assert not reproduce.can_resume(its)  # the cosine of two steps is another one
    reproduce.train(its.config)
    assert reproduce.can_resume(its)
    Path(its.config.out, "ckpt.pt").write_bytes(b"torn")
    assert not reproduce.can_resume(its)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-30],
        lambda text: text.replace(b'"val_loss": ', b'"val_loss": 1', 1),
        lambda text: b"".join(text.splitlines(keepends=True)[:2]),
        lambda text: b"",
        lambda text: b"\xff" + text,
        lambda text: b"1\n2\n",
    ],
)
def test_a_damaged_log_is_named_not_counted_and_made_again(grid, tmp_path, capsys, damage):
    flags = [*grid, "--only", "ab"]
    reproduce.main(flags)
    path = tmp_path / "results/logs/cpu/text.ab.6.s2.jsonl"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    capsys.readouterr()
    reproduce.main([*flags, "--table-only"])
    assert "warning: text.ab.6.s2.jsonl is damaged" in capsys.readouterr().out
    table = (tmp_path / "results/table.md").read_text(encoding="utf-8")
    assert "; 1 runs on" in table
    reproduce.main(flags)
    assert without_times(path.read_bytes()) == without_times(whole)
    assert "; 2 runs on" in (tmp_path / "results/table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", [{"lr": 1.0}, {"seed": 7}, {"n_layer": 2}, {"mixers": "vec"}])
def test_a_log_of_another_configuration_is_named_and_not_counted(grid, tmp_path, capsys, change):
    reproduce.main([*grid, "--only", "ab", "--seeds", "1"])
    path = tmp_path / "results/logs/cpu/text.ab.6.s1.jsonl"
    head, rows = reproduce.read_log(path)
    for part in ("train", "model"):
        head[part] |= {name: value for name, value in change.items() if name in head[part]}
    reproduce.write_log(path, head, rows)
    capsys.readouterr()
    reproduce.main([*grid, "--table-only"])
    assert "another configuration" in capsys.readouterr().out
    assert "Not yet run" in (tmp_path / "results/table.md").read_text(encoding="utf-8")


def test_what_was_made_before_the_code_changed_its_result_is_not_counted(
    grid, tmp_path, monkeypatch
):
    flags = [*grid, "--only", "ab", "--seeds", "1"]
    reproduce.main(flags)
    before = logs_of(tmp_path)
    monkeypatch.setattr(reproduce, "RECIPE", reproduce.RECIPE + 1)
    reproduce.main([*flags, "--table-only"])
    assert "Not yet run" in (tmp_path / "results/table.md").read_text(encoding="utf-8")
    trained, train = [], reproduce.train
    monkeypatch.setattr(reproduce, "train", lambda config: trained.append(config) or train(config))
    reproduce.main(flags)
    assert [config.resume for config in trained] == [False]  # not from the old checkpoint
    assert len(logs_of(tmp_path)) == len(before) == 1


def test_a_log_from_before_a_new_field_counts_if_the_field_has_its_default(grid, tmp_path):
    reproduce.main([*grid, "--only", "ab", "--seeds", "1"])
    path = tmp_path / "results/logs/cpu/text.ab.6.s1.jsonl"
    its = reproduce.make_runs("cpu", ("ab",), ("text",), 1, 0, "")[0]
    head, rows = reproduce.read_log(path)
    del head["model"]["in_proj"], head["train"]["beta2"]
    reproduce.write_log(path, head, rows)
    assert reproduce.finished(its, path.parent.parent)


def test_another_text_is_refused(grid, tmp_path):
    reproduce.main([*grid, "--only", "ab", "--seeds", "1"])
    folder = tmp_path / "data" / "text"
    (folder / "input.txt").write_text(LINE * 41, encoding="utf-8")
    prepare("file", folder / "input.txt", "char", folder)
    with pytest.raises(BadInput, match="not the text"):
        reproduce.main([*grid, "--only", "ab"])


def test_two_commands_share_the_runs(grid, tmp_path, capsys):
    its = reproduce.make_runs("cpu", ("ab",), ("text",), 1, 0, tmp_path / "out")[0]
    with reproduce.FileLock(f"{its.config.out}.lock"):
        reproduce.main([*grid, "--only", "ab"])
    assert list(logs_of(tmp_path)) == ["text.ab.6.s2.jsonl"]
    assert "another process is at it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--only", "nope"], "unknown model 'nope'; choose from softmax-learned, softmax-rope, "),
        (["--corpora", "nope"], "unknown corpus 'nope'; choose from shakespeare, stdlib"),
        (["--scale", "gpu", "--only", "mult"], "unknown model 'mult'"),
        (["--seeds", "-1"], "seeds and steps"),
        (["--scale", "tpu"], "tpu"),
    ],
)
def test_bad_flags_are_one_line(flags, words):
    with pytest.raises(BadInput) as error:
        reproduce.main(flags)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_committed_tables_and_pictures_are_those_of_the_committed_logs(tmp_path):
    """--table-only, in a copy, changes no byte."""
    copy = tmp_path / "hsm"
    left_out = shutil.ignore_patterns(".git", "data", "out", ".*", "notebooks", "__pycache__")
    shutil.copytree(HERE.parent, copy, ignore=left_out)

    def digests():
        paths = [copy / "README.md", *(copy / "results").rglob("*")]
        return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.is_file()}

    (copy / "results/table.md").write_text("old", encoding="utf-8")
    words = [sys.executable, "-B", "results/reproduce.py", "--table-only"]
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "warning" not in done.stdout, done.stdout + done.stderr
    for path, digest in digests().items():
        theirs = HERE.parent / path.relative_to(copy)
        assert digest == hashlib.sha256(theirs.read_bytes()).hexdigest(), path


def test_pictures_are_drawn_from_the_logs_and_by_the_same_matplotlib_to_the_byte(tmp_path):
    """Each committed picture, drawn again: its bytes, where the version is the one that drew it."""
    import matplotlib

    about = {name: model.about for name, model in reproduce.MODELS.items()}
    for scale in ("cpu", "gpu"):
        logs = reproduce.read_logs(scale, HERE / "logs")
        for name in ("curves", "compute") if logs else ():
            path = tmp_path / f"{name}.png"
            draw = partial(getattr(tables, f"draw_{name}"), about=about)
            tables.save_picture(draw, logs, path, (4 * len(logs) + 1, 6.5))
            old, new = (HERE / f"{name}_{scale}.png").read_bytes(), path.read_bytes()
            if f"Matplotlib version{matplotlib.__version__}".encode() in old:
                assert old == new
            digest = re.search(rb"Description\0([0-9a-f]{64})", new).group(1)
            assert digest in old


def test_every_model_of_the_grid_has_the_baselines_parameters_within_one_percent():
    for scale, its in reproduce.SCALES.items():
        for corpus, base in its.corpora.items():
            shapes = {
                name: replace(reproduce.MODELS[name].config(base.model, 1), vocab_size=65)
                for name in (*its.models, "softmax-rope")
            }
            with torch.device("meta"):
                sizes = {name: GPT(shape).num_params() for name, shape in shapes.items()}
            for name, size in sizes.items():
                away = size / sizes["softmax-rope"] - 1
                fewer = name == "ab-in-4C" and away < -0.1
                assert abs(away) < 0.01 or fewer, (scale, corpus, name)


def test_random_shifts_have_the_ladders_reach_and_differ_by_seed():
    texts = [reproduce.random_shifts(None, seed)["shifts"] for seed in range(20)]
    ladders = [list(map(int, text.split(","))) for text in texts]
    assert all(len(s) == 7 and sum(s) == 127 and min(s) >= 1 for s in ladders)
    assert len({tuple(s) for s in ladders}) == 20


def test_the_chosen_learning_rates_are_the_sweeps_lowest():
    losses = {}
    for name, models in reproduce.read_logs("sweep", HERE / "logs").items():
        corpus, rate = name.split("-lr-")
        for model, its in models.items():
            losses.setdefault((corpus, model), {})[float(rate)] = tables.mean_loss(its)
    assert any(len(its) > 1 for its in losses.values())
    for (corpus, model), its in losses.items():
        if len(its) > 1:
            rate = reproduce.SCALES["cpu"].rates.get((corpus, model), reproduce.CPU.lr)
            assert min(its, key=its.get) == rate, (corpus, model)


def test_a_model_with_a_rate_of_its_own_is_trained_with_it():
    scale = reproduce.SCALES["cpu"]
    assert scale.rates
    for run in reproduce.make_runs("cpu", scale.models, scale.corpora, 1, 0, ""):
        its = scale.rates.get((run.corpus, run.model), reproduce.CPU.lr)
        assert run.config.lr == its == run.describe()["train"]["lr"], run.name


def test_the_sweeps_table_counts_seeds_and_marks_the_lowest_mean():
    def run(loss):
        return {"train": {"steps": 10}}, [{"val_loss": loss}]

    logs = {
        "text-lr-0.1": {"ab": {1: run(1.0), 2: run(2.0)}, "vec": {1: run(3.0)}},
        "text-lr-0.02": {"ab": {1: run(1.1), 2: run(1.7)}},
    }
    table = tables.sweep_section(logs, {"ab": "AB", "vec": "VEC"})
    assert "| corpus | model | 0.02 | 0.1 |" in table
    assert "| text | AB | **1.4000** (2) | 1.5000 (2) |" in table
    assert "| text | VEC | - | 3.0000 |" in table


def test_a_run_of_the_sweep_that_the_grid_has_done_is_taken_from_there(grid, tmp_path, monkeypatch):
    reproduce.main([*grid, "--only", "ab", "--seeds", "1"])
    base = reproduce.SCALES["cpu"].corpora["text"]
    lr = base.lr
    rates = {f"text-lr-{lr}": replace(base, lr=lr) for lr in (lr, lr / 2)}
    sweep = reproduce.Scale(rates, ("ab",), seeds=1)
    monkeypatch.setattr(reproduce, "SCALES", {**reproduce.SCALES, "sweep": sweep})
    trained = []
    train = reproduce.train
    monkeypatch.setattr(reproduce, "train", lambda c: trained.append(c.lr) or train(c))
    reproduce.main([*grid, "--scale", "sweep"])
    assert trained == [lr / 2]
    table = (tmp_path / "results/table.md").read_text(encoding="utf-8")
    assert f"| corpus | model | {lr / 2} | {lr} |" in table
    assert re.search(r"\| text \| ab, [a-z0-9, ]+ \| (\*\*)?\d\.\d{4}(\*\*)? \| (\*\*)?\d", table)


def test_the_readmes_sentences_on_claims_a_and_b_say_what_the_logs_say():
    page = (HERE.parent / "README.md").read_text(encoding="utf-8")
    bullets = {text[:2]: " ".join(text.split()) for text in page.split("\n- ")}
    logs = reproduce.read_logs("cpu", HERE / "logs")
    for letter, name in (("A", "ab-in"), ("B", "hybrid-deep")):
        for corpus, models in logs.items():
            over = tables.excess(models[name], models["softmax-rope"])
            middle, half = tables.interval(over)
            assert f"{abs(middle):.1f}%" in bullets[f"{letter}:"], (letter, corpus)
            assert letter == "A" or middle + half < 0, corpus  # B: the intervals exclude 0
    for corpus, word in (("shakespeare", "better"), ("stdlib", "better"), ("tinystories", "worse")):
        middle, _ = tables.interval(
            tables.excess(logs[corpus]["ab-in"], logs[corpus]["softmax-learned"])
        )
        assert middle < 1, corpus
        assert f"{abs(middle):.1f}% {word}" in bullets["A:"], corpus
    shakespeare = logs["shakespeare"]
    over = tables.excess(shakespeare["hybrid-deep"], shakespeare["softmax-rope"])
    assert f"mean is {-tables.interval(over)[0]:.3f}%" in bullets["B:"]
    assert f"{-max(over):.1f}% and {-min(over):.1f}%" in bullets["B:"]


def test_three_intervals_after_a_models_name_in_the_readme_are_its_distances_to_rotary():
    page = (HERE.parent / "README.md").read_text(encoding="utf-8")
    text = " ".join(page.split())
    one = r"(\d\.\d ± \d\.\d)%"
    found = re.findall(rf"\(`([\w-]+)`\)[^.]*? {one}, {one} and {one}", text)
    assert len(found) >= 4
    logs = reproduce.read_logs("cpu", HERE / "logs")
    for name, *said in found:
        for corpus, interval in zip(("shakespeare", "stdlib", "tinystories"), said, strict=True):
            over = tables.excess(logs[corpus][name], logs[corpus]["softmax-rope"])
            middle, half = tables.interval(over)
            assert interval == f"{abs(middle):.1f} ± {half:.1f}", (name, corpus)


def test_three_intervals_in_a_row_on_the_pages_are_those_of_two_rows_of_the_table():
    logs = tables.together(*(reproduce.read_logs(s, HERE / "logs") for s in ("cpu", "tried")))
    pairs = [
        (name, base) for name in logs["stdlib"] for base in ("softmax-rope", "softmax-learned")
    ]
    known = set()
    for one, other in (*pairs, *tables.BESIDE):
        over = tables.distances(one, logs, other)
        if all(len(its) > 1 for its in over):
            known.add(tuple(f"{abs(m):.1f} ± {half:.1f}" for m, half in map(tables.interval, over)))
    said = []
    for page in (HERE.parent / "README.md", HERE / "README.md"):
        text = " ".join(page.read_text(encoding="utf-8").split())
        said += re.findall(r"(\d\.\d ± \d\.\d)%, (\d\.\d ± \d\.\d)% and (\d\.\d ± \d\.\d)%", text)
    assert len(said) >= 9
    assert set(said) <= known


def test_what_the_pages_say_of_the_last_steps_of_the_hours_and_of_random_shifts():
    pages = [HERE.parent / "README.md", HERE / "README.md"]
    readme, page = (" ".join(p.read_text(encoding="utf-8").split()) for p in pages)
    logs = reproduce.read_logs("cpu", HERE / "logs")
    leads = {step: [] for step in (3600, 4000)}  # hybrid-deep over rotary softmax, a mean a corpus
    for models in logs.values():
        for step, means in leads.items():
            at = {
                name: {
                    seed: (head, [row for row in rows if row["step"] == step])
                    for seed, (head, rows) in models[name].items()
                }
                for name in ("hybrid-deep", "softmax-rope")
            }
            means.append(-tables.mean(tables.excess(at["hybrid-deep"], at["softmax-rope"])))
    (shakespeare, *others), ends = leads[3600], leads[4000]
    assert f"from {shakespeare:.1f} to {ends[0]:.1f}% on Shakespeare" in readme
    for before, after in zip(others, ends[1:], strict=True):
        assert f"from {before:.1f} to {after:.1f}% on code and on stories" in readme

    times = [
        rows[-1]["elapsed_s"]
        for models in logs.values()
        for its in models.values()
        for _, rows in its.values()
    ]
    assert f"takes {min(times) / 60:.0f} to {max(times) / 60:.0f} minutes" in page
    assert f"took {sum(times) / 3600:.0f} hours of one core" in page

    for seed, unseen in ((1, {1, 2, 3, 4}), (2, {2, 3, 4, 5}), (3, {1, 3, 5, 6})):
        shifts = reproduce.random_shifts(None, seed)["shifts"].split(",")
        seen = {0}
        for shift in map(int, shifts):
            seen |= {distance + shift for distance in seen}
        assert set(range(1, max(unseen) + 1)) - seen == unseen
        assert f"drew {', '.join(shifts)}" in page


def test_the_readmes_rows_are_the_best_of_each_kind_among_those_with_the_most_seeds():
    def runs(mixers, *losses):
        head = {"model": {"mixers": mixers}}
        return {seed: (head, [{"val_loss": loss}]) for seed, loss in enumerate(losses, start=1)}

    models = {
        "softmax-rope": runs("softmax", 1.5, 1.6, 1.7),
        "lucky": runs("ab", 1.0),
        "pure": runs("ab", 1.55, 1.65, 1.8),
        "worse": runs("vec", 1.6, 1.7, 1.9),
        "mixed": runs("vec,softmax", 1.4),  # the only one of its kind
    }
    rows = tables.claims_table({"text": models}, {name: name for name in models})[2:]
    assert [row.split(" | ")[1] for row in rows] == ["softmax-rope", "pure", "mixed"]
    assert [row.split(" | ")[2] for row in rows] == ["3", "3", "1"]
    assert "| -6.67 |" in rows[2]  # 1.4 against 1.5, the same seed's, not against the mean


def test_the_readmes_rows_are_of_the_same_two_models_on_all_corpora_the_best_in_the_mean():
    def corpus(one, other):  # losses of two kinds of hybrid, of a baseline and of HSM alone
        its = {"softmax-rope": ("softmax", 1.0), "pure": ("ab", 1.1)}
        its |= {"one": ("ab,softmax", one), "other": ("softmax,vec", other)}
        return {
            name: {1: ({"model": {"mixers": mixers}}, [{"val_loss": loss}])}
            for name, (mixers, loss) in its.items()
        }

    logs = {"first": corpus(0.98, 0.99), "second": corpus(0.99, 0.95)}
    rows = tables.claims_table(logs, {name: name for name in logs["first"]})[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {name}", model] for name in logs for model in ("softmax-rope", "pure", "other")
    ]


def test_the_rows_side_by_side_are_compared_seed_by_seed_whatever_scale_they_are_of():
    def runs(*losses):
        return {seed: ({}, [{"val_loss": loss}]) for seed, loss in enumerate(losses, start=1)}

    grid = {"text": {"hybrid-deep": runs(1.0, 2.0), "ab-in": runs(1.0)}}
    tried = {"text": {"hybrid-short": runs(1.1, 2.2, 9.0)}}
    rows = tables.beside_section(tables.together(grid, tried))
    assert "| `hybrid-short` | `hybrid-deep` | +10.00 ± 0.00 (2) |" in rows
    assert "| `vec-in` | `ab-in` | - |" in rows


def test_the_summary_ranks_by_the_mean_over_corpora_and_what_lacks_one_comes_last():
    def corpus(**losses):  # model -> losses of seeds 1, 2, ..
        return {
            name.replace("_", "-"): {i + 1: ({}, [{"val_loss": x}]) for i, x in enumerate(its)}
            for name, its in losses.items()
        }

    logs = {
        "one": corpus(softmax_rope=(1.0, 2.0), a=(1.1,), b=(1.2, 2.4), c=(0.5,)),
        "two": corpus(softmax_rope=(1.0,), a=(1.3,), b=(1.0, 9.0)),  # b's seed 2 has no partner
    }
    about = {name: name for name in logs["one"]}
    lines = tables.summary_section("cpu", logs, about)
    assert [row for row in lines if row.startswith("| `")] == [
        "| `b` | b | +20.00 ± 0.00 (2) | +0.00 (1) |",
        "| `a` | a | +10.00 (1) | +30.00 (1) |",
        "| `c` | c | -50.00 (1) | - |",
    ]


def test_what_was_tried_stands_beside_the_grids_rows_of_its_seed(grid, tmp_path, monkeypatch):
    its = reproduce.SCALES["cpu"]
    both = {"cpu": its, "tried": reproduce.Scale(its.corpora, ("ab-deep",), seeds=1)}
    monkeypatch.setattr(reproduce, "SCALES", both)
    reproduce.main([*grid, "--only", "softmax-rope"])
    reproduce.main([*grid, "--scale", "tried"])
    text = (tmp_path / "results/table.md").read_text(encoding="utf-8")
    grids, tried = text.split("## Tried on text")
    rows = [row.split(" | ") for row in tried.splitlines() if row.startswith("| `")]
    assert sorted(row[0] for row in rows) == ["| `ab-deep`", "| `softmax-rope`"]
    (head,) = (row.split(" | ") for row in tried.splitlines() if row.startswith("| name"))
    assert all(row[head.index("seeds")] == "1" for row in rows)
    assert "ab-deep" not in grids and " | 2 | " in grids


@pytest.mark.parametrize("preset, name", [("deep", "hybrid-deep"), ("pure", "ab-in")])
def test_the_presets_of_the_grids_best_are_its_rows(preset, name):
    (its,) = reproduce.make_runs("cpu", (name,), ("shakespeare",), 1, 0, "out")
    same = reproduce.Run("cpu", "shakespeare", name, 1, reproduce.PRESETS[preset])
    assert same.describe() == its.describe()


def test_intervals_are_students():
    middle, half = tables.interval([1.0, 2.0, 3.0])
    assert middle == 2 and half == pytest.approx(2.4842, abs=1e-3)  # 4.303 / sqrt(3)
    logs = {seed: ({}, [{"val_loss": loss}]) for seed, loss in ((1, 1.1), (2, 1.2), (4, 9.0))}
    zero = {seed: ({}, [{"val_loss": 1.0}]) for seed in (1, 2, 3)}
    assert tables.excess(logs, zero) == pytest.approx([10, 20])
    assert tables.cell([-1.0], "+.2f") == "-1.00" and tables.cell([], ".4f") == "-"
    assert tables.cell([1.0, 2.0, 3.0], "+.2f") == "+2.00 ± 2.48"
