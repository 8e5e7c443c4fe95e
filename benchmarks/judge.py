"""TODO"""

import dataclasses
import json
import os
import re

import torch

import run
import model
import rollout
import chat
import prefmodel
from benchmarks import replies


# What judges that read text are asked, and what has to stand in a text given with --judge-prompt. Placeholders are
# filled in one pass, so that an answer which spells one out stays as it is.
JUDGE_PROMPTS = {"pairwise": """\
Two models, called m and M, were given the same instruction. Decide whose answer a careful person would rather have.

# The instruction
{instruction}

# The answer of model m
{output_m}

# The answer of model M
{output_M}

# Your verdict
Go by what the answers are worth to the person who asked, not by their order, and not by length for its own sake. Reply
with one character and nothing else: m if model m's answer is better, M if model M's is.""", "arena": """\
Compare how two assistants, A and B, answered a user. First work out your own answer. Then look in both for what is
wrong, missing or beside the point, and weigh it. Where both are right, prefer the more helpful and the clearer one.

# The user's request
{question}

# Assistant A's answer
{answer_A}

# Assistant B's answer
{answer_B}

# Your verdict
Explain it briefly, and end with exactly one of these labels: [[A>>B]] A is much better, [[A>B]] A is slightly better,
[[A=B]] they are about equal, [[B>A]] B is slightly better, [[B>>A]] B is much better.""", "single": """\
Rate the assistant's last answer in the conversation below: is it correct, helpful, to the point, deep enough, and
original where that was asked for? An earlier answer is there only to make the last one understood.

# The conversation
{conversation}

# For comparison
{reference}

# Your verdict
Explain it in a few sentences. If a correct answer is given for comparison, name the mistakes you find against it. End
with a whole number from 1 (useless) to 10 (excellent) in double brackets, for instance [[5]]."""}
ANSWER_FIELDS = {"pairwise": "instruction, output, generator", "arena": "uid, model, messages",
                 "single": "question_id, model_id, choices"}


def parse_verdict(text):
    """The last [[A>>B]], [[A>B]], [[A=B]], [[B>A]] or [[B>>A]] of a judge's reply, None without one.

    >>> parse_verdict("At first [[A>B]], but B is wrong less often: [[B>A]]")
    'B>A'
    """
    found = re.findall(r"\[\[(A>>B|A>B|A=B|B>A|B>>A)\]\]", text)
    return found[-1] if found else None


def parse_rating(text):
    """The last [[x]] of a judge's reply, a number from 1 to 10; -1 without one (MT-Bench leaves those out).

    >>> parse_rating("Correct, but terse. [[7]]"), parse_rating("Rating: 7"), parse_rating("[[70]]")
    (7.0, -1, -1)
    """
    found = re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", text)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else -1


def read_answers(path, flag, mode):
    """{instruction, uid or question_id: (texts of the turns, who answered)} of a benchmark's answer file.

    pairwise: AlpacaEval's rows, or generate's jsonl; single: MT-Bench's; arena: Arena-Hard's, v2 or v0.1.
    Raises UserError, naming flag, file and line, for a row without these fields and for a key that stands twice.
    """
    found = {}
    for where, row in read_rows(flag, path):
        try:
            if mode == "pairwise":
                key = row["prompt" if "prompt" in row else "instruction"]       # the prompt has the input in it too
                turns, name = [row["output"]], row["generator"]
            elif "choices" in row:
                key, turns = row["question_id"], row["choices"][0]["turns"]
                name = row["model_id" if "model_id" in row else "model"]
            else:
                key, turns, name = str(row["uid"]), [row["messages"][-1]["content"]], row["model"]
            turns = [t if isinstance(t, str) else t["answer" if "answer" in t else "content"] for t in turns]
            if not (turns and all(isinstance(t, str) for t in [*turns, name]) and isinstance(key, (str, int))):
                raise TypeError
        except (KeyError, TypeError, IndexError):
            raise run.UserError(f"{flag} {path}, {where}: no answer that --mode {mode} can read; every row needs "
                                f"{ANSWER_FIELDS[mode]}") from None
        if key in found:
            raise run.UserError(f"{flag} {path}, {where}: {str(key)[:40]!r} is answered twice; remove one of the rows")
        found[key] = turns, name
    return found


