"""Judgment files of MT-Bench and Arena-Hard: several of them behind one flag, by one judge, none counted twice; and the
table that their figures are printed as."""

import dataclasses
import re

import flags
import run
from chat import read_rows
from flags import flag


@dataclasses.dataclass
class JudgmentSettings:
    """Flags that `python eval.py mtbench` and `arena` share."""
    judgments: str = flag("", "the benchmark's model_judgment .jsonl by one judge; several as A B C after one "
                              "--judgments (needed)", needed=True)
    json: bool = flag(False, "print one JSON object a line, all the figures of a model and category")


def parse_with_files(settings_class, argv, description):
    """(settings, [path]): `flags.parse`, but --judgments may be followed by several files.

    A flag of flags.parse has one value, so the further ones are taken out of argv before it looks.
    """
    if argv.count("--judgments") > 1:
        raise run.UserError("--judgments is given twice; name all the files after one: --judgments A B C")
    words, further = [], []
    for word in argv:
        behind_a_file = words[-2:-1] == ["--judgments"]
        if behind_a_file and not word.startswith("--"):
            further.append(word)
        else:
            words.append(word)
    args = flags.parse(settings_class, words, description)
    return args, [args.judgments, *further]


def read_judgments(paths, fields):
    """[("FILE, line N", row)] of all the files; fields: {name: type or types} that every row must have, `judge` among
    them, a name or a list that begins with one. Raises UserError for rows without these, and for a second judge."""
    found, judges = [], set()
    for path in paths:
        for where, row in read_rows("--judgments", path, fields):
            judge = row["judge"]
            judges.add(str(judge[0] if isinstance(judge, list) and judge else judge))
            if len(judges) > 1:
                raise run.UserError(f"--judgments {path}, {where}: a second judge, {' beside '.join(sorted(judges))}; "
                                    "give the judgments of one judge at a time")
            found.append((f"{path}, {where}", row))
    return found


def group(rows, by, key):
    """{values of the columns `by`: its [(where, row)]}. Raises UserError for two rows that agree in `by` and in `key`,
    the columns that tell a group's rows apart: one of the two would count twice.

    >>> group([("a, line 1", {"model": "m", "turn": 1}), ("a, line 2", {"model": "m", "turn": 2})], ["model"], ["turn"])
    {('m',): [('a, line 1', {'model': 'm', 'turn': 1}), ('a, line 2', {'model': 'm', 'turn': 2})]}
    """
    groups, seen, columns = {}, set(), [*by, *key]
    for where, row in rows:
        this = tuple(row[name] for name in columns)
        if this in seen:
            raise run.UserError(f"--judgments {where}: a second judgment of {', '.join(map(str, this))}; "
                                f"keep one for each {', '.join(columns)}")
        seen.add(this)
        groups.setdefault(this[:len(by)], []).append((where, row))
    return groups


def table(headings, rows):
    """Rows of cells under their headings as text: columns as wide as they must be, texts to the left, numbers to the
    right. Cells are texts, whole numbers, or None for what there is not.

    >>> print(table(["model", "score", "prompts"], [["mine", "62.5", 3], ["another", None, 12]]))
    model    score  prompts
    mine      62.5        3
    another      -       12
    """
    cells = [[str("-" if cell is None else cell) for cell in row] for row in [headings, *rows]]
    columns = []
    for heading, *column in zip(*cells):
        width = max(map(len, [heading, *column]))
        numbers = all(re.fullmatch(r"[-+]?[\d.]+|-", cell) for cell in column)
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in [heading, *column]])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns))
