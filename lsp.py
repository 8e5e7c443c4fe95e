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
  - the prompts of Boxes 1 and 3 are here in words of our own with the same content; FILE flags take any others
  - the paper gives neither G nor alpha_ch. For real models G = 8, which is the default of the trainer that its baseline
    comes from, and alpha_ch = 1, (4) and (5) as they stand
  - an embedded world has settings of its own (world.WORLDS), --reward-scale among them: r = 3 R + R_Q, with other
    Challenger's rewards 12 R + R_Q. The paper adds the two as they are, and so do real models here
  - a verdict that cannot be read counts as the mean of its query's others, so that it moves neither player (the paper
    does not say what it did), and is logged
  - --mode grpo is (4) on data, as the paper writes it. Its figures for GRPO come from a library (TRL) that divides by
    the group's standard deviation and by lengths, and takes the KL token by token: --preset trl-grpo, or
    --std-normalise, --normalise sequence | token | constant, --kl k2-token | k3-token
  - not in the paper: gradients clipped at norm 1, AdamW betas (.9, .98), a learning rate that stays the same (TRL's
    falls linearly to 0; the paper does not say), so that a run may go on with more --steps
  - the final table's answers are sampled at T = 1, not at .01 (eval.py generate has the paper's decoding)
  - equal pairs of query and answer share one verdict of R and of R_Q, where the paper asks for each anew
  - the Challenger's log-probability covers all that it wrote, also what stands around the query and is not played
  - --self-reward expected, the embedded world's default, reads the mean of the score's distribution instead of sampling
    a verdict: less noise. Real models sample
  - off by default: --challenger-reward spread and frontier pay for queries on which the Solver's answers differ (their
    standard deviation) or succeed about half the time (-|V - 1/2|), instead of those it always fails. `frontier` is the
    reward of R-Zero (arXiv 2508.05004), min(V, 1 - V), less 1/2, without its penalty for repeated questions
  - off by default: --challenger frozen lets the initial model ask, which never learns: a control that the paper lacks
  - off by default: --lora trains adapters of low rank in place of all weights (lora.py); pi_Ref is then the same
    network with the adapters off
  - a query that is kept for evaluation is written anew: a prompt of the final table, and in an embedded world any of
    its validation and test parts. The paper does not say that its Challenger was kept from them
  - a query that is empty or was cut is played as it is, and counted: only the self-reward counts against it
  - embedded worlds are not wholly data-free: their base's judge mode was trained on the oracle's labels

    python lsp.py                                          # the embedded world, minutes on a CPU
    python lsp.py --mode grpo --out out/grpo               # then LSP from there: --init out/grpo
    python lsp.py --preset paper                           # Llama-3.2-3B-Instruct, Skywork-Reward-V2; no prompts
    torchrun --nproc_per_node=8 lsp.py ...
