"""The committed notebooks are whole, and they run.

    pytest -q notebooks/test_notebooks.py

The last test runs every cell; SMOKE=1, which it sets, shortens the training and skips nothing.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
NOTEBOOKS = sorted(HERE.glob("0*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def test_the_four_notebooks_are_here():
    names = ["01_receptive_fields", "02_mixers", "03_streaming", "04_recall"]
    assert [path.stem for path in NOTEBOOKS] == names


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
            words = [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
            assert not re.search(r"(^|[\s'\"=(])(/\w+/|~/|[A-Za-z]:\\)", "\n".join(words))


@every_notebook
def test_a_notebook_has_a_picture_a_claim_and_ends_with_something_to_try(path):
    cells = read(path).cells
    assert any("image/png" in o.get("data", {}) for c in code_cells(path) for o in c.outputs)
    assert any(re.search(r"^\s*assert ", cell.source, re.MULTILINE) for cell in code_cells(path))
    assert cells[-1].cell_type == "markdown" and cells[-1].source.startswith("## Try this")


@every_notebook
def test_a_diff_shows_changes_of_the_content_alone(path):
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(not cell.metadata for cell in notebook.cells)
    assert all(re.fullmatch(r"[a-z0-9-]+", cell.id) for cell in notebook.cells)  # names, not hashes


@every_notebook
@pytest.mark.parametrize("start", [HERE, HERE.parent], ids=["in notebooks", "at the top"])
def test_every_cell_runs_with_short_training(path, start, monkeypatch):
    monkeypatch.setenv("SMOKE", "1")
    folder = {"metadata": {"path": str(start)}}
    NotebookClient(read(path), timeout=600, kernel_name="python3", resources=folder).execute()
