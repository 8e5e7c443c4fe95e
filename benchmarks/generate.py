"""TODO"""

import dataclasses
import itertools
import json
import os

import run
import rollout
import chat
import prefmodel
from benchmarks import judge, replies


MT_BENCH_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0.0,
                         "math": 0.0, "coding": 0.0, "reasoning": 0.0}
MT_BENCH_WITH_REFERENCE = ("math", "reasoning", "coding")       # categories whose answers can be right or wrong
MAX_NEW_TOKENS = {"alpaca": 2048, "mtbench": 1024, "arena": 4096, "jsonl": 1024}
DECODING = {"lsp": {"temperature": 0.01, "top_p": 1.0},         # the papers' evaluations
            "mistral-7b": {"temperature": 0.7, "top_p": 0.9}, "llama-3-8b": {"temperature": 0.9, "top_p": 1.0}}


def read_questions(path, format):
    """A benchmark's questions: [{id, turns (texts), category, reference (texts or None), row}].

    alpaca and jsonl take whatever `read_prompts` takes, one turn (alpaca drops duplicates, for its files are joined on
    the instruction); mtbench needs question_id (or id) and two turns, arena uid (or question_id, id) and prompt.
    Raises UserError, naming the file and the line.
    """
    if path.removesuffix(".gz").endswith((".jsonl", ".json")):
        rows = read_rows("--prompts", path)
    elif os.path.exists(path):
        rows = [(f"prompt {i}", {"prompt": prompt}) for i, prompt in enumerate(read_prompts(path), 1)]
    else:
        rows = [(f"row {i}", dict(row)) for i, row in enumerate(_hub_rows(path, "--prompts"), 1)]
    questions = {}
    for where, row in rows:
        turns = row.get("turns") if format == "mtbench" or format == "arena" and "prompt" not in row else None
        turns = [_prompt(row, "--prompts", path, where)] if turns is None and format != "mtbench" else turns
        turns = [t.get("content") if isinstance(t, dict) else t for t in turns] if isinstance(turns, list) else []
        if len(turns) != (2 if format == "mtbench" else 1) or not all(isinstance(t, str) and t.strip() for t in turns):
            raise run.UserError(f"--prompts {path}, {where}: no question found; " + (
                "MT-Bench's have `turns`, a list of two texts" if format == "mtbench" else "give it a `prompt`"))
        ids = [row[name] for name in ("question_id", "uid", "id") if isinstance(row.get(name), (str, int))]
        if format == "mtbench" and ids and (type(ids[0]) is not int or not 81 <= ids[0] <= 160):
            raise run.UserError(f"--prompts {path}, {where}: question_id {ids[0]!r} is not MT-Bench's, which are the "
                                "numbers 81 to 160 and tell the category; give its own question.jsonl")
        ids = list(map(str, ids)) if format == "arena" else ids
        key = turns[0] if format == "alpaca" else len(questions) if format == "jsonl" else ids[0] if ids else None
        if key is None or format in ("mtbench", "arena") and key in questions:
            wrong = "no question_id, uid or id" if key is None else f"the id {key!r} stands twice"
            raise run.UserError(f"--prompts {path}, {where}: {wrong}; give every question an id of its own")
        reference = row.get("reference")
        reference = [reference] if isinstance(reference, str) else reference if isinstance(reference, list) else None
        questions.setdefault(key, {"id": key, "turns": turns, "category": str(row.get("category", "")),
                                   "reference": reference, "row": row})
    return list(questions.values())


