"""model.py: every family against transformers, the three views against the textbook forward, checkpoints good and bad.

The checkpoints are random and tiny. All weights are drawn, norms and biases too, and large enough that a wrong
rotation, window or bias moves the logits by a hundred times the tolerances (`test_logits_equal_transformers` shows it).
"""

import copy
import dataclasses
import doctest
import json
import os
import shutil

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import (AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Olmo2Config, Phi3Config,
                          Qwen2Config, Qwen3Config, SmolLM3Config)

import kernels
import model
import rollout
from checkpoints import Config
from model import Transformer
from run import UserError

WINDOW = 4
SIZE = dict(vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=32)
FAMILIES = {
    "llama": LlamaConfig(**SIZE, num_key_value_heads=2, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**SIZE, num_key_value_heads=4, attention_bias=True, mlp_bias=True,
                              rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=4.0)),
    "mistral": MistralConfig(**SIZE, num_key_value_heads=1, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SIZE, num_key_value_heads=2, use_sliding_window=True, sliding_window=WINDOW,
                         max_window_layers=1),
    "qwen3": Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "qwen3-yarn": Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=16, rope_parameters=YARN),
    # layer 1 without RoPE, with a window; then layer 0 alone without RoPE, by a list that is longer than needed
    "smollm3": SmolLM3Config(**SIZE, num_key_value_heads=2, no_rope_layer_interval=2, use_sliding_window=True,
                             sliding_window=WINDOW),
    "smollm3-bias": SmolLM3Config(**SIZE, num_key_value_heads=1, no_rope_layers=[0, 1, 1, 1], attention_bias=True,
                                  mlp_bias=True, tie_word_embeddings=False),
    "olmo2": Olmo2Config(**SIZE, num_key_value_heads=2),
    "phi3": Phi3Config(**SIZE, num_key_value_heads=2, sliding_window=WINDOW),
    # caps about as large as what they bound, a scale that is not head_dim ** -0.5, windows in layers 0 and 2
    "gemma2": Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24, sliding_window=WINDOW,
                           attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2-uncapped": Gemma2Config(**SIZE, num_key_value_heads=4, head_dim=8, query_pre_attn_scalar=24,
                                    sliding_window=WINDOW, attention_bias=True, tie_word_embeddings=False,
                                    attn_logit_softcapping=None, final_logit_softcapping=None),
}
ROWS = [[5, 9, 33, 7, 60, 2, 18, 4, 4, 51, 12, 40], [8, 1, 55], [3, 3, 29, 30, 31, 8, 8, 17]]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{family: (directory written by transformers, the transformers model)}."""
    made = {}
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, p in hf.named_parameters():
                p.normal_(0, 0.3)
                if "norm" in name and config.model_type != "gemma2":  # Gemma adds the 1 itself
                    p.add_(1)
        directory = tmp_path_factory.mktemp(family) / "hf"
        hf.save_pretrained(directory)
        made[family] = str(directory), hf
    return made


@pytest.fixture(params=FAMILIES)
def family(request, checkpoints):
    return request.param, *checkpoints[request.param]


@torch.no_grad()
def logits(net, row):
    """[T, V] of one row, from ours or transformers'."""
    tokens = torch.tensor([row])
    return net.logits(net(tokens))[0] if isinstance(net, Transformer) else net(tokens).logits[0]


def test_doctests():
    """Among them the pack of two prompts and three responses, token for token."""
    result = doctest.testmod(model)
    assert result.failed == 0 and result.attempted >= 4


def read_json(*path):
    with open(os.path.join(*path)) as file:
        return json.load(file)


def write_json(value, *path):
    with open(os.path.join(*path), "w") as file:
        json.dump(value, file)


# ---------------------------------------------------------------------------------------------------------------------
# the forward


def without_windows(net):
    net.config.windows = (None,) * net.config.num_layers


def without_rope_scaling(net):
    net.config.rope["rope_type"] = "default"


def without_out_bias(net):
    for layer in net.layers:
        layer.o.bias.data.zero_()


def without_qkv_bias(net):
    for layer in net.layers:
        layer.qkv.bias.data.zero_()


def without_qk_norm(net):
    for layer in net.layers:
        layer.k_norm.data.fill_(1)


def without_sharper_attention(net):
    net.config.rope["attention_factor"] = 1.0


def without(field, value=None):
    return lambda net: setattr(net.config, field, value)


def with_silu_and_llamas_norms(net):
    """Gemma 2 but for its 1 + weight, its embeddings' factor and GELU."""
    net.config.gemma = False


def without_output_norms(net):
    for layer in net.layers:
        layer.norm1_out = layer.norm2_out = None


SPOIL = [("llama", without_rope_scaling), ("llama-bias", without_rope_scaling), ("llama-bias", without_out_bias),
         ("mistral", without_windows), ("qwen2", without_windows), ("qwen2", without_qkv_bias),
         ("qwen3", without_qk_norm), ("qwen3-yarn", without_rope_scaling), ("qwen3-yarn", without_sharper_attention),
         ("smollm3", without_windows), ("smollm3", without("rotated", ())), ("smollm3-bias", without("rotated", ())),
         ("smollm3-bias", without_out_bias), ("olmo2", without_qk_norm), ("olmo2", without_output_norms),
         ("phi3", without_windows),
         ("gemma2", without_windows), ("gemma2", without("attention_cap")), ("gemma2", without("logit_cap")),
         ("gemma2", without("attention_scale")), ("gemma2", with_silu_and_llamas_norms),
         ("gemma2", without_output_norms), ("gemma2-uncapped", without_out_bias),
         ("gemma2-uncapped", without("attention_scale"))]


