"""prefmodel.py: preference matrices by hand, PairRM against transformers' DebertaV2Model one pair at a time, reward
models against transformers' own classifiers one row at a time, bad input.

The checkpoints are random and tiny, with weights large enough that a wrong mask, seat or marker moves the logits
by far more than the tolerances: a test that swaps any of these fails.
"""

import doctest
import fnmatch
import json
import math
import os
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import DebertaV2Config, DebertaV2Model

import files
import kernels
import pairrm
import prefmodel
import run
import world
from run import UserError
from table import answer_texts, read_table, verdict_columns

MARKERS = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
WORDS = 20  # the word "w7" has id 7 + 4; "1" has id 24
CLS, SEP, SRC, C1, C2 = 1, 2, 41, 42, 43  # the roles' ids in PairRM-hf's config; its tokenizer.json has others on purpose
CONFIG = dict(model_type="deberta-v2", vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
              intermediate_size=48, max_position_embeddings=32, relative_attention=True, position_buckets=8,
              norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
              type_vocab_size=0, pad_token_id=0, layer_norm_eps=1e-7, initializer_range=0.3)
HF_KEYS = dict(n_tasks=1, drop_out=0.05, source_prefix_id=SRC, cand1_prefix_id=C1, cand2_prefix_id=C2, cand_prefix_id=44)
RANKER = dict(ranker_type="pairranker", model_type="deberta", source_maxlength=1224, candidate_maxlength=412, n_tasks=1,
              reduce_type="linear", fp16=True)


