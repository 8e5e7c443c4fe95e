"""TODO"""

import concurrent.futures
import dataclasses
import decimal
import fractions
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import warnings

import torch

import run


NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def gsm8k_answer(text):
    r"""The number that an answer to a GSM8K question ends at, as a Decimal (so 18 = 18.00); None without any number.

    The first number after the last "####" (the data set's own mark), else after the last "answer is", else the last
    number of all. Commas between thousands, currency, units, a percent sign and a full stop do not matter; a hyphen
    after a digit, a letter or a bracket is no sign.

    >>> [str(gsm8k_answer(t)) for t in (r"3+4=7\n#### 1,234", "The answer is $18.00 a day, not 20.", "10-7 = 3 eggs.")]
    ['1234', '18.00', '3']
    >>> gsm8k_answer("the answer is -$5") == -5, gsm8k_answer("no idea")
    (True, None)
    """
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})", ",", text.replace("$", "").replace("−", "-").lower())
    tails = [text.rpartition(mark)[2] for mark in ("####", "answer is") if mark in text]
    numbers = next(filter(None, map(NUMBER.findall, tails)), None) or NUMBER.findall(text)[-1:]
    return decimal.Decimal(numbers[0].replace(",", "")) if numbers else None


def boxed(text):
    r"""What stands in the last \boxed{...} (or \fbox{...}, or `\boxed 5`), braces matched; None if there is none or it
    was cut.

    >>> [boxed(t) for t in (r"\boxed{1}, no: $\boxed{a^{2}}$.", r"\boxed 7$", "7", r"\boxed{\frac{1")]
    ['a^{2}', '7', None, None]
    """
    found = list(re.finditer(r"\\(?:boxed|fbox)(?![a-z])\s*", text))
    rest = text[found[-1].end():] if found else ""
    if not rest.startswith("{"):
        return next(iter(rest.split("$")[0].split()), "").rstrip(".") or None
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", rest):             # an escaped brace is a sign of the formula
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return rest[1:mark.start()].strip()
    return None


MATH_RULES = [(re.compile(pattern), by) for pattern, by in (
    (r"\\[!:;, ]|~|\\q?quad(?![a-z])", " "),                                        # 1  space
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-z])", ""),                               # 2  sizes of brackets
    (r"\\(?:text|mbox|mathrm)\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b", ","),         # 3  lists
    (r"(?<=[\w})])\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?\s*$", ""),            # 4  units
    (r"^(-?[\d.,/]+)\s+[A-Za-z]{2,}[A-Za-z /]*$", r"\1"),
    (r"\\(?:text|textbf|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"),                # 5  letters and words
    (r"\s+", ""),
    (r"\^\{?\\circ\}?|\\degree|°|\\?%", ""),                                        # 6  degrees, percent
    (r"\\[dtc]frac", r"\\frac"),                                                    # 7  \frac12, \frac1{72}
    (r"\\frac(?!\{)(\w)", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})(?!\{)(\w)", r"\1{\2}"),
    (r"\\frac\{-([^{}]*)\}", r"-\\frac{\1}"),
    (r"(?<!\\)sqrt\(([^()]*)\)|√\(?(\w+)\)?", r"\\sqrt{\1\2}"),                     # 8  \sqrt3, sqrt(3)
    (r"\\sqrt(?![\[{])(\w)", r"\\sqrt{\1}"),
)]


