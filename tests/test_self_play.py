"""sppo.py --self-play: what stands in Phat's place, by hand and against exact play; small runs of each rule, whole, in
stages and interrupted; what is refused."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import files
import games
import kernels
import model
import prefmodel
import rollout
import run
import sppo
import world
from chat import load_checkpoint
from conftest import ROOT, Killed
from flags import parse
from run import UserError
from table import answer_texts, judge_answers, ranked, read_table, training_examples
from test_sppo import SMALL, TABLE, argv, contents, lines, same_files

pytestmark = pytest.mark.usefixtures("elsewhere")

STYLES = torch.tensor(world.STYLES, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# the formulas


def test_the_optimistic_target_by_hand():
    """2 P(y > pi_t) over the other two, less P(y > pi_{t-1}), each less its mean over the others, plus 1/2."""
    P, before = torch.tensor([TABLE]), torch.tensor([[0.7, 0.4, 0.4]])
    others = torch.tensor([[0.55, 0.35, 0.6]])                  # (.9 + .2) / 2, (.1 + .6) / 2, (.8 + .4) / 2
    surplus = torch.tensor([[0.3, -0.15, -0.15]])               # .7 - (.4 + .4) / 2, .4 - (.7 + .4) / 2
    torch.testing.assert_close(kernels.optimistic(P, before), 0.5 + 2 * (others - 0.5) - surplus)
    torch.testing.assert_close(kernels.optimistic(P), others)   # pi_0 = pi_1: P(y > pi_1) over the others
    assert kernels.optimistic(P, before).mean() == pytest.approx(0.5)


def test_the_magnetic_target_by_hand():
    """eta 4, w 2: the targets are 4 (Phat - 1/2) - 2 (l - mean l)."""
    wins, logratio = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[2.0, 1.0], [3.0, 3.0]])
    targets = 4 * (kernels.magnetic(wins, logratio, eta=4.0, weight=2.0) - 0.5)
    torch.testing.assert_close(targets, torch.tensor([[0.0, 0.0], [0.0, 0.0]]))     # +-1 for the wins, -+1 for the pull
    targets = 4 * (kernels.magnetic(wins, 3 * logratio, eta=4.0, weight=2.0) - 0.5)
    torch.testing.assert_close(targets, torch.tensor([[-2.0, 2.0], [0.0, 0.0]]))


def test_answers_that_tie_stay_where_they_are():
    """All K are the same answer, which beats pi_{t-1}: there is nothing to choose, and the target is 0."""
    row = {"probability": [[0.5, 0.5], [0.5, 0.5]], "probability_before": [0.9, 0.9]}
    order, p, wins = ranked(row, sppo.Settings(self_play="optimistic", all_responses=False))
    assert (order, p, wins) == ([0, 0], [0.5, 0.5], [0.5, 0.5])


def expected_target(rule, policy, K):
    """E[p*(y_i) | y_i] under K answers drawn from `policy` in the styles game, exactly: every outcome by its odds.
    rule(P [K, K], styles [K]) -> p* [K]."""
    mean = torch.zeros(3, dtype=torch.float64)
    for drawn in itertools.product(range(3), repeat=K):
        odds = policy[list(drawn[1:])].prod()                   # the first answer is the one that is conditioned on
        mean[drawn[0]] += odds * rule(STYLES[list(drawn)][:, list(drawn)], list(drawn))[0]
    return mean


@pytest.mark.parametrize("K", [2, 3, 5])
def test_the_optimistic_target_is_not_shrunk(K):
    """Phat - 1/2 is (K - 1)/K of P(y > pi_t) - 1/2 on average; over the others it is all of it, and so is p*."""
    now, then = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64), torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    gain, before = STYLES @ now, STYLES @ then
    torch.testing.assert_close(expected_target(lambda P, drawn: kernels.phat(P), now, K) - 0.5,
                               (K - 1) / K * (gain - 0.5))
    torch.testing.assert_close(expected_target(lambda P, drawn: kernels.optimistic(P), now, K), gain)
    want = 2 * (gain - 0.5) - (before - now @ before)
    got = expected_target(lambda P, drawn: kernels.optimistic(P, before[drawn]), now, K)
    torch.testing.assert_close(got - 0.5, want)
    assert float(want.abs().max()) > 0.05


@pytest.mark.parametrize("rule", ["optimistic", "magnetic", "magnetic, fixed"])
def test_the_targets_are_the_steps_of_exact_play(rule):
    """log pi_{t+1} = log pi_t + eta (p* - 1/2) + const, with infinitely many answers, is the rule in games.py."""
    start, eta, w, every, T = torch.tensor([0.45, 0.25, 0.3], dtype=torch.float64), 2.0, 0.3, 3, 12
    every = 0 if rule == "magnetic, fixed" else every
    iterates = [start]
    for t in range(1, T):
        now = iterates[-1]
        if rule == "optimistic" and t == 1:
            p = expected_target(lambda P, drawn: kernels.optimistic(P), now, 3)
        elif rule == "optimistic":
            before = STYLES @ iterates[-2]
            p = expected_target(lambda P, drawn: kernels.optimistic(P, before[drawn]), now, 3)
        else:
            pull = now.log() - iterates[kernels.magnet_at(t, every) - 1].log()
            p = kernels.magnetic(STYLES @ now, pull, eta, w)
        iterates.append((now.log() + eta * (p - 0.5)).softmax(0))
    exact = (games.optimistic(STYLES, start, eta, T) if rule == "optimistic"
             else games.magnetic(STYLES, start, eta, T, w, every))
    torch.testing.assert_close(torch.stack(iterates), exact, atol=1e-12, rtol=0)
    plain = games.multiplicative_weights(STYLES, start, eta, T)
    assert float((exact[2:] - plain[2:]).abs().min(1).values.max()) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# small runs

TINY = {**SMALL, "iterations": 3, "prompts_per_iteration": 8, "epochs": 2, "keep": "last", "batch_size": 8, "chunk": 3,
        "validation_prompts": 3, "test_prompts": 4, "save_every": 1}
RULES = {"optimistic": {"self_play": "optimistic"},
         "magnetic": {"self_play": "magnetic", "magnet": 0.5, "magnet_every": 2}}


def flags(base, rule, out, **more):
    return argv(model=base, out=out, **{**TINY, **RULES[rule], **more})


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """whole(rule): the directory of an uninterrupted run of three iterations."""
    made = {}

    def run_of(rule):
        if rule not in made:
            made[rule] = str(tmp_path_factory.mktemp(rule) / "run")
            sppo.main(flags(base, rule, made[rule]))
        return made[rule]
    return run_of


def policy(out, base, t):
    """pi_t's network, of a run that began with `base`."""
    return model.Transformer.from_pretrained(base if t == 1 else f"{out}/iter-{t - 1}", "cpu", torch.float32)


