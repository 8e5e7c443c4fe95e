"""What needs a GPU: the flash views and the graphs of decoding against the masked ones, bfloat16 against float32, the
Triton kernels as compiled, the memory plan against the allocator, short runs. Skipped where there is none.
"""

import functools
import gc
import os
import types

import pytest
import torch

import checkpoints
import kernels
import lsp
import memory
import model
import rollout
import run
import sppo
import world
from conftest import small_base
from test_sppo import argv, lines

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def as_every_run_begins():
    """Without cuDNN's attention and TF32."""
    run.device_and_dtype("cuda")


def network(device, dtype, windows=(), layers=2, width=128, vocab=1000):
    """The same weights wherever they are: bfloat16's, so that float32 on a CPU computes with the very same."""
    config = checkpoints.Config(vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_layers=layers,
                                num_heads=8, num_kv_heads=2, head_dim=32, max_positions=2048, windows=windows)
    net = model.Transformer(config).init_weights(torch.Generator().manual_seed(0))
    return net.to(torch.bfloat16).to(device, dtype)


def ids(count, seed):
    return torch.randint(1, 1000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def scored(net, prompts, responses):
    """(log-probabilities, gradients) in float64 on the CPU."""
    net.zero_grad()
    value = model.response_logprobs(net, prompts, responses)[0]
    value.sum().backward()
    return value.detach().double().cpu(), [p.grad.double().cpu() for p in net.parameters()]


def relative(got, want):
    return float((got - want).norm() / want.norm())


def test_cudnn_attention_is_off():
    device, dtype = run.device_and_dtype("cuda")
    assert dtype == torch.bfloat16 and not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("windows", [(), (64, None)])
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("P, T", [(128, 320), (64, 128), (100, 348), (5, 9)])       # keys at 64 mod 128 among them
def test_both_views_equal_float32_on_a_cpu(windows, flash, P, T, monkeypatch):
    if not flash:
        monkeypatch.setattr(model, "flash_serves", lambda net: False)
    net = network(GPU, torch.bfloat16, windows)
    assert model.flash_serves(net) is flash
    batch = [ids(P, 1), ids(P // 2 + 1, 2)], [[ids(T, 3), [], ids(T // 3 + 1, 4)], [ids(7, 5)]]
    got, want = scored(net, *batch), scored(network("cpu", torch.float32, windows), *batch)
    assert relative(got[0], want[0]) < 0.02
    for mine, theirs in zip(got[1], want[1]):
        assert mine.isfinite().all() and relative(mine, theirs) < 0.1


def sampled(net, **how):
    prompts, limits = [ids(n, n) for n in (30, 5, 90, 64, 17, 33)], [[20 + 5 * b, 9, 40] for b in range(6)]
    return prompts, rollout.generate(net, prompts, 3, limits, stop_ids=(7,), seeds=5, max_rows=12, **how)


@pytest.mark.parametrize("how", [{}, dict(temperature=0.7, top_p=0.9), dict(temperature=0), dict(top_k=20)])
def test_recorded_steps_draw_what_plain_ones_do(how, monkeypatch):
    """Token for token: the same kernels in the same order. Rows end and enter meanwhile."""
    net = network(GPU, torch.bfloat16)
    _, recorded = sampled(net, **how)
    monkeypatch.setattr(rollout, "_replayed", lambda step, cache: step)
    _, plain = sampled(net, **how)
    assert recorded.tokens == plain.tokens and recorded.finish == plain.finish


@pytest.mark.parametrize("windows", [(), (64, None)])
@pytest.mark.parametrize("flash", [True, False])
def test_the_samplers_logprobs_are_the_forward_passs(windows, flash, monkeypatch):
    if not flash:
        monkeypatch.setattr(model, "flash_serves", lambda net: False)
    net = network(GPU, torch.bfloat16, windows)
    prompts, samples = sampled(net)
    with torch.no_grad():
        value, _, _ = model.response_logprobs(network("cpu", torch.float32, windows), prompts, samples.tokens)
    said = torch.tensor([p for group in samples.logprobs for row in group for p in row])
    assert float((said - value).abs().max()) < 0.2 and float((said - value).abs().mean()) < 0.02


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("triton", [True, False])
def test_log_probabilities_against_float64(cap, dtype, bound, triton, monkeypatch):
    """With Triton where it is installed, and without."""
    monkeypatch.setattr(kernels, "TRITON", triton and kernels.TRITON)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 256, generator=g), torch.randn(40_001, 256, generator=g) * 0.2
    target, coef = torch.randint(40_001, (300,), generator=g), torch.randn(300, generator=g)
    target[0], target[1] = 0, 40_000
    found = []
    for device, kind in ((GPU, dtype), ("cpu", torch.float64)):
        h, w = (x.to(dtype).to(device, kind, copy=True).requires_grad_() for x in (hidden, weight))
        if device == "cpu":
            value = kernels.soft_cap(h @ w.T, cap).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
            (value * coef).sum().backward()
            found += [[value, h.grad, w.grad]] * 2
            continue
        for function in (kernels.linear_logprob, kernels.linear_policy_loss):
            h.grad = w.grad = None
            if function is kernels.linear_logprob:
                value = function(h, w, target.to(GPU), cap)
                (value * coef.to(GPU)).sum().backward()
            else:
                loss, value = function(h, w, target.to(GPU), coef.to(GPU), cap)
                loss.backward()
            found.append([x.detach().double().cpu() for x in (value, h.grad, w.grad)])
    for got, want in zip(found[:2], found[2:]):
        assert all(relative(a, b.detach()) < bound for a, b in zip(got, want))


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_bfloat16_steps_follow_float32_ones(name):
    """Steps too small for a bfloat16 weight: the float32 masters on the GPU go where float32 weights on a CPU go."""
    args = types.SimpleNamespace(micro_batch=2, loss="sppo", eta=10.0, clip=1.0)
    examples = [{"prompt": ids(9 + n, n), "responses": [ids(6, 10 + n), ids(11, 20 + n)], "p": [0.8, 0.2]}
                for n in range(5)]
    moves = []
    for device, dtype in ((GPU, torch.bfloat16), ("cpu", torch.float32)):
        net = network(device, dtype)
        before = torch.cat([p.detach().float().cpu().flatten() for p in net.parameters()])
        optimizer = kernels.Optimizer(net.parameters(), name)
        with torch.no_grad():
            for example, ref in zip(examples, sppo.sequence_logprobs(net, examples).tolist()):
                example["ref"] = ref
        losses = [sppo.gradient_step(net, optimizer, examples, args, 1e-6, (0, 1))["loss"] for _ in range(8)]
        moves.append(torch.cat([m.detach().cpu().flatten() for m in optimizer.masters]) - before)
        assert all(p.grad is None for p in net.parameters()) and losses[0] == pytest.approx(9, rel=0.02)
    assert float(torch.cosine_similarity(*moves, dim=0)) > 0.9
    assert float(moves[0].norm() / moves[1].norm()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("name, moments", [("adamw", 8), ("rmsprop", 4)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_plan_against_the_allocator(name, moments, checkpointed):
    """A pass and a step of a model of 100 million parameters: the peak is within a third of the plan."""
    gc.collect()                        # what an earlier test left in a circle of references
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    net = network(GPU, torch.bfloat16, layers=8, width=1024, vocab=8000)
    net.activation_checkpointing = checkpointed
    optimizer = kernels.Optimizer(net.parameters(), name)
    args = types.SimpleNamespace(lora=0, max_rows=4, max_new_tokens=256, micro_batch=4,
                                 activation_checkpointing=checkpointed)
    plan = memory.plan(net.config, args, torch.bfloat16, 1, answers=2, prompt=256, answer=256, width=512,
                       moments=moments, judges=[])["train"]
    examples = [{"prompt": ids(256, n), "responses": [ids(256, 10 + n), ids(256, 20 + n)], "p": [0.8, 0.2],
                 "ref": [-1700.0, -1700.0]} for n in range(4)]
    step = functools.partial(sppo.gradient_step, net, optimizer, examples, types.SimpleNamespace(
        micro_batch=4, loss="sppo", eta=10.0, clip=1.0), 1e-6, (0, 1))
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    taken, planned = torch.cuda.max_memory_allocated() - before, sum(plan.values())
    print(f"{name}, checkpointed {checkpointed}: {taken / 2**20:.0f} MB, planned {planned / 2**20:.0f}")
    assert 0.67 < taken / planned < 1.33


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base whose heads of 16 numbers the flash kernel takes."""
    return small_base(world.OPERATIONS, tmp_path_factory, width=64)


@pytest.mark.parametrize("script, settings", [
    (sppo, dict(iterations=1, prompts_per_iteration=64, epochs=1, batch_size=16, validation_prompts=32)),
    (lsp, dict(steps=3, queries=4, answers=4, eval_every=3)),
    (sppo, dict(iterations=1, prompts_per_iteration=64, epochs=1, batch_size=16, validation_prompts=32, lora=4)),
    (lsp, dict(steps=3, queries=4, answers=4, eval_every=3, lora=4)),
    (lsp, dict(steps=3, queries=4, answers=4, eval_every=3, lora=4, challenger="frozen", self_reward="sample"))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_short_runs(script, settings, dtype, base, tmp_path, monkeypatch):
    """The ratio to pi_t is near 0 at the first step, so sampler, reference and trainer agree; then it moves."""
    monkeypatch.chdir(tmp_path)
    script.main(argv(model=base, out="run", test_prompts=32, max_new_tokens=8, device="cuda", dtype=dtype, **settings))
    key = "logratio_w" if script is sppo else "kl_solver"
    moved = [row[key] for row in lines("run/metrics.jsonl") if key in row]
    assert abs(moved[0]) < (1e-3 if dtype == "float32" else 0.3) and moved[-1] != moved[0]
    assert os.path.exists("run/summary.json")
