"""TODO"""

import dataclasses
import json

import numpy as np

import run


@dataclasses.dataclass
class ArenaSettings(MTBenchSettings):
    """Flags of `python eval.py arena`."""
    seed: int = run.flag(0, "seed of the bootstrap")


LABELS = {"A>>B": (1, 3), "A>B": (1, 1), "A=B": (0.5, 1), "B>A": (0, 1), "B>>A": (0, 3)}    # A's points, their weight
LABELS |= {label.translate(str.maketrans("AB>", "BA<")): value for label, value in LABELS.items()}     # B<<A is A>>B


def arena_scores(labels, seed):
    """Arena-Hard's score, in percent, of (label with the baseline as A, label with the model as A) for n prompts: each
    is played in both orders, because judges favour a place, and a strong win counts three times.

    interval: 5th and 95th percentile of the score over 100 bootstrap samples of prompts. interval_battles: the same
    over samples of battles, as Arena-Hard has it: too narrow where the two orders, and the three copies of a strong
    win, agree. The score is the mean itself, free of the noise (about 0.1) in Arena-Hard's mean of bootstrapped means.
    """
    points, weight = np.moveaxis(np.array([[LABELS[a], LABELS[b]] for a, b in labels], float), 2, 0)    # both [n, 2]
    points[:, 0] = 1 - points[:, 0]
    rng = np.random.default_rng(seed)

    def interval(total, count):
        pick = rng.integers(len(total), size=(100, len(total)))
        return np.quantile(100 * total[pick].sum(1) / count[pick].sum(1), (0.05, 0.95)).tolist()

    battles = np.repeat(points.ravel(), weight.ravel().astype(int))
    return {"score": 100 * float(battles.mean()), "interval": interval((points * weight).sum(1), weight.sum(1)),
            "interval_battles": interval(battles, np.ones(len(battles))), "n_prompts": len(labels)}


def arena(argv):
    """The sub-command `arena`: Arena-Hard-Auto's score of each model, by category and then the best first (in v2.0 each
    category has a baseline of its own: they are never pooled)."""
    def complete(row):      # v0.1 says question_id for uid, and had one category and one baseline
        defaults = {"uid": row.get("question_id"), "category": "arena-hard-v0.1", "baseline": "the baseline"}
        row |= {k: v for k, v in defaults.items() if k not in row}
        if not all(isinstance(row[k], (str, int)) for k in defaults):
            raise run.UserError("--judgments: a row without `uid` (or question_id), `category` or `baseline` as text; "
                                "give Arena-Hard's model_judgment files")

    fields = {"judge": str, "model": str, "games": list}
    s, groups = read_judgments(ArenaSettings, argv, "Arena-Hard-Auto: score against the baseline, with its interval",
                               fields, ("category", "model"), ("uid",), complete)
    results = []
    for (category, name), rows in groups.items():
        labels, baseline = [], rows[0][1]["baseline"]
        for where, row in rows:
            pair = [game.get("score") if isinstance(game, dict) else game for game in row["games"]]
            if row["baseline"] != baseline:
                raise run.UserError(f"--judgments {where}: {name} plays {row['baseline']}, but {baseline} elsewhere in "
                                    f"{category}; give judgments against one baseline")
            if len(pair) != 2 or not all(label is None or label in list(LABELS) for label in pair):
                raise run.UserError(f"--judgments {where}: the scores of `games` are {pair}; two are needed, each "
                                    "A>>B, A>B, A=B, B>A, B>>A, or null for a failed judgment")
            labels += [pair] if None not in pair else []        # one order alone would bring the favoured place back
        if not labels:
            raise run.UserError(f"--judgments: no prompt of {name} in {category} has both verdicts; judge it again")
        results.append({"model": name, "category": category, "baseline": baseline,
                        **arena_scores(labels, run.stream(s.seed, "arena", category, name)),
                        "n_dropped": len(rows) - len(labels)})
    for r in sorted(results, key=lambda r: (r["category"], -r["score"])):
        print(json.dumps(r) if s.json else
              f"{r['model']}, {r['category'] or 'no category'}: {r['score']:.1f} % (90 % interval "
              f"{r['interval'][0]:.1f} to {r['interval'][1]:.1f}) against {r['baseline']}; {r['n_prompts']} "
              f"prompts, {r['n_dropped']} without both verdicts dropped")
