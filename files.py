"""Files that survive: a full disk, a power cut, a kill -9, and two programs that mean the same directory.

A file or a checkpoint is written under a temporary name, brought to the disk, and renamed, so that a reader sees the
old one or the new one. A journal is appended to, row by row, and whoever reads it drops half a row at its end. What the
system refuses becomes one sentence that names the file.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil

import torch

from flags import UserError


HALF = re.compile(r"(.*)\.(tmp|old)-\d+")         # what a kill leaves in the middle of `write_atomically`
HELD = set()                                        # the locks that this process has taken


@contextlib.contextmanager
def writing(path):
    """Raises UserError where the system refuses what the block writes to `path`: a full disk, a directory that went
    away or lost its permissions, too many open files."""
    try:
        yield
    except UserError:                           # says already what is wrong
        raise
    except Exception as error:
        cause = error
        while not isinstance(cause, OSError) and cause.__context__:         # torch.save covers it with one of its own
            cause = cause.__context__
        if not isinstance(cause, OSError) and type(error).__name__ != "SafetensorError":
            raise
        why = getattr(cause, "strerror", None) or str(cause)
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            why = "its directory is gone"
        raise UserError(f"{path} cannot be written ({why}); what was saved before is whole: mend that, and the same "
                        "command goes on from there, a training run with --resume") from None


def write_atomically(path, write):
    """Call write(temporary path), then rename onto `path`, a file or a directory. A reader sees the old one or the new
    one, after a power cut too: the disk has the new one before it gets the name. Raises UserError as `writing` does."""
    path = os.path.normpath(path)
    temporary, aside = f"{path}.tmp-{os.getpid()}", f"{path}.old-{os.getpid()}"
    with writing(path):
        try:
            write(temporary)
            inside = [os.path.join(there, name) for there, _, names in os.walk(temporary) for name in (*names, "")]
            for made in inside or [temporary]:
                sync(made)
            if os.path.isdir(path):  # a directory cannot be replaced in one step, so the old one steps aside first
                os.replace(path, aside)
            os.replace(temporary, path)
            sync(os.path.dirname(path) or ".")
        finally:
            if os.path.isdir(aside) and not os.path.exists(path):
                os.replace(aside, path)
            for left in (temporary, aside):
                remove(left)


def sync(path):
    """Wait until the disk has what was written to a file, or the names in a directory."""
    if os.path.isdir(path) and os.name != "posix":                          # Windows opens no directory
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:                                                # some network disks sync no directory
        if not os.path.isdir(path) or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def append(path, rows):
    """Add one JSON object a line. A kill leaves half a row at worst. Raises UserError as `writing` does."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def lock(path, whose):
    """Hold the file `path` until the returned object is let go of, or this process ends in whatever way: the system's
    own lock, so that none is ever stale. Raises UserError where another program holds it; `whose` is what it locks."""
    try:
        import fcntl
    except ImportError:                                                     # Windows: two programs are not noticed
        return None
    with writing(path):
        file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        if os.path.realpath(path) not in HELD:
            raise UserError(f"{whose} is in use by another program ({file.read(100).strip() or 'it does not say which'}"
                            "); wait for it, end it, or give another --out") from None
    except OSError:                                                         # a file system without locks
        return None
    HELD.add(os.path.realpath(path))
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def tidy(directory, ours=re.compile(".*")):
    """Clear what a kill left in a directory in the middle of `write_atomically`, of files whose names match `ours`: a
    half-written one goes, and an old directory that had stepped aside comes back where the new one has not arrived."""
    for left in filter(HALF.fullmatch, os.listdir(directory)):
        name, kind = HALF.fullmatch(left).groups()
        if not ours.fullmatch(name):
            continue
        left, path = os.path.join(directory, left), os.path.join(directory, name)
        if kind == "old" and not os.path.exists(path):
            os.replace(left, path)
        else:
            remove(left)


def remove(path):
    """Delete a file, a directory, or a link but not what it leads to, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def read_json(path):
    """The JSON object in `path`. Raises UserError where there is none."""
    try:
        with open(path, encoding="utf-8-sig") as file:         # a file from Windows may begin with a mark
            value = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a directory that holds it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, RecursionError) as error:  # malformed JSON, or not UTF-8
        raise UserError(f"{path} is not valid JSON ({str(error)[:100]}); it may be cut short: make or download it "
                        "again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; make or download it again")
    return value


@contextlib.contextmanager
def restoring(path, remedy="begin again with --overwrite, or go on from the last good checkpoint (--model) in another "
                           "--out"):
    """Raises UserError where the block finds in `path`, a file of an earlier session, not what a session writes."""
    try:
        yield
    except torch.OutOfMemoryError:              # a RuntimeError too, and no fault of the file
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, UserError) as error:
        why = "no JSON object" if isinstance(error, UserError) else type(error).__name__
        raise UserError(f"{path} is damaged ({why}); {remedy}") from None


def write_json(path, value, indent=1):
    """Write `value` as JSON, atomically."""
    def write(temporary):
        with open(temporary, "w") as file:
            json.dump(value, file, indent=indent)
            file.write("\n")
    write_atomically(path, write)


def write_rows(path, rows):
    """One JSON object a line, atomically."""
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, write)


def save_tensors(path, tensors):
    """torch.save, atomically, and through a file of Python's, whose errors say what the system said."""
    def write(temporary):
        with open(temporary, "wb") as file:
            torch.save(tensors, file)
    write_atomically(path, write)
