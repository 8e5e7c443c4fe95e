"""SPPO: Self-Play Preference Optimization (Wu et al., arXiv 2405.00675). `python sppo.py`

The game: two language models answer the same prompt x, and a judge says how likely the one answer y beats the other,
P(y > y' | x). No scores are assumed, so a beats b beats c beats a is allowed. What one wants is the policy that nobody
beats more than half the time, the Nash equilibrium. Self-play by multiplicative weights approaches it, in the average
over t (Theorem 4.1):

    pi_{t+1}(y|x) = pi_t(y|x) exp( eta P(y > pi_t | x) ) / Z(x)                                                    (4.1)

Taking logarithms turns the update into a regression that a language model can do. In place of log Z(x) the paper puts
eta / 2, its value for small eta. For a larger eta it is more, by as much for all answers to x: targets are then too
high, but in the right order. For each iteration t:

    sample   K answers y_1..y_K ~ pi_t(.|x) for each prompt of this iteration's part
    judge    all pairs;  Phat(y_i > pi_t | x) = (1/K) sum_k P(y_i > y_k | x), itself included (1/2)
    loss     ( log pi(y|x) / pi_t(y|x)  -  eta (Phat(y > pi_t | x) - 1/2) )^2,  a mean over answers                (4.7)
             as in the experiments, over the best and the worst; --all-responses takes all K, as the theorem does
    step     pi_t is both the starting point and the reference; the result is pi_{t+1}

--loss runs the same loop with another loss: iterative DPO and IPO, the paper's baselines, and sppo-hard, (4.7) with
the preferences rounded to 1 and 0. --world intransitive is a game of three styles where no style is best.

Deviations from the paper, each with its reason:
  - an embedded world has settings of its own (world.WORLDS, which says how they were picked), `intransitive` all K
    responses too: eta = 1e3 with lr 5e-7 suits 7B models, not 300k parameters
  - a checkpoint is chosen after each epoch by win rate on validation prompts, as in section 5.1, but against the base,
    with the run's own judge; the test prompts play no part in any choice. With one epoch, the default for real
    prompts, there is one candidate and the figure only reports. --keep last makes no choice
  - best and worst are by Phat (optimistic play: p*), the loss's own, also where PairRM's aggregate score would differ
  - prompts whose K answers all tie stay in, so that a part's size does not depend on the judge: SPPO then holds one of
    them where it is, DPO and IPO add a constant to the loss
  - validation and test answers are sampled at T = 1, also with --preset (eval.py generate has the papers' decoding)
  - the learning-rate schedule spans an iteration's own epochs; --schedule-epochs 18 gives the paper's, which schedules
    18 and keeps the first one's result, still warming up, at .56 of the peak rate
  - optimizer state starts afresh in each iteration, and pi_{t+1} is what its checkpoint holds: in bfloat16 the float32
    masters end with the iteration, as in the official code, whose iterations are separate runs
  - IPO's margin is 1/(2 beta), as in its own paper (arXiv 2310.12036) and in TRL; SPPO's (4.14) has 1/beta. Its
    log-ratios are sums over tokens, as in that paper and the official code; TRL 1.16 takes means, so that its beta 0.1
    is another
  - the learning rate is one step ahead of Hugging Face's linear schedule, whose first step has rate 0
  - a reward used as a judge becomes a preference by Bradley-Terry, P = sigmoid(r - r'), and is transitive by that
  - --self-play optimistic or magnetic, off by default, changes what stands in Phat's place: where a judge's taste runs
    in a circle, so do SPPO's iterates; in exact play (games.py) these two come to rest
  - not in the paper: gradients clipped at norm 1 (--clip; the official code's trainer does it too), AdamW betas
    (.9, .98), the baselines' beta (the paper does not say which it used)
  - off by default: --lora trains adapters of low rank in place of all weights (lora.py)
Deviations from the official code (--preset takes its settings):
  - sampling at T = 1 and top_p = 1 as in the paper; the code has .7 and .9 (with --preset)
  - --estimator pairwise keeps the judge's cycles; the code's, `aggregate`, comes with --preset
  - PairRM reads the raw prompt, as it was trained to, not the chat-templated one
  - sampled ids are trained on as they are, never decoded and encoded again: no prompt is cut at the word "None", the
    assistant's header is no part of the answer, there is one BOS and one end of turn, and a cut answer gets no end
  - answers have up to 1,024 tokens; the code samples 2,048 and cuts prompt and answer together to 1,024. With --preset
    sampling stops there
  - an over-long prompt is refused or, with --drop-long-prompts (in the presets), left out and counted, not truncated:
    beyond 512 tokens only where prompt and longest answer exceed the total, as the official code keeps the others whole
  - validation and test prompts never train; the code's "test" rows are drawn from its training data

    python sppo.py                                  # the embedded world, minutes on a CPU
    python sppo.py --loss dpo --out out/dpo         # a baseline
    python sppo.py --world intransitive --out out/cycle
    python sppo.py --prompts challenger             # without prompts: pi_t asks, as in lsp.py
    python sppo.py --preset mistral-7b              # the official code's settings; --help lists what they are
    python sppo.py --model mistralai/Mistral-7B-Instruct-v0.2 \
                   --judge pairrm:llm-blender/PairRM --prompts ultrafeedback.jsonl
    torchrun --nproc_per_node=8 sppo.py ...         # the same, prompts shared out
"""

import dataclasses
import gc
import math
import os

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
from chat import (Chat, answer_limit, as_row, digests, earlier_session, read_prompts, read_sources, shorter_sessions,
                  split_prompts)
from flags import flag, parse
from table import (answer_texts, check_nothing_later, check_stage, check_stage_flags, check_training_rows, chooses,
                   encode_prompts, judge_answers, needs, put_table, read_table, readable_row, table_row,
                   training_examples, without_long_prompts)

