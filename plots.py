"""Pictures of runs: curves of one run or several, the triangle of styles, and who beats whom.

Every picture explains itself at the width of a README column, 900 pixels: it is 9 inches wide at 100 pixels an inch, no
text is smaller than 9 points there, and it is saved at twice that, for sharp screens. A dashed line is a control, drawn
in the colour of the curve that it is to be compared with.
"""

import dataclasses
import itertools
import math

import torch

import files
import run
import winrate
import world
from games import CORNERS

WIDTH = 9.0                                     # inches
STYLE = {"font.size": 9.5, "axes.titlesize": 10.5, "axes.labelsize": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9,
         "legend.fontsize": 9, "savefig.dpi": 200, "axes.grid": True, "grid.alpha": 0.3}


def plot(runs, path, against="steps"):
    """Draw the evaluations of one or several runs, [(name, summary dict)], as a PNG at `path`.

    Runs of the intransitive world become triangles, one each. Of others, one run gets the panels that answer "did it
    learn?". Several are compared: one colour for each method, its runs (seeds) as a mean with a band from smallest to
    largest, against gradient steps or `against` "seconds". `metrics` in a summary: the rows of the run's metrics.jsonl.
    """
    triangles = ["styles" in summary["evaluations"][0] for _, summary in runs]
    if any(triangles) != all(triangles):
        raise run.UserError("plot cannot put the intransitive world and another into one picture; plot them apart")
    draw = _triangles if triangles[0] else _one_run if len(runs) == 1 else _several
    _save(lambda plt: draw(plt, runs, against) if draw is _several else draw(plt, runs), path)


def plot_payoffs(figures, path):
    """Draw cross_figures' dict as a PNG at `path`: a heat map of who beats whom, the Nash mixture beside it."""
    _save(lambda plt: _heat_map(plt, figures), path)


def plot_worth(contestants, path):
    """Draw accuracy by number of distinct training queries as a PNG at `path`: a panel for each number of steps that a
    contestant without such a number took, a band for each of these. contestants: {label: (settings, {kind of queries:
    (accuracy, standard error)})}."""
    _save(lambda plt: _worth(plt, contestants), path)


def plot_growth(panels, path):
    """Draw costs against sizes as a PNG at `path`. panels: (title, label of x, label of y,
    {name: [(x, y)]}) each."""
    def draw(plt):
        figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(WIDTH, 6), layout="constrained")
        for axis, (title, x_label, y_label, lines) in zip(axes.flat, panels):
            for name, points in lines.items():
                axis.plot(*zip(*points), marker="o", ms=4, label=name)
            axis.set(title=title, xlabel=x_label, ylabel=y_label)
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            if len(lines) > 1:
                axis.legend()
        return figure
    _save(draw, path)


def _save(draw, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure = draw(plt)
        files.write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
        plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# one run


@dataclasses.dataclass
class Panel:
    """One measure of a picture. lines: {key of a row: label}. controls: {key: (key of the row "base, greedy", label)},
    what the untrained base gets under that measure when it only decodes more sharply."""
    title: str
    lines: dict
    controls: dict = dataclasses.field(default_factory=dict)
    logged: bool = False                        # rows of metrics.jsonl instead of evaluations


ACCURACY = Panel("test queries answered exactly",
                 {"accuracy_greedy": "greedy", "accuracy_sampled": "sampled (T = 1)"},
                 {"accuracy_sampled": ("accuracy_greedy", "untrained base, greedy")})
WIN_RATE = Panel("win rate against the base",
                 {"win_rate_greedy": "greedy against greedy", "win_rate": "samples against samples"},
                 {"win_rate": ("win_rate", "untrained base, greedy")})
LENGTH = Panel("answer length (tokens)", {"mean_length_greedy": "greedy", "mean_length": "sampled (T = 1)"})
CHALLENGER = Panel("the Challenger's queries", {"base_accuracy": "answered by the initial model",
                                                "malformed": "malformed"})


def _one_run(plt, runs):
    """Accuracy where there is an oracle, else answer length; win rates; what an LSP Challenger asks."""
    (_, summary), = runs
    rows = _iterates(summary)
    sharp = next((row for row in summary["evaluations"] if row["name"] == "base, greedy"), {})
    panels = [ACCURACY if rows[0]["accuracy_greedy"] is not None else LENGTH, WIN_RATE]
    panels += [CHALLENGER] * any("malformed" in row for row in rows)
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.5), layout="constrained", sharex=True)
    x = [_number_in(row) for row in rows]
    for axis, panel in zip(axes, panels):
        for k, (key, label) in enumerate(panel.lines.items()):
            _line(axis, x, rows, key, color=f"C{k}", label=label)
            control, what = panel.controls.get(key, (None, None))
            if sharp.get(control) is not None:
                axis.axhline(sharp[control], color=f"C{k}", lw=1, ls="--", label=what)
        if panel in (LENGTH, CHALLENGER):                       # from 0, with room for the legend
            axis.set_ylim(0, 1.3 * max(axis.dataLim.y1, 0.01))
        axis.set(title=panel.title, xlabel=rows[-1]["name"].split()[0])
        if len(x) <= 8:
            axis.set_xticks(x, ["base", *x[1:]])
        axis.legend(loc="lower right" if panel.controls else "upper right")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# several runs


