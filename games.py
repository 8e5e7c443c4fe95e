"""Self-play on a payoff matrix, exactly, without a network.

A game: n strategies and P [n, n], P[i, j] = P(i beats j), P + P^T = 1. A policy is n probabilities. All float64. SPPO's
update (4.1) is multiplicative weights on such a game, whose strategies are all the answers to one prompt. So what the
algorithm does without sampling, regression and a network can be computed here to the last digit: what its theorem
promises (the average of the iterates approaches the Nash equilibrium) and what it leaves open (the last iterate).

    python games.py              the theorem's bound, the average and the last iterate on three games
"""

import itertools
import math

import torch

import run
import world

ROCK_PAPER_SCISSORS = ((0.5, 0.0, 1.0),
                       (1.0, 0.5, 0.0),
                       (0.0, 1.0, 0.5))


def _float64(x):
    return torch.as_tensor(x, dtype=torch.float64)


def multiplicative_weights(P, start, eta, steps, optimistic=False):
    """SPPO's (4.1) solved exactly: pi_{t+1} ~ pi_t exp(eta P pi_t). Returns the iterates pi_1 = start, ..., [steps, n].

    optimistic: the last gain counts twice and the one before is taken back, pi_{t+1} ~ pi_t exp(eta (2 g_t - g_{t-1})),
    g_t = P pi_t: a guess that the opponent moves on as it did (Rakhlin and Sridharan, arXiv 1311.1869). The average's
    gap then falls as 1/T at a constant eta, where the plain rule stays on its circle and needs eta ~ 1/sqrt(T).

    >>> start = torch.ones(3) / 3
    >>> multiplicative_weights(world.STYLES, start, eta=2.0, steps=2)[1]        # style 0 beats the uniform mixture most
    tensor([0.3792, 0.3104, 0.3104], dtype=torch.float64)
    """
    P, log_pi, iterates, before = _float64(P), _float64(start).log(), [], None
    for _ in range(steps):
        iterates.append(log_pi.softmax(0))
        gain = P @ iterates[-1]
        log_pi = log_pi + eta * (2 * gain - before if optimistic and before is not None else gain)
        before = gain
    return torch.stack(iterates)


def best_response(P, policy):
    """How often the strategy that does best against `policy` beats it: 1/2 at the Nash equilibrium, more elsewhere."""
    return float((_float64(P) @ _float64(policy)).max())


def duality_gap(P, policy):
    """max_pi P(pi > policy) - min_pi P(policy > pi), the quantity of Theorem 4.1: 0 at the Nash equilibrium."""
    return 2 * best_response(P, policy) - 1


def nash(P, tolerance=1e-4, eta=0.5):
    """A mixture [n] whose duality gap in P is at most `tolerance`, by averages of optimistic multiplicative weights.

    From the uniform mixture, so that equal strategies get equal shares; each round starts at the last one's average and
    takes twice its steps. (2,000 prompts know P to .01. For two strategies closer than that, a tiny change in
    P can move the whole share from one to the other.)

    >>> nash([[0.5, 0.75], [0.25, 0.5]]).round(decimals=2)                      # the first beats the second
    tensor([1., 0.], dtype=torch.float64)
    """
    mixture, steps = torch.full((len(P),), 1 / len(P), dtype=torch.float64), 64
    while duality_gap(P, mixture) > tolerance:
        mixture = multiplicative_weights(P, mixture, eta, steps, optimistic=True).mean(0)
        steps *= 2
    return mixture


