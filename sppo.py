"""SPPO: Self-Play Preference Optimization (Wu et al., arXiv 2405.00675). `python sppo.py`

The game: two language models answer the same prompt x, and a judge says how likely the one answer y beats the other,
P(y > y' | x). No scores are assumed, so a beats b beats c beats a is allowed. What one wants is the policy that nobody
beats more than half the time, the Nash equilibrium, and multiplicative weights finds it by self-play:

    pi_{t+1}(y|x)  ~  pi_t(y|x) exp( eta P(y > pi_t | x) )                                                         (4.1)

Taking logarithms turns the update into a regression that a language model can do. For each iteration t:

    sample   K answers y_1..y_K ~ pi_t(.|x) for each prompt of this iteration's part
    judge    all pairs;  Phat(y_i > pi_t | x) = (1/K) sum_k P(y_i > y_k | x), itself included (1/2)
    loss     ( log pi(y|x) / pi_t(y|x)  -  eta (Phat(y > pi_t | x) - 1/2) )^2  on the best and the worst answer    (4.7)
    step     pi_t is both the starting point and the reference; the result is pi_{t+1}

Deviations from the paper, each with its reason:
  - the embedded world's eta, learning rate, optimizer and epochs are its own (WORLD below, picked on validation
    prompts): eta = 1e3 with lr 5e-7 suits 7B models, not 300k parameters
  - a checkpoint is chosen after each epoch by win rate on validation prompts, as in section 5.1, but against the base,
    with the run's own judge; the test prompts play no part in any choice. With one epoch, the default for real
    prompts, there is one candidate and the figure only reports
  - best and worst are by Phat, the quantity the loss is about, also where PairRM's aggregate score would differ
  - prompts whose K answers all tie stay in (p = 1/2: hold still), so that a part's size does not depend on the judge
  - the learning-rate schedule spans an iteration's own epochs; the paper schedules 18 and keeps the first one's result
  - optimizer state starts afresh in each iteration, and pi_{t+1} is what its checkpoint holds: in bfloat16 the float32
    masters end with the iteration, as in the official code, whose iterations are separate runs
  - not in the paper: gradients clipped at norm 1 (--clip), AdamW betas (.9, .98)
Deviations from the official code: sampling T = 1 and top_p = 1 as in the paper (the code has .7 and .9); --estimator
pairwise keeps the judge's cycles (the code's is `aggregate`); answers up to 1,024 tokens (the code: prompt and answer
together); sampled ids are never decoded and re-encoded, so no template is cut apart, no BOS doubled, and an answer cut
at the length limit gets no end token that the model did not write; test and validation prompts never come from the
training prompts; over-long prompts are refused, not truncated.

    python sppo.py                                  # the embedded world, minutes on a CPU
    python sppo.py --model mistralai/Mistral-7B-Instruct-v0.2 \
                   --judge pairrm:llm-blender/PairRM --prompts ultrafeedback.jsonl
    torchrun --nproc_per_node=8 sppo.py ...         # the same, prompts shared out
"""

import dataclasses
import json
import math
import os

import torch
import torch.distributed as dist

import eval
import kernels
import model
import prefmodel
import rollout
import run
import world
from run import flag

# What a setting is when its flag is not given.
# WORLD was picked on the world's validation prompts (8 trials); PAPER is section 5.1, and where that is silent the
# official code: RMSProp, 512 tokens for a prompt and 1,024 for both together (here: 1,024 for the answer).
WORLD = dict(prompts_per_iteration=4096, eta=20.0, lr=5e-4, optimizer="adamw", epochs=6,
             max_new_tokens=24, max_prompt_tokens=0, micro_batch=64, max_rows=512,
             validation_prompts=512, test_prompts=2000, print_every=64)
PAPER = dict(prompts_per_iteration=20000, eta=1e3, lr=5e-7, optimizer="rmsprop", epochs=1,
             max_new_tokens=1024, max_prompt_tokens=512, micro_batch=1, max_rows=128,
             validation_prompts=256, test_prompts=256, print_every=1)


