"""Who judges, and how scores become preferences.

A judge looks at one prompt and K responses to it and says which it likes. Four can be named by --judge:

  oracle:WORLD  an embedded world's exact scorer (World.score): a reward in [0, 1]; `oracle` is that of operations
  styles        the intransitive world's: a preference over three styles that no reward could express
  pairrm:PATH   PairRM, a DeBERTa that reads the prompt and TWO responses at once and gives one logit for the pair
  reward:PATH   a reward model: a classifier with one label that reads the prompt and ONE response, and gives a number

Shapes, here and below: B prompts, K responses each, T tokens, H hidden. Three things are never mixed up:

  preference    P[b, i, j] in [0, 1], the probability that response i beats response j; P + P^T = 1, diagonal 1/2
  reward        one score per response; it becomes a preference through Bradley-Terry, and is then transitive
  self_reward   LSP's mark 0..7 for a query and its answer, given by the policy's own initial model (SelfReward)

PairRM's raw logits M[i, j] (i on the left) become P in one of two ways, `estimator`:

  pairwise      P_ij = sigmoid((M_ij - M_ji) / 2). Both orders are read: M is not antisymmetric.
                PairRM is trained with -log sigmoid(M), so half the difference is a calibrated logit. Cycles survive.
  aggregate     s_i = mean_j (M_ij - M_ji), P_ij = sigmoid(s_i - s_j): what the official SPPO code does. Each response
                gets one number, so the result is transitive by construction: a judge that prefers a to b, b to c and
                c to a comes out indifferent, and the reason for playing a game with general preferences is gone.
                Where M is additive (M_ij = a_i - a_j) its logit is 2 (a_i - a_j), twice the pairwise one.

Where this departs from the official PairRM code (llm-blender), and why:
  - The prompt goes in raw, as PairRM was trained; the official SPPO code hands over the chat-templated one.
  - A prompt's length budget depends on that prompt alone, as in PairRM's own example code; llm-blender's ranking takes
    the longest prompt of the batch, so that a score there depends on its neighbours.
  - "[SEP]" in a text becomes a space, as there. So do the four role markers, with which a response could pose as its
    rival: self-play finds such holes.
  - tokenizer.json is taken as stored: transformers 5 would give a DeBERTa tokenizer a normaliser of its own.
  - The head is float32 whatever the encoder's dtype is; the scripts give the encoder their own --dtype.
  - Plain DebertaV2Model, weights loaded key by key: llm-blender neither imports nor loads under transformers 5.

    judge = prefmodel.load("pairrm:llm-blender/PairRM", device="cuda", dtype=torch.bfloat16)
    P = judge.preference(["Name a prime."], [["7", "8", "It is 7."]])      # [1, 3, 3]
    wins = kernels.phat(P)                                                 # [1, 3]
"""

import dataclasses
import glob
import itertools
import json
import math
import os
import pickle
import re

import torch
from torch.nn.utils.rnn import pad_sequence

import model
import rollout
import world
from chat import TEMPLATE_DATE, fill, read_template, shortened
from model import fetch
from run import UserError, gather, progress, stream


def load(spec, estimator="pairwise", device="cpu", dtype=torch.float32):
    """The judge that --judge names: "oracle", "oracle:WORLD", "styles", "pairrm:PATH" or "reward:PATH", where PATH is
    a directory or a hub id.

    `estimator`, "pairwise" or "aggregate", is for PairRM's logits; the other judges need none.
    Raises UserError for an unknown judge or estimator, and for a checkpoint that cannot be used.
    """
    kind, _, path = spec.partition(":")
    if estimator not in ESTIMATORS:
        raise UserError(f"--estimator {estimator} is not known; choose one of {', '.join(ESTIMATORS)}")
    if estimator != "pairwise" and kind != "pairrm":
        raise UserError(f"--estimator {estimator} is for PairRM's logits, and {spec} has none; give --estimator "
                        "pairwise")
    if kind in WORLD_JUDGES and (not path or path in world.WORLDS):
        return WORLD_JUDGES[kind](world.WORLDS[path or "operations"])
    if kind == "pairrm" and path:
        return PairRM(path, estimator, device, dtype)
    if kind == "reward" and path:
        return RewardModel(path, device, dtype)
    raise UserError(f"--judge {spec} is not known; give {', '.join(WORLD_JUDGES)}, pairrm:PATH or reward:PATH, PATH "
                    "being a directory or a hub id such as llm-blender/PairRM")


def world_of(spec):
    """The embedded world that a judge is at home in, or None: such a judge reads nothing but that world's language."""
    kind, _, name = spec.partition(":")
    name = name or {"oracle": "operations", "styles": "intransitive"}.get(kind)
    return world.WORLDS.get(name) if kind in WORLD_JUDGES else None


