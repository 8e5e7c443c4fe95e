"""`python eval.py generate`: a model's answers to a benchmark's questions, in the benchmark's own format.

The model runs here, or stands behind an endpoint (--model api:NAME). Here every answer has a random stream of its own,
which depends on --seed, on the question's place in the file and on the turn; batches and interruptions change nothing.
The layouts are formats.py's, the going on after an interruption is replies.py's; this file says what is asked at which
temperature, what of an answer is kept, and how the best of N is picked.

A model that thinks aloud is kept to what it says after its thinking. An answer that was cut before that is empty, and
counted as such.
"""

import collections
import dataclasses
import itertools
import json
import os

import flags
import kernels
import prefmodel
import rollout
import run
import winrate
from benchmarks.endpoint import Endpoint, EndpointSettings
from benchmarks.formats import answer_row, read_questions
from benchmarks.replies import Replies, batches
from chat import Prompt, load_checkpoint, turns_of, without_thinking
from flags import flag


MT_BENCH_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0.0,
                         "math": 0.0, "coding": 0.0, "reasoning": 0.0}          # FastChat's
MAX_NEW_TOKENS = {"alpaca": 2048, "mtbench": 1024, "arena": 4096, "jsonl": 1024}
DECODING = {"lsp": {"temperature": 0.01, "top_p": 1.0},                         # the papers' evaluations
            "mistral-7b": {"temperature": 0.7, "top_p": 0.9}, "llama-3-8b": {"temperature": 0.9, "top_p": 1.0}}


@dataclasses.dataclass
class GenerateSettings(EndpointSettings):
    """Flags of `python eval.py generate`."""
    COMMAND = "eval.py generate"
    model: str = flag("", "who answers: a checkpoint directory or hub id, or api:MODEL_NAME (needed)", needed=True)
    prompts: str = flag("", "the questions, .jsonl or .json; alpaca and jsonl take any prompts file (needed)",
                        needed=True)
    format: str = flag("", "whose answer file is written: alpaca (AlpacaEval's model_outputs.json), mtbench (two "
                           "turns), arena (Arena-Hard), or jsonl (the questions' rows with `output`) (needed)",
                       tuple(MAX_NEW_TOKENS), needed=True)
    out: str = flag("", "the answer file (needed); the same command goes on where it was interrupted", needed=True)
    name: str = flag("", "the model's name in the file [api: MODEL_NAME; else the last part of --model]")
    preset: str = flag("", "the decoding of a paper's evaluation: LSP's, or SPPO's for one of its models",
                       tuple(DECODING))
    temperature: float | None = flag(None, "sampling temperature, 0 is greedy; given, or set by --preset, it holds "
                                           "for MT-Bench too [MT-Bench: by category, else 0]", at_least=0)
    top_p: float = flag(1.0, "nucleus; 1 keeps every token", above=0, at_most=1)
    max_new_tokens: int = flag(0, "tokens an answer may have; 0: " +
                               ", ".join(f"{n} for {name}" for name, n in MAX_NEW_TOKENS.items()), at_least=0)
    best_of: int = flag(1, "answers drawn to a question, of which --judge picks the one that is kept", at_least=1)
    judge: str = flag("", "who picks: by reward (reward:DIR_OR_HUB_ID, oracle) or by mean Phat among the N (pairrm:"
                          "DIR_OR_HUB_ID, styles)")
    batch: int = flag(64, "questions answered between two writes: what an interruption costs at most", at_least=1)
    max_rows: int = flag(256, "answers sampled at once", at_least=1)
    seed: int = flag(0, "an answer's randomness depends on it and on the question's place in the file; api: sent "
                        "where the temperature is above 0, and as good as the endpoint makes it")
    device: str = flag("auto", "cuda, mps or cpu")
    dtype: str = flag("auto", "float32 or bfloat16", ("auto", "float32", "bfloat16"))
    json: bool = flag(False, "print the report as one JSON object")


