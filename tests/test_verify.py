"""eval.py verify: GSM8K's and MATH's rules case by case, HumanEval's programs, generated code under its limits."""

import json
import math
import os
import time

import pytest

import eval
from benchmarks.verify import (MATH_RULES, boxed, check_answer, gsm8k_answer, humaneval_program, math_value, pass_at_k,
                               passes)
from run import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")


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
    ("####\nThe answer is unknown, but say 6", 6), ("I cannot say.", None), ("", None), ("####", None)])
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
        "1011", r"\frac{1}{0}", "5a", "odd", "-90")]
    assert all(a != b for i, a in enumerate(values) for b in values[:i])


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
         "helper used": "```python\ndef area(r):\n    return 2 * half(math.pi * r * r)\n```", "no fence": WHOLE}
WRONG = {"wrong": "    return 3 * r * r\n", "leaves early": "    import sys\n    sys.exit(0)\n",
         "leaves hard": "    import os\n    os._exit(0)\n", "raises": "    raise ValueError\n",
         "asks": "    return input()\n"}


def test_programs():
    programs = {name: humaneval_program(PROBLEM, text) for name, text in {**RIGHT, **WRONG}.items()}
    assert all(programs.values())
    started = time.monotonic()
    expected = dict.fromkeys(RIGHT, True) | dict.fromkeys(WRONG, False)
    assert {name: passes(source) for name, source in programs.items()} == expected
    assert time.monotonic() - started < 20
    for text in ("", "  \n", "I cannot.", "```python\nreturn (\n```", "    return '\ud800'", "    return 0\0"):
        assert humaneval_program(PROBLEM, text) is None


def test_generated_code_is_bounded_and_leaves_nothing():
    """Time, memory, file size; its own directory; no environment; its children end with it."""
    started = time.monotonic()
    assert not passes("while True: pass", seconds=0.5)
    assert not passes("import time; time.sleep(60)", seconds=0.5) and time.monotonic() - started < 5
    assert not passes("x = bytearray(6 << 30)")
    assert not passes("open('big', 'w').write('x' * (2 << 20))")
    assert passes("import os, sys\nassert os.listdir() == ['program.py'] and 'PATH' not in os.environ\n"
                       "assert sys.flags.isolated and os.getcwd() != " + repr(os.getcwd()))
    assert passes("import time; print('x' * 10**6)")               # nobody reads it, nobody waits for a reader
    late = f"import time; time.sleep(1); open({os.getcwd() + '/late'!r}, 'w')"
    assert passes("import subprocess, sys\ntry:\n"
                       f"    subprocess.Popen([sys.executable, '-c', {late!r}])\nexcept OSError:\n    pass")
    time.sleep(1.5)
    assert os.listdir() == []


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
        assert row == {"task": "gsm8k", "problems": 4, "answers": 4, "without_answer": 1, "accuracy": 0.5,
                       "accuracy_se": pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))}, name
    assert verify(capsys, *flags[:-1], "--references", "refs.jsonl") == (
        "gsm8k, a.jsonl: accuracy 0.500 ±0.289 over 4 problems, 4 answers; no answer found in 1 of them\n")


def test_several_answers_to_one_question_are_one_problem(capsys):
    """Accuracy is the mean over problems of the share that is right, (1/2 + 1) / 2, in either layout."""
    one = [{"prompt": "a", "answer": "1", "output": ["1", "2"]}, {"prompt": "b", "answer": "5", "generate_0": "5",
                                                                 "generate_1": "#### 5"}]
    other = [{"prompt": "a", "answer": "1", "output": "1"}, {"prompt": "b", "answer": "5", "output": "5"},
             {"prompt": "a", "answer": "1", "output": "2"}, {"prompt": "b", "answer": "5", "output": "5"}]
    for rows in (one, other):
        row = json.loads(verify(capsys, "--task", "gsm8k", "--answers", write("a.jsonl", rows), "--json"))
        assert (row["problems"], row["answers"], row["accuracy"]) == (2, 4, 0.75)


def test_verify_math_and_humaneval(capsys):
    write("m.jsonl", [{"prompt": "p", "solution": r"thus $\boxed{\frac12}$", "output": r"\boxed{.5}"},
                      {"prompt": "q", "answer": "(1,2)", "output": r"\boxed{(2,1)}"}])
    row = json.loads(verify(capsys, "--task", "math", "--answers", "m.jsonl", "--json"))
    assert (row["accuracy"], row["without_answer"]) == (0.5, 0)
    write("refs.jsonl", [{**PROBLEM, "task_id": "H/0"},
                         {**PROBLEM, "task_id": "H/1", "prompt": PROBLEM["prompt"] + "\n"}])
    write("h.jsonl", [{"task_id": "H/0", "completion": BODY}, {"task_id": "H/0", "completion": "    return r\n"},
                      {"task_id": "H/1", "completion": "    return (\n"},
                      {"task_id": "H/1", "completion": WRONG["raises"]}])
    text = verify(capsys, "--task", "humaneval", "--answers", "h.jsonl", "--references", "refs.jsonl",
                  "--allow-code-execution")
    assert text.startswith("humaneval, h.jsonl: pass@1 0.250 ±0.250 over 2 problems, 4 answers")
    assert "nothing that parses in 1" in text
    write("h.jsonl", [{"task_id": "H/0", "completion": [BODY] + ["    return r\n"] * 9}])
    row = json.loads(verify(capsys, "--task", "humaneval", "--answers", "h.jsonl", "--references", "refs.jsonl",
                            "--allow-code-execution", "--json"))
    assert row["pass@1"] == pytest.approx(0.1) and row["pass@10"] == 1.0 and "pass@100" not in row


def test_no_code_runs_unasked(monkeypatch):
    monkeypatch.setattr("benchmarks.verify.passes", None)
    write("h.jsonl", [{**PROBLEM, "output": BODY}])
    with pytest.raises(UserError, match="--allow-code-execution"):
        eval.main(["verify", "--task", "humaneval", "--answers", "h.jsonl"])


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
    ([GOOD], "--answers a.jsonl --task humaneval --allow-code-execution", "prompt and test and entry_point"),
    ([GOOD], "--answers a.jsonl --task math --allow-code-execution", "leave it out")])
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
