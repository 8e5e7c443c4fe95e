"""kernels.py: linear_logprob against float64, the losses by hand, the optimizer against torch's own.

Tiles are made tiny, so that a few dozen tokens cross many of them. Errors are relative, in the 2-norm over the whole
tensor, against float64 arithmetic on the very same (already rounded) inputs.
"""

import copy
import doctest
import io
import math
import sys
import types

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import kernels

CHUNK_T, CHUNK_V = 8, 16
SOFTCAPS = [None, 3.0]  # the logits drawn below have a standard deviation of 3.5
SIZES = [(21, 50), (16, 48), (8, 16), (3, 17), (9, 5), (1, 1)]  # T, V: multiples of a tile, larger, smaller


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_T", CHUNK_T)
    monkeypatch.setattr(kernels, "CHUNK_V", CHUNK_V)


def test_doctests():
    result = doctest.testmod(kernels)
    assert result.failed == 0 and result.attempted >= 6


# ---------------------------------------------------------------------------------------------------------------------
# linear_logprob


def draw(T, V, dtype=torch.float32, H=12, scale=1.0):
    """hidden [T, H], weight [V, H], target [T] on every tile border, and the coefficient of each token in the loss."""
    g = torch.Generator().manual_seed(T * V)
    hidden = (torch.randn(T, H, generator=g) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    borders = [b for b in (0, V - 1, CHUNK_V - 1, CHUNK_V, 2 * CHUNK_V - 1, 2 * CHUNK_V) if b < V]
    target = torch.randint(V, (T,), generator=g)
    target[:len(borders)] = torch.tensor(borders)[:T]
    return hidden, weight, target, torch.randn(T, generator=g)


def value_and_gradients(function, hidden, weight, target, coefficient, softcap=None):
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    value = function(hidden, weight, target, softcap)
    (value * coefficient).sum().backward()
    return value.detach(), hidden.grad, weight.grad


def exact(hidden, weight, target, coefficient, softcap=None):
    def definition(h, w, t, softcap):
        logits = h @ w.T if softcap is None else softcap * torch.tanh(h @ w.T / softcap)
        return logits.log_softmax(-1).gather(-1, t[:, None]).squeeze(-1)

    hidden, weight, coefficient = (x.detach().double() for x in (hidden, weight, coefficient))
    return value_and_gradients(definition, hidden, weight, target, coefficient, softcap)


def error(got, want):
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-6))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("T, V", SIZES)
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_values_and_gradients(small_tiles, softcap, T, V, dtype, bound):
    inputs = *draw(T, V, dtype), softcap
    got = value_and_gradients(kernels.linear_logprob, *inputs)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    for mine, want in zip(got, exact(*inputs)):
        assert mine.shape == want.shape and error(mine, want) < bound


@pytest.mark.parametrize("T, V", SIZES)
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_equals_the_reference(small_tiles, softcap, T, V):
    inputs = *draw(T, V), softcap
    want = value_and_gradients(kernels.linear_logprob_reference, *inputs)
    for mine, other in zip(value_and_gradients(kernels.linear_logprob, *inputs), want):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_default_tiles_too(softcap):
    """The tiles that users run with, crossed once in each direction."""
    inputs = *draw(kernels.CHUNK_T + 3, kernels.CHUNK_V + 5, H=4), softcap
    for mine, want in zip(value_and_gradients(kernels.linear_logprob, *inputs), exact(*inputs)):
        assert error(mine, want) < 1e-5