@dataclasses.dataclass
class JudgeSettings:
    """Flags of `python eval.py judge`."""
    answers: str = run.flag("", "the answer file to be judged, as generate writes it (needed)")
    reference: str = run.flag("", "whom it plays against: the baseline's answer file (pairwise and arena: needed); "
                                  "single: right answers as an answer file [the questions' own `reference`]")
    mode: str = run.flag("", "pairwise (AlpacaEval: one token, m or M, by its log-probabilities), arena (Arena-Hard: "
                             "A>>B to B>>A, both orders) or single (MT-Bench: 1 to 10 for each turn) (needed)",
                         tuple(JUDGE_PROMPTS))
    judge: str = run.flag("", "who judges (needed): model:DIR_OR_HUB_ID or api:MODEL_NAME; pairwise also pairrm:"
                              "DIR_OR_HUB_ID, reward:DIR_OR_HUB_ID, and oracle or styles (embedded worlds)")
    prompts: str = run.flag("", "the benchmark's questions (arena and single: needed)")
    out: str = run.flag("", "the judgments' file (needed); the same command goes on where it was interrupted")
    judge_prompt: str = run.flag("", "file with another text for judges that read text; its placeholders: " + "; ".join(
        " ".join([mode, *re.findall(r"\{\w+\}", text)]) for mode, text in JUDGE_PROMPTS.items()))
    both_orders: bool = run.flag(False, "pairwise: ask in both orders and take the mean [one order, by lot]")
    base_url: str = run.flag("", "api: an OpenAI-compatible endpoint, key in the environment variable OPENAI_API_KEY "
                                 "[https://api.openai.com/v1]")
    workers: int = run.flag(8, "api: requests under way at once")
    timeout: float = run.flag(120.0, "api: seconds to wait for a reply")
    retries: int = run.flag(5, "api: further attempts after 429, 5xx, a timeout or a reply that is no reply")
    max_new_tokens: int = run.flag(2048, "arena and single: tokens of a judge's reply")
    batch: int = run.flag(64, "judgments between two writes, for judges that run here")
    max_rows: int = run.flag(64, "a judging model's replies sampled at once")
    seed: int = run.flag(0, "seed of the order in which a pair is shown; it depends on the pair, not on its place")
    device: str = run.flag("auto", "cuda, mps or cpu")
    dtype: str = run.flag("auto", "float32 or bfloat16", ("auto", "float32", "bfloat16"))
    json: bool = run.flag(False, "print the report as one JSON object")


def judge_command(argv):
    """The sub-command `judge`: judgments on an answer file, in the format that the benchmark's scoring reads."""
    s = run.parse(JudgeSettings, argv, "judge a benchmark's answers and write its own file of judgments")
    kind, path = _check_judge(s)
    template = JUDGE_PROMPTS[s.mode]
    template = (read_template("--judge-prompt", s.judge_prompt, template, placeholders(template))
                if kind in ("model", "api") else None)
    questions, rows_of = {"pairwise": _pairwise, "arena": _arena, "single": _single}[s.mode](s, template)
    if s.judge in prefmodel.WORLD_JUDGES:
        _check_world(s.judge, [question for question, _ in questions], "--answers")
    ask = {"api": _ask_endpoint, "model": _ask_model}.get(kind, _ask_pair_judge)
    replies = Replies(s.out, s, questions)
    known = len(questions) if replies.report else len(replies.known)
    if not replies.report:
        rows, unreadable = rows_of(replies.collect(len(questions), lambda n: ask(s, path, questions, n), "judging"))
        replies.finish(rows, {"rows": len(rows), "judgments": len(questions), "unreadable": unreadable},
                       as_list=s.mode == "pairwise")
    report = {"out": s.out, "mode": s.mode, "judge": s.judge, **replies.report, "judged_now": len(questions) - known}
    print(json.dumps(report) if s.json else
          "{out}: {rows} rows by {judge} ({judgments} judgments, {judged_now} of them now), {unreadable} without a "
          "readable verdict".format(**report))


