"""sppo.py: settings, disjoint prompts, pairs, the losses by hand, the official code's traps, a golden run, kills,
ranks, the stages and their tables, the intransitive world, the real path."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
import transformers

import eval
import files
import flags
import kernels
import model
import prefmodel
import rollout
import run
import sppo
import winrate
import world
from chat import Chat, load_checkpoint, read_prompts, read_sources, split_prompts
from conftest import PROMPTS, ROOT, Killed, is_png
from run import UserError
from table import answer_texts, encode_prompts, read_table, readable_row, training_examples, without_long_prompts

pytestmark = pytest.mark.usefixtures("elsewhere")

SMALL = dict(eta=20.0, iterations=2, prompts_per_iteration=20, k=3, epochs=2, batch_size=8, micro_batch=3,
             validation_prompts=12, test_prompts=16, max_new_tokens=12, max_rows=64, print_every=2, save_every=2,
             chunk=8, device="cpu", dtype="float32")


def argv(**settings):
    """Settings as flags: batch_size=8 -> --batch-size 8."""
    words = []
    for name, value in settings.items():
        words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return words


def small(loss):
    """SMALL with a loss and a step size for it that tests may rely on, whatever the defaults are."""
    step = {"sppo": dict(eta=20.0), "sppo-hard": dict(eta=8.0), "dpo": dict(beta=0.3), "ipo": dict(beta=0.1)}[loss]
    return {name: value for name, value in SMALL.items() if name != "eta"} | {"loss": loss, **step}


def settle(**settings):
    return sppo.settle(sppo.Settings(**settings))


def sources_of(s):
    return read_sources(s.prompts, s.iterations)


def split(s, sources=None):
    """The run's prompts, out of `sources` or the embedded world."""
    return split_prompts(s, world.WORLDS.get(s.world), sources)


# ---------------------------------------------------------------------------------------------------------------------
# settings


def test_defaults_of_the_world_and_of_the_paper():
    tiny, paper = settle(), settle(prompts="p.jsonl", model="m", judge="pairrm:x")
    assert tiny.judge == "oracle" and paper.judge == "pairrm:x"
    for s, setting in ((tiny, "operations"), (paper, "")):
        defaults = sppo.defaults_of(setting, "sppo")
        assert defaults.pop("max_query_tokens") and s.max_query_tokens is None       # prompts are given, not written
        assert {name: getattr(s, name) for name in defaults} == defaults
        assert (s.k, s.iterations, s.batch_size, s.warmup, s.estimator) == (5, 3, 64, 0.1, "pairwise")
        assert (s.temperature, s.top_p) == (1.0, 1.0)
        assert [name for name, value in dataclasses.asdict(s).items() if value is None] == [
            "max_query_tokens", "magnet", "magnet_every", "beta"]
    assert (paper.eta, paper.lr, paper.optimizer) == (1e3, 5e-7, "rmsprop")
    assert (paper.prompts_per_iteration, paper.max_prompt_tokens) == (20000, 512)


def test_what_is_given_is_kept():
    s = settle(prompts="p.jsonl", model="m", judge="pairrm:x", eta=7.0, epochs=3, optimizer="adamw")
    assert (s.eta, s.epochs, s.optimizer, s.lr) == (7.0, 3, "adamw", 5e-7)
    given = sppo.Settings(eta=7.0)
    settle_again = sppo.settle(given)
    # the caller's settings are not changed
    assert given.lr is None and settle_again.lr == sppo.defaults_of("operations", "sppo")["lr"]


@pytest.mark.parametrize("loss", ["sppo", "sppo-hard", "dpo", "ipo"])
def test_every_loss_has_its_own_defaults(loss):
    """A step size that suits (4.7) is far off for IPO; and what belongs to another loss stays unset."""
    for setting, given in (("operations", {}), ("intransitive", {"world": "intransitive"}),
                           ("", dict(prompts="p.jsonl", model="m", judge="pairrm:x"))):
        s, want = settle(loss=loss, **given), sppo.defaults_of(setting, loss)
        want.pop("max_query_tokens")                                                 # prompts are given, not written
        assert {name: getattr(s, name) for name in want} == want
        assert (s.beta is None, s.eta is None) == (loss.startswith("sppo"), not loss.startswith("sppo"))
        assert s.all_responses == (loss == "sppo" and setting == "intransitive")
    assert settle(loss=loss, lr=0.25).lr == 0.25