def test_bfloat16_error_does_not_grow_with_the_number_of_tiles(monkeypatch):
    """Guards against a gradient of hidden that is accumulated in bfloat16: 128 roundings of a running sum, not one."""
    inputs = draw(16, 2048, torch.bfloat16)
    want = exact(*inputs)[1]
    errors = []
    for chunk in (2048, 16):
        monkeypatch.setattr(kernels, "CHUNK_V", chunk)
        errors.append(error(value_and_gradients(kernels.linear_logprob, *inputs)[1], want))
    assert errors[1] < 1.2 * errors[0] < 1e-2


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_gradients_equal_finite_differences(small_tiles, softcap):
    """Independent of autograd's formulas. Float32 inside: a step of 1e-2 leaves 1e-4 of curvature, 1e-5 of rounding."""
    hidden, weight, target, _ = draw(9, 17, torch.float64, H=3)

    def function(h, w):
        return kernels.linear_logprob(h, w, target, softcap)

    assert torch.autograd.gradcheck(function, (hidden, weight), eps=1e-2, atol=1e-3)


@pytest.mark.parametrize("only", ["hidden", "weight"])
def test_gradient_of_one_side_only(small_tiles, only):
    """A frozen head, or frozen layers below it: the other side's gradient is the same."""
    hidden, weight, target, coefficient = draw(21, 50)
    _, d_hidden, d_weight = value_and_gradients(kernels.linear_logprob, hidden, weight, target, coefficient)
    hidden.requires_grad_(only == "hidden")
    weight.requires_grad_(only == "weight")
    (kernels.linear_logprob(hidden, weight, target) * coefficient).sum().backward()
    assert (hidden.grad is None) == (only == "weight") and (weight.grad is None) == (only == "hidden")
    torch.testing.assert_close(*((hidden.grad, d_hidden) if only == "hidden" else (weight.grad, d_weight)))


def test_no_tokens_give_a_zero_gradient(small_tiles):
    """Guards against an uninitialised gradient: a batch whose responses are all empty must not move the head."""
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN, so that unwritten places show
    try:
        for dtype in (torch.float32, torch.bfloat16):
            hidden, weight, target, coefficient = draw(0, 50, dtype)
            value, d_hidden, d_weight = value_and_gradients(kernels.linear_logprob, hidden, weight, target, coefficient)
            assert value.shape == (0,) and d_hidden.shape == hidden.shape
            assert d_weight.count_nonzero() == 0
    finally:
        torch.use_deterministic_algorithms(False)


def test_extreme_logits_stay_finite(small_tiles):
    """Logits up to a few 1e5 either way: exp would overflow in any dtype without subtracting the maximum first."""
    inputs = draw(21, 50, scale=3e4)
    assert (inputs[0] @ inputs[1].T).abs().max() > 1e5
    for mine, want in zip(value_and_gradients(kernels.linear_logprob, *inputs), exact(*inputs)):
        assert mine.isfinite().all() and error(mine, want) < 1e-4


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor has that any operation returns, views and temporaries included."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max([self.elements] + [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)])
        return out


def test_a_softcap_that_saturates(small_tiles):
    """Logits of 1e5 are all at the cap: nothing overflows, and no gradient is left."""
    inputs = draw(21, 50, scale=3e4)
    value, d_hidden, d_weight = value_and_gradients(kernels.linear_logprob, *inputs, 3.0)
    assert error(value, exact(*inputs, 3.0)[0]) < 1e-5
    assert d_hidden.isfinite().all() and d_weight.isfinite().all()
    assert kernels.soft_cap(inputs[0] @ inputs[1].T, 3.0).abs().max() <= 3.0


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_more_than_a_tile_of_logits(small_tiles, dtype, softcap):
    """The file's reason to exist. The same recorder sees the reference exceed the bound, so it is not blind."""
    T, V, H = 64, 512, 1  # T x CHUNK_V and CHUNK_T x V are over the bound as well
    largest = {}
    for function in (kernels.linear_logprob, kernels.linear_logprob_reference):
        with LargestTensor() as largest[function]:
            value_and_gradients(function, *draw(T, V, dtype, H), softcap)
    assert largest[kernels.linear_logprob].elements <= max(CHUNK_T * CHUNK_V, T * H, V * H) < T * V
    assert largest[kernels.linear_logprob_reference].elements >= T * V


