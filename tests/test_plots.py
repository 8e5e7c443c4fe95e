"""plots.py: a picture for every kind of run, and its lines."""

import json
import os

import pytest

import eval
import files
import plots
import run
from conftest import ROW, TRAINED, circle_summary, is_png
from run import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("oracle", [True, False])
def test_plot(oracle):
    blind = {} if oracle else {"accuracy_sampled": None, "accuracy_greedy": None}
    rows = [{**r, **blind} for r in (ROW, {**ROW, "name": "base, greedy"}, TRAINED)]
    plots.plot([("SPPO", {"evaluations": rows}), ("other", {"evaluations": rows[:1] + rows[2:]})], "curves.png")
    assert is_png("curves.png") and os.listdir(".") == ["curves.png"]


def test_plot_of_the_intransitive_world():
    """A triangle for each run; with runs of another world it would share no axis."""
    runs = [("sppo", circle_summary()), ("dpo", circle_summary("dpo"))]
    plots.plot(runs, "curves.png")
    assert is_png("curves.png")
    os.remove("curves.png")
    other = ("other", {"evaluations": [ROW, TRAINED]})
    for mixed in ([*runs, other], [other, *runs]):
        with pytest.raises(UserError, match="plot cannot put the intransitive world and another"):
            plots.plot(mixed, "curves.png")
    assert os.listdir(".") == []


# ---------------------------------------------------------------------------------------------------------------------
# one run and several

def sppo_run():
    """Two iterations of three and of two steps, with a validation row after each."""
    log = [{"iteration": t, "step": i, "logratio_w": 0.1, "logratio_l": -0.2} for t, n in ((1, 3), (2, 2))
           for i in range(1, n + 1)]
    log += [{"iteration": 2, "step": 2, "validation_win_rate": 0.6}]
    return {"evaluations": [ROW, {**ROW, "name": "base, greedy", "win_rate": 0.6}, {**ROW, "name": "iteration 1"},
                            {**ROW, "name": "iteration 2"}],
            "seconds": {"train": 8.0, "evaluate": 2.0, "total": 70.0}, "metrics": log}


def lsp_run():
    asked = {"malformed": 0.1, "ops": 1.5, "distinct": 0.9, "base_accuracy": 0.4}
    return {"evaluations": [ROW, {**ROW, "name": "step 2", **asked},
                            {**ROW, "name": "step 4", **asked, "base_accuracy": None}],
            "seconds": {"train": 8.0, "total": 9.0},
            "metrics": [{"step": i, "kl_solver": 0.1 * i, "kl_challenger": 0.0} for i in range(1, 5)]}


def test_clocks():
    """Gradient steps go on counting over iterations; seconds are the phases' sum, spread evenly, or a row's own."""
    assert plots._clocks(sppo_run()) == {"steps": {False: [0, 3, 5], True: [1, 2, 3, 4, 5, 5]},
                                        "seconds": {False: [0, 6, 10], True: [2, 4, 6, 8, 10, 10]}}
    assert plots._clocks(lsp_run())["steps"] == {False: [0, 2, 4], True: [1, 2, 3, 4]}
    bare = {"evaluations": sppo_run()["evaluations"]}
    assert plots._clocks(bare) == {"steps": {False: [0, 1, 2], True: []}, "seconds": None}
    timed = lsp_run()
    timed["evaluations"][1] = {**timed["evaluations"][1], "seconds": 7.5}
    assert plots._clocks(timed)["seconds"][False] == [0, 7.5, 8]


def panels(*summaries, against="steps"):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [(f"run {i}", s) for i, s in enumerate(summaries)]
    figure = plots._one_run(plt, runs) if len(runs) == 1 else plots._several(plt, runs, against)
    try:
        return [a.get_title() for a in figure.axes], figure
    finally:
        plt.close(figure)


def curves(axis, style="-"):
    return [line.get_xydata().tolist() for line in axis.get_lines() if line.get_linestyle() == style]


def test_a_picture_has_the_panels_that_its_runs_can_fill():
    blind = sppo_run()
    blind["evaluations"] = [{**r, "accuracy_sampled": None, "accuracy_greedy": None} for r in blind["evaluations"]]
    assert panels(sppo_run())[0] == [plots.ACCURACY.title, plots.WIN_RATE.title]
    assert panels(lsp_run())[0] == [plots.ACCURACY.title, plots.WIN_RATE.title, plots.CHALLENGER.title]
    assert panels(blind)[0] == [plots.LENGTH.title, plots.WIN_RATE.title]
    asked, learned = [plots.MALFORMED.title, plots.HARDNESS.title], [plots.HEAD_TO_HEAD.title, plots.LOG_RATIO.title]
    assert panels(sppo_run(), lsp_run())[0] == [plots.GREEDY.title, *asked]
    assert panels(sppo_run(), sppo_run())[0] == [plots.GREEDY.title, *learned]
    assert panels(blind, blind)[0] == [plots.LENGTHS.title, *learned]
    bare = [{"evaluations": s["evaluations"]} for s in (sppo_run(), sppo_run())]
    assert panels(*bare)[0] == [plots.GREEDY.title, plots.HEAD_TO_HEAD.title]           # no log


