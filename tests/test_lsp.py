"""lsp.py: the two players' advantages and the KL term against enumeration, the loss against the naive one, a run."""

import dataclasses
import json
import os

import pytest
import torch

import eval
import kernels
import lsp
import model
import world
from conftest import Killed
from run import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

SMALL = dict(steps=4, queries=6, answers=3, test_prompts=20, eval_every=2, print_every=1, micro_batch=4,
             max_new_tokens=8, max_rows=64, device="cpu")


def argv(**settings):
    """Settings as flags."""
    return [word for name, value in settings.items()
            for word in ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])]


def settle(**settings):
    return lsp.settle(lsp.Settings(**settings))


# ---------------------------------------------------------------------------------------------------------------------
# advantages


R = torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 1.0]])
R_Q = torch.tensor([[6.0, 3.0, 3.0], [1.0, 2.0, 0.0]])


def test_advantages_by_hand():
    """V = .5, 1; V_Q = 4, 1. The Challenger's rewards are -V + V_Q = 3.5, 0; the Solver's R + R_Q."""
    A_sol, A_ch = lsp.advantages(R, R_Q, settle(reward_scale=1.0))
    torch.testing.assert_close(A_sol, torch.tensor([[2.5, -1.5, -1.0], [0.0, 1.0, -1.0]]))
    torch.testing.assert_close(A_ch, torch.tensor([1.75, -1.75]))


def test_the_zero_sum_game():
    """Without R_Q the hard query is the better one, by how much V differs."""
    A_sol, A_ch = lsp.advantages(R, None, settle(reward_scale=1.0))
    torch.testing.assert_close(A_sol, R - R.mean(1, keepdim=True))
    torch.testing.assert_close(A_ch, torch.tensor([0.25, -0.25]))


@pytest.mark.parametrize("kind, want", [("spread", [0.5, 0.0]), ("frontier", [0.0, -0.5])])
def test_other_rewards_of_the_challenger(kind, want):
    """A query that every answer solves gives the least: nothing can be learned from it. Scale 3 scales these too."""
    _, A_ch = lsp.advantages(3 * R, None, settle(reward_scale=3.0, challenger_reward=kind))
    want = 3 * torch.tensor(want)
    torch.testing.assert_close(A_ch, want - want.mean())


def test_std_normalise():
    A_sol, _ = lsp.advantages(R, None, settle(reward_scale=1.0, std_normalise=True))
    torch.testing.assert_close(A_sol[0], torch.tensor([1.0, -1.0, 0.0]), atol=1e-3, rtol=0)
    assert A_sol[1].tolist() == [0, 0, 0]           # a group without differences is no division by zero


def test_normalise():
    lengths = [2, 4, 6]
    assert lsp.token_weights(lengths, "none", 10).tolist() == [1, 1, 1]
    torch.testing.assert_close(lsp.token_weights(lengths, "sequence", 10), torch.tensor([1 / 2, 1 / 4, 1 / 6]))
    torch.testing.assert_close(lsp.token_weights(lengths, "token", 10), torch.tensor([1 / 4] * 3))
    torch.testing.assert_close(lsp.token_weights(lengths, "constant", 10), torch.tensor([1 / 10] * 3))


# ---------------------------------------------------------------------------------------------------------------------
# the KL term, enumerated: a policy over two tokens of three, the second depending on the first


def sequences(theta):
    """log pi of all 9 sequences, from theta [4, 3]: one softmax for the first token, three for the second."""
    first, second = theta[0].log_softmax(0), theta[1:].log_softmax(1)
    return (first[:, None] + second).flatten()


@pytest.fixture
def policies():
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    return draw[0].requires_grad_(), sequences(draw[1])


def gradient(f, theta):
    return torch.autograd.grad(f, theta)[0]


@pytest.mark.parametrize("kl, exact", [
    ("reward", lambda log_pi, log_ref: (log_pi.exp() * (log_pi - log_ref)).sum()),      # KL(pi || ref)
    ("k2", lambda log_pi, log_ref: (log_pi.exp() * (log_pi - log_ref)).sum()),
    ("k3", lambda log_pi, log_ref: (log_ref.exp() * (log_ref - log_pi)).sum()),         # KL(ref || pi)
    ("k1", lambda log_pi, log_ref: 0 * log_pi.sum())])                                  # nothing
def test_expected_gradient_of_the_kl_terms(kl, exact, policies):
    """E_{y ~ pi}[c(y) grad log pi(y)] over all sequences, against the gradient of the divergence itself."""
    theta, log_ref = policies
    log_pi = sequences(theta)
    c = lsp.coefficient(torch.zeros(9, dtype=torch.float64), (log_pi - log_ref).detach(), 0.3, kl)
    got = gradient((log_pi.exp().detach() * c * log_pi).sum(), theta)
    want = 0.3 * gradient(exact(sequences(theta), log_ref), theta)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    assert (want.abs().max() > 1e-2) == (kl != "k1")


