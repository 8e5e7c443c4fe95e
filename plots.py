"""Pictures."""

import dataclasses
import itertools
import math

import torch

import run
import winrate
import world


def plot(runs, path):
    """Draw the evaluations of one or several runs: [(name, summary dict)] -> a PNG at `path`. Runs of the intransitive
    world become triangles, one each; of others, one run gets the panels that answer "did it learn?", several share all
    panels. `metrics` in a summary: the rows of the run's metrics.jsonl, for the panels of what is logged in training.
    """
    triangles = ["styles" in summary["evaluations"][0] for _, summary in runs]
    if any(triangles) != all(triangles):
        raise run.UserError("plot cannot put the intransitive world and another into one picture; plot them apart")
    draw = _triangles if triangles[0] else _curves if len(runs) == 1 else _comparison
    _save(lambda plt: draw(plt, runs), path)


def plot_payoffs(figures, path):
    """Draw cross_figures' dict: a heat map of who beats whom, the Nash mixture beside it -> a PNG at `path`."""
    _save(lambda plt: _heat_map(plt, figures), path)


def _save(draw, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = draw(plt)
    run.write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    plt.close(figure)


def _heat_map(plt, figures):
    names, n, P = figures["players"], len(figures["players"]), torch.tensor(figures["payoff"])
    size, spread = max(3.6, 0.8 * n), max(0.1, float((P - 0.5).abs().max()))
    figure, (left, right) = plt.subplots(1, 2, figsize=(size + 5, size + 1), layout="constrained", sharey=True,
                                         width_ratios=(size, 2))
    image = left.imshow(figures["payoff"], cmap="RdBu", vmin=0.5 - spread, vmax=0.5 + spread)
    for i, j in itertools.product(range(n), repeat=2):
        error = f"\n±{figures['payoff_se'][i][j]:.2f}" if i != j else ""
        left.text(j, i, f"{P[i, j]:.2f}{error}", ha="center", va="center", fontsize=8,
                  color="white" if abs(P[i, j] - 0.5) > 0.6 * spread else "black")
    left.set_xticks(range(n), names, rotation=30, ha="right")
    left.set_yticks(range(n), names)
    left.set_title(f"how often the row beats the column\n{figures['prompts']} prompts, judge {figures['judge']}, "
                   "± 1 s.e.", fontsize=10)
    figure.colorbar(image, ax=left, shrink=0.8)
    right.barh(range(n), figures["nash"], color="C2", height=0.5)
    for i, (share, lost) in enumerate(zip(figures["nash"], figures["exploitability"])):
        right.text(share + 0.03, i, f"{lost:.3f}", va="center", fontsize=8)
    right.set(xlim=(0, 1.35), xticks=(0, 0.5, 1))
    right.set_title("share in the Nash mixture\nbeside it: exploitability", fontsize=10)
    right.tick_params(left=False, labelleft=False)
    return figure


def _triangles(plt, runs):
    """The simplex of styles: every iterate, the running average of the iterates, and Nash's mixture."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]], dtype=torch.float64)
    figure, axes = plt.subplots(1, len(runs), figsize=(4.6 * len(runs), 4.4), layout="constrained", squeeze=False)
    for axis, (name, summary) in zip(axes[0], runs):
        played, exact = winrate.played_styles(summary["evaluations"]), winrate.exact_styles(summary)
        counts = torch.arange(1, len(played) + 1)[:, None]
        axis.plot(*(corners[[0, 1, 2, 0]]).T, color="black", lw=0.8)
        axis.plot(*(played @ corners).T, "o-", ms=2.5, lw=0.7, color="C0", alpha=0.7, label="iterates")
        axis.plot(*(played.cumsum(0) / counts @ corners).T, "-", lw=2, color="C3", label="average so far")
        if exact is not None:
            mean = exact.cumsum(0) / counts[:len(exact)]
            axis.plot(*(mean @ corners).T, "--", lw=1.2, color="black", label="average, exact updates")
        axis.plot(*(torch.tensor(world.NASH_STYLES, dtype=torch.float64) @ corners)[:, None], "*", ms=13, color="C2",
                  label="Nash equilibrium")
        for corner, text, side in zip(corners.tolist(), ("style 0", "style 1", "style 2"), ("top", "top", "bottom")):
            axis.text(*corner, text, ha="center", va=side, fontsize=8)
        axis.set(title=f"{name} ({summary['method']}), {len(played) - 1} iterations", aspect="equal",
                 xlim=(-0.1, 1.1), ylim=(-0.1, 0.98))
        axis.axis("off")
        axis.legend(fontsize=7, loc="upper left", frameon=False)
    return figure


@dataclasses.dataclass
class Panel:
    """One measure of a picture: its lines as {key of a row: (style, label)}, out of the evaluations or the metrics."""
    title: str
    lines: dict
    logged: bool = False


WIN_RATE = Panel("win rate against the base (± 1 s.e.)", {"win_rate_greedy": ("-", "greedy vs greedy"),
                                                          "win_rate": (":", "sampled (T = 1)")})
ACCURACY = Panel("share of test prompts answered exactly", {"accuracy_greedy": ("-", "greedy"),
                                                            "accuracy_sampled": (":", "sampled (T = 1)")})
LENGTH = Panel("answer length (tokens)", {"mean_length_greedy": ("-", "greedy"),
                                          "mean_length": (":", "sampled (T = 1)")})
CHALLENGER = Panel("the Challenger's queries (shares)", {"malformed": (":", "malformed"),
                                                         "base_accuracy": ("-", "the base answers exactly")})
# A KL is a mean over the policy's own samples; what SPPO logs is a mean over answers of pi_t: a log-ratio and no KL
DISTANCE = Panel("distance from the reference (nats)", {
    "kl_solver": ("-", "LSP: KL to the initial model, Solver"), "kl_challenger": (":", "LSP: the same, Challenger"),
    "logratio_w": ("-.", "SPPO: log-ratio to pi_t, winners"), "logratio_l": ("--", "SPPO: the same, losers")
}, logged=True)


def _curves(plt, runs):
    """One run: accuracy where there is an oracle, else answer length; win rates; what an LSP Challenger asks."""
    (_, summary), = runs
    rows = _iterates(summary)
    panels = [ACCURACY if rows[0]["accuracy_greedy"] is not None else LENGTH, WIN_RATE]
    panels += [CHALLENGER] * any("malformed" in r for r in rows)
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", sharex=True)
    x = [_number_in(r) for r in rows]
    for axis, panel in zip(axes, panels):
        for key, (style, label) in panel.lines.items():
            _line(axis, x, rows, key, color={"-": "C0", ":": "C1"}[style], ls=style, label=label)
        _finish(axis, panel, [summary])
        axis.set(title=panel.title, xlabel=rows[-1]["name"].split()[0])
        if len(x) <= 8:
            axis.set_xticks(x, ["base", *x[1:]])
    return figure


def _comparison(plt, runs):
    """Several runs: a column for each measure that any of them has, one row against gradient steps and one against
    seconds. A colour is a run, a line's style what is measured."""
    summaries = [summary for _, summary in runs]
    clocks = [_clocks(summary) for summary in summaries]
    units = {"steps": "gradient steps" if all(s.get("metrics") for s in summaries) else "iteration or step"}
    if all(clock["seconds"] for clock in clocks):
        units["seconds"] = "seconds\n(logged, or steps spread over the run's phases)"
    sources = [{True: s.get("metrics", []), False: _iterates(s)} for s in summaries]
    found = {key for s in sources for rows in s.values() for row in rows for key in row if row[key] is not None}
    panels = [panel for panel in (WIN_RATE, ACCURACY, LENGTH, DISTANCE, CHALLENGER) if found & panel.lines.keys()]
    figure, axes = plt.subplots(len(units), len(panels), figsize=(4.2 * len(panels), 3.4 * len(units) + 0.5),
                                layout="constrained", squeeze=False, sharey="col", sharex="row")
    for (i, unit), (j, panel) in itertools.product(enumerate(units), enumerate(panels)):
        for k, (source, clock) in enumerate(zip(sources, clocks)):
            for key, (style, _) in panel.lines.items():
                _line(axes[i, j], clock[unit][panel.logged], source[panel.logged], key, panel.logged,
                      color=f"C{k % 10}", ls=style)
        for style, label in (panel.lines[key] for key in panel.lines if key in found):
            axes[i, j].plot([], [], color="0.3", ls=style, label=label)     # the legend of styles, in no run's colour
        _finish(axes[i, j], panel, summaries, legend=i == 0)
        axes[i, j].set(title=panel.title if i == 0 else None, xlabel=units[unit])
    figure.legend([plt.Line2D([], [], color=f"C{k % 10}", lw=3) for k in range(len(runs))], [name for name, _ in runs],
                  loc="outside lower center", ncols=min(6, len(runs)))
    return figure


def _iterates(summary):
    """The evaluations of the base and of what became of it: not the row of the base decoded greedily."""
    return [row for row in summary["evaluations"] if row["name"] != "base, greedy"]


def _number_in(row):
    return 0 if row["name"] == "base" else int(row["name"].split()[-1])             # "iteration 2", "step 100"


def _line(axis, x, rows, key, logged=False, **style):
    """One key of the rows over x, with error bars where the rows hold them; rows without the key are left out. What is
    logged at every step is averaged over at most 40 stretches of the run: a line, and no cloud."""
    points = [(at, row[key], row.get(key + "_se")) for at, row in zip(x, rows) if row.get(key) is not None]
    if logged:
        width = math.ceil(len(points) / 40) or 1
        groups = [points[i:i + width] for i in range(0, len(points), width)]
        points = [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g), None) for g in groups]
    if points:
        x, y, error = zip(*points)
        axis.errorbar(x, y, None if None in error else error, capsize=3, elinewidth=0.8, lw=1.5,
                      marker=None if logged else "o", ms=3.5, **style)


