"""`python eval.py judge`: judgments on an answer file, in the format that the benchmark's scoring reads.

    --mode     a question to the judge                               its reply
    pairwise   one prompt and two answers, called m and M            the probability of m          AlpacaEval
    arena      the same, called A and B, put in both orders          a text with one of A>>B ...   Arena-Hard
    single     a conversation up to one of its turns                 a text with [[1]] to [[10]]   MT-Bench

Each mode is a class below: `.questions` is what is to be asked, and `.rows(replies)` makes the benchmark's own rows of
the replies. Who is asked is the other choice, --judge: a model that runs here or an endpoint, which read text, or one
of prefmodel.py's judges of pairs. A reply that cannot be read is kept as such, counted, and left out of the scores.

On disk a reply is {"says": a text, or the probability of m, or null; "prompt_tokens", "completion_tokens"}, so that
the report can say what the judging cost, also after an interruption.
"""

import dataclasses
import json
import os
import re
import sys

import torch

import flags
import model
import prefmodel
import rollout
import run
import winrate
from benchmarks.endpoint import Endpoint, EndpointSettings
from benchmarks.formats import read_answers, read_questions
from benchmarks.replies import Replies, batches
from chat import Prompt, fill, load_checkpoint, placeholders, read_template, read_text, without_thinking
from flags import flag


# ---------------------------------------------------------------------------------------------------------------------
# what judges that read text are asked, in this project's own words with the benchmarks' labels
#
# The example of a rating holds no digit: a judge that repeats it has not rated yet, and the first rating counts.
# The names in curly brackets are what a text given with --judge-prompt has to hold too. They are filled in one pass, so
# that an answer which spells one out stays as it is.

PAIRWISE_PROMPT = """\
Two models, called m and M, were given the same instruction. Decide whose answer a careful person would rather have.

# The instruction
{instruction}

# The answer of model m
{output_m}

# The answer of model M
{output_M}

# Your verdict
Go by what the answers are worth to the person who asked, not by their order, and not by length for its own sake. Reply
with one character and nothing else: m if model m's answer is better, M if model M's is."""

ARENA_PROMPT = """\
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
[[A=B]] they are about equal, [[B>A]] B is slightly better, [[B>>A]] B is much better."""

SINGLE_PROMPT = """\
Rate the assistant's last answer in the conversation below: is it correct, helpful, to the point, deep enough, and
original where that was asked for? An earlier answer is there only to make the last one understood.

# The conversation
{conversation}

# For comparison
{reference}

# Your verdict
Explain it in a few sentences. If a correct answer is given for comparison, name the mistakes you find against it. End
with your rating, a whole number from 1 (useless) to 10 (excellent), in double brackets and nowhere else: [[rating]]."""

JUDGE_PROMPTS = {"pairwise": PAIRWISE_PROMPT, "arena": ARENA_PROMPT, "single": SINGLE_PROMPT}
MAX_TOKENS = 2048                                               # of a judge's reply, FastChat's
MT_BENCH_WITH_REFERENCE = ("math", "reasoning", "coding")       # categories whose answers can be right or wrong


# ---------------------------------------------------------------------------------------------------------------------
# the command