def test_expected_gradient_of_the_whole_loss(policies):
    """With an advantage: the gradient of -(E[A] - beta KL)."""
    theta, log_ref = policies
    A = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_pi = sequences(theta)
    c = lsp.coefficient(A, (log_pi - log_ref).detach(), 0.3, "reward")
    got = gradient((log_pi.exp().detach() * c * log_pi).sum(), theta)
    log_pi = sequences(theta)
    want = gradient(-(log_pi.exp() * (A - 0.3 * (log_pi - log_ref))).sum(), theta)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# one step


class Keep:
    """An optimizer that keeps the gradient and moves nothing."""

    def __init__(self, net):
        self.net = net

    def collect(self):
        pass

    def step(self, lr, clip):
        self.grads = [p.grad.clone() for p in self.net.parameters()]
        self.net.zero_grad(set_to_none=True)
        return 1.0


@pytest.mark.parametrize("mode, normalise, micro_batch",
                         [("lsp", "none", 64), ("lsp", "sequence", 2), ("grpo", "none", 4)])
def test_loss_and_gradient_by_hand(mode, normalise, micro_batch, base):
    """(4) + alpha_ch (5), a row at a time through the whole network, with another model as the reference."""
    net, chat = eval.load(base, "cpu", torch.float32)
    ref = model.Transformer.from_pretrained(base)
    with torch.no_grad():
        for p in ref.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    s = settle(**SMALL | {"micro_batch": micro_batch}, mode=mode, normalise=normalise, beta=0.5,
               **({"alpha_ch": 0.7} if mode == "lsp" else {}))
    data = world.queries("train", 6) if mode == "grpo" else None
    game = lsp.play(net, chat, s, 0, data)
    generator = torch.Generator().manual_seed(3)
    A_sol, A_ch = torch.randn(6, 3, generator=generator), torch.randn(6, generator=generator)
    challenge = None if data else chat.encode(world.CHALLENGE)
    keep = Keep(net)
    metrics = lsp.gradient_step(net, ref, keep, game, A_sol, A_ch, challenge, s, 0.1)

    def logp(which, prompt, response):
        tokens = torch.tensor([prompt + response])
        logits = which.logits(which(tokens))[0, len(prompt) - 1:-1]
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()

    def term(prompt, response, A, longest):
        ours = logp(net, prompt, response)
        ratio, l = (ours - ours.detach()).exp(), (ours - logp(ref, prompt, response)).detach()
        return -ratio * (A - s.beta * l) / (len(response) if normalise == "sequence" else 1)

    loss = sum(term(game.prompts[i], game.answer_ids[i][j], A_sol[i, j], 8) for i in range(6) for j in range(3)) / 18
    if challenge:
        loss = loss + s.alpha_ch * sum(term(challenge, game.query_ids[i], A_ch[i], 24) for i in range(6)) / 6
    loss.backward()
    for got, p in zip(keep.grads, net.parameters()):
        torch.testing.assert_close(got, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()))
    assert ("kl_challenger" in metrics) == (mode == "lsp") and abs(metrics["kl_solver"]) > 1e-4


def test_policy_loss_is_linear_logprob_in_one_pass():
    """Values and gradients of both, at sizes that do not divide the tile, with and without Gemma's cap."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 16, generator=generator), torch.randn(101, 16, generator=generator)
    target, coef = torch.randint(101, (37,), generator=generator), torch.randn(37, generator=generator)
    tile, kernels.POLICY_TILE = kernels.POLICY_TILE, 700
    try:
        for cap in (None, 3.0):
            one, two = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
            loss, logprob = kernels.linear_policy_loss(*one, target, coef, cap)
            want = kernels.linear_logprob(*two, target, cap)
            (2 * loss).backward()
            (2 * (coef * want).sum()).backward()
            torch.testing.assert_close(logprob, want.detach(), atol=1e-5, rtol=1e-5)
            for a, b in zip(one, two):
                torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    finally:
        kernels.POLICY_TILE = tile


# ---------------------------------------------------------------------------------------------------------------------
# self-reward


@pytest.mark.parametrize("how", ["sample", "expected"])
def test_self_reward(how, base):
    """Verdicts in 0..7, equal for equal pairs; `expected` is the mean of the digits' distribution."""
    net, chat = eval.load(base, "cpu", torch.float32)
    judge = lsp.SelfReward(net, chat, settle(**SMALL, self_reward=how))
    queries, answers = ["copy:ab", "upper:abc"], [["ab", "ab", "ba"], ["ABC", "abc", "ABC"]]
    scores, unread = judge.score(queries, answers, 0)
    assert scores.shape == (2, 3) and ((0 <= scores) & (scores <= 7)).all() and 0 <= unread <= 1
    assert scores[0, 0] == scores[0, 1] and scores[1, 0] == scores[1, 2]
    if how == "expected":
        ids = torch.tensor([chat.encode(world.JUDGE.format(query="copy:ab", answer="ba"))])
        p = net.logits(net(ids)[:, -1])[0, judge.digits].softmax(0)
        assert float(scores[0, 2]) == pytest.approx(float((p * torch.arange(8)).sum().detach()), abs=1e-4)