@dataclasses.dataclass
class Settings:
    """Flags of `python sppo.py`."""
    model: str = flag("",
        "pi_1: a checkpoint directory or hub id (llama, mistral, qwen2, qwen3); without it the embedded world's base")
    judge: str = flag("", "P(y > y' | x): oracle (the embedded world's default) or pairrm:DIR_OR_HUB_ID")
    estimator: str = flag("pairwise",
        "PairRM's logits to P: pairwise = sigmoid((M_ij - M_ji)/2); "
        "aggregate = the official code's, which loses cycles", ("pairwise", "aggregate"))
    prompts: str = flag("",
        "prompts file: .jsonl/.json with prompt, instruction (+ input) or messages; .txt with one a line")
    iterations: int = flag(3, "T, rounds of self-play, each on its own part of the prompts (section 5.1: 3)")
    prompts_per_iteration: int | None = flag(None, "prompts sampled in each iteration [world 4096, else 20000]")
    k: int = flag(5, "K, answers sampled per prompt (section 5.1: 5)")
    eta: float | None = flag(None,
        "eta, step size of multiplicative weights in (4.1); targets are eta (Phat - 1/2) [world 20, else 1e3]")
    lr: float | None = flag(None, "peak learning rate (section 5.1: 5e-7) [world 5e-4, else 5e-7]")
    optimizer: str | None = flag(None,
        "adamw or rmsprop [world adamw, else rmsprop as the official code]", ("adamw", "rmsprop"))
    epochs: int | None = flag(None,
        "passes over an iteration's pairs; the best on validation prompts is kept [world 6, else 1]")
    warmup: float = flag(0.1, "share of the steps over which the learning rate rises, to fall after (section 5.1: 0.1)")
    weight_decay: float = flag(0.0, "of AdamW or RMSProp (not in the paper)")
    clip: float = flag(1.0, "largest gradient norm; 0 = no clipping (not in the paper)")
    batch_size: int = flag(64, "prompts per optimizer step, over all ranks (section 5.1: 64); two answers each")
    micro_batch: int | None = flag(None,
        "prompts per forward and backward pass and rank; less saves memory, the gradient is the same "
        "[world 64, else 1]")
    temperature: float = flag(1.0, "of sampling (section 5.1: 1)")
    top_p: float = flag(1.0, "nucleus of sampling, in (0, 1] (section 5.1: 1)")
    top_k: int = flag(0, "sample among the k likeliest tokens; 0 = all")
    max_new_tokens: int | None = flag(None,
        "longest answer in tokens; longer ones are cut, kept and counted [world 24, else 1024]")
    max_prompt_tokens: int | None = flag(None,
        "longest prompt in tokens, template included; 0 = whatever the context allows [world 0, else 512]")
    max_rows: int | None = flag(None, "answers in flight while sampling; bounds the KV cache [world 512, else 128]")
    validation_prompts: int | None = flag(None, "held-out prompts that choose the checkpoint [world 512, else 256]")
    test_prompts: int | None = flag(None,
        "held-out prompts of the final table; nothing is chosen on them [world 2000, else 256]")
    print_every: int | None = flag(None,
        "optimizer steps between printed lines; metrics.jsonl has every step [world 64, else 1]")
    save_every: int = flag(0,
        "optimizer steps between saved states, besides those at every epoch's end; 0 = only those")
    seed: int = flag(0, "fixes everything that is drawn, but not the embedded world and its base")
    device: str = flag("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = flag("auto",
        "float32 or bfloat16; auto: bfloat16 where native (the optimizer keeps float32 weights)",
        ("auto", "float32", "bfloat16"))
    out: str = flag("out/sppo", "the run's directory")
    resume: bool = flag(False, "continue the run in --out from its last saved state")
    overwrite: bool = flag(False, "replace the run in --out")