def _check_judge(s):
    """(kind, path or name) of the judge. Raises UserError for flags that are missing or do not fit together."""
    _need(s, "answers", "mode", "judge", "out")
    kind, _, path = s.judge.partition(":")
    _need(s, *{"pairwise": ["reference"], "arena": ["reference", "prompts"], "single": ["prompts"]}[s.mode])
    _positive(s, "batch", "max_rows", "workers", "max_new_tokens")
    if not (s.timeout > 0 and s.retries >= 0):
        raise run.UserError(f"--timeout {s.timeout} must be above 0 and --retries {s.retries} not negative")
    of_pairs = s.judge in prefmodel.WORLD_JUDGES or kind in ("pairrm", "reward") and path
    if not of_pairs and not (kind in ("model", "api") and path):
        raise run.UserError(f"--judge {s.judge} is not known; give model:PATH, api:MODEL_NAME, pairrm:PATH, "
                            f"reward:PATH, {' or '.join(prefmodel.WORLD_JUDGES)}")
    wrong = {
        f"--mode {s.mode} needs a judge that writes; give --judge model:PATH or api:MODEL_NAME, or --mode pairwise":
            of_pairs and s.mode != "pairwise",
        "--prompts is for --mode arena and single; leave it out": s.prompts and s.mode == "pairwise",
        f"--judge-prompt is for judges that read text; leave it out with --judge {kind}": of_pairs and s.judge_prompt,
        "--both-orders is for --mode pairwise with a judge that reads text; leave it out, others need no telling":
            s.both_orders and (of_pairs or s.mode != "pairwise"),
        "--base-url is for --judge api:MODEL_NAME; leave it out": s.base_url and kind != "api"}
    for why, is_so in wrong.items():
        if is_so:
            raise run.UserError(why)
    return kind, path


def _matched(answers, others, path, other_path, flag):
    """Raises UserError unless every key of the answers is among the others' (which may have more)."""
    lacking = [key for key in answers if key not in others]
    if lacking:
        raise run.UserError(f"{len(lacking)} of the {len(answers)} questions of --answers {path} are not in {flag} "
                            f"{other_path}, the first is {str(lacking[0])[:40]!r}; give files of the same questions")


def _two_names(ours, theirs, s):
    """Raises UserError where two players who answer differently go by one name: a score could not tell them apart."""
    names = {name for _, name in ours.values()} & {name for _, name in theirs.values()}
    if names and any(turns != theirs[key][0] for key, (turns, _) in ours.items()):
        raise run.UserError(f"--answers {s.answers} and --reference {s.reference} both call their model {names.pop()}, "
                            "and it does not answer alike; tell them apart with generate --name")