"""

import dataclasses
import math
import os
import re

import torch

import challenger
import files
import kernels
import lora
import memory
import model
import parallel
import plots
import prefmodel
import rollout
import run
import winrate
import world
from chat import Chat, as_row, in_steps, read_prompts, shortened, without_thinking
from flags import flag, parse

# What a setting is when its flag is not given and real models play: Table 1's, and where the paper is silent what the
# docstring says. What it is in an embedded world stands in the world's entry; a world without a Challenger has none.
REAL = dict(steps=1000, queries=8, answers=8, beta=0.05, alpha_ch=1.0, reward_scale=1.0, self_reward="sample",
            lr=3e-6, warmup=0, max_query_tokens=512, max_new_tokens=1024, max_verdict_tokens=256, micro_batch=1,
            max_rows=64, test_prompts=256, eval_every=100, print_every=1)
FRESH = 512, 64                 # queries behind a row's figures of the Challenger: in an embedded world, of real models
PLAYABLE = tuple(name for name, entry in world.WORLDS.items() if entry.lsp)

# Section 4 of the paper; what it leaves open is REAL's. `lr` is 3e-6 for both games and 1e-6 for GRPO. N 8 = batch 4 x
# accumulation 2. Of its other task for the Challenger it says: --task "Pure & Applied Mathematics".
PRESETS = {"paper": dict(
    model="meta-llama/Llama-3.2-3B-Instruct", reward="reward:Skywork/Skywork-Reward-V2-Llama-3.2-3B", queries=8,
    answers=8, beta=0.05, alpha_ch=1.0, reward_scale=1.0, micro_batch=4, warmup=0, self_reward="sample",
    challenger_reward="value", kl="reward", normalise="none", std_normalise=False, activation_checkpointing=True)}
# The paper's baseline as the library that it names (TRL, 1.16) computes it by default
PRESETS["trl-grpo"] = PRESETS["paper"] | dict(mode="grpo", lr=1e-6, kl="k2-token", normalise="token",
                                              std_normalise=True)


@dataclasses.dataclass
class Settings(challenger.Settings):
    """Flags of `python lsp.py`."""
    preset: str = flag("", "the paper's run, as PRESETS spells it out; other flags override", tuple(PRESETS))
    mode: str = flag("lsp", "lsp = with self-reward; lsp-zero = the zero-sum game; grpo = queries from data",
                     ("lsp", "lsp-zero", "grpo"))
    world: str = flag("",
        "the embedded world that is played, an entry of world.WORLDS [operations, unless --reward]", PLAYABLE)
    model: str = flag("",
        "the initial model, also the frozen reference: a checkpoint directory or hub id; without it the embedded "
        "world's base")
    init: str = flag("",
        "start from the last checkpoint of this run's directory instead (LSP after GRPO, or the reverse)")
    challenger: str = flag("trained",
        "who asks: trained = the model itself, as it learns; frozen = the initial model, the control that tells what "
        "the Challenger's learning is worth", ("trained", "frozen"))
    reward: str = flag("", "R(q, a): an embedded world's oracle; reward:DIR_OR_HUB_ID, a sequence classifier with one "
        "label; python:FILE.py:FUNCTION, a function (prompt, answer, row) of your own; or verify:gsm8k, verify:math, "
        "for --mode grpo with prompts that have an `answer`")
    judge: str = flag("", "who judges the final table: what sppo.py's --judge takes [--reward]")
    prompts: str = flag("", "--mode grpo: queries to train on, a file or hub data set as in sppo.py [the world's own]")
    train_prompts: int = flag(0,
        "--mode grpo: D, at most so many distinct queries, used again and again; 0 = all there are", at_least=0)
    eval_prompts: str = flag("",
        "prompts of the final table, a file or hub data set [the world's test queries; else some of --prompts, held "
        "out; else the initial model's own queries]")
    self_reward_prompt: str = flag("", "file with another rubric; it must use {query} and {answer}, and ask for "
                                       "<Score>0..7</Score>")
    steps: int | None = flag(None, "optimizer steps (Box 4 shows 500 to 1500)", at_least=1)
    queries: int | None = flag(None, "N, queries per step, over all ranks (Table 1: 8)", at_least=2)
    answers: int | None = flag(None, "G, answers per query (not in the paper)", at_least=2)
    beta: float | None = flag(None, "beta, weight of the KL to the initial model (Table 1: 0.05)", at_least=0)
    alpha_ch: float | None = flag(None, "alpha_ch, weight of the Challenger's loss (not in the paper)", at_least=0)
    reward_scale: float | None = flag(None, "R is the judge's reward times this; R_Q stays in 0..7", above=0)
    self_reward: str | None = flag(None,
        "how R_Q is read off the initial model: sample = a verdict is written; expected = the score's mean under the "
        "next token's distribution, without a justification", ("sample", "expected"))
    challenger_reward: str = flag("value",
        "what the Challenger gets: value = -V (the paper), spread = the group's standard deviation, frontier = "
        "-|V - 1/2| of the unscaled reward, for rewards in [0, 1]", ("value", "spread", "frontier"))
    kl: str = flag("reward",
        "the KL term of a sequence's log-ratio l: reward = l off the advantage (exact reverse KL), k2 = half its "
        "square (the same gradient), k1 = l as a loss (no pull at all), k3 = exp(-l) - 1 + l (the forward KL's "
        "gradient; it explodes where l falls below -5 nats, as whole sequences soon do). k2-token, k3-token = each "
        "token's own log-ratio: what TRL's GRPO takes by default, and without its use_bias_correction_kl",
        ("reward", "k1", "k2", "k3", "k2-token", "k3-token"))
    normalise: str = flag("none",
        "what a sequence's log-prob is divided by: none (the paper), sequence = its length (GRPO), token = the batch's "
        "mean length, constant = --max-new-tokens (Dr. GRPO)", ("none", "sequence", "token", "constant"))
    std_normalise: bool = flag(False, "divide advantages by the group's standard deviation (GRPO)")
    lr: float | None = flag(None, "learning rate (Table 1: 3e-6, GRPO 1e-6)", above=0)
    warmup: int | None = flag(None,
        "steps over which the learning rate rises; constant after (not in the paper)", at_least=0)
    temperature: float = flag(1.0, "of sampling queries and answers; the loss is that of temperature 1, so that "
                                   "another one makes the gradient a biased one. Verdicts are sampled at 1", above=0)
    max_verdict_tokens: int | None = flag(None, "longest verdict in tokens", at_least=1)
    micro_batch: int | None = flag(None,
        "queries, with their answers, per forward and backward pass and rank; the gradient is the same", at_least=1)
    test_prompts: int | None = flag(None, "prompts of the final table, at most", at_least=1)
    eval_every: int | None = flag(None, "steps between checkpoints and rows of the table", at_least=1)
    out: str = flag("out/lsp", "the run's directory")


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def main(argv):
    """The whole run: for every step sample, judge, reference, loss, step, print, evaluate; then the summary."""
    job = set_up(argv)
    args, record, net = job.args, job.record, job.net
    evaluated(0, job)                           # the initial model, which every later one is compared with
    net = parallel.shard(net)                   # with several processes: each updates a share of the weights
    optimizer = kernels.Optimizer(net.parameters(), "adamw", args.weight_decay)
    first = restored(job, optimizer)
    bar = run.progress(desc="self-play", total=args.steps)
    bar.update(first)
    for step in range(first, args.steps):
        before = dict(record.seconds)
        # -- sample: both parts are the same network under two prompts, so whatever one learns, the other has ---------
        with record.phase("sample"), parallel.gathered(net):
            data = job.data[step] if job.data else None
            game = play(net, job.chat, args, step, job.challenge, data, job.shard, job.asker, job.held_out)

        # -- judge: R from the judge, R_Q from the frozen initial model; then who did better than the group's mean ----
        with record.phase("judge"):
            R = rewards(job.judge, game, args, job.shard)                                           # [N, G]
            R_Q, verdicts = None, {}
            if job.self_reward:
                R_Q, verdicts = job.self_reward.score(game.queries, game.answers, step, job.shard)      # [N, G]
            A_sol, A_ch = advantages(R, R_Q, args)                                                  # (2), (3)

        # -- reference: how far each sequence has become likelier than under pi_Ref, for the KL term ------------------
        with record.phase("reference"):
            ratio_sol = reference_ratios(job.ref, game.prompts, game.answer_ids, game.token_logp, args, job.shard)
            ratio_ch = None                     # queries from data or a frozen Challenger: nobody to train
            if job.trains_challenger:
                ratio_ch = reference_ratios(job.ref, [job.challenge], [game.query_ids], game.token_logp_q, args,
                                            job.shard)

        # -- loss, step: L = L_Sol + alpha_ch L_Ch of (4), (5). One step on fresh samples, so that pi/sg(pi) is 1 ------
        lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
        with record.phase("train"):
            norm = gradient_step(net, optimizer, game, A_sol, A_ch, ratio_sol, ratio_ch, job.challenge, args, lr,
                                 job.shard)
        bar.update()
        metrics = step_metrics(game, R, R_Q, A_sol, A_ch, ratio_sol, ratio_ch, args)
        metrics |= {**verdicts, "grad_norm": norm, "lr": lr, "tokens_per_second": {
            name: round(game.tokens / (record.seconds[name] - before.get(name, 0)))
            for name in ("sample", "judge", "reference", "train")}}
        record.write("metrics.jsonl", {"step": step + 1, **metrics})
        run.check_finite(metrics, f"step {step + 1}", last_checkpoint(job))
        check_verdicts(step + 1, metrics.get("unread_verdicts", 0.0), job)

        # -- print: every figure is in metrics.jsonl; some queries go to samples.jsonl, where nonsense is seen first ---
        if (step + 1) % args.print_every == 0:
            record.say(line(step + 1, args.steps, metrics))
            write_samples(step + 1, game, R, R_Q, record, args)
        # -- evaluate, save -------------------------------------------------------------------------------------------
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            evaluated(step + 1, job)
            record.save_state(optimizer, iteration=0, step=step + 1, mute_steps=job.mute_steps)
    bar.close()
    finish(job)


# ---------------------------------------------------------------------------------------------------------------------
# sample


@dataclasses.dataclass
class Play:
    """One query with its G answers and what they cost to write."""
    query: challenger.Query
    answers: list                       # G texts, as the judges read them
    prompt: list = ()                   # the Solver's prompt: ids
    answer_ids: list = ()               # G lists of ids
    logp: list = ()                     # G lists: log pi of an answer's tokens under the query, as sampled
    cut_answers: int = 0                # how many of its answers reached their length limit


class Game:
    """One step's play, whole on every rank: N queries with G answers each, a list or tensor for every quantity."""

    def __init__(self, plays):
        self.queries = [play.query.text for play in plays]                      # N texts
        self.query_ids = [play.query.ids for play in plays]                     # N lists of ids; empty ones on data
        self.prompts = [play.prompt for play in plays]                          # N lists of ids
        self.answers = [play.answers for play in plays]                         # N lists of G texts
        self.answer_ids = [play.answer_ids for play in plays]                   # N lists of G lists of ids
        self.token_logp = [logp for play in plays for logp in play.logp]        # N * G lists, a float for each token
        self.token_logp_q = [play.query.logp for play in plays]                 # N lists
        self.logp = torch.tensor([[sum(logp) for logp in play.logp] for play in plays])         # [N, G]
        self.logp_q = torch.tensor([float(sum(logp)) for logp in self.token_logp_q])            # [N]
        self.cut = sum(play.cut_answers for play in plays) / sum(len(play.answers) for play in plays)
        self.cut_queries = sum(play.query.was_cut for play in plays) / len(plays)

    @property
    def tokens(self):
        """Tokens sampled."""
        return sum(map(len, self.query_ids)) + sum(len(a) for group in self.answer_ids for a in group)