def settle(s):
    """Fill in what was not given, and refuse what makes no sense. Returns the completed Settings."""
    defaults = PAPER if s.prompts else WORLD
    s = dataclasses.replace(s, **{k: v for k, v in defaults.items() if getattr(s, k) is None},
                            judge=s.judge or ("" if s.prompts else "oracle"))
    positive = ("iterations", "prompts_per_iteration", "epochs", "batch_size", "micro_batch", "max_new_tokens",
                "max_rows", "validation_prompts", "test_prompts", "print_every", "lr")
    for name in positive:
        if not getattr(s, name) > 0:
            raise run.UserError(f"--{name.replace('_', '-')} {getattr(s, name)} must be above 0")
    if s.k < 2:
        raise run.UserError(f"--k {s.k} leaves nothing to compare; give at least 2 answers per prompt")
    if not (s.eta > 0 and math.isfinite(s.eta)):
        raise run.UserError(f"--eta {s.eta} must be a positive number; it multiplies preferences into targets")
    if not math.isfinite(s.lr):
        raise run.UserError(f"--lr {s.lr} must be a finite number")
    if not 0 <= s.warmup <= 1:
        raise run.UserError(f"--warmup {s.warmup} is a share of the steps; give a number from 0 to 1")
    for name in ("top_k", "clip", "weight_decay", "max_prompt_tokens", "save_every"):
        if not getattr(s, name) >= 0:
            raise run.UserError(f"--{name.replace('_', '-')} {getattr(s, name)} must not be negative")
    eval.check_sampling(s.temperature, s.top_p)
    if s.temperature == 0:
        raise run.UserError("--temperature 0 would draw the same answer K times; give a temperature above 0")
    if s.prompts and (s.judge or "oracle") == "oracle":
        raise run.UserError("--prompts needs a judge that can read: give --judge pairrm:DIR_OR_HUB_ID "
                            "(the oracle knows only the embedded world)")
    if s.judge == "oracle" and s.estimator != "pairwise":
        raise run.UserError("--estimator aggregate is for judges of pairs; the oracle has rewards, leave the flag out")
    if s.prompts and not s.model:
        raise run.UserError("--prompts needs --model: the embedded world's base does not read natural language")
    return s


def split_prompts(s):
    """(validation, test, [part 1, ..., part T]): disjoint lists of prompts.

    The held-out prompts do not depend on the seed, so that runs with different seeds are compared on the same ones.
    """
    need = s.iterations * s.prompts_per_iteration
    if not s.prompts:
        if need > 10**6:
            raise run.UserError(f"--iterations {s.iterations} of --prompts-per-iteration {s.prompts_per_iteration}: "
                                "the embedded world has a million queries to train on; lower one")
        # queries() never repeats itself, so short ones run out and later ones are harder: shuffled, the parts are alike
        train = run.shuffled(world.queries("train", need, s.seed), s.seed, "training prompts")
        validation, test = world.queries("validation", s.validation_prompts), world.queries("test", s.test_prompts)
    else:
        prompts = run.shuffled(eval.read_prompts(s.prompts), "held-out prompts")
        held = s.validation_prompts + s.test_prompts
        if len(prompts) < held + need:
            raise run.UserError(f"--prompts {s.prompts} has {len(prompts)} distinct prompts; "
                                f"{s.iterations} iterations of --prompts-per-iteration {s.prompts_per_iteration}, "
                                f"--validation-prompts {s.validation_prompts} and --test-prompts {s.test_prompts} "
                                f"need {held + need}: lower one")
        validation, test = prompts[:s.validation_prompts], prompts[s.validation_prompts:held]
        train = run.shuffled(prompts[held:], s.seed, "training prompts")
    n = s.prompts_per_iteration
    return validation, test, [train[t * n:(t + 1) * n] for t in range(s.iterations)]


