"""How fast, and at what memory: the hand-written parts that have rivals, checked and then timed against them.

    python bench.py kernels [--tokens 512] [--hidden 2048] [--vocab 128256]    log-probabilities (kernels.py)
    python bench.py rollout [--size tiny] [--rounds 3]                         sampling (rollout.py)
    python bench.py step [--size tiny] [--rounds 3]                            training (model.SharedPrefix)

Each command first checks the thing against something slow and plain, and stops with WRONG if it does not agree: a fast
wrong answer is worth nothing. `kernels` compares values and gradients with float64, `rollout` compares greedy decoding
with the forward pass without a cache, `step` compares log-probabilities and gradients with those of padded rows. Then
it times. The contestants take turns within each round, so that a slow
minute of a shared machine hits all of them, and the median round is printed.

Seconds depend on the machine; read the ratios. `kernels` prints every time as a multiple of the *floor* of the same
run: the bare matrix products that the gradients need at least, one forward and two backward. 1.0 means that all else
is free; the floor is measured like the rest, so a little below 1.0 occurs. So does `step`, whose floor is the bare
products of all linear layers with the tokens that there are, each once. `rollout` prints useful tokens a second, and
as a multiple of the better of transformers' two caches in the same run. Useful tokens are those before a row's end;
what a padded batch computes for rows that have ended does not count.

docs/speed.md has what was measured. `python bench.py COMMAND --help` lists the flags.
"""

import ctypes
import dataclasses
import math
import sys
import tempfile
import time

import torch

import flags
import kernels
import model
import rollout
import run
from flags import flag


def seconds(function, device):
    """Wall-clock seconds of one call, the device's work included."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(calls, rounds, device):
    """{name: function} -> {name: median seconds}. In every round each function is called once. Warm them up before."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return {name: sorted(taken)[rounds // 2] for name, taken in times.items()}