def main(argv):
    """Answer every question of --prompts that has no answer yet, and write --out when all have one."""
    args = flags.parse(GenerateSettings, argv, "answer a benchmark's questions and write its own answer file", DECODING)
    _check(args)
    name = args.model.removeprefix("api:") if _by_endpoint(args) else os.path.basename(os.path.normpath(args.model))
    args = dataclasses.replace(args, name=args.name or name,
                               max_new_tokens=args.max_new_tokens or MAX_NEW_TOKENS[args.format])
    questions = read_questions(args.prompts, args.format)
    winrate.check_world_prompts(args.judge, [q.turns[0] for q in questions], "--prompts")
    replies = Replies(args.out, args, [q.row for q in questions])
    now = len(replies.missing(len(questions)))
    if not replies.report:
        ask = _answers_of_endpoint if _by_endpoint(args) else _answers
        found = replies.collect(len(questions), lambda numbers: ask(args, questions, numbers), "answering")
        rows = [answer_row(args.format, args.name, question, reply) for question, reply in zip(questions, found)]
        replies.finish(rows, _figures(found), as_list=args.format == "alpaca")
    report = {"out": args.out, "model": args.name, **replies.report, "answered_now": now}
    print(json.dumps(report) if args.json else
          "{out}: {model}'s answers to {questions} questions ({answered_now} of them now), {mean_characters:.0f} "
          "characters on average, {cut} cut at --max-new-tokens, {empty} empty".format(**report))


def _figures(found):
    """The report on all replies. cut: stopped by --max-new-tokens. empty: nothing to judge, as of a model that thought
    to the end of its tokens. finish: how many turns ended how."""
    texts = [text for reply in found for text in reply["turns"]]
    finish = collections.Counter(word for reply in found for word in reply["finish"])
    return {"questions": len(found), "mean_characters": sum(map(len, texts)) / len(texts), "cut": finish["length"],
            "empty": sum(not text.strip() for text in texts), "finish": dict(finish)}


def _by_endpoint(args):
    return args.model.startswith("api:")


def _check(args):
    """Raises UserError for flags that do not fit together."""
    if _by_endpoint(args) and args.model == "api:":
        raise run.UserError("--model api: names no model; give api:MODEL_NAME, as the endpoint calls it")
    if args.base_url and not _by_endpoint(args):
        raise run.UserError("--base-url is for --model api:MODEL_NAME; leave it out")
    if args.best_of > 1 and _by_endpoint(args):
        raise run.UserError(f"--best-of {args.best_of} is for a model that runs here; leave it out with --model "
                            f"{args.model}")
    if (args.best_of > 1) != bool(args.judge):
        raise run.UserError("--best-of N and --judge go together; give both (N above 1) or neither")
    if args.best_of > 1 and args.format == "mtbench":
        raise run.UserError(f"--best-of {args.best_of} is for questions of one turn; leave it out with --format "
                            "mtbench")
    if args.best_of > 1 and not args.temperature:
        raise run.UserError(f"--best-of {args.best_of} needs answers that differ; give --temperature above 0 or "
                            "--preset")


def _answers(args, questions, numbers):
    """Yields [(number, reply)] batch by batch. A reply is what formats.answer_row takes: {turns, tokens, answer_tokens,
    finish}, lists with one entry a turn."""
    device, dtype = run.device_and_dtype(args.device, args.dtype)
    net, chat = load_checkpoint(args.model, device, dtype, args.template_option)
    judge = prefmodel.load(args.judge, "pairwise", device, dtype) if args.judge else None
    for n in numbers:                       # before anything is generated: does the longest conversation fit?
        turns = questions[n].turns
        _encode(chat, _talk(turns, [""] * (len(turns) - 1)), args.max_new_tokens * len(turns))
    for batch in batches(numbers, args.batch):
        found = {n: _no_reply() for n in batch}
        alike = {}                          # {temperature: {number: the user's turns}}, for they are sampled together
        for n in batch:
            alike.setdefault(_temperature(args, questions[n]), {})[n] = questions[n].turns
        for turn in range(len(questions[batch[0]].turns)):
            for temperature in sorted(alike):
                _answer_turn(net, chat, judge, args, temperature, turn, alike[temperature], found)
        yield list(found.items())


