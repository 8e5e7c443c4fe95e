"""world.py: the language by hand, its parts, the corpus and its systematic error, the tokenizer, and the base as a
checkpoint."""

import dataclasses
import math
import os
import random

import pytest
import torch
import transformers

import model
import run
import world

pytestmark = pytest.mark.usefixtures("elsewhere")


# ---------------------------------------------------------------------------------------------------------------------
# the language


@pytest.mark.parametrize("op, word, right, misread", [
    ("copy", "hgab", "hgab", None), ("reverse", "abca", "acba", None), ("upper", "agh", "AGH", None),
    ("upper", "aGh", "AGH", None),
    ("sort", "dbca", "abcd", "dcba"), ("sort", "bAaB", "ABab", "baBA"), ("rotate", "abcd", "bcda", "dabc"),
    ("rotate", "ab", "ba", "ba"),
    ("swap", "abcd", "dbca", None), ("swap", "ab", "ba", None), ("next", "aghb", "bhac", "hfga"),
    ("next", "AHa", "BAb", "HGh"),
    ("dedupe", "hfahf", "hfa", None), ("dedupe", "aAa", "aA", None)])
def test_every_operation_by_hand(op, word, right, misread):
    assert world.OPS[op](word) == right
    assert (world.MISREAD[op](word) if op in world.MISREAD else None) == misread


def test_operations_survive_a_word_of_one_letter():
    """dedupe can leave a single letter, and the next operation must cope with it."""
    assert world.OPERATIONS.solve("dedupe then swap then rotate then sort:aaa") == "a"
    assert world.OPERATIONS.solve("dedupe then next:hh") == "a"


@pytest.mark.parametrize("query, answer", [
    ("sort:dbca", "abcd"), ("sort then reverse:dbca", "dcba"), ("upper then dedupe:hfah", "HFA"),
    ("rotate then next:abh", "cab"),
    ("copy then copy then copy then swap:abcdefgh", "hbcdefga"), ("reverse then rotate:ab", "ab")])
def test_solve(query, answer):
    assert world.OPERATIONS.solve(query) == answer and world.OPERATIONS.score(query, answer) == 1.0
    assert world.OPERATIONS.parse(query) == (query.split(":")[0].split(" then "), query.split(":")[1])


@pytest.mark.parametrize("query", [
    "", ":", "sort", "sort:", "sort:a", "sort:abcdefgha", ":abc", "sort then:abc", "sort then :abc", "then sort:abc",
    "Sort:abc", "sort:aBc", "sort:abi",
    "sort:ab:cd", "sort: abc", "sort:abc ", "sort then then copy:abc", "sort  then copy:abc", "sorts:abc",
    "sort then copy then copy then copy then copy:abc",
    "challenge", "judge:sort:abc|abc", "sort:ab1"])
def test_malformed_queries_have_no_answer_and_no_mark(query):
    assert world.OPERATIONS.parse(query) is None and world.OPERATIONS.solve(query) is None
    assert world.OPERATIONS.score(query, "abc") == 0.0 and world.OPERATIONS.judge_label(query, "abc") == 0


def test_marks_by_hand():
    """Half the share of matching positions, over the longer length: too long and too short cost the same; exact is
    1."""
    marks = {"abcd": 1.0, "abdc": 0.25, "abc": 0.375, "abcda": 0.4, "dcba": 0.0, "": 0.0, "ABCD": 0.0,
             "aaaaaaaa": 0.0625}
    assert {a: world.OPERATIONS.score("sort:dbca", a) for a in marks} == marks


def test_judge_labels_by_hand():
    """2 for a clear query, 1 for an answer in letters, round(4 R) for its marks 1, .25, .4, .375 and 0."""
    labels = {"abcd": 7, "abdc": 4, "abcda": 5, "abc": 5, "dcba": 3, "": 2, "01": 2}
    assert {a: world.OPERATIONS.judge_label("sort:dbca", a) for a in labels} == labels


# ---------------------------------------------------------------------------------------------------------------------
# parts


