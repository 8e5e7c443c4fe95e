"""The embedded world: what `python sppo.py` runs on when no model is named.
A tiny language, its oracle, its base model.

A query names one to three operations on a few letters; the answer is the letters after them, left to right:

    sort then reverse:dbca   ->   dcba            upper then dedupe:hfah   ->   HFA

Everything a real run has is here in small: a tokenizer with a chat template, a model that was pre-trained on an
imperfect corpus (an ordinary Hugging Face checkpoint), prompts in disjoint parts, and a judge. It takes the same path
through the same lines as a 7B checkpoint. What a real run lacks is an oracle that knows the right answer, so that here,
and only here, one can tell LEARNING from SHARPENING.

Why that matters: sampling the untrained base at a lower temperature already beats the base at temperature 1, because
its likeliest answer is better than its average one. Self-play also makes a model greedier. A sampled win rate that
rises can therefore be had without learning anything. So the corpus is wrong in a *systematic* way: it misreads three
operations most of the time on longer words. There the base's likeliest answer is wrong, and neither decoding greedily
nor a vote among many samples repairs that (both stand in the table below); yet it samples the right answer often enough
for a judge to find it. Learning shows as GREEDY accuracy.

The model has three modes, told apart by the user turn: a query is answered; `challenge` is answered by a query (LSP's
Challenger); `judge:query|answer` is answered by a digit 0-7 (LSP's self-reward).

A second world, INTRANSITIVE, is about preferences that no reward can express: there every answer ends with a digit, its
style, and its judge's taste in styles runs in a circle (STYLES). Which is best depends on what the others do.

    python world.py              ten queries with the oracle's verdicts, then the base's figures
"""

import collections
import dataclasses
import hashlib
import os
import random
import re
import time

import torch

import model
import rollout
import run

LETTERS = "abcdefgh"


def _next(word, step=1):
    """Every letter moved on by `step` within a-h or A-H."""
    return "".join(chr(first + (ord(c) - first + step) % 8)
                   for c in word for first in [ord("a" if c.islower() else "A")])


OPS = {
    "copy": lambda s: s,
    "reverse": lambda s: s[::-1],
    "sort": lambda s: "".join(sorted(s)),                   # upper case before lower case, as in ASCII
    "upper": str.upper,
    "rotate": lambda s: s[1:] + s[:1],                      # to the left by one
    "swap": lambda s: s[-1] + s[1:-1] + s[0] if len(s) > 1 else s,
    "next": _next,                                          # a -> b, ..., h -> a; case kept
    "dedupe": lambda s: "".join(dict.fromkeys(s)),          # first occurrences
}
# what the corpus mostly does instead, on words of 4 letters or more
MISREAD = {
    "sort": lambda s: "".join(sorted(s, reverse=True)),
    "rotate": lambda s: s[-1:] + s[:-1],
    "next": lambda s: _next(s, -1),
}


# ---------------------------------------------------------------------------------------------------------------------
# the language and its oracle


def parse(query):
    """A query's (operations, word), or None if it is malformed. Takes up to 4 operations and words of 2-8 letters.

    >>> parse("sort then reverse:dbca"), parse("sort then:dbca")
    ((['sort', 'reverse'], 'dbca'), None)
    """
    head, colon, word = query.partition(":")
    ops = head.split(" then ")
    if (not colon or not 2 <= len(word) <= 8 or any(c not in LETTERS for c in word)
            or not 1 <= len(ops) <= 4 or any(o not in OPS for o in ops)):
        return None
    return ops, word


def solve(query):
    """The right answer, or None for a malformed query.

    >>> solve("sort then reverse:dbca"), solve("upper then dedupe:hfah"), solve("rotate then next:abh")
    ('dcba', 'HFA', 'cab')
    """
    parsed = parse(query)
    if parsed is None:
        return None
    ops, word = parsed
    for op in ops:
        word = OPS[op](word)
    return word


def score(query, answer):
    """The oracle's reward R in [0, 1]: 1 if exact, else half the share of matching positions; 0 for a malformed query.

    >>> score("reverse:abc", "cba"), score("reverse:abc", "cbb"), score("reverse:abc", "cbaa"), score("reverse:", "cba")
    (1.0, 0.3333333333333333, 0.375, 0.0)
    """
    right = solve(query)
    if right is None:
        return 0.0
    if answer == right:
        return 1.0
    return 0.5 * sum(a == b for a, b in zip(answer, right)) / max(len(answer), len(right))


def split(query):
    """Which part of the world a query belongs to, by a hash of its text, so that no two parts ever share one."""
    part = hashlib.blake2b(query.encode(), digest_size=1).digest()[0] % 16
    return "corpus" if part < 9 else "train" if part < 13 else "validation" if part < 14 else "test"