def test_logits_equal_transformers(family):
    """And not vacuously: the logits are spread out, and `test_every_trait_matters`."""
    name, directory, hf = family
    net = Transformer.from_pretrained(directory)
    for row in ROWS:
        want = logits(hf, row)
        assert want.std() > 1
        torch.testing.assert_close(logits(net, row), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, spoil", SPOIL)
def test_every_trait_matters(checkpoints, name, spoil):
    """Without the family's own trait the logits come out wrong, by a hundred times the tolerance."""
    directory, hf = checkpoints[name]
    net = Transformer.from_pretrained(directory)
    spoil(net)
    assert (logits(net, ROWS[0]) - logits(hf, ROWS[0])).abs().max() > 1e-2


@torch.no_grad()
def test_greedy_tokens_equal_transformers(family):
    """Batched, cached, past the window, rows of different lengths; transformers decodes each prompt by itself."""
    _, directory, hf = family
    got = rollout.generate(Transformer.from_pretrained(directory), ROWS, 1, 3 * WINDOW, temperature=0)
    for row, [tokens], [logprobs] in zip(ROWS, got.tokens, got.logprobs):
        want = hf.generate(torch.tensor([row]), max_new_tokens=3 * WINDOW, min_new_tokens=3 * WINDOW, do_sample=False,
                           eos_token_id=None)[0]
        assert row + tokens == want.tolist()
        table = logits(hf, row + tokens).log_softmax(-1)[len(row) - 1:-1]
        torch.testing.assert_close(torch.tensor(logprobs), table.gather(-1, want[len(row):, None]).squeeze(-1),
                                   atol=1e-4, rtol=0)


def test_padding_on_the_right_changes_nothing_on_the_left(family):
    net = Transformer.from_pretrained(family[1])
    T = max(map(len, ROWS))
    for pad in (0, 59):
        hidden = net(torch.tensor([row + [pad] * (T - len(row)) for row in ROWS]))
        assert hidden.shape == (3, T, 32)
        for row, mine in zip(ROWS, net.logits(hidden)):
            torch.testing.assert_close(mine[:len(row)], logits(net, row), atol=1e-5, rtol=1e-5)


def test_bfloat16_checkpoints(family, tmp_path):
    """Shards of bfloat16: loaded into float32 the logits are transformers', loaded into bfloat16 they are near, as near
    as transformers' own, and float32."""
    _, directory, hf = family
    copy.deepcopy(hf).bfloat16().save_pretrained(tmp_path / "half", max_shard_size="20KB")
    assert len(list((tmp_path / "half").glob("model-*.safetensors"))) > 1
    theirs = {dtype: AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=dtype, attn_implementation="eager")
              for dtype in (torch.float32, torch.bfloat16)}
    whole, half = (Transformer.from_pretrained(tmp_path / "half", dtype=dtype) for dtype in theirs)
    want = logits(theirs[torch.float32], ROWS[0])
    torch.testing.assert_close(logits(whole, ROWS[0]), want, atol=1e-4, rtol=0)
    assert half.dtype == half(torch.tensor([ROWS[0]])).dtype == torch.bfloat16
    got = logits(half, ROWS[0])
    error, usual = (got - want).norm(), (logits(theirs[torch.bfloat16], ROWS[0]).float() - want).norm()
    assert got.dtype == torch.float32 and 0 < error < 1.5 * usual and usual < 0.1 * want.norm()
    assert not torch.equal(got, got.bfloat16().float()) or half.config.logit_cap is None  # capped in float32


def test_gemma_in_bfloat16_rounds_where_transformers_does(checkpoints):
    """The factor sqrt(H) is rounded before it multiplies, 1 + weight is not: to bfloat16, 1 + 1/300 would be 1."""
    directory, hf = checkpoints["gemma2"]
    net, hf = Transformer.from_pretrained(directory, dtype=torch.bfloat16), copy.deepcopy(hf).bfloat16()
    entering = []
    net.layers[0].register_forward_pre_hook(lambda layer, args: entering.append(args[0]))
    with torch.no_grad():
        net(torch.arange(61)[None])
        assert torch.equal(entering[0], hf.model.embed_tokens(torch.arange(61)))
        hf.model.norm.weight.fill_(1 / 300)
        assert torch.equal(model._norm(entering[0], hf.model.norm.weight, net.config), hf.model.norm(entering[0]))


