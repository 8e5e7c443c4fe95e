"""What a person gets wrong: exit status 2, one sentence on stderr that names the flag or the file, no traceback, and
nothing half-written in --out. Everything goes through the commands themselves."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import eval
import kernels
import lsp
import model
import pairrm
import run
import sppo
from chat import read_prompts
from conftest import PROMPTS, ROOT
from test_prefmodel import decoder_checkpoint

pytestmark = pytest.mark.usefixtures("elsewhere")

SMALL = ("--iterations 1 --prompts-per-iteration 8 --k 3 --epochs 1 --batch-size 4 --validation-prompts 6 "
         "--test-prompts 6 --max-new-tokens 8 --max-prompt-tokens 0 --device cpu").split()


@pytest.fixture
def complaint(monkeypatch, capsys):
    """complaint(argv) -> the one line on stderr of `python sppo.py argv` (or another script's main), after the checks
    that hold for all."""
    def call(argv, main=sppo.main, out="out"):
        before = tree(out)
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run.main(main)
        error = capsys.readouterr().err
        said = [line for line in error.splitlines() if "error: " in line]
        assert end.value.code == 2 and len(said) == 1 and "Traceback" not in error, error
        assert tree(out) == before  # nothing half-written
        return said[0]
    return call


def tree(directory):
    return {os.path.join(where, name): os.path.getsize(os.path.join(where, name)) for where, _,
            names in os.walk(directory) for name in names}


@pytest.fixture
def real(llama3, pairrm, prompts_file):
    """Flags of a run on `llama3` that works; a later flag overrides an earlier one."""
    return ["--model", llama3, "--judge", f"pairrm:{pairrm}", "--prompts", prompts_file, *SMALL, "--out", "out"]


@pytest.fixture
def tiny(base):
    """Flags of a run on the embedded world that works."""
    return ["--model", base, *SMALL, "--out", "out"]


@pytest.fixture
def broken(llama3):
    """broken(change) -> the directory of a copy of `llama3` after change(directory)."""
    def copy(change):
        shutil.copytree(llama3, "broken")
        change("broken")
        return "broken"
    return copy


def edit(name, **values):
    def change(directory):
        path = os.path.join(directory, name)
        raw = json.load(open(path))
        with open(path, "w") as file:
            json.dump({k: v for k, v in (raw | values).items() if v is not None}, file)
    return change


def weights(change):
    def edited(directory):
        tensors = load_file(f"{directory}/model.safetensors")
        change(tensors)
        save_file(tensors, f"{directory}/model.safetensors", metadata={"format": "pt"})
    return edited


def written(name, text):
    with open(name, "w") as file:
        file.write(text)
    return name


def test_the_flags_used_here_work(tiny, real):
    """Otherwise the tests below might pass for the wrong reason."""
    for flags in (tiny, real):
        sppo.main([*flags, "--overwrite"])
        assert os.path.exists("out/summary.json")


# ---------------------------------------------------------------------------------------------------------------------
# prompts


@pytest.mark.parametrize("name, text, says", [
    ("missing.jsonl", None, "No such file"), ("empty.jsonl", "", "no rows"), ("blank.txt", "\n \n", "no prompts"),
    ("cut.jsonl", '{"prompt": "a"}\n{"prompt": "b\n', "line 2"), ("column.jsonl", '{"query": "a"}\n', "line 1"),
    ("numbers.json", '[{"prompt": 3}]', "entry 1"), ("input.jsonl", '{"instruction": "a", "input": ["b"]}\n',
                                                     "line 1"), ("list.json", "{}", "no prompt found")])
def test_prompts_files(real, complaint, name, text, says):
    if text is not None:
        written(name, text)
    line = complaint([*real, "--prompts", name])
    assert f"--prompts {name}" in line and says in line


@pytest.mark.parametrize("text, says", [
    ('{"prompt": "a \\ud800 b"}', "line 1: half of a surrogate pair"),
    (json.dumps({"prompt": "word " * 4_000_000}), "line 1: a text of 20,000,000 characters is longer than any model"),
    (json.dumps({"messages": [{"role": "user", "content": "x" * 5_000_000}]}), "line 1: a text of 5,000,000 characters"),
    ("[" * 10**6, "line 1: malformed JSON"), ('{"prompt":' + '{"a":' * 10**5, "line 1: malformed JSON"),
    ('{"prompt": 1' + "0" * 5000 + "}", "line 1: malformed JSON"), ('{"prompt": NaN}', "line 1: no prompt found"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', "a turn has role 'tool'"),
    ('{"messages": [{"role": ' + '"' + "r" * 1000 + '", "content": "x"}]}', "a turn has role 'rrr")])
def test_texts_that_no_tokenizer_reads(real, complaint, text, says):
    """In seconds, and before a model is asked."""
    with open("odd.jsonl", "w") as file:
        file.write(text + "\n")
    line = complaint([*real, "--prompts", "odd.jsonl"])
    assert "odd.jsonl" in line and says in line and len(line) < 320


def test_a_prompts_file_from_windows_and_a_zero_byte():
    content = '\ufeff{"prompt": "a"}\r\n{"prompt": "b \\u0000 c"}\r\n\r\n'
    with open("windows.jsonl", "w", encoding="utf-8", newline="") as written_to:
        written_to.write(content)
    assert [str(prompt) for prompt in read_prompts("windows.jsonl")] == ["a", "b \0 c"]


def test_too_few_prompts(real, complaint):
    assert "--prompts-per-iteration 100" in complaint([*real, "--prompts-per-iteration", "100"])


def test_a_prompt_longer_than_the_context(real, complaint):
    name = written("long.jsonl", "".join(json.dumps({"prompt": p}) + "\n" for p in [*PROMPTS, "Repeat after me: "
        + "la di da " * 300]))
    line = complaint([*real, "--prompts", name, "--prompts-per-iteration", "29"])  # all 41 are used: 29 + 6 + 6
    assert "Repeat after me" in line and "context 512" in line and "--max-new-tokens" in line


def test_a_prompt_longer_than_the_flag_allows(real, complaint):
    assert "only 5 are allowed" in complaint([*real, "--max-prompt-tokens", "5"])


def test_an_answer_longer_than_the_context(tiny, complaint):
    assert "--max-new-tokens 500" in complaint([*tiny, "--max-new-tokens", "500"])


def test_prompts_without_a_model(real, complaint):
    assert "--model" in complaint([*real, "--model", ""])


def test_a_model_without_prompts(real, complaint):
    line = complaint([*real, "--prompts", "", "--judge", "oracle"])
    assert "--prompts" in line and "--model" in line


def hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_a_hub_data_set_without_the_package(real, complaint, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    line = complaint([*real, "--prompts", "owner/name"])
    assert "--prompts owner/name" in line and "pip install datasets" in line


def test_a_hub_data_set_that_is_not_there(real, complaint, monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("a page of text\nand more")

    hub(monkeypatch, load_dataset)
    line = complaint([*real, "--prompts", "owner/name"])
    assert "--prompts owner/name" in line and "ConnectionError" in line


def test_sources_that_do_not_fit_the_iterations(real, complaint, monkeypatch):
    """Two data sets for three iterations: the third has none. (More than enough: the first ones count.)"""
    hub(monkeypatch, lambda name, split: [{"prompt": f"{name} {i}"} for i in range(40)])
    names = "owner/a,owner/b,owner/c"
    line = complaint([*real, "--iterations", "4", "--prompts", names])
    assert "--prompts names 3 sources for 4 iterations" in line
    assert "nowhere.jsonl" in complaint([*real, "--iterations", "2", "--prompts", "owner/a,nowhere.jsonl"])


def test_long_prompts_are_dropped_only_when_told_so(real, complaint, capsys):
    flags = [*real, "--max-prompt-tokens", "60"]
    assert "only 60 are allowed" in complaint(flags)
    sppo.main([*flags, "--drop-long-prompts", "--stage", "sample"])
    assert re.search(r"left out \d+ of 40 prompts: longer than 60 tokens", capsys.readouterr().out)
    assert len(open("out/table-1.jsonl").readlines()) == 8
    assert "0 distinct prompts" in complaint([*real, "--max-prompt-tokens", "3", "--drop-long-prompts", "--out", "b"],
                                                out="b")


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


TYPES = {torch.bool: "BOOL", torch.int64: "I64", torch.complex64: "C64", torch.uint8: "U8"}
OUTSIDE = ("../model.safetensors", "/etc/passwd", "weights.bin", "", "sub/model.safetensors", 3)
TEMPLATES = [("{% for", "cannot write user"), ("{{ raise_exception('only with tools') }}", "only with tools"),
             ("{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}", "system first"),
             ("{{ 'x' * 10**11 }}", "takes more than 5 seconds"), ("{{ messages[7]['content'] }}", "no element 7"),
             ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 5 seconds")]


@pytest.mark.parametrize("change, says", [
    (edit("config.json", model_type="gpt2"), ["config.json", "'gpt2'"]),
    (edit("config.json", hidden_act="gelu"), ["config.json", 'hidden_act "gelu"']),
    (edit("config.json", vocab_size=None), ["config.json", "vocab_size"]),
    (edit("config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), ["config.json", "'yarn'"]),
    (edit("config.json", intermediate_size=95), ["model.safetensors", "mlp", "96", "95"]),
    (lambda d: written(f"{d}/config.json", "{"), ["config.json", "JSON"]),
    (lambda d: os.remove(f"{d}/config.json"), ["config.json", "does not exist"]),
    (lambda d: os.remove(f"{d}/model.safetensors"), ["model.safetensors", "missing"]),
    (lambda d: os.truncate(f"{d}/model.safetensors", os.path.getsize(f"{d}/model.safetensors") - 1000),
     ["model.safetensors", "truncated"]),
    (lambda d: os.truncate(f"{d}/model.safetensors", 5), ["model.safetensors", "truncated"]),
    (weights(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), ["model.layers.1.mlp.up_proj.weight",
                                                                     "incomplete"]),
    (weights(lambda w: w.update({"model.norm.weight": torch.ones(47)})), ["model.norm.weight", "[47]", "[48]"]),
    (weights(lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(96, 48)})),
     ["model.layers.2.mlp.up_proj.weight"]),
    (lambda d: os.remove(f"{d}/chat_template.jinja"), ["chat template", "chat_template.jinja"]),
    (lambda d: [os.remove(f"{d}/{name}") for name in ("tokenizer.json", "tokenizer_config.json")], ["tokenizer"]),
    (lambda d: written(f"{d}/tokenizer.json", "{"), ["tokenizer"]),
    (edit("config.json", num_hidden_layers=10**9), ["config.json has num_hidden_layers 1000000000; it must be"]),
    (edit("config.json", eos_token_id=["</s>"]), ["config.json has eos_token_id", "a token's number or a list of such"]),
    (edit("generation_config.json", eos_token_id=[1, None]), ["generation_config.json has eos_token_id [1, null]"]),
    (edit("generation_config.json", eos_token_id={"id": 1}), ["generation_config.json has eos_token_id"]),
    *[(weights(lambda w, kind=kind: w.update({"model.norm.weight": w["model.norm.weight"].to(kind)})),
       [f"model.norm.weight is of type {name}"]) for kind, name in TYPES.items()],
    *[(lambda d, name=name: written(f"{d}/model.safetensors.index.json", json.dumps({"weight_map": {"w": name}})),
       ["index.json names", "only .safetensors files beside it"]) for name in OUTSIDE],
    *[(lambda d, content=content: written(f"{d}/model.safetensors.index.json", content), ["index.json"])
      for content in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 10**5)],
    *[(lambda d, text=text: written(f"{d}/chat_template.jinja", text), ["chat template", why])
      for text, why in TEMPLATES],
])
def test_models(real, complaint, broken, change, says):
    path = broken(change)
    line = complaint([*real, "--model", path])
    assert path in line and all(word in line for word in says)


def hostile_values():
    """(key, value) for every key of config.json that is read, and for every value that it must not have."""
    every = ["8", "", True, [], [8], {}, {"a": 1}, -1, 0, 1.5, 10**9, 10**30, math.nan, math.inf, -math.inf, None]
    for key, (kind, *bounds) in checkpoints.KEYS.items():
        for value in every:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            fits = {int: isinstance(value, int) and number, float: number}.get(kind, isinstance(value, kind))
            if value is None and key not in checkpoints.NEEDED:
                continue
            if not fits or bounds and not bounds[0] <= value <= bounds[1]:
                yield key, value


@pytest.mark.parametrize("key, value", list(hostile_values()))
def test_a_key_of_config_json_with_a_value_of_another_kind(key, value, llama3):
    """Read as every checkpoint's is, inside rope_parameters where it may stand there; nothing is built before."""
    with open(f"{llama3}/config.json") as file:
        good = json.load(file)
    for bad in ({**good, key: value}, {**good, "rope_parameters": {"rope_type": "default", key: value}}):
        with pytest.raises(run.UserError) as error:
            checkpoints.Config.from_hf(json.loads(json.dumps(bad)), "there/config.json")
        said = str(error.value)
        assert said.startswith(f"there/config.json has {key} ") and "must be" in said and len(said) < 200


def test_a_null_in_config_json_is_as_good_as_no_key(llama3):
    with open(f"{llama3}/config.json") as file:
        good = json.load(file)
    free = checkpoints.KEYS.keys() - checkpoints.NEEDED - {"rope_parameters", "head_dim", "num_key_value_heads"}
    want = checkpoints.Config.from_hf({key: value for key, value in good.items() if key not in free})
    got = checkpoints.Config.from_hf(good | dict.fromkeys(free))
    assert dataclasses.replace(got, raw={}) == dataclasses.replace(want, raw={})


@pytest.mark.parametrize("changes, says", [
    (dict(model_type="qwen2", sliding_window=8, use_sliding_window=True, num_hidden_layers=None), "num_hidden_layers null"),
    (dict(num_attention_heads=4, num_key_value_heads=3), "the last must divide the first"),
    (dict(head_dim=7), "the dimensions be even"), (dict(hidden_size=2, head_dim=None), "the dimensions be even"),
    (dict(layer_types=[["full_attention"]], model_type="qwen3", sliding_window=8), "layer_types"),
    (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=4.0,
                               high_freq_factor=4.0, original_max_position_embeddings=64)), "not below its high_freq"),
    (dict(rope_scaling={"type": "su"}, rope_parameters=None), "rope_type 'su'"),
    (dict(model_type=["llama"]), "supported"),
    (dict(model_type={}), "not supported"), (dict(hidden_act=["silu"]), "hidden_act")])
