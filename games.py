"""Self-play on a payoff matrix, exactly, without a network.

A game: n strategies and P [n, n], P[i, j] = P(i beats j), P + P^T = 1. A policy is n probabilities. All float64. SPPO's
update (4.1) is multiplicative weights on such a game whose strategies are all the answers to one prompt, so what the
algorithm does without sampling, regression and a network can be computed here to the last digit.
"""

import itertools

import torch


def _float64(x):
    return torch.as_tensor(x, dtype=torch.float64)


def multiplicative_weights(P, start, eta, steps, optimistic=False):
    """SPPO's (4.1) solved exactly: pi_{t+1} ~ pi_t exp(eta P pi_t). Returns the iterates pi_1 = start, ..., [steps, n].

    optimistic: the last gain counts twice and the one before is taken back, pi_{t+1} ~ pi_t exp(eta (2 g_t - g_{t-1})),
    g_t = P pi_t: a guess that the opponent moves on as it did (Rakhlin and Sridharan, arXiv 1311.1869). The average's
    gap then falls as 1/T at a constant eta, where the plain rule stays on its circle and needs eta ~ 1/sqrt(T).

    >>> P = torch.tensor(world.STYLES, dtype=torch.float64)
    >>> multiplicative_weights(P, torch.ones(3) / 3, eta=2.0, steps=2)[1]       # style 0 beats the uniform mixture most
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
    takes twice its steps. (2,000 prompts know P to .01: two that are closer than that can trade all their share.)

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
