"""eval.py's benchmarks: AlpacaEval 2.0 against an independent solver and known answers, MT-Bench and Arena-Hard by
hand, and what a person gets wrong in their files."""

import gzip
import json
import math
import os
import sys

import numpy as np
import pytest

import eval
import run
from benchmarks.alpaca import PENALTIES, cross_validated_penalty, length_controlled, logistic_regression, win_rates
from benchmarks.arena import arena_scores
from conftest import ROOT

pytestmark = pytest.mark.usefixtures("elsewhere")


def lines(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


def whole(name, rows):
    with (gzip.open if name.endswith(".gz") else open)(name, "wt", encoding="utf-8") as file:
        json.dump(rows, file)
    return name


def csv(name, header, rows):
    with open(name, "w") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in [header, *rows])
    return name


@pytest.fixture
def figures(capsys):
    """figures(argv) -> the JSON objects that `python eval.py argv --json` prints."""
    def call(*argv):
        capsys.readouterr()
        eval.main([*argv, "--json"])
        return [json.loads(line, parse_constant=pytest.fail) for line in capsys.readouterr().out.splitlines()]
    return call


@pytest.fixture
def complaint(monkeypatch, capsys):
    """complaint(argv) -> the one sentence on stderr of a command that ends with exit status 2."""
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run.main(eval.main)
        out, error = capsys.readouterr()
        assert end.value.code == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1, error
        return error
    return call


# ---------------------------------------------------------------------------------------------------------------------
# the length-controlled win rate as a function of arrays


def draw(seed=0, n=60, m=50):
    rng = np.random.default_rng(seed)
    shorter, difficulty = rng.normal(200, 700, n).round(), rng.normal(0, 1.5, n)
    return shorter, difficulty, (np.tanh(rng.normal(0, 2, m)), rng.normal(0, 1.5, m)), rng


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def fit_of_the_draw():
    """What `length_controlled` takes, and the fit's rows X [110, 3], target [110], weight [110], written out anew."""
    shorter, difficulty, (t, d), rng = draw()
    y, gamed_y = (rng.random(60) < sigmoid(-shorter / 400)) * 0.9 + 0.05 * rng.random(60), rng.random(50)
    rows = [(a, x, 0.0) for a, x in zip(t, d)]
    rows += [(math.tanh(s / np.std(shorter, ddof=1)), x, 1.0) for s, x in zip(shorter, difficulty)]
    weight = np.repeat([0.1, 1.0], [50, 60])
    return (y, shorter, difficulty, (t, d, gamed_y)), np.array(rows), np.append(gamed_y, y), weight


def test_length_control_is_the_packages_fit():
    """The coefficients and the penalty that scikit-learn 1.9.1 finds: LogisticRegressionCV(l1, liblinear, no intercept,
    tol 1e-10) with GroupKFold(5), every row twice, with label 1 at weight y and label 0 at weight 1 - y."""
    arguments, X, target, weight = fit_of_the_draw()
    penalty = cross_validated_penalty(X, target, weight)
    np.testing.assert_allclose([penalty, *logistic_regression(X, target, weight, penalty)],
                               [1 / 2.7825594, -1.24819462, 0, -0.90716562], atol=1e-7)
    np.testing.assert_allclose(length_controlled(*arguments), 0.2875801888273335, atol=1e-8)
    assert abs(arguments[0].mean() - 0.2875801888273335) > 0.02         # and there was something to control for


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_fit_is_where_nothing_is_to_be_gained(penalty):
    """The optimality condition of the L1 penalty: a coefficient that is not 0 has a slope of its size against it, one
    that is 0 at most that."""
    _, X, target, weight = fit_of_the_draw()
    w = logistic_regression(X, target, weight, penalty)
    slope = X.T @ (weight * (sigmoid(X @ w) - target))
    assert (abs(slope) <= penalty + 1e-6).all()
    np.testing.assert_allclose(slope[w != 0], -penalty * np.sign(w[w != 0]), atol=1e-6)
    assert (w == 0).all() == (penalty > 10) and (w != 0).all() == (penalty < 0.3)