def play(net, chat, args, step, challenge, data=None, shard=(0, 1), asker=None, held_out=None):
    """Phase `sample`: N queries, by `asker` (None: net itself) to the prompt `challenge` (ids) or the given `data`, and
    the Solver's G answers to each. Every rank plays its share, with random streams that belong to a query's number."""
    rank, ranks = shard
    mine = range(rank, args.queries, ranks)
    asked = ([challenger.Query(data[i]) for i in mine] if data else
             challenger.ask(asker or net, chat, challenge, args, ("queries", step), mine, held_out))
    plays = [Play(query, [], ids) for query, ids in zip(asked, chat.encode_each([query.text for query in asked]))]
    said = rollout.generate(net, [play.prompt for play in plays], args.answers, args.max_new_tokens,
                            args.temperature, stop_ids=chat.stop_ids, max_rows=args.max_rows,
                            seeds=[run.stream(args.seed, "answers", step) + i for i in mine])
    for each, ids, logprobs, finish in zip(plays, said.tokens, said.logprobs, said.finish):
        each.answers = [without_thinking(chat.decode(answer)) for answer in ids]            # what the judges read
        each.answer_ids, each.logp = ids, logprobs
        each.cut_answers = finish.count("length")
    return Game(parallel.gather(plays, args.queries))


# ---------------------------------------------------------------------------------------------------------------------
# judge


