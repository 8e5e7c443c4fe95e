"""Self-play on a payoff matrix, exactly, without a network.

A game: n strategies and P [n, n], P[i, j] = P(i beats j), P + P^T = 1. A policy is n probabilities. All float64. SPPO's
update (4.1) is multiplicative weights on such a game, whose strategies are all the answers to one prompt. So what the
algorithm does without sampling, regression and a network can be computed here to the last digit: what its theorem
promises (the average of the iterates approaches the Nash equilibrium), what it leaves open (the last iterate goes
round), and which updates bring the last iterate to rest.

    python games.py              Theorem 4.1 on three games; the last iterate under seven updates; a picture of them
    python games.py --out ""     the same without the picture
"""

import dataclasses
import functools
import itertools
import math
import os

import torch

import files
import flags
import run
import world
from flags import flag

ROCK_PAPER_SCISSORS = ((0.5, 0.0, 1.0),
                       (1.0, 0.5, 0.0),
                       (0.0, 1.0, 0.5))


def _float64(x):
    return torch.as_tensor(x, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# updates: each returns the iterates pi_1 = start, ..., pi_steps, [steps, n]. The gains are g_t = P pi_t: how often each
# strategy beats pi_t. Constants in log pi do not matter, the softmax takes them out.


def multiplicative_weights(P, start, eta, steps):
    """SPPO's (4.1) solved exactly: log pi_{t+1} = log pi_t + eta g_t + const.

    The average approaches the equilibrium (Theorem 4.1; Freund and Schapire 1999). The last iterate does not: where the
    equilibrium gives every strategy a share, no step brings it nearer in KL, however small eta is, and the path winds
    outwards (Bailey and Piliouras, EC 2018).

    >>> start = torch.ones(3) / 3
    >>> multiplicative_weights(world.STYLES, start, eta=2.0, steps=2)[1]        # style 0 beats the uniform mixture most
    tensor([0.3792, 0.3104, 0.3104], dtype=torch.float64)
    """
    P, log_pi, iterates = _float64(P), _float64(start).log(), []
    for _ in range(steps):
        iterates.append(log_pi.softmax(0))
        log_pi = log_pi + eta * (P @ iterates[-1])
    return torch.stack(iterates)


def optimistic(P, start, eta, steps):
    """log pi_{t+1} = log pi_t + eta (2 g_t - g_{t-1}) + const, g_0 = g_1: a guess that the opponent moves on as it did
    (Rakhlin and Sridharan, arXiv 1311.1869; for preferences of language models ONPO, arXiv 2502.16852).

    The average's gap falls as 1/T at a constant eta, where the plain rule needs eta ~ 1/sqrt(T) to reach 1/sqrt(T). The
    last iterate converges where the equilibrium is unique (Daskalakis and Panageas, arXiv 1807.04252), at a linear rate
    for eta below a constant that is the same for all games (Wei et al., arXiv 2006.09517). The rate is the game's own
    and can be as slow as one likes (Cai et al., arXiv 2406.10631).

    >>> [best_response(world.STYLES, rule(world.STYLES, [0.45, 0.25, 0.3], 2.0, 400)[-1]) > 0.501
    ...  for rule in (multiplicative_weights, optimistic)]
    [True, False]
    """
    P, log_pi, iterates, before = _float64(P), _float64(start).log(), [], None
    for _ in range(steps):
        iterates.append(log_pi.softmax(0))
        gain = P @ iterates[-1]
        log_pi = log_pi + eta * (gain if before is None else 2 * gain - before)
        before = gain
    return torch.stack(iterates)


def leapfrog(P, start, eta, steps):
    """A shortcut that fails: log pi_{t+1} = log pi_{t-1} + 2 eta g_t + const, where the first step is the plain one.

    It is the optimistic rule with r_t = log pi_t/pi_{t-1} in place of eta g_{t-1}: a trainer knows r_t already, and
    must sample and judge for g_{t-1}. But r_t holds the last correction too, eta (2 g_{t-1} - g_{t-2}). Near an
    equilibrium that gives every strategy a share, the gains are the log-shares' distance to it, turned by a right angle
    and scaled by some w. Write the plane of this turn as complex numbers: the gain of x is i w x, and a path x_t = z^t
    needs z^2 = 1 + 2 i eta w z. Both solutions have |z| = 1 while eta w <= 1: the path circles for ever. Its average is
    good.

    All ratios together would do: eta g_{t-1} = r_t / 2 + r_{t-1} / 4 + r_{t-2} / 8 + ..., at the price of the
    log-probabilities of every earlier policy. The first term alone winds outwards.

    >>> played = leapfrog(ROCK_PAPER_SCISSORS, [0.5, 0.3, 0.2], 0.5, 2000)
    >>> min(duality_gap(ROCK_PAPER_SCISSORS, policy) for policy in played) > 0.1
    True
    """
    P, log_pi, iterates, before = _float64(P), _float64(start).log(), [], None
    for _ in range(steps):
        iterates.append(log_pi.softmax(0))
        gain = P @ iterates[-1]
        before, log_pi = log_pi, (log_pi + eta * gain if before is None else before + 2 * eta * gain)
    return torch.stack(iterates)


def extragradient(P, start, eta, steps):
    """First a half step, log pi' = log pi_t + eta g_t; then log pi_{t+1} = log pi_t + eta P pi' + const, with the gains
    that it leads to: two a step. Korpelevich 1976; with these weights Nemirovski's mirror prox, 2004; for preferences
    EGPO, arXiv 2503.08942.

    Its average's gap falls as 1/T. EGPO adds a regulariser and proves a linear rate of the last iterate to the
    regularised equilibrium and a polynomial one to the game's own; here, without a regulariser, it moves nearly as the
    optimistic rule does.

    >>> best_response(world.STYLES, extragradient(world.STYLES, [0.45, 0.25, 0.3], 2.0, 400)[-1]) < 0.501
    True
    """
    P, log_pi, iterates = _float64(P), _float64(start).log(), []
    for _ in range(steps):
        iterates.append(log_pi.softmax(0))
        ahead = (log_pi + eta * (P @ iterates[-1])).softmax(0)
        log_pi = log_pi + eta * (P @ ahead)
    return torch.stack(iterates)


def magnetic(P, start, eta, steps, weight, every=0):
    """log pi_{t+1} = (1 - w) log pi_t + w log m + eta g_t + const: a magnet m pulls with weight w. It is the start
    (every = 0), or moves to pi_t after every `every` steps.

    Fixed, this is magnetic mirror descent (Sokota et al., arXiv 2206.05825) with a magnet of strength alpha = w / eta
    and steps of eta / (1 - w). The last iterate converges at a linear rate if eta is small enough for alpha, but to the
    equilibrium of the regularised game, pi = softmax(log m + P pi / alpha), which lies towards the magnet. Moved
    (Perolat et al., arXiv 2002.08456; for preferences Magnetic Preference Optimization, arXiv 2410.16714, and COMAL,
    arXiv 2410.23223): it converges to the game's own equilibrium, if each regularised game is nearly solved before the
    next. Too early does not help: with every = 1 the magnet is pi_t itself, and this is the plain rule.

    >>> start, rest = [0.45, 0.25, 0.3], functools.partial(magnetic, world.STYLES, eta=2.0, steps=400, weight=0.2)
    >>> [f"{best_response(world.STYLES, rest(start, every=every)[-1]):.3f}" for every in (0, 10)]
    ['0.529', '0.500']
    """
    P, log_pi, iterates = _float64(P), _float64(start).log(), []
    magnet = log_pi
    for t in range(steps):
        if every and t % every == 0:
            magnet = log_pi
        iterates.append(log_pi.softmax(0))
        log_pi = (1 - weight) * log_pi + weight * magnet + eta * (P @ iterates[-1])
    return torch.stack(iterates)


def nash_md(P, start, eta, steps, tau):
    """Nash-MD (Munos et al., arXiv 2312.00886): log pi_{t+1} = log m_t + eta P m_t + const. The opponent and the origin
    of the step are the geometric mixture m_t ~ pi_t^(1 - eta tau) mu^(eta tau) with a reference mu, here the start.

    The last iterate converges to the equilibrium of the regularised game (strength tau), as 1/T in KL with their choice
    of eta; at a constant eta it rests where pi = softmax(log mu + P m / tau). eta tau may be 1 at most.

    >>> f"{best_response(world.STYLES, nash_md(world.STYLES, [0.45, 0.25, 0.3], 2.0, 400, tau=0.1)[-1]):.3f}"
    '0.536'
    """
    P, log_pi, iterates = _float64(P), _float64(start).log(), []
    reference = log_pi
    for _ in range(steps):
        iterates.append(log_pi.softmax(0))
        mixture = (1 - eta * tau) * log_pi + eta * tau * reference
        log_pi = mixture + eta * (P @ mixture.softmax(0))
    return torch.stack(iterates)


# ---------------------------------------------------------------------------------------------------------------------
# the measure, the equilibrium, and a matrix of checkpoints


def best_response(P, policy):
    """How often the strategy that does best against `policy` beats it: 1/2 at the Nash equilibrium, more elsewhere."""
    return float((_float64(P) @ _float64(policy)).max())


def duality_gap(P, policy):
    """max_pi P(pi > policy) - min_pi P(policy > pi), the quantity of Theorem 4.1: 0 at the Nash equilibrium."""
    return 2 * best_response(P, policy) - 1


def nash(P, tolerance=1e-4, eta=0.5):
    """A mixture [n] whose duality gap in P is at most `tolerance`, by averages of the optimistic rule.

    From the uniform mixture, so that equal strategies get equal shares; each round starts at the last one's average and
    takes twice its steps. (2,000 prompts know P to .01. For two strategies closer than that, a tiny change in
    P can move the whole share from one to the other.)

    >>> nash([[0.5, 0.75], [0.25, 0.5]]).round(decimals=2)                      # the first beats the second
    tensor([1., 0.], dtype=torch.float64)
    """
    mixture, steps = torch.full((len(P),), 1 / len(P), dtype=torch.float64), 64
    while duality_gap(P, mixture) > tolerance:
        mixture = optimistic(P, mixture, eta, steps).mean(0)
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


@dataclasses.dataclass
class Settings:
    """The flags of `python games.py`."""
    out: str = flag("out/games.png", 'the picture of the updates on the game of styles; "" = none')


WEIGHT, TAU = 0.2, 0.1  # of the magnets; strength of Nash-MD's reference
RULES = {"plain": multiplicative_weights, "leapfrog": leapfrog, "optimistic": optimistic,
         "extragradient": extragradient,
         "magnet, fixed": functools.partial(magnetic, weight=WEIGHT),
         "magnet, moved": functools.partial(magnetic, weight=WEIGHT, every=10),
         "Nash-MD": functools.partial(nash_md, tau=TAU)}
# The start and the length of a run of --world intransitive. Its plain --eta 2 makes steps of (K - 1)/K of that, 1.6.
STYLES_START, STYLES_ETA, STYLES_T = (0.45, 0.25, 0.3), 2.0, 40


def _theorem():
    """Text: duality gaps of (4.1) on three games beside the theorem's bound."""
    played = {"rock, paper, scissors": ROCK_PAPER_SCISSORS, "styles (world.STYLES)": world.STYLES,
              "a random game of 8": random_game(8, 0)}
    lines = ["Theorem 4.1: duality gaps (0 at Nash) after T steps of (4.1) at eta = sqrt(8 ln n / T)",
             " " * 6 + "".join(f"   {name:^26s}" for name in played),
             f"{'T':>6s}" + f"   {'bound':>8s} {'average':>8s} {'last':>8s}" * len(played)]
    for T in (16, 64, 256, 1024):
        lines.append(f"{T:6d}")
        for P in played.values():
            n = len(P)
            start = torch.rand(n, generator=torch.Generator().manual_seed(1)).softmax(0)    # not the uniform one:
            eta = math.sqrt(8 * math.log(n) / T)                        # there rock, paper, scissors would stand still
            iterates = multiplicative_weights(P, start, eta, T)
            gaps = bound(start, eta, T), duality_gap(P, iterates.mean(0)), duality_gap(P, iterates[-1])
            lines[-1] += "   {:8.3f} {:8.3f} {:8.3f}".format(*gaps)
    return "\n".join(lines)


def _last_iterates(T=100, seeds=20):
    """Text: gaps of every rule's last ten iterates and of its average.

    One iterate of a path that circles says only where on the circle it stopped, so there are ten. T iterations lead to
    pi_{T+1}, the last; the average is that of pi_1, ..., pi_T, as in the table of a run."""
    played = {"rock paper scissors": ([ROCK_PAPER_SCISSORS], (0.5, 0.3, 0.2), 1.0, T),
              "styles": ([world.STYLES], STYLES_START, STYLES_ETA, STYLES_T)}
    for n in (3, 5, 8):
        played[f"random, n = {n}"] = ([random_game(n, seed) for seed in range(seeds)], torch.ones(n) / n, 2.0, T)
    lines = ["Duality gaps of the last ten iterates (their mean) and of the average; best response = 1/2 + gap / 2",
             f"w {WEIGHT:g}, tau {TAU:g}; styles: eta {STYLES_ETA:g}, {STYLES_T} iterations; the others {T}: rock "
             f"paper scissors at eta 1, {seeds} random games each at eta 2",
             " " * 14 + "".join(f"  {game:^19s}" for game in played),
             " " * 14 + f"  {'last ten':>9s} {'average':>9s}" * len(played)]
    for name, rule in RULES.items():
        lines.append(f"{name:14s}")
        for matrices, start, eta, iterations in played.values():
            runs = [(P, rule(P, start, eta, iterations + 1)) for P in matrices]
            last = [duality_gap(P, policy) for P, iterates in runs for policy in iterates[-10:]]
            average = [duality_gap(P, iterates[:-1].mean(0)) for P, iterates in runs]
            lines[-1] += f"  {sum(last) / len(last):9.4f} {sum(average) / len(average):9.4f}"
    return "\n".join(lines)


CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]], dtype=torch.float64)


