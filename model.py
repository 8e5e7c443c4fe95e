"""The decoder transformer of Llama, Mistral, Qwen2, Qwen3, SmolLM3, OLMo 2, Phi-3, Phi-4 and Gemma 2, and its
KV cache.

The one idea to take from this file: a transformer is token-wise (norms, projections, MLP act on each token alone)
except for attention, which decides what each token may look at. So the network here takes a flat pack of N tokens and a
*view* object that knows their positions and does the looking:

    CausalRows      B rows of T tokens, right-padded                    the textbook forward
    SharedPrefix    prompts, each followed by its n responses, packed   training and prefill: a prompt is computed ONCE,
                    without padding                                     with gradient, and its n responses attend to it
    KVCache         one new token in each of R rows                     decoding

All run the same lines of `Layer.forward`, for the toy and for a 7B checkpoint alike. The last two look through masks.
FlashPrefix and FlashCache are the same for a GPU whose flash kernel needs none; `flash_serves` says when they are used.

What the families differ in stands in `checkpoints.Config`. Llama, Mistral, Qwen2, Qwen3 and Phi are one network up to
a bias, a norm or a window. SmolLM3 leaves every fourth layer without RoPE: there a token knows only which tokens came
before it. OLMo 2 norms what each sublayer gives to the residual stream in place of what it takes from it. Gemma 2
norms both, and bounds whatever else could grow: embeddings are multiplied by sqrt(H) as they leave the table (the tied
head wants rows of length 1, the layers want numbers of size 1), and a tanh bends attention scores and logits into
(-cap, cap). Its norms multiply by 1 + weight, so a weight of 0 means "no change", and weight decay pulls towards that.

Left out: Phi's longrope, whose frequencies change with a text's length, so that cached keys would no longer fit, and
the rotation of only a part of each head, which its published checkpoints have together with longrope.

Shape legend, for the whole project:  B prompts, K (or n) responses each, T tokens, N packed tokens, R rows, H hidden,
V vocabulary; nh query heads, nkv key/value heads, hd head dimension; S keys that a row's queries may look at; L tokens
held by a cache row; M response tokens, those that a loss is about.
"""

import functools
import inspect
import os
import types

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import checkpoints
import files
import kernels
import lora


# ---------------------------------------------------------------------------------------------------------------------
# views: who attends to whom
#
# A view has  positions [N] and max_position         each token's position, and a number above all of them, for RoPE
#             mask(window, c, dtype)                 who is seen by whom in a layer with this window; `forward` asks for
#                                                    it once for each window, before the layers run
#             attend(layer, q, k, v, mask, scale, cap)


