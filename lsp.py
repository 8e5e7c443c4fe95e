"""LSP: Language Self-Play for Data-Free Training (Kuba et al., arXiv 2509.07414, v3). `python lsp.py`

One model plays two parts. As the Challenger it writes queries, q ~ pi(.|cp), where cp is a fixed prompt that asks for
one; as the Solver it answers them, a ~ pi(.|q). A judge gives the answer a reward R(q, a). The Solver wants it high,
the Challenger low, and so looks for what the Solver cannot do yet: there is no data.

    min over the Challenger, max over the Solver, of  E[ R(q, a) ]

The trouble with that game is its simplest way to win: ask nonsense. LSP therefore adds a self-reward R_Q in 0..7, given
by the frozen initial model, to BOTH players; the game is then no longer zero-sum. For each step:

    sample   N queries q_i ~ pi(.|cp), and G answers a_i^j ~ pi(.|q_i) to each
    judge    R(q_i, a_i^j) and R_Q(q_i, a_i^j);  V(q_i) = mean_j R,  V_Q(q_i) = mean_j R_Q                           (2)
             Solver      r(i, j) = R + R_Q             A_Sol(i, j) = r(i, j) - mean_j r(i, j)
             Challenger  r_Ch(i) = -V(q_i) + V_Q(q_i)  A_Ch(i)     = r_Ch(i) - mean_i r_Ch(i)                        (3)
    loss     L = L_Sol + alpha_ch L_Ch, where
             L_Sol = - mean_ij [ pi/sg(pi)(a_i^j|q_i) A_Sol(i, j) - beta KL ],   L_Ch the same over queries     (4), (5)
    step     one optimizer step; sg = stop-gradient, KL to the frozen initial model, probabilities of whole sequences

--mode lsp-zero is the same without R_Q, the zero-sum game. --mode grpo leaves the Challenger out and takes its queries
from data: the baseline.

Deviations from the paper, each with its reason:
  - the KL term. (4) writes beta log(pi/pi_Ref) inside the loss; read literally its gradient is beta grad log pi, whose
    expectation under pi is zero, so that it does not hold the policy at all (--kl k1 shows it). The default, `reward`,
    takes the log-ratio off the advantage, and that is exactly the gradient of beta KL(pi || pi_Ref)
  - the paper gives neither G nor alpha_ch; the embedded world has its own N, G, alpha_ch, beta, learning rate and
    reward scale (WORLD below)
  - --self-reward expected reads the mean of the verdict's distribution instead of sampling one verdict: less noise
  - --challenger-reward spread and frontier are not in the paper: they reward queries on which the Solver's answers
    differ (their standard deviation) or succeed about half the time (-|V - 1/2|), instead of those it always fails
  - not in the paper: gradients clipped at norm 1, AdamW betas (.9, .98)

    python lsp.py                                          # the embedded world, minutes on a CPU
    python lsp.py --mode lsp-zero --out out/lsp-zero
    python lsp.py --mode grpo --out out/grpo               # then LSP from there: --init out/grpo
"""

import dataclasses
import math
import os
import re

import torch

import eval
import kernels
import model
import prefmodel
import rollout
import run
import world
from run import flag

# What a setting is when its flag is not given, in the embedded world
WORLD = dict(steps=200, queries=32, answers=8, beta=0.1, alpha_ch=0.05, reward_scale=3.0, lr=4e-4, self_reward="sample",
             max_query_tokens=24, max_new_tokens=24, micro_batch=32, max_rows=512, test_prompts=2000, eval_every=50,
             print_every=10)


