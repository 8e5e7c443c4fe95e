"""python bench.py decode, train and gpu: how near this project comes to what a GPU can do.

Random weights in the shape of a published model (memory.SHAPES), bfloat16 on a GPU. Two ceilings are measured first in
the same run: the rate of a large matrix product, and of copying memory. `decode` prints the share of the second that a
decoding step reaches, counting weights and live cache read once; `train` the share of the first that a training pass
reaches, counting the products of layers and head once forward and twice backward (a checkpointed forward pass that is
repeated does not count). `gpu` runs tests/test_cuda.py and all benchmarks and writes what they print into a file.

On a CPU all three run with --model tiny, which shows that they work and nothing else.
"""

import dataclasses
import functools
import os
import subprocess
import sys

import torch

import checkpoints
import files
import flags
import memory
import model
import rollout
import run
from benchmarks import steps, timing
from flags import flag

TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2,
            head_dim=16, max_positions=2048, tied=True)
MODELS = {"tiny": TINY, "llama-3.2-3b": memory.LLAMA_3B, "llama-3-8b": memory.LLAMA_8B}


@dataclasses.dataclass
class GpuSettings:
    """Flags of `python bench.py decode` and `train`."""
    model: str = flag("llama-3.2-3b", "whose shape the random weights have", tuple(MODELS))
    rounds: int = flag(5, "the median is printed", at_least=1)
    length: int = flag(1000, "tokens in each row's cache; or, in training, of a prompt and an answer", at_least=4)
    device: str = flag("auto", "cuda, mps or cpu")
    dtype: str = flag("auto", "float32 or bfloat16", ("auto", "float32", "bfloat16"))


def random_net(name, device, dtype):
    """A network of a published shape, its weights drawn where they stand."""
    with torch.device("meta"):
        net = model.Transformer(checkpoints.Config(**MODELS[name]))
    net.to(dtype).to_empty(device=device)
    if net.config.tied:
        net.head.weight = net.embed.weight
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0) if p.dim() == 1 else p.normal_(0, p.shape[1] ** -0.5)
    return net