# ---------------------------------------------------------------------------------------------------------------------
# sample, judge


def make_pairs(net, chat, judge, prompts, s, t, shard, r):
    """Phases `sample` and `judge` of iteration t: every prompt's best and worst answer with their Phat,
    and log pi_t of both.

    Returns (pairs, statistics). A pair is a dict: prompt (ids), responses (two lists of ids, best first),
    p (two floats), ref (two floats). Best and worst are by Phat; where all K tie both are the first answer, p = 1/2,
    and the regression towards 0 holds the policy where it is.
    """
    rank, ranks = shard
    mine = prompts[rank::ranks]
    ids = chat.encode_all(mine, s.max_prompt_tokens, s.max_new_tokens)
    with r.phase("sample"):
        seeds = [run.stream(s.seed, "sample", t) + i for i in range(rank, len(prompts), ranks)]
        samples = rollout.generate(net, ids, s.k, s.max_new_tokens, s.temperature, s.top_p, chat.stop_ids, seeds,
                                   s.top_k, s.max_rows, desc=f"iteration {t}: sampling {s.k} answers a prompt")
        texts = [[chat.decode(tokens) for tokens in group] for group in samples.tokens]
    r.say(f"iteration {t}: sampled {samples.count} tokens in {samples.seconds:.1f} s "
          f"({samples.count / samples.seconds:.0f} a second{' and rank' * (ranks > 1)})")
    with r.phase("judge"):
        phat = prefmodel.phat(judge.preference(mine, texts))                        # [B, K]  Phat(y_i > pi_t | x)
    pairs = []
    for b, wins in enumerate(phat):
        best, worst = int(wins.argmax()), int(wins.argmin())
        pairs.append({"prompt": ids[b], "responses": [samples.tokens[b][best], samples.tokens[b][worst]],
                      "p": [float(wins[best]), float(wins[worst])],
                      "texts": texts[b], "phat": [round(float(w), 4) for w in wins],
                      "cut": sum(f == "length" for f in samples.finish[b])})
    with r.phase("reference"), torch.no_grad():
        for start in range(0, len(pairs), s.micro_batch):
            chunk = pairs[start:start + s.micro_batch]
            for pair, logp in zip(chunk, sequence_logprobs(net, chunk).tolist()):
                pair["ref"] = logp                                      # log pi_t(y|x), the same lines as in training
    pairs = run.gather(pairs, len(prompts))
    for b, pair in enumerate(pairs):
        texts, wins = pair.pop("texts"), pair.pop("phat")
        if b < 50:
            r.write("samples.jsonl", {"iteration": t, "prompt": prompts[b], "responses": texts, "phat": wins})
    answers = s.k * len(pairs)
    statistics = {"phat_best": sum(p["p"][0] for p in pairs) / len(pairs),
                  "phat_worst": sum(p["p"][1] for p in pairs) / len(pairs),
                  "tied_share": sum(p["p"][0] == p["p"][1] for p in pairs) / len(pairs),
                  "cut_share": sum(p.pop("cut") for p in pairs) / answers}
    return pairs, statistics