def rewards(judge, game, args, shard):
    """R [N, G] float32, scaled: every rank judges its share of the queries. Of a query that fills the reward model's
    positions by itself it reads the beginning."""
    rank, ranks = shard
    queries = game.queries[rank::ranks]
    if hasattr(judge, "fits"):
        queries = [shortened(q, judge.fits) for q in queries]
    mine = judge.reward(queries, game.answers[rank::ranks]).tolist() if queries else []
    R = torch.tensor(parallel.gather(mine, args.queries))
    if args.challenger_reward == "frontier" and not ((R >= 0) & (R <= 1)).all():
        raise run.UserError(f"--challenger-reward frontier is for rewards in [0, 1], and --reward {args.reward} gave "
                            f"{float(R.min()):g} to {float(R.max()):g}; scale them, or give spread or value")
    return R * args.reward_scale


def advantages(R, R_Q, args):
    """(A_Sol [N, G], A_Ch [N]) of (3) from R and R_Q [N, G]; R_Q None is the zero-sum game.

    V is of R alone: were R_Q added to it first, -V + V_Q would cancel it, and the Challenger would be paid for nothing.

    >>> advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), None, Settings(reward_scale=1.0))
    (tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]]), tensor([ 0.2500, -0.2500]))
    """
    V = R.mean(1)                                                                                   # (2)
    plain = R / args.reward_scale                                                               # in the judge's units
    r_ch = {"value": -V, "spread": R.std(1), "frontier": -(plain.mean(1) - 0.5).abs() * args.reward_scale
            }[args.challenger_reward]
    r_sol = R
    if R_Q is not None:
        r_sol, r_ch = R + R_Q, r_ch + R_Q.mean(1)
    A_sol, A_ch = r_sol - r_sol.mean(1, keepdim=True), r_ch - r_ch.mean()
    if args.std_normalise:
        A_sol, A_ch = A_sol / (r_sol.std(1, keepdim=True) + 1e-4), A_ch / (r_ch.std() + 1e-4)
    return A_sol, A_ch


# ---------------------------------------------------------------------------------------------------------------------
# loss, step


def token_coefficients(advantages, ratio, lengths, longest, args):
    """What multiplies grad log pi of every token in the loss: R float32 tensors, as long as their sequences.

    advantages: [R]; ratio: what `reference_ratios` returns; lengths: R ints. With --kl k2-token or k3-token a token
    has a coefficient of its own, by its own log-ratio l; otherwise a sequence's tokens share one, by the sequence's.
    """
    ratios, by_token = ratio
    weights = kernels.token_weights(lengths, args.normalise, longest)
    if args.kl.endswith("-token"):
        return [weight * kernels.loss_coefficient(A, torch.tensor(l), args.beta, args.kl.removesuffix("-token"))
                for weight, A, l in zip(weights, advantages, by_token)]
    coef = kernels.loss_coefficient(advantages, ratios, args.beta, args.kl) * weights
    return [each.expand(length) for each, length in zip(coef, lengths)]


def policy_pass(net, prompts, responses, coef, scale):
    """Forward and backward of  sum over the responses' tokens of coef log pi(token) * scale:  B prompts, B lists of
    responses, coef: a tensor for each response. Each prompt is computed once."""
    view = model.shared_prefix(net, prompts, responses)
    hidden = net(view.tokens, view)
    coef = torch.cat(coef).to(net.device) * scale                                               # [M]
    loss, _ = kernels.linear_policy_loss(hidden[view.source], net.head.weight, view.target, coef, net.config.logit_cap)
    loss.backward()


@torch.no_grad()
def reference_ratios(ref, prompts, responses, token_logp, args, shard):
    """Phase `reference`: (log pi/pi_Ref of every sequence as sampled, and token by token), on every rank: float32 [R]
    and R lists. B prompts and B lists of as many responses each, or one prompt and all its responses; token_logp: R
    lists, what the sampler said.

    In bfloat16 the sampler's and the forward pass's roundings differ: noise in the ratio of some hundredths of a nat a
    hundred tokens, which beta makes small beside the advantages.
    """
    rank, ranks = shard
    count = len(responses[0]) if len(prompts) == 1 else len(prompts)
    mine, rows = range(rank, count, ranks), []
    for k in range(0, len(mine), args.micro_batch):
        part = mine[k:k + args.micro_batch]
        if len(prompts) == 1:           # the Challenger's: its responses are shared out
            batch = prompts, [[responses[0][i] for i in part]]
        else:
            batch = [prompts[i] for i in part], [responses[i] for i in part]
        logprob, row, of = model.response_logprobs(ref, *batch)
        sums = kernels.sum_rows(logprob, row, of).view(len(part), -1).tolist()
        tokens = [piece.tolist() for piece in logprob.cpu().split(row.bincount().tolist())]
        each = len(tokens) // len(part)
        rows += [(group, tokens[i * each:(i + 1) * each]) for i, group in enumerate(sums)]
    rows = parallel.gather(rows, count)
    theirs = [logp for _, group in rows for logp in group]                      # R lists
    by_token = [[p - q for p, q in zip(*pair)] for pair in zip(token_logp, theirs, strict=True)]
    sampled = torch.tensor([float(sum(logp)) for logp in token_logp])
    return sampled - torch.tensor([logp for group, _ in rows for logp in group]), by_token


