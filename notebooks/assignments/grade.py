"""The whole course by command. What nbgrader can do it does; this adds the loops and a table.

    python notebooks/assignments/grade.py release            student versions, to release/ and,
                                                             with what they need, to handout/
    python notebooks/assignments/grade.py grade              autograde submitted/, print the points
    python notebooks/assignments/grade.py grade 1_delay      one assignment
    python notebooks/assignments/grade.py selftest           is the grading right? A table
    python notebooks/assignments/grade.py key                what the solutions of 6 and 7 print

Students' work is read from submitted/STUDENT/NAME/NAME.ipynb. The selftest works in a temporary
folder and touches nothing here. It ends with status 1 if a number is not what it should be.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Literal

import tyro

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import check  # noqa: E402 (the path comes first)

from hsm import PAIRS, BadInput  # noqa: E402
from prepare_data import parse, run  # noqa: E402

NAMES = sorted(path.parent.name for path in HERE.glob("source/*/*.ipynb"))
NBGRADER = "nbgrader>=0.9.6,<0.10"

# ---- nbgrader ------------------------------------------------------------------------------------


def nbgrader(course, *words):
    """Run an nbgrader command in the folder of a course. BadInput with its reason if it fails."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"HSM_ROOT": str(ROOT), "PATH": programs}  # nbgrader calls alembic
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *words],
        cwd=course,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if "No module named nbgrader" in done.stderr:
        raise BadInput(f'this needs nbgrader: pip install "{NBGRADER}"')
    if done.returncode:
        # The exception that ends the first traceback says why; what follows says that it failed.
        reasons = re.findall(r"^ *[\w.]*(?:Error|Exception): .+", done.stderr, re.MULTILINE)
        lines = reasons or re.findall(r"^.*\bERROR\b.*", done.stderr, re.MULTILINE)
        raise BadInput((lines or [f"nbgrader {' '.join(words)} failed"])[0].strip())
    return done.stdout


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
    """Copy student versions, and what they need of the project, into one folder to give away.

    It is a small project folder of its own, without source/ and answers/: no solution is in it.
    """
    shutil.rmtree(handout, ignore_errors=True)
    for path in sorted(release.glob("*/*.ipynb")):
        (handout / path.parent.name).mkdir(parents=True)
        shutil.copy(path, handout / path.parent.name)
    needed = ["hsm.py", "train.py", "prepare_data.py", "LICENSE", "results/neighbours.py"]
    needed += ["notebooks/helper.py", "notebooks/assignments/check.py"]
    needed += [f"notebooks/{path.name}" for path in HERE.parent.glob("0*.ipynb")]
    for name in needed:
        (handout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, handout / name)
    shutil.copy(HERE / "students.md", handout / "README.md")
    shutil.copy(HERE / "nbgrader_config.py", handout)  # validate reads its time limit there
    packages = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    (handout / "requirements.txt").write_text(f"{packages.rstrip()}\n{NBGRADER}\n", "utf-8")


def submit(course, student, name, answers):
    """Hand in the student version of an assignment, with {grade id: source} filled in."""
    notebook = read(course / "release" / name / f"{name}.ipynb")
    for cell in notebook["cells"]:
        if grade_id(cell) in answers:
            cell["source"] = answers[grade_id(cell)]
    folder = course / "submitted" / student / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")


def fault(folder, name, wanted):
    """Why nbgrader could not grade a hand-in, or would give a reason that misleads; else ""."""
    if not (folder / f"{name}.ipynb").is_file():
        found = ", ".join(path.name for path in sorted(folder.iterdir())) or "nothing"
        return f"{name}.ipynb is not there, but {found}"
    try:
        ids = [grade_id(cell) for cell in read(folder / f"{name}.ipynb")["cells"]]
    except (ValueError, LookupError, TypeError) as error:
        return f"{name}.ipynb is no notebook: {error}"
    twice = [cell_id for cell_id in wanted if ids.count(cell_id) > 1]
    if twice:
        return f"{name}.ipynb has a cell twice: {', '.join(twice)}"
    missing = [cell_id for cell_id in wanted if cell_id not in ids]
    return f"{name}.ipynb lacks cells: {', '.join(missing)}" if missing else ""


