"""eval.py verify: GSM8K's and MATH's rules case by case, HumanEval's programs, generated code under its limits."""

import ctypes
import json
import math
import os
import sys
import textwrap
import time
import types

import pytest

import eval
from benchmarks import programs, verify as checks
from benchmarks.verify import (MATH_RULES, boxed, gsm8k_answer, humaneval_program, mark_answer, math_value, pass_at_k,
                               same_value)
from run import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")


def check_answer(task, reference, text):
    """True, False, or None where nothing was read."""
    mark = mark_answer(task, reference, text)
    return None if mark.read is None else mark.right


def write(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


# ---------------------------------------------------------------------------------------------------------------------
# GSM8K


@pytest.mark.parametrize("text, number", [
    ("5 + 5 = 10\n#### 10", 10), ("#### 1\nno, again\n#### 2", 2), ("#### 2,125", 2125), ("####-7", -7),
    ("#### $18.00", 18),
    ("#### 10\nThe answer is 11.", 10),                             # the data set's own mark comes first
    ("The answer is 42 because 6 * 7 is 42, not 43.", 42), ("THE ANSWER IS: **18**", 18),
    ("First I thought the answer is 3. The answer is 4.", 4), ("The final answer is $\\boxed{70{,}000}$.", 70000),
    ("the answer is 12 apples.", 12), ("the answer is 150%.", 150), ("the answer is -$5", -5),
    ("the answer is −5", -5),
    ("She has 3 cats and 4 dogs.", 4), ("So 16-3=13", 13), ("that makes 10-3", 3), ("(2)-5", 5), ("It is 3.50", 3.5),
    ("It weighs .5 kg", 0.5), ("1,234,567 people.", 1234567), ("pick 1, 2, 3", 3), ("pick 1,2", 2),
    ("\\boxed{18}\n#### 17\nThe answer is 16", 18), ("\\boxed{1} or \\boxed{\\$2{,}500}.", 2500),
    ("\\boxed{3 \\cdot 6 = 18 \\text{ eggs}}", 18), ("\\boxed{\\text{none}}, the answer is 4", 4),
    ("\\boxed{12 is cut, the answer is 4", 4),
    ("The answer is 3 + 4 = 7", 7), ("#### 3*4 = $12 and not 13", 12),
    ("the answer is 2 + 2 = 4. Check: 9 - 2 = 7", 4),
    ("The answer is: 10 - 1\n= 9\nas 1 + 1 = 2", 9), ("The answer is 7 = 3 + 4.", 7),
    ("The answer is 7 = 1 \\times 7", 7),
    ("the answer is x = **5**.", 5), ("the answer is 4.5 = 9/2", 4.5),
    ("The answer is 6. No: the answer isn't 5.", 6), ("the answer isn't 5, it is 6", 6),
    ("the answer isn’t 5, but 6", 6),
    ("The answer is not 5 but 6", 6), ("####\nThe answer is unknown, but say 6", 6), ("I cannot say.", None),
    ("", None), ("####", None)])
def test_gsm8k_answers(text, number):
    assert gsm8k_answer(text) == number


def test_gsm8k_is_exact():
    """No rounding through floats; one wrong digit is wrong."""
    assert gsm8k_answer("#### 0.1") != 0.1 and gsm8k_answer("#### 18.0000000000000000001") != 18
    assert str(gsm8k_answer("9" * 5000)) == "9" * 5000             # more digits than an int may be written with
    assert check_answer("gsm8k", "so\n#### 18", "The answer is 18.0") is True
    assert check_answer("gsm8k", "18", "The answer is 180.") is False
    assert check_answer("gsm8k", "18", "No idea.") is None


# ---------------------------------------------------------------------------------------------------------------------
# MATH


@pytest.mark.parametrize("text, content", [
    (r"$\boxed{5}$", "5"), (r"\boxed{1} or rather \boxed{2}", "2"),
    (r"\boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed {x}", "x"), (r"\fbox{7}", "7"), (r"so $\boxed 5$ it is", "5"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{[0, \infty)}", r"[0, \infty)"), (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    ("5", None), (r"\boxed{\frac{1}{2}", None), (r"\boxed", None), (r"\boxedness{3}", None),
    (r"\boxed{1} \boxed{2", None)])
def test_boxed(text, content):
    assert boxed(text) == content


SAME = [  # each line: ways to write one answer
    ["1/2", r"\frac{1}{2}", r"\dfrac12", r"\tfrac 12", r"\frac1{2}", r"\frac{1}2", "0.5", ".5", "$.50$", "50/100",
     "0.5."],
    ["-1/2", r"-\frac{1}{2}", r"\frac{-1}{2}", "-.5"],
    ["1234", "1,234", r"1,\!234", r"\$1,234", "1234.0", "$1234$", "01234", "+1234"],
    ["5", r"5\text{ cm}", r"5 \text{cm}^2", r"5\mbox{ feet}", "5 square inches", r"x = 5", r"5\,",
     r"$5\text{ m}$.", "5 km/h"],
    ["90", r"90^\circ", r"90^{\circ}", "90°", r"90\degree"], ["50", r"50\%", "50%"],
    [r"\sqrt{3}", r"\sqrt3", r"\sqrt 3", "sqrt(3)", "√3"], [r"2\sqrt{3}", r"2\sqrt3", r"2 \sqrt{3}"],
    [r"\frac{\sqrt{3}}{2}", r"\sqrt3/2", r"\dfrac{\sqrt{3}}{2}"], [r"\frac{\pi}{2}", r"\pi/2"],
    ["1000", "1,000", "1{,}000", r"1\,000", r"1{,}000\text{ km}"], ["2345678", "2{,}345{,}678", r"\$2,345,678"],
    ["100000", "100,000"], ["12345", "12,345"], ["100, 200", "100,200", "200,100", r"100 \text{ and } 200"],
    ["1, 200", "200, 1"], ["1234, 5678", "1,234 and 5,678"],
    ["3/2", r"1\frac{1}{2}", r"1\dfrac12", "1 1/2", r"1 \frac{1}{2}", "1.5"], [r"-2\frac34", "-2 3/4", "-2.75"],
    ["x^2", "x^{2}", "x^{ 2 }"], ["1011_3", "1011_{3}"], [r"\frac{x^2}{3}", r"\frac{x^{2}}{3}"],
    [r"x\le 5", r"x \leq 5", r"x\leqslant5", "x <= 5", "x ≤ 5"], [r"x\ge y", r"x\geq y", "x>=y"],
    [r"a\ne b", r"a \neq b"],
    [r"\begin{pmatrix} 1 & -2 \\ 0.5 & x^{2} \end{pmatrix}", r"\begin{bmatrix}1&-2\\\frac12&x^2\end{bmatrix}",
     r"\begin{pmatrix}1 & - 2 \\[4pt] 1/2 & x^2 \\ \end{pmatrix}",
     r"\left[\begin{array}{cc} 1 & -2\\ \frac{2}{4} & x^2 \end{array}\right]",
     "A = \\begin{pmatrix}\n1 & -2 \\\\\n\\dfrac{1}{2} & x^2\n\\end{pmatrix}"],
    [r"\frac{1}{2} \begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\frac12\begin{bmatrix} 1.0 \\ 2 \end{bmatrix}"],
    ["(1,2)", "(1, 2)", r"\left(1, 2\right)", r"\bigl( 1.0 , 2 \bigr)"], [r"(0,\infty)", r"\left( 0, \infty \right)"],
    [r"[-\frac12, 3)", r"\left[-0.5,3\right)", r"x \in [-1/2, 3)"],
    [r"(-\infty,0)\cup(1,2)", r"\left(-\infty, 0\right) \cup (1, 2)"],
    [r"\{1,2\}", r"\{2, 1\}", r"\left\{1,2\right\}"], ["1, 2", "2,1", r"1 \text{ and } 2", "x=1 or x=2"],
    ["A", r"\text{A}", r"\text{(A)}", "(A)", r"\mathrm{A}"], [r"\text{even}", "even"],
    ["x^2+1", "x^2 + 1", "$ x^2+1 $"]]


@pytest.mark.parametrize("ways", SAME, ids=lambda ways: ways[0])
def test_ways_to_write_one_answer(ways):
    assert [math_value(way) for way in ways] == [math_value(ways[0])] * len(ways)


@pytest.mark.parametrize("rule", MATH_RULES, ids=lambda rule: rule.before)
def test_a_rules_example_is_what_it_does(rule):
    assert rule.pattern.sub(rule.by, rule.before) == rule.after


def test_different_answers_stay_different():
    values = [math_value(ways[0]) for ways in SAME] + [math_value(t) for t in (
        "(2,1)", "[1,2]", "(1,2]", r"50\pi", "1+x^2", "0.333", "1/3", "12", r"\sqrt{2}", r"\sqrt[3]{3}", "1011_2",
        "1011", r"\frac{1}{0}", "5a", "odd", "-90", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "100200",
        r"\begin{pmatrix} 1 & 2 & 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 2 & 1 \\ 3 & 4 \end{pmatrix}", "1,2,3,4",
        r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}", r"3\frac{5}{2}", "x^{21}", "x<5", "(100,200)", "(1,000)")]
    assert all(a != b for i, a in enumerate(values) for b in values[:i])


def test_what_the_reference_is_decides_how_ambiguous_commas_are_read():
    assert same_value("100,200", "100200") and same_value("100,200", r"100{,}200") and same_value("100,200", "200, 100")
    assert not same_value("100200", "100,200") and not same_value("(100,200)", "100200")
    assert same_value("1,000", "1000") and not same_value("1, 000", "1000") and not same_value("1,000", "1, 000")


def test_math_needs_a_box_in_the_answer_and_not_in_the_reference():
    for reference in (r"$\frac{3}{4}$", r"Adding, we get $\boxed{\frac34}$."):
        assert check_answer("math", reference, r"It is \boxed{0.75}.") is True
        assert check_answer("math", reference, r"It is \boxed{0.76}.") is False
        assert check_answer("math", reference, "It is 3/4.") is None
    assert check_answer("math", "3", r"\boxed{}") is None


# ---------------------------------------------------------------------------------------------------------------------
# HumanEval


def test_pass_at_k_is_the_binomials():
    for n, c, k in ((5, 2, 1), (10, 3, 4), (10, 7, 4), (8, 0, 3), (6, 6, 2), (7, 1, 7)):
        assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-14)
    assert 0 < pass_at_k(10**5, 3, 100) < 0.004                    # the binomials have 400 digits


PROBLEM = {"prompt": 'import math\n\n\ndef half(x):\n    return x / 2\n\n\n'
                     'def area(r):\n    """Of a circle.\n    """\n',
           "entry_point": "area", "test": "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-4\n"
                                          "    assert candidate(0) == 0\n"}
WHOLE = "def area(r):\n    s = r * r\n    if s < 0:\n        return 0\n    return math.pi * s\n"
BODY = WHOLE.split("\n", 1)[1]
RIGHT = {"raw": BODY, "raw, stripped": BODY.strip(), "raw, one space": " " + BODY.strip(),
         "runs on": BODY + "\n\ndef other():\n    return (\n", "runs on in prose": BODY + "\n# Explanation\nthat is it",
         "fence": f"Sure!\n```python\n{WHOLE}```\nIt works.", "fence without helpers": f"```\n{WHOLE}```",
         "fence, cut": f"```python\n{WHOLE}", "body in a fence": f"```python\n{BODY}```",
         "short tag": f"```py\n{WHOLE}```", "odd escape": BODY.replace("s = r", "t = '\\d'; s = r"),
         "dedented body": "```python\ns = r * r\nif s < 0:\n    s = 0\nreturn math.pi * s\n```",
         "second fence": f"Like so:\n```python\narea(2)\n```\nwith\n```python\nfrom math import pi\n{WHOLE}```",
         "a sentence first": f"Here is the function: \n{WHOLE}",
         "prose around": f"Sure.\n\n{WHOLE}\nThis works.\nOr so.",
         "prose and imports": f"From the formula:\nfrom math import pi\n\n{WHOLE}\narea(1)\nIt's done",
         "fence in a list": "1. Do this:\n   ```python\n" + textwrap.indent(WHOLE, "   ") + "   ```\n2. Done.",
         "body in a list": "- So:\n  ```python\n" + textwrap.indent(BODY, "  ") + "  ```",
         "python3": f"```python3\n{WHOLE}```",
         "thought": f"<think>\n```python\ndef area(r):\n    1\n```</think>\n{WHOLE}",
         "helper used": "```python\ndef area(r):\n    return 2 * half(math.pi * r * r)\n```", "no fence": WHOLE}
WRONG = {"wrong": "    return 3 * r * r\n", "leaves early": "    import sys\n    sys.exit(0)\n",
         "leaves hard": "    import os\n    os._exit(0)\n", "raises": "    raise ValueError\n",
         "asks": "    return input()\n"}


def test_programs():
    found = {name: humaneval_program(PROBLEM, text) for name, text in {**RIGHT, **WRONG}.items()}
    assert all(found.values())
    started = time.monotonic()
    expected = dict.fromkeys(RIGHT, True) | dict.fromkeys(WRONG, False)
    assert {name: programs.passes(source, PROBLEM) for name, source in found.items()} == expected
    assert time.monotonic() - started < 20
    for text in ("", "  \n", "I cannot.", "```python\nreturn (\n```", "    return '\ud800'", "    return 0\0",
                 f"Here it is:\n{WHOLE.rstrip()} * (", f"<think>{WHOLE}"):
        assert humaneval_program(PROBLEM, text) is None


def plays(body, value=None, seconds=10.0):
    """Does a program with this text pass if its function `f` has to return `value`?"""
    test = f"def check(candidate):\n    assert candidate(1) == {value!r}\n"
    return programs.passes(body, {"prompt": "def f(x):\n", "entry_point": "f", "test": test}, seconds)


def test_generated_code_is_bounded_and_leaves_nothing():
    """Time, memory, file size; its own directory; no environment; its children end with it, in whatever session."""
    started, done = time.monotonic(), "\ndef f(x): return x"
    assert not plays("while True: pass" + done, 1, 0.5)
    assert not plays("import time\ndef f(x): time.sleep(60)", None, 0.5) and time.monotonic() - started < 5
    assert not plays("x = bytearray(6 << 30)" + done, 1)
    assert not plays("open('big', 'w').write('x' * (2 << 20))" + done, 1)
    assert plays("import os, sys\ndef f(x): return (os.listdir(), 'PATH' in os.environ, sys.flags.isolated, "
                 f"os.getcwd() != {os.getcwd()!r})", ([], False, 1, True))
    assert plays("print('x' * 10**6)" + done, 1)                    # nobody reads it, nobody waits for a reader
    late = f"import time; time.sleep(1); open({os.getcwd() + '/late'!r}, 'w')"
    assert plays(f"import subprocess, sys\ntry:\n    subprocess.Popen([sys.executable, '-c', {late!r}], "
                 "start_new_session=True)\nexcept OSError:\n    pass" + done, 1)
    with programs.guarded():                                        # who kills the tester fails, and is found too
        assert not plays(f"import os, signal, subprocess, sys, time\ndef f(x):\n    os.setsid()\n"
                         f"    os.kill(os.getppid(), signal.SIGKILL)\n    {late}", 1)
    time.sleep(1.5)
    assert os.listdir() == []


CHEATS = {
    "equals everything": "class A:\n    __eq__ = lambda a, b: True\n    __hash__ = None\ndef f(x): return A()",
    "in a list": "class A(list):\n    __eq__ = lambda a, b: True\ndef f(x): return A()",
    "a number that is near all": "class A(float):\n    __eq__ = __le__ = lambda a, b: True\ndef f(x): return A(5)",
    "other builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.__import__ = None\ndef f(x): return 5",
    "another check": "import sys\nfor m in list(sys.modules.values()): m.check = lambda f: 0\ndef f(x): return 5",
    "leaves": "import sys\nsys.exit(0)", "leaves hard": "import os\ndef f(x): os._exit(0)",
    "speaks for the tester": "import os\nfor n in range(3, 9):\n    try: os.write(n, b'returned 7\\n')\n"
                             "    except OSError: pass\ndef f(x): return 5",
    "no value": "def f(x): return f", "deep": "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "itself": "def f(x):\n    y = []\n    y.append(y)\n    return y", "huge": "def f(x): return 'x' * (20 << 20)",
    "two lines": "def f(x): return '\\nreturned 42'", "not a number": "def f(x): return float('nan')"}


@pytest.mark.parametrize("name", CHEATS)
def test_a_program_that_only_seems_right(name):
    problem = {"prompt": "def f(x):\n", "entry_point": "f",
               "test": "def check(candidate):\n    assert abs(candidate(1) - 42) < 1e-6 or candidate(1) == 42\n"}
    assert not programs.passes(CHEATS[name], problem)


def test_values_travel_as_they_are():
    """Out and back: plain ones, those derived from them, numpy's where it is installed, and infinity."""
    rows = [1, -2.5, True, None, "a'\n\\", b"x", [1, [2]], (3,), {"k": (None, 2)}, {1, 2}, set(), 1e300, 3j, 10**30]
    assert all(plays(f"def f(x): return {value!r}", value) for value in rows)
    assert plays("import collections, enum, fractions\nP = collections.namedtuple('P', 'a b')\n"
                 "def f(x): return [P(1, 2), collections.Counter('aab'), enum.IntEnum('E', 'a').a, "
                 "fractions.Fraction(1, 2), frozenset([1])]", [(1, 2), {"a": 2, "b": 1}, 1, 0.5, {1}])
    assert programs.passes("def f(x, *, y): return [x, y, -y]", {
        "prompt": "def f(x, *, y):\n    1\n", "entry_point": "f", "test":
            "def check(candidate):\n    y = float('inf')\n    assert candidate((1, {2}), y=y) == [(1, {2}), y, -y]\n"
            "    try:\n        candidate(None, y='')\n    except TypeError:\n        return\n    assert 0"})


def test_nobody_reads_the_environment_meanwhile():
    get = 3                                 # prctl's number for asking
    with programs.guarded():
        private = ctypes.CDLL(None).prctl(get, 0, 0, 0, 0) if sys.platform == "linux" else 0
    assert private == 0 and (sys.platform != "linux" or ctypes.CDLL(None).prctl(get, 0, 0, 0, 0) == 1)


# ---------------------------------------------------------------------------------------------------------------------
# the command


def verify(capsys, *flags):
    eval.main(["verify", *flags])
    return capsys.readouterr().out


def test_verify_gsm8k(capsys):
    """Two right, one wrong, one without a number; by the question's text or by an id; s.e. by hand."""
    references = [{"id": f"g{i}", "question": f"q{i}?", "answer": f"so\n#### {i},000"} for i in range(1, 5)]
    outputs = ["The answer is $1,000.", "2000", "3001", "no idea"]
    write("refs.jsonl", references)
    layouts = {"inline": [{**r, "output": o} for r, o in zip(references, outputs)],
               "by text": [{"prompt": r["question"], "completion": o} for r, o in zip(references, outputs)],
               "by id": [{"task_id": r["id"], "answer_text": [o]} for r, o in zip(references, outputs)],
               "table": [{"instruction": r["question"], "generate_0": [{"role": "user", "content": "q"},
                          {"role": "assistant", "content": o}]} for r, o in zip(references, outputs)]}
    for name, rows in layouts.items():
        flags = ["--task", "gsm8k", "--answers", write("a.jsonl", rows), "--json"]
        row = json.loads(verify(capsys, *flags, *([] if name == "inline" else ["--references", "refs.jsonl"])))
        assert row == {"task": "gsm8k", "problems": 4, "answers": 4, "without_answer": 1, "accuracy": 50,
                       "accuracy_se": pytest.approx(100 * math.sqrt(4 * 0.25 / 3 / 4))}, name
    assert verify(capsys, *flags[:-1], "--references", "refs.jsonl") == (
        "gsm8k, a.jsonl: accuracy 50.00 % ±28.87 over 4 problems, 4 answers; no answer found in 1 of them\n")


def test_several_answers_to_one_question_are_one_problem(capsys):
    """Accuracy is the mean over problems of the share that is right, (1/2 + 1) / 2, in either layout."""
    one = [{"prompt": "a", "answer": "1", "output": ["1", "2"]}, {"prompt": "b", "answer": "5", "generate_0": "5",
                                                                 "generate_1": "#### 5"}]
    other = [{"prompt": "a", "answer": "1", "output": "1"}, {"prompt": "b", "answer": "5", "output": "5"},
             {"prompt": "a", "answer": "1", "output": "2"}, {"prompt": "b", "answer": "5", "output": "5"}]
    for rows in (one, other):
        row = json.loads(verify(capsys, "--task", "gsm8k", "--answers", write("a.jsonl", rows), "--json"))
        assert (row["problems"], row["answers"], row["accuracy"]) == (2, 4, 75)


def test_verify_math_and_humaneval(capsys):
    write("m.jsonl", [{"prompt": "p", "solution": r"thus $\boxed{\frac12}$", "output": r"\boxed{.5}"},
                      {"prompt": "q", "answer": "(1,2)", "output": r"\boxed{(2,1)}"}])
    row = json.loads(verify(capsys, "--task", "math", "--answers", "m.jsonl", "--json"))
    assert (row["accuracy"], row["without_answer"]) == (50, 0)
    write("refs.jsonl", [{**PROBLEM, "task_id": "H/0"},
                         {**PROBLEM, "task_id": "H/1", "prompt": PROBLEM["prompt"] + "\n"}])
    write("h.jsonl", [{"task_id": "H/0", "completion": BODY}, {"task_id": "H/0", "completion": "    return r\n"},
                      {"task_id": "H/1", "completion": "    return (\n"},
                      {"task_id": "H/1", "completion": WRONG["raises"]}])
    text = verify(capsys, "--task", "humaneval", "--answers", "h.jsonl", "--references", "refs.jsonl",
                  "--allow-code-execution", "--as-root")
    assert text.startswith("humaneval, h.jsonl: pass@1 25.00 % ±25.00 over 2 problems, 4 answers")
    assert "nothing that parses in 1" in text
    write("h.jsonl", [{"task_id": "H/0", "completion": [BODY] + ["    return r\n"] * 9}])
    row = json.loads(verify(capsys, "--task", "humaneval", "--answers", "h.jsonl", "--references", "refs.jsonl",
                            "--allow-code-execution", "--as-root", "--json"))
    assert row["pass@1"] == pytest.approx(10) and row["pass@10"] == 100 and "pass@100" not in row


def marks_of(capsys, rows, *flags):
    verify(capsys, "--answers", write("a.jsonl", rows), "--marks", "marks.jsonl", *flags)
    with open("marks.jsonl") as file:
        return [json.loads(line) for line in file]


def test_marks(capsys):
    """Whose answer, which of several, what was read, and whether it is right; the id where there is one."""
    rows = [{"question": "a", "id": 7, "answer": "#### 1", "output": ["It is 1.0", "no idea"]},
            {"question": "b", "answer": 5, "output": "<think>It is 5</think> 6"},
            {"question": "a", "id": 7, "answer": "#### 1", "output": r"\boxed{2}, not 1"}]
    assert marks_of(capsys, rows) == [
        {"problem": 7, "sample": 0, "read": "1.0", "right": True},
        {"problem": 7, "sample": 1, "read": None, "right": False},
        {"problem": 7, "sample": 2, "read": "2", "right": False},
        {"problem": "b", "sample": 0, "read": "6", "right": False}]
    rows = [{"answer": r"\frac12", "output": r"Half: \boxed{\dfrac{1}{2}}."}]
    assert marks_of(capsys, rows, "--task", "math") == [
        {"problem": "line 1", "sample": 0, "read": r"\dfrac{1}{2}", "right": True}]
    rows = [{**PROBLEM, "task_id": "H/0", "output": [BODY, "    return r\n", "    return ("]}]
    found = marks_of(capsys, rows, "--task", "humaneval", "--allow-code-execution", "--as-root")
    assert [(row["problem"], row["right"]) for row in found] == [("H/0", True), ("H/0", False), ("H/0", False)]
    assert found[0]["read"] == humaneval_program(PROBLEM, BODY) and found[2]["read"] is None


def test_marks_are_written_whole_or_not_at_all(capsys, monkeypatch):
    marks_of(capsys, [GOOD])
    before = open("marks.jsonl").read()
    write("a.jsonl", [{**GOOD, "output": "2"}])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("json.dumps", lambda row: 1 / 0)
        verify(capsys, "--answers", "a.jsonl", "--marks", "marks.jsonl")
    assert open("marks.jsonl").read() == before and not [name for name in os.listdir() if "tmp" in name]


def test_marks_do_not_replace_what_is_checked():
    answers = write("a.jsonl", [{"question": "q", "answer": "#### 4", "output": "#### 4"}])
    before = open(answers).read()
    with pytest.raises(UserError, match="--marks ./a.jsonl would be written over what is checked"):
        eval.main(["verify", "--task", "gsm8k", "--answers", answers, "--marks", "./a.jsonl"])
    assert open(answers).read() == before


def test_columns_with_the_answer(capsys):
    """`completion` beside `output`: humaneval's own column is read for humaneval; an empty column is none."""
    both = [{**PROBLEM, "output": "I explain first.", "completion": BODY}]
    flags = ["--task", "humaneval", "--allow-code-execution", "--as-root"]
    assert marks_of(capsys, both, *flags)[0]["right"] is True
    assert marks_of(capsys, [{**PROBLEM, "output": BODY, "completion": None}], *flags)[0]["right"] is True
    assert marks_of(capsys, [{**GOOD, "output": "1", "completion": "2"}])[0]["read"] == "1"
    assert marks_of(capsys, [{**GOOD, "output": None, "completion": "2"}])[0]["read"] == "2"


def test_math_verify_is_asked_where_wanted(capsys, monkeypatch):
    """A stand-in for the package: what it is given, and that its word counts."""
    asked = []
    package = types.ModuleType("math_verify")
    package.parse = lambda text: [] if "no idea" in text else [object(), text.strip()]

    def same(right, found):
        asked.append((right[1], found[1]))
        return "1+x" in found[1]

    package.verify = same
    monkeypatch.setitem(sys.modules, "math_verify", package)
    rows = [{"id": 1, "solution": r"thus $\boxed{x+1}$",
             "output": ["<think>2</think> It is 1+x", "no idea", r"\boxed{x+1}"]},
            {"id": 2, "answer": "x+1", "output": "1+x"}]
    found = marks_of(capsys, rows, "--task", "math", "--checker", "math-verify")
    assert [(row["read"], row["right"]) for row in found] == [
        ("It is 1+x", True), (None, False), (r"\boxed{x+1}", False), ("1+x", True)]
    assert asked == [(r"\boxed{x+1}", "It is 1+x"), (r"\boxed{x+1}",) * 2, (r"\boxed{x+1}", "1+x")]
    assert [row["right"] for row in marks_of(capsys, rows, "--task", "math")] == [False, False, True, False]
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="pip install math-verify"):
        verify(capsys, "--task", "math", "--checker", "math-verify", "--answers", "a.jsonl")


def test_math_verify_itself():
    """Algebra, which the rules do not do; only where the package is installed."""
    pytest.importorskip("math_verify")
    mark = checks.math_verify_marks()
    assert mark("math", r"\frac{1}{2}", r"So \boxed{0.5}.").right and mark("math", "x+1", r"\boxed{1+x}").right
    assert not mark("math", "3", r"\boxed{4}").right and mark("math", "3", "no idea").read is None


# ---------------------------------------------------------------------------------------------------------------------
# the checks as rewards


def test_rewards():
    for function in (checks.gsm8k, checks.math):
        assert function.bounds == (0, 1)
    for reference in ({"answer": "6 * 7 = 42\n#### 42"}, {"answer": 42}, {"answer": "42.0"}):
        assert [checks.gsm8k("What is 6 * 7?", text, reference) for text in (
            "It is 42.", "It is 41.", "I cannot say.", "<think>41</think>#### 42", "<think>It is 42.")] == [
                1, 0, 0, 1, 0]
    for reference in ({"answer": r"\frac12"}, {"answer": 0.5}, {"solution": r"Thus $\boxed{\frac{1}{2}}$."},
                      {"answer": None, "solution": r"\boxed{.5}"}):
        assert [checks.math("Half of 1?", text, reference) for text in (
            r"\boxed{1/2}", r"\boxed{2}", "1/2", r"<think>\boxed{2}</think>\boxed{.5}", r"<think>\boxed{.5}")] == [
                1, 0, 0, 1, 0]
    assert type(checks.gsm8k("q", "1", {"answer": 1})) is float and type(checks.math("q", "1", {"answer": 1})) is float


@pytest.mark.parametrize("function, row, says", [
    (checks.gsm8k, {"prompt": "q"}, "verify:gsm8k needs a column `answer` with a number .* has only prompt; add it"),
    (checks.gsm8k, {"answer": "yes"}, "needs a column `answer` with a number"), (checks.gsm8k, {}, "nothing but the prompt"),
    (checks.gsm8k, {"answer": True}, "needs a column"),
    (checks.math, {"answer": "  "}, "verify:math needs a column `answer`"),
    (checks.math, {"solution": "It is 5."}, "needs a column `answer` .* `solution`")])
def test_a_row_without_a_reference_gives_no_reward(function, row, says):
    with pytest.raises(UserError, match=says) as error:
        function("q", "42", row)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# what a person gets wrong


def test_help_names_the_command(capsys):
    for name in ("verify", "alpaca"):
        with pytest.raises(SystemExit):
            eval.main([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: eval.py {name} ")


def test_no_code_runs_unasked(monkeypatch):
    monkeypatch.setattr(programs, "passes", None)
    write("h.jsonl", [{**PROBLEM, "output": BODY}])
    ask = ["verify", "--task", "humaneval", "--answers", "h.jsonl"]
    with pytest.raises(UserError, match="--allow-code-execution"):
        eval.main(ask)
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    with pytest.raises(UserError, match="you are root; .* or give --as-root too"):
        eval.main([*ask, "--allow-code-execution"])
    with pytest.raises(UserError, match="--as-root is for --task humaneval"):
        eval.main(["verify", "--answers", "h.jsonl", "--as-root"])


GOOD = {"prompt": "p", "answer": "1", "output": "1"}


@pytest.mark.parametrize("rows, flags, says", [
    (None, "--task gsm8k", "--answers is needed"),
    (None, "--answers nowhere.jsonl", "--answers nowhere.jsonl cannot be read"),
    ([], "--answers a.jsonl", "holds no rows"),
    ([[1]], "--answers a.jsonl", "--answers a.jsonl, line 1: no JSON object"),
    ([{**GOOD, "answer": r"\pi"}], "--answers a.jsonl", "line 1: its reference holds no number"),
    ([GOOD, {"prompt": "p", "answer": "1"}], "--answers a.jsonl", "line 2: no answer found"),
    ([{**GOOD, "output": 3}], "--answers a.jsonl", "line 1: no answer found"),
    ([{**GOOD, "output": []}], "--answers a.jsonl", "line 1: no answer found"),
    ([{"prompt": "p", "output": "1"}], "--answers a.jsonl", "line 1: no reference.*answer or reference or solution"),
    ([{**GOOD, "prompt": "q"}], "--answers a.jsonl --references r.jsonl", "line 1: --references r.jsonl holds neither"),
    ([GOOD], "--answers a.jsonl --references nowhere.jsonl", "--references nowhere.jsonl cannot be read"),
    ([GOOD], "--answers a.jsonl --task humaneval --allow-code-execution --as-root",
     "prompt and test and entry_point"),
    ([GOOD], "--answers a.jsonl --task math --allow-code-execution", "leave it out"),
    ([{**GOOD, "answer": None, "solution": "It is 5."}], "--answers a.jsonl --task math",
     "its reference holds no answer"),
    ([GOOD], "--answers a.jsonl --checker math-verify", "--checker math-verify is for --task math"),
    ([GOOD], "--answers a.jsonl --marks nowhere/marks.jsonl", "--marks nowhere/marks.jsonl cannot be written")])
def test_bad_input(rows, flags, says):
    write("r.jsonl", [{"prompt": "p", "answer": "1"}])
    if rows is not None:
        write("a.jsonl", rows)
    with pytest.raises(UserError, match=says) as error:
        eval.main(["verify", *flags.split()])
    assert "\n" not in str(error.value)


def test_malformed_json_names_the_line():
    with open("a.jsonl", "w") as file:
        file.write(json.dumps(GOOD) + "\n{\n")
    with pytest.raises(UserError, match="--answers a.jsonl, line 2: malformed JSON"):
        eval.main(["verify", "--answers", "a.jsonl"])
