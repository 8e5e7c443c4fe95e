"""`python eval.py exact RUN...`: what only an embedded world can tell of the checkpoints that runs left behind.

In a world with an oracle: the share of queries that a checkpoint answers exactly, decoded greedily, on the world's
ordinary queries and on its harder kinds (world.World.harder). In the intransitive world: the best response to the
iterates, and how far they are from the Nash equilibrium.

Runs that differ in their seed alone are one contestant. A mean has two sources of error, the seeds and the queries, and
± is the root of both variances together (with one run only the queries'). All contestants get the same
queries, so a difference (--vs) is taken query by query: what makes a query hard for everybody cancels.

--stop chooses each run's checkpoint by its accuracy on validation queries, the first of equals: early stopping, without
which a run on few data would be judged by what it memorised in the end. --part validation looks at nothing else: that
is how settings are tried out.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import re

import torch

import files
import flags
import games
import plots
import run
import winrate
import world
from chat import load_checkpoint
from flags import flag


@dataclasses.dataclass
class ExactSettings:
    """Flags of `python eval.py exact`."""
    COMMAND = "eval.py exact RUN ..."
    vs: str = flag("", "run directories, with commas between: what the others are compared with, query by query")
    part: str = flag("test", "the world's queries; validation is where settings are picked", ("test", "validation"))
    stop: bool = flag(False, "take each run's checkpoint that is best on validation queries, not the last")
    count: int = flag(2000, "ordinary queries; also validation queries for --stop", at_least=2)
    harder: int = flag(1000, "queries of each harder kind; 0 = none", at_least=0)
    last: int = flag(10, "intransitive world: the last so many iterates of each run", at_least=1)
    picture: str = flag("", "write a picture of accuracy by number of distinct queries to this PNG")


def main(argv):
    """The sub-command: a table of contestants, differences below it, and a picture."""
    paths = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    args = flags.parse(ExactSettings, argv[len(paths):],
                       "exact RUN RUN ... [flags]: what an embedded world knows of the checkpoints that runs left")
    if not paths:
        raise run.UserError("exact needs run directories, before any flag: python eval.py exact out/lsp out/grpo")
    paths, rivals = (once(path for path in group if path) for group in (paths, args.vs.split(",")))
    rival = plots.groups([(path, summary_of(path)) for path in rivals])
    if len(rival) > 1:
        raise run.UserError(f"--vs {args.vs} names more than one contestant; give runs that differ in their seed alone")
    others = [path for path in once([*rivals, *paths]) if path not in rivals]
    contestants = plots.groups([(path, summary_of(path)) for path in others])
    labels = [label for label, _ in contestants]
    contestants += [(f"{label}, --vs" if label in labels else label, members) for label, members in rival]
    check_fit(contestants, args)
    if entry_of(contestants[0][1][0][1]).styles:
        print(style_rows(contestants, args))
        return
    results = {label: [measured(path, summary, args) for path, summary in members] for label, members in contestants}
    print(table(results))
    for label in labels if rival else ():
        theirs = contestants[-1][0]
        print(f"{label} minus {theirs}: " + ", ".join(
            "{} {:+.4f} ±{:.4f}".format(kind, *difference(results[label], results[theirs], kind))
            for kind in kinds(results)))
    if args.picture:
        curves = {label: (members[0][1]["settings"], {kind: mean_and_error(results[label], kind)
                                                      for kind in kinds(results)}) for label, members in contestants}
        plots.plot_worth(curves, args.picture)
        print(f"wrote {args.picture}")


def once(paths):
    """The paths without those that lead where an earlier one leads, by whatever name: no run counts twice."""
    known = {}
    for path in paths:
        known.setdefault(os.path.realpath(path), os.path.normpath(path))
    return list(known.values())


def check_fit(contestants, args):
    """Raises UserError for runs of several worlds, and for flags that the world has no use for."""
    summaries = [summary for _, members in contestants for _, summary in members]
    names = sorted({summary["settings"]["world"] for summary in summaries})
    if len(names) > 1:
        raise run.UserError(f"exact was given runs of the worlds {' and '.join(names)}; make one table for each")
    unused = ("stop", "vs", "picture", "harder") if world.WORLDS[names[0]].styles else ("last",)
    for field in dataclasses.fields(args):
        if field.name in unused and getattr(args, field.name) != field.default:
            raise run.UserError(f"--{field.name} does nothing in --world {names[0]}; leave it out")
    if args.picture and not all("train_prompts" in summary["settings"] for summary in summaries):
        raise run.UserError("--picture draws accuracy by lsp.py's --train-prompts; give runs of lsp.py alone")


def summary_of(path):
    """A run's summary. Raises UserError for a directory without one, or of another than an embedded world."""
    file = os.path.join(path, "summary.json")
    if not os.path.exists(file):
        raise run.UserError(f"{file} does not exist; exact needs the directory of an sppo.py or lsp.py run")
    summary = files.read_json(file)
    if (summary.get("settings") or {}).get("world") not in world.WORLDS:
        raise run.UserError(f"{file} is of no embedded world; nobody knows the right answers elsewhere (see "
                            "eval.py verify and eval.py winrate)")
    length = summary["settings"].get("iterations") or summary["settings"].get("steps")
    if summary["evaluations"][-1]["name"].split()[-1] != str(length):
        raise run.UserError(f"{path} has not ended: its last evaluation is {summary['evaluations'][-1]['name']} of "
                            f"{length}; finish it with --resume")
    summary["settings"].pop("test_prompts", None)           # the queries here are others
    return summary


