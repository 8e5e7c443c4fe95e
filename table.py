"""SPPO's table: what its phases hand on to each other, one row a prompt.

`sample` writes a prompt and its K answers, `judge` adds P(y_i > y_k | x) and what follows from it, and `train` makes
token ids of the answers that enter the loss. The file, table-t.jsonl, has the columns of the official SPPO code's
tables, so that each phase may run on another machine, and tables of other tools can be judged and trained on:

  before judging   prompt, a text or a list of turns; generate_0 ... generate_{K-1}: its turns and the assistant's;
                   ours also hold what text loses: prompt_ids, tokens (ids as sampled), finish ("stop" or "length"),
                   and row, the prompt's other columns, where it has any; for optimistic play from iteration 2 on also
                   answers_before, the texts of K answers of pi_{t-1}
  after judging    probability [K][K], P(i > j); rm_scores [K]; chosen, rejected: the conversations of the best and
                   the worst; chosen_probs = P(best > worst); chosen_probs_win, chosen_probs_lose = Phat of the two;
                   with answers_before also probability_before [K], P(y_i > pi_{t-1}), a mean over those answers

The official training table has the last five columns alone. Every text in a table is data, as in chat.py.
"""

import glob
import json
import os

import torch

import challenger
import files
import kernels
import parallel
import run
from chat import Prompt, answer_limit, as_turn, read_text, stored, turns_of, without_thinking

VERDICTS = ("probability", "rm_scores", "chosen", "rejected", "chosen_probs", "chosen_probs_win", "chosen_probs_lose",
            "probability_before")

OURS = {"prompt", "row", "prompt_ids", "tokens", "finish", "answers_before", *VERDICTS}


def answer_texts(row):
    """The K answers of a table's row, as text.

    >>> answer_texts(table_row("2 + 2?", ["4", "four"]))
    ['4', 'four']
    """
    count = sum(name.startswith("generate_") for name in row)
    return [row[f"generate_{k}"][-1]["content"] for k in range(count)]


def table_row(prompt, texts):
    """A table's row before judging: a prompt and its answers as text. Plain lists and strings, as the file has them."""
    turns, beside = turns_of(prompt), getattr(prompt, "row", {})
    answers = {f"generate_{k}": [*turns, {"role": "assistant", "content": text}] for k, text in enumerate(texts)}
    return {"prompt": stored(prompt), **({"row": beside} if beside else {}), **answers}


def prompt_in(row):
    """The Prompt of a table's row. Another tool's table has the prompt's other columns beside it."""
    beside = row.get("row")
    if not isinstance(beside, dict):
        beside = {name: value for name, value in row.items() if name not in OURS and not name.startswith("generate_")}
    return Prompt(row["prompt"], beside)


def verdict_columns(row, P):
    """The columns that judging adds to a row: P [K, K] float32, P[i, k] = P(y_i > y_k | x) -> dict.

    rm_scores, by which the official code ranks, is the mean log-odds of P over the opponents (each between -13.8 and
    13.8, where float32 probabilities end): with the aggregate estimator PairRM's score s_i, in optimistic play over 2K.
    """
    wins = kernels.phat(P)                                                      # [K]  Phat(y_i > pi_t | x)
    best, worst = kernels.best_and_worst(wins)
    return {"probability": P.tolist(), "rm_scores": P.logit(1e-6).mean(-1).tolist(),
            "chosen": row[f"generate_{best}"], "rejected": row[f"generate_{worst}"],
            "chosen_probs": float(P[best, worst]),
            "chosen_probs_win": float(wins[best]), "chosen_probs_lose": float(wins[worst])}


def ranked(row, args):
    """Which of a judged row's answers enter the loss, best first and worst last; what enters as their p; and their
    Phats: (numbers, floats, floats). The numbers are None for the official training table, which knows its winner and
    loser alone."""
    if "probability" not in row:
        wins = [row["chosen_probs_win"], row["chosen_probs_lose"]]
        return None, wins, wins
    P = torch.tensor(row["probability"])
    wins = p = kernels.phat(P)                                                                    # [K]
    if args.self_play == "optimistic":              # without that column this is iteration 1, where pi_0 is pi_1
        before = row.get("probability_before")
        p = kernels.optimistic(P, before if before is None else torch.tensor(before))             # [K]
    order = p.argsort(descending=True, stable=True).tolist() if args.all_responses else kernels.best_and_worst(p)
    return list(order), p[list(order)].tolist(), wins[list(order)].tolist()


