import dataclasses
import json
import os
import shutil
import sys
import types

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch: on tensors this small a second thread only waits

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (minutes; CI does)")
    parser.addoption("--house", action="store_true", help="also run the rules of layout and length (CI does)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs only with --slow")
    config.addinivalue_line("markers", "pictures: draws the pictures of its runs (see quick_runs)")
    config.addinivalue_line("markers", "house: this repository's rules of layout, not a fork's; runs only with --house")


def pytest_collection_modifyitems(config, items):
    left_out = {mark for mark in ("slow", "house") if not config.getoption(f"--{mark}")}
    unwanted = [item for item in items if left_out & set(item.keywords)]
    config.hook.pytest_deselected(items=unwanted)
    items[:] = [item for item in items if item not in unwanted]


# ---------------------------------------------------------------------------------------------------------------------
# small checkpoints that several files share

PROMPTS = """\
Name three rivers that flow through more than one country.
Write a short apology for arriving late at a meeting.
What is the difference between weather and climate?
Explain photosynthesis to a ten-year-old in four sentences.
Translate "good morning, how did you sleep?" into French.
List the ingredients of a simple tomato soup.
How many minutes are there in three and a half hours?
Correct the grammar: "She don't likes to swims in cold water."
Give two arguments for and two against school uniforms.
Suggest a name for a café that sells only tea and books.
Which of these is None of the above: a cat, a dog, a horse? Answer None if all are animals.
Write a haiku about the first snow.
Summarise the plot of Romeo and Juliet in two sentences.
What does the Python expression `x = None` do, and what is `x is None` then?
Convert 68 degrees Fahrenheit to Celsius.
Describe a lighthouse at night without using the word "light".
What should I pack for a weekend in the mountains?
Rewrite politely: "Send me the report now."
Who wrote "The Old Man and the Sea", and when?
Give me a riddle whose answer is "a shadow".
Sort these words alphabetically: pear, apple, fig, banana.
Why does ice float on water?
Draft a tweet that announces a charity run on Sunday.
What is the capital of Australia? (It is not Sydney.)
Turn this into a question: The library closes at eight.
Find the odd one out: violin, cello, trumpet, viola.
Explain what a hash table is and why lookups are fast.
Compose a birthday wish for a colleague I hardly know.
How would you teach a dog to sit?
Name a fruit that is botanically a berry but is not called one.
What is 15 % of 240? Show the steps.
Write one sentence in the passive voice about a broken window.
Give a synonym and an antonym of "brisk".
Plan a vegetarian dinner for four in under forty minutes.
Is a tomato a fruit or a vegetable? Argue both sides briefly.
What causes the tides?
Write a regular expression that matches a date such as 2024-05-31.
Tell a two-line story about a lost key.
Classify the sentiment: "The soup was cold, but the waiter was lovely."
What are the primary colours of light, and what are those of paint?""".splitlines()