# ---------------------------------------------------------------------------------------------------------------------
# what works on a tile, and what CUDA chooses; emulated here


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_softmax_or_two(dtype, softcap):
    """`logprob_and_gradient_` is `statistics`, then `gradient_`, also for a target in the first or last column."""
    hidden, weight, target, coef = draw(21, 50, dtype)
    logits = (hidden @ weight.T).detach()
    lse, picked = kernels.statistics(logits.clone(), target, softcap)
    twice, once = logits.clone(), logits.clone()
    kernels.gradient_(twice, target, lse, coef, softcap)
    logprob = kernels.logprob_and_gradient_(once, target, coef, softcap)
    torch.testing.assert_close(picked - lse, logprob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(twice, once, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 1e-2)
    assert not torch.equal(once, logits)


def test_a_target_outside_its_tile():
    """It has no logit there and no onehot, left or right of the tile."""
    logits, lse, coef = torch.zeros(2, 4), torch.full((2,), math.log(8.0)), torch.tensor([1.0, 2.0])
    part, picked = kernels.statistics(logits.clone(), torch.tensor([-1, 4]), None)
    assert picked.tolist() == [0.0, 0.0] and part.exp().tolist() == pytest.approx([4.0, 4.0])
    kernels.gradient_(logits, torch.tensor([-1, 4]), lse, coef, None)
    torch.testing.assert_close(logits, torch.tensor([[-1 / 8] * 4, [-1 / 4] * 4]))


def test_tile_sizes_by_device(small_tiles, monkeypatch):
    """A CPU has the constants, whatever they are set to; CUDA has larger tiles, in multiples of 128 tokens."""
    monkeypatch.setattr(kernels, "POLICY_TILE", 700)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert kernels.tile_sizes(cpu, 101) == (CHUNK_T, CHUNK_V, 6) and kernels.tile_sizes(cpu, 701)[2] == 1
    for vocab in (1, 32000, 128256, 151936, 262144, 2**25):
        chunk_t, chunk_v, tokens = kernels.tile_sizes(cuda, vocab)
        assert (chunk_t, chunk_v) == (4096, 16384) and tokens % 128 == 0 and tokens >= 128
        assert tokens == 128 or tokens * vocab <= 2**28 < (tokens + 128) * vocab


def test_who_works_on_a_tile(monkeypatch):
    """On a CPU plain torch, even where Triton may be used; on CUDA kernels_triton where it works."""
    triton = types.ModuleType("kernels_triton")
    monkeypatch.setitem(sys.modules, "kernels_triton", triton)
    for allowed, works, on_cuda in ((True, True, triton), (True, False, kernels.PLAIN), (False, True, kernels.PLAIN)):
        monkeypatch.setattr(kernels, "TRITON", allowed)
        monkeypatch.setattr(kernels, "_triton_works", lambda device: works)
        assert kernels.tile_functions(torch.device("cpu")) is kernels.PLAIN
        assert kernels.tile_functions(torch.device("cuda")) is on_cuda


def test_triton_without_a_compiler_is_told_once(monkeypatch, capsys):
    def statistics(logits, target, softcap):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setitem(sys.modules, "kernels_triton", types.SimpleNamespace(statistics=statistics))
    kernels._triton_works.cache_clear()
    assert not kernels._triton_works(torch.device("cpu")) and not kernels._triton_works(torch.device("cpu"))
    assert capsys.readouterr().out.count("Triton does not work here") == 1
    monkeypatch.setitem(sys.modules, "kernels_triton", kernels.PLAIN)
    kernels._triton_works.cache_clear()
    assert kernels._triton_works(torch.device("cpu"))
    kernels._triton_works.cache_clear()


@pytest.mark.parametrize("masked", [True, False])
def test_attention_takes_results_in_cudas_layout(masked, monkeypatch):
    """CUDA's kernels return [R, Q, heads, hd] with two dimensions swapped, where a CPU's are contiguous."""
    real, at = torch.nn.functional.scaled_dot_product_attention, torch.arange(5)[None]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 5, heads, 8, generator=generator) for heads in (4, 2, 2))
    mask = kernels.attention_mask(at, at, None, 2, torch.float32) if masked else None
    want = kernels.attention(q, k, v, mask)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *args, **options: real(*args, **options).transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(kernels.attention(q, k, v, mask), want)


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_the_chosen_functions_do_the_work(small_tiles, softcap):
    """Forward and backward both call the functions of `tile`, on every tile, and nothing else looks at the logits."""
    calls = []

    def counted(name):
        def call(*arguments):
            calls.append(name)
            return getattr(kernels, name)(*arguments)
        return call

    tile = types.SimpleNamespace(**{name: counted(name) for name in vars(kernels.PLAIN)})
    inputs = *draw(21, 50), softcap                             # 3 x 4 tiles
    mine = value_and_gradients(lambda *arguments: kernels.linear_logprob(*arguments, tile), *inputs)
    assert calls == ["statistics"] * 12 + ["gradient_"] * 12
    assert all(torch.equal(a, b) for a, b in zip(mine, value_and_gradients(kernels.linear_logprob, *inputs)))
    calls.clear()
    hidden, weight, target, coef = draw(21, 50)
    kernels.linear_policy_loss(hidden, weight, target, coef, softcap, tile)
    assert calls == ["logprob_and_gradient_"]


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""
    device = torch.device("cuda")