def judge_of(name):
    """The judge of the embedded world `name`, as --judge would spell it. Raises UserError for an entry of the registry
    whose judge is at home in another world."""
    spec = world.WORLDS[name].judge
    if world_of(spec) is not world.WORLDS[name]:
        raise UserError(f'--world {name} has judge="{spec}", which is another world\'s; give its entry in world.WORLDS '
                        f'judge="oracle:{name}"')
    return spec


# ---------------------------------------------------------------------------------------------------------------------
# from scores to preferences: pure functions, float32


def pairwise_preference(M):
    """sigmoid((M_ij - M_ji) / 2): raw pair logits M [..., K, K] -> P [..., K, K]; keeps cycles.

    >>> pairwise_preference(torch.tensor([[0., 3.], [-1., 0.]]))  # the left seat is worth 1; sigmoid(2) = .8808
    tensor([[0.5000, 0.8808],
            [0.1192, 0.5000]])
    """
    M = M.float()
    return torch.sigmoid((M - M.mT) / 2)


def aggregate_preference(M):
    """The official SPPO code's P = sigmoid(s_i - s_j), s_i = mean_j (M_ij - M_ji): M [..., K, K] -> P [..., K, K].

    The mean runs over all K, the zero of the diagonal included. Transitive whatever M is: the cycle below is gone.

    >>> aggregate_preference(torch.tensor([[0., 2., -2.], [-2., 0., 2.], [2., -2., 0.]])).unique()
    tensor([0.5000])
    """
    M = M.float()
    return bradley_terry((M - M.mT).mean(-1))


def bradley_terry(rewards, scale=1.0):
    """sigmoid(scale (r_i - r_j)): rewards [..., K] -> P [..., K, K].

    >>> bradley_terry(torch.tensor([1., 0.]), scale=2.0)
    tensor([[0.5000, 0.8808],
            [0.1192, 0.5000]])
    """
    rewards = rewards.float()
    return torch.sigmoid(scale * (rewards.unsqueeze(-1) - rewards.unsqueeze(-2)))


ESTIMATORS = {"pairwise": pairwise_preference, "aggregate": aggregate_preference}



def _rectangle(prompts, responses):
    """(B, K) of a question to a judge; ValueError where the lists do not fit together."""
    counts = [len(row) for row in responses]
    if len(prompts) != len(counts) or len(set(counts)) > 1 or 0 in counts:
        raise ValueError(f"a judge takes B prompts and B lists of K >= 1 responses, one K for all; got {len(prompts)} "
                         f"prompts and lists of {sorted(set(counts))} responses, {len(counts)} of them")
    return len(prompts), counts[0] if counts else 0


# ---------------------------------------------------------------------------------------------------------------------
# the embedded world's oracle


class OracleJudge:
    """Exact marks from a world's `score`, softened into preferences by P = sigmoid(6 (R - R'))."""

    name = "oracle"
    scale = 6.0  # right against wrong (1 against at most .5) is won with .95 or more, against nothing right with .998

    def __init__(self, world):
        self.world = world

    def reward(self, prompts, responses):
        """Marks in [0, 1]: B queries, B lists of K answers -> [B, K] float32."""
        B, K = _rectangle(prompts, responses)
        marks = [[self.world.score(query, answer) for answer in row] for query, row in zip(prompts, responses)]
        return torch.tensor(marks, dtype=torch.float32).reshape(B, K)

    def preference(self, prompts, responses):
        """B queries, B lists of K answers -> P [B, K, K] float32."""
        return bradley_terry(self.reward(prompts, responses), self.scale)


class StylesJudge:
    """The intransitive world's judge: a taste in styles that runs in a circle, whatever the letters say.

    Style 0 beats 1 with probability .9, 1 beats 2 with .8, 2 beats 0 with .7 (world.STYLES). An answer that ends with
    no style loses to every one that does. No reward can say this: the Nash equilibrium mixes (1/3, 2/9, 4/9).
    """
    name = "styles"

    def __init__(self, world):
        pass                                                    # styles mean the same whatever the letters are

    def preference(self, prompts, responses):
        """B queries, B lists of K answers -> P [B, K, K] float32."""
        B, K = _rectangle(prompts, responses)
        table = torch.full((4, 4), 0.5)                         # the fourth: no style
        table[:3, :3] = torch.tensor(world.STYLES)
        table[:3, 3], table[3, :3] = 1.0, 0.0
        styles = torch.tensor([[3 if world.style(a) is None else world.style(a) for a in row] for row in responses],
                              dtype=torch.long).reshape(B, K)
        return table[styles[:, :, None], styles[:, None, :]]


WORLD_JUDGES = {"oracle": OracleJudge, "styles": StylesJudge}


# ---------------------------------------------------------------------------------------------------------------------
# PairRM

