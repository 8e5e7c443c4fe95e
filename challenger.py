"""The Challenger: who asks where there is no data.

It is the model itself under a fixed prompt cp that wants one query: q ~ pi(.|cp) (LSP, arXiv 2509.07414, section 3 and
Box 1). lsp.py pays it for what it asks; `sppo.py --prompts challenger` only lets it ask. Here stand cp, the way from
what was written to a query, and what can be said of many queries: how many are malformed, how hard, how much alike.

A query that is kept for evaluation is written anew: nobody may learn from it, and a Challenger that is left alone soon
writes some.
"""

import dataclasses
import json
import re

import parallel
import rollout
import run
import world
from chat import fill, read_template, shortened, without_thinking
from flags import flag

# The content of the paper's Box 1. {task} and {template} are filled in; in the template the curly brackets stay, for
# the Challenger to fill.
PROMPT = """\
A language task is a pair: an input, and the output that fits it. You write inputs.

Write ONE input for the task '{task}'. Another agent will receive it and has to give the output. The input may be \
easy, of middling difficulty, hard, or noisy. Try to find the agent's limits, or to make it think in a way it is not \
used to.

Between [Start Generation] and [End Generation] there is a template: '
[Start Generation]
{template}
[End Generation]
' Copy the template without these two tags, and put text of your own where it has names in curly brackets.

Keep in mind:
- Give the input alone: no output, no hint, nothing that leaks the answer.
- Ask for nothing that an agent who only reads and writes language cannot do.
- Stop as soon as the template is filled.
- Neither of the two tags may appear in what you write.
- If the task and the template are empty, use your best judgment.
"""
ATTEMPTS = 10                   # how often a query is written while it is one that is kept for evaluation


@dataclasses.dataclass
class Settings(run.CommonSettings):
    """Flags of the scripts in which a Challenger asks."""
    task: str = flag("", "{task} in the Challenger's prompt (the paper, for maths: 'Pure & Applied Mathematics')")
    template: str = flag("", "{template} in the Challenger's prompt; the Challenger fills its names in curly "
                             "brackets")
    challenger_prompt: str = flag("", "file with another Challenger's prompt; it may use {task} and {template}")
    max_query_tokens: int | None = flag(None,
        "longest query in tokens; longer ones are cut, used, and counted", at_least=1)


def check_fixed_modes(args, names=("task", "template", "challenger_prompt")):
    """Raises UserError where an embedded world is given texts of one's own: its base has fixed modes."""
    for name in names if args.world else ():
        if getattr(args, name):
            raise run.UserError(f"--{name.replace('_', '-')} is for real models, an embedded world's base has fixed "
                                "modes; give --model and who judges natural language, such as reward:DIR_OR_HUB_ID, "
                                "or leave it out")


def check_flags(args):
    """Raises UserError for sppo.py's flags of the Challenger where nobody asks, and for a world that has none."""
    for name in ("task", "template", "challenger_prompt", "max_query_tokens"):
        if getattr(args, name) and args.prompts != "challenger":
            raise run.UserError(f"--{name.replace('_', '-')} does nothing without --prompts challenger; leave it out")
    if args.prompts == "challenger" and args.world and not world.WORLDS[args.world].lsp:
        raise run.UserError(f"--prompts challenger: --world {args.world} has no Challenger; give another world")
    check_fixed_modes(args)


def prompt(args):
    """cp, the Challenger's user turn: a text. Raises UserError for placeholders that nobody would fill."""
    if args.world:
        return world.CHALLENGE
    if re.search(r"[{}]", args.task):
        raise run.UserError(f"--task {args.task!r} has curly brackets, which nobody fills; name the task in plain "
                            "words (--template is what the Challenger fills)")
    if re.search(r"[{}]", re.sub(r"\{\w[^{}]*\}", "", args.template)):
        raise run.UserError(f"--template {args.template!r} has curly brackets that hold no name or do not match; write "
                            "{name} for each part that the Challenger is to fill")
    given = [name for name in ("task", "template") if getattr(args, name)]
    text = read_template("--challenger-prompt", args.challenger_prompt, PROMPT, ("task", "template"), given)
    return fill(text, task=args.task, template=args.template)