def addmm_with_out_dtype(out, a, b, *, beta=1, out_dtype):
    """What torch.addmm does on CUDA where it has out_dtype, into a plain tensor: float32 throughout."""
    assert out.dtype == out_dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
    return a.float() @ b.float() + (beta * out if beta else 0)


def test_cuda_sums_bfloat16_products_in_float32(monkeypatch):
    """Emulated: 64 products of 16 terms added up. A product that is rounded to bfloat16 first costs three digits."""
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 16, 16, generator=g).bfloat16() for _ in range(64)]
    want = sum(a.double() @ b.double() for a, b in parts)

    def total(wrap):
        out = torch.full((16, 16), math.nan)                    # the first product must not look at what is there
        for i, (a, b) in enumerate(parts):
            kernels._add_product(out, wrap(a), wrap(b), fresh=i == 0)
        return error(out, want)

    monkeypatch.setattr(torch, "addmm", lambda *a, out, **k: out.copy_(addmm_with_out_dtype(*a, **k)))
    monkeypatch.setattr(kernels, "_sums_in_float32", lambda device, dtype: device.type == "cuda")
    on_cpu = total(lambda x: x)
    assert total(lambda x: x.as_subclass(OnCuda)) < 1e-6 < 1e-3 < on_cpu
    monkeypatch.setattr(kernels, "_sums_in_float32", lambda device, dtype: False)
    assert total(lambda x: x.as_subclass(OnCuda)) == on_cpu     # an older torch: as on a CPU


@pytest.mark.parametrize("does, works", [
    (lambda *a, out, **k: out.copy_(addmm_with_out_dtype(*a, **k)), True),
    (lambda out, *a, **k: out, False)], ids=["it works", "it leaves the sum as it was"])
def test_out_dtype_is_tried(monkeypatch, does, works):
    monkeypatch.setattr(torch, "addmm", does)
    assert kernels._sums_in_float32.__wrapped__(torch.device("cpu"), torch.bfloat16) is works


@pytest.mark.parametrize("says", [TypeError("unexpected out_dtype"), NotImplementedError("no kernel")])
def test_a_torch_without_out_dtype(monkeypatch, says):
    def refuses(*arguments, **options):
        raise says

    monkeypatch.setattr(torch, "addmm", refuses)
    assert kernels._sums_in_float32.__wrapped__(torch.device("cpu"), torch.bfloat16) is False


