"""Prompts and text: prompt files and hub data sets, prompt templates, a checkpoint's tokenizer and chat template.

Two kinds of text meet in a run. A *prompt* is what is to be answered: a person's words, or a conversation that ends
with them (`Prompt`); `read_prompts` takes the layouts that people have, and `divide` shares them out between training,
validation and test. A *turn* is one message of a conversation; `Chat` turns conversations into token ids through the
checkpoint's own chat template, and back. Prompt texts with placeholders, such as the Challenger's or a judge's, are
checked by `read_template` and filled in by `fill`.

Every text here is data, whoever wrote it: `breaker` spoils the marks by which a tokenizer tells turns apart, so that no
text can pose as a turn, a header or an end to whoever reads it.
"""

import contextlib
import glob
import gzip
import json
import math
import os
import re
import signal
import threading
import zlib

import checkpoints
import files
import lora
import model
import run

# Llama 3's later templates write the current date unless they are told one: a prompt, and with it a resumed run, would
# change at midnight. This is the date that they fall back to themselves; templates without one ignore it.
TEMPLATE_DATE = {"date_string": "26 Jul 2024"}


# ---------------------------------------------------------------------------------------------------------------------
# prompts


class Prompt(str):
    """What is to be answered: a conversation, with the columns that stood beside it.

    turns       the user's text, or a list of {"role": "system", "user" or "assistant", "content": text}; a system turn
                comes first if at all, and the user speaks last
    row         dict, the prompt's other columns, such as `answer` or `id`: for whoever checks answers

    As a string it is what a reader of one text sees: the user's words where they are all there is, else every turn
    behind its role. Raises ValueError, saying what is wrong, for turns that are no such conversation.

    >>> talk = Prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], {"id": 7})
    >>> str(talk), talk.turns[-1]["content"], talk.row, Prompt("Why?") == "Why?"
    ('System: Be brief.\\n\\nUser: Why?', 'Why?', {'id': 7}, True)
    """

    def __new__(cls, turns, row=None):
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else [as_turn(turn) for turn in turns]
        roles = [turn["role"] for turn in turns]
        if roles[-1:] != ["user"] or "system" in roles[1:]:
            raise ValueError("a conversation needs a user's turn at its end, and a system turn at its beginning alone")
        # behind its role each, and no content can write such a heading
        text = "\n\n".join(f"{turn['role'].capitalize()}: " + re.sub(r"(?m)^(System|User|Assistant):", r"\1 :",
                                                                     turn["content"]) for turn in turns)
        self = super().__new__(cls, turns[0]["content"] if len(turns) == 1 else text)
        self.turns, self.row = turns, row or {}
        return self


ROLES = {"human": "user", "gpt": "assistant"}               # ShareGPT's names for ours
SYSTEM = ("system", "system_prompt")                        # columns that hold a system turn's text


def as_turn(turn):
    """One message as {"role", "content"}: of that layout, ShareGPT's {"from", "value"}, or OpenAI's list of parts.
    Raises ValueError, saying what is wrong, for anything else."""
    if not isinstance(turn, dict):
        raise ValueError("a turn is no object with role and content")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = ROLES.get(role, role)
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text")) for part in content)
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise ValueError(f"a turn has role {str(role)[:40]!r}; only texts by system, user and assistant can be played")
    return {"role": role, "content": readable(content)}


def readable(text):
    """The text itself. Raises ValueError where no tokenizer reads it, or not within seconds."""
    if len(text) > 4_000_000:                   # about a million tokens
        raise ValueError(f"a text of {len(text):,} characters is longer than any model reads")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, such as \\ud800, is no text") from None
    return text


def turns_of(prompt):
    """A prompt's turns, a list of {"role", "content"}; a plain string is one user turn."""
    return prompt.turns if isinstance(prompt, Prompt) else [{"role": "user", "content": prompt}]


def stored(prompt):
    """What a file's column `prompt` holds: the text, or for a conversation the list of its turns."""
    turns = turns_of(prompt)
    return str(prompt) if len(turns) == 1 else turns


def as_row(prompt):
    """A prompt as a row of a prompts file, which `read_prompts` reads back."""
    return {**getattr(prompt, "row", {}), "prompt": stored(prompt)}


HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+)(?=:))?(?::(.+))?")     # owner/name, /config, :split