def test_keys_of_config_json_that_do_not_fit_together(changes, says, llama3):
    with open(f"{llama3}/config.json") as file:
        good = json.load(file)
    with pytest.raises(run.UserError, match="^there/config.json has") as error:
        checkpoints.Config.from_hf({**good, **changes}, "there/config.json")
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["./nowhere", "nobody/no-such-model"])
def test_models_that_are_not_there(real, complaint, name):
    assert name in complaint([*real, "--model", name])


def test_a_tokenizer_with_more_tokens_than_the_model(real, complaint, broken):
    """Its last ids would index past the embedding, with a traceback in the middle of the run."""
    def shrink(directory):
        edit("config.json", vocab_size=300)(directory)
        weights(lambda w: w.update({name: w[name][:300].clone() for name in ("model.embed_tokens.weight",
            "lm_head.weight")}))(directory)

    path = broken(shrink)
    assert path in complaint([*real, "--model", path])


# ---------------------------------------------------------------------------------------------------------------------
# judges


@pytest.mark.parametrize("judge", ["gpt-4", "pairrm:", "pairrm:./nowhere", "pairrm:nobody/no-such-judge"])
def test_judges(real, complaint, judge):
    line = complaint([*real, "--judge", judge])
    assert judge.partition("./")[2] in line and (judge in line or "nowhere" in line or "no-such-judge" in line)