MARKERS = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]  # in the order in which they were added
SMALL_FILES = ["*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "spm.model"]
WEIGHT_FILES = ["model.safetensors", "pytorch_model.bin"]


class PairRM:
    """llm-blender's PairRM from a directory or a hub id, in either of its two published layouts (see `_open`).

    estimator       "pairwise" or "aggregate": how `preference` reads the logits
    batch_tokens    tokens per forward pass, padding included. DeBERTa holds several [rows, heads, T, T] tensors, for
                    PairRM in float32 2.1 GB each at the default and T = 2,048: lower it where memory is short
    max_source      tokens of a prompt, [CLS], marker and [SEP] included (default: the ranker's config, else 1224)
    max_candidate   tokens that every response may have in any case (default: the ranker's config, else 412)
    max_tokens      tokens of a pair (default: max_source + 2 max_candidate = 2048). What a short prompt leaves
                    unused goes to the responses, (max_tokens - len(prompt)) // 2 each

    Raises UserError, naming the file and the remedy, for a checkpoint that is missing, cut short or not a PairRM.
    """

    def __init__(self, path, estimator="pairwise", device="cpu", dtype=torch.float32, batch_tokens=16384,
                 max_source=None, max_candidate=None, max_tokens=None):
        self.name, self.estimator, self.device, self.batch_tokens = f"pairrm:{path}", estimator, device, batch_tokens
        settings, config, self.tokenizer, weights, file = _open(path)
        self.max_source = max_source or settings.get("source_maxlength", 1224)
        max_candidate = max_candidate or settings.get("candidate_maxlength", 412)
        self.max_tokens = max_tokens or self.max_source + 2 * max_candidate
        if self.max_source < 3 or self.max_tokens - self.max_source < 6:  # [CLS], marker and [SEP] of every segment
            raise ValueError(f"no room for a pair: max_source {self.max_source}, max_tokens {self.max_tokens}")
        self.pad = config.pad_token_id or 0
        self.markers = _marker_ids(self.tokenizer, settings, config, path)  # ids of source, candidate 1, candidate 2
        self.net = _network(config, settings.get("n_tasks", 1))
        _load_strictly(self.net, weights, file)
        self.net.eval().requires_grad_(False).to(device)
        self.net["pretrained_model"].to(dtype)  # the head stays float32: it is tiny, and its differences are the result

    def preference(self, prompts, responses):
        """B prompts (raw, no chat template), B lists of K responses -> P [B, K, K] float32, on the CPU."""
        return ESTIMATORS[self.estimator](self.logits(prompts, responses))

    def logits(self, prompts, responses):
        """Raw M [B, K, K] float32 on the CPU: M[b, i, j] with response i on the left; diagonal 0.

        All B K (K - 1) ordered pairs, equal responses of a prompt counted once, go through the network in order of
        length, so that a batch is hardly padded; a pair's logit does not depend on its batch beyond rounding.
        Raises ValueError where the lists do not fit together, UserError where logits overflow the dtype.
        """
        B, K = _rectangle(prompts, responses)
        cells = {}  # (b, left text, right text) -> the cells of M that this pair fills
        for b, row in enumerate(responses):
            for i, j in itertools.permutations(range(K), 2):
                cells.setdefault((b, row[i], row[j]), []).append((b, i, j))
        sources, candidates = self._segments(prompts), self._segments(itertools.chain(*responses))

        def fitted(b, left, right):
            return self._fit(sources[prompts[b]], candidates[left], candidates[right])

        pairs = list(cells)
        lengths = [sum(map(len, fitted(*pair))) for pair in pairs]
        M = torch.zeros(B, K, K)
        with progress(desc="judging", total=len(pairs)) as bar:
            for batch in batches_by_length(lengths, self.batch_tokens):
                for n, logit in zip(batch, self._score([fitted(*pairs[n]) for n in batch])):
                    for cell in cells[pairs[n]]:
                        M[cell] = logit
                bar.update(len(batch))
        if not M.isfinite().all():
            raise UserError(f"{self.name} gave logits that are not finite; give another --dtype, float32 or bfloat16")
        return M

    def pair_ids(self, prompt, left, right):
        """The token ids that the network reads for one pair: a list of at most `max_tokens` ints.

        [CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> left [SEP] [CLS] <|candidate2|> right [SEP]
        """
        segments = self._segments([prompt, left, right])
        return list(itertools.chain(*self._fit(segments[prompt], segments[left], segments[right])))

    def _segments(self, texts):
        """{text: ids of [CLS] marker text [SEP]}, uncut, every text tokenised once; `_fit` puts in the marker."""
        texts, clean = list(dict.fromkeys(texts)), []
        for text in texts:
            for special in ["[SEP]", *MARKERS]:
                text = text.replace(special, " ")
            clean.append(MARKERS[-1] + text)
        return dict(zip(texts, self.tokenizer(clean, verbose=False)["input_ids"])) if texts else {}

    def _fit(self, source, left, right):
        """Three segments cut to their budgets on the right ([SEP] survives), each with its role's marker."""
        room = [self.max_source]
        room += [(self.max_tokens - min(len(source), self.max_source)) // 2] * 2
        return [[ids[0], marker] + (ids[2:] if len(ids) <= n else ids[2:n - 1] + ids[-1:])
                for ids, marker, n in zip((source, left, right), self.markers, room)]

    @torch.inference_mode()
    def _score(self, rows):
        """Logits, a list of R floats, of R pairs as `_fit` returns them, in one forward pass."""
        T = max(sum(map(len, row)) for row in rows)
        ids = torch.full((len(rows), T), self.pad)                                          # [R, T]
        mask = torch.zeros(len(rows), T, dtype=torch.long)
        for r, row in enumerate(rows):
            flat = torch.tensor(list(itertools.chain(*row)))
            ids[r, :len(flat)] = flat
            mask[r, :len(flat)] = 1  # from lengths: comparing with the pad id would hide a "[PAD]" inside a text
        at = torch.tensor([[1, 1 + len(s), 1 + len(s) + len(c)] for s, c, _ in rows], device=self.device)  # [R, 3]
        out = self.net["pretrained_model"](input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        hidden = out.last_hidden_state                                                      # [R, T, H]
        markers = hidden[torch.arange(len(rows), device=self.device)[:, None], at].float()  # [R, 3, H]
        left, right = (self.net["head_layer"](torch.cat([markers[:, 0], markers[:, seat]], -1)) for seat in (1, 2))
        return (left - right).mean(-1).tolist()  # over tasks; the published models have one


def batches_by_length(lengths, budget):
    """Indices of `lengths`, longest first, in groups with (size x longest) <= budget; an over-long item goes alone.

    Longest first, so that a batch too big for the memory fails at once and not after an hour.

    >>> batches_by_length([3, 9, 4, 2], budget=10)
    [[1], [2, 0], [3]]
    """
    batches = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(n)
    return batches


def _network(config, n_tasks):
    """Encoder and head with random weights; the names and the head's indices are the checkpoints' keys."""
    from transformers import DebertaV2Model     # here and below: `--help` must not wait for transformers

    H = config.hidden_size
    head = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2 * H, H), torch.nn.Tanh(),
                               torch.nn.Dropout(), torch.nn.Linear(H, n_tasks))  # dropout: for training only
    return torch.nn.ModuleDict({"pretrained_model": DebertaV2Model(config), "head_layer": head})


# ---------------------------------------------------------------------------------------------------------------------
# opening a PairRM checkpoint


def _open(path):
    """(settings, DebertaV2Config, tokenizer, weights, weights file) of a checkpoint in either published layout.

    llm-blender/PairRM      config.json is the ranker's (model_name, source_maxlength, n_tasks ...); the backbone's own
                            config, and the tokenizer if there is none beside the weights, come from `model_name`
    llm-blender/PairRM-hf   config.json is a DeBERTa config with the markers' ids; everything in one place
    """
    from transformers import DebertaV2Config

    directory = backbone = fetch(path, SMALL_FILES)
    settings = described = _read_json(directory)
    if settings.get("ranker_type") == "pairranker" and settings.get("model_name"):
        backbone = fetch(settings["model_name"], SMALL_FILES)
        described = _read_json(backbone)
    elif "source_prefix_id" not in settings:
        raise UserError(f"{directory}/config.json is not a PairRM's: it has neither ranker_type pairranker with a "
                        "model_name (llm-blender/PairRM) nor source_prefix_id (llm-blender/PairRM-hf); give one of "
                        "these")
    if described.get("model_type") != "deberta-v2":
        raise UserError(f"{backbone}/config.json has model_type {described.get('model_type')}, not deberta-v2; give a "
                        "PairRM on DeBERTa-v2 or v3")
    tokenizer = _tokenizer(directory if os.path.exists(f"{directory}/tokenizer.json") else backbone)
    file = _weights_file(path)
    weights, config = _read_weights(file), DebertaV2Config.from_dict(described)
    embedding = weights.get("pretrained_model.embeddings.word_embeddings.weight")
    if described is not settings and embedding is not None:
        config.vocab_size = len(embedding)  # the ranker resized the backbone's table to its own tokenizer
    return settings, config, tokenizer, weights, file


def _weights_file(path):
    """The first of WEIGHT_FILES that exists; on the hub only that one is downloaded, each is 1.7 GB."""
    for name in WEIGHT_FILES:
        file = os.path.join(fetch(path, [name]), name)
        if os.path.exists(file):
            return file
    raise UserError(f"{path} has no weights, neither {' nor '.join(WEIGHT_FILES)}; complete the checkpoint")


def _read_json(directory):
    try:
        with open(f"{directory}/config.json") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        reason = _first_line(error)
        raise UserError(f"{directory}/config.json cannot be read ({reason}); complete the checkpoint") from None


def _read_weights(file):
    """{key: tensor}, never running code from the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(weights, dict) and all(isinstance(value, torch.Tensor) for value in weights.values()):
            return weights
        reason = "not a table of tensors"
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = _first_line(error)
    raise UserError(f"{file} cannot be read ({reason}); it may be cut short: download it again")


def _load_strictly(net, weights, file):
    """Copy `weights` into `net`; UserError on the first key that is missing, left over or of another shape."""
    want = net.state_dict()
    # older transformers stored this buffer, which is a plain arange
    weights = {key: value for key, value in weights.items() if not key.endswith("embeddings.position_ids")}
    for key in [*want, *weights]:
        reason = None
        if key not in weights:
            reason = f"lacks the weight {key}"
        elif key not in want:
            reason = f"has a weight {key} that the model described by its config.json does not have"
        elif weights[key].shape != want[key].shape:
            reason = f"has {key} of shape {list(weights[key].shape)}, its config.json asks for {list(want[key].shape)}"
        if reason:
            raise UserError(f"{file} {reason}; give the weights and the config of one checkpoint")
    net.load_state_dict(weights)


def _tokenizer(directory):
    """The directory's tokenizer.json exactly as stored, else what AutoTokenizer makes of the other files.

    Not AutoTokenizer first: for the class name that DeBERTa's tokenizer_config.json carries, transformers 5 keeps the
    vocabulary but replaces the stored normaliser, and the same text gets other ids than those PairRM was trained on.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        stored = os.path.exists(os.path.join(directory, "tokenizer.json"))
        return (PreTrainedTokenizerFast if stored else AutoTokenizer).from_pretrained(directory)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise UserError(f"{directory} has no tokenizer that can be read ({_first_line(error)}); put its tokenizer.json "
                        "there") from None


def _marker_ids(tokenizer, settings, config, path):
    """Ids of <|source|>, <|candidate1|>, <|candidate2|>: the config's where it has them, else the tokenizer's."""
    tokenizer.add_tokens(MARKERS)  # adds only what is missing; the ranker's layout leaves this to the reader
    stored = tokenizer.convert_tokens_to_ids(MARKERS)
    keys = ["source_prefix_id", "cand1_prefix_id", "cand2_prefix_id"]
    ids = [settings.get(key, known) for key, known in zip(keys, stored)]
    if max(*ids, len(tokenizer) - 1) >= config.vocab_size:
        raise UserError(f"{path}: the tokenizer's {len(tokenizer)} tokens do not fit the model's {config.vocab_size} "
                        "embeddings; give the tokenizer that belongs to the weights")
    empty = tokenizer(MARKERS[-1])["input_ids"]
    if len(empty) != 3 or empty[1] != stored[-1]:
        raise UserError(f"{path}: the tokenizer does not write [CLS] {MARKERS[-1]} text [SEP]; give PairRM's own")
    return ids


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# ---------------------------------------------------------------------------------------------------------------------
# reward models


class RewardModel:
    """A sequence classifier with one label, from a directory or a hub id: the label's logit is the reward.

    decoders    Llama, Mistral, Qwen2, Qwen3, Gemma 2 and others with a `score` head, for instance
                Skywork/Skywork-Reward-V2-Llama-3.2-3B: a user's and an assistant's turn through the model's own chat
                template, its ids as they are. Read at the last token, by length; transformers' own forward takes the
                last that is not the config's pad token, which is another where an answer or its turn ends in that one
    DeBERTa     v2 and v3, for instance OpenAssistant/reward-model-deberta-v3-large-v2: tokenizer(prompt, answer), a
                pair of texts, read at [CLS]

    Where both exceed the model's positions the ANSWER is cut on its right; what closes it (end of turn, [SEP]) stays.
    A special token spelt out in a text is read as one, as in both models' examples. batch_tokens: tokens per forward
    pass, padding included. The head is float32 whatever `dtype` is.
    Raises UserError, naming the file and the remedy, for a checkpoint that is missing, cut short or of another kind.
    """

    def __init__(self, path, device="cpu", dtype=torch.float32, batch_tokens=16384):
        self.name, self.device, self.batch_tokens = f"reward:{path}", device, batch_tokens
        self.net, self.tokenizer, self.is_deberta = _open_reward(path, dtype)
        self.net.requires_grad_(False).to(device)
        (self.net.classifier if self.is_deberta else self.net.score).float()
        self.net.config.use_cache = False
        self.context = getattr(self.net.config, "max_position_embeddings", float("inf"))
        try:
            ends = zip(reversed(self._ids("a", "a")), reversed(self._ids("a", "1")))
        except Exception as error:  # whatever a template raises, or makes the template language raise
            raise UserError(f"{path}: its chat template cannot write a user's and an assistant's turn "
                            f"({_first_line(error)}); mend its chat_template.jinja") from None
        # how many ids follow an answer: those in which two answers' rows end alike
        self.closing = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], ends)))

    def preference(self, prompts, responses):
        """B prompts, B lists of K responses -> P [B, K, K] float32: Bradley-Terry, sigmoid(r_i - r_j)."""
        return bradley_terry(self.reward(prompts, responses))

    def reward(self, prompts, responses):
        """B prompts (raw, no chat template), B lists of K responses -> [B, K] float32, on the CPU.

        What reads the same, cut or trimmed too, is scored once and so ties exactly; beyond rounding a reward does not
        depend on its batch.
        Raises ValueError where the lists do not fit together, UserError for a prompt that fills the model's positions
        by itself and for rewards that overflow the dtype.
        """
        B, K = _rectangle(prompts, responses)
        pairs = dict.fromkeys((x, y) for x, row in zip(prompts, responses) for y in row)
        read = {pair: tuple(self.row_ids(*pair)) for pair in progress(pairs, desc="tokenising")}
        rows, scores = list(dict.fromkeys(read.values())), {}
        with progress(desc="scoring", total=len(rows)) as bar:
            for batch in batches_by_length([len(row) for row in rows], self.batch_tokens):
                batch = [rows[n] for n in batch]
                scores |= zip(batch, self._score(batch))
                bar.update(len(batch))
        rewards = [[scores[read[x, y]] for y in row] for x, row in zip(prompts, responses)]
        rewards = torch.tensor(rewards, dtype=torch.float32).reshape(B, K)
        if not rewards.isfinite().all():
            raise UserError(f"{self.name} gave rewards that are not finite; give another --dtype, float32 or bfloat16")
        return rewards

    def fits(self, prompt):
        """Does a prompt leave room for an answer?"""
        return len(self._ids(prompt, "a")) <= self.context

    def row_ids(self, prompt, response):
        """The token ids that the network reads for one pair: a list of at most `context` ints."""
        ids = self._ids(prompt, response)
        if len(ids) <= self.context:
            return ids
        if not self.fits(prompt):
            raise UserError(f"the prompt {prompt[:40]!r} leaves no room for an answer in the {self.context} positions "
                            f"of {self.name}; shorten or remove it")
        return ids[:self.context - self.closing] + ids[len(ids) - self.closing:]

    def _ids(self, prompt, response):
        if self.is_deberta:
            return self.tokenizer(prompt, response, verbose=False)["input_ids"]
        talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return self.tokenizer.apply_chat_template(talk, return_dict=False, tokenizer_kwargs={"verbose": False},
                                                  **TEMPLATE_DATE)

    @torch.inference_mode()
    def _score(self, rows):
        """Rewards, a list of R floats, of R rows of ids, in one forward pass."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)   # [R, T], by any id: it is masked
        mask = torch.arange(ids.shape[1]) < lengths[:, None]  # from lengths: a text may hold the pad token
        out = self.net.base_model(input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device))
        hidden = out.last_hidden_state                                              # [R, T, H]
        if self.is_deberta:
            return self.net.classifier(self.net.pooler(hidden).float())[:, 0].tolist()
        return self.net.score(hidden[range(len(rows)), (lengths - 1).tolist()].float())[:, 0].tolist()


def _open_reward(path, dtype):
    """(sequence classifier, tokenizer, whether it is a DeBERTa), checked; no code from the checkpoint runs."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    directory = fetch(path)
    named = _read_json(directory).get("architectures")
    if not isinstance(named, list) or not any(str(name).endswith("ForSequenceClassification") for name in named):
        raise UserError(f"{directory}/config.json has architectures {named}, no ...ForSequenceClassification; give a "
                        "reward model such as Skywork/Skywork-Reward-V2-Llama-3.2-3B")
    if not glob.glob(f"{glob.escape(directory)}/*.safetensors"):
        fetch(path, ["pytorch_model*.bin"])
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers prints a table of the keys that do not fit; ours is one sentence
    try:
        net, keys = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=dtype, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True)
    except Exception as error:  # a dozen kinds; safetensors and torch have their own for a damaged file
        raise UserError(f"{directory} does not open as a reward model ({_first_line(error)}); complete it or download "
                        "it again") from None
    finally:
        logging.set_verbosity(verbosity)
    harmless = ("lm_head.weight", "embeddings.position_ids", "rotary_emb.inv_freq")  # left over, of no effect
    wrong = [f"lack {key}" for key in sorted(keys["missing_keys"])]  # transformers would fill it with random numbers
    wrong += [f"have {key} of shape {list(is_)}, not {list(asked)}" for key, is_, asked in keys["mismatched_keys"]]
    wrong += [f"have an unknown {key}" for key in sorted(keys["unexpected_keys"]) if not key.endswith(harmless)]
    if wrong:
        raise UserError(f"the weights in {directory} {wrong[0]}; give weights and config.json of one checkpoint")
    c, is_deberta = net.config, net.config.model_type == "deberta-v2"
    if c.num_labels != 1:
        raise UserError(f"{directory} is a reward model with more than one label ({c.num_labels}); give one with one")
    if is_deberta and c.type_vocab_size or not is_deberta and not hasattr(net, "score"):
        raise UserError(f"{directory} holds a {type(net).__name__} that cannot be read here; give a decoder with a "
                        "score head, or a DeBERTa v2 or v3 without token types")
    tokenizer = _tokenizer(directory)
    if not is_deberta and not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {path} has no chat template; add its chat_template.jinja to the directory")
    if len(tokenizer) > c.vocab_size:
        raise UserError(f"{path}: the tokenizer's {len(tokenizer)} tokens do not fit the model's {c.vocab_size} "
                        "embeddings; give the tokenizer that belongs to the weights")
    return net, tokenizer, is_deberta


