"""rollout.py: greedy against transformers, sampling against the softmax, and rows that do not depend on their batch.

Everything random is a fixed function of the seeds written here, so each test passes always or never; the odds given are
those of a sound generator failing with seeds drawn anew. The net is random with logits of standard deviation about 1.5:
as unsure as a trained model sampling at temperature 1, so that no token is a foregone conclusion.
"""

import copy
import doctest
import math

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import kernels
import model
import rollout
import run
from rollout import choose, generate, inverse_cdf, row_streams, truncate, uniform

V, CONTEXT = 50, 64
SIZE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None,
            pad_token_id=0)
PROMPTS = [[5, 9, 33], [7], [48, 2, 18, 4, 4, 11, 12, 40, 3], [8, 1], [3, 3, 29, 30, 31], [9, 33]]
SEEDS = [11, 5, 900, -3, 2**61 + 1, 6]


@pytest.fixture(scope="module", params=["llama", "qwen2 with windows"])
def nets(request, tmp_path_factory):
    """(our net, transformers' model) of one random checkpoint."""
    transformers.logging.disable_progress_bar()
    config = (LlamaConfig(**SIZE) if request.param == "llama" else
              Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=4, max_window_layers=1))
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim == 2:
                p.normal_(0, 1.5 * 32**-0.5)
    directory = tmp_path_factory.mktemp("net")
    hf.save_pretrained(directory)
    return model.Transformer.from_pretrained(directory), hf


@pytest.fixture(scope="module")
def net(nets):
    return nets[0]


def test_doctests():
    result = doctest.testmod(rollout)
    assert result.failed == 0 and result.attempted >= 2


# ---------------------------------------------------------------------------------------------------------------------
# greedy


def transformers_greedy(hf, prompt, **options):
    row = torch.tensor([prompt])
    out = hf.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=16, **options)
    return out[0, len(prompt):].tolist()


def test_greedy_equals_transformers_token_for_token(nets):
    """Row by row, without padding. Greedy ignores the seeds, so both samples of a prompt are that one row."""
    net, hf = nets
    got = generate(net, PROMPTS, 2, 16, temperature=0)
    for prompt, (first, second) in zip(PROMPTS, got.tokens):
        assert first == second == transformers_greedy(hf, prompt)
    assert len({t for group in got.tokens for t in group[0]}) > 10  # the rows are no mere repetition of one token


def test_greedy_with_stops_equals_transformers(nets):
    net, hf = nets
    free = generate(net, PROMPTS, 1, 16, temperature=0)
    stops = [free.tokens[0][0][4], free.tokens[2][0][2]]
    got = generate(net, PROMPTS, 1, 16, temperature=0, stop_ids=stops)
    for prompt, (tokens,), (finish,) in zip(PROMPTS, got.tokens, got.finish):
        assert tokens == transformers_greedy(hf, prompt, eos_token_id=stops)
        assert finish == ("stop" if tokens[-1] in stops else "length")
    assert {f for group in got.finish for f in group} == {"stop", "length"}


@torch.no_grad()
def test_greedy_equals_the_uncached_forward(net):
    """While rows end one after the other and waiting prompts enter."""
    limits = [[16 - 2 * b] for b in range(len(PROMPTS))]
    got = generate(net, PROMPTS, 1, limits, temperature=0, max_rows=3)
    for prompt, (tokens,), (limit,) in zip(PROMPTS, got.tokens, limits):
        row = list(prompt)
        for _ in range(limit):
            row.append(int(net.logits(net(torch.tensor([row]))[0, -1]).argmax()))
        assert tokens == row[len(prompt):]


# ---------------------------------------------------------------------------------------------------------------------
# a row depends on its seed, its sample index and its prompt, and on nothing else
#
# Batches of other shapes round differently, by about 1e-6 in a logit. A draw changes where that moves a border of the
# cumulative distribution past u: about 1e-6 a token, under 1e-3 for each of the tests below on a new machine.

OPTIONS = dict(n=3, max_new_tokens=20, stop_ids=(4, 17))


def assert_same(got, want):
    assert got.tokens == want.tokens and got.finish == want.finish
    for a, b in zip(sum(got.logprobs, []), sum(want.logprobs, [])):
        assert a == pytest.approx(b, abs=1e-5)


