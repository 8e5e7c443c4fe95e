"""Replies on disk as they come: a command that was interrupted goes on where it was, and puts no question twice.

`generate` puts questions to a model, `judge` puts them to a judge, `crossplay` to checkpoints and to a judge. All of
them can take hours, or cost money. The questions are numbered 0, 1, ..., and a reply is anything that JSON can hold.

    replies = Replies("answers.json", args, questions)
    if not replies.report:                                      # else the same command has finished before
        found = replies.collect(len(questions), ask, "asking")  # ask(numbers) yields lists of (number, reply)
        replies.finish(rows, {"rows": len(rows)}, as_list=True)
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys

import files
import run


# Flags that may differ between the calls that fill one --out: they change no reply, or name files whose contents count
PASSING = ("preset", "prompts", "answers", "reference", "judge_prompt", "judge_system", "out", "json", "batch",
           "max_rows", "device", "base_url", "workers", "timeout", "retries")


class Replies:
    """Replies to numbered questions, and the file OUT that is made of them.

    OUT.partial.jsonl   one [number, reply] a line, in the order in which they came
    OUT.settings.json   what they are made with, a hash of the questions too; and the report, when all is done
    OUT                 written in one step when every question has its reply; never half-written

    known: {number: reply}. report: what `finish` was given, None until then. Raises UserError if `out` cannot be
    written, was made with other settings or questions, or is not known to be ours.
    """

    def __init__(self, out, settings, questions):
        self.out, self.partial, self.beside = out, f"{out}.partial.jsonl", f"{out}.settings.json"
        self.settings = {name: value for name, value in dataclasses.asdict(settings).items() if name not in PASSING}
        self.settings["questions"] = run.stream(questions)
        self.known, self.report = {}, None
        self._check_writable()
        if os.path.exists(self.beside):
            file = files.read_json(self.beside)
            self._check_same(file.get("settings") or {})
            self.report = file.get("report") if os.path.exists(out) else None
        elif os.path.exists(out) or os.path.exists(self.partial):
            raise run.UserError(f"--out {out} is there without {self.beside}, so nobody knows how it was made; "
                                "remove it (and its .partial.jsonl) or give another --out")
        if os.path.exists(self.partial):
            self._read_partial()

    def _check_writable(self):
        folder = os.path.dirname(os.path.abspath(self.out))
        while not os.path.exists(folder):           # it will be made, if the first one that is there lets
            folder = os.path.dirname(folder)
        if os.path.isdir(self.out):
            raise run.UserError(f"--out {self.out} is a directory; name a file elsewhere")
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise run.UserError(f"--out {self.out} cannot be written ({folder} does not let); name a file elsewhere")

    def _check_same(self, before):
        for name in sorted(before.keys() | self.settings.keys()):
            then, now = before.get(name), self.settings.get(name)
            if then == now:
                continue
            what = f"{name} = {then}, now it is {now}"
            if name == "questions":
                what = "other questions, answers or judge prompt"
            raise run.UserError(f"--out {self.out} was made with {what}; go on with the same, or give another "
                                f"--out (or remove {self.beside} and what stands beside it)")

    def _read_partial(self):
        try:
            with open(self.partial, "rb+") as file:
                data = file.read()
                whole = data[:data.rfind(b"\n") + 1]    # a kill in the middle of a write leaves a line without end
                self.known = dict(map(json.loads, whole.splitlines()))
                file.truncate(len(whole))
        except (OSError, ValueError, TypeError) as error:
            raise run.UserError(f"{self.partial} cannot be read ({type(error).__name__}); "
                                "remove it to begin again") from None

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise run.UserError(f"--out {self.out} cannot be written ({error.strerror}); give another") from None

    def missing(self, count):
        """Which of the questions 0 ... count - 1 still need a reply; none once all is finished."""
        return [] if self.report else [n for n in range(count) if n not in self.known]

    def add(self, replies):
        """Write down some [(number, reply)]."""
        with self._writing():
            if not os.path.exists(self.beside):
                os.makedirs(os.path.dirname(self.out) or ".", exist_ok=True)
                files.write_json(self.beside, {"settings": self.settings})
            with open(self.partial, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(reply) + "\n" for reply in replies))
        self.known.update(replies)

    def collect(self, count, ask, desc):
        """All `count` replies in order; ask(numbers) yields lists of (number, reply) for those that are missing.
        Ctrl-C ends the program with exit status 130 and a word on how to go on."""
        missing = self.missing(count)
        try:
            with run.progress(desc=desc, total=count) as bar:
                bar.update(count - len(missing))
                for replies in ask(missing) if missing else ():
                    self.add(replies)
                    bar.update(len(replies))
        except KeyboardInterrupt:
            print(f"\ninterrupted: the same command goes on from {self.partial}", file=sys.stderr)
            sys.exit(130)
        return [self.known[n] for n in range(count)]

    def finish(self, rows, report, as_list):
        """Write the benchmark's file, one JSON list or one object a line, and the report beside it."""
        with self._writing():
            (files.write_json if as_list else files.write_rows)(self.out, rows)
            files.write_json(self.beside, {"settings": self.settings, "report": report})
            files.remove(self.partial)
        self.report = report


def batches(numbers, size):
    """Lists of at most `size` numbers, cut at fixed places: after an interruption the same questions share a batch, and
    even the last bit of a sum, which depends on the batch, is the same.

    >>> batches([0, 1, 2, 3, 4], 3), batches([1, 4], 3)
    ([[0, 1, 2], [3, 4]], [[1], [4]])
    """
    return [list(batch) for _, batch in itertools.groupby(numbers, key=lambda n: n // size)]
