"""A crash at every file operation of a short run: whatever was being written, --resume ends where an uninterrupted run
does, to the bit. And several processes of which one fails, hangs or dies.

The runs are children of this process, forked, so that a crash costs no import: `pytest --slow -k faults -s` prints how
many there were.
"""

import builtins
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback

import pytest
import torch

import lsp
import sppo
from conftest import leave_png

pytestmark = [pytest.mark.usefixtures("elsewhere"), pytest.mark.slow]

# Half a second each: two iterations, an epoch that is saved in the middle, evaluations, every kind of file.
SPPO = dict(iterations=2, prompts_per_iteration=6, k=3, epochs=2, batch_size=3, micro_batch=3, validation_prompts=4,
            test_prompts=4, max_new_tokens=6, print_every=9, save_every=1, chunk=3, eta=20.0, device="cpu")
LSP = dict(steps=4, queries=4, answers=3, test_prompts=4, eval_every=2, print_every=9, micro_batch=4, max_new_tokens=6,
           device="cpu")
# The operations that change what is on the disk, and where they stand. A process that dies at an fsync leaves what
# it would leave at the next of these.
OPERATIONS = (os, "replace"), (os, "remove"), (os, "mkdir"), (shutil, "rmtree"), (builtins, "open")
SHARED = *OPERATIONS, (io, "open"), (os, "rename")              # those of torch.distributed.checkpoint too


TIMES = rb',\s*"(tokens_per_second": {[^}]*}|seconds": [0-9.]*)'           # the figures that no two runs share


def words(**settings):
    """Settings as flags."""
    return [word for name, value in settings.items()
            for word in ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])]


def crash_at(number, operations):
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

    for module, name in operations:
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


def child(script, flags, number=0, operations=OPERATIONS, **environment):
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
        calls, status = crash_at(number, operations), 0
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
    for where in (out, whole) if "summary.json" in want else ():                            # a stage writes none
        with open(f"{where}/summary.json") as file:
            tables.append([row | {"seconds": 0} for row in json.load(file)["evaluations"]])
    assert not tables or tables[0] == tables[1]


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
    made = {name: text for name, text in want.items() if name.startswith("iter-")}

    def some(first):
        os.mkdir(f"crashes-{first}")
        os.chdir(f"crashes-{first}")
        for number in range(first, operations + 1, 2):
            prepare("r")
            assert start("r", number) == 9, f"operation {number} of {operations}: no crash. {log()}"
            status = start("r", 0, "--resume")
            if status == 2 and "iter-1 is already there; remove it to train again" in log():    # a stage, at its end
                assert {name: text for name, text in result("r").items() if name.startswith("iter-")} == made
                continue
            assert status == 0, f"operation {number} of {operations}: {log()}"
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


def test_a_stage_crashes_at_every_file_operation(base):
    """--stage train on a table of another run; the same command goes on where it was, without --resume."""
    flags = words(model=base, **{**SPPO, "iterations": 1})
    sppo.main([*flags, "--out", "other"])
    train = [*flags, "--world", "operations", "--stage", "train", "--table", os.path.abspath("other/table-1.jsonl")]
    crashes = crash_everywhere(
        lambda out, number, *more: ended(child(sppo, [*train, "--out", out], number)),
        lambda out: shutil.rmtree(out, ignore_errors=True))
    print(f"\nsppo --stage train: {crashes} crashes, and as many runs that ended as the uninterrupted one did")
    assert crashes > 40


# ---------------------------------------------------------------------------------------------------------------------
# two processes


def two(flags, numbers=(0, 0)):
    """Start two ranks of sppo.py; numbers: at which file operation each crashes. Their ids. The key-value store belongs
    to this process, as torchrun's does to torchrun."""
    two.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [child(sppo, flags, numbers[rank], SHARED, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(two.store.port), TORCHELASTIC_USE_AGENT_STORE="True")
            for rank in (0, 1)]


def test_one_of_two_ranks_crashes_at_every_file_operation(base):
    """The other one ends within seconds, in a sentence; both resume to the same bits."""
    flags = words(model=base, **{**SPPO, "iterations": 1, "epochs": 1})
    sppo.main([*flags, "--out", "imports"])
    assert [ended(pid) for pid in two([*flags, "--out", "whole"])] == [0, 0], log() + log(1)
    want, operations = result("whole"), (count(0), count(1))
    for rank in (0, 1):
        for number in range(1, operations[rank] + 1):
            shutil.rmtree("r", ignore_errors=True)
            numbers = (number, 0) if rank == 0 else (0, number)
            statuses = [ended(pid, 30) for pid in two([*flags, "--out", "r"], numbers)]
            # near the end the other rank may have nothing left to wait for
            assert statuses[rank] == 9 and statuses[1 - rank] in (0, 2) and "Traceback" not in log(1 - rank), (
                number, log(1 - rank))
            assert [ended(pid) for pid in two([*flags, "--out", "r", "--resume"])] == [0, 0], (number, log(), log(1))
            check_same("r", "whole", want)
    print(f"\ntwo ranks: {operations[0]} + {operations[1]} crashes, and as many runs that ended as the whole one did")
    assert operations[0] > 40 and operations[1] >= 2


def wait_for(text, rank=0):
    for _ in range(600):
        if os.path.exists(f"log-{rank}") and text in log(rank):
            return
        time.sleep(0.05)
    raise AssertionError(log(rank))


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_in_training_is_noticed(stop, base):
    """Within seconds of its death, and within --rank-timeout (here 5 seconds) where it lives but does not answer."""
    flags = words(model=base, **{**SPPO, "prompts_per_iteration": 60, "epochs": 60, "save_every": 0})
    pids = two([*flags, "--out", "r", "--rank-timeout", "0.08", "--print-every", "1"])
    wait_for("step 4/")
    os.kill(pids[1], stop)
    start = time.time()
    assert ended(pids[0], 30) == 2 and time.time() - start < 20
    os.kill(pids[1], signal.SIGKILL)
    ended(pids[1])
    assert "another process of this run has ended, or cannot be reached, or did" in log() and "Traceback" not in log()


def test_an_error_on_rank_0_is_said_once_and_ends_both(base):
    """Its directory goes away in the middle, while rank 1 waits for it."""
    flags = words(model=base, **{**SPPO, "prompts_per_iteration": 60, "epochs": 60, "save_every": 1})
    pids = two([*flags, "--out", "r", "--print-every", "1"])
    wait_for("step 4/")
    os.rename("r", "elsewhere")
    assert [ended(pid, 30) for pid in pids] == [2, 2]
    said = [line for line in (log() + log(1)).splitlines() if "error" in line]
    assert len(said) == 1 and re.match("error: r/.*(its directory is gone|No such file).*mend that", said[0])
    assert "Traceback" not in log() + log(1)


def test_a_second_program_is_refused(base):
    flags = words(model=base, **{**SPPO, "epochs": 60, "prompts_per_iteration": 60})
    first = child(sppo, [*flags, "--out", "r", "--print-every", "1"])
    wait_for("step 4/")
    os.rename("log-0", "log-first")
    assert ended(child(sppo, [*flags, "--out", "r", "--resume"])) == 2
    assert f"error: --out r is in use by another program (process {first} on " in log()
    os.kill(first, signal.SIGKILL)
    assert ended(first) == -9
    os.remove("log-0")
    again = child(sppo, [*flags, "--out", "r", "--print-every", "1", "--resume"])
    wait_for("of losers")                       # it trains
    os.kill(again, signal.SIGKILL)
    ended(again)