def write_tokenizer(directory, markers):
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"] + [f"▁w{k}" for k in range(WORDS)] + ["▁1"]
    tokenizer = Tokenizer(models.Unigram([(word, 0.0) for word in words], unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    tokenizer.add_special_tokens(words[:4])
    tokenizer.add_tokens(markers)
    tokenizer.save(f"{directory}/tokenizer.json")
    with open(f"{directory}/tokenizer_config.json", "w") as file:
        json.dump({"tokenizer_class": "DebertaV2Tokenizer", "sep_token": "[SEP]", "cls_token": "[CLS]",
                   "pad_token": "[PAD]", "unk_token": "[UNK]"}, file)


def write_json(path, value):
    with open(path, "w") as file:
        json.dump(value, file)


def reference_net(vocab_size=48, n_tasks=1):
    """Encoder and head weights, made here and kept for the independent computation."""
    torch.manual_seed(0)
    encoder = DebertaV2Model(DebertaV2Config(**{**CONFIG, "vocab_size": vocab_size})).eval()
    H = CONFIG["hidden_size"]
    head = {"head_layer.1.weight": torch.randn(H, 2 * H) / 4, "head_layer.1.bias": torch.randn(H),
            "head_layer.4.weight": torch.randn(n_tasks, H), "head_layer.4.bias": torch.randn(n_tasks)}
    return encoder, head


def write_weights(directory, encoder, head, kind="safetensors", change=lambda weights: None):
    weights = {f"pretrained_model.{key}": value.clone() for key, value in encoder.state_dict().items()} | head
    change(weights)
    if kind == "safetensors":
        save_file(weights, f"{directory}/model.safetensors")
    else:
        torch.save(weights, f"{directory}/pytorch_model.bin")


def hf_checkpoint(directory, kind="safetensors", n_tasks=1, **options):
    """The layout of llm-blender/PairRM-hf: one directory. Returns what the independent computation needs."""
    directory.mkdir()
    encoder, head = reference_net(n_tasks=n_tasks)
    write_json(f"{directory}/config.json", {**CONFIG, **HF_KEYS, "n_tasks": n_tasks})
    write_tokenizer(directory, MARKERS)
    write_weights(directory, encoder, head, kind, **options)
    return encoder, head, (SRC, C1, C2)


def ranker_checkpoint(directory, kind="bin", own_tokenizer=False, model_name=None):
    """The layout of llm-blender/PairRM: the ranker's config and weights, the rest in a backbone's directory beside it.

    Here the markers get their ids from being added to the backbone's tokenizer: 25, 26, 27, 28 after its 25 tokens.
    """
    directory.mkdir()
    backbone = directory.parent / "backbone"
    backbone.mkdir()
    encoder, head = reference_net(vocab_size=29)
    write_json(f"{directory}/config.json", {**RANKER, "model_name": model_name or str(backbone)})
    write_json(f"{backbone}/config.json", {**CONFIG, "vocab_size": 64})  # as published: the ranker resized the table
    write_tokenizer(directory if own_tokenizer else backbone, [])
    write_weights(directory, encoder, head, kind)
    return encoder, head, (25, 26, 27)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """(directory, a PairRM of it, what the independent computation needs)."""
    directory = tmp_path_factory.mktemp("judge") / "pairrm-hf"
    reference = hf_checkpoint(directory)
    return directory, prefmodel.PairRM(str(directory)), reference


def words(*ks):
    return " ".join(f"w{k}" for k in ks)


def ids(cls_marker, *ks):
    return [CLS, cls_marker, *(k + 4 for k in ks), SEP]


@torch.no_grad()
def alone(reference, source, left, right):
    """The logit of one unpadded pair (tuples of word numbers), straight from DebertaV2Model; role ids are looked up."""
    encoder, head, roles = reference
    row = ids(roles[0], *source) + ids(roles[1], *left) + ids(roles[2], *right)
    hidden = encoder(torch.tensor([row])).last_hidden_state[0]
    at = [hidden[row.index(role)] for role in roles]
    scores = [head["head_layer.4.weight"] @ torch.tanh(head["head_layer.1.weight"] @ torch.cat([at[0], at[seat]])
              + head["head_layer.1.bias"]) + head["head_layer.4.bias"] for seat in (1, 2)]
    return (scores[0] - scores[1]).mean().item()


# ragged on purpose: three prompts, K = 3, lengths 1 to 14; the second prompt repeats a response
SOURCES = [(1, 2, 3), (4,), (5, 6, 7, 8, 9, 10, 11)]
CANDIDATES = [[(1,), (2, 3), (4, 5, 6)], [(7, 8), (7, 8), (9,)], [tuple(range(14)), (3,), (12, 0)]]
PROMPTS = [words(*s) for s in SOURCES]
RESPONSES = [[words(*c) for c in row] for row in CANDIDATES]


def expected(reference):
    M = torch.zeros(3, 3, 3)
    for b in range(3):
        for i in range(3):
            for j in range(3):
                if i != j:
                    M[b, i, j] = alone(reference, SOURCES[b], CANDIDATES[b][i], CANDIDATES[b][j])
    return M


# ---------------------------------------------------------------------------------------------------------------------
# matrices


def test_docstring_examples():
    result = doctest.testmod(prefmodel)
    assert result.attempted >= 5 and result.failed == 0


# 0 beats 1 beats 2 beats 0, and the left seat is worth 1
CYCLE = torch.tensor([[0.0, 3.0, -1.0], [-1.0, 0.0, 3.0], [3.0, -1.0, 0.0]])


def test_pairwise_keeps_a_cycle_and_aggregate_loses_it():
    p = 1 / (1 + torch.exp(torch.tensor(-2.0)))  # (3 - -1) / 2 = 2
    torch.testing.assert_close(prefmodel.pairwise_preference(CYCLE),
                               torch.tensor([[0.5, p, 1 - p], [1 - p, 0.5, p], [p, 1 - p, 0.5]]))
    assert torch.equal(pairrm.aggregate_preference(CYCLE), torch.full((3, 3), 0.5))


def test_where_M_is_additive_the_aggregate_logit_is_twice_the_pairwise_one():
    a = torch.tensor([0.3, -0.5, 1.1, 0.0])
    M = a[:, None] - a[None, :]
    torch.testing.assert_close(prefmodel.pairwise_preference(M).logit(), M)
    torch.testing.assert_close(pairrm.aggregate_preference(M).logit(), 2 * M)


def test_aggregate_by_hand():
    M = torch.tensor([[0.0, 4.0], [1.0, 0.0]])  # s_0 = (0 + 3) / 2, s_1 = (-3 + 0) / 2
    assert pairrm.aggregate_preference(M)[0, 1].logit().item() == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize("estimator", [prefmodel.pairwise_preference, pairrm.aggregate_preference,
                                       lambda M: prefmodel.bradley_terry(M[..., 0], scale=6.0)])
def test_every_estimator_is_a_constant_sum_game(estimator):
    M = 8 * torch.randn(50, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    P = estimator(M)
    assert P.shape == (50, 5, 5) and P.dtype == torch.float32
    assert torch.equal(P.diagonal(dim1=-2, dim2=-1), torch.full((50, 5), 0.5))
    assert (P + P.mT - 1).abs().max() < 2e-7


def test_bradley_terry_is_transitive_and_scaled():
    P = prefmodel.bradley_terry(torch.tensor([[1.0, 0.5, 0.0]]), scale=6.0)
    torch.testing.assert_close(P[0].logit(), torch.tensor([[0.0, 3.0, 6.0], [-3.0, 0.0, 3.0], [-6.0, -3.0, 0.0]]),
                               atol=1e-4, rtol=0)


def test_phat_counts_the_comparison_with_itself():
    P = torch.tensor([[[0.5, 0.9], [0.1, 0.5]], [[0.5, 0.2], [0.8, 0.5]]])
    torch.testing.assert_close(kernels.phat(P), torch.tensor([[0.7, 0.3], [0.35, 0.65]]))


# ---------------------------------------------------------------------------------------------------------------------
# the oracle


def test_oracle():
    judge = prefmodel.load("oracle")
    prompts, responses = ["sort then reverse:dbca", "sort then:"], [["dcba", "abcd"], ["dcba", "x"]]
    reward = judge.reward(prompts, responses)
    assert judge.name == "oracle" and reward.shape == (2, 2) and reward.dtype == torch.float32
    assert reward[0, 0] == 1 and reward[0, 1] <= 0.5 and (reward[1] == 0).all()
    P = judge.preference(prompts, responses)
    assert P[0, 0, 1].item() == pytest.approx(1 / (1 + 2.718281828 ** (-6 * (1 - reward[0, 1].item()))), abs=1e-6)
    assert torch.equal(P[1], torch.full((2, 2), 0.5))


def test_styles_judge():
    """world.STYLES among answers with a style; without one an answer loses to all that have one and ties its like."""
    judge = prefmodel.load("styles")
    answers = ["ab0", "c1", "hfa2", "hfa", "", "b1"]
    P = judge.preference(["sort:ba", "copy:aa"], [answers, answers[::-1]])
    want = torch.full((6, 6), 0.5)
    want[:3, :3] = torch.tensor(world.STYLES)
    want[5, :3], want[:3, 5] = want[1, :3], want[:3, 1]
    want[[0, 1, 2, 5], 3:5], want[3:5, [0, 1, 2, 5]] = 1.0, 0.0
    want[3:5, 5], want[5, 3:5] = 0.0, 1.0
    want[1, 5] = want[5, 1] = 0.5
    assert judge.name == "styles" and P.dtype == torch.float32
    assert torch.equal(P[0], want) and torch.equal(P[1], want.flip(0, 1)) and torch.equal(P + P.mT, torch.ones(2, 6, 6))
    assert judge.preference([], []).shape == (0, 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# the table


def conversations(*texts, prompt="q"):
    return {f"generate_{k}": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            for k, text in enumerate(texts)}


def test_verdict_columns_by_hand():
    """Phat 1.6/3, 1.2/3, 1.7/3: the third is chosen, the second rejected; of a tie both are the first."""
    row = conversations("a", "b", "c")
    v = verdict_columns(row, torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.6], [0.8, 0.4, 0.5]]))
    assert v["chosen"] == row["generate_2"] and v["rejected"] == row["generate_1"]
    assert [v["chosen_probs"], v["chosen_probs_win"], v["chosen_probs_lose"]] == pytest.approx([0.4, 1.7 / 3, 1.2 / 3])
    assert v["rm_scores"][2] == pytest.approx((math.log(4) + math.log(2 / 3)) / 3, abs=1e-5)
    v = verdict_columns(row, torch.full((3, 3), 0.5))
    assert v["chosen"] == v["rejected"] == row["generate_0"] and v["rm_scores"] == [0, 0, 0]


def test_rm_scores_are_the_official_ones_under_the_aggregate_estimator(hf):
    """mean_j (M_ij - M_ji) of the raw logits, which the official code ranks by. float32's preferences leave a few
    digits of a score."""
    prompts, responses = [words(*s) for s in SOURCES], [[words(*c) for c in row] for row in CANDIDATES]
    M = hf[1].logits(prompts, responses)
    scores = (M - M.mT).mean(-1)
    assert 1 < scores.abs().max() < 6       # spreads up to 12: further apart than 13.8 the preference rounds to 1
    for m, want in zip(M, scores):
        got = verdict_columns(conversations("a", "b", "c"), pairrm.aggregate_preference(m))["rm_scores"]
        assert got == pytest.approx(want.tolist(), abs=2e-2)
        assert sorted(range(3), key=got.__getitem__) == want.argsort(stable=True).tolist()


def test_a_table_comes_back_as_it_was_written(tmp_path):
    path = str(tmp_path / "table.jsonl")
    rows = [{"prompt": p, **conversations("a", "None\n\nb", prompt=p), "prompt_ids": [4],
             "tokens": [[1], [2, 3]], "finish": ["stop", "length"]} for p in ("é \u2028 0", "é \u2028 1")]
    files.write_rows(path, rows)
    assert read_table(path) == rows and answer_texts(rows[0]) == ["a", "None\n\nb"]
    judged = [row | verdict_columns(row, torch.tensor([[0.5, 0.75], [0.25, 0.5]])) for row in rows]
    files.write_rows(path, judged)
    assert read_table(path, judged=True) == judged == read_table(path)


def test_tables_of_other_tools(tmp_path):
    """Answers as plain text; no prompt beside the conversations; Phats as stored, though the matrix says otherwise."""
    path = str(tmp_path / "table.jsonl")
    files.write_rows(path, [{"prompt": "q", "generate_0": "a", "generate_1": "b"}])
    assert read_table(path) == [{"prompt": "q", **conversations("a", "b")}]
    files.write_rows(path, [conversations("a", "b") | {"probability": [[0.5, 0.25], [0.75, 0.5]]}])
    row, = read_table(path, judged=True)
    assert row["prompt"] == "q" and row["chosen"] == row["generate_1"] and row["chosen_probs_win"] == 0.625
    talks = conversations("a", "b")
    files.write_rows(path, [{"chosen": talks["generate_0"], "rejected": talks["generate_1"],
                                  "chosen_probs_win": 1, "chosen_probs_lose": 0}])
    row, = read_table(path, judged=True)
    assert row["prompt"] == "q" and (row["chosen_probs_win"], row["chosen_probs_lose"]) == (1, 0)


# ---------------------------------------------------------------------------------------------------------------------
# PairRM against DebertaV2Model


@pytest.mark.parametrize("layout", ["hf safetensors", "hf bin", "hf two tasks", "ranker bin", "ranker safetensors",
                                    "ranker own tokenizer"])
def test_logits_equal_an_independent_forward_of_each_pair(tmp_path, layout):
    directory = tmp_path / "judge"
    if layout.startswith("hf"):
        reference = hf_checkpoint(directory, "bin" if "bin" in layout else "safetensors", 2 if "two" in layout else 1)
    else:
        reference = ranker_checkpoint(directory, "bin" if "bin" in layout else "safetensors", "own" in layout)
    judge = prefmodel.load(f"pairrm:{directory}")
    M, want = judge.logits(PROMPTS, RESPONSES), expected(reference)
    assert M.dtype == torch.float32 and M.device.type == "cpu" and judge.name == f"pairrm:{directory}"
    assert not M.is_inference()  # a loss may be built on it
    assert torch.equal(M.diagonal(dim1=-2, dim2=-1), torch.zeros(3, 3))
    torch.testing.assert_close(M, want, atol=1e-5, rtol=0)
    assert (want + want.mT).abs().max() > 0.1  # the seats matter: reading one order only would be wrong
    P = judge.preference(PROMPTS, RESPONSES)
    torch.testing.assert_close(P, torch.sigmoid((want - want.mT) / 2), atol=1e-5, rtol=0)
    assert (P + P.mT - 1).abs().max() < 2e-7


def test_batches_do_not_change_a_logit(hf):
    _, judge, _ = hf
    together = judge.logits(PROMPTS, RESPONSES)  # every pair in one padded batch
    one_by_one = prefmodel.PairRM(str(hf[0]), batch_tokens=1).logits(PROMPTS, RESPONSES)
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=0)
    alone_again = judge.logits(PROMPTS[2:], [RESPONSES[2][1:]])
    torch.testing.assert_close(together[2:, 1:, 1:], alone_again, atol=1e-5, rtol=0)