@dataclasses.dataclass
class JudgeSettings(EndpointSettings):
    """Flags of `python eval.py judge`."""
    COMMAND = "eval.py judge"
    answers: str = flag("", "the answer file to be judged, as generate writes it (needed)", needed=True)
    reference: str = flag("", "whom it plays against: the baseline's answer file (pairwise and arena: needed); "
                              "single: right answers as an answer file [the questions' own `reference`]")
    mode: str = flag("", "pairwise (AlpacaEval: one token, m or M, by its log-probabilities), arena (Arena-Hard: "
                         "A>>B to B>>A, both orders) or single (MT-Bench: 1 to 10 for each turn) (needed)",
                     tuple(JUDGE_PROMPTS), needed=True)
    judge: str = flag("", "who judges (needed): model:DIR_OR_HUB_ID or api:MODEL_NAME; pairwise also pairrm:"
                          "DIR_OR_HUB_ID, reward:DIR_OR_HUB_ID, python:FILE.py:FUNCTION, and oracle or styles "
                          "(embedded worlds)",
                      needed=True)
    prompts: str = flag("", "the benchmark's questions (arena and single: needed)")
    out: str = flag("", "the judgments' file (needed); the same command goes on where it was interrupted",
                    needed=True)
    judge_prompt: str = flag("", "file with another text for judges that read text; its placeholders: " + "; ".join(
        " ".join([mode, *re.findall(r"\{\w+\}", text)]) for mode, text in JUDGE_PROMPTS.items()))
    judge_system: str = flag("", "file with a system prompt for judges that read text [none]")
    judge_max_tokens: int | None = flag(None, "arena and single: tokens of a judge's reply, its thinking included "
                                              f"[{MAX_TOKENS}]", at_least=1)
    both_orders: bool = flag(False, "pairwise: ask in both orders and take the mean [one order, by lot]")
    batch: int = flag(64, "judgments between two writes, for judges that run here", at_least=1)
    max_rows: int = flag(64, "a judging model's replies sampled at once", at_least=1)
    seed: int = flag(0, "seed of the order in which a pair is shown; it depends on the pair, not on its place")
    device: str = flag("auto", "cuda, mps or cpu")
    dtype: str = flag("auto", "float32 or bfloat16", ("auto", "float32", "bfloat16"))
    json: bool = flag(False, "print the report as one JSON object")


def main(argv):
    """Judge every answer that has no judgment yet, and write --out when all have one."""
    args = flags.parse(JudgeSettings, argv, "judge a benchmark's answers and write its own file of judgments")
    kind, path = _check_judge(args)
    args = dataclasses.replace(args, judge_max_tokens=args.judge_max_tokens or MAX_TOKENS)
    task = MODES[args.mode](args, _poser(args) if kind in ("model", "api") else None)
    questions = task.questions
    ask = {"model": _ask_model, "api": _ask_endpoint}.get(kind, _ask_judge_of_pairs)
    replies = Replies(args.out, args, questions)
    now = len(replies.missing(len(questions)))
    if not replies.report:
        found = replies.collect(len(questions), lambda n: ask(args, path, questions, n), "judging")
        rows, counts = task.rows([reply["says"] for reply in found])
        replies.finish(rows, {"rows": len(rows), "judgments": len(questions), **counts, **_spent(found)},
                       as_list=args.mode == "pairwise")
    report = {"out": args.out, "mode": args.mode, "judge": args.judge, **replies.report, "judged_now": now}
    print(json.dumps(report) if args.json else _as_text(report))
    if 2 * report["unreadable"] > report["judgments"]:
        print("warning: more than half of the verdicts could not be read; give the judge another --judge-prompt, more "
              "--judge-max-tokens, or --template-option enable_thinking=false", file=sys.stderr)


def _check_judge(args):
    """(kind, path or name) of the judge. Raises UserError for flags that are missing or do not fit together."""
    for name in {"pairwise": ["reference"], "arena": ["reference", "prompts"], "single": ["prompts"]}[args.mode]:
        if not getattr(args, name):
            raise run.UserError(f"--{name} is needed with --mode {args.mode} and was not given; --help says what it is")
    kind, _, path = args.judge.partition(":")
    reads_text = kind in ("model", "api") and bool(path)
    of_pairs = kind in ("pairrm", "reward", "python") and bool(path) or prefmodel.world_of(args.judge) is not None
    if not reads_text and not of_pairs:
        raise run.UserError(f"--judge {args.judge} is not known; give model:PATH, api:MODEL_NAME, pairrm:PATH, "
                            f"reward:PATH, python:FILE.py:FUNCTION, {' or '.join(prefmodel.WORLD_JUDGES)}")
    if of_pairs and args.mode != "pairwise":
        raise run.UserError(f"--mode {args.mode} needs a judge that writes; give --judge model:PATH or api:MODEL_NAME, "
                            "or --mode pairwise")
    if args.prompts and args.mode == "pairwise":
        raise run.UserError("--prompts is for --mode arena and single; leave it out")
    for name in ("judge_prompt", "judge_system", "template_option"):
        if of_pairs and getattr(args, name):
            raise run.UserError(f"--{name.replace('_', '-')} is for judges that read text; leave it out with --judge "
                                f"{kind}")
    if args.judge_max_tokens and args.mode == "pairwise":
        raise run.UserError("--judge-max-tokens is for --mode arena and single, a pairwise verdict is one token; leave "
                            "it out")
    if args.both_orders and (of_pairs or args.mode != "pairwise"):
        raise run.UserError("--both-orders is for --mode pairwise with a judge that reads text; leave it out, others "
                            "need no telling")
    if args.base_url and kind != "api":
        raise run.UserError("--base-url is for --judge api:MODEL_NAME; leave it out")
    return kind, path


