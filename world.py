"""The embedded worlds: what `python sppo.py` and `python lsp.py` run on when no model is named.
A tiny language, its oracle, its tokenizer, its base model, and the settings that suit it.

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
nor a vote among many samples repairs that (`python world.py` shows both); yet it samples the right answer often enough
for a judge to find it. Learning shows as GREEDY accuracy.

The model has three modes, told apart by the user turn: a query is answered; `challenge` is answered by a query (LSP's
Challenger); `judge:query|answer` is answered by a digit 0-7 (LSP's self-reward).

WORLDS, at the end of this file, is the registry: one entry holds all of a world, and `--world NAME` plays it. A second
entry, `intransitive`, is about preferences that no reward can express: every answer ends with a digit, its style, and
the judge's taste in styles runs in a circle. To make a world of your own, add an entry; the comment there says what a
world needs in order to teach.

    python world.py [--world NAME]      ten queries with the oracle's verdicts, then the base's figures
"""

import collections
import dataclasses
import hashlib
import inspect
import os
import random
import re
import time

import torch

import checkpoints
import flags
import model
import rollout
import run
from flags import flag

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

# The two other modes' user turns
CHALLENGE = "challenge"
JUDGE = "judge:{query}|{answer}"

SPECIAL = ["<pad>", "<unk>", "<bos>", "<user>", "<assistant>", "<eot>"]
CHAT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
                 "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")


def split(query):
    """Which part of a world a query belongs to, by a hash of its text, so that no two parts ever share one."""
    part = hashlib.blake2b(query.encode(), digest_size=1).digest()[0] % 16
    return "corpus" if part < 9 else "train" if part < 13 else "validation" if part < 14 else "test"


# ---------------------------------------------------------------------------------------------------------------------
# a world: its language and oracle, its corpus, its constants


