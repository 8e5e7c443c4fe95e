"""What a researcher brings, end to end on small random checkpoints: conversations, verifiers and functions, language
models as judges, thinking, and runs that go on. And what goes wrong is seen."""

import json
import os
import shutil
import types

import pytest
import torch

import eval
import flags
import lsp
import run
import sppo
import world
from chat import load_checkpoint, read_prompts
from conftest import PROMPTS, Killed, file, is_png, rows
from run import UserError
from table import read_table, training_examples, without_long_prompts
from test_chat import TALK
from test_lsp import argv, lines
from test_lsp import SMALL as LSP
from test_sppo import SMALL as SPPO

pytestmark = pytest.mark.usefixtures("elsewhere")

REAL_SPPO = dict(iterations=1, prompts_per_iteration=8, k=2, batch_size=4, validation_prompts=3, test_prompts=4,
                 max_new_tokens=8, max_prompt_tokens=0, lr=1e-4, device="cpu")
REAL_LSP = dict(queries=4, answers=2, steps=2, max_new_tokens=8, test_prompts=4, eval_every=2, print_every=1, lr=1e-3,
                warmup=0, device="cpu")
OWN = '''
"""Judges of one's own."""

def longer(prompt, answer, row):
    return min(1.0, len(answer) / 100)
longer.bounds = (0, 1)

def points(prompt, answer, row):
    return 7.0

def better(prompt, a, b, row):
    assert row["answer"] and prompt.turns[-1]["role"] == "user"
    return 0.9 if len(a) > len(b) else 0.1 if len(a) < len(b) else 0.5
'''


def talks():
    """Fifteen conversations with a known answer, as .jsonl."""
    told = [{"messages": [*TALK[:-1], {"role": "user", "content": prompt}], "answer": "42"} for prompt in PROMPTS[:15]]
    return file("talks.jsonl", rows(*told))


def evaluations(out):
    return json.load(open(f"{out}/summary.json"))["evaluations"]


# ---------------------------------------------------------------------------------------------------------------------
# SPPO: conversations, functions, language models as judges


def test_conversations_from_file_to_table_to_checkpoint(llama3):
    """Turns and columns arrive at the judge, at the table, at the held-out files and in the trained ids; phases one at
    a time end with the same bytes."""
    flags = REAL_SPPO | dict(model=llama3, prompts=talks(), judge="python:own.py:better", keep="last")
    file("own.py", OWN)
    sppo.main(argv(**flags, out="whole"))
    for stage in ("sample", "judge", "train"):
        sppo.main(argv(**flags, out="parts", stage=stage))
    for name in ("table-1.jsonl", "iter-1/model.safetensors"):
        assert open(f"whole/{name}", "rb").read() == open(f"parts/{name}", "rb").read()
    table = read_table("whole/table-1.jsonl", judged=True)
    for row in table:
        assert row["prompt"][:3] == TALK[:3] and row["row"]["answer"] == "42"
        assert row["chosen"][:-1] == row["prompt"] and row["chosen"][-1]["role"] == "assistant"
        lengths = [len(row[name][-1]["content"]) for name in ("chosen", "rejected")]
        assert lengths[0] >= lengths[1]
    held, = {prompt.row["answer"] for prompt in read_prompts("whole/state/test.jsonl")}
    assert held == "42" and all(p.turns[:3] == TALK[:3] for p in read_prompts("whole/state/validation.jsonl"))
    tokenizer = open(f"{llama3}/tokenizer.json", "rb").read()
    assert open("whole/iter-1/tokenizer.json", "rb").read() == tokenizer


