"""The Challenger: queries that are held out are written anew, the frozen one never learns, overlap; what GRPO on a given
number of distinct queries trains on; SPPO on what its own Challenger asks."""

import doctest
import json

import pytest
import torch

import challenger
import kernels
import lsp
import model
import prefmodel
import sppo
import world
from chat import load_checkpoint
from conftest import Killed
from run import UserError
from table import read_table
from test_lsp import SMALL, argv, lines, settle
from test_sppo import SMALL as SPPO

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_docstring_examples():
    assert doctest.testmod(challenger).failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# asking


@pytest.fixture
def asking(base):
    """(net, chat, cp as ids, settings) of a Challenger in the embedded world."""
    net, chat = load_checkpoint(base, "cpu", torch.float32)
    return net, chat, chat.encode(world.CHALLENGE), settle(**SMALL)


def test_a_held_out_query_is_written_anew(asking):
    """The others keep their random streams, so they are what they would have been."""
    net, chat, cp, s = asking
    free = challenger.ask(net, chat, cp, s, ("queries", 3), range(40))
    banned = {free[7].text, free[20].text}
    kept = challenger.ask(net, chat, cp, s, ("queries", 3), range(40), banned.__contains__)
    assert not banned & {query.text for query in kept}
    changed = [i for i, (a, b) in enumerate(zip(free, kept)) if a.text != b.text]
    assert changed == [i for i, query in enumerate(free) if query.text in banned]
    assert all(len(query.ids) == len(query.logp) for query in kept)


def test_one_that_writes_nothing_else_counts_as_empty(asking):
    net, chat, cp, s = asking
    kept = challenger.ask(net, chat, cp, s, ("queries", 0), range(2), lambda text: True)
    assert [query.text for query in kept] == ["", ""] and all(query.ids for query in kept)
    with pytest.raises(UserError, match="only 0 different queries"):
        challenger.distinct(net, chat, cp, s, ("queries", 0), 2, lambda text: True)


def test_what_is_held_out():
    """Nonsense is not, whatever its hash says, nor the empty query; given prompts are, in a world beside its own."""
    spoken, (test,) = world.OPERATIONS, world.OPERATIONS.queries("test", 1)
    junk = next(f"{test}:{i}" for i in range(99) if world.split(f"{test}:{i}") == "test")
    assert spoken.held_out(test) and not spoken.held_out(junk) and not spoken.held_out("")
    in_world, real = (challenger.kept_for_evaluation(settle(**SMALL, **more), ["copy:ab"]) for more in (
        {}, dict(model="m", reward="reward:r")))
    assert [f("copy:ab") for f in (in_world, real)] == [True, True]
    assert [f(test) for f in (in_world, real)] == [True, False]


def test_grpo_on_a_file_with_held_out_queries_is_refused():
    with open("q.txt", "w") as file:
        file.write("\n".join(world.OPERATIONS.queries("train", 60) + world.OPERATIONS.queries("test", 1)))
    with pytest.raises(UserError, match="q.txt holds queries of the embedded world's validation and test parts"):
        lsp.read_data(settle(mode="grpo", prompts="q.txt", **SMALL))
    with open("q.txt", "w") as file:
        file.write("\n".join(world.OPERATIONS.queries("train", 60)))
    assert len(set(trained_on(settle(mode="grpo", prompts="q.txt", train_prompts=7, **SMALL)))) == 7


def test_ranks_ask_the_same_queries(asking):
    net, chat, cp, s = asking
    whole = challenger.ask(net, chat, cp, s, ("queries", 1), range(6), world.OPERATIONS.held_out)
    shares = [challenger.ask(net, chat, cp, s, ("queries", 1), range(r, 6, 2), world.OPERATIONS.held_out) for r in (0, 1)]
    assert [q.text for q in whole[0::2]] == [q.text for q in shares[0]]
    assert [q.text for q in whole[1::2]] == [q.text for q in shares[1]]


@pytest.mark.parametrize("mode", [dict(), dict(challenger="frozen")])
def test_a_run_never_plays_a_held_out_query(mode, base, monkeypatch):
    seen, play = [], lsp.play

    def watched(net, chat, s, step, *rest, **more):
        game = play(net, chat, s, step, *rest, **more)
        seen.extend(game.queries if isinstance(step, int) else [])
        return game

    monkeypatch.setattr(lsp, "play", watched)
    lsp.main(argv(model=base, out="out", **SMALL | mode | dict(queries=24, steps=2)))
    assert len(seen) == 48 and not any(map(world.OPERATIONS.held_out, seen))
    parts = {world.split(query) for query in world.OPERATIONS.queries("validation", 50)
             + world.OPERATIONS.queries("test", 50)}
    assert parts == {"validation", "test"} and all(map(world.OPERATIONS.held_out, world.OPERATIONS.queries("test", 9)))
    assert not any(map(world.OPERATIONS.held_out, world.OPERATIONS.queries("train", 99) + world.OPERATIONS.queries("corpus", 99)))