def test_length_control_recovers_the_coefficients_that_made_the_preferences():
    """Preferences that the model of the judge fits exactly: the answer is known in closed form, and lengths that were
    scaled up have no influence, since only their ratio to the standard deviation enters."""
    shorter, difficulty, (t, d), _ = draw(1)
    a, c, b = -1.5, 0.8, -0.4
    y = sigmoid(a * np.tanh(shorter / np.std(shorter, ddof=1)) + c * difficulty + b)
    gamed = (t, d, sigmoid(a * t + c * d))
    expected = sigmoid(c * difficulty + b)
    np.testing.assert_allclose(length_controlled(y, shorter, difficulty, gamed), expected, atol=1e-4)
    np.testing.assert_allclose(length_controlled(y, 7 * shorter, difficulty, gamed), expected, atol=1e-4)
    # a model that wrote 300 characters more everywhere, its preferences following the judge's taste, is seen through
    longer = sigmoid(a * np.tanh((shorter - 300) / np.std(shorter, ddof=1)) + c * difficulty + b)
    assert longer.mean() > y.mean() + 0.05
    np.testing.assert_allclose(length_controlled(longer, shorter - 300, difficulty, gamed), expected, atol=1e-4)


def test_length_control_without_tables_keeps_length_and_quality():
    shorter, *_ = draw(2)
    none = (np.zeros(0),) * 3
    y = sigmoid(-2 * np.tanh(shorter / np.std(shorter, ddof=1)) + 0.3)
    np.testing.assert_allclose(length_controlled(y, shorter, np.zeros(60), none), sigmoid(0.3), atol=1e-5)
    # equal lengths everywhere: nothing to control for; one row alone: no deviation, and still a number
    np.testing.assert_allclose(length_controlled(y, np.zeros(60), np.zeros(60), none), y.mean(), atol=1e-5)
    np.testing.assert_allclose(length_controlled(y[:1], shorter[:1], np.zeros(1), none), y[0], atol=1e-3)


@pytest.mark.parametrize("value, rate", [(0.0, 0.0), (1.0, 1.0)])
def test_a_model_that_wins_or_loses_every_row_has_a_finite_fit(value, rate):
    shorter, difficulty, (t, d), rng = draw(3)
    fit = length_controlled(np.full(60, value), shorter, difficulty, (t, d, rng.random(50)))
    assert np.isfinite(fit).all() and abs(fit.mean() - rate) < 1e-4


def test_newton_finds_the_optimum_that_bisection_finds():
    """One coefficient, rows of very different size and weight."""
    X, y = np.array([[30.0], [-1.0], [0.1]]), np.array([0.999, 0.9, 0.2])
    weight = np.array([1.0, 50.0, 3.0])
    low, high = -10.0, 10.0
    for _ in range(200):
        w = (low + high) / 2
        slope = (weight * (sigmoid(X[:, 0] * w) - y) * X[:, 0]).sum() + 0.5 * np.sign(w)
        low, high = (low, w) if slope > 0 else (w, high)
    np.testing.assert_allclose(logistic_regression(X, y, weight, 0.5), [low], atol=1e-8)


def test_win_rates_by_hand():
    f = win_rates(np.array([1.0, 0.6, 0.5, 0.0]))
    assert f.pop("standard_error") == pytest.approx(100 * np.std([1, 0.6, 0.5, 0], ddof=1) / 2)
    assert f == {"win_rate": 52.5, "discrete_win_rate": 62.5, "n_wins": 2, "n_wins_base": 1, "n_draws": 1, "n_total": 4}
    assert win_rates(np.array([0.7]))["standard_error"] is None


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py alpaca


def annotation(i, preference, mine=5, theirs=9, **other):
    return {"instruction": f"Question {i}?", "output_1": "b" * theirs, "generator_1": "base", "output_2": "m" * mine,
            "generator_2": "mine", "annotator": "judge", "preference": preference, "dataset": "koala"} | other