def test_an_unread_verdict_is_no_zero(base, monkeypatch):
    """It takes the mean of those that could be read, and is counted."""
    net, chat = eval.load(base, "cpu", torch.float32)
    judge = lsp.SelfReward(net, chat, settle(**SMALL))
    texts = iter(["6", "66", "3", ""])
    monkeypatch.setattr(chat, "decode", lambda ids: next(texts))
    scores, unread = judge.score(["copy:ab", "upper:abc"], [["ab", "ba"], ["ABC", "abc"]], 0)
    assert scores.tolist() == [[6, 4.5], [3, 4.5]] and unread == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# whole runs


def lines(path):
    return [json.loads(line) for line in open(path)]


@pytest.mark.parametrize("mode", ["lsp", "lsp-zero", "grpo"])
def test_a_run(mode, base):
    lsp.main(argv(model=base, out="out", mode=mode, **SMALL))
    summary = json.load(open("out/summary.json"))
    assert summary["method"] == mode
    assert [e["name"] for e in summary["evaluations"]] == ["base", "base, greedy", "step 2", "step 4"]
    rows = lines("out/metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and abs(rows[0]["kl_solver"]) < 1e-4
    assert abs(rows[-1]["kl_solver"]) > 1e-5
    assert all(("self_reward" in r) == (mode == "lsp") and ("malformed" in r) == (mode != "grpo") for r in rows)
    assert ("base_accuracy" in summary["evaluations"][-1]) == (mode != "grpo")
    assert os.path.exists("out/step-4/model.safetensors") and os.path.exists("out/curves.png")


def test_grpo_never_sees_a_held_out_query(base, monkeypatch):
    seen, play = [], lsp.play

    def watched(net, chat, s, step, data=None):
        seen.extend(data)
        return play(net, chat, s, step, data)

    monkeypatch.setattr(lsp, "play", watched)
    lsp.main(argv(model=base, out="out", mode="grpo", **SMALL))
    assert len(set(seen)) == 24 and {world.split(q) for q in seen} == {"train"}


def test_a_killed_run_resumes_bit_for_bit(base, dies_in):
    """It dies in the fourth step, two after the last saved state."""
    lsp.main(argv(model=base, out="whole", **SMALL))
    dies_in(lsp, "gradient_step", 4)
    with pytest.raises(Killed):
        lsp.main(argv(model=base, out="killed", **SMALL))
    lsp.main(argv(model=base, out="killed", resume=True, **SMALL))
    for name in ("metrics.jsonl", "samples.jsonl", "step-4/model.safetensors"):
        assert open(f"whole/{name}", "rb").read() == open(f"killed/{name}", "rb").read(), name


def test_lsp_after_grpo(base):
    """--init takes the last checkpoint, and it is the reference too: the first log-ratios are 0."""
    lsp.main(argv(model=base, out="first", mode="grpo", **SMALL))
    lsp.main(argv(init="first", out="second", **SMALL))
    summary = json.load(open("second/summary.json"))
    assert summary["base"] == os.path.join("first", "step-4")
    assert abs(lines("second/metrics.jsonl")[0]["kl_solver"]) < 1e-4


@pytest.mark.parametrize("settings, says", [
    (dict(queries=1), "--queries 1"), (dict(answers=1), "--answers 1"), (dict(alpha_ch=-1.0), "--alpha-ch -1"),
    (dict(beta=float("nan")), "--beta nan"), (dict(steps=0), "--steps 0"), (dict(lr=0.0), "--lr 0"),
    (dict(model="m", init="r"), "--model and --init"), (dict(mode="lsp-zero", self_reward="expected"), "--self-reward"),
    (dict(mode="grpo", challenger_reward="spread"), "no Challenger"), (dict(mode="grpo", alpha_ch=0.1), "--alpha-ch")])
def test_settings_that_make_no_sense(settings, says):
    with pytest.raises(UserError, match=says):
        settle(**settings)


def test_init_without_a_checkpoint():
    with pytest.raises(UserError, match="--init nowhere holds no checkpoint"):
        lsp.initial_model(settle(init="nowhere"))


def test_what_is_given_is_kept():
    s = settle(beta=0.0, steps=7)
    assert (s.beta, s.steps, s.queries) == (0.0, 7, 32) and None not in dataclasses.asdict(s).values()
