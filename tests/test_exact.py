"""eval.py exact: errors by hand, early stopping on validation, paired differences, the intransitive world; harder kinds
of queries."""

import doctest
import json
import os
import shutil

import pytest
import torch

import eval as evaluation
import lsp
import plots
import rollout
import winrate
import world
from benchmarks import exact
from chat import load_checkpoint
from conftest import is_png
from run import UserError
from test_lsp import SMALL, argv

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_docstring_examples():
    assert doctest.testmod(exact).failed == 0


def runs(*rows):
    return [{"checkpoint": "step-1", "ordinary": torch.tensor(row, dtype=torch.float64)} for row in rows]


def test_a_paired_difference_by_hand():
    """What is hard for both cancels: on these queries the two differ by the same amount everywhere."""
    ours, theirs = runs([1, 1, 1, 0]), runs([1, 1, 0, 0])
    mean, error = exact.difference(ours, theirs, "ordinary")
    assert mean == 0.25 and error == pytest.approx((0.25 / 4) ** 0.5)           # var of (0, 0, 1, 0) = .25
    assert exact.difference(ours, runs([1, 1, 1, 0]), "ordinary") == (0, 0)
    # seeds: two runs at 3/4 and 1/4 add their own variance, .125, halved
    mean, error = exact.difference(runs([1, 1, 1, 0], [1, 0, 0, 0]), theirs, "ordinary")
    by_query, by_seed, together = torch.tensor([0, -.5, .5, 0]).var() / 4, 0.125 / 2, 4 * 0.25 ** 2 * 2 / 3 / 8
    assert mean == 0.0 and error == pytest.approx((by_query + by_seed - together) ** 0.5)


@pytest.mark.parametrize("of_seed, of_side, queries", [(0.3, 0.0, 400), (0.0, 1.5, 30)])
def test_the_error_is_what_repetitions_show(of_seed, of_side, queries):
    """400 contests of five seeds, in which seeds differ, or what a side finds hard: there the queries are what varies.
    The claimed variances are the one found (its own error: 7 %), and without the seeds' or the queries' part not."""
    generator = torch.Generator().manual_seed(0)

    def normal(size):
        return torch.randn(size, generator=generator)

    found, claimed = [], []
    for _ in range(400):
        easy = normal(queries)                                                              # for both sides
        sides = []
        for _ in range(2):
            own = easy + of_side * normal(queries)
            sides.append([{"ordinary": (own + of_seed * normal(1) + 0.5 * normal(queries) > 0).double()}
                          for _ in range(5)])
        mean, error = exact.difference(*sides, "ordinary")
        found.append(mean)
        claimed.append(error ** 2)
    assert 0.85 < sum(claimed) / 400 / float(torch.tensor(found).var()) < 1.2


def test_a_run_is_never_counted_twice(two_runs, capsys):
    evaluation.main(["exact", "out/a", "out/a/", os.path.abspath("out/a"), "out/b", "--vs", "out/b/", "--count", "20",
                     "--harder", "0"])
    said = capsys.readouterr().out
    assert "| lsp | 1 |" in said and "| lsp, frozen Challenger | 1 |" in said and said.count(" minus ") == 1
    with pytest.raises(UserError, match="more than one contestant"):
        evaluation.main(["exact", "out/a", "--vs", "out/a,out/b"])


def test_runs_that_differ_in_their_own_test_queries_are_one_contestant(two_runs, capsys):
    """For exact takes its own."""
    shutil.copytree("out/a", "out/c")
    summary = json.load(open("out/c/summary.json"))
    summary["settings"] |= {"seed": 7, "test_prompts": 3}
    json.dump(summary, open("out/c/summary.json", "w"))
    evaluation.main(["exact", "out/a", "out/c", "--count", "20", "--harder", "0"])
    assert "| lsp (2 seeds) | 2 |" in capsys.readouterr().out


def test_a_run_that_has_not_ended_is_no_figure(two_runs):
    summary = json.load(open("out/a/summary.json"))
    summary["settings"]["steps"] += 2
    json.dump(summary, open("out/a/summary.json", "w"))
    with pytest.raises(UserError, match="out/a has not ended: its last evaluation is step 4 of 6; finish it"):
        evaluation.main(["exact", "out/a"])