# What a setting is when its flag is not given and real prompts are played: section 5.1, and where that is silent the
# official code (RMSProp, 512 tokens for a prompt and 1,024 for both together; here: 1,024 for the answer). What it is
# in an embedded world stands in the world's entry.
PAPER = dict(iterations=3, prompts_per_iteration=20000, batch_size=64, all_responses=False, keep="best",
             optimizer="rmsprop", max_new_tokens=1024, max_prompt_tokens=512, max_query_tokens=512, micro_batch=1,
             max_rows=128, chunk=512, validation_prompts=256, test_prompts=256, print_every=1, save_every=100)
# The paper and its code publish no beta for their DPO and IPO: 0.1 is what DPO's and IPO's users start from.
PAPER_LOSS = {"sppo": dict(eta=1e3, lr=5e-7, epochs=1), "sppo-hard": dict(eta=1e3, lr=5e-7, epochs=1),
              "dpo": dict(beta=0.1, lr=5e-7, epochs=1), "ipo": dict(beta=0.1, lr=5e-7, epochs=1)}
LOSSES = tuple(PAPER_LOSS)
MAGNET = dict(magnet=0.33, magnet_every=10, all_responses=True)     # the defaults of --self-play magnetic

# The official code's settings; a flag given beside --preset wins. For the paper's own add
# --schedule-epochs 18 --temperature 1 --top-p 1.
RELEASED = dict(
    judge="pairrm:llm-blender/PairRM", estimator="aggregate",
    prompts=",".join(f"UCLA-AGI/data-mistral-7b-instruct-sppo-iter{t}" for t in (1, 2, 3)), iterations=3,
    prompts_per_iteration=0, k=5, temperature=0.7, top_p=0.9, loss="sppo", eta=1e3, lr=5e-7, optimizer="rmsprop",
    warmup=0.1, epochs=1, batch_size=64, clip=1.0, max_prompt_tokens=512, max_new_tokens=1024, max_total_tokens=1024,
    drop_long_prompts=True, activation_checkpointing=True)
PRESETS = {
    "mistral-7b": RELEASED | dict(model="mistralai/Mistral-7B-Instruct-v0.2"),
    "llama-3-8b": RELEASED | dict(model="meta-llama/Meta-Llama-3-8B-Instruct"),
    "gemma-2-9b": RELEASED | dict(model="google/gemma-2-9b-it"),
}


@dataclasses.dataclass
class Settings(challenger.Settings):
    """Flags of `python sppo.py`."""
    preset: str = flag("", "the official code's settings for a model, as PRESETS spells them out; other flags override",
                       tuple(PRESETS))
    world: str = flag("",
        "the embedded world that is played where no prompts are given: an entry of world.WORLDS, such as operations or "
        "intransitive (three styles, each beaten by another) [operations, unless --prompts, --preset or --table]",
        tuple(world.WORLDS))
    model: str = flag("",
        "pi_1: a checkpoint directory or hub id (llama, mistral, qwen2, qwen3, gemma2, olmo2, phi3, smollm3); without "
        "it the embedded world's base")
    judge: str = flag("", "P(y > y' | x): oracle, oracle:WORLD or styles (the embedded worlds' own), "
                          + prefmodel.KINDS)
    estimator: str = flag("pairwise",
        "PairRM's logits to P: pairwise = sigmoid((M_ij - M_ji)/2); "
        "aggregate = the official code's, which loses cycles", ("pairwise", "aggregate"))
    prompts: str = flag("",
        "file: .jsonl, .json or .parquet with prompt, instruction (+ input), messages or conversations; .txt with one "
        "a line; or a hub data set, owner/name[/config][:split] (needs `datasets`); or several with commas between, "
        "one for each iteration; or the word challenger: pi_t writes the prompts of iteration t, as in lsp.py")
    iterations: int | None = flag(None,
        "T, rounds of self-play, each on its own part of the prompts (section 5.1: 3)", at_least=1)
    prompts_per_iteration: int | None = flag(None, "prompts sampled in each iteration; 0 = all there are", at_least=0)
    k: int = flag(5, "K, answers sampled per prompt (section 5.1: 5)", at_least=2)
    loss: str = flag("sppo",
        "sppo = (4.7); sppo-hard = (4.7) with p = 1 and 0; dpo, ipo = the paper's baselines, on the same best and "
        "worst answers; each has its own eta or beta, lr and epochs, and --help shows sppo's", LOSSES)
    all_responses: bool | None = flag(None,
        "all K answers in SPPO's loss, as in Theorem 4.1, instead of the best and the worst")
    self_play: str = flag("plain",
        "what stands in Phat's place in (4.7): plain = P(y > pi_t), the paper's; optimistic = 2 P(y > pi_t) - P(y > "
        "pi_{t-1}), not shrunk by (K-1)/K as Phat is, for K more answers a prompt and 45 pairs judged instead of 10; "
        "magnetic = P(y > pi_t) and a pull to an earlier policy, over all K answers, for one more forward pass",
        ("plain", "optimistic", "magnetic"))
    magnet: float | None = flag(None, f"magnet's weight w, pi_t's is 1 - w [{MAGNET['magnet']}]", above=0, at_most=1)
    magnet_every: int | None = flag(None,
        "iterations between two moves of the magnet to pi_t; with 0, or fewer iterations, it stays at pi_1, and play "
        f"rests beside the equilibrium [{MAGNET['magnet_every']}]", at_least=0)
    eta: float | None = flag(None,
        "eta, step size of multiplicative weights in (4.1); targets are eta (Phat - 1/2); another for each --loss, and "
        "in intransitive for --self-play optimistic (3) and magnetic (3.3, --lr 1e-3)", above=0)
    beta: float | None = flag(None,
        "beta of DPO, and of IPO, whose margin is 1/(2 beta); another for each --loss", above=0)
    lr: float | None = flag(None, "peak learning rate (section 5.1: 5e-7); another for each --loss", above=0)
    optimizer: str | None = flag(None, "adamw or rmsprop", ("adamw", "rmsprop"))
    epochs: int | None = flag(None, "passes over an iteration's answers; another for each --loss", at_least=1)
    schedule_epochs: int = flag(0, "epochs that the learning rate is planned for (paper: 18); 0 = --epochs", at_least=0)
    keep: str | None = flag(None, "pi_{t+1}: the epoch best on validation prompts, or the last", ("best", "last"))
    warmup: float = flag(0.1, "share of the scheduled steps over which the learning rate rises, to fall after "
                              "(section 5.1: 0.1)", at_least=0, at_most=1)
    batch_size: int | None = flag(None,
        "prompts per optimizer step, over all ranks (section 5.1: 64); two answers each", at_least=1)
    micro_batch: int | None = flag(None,
        "prompts per forward and backward pass and rank; less saves memory, the gradient is the same", at_least=1)
    temperature: float = flag(1.0,
        "of sampling (section 5.1: 1); above 0, for greedy decoding would draw the same answer K times", above=0)
    top_p: float = flag(1.0, "nucleus of sampling answers, in (0, 1] (section 5.1: 1)", above=0, at_most=1)
    top_k: int = flag(0, "sample answers among the k likeliest tokens; 0 = all", at_least=0)
    max_prompt_tokens: int | None = flag(None,
        "longest prompt in tokens, template included; 0 = whatever the context allows (see --drop-long-prompts)",
        at_least=0)
    max_total_tokens: int = flag(0, "most tokens of prompt and answer together; 0 = no such bound", at_least=0)
    drop_long_prompts: bool = flag(False,
        "leave out prompts that are too long, and say how many, instead of refusing; with --max-total-tokens a prompt "
        "beyond --max-prompt-tokens goes only where an answer that enters the loss is cut by that total")
    chunk: int | None = flag(None,
        "prompts between two writes while answers are sampled or judged: what an interruption costs at most",
        at_least=1)
    validation_prompts: int | None = flag(None,
        "held-out prompts that choose the checkpoint, with --keep best", at_least=1)
    test_prompts: int | None = flag(None,
        "held-out prompts of the final table; nothing is chosen on them", at_least=1)
    save_every: int | None = flag(None,
        "optimizer steps between saved states, besides those at every epoch's end; 0 = only those", at_least=0)
    stage: str = flag("", "do one part of one iteration and stop: sample, judge or train, each on any machine",
                      ("sample", "judge", "train"))
    iteration: int = flag(1, "t, the iteration that --stage works on", at_least=1)
    table: str = flag("",
        "with --stage judge or train: a .jsonl table from elsewhere, in the official code's columns, instead of the "
        "run's own")
    out: str = flag("out/sppo", "the run's directory")


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def main(argv):
    """The whole run: for every iteration sample, judge, loss, step, evaluate; then the summary.

    pi_1 is the base, and iteration t writes pi_{t+1} as the checkpoint iter-t. Every phase reads its result if that is
    on disk, and makes it otherwise: so resuming a run, doing one phase at a time (--stage), and training on a table
    from elsewhere (--table) are the same thing.
    """
    job = set_up(argv)
    if job.args.stage:
        return one_phase(job)
    evaluated(0, job)                           # the base, which every later model is compared with
    for t in range(1, job.args.iterations + 1):
        if not os.path.exists(job.pi_path(t + 1)):
            # K answers of pi_t to every prompt of part t. They are drawn anew in each iteration, from the very policy
            # that is about to change: that makes it self-play, and not learning from a fixed set of preferences.
            rows = sampled(t, job)
            # P(y_i > y_k | x) for all pairs, so that Phat compares every answer with pi_t itself, as (4.1) asks.
            rows = judged(t, rows, job)
            # The best and the worst answer to each prompt, or all K, with their Phats (table.ranked).
            examples, statistics = picked(t, rows, job)
            rows = None                         # their texts are not needed any more, and take much memory
            # The regression (4.7). Its result is pi_{t+1}, the next iteration's start and reference.
            trained(t, examples, statistics, job)
        evaluated(t, job)
    finish(job)


