"""`cache_from_server`: a teacher cache of the log-probabilities of a running vLLM or SGLang server.

vllm    POST /v1/completions, prompt: lists of ids, prompt_logprobs: k, max_tokens: 1 (older versions reject 0)
sglang  POST /generate, input_ids: lists of ids, return_logprob, logprob_start_len: 0, top_logprobs_num: k

Prompts are sent as ids, so the server tokenizes nothing. The key comes from the environment and goes into the header
Authorization, which is not sent along to another host on a redirect.
"""

from __future__ import annotations

import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdfast.inputs import MOST_ENTRIES
from kdfast.training.cache.description import CacheError, CacheSummary, Description, is_complete, shards
from kdfast.training.cache.formats import Position, check_texts, fit, read_row, rows_in
from kdfast.training.cache.imported import describe, documents_of, encode_row
from kdfast.training.cache.write import check_options, describe_splits, fill, is_count
from kdfast.training.data.tokenizers import count_ids
from kdfast.training.durable import processes

KEYS = ("KDFAST_SERVER_API_KEY", "OPENAI_API_KEY")  # environment variables; the first that is set
PATHS = {"vllm": "/v1/completions", "sglang": "/generate"}
RETRIED = (408, 425, 429, 500, 502, 503, 504, 529)
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before another attempt: doubled each time, unless the server names them