def first_losses(out):
    """The loss of every iteration's first step, which is of all its prompts."""
    return [row["loss"] for row in lines(f"{out}/metrics.jsonl") if row["step"] == 1]


@pytest.mark.parametrize("rule", RULES)
def test_what_a_run_says_of_its_rule(rule, whole):
    out = whole(rule)
    summary = json.load(open(f"{out}/summary.json"))
    assert summary["method"] == f"sppo, {rule}" and summary["settings"]["self_play"] == rule
    wanted = (0.5, 2) if rule == "magnetic" else (None, None)
    assert (summary["settings"]["magnet"], summary["settings"]["magnet_every"]) == wanted
    more = {"answers_before", "probability_before"} if rule == "optimistic" else set()
    columns = [set(lines(f"{out}/table-{t}.jsonl")[0]) for t in (1, 2, 3)]
    assert columns[1] == columns[2] == columns[0] | more and not more & columns[0]
    sample, row = lines(f"{out}/samples.jsonl")[-1], lines(f"{out}/table-3.jsonl")[-1]
    assert sample["phat"] == [round(p, 4) for p in kernels.phat(torch.tensor(row["probability"])).tolist()]
    assert not any("sampled" in name or "judged" in name for name in os.listdir(f"{out}/state"))


def test_an_optimistic_run_by_hand(whole, base):
    """The texts of pi_{t-1}'s answers, from a stream of their own; the judge's verdicts; p* in the first loss; and the
    logged Phats, which are still Phats."""
    out, K, eta = whole("optimistic"), TINY["k"], TINY["eta"]
    chat, judge = load_checkpoint(base, "cpu", torch.float32)[1], prefmodel.load("oracle")
    logged = {row["iteration"]: row for row in lines(f"{out}/metrics.jsonl")}
    for t, loss in zip((1, 2, 3), first_losses(out), strict=True):
        rows, want, best = lines(f"{out}/table-{t}.jsonl"), [], []
        for row in rows:
            P = judge.preference([row["prompt"]], [answer_texts(row)])[0]
            torch.testing.assert_close(torch.tensor(row["probability"]), P)
            p = others = (P.sum(1) - 0.5) / (K - 1)
            if t > 1:
                both = judge.preference([row["prompt"]], [answer_texts(row) + row["answers_before"]])[0]
                before = both[:K, K:].mean(1)
                torch.testing.assert_close(torch.tensor(row["probability_before"]), before)
                surplus = torch.stack([before[i] - (before.sum() - before[i]) / (K - 1) for i in range(K)])
                p = 0.5 + 2 * (others - 0.5) - surplus
            want.append(((eta * (p.max() - 0.5)) ** 2 + (eta * (p.min() - 0.5)) ** 2) / 2)
            best.append(P.mean(1)[p.argmax()])
        assert loss == pytest.approx(float(sum(want) / len(want)), rel=1e-3, abs=1e-6)
        assert logged[t]["phat_best"] == pytest.approx(float(sum(best) / len(best)))
        if t > 1:
            drawn = rollout.generate(policy(out, base, t - 1), [row["prompt_ids"] for row in rows], K, 12,
                                     stop_ids=chat.stop_ids, seeds=run.stream(0, "sample", t, "before"))
            assert [row["answers_before"] for row in rows] == [[chat.decode(y) for y in ys] for ys in drawn.tokens]
            assert sum(row["answers_before"] != answer_texts(row) for row in rows) > 4