@dataclasses.dataclass
class Settings:
    """Flags of `python lsp.py`."""
    mode: str = flag("lsp", "lsp = with self-reward; lsp-zero = the zero-sum game; grpo = queries from data",
                     ("lsp", "lsp-zero", "grpo"))
    model: str = flag("", "the initial model: a checkpoint of the embedded world; without it the world's base")
    init: str = flag("",
        "start from the last checkpoint of this run's directory instead (LSP after GRPO, or the reverse)")
    steps: int | None = flag(None, "optimizer steps [200]")
    queries: int | None = flag(None, "N, queries per step (Table 1: 8) [32]")
    answers: int | None = flag(None, "G, answers per query (not in the paper) [8]")
    beta: float | None = flag(None, "beta, weight of the KL to the initial model (Table 1: 0.05) [0.1]")
    alpha_ch: float | None = flag(None, "alpha_ch, weight of the Challenger's loss (not in the paper) [0.05]")
    reward_scale: float | None = flag(None, "R is the judge's reward times this; R_Q stays in 0..7 [3]")
    self_reward: str | None = flag(None,
        "how R_Q is read off the initial model: sample a verdict, or the expected one [sample]", ("sample", "expected"))
    challenger_reward: str = flag("value",
        "what the Challenger gets: value = -V (the paper), spread = the group's standard deviation, frontier = "
        "-|V - 1/2| of the unscaled reward", ("value", "spread", "frontier"))
    kl: str = flag("reward",
        "the KL term: reward = log-ratio off the advantage (exact reverse KL), k2 = half its square (the same "
        "gradient), k1 = the log-ratio as a loss (no pull at all), k3 = exp(-l) - 1 + l (the forward KL's gradient)",
        ("reward", "k1", "k2", "k3"))
    normalise: str = flag("none",
        "what a sequence's log-prob is divided by: none (the paper), sequence = its length (GRPO), token = the batch's "
        "mean length, constant = --max-new-tokens (Dr. GRPO)", ("none", "sequence", "token", "constant"))
    std_normalise: bool = flag(False, "divide advantages by the group's standard deviation (GRPO)")
    lr: float | None = flag(None, "learning rate (Table 1: 3e-6) [4e-4]")
    warmup: int = flag(10, "steps over which the learning rate rises; constant after")
    weight_decay: float = flag(0.0, "of AdamW")
    clip: float = flag(1.0, "largest gradient norm; 0 = no clipping (not in the paper)")
    temperature: float = flag(1.0, "of sampling")
    max_query_tokens: int | None = flag(None, "longest query in tokens [24]")
    max_new_tokens: int | None = flag(None, "longest answer in tokens [24]")
    micro_batch: int | None = flag(None, "queries per forward and backward pass; the gradient is the same [32]")
    max_rows: int | None = flag(None, "answers in flight while sampling [512]")
    test_prompts: int | None = flag(None, "held-out queries of the final table [2000]")
    eval_every: int | None = flag(None, "steps between checkpoints and rows of the table [50]")
    print_every: int | None = flag(None, "steps between printed lines; metrics.jsonl has every step [10]")
    seed: int = flag(0, "fixes everything that is drawn, but not the embedded world and its base")
    device: str = flag("auto", "cuda, mps or cpu; auto takes the first there is")
    out: str = flag("out/lsp", "the run's directory")
    resume: bool = flag(False, "continue the run in --out from its last checkpoint")
    overwrite: bool = flag(False, "replace the run in --out")


def settle(s):
    """Fill in what was not given, and refuse what makes no sense. Returns the completed Settings."""
    if s.mode != "lsp" and s.self_reward is not None:
        raise run.UserError(f"--self-reward does nothing in --mode {s.mode}, which has none; leave it out")
    if s.mode == "grpo" and (s.alpha_ch, s.max_query_tokens, s.challenger_reward) != (None, None, "value"):
        raise run.UserError("--alpha-ch, --max-query-tokens and --challenger-reward do nothing in --mode grpo, which "
                            "has no Challenger; leave them out")
    s = dataclasses.replace(s, **{k: v for k, v in WORLD.items() if getattr(s, k) is None})
    for name in ("steps", "lr", "max_query_tokens", "max_new_tokens", "micro_batch", "max_rows", "test_prompts",
                 "eval_every", "print_every", "reward_scale", "temperature"):
        if not (getattr(s, name) > 0 and math.isfinite(getattr(s, name))):
            raise run.UserError(f"--{name.replace('_', '-')} {getattr(s, name)} must be above 0")
    for name, what in (("queries", "queries to compare"), ("answers", "answers to compare")):
        if getattr(s, name) < 2:
            raise run.UserError(f"--{name} {getattr(s, name)} leaves no {what}; give at least 2")
    for name in ("beta", "alpha_ch", "warmup", "clip", "weight_decay"):
        if not (getattr(s, name) >= 0 and math.isfinite(getattr(s, name))):
            raise run.UserError(f"--{name.replace('_', '-')} {getattr(s, name)} must not be negative")
    if s.model and s.init:
        raise run.UserError("--model and --init both say where to start; give one of them")
    return s