# ---------------------------------------------------------------------------------------------------------------------
# a language model that marks answers: LSP's self-reward

# The content of the paper's Box 3, a sum of seven yes-or-no points.
SELF_REWARD_PROMPT = """\
You will see a user's instruction and the response of an assistant. Together they get 0 to 7 points. Begin with 0 and \
add 1 point for each of these statements that is true:

1. From the instruction one can clearly tell what the user wants to have done.
2. The instruction is clear, specific and well structured.
3. The user will be able to understand the response.
4. The response deals with a considerable part of what was asked.
5. The response answers the core of what was asked, in a useful and complete way.
6. The response is clearly written, concise, well organized and helpful.
7. The user will most likely be pleased with the form and the style of the response.

<Instruction>
{query}
</Instruction>

<Response>
{answer}
</Response>

First explain your points in at most 100 words. Then write the sum between Calculation tags, one number for each \
statement, and then the total between Score tags, for example:
<Calculation>1+0+1+0+1+1+0=4</Calculation>
<Score>4</Score>
"""


@dataclasses.dataclass
class Verdict:
    """What the self-reward says of one query and answer."""
    mark: float | None                  # 0..7, None where it cannot be read
    wrong_sum: bool = False             # does its own calculation add up to another mark?
    tokens: int = 0                     # how long it was