def cache_from_server(
    url: str,
    splits: Mapping[str, Any],
    folder: str | Path,
    *,
    kind: Literal["vllm", "sglang"] = "vllm",
    tokenizer: PreTrainedTokenizerBase,
    k: int = 64,
    dtype: Literal["float16", "float32"] = "float16",
    model: str | None = None,
    batch_size: int = 8,
    concurrency: int = 4,
    timeout: float = 300.0,
    retries: int = 6,
    token_limit: int | None = None,
    shard_tokens: int | None = None,
    name: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> CacheSummary:
    """Make a teacher cache by asking a server for the k most likely ids at every token of `splits`.

    Example:
        cache_from_server("http://localhost:8000", {"train": rows}, "caches/teacher", tokenizer=tokenizer, k=20)

    Servers add the token itself to those k, and it is kept too. The cache serves τ = 1 only, since the mass of the
    other ids is unknown at other temperatures.

    Args:
        url: the server's address, such as "http://localhost:8000". Its key is read from KDFAST_SERVER_API_KEY, or else
            OPENAI_API_KEY.
        splits: name → data set of rows with input_ids to train on, as in `cache_teacher`. Each document of a packed
            row is a prompt of its own.
        folder: the cache's folder. A complete cache is left alone, an interrupted one completed without asking again
            for the shards that exist.
        kind: kind of server.
        tokenizer: the text's. A server that decodes its tokens differently is refused.
        k: 1 to 1023; vLLM allows at most its --max-logprobs, 20 by default.
        dtype: dtype of the log-probabilities.
        model: the server's name for it; None = the first that it serves.
        batch_size: rows per request.
        concurrency: simultaneous requests per process.
        timeout: seconds without a byte after which an attempt has failed.
        retries: further attempts after a failed connection, a timeout, 408, 425, 429 or 5xx. Waits double from 1 to
            60 s, unless Retry-After says otherwise.
        token_limit: stop before sending more prompt tokens than this, failed attempts included; at least a shard's.
            None = no limit.
        shard_tokens, name, tell: as in `cache_teacher`.

    Raises:
        CacheError, a ValueError: the server's answers do not fit, it refuses, or the limit is reached.
        ConnectionError, an OSError: no answer after all attempts. After any of these, complete shards stay, and the
            same call resumes.
    """
    if kind not in PATHS:
        raise ValueError(f"kind={kind!r}; expected 'vllm' or 'sglang'")
    check_options("top_k", k, (), dtype, count_ids(tokenizer))
    for argument, value in {"batch_size": batch_size, "concurrency": concurrency}.items():
        if not is_count(value):
            raise ValueError(f"{argument}={value!r}; expected an int of at least 1")
    if token_limit is not None and not is_count(token_limit):
        raise ValueError(f"token_limit={token_limit!r}; expected an int of at least 1, or None")
    described, shard_sequences = describe_splits(splits, shard_tokens)
    share = None if token_limit is None else token_limit // processes.count()
    complete = is_complete(Path(folder))
    retries = 0 if complete else retries
    server = Server(url, kind, k, tokenizer, timeout=timeout, retries=retries, token_limit=share, tell=tell)

    def find_model() -> dict[str, Any]:
        try:
            return server.find_model(model)
        except ConnectionError:
            source = Description.read(Path(folder)).source if complete else None
            if source is None:
                raise
            return {"id": model or source["model"]}  # nothing is left to ask for

    served = processes.by_first(find_model)
    server.model = served["id"]
    longest = max(len(ids) for split in splits.values() for row in split for ids in documents_of(row))
    if (most := served.get("max_model_len")) is not None and longest + 1 > most:
        raise CacheError(
            f"{server.url}: {server.model!r} has a context of {most} tokens, and a document of the text {longest}, "
            "after which a token is generated. Lower max_length, or start the server with a longer context"
        )
    description = describe(
        {"kind": kind, "url": server.url, "model": server.model, "top_k": k, "whole": True}, name or server.model,
        tokenizer, min(k + 1, MOST_ENTRIES, count_ids(tokenizer)), (), dtype, described, shard_sequences,
    )  # fmt: skip
    if not complete:
        most = max(shard.tokens for split in splits for shard in shards(Path(folder), description, split))
        if share is not None and share < most:
            raise CacheError(
                f"token_limit={token_limit}; expected at least {most * processes.count():.0f}: a shard has {most:.0f} "
                "tokens (shard_tokens), and only complete ones are kept"
            )
        tell(f"{server.url}: {kind} serves {server.model!r}")

    def rows(dataset: Any, within: range) -> Iterator[dict[str, np.ndarray]]:
        batches = [range(i, min(i + batch_size, within.stop)) for i in range(within.start, within.stop, batch_size)]
        yield from server.ask_all(dataset, batches, concurrency, description)

    return fill(Path(folder), splits, description, rows, tell)


class Server:
    """A vLLM or SGLang server that returns the entries of prompts."""

    def __init__(
        self,
        url: str,
        kind: str,
        k: int,
        tokenizer: PreTrainedTokenizerBase,
        *,
        timeout: float,
        retries: int,
        token_limit: int | None,
        tell: Callable[[str], None],
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={_public(url)!r}; expected http://host:port")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                f"url={_public(url)!r} had credentials or a query in it; expected http://host:port, and the key in the "
                f"environment, as {KEYS[0]}"
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.kind, self.k, self.tokenizer, self.model = kind, k, tokenizer, ""
        self.timeout, self.retries, self.token_limit = timeout, retries, token_limit
        self.tell, self.sent, self.checked = tell, 0, False
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "")
        self._opener = urllib.request.build_opener(_NoRedirect)

    def find_model(self, name: str | None) -> dict[str, Any]:
        """Return the server's description of the model `name`, or of its first. Raise CacheError if there is none."""
        answer = self._call("/v1/models", None, 0)
        models = answer.get("data") if isinstance(answer, dict) else None
        found = [one for one in models or () if isinstance(one, dict) and isinstance(one.get("id"), str)]
        names = [one["id"] for one in found]
        if not found or name not in (None, *names):
            raise CacheError(f"{self.url} serves {', '.join(names) or 'no model'}; expected {name or 'one'}")
        return found[0] if name is None else found[names.index(name)]

    def ask_all(
        self, dataset: Any, batches: list[range], concurrency: int, description: Description
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield the encoded entries of each row, in order, with several batches in flight."""
        pool = ThreadPool(concurrency)  # an interrupted run does not wait for its threads
        waiting: deque[AsyncResult[list[dict[str, np.ndarray]]]] = deque()
        try:
            for batch in batches:
                documents = [documents_of(dataset[i]) for i in batch]
                waiting.append(pool.apply_async(self._ask, (documents, batch, description)))
                if len(waiting) > 2 * concurrency:
                    yield from waiting.popleft().get()
            while waiting:
                yield from waiting.popleft().get()
        except BaseException:
            self._stopped.set()
            raise
        finally:
            pool.terminate()

    def _ask(self, rows: list[list[list[int]]], batch: range, description: Description) -> list[dict[str, np.ndarray]]:
        """Return the encoded entries of each row's documents; `batch` has the numbers of the rows."""
        prompts = [ids for row in rows for ids in row]
        look = not self.checked  # only the first answers are decoded, since SGLang takes longer for that
        asked: dict[str, Any] = {"model": self.model, "prompt": prompts, "max_tokens": 1, "temperature": 1.0}
        asked["prompt_logprobs"] = self.k
        if self.kind == "sglang":
            asked = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 1, "temperature": 1.0}}
            asked |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": self.k}
            asked |= {"return_text_in_logprobs": look}
        answers = self._answers(self._call(PATHS[self.kind], asked, sum(map(len, prompts))), len(prompts))
        found = iter([self._entries(answer, ids, look) for answer, ids in zip(answers, prompts, strict=True)])
        self.checked = True
        parts = [[next(found) for _ in row] for row in rows]
        return [
            encode_row(x, f"{self.url}, for row {i} of the text", description)
            for i, x in zip(batch, parts, strict=True)
        ]

    def _answers(self, answer: Any, count: int) -> list[Any]:
        """Return the answers to `count` prompts, in order."""
        answers: Any
        if self.kind == "sglang":
            answers = answer if isinstance(answer, list) else [answer]
        else:
            answers = answer.get("choices") if isinstance(answer, dict) else None
            if isinstance(answers, list) and all(isinstance(one, dict) for one in answers):
                answers = sorted(answers, key=lambda one: one.get("index", 0))
                if [one.get("index", i) for i, one in enumerate(answers)] != list(range(len(answers))):
                    answers = None
        if not isinstance(answers, list) or len(answers) != count:
            raise CacheError(
                f"{self.url} answered {count} prompts with {_line(json.dumps(answer))}; expected an answer to each"
            )
        return answers

    def _entries(self, answer: Any, ids: list[int], look: bool) -> list[Position | None]:
        where = f"{self.url}, asked for the log-probabilities of {len(ids)} tokens"
        (row,) = rows_in(answer, where)
        names = ("prompt_logprobs",) if self.kind == "vllm" else ("input_top_logprobs", "input_token_logprobs")
        if any(not row.get(name) for name in names):
            raise CacheError(f"{where}, answered without {' or '.join(names)}; expected a {self.kind} server")
        given = {name: row[name] for name in names}
        listed = read_row({**given, "input_ids": ids}, where, self.tokenizer)
        tokens, positions = fit(listed, where)
        if tokens != ids:
            raise CacheError(f"{where}, answered for other tokens: {_line(str(tokens))} for {_line(str(ids))}")
        if look:
            check_texts(listed, self.url, self.tokenizer)
        return [*positions[1:], None]

    def _call(self, path: str, asked: dict[str, Any] | None, tokens: int) -> Any:
        """Return the JSON of an answer, after up to `retries` further attempts."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if asked is None else json.dumps(asked).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        for attempt in range(self.retries + 1):
            self._count(tokens)
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                with error:
                    text = self._hide(_message(error))
                if error.code not in RETRIED:
                    raise CacheError(self._refused(error.code, text)) from None
                problem, wait = f"{error.code}, {text}", _retry_after(error.headers.get("Retry-After"))
            except (OSError, HTTPException, ValueError) as error:  # truncated, late, or not JSON
                problem, wait = self._hide(f"{type(error).__name__}: {error}"), None
            if attempt < self.retries:
                if attempt == 1:  # a server that is asked too often answers the second time
                    left = f"{self.retries - 1} more attempts follow, further and further apart"
                    self.tell(f"{self.url}{path}: no answer yet: {_line(problem)}; {left}")
                wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1) if wait is None else wait
                if _pause(self._stopped, wait):
                    raise CacheError(f"{self.url}: stopped")
        raise ConnectionError(f"{self.url}{path}: no answer in {self.retries + 1} attempts; the last: {_line(problem)}")

    def _count(self, tokens: int) -> None:
        with self._lock:
            if self.token_limit is not None and self.sent + tokens > self.token_limit:
                raise CacheError(
                    f"token_limit={self.token_limit} is reached: {self.sent} prompt tokens have been sent, and the "
                    f"next request has {tokens}. Shards that are complete stay; the same call resumes after them"
                )
            self.sent += tokens

    def _hide(self, text: str) -> str:
        """Return a server's text without the key, which some servers repeat."""
        return text.replace(self._key, "…") if self._key else text

    def _refused(self, code: int, text: str) -> str:
        what = f"{self.url} refuses: {code}, {_line(text)}"
        if code in (401, 403):
            return f"{what}. Set {KEYS[0]} in the environment" + ", which has another key" * bool(self._key)
        if code == 404:
            return f"{what}. Expected the address of a {self.kind} server"
        if 300 <= code < 400:
            return f"{what}. It redirects; name the address that it leads to"
        if "max allowed" in text:
            return f"{what}. Start the server with --max-logprobs {self.k}, or lower cache_top_k"
        if "context length" in text:
            return f"{what}. Lower max_length, or start the server with a longer context"
        return what


def _pause(stopped: threading.Event, seconds: float) -> bool:
    """Wait; return whether an error elsewhere ended the wait."""
    return stopped.wait(seconds)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _public(url: str) -> str:
    """Return an address without its possible secrets."""
    return url.rpartition("@")[2].partition("?")[0].partition("#")[0]


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}…"


def _message(error: urllib.error.HTTPError) -> str:
    """Return a server's error message: from its JSON, or the beginning of its page."""
    try:
        text = error.read(100_000).decode(errors="replace")
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        said = json.loads(text)
        said = said.get("error", said)
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, AttributeError, KeyError, TypeError):
        return _line(text) or str(error.reason)


def _retry_after(given: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; at most 10 minutes."""
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(given) - datetime.now(timezone.utc)).total_seconds()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), 600.0)