def _poser(args):
    """A function of the placeholders' values that makes a question for a judge that reads text: a conversation (Prompt)
    of --judge-system, if any, and one user turn out of --judge-prompt. No value can write a heading of that prompt: an
    answer's "# Your verdict" becomes "#  Your verdict"."""
    default = JUDGE_PROMPTS[args.mode]
    template = read_template("--judge-prompt", args.judge_prompt, default, placeholders(default))
    system = read_text("--judge-system", args.judge_system).strip() if args.judge_system else ""
    before = [{"role": "system", "content": system}] if system else []
    headings = [re.escape(line.strip()) for line in template.split("\n") if line.startswith("#")]
    pattern = re.compile(rf"(?m)^(?={'|'.join(headings)})#" if headings else "(?!)")

    def pose(**values):
        values = {name: pattern.sub("# ", text) for name, text in values.items()}
        return Prompt([*before, {"role": "user", "content": fill(template, **values)}])
    return pose


def _spent(found):
    """How many tokens the judge read and wrote in all replies; None where no reply says it."""
    spent = {}
    for name in ("prompt_tokens", "completion_tokens"):
        known = [reply[name] for reply in found if reply.get(name) is not None]
        spent[name] = sum(known) if known else None
    return spent


def _as_text(report):
    parts = ["{out}: {rows} rows by {judge} ({judgments} judgments, {judged_now} of them now), {unreadable} without a "
             "readable verdict"]
    if report.get("identical"):
        parts.append("{identical} pairs of identical answers not asked about")
    if report["prompt_tokens"] is not None:
        parts.append("{prompt_tokens} tokens read and {completion_tokens} written")
    return ", ".join(parts).format(**report)


# ---------------------------------------------------------------------------------------------------------------------
# what a judge's text says


LABELS = r"A(?:>>|>|=|<|<<)B|B(?:>>|>|=|<|<<)A"


def parse_verdict(text):
    """The label of an Arena-Hard judge's reply: A>>B, A>B, A=B, B>A or B>>A, or one of the same turned round (A<B is
    B>A; arena.py knows them all). None without one.

    As Arena-Hard v2.0's get_score: letters of either case, the last label in double brackets, and only where there is
    none the last in single ones. v0.1 wanted upper case and double brackets, and all labels of a reply to be the same.
    Beyond both, what is no label, such as [[A]] or [B], is passed over, and thinking is not read.

    >>> parse_verdict("At first [[A>B]], but B is wrong less often: [[b>a]]"), parse_verdict("[A>B], no: [A<<B].")
    ('B>A', 'A<<B')
    """
    text = without_thinking(text).upper()
    for pattern in (rf"\[\[({LABELS})\]\]", rf"\[({LABELS})\]"):
        found = re.findall(pattern, text)
        if found:
            return found[-1]
    return None


def parse_rating(text):
    """The rating in an MT-Bench judge's reply, a number from 1 to 10; -1 without one (MT-Bench leaves those out).

    As FastChat's run_judge_single: the first [[x]], and only where there is none the first [x]. Beyond it, a number
    that is no rating counts as none, and thinking is not read.

    >>> [parse_rating(text) for text in ("Correct, but terse. [[7]]", "Rating: [7.5]", "7", "[[70]]")]
    [7.0, 7.5, -1, -1]
    """
    text = without_thinking(text)
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    return float(found[1]) if found and 1 <= float(found[1]) <= 10 else -1


# ---------------------------------------------------------------------------------------------------------------------
# the three modes: what is asked, and what the replies become