def one_phase(job):
    """--stage: one phase of one iteration. The phases before it find their results on disk and read them."""
    t, stage = job.args.iteration, job.args.stage
    if stage == "train" and chooses(job.args):  # the answers that every epoch is compared with
        job.board.draw_base(job.network(job.base), "validation")
    rows = sampled(t, job)
    if stage != "sample":
        rows = judged(t, rows, job)
    if stage == "train":
        trained(t, *picked(t, rows, job), job)
    made, after = {"sample": (f"table-{t}.jsonl", "next: the same flags with --stage judge"),
                   "judge": (f"table-{t}.jsonl", "next: the same flags with --stage train"),
                   "train": (f"iter-{t}", "compare it with eval.py winrate")}[stage]
    job.record.say(f"wrote {job.record.path(made)}; {after}")


def trained(t, examples, statistics, job):
    """Phase `train` of iteration t: loss and step on the picked answers, until the checkpoint iter-t holds pi_{t+1}."""
    args, record = job.args, job.record
    # pi_t is two things at once: where training starts, and the reference that log-ratios are taken against. So its
    # log-probabilities are computed first, before any weight moves.
    check_nothing_later(t, record.out)
    net = job.take(job.pi_path(t))
    lora.adapt(net, args, t)
    state = record.training_state(t)            # {"step": 0}, or what an interrupted training of this iteration left
    reference_logprobs(net, examples, args, t, job.shard, record, resumed=state["step"] > 0)
    if args.self_play == "magnetic":
        draw_to_magnet(t, examples, job)
    # The optimizer starts afresh too: its moments belong to another regression.
    net = parallel.shard(net)                   # with several processes: each updates a share of the weights
    optimizer = kernels.Optimizer(net.parameters(), args.optimizer, args.weight_decay)
    record.restore(optimizer, state)            # --resume in the middle of this iteration

    per_epoch, first, best = math.ceil(len(examples) / args.batch_size), state["step"], state.get("best")
    steps, scheduled = args.epochs * per_epoch, (args.schedule_epochs or args.epochs) * per_epoch
    bar = run.progress(desc=f"iteration {t}: training", total=steps)
    bar.update(first)
    for step in range(first, steps):
        epoch, i = divmod(step, per_epoch)
        end_of_epoch = i + 1 == per_epoch
        if i == 0 or step == first:
            # An order for each epoch that depends on names alone: whoever resumes here shuffles the same way.
            order = run.shuffled(examples, args.seed, "order", t, epoch)
        batch = order[i * args.batch_size:(i + 1) * args.batch_size]

        # -- loss, step: ( log pi(y|x)/pi_t(y|x) - eta (Phat - 1/2) )^2, averaged over the batch (4.7) ----------------
        lr = kernels.linear_schedule(step, scheduled, args.warmup, args.lr)
        with record.phase("train"):
            metrics = gradient_step(net, optimizer, batch, args, lr, job.shard)
        bar.update()
        run.check_finite(metrics, f"iteration {t}, step {step + 1}", job.pi_path(t))
        record.write("metrics.jsonl", {"iteration": t, "step": step + 1, "epoch": epoch + 1, **metrics, **statistics})
        if end_of_epoch or (step + 1) % args.print_every == 0:
            record.say("iteration {}, step {}/{}: loss {loss:.2f}, log-ratio of winners {logratio_w:+.2f}, of losers "
                       "{logratio_l:+.2f}, gradient norm {grad_norm:.1f}, lr {lr:.1e}".format(
                           t, step + 1, steps, **metrics))

        # -- choose: the epoch that wins most on validation prompts (5.1); test prompts choose nothing ----------------
        if end_of_epoch:
            best = validate_and_keep(best, net, t, step + 1, epoch + 1, job)
        # -- save: what --resume needs, weights and moments -----------------------------------------------------------
        if step + 1 < steps and (end_of_epoch or args.save_every and (step + 1) % args.save_every == 0):
            record.save_state(optimizer, iteration=t, step=step + 1, best=best)
    bar.close()
    record.save_state(iteration=t, step=steps, best=best)
    if job.rank == 0:   # what a kill left of chunks that are in the table; what belongs to an earlier pi_{t+1}
        record.forget(rf"(sampled|prompts|judged)-{t}\b.*|(sampled|prompts|judged|reference|magnet)-{t + 1}\b.*")
    run.rename_on_rank_0(record.path("state", "best"), job.pi_path(t + 1))
    record.save_state(iteration=t + 1, step=0)


