"""A model behind an OpenAI-compatible chat endpoint, asked with patience and by several threads at once.

An endpoint fails in ways that pass: too many requests, a server that restarts, a broken connection, a reply that is cut
short. Such a request is put again after a wait. What waiting does not mend, a wrong key, a wrong name, or a server that
gives no log-probabilities, ends the command with one sentence; what had been answered by then is kept (see replies.py).
"""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import math
import os
import threading
import urllib.error
import urllib.parse
import urllib.request

import run
from chat import template_options


BACKOFF = 1.0       # seconds before the second attempt at a request; doubled for each further one, 60 at most


@dataclasses.dataclass
class EndpointSettings:
    """Flags of the commands that can put their questions to an endpoint, and to a model that thinks."""
    base_url: str = run.flag("", "api: an OpenAI-compatible endpoint, key in the environment variable OPENAI_API_KEY "
                                 "[https://api.openai.com/v1]")
    workers: int = run.flag(8, "api: requests under way at once", at_least=1)
    timeout: float = run.flag(120.0, "api: seconds to wait for a reply", above=0)
    retries: int = run.flag(5, "api: further attempts after 429, 5xx, a timeout or a reply that is no reply",
                            at_least=0)
    template_option: str = run.flag("", "name=value,... for the chat template, such as enable_thinking=true; api: sent "
                                        "as chat_template_kwargs, which vLLM and SGLang know [no thinking, where a "
                                        "checkpoint's template knows enable_thinking]")


