"""docs/first-run.md is run: every command and every example file of the page, as they stand there.

What the page names on the hub is replaced by a small random checkpoint or a stand-in package, an example file by more
rows of the same kind, and what takes hours by small sizes behind the page's own flags. All else is the page's.
"""

import json
import os
import re
import shlex
import shutil
import sys
import types

import pytest

import chat
import eval
import lsp
import plots
import sppo
from conftest import ROOT, Killed, is_png
from test_run import Writer

pytestmark = pytest.mark.usefixtures("elsewhere")

with open(os.path.join(ROOT, "docs", "first-run.md"), encoding="utf-8") as page:
    PAGE = page.read()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S)
            for line in block.replace("\\\n", " ").splitlines() if line.strip()]
# The example files: a file's name stands in the paragraph before its text
FILES = dict(re.findall(r"`([\w-]+\.(?:py|jsonl))`[^\n]*\n(?:[^\n]+\n)*\n```(?:python|json)\n(.*?)```", PAGE, re.S))

# What comes behind a command's own flags, so that it takes seconds: everything but for how long a run is
SMALL = {"sppo.py": "--k 2 --prompts-per-iteration 2 --max-new-tokens 6 --validation-prompts 2 --test-prompts 2 "
                    "--batch-size 2 --device cpu",
         "lsp.py": "--queries 2 --answers 2 --max-new-tokens 6 --test-prompts 2 --eval-every 2 --device cpu",
         "eval.py": "--count 2 --max-new-tokens 6 --device cpu"}
SMALL_GAME = " --max-query-tokens 8 --max-verdict-tokens 8"             # for lsp.py where a Challenger plays
# How long: where the page leaves it to the default, and what stands for the page's own numbers of steps and iterations
BEGUN = {"sppo.py": " --iterations 1", "lsp.py": " --steps 2"}
SHORTER = {"--steps 2000": "--steps 3", "step-1000": "step-2", "--iterations 4": "--iterations 2", "iter-3": "iter-1"}
DRAW = plots.plot
MAIN = {"sppo.py": sppo.main, "lsp.py": lsp.main, "eval.py": eval.main}