def math_value(text):
    r"""What two answers to a MATH problem are compared by: a Fraction, a tuple of such things, or normal LaTeX.

    Dollars go, then MATH_RULES in order: spaces and the sizes of brackets go (1, 2); `and`, `or` become commas (3); a
    unit at the end goes, \text{cm}^2 or plain words after a number (4); other \text{...} is its content (5); degrees
    and percent signs go, so that 50\% is 50, not 1/2 (6); fractions and roots get braces, \dfrac is \frac (7, 8).
    Then `x =` and `x \in` at the front go, a list is cut at its outermost commas, and each part becomes, where it can,
    a number: 1,234 and .5 and 007 and a/b and \frac{a}{b}, compared by value (2/4 = 0.5). Tuples and intervals keep
    their order and brackets; sets and lists without brackets have no order. No algebra: x+1 is not 1+x.

    >>> math_value(r"\dfrac{3}{6}") == math_value("$.50$") == math_value("1/2"), math_value(r"x = 1,\!234\text{ cm}^2")
    (True, Fraction(1234, 1))
    >>> math_value(r"\left( -\infty, \tfrac12 \right]"), math_value("2, 1") == math_value(r"1 \text{ and } 2")
    (('(', '-\\infty', Fraction(1, 2), ']'), True)
    """
    s = text.replace("\\$", "").replace("$", "").strip().rstrip(". ")
    for pattern, by in MATH_RULES:
        s = pattern.sub(by, s)
    s = re.sub(r"^[A-Za-z](?:=|\\in(?![a-z]))", "", s)
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", s):
        return _number(s.replace(",", ""))
    whole = re.fullmatch(r"(\(|\[|\\\{)(.*)(\)|\]|\\\})", s)
    inner = _split(whole[2]) if whole else None
    if inner is None:                                       # no brackets, or they are not each other's: (0,1)\cup(2,3)
        inner, whole = _split(s) or [s], None
    values = [_number(re.sub(r"^[A-Za-z]=", "", part)) for part in inner]
    if len(values) == 1 and (not whole or whole[1] == "("):
        return values[0]                                    # (A) is A
    if not whole or whole[1] == "\\{":
        values.sort(key=str)
    return (whole[1] if whole else "", *values, whole[3] if whole else "")


def _split(s):
    """The parts between commas outside brackets; None where a bracket is closed that was not opened."""
    parts, depth = [""], 0
    for c in s:
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return None
        parts = [*parts, ""] if c == "," and depth == 0 else [*parts[:-1], parts[-1] + c]
    return parts


def _number(s):
    """A Fraction where s is an integer, a decimal, a/b or \\frac{a}{b} (of up to 40 digits each), else s itself."""
    s = re.sub(r"^(-?)([^-+/(),\[\]]+)/([^-+/(),\[\]]+)$", r"\1\\frac{\2}{\3}", s.removeprefix("+"))
    found = re.fullmatch(r"(-?)\\frac\{(\d{1,40})\}\{(\d{1,40})\}", s)
    if found and int(found[3]):
        return fractions.Fraction(int(found[1] + found[2]), int(found[3]))
    return fractions.Fraction(s) if re.fullmatch(r"-?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})", s) else s


def pass_at_k(n, c, k):
    """The chance that k of n answers, drawn without replacement, hold at least one of the c right ones:
    1 - C(n-c, k) / C(n, k), as a product, for the binomials overflow (Chen et al., arXiv 2107.03374).

    >>> pass_at_k(2, 1, 1), pass_at_k(4, 1, 2), pass_at_k(1000, 1, 1000), pass_at_k(9, 0, 5)
    (0.5, 0.5, 1.0, 0.0)
    """
    return 1.0 - math.prod(1 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0


def humaneval_program(problem, text):
    """The source that tests an answer to a HumanEval problem {prompt, test, entry_point}; None if nothing in it parses.

    The code is the first ```python block that defines the function, else the first block, else the text. Where it
    defines the function itself it follows what precedes it in the prompt (imports, helpers); otherwise it continues the
    prompt, up to the first line that begins something new at the margin, its indentation restored if it was stripped.
    """
    prompt, name = problem["prompt"].rstrip("\n") + "\n", problem["entry_point"]
    defined = re.compile(rf"^def {re.escape(name)}\b", re.M)
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.S | re.I)
    code = next(filter(defined.search, blocks), blocks[0] if blocks else text).strip("\n")
    if defined.search(code):
        sources = [prompt[:defined.search(prompt).start()] + code] if defined.search(prompt) else [code]
    else:
        code = code if blocks else re.split(r"\n(?=def |class |if |print\(|#|@|```)", code)[0]
        sources = [prompt + code] * code[:1].isspace() + [prompt + "    " + code.lstrip(),
                                                          prompt + textwrap.indent(textwrap.dedent(code), "    ")]
    for source in sources if code.strip() else ():
        try:
            with warnings.catch_warnings(action="ignore"):                  # of "\d" in the answer, say
                compile(source, "answer", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError):      # ValueError: a NUL or a lone surrogate
            continue
        return f"{source}\n\n{problem['test']}\n\ncheck({name})\n"
    return None