def test_sum_rows():
    """Tokens of a row need not be neighbours; a row without tokens is 0; the gradient goes back to each token."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = kernels.sum_rows(values, torch.tensor([2, 0, 2, 0]), 4)
    assert sums.tolist() == [10.0, 0.0, 5.0, 0.0]
    (sums * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert values.grad.tolist() == [100.0, 1.0, 100.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# RoPE's angles, against transformers' own

STRETCH = dict(rope_theta=10000.0, factor=4.0, original_max_position_embeddings=512)
ROPES = [
    dict(rope_type="linear", rope_theta=500.0, factor=3.0),
    dict(STRETCH, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0),
    dict(STRETCH, rope_type="yarn"),
    dict(STRETCH, rope_type="yarn", rope_theta=5000000.0, factor=2.0, original_max_position_embeddings=65536),
    dict(STRETCH, rope_type="yarn", truncate=False),
    dict(STRETCH, rope_type="yarn", beta_fast=16.0, beta_slow=2.0),
    dict(STRETCH, rope_type="yarn", beta_fast=None, beta_slow=None, attention_factor=None),
    dict(STRETCH, rope_type="yarn", attention_factor=1.5, mscale=2.0, mscale_all_dim=1.0),
    dict(STRETCH, rope_type="yarn", factor=40.0, mscale=0.707, mscale_all_dim=1.0),
    dict(STRETCH, rope_type="yarn", mscale=0.707),                              # alone it counts for nothing
    dict(STRETCH, rope_type="yarn", factor=1.0),
    dict(STRETCH, rope_type="yarn", beta_fast=3.0, beta_slow=3.0, truncate=False),      # a step, no ramp
    dict(STRETCH, rope_type="yarn", original_max_position_embeddings=2),        # the ramp ends before it begins
]


@pytest.mark.parametrize("head_dim", [8, 48, 128])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: ", ".join(f"{key}={value}" for key, value in rope.items()))
def test_rope_frequencies_are_transformers(rope, head_dim):
    config = transformers.LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=2048,
                                      rope_parameters=dict(rope))
    want, want_scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    inverse, scale = kernels.rope_frequencies(rope, head_dim)
    assert inverse.shape == (head_dim // 2,) and inverse.dtype == torch.float32
    torch.testing.assert_close(inverse, want, atol=0, rtol=1e-5)
    assert scale == pytest.approx(want_scale, abs=1e-12)


def test_rope_scaling_slows_the_slow_pairs_alone():
    plain, scale = kernels.rope_frequencies(dict(rope_type="default", rope_theta=10000.0), 128)
    assert plain[0] == 1 and scale == 1.0 and torch.equal(plain, plain.sort(descending=True).values)
    slower = kernels.rope_frequencies(ROPES[2], 128)[0] / plain
    assert slower[0] == 1 and slower[-1] == pytest.approx(1 / 4) and (slower.diff() <= 1e-6).all()


# ---------------------------------------------------------------------------------------------------------------------
# losses


def test_sppo_loss_by_hand():
    logratio = torch.tensor([120.0, -30.0, 0.0], requires_grad=True)
    p = torch.tensor([0.6, 0.45, 0.5])  # with eta = 1000 the targets are 100, -50, 0
    loss = kernels.sppo_loss(logratio, p, 1000.0)
    torch.testing.assert_close(loss, torch.tensor([400.0, 400.0, 0.0]), rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    torch.testing.assert_close(logratio.grad, torch.tensor([40.0, 40.0, 0.0]), rtol=1e-5, atol=1e-5)  # 2 x the distance


def test_sppo_hard_is_p_one_and_zero():
    """The "hard" form has targets +-eta/2: with eta = 8, a winner at 3 is 1 off its 4, a loser at -1 3 off its -4."""
    assert kernels.sppo_loss(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.0]), 8.0).tolist() == [1.0, 9.0]


def test_minimiser_is_the_multiplicative_weights_update():
    """Equation (4.7) solved over a whole table gives (4.1), pi_t exp(eta P) / Z.

    Putting eta/2 for log Z costs eta^2 Var(P)/2, here 5e-6 of log-probability; forgetting the 1/2 altogether would cost
    over 1e-4, and the update itself moves log-probabilities by more than 5e-3.
    """
    eta = 0.05
    P = torch.tensor([[0.5, 0.9, 0.3], [0.1, 0.5, 0.8], [0.7, 0.2, 0.5]], dtype=torch.float64)  # beats in a circle
    pi_t = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p = P @ pi_t
    want = (pi_t.log() + eta * p).log_softmax(0)
    logits = pi_t.log().requires_grad_()
    inner = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-14, tolerance_change=0,
                              line_search_fn="strong_wolfe")

    def closure():
        inner.zero_grad()
        loss = (pi_t * kernels.sppo_loss(logits.log_softmax(0) - pi_t.log(), p, eta)).sum()  # all y ~ pi_t
        loss.backward()
        return loss

    inner.step(closure)
    assert (logits.log_softmax(0) - want).abs().max() < 1e-5 < 5e-3 < (want - pi_t.log()).abs().max()


def test_dpo_loss_by_hand():
    """-log sigmoid(0) = log 2; far on the wrong side the margin itself, not infinity; only the difference counts."""
    w, l = torch.tensor([0.0, -5e4, 7.0]), torch.tensor([0.0, 5e4, 7.0 - math.log(3) * 10])
    loss = kernels.dpo_loss(w, l, 0.1)
    torch.testing.assert_close(loss, torch.tensor([math.log(2), 1e4, math.log(4 / 3)]))


def test_ipo_margin_is_half_the_inverse_of_beta():
    """Zero at 1/(2 beta) (Azar et al.), not at the 1/beta of the SPPO paper's (4.14)."""
    difference = torch.tensor([2.5, 5.0], requires_grad=True)  # beta 0.2: margin 2.5
    loss = kernels.ipo_loss(difference + 1, torch.ones(2), 0.2)
    assert loss.tolist() == [0.0, 6.25]
    loss.sum().backward()
    assert difference.grad.tolist() == [0.0, 5.0]