@pytest.fixture(scope="module")
def qwen(llama3, tmp_path_factory):
    """`llama3` with room for the rubrics, and a template like Qwen3's: unless enable_thinking says otherwise, it closes
    an empty thinking in the assistant's header."""
    directory = tmp_path_factory.mktemp("first") / "qwen"
    shutil.copytree(llama3, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    template = (directory / "chat_template.jinja").read_text().removesuffix("{% endif %}")
    (directory / "chat_template.jinja").write_text(
        template + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}")
    return str(directory)


@pytest.fixture
def workplace(qwen, pairrm, monkeypatch):
    """The page's files in the working directory, and stand-ins for the packages that it names: a function from a
    command to what it runs here, (script, arguments). Pictures, a second each, are left out."""
    def load_dataset(*names, split):
        assert names == ("openai/gsm8k", "main")
        return [row | {"question": f"{split}: {row['question']}"} for row in lines("gsm8k.jsonl")]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(Writer, "calls", [], raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(plots, "plot", lambda runs, path, **how: None)
    for name, text in FILES.items():
        with open(name, "w", encoding="utf-8") as file:
            file.write(more_rows(text) if name.endswith(".jsonl") else text)

    def here(command):
        for name, ours in {"Qwen/Qwen3-4B": qwen, "llm-blender/PairRM": pairrm, **SHORTER}.items():
            command = command.replace(name, ours)
        python, script, *argv = shlex.split(command)
        assert python == "python", command
        small = SMALL[script] if script != "eval.py" or argv[0] == "winrate" else ""
        if script == "lsp.py" and not {"--mode", "--preset"} & set(argv):
            small += SMALL_GAME
        if script in BEGUN and not {"--steps", "--iterations"} & set(argv):
            small += BEGUN[script]
        return script, argv + small.split()
    return here


def more_rows(text):
    """Eight rows for each example row, which differ in what the user says last."""
    made = ""
    for line in text.splitlines():
        said = chat.prompt_of(json.loads(line), "", "", "").turns[-1]["content"]
        for i in range(8):
            made += line.replace(json.dumps(said), json.dumps(f"{i}: {said}")) + "\n"
    return made


def about(out):
    """The page's commands about a run's directory, in their order."""
    return [command for command in COMMANDS if re.search(rf"{out}(?![\w-])", command)]


def run_all(out, workplace):
    for command in about(out):
        script, argv = workplace(command)
        MAIN[script](argv)


def lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def evaluations(out):
    """The rows of a run's table."""
    with open(f"{out}/summary.json") as file:
        return json.load(file)["evaluations"]


# ---------------------------------------------------------------------------------------------------------------------
# the page


TESTED = ("out/try", "out/gsm8k", "out/gsm8k-trl", "out/follows", "out/frontier", "out/terser", "out/talks", "out/self")


def test_nothing_on_the_page_is_left_out():
    assert sorted(sum((about(out) for out in TESTED), [])) == sorted(COMMANDS) and all(map(about, TESTED))
    assert set(FILES) == {"look.py", "gsm8k.jsonl", "rewards.py", "demands.jsonl", "talks.jsonl"}
    assert PAGE.count("```") == 2 * (len(re.findall("```sh\n", PAGE)) + len(FILES))


def test_what_the_model_will_read(qwen, capsys):
    shown = FILES["look.py"].replace("Qwen/Qwen3-4B", qwen)
    exec(shown, {})
    said = capsys.readouterr().out
    assert "Be brief.<|eot_id|>" in said and "<think>" in said
    exec(shown.replace("=false", "=true"), {})
    assert "<think>" not in capsys.readouterr().out


def test_the_example_files(workplace):
    """Every row is a prompt of its own with the columns beside it, and the functions say what their comments say."""
    rows = {name: chat.read_prompts(name) for name in FILES if name.endswith(".jsonl")}
    assert {name: len(prompts) for name, prompts in rows.items()} == {
        "gsm8k.jsonl": 16, "demands.jsonl": 16, "talks.jsonl": 24}
    assert [[turn["role"] for turn in prompt.turns] for prompt in rows["talks.jsonl"][::8]] == [
        ["system", "user"], ["user"], ["user", "assistant", "user"]]
    assert [prompt.row for prompt in rows["talks.jsonl"][::8]] == [{"id": 7}, {"topic": "geography"}, {}]
    made = {}
    exec(FILES["rewards.py"], made)
    row = rows["demands.jsonl"][0].row
    assert made["follows"]("", "The moon pulls the water.", row) == 1 and made["follows"]("", "", row) == 1 / 3
    assert made["follows"]("", "no demands but length", {}) == 1 and made["terser"]("", "a", "abc", {}) == 0.75


# ---------------------------------------------------------------------------------------------------------------------
# its runs


def test_a_small_try(workplace):
    run_all("out/try", workplace)
    samples = lines("out/try/samples.jsonl")
    assert {row["step"] for row in samples} == {1, 2} and all({"query", "answer", "reward"} <= set(s) for s in samples)


@pytest.mark.slow
def test_grpo_with_a_verifier_is_interrupted_and_goes_on(workplace, dies_in, monkeypatch):
    """The first session dies, so that --resume has something to do. What it leaves is shown as a table and a picture;
    afterwards the run grows, with the same held-out prompts, and their answers stand beside them."""
    begin, resume, more, table, plot, winrate = map(workplace, about("out/gsm8k"))
    often = ["--eval-every", "1"]
    dies_in(lsp, "gradient_step", 2)
    with pytest.raises(Killed):
        lsp.main(begin[1] + often)
    monkeypatch.setattr(plots, "plot", DRAW)
    eval.main(table[1])
    eval.main(plot[1])
    assert is_png("out/gsm8k/curves.png")
    assert [row["name"] for row in evaluations("out/gsm8k")] == ["base", "base, greedy", "step 1"]
    lsp.main(resume[1] + often)
    held_out = lines("out/gsm8k/state/test.jsonl")
    lsp.main(more[1] + often)
    assert lines("out/gsm8k/state/test.jsonl") == held_out and all("#### " in row["answer"] for row in held_out)
    rows = evaluations("out/gsm8k")
    assert [row["name"] for row in rows][2:] == ["step 1", "step 2", "step 3"]
    assert all(row["accuracy_greedy"] is not None for row in rows)
    eval.main(winrate[1])


def test_grpo_on_hub_prompts_as_its_library_computes_it(workplace):
    run_all("out/gsm8k-trl", workplace)
    with open("out/gsm8k-trl/config.json") as file:
        config = json.load(file)
    assert (config["kl"], config["normalise"], config["reward"]) == ("k2-token", "token", "verify:gsm8k")
    assert all(row["prompt"].startswith("test: ") for row in lines("out/gsm8k-trl/state/test.jsonl"))
    assert all(row["query"].startswith("train: ") for row in lines("out/gsm8k-trl/samples.jsonl"))


def test_a_reward_of_ones_own(workplace):
    run_all("out/follows", workplace)
    assert {row["reward"] for row in lines("out/follows/samples.jsonl")} <= {0, 1 / 3, 1 / 2, 2 / 3, 1}
    assert all(row["accuracy_sampled"] is not None for row in evaluations("out/follows"))


def test_frontier_and_a_mute_self_reward(workplace, capsys):
    """A random model writes no verdict that can be read: the sentence that the page speaks of."""
    run_all("out/frontier", workplace)
    said = capsys.readouterr().out
    assert "verdicts could not be read" in said and "lsp-zero" in said and "ten such steps in a row end the run" in said


def test_a_judge_of_ones_own(workplace):
    run_all("out/terser", workplace)
    assert [row["accuracy_greedy"] for row in evaluations("out/terser")] == [None] * 3


@pytest.mark.slow
def test_sppo_on_conversations(workplace, qwen):
    """With a tracker; then an iteration more, on prompts that were not played; then the win rate."""
    run_all("out/talks", workplace)
    played = [json.dumps(row["prompt"]) for t in (1, 2) for row in lines(f"out/talks/table-{t}.jsonl")]
    assert len(set(played)) == len(played) == 4
    assert [row["name"] for row in evaluations("out/talks")][2:] == ["iteration 1", "iteration 2"]
    assert {call[1] for call in Writer.calls if call[0] == "begin"} == {
        os.path.join("out/talks", "tensorboard"), os.path.join("out/talks", "tensorboard", "evaluations")}
    assert {"train/loss", "evaluation/win_rate"} <= {call[1] for call in Writer.calls}
    for name in ("tokenizer.json", "chat_template.jinja"):
        with open(f"out/talks/iter-2/{name}", "rb") as ours, open(f"{qwen}/{name}", "rb") as theirs:
            assert ours.read() == theirs.read()


def test_self_rewarding_sppo(workplace):
    run_all("out/self", workplace)
    assert [row["name"] for row in evaluations("out/self")] == ["base", "base, greedy", "iteration 1"]