def payoffs(n, results):
    """(P, standard errors), both [n, n] float64, from the (mean verdict, error) of every pair i < j, in the order of
    itertools.combinations. Mirrored, so that P + P^T = 1; the diagonal is 1/2 with error 0 by definition."""
    P, errors = torch.full((n, n), 0.5, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for (i, j), (mean, error) in zip(itertools.combinations(range(n), 2), results, strict=True):
        P[i, j], P[j, i] = mean, 1 - mean
        errors[i, j] = errors[j, i] = error
    return P, errors


CYCLE_ERRORS = 2.0      # a step of a cycle must be this many standard errors above 1/2 (one-sided chance 2.3 % a step)


def cycles(P, errors):
    """Triples (a, b, c), a the smallest: a beats b, b beats c, c beats a, each by more than CYCLE_ERRORS standard
    errors. Where every pair is that clear, a longer cycle always holds one of three.

    >>> [cycles(torch.tensor(world.STYLES), torch.full((3, 3), error)) for error in (0.05, 0.15)]
    [[(0, 1, 2)], []]
    """
    beats = (P - 0.5 > CYCLE_ERRORS * errors).tolist()
    return [(a, b, c) for a, b, c in itertools.permutations(range(len(P)), 3)
            if a < min(b, c) and beats[a][b] and beats[b][c] and beats[c][a]]


def cross_figures(names, P, errors):
    """What the payoff matrix says, as a dict of plain lists and numbers (crossplay.json's and --json's).

    exploitability[i] = what the best response among the players wins against i, less 1/2; 0 for one whom none beats."""
    mixture, pure = nash(P), torch.eye(len(P), dtype=torch.float64)
    return {"players": names, "payoff": P.tolist(), "payoff_se": errors.tolist(), "nash": mixture.tolist(),
            "duality_gap": duality_gap(P, mixture), "exploitability": [best_response(P, one) - 0.5 for one in pure],
            "cycles": [[names[i] for i in cycle] for cycle in cycles(P, errors)]}


def cross_table(figures):
    """The same as text: one row a player, the cycles named below."""
    names, width = figures["players"], max(14, *map(len, figures["players"]))
    lines = [f"{'row beats column':{width}s} " + " ".join(f"{n:>{max(13, len(n))}s}" for n in names)
             + f" {'Nash':>6s} {'exploitability':>14s}"]
    for i, name in enumerate(names):
        cells = [f"{p:.3f} ±{e:.3f}" if i != j else f"{p:.3f}"
                 for j, (p, e) in enumerate(zip(figures["payoff"][i], figures["payoff_se"][i]))]
        lines.append(f"{name:{width}s} " + " ".join(f"{c:>{max(13, len(n))}s}" for c, n in zip(cells, names))
                     + f" {figures['nash'][i]:6.3f} {figures['exploitability'][i]:14.3f}")
    for a, b, c in figures["cycles"]:
        lines.append(f"cycle: {a} beats {b} beats {c} beats {a}")
    if not figures["cycles"]:
        lines.append(f"no cycle of three whose every step is beyond {CYCLE_ERRORS:g} standard errors")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------


def bound(start, eta, T):
    """What Theorem 4.1 rests on: after T steps of size eta the average's duality gap is at most twice the regret of
    multiplicative weights, (L / eta + eta T / 8) / T with L the largest -log start_i. From the uniform start, where L
    is log n, the step eta = sqrt(8 log n / T) gives 2 sqrt(log n / (2 T)).

    >>> uniform, T = torch.ones(3) / 3, 64
    >>> abs(bound(uniform, math.sqrt(8 * math.log(3) / T), T) - 2 * math.sqrt(math.log(3) / (2 * T))) < 1e-6
    True
    """
    return 2 * (float(-_float64(start).log().min()) / eta + eta * T / 8) / T


def random_game(n, seed):
    """A game without order: P(i beats j) uniform in [0, 1]."""
    upper = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).triu(1)
    return upper + (1 - upper).T.tril(-1) + torch.eye(n, dtype=torch.float64) / 2


def _show(argv):
    """Duality gaps of the average and of the last iterate, beside the theorem's bound."""
    run.parse(run.NoSettings, argv, "Theorem 4.1 on three games: duality gaps by number of steps T")
    for name, P in (("rock, paper, scissors", ROCK_PAPER_SCISSORS), ("the three styles (world.STYLES)", world.STYLES),
                    ("a random game of 8", random_game(8, 0))):
        n = len(P)
        print(f"{name}; Nash equilibrium {' '.join(f'{p:.3f}' for p in nash(P).tolist())}\n"
              "duality gaps (0 at Nash) after T steps of (4.1) at eta = sqrt(8 ln n / T): bound, average, last\n"
              f"{'T':>6s} {'bound':>8s} {'average':>8s} {'last':>8s}   {'optimistic, eta 0.5: average':>28s} "
              f"{'last':>8s}")
        start = torch.rand(n, generator=torch.Generator().manual_seed(1)).softmax(0)    # not the uniform one: there
        for T in (16, 64, 256, 1024):                                   # rock, paper, scissors would stand still
            eta = math.sqrt(8 * math.log(n) / T)
            plain = multiplicative_weights(P, start, eta, T)
            optimistic = multiplicative_weights(P, start, 0.5, T, optimistic=True)
            gaps = [duality_gap(P, policy) for policy in (plain.mean(0), plain[-1], optimistic.mean(0), optimistic[-1])]
            print("{:6d} {:8.3f} {:8.3f} {:8.3f}   {:28.3f} {:8.3f}".format(T, bound(start, eta, T), *gaps))
        print()


if __name__ == "__main__":
    run.main(_show)
