"""`python eval.py alpaca`: AlpacaEval 2.0's figures, as its leaderboard has them, from one model's annotations.

805 instructions; a judge says for each whether it prefers the model's answer or the baseline's. The win rate is the
mean of that. Judges like long answers, so the leaderboard's first figure is the *length-controlled* win rate: a
logistic regression says how the preference depends on the length, the instruction's difficulty and the model, and is
then asked about answers as long as the baseline's. `length_controlled` is that; the rest reads files and prints.
"""

import csv
import dataclasses
import json
import math
import sys
import typing

import numpy as np
import torch

import flags
import run
from chat import read_rows
from flags import flag
from winrate import mean_and_error


@dataclasses.dataclass
class AlpacaSettings:
    """Flags of `python eval.py alpaca`."""
    COMMAND = "eval.py alpaca"
    annotations: str = flag("", "one model's annotations by one judge, .json or .jsonl, gzipped or not (needed)",
                            needed=True)
    gamed: str = flag("", "AlpacaEval's df_gamed.csv (hub data set tatsu-lab/alpaca_eval), for length control")
    difficulty: str = flag("", "AlpacaEval's instruction_difficulty.csv, from the same place")
    instructions: str = flag("", "all the benchmark's instructions in the tables' order (any complete annotations),"
                                 " for --annotations that are a part of them or in another order; without it a "
                                 "part loses the difficulty term")
    json: bool = flag(False, "print the figures as one JSON object")


# ---------------------------------------------------------------------------------------------------------------------
# the figures


PENALTIES = 1 / np.logspace(-4, 4, 10)      # from 1e4 to 1e-4; scikit-learn's name for 1 / penalty is C
FOLDS = 5


def logistic_regression(X, y, weight, penalty, start=None):
    """argmin over w of sum_i weight_i CE(y_i, sigmoid(X_i w)) + penalty |w|_1: [d].

    X [n, d], weight [n], y [n] in [0, 1]: the cross-entropy takes soft targets as they are. Newton's method, each step
    to the minimum of the loss's parabola plus the penalty; `start` [d] saves steps where the solution is near.
    """
    w = np.zeros(X.shape[1]) if start is None else start
    for _ in range(100):                # about 7 steps
        p = 1 / (1 + np.exp(-X @ w))
        gradient, hessian = X.T @ (weight * (p - y)), (X.T * (weight * p * (1 - p))) @ X
        step = _lasso(hessian, hessian @ w - gradient, penalty, w) - w
        before = _mean_loss(X, y, weight, w) * len(y) + penalty * np.abs(w).sum()
        while np.abs(step).max() > 1e-10:       # a whole step may overshoot
            after = _mean_loss(X, y, weight, w + step) * len(y) + penalty * np.abs(w + step).sum()
            if after <= before:
                break
            step = step / 2
        w = w + step
        if np.abs(step).max() < 1e-10:
            break
    return w


def _lasso(A, b, penalty, start):
    """argmin over w of w A w / 2 - b w + penalty |w|_1, one coordinate after the other: [d]. A [d, d]; b, start [d]."""
    w = start.copy()
    for _ in range(1000):
        before = w.copy()
        for j in range(len(w)):
            slope = b[j] - A[j] @ w + A[j, j] * w[j]                                    # at w_j = 0
            w[j] = np.sign(slope) * max(abs(slope) - penalty, 0) / (A[j, j] or 1)       # A_jj = 0: a column of zeros
        if np.abs(w - before).max() < 1e-12:
            break
    return w


def _mean_loss(X, y, weight, w):
    logits = X @ w
    return (weight * (np.logaddexp(0, logits) - y * logits)).mean()


def cross_validated_penalty(X, y, weight):
    """The one of PENALTIES whose fit to four fifths of the rows has the least loss on the fifth that was left out, as a
    mean over the five; the strongest of equals. A row's fifth goes by its place, counted from the end, as in
    scikit-learn's GroupKFold for groups of one size."""
    fold = np.arange(len(y))[::-1] % FOLDS
    losses = np.zeros(len(PENALTIES))
    for k in range(FOLDS):
        rest, left_out, w = fold != k, fold == k, None
        for i, penalty in enumerate(PENALTIES):
            w = logistic_regression(X[rest], y[rest], weight[rest], penalty, w)
            losses[i] += _mean_loss(X[left_out], y[left_out], weight[left_out], w)
    return PENALTIES[losses.argmin()]