def test_parts_have_their_sizes():
    """Sixteenths: 9 corpus, 4 train, 1 validation, 2 test. Of 20,000 draws, within 5 standard deviations (6e-7 by
    chance, each)."""
    rng = random.Random(0)
    drawn = list({world.OPERATIONS.random_query(rng): None for _ in range(20000)})
    for part, share in {"corpus": 9 / 16, "train": 4 / 16, "validation": 1 / 16, "test": 2 / 16}.items():
        count = sum(world.split(q) == part for q in drawn)
        assert abs(count - share * len(drawn)) < 5 * math.sqrt(len(drawn) * share * (1 - share))


def test_queries_are_distinct_stay_in_their_part_and_extend():
    seen = {}
    for part in ("corpus", "train", "validation", "test"):
        listed = world.OPERATIONS.queries(part, 600)
        assert len(set(listed)) == 600 and {world.split(q) for q in listed} == {part}
        assert all(world.OPERATIONS.parse(q) for q in listed) and world.OPERATIONS.queries(part, 250) == listed[:250]
        seen |= {q: part for q in listed}
    assert len(seen) == 4 * 600
    assert world.OPERATIONS.queries("train", 100, seed=1) != world.OPERATIONS.queries("train", 100, seed=0)


def test_queries_have_the_announced_shapes():
    """1, 2, 3 operations with probability .5, .35, .15; 3 to 5 letters. 6,000 draws, 5 standard deviations."""
    rng = random.Random(1)
    parsed = [world.OPERATIONS.parse(world.OPERATIONS.random_query(rng)) for _ in range(6000)]
    assert {len(word) for _, word in parsed} == {3, 4, 5} and {op for ops, _ in parsed for op in ops} == set(world.OPS)
    for n, share in ((1, 0.5), (2, 0.35), (3, 0.15)):
        assert abs(sum(len(ops) == n for ops, _ in parsed) - share * 6000) < 5 * math.sqrt(6000 * share * (1 - share))


# ---------------------------------------------------------------------------------------------------------------------
# the intransitive world


@pytest.mark.parametrize("answer, style", [
    ("HFA2", 2), ("a0", 0), ("bcd1", 1), ("", None), ("0", None), ("HFA", None), ("HFA21", None), ("2HFA", None),
    ("HF:2", None), ("HFA3", None), ("HFA 2", None), ("HFA2 ", None)])
def test_styles(answer, style):
    """Exactly one digit, after at least one letter and nothing else: all else would be a way out of the game."""
    assert world.style(answer) == style


@pytest.mark.parametrize("name, others", [("narrow", 0.0), ("tilted", 0.1)])
def test_what_the_corpus_shows_the_challenger(name, others):
    """Single easy operations, or nine times in ten. Of the ordinary queries half have more operations than one."""
    spoken, rng = world.WORLDS[name], random.Random(0)
    shown = [query for prompt, query in (spoken.corpus_row(rng) for _ in range(20000)) if prompt == world.CHALLENGE]
    parsed = [ops for ops, _ in filter(None, map(spoken.parse, shown))]
    easy = [ops for ops in parsed if len(ops) == 1 and ops[0] in world.EASY["ops"]]
    assert set(sum(map(list, easy), [])) == set(world.EASY["ops"])
    more, n = sum(len(ops) > 1 for ops in parsed), len(parsed)
    assert abs(more - others / 2 * n) <= 5 * math.sqrt(n * others / 2)


def test_style_shares():
    """Among the answers that have a style; without any, zeros."""
    assert world.style_shares(["a0", "b2", "ab2", "c1", "x", "12", "d2"]) == [0.2, 0.2, 0.6]
    assert world.style_shares(["x"]) == world.style_shares([]) == [0.0, 0.0, 0.0]