@pytest.fixture
def benchmark():
    """Twelve annotations and the two tables that belong to them: (rows, flags that name the tables). The preferences
    follow the difficulty, so that the penalty leaves something of it."""
    rng = np.random.default_rng(4)
    difficulty = rng.normal(size=12).round(6)
    preferences = sigmoid(2 * difficulty - 1 + rng.normal(size=12))
    rows = [annotation(i, 1 + float(p), int(a), int(b), dataset="vicuna" if i < 4 else "oasst")
            for i, (p, a, b) in enumerate(zip(preferences, rng.integers(1, 99, 12), rng.integers(1, 99, 12)))]
    csv("difficulty.csv", ["index", "instruction_difficulty"], enumerate(difficulty))
    csv("gamed.csv", ["model", "index", "instruction_difficulty", "preference", "std_delta_len", "not_gamed_baseline"],
        [(f"base_{kind}", i, d, rng.random().__round__(6), rng.normal().__round__(6), False)
         for kind in ("verbose", "concise") for i, d in enumerate(difficulty)])
    return rows, ["--gamed", "gamed.csv", "--difficulty", "difficulty.csv"]


def test_alpaca_figures(figures, benchmark):
    rows, tables = benchmark
    f, = figures("alpaca", "--annotations", whole("a.json", rows), *tables)
    y = np.array([row["preference"] - 1 for row in rows])
    table = np.genfromtxt("gamed.csv", delimiter=",", skip_header=1, usecols=(4, 2, 3)).T
    fit = length_controlled(y, np.array([len(r["output_1"]) - len(r["output_2"]) for r in rows], float),
                                 np.genfromtxt("difficulty.csv", delimiter=",", skip_header=1)[:, 1],
                                 (np.tanh(table[0]), table[1], table[2]))
    assert f["length_controlled_winrate"] == pytest.approx(100 * fit.mean(), abs=1e-9)
    assert f["lc_standard_error"] == pytest.approx(100 * fit.std(ddof=1) / 12**0.5, abs=1e-9) and fit.std() > 0.01
    assert f["win_rate"] == pytest.approx(100 * y.mean()) and f["n_total"] == 12 and "position" in f["length_control"]
    assert f["avg_length"] == int(np.mean([len(r["output_2"]) for r in rows]))
    assert f["subsets"]["vicuna"] == pytest.approx(win_rates(y[:4])) and set(f["subsets"]) == {"oasst", "vicuna"}
    for name in (whole("a.json.gz", rows), lines("a.jsonl", rows)):
        assert figures("alpaca", "--annotations", name, *tables) == [f]


def test_alpaca_without_tables_says_so(figures, benchmark, capsys):
    f, = figures("alpaca", "--annotations", whole("a.json", benchmark[0]))
    assert f["lc_standard_error"] is None and "without --gamed and --difficulty" in f["length_control"]
    eval.main(["alpaca", "--annotations", "a.json"])
    text = capsys.readouterr().out
    assert "without --gamed and --difficulty" in text and f"{f['win_rate']:.2f}" in text and "vicuna" in text


def test_alpaca_ties_and_missing_verdicts(figures):
    rows = [annotation(0, 2), annotation(1, 1.5), annotation(2, 0), annotation(3, None), annotation(4, math.nan, 999)]
    f, = figures("alpaca", "--annotations", whole("a.json", rows))
    assert (f["n_wins"], f["n_wins_base"], f["n_draws"], f["n_total"], f["n_dropped"]) == (1, 0, 2, 3, 2)
    assert f["win_rate"] == f["discrete_win_rate"] == pytest.approx(200 / 3) and f["avg_length"] == 5


def test_the_baseline_itself_has_fifty(figures, benchmark):
    rows, tables = benchmark
    same = whole("a.json", [r | {"generator_2": "base", "preference": 1.5, "output_2": r["output_1"]} for r in rows])
    for flags in ([], tables):
        f, = figures("alpaca", "--annotations", same, *flags)
        assert (f["length_controlled_winrate"], f["lc_standard_error"], f["win_rate"]) == (50, 0, 50)


