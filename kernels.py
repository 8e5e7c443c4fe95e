"""The arithmetic that deserves care: log-probabilities of a linear head without the [T, V] logits, and the losses.

Shapes:  T tokens, H hidden size, V vocabulary.  Everything returned is float32, whatever the model's dtype: a sequence
log-probability is a sum of hundreds of terms, and eta = 1e3 (SPPO) multiplies preferences into targets of some
hundreds, so the last digits of bfloat16 would be the whole signal. One exception: a bfloat16 model's logits are rounded
to bfloat16 by the matrix product itself, as in every library that multiplies in that type; all that follows is float32.

Why not log_softmax(logits)[target]?  At V = 128,256 and T = 8,192 the float32 logits alone are 4 GB, their softmax for
the backward pass another 4, and the gradient of the logits a third. None of it is needed at once:

    log pi(target) = logit[target] - logsumexp(logits)         one number per token; the sum runs over V in any order
    d log pi / d logit = onehot(target) - softmax(logits)      recomputed from (hidden, weight, logsumexp) when wanted

    python kernels.py            checks against float64, then times and measures peak memory
"""

import ctypes
import math
import sys
import time

import torch
import torch.distributed as dist

# One tile of logits is CHUNK_T x CHUNK_V: 16 MB in float32, small enough to stay near the cache, large enough that the
# matrix products run at full speed. Memory is a few tiles whatever T and V are.
CHUNK_T, CHUNK_V = 1024, 4096


# ---------------------------------------------------------------------------------------------------------------------
# log-probabilities


def soft_cap(x, cap):
    """cap * tanh(x / cap), elementwise: x where it is small, never beyond (-cap, cap). With cap None, x itself.

    >>> soft_cap(torch.tensor([0.5, -1000.0]), 30.0)
    tensor([  0.5000, -30.0000])
    """
    return x if cap is None else cap * torch.tanh(x / cap)


def linear_logprob_reference(hidden, weight, target, softcap=None):
    """What `linear_logprob` computes, in the obvious way: materialises [T, V] in float32.
    For checks and as the definition."""
    return soft_cap((hidden @ weight.T).float(), softcap).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


def linear_logprob(hidden, weight, target, softcap=None):
    """log softmax(hidden @ weight.T)[target] in float32, never holding more than a few tiles of the logits.

    hidden [T, H] and weight [V, H] of one floating dtype and device, target [T] int64 in [0, V)  ->  [T] float32.
    softcap: None, or Gemma 2's bound on the logits, which become softcap * tanh(logits / softcap), in float32.
    Gradients flow to hidden and weight. Cost: one matrix product forward; backward recomputes it and adds the two
    products every linear layer has (four where the naive way needs three: the price of the memory).

    >>> h, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [math.log(3.0), 0.0]])  # logits 0 and log 3
    >>> linear_logprob(h, w, torch.tensor([1])).exp()                                        # 3 / (1 + 3)
    tensor([0.7500])
    """
    return _LinearLogprob.apply(hidden, weight, target, softcap)