def test_text_in_a_table_of_conversations_trains(llama3):
    """TRL's layout, chosen and rejected alone: what precedes the answers is the prompt."""
    talk = [{"role": "assistant", "content": text} for text in ("2, of course.", "Three.")]
    row = {"chosen": [*TALK, talk[0]], "rejected": [*TALK, talk[1]], "chosen_probs": 0.8, "chosen_probs_win": 0.7,
           "chosen_probs_lose": 0.2}
    # some tables repeat the user's last words as `prompt`
    table = file("t.jsonl", rows(row, row | {"prompt": "Two."}, row | {"prompt": TALK}))
    assert [each["prompt"] for each in read_table(table, judged=True)] == [TALK] * 3
    sppo.main(argv(model=llama3, stage="train", table=table, keep="last", out="out", max_prompt_tokens=0, batch_size=3,
                   max_new_tokens=8, lr=1e-4, device="cpu"))
    assert os.path.exists("out/iter-1/model.safetensors") and lines("out/metrics.jsonl")[0]["loss"] > 0
    other = row | {"rejected": [*TALK[1:], talk[1]]}
    with pytest.raises(UserError, match="line 2: .*those turns and one by the assistant"):
        read_table(file("t.jsonl", rows(row, other)), judged=True)


@pytest.mark.slow
def test_a_language_model_judges_its_own_answers(llama):
    """Self-rewarding SPPO: the judge is the policy's start."""
    start = f"{llama}/model"
    flags = REAL_SPPO | dict(model=start, judge=f"model:{start}", prompts=talks())
    sppo.main(argv(**flags, out="out"))
    P = torch.tensor([row["probability"] for row in read_table("out/table-1.jsonl", judged=True)])
    torch.testing.assert_close(P + P.mT, torch.ones_like(P))
    assert (P != 0.5).any() and [row["name"] for row in evaluations("out")] == ["base", "base, greedy", "iteration 1"]


def test_winrate_with_a_language_model_and_with_a_verifier(llama, capsys):
    start = f"{llama}/model"
    common = dict(model=start, vs=start, prompts=talks(), count=3, max_new_tokens=6, device="cpu", json=True)
    for judge in (f"model:{start}", "verify:gsm8k"):
        eval.main(["winrate", *argv(**common, judge=judge)])
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert told["judge"] == judge and told["win_rate_greedy"] == 0.5
        assert (told["accuracy_greedy"] is None) == judge.startswith("model:")


def test_what_was_thought_is_not_judged(monkeypatch):
    """The judge sees what follows </think>, and nothing of an answer that never stops thinking."""
    seen = []

    def preference(prompts, responses):
        seen.extend(responses)
        return torch.full((len(prompts), 2, 2), 0.5)

    row = {"prompt": "2 + 2?", "generate_0": [{"content": "<think>Two and two.</think>\n\n4"}],
           "generate_1": [{"content": "<think>Let me see"}]}
    sppo.judge_answers([row], types.SimpleNamespace(preference=preference), (0, 1))
    assert seen == [["4", ""]]


def test_the_preset_of_gemma():
    args = flags.parse(sppo.Settings, ["--preset", "gemma-2-9b"], "", sppo.PRESETS)
    assert (args.model, args.lr, args.batch_size, args.epochs) == ("google/gemma-2-9b-it", 5e-7, 64, 1)


def test_a_long_prompt_stays_where_its_answers_are_short(llama, capsys):
    """As in the official code: beyond --max-prompt-tokens it goes only where a picked answer is cut by the total."""
    chat = load_checkpoint(f"{llama}/model", "cpu", torch.float32)[1]
    long = "word " * 30
    size = len(chat.encode(long))
    args = sppo.settle(sppo.Settings(model="m", prompts="p", judge="pairrm:x", keep="last", drop_long_prompts=True,
                                     max_prompt_tokens=20, max_new_tokens=50, max_total_tokens=size + 10))

    def row(prompt, *answers):
        told = {f"generate_{k}": [{"role": "user", "content": prompt}, {"role": "assistant", "content": a}]
                for k, a in enumerate(answers)}
        return {"prompt": prompt, **told, "chosen": told["generate_0"], "rejected": told["generate_1"],
                "chosen_probs_win": 0.8, "chosen_probs_lose": 0.2}

    examples, told = training_examples([row(long, "yes", "no"), row(long, "yes", "no " * 20), row("a", "yes", "no")],
                                       chat, args)
    assert [len(e["prompt"]) > 20 for e in examples] == [True, False] and told["cut_share"] == 0
    assert "left out 1 of 3 prompts: longer than 20 tokens, and with an answer that --max-total-tokens" in (
        capsys.readouterr().out)
    assert without_long_prompts([long, "word " * 60], chat, args, 0) == [long]


