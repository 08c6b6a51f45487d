"""The chat client against a local server that misbehaves: retries, limits, cache, account, caps, and the key's silence."""

import asyncio
import base64
import io
import json
import logging
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sif_jax.config import RemoteConfig
from sif_jax.errors import InputError
from sif_jax.remote.account import Account
from sif_jax.remote.chat import MAX_REPLY_BYTES, CallError, CapError, ChatClient, read_reply
from sif_jax.remote.images import image_part
from sif_jax.remote.retry import backoff_s, is_passing, retry_after_s
from tests.judge_server import completion, cuts, drips, hangs, refuses, says, sends, serve

KEY = "sk-secret-0123456789abcdef"
HELLO = [{"role": "user", "content": "hello"}]
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("THE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def remote(url="http://127.0.0.1:9/v1", **values) -> RemoteConfig:
    fast = {"timeout_s": 5.0, "retries": 2, "backoff_s": 0.01, "max_wait_s": 2.0}
    return RemoteConfig(**{"model": "judge-1", "base_url": url, "api_key_env": "THE_KEY"} | fast | values)


def ask(config, *conversations, read=str):
    """The outcomes of these conversations, asked at once, and the account."""

    async def run():
        client = ChatClient(config)
        calls = (client.ask(messages, read) for messages in conversations or (HELLO,))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        await client.close()
        return outcomes, client.account

    return asyncio.run(run())


def numbered(count):
    return [[{"role": "user", "content": str(i)}] for i in range(count)]


def unreadable_once():
    texts = []

    def read(text):
        texts.append(text)
        if len(texts) == 1:
            raise CallError("not_json")
        return text

    return read


def test_the_messages_go_in_and_the_text_comes_out():
    with serve(says("hi")) as server:
        outcomes, account = ask(remote(server.url, options={"temperature": 0.5, "max_tokens": 7}))
    assert outcomes == ["hi"]
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert request.body == {"model": "judge-1", "messages": HELLO, "temperature": 0.5, "max_tokens": 7}
    assert (account.calls, account.retries, account.failures) == (1, 0, {})


def test_no_key_is_sent_where_none_is_named():
    with serve(says("hi")) as server:
        assert ask(remote(server.url, api_key_env=None))[0] == ["hi"]
    assert "Authorization" not in server.requests[0].headers


TROUBLES = {
    "http_429": refuses(429),
    "http_408": refuses(408),
    "http_500": refuses(500, body=b"<html>"),
    "http_503": refuses(503),
    "connection": cuts,
    "timeout": hangs,
    "not_a_completion": sends(b"\x00 no JSON"),
    "reply_too_long": sends(completion("x" * MAX_REPLY_BYTES)),
}


@pytest.mark.parametrize("reason", TROUBLES)
def test_what_may_pass_is_asked_again(reason):
    with serve(TROUBLES[reason], says("hi")) as server:
        outcomes, account = ask(remote(server.url, timeout_s=1.0 if reason == "timeout" else 10.0))
    assert outcomes == ["hi"]
    assert (account.calls, account.retries, account.failures) == (2, 1, {})


@pytest.mark.parametrize("reason", TROUBLES)
def test_what_does_not_pass_fails_by_its_reason_after_the_last_attempt(reason):
    with serve(TROUBLES[reason]) as server:
        outcomes, account = ask(remote(server.url, timeout_s=0.2 if reason == "timeout" else 10.0, retries=1))
    assert isinstance(outcomes[0], CallError)
    assert (outcomes[0].reason, account.failures) == (reason, {reason: 1})
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
def test_a_refusal_that_will_not_pass_is_not_asked_again(status):
    with serve(refuses(status)) as server:
        outcomes, _ = ask(remote(server.url))
    assert str(outcomes[0]) == f"http_{status}"
    assert len(server.requests) == 1


def test_nothing_listens():
    outcomes, account = ask(remote(retries=1))
    assert str(outcomes[0]) == "connection"
    assert (account.calls, account.tokens) == (2, 0)


def test_a_reply_that_drips_is_cut_off_at_the_time_limit():
    with serve(drips) as server:
        began = time.monotonic()
        outcomes, _ = ask(remote(server.url, timeout_s=0.3, retries=0))
    assert str(outcomes[0]) == "timeout"
    assert time.monotonic() - began < 5


def test_a_server_that_never_answers_takes_a_bounded_time():
    with serve(hangs) as server:
        began = time.monotonic()
        outcomes, _ = ask(remote(server.url, timeout_s=0.2, retries=2, backoff_s=0.1, concurrency=4), *numbered(8))
        took = time.monotonic() - began
    assert [str(outcome) for outcome in outcomes] == ["timeout"] * 8
    assert took < 2 * 3 * 0.2 + 0.3 + 4


def test_waits_grow_exponentially():
    with serve(refuses(500)) as server:
        ask(remote(server.url, retries=3, backoff_s=0.1))
    gaps = [b.at - a.at for a, b in zip(server.requests, server.requests[1:])]
    assert all(gap >= 0.1 * 2**i / 2 for i, gap in enumerate(gaps))
    assert len(gaps) == 3


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_a_wait_is_jittered_and_never_above_the_limit(attempt, base, limit):
    wait = backoff_s(attempt, remote(backoff_s=base, max_wait_s=limit))
    whole = min(limit, base * 2.0 ** min(attempt, 30))
    assert whole / 2 <= wait <= whole


@pytest.mark.parametrize("in_words", [False, True])
def test_the_servers_own_wait_is_honoured(in_words):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    with serve(refuses(429, date if in_words else "1"), says("hi")) as server:
        assert ask(remote(server.url))[0] == ["hi"]
    first, second = server.requests
    assert 0.9 <= second.at - first.at < 6


def test_a_server_that_asks_for_too_long_a_wait_is_given_up():
    with serve(refuses(429, "3600")) as server:
        outcomes, account = ask(remote(server.url))
    assert str(outcomes[0]) == "http_429"
    assert account.calls == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("0", 0),
        (format_datetime(NOON + timedelta(seconds=90), usegmt=True), 90),
        (format_datetime(NOON - timedelta(seconds=90), usegmt=True), 0),
        ("Thu, 01 Jan 2026 12:00:07 -0000", 7),
        (None, None),
        ("soon", None),
        ("-3", None),
        ("nan", None),
    ],
)
def test_retry_after_is_read_in_seconds_and_as_a_date(header, seconds):
    assert retry_after_s(header, NOON) == seconds


