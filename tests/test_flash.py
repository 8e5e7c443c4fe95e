"""Attention without masks and CUDA graphs, shown without a GPU: FlashPrefix and FlashCache against SharedPrefix and
KVCache, with `model.varlen` written out as a loop over rows; recorded decoding steps, with a graph that replays
operations on the CPU; the nucleus by bisection against the sort."""

import collections
import contextlib
import types
from typing import Optional

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
import model
import rollout
from checkpoints import Config

V = 61
SIZE = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
            max_positions=128)
WINDOWS = (None, 4, 4)
NETS = {
    "grouped queries": {},
    "windows": dict(windows=WINDOWS),
    "one key head, no RoPE in layer 1, a window there": dict(num_kv_heads=1, rotated=(True, False, True),
                                                             windows=(None, 3, None)),
    "as many key heads, a scale, window of 1": dict(num_kv_heads=4, attention_scale=0.5, windows=(1, None, 2)),
}
PROMPTS = [[5, 9, 33, 7, 60, 2, 18, 4, 4, 51, 12, 40], [6], [8, 1, 55], [3, 3, 29, 30, 31, 8, 8, 17]]
RESPONSES = [[[7], [20, 21, 22, 23, 24, 25, 26], [9, 2]], [[11, 12], [13, 14, 15, 2]], [], [[44, 2], []]]


def random_net(**traits):
    """A net as unsure as a trained one at temperature 1: its logits' standard deviation is about 1.5."""
    net = model.Transformer(Config(**{**SIZE, **traits})).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.head.weight *= 1.5
    return net


@pytest.fixture(params=NETS)
def net(request):
    return random_net(**NETS[request.param])


def loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts_q: torch.Tensor, starts_k: torch.Tensor,
         longest_q: int, longest_k: int, window: Optional[int] = None, scale: Optional[float] = None,
         used_k: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`model.varlen` by its description, row by row, with the demands of the kernel on its arguments."""
    assert starts_q.dtype == starts_k.dtype == torch.int32 and len(starts_q) == len(starts_k)
    assert used_k is None or used_k.dtype == torch.int32 and len(used_k) == len(starts_k) - 1
    assert int(starts_q[-1]) == len(q) and int(starts_k[-1]) <= len(k) and len(k) == len(v)
    out = []
    for r in range(len(starts_q) - 1):
        queries, keys = slice(*starts_q[r:r + 2].tolist()), slice(*starts_k[r:r + 2].tolist())
        if used_k is not None:
            assert queries.stop - queries.start == 1 and 0 < used_k[r] <= keys.stop - keys.start
            keys = slice(keys.start, keys.start + int(used_k[r]))
        T, S = queries.stop - queries.start, keys.stop - keys.start
        assert 0 < T <= longest_q and T <= S <= longest_k
        at = torch.arange(S)
        hidden = at > at[S - T:, None]
        if window is not None:
            hidden |= at <= at[S - T:, None] - window
        groups = q.shape[1] // k.shape[1]
        mine, theirs = (x[keys].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q[queries], mine) * (q.shape[-1] ** -0.5 if scale is None else scale)
        out.append(torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), theirs))
    return torch.cat(out)


varlen_operator = torch.library.custom_op("test_flash::varlen", loop, mutates_args=())      # one operation to a graph


@pytest.fixture
def flash(monkeypatch):
    """A function: from its call on all nets are served without masks."""
    def switch(varlen=loop):
        monkeypatch.setattr(model, "varlen", varlen)
        monkeypatch.setattr(model, "flash_serves", lambda net: True)
    return switch


# ---------------------------------------------------------------------------------------------------------------------
# training and prefill


@pytest.mark.parametrize("prompts, responses", [(PROMPTS, RESPONSES), (PROMPTS[:1], [[[4] * 9]]), (PROMPTS, [[]] * 4)],
                         ids=["ragged", "one row", "no response"])
def test_logprobs_and_gradients_equal_those_through_masks(net, flash, prompts, responses):
    net.activation_checkpointing, found = len(prompts) == 1, []
    for switch in (lambda: None, flash):
        switch()
        logprob, row, rows = model.response_logprobs(net, prompts, responses)
        view = model.shared_prefix(net, prompts, responses)
        hidden = net(view.tokens, view)
        loss = (logprob * torch.linspace(-1, 1, len(logprob))).sum() + hidden.square().mean()
        found.append([logprob, hidden, row, *torch.autograd.grad(loss, list(net.parameters()))])
        assert rows == sum(map(bool, sum(responses, [])))
    assert isinstance(view, model.FlashPrefix)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_the_example_of_the_docstring():
    view = model.FlashPrefix([[1, 2, 3], [4, 5]], [[[6, 7], [8]], [[9, 10, 11]]], "cpu")
    assert view.keys.tolist() == [0, 1, 2, 5, 6, 0, 1, 2, 7, 3, 4, 8, 9, 10]
    assert [each.tolist() for each in view.begin] == [[0, 3, 5], [0, 2, 3, 6], [0, 5, 9, 14]]
    assert view.longest == [3, 3, 5] and view.parts == []


@torch.no_grad()
def test_no_mask_is_built(flash, monkeypatch):
    net = random_net(windows=WINDOWS)
    flash()
    monkeypatch.setattr(model.kernels, "attention_mask", None)
    model.response_logprobs(net, PROMPTS, RESPONSES)
    rollout.generate(net, PROMPTS, 2, 4)


@torch.no_grad()
@pytest.mark.parametrize("common", [0, 40])
def test_prefill(net, flash, common):
    """Hidden states, and what is kept for the cache; where all prompts begin alike, that beginning is computed once."""
    prompts = [[3 + i % 7 for i in range(common)] + prompt for prompt in PROMPTS]
    (want, hidden), _ = model.prefill(net, prompts, keep_kv=True), flash()
    got, mine = model.prefill(net, prompts, keep_kv=True)
    assert isinstance(got, model.FlashPrefix) and len(got.tokens) == common + sum(map(len, PROMPTS))
    torch.testing.assert_close(mine, hidden, atol=1e-5, rtol=1e-5)
    assert torch.equal(got.row_keys, want.row_keys) and torch.equal(got.row_lengths, want.row_lengths)
    for ours, theirs in zip(sum(got.kv, ()), sum(want.kv, ()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


class Copies(TorchDispatchMode):
    """How many tensors went from the CPU to another device, and how many were made there."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if torch.is_tensor(x) and x.is_meta]
        given = [x for x in tree_leaves(args) if torch.is_tensor(x)]
        self.moved += bool(made and not any(x.is_meta for x in given))
        return out


@pytest.mark.parametrize("keep_kv", [False, True])
@pytest.mark.parametrize("kind", [model.SharedPrefix, model.FlashPrefix])
def test_a_view_moves_to_its_device_in_one_copy(kind, keep_kv):
    """"meta" stands for the GPU: shapes without memory."""
    with Copies() as copies:
        there = kind(PROMPTS, RESPONSES, "meta", keep_kv)
    here = kind(PROMPTS, RESPONSES, "cpu", keep_kv)
    assert copies.moved == 1
    for a, b in zip([here, *here.parts], [there, *there.parts], strict=True):
        tensors = {name: x for name, x in vars(b).items() if torch.is_tensor(x)}
        assert tensors and all(x.is_meta for x in tensors.values())
        assert {name: x.shape for name, x in tensors.items()} == {name: vars(a)[name].shape for name in tensors}


# ---------------------------------------------------------------------------------------------------------------------
# which nets are served, and what is called