GREEDY = Panel("test queries answered exactly (greedy)", {"accuracy_greedy": ""})
HEAD_TO_HEAD = Panel("win rate, greedy against greedy", {"win_rate_greedy": ""})
MALFORMED = Panel("malformed queries", {"malformed": ""})
HARDNESS = Panel("queries that the initial model\nanswers (lower = harder)", {"base_accuracy": ""})
LENGTHS = Panel("answer length (tokens, greedy)", {"mean_length_greedy": ""})
# What SPPO logs is a mean over answers of pi_t: a log-ratio, and no KL
LOG_RATIO = Panel("log-ratio of winners", {"logratio_w": ""}, logged=True)


def _several(plt, runs, against):
    """Three panels at most: what was learned, and what tells the methods apart."""
    contestants = [(label, [summary for _, summary in members]) for label, members in groups(runs)]
    found = {key for _, members in contestants for summary in members
             for row in [*_iterates(summary), *summary.get("metrics", [])] for key in row if row[key] is not None}
    panels = [GREEDY if "accuracy_greedy" in found else LENGTHS]
    panels += [MALFORMED, HARDNESS] if "malformed" in found else [HEAD_TO_HEAD, LOG_RATIO]
    panels = [panel for panel in panels if found & panel.lines.keys()]
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.9), layout="constrained", squeeze=False)
    for k, (label, members) in enumerate(contestants):
        for axis, panel in zip(axes[0], panels):
            _band(axis, members, panel, against, color=f"C{k % 10}")
    for axis, panel in zip(axes[0], panels):
        axis.set(title=panel.title, xlabel="seconds" if against == "seconds" else "gradient steps")
    figure.legend([plt.Line2D([], [], color=f"C{k % 10}", lw=3) for k in range(len(contestants))],
                  [label for label, _ in contestants], loc="outside lower center", ncols=min(4, len(contestants)))
    return figure


def groups(runs):
    """[(label, runs)] out of runs [(name, summary)]: those that differ in their seed alone belong together."""
    found, passing = {}, ("seed", "out", "resume", "overwrite", "init")
    for name, summary in runs:
        settings = {key: value for key, value in summary.get("settings", {"name": name}).items() if key not in passing}
        found.setdefault((summary.get("method", name), repr(settings)), []).append((name, summary))
    methods = [method for method, _ in found]
    lengths = [method + _steps_in(members[0][1]) for (method, _), members in found.items()]
    labels = []
    for method, longer, members in zip(methods, lengths, found.values()):   # a method with two settings: by steps, or
        label = (method if methods.count(method) == 1 else longer if lengths.count(longer) == 1     # by directory
                 else members[0][0])
        labels.append(label + (f" ({len(members)} seeds)" if len(members) > 1 else ""))
    return list(zip(labels, found.values()))


def _steps_in(summary):
    """", 1,000 steps" for a run of lsp.py with as many."""
    steps = summary.get("settings", {}).get("steps")
    return f", {steps:,} steps" if steps else ""


