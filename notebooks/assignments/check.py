"""check(): one test of an assignment, answered in one line.

    check("delay by one", lambda: same(shift_right(x, 1), wanted), "y[:, t] is x[:, t - 1]")

A test that passes prints `ok   delay by one`, and the cell goes on. Otherwise the cell ends there,
with one line in place of a traceback: which test, and why. That may be a wrong value or shape, an
error in the student's code with its line, or no answer in time.

Why the time limit is a thread: an alarm signal is unknown to Windows, and a subprocess would have
to pickle what a notebook defines, which fails on Windows and macOS. A thread needs neither. It
can't be killed, so we ask it to end (an exception is raised inside it) and go on in any case: what
sits in one long call into C, or catches everything, runs on in the background until the kernel
ends.

nbgrader gives 0 points to a test cell that writes to stderr. So warnings, and whatever else the
student's code writes there, are dropped while a test runs. What it prints to stdout is shown.

forbid() takes parts of hsm.py away while tests run; without_loop() and bytes_kept() tell a formula
from a loop, and a ring from the whole history, wherever a student's code may keep it.

This is help for honest students, and no guard against dishonest ones: their code runs in the same
process as the tests.
"""

import ctypes
import gc
import io
import sys
import threading
import traceback
import tracemalloc
import warnings
from contextlib import contextmanager, redirect_stderr, suppress

import torch


class Failed(AssertionError):
    """A test has failed. Notebooks show its one line and no traceback."""

    def _render_traceback_(self):  # asked for by IPython
        return [str(self)]


class Different(Exception):
    """What same() found."""


class TimeIsUp(BaseException):
    """Raised in the thread of a test; no Exception, so that `except Exception` lets it pass."""


def one_line(text, limit=300):
    """The words of text in one line of at most `limit` characters."""
    words = " ".join(str(text).split())
    return words if len(words) <= limit else words[: limit - 3] + "..."


def same(got, want, tolerance=1e-6):
    """True if `got` is `want`, to within a tolerance for tensors; else raises Different.

    Tensors must agree in shape and type. Lists, tuples and arrays compare element by element.
    """
    if isinstance(want, torch.Tensor):
        if not isinstance(got, torch.Tensor):
            raise Different(f"a tensor was expected, not {type(got).__name__}")
        if got.shape != want.shape:
            raise Different(f"the shape must be {tuple(want.shape)}, not {tuple(got.shape)}")
        if got.dtype != want.dtype:
            raise Different(f"the type must be {want.dtype}, not {got.dtype}")
        wrong = ~torch.isclose(got, want, atol=tolerance, rtol=tolerance)
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            w, g = (float(t[tuple(place)]) + 0.0 for t in (want, got))  # + 0.0: no -0
            raise Different(f"at {place} it must be {w:.6g}, not {g:.6g}")
        return True
    if isinstance(want, (list, tuple)):
        try:
            got = list(got.tolist() if hasattr(got, "tolist") else got)
        except TypeError as error:
            raise Different(f"a list was expected, not {type(got).__name__}") from error
        if len(got) != len(want):
            raise Different(f"there must be {len(want)} entries, not {len(got)}")
        for place, (g, w) in enumerate(zip(got, want, strict=True)):
            if g != w:
                raise Different(f"entry {place} must be {w!r}, not {g!r}")
        return True
    if got != want:
        raise Different(f"it must be {want!r}, not {got!r}")
    return True


def raises(error, call):
    """True if call() raises this type of error, False if it returns."""
    try:
        call()
    except error:
        return True
    return False


FORBIDDEN = []  # functions and classes


def forbid(*things):
    """From now on these functions and classes of hsm.py fail while a test runs. None: all are back.

    By whatever name a student's code knows them: it is the code itself that goes.
    """
    FORBIDDEN[:] = things


def away(*_, **__):
    raise RuntimeError("hsm.py's own answer is away while the tests run: write yours")


@contextmanager
def taken_away():
    kept = []
    for thing in FORBIDDEN:
        name = "__init__" if isinstance(thing, type) else "__code__"
        kept.append((thing, name, getattr(thing, name)))
        setattr(thing, name, away if isinstance(thing, type) else away.__code__)
    try:
        yield
    finally:
        for thing, name, value in kept:
            setattr(thing, name, value)


def without_loop(call, limit=2000):
    """call(), which may take no more than `limit` of Python's smallest steps: Different if more."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        frame.f_trace_opcodes = True
        count += 1
        if count > limit:
            raise Different("the answer must be a formula, without a loop")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(before)


def tensor_bytes():
    """Memory of all tensors that are alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            with suppress(Exception):  # some have no storage
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def bytes_kept(make, inputs):
    """By how many bytes memory has grown after thing = make(), then thing(i) for each of inputs.

    Whatever they lie in: tensors, arrays or lists, in the thing itself, its class or a global name.
    """
    tensors = tensor_bytes()
    tracemalloc.start()  # Python's own objects, and NumPy's arrays
    try:
        thing, one = make(), None
        for one in inputs:
            thing(one)
        del one
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    return grown + tensor_bytes() - tensors


def describe(error):
    """An exception of the student's code in one line, with the line of the notebook's cell."""
    if isinstance(error, NotImplementedError):
        return "nothing is written here yet (NotImplementedError)"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "ipykernel" in f.filename or f.filename.startswith("<")]
    place = ""
    if own and own[-1].name not in ("<lambda>", "<module>"):
        place = f" in {own[-1].name}, line {own[-1].lineno} of its cell"
    reason = one_line(str(error) or "no message")
    if isinstance(error, NameError) and not place:
        reason += "; did the cell above end without an error?"
    return f"your code raised {type(error).__name__}{place}: {reason}"


def run_limited(test, seconds):
    """test() in a thread. Returns (outcome, error); error is TimeIsUp if it does not end."""
    box = {}

    def work():
        try:
            box["outcome"] = test()
        except BaseException as error:  # sys.exit() in student code ends the test, not the kernel
            box["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        thread.start()
        thread.join(seconds)
        if not thread.is_alive():
            return box.get("outcome"), box.get("error")
        for _ in range(10):  # it may catch the first one
            ident = ctypes.c_ulong(thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(TimeIsUp))
            thread.join(0.1)
            if not thread.is_alive():
                break
    return None, TimeIsUp()


def check(name, test, why="", seconds=10):
    """Run one test, a callable without arguments; it passes if it returns something true in time.

    why: what to tell a student whose answer is wrong.  Raises Failed with one line otherwise.
    """
    with taken_away():
        outcome, error = run_limited(test, seconds)
    if error is None:
        try:
            if outcome is not None and bool(outcome):
                print(f"ok   {name}")
                return
            reason = why or "the answer is wrong"
        except Exception as confused:  # say, an array of several values where one was asked for
            reason = f"{one_line(confused)}; {why}" if why else one_line(confused)
    elif isinstance(error, TimeIsUp):
        reason = f"no answer within {seconds:g} s; is there a loop that does not end?"
    elif isinstance(error, Different):
        reason = f"{one_line(error)} ({why})" if why else one_line(error)
    else:
        reason = describe(error)
    raise Failed(f"FAILED {name}: {one_line(reason, 500)}")