def test_the_game_of_styles():
    """Antisymmetric around 1/2 and a circle; against Nash's mixture (3, 2, 4)/9 every style wins exactly half."""
    P = torch.tensor(world.STYLES, dtype=torch.float64)
    torch.testing.assert_close(P + P.T, torch.ones(3, 3, dtype=torch.float64))
    assert P[0, 1] > 0.5 and P[1, 2] > 0.5 and P[2, 0] > 0.5
    torch.testing.assert_close(P @ (torch.tensor([3, 2, 4], dtype=torch.float64) / 9), torch.full((3,), 0.5).double())


def test_the_intransitive_corpus_answers_rightly_and_in_style():
    """Of 4,000 rows: all letters right, styles as often as the constants say, within 5 standard deviations."""
    rng, styles = random.Random(0), []
    for _ in range(4000):
        query, answer = world.INTRANSITIVE.corpus_row(rng)
        assert world.OPERATIONS.solve(query) == answer[:-1] and world.split(query) == "corpus"
        styles.append(world.style(answer))
    for i, share in enumerate(world.INTRANSITIVE.styles):
        assert abs(styles.count(i) - share * 4000) < 5 * math.sqrt(4000 * share * (1 - share))
    assert not world.World().styles and world.WORLDS["intransitive"] is world.INTRANSITIVE


# ---------------------------------------------------------------------------------------------------------------------
# the corpus


def corpus(count, seed=0, **constants):
    """[(mode, query, user turn, assistant turn)] of the corpus."""
    rng, w, rows = random.Random(seed), world.World(**constants), []
    for _ in range(count):
        user, assistant = w.corpus_row(rng)
        mode = "challenge" if user == world.CHALLENGE else "judge" if user.startswith("judge:") else "answer"
        query = {"challenge": assistant, "judge": user[len("judge:"):].rsplit("|", 1)[0], "answer": user}[mode]
        rows.append((mode, query, user, assistant))
    return rows


def test_the_corpus_holds_queries_of_its_own_part_only():
    """Guards against a leak: a query made "malformed" by exchanging a letter may be a well-formed one of the test
    part."""
    rows = corpus(15000)
    assert {mode for mode, *_ in rows} == {"answer", "challenge", "judge"}
    leaked = {mode: [q for m, q, *_ in rows if m == mode and world.OPERATIONS.parse(q) and world.split(q) != "corpus"]
              for mode in ("answer", "challenge", "judge")}
    assert leaked == {"answer": [], "challenge": [], "judge": []}


def test_junk_is_malformed_and_as_frequent_as_the_constants_say():
    """What is drawn as junk must be malformed, else the constants lie: a random edit may leave a well-formed query.
    Of 8,000 rows a mode, within 5 standard deviations."""
    w = world.World()
    for i, share in enumerate((w.junk_answer, w.junk_challenge, w.junk_judge)):
        rows = corpus(8000, seed=6, modes=tuple(float(i == j) for j in range(3)))
        malformed = sum(world.OPERATIONS.parse(query) is None for _, query, *_ in rows)
        assert abs(malformed - share * 8000) < 5 * math.sqrt(8000 * share * (1 - share))


def test_the_three_modes_have_their_shares():
    """Of 8,000 rows, within 5 standard deviations."""
    rows = corpus(8000, seed=1)
    for mode, share in zip(("answer", "challenge", "judge"), world.World().modes):
        assert abs(sum(m == mode for m, *_ in rows) - share * 8000) < 5 * math.sqrt(8000 * share * (1 - share))


def test_the_corpus_misreads_as_often_as_its_constant_says():
    """Single operations, random errors off, words whose two readings differ. Within 5 standard deviations: a chance
    failure has odds of 6e-7 for each operation, and a rate off by .08 fails."""
    w = world.World(modes=(1, 0, 0), corrupt=0.0, junk_answer=0.0)
    for op in world.MISREAD:
        verdicts = []
        for _, query, _, answer in corpus(20000, seed=2, modes=(1, 0, 0), corrupt=0.0, junk_answer=0.0):
            ops, word = world.OPERATIONS.parse(query)
            wrong, right = world.MISREAD[op](word), world.OPS[op](word)
            if ops == [op] and len(word) >= 4 and wrong != right:
                assert answer in (wrong, right)
                verdicts.append(answer == wrong)
            elif ops == [op] and len(word) < 4:
                assert answer == right  # short words are read correctly
        n = len(verdicts)
        assert n > 500 and abs(sum(verdicts) - w.misread * n) < 5 * math.sqrt(n * w.misread * (1 - w.misread))