def test_positions_beyond_the_first_rope_table(checkpoints):
    """The table of rotations grows on demand: a long row after a short one, past the first 256 positions."""
    directory, hf = checkpoints["qwen3"]
    net = Transformer.from_pretrained(directory)
    logits(net, ROWS[1])
    row = [(7 * i) % 61 for i in range(300)]
    torch.testing.assert_close(logits(net, row), logits(hf, row), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_older_spellings_of_the_config(checkpoints, tmp_path, name):
    """torch_dtype, rope_theta and rope_scaling with "type", as in checkpoints written before transformers 5."""
    directory = shutil.copytree(checkpoints[name][0], tmp_path / "old")
    raw = read_json(directory, "config.json")
    rope = raw.pop("rope_parameters")
    raw["torch_dtype"] = raw.pop("dtype")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = {**rope, "type": rope.pop("rope_type")} if rope["rope_type"] != "default" else None
    raw.pop("layer_types", None)  # windows then follow: Qwen2's from max_window_layers, SmolLM3's from its layers' RoPE
    write_json(raw, directory, "config.json")
    net = Transformer.from_pretrained(directory)
    torch.testing.assert_close(logits(net, ROWS[0]), logits(checkpoints[name][1], ROWS[0]), atol=1e-4, rtol=0)
    net.save_pretrained(tmp_path / "new")
    assert read_json(tmp_path, "new", "config.json").get("torch_dtype") is None
    # "eager": torch's own attention, transformers' default in some releases, leaves Gemma 2's cap out
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new", attn_implementation="eager")
    torch.testing.assert_close(logits(theirs, ROWS[0]), logits(net, ROWS[0]), atol=1e-4, rtol=0)


def test_an_unused_window_is_no_window(checkpoints, tmp_path):
    """Qwen2's published configs name a sliding_window and switch it off beside it; Llama has none."""
    directory = shutil.copytree(checkpoints["qwen2"][0], tmp_path / "off")
    raw = read_json(directory, "config.json")
    raw.pop("layer_types")
    write_json({**raw, "use_sliding_window": False, "max_window_layers": 0}, directory, "config.json")
    assert Transformer.from_pretrained(directory).config.windows == (None, None, None)


def config_of(family, **changes):
    """(Config of a config.json with nothing but model_type, sizes and `changes`; what transformers fills in there)."""
    sizes = {key: SIZE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                        "num_attention_heads")} | changes
    return Config.from_hf({"model_type": family, **sizes}), transformers.AutoConfig.for_model(family, **sizes)


@pytest.mark.parametrize("family, changes", [("smollm3", dict(num_attention_heads=8)), ("olmo2", {}), ("phi3", {}),
                                             ("gemma2", {})])
def test_keys_that_are_left_out(family, changes):
    """All but the sizes may be missing: each is then as transformers fills it in, and stays missing in what we save."""
    got, want = config_of(family, **changes)
    assert set(got.raw) == {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                            "num_attention_heads"}
    filled = Config.from_hf(want.to_dict())
    assert got == dataclasses.replace(filled, raw=got.raw, rope={key: filled.rope[key] for key in got.rope})
    assert got.tied == want.tie_word_embeddings and got.max_positions == want.max_position_embeddings
    assert got.num_kv_heads == want.num_key_value_heads and got.norm_eps == want.rms_norm_eps
    assert got.rope["rope_theta"] == want.rope_parameters["rope_theta"]


def test_gemma_and_smollm3_keys_that_are_left_out():
    got, want = config_of("gemma2")
    assert got.windows == (want.sliding_window, None, want.sliding_window) and got.head_dim == want.head_dim
    assert got.attention_cap == want.attn_logit_softcapping and got.logit_cap == want.final_logit_softcapping
    assert got.attention_scale == want.query_pre_attn_scalar**-0.5
    got, want = config_of("smollm3", num_attention_heads=8, num_hidden_layers=9)
    assert list(map(int, got.rotated)) == want.no_rope_layers == [1, 1, 1, 0, 1, 1, 1, 0, 1]


def test_yarn_makes_room_for_what_it_stretches_to():
    """Qwen's model cards have one write factor 4 into config.json and leave max_position_embeddings as it was."""
    rope = {"type": "yarn", "factor": 4.0}
    assert config_of("qwen2", max_position_embeddings=32, rope_scaling=rope)[0].max_positions == 128
    rope["original_max_position_embeddings"] = 8
    assert config_of("qwen2", max_position_embeddings=32, rope_scaling=rope)[0].max_positions == 32
    assert config_of("qwen2", max_position_embeddings=64)[0].max_positions == 64


# ---------------------------------------------------------------------------------------------------------------------
# shared prompts: equal to running every (prompt, response) row by itself

PROMPTS = [ROWS[0], [6], ROWS[1], ROWS[2]]  # 12, 1, 3 and 8 tokens: longer and shorter than the window
RESPONSES = [[[7], [20, 21, 22, 23, 24, 25, 26], [9, 2]], [[11, 12], [13, 14, 15, 2]], [], [[44, 2], []]]


def naive_logprobs(net):
    """The same tokens in the same order, one unshared row after the other, from the textbook forward."""
    out = []
    for prompt, group in zip(PROMPTS, RESPONSES):
        for response in filter(None, group):
            row = torch.tensor(prompt + response)
            hidden = net(row[None])[0]
            table = net.logits(hidden).log_softmax(-1)[len(prompt) - 1:-1]  # token t is predicted at t - 1
            out.append(table.gather(-1, row[len(prompt):, None]).squeeze(-1))
    return torch.cat(out)


