"""Evaluation: is the model better than the one it started from?

    python eval.py winrate --model A --vs B [--prompts F] [--judge J]     head-to-head, with a standard error
    python eval.py table RUN_DIR...                                       several runs in one table, means over seeds
    python eval.py plot RUN_DIR...                                        curves of one run or several in one picture
    python eval.py crossplay CKPT... [--prompts F] [--judge J]            each against each, and the game's Nash mixture
    python eval.py exact RUN_DIR...                                       embedded worlds: what their oracles know
    python eval.py generate --model M --prompts F --format alpaca --out O   answers, as alpaca, mtbench, arena or jsonl
    python eval.py judge --answers O --reference R --mode pairwise ...    judgments on them: pairwise, arena or single
    python eval.py alpaca --annotations F [--gamed F --difficulty F]      AlpacaEval 2.0, length-controlled
    python eval.py mtbench --judgments F...                               MT-Bench
    python eval.py arena --judgments F...                                 Arena-Hard-Auto
    python eval.py verify --task gsm8k|math|humaneval --answers F         answers that are right or wrong by themselves

This file is the command line. The first four commands stand here and use winrate.py (what is measured, and how to read
it), games.py and plots.py; the others are benchmarks/NAME.py.
"""

import dataclasses
import importlib
import itertools
import json
import os

import files
import flags
import games
import plots
import prefmodel
import run
import winrate
import world
from benchmarks.replies import Replies
from chat import load_checkpoint, read_prompts, read_rows
from flags import flag


@dataclasses.dataclass
class ContestSettings:
    """Flags of the commands that let checkpoints play."""
    prompts: str = flag("", "prompts file or hub data set, as in sppo.py; without it the queries of the judge's "
                            "embedded world")
    judge: str = flag("oracle", "who judges: oracle, oracle:WORLD or styles (embedded worlds), " + prefmodel.KINDS)
    estimator: str = flag("pairwise", "PairRM's logits to P: pairwise or aggregate", ("pairwise", "aggregate"))
    part: str = flag("test", "the embedded world's queries to play on; validation is where settings are picked",
                     ("test", "validation"))
    count: int = flag(2000, "at most this many prompts", at_least=1)
    max_new_tokens: int = flag(0, "tokens an answer may have; 0: 24 in an embedded world, else 1024", at_least=0)
    temperature: float = flag(1.0, "sampling temperature of all sides; 0 is greedy", at_least=0)
    top_p: float = flag(1.0, "nucleus of all sides; 1 keeps every token", above=0, at_most=1)
    max_rows: int = flag(256, "answers sampled at once", at_least=1)
    template_option: str = flag("", "name=value[,name=value] for the checkpoints' chat templates "
                                    "[enable_thinking=false where they know the name]")
    seed: int = flag(0, "seed of all sampling")
    device: str = flag("auto", "cuda, mps or cpu")
    dtype: str = flag("auto", "float32 or bfloat16", ("auto", "float32", "bfloat16"))
    json: bool = flag(False, "print the figures as one JSON object")


@dataclasses.dataclass
class WinrateSettings(ContestSettings):
    """Flags of `python eval.py winrate`."""
    COMMAND = "eval.py winrate"
    model: str = flag("", "checkpoint directory or hub id to be evaluated (needed)", needed=True)
    vs: str = flag("", "the checkpoint it plays against (needed)", needed=True)


@dataclasses.dataclass
class CrossplaySettings(ContestSettings):
    """Flags of `python eval.py crossplay`."""
    COMMAND = "eval.py crossplay CKPT CKPT ..."
    out: str = flag("out/crossplay", "directory for crossplay.json and crossplay.png; the same command goes on "
                                     "where it was interrupted")


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints against checkpoints