# ---------------------------------------------------------------------------------------------------------------------
# sample, judge. What passes from phase to phase is a table (table.py), one row a prompt, in the file table-t.jsonl,
# so that each phase may run elsewhere (--stage) and other tools' tables can be trained on (--table).


def sampled(t, job):
    """Phase `sample` of iteration t: the table's rows, with K answers of pi_t to every prompt of part t; for optimistic
    play also K of pi_{t-1}, of which the texts are enough, to be judged beside the others."""
    args, path, begun = job.args, job.record.path(f"table-{t}.jsonl"), begun_files(t, job.record)
    if os.path.exists(path):
        return read_table(path, args.stage == "train", args.all_responses, job.chat)
    rows = drawn(t, t, begun[0], job)
    if args.self_play == "optimistic" and t > 1:
        before = drawn(t - 1, t, begun[1], job)
        rows = [row | texts for row, texts in zip(rows, before, strict=True)]
    put_table(path, rows, begun, job.rank)
    return rows


def begun_files(t, record):
    """What iteration t keeps in state/ until its table is whole: answers of pi_t, of pi_{t-1}, prompts."""
    return [record.path("state", name.format(t)) for name in ("sampled-{}.jsonl", "sampled-{}-before.jsonl",
                                                              "prompts-{}.jsonl")]


def prompts_of(t, job):
    """The prompts of iteration t: its part of the given ones; or what pi_t's own Challenger asks, all different, none
    kept for evaluation. (A world's oracle ties all answers to nonsense, and ties hold the policy still.)"""
    if job.challenge is None:
        return job.parts[t - 1]
    path, lists = begun_files(t, job.record)[2], [prompts for prompts, _ in job.held_out.values()]
    if not os.path.exists(path):
        with job.record.phase("sample"):
            texts = challenger.distinct(job.network(job.pi_path(t)), job.chat, job.challenge, job.args,
                                        ("prompts", t), job.args.prompts_per_iteration,
                                        challenger.unwanted(job.args, job.chat, *lists), job.shard)
        if job.rank == 0:
            files.write_rows(path, [{"prompt": text} for text in texts])
        parallel.barrier()
    return read_prompts(path)


def drawn(s, t, begun, job):
    """K answers of pi_s to every prompt of part t: a table's rows for s = t, else their texts alone as the column
    `answers_before`. Finished chunks wait in the file `begun`."""
    args, record, prompts, count = job.args, job.record, prompts_of(t, job), 0
    net = job.network(job.pi_path(s))
    seconds_before, extra_names = record.seconds.get("sample", 0.0), () if s == t else ("before",)

    def make(prompts, first):
        nonlocal count
        rows = sample_answers(net, job.chat, prompts, args, t, job.shard, first, extra_names)
        count += sum(len(ids) for row in rows for ids in row["tokens"])
        return rows if s == t else [{"answers_before": answer_texts(row)} for row in rows]

    with record.phase("sample"):
        rows = run.in_chunks(begun, prompts, args.chunk * job.shard[1], make, job.rank)
    seconds = record.seconds["sample"] - seconds_before
    record.say(f"iteration {t}: sampled {count} tokens {f'of pi_{s} ' * (s < t)}in {seconds:.1f} s "
               f"({count / max(seconds, 1e-9):.0f} a second)")
    return rows


