"""parallel.py: several processes train as one does, whatever their number; what they save any number can read."""

import doctest
import json
import os
import re
import subprocess
import sys
import types
import weakref

import pytest
import torch

import checkpoints
import kernels
import lora
import model
import parallel
import rollout
import sppo
from conftest import ROOT

NAMES = ("untied", "tied", "bfloat16", "lora")
ARGS = types.SimpleNamespace(micro_batch=2, loss="sppo", eta=10.0, clip=1.0)


def test_doctests():
    assert doctest.testmod(parallel).failed == 0


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3])
def test_every_item_counts_once_and_all_make_as_many_passes(count, ranks, size):
    each = [parallel.passes(count, (rank, ranks), size) for rank in range(ranks)]
    assert len({len(mine) for mine in each}) == 1
    taken = [i for mine in each for numbers, weight in mine for i in numbers if weight]
    assert sorted(taken) == list(range(count)) and all(len(numbers) <= size for mine in each for numbers, _ in mine)
    total = sum(weight * len(numbers) for mine in each for numbers, weight in mine) / ranks
    assert total == pytest.approx(1)                                # the mean over processes is the mean over items


def network(name):
    config = checkpoints.Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
                                num_kv_heads=2, head_dim=8, max_positions=64, tied=name == "tied")
    net = model.Transformer(config).init_weights(torch.Generator().manual_seed(0))
    net.activation_checkpointing = name == "tied"
    if name == "lora":          # stays whole on each process; the adapters' gradients are averaged
        lora.add(net, 2, 4.0, lora.parts_of(net.config, "all"))
    return net.to(torch.bfloat16 if name == "bfloat16" else torch.float32)


def batch():
    """Seven prompts with two answers each: the processes' shares differ, and so do their numbers of passes."""
    g = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(1, 50, (n,), generator=g).tolist()
    return [{"prompt": ids(n), "responses": [ids(6), ids(11)], "p": [0.8, 0.2], "ref": [-23.0, -43.0]}
            for n in (7, 12, 9, 5, 6, 8, 3)]


def trained(name, shard):
    """Three steps, a sample, the saved weights and the optimizer's tensors: what the processes write for the test."""
    net, found = parallel.shard(network(name)), {"steps": []}
    optimizer = kernels.Optimizer(net.parameters(), "adamw")

    def step():
        metrics = sppo.gradient_step(net, optimizer, batch(), ARGS, 1e-3, shard)
        return metrics["loss"], metrics["grad_norm"]
    found["steps"] = [step() for _ in range(3)]
    with parallel.gathered(net):
        found["tokens"] = rollout.generate(net, [[1, 2, 3], [4, 5]], 2, 10, seeds=3, temperature=0).tokens
        if shard[0] == 0:
            weights = checkpoints.names_in(net) | dict(lora.merged(net))
            torch.save({key: tensor.clone() for key, tensor in weights.items()}, f"{name}.weights")
    parallel.save(optimizer.tensors(), f"{name}.training")
    found["next"] = step()
    again = parallel.shard(network(name))
    resumed = kernels.Optimizer(again.parameters(), "adamw")
    parallel.load(resumed.tensors(), f"{name}.training")
    resumed.round()
    net, optimizer = again, resumed
    found["resumed"] = step()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_equal_one(ranks, tmp_path, monkeypatch):
    """Losses, norms, a greedy sample, the saved weights; a resume repeats the next step to the bit, and one process can
    read what several wrote, and several what one wrote."""
    monkeypatch.chdir(tmp_path)
    run_in(f"{ranks}", ranks)
    os.mkdir("one")
    monkeypatch.chdir("one")
    for name in NAMES:
        want, got = trained(name, (0, 1)), json.load(open(f"../{ranks}/{name}.json"))
        rounding = 2e-2 if name == "bfloat16" else 1e-5
        assert want["next"] == want["resumed"] and got["next"] == got["resumed"]
        for mine, theirs in zip(want["steps"], got["steps"]):
            assert theirs == pytest.approx(list(mine), rel=rounding)
        if name != "bfloat16":
            assert got["tokens"] == want["tokens"]
        ours, others = torch.load(f"{name}.weights"), torch.load(f"../{ranks}/{name}.weights")
        assert ours.keys() == others.keys()
        # AdamW makes a step of up to 1e-3 out of a gradient that is nothing but rounding: so of a single weight the
        # whole three steps are allowed, of all together a hundredth of that; in bfloat16 what rounding the weights adds.
        difference = torch.cat([(others[key] - tensor).float().flatten() for key, tensor in ours.items()])
        largest, typical = float(difference.abs().max()), float(difference.square().mean().sqrt())
        print(f"{name}: {largest:.1e}, {typical:.1e}")
        assert largest < (1e-2 if name == "bfloat16" else 3e-3) and typical < (5e-4 if name == "bfloat16" else 1e-5)
        # one process goes on from what several saved
        optimizer = kernels.Optimizer(network(name).parameters(), "adamw")
        parallel.load(optimizer.tensors(), f"../{ranks}/{name}.training")
        mine = kernels.Optimizer(network(name).parameters(), "adamw")
        parallel.load(mine.tensors(), f"{name}.training")
        for key, tensor in mine.tensors().items():
            error = (optimizer.tensors()[key] - tensor).norm() / (tensor.norm() + 1e-12)
            assert error < (0.1 if name == "bfloat16" else 1e-3), key
    # and the other way: each process takes its shares out of the file that one wrote
    run_in("../mixed", ranks, "../one")
    assert all(json.load(open(f"../mixed/{name}.json"))["equal"] for name in NAMES)