def _band(axis, summaries, panel, against, color):
    """The mean over runs of each of the panel's lines, and a band from the smallest to the largest."""
    for key in panel.lines:
        curves = [points for summary in summaries if (points := _points(summary, key, panel.logged, against))]
        if not curves:
            continue
        if len({len(points) for points in curves}) > 1:             # runs of different lengths share no mean
            for points in curves:
                axis.plot(*zip(*points), color=color, lw=1)
            continue
        x = [sum(at for at, _ in column) / len(column) for column in zip(*curves)]
        values = [[value for _, value in column] for column in zip(*curves)]
        axis.plot(x, [sum(column) / len(column) for column in values], color=color, lw=1.8,
                  marker=None if panel.logged or len(x) > 25 else "o", ms=3)
        axis.fill_between(x, list(map(min, values)), list(map(max, values)), color=color, alpha=0.2, lw=0)


def _points(summary, key, logged, against):
    """[(x, y)] of one run's key. What is logged at every step is averaged over at most 40 stretches: a line, and no
    cloud."""
    rows = summary.get("metrics", []) if logged else _iterates(summary)
    clock = _clocks(summary)[against] or _clocks(summary)["steps"]
    points = [(at, row[key]) for at, row in zip(clock[logged], rows) if row.get(key) is not None]
    width = math.ceil(len(points) / 40) if logged else 1
    stretches = [points[i:i + width] for i in range(0, len(points), max(1, width))]
    return [tuple(sum(each) / len(stretch) for each in zip(*stretch)) for stretch in stretches]


def _iterates(summary):
    """The evaluations of the base and of what became of it: not the row of the base decoded greedily."""
    return [row for row in summary["evaluations"] if row["name"] != "base, greedy"]


def _number_in(row):
    return 0 if row["name"] == "base" else int(row["name"].split()[-1])             # "iteration 2", "step 100"


def _line(axis, x, rows, key, **style):
    """One key of the rows over x, with error bars where the rows hold them; rows without the key are left out."""
    points = [(at, row[key], row.get(key + "_se")) for at, row in zip(x, rows) if row.get(key) is not None]
    if points:
        x, y, error = zip(*points)
        axis.errorbar(x, y, None if None in error else error, capsize=3, elinewidth=0.8, lw=1.8, marker="o", ms=4,
                      **style)


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


def _worth(plt, contestants, kind="ordinary"):
    """A curve over D for GRPO on D distinct queries, bands for everybody else. On few queries fewer steps than a
    panel's are enough: of several numbers of steps the largest that it has room for counts. Raises UserError for two
    contestants on one D with as many steps."""
    everybody = [(label, s, *figures[kind]) for label, (s, figures) in contestants.items()]
    everybody.sort(key=lambda each: each[1]["steps"])
    places = [(s["train_prompts"], s["steps"]) for _, s, *_ in everybody if s["train_prompts"]]
    for D, count in places:
        if places.count((D, count)) > 1:
            raise run.UserError(f"--picture has one point for D = {D} at {count} steps, and two contestants for it; "
                                "give runs of one of them")
    bands = [each for each in everybody if not each[1]["train_prompts"]]
    bands = [(label.replace(_steps_in({"settings": s}), ""), s, *rest) for label, s, *rest in bands]
    names = sorted({label.split(" (")[0] for label, *_ in bands})               # without the number of seeds
    colors = {label: f"C{1 + names.index(label.split(' (')[0])}" for label, *_ in bands}
    steps = sorted({s["steps"] for _, s, *_ in bands or everybody})
    figure, axes = plt.subplots(1, len(steps), figsize=(WIDTH, 4.2), layout="constrained", sharey=True, squeeze=False)
    for axis, count in zip(axes[0], steps):
        found = {s["train_prompts"]: (mean, error) for _, s, mean, error in everybody
                 if s["train_prompts"] and s["steps"] <= count}
        if found:
            x, y, error = zip(*((D, *found[D]) for D in sorted(found)))
            axis.errorbar(x, y, error, color="C0", marker="o", ms=4, lw=1.8, capsize=3, label="GRPO on D queries")
            axis.set_xscale("log", base=4)
            axis.set_xticks(x, [f"{D:,}" for D in x])
        for label, _, mean, error in sorted((each for each in bands if each[1]["steps"] == count), key=lambda e: e[0]):
            axis.axhspan(mean - error, mean + error, color=colors[label], alpha=0.15, lw=0)
            axis.axhline(mean, color=colors[label], lw=1.5, label=label)
        axis.set(title=f"at most {count:,} steps", xlabel="distinct queries D, used again and again")
        axis.legend(loc="lower right")
    axes[0][0].set_ylabel("answered exactly (greedy), ± standard error")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# the intransitive world, and cross-play