# ---------------------------------------------------------------------------------------------------------------------
# the update


def test_bfloat16_weights_move_at_the_papers_learning_rate():
    """0.02 - 5e-7 is 0.02 in bfloat16: without float32 masters 400 steps change nothing, with them they
    add up to 2e-4."""
    plain, mine = (torch.nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16)) for _ in range(2))
    before = plain.detach().clone()
    naive, optimizer = torch.optim.AdamW([plain], lr=5e-7, weight_decay=0.0), kernels.Optimizer([mine], "adamw")
    for _ in range(400):
        plain.grad = torch.ones_like(plain)
        mine.sum().backward()                   # a gradient of ones
        naive.step()
        optimizer.step(lr=5e-7, clip=0.0)
    assert torch.equal(plain, before)
    assert mine.dtype == torch.bfloat16 and mine.grad is None
    torch.testing.assert_close(before.float() - optimizer.masters[0], torch.full((4,), 2e-4), rtol=1e-2, atol=0)
    moved = before.float() - mine.float()
    torch.testing.assert_close(moved, torch.full((4,), 2e-4), rtol=0, atol=7e-5)  # half a step of bfloat16


def parameters(dtype):
    g = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in ((5, 3), (7,))]


def give_gradients(weights, step):
    g = torch.Generator().manual_seed(step)
    for w in weights:
        w.grad = None
        (w * torch.randn(w.shape, generator=g).to(w.dtype)).sum().backward()


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_float32_is_torchs_own_optimizer_to_the_bit(name):
    mine, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = kernels.Optimizer(mine, name, weight_decay=0.1)
    reference = (torch.optim.AdamW(theirs, betas=(0.9, 0.98), weight_decay=0.1) if name == "adamw" else
                 torch.optim.RMSprop(theirs, weight_decay=0.1))
    for step, lr in enumerate((1e-2, 3e-3, 0.0, 1e-3)):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        reference.param_groups[0]["lr"] = lr
        want = torch.nn.utils.clip_grad_norm_(theirs, 1.5)
        reference.step()
        assert optimizer.step(lr, clip=1.5) == float(want)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
        assert all(w.grad is None for w in mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_a_saved_state_goes_on_bit_for_bit(name, dtype):
    """Guards against a resume from rounded weights: in bfloat16 the masters hold what the weights cannot."""
    weights = parameters(dtype)
    optimizer = kernels.Optimizer(weights, name)
    for step in range(3):
        give_gradients(weights, step)
        optimizer.step(1e-4, clip=1.0)
    file = io.BytesIO()
    torch.save(optimizer.tensors(), file)
    file.seek(0)
    again = parameters(dtype)
    resumed = kernels.Optimizer(again, name)
    saved = torch.load(file, weights_only=True)
    assert resumed.tensors().keys() == saved.keys()
    for key, tensor in resumed.tensors().items():
        tensor.copy_(saved[key])
    resumed.round()
    assert all(torch.equal(a, b) for a, b in zip(weights, again))
    for step in range(3, 6):
        give_gradients(weights, step)
        give_gradients(again, step)
        assert optimizer.step(1e-4, clip=1.0) == resumed.step(1e-4, clip=1.0)
    assert all(torch.equal(a, b) for a, b in zip(
        [*weights, *optimizer.masters], [*again, *resumed.masters]))


@pytest.mark.parametrize("clip, kept", [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])])  # 0 = no clipping
def test_clip_scales_the_gradient_and_returns_the_norm_before(clip, kept):
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = kernels.Optimizer([w], "rmsprop")
    w.grad = torch.tensor([3.0, 4.0])
    assert optimizer.step(0.0, clip) == 5.0
    used = (optimizer.inner.state[w]["square_avg"] / 0.01).sqrt()  # RMSProp's first average is 0.01 times the square
    assert used.tolist() == pytest.approx(kept, rel=1e-5)