def test_batches_stay_within_the_budget_and_longest_first(hf, monkeypatch):
    sizes = []
    judge = prefmodel.PairRM(str(hf[0]), batch_tokens=60)
    forward = judge.net["pretrained_model"].forward
    monkeypatch.setattr(judge.net["pretrained_model"], "forward",
                        lambda input_ids, **rest: sizes.append(tuple(input_ids.shape)) or forward(input_ids, **rest))
    judge.logits(PROMPTS, RESPONSES)
    assert all(rows * T <= 60 or rows == 1 for rows, T in sizes) and len(sizes) < sum(rows for rows, _ in sizes)
    assert [T for _, T in sizes] == sorted((T for _, T in sizes), reverse=True)
    assert sum(rows for rows, _ in sizes) == 6 + 3 + 6  # the second prompt's two equal responses count once


def test_estimator_is_the_one_asked_for(hf):
    directory, judge, _ = hf
    M = judge.logits(PROMPTS, RESPONSES)
    aggregate = prefmodel.load(f"pairrm:{directory}", estimator="aggregate").preference(PROMPTS, RESPONSES)
    torch.testing.assert_close(aggregate, pairrm.aggregate_preference(M))
    assert (aggregate - judge.preference(PROMPTS, RESPONSES)).abs().max() > 0.01


