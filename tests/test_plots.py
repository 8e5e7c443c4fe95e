"""plots.py: a picture for every kind of run."""

import os

import pytest

import plots
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
