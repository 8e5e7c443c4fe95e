"""The measure: a model against the base it started from, head to head, with its standard error; and the table that
every run ends with.

    win_rate          one sample of the model against each of 4 samples of the base, both at temperature 1; the judge's
                      verdict (1, 1/2, 0) averaged over the 4, then over prompts; its standard error over prompts
    win_rate_greedy   the model's greedy answer against the base's
    accuracy_*        share of exact answers, where an oracle knows them (the embedded world); null elsewhere

Read win_rate with care. A model that has only become *sharper* (its likely answers likelier still) wins it without
having learned anything: the untrained base, decoded greedily, does. That row therefore stands in every table, and
learning is claimed from the greedy columns, which a lower temperature cannot move. (`python world.py` shows one more
control: the answer most frequent among 32 samples of the base.)
"""

import dataclasses
import json
import math
import os

import torch

import files
import games
import parallel
import prefmodel
import rollout
import run
import world
from chat import answer_limit, without_thinking


@dataclasses.dataclass
class Sampling:
    """How answers are drawn for an evaluation."""
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    max_rows: int = 256
    max_total_tokens: int = 0       # of prompt and answer together; 0 = no such bound

    def limit(self, prompt):
        """How many tokens the answer to a prompt's ids may have."""
        return answer_limit(prompt, self.max_new_tokens, self.max_total_tokens)


def answer(net, chat, ids, n, sampling, seed, greedy=False, desc=None, shard=(0, 1)):
    """n answers per prompt as text, without what a model thought first, and their mean length in tokens, with it:
    (B lists of n strings, float).

    Every prompt's random stream is tied to its place in the list.
    shard = (rank, ranks): prompts are shared out and gathered.
    """
    rank, ranks = shard
    mine = range(rank, len(ids), ranks)
    n = 1 if greedy else n
    samples = rollout.generate(net, [ids[b] for b in mine], n, [[sampling.limit(ids[b])] * n for b in mine],
                               temperature=0 if greedy else sampling.temperature, top_p=sampling.top_p,
                               stop_ids=chat.stop_ids, seeds=[seed + b for b in mine],
                               max_rows=sampling.max_rows, desc=desc)
    rows = [([without_thinking(chat.decode(t)) for t in group], sum(map(len, group)) / len(group))
            for group in samples.tokens]
    rows = parallel.gather(rows, len(ids))
    return [texts for texts, _ in rows], sum(length for _, length in rows) / len(rows)


def verdicts(judge, prompts, ours, theirs):
    """Mean verdict per prompt of ours (B lists of m answers) against theirs (B lists of n): [B], in [0, 1].

    A pair counts 1 if the judge gives ours more than 1/2, 0 if less, and a tie 1/2. The judge sees two answers at a
    time, so that no verdict depends on the others (an aggregating judge's would), and judges of pairs see both orders.
    Several processes share the prompts out.
    """
    rank, ranks = parallel.number_and_count()
    share = list(zip(prompts, ours, theirs))[rank::ranks]
    games = [(prompt, [a, b]) for prompt, mine, other in share for a in mine for b in other]
    means = []
    if games:
        P = judge.preference(*map(list, zip(*games)))[:, 0, 1].view(len(share), -1)
        means = ((P > 0.5).float() + 0.5 * (P == 0.5).float()).mean(1).tolist()
    return torch.tensor(parallel.gather(means, len(prompts)))


def mean_and_error(values):
    """(mean, standard error of the mean) of [B] values, ddof = 1."""
    values = values.double()
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


@dataclasses.dataclass
class Opponent:
    """The base's answers to the evaluation prompts, drawn once: 4 samples and the greedy one for each."""
    sampled: list
    greedy: list


def opponent(net, chat, ids, sampling, seed, shard=(0, 1)):
    """Draw the base's side of every later comparison."""
    sampled, _ = answer(net, chat, ids, 4, sampling, run.stream(seed, "opponent"),
                        desc="base: 4 samples a prompt", shard=shard)
    greedy, _ = answer(net, chat, ids, 1, sampling, 0, greedy=True, desc="base: greedy", shard=shard)
    return Opponent(sampled, greedy)


