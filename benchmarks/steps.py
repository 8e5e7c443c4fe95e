"""python bench.py packing, python bench.py step: a training step, ours beside what libraries do.

`packing` times forward and backward of the answers' log-probabilities alone: packed, with the prompt computed once
(model.SharedPrefix), beside rows of prompt and answer that are padded to the longest. `step` times a whole step of
lsp.py's GRPO or of SPPO beside TRL's trainer where TRL is installed: sampling, rewards, the reference's
log-probabilities, loss, optimizer and the figures that are logged. Both check log-probabilities and gradients first.
"""

import dataclasses
import functools
import itertools
import math
import sys
import tempfile

import torch

import challenger
import flags
import kernels
import model
import rollout
import run
from benchmarks import timing
from flags import flag


# ---------------------------------------------------------------------------------------------------------------------
# python bench.py packing

PROMPT, ANSWERS = 512, {"a long tail": (32, 64, 96, 128, 200, 384, 744, 1024), "equal": (1024,) * 8}        # tokens


@dataclasses.dataclass
class PackingSettings(timing.SizeSettings):
    """Flags of `python bench.py packing`."""


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


def bare_products(net, tokens, scored, forwards=0):
    """A function that multiplies what a training step has to: forward and backward of each layer's four products with
    `tokens` rows, and of the head with `scored`; and so many forward passes more."""
    linears = [linear for layer in net.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    shapes = [(each.weight.detach(), tokens) for each in linears] + [(net.head.weight.detach(), scored)]
    operands = [(weight, weight.new_ones(rows, weight.shape[1]), weight.new_ones(rows, weight.shape[0]))
                for weight, rows in shapes]

    def call():
        for weight, x, grad in operands:
            x @ weight.T, grad @ weight, grad.T @ x
            for _ in range(forwards):
                x @ weight.T
    return call


def packing_step(net, function, prompts, responses):
    """Forward and backward of a loss about the log-probabilities that `function` computes, which are returned."""
    net.zero_grad()
    logprob, row, rows = function(net, prompts, responses)
    kernels.sum_rows(logprob, row, rows).square().mean().backward()
    return logprob


def check_packing(name, net, prompts, responses):
    """Prints whether log-probabilities and gradients equal those of padded rows; ends the program if they do not."""
    found = []
    for function in (model.response_logprobs, padded_logprobs):
        value = packing_step(net, function, prompts, responses).detach().double()
        found.append([value, *(p.grad.double() for p in net.parameters())])
    error, bound = max(map(timing.relative_error, *found)), 1e-4 if net.dtype == torch.float32 else 0.1
    print(f"{'ok' if error < bound else 'WRONG'}  {name}: log-probabilities and gradients equal those of padded "
          f"rows (largest relative error {error:.0e}, bound {bound:.0e})")
    if not error < bound:
        sys.exit(1)
    net.zero_grad()


def packing_command(argv):
    """The sub-command `packing`."""
    args = flags.parse(PackingSettings, argv, "check and time a training step's forward and backward pass")
    device, dtype = run.device_and_dtype(args.device, args.dtype)
    net = timing.random_network(args, device, dtype)
    generator = torch.Generator().manual_seed(1)
    for name, lengths in ANSWERS.items():
        pieces = [torch.randint(net.config.vocab_size, (n,), generator=generator).tolist() for n in (PROMPT, *lengths)]
        batch, count = ([pieces[0]], [pieces[1:]]), sum(lengths)
        check_packing(name, net, *batch)
        print(f"\n{args.size}, {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads: a prompt of {PROMPT} "
              f"tokens, {len(lengths)} answers of {min(lengths)} to {max(lengths)}, {count} in all")
        contestants = {"model.response_logprobs": model.response_logprobs,
                       "the same in one rectangle": in_one_rectangle,
                       "rows of prompt and answer": padded_logprobs}
        timing.print_table("forward + backward", bare_products(net, PROMPT + count, count),
                     {name: functools.partial(packing_step, net, function, *batch)
                      for name, function in contestants.items()}, net.zero_grad, device, args.rounds)


# ---------------------------------------------------------------------------------------------------------------------
# python bench.py step


@dataclasses.dataclass
class StepSettings(timing.SizeSettings):
    """Flags of `python bench.py step`."""
    loss: str = flag("grpo", "grpo = lsp.py's step on data, sampling included; sppo = sppo.py's on pairs of answers",
                     ("grpo", "sppo"))
    lengths: str = flag("equal", "of the answers: all as long as the longest, or most of them much shorter",
                        ("equal", "tail"))


# loss and size -> prompts, answers to each, tokens of a prompt, tokens of the longest answer
BATCHES = {("grpo", "tiny"): (8, 8, 64, 64), ("grpo", "small"): (2, 8, 64, 64),
           ("sppo", "tiny"): (16, 2, 64, 192), ("sppo", "small"): (4, 2, 64, 192)}
END = 1         # the end token's id; the word of id i is "t<i>"


class Batch:
    """The work of one step: prompts as ids, how long each answer is, its end token included, and ids for answers."""

    def __init__(self, args, vocab):
        self.N, self.n, width, self.longest = BATCHES[args.loss, args.size]
        generator = torch.Generator().manual_seed(1)
        self.prompts = torch.randint(2, vocab, (self.N, width), generator=generator).tolist()
        self.lengths = torch.full((self.N, self.n), self.longest)
        if args.lengths == "tail":
            drawn = (torch.randn(self.N, self.n, generator=generator) + math.log(self.longest / 5)).exp()
            self.lengths = drawn.clamp(self.longest // 32, self.longest).long()
            self.lengths[0, 0] = self.longest
        self.lengths = self.lengths.tolist()
        self.answers = [[torch.randint(2, vocab, (length - 1,), generator=generator).tolist() + [END]
                         for length in group] for group in self.lengths]
        self.count = sum(map(sum, self.lengths))


def words(ids):
    """The text of these ids, without the end token."""
    return " ".join(f"t{i}" for i in ids if i != END)


def variety(text):
    """A reward: how many words a text has, each counted once."""
    return float(len(set(text.split())))


def our_grpo_step(net, ref, batch):
    """A function that makes one step of `lsp.py --mode grpo`: sample, judge, reference, train."""
    import lsp

    args = dataclasses.replace(lsp.Settings(), mode="grpo", queries=batch.N, answers=batch.n, micro_batch=batch.N,
                               beta=0.05, alpha_ch=0.0, reward_scale=1.0, kl="k3-token", normalise="token",
                               std_normalise=True, max_new_tokens=batch.longest)
    optimizer, alone, turn = kernels.Optimizer(net.parameters(), "adamw"), (0, 1), itertools.count()

    def step():
        said = rollout.generate(net, batch.prompts, batch.n, batch.lengths, seeds=run.stream("bench", next(turn)))
        game = lsp.Game([lsp.Play(challenger.Query(words(prompt)), [words(ids) for ids in group], prompt, group, logp)
                         for prompt, group, logp in zip(batch.prompts, said.tokens, said.logprobs)])
        R = torch.tensor([[variety(text) for text in group] for group in game.answers])
        A_sol, A_ch = lsp.advantages(R, None, args)
        ratio = lsp.reference_ratios(ref, game.prompts, game.answer_ids, game.token_logp, args, alone)
        lsp.gradient_step(net, optimizer, game, A_sol, A_ch, ratio, None, None, args, 1e-6, alone)
        lsp.step_metrics(game, R, None, A_sol, A_ch, ratio, None, args)
    return step


def our_sppo_step(net, ref, batch):
    """A function that makes one step of `sppo.py --loss sppo-hard`, the reference's log-probabilities included."""
    import sppo

    args = dataclasses.replace(sppo.Settings(), loss="sppo-hard", eta=1.0, micro_batch=batch.N)
    optimizer = kernels.Optimizer(net.parameters(), "adamw")
    examples = [{"prompt": prompt, "responses": pair, "p": [1.0, 0.0]}
                for prompt, pair in zip(batch.prompts, batch.answers)]

    def step():
        with torch.no_grad():
            refs = sppo.sequence_logprobs(ref, examples).tolist()
        for example, each in zip(examples, refs):
            example["ref"] = each
        sppo.gradient_step(net, optimizer, examples, args, 1e-6, (0, 1))
    return step


def trl_trainer(args, directory, batch, dtype, device):
    """TRL's trainer of the same model on the same batch, once a step, or None where TRL is not installed."""
    try:
        import datasets
        import trl
    except ImportError:
        print("TRL is not installed: `pip install trl` puts its trainer beside")
        return None
    import tokenizers
    import transformers

    datasets.disable_progress_bars()
    vocabulary = {f"t{i}": i for i in range(timing.SIZES[args.size][-1])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="t0", eos_token=f"t{END}")
    hf = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device)
    hf.generation_config.pad_token_id, hf.generation_config.eos_token_id = 0, END
    common = dict(output_dir=directory, report_to="none", use_cpu=device.type == "cpu", max_steps=args.rounds + 1,
                  bf16=dtype == torch.bfloat16, gradient_checkpointing=False, learning_rate=1e-6, logging_steps=1,
                  save_strategy="no", disable_tqdm=True, beta=0.05)
    if args.loss == "grpo":
        hf.generate = ended_at(hf.generate, batch.lengths)
        settings = trl.GRPOConfig(**common, num_generations=batch.n, per_device_train_batch_size=batch.N * batch.n,
                                  max_completion_length=batch.longest, shuffle_dataset=False)
        rows = {"prompt": [words(prompt) for prompt in batch.prompts]}
        return trl.GRPOTrainer(hf, args=settings, processing_class=tokenizer,
                               train_dataset=datasets.Dataset.from_dict(rows),
                               reward_funcs=lambda completions, **_: [variety(text) for text in completions])
    settings = trl.DPOConfig(**common, loss_type=["sppo_hard"], per_device_train_batch_size=batch.N)
    rows = {"prompt": [words(prompt) for prompt in batch.prompts],
            "chosen": [" " + words(pair[0]) for pair in batch.answers],
            "rejected": [" " + words(pair[1]) for pair in batch.answers]}
    return trl.DPOTrainer(hf, args=settings, processing_class=tokenizer, train_dataset=datasets.Dataset.from_dict(rows))


def ended_at(generate, lengths):
    """transformers' `generate` with the end token where the batch has it: row by row at these lengths, never before."""
    import transformers

    limits = torch.tensor(lengths).flatten()

    class EndAt(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            self.begin = getattr(self, "begin", ids.shape[1])
            last = (ids.shape[1] - self.begin + 1 >= limits).to(scores.device)
            end = scores[:, END].clone()
            scores = scores.masked_fill(last[:, None], -math.inf)
            scores[:, END] = torch.where(last, end, -math.inf)
            return scores

    return lambda *given, **options: generate(*given, logits_processor=[EndAt()], **options)


def in_turns(calls, trainer, rounds, device):
    """{name: (median seconds, peak MB)} of `calls` and of TRL's trainer. Its own loop sets the pace: after each of its
    steps all others make one. The first round is the warm-up, in which the memory is measured."""
    times, peaks = {name: [] for name in ("TRL", *calls)}, {}
    if trainer is None:
        del times["TRL"]

    def others():
        for name, call in calls.items():
            if name in peaks:
                times[name].append(timing.seconds(call, device))
            else:
                peaks[name] = timing.peak_megabytes(call, device)

    if trainer is None:
        for _ in range(rounds + 1):
            others()
    else:
        import transformers

        class Turns(transformers.TrainerCallback):
            def on_step_begin(self, *given, **options):
                self.peak = None if peaks else timing.Peak(device)
                self.begin = timing.now(device)

            def on_step_end(self, *given, **options):
                if self.peak:
                    peaks["TRL"] = self.peak.megabytes()
                else:
                    times["TRL"].append(timing.now(device) - self.begin)
                others()

        trainer.add_callback(Turns())
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return {name: (sorted(taken)[rounds // 2], peaks[name]) for name, taken in times.items()}


def step_command(argv):
    """The sub-command `step`."""
    args = flags.parse(StepSettings, argv, "check a whole training step, then time it against TRL's trainer")
    device, dtype = run.device_and_dtype(args.device, args.dtype)
    with tempfile.TemporaryDirectory() as directory:
        timing.random_llama(args.size, directory)
        net, ref = (model.Transformer.from_pretrained(directory, device, dtype) for _ in range(2))
        batch = Batch(args, net.config.vocab_size)
        check_packing(f"{args.loss}, {args.lengths}", net, batch.prompts, batch.answers)
        trainer = trl_trainer(args, directory, batch, dtype, device)
        step, passes = {"grpo": (our_grpo_step, 2), "sppo": (our_sppo_step, 1)}[args.loss]     # without gradient
        tokens = sum(map(len, batch.prompts)) + batch.count
        calls = {"bare matrix products": bare_products(net, tokens, batch.count, passes),
                 "this project": step(net, ref, batch)}
        found = in_turns(calls, trainer, args.rounds, device)
    floor = found["bare matrix products"][0]
    print(f"{args.size}, {args.loss}, {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads: {batch.N} prompts "
          f"x {batch.n} answers of at most {batch.longest} tokens, {batch.count} in all; median of {args.rounds} "
          f"interleaved rounds\n{'one step:':28s} {'seconds':>8s} {'x floor':>8s} {'TRL / it':>8s} {'peak MB':>8s}")
    for name, (taken, peak) in found.items():
        ratio = f"{found['TRL'][0] / taken:8.2f}" if "TRL" in found else " " * 8
        print(f"  {name:26s} {taken:8.2f} {taken / floor:8.2f} {ratio} {peak:8.0f}")