def initial_model(s):
    """The checkpoint to start from, or "" for the world's base: --model, or the last one of the run in --init."""
    if not s.init:
        return s.model
    found = [(int(name.split("-")[1]), name) for name in (os.listdir(s.init) if os.path.isdir(s.init) else ())
             if re.fullmatch(r"(iter|step)-\d+", name)]
    if not found:
        raise run.UserError(f"--init {s.init} holds no checkpoint iter-k or step-k; give a run's directory")
    return os.path.join(s.init, max(found)[1])


# ---------------------------------------------------------------------------------------------------------------------
# sample


@dataclasses.dataclass
class Game:
    """One step's play. N queries, G answers each; ids as sampled, text as judged."""
    queries: list           # N texts
    query_ids: list         # N lists of ids; empty lists where queries come from data
    prompts: list           # N lists of ids: the Solver's prompts
    answers: list           # N lists of G texts
    answer_ids: list        # N lists of G lists of ids
    logp: torch.Tensor      # [N, G] log pi(a|q) as sampled
    logp_q: torch.Tensor    # [N] log pi(q|cp) as sampled
    cut: int                # answers that reached the length limit


def play(net, chat, s, step, data=None):
    """Phase `sample`: the Challenger's N queries (or N given ones, `data`), the Solver's G answers to each."""
    seed = run.stream(s.seed, "play", step)
    query_ids, logp_q, queries = [[]] * s.queries, torch.zeros(s.queries), data
    if data is None:
        asked = rollout.generate(net, [chat.encode(world.CHALLENGE)], s.queries, s.max_query_tokens, s.temperature,
                                 stop_ids=chat.stop_ids, seeds=[seed], max_rows=s.max_rows)
        query_ids, logp_q = asked.tokens[0], torch.tensor([sum(x) for x in asked.logprobs[0]])
        queries = [chat.decode(ids) for ids in query_ids]
    prompts = [chat.encode(q) for q in queries]
    said = rollout.generate(net, prompts, s.answers, s.max_new_tokens, s.temperature, stop_ids=chat.stop_ids,
                            seeds=[seed + 1 + i for i in range(len(queries))], max_rows=s.max_rows)
    return Game(queries, query_ids, prompts, [[chat.decode(a) for a in group] for group in said.tokens], said.tokens,
                torch.tensor([[sum(x) for x in group] for group in said.logprobs]), logp_q,
                sum(f == "length" for group in said.finish for f in group))


# ---------------------------------------------------------------------------------------------------------------------
# judge


class SelfReward:
    """R_Q: the frozen initial model's verdict 0..7 on a query and its answer, out of its own judge mode.

    The embedded world's base was trained on its ORACLE's labels in that mode (world.judge_label), so that there
    "data-free" means: no data beyond what the base has seen.
    """

    def __init__(self, ref, chat, s):
        self.ref, self.chat, self.s = ref, chat, s
        self.digits = torch.tensor(chat.tokenizer.convert_tokens_to_ids(list("01234567")), device=ref.device)

    @torch.no_grad()
    def score(self, queries, answers, step):
        """N queries, N lists of G answers -> (R_Q [N, G] float32, share of verdicts that could not be read).

        Each pair is judged once. A verdict that is no digit takes the mean of the others, and is counted: a silent 0
        would tell both players that something is bad where nothing was said.
        """
        pairs = {(q, a): None for q, group in zip(queries, answers) for a in group}
        prompts = [self.chat.encode(world.JUDGE.format(query=q, answer=a)) for q, a in pairs]
        if self.s.self_reward == "expected":
            view = model.SharedPrefix(prompts, [[] for _ in prompts], self.ref.device)
            logits = self.ref.logits(self.ref(view.tokens, view)[view.prompt_last])[:, self.digits]     # [pairs, 8]
            marks = (logits.softmax(-1) * torch.arange(8.0, device=logits.device)).sum(-1).tolist()
        else:
            said = rollout.generate(self.ref, prompts, 1, 4, stop_ids=self.chat.stop_ids, max_rows=self.s.max_rows,
                                    seeds=run.stream(self.s.seed, "verdicts", step))
            marks = [parse_verdict(self.chat.decode(group[0])) for group in said.tokens]
        read = [m for m in marks if m is not None]
        fallback = sum(read) / len(read) if read else 0.0
        scores = {pair: fallback if m is None else m for pair, m in zip(pairs, marks)}
        R_Q = torch.tensor([[float(scores[q, a]) for a in group] for q, group in zip(queries, answers)])
        return R_Q, 1 - len(read) / len(marks)