def read_prompts(path, flag="--prompts"):
    """Prompts of a local file or a hub data set, in order, duplicates dropped: a list of `Prompt`.

    .jsonl, .json or .parquet rows with `prompt` (a text or a list of messages), GSM8K's `question`, MATH's `problem`,
    `instruction` (+ `input`), `messages`, or ShareGPT's `conversations`, all with what the user says last as the end;
    or plain .txt, one prompt a line; or the hub's owner/name, owner/name:split or owner/name/config:split, where the
    split is `train` unless it is given. Raises UserError, naming the file and the line, for anything else.
    """
    name = path.lower().removesuffix(".gz")
    if name.endswith((".json", ".jsonl")):
        rows = read_rows(flag, path)
    elif name.endswith(".parquet"):
        rows = [(f"row {i}", row) for i, row in enumerate(parquet_rows(path, flag), 1)]
    elif not os.path.exists(path) and not name.endswith(".txt") and HUB.fullmatch(path):
        rows = [(f"row {i}", row) for i, row in enumerate(hub_rows(path, flag), 1)]
    elif os.path.splitext(name)[1] not in ("", ".txt"):
        raise run.UserError(f"{flag} {path} is no .jsonl, .json, .parquet or .txt file; convert it to one of these")
    else:
        lines = enumerate(read_text(flag, path).split("\n"), 1)
        rows = [(f"line {i}", {"prompt": line}) for i, line in lines if line.strip()]
    if not rows:
        raise run.UserError(f"{flag} {path} holds no prompts; give a file with at least one")
    return list(dict.fromkeys(prompt_of(row, flag, path, where) for where, row in rows))


def hub_rows(spec, flag):
    """The rows of a hub data set: owner/name, owner/name:split or owner/name/config:split. Raises UserError, with the
    hub's own first line, where it cannot be had."""
    try:
        import datasets
    except ImportError:
        raise run.UserError(f"{flag} {spec} is no file here, and a hub data set needs `pip install datasets`; "
                            "install it, or give a .jsonl, .json or .txt file") from None
    name, config, split = HUB.fullmatch(spec).groups()
    try:
        return datasets.load_dataset(*([name, config] if config else [name]), split=split or "train")
    except Exception as error:  # the hub's client has a dozen kinds; each means that the data is not to be had
        why = (str(error).strip().splitlines() or ["no reason given"])[0][:200].rstrip(".")
        raise run.UserError(f"{flag} {spec} is no file here, and the hub did not give it ({type(error).__name__}: "
                            f"{why}); check the name, the split and the connection") from None


def parquet_rows(path, flag):
    """The rows of a parquet file, read by pyarrow, which `datasets` brings too. Raises UserError where it cannot."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise run.UserError(f"{flag} {path} is a parquet file, which needs `pip install pyarrow`; install it, or give "
                            "a .jsonl, .json or .txt file") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:      # pyarrow's own errors are ValueErrors
        why = str(error).strip().splitlines()[0][:120]
        raise run.UserError(f"{flag} {path} cannot be read ({why}); make or download it again") from None


def read_text(flag, path):
    """The text of a file, gzipped (.gz) or not. Raises UserError, naming the flag, where it cannot be read."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:    # or no BOM
            return file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or ("not UTF-8 text" if isinstance(error, ValueError) else "damaged")
        raise run.UserError(f"{flag} {path} cannot be read ({reason}); give a text file that can") from None


def read_rows(flag, path, fields={}):
    """[(where, row)] of the objects in a JSON list or one a line (.jsonl). fields: {name: type or types} that every row
    must have. Raises UserError, naming flag, file and row, for anything else."""
    text, rows = read_text(flag, path), []
    lines = path.removesuffix(".gz").endswith(".jsonl") or not text.lstrip().startswith("[")
    for where, piece in [(f"line {i}", p) for i, p in enumerate(text.split("\n"), 1)] if lines else [("entry 1", text)]:
        try:
            rows += [(where, json.loads(piece))] if piece.strip() else []
        except (ValueError, RecursionError) as error:
            raise run.UserError(f"{flag} {path}{f', {where}' if lines else ''}: malformed JSON ({error}); "
                                "mend it, or make or download the file again") from None
    if not lines:
        rows = [(f"entry {i}", row) for i, row in enumerate(rows[0][1], 1)]
    if not rows:
        raise run.UserError(f"{flag} {path} holds no rows; give a .json list of objects, or one a line as .jsonl")
    for where, row in rows:
        if not isinstance(row, dict):
            raise run.UserError(f"{flag} {path}, {where}: no JSON object; mend or remove it")
        for name, kind in fields.items():
            if not isinstance(row.get(name, ...), kind):
                raise run.UserError(f"{flag} {path}, {where}: `{name}` is missing or of the wrong type; "
                                    f"every row needs {', '.join(fields)}")
    return rows