def test_shared_prefix_equals_naive_rows_in_values_and_gradients(family):
    net = Transformer.from_pretrained(family[1])
    shared, row, rows = model.response_logprobs(net, PROMPTS, RESPONSES)
    naive = naive_logprobs(net)
    assert rows == 6 and row.tolist() == [0] + [1] * 7 + [2, 2, 3, 3, 4, 4, 4, 4, 5, 5]  # empty responses have no row
    torch.testing.assert_close(shared, naive, atol=2e-5, rtol=1e-5)
    coefficient = torch.randn(len(naive), generator=torch.Generator().manual_seed(0))
    mine = torch.autograd.grad((shared * coefficient).sum(), list(net.parameters()))
    want = torch.autograd.grad((naive * coefficient).sum(), list(net.parameters()))
    for (name, _), a, b in zip(net.named_parameters(), mine, want):
        assert b.norm() > 0 and (a - b).norm() < 1e-5 * b.norm(), name


def kept_bytes(net, function):
    """function()'s result, and how many bytes autograd holds on to for its backward pass, weights aside."""
    weights, held = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing(family, dtype):
    """The same log-probs and gradients, bit for bit, while of each layer little but its input is kept."""
    net = Transformer.from_pretrained(family[1], dtype=dtype)
    results, kept = [], []
    for net.activation_checkpointing in (False, True):
        net.zero_grad()
        [logprob, *_], size = kept_bytes(net, lambda: model.response_logprobs(net, PROMPTS, RESPONSES))
        (logprob * torch.linspace(-1, 1, len(logprob))).sum().backward()
        results.append([logprob, *(p.grad for p in net.parameters())])
        kept.append(size)
    assert all(torch.equal(a, b) for a, b in zip(*results)) and results[0][0].isfinite().all()
    assert kept[1] < 0.3 * kept[0]
    before = logits(net, ROWS[0])
    assert not before.requires_grad  # under no_grad nothing is recomputed, and all is as before
    net.activation_checkpointing = False
    assert torch.equal(before, logits(net, ROWS[0]))


def test_response_logprobs_equal_transformers(family):
    """An independent model and the definition: log_softmax of the whole row, shifted by one, gathered, summed."""
    _, directory, hf = family
    with torch.no_grad():
        logprob, row, rows = model.response_logprobs(Transformer.from_pretrained(directory), PROMPTS, RESPONSES)
    want = []
    for prompt, group in zip(PROMPTS, RESPONSES):
        for response in filter(None, group):
            table = logits(hf, prompt + response).log_softmax(-1)
            want.append(sum(table[len(prompt) - 1 + i, token] for i, token in enumerate(response)))
    torch.testing.assert_close(kernels.sum_rows(logprob, row, rows), torch.stack(want), atol=1e-4, rtol=1e-5)


def test_nothing_in_the_pack_is_computed_twice_or_padded():
    view = model.SharedPrefix(PROMPTS, RESPONSES, "cpu")
    assert view.tokens.tolist() == sum(PROMPTS, []) + sum(sum(RESPONSES, []), [])


@torch.no_grad()
def test_a_mask_for_each_window_and_not_for_each_layer(checkpoints, monkeypatch):
    """Layers of no window, 4 and 4. Prompts without a window are left to torch's own causal kernel."""
    net = Transformer.from_pretrained(checkpoints["qwen2"][0])
    assert net.config.windows == (None, WINDOW, WINDOW)
    built, real = [], kernels.attention_mask
    monkeypatch.setattr(kernels, "attention_mask", lambda *args: built.append(args[2]) or real(*args))
    view = model.SharedPrefix(PROMPTS, RESPONSES, "cpu")
    net(view.tokens, view)
    assert sorted(map(str, built)) == ["4", "4", "None"]                        # prompts; responses; responses
    decoder = Decoder(net)
    decoder.admit(ROWS, 1)
    built.clear()
    decoder.cache.step(13)
    net(torch.tensor([1, 2, 3]), decoder.cache)
    assert sorted(map(str, built)) == ["4", "None"]


def test_a_response_is_blind_to_its_neighbours(family):
    net = Transformer.from_pretrained(family[1])
    with torch.no_grad():
        together = model.response_logprobs(net, PROMPTS, RESPONSES)[0]
        alone = model.response_logprobs(net, PROMPTS[3:], RESPONSES[3:])[0]
    torch.testing.assert_close(together[-2:], alone, atol=1e-5, rtol=1e-5)


def test_long_rows_are_cut_into_several_rectangles(family, monkeypatch):
    """Log-probabilities and gradients are those of one rectangle for all."""
    net, found = Transformer.from_pretrained(family[1]), []
    weight = torch.linspace(-1, 1, sum(map(len, sum(RESPONSES, []))))
    for stair in (256, 3):
        monkeypatch.setattr(model, "STAIR", stair)
        net.zero_grad()
        logprob, *_ = model.response_logprobs(net, PROMPTS, RESPONSES)
        (logprob * weight).sum().backward()
        found.append([logprob, *(p.grad for p in net.parameters())])
        shapes = [tuple(part.queries.shape) for part in model.SharedPrefix(PROMPTS, RESPONSES, "cpu").parts]
        assert shapes == {256: [(4, 12), (6, 7)], 3: [(4, 3), (2, 3), (2, 3), (1, 3), (6, 3), (2, 3), (1, 1)]}[stair]
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-4 * max(1.0, float(one.detach().abs().max())), rtol=1e-4)