def extract_query(text):
    """The query in what the Challenger wrote: what stands between the template's tags if it echoed them, trimmed.

    >>> extract_query("[Start Generation]\\nWhat is 2 + 2? [End Generation] Done."), extract_query(" Why?[End Gener")
    ('What is 2 + 2?', 'Why?')
    """
    start = list(re.finditer(r"\[\s*start generation\s*\]", text, re.IGNORECASE))
    text = text[start[-1].end():] if start else text
    end = re.search(r"\[\s*end generation\s*\]|\[\s*end\s[a-z]{0,10}$", text, re.IGNORECASE)     # perhaps cut
    return (text[:end.start()] if end else text).strip()


@dataclasses.dataclass
class Query:
    """One query, as the Solver reads it, and what it cost to write."""
    text: str
    ids: list = ()                      # as the Challenger wrote it; none where queries come from data
    logp: list = ()                     # log pi of its tokens under cp, as sampled
    was_cut: bool = False               # did it reach its length limit?


def ask(net, chat, challenge, args, names, numbers, refuse=None, desc=None):
    """A Query for each of the `numbers`: q ~ pi(.|cp), where `challenge` is cp as ids. What the Solver reads of one is
    its text between the template's tags, as far as there is room for an answer; ids and logp are all that was written.

    names: a query's random stream belongs to them and to its number. refuse: of a text, whether another is to be asked
    in its place, as of one that is kept for evaluation. Where all ATTEMPTS are refused the query counts as empty: a
    Challenger that knows nothing else earns nothing by it. desc: label of a progress bar, None for no bar.
    """
    room, found, missing = chat.room(0, args.max_new_tokens), {}, dict.fromkeys(numbers)
    attempts = list(range(ATTEMPTS))
    while missing and attempts:
        # Few queries are asked thrice at once, in case they are refused: more rows cost less than another call.
        now = attempts[:3 if refuse and 3 * len(missing) <= args.max_rows else 1]
        attempts = attempts[len(now):]
        tries = [(i, run.stream(args.seed, *names, *([attempt] if attempt else [])) + i)
                 for attempt in now for i in missing]
        said = rollout.generate(net, [challenge] * len(tries), 1, args.max_query_tokens, args.temperature,
                                stop_ids=chat.stop_ids, max_rows=args.max_rows, seeds=[seed for _, seed in tries],
                                desc=desc)
        for (i, _), (ids,), (logp,), (finish,) in zip(tries, said.tokens, said.logprobs, said.finish):
            if i in missing:
                text = extract_query(without_thinking(chat.decode(ids)))
                text = shortened(text, lambda part: len(chat.encode(part)) <= room)
                found[i] = Query(text, ids, logp, finish == "length")
                if not (refuse and refuse(text)):
                    del missing[i]
    for i in missing:
        found[i].text = ""
    return [found[i] for i in numbers]


def unwanted(args, chat, *lists):
    """Which texts sppo.py does not take for prompts, as a function: those kept for evaluation, and those too long."""
    room = chat.room(args.max_prompt_tokens, args.max_new_tokens, args.max_total_tokens)
    kept = kept_for_evaluation(args, *lists)
    return lambda text: kept(text) or len(chat.encode(text)) > room


def kept_for_evaluation(args, *lists):
    """Whether a text is kept for evaluation, as a function: a prompt of one of the `lists`, and in an embedded world
    any query of its validation and test parts."""
    kept, entry = set().union(*lists), world.WORLDS.get(args.world)
    return lambda text: text in kept or entry is not None and entry.held_out(text)


