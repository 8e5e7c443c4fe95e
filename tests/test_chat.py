"""chat.py: prompt files in every layout, chat templates, room for answers."""

import json
import os
import shutil
import sys
import types

import pytest
import torch

from chat import load_checkpoint, read_prompts
from conftest import PROMPTS, file, rows
from run import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")


# ---------------------------------------------------------------------------------------------------------------------
# prompts files


@pytest.mark.parametrize("row, prompt", [
    ({"prompt": "Say hi.", "id": 3}, "Say hi."),
    ({"instruction": "Say hi."}, "Say hi."),
    ({"instruction": "Translate.", "input": "hi", "output": "salut"}, "Translate.\n\nhi"),
    ({"instruction": "Say hi.", "input": ""}, "Say hi."),
    ({"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say hi."}]}, "Say hi."),
    ({"messages": [{"role": "user", "content": "One."}, {"role": "assistant", "content": "1"},
                   {"role": "user", "content": "Two."}]}, "Two."),
    ({"prompt": " indented,\n\ntwo paragraphs \U0001f600 é "}, " indented,\n\ntwo paragraphs \U0001f600 é "),
])
def test_every_layout_of_a_row(row, prompt):
    assert read_prompts(file("p.jsonl", rows(row, {"prompt": "Another."}))) == [prompt, "Another."]
    assert read_prompts(file("p.json", json.dumps([row, {"prompt": "Another."}]))) == [prompt, "Another."]


def test_text_files_order_and_duplicates():
    assert read_prompts(file("p.txt", "b\n\na\nb\n  \nc None d\n")) == ["b", "a", "c None d"]
    assert read_prompts(file("p.jsonl", "\n" + rows({"prompt": "b"}, {"instruction": "a"}, {"prompt": "b"})
                                  + "\n")) == ["b", "a"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_only_a_newline_ends_a_line(separator):
    """str.splitlines also cuts at Unicode's line separators, which real instruction sets hold unescaped inside JSON
    strings."""
    prompts = [f"first{separator}half", "second"]
    assert read_prompts(file("p.jsonl", rows(*({"prompt": p} for p in prompts)))) == prompts


@pytest.mark.parametrize("name, content, says", [
    ("p.jsonl", rows({"prompt": "a"}) + '{"prompt": "b"\n', "line 2"), ("p.jsonl", '\n\n{"prompt": 3}\n', "line 3"),
    ("p.jsonl", "[1]\n", "line 1"),
    ("p.jsonl", rows({"text": "a"}), "`prompt`"), ("p.jsonl", rows({"prompt": "  "}), "line 1"),
    ("p.jsonl", rows({"messages": "a"}), "line 1"),
    ("p.jsonl", rows({"messages": [{"role": "assistant", "content": "a"}]}), "line 1"),
    ("p.jsonl", rows({"instruction": "a", "input": 5}), "line 1"),
    ("p.json", "[", "JSON"), ("p.json", "7", "JSON"), ("p.json", '[{"prompt": "a"}, {"text": "b"}]', "entry 2"),
    ("p.json", '{"text": "a"}', "line 1"),
    ("p.jsonl", "", "no rows"), ("p.txt", " \n\n", "no prompts"), ("p.json", "[]", "no rows")])
def test_bad_prompts_files(name, content, says):
    with pytest.raises(UserError) as error:
        read_prompts(file(name, content))
    assert f"--prompts {name}" in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_text():
    with open("p.jsonl", "wb") as f:
        f.write(b"\xff\xfe\x00")
    os.mkdir("d.jsonl")
    for name, says in (("p.jsonl", "UTF-8"), ("d.jsonl", "directory"), ("missing.jsonl", "No such file")):
        with pytest.raises(UserError, match=f"--prompts {name} cannot be read .*{says}"):
            read_prompts(name)


def test_a_hub_data_set(monkeypatch):
    """Its split `train`, in the layouts of a file. A file or a directory of that name comes first."""
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"prompt": "b"}, {"instruction": "a", "input": "c"}, {"prompt": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_prompts("owner/name") == ["b", "a\n\nc"] and asked == [("owner/name", "train")]
    os.mkdir("owner")
    assert read_prompts(file("owner/name", "from a file\n")) == ["from a file"]
    for missing in ("owner/missing.jsonl", "missing", "a/b/c"):
        with pytest.raises(UserError, match=f"--prompts {missing} cannot be read"):
            read_prompts(missing)
    assert len(asked) == 1
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda name, split: [{"prompt": "a"}, {"text": "b"}])
    with pytest.raises(UserError, match="--prompts owner/other, row 2"):
        read_prompts("owner/other")


