"""How fast, and at what memory: the hand-written parts that have rivals, checked and then timed against them.

    python bench.py kernels [--tokens 512] [--hidden 2048] [--vocab 128256]    log-probabilities (kernels.py)
    python bench.py rollout [--size tiny] [--rounds 3]                         sampling (rollout.py)
    python bench.py packing [--size tiny] [--rounds 3]                         training passes (model.SharedPrefix)
    python bench.py step [--loss grpo] [--lengths tail]                        a whole step, beside TRL's trainer
    python bench.py growth                                                     how cost grows, as a picture
    python bench.py decode [--model llama-3.2-3b]                              decoding, against memory's bandwidth
    python bench.py train [--model llama-3.2-3b]                               training, against the rate of a product
    python bench.py gpu                                                        all of it on a GPU, with its tests

All but the last four first check the thing against something slow and plain, and stop with WRONG if it does not agree:
a fast wrong answer is worth nothing. `kernels` compares values and gradients with float64, `rollout` compares greedy
decoding with the forward pass without a cache, `packing` and `step` compare log-probabilities and gradients with those
of padded rows. Then they time. The contestants take turns within each round, so that a slow minute of a shared machine
hits all of them, and the median round is printed.

Seconds depend on the machine; read the ratios. A *peer* is what a library offers for the same work. The *floor* is the
bare matrix products that the work needs at least, in the same run: 1.0 x floor means that all else is free. It is
measured like the rest, so a little below 1.0 occurs. `rollout` prints useful tokens a second, and as a multiple of the
better of transformers' two caches. Useful tokens are those before a row's end; what a padded batch computes for rows
that have ended does not count. On CUDA `kernels` climbs a ladder, as llm.c does: the reference, tiles in plain torch,
the same through torch.compile, and in Triton.

docs/speed.md has what was measured. `python bench.py COMMAND --help` lists the flags.
"""

import dataclasses
import functools
import sys
import tempfile
import types

import torch

import flags
import kernels
import model
import rollout
import run
from benchmarks import gpu, growth, steps, timing
from flags import flag


# ---------------------------------------------------------------------------------------------------------------------
# python bench.py kernels


@dataclasses.dataclass
class KernelSettings:
    """Flags of `python bench.py kernels`."""
    tokens: int = flag(512, "T, tokens scored in one call", at_least=1)
    hidden: int = flag(2048, "H, hidden size (Llama-3.2-1B: 2048)", at_least=1)
    vocab: int = flag(128256, "V, vocabulary (Llama 3: 128256)", at_least=1)
    device: str = flag("auto", "cuda, mps or cpu")
    dtype: str = flag("auto", "float32 or bfloat16; on a CPU, auto is both where it multiplies bfloat16 natively",
                      ("auto", "float32", "bfloat16"))


def scored(function, *options):
    """A function that returns log-probabilities, as one (hidden, weight, target, coef) -> (loss, log-probabilities)."""
    def call(hidden, weight, target, coef):
        logprob = function(hidden, weight, target, *options)
        return (logprob * coef).sum(), logprob
    return call


def policy_loss(hidden, weight, target, coef, tile):
    """The same of `linear_policy_loss`."""
    return kernels.linear_policy_loss(hidden, weight, target, coef, None, tile)


def ladder(device):
    """Who works on a tile of logits: {what is added to a function's name: its argument `tile`}. A CPU has one rung, and
    CUDA three, of which two need Triton."""
    if device.type != "cuda":
        return {"": kernels.PLAIN}
    rungs, own = {" plain": kernels.PLAIN}, kernels.tile_functions(device)
    if own is not kernels.PLAIN:
        # dynamic: the last tile's size is another, and would have it compiled once more
        compiled = {name: torch.compile(function, dynamic=True) for name, function in vars(kernels.PLAIN).items()}
        rungs |= {" compiled": types.SimpleNamespace(**compiled), " Triton": own}
    return rungs


def log_probabilities(device):
    """What is checked and timed: {name: function (hidden, weight, target, coef) -> (loss, log-probabilities)}. On CUDA
    the ladder's foot too, the reference."""
    foot = {"reference": scored(kernels.linear_logprob_reference)} if device.type == "cuda" else {}
    rungs = ladder(device).items()
    return (foot | {f"linear_logprob{rung}": scored(kernels.linear_logprob, None, tile) for rung, tile in rungs}
            | {f"linear_policy_loss{rung}": functools.partial(policy_loss, tile=tile) for rung, tile in rungs})


