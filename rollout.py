"""Hand-written batched sampling with a KV cache.

    samples = generate(net, prompts, n=5, max_new_tokens=256, stop_ids=(2,), seeds=7)
    samples.tokens[b][i], samples.logprobs[b][i], samples.finish[b][i]

Five things make it fast, none of them clever:
  1. shared prefill     a prompt is computed once, packed with its neighbours without padding, and its keys and values
                        are copied to its n samples; what all prompts begin with (a rubric) is computed once for all
  2. compaction         a finished row leaves the batch at once: the last live row moves into its place, waiting prompts
                        enter. With long-tailed lengths most of a padded batch's work is spent on rows that ended
  3. grouped queries    the query heads that share a key head read it once (KVCache.attend)
  4. inverse CDF        one uniform number a row and two short searches, where torch.multinomial draws V numbers a row
  5. CUDA graphs        on a GPU a decoding step is recorded and replayed: one launch, not many hundred (_replayed)

A *sample* is one of a prompt's n continuations; a *row* is the place in batch and cache where one is being made. A
sample's randomness is a function of (its prompt's seed, its index i, the position): never of the batch it is in, of the
order, or of how many ranks share the work. So a run can be resumed, resharded or rebatched and draws the same tokens,
up to floating-point rounding at the boundary of two tokens.

`python bench.py rollout` checks greedy decoding against the plain forward and times sampling against transformers.
"""

import dataclasses
import math
import time

import torch

import model
import run


@dataclasses.dataclass
class Samples:
    """What `generate` returns, for B prompts and n samples each."""
    tokens: list            # [B][n] lists of ids, the stop token included
    logprobs: list          # [B][n] lists of floats, as long: log pi of that token under the full, untempered softmax
    finish: list            # [B][n] "stop" (ended by a stop token) or "length" (cut; nothing is appended)
    seconds: float = 0.0

    @property
    def count(self):
        """Tokens sampled."""
        return sum(len(t) for group in self.tokens for t in group)


# ---------------------------------------------------------------------------------------------------------------------
# randomness by counting: a hash of (stream, position) instead of a generator with a state

_MASK = (1 << 64) - 1


def _int64(x):
    """A Python int as torch's int64 sees it: wrapped to [-2^63, 2^63)."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _mix(x):
    """splitmix64's finaliser on an int64 tensor: every input bit reaches every output bit. Products wrap modulo 2^64,
    as they should, and the masks after >> drop the copies of the sign bit that it shifts in."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _int64(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def row_streams(seeds, n, device="cpu"):
    """The random stream of every sample: seeds B ints -> [B * n] int64."""
    seed = _mix(torch.tensor([_int64(s) for s in seeds], device=device))
    sample = torch.arange(1, n + 1, device=device) * _int64(0x9E3779B97F4A7C15)
    return _mix(seed[:, None] + sample).flatten()


def uniform(stream, position):
    """float32 in [0, 1), multiples of 2^-24, from int64 streams and positions, broadcast against each other.

    The factor is odd, as in `row_streams`: so different positions stay different modulo 2^64.
    """
    bits = _mix(stream + (position + 1) * _int64(0xD1342543DE82EF95))
    return ((bits >> 40) & ((1 << 24) - 1)).float() * 2.0**-24


# ---------------------------------------------------------------------------------------------------------------------
# choosing a token


def truncate(logits, top_p=1.0, top_k=0):
    """Set to -inf what top-k and then top-p leave out: logits [R, V] -> [R, V].

    top_k keeps the k likeliest tokens, and those that tie with the last of them; 0 keeps all. top_p (nucleus) keeps the
    smallest set of likeliest tokens with mass >= top_p, at least one token; of those that tie it takes the first. A GPU
    finds that set without sorting the vocabulary.

    >>> truncate(torch.tensor([[0.5, 0.3, 0.2]]).log(), top_p=0.6).softmax(-1)
    tensor([[0.6250, 0.3750, 0.0000]])
    """
    if top_k and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1.0:
        beyond = _beyond_by_bisection if logits.is_cuda else _beyond_by_sort
        logits = logits.masked_fill(beyond(logits, top_p), -torch.inf)
    return logits