def sequence_logprobs(net, pairs):
    """log pi(y|x) of both answers of each pair [len(pairs), 2] float32:
    sums over the answer's tokens, end of turn included."""
    logprob, row, rows = model.response_logprobs(net, [p["prompt"] for p in pairs],
                                                 [p["responses"] for p in pairs])
    return kernels.sum_rows(logprob, row, rows).view(-1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# loss, step


def gradient_step(net, optimizer, pairs, s, lr, shard):
    """One optimizer step of (4.7) on a batch of pairs, in micro-batches. Returns the batch's metrics."""
    rank, ranks = shard
    mine = pairs[rank::ranks]
    weight = ranks / len(pairs)              # the optimizer averages over ranks: this gives the mean over the batch
    if not mine:                             # a last batch smaller than the number of ranks: take part, with no weight
        mine, weight = pairs[:1], 0.0
    sums = torch.zeros(6, dtype=torch.float64)
    for start in range(0, len(mine), s.micro_batch):
        chunk = mine[start:start + s.micro_batch]
        logp = sequence_logprobs(net, chunk)                                                    # [b, 2] log pi(y|x)
        logratio = logp - torch.tensor([p["ref"] for p in chunk], device=logp.device)           # log pi / pi_t
        p = torch.tensor([p["p"] for p in chunk], device=logp.device)                           # Phat(y > pi_t | x)
        # (4.7):  ( log pi(y|x)/pi_t(y|x) - eta (Phat - 1/2) )^2, winner and loser averaged, mean over prompts
        loss = kernels.sppo_loss(logratio, p, s.eta).mean(1).sum() * weight
        loss.backward()
        optimizer.collect()
        with torch.no_grad():
            sums += torch.stack([loss / ranks, *(x * weight / ranks for x in (
                *logratio.sum(0), *logp.sum(0), (logratio - s.eta * (p - 0.5)).abs().sum() / 2))]).cpu().double()
    if ranks > 1:
        device_sums = sums.to(net.device) if net.device.type == "cuda" else sums
        dist.all_reduce(device_sums)
        sums = device_sums.cpu()
    loss, ratio_w, ratio_l, logp_w, logp_l, residual = sums.tolist()
    norm = optimizer.step(lr, s.clip) if math.isfinite(loss) else math.nan
    return {"loss": loss, "logratio_w": ratio_w, "logratio_l": ratio_l, "logp_w": logp_w, "logp_l": logp_l,
            "residual": residual, "grad_norm": norm, "lr": lr}


def validation_win_rate(net, chat, judge, validation, base_side, s, shard):
    """(win rate, standard error) of samples against the base's on the validation prompts:
    what chooses the checkpoint."""
    ids = chat.encode_all(validation, s.max_prompt_tokens, s.max_new_tokens)
    ours, _ = eval.answer(net, chat, ids, 1, sampling_of(s), run.stream(s.seed, "validation"),
                          desc="validation", shard=shard)
    return eval.mean_and_error(eval.verdicts(judge, validation, ours, base_side.sampled))


def sampling_of(s):
    """Evaluation samples at temperature 1, whatever temperature trains."""
    return eval.Sampling(s.max_new_tokens, max_rows=s.max_rows)


def base_side(r, net, chat, s, sets, shard):
    """The base's answers to the held-out prompts, {name: Opponent}; drawn once and kept in state/ for --resume."""
    path = r.path("state", "base_side.json")
    if not os.path.exists(path):
        drawn = {}
        for name, prompts in sets.items():
            ids = chat.encode_all(prompts, s.max_prompt_tokens, s.max_new_tokens)
            drawn[name] = dataclasses.asdict(
                eval.opponent(net, chat, ids, sampling_of(s), run.stream(s.seed, name), shard))
        if r.rank == 0:
            run.write_json(path, drawn)
    else:
        with open(path) as file:
            drawn = json.load(file)
    return {name: eval.Opponent(**d) for name, d in drawn.items()}


# ---------------------------------------------------------------------------------------------------------------------


def main(argv):
    """The whole run: set-up, then for every iteration sample, judge, loss, step, evaluate; then the summary."""
    # -- settings, set-up ---------------------------------------------------------------------------------------------
    s = settle(run.parse(Settings, argv, __doc__.split("\n\n")[0]
                         + "\n\nA default in [brackets]; the README explains every logged metric."))
    # the embedded world's 300,000 parameters have no use for bfloat16
    device, dtype = run.device_and_dtype(s.device, "float32" if s.dtype == "auto" and not s.prompts else s.dtype)
    rank, ranks, device = run.init_ranks(device)
    shard = (rank, ranks)
    if rank == 0:
        run.check_out(s.out, s, s.resume, s.overwrite)
    validation, test, parts = split_prompts(s)
    judge = prefmodel.load(s.judge, s.estimator, device, dtype)
    base_path = s.model or run.on_rank_0_first(rank, lambda: world.base(device=device))
    net, chat = eval.load(base_path, device, dtype)
    if not s.prompts:
        eval.check_speaks_world(base_path, chat)
    for prompts in (validation, test, *parts):      # refuse an over-long prompt now, not after an hour
        chat.encode_all(prompts, s.max_prompt_tokens, s.max_new_tokens)
    r = run.Run(s.out, s, s.resume, s.overwrite, rank)
    r.say(f"SPPO on {device} ({str(dtype)[6:]}, {ranks} process{'es' * (ranks > 1)}): {base_path}, judge {judge.name}; "
          f"{s.iterations} iterations of {s.prompts_per_iteration} prompts x K = {s.k}, eta {s.eta:g}, lr {s.lr:g}; "
          f"writing to {s.out}")
    for name, prompts in (("validation", validation), ("test", test)):      # so that others can evaluate on the same
        if rank == 0:
            with open(r.path("state", f"{name}.jsonl"), "w") as file:
                file.writelines(json.dumps({"prompt": p}) + "\n" for p in prompts)
    state = r.state or {"iteration": 1, "step": 0, "best": None, "evaluations": []}
    evaluations, sampling = state["evaluations"], sampling_of(s)
    with r.phase("evaluate"):
        base = base_side(r, net, chat, s, {"validation": validation, "test": test}, shard)
        test_ids = chat.encode_all(test, s.max_prompt_tokens, s.max_new_tokens)
        if not evaluations:
            evaluations.append(
                eval.against(net, chat, test, test_ids, base["test"], judge, sampling, s.seed, "base", shard))
            evaluations.append(eval.base_greedy_row(evaluations[0], judge, test, base["test"]))
    r.say(eval.table(evaluations))

    for t in range(state["iteration"], s.iterations + 1):
        # pi_t of (4.1): where this iteration starts, and its reference
        pi_t = r.path(f"iter-{t - 1}") if t > 1 else base_path
        net = optimizer = None                          # let go of the last iteration's memory first
        net = model.Transformer.from_pretrained(pi_t, device, dtype)
        pairs_path = r.path("state", f"pairs-{t}.json")

        # -- sample, judge --------------------------------------------------------------------------------------------
        if state.get("sampled") == t:
            with open(pairs_path) as file:
                pairs, statistics = json.load(file).values()
        else:
            pairs, statistics = make_pairs(net, chat, judge, parts[t - 1], s, t, shard, r)
            if rank == 0:
                run.write_json(pairs_path, {"pairs": pairs, "statistics": statistics}, indent=None)
            r.save_state(iteration=t, sampled=t, step=0, best=None, evaluations=evaluations)
        r.say(f"iteration {t}: {s.k * len(pairs)} answers judged; "
              f"mean Phat of the best {statistics['phat_best']:.3f}, of the worst {statistics['phat_worst']:.3f}; "
              f"all K equal for {statistics['tied_share']:.1%} of prompts; "
              f"{statistics['cut_share']:.1%} of answers cut")

        # -- loss, step -----------------------------------------------------------------------------------------------
        per_epoch = math.ceil(len(pairs) / s.batch_size)
        steps, best = s.epochs * per_epoch, state["best"]
        optimizer = kernels.Optimizer(net.parameters(), s.optimizer, s.weight_decay)
        if state["step"]:
            net.load_state_dict(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            state = {**state, "weights": None, "optimizer": None}       # not needed twice in memory
        bar = run.progress(desc=f"iteration {t}: training", total=steps)
        bar.update(state["step"])
        first_epoch, first_batch = divmod(state["step"], per_epoch)
        for epoch in range(first_epoch, s.epochs):
            order = run.shuffled(pairs, s.seed, "order", t, epoch)
            for i in range(first_batch if epoch == first_epoch else 0, per_epoch):
                step = epoch * per_epoch + i
                with r.phase("train"):
                    metrics = gradient_step(net, optimizer, order[i * s.batch_size:(i + 1) * s.batch_size], s,
                                            kernels.linear_schedule(step, steps, s.warmup, s.lr), shard)
                bar.update()
                if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                    raise run.UserError(f"iteration {t}, step {step + 1}: the loss is {metrics['loss']}, the "
                                        f"gradient's norm {metrics['grad_norm']}; stopped, the last good checkpoint "
                                        f"is {pi_t}: lower --lr or --eta, or use --dtype float32")
                r.write("metrics.jsonl", {"iteration": t, "step": step + 1, "epoch": epoch + 1,
                                          **metrics, **statistics})
                if (step + 1) % s.print_every == 0 or i + 1 == per_epoch:
                    r.say(f"iteration {t}, step {step + 1}/{steps}: loss {metrics['loss']:.2f}, log-ratio of winners "
                          f"{metrics['logratio_w']:+.2f}, of losers {metrics['logratio_l']:+.2f}, gradient norm "
                          f"{metrics['grad_norm']:.1f}, lr {metrics['lr']:.1e}")
                if s.save_every and (step + 1) % s.save_every == 0 and i + 1 < per_epoch:
                    r.save_state(iteration=t, sampled=t, step=step + 1, best=best, evaluations=evaluations,
                                 weights=net.state_dict(), optimizer=optimizer.state_dict())

            # choose the checkpoint on validation prompts (5.1): the best epoch so far is pi_{t+1}
            with r.phase("validate"):
                rate, error = validation_win_rate(net, chat, judge, validation, base["validation"], s, shard)
            r.write("metrics.jsonl", {"iteration": t, "step": step + 1, "epoch": epoch + 1,
                                      "validation_win_rate": rate, "validation_win_rate_se": error})
            r.say(f"iteration {t}, epoch {epoch + 1}/{s.epochs}: validation win rate against the base "
                  f"{rate:.3f} ±{error:.3f}")
            if best is None or rate > best["rate"]:
                best = {"rate": rate, "epoch": epoch + 1}
                if rank == 0:
                    net.save_pretrained(r.path(f"iter-{t}"), chat.tokenizer)
            if epoch + 1 < s.epochs:
                r.save_state(iteration=t, sampled=t, step=step + 1, best=best, evaluations=evaluations,
                             weights=net.state_dict(), optimizer=optimizer.state_dict())
        bar.close()

        # -- evaluate -------------------------------------------------------------------------------------------------
        run.barrier()
        net = optimizer = None
        net = model.Transformer.from_pretrained(r.path(f"iter-{t}"), device, dtype)
        with r.phase("evaluate"):
            evaluations.append(eval.against(net, chat, test, test_ids, base["test"], judge, sampling, s.seed,
                                            f"iteration {t}", shard) | {"epoch": best["epoch"]})
        r.say(f"iteration {t} kept epoch {best['epoch']}\n{eval.table(evaluations)}")
        state = {"iteration": t + 1, "step": 0, "best": None, "evaluations": evaluations}
        r.save_state(**state)

    # -- summary ------------------------------------------------------------------------------------------------------
    r.seconds["total"] = r.total_seconds()
    if rank == 0:
        summary = {"method": "sppo", "settings": dataclasses.asdict(s), **run.environment(device, ranks),
                   "base": str(base_path),
                   "seconds": {name: round(value, 1) for name, value in r.seconds.items()}, "evaluations": evaluations}
        run.write_json(r.path("summary.json"), summary)
        eval.plot([("SPPO", summary)], r.path("curves.png"))
    r.say("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in r.seconds.items())
          + f"; wrote {r.path('summary.json')} and {r.path('curves.png')}")


if __name__ == "__main__":
    run.main(main)