def test_stairs():
    """Four at most; prompts of like length stay whole, ragged ones do not; nothing has none."""
    assert [len(numbers) for _, numbers in model._stairs([8000, 100, 3000])] == [3, 2, 1, 1]
    assert model._stairs([300, 280], alone=True) == [(slice(0, 300), [0, 1])]
    assert len(model._stairs([300, 20], alone=True)) == len(model._stairs([300, 280])) == 2
    assert model._stairs([]) == model._stairs([], alone=True) == []


def test_response_logprobs_without_any_response(checkpoints):
    net = Transformer.from_pretrained(checkpoints["llama"][0])
    logprob, row, rows = model.response_logprobs(net, [[5], [6]], [[], [[]]])
    assert logprob.shape == row.shape == (0,) and rows == 0


# ---------------------------------------------------------------------------------------------------------------------
# decoding


class Decoder:
    """Rows in a KVCache beside their full texts: every step is checked against the uncached forward of every row."""

    def __init__(self, net, rows=8):
        self.net, self.cache, self.texts = net, model.KVCache(net.config, rows, 40, net.device, net.dtype), []

    def admit(self, prompts, n):
        view = model.SharedPrefix(prompts, [[] for _ in prompts], self.net.device, keep_kv=True)
        hidden = self.net(view.tokens, view)[view.prompt_last]
        for prompt, mine in zip(prompts, self.net.logits(hidden)):
            torch.testing.assert_close(mine, logits(self.net, prompt)[-1], atol=1e-4, rtol=1e-5)
            self.texts += [list(prompt) for _ in range(n)]
        self.cache.admit(view, n)

    def keep(self, holes, movers):
        """End the rows `holes` and any beyond the last mover: the movers, the last live rows, take their places."""
        for hole, mover in zip(holes, movers):
            self.texts[hole] = self.texts[mover]
        del self.texts[len(self.texts) - len(holes):]
        self.cache.keep(torch.tensor(holes), torch.tensor(movers), len(self.texts))

    def steps(self, count):
        for _ in range(count):
            for i, text in enumerate(self.texts):
                text.append((7 * i + 5 * len(text)) % 61)  # each row goes its own way
            self.cache.step(max(map(len, self.texts)))
            got = self.net.logits(self.net(torch.tensor([text[-1] for text in self.texts]), self.cache))
            for text, mine in zip(self.texts, got):
                torch.testing.assert_close(mine, logits(self.net, text)[-1], atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_cached_equals_uncached_at_every_step(family):
    """Ragged prompts, two rows each, past the window, through a compaction and late arrivals."""
    decoder = Decoder(Transformer.from_pretrained(family[1]))
    decoder.admit(ROWS, 2)
    decoder.steps(6)
    decoder.keep([0, 3], [5, 4])
    decoder.steps(3)
    decoder.admit([[50, 51], ROWS[0][::-1]], 2)  # into rows that hold stale keys
    decoder.steps(3)


@torch.no_grad()
def test_compaction_right_after_prefill(checkpoints):
    """Guards against moving only the columns that decoding steps have written: a row that ends with its first token is
    replaced before any step, and the mover's prompt must come along. Its neighbours' prompts differ."""
    decoder = Decoder(Transformer.from_pretrained(checkpoints["llama"][0]))
    decoder.admit(ROWS, 1)
    decoder.keep([0], [2])
    decoder.steps(2)
    decoder.admit([[50] * 9, list(range(40, 60))], 1)  # longer than anything stepped so far
    decoder.keep([0], [3])
    decoder.steps(2)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def files(directory):
    """{name: bytes} of a directory."""
    return {name: open(os.path.join(directory, name), "rb").read() for name in sorted(os.listdir(directory))}


def opened(path):
    """(names in a safetensors file, its metadata)."""
    with safetensors.safe_open(path, framework="pt") as file:
        return set(file.keys()), file.metadata()


def test_what_we_save_opens_in_transformers(family, tmp_path):
    _, directory, hf = family
    Transformer.from_pretrained(directory).save_pretrained(tmp_path / "mine")
    assert set(os.listdir(tmp_path / "mine")) == {"config.json", "generation_config.json", "model.safetensors"}
    names, metadata = opened(tmp_path / "mine/model.safetensors")
    assert metadata == {"format": "pt"}
    assert names == opened(f"{directory}/model.safetensors")[0]  # as transformers wrote it: a tied head is left out
    assert ("lm_head.weight" in names) != hf.config.tie_word_embeddings
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", attn_implementation="eager",
                                                       output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(hf)
    assert torch.equal(logits(again, ROWS[0]), logits(hf, ROWS[0]))
    before, after = hf.config.to_dict(), again.config.to_dict()
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {"dtype", "_name_or_path", "architectures", "transformers_version"}


def test_a_tied_model_that_stored_its_head_anyway(checkpoints, tmp_path):
    directory = shutil.copytree(checkpoints["llama"][0], tmp_path / "tied")
    weights = safetensors.torch.load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # old checkpoints hold such constants
    safetensors.torch.save_file(weights, directory / "model.safetensors")
    net = Transformer.from_pretrained(directory)
    assert net.head.weight is net.embed.weight
    assert torch.equal(logits(net, ROWS[0]), logits(Transformer.from_pretrained(checkpoints["llama"][0]), ROWS[0]))


def test_reads_the_shards_that_transformers_writes(family, tmp_path):
    _, directory, hf = family
    hf.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    net = Transformer.from_pretrained(tmp_path / "shards")
    assert torch.equal(logits(net, ROWS[0]), logits(Transformer.from_pretrained(directory), ROWS[0]))


def test_writes_shards_that_transformers_reads(family, tmp_path):
    _, directory, hf = family
    net = Transformer.from_pretrained(directory)
    net.save_pretrained(tmp_path / "shards", max_shard_bytes=20_000)
    index = read_json(tmp_path, "shards/model.safetensors.index.json")
    shards = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    count = len(shards)
    assert count > 3 and shards == [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    held = {name: shard for shard in shards for name in opened(tmp_path / "shards" / shard)[0]}
    assert index["weight_map"] == held and all(opened(tmp_path / "shards" / s)[1] == {"format": "pt"} for s in shards)
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in net.parameters())
    assert all(os.path.getsize(tmp_path / "shards" / s) < 20_000 + 2_000 for s in shards)  # a header each
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", attn_implementation="eager")
    assert torch.equal(logits(again, ROWS[0]), logits(hf, ROWS[0]))
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path / "shards"), ROWS[0]), logits(net, ROWS[0]))