def set_keys(**changes):
    return edit("config.json", **changes)


@pytest.mark.parametrize("change, says", [
    *[(set_keys(**{key: value}), f"config.json has {key} ")
      for key, (kind, *bounds) in pairrm.KEYS.items() for value in ([8], -2)],
    (set_keys(hidden_size=33), "does not describe a DeBERTa"), (set_keys(pos_att_type=3), "does not describe a DeBERTa"),
    (set_keys(hidden_act="no such function"), "does not describe a DeBERTa"), (set_keys(num_hidden_layers=5), "lacks"),
    *[(weights(lambda w, kind=kind: w.update({"head_layer.4.bias": w["head_layer.4.bias"].to(kind)})),
       "head_layer.4.bias with values that are no finite floating-point numbers") for kind in TYPES],
    (weights(lambda w: w["head_layer.4.bias"].fill_(float("nan"))), "no finite floating-point numbers")])
def test_a_broken_pairrm(change, says, real, complaint, request):
    shutil.copytree(request.getfixturevalue("pairrm"), "judge")
    change("judge")
    line = complaint([*real, "--judge", "pairrm:judge"])
    assert "judge" in line and says in line


def test_unknown_layout_of_a_pairrm(real, complaint, llama3):
    assert f"{llama3}/config.json" in complaint([*real, "--judge", f"pairrm:{llama3}"])