def gradient_step(net, optimizer, game, A_sol, A_ch, ratio_sol, ratio_ch, challenge, args, lr, shard=(0, 1)):
    """L = L_Sol + alpha_ch L_Ch of (4) and (5), one optimizer step. Returns the gradient's norm.

    challenge: the Challenger's prompt as ids. ratio_ch: None where only the Solver learns.
    """
    N, G = A_sol.shape
    lengths = [len(a) for group in game.answer_ids for a in group]
    coef = token_coefficients(A_sol.flatten(), ratio_sol, lengths, args.max_new_tokens, args)
    for part, weight in parallel.passes(N, shard, args.micro_batch):
        policy_pass(net, [game.prompts[i] for i in part], [game.answer_ids[i] for i in part],
                    [coef[i * G + j] for i in part for j in range(G)], weight / G)
    if ratio_ch is not None and args.alpha_ch:
        coef = token_coefficients(A_ch, ratio_ch, list(map(len, game.query_ids)), args.max_query_tokens, args)
        for part, weight in parallel.passes(N, shard, args.micro_batch):
            policy_pass(net, [challenge], [[game.query_ids[i] for i in part]], [coef[i] for i in part],
                        args.alpha_ch * weight)
    return optimizer.step(lr, args.clip)


# ---------------------------------------------------------------------------------------------------------------------
# evaluate, and what a run tells about itself


def evaluated(step, job):
    """Phase `evaluate`: a checkpoint, and its row of the table, after so many steps; 0 is the initial model."""
    record, name = job.record, f"step {step}" if step else "base"
    if not step:
        with record.phase("evaluate"):
            job.board.draw_base(job.ref, "test")
    if name not in job.board:
        with record.phase("evaluate"), parallel.gathered(job.net):
            if step and job.shard[0] == 0:
                lora.save_as(job.args.save, job.net, record.path(f"step-{step}"), job.chat.directory, job.base)
            job.board.add(name, job.net if step else job.ref, more=lambda: figures_of(step, job))
        if step < job.args.steps:               # after the last one `finish` does it
            summarised(job)
    record.say(winrate.table(job.board.rows))


def summarised(job):
    """Writes summary.json and curves.png of all that was evaluated so far."""
    args, record, name = job.args, job.record, method(job.args)
    summary = record.write_summary(name, args, job.base, job.device, job.shard[1], job.board.rows)
    if job.shard[0] == 0:
        plots.plot([(name, summary)], record.path("curves.png"))


def figures_of(step, job):
    """What stands in a row besides its win rates: when it was made, and what the Challenger asks, by fresh queries."""
    args, figures = job.args, {"seconds": round(job.record.total_seconds(), 1)} if step else {}
    if job.challenge is None:
        return figures
    stage, spoken = step - 1 if step else "base", world.WORLDS.get(args.world)
    count = FRESH[0] if spoken else FRESH[1]
    asking = dataclasses.replace(args, queries=count, answers=1, max_new_tokens=1)                  # answers: not used
    game = play(job.net if step else job.ref, job.chat, asking, ("figures", stage), job.challenge, shard=job.shard,
                asker=job.asker if step else job.ref)
    asked = challenger.query_metrics(game.queries, game.query_ids, spoken)
    if spoken:
        seed = run.stream(args.seed, "figures", stage)
        asked["base_accuracy"] = challenger.base_accuracy(game.queries, spoken, job.ref, job.chat, seed)
    return asked | figures


def restored(job, optimizer):
    """Loads what an interrupted run had saved; returns the number of steps that it had made."""
    record, state = job.record, job.record.training_state(0)
    if record.state is None and record.resumed:
        record.say("no state was saved yet: training starts at step 1")
    record.restore(optimizer, state)
    job.mute_steps = state.get("mute_steps", 0)
    return state["step"]


def check_verdicts(step, share, job):
    """share: of the self-reward's verdicts that could not be read. Without them the game is the zero-sum one and looks
    healthy, so the run says it, and raises UserError after ten steps in a row with most of them unread."""
    job.mute_steps = job.mute_steps + 1 if share > 0.5 else 0
    told = (f"step {step}: {share:.0%} of the self-reward's verdicts could not be read, which leaves the game of "
            "--mode lsp-zero; begin again (--overwrite) with more --max-verdict-tokens, with another "
            "--self-reward-prompt, or with --self-reward expected")
    if job.mute_steps == 1:
        job.record.say(told + " (ten such steps in a row end the run)")
    if job.mute_steps >= 10:
        raise run.UserError(told + " (for ten steps in a row)")


def last_checkpoint(job):
    """The last one that was saved, else the initial model."""
    name = job.board.rows[-1]["name"].replace(" ", "-")
    return job.record.path(name) if name.startswith("step") else job.base


def write_samples(step, game, R, R_Q, record, args):
    """The first three queries of a step with one answer each, to be read by a person."""
    for i in range(min(3, args.queries)):
        record.write("samples.jsonl", {"step": step, "query": game.queries[i], "answer": game.answers[i][0],
                                       "reward": float(R[i, 0]) / args.reward_scale,
                                       "self_reward": None if R_Q is None else float(R_Q[i, 0])})


def step_metrics(game, R, R_Q, A_sol, A_ch, ratio_sol, ratio_ch, args):
    """A step's row of metrics.jsonl, but for what the phases add. Rewards in the judge's units; nats; tokens."""
    metrics = {"reward": float(R.mean()) / args.reward_scale, "spread": float(R.std(1).mean()) / args.reward_scale,
               "kl_solver": float(ratio_sol[0].mean()), "entropy_solver": float(-game.logp.mean()),
               "advantage_solver": float(A_sol.abs().mean()), "cut": game.cut,
               "answer_tokens": sum(len(a) for group in game.answer_ids for a in group) / A_sol.numel()}
    if R_Q is not None:
        metrics["self_reward"] = float(R_Q.mean())
    if ratio_ch is not None:
        metrics |= {"kl_challenger": float(ratio_ch[0].mean()), "advantage_challenger": float(A_ch.abs().mean())}
    if any(game.query_ids):
        metrics |= {"entropy_challenger": float(-game.logp_q.mean()), "cut_queries": game.cut_queries,
                    "query_tokens": sum(map(len, game.query_ids)) / len(game.query_ids),
                    **challenger.query_metrics(game.queries, game.query_ids, world.WORLDS.get(args.world))}
    return metrics