def check_columns(rows, names, t):
    """Raises UserError where iteration t's table lacks a column that optimistic self-play needs."""
    for name in names:
        if not all(name in row for row in rows):
            raise run.UserError(f"--self-play optimistic needs the column {name} in the table of iteration {t}; "
                                "sample and judge it with --self-play optimistic")


def readable_row(row):
    """A judged row for a person to read: prompt, answers, and their Phats."""
    talks, wins = [row["chosen"], row["rejected"]], [row["chosen_probs_win"], row["chosen_probs_lose"]]
    texts = answer_texts(row) or [talk[-1]["content"] for talk in talks]
    if "probability" in row:
        wins = kernels.phat(torch.tensor(row["probability"])).tolist()
    return {"prompt": prompt_in(row), "responses": texts, "phat": [round(p, 4) for p in wins]}


def read_table(path, judged=False, all_responses=False, chat=None):
    """The rows of a table: this file's, or the official code's columns `generate_k`, or `chosen` and `rejected`.

    judged: they must hold a judge's verdicts too. chat: whose ids the rows hold, if they hold any; None where they are
    not used. Raises UserError, naming file and line, for what cannot be used.
    """
    rows = []
    for i, line in enumerate(read_text("--table", path).split("\n")):
        try:
            if line.strip():
                rows.append(_table_row(json.loads(line), judged, all_responses))
                _check_ids(rows[-1], chat)
                if len(answer_texts(rows[-1])) != len(answer_texts(rows[0])):
                    raise ValueError("every row needs as many answers as the first")
                for name in ("answers_before", "prompt_ids", "tokens", "finish"):
                    if (name in rows[-1]) != (name in rows[0]):
                        raise ValueError(f"{name} stands in some rows alone")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise run.UserError(f"--table {path}, line {i + 1}: {_reason(error, judged)}") from None
    if not rows:
        raise run.UserError(f"--table {path} holds no rows; give the .jsonl that --stage sample or judge wrote")
    return rows


def _table_row(row, judged, all_responses):
    """The row, checked: conversations as lists of turns, `prompt` and the verdicts filled in where they follow from the
    rest."""
    K = sum(name.startswith("generate_") for name in row)
    names = [f"generate_{k}" for k in range(K)] + [name for name in ("chosen", "rejected") if name in row]
    talks = [row[name] for name in names if not isinstance(row[name], str)] or [[]]
    before = talks[0][:-1]                                  # the turns that an answer follows
    if "prompt" not in row or before and isinstance(row["prompt"], str) and before[-1]["content"] == row["prompt"]:
        row["prompt"] = before                              # some tables give the last of them alone as `prompt`
    if not row["prompt"]:
        raise KeyError("prompt")
    row["prompt"] = stored(prompt_in(row))
    turns = turns_of(prompt_in(row))
    for name in names:
        if isinstance(row[name], str):
            row[name] = [*turns, {"role": "assistant", "content": row[name]}]
        *said, answer = [as_turn(turn) for turn in row[name]]
        if said != turns or answer["role"] != "assistant":
            raise TypeError
        row[name] = [*said, answer]
    if not judged:
        row["generate_0"]
    elif all_responses:
        row["probability"]
    if "probability" in row:
        P = _shares("probability", row["probability"], K, K)
        if float((P + P.T - 1).abs().max()) > 0.01:         # its diagonal is 1/2 by that; some tables are rounded
            raise ValueError("probability has two answers whose chances to win do not add up to 1")
        row |= {name: value for name, value in verdict_columns(row, P).items() if name not in row}
    texts = row.get("answers_before", [""] * K)
    if not isinstance(texts, list) or len(texts) != K or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"answers_before is no list of {K} texts")
    if "probability_before" in row:
        _shares("probability_before", row["probability_before"], K)
    for name in ("chosen_probs_win", "chosen_probs_lose") if judged else ():
        row["chosen"], row["rejected"]
        if type(row[name]) not in (int, float) or not 0 <= row[name] <= 1:
            raise ValueError(f"{name} {str(row[name])[:40]} is not in [0, 1]")
    return row