def prompt_of(row, flag, path, where):
    """The Prompt of one row, whatever the layout; the columns that it was not made of go with it."""
    try:
        used, turns = _conversation(row) if isinstance(row, dict) else ((), None)
        if isinstance(turns, str):
            readable(turns)
        if isinstance(turns, list):             # what was answered already is no part of the question
            users = [i for i, turn in enumerate(turns) if as_turn(turn)["role"] == "user"]
            turns = turns[:users[-1] + 1] if users else turns
        if turns and turns_of(Prompt(turns))[-1]["content"].strip():
            return Prompt(turns, {name: value for name, value in row.items() if name not in used and _is_json(value)})
    except ValueError as error:
        raise run.UserError(f"{flag} {path}, {where}: {error}; mend or remove it") from None
    raise run.UserError(f"{flag} {path}, {where}: no prompt found; every row needs a column `prompt`, `instruction`, "
                        "`messages`, `conversations`, `question` or `problem`")


def _is_json(value):
    """Can a column be written to a .jsonl file? Images and dates, which parquet may hold, cannot."""
    try:
        return json.dumps(value) is not None
    except (TypeError, ValueError):
        return False


def _conversation(row):
    """(names of the columns that make a row's prompt, its text or list of messages); None for the last if there is
    none. A system turn may stand in a column of its own."""
    used, turns = _user_turns(row)
    for name in SYSTEM:
        if turns and isinstance(row.get(name), str) and row[name].strip():
            turns = turns if isinstance(turns, list) else [{"role": "user", "content": turns}]
            if as_turn(turns[0])["role"] != "system":
                return (*used, name), [{"role": "system", "content": row[name]}, *turns]
    return used, turns


def _user_turns(row):
    """The same without a system turn's own column. Where `messages` repeat the text in `prompt`, they have it all."""
    messages = row.get("messages")
    if isinstance(row.get("prompt"), str) and isinstance(messages, list) and row["prompt"].strip():
        if row["prompt"] in [turn.get("content") for turn in messages if isinstance(turn, dict)]:
            return ("prompt", "messages"), messages
    for name in ("prompt", "question", "problem"):
        if isinstance(row.get(name), (str, list)) and row[name]:
            return (name,), row[name]
    if isinstance(row.get("instruction"), str):
        extra = row.get("input") or ""
        text = row["instruction"] + ("\n\n" + extra if extra else "") if isinstance(extra, str) else None
        return ("instruction", "input"), text
    for name in ("messages", "conversations"):
        if isinstance(row.get(name), list):
            return (name,), row[name]
    return (), None


def read_sources(names, count):
    """The prompts behind a flag that names one source, or several with commas between for `count` iterations: a list of
    disjoint lists. Raises UserError where a source cannot be read, or where there are fewer than iterations."""
    paths = [names] if os.path.exists(names) else names.split(",")
    if 1 < len(paths) < count:
        raise run.UserError(f"--prompts names {len(paths)} sources for {count} iterations; give one, or one for each")
    sources, seen = [], set()
    for path in paths[:count]:
        sources.append([prompt for prompt in read_prompts(path) if prompt not in seen])
        seen |= set(sources[-1])
    return sources


def divide(sources, count, size, validation, test, seed, held=None):
    """(validation prompts, test prompts, [part 1, ..., part `count`]): disjoint lists, the parts of `size` prompts each
    (0: all there are), from one source or from one for each. held: the first two lists, where a run has them already.
    Raises ValueError, saying what is lacking.

    The held-out prompts do not depend on the seed, so that runs with different seeds are compared on the same ones.
    With a given size, or a source for each part, further parts leave the earlier ones as they are.
    """
    prompts = run.shuffled(sum(sources, []), "held-out prompts")
    held = held or (prompts[:validation], prompts[validation:validation + test])
    away = set(sum(held, []))
    if len(sources) == 1:
        rest = [prompt for prompt in prompts if prompt not in away]
        size = size or len(rest) // count
        train = run.shuffled(rest, seed, "training prompts")
        parts = [train[t * size:(t + 1) * size] for t in range(count)]
    else:
        parts = [run.shuffled([p for p in source if p not in away], seed, "training prompts", t)[:size or None]
                 for t, source in enumerate(sources)]
    short = min(parts, key=len)
    if len(prompts) < validation + test or len(short) < max(size, 1):
        where = "" if len(sources) == 1 else f" (iteration {parts.index(short) + 1}'s own source leaves {len(short)})"
        raise ValueError(f"has {len(prompts)} distinct prompts{where}; {count} iterations of --prompts-per-iteration "
                         f"{size}, --validation-prompts {validation} and --test-prompts {test} need "
                         f"{validation + test + count * max(size, 1)}: lower one")
    return *held, parts