def check_kernels(device):
    """Values and gradients against float64, at sizes that do not divide the tiles; hot logits as in a trained model.
    Prints a line for each function and dtype; ends the program with status 1 after a WRONG one."""
    generator = torch.Generator().manual_seed(0)
    chunk_t, chunk_v, _ = kernels.tile_sizes(device, vocab=1)
    T, H, V = chunk_t + 37, 64, 2 * chunk_v + 5
    draw = [torch.randn(T, H, generator=generator), torch.randn(V, H, generator=generator) * 0.5]
    target = torch.randint(V, (T,), generator=generator).to(device)
    target[0], target[1] = 0, V - 1
    coefficient = torch.randn(T, generator=generator).to(device)
    hidden64, weight64 = (x.to(device, torch.float64).requires_grad_() for x in draw)
    value64 = (hidden64 @ weight64.T).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    (value64 * coefficient).sum().backward()
    functions = log_probabilities(device)
    width = max(map(len, functions))
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for name, function in functions.items():
            hidden, weight = (x.to(device, dtype, copy=True).requires_grad_() for x in draw)
            loss, value = function(hidden, weight, target, coefficient)
            loss.backward()
            errors = [timing.relative_error(value, value64), timing.relative_error(hidden.grad, hidden64.grad),
                      timing.relative_error(weight.grad, weight64.grad)]
            ok = all(error < bound for error in errors)          # a NaN fails this comparison
            print(f"{'ok' if ok else 'WRONG'}  {name:{width}s} {str(dtype)[6:]:9s} relative error against float64: "
                  f"value {errors[0]:.1e}, d hidden {errors[1]:.1e}, d weight {errors[2]:.1e} (bound {bound:.0e})")
            if not ok:
                sys.exit(1)


def time_kernels(args, dtype, device):
    """Print seconds and peak memory, first of forward and backward together, then of the forward alone."""
    T, H, V = args.tokens, args.hidden, args.vocab
    torch.manual_seed(0)
    hidden = torch.randn(T, H, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, device=device) * H**-0.5).to(dtype).requires_grad_()
    target = torch.randint(V, (T,), device=device)
    grad_logits, coef = torch.randn(T, V, device=device).to(dtype), torch.randn(T, device=device)

    def clear():
        hidden.grad = weight.grad = None

    def both_ways(function):
        def call():
            clear()
            function(hidden, weight, target, coef)[0].backward()
        return call

    def forward_only(function):
        @torch.no_grad()
        def call():
            function(hidden, weight, target, coef)
        return call

    @torch.no_grad()
    def one_product():
        hidden @ weight.T

    @torch.no_grad()
    def three_products():
        one_product()
        grad_logits @ weight
        grad_logits.T @ hidden

    def torch_builtin(h, w, t):
        return -torch.nn.functional.linear_cross_entropy(h, w, t, reduction="none").float()

    ours = log_probabilities(device)
    policy = {name: ours.pop(name) for name in list(ours) if name.startswith("linear_policy_loss")}
    peers = ours | {"reference": scored(kernels.linear_logprob_reference)}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):     # torch >= 2.13
        peers["torch linear_cross_entropy"] = scored(torch_builtin)
    print(f"\n{device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, T {T}, H {H}, V {V}; "
          f"d weight alone is {weight.numel() * weight.element_size() / 2**20:.0f} MB; median of 3 interleaved rounds")
    trained = peers | policy                                     # which makes its gradients in the forward pass
    timing.print_table("forward + backward", three_products, {k: both_ways(f) for k, f in trained.items()}, clear,
                       device)
    timing.print_table("forward only", one_product, {k: forward_only(f) for k, f in peers.items()}, clear, device)


def kernels_command(argv):
    """The sub-command `kernels`."""
    args = flags.parse(KernelSettings, argv, "check linear_logprob against float64, then time it")
    device, dtype = run.device_and_dtype(args.device, args.dtype)
    check_kernels(device)
    both = args.dtype == "auto" and device.type == "cpu" and timing.multiplies_bfloat16()
    for each in (torch.float32, torch.bfloat16) if both else (dtype,):
        time_kernels(args, each, device)


# ---------------------------------------------------------------------------------------------------------------------
# python bench.py rollout


@dataclasses.dataclass
class RolloutSettings(timing.SizeSettings):
    """Flags of `python bench.py rollout`."""


