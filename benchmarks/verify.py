"""`python eval.py verify`: answers that are right or wrong by themselves, with no judge: GSM8K, MATH, HumanEval.

    gsm8k      the number that the answer ends at            gsm8k_answer
    math       what stands in its last \\boxed{}             boxed; math_value, for one value is written in many ways
    humaneval  a program that passes the problem's tests     humaneval_program; programs.passes, which runs it

The figure is the share of answers that are right, for HumanEval pass@k, in percent; several answers to one question
count as one problem. A rule that is too strict or too lax moves every figure, so each is written out here with an
example. What a model writes inside <think>...</think> is never read.

The functions `gsm8k` and `math` give the same marks one by one, as a reward for training (`--reward verify:gsm8k`), and
are the pattern for a reward of one's own.
"""

import concurrent.futures
import dataclasses
import decimal
import fractions
import json
import os
import re
import textwrap
import typing
import warnings
from math import isnan, prod        # the name `math` is the reward's

import torch

import files
import flags
import run
from benchmarks import programs
from chat import THINKING, read_rows, without_thinking
from flags import flag
from winrate import mean_and_error


# ---------------------------------------------------------------------------------------------------------------------
# GSM8K and MATH: finding the answer


NUMBER = re.compile(r"""
    (?: (?<! [\w)] ) - )?                           # a sign, but not in 10-7 or (2)-5
    (?: (?: \d{1,3} (?: ,\d{3} )+ (?!\d) | \d+ )    # 1,234,567 or 1234567 ...
        (?: \.\d+ )?                               # ... and 18.50
      | \.\d+ )                                    # or .5
    """, re.VERBOSE)
SEPARATOR = re.compile(r"(?<=\d)(?:,\\!|\{,\}|\\,)(?=\d{3}(?!\d))")        # LaTeX's 1,\!000 and 1{,}000 and 1\,000
ANSWER_IS = re.compile(r"answer is\b(?!\s+not\b)")                          # and not in: the answer isn't 5
SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\n(?!\s*=)")                     # a line may go on with = 7
CALCULATION = re.compile(r"\s*(?:[-+*/×]|\\times|\\cdot)\s*[\d(]")          # behind a number: it is a part of a sum


def gsm8k_answer(text):
    r"""The number that an answer to a GSM8K question ends at, as a Decimal (so 18 = 18.00); None without any number.

    It is looked for in the last \boxed{}, then after the last "####" (the data set's own mark), then after the last
    "answer is": there it is the number behind the last "=" of the sentence, else the sentence's first. Without these,
    it is the last number of all. Commas between thousands, currency, units, a percent sign and a full stop do not
    matter; a hyphen after a digit, a letter or a bracket is no sign.

    >>> [str(gsm8k_answer(t)) for t in (r"3+4=7\n#### 1,234", "The answer is $18.00 a day, not 20.", "10-7 = 3 eggs.")]
    ['1234', '18.00', '3']
    >>> [str(gsm8k_answer(t)) for t in (r"\boxed{5}, so the answer is 6.", "The answer is 3 + 4 = 7", "It isn't 9.")]
    ['5', '7', '9']
    >>> gsm8k_answer("the answer is -$5") == -5, gsm8k_answer("no idea")
    (True, None)
    """
    text = SEPARATOR.sub(",", text.replace("$", "").replace("−", "-").lower())
    found = None
    for statement in (boxed(text), _behind_last("####", text), _behind_last(ANSWER_IS, text)):
        if found is None and statement is not None:
            found = _stated_number(statement)
    if found is None:
        found = next(reversed(list(NUMBER.finditer(text))), None)
    return decimal.Decimal(found[0].replace(",", "")) if found else None


def _behind_last(mark, text):
    """The rest of the text behind a pattern's last match; None without a match."""
    parts = re.split(mark, text)
    return parts[-1] if len(parts) > 1 else None