# ---------------------------------------------------------------------------------------------------------------------
# chat


@pytest.fixture(scope="module")
def chat(llama3):
    return load_checkpoint(llama3, "cpu", torch.float32)[1]


def test_one_bos_and_the_assistants_header(chat):
    """The official code doubled BOS (this tokenizer, like Llama 3's, prepends one to plain text, and the template
    writes one) and lost the header through a misspelt add_generation_prompt."""
    token = chat.tokenizer.convert_tokens_to_ids
    assert chat.tokenizer("plain")["input_ids"][0] == token("<|begin_of_text|>")
    header = [token("<|start_header_id|>"), *chat.tokenizer.encode("assistant", add_special_tokens=False),
              token("<|end_header_id|>"),
              *chat.tokenizer.encode("\n\n", add_special_tokens=False)]
    for prompt in PROMPTS:
        ids = chat.encode(prompt)
        assert ids[0] == token("<|begin_of_text|>") and ids.count(ids[0]) == 1 and ids[-len(header):] == header
        assert ids.count(token("<|eot_id|>")) == 1 and ids.count(token("<|start_header_id|>")) == 2


def test_the_prompt_arrives_whole(chat):
    """The official code split its template at the word "None" and cut prompts that contain it."""
    assert sum("None" in p for p in PROMPTS) == 2
    for prompt in PROMPTS:
        text = chat.tokenizer.decode(chat.encode(prompt))
        assert text == (f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
                        "<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_stop_ids_come_from_every_place(llama3, base):
    """Llama 3 stops at two tokens, of which the tokenizer names one; missing one lets answers run on past their end."""
    shutil.copytree(llama3, "copy")

    def stop_ids(generation, config):
        for name, value in (("generation_config.json", generation), ("config.json", config)):
            raw = json.load(open(f"{llama3}/{name}")) | {"eos_token_id": value}
            file(f"copy/{name}", json.dumps({k: v for k, v in raw.items() if v is not None}))
        return load_checkpoint("copy", "cpu", torch.float32)[1].stop_ids

    # 4 is the tokenizer's
    assert stop_ids([1, 3], 2) == (1, 3, 4) and stop_ids([4], 2) == (4,) and stop_ids(1, 2) == (1, 4)
    assert stop_ids(None, [1, 2]) == (1, 2, 4) and stop_ids(None, None) == (4,)
    assert load_checkpoint(base, "cpu", torch.float32)[1].stop_ids == (5,)


def test_answers_are_decoded_without_special_tokens(chat):
    assert chat.decode([*chat.tokenizer.encode(" A lighthouse. ", add_special_tokens=False), 4]) == "A lighthouse."


def test_a_prompt_that_leaves_no_room_is_refused_and_the_longest_that_fits_is_not(chat):
    ids = chat.encode_all(PROMPTS, 0, 24)
    longest = max(map(len, ids))
    assert ids == [chat.encode(p) for p in PROMPTS]
    assert ids == chat.encode_all(PROMPTS, longest, 24) == chat.encode_all(PROMPTS, 0, 512 - longest)
    for limits in ((longest - 1, 24), (0, 512 - longest + 1)):
        with pytest.raises(UserError,
                           match=f"has {longest} tokens and only {longest - 1} are allowed.*--max-new-tokens"):
            chat.encode_all(PROMPTS, *limits)


def test_a_template_that_writes_the_date_gets_a_fixed_one(llama3, tmp_path):
    """Llama 3.2's does: prompts, and with them a resumed run, must not change at midnight."""
    directory = tmp_path / "dated"
    shutil.copytree(llama3, directory)
    path = directory / "chat_template.jinja"
    dated = "{{ date_string if date_string is defined else strftime_now('%H:%M:%S.%f') }}"
    path.write_text(dated + path.read_text())
    _, chat = load_checkpoint(str(directory), "cpu", torch.float32)
    assert chat.encode("Why?") == chat.encode("Why?") and "26 Jul 2024" in chat.tokenizer.decode(chat.encode("Why?"))
    assert chat.tokenizer.decode(chat.encode_answer("Why?", "So.")) == "So.<|eot_id|>"
