"""flags.py: the command line out of a dataclass, its bounds, presets and help."""

import dataclasses
import re

import pytest

import flags
import run
from flags import UserError, flag


@dataclasses.dataclass
class Settings:
    rate: float = flag(0.5, "a share, 50 % unless given")
    steps: int = flag(3, "how many")
    limit: int | None = flag(None, "decided at set-up")
    kind: str = flag("a", "which", ("a", "b"))
    batch_size: int = flag(4, "prompts")
    shuffle: bool = flag(True, "in random order")
    resume: bool = flag(False, "go on")
    overwrite: bool = flag(False, "replace")

def parse(*argv):
    return flags.parse(Settings, list(argv), "what it does")

def test_defaults_and_types():
    assert parse() == Settings()
    s = parse("--rate", "1e-3", "--steps=7", "--limit", "2", "--kind", "b", "--batch-size", "8", "--no-shuffle",
              "--resume")
    assert s == Settings(0.001, 7, 2, "b", 8, False, True) and type(s.limit) is int and type(s.rate) is float
    assert parse("--rate", "2").rate == 2.0


@pytest.mark.parametrize("argv", [["--nonsense", "1"], ["--step", "1"], ["--batch_size", "1"], ["--steps", "1.5"],
                                  ["--rate", "x"],
                                  ["--limit", "None"], ["--kind", "c"], ["stray"], ["--steps"]])
def test_what_cannot_be_parsed_ends_with_status_2(argv, capsys):
    """--step guards against argparse's abbreviations: a misspelt flag would silently set another one."""
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("error: ") == 1 and argv[0] in error


def test_help_lists_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0 and "what it does" in text and "50 % unless given [0.5]" in " ".join(text.split())
    for field in dataclasses.fields(Settings):
        assert "--" + field.name.replace("_", "-") in text and field.metadata["help"] in " ".join(text.split())


@dataclasses.dataclass
class WithPreset(Settings):
    preset: str = flag("", "several settings at once", ("fast", "slow"))


@dataclasses.dataclass
class Bounded:
    """Flags with bounds: one of each kind."""
    model: str = flag("", "needed", needed=True)
    k: int = flag(5, "answers", at_least=2)
    lr: float | None = flag(None, "decided at set-up", above=0)
    top_p: float = flag(1.0, "nucleus", above=0, at_most=1)
    warmup: float = flag(0.1, "share", at_least=0, at_most=1)
    free: float = flag(0.0, "any finite number")


@pytest.mark.parametrize("settings, says", [
    ({}, "--model is needed and was not given; --help says what it is"), ({"k": 1}, "--k 1 must be at least 2"),
    ({"lr": 0.0}, "--lr 0.0 must be above 0"), ({"lr": -1e-3}, "--lr -0.001 must be above 0"),
    ({"lr": float("inf")}, "--lr inf must be a finite number"), ({"free": float("nan")}, "--free nan must be a finite"),
    ({"top_p": 0.0}, "--top-p 0.0 must be above 0 and at most 1"),
    ({"top_p": 1.5}, "--top-p 1.5 must be above 0 and at most 1"),
    ({"warmup": -0.1}, "--warmup -0.1 must be at least 0 and at most 1"), ({"warmup": float("nan")}, "--warmup nan")])
def test_a_number_outside_its_bounds_is_one_sentence(settings, says):
    given = {"model": "m", **settings} if settings else {}
    with pytest.raises(UserError, match=re.escape(says)):
        flags.check(Bounded(**given))
    words = [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value))]
    with pytest.raises(UserError, match=re.escape(says)):
        flags.parse(Bounded, words, "")


def test_numbers_at_their_bounds_pass():
    flags.check(Bounded("m", k=2, lr=1e-9, top_p=1.0, warmup=0.0, free=-7.0))
    flags.check(Bounded("m", lr=None, warmup=1.0))


@dataclasses.dataclass
class Derived(run.CommonSettings):
    """A script's flags: its own, and those that both scripts have."""
    rate: float | None = flag(None, "of learning", above=0)


def test_help_shows_what_a_flag_is_where_it_is_not_given(capsys):
    """Numbers stand once, in the tables of defaults; --help reads them from there. A script's own flags come first."""
    with pytest.raises(SystemExit):
        flags.parse(Derived, ["--help"], "", defaults={"here": {"rate": 0.5, "other": 1}, "there": {"rate": 2e-3}})
    text = " ".join(capsys.readouterr().out.split())
    assert "of learning [here 0.5, there 0.002]" in text and text.index("--rate") < text.index("--seed")


def test_a_flag_beside_a_preset_wins():
    """Whichever comes first, and also where it gives the default: the person who wrote it meant it."""
    def preset(*argv):
        return flags.parse(WithPreset, list(argv), "", {"fast": dict(steps=9, kind="b", shuffle=False, limit=4),
                                                      "slow": dict(rate=0.25)})

    assert preset() == WithPreset()
    assert preset("--preset", "fast") == WithPreset(steps=9, kind="b", shuffle=False, limit=4, preset="fast")
    assert preset("--preset", "slow", "--steps", "5") == WithPreset(rate=0.25, steps=5, preset="slow")
    for argv in (["--steps", "3", "--kind=a", "--shuffle", "--preset", "fast"],
                 ["--preset=fast", "--shuffle", "--kind", "a", "--steps", "3"]):
        assert preset(*argv) == WithPreset(limit=4, preset="fast")


def test_an_unknown_preset_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        flags.parse(WithPreset, ["--preset", "medium"], "", {"fast": {}, "slow": {}})
    error = capsys.readouterr().err
    assert end.value.code == 2 and "--preset" in error and "medium" in error and error.count("\n") == 1