class Pairwise:
    """AlpacaEval: which of two answers is better? A reply is the probability that the answer called m is, or None.

    Which answer is m is drawn by lot for each pair, because judges favour a place; with --both-orders a pair is asked
    twice. For judges of pairs, which read both orders themselves, m is always the model's, and a question is
    (instruction, (m, M)) in place of a text. Two answers that are the same are a tie without being asked about, as in
    alpaca_eval, whatever the judge.
    """

    def __init__(self, args, pose):
        self.args = args
        self.ours, self.theirs = _two_players(args)
        winrate.check_world_prompts(args.judge, list(self.ours), "--answers")
        self.questions, self.asked_about = [], []       # asked_about: (instruction, whether our answer is m)
        for instruction, mine in self.ours.items():
            answer, other = mine.turns[0], self.theirs[instruction].turns[0]
            first = pose is None or bool(run.stream(args.seed, "order", instruction, other, answer) & 1)
            orders = [first, not first] if args.both_orders else [first]
            for ours_is_m in orders if answer != other else []:
                m, M = (answer, other) if ours_is_m else (other, answer)
                self.asked_about.append((instruction, ours_is_m))
                self.questions.append(pose(instruction=instruction, output_m=m, output_M=M) if pose else
                                      (instruction, (m, M)))

    def rows(self, replies):
        """(AlpacaEval's annotations, counts). A preference of 2 means that the model wins, 1.5 a tie, as of identical
        answers; null where one of its replies could not be read."""
        wins = {instruction: [] for instruction in self.ours}
        for p, (instruction, ours_is_m) in zip(replies, self.asked_about):
            wins[instruction].append(p if p is None or ours_is_m else 1 - p)
        rows = []
        for instruction, mine in self.ours.items():
            other, of_this_pair = self.theirs[instruction], wins[instruction] or [0.5]
            share = None if None in of_this_pair else sum(of_this_pair) / len(of_this_pair)
            rows.append({"dataset": mine.row.get("dataset", "custom"), "instruction": instruction,
                         "output_1": other.turns[0], "generator_1": other.name,
                         "output_2": mine.turns[0], "generator_2": mine.name, "annotator": _judge_name(self.args),
                         "preference": None if share is None else 1 + share})
        return rows, {"unreadable": replies.count(None), "identical": sum(not asked for asked in wins.values())}


class Arena:
    """Arena-Hard: two games a question, the model is B in the first, A in the second. A reply is the judge's text."""

    def __init__(self, args, pose):
        self.args = args
        self.ours, self.theirs = _two_players(args)
        self.asked = _asked(args, "arena", self.ours)
        self.questions = []
        for uid, mine in self.ours.items():
            answer, other = mine.turns[0], self.theirs[uid].turns[0]
            for A, B in ((other, answer), (answer, other)):
                self.questions.append(pose(question=self.asked[uid].turns[0], answer_A=A, answer_B=B))

    def rows(self, replies):
        """(Arena-Hard's judgments, counts); a score is null where its label is missing."""
        games = [{"score": parse_verdict(text), "judgment": {"answer": text},
                  "prompt": question.turns} for text, question in zip(replies, self.questions)]
        rows = []
        for b, (uid, mine) in enumerate(self.ours.items()):
            rows.append({"uid": uid, "category": self.asked[uid].category, "judge": _judge_name(self.args),
                         "model": mine.name, "baseline": self.theirs[uid].name, "games": games[2 * b:2 * b + 2]})
        return rows, {"unreadable": sum(game["score"] is None for game in games)}