def test_two_players_of_one_name_are_no_baseline_against_itself(figures, benchmark):
    rows, _ = benchmark
    f, = figures("alpaca", "--annotations", whole("a.json", [r | {"generator_2": "base"} for r in rows]))
    assert f["length_controlled_winrate"] != 50 and "definition" not in f["length_control"]


def test_instructions_put_a_reordered_file_right(figures, benchmark):
    rows, tables = benchmark
    f, = figures("alpaca", "--annotations", whole("a.json", rows), *tables)
    back, = figures("alpaca", "--annotations", whole("b.json", rows[::-1]), *tables, "--instructions", "a.json")
    wrong, = figures("alpaca", "--annotations", "b.json", *tables)         # what the sentence in length_control is for
    assert back["length_controlled_winrate"] == pytest.approx(f["length_controlled_winrate"], abs=1e-6)
    assert abs(wrong["length_controlled_winrate"] - f["length_controlled_winrate"]) > 0.01
    assert "instruction" in back["length_control"] and "position" in wrong["length_control"]
    # a row without a verdict keeps its place: the rows behind it must not move up
    hole = [rows[0] | {"preference": None}] + rows[1:]
    with_hole, = figures("alpaca", "--annotations", whole("hole.json", hole), *tables)
    cut, = figures("alpaca", "--annotations", whole("cut.json", rows[1:]), *tables, "--instructions", "a.json")
    assert with_hole["length_controlled_winrate"] == pytest.approx(cut["length_controlled_winrate"], abs=1e-9)


def test_a_part_of_the_benchmark_is_scored_and_says_so(capsys, complaint, benchmark):
    """With --instructions difficulties are matched; without, they are dropped: the fit is that of zeros in both
    tables. Either way stderr says what is missing. Rows that the benchmark does not have are another set."""
    rows, tables = benchmark

    def printed(*flags):
        capsys.readouterr()
        eval.main(["alpaca", "--json", "--annotations", *flags, *tables])
        out, error = capsys.readouterr()
        return json.loads(out), error

    whole("a.json", rows)
    assert printed("a.json")[1] == ""
    part = whole("part.json", [rows[1] | {"preference": None}] + rows[2:])
    matched, said = printed(part, "--instructions", "a.json")
    assert matched["n_total"] == 10 and "matched by instruction" in matched["length_control"]
    assert said.startswith("warning: --annotations part.json covers 10 of the benchmark's 12 instructions (1 have no "
                           "row, 1 no verdict)") and said.count("\n") == 1 and "dropped" not in said
    dropped, said = printed(part)
    assert "dropped" in dropped["length_control"] and dropped["lc_standard_error"] is None
    assert "10 of the benchmark's 12" in said and "difficulties dropped" in said and "give --instructions" in said
    y = np.array([row["preference"] - 1 for row in rows[2:]])
    shorter = np.array([len(r["output_1"]) - len(r["output_2"]) for r in rows[2:]], float)
    delta, gamed_y = np.genfromtxt("gamed.csv", delimiter=",", skip_header=1, usecols=(4, 3)).T
    expected = length_controlled(y, shorter, np.zeros(10), (np.tanh(delta), np.zeros(24), gamed_y))
    assert dropped["length_controlled_winrate"] == pytest.approx(100 * expected.mean(), abs=1e-9)
    assert dropped["length_controlled_winrate"] != pytest.approx(matched["length_controlled_winrate"], abs=0.1)
    _, said = printed(whole("hole.json", [rows[0] | {"preference": None}] + rows[1:]))
    assert "covers 11" in said and "(0 have no row, 1 no verdict)" in said and "matched by position" in said
    more = whole("more.json", rows + [annotation(50, 2)])
    assert "another set" in complaint("alpaca", "--annotations", more, *tables)
    assert "another set" in complaint("alpaca", "--annotations", more, *tables, "--instructions", "a.json")