def _triangles(plt, runs):
    """The simplex of styles: every iterate from the start on, the running average, and the Nash mixture."""
    wide = 2 if len(runs) == 4 else min(3, len(runs))
    tall = math.ceil(len(runs) / wide)
    figure, axes = plt.subplots(tall, wide, figsize=(WIDTH if wide > 1 else 5, 2.9 * tall + 0.7), squeeze=False,
                                layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, summary) in zip(axes.flat, runs):
        played, exact = winrate.played_styles(summary["evaluations"]), winrate.exact_styles(summary)
        label = f"{summary['method']}, {len(played) - 1} iterations"
        _triangle(axis, played @ CORNERS, None if exact is None else exact @ CORNERS)
        axis.set_title(label if [s["method"] for _, s in runs].count(summary["method"]) == 1 else f"{name}: {label}")
    handles = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, 1 + wide),
                  frameon=False)
    return figure


def _triangle(axis, played, exact):
    """One run's path in the plane: played [T + 1, 2]; exact [T, 2], the same without sampling and regression."""
    count = torch.arange(1, len(played) + 1)[:, None]
    axis.plot(*CORNERS[[0, 1, 2, 0]].T, color="black", lw=0.8)
    axis.plot(*played.T, "o-", ms=2.5, lw=0.8, color="C0", alpha=0.8, label="iterates")
    for i in range(0, len(played) - 1, max(1, len(played) // 8)):              # which way it goes
        if (played[i + 1] - played[i]).norm() > 0.03:                           # a shorter arrow is all head
            axis.annotate("", played[i + 1].tolist(), played[i].tolist(),
                          arrowprops={"arrowstyle": "-|>", "color": "C0", "lw": 0.8, "mutation_scale": 9})
    axis.plot(*(played.cumsum(0) / count).T, "-", lw=2.2, color="C3", label="average so far")
    if exact is not None:
        axis.plot(*(exact.cumsum(0) / count[:len(exact)]).T, "--", lw=1.4, color="black",
                  label="average, exact updates")
    axis.plot(*played[0].tolist(), "s", ms=7, mfc="white", mec="black", label="start")
    nash = torch.tensor(world.NASH_STYLES, dtype=torch.float64) @ CORNERS
    axis.plot(*nash.tolist(), "*", ms=14, color="C2", label="Nash equilibrium")
    for corner, text, shift in zip(CORNERS.tolist(), ("style 0", "style 1", "style 2"), ((0, -13), (0, -13), (0, 9))):
        axis.annotate(text, corner, shift, textcoords="offset points", ha="center")
    axis.set(aspect="equal", xlim=(-0.16, 1.16), ylim=(-0.16, 1.0))


def _heat_map(plt, figures):
    names, n, P = figures["players"], len(figures["players"]), torch.tensor(figures["payoff"])
    size, spread = max(3.6, 0.8 * n), max(0.1, float((P - 0.5).abs().max()))
    figure, (left, right) = plt.subplots(1, 2, figsize=(size + 5, size + 1), layout="constrained", sharey=True,
                                         width_ratios=(size, 2))
    image = left.imshow(figures["payoff"], cmap="RdBu", vmin=0.5 - spread, vmax=0.5 + spread)
    for i, j in itertools.product(range(n), repeat=2):
        error = f"\n±{figures['payoff_se'][i][j]:.2f}" if i != j else ""
        left.text(j, i, f"{P[i, j]:.2f}{error}", ha="center", va="center", fontsize=9,
                  color="white" if abs(P[i, j] - 0.5) > 0.6 * spread else "black")
    left.set_xticks(range(n), names, rotation=30, ha="right")
    left.set_yticks(range(n), names)
    left.grid(False)
    left.set_title(f"how often the row beats the column\n{figures['prompts']} prompts, judge {figures['judge']}, "
                   "± 1 s.e.")
    figure.colorbar(image, ax=left, shrink=0.8)
    right.barh(range(n), figures["nash"], color="C2", height=0.5)
    for i, (share, lost) in enumerate(zip(figures["nash"], figures["exploitability"])):
        right.text(share + 0.03, i, f"{lost:.3f}", va="center", fontsize=9)
    right.set(xlim=(0, 1.35), xticks=(0, 0.5, 1))
    right.set_title("share in the Nash mixture\nbeside it: exploitability")
    right.tick_params(left=False, labelleft=False)
    return figure