def test_random_corruption_is_as_frequent_as_its_constant_says():
    """With misreading off, a wrong answer is a corrupted one; a corruption may leave the answer right, never the
    reverse."""
    rows = corpus(4000, seed=3, modes=(1, 0, 0), misread=0.0, junk_answer=0.0)
    wrong = sum(world.OPERATIONS.score(q, a) < 1 for _, q, _, a in rows) / len(rows)
    assert 0.6 * world.World().corrupt < wrong < world.World().corrupt + 5 * math.sqrt(0.3 * 0.7 / 4000)


def test_the_judge_is_taught_the_oracles_marks():
    """85 % of the labels are exact, the rest one off; 5 standard deviations. At 0 and 7 one off can mean exact."""
    rows = [(user, int(label)) for mode, _, user, label in corpus(4000, seed=4, modes=(0, 0, 1))]
    off = [label - world.OPERATIONS.judge_label(*user[len("judge:"):].rsplit("|", 1)) for user, label in rows]
    assert set(off) == {-1, 0, 1} and all(0 <= label <= 7 for _, label in rows)
    assert 0.85 - 5 * 0.0057 < off.count(0) / len(off) < 0.95


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The world's tokenizer, saved and opened again as anybody would."""
    directory = str(tmp_path_factory.mktemp("tokenizer"))
    world.OPERATIONS.make_tokenizer().save_pretrained(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_every_text_of_the_corpus_round_trips(tokenizer):
    ids = {token: i for i, token in enumerate(world.SPECIAL + world.OPERATIONS.vocabulary())}
    for _, _, user, assistant in corpus(1500, seed=5):
        for text in (user, assistant):
            encoded = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(encoded) == text and tokenizer.unk_token_id not in encoded
            assert encoded == [ids[p] for p in world.OPERATIONS.pieces(text)]  # the base was trained on these pieces


def test_the_chat_template(tokenizer):
    """One BOS, the assistant's header at the end of the prompt; with the answer, the end of turn follows it and
    nothing else."""
    def encode(*turns, header):
        messages = [{"role": role, "content": text} for role, text in turns]
        return tokenizer.convert_ids_to_tokens(tokenizer.apply_chat_template(messages, add_generation_prompt=header,
            return_dict=False))

    assert encode(("user", "sort then copy:ab"), header=True) == ["<bos>", "<user>", "sort", " then ", "copy", ":",
                                                                  "a", "b", "<assistant>"]
    assert encode(("user", "sort:ba"), ("assistant", "ab"), header=False) == ["<bos>", "<user>", "sort", ":", "b", "a",
        "<assistant>", "a", "b", "<eot>"]
    assert tokenizer.eos_token == "<eot>" and tokenizer.eos_token_id == 5 and tokenizer.pad_token_id == 0
    assert len(tokenizer) == 6 + len(world.OPERATIONS.vocabulary())


def test_pad_is_not_the_end_of_turn(tokenizer):
    """PAD = EOS is how end tokens drop out of losses elsewhere."""
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}) == 4


# ---------------------------------------------------------------------------------------------------------------------
# the base


def test_the_base_is_trained_once_and_named_by_its_constants(capsys):
    small = world.World(steps=2, width=16, layers=1, mlp=32, batch=4)
    first = world.base(small, root="cache")
    assert os.path.dirname(first) == "cache" and "trained the tiny base" in capsys.readouterr().out
    weights = open(f"{first}/model.safetensors", "rb").read()
    other = world.base(dataclasses.replace(small, seed=1), root="cache")
    assert other != first and open(f"{other}/model.safetensors", "rb").read() != weights
    capsys.readouterr()
    assert world.base(small, root="cache") == first and capsys.readouterr().out == ""