# ---------------------------------------------------------------------------------------------------------------------
# LSP and GRPO: verifiers, functions, thinking, a self-reward that says nothing


def test_grpo_with_a_verifier(llama):
    """The reference answer travels with the prompt into the reward, the table and the held-out file."""
    lsp.main(argv(**REAL_LSP, mode="grpo", model=f"{llama}/model", reward="verify:gsm8k", prompts=talks(), out="out"))
    assert all(row["reward"] in (0.0, 1.0) or 0 <= row["reward"] <= 1 for row in lines("out/metrics.jsonl"))
    assert evaluations("out")[-1]["accuracy_greedy"] is not None
    assert {prompt.row["answer"] for prompt in read_prompts("out/state/test.jsonl")} == {"42"}


def test_a_prompt_without_the_answer_is_refused_before_anything_runs(llama):
    """In the verifier's own sentence, by all who ask it."""
    start, prompts = f"{llama}/model", file("p.jsonl", rows(*({"prompt": p, "id": 1} for p in PROMPTS[:15])))
    for begin in (lambda: lsp.main(argv(**REAL_LSP, mode="grpo", model=start, reward="verify:gsm8k", prompts=prompts,
                                        out="out")),
                  lambda: sppo.main(argv(**REAL_SPPO, model=start, judge="verify:gsm8k", prompts=prompts, out="out")),
                  lambda: eval.main(["winrate", *argv(model=start, vs=start, judge="verify:gsm8k", prompts=prompts)])):
        with pytest.raises(UserError, match="^verify:gsm8k needs a column `answer` .* .* has only id; add it$"):
            begin()
    assert not os.path.exists("out")


def test_right_answers_are_paid(llama, monkeypatch):
    """A Solver that says 42 to everything has accuracy 1, by the verifier and in the table."""
    monkeypatch.setattr("chat.Chat.decode", lambda self, tokens: "<think>41?</think>\n#### 42")
    lsp.main(argv(**REAL_LSP, mode="grpo", model=f"{llama}/model", reward="verify:gsm8k", prompts=talks(), out="out"))
    assert {row["reward"] for row in lines("out/metrics.jsonl")} == {1.0}
    assert evaluations("out")[-1]["accuracy_greedy"] == 1.0 and lines("out/samples.jsonl")[0]["answer"] == "#### 42"


def test_frontier_for_any_reward_between_0_and_1(llama):
    file("own.py", OWN)
    flags = REAL_LSP | dict(model=f"{llama}/model", mode="lsp-zero", challenger_reward="frontier", max_query_tokens=8)
    lsp.main(argv(**flags, reward="python:own.py:longer", out="out"))
    assert 0 < lines("out/metrics.jsonl")[-1]["reward"] < 1
    # not declared, and not so: measured at the first step
    with pytest.raises(UserError, match="--challenger-reward frontier is for rewards in .0, 1., and --reward "
                                        "python:own.py:points gave 7 to 7"):
        lsp.main(argv(**flags, reward="python:own.py:points", out="other"))
    file("other.py", OWN + "points.bounds = (0, 7)")
    with pytest.raises(UserError, match=r"other.py:points lie in \[0, 7\]"):
        lsp.main(argv(**flags, reward="python:other.py:points", out="third"))
    assert not os.path.exists("third")


def test_another_judge_for_the_table(llama):
    file("own.py", OWN.replace('assert row["answer"] and', "assert row == {} and"))
    flags = REAL_LSP | dict(model=f"{llama}/model", mode="lsp-zero", max_query_tokens=8, reward="python:own.py:points")
    lsp.main(argv(**flags, judge="python:own.py:better", out="out"))
    assert {row["reward"] for row in lines("out/metrics.jsonl")} == {7.0}
    assert any(row["win_rate"] != 0.5 for row in evaluations("out"))        # R would call everything a tie
    lsp.main(argv(**flags, out="other"))
    assert {row["win_rate"] for row in evaluations("other")} == {0.5}


