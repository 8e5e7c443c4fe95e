"""--compile: torch.compile fuses a layer's element-wise work in training, and changes nothing else."""

import shutil

import pytest
import torch

import checkpoints
import lsp
import model
import sppo
from test_sppo import argv


def compared_with_compiled(checkpointing=False):
    """(log-probabilities and gradients of a plain net, those of a compiled one), for two batches of other lengths."""
    found = []
    for compiled in (False, True):
        net = tiny_net()
        net.activation_checkpointing = checkpointing
        if compiled:
            net.compile_layers()
        rows = []
        for n in (3, 7):
            net.zero_grad()
            value = model.response_logprobs(net, [[1, 2, 3], [4] * n], [[[5] * n, [6, 7]], [[8] * 4]])[0]
            value.square().sum().backward()
            rows += [value.detach(), *(p.grad.clone() for p in net.parameters())]
        found.append(rows)
    return found


def tiny_net():
    config = checkpoints.Config(vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
                                num_kv_heads=2, head_dim=8, max_positions=64)
    return model.Transformer(config).init_weights(torch.Generator().manual_seed(0))


def test_compiled_layers_serve_training_alone(monkeypatch):
    """Each layer is handed to torch.compile once; what comes back is called with gradient and never without."""
    calls = []

    def compile(function, dynamic):
        assert dynamic
        return lambda *inputs: calls.append(1) or function(*inputs)
    monkeypatch.setattr(torch, "compile", compile)
    plain, compiled = compared_with_compiled()
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled)) and len(calls) == 2 * 2
    net = tiny_net()
    net.compile_layers()
    with torch.no_grad():
        net(torch.tensor([[1, 2, 3]]))
    assert len(calls) == 2 * 2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same(checkpointing):
    torch._dynamo.reset()
    for a, b in zip(*compared_with_compiled(checkpointing)):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("script", [sppo, lsp])
def test_the_flag_compiles_what_is_trained(script, base, monkeypatch, tmp_path):
    """All layers of one network, and it is used."""
    calls, made = [], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: made.append(1) or (
        lambda *inputs: calls.append(1) or function(*inputs)))
    settings = {sppo: dict(iterations=1, prompts_per_iteration=4, epochs=1, batch_size=4, k=2, validation_prompts=2),
                lsp: dict(steps=1, queries=2, answers=2)}[script]
    script.main(argv(model=base, out="run", compile=True, test_prompts=2, max_new_tokens=4, device="cpu", **settings))
    assert len(made) == len(model.Transformer.from_pretrained(base).layers) and calls
