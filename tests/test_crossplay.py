"""Cross-play: Nash mixtures of known games, payoffs and cycles by hand, the command; and pictures of several runs."""

import json
import os
import shutil

import pytest
import torch

import eval
import files
import games
import model
import prefmodel
import run
import winrate
import world
from chat import load_checkpoint
from conftest import Killed
from run import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

ROCK = [[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]


# ---------------------------------------------------------------------------------------------------------------------
# games


@pytest.mark.parametrize("P, mixture", [
    (ROCK, [1 / 3, 1 / 3, 1 / 3]), (world.STYLES, [3 / 9, 2 / 9, 4 / 9]),
    ([[0.5, 0.6], [0.4, 0.5]], [1, 0]), ([[0.5, 0.2, 0.9], [0.8, 0.5, 0.6], [0.1, 0.4, 0.5]], [0, 1, 0]),
    ([[0.5, 1.0, 0.4], [0.0, 0.5, 1.0], [0.6, 0.0, 0.5]], [5 / 11, 1 / 11, 5 / 11]),    # P v = 1/2: solved by hand
    ([[0.5, 0.5], [0.5, 0.5]], [0.5, 0.5]), ([[0.5]], [1.0])])
def test_nash_of_known_games(P, mixture):
    found = games.nash(P, 1e-6)
    assert games.duality_gap(P, found) <= 1e-6 and float(found.sum()) == pytest.approx(1)
    assert found.tolist() == pytest.approx(mixture, abs=1e-3)
    assert games.nash(P).tolist() == pytest.approx(mixture, abs=0.01)


def test_a_dominated_player_gets_nothing():
    """STYLES with a fourth player that loses a little more than style 0 to everybody: the others play as if alone."""
    P = torch.full((4, 4), 0.5, dtype=torch.float64)
    P[:3, :3] = torch.tensor(world.STYLES)
    P[3, :3] = P[0, :3] - 0.05
    P[:3, 3] = 1 - P[3, :3]
    assert games.nash(P, 1e-6).tolist() == pytest.approx([3 / 9, 2 / 9, 4 / 9, 0], abs=1e-3)


def test_the_gap_is_reached_in_games_of_any_size():
    generator = torch.Generator().manual_seed(0)
    for n in (2, 6, 20):
        for hard in (False, True):
            U = torch.rand(n, n, generator=generator, dtype=torch.float64)
            upper = (U.round() if hard else U).triu(1)
            P = upper + (1 - upper.T).tril(-1) + torch.eye(n) / 2
            assert games.duality_gap(P, games.nash(P, 1e-3)) <= 1e-3


def test_cycles_need_every_step():
    """0 beats 1 beats 2 beats 0; 3 loses to all. A step within two errors breaks it; so does a tie."""
    P = torch.full((4, 4), 0.5)
    for winner, loser in ((0, 1), (1, 2), (2, 0), (0, 3), (1, 3), (2, 3)):
        P[winner, loser], P[loser, winner] = 0.6, 0.4
    errors = torch.full((4, 4), 0.049)
    assert games.cycles(P, errors) == [(0, 1, 2)] and games.cycles(P, errors + 0.002) == []
    assert games.cycles(P.T, errors) == [(0, 2, 1)]
    errors[1, 2] = errors[2, 1] = 0.06
    assert games.cycles(P, errors) == [] and games.cycles(torch.full((3, 3), 0.5), torch.zeros(3, 3)) == []


class Longer:
    name = "longer"

    def preference(self, prompts, responses):
        return prefmodel.bradley_terry(torch.tensor([[float(len(r)) for r in row] for row in responses]))


def test_payoffs_by_hand():
    """Two prompts: a beats b once and ties once; c loses to both always."""
    answers = [[["aaa"], ["aa"]], [["aa"], ["aa"]], [["a"], ["a"]]]
    results = [winrate.mean_and_error(winrate.verdicts(Longer(), ["x", "y"], answers[i], answers[j]))
               for i, j in ((0, 1), (0, 2), (1, 2))]
    P, errors = games.payoffs(3, results)
    assert P.tolist() == [[0.5, 0.75, 1.0], [0.25, 0.5, 1.0], [0.0, 0.0, 0.5]]
    assert errors[0, 1] == errors[1, 0] == 0.25 and errors[2].tolist() == [0, 0, 0]     # std .3536 / sqrt(2)
    figures = games.cross_figures(["a", "b", "c"], P, errors)
    assert figures["exploitability"] == [0.0, 0.25, 0.5] and figures["nash"][0] > 0.99 and figures["cycles"] == []
    assert "no cycle of three" in games.cross_table(figures)


def test_cross_table_names_cycles():
    names = ["rock", "paper", "a longer name for scissors"]
    figures = games.cross_figures(names, torch.tensor(ROCK), torch.zeros(3, 3))
    text = games.cross_table(figures)
    assert "cycle: rock beats paper beats a longer name for scissors beats rock" in text
    head, rock = text.splitlines()[:2]
    assert len(head) == len(rock) and rock.split()[-2:] == ["0.333", "0.500"]


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def ruined(base, tmp_path_factory):
    """The base with noise on its matrices: another player, and a worse one."""
    path = str(tmp_path_factory.mktemp("ruined") / "checkpoint")
    shutil.copytree(base, path)
    net, chat = load_checkpoint(base, "cpu", torch.float32)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.dim() == 2:
                weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    net.save_pretrained(path, chat.tokenizer)
    return path


def is_png(path):
    with open(path, "rb") as f:
        return f.read(8) == b"\x89PNG\r\n\x1a\n" and os.path.getsize(path) > 5000


def test_crossplay_on_the_embedded_world(base, ruined, capsys, monkeypatch):
    """Each checkpoint is loaded once. The matrix is `verdicts` on the answers; a copy is even with its original."""
    shutil.copytree(base, "twin")
    loaded, real = [], model.Transformer.from_pretrained
    monkeypatch.setattr(model.Transformer, "from_pretrained",
                        lambda path, *rest: (loaded.append(path), real(path, *rest))[1])
    eval.main(["crossplay", base, ruined, "twin", "--count", "150", "--device", "cpu", "--out", "x/y", "--json"])
    row = json.loads(capsys.readouterr().out)
    assert loaded == [base, ruined, "twin"]
    assert row == files.read_json("x/y/crossplay.json") and is_png("x/y/crossplay.png")
    P, errors = torch.tensor(row["payoff"]), torch.tensor(row["payoff_se"])
    assert (P + P.T - 1).abs().max() < 1e-6 and P.diagonal().tolist() == [0.5] * 3 and row["prompts"] == 150
    assert abs(P[0, 2] - 0.5) < 4 * errors[0, 2] and P[0, 1] > 0.5 + 3 * errors[0, 1] > 0.5
    assert row["players"][0] == "base" and row["players"][2] == "twin" and row["nash"][1] < 0.01
    assert row["duality_gap"] <= 1e-4 and row["exploitability"][1] == pytest.approx(max(P[0, 1], P[2, 1]) - 0.5)

    prompts, sampling = world.OPERATIONS.queries("test", 150), winrate.Sampling(24)
    answers = []
    for i, path in enumerate((base, ruined)):
        net, chat = load_checkpoint(path, "cpu", torch.float32)
        ids = chat.encode_all(prompts, 0, 24)
        answers.append(winrate.answer(net, chat, ids, 1, sampling, run.stream(0, "crossplay", i))[0])
    rate, error = winrate.mean_and_error(winrate.verdicts(prefmodel.load("oracle"), prompts, *answers))
    assert (row["payoff"][0][1], row["payoff_se"][0][1]) == (pytest.approx(rate), pytest.approx(error))


@pytest.mark.slow
def test_crossplay_goes_on_where_it_was_killed(base, ruined, dies_in, monkeypatch, capsys):
    """It dies while the second pair is judged: no checkpoint answers again, and the first pair is not judged again."""
    shutil.copytree(base, "twin")
    argv = ["crossplay", base, ruined, "twin", "--count", "20", "--device", "cpu", "--json"]
    eval.main([*argv, "--out", "whole"])
    whole = json.loads(capsys.readouterr().out)
    with monkeypatch.context():
        calls = dies_in(winrate, "verdicts", 2)
        with pytest.raises(Killed):
            eval.main([*argv, "--out", "killed"])
    monkeypatch.setattr(winrate, "answer", None)
    eval.main([*argv, "--out", "killed"])
    assert json.loads(capsys.readouterr().out) == whole
    assert len(calls) == 4                                              # one, one that died, two that were left
    eval.main([*argv, "--out", "killed"])
    assert len(calls) == 4 and json.loads(capsys.readouterr().out) == whole
    with pytest.raises(UserError, match="--out"):
        eval.main([*argv, "--out", "killed", "--seed", "1"])


def test_crossplay_with_pairrm(llama3, pairrm, prompts_file, capsys):
    """The same basename twice: the names grow until they differ."""
    for name in ("a", "b"):
        shutil.copytree(llama3, f"{name}/checkpoint")
    eval.main(["crossplay", "a/checkpoint", "b/checkpoint/", "--prompts", prompts_file, "--judge", f"pairrm:{pairrm}",
               "--count", "6", "--max-new-tokens", "8", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "2 checkpoints, 6 prompts, judge pairrm" in text and "a/checkpoint" in text and is_png(
        "out/crossplay/crossplay.png")


@pytest.mark.parametrize("argv, says", [
    ("", "two checkpoints or more"), ("{base}", "two checkpoints or more"), ("--count 5 {base} {base}", None),
    ("{base} {base}", "one checkpoint twice"), ("{base} nowhere", "nowhere"), ("{base} {llama3}", "does not speak"),
    ("{base} {llama3} --judge nobody", "--judge nobody"), ("{base} {llama3} --count 0", "--count 0"),
    ("{base} {ruined} --count 5 --out file/x", "--out file/x/crossplay.json cannot be written")])
def test_bad_input(base, llama3, ruined, argv, says):
    open("file", "w").close()
    words = argv.format(base=base, llama3=llama3, ruined=ruined).split() + ["--device", "cpu"] * bool(argv)
    with pytest.raises(UserError if says else SystemExit, match=says) as error:
        eval.main(["crossplay", *words])
    assert "\n" not in str(error.value)