def test_a_magnetic_run_by_hand(whole, base):
    """--magnet-every 2: pi_1 in iterations 1 and 2, pi_3 in iteration 3. Where pi_t is the magnet itself the targets
    are the plain ones, and no second network is asked."""
    out, eta, w = whole("magnetic"), TINY["eta"], 0.5
    assert [name for name in os.listdir(f"{out}/state") if name.startswith("magnet")] == ["magnet-2.json"]
    args = sppo.settle(sppo.Settings(**{**TINY, **RULES["magnetic"]}))
    for t, loss in zip((1, 2, 3), first_losses(out), strict=True):
        examples, _ = training_examples(lines(f"{out}/table-{t}.jsonl"), None, args, t)
        with torch.no_grad():
            magnet = sppo.sequence_logprobs(policy(out, base, {1: 1, 2: 1, 3: 3}[t]), examples)
            pull = sppo.sequence_logprobs(policy(out, base, t), examples) - magnet
        assert (float(pull.abs().max()) > 0.01) == (t == 2)
        wins = torch.tensor([example["p"] for example in examples])
        targets = eta * (wins - 0.5) - w * (pull - pull.mean(1, keepdim=True))
        assert loss == pytest.approx(float((targets ** 2).mean()), rel=1e-3, abs=1e-6)


def test_best_and_worst_are_by_what_enters_the_loss(whole):
    """By p*, which may order the answers otherwise than Phat does."""
    args, otherwise = sppo.Settings(self_play="optimistic", all_responses=False), 0
    for row in lines(f"{whole('optimistic')}/table-2.jsonl") + [{
            "probability": TABLE, "probability_before": [0.9, 0.2, 0.9]}]:
        P = torch.tensor(row["probability"])
        full = kernels.optimistic(P, torch.tensor(row["probability_before"]))
        order, p, wins = ranked(row, args)
        assert p == [full.max(), full.min()] and wins == kernels.phat(P)[order].tolist()
        otherwise += order != list(kernels.best_and_worst(kernels.phat(P)))
        order, p, wins = ranked(row, sppo.Settings(self_play="optimistic", all_responses=True))
        assert p == sorted(full.tolist(), reverse=True) == full[order].tolist() and sorted(order) == [0, 1, 2]
        assert wins == kernels.phat(P)[order].tolist()
    assert otherwise


@pytest.mark.parametrize("rule", RULES)
def test_stage_by_stage_is_the_whole_run(rule, whole, base):
    for t in (1, 2, 3):
        for stage in ("sample", "judge", "train"):
            sppo.main(flags(base, rule, "stages", stage=stage, iteration=t))
    names = [f"{name}-{t}{end}" for t in (1, 2, 3)
             for name, end in (("table", ".jsonl"), ("iter", "/model.safetensors"), ("state/reference", ".json"))]
    assert same_files("stages", whole(rule), *names, "samples.jsonl", "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("rule, name, number", [    # three chunks of answers a policy and iteration, and two steps
    ("optimistic", "sample_answers", 7),            # iteration 2, after all of pi_2's answers
    ("optimistic", "sample_answers", 8),            # iteration 2, pi_1's second chunk
    ("optimistic", "judge_answers", 5),             # iteration 2, the second chunk
    ("optimistic", "gradient_step", 4),             # iteration 2, the second step
    ("magnetic", "kept_logprobs", 3),               # iteration 2, before the magnet's
    ("magnetic", "gradient_step", 4)])