def length_controlled(y, shorter, difficulty, gamed):
    """The judge's preference, had the answers been as long as the baseline's: [n] probabilities, whose mean is the
    length-controlled win rate (Dubois et al. 2024, arXiv 2404.04475; `length_controlled_v1`).

    y [n] in [0, 1]: the judge's preference for the model; shorter [n]: the baseline's characters less the model's;
    difficulty [n]; gamed: (t [m], difficulty [m], y [m]). The judge is described by three terms,

        P(model preferred) = sigmoid(a t + c difficulty + b),        t = tanh(shorter / its standard deviation),

    and answers at t = 0. tanh, because a taste for length saturates; t is not centred, because 0 must mean equal
    lengths; c, because hard instructions are won by other models than easy ones. The gamed rows are the baseline told
    to be verbose, or concise, against itself: they differ in length alone, have no b, and so keep the fit from taking a
    model's length for its quality. There are two such sets, at weight 0.1: together a fifth of a model.

    The three are fitted under an L1 penalty that cross-validation picks, as in the published package. Without gamed
    rows the weakest is taken, for there is no published figure to meet, and few rows would be penalised to one half.
    Where all difficulties are 0, the n values are the same.
    """
    spread = shorter.std(ddof=1) if len(y) > 1 else math.inf        # one row has none: its t is 0
    t, ones = np.tanh(shorter / (spread or 1)), np.ones(len(y))
    gamed_t, gamed_difficulty, gamed_y = gamed
    gamed_rows = np.stack([gamed_t, gamed_difficulty, 0 * gamed_t], 1)                  # [m, 3]
    own_rows = np.stack([t, difficulty, ones], 1)                                       # [n, 3]
    X, target = np.concatenate([gamed_rows, own_rows]), np.append(gamed_y, y)
    weight = np.append(0.1 + 0 * gamed_t, ones)
    penalty = cross_validated_penalty(X, target, weight) if len(gamed_t) else PENALTIES[-1]
    _, c, b = logistic_regression(X, target, weight, penalty)
    return 1 / (1 + np.exp(-c * difficulty - b))


def win_rates(y):
    """AlpacaEval's figures of y [n], the judge's preference for the model in [0, 1]; rates in percent. The discrete win
    rate rounds every preference first; a tie is one half in both. standard_error is None for a single row.

    >>> figures = win_rates(np.array([1.0, 0.6, 0.5, 0.0]))
    >>> figures["win_rate"], figures["discrete_win_rate"], figures["n_wins"], figures["n_draws"]
    (52.5, 62.5, 2, 1)
    """
    wins, losses = int((y > 0.5).sum()), int((y < 0.5).sum())
    rate, error = mean_and_error(torch.from_numpy(100 * y))
    return {"win_rate": rate, "standard_error": None if math.isnan(error) else error,
            "discrete_win_rate": 50 + 50 * (wins - losses) / len(y),
            "n_wins": wins, "n_wins_base": losses, "n_draws": len(y) - wins - losses, "n_total": len(y)}


# ---------------------------------------------------------------------------------------------------------------------
# the files


def read_annotations(path):
    """One model's AlpacaEval annotations: dicts with `preference` in [1, 2], or None where the judge gave no verdict.
    Raises UserError for several models, baselines or judges, an instruction that comes twice, or no verdict at all."""
    names = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator")
    rows = read_rows("--annotations", path, dict.fromkeys(names, str) | {"preference": (int, float, type(None))})
    for name in ("generator_1", "generator_2", "annotator"):
        values = sorted({row[name] for _, row in rows})
        if len(values) > 1:
            raise run.UserError(f"--annotations {path} mixes {values[0]} and {values[1]} in `{name}`; "
                                "give the annotations of one model against one baseline by one annotator")
    seen = set()
    for where, row in rows:
        value = row["preference"]
        if value is None or math.isnan(value):
            row["preference"] = None
        elif value == 0:                                # how old files write a tie
            row["preference"] = 1.5
        elif not 1 <= value <= 2:
            raise run.UserError(f"--annotations {path}, {where}: preference {value} is not in [1, 2]; 1 prefers "
                                "output_1, 2 prefers output_2, 1.5 is a tie, null is no verdict")
        if row["instruction"] in seen:
            raise run.UserError(f"--annotations {path}, {where}: its instruction has come before; keep one row of each")
        seen.add(row["instruction"])
    if all(row["preference"] is None for _, row in rows):
        raise run.UserError(f"--annotations {path} holds no verdict, every preference is null; judge it again")
    return [row for _, row in rows]