def against(net, chat, prompts, ids, opponent, judge, sampling, seed, name, shard=(0, 1)):
    """One row of the table: `net` against the base's answers. Returns summary.json's dict of figures.

    The sampled answers come from a stream of their own: the base against itself is two independent draws.
    """
    sampled, length = answer(net, chat, ids, 1, sampling, run.stream(seed, "evaluation"),
                             desc=f"{name}: sampling", shard=shard)
    greedy, greedy_length = answer(net, chat, ids, 1, sampling, 0, greedy=True, desc=f"{name}: greedy", shard=shard)
    row = {"name": name, "prompts": len(prompts), **_figures(judge, prompts, sampled, opponent, ""),
           **_figures(judge, prompts, greedy, opponent, "_greedy"),
           "accuracy_sampled": exact(judge, prompts, sampled), "accuracy_greedy": exact(judge, prompts, greedy),
           "mean_length": length, "mean_length_greedy": greedy_length}
    if judge.name == "styles":      # the base's, where everything starts, out of its four samples a prompt
        row["styles"] = world.style_shares(sum(opponent.sampled if name == "base" else sampled, []))
    return row


def base_greedy_row(row, judge, prompts, opponent):
    """The table's second row: the untrained base, decoded greedily, against the base's samples."""
    rate, error = mean_and_error(verdicts(judge, prompts, opponent.greedy, opponent.sampled))
    return {**row, "name": "base, greedy", "win_rate": rate, "win_rate_se": error,
            "accuracy_sampled": row["accuracy_greedy"], "mean_length": row["mean_length_greedy"]}


def _figures(judge, prompts, ours, opponent, suffix):
    theirs = opponent.greedy if suffix else opponent.sampled
    rate, error = mean_and_error(verdicts(judge, prompts, ours, theirs))
    return {f"win_rate{suffix}": rate, f"win_rate{suffix}_se": error}


def exact(judge, prompts, answers):
    """Share of answers with the full mark 1; None where the judge's marks do not lie between 0 and 1, as an oracle's, a
    verifier's or a bounded function's do."""
    if getattr(judge, "bounds", None) != (0, 1):
        return None
    return float((judge.reward(prompts, answers) == 1).double().mean())


class Scoreboard:
    """The rows of a run's table, and the base's answers that all of them are measured against. Both are kept in the
    run's state/ and made only once, so that a resumed run goes on with the same.

    prompts: {name: (texts, their ids)}; "test" is what the table is played on.
    """

    def __init__(self, record, chat, judge, prompts, sampling, seed, shard=(0, 1)):
        self.record, self.chat, self.judge, self.prompts, self.sampling = record, chat, judge, prompts, sampling
        self.seed, self.shard = seed, shard
        self.rows_file, self.base_file = (record.path("state", name) for name in ("evaluations.json", "base_side.json"))
        self.harder = harder_prompts(judge, chat, sampling, len(prompts["test"][0]) if "test" in prompts else 0)
        self.rows, self.base = [], {}
        if os.path.exists(self.rows_file):
            with files.restoring(self.rows_file):
                self.rows = list(files.read_json(self.rows_file)["evaluations"])
        if os.path.exists(self.base_file):
            with files.restoring(self.base_file):
                self.base = {name: Opponent(**side) for name, side in files.read_json(self.base_file).items()}

    def __contains__(self, name):
        """Has a model of this name been evaluated?"""
        return any(row["name"] == name for row in self.rows)

    def draw_base(self, net, *names):
        """The base's answers to the prompts of these names; `net` is the base."""
        missing = [name for name in names if name not in self.base]
        for name in missing:
            self.base[name] = opponent(net, self.chat, self.prompts[name][1], self.sampling,
                                       run.stream(self.seed, name), self.shard)
        if missing and self.shard[0] == 0:
            files.write_json(self.base_file, {name: dataclasses.asdict(sides) for name, sides in self.base.items()})

    def add(self, name, net, more=lambda: {}):
        """Evaluate `net` as the row `name`, with the figures of more() besides. Returns the row. The first one is the
        base itself; the base decoded greedily comes after it."""
        texts, ids = self.prompts["test"]
        row = against(net, self.chat, texts, ids, self.base["test"], self.judge, self.sampling, self.seed, name,
                      self.shard)
        if self.harder:
            row["harder"] = {kind: self.accuracy(net, kind) for kind in self.harder}
        greedy = [] if self.rows else [base_greedy_row(row, self.judge, texts, self.base["test"])]
        row |= more()
        self.rows += [row, *greedy]
        self.record.track_evaluation(row)
        if self.shard[0] == 0:
            files.write_json(self.rows_file, {"evaluations": self.rows})
        return row

    def accuracy(self, net, kind):
        """Share of a harder kind's queries that `net` answers exactly, greedily."""
        texts, ids = self.harder[kind]
        ours, _ = answer(net, self.chat, ids, 1, self.sampling, 0, greedy=True, desc=kind, shard=self.shard)
        return exact(self.judge, texts, ours)

    def rate(self, net, name, desc):
        """(win rate, standard error) of one sample a prompt against the base's four, on the prompts `name`."""
        texts, ids = self.prompts[name]
        ours, _ = answer(net, self.chat, ids, 1, self.sampling, run.stream(self.seed, name), desc=desc,
                         shard=self.shard)
        return mean_and_error(verdicts(self.judge, texts, ours, self.base[name].sampled))