def draw(path):
    """The simplex of styles as a PNG at `path`: where each rule goes, one panel each."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    equilibrium = (_float64(world.NASH_STYLES) @ CORNERS).tolist()
    with plt.rc_context({"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 9.5, "savefig.dpi": 200}):
        figure, axes = plt.subplots(2, 4, figsize=(9, 5), layout="constrained")     # 9 inches: a README column
        figure.get_layout_engine().set(h_pad=0.08)
        for axis in axes.flat:
            axis.axis("off")
        for axis, (name, rule) in zip(axes.flat, RULES.items()):
            iterates = rule(world.STYLES, STYLES_START, STYLES_ETA, STYLES_T + 1)
            points = iterates @ CORNERS
            axis.plot(*CORNERS[[0, 1, 2, 0]].T, color="black", lw=0.8)
            axis.plot(*equilibrium, "*", ms=13, color="C2", label="Nash equilibrium")
            axis.plot(*points.T, "o-", ms=1.8, lw=0.8, color="C0", label=f"{STYLES_T} iterations")
            axis.plot(*points[0].tolist(), "s", ms=6, mfc="white", mec="black", label="start")
            axis.plot(*points[-1].tolist(), "o", ms=4.5, color="C3", label="last iterate")
            axis.set_title(f"{name}\nbest response {best_response(world.STYLES, iterates[-1]):.3f}")
            axis.set(aspect="equal", xlim=(-0.12, 1.12), ylim=(-0.14, 0.98))
            for corner, text, shift in zip(CORNERS.tolist(), ("style 0", "style 1", "style 2"), (-12, -12, 4)):
                axis.annotate(text, corner, (0, shift), textcoords="offset points", ha="center")
        axes.flat[-1].legend(*axis.get_legend_handles_labels(), loc="center", frameon=False,
                             title=f"exact play, eta {STYLES_ETA:g}")
        files.write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
        plt.close(figure)


def _show(argv):
    """Print the tables and draw the picture."""
    args = flags.parse(Settings, argv, "SPPO's theory without a network: averages and last iterates of exact self-play")
    print(_theorem(), _last_iterates(), sep="\n\n")
    if args.out:
        try:
            os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
            draw(args.out)
        except OSError as error:
            raise run.UserError(f"--out {args.out} cannot be written ({error.strerror}); name another file") from None
        print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run.main(_show)