@given(st.text(alphabet="0123456789 +-:,.JanThuGMT", max_size=60) | st.text(max_size=40))
@settings(deadline=None)
def test_any_retry_after_is_read_or_passed_over(header):
    wait = retry_after_s(header, NOON)
    assert wait is None or wait >= 0


def test_passing_statuses():
    assert [status for status in (200, 400, 404, 408, 429, 499, 500, 503, 529) if is_passing(status)] == [
        408,
        429,
        500,
        503,
        529,
    ]


def test_no_more_requests_are_under_way_than_allowed():
    three = threading.Barrier(3, timeout=10)

    def waits_for_two_others(handler, request):
        three.wait()
        handler.answer(completion("hi"))

    with serve(waits_for_two_others) as server:
        outcomes, _ = ask(remote(server.url, concurrency=3), *numbered(12))
    assert outcomes == ["hi"] * 12
    assert server.most_under_way == 3


def test_a_call_that_waits_to_be_repeated_leaves_its_place_to_others():
    with serve(refuses(429, "1"), says("hi")) as server:
        ask(remote(server.url, concurrency=1), *numbered(4))
    assert [request.body["messages"][0]["content"] for request in server.requests] == ["0", "1", "2", "3", "0"]


# Cache


def test_a_kept_reply_makes_no_request(tmp_path):
    with serve(says("hi")) as server:
        config = remote(server.url, cache=str(tmp_path))
        ask(config)
        outcomes, account = ask(config)
    assert outcomes == ["hi"]
    assert (len(server.requests), account.calls, account.cached, account.tokens) == (1, 0, 1, 0)


def test_another_content_option_model_or_endpoint_is_another_request(tmp_path):
    with serve(says("hi")) as server:
        config = remote(server.url, cache=str(tmp_path))
        ask(config)
        ask(config, [{"role": "user", "content": "hello!"}])
        ask(config.model_copy(update={"model": "judge-2"}))
        ask(config.model_copy(update={"options": {"temperature": 1}}))
        ask(config.model_copy(update={"base_url": server.url + "/"}))
    assert len(server.requests) == 5


