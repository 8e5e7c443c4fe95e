"""python bench.py growth: how the cost of sampling, training and log-probabilities grows, as a picture.

Four panels, each against one size that a user chooses: the rows sampled at once, their length, the answers to a prompt,
and the vocabulary. Where there is a plain way of doing the same, it is drawn beside. A random Llama of bench.py's
--size; the vocabulary's panel has a head of width 768 alone.
"""

import dataclasses
import functools
import os

import torch

import flags
import kernels
import model
import plots
import run
from benchmarks import steps, timing
from flags import flag


@dataclasses.dataclass
class GrowthSettings(timing.SizeSettings):
    """Flags of `python bench.py growth`."""
    picture: str = flag("bench/growth.png", "where the picture goes")


ROWS, LENGTHS = (1, 4, 16, 64, 256), (64, 256, 1024, 2048)
ANSWERS, VOCABULARIES = (1, 2, 4, 8, 16), (1000, 8000, 32000, 128000)


@torch.inference_mode()
def decoding(net, rows, length):
    """A function that computes one new token for each of so many rows, whose caches hold `length` tokens."""
    cache = model.kv_cache(net, rows, length + 1)
    cache.live = rows
    tokens = torch.ones(rows, dtype=torch.long, device=net.device)

    @torch.inference_mode()
    def call():
        cache.lengths.fill_(length)
        cache.step(length + 1)
        net.logits(net(tokens, cache))
    return call


def training(net, function, n):
    """A function: forward and backward of n answers of 64 tokens to a prompt of 512."""
    ids = torch.randint(net.config.vocab_size, (512 + 64 * n,), generator=torch.Generator().manual_seed(1)).tolist()
    return functools.partial(steps.packing_step, net, function, [ids[:512]],
                             [[ids[512 + 64 * i:576 + 64 * i] for i in range(n)]])


def scoring(function, V, device, dtype):
    """A function: forward and backward of 512 tokens' log-probabilities under a head of V rows and width 768."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(512, 768, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(V, 768, generator=generator) * 768**-0.5).to(device, dtype).requires_grad_()
    target = torch.randint(V, (512,), generator=generator).to(device)

    def call():
        hidden.grad = weight.grad = None
        function(hidden, weight, target).sum().backward()
    return call


def measure(net, rounds):
    """[(title, label of x, label of y, {name: [(x, y)]})], a panel each: milliseconds, or MB."""
    def milliseconds(make, sizes):
        """{name: [(size, ms)]} for make {name: size -> call}; all calls take turns."""
        calls = {(name, size): function(size) for size in sizes for name, function in make.items()}
        for call in calls.values():
            call()
        found = timing.median_seconds(calls, rounds, net.device)
        return {name: [(size, 1e3 * found[name, size]) for size in sizes] for name in make}

    ours, padded, head = "this project", "padded rows", (net.device, net.dtype)
    return [
        ("a decoding step, 256 tokens in cache", "rows", "ms",
         milliseconds({ours: lambda R: decoding(net, R, 256)}, ROWS)),
        ("a decoding step of 16 rows", "tokens in cache", "ms",
         milliseconds({ours: lambda L: decoding(net, 16, L - 1)}, LENGTHS)),
        ("training, a prompt of 512 tokens", "answers of 64 tokens", "ms",
         milliseconds({ours: lambda n: training(net, model.response_logprobs, n),
                       padded: lambda n: training(net, steps.padded_logprobs, n)}, ANSWERS)),
        ("512 log-probabilities, beside the gradient", "vocabulary", "MB",
         {name: [(V, timing.peak_megabytes(scoring(function, V, *head), net.device)
                  - (V + 512) * 768 * net.dtype.itemsize / 2**20) for V in VOCABULARIES]
          for name, function in ((ours, kernels.linear_logprob), ("all logits", kernels.linear_logprob_reference))})]


def main(argv):
    """The sub-command `growth`."""
    args = flags.parse(GrowthSettings, argv, "time this project at growing sizes and draw a picture")
    device, dtype = run.device_and_dtype(args.device, args.dtype)
    net = timing.random_network(args, device, dtype)
    panels = measure(net, args.rounds)
    for title, x_label, unit, lines in panels:
        print(f"{title} ({unit}):")
        for name, points in lines.items():
            print(f"  {name:14s} " + ", ".join(f"{x:,} {x_label}: {y:.1f}" for x, y in points))
    os.makedirs(os.path.dirname(os.path.abspath(args.picture)), exist_ok=True)
    plots.plot_growth(panels, args.picture)
    print(f"wrote {args.picture}")
