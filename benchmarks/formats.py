"""Question files and answer files: every benchmark has a layout of its own, and this file knows them.

    format    a question                                       an answer: `generate` writes it, `judge` reads it
    alpaca    anything that has a prompt                       {dataset, instruction, output, generator}
    mtbench   {question_id, category, turns [2], reference}    {question_id, answer_id, model_id, choices, tstamp}
    arena     {uid, category, prompt}                          {uid, ans_id, model, messages, metadata}
    jsonl     anything that has a prompt                       the question's row, with {prompt, output, generator, ...}

A question is known by its *key*: the instruction itself (alpaca), its id (mtbench, arena) or its place (jsonl). One
small reader per layout turns a row into a key and texts; two loops, `read_questions` and `read_answers`, do the rest.
"""

import dataclasses
import os
import re

import run
from chat import HUB, Prompt, as_row, hub_rows, prompt_of, read_prompts, read_rows, stored, turns_of, without_thinking


# ---------------------------------------------------------------------------------------------------------------------
# questions


@dataclasses.dataclass
class Question:
    """One question of a benchmark."""
    key: str | int              # what an answer is matched by
    turns: list                 # what the user says: one text (or a conversation, chat.Prompt), MT-Bench's two
    category: str               # "" where the file has none
    reference: list | None      # right answers, one for each turn, where the file has them
    row: dict                   # the whole row of the file


def read_questions(path, format):
    """A benchmark's questions: a list of Question.

    path: a .jsonl or .json file, or what else `chat.read_prompts` takes: a .txt or .parquet file, or a hub data set. A
    question that stands twice is dropped in the format alpaca, and refused in mtbench and arena.
    Raises UserError, naming the file and the line.
    """
    read, questions = QUESTION_READERS[format], {}
    for where, row in _question_rows(path):
        key, turns = read(row, path, where)
        if key is None:
            key = len(questions)
        if key in questions and format == "alpaca":
            continue
        if key in questions:
            raise _unusable(path, where, f"the id {key!r} stands twice; give every question an id of its own")
        reference = row.get("reference")
        if isinstance(reference, str):
            reference = [reference]
        elif not isinstance(reference, list):
            reference = None
        questions[key] = Question(key, turns, str(row.get("category", "")), reference, row)
    return list(questions.values())


def _question_rows(path):
    """[(where, row)] of a .jsonl or .json file, of another file of prompts, or of a hub data set."""
    if path.removesuffix(".gz").endswith((".jsonl", ".json")):
        return read_rows("--prompts", path)
    if os.path.exists(path) or not HUB.fullmatch(path):
        return [(f"prompt {i}", as_row(prompt)) for i, prompt in enumerate(read_prompts(path), 1)]
    return [(f"row {i}", dict(row)) for i, row in enumerate(hub_rows(path, "--prompts"), 1)]


def _read_alpaca_question(row, path, where):
    """The instruction is its own key: AlpacaEval's files are joined on it."""
    prompt = prompt_of(row, "--prompts", path, where)
    return prompt, [prompt]


def _read_jsonl_question(row, path, where):
    """No key but the place in the file, so that any file will do."""
    return None, [prompt_of(row, "--prompts", path, where)]


def _read_mtbench_question(row, path, where):
    """Two turns, and one of the ids 81 to 160, from which the category follows."""
    turns = _texts(row.get("turns"))
    if len(turns) != 2:
        raise _unusable(path, where, "no question found; MT-Bench's have `turns`, a list of two texts")
    key = _own_id(row, path, where)
    if type(key) is not int or not 81 <= key <= 160:
        raise _unusable(path, where, f"question_id {key!r} is not MT-Bench's, which are the numbers 81 to 160 and tell "
                                     "the category; give its own question.jsonl")
    return key, turns


def _read_arena_question(row, path, where):
    """A prompt and an id; Arena-Hard v0.1 has `turns`, a list of one text, in place of `prompt`."""
    if "prompt" in row or row.get("turns") is None:
        turns = [prompt_of(row, "--prompts", path, where)]
    else:
        turns = _texts(row["turns"])
    if len(turns) != 1:
        raise _unusable(path, where, "no question found; give it a `prompt`")
    return str(_own_id(row, path, where)), turns


QUESTION_READERS = {"alpaca": _read_alpaca_question, "mtbench": _read_mtbench_question,
                    "arena": _read_arena_question, "jsonl": _read_jsonl_question}


def _texts(turns):
    """The texts of a list of texts or of {content: text}; an empty list for anything else."""
    if not isinstance(turns, list):
        return []
    texts = [turn.get("content") if isinstance(turn, dict) else turn for turn in turns]
    return texts if all(isinstance(text, str) and text.strip() for text in texts) else []


def _own_id(row, path, where):
    for name in ("question_id", "uid", "id"):
        if isinstance(row.get(name), (str, int)):
            return row[name]
    raise _unusable(path, where, "no question_id, uid or id; give every question an id of its own")