def parse_verdict(text):
    """The digit 0..7 that a verdict consists of, or None.

    >>> parse_verdict("6"), parse_verdict("8"), parse_verdict("66"), parse_verdict("ab")
    (6, None, None, None)
    """
    return int(text) if text in list("01234567") else None


def advantages(R, R_Q, s):
    """(A_Sol [N, G], A_Ch [N]) of (3) from R and R_Q [N, G]; R_Q None is the zero-sum game.

    V is of R alone: were R_Q added to it first, -V + V_Q would cancel it, and the Challenger would be paid for nothing.
    """
    V = R.mean(1)                                                                                   # (2)
    plain = R / s.reward_scale                                                                  # in the judge's units
    r_ch = {"value": -V, "spread": R.std(1), "frontier": -(plain.mean(1) - 0.5).abs() * s.reward_scale
            }[s.challenger_reward]
    r_sol = R
    if R_Q is not None:
        r_sol, r_ch = R + R_Q, r_ch + R_Q.mean(1)
    A_sol, A_ch = r_sol - r_sol.mean(1, keepdim=True), r_ch - r_ch.mean()
    if s.std_normalise:
        A_sol, A_ch = A_sol / (r_sol.std(1, keepdim=True) + 1e-4), A_ch / (r_ch.std() + 1e-4)
    return A_sol, A_ch


# ---------------------------------------------------------------------------------------------------------------------
# loss, step


def coefficient(advantage, logratio, beta, kl):
    """What multiplies grad log pi of each sequence in the loss: advantage and logratio = log pi/pi_Ref, any one shape.

    As the sample comes from pi itself, pi/sg(pi) is 1 and its gradient is grad log pi; and each form of the KL term has
    a gradient of the form c grad log pi too:
        reward, k2 (l^2/2)       c = l             E[c grad log pi] = grad KL(pi || pi_Ref), exactly
        k1         (l)           c = 1             expectation 0: E[grad log pi] = 0
        k3         (e^-l - 1 + l) c = 1 - e^-l     that of the other KL, KL(pi_Ref || pi)
    """
    pull = {"reward": logratio, "k2": logratio, "k1": torch.ones_like(logratio), "k3": 1 - (-logratio).exp()}[kl]
    return -(advantage - beta * pull)


def token_weights(lengths, normalise, longest):
    """What each sequence's tokens are multiplied by: lengths [M] -> [M] float32 (see --normalise)."""
    lengths = torch.tensor(lengths, dtype=torch.float32)
    return {"none": torch.ones_like(lengths), "sequence": 1 / lengths, "token": 1 / lengths.mean().expand_as(lengths),
            "constant": torch.full_like(lengths, 1 / longest)}[normalise]


def policy_pass(net, prompts, responses, coef, scale):
    """Forward and backward of  sum over responses of coef log pi(response|prompt) * scale:  B prompts, B lists of
    responses, coef [all responses]. Each prompt is computed once. Returns the log-probs [all responses]."""
    view = model.SharedPrefix(prompts, responses, net.device)
    hidden = net(view.tokens, view)
    coef = coef.to(net.device)[view.row] * scale
    loss, logprob = kernels.linear_policy_loss(hidden[view.source], net.head.weight, view.target, coef,
                                               net.config.logit_cap)
    loss.backward()
    return kernels.sum_rows(logprob, view.row, view.rows)


@torch.no_grad()
def reference_logprobs(ref, prompts, responses):
    """log pi_Ref of every response, summed over its tokens: B prompts, B lists of responses -> [all] float32."""
    logprob, row, rows = model.response_logprobs(ref, prompts, responses)
    return kernels.sum_rows(logprob, row, rows).cpu()