def test_bfloat16_encoder_float32_head(hf):
    directory, judge, _ = hf
    half = prefmodel.PairRM(str(directory), dtype=torch.bfloat16)
    assert half.net["pretrained_model"].embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert half.net["head_layer"][1].weight.dtype == torch.float32
    M = half.logits(PROMPTS, RESPONSES)
    assert M.dtype == torch.float32 and 0 < (M - judge.logits(PROMPTS, RESPONSES)).abs().max() < 0.5


def test_one_response_or_no_prompt(hf):
    _, judge, _ = hf
    assert judge.preference(["w1"], [["w2"]]).tolist() == [[[0.5]]]
    assert judge.preference([], []).shape == (0, 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# ids: markers, truncation, special tokens in texts


def short(hf, **lengths):
    return prefmodel.PairRM(str(hf[0]), **lengths)


def test_a_pair_that_fits_is_not_cut(hf):
    assert hf[1].pair_ids("w1 w2", "w3", "w5 w6") == ids(SRC, 1, 2) + ids(C1, 3) + ids(C2, 5, 6)
    assert hf[1].pair_ids("w1", "", "w2") == ids(SRC, 1) + ids(C1) + ids(C2, 2)


def test_short_source_leaves_its_room_to_long_candidates(hf):
    judge = short(hf, max_source=8, max_candidate=5)  # 18 in all; the source takes 5, so (18 - 5) // 2 = 6 each
    got = judge.pair_ids(words(1, 2), words(*range(3, 13)), words(*range(10)))
    assert got == ids(SRC, 1, 2) + ids(C1, 3, 4, 5) + ids(C2, 0, 1, 2)
    assert len(got) == 17


def test_long_source_is_cut_on_the_right_and_keeps_its_sep(hf):
    judge = short(hf, max_source=8, max_candidate=5)
    got = judge.pair_ids(words(*range(12)), words(1, 2), words(3))  # (18 - 8) // 2 = 5: two words fit exactly
    assert got == ids(SRC, 0, 1, 2, 3, 4) + ids(C1, 1, 2) + ids(C2, 3)


def test_all_long(hf):
    judge = short(hf, max_source=8, max_candidate=5)
    got = judge.pair_ids(words(*range(12)), words(*range(6)), words(*range(6, 16)))
    assert got == ids(SRC, 0, 1, 2, 3, 4) + ids(C1, 0, 1) + ids(C2, 6, 7)
    assert len(got) == 18


def test_the_total_can_be_set_by_itself(hf):
    got = short(hf, max_source=8, max_tokens=15).pair_ids(words(1), words(*range(9)), words(*range(9)))  # (15 - 4) // 2
    assert got == ids(SRC, 1) + ids(C1, 0, 1) + ids(C2, 0, 1)


def test_cut_pairs_are_scored_as_cut(hf):
    M = short(hf, max_source=8, max_candidate=5).logits([words(*range(12))], [[words(*range(6)), words(*range(6, 16))]])
    want = alone(hf[2], range(5), (0, 1), (6, 7)), alone(hf[2], range(5), (6, 7), (0, 1))
    torch.testing.assert_close(M, torch.tensor([[[0, want[0]], [want[1], 0]]]), atol=1e-5, rtol=0)


def test_lengths_of_the_published_models(tmp_path):
    hf_checkpoint(tmp_path / "hf")
    judge = prefmodel.PairRM(str(tmp_path / "hf"))
    got = judge.pair_ids("w1 " * 3000, "w2 " * 3000, "w3 " * 3000)
    assert len(got) == 2048 and [got.index(role) for role in (SRC, C1, C2)] == [1, 1224 + 1, 1224 + 412 + 1]
    ranker_checkpoint(tmp_path / "ranker")
    settings = json.loads((tmp_path / "ranker/config.json").read_text())
    write_json(tmp_path / "ranker/config.json", settings | {"source_maxlength": 20, "candidate_maxlength": 7})
    got = prefmodel.PairRM(str(tmp_path / "ranker")).pair_ids("w1 " * 30, "w2 " * 30, "w3 " * 30)
    assert [got.index(role) for role in (25, 26, 27)] == [1, 21, 28] and len(got) == 34


def test_special_tokens_inside_a_text_become_spaces(hf):
    plain = hf[1].pair_ids("w1 w2", "w3 w4", "w5 w6")
    assert hf[1].pair_ids("w1[SEP]w2", "w3[SEP] w4", "w5 [SEP] w6").count(SEP) == 3
    assert hf[1].pair_ids("w1[SEP]w2", "w3<|candidate2|>w4", "w5<|candidate|>w6") == plain
    assert hf[1].pair_ids("w1<|source|>w2", "w3<|candidate1|>w4", "w5[SEP]w6") == plain


def test_the_stored_normaliser_is_used(hf):
    """AutoTokenizer of transformers 5 puts NFC in place of this file's NFKC, and the circled one would become [UNK]."""
    assert hf[1].pair_ids("①", "w1", "w2")[2] == 4 + WORDS


# ---------------------------------------------------------------------------------------------------------------------
# the hub, and bad input


def test_the_hub_is_asked_for_the_small_files_and_one_weight_file(tmp_path, monkeypatch):
    reference = ranker_checkpoint(tmp_path / "judge", "bin", model_name="some/backbone")
    write_weights(tmp_path / "judge", *reference[:2])  # safetensors beside it
    torch.save({}, tmp_path / "backbone/pytorch_model.bin")

    def snapshot_download(name, allow_patterns, **options):
        copy = tmp_path / "cache" / name
        copy.mkdir(parents=True, exist_ok=True)
        for file in os.listdir(tmp_path / name.split("/")[1]):
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                shutil.copy(tmp_path / name.split("/")[1] / file, copy)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    M = prefmodel.load("pairrm:some/judge").logits(PROMPTS, RESPONSES)
    torch.testing.assert_close(M, expected(reference), atol=1e-5, rtol=0)
    cache = tmp_path / "cache/some"
    assert sorted(os.listdir(cache / "judge")) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(cache / "backbone")) == ["config.json", "tokenizer.json", "tokenizer_config.json"]