def test_linear_schedule():
    rates = [kernels.linear_schedule(i, 100, 0.1, 2.0) for i in range(100)]
    assert max(rates) == 2.0 and min(rates) > 0  # no step is wasted at rate 0
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10:] == pytest.approx([2.0 * (90 - i) / 90 for i in range(90)])
    assert [kernels.linear_schedule(i, 4, 0.0, 1.0) for i in range(4)] == [1.0, 1.0, 2 / 3, 1 / 3]
    assert kernels.linear_schedule(0, 1, 0.1, 1.0) == 1.0


def test_eighteen_epochs_scheduled_one_trained():
    """The SPPO paper's schedule, stopped after epoch 1 of 18, ends still warming up at 1/1.8 of the peak."""
    assert kernels.linear_schedule(99, 1800, 0.1, 1.0) == pytest.approx(1 / 1.8)


def test_bfloat16_gradients_are_summed_in_float32():
    """64 micro-batches whose gradients are 1, then one of 1/4: a bfloat16 sum loses the last (64.25 is 64 again)."""
    w = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    optimizer = kernels.Optimizer([w], "rmsprop")
    for coefficient in [1.0] * 64 + [0.25]:
        (coefficient * w).sum().backward()
        assert w.grad is None                   # it has gone into the sum: no second set is held
    assert optimizer.step(0.0, clip=0.0) == pytest.approx(64.25 * 3**0.5, rel=1e-6)
    assert torch.tensor(64.0, dtype=torch.bfloat16) + 0.25 == 64.0


def test_a_gradient_that_is_not_finite_moves_nothing():
    w = torch.ones(2, requires_grad=True)
    optimizer = kernels.Optimizer([w], "adamw")
    (w * torch.tensor([1.0, torch.inf])).sum().backward()
    assert not optimizer.step(0.1, clip=1.0) < torch.inf and w.tolist() == [1.0, 1.0]
