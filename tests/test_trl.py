"""lsp.py's GRPO against the library's that the paper's baseline comes from: loss, gradient norm and some entries of the
gradient of one update, as TRL 1.16.0's own GRPOTrainer computed them (torch 2.13, transformers 5.23, CPU, float32) from
the same weights, prompts, completions and rewards at beta 0.05, four completions a prompt. Only its sampling was
replaced.
"""

import math

import pytest
import torch
import transformers

import challenger
import checkpoints
import flags
import lsp
import model
import run
from test_lsp import Keep, settle

CONFIG = dict(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
              bos_token_id=1, eos_token_id=2, pad_token_id=0)
PROMPTS = [[1, 17, 23, 5, 40], [1, 33, 8]]
COMPLETIONS = [[[12, 55, 2], [12, 7, 31, 31, 19, 2], [44, 2], [9, 28, 50, 13, 36, 21, 58]],    # the last one was cut
               [[20, 2], [20, 41, 6, 2], [3, 3, 27, 48, 15, 2], [57, 30, 11, 24, 2]]]
REWARDS = [[1.0, 0.0, 0.25, 0.0], [-0.5, 2.0, 0.5, 0.5]]
NAMES = ("lm_head.weight[2, 5]", "model.embed_tokens.weight[12, 3]", "model.layers.0.self_attn.q_proj.weight[4, 7]",
         "model.layers.1.mlp.down_proj.weight[6, 11]", "model.norm.weight[9]")
AS_TRL = dict(kl="k2-token", normalise="token", std_normalise=True)
# TRL's settings -> ours, the norm of its gradient, and the entries NAMES of it
RECORDED = {
    "its defaults": (AS_TRL, 2.3937844, (-0.0677222, -0.0115271, 0.0024709, 0.0092958, -0.0159676)),
    "use_bias_correction_kl=False": (AS_TRL | dict(kl="k3-token"), 2.3144019,
                                     (-0.0671253, -0.0103179, 0.0329327, 0.0123509, -0.0057359)),
    "loss_type='grpo'": (AS_TRL | dict(normalise="sequence"), 3.0691314,
                         (-0.0858847, -0.0088148, 0.0063756, 0.0110584, 0.0116997)),
    "scale_rewards='none'": (AS_TRL | dict(std_normalise=False), 1.5491078,
                             (-0.0356778, -0.0052698, 0.0065301, 0.0044116, -0.0080700)),
    "beta=0": (AS_TRL | dict(beta=0.0), 2.5902182, (-0.0723998, -0.0118810, -0.0030684, 0.0084716, -0.0192825))}


def noise(number, shape, salt):
    """Uniform in [-1, 1), by integers alone: the same on every machine and torch version. float32."""
    i = torch.arange(math.prod(shape)) + 1000003 * number + 7919 * salt
    h = (i * 1103515245 + 12345) % 2**31
    h = ((h ^ (h >> 13)) * 1597334677) % 2**31
    return (h.double() / 2**30 - 1).float().view(shape)


def network(directory, moved):
    """The reference or, `moved`, the policy, which has gone some way from it."""
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).float()
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(net.named_parameters())):
            if "norm" in name:
                size, middle, step = 0.2, 1.0, 0.1
            else:
                size = 1.0 if "embed" in name else (3.4 if "lm_head" in name else 1.7) / math.sqrt(weight.shape[-1])
                middle, step = 0.0, 0.25 * size
            weight.copy_(middle + size * noise(number, weight.shape, 1))
            if moved:
                weight += step * noise(number, weight.shape, 2)
    net.save_pretrained(directory)
    return model.Transformer.from_pretrained(directory)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return [network(str(tmp_path_factory.mktemp("trl") / name), name == "policy") for name in ("policy", "ref")]


def sampled(net):
    """The step's play, as if `net` had sampled it."""
    with torch.no_grad():
        logprob, row, rows = model.response_logprobs(net, PROMPTS, COMPLETIONS)
    pieces = [piece.tolist() for piece in logprob.split(row.bincount().tolist())]
    return lsp.Game([lsp.Play(challenger.Query(""), [""] * 4, prompt=prompt, answer_ids=answers, logp=pieces[4 * i:4 * i + 4])
                     for i, (prompt, answers) in enumerate(zip(PROMPTS, COMPLETIONS))])


@pytest.mark.parametrize("trl", RECORDED)
def test_one_update(trl, networks):
    ours, norm, entries = RECORDED[trl]
    policy, ref = networks
    args = settle(mode="grpo", **dict(queries=2, answers=4, beta=0.05, micro_batch=1) | ours)
    game = sampled(policy)
    A_sol, A_ch = lsp.advantages(torch.tensor(REWARDS), None, args)
    ratio = lsp.reference_ratios(ref, game.prompts, game.answer_ids, game.token_logp, args, (0, 1))
    keep = Keep(policy)
    lsp.gradient_step(policy, keep, game, A_sol, A_ch, ratio, None, None, args, 1e-6)
    grads = checkpoints.names_in(policy)                            # a view of each weight under Hugging Face's name ...
    with torch.no_grad():
        for weight, grad in zip(policy.parameters(), keep.grads):
            weight.kept = weight.clone()
            weight.copy_(grad)                              # ... which now shows the gradient
        got = torch.tensor([grads[name.split("[")[0]][tuple(map(int, name[:-1].split("[")[1].split(",")))]
                            for name in NAMES])
        for weight in policy.parameters():
            weight.copy_(weight.kept)
    torch.testing.assert_close(got, torch.tensor(entries), atol=1e-6, rtol=2e-4)
    total = math.sqrt(sum(float(grad.double().square().sum()) for grad in keep.grads))
    assert total == pytest.approx(norm, rel=1e-5)


def test_the_preset_is_trls_default():
    args = lsp.settle(flags.parse(lsp.Settings, ["--preset", "trl-grpo", "--prompts", "p"], "", lsp.PRESETS))
    assert (args.mode, args.beta, args.lr, args.kl, args.normalise, args.std_normalise) == (
        "grpo", 0.05, 1e-6, "k2-token", "token", True)
