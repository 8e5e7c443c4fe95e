"""The arithmetic that deserves care: log-probabilities of a linear head without the [T, V] logits, RoPE's angles,
attention, the losses.

Shapes:  T tokens, H hidden size, V vocabulary.  Log-probabilities and losses are float32, whatever the model's dtype: a
sequence log-probability is a sum of hundreds of terms, and eta = 1e3 (SPPO) multiplies preferences into targets of some
hundreds, so the last digits of bfloat16 would be the whole signal. One exception: a bfloat16 model's logits are rounded
to bfloat16 by the matrix product itself, as in every library that multiplies in that type; all that follows is float32.

Why not log_softmax(logits)[target]?  At V = 128,256 and T = 8,192 the float32 logits alone are 4 GB, their softmax for
the backward pass another 4, and the gradient of the logits 4 more. None of it is needed at once:

    (a)  log pi(target) = logit[target] - logsumexp(logits)         one number a token; the sum over V can go by parts
    (b)  d log pi / d logit = onehot(target) - softmax(logits)      recomputed from (hidden, weight, logsumexp)

So the logits are computed tile by tile, some tokens times a part of the vocabulary, and each tile is used up before the
next is made. What is done to a tile stands here in plain torch; on CUDA kernels_triton.py does the same in fewer
passes over it. After them come what a transformer's layer needs besides its matrix products (RoPE's angles,
attention), a judge's preferences as Phat, the losses (SPPO, DPO, IPO) as pure functions of sequence log-probabilities,
and `Optimizer`, which turns gradients into steps. `python bench.py kernels` checks the log-probabilities and times
them.
"""

import functools
import importlib.util
import math
import os
import types

import torch
import torch.distributed as dist
import torch.nn.functional as F

# The tiles on a CPU. `linear_logprob` makes CHUNK_T x CHUNK_V logits at a time: 16 MB in float32, small enough to stay
# near the cache, large enough that the matrix products run at full speed. Memory is a few tiles whatever T and V are.
CHUNK_T, CHUNK_V = 1024, 4096

# `linear_policy_loss` cuts only the tokens into tiles; a tile has the whole vocabulary and this many logits, 128 MB in
# float32. At V = 128,256 that is 261 tokens, enough to run the products at full speed (twice as many bring a hundredth)
# and to touch the weight's gradient rarely. On a CPU the softmax is taken of a few rows at a time, 1 MB in float32,
# which stay in the cache from one pass to the next.
POLICY_TILE, POLICY_ROWS = 32 * 2**20, 2**18

# May CUDA tensors take the Triton kernels? Yes where Triton is installed, unless KERNELS_TRITON=0 in the environment.
TRITON = os.environ.get("KERNELS_TRITON", "1") != "0" and importlib.util.find_spec("triton") is not None