def entry_of(summary):
    """The embedded world that a run was played in."""
    return world.WORLDS[summary["settings"]["world"]]


def checkpoints(path):
    """A run's checkpoints iter-k or step-k, in order. Raises UserError where there is none."""
    names = sorted((name for name in os.listdir(path) if re.fullmatch(r"(iter|step)-\d+", name)),
                   key=lambda name: int(name.split("-")[1]))
    if not names:
        raise run.UserError(f"{path} holds no checkpoint iter-k or step-k; give the directory of a run that has ended")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# a world with an oracle: right or wrong, query by query


def measured(path, summary, args):
    """One run's {"checkpoint": its name, kind: [Q] float64 of 1 where the answer is right, 0 elsewhere}."""
    names, file = checkpoints(path), os.path.join(path, "exact.json")
    known = files.read_json(file) if os.path.exists(file) else {}
    chosen = names[-1]
    if args.stop:
        rates = [rights(path, name, summary, "validation", "", args.count, known).mean() for name in names]
        chosen = names[max(range(len(names)), key=rates.__getitem__)]
    kind_of = {"": args.count} | (dict.fromkeys(entry_of(summary).harder, args.harder) if args.harder else {})
    found = {kind or "ordinary": rights(path, chosen, summary, args.part, kind, count, known)
             for kind, count in kind_of.items()}
    files.write_json(file, known, indent=None)
    return {"checkpoint": chosen, **found}


def rights(path, name, summary, part, kind, count, known):
    """[count] float64: which queries the checkpoint answers exactly. `known` is what exact.json holds, so that nothing
    is decoded twice: {checkpoint, its digest, and the queries with theirs: a string of 0 and 1}."""
    spoken = entry_of(summary)
    queries = queries_of(summary["settings"]["world"], part, kind, count)
    key = f"{name} {digest(path, name)} {part} {kind} {count} {queries_digest(queries)}"
    if key not in known:
        net, chat = load_checkpoint(os.path.join(path, name), "cpu", torch.float32)
        answers, _ = winrate.answer(net, chat, encoded(chat, queries), 1, SAMPLING, 0, greedy=True)
        known[key] = "".join("1" if spoken.score(q, a) == 1 else "0" for q, (a,) in zip(queries, answers))
    return torch.tensor([float(bit) for bit in known[key]], dtype=torch.float64)


def digest(path, name):
    """A short digest of a checkpoint's weights: another checkpoint under the same name has another one."""
    with open(os.path.join(path, name, "model.safetensors"), "rb") as file:
        return hashlib.blake2b(file.read(), digest_size=4).hexdigest()


SAMPLING = winrate.Sampling(max_new_tokens=24, max_rows=1000)
ENCODED = {}            # encoding the queries takes as long as answering them, and all checkpoints get the same


@functools.cache
def queries_of(name, part, kind, count):
    """The queries, a tuple, of the world of that name."""
    return tuple(world.WORLDS[name].queries(part, count, kind=kind))


def queries_digest(queries):
    """A short digest of the queries: a world whose entry was edited may ask others under the same name."""
    return hashlib.blake2b("\n".join(queries).encode(), digest_size=4).hexdigest()


