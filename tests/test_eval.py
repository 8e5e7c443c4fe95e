"""eval.py: the commands winrate, table and plot."""

import json
import os

import pytest

import eval
import files
import run
import winrate
import world
from conftest import ROW, TRAINED, is_png
from run import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")


# ---------------------------------------------------------------------------------------------------------------------
# the commands


def test_plot_command(capsys):
    for name in ("a", "b"):
        os.mkdir(name)
        files.write_json(f"{name}/summary.json", {"evaluations": [ROW, {**ROW, "name": "base, greedy"}, TRAINED]})
    eval.main(["plot", "a/"])
    assert "wrote a/curves.png" in capsys.readouterr().out and is_png("a/curves.png")
    eval.main(["plot", "a", "b"])
    assert "wrote curves.png" in capsys.readouterr().out and is_png("curves.png")


def test_winrate_command(base, capsys):
    eval.main(["winrate", "--model", base, "--vs", base, "--count", "60", "--device", "cpu", "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["prompts"] == 60 and abs(row["win_rate"] - 0.5) < 4 * row["win_rate_se"]
    assert row["win_rate_greedy"] == 0.5
    eval.main(["winrate", "--model", base, "--vs", base, "--count", "60", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "60 prompts, judge oracle" in text and f"{row['win_rate']:.3f} ±{row['win_rate_se']:.3f}" in text


def test_winrate_on_the_validation_queries(base, monkeypatch, capsys):
    """What settings are picked on: not the queries of the final table."""
    played, real = [], winrate.against
    monkeypatch.setattr(winrate, "against", lambda net, chat, prompts, *rest: (
        played.append(prompts), real(net, chat, prompts, *rest))[1])
    for part in ("validation", "test"):
        eval.main(["winrate", "--model", base, "--vs", base, "--count", "8", "--device", "cpu", "--part", part])
        assert played[-2:] == [world.OPERATIONS.queries(part, 8)] * 2
    assert not set(played[0]) & set(played[-1])


def test_winrate_with_a_prompts_file_and_pairrm(llama3, pairrm, prompts_file, capsys):
    eval.main(["winrate", "--model", llama3, "--vs", llama3, "--prompts", prompts_file, "--judge", f"pairrm:{pairrm}",
               "--count", "12",
               "--max-new-tokens", "8", "--device", "cpu", "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["prompts"] == 12 and row["accuracy_greedy"] is None and row["win_rate_greedy"] == 0.5
    assert 0 < row["mean_length"] <= 8


def test_the_oracle_takes_a_file_of_its_own_queries_and_no_other(base, capsys):
    """A run writes its test prompts to state/test.jsonl so that others can evaluate on the same."""
    command = ["winrate", "--model", base, "--vs", base, "--device", "cpu", "--prompts"]
    for name, prompts in (("own.txt", world.OPERATIONS.queries("test", 12)), ("other.txt", ["Name a prime."])):
        with open(name, "w") as file:
            file.write("\n".join(prompts))
    eval.main([*command, "own.txt"])
    assert "12 prompts, judge oracle" in capsys.readouterr().out
    with pytest.raises(UserError, match="--judge oracle knows only"):
        eval.main([*command, "other.txt"])


def test_help_and_unknown_commands(capsys):
    eval.main([])
    assert "eval.py winrate" in capsys.readouterr().out
    for argv in (["nonsense"], ["plot"], ["plot", "--flag"], ["plot", "nowhere"], ["winrate"],
                 ["winrate", "--model", "a"]):
        with pytest.raises(UserError) as error:
            eval.main(argv)
        assert "\n" not in str(error.value)