def pick(samples, order):
    return rollout.Samples(*([field[b] for b in order] for field in (samples.tokens, samples.logprobs, samples.finish)))


@pytest.fixture(scope="module")
def together(net):
    """All prompts in flight at once."""
    samples = generate(net, PROMPTS, **OPTIONS, seeds=SEEDS)
    lengths = [len(t) for group in samples.tokens for t in group]
    assert min(lengths) < 8 and max(lengths) == 20  # some rows leave early, some are cut
    return samples


@pytest.mark.parametrize("max_rows", [1, 3, 6, 7, 1000])
@pytest.mark.parametrize("prefill_tokens", [1, 12, 16384])
def test_any_number_of_rows_in_flight(net, together, max_rows, prefill_tokens):
    got = generate(net, PROMPTS, **OPTIONS, seeds=SEEDS, max_rows=max_rows, prefill_tokens=prefill_tokens)
    assert_same(got, together)


@pytest.mark.parametrize("budget, batches", [(1, [3, 1, 9, 2, 5, 2]), (12, [4, 11, 7]), (13, [13, 9]), (99, [22])])
def test_prefill_stays_within_its_budget(net, monkeypatch, budget, batches):
    """Prompts enter in order, as many at once as the budget of tokens allows, and at least one."""
    tokens = []
    real = model.SharedPrefix
    monkeypatch.setattr(model, "SharedPrefix", lambda prompts, *rest, **options:
                        tokens.append(sum(map(len, prompts))) or real(prompts, *rest, **options))
    generate(net, PROMPTS, 2, 3, max_rows=100, prefill_tokens=budget)
    assert tokens == batches


@pytest.mark.parametrize("order", [[5, 3, 0, 4, 1, 2], [2, 4], [1]])
def test_order_and_company_do_not_matter(net, together, order):
    """Another order, as after a shuffle; some of the prompts, as on one of several ranks; a prompt alone."""
    got = generate(net, [PROMPTS[b] for b in order], **OPTIONS, seeds=[SEEDS[b] for b in order], max_rows=6)
    assert_same(got, pick(together, order))


def test_fewer_samples_are_the_first_of_many(net, together):
    got = generate(net, PROMPTS, **{**OPTIONS, "n": 1}, seeds=SEEDS)
    assert got.tokens == [group[:1] for group in together.tokens]


def test_a_queue_much_longer_than_the_batch(net):
    """40 prompts x 2 samples through 4 rows: each equals the same prompt by itself."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (40,), generator=g).tolist()
    prompts = [torch.randint(V, (length,), generator=g).tolist() for length in lengths]
    got = generate(net, prompts, 2, 10, stop_ids=range(5), seeds=100, max_rows=4)
    for b in range(0, 40, 3):
        assert_same(pick(got, [b]), generate(net, prompts[b:b + 1], 2, 10, stop_ids=range(5), seeds=100 + b))


def test_rows_that_end_with_their_first_token(net):
    """Guards against a compaction right after the prefill that leaves the moved rows' prompts behind: a row of one
    token makes room for another prompt's row, whose later tokens then came from the wrong prompt."""
    limits = [[1, 12], [12, 1], [1, 1], [12, 12], [2, 12], [1, 12]]
    got = generate(net, PROMPTS, 2, limits, seeds=SEEDS)
    free = generate(net, PROMPTS, 2, 12, seeds=SEEDS)
    assert got.tokens == [[t[:l] for t, l in zip(*pair)] for pair in zip(free.tokens, limits)]


def test_samples_and_seeds_differ(net):
    """Guards against samples that share a stream, be it for the first token only. Two rows agree in a
    token one time in 11, so in 12 tokens with odds of 3e-13, and there are some 3,000 pairs here."""
    got = generate(net, [PROMPTS[0]] * 3, 40, 12, seeds=[7, 8, 7])
    a, b, c = (set(map(tuple, group)) for group in got.tokens)
    assert len(a) == len(b) == 40 and not a & b and got.tokens[0] == got.tokens[2]
    assert len({t[0] for t in got.tokens[0]}) > 5


def test_an_int_seed_stands_for_consecutive_seeds(net):
    def tokens(**seeds):
        return generate(net, PROMPTS, 2, 6, **seeds).tokens

    assert tokens(seeds=40) == tokens(seeds=[40, 41, 42, 43, 44, 45]) != tokens(seeds=41)
    assert tokens() == tokens(seeds=0)