@dataclasses.dataclass(frozen=True)
class World:
    """One world, whole. Its constants were fixed by looking at the base alone, before any self-play result.

    A world with other operations is another value of `ops`. A world with another language is a subclass with methods
    `words`, `random_query`, `parse`, `solve` and `corpus_answer` of its own; the rest only calls these five.
    """
    judge: str = "oracle"                   # the default of --judge: its kind, and its world (see prefmodel.load)
    # the language
    ops: dict = dataclasses.field(default_factory=lambda: OPS)
    misread_ops: dict = dataclasses.field(default_factory=lambda: MISREAD)
    # the corpus
    modes: tuple = (0.72, 0.08, 0.20)       # answer, challenge, judge
    misread: float = 0.70                   # how often the corpus misreads those operations on words of 4+ letters
    corrupt: float = 0.30                   # how often it then errs at random
    junk_answer: float = 0.03               # malformed queries among those it answers
    junk_challenge: float = 0.05
    junk_judge: float = 0.35
    styles: tuple = ()                      # the intransitive world: how often an answer has style 0, 1, 2
    # the base
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
    # what random_query is told for the queries that the corpus shows to the Challenger's mode; {} = the ordinary ones.
    # `share` says how many of them are such, if not all
    asks: dict = dataclasses.field(default_factory=dict)
    # kinds of queries harder than the ordinary ones: what random_query is told. Tables have a column for each
    harder: dict = dataclasses.field(default_factory=dict)
    # what a setting of sppo.py and lsp.py is when its flag is not given
    sppo: dict = dataclasses.field(default_factory=dict)
    sppo_loss: dict = dataclasses.field(default_factory=dict)       # by --loss
    self_play: dict = dataclasses.field(default_factory=dict)       # by --self-play, in place of the two above
    lsp: dict = dataclasses.field(default_factory=dict)             # empty: this world has no Challenger
    lsp_reward: dict = dataclasses.field(default_factory=dict)      # by --challenger-reward, and for --mode grpo

    # -- the language and its oracle --

    def words(self):
        """What the tokenizer keeps whole besides single letters."""
        return [*self.ops, " then ", ":", "|", "challenge", "judge"]

    def random_query(self, rng, count=0, ops=(), shortest=3):
        """One to three operations (with probability .5, .35, .15) on three to five letters; or exactly `count`
        operations, of `ops` alone, on at least `shortest` letters."""
        count, ops = count or rng.choices((1, 2, 3), (0.5, 0.35, 0.15))[0], list(ops or self.ops)
        chosen = [rng.choice(ops) for _ in range(count)]
        return " then ".join(chosen) + ":" + "".join(rng.choice(LETTERS) for _ in range(rng.randint(shortest, 5)))

    def parse(self, query):
        """A query's (operations, word), or None if it is malformed. Takes up to 4 operations and words of 2-8 letters.

        >>> OPERATIONS.parse("sort then reverse:dbca"), OPERATIONS.parse("sort then:dbca")
        ((['sort', 'reverse'], 'dbca'), None)
        """
        head, colon, word = query.partition(":")
        ops = head.split(" then ")
        if (not colon or not 2 <= len(word) <= 8 or any(c not in LETTERS for c in word)
                or not 1 <= len(ops) <= 4 or any(o not in self.ops for o in ops)):
            return None
        return ops, word

    def solve(self, query):
        """The right answer, or None for a malformed query.

        >>> [OPERATIONS.solve(q) for q in ("sort then reverse:dbca", "upper then dedupe:hfah", "rotate then next:abh")]
        ['dcba', 'HFA', 'cab']
        """
        parsed = self.parse(query)
        if parsed is None:
            return None
        ops, word = parsed
        for op in ops:
            word = self.ops[op](word)
        return word

    def score(self, query, answer):
        """The oracle's reward R in [0, 1]: 1 if exact, else half the share of matching positions; 0 for a malformed
        query.

        >>> [round(OPERATIONS.score("reverse:abc", answer), 3) for answer in ("cba", "cbb", "cbaa")]
        [1.0, 0.333, 0.375]
        >>> OPERATIONS.score("reverse:", "cba")
        0.0
        """
        right = self.solve(query)
        if right is None:
            return 0.0
        if answer == right:
            return 1.0
        return 0.5 * sum(a == b for a, b in zip(answer, right)) / max(len(answer), len(right))

    def held_out(self, text):
        """Is this a query that is kept for evaluation? Nobody may train on it, wherever it comes from."""
        return split(text) in ("validation", "test") and self.parse(text) is not None

    def queries(self, part, count, seed=0, kind="", distinct=True):
        """`count` distinct queries of one part ("train", "validation", "test", "corpus"), ordinary ones or of a `kind`
        in self.harder. Longer lists extend shorter ones. distinct=False: as they come, short ones again and again;
        else a long list gets harder towards its end, because short ones run out."""
        if count > 10**6:                                   # looking for more than there are would never end
            raise run.UserError(f"an embedded world has no {count:,} queries of one part; ask for a million at most")
        rng, found, known = random.Random(f"{part} {seed} {kind}".strip()), [], set()
        while len(found) < count:
            query = self.random_query(rng, **(self.harder[kind] if kind else {}))
            if split(query) == part and not (distinct and query in known):
                found.append(query)
                known.add(query)
        return found

    def divide(self, count, size, validation, test, seed, before=()):
        """(validation queries, test queries, [part 1, ..., part `count`] of `size` training queries each): disjoint
        lists. Held-out queries do not depend on the seed. before: the counts of the sessions that a run has had, whose
        parts come first. Raises ValueError where there are not enough."""
        if count * size > 10**6:
            raise ValueError(f"--iterations {count} of --prompts-per-iteration {size}: an embedded world has a million "
                             "queries to train on; lower one")
        # queries() never repeats itself, so short ones run out and later ones are harder: shuffled, parts are alike
        parts = []
        for length in (*before, count):
            more = self.queries("train", length * size, seed)[len(parts) * size:]
            more = run.shuffled(more, seed, "training prompts")
            parts += [more[i:i + size] for i in range(0, len(more), size)]
        return self.queries("validation", validation), self.queries("test", test), parts

    # -- the corpus: what the base learns from --

    def corpus_answer(self, query, rng):
        """An answer as the corpus has it: misread, careless, or right."""
        parsed = self.parse(query)
        if parsed is None:
            return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 5)))
        ops, word = parsed
        if rng.random() < self.corrupt:
            return self._careless(ops, word, rng)
        for op in ops:
            misreads = op in self.misread_ops and len(word) >= 4 and rng.random() < self.misread
            word = (self.misread_ops if misreads else self.ops)[op](word)
        return word

    def _careless(self, ops, word, rng):
        """An operation replaced or left out, a letter wrong, or two letters exchanged."""
        kind = rng.randrange(4)
        if kind < 2:
            at = rng.randrange(len(ops))
            ops = ops[:at] + ([rng.choice(list(self.ops))] if kind == 0 else []) + ops[at + 1:]
        for op in ops:
            word = self.ops[op](word)
        letters = list(word)
        if kind == 2:
            letters[rng.randrange(len(letters))] = rng.choice(LETTERS)
        if kind == 3:
            i, j = rng.randrange(len(letters)), rng.randrange(len(letters))
            letters[i], letters[j] = letters[j], letters[i]
        return "".join(letters)

    def _junk(self, query, rng):
        """A malformed query: the word or an operation missing, or a few tokens changed at random."""
        junk, (head, _, word) = query, query.partition(":")
        while self.parse(junk) is not None:                 # a random change often makes another good query: again
            kind = rng.randrange(4)
            pieces = [head, ":"] if kind == 0 else [":", word] if kind == 1 else self.pieces(query)
            for _ in range(rng.randint(1, 3) if kind > 1 else 0):
                at = rng.randrange(len(pieces))
                pieces[at:at + 1] = rng.choice(([], [rng.choice(self.vocabulary())], [pieces[at]] * 2))
                pieces = pieces or [":"]
            junk = "".join(pieces)
        return junk

    def judge_label(self, query, answer):
        """What the rubric's seven points come to here: 0-7.
        Two for a clear query, one for an answer in the language, up to four for its correctness.

        >>> OPERATIONS.judge_label("reverse:abc", "cba"), OPERATIONS.judge_label("reverse:abc", "cbb")
        (7, 4)
        >>> OPERATIONS.judge_label("reverse:", "cba")
        0
        """
        if self.parse(query) is None:
            return 0
        return 2 + (answer.isalpha()) + round(4 * self.score(query, answer))

    def _corpus_query(self, rng, **kind):
        query = self.random_query(rng, **kind)
        while split(query) != "corpus":
            query = self.random_query(rng, **kind)
        return query

    def corpus_row(self, rng):
        """One (user turn, assistant turn) of the pre-training corpus."""
        query = self._corpus_query(rng)
        mode = rng.choices(("answer", "challenge", "judge"), self.modes)[0]
        if mode == "challenge" and self.asks:
            kind = dict(self.asks)
            share = kind.pop("share", None)
            if share is None or rng.random() < share:
                query = self._corpus_query(rng, **kind)
        junk = {"answer": self.junk_answer, "challenge": self.junk_challenge, "judge": self.junk_judge}
        if rng.random() < junk[mode]:
            query = self._junk(query, rng)
        if mode == "answer":
            answer = self.corpus_answer(query, rng)
            return query, answer + (str(rng.choices(range(len(STYLES)), self.styles)[0]) if self.styles else "")
        if mode == "challenge":
            return CHALLENGE, query
        answer = self.solve(query) if self.parse(query) and rng.random() < 0.5 else self.corpus_answer(query, rng)
        label = self.judge_label(query, answer)
        if rng.random() < 0.15:
            label = min(7, max(0, label + rng.choice((-1, 1))))
        return JUDGE.format(query=query, answer=answer), str(label)

    # -- the tokenizer: an ordinary one of the `tokenizers` library, with a chat template --

    def vocabulary(self):
        """The tokens besides SPECIAL: words, letters, digits."""
        return [*self.words(), *LETTERS, *LETTERS.upper(), *"01234567"]

    def pieces(self, text):
        """Text cut into vocabulary items: words whole, the rest letter by letter.

        >>> OPERATIONS.pieces("sort then copy:ab")
        ['sort', ' then ', 'copy', ':', 'a', 'b']
        """
        return re.findall(self._pattern(), text, re.DOTALL)

    def _pattern(self):
        """What one piece is, as a regular expression; of the words, the first that fits."""
        return "|".join(re.escape(w) for w in self.words()) + "|."

    def make_tokenizer(self):
        """The world's tokenizer, 43 tokens, as transformers' AutoTokenizer will open it again."""
        import tokenizers
        import transformers

        ids = {token: i for i, token in enumerate(SPECIAL + self.vocabulary())}
        core = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
        core.pre_tokenizer = tokenizers.pre_tokenizers.Split(
            tokenizers.Regex(self._pattern()), "isolated")
        core.decoder = tokenizers.decoders.Fuse()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eot>",
            additional_special_tokens=["<user>", "<assistant>"], chat_template=CHAT_TEMPLATE,
            clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------------------------------------------------------------
