"""games.py: multiplicative weights, best responses and gaps by hand."""

import math

import pytest
import torch

import games
import kernels
import world

pytestmark = pytest.mark.usefixtures("elsewhere")


# ---------------------------------------------------------------------------------------------------------------------
# games


NASH = torch.tensor([3, 2, 4], dtype=torch.float64) / 9
ROCK = [[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]


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


def test_multiplicative_weights_go_round_and_average_to_nash():
    """Theorem 4.1 is about the average of the iterates: the last one circles ever farther out."""
    played = games.multiplicative_weights(world.STYLES, [0.6, 0.3, 0.1], 0.1, 4000)
    assert played.shape == (4000, 3) and played.sum(1).sub(1).abs().max() < 1e-12
    assert games.duality_gap(world.STYLES, played.mean(0)) < 0.02
    assert games.duality_gap(world.STYLES, played[-1]) > 0.2
    still = games.multiplicative_weights(world.STYLES, NASH, 2.0, 50)
    torch.testing.assert_close(still[-1], NASH)


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