def test_interrupted_and_resumed_is_the_whole_run(rule, name, number, whole, base, dies_in):
    """To the bit, and nothing half-written is left."""
    want = contents(whole(rule))
    dies_in(sppo, name, number)
    with pytest.raises(Killed):
        sppo.main(flags(base, rule, "killed"))
    sppo.main([*flags(base, rule, "killed"), "--resume"])
    got = contents("killed")
    assert set(got) == set(want) and [name for name in want if got[name] != want[name]] == []


def test_a_table_judged_again_and_trained_elsewhere(whole, base):
    """Its answers of pi_{t-1} travel along. Plain training reads the same table as if they were not there."""
    table, options = f"{whole('optimistic')}/table-2.jsonl", dict(world="operations", iteration=2)
    sppo.main(flags(base, "optimistic", "out", stage="judge", table=table, **options))
    assert lines("out/table-2.jsonl") == lines(table)
    for rule in ("optimistic", "plain"):
        sppo.main(argv(model=base, out=rule, stage="train", table="out/table-2.jsonl", world="operations",
                       self_play=rule, **{**TINY, "iterations": 1}))
    row = lines(table)[0]
    assert {"answers_before", "probability_before"} <= set(lines("plain/table-1.jsonl")[0]) <= set(row)
    plain = [kernels.best_and_worst(kernels.phat(torch.tensor(row["probability"]))) for row in lines(table)]
    loss = sum(sum((20 * (kernels.phat(torch.tensor(row["probability"]))[i] - 0.5)) ** 2 for i in order) / 2
               for row, order in zip(lines(table), plain)) / 8
    assert first_losses("plain") == pytest.approx([float(loss)], rel=1e-3, abs=1e-6)
    assert first_losses("optimistic")[0] != pytest.approx(float(loss), rel=0.1)


class Shown:
    """A judge that remembers what it was shown, and likes long answers."""
    name = "shown"

    def preference(self, prompts, responses):
        self.seen = responses
        lengths = torch.tensor([[float(len(text)) for text in row] for row in responses])
        return torch.sigmoid(lengths[:, :, None] - lengths[:, None, :])