def autograde(course, names):
    """Grade each hand-in by itself, so that none stops another.

    Returns rows (assignment, student, points or None, out of, points that a person gives), and
    the reason for each that could not be graded, {(assignment, student): reason}.
    """
    from nbgrader.api import Gradebook  # here, so that --help works without it

    paths = [(p.name, p.parent.name) for p in course.glob("submitted/[!.]*/[!.]*")]
    hand_ins = sorted((name, student) for name, student in paths if name in names)
    others = sorted(path for path in paths if path[0] not in NAMES)
    failures = dict.fromkeys(others, f"it must lie in a folder named {' or '.join(names)}")
    for name, student in hand_ins:
        folder = course / "submitted" / student / name
        source = read(course / "source" / name / f"{name}.ipynb")
        try:
            reason = fault(folder, name, [grade_id(c) for c in source["cells"] if grade_id(c)])
            if student != student.strip() or {*"*?["} & {*student}:  # nbgrader takes it for others
                reason = f"the folder {student!r} must have no blank at its ends, and none of *?["
            if not reason:
                nbgrader(course, "autograde", name, f"--student={student}", "--force")
        except Exception as error:  # a hand-in may be anything, and stops no other
            reason = f"{name}.ipynb: {error!r:.200}"
        if reason:
            failures[name, student] = reason
    rows = []
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        for name, student in hand_ins:
            most, points, by_hand = most_points(name)[0], None, None
            if (name, student) not in failures:
                submission = book.find_submission(name, student)
                points = submission.score
                grades = [g for notebook in submission.notebooks for g in notebook.grades]
                by_hand = sum(g.max_score for g in grades if g.needs_manual_grade)
            rows.append((name, student, points, most, by_hand))
    return rows, failures


def show(rows, failures):
    for name, student, points, most, by_hand in rows:
        score = "not graded" if points is None else f"{points:5g} of {most:g}"
        print(f"{name:10} {student:20} {score}" + (f"  (+ {by_hand:g} by hand)" if by_hand else ""))
    for (name, student), reason in failures.items():
        print(f"NOT GRADED  {student}, {name}: {reason}")


# ---- Is the grading right? -----------------------------------------------------------------------


def cells_of(name):
    return read(HERE / "source" / name / f"{name}.ipynb")["cells"]


def most_points(name):
    """(all points of an assignment, those of them that a person gives)."""
    cells = [cell["metadata"].get("nbgrader", {}) for cell in cells_of(name)]
    by_hand = sum(c.get("points", 0) for c in cells if c.get("solution"))
    return sum(c.get("points", 0) for c in cells), by_hand


def solutions(name):
    """{grade id: source} of an assignment's solution cells, those that a person reads left out."""
    settings = [(cell, cell["metadata"].get("nbgrader", {})) for cell in cells_of(name)]
    answers = [cell for cell, how in settings if how.get("solution") and not how["grade"]]
    return {grade_id(cell): "".join(cell["source"]) for cell in answers}


def answers_to(name):
    """[(the test that must say so, or "" for a right answer; cell, what it is, source)]."""
    text = (HERE / "answers" / f"{name}.md").read_text(encoding="utf-8")
    pattern = r"^## (?:wrong (\w+)|right): (\S+): (.+?)\n\n```python\n(.*?)```"
    return re.findall(pattern, text, re.MULTILINE | re.DOTALL)


def play(name, cell_id="", source="", test=""):
    """Run a notebook in this process, as nbgrader would: an error ends its cell only.

    source: in place of what the cell says. test: run no further than to the tests of its letter,
    and no other ones, because the rest takes long. Returns the points and all the errors.
    """
    points, errors, names = 0, [], {"__name__": "__main__"}
    cells = [cell for cell in cells_of(name) if cell["cell_type"] == "code"]
    texts = ["".join(cell["source"]) for cell in cells]
    asked = [bool(re.search(rf'"{test[:1]}\d', text)) for text in texts]
    end = max(i for i in range(len(cells)) if asked[i]) + 1 if test else len(cells)
    pairs, path, place = dict(PAIRS), list(sys.path), Path.cwd()
    os.chdir(HERE / "source" / name)
    try:
        for cell, text, wanted in zip(cells[:end], texts, asked, strict=False):
            worth = cell["metadata"].get("nbgrader", {}).get("points", 0)
            if test and ((worth and not wanted) or cell["id"] == "picture"):
                continue
            if source and grade_id(cell) == cell_id:
                text = source
            try:
                exec(compile(text, f"<{grade_id(cell)}>", "exec"), names)
                points += worth
            except Exception as error:
                errors.append(error)
    finally:
        os.chdir(place)
        sys.path[:] = path
        PAIRS.clear()
        PAIRS.update(pairs)
        check.forbid()
    return points, errors