def test_training_settings_do_not_retrain_the_base_but_another_language_does():
    """An entry of the registry holds both; only what shapes the base is in its name."""
    small = dataclasses.replace(world.OPERATIONS, steps=1, width=16, layers=1, mlp=32, batch=4)
    first = world.base(small, root="cache")
    assert world.base(dataclasses.replace(small, sppo={"iterations": 9}, lsp={}, judge="x"), root="cache") == first
    ops = world.OPS | {"drop": lambda s: s[1:] or s}
    for other in (dataclasses.replace(small, ops=ops), dataclasses.replace(small, corrupt=0.4),
                  dataclasses.replace(small, ops=world.OPS | {"copy": lambda s: s + s})):
        assert world.base(other, root="cache") != first


@pytest.mark.parametrize("name", world.WORLDS)
def test_an_entry_of_the_registry_is_a_whole_world(name):
    """Judge, queries in disjoint parts, and a setting for every flag that has none by itself."""
    import lsp
    import prefmodel
    import sppo

    entry = world.WORLDS[name]
    assert prefmodel.world_of(entry.judge) is entry
    assert prefmodel.load(entry.judge).preference(["copy:ab"], [["ab", "b"]])[0, 0, 0] == 0.5
    validation, test, parts = entry.divide(2, 30, 20, 25, 0)
    assert [len(x) for x in (validation, test, *parts)] == [20, 25, 30, 30]
    assert len({*validation, *test, *parts[0], *parts[1]}) == 105
    assert entry.divide(2, 30, 20, 25, 1)[:2] == (validation, test)         # whatever the seed
    for loss in sppo.LOSSES:
        settled = sppo.settle(sppo.Settings(world=name, loss=loss))
        nobody = {"magnet", "magnet_every", "max_query_tokens"}                     # plain play, given prompts
        size = nobody | {"eta", "beta"} - entry.sppo_loss[loss].keys()
        assert {field for field, value in dataclasses.asdict(settled).items() if value is None} == size
    for pay in entry.lsp_reward if entry.lsp else ():
        flags = {"grpo": {"mode": "grpo"}, "frozen": {"challenger": "frozen"}}.get(pay, {"challenger_reward": pay})
        assert None not in dataclasses.asdict(lsp.settle(lsp.Settings(world=name, **flags))).values()


def test_a_part_of_a_world_that_has_no_end_of_queries():
    with pytest.raises(ValueError, match="a million queries"):
        world.OPERATIONS.divide(3, 10**6, 1, 1, 0)


def test_the_base_is_reproducible():
    small = world.World(steps=3, width=16, layers=1, mlp=32, batch=4)
    for name in ("a", "b"):
        world.train_base(name, small, "cpu")
    assert open("a/model.safetensors", "rb").read() == open("b/model.safetensors", "rb").read()


def test_an_unwritable_root_is_one_sentence():
    open("file", "w").close()
    with pytest.raises(run.UserError, match="file/out cannot be written"):
        world.base(world.World(steps=0), root="file/out")


def test_the_base_is_an_ordinary_checkpoint(base):
    """transformers opens it and computes the same logits, to float32 rounding."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ours, tokenizer = model.Transformer.from_pretrained(base), transformers.AutoTokenizer.from_pretrained(base)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "sort then reverse:dbca"}],
                                        add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        want, got = theirs(ids).logits, ours.logits(ours(ids))
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_the_briefly_trained_base_has_learned_the_language(base):
    """Its answers end by themselves and are letters: the corpus, the template and the loss on the assistant's tokens
    fit together."""
    net, tokenizer = model.Transformer.from_pretrained(base), transformers.AutoTokenizer.from_pretrained(base)
    given = world.answers(net, tokenizer, world.OPERATIONS.queries("validation", 200), 1)
    assert sum(a.isalpha() and 2 <= len(a) <= 8 for a in given) > 150
    assert 0 <= world.accuracy(world.OPERATIONS, net, tokenizer, world.OPERATIONS.queries("validation", 50), 0) <= 1