def in_steps(prompts, steps, size, seed, keep_order=False):
    """`steps` lists of `size` prompts, taken from as many passes over the prompts as it needs, each in an order of its
    own; keep_order: the first pass in the order as it is. More steps leave the earlier ones as they are."""
    order, passes = [], math.ceil(steps * size / len(prompts))
    for k in range(passes):
        order += prompts if keep_order and k == 0 else run.shuffled(prompts, seed, "training prompts", k)
    return [order[step * size:(step + 1) * size] for step in range(steps)]


# ---------------------------------------------------------------------------------------------------------------------
# the prompts of a run of sppo.py, which stay what they are when it is resumed


def earlier_session(args, resume):
    """What an earlier session of the run kept: {"initial": pi_1, "iterations": T of every session, "sources": digests,
    "size": prompts of a part}; {} for a new run."""
    path = os.path.join(args.out, "state", "initial.json")
    if not resume or not os.path.exists(path):
        return {}
    with files.restoring(path):
        began = files.read_json(path)
        if not (isinstance(began["initial"], str) and isinstance(began["sources"], list) and isinstance(
                began["size"], int) and all(isinstance(count, int) for count in began["iterations"])):
            raise TypeError
    return began


def digests(sources):
    """A number for each source's prompts, by which a resumed run knows them again."""
    return [run.stream(*map(str, source)) for source in sources or ()]


def shorter_sessions(began, args):
    """The --iterations of earlier sessions of the run, where they were fewer."""
    return [count for count in began.get("iterations", []) if count < args.iterations]


