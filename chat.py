"""Prompts and text: prompt files and hub data sets, prompt templates, a checkpoint's tokenizer and chat template.

Three kinds of text meet in a run. A *prompt* is what a person wrote and a file holds; `read_prompts` takes the layouts
that people have. A *table* holds prompts with their answers and a judge's verdicts, and is what the phases of SPPO hand
on to each other. A *turn* is a prompt or an answer inside a conversation; `Chat` turns it into token ids through the
checkpoint's own chat template, and back. Prompt texts with placeholders, such as the Challenger's or a judge's, are
checked by `read_template` and filled in by `fill`.
"""

import gzip
import json
import os
import re
import zlib

import torch

import kernels
import model
import run

# Llama 3's later templates write the current date unless they are told one: a prompt, and with it a resumed run, would
# change at midnight. This is the date that they fall back to themselves; templates without one ignore it.
TEMPLATE_DATE = {"date_string": "26 Jul 2024"}


# ---------------------------------------------------------------------------------------------------------------------
# prompt files


def read_prompts(path, flag="--prompts"):
    """Prompts of a local file or a hub data set, in order, duplicates dropped: a list of strings.

    .jsonl or .json rows with `prompt` (GSM8K's `question`, MATH's `problem`), or `instruction` (+ `input`), or
    `messages` (the last user turn); or plain .txt, one prompt a line; or the hub's owner/name, the same columns in its
    split `train`. Raises UserError, naming the file and the line, for anything else.
    """
    name = path.removesuffix(".gz")
    if not os.path.exists(path) and path.count("/") == 1 and not name.endswith((".jsonl", ".json", ".txt")):
        rows = enumerate(hub_rows(path, flag), 1)
        return list(dict.fromkeys(prompt_of(row, flag, path, f"row {i}") for i, row in rows))
    if name.endswith((".json", ".jsonl")):
        prompts = [prompt_of(row, flag, path, where) for where, row in read_rows(flag, path)]
    else:
        prompts = [line for line in read_text(flag, path).split("\n") if line.strip()]
    if not prompts:
        raise run.UserError(f"{flag} {path} holds no prompts; give a file with at least one")
    return list(dict.fromkeys(prompts))


def hub_rows(name, flag):
    """The rows of a hub data set's split `train`. Raises UserError where it cannot be had."""
    try:
        import datasets
    except ImportError:
        raise run.UserError(f"{flag} {name} is no file here, and a hub data set needs `pip install datasets`; "
                            "install it, or give a .jsonl, .json or .txt file") from None
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub's client has a dozen kinds; each means that the data is not to be had
        raise run.UserError(f"{flag} {name} is no file here, and the hub did not give it ({type(error).__name__}); "
                            "check the name and the connection") from None


