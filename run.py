"""A run: everything around an algorithm that is not the algorithm.

The flags that both scripts have, the device and the dtype, ranks under torchrun, seeds, progress bars, and a run
directory that survives being killed. sppo.py and lsp.py share this file so that their own text holds only the method.

    out/<name>/config.json     the settings of the last session
               metrics.jsonl   one row per step
               samples.jsonl   prompts with their responses and verdicts, to be read by a person
               iter-k/         (step-k/) each a complete Hugging Face checkpoint; with --save adapter, PEFT's files
               tensorboard/    with --track tensorboard: the figures of metrics.jsonl and of the evaluations
               state/          what --resume needs: state.pt, the optimizer's tensors (training-*), and the results of
                               phases that were finished, or begun; replaced atomically or appended to, so that a kill
                               -9 at any moment leaves a good one
               summary.json    the result
               curves.png      the picture

Randomness: nothing here or in the scripts draws from a generator whose state would have to be saved. Every draw is a
function of (seed, what it is for, where we are), see `stream`. A resumed run therefore needs no generator state to
repeat the uninterrupted one, on a CPU bit for bit (on a GPU sums are taken in no fixed order).
"""

import atexit
import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
import platform
import random
import re
import sys
import time
import uuid

import torch
import torch.distributed as dist

import files
import parallel
from flags import UserError, brief, flag


STARTED = time.perf_counter()
# What helps where memory does not suffice: said by a plan (memory.py) and after an allocation that failed
REMEDIES = "give --lora 16, --micro-batch 1, --activation-checkpointing, a smaller --max-rows, or more GPUs (torchrun)"


# ---------------------------------------------------------------------------------------------------------------------
# settings that both scripts have


@dataclasses.dataclass
class CommonSettings:
    """Flags that both scripts have."""
    clip: float = flag(1.0, "largest gradient norm; 0 = no clipping (not in the papers)", at_least=0)
    gradient_accumulation: int = flag(0,
        "backward passes per optimizer step, another way to say --micro-batch; 0 = as --micro-batch says", at_least=0)
    activation_checkpointing: bool = flag(False,
        "keep each layer's input only and compute the layer again in the backward pass: less memory, a third more time")
    compile: bool = flag(False,
        "torch.compile the layers for training passes: a minute at the start, then fewer trips to memory; needs a C++ "
        "compiler")
    weight_decay: float = flag(0.0, "of the optimizer (not in the papers)", at_least=0)
    lora: int = flag(0,
        "r, rank of adapters (LoRA), trained in place of the weights; they want three to ten times the learning "
        "rate; 0 = all weights are trained", at_least=0, at_most=4096)
    lora_alpha: float = flag(0.0, "alpha; what adapters add is multiplied by alpha / r; 0 = 2 r", at_least=0)
    lora_layers: str = flag("all", "what gets adapters: all, or some of q,k,v,o,gate,up,down with commas between")
    save: str = flag("merged",
        "what iter-k/ or step-k/ holds with --lora: merged = a whole checkpoint, adapter = PEFT's files, to be used "
        "beside the initial model", ("merged", "adapter"))
    max_new_tokens: int | None = flag(None,
        "longest answer in tokens; longer ones are cut, used, and counted", at_least=1)
    max_rows: int | None = flag(None, "sequences in flight while sampling; bounds the KV cache", at_least=1)
    print_every: int | None = flag(None,
        "optimizer steps between printed lines; metrics.jsonl has every step", at_least=1)
    template_option: str = flag("",
        "name=value[,name=value] for the checkpoint's chat template [enable_thinking=false where it knows the name]")
    seed: int = flag(0, "fixes everything that is drawn, but not an embedded world and its base")
    device: str = flag("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = flag("auto",
        "float32 or bfloat16; auto: bfloat16 where native (the optimizer keeps float32 weights)",
        ("auto", "float32", "bfloat16"))
    track: str = flag("",
        "send every row of metrics.jsonl and every evaluation to tensorboard (files in the run's directory), wandb or "
        "trackio too; each is a package of its own", ("tensorboard", "wandb", "trackio"))
    rank_timeout: float = flag(30.0,
        "torchrun: minutes that a process waits for another in a training step (12 hours where one may be sampling)",
        at_least=0.01, at_most=10080)
    plan: bool = flag(False, "print what memory the run needs, phase by phase, on one GPU or several, and end")
    resume: bool = flag(False, "continue the run in --out from its last saved state")
    overwrite: bool = flag(False, "replace the run in --out")