def line(step, steps, m):
    """A step's printed line, from its metrics m."""
    text = f"step {step}/{steps}: reward {m['reward']:.3f}, {m['cut']:.0%} cut, KL of the Solver {m['kl_solver']:+.2f}"
    if "kl_challenger" in m:
        text += f", of the Challenger {m['kl_challenger']:+.2f}"
    if "query_tokens" in m:
        text += "; queries: "
        if "malformed" in m:
            text += f"malformed {m['malformed']:.1%}, {m['ops']:.2f} operations, "
        text += f"{m['query_tokens']:.0f} tokens, {m['cut_queries']:.0%} cut, {m['distinct']:.0%} distinct"
    if "self_reward" in m:
        text += f"; self-reward {m['self_reward']:.2f}, {m['unread_verdicts']:.0%} of verdicts unread"
    return text


def finish(job):
    """The end of a run: the summary, what was asked over time, and where the seconds went."""
    summarised(job)
    if job.shard[0] == 0 and job.challenge is not None:
        job.record.say(challenger.queries_over_time(job.record.path("samples.jsonl")))
    job.record.say_where()


# ---------------------------------------------------------------------------------------------------------------------
# set-up: bad input is refused before long work, and before anything is written


@dataclasses.dataclass
class Job:
    """What the phases of a run work with."""
    args: Settings
    device: torch.device
    shard: tuple                                # (rank, number of ranks)
    record: run.Run = None                      # the run's directory, journals and clock
    base: str = ""                              # the initial model, a checkpoint
    net: model.Transformer = None               # what is trained, Challenger and Solver in one
    ref: model.Transformer = None               # pi_Ref, the frozen initial model, or a lora.Reference: for KL and R_Q
    chat: Chat = None
    judge: object = None                        # gives R
    self_reward: object = None                  # gives R_Q; None in the zero-sum game and on data
    challenge: list = None                      # cp, the Challenger's prompt as ids; None where queries come from data
    trains_challenger: bool = False             # no where queries come from data or the Challenger is frozen
    asker: model.Transformer = None             # whom cp is given to: net, or ref where the Challenger is frozen
    held_out: object = None                     # is this text kept for evaluation? Such a query is written anew
    data: list = None                           # a list of N queries for each step, where they do
    board: winrate.Scoreboard = None
    mute_steps: int = 0                         # how many steps in a row the self-reward could hardly be read


def set_up(argv):
    """Settings, ranks, models, judge, prompts and run directory: the Job that `main` works on."""
    args = settle(parse(Settings, argv, __doc__.split("\n\n")[0]
                          + "\n\nA default in [brackets]; docs/metrics.md explains every logged figure.", PRESETS,
                          {**{name: world.WORLDS[name].lsp | world.WORLDS[name].lsp_reward["value"]
                              for name in PLAYABLE}, "real models": REAL}))
    device, dtype = run.device_and_dtype(args.device, "float32" if args.dtype == "auto" and args.world else args.dtype)
    rank, ranks, device = parallel.init_ranks(device, args.rank_timeout)
    job = Job(args, device, (rank, ranks))
    check_memory(args, device, dtype, ranks)
    if rank == 0:
        run.check_out(args.out, args, args.resume, args.overwrite)
    asked, (job.data, test) = challenger.prompt(args), read_data(args)
    job.judge = prefmodel.load(args.reward, device=device, dtype=dtype)
    table_judge = prefmodel.load(args.judge, device=device, dtype=dtype) if args.judge else job.judge
    check_reward(job.judge, args)
    job.base = initial_model(args) or parallel.on_rank_0_first(
        rank, lambda: world.base(world.WORLDS[args.world], device))
    job.net = model.Transformer.from_pretrained(job.base, device, dtype)
    job.chat = Chat(job.base, job.net, args.template_option)
    if args.world:
        winrate.check_speaks_world(job.base, job.net, job.chat, world.WORLDS[args.world], "--model",
                                   "--reward reward:DIR_OR_HUB_ID too, which reads natural language")
    job.net.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        job.net.compile_layers()
    lora.check_base(args, job.base, job.net.config)
    lora.adapt(job.net, args)
    job.ref = (lora.Reference(job.net) if args.lora else
               model.Transformer.from_pretrained(job.base, device, dtype).requires_grad_(False))
    if job.data is None:
        job.challenge = job.chat.encode(asked)
        job.trains_challenger = args.challenger == "trained"
        job.asker = job.net if args.challenger == "trained" else job.ref
    check_prompts(job, test, table_judge)
    if args.mode == "lsp":
        job.self_reward = prefmodel.SelfReward(job.ref, job.chat, args.self_reward, args.self_reward_prompt,
                                               args.max_verdict_tokens, args.max_rows, args.seed, bool(args.world))
    job.record = record = run.Run(args.out, args, args.resume, args.overwrite, rank)
    record.say(f"{method(args)} on {device} ({str(dtype)[6:]}, {ranks} process{'es' * (ranks > 1)}): {job.base}; "
               f"{args.steps} steps of {args.queries} queries x {args.answers} answers, beta {args.beta:g}, alpha_ch "
               f"{args.alpha_ch:g}, lr {args.lr:g}; writing to {args.out}")
    if test is None:
        kept = record.path("state", "test.jsonl")
        test = (read_prompts(kept) if args.resume and os.path.exists(kept)
                else challenger.initial_queries(job.ref, job.chat, job.challenge, args, args.test_prompts, job.shard))
    job.held_out = challenger.kept_for_evaluation(args, test)
    if rank == 0:
        files.write_json(record.path("state", "initial.json"), {"initial": str(job.base)})
        files.write_rows(record.path("state", "test.jsonl"), map(as_row, test))
    parallel.barrier()
    job.board = winrate.Scoreboard(record, job.chat, table_judge,
                                   {"test": (test, job.chat.encode_all(test, 0, args.max_new_tokens))},
                                   winrate.Sampling(args.max_new_tokens, max_rows=args.max_rows), args.seed, job.shard)
    return job


