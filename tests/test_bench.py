"""bench.py: its checks say ok of what is right and WRONG of what is not, its tables have a line for everyone."""

import doctest
import math
import os
import subprocess
import sys

import pytest
import torch

import bench
import checkpoints
import kernels
import model
import rollout
import run
from conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_T", 8)
    monkeypatch.setattr(kernels, "CHUNK_V", 16)


def test_doctests():
    assert doctest.testmod(bench).failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# the checks


def test_right_kernels_are_ok(small_tiles, capsys):
    bench.check_kernels(CPU)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["ok", name, dtype] for dtype in ("float32", "bfloat16")
                                                    for name in ("linear_logprob", "linear_policy_loss")]


@pytest.mark.parametrize("name", ["linear_logprob", "linear_policy_loss"])
def test_a_wrong_kernel_ends_the_program(small_tiles, capsys, monkeypatch, name):
    """A value that is right but for a thousandth, with its gradient: beyond float32's bound, within bfloat16's."""
    real = getattr(kernels, name)

    def off(*arguments):
        out = real(*arguments)
        return tuple(1.001 * x for x in out) if isinstance(out, tuple) else 1.001 * out

    monkeypatch.setattr(kernels, name, off)
    with pytest.raises(SystemExit) as error:
        bench.check_kernels(CPU)
    last = capsys.readouterr().out.splitlines()[-1]
    assert error.value.code == 1 and last.startswith(f"WRONG  {name}") and "float32" in last


@pytest.fixture(scope="module")
def net():
    config = checkpoints.Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
                          num_kv_heads=2, head_dim=8, max_positions=64)
    return model.Transformer(config).init_weights(torch.Generator().manual_seed(0))


def test_greedy_is_right_sees_a_wrong_token_and_a_missing_one(net, monkeypatch):
    prompts = [[1 + b, 2, 3 + b] for b in range(8)]
    assert bench.greedy_is_right(net, prompts, steps=10)
    real = rollout.generate

    def spoilt(spoil):
        def generate(*arguments, **options):
            samples = real(*arguments, **options)
            spoil(samples.tokens[3][0])
            return samples
        monkeypatch.setattr(rollout, "generate", generate)
        return bench.greedy_is_right(net, prompts, steps=10)

    assert not spoilt(lambda tokens: tokens.__setitem__(4, (tokens[4] + 1) % 50))
    assert not spoilt(lambda tokens: tokens.pop())


# ---------------------------------------------------------------------------------------------------------------------
# the timing


def test_the_median_of_interleaved_rounds(monkeypatch):
    """Every round calls each contestant once, in turn, and one slow round does not count."""
    called, durations = [], iter([9, 1, 2, 1, 2, 8])
    monkeypatch.setattr(bench, "seconds", lambda call, device: call() or next(durations))
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    assert bench.median_seconds(calls, 3, CPU) == {"a": 2, "b": 1}
    assert "".join(called) == "ababab"


def test_peak_megabytes_sees_a_tensor_that_comes_and_goes():
    peak = bench.peak_megabytes(lambda: torch.ones(64 * 2**18).sum(), CPU)                # 64 MB
    assert math.isnan(peak) or 60 < peak < 100


def test_the_table_of_kernels_names_everyone(capsys):
    bench.time_kernels(bench.KernelSettings(tokens=4, hidden=8, vocab=30), torch.float32, CPU)
    out = capsys.readouterr().out
    both, forward = out.split("forward only:")
    for name in ("bare matrix products", "linear_logprob", "reference"):
        assert name in both and name in forward
    assert "linear_policy_loss" in both and "linear_policy_loss" not in forward


def test_the_workload_is_ragged_with_a_long_tail():
    prompts, lengths = bench.workload(512)
    every = [length for row in lengths for length in row]
    assert {len(p) for p in prompts} <= set(range(64, 129)) and len(every) == 80
    assert min(every) >= 8 and max(every) == 256 and 0.2 < sum(every) / (80 * 256) < 0.35
    assert (prompts, lengths) == bench.workload(512)


@pytest.fixture
def short_step(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "tiny", (2, 16, 2, 2, 32, 40))
    monkeypatch.setattr(bench, "PROMPT", 5)
    monkeypatch.setattr(bench, "ANSWERS", {"a long tail": (1, 9), "equal": (4, 4)})
    return lambda: bench.main(["step", "--rounds", "1", "--device", "cpu"])


def test_a_step_is_compared_with_padded_rows(short_step, capsys):
    short_step()
    out = capsys.readouterr().out
    assert out.count("ok  ") == 2 and "10 in all" in out and "8 in all" in out
    for name in ("bare matrix products", "model.response_logprobs", "the same in one rectangle", "rows of prompt and"):
        assert out.count(name) == 2


def test_a_wrong_step_ends_the_program(short_step, monkeypatch, capsys):
    """A response that does not see its prompt's last token."""
    real = bench.model.response_logprobs
    monkeypatch.setattr(bench.model, "response_logprobs", lambda net, prompts, responses: real(
        net, [prompt[:-1] for prompt in prompts], responses))
    with pytest.raises(SystemExit):
        short_step()
    assert "WRONG  a long tail" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def python(*arguments, cwd):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)


def test_help_is_light(tmp_path):
    """Neither --help waits for transformers."""
    code = (f"import sys; sys.path.insert(0, {ROOT!r}); import bench; bench.main(['--help'])\n"
            "try:\n    bench.main(['rollout', '--help'])\n"
            "except SystemExit: print('transformers' in sys.modules)")
    done = python("-c", code, cwd=tmp_path)
    assert "python bench.py kernels" in done.stdout and "--rounds" in done.stdout
    assert done.stdout.split()[-1] == "False", done.stderr


@pytest.mark.parametrize("argv, says", [
    (["sampling"], "sampling is no command of bench.py; give one of kernels, rollout, step"),
    (["kernels", "--tokens", "0"], "--tokens 0 must be at least 1"),
    (["kernels", "--hidden", "-1"], "--hidden -1 must be at least 1"),
    (["kernels", "--vocab", "0"], "--vocab 0 must be at least 1"),
    (["rollout", "--rounds", "0"], "--rounds 0 must be at least 1"),
    (["rollout", "--device", "nowhere"], "--device nowhere")])
def test_bad_commands(argv, says):
    with pytest.raises(run.UserError) as error:
        bench.main(argv)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["kernels --tokens 64 --hidden 64 --vocab 9000", "rollout --rounds 1",
                                     "step --rounds 1"])
def test_self_checks(command, tmp_path):
    result = python(os.path.join(ROOT, "bench.py"), *command.split(), cwd=tmp_path)
    assert result.returncode == 0 and "ok" in result.stdout and "WRONG" not in result.stdout, result.stderr[-2000:]