def _tiles(length, size):
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, softcap):
        T, V = hidden.shape[0], weight.shape[0]
        lse = torch.full((T,), -math.inf, device=hidden.device)     # running log sum exp over the vocabulary
        picked = torch.zeros(T, device=hidden.device)               # the target's logit, once its tile comes by
        for v in _tiles(V, CHUNK_V):
            w = weight[v].T
            for t in _tiles(T, CHUNK_T):
                logits = soft_cap((hidden[t] @ w).float(), softcap)         # [t, v]
                local = target[t] - v.start
                inside = (local >= 0) & (local < logits.shape[1])
                at = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
                picked[t] += torch.where(inside, at, 0.0)
                top = logits.amax(1, keepdim=True)
                part = logits.sub_(top).exp_().sum(1).log_().add_(top.squeeze(1))   # in place: no second tile
                lse[t] = torch.logaddexp(lse[t], part)
        ctx.save_for_backward(hidden, weight, target, lse)
        ctx.softcap = softcap
        return picked - lse

    @staticmethod
    def backward(ctx, grad):                                        # grad [T] float32
        hidden, weight, target, lse = ctx.saved_tensors
        T, V = hidden.shape[0], weight.shape[0]
        need_h, need_w = ctx.needs_input_grad[:2]
        # hidden's gradient is a sum over V tiles: the running sum is float32
        d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if need_h else None
        d_weight = torch.empty_like(weight) if need_w else None     # each row belongs to one tile: written once
        if T == 0 and need_w:
            d_weight.zero_()
        for v in _tiles(V, CHUNK_V) if T else []:
            w = weight[v]
            if need_w:  # a float32 gradient is its own accumulator
                d_w = d_weight[v] if weight.dtype == torch.float32 else torch.empty(w.shape, device=w.device)
            for t in _tiles(T, CHUNK_T):
                logits = soft_cap((hidden[t] @ w.T).float(), ctx.softcap)
                slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2   # d capped / d logit
                p = logits.sub_(lse[t, None]).exp_().mul_(-grad[t, None])   # -g softmax, in the logits' place
                local = target[t] - v.start
                inside = (local >= 0) & (local < p.shape[1])
                p.scatter_add_(1, local.clamp(0, p.shape[1] - 1)[:, None], torch.where(inside, grad[t], 0.0)[:, None])
                if slope is not None:
                    p *= slope
                p = p.to(hidden.dtype)                              # d loss / d logits, [t, v]
                if need_h:
                    _add_product(d_hidden[t], p, w)
                if need_w:
                    _add_product(d_w, p.T, hidden[t], fresh=t.start == 0)
            if need_w and d_w.dtype != weight.dtype:
                d_weight[v] = d_w
        return d_hidden.to(hidden.dtype) if need_h else None, d_weight, None, None