def complaint(spec, **options):
    with pytest.raises(UserError) as error:
        prefmodel.load(spec, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def test_unknown_judges(hf):
    for spec in ("gpt", "", "pairrm", "pairrm:", "reward", "reward:", "oracle:x"):
        assert all(word in complaint(spec) for word in ("--judge", "pairrm:DIR", "reward:DIR", "oracle, styles"))
    assert "pairwise, aggregate" in complaint("oracle", estimator="mean")


def test_missing_directory_and_unreachable_hub(tmp_path):
    assert str(tmp_path / "nowhere") in complaint(f"pairrm:{tmp_path / 'nowhere'}")
    assert "nobody/no-such-judge" in complaint("pairrm:nobody/no-such-judge")
    ranker_checkpoint(tmp_path / "judge", model_name="nobody/no-such-backbone")
    assert "nobody/no-such-backbone" in complaint(f"pairrm:{tmp_path / 'judge'}")


def test_unknown_layouts(tmp_path):
    directory = tmp_path / "judge"
    hf_checkpoint(directory)
    for config in (CONFIG, {**RANKER, "ranker_type": "summareranker", "model_name": "x/y"},
                   {**CONFIG, **HF_KEYS, "model_type": "llama"}):
        write_json(directory / "config.json", config)
        assert f"{directory}/config.json" in complaint(f"pairrm:{directory}")
    for text in ('{"model_type": ', "[1, 2]", "7"):
        (directory / "config.json").write_text(text)
        assert f"{directory}/config.json" in complaint(f"pairrm:{directory}")
    (directory / "config.json").unlink()
    assert f"{directory}/config.json" in complaint(f"pairrm:{directory}")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("change, says", [
    (lambda weights: weights.pop("head_layer.4.weight"), "lacks the weight head_layer.4.weight"),
    (lambda weights: weights.pop("pretrained_model.encoder.layer.1.output.dense.bias"), "lacks the weight"),
    (lambda weights: weights.update({"head_layer.1.bias": torch.zeros(31)}), "of shape [31]"),
    (lambda weights: weights.update({"pretrained_model.embeddings.word_embeddings.weight": torch.zeros(47, 32)}),
     "[47, 32]"),
    (lambda weights: weights.update({"single_head_layer.1.weight": torch.zeros(1)}), "single_head_layer.1.weight"),
])
def test_weights_that_do_not_fit(tmp_path, kind, change, says):
    hf_checkpoint(tmp_path / "judge", kind, change=change)
    message = complaint(f"pairrm:{tmp_path / 'judge'}")
    assert says in message and str(tmp_path / "judge") in message


def test_a_stored_position_buffer_is_no_error(tmp_path):
    """transformers before 4.31 saved this arange; a checkpoint that has it is whole."""
    hf_checkpoint(tmp_path / "judge", change=lambda weights: weights.update(
        {"pretrained_model.embeddings.position_ids": torch.arange(32)[None]}))
    assert prefmodel.load(f"pairrm:{tmp_path / 'judge'}").logits(["w1"], [["w2", "w3"]]).abs().max() > 0


@pytest.mark.parametrize("kind, name", [("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")])
def test_truncated_or_missing_weights(tmp_path, kind, name):
    hf_checkpoint(tmp_path / "judge", kind)
    file = tmp_path / "judge" / name
    os.truncate(file, os.path.getsize(file) // 2)
    assert str(file) in complaint(f"pairrm:{tmp_path / 'judge'}")
    file.unlink()
    message = complaint(f"pairrm:{tmp_path / 'judge'}")
    assert str(tmp_path / "judge") in message and name in message


def test_weights_that_would_run_code_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    hf_checkpoint(tmp_path / "judge", "bin")
    torch.save({"head_layer.1.bias": Trap()}, tmp_path / "judge/pytorch_model.bin")
    assert "pytorch_model.bin" in complaint(f"pairrm:{tmp_path / 'judge'}")
    assert not (tmp_path / "trapped").exists()


def test_tokenizers_that_do_not_fit(tmp_path):
    directory = tmp_path / "judge"
    hf_checkpoint(directory)
    write_tokenizer(directory, MARKERS + [f"extra{k}" for k in range(20)])  # 49 tokens, 48 embeddings
    assert "embeddings" in complaint(f"pairrm:{directory}")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "w1": 1}, unk_token="[UNK]"))
    tokenizer.save(f"{directory}/tokenizer.json")  # no [CLS], no [SEP]
    assert "[CLS]" in complaint(f"pairrm:{directory}")
    (directory / "tokenizer.json").write_text("{")
    assert str(directory) in complaint(f"pairrm:{directory}")


def test_logits_that_are_not_finite_are_refused(tmp_path):
    hf_checkpoint(tmp_path / "judge")
    judge = prefmodel.PairRM(str(tmp_path / "judge"))
    judge.net["head_layer"][4].weight.fill_(float("inf"))
    with pytest.raises(UserError, match="not finite"):
        judge.preference(["w1"], [["w2", "w3"]])


def test_lists_that_do_not_fit_together(hf):
    for judge in (hf[1], prefmodel.load("oracle")):
        for prompts, responses in ((["w1"], []), (["w1", "w2"], [["w1", "w2"], ["w3"]]), (["w1"], [[]])):
            with pytest.raises(ValueError, match="one K for all"):
                judge.preference(prompts, responses)


def test_no_room_for_a_pair(hf):
    for lengths in ({"max_source": 2}, {"max_source": 8, "max_tokens": 13}):
        with pytest.raises(ValueError, match="no room"):
            short(hf, **lengths)


# ---------------------------------------------------------------------------------------------------------------------
# reward models against transformers' classifiers

SMALL = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=12, max_position_embeddings=512, initializer_range=0.2, num_labels=1, pad_token_id=None)
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}
FAMILIES = {"llama": dict(rope_parameters=ROPE), "mistral": dict(sliding_window=8), "qwen2": {}, "qwen3": {},
            "gemma2": dict(sliding_window=8, query_pre_attn_scalar=12, attn_logit_softcapping=2.0)}
QUESTIONS = ["Name a prime.", "Why does ice float?\n"]
ANSWERS = [["7", "It is seven, and so is eleven.", ""], ["Water is denser.", "7", "Water is denser."]]