# styles: the intransitive world's answers. P(an answer of style i beats one of style j): 0 beats 1, 1 beats 2, 2 beats
# 0, so that whoever plays one style always is beaten by another. Nobody beats the mixture NASH_STYLES.

STYLES = ((0.5, 0.9, 0.3),
          (0.1, 0.5, 0.8),
          (0.7, 0.2, 0.5))
NASH_STYLES = (3 / 9, 2 / 9, 4 / 9)


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
# the base model


def base(world, device="cpu", root="out"):
    """Directory of a world's base; trains it first if it is not there. Its name holds a hash of all that shapes the
    base (constants, tokens, the first rows of the corpus, the training below), so that whoever edits a world gets a
    base of their own, and whoever edits the settings of sppo.py and lsp.py keeps the one there is."""
    rng = random.Random(0)
    constants = {name: value for name, value in dataclasses.asdict(world).items()
                 if name != "judge" and not isinstance(value, dict)}
    shape = (constants, world.vocabulary(), [world.corpus_row(rng) for _ in range(500)], inspect.getsource(train_base))
    key = hashlib.blake2b(repr(shape).encode(), digest_size=4).hexdigest()
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
    tokenizer, rng = world.make_tokenizer(), random.Random(f"base {world.seed}")
    ids = {token: i for i, token in enumerate(SPECIAL + world.vocabulary())}
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": len(ids),
           "hidden_size": world.width, "intermediate_size": world.mlp, "num_hidden_layers": world.layers,
           "num_attention_heads": world.heads, "num_key_value_heads": world.kv_heads,
           "head_dim": world.width // world.heads, "max_position_embeddings": world.context, "rms_norm_eps": 1e-6,
           "rope_parameters": {"rope_type": "default", "rope_theta": world.rope_theta}, "hidden_act": "silu",
           "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
           "bos_token_id": ids["<bos>"], "eos_token_id": ids["<eot>"], "pad_token_id": ids["<pad>"]}
    net = (model.Transformer(checkpoints.Config.from_hf(raw))
           .init_weights(torch.Generator().manual_seed(world.seed)).to(device))
    optimizer = torch.optim.AdamW(net.parameters(), lr=world.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    print(f"training the tiny base on {device}, {world.steps} steps "
          f"(once; {world.steps // 28} to {world.steps // 9} s on two cores)", flush=True)
    bar = run.progress(range(world.steps), desc="training the tiny base")
    for step in bar:
        left = 1 - step / world.steps
        for group in optimizer.param_groups:    # 50 steps of warm-up, constant to half-way, then linear down to 5 %
            group["lr"] = world.lr * min(1, (step + 1) / 50, 0.05 + 0.95 * 2 * left)
        prompts, responses = [], []
        for _ in range(world.batch):
            user, assistant = world.corpus_row(rng)
            prompts.append([ids["<bos>"], ids["<user>"],
                            *(ids.get(p, ids["<unk>"]) for p in world.pieces(user)), ids["<assistant>"]])
            responses.append([[*(ids.get(p, ids["<unk>"]) for p in world.pieces(assistant)), ids["<eot>"]]])
        logprob, _, _ = model.response_logprobs(net, prompts, responses)      # only the assistant's tokens count
        loss = -logprob.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    held_out = world.queries("validation", 500)
    if world.styles:
        found = "styles " + ", ".join(f"{p:.2f}" for p in style_shares(answers(net, tokenizer, held_out, 1)))
    else:
        greedy, sampled = (accuracy(world, net, tokenizer, held_out, t) for t in (0, 1))
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


def accuracy(world, net, tokenizer, prompts, temperature, seeds=0):
    """Share of a world's queries answered exactly."""
    return (sum(world.score(q, a) == 1 for q, a in zip(prompts, answers(net, tokenizer, prompts, temperature, seeds)))
            / len(prompts))


# ---------------------------------------------------------------------------------------------------------------------
# the registry
#
# What a world needs in order to teach, measured on its base alone (`python world.py --world NAME`):
#   - the base solves about half of the queries greedily (.45 to .65): less, and the judge finds no right answers to
#     prefer; more, and there is nothing left to learn
#   - its errors are systematic, as the misread operations are: where they are mere noise, decoding greedily removes
#     them, and a model that only sharpens looks as if it had learned
#   - a right answer is sampled often enough to be found: about .35 of all samples, and above the share that copying the
#     word would get on every operation
#   - pre-training takes about a minute. Fix the constants by these figures, before any self-play result is seen
# The training settings of `operations` were picked on validation queries (docs/settings.md lists every trial), those of
# `intransitive` mostly by hand; `narrow` and `tilted` have those of `operations`.

OPERATIONS = World(
    harder={"3 ops": dict(count=3), "4 ops": dict(count=4), "weak ops": dict(ops=tuple(MISREAD), shortest=4)},
    sppo=dict(iterations=3, prompts_per_iteration=4096, batch_size=64, all_responses=False, keep="best",
              optimizer="adamw", max_new_tokens=24, max_prompt_tokens=0, max_query_tokens=24, micro_batch=64,
              max_rows=512, chunk=4096, validation_prompts=512, test_prompts=2000, print_every=64, save_every=0),
    sppo_loss={"sppo": dict(eta=10.0, lr=5e-4, epochs=6), "sppo-hard": dict(eta=8.0, lr=2.5e-4, epochs=6),
               "dpo": dict(beta=1.0, lr=5e-4, epochs=3), "ipo": dict(beta=0.2, lr=2.5e-4, epochs=6)},
    lsp=dict(steps=200, queries=32, answers=8, beta=0.1, self_reward="expected", lr=4e-4, warmup=10,
             max_query_tokens=24, max_new_tokens=24, max_verdict_tokens=4, micro_batch=32, max_rows=512,
             test_prompts=2000, eval_every=50, print_every=10),
    # With -V ("value") nonsense, whose V is 0, would earn more at a larger scale than the self-reward it forfeits.
    lsp_reward={"value": dict(reward_scale=3.0, alpha_ch=0.02), "spread": dict(reward_scale=12.0, alpha_ch=0.05),
                "frontier": dict(reward_scale=12.0, alpha_ch=0.05), "grpo": dict(reward_scale=12.0, alpha_ch=0.0),
                "frozen": dict(reward_scale=12.0, alpha_ch=0.0)})

# The same, but the corpus shows the Challenger's mode only single operations that the base does well, or nine times in
# ten: a Challenger that does not learn has little to ask, so that here its learning can pay.
EASY = dict(count=1, ops=("copy", "reverse", "upper", "swap", "dedupe"))
NARROW = dataclasses.replace(OPERATIONS, judge="oracle:narrow", asks=EASY)
TILTED = dataclasses.replace(OPERATIONS, judge="oracle:tilted", asks=EASY | dict(share=0.9))

# Letters right and every answer with a style, at shares that are not yet the equilibrium: all there is to learn is the
# game.
INTRANSITIVE = World(
    judge="styles", modes=(1.0, 0.0, 0.0), misread=0.0, corrupt=0.0, junk_answer=0.0, steps=400,
    styles=(0.45, 0.25, 0.3),
    sppo=OPERATIONS.sppo | dict(iterations=40, prompts_per_iteration=1024, batch_size=32, keep="last",
                                test_prompts=1000, print_every=32),
    self_play={"optimistic": dict(eta=3.0), "magnetic": dict(eta=3.3, lr=1e-3)},
    sppo_loss={"sppo": dict(eta=2.0, lr=5e-4, epochs=1, all_responses=True),
               "sppo-hard": dict(eta=1.0, lr=5e-4, epochs=1),
               "dpo": dict(beta=1.0, lr=2e-4, epochs=1), "ipo": dict(beta=0.5, lr=5e-4, epochs=1)})

WORLDS = {"operations": OPERATIONS, "narrow": NARROW, "tilted": TILTED, "intransitive": INTRANSITIVE}


# ---------------------------------------------------------------------------------------------------------------------


def _show(argv):
    """Ten queries with the oracle's verdicts, then the base's accuracy by operation and by number of operations."""
    import transformers

    @dataclasses.dataclass
    class Settings:
        world: str = flag("operations", "which world", tuple(WORLDS))
        queries: int = flag(2000, "how many test queries the base's figures are taken over", at_least=1)
        votes: int = flag(32, "samples whose most frequent answer is the base's vote", at_least=1)

    settings = flags.parse(Settings, argv, "show the embedded world and its base")
    shown = WORLDS[settings.world]
    directory = base(shown)
    net, tokenizer = model.Transformer.from_pretrained(directory), transformers.AutoTokenizer.from_pretrained(directory)
    test, votes = shown.queries("test", settings.queries), settings.votes
    greedy, samples = answers(net, tokenizer, test, 0), answers(net, tokenizer, test * votes, 1)
    if shown.styles:                    # what is scored here are the letters
        greedy, samples = ([a if style(a) is None else a[:-1] for a in texts] for texts in (greedy, samples))
    sampled = samples[:len(test)]
    vote = [collections.Counter(samples[i::len(test)]).most_common(1)[0][0] for i in range(len(test))]
    print(f"\n{'query':34s} {'right':8s} {'base, sampled':14s} {'R':>5s}   {'base, greedy':14s} {'R':>5s}")
    for q, s, g in list(zip(test, sampled, greedy))[:10]:
        print(f"{q:34s} {shown.solve(q):8s} {s:14s} {shown.score(q, s):5.2f}   {g:14s} {shown.score(q, g):5.2f}")
    groups = {"all": test} | {op: [q for q in test if op in shown.parse(q)[0]] for op in shown.ops}
    groups |= {f"{n} operation{'s' * (n > 1)}": [q for q in test if len(shown.parse(q)[0]) == n] for n in (1, 2, 3)}
    by_query = {q: (*answers, shown.parse(q)[1]) for q, *answers in zip(test, sampled, greedy, vote)}
    print(f"\n{'accuracy of the base on':24s}"
          f" {'queries':>8s} {'sampled':>8s} {'greedy':>8s} {'vote':>8s} {'copying':>8s}   "
          f"(vote: the most frequent of {votes} samples; copying: the word itself)")
    for name, group in groups.items():
        rows = [[shown.score(q, a) == 1 for a in by_query[q]] for q in group]
        print(f"{name:24s} {len(group):8d}" + "".join(f" {sum(column) / len(group):8.3f}" for column in zip(*rows)))


if __name__ == "__main__":
    run.main(_show)
