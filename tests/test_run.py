"""run.py: devices, seeds, and a run directory that survives being killed."""

import dataclasses
import errno
import json
import math
import os
import sys
import types

import pytest
import torch

import files
import flags
import parallel
import run
from flags import UserError, flag
from test_flags import Settings

pytestmark = pytest.mark.usefixtures("elsewhere")


def everything():
    return {os.path.join(where, name): open(os.path.join(where, name), "rb").read() for where, _, names in os.walk(".")
            for name in names}


def call(function, monkeypatch, capsys):
    """(exit status, stderr) of run.main(function)."""
    monkeypatch.setattr(sys, "argv", ["x.py", "--steps", "1"])
    with pytest.raises(SystemExit) as end:
        run.main(function)
    return end.value.code, capsys.readouterr().err


def test_main_turns_a_user_error_into_one_sentence(monkeypatch, capsys):
    def wrong(argv):
        raise UserError(f"--steps {argv[1]} is too few; give more")

    assert call(wrong, monkeypatch, capsys) == (2, "error: --steps 1 is too few; give more\n")


def test_main_names_the_file_that_the_system_refuses(monkeypatch, capsys):
    """Where no `files.writing` stands around it. An error without a number is a bug, and keeps its traceback."""
    status, error = call(lambda argv: open("no/such/file"), monkeypatch, capsys)
    assert status == 2 and error.startswith("error: no/such/file: No such file or directory; mend that")

    def strange(argv):
        raise OSError("without a number")

    with pytest.raises(OSError):
        run.main(strange)