def _beyond_by_sort(logits, top_p):
    """Which tokens the nucleus leaves out: logits [R, V] -> bool [R, V]."""
    values, order = logits.sort(descending=True, stable=True)
    probs = values.softmax(-1)
    beyond = probs.cumsum(-1) - probs >= top_p                       # the tokens before this one have the mass already
    beyond[..., 0] = False
    return torch.zeros_like(beyond).scatter(-1, order, beyond)              # back in the order of the vocabulary


def _beyond_by_bisection(logits, top_p):
    """The same set, up to the rounding of sums: logits [R, V] float32 -> bool [R, V]. It looks for the probability of
    the last token that stays, the largest number p such that the tokens with p or more have the mass top_p.

    Floats >= 0 are ordered as their bits are when read as integers. Those of [0, 1] lie below 2^30, so 30 halvings find
    p exactly, each by one masked sum, and the host never waits for the device.
    """
    probs = logits.softmax(-1)
    low = torch.zeros(*probs.shape[:-1], 1, dtype=torch.int32, device=probs.device)        # has the mass
    high = probs.amax(-1, keepdim=True).view(torch.int32) + 1                               # leaves no token
    for _ in range(30):
        middle = (low + high) // 2
        enough = _mass(probs, probs >= middle.view(torch.float32)) >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    last = low.view(torch.float32)
    ties = probs == last
    rank = ties.cumsum(-1, dtype=torch.int32) - 1                           # how many of the ties come before
    before = _mass(probs, probs > last) + rank * last
    return (probs < last) | (ties & (rank > 0) & (before >= top_p))


def _mass(probs, chosen):
    """The sum over a row's chosen tokens: [R, V] -> [R, 1]."""
    return torch.where(chosen, probs, 0.0).sum(-1, keepdim=True)