def read_table(flag, path, columns):
    """{name: array [n]} of the named columns of a .csv file with a header. columns: {name: str or float}. Raises
    UserError for a missing column, no rows, or a cell that is no number."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("it is empty")
        return {name: np.array([kind(row[name]) for row in rows]) for name, kind in columns.items()}
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise run.UserError(f"{flag} {path} cannot be used ({getattr(error, 'strerror', None) or error}); "
                            f"give the .csv table with the columns {', '.join(columns)}") from None


class Tables(typing.NamedTuple):
    """What length control needs besides n annotations; m gamed rows."""
    difficulty: np.ndarray      # [n]; zeros leave that term out of the fit
    gamed: tuple                # t [m], difficulty [m], y [m], as `length_controlled` takes them
    size: int                   # the benchmark's instructions; 0: not known
    how: str                    # how the difficulties were found, for a person to read


def length_tables(args, place, texts, baseline):
    """The Tables of the n instructions `texts`. place: {instruction: its place in the benchmark}. Raises UserError for
    tables that do not belong together, to `baseline` or to the instructions."""
    if bool(args.gamed) != bool(args.difficulty):
        raise run.UserError("--gamed and --difficulty belong together; give both tables or neither")
    zeros = np.zeros(len(texts))
    if not args.gamed:
        return Tables(zeros, (np.zeros(0),) * 3, 0,
                      "without --gamed and --difficulty: no difficulty term, no leaderboard figure")
    table = read_table("--difficulty", args.difficulty, {"instruction_difficulty": float})["instruction_difficulty"]
    t, gamed_difficulty, y = _read_gamed(args, table, baseline)
    if len(place) == len(table) and place.keys() >= set(texts):
        how = f"difficulties matched by {'instruction' if args.instructions else 'position'}"
        return Tables(table[[place[text] for text in texts]], (t, gamed_difficulty, y), len(table), how)
    if args.instructions or len(texts) > len(table):
        raise run.UserError(f"--annotations ({len(texts)} rows) does not match --difficulty ({len(table)} rows); "
                            "give --instructions with all the benchmark's instructions in order, or, for prompts of "
                            "another set, leave --gamed and --difficulty out")
    # The table holds no instructions, only their places, and nobody can say which places a part has. On four published
    # models, one row short, the fit without difficulties moves the length-controlled rate by .4 to 5.7 points.
    return Tables(zeros, (t, 0 * gamed_difficulty, y), len(table), "difficulties dropped: no leaderboard figure")


def _read_gamed(args, table, baseline):
    """(t [m], difficulty [m], y [m]) of the gamed rows, whose difficulties must be those of the difficulty `table`."""
    gamed = read_table("--gamed", args.gamed, {"model": str, "index": float, "instruction_difficulty": float,
                                               "preference": float, "std_delta_len": float})
    if not np.char.startswith(gamed["model"], baseline).all():
        raise run.UserError(f"--gamed {args.gamed} is about {gamed['model'][0]}, but the baseline in --annotations is "
                            f"{baseline}; give the tables of that baseline, or leave --gamed and --difficulty out")
    difficulty, y, delta = gamed["instruction_difficulty"], gamed["preference"], gamed["std_delta_len"]
    at = dict(enumerate(table))
    fits = np.allclose([at.get(place, math.nan) for place in gamed["index"]], difficulty)
    if not (fits and np.isfinite(table).all() and np.isfinite(delta).all() and (abs(y - 0.5) <= 0.5).all()):
        raise run.UserError(f"--gamed {args.gamed} and --difficulty {args.difficulty} do not fit together or are "
                            "damaged; download both again, from one release")
    return np.tanh(delta), difficulty, y


def instruction_places(args, rows):
    """{instruction: its place in the benchmark}, by --instructions, else by the annotations' own order."""
    if args.instructions:
        rows = [row for _, row in read_rows("--instructions", args.instructions, {"instruction": str})]
    return {text: i for i, text in enumerate(dict.fromkeys(row["instruction"] for row in rows))}