def main(function):
    """Call a script's main function; turn a UserError into one sentence on stderr and exit status 2. Of several
    processes the first to stop speaks, and the others end quietly with the same status."""
    try:
        function(sys.argv[1:])
    except UserError as error:
        stop(str(error))
    except BrokenPipeError:             # whoever read our output, say `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:            # what `files.writing` did not stand around
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        stop(f"{error.filename or 'a file'}: {error.strerror}; mend that, and give the same command again, for a "
             "training run with --resume")
    except torch.OutOfMemoryError as error:
        stop(f"the GPU's memory is full ({str(error)[:100]}); --plan prints what needs how much; {REMEDIES}")
    except RuntimeError as error:
        if not parallel.Ranks.store or not parallel.lost(error):
            raise
        stop("another process of this run has ended, or cannot be reached, or did not answer for as long as "
             f"--rank-timeout says; see what it printed, and go on with --resume ({str(error).splitlines()[0][:120]})")
    except KeyboardInterrupt:
        print("\ninterrupted: a training run goes on from its last saved state with the same command and --resume",
              file=sys.stderr)
        sys.exit(130)
    parallel.leave()


def stop(message):
    """End the program with a sentence and exit status 2."""
    try:
        first = parallel.Ranks.store is None or parallel.Ranks.store.add("stopped", 1) == 1
    except RuntimeError:                # torchrun itself is gone
        first = True
    if first:
        print(f"error: {brief(message)}", file=sys.stderr, flush=True)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# device, ranks, seeds


def device_and_dtype(device="auto", dtype="auto"):
    """Resolve --device and --dtype. auto: cuda, then mps, then cpu;
    bfloat16 where the hardware multiplies it, else float32.

    Returns (torch.device, torch.dtype). Raises UserError for a device that is not here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type == "cuda":
            if "RANK" in os.environ:            # each process its own, before anything is allocated on the first
                device = torch.device("cuda", parallel.set_by_torchrun("LOCAL_RANK"))
            if device.index is not None and torch.cuda.is_available():  # CUDA graphs are recorded on the current one
                torch.cuda.set_device(device)
            # cuDNN's attention with a mask has given NaN gradients (pytorch issue 196678) and wrong text (193893) on
            # Hopper, and plans anew for every shape, of which decoding has one a step. Flash and efficient attention
            # remain.
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.set_float32_matmul_precision("highest")       # no TF32, which some images switch on
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}); "
                        "try --device cpu") from None
    if dtype == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if native else "float32"
    return device, getattr(torch, dtype)


def check_finite(metrics, where, last_good):
    """Raises UserError where a step's loss or gradient norm is infinite or no number. last_good: a checkpoint."""
    bad = {name: metrics[name] for name in ("loss", "grad_norm") if not math.isfinite(metrics.get(name, 0.0))}
    if bad:
        what = " and ".join(f"{name} is {value}" for name, value in bad.items())
        raise UserError(f"{where}: {what}; stopped. The last good checkpoint is {last_good}: begin again from there "
                        "(--model) with another --out and a lower --lr, or with --dtype float32")


def stream(*names):
    """A 62-bit seed that depends on every name and on nothing else: stream(seed, "order", iteration, epoch)."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def shuffled(items, *names):
    """A new list with the items in the random order that belongs to `names`."""
    items = list(items)
    random.Random(stream(*names)).shuffle(items)
    return items


def progress(iterable=None, desc="", total=None):
    """A progress bar on stderr that appears after two seconds and vanishes when done. Where stderr is no terminal, such
    as in a log file, a line each minute instead. Nothing on ranks > 0."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0 and not sys.stderr.isatty():
        return _Lines(iterable, desc, total)
    from tqdm import tqdm

    return tqdm(iterable, desc=desc, total=total, delay=2, leave=False, dynamic_ncols=True, file=sys.stderr,
                disable=rank > 0)


class _Lines:
    """What a log file shows instead of a bar; it has those of tqdm's methods that are used here. A long phase may be
    many short bars, so the minute is counted from the last line of any of them."""
    SECONDS, last = 60, STARTED

    def __init__(self, iterable, desc, total):
        self.iterable, self.desc, self.done = iterable, desc, 0
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update()

    def update(self, count=1):
        self.done, now = self.done + count, time.perf_counter()
        if now - _Lines.last >= self.SECONDS:
            _Lines.last = now
            print(f"{self.desc}: {self.done} of {self.total}, {(now - STARTED) / 60:.0f} min since the start",
                  file=sys.stderr, flush=True)

    def set_postfix_str(self, text, refresh=True):
        pass

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves behind