class SelfReward:
    """R_Q of LSP: the frozen initial model's verdict 0..7 on a query and its answer.

    For real models it writes one, under a rubric of seven points (SELF_REWARD_PROMPT). An embedded world's base has a
    judge mode, trained on its ORACLE's labels (World.judge_label), so that there "data-free" means: no data beyond what
    the base has seen.

    how: "sample", a verdict is written; "expected", the mean of the score's distribution, without a justification.
    rubric: a file with another text. Raises UserError where rubric or tokenizer do not allow it.
    """

    def __init__(self, ref, chat, how="sample", rubric="", max_verdict_tokens=256, max_rows=64, seed=0,
                 on_world=False):
        self.ref, self.chat, self.how, self.seed, self.on_world = ref, chat, how, seed, on_world
        self.max_verdict_tokens, self.max_rows = max_verdict_tokens, max_rows
        self.rubric = world.JUDGE if on_world else read_template("--self-reward-prompt", rubric, SELF_REWARD_PROMPT,
                                                                 ("query", "answer"))
        self.room = chat.room(0, max_verdict_tokens)
        if len(self.encode("", "")) > self.room:
            raise UserError(f"the rubric leaves no room in the model's context of {chat.context} tokens; lower "
                                "--max-verdict-tokens, or give a shorter --self-reward-prompt")
        # The ids of what a verdict writes before its score, and those of the eight scores
        start = "" if on_world else "<Score>"
        ids = [chat.tokenizer.encode(start + digit, add_special_tokens=False) for digit in "01234567"]
        self.start, self.digits = ids[0][:-1], [row[-1] for row in ids]
        if how == "expected" and (any(row[:-1] != self.start for row in ids) or len(set(self.digits)) < 8):
            raise UserError("--self-reward expected needs a tokenizer in which <Score> and a digit are separate "
                                "tokens; give --self-reward sample")

    def encode(self, query, answer):
        """The judge's prompt as ids. Neither text can pose as another turn, or bring tags of its own: a verdict is read
        from what the judge writes, and these would be there to be copied."""
        query, answer = (re.sub(r"<(\s*/?\s*(?:score|calculation|instruction|response)\s*)>", r"(\1)",
                                self.chat.plain(text), flags=re.IGNORECASE) for text in (query, answer))

        def ids(query, answer):
            return self.chat.encode(fill(self.rubric, query=query, answer=answer))
        query = shortened(query, lambda q: len(ids(q, "")) <= self.room)
        return ids(query, shortened(answer, lambda a: len(ids(query, a)) <= self.room))

    @torch.no_grad()
    def score(self, queries, answers, step, shard=(0, 1)):
        """(R_Q [N, G] float32, figures for metrics.jsonl) of N queries and N lists of G answers. Each distinct pair of
        query and answer is judged once; every rank judges its share."""
        rank, ranks = shard
        pairs = list(dict.fromkeys((q, a) for q, group in zip(queries, answers) for a in group))
        mine = range(rank, len(pairs), ranks)
        prompts = [self.encode(*pairs[i]) for i in mine]
        if self.how == "expected":
            verdicts = self.expected([prompt + self.start for prompt in prompts])
        else:
            verdicts = self.written(prompts, [stream(self.seed, "verdicts", step) + i for i in mine])
        verdicts = gather(verdicts, len(pairs))
        mark_of = {pair: math.nan if v.mark is None else float(v.mark) for pair, v in zip(pairs, verdicts)}
        R_Q = torch.tensor([[mark_of[q, a] for a in group] for q, group in zip(queries, answers)])
        return fill_unread(R_Q), {"unread_verdicts": sum(v.mark is None for v in verdicts) / len(pairs),
                                  "wrong_sums": sum(v.wrong_sum for v in verdicts) / len(pairs),
                                  "verdict_tokens": sum(v.tokens for v in verdicts) / len(pairs)}

    def written(self, prompts, seeds):
        """Verdicts as the model writes them, one sample each: B lists of ids -> B Verdicts."""
        said = rollout.generate(self.ref, prompts, 1, self.max_verdict_tokens, stop_ids=self.chat.stop_ids,
                                seeds=seeds, max_rows=self.max_rows)
        read = parse_digit if self.on_world else parse_verdict
        return [Verdict(*read(self.chat.decode(ids)), len(ids)) for ids, in said.tokens]

    def expected(self, prompts):
        """The mean score under the next token's distribution over 0..7: B lists of ids -> B Verdicts. The rubric, which
        they all begin with, is computed once for as many prompts as fit into a pass."""
        verdicts, digits = [], torch.tensor(self.digits, device=self.ref.device)
        for start in range(0, len(prompts), self.max_rows):
            hidden = model.prefill(self.ref, prompts[start:start + self.max_rows])[1]
            p = self.ref.logits(hidden)[:, digits].softmax(-1)                                          # [rows, 8]
            verdicts += map(Verdict, (p * torch.arange(8.0, device=p.device)).sum(-1).tolist())
        return verdicts