def contest(args):
    """(prompts, judge, Sampling) out of a ContestSettings. Raises UserError for settings that do not go together."""
    spoken = prefmodel.world_of(args.judge)
    if args.prompts:
        prompts = read_prompts(args.prompts)[:args.count]
    else:
        prompts = (spoken or world.OPERATIONS).queries(args.part, args.count)
    winrate.check_world_prompts(args.judge, prompts)
    judge = prefmodel.load(args.judge, args.estimator, *run.device_and_dtype(args.device, args.dtype))
    prefmodel.check_references(judge, prompts)
    longest = args.max_new_tokens or (24 if spoken else 1024)
    return prompts, judge, winrate.Sampling(longest, args.temperature, args.top_p, args.max_rows)


def contestant(path, args, prompts, sampling, flag="--model (or --vs)"):
    """(network, Chat, ids of the prompts) of one checkpoint in a contest; it must speak the judge's language."""
    net, chat = load_checkpoint(path, *run.device_and_dtype(args.device, args.dtype), args.template_option)
    spoken = prefmodel.world_of(args.judge)
    if spoken:
        winrate.check_speaks_world(path, net, chat, spoken, flag)
    return net, chat, chat.encode_all(prompts, 0, sampling.max_new_tokens)


def winrate_command(argv):
    """The sub-command `winrate`: A against B on one set of prompts."""
    args = flags.parse(WinrateSettings, argv, "head-to-head win rate of --model against --vs, ties counted one half")
    prompts, judge, sampling = contest(args)
    name_of_model, name_of_vs = short_names([args.model, args.vs])
    net, chat, ids = contestant(args.vs, args, prompts, sampling)
    theirs = winrate.opponent(net, chat, ids, sampling, args.seed)
    rows = [winrate.against(net, chat, prompts, ids, theirs, judge, sampling, args.seed, name_of_vs)]
    rows.append({**winrate.base_greedy_row(rows[0], judge, prompts, theirs), "name": f"{name_of_vs}, greedy"})
    net = None                          # one model in memory at a time
    net, chat, ids = contestant(args.model, args, prompts, sampling)
    rows.append(winrate.against(net, chat, prompts, ids, theirs, judge, sampling, args.seed, name_of_model))
    print(json.dumps({**rows[-1], "model": args.model, "vs": args.vs, "judge": judge.name}) if args.json else
          f"{args.model} against {args.vs}, {len(prompts)} prompts, judge {judge.name}\n{winrate.table(rows)}")


def crossplay_command(argv):
    """The sub-command `crossplay`: one answer of every checkpoint to every prompt, then everyone against everyone."""
    paths = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    args = flags.parse(CrossplaySettings, argv[len(paths):],
                     "crossplay CKPT CKPT ... [flags]: checkpoints (directories or hub ids), each against each, ties "
                     "counted one half;\nthe Nash mixture of the game they make, how exploitable each is, and cycles")
    if len(paths) < 2:
        raise run.UserError("crossplay needs two checkpoints or more, before any flag: python eval.py crossplay "
                            "out/sppo/iter-1 out/sppo/iter-2 [--count 500]")
    if len(set(map(os.path.normpath, paths))) < len(paths):
        raise run.UserError("crossplay was given one checkpoint twice; name each once")
    names = short_names(paths)
    prompts, judge, sampling = contest(args)
    n, pairs = len(paths), list(itertools.combinations(range(len(paths)), 2))
    replies = Replies(os.path.join(args.out, "crossplay.json"), args, [paths, prompts])

    def answer_all(missing):    # answers are kept as text, so that one model is in memory at a time
        for i in missing:
            net, chat, ids = contestant(paths[i], args, prompts, sampling, "the checkpoint")
            texts, _ = winrate.answer(net, chat, ids, 1, sampling, run.stream(args.seed, "crossplay", i),
                                      desc=paths[i])
            yield [(i, texts)]
            net = None

    def judge_pairs(missing):   # each pair once
        for k in missing:
            i, j = pairs[k - n]
            yield [(k, winrate.mean_and_error(winrate.verdicts(judge, prompts, answers[i], answers[j])))]

    if not replies.report:
        answers = replies.collect(n, answer_all, "answering")
        results = replies.collect(n + len(pairs), judge_pairs, "judging")[n:]
        figures = {"judge": judge.name, "prompts": len(prompts),
                   **games.cross_figures(names, *games.payoffs(n, results))}
        replies.finish([figures], figures, as_list=False)
        plots.plot_payoffs(figures, os.path.join(args.out, "crossplay.png"))
    figures = replies.report
    print(json.dumps(figures) if args.json else
          f"{len(paths)} checkpoints, {len(prompts)} prompts, judge {judge.name}; ± one standard error\n"
          f"{games.cross_table(figures)}\nwrote {args.out}/crossplay.json and crossplay.png")