def _stated_number(text):
    """The match of NUMBER that the sentence with the text's first number states: see gsm8k_answer."""
    first = NUMBER.search(text)
    if first is None:
        return None
    end = SENTENCE_END.search(text, first.end())
    sentence = text[:end.start()] if end else text
    result = NUMBER.search(sentence, sentence.rfind("=") + 1)           # without "=" it is the first
    if result is None or CALCULATION.match(sentence, result.end()):     # 7 = 3 + 4
        return first
    return result


def boxed(text):
    r"""What stands in the last \boxed{...} (or \fbox{...}, or `\boxed 5`), braces matched; None if there is none or it
    was cut.

    >>> [boxed(t) for t in (r"\boxed{1}, no: $\boxed{a^{2}}$.", r"\boxed 7$", "7", r"\boxed{\frac{1")]
    ['a^{2}', '7', None, None]
    """
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?![a-z])\s*", text))
    rest = text[boxes[-1].end():] if boxes else ""
    if not rest.startswith("{"):                            # `\boxed 5`: its first word
        words = rest.split("$")[0].split()
        return words[0].rstrip(".") or None if words else None
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", rest):             # an escaped brace is a sign of the formula
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return rest[1:mark.start()].strip()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# MATH: two ways to write one value


class Rule(typing.NamedTuple):
    """One rewriting of a formula: `pattern` becomes `by`, everywhere; for instance `before` becomes `after`."""
    pattern: re.Pattern
    by: str
    before: str
    after: str


# In this order: first what says nothing about the value goes (spaces, sizes, units, degrees), then one way to write
# fractions and roots is left.
MATH_RULES = [Rule(re.compile(pattern), *rest) for pattern, *rest in (
    # a mixed number keeps its parts when the spaces go
    (r"(?<![\w.])(\d+)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}", "1 1/2", r"1\frac{1}{2}"),
    # LaTeX's spaces become plain ones
    (r"\\[!:;, ]|~|\\q?quad(?![a-z])", " ", r"1,\!234 \quad x", "1, 234   x"),
    # the sizes of brackets go
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-z])", "", r"\left(1, 2\right)", "(1, 2)"),
    # `and` and `or` between answers become commas
    (r"\\(?:text|mbox|mathrm)\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b", ",", r"1 \text{ and } 2", "1 , 2"),
    # a unit at the end goes: words as \text, a power with them, after a letter, a digit, or a bracket ...
    (r"(?<=[\w})])\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?\s*$", "", r"5\text{ cm}^2", "5"),
    # ... or plain words of two letters and more, after a number (5a is no unit)
    (r"^(-?[\d.,/]+)\s+[A-Za-z]{2,}[A-Za-z /]*$", r"\1", "5 square inches", "5"),
    # any other \text{...} is its content
    (r"\\(?:text|textbf|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", r"\text{even}", "even"),
    # of the signs for "at most", "at least" and "not equal" the short ones are left
    (r"\\([lgn])eq(?:slant)?(?![a-z])", r"\\\1e ", r"x\leq y", r"x\le  y"), (r"<=|≤", r"\\le ", "x<=5", r"x\le 5"),
    (r">=|≥", r"\\ge ", "x≥5", r"x\ge 5"),
    # the spaces go
    (r"\s+", "", "x^2 + 1", "x^2+1"),
    # degrees and percent signs go, so that 50\% is 50 and not 1/2
    (r"\^\{?\\circ\}?|\\degree|°|\\?%", "", r"90^\circ", "90"),
    # an index or a power of one sign needs no braces
    (r"([\^_])\{(\w)\}", r"\1\2", "x^{2}", "x^2"),
    # there is one \frac ...
    (r"\\[dtc]frac", r"\\frac", r"\dfrac12", r"\frac12"),
    # ... its numerator has braces ...
    (r"\\frac(?!\{)(\w)", r"\\frac{\1}", r"\frac1{72}", r"\frac{1}{72}"),
    # ... and so has its denominator ...
    (r"(\\frac\{[^{}]*\})(?!\{)(\w)", r"\1{\2}", r"\frac{1}2", r"\frac{1}{2}"),
    # ... and a minus in the numerator stands before it
    (r"\\frac\{-([^{}]*)\}", r"-\\frac{\1}", r"\frac{-1}{2}", r"-\frac{1}{2}"),
    # roots are written as in LaTeX ...
    (r"(?<!\\)sqrt\(([^()]*)\)|√\(?(\w+)\)?", r"\\sqrt{\1\2}", "sqrt(3)", r"\sqrt{3}"),
    # ... and have braces too
    (r"\\sqrt(?![\[{])(\w)", r"\\sqrt{\1}", r"2\sqrt3", r"2\sqrt{3}"),
)]
MATRIX = re.compile(r"""
    (?: \\left \s* [(\[] \s* )?
    \\begin\{ ( [pb]?matrix | array ) \} (?: \{ [clr|\s]* \} )?
    (?P<entries> .*? )
    \\end\{ \1 \}
    (?: \s* \\right \s* [)\]] )?
    """, re.VERBOSE | re.DOTALL)