class Endpoint:
    """`model` at an address. 429, 5xx, timeouts, broken connections and replies that are no replies are tried again
    (`retries` times, `timeout` seconds each), after a wait that doubles or that Retry-After names.

    flag: the one that named the model, for error messages. settings: an EndpointSettings. The key is taken from the
    environment variable OPENAI_API_KEY. Raises UserError for an address that is none, for a missing key where one is
    needed, and when a request has failed for good.
    """

    def __init__(self, flag, model, settings):
        base_url = settings.base_url or "https://api.openai.com/v1"
        try:
            parts = urllib.parse.urlsplit(base_url)
        except ValueError:                          # brackets that belong to no IPv6 address
            parts = urllib.parse.urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise run.UserError(f"--base-url {base_url} is no http address; give one such as http://127.0.0.1:8000/v1")
        self.model, self.url = model, base_url.rstrip("/")
        self.timeout, self.retries = settings.timeout, settings.retries
        self.who = f"{flag} api:{model} at {self.url}"
        self.always = {"model": model}              # what every request says
        if settings.template_option:
            self.always["chat_template_kwargs"] = template_options(settings.template_option)
        self.stopped = threading.Event()            # one request failed for good: the others wait no longer
        self.headers = {"Content-Type": "application/json"}
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        elif parts.hostname == "api.openai.com":      # others may work without: ask them
            raise run.UserError(f"{flag} api:{model} needs a key for api.openai.com; set the environment variable "
                                "OPENAI_API_KEY, or give another --base-url")
        self.opener = urllib.request.build_opener(_NoRedirect)

    def write(self, turns, max_tokens, temperature=0.0, top_p=1.0, seed=None):
        """The model's next turn in a conversation, a list of {"role", "content"}: {text, finish} and the tokens (see
        `tokens_of`). finish: the endpoint's finish_reason, "stop" or "length" or a word of its own. The seed is sent
        where something is drawn, as far as the endpoint heeds it."""
        options = {"temperature": temperature, "max_tokens": max_tokens}
        if top_p < 1:
            options["top_p"] = top_p
        if seed is not None and temperature > 0:
            options["seed"] = seed % 2**31

        def read(reply):
            choice = reply["choices"][0]
            content = choice["message"]["content"]
            if not isinstance(content, str | None):
                raise TypeError("the reply is no text")
            return {"text": content or "", "finish": str(choice.get("finish_reason") or "stop"), **tokens_of(reply)}
        return self._post(options, turns, read)

    def share(self, turns):
        """p(m) / (p(m) + p(M)) for the first token of the next turn, as {p} and the tokens (see `tokens_of`).

        A label that is not among the five likeliest tokens counts with probability 0, and p is None if neither is
        (alpaca_eval's logprob_parser). At temperature 1: some endpoints report log-probabilities after the temperature.
        Raises UserError at once for a server that answers without log-probabilities: asking again would not help.
        """
        def read(reply):
            p = {"m": 0.0, "M": 0.0}
            for token in self._likeliest(reply["choices"][0]):
                if not token["logprob"] <= 1e-3:
                    raise ValueError("a log-probability above 0")
                label = token["token"].strip()
                if label in p:
                    p[label] += math.exp(token["logprob"])
            both = p["m"] + p["M"]
            return {"p": p["m"] / both if both > 0 else None, **tokens_of(reply)}
        return self._post({"temperature": 1, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}, turns, read)

    def _likeliest(self, choice):
        """The candidates for a reply's first token, [{token, logprob}]; none where the reply is empty or withheld."""
        choice["message"]                           # a reply without one is no reply: it is asked for again
        if choice.get("finish_reason") == "content_filter":
            return []
        tokens = (choice.get("logprobs") or {}).get("content")
        if tokens == []:
            return []
        if not tokens or not tokens[0].get("top_logprobs"):
            raise run.UserError(f"{self.who} answers without log-probabilities, which --mode pairwise reads; give an "
                                "endpoint that reports top_logprobs, --judge model:PATH, or --mode arena")
        return tokens[0]["top_logprobs"]

    def ask_all(self, put, numbers, workers):
        """Yields [(number, put(number))] as they come, `workers` under way at once. After a failure no new request
        begins, what is under way is still yielded, and then the failure is raised."""
        failure = None
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(put, n): n for n in numbers}

            def give_up():
                self.stopped.set()
                for future in futures:  # not pool.shutdown: as_completed would wait for ever for what that cancels
                    future.cancel()

            try:
                for future in concurrent.futures.as_completed(futures):
                    if not future.cancelled() and future.exception() is None:
                        yield [(futures[future], future.result())]
                    elif failure is None:
                        failure = future.exception()
                        give_up()
            finally:                    # interrupted: what has not begun will not
                give_up()
        if failure is not None:
            raise failure

    def _post(self, options, turns, read):
        """read(the endpoint's reply to the conversation), with as many attempts as it takes."""
        body = json.dumps({**self.always, "messages": turns, **options}).encode()
        request = urllib.request.Request(f"{self.url}/chat/completions", body, self.headers)
        for attempt in range(self.retries + 1):
            wait = min(60.0, BACKOFF * 2**attempt)
            try:
                with self.opener.open(request, timeout=self.timeout) as response:
                    return read(json.load(response))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code not in (408, 429) and error.code < 500:       # waiting does not mend it
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        reason += f" {' '.join(error.read(300).decode('utf-8', 'replace').split())}"
                    break
                asked = error.headers.get("Retry-After", "").strip()
                if asked.isdecimal():                                       # in seconds; dates are left out
                    wait = max(wait, min(600.0, float(asked)))
            except (OSError, http.client.HTTPException) as error:           # timeouts and connections
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                reason = f"a reply that is no chat completion ({type(error).__name__})"
            if attempt == self.retries or self.stopped.wait(wait):
                break
        raise run.UserError(f"{self.who} failed: {reason[:200]}; check --base-url, the model's name and "
                            "OPENAI_API_KEY, and give the same command to go on where this stopped")


def tokens_of(reply):
    """{prompt_tokens, completion_tokens} as an endpoint's `usage` reports them, None where it does not.

    >>> tokens_of({"usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}})
    {'prompt_tokens': 12, 'completion_tokens': 3}
    """
    usage = reply.get("usage") or {}
    names = ("prompt_tokens", "completion_tokens")
    return {name: usage.get(name) if type(usage.get(name)) is int else None for name in names}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):              # the key is for the address that was named, and for no other
        return None