def test_identical_answers_are_ties_of_equal_length(figures, benchmark):
    """What `judge` writes for them, 1.5, or what old files have, 0: half a win, and they stay in the fit."""
    rows, tables = benchmark
    same = {"output_1": "the same", "output_2": "the same"}
    found = [figures("alpaca", "--annotations", whole("a.json", [r | same | {"preference": tie} for r in rows[:6]]
                                                      + rows[6:]), *tables)[0] for tie in (1.5, 0)]
    assert found[0] == found[1] and found[0]["n_draws"] == 6 and found[0]["n_total"] == 12
    assert found[0]["win_rate"] == pytest.approx(100 * np.mean([0.5] * 6 + [r["preference"] - 1 for r in rows[6:]]))
    assert "definition" not in found[0]["length_control"]


PUBLISHED = os.path.join(os.path.dirname(ROOT), "shared", "data", "alpaca_eval")


@pytest.mark.skipif(not os.path.isdir(PUBLISHED), reason="the published annotations are CC BY-NC and not copied here")
@pytest.mark.parametrize("model, most", [("claude-2.1", 0.01), ("NullModel", 0.01), ("falcon-7b-instruct", 0.1),
                                         ("OpenHermes-2.5-Mistral-7B", 0.01), ("gpt4_1106_preview", 1e-9)])
def test_published_rates(figures, model, most):
    """falcon's was fitted with the next stronger penalty: which wins depended on how the package's folds fell."""
    with open(f"{PUBLISHED}/expected.json") as file:
        expected = json.load(file)["models"][model]
    f, = figures("alpaca", "--annotations", f"{PUBLISHED}/{model}.annotations.json.gz", "--gamed",
                 f"{PUBLISHED}/df_gamed.csv", "--difficulty", f"{PUBLISHED}/instruction_difficulty.csv")
    assert f["length_controlled_winrate"] == pytest.approx(expected.pop("length_controlled_winrate"), abs=most)
    assert f["lc_standard_error"] == pytest.approx(expected.pop("lc_standard_error", f["lc_standard_error"]), abs=0.001)
    assert {name: f[name] for name in expected} == pytest.approx(expected, abs=1e-9)


GOOD = [annotation(0, 2), annotation(1, 1)]


@pytest.mark.parametrize("rows, says", [
    ([], "no rows"), (7, "no JSON object"), ({"a": 1}, "`instruction`"), ([7], "entry 1"),
    (GOOD + [{"preference": 1}], "entry 3"),
    (GOOD + [annotation(2, "1")], "`preference`"), (GOOD + [annotation(2, 1, output_2=None)], "`output_2`"),
    (GOOD + [annotation(2, 1, generator_1="other")], "`generator_1`"),
    (GOOD + [annotation(2, 1, generator_2="other")], "`generator_2`"),
    (GOOD + [annotation(2, 1, annotator="other")], "`annotator`"), (GOOD + [annotation(0, 1)], "entry 3"),
    (GOOD + [annotation(2, 3)], "[1, 2]"), (GOOD + [annotation(2, 0.5)], "[1, 2]"),
    (GOOD + [annotation(2, math.inf)], "[1, 2]"), ([annotation(0, None)], "no verdict")])
def test_bad_annotations(complaint, rows, says):
    said = complaint("alpaca", "--annotations", whole("a.json", rows))
    assert "--annotations a.json" in said and says in said


@pytest.mark.parametrize("name, content, says", [
    ("a.json", b"", "no rows"), ("a.jsonl", b"\n\n", "no rows"), ("a.json", b"[{", "malformed JSON"),
    ("a.jsonl", json.dumps(GOOD[0]).encode() + b"\n{", "line 2: malformed"), ("a.json", b"\xff\xfe[]", "read"),
    ("a.json.gz", b"[]", "read"), ("a.json.gz", gzip.compress(b"[]")[:-6], "read"), ("a.json", None, "No such file")])