def _shares(name, values, *shape):
    """A column of numbers in [0, 1] as a float32 tensor of this shape; raises ValueError for anything else."""
    try:
        found = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):        # what is no number, not even, or has 400 digits
        found = torch.zeros(0)
    if found.shape != shape or not ((found >= 0) & (found <= 1)).all():
        what = f"list of {shape[0]}" if len(shape) == 1 else f"{shape[0]} x {shape[1]} matrix of"
        raise ValueError(f"{name} is no {what} numbers in [0, 1]")
    return found.float()


def _check_ids(row, chat):
    """Raises ValueError where the ids that a row holds are not those of its K answers, or not of this model."""
    if "tokens" not in row:
        return
    K, lists = len(answer_texts(row)), [row["prompt_ids"], *row["tokens"]]
    if len(row["tokens"]) != K or len(row["finish"]) != K or not set(row["finish"]) <= {"stop", "length"}:
        raise ValueError(f"tokens and finish are no lists of {K}, finish of the words stop and length")
    for ids in lists:
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError("prompt_ids or tokens has a list that is empty, or holds what is no id of a token")
    if chat is not None and max(map(max, lists)) >= chat.vocabulary:
        raise ValueError(f"an id is beyond the model's {chat.vocabulary} tokens")
    if chat is not None and len(lists[0]) + max(map(len, lists[1:])) > chat.context:
        raise ValueError(f"prompt and answer are longer than the model's context of {chat.context} tokens")


def _reason(error, judged):
    if isinstance(error, KeyError) and judged and error.args[0] in ("probability", "chosen", "chosen_probs_win"):
        return f"no column {error.args[0]}; judge the table first (--stage judge)"
    if isinstance(error, KeyError):
        return f"no column {error.args[0]}; a table has prompt and generate_0 ..., or chosen and rejected"
    if isinstance(error, (json.JSONDecodeError, RecursionError)):
        return f"malformed JSON ({getattr(error, 'msg', 'nested too deeply')}); mend or remove the line"
    return f"{error}; make the table again" if type(error) is ValueError else (
        "prompt must be a text or a list of turns, and generate_k, chosen and rejected those turns and one by the "
        "assistant, as lists of {role, content} (or the answer's text alone); make the table again")


# ---------------------------------------------------------------------------------------------------------------------
# judging, writing


def judge_answers(rows, judge, shard):
    """The rows with the judge's columns; every rank judges its share and returns all. What a model thought before it
    answered is not judged.

    Answers of pi_{t-1} are judged in one call with those of pi_t. That costs the K (K - 1) / 2 pairs among themselves,
    which nobody reads, and an aggregating judge scores all 2K against each other."""
    rank, ranks = shard
    mine = rows[rank::ranks]
    answers = [list(map(without_thinking, answer_texts(row) + row.get("answers_before", []))) for row in mine]
    judged, P = [], judge.preference([prompt_in(row) for row in mine], answers)         # [B, K, K], or [B, 2K, 2K]
    for row, p in zip(mine, P):
        K = len(answer_texts(row))
        judged.append(row | verdict_columns(row, p[:K, :K]))
        if "answers_before" in row:
            judged[-1]["probability_before"] = p[:K, K:].mean(-1).tolist()
    return parallel.gather(judged, len(rows))


def put_table(path, rows, begun, rank):
    """Writes a phase's whole result as the file `path`, in place of the files `begun` with its chunks."""
    if rank == 0:
        files.write_rows(path, rows)
        for chunks in begun:
            files.remove(chunks)
    parallel.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# from a table to what is trained on: ids


def total_decides(args):
    """With --drop-long-prompts and --max-total-tokens a prompt may be longer than --max-prompt-tokens: it is left out
    only where an answer that enters the loss is cut by the total."""
    return args.drop_long_prompts and args.max_total_tokens > 0


def encode_prompts(prompts, chat, args):
    """Ids of prompts to be answered by sppo.py; raises UserError for one that is too long (see Chat.encode_all)."""
    return chat.encode_all(prompts, 0 if total_decides(args) else args.max_prompt_tokens, args.max_new_tokens,
                           args.max_total_tokens)


