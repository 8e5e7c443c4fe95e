"""files.py: files that survive a kill, a full disk, a power cut, and a second program."""

import contextlib
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch

import files
from conftest import ROOT
from flags import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")


def folder(name, text):
    """A writer, for write_atomically, of a directory with one file."""
    def write(path):
        os.makedirs(path)
        with open(os.path.join(path, name), "w") as file:
            file.write(text)
    return write


def everything():
    return {os.path.join(where, name): open(os.path.join(where, name)).read() for where, _, names in os.walk(".")
            for name in names}


def test_write_atomically_replaces_files_and_directories():
    files.write_json("f.json", {"a": [1]})
    files.write_json("f.json", {"a": [2]})
    files.write_atomically("d", folder("old", "1"))
    files.write_atomically("d", folder("new", "2"))
    assert everything() == {"./f.json": '{\n "a": [\n  2\n ]\n}\n', "./d/new": "2"}


def test_a_failing_writer_leaves_the_old_one_and_nothing_else():
    files.write_json("f.json", 1)
    files.write_atomically("d", folder("old", "1"))
    before = everything()

    def fails(path):
        folder("half", "x")(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    for path in ("d", "f.json", "fresh"):
        with pytest.raises(UserError, match=f"^{path} cannot be written .No space left on device.; what was saved"):
            files.write_atomically(path, fails)
    with pytest.raises(TypeError):
        files.write_json("f.json", {"a": object()})  # fails after the first bytes, and is a bug of ours
    assert everything() == before


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failing_rename_leaves_the_old_directory(fails_at, monkeypatch):
    """A directory is replaced by two renames. If the second fails the old one, which stepped aside, must not be
    thrown away."""
    files.write_atomically("d", folder("old", "1"))
    rename, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError(errno.EROFS, "Read-only file system")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="Read-only file system"):
        files.write_atomically("d", folder("new", "2"))
    assert "1" in everything().values()


@pytest.mark.parametrize("path, write", [("f", lambda path: open(path, "w").write("1")), ("d", folder("inside", "1"))])
def test_the_disk_has_it_before_it_gets_its_name(path, write, monkeypatch):
    """Else a power cut may leave the new name with nothing behind it."""
    calls, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda source, target: calls.append("rename") or rename(source, target))
    files.write_atomically(path, write)
    here, at = os.getcwd(), calls.index("rename")
    assert any("tmp-" in name for name in calls[:at]) and calls[at + 1:] == [here]
    if path == "d":
        assert {os.path.basename(name) for name in calls[:at]} == {f"d.tmp-{os.getpid()}", "inside"}


@contextlib.contextmanager
def small_disk():
    """No file may grow over 4 KiB: what a full disk does to a write, without one. Only around the write: pytest's own
    report may go to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("write", [
    lambda: files.write_rows("f", [{"text": "x" * 1000}] * 9), lambda: files.save_tensors("f", torch.zeros(9999)),
    lambda: files.append("f", [{"text": "x" * 9999}]),
    lambda: files.write_atomically("f", lambda path: safetensors_file(path))])
def test_a_full_disk_is_one_sentence(write):
    """Whoever wrote: Python, torch.save, safetensors."""
    with pytest.raises(UserError, match=r"^f cannot be written \(.*(too large|Too large).*\); what was saved before is "
                                        "whole: mend that, and the same command goes on from there"), small_disk():
        write()
    assert [name for name in os.listdir(".") if "tmp" in name] == []


def safetensors_file(path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(9999)}, path)


def test_a_directory_that_is_gone_and_too_many_open_files():
    with pytest.raises(UserError, match="gone/f.json cannot be written .its directory is gone."):
        files.write_json("gone/f.json", {})
    with pytest.raises(UserError, match="gone/m.jsonl cannot be written .its directory is gone."):
        files.append("gone/m.jsonl", [{}])
    before, lowest = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        with pytest.raises(UserError, match="f.json cannot be written .Too many open files."):
            files.write_json("f.json", {})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert os.listdir(".") == []


def test_what_an_earlier_session_left_is_named_where_it_is_damaged():
    for content in ("", "[]", "{}", '{"items": 3}'):
        with open("kept.json", "w") as file:
            file.write(content)
        with pytest.raises(UserError, match="^kept.json is damaged .*; begin again with --overwrite, or"):
            with files.restoring("kept.json"):
                len(files.read_json("kept.json")["items"])


def test_a_link_is_removed_and_what_it_leads_to_stays():
    os.mkdir("far")
    os.symlink("far", "near")
    os.symlink("nowhere", "dangling")
    for name in ("near", "dangling", "not there"):
        files.remove(name)
    assert os.listdir(".") == ["far"]


def test_a_lock_is_held_by_one_program_and_freed_by_its_death():
    """The second is refused in a sentence that says who holds it; after a kill -9 nothing has to be cleared away."""
    program = ("import sys, time; sys.path.insert(0, sys.argv[1]); import files\n"
               "held = files.lock('lock', '--out x'); print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", program, ROOT], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"--out x is in use by another program .process {other.pid} on .* --out"):
            files.lock("lock", "--out x")
    finally:
        other.kill()
        other.wait()
    assert files.lock("lock", "--out x") and f"process {os.getpid()} on" in open("lock").read()


def test_rows_are_read_as_they_were_written():
    rows = [{"text": "line\nbreak \ud800 é", "n": 0.1}, {}]
    files.write_rows("t.jsonl", rows)
    files.append("t.jsonl", rows)
    assert [json.loads(line) for line in open("t.jsonl", encoding="utf-8")] == rows + rows


def test_tidying_up_touches_what_was_half_written_here_and_nothing_else():
    """Somebody's backups look much alike."""
    stay = ["notes.tmp-draft", "iter-3.old-good", "thesis.tmp-2", "far/x.json.tmp-1", "x.json.tmp"]
    for name in [*stay, "x.json.tmp-7"]:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        open(name, "w").close()
    os.mkdir("best.old-7")
    files.tidy(".", re.compile(r".*\.json|best"))
    assert {name for name in everything()} == {f"./{name}" for name in stay} and os.path.isdir("best")
