"""PairRM, a judge that reads a prompt and TWO responses at once, and how scores become preferences.

Shapes: B prompts, K responses each, R rows of a forward pass, T tokens, H hidden.

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
  - "[SEP]" in a text becomes a space, as there. So do the four role markers; other special tokens are left out.
  - tokenizer.json is taken as stored: transformers 5 would give a DeBERTa tokenizer a normaliser of its own.
  - The head is float32 whatever the encoder's dtype is; the scripts give the encoder their own --dtype.
  - Plain DebertaV2Model, weights loaded key by key: llm-blender neither imports nor loads under transformers 5.
"""

import itertools
import json
import os
import pickle
import re

import torch

import checkpoints
from chat import turns_of
from checkpoints import fetch
from run import UserError, progress


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


def rectangle(prompts, responses):
    """(B, K) of a question to a judge; ValueError where the lists do not fit together."""
    counts = [len(row) for row in responses]
    if len(prompts) != len(counts) or len(set(counts)) > 1 or 0 in counts:
        raise ValueError(f"a judge takes B prompts and B lists of K >= 1 responses, one K for all; got {len(prompts)} "
                         f"prompts and lists of {sorted(set(counts))} responses, {len(counts)} of them")
    return len(prompts), counts[0] if counts else 0


# ---------------------------------------------------------------------------------------------------------------------
# PairRM