# ---------------------------------------------------------------------------------------------------------------------
# log-probabilities


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_p": 0.8, "top_k": 10}, {"temperature": 0}], ids=str)
def test_logprobs_are_the_policys_own(net, how):
    """Whatever the sampling, log pi under the full, untempered softmax: what teacher forcing gives."""
    got = generate(net, PROMPTS, **OPTIONS, seeds=SEEDS, **how)
    with torch.no_grad():
        forced, row, rows = model.response_logprobs(net, PROMPTS, got.tokens)
    assert torch.tensor(sum(sum(got.logprobs, []), [])) == pytest.approx(forced, abs=1e-5)
    assert forced.exp().sum() < 0.9 * len(forced)  # far from certain, so the agreement says something
    sums = kernels.sum_rows(forced, row, rows).tolist()
    assert [sum(l) for group in got.logprobs for l in group] == pytest.approx(sums, abs=1e-4)


def test_truncation_and_temperature_do_not_touch_the_logprob():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    want = 2 - math.log(sum(map(math.exp, (2, 1, 0, -1))))
    for how in ({}, {"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 1}, {"temperature": 0}):
        token, logprob = choose(logits, torch.zeros(1), **how)  # u = 0 draws the first token
        assert token.tolist() == [0] and logprob.item() == pytest.approx(want)


def test_extreme_logits():
    token, logprob = choose(torch.tensor([[-3e4, 9e4, 9e4, 0.0]]), torch.tensor([0.75]))
    assert token.tolist() == [2] and logprob.item() == pytest.approx(-math.log(2))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_p": 0.8, "top_k": 10}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize("damage", ["NaN", "overflow", "one token"])
def test_logprobs_that_are_not_finite_end_in_a_sentence(net, how, damage):
    """Not in a sample with a NaN in it, which sampling itself would not notice: NaN is drawn as token 0."""
    broken = copy.deepcopy(net)
    with torch.no_grad():
        if damage == "NaN":
            broken.layers[1].down.weight[3, 4] = math.nan
        elif damage == "overflow":
            broken.head.weight *= 1e38
        else:
            broken.embed.weight[48] = math.nan      # in one of the prompts, and sooner or later in others' samples
    with pytest.raises(run.UserError) as error:
        generate(broken, PROMPTS, 2, 5, **how)
    assert "NaN or infinite" in str(error.value) and "--dtype float32" in str(error.value)
    assert "\n" not in str(error.value)


def test_sampling_leaves_the_net_fit_for_training(net):
    """Guards against tables built in inference mode that a later backward cannot use."""
    net._rope_table = None
    got = generate(net, PROMPTS[:2], 2, 4)
    logprob, _, _ = model.response_logprobs(net, PROMPTS[:2], got.tokens)
    gradients = torch.autograd.grad(logprob.sum(), list(net.parameters()))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


# ---------------------------------------------------------------------------------------------------------------------
# where rows end


def test_stop_tokens_and_finish(net):
    """Of several stop ids whichever comes first ends the row and is its last token; a cut row is left as it was cut."""
    stops = (4, 17, 30)
    got, free = generate(net, PROMPTS, 8, 12, stop_ids=stops, seeds=SEEDS), generate(net, PROMPTS, 8, 12, seeds=SEEDS)
    assert free.finish == [["length"] * 8] * 6
    fields = (sum(field, []) for field in (got.tokens, got.logprobs, got.finish, free.tokens))
    for tokens, logprobs, finish, whole in zip(*fields):
        ends = [i for i, t in enumerate(whole) if t in stops]
        assert tokens == whole[:ends[0] + 1 if ends else 12] and len(logprobs) == len(tokens)
        assert finish == ("stop" if ends else "length")
    finishes = sum(got.finish, [])
    assert {t[-1] for t, f in zip(sum(got.tokens, []), finishes) if f == "stop"} == set(stops) and "length" in finishes


def test_a_stop_token_in_the_last_place_is_a_stop(net):
    tokens = generate(net, [PROMPTS[2]], 1, 5, temperature=0).tokens[0][0]
    last = tokens.index(tokens[-1]) + 1
    got = generate(net, [PROMPTS[2]], 1, last, temperature=0, stop_ids=[tokens[-1]])
    assert got.tokens == [[tokens[:last]]] and got.finish == [["stop"]]


def test_a_limit_for_every_row(net):
    limits = [[3, 9, 2], [5, 2, 7], [4, 4, 4], [2, 3, 8], [6, 2, 2], [9, 9, 2]]
    got = generate(net, PROMPTS, 3, limits, seeds=SEEDS, max_rows=7)
    assert [[len(t) for t in group] for group in got.tokens] == limits
    assert got.count == sum(map(sum, limits)) and got.seconds > 0


def test_no_prompts(net):
    assert generate(net, [], 3, 5).tokens == [] and generate(net, [], 3, 5).count == 0


def test_prompts_that_cannot_be_used(net):
    for prompts, limit in (([[1], []], 4), ([[1], [2] * (CONTEXT - 3)], 4), ([[1], [2] * 10], [[60], [CONTEXT - 9]])):
        with pytest.raises(ValueError, match="prompt 1 has"):
            generate(net, prompts, 1, limit)
    full = generate(net, [[1], [2] * (CONTEXT - 4)], 1, 4)  # to the last place of the context
    assert [len(t) for group in full.tokens for t in group] == [4, 4]


# ---------------------------------------------------------------------------------------------------------------------
# choosing a token


def chi_square(counts, probs):
    """Sum of (seen - expected)^2 / expected over the cells."""
    expected = probs.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def counts_of(logits, **how):
    """How often each token comes in 50,000 draws from one distribution, each row with its own stream."""
    R = 50_000
    u = uniform(row_streams([3], R), torch.zeros(R, dtype=torch.long))
    return choose(logits.expand(R, -1), u, **how)[0].bincount(minlength=logits.shape[-1])


def test_frequencies_match_the_softmax():
    """7 tokens, 6 degrees of freedom: a fair sampler exceeds 38.3 once in 1e6, one at another temperature by far."""
    logits = torch.tensor([1.0, 0.0, -2.0, 2.0, 0.5, -1.0, 1.5])
    assert chi_square(counts_of(logits), logits.softmax(-1)) < 38.3
    assert chi_square(counts_of(logits, temperature=1.2), (logits / 1.2).softmax(-1)) < 38.3
    assert chi_square(counts_of(logits, temperature=1.2), logits.softmax(-1)) > 1000


def test_frequencies_after_truncation():
    """probabilities .4 .3 .2 .1: top_p .8 leaves 4:3:2 (2 degrees of freedom, 27.6 once in 1e6), top_k 2 leaves 4:3
    (1 degree, 23.9), and what is left out never comes."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    for how, kept, bound in (({"top_p": 0.8}, [1, 2, 3], 27.6), ({"top_k": 2}, [1, 3], 23.9)):
        counts = counts_of(logits, **how)
        assert counts.sum() == counts[kept].sum() and chi_square(counts[kept], logits[kept].softmax(-1)) < bound


def test_generated_tokens_follow_the_model(net):
    """Two tokens deep: of 20,000 samples, those that begin with the likeliest token go on as the model says.

    Cells under 5 expected are pooled, so there are 49 degrees of freedom or fewer: 112 is exceeded once in 1e6.
    """
    got = generate(net, [PROMPTS[0]], 20_000, 2, max_rows=20_000, seeds=[1])
    pairs = torch.tensor(got.tokens[0])
    first = int(pairs[:, 0].mode().values)
    for prefix, seen in ((PROMPTS[0], pairs[:, 0]), (PROMPTS[0] + [first], pairs[pairs[:, 0] == first, 1])):
        with torch.no_grad():
            probs = net.logits(net(torch.tensor([prefix]))[0, -1]).softmax(-1)
        counts, rare = seen.bincount(minlength=V), probs * len(seen) < 5
        assert len(seen) > 1000 and rare.sum() < 40
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        assert chi_square(counts, torch.cat([probs[~rare], probs[rare].sum()[None] + 1e-9])) < 112


def test_temperature_zero_is_the_likeliest():
    logits = torch.randn(30, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(logits, torch.full((30,), 0.99), temperature=0)[0], logits.argmax(-1))


# ---------------------------------------------------------------------------------------------------------------------
# inverse_cdf

LAST = 1 - 2.0**-24  # the largest value of uniform()


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 100, 1000, 4096, 5003])
def test_inverse_cdf_equals_a_float64_cumulative_sum(size):
    """Up to float32 rounding: where u falls within 1e-6 of a border either neighbour is right."""
    g = torch.Generator().manual_seed(size)
    weights = torch.randn(300, size, generator=g).mul(2).exp()
    u = torch.rand(300, generator=g)
    u[:2] = torch.tensor([0.0, LAST])
    token = inverse_cdf(weights, u)
    exact = weights.double().cumsum(-1) / weights.double().sum(-1, keepdim=True)
    upper = exact.gather(1, token[:, None]).squeeze(1)
    lower = upper - (weights.double() / weights.double().sum(-1, keepdim=True)).gather(1, token[:, None]).squeeze(1)
    assert ((lower - 1e-6 < u) & (u < upper + 1e-6)).all()
    assert (token == torch.searchsorted(exact, u.double()[:, None], right=True).squeeze(1)).float().mean() > 0.98


@pytest.mark.parametrize("u", [0.0, 2.0**-24, 0.3, 0.5, LAST])
def test_zero_weights_are_never_drawn(u):
    """At the front, inside, whole blocks of them, at the end, and with the whole mass on one token."""
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(200, 100, generator=g)
    weights[torch.rand(200, 100, generator=g) < 0.8] = 0
    weights[:, :3], weights[:, 32:48], weights[:, 95:] = 0, 0, 0
    weights[0], weights[0, 60] = 0, 1e-30
    token = inverse_cdf(weights, torch.full((200,), u))
    assert (weights.gather(1, token[:, None]) > 0).all()
    assert token[0] == 60


def test_zero_weights_are_not_drawn_at_the_border_of_a_block():
    """Guards against a block's rounding: where u falls on the border of two blocks, what is left to search for in the
    second can come out as -1e-9, which even a zero at its front exceeds. top_p promised never to draw that token."""
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        weights = torch.rand(1, 53, generator=g)
        weights[0, 14:20], weights[0, 31:35] = 0, 0  # on both sides of both borders between blocks of 16
        mass = torch.stack([weights[0, :16].sum(), weights[0, :32].sum()]) / weights.sum()
        steps = (mass * 2**24).round() + torch.arange(-4, 5)[:, None]  # around both borders, on uniform()'s grid
        u = steps.flatten() * 2.0**-24
        token = inverse_cdf(weights.expand(len(u), -1), u)
        assert (weights[0, token] > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# truncate


def kept(probs, **how):
    """Indices left by truncate; what is left must be untouched."""
    logits = torch.tensor([probs]).log()
    out = truncate(logits, **how)
    left = out.isfinite()
    assert torch.equal(out[left], logits[left]) and (out[~left] == -torch.inf).all()
    return left[0].nonzero().squeeze(1).tolist()


def test_top_p_by_hand():
    probs = [0.1, 0.4, 0.2, 0.3]
    assert kept(probs, top_p=0.0) == kept(probs, top_p=0.39) == [1]  # at least one
    assert kept(probs, top_p=0.41) == kept(probs, top_p=0.69) == [1, 3]  # the token that crosses the mass is in
    assert kept(probs, top_p=0.71) == [1, 2, 3]
    assert kept(probs, top_p=0.91) == kept(probs) == [0, 1, 2, 3]


def test_top_p_with_ties_takes_the_first():
    assert kept([0.25] * 4, top_p=0.5) == [0, 1]  # exact in binary: two tokens have the mass, a third is not needed
    assert kept([0.125, 0.125, 0.5, 0.125, 0.125], top_p=0.625) == [0, 2]


def test_top_p_one_keeps_all():
    """Also a token whose mass float32 cannot see beside the others."""
    logits = torch.tensor([[0.0, -60.0, -torch.inf]])
    assert torch.equal(truncate(logits, top_p=1.0), logits)


def test_top_k_by_hand():
    probs = [0.1, 0.4, 0.2, 0.3]
    assert [kept(probs, top_k=k) for k in (1, 2, 3)] == [[1], [1, 3], [1, 2, 3]]
    assert kept(probs, top_k=0) == kept(probs, top_k=4) == kept(probs, top_k=99) == [0, 1, 2, 3]  # 0 = off
    assert kept([0.3, 0.1, 0.3, 0.3], top_k=2) == [0, 2, 3]  # all that equal the k-th likeliest


def test_top_k_goes_first_and_top_p_sees_what_it_left():
    """.5 .3 .2 with top_k 2 is .625 .375: top_p .6 is then reached by the first token alone."""
    assert kept([0.5, 0.3, 0.2], top_p=0.6) == [0, 1]
    assert kept([0.5, 0.3, 0.2], top_p=0.6, top_k=2) == [0]


# ---------------------------------------------------------------------------------------------------------------------
# uniform: a hash that must look random in each of its arguments


def table(seeds, samples, positions):
    """u of every (seed, sample, position), as generate draws them."""
    streams = row_streams(seeds, samples)
    u = torch.stack([uniform(streams, torch.full_like(streams, p)) for p in range(positions)], -1)
    return u.view(len(seeds), samples, positions)


def test_uniform_is_uniform():
    """64,000 numbers: mean within 5 standard deviations (odds 6e-7); 64 bins, 134 exceeded once in 2e6."""
    u = table(list(range(40)), 40, 40).flatten()
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())
    assert abs(u.mean() - 0.5) < 5 * 12**-0.5 / len(u) ** 0.5
    assert chi_square((u * 64).long().bincount(minlength=64), torch.full((64,), 1 / 64)) < 134
    assert len(u.unique()) > 0.99 * len(u)  # 2^24 values: about 120 coincidences are expected


@pytest.mark.parametrize("seeds", [range(40), [run.stream(1, "sample", b) for b in range(40)]], ids=["small", "hashed"])
def test_neighbours_are_uncorrelated(seeds):
    """Seeds, samples and positions up to two steps apart: |r| < 5 / sqrt(count), odds 6e-7 for each of 26 pairs."""
    u = (table(seeds, 40, 40) - 0.5) * 12**0.5
    for ds in range(3):
        for di in range(3):
            for dp in range(3):
                if ds or di or dp:
                    a, b = u[ds:, di:, dp:], u[:40 - ds, :40 - di, :40 - dp]
                    assert abs((a * b).mean()) < 5 / a.numel() ** 0.5, (ds, di, dp)


def test_uniform_is_a_function_of_its_arguments():
    u = table([1, 2, 3], 4, 5)
    assert torch.equal(table([3], 4, 5)[0], u[2]) and torch.equal(table([1, 2, 3], 2, 5), u[:, :2])
    assert torch.equal(table([2**64 + 1], 4, 5)[0], u[0])  # seeds count modulo 2^64
    assert not torch.equal(table([-1], 4, 5)[0], u[0])


def test_sampling_leaves_the_global_generator_alone(net):
    before = torch.get_rng_state()
    generate(net, PROMPTS, 2, 4)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------------
# what all prompts begin with


def test_a_common_beginning_is_computed_once(net, monkeypatch):
    """A rubric of 40 tokens before 6 prompts: the tokens, and their log-probs, of prompts that are computed apart."""
    rubric = [3 + i % 7 for i in range(40)]
    prompts = [rubric + [5 + i] * (1 + i % 3) for i in range(6)] + [rubric]
    apart = [generate(net, [p], 2, 12, seeds=[i], max_rows=8) for i, p in enumerate(prompts)]
    packs, real = [], model.Transformer.forward
    monkeypatch.setattr(model.Transformer, "forward",
                        lambda self, tokens, view=None: packs.append(len(tokens)) or real(self, tokens, view))
    got = generate(net, prompts, 2, 12, seeds=list(range(7)), max_rows=64)
    assert packs[0] == 39 + sum(len(p) - 39 for p in prompts)       # the last prompt keeps a token of its own
    assert got.tokens == [a.tokens[0] for a in apart]
    for mine, one in zip(got.logprobs, apart):
        for a, b in zip(mine, one.logprobs[0]):
            assert a == pytest.approx(b, abs=1e-4)


def test_short_beginnings_are_left_alone(net):
    """A template's few tokens are not worth a rectangle of their own: the pack holds every prompt whole."""
    view, hidden = model.prefill(net, [[1, 2, 3], [1, 2, 4, 5]])
    assert len(view.tokens) == 7 and view.rows == 0 and hidden.shape[0] == 2
