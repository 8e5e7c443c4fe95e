"""lora.py: adapters against the base and against the merged weights, PEFT's files both ways, and small runs of both
scripts: whole, interrupted, on two processes; what is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers

import checkpoints
import eval
import kernels
import lora
import lsp
import model
import rollout
import sppo
from chat import load_checkpoint
from conftest import ROOT, Killed
from run import UserError
from test_lsp import without_clock
from test_model import FAMILIES
from test_sppo import argv, contents, lines, same_files

pytestmark = pytest.mark.usefixtures("elsewhere")

ROW = torch.tensor([[5, 9, 33, 7, 60, 2, 18, 4, 4, 51, 12, 40]])
ALL = "q,k,v,o,gate,up,down"


@pytest.fixture(scope="module")
def random_checkpoints(tmp_path_factory):
    """{family: directory}: a tied head and grouped queries, a bias on qkv, two windows and caps, fused weights."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made = {}
    for family in ("llama", "qwen2", "gemma2", "phi3"):
        torch.manual_seed(0)
        hf = transformers.AutoModelForCausalLM.from_config(FAMILIES[family])
        with torch.no_grad():
            for name, p in hf.named_parameters():
                if "norm" not in name:
                    p.normal_(0, 0.3)
        made[family] = str(tmp_path_factory.mktemp(family) / "hf")
        hf.save_pretrained(made[family])
    return made


@pytest.fixture(params=["llama", "qwen2", "gemma2", "phi3"])
def directory(request, random_checkpoints):
    return random_checkpoints[request.param]


def adapted(directory, layers="all", r=3, alpha=5.0, stir=True, dtype=torch.float32):
    """The checkpoint with adapters; stir: with numbers in B, as training leaves them."""
    net = model.Transformer.from_pretrained(directory, dtype=dtype)
    lora.add(net, r, alpha, lora.parts_of(net.config, layers), seed=1)
    if stir:
        generator = torch.Generator().manual_seed(2)
        for _, _, each in lora.adapted(net):
            each.B.data.normal_(0, 0.2, generator=generator)
    return net


def trained(net):
    """The parameters that are trained, a list."""
    return [p for p in net.parameters() if p.requires_grad]


def logits(net):
    """[T, V] of ROW."""
    return net.logits(net(ROW))[0]


# ---------------------------------------------------------------------------------------------------------------------
# the arithmetic


@torch.no_grad()
def test_training_begins_at_the_base_to_the_bit(directory):
    base = model.Transformer.from_pretrained(directory)
    assert torch.equal(logits(adapted(directory, stir=False)), logits(base))


@torch.no_grad()
def test_with_the_adapters_off_it_is_the_base_to_the_bit(directory):
    base, net = model.Transformer.from_pretrained(directory), adapted(directory)
    with lora.reference(net):
        assert torch.equal(logits(net), logits(base))
    ref, prompts = lora.Reference(net), [[5, 9, 33], [7, 1, 2, 3]]
    assert torch.equal(logits(ref), logits(base)) and not torch.allclose(logits(net), logits(base), atol=0.1)
    assert rollout.generate(ref, prompts, 2, 9, seeds=3).logprobs == rollout.generate(base, prompts, 2, 9,
                                                                                       seeds=3).logprobs
    ours, theirs = (model.response_logprobs(each, prompts, [[[8, 9]], [[4]]])[0] for each in (ref, base))
    assert torch.equal(ours, theirs) and net.lora.on


def test_the_reference_takes_no_gradients_and_comes_back_after_an_error(random_checkpoints):
    net = adapted(random_checkpoints["llama"])
    assert not lora.Reference(net)(ROW).requires_grad and net(ROW).requires_grad
    with pytest.raises(IndexError):
        lora.Reference(net)(torch.tensor([[61]]))           # an id beyond the vocabulary
    assert net.lora.on