def split_prompts(args, world, sources=None, began={}):
    """(validation, test, [part 1, ..., part T]): disjoint lists of prompts, from `sources` or else from the embedded
    world, an entry of world.WORLDS. args: the settings of sppo.py. A run that goes on with a larger --iterations keeps
    its held-out prompts, and gets further parts."""
    before, now = began.get("sources", []), digests(sources)
    if before != now[:len(before)]:
        raise run.UserError(f"--prompts {args.prompts} has changed since the run began, which would divide it anew; "
                            "give it as it was, or begin another run with --model and the last iter-k")
    same = before == now
    if before and not same and glob.glob(os.path.join(glob.escape(args.out), "state", "sampled-*")):
        raise run.UserError("--resume: further --prompts divide the prompts anew, and an iteration is half sampled; "
                            "give the same --prompts until it is done")
    size = args.prompts_per_iteration or (began.get("size", 0) if same and len(sources or ()) == 1 else 0)
    sizes = args.iterations, size, args.validation_prompts, args.test_prompts, args.seed
    try:
        if world:
            return world.divide(*sizes, shorter_sessions(began, args))
        paths = [os.path.join(args.out, "state", f"{name}.jsonl") for name in ("validation", "test")]
        held = list(map(read_prompts, paths)) if began and all(map(os.path.exists, paths)) else None
        return divide(sources, *sizes, held)
    except ValueError as error:
        more = " in a new run, with --model and the last iter-k" if shorter_sessions(began, args) else ""
        raise run.UserError(f"--prompts {args.prompts} {error}{more}" if sources else str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# prompt texts with placeholders

PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def placeholders(text):
    """The names in curly brackets in a prompt text; {{ and }} stand for plain brackets.

    >>> sorted(placeholders("{{json}} of {query} and {answer}"))
    ['answer', 'query']
    """
    return set(filter(None, PLACEHOLDER.findall(text)))


def fill(text, **values):
    """`text` with {name} replaced by values[name]. One pass: a value that spells out a name stays as it is.

    >>> fill("{{{query}}} -> {answer}", query="{answer}", answer="4")
    '{{answer}} -> 4'
    """
    return PLACEHOLDER.sub(lambda match: values[match[1]] if match[1] else match[0][0], text)


def read_template(flag, path, default, known, needed=None):
    """A prompt text with placeholders: the file's, or `default` where there is none. Raises UserError for names in
    curly brackets that are not among the `known`, and where one of the `needed` (None: of the known) is lacking."""
    text = read_text(flag, path) if path else default
    found, needed = placeholders(text), known if needed is None else needed
    wrong = ([f"lacks {{{name}}}" for name in sorted(set(needed) - found)]
             + [f"has an unknown {{{name}}}" for name in sorted(found - set(known))])
    if wrong:
        raise run.UserError(f"{flag} {path} {' and '.join(wrong)}; names in curly brackets may be "
                            + " ".join(f"{{{name}}}" for name in sorted(known))
                            + ", each where it belongs (plain brackets are written twice)")
    return text


def shortened(text, fits):
    """`text`, cut on the right, a tenth at a time, until fits(text): for texts that are too long for the Solver or a
    judge. Of a conversation that does not fit only the last turn is left, to be cut."""
    if fits(text):
        return text
    text = turns_of(text)[-1]["content"]
    while text and not fits(text):
        text = text[:len(text) - max(1, len(text) // 10)]
    return text


# ---------------------------------------------------------------------------------------------------------------------
# conversations and token ids

MARK = re.compile(r"<[|｜]?/?[\w ▁]+[|｜]?>|<<?/?\w+>>?|\[/?\w+\]")      # <|im_end|>, </s>, <<SYS>>, [/INST]
THINKING = ("<think>", "</think>")


def without_thinking(text):
    """What a model says after it has thought: what follows the last </think>; nothing where a <think> is never closed.

    >>> [without_thinking(text) for text in ("<think>Two and two ...</think>\\n\\n4", "<think>Let me", "4")]
    ['4', '', '4']
    """
    said = text.rpartition(THINKING[1])[2].strip()
    return "" if THINKING[0] in said else said


def breaker(tokenizer):
    """A function text -> text that spoils every mark by which this tokenizer knows a turn, with a space before its last
    character: the special tokens, and what its chat template writes between two turns. What a text spells out then
    stays text when it is encoded.

    For a tokenizer that knows [SEP], "a [SEP] b" becomes "a [SEP ] b".
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()
             if token.special or token.content.startswith(("<|", "<｜"))}       # DeepSeek's have full-width bars
    marks = sorted((added | _template_marks(tokenizer)) - {"", *THINKING}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, marks)) or "(?!)")

    def spoilt(mark):
        return mark[0][:-1] + " " + mark[0][-1] if len(mark[0]) > 1 else " "
    return lambda text: pattern.sub(spoilt, text)


def _template_marks(tokenizer):
    """The marks in a tokenizer's chat template that are no special tokens: [INST] in Mistral's, "USER:" in Vicuna's."""
    lines = []
    for roles in (("user", "assistant", "user", "assistant"), ("system", "user", "assistant")):
        talk = [{"role": role, "content": f"content{i}"} for i, role in enumerate(roles)]
        try:
            with bounded(tokenizer.name_or_path):
                text = tokenizer.apply_chat_template(talk, tokenize=False, **TEMPLATE_DATE)
        except run.UserError:
            raise
        except Exception:   # no template, or one that refuses this talk
            continue
        lines += [line.strip() for piece in re.split(r"content\d", text) for line in piece.split("\n")]
    return set(MARK.findall("\n".join(lines))) | {line for line in lines if line.endswith(":")}


@contextlib.contextmanager
def bounded(path, seconds=5, memory=2**30):
    """A chat template is a stranger's program. Raises UserError where the block takes more seconds of this process's
    time or more bytes than these; on Linux, in the main thread, and nowhere else."""
    if not os.path.exists("/proc/self/statm") or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource

    def out_of_time(number, frame):
        raise TimeoutError(f"not done after {seconds} s")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    if limits[0] == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, limits[1]))
    try:
        yield
    except (TimeoutError, MemoryError):
        raise run.UserError(f"{path}: its chat template takes more than {seconds} seconds or {memory >> 20} MiB for a "
                            "few short turns; mend its chat_template.jinja") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def template_options(text):
    """--template-option's "name=value,name=value" as a dict; a value that is JSON (false, 3) is read as such, and
    True and False too. Raises UserError for anything else.

    >>> template_options("enable_thinking=false,effort=low")
    {'enable_thinking': False, 'effort': 'low'}
    """
    options = {}
    for part in text.split(",") if text else ():
        name, equals, value = part.partition("=")
        if not equals or not name.strip().isidentifier():
            raise run.UserError(f"--template-option {text} is no list of name=value; write it as enable_thinking=false")
        try:
            options[name.strip()] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            options[name.strip()] = value
    return options


class Template:
    """A tokenizer's own chat template: turns to ids, where no turn's text can pose as another turn.

    options: --template-option, whatever names the template knows. Thinking is off unless it is asked for, where the
    template knows `enable_thinking`. A system turn goes into the first user's where there is no place for one.
    Raises UserError, naming `path`, for a template that cannot write a conversation.
    """

    def __init__(self, tokenizer, path, options=""):
        self.tokenizer, self.path, self.plain = tokenizer, path, breaker(tokenizer)
        off = {"enable_thinking": False} if "enable_thinking" in str(tokenizer.chat_template) else {}
        given = template_options(options)
        for name in given:
            if not re.search(rf"\b{name}\b", str(tokenizer.chat_template)):
                raise run.UserError(f"--template-option {name}: the chat template of {path} has no such name; leave it "
                                    "out, or spell it as in its chat_template.jinja")
        if not isinstance(given.get("enable_thinking", False), bool):
            raise run.UserError(f"--template-option {options} has enable_thinking neither true nor false; give one of "
                                "them")
        self.options = TEMPLATE_DATE | off | given
        talk = [{"role": "system", "content": "content0"}, {"role": "user", "content": "content1"}]
        try:
            with bounded(path):
                self.has_system = "content0" in self._render(talk, tokenize=False)
        except run.UserError:
            raise
        except Exception:       # Gemma's raises, and Mistral's wants turns to alternate
            self.has_system = False
        with bounded(path):
            self.opens_thinking = self._written(talk[1:], tokenize=False).rstrip().endswith(THINKING[0])

    def ids(self, turns, header=True):
        """Turns, a list of {"role", "content"}, as a list of ids. header: the assistant's comes last, to be answered
        under. The template writes the BOS, so none is added."""
        return self._written(self._playable(turns), header, tokenizer_kwargs={"verbose": False})

    def ids_of_each(self, conversations):
        """The same for many at once: a list of lists of ids, in 43 microseconds a short text instead of 113."""
        try:
            return self._render([self._playable(turns) for turns in conversations],
                                tokenizer_kwargs={"verbose": False}) if conversations else []
        except Exception:               # one by one: the sentence then names the roles that cannot be written
            return [self.ids(turns) for turns in conversations]

    def _playable(self, turns):
        """Turns that pose as no others, the system's in a place where the template has one."""
        turns = [{"role": turn["role"], "content": self.plain(turn["content"])} for turn in turns]
        if turns[0]["role"] == "system" and not self.has_system:
            system, *turns = turns
            first = next(turn for turn in turns if turn["role"] == "user")
            first["content"] = f"{system['content']}\n\n{first['content']}"
        return turns

    def _written(self, turns, header=True, **how):
        try:
            return self._render(turns, header, **how)
        except Exception as error:      # whatever a template raises, or makes the template language raise
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise run.UserError(f"{self.path}: its chat template cannot write {', '.join(t['role'] for t in turns)} "
                                f"({why}); mend its chat_template.jinja, or such prompts") from None

    def _render(self, turns, header=True, **how):
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=header, return_dict=False, **how,
                                                  **self.options)