# ---------------------------------------------------------------------------------------------------------------------
# the control


def test_a_frozen_challenger_asks_what_the_initial_model_asks(base, monkeypatch):
    """Its queries come from the initial model's weights, it has no loss, no KL and no advantage; the Solver learns."""
    asked, ask = [], challenger.ask

    def watched(net, chat, cp, s, names, numbers, held_out=None):
        found = ask(net, chat, cp, s, names, numbers, held_out)
        asked.append((names, [query.text for query in found]))
        return found

    monkeypatch.setattr(challenger, "ask", watched)
    lsp.main(argv(model=base, out="out", challenger="frozen", **SMALL))
    rows = lines("out/metrics.jsonl")
    assert all("malformed" in row and "overlap" in row and "self_reward" in row for row in rows)
    assert not any("kl_challenger" in row or "advantage_challenger" in row for row in rows)
    assert abs(rows[-1]["kl_solver"]) > 1e-5
    net, chat = load_checkpoint(base, "cpu", torch.float32)
    last = next(texts for names, texts in asked if names == ("queries", 3))
    again = ask(net, chat, chat.encode(world.CHALLENGE), settle(**SMALL), ("queries", 3), range(6), world.OPERATIONS.held_out)
    assert last == [query.text for query in again]
    summary = json.load(open("out/summary.json"))
    assert summary["method"] == "lsp, frozen Challenger" and summary["settings"]["alpha_ch"] == 0


def test_its_solver_is_paid_as_in_lsp(base):
    """Frozen or not, the first step's Solver sees the same game: same queries, same answers, same rewards."""
    for name, more in (("a", dict(challenger="frozen")), ("b", dict(challenger_reward="frontier"))):
        lsp.main(argv(model=base, out=name, **SMALL | dict(steps=1, eval_every=1) | more))
    (a,), (b,) = lines("a/metrics.jsonl"), lines("b/metrics.jsonl")
    for key in ("reward", "self_reward", "advantage_solver", "malformed", "overlap"):
        assert a[key] == b[key]
    nets = [model.Transformer.from_pretrained(f"{name}/step-1") for name in "ab"]
    assert any((p != q).any() for p, q in zip(*[net.parameters() for net in nets]))     # b's Challenger learned too


@pytest.mark.parametrize("given, says", [
    (dict(challenger="frozen", challenger_reward="spread"), "--challenger-reward does nothing with --challenger fr"),
    (dict(challenger="frozen", alpha_ch=0.1), "--alpha-ch does nothing with --challenger frozen"),
    (dict(challenger="frozen", mode="grpo"), "--challenger does nothing in --mode grpo"),
    (dict(train_prompts=8), "--train-prompts is for --mode grpo")])
def test_flags_that_do_nothing(given, says):
    with pytest.raises(UserError, match=says):
        settle(**given)


# ---------------------------------------------------------------------------------------------------------------------
# so many distinct queries


def trained_on(s):
    data, _ = lsp.read_data(s)
    return [query for step in data for query in step]


def test_d_distinct_queries_again_and_again():
    """A smaller D is a part of a larger one; every pass has each query once; another seed has others."""
    few, more = (trained_on(settle(mode="grpo", train_prompts=D, **SMALL | dict(steps=8))) for D in (8, 16))
    assert len(few) == len(more) == 48 and len(set(few)) == 8 and len(set(more)) == 16 and set(few) < set(more)
    assert all(len(set(few[i:i + 8])) == 8 for i in range(0, 48, 8)) and few[:8] != few[8:16]
    assert set(few) != set(trained_on(settle(mode="grpo", train_prompts=8, seed=1, **SMALL)))
    fewer_than_a_step = trained_on(settle(mode="grpo", train_prompts=4, **SMALL))
    assert len(fewer_than_a_step) == 24 and len(set(fewer_than_a_step)) == 4
    assert lsp.method(settle(mode="grpo", train_prompts=8)) == "grpo on 8 queries"


