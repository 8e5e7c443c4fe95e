"""A model behind an OpenAI-compatible chat endpoint, asked with patience and by several threads at once.

An endpoint fails in ways that pass: too many requests, a server that restarts, a broken connection, a reply that is cut
short. Such a request is put again after a wait. What waiting does not mend, a wrong key or a wrong name, ends the
command with one sentence; what had been answered by then is kept (see replies.py).
"""

import concurrent.futures
import contextlib
import http.client
import json
import math
import os
import threading
import urllib.error
import urllib.parse
import urllib.request

import run


BACKOFF = 1.0       # seconds before the second attempt at a request; doubled for each further one, 60 at most


class Endpoint:
    """`model` at `base_url`. 429, 5xx, timeouts, broken connections and replies that are no replies are tried again
    (`retries` times, `timeout` seconds each), after a wait that doubles or that Retry-After names.

    The key is taken from the environment variable OPENAI_API_KEY. Raises UserError for an address that is none, for a
    missing key where one is needed, and when a request has failed for good.
    """

    def __init__(self, model, base_url, timeout, retries):
        try:
            parts = urllib.parse.urlsplit(base_url)
        except ValueError:                          # brackets that belong to no IPv6 address
            parts = urllib.parse.urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise run.UserError(f"--base-url {base_url} is no http address; give one such as http://127.0.0.1:8000/v1")
        self.model, self.url, self.timeout, self.retries = model, base_url.rstrip("/"), timeout, retries
        self.stopped = threading.Event()            # one request failed for good: the others wait no longer
        self.headers = {"Content-Type": "application/json"}
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        elif parts.hostname == "api.openai.com":      # others may work without: ask them
            raise run.UserError("--judge api: needs a key for api.openai.com; set the environment variable "
                                "OPENAI_API_KEY, or give another --base-url")
        self.opener = urllib.request.build_opener(_NoRedirect)

    def write(self, text, max_tokens):
        """The model's reply to one user turn, decoded greedily: a text."""
        def read(reply):
            content = reply["choices"][0]["message"]["content"]
            if not isinstance(content, str | None):
                raise TypeError("the reply is no text")
            return content or ""
        return self._post({"temperature": 0, "max_tokens": max_tokens}, text, read)

    def share(self, text):
        """p(m) / (p(m) + p(M)) for the first token of the reply, None if neither is among the five likeliest.
        At temperature 1: some endpoints report log-probabilities after the temperature."""
        def read(reply):
            p = {"m": 0.0, "M": 0.0}
            for token in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                if not token["logprob"] <= 1e-3:
                    raise ValueError("a log-probability above 0")
                if token["token"].strip() in p:
                    p[token["token"].strip()] += math.exp(token["logprob"])
            return p["m"] / (p["m"] + p["M"]) if p["m"] + p["M"] > 0 else None
        return self._post({"temperature": 1, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}, text, read)

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

    def _post(self, options, text, read):
        """read(the endpoint's reply to `text`), with as many attempts as it takes."""
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": text}], **options}).encode()
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
            except (ValueError, KeyError, TypeError, IndexError) as error:  # no JSON, or without what was asked for
                what = "no log-probabilities" if "logprobs" in options else "no message"
                reason = f"a reply with {what} ({type(error).__name__})"
            if attempt == self.retries or self.stopped.wait(wait):
                break
        raise run.UserError(f"--judge api:{self.model} at {self.url} failed: {reason[:200]}; check --base-url, the "
                            "model's name and OPENAI_API_KEY, and give the same command to go on where this stopped")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):              # the key is for the address that was named, and for no other
        return None