def _answers_of_endpoint(args, questions, numbers):
    """The same from a model behind an address, question by question as they come: yields [(number, reply)]."""
    endpoint = Endpoint("--model", args.model.removeprefix("api:"), args)

    def put(n):
        reply, turns = _no_reply(), questions[n].turns
        for turn in range(len(turns)):
            said = endpoint.write(turns_of(_talk(turns[:turn + 1], reply["turns"])), args.max_new_tokens,
                                  _temperature(args, questions[n]), args.top_p,
                                  seed=run.stream(args.seed, "answer", n, turn))
            _keep(reply, said["text"], said["completion_tokens"], said["finish"])
        return reply

    return endpoint.ask_all(put, numbers, args.workers)


def _no_reply():
    return {"turns": [], "tokens": [], "answer_tokens": [], "finish": []}


def _keep(reply, text, tokens, finish, count=None):
    """Append one turn to a reply, without what the model thought before it. tokens: how many were sampled, None where
    nobody said. count: text -> its number of tokens; without it, as with an endpoint, an answer behind thinking is
    taken to have its share of the characters."""
    answer, text = without_thinking(text), text.strip()
    behind = tokens
    if answer != text and tokens is not None:
        behind = count(answer) if count else round(tokens * len(answer) / len(text))
    reply["turns"].append(answer)
    reply["tokens"].append(tokens)
    reply["answer_tokens"].append(behind)
    reply["finish"].append(finish)


def _temperature(args, question):
    if args.temperature is not None:
        return args.temperature
    return MT_BENCH_TEMPERATURES.get(question.category, 0.7) if args.format == "mtbench" else 0.0


def _answer_turn(net, chat, judge, args, temperature, turn, asked, found):
    """Sample one turn of {number: the user's turns} at one temperature, choose the best of N for each, and append it to
    that number's reply in `found`."""
    ids = [_encode(chat, _talk(turns[:turn + 1], found[n]["turns"]), 1) for n, turns in asked.items()]
    limits = [[min(args.max_new_tokens, chat.context - len(i))] * args.best_of for i in ids]
    samples = rollout.generate(net, ids, args.best_of, limits, temperature=temperature, top_p=args.top_p,
                               stop_ids=chat.stop_ids, max_rows=args.max_rows,
                               seeds=[run.stream(args.seed, "answer", n, turn) for n in asked])
    texts = [[chat.decode(tokens) for tokens in group] for group in samples.tokens]
    best = _best(judge, [turns[0] for turns in asked.values()],
                 [[without_thinking(text) for text in group] for group in texts])
    for b, (n, k) in enumerate(zip(asked, best)):
        _keep(found[n], texts[b][k], len(samples.tokens[b][k]), samples.finish[b][k],
              count=lambda text: len(chat.tokenizer.encode(text, add_special_tokens=False)))


def _best(judge, prompts, texts):
    """Which of B lists of N answers the judge likes best, [B]: by reward where it has one, else by Phat among the N.
    The first of equals; all 0 without a judge."""
    if judge is None:
        return [0] * len(texts)
    if hasattr(judge, "reward"):
        scores = judge.reward(prompts, texts)                               # [B, N]
    else:
        scores = kernels.phat(judge.preference(prompts, texts))             # [B, N, N] -> [B, N]
    return scores.argmax(1).tolist()


def _talk(questions, answers):
    """The conversation (Prompt) of n questions, the first of which may be a conversation itself, and n - 1 answers.
    Earlier answers go in as text, which is what the benchmark keeps and its judge reads."""
    talk = []
    for question, answer in itertools.zip_longest(questions, answers):
        talk += turns_of(question)
        if answer is not None:
            talk.append({"role": "assistant", "content": answer})
    return Prompt(talk)


def _encode(chat, talk, room):
    """Ids of a conversation, the assistant's header included. Raises UserError unless `room` tokens more fit."""
    ids = chat.encode(talk)
    if len(ids) + room > chat.context:
        raise run.UserError(f"the question {talk[:40]!r} takes {len(ids)} tokens and its answers up to {room}, beyond "
                            f"the context of {chat.context}; lower --max-new-tokens or leave the question out")
    return ids