@pytest.mark.parametrize("served, changes", [
    (True, {}), (True, dict(dtype=torch.float16)), (True, dict(head_dim=256)), (False, dict(device="cpu")),
    (False, dict(dtype=torch.float32)), (False, dict(attention_cap=50.0)), (False, dict(head_dim=36)),
    (False, dict(head_dim=264)), (False, dict(capability=(7, 5))), (False, dict(built=False)), (False, dict(hip="6.4"))
], ids=str)
def test_which_nets_are_served(monkeypatch, served, changes):
    facts = dict(device="cuda", dtype=torch.bfloat16, head_dim=128, attention_cap=None, capability=(9, 0), built=True,
                 hip=None) | changes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts["capability"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: facts["built"])
    monkeypatch.setattr(torch.version, "hip", facts["hip"])
    config = types.SimpleNamespace(head_dim=facts["head_dim"], attention_cap=facts["attention_cap"])
    net = types.SimpleNamespace(config=config, device=torch.device(facts["device"]), dtype=facts["dtype"])
    assert model.flash_serves(net) is served


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("window, decoding, bounds", [(None, False, (-1, 0)), (4, False, (3, 0)),
                                                      (None, True, (-1, -1)), (4, True, (3, 0))])
def test_what_torch_is_asked(monkeypatch, public, window, decoding, bounds):
    """torch's own functions take the call (on "meta", which computes shapes), and a window of w is w - 1 to the left.
    The private operator stands in where torch's public function lacks an argument."""
    if public and not model._public_varlen():
        pytest.skip("this torch's varlen_attn lacks an argument")
    asked, real = [], model._public_varlen() if public else torch.ops.aten._flash_attention_forward

    def spy(*args, **named):
        asked.append(named.get("window_size") or (named["window_size_left"], named["window_size_right"]))
        return real(*args, **named)

    monkeypatch.setattr(model, "_public_varlen", lambda: spy if public else None)
    if not public:
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", spy)
    q = torch.zeros(5, 4, 8, dtype=torch.bfloat16, device="meta", requires_grad=not decoding)
    k = torch.zeros(9, 2, 8, dtype=torch.bfloat16, device="meta")
    starts = torch.zeros(6 if decoding else 3, dtype=torch.int32, device="meta")
    used = torch.zeros(5, dtype=torch.int32, device="meta") if decoding else None
    out = model.varlen(q, k, k, starts, starts, 1 if decoding else 4, 6, window, 0.5, used)
    assert asked == [bounds] and out.shape == q.shape and out.requires_grad is not decoding


# ---------------------------------------------------------------------------------------------------------------------
# decoding

LIMITS = [[9, 2, 14], [3, 7, 1], [14, 14, 5], [6, 2, 2]]
HOW = [{}, dict(temperature=0.7, top_p=0.8), dict(temperature=0), dict(top_k=5)]


def sampled(net, **how):
    """Samples with rows that end early and late, while waiting prompts enter."""
    return rollout.generate(net, PROMPTS, 3, LIMITS, stop_ids=range(0, V, 7), seeds=7, max_rows=7, **how)