def short_names(paths):
    """The shortest endings of paths that tell those that differ apart: what tables call checkpoints.

    >>> short_names(["out/sppo/iter-3", "out/dpo/iter-3/"]), short_names(["out/sppo/iter-1", "out/sppo/iter-3"])
    (['sppo/iter-3', 'dpo/iter-3'], ['iter-1', 'iter-3'])
    """
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    different = len(set(map(tuple, parts)))
    depth = next(d for d in range(1, 1 + max(map(len, parts))) if len({tuple(p[-d:]) for p in parts}) == different)
    return ["/".join(p[-depth:]) for p in parts]


# ---------------------------------------------------------------------------------------------------------------------
# finished runs


def finished_runs(command, argv, needed):
    """[(directory, summary)] of the run directories in argv. needed: the keys that each summary must have."""
    if not argv or any(word.startswith("--") for word in argv):
        raise run.UserError(f"{command} takes run directories and no such flag: "
                            f"python eval.py {command} out/sppo [out/other ...]")
    runs = []
    for name in argv:
        path = os.path.join(name, "summary.json")
        if not os.path.exists(path):
            raise run.UserError(f"{path} does not exist; {command} needs the directory of a finished run")
        runs.append((name, files.read_json(path)))
        if not all(runs[-1][1].get(key) for key in needed):
            raise run.UserError(f"{path} is no summary of a finished run; give the directory of an sppo.py or lsp.py "
                                "run")
    return runs


def table_command(argv):
    """The sub-command `table`: several runs, say seeds, of one or several methods in one table."""
    if argv and argv[0] in ("-h", "--help"):
        print("usage: eval.py table RUN_DIR...\n\n"
              "Means over the runs of each method, with smallest and largest, as a Markdown table.")
        return
    found = finished_runs("table", argv, ("method", "settings", "seconds", "evaluations"))
    print(winrate.table_of_runs([summary for _, summary in found]))


def plot_command(argv):
    """The sub-command `plot`: one picture from the summaries of the named run directories."""
    if argv and argv[0] in ("-h", "--help"):
        print("usage: eval.py plot RUN_DIR... [--seconds]\n\n"
              "One run: its curves.png is drawn again. Several: a curves.png here, a colour for each method, runs\n"
              "that differ in their seed as a band; against gradient steps, or with --seconds against time.")
        return
    directories, runs = [word for word in argv if word != "--seconds"], []
    for name, summary in finished_runs("plot", directories, ("evaluations",)):
        log = os.path.join(name, "metrics.jsonl")
        metrics = [row for _, row in read_rows("the log", log)] if os.path.exists(log) and os.path.getsize(log) else []
        runs.append((os.path.basename(os.path.normpath(name)), summary | {"metrics": metrics}))
    path = os.path.join(directories[0], "curves.png") if len(directories) == 1 else "curves.png"
    plots.plot(runs, path, against="seconds" if "--seconds" in argv else "steps")
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------

HERE = {"winrate": winrate_command, "table": table_command, "plot": plot_command, "crossplay": crossplay_command}
BENCHMARKS = ("exact", "generate", "judge", "alpaca", "mtbench", "arena", "verify")


def main(argv):
    """Run the sub-command that argv names."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] in HERE:
        HERE[argv[0]](argv[1:])
    elif argv[0] in BENCHMARKS:
        importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])
    else:
        raise run.UserError(f"{argv[0]} is no command of eval.py; give one of {', '.join([*HERE, *BENCHMARKS])}")


if __name__ == "__main__":
    run.main(main)
