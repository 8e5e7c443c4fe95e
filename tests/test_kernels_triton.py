"""kernels_triton.py in Triton's interpreter, against float64. It shows that arithmetic and borders are right. About a
GPU it shows nothing: neither that the kernels compile there, nor their speed.

The interpreter is asked for by an environment variable, which must stand before Triton is imported. So another process
runs `measure`, and the tests read the errors that it prints.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

import kernels
from conftest import ROOT
from test_kernels import SOFTCAPS, draw, error, exact, value_and_gradients

pytestmark = pytest.mark.slow

BLOCKS = {"blocks": (16, 24), "one block": (4096, 1000)}        # logits a program holds, vocabulary of a tile
BOUNDS = {"float32": 2e-6, "bfloat16": 1e-2}                    # as in test_kernels.py
SIZES = [(19, 50), (8, 48), (3, 17), (1, 1)]                    # T, V: multiples of block and tile, larger, smaller


def policy(hidden, weight, target, coef, softcap, tile):
    """log-probabilities and gradients by linear_policy_loss."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss, logprob = kernels.linear_policy_loss(hidden, weight, target, coef, softcap, tile)
    loss.backward()
    return logprob, hidden.grad, weight.grad


def tile_errors(tile, dtype, softcap):
    """The two kernels by themselves, on logits that are already rounded: targets at both edges and beyond them, a
    hidden gap between the rows, and a coefficient that is one number behind a stride of 0."""
    hidden, weight, _, _ = draw(6, 50, dtype)
    logits = torch.full((6, 64), torch.nan, dtype=dtype)[:, :50].copy_((hidden @ weight.T).detach())
    target, coef = torch.tensor([0, 49, -1, 50, 16, -7]), torch.tensor(0.75).expand(6)
    inside = (target >= 0) & (target < 50)
    x = logits.double().requires_grad_()
    capped = x if softcap is None else softcap * torch.tanh(x / softcap)
    lse = capped.logsumexp(1)
    picked = torch.where(inside, capped.gather(1, target.clamp(0, 49)[:, None]).squeeze(1), 0.0)
    (coef * (picked - lse)).sum().backward()
    got, found = tile.statistics(logits, target, softcap)
    tile.gradient_(logits, target, got, coef, softcap)
    return error(got, lse.detach()), error(found, picked.detach()), error(logits, x.grad)


def measure():
    """Prints {case: the relative errors} as JSON."""
    import kernels_triton

    found = {}
    for blocks, (kernels_triton.BLOCK, kernels.CHUNK_V) in BLOCKS.items():
        kernels.CHUNK_T, kernels.POLICY_TILE = 8, 700
        for dtype in BOUNDS:
            for softcap in SOFTCAPS:
                case = f"{blocks}, {dtype}, {softcap}"
                found[f"tile, {case}"] = tile_errors(kernels_triton, getattr(torch, dtype), softcap)
                for T, V in SIZES if blocks == "blocks" else SIZES[:1]:
                    inputs = *draw(T, V, getattr(torch, dtype)), softcap
                    want = exact(*inputs)
                    logprob = value_and_gradients(lambda *a: kernels.linear_logprob(*a, kernels_triton), *inputs)
                    for name, got in (("logprob", logprob), ("policy", policy(*inputs, kernels_triton))):
                        found[f"{name}, {case}, {T} x {V}"] = [error(a, b) for a, b in zip(got, want)]
    print(json.dumps(found))


@pytest.fixture(scope="module")
def errors():
    pytest.importorskip("triton", reason="needs the package triton")
    path = os.pathsep.join([ROOT, os.path.dirname(os.path.abspath(__file__))])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", "import test_kernels_triton; test_kernels_triton.measure()"],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("what", ["tile", "logprob", "policy"])
def test_triton_is_right(errors, what, blocks, dtype, softcap):
    """Values and gradients: the kernels alone, then all of linear_logprob and linear_policy_loss."""
    cases = {case: each for case, each in errors.items() if case.startswith(f"{what}, {blocks}, {dtype}, {softcap}")}
    assert len(cases) == (1 if what == "tile" or blocks == "one block" else len(SIZES))
    assert {case: each for case, each in cases.items() if not all(e < BOUNDS[dtype] for e in each)} == {}