def sample_answers(net, chat, prompts, args, t, shard, first=0, of=()):
    """K answers of `net` to each prompt, as a table's rows, on every rank. first: the place of prompts[0] in the
    iteration's part; a prompt's random numbers belong to its place, whichever rank and chunk it falls to. of: further
    names of the random stream, for answers of another policy than pi_t."""
    rank, ranks = shard
    mine = prompts[rank::ranks]
    ids = encode_prompts(mine, chat, args)
    limits = [[answer_limit(prompt, args.max_new_tokens, args.max_total_tokens)] * args.k for prompt in ids]
    seeds = [run.stream(args.seed, "sample", t, *of) + first + i for i in range(rank, len(prompts), ranks)]
    samples = rollout.generate(net, ids, args.k, limits, args.temperature, args.top_p, chat.stop_ids, seeds,
                               args.top_k, args.max_rows,
                               desc=f"iteration {t}: {args.k} answers a prompt, from prompt {first + 1} on")
    rows = []
    for prompt, prompt_ids, tokens, finish in zip(mine, ids, samples.tokens, samples.finish):
        row = table_row(prompt, [chat.decode(y) for y in tokens])
        rows.append({**row, "prompt_ids": prompt_ids, "tokens": tokens, "finish": finish})
    return parallel.gather(rows, len(prompts))


def judged(t, rows, job):
    """Phase `judge` of iteration t: the rows with P(y_i > y_k | x) for all pairs of answers, and what follows."""
    if "chosen_probs_win" in rows[0]:
        return rows
    # verdicts belong to these answers
    digest = run.stream([(row["prompt"], answer_texts(row), *row.get("answers_before", ())) for row in rows])
    begun = job.record.path("state", f"judged-{t}-{digest:x}.jsonl")
    with job.record.phase("judge"):
        rows = run.in_chunks(begun, rows, job.args.chunk * job.shard[1],
                             lambda chunk, first: judge_answers(chunk, job.judge, job.shard), job.rank)
    put_table(job.record.path(f"table-{t}.jsonl"), rows, [begun], job.rank)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# what the loss is about: answers, their Phats, and their log-probabilities under pi_t