def _finish(axis, panel, summaries, legend=True):
    """Grid and legend; lengths from 0; and what sharpening alone wins: the base, greedy, against its own samples."""
    sharp = {r["win_rate"] for s in summaries for r in s["evaluations"] if r["name"] == "base, greedy"}
    for i, rate in enumerate(sorted(sharp) if panel is WIN_RATE else ()):
        axis.axhline(rate, color="0.4", lw=0.8, ls="--", label="_" * (i > 0) + "untrained base, greedy, vs samples")
    if panel is LENGTH:
        axis.set_ylim(0, 1.25 * axis.dataLim.y1)
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=7)


def _clocks(summary):
    """When a run's E evaluations (False) and M logged rows (True) were made: {"steps": {False: [E], True: [M]},
    "seconds": the same, or None}.

    Steps are gradient steps; iteration t of SPPO ends with its last logged one (without a log: at t). Seconds are a
    row's own where it has them, else the steps spread evenly over the phases' seconds, all that a summary knows; not
    over its total, in which a first run trains the embedded world's base.
    """
    rows, metrics, ends, steps = _iterates(summary), summary.get("metrics", []), {}, []
    for row in metrics:
        t = row.get("iteration", 1)
        before = ends.get(t - 1, 0)
        ends[t] = before + row["step"]
        steps.append(ends[t])
    at = [ends.get(n, n) if row["name"].startswith("iteration") else n for row in rows for n in [_number_in(row)]]
    spent = sum(value for phase, value in summary.get("seconds", {}).items() if phase != "total")
    scale = spent / max([*at, *steps, 1])
    seconds = {logged: [row.get("seconds", x * scale) for x, row in zip(xs, source)]
               for logged, xs, source in ((False, at, rows), (True, steps, metrics))}
    return {"steps": {False: at, True: steps}, "seconds": seconds if scale else None}