PASSED = 97     # the exit status that means "all tests passed": sys.exit(0) in an answer must not
RUNNER = f"""
import os, sys
try:
    import resource
except ImportError:
    resource = None
for name, most in dict(CPU=10, AS=4 << 30, FSIZE=1 << 20, NPROC=0, CORE=0).items():     # s, bytes, bytes, number, bytes
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    except (AttributeError, ValueError, OSError):                                       # not on this system
        pass
with open("program.py", encoding="utf-8") as file:
    source = file.read()
exec(compile(source, "program.py", "exec"), {{"__name__": "program"}})
os._exit({PASSED})
"""


def passes(source, seconds=10.0):
    """Run generated code in a process of its own: True if it comes to its end within `seconds` of wall-clock time.

    An isolated interpreter (-I, no environment) in a fresh directory and a session of its own, without input, its
    output discarded; at most 10 s of CPU, 4 GiB of memory, files of 1 MiB and no child processes, where the system has
    such limits; the whole process group is killed at the end. This guards against accidents. It is NOT a sandbox: the
    code can read what you can read, reach the network, write elsewhere, leave the group by a setsid of its own, and as
    root it can fork. Run it in a container without network, as a user who owns nothing.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        with open(os.path.join(directory, "program.py"), "w", encoding="utf-8") as file:
            file.write(source)
        process = subprocess.Popen([sys.executable, "-I", "-c", RUNNER], cwd=directory, start_new_session=True,
                                   env={"HOME": directory, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return process.wait(seconds) == PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):       # nobody is left (macOS says the latter)
                pass
            process.wait()


def read_problems(answers, references=""):
    """[(reference row, [answer texts], where)], one a problem, from --answers and, if given, --references.

    An answer stands in `output`, `completion` or `answer_text`, as a text or a list of texts, or in generate_0,
    generate_1, ... (texts or conversations). Rows of one question are one problem with several answers. References are
    found by the question's text (`question`, `prompt` or `instruction`), else by `task_id` or `id`.
    """
    def keys(row):
        return [row[k] for k in ("question", "problem", "prompt", "instruction", "task_id", "id")
                if isinstance(row.get(k), (str, int))]

    known = {key: row for _, row in read_rows("--references", references) for key in keys(row)} if references else None
    problems = {}
    for where, row in read_rows("--answers", answers):
        found = next((row[k] for k in ("output", "completion", "answer_text") if k in row),
                     [row[f"generate_{i}"] for i in range(len(row)) if f"generate_{i}" in row])
        try:
            found = [found] if isinstance(found, str) else found
            texts = [t if isinstance(t, str) else t[-1]["content"] for t in found]
            if not texts or not all(isinstance(t, str) for t in texts):
                raise TypeError
        except (TypeError, KeyError, IndexError):
            raise run.UserError(f"--answers {answers}, {where}: no answer found; every row needs `output`, "
                                "`completion` or `answer_text`, a text or a list of them, or generate_0 ...") from None
        reference = row if known is None else next((known[key] for key in keys(row) if key in known), None)
        if reference is None:
            raise run.UserError(f"--answers {answers}, {where}: --references {references} holds neither its question "
                                "nor its task_id or id; give both files the same")
        key = (keys(reference) or [where])[0]
        problems.setdefault(key, (reference, [], where))[1].extend(texts)
    return list(problems.values())


def check_answer(task, reference, text):
    """Is `text` right? True, False, or None where it holds no answer. reference: the data set's own answer, whole."""
    if task == "gsm8k":
        found, right = gsm8k_answer(text), gsm8k_answer(reference)
    else:
        found, right = boxed(text), math_value(reference if boxed(reference) is None else boxed(reference))
        found = math_value(found) if found else None
    return None if found is None else found == right