NEXT_ROW = re.compile(r"\\\\(?:\s*\[[\d.]+\s*[a-z]{2}\])?")             # \\ and \\[4pt]
THOUSANDS = re.compile(r"(?<![\w.,(\[{/^])[1-9]\d{0,2}(?:,\d{3})+(?![\d,)\]}])")     # 1,234,567, not right in brackets
THREE_DIGITS = re.compile(r"[1-9]\d\d(?:,[1-9]\d\d)+")                  # 100,200, which may be a list as well
NAME_BEFORE = re.compile(r"^[A-Za-z](?:=|\\in(?![a-z]))")               # x= and x\in
BRACKETS = re.compile(r"(\(|\[|\\\{)(.*)(\)|\]|\\\})")                  # (...), [...], \{...\}, and mixed: [0, 1)
SLASH = re.compile(r"^(-?)([^-+/(),\[\]]+)/([^-+/(),\[\]]+)$")          # a/b, without sums, brackets or commas in it
FRACTION = re.compile(r"(-?)(\d{0,40})\\frac\{(\d{1,40})\}\{(\d{1,40})\}")      # \frac{1}{2}, 1\frac{1}{2}
DECIMAL = re.compile(r"-?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})")           # 3, 3., 3.5, .5


def math_value(text):
    r"""What two answers to a MATH problem are compared by: a Fraction, a tuple of such things, or normal LaTeX.

    Dollars go, matrices become their entries' values, commas between thousands go; then MATH_RULES in order, then `x =`
    and `x \in` at the front. A list is cut at its outermost commas, and each part becomes, where it can, a number,
    compared by value: 1,234 and .5 and 007 and 2/4 and \frac{2}{4} and 1\frac{1}{2}. Tuples and intervals keep their
    order and brackets; sets and lists without brackets have no order. No algebra: x+1 is not 1+x.

    Which commas part thousands: those written 1,\!000 or 1{,}000 or 1\,000; and plain ones with three digits and no
    space behind, outside brackets, unless every group could be a number of three digits by itself. So 1,000 and 12,345
    and 100,000 are numbers, 1, 000 and 100,200 are lists (but see `same_value`).

    >>> math_value(r"\dfrac{3}{6}") == math_value("$.50$") == math_value("1/2"), math_value(r"x = 1,\!234\text{ cm}^2")
    (True, Fraction(1234, 1))
    >>> math_value(r"\left( -\infty, \tfrac12 \right]"), math_value("2, 1") == math_value(r"1 \text{ and } 2")
    (('(', '-\\infty', Fraction(1, 2), ']'), True)
    >>> math_value(r"\begin{pmatrix} 0.5 & x^{2} \\ 3 & 4 \end{pmatrix}")
    'matrix(1/2,x^2;3,4)'
    """
    formula = SEPARATOR.sub("", text.replace("\\$", "").replace("$", "").strip().rstrip(". "))
    formula = THOUSANDS.sub(lambda n: n[0] if THREE_DIGITS.fullmatch(n[0]) else n[0].replace(",", ""), formula)
    formula = MATRIX.sub(_matrix, formula)
    for rule in MATH_RULES:
        formula = rule.pattern.sub(rule.by, formula)
    opened, parts, closed = _listed(NAME_BEFORE.sub("", formula))
    values = [_number(re.sub(r"^[A-Za-z]=", "", part)) for part in parts]
    if len(values) == 1 and opened in ("", "("):
        return values[0]                                    # (A) is A
    if opened in ("", "\\{"):
        values.sort(key=str)                                # no order
    return (opened, *values, closed)


