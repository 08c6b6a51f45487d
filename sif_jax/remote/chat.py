"""A client of OpenAI-compatible chat endpoints: messages in, what the reply says out (io).

Requests run beside each other up to a limit; each has a time limit from connecting to its last byte; what fails and may
pass is asked again. A reply that the caller cannot read is a failed attempt too, so only readable replies are kept on disk.
One call takes at most (retries + 1) × timeout_s + retries × (max_wait_s + backoff_s) once it has a place.

The key stands in the Authorization header alone. Failures are told by a short reason, never by a server's or a library's
words, which may repeat what was sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

import httpx

from sif_jax.config import RemoteConfig
from sif_jax.errors import InputError
from sif_jax.remote.account import Account
from sif_jax.remote.cache import ReplyCache
from sif_jax.remote.retry import backoff_s, is_passing, retry_after_s

MAX_REPLY_BYTES = 2**20
PLACEHOLDER_KEY_CHARS = 16  # shorter keys, as "EMPTY" for a local server, are no secret and may stand in a reply

Reading = TypeVar("Reading")
Message = Mapping[str, Any]


class CallError(Exception):
    """A call that failed, by its reason: timeout, connection, http_429, …"""

    def __init__(self, reason: str, *, may_pass: bool = True, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.may_pass, self.retry_after_s = reason, may_pass, retry_after_s


class CapError(InputError):
    """The tokens or the money that may be spent are spent."""


class Reply(NamedTuple):
    text: str
    usage: tuple[int, int] | None  # prompt and completion tokens, if the endpoint counts them


class ChatClient:
    def __init__(self, config: RemoteConfig) -> None:
        self.account = Account()
        self._config = config
        self._key = _read_key(config)
        self._cache = ReplyCache(config.cache, config.base_url)
        logging.getLogger("httpcore").setLevel(
            logging.WARNING
        )  # at DEBUG it logs what servers say, which may be the key
        logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs a line per request
        self._slots = asyncio.Semaphore(config.concurrency)
        try:
            self._http = httpx.AsyncClient(
                base_url=config.base_url,
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                timeout=None,  # asyncio.timeout bounds the whole request; httpx would bound each read
                limits=httpx.Limits(max_connections=config.concurrency),
            )
        except httpx.InvalidURL:
            raise InputError("not a URL", value=config.base_url, expected="such as http://localhost:8000/v1") from None

    async def ask(self, messages: Sequence[Message], read: Callable[[str], Reading]) -> Reading:
        """What `read` makes of the model's reply; it raises CallError where a reply will not do.

        Raises:
          CallError: the last attempt failed.
          CapError: a cap leaves nothing to spend; nothing was sent.
        """
        attempt = 0
        while True:
            async with self._slots:
                try:
                    return await self._attempt(messages, read)
                except CallError as failure:
                    wait_s = self._wait_s(failure, attempt)
                    if wait_s is None:
                        self.account.fail(failure.reason)
                        raise
            attempt += 1
            self.account.retries += 1
            await asyncio.sleep(wait_s)

    async def close(self) -> None:
        await self._http.aclose()

    async def _attempt(self, messages: Sequence[Message], read: Callable[[str], Reading]) -> Reading:
        body = self._body(messages)
        kept = self._cache.find(body)
        if kept is not None:
            reading = read(kept)
            self.account.cached += 1
            return reading
        self._check_cap()
        reply = await self._send(body)
        if reply.usage:
            self.account.charge(*reply.usage, self._config)
        reading = read(reply.text)
        self._cache.keep(body, reply.text)
        return reading

    def _body(self, messages: Sequence[Message]) -> bytes:
        fields = {"model": self._config.model, "messages": messages, **self._config.options}
        return json.dumps(fields, sort_keys=True).encode()

    async def _send(self, body: bytes) -> Reply:
        self.account.calls += 1
        try:
            async with asyncio.timeout(self._config.timeout_s):
                reply = read_reply(await self._post(body))
        except TimeoutError:
            raise CallError("timeout") from None
        except httpx.RequestError:
            raise CallError("connection") from None
        if self._key and len(self._key) >= PLACEHOLDER_KEY_CHARS and self._key in reply.text:
            raise CallError("key_in_reply", may_pass=False)
        if reply.usage is None and (self._config.max_cost or self._config.max_total_tokens):
            raise CapError("the endpoint reports no usage, so a cap cannot be kept", fix="set the caps to null")
        return reply

    async def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        async with self._http.stream("POST", "chat/completions", content=body, headers=headers) as response:
            if response.status_code != 200:
                wait_s = retry_after_s(response.headers.get("Retry-After"), datetime.now(UTC))
                reason, may_pass = f"http_{response.status_code}", is_passing(response.status_code)
                raise CallError(reason, may_pass=may_pass, retry_after_s=wait_s)
            reply = bytearray()
            async for chunk in response.aiter_bytes():
                reply += chunk
                if len(reply) > MAX_REPLY_BYTES:
                    raise CallError("reply_too_long")
            return bytes(reply)

    def _wait_s(self, failure: CallError, attempt: int) -> float | None:
        """None: not to be asked again."""
        if not failure.may_pass or attempt >= self._config.retries:
            return None
        if failure.retry_after_s is None:
            return backoff_s(attempt, self._config)
        if failure.retry_after_s > self._config.max_wait_s:
            return None
        return failure.retry_after_s + self._config.backoff_s * random.random()

    def _check_cap(self) -> None:
        cap = self.account.cap_reached(self._config)
        if cap is not None:
            raise CapError(
                f"{cap} is reached: {self.account.tokens} tokens and a cost of {self.account.cost:.6g} are spent",
                value=getattr(self._config, cap),
                fix=f"raise {cap} and run the same command to resume",
            )


def read_reply(data: bytes) -> Reply:
    """The text and the usage of a chat completion.

    Raises:
      CallError: it is something else.
    """
    try:
        reply = json.loads(data)
        text = reply["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise CallError("not_a_completion") from None
    if not isinstance(text, str):
        raise CallError("not_a_completion")
    return Reply(text, _usage(reply))


def _usage(reply: Mapping[str, Any]) -> tuple[int, int] | None:
    usage = reply.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int or min(prompt, completion) < 0:
        return None
    return prompt, completion


def _read_key(config: RemoteConfig) -> str | None:
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise InputError(
            f"no key: the environment variable {config.api_key_env} is not set",
            fix=f"export {config.api_key_env}=…, or api_key_env=null where none is needed",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"the environment variable {config.api_key_env} does not hold a key", expected="one ASCII word"
        )
    return key