HARDER = 500            # queries of each harder kind in a table's row, at most


def harder_prompts(judge, chat, sampling, count):
    """{kind: (texts, their ids)}: test queries of the kinds that an embedded world's oracle calls harder, as many as
    `count` and HARDER allow; {} for any other judge."""
    spoken, count = getattr(judge, "spoken", None), min(count, HARDER)
    found = {kind: spoken.queries("test", count, kind=kind) for kind in (spoken.harder if spoken and count else ())}
    return {kind: (texts, chat.encode_all(texts, 0, sampling.max_new_tokens)) for kind, texts in found.items()}


def kept_epoch(record, t):
    """Which epoch iteration t kept, and the mean log-ratios of its winners and losers over that epoch's steps, in nats,
    out of metrics.jsonl. (Means while training moves; the last epochs' rates are small, so they are close to the
    checkpoint's own.)"""
    if record.rank:
        return {}
    with open(record.path("metrics.jsonl")) as file:
        rows = [row for row in map(json.loads, file) if row["iteration"] == t]
    rated = [row for row in rows if "validation_win_rate" in row]
    epoch = max(rated, key=lambda row: row["validation_win_rate"])["epoch"] if rated else rows[-1]["epoch"]
    steps = [row for row in rows if row["epoch"] == epoch and "logratio_w" in row]
    names = ("logratio_w", "logratio_l", *(key for _, _, key, _ in QUERIES))    # and what pi_t asked, where it asked
    return {"epoch": epoch, **{name: sum(row[name] for row in steps) / len(steps) for name in names
                               if name in steps[0]}}


# ---------------------------------------------------------------------------------------------------------------------
# tables


# Columns of a run's table: heading, width, and what a row says there
FIGURES = [("win rate", 13, lambda row: f"{row['win_rate']:.3f} ±{row['win_rate_se']:.3f}"),
           ("greedy vs greedy", 16, lambda row: f"{row['win_rate_greedy']:.3f} ±{row['win_rate_greedy_se']:.3f}"),
           ("acc. sampled", 12, lambda row: decimals(sampled_accuracy(row))),
           ("acc. greedy", 11, lambda row: decimals(row["accuracy_greedy"])),
           ("tokens", 7, lambda row: f"{row['mean_length']:.1f}")]
# and what lsp.py's rows say of the Challenger's queries besides; such a column stands only where a row has it
QUERIES = [("malformed", 9, "malformed", "{:.1%}"), ("operations", 10, "ops", "{:.2f}"),
           ("overlap", 7, "overlap", "{:.3f}"), ("base acc. on queries", 20, "base_accuracy", "{:.3f}")]


def decimals(value):
    """Three of them; a dash for None."""
    return "-" if value is None else f"{value:.3f}"