def last_checkpoint(directory):
    """The newest checkpoint, iter-k or step-k, in a run's directory; None where there is none."""
    names = [name for name in (os.listdir(directory) if os.path.isdir(directory) else ())
             if re.fullmatch(r"(iter|step)-\d+", name)]
    newest = max(names, key=lambda name: int(name.split("-")[1]), default=None)
    return newest and os.path.join(directory, newest)


def rename_on_rank_0(path, name):
    """Give a finished file or directory its final name; on every rank it is there afterwards."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        with files.writing(name):
            os.replace(path, name)
            for changed in {os.path.dirname(path) or ".", os.path.dirname(name) or "."}:
                files.sync(changed)
    parallel.barrier()


def in_chunks(path, items, size, make, rank=0):
    """The rows of make(chunk, first) for one chunk of `items` after another; first: its place in `items`.

    Each chunk's rows are appended to the .jsonl file `path` as soon as they are made, and a later call reads them from
    there, so that an interruption costs one chunk at most. Chunks always begin at the same places: an answer's last
    bits may depend on what it was computed beside. make returns as many rows as its chunk has items, the same on every
    rank. The caller removes the file once all rows are safe elsewhere.
    """
    rows = []
    if os.path.exists(path):
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")[:-1]           # behind the last newline: half a row, from a kill
        whole = len(lines) if len(lines) == len(items) else len(lines) // size * size
        try:
            rows = [json.loads(line) for line in lines[:whole]]
        except ValueError:
            raise UserError(f"{path} is damaged; remove it, and what it held is made again") from None
        if rank == 0:
            with open(path, "ab") as file:
                file.truncate(sum(len(line) + 1 for line in lines[:whole]))
    parallel.barrier()                          # nobody goes on, and removes it, before all have read it
    for first in range(len(rows), len(items), size):
        made = make(items[first:first + size], first)
        rows += made
        if rank == 0:
            files.append(path, made)
    return rows


def environment(device, ranks=1):
    """Versions and hardware, for summary.json."""
    import transformers

    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "hardware": name, "cpu_threads": torch.get_num_threads(), "ranks": ranks}


# ---------------------------------------------------------------------------------------------------------------------
# trackers: the same figures on somebody's dashboard


# --track: the module and what is used of it
TRACKERS = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "wandb": ("wandb", "init"),
            "trackio": ("trackio", "init")}


def load_tracker(kind):
    """What begins a run of a tracker: TensorBoard's SummaryWriter, or the function `init` of wandb or trackio.
    Raises UserError where the package is not installed."""
    module, name = TRACKERS[kind]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):   # the latter where a directory `wandb` passes for an empty module
        raise UserError(f"--track {kind} needs the package {kind}; pip install {kind}, or leave --track out") from None


def numbers_in(row, prefix=""):
    """The numbers of a row of metrics.jsonl or of a table, as trackers want them: {name: number}, with "/" between the
    names of nested ones. What is no number is left out; not a number (NaN) is one.

    >>> numbers_in({"loss": 0.5, "name": "base", "accuracy": None, "tokens_per_second": {"sample": 9}, "styles": [1.0]})
    {'loss': 0.5, 'tokens_per_second/sample': 9, 'styles/0': 1.0}
    """
    found = {}
    for name, value in row.items():
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            found |= numbers_in(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found


class Tracker:
    """A run of --track's back end. The x axis of everything is the number of a row in metrics.jsonl, so that a resumed
    run draws the same curve as an uninterrupted one. An evaluation stands at the last row before it.

    A resumed run goes on in the same run of wandb or trackio, by the id in state/tracker.json. Rows that an interrupted
    session wrote after its last saved state are made again, and sent again: TensorBoard drops the first ones, the
    others show both. The back ends' own hooks end a run of wandb and trackio when the program ends.
    """

    def __init__(self, kind, out, config):
        begin, self.kind, self.id = load_tracker(kind), kind, uuid.uuid4().hex[:8]
        kept, name = os.path.join(out, "state", "tracker.json"), os.path.basename(os.path.abspath(out))
        if os.path.exists(kept):
            with files.restoring(kept, "remove it, and the tracker shows a new run"):
                self.id = str(files.read_json(kept)["id"])
        files.write_json(kept, {"id": self.id})
        with open(os.path.join(out, "metrics.jsonl")) as file:
            self.row = sum(1 for _ in file)
        try:
            if kind == "tensorboard":   # evaluations in a directory of their own: none of them is made again
                self.rows = begin(os.path.join(out, kind), purge_step=self.row + 1, flush_secs=10)
                self.evaluations = begin(os.path.join(out, kind, "evaluations"), flush_secs=10)
                atexit.register(self.rows.close)
                atexit.register(self.evaluations.close)
            elif kind == "wandb":       # it wants rising steps, but takes any other figure as the x axis
                self.run = begin(project="selfplay", name=name, id=self.id, resume="allow", dir=out, config=config)
                self.run.define_metric("*", step_metric="row")
            else:                       # trackio knows a run by its name alone
                self.run = begin(project="selfplay", name=f"{name}-{self.id}", resume="allow", config=config)
        except Exception as error:      # each has its own kinds: no account, no network, no room
            why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(f"--track {kind} could not begin ({why}); mend that, or leave --track out") from None

    def send(self, numbers, evaluation=False):
        """Send {name: number}: the next row of metrics.jsonl, or an evaluation."""
        self.row += not evaluation
        if self.kind == "tensorboard":
            for name, value in numbers.items():
                (self.evaluations if evaluation else self.rows).add_scalar(name, value, self.row)
        elif self.kind == "wandb":
            self.run.log({**numbers, "row": self.row})
        else:
            self.run.log(numbers, step=self.row)


# ---------------------------------------------------------------------------------------------------------------------
# the run directory


# Settings of one command rather than of the run: config.json leaves them out.
MOMENTARY = ("resume", "overwrite", "stage", "iteration", "table", "plan")
# What may differ between the sessions or the machines of one run: nothing of it changes what is computed, but for the
# order in which floating-point sums are taken.
PASSING = ("out", "device", "max_rows", "micro_batch", "gradient_accumulation", "activation_checkpointing",
           "compile", "print_every", "save_every", "track", "rank_timeout")
# What may be larger than before when a run is resumed, so that a finished run goes on.
GROWING = ("iterations", "steps")
# What a run writes beside state/, and --overwrite deletes: another file in its directory is somebody else's.
WRITTEN = re.compile(r"(config|summary|exact)\.json|(metrics|samples|table-\d+)\.jsonl|curves\.png|tensorboard|wandb|"
                     r"(iter|step)-\d+")
# What of it is there, in state/ or beside it, before a run has done anything that is worth resuming.
SET_UP = {"lock", "validation.jsonl", "test.jsonl", "initial.json", "tracker.json", "tensorboard", "wandb"}


def lasting(settings):
    """What config.json holds of a settings dataclass."""
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in MOMENTARY}


def check_out(out, settings, resume, overwrite):
    """Is `out` a run's directory? Raises UserError if this run must not touch it, or if --track lacks its package.
    Writes nothing: ask before long work."""
    if getattr(settings, "track", ""):
        load_tracker(settings.track)
    if not out:
        raise UserError('--out "" names no directory; give one')
    config, state = os.path.join(out, "config.json"), os.path.join(out, "state")
    there = {name for name in (os.listdir(out) if os.path.isdir(out) else ())
             if not (files.HALF.fullmatch(name) and WRITTEN.fullmatch(files.HALF.fullmatch(name)[1]))}
    if not there or there == {"state"} and set(os.listdir(state)) <= {"lock"}:
        return False
    settings_there, now = files.read_json(config) if os.path.exists(config) else {}, lasting(settings)
    # A checkpoint has a config.json too. A run of the other script shares half of the names, an older one most.
    a_run = there == {"state"} or os.path.isdir(state) and 4 * len(settings_there.keys() & now.keys()) >= len(now)
    if not a_run:
        raise UserError(f"--out {out} holds files that are not a run's; give another --out")
    for name, value in now.items() if overwrite else ():
        for part in [value, *value.split(","), *value.split(":")] if isinstance(value, str) and name != "out" else ():
            away, root = os.path.abspath(part), os.path.abspath(out) + os.sep
            inside = away.removeprefix(root).split(os.sep)[0] if part and away.startswith(root) else ""
            if (inside == "state" or WRITTEN.fullmatch(inside)) and os.path.exists(part):
                raise UserError(f"--overwrite would delete what --{name.replace('_', '-')} {value} names; give another "
                                "--out")
    if not resume and not overwrite:
        raise UserError(f"--out {out} already holds files; give --resume to continue that run, --overwrite to replace "
                        "it, or another --out")
    if resume and os.path.exists(config):
        default = {field.name: field.default for field in dataclasses.fields(settings)}
        later = {name: default[name] for name in now}           # what flags that came later were then
        _check_same(out, later | settings_there, now)
    return True


def _check_same(out, before, now):
    """Raises UserError where the settings of a resumed run are not those it was begun with, {name: value}: some may
    differ (PASSING), some may grow (GROWING), and --prompts may name further sources for further iterations."""
    for name in sorted((set(before) | set(now)) - set(PASSING)):
        was, wanted, remedy = before.get(name), now.get(name), "give the same --" + name.replace("_", "-")
        if was == wanted:
            continue
        if name in GROWING and isinstance(was, int) and isinstance(wanted, int):
            if wanted > was:
                continue
            remedy = f"give --{name} {was} or more"
        if name == "prompts" and was and "iterations" in now:
            if str(wanted).startswith(was + ","):
                continue
            remedy += " (a comma and further sources may follow it)"
        raise UserError(f"--resume: {out} was run with {name} = {was}, now it is {wanted}; {remedy} or another --out")


class Run:
    """A run directory and the seconds spent in each phase. Only rank 0 writes.

    A finished run is an ordinary saved state: resumed with more iterations or steps, it goes on from there.
    """

    JOURNALS = ("metrics.jsonl", "samples.jsonl")

    def __init__(self, out, settings, resume=False, overwrite=False, rank=0):
        self.out, self.rank, self.resumed, self.seconds, self.state = str(out), rank, resume, {}, None
        self.before = 0.0           # wall-clock seconds of the sessions that this one resumes
        self.tracker = None
        if rank == 0:
            try:
                self._prepare(settings, resume, overwrite)
            except OSError as error:
                raise UserError(f"--out {self.out} cannot be written ({error.strerror}); "
                                "give a directory that can") from None
        parallel.barrier()
        if resume:
            self.state = self._load_state()
            there = {*os.listdir(self.out), *os.listdir(self.path("state"))}
            if self.state is None and not there - SET_UP - {*self.JOURNALS, "config.json", "state"}:
                self.say(f"nothing to resume in {self.out}: starting afresh")
        if self.state is None and rank == 0:
            self._truncate(dict.fromkeys(self.JOURNALS, 0))
        if rank == 0 and getattr(settings, "track", ""):
            self.tracker = Tracker(settings.track, self.out, lasting(settings))
        parallel.barrier()

    def _prepare(self, settings, resume, overwrite):
        """Make the directory."""
        check_out(self.out, settings, resume, overwrite)
        os.makedirs(self.path("state"), exist_ok=True)
        self.lock = files.lock(self.path("state", "lock"), f"--out {self.out}")
        a_run = check_out(self.out, settings, resume, overwrite)        # once more: another program may have been here
        files.tidy(self.out, WRITTEN)
        files.tidy(self.path("state"))
        if a_run and not resume:
            for name in set(os.listdir(self.out)) - {"state"}:
                if WRITTEN.fullmatch(name):
                    files.remove(self.path(name))
            for name in set(os.listdir(self.path("state"))) - {"lock"}:
                files.remove(self.path("state", name))
        files.write_json(self.path("config.json"), lasting(settings))

    def _load_state(self):
        path = self.path("state", "state.pt")
        if not os.path.exists(path):
            return None
        state = self._load(path)
        if not isinstance(state, dict):
            state = {}
        if "shard" in state:
            raise UserError(f"--resume: {path} was saved by another version of this program; begin again with "
                            "--overwrite, or go on from the last good checkpoint (--model) in another --out")
        with files.restoring(path):
            state["iteration"], state["step"]                               # what both scripts go by
            self.seconds = {name: float(value) for name, value in state["seconds"].items()}
            self.before = self.seconds.pop("total")
            if self.rank == 0:  # rows written after the state was saved will be written again: drop them
                self._truncate({name: state["sizes"][name] for name in self.JOURNALS})
        self.forget("training-.*", state.get("training"))
        return state

    def _load(self, path):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise UserError(f"--resume: {path} cannot be read ({type(error).__name__}); "
                            "start again with --overwrite") from None

    def _truncate(self, sizes):
        for name, size in sizes.items():
            with open(self.path(name), "ab") as file:
                file.truncate(min(size, file.tell()))                       # never longer: that would add NULs

    def path(self, *names):
        """A path inside the run directory."""
        return os.path.join(self.out, *names)

    def say(self, text):
        """Print a line on rank 0, above the progress bar if one is up."""
        if self.rank == 0:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def write(self, journal, row):
        """Append one row to metrics.jsonl or samples.jsonl. A tracker gets those of metrics.jsonl, as train/loss and so
        on (the bare names `step` and `time` are some trackers' own)."""
        if self.rank == 0:
            files.append(self.path(journal), [row])
            if self.tracker and journal == "metrics.jsonl":
                self.tracker.send(numbers_in(row, "train/"))

    def track_evaluation(self, row):
        """Send a row of the run's table, the dict with "name", to the tracker, if there is one: evaluation/win_rate."""
        if self.tracker:
            self.tracker.send(numbers_in(row, "evaluation/"), evaluation=True)

    def save_state(self, optimizer=None, **state):
        """Everything --resume needs: numbers, strings, lists and dicts, `iteration` and `step` among them, the same on
        all ranks; in the middle of training the optimizer's tensors too, the weights among them.

        The tensors go first, under a new name: state.pt, replaced atomically, always names a complete set.
        """
        if optimizer is not None:
            state["training"] = f"training-{state['iteration']}-{state['step']}"
            parallel.save(optimizer.tensors(), self.path("state", state["training"]))
        parallel.barrier()
        if self.rank == 0:
            for name in self.JOURNALS:              # the state counts on so many of their bytes
                with files.writing(self.path(name)):
                    files.sync(self.path(name))
            state["sizes"] = {name: os.path.getsize(self.path(name)) for name in self.JOURNALS}
            state["seconds"] = self._seconds_and_total()
            files.save_tensors(self.path("state", "state.pt"), state)
        parallel.barrier()
        self.forget("training-.*", state.get("training"))
        self.state = None  # loaded once, not kept in memory

    def restore(self, optimizer, state):
        """Puts the optimizer and the weights where they were when this state was saved, if that was in the middle of
        training."""
        if "training" in state:
            with files.restoring(self.path("state", "state.pt")):
                path = self.path("state", state["training"])
            parallel.load(optimizer.tensors(), path)
            optimizer.round()

    def forget(self, pattern, keep=None):
        """Rank 0 deletes what stands in state/ under names that match the whole pattern, but for the name `keep`."""
        for name in os.listdir(self.path("state")) if self.rank == 0 else ():
            if re.fullmatch(pattern, name) and name != keep:
                files.remove(self.path("state", name))

    def keep(self, name, digest, items):
        """Write a list, and a digest of what it was made from, to state/<name>.json."""
        if self.rank == 0:
            files.write_json(self.path("state", f"{name}.json"), {"digest": digest, "reference": items}, indent=None)

    def kept(self, name, digest, count):
        """The list of `count` items that `keep` wrote for this digest; None where there is none."""
        path = self.path("state", f"{name}.json")
        if not os.path.exists(path):
            return None
        with files.restoring(path, "remove it, and --resume makes it again"):
            known = files.read_json(path)
            if known["digest"] == digest and len(known["reference"]) != count:
                raise ValueError
        return known["reference"] if known["digest"] == digest else None

    def training_state(self, iteration):
        """What an interrupted training left of this iteration: all that `save_state` was given, `step` among it; else
        {"step": 0}."""
        return self.state if self.state and self.state["iteration"] == iteration else {"step": 0}

    def total_seconds(self):
        """Wall-clock seconds since the program began, those of resumed sessions included."""
        return self.before + time.perf_counter() - STARTED

    def _seconds_and_total(self):
        return {**self.seconds, "total": self.total_seconds()}

    def write_summary(self, method, settings, base, device, ranks, evaluations):
        """summary.json: settings, versions, hardware, seconds by phase, and the table. Returns it. May be called as
        often as one likes, say after every evaluation: the last one stands."""
        seconds = {name: round(value, 1) for name, value in self._seconds_and_total().items()}
        summary = {"method": method, "settings": dataclasses.asdict(settings), **environment(device, ranks),
                   "base": str(base), "seconds": seconds, "evaluations": evaluations}
        if self.rank == 0:
            files.write_json(self.path("summary.json"), summary)
        return summary

    def say_where(self):
        """The last printed line: where the time went, and where the results are."""
        self.say("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in self._seconds_and_total().items())
                 + f"; wrote {self.path('summary.json')} and {self.path('curves.png')}")

    @contextlib.contextmanager
    def phase(self, name):
        """Add the wall-clock seconds of the block to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