def inverse_cdf(weights, u):
    """Draw one index a row, from weights [R, V] >= 0 that need not sum to 1 and u [R] in [0, 1) -> [R] int64.

    It is the first index whose cumulative weight exceeds u times the sum. A search among the sums of blocks of about
    sqrt(V) finds the block, a search inside it the index. So the weights are read once, and no [R, V] cumulative sum is
    built, whose float32 rounding would also grow with V. Zero weights are never drawn.

    >>> (inverse_cdf(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([0.2])),
    ...  inverse_cdf(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([0.25])))
    (tensor([0]), tensor([2]))
    """
    R, V = weights.shape
    size = 1 << max(4, (V - 1).bit_length() // 2)                     # of a block: a power of 2 near sqrt(V), >= 16
    if V % size:
        weights = torch.nn.functional.pad(weights, (0, size - V % size))
    blocks = weights.view(R, -1, size)
    sums = blocks.sum(-1).cumsum(-1)                                  # [R, V/size] up to each block's end
    at = (u * sums[:, -1])[:, None]                                   # [R, 1] the cumulative weight that is looked for
    block = _first_above(sums, at)                                    # [R, 1]
    inside = blocks[torch.arange(R, device=u.device), block.squeeze(1)].cumsum(-1)      # [R, size]
    before = (sums.gather(1, block) - inside[:, -1:]).clamp(min=0)    # weight of the earlier blocks
    index = block * size + _first_above(inside, (at - before).clamp(min=0))
    return index.squeeze(1)


def _first_above(cumulative, at):
    """The first index with cumulative > at, row by row; if rounding leaves none, the last index that adds weight."""
    found = torch.searchsorted(cumulative, at, right=True)
    last = (cumulative < cumulative[:, -1:]).sum(1, keepdim=True)     # the first index that has the whole weight
    return torch.minimum(found, last)


def choose(logits, u, temperature=1.0, top_p=1.0, top_k=0):
    """Next tokens and their log-probs: logits [R, V] float32, u [R] uniform -> ([R] int64, [R] float32).

    The log-prob is that of the token under the full, untempered softmax: the quantity that losses are about, whatever
    sampling was used. temperature 0 takes the likeliest.
    """
    top = logits.amax(-1, keepdim=True)                               # taken out so that exp cannot overflow
    weights = (logits - top).exp_()
    if temperature == 0:
        token = logits.argmax(-1)
    elif temperature == 1 and top_p == 1 and not top_k:
        token = inverse_cdf(weights, u)                               # the exponentials serve twice
    else:
        token = inverse_cdf(truncate(logits / temperature, top_p, top_k).softmax(-1), u)
    picked = logits.gather(1, token[:, None]) - top
    logprob = picked - weights.sum(-1, keepdim=True).log()
    return token, logprob.squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# generation


class _Rows:
    """The rows in flight, one entry a row in every tensor. Row r here belongs to row r of the cache: both have the live
    rows at the front, and what is moved in one is moved in the other."""

    def __init__(self, rows, max_new, device):
        self.out = torch.zeros(rows, max_new, dtype=torch.long, device=device)      # the ids sampled so far
        self.logprob = torch.zeros(rows, max_new, device=device)                    # and their log-probs
        self.made = torch.zeros(rows, dtype=torch.long, device=device)              # how many these are
        self.limit = torch.zeros(rows, dtype=torch.long, device=device)             # how many there may be
        self.uniform = torch.zeros(rows, max_new, device=device)                    # u of every position
        self.token = torch.zeros(rows, dtype=torch.long, device=device)             # the latest id
        self.owner = [None] * rows                                                  # which sample: (b, i), on the host

    def keep(self, holes, movers):
        """Copy rows `movers` [M] into rows `holes` [M]."""
        for x in (self.out, self.logprob, self.made, self.limit, self.uniform, self.token):
            x[holes] = x[movers]
        for hole, mover in zip(holes.tolist(), movers.tolist()):
            self.owner[hole] = self.owner[mover]


@torch.inference_mode()
def generate(net, prompts, n, max_new_tokens, temperature=1.0, top_p=1.0, stop_ids=(), seeds=0, top_k=0, max_rows=256,
             prefill_tokens=16384, desc=None):
    """Sample n continuations of each prompt.

    prompts: B non-empty lists of ids. max_new_tokens: one int, or [B][n] ints. temperature 0 is greedy.
    top_p in (0, 1], top_k 0 = off. stop_ids end a sample and stay in it. seeds: B ints, or one int s for s, s+1, ...
    max_rows bounds the rows in flight and with them the cache, which takes layers * 2 * nkv * hd * W numbers a row, W
    the largest sum of a prompt and its limit. prefill_tokens bounds the prompts that are computed at once, but for a
    single one. desc: label of a progress bar, None for no bar. Returns Samples. Raises ValueError for an empty prompt
    or one that leaves no room for max_new_tokens in the model's context, UserError where a log-prob is NaN or infinite.
    """
    start = time.perf_counter()
    B = len(prompts)
    limits = [[max_new_tokens] * n] * B if isinstance(max_new_tokens, int) else max_new_tokens
    seeds = [seeds + b for b in range(B)] if isinstance(seeds, int) else list(seeds)
    _check_arguments(prompts, n, limits, seeds, net.config.max_positions)
    samples = Samples(*([[None] * n for _ in range(B)] for _ in range(3)))          # filled in as rows end
    if B == 0:
        return samples
    max_rows = max(n, min(max_rows, B * n))                 # a prompt's samples enter together
    longest_new = max(map(max, limits))
    width = max(len(prompt) + max(each) for prompt, each in zip(prompts, limits))   # of a row, prompt and answer
    cache, rows = model.kv_cache(net, max_rows, width), _Rows(max_rows, longest_new, net.device)
    stop = torch.tensor(list(stop_ids) or [-1], device=net.device)                  # -1 is no token
    streams = row_streams(seeds, n, net.device).view(B, n)
    bar = run.progress(desc=desc, total=B * n) if desc else None
    entered = 0                                             # prompts [0, entered) have been let in
    longest = 0                                             # length of the longest live row, without asking the device
    step = _decoder(net, cache, rows, (temperature, top_p, top_k))
    while entered < B or cache.live:
        # Every turn gives one token to some rows: to those of new prompts, else to all. Prompts are let in when a
        # quarter of the rows is free: a prefill for every freed row costs more than it brings.
        free = max_rows - cache.live
        if entered < B and (free >= max(n, max_rows // 4) or not cache.live):
            chosen = range(entered, entered + _how_many(prompts, entered, free // n, prefill_tokens))
            entered = chosen.stop
            longest = max(longest, max(len(prompts[b]) for b in chosen))
            turn = slice(cache.live, cache.live + len(chosen) * n)
            hidden = _prefill(net, cache, rows, chosen, prompts, n, streams, limits)
            logits = net.logits(hidden).repeat_interleave(n, 0)                     # a prompt's n rows begin alike
            _append(rows, turn, logits, temperature, top_p, top_k)
        else:
            turn = slice(0, cache.live)
            longest += 1
            step(longest)
        full = rows.made[turn] >= rows.limit[turn]
        ended = (torch.isin(rows.token[turn], stop) | full).nonzero().squeeze(1) + turn.start
        if len(ended):
            _collect(rows, ended, stop, samples)
            _compact(cache, rows, ended)
            longest = int(cache.lengths[:cache.live].max()) if cache.live else 0
            if bar is not None:
                bar.update(len(ended))
    if bar is not None:
        bar.close()
    if net.device.type == "cuda":       # the cache is one huge block. If the allocator kept it, what is needed next
        del cache, rows, step           # would be carved out of it, and the next cache find no place.
        torch.cuda.empty_cache()
    samples.seconds = time.perf_counter() - start
    return samples


def _check_arguments(prompts, n, limits, seeds, context):
    """Raises ValueError unless there is a seed and n limits for each prompt, and room for them in the context."""
    B = len(prompts)
    if n < 1 or len(seeds) != B or len(limits) != B or any(len(l) != n or min(l) < 1 for l in limits):
        raise ValueError(f"{B} prompts x {n} samples need n >= 1, {B} seeds, and limits of at least one token for each")
    for b, p in enumerate(prompts):
        if not p or len(p) + max(limits[b]) > context:
            raise ValueError(f"prompt {b} has {len(p)} tokens: with {max(limits[b])} new ones "
                             f"it must lie between 1 and the context of {context}")


def _how_many(prompts, first, room, prefill_tokens):
    """How many waiting prompts enter: as many as have room, within the token budget, at least one."""
    take, tokens = 0, 0
    while take < room and first + take < len(prompts):
        tokens += len(prompts[first + take])
        if take and tokens > prefill_tokens:
            break
        take += 1
    return take


def _decoder(net, cache, rows, how):
    """A function step(longest) that gives a token to every live row; longest: how many tokens the longest of them then
    has. how: (temperature, top_p, top_k). With a FlashCache, whose steps have few widths, it replays CUDA graphs."""
    def step(longest):
        computed = slice(0, cache.width)
        cache.step(longest)
        _append(rows, computed, net.logits(net(rows.token[computed], cache)), *how)
    recorded = isinstance(cache, model.FlashCache) and _records(net.device) and net.computes_in is None
    return _replayed(step, cache) if recorded else step         # a sharded net's hooks wait for streams of their own


def _records(device):
    """Are there graphs? On another device a step would run while it is recorded, and its replays be empty."""
    return device.type == "cuda"


def _replayed(step, cache):
    """`step` as CUDA graphs, one for each width of the cache: the first time a width comes by it runs as it is, which
    warms up what torch sets up once; the second time it is recorded, and from then on replayed.

    A replay repeats what the device did, on the same memory, and no line of Python. So nothing in a step may ask the
    device for a number or depend on one that only the host knows, but for the width. The graphs share one pool of
    memory: what a step leaves behind lies in `rows` and `cache`, outside of it.
    """
    graphs, pool = {}, torch.cuda.graph_pool_handle()

    def replay(longest):
        width = cache.width
        if width not in graphs:
            graphs[width] = None
            return step(longest)
        if graphs[width] is None:
            graphs[width] = torch.cuda.CUDAGraph()
            # only this thread must leave the device alone meanwhile: others (NCCL's watchdog) ask it for events
            with torch.cuda.graph(graphs[width], pool=pool, capture_error_mode="thread_local"):
                step(longest)
        graphs[width].replay()
    return replay


def _prefill(net, cache, rows, chosen, prompts, n, streams, limits):
    """Compute the chosen prompts once, give each n rows behind the live ones, and return the hidden state at each
    prompt's end [len(chosen), H]."""
    view, hidden = model.prefill(net, [prompts[b] for b in chosen], keep_kv=True)
    new = slice(cache.live, cache.live + len(chosen) * n)
    cache.admit(view, n)
    rows.made[new] = 0
    stream = streams[chosen.start:chosen.stop].reshape(-1, 1)                       # [new rows, 1]
    rows.uniform[new] = uniform(stream, torch.arange(rows.uniform.shape[1], device=net.device))
    rows.limit[new] = torch.tensor([limit for b in chosen for limit in limits[b]], device=net.device)
    rows.owner[new] = [(b, i) for b in chosen for i in range(n)]
    return hidden


def _append(rows, turn, logits, temperature, top_p, top_k):
    """Draw the next token of the rows in the slice `turn`, whose logits [rows, V] these are, and write it down."""
    made = rows.made[turn][:, None]                                                 # the column where it goes
    u = rows.uniform[turn].gather(1, made).squeeze(1)
    token, logprob = choose(logits, u, temperature, top_p, top_k)
    rows.token[turn] = token
    rows.out[turn].scatter_(1, made, token[:, None])
    rows.logprob[turn].scatter_(1, made, logprob[:, None])
    rows.made[turn] += 1


def _collect(rows, ended, stop, samples):
    """Copy the finished rows `ended` [E] to the result. A log-prob that is not finite is noticed here, on the host,
    where it is being read anyway: asking the device after every token would cost a round trip each."""
    made, by_stop = rows.made[ended].tolist(), torch.isin(rows.token[ended], stop).tolist()
    out, logprob = rows.out[ended].tolist(), rows.logprob[ended].tolist()
    for j, row in enumerate(ended.tolist()):
        b, i = rows.owner[row]
        samples.tokens[b][i] = out[j][:made[j]]
        samples.logprobs[b][i] = logprob[j][:made[j]]
        if not math.isfinite(sum(samples.logprobs[b][i])):
            raise run.UserError("the model gave a log-probability that is NaN or infinite while sampling: its weights "
                                "are damaged (a run that diverged?) or its numbers overflow; try --dtype float32 or an "
                                "earlier checkpoint")
        samples.finish[b][i] = "stop" if by_stop[j] else "length"


def _compact(cache, rows, ended):
    """Drop the finished rows `ended` [E], in ascending order: the last live rows move into the holes they leave.

    Of 6 rows let 1, 3 and 4 end. 3 stay, so 1 is a hole, 3 and 4 lie beyond, and 5 moves into 1.
    """
    live = cache.live - len(ended)                                                  # how many stay: rows [0, live)
    holes = ended[ended < live]
    alive = torch.ones(cache.live - live, dtype=torch.bool, device=ended.device)    # of the rows [live, cache.live)
    alive[ended[ended >= live] - live] = False
    movers = alive.nonzero().squeeze(1) + live                                      # as many as holes
    if len(holes):
        rows.keep(holes, movers)
    rows.made[live:] = 0                    # a row that only pads a step (FlashCache) begins anew, here as in the cache
    cache.keep(holes, movers, live)