def _mask_of_rows(T, window, c, dtype, device):
    """The mask of rows of T tokens that look at themselves: [1, 1, groups * T, T], or None for torch's own causal
    attention, which needs no mask but knows neither windows nor caps."""
    if (window is None or window >= T) and c.attention_cap is None:
        return None
    at = torch.arange(T, device=device)[None]
    return kernels.attention_mask(at, at, window, c.num_heads // c.num_kv_heads, dtype)


class CausalRows:
    """B rows of T tokens, right-padded. Padding comes after the real tokens, so the causal mask already hides it."""

    def __init__(self, B, T, device):
        self.shape, self.max_position = (B, T), T
        self.positions = torch.arange(T, device=device).repeat(B)                         # [B*T]
        self.device = device

    def mask(self, window, c, dtype):
        """What `attend` wants in a layer with this window: [1, 1, groups * T, T], or None."""
        return _mask_of_rows(self.shape[1], window, c, dtype, self.device)

    def attend(self, layer, q, k, v, mask, scale=None, cap=None):
        """q [N, nh, hd], k and v [N, nkv, hd] -> [N, nh, hd]."""
        q, k, v = (x.unflatten(0, self.shape) for x in (q, k, v))
        return kernels.attention(q, k, v, mask, scale, cap).flatten(0, 1)


class SharedPrefix:
    """Prompts, each followed by its own responses, packed end to end: all prompts first, then all responses.

    prompts: B non-empty lists of ids. responses: B lists of lists of ids. An empty response has no row; without any
    response the pass is a pure prefill. keep_kv: keep every layer's keys and values in `kv`, for KVCache.admit.
    Raises ValueError for an empty prompt.

    An example: two prompts, the first with two responses, the second with one.

    >>> view = SharedPrefix([[1, 2, 3], [4, 5]], [[[6, 7], [8]], [[9, 10, 11]]], "cpu")

    The pack holds every token once, and nothing else. A response's positions go on where its prompt's ended, so the
    two responses to the first prompt both begin at 3:

    >>> view.tokens                                                             # [N], the network's input
    tensor([ 1,  2,  3,  4,  5,  6,  7,  8,  9, 10, 11])
    >>> view.positions                                                          # [N]
    tensor([0, 1, 2, 0, 1, 3, 4, 3, 2, 3, 4])

    A loss is about the M = 6 tokens of the responses. `target` lists them, `row` says which response each belongs to,
    and `source` which packed token predicts it, as an index into the pack. That is the token before it; for a
    response's first token it is its prompt's last, so the hidden state of the 3, at index 2, predicts the 6 and the 8:

    >>> view.target, view.row
    (tensor([ 6,  7,  8,  9, 10, 11]), tensor([0, 0, 1, 2, 2, 2]))
    >>> view.source
    tensor([2, 5, 2, 4, 8, 9])

    Attention alone needs rows of one length. It copies queries and keys into rectangles, where dots are padding: the
    prompts, which look at themselves, and the responses, which look at their prompt and at themselves. Long rows are
    cut (`_stairs`), so that a long answer does not make a short one as wide.

        queries     keys                     queries     keys
        1  2  3     1  2  3                  6  7  .     1  2  3 |  6  7  .
        4  5  .     4  5  .                  8  .  .     1  2  3 |  8  .  .
                                             9 10 11     4  5  . |  9 10 11

    A prompt's keys are copied once for each of its responses, so their gradient is the sum over the responses. That is
    exactly what separate rows of prompt and response give, while the prompt is computed once instead of n times.
    """

    def __init__(self, prompts, responses, device, keep_kv=False):
        if not all(prompts):
            raise ValueError("an empty prompt has no last token to predict a response from")
        rows = [(b, response) for b, group in enumerate(responses) for response in group if response]
        pieces = [(0, prompt) for prompt in prompts] + [(len(prompts[b]), response) for b, response in rows]
        ids, positions = [], []
        for begin, piece in pieces:                                             # begin: its first token's position
            ids += piece
            positions += range(begin, begin + len(piece))
        B, N, self.rows = len(prompts), len(ids), len(rows)
        self.tokens, self.positions = torch.tensor([ids, positions])                                      # [N] each
        self.max_position = max(positions) + 1
        owner = torch.tensor([b for b, _ in rows], dtype=torch.long)            # [R] each one's prompt
        lengths = torch.tensor([len(piece) for _, piece in pieces])
        ends = lengths.cumsum(0)
        starts = ends - lengths                                                 # piece i is pack[starts[i]:ends[i]]
        self.prompt_last = ends[:B] - 1                                         # [B] each prompt's last token

        self.first = first = sum(map(len, prompts))                             # where the responses begin
        self.row = torch.arange(self.rows).repeat_interleave(lengths[B:])                                 # [M]
        self.target = self.tokens[first:]                                                                 # [M]
        self.source = torch.arange(first, N) - 1                                                          # [M]
        self.source[starts[B:] - first] = self.prompt_last[owner]
        self.last = ends[B:] - 1 if rows else self.prompt_last                  # [R or B] what can be continued

        # What KVCache.admit copies of each of these: its prompt's keys and its own.
        self.keep_kv, self.kv = keep_kv, []
        if keep_kv:
            self.row_lengths, self.row_keys = lengths[:B], _padded(starts[:B], lengths[:B], N)            # [B], [B, P]
        if keep_kv and rows:
            own = _padded(starts[B:], lengths[B:], N)
            self.row_keys = torch.cat([self.row_keys[owner], own], 1)                                     # [R, P + T]
            self.row_lengths = lengths[:B][owner] + lengths[B:]
        self.parts = []
        self._lay_out(starts, lengths, owner)
        _move(device, self, *self.parts)

    def _lay_out(self, starts, lengths, owner):
        """What `attend` needs, still on the host. starts, lengths [B + R] of the pieces, owner [R]: which prompt's."""
        B, N, sizes, padded = len(lengths) - self.rows, len(self.tokens), lengths.tolist(), 0
        for stair, numbers in _stairs(sizes[:B], alone=True):
            self.parts.append(_Rectangle(starts[numbers], lengths[numbers], stair, N))
        for stair, numbers in _stairs(sizes[B:]):
            prompt, numbers = owner[numbers], [B + number for number in numbers]
            self.parts.append(_Rectangle(starts[numbers], lengths[numbers], stair, N, starts[prompt], lengths[prompt]))
        self.unpad = torch.empty(N, dtype=torch.long)       # where in `attend`'s output each token stands
        for part in self.parts:
            real = part.real()
            self.unpad[part.queries.flatten()[real]] = padded + real
            padded += part.queries.numel()

    def mask(self, window, c, dtype):
        """What `attend` wants in a layer with this window: `each`, a mask or None for each rectangle. (torch.compile
        would make a graph for every length of a plain list.)"""
        return types.SimpleNamespace(each=[part.mask(window, c, dtype) for part in self.parts])

    def attend(self, layer, q, k, v, mask, scale=None, cap=None):
        """q [N, nh, hd], k and v [N, nkv, hd] -> [N, nh, hd]."""
        if self.keep_kv:
            self.kv.append((k.clone(), v.clone()))      # copies: the slices would keep the whole qkv product alive
        out = [part.attend(q, k, v, each, scale, cap) for part, each in zip(self.parts, mask.each)]
        return torch.cat(out).index_select(0, self.unpad)


STAIR = 256     # long rows are cut into pieces of at least so many queries, one call of attention each


def _stairs(sizes, alone=False):
    """[(stair, numbers)] for pieces of these lengths: queries come a stair at a time, a slice of the pieces' tokens,
    and `numbers` are the pieces that reach it. So a short piece is not padded to a long one's length, and no query is
    compared with keys beyond its stair. `python bench.py step` tells what that saves.

    There are four stairs at most, since each copies the keys before it. Pieces that look at themselves alone and are
    much of a length stay whole: for them torch has a causal kernel, which needs no mask.

    >>> _stairs([3, 300, 256])
    [(slice(0, 256, None), [0, 1, 2]), (slice(256, 512, None), [1])]
    """
    longest = max(sizes, default=0)
    width = longest if alone and longest * len(sizes) < 1.5 * sum(sizes) else max(STAIR, -(-longest // 4))
    return [(slice(first, first + width), [number for number, size in enumerate(sizes) if size > first])
            for first in range(0, longest, width)]


class _Rectangle:
    """Some queries of R rows of packed tokens and all keys that they may look at, for one call of attention.

    starts, lengths [R]: where each row's tokens stand in a pack of N. stair: which of them are queries, a slice that
    all rows reach. before: starts and lengths of what they look at besides their own row, its prompt.

    A short row goes on with whatever token the pack holds there. That does no harm: a padded key's position is beyond
    every real query of its row, so none sees it, and a padded query's output is left behind. A padded query sees
    itself, so no query is without keys, for which softmax would give NaN.
    """

    def __init__(self, starts, lengths, stair, N, *before):
        upto = lengths.clamp(max=stair.stop)
        own = _padded(starts, upto, N)                                          # [R, stair.start + T]
        self.lengths = upto - stair.start                                       # [R] how many queries are real
        self.queries, self.keys = own[:, stair], own                            # [R, T], [R, S] indices into the pack
        self.whole = not before and stair.start == 0                            # rows that look at themselves alone
        begin = before[1][:, None] if before else lengths.new_zeros(1, 1)       # [R or 1, 1] a row's first position
        key_at = begin + torch.arange(own.shape[1])                             # [R or 1, stair.start + T]
        self.query_at = key_at[:, stair]                                        # [R or 1, T]
        if before:
            prompt = _padded(*before, N)                                        # [R, P]
            # A short prompt's padding stands where its row has real queries; it needs a position that none can see.
            prompt_at = torch.arange(prompt.shape[1])
            prompt_at = torch.where(prompt_at < begin, prompt_at, torch.iinfo(torch.int32).max)
            self.keys, key_at = torch.cat([prompt, own], 1), torch.cat([prompt_at, key_at], 1)
        self.key_at = key_at                                                    # [R or 1, S]

    def mask(self, window, c, dtype):
        """What `attend` wants in a layer with this window."""
        if self.whole:
            return _mask_of_rows(self.queries.shape[1], window, c, dtype, self.queries.device)
        return kernels.attention_mask(self.query_at, self.key_at, window, c.num_heads // c.num_kv_heads, dtype)

    def real(self):
        """Where the real queries stand in the flat output of `attend`, row by row."""
        columns = torch.arange(self.queries.shape[1])
        return (columns < self.lengths[:, None]).flatten().nonzero().squeeze(1)

    def attend(self, q, k, v, mask, scale, cap):
        """q [N, nh, hd], k and v [N, nkv, hd] of the whole pack -> [R * T, nh, hd], padding included."""
        q, k, v = (kernels.take(x, index) for x, index in ((q, self.queries), (k, self.keys), (v, self.keys)))
        return kernels.attention(q, k, v, mask, scale, cap).flatten(0, 1)


def _padded(starts, lengths, N):
    """Indices into the pack, [R, longest], of R pieces that begin at `starts`; past a piece's end, of what follows."""
    columns = torch.arange(int(lengths.max()))
    return (starts[:, None] + columns).clamp(max=N - 1)


def _move(device, *objects):
    """Put every tensor that the objects hold, all int64, on the device, in one copy. They are built on the host: there
    a small operation costs no launch, and asking for a length does not wait for the device."""
    if torch.device(device).type == "cpu":
        return
    held = [(vars(each), name) for each in objects for name, value in vars(each).items() if torch.is_tensor(value)]
    tensors = [attributes[name] for attributes, name in held]
    moved = torch.cat([x.flatten() for x in tensors]).to(device).split([x.numel() for x in tensors])
    for (attributes, name), old, new in zip(held, tensors, moved):
        attributes[name] = new.view(old.shape)


# ---------------------------------------------------------------------------------------------------------------------
# the same views without masks, for a GPU


def flash_serves(net):
    """Whether torch's flash kernel computes this net's attention: the one place where views are chosen.

    The kernel goes through rows of any length that lie end to end, so nothing is padded, no mask is built, and a
    decoding step reads the keys that a row has and no others. It runs on NVIDIA GPUs from compute capability 8.0 on,
    in bfloat16 or float16, with heads of up to 256 numbers, a multiple of 8. It has no place for Gemma 2's cap on the
    scores. All others, every CPU among them, look through masks.
    """
    c = net.config
    return (net.device.type == "cuda" and net.dtype in (torch.bfloat16, torch.float16) and c.attention_cap is None
            and c.head_dim <= 256 and c.head_dim % 8 == 0 and torch.version.hip is None
            and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(net.device) >= (8, 0))


def shared_prefix(net, prompts, responses, keep_kv=False):
    """SharedPrefix or FlashPrefix of these lists of ids, whichever serves the net, on its device."""
    return (FlashPrefix if flash_serves(net) else SharedPrefix)(prompts, responses, net.device, keep_kv)


def kv_cache(net, rows, max_len):
    """KVCache or FlashCache, whichever serves the net, on its device and in its dtype."""
    return (FlashCache if flash_serves(net) else KVCache)(net.config, rows, max_len, net.device, net.dtype)


def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, window=None, scale=None, used_k=None):
    """Causal attention within each of R rows, packed end to end: q [Nq, nh, hd], k and v [Nk, nkv, hd] -> [Nq, nh, hd].

    starts_q, starts_k [R + 1] int32: where each row's queries and keys begin, and where the last ones end. A row's last
    query stands at its last key. longest_q, longest_k: numbers on the host that no row exceeds. window: None, or how
    many keys a query sees, its own included. used_k [R] int32, for decoding: of a row's place only so many keys are in
    use, and it has one query; there is no gradient then. bfloat16 or float16 on CUDA.
    """
    left = -1 if window is None else window - 1
    # A row's only query sees every key. Asked without any bound, the kernel reads a key head once for all the query
    # heads that share it, and divides a long row's keys among several blocks; with one it does neither.
    right = -1 if used_k is not None and window is None else 0
    rows = q, k, v, starts_q, starts_k, longest_q, longest_k
    public = _public_varlen()
    if public:
        return public(*rows, scale=scale, window_size=(left, right), enable_gqa=True, seqused_k=used_k)
    return torch.ops.aten._flash_attention_forward(*rows, 0.0, right == 0 and left < 0, False, scale=scale,
                                                   window_size_left=left, window_size_right=right, seqused_k=used_k)[0]


@functools.cache
def _public_varlen():
    """torch's varlen_attn, or None where it lacks an argument that is needed, as in torch 2.11: `varlen` then calls the
    private operator below it, which has had the same arguments for longer."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"scale", "window_size", "enable_gqa", "seqused_k"}
    return varlen_attn if needed <= set(inspect.signature(varlen_attn).parameters) else None


class FlashPrefix(SharedPrefix):
    """SharedPrefix for the flash kernel, in two calls: the prompts' queries look at themselves, the responses' at
    [prompt ; response], whose keys are gathered. In the example, with the pack's indices:

        queries  0 1 2 | 3 4         keys  0 1 2 | 3 4
        queries  5 6 | 7 | 8 9 10    keys  0 1 2 5 6 | 0 1 2 7 | 3 4 8 9 10
    """

    def __init__(self, prompts, responses, device, keep_kv=False):
        super().__init__(prompts, responses, device, keep_kv)
        self.begin = [x.int() for x in (self.of_prompts, self.of_responses, self.of_keys)]      # as the kernel wants it

    def _lay_out(self, starts, lengths, owner):
        B = len(lengths) - self.rows
        pieces = torch.stack([starts[owner], starts[B:]], 1).flatten()          # [2 R] prompt, response, prompt, ...
        sizes = torch.stack([lengths[owner], lengths[B:]], 1).flatten()
        before = sizes.cumsum(0) - sizes
        self.keys = (pieces - before).repeat_interleave(sizes) + torch.arange(int(sizes.sum()))
        counts = lengths[:B], lengths[B:], lengths[owner] + lengths[B:]
        self.longest = [max(each.tolist(), default=0) for each in counts]
        self.of_prompts, self.of_responses, self.of_keys = (F.pad(each.cumsum(0), (1, 0)) for each in counts)

    def mask(self, window, c, dtype):
        """What `attend` wants in a layer with this window: the window itself."""
        return window

    def attend(self, layer, q, k, v, window, scale=None, cap=None):
        """q [N, nh, hd], k and v [N, nkv, hd] -> [N, nh, hd]."""
        if self.keep_kv:
            self.kv.append((k.clone(), v.clone()))
        (prompts, own, both), (P, T, S), first = self.begin, self.longest, self.first
        out = varlen(q[:first], k[:first], v[:first], prompts, prompts, P, P, window, scale)
        if not self.rows:
            return out
        k, v = k.index_select(0, self.keys), v.index_select(0, self.keys)
        return torch.cat([out, varlen(q[first:], k, v, own, both, T, S, window, scale)])


# ---------------------------------------------------------------------------------------------------------------------
# prompts that are to be continued, and the cache


SHARED = 32     # what all prompts begin with is computed once if it has at least so many tokens


def prefill(net, prompts, keep_kv=False):
    """The forward pass over B non-empty lists of ids that are to be continued: (view, hidden [B, H] at each one's end).
    Where all begin alike (a system turn, a judge's rubric) that beginning is computed once: it becomes the one prompt
    of a SharedPrefix, and what follows it the responses."""
    low, high = min(prompts), max(prompts)      # all others lie between in dictionary order: they share what these do
    common, longest = 0, min(map(len, prompts)) - 1                         # every prompt keeps a token of its own
    while common < longest and low[common] == high[common]:
        common += 1
    if len(prompts) > 1 and common >= SHARED:
        view = shared_prefix(net, [low[:common]], [[p[common:] for p in prompts]], keep_kv)
    else:
        view = shared_prefix(net, prompts, [[] for _ in prompts], keep_kv)
    return view, net(view.tokens, view)[view.last]


class KVCache:
    """Keys and values of up to `rows` sequences of up to `max_len` tokens, allocated once.

    k, v: [layers, rows, nkv, max_len, hd]. Rows [0, live) are in use, in any order. A row's new token is written at its
    own length; the mask hides what lies beyond, so stale entries never need clearing. The order of use: `admit`, then
    for every new token `step` and a forward pass, and `keep` where rows have ended.
    """

    def __init__(self, config, rows, max_len, device, dtype):
        shape = (config.num_layers, rows, config.num_kv_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0            # of the live rows, on the host: no device round trip a layer
        self.live = 0
        # With a layer's [rows, nkv, max_len] flattened, where each row's part of each head begins: [rows, nkv]
        self.heads = torch.arange(rows * config.num_kv_heads, device=device).view(rows, -1) * max_len
        self.columns = torch.arange(max_len, device=device)

    @property
    def width(self):
        """How many rows a step computes."""
        return self.live

    def admit(self, view, n):
        """n new rows for each prompt of `prefill`'s view, which ran with keep_kv: each a copy of keys and values."""
        index, lengths = view.row_keys.repeat_interleave(n, 0), view.row_lengths        # [B * n, P], [B]
        new = slice(self.live, self.live + len(index))
        for layer, (k, v) in enumerate(view.kv):
            self.k[layer, new, :, :index.shape[1]] = k[index].transpose(1, 2)
            self.v[layer, new, :, :index.shape[1]] = v[index].transpose(1, 2)
        self.lengths[new] = lengths.repeat_interleave(n, 0)
        self.live += len(index)
        self.longest = max(self.longest, index.shape[1])    # `keep` may be called before the next step

    def keep(self, holes, movers, live):
        """Compaction: copy rows `movers` into rows `holes` and keep the first `live`. It costs as much as rows move."""
        if len(holes):
            used = slice(0, self.longest)
            for x in (*self.k, *self.v):                    # layer by layer: what is copied waits in memory
                x[holes, :, used] = x[movers, :, used]
            self.lengths[holes] = self.lengths[movers]
        self.live = live

    def step(self, longest):
        """Begin a decoding step: one new token for every live row. The longest has then `longest` tokens."""
        R = self.live
        self.longest = self.max_position = longest
        self.positions = self.lengths[:R].clone()                               # [R] the new token's position
        self.slots = (self.heads[:R] + self.positions[:, None]).flatten()       # [R * nkv] where its keys and values go
        self.lengths[:R] += 1

    def mask(self, window, c, dtype):
        """What `attend` wants in a layer with this window: [R, 1, 1, longest], the same for all heads."""
        return kernels.attention_mask(self.positions[:, None], self.columns[None, :self.longest], window, 1, dtype)

    def attend(self, layer, q, k, v, mask, scale=None, cap=None):
        """Write the new keys and values, then look: q [R, nh, hd], k and v [R, nkv, hd] -> [R, nh, hd].

        The nh/nkv query heads that share a key head are laid out as that many query *positions*, so keys and values are
        read once instead of being repeated.
        """
        R, nkv, hd = k.shape
        self.k[layer].view(-1, hd).index_copy_(0, self.slots, k.reshape(-1, hd))
        self.v[layer].view(-1, hd).index_copy_(0, self.slots, v.reshape(-1, hd))
        keys, values = self.k[layer, :R, :, :self.longest], self.v[layer, :R, :, :self.longest]
        return kernels.masked_attention(q.view(R, nkv, -1, hd), keys, values, mask, scale, cap).reshape(R, -1, hd)


class FlashCache(KVCache):
    """KVCache for the flash kernel: a row reads the keys that it has, not those of the longest row, and no mask.

    flat: [2, layers, rows * max_len, nkv, hd], keys and values; k and v are views of it in KVCache's shape. A step
    computes `width` rows, one of few numbers, so that CUDA graphs recorded for these can be replayed. The rows beyond
    the live ones make tokens that nobody reads. `keep` sets them back to length 0, so none of them is ever as long as a
    live row that was there before, and none runs past its place.
    """

    def __init__(self, config, rows, max_len, device, dtype):
        shape = 2, config.num_layers, rows, max_len, config.num_kv_heads, config.head_dim
        memory = torch.zeros(shape, device=device, dtype=dtype)
        self.flat, (self.k, self.v) = memory.flatten(2, 3), memory.transpose(3, 4)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.longest = self.max_position = max_len
        self.live = 0
        self.starts = torch.arange(0, (rows + 1) * max_len, max_len, dtype=torch.int32, device=device)
        self.each = torch.arange(rows + 1, dtype=torch.int32, device=device)    # one query a row

    @property
    def width(self):
        """How many rows a step computes: 1, 2, 3, 4, 6, 8, 12, ..., at most all. A third of them is idle at worst."""
        above = 1 << (self.live - 1).bit_length()                               # a power of 2
        return min(above * 3 // 4 if above > 2 and self.live <= above * 3 // 4 else above, len(self.lengths))

    def keep(self, holes, movers, live):
        """As KVCache.keep. It copies whole rows: the host does not follow their lengths."""
        super().keep(holes, movers, live)
        self.lengths[live:] = 0

    def step(self, longest):
        """Begin a decoding step: one new token for each of `width` rows. Only KVCache needs to know `longest`."""
        R = self.width
        self.positions = self.lengths[:R].long()                                # [R] the new token's position
        self.slots = self.starts[:R] + self.positions                           # [R] where its keys and values go
        self.lengths[:R] += 1

    def mask(self, window, c, dtype):
        """What `attend` wants in a layer with this window: the window itself."""
        return window

    def attend(self, layer, q, k, v, window, scale=None, cap=None):
        """Write the new keys and values, then look: q [R, nh, hd], k and v [R, nkv, hd] -> [R, nh, hd]."""
        R, (keys, values) = len(q), self.flat[:, layer]
        keys.index_copy_(0, self.slots, k)
        values.index_copy_(0, self.slots, v)
        starts, used = self.starts[:R + 1], self.lengths[:R]
        return varlen(q, keys, values, self.each[:R + 1], starts, 1, self.max_position, window, scale, used)


# ---------------------------------------------------------------------------------------------------------------------
# the network


def _norm_weight(c, wanted=True):
    """A norm's weight that changes nothing: ones, or for Gemma, which adds 1 to it, zeros. None for no norm at all."""
    return nn.Parameter(torch.full([c.hidden_size], 0.0 if c.gemma else 1.0)) if wanted else None


def _norm(x, weight, c):
    """RMSNorm over H; x itself where the weight is None. Gemma's 1 + weight is formed in float32: in bfloat16, weights
    below 1/256 would vanish in it."""
    if weight is None:
        return x
    if not c.gemma:
        return F.rms_norm(x, x.shape[-1:], weight, c.norm_eps)
    return F.rms_norm(x.float(), x.shape[-1:], 1 + weight.float(), c.norm_eps).to(x.dtype)


def _norm_heads(x, weight, c):
    """RMSNorm of heads x [N, n, hd], over as many numbers as the weight has: hd, so each head by itself, or n * hd."""
    return F.rms_norm(x.reshape(len(x), -1, weight.numel()), weight.shape, weight, c.norm_eps).view(x.shape)


class Layer(nn.Module):
    """One block. Queries, keys and values come from one product, gate and up from another: fewer, larger products."""

    def __init__(self, c):
        super().__init__()
        self.config, self.nh, self.nkv, self.hd = c, c.num_heads, c.num_kv_heads, c.head_dim
        self.norm1 = _norm_weight(c, c.norm_in)
        self.qkv = nn.Linear(c.hidden_size, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, bias=c.qkv_bias)
        q_size, k_size = (c.num_heads, c.num_kv_heads) if c.qk_norm == "all" else (1, 1)
        self.q_norm = nn.Parameter(torch.ones(q_size * c.head_dim)) if c.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(k_size * c.head_dim)) if c.qk_norm else None
        self.o = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.out_bias)
        self.norm1_out = _norm_weight(c, c.norm_out)        # on what attention adds to x
        self.norm2 = _norm_weight(c, c.norm_in)
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.norm2_out = _norm_weight(c, c.norm_out)        # on what the MLP adds

    def forward(self, x, rope, view, layer, mask):
        """x [N, H]; rope: (cos, sin), [N, 1, hd] each, or None where positions are not told; layer: this one's number;
        mask: the view's, for its window -> [N, H]."""
        c, nh, nkv, hd = self.config, self.nh, self.nkv, self.hd
        # attention
        qkv = self.qkv(_norm(x, self.norm1, c)).view(len(x), nh + 2 * nkv, hd)
        qk, v = qkv[:, :nh + nkv], qkv[:, nh + nkv:]
        if self.q_norm is not None:
            qk = torch.cat([_norm_heads(qk[:, :nh], self.q_norm, c), _norm_heads(qk[:, nh:], self.k_norm, c)], 1)
        # RoPE on queries and keys at once: dimension i rotates with i + hd/2. Rolling by half swaps the halves;
        # the minus sign of the rotation is already in `sin`.
        if rope is not None:
            cos, sin = rope
            qk = torch.addcmul(qk * cos, qk.roll(hd // 2, -1), sin)
        y = view.attend(layer, qk[:, :nh], qk[:, nh:], v, mask, c.attention_scale, c.attention_cap)
        x = x + _norm(self.o(y.flatten(1)), self.norm1_out, c)
        # MLP
        gate, up = self.gate_up(_norm(x, self.norm2, c)).chunk(2, -1)
        gate = F.gelu(gate, approximate="tanh") if c.gemma else F.silu(gate)
        return x + _norm(self.down(gate * up), self.norm2_out, c)


class Transformer(nn.Module):
    """Decoder-only language model: net(tokens [B, T]) -> hidden [B, T, H]; net.logits(hidden) -> [B, T, V] float32."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = _norm_weight(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.generation = {}            # what generation_config.json held, so that it can be written back
        self.lora = None                # a lora.Adapters where the layers have adapters
        self.computes_in = None         # a dtype where the weights are shares, else that of the weights
        self._rope_table = None
        # True: backward recomputes each layer from its input. Only that input is then kept, H numbers a token and layer
        # instead of some 20 H. It costs one more forward (a third more time) and leaves every gradient as it was.
        self.activation_checkpointing = False

    def compile_layers(self):
        """Let torch.compile fuse each layer's element-wise work in passes with gradient. Attention stays out of it,
        whose rectangles and masks are others in each batch: so a few graphs serve all layers and lengths. Making
        them takes a minute. Sampling keeps the plain layers: its steps are too short to be worth more graphs.
        Returns the net."""
        for view in (SharedPrefix, FlashPrefix):
            view.attend = torch.compiler.disable(view.attend)
        for layer in self.layers:
            plain, fused = layer.forward, torch.compile(layer.forward, dynamic=True)
            layer.forward = lambda *x, plain=plain, fused=fused: (fused if torch.is_grad_enabled() else plain)(*x)
        return self

    @torch.no_grad()
    def init_weights(self, generator):
        """Draw fresh weights and return the net. Standard deviation 1/sqrt(fan in), smaller where a layer writes into
        the residual stream, which would otherwise grow with the depth: two terms a layer are added to it."""
        depth = (2 * self.config.num_layers) ** -0.5
        self.embed.weight.normal_(0, self.config.hidden_size**-0.5, generator=generator)
        for layer in self.layers:
            for linear, scale in ((layer.qkv, 1), (layer.o, depth), (layer.gate_up, 1), (layer.down, depth)):
                linear.weight.normal_(0, scale * linear.in_features**-0.5, generator=generator)
                if linear.bias is not None:
                    linear.bias.zero_()
        if not self.config.tied:
            self.head.weight.normal_(0, self.config.hidden_size**-0.5, generator=generator)
        return self

    @property
    def device(self):
        return self.norm.device

    @property
    def dtype(self):
        """What it computes in. Shares of its weights (parallel.shard) may be stored in another type."""
        return self.computes_in or self.norm.dtype

    def forward(self, tokens, view=None):
        """Hidden states after the final norm.

        tokens [B, T] int64, rows right-padded, positions from 0 -> [B, T, H];
        or, with a `view`, a flat pack [N] -> [N, H].
        """
        c = self.config
        if view is None:
            view = CausalRows(*tokens.shape, tokens.device)
        rope = self._rope(view.positions, view.max_position)
        rotated = c.rotated or (True,) * c.num_layers
        windows = c.windows or (None,) * c.num_layers
        masks = {window: view.mask(window, c, self.dtype) for window in set(windows)}
        x = self.embed(tokens.flatten())
        if c.gemma:
            x = x * torch.tensor(c.hidden_size**0.5, dtype=x.dtype)     # rounded to bfloat16 first, as it was trained
        for i, layer in enumerate(self.layers):
            inputs = x, rope if rotated[i] else None, view, i, masks[windows[i]]
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)   # nothing is random here
            else:
                x = layer(*inputs)
        x = _norm(x, self.norm, c)
        return x.unflatten(0, tokens.shape) if tokens.dim() > 1 else x

    def logits(self, hidden):
        """[..., H] -> [..., V] float32. For a few positions; to score many tokens use kernels.linear_logprob."""
        return kernels.soft_cap(self.head(hidden).float(), self.config.logit_cap)

    def _rope(self, positions, longest):
        """cos and signed sin [N, 1, hd] of positions below `longest`, from a table that grows when it is too short."""
        table = self._rope_table
        if table is None or table.shape[1] < longest or table.device != positions.device or table.dtype != self.dtype:
            size = 1 << max(8, (longest - 1).bit_length())                      # a power of 2, 256 or more
            inverse, scale = kernels.rope_frequencies(self.config.rope, self.config.head_dim)
            angle = torch.arange(size, device=positions.device)[:, None].float() * inverse.to(positions.device)
            cos, sin = angle.cos() * scale, angle.sin() * scale                 # [size, hd/2]
            table = torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)])
            self._rope_table = table = table.to(self.dtype)                     # [2, size, hd]
        cos, sin = table[:, positions].unsqueeze(2)
        return cos, sin

    # -- checkpoints --

    @classmethod
    def from_pretrained(cls, path_or_hub_id, device="cpu", dtype=torch.float32, merge=True):
        """Load a Hugging Face checkpoint: a directory or a hub id, one safetensors file or shards. Raises UserError,
        naming the file, for an unknown family, a missing, misshapen or not finite weight, or a truncated file.
        PEFT's adapters (lora.py) are merged into their base, or with merge=False left beside it, to be trained on."""
        path = checkpoints.fetch(path_or_hub_id)
        if lora.is_adapter(path):
            net = cls.from_pretrained(lora.base_of(path), device, dtype)
            lora.attach(net, path)
            return lora.merge(net) if merge else net
        where, generation = (os.path.join(path, name) for name in ("config.json", "generation_config.json"))
        config = checkpoints.Config.from_hf(files.read_json(where), where)
        checkpoints.check_end_tokens(config.raw, where)
        with torch.device("meta"):                                              # no memory yet
            net = cls(config)
        if os.path.exists(generation):
            net.generation = files.read_json(generation)
            checkpoints.check_end_tokens(net.generation, generation)
        found = checkpoints.check_weights(net, path)
        net.to(dtype).to_empty(device=device)                                   # the type first: no float32 in between
        if config.tied:
            net.head.weight = net.embed.weight                                  # to_empty may part them
        checkpoints.fill(net, found)
        return net

    def save_pretrained(self, directory, tokenizer=None, max_shard_bytes=5 * 10**9):
        """Write a complete Hugging Face checkpoint, atomically; adapters are merged in what is written, not in the net.
        tokenizer: a checkpoint's directory (or hub id), whose tokenizer files are copied byte for byte, or a tokenizer
        object, which writes itself; None for no tokenizer. Raises UserError for a directory without such files."""
        raw = {key: value for key, value in self.config.raw.items() if key != "torch_dtype"}    # dtype's older name
        raw["dtype"] = str(self.dtype).removeprefix("torch.")
        ends = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
        generation = {"_from_model_config": True, **ends, **self.generation}

        def write(path):
            os.makedirs(path)
            files.write_json(os.path.join(path, "config.json"), raw)
            files.write_json(os.path.join(path, "generation_config.json"), generation)
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoints.names_in(self).items()}
            tensors |= {name: tensor.cpu().contiguous() for name, tensor in lora.merged(self)}
            checkpoints.write_weights(tensors, path, max_shard_bytes)
            if isinstance(tokenizer, (str, os.PathLike)):
                checkpoints.copy_tokenizer(checkpoints.fetch(tokenizer), path)
            elif tokenizer is not None:
                tokenizer.save_pretrained(path)
        files.write_atomically(directory, write)


def response_logprobs(net, prompts, responses):
    """Per-token log-probabilities of responses under `net`, each prompt computed once and shared by its responses.

    prompts: B lists of ids, responses: B lists of lists of ids. Returns (logprob [M] float32, row [M] int64, rows):
    token m belongs to the row[m]-th response, counted through all prompts. A response's log-prob is the sum over its
    tokens, its end-of-turn token included; kernels.sum_rows does that. Empty responses have no row.
    """
    view = shared_prefix(net, prompts, responses)
    hidden = net(view.tokens, view)                                             # [N, H]
    logprob = kernels.linear_logprob(hidden[view.source], net.head.weight, view.target, net.config.logit_cap)
    return logprob, view.row, view.rows