def picked(t, rows, job):
    """What of iteration t's judged rows enters the loss: (examples, statistics) of `training_examples`. Prints what the
    judge said, and writes the first 50 rows to samples.jsonl, for a person to read."""
    examples, statistics = training_examples(rows, job.chat, job.args, t, job.rank)
    if job.args.prompts == "challenger":        # what pi_t asked; overlap is a matter of pairs, so of some hundred
        texts = [row["prompt"] for row in rows[:512]]
        ids = [job.chat.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        statistics |= challenger.query_metrics(texts, ids, world.WORLDS.get(job.args.world))
    job.record.say(f"iteration {t}: answers to {len(examples)} prompts judged; mean Phat of the best "
                   f"{statistics['phat_best']:.3f}, of the worst {statistics['phat_worst']:.3f}; all K equal for "
                   f"{statistics['tied_share']:.1%} of prompts; {statistics['cut_share']:.1%} of answers cut")
    if job.record.training_state(t)["step"] == 0:           # an interrupted training has written them
        for row in rows[:50]:
            job.record.write("samples.jsonl", {"iteration": t, **readable_row(row)})
    return examples, statistics


def sequence_logprobs(net, examples):
    """log pi(y|x) of every example's n responses [len(examples), n] float32: sums over tokens, end of turn included."""
    logprob, row, rows = model.response_logprobs(net, [e["prompt"] for e in examples],
                                                 [e["responses"] for e in examples])
    return kernels.sum_rows(logprob, row, rows).view(len(examples), -1)


def reference_logprobs(net, examples, args, t, shard, record, resumed=False):
    """Adds log pi_t(y|x) of every response as `ref`, by the same lines as in training. Raises UserError where a resumed
    iteration began with other answers."""
    refs = kept_logprobs(net, "reference", examples, args, t, shard, record, resumed)
    for example, ref in zip(examples, refs, strict=True):
        example["ref"] = ref


def kept_logprobs(net, name, examples, args, t, shard, record, resumed=False):
    """`sequence_logprobs` of all examples, a list of lists, kept in state/ for --resume with a digest of what they
    belong to."""
    (rank, ranks), digest = shard, run.stream([e["responses"] for e in examples])
    refs = record.kept(f"{name}-{t}", digest, len(examples))
    if refs is None:
        if resumed and os.path.exists(record.path("state", f"{name}-{t}.json")):
            raise run.UserError(f"--resume: iteration {t} was begun on another table; give that one, or another --out")
        refs, mine = [], examples[rank::ranks]
        with record.phase("reference"), torch.no_grad():
            for start in range(0, len(mine), args.micro_batch):
                refs += sequence_logprobs(net, mine[start:start + args.micro_batch]).tolist()
        refs = parallel.gather(refs, len(examples))
        record.keep(f"{name}-{t}", digest, refs)
    return refs


def draw_to_magnet(t, examples, job):
    """Puts the p* of `kernels.magnetic` in Phat's place. A pull to a fixed policy ends the circling near the
    equilibrium; moving the magnet to pi_t from time to time brings it there. Costs a forward pass of the magnet over
    the answers, unless pi_t itself is the magnet. No optimizer is in memory yet: a second network finds room."""
    args, s, logprobs = job.args, kernels.magnet_at(t, job.args.magnet_every), [example["ref"] for example in examples]
    if s < t:
        logprobs = kept_logprobs(job.take(job.pi_path(s)), "magnet", examples, args, t, job.shard, job.record)
    for example, magnets in zip(examples, logprobs, strict=True):
        logratio = torch.tensor(example["ref"]) - torch.tensor(magnets)                           # [n] log pi_t/pi_mag
        example["p"] = kernels.magnetic(torch.tensor(example["p"]), logratio, args.eta, args.magnet).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# loss, step


def loss_of(logratio, p, args):
    """The loss of every prompt [b]: logratio = log pi(y|x)/pi_t(y|x) and p = Phat(y > pi_t | x), or the p* of another
    --self-play, both [b, n] float32, best response first and worst last."""
    logratio_w, logratio_l = logratio[:, 0], logratio[:, -1]
    if args.loss == "sppo":         # (4.7):  ( log pi(y|x)/pi_t(y|x) - eta (Phat - 1/2) )^2, averaged over responses
        return kernels.sppo_loss(logratio, p, args.eta).mean(1)
    if args.loss == "sppo-hard":    # the same with the preference rounded: the winner has p = 1, the loser p = 0
        return kernels.sppo_loss(logratio, torch.tensor([1.0, 0.0], device=p.device), args.eta).mean(1)
    if args.loss == "dpo":          # -log sigmoid( beta (logratio_w - logratio_l) ): only their difference counts
        return kernels.dpo_loss(logratio_w, logratio_l, args.beta)
    return kernels.ipo_loss(logratio_w, logratio_l, args.beta)      # ( logratio_w - logratio_l - 1/(2 beta) )^2


def gradient_step(net, optimizer, examples, args, lr, shard):
    """One optimizer step on a batch of examples, in micro-batches. Returns the batch's metrics."""
    names = ("loss", "logratio_w", "logratio_l", "logp_w", "logp_l", "ranked_share")
    sums = torch.zeros(len(names), dtype=torch.float64)
    for numbers, weight in parallel.passes(len(examples), shard, args.micro_batch):
        chunk = [examples[i] for i in numbers]
        logp = sequence_logprobs(net, chunk)                                                    # [b, n] log pi(y|x)
        logratio = logp - torch.tensor([e["ref"] for e in chunk], device=logp.device)           # log pi / pi_t
        p = torch.tensor([e["p"] for e in chunk], device=logp.device)                           # Phat(y > pi_t | x)
        loss = loss_of(logratio, p, args).sum() * weight
        loss.backward()
        with torch.no_grad():
            is_ranked = (logratio[:, 0] > logratio[:, -1]).float()
            per_prompt = torch.stack([logratio[:, 0], logratio[:, -1], logp[:, 0], logp[:, -1], is_ranked])   # [5, b]
            sums += torch.cat([loss[None], per_prompt.sum(1) * weight]).cpu().double() / shard[1]
    metrics = dict(zip(names, parallel.sum_over_ranks(sums, net.device).tolist()))
    norm = optimizer.step(lr, args.clip) if math.isfinite(metrics["loss"]) else math.nan
    return {**metrics, "grad_norm": norm, "lr": lr}


def validate_and_keep(best, net, t, step, epoch, job):
    """Which epoch is kept so far, {"epoch", "rate"}: the one with the largest win rate against the base on validation
    prompts, the first of equals; with --keep last, the last. Its checkpoint waits in state/best."""
    args, record, rate = job.args, job.record, None
    better = epoch == args.epochs
    if chooses(args):
        with record.phase("validate"), parallel.gathered(net):
            rate, error = job.board.rate(net, "validation", desc="validation")
        record.write("metrics.jsonl", {"iteration": t, "step": step, "epoch": epoch,
                                  "validation_win_rate": rate, "validation_win_rate_se": error})
        record.say(f"iteration {t}, epoch {epoch}/{args.epochs}: validation win rate against the base {rate:.3f} "
                   f"±{error:.3f}")
        better = best is None or rate > best["rate"]
    if not better:
        return best
    with parallel.gathered(net):
        if job.rank == 0:
            lora.save_as(args.save, net, record.path("state", "best"), job.chat.directory, job.base)
    return {"rate": rate, "epoch": epoch}


# ---------------------------------------------------------------------------------------------------------------------
# evaluate, and what a run prints


def evaluated(t, job):
    """Phase `evaluate`: the table's rows up to iteration t; 0 is the base, which all later ones are compared with."""
    board, name, saved = job.board, f"iteration {t}" if t else "base", job.record.state
    if t == 0:
        with job.record.phase("evaluate"):
            board.draw_base(job.network(job.base), *(["validation"] if chooses(job.args) else []), "test")
    if name in board:
        return
    with job.record.phase("evaluate"):
        row = board.add(name, job.network(job.pi_path(t + 1)), lambda: winrate.kept_epoch(job.record, t) if t else {})
    kept = f"iteration {t} kept epoch {row['epoch']}\n" if "epoch" in row else ""
    job.record.say(kept + (winrate.style_line(board.rows) if t and "styles" in row else winrate.table(board.rows)))
    if not saved or (saved["iteration"], saved["step"]) <= (t + 1, 0):          # never over that of a later training
        job.record.save_state(iteration=t + 1, step=0)
    if t < job.args.iterations:                 # after the last one `finish` does it
        summarised(job)


def summarised(job):
    """Writes summary.json and curves.png of all that was evaluated so far. Returns the summary."""
    args, record = job.args, job.record
    summary = record.write_summary(method(args), args, job.base, job.device, job.shard[1], job.board.rows)
    if job.rank == 0:
        plots.plot([(method(args), summary)], record.path("curves.png"))
    return summary


def method(args):
    """What tables and pictures call a run."""
    return (args.loss + (f", {args.self_play}" if args.self_play != "plain" else "")
            + (", its own prompts" if args.prompts == "challenger" else "")
            + (f", LoRA {args.lora}" if args.lora else ""))


def finish(job):
    """The end of a run: the summary, and where the time went."""
    summary = summarised(job)
    if "styles" in job.board.rows[0]:
        job.record.say(winrate.style_table(summary))
    job.record.say_where()


# ---------------------------------------------------------------------------------------------------------------------
# set-up: bad input is refused before long work, and before anything is written


@dataclasses.dataclass
class Job:
    """What the phases of one command work with. A stage leaves empty what it does not need (see table.NEEDS)."""
    args: Settings
    device: torch.device
    dtype: torch.dtype
    shard: tuple                                                    # (rank, number of ranks)
    record: run.Run = None                                          # the run's directory, journals and clock
    base: str = ""                                                  # pi_1, a checkpoint
    chat: Chat = None
    judge: object = None
    parts: list = dataclasses.field(default_factory=list)           # T lists of given prompts, one for each iteration
    challenge: list = None                                          # cp as ids, where pi_t writes the prompts
    held_out: dict = dataclasses.field(default_factory=dict)        # "validation" and "test": (prompts, their ids)
    board: winrate.Scoreboard = None
    loaded: tuple = (None, None)                                    # (checkpoint, its network)

    @property
    def rank(self):
        """This process's number."""
        return self.shard[0]

    def pi_path(self, t):
        """The checkpoint of pi_t: the base for t = 1, else the result of iteration t - 1."""
        return self.record.path(f"iter-{t - 1}") if t > 1 else self.base

    def network(self, checkpoint):
        """A checkpoint's network, to sample from. The last one is kept: several phases in a row work with pi_t."""
        if self.loaded[0] != checkpoint:
            self.loaded = None, None
            gc.collect()            # let go of memory first: a trained network may refer to itself
            self.loaded = checkpoint, model.Transformer.from_pretrained(checkpoint, self.device, self.dtype,
                                                                        merge=self.args.save == "merged")
        return self.loaded[1]

    def take(self, checkpoint):
        """The same network, to be trained; it leaves the cache because its weights will change."""
        net, self.loaded = self.network(checkpoint), (None, None)
        net.activation_checkpointing = self.args.activation_checkpointing
        return net.compile_layers() if self.args.compile else net


def set_up(argv):
    """Settings, ranks, prompts, judge, model and run directory: the Job that `main` works on."""
    args = settle(parse(Settings, argv, __doc__.split("\n\n")[0]
                          + "\n\nA default in [brackets]; docs/metrics.md explains every logged figure.", PRESETS,
                          {**{name: entry.sppo | entry.sppo_loss["sppo"] for name, entry in world.WORLDS.items()},
                           "real prompts": PAPER | PAPER_LOSS["sppo"]}))
    # an embedded world's 300,000 parameters have no use for bfloat16
    device, dtype = run.device_and_dtype(args.device, "float32" if args.dtype == "auto" and args.world else args.dtype)
    rank, ranks, device = parallel.init_ranks(device, args.rank_timeout)
    job = Job(args, device, dtype, (rank, ranks))
    check_memory(args, device, dtype, ranks)
    resume = args.resume or bool(args.stage) and os.path.isdir(os.path.join(args.out, "state"))
    if rank == 0:
        run.check_out(args.out, args, resume, args.overwrite)
    rows, began = check_stage(args), earlier_session(args, resume)
    given = args.prompts if args.prompts != "challenger" and "prompts" in needs(args) else ""
    sources = read_sources(given, args.iterations) if given else None
    if "judge" in needs(args):
        job.judge = prefmodel.load(args.judge, args.estimator, device, dtype)
    if "model" in needs(args):
        job.base = began.get("initial") or args.model or parallel.on_rank_0_first(
            rank, lambda: world.base(world.WORLDS[args.world], device))
        job.chat = Chat(job.base, job.network(job.base), args.template_option)
        lora.check_base(args, job.base, job.network(job.base).config)
        if args.world:
            winrate.check_speaks_world(job.base, job.network(job.base), job.chat, world.WORLDS[args.world])
    if "prompts" in needs(args):
        if sources and args.drop_long_prompts:
            sources = [without_long_prompts(source, job.chat, args, rank) for source in sources]
        validation, test, job.parts = divided(sources, began, job)
        job.held_out = {"validation": (validation, encode_prompts(validation, job.chat, args)),
                        "test": (test, encode_prompts(test, job.chat, args))}
        for part in job.parts:                              # refuse an over-long prompt now, not after an hour
            encode_prompts(part, job.chat, args)
        if job.judge:
            prefmodel.check_references(job.judge, sum(job.parts, validation + test))
    if args.stage == "train":
        check_training_rows(rows, args, job.chat, *(prompts for prompts, _ in job.held_out.values()))
    job.record = record = run.Run(args.out, args, resume, args.overwrite, rank)
    size = len(job.parts[0]) if job.parts else args.prompts_per_iteration
    if rank == 0:
        for name, (prompts, _) in job.held_out.items():     # so that others can evaluate on the same
            files.write_rows(record.path("state", f"{name}.jsonl"), map(as_row, prompts))
        if "prompts" in needs(args):                        # what a resumed run must not change
            files.write_json(record.path("state", "initial.json"), {
                "initial": str(job.base), "iterations": shorter_sessions(began, args) + [args.iterations],
                "sources": digests(sources), "size": size})
        if args.table:                                      # where the phases look for it
            files.write_rows(record.path(f"table-{args.iteration}.jsonl"), rows)
    parallel.barrier()
    evaluation = winrate.Sampling(args.max_new_tokens, max_rows=args.max_rows, max_total_tokens=args.max_total_tokens)
    job.board = winrate.Scoreboard(record, job.chat, job.judge, job.held_out, evaluation, args.seed, job.shard)
    what = (f"stage {args.stage} of iteration {args.iteration}; " if args.stage else
            f"{job.base}, judge {job.judge.name}; {args.iterations} iteration{'s' * (args.iterations > 1)} of {size} "
            f"prompts x K = {args.k}, {f'beta {args.beta:g}' if args.beta else f'eta {args.eta:g}'}, lr {args.lr:g}; ")
    record.say(f"{method(args)} on {device} ({str(dtype)[6:]}, {ranks} process{'es' * (ranks > 1)}): {what}"
               f"writing to {args.out}")
    if job.board.rows:
        record.say(winrate.table(job.board.rows))
    return job


def check_memory(args, device, dtype, ranks):
    """--plan; else a warning where the run will not fit."""
    prompt = args.max_prompt_tokens or 512                          # the paper's longest
    width = min(prompt + args.max_new_tokens, args.max_total_tokens or math.inf)
    memory.before(args, device, dtype, ranks, answers=args.k if args.all_responses else 2, prompt=prompt,
                  answer=width - prompt, width=width, moments=4 if args.optimizer == "rmsprop" else 8,
                  judges=[args.judge], validates=chooses(args))


def divided(sources, began, job):
    """(validation, test, parts): the parts are none where pi_t writes its prompts. Then a real model's held-out prompts
    are queries of pi_1, the same for all seeds."""
    args, entry = job.args, world.WORLDS.get(job.args.world)
    if args.prompts != "challenger":
        return split_prompts(args, entry, sources, began)
    job.challenge, count = job.chat.encode(challenger.prompt(args)), args.validation_prompts
    if entry:
        return entry.queries("validation", count), entry.queries("test", args.test_prompts), []
    if began:                                   # a resumed run keeps them
        return *(read_prompts(os.path.join(args.out, "state", f"{name}.jsonl")) for name in ("validation", "test")), []
    found = challenger.initial_queries(job.network(job.base), job.chat, job.challenge, args, count + args.test_prompts,
                                       job.shard, args.max_prompt_tokens, args.max_total_tokens)
    if len(found) <= count:
        raise run.UserError(f"pi_1 wrote only {len(found)} different queries to evaluate on; lower "
                            "--validation-prompts, or give a --task that asks for more")
    return found[:count], found[count:], []


def settle(args):
    """Fill in what was not given, and refuse what makes no sense. Returns the completed Settings."""
    if args.world and (args.prompts not in ("", "challenger") or args.preset):
        raise run.UserError("--world is played without --prompts and --preset; leave one of them out")
    asks_itself = args.prompts == "challenger" and (not args.judge or prefmodel.world_of(args.judge))
    if not args.world and not args.table and (not args.prompts or asks_itself):
        args = dataclasses.replace(args, world="operations")
    challenger.check_flags(args)
    if args.preset and args.loss not in ("sppo", "sppo-hard") and args.eta == PRESETS[args.preset]["eta"]:
        args = dataclasses.replace(args, eta=None)          # a preset may be combined with any loss
    defaults = defaults_of(args.world, args.loss)
    if args.gradient_accumulation > 0 and args.micro_batch is not None:
        raise run.UserError("--gradient-accumulation and --micro-batch say the same thing; give one of them")
    if args.gradient_accumulation > 0:
        passes = args.gradient_accumulation * parallel.set_by_torchrun("WORLD_SIZE", 1)
        defaults["micro_batch"] = math.ceil((args.batch_size or defaults["batch_size"]) / passes)
    if args.prompts != "challenger":            # nobody writes a query
        defaults.pop("max_query_tokens", None)
    entry = world.WORLDS[args.world].self_play if args.world else {}
    defaults |= (MAGNET if args.self_play == "magnetic" else {}) | entry.get(args.self_play, {})
    args = dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    if not args.judge and args.world:
        args = dataclasses.replace(args, judge=prefmodel.judge_of(args.world))
    check_self_play(args)
    lora.check_flags(args)
    check_step_size(args)
    check_stage_flags(args)
    check_sources(args)
    return args


def defaults_of(world_name, loss):
    """{setting: value} where no flag is given: a world's, or for real prompts ("") the paper's."""
    common, by_loss = PAPER, PAPER_LOSS
    if world_name:
        common, by_loss = world.WORLDS[world_name].sppo, world.WORLDS[world_name].sppo_loss
    if loss not in by_loss:
        raise run.UserError(f"--loss {loss} has no defaults for {world_name or 'real prompts'!r}; add them in "
                            + ("world.WORLDS" if world_name else "sppo.PAPER_LOSS"))
    return common | by_loss[loss]


def check_step_size(args):
    """Raises UserError for training flags that do nothing together."""
    size, other = ("eta", "beta") if "eta" in defaults_of(args.world, args.loss) else ("beta", "eta")
    if getattr(args, other) is not None:
        raise run.UserError(f"--{other} does nothing with --loss {args.loss}, whose step size is --{size}; "
                            "leave it out")
    if args.all_responses and args.loss != "sppo":
        raise run.UserError(f"--all-responses is for --loss sppo; --loss {args.loss} is defined on a winner and a "
                            "loser")
    if 0 < args.schedule_epochs < args.epochs:
        raise run.UserError(f"--schedule-epochs {args.schedule_epochs} is less than --epochs {args.epochs}, so the "
                            "learning rate would end before the training; raise the first or lower the second")
    if args.prompts_per_iteration == 0 and (args.world or args.prompts == "challenger"):
        raise run.UserError("--prompts-per-iteration 0 means all there are, and an embedded world or a Challenger has "
                            "no end of them; give a number above 0")


def check_self_play(args):
    """Raises UserError for flags of a self-play that they have no part in."""
    if args.self_play != "plain" and args.loss != "sppo":
        raise run.UserError(f"--self-play {args.self_play} changes the p in --loss sppo's target, eta (p - 1/2), and "
                            f"--loss {args.loss} looks only at who is best and worst; leave one of them out")
    if args.self_play == "magnetic" and not args.all_responses:
        raise run.UserError("--self-play magnetic takes a mean over all K answers; leave --no-all-responses out")
    for name in ("magnet", "magnet_every"):
        if getattr(args, name) is not None and args.self_play != "magnetic":
            raise run.UserError(f"--{name.replace('_', '-')} is for --self-play magnetic; give that, or leave it out")


def check_sources(args):
    """Raises UserError where the judge, the model or the prompts that a command needs are missing or of two worlds."""
    of_a_world = prefmodel.world_of(args.judge) if args.judge else None
    if "judge" in needs(args) and not args.world and (of_a_world or not args.judge):
        raise run.UserError("natural language needs a judge that can read it: give --judge pairrm:DIR_OR_HUB_ID "
                            "(oracle and styles know only the embedded worlds; for a table of theirs give --world)"
                            + ("; or --keep last, which judges nothing" if args.stage == "train" else ""))
    if args.world and of_a_world not in (None, world.WORLDS[args.world]):
        raise run.UserError(f"--judge {args.judge} does not know --world {args.world}; give "
                            f"{world.WORLDS[args.world].judge} or leave it out")
    if "prompts" in needs(args) and not args.world and not args.prompts:
        raise run.UserError("--keep best chooses on held-out prompts: give --prompts, or --keep last")
    if "model" in needs(args) and not args.world and not args.model:
        raise run.UserError("--prompts and --table need --model: an embedded world's base does not read natural "
                            "language (for a table of that world give --world)")


if __name__ == "__main__":
    run.main(main)