def test_gradient_accumulation_says_how_many_passes(monkeypatch):
    """Passes per optimizer step and rank; the last may be smaller, none is left out."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    sizes = {(64, 4): 16, (64, 1): 64, (10, 4): 3, (12, 5): 3, (4, 64): 1}
    assert {key: settle(batch_size=key[0], gradient_accumulation=key[1]).micro_batch for key in sizes} == sizes
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert settle(batch_size=64, gradient_accumulation=4).micro_batch == 2
    assert settle(batch_size=64, gradient_accumulation=3).micro_batch == 3
    assert settle(batch_size=64, micro_batch=5).micro_batch == 5


def parsed(*words):
    """The settings of a command line, as main has them."""
    return sppo.settle(flags.parse(sppo.Settings, list(words), "", sppo.PRESETS))


@pytest.mark.parametrize("name, model", [("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.2"),
                                         ("llama-3-8b", "meta-llama/Meta-Llama-3-8B-Instruct")])
def test_presets_hold_the_official_codes_settings(name, model):
    s = parsed("--preset", name)
    assert (s.model, s.judge, s.estimator) == (model, "pairrm:llm-blender/PairRM", "aggregate")
    assert s.prompts.split(",") == [f"UCLA-AGI/data-mistral-7b-instruct-sppo-iter{t}" for t in (1, 2, 3)]
    assert (s.iterations, s.prompts_per_iteration, s.k, s.temperature, s.top_p) == (3, 0, 5, 0.7, 0.9)
    assert (s.loss, s.eta, s.beta, s.all_responses, s.lr, s.optimizer) == ("sppo", 1e3, None, False, 5e-7, "rmsprop")
    assert (s.warmup, s.epochs, s.schedule_epochs, s.batch_size, s.clip, s.weight_decay) == (0.1, 1, 0, 64, 1.0, 0.0)
    assert (s.max_prompt_tokens, s.max_new_tokens, s.max_total_tokens) == (512, 1024, 1024)
    assert s.drop_long_prompts and s.activation_checkpointing and not s.stage


def test_a_flag_beside_a_preset_wins():
    """Also one that gives what would be the default without the preset."""
    s = parsed("--preset", "mistral-7b", "--schedule-epochs", "18", "--temperature", "1", "--top-p", "1")
    assert (s.schedule_epochs, s.temperature, s.top_p, s.lr) == (18, 1.0, 1.0, 5e-7)
    s = parsed("--estimator", "pairwise", "--no-drop-long-prompts", "--preset", "mistral-7b", "--eta", "3",
               "--max-total-tokens", "0", "--no-activation-checkpointing", "--prompts", "p.jsonl")
    assert (s.estimator, s.eta, s.max_total_tokens, s.prompts) == ("pairwise", 3.0, 0, "p.jsonl")
    assert not s.drop_long_prompts and not s.activation_checkpointing and s.k == 5


@pytest.mark.parametrize("loss", ["dpo", "ipo", "sppo-hard"])
def test_a_preset_with_another_loss(loss):
    s = parsed("--preset", "llama-3-8b", "--loss", loss)
    assert s.loss == loss and s.lr == 5e-7 and s.beta == sppo.PAPER_LOSS[loss].get("beta")
    assert loss != "sppo-hard" or s.eta == 1e3


# ---------------------------------------------------------------------------------------------------------------------
# prompts


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("real", [False, True])
def test_held_out_prompts_never_train(real, seed, prompts_file):
    """The official code draws its "test" rows from train."""
    source = dict(prompts=prompts_file, model="m", judge="pairrm:x") if real else {}
    s = settle(**source, iterations=3, prompts_per_iteration=8, validation_prompts=7, test_prompts=9, seed=seed)
    sources = sources_of(s) if real else None
    validation, test, parts = split(s, sources)
    assert [len(x) for x in (validation, test, *parts)] == [7, 9, 8, 8, 8]
    assert len({*validation, *test, *parts[0], *parts[1], *parts[2]}) == 7 + 9 + 24
    assert (validation, test, parts) == split(s, sources)
    other = split(dataclasses.replace(s, seed=seed + 1), sources)
    assert other[:2] == (validation, test) and other[2] != parts  # the held-out sets do not depend on the seed
    if real:
        assert {*validation, *test, *sum(parts, [])} == set(PROMPTS)
    else:
        assert {world.split(q) for q in test} == {"test"} and {world.split(q) for q in validation} == {"validation"}
        assert {world.split(q) for part in parts for q in part} == {"train"}


def test_a_duplicate_does_not_reach_both_sides():
    """A prompt that stands twice in the file could otherwise be trained on and tested on."""
    with open("twice.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": p}) + "\n" for p in PROMPTS + PROMPTS)
    s = settle(prompts="twice.jsonl", model="m", judge="pairrm:x", iterations=2, prompts_per_iteration=10,
               validation_prompts=10, test_prompts=10)
    validation, test, parts = split(s, sources_of(s))
    assert sorted([*validation, *test, *parts[0], *parts[1]]) == sorted(PROMPTS)


def test_too_few_prompts(prompts_file):
    s = settle(prompts=prompts_file, model="m", judge="pairrm:x", iterations=3, prompts_per_iteration=11,
               validation_prompts=4, test_prompts=4)
    with pytest.raises(UserError, match="has 40 distinct prompts.*--prompts-per-iteration 11.*need 41"):
        split(s, sources_of(s))


HUB = {"org/first": PROMPTS[:14], "org/second": [PROMPTS[3], *PROMPTS[14:27], PROMPTS[14]], "org/third": PROMPTS[27:]}


@pytest.fixture
def hub(monkeypatch):
    """A package `datasets` whose hub holds HUB."""
    def load_dataset(name, split):
        assert split == "train"
        return [{"prompt": p, "prompt_id": i} for i, p in enumerate(HUB[name])]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize("n", [0, 5])
def test_each_iteration_has_its_own_data_set(n, hub):
    """The official code's three data sets, one an iteration. A prompt of two sources stays in the first, and held-out
    prompts are in no part."""
    s = settle(prompts=",".join(HUB), model="m", judge="pairrm:x", iterations=3, prompts_per_iteration=n,
               validation_prompts=4, test_prompts=5)
    sources = sources_of(s)
    assert sources == [PROMPTS[:14], PROMPTS[14:27], PROMPTS[27:]]
    validation, test, parts = split(s, sources)
    assert len({*validation, *test, *sum(parts, [])}) == 9 + sum(map(len, parts))
    assert all(set(part) <= set(source) for part, source in zip(parts, sources))
    if n:
        assert [len(part) for part in parts] == [5, 5, 5]
    else:
        assert {*validation, *test, *sum(parts, [])} == set(PROMPTS)
    assert parts != split(dataclasses.replace(s, seed=1), sources)[2]


def test_all_the_prompts_of_one_source(hub, prompts_file):
    """--prompts-per-iteration 0: what is not held out, in equal parts."""
    s = settle(prompts=prompts_file, model="m", judge="pairrm:x", iterations=3, prompts_per_iteration=0,
               validation_prompts=4, test_prompts=5)
    validation, test, parts = split(s, sources_of(s))
    assert [len(part) for part in parts] == [10, 10, 10]
    assert len({*validation, *test, *sum(parts, [])}) == 39
    assert len(sources_of(settle(prompts="org/first", model="m", judge="pairrm:x", iterations=3))) == 1


def test_a_source_that_is_too_small_is_refused(hub):
    """Though all sources together would have enough."""
    s = settle(prompts=",".join(HUB), model="m", judge="pairrm:x", prompts_per_iteration=11, validation_prompts=3,
               test_prompts=3)
    with pytest.raises(UserError, match=r"iteration 3's own source leaves \d+\)"):
        split(s, sources_of(s))


def test_long_prompts_are_left_out_and_counted(llama3, capsys):
    """Never truncated: a prompt without its end is another prompt."""
    chat = load_checkpoint(llama3, "cpu", torch.float32)[1]
    lengths = {p: len(chat.encode(p)) for p in PROMPTS}
    limit = sorted(lengths.values())[29]
    s = settle(prompts="p", model="m", judge="pairrm:x", max_prompt_tokens=limit, max_new_tokens=24)
    kept = without_long_prompts(PROMPTS, chat, s, 0)
    assert kept == [p for p in PROMPTS if lengths[p] <= limit]
    gone = sum(n > limit for n in lengths.values())
    assert f"left out {gone} of 40 prompts: longer than {limit} tokens" in capsys.readouterr().out and gone > 0
    encode_prompts(kept, chat, s)
    without_long_prompts(kept, chat, s, 0)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------------
# pairs


class Judge:
    """Says `table` of every prompt, and remembers what it was shown."""
    name = "table"

    def __init__(self, table):
        self.table, self.seen = torch.tensor(table), []

    def preference(self, prompts, responses):
        self.seen += zip(prompts, responses)
        return self.table.expand(len(prompts), -1, -1)


# Phat = 1.6 / 3, 1.2 / 3, 1.7 / 3: the third wins, the second loses
TABLE = [[0.5, 0.9, 0.2], [0.1, 0.5, 0.6], [0.8, 0.4, 0.5]]


@dataclasses.dataclass
class Made:
    """What sampling and judging made of some prompts, and what went in."""
    net: model.Transformer
    chat: Chat
    s: sppo.Settings
    prompts: list
    judge: Judge
    rows: list
    pairs: list
    statistics: dict


def make(path, prompts, judge, **settings):
    net, chat = load_checkpoint(path, "cpu", torch.float32)
    s = settle(**{**SMALL, **settings})
    r = run.Run("pairs", s, overwrite=True)
    rows = sppo.judge_answers(sppo.sample_answers(net, chat, prompts, s, 2, (0, 1)), judge, (0, 1))
    pairs, statistics = training_examples(rows, chat, s)
    sppo.reference_logprobs(net, pairs, s, 2, (0, 1), r)
    return Made(net, chat, s, prompts, judge, rows, pairs, statistics)


@pytest.fixture
def tiny(base):
    return make(base, world.OPERATIONS.queries("train", 12), Judge(TABLE))


@pytest.fixture
def real(llama3):
    return make(llama3, PROMPTS, Judge(TABLE), max_new_tokens=24)


def test_pairs_are_the_best_and_the_worst_of_what_was_sampled(tiny):
    ids = [tiny.chat.encode(p) for p in tiny.prompts]
    samples = rollout.generate(tiny.net, ids, 3, 12, stop_ids=tiny.chat.stop_ids, seeds=run.stream(0, "sample", 2))
    for b, pair in enumerate(tiny.pairs):
        assert pair["prompt"] == ids[b]
        assert pair["responses"] == [samples.tokens[b][2], samples.tokens[b][1]]  # ids as sampled, best first
        # the comparison with itself, 1/2, counts
        assert pair["p"] == pytest.approx([1.7 / 3, 1.2 / 3])
    assert tiny.statistics["phat_best"] == pytest.approx(1.7 / 3)
    assert tiny.statistics["phat_worst"] == pytest.approx(1.2 / 3)
    assert tiny.statistics["tied_share"] == 0
    assert tiny.statistics["cut_share"] == sum(f == "length" for g in samples.finish for f in g) / 36
    written = [readable_row(row) for row in tiny.rows]
    assert [row["prompt"] for row in written] == tiny.prompts and all(len(row["responses"]) == 3 for row in written)
    assert written[0]["phat"] == pytest.approx([1.6 / 3, 1.2 / 3, 1.7 / 3], abs=1e-4)


def test_each_prompt_is_judged_by_its_own_answers(base):
    """With the oracle: Phat by hand from world.score, so that a prompt mixed up with its neighbour's answers would
    show."""
    made = make(base, world.OPERATIONS.queries("train", 30), prefmodel.load("oracle"), k=4)
    strict = 0
    for prompt, pair in zip(made.prompts, made.pairs):
        marks = [world.OPERATIONS.score(prompt, made.chat.decode(r)) for r in pair["responses"]]
        strict += marks[0] > marks[1]
        assert marks[0] >= marks[1] and pair["p"][0] >= 0.5 >= pair["p"][1]
    row = readable_row(made.rows[0])
    marks = [world.OPERATIONS.score(row["prompt"], a) for a in row["responses"]]
    assert row["phat"] == pytest.approx([sum(1 / (1 + math.exp(-6 * (m - other))) for other in marks) / 4
                                         for m in marks], abs=1e-4)
    assert strict > 10


def test_all_responses_in_order_of_preference(base):
    """Theorem 4.1's loss is over pi_t's samples, all of them: none may be lost, and every one keeps its own Phat."""
    made = make(base, world.OPERATIONS.queries("train", 30), prefmodel.load("oracle"), k=4, all_responses=True)
    for row, example in zip(made.rows, made.pairs):
        phat = kernels.phat(torch.tensor(row["probability"])).tolist()
        assert example["p"] == sorted(phat, reverse=True) and len(example["ref"]) == 4
        assert sorted(map(str, zip(example["p"], example["responses"]))) == sorted(map(str, zip(phat, row["tokens"])))
    assert sum(len(set(example["p"])) > 2 for example in made.pairs) > 5
    assert 0 < made.statistics["tied_share"] < 1 and made.statistics["phat_best"] > 0.5


def test_prompt_and_answer_together_stay_within_their_bound(llama3):
    """The official code allows 1,024 tokens for both: a long prompt leaves less for the answer."""
    free = make(llama3, PROMPTS, Judge(TABLE), max_new_tokens=24)
    total = sorted(len(row["prompt_ids"]) for row in free.rows)[20] + 12
    made = make(llama3, [row["prompt"] for row in free.rows if len(row["prompt_ids"]) < total], Judge(TABLE),
                max_new_tokens=24, max_total_tokens=total)
    cut = 0
    for row in made.rows:
        room = min(24, total - len(row["prompt_ids"]))
        for tokens, finish in zip(row["tokens"], row["finish"]):
            assert len(tokens) <= room and (finish == "stop" or len(tokens) == room)
            cut += finish == "length" and room < 24
    assert cut > 10


def test_ties_are_pulled_nowhere(base):
    """Where the judge cannot tell the answers apart p is exactly 1/2 and the first loss exactly as small as
    rounding."""
    made = make(base, world.OPERATIONS.queries("train", 6), Judge([[0.5] * 3] * 3))
    assert all(pair["p"] == [0.5, 0.5] and pair["responses"][0] == pair["responses"][1] for pair in made.pairs)
    assert made.statistics["tied_share"] == 1 and gradients(made)[0]["loss"] < 1e-8


# ---------------------------------------------------------------------------------------------------------------------
# the official code's traps


def test_a_prompt_with_the_word_None_is_not_cut(real):
    """Trap 1: the official code splits the template at "None"."""
    for prompt, pair in zip(PROMPTS, real.pairs):
        assert f"<|end_header_id|>\n\n{prompt}<|eot_id|>" in real.chat.tokenizer.decode(pair["prompt"])


def test_the_assistants_header_is_given_and_not_scored(real):
    """Trap 2: a misspelt add_generation_prompt left the header to the model, inside the scored answer."""
    view = model.SharedPrefix([p["prompt"] for p in real.pairs], [p["responses"] for p in real.pairs], "cpu")
    assert view.target.tolist() == [token for pair in real.pairs for response in pair["responses"]
                                    for token in response]
    for pair in real.pairs:
        assert real.chat.tokenizer.decode(pair["prompt"]).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
        assert not any(real.chat.tokenizer.decode(r).startswith("<|start_header_id|>assistant")
                       for r in pair["responses"])


def test_one_bos_and_one_end(real):
    """Trap 3: BOS was prepended to text that has it, EOS appended twice."""
    ended = 0
    for pair in real.pairs:
        assert pair["prompt"].count(0) == 1 and pair["prompt"][0] == 0
        for response in pair["responses"]:
            stops = [i for i, token in enumerate(response) if token in real.chat.stop_ids]
            assert stops in ([], [len(response) - 1])
            ended += len(stops)
    assert 10 < ended < 70  # both kinds occur


def test_a_cut_answer_gets_no_end(llama3):
    """Trap 4: over-long answers lost their end silently; here they are counted, and none is invented for them."""
    made = make(llama3, PROMPTS, Judge(TABLE), max_new_tokens=2)
    cut = [r for pair in made.pairs for r in pair["responses"] if r[-1] not in made.chat.stop_ids]
    assert len(cut) > 60 and all(len(r) == 2 for r in cut) and 0.75 < made.statistics["cut_share"] < 1
    hidden = made.net(torch.tensor([made.pairs[0]["prompt"] + cut[0]]))  # its log-prob is of two tokens, without an end
    logp = made.net.logits(hidden)[0].log_softmax(-1)
    start = len(made.pairs[0]["prompt"])
    want = sum(float(logp[start - 1 + i, token].detach()) for i, token in enumerate(cut[0]))
    got = sppo.sequence_logprobs(made.net, [{"prompt": made.pairs[0]["prompt"], "responses": [cut[0], cut[0]]}])
    assert got.detach()[0].tolist() == pytest.approx([want, want], abs=1e-4)


def test_the_judge_sees_raw_text(real):
    """Trap 5: PairRM was given the chat-templated prompt. And an answer's end token is not text."""
    assert [prompt for prompt, _ in real.judge.seen] == PROMPTS
    for (_, texts), pair in zip(real.judge.seen, real.pairs):
        assert not any("<|" in text for text in texts)
        assert texts[2] == real.chat.tokenizer.decode([t for t in pair["responses"][0] if t not in (1, 4)],
                                                      skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------------------------------------------------
# loss and gradient


class Keep:
    """An optimizer that keeps the gradient and moves nothing."""

    def __init__(self, net):
        self.net, self.grads = net, None

    def collect(self):
        pass

    def step(self, lr, clip):
        self.grads = [p.grad.clone() for p in self.net.parameters()]
        for p in self.net.parameters():
            p.grad = None
        return 0.0


def gradients(made, pairs=None, **settings):
    """(metrics, gradients) of one gradient_step on all pairs."""
    keep = Keep(made.net)
    s = dataclasses.replace(made.s, **settings)
    metrics = sppo.gradient_step(made.net, keep, pairs or made.pairs, s, 0.1, (0, 1))
    return metrics, keep.grads


def moved(made):
    """The same pairs against another reference, as in the middle of an iteration: the log-ratios are not 0."""
    return [{**pair, "ref": [pair["ref"][0] - 1.5 - 0.1 * b, *(ref + 0.7 for ref in pair["ref"][1:])]}
            for b, pair in enumerate(made.pairs)]


def test_the_first_step_starts_at_the_reference(tiny):
    """pi = pi_t, so the log-ratio is 0 and the loss is the mean of (eta (p - 1/2))^2, whatever the micro-batches."""
    for micro_batch in (1, 3, 64):
        metrics, _ = gradients(tiny, run.shuffled(tiny.pairs, micro_batch), micro_batch=micro_batch)
        assert abs(metrics["logratio_w"]) < 1e-4 and abs(metrics["logratio_l"]) < 1e-4
        assert metrics["loss"] == pytest.approx(((20 * (1.7 / 3 - 0.5)) ** 2 + (20 * (1.2 / 3 - 0.5)) ** 2) / 2,
                                                rel=1e-3)
        assert metrics["lr"] == 0.1


@pytest.mark.parametrize("which", ["base", "llama3"])
def test_what_is_scored_is_what_was_sampled(which, request):
    """The training path gives every sample the log-prob that sampling gave it. A row that ends with its very first
    token is replaced by the last row before any decoding step has run: once that row's keys were left behind, and it
    went on from another prompt's."""
    net, chat = load_checkpoint(request.getfixturevalue(which), "cpu", torch.float32)
    prompts = world.OPERATIONS.queries("train", 200) if which == "base" else PROMPTS
    ids = [chat.encode(p) for p in prompts]
    samples = rollout.generate(net, ids, 4, 12, stop_ids=chat.stop_ids, seeds=32000, max_rows=800)
    assert any(len(tokens) == 1 for group in samples.tokens for tokens in group)  # the case occurs
    for two in (slice(0, 2), slice(2, 4)):
        pairs = [{"prompt": ids[b], "responses": samples.tokens[b][two]} for b in range(len(ids))]
        want = torch.tensor([[sum(logprobs) for logprobs in group[two]] for group in samples.logprobs])
        torch.testing.assert_close(sppo.sequence_logprobs(net, pairs).detach(), want, atol=2e-4, rtol=0)


def by_hand(s, logratio, p):
    """The loss of one example as the papers write it; its log-ratios and Phats, best first, worst last."""
    difference = logratio[0] - logratio[-1]
    if s.loss == "dpo":
        return torch.log(1 + torch.exp(-s.beta * difference))
    if s.loss == "ipo":
        return (difference - 1 / (2 * s.beta)) ** 2
    p = [1.0, 0.0] if s.loss == "sppo-hard" else p
    return sum((x - s.eta * (q - 0.5)) ** 2 for x, q in zip(logratio, p)) / len(p)


def test_losses_by_hand():
    """Two examples: log-ratios +1 and -2 under Phats 3/4 and 1/4, and log-ratios 0 under a tie."""
    logratio, p = torch.tensor([[1.0, -2.0], [0.0, 0.0]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    def loss(**settings):
        return sppo.loss_of(logratio, p, settle(**settings)).tolist()

    assert loss(loss="sppo", eta=8.0) == [0.5, 0.0]             # targets +2, -2 and 0, 0
    assert loss(loss="sppo-hard", eta=8.0) == [6.5, 16.0]       # targets +4 and -4, whatever p is
    assert loss(loss="dpo", beta=0.5) == pytest.approx([math.log(1 + math.exp(-1.5)), math.log(2)])
    assert loss(loss="ipo", beta=0.1) == pytest.approx([4.0, 25.0])     # margin 5
    three, wins = torch.tensor([[1.0, 7.0, -2.0]]), torch.tensor([[0.75, 0.5, 0.25]])
    assert sppo.loss_of(three, wins, settle(all_responses=True, eta=8.0)).tolist() == pytest.approx([50 / 3])


@pytest.mark.parametrize("which, loss", [("tiny", "sppo"), ("tiny", "sppo-hard"), ("tiny", "dpo"), ("tiny", "ipo"),
                                         ("tiny", "all"), ("real", "sppo"), ("real", "dpo")])
def test_loss_and_gradient_by_hand(which, loss, request):
    """One row at a time through the whole network, no shared prefix, no fused head: the loss as it is written."""
    made = request.getfixturevalue(which)
    options = SMALL | {"all_responses": True} if loss == "all" else small(loss)
    made.s = settle(**options | {"max_new_tokens": made.s.max_new_tokens})
    if loss == "all":
        made.pairs, _ = training_examples(made.rows, made.chat, made.s)
        for pair in made.pairs:
            pair["ref"] = sppo.sequence_logprobs(made.net, [pair]).detach()[0].tolist()
    pairs = moved(made)
    made.net.zero_grad(set_to_none=True)
    total = 0.0
    for pair in pairs:
        logratio = []
        for response, ref in zip(pair["responses"], pair["ref"]):
            tokens = torch.tensor([pair["prompt"] + response])
            logp = made.net.logits(made.net(tokens))[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
            logratio.append(logp[len(pair["prompt"]) - 1:].sum() - ref)
        assert len(logratio) == (3 if loss == "all" else 2)
        total = total + by_hand(made.s, logratio, pair["p"]) / len(pairs)
    total.backward()
    want = [p.grad.clone() for p in made.net.parameters()]
    made.net.zero_grad(set_to_none=True)
    metrics, got = gradients(made, pairs)
    assert metrics["loss"] == pytest.approx(float(total.detach()), rel=1e-4) and metrics["loss"] > 0.1
    assert metrics["logratio_w"] == pytest.approx(sum(1.5 + 0.1 * b for b in range(len(pairs))) / len(pairs), abs=1e-4)
    assert metrics["logratio_l"] == pytest.approx(-0.7, abs=1e-4) and metrics["ranked_share"] == pytest.approx(1)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def size(gradient):
    """The gradient's norm."""
    return float(torch.cat([g.flatten() for g in gradient]).norm())


def test_ties_under_every_loss(base):
    """Winner and loser are then one and the same answer. DPO and IPO see only their difference: no gradient, wherever
    the policy stands. sppo-hard pulls it to +eta/2 and -eta/2 at once, that is to 0, just as (4.7) with p = 1/2."""
    made = make(base, world.OPERATIONS.queries("train", 6), Judge([[0.5] * 3] * 3))
    pairs = [{**pair, "ref": [ref - 1.5 for ref in pair["ref"]]} for pair in made.pairs]
    soft = gradients(made, pairs)[1]
    for name in ("dpo", "ipo"):
        metrics, none = gradients(made, pairs, loss=name, beta=0.3)
        assert size(none) < 1e-5 * size(soft) and metrics["ranked_share"] == 0
    hard = gradients(made, pairs, loss="sppo-hard", eta=8.0)[1]
    assert size([a - b for a, b in zip(hard, soft)]) < 1e-4 * size(soft)
    assert gradients(made, made.pairs, loss="sppo-hard", eta=8.0)[0]["loss"] == pytest.approx(16, abs=1e-3)
    assert size(gradients(made, made.pairs, loss="sppo-hard", eta=8.0)[1]) < 1e-3 * size(hard)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny):
    """12 pairs in passes of 5, 5 and 2. float32 rounding is 6e-8 a number, some 1e-6 of a sum's size; the mean of the
    passes' means, which counts the last two pairs two and a half times, is off by far more."""
    pairs = moved(tiny)
    s = settle(**{**SMALL, "micro_batch": None, "gradient_accumulation": 3, "batch_size": 13})
    assert s.micro_batch == 5
    one, whole = gradients(tiny, pairs, micro_batch=12)
    metrics, passes = gradients(tiny, pairs, micro_batch=s.micro_batch)
    assert metrics == pytest.approx(one, rel=1e-5)
    assert size([a - b for a, b in zip(passes, whole)]) < 1e-5 * size(whole)
    means = [gradients(tiny, pairs[i:i + 5], micro_batch=5)[1] for i in (0, 5, 10)]
    wrong = [sum(parts) / 3 for parts in zip(*means)]
    assert size([a - b for a, b in zip(wrong, whole)]) > 1e-2 * size(whole)


def test_micro_batches_do_not_change_the_gradient(tiny):
    pairs = moved(tiny)
    (one, g1), (many, g64) = gradients(tiny, pairs, micro_batch=1), gradients(tiny, pairs, micro_batch=64)
    assert one == pytest.approx(many, rel=1e-5)
    for a, b in zip(g1, g64):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_the_logged_loss_is_of_the_whole_batch(tiny):
    """Elsewhere the last micro-batch is logged as the loss. Here one pair of twelve is far off, in the first place."""
    pairs = [{**tiny.pairs[0], "ref": [tiny.pairs[0]["ref"][0] + 100, tiny.pairs[0]["ref"][1]]}, *tiny.pairs[1:]]
    want = (1.3333**2 + 2**2) / 2 + (101.3333**2 - 1.3333**2) / 24
    assert gradients(tiny, pairs, micro_batch=1)[0]["loss"] == pytest.approx(want, rel=1e-3)


def test_a_step_moves_towards_the_targets(tiny):
    optimizer = kernels.Optimizer(tiny.net.parameters(), "adamw")
    losses = [sppo.gradient_step(tiny.net, optimizer, tiny.pairs, tiny.s, 1e-3, (0, 1)) for _ in range(12)]
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"] and losses[-1]["logratio_w"] > 0.2
    assert losses[-1]["logratio_l"] < -0.2


# ---------------------------------------------------------------------------------------------------------------------
# whole runs


def lines(path):
    return [json.loads(line) for line in open(path)]


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """An uninterrupted run of SMALL on the tiny world."""
    out = str(tmp_path_factory.mktemp("run") / "sppo")
    sppo.main(argv(model=base, out=out, **SMALL))
    return out


def test_what_a_run_leaves(finished, base):
    assert sorted(os.listdir(finished)) == ["config.json", "curves.png", "iter-1", "iter-2", "metrics.jsonl",
                                            "samples.jsonl", "state", "summary.json", "table-1.jsonl", "table-2.jsonl"]
    summary = json.load(open(f"{finished}/summary.json"))
    assert summary["method"] == "sppo" and summary["base"] == base and summary["settings"]["eta"] == 20.0
    assert summary["torch"] == torch.__version__
    assert [e["name"] for e in summary["evaluations"]] == ["base", "base, greedy", "iteration 1", "iteration 2"]
    for e in summary["evaluations"]:
        assert e["prompts"] == 16
        assert all(0 <= e[key] <= 1 for key in ("win_rate", "win_rate_greedy", "accuracy_sampled", "accuracy_greedy"))
        assert e["win_rate_se"] > 0 and e["win_rate_greedy_se"] >= 0 and 0 < e["mean_length"] <= 12
    assert summary["evaluations"][0]["win_rate_greedy"] == 0.5
    assert set(summary["seconds"]) == {"sample", "judge", "reference", "train", "validate", "evaluate", "total"}
    rows = lines(f"{finished}/metrics.jsonl")
    steps, validations = [r for r in rows if "loss" in r], [r for r in rows if "validation_win_rate" in r]
    # 20 prompts / 8, twice
    assert [(r["iteration"], r["step"]) for r in steps] == [(t, i) for t in (1, 2) for i in range(1, 7)]
    assert [(r["iteration"], r["step"]) for r in validations] == [(1, 3), (1, 6), (2, 3), (2, 6)]
    best = max((r for r in validations if r["iteration"] == 1), key=lambda r: r["validation_win_rate"])
    assert summary["evaluations"][2]["epoch"] == best["epoch"]
    samples = lines(f"{finished}/samples.jsonl")
    assert [r["iteration"] for r in samples] == [1] * 20 + [2] * 20
    assert len({r["prompt"] for r in samples}) == 40


def test_checkpoints_hold_the_epoch_that_was_chosen_and_open_in_transformers(finished, base):
    net = transformers.AutoModelForCausalLM.from_pretrained(f"{finished}/iter-2", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{finished}/iter-2")
    start = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert tokenizer.chat_template and net.num_parameters() == start.num_parameters()
    # it moved
    assert max(float((a - b).detach().abs().max()) for a, b in zip(net.parameters(), start.parameters())) > 1e-3


def test_the_second_iteration_starts_and_is_anchored_at_the_first(finished):
    """pi_t is the last iteration's result, not the base: its first log-ratios are 0 again."""
    firsts = [r for r in lines(f"{finished}/metrics.jsonl") if "loss" in r and r["step"] == 1]
    assert [r["iteration"] for r in firsts] == [1, 2]
    assert all(abs(r["logratio_w"]) < 1e-4 and abs(r["logratio_l"]) < 1e-4 for r in firsts)
    others = [r for r in lines(f"{finished}/metrics.jsonl") if "loss" in r and r["step"] == 6]
    assert all(abs(r["logratio_w"]) > 1e-2 for r in others)


@pytest.mark.parametrize("loss, options", [("sppo", {}), ("sppo", {"all_responses": True}), ("sppo-hard", {}),
                                           ("dpo", {}), ("ipo", {})])
def test_every_loss_moves_winners_above_losers(loss, options, base):
    """Whole runs: at the end most of the pairs that are not ties are ranked as the judge ranked them."""
    sppo.main(argv(model=base, out="out", lr=2e-3, **options,
                   **{**small(loss), "iterations": 1, "prompts_per_iteration": 32, "k": 4, "epochs": 8, "keep": "last",
                      "micro_batch": 8, "test_prompts": 4, "validation_prompts": 4}))
    rows = [r for r in lines("out/metrics.jsonl") if "loss" in r]
    last = {name: sum(r[name] for r in rows[-4:]) / 4 for name in ("loss", "logratio_w", "logratio_l", "ranked_share")}
    first = {name: sum(r[name] for r in rows[:4]) / 4 for name in last}
    assert last["logratio_w"] > last["logratio_l"] + 0.5 and last["loss"] < first["loss"]
    assert last["ranked_share"] > 0.85 * (1 - rows[0]["tied_share"]) > 0.4
    summary = json.load(open("out/summary.json"))
    assert summary["method"] == loss and summary["evaluations"][-1]["logratio_w"] == pytest.approx(last["logratio_w"])


def test_a_long_schedule_is_still_warming_up_after_one_epoch(base):
    """The paper's: 18 epochs scheduled, warm-up a tenth of them, the first epoch's result kept. 10 steps of 180: the
    rate ends at (1/18) / (1/10) of its peak."""
    sppo.main(argv(model=base, out="out", **{**SMALL, "iterations": 1, "prompts_per_iteration": 40, "batch_size": 4,
                                             "epochs": 1, "schedule_epochs": 18, "lr": 1e-3, "test_prompts": 4}))
    rates = [r["lr"] for r in lines("out/metrics.jsonl") if "lr" in r]
    assert len(rates) == 10 and rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.556e-3, rel=1e-3) and rates[0] == pytest.approx(rates[-1] / 10)


GOLDEN = [0.04275347, 14.90037511, 0.95113581]


def test_golden_losses():
    """The first losses of a seeded run on random weights, pinned: whatever changes the sampling, the judge, the
    order, the loss or the optimizer changes them. (Sampling flips a token if rounding crosses a boundary: odds about
    1e-4 a platform.)"""
    world.train_base("random", dataclasses.replace(world.OPERATIONS, steps=0, width=32, layers=2, mlp=64), "cpu")
    sppo.main(argv(model="random", out="golden", **{**SMALL, "iterations": 1, "epochs": 1, "k": 4, "lr": 3e-3}))
    losses = [r["loss"] for r in lines("golden/metrics.jsonl") if "loss" in r]
    assert losses == pytest.approx(GOLDEN, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# kill -9

KILLER = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
place = sys.argv.pop(1)
import checkpoints, model, run, sppo, torch, winrate

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def on_call(owner, name, number, before=True):
    real, calls = getattr(owner, name), []
    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and before:
            die()
        result = real(*args, **kwargs)
        if len(calls) == number:
            die()
        return result
    setattr(owner, name, counted)

if place == "training":             # the fifth step of iteration 2, one after a saved state
    on_call(sppo, "gradient_step", 11)
elif place == "between":            # right after iteration 1 was saved
    on_call(sppo, "sample_answers", 4)
elif place == "sampled":            # iteration 2 is sampled, not yet judged
    on_call(sppo, "judge_answers", 4)
elif place == "pairs":              # iteration 2 is sampled and judged, nothing of it is trained
    on_call(sppo, "gradient_step", 7)
elif place == "start":              # before anything is saved
    on_call(winrate, "opponent", 1)
elif place == "sampling":           # iteration 2 has two chunks of three
    on_call(sppo, "sample_answers", 6)
elif place == "judging":            # iteration 2 has one chunk of three
    on_call(sppo, "judge_answers", 5)
elif place == "half a row":         # in the middle of writing iteration 2's second chunk
    real = sppo.run.in_chunks
    def half(path, items, size, make, rank=0):
        if "sampled-2" in path:
            real(path, items[:2 * size], size, make, rank)
            os.truncate(path, os.path.getsize(path) - 7)
            die()
        return real(path, items, size, make, rank)
    sppo.run.in_chunks = half
elif place == "trained":            # iteration 1's checkpoint has its final name, its row of the table is not there
    on_call(run, "rename_on_rank_0", 1, before=False)
elif place == "state":              # the state's temporary file is written, not yet renamed
    on_call(torch, "save", 8, before=False)
elif place == "checkpoint":         # a checkpoint is written, not yet renamed
    on_call(checkpoints, "copy_tokenizer", 2, before=False)
run.main(sppo.main)
"""


def killed(place, flags):
    """Run sppo.main in a process that kills itself at `place`."""
    done = subprocess.run([sys.executable, "-c", KILLER, ROOT, place, *flags], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def contents(out):
    """Everything that must be bit-identical: all files but those that tell the time (summary, state, picture)."""
    files = {}
    for where, _, names in os.walk(out):
        for name in names:
            path = os.path.join(where, name)
            short = os.path.relpath(path, out)
            timed = short in ("summary.json", "curves.png", "config.json", "state/state.pt", "state/lock")
            files[short] = None if timed else open(path, "rb").read()
    return files


def check_resume(place, base, finished, capsys):
    flags = argv(model=base, out="killed", **SMALL)
    killed(place, flags)
    if place != "start":                        # what was evaluated can be read and plotted already
        rows = json.load(open("killed/summary.json"))["evaluations"]
        assert rows == json.load(open(f"{finished}/summary.json"))["evaluations"][:len(rows)]
        assert 2 <= len(rows) < 2 + SMALL["iterations"] and is_png("killed/curves.png")
    sppo.main([*flags, "--resume"])
    assert ("starting afresh" in capsys.readouterr().out) == (place == "start")
    got, want = contents("killed"), contents(finished)
    assert set(got) == set(want)  # nothing half-written is left over
    assert [name for name in want if got[name] != want[name]] == []
    killed_rows, want_rows = (json.load(open(f"{out}/summary.json"))["evaluations"] for out in ("killed", finished))
    assert killed_rows == want_rows


def test_a_run_killed_in_training_resumes_bit_for_bit(base, finished, capsys):
    check_resume("training", base, finished, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["between", "sampled", "pairs", "start", "state", "checkpoint", "sampling",
                                   "judging", "half a row", "trained"])
def test_a_run_killed_anywhere_resumes_bit_for_bit(place, base, finished, capsys):
    check_resume(place, base, finished, capsys)


def test_resuming_a_finished_run_changes_nothing(base, capsys):
    flags = argv(model=base, out="done", **{**SMALL, "iterations": 1})
    sppo.main(flags)
    before, evaluations = contents("done"), json.load(open("done/summary.json"))["evaluations"]
    sppo.main([*flags, "--resume"])
    assert contents("done") == before and json.load(open("done/summary.json"))["evaluations"] == evaluations


@pytest.mark.slow
def test_bfloat16_with_truncated_sampling_resumes_bit_for_bit(base):
    """The float32 masters are part of the state: without them a resumed bfloat16 run would take another path."""
    options = {**SMALL, "dtype": "bfloat16", "top_p": 0.9, "top_k": 20, "optimizer": "rmsprop", "lr": 1e-4}
    flags = argv(model=base, **options)
    sppo.main([*flags, "--out", "whole"])
    killed("training", [*flags, "--out", "killed"])
    sppo.main([*flags, "--out", "killed", "--resume"])
    got, want = contents("killed"), contents("whole")
    assert [name for name in want if got[name] != want[name]] == []
    net = transformers.AutoModelForCausalLM.from_pretrained("whole/iter-2", dtype="auto")
    assert net.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# stages: each phase alone, a table between them

ONE = {**SMALL, "iterations": 1, "epochs": 1}


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """An uninterrupted run of ONE on the tiny world."""
    out = str(tmp_path_factory.mktemp("whole") / "sppo")
    sppo.main(argv(model=base, out=out, **ONE))
    return out


@pytest.fixture
def prose(llama3, pairrm, prompts_file):
    """Settings of a small run on a real checkpoint, with a real judge."""
    return {**ONE, "model": llama3, "judge": f"pairrm:{pairrm}", "prompts": prompts_file, "max_new_tokens": 16,
            "max_prompt_tokens": 0, "validation_prompts": 8, "test_prompts": 8, "lr": 1e-4, "estimator": "aggregate"}


def same_files(one, other, *names):
    return [name for name in names if open(f"{one}/{name}", "rb").read() != open(f"{other}/{name}", "rb").read()] == []


def not_here(*args, **kwargs):
    """Stands for what a stage must not load."""
    raise AssertionError("not to be loaded here")


def test_three_commands_give_the_bytes_of_one(base, whole, monkeypatch):
    """And each loads no more than it needs: the machine that samples has no judge, the one that judges no model."""
    flags = argv(model=base, out="out", **ONE)
    with monkeypatch.context() as patch:
        patch.setattr(prefmodel, "load", not_here)
        sppo.main([*flags, "--stage", "sample"])
    assert "chosen" not in lines("out/table-1.jsonl")[0]
    with monkeypatch.context() as patch:
        patch.setattr(sppo, "Chat", not_here)
        patch.setattr(model.Transformer, "from_pretrained", not_here)
        sppo.main([*flags, "--stage", "judge"])
    with monkeypatch.context() as patch:
        patch.setattr(prefmodel, "load", not_here)
        sppo.main([*flags, "--stage", "train"])
    assert same_files("out", whole, "table-1.jsonl", "iter-1/model.safetensors", "samples.jsonl",
                      "state/reference-1.json")


def test_stages_go_on_where_the_last_iteration_ended(base, whole):
    """Iteration 2 starts from iteration 1's checkpoint, as in one command."""
    settings = {**ONE, "iterations": 2, "prompts_per_iteration": 12}
    for t in (1, 2):
        for stage in ("sample", "judge", "train"):
            sppo.main(argv(model=base, out="out", stage=stage, iteration=t, **settings))
    sppo.main(argv(model=base, out="one", **settings))
    assert same_files("out", "one", "table-1.jsonl", "table-2.jsonl", "iter-1/model.safetensors",
                      "iter-2/model.safetensors", "samples.jsonl")
    steps = [(r["iteration"], r["step"]) for r in lines("out/metrics.jsonl")]
    assert steps == [(1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.slow
def test_a_table_judged_elsewhere_gives_the_bytes_of_one_command(prose):
    """Sampled here, judged in another directory, trained here: with a real checkpoint and PairRM."""
    sppo.main(argv(out="one", **prose))
    sppo.main(argv(out="here", stage="sample", **prose))
    sppo.main(argv(out="there", stage="judge", table="here/table-1.jsonl", **prose))
    assert same_files("there", "one", "table-1.jsonl")
    sppo.main(argv(out="here", stage="train", table="there/table-1.jsonl", **prose))
    assert same_files("here", "one", "iter-1/model.safetensors", "state/reference-1.json")
    assert lines("here/table-1.jsonl") == lines("one/table-1.jsonl")
    sppo.main(argv(out="bare", stage="train", table="there/table-1.jsonl",
                   **{name: value for name, value in prose.items() if name not in ("prompts", "judge", "estimator")}))
    assert same_files("bare", "one", "iter-1/model.safetensors")


def test_a_stage_killed_in_training_resumes_bit_for_bit(base, dies_in):
    """It dies in the fifth step of six, one after a saved state."""
    flags = argv(model=base, **{**ONE, "epochs": 2, "keep": "last"})
    for out in ("whole", "killed"):
        for stage in ("sample", "judge"):
            sppo.main([*flags, "--out", out, "--stage", stage])
    sppo.main([*flags, "--out", "whole", "--stage", "train"])
    calls = dies_in(sppo, "gradient_step", 5)
    with pytest.raises(Killed):
        sppo.main([*flags, "--out", "killed", "--stage", "train"])
    assert not os.path.exists("killed/iter-1")
    sppo.main([*flags, "--out", "killed", "--stage", "train", "--resume"])
    got, want = contents("killed"), contents("whole")
    assert set(got) == set(want) and [name for name in want if got[name] != want[name]] == []
    assert len(calls) == 5 + 2              # the fifth step and the sixth: it did not begin anew


OFFICIAL = {"prompt", "generate_0", "generate_1", "generate_2", "probability", "rm_scores", "chosen", "rejected",
            "chosen_probs", "chosen_probs_win", "chosen_probs_lose"}


def test_the_table_has_the_official_codes_columns(whole):
    """And three of its own: what text loses."""
    rows = lines(f"{whole}/table-1.jsonl")
    assert len(rows) == 20
    for row in rows:
        assert set(row) == OFFICIAL | {"prompt_ids", "tokens", "finish"}
        talks = [row[f"generate_{k}"] for k in range(3)]
        for talk in [*talks, row["chosen"], row["rejected"]]:
            assert [set(turn) for turn in talk] == [{"role", "content"}] * 2
            assert [turn["role"] for turn in talk] == ["user", "assistant"] and talk[0]["content"] == row["prompt"]
        P = torch.tensor(row["probability"])
        assert P.shape == (3, 3) and torch.allclose(P + P.T, torch.ones(3, 3), atol=1e-6)
        best, worst = int(P.mean(1).argmax()), int(P.mean(1).argmin())
        assert row["chosen"] == talks[best] and row["rejected"] == talks[worst]
        assert row["chosen_probs"] == pytest.approx(float(P[best, worst]))
        assert row["chosen_probs_win"] == pytest.approx(float(P[best].mean()))
        assert row["chosen_probs_lose"] == pytest.approx(float(P[worst].mean()))
        assert len(row["rm_scores"]) == len(row["tokens"]) == len(row["finish"]) == 3
        assert max(row["rm_scores"]) == row["rm_scores"][best] and set(row["finish"]) <= {"stop", "length"}


@pytest.mark.parametrize("which", ["base", "llama3"])
def test_an_answer_known_as_text_gets_the_ids_it_was_sampled_with(which, request):
    """Where the text says all (a random model's tokens may be no text, or one the tokenizer would cut elsewhere):
    among sampled answers that ended, and among written ones."""
    net, chat = load_checkpoint(request.getfixturevalue(which), "cpu", torch.float32)
    prompts = world.OPERATIONS.queries("train", 60) if which == "base" else PROMPTS
    samples = rollout.generate(net, [chat.encode(p) for p in prompts], 60, 12, stop_ids=chat.stop_ids, seeds=3)
    same = 0
    for prompt, group in zip(prompts, samples.tokens):
        for ids in group:
            text = chat.decode(ids)
            if ids[-1] == chat.tokenizer.eos_token_id and chat.tokenizer.encode(
                    text, add_special_tokens=False) == ids[:-1]:
                assert chat.encode_answer(prompt, text) == ids
                same += 1
    assert same > (3000 if which == "base" else 4)
    for prompt, text in zip(prompts, reversed(prompts)):
        ids = chat.encode_answer(prompt, text)
        assert ids == [*chat.tokenizer.encode(text, add_special_tokens=False), chat.tokenizer.eos_token_id]


ANSWERS = [f"{word} {p.split()[0].lower()}" for word in ("Yes,", "No, not at all:") for p in PROMPTS]


def foreign(columns):
    """A table as another tool would write it: text, no ids."""
    rows = []
    for i, prompt in enumerate(PROMPTS[:12]):
        talks = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": a}]
                 for a in (ANSWERS[i], ANSWERS[40 + i], "Perhaps.")]
        row = {"prompt": prompt, "chosen": talks[0], "rejected": talks[1], "chosen_probs": 0.875,
               "chosen_probs_win": 0.75, "chosen_probs_lose": 0.25}
        if columns == "generate":
            row = {"prompt": prompt, **{f"generate_{k}": talk for k, talk in enumerate(talks)},
                   "probability": [[0.5, 0.75, 0.25], [0.25, 0.5, 0.5], [0.75, 0.5, 0.5]]}
        rows.append(row)
    files.write_rows("foreign.jsonl", rows)
    return rows


@pytest.mark.parametrize("columns", ["chosen", "generate"])
def test_a_foreign_table_trains(columns, llama3, prose):
    """Prompts through the chat template; answers end with one end-of-turn token, and no second BOS comes in."""
    rows = foreign(columns)
    only = {name: value for name, value in prose.items() if name not in ("prompts", "judge", "estimator")}
    only["max_new_tokens"] = 48
    s = sppo.settle(sppo.Settings(**only, stage="train", table="foreign.jsonl"))
    chat = load_checkpoint(llama3, "cpu", torch.float32)[1]
    examples, statistics = training_examples(read_table("foreign.jsonl", judged=True), chat, s)
    for i, (example, row) in enumerate(zip(examples, rows)):
        assert example["prompt"] == chat.encode(row["prompt"]) and example["prompt"].count(0) == 1
        texts = [ANSWERS[i], ANSWERS[40 + i]] if columns == "chosen" else ["Perhaps.", ANSWERS[40 + i]]
        assert [chat.decode(ids) for ids in example["responses"]] == texts
        assert example["p"] == pytest.approx([0.75, 0.25] if columns == "chosen" else [1.75 / 3, 1.25 / 3])
        for ids in example["responses"]:
            assert [token in chat.stop_ids for token in ids] == [False] * (len(ids) - 1) + [True] and 0 not in ids
    assert statistics["cut_share"] == 0
    sppo.main(argv(out="out", stage="train", table="foreign.jsonl", **only))
    rows = lines("out/metrics.jsonl")
    assert len(rows) == 2 and abs(rows[0]["logratio_w"]) < 1e-4 and abs(rows[1]["logratio_w"]) > 1e-4
    transformers.AutoModelForCausalLM.from_pretrained("out/iter-1")


def test_a_long_foreign_answer_is_cut_and_counted(llama3, prose):
    """As a sampled one would be: at the limit, without an end token that it did not come to."""
    foreign("chosen")
    chat = load_checkpoint(llama3, "cpu", torch.float32)[1]
    rows = read_table("foreign.jsonl", judged=True)
    whole = [chat.encode_answer(row["prompt"], row[name][-1]["content"]) for row in rows
             for name in ("chosen", "rejected")]
    limit = sorted(map(len, whole))[12]
    s = settle(**{**prose, "max_new_tokens": limit})
    examples, statistics = training_examples(rows, chat, s)
    assert [ids for e in examples for ids in e["responses"]] == [ids[:limit] for ids in whole]
    cut = sum(len(ids) > limit for ids in whole)
    assert statistics["cut_share"] == cut / 24 and 5 < cut < 24
    s = settle(**{**prose, "max_total_tokens": len(examples[0]["prompt"]) + 3})
    first = training_examples(rows[:1], chat, s)[0][0]
    assert [len(ids) for ids in first["responses"]] == [3, 3]


def test_a_foreign_tables_long_prompts_are_left_out(llama3, prose, capsys):
    """The answers are known, so only the prompt's own limit counts, not the room for an answer of any length."""
    rows = foreign("chosen")
    chat = load_checkpoint(llama3, "cpu", torch.float32)[1]
    lengths = [len(chat.encode(row["prompt"])) for row in rows]
    limit = sorted(lengths)[7]
    gone = sum(n > limit for n in lengths)
    only = {name: value for name, value in prose.items() if name not in ("prompts", "judge", "estimator")}
    only |= {"max_prompt_tokens": limit, "max_new_tokens": 500}
    sppo.main(argv(out="out", stage="train", table="foreign.jsonl", drop_long_prompts=True, **only))
    said = capsys.readouterr().out
    assert said.count(f"left out {gone} of 12 prompts") == 1 and f"answers to {12 - gone} prompts" in said and gone


def test_a_runs_directory_may_move(base, whole):
    """Another directory, device flag and micro-batch are no other run; another eta is."""
    flags = argv(model=base, **ONE)
    sppo.main([*flags, "--out", "first", "--stage", "sample"])
    os.rename("first", "second")
    sppo.main([*flags, "--out", "second/", "--stage", "judge", "--device", "auto", "--max-rows", "32"])
    sppo.main([*flags, "--out", "./second", "--stage", "train", "--print-every", "1"])
    assert same_files("second", whole, "table-1.jsonl", "iter-1/model.safetensors")
    with pytest.raises(UserError, match="eta = 20.0, now it is 21.0"):
        sppo.main([*flags, "--out", "second", "--stage", "judge", "--eta", "21"])


def test_the_worlds_own_table_can_be_trained_elsewhere(base, whole):
    """With --world the defaults are the world's, though --table is given."""
    sppo.main(argv(model=base, world="operations", out="out", stage="train", table=f"{whole}/table-1.jsonl", **ONE))
    assert same_files("out", whole, "iter-1/model.safetensors")


def test_another_table_in_the_middle_of_training_is_refused(base, dies_in):
    """Its reference log-probs would be another table's: the first log-ratios would not be 0."""
    for seed in (0, 1):
        for stage in ("sample", "judge"):
            sppo.main(argv(model=base, out=f"seed-{seed}", stage=stage, seed=seed, **ONE))
    flags = argv(model=base, world="operations", out="out", stage="train", **{**ONE, "epochs": 2, "keep": "last"})
    dies_in(sppo, "gradient_step", 5)
    with pytest.raises(Killed):
        sppo.main([*flags, "--table", "seed-0/table-1.jsonl"])
    with pytest.raises(UserError, match="another table"):
        sppo.main([*flags, "--table", "seed-1/table-1.jsonl", "--resume"])
    sppo.main([*flags, "--table", "seed-0/table-1.jsonl", "--resume"])
    assert os.path.exists("out/iter-1")


@pytest.mark.parametrize("stages", [("sample",), ("sample", "judge"), ("sample", "judge", "train")])
def test_a_whole_run_goes_on_from_what_stages_left(base, whole, capsys, stages):
    """A phase's result is a file, whoever made it: the rest gives the bytes of one command."""
    flags = argv(model=base, out="out", **ONE)
    for stage in stages:
        sppo.main([*flags, "--stage", stage])
    sppo.main([*flags, "--resume"])
    assert same_files("out", whole, "table-1.jsonl", "iter-1/model.safetensors", "samples.jsonl",
                      "state/reference-1.json", "state/evaluations.json" if "train" not in stages else "samples.jsonl")
    rows = json.load(open("out/summary.json"))["evaluations"]
    assert [row["name"] for row in rows] == ["base", "base, greedy", "iteration 1"]
    assert rows[2]["win_rate"] == json.load(open(f"{whole}/summary.json"))["evaluations"][2]["win_rate"]
    assert "starting afresh" not in capsys.readouterr().out


def test_an_iteration_can_be_trained_again(base):
    """As the message says: remove its checkpoint."""
    import shutil

    for stage in ("sample", "judge", "train"):
        sppo.main(argv(model=base, out="out", stage=stage, **ONE))
    before = open("out/iter-1/model.safetensors", "rb").read()
    shutil.rmtree("out/iter-1")
    sppo.main(argv(model=base, out="out", stage="train", **ONE))
    assert open("out/iter-1/model.safetensors", "rb").read() == before


@pytest.mark.slow
def test_a_whole_run_goes_on_inside_a_training_that_a_stage_began(base, dies_in):
    """Without a step or a sample that stands twice in the journals."""
    flags = argv(model=base, **{**ONE, "epochs": 2, "keep": "last"})
    sppo.main([*flags, "--out", "whole"])
    for stage in ("sample", "judge"):
        sppo.main([*flags, "--out", "out", "--stage", stage])
    calls = dies_in(sppo, "gradient_step", 5)
    with pytest.raises(Killed):
        sppo.main([*flags, "--out", "out", "--stage", "train"])
    sppo.main([*flags, "--out", "out", "--resume"])
    assert len(calls) == 5 + 2
    assert same_files("out", "whole", "metrics.jsonl", "samples.jsonl", "iter-1/model.safetensors",
                      "state/evaluations.json")


def test_verdicts_of_one_table_are_not_given_to_another(base, dies_in):
    """Two tables, one --out: what was judged of the first before a kill is no part of the second."""
    for seed in (0, 1):
        sppo.main(argv(model=base, out=f"seed-{seed}", stage="sample", seed=seed, **ONE))
    judge = argv(model=base, world="operations", out="out", stage="judge", **ONE)
    dies_in(sppo, "judge_answers", 2)
    with pytest.raises(Killed):
        sppo.main([*judge, "--table", "seed-0/table-1.jsonl"])
    sppo.main([*judge, "--table", "seed-1/table-1.jsonl"])
    given, made = lines("seed-1/table-1.jsonl"), lines("out/table-1.jsonl")
    assert [row["tokens"] for row in made] == [row["tokens"] for row in given] and len(made) == 20
    with pytest.raises(UserError, match="already judged; to judge it again give --table"):
        sppo.main(judge)
    sppo.main([*judge, "--table", "out/table-1.jsonl"])
    assert lines("out/table-1.jsonl") == made


def test_a_stage_of_a_finished_run_is_not_done_again(base, whole):
    for stage, made in (("sample", "table-1.jsonl"), ("train", "iter-1")):
        with pytest.raises(UserError, match=f"{made} is already there"):
            sppo.main(argv(model=base, out=whole, stage=stage, **ONE))


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_table_of_held_out_prompts_is_refused(base, part):
    """What a checkpoint is chosen or measured by must not train it."""
    prompt = world.OPERATIONS.queries(part, 3000)[-1]
    talks = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": a}] for a in "ab"]
    files.write_rows("t.jsonl", [{"prompt": prompt, "generate_0": talks[0], "generate_1": talks[1],
                                       "probability": [[0.5, 0.75], [0.25, 0.5]]}])
    with pytest.raises(UserError, match="sets aside for validation"):
        sppo.main(argv(model=base, world="operations", out="out", stage="train", table="t.jsonl",
                       **{**ONE, "epochs": 2}))
    assert not os.path.exists("out")
    sppo.main(argv(model=base, world="operations", out="out", stage="judge", table="t.jsonl", **{**ONE, "epochs": 2}))
    with pytest.raises(UserError, match="table-1.jsonl holds prompts that .* sets aside for validation"):
        sppo.main(argv(model=base, world="operations", out="out", stage="train", **{**ONE, "epochs": 2}))


# ---------------------------------------------------------------------------------------------------------------------
# the intransitive world


@pytest.mark.pictures
def test_a_run_in_the_intransitive_world(circle, capsys):
    """Its summary says which styles are played; from there come the table, the picture and the exact iterates."""
    sppo.main(argv(model=circle, world="intransitive", out="out",
                   **{**SMALL, "epochs": 1, "test_prompts": 40, "max_new_tokens": 8}))
    summary = json.load(open("out/summary.json"))
    evaluations = summary["evaluations"]
    assert [e["name"] for e in evaluations] == ["base", "base, greedy", "iteration 1", "iteration 2"]
    for e in evaluations:
        assert len(e["styles"]) == 3 and sum(e["styles"]) == pytest.approx(1) and e["accuracy_greedy"] is None
    assert evaluations[0]["styles"][0] > evaluations[0]["styles"][2]        # the corpus: .45, .25, .3
    assert summary["settings"]["all_responses"] is True and summary["settings"]["judge"] == "styles"
    text = capsys.readouterr().out
    for name in ("average of 2 iterates", "average, exact updates", "Nash equilibrium", "best response"):
        assert name in text
    assert text.count("iteration 2: styles ") == 1 and winrate.style_table(summary) in text
    with open("out/curves.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    for row in lines("out/table-1.jsonl"):
        styles = [world.style(a) for a in answer_texts(row)]
        P = torch.tensor(row["probability"])
        for i, j in [(i, j) for i in range(3) for j in range(3) if None not in (styles[i], styles[j])]:
            assert float(P[i, j]) == pytest.approx(world.STYLES[styles[i]][styles[j]])


def test_each_world_wants_its_own_base(circle, base, capsys):
    """A judge of styles has nothing to say of answers without one, nor the oracle of answers with one."""
    with pytest.raises(UserError, match="answers in no style"):
        sppo.main(argv(model=base, world="intransitive", out="out", **SMALL))
    with pytest.raises(UserError, match="answers in styles"):
        sppo.main(argv(model=circle, out="out", **SMALL))
    with pytest.raises(UserError, match="answers in styles"):
        eval.main(["winrate", "--model", circle, "--vs", circle])
    assert not os.path.exists("out")
    eval.main(["winrate", "--model", circle, "--vs", circle, "--judge", "styles", "--count", "20", "--json"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.2 < row["win_rate"] < 0.8 and row["win_rate_greedy"] == 0.5 and sum(row["styles"]) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------------------
# several ranks


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(base, finished):
    """torchrun on two CPU processes: the same answers, losses within rounding, the same choice, and it comes to its
    end."""
    def launch(out, **settings):
        flags = argv(model=base, out=out, **{**SMALL, **settings})
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                               os.path.join(ROOT, "sppo.py"), *flags],
                              capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("seconds: ") == 1  # only rank 0 speaks
        return lines(f"{out}/metrics.jsonl")

    def same(got, want):
        assert len(got) == len(want)
        for a, b in zip(got, want):
            assert a.keys() == b.keys()
            assert all(a[k] == b[k] for k in ("iteration", "step", "epoch"))
            for key in {"loss", "validation_win_rate", "phat_best"} & set(a):
                assert a[key] == pytest.approx(b[key], rel=1e-4)

    same(launch("two"), lines(f"{finished}/metrics.jsonl"))
    assert lines("two/samples.jsonl") == lines(f"{finished}/samples.jsonl")
    # 19 = 6 x 3 + 1: the last batch has one pair for two ranks
    ragged = dict(iterations=1, prompts_per_iteration=19, batch_size=3)
    sppo.main(argv(model=base, out="one", **{**SMALL, **ragged}))
    same(launch("ragged", **ragged), lines("one/metrics.jsonl"))


@pytest.mark.slow
def test_two_ranks_killed_in_training_resume_bit_for_bit(base):
    """Each process saves its shares of weights and moments. Another number of processes can go on from them too: what
    they compute then differs by rounding."""
    options = {**SMALL, "iterations": 1, "prompts_per_iteration": 128, "epochs": 6, "save_every": 3, "print_every": 1}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                os.path.join(ROOT, "sppo.py")]

    def launch(out, *more):
        return subprocess.Popen([*torchrun, *argv(model=base, out=out, **options), *more], stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, text=True, start_new_session=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})

    whole = launch("whole")
    assert "seconds: " in whole.communicate(timeout=200)[0] and whole.returncode == 0
    dies = launch("killed")
    for line in dies.stdout:
        if "step 40/" in line:
            break
    os.killpg(dies.pid, signal.SIGKILL)
    dies.wait()
    for pid in ranks_of("killed"):          # torchrun starts its workers in sessions of their own
        os.kill(pid, signal.SIGKILL)
    assert [name for name in os.listdir("killed/state") if name.startswith("training-")]
    shutil.copytree("killed", "alone", ignore=shutil.ignore_patterns("lock"))
    sppo.main([*argv(model=base, out="alone", **options), "--resume"])
    alone, whole = ([row["loss"] for row in lines(f"{out}/metrics.jsonl") if "loss" in row]
                    for out in ("alone", "whole"))
    first = next(i for i, (a, b) in enumerate(zip(alone, whole)) if a != b)        # the first step after the resume
    assert first >= 36 and len(alone) == len(whole) and alone[first:first + 5] == pytest.approx(whole[first:first + 5],
                                                                                               rel=1e-3)
    resumed = launch("killed", "--resume")
    assert "seconds: " in resumed.communicate(timeout=200)[0] and resumed.returncode == 0
    got, want = contents("killed"), contents("whole")
    assert set(got) == set(want) and [name for name in want if got[name] != want[name]] == []


def ranks_of(out):
    """Processes whose command line has --out `out`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{pid}/cmdline").read().split("\0")
        except OSError:
            continue
        if any(pair == ("--out", out) for pair in zip(words, words[1:])):
            found.append(int(pid))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# the real path


@pytest.mark.pictures
def test_a_real_checkpoint_a_real_judge_and_real_prompts(llama3, pairrm, prompts_file):
    """Llama-3-like model, PairRM, instructions: the flags of a 7B run with small numbers."""
    seeds = os.path.join(ROOT, "..", "shared", "data", "prompts", "self_instruct_seed.jsonl")
    prompts = seeds if os.path.exists(seeds) else prompts_file
    if prompts == seeds:  # the tiny context does not hold the longest
        with open("short.jsonl", "w") as file:
            file.writelines(line for line in open(seeds) if len(line) < 400)
        prompts = "short.jsonl"
    sppo.main(argv(model=llama3, judge=f"pairrm:{pairrm}", prompts=prompts, out="real", iterations=1,
                   prompts_per_iteration=12, k=3, batch_size=6, micro_batch=2,
                   validation_prompts=8, test_prompts=10, max_new_tokens=16, max_prompt_tokens=0, lr=1e-4,
                   device="cpu"))
    summary = json.load(open("real/summary.json"))
    assert [e["name"] for e in summary["evaluations"]] == ["base", "base, greedy", "iteration 1"]
    for e in summary["evaluations"]:
        assert e["accuracy_greedy"] is None and e["accuracy_sampled"] is None and 0 <= e["win_rate"] <= 1
        assert 0 < e["mean_length"] <= 16
    assert summary["evaluations"][0]["win_rate_greedy"] == 0.5 and summary["settings"]["optimizer"] == "rmsprop"
    assert summary["settings"]["eta"] == 1e3
    samples = lines("real/samples.jsonl")
    given = {p for p in read_prompts(prompts)}
    assert len(samples) == 12
    assert all(row["prompt"] in given and len(row["responses"]) == 3 and "<|" not in "".join(row["responses"])
               for row in samples)
    first = lines("real/metrics.jsonl")[0]
    assert abs(first["logratio_w"]) < 1e-3 and first["loss"] > 100 and first["phat_best"] > 0.5 > first["phat_worst"]
    with open("real/curves.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    theirs = transformers.AutoModelForCausalLM.from_pretrained("real/iter-1", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("real/iter-1")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=False)
    ours = model.Transformer.from_pretrained("real/iter-1")
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=0)
    assert theirs.generation_config.eos_token_id == [1, 4] and ids[0].tolist().count(0) == 1
