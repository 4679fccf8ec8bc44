"""The whole course by command. What nbgrader can do it does; this adds the loops and a table.

    python notebooks/assignments/grade.py release            student versions, to release/ and,
                                                             with what they need, to handout/
    python notebooks/assignments/grade.py grade              autograde submitted/, print the points
    python notebooks/assignments/grade.py grade 1_delay      one assignment
    python notebooks/assignments/grade.py selftest           untouched gets 0, solved full marks

Students' work is read from submitted/STUDENT/NAME/NAME.ipynb. The selftest works in a temporary
folder and touches nothing here. It ends with status 1 if a number is not what it should be.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from hsm import BadInput  # noqa: E402 (the path comes first)
from prepare_data import parse, run  # noqa: E402

NAMES = sorted(path.parent.name for path in HERE.glob("source/*/*.ipynb"))


def nbgrader(course, *words):
    """Run an nbgrader command in the folder of a course. BadInput with its error if it fails."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"HSM_ROOT": str(ROOT), "PATH": programs}  # nbgrader calls alembic
    command = [sys.executable, "-m", "nbgrader", *words]
    done = subprocess.run(
        command,
        cwd=course,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if "No module named nbgrader" in done.stderr:
        raise BadInput('this needs nbgrader: pip install "nbgrader>=0.9.6,<0.10"')
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or [done.stderr]
        raise BadInput(f"nbgrader {' '.join(words)} failed: {lines[-1].strip()}")


def read(path):
    """A notebook as a dict."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def grade_id(cell):
    """The name that nbgrader knows a cell by, or ""."""
    return cell["metadata"].get("nbgrader", {}).get("grade_id", "")


def copy_course(course, names):
    """Put the configuration and these assignments' sources into an empty folder."""
    shutil.copy(HERE / "nbgrader_config.py", course)
    for name in names:
        shutil.copytree(HERE / "source" / name, course / "source" / name)


def hand_out(release, handout):
    """Copy student versions, and what of the project they import, into one folder to give away.

    It is a small project folder of its own, without source/: no answer is in it.
    """
    shutil.rmtree(handout, ignore_errors=True)
    for path in sorted(release.glob("*/*.ipynb")):
        (handout / path.parent.name).mkdir(parents=True)
        shutil.copy(path, handout / path.parent.name)
    for name in ("hsm.py", "train.py", "prepare_data.py", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, handout)
    (handout / "notebooks" / "assignments").mkdir(parents=True)
    shutil.copy(HERE / "check.py", handout / "notebooks" / "assignments")


def submit(course, student, name, answers):
    """Hand in the student version of an assignment, with {grade id: source} filled in."""
    notebook = read(course / "release" / name / f"{name}.ipynb")
    for cell in notebook["cells"]:
        if grade_id(cell) in answers:
            cell["source"] = answers[grade_id(cell)]
    folder = course / "submitted" / student / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")


def solutions(name):
    """{grade id: source} of an assignment's solution cells."""
    cells = read(HERE / "source" / name / f"{name}.ipynb")["cells"]
    answers = [cell for cell in cells if cell["metadata"].get("nbgrader", {}).get("solution")]
    return {grade_id(cell): "".join(cell["source"]) for cell in answers}


def scores(course):
    """[(assignment, student, points, out of)] of all that has been autograded."""
    from nbgrader.api import Gradebook  # here, so that --help works without it

    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        rows = [
            (assignment.name, submission.student.id, submission.score, assignment.max_score)
            for assignment in book.assignments
            for submission in assignment.submissions
        ]
    return sorted(rows)


def show(rows):
    for name, student, points, most in rows:
        print(f"{name:10} {student:20} {points:5g} of {most:g}")


def selftest(names):
    """Untouched student versions must have 0 points, solved ones all. Returns the exit status."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        course = Path(folder).resolve()
        copy_course(course, names)
        nbgrader(course, "generate_assignment", "*")
        for name in names:
            submit(course, "untouched", name, {})
            submit(course, "solved", name, solutions(name))
        nbgrader(course, "autograde", "*")
        rows = scores(course)
    show(rows)
    wrong = [row for row in rows if row[2] != (row[3] if row[1] == "solved" else 0)]
    if wrong or len(rows) != 2 * len(names):
        print("FAILED: an untouched notebook must have 0 points and a solved one all of them")
        return 1
    print(f"{len(names)} assignments: untouched 0, solved full marks")
    return 0


@dataclass
class GradeConfig:
    """What the command line takes."""

    command: tyro.conf.Positional[Literal["release", "grade", "selftest"]]
    names: tyro.conf.Positional[tuple[str, ...]] = ()  # assignments; none: all


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse(GradeConfig, arguments, "Release, grade and prove the seven assignments.")
    for name in config.names:
        if name not in NAMES:
            raise BadInput(f"unknown assignment {name!r}; choose from {', '.join(NAMES)}")
    if config.command == "selftest":
        return selftest(config.names or NAMES)
    if config.command == "grade" and not list(HERE.glob("submitted/*/*/*.ipynb")):
        raise BadInput(f"nothing is handed in as {HERE / 'submitted'}/STUDENT/NAME/NAME.ipynb")
    if config.command == "grade" and not (HERE / "gradebook.db").is_file():
        raise BadInput(f"there is no gradebook yet; first: python {Path(__file__).name} release")
    step = "generate_assignment" if config.command == "release" else "autograde"
    for name in config.names or ["*"]:  # nbgrader takes a pattern, and starts only once for all
        nbgrader(HERE, step, name, "--force")
    if config.command == "release":
        hand_out(HERE / "release", HERE / "handout")
        print(f"the student versions are in {HERE / 'release'}, a folder to give to students is")
        print(f"{HERE / 'handout'}")
    else:
        show(scores(HERE))
    return 0


if __name__ == "__main__":
    run(main)