def peak_megabytes(function, device):
    """Peak memory of a call above what was held before it, in MB (2**20 bytes). On a CPU only Linux tells; else NaN."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

    try:
        ctypes.CDLL(None).malloc_trim(0)                 # freed blocks that the allocator kept would hide the peak
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")                              # resets the high-water mark VmHWM to the present size
        before = status("VmRSS")
    except (OSError, AttributeError):
        function()
        return math.nan
    function()
    return status("VmHWM") - before


# ---------------------------------------------------------------------------------------------------------------------
# python bench.py kernels


@dataclasses.dataclass
class KernelSettings:
    """Flags of `python bench.py kernels`."""
    tokens: int = flag(512, "T, tokens scored in one call", at_least=1)
    hidden: int = flag(2048, "H, hidden size (Llama-3.2-1B: 2048)", at_least=1)
    vocab: int = flag(128256, "V, vocabulary (Llama 3: 128256)", at_least=1)
    device: str = flag("auto", "cuda, mps or cpu")
    dtype: str = flag("auto", "float32 or bfloat16", ("auto", "float32", "bfloat16"))


def check_kernels(device):
    """Values and gradients against float64, at sizes that do not divide the tiles; hot logits as in a trained model.
    Prints a line for each function and dtype; ends the program with status 1 after a WRONG one."""
    generator = torch.Generator().manual_seed(0)
    T, H, V = kernels.CHUNK_T + 37, 64, 2 * kernels.CHUNK_V + 5
    draw = [torch.randn(T, H, generator=generator), torch.randn(V, H, generator=generator) * 0.5]
    target = torch.randint(V, (T,), generator=generator).to(device)
    target[0], target[1] = 0, V - 1
    coefficient = torch.randn(T, generator=generator).to(device)
    hidden64, weight64 = (x.to(device, torch.float64).requires_grad_() for x in draw)
    value64 = (hidden64 @ weight64.T).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    (value64 * coefficient).sum().backward()

    def linear_logprob(hidden, weight):
        value = kernels.linear_logprob(hidden, weight, target)
        (value * coefficient).sum().backward()
        return value

    def linear_policy_loss(hidden, weight):
        loss, value = kernels.linear_policy_loss(hidden, weight, target, coefficient)
        loss.backward()
        return value

    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for function in (linear_logprob, linear_policy_loss):
            hidden, weight = (x.to(device, dtype, copy=True).requires_grad_() for x in draw)
            value = function(hidden, weight)
            errors = [_relative_error(value, value64), _relative_error(hidden.grad, hidden64.grad),
                      _relative_error(weight.grad, weight64.grad)]
            ok = all(error < bound for error in errors)          # a NaN fails this comparison
            print(f"{'ok' if ok else 'WRONG'}  {function.__name__:18s} {str(dtype)[6:]:9s} relative error against "
                  f"float64: value {errors[0]:.1e}, d hidden {errors[1]:.1e}, d weight {errors[2]:.1e} "
                  f"(bound {bound:.0e})")
            if not ok:
                sys.exit(1)


def _relative_error(got, want):
    """|got - want| / |want|, in the 2-norm over the whole tensor."""
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm())


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
            function(hidden, weight, target).sum().backward()
        return call

    def forward_only(function):
        @torch.no_grad()
        def call():
            function(hidden, weight, target)
        return call

    @torch.no_grad()
    def one_product():
        hidden @ weight.T

    @torch.no_grad()
    def three_products():
        one_product()
        grad_logits @ weight
        grad_logits.T @ hidden

    def policy_loss(h, w, t):
        return kernels.linear_policy_loss(h, w, t, coef)[0]

    def torch_builtin(h, w, t):
        return -torch.nn.functional.linear_cross_entropy(h, w, t, reduction="none").float()

    peers = {"linear_logprob": kernels.linear_logprob, "reference": kernels.linear_logprob_reference}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):     # torch >= 2.13
        peers["torch linear_cross_entropy"] = torch_builtin
    print(f"\n{device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, T {T}, H {H}, V {V}; "
          f"d weight alone is {weight.numel() * weight.element_size() / 2**20:.0f} MB; median of 3 interleaved rounds")
    trained = peers | {"linear_policy_loss": policy_loss}        # which makes its gradients in the forward pass
    _print_table("forward + backward", three_products, {k: both_ways(f) for k, f in trained.items()}, clear, device)
    _print_table("forward only", one_product, {k: forward_only(f) for k, f in peers.items()}, clear, device)


def _print_table(title, floor, calls, clear, device, rounds=3):
    """Peak memory in a first call of each, which is its warm-up too; then its median time, over the floor's."""
    calls = {"bare matrix products": floor} | calls
    peaks = {}
    for name, call in calls.items():
        clear()                                                  # gradients that are held already would hide the peak
        peaks[name] = peak_megabytes(call, device)
    median = median_seconds(calls, rounds, device)
    print(f"{title + ':':28s} {'seconds':>8s} {'x floor':>8s} {'peak MB':>8s}")
    for name, taken in median.items():
        print(f"  {name:26s} {taken:8.2f} {taken / median['bare matrix products']:8.2f} {peaks[name]:8.0f}")


def kernels_command(argv):
    """The sub-command `kernels`."""
    args = flags.parse(KernelSettings, argv, "check linear_logprob against float64, then time it")
    device, dtype = run.device_and_dtype(args.device, args.dtype)
    check_kernels(device)
    time_kernels(args, dtype, device)


# ---------------------------------------------------------------------------------------------------------------------
# python bench.py rollout

SIZES = {  # layers, width, query heads, key heads, MLP width, vocabulary
    "tiny": (4, 192, 6, 6, 512, 512),
    "small": (12, 768, 12, 4, 2048, 32000),
}


@dataclasses.dataclass
class RolloutSettings:
    """Flags of `python bench.py rollout`."""
    size: str = flag("tiny", "random Llama: tiny = 4 layers, width 192; small = 12 layers, width 768, V 32,000",
                     tuple(SIZES))
    rounds: int = flag(3, "interleaved rounds; the median is printed", at_least=1)
    device: str = flag("auto", "cuda, mps or cpu")
    dtype: str = flag("auto", "float32 or bfloat16", ("auto", "float32", "bfloat16"))


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
        random_llama(args.size, directory)
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
    median = median_seconds(calls, args.rounds, device)
    useful = sum(map(sum, lengths))
    print(f"{args.size}, {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads: 16 prompts x 5 samples, "
          f"{useful} useful tokens ({useful / (80 * 256):.0%} of the padded batch); "
          f"median of {args.rounds} interleaved rounds")
    best = min(taken for name, taken in median.items() if name.startswith("transformers"))
    for name, taken in median.items():
        print(f"  {name:28s} {taken:7.2f} s {useful / taken:9.0f} useful tokens/s   "
              f"{best / taken:5.2f} x the better of transformers'")


# ---------------------------------------------------------------------------------------------------------------------
# python bench.py step