def _add_product(out, a, b, fresh=False):
    """out += a @ b, or out = a @ b where `fresh`; out float32. One fused call where the dtypes agree."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=0 if fresh else 1, out=out)
    elif fresh:
        out.copy_(a @ b)
    else:
        out += a @ b


# Where the coefficients are known before the pass, a tile of tokens keeps its whole vocabulary: 256 MB in float32. At
# V = 128,256 that is 523 tokens, enough to run the products at full speed and to touch the weight's gradient rarely.
POLICY_TILE = 64 * 2**20


def linear_policy_loss(hidden, weight, target, coef, softcap=None):
    """sum_m coef[m] log softmax(hidden @ weight.T)[target[m]] and its gradients, from one look at the logits.

    For policy gradients, whose coefficients (minus the advantage, over the batch) are known beforehand: softmax and
    gradient are formed while the tile of logits is there, three matrix products in all where `linear_logprob`
    needs four. hidden [T, H], weight [V, H], target [T] int64, coef [T] float32, to which no gradient flows.
    Returns (loss [] float32, logprob [T] float32 without gradient).

    >>> h, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [math.log(3.0), 0.0]])  # logits 0 and log 3
    >>> loss, logprob = linear_policy_loss(h, w, torch.tensor([1]), torch.tensor([-2.0]))
    >>> loss, logprob.exp()                                                                  # -2 log(3/4)
    (tensor(0.5754), tensor([0.7500]))
    """
    return _LinearPolicyLoss.apply(hidden, weight, target, coef, softcap)


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, coef, softcap):
        need_h, need_w = ctx.needs_input_grad[:2]
        logprob = torch.empty(len(target), device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if need_h else None
        new = torch.empty if len(target) else torch.zeros
        d_weight = new(weight.shape, device=weight.device) if need_w else None          # a sum over tiles: float32
        for t in _tiles(len(target), max(1, POLICY_TILE // len(weight))):
            logits = soft_cap((hidden[t] @ weight.T).float(), softcap)                  # [t, V]
            slope = None if softcap is None else 1 - (logits / softcap) ** 2            # d capped / d logit
            lse = logits.logsumexp(1, keepdim=True)
            logprob[t] = (logits.gather(1, target[t, None]) - lse).squeeze(1)
            if not (need_h or need_w):
                continue
            p = logits.sub_(lse).exp_().mul_(-coef[t, None])                            # -c softmax, in place
            p.scatter_add_(1, target[t, None], coef[t, None])                           # + c onehot
            if slope is not None:
                p *= slope
            p = p.to(hidden.dtype)
            if need_h:
                d_hidden[t] = p @ weight
            if need_w:
                _add_product(d_weight, p.T, hidden[t], fresh=t.start == 0)
        ctx.gradients, ctx.dtype = (d_hidden, d_weight), weight.dtype
        ctx.mark_non_differentiable(logprob)
        return (coef * logprob).sum(), logprob

    @staticmethod
    def backward(ctx, grad, _):                                                         # grad [] of the loss
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None                                        # scaled in place: no second copy of the weight's
        return (None if d_hidden is None else d_hidden.mul_(grad),
                None if d_weight is None else d_weight.mul_(grad).to(ctx.dtype), None, None, None)


def sum_rows(values, row, rows):
    """Sum packed per-token values by row: values [T], row [T] int64 -> [rows]. A response's log-prob from its tokens'.

    >>> sum_rows(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 1]), 2)
    tensor([-3., -4.])
    """
    return torch.zeros(rows, dtype=values.dtype, device=values.device).index_add(0, row, values)


# ---------------------------------------------------------------------------------------------------------------------
# losses: pure functions, elementwise on sequence log-ratios  log pi(y|x) - log pi_t(y|x),
# sums over the response's tokens


def sppo_loss(logratio, p, eta):
    """SPPO, equation (4.7): (log pi/pi_t - eta (P - 1/2))^2, for any response y and P = Phat(y > pi_t | x) in [0, 1].

    The 1/2 stands for log Z / eta: under pi_t the mean of P is 1/2 (P is constant-sum), so log Z ~ eta / 2 for small
    eta. p = 1 for the winner and 0 for the loser gives the "hard" form, whose targets are +-eta/2.

    >>> sppo_loss(torch.tensor([3.0, -5.0]), torch.tensor([0.75, 0.25]), eta=8.0)  # targets +2 and -2
    tensor([1., 9.])
    """
    return (logratio - eta * (p - 0.5)) ** 2


def dpo_loss(logratio_w, logratio_l, beta):
    """DPO (Rafailov et al. 2023, equation 7): -log sigmoid(beta (logratio_w - logratio_l)).

    >>> dpo_loss(torch.tensor([10.0]), torch.tensor([-10.0]), beta=0.05)           # -log sigmoid(1)
    tensor([0.3133])
    """
    return -torch.nn.functional.logsigmoid(beta * (logratio_w - logratio_l))


def ipo_loss(logratio_w, logratio_l, beta):
    """IPO (Azar et al. 2023, equation 17): (logratio_w - logratio_l - 1/(2 beta))^2.

    The SPPO paper's (4.14) writes (beta * difference - 1)^2, whose margin is 1/beta: twice this one at equal beta.

    >>> ipo_loss(torch.tensor([4.0]), torch.tensor([-3.0]), beta=0.1)              # margin 5
    tensor([4.])
    """
    return (logratio_w - logratio_l - 1 / (2 * beta)) ** 2


# ---------------------------------------------------------------------------------------------------------------------
# the update


class Optimizer:
    """AdamW or RMSProp on float32 master weights, with gradient clipping.

    A bfloat16 weight has 8 significant bits: 0.02 - 5e-7 is 0.02 again, and a run at the paper's learning rate would
    not move. So where the model is bfloat16 the optimizer owns float32 copies, updates those, and rounds them into the
    model; gradients too are summed over micro-batches and ranks in float32. Where the model is float32 the master is
    the weight itself.

    With several ranks each tensor has one owner (ZeRO, stage 1). Only the owner holds its master and inner state, which
    for RMSProp are 8 of the 14 bytes a parameter; it gets the mean of all ranks' gradients, does the update, and sends
    the new weight to all.
    """

    def __init__(self, parameters, name, weight_decay=0.0):
        self.parameters = list(parameters)
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.owner = shares([p.numel() for p in self.parameters], self.ranks)
        self.sums = [None] * len(self.parameters)           # float32 sums of bfloat16 gradients
        self.masters = {i: p if p.dtype == torch.float32 else p.detach().float()
                        for i, p in enumerate(self.parameters) if self.owner[i] == self.rank}
        kinds = {"adamw": lambda p: torch.optim.AdamW(p, lr=0.0, betas=(0.9, 0.98), weight_decay=weight_decay),
                 # foreach would need one more copy of all weights at a time
                 "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.0, weight_decay=weight_decay, foreach=False)}
        self.inner = kinds[name](list(self.masters.values()) or [torch.zeros(0)])   # torch refuses an empty list

    def collect(self):
        """Call after every backward: moves a bfloat16 gradient into its float32 sum."""
        for i, p in enumerate(self.parameters):
            if p.dtype != torch.float32 and p.grad is not None:
                self.sums[i] = p.grad.float() if self.sums[i] is None else self.sums[i].add_(p.grad)
                p.grad = None

    def step(self, lr, clip):
        """Clip the gradient to norm `clip`, update with learning rate `lr`, clear it.
        Returns the norm before clipping."""
        self.collect()
        for i, p in enumerate(self.parameters):
            gradient = p.grad if p.dtype == torch.float32 else self.sums[i]
            if self.ranks > 1:
                gradient = torch.zeros_like(p, dtype=torch.float32) if gradient is None else gradient
                dist.reduce(gradient, dst=self.owner[i])
                gradient /= self.ranks
            self.sums[i] = p.grad = None
            if i in self.masters:
                self.masters[i].grad = gradient
        masters = list(self.masters.values())
        norm = torch.nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None])
        if self.ranks > 1:
            square = norm.to(self.parameters[0].device) ** 2
            dist.all_reduce(square)
            norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(masters, clip or math.inf, norm)
        for group in self.inner.param_groups:
            group["lr"] = lr
        if math.isfinite(norm):
            self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        self._spread()
        return float(norm)

    @torch.no_grad()
    def _spread(self):
        """Every rank's model gets the masters' values."""
        for i, p in enumerate(self.parameters):
            if i in self.masters and self.masters[i] is not p:
                p.copy_(self.masters[i])
            if self.ranks > 1:
                dist.broadcast(p.data, src=self.owner[i])

    def state_dict(self):
        """This rank's share for --resume: the inner state, and the masters where they are not the weights."""
        return {"inner": self.inner.state_dict(),
                "masters": {i: None if m is self.parameters[i] else m for i, m in self.masters.items()}}

    @torch.no_grad()
    def load_state_dict(self, state):
        """The inverse of state_dict, on the same rank of as many."""
        self.inner.load_state_dict(state["inner"])
        for i, saved in state["masters"].items():
            if saved is not None:
                self.masters[i].copy_(saved)