def read_text(flag, path):
    """The text of a file, gzipped (.gz) or not. Raises UserError, naming the flag, where it cannot be read."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
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
        except ValueError as error:
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
    """The prompt of one row, whatever the layout."""
    if isinstance(row, dict):
        known = next((row[k] for k in ("prompt", "question", "problem") if isinstance(row.get(k), str)), None)
        if known is not None:
            prompt = known
        elif isinstance(row.get("instruction"), str):
            extra = row.get("input") or ""
            prompt = row["instruction"] + ("\n\n" + extra if extra else "") if isinstance(extra, str) else None
        else:
            turns = row.get("messages") if isinstance(row.get("messages"), list) else []
            prompt = next((m.get("content") for m in reversed(turns)
                           if isinstance(m, dict) and m.get("role") == "user"), None)
        if isinstance(prompt, str) and prompt.strip():
            return prompt
    raise run.UserError(f"{flag} {path}, {where}: no prompt found; "
                        "every row needs a column `prompt`, `instruction`, `messages`, `question` or `problem`")


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


def divide(sources, count, size, validation, test, seed):
    """(validation prompts, test prompts, [part 1, ..., part `count`]): disjoint lists, the parts of `size` prompts each
    (0: all there are), from one source or from one for each. Raises ValueError, saying what is lacking.

    The held-out prompts do not depend on the seed, so that runs with different seeds are compared on the same ones.
    """
    prompts = run.shuffled(sum(sources, []), "held-out prompts")
    held = validation + test
    if len(sources) == 1:
        size = size or (len(prompts) - held) // count
        train = run.shuffled(prompts[held:], seed, "training prompts")
        parts = [train[t * size:(t + 1) * size] for t in range(count)]
    else:
        away = set(prompts[:held])
        parts = [run.shuffled([p for p in source if p not in away], seed, "training prompts", t)[:size or None]
                 for t, source in enumerate(sources)]
    short = min(parts, key=len)
    if len(prompts) < held or len(short) < max(size, 1):
        where = "" if len(sources) == 1 else f" (iteration {parts.index(short) + 1}'s own source leaves {len(short)})"
        raise ValueError(f"has {len(prompts)} distinct prompts{where}; {count} iterations of --prompts-per-iteration "
                         f"{size}, --validation-prompts {validation} and --test-prompts {test} need "
                         f"{held + count * max(size, 1)}: lower one")
    return prompts[:validation], prompts[validation:held], parts


# ---------------------------------------------------------------------------------------------------------------------
# the table: prompts, answers, verdicts, one row a prompt, as .jsonl in the columns of the official SPPO code's tables
#
#   before judging   prompt; generate_0 ... generate_{K-1}: conversations [{role: user}, {role: assistant}];
#                    ours also hold what text loses: prompt_ids, tokens (ids as sampled), finish ("stop" or "length")
#   after judging    probability [K][K], P(i > j); rm_scores [K]; chosen, rejected: the conversations of the best and
#                    the worst; chosen_probs = P(best > worst); chosen_probs_win, chosen_probs_lose = Phat of the two
#
# The official training table has the last five columns alone.

VERDICTS = ("probability", "rm_scores", "chosen", "rejected", "chosen_probs", "chosen_probs_win", "chosen_probs_lose")


def answer_texts(row):
    """The K answers of a table's row, as text."""
    count = sum(name.startswith("generate_") for name in row)
    return [row[f"generate_{k}"][-1]["content"] for k in range(count)]


def verdict_columns(row, P):
    """The columns that judging adds to a row: P [K, K] float32, P[i, k] = P(y_i > y_k | x) -> dict.

    rm_scores, by which the official code ranks, is the mean log-odds of P over the opponents (each between -13.8 and
    13.8, where float32 probabilities end): with the aggregate estimator PairRM's score s_i.
    """
    wins = kernels.phat(P)                                                      # [K]  Phat(y_i > pi_t | x)
    best, worst = kernels.best_and_worst(wins)
    return {"probability": P.tolist(), "rm_scores": P.logit(1e-6).mean(-1).tolist(),
            "chosen": row[f"generate_{best}"], "rejected": row[f"generate_{worst}"],
            "chosen_probs": float(P[best, worst]),
            "chosen_probs_win": float(wins[best]), "chosen_probs_lose": float(wins[worst])}


def readable_row(row):
    """A judged row for a person to read: prompt, answers, and their Phats."""
    talks, wins = [row["chosen"], row["rejected"]], [row["chosen_probs_win"], row["chosen_probs_lose"]]
    texts = answer_texts(row) or [talk[-1]["content"] for talk in talks]
    if "probability" in row:
        wins = kernels.phat(torch.tensor(row["probability"])).tolist()
    return {"prompt": row["prompt"], "responses": texts, "phat": [round(p, 4) for p in wins]}


def read_table(path, judged=False, all_responses=False):
    """The rows of a table: this file's, or the official code's columns `generate_k`, or `chosen` and `rejected`.

    judged: they must hold a judge's verdicts too. Raises UserError, naming file and line, for what cannot be used.
    """
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise run.UserError(f"--table {path} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'}); "
                        "give the .jsonl that --stage sample or judge wrote") from None
    for i, line in enumerate(lines):
        try:
            if line.strip():
                rows.append(_table_row(json.loads(line), judged, all_responses))
                if len(answer_texts(rows[-1])) != len(answer_texts(rows[0])):
                    raise ValueError("every row needs as many answers as the first")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise run.UserError(f"--table {path}, line {i + 1}: {_reason(error, judged)}") from None
    if not rows:
        raise run.UserError(f"--table {path} holds no rows; give the .jsonl that --stage sample or judge wrote")
    return rows