def test_unreadable_annotations(complaint, name, content, says):
    if content is not None:
        with open(name, "wb") as file:
            file.write(content)
    said = complaint("alpaca", "--annotations", name)
    assert f"--annotations {name}" in said and says in said


def test_tables_that_do_not_fit(complaint, benchmark):
    rows, tables = benchmark
    start = ["alpaca", "--annotations", whole("a.json", rows)]
    assert "--annotations is needed" in complaint("alpaca")
    assert "belong together" in complaint(*start, *tables[:2]) and "belong together" in complaint(*start, *tables[2:])
    assert "--instructions" in complaint(*start, "--instructions", "a.json")
    assert "about base_" in complaint("alpaca", "--annotations",
                                      whole("o.json", [r | {"generator_1": "other"} for r in rows]), *tables)
    other = whole("other.json", [r | {"instruction": "Another, " + r["instruction"]} for r in rows])
    assert "another set" in complaint("alpaca", "--annotations", other, *tables, "--instructions", "a.json")
    assert "another set" in complaint("alpaca", "--annotations", "a.json", *tables, "--instructions",
                                      whole("few.json", rows[:5]))
    header = ["index", "instruction_difficulty"]
    for name, table, says in [("none.csv", None, "No such file"), ("empty.csv", [], "empty"),
                              ("word.csv", [(0, "hard")], "hard"), ("hole.csv", [(0, "")], "float"),
                              ("other.csv", [(i, 0.5) for i in range(12)], "do not fit together"),
                              ("long.csv", [*enumerate(np.genfromtxt("difficulty.csv", delimiter=",")[1:, 1]),
                                            (12, "inf")], "do not fit together")]:
        if table is not None:
            csv(name, header, table)
        said = complaint(*start, *tables[:2], "--difficulty", name)
        assert f"--difficulty {name}" in said and says in said
    assert "instruction_difficulty" in complaint(*start, *tables[:2], "--difficulty", csv("c.csv", ["index"], [(0,)]))
    assert "--gamed difficulty.csv" in complaint(*start, "--gamed", "difficulty.csv", *tables[2:])


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py mtbench


def judgment(question, turn, score, model="mine", judge="gpt-4"):
    return {"question_id": question, "model": model, "judge": [judge, "single-v1"], "turn": turn, "score": score}


def test_mtbench_by_hand(figures, capsys):
    rows = [judgment(81, 1, 8), judgment(81, 2, 5.5), judgment(90, 1, 7), judgment(91, 1, 10), judgment(160, 2, -1),
            judgment(120, 2, 1) | {"judge": ["gpt-4", "single-math-v1-multi-turn"]}, judgment(121, 1, None)]
    r, = figures("mtbench", "--judgments", lines("j.jsonl", rows))
    assert r["first_turn"] == pytest.approx(25 / 3) and r["second_turn"] == 3.25
    assert r["average"] == pytest.approx(31.5 / 5)              # over judgments, not over the two turns' means
    assert (r["n_judgments"], r["n_dropped"]) == (5, 2)
    assert {k: v for k, v in r["categories"].items() if v is not None} == {
        "writing": pytest.approx(20.5 / 3), "roleplay": 10, "math": 1}
    eval.main(["mtbench", "--judgments", "j.jsonl"])
    assert capsys.readouterr().out == """\
model  part         score
mine   all           6.30
mine   first turn    8.33
mine   second turn   3.25
mine   writing       6.83
mine   roleplay     10.00
mine   math          1.00

mine: 5 judgments, 2 without a score left out
"""


def test_mtbench_of_several_files_and_models(figures):
    lines("a.jsonl", [judgment(81, 1, 4), judgment(81, 1, 9, "theirs")])
    lines("b.jsonl", [judgment(81, 2, 6)])
    one, two = figures("mtbench", "--judgments", "a.jsonl", "b.jsonl")
    assert (one["model"], one["average"], one["second_turn"]) == ("theirs", 9, None)        # the best first
    assert (two["model"], two["average"], two["second_turn"]) == ("mine", 5, 6)


