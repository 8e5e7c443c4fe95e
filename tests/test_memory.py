"""memory.py: the plan's parts are what the tensors really take, and what does not fit is said."""

import types

import pytest
import torch

import checkpoints
import kernels
import lora
import lsp
import memory
import model
import run
import sppo

SMALL = checkpoints.Config(vocab_size=300, hidden_size=64, intermediate_size=160, num_layers=6, num_heads=8,
                           num_kv_heads=4, head_dim=8, max_positions=256, tied=True)


def net(dtype=torch.float32):
    return model.Transformer(SMALL).init_weights(torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("name, billions", [
    ("mistralai/Mistral-7B-Instruct-v0.2", 7.242), ("meta-llama/Meta-Llama-3-8B-Instruct", 8.030),
    ("google/gemma-2-9b-it", 9.242), ("meta-llama/Llama-3.2-3B-Instruct", 3.213)])
def test_the_presets_shapes_have_the_published_size(name, billions):
    assert memory.parameters(memory.config_of(name)) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_every_preset_has_a_shape():
    for preset in [*sppo.PRESETS.values(), *lsp.PRESETS.values()]:
        assert preset["model"] in memory.SHAPES


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def arguments(**changed):
    return types.SimpleNamespace(**dict(lora=0, lora_alpha=0.0, lora_layers="all", max_rows=5, max_new_tokens=20,
                                        micro_batch=3, activation_checkpointing=False, dtype="auto", seed=0) | changed)


def planned(args, dtype, ranks=1, **changed):
    return memory.plan(SMALL, args, dtype, ranks, **dict(answers=2, prompt=30, answer=20, width=50, moments=8,
                                                         judges=[]) | changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name, moments", [("adamw", 8), ("rmsprop", 4)])
def test_weights_masters_and_moments_are_the_real_ones(dtype, rank, name, moments):
    args, trained = arguments(lora=rank), net(dtype)
    plan = planned(args, dtype, moments=moments)["train"]
    base = size(trained.parameters())
    lora.adapt(trained, args)
    optimizer = kernels.Optimizer(trained.parameters(), name)
    tensors = optimizer.tensors()
    masters = [t for key, t in tensors.items() if key.endswith("master")]
    held = [t for key, t in tensors.items() if not key.endswith(("master", "step"))]
    assert plan["weights"] == base and plan["moments"] == size(held)
    assert plan["float32 masters"] == (0 if dtype == torch.float32 and not rank else size(masters))


def test_the_cache_is_the_samplers_own_bytes():
    cache = model.KVCache(SMALL, 5, 50, "cpu", torch.bfloat16)
    assert memory.cache_bytes(SMALL, 5, 50, torch.bfloat16) == size([cache.k, cache.v])
    prefill = memory.cache_bytes(SMALL, 1, memory.PREFILL, torch.bfloat16)
    assert planned(arguments(), torch.bfloat16)["sample"]["KV cache"] == size([cache.k, cache.v]) + prefill


@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_are_what_the_backward_pass_keeps(checkpointed):
    """Within a third: every tensor that is saved for it, each storage once, weights left out. Checkpointed these are
    the layers' inputs; the estimate adds a layer that is computed again in the backward pass."""
    trained, kept = net(), {}
    trained.activation_checkpointing = checkpointed
    weights = {p.untyped_storage().data_ptr() for p in trained.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    view = model.SharedPrefix([list(range(1, 31))] * 3, [[list(range(20))] * 2] * 3, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = trained(view.tokens, view)
    saved = sum(storage.nbytes() for storage in kept.values())
    estimate = memory.activation_bytes(SMALL, len(view.tokens), torch.float32, checkpointed)
    inputs = 4 * len(view.tokens) * SMALL.num_layers * SMALL.hidden_size
    assert hidden.requires_grad and inputs < saved
    assert saved < 1.5 * inputs < estimate if checkpointed else 0.67 < saved / estimate < 1.5


def test_several_gpus_share_what_is_trained_but_not_the_cache():
    one, eight = (planned(arguments(), torch.bfloat16, ranks) for ranks in (1, 8))
    for what in ("float32 masters", "moments"):
        assert eight["train"][what] == pytest.approx(one["train"][what] / 8, rel=1e-3)
    assert eight["train"]["weights"] < one["train"]["weights"] == one["sample"]["weights"]
    assert eight["sample"] == one["sample"]


def test_a_frozen_reference_costs_its_weights_but_not_with_adapters():
    plain, reference = (planned(arguments(), torch.bfloat16, reference=held, between=held) for held in (False, True))
    assert reference["train"]["frozen reference"] == plain["train"]["weights"]
    assert reference["sample"]["moments"] == plain["train"]["moments"] and "moments" not in plain["sample"]
    assert "frozen reference" not in planned(arguments(lora=2), torch.bfloat16, reference=True)["train"]


def test_validation_holds_the_optimizer_and_a_whole_network():
    plan = planned(arguments(), torch.bfloat16, 4, validates=True)
    assert plan["validate"] == plan["sample"] | {what: plan["train"][what] for what in ("float32 masters", "moments")}


def test_an_adapter_is_planned_by_its_base(tmp_path):
    net_ = net()
    net_.config.raw.update(model_type="llama", vocab_size=300, hidden_size=64, intermediate_size=160,
                           num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=8,
                           tie_word_embeddings=True, max_position_embeddings=256)
    net_.save_pretrained(str(tmp_path / "base"))
    lora.adapt(net_, arguments(lora=2))
    lora.save(net_, str(tmp_path / "adapter"), str(tmp_path / "base"))
    assert memory.config_of(str(tmp_path / "adapter")).num_layers == 6


def test_judges_count_by_their_kind():
    bytes_of = [memory.judge_bytes(judge, torch.bfloat16) for judge in (
        "oracle", "python:file.py:score", "", "pairrm:llm-blender/PairRM",
        "reward:Skywork/Skywork-Reward-V2-Llama-3.2-3B")]
    assert bytes_of[:3] == [0, 0, 0] and bytes_of[3] == 870_000_000 and 6.4e9 < bytes_of[4] < 6.5e9


def test_a_classifier_of_another_family_counts_by_its_files(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    (tmp_path / "model.safetensors").write_bytes(bytes(1234))
    assert memory.judge_bytes(f"reward:{tmp_path}", torch.bfloat16) == 1234


@pytest.mark.parametrize("script, flags, model_name", [
    (sppo, ["--preset", "llama-3-8b"], "Meta-Llama-3-8B"), (lsp, ["--preset", "paper"], "Llama-3.2-3B"),
    (sppo, ["--preset", "mistral-7b", "--lora", "16"], "Mistral-7B")])
def test_plan_prints_and_ends_without_a_file(script, flags, model_name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        script.main([*flags, "--plan"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and model_name in out and "--lora 16" in out and list(tmp_path.iterdir()) == []
    parts, total = {}, {}
    for line in out.splitlines()[1:]:
        if line.endswith(":"):
            phase = line[:-1]
        elif line.startswith("  together"):
            total[phase] = [float(number) for number in line.split()[-4:]]
        elif line.startswith("  "):
            parts.setdefault(phase, []).append([float(number) for number in line.split()[-4:]])
    for phase, rows in parts.items():
        assert total[phase] == pytest.approx([sum(column) for column in zip(*rows)], abs=0.5)


def test_adapters_fit_where_all_weights_do_not(capsys):
    """The two papers' models on a GPU of 24 GB."""
    for script, flags in ((sppo, ["--preset", "llama-3-8b", "--max-rows", "24"]),
                          (lsp, ["--preset", "paper", "--max-rows", "16", "--micro-batch", "1"])):
        most = []
        for more in ([], ["--lora", "16"]):
            with pytest.raises(SystemExit):
                script.main([*flags, *more, "--plan"])
            lines = capsys.readouterr().out.splitlines()
            most.append(max(float(line.split()[1]) for line in lines if line.startswith("  together")))
        assert most[1] < 0.95 * 24 < most[0]


def test_what_does_not_fit_is_said_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(memory, "config_of", lambda name: SMALL)
    args, cuda = arguments(model="here", plan=False), torch.device("cuda")
    shape = dict(answers=2, prompt=30, answer=20, width=50, moments=8, judges=[])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    for free, told in ((2**40, ""), (1000, "GB, and 0 GB are free")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
        memory.before(args, cuda, torch.bfloat16, 1, **shape)
        out = capsys.readouterr().out
        assert told in out and bool(out) is bool(told) and ("--lora" in out) is bool(told)


def test_what_cannot_be_planned_is_not_refused(monkeypatch, capsys):
    """A model whose shape is unknown: the run itself will say what is wrong with it, if anything is."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    args = arguments(model="./nowhere", plan=False)
    memory.before(args, torch.device("cuda"), torch.bfloat16, 1, answers=2, prompt=30, answer=20, width=50, moments=8,
                  judges=[])
    assert capsys.readouterr().out == ""
    with pytest.raises(run.UserError, match="nowhere"):
        memory.before(arguments(model="./nowhere", plan=True), torch.device("cpu"), torch.float32, 1)


def test_an_allocation_that_fails_ends_with_the_remedies(capsys):
    def fails(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    with pytest.raises(SystemExit) as end:
        run.main(fails)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "Tried to allocate" in said and "--lora 16" in said and said.count("\n") == 1