def assert_same(got, want):
    assert got.tokens == want.tokens and got.finish == want.finish
    for a, b in zip(sum(got.logprobs, []), sum(want.logprobs, []), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("how", HOW, ids=str)
def test_sampling_through_the_flat_cache(net, flash, how):
    want, _ = sampled(net, **how), flash()
    got = sampled(net, **how)
    assert_same(got, want)
    assert {f for group in got.finish for f in group} == {"stop", "length"}


def test_sampling_after_a_common_beginning(net, flash):
    prompts = [[3 + i % 7 for i in range(40)] + prompt for prompt in PROMPTS]
    want, _ = rollout.generate(net, prompts, 2, 8, seeds=7, max_rows=5), flash()
    assert_same(rollout.generate(net, prompts, 2, 8, seeds=7, max_rows=5), want)


def test_widths():
    """Few numbers, never below the live rows, and at most a third of them idle."""
    cache, widths = model.FlashCache(Config(**SIZE), 100, 4, "cpu", torch.float32), []
    for cache.live in range(1, 101):
        assert cache.live <= cache.width <= 100 and 2 * cache.width <= 3 * cache.live
        widths.append(cache.width)
    assert sorted(set(widths)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]


@pytest.fixture
def steps(monkeypatch):
    """(width, live rows, longest row as a tensor) of every step that Python comes by; no row runs past its place."""
    found, rooms, real = [], [], model.FlashCache.step

    def step(cache, longest):
        real(cache, longest)
        found.append((cache.width, cache.live, cache.lengths[:cache.width].max()))
        rooms.append(cache.max_position)

    monkeypatch.setattr(model.FlashCache, "step", step)
    yield found
    assert found and all(int(longest) <= room for (*_, longest), room in zip(found, rooms, strict=True))


@pytest.mark.parametrize("how", HOW, ids=str)
def test_rows_that_pad_a_step_change_nothing(flash, steps, monkeypatch, how):
    net = random_net(windows=WINDOWS)
    flash()
    got = sampled(net, **how)
    assert any(width > live for width, live, _ in steps)
    monkeypatch.setattr(model.FlashCache, "width", property(lambda cache: cache.live))
    assert_same(got, sampled(net, **how))


def test_a_padding_row_that_was_the_longest(net, flash, steps):
    """The row that is first to reach the cache's width ends as the last of six, and pads the two steps that the other
    five still need: it would run past its place if it did not begin anew.

    12 rows; those behind the sixth end, and six others enter. Then the first five end, of the new ones the last five
    move into their places, and the first one ends too: five new rows, and behind them the old one."""
    limits = [[each] for each in [5] * 5 + [14] + [3] * 6 + [5] + [14] * 5]
    prompts = [[1 + b] for b in range(18)]
    want, _ = rollout.generate(net, prompts, 1, limits, max_rows=12), flash()
    assert_same(rollout.generate(net, prompts, 1, limits, max_rows=12), want)
    assert [pair for *pair, _ in steps[-3:]] == [[6, 6], [6, 5], [6, 5]] and steps[-3][-1] == 14


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs

WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal",
         "aten::is_nonzero", "aten::unique_dim", "aten::_unique2", "aten::repeat_interleave.Tensor", "aten::bincount"}