def same_value(found, right):
    """Is `found` the value that the reference `right` gives? By `math_value`; and where the reference is one number, an
    answer that could be a list or a number, such as 100,200, is read as a number.

    >>> same_value("100,200", "200,100"), same_value("100,200", "100200"), same_value("100200", "100,200")
    (True, True, False)
    """
    right = math_value(right)
    if math_value(found) == right:
        return True
    as_one_number = THOUSANDS.sub(lambda n: n[0].replace(",", ""), found)
    return isinstance(right, fractions.Fraction) and math_value(as_one_number) == right


def _matrix(found):
    r"""A match of MATRIX as text: its entries' values, rows parted by semicolons. Its brackets do not matter."""
    rows = [row.split("&") for row in NEXT_ROW.split(found["entries"].replace(r"\hline", "")) if row.strip()]
    return "matrix(" + ";".join(",".join(str(math_value(entry)) for entry in row) for row in rows) + ")"


def _listed(formula):
    r"""(opening bracket, [parts], closing bracket) of a list; brackets are "" where they do not go around all of it.

    >>> _listed("(1,2]"), _listed("1,2"), _listed(r"(0,1)\cup(2,3)")
    (('(', ['1', '2'], ']'), ('', ['1', '2'], ''), ('', ['(0,1)\\cup(2,3)'], ''))
    """
    around = BRACKETS.fullmatch(formula)
    if around:
        parts = _split(around[2])
        if parts is not None:                               # else they are not each other's, as in (0,1)\cup(2,3)
            return around[1], parts, around[3]
    return "", _split(formula) or [formula], ""


def _split(formula):
    """The parts between commas outside brackets; None where a bracket is closed that was not opened."""
    parts, depth = [""], 0
    for c in formula:
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return None
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _number(part):
    r"""A Fraction where `part` is an integer, a decimal, a/b, \frac{a}{b} or a mixed number n\frac{a}{b} with a < b
    (of up to 40 digits each), else its LaTeX.

    >>> _number("+0.50"), _number("3/6"), _number(r"-1\frac{1}{2}"), _number(r"\pi/2"), _number(r"\frac{1}{0}")
    (Fraction(1, 2), Fraction(1, 2), Fraction(-3, 2), '\\frac{\\pi}{2}', '\\frac{1}{0}')
    """
    part = SLASH.sub(r"\1\\frac{\2}{\3}", part.removeprefix("+"))
    if DECIMAL.fullmatch(part):
        return fractions.Fraction(part)
    found = FRACTION.fullmatch(part)
    if found:
        sign, whole, above, below = -1 if found[1] else 1, int(found[2] or 0), int(found[3]), int(found[4])
        if below and (not found[2] or above < below):
            return sign * (whole + fractions.Fraction(above, below))
    return part


# ---------------------------------------------------------------------------------------------------------------------
# one answer: right or wrong, as a mark and as a reward


class Mark(typing.NamedTuple):
    """What was read as an answer (None: nothing), and whether it is right."""
    read: str | None
    right: bool