def test_bfloat16_stays_bfloat16(checkpoints, tmp_path):
    Transformer.from_pretrained(checkpoints["mistral"][0], dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert read_json(tmp_path, "half/config.json")["dtype"] == "bfloat16"
    saved = safetensors.torch.load_file(tmp_path / "half/model.safetensors")
    whole = safetensors.torch.load_file(f"{checkpoints['mistral'][0]}/model.safetensors")
    assert saved.keys() == whole.keys() and all(torch.equal(saved[k], whole[k].bfloat16()) for k in whole)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert Transformer.from_pretrained(tmp_path / "half").dtype == torch.float32  # the dtype is the caller's choice


def test_the_generation_config_is_kept(checkpoints, tmp_path):
    """Llama-3's chat models end at any of several ids, which stand only here."""
    directory = shutil.copytree(checkpoints["llama"][0], tmp_path / "chat")
    write_json({"eos_token_id": [2, 5, 7], "temperature": 0.6, "do_sample": True}, directory, "generation_config.json")
    Transformer.from_pretrained(directory).save_pretrained(tmp_path / "mine")
    kept = read_json(tmp_path, "mine/generation_config.json")
    assert kept["eos_token_id"] == [2, 5, 7] and kept["temperature"] == 0.6 and kept["do_sample"] is True
    os.remove(directory / "generation_config.json")
    Transformer.from_pretrained(directory).save_pretrained(tmp_path / "mine")  # onto the one before
    made = read_json(tmp_path, "mine/generation_config.json")
    assert made["eos_token_id"] == 2 and made["bos_token_id"] == 1 and "temperature" not in made


def test_the_tokenizer_is_saved_with_the_model(checkpoints, tmp_path):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]",
                                                     chat_template="{{ messages[0] }}")
    Transformer.from_pretrained(checkpoints["llama"][0]).save_pretrained(tmp_path / "mine", tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "mine")
    assert again("a").input_ids == [1] and again.chat_template == "{{ messages[0] }}"


TOKENIZER = {   # beside a Llama's weights; JSON with spaces and an order of keys that no program would write again
    "tokenizer.model": b"\x0a\x0e\x0a\x05<unk>\x15 a sentencepiece model, \x00\xff\x80 as bytes",
    "tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer",   "unk_token": "<unk>", "bos_token": "<s>",\n'
                             b'  "eos_token": "</s>", "legacy": false, "add_bos_token": true}',
    "special_tokens_map.json": b'{"unk_token":"<unk>", "eos_token":"</s>",\t"bos_token":"<s>"}\n\n',
    "added_tokens.json": b"{}",
    "chat_template.jinja": b"{% for m in messages %}{{ m['content'] }}{% endfor %}\r\n",
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
}
OTHERS = {"README.md": b"# a model", "pytorch_model.bin": b"old weights", "training_args.bin": b"no"}


def test_a_tokenizers_files_are_copied_byte_for_byte(checkpoints, tmp_path):
    """transformers 5 would write another tokenizer_class, which transformers 4 does not know, and no tokenizer.model.
    Links, as in the hub's cache, become files; weights and README stay where they are."""
    source = shutil.copytree(checkpoints["llama"][0], tmp_path / "source")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "\u2581a": 5}
    bpe = Tokenizer(models.BPE(vocab=words, merges=[("\u2581", "a")], unk_token="<unk>"))
    held = {**TOKENIZER, "tokenizer.json": bpe.to_str(pretty=True).encode() + b"\n \n"}
    for name, content in {**held, **OTHERS}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    (source / "tokenizer.model").rename(tmp_path / "blob")
    (source / "tokenizer.model").symlink_to(tmp_path / "blob")
    mine = tmp_path / "mine"
    Transformer.from_pretrained(source).save_pretrained(mine, source)
    saved = {str(path.relative_to(mine)): path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    assert {name: content for name, content in saved.items() if name in held} == held
    assert set(saved) - set(held) == {"config.json", "generation_config.json", "model.safetensors"}
    assert not (mine / "tokenizer.model").is_symlink()
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(path) for path in (mine, source))
    assert type(ours) is type(theirs) and ours("a a").input_ids == theirs("a a").input_ids and 5 in ours("a").input_ids
    assert ours.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).strip() == "a"
    Transformer.from_pretrained(mine).save_pretrained(mine, str(mine))  # onto itself
    assert {name: (mine / name).read_bytes() for name in held} == held