PROMPT, ANSWERS = 512, {"a long tail": (32, 64, 96, 128, 200, 384, 744, 1024), "equal": (1024,) * 8}        # tokens


@dataclasses.dataclass
class StepSettings(RolloutSettings):
    """Flags of `python bench.py step`."""


def padded_logprobs(net, prompts, responses):
    """What `model.response_logprobs` returns, as libraries compute it: each response a row of its own behind a copy of
    its prompt, padded on the right to the longest."""
    rows = [prompt + response for prompt, group in zip(prompts, responses) for response in group]
    begin = [len(prompt) for prompt, group in zip(prompts, responses) for _ in group]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=net.device)
    hidden = net(tokens)
    source = torch.cat([torch.arange(i * width + b - 1, i * width + len(row) - 1)
                        for i, (row, b) in enumerate(zip(rows, begin))]).to(net.device)
    row = torch.tensor([i for i, (each, b) in enumerate(zip(rows, begin)) for _ in each[b:]], device=net.device)
    logprob = kernels.linear_logprob(hidden.flatten(0, 1)[source], net.head.weight, tokens.flatten()[source + 1])
    return logprob, row, len(rows)


def in_one_rectangle(net, prompts, responses):
    """`model.response_logprobs` without stairs."""
    stair, model.STAIR = model.STAIR, 10**9
    try:
        return model.response_logprobs(net, prompts, responses)
    finally:
        model.STAIR = stair


def bare_products(net, tokens, scored):
    """A function that multiplies what a training step has to: forward and backward of each layer's four products with
    `tokens` rows, and of the head with `scored`."""
    linears = [linear for layer in net.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    shapes = [(each.weight.detach(), tokens) for each in linears] + [(net.head.weight.detach(), scored)]
    operands = [(weight, weight.new_ones(rows, weight.shape[1]), weight.new_ones(rows, weight.shape[0]))
                for weight, rows in shapes]

    def call():
        for weight, x, grad in operands:
            x @ weight.T, grad @ weight, grad.T @ x
    return call


def step_command(argv):
    """The sub-command `step`."""
    args = flags.parse(StepSettings, argv, "check and time a training step's forward and backward pass")
    device, dtype = run.device_and_dtype(args.device, args.dtype)
    with tempfile.TemporaryDirectory() as directory:
        random_llama(args.size, directory)
        net = model.Transformer.from_pretrained(directory, device, dtype)
    generator = torch.Generator().manual_seed(1)
    for name, lengths in ANSWERS.items():
        pieces = [torch.randint(net.config.vocab_size, (n,), generator=generator).tolist() for n in (PROMPT, *lengths)]
        prompts, responses = [pieces[0]], [pieces[1:]]

        def step(function):
            net.zero_grad()
            logprob, row, rows = function(net, prompts, responses)
            kernels.sum_rows(logprob, row, rows).square().mean().backward()
            return logprob

        found = {}
        for function in (padded_logprobs, model.response_logprobs):
            value = step(function).detach().double()
            found[function] = [value, *(p.grad.double() for p in net.parameters())]
        error = max(_relative_error(*pair) for pair in zip(found[model.response_logprobs], found[padded_logprobs]))
        bound = 1e-4 if dtype == torch.float32 else 0.1
        print(f"{'ok' if error < bound else 'WRONG'}  {name}: log-probabilities and gradients equal those of padded "
              f"rows (largest relative error {error:.0e}, bound {bound:.0e})")
        if not error < bound:
            sys.exit(1)
        found.clear()
        count = sum(lengths)
        print(f"\n{args.size}, {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads: a prompt of {PROMPT} "
              f"tokens, {len(lengths)} answers of {min(lengths)} to {max(lengths)}, {count} in all")
        _print_table("forward + backward", bare_products(net, PROMPT + count, count),
                     {"model.response_logprobs": lambda: step(model.response_logprobs),
                      "the same in one rectangle": lambda: step(in_one_rectangle),
                      "rows of prompt and answer": lambda: step(padded_logprobs)}, net.zero_grad, device, args.rounds)


# ---------------------------------------------------------------------------------------------------------------------

COMMANDS = {"kernels": kernels_command, "rollout": rollout_command, "step": step_command}


def main(argv):
    """Run the sub-command that argv names."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    else:
        raise run.UserError(f"{argv[0]} is no command of bench.py; give one of {', '.join(COMMANDS)}")


if __name__ == "__main__":
    run.main(main)