@dataclasses.dataclass
class GenerateSettings:
    """Flags of `python eval.py generate`."""
    model: str = run.flag("", "checkpoint directory or hub id that answers (needed)")
    prompts: str = run.flag("", "the questions, .jsonl or .json; alpaca and jsonl take any prompts file (needed)")
    format: str = run.flag("", "whose answer file is written: alpaca (AlpacaEval's model_outputs.json), mtbench (two "
                               "turns), arena (Arena-Hard), or jsonl (the questions' rows with `output`) (needed)",
                           tuple(MAX_NEW_TOKENS))
    out: str = run.flag("", "the answer file (needed); the same command goes on where it was interrupted")
    name: str = run.flag("", "the model's name in the file [the last part of --model]")
    preset: str = run.flag("", "the decoding of a paper's evaluation: LSP's, or SPPO's for one of its models",
                           tuple(DECODING))
    temperature: float | None = run.flag(None, "sampling temperature, 0 is greedy; given, or set by --preset, it holds "
                                               "for MT-Bench too [MT-Bench: by category, else 0]")
    top_p: float = run.flag(1.0, "nucleus, in (0, 1]")
    max_new_tokens: int = run.flag(0, "tokens an answer may have; 0: " +
                                   ", ".join(f"{n} for {name}" for name, n in MAX_NEW_TOKENS.items()))
    best_of: int = run.flag(1, "answers drawn to a question, of which --judge picks the one that is kept")
    judge: str = run.flag("", "who picks: by reward (reward:DIR_OR_HUB_ID, oracle) or by mean Phat among the N (pairrm:"
                              "DIR_OR_HUB_ID, styles)")
    batch: int = run.flag(64, "questions answered between two writes: what an interruption costs at most")
    max_rows: int = run.flag(256, "answers sampled at once")
    seed: int = run.flag(0, "an answer's randomness depends on it and on the question's place in the file")
    device: str = run.flag("auto", "cuda, mps or cpu")
    dtype: str = run.flag("auto", "float32 or bfloat16", ("auto", "float32", "bfloat16"))
    json: bool = run.flag(False, "print the report as one JSON object")


def generate_command(argv):
    """The sub-command `generate`: a model's answers to a benchmark's questions, in the benchmark's own format."""
    s = run.parse(GenerateSettings, argv, "answer a benchmark's questions and write its own answer file", DECODING)
    _need(s, "model", "prompts", "format", "out")
    _positive(s, "best_of", "batch", "max_rows")
    check_sampling(s.temperature or 0.0, s.top_p)
    if s.max_new_tokens < 0:
        raise run.UserError(f"--max-new-tokens {s.max_new_tokens} must not be negative; 0 takes the default")
    if (s.best_of > 1) != bool(s.judge):
        raise run.UserError("--best-of N and --judge go together; give both (N above 1) or neither")
    if s.best_of > 1 and (s.format == "mtbench" or not s.temperature):
        raise run.UserError(f"--best-of {s.best_of} " + (
            "is for questions of one turn; leave it out with --format mtbench" if s.format == "mtbench" else
            "needs answers that differ; give --temperature above 0 or --preset"))
    s = dataclasses.replace(s, name=s.name or os.path.basename(os.path.normpath(s.model)),
                            max_new_tokens=s.max_new_tokens or MAX_NEW_TOKENS[s.format])
    questions = read_questions(s.prompts, s.format)
    _check_world(s.judge, [q["turns"][0] for q in questions], "--prompts")
    replies = Replies(s.out, s, [q["row"] for q in questions])
    known = len(questions) if replies.report else len(replies.known)
    if not replies.report:
        answers = replies.collect(len(questions), lambda numbers: _answers(s, questions, numbers), "answering")
        length = sum(len(text) for a in answers for text in a["turns"]) / sum(len(a["turns"]) for a in answers)
        replies.finish([_answer_row(s.format, s.name, q, a) for q, a in zip(questions, answers)],
                       {"questions": len(questions), "mean_characters": length,
                        "cut": sum(a["finish"].count("length") for a in answers)}, as_list=s.format == "alpaca")
    report = {"out": s.out, "model": s.name, **replies.report, "answered_now": len(questions) - known}
    print(json.dumps(report) if s.json else
          "{out}: {model}'s answers to {questions} questions ({answered_now} of them now), {mean_characters:.0f} "
          "characters on average, {cut} cut at --max-new-tokens".format(**report))