@pytest.mark.parametrize("trouble", [refuses(500), cuts, sends(b"{}")])
def test_a_failed_call_is_never_kept(tmp_path, trouble):
    with serve(trouble) as server:
        ask(remote(server.url, cache=str(tmp_path), retries=0))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_reply_that_cannot_be_read_is_asked_for_again_and_not_kept(tmp_path):
    with serve(says("first"), says("second")) as server:
        config = remote(server.url, cache=str(tmp_path))
        outcomes, account = ask(config, read=unreadable_once())
        assert outcomes == ["second"]
        assert ask(config)[0] == ["second"]
    assert account.tokens == 2 * 110


def test_a_damaged_file_is_asked_for_again(tmp_path):
    with serve(says("hi")) as server:
        config = remote(server.url, cache=str(tmp_path))
        ask(config)
        (file,) = tmp_path.rglob("*.json")
        for damage in ("", "{", "[]", '{"text": 3}'):
            file.write_text(damage)
            assert ask(config)[0] == ["hi"]
    assert len(server.requests) == 5
    assert json.loads(file.read_text()) == {"text": "hi"}


def test_a_full_disk_costs_the_kept_reply_alone(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sif_jax.remote.cache.os.replace", full)
    with serve(says("hi")) as server:
        assert ask(remote(server.url, cache=str(tmp_path)))[0] == ["hi"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="fix: choose another cache directory"):
        ChatClient(remote(cache=str(tmp_path / "file" / "cache")))


# Account and caps


def test_tokens_and_cost_are_counted():
    with serve(says("hi")) as server:
        _, account = ask(remote(server.url, prompt_price=2.0, completion_price=10.0), *numbered(3))
    assert (account.prompt_tokens, account.completion_tokens) == (300, 30)
    assert account.cost == pytest.approx((300 * 2 + 30 * 10) / 1e6)
    assert account.counters()["calls"] == 3


@pytest.mark.parametrize(
    "usage", [None, [], "many", {"prompt_tokens": -1, "completion_tokens": 2}, {"prompt_tokens": 3}]
)
def test_a_usage_that_cannot_be_read_counts_nothing(usage):
    with serve(says("hi", usage)) as server:
        outcomes, account = ask(remote(server.url))
    assert (outcomes, account.tokens) == (["hi"], 0)


@pytest.mark.parametrize(
    "cap", [{"max_total_tokens": 220}, {"max_cost": 2.2e-4, "prompt_price": 1.0, "completion_price": 1.0}]
)
def test_a_cap_stops_further_calls(cap):
    with serve(says("hi")) as server:
        outcomes, _ = ask(remote(server.url, concurrency=1, **cap), *numbered(5))
    assert outcomes[:2] == ["hi", "hi"]
    assert len(server.requests) == 2
    assert all(isinstance(outcome, CapError) for outcome in outcomes[2:])
    assert str(outcomes[2]).startswith(f"{next(iter(cap))} is reached: 220 tokens")
    assert "fix: raise max_" in str(outcomes[2])


def test_kept_replies_are_free_beyond_the_cap(tmp_path):
    with serve(says("hi")) as server:
        config = remote(server.url, cache=str(tmp_path), max_total_tokens=1)
        outcomes, _ = ask(config, HELLO)
        again, _ = ask(config, HELLO, HELLO)
    assert (outcomes, again, len(server.requests)) == (["hi"], ["hi", "hi"], 1)


def test_a_cap_needs_an_endpoint_that_counts():
    with serve(says("hi", usage=None)) as server:
        outcomes, _ = ask(remote(server.url, max_total_tokens=10**6))
    assert "reports no usage" in str(outcomes[0])


def test_the_account_counts_on_from_its_state():
    account = Account(calls=3, prompt_tokens=5, cost=0.25, failures={"timeout": 2})
    restored = Account()
    restored.set_state(json.loads(json.dumps(account.state())))
    assert restored == account
    restored.fail("timeout")
    assert account.counters()["failed/timeout"] == 2
    assert restored.counters()["failed/timeout"] == 3


# The key


@pytest.mark.parametrize("key", ["", "  ", "sk-two words", "sk-\nline", "sk-é"])
def test_a_key_that_is_none_is_refused_without_being_shown(monkeypatch, key):
    monkeypatch.setenv("THE_KEY", key)
    with pytest.raises(InputError, match="THE_KEY") as caught:
        ChatClient(remote())
    assert "sk-" not in str(caught.value)


def test_a_key_that_was_never_set_is_told_by_its_variable(monkeypatch):
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(InputError, match="the environment variable THE_KEY is not set; fix: export THE_KEY"):
        ChatClient(remote())


def echoes_the_key(handler, request):
    handler.answer(completion(f"you sent {request.headers['Authorization']}"))


def refuses_with_the_key(handler, request):
    handler.answer(f"Incorrect API key {request.headers['Authorization']}".encode(), 401, {"X-Key": KEY})


@pytest.mark.parametrize("behaviour", [says("hi"), echoes_the_key, refuses_with_the_key, cuts, sends(KEY.encode())])
def test_the_key_is_in_no_log_error_file_or_account(tmp_path, caplog, capsys, behaviour):
    caplog.set_level(logging.DEBUG)
    with serve(behaviour) as server:
        outcomes, account = ask(remote(server.url, cache=str(tmp_path), retries=1))
        assert KEY in server.requests[0].headers["Authorization"]
    errors = [line for error in outcomes if isinstance(error, CallError) for line in traceback.format_exception(error)]
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    printed = capsys.readouterr()
    told = [caplog.text, repr(outcomes), *errors, *files, json.dumps(account.state()), printed.out, printed.err]
    assert not any(KEY in text for text in told)


def test_a_redirect_does_not_carry_the_key_elsewhere():
    with serve(says("hi")) as elsewhere:

        def redirects(handler, request):
            handler.answer(b"", 307, {"Location": elsewhere.url + "/chat/completions"})

        with serve(redirects) as server:
            outcomes, _ = ask(remote(server.url))
    assert str(outcomes[0]) == "http_307"
    assert elsewhere.requests == []


# Replies and images


@given(st.binary(max_size=200) | st.from_regex(rb'[\[{]("choices": )?[\[{]("message": )?[\[{\]}]*', fullmatch=True))
@settings(deadline=None)
def test_any_bytes_are_a_reply_or_a_failed_call(data):
    with pytest.raises(CallError, match="not_a_completion"):
        read_reply(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"choices": [{"message": {"content": 1}}]}',
        b'{"choices": {"0": 1}}',
        b"[" * 100_000,
        b"1" * 10_000,
    ],
)
def test_a_reply_without_a_text_is_a_failed_call(data):
    with pytest.raises(CallError, match="not_a_completion"):
        read_reply(data)