def test_the_oracle_cannot_judge_prose(real, complaint):
    assert "--judge pairrm:" in complaint([*real, "--judge", "oracle"])
    assert "--judge pairrm:" in complaint([*real, "--judge", ""])


# ---------------------------------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize("flags", [
    "--k 1", "--k 0", "--eta 0", "--eta -20", "--eta nan", "--eta inf", "--temperature -1", "--temperature 0",
    "--temperature nan", "--top-p 0", "--top-p 1.5",
    "--top-p nan", "--top-k -1", "--lr 0", "--lr nan", "--lr inf", "--warmup 2", "--warmup nan", "--clip -1",
    "--weight-decay -1", "--batch-size 0",
    "--micro-batch 0", "--iterations 0", "--prompts-per-iteration -5", "--epochs 0", "--max-new-tokens 0",
    "--max-rows 0", "--validation-prompts 0",
    "--test-prompts 0", "--print-every 0", "--save-every -1", "--device abacus"])
def test_numbers_that_make_no_sense(tiny, complaint, flags):
    line = complaint([*tiny, *flags.split()])
    assert flags.split()[0] in line


@pytest.mark.parametrize("flags, says", [
    ("--loss dpo --eta 3", "--eta does nothing with --loss dpo"), ("--loss ipo --eta 3", "--loss ipo"),
    ("--loss sppo --beta 0.1", "--beta does nothing with --loss sppo"),
    ("--loss sppo-hard --beta 0.1", "--loss sppo-hard"),
    ("--beta 0.1", "--loss sppo"), ("--loss dpo --beta 0", "--beta 0"), ("--loss dpo --beta nan", "--beta nan"),
    ("--loss dpo --all-responses", "--all-responses is for --loss sppo"),
    ("--loss sppo-hard --all-responses", "--all-responses"), ("--loss kto", "--loss"),
    ("--gradient-accumulation 2 --micro-batch 4", "--gradient-accumulation and --micro-batch"),
    ("--gradient-accumulation -1", "--gradient-accumulation -1"), ("--max-total-tokens -1", "--max-total-tokens"),
    ("--schedule-epochs -1", "--schedule-epochs -1"), ("--epochs 3 --schedule-epochs 2", "--schedule-epochs 2"),
    ("--prompts-per-iteration 0", "--prompts-per-iteration 0"), ("--preset gpt-5", "--preset"),
    ("--preset mistral-7b --world intransitive", "--world"), ("--world chess", "--world"),
    ("--world intransitive --judge oracle", "give styles"), ("--judge styles", "give oracle"),
    ("--estimator aggregate", "--estimator aggregate"), ("--stage rest", "--stage"),
    ("--table t.jsonl", "--table is for --stage"), ("--iteration 2 --iterations 3", "--iteration says"),
    ("--stage sample --table t.jsonl", "--table is for --stage judge or --stage train"),
    ("--stage sample --iteration 2", "--iteration 2 is beyond --iterations 1"),
    ("--stage sample --iteration 0", "--iteration 0"),
    ("--stage sample --iterations 2 --iteration 2", "out/iter-1"),
    ("--stage train --iterations 2 --iteration 2", "out/table-2.jsonl is not there"),
    ("--stage judge", "out/table-1.jsonl is not there"), ("--stage train", "run --stage sample first")])
def test_flags_that_do_not_fit_together(tiny, complaint, flags, says):
    assert says in complaint([*tiny, *flags.split()])


@pytest.mark.parametrize("flags, says", [
    ("--world intransitive", "--world is played without --prompts"),
    ("--judge styles", "--judge pairrm:"), ("--stage train --epochs 2 --keep best --prompts= --table t.jsonl",
                                            "--keep best chooses on held-out prompts")])
def test_flags_that_do_not_fit_prompts(real, complaint, flags, says):
    assert says in complaint([*real, *flags.split()])