def test_a_directory_without_a_tokenizer(checkpoints, tmp_path):
    net = Transformer.from_pretrained(checkpoints["llama"][0])
    with pytest.raises(UserError, match="no tokenizer"):
        net.save_pretrained(tmp_path / "mine", checkpoints["llama"][0])
    assert not os.path.exists(tmp_path / "mine")


def test_a_trailing_slash_is_the_same_directory(checkpoints, tmp_path):
    """Guards against a temporary directory inside the target, which replacing the target would throw away."""
    net = Transformer.from_pretrained(checkpoints["llama"][0])
    for _ in range(2):
        net.save_pretrained(f"{tmp_path}/mine/")
        assert os.listdir(tmp_path) == ["mine"]
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path / "mine"), ROWS[0]), logits(net, ROWS[0]))


@pytest.mark.parametrize("interruption", [OSError(28, "disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_checkpoint(checkpoints, tmp_path, monkeypatch, interruption):
    net = Transformer.from_pretrained(checkpoints["llama"][0])
    net.save_pretrained(tmp_path / "mine")
    before = files(tmp_path / "mine")
    written = []

    def write_two(tensors, path, metadata):
        if len(written) == 2:
            raise interruption
        written.append(path)
        real(tensors, path, metadata=metadata)

    real = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", write_two)
    with torch.no_grad():
        net.norm.add_(1)
    with pytest.raises((UserError, KeyboardInterrupt)):
        net.save_pretrained(tmp_path / "mine", max_shard_bytes=20_000)
    with pytest.raises((UserError, KeyboardInterrupt)):
        net.save_pretrained(tmp_path / "new", max_shard_bytes=20_000)
    assert len(written) == 2 and os.listdir(tmp_path) == ["mine"] and files(tmp_path / "mine") == before


@pytest.mark.parametrize("name", ["llama", "llama-bias", "gemma2", "gemma2-uncapped"])
def test_init_weights_is_a_function_of_the_generator(name):
    c = Config.from_hf(FAMILIES[name].to_dict())
    nets = [Transformer(c).init_weights(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    a, b, other = (logits(net, ROWS[0]) for net in nets)
    assert torch.equal(a, b) and not torch.equal(a, other) and 0.3 < a.std() < 3  # an untrained net is unsure
    x = torch.randn(5, 32)
    assert torch.equal(model._norm(x, nets[0].norm, c), torch.nn.functional.rms_norm(x, (32,), eps=c.norm_eps))


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints that cannot be read: one sentence that names the file


def edit_config(**changes):
    return lambda d: write_json({**read_json(d, "config.json"), **changes}, d, "config.json")


def edit_weights(change):
    def apply(d):
        weights = safetensors.torch.load_file(f"{d}/model.safetensors")
        change(weights)
        safetensors.torch.save_file(weights, f"{d}/model.safetensors")
    return apply


def text(name, content):
    def apply(d):
        with open(os.path.join(d, name), "w") as file:
            file.write(content)
    return apply


def shards(d):
    Transformer.from_pretrained(d).save_pretrained(d, max_shard_bytes=20_000)


def cut(name, size):
    return lambda d: os.truncate(os.path.join(d, name), size)


def missing(name):
    return lambda d: os.remove(os.path.join(d, name))


def both(first, second):
    return lambda d: (first(d), second(d))


def second_shard(d):
    return sorted(d.glob("model-*"))[1]


NORM = "model.layers.1.input_layernorm.weight"
VALUE = "model.layers.1.self_attn.v_proj.weight"
INDEX = "model.safetensors.index.json"
BAD = {  # what is done to a good checkpoint, the file that is named, and what else is said
    "unknown family": (edit_config(model_type="gpt2"), "config.json", "'gpt2'"),
    "no family": (edit_config(model_type=None), "config.json", "model_type"),
    "activation": (edit_config(hidden_act="gelu"), "config.json", 'hidden_act "gelu"'),
    "rope type": (edit_config(rope_parameters={"rope_type": "longrope"}), "config.json", "'longrope'"),
    "rope type, older": (edit_config(rope_parameters=None, rope_scaling={"type": "dynamic"}), "config.json", "dynamic"),
    "part of the head": (edit_config(partial_rotary_factor=0.75), "config.json", "partial_rotary_factor"),
    "yarn without its factor": (edit_config(rope_parameters={"rope_type": "yarn"}), "config.json", "'factor'"),
    "rope without its numbers": (edit_config(rope_parameters={"rope_type": "llama3"}), "config.json", "factor"),
    "linear rope without its factor": (edit_config(rope_parameters={"rope_type": "linear"}), "config.json", "factor"),
    "config lacks a key": (text("config.json", '{"model_type": "llama"}'), "config.json", "num_attention_heads"),
    "config is missing": (missing("config.json"), "config.json", "does not exist"),
    "config is cut": (text("config.json", '{"model_type": "llama",'), "config.json", "JSON"),
    "config is not text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json", "JSON"),
    "config is no object": (text("config.json", "[1, 2]"), "config.json", ""),
    "index is cut": (both(shards, text(INDEX, "{")), INDEX, "JSON"),
    "index without a map": (both(shards, text(INDEX, "{}")), INDEX, "weight_map"),
    "no weights": (missing("model.safetensors"), "model.safetensors", "missing"),
    "weights are empty": (cut("model.safetensors", 0), "model.safetensors", "truncated"),
    "weights are cut in the header": (cut("model.safetensors", 100), "model.safetensors", "truncated"),
    "weights are cut": (cut("model.safetensors", 20_000), "model.safetensors", "truncated"),
    "a shard is missing": (both(shards, lambda d: os.remove(second_shard(d))), "model-00002-of-", "missing"),
    "a shard is cut": (both(shards, lambda d: os.truncate(second_shard(d), 9_000)), "model-00002-of-", "truncated"),
    "a weight is missing": (edit_weights(lambda w: w.pop(NORM)), "", NORM),
    "weights of a shallower model": (edit_config(num_hidden_layers=4), "", "and 8 more"),
    "one weight too many": (edit_weights(lambda w: w.update({"extra": torch.ones(1)})), "model.safetensors", "extra"),
    "a weight is shorter": (edit_weights(lambda w: w.update({NORM: torch.ones(31)})), "model.safetensors", "[31]"),
    "NaN": (edit_weights(lambda w: w[NORM][3].fill_(float("nan"))), "model.safetensors", NORM),
    "infinite": (edit_weights(lambda w: w[NORM][3].fill_(float("inf"))), "model.safetensors", NORM),
    "minus infinite": (edit_weights(lambda w: w[VALUE][3, 5].fill_(-float("inf"))), "model.safetensors", VALUE),
    "config of a wider model": (edit_config(intermediate_size=48), "model.safetensors", "config.json wants"),
}


BAD_FAMILY = {  # a family's checkpoint, a change of its config.json, and what is said
    "longrope": ("phi3", dict(rope_parameters={"rope_type": "longrope"}), "'longrope'"),
    "longrope by another name": ("phi3", dict(rope_parameters=YARN), "phi3 checkpoints"),
    "too few flags": ("smollm3", dict(no_rope_layers=[1, 0]), "no_rope_layers"),
    "weights of another family": ("olmo2", dict(model_type="llama"), "post_feedforward_layernorm"),
    "parts of fused weights": ("mistral", dict(model_type="phi3"), "a phi3 model does not have"),
}


@pytest.mark.parametrize("how", BAD_FAMILY)
def test_bad_checkpoints_of_other_families(checkpoints, tmp_path, how):
    family, change, says = BAD_FAMILY[how]
    directory = shutil.copytree(checkpoints[family][0], tmp_path / "bad")
    edit_config(**change)(directory)
    with pytest.raises(UserError) as error:
        Transformer.from_pretrained(directory)
    assert str(directory) in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


BAD_GEMMA = {  # a change of config.json, and what is said
    "activation": (dict(hidden_activation="gelu"), 'hidden_activation "gelu"'),
    "both directions": (dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    "a cap of nothing": (dict(attn_logit_softcapping=0.0), "attn_logit_softcapping 0.0"),
    "a cap in words": (dict(final_logit_softcapping="30"), "final_logit_softcapping \"30\""),
    "no scale": (dict(query_pre_attn_scalar=None), "query_pre_attn_scalar null"),
    "too few kinds of layers": (dict(layer_types=["full_attention"]), "layer_types"),
    "an unknown kind of layer": (dict(layer_types=["full_attention"] * 2 + ["chunked_attention"]), "3 times"),
    "weights of another family": (dict(model_type="mistral"), "post_feedforward_layernorm"),
}


@pytest.mark.parametrize("how", BAD_GEMMA)
def test_bad_gemma_checkpoints(checkpoints, tmp_path, how):
    change, says = BAD_GEMMA[how]
    directory = shutil.copytree(checkpoints["gemma2"][0], tmp_path / "bad")
    edit_config(**change)(directory)
    with pytest.raises(UserError) as error:
        Transformer.from_pretrained(directory)
    assert str(directory) in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("how", BAD)
def test_bad_checkpoints(checkpoints, tmp_path, how):
    damage, file, says = BAD[how]
    directory = shutil.copytree(checkpoints["llama"][0], tmp_path / "bad")
    damage(directory)
    with pytest.raises(UserError) as error:
        Transformer.from_pretrained(directory)
    message = str(error.value)
    assert str(directory / file) in message and says in message and "\n" not in message and len(message) < 400


def test_paths_that_are_no_checkpoint(checkpoints, tmp_path):
    file = f"{checkpoints['llama'][0]}/config.json"
    for path in (file, str(tmp_path / "nowhere"), "./nowhere", "nobody/no-such-model"):
        with pytest.raises(UserError) as error:
            Transformer.from_pretrained(path)
        assert path in str(error.value) and "\n" not in str(error.value)
