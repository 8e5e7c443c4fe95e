"""Does a generated program pass a problem's tests? Run on this machine, with limits, and without believing the program.

Two processes run for each program. The *tester* runs the tests. What they call is a stand-in, which sends its
arguments to the *answerer*; that one has run the program and calls the function in it. Only plain values travel, as
Python literals. So a program cannot pass by an object that equals everything, by changing what the tests use, or by
leaving early: its own process ends, the tests do not. What tells that they were passed is a random word that the
answerer never sees.

This guards against accidents and cheap tricks. It is NOT a sandbox: the program can read what you can read, write where
you can write, and reach the network. Run it in a container without network, as a user who owns nothing.

The file imports nothing but Python's own library: it is also the script that both processes run.
"""

import ast
import builtins
import contextlib
import ctypes
import json
import math
import operator
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time


LIMITS = dict(CPU=10, AS=4 << 30, FSIZE=1 << 20, NPROC=0, CORE=0)       # s, bytes, bytes, processes, bytes
LONGEST = 1 << 24                                                       # characters of one answer that are read


def passes(source, problem, seconds=10.0):
    """Does the function that the program `source` defines pass the tests of a problem {prompt, test, entry_point}
    within `seconds` of wall-clock time? The tests may use what the prompt defines.

    Both interpreters are isolated (-I), in a fresh directory, without input, output or environment. The answerer has at
    most 10 s of CPU, 4 GiB of memory, files of 1 MiB and, but for root, no child processes, where the system has such
    limits. Whatever it started is ended with it.
    """
    word = secrets.token_hex(16)
    task = {"source": source, "word": word, "seconds": seconds,
            **{name: problem[name] for name in ("prompt", "test", "entry_point")}}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        process = subprocess.Popen([sys.executable, "-I", os.path.abspath(__file__), "tester"], cwd=directory,
                                   env={"HOME": directory, "OMP_NUM_THREADS": "1"}, start_new_session=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            said, _ = process.communicate(json.dumps(task).encode(), seconds + 5)
            return said.decode("utf-8", "replace").strip() == word
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):      # nobody is left (macOS says the latter)
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@contextlib.contextmanager
def guarded():
    """While programs run: no process of theirs can read this one's environment (an API key) or memory, and those that
    slipped away from their tester are ended. Linux only."""
    _prctl(DUMPABLE, 0)
    _prctl(CHILD_SUBREAPER, 1)
    others = _children()
    try:
        yield
    finally:
        _end_children(others)
        _prctl(CHILD_SUBREAPER, 0)
        _prctl(DUMPABLE, 1)


# ---------------------------------------------------------------------------------------------------------------------
# processes

PARENT_DEATH, DUMPABLE, CHILD_SUBREAPER = 1, 4, 36      # numbers of Linux's prctl


def _prctl(what, value):
    """DUMPABLE 0: only root reads our /proc files. CHILD_SUBREAPER 1: a descendant that loses its parent becomes our
    child. PARENT_DEATH: the signal that we get when our parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(what, value, 0, 0, 0)


def _children():
    """The processes whose parent this one is; none where there is no /proc."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError):              # it has ended meanwhile
            with open(f"/proc/{name}/stat") as file:
                parent = file.read().rpartition(")")[2].split()[1]      # behind the name, which may hold anything
            if int(parent) == os.getpid():
                found.append(int(name))
    return found


def _end_children(but=(), seconds=5.0):
    """Kill the children, `but` for these, and, as they become children in their turn, those of theirs that are left."""
    end = time.monotonic() + seconds
    while (left := set(_children()) - set(but)) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def tester():
    """The first process: reads its task from stdin, and prints the task's word if the tests pass."""
    _prctl(DUMPABLE, 0)
    _prctl(CHILD_SUBREAPER, 1)
    task = json.load(sys.stdin)
    answers = subprocess.Popen([sys.executable, "-I", os.path.abspath(__file__), "answerer"], encoding="utf-8",
                               errors="replace", stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def too_late(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, task["seconds"])
    try:
        _send(answers, json.dumps([task["source"], task["entry_point"]]))
        names = {"__name__": "tests"}
        with contextlib.suppress(Exception):            # its helpers; the function itself is given a body
            exec(task["prompt"].rstrip() + "\n    pass\n", names)
        names[task["entry_point"]] = stand_in = _stand_in(answers)
        exec(task["test"], names)
        names["check"](stand_in)
        print(task["word"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(answers.pid, signal.SIGKILL)
        _end_children()


def _send(process, line):
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _stand_in(answers):
    """The function that the tests call: the answerer's, by plain values alone."""
    def call(*args, **named):
        _send(answers, literal([args, named]))
        line = answers.stdout.readline(LONGEST)
        kind, _, text = line.rstrip("\n").partition(" ")
        if kind != "returned" or not line.endswith("\n"):
            raised = getattr(builtins, text, None)
            raise raised if isinstance(raised, type) and issubclass(raised, Exception) else RuntimeError("no answer")
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return object()                             # which equals nothing
    return call


def answerer():
    """The second process: runs the program, then answers one line with another."""
    _prctl(PARENT_DEATH, signal.SIGKILL)
    _set_limits()
    sys.set_int_max_str_digits(0)
    asked, told = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY)):           # the program has no input, and no reader
        os.dup2(os.open(os.devnull, mode), number)
    source, entry_point = json.loads(asked.readline())
    names = {"__name__": "program"}
    exec(compile(source, "program.py", "exec"), names)
    for line in asked:
        args, named = ast.literal_eval(line)
        try:
            line = "returned " + literal(names[entry_point](*args, **named))
        except BaseException as error:      # sys.exit too: it ends the call, not the tests
            line = "raised " + type(error).__name__
        told.write(line + "\n")
        told.flush()


def _set_limits():
    try:
        import resource
    except ImportError:
        return
    for name, most in LIMITS.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):          # not on this system
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))


def literal(x):
    """A value as the text of a Python literal, a subclass as what it is derived from; other numbers as int or float.
    Raises TypeError for what is no plain value. Not a number (NaN) comes out as a name that is no literal.

    >>> literal([1, -2.5, "a'b", None, (True,), {2: {3}}, set(), float("inf")])
    '[1,-2.5,"a\\'b",None,(True,),{2:{3,},},set(),1e999,]'
    """
    for kind in (bool, int, str, bytes):
        if isinstance(x, kind):
            return kind.__repr__(x)
    if x is None:
        return "None"
    if isinstance(x, float):
        return float.__repr__(x).replace("inf", "1e999")
    if isinstance(x, (list, tuple, set, frozenset)):
        inside = "".join(literal(item) + "," for item in x)
        if isinstance(x, list):
            return f"[{inside}]"
        if isinstance(x, tuple):
            return f"({inside})"
        return "{" + inside + "}" if inside else "set()"
    if isinstance(x, dict):
        return "{" + "".join(f"{literal(key)}:{literal(value)}," for key, value in x.items()) + "}"
    if isinstance(x, complex):
        return complex.__repr__(x)
    try:
        return int.__repr__(operator.index(x))          # numpy's whole numbers
    except TypeError:
        value = float(x)                                # numpy's others, fractions
        return "nan" if math.isnan(value) else literal(value)


if __name__ == "__main__":
    {"tester": tester, "answerer": answerer}[sys.argv[1]]()