@pytest.mark.parametrize("rows, says", [
    ([judgment(80, 1, 5)], "question 80"), ([judgment(161, 1, 5)], "81 to 160"), ([judgment(81, 3, 5)], "turn 3"),
    ([judgment(81, 1, 11)], "score 11"), ([judgment(81, 1, -2)], "score -2"), ([judgment(81, 1, -1)], "judge it again"),
    ([judgment(81, 1, "8")], "`score`"), ([{"question_id": 81}], "line 1: `model`"), ([], "no rows"),
    ([judgment(81, 1, 5), judgment(82, 1, 5, judge="gpt-4o")], "line 2: a second judge, gpt-4 beside gpt-4o"),
    ([judgment(81, 1, 5), judgment(81, 1, 6)], "line 2: a second judgment of mine, 81, 1")])
def test_bad_mtbench_judgments(complaint, rows, says):
    said = complaint("mtbench", "--judgments", lines("j.jsonl", rows))
    assert "--judgments" in said and says in said


@pytest.mark.parametrize("command", ["mtbench", "arena", "generate", "judge"])
def test_the_usage_line_names_the_command(command, capsys):
    with pytest.raises(SystemExit):
        eval.main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: eval.py {command} ")


def test_judgments_need_files(complaint):
    assert "--judgments is needed" in complaint("mtbench") and "--judgments is needed" in complaint("arena")
    assert "no.jsonl" in complaint("mtbench", "--judgments", "no.jsonl")
    assert "--judgments" in complaint("mtbench", "--judgments", "--json")
    assert "--seed" in complaint("mtbench", "--judgments", lines("j.jsonl", [judgment(81, 1, 5)]), "--seed", "3")


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py arena


def battle(uid, first, second, model="mine", baseline="base", category="hard_prompt", judge="gpt-4"):
    return {"uid": uid, "category": category, "judge": judge, "model": model, "baseline": baseline,
            "games": [{"score": first, "judgment": "..."}, {"score": second, "judgment": "..."}]}


def test_arena_by_hand(figures, capsys):
    rows = [battle("a", "B>>A", "A>B"),         # the model wins strongly (3 of 3), then by a little (1 of 1)
            battle("b", "A>B", "B>>A"),         # loses twice: 0 of 1, 0 of 3
            battle("c", "A=B", "A>>B"),         # a tie (1/2 of 1), a strong win (3 of 3)
            battle("d", None, "A>>B"), battle("e", "A>B", "A>B") | {"games": [None, {"score": "A>B"}]}]
    r, = figures("arena", "--judgments", lines("j.jsonl", rows))
    assert r["score"] == pytest.approx(100 * (3 + 1 + 0 + 0.5 + 3) / (4 + 4 + 4))
    assert (r["n_prompts"], r["n_dropped"], r["baseline"], r["category"]) == (3, 2, "base", "hard_prompt")
    eval.main(["arena", "--judgments", "j.jsonl"])
    low, high = r["interval"]
    assert capsys.readouterr().out == f"""\
category     model  baseline  score %  5 %  95 %  prompts  without both verdicts
hard_prompt  mine   base         62.5  {low:.1f}  {high:.1f}        3                      2
"""
    # the place is not the player: the favoured place alone gives one half, and mirrored labels say the same
    assert arena_scores([("A>>B", "A>>B")] * 4, 0)["score"] == 50
    assert arena_scores([("A<<B", "B<A"), ("A>B", "B=A")], 0) == arena_scores([("B>>A", "A>B"),
                                                                                         ("A>B", "A=B")], 0)


