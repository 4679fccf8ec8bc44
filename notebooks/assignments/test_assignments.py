"""The assignments keep what they promise. Run with:  pytest -q notebooks/assignments

Each solution gets all points; each of the wrong answers in answers/, which are plausible ones, is
told by the right test what is wrong with it, and each right one passes; a student version holds no
answer. Training is short here (SMOKE=1), and no cell is skipped. What has nbgrader grade hand-ins
takes minutes more:  pytest -q -m slow notebooks/assignments
"""

import ast
import importlib.util
import json
import os
import shutil
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
from check import (  # noqa: E402
    Different,
    Failed,
    bytes_kept,
    check,
    forbid,
    raises,
    same,
    without_loop,
)

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
ANSWERS = [(name, answer) for name in POINTS for answer in grade.answers_to(name)]
needs_nbgrader = pytest.mark.skipif(
    importlib.util.find_spec("nbgrader") is None, reason="nbgrader is not installed"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short training, and pictures without a window."""
    monkeypatch.setenv("SMOKE", "1")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    torch.set_num_threads(1)
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def settings(cell):
    """What nbgrader knows of a cell."""
    return cell["metadata"].get("nbgrader", {})


# ------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("name", POINTS)
def test_the_solution_gets_all_points_and_no_error(name):
    points, errors = grade.play(name)
    most, by_hand = grade.most_points(name)
    assert not errors
    assert points == most - by_hand and most == POINTS[name]


@pytest.mark.parametrize("name, answer", ANSWERS, ids=lambda x: x if isinstance(x, str) else x[2])
def test_an_answer_is_caught_by_the_right_test_or_passes(name, answer):
    assert grade.verdict(name, answer) == ""


def test_a_verdict_tells_what_the_grading_missed():
    test, cell, what, source = grade.answers_to("2_reach")[0]
    solution = grade.solutions("2_reach")[cell]
    assert "should have failed" in grade.verdict("2_reach", (test, cell, what, solution))
    assert "is right, and yet" in grade.verdict("2_reach", ("", cell, what, source))


def test_every_assignment_has_two_wrong_answers_or_more():
    assert set(POINTS) == set(grade.NAMES)
    for name in POINTS:
        answers, cells = grade.answers_to(name), grade.solutions(name)
        text = (HERE / "answers" / f"{name}.md").read_text(encoding="utf-8")
        assert len(answers) == text.count("\n## ")  # each is read
        assert all(cell in cells for _, cell, _, _ in answers)
        assert sum(bool(test) for test, *_ in answers) >= 2


def test_a_line_about_a_wrong_answer_is_one_line():
    test, cell, _, source = grade.answers_to("1_delay")[0]
    said = [str(e) for e in grade.play("1_delay", cell, source, test)[1] if isinstance(e, Failed)]
    assert said and all("\n" not in line and len(line) < 600 for line in said)


# ------------------------------------------------------------------------------------------------
# The notebooks as files


@pytest.mark.parametrize("name", POINTS)
def test_a_source_notebook_is_well_formed(name):
    notebook, cells = grade.read(HERE / "source" / name / f"{name}.ipynb"), grade.cells_of(name)
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
        assert ("### BEGIN SOLUTION" in source) == (cell["id"] in grade.solutions(name))
        assert "HIDDEN" not in source or how["grade"]
        if how:
            assert how["grade_id"] == cell["id"] and how["schema_version"] == 3
            assert how["locked"] != how["solution"]
            assert how["grade"] == (how.get("points", 0) > 0)


@pytest.mark.parametrize("name", POINTS)
def test_what_is_asked_fits_one_screen_and_there_is_one_hint_section(name):
    first, *others = (
        "".join(c["source"]) for c in grade.cells_of(name) if c["cell_type"] == "markdown"
    )
    assert len(first.splitlines()) <= 36 and all(len(line) <= 110 for line in first.splitlines())
    for words in ("**Goal**", "| time | points | CPU budget |", "**You write**"):
        assert words in first
    assert f"| {POINTS[name]} |" in first
    assert sum("## Hints" in text for text in others) == 1 and "## Hints" in others[-1]


def test_the_teachers_page_agrees_with_the_notebooks():
    page = (HERE / "README.md").read_text(encoding="utf-8")
    for name, points in POINTS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| [{name}]")]
        title = "".join(grade.cells_of(name)[0]["source"])
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


def test_what_is_forbidden_fails_by_any_name_while_a_test_runs():
    other_name, x = hsm.delay, torch.ones(1, 3, 1)
    forbid(hsm.delay, hsm.DelayRings)
    try:
        assert "write yours" in said(lambda: other_name(x, 1) is not None)
        assert "write yours" in said(lambda: hsm.DelayRings((1,), torch.tensor(0)))
    finally:
        forbid()
    assert said(lambda: other_name(x, 1).sum() == 2) is None


def test_a_formula_is_told_from_a_loop():
    assert without_loop(lambda: 2**1000 + sum(range(10**4))) == 2**1000 + 49_995_000
    for loop in (lambda: [i for i in range(10**4)], lambda: sum(i for i in range(10**4))):
        with pytest.raises(Different, match="without a loop"):
            without_loop(loop)


@pytest.mark.parametrize("keep", ["tensor", "list", "numpy", "nothing"])
def test_all_that_is_kept_is_counted(keep):
    kept = []

    def make():
        def thing(x):
            if keep != "nothing":
                kept.append({"tensor": x, "list": x.tolist(), "numpy": x.numpy().copy()}[keep])

        return thing

    n_bytes = bytes_kept(make, (torch.randn(1000) for _ in range(100)))
    assert n_bytes < 40_000 if keep == "nothing" else n_bytes > 390_000


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
    """A course with all seven released."""
    folder = tmp_path_factory.mktemp("course").resolve()
    grade.copy_course(folder, list(POINTS))
    grade.nbgrader(folder, "generate_assignment", "*")
    return folder


def holds_no_answer(course, name):
    text = (course / "release" / name / f"{name}.ipynb").read_text(encoding="utf-8")
    for marker in ("BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN", "END HIDDEN"):
        assert marker not in text
    released = {grade.grade_id(cell): "".join(cell["source"]) for cell in json.loads(text)["cells"]}
    for cell in grade.cells_of(name):
        source = "".join(cell["source"])
        for begin, end in (("BEGIN SOLUTION", "END SOLUTION"), ("BEGIN HIDDEN", "END HIDDEN")):
            for part in source.split(f"### {begin}")[1:]:
                secret = part.split("\n", 1)[1].split(f"### {end}")[0].strip()
                assert secret and secret not in released[grade.grade_id(cell)]
        if settings(cell).get("solution") and cell["cell_type"] == "code":
            assert "# YOUR CODE HERE" in released[grade.grade_id(cell)]


@needs_nbgrader
def test_the_handout_is_enough_and_has_no_answers(course, tmp_path):
    for name in POINTS:
        holds_no_answer(course, name)
    handout = tmp_path / "handout"
    grade.hand_out(course / "release", handout)
    assert sorted(path.parent.name for path in handout.glob("*_*/*.ipynb")) == list(POINTS)
    for secret in ("source", "answers", "test_*", "grade.py"):
        assert not list(handout.rglob(secret))
    assert "nbgrader" in (handout / "requirements.txt").read_text(encoding="utf-8")
    assert "nbgrader validate" in (handout / "README.md").read_text(encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in ("HSM_ROOT", "PYTHONPATH")}
    notebooks = [handout / name / f"{name}.ipynb" for name in POINTS]
    notebooks += sorted(handout.glob("notebooks/0*.ipynb"))
    assert len(notebooks) == 7 + 6
    scripts = []
    for path in notebooks:
        cells = grade.read(path)["cells"]
        setup = [c["source"] for c in cells if c["id"] in ("setup-path", "start", "setup")]
        scripts.append(f"os.chdir({str(path.parent)!r})\n" + "\n".join(map("".join, setup)))
        scripts.append("assert TOP.resolve().samefile(handout), TOP")
    script = f"import os\nhandout = {str(handout)!r}\n" + "\n".join(scripts)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


@needs_nbgrader
@pytest.mark.slow  # a minute
def test_a_teachers_day(course, tmp_path):
    """Collect, grade, feedback, export; one hand-in is half, one renamed, one copied a cell."""
    name, solved = "1_delay", grade.solutions("1_delay")
    files = {"ada_77_1_delay": solved, "bob/1_delay": {}, "cy_9_file_/1_delay": solved}
    loop = "def ladder(x, shifts, a, b):\n    while True: pass"
    files |= {"dan/1_delay/1_delay": solved | {"ladder": loop}, "eve_1_delay-2": solved}
    archive = course / "downloaded" / name / "archive" / "all"
    for file, answers in files.items():
        grade.submit(course, "made", name, answers)
        (archive / file).parent.mkdir(parents=True, exist_ok=True)
        made = course / "submitted" / "made" / name / f"{name}.ipynb"
        shutil.move(made, archive / f"{file}.ipynb")
    shutil.rmtree(course / "submitted")
    shutil.make_archive(str(archive), "zip", archive)
    shutil.rmtree(archive)
    grade.nbgrader(course, "zip_collect", name)
    students = {path.name: path / name / f"{name}.ipynb" for path in course.glob("submitted/*")}
    assert sorted(students) == ["ada", "bob", "cy", "dan", "eve"]

    broken = grade.read(students["ada"])
    broken["cells"].append(next(c for c in broken["cells"] if grade.grade_id(c) == "ladder"))
    students["ada"].write_text(json.dumps(broken), encoding="utf-8")
    students["cy"].rename(students["cy"].with_name("mine.ipynb"))
    half = grade.read(students["eve"])
    half["cells"] = half["cells"][:9]
    students["eve"].write_text(json.dumps(half), encoding="utf-8")

    shutil.copytree(course / "submitted" / "dan", course / "submitted" / "dan ")
    (course / "submitted" / "fay" / "1_Delay").mkdir(parents=True)
    rows, failures = grade.autograde(course, [name])
    points = {student: score for _, student, score, _, _ in rows}
    assert points["bob"] == 0 and points["dan"] == 8
    assert {who for who in points if points[who] is None} == {"ada", "cy", "dan ", "eve"}
    assert "no blank" in failures[name, "dan "] and name in failures["1_Delay", "fay"]
    assert failures[name, "ada"].endswith("has a cell twice: ladder")
    assert failures[name, "cy"].endswith("is not there, but mine.ipynb")
    assert "lacks cells: ladder-visible, ladder-hidden" in failures[name, "eve"]
    graded = grade.read(course / "autograded" / "dan" / name / f"{name}.ipynb")
    outputs = {grade.grade_id(c): c["outputs"] for c in graded["cells"] if "outputs" in c}
    assert outputs["ladder-visible"][0]["traceback"][0].startswith("FAILED B1 one layer: no answer")
    grade.nbgrader(course, "generate_feedback", name)
    assert (course / "feedback" / "dan" / name / f"{name}.html").is_file()
    grade.nbgrader(course, "export")
    assert "1_delay" in (course / "grades.csv").read_text(encoding="utf-8")


@needs_nbgrader
@pytest.mark.slow  # a minute and a half
def test_the_command_line(capsys):
    assert grade.main(["selftest", "2_reach", "7_recall"]) == 0
    assert "15 of 18, 3 by hand" in capsys.readouterr().out


def test_an_unknown_assignment_is_told():
    with pytest.raises(hsm.BadInput, match="unknown assignment '9_none'; choose from 1_delay"):
        grade.main(["release", "9_none"])