@pytest.mark.parametrize("settings, says", [
    (dict(reward="verify:gsm8k"), "verify:gsm8k knows the answers to --prompts alone"),
    (dict(reward="python:own.py:better"), "rates no single answer"),
    (dict(reward="python:own.py:longer", judge="oracle"), "--judge oracle knows only"),
    (dict(reward="model:m"), "--reward model:m gives no rewards")])
def test_rewards_that_cannot_be(settings, says, llama):
    file("own.py", OWN)
    with pytest.raises(UserError, match=says):
        lsp.main(argv(**REAL_LSP, model=f"{llama}/model", out="out", **settings))
    assert not os.path.exists("out")


def test_thinking_is_no_query_and_no_answer(llama, monkeypatch):
    """A query is read behind </think>; a Challenger that never stops thinking has asked nothing."""
    net, chat = load_checkpoint(f"{llama}/model", "cpu", torch.float32)
    said = iter(["<think>a puzzle?</think>[Start Generation] Why? [End Generation]", "<think>hm", "Who?", "<think>",
                 *["<think>So.</think> Because."] * 8])
    monkeypatch.setattr(chat, "decode", lambda tokens: next(said))
    args = lsp.settle(lsp.Settings(**REAL_LSP, model="m", reward="reward:r", max_query_tokens=8))
    game = lsp.play(net, chat, args, 0, chat.encode("Ask."))
    assert game.queries == ["Why?", "", "Who?", ""] and game.answers == [["Because."] * 2] * 4


def test_a_self_reward_that_says_nothing_is_told_and_ends_the_run(llama, dies_in, capsys):
    """A random model writes no <Score>: the game is then the zero-sum one. Also over an interruption."""
    file("own.py", OWN)
    flags = REAL_LSP | dict(model=f"{llama}/model", reward="python:own.py:longer", steps=12, eval_every=4, answers=2,
                            queries=2, max_query_tokens=4, max_verdict_tokens=4, test_prompts=2, max_new_tokens=4)
    dies_in(lsp, "gradient_step", 7)
    with pytest.raises(Killed):
        lsp.main(argv(**flags, out="out"))
    told = capsys.readouterr().out
    assert told.count("100% of the self-reward's verdicts could not be read") == 1 and "--max-verdict-tokens" in told
    assert "100% of verdicts unread" in told and "% cut" in told                    # the step line
    with pytest.raises(UserError, match="step 10: 100% of the self-reward's .* --self-reward expected .for ten steps"):
        lsp.main(argv(**flags, out="out", resume=True))
    assert [row["step"] for row in lines("out/metrics.jsonl")] == list(range(1, 11))


def test_steps_with_a_readable_verdict_begin_the_count_anew():
    job = types.SimpleNamespace(mute_steps=0, record=types.SimpleNamespace(say=lambda text: None))
    for step, share in enumerate([1.0] * 9 + [0.5] + [0.6] * 9):
        lsp.check_verdicts(step, share, job)
    with pytest.raises(UserError):
        lsp.check_verdicts(19, 0.6, job)


# ---------------------------------------------------------------------------------------------------------------------
# going on: more iterations, more steps; every evaluation can be read


def played(out):
    return [row["prompt"] for t in (1, 2, 3) if os.path.exists(f"{out}/table-{t}.jsonl")
            for row in lines(f"{out}/table-{t}.jsonl")]


@pytest.mark.slow
def test_iterations_may_grow_in_a_world(base):
    sppo.main(argv(model=base, out="out", **SPPO | dict(iterations=1)))
    before, held = evaluations("out"), open("out/state/test.jsonl").read() + open("out/state/validation.jsonl").read()
    table = open("out/table-1.jsonl").read()
    for iterations in (2, 3):
        sppo.main(argv(model=base, out="out", resume=True, **SPPO | dict(iterations=iterations)))
    assert evaluations("out")[:3] == before and evaluations("out")[-1]["name"] == "iteration 3"
    assert held == open("out/state/test.jsonl").read() + open("out/state/validation.jsonl").read()
    assert open("out/table-1.jsonl").read() == table and len(set(played("out"))) == 60 == len(played("out"))
    sppo.main(argv(model=base, out="out", resume=True, **SPPO | dict(iterations=3)))           # nothing left to do
    with pytest.raises(UserError, match="--iterations 3 or more"):
        sppo.main(argv(model=base, out="out", resume=True, **SPPO | dict(iterations=2)))