def _pairwise(s, template):
    """(questions, rows_of) of AlpacaEval's judging. A reply is the probability that the answer called m is the better
    one, None where it could not be read; for judges of pairs, without template, m is always the model's."""
    ours, theirs = read_answers(s.answers, "--answers", s.mode), read_answers(s.reference, "--reference", s.mode)
    _matched(ours, theirs, s.answers, s.reference, "--reference")
    _two_names(ours, theirs, s)
    datasets = [row.get("dataset", "custom") for _, row in read_rows("--answers", s.answers)]
    questions, ours_is_m = [], []
    for instruction, ((answer,), _) in ours.items():
        (other,), _ = theirs[instruction]
        lot = template is None or bool(run.stream(s.seed, "order", instruction, other, answer) & 1)
        for first in (lot, not lot)[:1 + s.both_orders]:
            m, M = (answer, other) if first else (other, answer)
            ours_is_m.append(first)
            questions.append((instruction, (m, M)) if template is None else
                             fill(template, instruction=instruction, output_m=m, output_M=M))

    def rows_of(shares):
        wins = [None if p is None else p if first else 1 - p for p, first in zip(shares, ours_is_m)]
        rows, n = [], 1 + s.both_orders
        for b, (instruction, ((answer,), name)) in enumerate(ours.items()):
            (other,), other_name = theirs[instruction]
            mine = wins[b * n:(b + 1) * n]
            rows.append({"dataset": datasets[b], "instruction": instruction, "output_1": other,
                         "generator_1": other_name, "output_2": answer, "generator_2": name,
                         "annotator": _judge_name(s), "preference": None if None in mine else 1 + sum(mine) / n})
        return rows, wins.count(None)

    return questions, rows_of


def _arena(s, template):
    """(questions, rows_of) of Arena-Hard's judging: two games a question, the model is B in the first, A in the second.
    A reply is the judge's text."""
    ours, theirs = read_answers(s.answers, "--answers", s.mode), read_answers(s.reference, "--reference", s.mode)
    asked = {q["id"]: q for q in read_questions(s.prompts, s.mode)}
    _matched(ours, theirs, s.answers, s.reference, "--reference")
    _two_names(ours, theirs, s)
    _matched(ours, asked, s.answers, s.prompts, "--prompts")
    questions = []
    for uid, ((answer, *_), _) in ours.items():
        for A, B in ((theirs[uid][0][0], answer), (answer, theirs[uid][0][0])):
            questions.append(fill(template, question=asked[uid]["turns"][0], answer_A=A, answer_B=B))

    def rows_of(texts):
        games = [{"score": parse_verdict(text), "judgment": {"answer": text},
                  "prompt": [{"role": "user", "content": question}]} for text, question in zip(texts, questions)]
        rows = [{"uid": uid, "category": asked[uid]["category"], "judge": _judge_name(s), "model": name,
                 "baseline": theirs[uid][1], "games": games[2 * b:2 * b + 2]}
                for b, (uid, (_, name)) in enumerate(ours.items())]
        return rows, sum(game["score"] is None for game in games)

    return questions, rows_of


def _single(s, template):
    """(questions, rows_of) of MT-Bench's judging: one question for each turn of each answer, the conversation so far
    before it. A reply is the judge's text. Right answers are shown for the categories that have them."""
    ours = read_answers(s.answers, "--answers", s.mode)
    asked = {q["id"]: q for q in read_questions(s.prompts, "mtbench")}
    _matched(ours, asked, s.answers, s.prompts, "--prompts")
    right = {key: q["reference"] for key, q in asked.items()}
    if s.reference:
        right |= {key: turns for key, (turns, _) in read_answers(s.reference, "--reference", s.mode).items()}
    questions, plan = [], []
    for key, (answers, name) in ours.items():
        q = asked[key]
        if len(answers) != 2:
            raise run.UserError(f"--answers {s.answers}: question {key!r} has {len(answers)} turns of 2; generate it "
                                "with --format mtbench")
        shown = right[key] if q["category"] in MT_BENCH_WITH_REFERENCE else None
        for turn in (1, 2):
            talk = [f"[{who}]\n{text}" for pair in zip(q["turns"][:turn], answers) for who, text in
                    zip(("user", "assistant"), pair)]
            reference = [f"[a correct answer to the user's turn {i}]\n{r}" for i, r in zip((1, 2)[:turn], shown or [])]
            questions.append(fill(template, conversation="\n\n".join(talk),
                                   reference="\n\n".join(reference) or "No correct answer is given."))
            plan.append((key, name, turn, ("single-math-v1" if shown else "single-v1") + "-multi-turn" * (turn == 2)))

    def rows_of(texts):
        rows = [{"question_id": key, "model": name, "judge": [_judge_name(s), prompt], "user_prompt": question,
                 "judgment": text, "score": parse_rating(text), "turn": turn, "tstamp": 0.0}
                for (key, name, turn, prompt), question, text in zip(plan, questions, texts)]
        return rows, sum(row["score"] == -1 for row in rows)

    return questions, rows_of