@pytest.mark.parametrize("flags, says", [
    (["--seed", str(2**63)], "--seed 9223372036854775808 must fit into 64 bits"),
    (["--seed", str(-2**63 - 1)], "must fit into 64 bits"), (["--k", "9" * 400], "--k 999"),
    (["--seed", "9" * 5000], "argument --seed: invalid int value"), (["--eta", "9" * 400], "--eta inf must be a finite"),
    (["--seed", "1.5"], "invalid int value: '1.5'"), (["--test-prompts", "1000001"], "no 1,000,001 queries of one part"),
    (["--model", "x" * 2000], "xxx ... xxx"), (["--no-such-" + "y" * 500, "1"], "yyy ... ")])
def test_numbers_and_names_without_end(tiny, complaint, flags, says):
    line = complaint([*tiny, *flags])
    assert says in line and len(line) < 350


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_what_torchrun_would_have_set(name, tiny, complaint, monkeypatch):
    for other in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(other, "0")
    monkeypatch.setenv(name, "one")
    assert f"{name} is one, no number; start with torchrun" in complaint(tiny)
    if name == "WORLD_SIZE":
        monkeypatch.delenv("RANK")
        assert f"{name} is one" in complaint([*tiny, "--gradient-accumulation", "2"])


# ---------------------------------------------------------------------------------------------------------------------
# stages and tables


def test_a_stage_is_not_done_twice(tiny, complaint):
    """Answers that are judged, or weights that cost a day, are not written over."""
    sppo.main([*tiny, "--stage", "sample"])
    assert "out/table-1.jsonl is already there" in complaint([*tiny, "--stage", "sample"])
    assert "--stage judge" in complaint([*tiny, "--stage", "train"])
    sppo.main([*tiny, "--stage", "judge"])
    sppo.main([*tiny, "--stage", "train"])
    assert "out/iter-1 is already there" in complaint([*tiny, "--stage", "train"])


ROW = {"prompt": "a", "generate_0": "x", "generate_1": "y", "probability": [[0.5, 0.7], [0.3, 0.5]]}
PAIR = {"prompt": "a", "chosen": "x", "rejected": "y", "chosen_probs_win": 0.7, "chosen_probs_lose": 0.2}


IDS = ROW | {"prompt_ids": [4, 5], "tokens": [[6, 2], [7, 2]], "finish": ["stop", "length"]}


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


@pytest.mark.parametrize("text, says", [
    (None, "No such file"), ("", "no rows"), (json.dumps(ROW) + "\n{\"prompt\": \"a\"\n", "line 2: malformed JSON"),
    ([{"text": "a"}], "line 1: no column"), ([ROW, {"prompt": "a"}], "line 2: no column"), ([7], "line 1: "),
    ([[1, 2]], "line 1: "), ([ROW, without(ROW, "probability")], "line 2: no column chosen; judge the table first"),
    ([ROW | {"probability": [[0.5, 0.7]]}], "line 1: probability is no 2 x 2 matrix"),
    ([ROW | {"probability": [[0.5, 1.5], [-0.5, 0.5]]}], "numbers in [0, 1]"),
    ([ROW | {"probability": [[0.5, float("nan")], [0.5, 0.5]]}], "numbers in [0, 1]"),
    ([ROW | {"probability": [[0.5, 0.7], [0.3]]}], "line 1: "), ([ROW | {"probability": "high"}], "line 1: "),
    ([PAIR | {"chosen_probs_win": "nan"}], "line 1: "), ([PAIR | {"chosen_probs_win": 2}], "chosen_probs_win 2 is not"),
    ([PAIR | {"chosen_probs_lose": float("nan")}], "chosen_probs_lose nan is not"),
    ([without(PAIR, "chosen_probs_lose")], "line 1: no column chosen_probs_lose"),
    ([without(PAIR, "rejected")], "line 1: no column rejected"), ([PAIR | {"chosen": 3}], "line 1: prompt must be a text or a list of"),
    ([PAIR | {"chosen": []}], "line 1: "), ([PAIR | {"rejected": [{"role": "user"}]}], "line 1: "),
    ([PAIR | {"rejected": [{"role": "assistant", "content": None}]}], "line 1: "),
    ([PAIR | {"prompt": 3}], "line 1: "),
    ([ROW, ROW, ROW | {"generate_2": "z", "probability": [[0.5] * 3] * 3}], "line 3"),
    ([ROW | {"probability": [[0.5, 0.7], [0.7, 0.5]]}], "line 1: probability has two answers whose chances"),
    ([ROW | {"probability": [[0.9, 0.7], [0.3, 0.5]]}], "line 1: probability has two answers whose chances"),
    ([ROW | {"probability": [[0.5, 10**400], [0.3, 0.5]]}], "line 1: probability is no 2 x 2 matrix"),
    ([ROW | {"probability": [[0.5, None], [0.3, 0.5]]}], "line 1: probability is no 2 x 2 matrix"),
    ([ROW | {"probability": {}}], "line 1: probability is no 2 x 2 matrix"),
    ([PAIR | {"chosen_probs_win": True}], "chosen_probs_win True is not"),
    ([PAIR | {"chosen_probs_win": 10**400}], "chosen_probs_win 1000"),
    (json.dumps(ROW) + "\n" + "[" * 10**5, "line 2: malformed JSON (nested too deeply)"),
    ([ROW, IDS], "line 2: prompt_ids stands in some rows alone"),
    ([IDS | {"tokens": [[5]]}], "line 1: tokens and finish are no lists of 2"),
    ([IDS | {"tokens": 7}], "line 1: "), ([IDS | {"finish": ["stop", "end"]}], "of the words stop and length"),
    ([without(IDS, "finish")], "line 1: no column finish"), ([IDS | {"finish": [["stop"], "stop"]}], "line 1: "),
    ([IDS | {"tokens": [[5], []]}], "line 1: prompt_ids or tokens has a list that is empty"),
    ([IDS | {"tokens": [[5], [5.0]]}], "what is no id of a token"), ([IDS | {"tokens": [[5], [True]]}], "no id of a"),
    ([IDS | {"prompt_ids": [-1]}], "what is no id of a token"), ([IDS | {"prompt_ids": "ab"}], "list that is empty"),
    ([IDS | {"prompt_ids": []}], "list that is empty"),
    ([IDS, IDS | {"prompt_ids": [10**6]}], "row 2: an id is beyond the model's"),
    ([IDS | {"tokens": [[5] * 5000, [6]]}], "row 1: prompt and answer are longer than the model's context of")])