def test_iterations_may_grow_on_a_file(base):
    """What the file has left; all of it was played where an iteration took all there was; more sources may come."""
    queries = world.OPERATIONS.queries("train", 90)
    file("p.txt", "\n".join(queries[:50])), file("more.txt", "\n".join(queries[40:65]))
    flags = SPPO | dict(model=base, judge="oracle", world="", validation_prompts=5, test_prompts=5, epochs=1)
    flags = {name: value for name, value in flags.items() if name != "world"}
    one = argv(**flags | dict(prompts="p.txt", iterations=1, prompts_per_iteration=15, judge="python:own.py:even"))
    file("own.py", "def even(prompt, a, b, row):\n    return 0.5\n")
    sppo.main([*one, "--out", "out"])
    sppo.main([*one, "--out", "out", "--resume", "--iterations", "2"])
    assert len(set(played("out"))) == len(played("out")) == 30
    with pytest.raises(UserError, match="has 50 distinct prompts; 3 iterations .*in a new run, with --model"):
        sppo.main([*one, "--out", "out", "--resume", "--iterations", "3"])
    every = [*one, "--prompts-per-iteration", "0", "--out", "all"]
    sppo.main(every)
    held = open("all/state/test.jsonl").read()
    with pytest.raises(UserError, match="has 50 distinct prompts; 2 iterations"):
        sppo.main([*every, "--resume", "--iterations", "2"])
    sppo.main([*every, "--resume", "--iterations", "2", "--prompts", "p.txt,more.txt"])
    assert len(set(played("all"))) == len(played("all")) == 55 and held == open("all/state/test.jsonl").read()
    assert set(played("all")).isdisjoint(read_prompts("all/state/test.jsonl"))


def test_sources_are_not_added_to_a_half_sampled_iteration(base, dies_in):
    """They divide the prompts anew, and one of them would be played twice."""
    queries = world.OPERATIONS.queries("train", 60)
    file("p.txt", "\n".join(queries[:50])), file("more.txt", "\n".join(queries[50:]))
    file("own.py", "def even(prompt, a, b, row):\n    return 0.5\n")
    flags = argv(**SPPO | dict(model=base, prompts="p.txt", iterations=1, prompts_per_iteration=0,
                               validation_prompts=5, test_prompts=5, judge="python:own.py:even", out="out"))
    dies_in(sppo, "sample_answers", 3)
    with pytest.raises(Killed):
        sppo.main(flags)
    with pytest.raises(UserError, match="an iteration is half sampled; give the same --prompts until it is done"):
        sppo.main([*flags, "--resume", "--iterations", "2", "--prompts", "p.txt,more.txt"])
    sppo.main([*flags, "--resume"])
    assert len(set(played("out"))) == len(played("out")) == 40


def test_a_prompts_file_that_changed_is_refused(base):
    """It would be divided anew, and prompts played twice."""
    queries = world.OPERATIONS.queries("train", 60)
    file("p.txt", "\n".join(queries[:50]))
    file("own.py", "def even(prompt, a, b, row):\n    return 0.5\n")
    flags = argv(**SPPO | dict(model=base, prompts="p.txt", iterations=1, prompts_per_iteration=10, epochs=1,
                               validation_prompts=5, test_prompts=5, judge="python:own.py:even", out="out"))
    sppo.main(flags)
    file("p.txt", "\n".join(queries))
    with pytest.raises(UserError, match="--prompts p.txt has changed since the run began"):
        sppo.main([*flags, "--resume", "--iterations", "2"])


