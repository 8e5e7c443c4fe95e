"""bench.py: its checks say ok of what is right and WRONG of what is not, its tables have a line for everyone."""

import doctest
import math
import os
import subprocess
import sys
import types

import pytest
import torch

import bench
import checkpoints
import kernels
import model
import rollout
import run
from benchmarks import growth, steps, timing
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
    monkeypatch.setattr(timing, "seconds", lambda call, device: call() or next(durations))
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    assert timing.median_seconds(calls, 3, CPU) == {"a": 2, "b": 1}
    assert "".join(called) == "ababab"


def test_peak_megabytes_sees_a_tensor_that_comes_and_goes():
    peak = timing.peak_megabytes(lambda: torch.ones(64 * 2**18).sum(), CPU)                # 64 MB
    assert math.isnan(peak) or 60 < peak < 100


def test_the_table_of_kernels_names_everyone(capsys):
    bench.time_kernels(bench.KernelSettings(tokens=4, hidden=8, vocab=30), torch.float32, CPU)
    out = capsys.readouterr().out
    both, forward = out.split("forward only:")
    for name in ("bare matrix products", "linear_logprob", "reference"):
        assert name in both and name in forward
    assert "linear_policy_loss" in both and "linear_policy_loss" not in forward


@pytest.mark.parametrize("triton", [True, False])
def test_on_cuda_the_kernels_climb_a_ladder(small_tiles, monkeypatch, capsys, triton):
    """Emulated: CUDA's contestants on a CPU, where each rung is checked before it is timed. What stands for compiled
    functions and for kernels_triton counts its calls."""
    calls = []

    def counting(name, function):
        return lambda *arguments: calls.append(name) or function(*arguments)

    stand_in = types.SimpleNamespace(**{k: counting("Triton", f) for k, f in vars(kernels.PLAIN).items()})
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: counting("compiled", function))
    real = bench.log_probabilities
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "tile_functions", lambda device: stand_in if triton else kernels.PLAIN)
        contestants = real(torch.device("cuda"))
    rungs = ["plain", "compiled", "Triton"] if triton else ["plain"]
    assert list(contestants) == ["reference", *(f"{function} {rung}" for function in (
        "linear_logprob", "linear_policy_loss") for rung in rungs)]
    monkeypatch.setattr(bench, "log_probabilities", lambda device: contestants)
    bench.check_kernels(CPU)
    assert capsys.readouterr().out.count("ok  ") == 2 * len(contestants) and set(calls) == set(rungs) - {"plain"}
    bench.time_kernels(bench.KernelSettings(tokens=4, hidden=8, vocab=30), torch.float32, CPU)
    both, forward = capsys.readouterr().out.split("forward only:")
    assert all(name in both and (name in forward) is not name.startswith("linear_policy") for name in contestants)
    assert len({line.rindex(line.split()[-1]) + len(line.split()[-1]) for line in both.splitlines()[3:]}) == 1


def test_the_workload_is_ragged_with_a_long_tail():
    prompts, lengths = bench.workload(512)
    every = [length for row in lengths for length in row]
    assert {len(p) for p in prompts} <= set(range(64, 129)) and len(every) == 80
    assert min(every) >= 8 and max(every) == 256 and 0.2 < sum(every) / (80 * 256) < 0.35
    assert (prompts, lengths) == bench.workload(512)


@pytest.fixture
def short_packing(monkeypatch):
    monkeypatch.setitem(timing.SIZES, "tiny", (2, 16, 2, 2, 32, 40))
    monkeypatch.setattr(steps, "PROMPT", 5)
    monkeypatch.setattr(steps, "ANSWERS", {"a long tail": (1, 9), "equal": (4, 4)})
    return lambda: bench.main(["packing", "--rounds", "1", "--device", "cpu"])


def test_packing_is_compared_with_padded_rows(short_packing, capsys):
    short_packing()
    out = capsys.readouterr().out
    assert out.count("ok  ") == 2 and "10 in all" in out and "8 in all" in out
    for name in ("bare matrix products", "model.response_logprobs", "the same in one rectangle", "rows of prompt and"):
        assert out.count(name) == 2


def test_wrong_packing_ends_the_program(short_packing, monkeypatch, capsys):
    """A response that does not see its prompt's last token."""
    real = bench.model.response_logprobs
    monkeypatch.setattr(bench.model, "response_logprobs", lambda net, prompts, responses: real(
        net, [prompt[:-1] for prompt in prompts], responses))
    with pytest.raises(SystemExit):
        short_packing()
    assert "WRONG  a long tail" in capsys.readouterr().out


SMALL_STEP = ["step", "--rounds", "3", "--device", "cpu"]