class Single:
    """MT-Bench: a question for each of an answer's two turns, the conversation so far before it. A reply is the judge's
    text. Right answers are shown for the categories that have them."""

    def __init__(self, args, pose):
        self.args = args
        ours = read_answers(args.answers, "--answers", args.mode)
        asked = _asked(args, "mtbench", ours)
        right = {key: question.reference for key, question in asked.items()}
        if args.reference:
            given = read_answers(args.reference, "--reference", args.mode)
            right |= {key: answer.turns for key, answer in given.items()}
        self.questions, self.plan = [], []
        for key, mine in ours.items():
            if len(mine.turns) != 2:
                raise run.UserError(f"--answers {args.answers}: question {key!r} has {len(mine.turns)} turns of 2; "
                                    "generate it with --format mtbench")
            shown = right[key] if asked[key].category in MT_BENCH_WITH_REFERENCE else None
            prompt_name = "single-math-v1" if shown else "single-v1"        # FastChat's names for the two cases
            for turn in (1, 2):
                conversation = _conversation(asked[key].turns[:turn], mine.turns[:turn])
                self.questions.append(pose(conversation=conversation, reference=_reference(shown, turn)))
                self.plan.append((key, mine.name, turn, prompt_name + ("-multi-turn" if turn == 2 else "")))

    def rows(self, replies):
        """(MT-Bench's judgments, counts); a score is -1 where it could not be read."""
        rows = []
        for (key, name, turn, prompt_name), question, text in zip(self.plan, self.questions, replies):
            rows.append({"question_id": key, "model": name, "judge": [_judge_name(self.args), prompt_name],
                         "user_prompt": question.turns[-1]["content"], "judgment": text, "score": parse_rating(text),
                         "turn": turn, "tstamp": 0.0})
        return rows, {"unreadable": sum(row["score"] == -1 for row in rows)}


MODES = {"pairwise": Pairwise, "arena": Arena, "single": Single}


def _conversation(questions, answers):
    """Turns as one text, a heading before each, which no turn's own text can write.

    >>> print(_conversation(["Why?"], ["So.\\n\\n[user]\\nBye."]))
    [user]
    Why?
    <BLANKLINE>
    [assistant]
    So.
    <BLANKLINE>
    [user ]
    Bye.
    """
    talk = []
    for pair in zip(questions, answers):
        for role, text in zip(("user", "assistant"), pair):
            talk.append(f"[{role}]\n" + re.sub(r"(?m)^\[(user|assistant)\]", r"[\1 ]", text))
    return "\n\n".join(talk)


def _reference(shown, turn):
    """The right answers up to a turn as text; shown: those of both turns, or None."""
    texts = [f"[a correct answer to the user's turn {i}]\n{text}" for i, text in enumerate((shown or [])[:turn], 1)]
    return "\n\n".join(texts) or "No correct answer is given."


def _two_players(args):
    """(the answers to be judged, those they play against). Raises UserError unless there is one against each, and where
    two players who answer differently go by one name: a score could not tell them apart."""
    ours = read_answers(args.answers, "--answers", args.mode)
    theirs = read_answers(args.reference, "--reference", args.mode)
    _check_matched(args, ours, theirs, "--reference", args.reference)
    names = {answer.name for answer in ours.values()} & {answer.name for answer in theirs.values()}
    if names and any(answer.turns != theirs[key].turns for key, answer in ours.items()):
        raise run.UserError(f"--answers {args.answers} and --reference {args.reference} both call their model "
                            f"{names.pop()}, and it does not answer alike; tell them apart with generate --name")
    return ours, theirs


def _asked(args, format, ours):
    """{key: Question} of --prompts, every answered one among them; else UserError."""
    asked = {question.key: question for question in read_questions(args.prompts, format)}
    _check_matched(args, ours, asked, "--prompts", args.prompts)
    return asked


def _check_matched(args, ours, others, flag, path):
    lacking = [key for key in ours if key not in others]
    if lacking:
        raise run.UserError(f"{len(lacking)} of the {len(ours)} questions of --answers {args.answers} are not in "
                            f"{flag} {path}, the first is {str(lacking[0])[:40]!r}; give files of the same questions")


def _judge_name(args):
    """What the files call the judge: an endpoint's model as it is, a checkpoint by the last part of its path."""
    kind, _, path = args.judge.partition(":")
    if kind == "api":
        return path
    return os.path.basename(os.path.normpath(path)) if path else kind


# ---------------------------------------------------------------------------------------------------------------------
# asking: each yields lists of (number, reply) for the questions with these numbers


def _ask_judge_of_pairs(args, path, questions, numbers):
    """By prefmodel's judges: a reply says P(first beats second)."""
    judge = prefmodel.load(args.judge, "pairwise", *run.device_and_dtype(args.device, args.dtype))
    for batch in batches(numbers, args.batch):
        prompts, pairs = [questions[n][0] for n in batch], [list(questions[n][1]) for n in batch]
        P = judge.preference(prompts, pairs)                                                    # [B, 2, 2]
        yield [(n, {"says": p}) for n, p in zip(batch, P[:, 0, 1].tolist())]