def ceilings(device, dtype):
    """(floating-point operations a second of a square product, bytes a second of a copy, read and write together)."""
    n, count = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.empty(count, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    calls = {"product": lambda: a @ b, "copy": lambda: y.copy_(x)}
    for call in calls.values():
        call()
    taken = timing.median_seconds(calls, 5, device)
    return 2 * n**3 / taken["product"], 2 * count / taken["copy"]


@torch.inference_mode()
def decoding(net, R, length, tokens):
    """(a function, tokens held): the function takes `tokens` steps of R rows, sampling included, whose caches hold up
    to `length` tokens each, and returns the ids, so that the host has waited for them."""
    generator = torch.Generator().manual_seed(0)
    cache = model.kv_cache(net, R, length + tokens)
    rows = rollout._Rows(R, tokens, net.device)
    lengths = torch.randint(length // 2, length, (R,), generator=generator)
    rows.limit.fill_(tokens)
    rows.uniform.uniform_()
    cache.live = R
    step = rollout._decoder(net, cache, rows, (1.0, 1.0, 0))

    @torch.inference_mode()
    def call():
        rows.made.zero_(), rows.token.zero_()
        cache.lengths[:R] = lengths.to(net.device)
        longest = int(lengths.max())
        for i in range(tokens):
            step(longest + i + 1)
        return rows.out[:R].tolist()
    return call, int(lengths.sum())


def decode_command(argv):
    """The sub-command `decode`."""
    args = flags.parse(GpuSettings, argv, "time decoding steps against the memory's bandwidth")
    device, dtype = run.device_and_dtype(args.device, args.dtype)
    _, bandwidth = ceilings(device, dtype)
    net = random_net(args.model, device, dtype).requires_grad_(False)
    c, tokens = net.config, 16
    weights = sum(p.numel() for p in net.parameters()) * dtype.itemsize
    print(f"{args.model}, {device}, {str(dtype)[6:]}: copying reaches {bandwidth / 1e12:.2f} TB/s; median of "
          f"{args.rounds} runs of {tokens} steps\n{'rows':>6s} {'ms a step':>10s} {'tokens/s':>10s} "
          f"{'of bandwidth':>13s}")
    for R in (8, 64, 128, 256, 512) if device.type == "cuda" else (2, 8):
        call, held = decoding(net, R, args.length, tokens)
        for _ in range(3):                      # the second run of a width records its graph
            call()
        taken = timing.median_seconds({R: call}, args.rounds, device)[R] / tokens
        read = weights + memory.cache_bytes(c, 1, held + R * tokens // 2, dtype)
        print(f"{R:6d} {1e3 * taken:10.2f} {R / taken:10.0f} {read / taken / bandwidth:13.0%}")
        del call


def train_command(argv):
    """The sub-command `train`."""
    args = flags.parse(GpuSettings, argv, "time training passes against the rate of a matrix product")
    device, dtype = run.device_and_dtype(args.device, args.dtype)
    rate, _ = ceilings(device, dtype)
    net = random_net(args.model, device, dtype)
    net.activation_checkpointing = True
    body, head = sum(p.numel() for p in net.layers.parameters()), net.head.weight.numel()
    print(f"{args.model}, {device}, {str(dtype)[6:]}, layers checkpointed: a product reaches {rate / 1e12:.1f} "
          f"TFLOP/s; median of {args.rounds}\n{'prompts x answers':>18s} {'tokens':>8s} {'ms':>10s} "
          f"{'of the rate':>12s} {'peak MB':>9s}")
    ids = torch.randint(1, 500, (args.length,), generator=torch.Generator().manual_seed(1)).tolist()
    prompt, answer = ids[:args.length // 3], ids[args.length // 3:]
    for N, n in ((1, 2), (4, 2), (4, 8)):
        call = functools.partial(steps.packing_step, net, model.response_logprobs, [prompt] * N, [[answer] * n] * N)
        net.zero_grad()                         # gradients that are held already would hide the peak
        peak = timing.peak_megabytes(call, device)
        taken = timing.median_seconds({n: call}, args.rounds, device)[n]
        tokens, scored = N * (len(prompt) + n * len(answer)), N * n * len(answer)
        done = 6 * (body * tokens + head * scored)
        print(f"{f'{N} x {n}':>18s} {tokens:8d} {1e3 * taken:10.1f} {done / taken / rate:12.0%} {peak:9.0f}")


# ---------------------------------------------------------------------------------------------------------------------
# python bench.py gpu


@dataclasses.dataclass
class AllSettings:
    """Flags of `python bench.py gpu`."""
    out: str = flag("bench/gpu.md", "the file that is written")
    seconds: int = flag(480, "time for all commands together; what does not fit is left out and named", at_least=1)


LEAST = 10      # seconds that must be left for a command to be begun
COMMANDS = ("-m pytest -q tests/test_cuda.py", "bench.py decode", "bench.py train", "bench.py kernels --tokens 8192",
            "bench.py rollout --size small --rounds 3", "bench.py step --size small",
            "bench.py decode --model llama-3-8b")


def gpu_command(argv):
    """The sub-command `gpu`."""
    args = flags.parse(AllSettings, argv, "run the GPU's tests and all benchmarks, and write what they print")
    device, _ = run.device_and_dtype("auto", "auto")
    if device.type != "cuda":
        raise run.UserError("bench.py gpu is for a machine with an NVIDIA GPU; here run the other commands with "
                            "--device cpu")
    text = [f"# On a GPU\n\n{torch.cuda.get_device_name(device)}, torch {torch.__version__}. Written by "
            "`python bench.py gpu`.\n"]
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    root, left = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), args.seconds
    for command in COMMANDS:
        text.append(f"`python {command}`\n\n```\n")
        if left < LEAST:
            text[-1] += "left out: no time\n```\n"
        else:
            left -= timing.seconds(functools.partial(_run, command, root, left, text), device)
        files.write_atomically(args.out, lambda path: _write(path, "\n".join(text)))
    print(f"wrote {args.out}")


def _run(command, root, seconds, text):
    """Adds what a command prints to the last piece of the text, and prints it."""
    try:
        done = subprocess.run([sys.executable, *command.split()], cwd=root, capture_output=True, text=True,
                              timeout=seconds)
        said = done.stdout + (f"exit status {done.returncode}\n{done.stderr[-1500:]}" if done.returncode else "")
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode() + f"\nstopped after {seconds:.0f} s\n"
    print(f"$ python {command}\n{said}", flush=True)
    text[-1] += said.rstrip() + "\n```\n"


def _write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
