"""What the commands of bench.py share: the clock, the memory gauge, the table, and a random model to time."""

import ctypes
import dataclasses
import math
import os
import tempfile
import time

import torch

import model
from flags import flag


def say_if_busy():
    """Prints a line where other work would spoil the figures: the last minute's load average is above the cores."""
    load, cores = getattr(os, "getloadavg", lambda: (0.0,))()[0], os.cpu_count()
    if load > cores:
        print(f"this machine is busy: load average {load:.1f} on {cores} cores; read the ratios with care")


def multiplies_bfloat16():
    """Has this CPU instructions that multiply bfloat16? Without them torch goes by way of float32. torch 2.13 tells."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def seconds(function, device):
    """Wall-clock seconds of one call, the device's work included, and none that it still had to do before."""
    start = now(device)
    function()
    return now(device) - start


def now(device):
    """The clock in seconds, read when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(calls, rounds, device):
    """{name: function} -> {name: median seconds}. In every round each function is called once. Warm them up before."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return {name: sorted(taken)[rounds // 2] for name, taken in times.items()}


class Peak:
    """Peak memory above what is held now, in MB (2**20 bytes). On a CPU only Linux tells; else NaN."""

    def __init__(self, device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)             # freed blocks that the allocator kept would hide the peak
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")                          # resets the high-water mark VmHWM to the present size
            self.before = self._status("VmRSS")
        except (OSError, AttributeError):
            self.before = math.nan

    @staticmethod
    def _status(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

    def megabytes(self):
        """The peak since this object was made."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return self._status("VmHWM") - self.before if math.isfinite(self.before) else math.nan


def peak_megabytes(function, device):
    """Peak memory of a call above what was held before it, in MB."""
    peak = Peak(device)
    function()
    return peak.megabytes()


def relative_error(got, want):
    """|got - want| / |want|, in the 2-norm over the whole tensor."""
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm())


def print_table(title, floor, calls, clear, device, rounds=3):
    """Peak memory in a first call of each, which is its warm-up too; then its median time, over the floor's."""
    calls = {"bare matrix products": floor} | calls
    peaks = {}
    for name, call in calls.items():
        clear()                                                  # gradients that are held already would hide the peak
        peaks[name] = peak_megabytes(call, device)
    median = median_seconds(calls, rounds, device)
    width = max(26, *map(len, median))
    print(f"{title + ':':{width + 2}s} {'seconds':>8s} {'x floor':>8s} {'peak MB':>8s}")
    for name, taken in median.items():
        print(f"  {name:{width}s} {taken:8.2f} {taken / median['bare matrix products']:8.2f} {peaks[name]:8.0f}")


SIZES = {  # layers, width, query heads, key heads, MLP width, vocabulary
    "tiny": (4, 192, 6, 6, 512, 512),
    "small": (12, 768, 12, 4, 2048, 32000),
}


@dataclasses.dataclass
class SizeSettings:
    """Flags of all commands that time a whole model."""
    size: str = flag("tiny", "random Llama: tiny = 4 layers, width 192; small = 12 layers, width 768, V 32,000",
                     tuple(SIZES))
    rounds: int = flag(3, "interleaved rounds; the median is printed", at_least=1)
    device: str = flag("auto", "cuda, mps or cpu")
    dtype: str = flag("auto", "float32 or bfloat16", ("auto", "float32", "bfloat16"))


def random_network(args, device, dtype):
    """A model.Transformer with the weights that `random_llama` draws for args.size."""
    with tempfile.TemporaryDirectory() as directory:
        random_llama(args.size, directory)
        return model.Transformer.from_pretrained(directory, device, dtype)


def random_llama(size, directory):
    """A random Llama checkpoint written by transformers, so that both contestants open the same file."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    layers, width, heads, kv_heads, mlp, vocab = SIZES[size]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=mlp,
                                      num_hidden_layers=layers, num_attention_heads=heads,
                                      num_key_value_heads=kv_heads, max_position_embeddings=2048,
                                      bos_token_id=None, eos_token_id=None, pad_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