def shares(sizes, ranks):
    """Who owns what: each item, the largest first, goes to the rank that has least. A list of ranks.

    >>> shares([5, 3, 9, 4], ranks=2)
    [1, 0, 0, 1]
    """
    owner, load = [0] * len(sizes), [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = load.index(min(load))
        load[owner[i]] += sizes[i]
    return owner


def linear_schedule(step, steps, warmup, lr):
    """Learning rate of step 0..steps-1: up linearly over the first `warmup` share of the steps, then linearly to 0.

    >>> [linear_schedule(i, 10, 0.2, 1.0) for i in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    rise = max(1, round(warmup * steps))
    return lr * ((step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise))


# ---------------------------------------------------------------------------------------------------------------------
# check, then time:  python kernels.py [--tokens 512] [--hidden 2048] [--vocab 128256] [--dtype float32]


def _peak_megabytes(function, device):
    """Peak memory above what was held before the call, in MB (2**20 bytes). Linux for the CPU; NaN elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

    try:
        ctypes.CDLL(None).malloc_trim(0)                 # freed blocks that the allocator kept would hide the peak
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")                              # resets the high-water mark VmHWM to the present size
        before = status("VmRSS")
    except (OSError, AttributeError):
        function()
        return math.nan
    function()
    return status("VmHWM") - before


def _seconds(function, device):
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _check(device):
    """Values and gradients against float64, at sizes that do not divide the tiles; hot logits as in a trained model."""
    generator = torch.Generator().manual_seed(0)
    T, H, V = CHUNK_T + 37, 64, 2 * CHUNK_V + 5
    draw = [torch.randn(T, H, generator=generator), torch.randn(V, H, generator=generator) * 0.5]
    target = torch.randint(V, (T,), generator=generator).to(device)
    target[0], target[1] = 0, V - 1
    coefficient = torch.randn(T, generator=generator).to(device)
    exact = [x.to(device, torch.float64).requires_grad_() for x in draw]
    want = (exact[0] @ exact[1].T).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    (want * coefficient).sum().backward()

    def plain(hidden, weight):
        got = linear_logprob(hidden, weight, target)
        (got * coefficient).sum().backward()
        return got

    def one_pass(hidden, weight):
        loss, got = linear_policy_loss(hidden, weight, target, coefficient)
        loss.backward()
        return got

    for dtype, bound, function, name in ((d, b, f, n) for d, b in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2))
                                         for f, n in ((plain, "linear_logprob"), (one_pass, "linear_policy_loss"))):
        mine = [x.to(device, dtype, copy=True).requires_grad_() for x in draw]
        got = function(*mine)
        errors = [float((a.detach().double() - b.detach()).norm() / b.detach().norm())
                  for a, b in ((got, want), (mine[0].grad, exact[0].grad), (mine[1].grad, exact[1].grad))]
        ok = all(e < bound for e in errors)              # a NaN fails this comparison
        print(f"{'ok' if ok else 'WRONG'}  {name:18s} {str(dtype)[6:]:9s} relative error against float64: value "
              f"{errors[0]:.1e}, "
              f"d hidden {errors[1]:.1e}, d weight {errors[2]:.1e} (bound {bound:.0e})")
        if not ok:
            sys.exit(1)