def random_query(rng):
    """One to three operations (with probability .5, .35, .15) on three to five letters."""
    ops = [rng.choice(list(OPS)) for _ in range(rng.choices((1, 2, 3), (0.5, 0.35, 0.15))[0])]
    return " then ".join(ops) + ":" + "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 5)))


def queries(part, count, seed=0):
    """`count` distinct queries of one part ("train", "validation", "test", "corpus").
    Longer lists extend shorter ones."""
    rng, found = random.Random(f"{part} {seed}"), {}
    while len(found) < count:
        query = random_query(rng)
        if split(query) == part:
            found[query] = None
    return list(found)


# The intransitive world: P(an answer of style i beats one of style j). 0 beats 1, 1 beats 2, 2 beats 0, so that whoever
# plays one style always is beaten by another. Nobody beats the mixture (1/3, 2/9, 4/9), the Nash equilibrium.
STYLES = ((0.5, 0.9, 0.3),
          (0.1, 0.5, 0.8),
          (0.7, 0.2, 0.5))


def style(answer):
    """An answer's style: the digit that it ends with, after letters alone; None if it has no style.

    >>> style("HFA2"), style("HFA"), style("HFA21")
    (2, None, None)
    """
    return int(answer[-1]) if answer[-1:] in ("0", "1", "2") and answer[:-1].isalpha() else None


def style_shares(answers):
    """How often each style occurs among the answers that have one: three floats.

    >>> style_shares(["a0", "ab2", "b2", "bad"])
    [0.3333333333333333, 0.0, 0.6666666666666666]
    """
    found = [s for s in map(style, answers) if s is not None]
    return [found.count(i) / max(1, len(found)) for i in range(len(STYLES))]


# ---------------------------------------------------------------------------------------------------------------------
# the corpus: what the base learns from


@dataclasses.dataclass(frozen=True)
class World:
    """Every constant of the world and its base. Fixed by looking at the base alone, before any self-play result."""
    modes: tuple = (0.72, 0.08, 0.20)       # answer, challenge, judge
    misread: float = 0.70                   # how often the corpus misreads sort, rotate and next on words of 4+ letters
    corrupt: float = 0.30                   # how often it then errs at random
    junk_answer: float = 0.03               # malformed queries among those it answers
    junk_challenge: float = 0.05
    junk_judge: float = 0.35
    width: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 256
    context: int = 128
    rope_theta: float = 100.0
    steps: int = 1400
    batch: int = 64
    lr: float = 3e-3
    seed: int = 0
    styles: tuple = ()                      # the intransitive world: how often an answer has style 0, 1, 2


# Letters right and every answer with a style, at shares that are not yet the equilibrium: all there is to learn is the
# game.
INTRANSITIVE = World(modes=(1.0, 0.0, 0.0), misread=0.0, corrupt=0.0, junk_answer=0.0, steps=400,
                     styles=(0.45, 0.25, 0.3))
WORLDS = {"operations": World(), "intransitive": INTRANSITIVE}


def _corrupt(ops, word, rng):
    """A careless answer: an operation replaced or left out, a letter wrong, or two letters exchanged."""
    kind = rng.randrange(4)
    if kind < 2:
        at = rng.randrange(len(ops))
        ops = ops[:at] + ([rng.choice(list(OPS))] if kind == 0 else []) + ops[at + 1:]
    for op in ops:
        word = OPS[op](word)
    letters = list(word)
    if kind == 2:
        letters[rng.randrange(len(letters))] = rng.choice(LETTERS)
    if kind == 3:
        i, j = rng.randrange(len(letters)), rng.randrange(len(letters))
        letters[i], letters[j] = letters[j], letters[i]
    return "".join(letters)


def _corpus_answer(query, world, rng):
    parsed = parse(query)
    if parsed is None:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 5)))
    ops, word = parsed
    if rng.random() < world.corrupt:
        return _corrupt(ops, word, rng)
    for op in ops:
        misreads = op in MISREAD and len(word) >= 4 and rng.random() < world.misread
        word = (MISREAD if misreads else OPS)[op](word)
    return word


def _junk(query, rng):
    """A malformed query: the word or an operation missing, or a few tokens changed at random."""
    junk, (head, _, word) = query, query.partition(":")
    while parse(junk) is not None:                          # a random change often makes another good query: again
        kind = rng.randrange(4)
        pieces = [head, ":"] if kind == 0 else [":", word] if kind == 1 else tokenizer_pieces(query)
        for _ in range(rng.randint(1, 3) if kind > 1 else 0):
            at = rng.randrange(len(pieces))
            pieces[at:at + 1] = rng.choice(([], [rng.choice(VOCABULARY)], [pieces[at]] * 2))
            pieces = pieces or [":"]
        junk = "".join(pieces)
    return junk