def _judge_name(s):
    """What the files call the judge: an endpoint's model as it is, a checkpoint by the last part of its path."""
    kind, _, path = s.judge.partition(":")
    return path if kind == "api" else os.path.basename(os.path.normpath(path)) if path else kind


def _ask_pair_judge(s, path, questions, numbers):
    """Yields [(number, P(first beats second))] from a judge of pairs."""
    judge = prefmodel.load(s.judge, "pairwise", *run.device_and_dtype(s.device, s.dtype))
    for batch in _batches(numbers, s.batch):
        P = judge.preference([questions[n][0] for n in batch], [list(questions[n][1]) for n in batch])  # [B, 2, 2]
        yield list(zip(batch, P[:, 0, 1].tolist()))


def _ask_model(s, path, questions, numbers):
    """Yields [(number, reply)] from a local model: its text, decoded greedily, or (pairwise) the share of m."""
    net, chat = load(path, *run.device_and_dtype(s.device, s.dtype))
    pairwise = s.mode == "pairwise"
    ids = dict(zip(numbers, chat.encode_all([questions[n] for n in numbers], 0, 1 if pairwise else s.max_new_tokens)))
    labels = [_label_ids(chat.tokenizer, label, path) for label in "mM"] if pairwise else None
    for batch in _batches(numbers, s.batch):
        prompts = [ids[n] for n in batch]
        if pairwise:
            yield list(zip(batch, label_shares(net, prompts, *labels)))
        else:
            samples = rollout.generate(net, prompts, 1, s.max_new_tokens, temperature=0, stop_ids=chat.stop_ids,
                                       max_rows=s.max_rows)
            yield [(n, chat.decode(tokens[0])) for n, tokens in zip(batch, samples.tokens)]


def _label_ids(tokenizer, label, path):
    """The tokens that spell a label, with a space before it or without: which of them an answer begins with depends on
    the tokenizer. Raises UserError if there is none."""
    ids = {tokens[0] for text in (label, " " + label) for tokens in [tokenizer.encode(text, add_special_tokens=False)]
           if len(tokens) == 1 and tokenizer.decode(tokens).strip() == label}
    if not ids:
        raise run.UserError(f"--judge model:{path} has no token for {label!r}; give another judge, or --mode arena")
    return sorted(ids)


@torch.inference_mode()
def label_shares(net, prompts, m, M, top=5, batch_tokens=16384):
    """p(m) / (p(m) + p(M)) for the next token after each of B prompts (lists of ids): a list of B floats in [0, 1].

    m, M: the ids that spell each label; their probabilities add up. None where none of them is among the `top`
    likeliest tokens: a model that would say something else has no opinion to be read (an endpoint shows no more).
    batch_tokens bounds a forward pass.
    """
    shares = [None] * len(prompts)
    for batch in prefmodel.batches_by_length([len(p) for p in prompts], batch_tokens):
        view = model.SharedPrefix([prompts[b] for b in batch], [[] for _ in batch], net.device)
        logits = net.logits(net(view.tokens, view)[view.prompt_last])                       # [B, V]
        likeliest = logits.topk(min(top, logits.shape[-1])).indices
        seen = torch.isin(likeliest, torch.tensor([*m, *M], device=net.device)).any(-1)
        share = torch.sigmoid(logits[:, m].logsumexp(-1) - logits[:, M].logsumexp(-1))
        for b, readable, p in zip(batch, seen.tolist(), share.tolist()):
            shares[b] = p if readable else None
    return shares
