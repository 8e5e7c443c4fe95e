"""Flags: the command line of a script out of one documented dataclass, with bounds that are checked before any work.

Each field is a flag, made by `flag`: its default, its help text and what it may be. `parse` turns a command line into
an instance. What a user gets wrong is a UserError, one sentence that names the flag and the remedy.
"""

import argparse
import dataclasses
import math
import sys
import textwrap
import types
import typing


class UserError(Exception):
    """A mistake that the user can mend. The message is one sentence that names the flag or file and the remedy."""


def flag(default, help, choices=None, at_least=None, above=None, at_most=None, needed=False):
    """One setting of a script's dataclass: its default, the help text (symbol, unit, source) that --help prints, and
    what it may be.

    choices: the allowed values. at_least, above, at_most: bounds of a number, which must be finite too. needed: the
    command cannot do without it, and its default ("") stands for "not given". `check` looks at all of these.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "needed": needed, **bounds})


def check(settings):
    """Compare every flag with the bounds that `flag` declared. None means "not given" and passes.
    Raises UserError, naming the flag, its value and what it may be.

    >>> @dataclasses.dataclass
    ... class Settings:
    ...     top_p: float = flag(1.0, "nucleus", above=0, at_most=1)
    >>> check(Settings(top_p=1.5))
    Traceback (most recent call last):
    flags.UserError: --top-p 1.5 must be above 0 and at most 1
    """
    for field in dataclasses.fields(settings):
        value, limits, name = getattr(settings, field.name), field.metadata, "--" + field.name.replace("_", "-")
        if limits.get("needed") and not value:
            raise UserError(f"{name} is needed and was not given; --help says what it is")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        bounds = {"at least": limits.get("at_least"), "above": limits.get("above"), "at most": limits.get("at_most")}
        kept = {"at least": lambda b: value >= b, "above": lambda b: value > b, "at most": lambda b: value <= b}
        bounds = {word: bound for word, bound in bounds.items() if bound is not None}
        if isinstance(value, int) and not -2**63 <= value < 2**63:
            raise UserError(f"{name} {value} must fit into 64 bits")
        if not math.isfinite(value):
            raise UserError(f"{name} {value} must be a finite number")
        if not all(kept[word](bound) for word, bound in bounds.items()):
            raise UserError(f"{name} {value} must be " + " and ".join(f"{w} {b:g}" for w, b in bounds.items()))


@dataclasses.dataclass
class NoSettings:
    """Of a command without flags."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one sentence, without the page of usage that argparse puts before it
        print(f"error: {brief(message)}; --help lists the flags", file=sys.stderr)
        sys.exit(2)


def brief(message):
    """A message of at most 300 characters, its middle left out where it is longer: a value may be as long as somebody
    likes, and the remedy stands at the end."""
    return message if len(message) <= 300 else f"{message[:140]} ... {message[-155:]}"


def parse(settings_class, argv, description, presets=None, defaults=None):
    """Turn `argv` into an instance of the dataclass `settings_class`, one flag per field.

    Field `batch_size` becomes --batch-size; a bool becomes --x / --no-x. An unknown flag, an abbreviation or a value of
    the wrong type ends the program with exit status 2. presets: what the flag --preset NAME sets, {name: {field:
    value}}; a flag that is given beside it wins. A settings class may say in COMMAND (no field) what the usage line
    calls the command. defaults: {where: {field: value}}, for --help alone: what a flag with default None becomes there.
    Raises UserError for a value outside its flag's bounds.
    """
    parser = _Parser(prog=getattr(settings_class, "COMMAND", None), description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter,
                     epilog="\n".join(f"--preset {name} is\n{_as_flags(v)}" for name, v in (presets or {}).items()))
    hints = typing.get_type_hints(settings_class)
    own = settings_class.__annotations__                    # a class's own flags come first, then those it inherits
    for field in sorted(dataclasses.fields(settings_class), key=lambda field: field.name not in own):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # "int | None": None means "decided at set-up"
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        name = "--" + field.name.replace("_", "-")
        help = field.metadata.get("help", "").replace("%", "%%")
        if field.default is not None and field.default != "":
            help += f" [{field.default}]"
        there = {where: values[field.name] for where, values in (defaults or {}).items() if field.name in values}
        if there:
            help += " [" + ", ".join(f"{where} {value}" for where, value in there.items()) + "]"
        if kind is bool:
            parser.add_argument(name, default=field.default, action=argparse.BooleanOptionalAction, help=help)
        else:
            parser.add_argument(name, default=field.default, type=kind, choices=field.metadata.get("choices"),
                                help=help, metavar=None if field.metadata.get("choices") else kind.__name__.upper())
    chosen = vars(parser.parse_args(argv))
    if presets and chosen["preset"]:
        parser.set_defaults(**presets[chosen["preset"]])
        chosen = vars(parser.parse_args(argv))
    settings = settings_class(**chosen)
    check(settings)
    return settings


def _as_flags(values):
    """{field: value} the way one would type it, for --help."""
    words = [f"--{'no-' * (value is False)}{name.replace('_', '-')}" + ("" if isinstance(value, bool) else f" {value}")
             for name, value in values.items()]
    return textwrap.fill(" ".join(words), 100, initial_indent="  ", subsequent_indent="  ", break_long_words=False,
                         break_on_hyphens=False)