def png(colour="red", kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(file, kind)
    return file.getvalue()


def data_of(part):
    head, data = part["image_url"]["url"].split(",")
    return head, base64.b64decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_is_sent_as_its_files_own_bytes(tmp_path, kind):
    (tmp_path / "image").write_bytes(png(kind=kind))
    part = image_part(tmp_path / "image")
    assert part["type"] == "image_url"
    assert data_of(part) == (f"data:image/{kind.lower()};base64", png(kind=kind))


def test_a_format_that_endpoints_do_not_read_is_sent_as_png(tmp_path):
    (tmp_path / "image.bmp").write_bytes(png(kind="BMP"))
    head, data = data_of(image_part(tmp_path / "image.bmp"))
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (255, 0, 0)


def test_what_is_no_image_is_not_sent(tmp_path):
    (tmp_path / "image.png").write_text("text")
    with pytest.raises(OSError, match="cannot identify"):
        image_part(tmp_path / "image.png")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"base_url": "https://user:sk-secret@host/v1"}, "may hold a secret"),
        ({"base_url": "https://host/v1?key=sk-secret"}, "may hold a secret"),
        ({"base_url": "host/v1"}, "not a URL"),
        ({"base_url": "http://host:99999/v1"}, "not a URL"),
        ({"base_url": "ftp://host"}, "not a URL"),
        ({"api_key_env": "sk-secret"}, "not the name of an environment variable"),
        ({"options": {"stream": True}}, "not an option"),
        ({"max_cost": 1.0}, "never reached"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_a_secret(values, told):
    with pytest.raises(ValueError, match=told) as caught:
        RemoteConfig(**values)
    first = caught.value.errors()[0]["ctx"]["error"]  # what the CLI prints
    assert "sk-secret" not in str(first)