def _table_row(row, judged, all_responses):
    """The row, checked: conversations as lists of two messages, `prompt` and the verdicts filled in where they follow
    from the rest."""
    K = sum(name.startswith("generate_") for name in row)
    if "prompt" not in row:
        row["prompt"] = row["generate_0" if K else "chosen"][0]["content"]
    for name in [f"generate_{k}" for k in range(K)] + [n for n in ("chosen", "rejected") if n in row]:
        if isinstance(row[name], str):
            row[name] = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
        user, assistant = row[name]                         # one turn each: what else would the answer be an answer to?
        if ((user["role"], assistant["role"]) != ("user", "assistant") or user["content"] != row["prompt"]
                or not isinstance(row["prompt"], str) or not isinstance(assistant["content"], str)):
            raise TypeError
    if not judged:
        row["generate_0"]
    elif all_responses:
        row["probability"]
    if "probability" in row:
        P = torch.tensor(row["probability"], dtype=torch.float32)
        if P.shape != (K, K) or not ((P >= 0) & (P <= 1)).all():
            raise ValueError(f"probability is no {K} x {K} matrix of numbers in [0, 1]")
        row |= {name: value for name, value in verdict_columns(row, P).items() if name not in row}
    for name in ("chosen_probs_win", "chosen_probs_lose") if judged else ():
        row["chosen"], row["rejected"]
        if not isinstance(row[name], (int, float)) or not 0 <= row[name] <= 1:
            raise ValueError(f"{name} {row[name]} is not in [0, 1]")
    return row


def _reason(error, judged):
    if isinstance(error, KeyError) and judged and error.args[0] in ("probability", "chosen", "chosen_probs_win"):
        return f"no column {error.args[0]}; judge the table first (--stage judge)"
    if isinstance(error, KeyError):
        return f"no column {error.args[0]}; a table has prompt and generate_0 ..., or chosen and rejected"
    if isinstance(error, json.JSONDecodeError):
        return f"malformed JSON ({error.msg}); mend or remove the line"
    return f"{error}; make the table again" if type(error) is ValueError else (
        "prompt must be a text, and generate_k, chosen and rejected one user turn with that prompt and one assistant "
        "turn, as a list of {role, content} (or the answer's text alone); make the table again")


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
    judge."""
    while text and not fits(text):
        text = text[:len(text) - max(1, len(text) // 10)]
    return text


# ---------------------------------------------------------------------------------------------------------------------
# conversations and token ids


class Chat:
    """Text to ids and back through the checkpoint's own tokenizer and chat template.

    Sampled ids are never decoded and encoded again: what was sampled is what is scored. Only judges see text.
    """

    def __init__(self, path, net):
        import transformers

        directory = model.fetch(path)
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
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
        self.context = net.config.max_positions
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")

    def plain(self, text):
        """`text` with a space for every special token that is spelt out in it, so that what a model wrote cannot pose
        as another turn when it is encoded again."""
        return self.special.sub(" ", text)

    def encode(self, prompt):
        """One user turn, the assistant's header included: list of ids.
        The template writes the BOS, so none is added."""
        return self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}],
                                                  add_generation_prompt=True, return_dict=False,
                                                  **TEMPLATE_DATE)

    def encode_answer(self, prompt, answer):
        """Ids of an answer that is known as text only, its end of turn included once: the conversation goes through the
        template whole, and what follows the prompt's ids is the answer (should a tokenizer merge across that border,
        the answer is encoded by itself)."""
        head = self.encode(prompt)
        talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = self.tokenizer.apply_chat_template(talk, return_dict=False, **TEMPLATE_DATE)
        ids = (ids[len(head):] if ids[:len(head)] == head
               else self.tokenizer.encode(answer, add_special_tokens=False))
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
        ids = [self.encode(p) for p in prompts]
        for p, tokens in zip(prompts, ids):
            if len(tokens) > room:
                raise run.UserError(f"the prompt {p[:40]!r} has {len(tokens)} tokens and only {room} are allowed "
                                    f"(context {self.context}, --max-new-tokens {max_new_tokens}); "
                                    "shorten or remove it, or change --max-prompt-tokens or --max-new-tokens")
        return ids

    def that_fit(self, prompts, room, quiet=False):
        """The prompts of at most `room` tokens; prints how many were left out."""
        kept = [p for p in prompts if len(self.encode(p)) <= room]
        if len(kept) < len(prompts) and not quiet:
            print(f"left out {len(prompts) - len(kept)} of {len(prompts)} prompts: longer than {room} tokens",
                  flush=True)
        return kept

    def decode(self, tokens):
        """An answer's text, without its end-of-turn token."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def load_checkpoint(path, device, dtype):
    """(network, Chat) of a checkpoint directory or hub id."""
    net = model.Transformer.from_pretrained(path, device, dtype)
    return net, Chat(path, net)