def tile_sizes(device, vocab):
    """(tokens, vocabulary) of `linear_logprob`'s tiles, and the tokens of `linear_policy_loss`'s, on a torch.device.

    CUDA: 4,096 x 16,384 logits, 128 MB in bfloat16, and 2**28, 512 MB. A tile that fits into a GPU's cache would be too
    small to keep all its processors at work. Its matrix products take 128 rows at a time, hence the multiple.

    >>> tile_sizes(torch.device("cpu"), 128256), tile_sizes(torch.device("cuda"), 128256)
    ((1024, 4096, 261), (4096, 16384, 2048))
    """
    if device.type == "cuda":
        return 4096, 16384, max(128, 2**28 // vocab // 128 * 128)
    return CHUNK_T, CHUNK_V, max(1, POLICY_TILE // vocab)


# ---------------------------------------------------------------------------------------------------------------------
# log-probabilities


def soft_cap(x, cap):
    """cap * tanh(x / cap), elementwise: x where it is small, never beyond (-cap, cap). With cap None, x itself.

    >>> soft_cap(torch.tensor([0.5, -1000.0]), 30.0)
    tensor([  0.5000, -30.0000])
    """
    return x if cap is None else cap * torch.tanh(x / cap)


def linear_logprob_reference(hidden, weight, target, softcap=None):
    """The definition of `linear_logprob`, for checks. It holds all logits, [T, V] in float32."""
    logits = soft_cap((hidden @ weight.T).float(), softcap)
    return logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


def linear_logprob(hidden, weight, target, softcap=None, tile=None):
    """log softmax(hidden @ weight.T)[target] in float32, never holding more than a few tiles of the logits.

    hidden [T, H] and weight [V, H] of one floating dtype and device, target [T] int64 in [0, V)  ->  [T] float32.
    softcap: None, or Gemma 2's bound on the logits, which become softcap * tanh(logits / softcap), in float32.
    tile: what works on a tile of logits, None for the device's own (`tile_functions`).
    Gradients flow to hidden and weight. Cost: one matrix product forward; backward recomputes it and adds the two
    products every linear layer has (four where the naive way needs three: the price of the memory).

    >>> h, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [math.log(3.0), 0.0]])  # logits 0 and log 3
    >>> linear_logprob(h, w, torch.tensor([1])).exp()                                        # 3 / (1 + 3)
    tensor([0.7500])
    """
    return _LinearLogprob.apply(hidden, weight, target, softcap, tile or tile_functions(hidden.device))


def _tiles(length, size):
    """range(length) cut into slices of at most `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, softcap, tile):
        T, V = hidden.shape[0], weight.shape[0]
        chunk_t, chunk_v, _ = tile_sizes(hidden.device, V)
        lse = torch.full((T,), -math.inf, device=hidden.device)     # running log sum exp over the vocabulary
        picked = torch.zeros(T, device=hidden.device)               # the target's logit, once its tile comes by
        for v in _tiles(V, chunk_v):
            w = weight[v].T
            for t in _tiles(T, chunk_t):
                part, found = tile.statistics(hidden[t] @ w, target[t] - v.start, softcap)
                lse[t] = torch.logaddexp(lse[t], part)
                picked[t] += found
        ctx.save_for_backward(hidden, weight, target, lse)
        ctx.softcap, ctx.tile = softcap, tile
        return picked - lse                                         # (a)

    @staticmethod
    def backward(ctx, grad):                                        # grad [T] float32
        hidden, weight, target, lse = ctx.saved_tensors
        T, V = hidden.shape[0], weight.shape[0]
        chunk_t, chunk_v, _ = tile_sizes(hidden.device, V)
        need_h, need_w = ctx.needs_input_grad[:2]
        # A token's gradient is a sum over all tiles of the vocabulary: the running sum is float32. A row of the
        # weight's belongs to one tile: d_w sums it up over the tokens, and it is written once.
        d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if need_h else None
        d_weight = torch.empty_like(weight) if need_w else None
        if T == 0:                                                  # no token, no tile: nothing would be written
            return (None if d_hidden is None else d_hidden.to(hidden.dtype),
                    None if d_weight is None else d_weight.zero_(), None, None, None)
        for v in _tiles(V, chunk_v):
            w = weight[v]
            if need_w:  # a float32 gradient is its own accumulator
                d_w = d_weight[v] if weight.dtype == torch.float32 else torch.empty(w.shape, device=w.device)
            for t in _tiles(T, chunk_t):
                logits = hidden[t] @ w.T                            # [t, v]
                ctx.tile.gradient_(logits, target[t] - v.start, lse[t], grad[t], ctx.softcap)
                if need_h:
                    _add_product(d_hidden[t], logits, w)
                if need_w:
                    _add_product(d_w, logits.T, hidden[t], fresh=t.start == 0)
            if need_w and d_w.dtype != weight.dtype:
                d_weight[v] = d_w
        return d_hidden.to(hidden.dtype) if need_h else None, d_weight, None, None, None


def _add_product(out, a, b, fresh=False):
    """out += a @ b, or out = a @ b where `fresh`; out float32. One fused call where the dtypes agree, and on CUDA where
    torch can add a product of two bfloat16 matrices to a float32 sum without rounding it to bfloat16 in between."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=0 if fresh else 1, out=out)
    elif a.device.type == "cuda" and _sums_in_float32(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=0 if fresh else 1, out=out)
    elif fresh:
        out.copy_(a @ b)
    else:
        out += a @ b


@functools.cache
def _sums_in_float32(device, dtype):
    """Has torch.addmm an `out_dtype` that works for this device and dtype? Versions and builds differ: tried, once."""
    ones, out = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(out, ones, ones, out_dtype=torch.float32, out=out)
    except (TypeError, RuntimeError):
        return False
    return bool((out == 17).all())


def linear_policy_loss(hidden, weight, target, coef, softcap=None, tile=None):
    """sum_m coef[m] log softmax(hidden @ weight.T)[target[m]] and its gradients, from one look at the logits.

    For policy gradients, whose coefficients (minus the advantage, over the batch) are known beforehand: softmax and
    gradient are formed while the tile of logits is there, three matrix products in all where `linear_logprob`
    needs four. hidden [T, H], weight [V, H], target [T] int64, coef [T] float32, to which no gradient flows; softcap
    and tile as there.
    Returns (loss [] float32, logprob [T] float32 without gradient).

    >>> h, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [math.log(3.0), 0.0]])  # logits 0 and log 3
    >>> loss, logprob = linear_policy_loss(h, w, torch.tensor([1]), torch.tensor([-2.0]))
    >>> loss, logprob.exp()                                                                  # -2 log(3/4)
    (tensor(0.5754), tensor([0.7500]))
    """
    return _LinearPolicyLoss.apply(hidden, weight, target, coef, softcap, tile or tile_functions(hidden.device))


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, coef, softcap, tile):
        _, chunk_v, tokens = tile_sizes(hidden.device, len(weight))
        need_h, need_w = ctx.needs_input_grad[:2]
        logprob = torch.empty(len(target), device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if need_h else None
        new = torch.empty if len(target) else torch.zeros               # the first tile writes it, if there is one
        d_weight = new(weight.shape, device=weight.device) if need_w else None          # a sum over tiles: float32
        for t in _tiles(len(target), tokens):
            logits = hidden[t] @ weight.T                                                           # [t, V]
            rows = max(1, POLICY_ROWS // len(weight)) if logits.device.type == "cpu" else len(logits)
            for r in _tiles(len(logits), rows):
                logprob[t][r] = tile.logprob_and_gradient_(logits[r], target[t][r], coef[t][r], softcap)
            if need_h:
                d_hidden[t] = logits @ weight
            for v in _tiles(len(weight), chunk_v) if need_w else ():        # by parts: no second [V, H] beside the sum
                _add_product(d_weight[v], logits[:, v].T, hidden[t], fresh=t.start == 0)
            del logits                                          # before the next tile is made: one at a time
        ctx.gradients, ctx.dtype = (d_hidden, d_weight), weight.dtype
        ctx.mark_non_differentiable(logprob)
        return (coef * logprob).sum(), logprob

    @staticmethod
    def backward(ctx, grad, _):                                                         # grad [] of the loss
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None                                        # scaled in place: no second copy of the weight's
        d_hidden = None if d_hidden is None else d_hidden.mul_(grad)
        d_weight = None if d_weight is None else d_weight.mul_(grad).to(ctx.dtype)
        return d_hidden, d_weight, None, None, None, None


# What is done to a tile: logits [t, v] of any floating dtype. A target [t] int64 counts from the tile's first column,
# and may lie outside the tile. softcap as in `linear_logprob`.


def statistics(logits, target, softcap):
    """What a tile adds to (a): the log sum exp of its rows, and the targets' logits, 0 for one that lies outside; both
    [t] float32. The logits are used up."""
    x = soft_cap(logits.float(), softcap)                       # of float32 logits without a cap: no copy
    column, inside = _find_in_tile(target, x.shape[1])
    picked = torch.where(inside, x.gather(1, column).squeeze(1), 0.0)
    # log sum exp of this tile, its maximum taken out so that exp cannot overflow; in place: no second tile
    top = x.amax(1, keepdim=True)
    return x.sub_(top).exp_().sum(1).log_().add_(top.squeeze(1)), picked


def gradient_(logits, target, lse, coef, softcap):
    """Writes (b) times coef in the logits' place. lse, over the whole vocabulary, and coef are [t] float32."""
    x = soft_cap(logits.float(), softcap)
    slope = None if softcap is None else 1 - (x / softcap) ** 2                         # d capped / d logit
    column, inside = _find_in_tile(target, x.shape[1])
    x.sub_(lse[:, None]).exp_().mul_(-coef[:, None])            # first -softmax, then + onehot
    x.scatter_add_(1, column, torch.where(inside, coef, 0.0)[:, None])
    logits.copy_(x if slope is None else x.mul_(slope))


def logprob_and_gradient_(logits, target, coef, softcap):
    """(a) of rows that hold the whole vocabulary, and (b) times coef in the logits' place: `statistics` and `gradient_`
    with one softmax between them. coef [t] float32 -> [t] float32."""
    x, target, coef = soft_cap(logits.float(), softcap), target[:, None], coef[:, None]
    slope = None if softcap is None else 1 - (x / softcap) ** 2                         # d capped / d logit
    top, picked = x.amax(1, keepdim=True), x.gather(1, target)                      # top: so that exp cannot overflow
    total = x.sub_(top).exp_().sum(1, keepdim=True)
    x.mul_(-coef / total).scatter_add_(1, target, coef)         # first -softmax, then + onehot
    logits.copy_(x if slope is None else x.mul_(slope))
    return (picked - top - total.log()).squeeze(1)


def _find_in_tile(target, width):
    """Which targets [t] are columns of a tile: (columns [t, 1], whether they are in it [t]). A target outside gets a
    column inside all the same, so that gather and scatter find one; the caller ignores it."""
    return target.clamp(0, width - 1)[:, None], (target >= 0) & (target < width)


PLAIN = types.SimpleNamespace(statistics=statistics, gradient_=gradient_, logprob_and_gradient_=logprob_and_gradient_)


def tile_functions(device):
    """Where the three functions above come from on this torch.device: `PLAIN`, or on CUDA the module kernels_triton."""
    if device.type == "cuda" and TRITON and _triton_works(device):
        import kernels_triton
        return kernels_triton
    return PLAIN


@functools.cache
def _triton_works(device):
    """Does a tiny tile go through? Triton calls the system's C compiler, which a slim image may lack. Tried, once."""
    import kernels_triton
    logits, target = torch.ones(1, 16, device=device), torch.zeros(1, dtype=torch.long, device=device)
    try:
        kernels_triton.statistics(logits, target, None)
    except Exception as error:          # whatever a compiler raises
        print(f"Triton does not work here, plain torch takes its place ({str(error)[:120]}); if a C compiler is "
              "missing, install one, or give KERNELS_TRITON=0 in the environment", flush=True)
        return False
    return True


def sum_rows(values, row, rows):
    """Sum per-token values by row: values [T], row [T] int64 -> [rows]. So tokens' log-probs become a response's.

    >>> sum_rows(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 1]), 2)
    tensor([-3., -4.])
    """
    return torch.zeros(rows, dtype=values.dtype, device=values.device).index_add(0, row, values)


# ---------------------------------------------------------------------------------------------------------------------
# positions and attention

# The kinds of RoPE scaling, and the numbers that each needs beside rope_theta
ROPE_NUMBERS = {"default": (), "linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings"),
                "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def rope_frequencies(rope, head_dim):
    """RoPE's angles: (inverse [hd/2] float32, scale). From one position to the next, pair i of a head's dimensions
    turns by inverse[i] radians; `scale` multiplies cosine and sine, and is 1 in all but yarn.

    rope: rope_type, rope_theta and the numbers that the type needs, under the names of transformers' rope_parameters,
    whose results these are (transformers.modeling_rope_utils). A model that is to read longer texts than it was trained
    on turns more slowly:

        linear      all pairs turn `factor` times slower
        llama3      so do the pairs that make fewer than low_freq_factor full turns in the old context; those that make
                    more than high_freq_factor stay as they are, and those between are blended, by their turns
        yarn        the same between beta_slow and beta_fast turns, but blended by the pair's number i; and attention
                    is sharpened by `scale`, since more keys are looked at (Peng et al. 2023, arXiv 2309.00071)

    >>> rope_frequencies({"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}, head_dim=4)
    (tensor([0.5000, 0.0500]), 1.0)
    """
    kind, factor = rope["rope_type"], rope.get("factor")
    inverse = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if kind == "default":
        return inverse, 1.0
    if kind == "linear":
        return inverse / factor, 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)      # full turns in the old context
        keep, scale = ((turns - low) / (high - low)).clamp(0, 1), 1.0
    else:
        keep, scale = _yarn_keep(rope, head_dim), _yarn_scale(rope)
    return keep * inverse + (1 - keep) * inverse / factor, scale


def _yarn_keep(rope, head_dim):
    """How much of its speed each dimension pair keeps, [hd/2]: 1 for the fast ones at the front, 0 for the slow."""
    def pair(turns):                            # the number of the pair that makes so many turns in the old context
        radian = rope["original_max_position_embeddings"] / (turns * 2 * math.pi)       # in positions: 1 / inverse
        return head_dim * math.log(radian) / (2 * math.log(rope["rope_theta"]))

    first, last = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001                           # a step instead of a ramp
    return 1 - ((torch.arange(head_dim // 2) - first) / (last - first)).clamp(0, 1)


def _yarn_scale(rope):
    """The factor on cosine and sine: attention_factor where it is given, else 0.1 log(factor) + 1, or the ratio of two
    such numbers with weights before the logarithm (DeepSeek's mscale and mscale_all_dim)."""
    def grown(weight):
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(rope["mscale"]) / grown(rope["mscale_all_dim"])
    return grown(1)


def take(x, index):
    """x[index] for a matrix of indices [R, T], by index_select: its backward, index_add, is several times faster on a
    CPU than that of x[index]."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def attention(q, k, v, mask, scale=None, cap=None):
    """Scaled dot-product attention: q [R, T, nh, hd], k and v [R, S, nkv, hd] -> [R, T, nh, hd].

    mask: from `attention_mask` with nh/nkv groups, or None for causal rows (S = T) without window or cap. scale: None
    for hd ** -0.5. cap: a bound on the scores. With a mask, the nh/nkv query heads that share a key head become that
    many times as many query positions of it: torch's memory-saving kernels take a mask or grouped heads, not both.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is None:
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and q.is_cuda and q.dtype == torch.float32:       # the kernel for float32 has no grouped heads
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1, scale=scale)
    else:
        folded = q.reshape(len(q), k.shape[1], -1, q.shape[-1])             # [R, nkv, groups * T, hd]
        out = masked_attention(folded, k, v, mask, scale, cap).reshape(q.shape)     # on CUDA not always contiguous
    return out.transpose(1, 2)


def masked_attention(q, k, v, mask, scale=None, cap=None):
    """softmax(q k^T * scale + mask) v over the last two dimensions, the scores capped before the mask:
    q [R, nkv, Q, hd], k and v [R, nkv, S, hd], mask [R or 1, 1, Q, S] -> [R, nkv, Q, hd].

    torch's fused kernels have no place for a cap. With one, a layer's scores are held in memory, in float32, and two
    such tensors are kept for its backward pass: a reason to train Gemma 2 with activation_checkpointing.
    """
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = soft_cap((q @ k.mT).float() * (scale or q.shape[-1] ** -0.5), cap)
    return (scores + mask).softmax(-1).to(v.dtype) @ v


def attention_mask(query_at, key_at, window, groups, dtype):
    """What is added to the scores: 0 where a query may look, -inf where it may not.

    query_at [R, T] and key_at [R, S] are positions (R may be 1, for all rows) -> [R, 1, groups * T, S]. A query sees
    the keys at its own position and before, in a window only the latest `window` of them. The rows are repeated for
    the `groups` query heads that share a key head, as `attention` lays them out.

    >>> at = torch.arange(3)[None]
    >>> attention_mask(at, at, window=2, groups=1, dtype=torch.float32)[0, 0]
    tensor([[0., -inf, -inf],
            [0., 0., -inf],
            [-inf, 0., 0.]])
    """
    query_at, key_at = query_at[:, :, None], key_at[:, None, :]
    seen = key_at <= query_at
    if window is not None:
        seen = seen & (key_at > query_at - window)
    seen = torch.cat([seen] * groups, 1)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# preferences: P [B, K, K] with P[b, i, j] = P(y_i > y_j | x_b), P + P^T = 1, diagonal 1/2


def phat(P):
    """SPPO section 4: Phat(y_i > pi_t | x) = (1/K) sum_k P(y_i > y_k | x): P [B, K, K] -> [B, K].

    The comparison with itself, 1/2, counts: so Phat stays in [1/(2K), 1 - 1/(2K)] and averages to 1/2 over the K.

    >>> phat(torch.tensor([[[.5, 1., .75], [0., .5, .25], [.25, .75, .5]]]))
    tensor([[0.7500, 0.2500, 0.5000]])
    """
    return P.mean(-1)


def optimistic(P, before=None):
    """p* [B, K], which stands in Phat's place where self-play is optimistic: up to a constant of the prompt,
    p* = 2 P(y > pi_t) - P(y > pi_{t-1}).

    P [B, K, K]; before [B, K], P(y_i > pi_{t-1} | x) as a mean over answers of pi_{t-1}, None where pi_{t-1} is pi_t.
    log pi_{t+1} = log pi_t + eta p* + const counts the last gain twice and takes the one before back: a guess that the
    opponent moves on as it did. (Rakhlin and Sridharan, arXiv 1311.1869; for preferences ONPO, arXiv 2502.16852.)

    Phat compares an answer with itself too. So on average Phat - 1/2 is only (K - 1)/K of P(y > pi_t) - 1/2, while
    P(y > pi_{t-1}) has no such term. From the latter its mean over the K answers is taken off. Then p* averages to 1/2,
    as Phat does: the 1/2 in (4.7) stands for log Z / eta here too, and answers that tie stay where they are. That mean
    holds the answer itself, and shrinks what is left to (K - 1)/K as well. The factor K/(K - 1) undoes both; p* - 1/2
    is unbiased for
    2 (P(y > pi_t) - 1/2) - (P(y > pi_{t-1}) - P(pi_t > pi_{t-1})).

    >>> P = torch.tensor([[[.5, 1.], [0., .5]]])
    >>> optimistic(P), optimistic(P, torch.tensor([[.75, .25]]))
    (tensor([[1., 0.]]), tensor([[1., 0.]]))
    """
    K = P.shape[-1]
    now = phat(P) - 0.5                                         # averages to 0 over the K answers
    before = now if before is None else before - before.mean(-1, keepdim=True)
    return 0.5 + K / (K - 1) * (2 * now - before)


def magnetic(wins, logratio, eta, weight):
    """p* [..., n], which stands in Phat's place where self-play is drawn to a magnet, a fixed policy pi_mag:
    p* = Phat - (w / eta) (l - mean l),  l = log pi_t(y|x) / pi_mag(y|x).

    wins [..., n] are the answers' Phats, logratio [..., n] their l; the mean over them stands for the normaliser of
    log pi_{t+1} = (1 - w) log pi_t + w log pi_mag + eta P(y > pi_t). If eta is small enough for w / eta, its iterates
    come to rest near the Nash equilibrium, the nearer the smaller w / eta is, and on it when the magnet is moved to
    pi_t from time to time. (Sokota et al., arXiv 2206.05825, whose strength alpha is w / eta; Magnetic Preference
    Optimization, arXiv 2410.16714; the moving magnet also in COMAL, arXiv 2410.23223.)

    >>> magnetic(torch.tensor([.75, .25]), torch.tensor([1., -1.]), eta=4.0, weight=.5)  # targets eta (p* - 1/2): +-1/2
    tensor([0.6250, 0.3750])
    """
    return wins - weight / eta * (logratio - logratio.mean(-1, keepdim=True))


def magnet_at(t, every):
    """s, where pi_s is the magnet of iteration t: pi_1, moved to pi_t every `every` iterations (0 or None: never).

    >>> [magnet_at(t, 3) for t in range(1, 8)]
    [1, 1, 1, 4, 4, 4, 7]
    """
    return 1 + every * ((t - 1) // every) if every else 1


def best_and_worst(wins):
    """Where the best and the worst of K answers stand, by their Phats (or p*) `wins` [K]; of equals the first.

    >>> best_and_worst(torch.tensor([0.4, 0.7, 0.4])), best_and_worst(torch.tensor([0.5, 0.5, 0.5]))
    ((1, 0), (0, 0))
    """
    if wins.min() == wins.max():        # all K tie. Both are then the first answer with p = 1/2, its target is 0, and
        return 0, 0                     # the regression holds the policy where it is
    return int(wins.argmax()), int(wins.argmin())


# ---------------------------------------------------------------------------------------------------------------------
# losses: pure functions, elementwise on a response's log-ratio  log pi(y|x) - log pi_t(y|x),  both summed over its
# tokens. Of a pair, w is the winner and l the loser.


def sppo_loss(logratio, p, eta):
    """SPPO, equation (4.7): (log pi/pi_t - eta (P - 1/2))^2, for any response y and P = Phat(y > pi_t | x) in [0, 1].

    The 1/2 stands for log Z / eta, where Z normalises the update (4.1), pi_t exp(eta P) / Z. Under pi_t the mean of P
    is 1/2, since whatever one response wins another loses, so log Z ~ eta / 2 for small eta. p = 1 for the winner and 0
    for the loser gives the "hard" form, whose targets are +-eta/2.

    >>> sppo_loss(torch.tensor([3.0, -5.0]), torch.tensor([0.75, 0.25]), eta=8.0)  # targets +2 and -2
    tensor([1., 9.])
    """
    return (logratio - eta * (p - 0.5)) ** 2                                            # (4.7)


def dpo_loss(logratio_w, logratio_l, beta):
    """DPO (Rafailov et al. 2023, equation 7): -log sigmoid(beta (logratio_w - logratio_l)).

    >>> dpo_loss(torch.tensor([10.0]), torch.tensor([-10.0]), beta=0.05)           # -log sigmoid(1)
    tensor([0.3133])
    """
    return -F.logsigmoid(beta * (logratio_w - logratio_l))            # DPO (7)


def ipo_loss(logratio_w, logratio_l, beta):
    """IPO (Azar et al. 2023, equation 17): (logratio_w - logratio_l - 1/(2 beta))^2.

    The SPPO paper's (4.14) writes (beta * difference - 1)^2, whose margin is 1/beta: twice this one at equal beta.

    >>> ipo_loss(torch.tensor([4.0]), torch.tensor([-3.0]), beta=0.1)              # margin 5
    tensor([4.])
    """
    return (logratio_w - logratio_l - 1 / (2 * beta)) ** 2                              # IPO (17)


# ---------------------------------------------------------------------------------------------------------------------
# the update


class Optimizer:
    """AdamW or RMSProp on float32 master weights, with gradient clipping.

    A bfloat16 weight has 8 significant bits: 0.02 - 5e-7 is 0.02 again, and a run at the paper's learning rate would
    not move. So where a weight is bfloat16 the optimizer owns a float32 copy, updates that, and rounds it into the
    weight. Gradients too are summed over micro-batches in float32: a hook adds each to its master's the moment it is
    complete, so that no second set of them is ever held. Where a weight is float32 it is its own master.

    With several processes the weights are shares (parallel.shard), whose gradients are means over the processes when
    they arrive. Weights that each process holds whole, adapters, get that mean here.

    parameters: the model's, in the same order on every process; those that need no gradient are left out. name: "adamw"
    or "rmsprop". After the last backward pass of a batch call `step`. 18 bytes a bfloat16 parameter with AdamW (weight
    2, master 4, gradient 4, moments 8), 14 with RMSProp.
    """

    def __init__(self, parameters, name, weight_decay=0.0):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        for p, master in zip(self.parameters, self.masters):
            if master is not p:
                p.register_post_accumulate_grad_hook(functools.partial(_move_gradient, master))
        # The inner optimizer sees nothing but the masters. lr is set in every step.
        fused = True if self.masters[0].is_cuda else None       # elsewhere foreach, which holds one more copy at a time
        kinds = {"adamw": lambda: torch.optim.AdamW(self.masters, lr=0.0, betas=(0.9, 0.98), weight_decay=weight_decay,
                                                    fused=fused),
                 # foreach would need one more copy of all weights at a time
                 "rmsprop": lambda: torch.optim.RMSprop(self.masters, lr=0.0, weight_decay=weight_decay, foreach=False)}
        self.inner = kinds[name]()

    def step(self, lr, clip):
        """Clip the gradient to norm `clip` (0: leave it), update with learning rate `lr`, and clear it. Returns the
        norm before clipping. Where that is not finite, nothing is updated."""
        gradients = [m.grad for m in self.masters if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(_averaged(gradients))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm             # over all processes' shares
        torch.nn.utils.clip_grads_with_norm_(self.masters, clip or math.inf, norm)
        for group in self.inner.param_groups:
            group["lr"] = lr
        norm = float(norm)                      # here the host waits for the device, and nowhere else in a step
        if math.isfinite(norm):
            self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        self.round()
        return norm

    @torch.no_grad()
    def round(self):
        """The weights get their masters' values."""
        for p, master in zip(self.parameters, self.masters):
            if master is not p:
                p.copy_(master)

    def tensors(self):
        """What --resume needs, {name: tensor}: the masters and the inner optimizer's moments. They are the optimizer's
        own. Who fills them with a saved state calls `round` then."""
        if not self.inner.state:                # torch makes the moments in the first step: one that moves nothing
            for master in self.masters:
                master.grad = torch.zeros_like(master)
            self.inner.step()
            self.inner.zero_grad(set_to_none=True)
        return {f"{i}.{name}": tensor for i, master in enumerate(self.masters)
                for name, tensor in {"master": master.detach(), **self.inner.state[master]}.items()}


def _move_gradient(master, p):
    """Adds a complete gradient to the float32 sum that the master holds."""
    master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
    p.grad = None


def _averaged(gradients):
    """The same gradients, means over the processes: in place, but for shares, which are means already."""
    if dist.is_initialized():
        for gradient in gradients:
            if not hasattr(gradient, "full_tensor"):
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
    return gradients


def linear_schedule(step, steps, warmup, lr):
    """Learning rate of step 0 ... steps - 1: up linearly over the first `warmup` share of them, then down linearly.
    Only the step after the last would have rate 0, so none is wasted.

    >>> [linear_schedule(i, 10, 0.2, 1.0) for i in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    rise = max(1, round(warmup * steps))
    if step < rise:
        return lr * ((step + 1) / rise)
    return lr * ((steps - step) / max(1, steps - rise))


def loss_coefficient(advantage, logratio, beta, kl):
    """What multiplies grad log pi of each sequence in the loss: advantage and logratio = log pi/pi_Ref, any one shape.

    As the sample comes from pi itself, pi/sg(pi) is 1 and its gradient is grad log pi; and each form of the KL term has
    a gradient of the form c grad log pi too:
        reward, k2 (l^2/2)       c = l             E[c grad log pi] = grad KL(pi || pi_Ref), exactly
        k1         (l)           c = 1             expectation 0: E[grad log pi] = 0; (4) read literally, no pull at all
        k3         (e^-l - 1 + l) c = 1 - e^-l     that of the other KL, KL(pi_Ref || pi)
    """
    pull = {"reward": logratio, "k2": logratio, "k1": torch.ones_like(logratio), "k3": 1 - (-logratio).exp()}[kl]
    return -(advantage - beta * pull)


def token_weights(lengths, normalise, longest):
    """What each sequence's tokens are multiplied by: lengths [M] -> [M] float32 (see --normalise)."""
    lengths = torch.tensor(lengths, dtype=torch.float32)
    return {"none": torch.ones_like(lengths), "sequence": 1 / lengths, "token": 1 / lengths.mean().expand_as(lengths),
            "constant": torch.full_like(lengths, 1 / longest)}[normalise]
