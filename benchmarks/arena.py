"""`python eval.py arena`: Arena-Hard-Auto's score of a model against a baseline, with its interval.

A judge sees the model's and the baseline's answer to a hard prompt and gives one of five labels, A>>B to B>>A. Judges
favour a place, so that each prompt is played twice, with the model as B in the first game and as A in the second. A win
by much counts three times. The score is the share of these battles that the model wins, ties one half, in percent.
"""

import dataclasses
import json

import numpy as np

import run
from benchmarks.judgments import JudgmentSettings, group, parse_with_files, read_judgments, table
from flags import flag


@dataclasses.dataclass
class ArenaSettings(JudgmentSettings):
    """Flags of `python eval.py arena`."""
    COMMAND = "eval.py arena"
    seed: int = flag(0, "seed of the bootstrap")


FIELDS = {"judge": str, "model": str, "games": list}
LABELS = {"A>>B": (1, 3), "A>B": (1, 1), "A=B": (0.5, 1), "B>A": (0, 1), "B>>A": (0, 3)}    # A's points, their weight
LABELS |= {label.translate(str.maketrans("AB>", "BA<")): value for label, value in LABELS.items()}     # B<<A is A>>B


def arena_scores(labels, seed):
    """Arena-Hard's score, in percent, of n prompts: labels [n] of (label with the baseline as A, label with the model
    as A), seed of the bootstrap.

    interval: 5th and 95th percentile of the score over 100 bootstrap samples of prompts. interval_battles: the same
    over samples of battles, as Arena-Hard has it: too narrow where the two orders, and the three copies of a strong
    win, agree. The score is the mean itself, free of the noise (about 0.1) in Arena-Hard's mean of bootstrapped means.

    >>> arena_scores([("B>>A", "A>B"), ("A>B", "A=B")], 0)["score"]     # wins 3 + 1 of 4, then 0 + 1/2 of 2
    75.0
    """
    outcomes = np.array([[LABELS[a], LABELS[b]] for a, b in labels], float)     # [n, 2 games, (points, weight)]
    points, weight = outcomes[:, :, 0], outcomes[:, :, 1]
    points[:, 0] = 1 - points[:, 0]                                             # there the baseline is A
    rng = np.random.default_rng(seed)

    def interval(total, count):
        pick = rng.integers(len(total), size=(100, len(total)))
        return np.quantile(100 * total[pick].sum(1) / count[pick].sum(1), (0.05, 0.95)).tolist()

    battles = np.repeat(points.ravel(), weight.ravel().astype(int))
    return {"score": 100 * float(battles.mean()), "interval": interval((points * weight).sum(1), weight.sum(1)),
            "interval_battles": interval(battles, np.ones(len(battles))), "n_prompts": len(labels)}


def main(argv):
    """Print the score of each model, by category and then the best first (in v2.0 each category has a baseline of its
    own: they are never pooled)."""
    args, paths = parse_with_files(ArenaSettings, argv,
                                   "Arena-Hard-Auto: score against the baseline in percent, with its interval")
    rows = [(where, _complete(where, row)) for where, row in read_judgments(paths, FIELDS)]
    models = group(rows, by=["category", "model"], key=["uid"])
    results = [_result(category, name, played, args.seed) for (category, name), played in models.items()]
    results.sort(key=lambda r: (str(r["category"]), -r["score"]))
    print("\n".join(map(json.dumps, results)) if args.json else _as_text(results))


def _complete(where, row):
    """The row with what Arena-Hard v0.1 left out: it says question_id for uid, and had one category and baseline."""
    defaults = {"uid": row.get("question_id"), "category": "arena-hard-v0.1", "baseline": "the baseline"}
    row = row | {name: value for name, value in defaults.items() if name not in row}
    if not all(isinstance(row[name], (str, int)) for name in defaults):
        raise run.UserError(f"--judgments {where}: without `uid` (or question_id), `category` or `baseline` as text; "
                            "give Arena-Hard's model_judgment files")
    return row


def _result(category, name, rows, seed):
    """The figures of one model in one category. Raises UserError for rows that are not Arena-Hard's, for two baselines,
    and where no prompt has both verdicts."""
    labels, baseline = [], rows[0][1]["baseline"]
    for where, row in rows:
        pair = [game.get("score") if isinstance(game, dict) else game for game in row["games"]]
        if row["baseline"] != baseline:
            raise run.UserError(f"--judgments {where}: {name} plays {row['baseline']}, but {baseline} elsewhere in "
                                f"{category}; give judgments against one baseline")
        if len(pair) != 2 or not all(label is None or label in list(LABELS) for label in pair):
            raise run.UserError(f"--judgments {where}: the scores of `games` are {pair}; two are needed, each "
                                "A>>B, A>B, A=B, B>A, B>>A, or null for a failed judgment")
        if None not in pair:                    # one order alone would bring the favoured place back
            labels.append(pair)
    if not labels:
        raise run.UserError(f"--judgments: no prompt of {name} in {category} has both verdicts; judge it again")
    return {"model": name, "category": category, "baseline": baseline,
            **arena_scores(labels, run.stream(seed, "arena", category, name)), "n_dropped": len(rows) - len(labels)}


def _as_text(results):
    """A row for each model in each category, percent; 5 % and 95 % are the ends of the interval."""
    rows = []
    for result in results:
        figures = [f"{percent:.1f}" for percent in (result["score"], *result["interval"])]
        rows.append([result["category"] or "-", result["model"], result["baseline"], *figures, result["n_prompts"],
                     result["n_dropped"]])
    return table(["category", "model", "baseline", "score %", "5 %", "95 %", "prompts", "without both verdicts"], rows)