def mark_answer(task, reference, text):
    """The Mark of a model's `text`. reference: the data set's own answer to that gsm8k or math problem, whole.

    >>> mark_answer("gsm8k", "so 6 + 4 = 10. #### 10", "<think>9?</think>The answer is 10.")
    Mark(read='10', right=True)
    """
    text = without_thinking(text)
    if task == "gsm8k":
        number = gsm8k_answer(text)
        return Mark(None, False) if number is None else Mark(str(number), number == gsm8k_answer(reference))
    found = boxed(text)
    if not found:
        return Mark(None, False)
    return Mark(found, same_value(found, boxed(reference) or reference))


REFERENCES = ("answer", "reference", "solution")        # GSM8K and MATH-500 have the first, MATH has the last


def _reference_text(task, row):
    """The data set's own answer in a row, as text: the first of REFERENCES that the task can use. None without one."""
    for name in REFERENCES:
        value = row.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value.strip():
            if task == "gsm8k":
                usable = gsm8k_answer(value) is not None
            else:
                usable = name != "solution" or bool(boxed(value))           # a solution without a box is an essay
            if usable:
                return value
    return None


def _reward(task, prompt, answer, row):
    reference = _reference_text(task, row)
    if reference is None:
        holds = {"gsm8k": "a number (42, or a text that ends in #### 42)",
                 "math": "the right answer (or a column `solution` with it in \\boxed{})"}[task]
        has = f"only {', '.join(map(str, row))}" if row else "nothing but the prompt"
        raise run.UserError(f"verify:{task} needs a column `answer` with {holds} in every row of the prompts, and "
                            f"{prompt[:40]!r} has {has}; add it")
    return float(mark_answer(task, reference, answer).right)


def gsm8k(prompt, answer, row):
    """A reward for training, `--reward verify:gsm8k`: 1.0 for an answer that ends at the right number, else 0.0.

    prompt: what the model was asked; answer: what it wrote; row: the prompt's row, with GSM8K's `answer`. Raises
    UserError, naming the column, for a row without a number in it. A reward of your own is such a function in a file of
    yours; its attribute `bounds` says between which numbers its values lie.

    >>> gsm8k("What is 40 + 2?", "It is 42.", {"answer": "40 + 2 = <<40+2=42>>42\\n#### 42"}), gsm8k.bounds
    (1.0, (0, 1))
    """
    return _reward("gsm8k", prompt, answer, row)


def math(prompt, answer, row):
    r"""The same for MATH, `--reward verify:math`: the value in the last \boxed{}; row: with `answer`, or `solution`.

    >>> [math("Half of 1?", text, {"solution": r"It is $\boxed{\frac12}$."}) for text in (r"\boxed{0.5}", "0.5")]
    [1.0, 0.0]
    """
    return _reward("math", prompt, answer, row)


