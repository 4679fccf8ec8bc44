"""The committed notebooks are whole, and they run.

    pytest -q notebooks/test_notebooks.py

The last test runs every cell; SMOKE=1, which it sets, shortens the training and skips nothing.
"""

import io
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import helper  # noqa: E402 (the path comes first)

NOTEBOOKS = sorted(HERE.glob("0*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def words(path):
    return [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]


def test_the_six_notebooks_are_here():
    names = "00_build_it 01_receptive_fields 02_mixers 03_streaming 04_recall 05_neighbours"
    assert [path.stem for path in NOTEBOOKS] == names.split()


@every_notebook
def test_cells_were_executed_once_each_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_no_output_is_an_error_or_a_warning(path):
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert outputs
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"


@every_notebook
def test_a_notebook_takes_less_than_300_kB(path):
    assert path.stat().st_size < 300_000


@every_notebook
def test_no_output_names_a_folder_of_some_machine(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            data = output.get("data", {})
            texts = [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
            assert not re.search(r"(^|[\s'\"=(])(/\w+/|~/|[A-Za-z]:\\)", "\n".join(texts))


@every_notebook
def test_each_picture_says_in_words_what_it_shows(path):
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert pictures
    assert all(len(o.metadata["image/png"]["alt"]) > 40 for o in pictures)


@every_notebook
def test_a_claim_is_computed_a_result_predicted_and_each_try_answered(path):
    assert any(re.search(r"^\s*assert ", cell.source, re.MULTILINE) for cell in code_cells(path))
    assert any("**Predict:**" in text for text in words(path))
    last = read(path).cells[-1]
    assert last.cell_type == "markdown" and last.source.startswith("## Try this")
    tries = len(re.findall(r"^\d\. ", last.source, re.MULTILINE))
    assert (
        tries == last.source.count("<summary>Answer</summary>") == last.source.count("</details>")
    )
    assert tries >= 4


@every_notebook
def test_a_diff_shows_changes_of_the_content_alone(path):
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(not cell.metadata for cell in notebook.cells)
    assert all(re.fullmatch(r"[a-z0-9-]+", cell.id) for cell in notebook.cells)  # names, not hashes


def test_a_notebook_without_its_project_says_what_to_do(tmp_path):
    sources = HERE.glob("assignments/source/*/*.ipynb")
    starts = [code_cells(path)[0].source.rsplit("\n", 1)[0] for path in [*NOTEBOOKS, *sources]]
    assert len(starts) == 13 and len(set(starts)) == 1  # all but the folders to import from
    script = starts[0] + "\nprint(TOP.name)"
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode and "NoProject" in done.stderr
    line = re.search(r'return \["(.*)"\]', starts[0]).group(1)
    assert "hsm.py" in line and "clone" in line
    for folder in ("clone", "input/dataset"):  # below, as after a clone; beside, as in Kaggle
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "hsm.py").touch()
        start = tmp_path if folder == "clone" else tmp_path / "working"
        start.mkdir(exist_ok=True)
        done = subprocess.run(run, cwd=start, capture_output=True, encoding="utf-8")
        assert done.stdout.strip() == Path(folder).name
        (tmp_path / folder / "hsm.py").unlink()


@pytest.mark.parametrize(
    "shifts, distance, title",
    [
        ("1, 2, 4, 8", 13, "The only path from 13 back: 13 = 1101 in binary"),
        ("1, 2, 8", 4, "No path from 4 back (4 holes)"),
        ("1, 1, 2", 2, "2 paths from 2 back"),
        ("1, 2, 8", 9, "The only path from 9 back (4 holes)"),
    ],
)
def test_a_ladder_draws_the_paths_that_exist(shifts, distance, title):
    figure = Figure()
    helper.draw_ladder(figure, distance, shifts)
    (axes,) = figure.axes
    assert axes.get_title() == title
    numbers = [int(word) for word in shifts.split(",")]
    for line in axes.lines:
        if line.get_linewidth() == 3:  # a path: from the input, by its layers' shifts or none, up
            steps = [b - a for a, b in zip(line.get_xdata(), line.get_xdata()[1:], strict=False)]
            assert line.get_xdata()[0] == -distance and sum(steps) == distance
            assert all(step in (0, s) for step, s in zip(steps, numbers, strict=True))


@pytest.mark.parametrize("shifts", ["", "1, x", "0, 1", "1, " * 9 + "1"])
def test_a_ladder_says_what_it_takes(shifts):
    figure = Figure()
    helper.draw_ladder(figure, 3, shifts)
    assert "1 to 7 shifts" in figure.axes[0].texts[0].get_text()


def test_what_moves_is_a_widget_on_a_page_and_a_picture_elsewhere(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert helper.move(helper.draw_ladder, "still", distance=range(4), shifts="1, 2") == "still"
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook")
    box = helper.move(helper.draw_ladder, "still", distance=range(4), shifts="1, 2")
    (play, slider), text, image = box.children[0].children, *box.children[1:]
    before = image.value
    slider.value = 1
    after = image.value
    text.value = "1, 1"
    assert len({before, after, image.value}) == 3
    assert Image.open(io.BytesIO(after)).format == "PNG" and play.max == 3


@every_notebook
def test_every_cell_runs_with_short_training(path, monkeypatch):
    monkeypatch.setenv("SMOKE", "1")
    start = HERE.parent if path.stem.startswith("01") else HERE  # at the top it runs, too
    folder = {"metadata": {"path": str(start)}}
    NotebookClient(read(path), timeout=600, kernel_name="python3", resources=folder).execute()