def _time(T, H, V, dtype, device):
    """Seconds and peak memory of forward + backward and of forward alone, as ratios to the bare matrix products."""
    torch.manual_seed(0)
    hidden = torch.randn(T, H, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, device=device) * H**-0.5).to(dtype).requires_grad_()
    target = torch.randint(V, (T,), device=device)
    grad_logits, coef = torch.randn(T, V, device=device).to(dtype), torch.randn(T, device=device)

    def both(function):
        def call():
            hidden.grad = weight.grad = None
            function(hidden, weight, target).sum().backward()
        return call

    def one_way(function):
        def call():
            with torch.no_grad():
                function(hidden, weight, target)
        return call

    def one_product():
        with torch.no_grad():
            hidden @ weight.T

    def three_products():
        one_product()
        with torch.no_grad():
            grad_logits @ weight
            grad_logits.T @ hidden

    def torch_builtin(h, w, t):  # torch >= 2.13
        return -torch.nn.functional.linear_cross_entropy(h, w, t, reduction="none").float()

    peers = [("linear_logprob", linear_logprob), ("reference", linear_logprob_reference)]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        peers.append(("torch linear_cross_entropy", torch_builtin))
    print(f"\n{device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, T {T}, H {H}, V {V}; "
          f"d weight alone is {weight.numel() * weight.element_size() / 2**20:.0f} MB; median of 3 interleaved rounds")
    for title, floor, wrap in (("forward + backward", three_products, both), ("forward only", one_product, one_way)):
        calls = {"bare matrix products": floor} | {name: wrap(function) for name, function in peers}
        if wrap is both:
            calls["linear_policy_loss"] = both(lambda h, w, t: linear_policy_loss(h, w, t, coef)[0])
        peaks, rounds = {}, {name: [] for name in calls}
        for name, call in calls.items():
            hidden.grad = weight.grad = None
            peaks[name] = _peak_megabytes(call, device)          # this first call is the warm-up, too
        for _ in range(3):                                       # interleaved: a slow minute hits every contestant
            for name, call in calls.items():
                rounds[name].append(_seconds(call, device))
        median = {name: sorted(times)[1] for name, times in rounds.items()}
        print(f"{title + ':':28s} {'seconds':>8s} {'x floor':>8s} {'peak MB':>8s}")
        for name, seconds in median.items():
            print(f"  {name:26s} {seconds:8.2f} {seconds / median['bare matrix products']:8.2f} {peaks[name]:8.0f}")


if __name__ == "__main__":
    import dataclasses

    import run

    @dataclasses.dataclass
    class Settings:
        tokens: int = run.flag(512, "T, tokens scored in one call")
        hidden: int = run.flag(2048, "H, hidden size (Llama-3.2-1B: 2048)")
        vocab: int = run.flag(128256, "V, vocabulary (Llama 3: 128256)")
        device: str = run.flag("auto", "cuda, mps or cpu", None)
        dtype: str = run.flag("auto", "float32 or bfloat16", ("auto", "float32", "bfloat16"))

    def main(argv):
        settings = run.parse(Settings, argv, "check linear_logprob against float64, then time it")
        device, dtype = run.device_and_dtype(settings.device, settings.dtype)
        _check(device)
        _time(settings.tokens, settings.hidden, settings.vocab, dtype, device)

    run.main(main)