def verdict(name, answer):
    """ "" if an answer is graded as it should be, else what went wrong."""
    test, cell, what, source = answer
    with redirect_stdout(StringIO()):
        points, errors = play(name, cell, source, test)
    said = [str(error) for error in errors if str(error).startswith("FAILED ")]
    if test and not (said and said[0].startswith(f"FAILED {test}")):
        return f"{name}, {what}: {test} should have failed, not {said[:1]}"
    if not test and (errors or points != most_points(name)[0] - most_points(name)[1]):
        return f"{name}, {what}: is right, and yet {said[:1]}"
    return ""


def selftest(names):
    """Grade the untouched, the solutions, and all answers of answers/. Returns the exit status."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        course = Path(folder).resolve()
        copy_course(course, names)
        nbgrader(course, "generate_assignment", "*")
        for name in names:
            submit(course, "untouched", name, {})
            submit(course, "solved", name, solutions(name))
        rows, failures = autograde(course, names)
    points = {row[:2]: row[2] for row in rows}
    wrong = [f"{name}, {student}: {why}" for (name, student), why in failures.items()]
    print("assignment  untouched  solved                wrong ones caught  right ones passed")
    for name in names:
        most, by_hand = most_points(name)
        said = {answer: verdict(name, answer) for answer in answers_to(name)}
        wrong += [words for words in said.values() if words]
        caught, passed = ([not said[a] for a in said if bool(a[0]) is k] for k in (True, False))
        solved = f"{points[name, 'solved']:g} of {most:g}"
        solved += f", {by_hand:g} by hand" if by_hand else ""
        print(
            f"{name:10}  {points[name, 'untouched']:9g}  {solved:20}  "
            f"{sum(caught):6} of {len(caught):<8}  {sum(passed):6} of {len(passed)}"
        )
        if points[name, "untouched"] != 0 or points[name, "solved"] != most - by_hand:
            wrong.append(f"{name}: untouched must have 0 points and solved all that nbgrader gives")
    print("\n".join(f"FAILED: {words}" for words in wrong) or "all is as it should be")
    return int(bool(wrong))


def key():
    """Print what the solutions of 6 and 7 find: their training is long unless SMOKE is set."""
    for name in ("6_hybrid", "7_recall"):
        with redirect_stdout(StringIO()) as printed:
            play(name)
        lines = [line for line in printed.getvalue().splitlines() if not line.startswith("ok ")]
        print(f"{name}\n" + "\n".join(lines))


@dataclass
class GradeConfig:
    """What the command line takes."""

    command: tyro.conf.Positional[Literal["release", "grade", "selftest", "key"]]
    names: tyro.conf.Positional[tuple[str, ...]] = ()  # assignments; none: all


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse(GradeConfig, arguments, "Release, grade and prove the seven assignments.")
    for name in config.names:
        if name not in NAMES:
            raise BadInput(f"unknown assignment {name!r}; choose from {', '.join(NAMES)}")
    names = config.names or NAMES
    if config.command == "selftest":
        return selftest(names)
    if config.command == "key":
        return key()
    if config.command == "release":
        for name in config.names or ["*"]:  # nbgrader takes a pattern, and starts once for all
            nbgrader(HERE, "generate_assignment", name, "--force")
        hand_out(HERE / "release", HERE / "handout")
        print(f"the student versions are in {HERE / 'release'}, a folder to give to students is")
        print(f"{HERE / 'handout'}")
        return 0
    if not list(HERE.glob("submitted/*/*")):
        raise BadInput(f"nothing is handed in as {HERE / 'submitted'}/STUDENT/NAME/NAME.ipynb")
    if not (HERE / "gradebook.db").is_file():
        raise BadInput(f"there is no gradebook yet; first: python {Path(__file__).name} release")
    rows, failures = autograde(HERE, names)
    show(rows, failures)
    return int(bool(failures))


if __name__ == "__main__":
    run(main)