def run_in(directory, ranks, written_by_one=""):
    os.mkdir(directory)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                           os.path.abspath(__file__), written_by_one and os.path.abspath(written_by_one)],
                          cwd=directory, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1",
                               "PYTHONPATH": os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])})
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_file_of_other_shapes_or_names_is_refused(tmp_path):
    path = str(tmp_path / "training")
    for saved in ({"a": torch.zeros(3)}, {"b": torch.zeros(1)}):
        parallel.save(saved, path)
        with pytest.raises(parallel.UserError, match="training cannot be read"):
            parallel.load({"a": torch.zeros(1)}, path)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("[../third_party/gloo/pair.cc] Connection closed by peer")])
def test_a_full_gpu_or_a_lost_process_is_no_damaged_file(error, tmp_path, monkeypatch):
    """Else a good run would be thrown away on our own advice."""
    def fails(*given, **options):
        raise error
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(type(error), match=re.escape(str(error))):
        parallel.load({}, str(tmp_path / "training"))


def test_one_process_leaves_the_network_as_it_is():
    net = network("untied")
    before = [p.clone() for p in net.parameters()]
    assert parallel.shard(net) is net and type(net) is model.Transformer
    with parallel.gathered(net):
        assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before))


def process(written_by_one):
    """What each of several processes does."""
    rank, ranks, _ = parallel.init_ranks(torch.device("cpu"))
    for name in NAMES:
        if written_by_one:
            net = parallel.shard(network(name))
            optimizer, path = kernels.Optimizer(net.parameters(), "adamw"), f"{written_by_one}/{name}.training"
            parallel.load(optimizer.tensors(), path)
            whole = torch.load(path)
            found = {"equal": all(torch.equal(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor,
                                              whole[key]) for key, tensor in optimizer.tensors().items())}
        else:
            found = trained(name, (rank, ranks))
        if rank == 0:
            with open(f"{name}.json", "w") as file:
                json.dump(found, file)
    patient = weakref.ref(parallel.Ranks.patient)
    parallel.leave()
    assert patient() is None            # and with it its threads


if __name__ == "__main__":
    process(sys.argv[1])