@pytest.fixture
def small_batch(monkeypatch):
    """A model and a batch that take milliseconds."""
    monkeypatch.setitem(timing.SIZES, "tiny", (2, 16, 2, 2, 32, 40))
    for loss in ("grpo", "sppo"):
        monkeypatch.setitem(steps.BATCHES, (loss, "tiny"), (3, 2, 5, 33))


@pytest.mark.parametrize("loss", ["grpo", "sppo"])
@pytest.mark.parametrize("lengths", ["equal", "tail"])
def test_a_step_without_trl_stands_beside_the_floor(loss, lengths, small_batch, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    bench.main([*SMALL_STEP, "--loss", loss, "--lengths", lengths])
    out = capsys.readouterr().out
    assert "pip install trl" in out and f"ok  {loss}, {lengths}" in out
    rows = {line[:28].strip(): line[28:].split() for line in out.splitlines() if line.startswith("  ")}
    assert rows.keys() == {"bare matrix products", "this project"}
    assert rows["bare matrix products"][1] == "1.00" and len(rows["this project"]) == 3


def test_a_batch_has_the_lengths_that_it_names(small_batch):
    for lengths in ("equal", "tail"):
        batch = steps.Batch(steps.StepSettings(lengths=lengths), 40)
        assert batch.lengths[0][0] == 33 and batch.count == sum(map(sum, batch.lengths))
        assert (batch.count == 3 * 2 * 33) is (lengths == "equal")
        for group, drawn in zip(batch.answers, batch.lengths):
            assert list(map(len, group)) == drawn and all(ids[-1] == steps.END for ids in group)
            assert all(steps.END not in ids[:-1] for ids in group)


@pytest.mark.parametrize("loss", ["grpo", "sppo"])
def test_our_steps_train(loss, small_batch, net):
    """Every parameter moves, and the reference does not."""
    batch = steps.Batch(steps.StepSettings(loss=loss, lengths="tail"), 40)
    nets = [model.Transformer(net.config).init_weights(torch.Generator().manual_seed(0)) for _ in range(2)]
    before = [p.clone() for p in nets[0].parameters()]
    {"grpo": steps.our_grpo_step, "sppo": steps.our_sppo_step}[loss](*nets, batch)()
    assert all(not torch.equal(p, old) for p, old in zip(nets[0].parameters(), before))
    assert all(torch.equal(p, old) for p, old in zip(nets[1].parameters(), before))


def test_trl_ends_its_rows_where_the_batch_does():
    """transformers' own generate, with a model that would never choose the end token, and one that always would."""
    import transformers

    config = transformers.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                      num_attention_heads=1, num_key_value_heads=1, bos_token_id=None,
                                      eos_token_id=steps.END, pad_token_id=0)
    hf = transformers.LlamaForCausalLM(config).eval()
    out = steps.ended_at(hf.generate, [[2, 4], [1, 3]])(torch.full((4, 3), 5), attention_mask=torch.ones(4, 3).long(),
                                                        do_sample=True, max_new_tokens=4)[:, 3:]
    ends = [(row == steps.END).nonzero().flatten().tolist()[0] + 1 for row in out]
    assert ends == [2, 4, 1, 3] and out.shape[1] == 4


@pytest.mark.slow
def test_growth_draws_four_panels(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(timing.SIZES, "tiny", (2, 16, 2, 2, 32, 600))
    for name, sizes in {"ROWS": (1, 3), "LENGTHS": (4, 9), "ANSWERS": (1, 2), "VOCABULARIES": (50, 90)}.items():
        monkeypatch.setattr(growth, name, sizes)
    picture = str(tmp_path / "growth.png")
    bench.main(["growth", "--rounds", "1", "--device", "cpu", "--picture", picture])
    out = capsys.readouterr().out
    for text in ("3 rows: ", "9 tokens in cache: ", "padded rows    1 answers", "90 vocabulary: "):
        assert text in out
    assert os.path.getsize(picture) > 10_000


def test_a_busy_machine_is_told(monkeypatch, capsys):
    for load, told in ((0.5, False), (1000.0, True)):
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
        timing.say_if_busy()
        assert ("busy: load average 1000.0" in capsys.readouterr().out) is told


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
    (["sampling"], "sampling is no command of bench.py; give one of kernels, rollout, packing, step, growth"),
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
                                     "packing --rounds 1", "step --rounds 1", "growth --rounds 1",
                                     "step --loss sppo --lengths tail --rounds 1"])
def test_self_checks(command, tmp_path):
    result = python(os.path.join(ROOT, "bench.py"), *command.split(), cwd=tmp_path)
    checked = "ok" in result.stdout or command.startswith("growth")
    assert result.returncode == 0 and checked and "WRONG" not in result.stdout, result.stderr[-2000:]