def gradient_step(net, ref, optimizer, game, A_sol, A_ch, challenge, s, lr):
    """L = L_Sol + alpha_ch L_Ch of (4) and (5), one optimizer step. Returns the step's metrics.

    challenge: the Challenger's prompt as ids, or None where the queries are data and only the Solver learns.
    """
    N, G = A_sol.shape
    metrics, lengths = {"kl_solver": 0.0}, [len(a) for group in game.answer_ids for a in group]
    weights = token_weights(lengths, s.normalise, s.max_new_tokens).view(N, G)
    for start in range(0, N, s.micro_batch):
        part = slice(start, start + s.micro_batch)
        prompts, answers = game.prompts[part], game.answer_ids[part]
        logratio = game.logp[part] - reference_logprobs(ref, prompts, answers).view(-1, G)          # log pi / pi_Ref
        coef = coefficient(A_sol[part], logratio, s.beta, s.kl) * weights[part]
        policy_pass(net, prompts, answers, coef.flatten(), 1 / (N * G))
        optimizer.collect()
        metrics["kl_solver"] += float(logratio.sum()) / (N * G)
    if challenge is not None:
        logratio = game.logp_q - reference_logprobs(ref, [challenge], [game.query_ids])
        coef = coefficient(A_ch, logratio, s.beta, s.kl) * token_weights(
            [len(q) for q in game.query_ids], s.normalise, s.max_query_tokens)
        policy_pass(net, [challenge], [game.query_ids], coef, s.alpha_ch / N)
        optimizer.collect()
        metrics |= {"kl_challenger": float(logratio.mean()), "entropy_challenger": float(-game.logp_q.mean())}
    metrics |= {"entropy_solver": float(-game.logp.mean()), "grad_norm": optimizer.step(lr, s.clip), "lr": lr}
    return metrics


def query_metrics(game):
    """What the Challenger's queries are like: malformed share, operations, distinct share, mean length in tokens."""
    parsed = [world.parse(q) for q in game.queries]
    good = [p for p in parsed if p]
    return {"malformed": 1 - len(good) / len(parsed), "ops": sum(len(p[0]) for p in good) / max(1, len(good)),
            "distinct": len(set(game.queries)) / len(parsed),
            "query_tokens": sum(map(len, game.query_ids)) / len(parsed)}


# ---------------------------------------------------------------------------------------------------------------------