def decoder_checkpoint(directory, llama3, family="llama", shard="5GB", **settings):
    """A random classifier of a family, with the tokenizer of `llama3`. Returns the network, kept for the comparison."""
    shutil.copytree(llama3, directory, ignore=shutil.ignore_patterns("model*", "config.json", "generation*"))
    size = len(transformers.AutoTokenizer.from_pretrained(llama3))
    torch.manual_seed(1)
    config = {"vocab_size": size, **SMALL, **FAMILIES[family], **settings}
    config = transformers.AutoConfig.for_model(family, **config)
    net = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    net.save_pretrained(directory, max_shard_size=shard)
    return net


def deberta_checkpoint(directory, **settings):
    directory.mkdir()
    write_tokenizer(directory, [])
    torch.manual_seed(1)
    config = {**CONFIG, "num_labels": 1, "pooler_hidden_size": 32, **settings}
    net = transformers.DebertaV2ForSequenceClassification(DebertaV2Config(**config)).eval()
    net.save_pretrained(directory)
    return net


@torch.no_grad()
def rewards_one_by_one(net, rows):
    """transformers' own forward of single unpadded rows of ids."""
    return torch.tensor([net(torch.tensor([row])).logits.item() for row in rows])


def chat_ids(directory, question, answer):
    """The row of Llama 3's template, written out here and encoded without the tokenizer class."""
    text = (f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{question.strip()}<|eot_id|>"
            f"<|start_header_id|>assistant<|end_header_id|>\n\n{answer.strip()}<|eot_id|>")
    return Tokenizer.from_file(f"{directory}/tokenizer.json").encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def skywork(tmp_path_factory, llama3):
    """(directory, a RewardModel of it, transformers' network) like Skywork-Reward-V2-Llama."""
    directory = tmp_path_factory.mktemp("reward") / "skywork"
    net = decoder_checkpoint(directory, llama3)
    return directory, prefmodel.load(f"reward:{directory}"), net


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_rewards_equal_transformers_row_by_row(tmp_path, llama3, family):
    net = decoder_checkpoint(tmp_path / "r", llama3, family, shard="50KB")
    assert len([name for name in os.listdir(tmp_path / "r") if name.startswith("model-")]) > 1
    judge = prefmodel.load(f"reward:{tmp_path / 'r'}")
    got = judge.reward(QUESTIONS, ANSWERS)
    want = rewards_one_by_one(net, [chat_ids(tmp_path / "r", q, a) for q, row in zip(QUESTIONS, ANSWERS) for a in row])
    assert judge.name == f"reward:{tmp_path / 'r'}" and got.shape == (2, 3) and got.dtype == torch.float32
    assert got.device.type == "cpu" and not got.is_inference() and want.std() > 0.1
    torch.testing.assert_close(got, want.view(2, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_deberta_rewards_equal_transformers_row_by_row(tmp_path, kind):
    net = deberta_checkpoint(tmp_path / "r")
    if kind == "bin":
        os.remove(tmp_path / "r/model.safetensors")
        torch.save(net.state_dict(), tmp_path / "r/pytorch_model.bin")
    rows = [[CLS, *(k + 4 for k in s), SEP, *(k + 4 for k in c), SEP]
            for s, row in zip(SOURCES, CANDIDATES) for c in row]
    got, want = prefmodel.load(f"reward:{tmp_path / 'r'}").reward(PROMPTS, RESPONSES), rewards_one_by_one(net, rows)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want.view(3, 3), rtol=1e-4, atol=1e-5)
    assert prefmodel.RewardModel(str(tmp_path / "r")).row_ids("①", "w1") == [CLS, 4 + WORDS, SEP, 5, SEP]  # as stored


@torch.no_grad()
def test_rewards_equal_transformers_padded_left_and_right(skywork):
    directory, judge, net = skywork
    rows = [chat_ids(directory, q, a) for q, row in zip(QUESTIONS, ANSWERS) for a in row]
    T, got = max(map(len, rows)), judge.reward(QUESTIONS, ANSWERS).flatten()
    net.config.pad_token_id = 1
    for left in (True, False):
        pads = [[1] * (T - len(row)) for row in rows]
        ids = torch.tensor([pad + row if left else row + pad for pad, row in zip(pads, rows)])
        want = net(ids, attention_mask=(ids != 1).long()).logits[:, 0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    net.config.pad_token_id = None


def test_reward_batches_stay_within_the_budget_and_change_nothing(skywork, monkeypatch):
    directory, judge, _ = skywork
    judge = prefmodel.RewardModel(str(directory), batch_tokens=120)
    sizes, forward = [], judge.net.model.forward
    monkeypatch.setattr(judge.net.model, "forward",
                        lambda input_ids, **rest: sizes.append(tuple(input_ids.shape)) or forward(input_ids, **rest))
    got = judge.reward(QUESTIONS, ANSWERS)
    assert sum(rows for rows, _ in sizes) == 5                         # the equal answers to the second are read once
    assert all(rows * T <= 120 for rows, T in sizes) and 1 < len(sizes) < 5 and got[1, 0] == got[1, 2]
    sizes.clear()
    assert judge.reward(["q"], [["7", "7\n", "x"]])[0, :2].unique().numel() == 1    # one row once trimmed
    assert sum(rows for rows, _ in sizes) == 2
    for other in (skywork[1], prefmodel.RewardModel(str(directory), batch_tokens=1)):
        torch.testing.assert_close(other.reward(QUESTIONS, ANSWERS), got, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(judge.reward(QUESTIONS[1:], [["7"]])[0, 0], got[1, 1], rtol=1e-4, atol=1e-5)
    assert judge.net.model(torch.tensor([[1]])).past_key_values is None


def test_reward_ids_are_the_templates_own(skywork):
    directory, judge, _ = skywork
    for q, a in (("Name a prime.", "7"), (" x ", "y\n"), ("q", "")):
        ids = judge.row_ids(q, a)
        assert ids == chat_ids(directory, q, a) and ids.count(0) == 1 and ids[0] == 0
    assert "system" not in judge.tokenizer.decode(ids)


@torch.no_grad()
def test_the_score_is_read_at_the_last_token_even_if_that_is_the_pad_token(tmp_path, llama3):
    """Every turn ends in it; or, with a template that closes no turn, an answer does."""
    seven, = transformers.AutoTokenizer.from_pretrained(llama3).encode("7", add_special_tokens=False)
    for name, pad in (("turn", 4), ("answer", seven)):
        net = decoder_checkpoint(tmp_path / name, llama3, pad_token_id=pad)
        if name == "answer":
            (tmp_path / "answer/chat_template.jinja").write_text(
                "{% for m in messages %}{{ m['content'] }}{% endfor %}")
        judge, answers = prefmodel.RewardModel(str(tmp_path / name)), ["17", "7 or not", "27"]
        rows = [judge.row_ids("q", a) for a in answers]
        assert rows[0][-1] == pad and judge.closing == (name == "turn")
        want = [net.score(net.model(torch.tensor([row])).last_hidden_state[0, -1]).item() for row in rows]
        torch.testing.assert_close(judge.reward(["q"], [answers]), torch.tensor([want]), rtol=1e-4, atol=1e-4)
        assert abs(want[0] - want[2]) > 0.01
    assert judge.tokenizer.decode(rows[2]) == "q27"


def test_bfloat16_reward_models_have_a_float32_head(tmp_path, skywork):
    deberta_checkpoint(tmp_path / "r")
    for directory, questions, answers in ((skywork[0], QUESTIONS, ANSWERS), (tmp_path / "r", PROMPTS, RESPONSES)):
        full = prefmodel.load(f"reward:{directory}").reward(questions, answers)
        half = prefmodel.load(f"reward:{directory}", dtype=torch.bfloat16)
        assert {p.dtype for p in half.net.base_model.parameters()} == {torch.bfloat16}
        got = half.reward(questions, answers)
        assert got.dtype == torch.float32 and 0 < (got - full).abs().max() < 0.1 * full.abs().max()
        assert (got != got.bfloat16().float()).any()                    # more digits than bfloat16 has


def test_rewards_stored_in_bfloat16_are_read(tmp_path, llama3):
    decoder_checkpoint(tmp_path / "r", llama3).bfloat16().save_pretrained(tmp_path / "r")
    assert load_file(tmp_path / "r/model.safetensors")["score.weight"].dtype == torch.bfloat16
    net = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "r", dtype=torch.float32)
    want = rewards_one_by_one(net, [chat_ids(tmp_path / "r", QUESTIONS[0], a) for a in ANSWERS[0]])
    got = prefmodel.load(f"reward:{tmp_path / 'r'}").reward(QUESTIONS[:1], ANSWERS[:1])[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_reward_preference_is_bradley_terry(skywork):
    judge = skywork[1]
    r, P = judge.reward(QUESTIONS, ANSWERS), judge.preference(QUESTIONS, ANSWERS)
    torch.testing.assert_close(P, torch.sigmoid(r[:, :, None] - r[:, None, :]))
    assert torch.equal(P.diagonal(dim1=1, dim2=2), torch.full((2, 3), 0.5)) and (P + P.mT - 1).abs().max() < 2e-7
    assert judge.reward([], []).shape == (0, 0) and judge.preference([], []).shape == (0, 0, 0)
    with pytest.raises(ValueError, match="one K for all"):
        judge.reward(QUESTIONS, ANSWERS[:1])


def test_a_long_answer_is_cut_and_keeps_its_end(tmp_path, llama3):
    decoder_checkpoint(tmp_path / "llama", llama3, max_position_embeddings=80)
    deberta_checkpoint(tmp_path / "deberta", max_position_embeddings=10)
    judge, question, answer = prefmodel.load(f"reward:{tmp_path / 'llama'}"), "Name a prime.", "seven or eleven " * 20
    whole = chat_ids(tmp_path / "llama", question, answer)
    assert len(whole) > 80 and judge.row_ids(question, answer) == whole[:79] + [4]
    assert judge.reward([question], [[answer, answer + "or so", "7"]])[0, :2].unique().numel() == 1
    with pytest.raises(UserError, match="leaves no room for an answer in the 80 positions"):
        judge.reward([answer], [["7", "8"]])
    judge = prefmodel.load(f"reward:{tmp_path / 'deberta'}")
    assert judge.row_ids(words(1, 2, 3), words(*range(9))) == [CLS, 5, 6, 7, SEP, 4, 5, 6, 7, SEP]
    want = judge.tokenizer(words(1, 2, 3), words(*range(9)), truncation="only_second", max_length=10)["input_ids"]
    assert judge.row_ids(words(1, 2, 3), words(*range(9))) == want
    assert judge.row_ids(words(*range(6)), words(7, 8)) == [CLS, *range(4, 10), SEP, 11, SEP]
    with pytest.raises(UserError, match="leaves no room"):
        judge.reward([words(*range(7))], [["w1"]])


# ---------------------------------------------------------------------------------------------------------------------
# reward models: the hub, and bad input


def test_the_hub_is_asked_for_bin_weights_where_there_are_no_safetensors(tmp_path, monkeypatch):
    net, asked = deberta_checkpoint(tmp_path / "r"), []
    (tmp_path / "cache").mkdir()
    torch.save(net.state_dict(), tmp_path / "r/pytorch_model.bin")

    def snapshot_download(name, allow_patterns, **options):
        asked.append(allow_patterns)
        for file in os.listdir(tmp_path / "r"):
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                shutil.copy(tmp_path / "r" / file, tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    prefmodel.load("reward:some/judge")
    assert len(asked) == 1 and not os.path.exists(tmp_path / "cache/pytorch_model.bin")
    os.remove(tmp_path / "r/model.safetensors")
    os.remove(tmp_path / "cache/model.safetensors")
    prefmodel.load("reward:some/judge")
    assert asked[-1] == ["pytorch_model*.bin"]


def test_missing_reward_models(tmp_path, skywork):
    assert str(tmp_path / "nowhere") in complaint(f"reward:{tmp_path / 'nowhere'}")
    assert "nobody/no-such-judge" in complaint("reward:nobody/no-such-judge")
    directory = tmp_path / "r"
    shutil.copytree(skywork[0], directory)
    config = json.loads((directory / "config.json").read_text())
    for change in ({"architectures": ["LlamaForCausalLM"]}, {"architectures": None}, {"model_type": "nothing"}):
        write_json(directory / "config.json", config | change)
        assert str(directory) in complaint(f"reward:{directory}")
    (directory / "config.json").unlink()
    assert f"{directory}/config.json" in complaint(f"reward:{directory}")


def test_other_classifiers_are_refused(tmp_path, llama3):
    decoder_checkpoint(tmp_path / "two", llama3, num_labels=2)
    assert "a reward model with more than one label (2)" in complaint(f"reward:{tmp_path / 'two'}")
    deberta_checkpoint(tmp_path / "types", type_vocab_size=2)
    assert "token types" in complaint(f"reward:{tmp_path / 'types'}")
    transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        num_labels=1)).save_pretrained(tmp_path / "bert")
    assert "BertForSequenceClassification" in complaint(f"reward:{tmp_path / 'bert'}")


def rewrite(directory, change):
    weights = load_file(f"{directory}/model.safetensors")
    change(weights)
    save_file(weights, f"{directory}/model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change, says", [
    (lambda weights: weights.pop("score.weight"), "lack score.weight"),
    (lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"), "lack model.layers.1.self_attn.k_proj"),
    (lambda weights: weights.update({"score.weight": torch.zeros(1, 47)}), "score.weight of shape [1, 47], not [1,"),
    (lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}), "unknown model.layers.2"),
])
def test_reward_weights_that_do_not_fit(tmp_path, skywork, change, says):
    shutil.copytree(skywork[0], tmp_path / "r")
    rewrite(tmp_path / "r", change)
    message = complaint(f"reward:{tmp_path / 'r'}")
    assert says in message and str(tmp_path / "r") in message


def test_a_causal_lm_is_no_reward_model(tmp_path, llama3):
    """Neither as it is, nor with a config that says otherwise: no head is made up."""
    assert "LlamaForCausalLM" in complaint(f"reward:{llama3}")
    shutil.copytree(llama3, tmp_path / "r")
    config = json.loads((tmp_path / "r/config.json").read_text())
    write_json(tmp_path / "r/config.json", config | {"architectures": ["LlamaForSequenceClassification"],
                                                     "id2label": {"0": "LABEL_0"}})
    assert "lack score.weight" in complaint(f"reward:{tmp_path / 'r'}")


def test_a_left_over_language_head_is_no_error(tmp_path, skywork):
    shutil.copytree(skywork[0], tmp_path / "r")
    rewrite(tmp_path / "r", lambda weights: weights.update({"lm_head.weight": torch.zeros(3, 48)}))
    got = prefmodel.load(f"reward:{tmp_path / 'r'}").reward(QUESTIONS, ANSWERS)
    torch.testing.assert_close(got, skywork[1].reward(QUESTIONS, ANSWERS), rtol=1e-4, atol=1e-5)


def test_damaged_reward_weights(tmp_path, llama3, skywork):
    shutil.copytree(skywork[0], tmp_path / "whole")
    os.truncate(tmp_path / "whole/model.safetensors", 5000)
    assert str(tmp_path / "whole") in complaint(f"reward:{tmp_path / 'whole'}")
    os.remove(tmp_path / "whole/model.safetensors")
    assert "no file named" in complaint(f"reward:{tmp_path / 'whole'}")
    decoder_checkpoint(tmp_path / "shards", llama3, shard="50KB")
    os.remove(next((tmp_path / "shards").glob("model-00002*")))
    assert str(tmp_path / "shards") in complaint(f"reward:{tmp_path / 'shards'}")
    net = deberta_checkpoint(tmp_path / "bin")
    os.remove(tmp_path / "bin/model.safetensors")
    torch.save(net.state_dict(), tmp_path / "bin/pytorch_model.bin")
    os.truncate(tmp_path / "bin/pytorch_model.bin", 5000)
    assert str(tmp_path / "bin") in complaint(f"reward:{tmp_path / 'bin'}")


def test_reward_weights_that_would_run_code_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    deberta_checkpoint(tmp_path / "r")
    os.remove(tmp_path / "r/model.safetensors")
    torch.save({"classifier.bias": Trap()}, tmp_path / "r/pytorch_model.bin")
    assert str(tmp_path / "r") in complaint(f"reward:{tmp_path / 'r'}")
    assert not (tmp_path / "trapped").exists()


def test_reward_tokenizers_that_do_not_fit(tmp_path, llama3):
    decoder_checkpoint(tmp_path / "r", llama3)
    template = tmp_path / "r/chat_template.jinja"
    template.write_text("{{ raise_exception('no assistant, please') }}")
    assert "no assistant, please" in complaint(f"reward:{tmp_path / 'r'}")
    template.unlink()
    assert "no chat template" in complaint(f"reward:{tmp_path / 'r'}")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(tmp_path / "r" / file)
    assert str(tmp_path / "r") in complaint(f"reward:{tmp_path / 'r'}")
    decoder_checkpoint(tmp_path / "small", llama3, vocab_size=399)
    assert "399 embeddings" in complaint(f"reward:{tmp_path / 'small'}")
    deberta_checkpoint(tmp_path / "deberta", vocab_size=24)
    assert "24 embeddings" in complaint(f"reward:{tmp_path / 'deberta'}")
    (tmp_path / "deberta/tokenizer.json").write_text("{")
    assert "no tokenizer" in complaint(f"reward:{tmp_path / 'deberta'}")


def test_rewards_that_are_not_finite_are_refused(skywork):
    judge = prefmodel.RewardModel(str(skywork[0]))
    judge.net.score.weight[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        judge.preference(QUESTIONS, ANSWERS)


def test_a_worlds_judge_is_known_however_it_is_spelt():
    """Else it would count as a judge of natural language, and find all answers alike."""
    home = {spec: prefmodel.world_of(spec) for spec in ("oracle", "oracle:operations", "oracle:intransitive", "styles",
                                                        "styles:operations", "pairrm:x", "reward:x", "oracle:nowhere")}
    operations, intransitive = world.WORLDS["operations"], world.WORLDS["intransitive"]
    assert list(home.values()) == [operations, operations, intransitive, intransitive, operations, None, None, None]
    assert [prefmodel.judge_of(name) for name in ("operations", "intransitive")] == ["oracle", "styles"]