class Recorder(TorchDispatchMode):
    """Keeps every operation with the tensors and numbers it was given. Recording leaves memory as it was, as on a GPU,
    where it computes nothing. An operation for which the host would wait cannot be recorded."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = "aten::index" in func.name() and torch.bool in [getattr(x, "dtype", None) for x in tree_leaves(args)]
        assert func.name() not in WAITS and not by_mask, func.name()
        for each, argument in zip(args, func._schema.arguments):
            if argument.alias_info and argument.alias_info.is_write:
                self.before.append((each, each.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


class Graph:
    """What stands for torch.cuda.CUDAGraph: `replay` repeats the operations on the memory they were recorded with."""

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
            places = [x for x in tree_leaves(out) if torch.is_tensor(x)]
            is_view = all(x.untyped_storage().data_ptr() in given for x in places)
            if is_view and not func._schema.is_mutable:
                continue                                            # it is there already
            made = [x for x in tree_leaves(func(*args, **kwargs)) if torch.is_tensor(x)]
            for place, new in zip(places, made, strict=True):
                if place is not new:
                    place.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """{width: Graph} of all that are recorded; torch.cuda's three names for graphs stand on the CPU."""
    found, pools = collections.defaultdict(list), []

    @contextlib.contextmanager
    def graph(each, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        pools.append(pool)
        with Recorder() as recorder:
            yield
        for place, old in reversed(recorder.before):
            place.copy_(old)
        each.calls = recorder.calls
        found[next(len(args[0]) for func, args, _, _ in each.calls if "varlen" in func.name())].append(each)

    monkeypatch.setattr(rollout, "_records", lambda device: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    yield found
    assert len(set(map(id, pools))) <= 1


@pytest.mark.parametrize("how", HOW, ids=str)
def test_replayed_steps_give_the_same_tokens(flash, graphs, steps, monkeypatch, how):
    """A width runs once as it is, is recorded the second time, and every later step of that width is a replay."""
    net = random_net(windows=WINDOWS)
    monkeypatch.setattr(rollout, "_beyond_by_sort", rollout._beyond_by_bisection)       # as on a GPU
    want, _ = sampled(net, **how), flash(varlen_operator)
    assert not graphs
    got = sampled(net, **how)
    assert_same(got, want)
    assert graphs and all(len(each) == 1 for each in graphs.values())
    python = collections.Counter(width for width, *_ in steps)              # how often Python came by
    assert {width for width, count in python.items() if count == 2} == graphs.keys() and max(python.values()) == 2
    assert max(each.replays for each, in graphs.values()) > 2


def test_the_reference_of_adapters_is_recorded_too(flash, graphs):
    net = random_net()
    want = sampled(net)
    lora.add(net, 2, 4.0, lora.parts_of(net.config, "all"))
    for _, _, each in lora.adapted(net):
        torch.nn.init.ones_(each.B)
    flash(varlen_operator)
    assert_same(sampled(lora.Reference(net)), want)
    assert graphs


@pytest.mark.parametrize("waits", [lambda x: int(x.sum()), lambda x: x[x > 0], lambda x: x.nonzero(), torch.unique])
def test_the_recorder_tells_a_host_that_waits(waits):
    """Guards this file's own check: a step that asks the device for a number, or how many there are, is refused."""
    with torch.inference_mode(), pytest.raises(AssertionError, match="aten::"), Recorder():
        waits(torch.ones(2))


def test_other_caches_are_not_recorded(graphs):
    """Where masks are used, on a GPU too: a mask's width grows with the rows, so no two steps have the same shapes."""
    sampled(random_net())
    assert not graphs


# ---------------------------------------------------------------------------------------------------------------------
# the nucleus by bisection


FLAT = torch.randn(60, 400, generator=torch.Generator().manual_seed(0))
DISTRIBUTIONS = {
    "random": FLAT, "wide": FLAT * 4, "peaked": torch.cat([FLAT[:, :1] + 20, FLAT], 1),
    "as bfloat16 rounds them, with ties": (FLAT * 2).bfloat16().float(),
    "after top-k": rollout.truncate(FLAT, top_k=7), "underflow": FLAT * 60, "one token": FLAT[:, :1]}


@pytest.mark.parametrize("top_p", [1e-8, 0.01, 0.3, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_bisection_keeps_what_the_sort_keeps(name, top_p):
    """All rows but those where a token's border lies within rounding, 1e-6, of top_p: there either set is right."""
    logits = DISTRIBUTIONS[name]
    mine, sort = (beyond(logits, top_p) for beyond in (rollout._beyond_by_bisection, rollout._beyond_by_sort))
    sums = logits.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    clear = ((sums - top_p).abs() > 1e-6).all(-1)
    assert torch.equal(mine[clear], sort[clear])
    assert clear.float().mean() > 0.8 or top_p == 0.9999
    assert (~mine).any(-1).all()


@pytest.mark.parametrize("top_p, kept", [(0.0, 1), (1e-30, 1), (0.124, 1), (0.126, 2), (0.5, 4), (0.51, 5),
                                         (0.9999, 8)])
def test_bisection_takes_the_first_of_equals(top_p, kept):
    """8 tokens of 1/8, whose sums are exact in binary; the last line: beside a likelier one."""
    assert (~rollout._beyond_by_bisection(torch.zeros(2, 8), top_p)).nonzero()[:, 1].tolist() == [*range(kept)] * 2
    logits = torch.tensor([[0.125, 0.125, 0.5, 0.125, 0.125]]).log()
    assert rollout._beyond_by_bisection(logits, 0.625).tolist() == [[False, True, False, True, True]]


def test_bisection_leaves_damage_to_be_noticed():
    """A row of NaN keeps its tokens, so that its log-prob is NaN, which `generate` reports."""
    assert not rollout._beyond_by_bisection(torch.full((1, 9), torch.nan), 0.5).any()
