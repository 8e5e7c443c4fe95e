"""A model behind an OpenAI-compatible chat endpoint, asked with patience and by several threads at once.

An endpoint fails in ways that pass: too many requests, a server that restarts, a broken connection, a reply that is cut
short. Such a request is put again after a wait. What waiting does not mend, a wrong key, a wrong name, or a server that
gives no log-probabilities, ends the command with one sentence; what had been answered by then is kept (see replies.py).
Whatever a server sends back, the key stays out of messages and files.
"""

import concurrent.futures
import dataclasses
import http.client
import json
import math
import os
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request

import run
from chat import template_options
from flags import flag


BACKOFF = 1.0       # seconds before the second attempt at a request; doubled for each further one, 60 at most
LONGEST = 16 << 20  # bytes of a reply that are read


@dataclasses.dataclass
class EndpointSettings:
    """Flags of the commands that can put their questions to an endpoint, and to a model that thinks."""
    base_url: str = flag("", "api: an OpenAI-compatible endpoint, key in the environment variable OPENAI_API_KEY "
                             "[https://api.openai.com/v1]")
    workers: int = flag(8, "api: requests under way at once", at_least=1)
    timeout: float = flag(120.0, "api: seconds to wait for a whole reply", above=0, at_most=1e6)
    retries: int = flag(5, "api: further attempts after 429, 5xx, a timeout or a reply that is no reply",
                        at_least=0)
    template_option: str = flag("", "name=value,... for the chat template, such as enable_thinking=true; api: sent "
                                    "as chat_template_kwargs, which vLLM and SGLang know [no thinking, where a "
                                    "checkpoint's template knows enable_thinking]")


class Endpoint:
    """`model` at an address. 429, 5xx, timeouts, broken connections and replies that are no replies are tried again
    (`retries` times, `timeout` seconds each), after a wait that doubles or that Retry-After names.

    flag: the one that named the model, for error messages. settings: an EndpointSettings. The key is taken from the
    environment variable OPENAI_API_KEY. Raises UserError for an address that is none, for a key that is none or missing
    where one is needed, and when a request has failed for good.
    """

    def __init__(self, flag, model, settings):
        base_url = settings.base_url or "https://api.openai.com/v1"
        try:
            parts = urllib.parse.urlsplit(base_url)
        except ValueError:                          # brackets that belong to no IPv6 address
            parts = urllib.parse.urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise run.UserError(f"--base-url {base_url} is no http address; give one such as http://127.0.0.1:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:        # not shown: it may hold a password
            raise run.UserError(f"--base-url of {parts.hostname} holds a user's name, a ? or a #; give the address "
                                "alone, and a key in the environment variable OPENAI_API_KEY")
        self.model, self.url = model, base_url.rstrip("/")
        self.timeout, self.retries = settings.timeout, settings.retries
        self.who = f"{flag} api:{model} at {self.url}"
        self.always = {"model": model}              # what every request says
        if settings.template_option:
            self.always["chat_template_kwargs"] = template_options(settings.template_option)
        self.stopped = threading.Event()            # one request failed for good: the others wait no longer
        self.headers = {"Content-Type": "application/json"}
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key:
            raise run.UserError("OPENAI_API_KEY holds a space or a sign that no key has; set it to the key alone")
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
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
            finish = str(choice.get("finish_reason") or "stop")
            return {"text": self._hidden(content or ""), "finish": self._hidden(finish), **tokens_of(reply)}
        return self._post(options, turns, read)

    def share(self, turns):
        """p(m) / (p(m) + p(M)) for the first token of the next turn, as {p} and the tokens (see `tokens_of`).

        A label that is not among the five likeliest tokens counts with probability 0, and p is None if neither is
        (alpaca_eval's logprob_parser), or if a label's log-probability is no number up to 0. At temperature 1: some
        endpoints report log-probabilities after the temperature.
        Raises UserError at once for a server that answers without log-probabilities: asking again would not help.
        """
        def read(reply):
            p = {"m": 0.0, "M": 0.0}
            for token in self._likeliest(reply["choices"][0]):
                label, logprob = str(token["token"]).strip(), token["logprob"]
                if label in p:
                    known = type(logprob) in (int, float) and -1e9 <= logprob <= 1e-3
                    p[label] += math.exp(logprob) if known else math.nan
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
        for attempt in range(self.retries + 1):
            wait = min(60.0, BACKOFF * 2**attempt)
            try:
                status, reason, asked, text = _within(self.timeout, lambda: self._exchange(body))
                if status < 300:
                    return read(json.loads(text))
                reason = f"HTTP {status} {reason}"
                if status not in (408, 429) and (status < 500 or status in (501, 505)):     # waiting does not mend it
                    reason += " " + " ".join(text.decode("utf-8", "replace").split())
                    break
                if asked.isdecimal():                                       # in seconds; dates are left out
                    wait = max(wait, min(600.0, float(asked)))
            except (OSError, http.client.HTTPException) as error:           # timeouts and connections
                cause = getattr(error, "reason", error)
                reason = str(cause) or type(error).__name__
                if isinstance(cause, ssl.SSLCertVerificationError):
                    break
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                reason = f"a reply that is no chat completion ({type(error).__name__})"
            if attempt == self.retries or self.stopped.wait(wait):
                break
        raise run.UserError(f"{self.who} failed: {self._hidden(reason)[:200]}; check --base-url, the model's name and "
                            "OPENAI_API_KEY, and give the same command to go on where this stopped")

    def _exchange(self, body):
        """One request: (status, its reason, Retry-After, the reply's first LONGEST bytes)."""
        request = urllib.request.Request(f"{self.url}/chat/completions", body, self.headers)
        try:
            response = self.opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:                             # a reply like any other
            response = error
        with response:
            asked = response.headers.get("Retry-After", "").strip()
            try:
                return response.status, response.reason, asked, response.read(LONGEST)
            except (OSError, http.client.HTTPException):
                if response.status < 300:
                    raise
                return response.status, response.reason, asked, b""         # an error without its page

    def _hidden(self, text):
        """What a server says, without the key, should it repeat it: as text that every file can hold. Words that serve
        as keys where none is needed ("none", "EMPTY") stay: a reply may mean them."""
        text = text.encode("utf-8", "replace").decode()                     # half a pair of surrogates becomes "?"
        return text.replace(self.key, "[the key]") if len(self.key) >= 8 else text


def _within(seconds, function):
    """function(), or TimeoutError after so many seconds in all. A socket's timeout is for each read, and a server that
    sends a byte now and then would never meet it. The thread that is given up ends with the program."""
    future = concurrent.futures.Future()

    def work():
        try:
            future.set_result(function())
        except Exception as error:          # raised below, in the thread that waits
            future.set_exception(error)
    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)


def tokens_of(reply):
    """{prompt_tokens, completion_tokens} as an endpoint's `usage` reports them, None where it does not, or absurdly.

    >>> tokens_of({"usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}})
    {'prompt_tokens': 12, 'completion_tokens': 3}
    """
    usage = reply.get("usage") or {}
    names = ("prompt_tokens", "completion_tokens")
    told = {name: usage.get(name) for name in names}
    return {name: n if type(n) is int and 0 <= n < 2**53 else None for name, n in told.items()}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):              # the key is for the address that was named, and for no other
        return None