def test_tables(real, complaint, text, says):
    if text is not None:
        written("table.jsonl", text if isinstance(text, str) else "".join(json.dumps(row) + "\n" for row in text))
    line = complaint([*real, "--stage", "train", "--table", "table.jsonl"])
    assert "--table table.jsonl" in line and says in line


@pytest.mark.parametrize("row, says", [(PAIR, "line 1: no column generate_0"), ({"prompt": "a"}, "generate_0"),
                                       (without(ROW, "probability", "generate_0") | {"generate_1": 4}, "line 1: ")])
def test_tables_that_cannot_be_judged(real, complaint, row, says):
    written("table.jsonl", json.dumps(row) + "\n")
    line = complaint([*real, "--stage", "judge", "--table", "table.jsonl"])
    assert "--table table.jsonl" in line and says in line


def test_all_responses_of_a_table_that_has_two(real, complaint):
    written("table.jsonl", json.dumps(PAIR) + "\n")
    line = complaint([*real, "--stage", "train", "--table", "table.jsonl", "--all-responses"])
    assert "line 1: no column probability" in line


def test_a_table_with_a_prompt_that_is_too_long(real, complaint):
    """Found before anything is written, as everywhere."""
    written("table.jsonl", json.dumps(PAIR | {"prompt": "la di da " * 300}) + "\n")
    assert "la di da" in complaint([*real, "--stage", "train", "--table", "table.jsonl"])


@pytest.mark.parametrize("flags", ["--nonsense 1", "--bat 4", "--k two", "--estimator mean", "--optimizer sgd",
                                   "--dtype float16", "--lr", "stray"])
def test_flags_that_are_none(tiny, complaint, flags):
    assert flags.split()[0] in complaint([*tiny, *flags.split()])


# ---------------------------------------------------------------------------------------------------------------------
# --out


def test_a_directory_that_cannot_be_made(tiny, complaint):
    written("file", "")
    assert "--out file/run" in complaint([*tiny, "--out", "file/run"], out="file")
    assert "--out file" in complaint([*tiny, "--out", "file"], out="file")


def test_a_directory_with_another_run(tiny, complaint):
    tiny += ["--eta", "20"]
    sppo.main(tiny)
    line = complaint(tiny)
    assert "--out out" in line and "--resume" in line and "--overwrite" in line
    line = complaint([*tiny, "--resume", "--eta", "21"])
    assert "--eta" in line and "20" in line and "21" in line


def test_overwrite_does_not_delete_what_is_no_run(tiny, complaint, base):
    """--out at a checkpoint, which has a config.json as a run has, must not delete the weights."""
    os.mkdir("out")
    written("out/thesis.tex", "years of work")
    assert "--out out" in complaint([*tiny, "--overwrite"])
    shutil.copytree(base, "weights")
    assert "--out weights" in complaint([*tiny, "--overwrite", "--out", "weights"], out="weights")


# ---------------------------------------------------------------------------------------------------------------------
# a loss that is not finite


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(what, tiny, monkeypatch, capsys):
    """In the second iteration: the message names iteration and step, and the first iteration's checkpoint is good. A
    gradient can overflow under a finite loss; one more step would then write NaN into every weight."""
    real_loss, calls = kernels.sppo_loss, []

    def sppo_loss(logratio, p, eta):
        calls.append(1)
        loss = real_loss(logratio, p, eta)
        if len(calls) != 4:  # 8 prompts in batches of 4: the second step of the second iteration
            return loss
        if what == "gradient":
            loss.register_hook(lambda grad: grad * float("inf"))
            return loss
        return loss * float("nan")

    monkeypatch.setattr(kernels, "sppo_loss", sppo_loss)
    monkeypatch.setattr(sys, "argv", ["sppo.py", *tiny, "--iterations", "2"])
    with pytest.raises(SystemExit) as end:
        run.main(sppo.main)
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert end.value.code == 2 and len(error) == 1 and "iteration 2, step 2" in error[0] and "out/iter-1" in error[0]
    assert "--lr" in error[0]
    net = model.Transformer.from_pretrained("out/iter-1")
    assert all(p.isfinite().all() for p in net.parameters())
    assert not os.path.exists("out/iter-2")
    with open("out/summary.json") as file:
        assert [row["name"] for row in json.load(file)["evaluations"]] == ["base", "base, greedy", "iteration 1"]
    # valid JSON, no NaN
    assert [json.loads(line)["step"] for line in open("out/metrics.jsonl") if '"loss"' in line] == [1, 2, 1]