LLAMA3_TEMPLATE = ("{{ bos_token }}{% for m in messages %}"
                   "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}<|eot_id|>"
                   "{% endfor %}{% if add_generation_prompt %}"
                   "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """Runs wait for the disk at each file they write, against a power cut. No test cuts the power, and on a disk that is
    shared with others each wait may take a second: files are what they are after a kill, without it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def quick_runs(request, monkeypatch):
    """A picture takes half a second, and a run draws several. Within a test's own process a run leaves an empty PNG
    instead, unless the test is marked `pictures`; fixtures of a wider scope and other processes draw."""
    if "pictures" not in request.keywords:
        make_quick(monkeypatch)


@pytest.fixture(scope="module")
def quick_module():
    """The same for fixtures of a module, which begin before a test's own."""
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield


def make_quick(patch):
    for name in ("sppo", "lsp"):
        if name in sys.modules:
            patch.setattr(sys.modules[name], "plots", types.SimpleNamespace(plot=lambda runs, path: leave_png(path)))
    if "lsp" in sys.modules:                        # and fewer queries behind a row's figures of the Challenger
        patch.setattr(sys.modules["lsp"], "FRESH", (48, 16))


def leave_png(path):
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Work in a directory of the test's own: nothing is written into the repository."""
    monkeypatch.chdir(tmp_path)


class Killed(Exception):
    """What a call raises that `dies_in` has told to."""


@pytest.fixture
def dies_in(monkeypatch):
    """dies_in(module, name, number): the number-th call of module.name raises Killed. Returns the list of calls."""
    def arm(module, name, number):
        real, calls = getattr(module, name), []

        def dies(*args):
            calls.append(1)
            if len(calls) == number:
                raise Killed
            return real(*args)

        monkeypatch.setattr(module, name, dies)
        return calls
    return arm


def small_base(entry, tmp_path_factory, width=48):
    """The base of an embedded world, smaller and trained for two seconds: it answers and ends its turn."""
    import world

    directory = str(tmp_path_factory.mktemp("world") / "base")
    world.train_base(directory, dataclasses.replace(entry, steps=150, width=width, layers=2, mlp=96, batch=32), "cpu")
    return directory


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base that answers in letters."""
    import world

    return small_base(world.OPERATIONS, tmp_path_factory)


@pytest.fixture(scope="session")
def circle(tmp_path_factory):
    """A base of the intransitive world, which answers in styles."""
    import world

    return small_base(world.INTRANSITIVE, tmp_path_factory)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    """Forty written instructions as .jsonl."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return str(path)


def bpe(special, **post):
    """A byte-level BPE tokenizer trained on PROMPTS, `special` tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(PROMPTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False,
                                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    core.post_processor = processors.TemplateProcessing(**post)
    return core


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    """A random checkpoint that is Llama 3 in everything but size: grouped queries, scaled RoPE, untied head,
    byte-level BPE, a tokenizer that prepends BOS to plain text, a chat template that writes BOS itself, two end
    tokens."""
    import transformers

    directory = str(tmp_path_factory.mktemp("llama3") / "checkpoint")
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    core = bpe(special, single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=special[0], eos_token=special[4],
                                         chat_template=LLAMA3_TEMPLATE,
                                         clean_up_tokenization_spaces=False).save_pretrained(directory)
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=core.get_vocab_size(), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, rope_parameters=rope, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=[1, 4]))
    # logits of spread 1, the end tokens' of spread 2: about half of the answers end within 24 tokens
    with torch.no_grad():
        net.lm_head.weight.mul_(8)
        net.lm_head.weight[[1, 4]] *= 2
    net.generation_config.eos_token_id = [1, 4]
    net.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory, llama3):
    """The random Llama 3 with room for the rubric, and a reward model that reads the same text."""
    from test_prefmodel import decoder_checkpoint

    directory = tmp_path_factory.mktemp("real")
    shutil.copytree(llama3, directory / "model")
    config = json.loads((directory / "model/config.json").read_text())
    (directory / "model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    decoder_checkpoint(directory / "reward", llama3, max_position_embeddings=4096)
    return str(directory)


@pytest.fixture(scope="session")
def pairrm(tmp_path_factory):
    """A random PairRM in the layout of llm-blender/PairRM-hf that reads the same text as `llama3`."""
    from test_prefmodel import CONFIG, HF_KEYS, MARKERS, reference_net, write_json, write_weights

    directory = tmp_path_factory.mktemp("judge") / "pairrm"
    directory.mkdir()
    core = bpe(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *MARKERS], single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1),
        ("[SEP]", 2)])
    core.save(f"{directory}/tokenizer.json")
    write_json(f"{directory}/tokenizer_config.json", {"sep_token": "[SEP]", "cls_token": "[CLS]", "pad_token": "[PAD]",
                                                      "unk_token": "[UNK]"})
    size = core.get_vocab_size()
    ids = dict(zip(("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id"),
                   map(core.token_to_id, MARKERS)))
    write_json(f"{directory}/config.json", {**CONFIG, **HF_KEYS, **ids, "vocab_size": size})
    write_weights(directory, *reference_net(vocab_size=size))
    return str(directory)


# ---------------------------------------------------------------------------------------------------------------------
# files and rows that several files make and look at

def file(name, content):
    with open(name, "w", encoding="utf-8") as f:
        f.write(content)
    return name


def rows(*values):
    return "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values)


def is_png(path):
    with open(path, "rb") as f:
        return f.read(8) == b"\x89PNG\r\n\x1a\n" and os.path.getsize(path) > 5000


# the base's and a trained model's row of a run's table
ROW = {"name": "base", "prompts": 4, "win_rate": 0.5, "win_rate_se": 0.014, "win_rate_greedy": 0.5,
       "win_rate_greedy_se": 0.0, "accuracy_sampled": 0.25,
       "accuracy_greedy": 0.375, "mean_length": 5.04, "mean_length_greedy": 5.0}
TRAINED = {**ROW, "name": "iteration 1", "win_rate": 0.61, "accuracy_greedy": 0.75}


# an intransitive run's style shares: the base, two iterates
SHARES = ([0.6, 0.3, 0.1], [0.9, 0.05, 0.05], [0.2, 0.3, 0.5])


def circle_summary(loss="sppo"):
    """What a run of two iterations in the intransitive world would leave."""
    names = ["base", "base, greedy", "iteration 1", "iteration 2"]
    shares = [SHARES[0], SHARES[0], *SHARES[1:]]
    return {"method": loss, "settings": {"loss": loss, "all_responses": loss == "sppo", "eta": 2.0, "k": 4,
                                           "iterations": 2},
            "evaluations": [{**ROW, "name": n, "styles": p, "accuracy_sampled": None, "accuracy_greedy": None}
                            for n, p in zip(names, shares)]}