def test_arena_interval_is_seeded_and_covers(figures):
    rng = np.random.default_rng(5)
    labels = [tuple(rng.choice(["A>>B", "A>B", "A=B", "B>A", "B>>A"], 2).tolist()) for _ in range(300)]
    lines("j.jsonl", [battle(str(i), *pair) for i, pair in enumerate(labels)])
    one, = figures("arena", "--judgments", "j.jsonl")
    assert figures("arena", "--judgments", "j.jsonl", "--seed", "0") == [one]
    other, = figures("arena", "--judgments", "j.jsonl", "--seed", "1")
    assert other["score"] == one["score"] and other["interval"] != one["interval"]
    # the interval's width against the delta method's for a ratio of means over prompts
    won = {"A>>B": (3, 3), "A>B": (1, 1), "A=B": (0.5, 1), "B>A": (0, 1), "B>>A": (0, 3)}
    pairs = np.array([[won[a], won[b]] for a, b in labels])
    total, count = pairs[:, 0, 1] - pairs[:, 0, 0] + pairs[:, 1, 0], pairs[:, :, 1].sum(1)
    ratio = total.sum() / count.sum()
    deviation = 100 * np.std(total - ratio * count, ddof=1) / np.mean(count) / 300**0.5
    low, high = one["interval"]
    assert one["score"] == pytest.approx(100 * ratio) and low < one["score"] < high
    assert (high - low) / 2 == pytest.approx(1.645 * deviation, rel=0.3)


def test_arena_interval_of_prompts_is_wider_than_that_of_battles_that_repeat_each_other():
    scores = arena_scores([("B>>A", "A>>B"), ("A>>B", "B>>A")] * 50, 0)        # six equal battles a prompt
    prompts, battles = (scores[k][1] - scores[k][0] for k in ("interval", "interval_battles"))
    assert scores["score"] == 50 and prompts / battles == pytest.approx(6**0.5, rel=0.3)


def test_arena_of_several_models_and_categories(figures):
    lines("a.jsonl", [battle("a", "B>A", "B>A"), battle("b", "A=B", "A=B", category="creative", baseline="poet")])
    lines("b.jsonl", [battle("a", "B>A", "A>B", model="better")])
    found = figures("arena", "--judgments", "a.jsonl", "b.jsonl", "--seed", "7")
    assert [(r["category"], r["model"], r["baseline"], r["score"]) for r in found] == [
        ("creative", "mine", "poet", 50), ("hard_prompt", "better", "base", 100), ("hard_prompt", "mine", "base", 50)]


def test_arena_reads_the_layout_of_v01(figures):
    """question_id for uid; one category and one baseline, which it does not name."""
    old = [{"question_id": uid, "model": "mine", "judge": "j", "games": [{"score": "B>A"}, {"score": "A>B"}]}
           for uid in ("a", "b")]
    f, = figures("arena", "--judgments", lines("old.jsonl", old))
    assert (f["score"], f["n_prompts"], f["category"]) == (100, 2, "arena-hard-v0.1")


def test_judgments_given_twice(complaint):
    assert "--judgments A B C" in complaint("arena", "--judgments", "a.jsonl", "--judgments", "b.jsonl")


@pytest.mark.parametrize("rows, says", [
    ([battle("a", "A>B", "tie")], "tie"), ([battle("a", "A>B", ["A>B"])], "games"),
    ([battle("a", "A>B", "A>B") | {"games": [{"score": "A>B"}]}], "two are needed"),
    ([battle("a", None, None)], "judge it again"), ([{"uid": "a"}], "`judge`"),
    ([{"judge": "j", "model": "m", "games": []}], "`uid`"),
    ([battle("a", "A>B", "A>B"), battle("a", "A>B", "A>B")], "a second judgment of hard_prompt, mine, a"),
    ([battle("a", "A>B", "A>B"), battle("b", "A>B", "A>B", baseline="other")], "line 2: mine plays other, but base"),
    ([battle("a", "A>B", "A>B"), battle("b", "A>B", "A>B", judge="other")], "a second judge")])
def test_bad_arena_judgments(complaint, rows, says):
    said = complaint("arena", "--judgments", lines("j.jsonl", rows))
    assert "--judgments" in said and says in said