def workload(vocab):
    """16 ragged prompts of 64-128 tokens x 5 samples, whose lengths of 8-256 have a long tail (log-normal): most rows
    end early. Returns (prompts, lengths [16][5])."""
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for _ in range(16):
        length = int(torch.randint(64, 129, (1,), generator=generator))
        prompts.append(torch.randint(1, vocab, (length,), generator=generator).tolist())
    lengths = (torch.randn(16, 5, generator=generator) + 3.9).exp().clamp(8, 256).long()
    lengths[0, 0] = 256
    return prompts, lengths.tolist()


@torch.inference_mode()
def greedy_is_right(net, prompts, steps=24):
    """Is cached, batched, compacted greedy decoding the argmax of the plain uncached forward, token for token?"""
    limits = [[steps - b] for b in range(len(prompts))]          # rows end at different times: compaction is at work
    got = rollout.generate(net, prompts, 1, limits, temperature=0, max_rows=6)
    for prompt, [tokens], [limit] in zip(prompts, got.tokens, limits):
        row = torch.tensor([prompt], device=net.device)
        for token in tokens:
            if int(net.logits(net(row)[:, -1]).argmax()) != token:
                return False
            row = torch.cat([row, row.new_tensor([[token]])], 1)
        if len(tokens) != limit:
            return False
    return True


def transformers_generate(hf, prompts, lengths, cache):
    """transformers' batched sampling of the same workload: left-padded, each row told to stop at its length."""
    import transformers

    class StopAt(transformers.StoppingCriteria):
        def __init__(self, width, limits):
            self.width, self.limits = width, limits

        def __call__(self, ids, scores, **kwargs):
            return ids.shape[1] - self.width >= self.limits

    n, width = len(lengths[0]), max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt):] = torch.tensor(prompt)
        mask[b, width - len(prompt):] = 1
    limits = torch.tensor(lengths).flatten().to(hf.device)
    options = {} if cache == "dynamic" else {"cache_implementation": cache}
    hf.generate(ids.to(hf.device), attention_mask=mask.to(hf.device), do_sample=True, top_k=0, num_return_sequences=n,
                max_new_tokens=max(map(max, lengths)), stopping_criteria=[StopAt(width, limits)], **options)


def rollout_command(argv):
    """The sub-command `rollout`."""
    args = flags.parse(RolloutSettings, argv, "check rollout.generate, then time it against transformers' generate")
    device, dtype = run.device_and_dtype(args.device, args.dtype)
    import transformers

    with tempfile.TemporaryDirectory() as directory:
        timing.random_llama(args.size, directory)
        exact = model.Transformer.from_pretrained(directory, device)
        net = exact if dtype == torch.float32 else model.Transformer.from_pretrained(directory, device, dtype)
        hf = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    prompts, lengths = workload(net.config.vocab_size)
    ok = greedy_is_right(exact, prompts[:8])
    print(f"{'ok' if ok else 'WRONG'}  greedy decoding equals the plain forward token for token (8 prompts, float32)")
    if not ok:
        sys.exit(1)
    calls = {"rollout.generate": lambda: rollout.generate(net, prompts, 5, lengths, seeds=0),
             "transformers, dynamic cache": lambda: transformers_generate(hf, prompts, lengths, "dynamic"),
             "transformers, static cache": lambda: transformers_generate(hf, prompts, lengths, "static")}
    for call in calls.values():
        call()                                                   # warm-up
    median = timing.median_seconds(calls, args.rounds, device)
    useful = sum(map(sum, lengths))
    print(f"{args.size}, {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads: 16 prompts x 5 samples, "
          f"{useful} useful tokens ({useful / (80 * 256):.0%} of the padded batch); "
          f"median of {args.rounds} interleaved rounds")
    best = min(taken for name, taken in median.items() if name.startswith("transformers"))
    for name, taken in median.items():
        print(f"  {name:28s} {taken:7.2f} s {useful / taken:9.0f} useful tokens/s   "
              f"{best / taken:5.2f} x the better of transformers'")


# ---------------------------------------------------------------------------------------------------------------------

COMMANDS = {"kernels": kernels_command, "rollout": rollout_command, "packing": steps.packing_command,
            "step": steps.step_command, "growth": growth.main, "decode": gpu.decode_command,
            "train": gpu.train_command, "gpu": gpu.gpu_command}


def main(argv):
    """Run the sub-command that argv names."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] in COMMANDS:
        timing.say_if_busy()
        COMMANDS[argv[0]](argv[1:])
    else:
        raise run.UserError(f"{argv[0]} is no command of bench.py; give one of {', '.join(COMMANDS)}")


if __name__ == "__main__":
    run.main(main)