def test_what_pi_before_thought_is_not_judged_either():
    row = {"prompt": "q", **{f"generate_{k}": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
                             for k, text in enumerate(("a", "<think>why</think>bb"))},
           "answers_before": ["<think>so</think>ccc", "d"]}
    judge = Shown()
    judged, = judge_answers([row], judge, (0, 1))
    assert judge.seen == [["a", "bb", "ccc", "d"]]
    want = torch.sigmoid(torch.tensor([[-2.0, 0.0], [-1.0, 1.0]])).mean(1)
    assert judged["probability_before"] == pytest.approx(want.tolist())
    assert torch.tensor(judged["probability"]).shape == (2, 2) and judged["chosen"] == row["generate_1"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_compute_what_one_does(rule, whole, base):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               os.path.join(ROOT, "sppo.py"), *flags(base, rule, "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines("two/samples.jsonl") == lines(f"{whole(rule)}/samples.jsonl")
    for got, want in zip(lines("two/metrics.jsonl"), lines(f"{whole(rule)}/metrics.jsonl"), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("given, sentence", [
    (dict(self_play="optimistic", loss="dpo"), "--self-play optimistic changes the p in --loss sppo's target, eta .p - "
                                               "1/2., and --loss dpo looks only at who is best and worst; leave one"),
    (dict(self_play="magnetic", loss="sppo-hard"), "--loss sppo-hard looks only at who is best and worst"),
    (dict(magnet=0.5), "--magnet is for --self-play magnetic; give that, or leave it out"),
    (dict(self_play="magnetic", all_responses=False), "a mean over all K answers; leave --no-all-responses out"),
    (dict(self_play="optimistic", magnet_every=3), "--magnet-every is for --self-play magnetic")])
def test_flags_that_do_not_go_together(given, sentence):
    with pytest.raises(UserError, match=sentence):
        sppo.settle(sppo.Settings(**given))


def test_what_magnetic_play_begins_with():
    args = sppo.settle(sppo.Settings(self_play="magnetic"))
    assert (args.magnet, args.magnet_every, args.all_responses) == (0.33, 10, True)
    eta = {rule: sppo.settle(sppo.Settings(world="intransitive", self_play=rule)).eta
           for rule in ("plain", "optimistic", "magnetic")}
    assert eta == {"plain": 2.0, "optimistic": 3.0, "magnetic": 3.3}
    args = sppo.settle(sppo.Settings(self_play="magnetic", magnet_every=0))
    assert (args.magnet, args.magnet_every) == (0.33, 0)
    for name, value in (("magnet", "0"), ("magnet-every", "-1")):
        with pytest.raises(UserError, match=f"--{name} {float(value) if name == 'magnet' else value} must be"):
            parse(sppo.Settings, [f"--{name}", value], "")


@pytest.mark.parametrize("rule, stage, t, gone", [("optimistic", "sample", 3, "iter-1"),
                                                  ("magnetic", "train", 4, "iter-2")])  # the magnet is pi_3
def test_a_stage_without_its_second_policy(rule, stage, t, gone, whole, base):
    shutil.copytree(whole(rule), "out")
    shutil.rmtree(f"out/{gone}")
    if stage == "sample":
        os.remove(f"out/table-{t}.jsonl")
    else:
        os.rename("out/table-3.jsonl", f"out/table-{t}.jsonl")
    with pytest.raises(UserError, match=f"--self-play {rule}: --stage {stage} of iteration {t} works with out/{gone} "
                                        "too, which is not there; put it back"):
        sppo.main(flags(base, rule, "out", stage=stage, iteration=t, iterations=4))


def test_an_iteration_that_is_done_again(whole, base):
    """What a later iteration holds is of another policy then: its table is refused, its log-probs go."""
    shutil.copytree(whole("magnetic"), "out")
    shutil.rmtree("out/iter-1")
    again = flags(base, "magnetic", "out", stage="train", iteration=1)
    with pytest.raises(UserError, match="out/table-2.jsonl holds answers of an earlier iter-1, which is about to be made"):
        sppo.main(again)
    assert not os.path.exists("out/iter-1")
    os.remove("out/table-2.jsonl")
    later = {f"{name}-2.json" for name in ("reference", "magnet")}
    assert later <= set(os.listdir("out/state"))
    sppo.main(again)
    assert os.path.isdir("out/iter-1") and not later & set(os.listdir("out/state"))


def test_a_table_without_what_optimistic_play_needs(whole, base):
    """From plain play, in iteration 2; and the official training table, which has no probabilities, in iteration 1."""
    plain = [{name: value for name, value in row.items() if name not in ("answers_before", "probability_before")}
             for row in lines(f"{whole('optimistic')}/table-2.jsonl")]
    files.write_rows("plain.jsonl", plain)
    files.write_rows("bare.jsonl", [{"chosen": row["chosen"], "rejected": row["rejected"], "chosen_probs_win": 0.7,
                                   "chosen_probs_lose": 0.3} for row in plain])
    shutil.copytree(whole("optimistic"), "old")
    shutil.rmtree("old/iter-2")
    before = contents("old")
    for out, stage, table, t, column in (("old", "train", "plain.jsonl", 2, "probability_before"),
                                         ("old", "judge", "plain.jsonl", 2, "answers_before"),
                                         ("new", "train", "bare.jsonl", 1, "probability")):
        with pytest.raises(UserError, match=f"--self-play optimistic needs the column {column} in the table of "
                                            f"iteration {t}; sample and judge it with --self-play optimistic"):
            sppo.main(flags(base, "optimistic", out, world="operations", stage=stage, table=table, iteration=t))
    assert contents("old") == before and not os.path.exists("new")


@pytest.mark.parametrize("column, value, sentence", [
    ("answers_before", ["a"], "answers_before is no list of 2 texts"),
    ("answers_before", "ab", "answers_before is no list of 2 texts"),
    ("answers_before", ["a", 1], "answers_before is no list of 2 texts"),
    ("probability_before", [0.5, 1.5], "probability_before is no list of 2 numbers in .0, 1."),
    ("probability_before", [0.5], "probability_before is no list of 2 numbers in .0, 1."),
    ("probability_before", 0.5, "probability_before is no list of 2 numbers in .0, 1.")])
def test_columns_that_cannot_be_used(column, value, sentence):
    row = {"prompt": "q", "generate_0": "a", "generate_1": "b", "answers_before": ["c", "d"],
           "probability_before": [0.5, 0.5]}
    files.write_rows("t.jsonl", [row])
    assert read_table("t.jsonl")[0]["answers_before"] == ["c", "d"]
    files.write_rows("t.jsonl", [{**row, column: value}])
    with pytest.raises(UserError, match=f"--table t.jsonl, line 1: {sentence}; make the table again"):
        read_table("t.jsonl")
    files.write_rows("t.jsonl", [row, {"prompt": "q", "generate_0": "a", "generate_1": "b"}])
    with pytest.raises(UserError, match="--table t.jsonl, line 2: answers_before stands in some rows alone; make the"):
        read_table("t.jsonl")