def encoded(chat, queries):
    """The queries' ids."""
    if queries not in ENCODED:
        ENCODED[queries] = chat.encode_all(queries, 0, SAMPLING.max_new_tokens)
    return ENCODED[queries]


def kinds(results):
    """The kinds of queries that were measured."""
    return [kind for kind in next(iter(results.values()))[0] if kind != "checkpoint"]


def mean_and_error(runs, kind):
    """(mean accuracy, standard error) of one contestant's runs, over its seeds and over queries.

    >>> two = [{"ordinary": torch.tensor([1.0, 1, 0, 0])}, {"ordinary": torch.tensor([1.0, 1, 1, 0])}]
    >>> "{:.3f} {:.3f}".format(*mean_and_error(two, "ordinary"))        # the third query alone tells the seeds apart
    '0.625 0.239'
    """
    return difference(runs, [{kind: torch.zeros_like(runs[0][kind])}], kind)


def difference(ours, theirs, kind):
    """(difference of the mean accuracies, its standard error): seeds vary on both sides by themselves, queries are
    shared.

    Both variances contain the seed-by-query interaction, so it is subtracted once. Five seeds a side leave
    eight degrees of freedom at best: a difference of 2.3 standard errors is what chance gives one time in twenty.
    """
    sides = [torch.stack([one[kind] for one in runs]) for runs in (ours, theirs)]               # [seeds, Q] each
    by_query = sides[0].mean(0) - sides[1].mean(0)                                              # [Q]
    queries, seeds, together = float(by_query.var()) / len(by_query), 0.0, 0.0
    for side in sides:
        S, Q = side.shape
        if S > 1:
            seeds += float(side.mean(1).var()) / S
            rest = side - side.mean(1, keepdim=True) - side.mean(0) + side.mean()
            together += float(rest.square().sum()) / ((S - 1) * (Q - 1)) / (S * Q)
    return float(by_query.mean()), max(queries + seeds - together, queries, seeds) ** 0.5


def table(results):
    """Markdown: a row for each contestant."""
    columns = kinds(results)
    lines = ["| | runs | checkpoint | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    for label, runs in results.items():
        cells = ["{:.3f} ±{:.3f}".format(*mean_and_error(runs, kind)) for kind in columns]
        chosen = ", ".join(dict.fromkeys(one["checkpoint"] for one in runs))
        lines.append(f"| {label} | {len(runs)} | {chosen} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# the intransitive world


def style_rows(contestants, args):
    """Markdown: for each contestant the best response to its last iterates and their distance to the Nash equilibrium
    (Euclidean, of style shares), mean and standard error over seeds. Shares of 2,000 samples are noisy: a policy at the
    equilibrium would show a best response of .505 and a distance of .016."""
    lines = [f"| | runs | best response, mean of the last {args.last} iterates | worst of them | distance to Nash |",
             "|---" * 5 + "|"]
    nash = torch.tensor(world.NASH_STYLES, dtype=torch.float64)
    for label, members in contestants:
        rows = []
        for path, summary in members:
            shares = [iterate_styles(path, name, summary, args) for name in checkpoints(path)[-args.last:]]
            best = torch.tensor([games.best_response(world.STYLES, one) for one in shares])
            away = torch.stack([(one - nash).norm() for one in shares])
            rows.append((best.mean(), best.max(), away.mean()))
        cells = []
        for column in zip(*rows):
            values = torch.stack(column)
            error = f" ±{values.std() / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{error}")
        lines.append(f"| {label} | {len(members)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def iterate_styles(path, name, summary, args):
    """Style shares [3] float64 of a checkpoint's answers at temperature 1, one to each of args.count queries."""
    file = os.path.join(path, "exact.json")
    known = files.read_json(file) if os.path.exists(file) else {}
    queries = queries_of(summary["settings"]["world"], args.part, "", args.count)
    key = f"{name} {digest(path, name)} {args.part} styles {args.count} {queries_digest(queries)}"
    if key not in known:
        net, chat = load_checkpoint(os.path.join(path, name), "cpu", torch.float32)
        answers, _ = winrate.answer(net, chat, encoded(chat, queries), 1, SAMPLING, 0)
        known[key] = world.style_shares(sum(answers, []))
        files.write_json(file, known, indent=None)
    return torch.tensor(known[key], dtype=torch.float64)