def test_d_of_a_file():
    with open("q.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(60))
    s = settle(mode="grpo", prompts="q.jsonl", model="m", reward="reward:r", train_prompts=5, **SMALL)
    train, test = lsp.read_data(s)
    assert len({query for step in train for query in step}) == 5 and len(test) == 20
    assert not {query for step in train for query in step} & set(test)


# ---------------------------------------------------------------------------------------------------------------------
# SPPO on what its own Challenger asks


ASKED = SPPO | dict(prompts="challenger")


def test_distinct_queries_however_many_ranks(asking, monkeypatch):
    net, chat, cp, s = asking
    whole = challenger.distinct(net, chat, cp, s, ("prompts", 1), 30, world.OPERATIONS.held_out)
    assert len(set(whole)) == 30 and all(whole) and not any(map(world.OPERATIONS.held_out, whole))
    many = [query.text for query in challenger.ask(net, chat, cp, s, ("prompts", 1), range(60), world.OPERATIONS.held_out)]
    assert whole == [text for text in dict.fromkeys(many) if text][:30]
    with pytest.raises(UserError, match="only 1 different queries in 20"):
        monkeypatch.setattr(challenger, "extract_query", lambda text: "copy:aa")
        challenger.distinct(net, chat, cp, s, ("prompts", 1), 2)


def test_sppo_without_prompts(base):
    """Every iteration's prompts are pi_t's own: distinct, none held out, and other ones than the iteration before's."""
    sppo.main(argv(model=base, out="out", **ASKED))
    prompts = [[row["prompt"] for row in read_table(f"out/table-{t}.jsonl")] for t in (1, 2)]
    assert all(len(set(part)) == ASKED["prompts_per_iteration"] for part in prompts) and prompts[0] != prompts[1]
    assert not any(map(world.OPERATIONS.held_out, sum(prompts, [])))
    net, chat = load_checkpoint("out/iter-1", "cpu", torch.float32)
    s = sppo.settle(sppo.Settings(**ASKED, model=base))
    again = challenger.distinct(net, chat, chat.encode(world.CHALLENGE), s, ("prompts", 2),
                                ASKED["prompts_per_iteration"], world.OPERATIONS.held_out)
    assert again == prompts[1]
    rows = json.load(open("out/summary.json"))["evaluations"]
    assert all("malformed" in row and "overlap" in row for row in rows[2:]) and "malformed" not in rows[0]
    assert all("malformed" in row for row in lines("out/metrics.jsonl") if "loss" in row)
    assert json.load(open("out/state/initial.json"))["size"] == ASKED["prompts_per_iteration"]


def test_malformed_prompts_hold_the_policy_still():
    """The oracle marks every answer to nonsense 0: all tie, Phat is 1/2, and the target is 0."""
    P = prefmodel.load("oracle").preference(["reverse then:ab"], [["ba", "ab", ""]])
    assert kernels.phat(P).tolist() == [[0.5, 0.5, 0.5]]


@pytest.fixture(scope="module")
def whole(base, quick_module, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    sppo.main(argv(model=base, out=out, **ASKED))
    return out


@pytest.mark.parametrize("dies", [("sample_answers", 2), *(pytest.param(where, marks=pytest.mark.slow) for where in (
    ("judge_answers", 2), ("gradient_step", 4)))])
def test_an_interrupted_one_ends_with_the_same_bytes(dies, base, whole, dies_in):
    dies_in(sppo, *dies)
    with pytest.raises(Killed):
        sppo.main(argv(model=base, out="killed", **ASKED))
    sppo.main(argv(model=base, out="killed", resume=True, **ASKED))
    for name in ("table-1.jsonl", "table-2.jsonl", "iter-2/model.safetensors"):
        assert open(whole / name, "rb").read() == open(f"killed/{name}", "rb").read()


@pytest.mark.slow
def test_stage_by_stage_is_the_whole_run(base, whole):
    for t in (1, 2):
        for stage in ("sample", "judge", "train"):
            sppo.main(argv(model=base, out="parts", stage=stage, iteration=t, **ASKED))
    for name in ("table-2.jsonl", "iter-2/model.safetensors"):
        assert open(whole / name, "rb").read() == open(f"parts/{name}", "rb").read()
    said = [[row["malformed"] for row in lines(f"{out}/metrics.jsonl") if "loss" in row] for out in (whole, "parts")]
    assert said[0] == said[1]


def test_a_real_model_asks_itself(llama):
    """The same lines with a chat template, a reward model as judge, and pi_1's own queries to evaluate on."""
    settings = ASKED | dict(model=f"{llama}/model", judge=f"reward:{llama}/reward", task="Riddles",
                            prompts_per_iteration=6, validation_prompts=3, test_prompts=4, max_new_tokens=12,
                            max_query_tokens=16, iterations=1, eta=1.0, lr=1e-4)
    sppo.main(argv(out="out", **settings))
    rows = {name: [row["prompt"] for row in lines(f"out/state/{name}.jsonl")] for name in ("validation", "test")}
    train = [row["prompt"] for row in read_table("out/table-1.jsonl")]
    assert len(rows["validation"]) == 3 and rows["test"] and len(set(train)) == 6
    assert not set(train) & set(sum(rows.values(), [])) and not set(rows["validation"]) & set(rows["test"])


@pytest.mark.parametrize("given, says", [
    (dict(task="Riddles"), "--task does nothing without --prompts challenger"),
    (dict(prompts="challenger", world="intransitive"), "--world intransitive has no Challenger"),
    (dict(prompts="challenger", task="Riddles"), "--task is for real models"),
    (dict(prompts="challenger", prompts_per_iteration=0), "or a Challenger has no end of them"),
    (dict(prompts="challenger", model="m", prompts_per_iteration=0, judge="reward:r"), "has no end of them")])
def test_flags_that_do_not_fit(given, says):
    with pytest.raises(UserError, match=says):
        sppo.settle(sppo.Settings(**given))