def without_long_prompts(prompts, chat, args, rank):
    """The prompts that there is room for; prints how many were left out."""
    room = chat.room(0 if total_decides(args) else args.max_prompt_tokens, 1 if args.table else args.max_new_tokens,
                     args.max_total_tokens)
    return chat.that_fit(prompts, room, quiet=rank != 0)


def training_examples(rows, chat, args, t=1, rank=0):
    """What the loss needs of iteration t's judged table: a list of {prompt: ids, responses: n lists of ids, p: n
    numbers, Phat or p*}, best first, worst last; n = K with --all-responses, else 2. Also statistics of them, a dict
    for metrics.jsonl. args: the settings of sppo.py.

    Raises UserError for a prompt that there is no room for, unless --drop-long-prompts leaves its row out, and for a
    table without what --self-play needs.
    """
    if args.self_play == "optimistic":
        check_columns(rows, ["probability"] + ["probability_before"] * (t > 1), t)
    if args.drop_long_prompts and "tokens" not in rows[0]:     # ours were left out before sampling
        fit = set(without_long_prompts([prompt_in(row) for row in rows], chat, args, rank))
        rows = [row for row in rows if prompt_in(row) in fit]
    examples, phats, cut, dropped = [], [], [], 0
    for row in rows:
        order, p, wins = ranked(row, args)
        if order is not None and "tokens" in row:           # sampled here: the very ids
            example = {"prompt": row["prompt_ids"], "responses": [row["tokens"][k] for k in order]}
            too_long = [row["finish"][k] == "length" for k in order]
            ends = [end == "length" for end in row["finish"]]
        else:                                               # text from elsewhere
            talks = [row["chosen"], row["rejected"]] if order is None else [row[f"generate_{k}"] for k in order]
            example, too_long = encode_talks(prompt_in(row), talks, chat, args)
            ends = too_long
        if any(too_long) and total_decides(args) and len(example["prompt"]) > args.max_prompt_tokens:
            dropped += 1
            continue
        cut += ends
        phats.append(wins)
        examples.append(example | {"p": p})
    if dropped and rank == 0:
        print(f"left out {dropped} of {len(rows)} prompts: longer than {args.max_prompt_tokens} tokens, and with an "
              f"answer that --max-total-tokens {args.max_total_tokens} cuts", flush=True)
    if not examples:
        raise run.UserError("no row of the table is left to train on; raise --max-prompt-tokens")
    statistics = {"phat_best": sum(wins[0] for wins in phats) / len(examples),
                  "phat_worst": sum(wins[-1] for wins in phats) / len(examples),
                  "tied_share": sum(e["p"][0] == e["p"][-1] for e in examples) / len(examples),
                  "cut_share": sum(cut) / len(cut)}
    return examples, statistics


def encode_talks(prompt, talks, chat, args):
    """Answers that are known as text only, through the chat template: ({prompt, responses} as ids, which were cut).
    An answer that is too long ends where a sampled one would have been cut, without an end token."""
    ids, = chat.encode_all([prompt], 0 if total_decides(args) else args.max_prompt_tokens, 1, args.max_total_tokens)
    limit = min(answer_limit(ids, args.max_new_tokens, args.max_total_tokens), chat.context - len(ids))
    responses = [chat.encode_answer(prompt, talk[-1]["content"]) for talk in talks]
    return {"prompt": ids, "responses": [y[:limit] for y in responses]}, [len(y) > limit for y in responses]


# ---------------------------------------------------------------------------------------------------------------------
# what a stage works with, and what it finds of the stages before it


NEEDS = {"": {"prompts", "model", "judge"}, "sample": {"prompts", "model"}, "judge": {"judge"}, "train": {"model"}}


def chooses(args):
    """Is a checkpoint chosen by judging validation answers? (A whole run with one epoch reports that figure too.)"""
    return args.keep == "best" and (args.epochs > 1 or not args.stage)


def needs(args):
    """What this command works with, a set of "prompts", "model" and "judge": each stage as little as it can."""
    return NEEDS[args.stage] | ({"prompts", "judge"} if args.stage == "train" and chooses(args) else set())