def distinct(net, chat, challenge, args, names, count, refuse=None, shard=(0, 1)):
    """`count` queries that all differ, none empty, as texts in the order of their numbers, the same however many ranks
    share the asking. Raises UserError where ATTEMPTS times as many queries hold too few different ones."""
    found, asked, (rank, ranks) = {}, 0, shard
    while len(found) < count and asked < ATTEMPTS * count:
        numbers = range(asked, asked + count - len(found))
        mine = ask(net, chat, challenge, args, names, numbers[rank::ranks], refuse,
                   desc="the Challenger's queries")
        found |= dict.fromkeys(filter(None, parallel.gather([query.text for query in mine], len(numbers))))
        asked += len(numbers)
    if len(found) < count:
        raise run.UserError(f"the Challenger wrote only {len(found)} different queries in {asked}; lower the number of "
                            "prompts, or give a --task or --challenger-prompt that asks for more")
    return list(found)[:count]


def initial_queries(net, chat, challenge, args, count, shard=(0, 1), longest=0, total=0):
    """Prompts to evaluate on where none are given: at most `count` distinct queries of the initial model that can be
    answered, the same for all seeds. longest: tokens of a prompt, total: of prompt and answer; 0 = no such bound."""
    rank, ranks = shard
    asking = dataclasses.replace(args, seed=0, max_new_tokens=1)
    mine = ask(net, chat, challenge, asking, ("queries", "test"), range(rank, 2 * count, ranks))
    asked = parallel.gather([query.text for query in mine], 2 * count)
    room = chat.room(longest, args.max_new_tokens, total)
    found = [text for text in dict.fromkeys(asked) if text and len(chat.encode(text)) <= room][:count]
    if not found:
        raise run.UserError("the initial model wrote no query to the Challenger's prompt; give --eval-prompts FILE, or "
                            "another --challenger-prompt")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# what many queries are like


def query_metrics(queries, token_ids, spoken):
    """What a Challenger's queries (texts, and their lists of ids) are like: share of distinct ones, of empty ones, how
    much they overlap, and where the parser of an embedded world `spoken` knows it, the share malformed and the mean
    number of operations of the others."""
    metrics = {"distinct": len(set(queries)) / len(queries), "empty": sum(not q for q in queries) / len(queries),
               "overlap": overlap(token_ids)}
    if spoken:
        parsed = [spoken.parse(q) for q in queries]
        good = [p for p in parsed if p]
        metrics |= {"malformed": 1 - len(good) / len(parsed), "ops": sum(len(p[0]) for p in good) / max(1, len(good))}
    return metrics


def overlap(token_ids):
    """How much alike sequences are: the Jaccard overlap of two sequences' sets of token bigrams, averaged over all
    pairs. Sequences may all be distinct and yet be variations on one theme; this sees it. Two without bigrams are
    equal; fewer than two sequences have overlap 0.

    >>> overlap([[1, 2, 3], [1, 2, 4]]), overlap([[1, 2], [3, 4]]), overlap([[5, 6, 7]] * 3)       # 1 of 3 shared
    (0.3333333333333333, 0.0, 1.0)
    """
    pairs, total, bigrams = 0, 0.0, [frozenset(zip(ids, ids[1:])) for ids in token_ids]
    for i, a in enumerate(bigrams):
        for b in bigrams[:i]:
            total += len(a & b) / len(a | b) if a or b else 1.0
            pairs += 1
    return total / max(1, pairs)


def base_accuracy(queries, spoken, base, chat, seed):
    """How many of the well-formed queries the INITIAL model answers exactly, sampled once: whether a Challenger asks
    harder things than it did. None where no query is well-formed."""
    good = [q for q in queries if spoken.parse(q)]
    return world.accuracy(spoken, base, chat.tokenizer, good, 1, seed) if good else None


def queries_over_time(path, times=6, each=3):
    """Some of the run's queries, from its samples.jsonl: text, a line for each of `times` steps."""
    rows = {}
    with open(path) as file:
        for row in map(json.loads, file):
            rows.setdefault(row["step"], []).append(row["query"])
    steps = list(rows)
    shown = [steps[round(i * (len(steps) - 1) / (times - 1))] for i in range(times)] if len(steps) > times else steps
    return "queries over time:\n" + "\n".join(
        f"  step {step:5d}  " + "  |  ".join(repr(q)[1:-1][:60] for q in rows[step][:each]) for step in shown)