def sampled_accuracy(row):
    """What a table shows as a row's sampled accuracy: nothing for a base that was decoded greedily."""
    return None if row["name"].endswith(", greedy") else row.get("accuracy_sampled")


def table(rows):
    """The evaluations as text, one row a model."""
    queries = [column for column in QUERIES if any(row.get(column[2]) is not None for row in rows)]
    width = max(16, *(len(row["name"]) for row in rows))
    harder = [(kind, 8) for kind in rows[0].get("harder", ())]
    lines = [" " * width + "".join(f" {heading:>{size}s}" for heading, size, *_ in FIGURES + harder + queries)]
    for row in rows:
        cells = [f"{cell(row):>{size}s}" for _, size, cell in FIGURES]
        cells += [f"{decimals(row.get('harder', {}).get(kind)):>{size}s}" for kind, size in harder]
        for _, size, key, form in queries:
            cells.append(f"{'-' if row.get(key) is None else form.format(row[key]):>{size}s}")
        lines.append(f"{row['name']:{width}s} " + " ".join(cells))
    return "\n".join(lines)


COLUMNS = {  # of the table over several runs: heading -> key of summary.json's evaluations, digits
    "win rate": ("win_rate", 3), "± s.e. of a run": ("win_rate_se", 3), "greedy vs greedy": ("win_rate_greedy", 3),
    "accuracy, sampled": ("accuracy_sampled", 3), "accuracy, greedy": ("accuracy_greedy", 3),
    "tokens": ("mean_length", 2), "log-ratio of winners": ("logratio_w", 2), "of losers": ("logratio_l", 2),
    "malformed": ("malformed", 3), "operations": ("ops", 2), "distinct": ("distinct", 3), "overlap": ("overlap", 3),
    "base accuracy on the queries": ("base_accuracy", 3)}


def table_of_runs(summaries):
    """Markdown: one row for each method and iteration, mean over its runs (seeds) and in brackets smallest-largest.
    The base is one row, whatever the method. Log-ratios in nats, over the kept epoch's steps."""
    groups, settings = {}, {}
    for summary in summaries:
        one = {k: v for k, v in summary["settings"].items() if k not in {"seed", "init", *run.PASSING, *run.MOMENTARY}}
        other = settings.setdefault(summary["method"], one)
        for name in one:
            if one[name] != other.get(name):
                raise run.UserError(f"table takes the mean over seeds, but two runs of {summary['method']} differ in "
                                    f"{name}: {other.get(name)} and {one[name]}; give one table to each")
        for row in summary["evaluations"]:
            name = row["name"] if row["name"].startswith("base") else f"{summary['method']}, {row['name']}"
            groups.setdefault(name, []).append(row | row.get("harder", {}))

    def cell(rows, key, digits):
        values = [sampled_accuracy(row) if key == "accuracy_sampled" else row.get(key) for row in rows]
        values = [value for value in values if value is not None]
        if not values:
            return "-"
        mean, low, high = (f"{v:.{digits}f}" for v in (sum(values) / len(values), min(values), max(values)))
        return mean if low == high or key.endswith("_se") else f"{mean} ({low} to {high})"

    every = sum(groups.values(), [])
    known = COLUMNS | {kind: (kind, 3) for row in every for kind in row.get("harder", ())}
    columns = {heading: how for heading, how in known.items() if any(row.get(how[0]) is not None for row in every)}
    lines = ["| | runs | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    lines += [f"| {name} | {len(rows)} | " + " | ".join(cell(rows, *how) for how in columns.values()) + " |"
              for name, rows in groups.items()]
    seconds = {}
    for summary in summaries:
        seconds.setdefault(summary["method"], []).append(summary["seconds"]["total"])
    lines.append("\nseconds a run: " + "; ".join(f"{method} {sum(x) / len(x):.0f} ({min(x):.0f} to {max(x):.0f})"
                                                  for method, x in seconds.items()))
    return "\n".join(lines)


