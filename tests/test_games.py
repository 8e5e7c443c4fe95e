"""games.py: updates, best responses and gaps by hand; where the last iterate goes; the command."""

import functools
import math
import os

import pytest
import torch

import games
import kernels
import world
from conftest import is_png
from run import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

NASH = torch.tensor([3, 2, 4], dtype=torch.float64) / 9
ROCK = [[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]
PAIR, ETA = [[0.5, 0.8], [0.2, 0.5]], 2.0            # the first of two strategies beats the second with .8


def gap(P, iterates):
    return games.duality_gap(P, iterates[-1])


# ---------------------------------------------------------------------------------------------------------------------
# by hand


def test_best_response_and_duality_gap_by_hand():
    """Pure rock is always beaten by paper; nobody beats Nash's mixture; a dominant strategy is its own equilibrium."""
    pure = torch.tensor([1.0, 0.0, 0.0])
    assert games.best_response(ROCK, pure) == 1.0 and games.duality_gap(ROCK, pure) == 1.0
    assert games.best_response(ROCK, torch.ones(3).double() / 3) == pytest.approx(0.5, abs=1e-12)
    assert games.best_response(world.STYLES, [1, 0, 0]) == pytest.approx(0.7)
    assert games.best_response(world.STYLES, [0.5, 0.5, 0.0]) == pytest.approx(0.7)      # style 0: (.5 + .9) / 2
    assert games.duality_gap(world.STYLES, [0.5, 0.5, 0.0]) == pytest.approx(0.4)
    assert games.best_response(world.STYLES, NASH) == pytest.approx(0.5, abs=1e-7)
    assert games.duality_gap([[0.5, 0.75], [0.25, 0.5]], [1.0, 0.0]) == pytest.approx(0.0)


def test_multiplicative_weights_by_hand():
    """One step from (1/4, 3/4) in a game of two: weights times exp(eta P pi); then on to the dominant strategy."""
    P, eta = [[0.5, 0.8], [0.2, 0.5]], 2.0
    one, two = games.multiplicative_weights(P, [0.25, 0.75], eta, 2).tolist()
    a, b = 0.25 * math.exp(eta * (0.125 + 0.6)), 0.75 * math.exp(eta * (0.05 + 0.375))
    assert one == pytest.approx([0.25, 0.75]) and two == pytest.approx([a / (a + b), b / (a + b)])
    assert games.multiplicative_weights(P, [0.25, 0.75], eta, 60)[-1, 0] > 1 - 1e-9


def after(policy, gains, eta=ETA):
    """pi exp(eta gains), normalised: one step of multiplicative weights on lists."""
    weights = [p * math.exp(eta * g) for p, g in zip(policy, gains)]
    return [w / sum(weights) for w in weights]


def gains(policy):
    """P pi of PAIR, written out."""
    return [0.5 * policy[0] + 0.8 * policy[1], 0.2 * policy[0] + 0.5 * policy[1]]


def test_optimistic_by_hand():
    """The first step is the plain one; the second counts the last gain twice and takes the one before back."""
    one = [0.25, 0.75]
    two = after(one, gains(one))
    three = after(two, [2 * new - old for new, old in zip(gains(two), gains(one))])
    assert games.optimistic(PAIR, one, ETA, 3).tolist() == [pytest.approx(p) for p in (one, two, three)]


def test_the_optimistic_average_is_nearer_than_the_plain_one():
    """At a constant eta the one falls as 1/T, the other stays."""
    optimistic, plain = ([games.duality_gap(ROCK, rule(ROCK, [0.5, 0.3, 0.2], 0.5, T).mean(0)) for T in (500, 2000)]
                         for rule in (games.optimistic, games.multiplicative_weights))
    assert optimistic[1] < 0.3 * optimistic[0] < 0.002 < plain[1]


def test_leapfrog_by_hand():
    """The second step starts at pi_1 and is twice as long: log-ratio in place of the gain before."""
    one = [0.25, 0.75]
    two = after(one, gains(one))
    three = after(one, gains(two), 2 * ETA)
    assert games.leapfrog(PAIR, one, ETA, 3).tolist() == [pytest.approx(p) for p in (one, two, three)]
    ratio = [math.log(new / old) for new, old in zip(two, one)]
    assert three == pytest.approx(after(two, [2 * g - r / ETA for g, r in zip(gains(two), ratio)]))


def test_extragradient_by_hand():
    """The gains come from half way, the step starts where it stood."""
    one = [0.25, 0.75]
    two = after(one, gains(after(one, gains(one))))
    three = after(two, gains(after(two, gains(two))))
    assert games.extragradient(PAIR, one, ETA, 3).tolist() == [pytest.approx(p) for p in (one, two, three)]


def test_magnetic_by_hand():
    """Two steps with the magnet at the start; moved after the first, the second pulls towards where it stands."""
    one, w = [0.25, 0.75], 0.3

    def pulled(policy, magnet):
        logs = [(1 - w) * math.log(p) + w * math.log(m) + ETA * g
                for p, g, m in zip(policy, gains(policy), magnet)]
        return after([1, 1], logs, 1)

    two = pulled(one, one)
    for every, magnet in ((0, one), (2, one), (1, two)):
        want = [pytest.approx(p) for p in (one, two, pulled(two, magnet))]
        assert games.magnetic(PAIR, one, ETA, 3, w, every).tolist() == want


def test_a_magnet_moved_at_every_step_is_plain_self_play():
    moved = games.magnetic(world.STYLES, [0.6, 0.3, 0.1], 1.0, 50, weight=0.25, every=1)
    torch.testing.assert_close(moved, games.multiplicative_weights(world.STYLES, [0.6, 0.3, 0.1], 1.0, 50))


def test_nash_md_by_hand():
    """Opponent and origin of the second step: pi_2^.8 times the start^.2."""
    one, tau = [0.25, 0.75], 0.1
    two = after(one, gains(one))                                        # a mixture of the start with itself
    mixture = after([1, 1], [0.8 * math.log(p) + 0.2 * math.log(m) for p, m in zip(two, one)], 1)
    three = after(mixture, gains(mixture))
    assert games.nash_md(PAIR, one, ETA, 3, tau).tolist() == [pytest.approx(p) for p in (one, two, three)]


# ---------------------------------------------------------------------------------------------------------------------
# where the iterates go


RULES = {"plain": games.multiplicative_weights, "leapfrog": games.leapfrog, "optimistic": games.optimistic,
         "extragradient": games.extragradient, "moved": functools.partial(games.magnetic, weight=0.1, every=20)}
FULL = {"rock, paper, scissors": (ROCK, torch.ones(3).double() / 3), "styles": (world.STYLES, NASH)}
START = [0.6, 0.3, 0.1]                            # far from both


@pytest.mark.parametrize("game", FULL)
@pytest.mark.parametrize("rule", RULES)
def test_an_equilibrium_that_plays_everything_stays_put(rule, game):
    P, equilibrium = FULL[game]
    played = RULES[rule](P, equilibrium, 0.5, 50)
    torch.testing.assert_close(played[-1], equilibrium)


def test_multiplicative_weights_go_round_and_average_to_nash():
    """Theorem 4.1 is about the average of the iterates: the last one circles ever farther out."""
    played = games.multiplicative_weights(world.STYLES, START, 0.1, 4000)
    assert played.shape == (4000, 3) and played.sum(1).sub(1).abs().max() < 1e-12
    assert games.duality_gap(world.STYLES, played.mean(0)) < 0.02
    assert gap(world.STYLES, played) > 0.2
    kl = (NASH * (NASH / played).log()).sum(1)                          # from the equilibrium: no step brings it nearer
    assert (kl[1:] - kl[:-1]).min() > 0


# (n, seed) of random games whose equilibrium is unique and gives at least .15 to each of the three strategies that it
# plays: the linear rate is the game's own, and with a smaller share it takes longer than a test may
RANDOM = [(3, 9), (3, 12), (5, 2), (5, 4), (8, 2), (8, 18)]


@pytest.mark.parametrize("P", [ROCK, world.STYLES, *[games.random_game(*game) for game in RANDOM]],
                         ids=["rock", "styles", *[f"random {n} {seed}" for n, seed in RANDOM]])
def test_the_last_iterate_rests_where_the_theory_says_so_and_only_there(P):
    """After 2,000 steps at eta 1 the last gap is below .001 for the rules that converge. The others are above .015 at
    each of the last 100. The averages of all are near the equilibrium."""
    start = torch.linspace(1, 2, len(P)).double()
    for name, rule in RULES.items():
        played = rule(P, start / start.sum(), 1.0, 2000)
        if name in ("plain", "leapfrog"):
            assert min(games.duality_gap(P, policy) for policy in played[-100:]) > 0.015, name
        else:
            assert gap(P, played) < 1e-3, name
        assert games.duality_gap(P, played.mean(0)) < 0.05, name


def test_all_the_log_ratios_hold_the_gain_before_and_one_does_not():
    """eta g_{t-1} = r_t / 2 + r_{t-1} / 4 + ..., r_t = log pi_t/pi_{t-1}: the optimistic rule from its own ratios,
    without the gain before. Cut after the first term it winds outwards; four terms rest."""
    P, eta = torch.tensor(world.STYLES).double(), 2.0

    def from_ratios(terms, steps):
        logs = [torch.tensor(START).double().log()]
        logs.append(logs[0] + eta * P @ logs[0].softmax(0))
        while len(logs) < steps:
            ratios = [new - old for old, new in zip(logs, logs[1:])][::-1]
            weights = [0.5 ** (k + 1) for k in range(len(ratios))]
            weights[-1] *= 2                                            # the first step is eta g_1, once
            before = sum(w * r for w, r in list(zip(weights, ratios))[:terms])
            logs.append(logs[-1] + 2 * eta * P @ logs[-1].softmax(0) - before)
        return torch.stack(logs).softmax(1)

    torch.testing.assert_close(from_ratios(None, 200), games.optimistic(P, START, eta, 200))
    gaps = [games.duality_gap(P, policy) for policy in from_ratios(1, 200)]
    assert min(gaps[-50:]) > 0.1 and sum(gaps[-50:]) > 1.2 * sum(gaps[:50])
    assert gap(P, from_ratios(4, 200)) < 0.01


@pytest.mark.parametrize("game", FULL)
def test_a_fixed_magnet_rests_beside_the_equilibrium(game):
    """At the regularised game's own: pi = softmax(log magnet + P pi / alpha). The gap is between plain's and none."""
    P, start, alpha = torch.tensor(FULL[game][0]).double(), torch.tensor(START).double(), 0.1
    rest = games.magnetic(P, start, 0.1, 4000, 0.1 * alpha)[-1]
    torch.testing.assert_close(rest, (start.log() + P @ rest / alpha).softmax(0))
    plain = games.multiplicative_weights(P, start, 0.5, 2000)[-100:]
    assert 0.15 < games.duality_gap(P, rest) < 0.25 < sum(games.duality_gap(P, policy) for policy in plain) / 100
    assert games.duality_gap(P, rest) < games.duality_gap(P, start)


def test_nash_md_rests_beside_the_equilibrium():
    """At pi = softmax(log start + P m / tau), m the mixture; the smaller eta, the nearer to the regularised game's."""
    P, start, tau = torch.tensor(world.STYLES).double(), torch.tensor(START).double(), 0.1
    regularised = games.magnetic(P, start, 0.1, 4000, 0.1 * tau)[-1]
    away = []
    for eta in (0.4, 0.2, 0.1):
        rest = games.nash_md(P, start, eta, 4000, tau)[-1]
        mixture = ((1 - eta * tau) * rest.log() + eta * tau * start.log()).softmax(0)
        torch.testing.assert_close(rest, (start.log() + P @ mixture / tau).softmax(0))
        away.append(float((rest - regularised).abs().max()))
    assert away[0] > away[1] > away[2] > 0 and away[2] < 0.01
    assert 0.15 < games.duality_gap(P, rest) < games.duality_gap(P, start)


def test_the_styles_game_from_a_runs_start():
    """eta 2 and 40 iterations from the base's shares: best responses to the mean of the last ten iterates."""
    best = {}
    for name, rule in games.RULES.items():
        played = rule(world.STYLES, games.STYLES_START, games.STYLES_ETA, games.STYLES_T + 1)
        best[name] = sum(games.best_response(world.STYLES, policy) for policy in played[-10:]) / 10
    assert best["plain"] > 0.65 and best["leapfrog"] > 0.55
    assert max(best[name] for name in ("optimistic", "extragradient", "magnet, moved")) < 0.515
    assert 0.525 < best["magnet, fixed"] < best["Nash-MD"] < 0.54


# ---------------------------------------------------------------------------------------------------------------------
# sampling, and the command


def test_the_comparison_with_oneself_scales_preferences():
    """The claim behind it: among K samples of a policy, Phat of one with style i is, less 1/2 and on average,
    (K - 1)/K of P(i beats the policy) - 1/2. 40,000 draws of K = 5, within 5 standard errors; without the factor it
    would be off by three times as much."""
    K, n, policy = 5, 40000, torch.tensor([0.2, 0.7, 0.1])
    P = torch.tensor(world.STYLES)
    styles = policy.expand(n, 3).multinomial(K, replacement=True, generator=torch.Generator().manual_seed(0))
    wins = kernels.phat(P[styles[:, :, None], styles[:, None, :]]) - 0.5                  # [n, K]
    for i in (0, 2):
        found, edge = wins[styles == i], float(P[i] @ policy) - 0.5                         # edges .26 and -.17
        error = float(found.std()) / math.sqrt(int((styles == i).any(1).sum()))     # samples of a prompt are alike
        assert abs(float(found.mean()) - edge * (K - 1) / K) < 5 * error < abs(edge) / K / 3


@pytest.mark.slow
@pytest.mark.pictures
def test_the_command_prints_the_tables_and_writes_the_picture(capsys):
    games._show(["--out", "new/games.png"])
    text = capsys.readouterr().out
    assert is_png("new/games.png") and "wrote new/games.png" in text and os.listdir("new") == ["games.png"]
    rows = {line[:14].strip(): [float(x) for x in line[14:].split()] for line in text.splitlines()
            if line[:14].strip() in games.RULES}
    assert list(rows) == list(games.RULES) and {len(row) for row in rows.values()} == {10}
    for last in (0, 2, 6, 8):           # of every game but the random ones of 3, most of which one strategy dominates
        assert max(rows["optimistic"][last], rows["extragradient"][last]) < rows["leapfrog"][last] < rows["plain"][last]
    assert max(row[1] for row in rows.values()) < 0.12      # every average is near the equilibrium of some game
    assert "Theorem 4.1" in text and [line.split()[0] for line in text.splitlines()[3:7]] == ["16", "64", "256", "1024"]


def test_the_command_without_a_picture_and_where_none_can_be_written(capsys, monkeypatch):
    monkeypatch.setattr(games, "_last_iterates", lambda: "a table")
    games._show(["--out", ""])
    assert "a table" in capsys.readouterr().out and os.listdir() == []
    open("file", "w").close()
    with pytest.raises(UserError, match="--out file/games.png cannot be written .*; name another file"):
        games._show(["--out", "file/games.png"])