def check_memory(args, device, dtype, ranks):
    """--plan; else a warning where the run will not fit. The longest row that is sampled is an answer behind its query,
    or a verdict on both, whose rubric has about 400 tokens."""
    longest = args.max_query_tokens + args.max_new_tokens
    if args.mode == "lsp" and args.self_reward == "sample":
        longest += 400 + args.max_verdict_tokens
    memory.before(args, device, dtype, ranks, answers=args.answers, prompt=args.max_query_tokens,
                  answer=args.max_new_tokens, width=longest, moments=8, judges=[args.reward, args.judge],
                  reference=True, between=True)


def check_prompts(job, test, table_judge):
    """Raises UserError where the context holds no query, or not a prompt and its longest answer; and for a prompt
    without the right answer that a verifier needs."""
    args, chat = job.args, job.chat
    if job.challenge is not None and len(job.challenge) > chat.room(0, args.max_query_tokens):
        raise run.UserError(f"the Challenger's prompt has {len(job.challenge)} tokens, and --max-query-tokens "
                            f"{args.max_query_tokens} do not fit after it into the model's context of {chat.context}; "
                            "lower them, or give a shorter --challenger-prompt")
    prompts = [*dict.fromkeys(sum(job.data or [], []) + (test or []))]
    chat.encode_all(prompts, 0, args.max_new_tokens)
    prefmodel.check_references(job.judge, prompts)
    prefmodel.check_references(table_judge, test or [])
    if chat.room(0, args.max_new_tokens) < len(chat.encode("")) + 1:
        raise run.UserError(f"--max-new-tokens {args.max_new_tokens} leaves no room for a query in the model's context "
                            f"of {chat.context} tokens; lower it")


def settle(args):
    """Fill in what was not given, and refuse what makes no sense. Returns the completed Settings."""
    reward = args.reward or prefmodel.judge_of(args.world or "operations")
    spoken = prefmodel.world_of(reward)
    name = next((name for name, entry in world.WORLDS.items() if entry is spoken), "")
    if args.world and args.world != name:
        raise run.UserError(f"--world {args.world} is judged by its own oracle; leave --reward {args.reward} out, or "
                            "--world")
    if spoken and not spoken.lsp:
        raise run.UserError(f"--reward {reward} is of a world without a Challenger; leave it out, or give another")
    args = dataclasses.replace(args, world=name, reward=reward)
    if args.gradient_accumulation > 0 and args.micro_batch not in (None, PRESETS.get(args.preset, {}).get(
            "micro_batch")):
        raise run.UserError("--gradient-accumulation and --micro-batch say the same thing; give one of them")
    check_mode(args)
    check_models(args)
    lora.check_flags(args)
    defaults = REAL | ({"lr": 1e-6} if args.mode == "grpo" else {})
    if name:
        paid = ("grpo" if args.mode == "grpo" else
                "frozen" if args.challenger == "frozen" else args.challenger_reward)
        if paid not in spoken.lsp_reward:
            raise run.UserError(f"--world {name} has no settings for {paid}; add them to lsp_reward in world.WORLDS")
        defaults = spoken.lsp | spoken.lsp_reward[paid]
    if args.gradient_accumulation > 0:
        passes = args.gradient_accumulation * parallel.set_by_torchrun("WORLD_SIZE", 1)
        args = dataclasses.replace(args, micro_batch=math.ceil((args.queries or defaults["queries"]) / passes))
    return dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})


def check_mode(args):
    """Raises UserError for flags that do nothing in the mode. What a preset sets for another mode is let go instead."""
    preset = PRESETS.get(args.preset, {})
    judging = ("self_reward", "max_verdict_tokens", "self_reward_prompt")
    asking = ("challenger", "challenger_reward", "alpha_ch", "max_query_tokens", "task", "template",
              "challenger_prompt")
    unused = dict.fromkeys({"lsp": (), "lsp-zero": judging, "grpo": judging + asking}[args.mode],
                           f"in --mode {args.mode}")
    if args.challenger == "frozen":
        unused = dict.fromkeys(("challenger_reward", "alpha_ch"), "with --challenger frozen") | unused
    for field in dataclasses.fields(args):
        if field.name in unused and getattr(args, field.name) not in (field.default, preset.get(field.name)):
            raise run.UserError(f"--{field.name.replace('_', '-')} does nothing {unused[field.name]}; leave it out")
    if args.self_reward == "expected" and args.max_verdict_tokens is not None:
        raise run.UserError("--max-verdict-tokens is for --self-reward sample; with expected no verdict is written")
    if args.prompts and args.mode != "grpo":
        raise run.UserError(f"--prompts is for --mode grpo; in --mode {args.mode} the Challenger writes the queries "
                            "(--eval-prompts are those of the final table)")
    if args.train_prompts and args.mode != "grpo":
        raise run.UserError(f"--train-prompts is for --mode grpo; in --mode {args.mode} there are no training prompts")
    if args.mode != "grpo" and args.reward.startswith("verify:"):
        raise run.UserError(f"--reward {args.reward} knows the answers to --prompts alone, not to what a Challenger "
                            "asks; give --mode grpo")
    if args.challenger_reward == "frontier" and args.reward.startswith("reward:"):
        raise run.UserError("--challenger-reward frontier is for rewards in [0, 1]; give spread or value")