def _ask_endpoint(args, name, questions, numbers):
    """By a model behind an address: a reply says its text, or (pairwise) the share of m."""
    endpoint = Endpoint("--judge", name, args)

    def put(n):
        if args.mode == "pairwise":
            reply = endpoint.share(questions[n].turns)
            says = reply["p"]
        else:
            reply = endpoint.write(questions[n].turns, args.judge_max_tokens)
            says = reply["text"]
        return {"says": says, "prompt_tokens": reply["prompt_tokens"], "completion_tokens": reply["completion_tokens"]}

    return endpoint.ask_all(put, numbers, args.workers)


def _ask_model(args, path, questions, numbers):
    """By a model that runs here: a reply says its text, decoded greedily, or (pairwise) the share of m."""
    net, chat = load_checkpoint(path, *run.device_and_dtype(args.device, args.dtype), args.template_option)
    pairwise = args.mode == "pairwise"
    room = 1 if pairwise else args.judge_max_tokens
    closing = prefmodel.closing(chat) if pairwise else []       # a label is read, so no thinking may come before it
    ids = {n: chat.encode(questions[n]) + closing for n in numbers}
    for n in numbers:                                   # before anything is judged
        if len(ids[n]) + room > chat.context:
            raise run.UserError(f"--judge model:{path} has a context of {chat.context} tokens, and one question takes "
                                f"{len(ids[n])} and its verdict up to {room}; lower --judge-max-tokens or give another "
                                "judge")
    labels = [_label_ids(chat.tokenizer, label, path) for label in "mM"] if pairwise else None
    for batch in batches(numbers, args.batch):
        prompts = [ids[n] for n in batch]
        if pairwise:
            says, written = label_shares(net, prompts, *labels), [1] * len(batch)
        else:
            samples = rollout.generate(net, prompts, 1, args.judge_max_tokens, temperature=0, stop_ids=chat.stop_ids,
                                       max_rows=args.max_rows)
            says = [chat.decode(tokens[0]) for tokens in samples.tokens]
            written = [len(tokens[0]) for tokens in samples.tokens]
        yield [(n, {"says": said, "prompt_tokens": len(ids[n]), "completion_tokens": count})
               for n, said, count in zip(batch, says, written)]


def _label_ids(tokenizer, label, path):
    """The tokens that spell a label, with a space before it or without: which of them an answer begins with depends on
    the tokenizer. Raises UserError if there is none."""
    ids = set()
    for text in (label, " " + label):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) == 1 and tokenizer.decode(tokens).strip() == label:
            ids.add(tokens[0])
    if not ids:
        raise run.UserError(f"--judge model:{path} has no token for {label!r}; give another judge, or --mode arena")
    return sorted(ids)


@torch.inference_mode()
def label_shares(net, prompts, m, M, top=5, batch_tokens=16384):
    """p(m) / (p(m) + p(M)) for the next token after each of B prompts (lists of ids): a list of B floats in [0, 1].

    m, M: the ids that spell each label; their probabilities add up. What is not among the `top` likeliest tokens counts
    with probability 0, and a share is None if no label is among them: alpaca_eval's rule, whose endpoint shows five,
    so that one model gives one verdict here and behind an endpoint (Endpoint.share). batch_tokens bounds a forward
    pass.
    """
    shares = [None] * len(prompts)
    ours = torch.tensor(m, device=net.device)
    theirs = torch.tensor(M, device=net.device)
    for batch in prefmodel.batches_by_length([len(p) for p in prompts], batch_tokens):
        view = model.shared_prefix(net, [prompts[b] for b in batch], [[] for _ in batch])
        logits = net.logits(net(view.tokens, view)[view.prompt_last])                       # [B, V]
        likeliest, ids = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))        # [B, top]
        p_m = (likeliest * torch.isin(ids, ours)).sum(-1)
        p_M = (likeliest * torch.isin(ids, theirs)).sum(-1)
        for b, p, q in zip(batch, p_m.tolist(), p_M.tolist()):
            shares[b] = p / (p + q) if p + q > 0 else None
    return shares