def test_overwrite_does_not_delete_what_the_run_needs(base):
    sppo.main(argv(model=base, out="out", **SPPO | dict(iterations=1)))
    for start in (lambda: sppo.main(argv(model="out/iter-1", out="out", overwrite=True, **SPPO)),
                  lambda: lsp.main(argv(model="./out/iter-1", out="out", overwrite=True, **LSP))):
        with pytest.raises(UserError, match="--overwrite would delete what --model .*out/iter-1 names"):
            start()
    assert os.path.exists("out/iter-1/model.safetensors")
    file("out/own.txt", "a prompt")                     # a user's, which --overwrite leaves where it is
    assert run.check_out("out", sppo.Settings(prompts="out/own.txt", out="out"), resume=False, overwrite=True)


@pytest.mark.parametrize("mode", [pytest.param("lsp", marks=pytest.mark.slow), "grpo"])
def test_steps_may_grow(mode, base):
    """Two steps and then four in all are four at once."""
    lsp.main(argv(model=base, out="whole", mode=mode, **LSP))
    lsp.main(argv(model=base, out="grown", mode=mode, **LSP | dict(steps=2)))
    assert [row["name"] for row in evaluations("grown")] == ["base", "base, greedy", "step 2"]
    lsp.main(argv(model=base, out="grown", mode=mode, resume=True, **LSP))
    for name in ("step-4/model.safetensors", "samples.jsonl", "state/test.jsonl"):
        assert open(f"whole/{name}", "rb").read() == open(f"grown/{name}", "rb").read(), name
    assert [row["name"] for row in evaluations("grown")] == ["base", "base, greedy", "step 2", "step 4"]


@pytest.mark.slow
@pytest.mark.pictures
def test_an_interrupted_run_can_be_read_and_plotted(base, dies_in, capsys):
    """After every evaluation there is a summary and a picture."""
    dies_in(lsp, "gradient_step", 4)
    with pytest.raises(Killed):
        lsp.main(argv(model=base, out="out", **LSP))
    assert [row["name"] for row in evaluations("out")] == ["base", "base, greedy", "step 2"]
    assert is_png("out/curves.png")
    os.remove("out/curves.png")
    eval.main(["plot", "out"])
    eval.main(["table", "out"])
    assert is_png("out/curves.png") and "lsp, step 2" in capsys.readouterr().out
    open("out/metrics.jsonl", "w").close()              # killed before the first step
    eval.main(["plot", "out"])


def test_a_run_stays_with_the_base_it_began_with(base, monkeypatch):
    """An embedded world that is changed in between would have another base."""
    monkeypatch.setattr(world, "base", lambda spoken, device: base)
    flags = argv(**SPPO | dict(iterations=1))
    sppo.main([*flags, "--out", "out"])
    monkeypatch.setattr(world, "base", lambda spoken, device: pytest.fail("another base was asked for"))
    sppo.main([*flags, "--out", "out", "--resume", "--iterations", "2"])
    assert json.load(open("out/summary.json"))["base"] == base


def test_evaluations_reach_the_tracker(base, monkeypatch):
    sent = []
    monkeypatch.setattr(run.Run, "track_evaluation", lambda self, row: sent.append(row["name"]))
    sppo.main(argv(model=base, out="out", **SPPO))
    assert sent == ["base", "iteration 1", "iteration 2"]


# ---------------------------------------------------------------------------------------------------------------------
# damage is seen


def test_a_damaged_checkpoint_ends_in_a_sentence(llama3):
    """In both scripts and the evaluations, before anything is written."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama3, "broken")
    weights = load_file("broken/model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(weights, "broken/model.safetensors", {"format": "pt"})
    file("own.py", OWN)
    for start in (lambda: sppo.main(argv(**REAL_SPPO, model="broken", prompts=talks(), judge="python:own.py:better",
                                         out="out")),
                  lambda: lsp.main(argv(**REAL_LSP, model="broken", reward="python:own.py:points", out="out")),
                  lambda: eval.main(["winrate", *argv(model="broken", vs="broken", prompts=talks(), device="cpu",
                                                      judge="python:own.py:better")])):
        with pytest.raises(UserError, match="model.safetensors.*down_proj.weight"):
            start()
    assert not os.path.exists("out")