def _answers(s, questions, numbers):
    """Yields [(number, reply)] batch by batch, reply = {turns: texts, tokens: counts, finish: stop or length}, a turn
    each."""
    device, dtype = run.device_and_dtype(s.device, s.dtype)
    net, chat = load(s.model, device, dtype)
    judge = prefmodel.load(s.judge, "pairwise", device, dtype) if s.judge else None
    for n in numbers:                       # before anything is generated: does the longest conversation fit?
        turns = questions[n]["turns"]
        _encode_talk(chat, turns, [""] * (len(turns) - 1), s.max_new_tokens * len(turns))
    for batch in _batches(numbers, s.batch):
        replies = {n: {"turns": [], "tokens": [], "finish": []} for n in batch}
        temperature = {n: MT_BENCH_TEMPERATURES.get(questions[n]["category"], 0.7) if s.format == "mtbench" else 0.0
                       for n in batch} if s.temperature is None else dict.fromkeys(batch, s.temperature)
        for turn in range(len(questions[batch[0]]["turns"])):
            for T in sorted(set(temperature.values())):
                mine = [n for n in batch if temperature[n] == T]
                _answer_turn(net, chat, judge, s, T, turn, {n: questions[n]["turns"] for n in mine}, replies)
        yield list(replies.items())


def _answer_turn(net, chat, judge, s, temperature, turn, questions, replies):
    """Sample one turn of {number: turns} at one temperature, choose the best of N, and append to {number: reply}."""
    ids = [_encode_talk(chat, turns[:turn + 1], replies[n]["turns"], 1) for n, turns in questions.items()]
    limits = [[min(s.max_new_tokens, chat.context - len(i))] * s.best_of for i in ids]
    samples = rollout.generate(net, ids, s.best_of, limits, temperature=temperature, top_p=s.top_p,
                               stop_ids=chat.stop_ids, max_rows=s.max_rows,
                               seeds=[run.stream(s.seed, "answer", n, turn) for n in questions])
    texts = [[chat.decode(tokens) for tokens in group] for group in samples.tokens]
    best = [0] * len(texts)
    if judge is not None:
        asked = [turns[0] for turns in questions.values()], texts
        scores = judge.reward(*asked) if hasattr(judge, "reward") else prefmodel.phat(judge.preference(*asked))
        best = scores.argmax(1).tolist()                                    # [B, N] -> [B], the first of equals
    for b, (n, k) in enumerate(zip(questions, best)):
        replies[n]["turns"].append(texts[b][k])
        replies[n]["tokens"].append(len(samples.tokens[b][k]))
        replies[n]["finish"].append(samples.finish[b][k])


def _encode_talk(chat, questions, answers, room):
    """Ids of a conversation of n questions and n - 1 answers, the assistant's header included. Earlier answers go in as
    text, which is what the benchmark keeps and its judge reads. UserError without `room` for so many tokens more."""
    talk = [{"role": role, "content": text} for pair in itertools.zip_longest(questions, answers)
            for role, text in zip(("user", "assistant"), pair) if text is not None]
    ids = chat.tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False,
                                             **prefmodel.TEMPLATE_DATE)
    if len(ids) + room > chat.context:
        raise run.UserError(f"the question {questions[0][:40]!r} takes {len(ids)} tokens and its answers up to {room}, "
                            f"beyond the context of {chat.context}; lower --max-new-tokens or leave the question out")
    return ids


def _answer_row(format, name, question, reply):
    """One row of a benchmark's answer file. Ids are hashes and the time stamp is 0, so that a seed gives one file."""
    text, key = reply["turns"][0], f"{run.stream(name, question['id'], reply['turns']):016x}"
    if format == "alpaca":
        return {"dataset": question["row"].get("dataset", "custom"), "instruction": question["turns"][0],
                "output": text, "generator": name}
    if format == "mtbench":
        return {"question_id": question["id"], "answer_id": key, "model_id": name,
                "choices": [{"index": 0, "turns": reply["turns"]}], "tstamp": 0.0}
    if format == "arena":
        return {"uid": question["id"], "ans_id": key, "model": name,
                "messages": [{"role": "user", "content": question["turns"][0]},
                             {"role": "assistant", "content": {"answer": text}}],
                "metadata": {"token_len": reply["tokens"][0]}}
    return {**question["row"], "prompt": question["turns"][0], "output": text, "generator": name,
            "tokens": reply["tokens"][0], "finish": reply["finish"][0]}