class Chat:
    """Text to ids and back through the checkpoint's own tokenizer and chat template. options: see Template.

    Sampled ids are never decoded and encoded again: what was sampled is what is scored. Only judges see text.
    """

    def __init__(self, path, net, options=""):
        import transformers

        self.directory = lora.tokenizer_of(checkpoints.fetch(path))
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.directory)
        except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
            raise run.UserError(f"{path} has no tokenizer that opens ({str(error).splitlines()[0][:120]}); "
                                "put its tokenizer files beside the weights") from None
        if not self.tokenizer.chat_template:
            raise run.UserError(f"the tokenizer of {path} has no chat template; "
                                "add a chat_template.jinja to its directory "
                                "(the base models of a family lack it, their instruct versions have it)")
        if len(self.tokenizer) > net.config.vocab_size:     # the other way round is common: padded embeddings
            raise run.UserError(f"{path}: its tokenizer has {len(self.tokenizer)} tokens, its model only "
                                f"{net.config.vocab_size}; give a tokenizer and weights that belong together")
        stop = net.generation.get("eos_token_id", net.config.raw.get("eos_token_id"))
        stop = set(stop) if isinstance(stop, list) else {stop}
        self.stop_ids = tuple(sorted((stop | {self.tokenizer.eos_token_id}) - {None}))
        self.context, self.vocabulary = net.config.max_positions, net.config.vocab_size
        self.template = Template(self.tokenizer, path, options)
        self.plain = self.template.plain                    # text -> text that poses as no turn
        self.special_ids = set(self.tokenizer.all_special_ids)
        marks = [mark for mark in THINKING if mark in self.tokenizer.all_special_tokens]
        self.thinking_ids = set(self.tokenizer.convert_tokens_to_ids(marks))

    def encode(self, prompt):
        """A prompt, text or `Prompt`, the assistant's header included: list of ids."""
        return self.template.ids(turns_of(prompt))

    def encode_each(self, prompts):
        """`encode` of many prompts, which is faster than one by one."""
        return self.template.ids_of_each([turns_of(prompt) for prompt in prompts])

    def encode_answer(self, prompt, answer):
        """Ids of an answer that is known as text only, its end of turn included once: the conversation goes through the
        template whole, and what follows the prompt's ids is the answer (should a tokenizer merge across that border,
        the answer is encoded by itself)."""
        head = self.encode(prompt)
        ids = self.template.ids([*turns_of(prompt), {"role": "assistant", "content": answer}], header=False)
        ids = (ids[len(head):] if ids[:len(head)] == head
               else self.tokenizer.encode(self.plain(answer), add_special_tokens=False))
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        return ids + [self.tokenizer.eos_token_id] if end is None else ids[:end + 1]

    def room(self, max_prompt_tokens, max_new_tokens, max_total_tokens=0):
        """How many tokens a prompt may have; 0 for a maximum of the prompt or the total = no such bound."""
        return min(max_prompt_tokens or self.context, self.context - max_new_tokens,
                   (max_total_tokens or self.context) - 1)

    def encode_all(self, prompts, max_prompt_tokens, max_new_tokens, max_total_tokens=0):
        """Ids of every prompt. Raises UserError for one that leaves no room to answer:
        truncating it would change the question."""
        room = self.room(max_prompt_tokens, max_new_tokens, max_total_tokens)
        ids = self.encode_each(prompts)
        for p, tokens in zip(prompts, ids):
            if len(tokens) > room:
                raise run.UserError(f"the prompt {p[:40]!r} has {len(tokens)} tokens and only {room} are allowed "
                                    f"(context {self.context}, --max-new-tokens {max_new_tokens}); shorten or remove "
                                    f"it, or change {'--max-prompt-tokens or ' * bool(max_prompt_tokens)}"
                                    "--max-new-tokens")
        return ids

    def that_fit(self, prompts, room, quiet=False):
        """The prompts of at most `room` tokens; prints how many were left out."""
        kept = [p for p, ids in zip(prompts, self.encode_each(prompts)) if len(ids) <= room]
        if len(kept) < len(prompts) and not quiet:
            print(f"left out {len(prompts) - len(kept)} of {len(prompts)} prompts: longer than {room} tokens",
                  flush=True)
        return kept

    def decode(self, tokens):
        """An answer's text, without its end-of-turn token; with its thinking, whose beginning a template may have
        written already."""
        if self.thinking_ids & set(tokens):     # special tokens for some tokenizers: where thinking ends must be seen
            tokens = [i for i in tokens if i in self.thinking_ids or i not in self.special_ids]
            text = self.tokenizer.decode(tokens).strip()
        else:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return THINKING[0] + text if self.template.opens_thinking else text


def load_checkpoint(path, device, dtype, options=""):
    """(network, Chat) of a checkpoint directory or hub id. options: --template-option."""
    net = model.Transformer.from_pretrained(path, device, dtype)
    return net, Chat(path, net, options)


def answer_limit(ids, max_new_tokens, max_total_tokens=0):
    """How many tokens the answer to a prompt's ids may have; max_total_tokens bounds the two together, 0 = no bound."""
    return max(1, min(max_new_tokens, max_total_tokens - len(ids) if max_total_tokens else max_new_tokens))