@dataclasses.dataclass
class VerifySettings:
    """Flags of `python eval.py verify`."""
    task: str = run.flag("gsm8k", "which rules: gsm8k, math or humaneval", ("gsm8k", "math", "humaneval"))
    answers: str = run.flag("", "answers, .jsonl: output (or completion, answer_text, generate_0 ...) and either the "
                                "reference (`answer`, `reference` or `solution`; humaneval: prompt, test, entry_point) "
                                "or what finds it in --references (needed)")
    references: str = run.flag("", "the data set's own file, .jsonl, where --answers lacks the references")
    allow_code_execution: bool = run.flag(False, "humaneval: run the generated code on this machine, in processes with "
                                                 "limits but no sandbox (use a container)")
    json: bool = run.flag(False, "print the figures as one JSON object")


def verify(argv):
    """The sub-command `verify`: the share of exact answers, or pass@k of generated programs."""
    s = run.parse(VerifySettings, argv, "check answers against exact references; the rules are in eval.py's docstrings")
    if not s.answers:
        raise run.UserError("--answers is needed; give a .jsonl file of answers")
    code = s.task == "humaneval"
    if code != s.allow_code_execution:
        raise run.UserError("--task humaneval runs generated code on this machine, outside any sandbox; give "
                            "--allow-code-execution, best in a container without network" if code else
                            f"--allow-code-execution is for --task humaneval, and {s.task} runs no code; leave it out")
    problems = read_problems(s.answers, s.references)
    columns = ("prompt", "test", "entry_point") if code else ("answer", "reference", "solution")
    for reference, _, where in problems:
        held = [isinstance(reference.get(name), str) for name in columns]
        if not (all if code else any)(held):
            raise run.UserError(f"--answers {s.answers}, {where}: no reference for it"
                                f"{f' in --references {s.references}' if s.references else ''}; every row needs "
                                f"{(' and ' if code else ' or ').join(columns)} as text, here or in --references FILE")
        if s.task == "gsm8k" and gsm8k_answer(next(reference[c] for c, has in zip(columns, held) if has)) is None:
            raise run.UserError(f"--answers {s.answers}, {where}: its reference holds no number; is it --task math?")
    if code:
        sources = [humaneval_program(problem, text) for problem, texts, _ in problems for text in texts]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:      # each only waits for its process
            results = iter(list(run.progress(pool.map(lambda x: x and passes(x), sources), "running", len(sources))))
        marks = [[next(results) for _ in texts] for _, texts, _ in problems]
    else:
        marks = [[check_answer(s.task, next(r[name] for name in columns if isinstance(r.get(name), str)), text)
                  for text in texts] for r, texts, _ in problems]
    print_verified(s, marks)


def print_verified(s, marks):
    """Accuracy (for code pass@1, 10, 100 as far as there are answers) from the marks of each problem's answers."""
    fewest, flat = min(map(len, marks)), sum(marks, [])
    rates = {f"pass@{k}": [pass_at_k(len(m), m.count(True), k) for m in marks] for k in (1, 10, 100) if k <= fewest}
    rates = rates if s.task == "humaneval" else {"accuracy": rates["pass@1"]}
    figures = {"task": s.task, "problems": len(marks), "answers": len(flat), "without_answer": flat.count(None)}
    for name, values in rates.items():
        figures[name], error = mean_and_error(torch.tensor(values))
        figures[name + "_se"] = None if math.isnan(error) else error
    print(json.dumps(figures) if s.json else f"{s.task}, {s.answers}: "
          + ", ".join(f"{name} {figures[name]:.3f}" + (f" ±{figures[name + '_se']:.3f}" if len(marks) > 1 else "")
                      for name in rates)
          + f" over {len(marks)} problems, {len(flat)} answers; "
          + ("nothing that parses" if s.task == "humaneval" else "no answer found")
          + f" in {flat.count(None)} of them")