gsm8k.bounds = math.bounds = (0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# HumanEval: a program out of an answer, and whether it passes


def humaneval_program(problem, text):
    """The program in an answer to a HumanEval problem {prompt, test, entry_point}; None if nothing in it parses.

    The code is the first ```python block that defines the function, else the first block, else the text from its first
    line of code on; a block that stands in a list loses the list's indentation. Where it defines the function itself it
    follows what precedes it in the prompt (imports, helpers), and without a block it ends where the rest parses no
    more; otherwise it continues the prompt, up to the first line that begins something new at the margin, its
    indentation restored if it was stripped.
    """
    if any(mark in text for mark in THINKING):
        text = without_thinking(text)
    for source in _possible_sources(problem, text):
        if _compiles(source):
            return source
    return None


FENCED = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
CODE_BEGINS = re.compile(r"^(?:import \w|from [\w.]+ import |def |class |@\w)", re.MULTILINE)


def _possible_sources(problem, text):
    """Ways to read an answer as the function that the problem asks for, the likeliest first."""
    prompt = problem["prompt"].rstrip("\n") + "\n"
    definition = re.compile(rf"^def {re.escape(problem['entry_point'])}\b", re.M)
    blocks = FENCED.findall(text)
    blocks = [block if definition.search(block) else _without_margin(block, definition) for block in blocks]
    code = next(filter(definition.search, blocks), blocks[0] if blocks else text).strip("\n")
    if not code.strip():
        return []
    if definition.search(code):                                 # the whole function
        asked = definition.search(prompt)
        codes = [code] if blocks else _without_prose(code, definition)
        return [prompt[:asked.start()] + code if asked else code for code in codes]
    if not blocks:                                              # its body: a model that is not stopped runs on
        code = re.split(r"\n(?=def |class |if |print\(|#|@|```)", code)[0]
    if not code.strip():
        return []
    first_line_stripped = prompt + "    " + code.lstrip()
    all_stripped = prompt + textwrap.indent(textwrap.dedent(code), "    ")
    return ([prompt + code] if code[0].isspace() else []) + [first_line_stripped, all_stripped]


def _without_margin(block, definition):
    """A block in a list is indented as a whole: the block without that, if it then defines the function."""
    moved = textwrap.dedent(block)
    return moved if definition.search(moved) else block


def _without_prose(text, definition):
    """Ways to cut code without a fence out of an answer: from the first line of code to the end, or to a line at the
    margin behind the function, the last such line first. An answer that was cut short inside the function stays so."""
    text = text[CODE_BEGINS.search(text).start():]
    ends = [line.start() for line in re.finditer(r"^\S", text, re.M) if line.start() > definition.search(text).start()]
    return [text] + [text[:end] for end in reversed(ends)]


def _compiles(source):
    try:
        with warnings.catch_warnings(action="ignore"):                      # of "\d" in the answer, say
            compile(source, "answer", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):          # ValueError: a NUL or a lone surrogate
        return False
    return True


def pass_at_k(n, c, k):
    """The chance that k of n answers, drawn without replacement, hold at least one of the c right ones:
    1 - C(n-c, k) / C(n, k), as a product, for the binomials overflow (Chen et al., arXiv 2107.03374).

    >>> pass_at_k(2, 1, 1), pass_at_k(4, 1, 2), pass_at_k(1000, 1, 1000), pass_at_k(9, 0, 5)
    (0.5, 0.5, 1.0, 0.0)
    """
    return 1.0 - prod(1 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# the command


@dataclasses.dataclass
class VerifySettings:
    """Flags of `python eval.py verify`."""
    COMMAND = "eval.py verify"
    task: str = flag("gsm8k", "which rules: gsm8k, math or humaneval", ("gsm8k", "math", "humaneval"))
    answers: str = flag("", "answers, .jsonl: output (or completion, answer_text, generate_0 ...) and either the "
                            "reference (`answer`, `reference` or `solution`; humaneval: prompt, test, entry_point) "
                            "or what finds it in --references (needed)", needed=True)
    references: str = flag("", "the data set's own file, .jsonl, where --answers lacks the references")
    checker: str = flag("rules", "math: this file's rules, or math-verify (an optional package: it reads answers "
                                 "without a box too, and does algebra)", ("rules", "math-verify"))
    marks: str = flag("", "a file to write, .jsonl, one row an answer: problem, sample, read (the text that counts "
                          "as the answer, null without one; humaneval: the program), right")
    allow_code_execution: bool = flag(False, "humaneval: run the generated code on this machine, in processes with "
                                             "limits but no sandbox (use a container)")
    as_root: bool = flag(False, "humaneval: run it as root too, whom no limit on processes binds")
    json: bool = flag(False, "print the figures as one JSON object")


@dataclasses.dataclass
class Problem:
    """A problem, the answers to it, and the file's row (its first) that they come from."""
    reference: dict         # the row that holds the right answer, or the tests
    texts: list             # one answer or several
    where: str              # "line 7"


def main(argv):
    """Print the share of right answers, or pass@k of generated programs."""
    args = flags.parse(VerifySettings, argv,
                     "check answers against exact references; the rules are in benchmarks/verify.py's docstrings")
    _check(args)
    problems = read_problems(args.answers, args.references, args.task)
    for problem in problems:
        _check_reference(args, problem)
    if args.task == "humaneval":
        marks = _run_programs(problems)
    else:
        check = math_verify_marks() if args.checker == "math-verify" else mark_answer
        marks = [[check(args.task, _reference_text(args.task, problem.reference), text) for text in problem.texts]
                 for problem in problems]
    if args.marks:
        files.write_rows(args.marks, [{"problem": (_names(problem.reference) or [problem.where])[-1], "sample": i,
                                     **mark._asdict()}
                                    for problem, of_one in zip(problems, marks) for i, mark in enumerate(of_one)])
    figures = _figures(args.task, marks)
    print(json.dumps(figures) if args.json else _as_text(args, figures))


def _check(args):
    """Raises UserError for flags that do not fit together, and for --marks that cannot be written, before any work."""
    if args.task == "humaneval" and not args.allow_code_execution:
        raise run.UserError("--task humaneval runs generated code on this machine, outside any sandbox; give "
                            "--allow-code-execution, best in a container without network")
    if args.task == "humaneval" and not args.as_root and hasattr(os, "geteuid") and os.geteuid() == 0:
        raise run.UserError("--task humaneval runs generated code, and you are root; be a user who owns nothing, or "
                            "give --as-root too")
    if args.as_root and args.task != "humaneval":
        raise run.UserError(f"--as-root is for --task humaneval, and {args.task} runs no code; leave it out")
    if args.task != "humaneval" and args.allow_code_execution:
        raise run.UserError(f"--allow-code-execution is for --task humaneval, and {args.task} runs no code; leave it "
                            "out")
    if args.task != "math" and args.checker != "rules":
        raise run.UserError(f"--checker {args.checker} is for --task math; leave it out")
    inputs = [os.path.abspath(path) for path in (args.answers, args.references) if path]
    if args.marks and os.path.abspath(args.marks) in inputs:
        raise run.UserError(f"--marks {args.marks} would be written over what is checked; give another file")
    if args.marks and not os.access(os.path.dirname(args.marks) or ".", os.W_OK):
        raise run.UserError(f"--marks {args.marks} cannot be written; give a file in a directory that exists")


def read_problems(answers, references="", task="gsm8k"):
    """A list of Problem from the file --answers and, if given, --references.

    An answer stands in `output`, `completion` or `answer_text`, as a text or a list of texts, or in generate_0,
    generate_1, ... (texts or conversations); where a row has several of these columns, humaneval reads `completion`, as
    its authors' own checker does, the others `output`. Rows of one question are one problem with several answers.
    References are found by the question's text (`question`, `prompt` or `instruction`), else by `task_id` or `id`.
    Raises UserError for a row without an answer, and for one that --references does not know.
    """
    known = {}
    for _, row in read_rows("--references", references) if references else ():
        known |= {name: row for name in _names(row)}
    problems = {}
    columns = ("completion", "output") if task == "humaneval" else ("output", "completion")
    for where, row in read_rows("--answers", answers):
        texts = _answers_in(row, columns + ("answer_text",))
        if not texts:
            raise run.UserError(f"--answers {answers}, {where}: no answer found; every row needs `output`, "
                                "`completion` or `answer_text`, a text or a list of them, or generate_0 ...")
        reference = row
        if references:
            reference = next((known[name] for name in _names(row) if name in known), None)
        if reference is None:
            raise run.UserError(f"--answers {answers}, {where}: --references {references} holds neither its "
                                "question nor its task_id or id; give both files the same")
        names = _names(reference)
        problem = problems.setdefault(names[0] if names else where, Problem(reference, [], where))
        problem.texts.extend(texts)
    return list(problems.values())


def _names(row):
    """What a question can be found by: its text, its ids."""
    columns = ("question", "problem", "prompt", "instruction", "task_id", "id")
    return [row[name] for name in columns if isinstance(row.get(name), (str, int))]


def _answers_in(row, columns):
    """The texts of a row's answers, or None where there is none that can be read."""
    given = [row[name] for name in columns if row.get(name) is not None]
    found = given[0] if given else [row[f"generate_{i}"] for i in range(len(row)) if f"generate_{i}" in row]
    if isinstance(found, str):
        found = [found]
    try:
        texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in found]
    except (TypeError, KeyError, IndexError):
        return None
    return texts if all(isinstance(text, str) for text in texts) else None


def _check_reference(args, problem):
    """Raises UserError for a problem without the reference that its task needs."""
    row, at = problem.reference, f"--answers {args.answers}, {problem.where}"
    if args.task == "humaneval":
        there = all(isinstance(row.get(name), str) for name in ("prompt", "test", "entry_point"))
        needed = "prompt and test and entry_point"
    else:
        there, needed = any(row.get(name) is not None for name in REFERENCES), "answer or reference or solution"
    if not there:
        looked_in = f" in --references {args.references}" if args.references else ""
        raise run.UserError(f"{at}: no reference for it{looked_in}; every row needs {needed}, here or in --references "
                            "FILE")
    if args.task != "humaneval" and _reference_text(args.task, row) is None:
        what = {"gsm8k": "number; is it --task math?", "math": "answer; give it in `answer`, or as \\boxed{} in "
                                                              "`solution`"}[args.task]
        raise run.UserError(f"{at}: its reference holds no {what}")


def math_verify_marks():
    """A function like `mark_answer` by Hugging Face's math-verify, which reads an answer and compares values in its
    own way. Raises UserError where it is not installed."""
    try:
        import math_verify
    except ImportError:
        raise run.UserError("--checker math-verify needs the package: `pip install math-verify`, or give --checker "
                            "rules") from None

    def check(task, reference, text):
        found = math_verify.parse(without_thinking(text))       # [value, its text]; [] where there is none
        right = boxed(reference) or reference
        same = bool(found) and math_verify.verify(math_verify.parse(f"\\boxed{{{right}}}"), found)
        return Mark(str(found[-1]) if found else None, bool(same))
    return check


def _run_programs(problems):
    """For each problem the Marks of its answers; nothing is read where nothing in the answer parses."""
    tried = [(humaneval_program(problem.reference, text), problem.reference)
             for problem in problems for text in problem.texts]

    def mark(source, reference):
        return Mark(source, source is not None and programs.passes(source, reference))

    # each thread only waits for its processes
    with programs.guarded(), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        marks = iter(list(run.progress(pool.map(mark, *zip(*tried)), "running", len(tried))))
    return [[next(marks) for _ in problem.texts] for problem in problems]


def _figures(task, marks):
    """Accuracy, or for code pass@1, 10 and 100 as far as there are answers, in percent, each with its standard error
    over problems (None for one alone). marks: for each problem those of its answers."""
    fewest = min(map(len, marks))
    flat = [mark for of_one in marks for mark in of_one]
    figures = {"task": task, "problems": len(marks), "answers": len(flat),
               "without_answer": sum(mark.read is None for mark in flat)}
    for k in (1, 10, 100) if task == "humaneval" else (1,):
        if k <= fewest:
            name = f"pass@{k}" if task == "humaneval" else "accuracy"
            rates = [pass_at_k(len(of_one), sum(mark.right for mark in of_one), k) for of_one in marks]
            figures[name], error = mean_and_error(100 * torch.tensor(rates, dtype=torch.float64))
            figures[name + "_se"] = None if isnan(error) else error
    return figures


def _as_text(args, figures):
    rates = []
    for name in ("accuracy", "pass@1", "pass@10", "pass@100"):
        if name in figures:
            error = figures[name + "_se"]
            rates.append(f"{name} {figures[name]:.2f} %" + ("" if error is None else f" ±{error:.2f}"))
    lacking = "nothing that parses" if args.task == "humaneval" else "no answer found"
    return (f"{args.task}, {args.answers}: {', '.join(rates)} over {figures['problems']} problems, "
            f"{figures['answers']} answers; {lacking} in {figures['without_answer']} of them")
