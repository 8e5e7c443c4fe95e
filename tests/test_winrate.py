"""winrate.py: verdicts by hand, the base against itself, tables."""

import math

import pytest
import torch

import games
import plots
import prefmodel
import run
import winrate
import world
from chat import load_checkpoint
from conftest import ROW, SHARES, TRAINED, circle_summary, is_png

pytestmark = pytest.mark.usefixtures("elsewhere")


# ---------------------------------------------------------------------------------------------------------------------
# head to head


class Longer:
    """A judge that prefers the longer answer."""
    name = "longer"

    def preference(self, prompts, responses):
        n = torch.tensor([[float(len(r)) for r in row] for row in responses])
        return prefmodel.bradley_terry(n)


def test_verdicts_by_hand():
    """One answer against four: longer, shorter, equal, equal -> (1 + 0 + 1/2 + 1/2) / 4. Two against two: all four
    pairs."""
    ours, theirs = [["bbb"], ["b"]], [["a", "aaaa", "aaa", "aaa"], ["aa", "aa", "aa", "a"]]
    assert winrate.verdicts(Longer(), ["x", "y"], ours, theirs).tolist() == [0.5, 0.125]
    assert winrate.verdicts(Longer(), ["x"], [["aa", "aaaa"]], [["a", "aaaa"]]).tolist() == [(1 + 0 + 1 + 0.5) / 4]
    assert winrate.verdicts(Longer(), ["x"], [["aaaa"]], [["a"]]).tolist() == [1.0]


def test_verdicts_are_hard():
    """A judge that is sure and one that is hardly so count the same."""
    class Barely:
        name = "barely"

        def preference(self, prompts, responses):
            return 0.5 + (Longer().preference(prompts, responses) - 0.5) * 1e-4

    assert winrate.verdicts(Barely(), ["x"], [["bb"]], [["a", "aaa"]]).tolist() == [0.5]
    assert winrate.verdicts(Barely(), ["x"], [["bb"]], [["a", "a"]]).tolist() == [1.0]


def test_mean_and_error_by_hand():
    mean, error = winrate.mean_and_error(torch.tensor([1.0, 0.0, 0.5, 1.0]))
    assert mean == 0.625 and error == pytest.approx(math.sqrt((2 * 0.375**2 + 0.625**2 + 0.125**2) / 3 / 4))
    mean, error = winrate.mean_and_error(torch.tensor([0.25]))
    assert mean == 0.25 and math.isnan(error)


def test_exact():
    judge, prompts = prefmodel.load("oracle"), ["sort:ba", "reverse:abc", "copy:aa", "copy:hh"]
    assert winrate.exact(judge, prompts, [["ab"], ["cba"], ["ab"], ["hh"]]) == 0.75
    assert winrate.exact(Longer(), prompts, [["ab"]] * 4) is None


SAMPLING = winrate.Sampling(24, max_rows=512)


@pytest.fixture(scope="module")
def contest(base):
    """(net, chat, 400 queries, their ids, the base's answers to them)."""
    net, chat = load_checkpoint(base, "cpu", torch.float32)
    prompts = world.OPERATIONS.queries("test", 400)
    ids = chat.encode_all(prompts, 0, 24)
    return net, chat, prompts, ids, winrate.opponent(net, chat, ids, SAMPLING, 0)


def test_answers_are_drawn_per_place_and_independently(contest):
    net, chat, prompts, ids, theirs = contest
    assert [len(group) for group in theirs.sampled] == [4] * 400
    assert [len(group) for group in theirs.greedy] == [1] * 400
    texts, length = winrate.answer(net, chat, ids[:20], 2, SAMPLING, 7)
    again, _ = winrate.answer(net, chat, ids[10:20], 2, SAMPLING, 17)  # the stream of a prompt is seed + its place
    assert texts[10:] == again and texts != winrate.answer(net, chat, ids[:20], 2, SAMPLING, 8)[0]
    greedy, _ = winrate.answer(net, chat, ids[:20], 1, SAMPLING, 99, greedy=True)
    assert greedy == theirs.greedy[:20]
    one, length = winrate.answer(net, chat, ids[:1], 1, winrate.Sampling(2), 0, greedy=True)
    assert length <= 2 and len(one[0][0]) <= 2