def test_an_absurd_learning_rate_ends_in_one_sentence(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sppo.py", *tiny, "--lr", "1e30", "--epochs", "2", "--max-new-tokens", "4"])
    with pytest.raises(SystemExit) as end:
        run.main(sppo.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("error: ") == 1 and "Traceback" not in error and "--lr" in error


# ---------------------------------------------------------------------------------------------------------------------
# lsp.py


PLAY = "--steps 1 --queries 4 --answers 2 --max-new-tokens 8 --test-prompts 4 --device cpu --out out".split()


@pytest.mark.parametrize("flags, says", [
    ("--model {llama3}", "does not speak the embedded world"), ("--reward reward:nowhere --model {llama3}", "nowhere"),
    ("--reward pairrm:{pairrm} --model {llama3}", "--reward"), ("--reward gpt-4", "--reward gpt-4"),
    ("--model {base} --task Riddles", "--task"), ("--init out", "--init out holds no checkpoint"),
    ("--model {base} --queries 1", "--queries 1"), ("--model {base} --answers 1", "--answers 1"),
    ("--model {base} --alpha-ch -0.1", "--alpha-ch -0.1"), ("--model {base} --mode selfplay", "--mode"),
    ("--model {base} --prompts p.txt", "--mode grpo"), ("--model {base} --mode grpo --prompts no.txt", "no.txt"),
    ("--model {base} --preset papers", "--preset"), ("--model {base} --max-new-tokens 126", "--max-new-tokens 126"),
    ("--model {base} --eval-prompts {prompts}", "--eval-prompts"), ("--preset paper --task {{x}}", "--task"),
    ("--preset paper --challenger-prompt no.txt", "no.txt"), ("--preset paper --mode grpo", "--prompts"),
    ("--preset paper --temperature 0", "--temperature 0"), ("--preset paper --template {{", "--template")])
def test_lsp(complaint, base, llama3, pairrm, prompts_file, flags, says):
    flags = flags.format(base=base, llama3=llama3, pairrm=pairrm, prompts=prompts_file).split()
    assert says in complaint([*PLAY, *flags], main=lsp.main)


def test_a_reward_model_with_two_labels(complaint, llama3, tmp_path):
    decoder_checkpoint(tmp_path / "two", llama3, num_labels=2)
    line = complaint([*PLAY, "--model", llama3, "--reward", f"reward:{tmp_path / 'two'}"], main=lsp.main)
    assert "more than one label" in line


def test_a_rubric_that_fills_the_context(complaint, llama3, tmp_path):
    decoder_checkpoint(tmp_path / "reward", llama3)
    real = [*PLAY, "--model", llama3, "--reward", f"reward:{tmp_path / 'reward'}"]
    assert "the Challenger's prompt has 530 tokens" in complaint(real, main=lsp.main)
    real += ["--challenger-prompt", written("short.txt", "Ask."), "--max-query-tokens", "8"]
    line = complaint(real, main=lsp.main)
    assert "context of 512" in line and "--self-reward-prompt" in line


# ---------------------------------------------------------------------------------------------------------------------
# eval.py, and the scripts as processes


@pytest.mark.parametrize("flags, says", [
    ("winrate", "--model"), ("winrate --model {base}", "--vs"), ("winrate --model {base} --vs ./nowhere", "./nowhere"),
    ("winrate --model {base} --vs {base} --judge gpt-4", "--judge"), ("winrate --model {base} --vs {base} --top-p 0",
                                                                      "--top-p"),
    ("winrate --model {base} --vs {base} --temperature -1", "--temperature"),
    ("winrate --model {base} --vs {base} --prompts p.jsonl", "p.jsonl"),
    ("winrate --model {base} --vs out", "out is a run's directory"),
    ("winrate --model {base} --vs {base} --count 0", "--count"),
    ("winrate --model {base} --vs {base} --max-new-tokens -3", "--max-new-tokens"),
    ("winrate --model {base} --vs {base} --nonsense 1", "--nonsense"),
    ("winrate --model {llama3} --vs {base} --count 9", "--prompts"), ("plot", "plot"),
    ("plot nowhere", "nowhere/summary.json"), ("fight", "fight")])
def test_eval(complaint, base, llama3, flags, says):
    os.makedirs("out/state", exist_ok=True)
    assert says in complaint(flags.format(base=base, llama3=llama3).split(), main=eval.main)


@pytest.mark.slow
def test_as_a_process():
    calls = {"sppo.py": (["--k", "1", "--out", "out"], "--k 1"), "lsp.py": (["--answers", "1", "--out", "out"],
             "--answers 1"), "eval.py": (["plot", "nowhere"], "nowhere/summary.json")}
    begun = {script: subprocess.Popen([sys.executable, os.path.join(ROOT, script), *flags], stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True) for script, (flags, _) in calls.items()}
    for script, process in begun.items():
        said, error = process.communicate()
        assert process.returncode == 2 and said == "" and not os.listdir(".")
        assert error.startswith("error: ") and calls[script][1] in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# a run directory that somebody or something has been at


def killed_at(step, flags):
    """Runs `python sppo.py flags` until its gradient step of this number, from 1."""
    with pytest.MonkeyPatch.context() as patch:
        real, calls = sppo.gradient_step, []

        def dies(*args):
            calls.append(1)
            if len(calls) == step:
                raise KeyError("as a kill would")
            return real(*args)

        patch.setattr(sppo, "gradient_step", dies)
        patch.setattr(sppo, "plots", types.SimpleNamespace(plot=lambda runs, path: None))
        with pytest.raises(KeyError, match="as a kill would"):
            sppo.main(flags)


@pytest.fixture(scope="module")
def interrupted(base, tmp_path_factory):
    """A run that was interrupted in its first training, after a saved state, and its flags but for --out."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ["--model", base, *SMALL, "--save-every", "1", "--epochs", "2"]
    killed_at(3, [*flags, "--out", str(out)])
    return out, flags


def cut_rows(path):
    """A list of rows, one of them gone."""
    with open(path) as file:
        value = json.load(file)
    value["reference"] = value["reference"][:-1]
    written(path, json.dumps(value))


GARBAGE = ("", "{", "[]", "null", "3", "[" * 10**5, '{"a": 1}', "\0" * 100)
TAMPERED = [
    *[(name, lambda path, text=text: written(path, text), "remove it")
      for name in ("state/reference-1.json",) for text in GARBAGE],
    *[("state/evaluations.json", lambda path, text=text: written(path, text), "go on from the last good checkpoint")
      for text in GARBAGE],
    *[("state/base_side.json", lambda path, text=text: written(path, text), "begin again with --overwrite")
      for text in (*GARBAGE[:-2], '{"test": 3}', '{"test": {"sampled": []}}', '{"test": {"other": 1}}')],
    *[("state/state.pt", lambda path, text=text: written(path, text), "start again with --overwrite") for text in GARBAGE],
    *[("config.json", lambda path, text=text: written(path, text), "config.json") for text in GARBAGE[:6]],
    ("config.json", lambda path: written(path, '{"a": 1}'), "are not a run's"),
    ("state/reference-1.json", cut_rows, "remove it"),
    ("state/evaluations.json", lambda path: written(path, '{"evaluations": 3}'), "begin again with --overwrite"),
    ("state/state.pt", lambda path: os.truncate(path, 200), "start again with --overwrite"),
    ("state/state.pt", lambda path: torch.save({}, path), "begin again with --overwrite"),
    ("state/state.pt", lambda path: torch.save([1], path), "begin again with --overwrite"),
    *[("state/state.pt", lambda path, key=key: without_key(path, key), "begin again with --overwrite")
      for key in ("iteration", "step", "seconds", "sizes")],
    ("state/state.pt", lambda path: with_key(path, training=3), "begin again with --overwrite"),
    ("state/state.pt", lambda path: with_key(path, training="training-gone"), "training-gone cannot be read"),
    *[("table-1.jsonl", lambda path, text=text: written(path, text), "table-1.jsonl") for text in GARBAGE],
    *[("state/initial.json", lambda path, text=text: written(path, text), "initial.json") for text in GARBAGE[:7]],
    *[("state/initial.json", lambda path, key=key: with_entry(path, key, {"a": None}), "begin again with --overwrite")
      for key in ("initial", "iterations", "sources", "size")],
    ("state/training-1-2", lambda path: os.truncate(path, 100), "start again with --overwrite"),
    ("state/training-1-2", lambda path: os.remove(path), "start again with --overwrite"),
    ("state/training-1-2", lambda path: torch.save({"0.master": torch.zeros(1)}, path), "start again with --overwrite"),
    ("state/training-1-2", lambda path: torch.save({}, path), "start again with --overwrite"),
]


def with_entry(path, key, value):
    with open(path) as file:
        entries = json.load(file)
    written(path, json.dumps(entries | {key: value}))


def with_key(path, **values):
    torch.save(torch.load(path, weights_only=True) | values, path)


def without_key(path, key):
    state = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in state.items() if name != key}, path)


@pytest.mark.parametrize("name, damage, says", TAMPERED)
def test_a_damaged_run_directory(name, damage, says, interrupted, complaint, capsys):
    """A sentence that names the file, and says whether to remove it; the rest of the run is left as it is."""
    good, flags = interrupted
    shutil.copytree(good, "out")
    damage(os.path.join("out", name))
    line = complaint([*flags, "--out", "out", "--resume"], out="out/iter-1")
    assert says in line and ("--out out" in line or "out/state/" in line or os.path.basename(name) in line)


@pytest.mark.slow
@pytest.mark.pictures
def test_evaluations_that_are_gone_are_made_again(base):
    """In the middle of the second training. The result is that of a run in which nothing happened, to the bit."""
    flags = ["--model", base, *SMALL, "--save-every", "1", "--epochs", "2", "--iterations", "2"]
    sppo.main([*flags, "--out", "whole"])
    killed_at(7, [*flags, "--out", "killed"])
    for name in ("evaluations.json", "base_side.json"):
        shutil.copytree("killed", "out")
        os.remove(f"out/state/{name}")
        sppo.main([*flags, "--out", "out", "--resume"])
        for one in ("iter-2/model.safetensors", "state/evaluations.json", "state/base_side.json"):
            assert open(f"whole/{one}", "rb").read() == open(f"out/{one}", "rb").read(), (name, one)
        shutil.rmtree("out")