def judge_label(query, answer):
    """What the rubric's seven points come to here: 0-7.
    Two for a clear query, one for an answer in the language, up to four for its correctness.

    >>> judge_label("reverse:abc", "cba"), judge_label("reverse:abc", "cbb"), judge_label("reverse:", "cba")
    (7, 4, 0)
    """
    if parse(query) is None:
        return 0
    return 2 + (answer.isalpha()) + round(4 * score(query, answer))


def corpus_row(world, rng):
    """One (user turn, assistant turn) of the pre-training corpus."""
    query = random_query(rng)
    while split(query) != "corpus":
        query = random_query(rng)
    mode = rng.choices(("answer", "challenge", "judge"), world.modes)[0]
    if rng.random() < {"answer": world.junk_answer, "challenge": world.junk_challenge, "judge": world.junk_judge}[mode]:
        query = _junk(query, rng)
    if mode == "answer":
        answer = _corpus_answer(query, world, rng)
        return query, answer + (str(rng.choices(range(len(STYLES)), world.styles)[0]) if world.styles else "")
    if mode == "challenge":
        return CHALLENGE, query
    answer = solve(query) if parse(query) and rng.random() < 0.5 else _corpus_answer(query, world, rng)
    label = judge_label(query, answer)
    if rng.random() < 0.15:
        label = min(7, max(0, label + rng.choice((-1, 1))))
    return JUDGE.format(query=query, answer=answer), str(label)


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer: an ordinary one of the `tokenizers` library, with a chat template

CHALLENGE = "challenge"
JUDGE = "judge:{query}|{answer}"
WORDS = [*OPS, " then ", ":", "|", "challenge", "judge"]
VOCABULARY = [*WORDS, *LETTERS, *LETTERS.upper(), *"01234567"]
SPECIAL = ["<pad>", "<unk>", "<bos>", "<user>", "<assistant>", "<eot>"]
CHAT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
                 "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")


def tokenizer_pieces(text):
    """Text cut into vocabulary items: words whole, the rest letter by letter.

    >>> tokenizer_pieces("sort then copy:ab")
    ['sort', ' then ', 'copy', ':', 'a', 'b']
    """
    pieces = []
    while text:
        piece = next((w for w in WORDS if text.startswith(w)), text[0])
        pieces.append(piece)
        text = text[len(piece):]
    return pieces