# ---------------------------------------------------------------------------------------------------------------------
# the command


def main(argv):
    """Print AlpacaEval's figures of the model in --annotations."""
    args = flags.parse(AlpacaSettings, argv, "AlpacaEval 2.0: win rate, length-controlled win rate, win rate by subset")
    if args.instructions and not args.difficulty:
        raise run.UserError("--instructions orders the rows of --difficulty; give --gamed and --difficulty too")
    figures = _figures(args, read_annotations(args.annotations))
    print(json.dumps(figures) if args.json else _as_text(figures))


def _figures(args, rows):
    """Everything that the command prints, out of the annotations' rows; those without a verdict keep their place while
    difficulties are matched, and are left out of every figure."""
    name, baseline, judge = (rows[0][key] for key in ("generator_2", "generator_1", "annotator"))
    place = instruction_places(args, rows)
    rows = sorted(rows, key=lambda row: place.get(row["instruction"], len(place)))      # folds go by place
    tables = length_tables(args, place, [row["instruction"] for row in rows], baseline)
    keep = [i for i, row in enumerate(rows) if row["preference"] is not None]
    kept = [rows[i] for i in keep]
    if len(kept) < tables.size:
        _warn_of_gaps(args, tables, len(rows), len(kept))
    y = np.array([row["preference"] - 1.0 for row in kept])
    shorter = np.array([float(len(row["output_1"]) - len(row["output_2"])) for row in kept])
    same = name == baseline and (y == 0.5).all()        # a name alone may be two players'
    if same:
        controlled, how = np.full(len(y), 0.5), "by definition: the model is the baseline"
    else:
        controlled, how = length_controlled(y, shorter, tables.difficulty[keep], tables.gamed), tables.how
    lc = win_rates(controlled)
    if not tables.difficulty.any() and not same:    # the published error is the spread over instructions, without
        lc["standard_error"] = None                 # the coefficients' uncertainty; here there is no spread to report
    subsets = {}
    for row, value in zip(kept, y):
        subsets.setdefault(str(row.get("dataset", "all")), []).append(value)
    return {"model": name, "baseline": baseline, "annotator": judge, **win_rates(y),
            "n_dropped": len(rows) - len(kept), "avg_length": sum(len(row["output_2"]) for row in kept) // len(kept),
            "length_controlled_winrate": lc["win_rate"], "lc_standard_error": lc["standard_error"],
            "length_control": how, "subsets": {k: win_rates(np.array(v)) for k, v in sorted(subsets.items())}}


def _warn_of_gaps(args, tables, rows, kept):
    """Say on stderr what the figures leave out of the benchmark."""
    remedy = "" if tables.difficulty.any() else ", and off by points: give --instructions to match them"
    print(f"warning: --annotations {args.annotations} covers {kept} of the benchmark's {tables.size} instructions "
          f"({tables.size - rows} have no row, {rows - kept} no verdict); all figures are over these {kept}; "
          f"{tables.how}{remedy}", file=sys.stderr)


def _as_text(figures):
    lines = ["{model} against {baseline}, judge {annotator}: {n_total} rows, {n_dropped} without a verdict dropped, "
             "{avg_length} characters on average".format(**figures),
             f"{'length-controlled win rate':28s}"
             f"{_rate(figures['length_controlled_winrate'], figures['lc_standard_error'])}   "
             f"{figures['length_control']}"]
    for what, f in [("win rate", figures), *figures["subsets"].items()]:
        lines.append(f"{what:28s}{_rate(f['win_rate'], f['standard_error'])}   discrete {f['discrete_win_rate']:6.2f}, "
                     f"{f['n_wins']} wins, {f['n_wins_base']} losses, {f['n_draws']} ties")
    return "\n".join(lines)


def _rate(rate, error):
    return f"{rate:6.2f} %" + (" " * 7 if error is None else f" ±{error:5.2f}")