def _unusable(path, where, why):
    return run.UserError(f"--prompts {path}, {where}: {why}")


# ---------------------------------------------------------------------------------------------------------------------
# answers


def answer_row(format, name, question, reply):
    """One row of a benchmark's answer file: what the model called `name` replied to a Question.

    reply: what `generate` keeps of an answer, lists with one entry a turn: turns, the texts; tokens, how many were
    sampled; answer_tokens, how many of them are in the text; finish, why it ended, "stop" or "length" (an endpoint may
    have other words). Ids are hashes and the time stamp is 0, so that one seed gives one file, byte for byte.
    """
    text = reply["turns"][0]
    answer_id = f"{run.stream(name, question.key, reply['turns']):016x}"
    if format == "alpaca":
        return {"dataset": question.row.get("dataset", "custom"), "instruction": question.turns[0],
                "output": text, "generator": name}
    if format == "mtbench":
        return {"question_id": question.key, "answer_id": answer_id, "model_id": name,
                "choices": [{"index": 0, "turns": reply["turns"]}], "tstamp": 0.0}
    if format == "arena":
        return {"uid": question.key, "ans_id": answer_id, "model": name,
                "messages": [*turns_of(question.turns[0]), {"role": "assistant", "content": {"answer": text}}],
                "metadata": {"token_len": reply["answer_tokens"][0], **style_counts(text)}}
    return {**question.row, "prompt": stored(question.turns[0]), "output": text, "generator": name,
            "tokens": reply["tokens"][0], "finish": reply["finish"][0]}


def style_counts(text):
    """How much Markdown an answer has: {header_count, list_count, bold_count}, which Arena-Hard's style control reads.

    The rules are those of Arena-Hard-Auto's utils/add_markdown_info.py. What stands inside a code block does not count,
    nor does it anywhere else where the answer repeats it word for word.

    >>> style_counts("# Plan\\n- **buy** it\\n1. pay\\n```\\n# no header\\n```")    # doctest: +NORMALIZE_WHITESPACE
    {'header_count': {'h1': 1, 'h2': 0, 'h3': 0, 'h4': 0, 'h5': 0, 'h6': 0},
     'list_count': {'ordered': 1, 'unordered': 1}, 'bold_count': {'**': 1, '__': 0}}
    """
    for code in re.findall("```([^`]*)```", text):
        text = text.replace(code, "")

    def count(pattern):
        return len(re.findall(pattern, text, re.MULTILINE))

    return {"header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
            "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
            "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")}}


@dataclasses.dataclass
class Answer:
    """What one model answered to one question."""
    turns: list             # its texts: one, MT-Bench's two
    name: str               # the model's
    row: dict               # the whole row of the file


def read_answers(path, flag, mode):
    """{key of the question: Answer} of an answer file, as `judge --mode MODE` needs it: pairwise reads AlpacaEval's
    rows or generate's jsonl, single MT-Bench's, arena Arena-Hard's (v2 or v0.1).

    Raises UserError, naming flag, file and line, for a row that lacks something and for a key that stands twice.
    """
    read, fields = ANSWER_READERS[mode]
    found = {}
    for where, row in read_rows(flag, path):
        try:
            key, turns, name = read(row)
            turns = [turn if isinstance(turn, str) else _content(turn) for turn in turns]
            turns = [without_thinking(turn) if isinstance(turn, str) else turn for turn in turns]
            if not turns or not all(isinstance(text, str) for text in [*turns, name]):
                raise TypeError
            if not isinstance(key, (str, int)):
                raise TypeError
        except (KeyError, TypeError, IndexError, ValueError):
            raise run.UserError(f"{flag} {path}, {where}: no answer that --mode {mode} can read; every row needs "
                                f"{fields}") from None
        key = str(key) if mode == "arena" else key          # as its questions' keys are
        if key in found:
            raise run.UserError(f"{flag} {path}, {where}: {str(key)[:40]!r} is answered twice; remove one of the rows")
        found[key] = Answer(turns, name, row)
    return found


def _content(turn):
    return turn["answer" if "answer" in turn else "content"]


def _read_alpaca_answer(row):
    # generate's jsonl keeps `instruction` without its `input`, but has the whole of it in `prompt`
    prompt = row["prompt" if "prompt" in row else "instruction"]
    return Prompt(prompt) if isinstance(prompt, list) else prompt, [row["output"]], row["generator"]


def _read_mtbench_answer(row):
    return row["question_id"], row["choices"][0]["turns"], row["model_id" if "model_id" in row else "model"]


def _read_arena_answer(row):
    if "choices" in row:                                            # v0.1 had MT-Bench's layout
        return _read_mtbench_answer(row)
    return row["uid"], [row["messages"][-1]["content"]], row["model"]


ANSWER_READERS = {"pairwise": (_read_alpaca_answer, "instruction, output, generator"),
                  "single": (_read_mtbench_answer, "question_id, model_id, choices"),
                  "arena": (_read_arena_answer, "uid, model, messages")}