def make_tokenizer():
    """The world's tokenizer, 43 tokens, as transformers' AutoTokenizer will open it again."""
    import tokenizers
    import transformers

    vocabulary = {token: i for i, token in enumerate(SPECIAL + VOCABULARY)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("|".join(re.escape(w) for w in WORDS) + "|."), "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eot>",
        additional_special_tokens=["<user>", "<assistant>"], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------------------------------------------------------------
# the base model


def base(world=World(), device="cpu", root="out"):
    """Directory of the base's checkpoint; trains it first if it is not there.
    The name holds a hash of the constants and of this file,
    so that whoever edits the world gets a base of their own."""
    with open(__file__, "rb") as file:
        key = hashlib.blake2b(file.read() + repr(world).encode(), digest_size=4).hexdigest()
    directory = os.path.join(root, f"world-{key}")
    if not os.path.exists(os.path.join(directory, "config.json")):
        try:
            os.makedirs(root, exist_ok=True)
        except OSError as error:
            raise run.UserError(f"{root} cannot be written ({error.strerror}); run from a directory that can") from None
        train_base(directory, world, device)
    return directory


def train_base(directory, world, device):
    """Pre-train the base on its corpus, about a minute on two cores, and save it as a Hugging Face checkpoint."""
    start = time.perf_counter()
    tokenizer, rng = make_tokenizer(), random.Random(f"base {world.seed}")
    ids = {token: i for i, token in enumerate(SPECIAL + VOCABULARY)}
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": len(ids),
           "hidden_size": world.width, "intermediate_size": world.mlp, "num_hidden_layers": world.layers,
           "num_attention_heads": world.heads, "num_key_value_heads": world.kv_heads,
           "head_dim": world.width // world.heads, "max_position_embeddings": world.context, "rms_norm_eps": 1e-6,
           "rope_parameters": {"rope_type": "default", "rope_theta": world.rope_theta}, "hidden_act": "silu",
           "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
           "bos_token_id": ids["<bos>"], "eos_token_id": ids["<eot>"], "pad_token_id": ids["<pad>"]}
    net = (model.Transformer(model.Config.from_hf(raw))
           .init_weights(torch.Generator().manual_seed(world.seed)).to(device))
    optimizer = torch.optim.AdamW(net.parameters(), lr=world.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    print(f"training the tiny base on {device}, {world.steps} steps "
          f"(once; about {world.steps / 16:.0f} s on two cores)", flush=True)
    bar = run.progress(range(world.steps), desc="training the tiny base")
    for step in bar:
        left = 1 - step / world.steps
        for group in optimizer.param_groups:    # 50 steps of warm-up, constant to half-way, then linear down to 5 %
            group["lr"] = world.lr * min(1, (step + 1) / 50, 0.05 + 0.95 * 2 * left)
        prompts, responses = [], []
        for _ in range(world.batch):
            user, assistant = corpus_row(world, rng)
            prompts.append([ids["<bos>"], ids["<user>"],
                            *(ids.get(p, ids["<unk>"]) for p in tokenizer_pieces(user)), ids["<assistant>"]])
            responses.append([[*(ids.get(p, ids["<unk>"]) for p in tokenizer_pieces(assistant)), ids["<eot>"]]])
        logprob, _, _ = model.response_logprobs(net, prompts, responses)      # only the assistant's tokens count
        loss = -logprob.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    held_out = queries("validation", 500)
    if world.styles:
        found = "styles " + ", ".join(f"{p:.2f}" for p in style_shares(answers(net, tokenizer, held_out, 1)))
    else:
        greedy, sampled = (accuracy(net, tokenizer, held_out, t) for t in (0, 1))
        found = f"validation accuracy {greedy:.3f} greedy, {sampled:.3f} sampled"
    net.save_pretrained(directory, tokenizer)
    print(f"trained the tiny base in {time.perf_counter() - start:.0f} s "
          f"({sum(p.numel() for p in net.parameters()):,} parameters): {found}; saved as {directory}", flush=True)


def answers(net, tokenizer, prompts, temperature, seeds=0):
    """One answer per query, as text. temperature 0 is greedy."""
    ids = [tokenizer.apply_chat_template([{"role": "user", "content": p}],
                                         add_generation_prompt=True, return_dict=False) for p in prompts]
    samples = rollout.generate(net, ids, 1, 24, temperature=temperature, stop_ids=(tokenizer.eos_token_id,),
                               seeds=seeds, max_rows=512)
    return [tokenizer.decode(group[0], skip_special_tokens=True) for group in samples.tokens]


def accuracy(net, tokenizer, prompts, temperature, seeds=0):
    """Share of queries answered exactly."""
    return (sum(score(q, a) == 1 for q, a in zip(prompts, answers(net, tokenizer, prompts, temperature, seeds)))
            / len(prompts))


# ---------------------------------------------------------------------------------------------------------------------


def _show(argv):
    """Ten queries with the oracle's verdicts, then the base's accuracy by operation and by number of operations."""
    import transformers

    @dataclasses.dataclass
    class Settings:
        queries: int = run.flag(2000, "how many test queries the base's figures are taken over")
        votes: int = run.flag(32, "samples whose most frequent answer is the base's vote")

    settings = run.parse(Settings, argv, "show the embedded world and its base")
    directory = base()
    net, tokenizer = model.Transformer.from_pretrained(directory), transformers.AutoTokenizer.from_pretrained(directory)
    test, votes = queries("test", settings.queries), settings.votes
    greedy, samples = answers(net, tokenizer, test, 0), answers(net, tokenizer, test * votes, 1)
    sampled = samples[:len(test)]
    vote = [collections.Counter(samples[i::len(test)]).most_common(1)[0][0] for i in range(len(test))]
    print(f"\n{'query':34s} {'right':8s} {'base, sampled':14s} {'R':>5s}   {'base, greedy':14s} {'R':>5s}")
    for q, s, g in list(zip(test, sampled, greedy))[:10]:
        print(f"{q:34s} {solve(q):8s} {s:14s} {score(q, s):5.2f}   {g:14s} {score(q, g):5.2f}")
    groups = {"all": test} | {op: [q for q in test if op in parse(q)[0]] for op in OPS}
    groups |= {f"{n} operation{'s' * (n > 1)}": [q for q in test if len(parse(q)[0]) == n] for n in (1, 2, 3)}
    by_query = {q: (*answers, parse(q)[1]) for q, *answers in zip(test, sampled, greedy, vote)}
    print(f"\n{'accuracy of the base on':24s}"
          f" {'queries':>8s} {'sampled':>8s} {'greedy':>8s} {'vote':>8s} {'copying':>8s}   "
          f"(vote: the most frequent of {votes} samples; copying: the word itself)")
    for name, group in groups.items():
        rows = [[score(q, a) == 1 for a in by_query[q]] for q in group]
        print(f"{name:24s} {len(group):8d}" + "".join(f" {sum(column) / len(group):8.3f}" for column in zip(*rows)))


if __name__ == "__main__":
    run.main(_show)