def test_harder_kinds_of_queries():
    spoken, kinds = world.OPERATIONS, world.OPERATIONS.harder
    assert list(kinds) == ["3 ops", "4 ops", "weak ops"]
    for kind in kinds:
        queries = spoken.queries("test", 200, kind=kind)
        parsed = list(map(spoken.parse, queries))
        assert len(set(queries)) == 200 and {world.split(q) for q in queries} == {"test"} and all(parsed)
        if kind == "weak ops":
            assert {op for ops, _ in parsed for op in ops} == set(world.MISREAD)
            assert {len(word) for _, word in parsed} == {4, 5} and {len(ops) for ops, _ in parsed} == {1, 2, 3}
        else:
            assert {len(ops) for ops, _ in parsed} == {int(kind[0])}
    assert spoken.queries("test", 50) == spoken.queries("test", 60)[:50]


@pytest.fixture(scope="module")
def made(base, quick_module, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "out"
    for name, more in (("a", {}), ("b", dict(challenger="frozen"))):
        lsp.main(argv(model=base, out=out / name, **SMALL | more))
    return out


@pytest.fixture
def two_runs(made):
    shutil.copytree(made, "out")


def test_the_table_of_runs(two_runs, capsys):
    evaluation.main(["exact", "out/a", "--vs", "out/b", "--count", "60", "--harder", "20", "--stop"])
    said = capsys.readouterr().out
    assert "| | runs | checkpoint | ordinary | 3 ops | 4 ops | weak ops |" in said
    assert "| lsp | 1 | step-" in said and "lsp minus lsp, frozen Challenger: ordinary " in said
    known = json.load(open("out/a/exact.json"))
    assert {key.split()[2] for key in known} == {"validation", "test"}
    assert all(set(bits) <= set("01") for bits in known.values())
    # the checkpoint that is best on validation queries, the first of equals, and only that one meets test queries
    rates = {key.split()[0]: bits.count("1") for key, bits in known.items() if " validation " in key}
    best = max(rates, key=rates.get)
    assert {key.split()[0] for key in known if " test " in key} == {best}


def test_validation_looks_at_nothing_else(two_runs, capsys):
    evaluation.main(["exact", "out/a", "out/b", "--part", "validation", "--count", "40", "--harder", "0", "--stop"])
    for name in ("a", "b"):
        assert not any(" test " in key for key in json.load(open(f"out/{name}/exact.json")))
    assert "| lsp, frozen Challenger | 1 | step-" in capsys.readouterr().out


def test_nothing_is_decoded_twice(two_runs, monkeypatch, capsys):
    ask = ["exact", "out/a", "--count", "40", "--harder", "0"]
    evaluation.main(ask)
    first = capsys.readouterr().out
    monkeypatch.setattr(winrate, "answer", None)
    evaluation.main(ask)
    assert capsys.readouterr().out == first


def test_the_measure_is_the_tables(two_runs, capsys):
    """The same queries and the same decoding as in the run's own table."""
    evaluation.main(["exact", "out/a", "--count", "20", "--harder", "20"])
    row = json.load(open("out/a/summary.json"))["evaluations"][-1]
    assert f"{row['accuracy_greedy']:.3f} ±" in capsys.readouterr().out
    known = json.load(open("out/a/exact.json"))
    for kind, share in row["harder"].items():
        bits, = (bits for key, bits in known.items() if key.startswith("step-4 ") and f" test {kind} 20" in key)
        assert bits.count("1") / 20 == share


@pytest.mark.slow
@pytest.mark.pictures
def test_the_picture_of_what_data_free_play_is_worth(base, capsys):
    for D in (4, 16):
        lsp.main(argv(model=base, out=f"out/d{D}", mode="grpo", train_prompts=D, **SMALL))
    lsp.main(argv(model=base, out="out/free", **SMALL))
    evaluation.main(["exact", "out/d4", "out/d16", "out/free", "--count", "40", "--harder", "0",
                     "--picture", "worth.png"])
    assert is_png("worth.png")


def test_on_few_queries_fewer_steps_are_enough():
    """A panel for each number of steps that data-free play took; for each D the run with most steps that fits."""
    import matplotlib.pyplot as plt
    runs = {f"D {D}, {steps}": (dict(train_prompts=D, steps=steps), {"ordinary": (rate, 0.01)}) for D, steps, rate in (
        (16, 75, 0.6), (64, 1000, 0.7), (64, 120, 0.65), (256, 200, 0.68))}
    runs |= {f"free {steps}": (dict(train_prompts=None, steps=steps), {"ordinary": (0.8, 0.01)}) for steps in (200, 1000)}
    figure = plots._worth(plt, runs)
    shown = {axis.get_title(): [line.get_xydata().tolist() for line in axis.get_lines()[:1]] for axis in figure.axes}
    plt.close(figure)
    assert shown == {"at most 200 steps": [[[16, 0.6], [64, 0.65], [256, 0.68]]],
                     "at most 1,000 steps": [[[16, 0.6], [64, 0.7], [256, 0.68]]]}


@pytest.mark.parametrize("words, says", [
    ([], "needs run directories"), (["none"], "none/summary.json does not exist"),
    (["out/a", "--vs", "gone"], "gone/summary.json does not exist"),
    (["out/a", "--last", "3"], "--last does nothing in --world operations")])
def test_bad_input(words, says, two_runs):
    with pytest.raises(UserError, match=says):
        evaluation.main(["exact", *words])


def test_the_last_iterates_by_hand(monkeypatch):
    """Two seeds of two iterates each, and one at the equilibrium. Against all of style 0 the best response, style 1,
    wins P(1 beats 0)."""
    shares = {("a", "iter-2"): (1.0, 0.0, 0.0), ("a", "iter-3"): world.NASH_STYLES,
              ("b", "iter-2"): world.NASH_STYLES, ("b", "iter-3"): world.NASH_STYLES}
    monkeypatch.setattr(exact, "checkpoints", lambda path: ["iter-1", "iter-2", "iter-3"])
    monkeypatch.setattr(exact, "iterate_styles", lambda path, name, summary, args: torch.tensor(
        shares[path, name], dtype=torch.float64))
    text = exact.style_rows([("two", [("a", {}), ("b", {})]), ("one", [("b", {})])], exact.ExactSettings(last=2))
    best = max(row[0] for row in world.STYLES)
    away = float((torch.tensor([1.0, 0, 0]) - torch.tensor(world.NASH_STYLES)).norm())
    mean, worst = (best / 2 + 0.25 + 0.5) / 2, (best + 0.5) / 2
    assert text.splitlines()[2] == (
        f"| two | 2 | {mean:.3f} ±{(best - 0.5) / 4:.3f} | {worst:.3f} ±{(best - 0.5) / 2:.3f} | "
        f"{away / 4:.3f} ±{away / 4:.3f} |")
    assert text.splitlines()[3] == "| one | 1 | 0.500 | 0.500 | 0.000 |"


def test_styles_are_those_of_the_checkpoint(circle, monkeypatch):
    """As one counts them oneself; the second time they are read, unless the queries are others."""
    summary, args = {"settings": {"world": "intransitive"}}, exact.ExactSettings(count=30)
    os.makedirs("out")
    shutil.copytree(circle, "out/iter-1")
    found = exact.iterate_styles("out", "iter-1", summary, args)
    net, chat = load_checkpoint("out/iter-1", "cpu", torch.float32)
    ids = chat.encode_all(world.INTRANSITIVE.queries("test", 30), 0, 24)
    answers = rollout.generate(net, ids, 1, 24, stop_ids=chat.stop_ids, seeds=0)
    assert found.tolist() == world.style_shares([chat.decode(tokens) for tokens, in answers.tokens])
    assert 0 < found.max() < 1
    monkeypatch.setattr(winrate, "answer", None)
    assert exact.iterate_styles("out", "iter-1", summary, args).tolist() == found.tolist()
    monkeypatch.setattr(exact, "queries_of", lambda *names: ("copy:ab",))
    with pytest.raises(TypeError):
        exact.iterate_styles("out", "iter-1", summary, args)


def test_harder_does_nothing_where_there_are_styles(monkeypatch):
    contestants = [("sppo", [("out", {"settings": {"world": "intransitive"}})])]
    with pytest.raises(UserError, match="--harder does nothing in --world intransitive"):
        exact.check_fit(contestants, exact.ExactSettings(harder=5))


def test_two_contestants_for_one_point_of_the_picture():
    import matplotlib.pyplot as plt
    one = dict(train_prompts=16, steps=75), {"ordinary": (0.6, 0.01)}
    with pytest.raises(UserError, match="one point for D = 16 at 75 steps, and two contestants"):
        plots._worth(plt, {"lr 1": one, "lr 2": one})


def test_runs_of_no_embedded_world(two_runs):
    summary = json.load(open("out/a/summary.json"))
    json.dump(summary | {"settings": summary["settings"] | {"world": ""}}, open("out/a/summary.json", "w"))
    with pytest.raises(UserError, match="no embedded world"):
        evaluation.main(["exact", "out/a"])
    os.remove("out/b/step-2/model.safetensors")
    os.rename("out/b/step-2", "out/b/other")
    os.rename("out/b/step-4", "out/b/another")
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluation.main(["exact", "out/b"])