def main(argv):
    """The whole run: set-up, then for every step sample, judge, loss, step, print, evaluate; then the summary."""
    # -- settings, set-up ---------------------------------------------------------------------------------------------
    s = settle(run.parse(Settings, argv, __doc__.split("\n\n")[0] + "\n\nA default in [brackets]."))
    device, dtype = run.device_and_dtype(s.device, "float32")
    run.check_out(s.out, s, s.resume, s.overwrite)
    base_path = initial_model(s) or world.base(device=device)
    net, chat = eval.load(base_path, device, dtype)
    eval.check_speaks_world(base_path, net, chat, "oracle")
    ref = model.Transformer.from_pretrained(base_path, device, dtype).requires_grad_(False)
    judge = prefmodel.load("oracle")
    r = run.Run(s.out, s, s.resume, s.overwrite)
    r.say(f"{s.mode} on {device}: {base_path}; {s.steps} steps of {s.queries} queries x {s.answers} answers, "
          f"beta {s.beta:g}, alpha_ch {s.alpha_ch:g}, lr {s.lr:g}; writing to {s.out}")
    test, sampling = world.queries("test", s.test_prompts), eval.Sampling(s.max_new_tokens, max_rows=s.max_rows)
    test_ids = [chat.encode(q) for q in test]
    data = world.queries("train", s.steps * s.queries, s.seed) if s.mode == "grpo" else None
    challenge = chat.encode(world.CHALLENGE) if data is None else None
    self_reward = SelfReward(ref, chat, s) if s.mode == "lsp" else None
    state = r.state or {"iteration": 0, "step": 0, "evaluations": []}
    evaluations = state["evaluations"]
    with r.phase("evaluate"):
        theirs = eval.opponent(ref, chat, test_ids, sampling, run.stream(s.seed, "test"))
        if not evaluations:
            evaluations.append(eval.against(ref, chat, test, test_ids, theirs, judge, sampling, s.seed, "base"))
            evaluations.append(eval.base_greedy_row(evaluations[0], judge, test, theirs))
    optimizer = kernels.Optimizer(net.parameters(), "adamw", s.weight_decay)
    if state["step"]:
        net.load_state_dict(state.pop("weights"))
        optimizer.load_state_dict(state.pop("optimizer"))
    r.say(eval.table(evaluations))
    bar = run.progress(desc="self-play", total=s.steps)
    bar.update(state["step"])
    for step in range(state["step"], s.steps):
        # -- sample ---------------------------------------------------------------------------------------------------
        with r.phase("sample"):
            game = play(net, chat, s, step, data and data[step * s.queries:(step + 1) * s.queries])

        # -- judge ----------------------------------------------------------------------------------------------------
        with r.phase("judge"):
            R, R_Q, unread = judge.reward(game.queries, game.answers) * s.reward_scale, None, 0.0           # [N, G]
            if self_reward is not None:
                R_Q, unread = self_reward.score(game.queries, game.answers, step)
            A_sol, A_ch = advantages(R, R_Q, s)

        # -- loss, step -----------------------------------------------------------------------------------------------
        with r.phase("train"):
            metrics = gradient_step(net, ref, optimizer, game, A_sol, A_ch, challenge, s,
                                    s.lr * min(1.0, (step + 1) / max(1, s.warmup)))
        bar.update()
        metrics |= {"reward": float(R.mean()) / s.reward_scale, "spread": float(R.std(1).mean()) / s.reward_scale,
                    "advantage_solver": float(A_sol.abs().mean()), "cut": game.cut / A_sol.numel()}
        if R_Q is not None:
            metrics |= {"self_reward": float(R_Q.mean()), "unread_verdicts": unread}
        if challenge is not None:
            metrics |= {"advantage_challenger": float(A_ch.abs().mean()), **query_metrics(game)}
        r.write("metrics.jsonl", {"step": step + 1, **metrics})
        if not math.isfinite(metrics["grad_norm"]):
            raise run.UserError(f"step {step + 1}: the gradient's norm is {metrics['grad_norm']}; lower --lr")

        # -- print ----------------------------------------------------------------------------------------------------
        if (step + 1) % s.print_every == 0:
            r.say(f"step {step + 1}/{s.steps}: reward {metrics['reward']:.3f}, KL of the Solver "
                  f"{metrics['kl_solver']:+.2f}" + ("" if challenge is None else
                  f", of the Challenger {metrics['kl_challenger']:+.2f}; queries: malformed "
                  f"{metrics['malformed']:.1%}, {metrics['ops']:.2f} operations, {metrics['distinct']:.0%} distinct")
                  + ("" if R_Q is None else f"; self-reward {metrics['self_reward']:.2f}"))
            for i in range(0 if challenge is None else 3):
                r.write("samples.jsonl", {"step": step + 1, "query": game.queries[i], "answer": game.answers[i][0],
                                          "reward": float(R[i, 0]) / s.reward_scale,
                                          "self_reward": None if R_Q is None else float(R_Q[i, 0])})

        # -- evaluate -------------------------------------------------------------------------------------------------
        if (step + 1) % s.eval_every == 0 or step + 1 == s.steps:
            net.save_pretrained(r.path(f"step-{step + 1}"), chat.tokenizer)
            with r.phase("evaluate"):
                row = eval.against(net, chat, test, test_ids, theirs, judge, sampling, s.seed, f"step {step + 1}")
                if challenge is not None:
                    row |= challenger_figures(net, ref, chat, s, step)
            evaluations.append(row)
            r.say(eval.table(evaluations))
            r.save_state(**state | {"step": step + 1, "weights": net.state_dict()},
                         shard={"optimizer": optimizer.state_dict()})
    bar.close()

    # -- summary ------------------------------------------------------------------------------------------------------
    r.seconds["total"] = r.total_seconds()
    summary = {"method": s.mode, "settings": dataclasses.asdict(s), **run.environment(device),
               "base": str(base_path), "seconds": {name: round(value, 1) for name, value in r.seconds.items()},
               "evaluations": evaluations}
    run.write_json(r.path("summary.json"), summary)
    eval.plot([(s.mode, summary)], r.path("curves.png"))
    r.say("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in r.seconds.items())
          + f"; wrote {r.path('summary.json')} and {r.path('curves.png')}")


def challenger_figures(net, ref, chat, s, step, count=512):
    """Of `count` fresh queries: malformed share, operations, distinct share, and how many of the well-formed ones the
    INITIAL model answers exactly, sampled once: whether the Challenger asks harder things than it did."""
    game = play(net, chat, dataclasses.replace(s, queries=count, answers=1), ("figures", step))
    good = [q for q in game.queries if world.parse(q)]
    figures = {k: v for k, v in query_metrics(game).items() if k != "query_tokens"}
    found = world.accuracy(ref, chat.tokenizer, good, 1, run.stream(s.seed, "figures", step)) if good else None
    return figures | {"base_accuracy": found}


if __name__ == "__main__":
    run.main(main)