def test_main_does_not_hide_a_bug(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(ZeroDivisionError):
        run.main(lambda argv: 1 / 0)


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    status, error = call(interrupted, monkeypatch, capsys)
    assert status == 130 and "--resume" in error


# ---------------------------------------------------------------------------------------------------------------------
# device, seeds


def test_device_and_dtype():
    device, dtype = run.device_and_dtype("cpu", "auto")
    assert device == torch.device("cpu") and dtype == torch.float32
    assert run.device_and_dtype("cpu", "bfloat16")[1] == torch.bfloat16
    for nowhere in ("abacus", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {nowhere}.*--device cpu"):
            run.device_and_dtype(nowhere, "float32")


def test_a_rank_takes_its_own_gpu_before_it_allocates(monkeypatch):
    """Otherwise every process would hold some hundred MB of the first one. And cuDNN's attention is off."""
    calls = []
    for name, value in {"RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"set {device}"))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: calls.append(f"cudnn {on}"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch, "empty", lambda size, device: calls.append(f"empty {device}"))
    assert run.device_and_dtype("cuda") == (torch.device("cuda", 1), torch.bfloat16)
    assert calls == ["set cuda:1", "cudnn False", "empty cuda:1"]


def test_a_gpu_that_is_named_is_the_current_one(monkeypatch):
    """Graphs are recorded on the current device, whatever their tensors are on."""
    calls = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    for name in ("cuda", "cuda:1"):
        assert run.device_and_dtype(name, "float32")[0] == torch.device(name)
    assert calls == [torch.device("cuda:1")]


def test_one_process_needs_no_ranks(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert parallel.init_ranks(torch.device("cpu")) == (0, 1, torch.device("cpu"))
    assert parallel.gather([3, 1, 2], 3) == [3, 1, 2]


def test_stream_is_a_function_of_every_name():
    """The number is pinned: were it to change, every seeded result of the project would."""
    assert run.stream(0, "order", 1, 2) == 3246464807545810367
    names = [(0,), (1,), ("0",), (0, 1), (1, 0), ("01",), ("0", "1"), (0, "order"), (0, "order", 0), (-1,)]
    assert len({run.stream(*n) for n in names}) == len(names)
    assert all(0 <= run.stream(i) < 2**62 for i in range(1000)) and max(run.stream(i) for i in range(1000)) > 2**60


def test_shuffled():
    items = list(range(50))
    once = run.shuffled(items, 0, "order", 1)
    assert once == run.shuffled(iter(items), 0, "order", 1) and sorted(once) == items == list(range(50))
    assert len({tuple(run.shuffled(items, seed, "order", t)) for seed in range(3) for t in range(3)}
               | {tuple(items)}) == 10


# ---------------------------------------------------------------------------------------------------------------------
# the run directory


def lines(path):
    return open(path).read().splitlines()


def saved(iteration=0, **state):
    """A run in ./r with one metrics row before its saved state and one after."""
    r = run.Run("r", Settings())
    r.write("metrics.jsonl", {"step": 1})
    r.seconds["train"] = 2.0
    r.save_state(iteration=iteration, **state)
    r.write("metrics.jsonl", {"step": 2})
    r.write("samples.jsonl", {"late": True})
    return r


def test_a_fresh_run(capsys):
    r = run.Run("deep/r", Settings(steps=9, resume=False))
    assert r.state is None
    assert sorted(os.listdir("deep/r")) == ["config.json", "metrics.jsonl", "samples.jsonl", "state"]
    config = json.load(open("deep/r/config.json"))
    assert config["steps"] == 9 and config["limit"] is None and "resume" not in config and "overwrite" not in config
    assert r.path("state", "x") == os.path.join("deep/r", "state", "x")
    r.say("a line")
    assert capsys.readouterr().out == "a line\n"


def test_resume_finds_the_state_and_drops_later_rows():
    """Without the cut, rows written after the last saved state would stand twice in the journals of a resumed run."""
    saved(step=1, weights={"w": torch.arange(3.0)}, best={"rate": 0.5}, evaluations=[])
    r = run.Run("r", Settings(resume=True), resume=True)
    assert r.state["step"] == 1 and torch.equal(r.state["weights"]["w"], torch.arange(3.0))
    assert r.state["best"] == {"rate": 0.5}
    assert lines("r/metrics.jsonl") == ['{"step": 1}'] and lines("r/samples.jsonl") == []
    assert r.seconds == {"train": 2.0}


def test_resume_with_nothing_saved_starts_afresh_and_says_so(capsys):
    assert run.Run("r", Settings(), resume=True).state is None
    assert "nothing to resume in r: starting afresh" in capsys.readouterr().out
    run.Run("s", Settings()).write("metrics.jsonl", {"step": 1})  # killed before anything was saved
    assert run.Run("s", Settings(), resume=True).state is None
    assert "nothing to resume in s: starting afresh" in capsys.readouterr().out and lines("s/metrics.jsonl") == []


@dataclasses.dataclass
class Staged(Settings):
    stage: str = flag("", "which part")
    iteration: int = flag(1, "of which iteration")
    table: str = flag("", "on what")


def test_stages_of_one_run_share_its_directory():
    """What a stage works on is no setting of the run: the next stage resumes the last one's directory."""
    run.Run("r", Staged(stage="sample")).save_state(iteration=1, step=0)
    r = run.Run("r", Staged(stage="train", iteration=2, table="t.jsonl"), resume=True)
    assert r.state["step"] == 0 and "stage" not in json.load(open("r/config.json"))
    with pytest.raises(UserError, match="batch_size = 4, now it is 5"):
        run.Run("r", Staged(stage="train", batch_size=5), resume=True)


def test_resume_with_another_setting_names_the_flag():
    saved(step=1)
    with pytest.raises(UserError, match="batch_size = 4, now it is 5; give the same --batch-size"):
        run.Run("r", Settings(batch_size=5), resume=True)
    assert len(lines("r/metrics.jsonl")) == 2  # untouched


def test_a_directory_named_like_a_pattern():
    """Its own old tensors go, a neighbour's stay, though "r[1]*" read as a pattern means the neighbour too."""
    for name in ("r1", "r1-more", "r[1]*"):
        r = run.Run(name, Settings())
        for step in (1, 2):
            r.save_state(types.SimpleNamespace(tensors=lambda: {"a": torch.tensor(step)}), iteration=0, step=step)
    for name in ("r1", "r1-more", "r[1]*"):
        assert sorted(os.listdir(f"{name}/state")) == ["lock", "state.pt", "training-0-2"]
        assert run.Run(name, Settings(), resume=True).training_state(0)["training"] == "training-0-2"


@dataclasses.dataclass
class Growing(run.CommonSettings):
    """What sppo.py's flags have that may grow."""
    iterations: int = flag(2, "rounds")
    prompts: str = flag("", "sources")


def test_a_finished_run_may_grow():
    """More steps or iterations, and nothing else: what was saved at the end is where the run goes on."""
    saved(iteration=0, step=3, weights={"w": torch.arange(3.0)})
    r = run.Run("r", Settings(steps=5), resume=True)
    assert r.training_state(0)["step"] == 3 and torch.equal(r.training_state(0)["weights"]["w"], torch.arange(3.0))
    assert json.load(open("r/config.json"))["steps"] == 5 and lines("r/metrics.jsonl") == ['{"step": 1}']
    r.write("metrics.jsonl", {"step": 4})
    r.save_state(iteration=0, step=5)
    assert run.Run("r", Settings(steps=5), resume=True).training_state(0)["step"] == 5
    assert lines("r/metrics.jsonl") == ['{"step": 1}', '{"step": 4}']
    with pytest.raises(UserError, match="steps = 5, now it is 4; give --steps 5 or more or another --out"):
        run.Run("r", Settings(steps=4), resume=True)
    with pytest.raises(UserError, match="batch_size = 4, now it is 5"):
        run.Run("r", Settings(steps=6, batch_size=5), resume=True)
    assert json.load(open("r/config.json"))["steps"] == 5                # a refused command leaves the run as it was


def test_further_iterations_may_have_further_sources():
    run.Run("r", Growing(prompts="a.jsonl,b.jsonl")).save_state(iteration=3, step=0)
    for wrong in ("a.jsonl,b.jsonl.gz", "a.jsonl", "b.jsonl,a.jsonl,c.jsonl"):
        with pytest.raises(UserError, match=f"now it is {wrong}; give the same --prompts .a comma and further"):
            run.Run("r", Growing(iterations=3, prompts=wrong), resume=True)
    assert run.Run("r", Growing(iterations=3, prompts="a.jsonl,b.jsonl,c.jsonl"), resume=True).state["iteration"] == 3
    config = json.load(open("r/config.json"))
    assert config["iterations"] == 3 and config["prompts"] == "a.jsonl,b.jsonl,c.jsonl"
    with pytest.raises(UserError, match="iterations = 3, now it is 2; give --iterations 3 or more"):
        run.Run("r", Growing(iterations=2, prompts="a.jsonl,b.jsonl,c.jsonl"), resume=True)


@dataclasses.dataclass
class OfSteps(Settings):
    prompts: str = flag("", "what lsp.py --mode grpo trains on")


def test_where_there_are_no_iterations_prompts_stay():
    """Each of lsp.py's steps takes its queries from one order of all prompts, which another source would change."""
    run.Run("r", OfSteps(prompts="a.jsonl"))
    with pytest.raises(UserError, match="now it is a.jsonl,b.jsonl; give the same --prompts or another --out"):
        run.Run("r", OfSteps(steps=9, prompts="a.jsonl,b.jsonl"), resume=True)


def test_a_directory_that_holds_a_run_is_not_touched_without_a_word():
    saved(step=1)
    with pytest.raises(UserError, match="--out r already holds files.*--resume.*--overwrite"):
        run.Run("r", Settings())
    assert len(lines("r/metrics.jsonl")) == 2


def test_overwrite_replaces_a_run():
    saved(step=1)
    r = run.Run("r", Settings(batch_size=5), overwrite=True)
    assert r.state is None and lines("r/metrics.jsonl") == [] and os.listdir("r/state") == ["lock"]


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else():
    """Somebody's notes, and the directory that another's link leads to, stay."""
    saved(step=1)
    os.makedirs("far/model")
    for name in ("r/iter-1", "r/step-20", "r/tensorboard", "r/notes"):
        os.mkdir(name)
    os.symlink("../far/model", "r/iter-2")
    for name in ("r/notes.txt", "r/table-1.jsonl", "r/my-table-1.jsonl", "r/curves.png", "r/iter-1/config.json",
                 "r/iter-3.tmp-5", "far/model/weights"):
        open(name, "w").close()
    run.Run("r", Settings(), overwrite=True)
    assert sorted(os.listdir("r")) == ["config.json", "metrics.jsonl", "my-table-1.jsonl", "notes", "notes.txt",
                                       "samples.jsonl", "state"]
    assert os.listdir("far/model") == ["weights"]


def test_a_linked_out_is_overwritten_behind_the_link():
    os.mkdir("disk")
    os.symlink("disk", "r")
    saved(step=1)
    assert run.Run("r", Settings(), overwrite=True).state is None
    assert os.path.islink("r") and "config.json" in os.listdir("disk")
    with pytest.raises(UserError, match='--out "" names no directory'):
        run.Run("", Settings())


def test_a_run_in_use_is_refused_before_anything_is_touched(monkeypatch):
    """Two programs on one directory would each write every row."""
    r = saved(step=1)
    monkeypatch.setattr(files, "HELD", set())           # this process forgets that it was itself
    before = everything()
    with open("r/state/lock", "w") as file:             # as another program on this machine writes it
        file.write("process 1 on elsewhere\n")
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="--out r is in use by another program .process 1 on elsewhere."):
            run.Run("r", Settings(), **how)
    assert {**everything(), "./r/state/lock": None} == {**before, "./r/state/lock": None}
    del r
    assert run.Run("r", Settings(), resume=True).state["step"] == 1


@pytest.mark.parametrize("left", [{}, {"iteration": 0, "step": 1}, [], 3,
                                  {"iteration": 0, "step": 1, "seconds": {}, "sizes": 3},
                                  {"iteration": 0, "step": 1, "seconds": {"total": 1.0}, "sizes": {}}])
def test_a_state_without_its_keys_is_one_sentence(left):
    saved(step=1)
    torch.save(left, "r/state/state.pt")
    with pytest.raises(UserError, match="^r/state/state.pt is damaged .*; begin again with --overwrite, or go on from"):
        run.Run("r", Settings(), resume=True)


def test_a_journal_shorter_than_the_state_says_is_not_filled_up():
    saved(step=1)
    os.truncate("r/metrics.jsonl", 3)
    run.Run("r", Settings(), resume=True)
    assert open("r/metrics.jsonl").read() == '{"s'


def test_what_is_kept_is_found_by_its_digest():
    r = run.Run("r", Settings())
    r.keep("reference-1", 5, [[0.5], [1.5]])
    assert r.kept("reference-1", 5, 2) == [[0.5], [1.5]] and r.kept("reference-1", 6, 2) is None
    assert r.kept("reference-2", 5, 2) is None
    for damage in ("", "{}", '{"digest": 5, "reference": [[0.5]]}', '{"digest": 5}', '{"digest": 5, "reference": null}'):
        with open("r/state/reference-1.json", "w") as file:
            file.write(damage)
        with pytest.raises(UserError, match="r/state/reference-1.json is damaged"):
            r.kept("reference-1", 5, 2)


@pytest.mark.parametrize("files", [["notes.txt"], ["config.json", "model.safetensors"]])
@pytest.mark.parametrize("word", ["resume", "overwrite"])
def test_a_directory_that_is_no_run_is_refused(files, word):
    """A checkpoint has a config.json too: `--out my-model --overwrite` must not delete the weights."""
    os.mkdir("d")
    for name in files:
        with open(f"d/{name}", "w") as file:
            file.write('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"\bd\b.*another --out"):
        run.Run("d", Settings(), **{word: True})
    assert sorted(os.listdir("d")) == files


def test_state_is_replaced_atomically(monkeypatch):
    """A kill or a full disk while the state is written: the old state stays good."""
    r = saved(step=1)

    def full(value, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="state.pt cannot be written .No space left on device.; what was saved before"):
        r.save_state(iteration=0, step=2)
    assert sorted(os.listdir("r/state")) == ["lock", "state.pt"]
    assert run.Run("r", Settings(), resume=True).state["step"] == 1


def test_what_a_kill_left_behind_is_removed_on_resume():
    """SIGKILL runs no `finally`: each would leave a temporary copy of weights and optimizer, tens of GB for a 7B
    model."""
    saved(step=1)
    os.mkdir("r/iter-1.tmp-123")
    open("r/iter-1.tmp-123/model.safetensors", "w").close()
    open("r/state/state.pt.tmp-123", "w").close()
    run.Run("r", Settings(), resume=True)
    assert sorted(os.listdir("r")) == ["config.json", "metrics.jsonl", "samples.jsonl", "state"]
    assert sorted(os.listdir("r/state")) == ["lock", "state.pt"]


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_a_directory_that_had_stepped_aside_comes_back():
    """A kill between write_atomically's two renames: the old checkpoint is all there is."""
    r = run.Run("r", Settings())
    r.save_state(iteration=1, step=1)
    for name, new_one in (("best", False), ("other", True)):
        os.makedirs(f"r/state/{name}.old-7")
        open(f"r/state/{name}.old-7/old", "w").close()
        if new_one:
            os.makedirs(f"r/state/{name}")
    run.Run("r", Settings(), resume=True)
    assert os.listdir("r/state/best") == ["old"] and os.listdir("r/state/other") == []
    assert sorted(os.listdir("r/state")) == ["best", "lock", "other", "state.pt"]


def test_a_state_that_would_run_code_is_not_loaded():
    saved(step=1)
    torch.save({"seconds": {}, "sizes": {}, "step": Trap()}, "r/state/state.pt")
    with pytest.raises(UserError, match="UnpicklingError"):
        run.Run("r", Settings(), resume=True)
    assert not os.path.exists("trapped")


# ---------------------------------------------------------------------------------------------------------------------
# trackers. The packages are optional: modules of the same names that note every call stand in for them


class Writer:
    """TensorBoard's SummaryWriter."""

    def __init__(self, log_dir, purge_step=None, flush_secs=120):
        self.log_dir, self.calls = log_dir, Writer.calls
        self.calls.append(("begin", log_dir, purge_step))

    def add_scalar(self, name, value, step):
        self.calls.append((self.log_dir, name, value, step))

    def close(self):
        self.calls.append(("close", self.log_dir))


class Dashboard:
    """A run of wandb or trackio."""

    def __init__(self, calls):
        self.calls = calls

    def define_metric(self, name, step_metric):
        self.calls.append(("x axis", name, step_metric))

    def log(self, numbers, step=None):
        self.calls.append((numbers, step))


@pytest.fixture(params=sorted(run.TRACKERS))
def tracked(request, monkeypatch):
    """(a tracker's name, what it was called with, what is called at the end of the program)."""
    calls, at_exit = [], []

    def init(**given):
        calls.append(given)
        return Dashboard(calls)

    monkeypatch.setattr(Writer, "calls", calls, raising=False)
    monkeypatch.setattr(run.atexit, "register", at_exit.append)
    monkeypatch.setitem(sys.modules, run.TRACKERS[request.param][0],
                        types.SimpleNamespace(SummaryWriter=Writer, init=init))
    return request.param, calls, at_exit


def played(kind, resume=False, rank=0):
    """A session of two rows and an evaluation, after the base's if it is the first; its saved state knows one row."""
    r = run.Run("r", run.CommonSettings(track=kind), resume=resume, rank=rank)
    if not resume:
        r.track_evaluation({"name": "base", "win_rate": 0.5, "accuracy_sampled": None, "styles": [0.75, 0.25]})
    r.write("metrics.jsonl", {"loss": 2.0, "tokens_per_second": {"sample": 9, "train": 4}})
    if not resume:
        r.save_state(iteration=0, step=1)
    r.write("metrics.jsonl", {"loss": math.inf, "note": "text"})
    r.write("samples.jsonl", {"prompt": "p", "reward": 1.0})
    r.track_evaluation({"name": "step 2", "win_rate": 0.625})


FIRST = {"train/loss": 2.0, "train/tokens_per_second/sample": 9, "train/tokens_per_second/train": 4}
BASE = {"evaluation/win_rate": 0.5, "evaluation/styles/0": 0.75, "evaluation/styles/1": 0.25}


def test_a_tracker_gets_every_row_and_every_evaluation(tracked):
    """Also after a resume, which goes on in the same run, at the row that follows the last saved one."""
    kind, calls, at_exit = tracked
    played(kind)
    first = calls[:]
    calls.clear()
    played(kind, resume=True)
    second, id = calls, json.load(open("r/state/tracker.json"))["id"]
    assert len(lines("r/metrics.jsonl")) == 3
    sent = [(BASE, 0), (FIRST, 1), ({"train/loss": math.inf}, 2), ({"evaluation/win_rate": 0.625}, 2),
            (FIRST, 2), ({"train/loss": math.inf}, 3), ({"evaluation/win_rate": 0.625}, 3)]
    if kind == "tensorboard":
        rows, table = os.path.join("r", kind), os.path.join("r", kind, "evaluations")
        scalars = [[(rows if name.startswith("train/") else table, name, value, x)
                    for numbers, x in part for name, value in numbers.items()] for part in (sent[:4], sent[4:])]
        assert first == [("begin", rows, 1), ("begin", table, None), *scalars[0]]
        assert second == [("begin", rows, 2), ("begin", table, None), *scalars[1]]  # row 2 of before is not shown
        for end in at_exit[:2]:
            end()
        assert calls[-2:] == [("close", rows), ("close", table)]
        return
    config = json.load(open("r/config.json"))
    begin = {"project": "selfplay", "name": "r", "id": id, "resume": "allow", "dir": "r", "config": config}
    if kind == "trackio":
        begin = {"project": "selfplay", "name": f"r-{id}", "resume": "allow", "config": config}
        assert first == [begin, *sent[:4]] and second == [begin, *sent[4:]]
    else:
        sent = [({**numbers, "row": x}, None) for numbers, x in sent]
        assert first == [begin, ("x axis", "*", "row"), *sent[:4]]
        assert second == [begin, ("x axis", "*", "row"), *sent[4:]]


def test_a_number_that_is_none_reaches_the_tracker_too(tracked):
    kind, calls, _ = tracked
    run.Run("r", run.CommonSettings(track=kind)).write("metrics.jsonl", {"loss": math.nan})
    assert "nan" in str(calls[-1])


def test_one_rank_tracks_and_off_is_off(tracked):
    kind, calls, _ = tracked
    run.Run("r", run.CommonSettings())
    played(kind, rank=1)
    played("", resume=True)
    assert calls == [] and not os.path.exists("r/state/tracker.json")


def test_another_directory_is_another_run(tracked):
    kind, _, _ = tracked
    ids = set()
    for out, overwrite in (("a/r", False), ("b/r", False), ("b/r", True)):
        run.Run(out, run.CommonSettings(track=kind), overwrite=overwrite)
        ids.add(json.load(open(f"{out}/state/tracker.json"))["id"])
    assert len(ids) == 3


def test_a_tracker_whose_id_is_damaged(tracked):
    kind, _, _ = tracked
    run.Run("r", run.CommonSettings(track=kind))
    for text in ("", "[]", "{}"):
        with open("r/state/tracker.json", "w") as file:
            file.write(text)
        with pytest.raises(run.UserError, match="r/state/tracker.json is damaged .* remove it, and the tracker shows"):
            run.Run("r", run.CommonSettings(track=kind), resume=True)


def test_a_run_may_change_its_tracker(tracked, capsys):
    """It changes no figure. And its files are nothing that was begun."""
    kind, _, _ = tracked
    run.Run("r", run.CommonSettings())
    run.Run("r", run.CommonSettings(track=kind), resume=True)
    for directory in ("tensorboard", "wandb"):                          # trackio keeps its files elsewhere
        os.mkdir(os.path.join("r", directory))
    capsys.readouterr()
    assert run.Run("r", run.CommonSettings(), resume=True).tracker is None
    assert "starting afresh" in capsys.readouterr().out


@pytest.mark.parametrize("kind", sorted(run.TRACKERS))
@pytest.mark.parametrize("module", [None, types.SimpleNamespace()])    # not there; or a directory of that name is
def test_a_tracker_that_is_not_installed_is_said_before_anything_is_written(kind, module, monkeypatch):
    monkeypatch.setitem(sys.modules, run.TRACKERS[kind][0], module)
    with pytest.raises(UserError, match=f"--track {kind} needs the package {kind}; pip install {kind}, or leave"):
        run.check_out("r", run.CommonSettings(track=kind), False, False)
    with pytest.raises(UserError, match=f"pip install {kind}"):
        run.Run("r", run.CommonSettings(track=kind))
    assert not os.path.exists("r")


@pytest.mark.parametrize("kind", sorted(run.TRACKERS))
def test_a_tracker_that_cannot_begin_is_one_sentence(kind, monkeypatch):
    def no(*args, **given):
        raise RuntimeError("No API key.\nSecond line")

    monkeypatch.setitem(sys.modules, run.TRACKERS[kind][0], types.SimpleNamespace(SummaryWriter=no, init=no))
    with pytest.raises(UserError, match=rf"--track {kind} could not begin \(No API key\); mend that, or leave --track"):
        run.Run("r", run.CommonSettings(track=kind))


def test_an_unknown_tracker_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        flags.parse(run.CommonSettings, ["--track", "notebook"], "")
    assert end.value.code == 2 and "--track" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# long phases


def in_chunks(made, count, size, stop_after=99):
    """The rows of `count` numbers in chunks of `size`; notes every chunk in `made`, and dies after so many."""
    def make(chunk, first):
        if len(made) == stop_after:
            raise KeyboardInterrupt
        made.append((first, chunk))
        return [{"number": number, "square": number * number} for number in chunk]

    return run.in_chunks("rows.jsonl", list(range(count)), size, make)


def test_an_interrupted_phase_loses_one_chunk():
    whole = [{"number": n, "square": n * n} for n in range(11)]
    made = []
    assert in_chunks(made, 11, 4) == whole and [first for first, _ in made] == [0, 4, 8]
    assert [json.loads(line) for line in open("rows.jsonl")] == whole
    assert in_chunks([], 11, 4, stop_after=0) == whole                      # all of it is there: nothing is made again
    os.remove("rows.jsonl")
    with pytest.raises(KeyboardInterrupt):
        in_chunks([], 11, 4, stop_after=2)
    made = []
    assert in_chunks(made, 11, 4) == whole and made == [(8, [8, 9, 10])]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_chunk_that_was_being_written_is_made_again(cut):
    """Half a row goes, and so do the whole rows of its chunk: chunks always begin at the same places."""
    whole = in_chunks([], 8, 4)
    os.truncate("rows.jsonl", os.path.getsize("rows.jsonl") - cut)
    made = []
    assert in_chunks(made, 8, 4) == whole and [first for first, _ in made] == [4]
    assert [json.loads(line) for line in open("rows.jsonl")] == whole


def test_a_damaged_chunk_file_is_one_sentence():
    with open("rows.jsonl", "w") as file:
        file.write('{"number": 0}\n{"number":\n{"number": 2}\n{"number": 3}\n')
    with pytest.raises(UserError, match="rows.jsonl is damaged; remove it"):
        in_chunks([], 8, 4)


def test_a_log_file_gets_a_line_each_minute(monkeypatch, capsys):
    """stderr is no terminal here. A bar would fill a log file with itself; nothing at all looks like a hang."""
    clock = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(run, "STARTED", 0.0)
    monkeypatch.setattr(run._Lines, "last", 0.0)
    for _ in run.progress(range(10), desc="sampling"):
        clock[0] += 25.0
    with run.progress(desc="judging", total=300) as bar:
        for _ in range(3):
            clock[0] += 70.0
            bar.update(100)
        bar.set_postfix_str("fine", refresh=False)
    assert capsys.readouterr().err.splitlines() == [
        "sampling: 3 of 10, 1 min since the start", "sampling: 6 of 10, 2 min since the start",
        "sampling: 9 of 10, 4 min since the start", "judging: 100 of 300, 5 min since the start",
        "judging: 200 of 300, 6 min since the start", "judging: 300 of 300, 8 min since the start"]


def test_a_phase_of_many_short_bars_is_not_silent(monkeypatch, capsys):
    """Every chunk of answers has a bar of its own, and none of them may last a minute."""
    clock = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(run, "STARTED", 0.0)
    monkeypatch.setattr(run._Lines, "last", 0.0)
    for _ in range(10):
        with run.progress(desc="a chunk", total=1) as bar:
            clock[0] += 50.0
            bar.update()
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_a_loss_that_is_no_number_stops_a_run():
    run.check_finite({"loss": 1.0, "grad_norm": 2.0}, "step 3", "out/iter-1")
    for bad in ({"loss": float("nan"), "grad_norm": 1.0}, {"grad_norm": float("inf")}):
        with pytest.raises(UserError, match=r"step 3: (loss|grad_norm) is (nan|inf); stopped.*out/iter-1.*--lr"):
            run.check_finite(bad, "step 3", "out/iter-1")


def test_what_was_begun_is_no_fresh_start(capsys):
    """The message would be untrue: answers that were sampled before a kill are used."""
    r = run.Run("r", Settings())
    files.write_rows(r.path("state", "test.jsonl"), [{"prompt": "p"}])        # written before any work
    run.Run("r", Settings(), resume=True)
    assert "starting afresh" in capsys.readouterr().out
    for begun in (r.path("state", "sampled-1.jsonl"), r.path("table-1.jsonl")):
        files.write_rows(begun, [{"a": 1}])
        run.Run("r", Settings(), resume=True)
        assert "starting afresh" not in capsys.readouterr().out
        os.remove(begun)


def test_only_rank_0_writes(capsys):
    run.Run("r", Settings())
    before = everything()
    other = run.Run("r", Settings(), rank=1)
    other.write("metrics.jsonl", {"step": 1})
    other.save_state(iteration=0, step=1)
    other.say("hello")
    assert everything() == before and capsys.readouterr().out == ""


def test_a_directory_that_cannot_be_made_names_the_flag():
    open("file", "w").close()
    with pytest.raises(UserError, match="--out file/r cannot be written"):
        run.Run("file/r", Settings())


def test_phases_add_up():
    r = run.Run("r", Settings())
    for _ in range(2):
        with r.phase("train"):
            pass
    with r.phase("judge"):
        pass
    assert set(r.seconds) == {"train", "judge"} and 0 < r.seconds["train"] < 1


def test_a_summary_may_be_written_again_and_again(monkeypatch, capsys):
    """Its total is the clock's at that moment, and no phase whose seconds would be counted with the others."""
    clock = [100.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(run, "STARTED", 100.0)
    cpu = torch.device("cpu")
    for resume, before in ((False, 0.0), (True, 20.0)):
        clock[0] = 100.0                                                    # a new session
        r = run.Run("r", Settings(), resume=resume)
        for seconds in (10.0, 20.0):
            with r.phase("train"):
                clock[0] += 10.0
            summary = r.write_summary("m", Settings(), "b", cpu, 1, [{"name": "base"}] * int(seconds))
            assert summary == json.load(open("r/summary.json")) and len(summary["evaluations"]) == seconds
            assert summary["seconds"] == {"train": before + seconds, "total": before + seconds}
            r.save_state(iteration=0, step=1)
        assert r.seconds == {"train": before + 20.0}
        r.say_where()
        total = f"seconds: train {before + 20:.0f}, total {before + 20:.0f}; wrote "
        assert total in capsys.readouterr().out


def test_environment_names_versions_and_hardware():
    e = run.environment(torch.device("cpu"))
    assert e["torch"] == torch.__version__ and e["hardware"] and e["cpu_threads"] >= 1