def exact_styles(summary):
    """What the intransitive run would do without sampling and regression: the iterates of (4.1), or of its --self-play,
    as many as were evaluated, [T, 3], from the run's own start; None for a run without --all-responses, which does
    something else.

    eta is scaled by (K - 1)/K: among K samples each is compared with itself too, which gives 1/2, so that the mean of
    Phat - 1/2 is (K - 1)/K of P(y > pi_t) - 1/2. So is the magnet's weight: an answer's own log-ratio is part of the
    mean that is taken off it. The optimistic target is not shrunk.
    """
    s = summary["settings"]
    if not s["all_responses"]:
        return None
    T = max(1, len(played_styles(summary["evaluations"])) - 1)
    start, eta, shrunk = summary["evaluations"][0]["styles"], s["eta"], (s["k"] - 1) / s["k"]
    if s.get("self_play") == "optimistic":
        return games.optimistic(world.STYLES, start, eta, T)
    if s.get("self_play") == "magnetic":
        return games.magnetic(world.STYLES, start, shrunk * eta, T, shrunk * s["magnet"], s["magnet_every"])
    return games.multiplicative_weights(world.STYLES, start, shrunk * eta, T)


def played_styles(evaluations):
    """pi_1, ..., pi_{T+1} of an intransitive run as style shares: [T + 1, 3] (the row "base, greedy" is no iterate)."""
    return torch.tensor([row["styles"] for row in evaluations if row["name"] != "base, greedy"], dtype=torch.float64)


def style_line(evaluations):
    """One line on where an intransitive run stands."""
    played = played_styles(evaluations)
    now, mean = played[-1], played[:-1].mean(0)
    best_now, best_mean = games.best_response(world.STYLES, now), games.best_response(world.STYLES, mean)
    return (f"{evaluations[-1]['name']}: styles {_shares(now)}, best response {best_now:.3f}; "
            f"average so far {_shares(mean)}, best response {best_mean:.3f}")


def style_table(summary):
    """The end of an intransitive run as text: where it began, where the last iterate and the average are."""
    played, exact = played_styles(summary["evaluations"]), exact_styles(summary)
    T = len(played) - 1
    rows = [("base", played[0]), ("last iterate", played[-1]), (f"average of {T} iterates", played[:-1].mean(0))]
    if exact is not None:
        rows.append(("average, exact updates", exact.mean(0)))
    rows.append(("Nash equilibrium", torch.tensor(world.NASH_STYLES)))
    lines = [f"{'':24s} {'style 0':>8s} {'style 1':>8s} {'style 2':>8s} {'best response':>14s}"]
    for name, policy in rows:
        lines.append(f"{name:24s} " + " ".join(f"{p:8.3f}" for p in policy.tolist())
                     + f" {games.best_response(world.STYLES, policy):14.3f}")
    return "\n".join(lines)


def _shares(policy):
    return "/".join(f"{p:.2f}" for p in policy.tolist())


def check_world_prompts(judge, prompts, flag="--prompts"):
    """Raises UserError where a world's own judge is asked about prompts of another language."""
    spoken = prefmodel.world_of(judge)
    if spoken is not None and not all(map(spoken.parse, prompts)):
        raise run.UserError(f"--judge {judge} knows only its embedded world's queries; "
                            f"with other {flag} give --judge pairrm:DIR_OR_HUB_ID")


def check_speaks_world(path, net, chat, spoken, flag="--model (or --vs)",
                       remedy="--prompts FILE and --judge pairrm:DIR_OR_HUB_ID"):
    """Raises UserError for a checkpoint that cannot read the queries of the world `spoken`, or whose answers have a
    style where the world's have none, or none where they have one."""
    if chat.tokenizer.get_vocab() != spoken.make_tokenizer().get_vocab():
        raise run.UserError(f"{flag} {path} does not speak the embedded world's language; give {remedy}")
    answers = world.answers(net, chat.tokenizer, spoken.queries("validation", 32), temperature=0)
    styled = sum(world.style(a) is not None for a in answers)
    if not spoken.styles and styled > 16:
        raise run.UserError(f"{flag} {path} answers in styles, as in the intransitive world; "
                            "give another checkpoint, or --judge styles (sppo.py: --world intransitive)")
    if spoken.styles and not styled:
        raise run.UserError(f"{flag} {path} answers in no style; give --judge oracle (for sppo.py leave out "
                            "--world intransitive), or a checkpoint of the intransitive world")
