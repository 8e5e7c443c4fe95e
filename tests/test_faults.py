"""A crash at every file operation of a short run: whatever was being written, --resume ends where an uninterrupted run
does, to the bit. And several processes of which one fails, hangs or dies.

The runs are children of this process, forked, so that a crash costs no import: `pytest --slow -k faults -s` prints how
many there were.
"""

import builtins
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback

import pytest
import torch

import lsp
import sppo
from conftest import ROOT, leave_png

pytestmark = [pytest.mark.usefixtures("elsewhere"), pytest.mark.slow]

# Half a second each: two iterations, an epoch that is saved in the middle, evaluations, every kind of file.
SPPO = dict(iterations=2, prompts_per_iteration=6, k=3, epochs=2, batch_size=3, micro_batch=3, validation_prompts=4,
            test_prompts=4, max_new_tokens=6, print_every=9, save_every=1, chunk=3, eta=20.0, device="cpu")
LSP = dict(steps=4, queries=4, answers=3, test_prompts=4, eval_every=2, print_every=9, micro_batch=4, max_new_tokens=6,
           device="cpu")
# The operations that change what is on the disk, and where they stand.
OPERATIONS = (os, "replace"), (os, "fsync"), (os, "remove"), (os, "mkdir"), (shutil, "rmtree"), (builtins, "open")


TIMES = rb',\s*"(tokens_per_second": {[^}]*}|seconds": [0-9.]*)'           # the figures that no two runs share


def words(**settings):
    """Settings as flags."""
    return [word for name, value in settings.items()
            for word in ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])]


def crash_at(number):
    """From now on file operations are counted, and the number-th ends the process at once, before it is done. Returns
    the list of operations so far."""
    calls = []

    def counted(name, real):
        def operation(*args, **kwargs):
            writes = name != "open" or set("wax+") & set(kwargs.get("mode", args[1] if len(args) > 1 else "r"))
            if writes and not str(args[0]).startswith("/dev"):
                calls.append(name)
                if len(calls) == number:
                    os._exit(9)
            return real(*args, **kwargs)
        return operation

    for module, name in OPERATIONS:
        setattr(module, name, counted(name, getattr(module, name)))
    return calls


def fork(function):
    """A child process that calls the function and ends with the status that it returns. Its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        status = function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def child(script, flags, number=0, **environment):
    """Start script.main(flags) as `python SCRIPT.py` would, to crash at its number-th file operation; the process's id.
    It leaves what it printed in log-RANK, and in count-RANK how many operations there were."""
    def play():
        os.environ.update(environment)
        rank = environment.get("RANK", "0")
        with open(f"log-{rank}", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr, sys.argv = os.fdopen(1, "w"), os.fdopen(2, "w"), ["script.py", *flags]
        script.plots.plot = lambda runs, path: leave_png(path)              # drawing takes longer than all the rest
        lsp.FRESH = (48, 16)
        torch.set_num_threads(1)
        calls, status = crash_at(number), 0
        try:
            script.run.main(script.main)
        except SystemExit as end:
            status = end.code
        total = len(calls)
        with open(f"count-{rank}", "w") as file:
            file.write(str(total))
        return status
    return fork(play)


def ended(pid, seconds=60):
    """The exit status of a child that must end in time; -9 where a signal killed it."""
    for _ in range(20 * seconds):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"still running after {seconds} s: {open('log-0').read()[-500:]}")


def result(out):
    """Everything that must be the same to the bit: {file: content}, None for files that tell the time."""
    found = {}
    for where, _, names in os.walk(out):
        for name in names:
            short = os.path.relpath(os.path.join(where, name), out)
            timed = short in ("summary.json", "config.json", "state/state.pt", "state/lock")
            with open(os.path.join(where, name), "rb") as file:
                found[short] = None if timed else re.sub(TIMES, b"", file.read())
    return found


def check_same(out, whole, want):
    got = result(out)
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    for name in want:
        assert got[name] == want[name], name
    tables = []
    for where in (out, whole):
        with open(f"{where}/summary.json") as file:
            tables.append([row | {"seconds": 0} for row in json.load(file)["evaluations"]])
    assert tables[0] == tables[1]


def count(rank=0):
    with open(f"count-{rank}") as file:
        return int(file.read())


def log(rank=0):
    with open(f"log-{rank}") as file:
        return file.read()


def crash_everywhere(start, prepare):
    """start(out, number, *more): run it, and the exit status. Runs to the end once; then crashes at every operation in
    turn, resumes, and compares; two processes share the work. How many crashes there were."""
    prepare("whole")
    assert start("whole", 0) == 0, log()
    operations, want, here = count(), result("whole"), os.getcwd()

    def some(first):
        os.mkdir(f"crashes-{first}")
        os.chdir(f"crashes-{first}")
        for number in range(first, operations + 1, 2):
            prepare("r")
            assert start("r", number) == 9, f"operation {number} of {operations}: no crash. {log()}"
            assert start("r", 0, "--resume") == 0, f"operation {number} of {operations}: {log()}"
            check_same("r", os.path.join(here, "whole"), want)
        return 0

    assert [ended(pid, 3600) for pid in [fork(lambda first=first: some(first)) for first in (1, 2)]] == [0, 0]
    return operations


@pytest.mark.parametrize("script, settings", [(sppo, SPPO), (lsp, LSP)], ids=["sppo", "lsp"])
def test_a_crash_at_every_file_operation(script, settings, base):
    flags = words(model=base, **settings)
    script.main([*flags, "--out", "imports"])           # once here, so that no child has to import anything
    crashes = crash_everywhere(
        lambda out, number, *more: ended(child(script, [*flags, "--out", out, *more], number)),
        lambda out: shutil.rmtree(out, ignore_errors=True))
    print(f"\n{script.__name__}: {crashes} crashes, and as many runs that ended as the uninterrupted one did")
    assert crashes > 60