def test_the_base_against_itself_is_even(contest):
    """Two independent draws: within 4 standard errors of 1/2 (odds of a chance failure 6e-5; the seed is fixed).
    Greedy against itself is exactly 1/2. Were the same samples drawn twice, every pair with itself would tie and the
    error be too small."""
    net, chat, prompts, ids, theirs = contest
    judge = prefmodel.load("oracle")
    row = winrate.against(net, chat, prompts, ids, theirs, judge, SAMPLING, 0, "base")
    assert abs(row["win_rate"] - 0.5) < 4 * row["win_rate_se"] and 0.005 < row["win_rate_se"] < 0.025
    assert row["win_rate_greedy"] == 0.5 and row["win_rate_greedy_se"] == 0.0 and row["name"] == "base"
    assert row["prompts"] == 400
    assert row["accuracy_greedy"] == winrate.exact(judge, prompts, theirs.greedy) and 2 < row["mean_length"] < 24
    ours, _ = winrate.answer(net, chat, ids, 1, SAMPLING, run.stream(0, "evaluation"))
    assert sum(a[0] in b for a, b in zip(ours, theirs.sampled)) < 300  # not the opponent's own samples

    sharp = winrate.base_greedy_row(row, judge, prompts, theirs)
    rate, error = winrate.mean_and_error(winrate.verdicts(judge, prompts, theirs.greedy, theirs.sampled))
    assert (sharp["win_rate"], sharp["win_rate_se"]) == (rate, error) and sharp["name"] == "base, greedy"
    assert rate != row["win_rate"]
    assert sharp["accuracy_sampled"] == sharp["accuracy_greedy"] == row["accuracy_greedy"]
    assert sharp["mean_length"] == row["mean_length_greedy"]
    assert row["name"] == "base"  # the given row is not changed


# ---------------------------------------------------------------------------------------------------------------------
# tables


def test_table():
    head, first, second = winrate.table([ROW, {**TRAINED, "accuracy_sampled": None, "accuracy_greedy": None}]).splitlines()
    assert head.split() == "win rate greedy vs greedy acc. sampled acc. greedy tokens".split()
    assert first.split() == ["base", "0.500", "±0.014", "0.500", "±0.000", "0.250", "0.375", "5.0"]
    assert second.split()[:3] == ["iteration", "1", "0.610"] and second.split()[-3:] == ["-", "-", "5.0"]
    assert len({len(line) for line in (head, first, second)}) == 1


def test_exact_styles_scale_eta():
    """eta (K - 1)/K = 1.5, from the run's own start; another loss is no multiplicative-weights update."""
    want = games.multiplicative_weights(world.STYLES, SHARES[0], 1.5, 2)
    torch.testing.assert_close(winrate.exact_styles(circle_summary()), want)
    assert winrate.exact_styles(circle_summary("dpo")) is None
    assert winrate.played_styles(circle_summary()["evaluations"]).tolist() == [list(p) for p in SHARES]
    for rule, want in (("optimistic", games.optimistic(world.STYLES, SHARES[0], 2.0, 2)),
                       ("magnetic", games.magnetic(world.STYLES, SHARES[0], 1.5, 2, 0.75 * 0.4, 3))):
        summary = circle_summary()
        summary["settings"] |= dict(self_play=rule, magnet=0.4, magnet_every=3)
        torch.testing.assert_close(winrate.exact_styles(summary), want)


def test_style_line_and_table():
    """The average is over pi_1 ... pi_T, as in Theorem 4.1: what the last iteration made is not in it."""
    summary = circle_summary()
    line = winrate.style_line(summary["evaluations"])
    assert line.startswith("iteration 2: styles 0.20/0.30/0.50")
    # style 1 against the last iterate: .02 + .15 + .4; style 2 against the average: .525 + .035 + .0375
    assert "best response 0.570; average so far 0.75/" in line and line.endswith(("0.597", "0.598"))
    text = winrate.style_table(summary).splitlines()
    assert [row[:24].strip() for row in text[1:]] == ["base", "last iterate", "average of 2 iterates",
                                                      "average, exact updates", "Nash equilibrium"]
    assert text[3].split()[-4:-1] == ["0.750", "0.175", "0.075"] and text[5].split()[-1] == "0.500"
    assert text[1].split()[-1] == f"{games.best_response(world.STYLES, SHARES[0]):.3f}"
    assert len(winrate.style_table(circle_summary("ipo")).splitlines()) == 5


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_a_run_of_the_circle_that_is_not_over(rows, tmp_path):
    """The exact iterates are as many as were evaluated, so that the picture can be drawn after every one."""
    summary = circle_summary()
    summary["evaluations"], summary["settings"]["iterations"] = summary["evaluations"][:rows], 5
    assert len(winrate.exact_styles(summary)) == max(1, len(winrate.played_styles(summary["evaluations"])) - 1)
    plots.plot([("sppo", summary)], str(tmp_path / "curves.png"))
    assert is_png(tmp_path / "curves.png")


def test_a_table_over_seeds_looks_past_what_computes_nothing():
    """Where a run wrote, on which device, with which tracker."""
    summary = {"method": "lsp", "settings": {"seed": 0, "track": "", "device": "cpu", "out": "a", "lr": 1.0},
               "evaluations": [{**ROW, "name": "base"}], "seconds": {"total": 1.0}}
    other = summary | {"settings": {"seed": 1, "track": "wandb", "device": "cuda", "out": "b", "lr": 1.0}}
    assert "| base | 2 |" in winrate.table_of_runs([summary, other])
    with pytest.raises(run.UserError, match="differ in lr"):
        winrate.table_of_runs([summary, other | {"settings": other["settings"] | {"lr": 2.0}}])