@pytest.mark.parametrize("layers", ["q,v", "gate", "o,down,k", ALL])
def test_the_formula(layers, random_checkpoints):
    """W + (alpha / r) B A for each part by itself, in float64; a part without an adapter stays to the bit."""
    base, net = model.Transformer.from_pretrained(random_checkpoints["qwen2"]), adapted(random_checkpoints["qwen2"],
                                                                                        layers)
    before, tensors, x = checkpoints.names_in(base), lora.tensors(net), torch.randn(7, 32)
    got = before | dict(lora.merged(net))
    for name, weight in before.items():
        A, B = (tensors.get(f"base_model.model.{name[:-7]}.lora_{kind}.weight") for kind in "AB")
        if A is None:
            assert torch.equal(got[name], weight)
        else:
            want = weight.double() + 5 / 3 * B.double() @ A.double()
            torch.testing.assert_close(got[name].double(), want, atol=1e-6, rtol=1e-6)
            assert float((want - weight).abs().max()) > 0.01
    chosen = {name.split(".")[-3].removesuffix("_proj") for name in tensors}
    assert chosen == set(layers.split(",")) and len(tensors) == 2 * 3 * len(chosen)
    with torch.no_grad():
        torch.testing.assert_close(net.layers[1].qkv(x), x @ torch.cat([
            got[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]).T + base.layers[1].qkv.bias)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_to_the_adapters_alone(checkpointing, directory):
    """They are those of W, by the chain rule: dL/dB = scale dL/dW A^T, dL/dA = scale B^T dL/dW; and computing the
    layers again in the backward pass changes nothing, with inputs that have no gradient."""
    net = adapted(directory)
    merged = lora.merge(adapted(directory))
    net.activation_checkpointing = checkpointing
    for each in (net, merged):
        model.response_logprobs(each, [[5, 9, 33]], [[[7, 60, 2], [18, 4]]])[0].sum().backward()
    assert {name.split(".")[-1] for name, p in net.named_parameters() if p.grad is not None} == {"A", "B"}
    assert trained(net) == [p for p in net.parameters() if p.grad is not None]
    slopes = {}
    for i, layer in enumerate(merged.layers):
        for product, sizes in checkpoints.products(merged.config).items():
            for part, slope in zip(sizes, getattr(layer, product).weight.grad.split(list(sizes.values()))):
                slopes[i, part] = slope
    for i, _, each in lora.adapted(net):
        pairs, slopes_of_pairs = each.pairs(each.A, each.B), each.pairs(each.A.grad, each.B.grad)
        for part, (A, B), (dA, dB) in zip(each.chosen, pairs, slopes_of_pairs, strict=True):
            torch.testing.assert_close(dB, 5 / 3 * slopes[i, part] @ A.T, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(dA, 5 / 3 * B.T @ slopes[i, part], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_merged_is_the_same_model(directory):
    net = adapted(directory)
    before, state = logits(net), {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.save_pretrained("merged")
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items()) and net.lora.on
    again = model.Transformer.from_pretrained("merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("merged", attn_implementation="eager")(ROW).logits[0]
    for after in (logits(again), logits(lora.merge(net)), theirs):
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-5)
    assert net.lora is None and len(trained(net)) == len(list(net.parameters()))


def test_adapters_of_a_bfloat16_model_are_float32(random_checkpoints):
    """A step of 1e-6 moves them; the base stays to the bit; merged, W + scale B A is rounded once."""
    net = adapted(random_checkpoints["llama"], dtype=torch.bfloat16)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = kernels.Optimizer(trained(net), "adamw")
    model.response_logprobs(net, [[5, 9]], [[[7, 60, 2]]])[0].sum().backward()
    optimizer.step(1e-6, 0)
    for name, tensor in net.state_dict().items():
        is_adapter = name.endswith((".A", ".B"))
        assert tensor.dtype == (torch.float32 if is_adapter else torch.bfloat16)
        assert torch.equal(tensor, state[name]) != is_adapter, name
    each, = [each for i, name, each in lora.adapted(net) if (i, name) == (0, "o")]
    exact = (each.weight.double() + 5 / 3 * each.B.double() @ each.A.double()).detach()
    assert float((each.merged().detach().double() - exact).abs().max() / exact.abs().max()) < 2**-8
    assert each.merged().dtype == net(ROW).dtype == torch.bfloat16


def test_equal_seeds_draw_equal_adapters(random_checkpoints):
    def first(seed):
        net = model.Transformer.from_pretrained(random_checkpoints["llama"])
        lora.add(net, 2, 4.0, lora.parts_of(net.config, "all"), seed)
        return net.layers[1].down.A
    assert torch.equal(first(5), first(5)) and not torch.equal(first(5), first(6))


def test_what_resume_needs_of_an_adapted_net_is_its_adapters(random_checkpoints):
    """Put into another net's they make it the same; the frozen weights are on the disk already."""
    net, other = adapted(random_checkpoints["llama"]), adapted(random_checkpoints["llama"], stir=False)
    saved, theirs = (kernels.Optimizer(each.parameters(), "adamw").tensors() for each in (net, other))
    masters = [tensor for name, tensor in saved.items() if name.endswith("master")]
    assert len(masters) == 2 * 3 * 4 and sum(map(torch.numel, masters)) == sum(map(torch.numel, trained(net)))
    assert saved.keys() == theirs.keys()
    for name, tensor in theirs.items():
        tensor.copy_(saved[name])
    assert torch.equal(logits(other), logits(net))


# ---------------------------------------------------------------------------------------------------------------------
# PEFT's files


@torch.no_grad()
def test_saved_and_opened_again(directory):
    net = adapted(directory)
    lora.save(net, "adapter", directory)
    assert sorted(os.listdir("adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    beside = model.Transformer.from_pretrained("adapter", merge=False)
    assert torch.equal(logits(beside), logits(net))
    assert len(trained(beside)) == len(trained(net)) < len(list(net.parameters()))
    merged = model.Transformer.from_pretrained("adapter")
    assert merged.lora is None and trained(merged) == list(merged.parameters())
    torch.testing.assert_close(logits(merged), logits(net), atol=1e-4, rtol=1e-5)
    lora.save(beside, "again", directory)
    assert same_files("adapter", "again", *os.listdir("adapter"))


def change(directory, **values):
    """adapter_config.json with other values; None removes a key."""
    path = f"{directory}/adapter_config.json"
    config = json.load(open(path)) | values
    with open(path, "w") as file:
        json.dump({key: value for key, value in config.items() if value is not None}, file)


@torch.no_grad()
def test_rslora_divides_by_the_root_of_the_rank(random_checkpoints):
    net = adapted(random_checkpoints["llama"], r=4, alpha=8.0)
    lora.save(net, "adapter", random_checkpoints["llama"])
    change("adapter", use_rslora=True, lora_alpha=4)                    # 4 / sqrt(4) = 8 / 4
    assert torch.equal(logits(model.Transformer.from_pretrained("adapter", merge=False)), logits(net))


@torch.no_grad()
def test_a_relative_base_is_looked_for_beside_the_adapter(random_checkpoints, tmp_path, monkeypatch):
    net = adapted(random_checkpoints["llama"], "q,v")
    lora.save(net, "both/adapter", random_checkpoints["llama"])
    shutil.copytree(random_checkpoints["llama"], "both/base")
    change("both/adapter", base_model_name_or_path="../base")
    os.makedirs("elsewhere")
    monkeypatch.chdir("elsewhere")
    again = model.Transformer.from_pretrained(tmp_path / "both/adapter", merge=False)
    assert torch.equal(logits(again), logits(net))


def hf_model(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")


@pytest.mark.parametrize("layers", ["all", "q,k,v,down"])
def test_peft_opens_ours(layers, directory):
    """Equal logits and equal gradients of every adapter."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    net = adapted(directory, layers)
    lora.save(net, "adapter", directory)
    theirs = peft.PeftModel.from_pretrained(hf_model(directory), "adapter", is_trainable=True)
    torch.testing.assert_close(theirs(ROW).logits[0], logits(net), atol=1e-4, rtol=1e-5)
    for found in (logits(net), theirs(ROW).logits[0]):
        found.log_softmax(-1)[:, 7].sum().backward()
    slopes = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for _, _, each in lora.adapted(net):
        each.A.data, each.B.data = each.A.grad, each.B.grad
    ours = lora.tensors(net)
    assert ours.keys() == slopes.keys() and len(ours) >= 12
    for name, slope in slopes.items():
        assert float((ours[name] - slope).norm() / slope.norm()) < 1e-4, name


@torch.no_grad()
@pytest.mark.parametrize("how", [dict(target_modules="all-linear"), dict(target_modules=["o_proj"], use_rslora=True),
                                 dict(target_modules=r".*\.(down|o)_proj", init_lora_weights="gaussian")])
def test_we_open_pefts(how, directory):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = peft.get_peft_model(hf_model(directory), peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **how))
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained("theirs")
    assert json.load(open("theirs/adapter_config.json"))["base_model_name_or_path"] == directory
    for merge in (True, False):
        ours = model.Transformer.from_pretrained("theirs", merge=merge)
        torch.testing.assert_close(logits(ours), theirs.eval()(ROW).logits[0], atol=2e-4, rtol=1e-5)
    assert not torch.allclose(logits(ours), logits(model.Transformer.from_pretrained(directory)), atol=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# small runs

SPPO = dict(eta=20.0, iterations=2, prompts_per_iteration=6, k=3, epochs=2, batch_size=3, micro_batch=2, lr=1e-2,
            validation_prompts=4, test_prompts=4, max_new_tokens=6, save_every=1, chunk=4, device="cpu", lora=2)
LSP = dict(steps=3, queries=3, answers=3, test_prompts=4, eval_every=2, micro_batch=4, max_new_tokens=6, max_rows=64,
           lr=1e-2, device="cpu", lora=2)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory, quick_module):
    """whole(script, save): the directory of an uninterrupted run."""
    made = {}

    def run_of(script, save):
        if (script, save) not in made:
            made[script, save] = str(tmp_path_factory.mktemp("lora") / "run")
            script.main(argv(model=base, out=made[script, save], save=save, **{sppo: SPPO, lsp: LSP}[script]))
        return made[script, save]
    return run_of


def read(path):
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_an_sppo_run(save, whole, base):
    out = whole(sppo, save)
    summary, rows = json.load(open(f"{out}/summary.json")), lines(f"{out}/metrics.jsonl")
    assert summary["method"] == "sppo, LoRA 2" and len(summary["evaluations"]) == 4
    first = [row for row in rows if row.get("step") == 1 and "loss" in row]
    assert [row["logratio_w"] for row in first] == pytest.approx([0, 0], abs=1e-5)  # pi_t is where training begins
    assert all(row["grad_norm"] > 0 for row in rows if "loss" in row)
    if save == "merged":        # what has adapters has moved, what has none has not
        before, after = (read(f"{path}/model.safetensors") for path in (base, f"{out}/iter-2"))
        assert {name for name in before if not torch.equal(before[name], after[name])} == {
            name for name in before if "_proj" in name}
        return
    assert sorted(os.listdir(f"{out}/iter-2")) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.load(open(f"{out}/iter-2/adapter_config.json"))
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 4, base)
    one, two = (read(f"{out}/iter-{t}/adapter_model.safetensors") for t in (1, 2))
    # iteration 2 goes on with the adapter of iteration 1: a fresh A would be another by as much as A itself
    assert all(0 < (two[name] - one[name]).norm() < 0.5 * one[name].norm() for name in one if "lora_A" in name)


def test_both_ways_of_saving_are_one_run(whole):
    """In iteration 1; then one goes on with its adapter, the other with a fresh one on the merged weights."""
    merged, beside = whole(sppo, "merged"), whole(sppo, "adapter")
    assert lines(f"{merged}/table-1.jsonl") == lines(f"{beside}/table-1.jsonl")
    opened = model.Transformer.from_pretrained(f"{beside}/iter-1").state_dict()
    assert all(torch.equal(tensor, opened[name]) for name, tensor in
               model.Transformer.from_pretrained(f"{merged}/iter-1").state_dict().items())


@pytest.mark.parametrize("save", ["merged", pytest.param("adapter", marks=pytest.mark.slow)])
def test_an_lsp_run(save, whole, base):
    out = whole(lsp, save)
    rows = lines(f"{out}/metrics.jsonl")
    assert json.load(open(f"{out}/summary.json"))["method"] == "lsp, LoRA 2"
    assert abs(rows[0]["kl_solver"]) < 1e-4 and abs(rows[-1]["kl_solver"]) > 1e-3
    state = torch.load(f"{out}/state/training-0-3", weights_only=True)                  # the frozen base is not in it
    weights = model.Transformer.from_pretrained(base).state_dict().values()
    assert sum(map(torch.numel, state.values())) < 0.5 * sum(map(torch.numel, weights))
    if save == "adapter":
        assert same_files(whole(lsp, "merged"), out, "samples.jsonl")
        assert sorted(os.listdir(f"{out}/step-3")) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("settings", [{}, pytest.param(dict(challenger="frozen"), marks=pytest.mark.slow)])
def test_lsp_holds_one_copy_of_the_weights(settings, base, monkeypatch):
    """And plays to the bit as with a second one: KL, self-reward, frozen Challenger and the table's base."""
    settings = LSP | dict(steps=2) | settings
    opened, real = [], model.Transformer.from_pretrained
    monkeypatch.setattr(model.Transformer, "from_pretrained",
                        lambda *args, **how: opened.append(real(*args, **how)) or opened[-1])
    lsp.main(argv(model=base, out="one", **settings))
    assert len(opened) == 1
    monkeypatch.setattr(lora, "Reference", lambda net: real(base).requires_grad_(False))
    lsp.main(argv(model=base, out="two", **settings))
    assert without_clock("one/metrics.jsonl") == without_clock("two/metrics.jsonl")
    assert same_files("one", "two", "samples.jsonl", "step-2/model.safetensors", "state/base_side.json")


@pytest.mark.parametrize("script, save, step", [
    (sppo, "adapter", 7), (lsp, "merged", 3), pytest.param(sppo, "merged", 3, marks=pytest.mark.slow),
    pytest.param(lsp, "adapter", 3, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit(script, save, step, whole, base, dies_in):
    """In the middle of a training, of iteration 1 or 2; lsp.py one step after its last saved state."""
    flags = argv(model=base, out="killed", save=save, **{sppo: SPPO, lsp: LSP}[script])
    dies_in(script, "gradient_step", step)
    with pytest.raises(Killed):
        script.main(flags)
    script.main([*flags, "--resume"])
    if script is lsp:
        assert without_clock("killed/metrics.jsonl") == without_clock(f"{whole(lsp, save)}/metrics.jsonl")
        name = "model" if save == "merged" else "adapter_model"
        assert same_files("killed", whole(lsp, save), "samples.jsonl", f"step-3/{name}.safetensors")
    else:
        got, want = contents("killed"), contents(whole(sppo, save))
        assert set(got) == set(want) and [name for name in want if got[name] != want[name]] == []


@pytest.mark.slow
def test_a_kill_9_resumes_bit_for_bit(whole, base):
    """A process of its own, killed by the system right after a state was saved; then the same command with --resume."""
    killer = ("import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import run, sppo\n"
              "save, calls = run.Run.save_state, []\n"
              "def dies(*args, **state):\n"
              "    save(*args, **state)\n"
              "    calls.append(len(args) > 1)\n"
              "    if sum(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
              "run.Run.save_state = dies\n"
              "sppo.main(sys.argv[1:])")
    flags = argv(model=base, out="killed", save="adapter", **SPPO)
    done = subprocess.run([sys.executable, "-c", killer, ROOT, *flags], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == -9, done.stderr[-2000:]
    sppo.main([*flags, "--resume"])
    got, want = contents("killed"), contents(whole(sppo, "adapter"))
    assert set(got) == set(want) and [name for name in want if got[name] != want[name]] == []


@pytest.mark.slow
def test_stage_by_stage_is_the_whole_run(whole, base):
    for t in (1, 2):
        for stage in ("sample", "judge", "train"):
            sppo.main(argv(model=base, out="stages", save="adapter", stage=stage, iteration=t, **SPPO))
    assert same_files("stages", whole(sppo, "adapter"), "samples.jsonl", "iter-1/adapter_model.safetensors",
                      "iter-2/adapter_model.safetensors", "table-2.jsonl")


def test_an_adapter_is_a_checkpoint_for_every_command(whole, base, capsys):
    """eval.py plays it; a run begins with it, merged, and trains all weights or a fresh adapter."""
    adapter = f"{whole(sppo, 'adapter')}/iter-2"
    eval.main(["winrate", "--model", adapter, "--vs", base, "--count", "20", "--device", "cpu"])
    assert adapter in capsys.readouterr().out
    assert load_checkpoint(adapter, "cpu", torch.float32)[1].directory == base          # whose tokenizer it has
    for more in (dict(lora=0), dict(lora=1)):
        sppo.main(argv(model=adapter, out=f"after-{more['lora']}", **SPPO | more | dict(iterations=1, epochs=1)))
        assert abs(lines(f"after-{more['lora']}/metrics.jsonl")[0]["logratio_w"]) < 1e-5
    assert os.path.exists("after-0/iter-1/tokenizer.json") and os.path.exists("after-1/iter-1/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("script", [sppo, lsp])
def test_two_ranks_compute_what_one_does(script, whole, base):
    flags = argv(model=base, out="two", save="adapter", **{sppo: SPPO, lsp: LSP}[script])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           os.path.join(ROOT, f"{script.__name__}.py"), *flags],
                          capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    one, last = whole(script, "adapter"), {sppo: "iter-2", lsp: "step-3"}[script]
    assert lines("two/samples.jsonl") == lines(f"{one}/samples.jsonl")
    ours, theirs = (read(f"{out}/{last}/adapter_model.safetensors") for out in ("two", one))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("given, sentence", [
    (dict(save="adapter"), "--save adapter is for --lora; give that too, or leave it out"),
    (dict(lora_alpha=8.0), "--lora-alpha 8.0 is for --lora"), (dict(lora_layers="q"), "--lora-layers q is for --lora"),
    (dict(lora=4, lora_layers="q,head"), "--lora-layers q,head must be all, or some of q,k,v,o,gate,up,down"),
    (dict(lora=4, lora_layers=""), "--lora-layers  must be all"),
    (dict(lora=4, lora_layers="all,q"), "--lora-layers all,q must be all")])
@pytest.mark.parametrize("script", [sppo, lsp])
def test_flags_that_make_no_sense(script, given, sentence):
    with pytest.raises(UserError, match=sentence):
        script.settle(script.Settings(**given))


@pytest.mark.parametrize("script", [sppo, lsp])
def test_an_adapter_is_no_base_for_another(script, whole, base):
    adapter = f"{whole(sppo, 'adapter')}/iter-1"
    with pytest.raises(UserError, match="--save adapter needs a whole checkpoint .* is an adapter; leave --save out"):
        script.main(argv(model=adapter, out="out", save="adapter", **{sppo: SPPO, lsp: LSP}[script]))
    assert not os.path.exists("out")
    shutil.copytree(adapter, "second")
    change("second", base_model_name_or_path=adapter)
    with pytest.raises(UserError, match="an adapter itself"):
        model.Transformer.from_pretrained("second")


def test_some_of_a_fused_weight(random_checkpoints):
    config = model.Transformer.from_pretrained(random_checkpoints["phi3"]).config
    for layers in ("q,v,o", "up"):
        with pytest.raises(UserError, match=f"--lora-layers {layers}: this checkpoint holds .* as one weight; name"):
            lora.parts_of(config, layers)
    assert lora.parts_of(config, "v,k,q,o") == {"self_attn.qkv_proj", "self_attn.o_proj"}


@pytest.mark.parametrize("values, sentence", [
    (dict(use_dora=True), "has use_dora 'True'; only plain LoRA"), (dict(peft_type="IA3"), "has peft_type 'IA3'"),
    (dict(init_lora_weights="pissa"), "has init_lora_weights 'pissa'"), (dict(r=None), "lacks r"),
    (dict(alpha_pattern={"q_proj": 3}), "has alpha_pattern"), (dict(r=0), "has r 0; it must be a whole number from 1"),
    (dict(r="8"), "has r \"8\""), (dict(lora_alpha=-1), "has lora_alpha -1"),
    (dict(r=2), "has shape .3, 32., its base"),
    (dict(base_model_name_or_path="/nowhere"), "names its base '/nowhere', which cannot be had")])
def test_a_config_that_does_not_fit(values, sentence, random_checkpoints):
    lora.save(adapted(random_checkpoints["llama"]), "adapter", random_checkpoints["llama"])
    change("adapter", **values)
    with pytest.raises(UserError, match=f"adapter.*{sentence}"):
        model.Transformer.from_pretrained("adapter")


def test_weights_that_do_not_fit(random_checkpoints):
    def opened(change_weights, base="llama"):
        lora.save(adapted(random_checkpoints["llama"]), "adapter", random_checkpoints[base])
        found = read("adapter/adapter_model.safetensors")
        change_weights(found)
        safetensors.torch.save_file(found, "adapter/adapter_model.safetensors")
        with pytest.raises(UserError) as error:
            model.Transformer.from_pretrained("adapter")
        return str(error.value)

    name = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"
    assert f"lacks {name}" in opened(lambda found: found.pop(name))
    assert "holds base_model.model.lm_head.lora_A.weight" in opened(
        lambda found: found.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 32)}))
    assert "holds no adapter" in opened(dict.clear)
    assert f"{name} holds NaN or infinite numbers" in opened(lambda found: found[name].fill_(float("nan")))
    assert "give the base that it was trained on" in opened(lambda found: None, base="gemma2")
    os.truncate("adapter/adapter_model.safetensors", 300)
    with pytest.raises(UserError, match="damaged or truncated"):
        model.Transformer.from_pretrained("adapter")
    os.remove("adapter/adapter_model.safetensors")
    with pytest.raises(UserError, match="is missing; only adapters in safetensors format"):
        model.Transformer.from_pretrained("adapter")