def test_a_control_line_belongs_to_the_curve_of_its_colour():
    """Samples are compared with what sharpening alone gets: the untrained base, greedy, under the same measure."""
    _, figure = panels(sppo_run())
    accuracy, rate = figure.axes
    for axis, level in ((accuracy, ROW["accuracy_greedy"]), (rate, 0.6)):
        dashed, = (line for line in axis.get_lines() if line.get_linestyle() == "--")
        sampled = [line for line in axis.get_lines() if line.get_color() == dashed.get_color() and line is not dashed]
        assert dashed.get_ydata()[0] == level and len(sampled) >= 1
    assert [[0, 0.25], [1, 0.25], [2, 0.25]] in curves(accuracy)            # the sampled accuracy, by iteration


def test_the_lines_of_a_comparison():
    _, figure = panels(sppo_run(), lsp_run())
    greedy, _, hard = figure.axes
    assert [[0, 0.375], [3, 0.375], [5, 0.375]] in curves(greedy)
    assert [[0, 0.375], [2, 0.375], [4, 0.375]] in curves(greedy)
    assert curves(hard) == [[[2, 0.4]]]                                     # None is left out
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["run 0", "run 1"]
    _, timed = panels(sppo_run(), lsp_run(), against="seconds")
    assert [[0, 0.375], [6, 0.375], [10, 0.375]] in curves(timed.axes[0])
    assert timed.axes[0].get_xlabel() == "seconds"


def seeds(method, levels, **settings):
    """Runs of one method that differ in their seed: greedy accuracy `level` at the last step."""
    runs = []
    for seed, level in enumerate(levels):
        one = lsp_run() | {"method": method, "settings": {"seed": seed, "out": f"{method}-{seed}", **settings}}
        one["evaluations"] = [*one["evaluations"][:-1], {**one["evaluations"][-1], "accuracy_greedy": level}]
        runs.append(one)
    return runs


def test_seeds_are_a_mean_and_a_band():
    _, figure = panels(*seeds("lsp", (0.5, 0.8)), *seeds("grpo", (0.9,)))
    greedy = figure.axes[0]
    assert [[0, 0.375], [2, 0.375], [4, pytest.approx(0.65)]] in curves(greedy)
    band, = (b for b in greedy.collections if b.get_paths()[0].vertices[:, 1].max() == pytest.approx(0.8))
    assert [4, 0.5] in band.get_paths()[0].vertices.tolist()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["lsp (2 seeds)", "grpo"]
    _, figure = panels(*seeds("lsp", (0.5, 0.8)), *seeds("lsp", (0.7,), lr=0.1))   # two settings: told apart by name
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["run 0 (2 seeds)", "run 2"]
    _, figure = panels(*seeds("lsp", (0.5, 0.8), steps=200), *seeds("lsp", (0.7,), steps=1000))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["lsp, 200 steps (2 seeds)", "lsp, 1,000 steps"]


def test_long_logs_are_averaged():
    log = [{"step": i + 1, "logratio_w": float(i % 2)} for i in range(1000)]
    points = plots._points({"evaluations": [ROW], "metrics": log}, "logratio_w", True, "steps")
    x, y = zip(*points)
    assert len(x) == 40 and list(y) == pytest.approx([0.5] * 40, abs=0.03) and x[0] == 13.0


def test_text_is_legible_at_the_width_of_a_readme_column():
    """900 pixels wide at 100 pixels an inch, and no text below 9 points."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(plots.STYLE):
        for draw in (lambda: plots._one_run(plt, [("a", lsp_run())]),
                     lambda: plots._several(plt, [("a", lsp_run()), ("b", sppo_run())], "steps"),
                     lambda: plots._triangles(plt, [(f"{i}", circle_summary(loss)) for i, loss in
                                                    enumerate(("sppo", "dpo", "ipo"))])):
            figure = draw()
            figure.draw_without_rendering()
            assert figure.get_size_inches()[0] == 9
            sizes = [text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()]
            assert min(sizes) >= 9
            edge = figure.bbox
            for title in (axis.title for axis in figure.axes if axis.get_title()):          # nothing is cropped
                box = title.get_window_extent()
                assert edge.x0 <= box.x0 and box.x1 <= edge.x1 and box.y1 <= edge.y1
            plt.close(figure)


def test_plot_command_reads_the_log(capsys):
    for name, summary in (("a", sppo_run()), ("b", lsp_run())):
        os.mkdir(name)
        log = summary.pop("metrics")
        files.write_json(f"{name}/summary.json", summary)
        with open(f"{name}/metrics.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in log)
    eval.main(["plot", "a", "b"])
    assert "wrote curves.png" in capsys.readouterr().out and is_png("curves.png")
    with open("b/metrics.jsonl", "a") as file:
        file.write('{"step": 5,')
    with pytest.raises(UserError, match="b/metrics.jsonl, line 5: malformed JSON"):
        eval.main(["plot", "a", "b"])