def fill_unread(R_Q):
    """Verdicts that could not be read (NaN) take the mean of their query's others, so that they move neither player;
    where a whole query has none, the step's mean; where the step has none, the scale's middle. A silent 0 would tell
    both players that something is bad where nothing was said.

    >>> fill_unread(torch.tensor([[6.0, math.nan, 4.0], [math.nan, math.nan, math.nan]]))
    tensor([[6., 5., 4.],
            [5., 5., 5.]])
    """
    R_Q = torch.where(R_Q.isnan(), R_Q.nanmean(1, keepdim=True), R_Q)
    return torch.where(R_Q.isnan(), R_Q.nanmean(), R_Q).nan_to_num(3.5)


def parse_verdict(text):
    """(the last <Score> that is a whole number 0..7, or None; whether the last <Calculation> adds up to another).

    The score counts, as it is what was asked for; a sum that disagrees is counted and logged.

    >>> parse_verdict("Clear. <Calculation>1+1+1+0+0+0+0=3</Calculation><Score>3</Score>")
    (3, False)
    >>> parse_verdict("<Calculation>1+1+1+1+0+0+0=3</Calculation><Score>3/7</Score>")
    (3, True)
    >>> parse_verdict("<Score>5</Score> <Score>8</Score>"), parse_verdict("<Score>good</Score>"), parse_verdict("7")
    ((5, False), (None, False), (None, False))
    """
    scores = re.findall(r"<score>\s*([0-7])(?:\.0*)?\s*(?:/\s*7)?\s*</score>", text, re.IGNORECASE)
    sums = re.findall(r"<calculation>\s*([01](?:\s*\+\s*[01])*)\s*(?:=|</calculation>)", text, re.IGNORECASE)
    if not scores:
        return None, False
    score = int(scores[-1])
    return score, bool(sums) and sum(map(int, sums[-1].split("+"))) != score


def parse_digit(text):
    """The same for the embedded world, whose verdict is one digit.

    >>> parse_digit("6"), parse_digit("8"), parse_digit("66"), parse_digit("ab")
    ((6, False), (None, False), (None, False), (None, False))
    """
    return (int(text) if text in list("01234567") else None), False