def check_reward(judge, args):
    """Raises UserError for a judge that only compares answers, and for bounds that do not fit `frontier`."""
    if not hasattr(judge, "reward"):
        raise run.UserError(f"--reward {args.reward} rates no single answer; give a function of prompt, answer and row")
    low, high = getattr(judge, "bounds", None) or (0, 1)        # not declared: `rewards` looks at every one
    if args.challenger_reward == "frontier" and not 0 <= low <= high <= 1:
        raise run.UserError(f"--challenger-reward frontier is for rewards in [0, 1], and those of {args.reward} lie in "
                            f"[{low}, {high}]; give spread or value, or scale them")


def check_models(args):
    """Raises UserError where the reward, the model or the prompts are missing, or of two worlds."""
    if not args.world and not re.match("(reward|python|verify):.", args.reward):
        raise run.UserError(f"--reward {args.reward} gives no rewards; give reward:DIR_OR_HUB_ID, a sequence "
                            "classifier with one label, python:FILE.py:FUNCTION or verify:gsm8k")
    spoken = prefmodel.world_of(args.judge) if args.judge else None
    if spoken and (not args.world or spoken is not world.WORLDS[args.world]):
        raise run.UserError(f"--judge {args.judge} knows only its embedded world's queries; give pairrm:DIR_OR_HUB_ID, "
                            "or leave it out")
    if args.model and args.init and args.model != PRESETS.get(args.preset, {}).get("model"):
        raise run.UserError("--model and --init both say where to start; give one of them")
    challenger.check_fixed_modes(args, ("task", "template", "challenger_prompt", "self_reward_prompt"))
    if not args.world and not args.model and not args.init:
        raise run.UserError(f"--reward {args.reward} reads natural language: give --model DIR_OR_HUB_ID too")
    if not args.world and args.mode == "grpo" and not args.prompts:
        raise run.UserError("--mode grpo trains on data: give --prompts FILE")


def initial_model(args):
    """The checkpoint to start from, or "" for the world's base: --model, or the last one of the run in --init. A
    resumed run stays with the one it began with, even if the run in --init has gone on since."""
    began = os.path.join(args.out, "state", "initial.json")
    if args.resume and os.path.exists(began):
        with files.restoring(began):
            return os.fspath(files.read_json(began)["initial"])
    found = run.last_checkpoint(args.init) if args.init else args.model
    if found is None:
        raise run.UserError(f"--init {args.init} holds no checkpoint iter-k or step-k; give a run's directory")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# prompts


def read_data(args):
    """(training queries of --mode grpo, one list a step, or None; prompts of the final table, or None where the initial
    model has to write them). Raises UserError where there are too few."""
    train = read_prompts(args.prompts) if args.prompts else None
    test = read_prompts(args.eval_prompts, "--eval-prompts")[:args.test_prompts] if args.eval_prompts else None
    if args.world:
        spoken = world.WORLDS[args.world]
        if args.mode == "grpo" and not train:
            train = spoken.queries("train", args.train_prompts or args.steps * args.queries, args.seed,
                                   distinct=args.train_prompts > 0)
        elif train and any(map(spoken.held_out, train)):
            raise run.UserError(f"--prompts {args.prompts} holds queries of the embedded world's validation and test "
                                "parts; leave them out (world.World.held_out knows them)")
        test = test or spoken.queries("test", args.test_prompts)
        if not all(map(spoken.parse, (train or []) + test)):
            raise run.UserError("the oracle knows only the embedded world's queries; for other --prompts and "
                                "--eval-prompts give --model and --reward reward:DIR_OR_HUB_ID")
    elif train and not test:                    # the same ones whatever the seed
        test = run.shuffled(train, "held-out prompts")[:args.test_prompts]
    if train:
        held = set(test)
        train = [p for p in train if p not in held]
        if args.train_prompts and args.prompts:
            train = run.shuffled(train, args.seed, "training prompts")[:args.train_prompts]
        if len(train) < min(args.queries, args.train_prompts or args.queries):
            raise run.UserError(f"--prompts {args.prompts} leaves {len(train)} prompts to train on beside "
                                f"{len(test)} of the final table; a step takes --queries {args.queries}: give more, or "
                                "lower --test-prompts")
        train = in_steps(train, args.steps, args.queries, args.seed, keep_order=bool(args.world))
    return train, test


def method(args):
    """What tables and pictures call the run."""
    name = args.mode + (f", {args.challenger_reward}" if args.challenger_reward != "value" else "")
    name += ", frozen Challenger" if args.challenger == "frozen" else ""
    name += f", LoRA {args.lora}" if args.lora else ""
    name += f" on {args.train_prompts} queries" if args.train_prompts else ""
    before = os.path.join(args.init, "summary.json") if args.init else ""
    return name + (f" after {files.read_json(before)['method']}" if os.path.exists(before) else "")


if __name__ == "__main__":
    run.main(main)