MARKERS = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]  # in the order in which they were added
SMALL_FILES = ["*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "spm.model"]
WEIGHT_FILES = ["model.safetensors", "pytorch_model.bin"]


def conversation_texts(prompt, responses):
    """(source, candidates): a prompt and its responses as PairRM reads them.

    One turn is read as it is, a system turn before it in front. A conversation is written as in llm-blender's
    compare_conversations, from which PairRM learned it: the source has the user's turns and numbered gaps, a candidate
    all that the assistant says. No turn can write a gap or a role of its own.

    >>> from chat import Prompt
    >>> talk = [("user", "Hi."), ("assistant", "Hello!"), ("user", "Why?")]
    >>> print(*conversation_texts(Prompt([dict(role=r, content=c) for r, c in talk]), ["So."])[1], sep="\\n")
    <Response 1>: Hello!
    <Response 2>: So.
    """
    turns = turns_of(prompt)
    if all(turn["role"] != "assistant" for turn in turns):
        return "\n\n".join(turn["content"] for turn in turns), responses

    def plain(text):
        return re.sub(r"^(USER|Assistant):", r"\1 :", re.sub(r"<(?=Response \d)", "(", text), flags=re.MULTILINE)
    lines, said = [], []
    for turn in turns:
        if turn["role"] == "assistant":
            said.append(f"<Response {len(said) + 1}>: {plain(turn['content'])}")
            lines.append(f"Assistant: <Response {len(said)}>")
        else:
            lines.append("USER: " + plain(turn["content"]))
    lines.append(f"Assistant: <Response {len(said) + 1}>")
    task = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
    return task + "\n".join(lines), ["\n".join([*said, f"<Response {len(said) + 1}>: {plain(response)}"])
                                     for response in responses]


def mark_ids(tokenizer):
    """The ids that no text may bring of itself, a set. They are looked for in the ids: a normaliser makes "[SEP]" of
    full-width letters too. [UNK] is not among them, as texts do hold what a tokenizer does not know."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special or token.content in MARKERS}
    return added - {tokenizer.unk_token_id}


def without(marks, ids, first=1):
    """Ids of a text and its frame, `first` ids before it and one behind, without the marks inside."""
    return [*ids[:first], *(i for i in ids[first:-1] if i not in marks), ids[-1]]


class PairRM:
    """llm-blender's PairRM from a directory or a hub id, in either of its two published layouts (see `_open`).

    Conversations: see conversation_texts. One that leaves too little room is cut to its last turn.

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
        self.max_source = max_source or settings.get("source_maxlength") or 1224
        max_candidate = max_candidate or settings.get("candidate_maxlength") or 412
        self.max_tokens = max_tokens or self.max_source + 2 * max_candidate
        if self.max_source < 3 or self.max_tokens - self.max_source < 6:  # [CLS], marker and [SEP] of every segment
            raise ValueError(f"no room for a pair: max_source {self.max_source}, max_tokens {self.max_tokens}")
        self.pad = config.pad_token_id or 0
        self.markers = _marker_ids(self.tokenizer, settings, config, path)  # ids of source, candidate 1, candidate 2
        self.marks = mark_ids(self.tokenizer)
        with torch.device("meta"):              # no network in memory before the weights are known to fit it
            weights = _fitting(_network(config, settings.get("n_tasks") or 1), weights, file)
        self.net = _network(config, settings.get("n_tasks") or 1)
        self.net.load_state_dict(weights)
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
        B, K = rectangle(prompts, responses)
        read = [self._texts(prompt, row) for prompt, row in zip(prompts, responses)]
        prompts, responses = [source for source, _ in read], [candidates for _, candidates in read]
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
        source, (left, right) = self._texts(prompt, [left, right])
        segments = self._segments([source, left, right])
        return list(itertools.chain(*self._fit(segments[source], segments[left], segments[right])))

    def _texts(self, prompt, responses):
        """conversation_texts; of the last turn alone where the source would be cut, or what was said before takes more
        than half of a candidate's room: cutting on the right would take the responses themselves."""
        source, candidates = conversation_texts(prompt, responses)
        if candidates is not responses:
            before = conversation_texts(prompt, [""])[1][0]
            lengths = [len(ids) for ids in self._segments([source, before]).values()]
            if lengths[0] > self.max_source or 4 * lengths[1] > self.max_tokens - self.max_source:
                return turns_of(prompt)[-1]["content"], responses
        return source, candidates

    def _segments(self, texts):
        """{text: ids of [CLS] marker text [SEP]}, uncut, every text tokenised once; `_fit` puts in the marker."""
        texts, clean = list(dict.fromkeys(texts)), []
        for text in texts:
            for special in ["[SEP]", *MARKERS]:
                text = text.replace(special, " ")
            clean.append(MARKERS[-1] + text)
        rows = self.tokenizer(clean, verbose=False)["input_ids"] if texts else []
        return {text: without(self.marks, row, 2) for text, row in zip(texts, rows)}

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


# Every key of a config.json that is read here, and of DeBERTa's that sizes something: see checkpoints.KEYS.
KEYS = {
    **{key: checkpoints.KEYS[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                              "num_attention_heads", "max_position_embeddings")},
    "max_relative_positions": (int, -1, 2**31), "position_buckets": (int, -1, 2**31),
    "type_vocab_size": (int, 0, 2**20), "layer_norm_eps": (float, 0, 1), "relative_attention": (bool,),
    "position_biased_input": (bool,),
    "pad_token_id": (int, -1, 2**24), "source_maxlength": (int, 3, 2**20), "candidate_maxlength": (int, 3, 2**20),
    "n_tasks": (int, 1, 1000), "source_prefix_id": (int, 0, 2**24), "cand1_prefix_id": (int, 0, 2**24),
    "cand2_prefix_id": (int, 0, 2**24), "model_name": (str,), "ranker_type": (str,)}


def _open(path):
    """(settings, DebertaV2Config, tokenizer, weights, weights file) of a checkpoint in either published layout.

    llm-blender/PairRM      config.json is the ranker's (model_name, source_maxlength, n_tasks ...); the backbone's own
                            config, and the tokenizer if there is none beside the weights, come from `model_name`
    llm-blender/PairRM-hf   config.json is a DeBERTa config with the markers' ids; everything in one place
    """
    from transformers import DebertaV2Config

    directory = backbone = fetch(path, SMALL_FILES)
    settings = described = read_json(directory)
    checkpoints.check_keys(settings, f"{directory}/config.json", KEYS)
    if settings.get("ranker_type") == "pairranker" and settings.get("model_name"):
        backbone = fetch(settings["model_name"], SMALL_FILES)
        described = read_json(backbone)
    elif "source_prefix_id" not in settings:
        raise UserError(f"{directory}/config.json is not a PairRM's: it has neither ranker_type pairranker with a "
                        "model_name (llm-blender/PairRM) nor source_prefix_id (llm-blender/PairRM-hf); give one of "
                        "these")
    if described.get("model_type") != "deberta-v2":
        raise UserError(f"{backbone}/config.json has model_type {described.get('model_type')}, not deberta-v2; give a "
                        "PairRM on DeBERTa-v2 or v3")
    tokenizer = open_tokenizer(directory if os.path.exists(f"{directory}/tokenizer.json") else backbone)
    file = _weights_file(path)
    checkpoints.check_keys(described, f"{backbone}/config.json", KEYS)
    try:
        config = DebertaV2Config.from_dict(described)
        with torch.device("meta"):              # no memory yet
            _network(config, 1)
    except Exception as error:                  # transformers raises whatever its code runs into
        raise UserError(f"{backbone}/config.json does not describe a DeBERTa ({first_line(error)}); download it "
                        "again") from None
    weights = _read_weights(file)
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


def read_json(directory):
    """A checkpoint's config.json, a dict. Raises UserError where it cannot be read."""
    try:
        with open(f"{directory}/config.json") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        reason = first_line(error)
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
        reason = first_line(error)
    raise UserError(f"{file} cannot be read ({reason}); it may be cut short: download it again")


def _fitting(net, weights, file):
    """The weights that the net has; UserError on the first that is missing, left over, of another shape, or no finite
    floating-point number."""
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
        elif not weights[key].is_floating_point() or not all(bound.isfinite() for bound in weights[key].aminmax()):
            reason = f"has {key} with values that are no finite floating-point numbers"
        if reason:
            raise UserError(f"{file} {reason}; give the weights and the config of one checkpoint")
    return weights


def open_tokenizer(directory):
    """The directory's tokenizer.json exactly as stored, else what AutoTokenizer makes of the other files.

    Not AutoTokenizer first: for the class name that DeBERTa's tokenizer_config.json carries, transformers 5 keeps the
    vocabulary but replaces the stored normaliser, and the same text gets other ids than those PairRM was trained on.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        stored = os.path.exists(os.path.join(directory, "tokenizer.json"))
        return (PreTrainedTokenizerFast if stored else AutoTokenizer).from_pretrained(directory)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise UserError(f"{directory} has no tokenizer that can be read ({first_line(error)}); put its tokenizer.json "
                        "there") from None


def _marker_ids(tokenizer, settings, config, path):
    """Ids of <|source|>, <|candidate1|>, <|candidate2|>: the config's where it has them, else the tokenizer's."""
    tokenizer.add_tokens(MARKERS)  # adds only what is missing; the ranker's layout leaves this to the reader
    stored = tokenizer.convert_tokens_to_ids(MARKERS)
    keys = ["source_prefix_id", "cand1_prefix_id", "cand2_prefix_id"]
    ids = [known if settings.get(key) is None else settings[key] for key, known in zip(keys, stored)]
    if max(*ids, len(tokenizer) - 1) >= config.vocab_size:
        raise UserError(f"{path}: the tokenizer's {len(tokenizer)} tokens do not fit the model's {config.vocab_size} "
                        "embeddings; give the tokenizer that belongs to the weights")
    empty = tokenizer(MARKERS[-1])["input_ids"]
    if len(empty) != 3 or empty[1] != stored[-1]:
        raise UserError(f"{path}: the tokenizer does not write [CLS] {MARKERS[-1]} text [SEP]; give PairRM's own")
    return ids


def first_line(error):
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
