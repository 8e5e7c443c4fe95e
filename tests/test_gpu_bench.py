"""bench.py decode, train and gpu, as far as a CPU can tell."""

import pytest
import torch

import bench
import run
from benchmarks import gpu, timing

CPU = ["--model", "tiny", "--device", "cpu", "--rounds", "1"]


def numbers(out):
    """The table's rows, words each."""
    return [line.split() for line in out.splitlines() if line.split()[0].isdigit()]


def test_decode_prints_a_line_for_each_number_of_rows(capsys):
    bench.main(["decode", *CPU, "--length", "40"])
    rows = numbers(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["2", "8"] and all(float(row[1]) > 0 and row[3].endswith("%") for row in rows)


def test_train_counts_products_of_layers_and_head(monkeypatch, capsys):
    """With a clock that always says a second and a rate of 1e9, the share is the number of operations / 1e9."""
    monkeypatch.setattr(timing, "median_seconds", lambda calls, rounds, device: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(gpu, "ceilings", lambda device, dtype: (1e9, 1e9))
    bench.main(["train", *CPU, "--length", "30"])
    rows = numbers(capsys.readouterr().out)
    body = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128 + 2 * 64)         # qkv, o, gate_up and down, two norms
    for row, (N, n) in zip(rows, ((1, 2), (4, 2), (4, 8)), strict=True):
        tokens, answers = N * (10 + n * 20), N * n * 20
        assert row[3] == str(tokens)
        assert row[5] == f"{6 * (body * tokens + 64 * 512 * answers) / 1e9:.0%}"


def test_a_decoding_run_makes_as_many_tokens_as_it_says():
    net = gpu.random_net("tiny", torch.device("cpu"), torch.float32)
    call, held = gpu.decoding(net, 3, 20, 5)
    made = call()
    assert [len(row) for row in made] == [5] * 3 and 3 * 10 <= held < 3 * 20 and call() == made
    assert all(0 <= token < 512 for row in made for token in row) and any(map(any, made))


def test_gpu_is_refused_without_one():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(run.UserError, match="NVIDIA GPU"):
        bench.main(["gpu"])


@pytest.mark.slow
def test_gpu_writes_what_the_commands_print(monkeypatch, tmp_path):
    """Two that end, one of them badly, one that takes too long, and one for which no time is left."""
    monkeypatch.setattr(run, "device_and_dtype", lambda *given: (torch.device("cuda"), torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    endless = tmp_path / "endless.py"
    endless.write_text("print('begun', flush=True)\nwhile True:\n    pass\n")
    monkeypatch.setattr(gpu, "COMMANDS", ("-c print(1+1)", "-c 1/0", str(endless), "-c print('late')"))
    out = str(tmp_path / "gpu.md")
    monkeypatch.setattr(gpu, "LEAST", 0.3)
    bench.main(["gpu", "--out", out, "--seconds", "2"])
    text = open(out).read()
    assert "a GPU, torch" in text and "```\n2\n```" in text
    assert "exit status 1" in text and "ZeroDivisionError" in text
    assert "begun\n\nstopped after" in text and "left out: no time" in text and "late\n```" not in text