def check_stage_flags(args):
    """Raises UserError for --stage, --table and --iteration where they do not fit together."""
    if args.table and args.stage not in ("judge", "train"):
        raise run.UserError("--table is for --stage judge or --stage train; without it a run samples its own answers")
    if args.stage and args.overwrite:
        raise run.UserError("--overwrite would delete what the other stages left in --out; remove the one file that is "
                            "to be made again, or give another --out")
    if args.iteration != 1 and not args.stage:
        raise run.UserError("--iteration says what --stage works on; without --stage all iterations run")
    if args.iteration > args.iterations:
        raise run.UserError(f"--iteration {args.iteration} is beyond --iterations {args.iterations}; lower the one or "
                            "raise the other")


def check_nothing_later(t, out):
    """Raises UserError where iteration t + 1 has a table already: with answers of another pi_{t+1} than the one that
    iteration t is about to make."""
    later = os.path.join(out, f"table-{t + 1}.jsonl")
    if os.path.exists(later):
        raise run.UserError(f"{later} holds answers of an earlier iter-{t}, which is about to be made again; remove "
                            "it, or give another --out")


def check_stage(args):
    """The rows that --stage judge or train works on, else None; for judge without another judge's verdicts. Raises
    UserError where a stage finds nothing to work on, or its result already there."""
    t = args.iteration
    own, before, made = (os.path.join(args.out, name) for name in (f"table-{t}.jsonl", f"iter-{t - 1}", f"iter-{t}"))
    done = {"sample": own, "train": made}.get(args.stage)
    if done and os.path.exists(done):
        raise run.UserError(f"--stage {args.stage}: {done} is already there; remove it to {args.stage} again")
    if args.stage in ("judge", "train") and not args.table and not os.path.exists(own):
        raise run.UserError(f"--stage {args.stage}: {own} is not there; run --stage sample first, or give --table")
    if args.stage in ("sample", "train") and t > 1 and not os.path.exists(before):
        raise run.UserError(f"--iteration {t} starts from {before}, which is not there; run --stage train of the "
                            "iteration before it")
    second = {("optimistic", "sample"): t - 1, ("magnetic", "train"): kernels.magnet_at(t, args.magnet_every)}
    s = second.get((args.self_play, args.stage), 1)         # pi_s, which the stage works with beside pi_t
    other = os.path.join(args.out, f"iter-{s - 1}")
    if s > 1 and not os.path.exists(other):
        raise run.UserError(f"--self-play {args.self_play}: --stage {args.stage} of iteration {t} works with {other} "
                            "too, which is not there; put it back")
    if args.stage not in ("judge", "train"):
        return None
    rows = read_table(args.table or own, args.stage == "train", args.all_responses)
    if args.stage == "judge" and not args.table and "chosen_probs_win" in rows[0]:
        raise run.UserError(f"--stage judge: {own} is already judged; to judge it again give --table {own}")
    if args.stage == "judge" and args.self_play == "optimistic" and t > 1:
        check_columns(rows, ["answers_before"], t)
    return rows if args.stage == "train" else [
        {name: value for name, value in row.items() if name not in VERDICTS} for row in rows]


def check_training_rows(rows, args, chat, *held_out):
    """Raises UserError for rows that --stage train cannot work on: a prompt that is held out (one of these lists, or a
    query that a world evaluates on) or has no room, or another table than an interrupted training began with."""
    table = f"--table {args.table}" if args.table else f"--stage train: table-{args.iteration}.jsonl"
    if any(map(challenger.kept_for_evaluation(args, *held_out), map(prompt_in, rows))):
        raise run.UserError(f"{table} holds prompts that --prompts or --world sets aside for validation or test; leave "
                            "them out" + ("" if args.world else ", or give --keep last"))
    for number, row in enumerate(rows, 1):
        try:
            _check_ids(row, chat)
        except ValueError as error:
            raise run.UserError(f"{table}, row {number}: {error}; make the table again") from None
    examples, _ = training_examples(rows, chat, args, args.iteration, rank=-1)
    known = os.path.join(args.out, "state", f"reference-{args.iteration}.json")
    begun = glob.glob(os.path.join(glob.escape(args.out), "state", f"training-{args.iteration}-*"))
    with files.restoring(known):
        was = files.read_json(known)["digest"] if begun else None
    if begun and was != run.stream([e["responses"] for e in examples]):
        raise run.UserError(f"{table}: iteration {args.iteration} was begun on another table; give that one, or "
                            "another --out")
