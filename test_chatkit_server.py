"""The tests of chatkit_server.py; run with `pytest`. As a script it prints the benchmark table.

Each test drives the app from outside: over a real socket where it is about streaming, leaving or stopping, over ASGI
where it is not. What answers is the demo model or a `Script`; fakes stand at the model's edge only. Nothing sleeps to
hope: `until()` waits on a condition, with a deadline. Tests that need an optional tool skip where it is missing, and
fail instead where CHATKIT_TEST_ALL=1.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import copy
import functools
import hmac
import http.server
import importlib
import importlib.util
import inspect
import json
import math
import os
import random
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import httpx
import jwt
import openai
import pytest
import uvicorn
from agents import Agent, Model, ModelResponse, RunContextWrapper, Runner, Usage, function_tool, set_tracing_disabled
from agents.models.default_models import get_default_model
from fastapi import FastAPI
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseFunctionToolCall,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
    ResponseReasoningSummaryTextDeltaEvent,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
    ResponseUsage,
)
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from starlette.requests import Request
from starlette.testclient import TestClient

import chatkit_server as ck

pytestmark = pytest.mark.anyio

HERE = Path(__file__).resolve().parent
TEST_ALL = os.environ.get("CHATKIT_TEST_ALL") == "1"
DEADLINE = 10.0  # seconds that anything may take

# What the environment of whoever runs the tests says must not count: each value is empty, so .env cannot set it.
CLEAN_ENV = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("CHATKIT_", "OPENAI_", "GEMINI_"))},
    **{f"{name}_API_KEY": "" for name in ("OPENAI", "GEMINI", "ANTHROPIC")},
    **dict.fromkeys(("CHATKIT_MODEL", "CHATKIT_JWT_SECRET", "BETTER_AUTH_SECRET", "OPENAI_BASE_URL"), ""),
    "PYTHONPATH": str(HERE),
}


def optional(module: str) -> Any:
    """An optional module: the test skips where it is missing, and fails where everything must be there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        if TEST_ALL:
            raise
        pytest.skip(f"needs {module}, which is not installed")


def until(condition: Callable[[], Any], seconds: float = DEADLINE) -> Any:
    """Wait until `condition()` is true, and return what it said; fail at the deadline."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        time.sleep(0.01)
    return result


# ---- a model that says what a test wants


class Call:
    """A step of a Script: call a tool."""

    def __init__(self, name: str, arguments: Any = None, call_id: str = "") -> None:
        self.name = name
        self.arguments = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
        self.call_id = call_id


class Think:
    """A step of a Script: a delta of a reasoning summary."""

    def __init__(self, text: str) -> None:
        self.text = text


class Wait:
    """A step of a Script: wait until `gate` is set; `reached` says that the model got here, `left` that it was stopped.

    Threading events, because a test and the server that it drives have an event loop each.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.reached = threading.Event()
        self.left = threading.Event()

    async def pass_through(self) -> None:
        self.reached.set()
        try:
            while not self.gate.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.left.set()
            raise


class Script(Model):
    """Says its responses one after the other; the last is said again for ever.

    A response is a list of steps: text is a delta, an exception is raised, the others are above. Like every model but
    OpenAI's it calls each of its messages `__fake_id__`. `seen` is the input of each call.
    """

    def __init__(self, *responses: list[Any], delay: float = 0.0) -> None:
        self.responses = list(responses)
        self.delay = delay  # seconds after each delta
        self.seen: list[list[Any]] = []
        self.settings: list[Any] = []

    async def get_response(self, *args: Any, **kwargs: Any) -> ModelResponse:
        async for event in self.stream_response(*args, **kwargs):
            if event.type == "response.completed":
                return ModelResponse(output=event.response.output, usage=Usage(), response_id=None)
        raise AssertionError

    async def stream_response(
        self, system_instructions: Any, input: Any, model_settings: Any, *_: Any, **__: Any
    ) -> AsyncIterator[Any]:
        self.seen.append(list(input) if isinstance(input, list) else [{"role": "user", "content": input}])
        self.settings.append(model_settings)
        steps = self.responses[min(len(self.seen), len(self.responses)) - 1]
        text = ""
        output: list[Any] = []
        for number, step in enumerate(steps):
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, Wait):
                await step.pass_through()
            elif isinstance(step, Think):
                yield ResponseReasoningSummaryTextDeltaEvent(
                    type="response.reasoning_summary_text.delta",
                    item_id="__fake_id__",
                    output_index=0,
                    summary_index=0,
                    sequence_number=0,
                    delta=step.text,
                )
            elif isinstance(step, Call):
                call_id = step.call_id or f"call_{len(self.seen)}_{number}"
                call = ResponseFunctionToolCall(
                    type="function_call", id="__fake_id__", call_id=call_id, name=step.name, arguments=step.arguments
                )
                output.append(call)
            else:
                text += step
                yield ResponseTextDeltaEvent(
                    type="response.output_text.delta",
                    item_id="__fake_id__",
                    output_index=0,
                    content_index=0,
                    sequence_number=0,
                    delta=step,
                    logprobs=[],
                )
                if self.delay:
                    await asyncio.sleep(self.delay)
        if text:
            part = ResponseOutputText(type="output_text", text=text, annotations=[])
            output.insert(
                0,
                ResponseOutputMessage(
                    type="message", id="__fake_id__", role="assistant", status="completed", content=[part]
                ),
            )
        if any(isinstance(step, Think) for step in steps):
            output.insert(0, ResponseReasoningItem(type="reasoning", id="__fake_id__", summary=[]))
        for index, item in enumerate(output):
            yield ResponseOutputItemDoneEvent(
                type="response.output_item.done", item=item, output_index=index, sequence_number=0
            )
        usage = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}
        details = {
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        yield ResponseCompletedEvent(
            type="response.completed",
            sequence_number=0,
            response=Response(
                id="resp",
                created_at=0,
                model="script",
                object="response",
                output=output,
                tools=[],
                tool_choice="auto",
                parallel_tool_calls=True,
                usage=ResponseUsage.model_validate({**usage, **details}),
            ),
        )


@function_tool
async def echo(wrapper: RunContextWrapper[ck.TurnContext], text: str) -> str:
    """Give back what it is given."""
    return json.dumps({"echo": text})


def scripted(*responses: list[Any], tools: list[Any] | None = None, delay: float = 0.0) -> Agent[Any]:
    """An agent whose model is a Script; `agent.model.seen` is what the model was shown."""
    return Agent(name="Scripted", model=Script(*responses, delay=delay), tools=[echo] if tools is None else tools)


# ---- a server, and clients of it


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CLEAN_ENV.items():
        if not value:
            monkeypatch.setenv(name, "")
    for name in os.environ:
        if name.startswith("CHATKIT_") and name != "CHATKIT_TEST_ALL" and os.environ[name]:
            monkeypatch.delenv(name)


class Client(httpx.Client):
    """An HTTP client that speaks both dialects."""

    def send_message(self, message: str, thread_id: Any = None, **body: Any) -> list[dict[str, Any]]:
        """The events of the answer to a message, in the plain dialect."""
        body = {"message": message, **({} if thread_id is None else {"thread_id": thread_id}), **body}
        with self.stream("POST", "/chatkit", json=body) as response:
            assert response.status_code == 200, response.read()
            return list(plain_events(response))

    def operate(self, operation: str, **params: Any) -> Any:
        """A ChatKit request's answer: the events of a stream, or the JSON."""
        response = self.post("/chatkit", json={"type": operation, "params": params})
        assert response.status_code == 200, response.text
        if response.headers["content-type"].startswith("text/event-stream"):
            return chatkit_events(response.text)
        return response.json()

    def messages(self, thread_id: int) -> list[dict[str, Any]]:
        return self.get(f"/api/conversations/{thread_id}").raise_for_status().json()["messages"]  # type: ignore[no-any-return]


def plain_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Events of a plain stream as they come, each with its SSE id as `_id`; checks that [DONE] ends it."""
    event_id, ended = None, False
    for line in response.iter_lines():
        assert not ended or not line, f"after [DONE]: {line}"
        if line.startswith("id: "):
            event_id = line[4:]
        elif line == "data: [DONE]":
            ended = True
        elif line.startswith("data: "):
            yield {**json.loads(line[6:]), "_id": event_id}
        else:
            assert not line or line.startswith(":"), line
    assert ended, "the stream broke off"


def chatkit_events(text: str) -> list[dict[str, Any]]:
    frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    assert all(frame.startswith("data: ") for frame in frames)
    return [json.loads(frame[6:]) for frame in frames]


def said(events: list[dict[str, Any]]) -> str:
    """The text of all plain `text` events."""
    return "".join(event["content"] for event in events if event["type"] == "text")


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """The types of events, a run of one type once."""
    types = [event["type"] for event in events]
    return [kind for number, kind in enumerate(types) if number == 0 or types[number - 1] != kind]


def user_input(text: str, **fields: Any) -> dict[str, Any]:
    """ChatKit's `input` of a message."""
    content = [{"type": "input_text", "text": text}]
    return {"content": content, "attachments": [], "inference_options": {}, **fields}


@contextlib.contextmanager
def serving(agent: Agent[Any] | None = None, **settings: Any) -> Iterator[Client]:
    """A real server on a free port in a thread of its own, and a client of it; in memory unless told otherwise."""
    on_action = settings.pop("on_action", None)
    app = ck.create_app(
        agent, settings=ck.Settings(**{"database": ":memory:", "model": "demo", **settings}), on_action=on_action
    )
    with ck.serve_in_background(app) as url, Client(base_url=url, timeout=DEADLINE) as client:
        yield client


SECRET = "a secret of more than thirty-two characters"


def bearer(user_id: str) -> dict[str, str]:
    return {"Authorization": "Bearer " + ck.make_token(ck.Settings(jwt_secret=SECRET), user_id)}


class Process:
    """The server as `python chatkit_server.py` starts it."""

    def __init__(self, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> None:
        self.log_file = cwd / "log.txt"
        self._log = self.log_file.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "chatkit_server.py"), "--port", "0", *arguments],
            cwd=cwd,
            env={**CLEAN_ENV, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline().rstrip() for _ in range(3)]
        self.url = self.lines[0].removeprefix("Listening on ")

    def client(self, **kwargs: Any) -> Client:
        return Client(base_url=self.url, timeout=DEADLINE, **kwargs)

    def stop(self, how: int) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(how)
        return self.process.wait(DEADLINE)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()


# ============================================================================================================ Start


def our_threads() -> int:
    """How many threads of servers and of databases there are."""
    names = [thread.name for thread in threading.enumerate()]
    return len([name for name in names if "chatkit" in name or "_connection_worker_thread" in name])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start_and_fail(*arguments: str, cwd: Path, **env: str) -> str:
    """What a server says that refuses to start: one line on stderr, exit status 2."""
    command = [sys.executable, str(HERE / "chatkit_server.py"), *arguments]
    done = subprocess.run(command, cwd=cwd, env={**CLEAN_ENV, **env}, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if "set but empty" not in line]
    assert done.returncode == 2 and len(lines) == 1 and not done.stdout, done
    return lines[0]


def test_the_first_minute(tmp_path: Path) -> None:
    """What the README promises: start, add, stop with Ctrl-C, start again, list."""
    with Process(cwd=tmp_path) as server:
        assert server.lines == [f"Listening on {server.url}", "Model: demo", "Data:  chatkit.db"]
        assert server.url.startswith("http://localhost:")
        with server.client() as client:
            assert client.get("/health").json() == {"status": "healthy", "model": "demo"}
            events = client.send_message("add buy milk to my list")
            assert kinds(events) == ["thread", "thinking", "tool_call", "tool_result", "text", "done"]
            assert (events[2]["name"], events[2]["args"]) == ("add_task", {"title": "buy milk"})
        assert server.stop(signal.SIGINT) == 0
        assert "Traceback" not in server.log_file.read_text()
    with Process(cwd=tmp_path) as server, server.client() as client:
        assert "buy milk" in said(client.send_message("show my tasks", thread_id=1))


BAD_STARTS: list[tuple[list[str], dict[str, str], str]] = [
    (["--port", "99999"], {}, "CHATKIT_PORT must be a port"),
    ([], {"CHATKIT_PORT": "http"}, "CHATKIT_PORT must be a whole number"),
    ([], {"CHATKIT_HISTORY_LIMIT": "-1"}, "CHATKIT_HISTORY_LIMIT must be 1 or more"),
    ([], {"CHATKIT_ON_DISCONNECT": "explode"}, "CHATKIT_ON_DISCONNECT must be cancel or continue"),
    ([], {"CHATKIT_TURN_TIMEOUT": "nan"}, "CHATKIT_TURN_TIMEOUT must be"),
    ([], {"CHATKIT_LOG_LEVEL": "loud"}, "CHATKIT_LOG_LEVEL must be"),
    (["--host", "0.0.0.0"], {}, "set CHATKIT_JWT_SECRET"),
    (["--host", "no.such.host.invalid"], {"CHATKIT_JWT_SECRET": "x" * 32}, "Cannot listen on no.such.host"),
    (["--database", "missing/chat.db"], {}, "Cannot use missing/chat.db as the database"),
    (["--database", "."], {}, "Cannot use . as the database"),
    (["--model", "gpt-4.1"], {}, "needs OPENAI_API_KEY"),
    (["--token", "alice"], {}, "Set CHATKIT_JWT_SECRET first"),
]


def test_a_start_that_cannot_work_says_so_in_one_line(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        said_ = pool.map(lambda bad: start_and_fail(*bad[0], cwd=tmp_path, **bad[1]), BAD_STARTS)
        for (arguments, env, says), line in zip(BAD_STARTS, said_, strict=True):
            assert says in line, (arguments, env, line)


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "something listens there already" in start_and_fail("--port", port, cwd=tmp_path)


def test_an_older_python_is_told_which_one_it_needs() -> None:
    """The check stands before anything that an older Python cannot read: the module compiles as Python 3.9."""
    import ast

    ast.parse((HERE / "chatkit_server.py").read_text(), feature_version=(3, 9))


def test_a_token_can_be_printed(tmp_path: Path) -> None:
    env = {**CLEAN_ENV, "CHATKIT_JWT_SECRET": SECRET}
    command = [sys.executable, str(HERE / "chatkit_server.py"), "--token", "alice"]
    token = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.strip()
    with serving(jwt_secret=SECRET) as client:
        answer = client.get("/api/conversations", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 200


def test_settings_come_from_the_environment_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATKIT_PORT", "1234")
    monkeypatch.setenv("CHATKIT_CORS_ORIGINS", "https://a.example/, https://b.example")
    monkeypatch.setenv("BETTER_AUTH_SECRET", SECRET)
    monkeypatch.setenv("CHATKIT_TRACING", "yes")
    settings = ck.Settings.from_env(host="::1")
    assert (settings.port, settings.host, settings.jwt_secret, settings.tracing) == (1234, "::1", SECRET, True)
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert ck.Settings.from_env(port=4321).port == 4321
    assert SECRET not in repr(settings)


# ==================================================================================================== Plain dialect


def test_a_plain_stream_has_its_headers_ids_and_end() -> None:
    with serving(scripted(["one ", "two"])) as client:
        with client.stream("POST", "/chatkit/", json={"message": "  hello\n\tyou  "}) as response:
            headers, body = response.headers, response.read().decode()
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["x-thread-id"] == "1"
        assert headers["cache-control"] == "no-cache"
        assert headers["x-accel-buffering"] == "no"
        assert body.endswith("data: [DONE]\n\n")
        frames = [frame.split("\n") for frame in body.split("\n\n") if frame][:-1]
        numbers = [int(frame[0].rpartition("-")[2]) for frame in frames]
        assert numbers == sorted(set(numbers))
        assert [json.loads(frame[1][6:]) for frame in frames] == [
            {"type": "thread", "thread_id": 1, "title": "hello you"},
            {"type": "thinking", "content": ""},
            {"type": "text", "content": "one ", "message_id": 2},
            {"type": "text", "content": "two", "message_id": 2},
            {
                "type": "done",
                "status": "completed",
                "thread_id": 1,
                "message_id": 2,
                "usage": {"input_tokens": 3, "output_tokens": 5},
            },
        ]


def test_tool_calls_and_results_are_events_and_rows() -> None:
    with serving(scripted(["let me see ", Call("echo", {"text": "x"})], [Think("hm"), "done"])) as client:
        events = client.send_message("hi")
        assert kinds(events) == ["thread", "thinking", "text", "tool_call", "tool_result", "thinking", "text", "done"]
        call, result = events[3], events[4]
        assert (call["id"], call["name"], call["args"]) == ("call_1_1", "echo", {"text": "x"})
        assert (result["id"], result["name"], result["result"]) == ("call_1_1", "echo", {"echo": "x"})
        rows = client.messages(1)
        assert [row["role"] for row in rows] == ["user", "assistant", "tool", "reasoning", "assistant"]
        assert rows[2]["tool_calls"] == [{"id": "call_1_1", "name": "echo", "args": {"text": "x"}}]
        assert json.loads(rows[2]["content"]) == {"echo": "x"}
        assert {row["status"] for row in rows} == {"done"}
        assert events[-1]["usage"] == {"input_tokens": 6, "output_tokens": 10}


NOT_JSON = "The content type must be application/json"


@pytest.mark.parametrize(
    ("request_", "status", "detail"),
    [
        ({"content": b"{"}, 400, "Invalid JSON"),
        ({"content": b"[1]"}, 400, "Invalid JSON"),
        ({"content": b'{"message": "\xff"}'}, 400, "Invalid JSON"),
        ({"content": b'{"message": "\\ud800"}'}, 400, "Invalid JSON"),
        ({"content": b'{"message": "x", "n": NaN}'}, 400, "Invalid JSON"),
        ({"json": {}}, 400, "Message is required"),
        ({"json": {"message": " \n "}}, 400, "Message is required"),
        ({"json": {"message": 7}}, 400, "Message is required"),
        ({"json": {"message": "x" * 32_001}}, 413, "Message is longer than 32000 characters"),
        ({"json": {"message": "x", "more": "x" * 1024 * 1024}}, 413, "The request is larger than 1,048,576 bytes"),
        ({"json": {"message": "x", "thread_id": 99}}, 404, "Conversation not found"),
        ({"json": {"message": "x", "thread_id": "99"}}, 404, "Conversation not found"),
        ({"json": {"message": "x", "thread_id": "abc"}}, 404, "Conversation not found"),
        ({"json": {"message": "x", "thread_id": 2**70}}, 404, "Conversation not found"),
        ({"json": {"message": "x", "thread_id": True}}, 404, "Conversation not found"),
        ({"json": {"message": "x", "model": "gpt-nope"}}, 400, "There is no model 'gpt-nope' here; there is demo"),
        ({"json": {"message": "x", "tool_choice": "nope"}}, 400, "There is no tool 'nope' here; there is echo"),
        (
            {"content": b"{}", "headers": {"content-type": "text/plain"}},
            415,
            "The content type must be application/json",
        ),
        ({"data": {"message": "x"}}, 415, "The content type must be application/json"),
    ],
)
def test_bad_requests_are_refused_with_a_reason(request_: dict[str, Any], status: int, detail: str) -> None:
    if "content" in request_:
        request_ = {"headers": {"content-type": "application/json"}, **request_}
    with serving(scripted(["never"])) as client:
        response = client.post("/chatkit", **request_)
        assert (response.status_code, response.json()) == (status, {"detail": detail})
        assert client.get("/api/conversations").json() == []


def test_a_thread_id_may_be_text() -> None:
    with serving(scripted(["one"])) as client:
        client.send_message("a")
        assert client.send_message("b", thread_id="1")[0]["thread_id"] == 1
        assert len(client.messages(1)) == 4


def test_titles_are_folded_and_cut_at_fifty_characters() -> None:
    assert ck.make_title("a\n b") == "a b"
    assert ck.make_title("x" * 50) == "x" * 50
    assert ck.make_title("x" * 51) == "x" * 50 + "..."


@pytest.mark.parametrize("before", [[], ["so far"]])
def test_a_model_that_raises_ends_the_stream_properly(before: list[str]) -> None:
    with serving(scripted([*before, RuntimeError("key sk-secret")], ["better"])) as client:
        events = client.send_message("hi")
        assert [event["type"] for event in events[-2:]] == ["error", "done"]
        assert events[-2]["message"] == "Something went wrong while answering."
        assert events[-1]["status"] == "failed"
        assert "sk-secret" not in json.dumps(events)
        assert [(row["role"], row["content"], row["status"]) for row in client.messages(1)] == [
            ("user", "hi", "done"),
            *([("assistant", "so far", "failed")] if before else []),
        ]
        assert said(client.send_message("again", thread_id=1)) == "better"


def test_a_tool_that_raises_does_not_end_the_turn_nor_tell_why() -> None:
    @function_tool
    async def broken() -> str:
        """Fails."""
        raise RuntimeError("password hunter2")

    with serving(scripted([Call("broken")], ["sorry"], tools=[broken])) as client:
        events = client.send_message("hi")
        assert said(events) == "sorry"
        assert events[3]["result"] == {"error": "The tool broken failed."}
        assert "hunter2" not in json.dumps(events)


def test_a_model_that_never_answers_is_stopped_after_some_steps() -> None:
    with serving(scripted([Call("echo", {"text": "again"})]), max_steps=3) as client:
        events = client.send_message("hi")
        assert events[-2]["code"] == "too_many_steps"
        assert len([event for event in events if event["type"] == "tool_call"]) == 3


def test_a_turn_ends_after_its_time() -> None:
    wait = Wait()
    with serving(scripted(["so far", wait], ["next"]), turn_timeout=0.3) as client:
        events = client.send_message("hi")
        assert (events[-2]["code"], events[-2]["allow_retry"], events[-1]["status"]) == ("timeout", True, "failed")
        assert until(wait.left.is_set)
        assert client.messages(1)[-1]["content"] == "so far"
        assert said(client.send_message("hi", thread_id=1)) == "next"


def test_half_characters_of_a_provider_are_put_together() -> None:
    with serving(scripted(["a\ud83d", "\ude00b", "\ud800", "c"])) as client:
        assert said(client.send_message("hi")) == "a\U0001f600b\ufffdc"
        assert client.messages(1)[-1]["content"] == "a\U0001f600b\ufffdc"


# ============================================================================================================ Turns


def test_a_reader_that_leaves_does_not_stop_the_turn() -> None:
    wait = Wait()
    with serving(scripted(["one ", wait, "two"])) as client:
        with client.stream("POST", "/chatkit", json={"message": "hi"}) as response:
            next(response.iter_bytes())
        wait.gate.set()
        row = until(
            lambda: [row for row in client.messages(1) if row["role"] == "assistant" and row["status"] == "done"]
        )
        assert row[0]["content"] == "one two"


def test_readers_join_from_the_start_or_after_an_id_and_see_the_same() -> None:
    wait = Wait()
    with serving(scripted(["one ", "two ", wait, "three"])) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(client.send_message, "hi")
        assert wait.reached.wait(DEADLINE)

        joined = threading.Semaphore(0)

        def join(last_event_id: str | None = None) -> list[dict[str, Any]]:
            headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
            with client.stream("GET", "/api/conversations/1/stream", headers=headers) as response:
                assert response.status_code == 200
                joined.release()
                return list(plain_events(response))

        whole = pool.submit(join)
        with client.stream("GET", "/api/conversations/1/stream") as response:
            seen = [next(events) for events in [plain_events(response)] for _ in range(3)]
        rest = pool.submit(join, seen[-1]["_id"])
        foreign = [pool.submit(join, wrong) for wrong in ("nonsense", "0-1", seen[0]["_id"].replace("-1", "-99"), "")]
        assert all(joined.acquire(timeout=DEADLINE) for _ in range(6))
        wait.gate.set()
        everything = first.result(DEADLINE)
        assert said(everything) == "one two three"
        assert whole.result(DEADLINE) == everything
        assert seen + rest.result(DEADLINE) == everything
        assert all(each.result(DEADLINE) == everything for each in foreign)
        assert client.get("/api/conversations/1/stream").status_code == 204
        assert client.get("/api/conversations/2/stream").status_code == 404


def test_cancel_stops_the_model_and_keeps_what_was_said() -> None:
    wait = Wait()
    agent = scripted(["so far", wait, "never"], ["next"])
    with serving(agent) as client, ThreadPoolExecutor() as pool:
        answer = pool.submit(client.send_message, "hi")
        assert wait.reached.wait(DEADLINE)
        assert client.post("/chatkit", json={"message": "too early", "thread_id": 1}).status_code == 409
        began = time.monotonic()
        assert client.post("/api/conversations/1/cancel").json() == {"status": "cancelled"}
        assert wait.left.wait(1) and time.monotonic() - began < 1
        assert answer.result(DEADLINE)[-1]["status"] == "cancelled"
        assert [(row["content"], row["status"]) for row in client.messages(1)] == [
            ("hi", "done"),
            ("so far", "cancelled"),
        ]
        assert client.post("/api/conversations/1/cancel").status_code == 409
        assert said(client.send_message("go on", thread_id=1)) == "next"
        assert "stopped the answer" in json.dumps(agent.model.seen[-1])  # type: ignore[union-attr]


def test_deleting_a_conversation_while_it_answers_leaves_nothing(tmp_path: Path) -> None:
    wait = Wait()
    file = tmp_path / "chat.db"
    with serving(scripted(["so far", wait], ["new"]), database=str(file)) as client, ThreadPoolExecutor() as pool:
        answer = pool.submit(client.send_message, "hi")
        assert wait.reached.wait(DEADLINE)
        assert client.delete("/api/conversations/1").json() == {"status": "deleted", "id": 1}
        assert wait.left.wait(1)
        assert answer.result(DEADLINE)[-1]["status"] == "cancelled"
        with sqlite3.connect(file) as db:
            assert db.execute(
                "SELECT (SELECT COUNT(*) FROM conversations), (SELECT COUNT(*) FROM messages)"
            ).fetchone() == (0, 0)
        assert client.send_message("new")[0]["thread_id"] == 2  # an id never comes back


def test_a_silent_stream_carries_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ck, "KEEP_ALIVE", 0.1)
    wait = Wait()
    body = {"message": "hi"}
    with serving(scripted([wait, "at last"])) as client, client.stream("POST", "/chatkit", json=body) as response:
        lines = response.iter_lines()
        assert [line for line in (next(lines) for _ in range(12)) if line.startswith(":")] == [": keep-alive"] * 3
        wait.gate.set()
        assert any("at last" in line for line in lines)


def test_two_requests_at_once_are_one_answer_and_one_refusal() -> None:
    wait = Wait()
    with serving(scripted(["first"], [wait, "second"])) as client, ThreadPoolExecutor() as pool:
        client.send_message("hi")
        posts = [pool.submit(client.post, "/chatkit", json={"message": "x", "thread_id": 1}) for _ in range(2)]
        refused = next(post for post in as_completed(posts, DEADLINE))
        assert refused.result().status_code == 409
        wait.gate.set()
        assert sorted(post.result(DEADLINE).status_code for post in posts) == [200, 409]
        assert [row["role"] for row in client.messages(1)] == ["user", "assistant", "user", "assistant"]


def test_two_turns_with_one_fake_item_id_are_two_messages() -> None:
    with serving(scripted(["one"], ["two"])) as client:
        ids = {client.send_message("a", thread_id=None if n == 0 else 1)[-1]["message_id"] for n in range(2)}
        assert len(ids) == 2
        assert [row["content"] for row in client.messages(1) if row["role"] == "assistant"] == ["one", "two"]


def test_the_model_is_shown_the_last_items_with_calls_and_results_paired() -> None:
    agent = scripted(
        [Call("echo", {"text": "a"}, "c1"), Call("echo", {"text": "b"}, "c2")], ["one"], ["two"], ["three"]
    )
    with serving(agent, history_limit=4) as client:
        for message in ("first", "second", "third"):
            client.send_message(message, thread_id=None if message == "first" else 1)
        seen = agent.model.seen  # type: ignore[union-attr]
        # Rows so far: user, call, call, assistant, user. The window is the last four of them.
        assert [item.get("type") or item["role"] for item in seen[2]] == [
            "user",  # a note that something is left out
            "function_call",
            "function_call",
            "function_call_output",
            "function_call_output",
            "assistant",
            "user",
        ]
        assert [item["call_id"] for item in seen[2][1:5]] == ["c1", "c2", "c1", "c2"]
        assert all("id" not in item for item in seen[2])
        assert [item["content"] for item in seen[3]] == [
            "(Earlier messages are left out.)",
            "one",
            "second",
            "two",
            "third",
        ]


# ============================================================================================================= REST


def test_conversations_are_listed_renamed_locked_and_deleted() -> None:
    with serving(scripted(["hello"])) as client:
        for message in ("one", "two", "three"):
            client.send_message(message)
        client.send_message("again", thread_id=1)
        listed = client.get("/api/conversations").json()
        assert [row["id"] for row in listed] == [1, 3, 2]
        assert set(listed[0]) == {"id", "title", "created_at", "updated_at"}
        assert client.get("/api/conversations/recent/first").json() == listed[0]
        assert client.get("/api/conversations?limit=1&offset=1").json() == listed[1:2]
        assert client.patch("/api/conversations/2", json={"title": " New "}).json()["title"] == "New"
        assert client.get("/api/conversations/2").json()["title"] == "New"
        for bad in (
            {},
            {"title": ""},
            {"title": "x" * 201},
            {"title": 7},
            {"status": "open"},
            {"status": "locked", "reason": 7},
        ):
            assert client.patch("/api/conversations/2", json=bad).status_code == 400, bad
        assert client.delete("/api/conversations/2/").json() == {"status": "deleted", "id": 2}
        for path in ("/api/conversations/2", "/api/conversations/abc", f"/api/conversations/{2**64}"):
            assert client.get(path).status_code == 404
        for query in ("limit=0", "limit=101", "limit=x", "offset=-1"):
            assert client.get(f"/api/conversations?{query}").status_code == 422
        assert client.get("/api/conversations/recent/first/").json()["id"] == 1


def test_search_finds_titles_and_messages_by_the_beginnings_of_words() -> None:
    with serving(scripted(["Gr\u00fc\u00dfe aus Z\u00fcrich"], ["nothing"])) as client:
        client.send_message("alpha beta")
        client.send_message("gamma")
        client.patch("/api/conversations/2", json={"title": "Delta"})

        def found(q: str) -> list[int]:
            return [row["id"] for row in client.get("/api/conversations", params={"q": q}).json()]

        assert found("alp") == [1]
        assert found("beta ALPHA") == [1]
        assert found("zurich") == [1]
        assert found("delt") == [2]
        assert found("gamma") == [2]
        assert found("lpha") == found("nope") == found('"*()') == []
        client.delete("/api/conversations/1")
        assert found("alpha") == []


def test_health_says_503_without_a_database(tmp_path: Path) -> None:
    with serving(database=str(tmp_path / "chat.db")) as client:
        (tmp_path / "chat.db").unlink()
        response = client.get("/health")
        assert (response.status_code, response.json()["detail"].split(".")[0]) == (503, "The database file is gone")


def test_tasks_can_be_read_and_ticked_where_the_todo_assistant_answers() -> None:
    with serving() as client:
        client.send_message("add milk")
        assert client.get("/api/tasks").json() == [{"id": 1, "title": "milk", "done": False}]
        assert client.patch("/api/tasks/1", json={"done": True}).json() == {"id": 1, "title": "milk", "done": True}
        assert client.patch("/api/tasks/1", json={"done": 1}).status_code == 400
        assert client.patch("/api/tasks/2", json={"done": True}).status_code == 404
    with serving(scripted(["x"])) as client:
        assert client.get("/api/tasks").status_code == 404


# ======================================================================================================= Demo model


@pytest.mark.parametrize(
    ("message", "commands"),
    [
        ("add buy milk to my list", [("add_task", "", "buy milk")]),
        ("Please add \u201cbuy milk\u201d to the to-do list!", [("add_task", "", "buy milk")]),
        ("remind me to call mom", [("add_task", "", "call mom")]),
        ("add milk, eggs and bread", [("add_task", "", "milk"), ("add_task", "", "eggs"), ("add_task", "", "bread")]),
        ("create a task to water the plants", [("add_task", "", "water the plants")]),
        ("show my tasks", [("list_tasks", "", "")]),
        ("What's on my list?", [("list_tasks", "", "")]),
        ("complete the second one", [("complete_task", "the second one", "")]),
        ("mark task 3 as done", [("complete_task", "task 3", "")]),
        ("buy milk is done", [("complete_task", "buy milk", "")]),
        ("rename 1 to buy oat milk", [("update_task", "1", "buy oat milk")]),
        ("delete buy milk from my list", [("delete_task", "buy milk", "")]),
        (
            "add tea and then complete 1, delete the last one; show my list",
            [
                ("add_task", "", "tea"),
                ("complete_task", "1", ""),
                ("delete_task", "the last one", ""),
                ("list_tasks", "", ""),
            ],
        ),
        ("hello", []),
        ("who are you?", []),
    ],
)
def test_the_demo_model_understands_sentences(message: str, commands: list[tuple[str, str, str]]) -> None:
    assert [(c.verb, c.target, c.title) for c in ck.understand(message)] == commands


def test_the_demo_model_keeps_a_list_in_ordinary_sentences() -> None:
    with serving() as client:
        client.send_message("add buy milk, call mom and water plants")
        say = lambda message: said(client.send_message(message, thread_id=1))  # noqa: E731
        assert "- **2** call mom" in say("show my tasks")
        assert "Marked \u201ccall mom\u201d as done" in say("complete the second one")
        assert "Task 1 is now \u201cbuy oat milk\u201d" in say("rename buy milk to buy oat milk")
        assert "Removed \u201cwater plants\u201d" in say("delete water plants")
        assert "There is no task 77" in say("delete 77")
        assert "no single task" in say("complete the washing")
        assert client.get("/api/tasks").json() == [
            {"id": 1, "title": "buy oat milk", "done": False},
            {"id": 2, "title": "call mom", "done": True},
        ]
        assert "demo model" in say("what is the meaning of life?")


def test_the_demo_model_calls_the_tools_of_any_agent() -> None:
    agent = Agent(name="Echo", tools=[echo])
    with serving(agent) as client:
        assert client.get("/health").json()["model"] == "demo"
        assert "call echo" in said(client.send_message("hello"))
        events = client.send_message('call echo {"text": "hi"}')
        assert kinds(events)[2:4] == ["tool_call", "tool_result"]
        assert '{"echo": "hi"}' in said(events)


# ========================================================================================================== Extending


def test_an_agent_of_ones_own_as_the_readme_shows(tmp_path: Path) -> None:
    (tmp_path / "whoami.py").write_text(readme_block("whoami.py").replace("port=8000", "port=0"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "whoami.py"], cwd=tmp_path, env=CLEAN_ENV, **pipes) as process:  # type: ignore[call-overload]
        with Client(base_url=process.stdout.readline().strip(), timeout=DEADLINE) as client:
            events = client.send_message("call whoami")
        process.communicate("\n", DEADLINE)
        assert process.returncode == 0
    assert {"type": "thinking", "content": "Looking you up"}.items() <= events[3].items()
    assert "local" in said(events)


def readme_block(name: str) -> str:
    """A code block of the README, by the file name in its first line."""
    blocks = (HERE / "README.md").read_text(encoding="utf-8").split("```")
    return next(block.partition("\n")[2] for block in blocks if f"# {name}" in block.partition("\n")[2][:80])


def readme_example(name: str) -> dict[str, Any]:
    """What a code block of the README defines, run after the imports that the blocks share."""
    shared = "from agents import Agent, RunContextWrapper, function_tool\nimport chatkit_server as ck\n"
    names: dict[str, Any] = {}
    exec(shared + readme_block(name), names)
    return names


def test_the_readmes_progress_effect_and_notice_reach_the_reader_at_once() -> None:
    weather = readme_example("weather.py")["weather"]
    with serving(scripted([Call("weather", {"city": "Oslo"})], ["Sunny"], tools=[weather])) as client:
        events = client.send_message("hi")
        assert kinds(events)[2:7] == ["tool_call", "progress", "effect", "notice", "tool_result"]
        assert events[3].items() >= {"content": "Looking at the sky of Oslo", "icon": "search"}.items()
        assert events[4].items() >= {"name": "show_map", "data": {"city": "Oslo"}}.items()
        assert events[5].items() >= {"level": "info", "title": "Weather"}.items()
        assert [row["role"] for row in client.messages(1)] == ["user", "tool", "assistant"]


def test_the_readmes_client_tool_waits_for_the_frontend() -> None:
    tool = readme_example("selection.py")["get_selection"]
    agent = scripted([Call("get_selection")], ["You selected two lines."], tools=[tool])
    with serving(agent) as client:
        events = client.send_message("what is selected?")
        assert kinds(events)[2:] == ["tool_call", "client_tool", "done"]
        assert events[3].items() >= {"name": "get_selection", "args": {"kind": "text"}}.items()
        path = "/api/conversations/1/tool_output"
        assert client.post(path, json={"result": 1, "id": "another"}).status_code == 409
        answer = client.post(path, json={"result": {"lines": 2}}).text
        assert "You selected two lines." in answer
        assert client.post(path, json={"result": 1}).status_code == 409
        shown = agent.model.seen[1]  # type: ignore[union-attr]
        assert [item.get("type") for item in shown[1:]] == ["function_call", "function_call_output"]
        assert json.loads(shown[2]["output"]) == {"lines": 2}


def test_the_readmes_questions_wait_for_answers() -> None:
    tool = readme_example("dinner.py")["plan_dinner"]
    agent = scripted([Call("plan_dinner")], ["Soup it is."], tools=[tool])
    with serving(agent) as client:
        events = client.send_message("plan dinner")
        assert kinds(events)[2:] == ["tool_call", "input", "done"]
        given = {"main": {"values": ["soup", "pasta"]}, "unknown": {"values": ["x"]}}
        body = {"item_id": events[3]["id"], "answers": given}
        assert "Soup" in client.post("/api/conversations/1/answers", json=body).text
        assert client.post("/api/conversations/1/answers", json=body).status_code == 409
        told = json.loads(agent.model.seen[1][-1]["output"])  # type: ignore[union-attr]
        assert told == [
            {"question": "What?", "values": ["soup"], "skipped": False},
            {"question": "Any wishes?", "skipped": True},
        ]


def test_the_readmes_widget_counts_clicks() -> None:
    names = readme_example("counter.py")
    agent = scripted([Call("show_counter")], ["Click it."], tools=[names["show_counter"]])
    with serving(agent, on_action=names["on_action"]) as client:
        widget = next(event for event in client.send_message("hi") if event["type"] == "widget")
        assert widget["widget"]["children"][0]["label"] == "0"
        action = {"type": "count", "payload": {"count": 1}}
        events = client.operate("threads.custom_action", thread_id="1", item_id=str(widget["id"]), action=action)
        assert events[-1]["item"]["widget"]["children"][0]["label"] == "1"


def test_the_readmes_file_reaches_the_model() -> None:
    agent = scripted(["Oat milk."])
    with serving(agent) as client:
        exec(readme_block("send_file.py").replace("http://localhost:8000", str(client.base_url)), {})
        parts = agent.model.seen[0][-1]["content"]  # type: ignore[union-attr]
        assert "Buy oat milk." in parts[0]["text"]
        assert parts[-1]["text"] == "What does this say?"


def test_the_readmes_dictation() -> None:
    with ck.serve_in_background(readme_example("dictation.py")["app"]) as url, Client(base_url=url) as client:
        spoken = client.operate("input.transcribe", audio_base64="AAAA", mime_type="audio/webm;codecs=opus")
        assert spoken == {"text": "3 bytes of audio/webm"}


def test_uvicorn_starts_the_factory(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "chatkit_server:create_app", "--factory", "--port", str(port)]
    with open(tmp_path / "log.txt", "wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=CLEAN_ENV, stderr=log, stdout=log)
    try:
        with Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE) as client:
            until(lambda: answers(client), 30)
            assert said(client.send_message("add milk"))
    finally:
        process.terminate()
        process.wait(DEADLINE)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_the_app_works_mounted_in_another_one(tmp_path: Path) -> None:
    """Starlette runs no lifespan for a mounted app: the store opens all the same, and closes with the event loop."""
    file = tmp_path / "chat.db"
    outer = FastAPI()
    outer.mount("/assistant", ck.create_app(settings=ck.Settings(database=str(file), model="demo")))

    async def visit() -> None:
        transport = httpx.ASGITransport(app=outer)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/assistant/chatkit", json={"message": "add milk"})
            assert "Added" in answer.text
            assert (await client.get("/assistant/api/conversations/")).json()[0]["id"] == 1
            assert (await client.get("/assistant/")).status_code == 200
            assert (await client.get("/assistant/health")).json()["status"] == "healthy"

    threads = our_threads()
    asyncio.run(visit())
    assert until(lambda: our_threads() <= threads)
    assert not (tmp_path / "chat.db-wal").exists()  # which a connection that was closed leaves behind no more


def test_the_app_works_in_starlettes_test_client() -> None:
    app = ck.create_app(scripted(["hello"]), settings=ck.Settings(database=":memory:", model="demo"))
    with TestClient(app) as client:
        assert "hello" in client.post("/chatkit", json={"message": "x"}).text
        assert len(client.get("/api/conversations/1").json()["messages"]) == 2


# ========================================================================================================== Notebook


async def test_events_without_a_server() -> None:
    async with ck.Store(":memory:") as store:
        events = [event async for event in ck.stream_agent("add buy milk", store=store)]
        assert kinds(events) == ["thread", "thinking", "tool_call", "tool_result", "text", "done"]
        thread_id = events[0]["thread_id"]
        events = [event async for event in ck.stream_agent("show my tasks", store=store, conversation_id=thread_id)]
        assert "buy milk" in said(events)
        with pytest.raises(ck.Refused, match="Conversation not found"):
            await anext(ck.stream_agent("x", store=store, conversation_id=99))


def test_servers_in_the_background_start_stop_and_keep_apart() -> None:
    def serve(answer: str, port: int = 0) -> ck.BackgroundServer:
        settings = ck.Settings(database=":memory:", model="demo")
        return ck.serve_in_background(ck.create_app(scripted([answer]), settings=settings), port=port)

    def ask(server: ck.BackgroundServer) -> str:
        with Client(base_url=server.url) as client:
            return said(client.send_message("x"))

    threads = our_threads()
    first, second = serve("one"), serve("two")
    assert (ask(first), ask(second)) == ("one", "two")
    first.stop()
    again = serve("three", port=int(first.url.rpartition(":")[2]))
    assert ask(again) == "three"
    again.stop()
    second.stop()
    second.stop()
    assert until(lambda: our_threads() <= threads)


def test_the_cells_of_the_readme_run_in_a_kernel(tmp_path: Path) -> None:
    optional("ipykernel")
    nbformat, nbclient = optional("nbformat"), optional("nbclient")
    cells = [
        "import logging, warnings; warnings.simplefilter('error')",
        "import chatkit_server as ck",
        "server = ck.serve_in_background(ck.create_app(database=':memory:'))",
        "import httpx; print(httpx.post(server.url + '/chatkit', json={'message': 'add milk'}).text)",
        "server.stop()",
        "with ck.serve_in_background(ck.create_app(database=':memory:')) as url:\n"
        "    print(httpx.get(url + '/health').text)",
        "async with ck.Store(':memory:') as store:\n"
        "    async for event in ck.stream_agent('add buy milk', store=store):\n        print(event)",
        "import gc, threading; gc.collect(); print([t.name for t in threading.enumerate() if 'chatkit' in t.name])",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    env = {**CLEAN_ENV, "JUPYTER_PLATFORM_DIRS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = ["".join(out.get("text", "") for out in cell.outputs) for cell in notebook.cells]
    assert "Added" in outputs[3] and "[DONE]" in outputs[3]
    assert '"healthy"' in outputs[5]
    assert "'type': 'done'" in outputs[6]
    assert outputs[7].strip() == "[]"


# ============================================================================================================ Store


async def test_an_older_file_is_brought_forward_and_searchable(tmp_path: Path) -> None:
    """A file of schema version 1 had no attachments and no search."""
    file = tmp_path / "old.db"
    async with ck.Store(file) as store:
        await store.add_user_message("ann", None, "Old title", "old words")
    with contextlib.closing(sqlite3.connect(file)) as db:
        names = db.execute(
            "SELECT type, name FROM sqlite_schema WHERE name LIKE '%search' OR type = 'trigger'"
        ).fetchall()
        for kind, name in names:
            db.execute(f"DROP {kind} {name}")
        db.execute("DROP TABLE attachments")
        db.execute("PRAGMA user_version = 1")
    async with ck.Store(file) as store:
        assert [row["id"] for row in await store.search_conversations("ann", "words")] == [1]
        assert [row["id"] for row in await store.search_conversations("ann", "title")] == [1]
        assert await store.search_conversations("bob", "words") == []
        await store.delete_conversation("ann", 1)
        assert await store.search_conversations("ann", "words") == []


async def test_what_was_being_written_at_a_crash_is_marked(tmp_path: Path) -> None:
    async with ck.Store(tmp_path / "chat.db") as store:
        conversation, _ = await store.add_user_message("ann", None, "t", "hello")
        await store.add_message("ann", conversation["id"], "assistant", "half", status="streaming")
    async with ck.Store(tmp_path / "chat.db") as store:
        rows = await store.messages("ann", conversation["id"])
        assert [(row["content"], row["status"]) for row in rows] == [("hello", "done"), ("half", "interrupted")]


# ================================================================================================ a provider to talk to
# A server on loopback that speaks as OpenAI (both APIs) and Gemini do, says what a test wants, and remembers what it
# was asked. So what is tested is all between two real sockets: the dialects, the app, the SDK, the provider's client.

KEY = "the-key-that-nobody-may-see"
USAGE = {"input_tokens": 7, "output_tokens": 5}  # of every answer


class Refuse(Think):
    """A step of a provider's answer: a delta of a refusal."""


class Status:
    """The whole of a provider's answer: an HTTP error, which quotes the request's headers as some proxies do."""

    def __init__(self, code: int, **headers: str) -> None:
        self.code = code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Raw:
    """A step of a provider's answer: these bytes, whatever they mean."""

    def __init__(self, data: bytes) -> None:
        self.data = data


class Reset:
    """A step of a provider's answer: the connection breaks."""


class End:
    """The last step of a provider's answer, where it is not the usual one: why it ends, as the API calls it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def pieces(text: str) -> list[str]:
    return [text[start : start + 7] for start in range(0, len(text), 7)]


def chat_completion(steps: list[Any], body: dict[str, Any]) -> Iterator[Any]:
    """Steps as `chat.completion.chunk`s; what is not of the protocol comes through as it is."""

    def chunk(delta: dict[str, Any], finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        return {**head, "choices": choices, **fields}

    calls, reason = 0, "stop"
    yield chunk({"role": "assistant", "content": ""})
    for step in steps:
        if isinstance(step, str):
            yield chunk({"content": step})
        elif isinstance(step, Refuse):
            yield chunk({"refusal": step.text})
        elif isinstance(step, Think):
            yield chunk({"reasoning_content": step.text})
        elif isinstance(step, Call):
            start = {"index": calls, "id": step.call_id or f"call_{calls}", "type": "function"}
            yield chunk({"tool_calls": [{**start, "function": {"name": step.name, "arguments": ""}}]})
            for piece in pieces(step.arguments):
                yield chunk({"tool_calls": [{"index": calls, "function": {"arguments": piece}}]})
            calls, reason = calls + 1, "tool_calls"
        elif isinstance(step, End):
            reason = step.reason
        else:
            yield step
    yield chunk({}, reason)
    if body.get("stream_options", {}).get("include_usage"):
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        yield chunk({}, choices=[], usage=usage)
    yield Raw(b"data: [DONE]\n\n")


def responses_api(steps: list[Any], body: dict[str, Any]) -> Iterator[Any]:
    """Steps as the events of OpenAI's Responses API."""
    output: list[dict[str, Any]] = []
    response = {"id": "resp_1", "object": "response", "created_at": 1, "model": body["model"], "output": output}
    response |= {"status": "in_progress", "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    number = 0

    def event(kind: str, **fields: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"type": f"response.{kind}", "sequence_number": number, **fields}

    def item(kind: str, deltas: list[Any], entry: dict[str, Any]) -> Iterator[Any]:
        """An output item from its beginning to its end; `deltas` may have other steps among them."""
        where = {"item_id": entry["id"], "output_index": len(output)}
        text = "".join(delta for delta in deltas if isinstance(delta, str))
        part: dict[str, Any] = {}
        if kind == "output_text":
            part, where["content_index"] = {"type": kind, "text": text, "annotations": [], "logprobs": []}, 0
        elif kind == "refusal":
            part, where["content_index"] = {"type": kind, "refusal": text}, 0
        elif kind == "reasoning_summary_text":
            part, where["summary_index"] = {"type": "summary_text", "text": text}, 0
        empty = {**part, "text" if "text" in part else "refusal": ""}
        part_event = "reasoning_summary_part" if "summary_index" in where else "content_part"
        start = {**entry, "status": "in_progress", **({"arguments": ""} if "arguments" in entry else {})}
        yield event("output_item.added", item=start, output_index=len(output))
        if part:
            yield event(f"{part_event}.added", part=empty, **where)
        for delta in deltas:
            logprobs: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
            yield event(f"{kind}.delta", delta=delta, **where, **logprobs) if isinstance(delta, str) else delta
        extra = {"arguments": text} if "arguments" in entry else {"refusal" if kind == "refusal" else "text": text}
        yield event(f"{kind}.done", **where, **extra)
        if part:
            yield event(f"{part_event}.done", part=part, **where)
            entry = {**entry, "summary" if "summary_index" in where else "content": [part]}
        output.append({**entry, "status": "completed"})
        yield event("output_item.done", item=output[-1], output_index=len(output) - 1)

    yield event("created", response=response)
    yield event("in_progress", response=response)
    items: list[list[Any]] = []  # the steps of each
    for step in steps:
        begins = isinstance(step, (str, Think, Call, End))
        if items and (not begins or type(step) is type(items[-1][0]) is not Call):
            items[-1].append(step)
        else:
            items.append([step])
    kinds_of_text = {str: "output_text", Refuse: "refusal", Think: "reasoning_summary_text"}
    end = "completed"
    for first, *rest in items:
        if isinstance(first, Call):
            entry: dict[str, Any] = {"type": "function_call", "id": f"fc_{len(output)}", "name": first.name}
            entry |= {"arguments": first.arguments, "call_id": first.call_id or f"call_{len(output)}"}
            yield from item("function_call_arguments", pieces(first.arguments), entry)
            yield from rest
        elif isinstance(first, End):
            end = first.reason
        elif type(first) in kinds_of_text:
            entry = {"type": "message", "id": f"msg_{len(output)}", "role": "assistant", "content": []}
            if type(first) is Think:
                entry = {"type": "reasoning", "id": f"rs_{len(output)}", "summary": []}
            deltas = [step.text if isinstance(step, Think) else step for step in (first, *rest)]
            yield from item(kinds_of_text[type(first)], deltas, entry)
        else:
            yield from (first, *rest)
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    usage = {**USAGE, "total_tokens": 12, **details}
    error = {"code": "server_error", "message": f"{KEY} broke"} if end == "failed" else None
    yield event(end, response={**response, "status": end, "usage": usage, "error": error})


def gemini(steps: list[Any], body: dict[str, Any]) -> Iterator[Any]:
    """Steps as what `streamGenerateContent?alt=sse` sends."""

    def chunk(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
        candidate = {"content": {"parts": list(parts), "role": "model"}, "index": 0, **fields}
        usage = {"promptTokenCount": 7, "candidatesTokenCount": 5, "totalTokenCount": 12}
        head = {"modelVersion": "gemini-2.5-flash", "responseId": "r1"}
        return {"candidates": [candidate], **head, **({"usageMetadata": usage} if fields else {})}

    reason = "STOP"
    for step in steps:
        if isinstance(step, str):
            yield chunk({"text": step})
        elif isinstance(step, Refuse):
            reason = "SAFETY"
        elif isinstance(step, Think):
            yield chunk({"text": step.text, "thought": True})
        elif isinstance(step, Call):  # whole; its call_id, which Gemini has not, is the signature here
            call = {"functionCall": {"name": step.name, "args": json.loads(step.arguments)}}
            yield chunk({**call, "thoughtSignature": step.call_id} if step.call_id else call)
        elif isinstance(step, End):
            reason = step.reason
        else:
            yield step
    yield chunk({"text": ""}, finishReason=reason)


class Provider(ThreadingHTTPServer):
    """Gives its answers one after the other, the last for ever. `requests` is what came: path, headers, JSON body."""

    daemon_threads = True

    def __init__(self, *answers: list[Any]) -> None:
        super().__init__(("127.0.0.1", 0), ProviderHandler)
        self.answers = list(answers)
        self.requests: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Provider:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def says(self, *answers: list[Any]) -> None:
        """From now on."""
        self.answers, self.requests = list(answers), []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what some tests are about."""


class ProviderHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Provider

    def log_message(self, format: str, *args: Any) -> None:
        """Not a word."""

    def do_POST(self) -> None:
        provider = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        path = self.path.removeprefix("http://api.openai.com")
        provider.requests.append({"path": path, "headers": dict(self.headers), "body": body})
        steps = provider.answers[min(len(provider.requests), len(provider.answers)) - 1]
        if isinstance(steps[0], Status):
            return self.refuse(steps[0])
        if isinstance(steps[0], Reset):
            return self.reset()
        while isinstance(steps[0], Wait):
            if not self.wait(steps[0]):
                return None
            steps = steps[1:]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        speak = chat_completion if path == "/v1/chat/completions" else responses_api
        speak = gemini if path.endswith(":streamGenerateContent?alt=sse") else speak
        for step in speak(steps, body):
            if isinstance(step, Reset):
                return self.reset()
            if isinstance(step, Wait):
                if not self.wait(step):
                    return None
                continue
            name = f"event: {step['type']}\n" if speak is responses_api and isinstance(step, dict) else ""
            data = step.data if isinstance(step, Raw) else f"{name}data: {json.dumps(step)}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")
        return None

    def refuse(self, status: Status) -> None:
        echo = json.dumps({"error": {"code": status.code, "message": f"No. You sent:\n{self.headers}", "status": "X"}})
        self.send_response(status.code)
        for name, value in {"content-type": "application/json", **status.headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(echo)))
        self.end_headers()
        self.wfile.write(echo.encode())

    def reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def wait(self, step: Wait) -> bool:
        """Whether the client is still there when the gate opens."""
        step.reached.set()
        while not step.gate.is_set():
            if select.select([self.connection], [], [], 0.005)[0]:
                step.left.set()
                self.close_connection = True
                return False
        return True


PROTOCOLS = ("chat", "responses", "gemini")


def pointing_at(provider: Provider, protocol: str) -> tuple[dict[str, str], dict[str, str]]:
    """The settings and the environment with which the app talks to a provider in one of the protocols.

    The Responses API is spoken to api.openai.com only, so there the provider is the proxy on the way.
    """
    if protocol == "gemini":
        settings = {"model": "gemini/gemini-2.5-flash", "gemini_api_key": KEY}
        return settings, {"GEMINI_API_BASE": provider.url + "/v1beta"}
    settings = {"model": "gpt-x", "openai_api_key": KEY, "openai_base_url": provider.url + "/v1"}
    if protocol == "chat":
        return settings, {}
    proxy = {"http_proxy": provider.url, "no_proxy": "127.0.0.1,localhost"}
    return {**settings, "openai_base_url": "http://api.openai.com/v1"}, proxy


@contextlib.contextmanager
def talking_to(
    protocol: str, *answers: list[Any], agent: Agent[Any] | None = None, **settings: Any
) -> Iterator[tuple[Client, Provider]]:
    """The app, of which a client comes back, with a provider behind it."""
    with Provider(*answers) as provider, pytest.MonkeyPatch.context() as patch:
        pointing, env = pointing_at(provider, protocol)
        for name, value in env.items():
            patch.setenv(name, value)
        # The client's own pauses before it tries again are for real providers.
        patch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
        with serving(agent, **{**pointing, **settings}) as client:
            yield client, provider


@function_tool
async def raising() -> str:
    """Fails."""
    raise RuntimeError(f"with {KEY} in its text")


@function_tool
async def hanging() -> str:
    """Never comes back."""
    await asyncio.Event().wait()
    return ""


@pytest.fixture(scope="module", params=PROTOCOLS)
def line(request: pytest.FixtureRequest) -> Iterator[tuple[str, Client, Provider]]:
    """One app and one provider for all tests of a protocol: starting them takes longer than what most tests do."""
    agent = ck.todo_agent()
    agent.tools += [raising]
    with talking_to(request.param, [], agent=agent) as (client, provider):
        yield request.param, client, provider


Shown = list[tuple[str, ...]]


def provider_was_shown(request: dict[str, Any]) -> Shown:
    """What the model was shown, in any of the protocols: ("user", text), ("call", id, name), ("output", id) and so on.

    Where Gemini has no id, the signature stands in a call, and nothing in an output.
    """
    body = request["body"]
    items: Shown = []
    for entry in body.get("input") or body.get("messages") or body.get("contents"):
        role = entry.get("role", "")
        if entry.get("type") == "function_call":
            items.append(("call", entry["call_id"], entry["name"]))
        elif entry.get("type") == "function_call_output":
            items.append(("output", entry["call_id"]))
        elif role == "tool":
            items.append(("output", entry["tool_call_id"]))
        elif entry.get("tool_calls"):
            items += [("call", call["id"], call["function"]["name"]) for call in entry["tool_calls"]]
        elif role not in ("system", "developer"):
            content: Any = entry.get("parts") or entry["content"]
            parts: list[Any] = [{"text": content}] if isinstance(content, str) else content
            for part in parts:
                if "function_call" in part:
                    items.append(("call", part.get("thoughtSignature", ""), part["function_call"]["name"]))
                elif "function_response" in part:
                    items.append(("output", ""))
                else:
                    items.append(({"model": "assistant"}.get(role, role), part["text"]))
    return items


# ---- what each of them says arrives, and what each is told is right

Line = tuple[str, Client, Provider]


def test_a_providers_deltas_arrive_as_they_come(line: Line) -> None:
    _, client, provider = line
    pause = Wait()
    provider.says([Think("Hm"), Think("m."), "Hel", pause, "lo", "."])
    events = []
    with client.stream("POST", "/chatkit", json={"message": "hi"}) as response:
        for event in plain_events(response):
            events.append(event)
            if event["type"] == "text" and not pause.gate.is_set():
                assert event["content"] == "Hel" and pause.reached.wait(DEADLINE)
                pause.gate.set()
    assert kinds(events) == ["thread", "thinking", "text", "done"]
    assert [event["content"] for event in events if event["type"] == "text"] == ["Hel", "lo", "."]
    assert [event["content"] for event in events if event["type"] == "thinking"] == ["", "Hm", "m."]
    assert events[-1]["status"] == "completed" and events[-1]["usage"] == USAGE


def test_a_providers_tool_calls_run_and_go_back_to_it_as_they_were(line: Line) -> None:
    protocol, client, provider = line
    ids = ["call_" + "c2lnbmVk" * 250, "call_2"]
    calls = [Call("add_task", {"title": title}, each) for title, each in zip(("milk", "eggs"), ids, strict=True)]
    provider.says(calls, ["Both ", "are in."], ["Yes."])
    events = client.send_message("add milk and eggs")
    client.send_message("sure?", events[0]["thread_id"])
    made, given = ([event for event in events if event["type"] == kind] for kind in ("tool_call", "tool_result"))
    assert [event["args"]["title"] for event in made] == [event["result"]["title"] for event in given]
    assert [event["args"] for event in made] == [{"title": "milk"}, {"title": "eggs"}]
    assert [event["id"] for event in made] == [event["id"] for event in given]
    assert kinds(events) == ["thread", "thinking", "tool_call", "tool_result", "text", "done"]
    assert said(events) == "Both are in."
    assert events[-1]["usage"] == {name: 2 * count for name, count in USAGE.items()}
    _, within, after = map(provider_was_shown, provider.requests)
    answered: Shown = [*(("call", each, "add_task") for each in ids), *(("output", each) for each in ids)]
    earlier = answered
    if protocol == "gemini":  # the SDK puts each output behind its call, and sends signatures within the turn only
        answered = [answered[0], ("output", ""), answered[1], ("output", "")]
        earlier = [("call", "", "add_task"), ("output", "")] * 2
    assert within == [("user", "add milk and eggs"), *answered]
    assert after == [("user", "add milk and eggs"), *earlier, ("assistant", "Both are in."), ("user", "sure?")]


def test_each_message_has_an_id_of_its_own_whatever_the_provider_calls_it(line: Line) -> None:
    _, client, provider = line
    provider.says([Think("Hm."), "First. ", "And so on."])
    done = client.send_message("hi")[-1]
    ids = [done["message_id"]]
    ids += [client.send_message("on", done["thread_id"])[-1]["message_id"] for _ in range(4)]
    assert len(set(ids)) == 5
    thread = None
    for _ in range(5):
        if thread is None:
            events = client.operate("threads.create", input=user_input("hi"))
            thread = events[0]["thread"]["id"]
        else:
            events = client.operate("threads.add_user_message", input=user_input("hi"), thread_id=thread)
        ids += [int(event["item"]["id"]) for event in events if event["type"] == "thread.item.done"]
    assert len(set(ids)) == len(ids) == 5 + 5 * 3  # a user's message, a thought and an answer each


def test_a_providers_reasoning_is_a_workflow_in_chatkit(line: Line) -> None:
    _, client, provider = line
    provider.says([Think("Hm"), Think("m."), "Yes."])
    events = client.operate("threads.create", input=user_input("hi"))
    items = [event["item"] for event in events if event["type"] == "thread.item.done"]
    assert [item["type"] for item in items] == ["user_message", "workflow", "assistant_message"]
    assert [task["content"] for task in items[1]["workflow"]["tasks"]] == ["Hmm."]


# ---- stopping


@pytest.mark.parametrize("early", [True, False], ids=["before it speaks", "while it speaks"])
@pytest.mark.parametrize("way", ["cancel", "leave"])
def test_stopping_closes_the_providers_connection(line: Line, way: str, early: bool) -> None:
    _, client, provider = line
    pause = Wait()
    provider.says([pause, "never"] if early else ["Half", pause, "never"], ["Well."])
    body = {"type": "threads.create", "params": {"input": user_input("hi")}}
    with client.stream("POST", "/chatkit", json=body) as response:
        thread, chunks = int(response.headers["x-thread-id"]), response.iter_text()
        if not early:
            until(lambda: "Half" in next(chunks))
        assert pause.reached.wait(DEADLINE)
        if way == "cancel":
            assert client.post(f"/api/conversations/{thread}/cancel").json() == {"status": "cancelled"}
    assert pause.left.wait(1)
    until(lambda: client.post(f"/api/conversations/{thread}/cancel").status_code == 409)
    texts = [(row["content"], row["status"]) for row in client.messages(thread) if row["role"] == "assistant"]
    assert texts == ([] if early else [("Half", "cancelled")])
    assert said(client.send_message("go on", thread)) == "Well."
    told = json.dumps(provider.requests[1]["body"])
    assert ("Half" in told) != early
    assert told.rindex("hi" if early else "Half") < told.index(ck.STOPPED) < told.index("go on")


# ---- failing

OOPS = Raw(b"data: {oops\n\n")
SOON = {"retry_after_ms": "1"}
KEY_REJECTED, REFUSED, REFUSAL = ("key_rejected", False), ("refused", False), ("refusal", False)
RATE_LIMITED, UNREACHABLE = ("rate_limited", True), ("unreachable", True)
BAD_ANSWER, EMPTY, NOT_FOUND = ("bad_answer", True), ("empty", True), ("model_not_found", False)

# What the provider does; the error's code and whether to try again is worth it; what was said until then. What Gemini
# does differently, because of LiteLLM, stands in the next table.
FAILURES: dict[str, tuple[list[Any], tuple[str, bool], str]] = {
    "401": ([Status(401)], KEY_REJECTED, ""),
    "402": ([Status(402)], RATE_LIMITED, ""),
    "403": ([Status(403)], KEY_REJECTED, ""),
    "404": ([Status(404)], NOT_FOUND, ""),
    "400": ([Status(400)], REFUSED, ""),
    "413": ([Status(413)], REFUSED, ""),
    "429": ([Status(429, **SOON)], RATE_LIMITED, ""),
    "429, and a long wait": ([Status(429, retry_after="30")], RATE_LIMITED, ""),
    "500": ([Status(500, **SOON)], UNREACHABLE, ""),
    "503": ([Status(503, **SOON)], UNREACHABLE, ""),
    "503, and a long wait": ([Status(503, retry_after="Wed, 21 Oct 2065 07:28:00 GMT")], UNREACHABLE, ""),
    "reset": ([Reset()], UNREACHABLE, ""),
    "reset in the middle": (["Half ", Reset()], UNREACHABLE, "Half "),
    "not JSON": ([OOPS], BAD_ANSWER, ""),
    "not JSON in the middle": ([*"a long half", OOPS], BAD_ANSWER, "a long half"),
    "no content": ([""], EMPTY, ""),
    "no room for content": ([End("length")], BAD_ANSWER, ""),
    "refusal": ([Refuse("I can't "), Refuse("do that.")], REFUSAL, "I can't do that."),
    "refusal in the middle": (["Well, ", Refuse("no.")], REFUSAL, "Well, no."),
    "a call id twice": ([Call("add_task", {"title": each}, "same") for each in "ab"], BAD_ANSWER, ""),
}
FAILURES_OF_GEMINI: dict[str, tuple[list[Any], tuple[str, bool], str] | None] = {
    "not JSON": ([OOPS], UNREACHABLE, ""),
    "not JSON in the middle": ([*"a long half", OOPS], UNREACHABLE, "a long half"),
    "no room for content": ([End("MAX_TOKENS")], EMPTY, ""),
    "refusal": ([Refuse("")], REFUSAL, "Response withheld by the provider's content filter."),
    **dict.fromkeys(["refusal in the middle", "a call id twice"]),
}
SAFE_TEXTS = re.compile(r"The (model|answer|connection)[A-Za-z' ,:.]+")


@pytest.mark.parametrize(
    ("failure", "dialect"),
    [*((failure, "plain") for failure in FAILURES), *((failure, "chatkit") for failure in ("401", "503", "refusal"))],
)
def test_a_provider_that_fails_is_explained_and_the_next_message_works(line: Line, failure: str, dialect: str) -> None:
    protocol, client, provider = line
    case = FAILURES_OF_GEMINI.get(failure, FAILURES[failure]) if protocol == "gemini" else FAILURES[failure]
    if case is None:
        pytest.skip("Gemini has no such thing")
    steps, (code, allow_retry), kept = case
    provider.says(steps)
    if dialect == "plain":
        events = client.send_message("hi")
        thread, error = events[0]["thread_id"], events[-2]
        assert error["code"] == code and events[-1]["status"] == "failed" and said(events) == kept
    else:
        events = client.operate("threads.create", input=user_input("hi"))
        thread, error = int(events[0]["thread"]["id"]), events[-1]
        assert error["code"] == "custom"
    assert error["type"] == "error" and error["allow_retry"] == allow_retry
    assert SAFE_TEXTS.fullmatch(error["message"])
    rows = client.messages(thread)
    assert "".join(row["content"] for row in rows if row["role"] == "assistant") == kept
    assert not [row for row in rows if row["status"] == "streaming"]
    assert KEY not in json.dumps([events, rows])
    provider.says(["Next."])
    assert said(client.send_message("again", thread)) == "Next."
    told = provider_was_shown(provider.requests[0])
    assert told[0] == ("user", "hi") and told[-1] == ("user", "again")
    assert ("".join(item[1] for item in told if item[0] == "assistant")) == kept


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (Call("no_such_tool"), "Tool 'no_such_tool' not found."),
        (Call("add_task", '{"title": "mi'), {"error": "These arguments do not fit the parameters of add_task."}),
        (Call("add_task", {"titel": "milk"}), {"error": "These arguments do not fit the parameters of add_task."}),
        (Call("raising"), {"error": "The tool raising failed."}),
    ],
    ids=["unknown", "arguments are not JSON", "arguments do not fit", "it raises"],
)
def test_a_tool_call_that_fails_is_told_to_the_model_which_goes_on(line: Line, call: Call, result: Any) -> None:
    protocol, client, provider = line
    if protocol == "gemini" and not call.arguments.endswith("}"):
        pytest.skip("Gemini sends arguments as an object")
    provider.says([call], ["Sorry."])
    events = client.send_message("hi")
    assert [event["result"] for event in events if event["type"] == "tool_result"] == [result]
    assert said(events) == "Sorry." and events[-1]["status"] == "completed" and KEY not in json.dumps(events)
    assert [item[0] for item in provider_was_shown(provider.requests[1])] == ["user", "call", "output"]
    provider.says(["Next."])
    assert said(client.send_message("again", events[0]["thread_id"])) == "Next."


@pytest.mark.parametrize(
    ("protocol", "answer", "kept"),
    [
        ("chat", [Wait()], ""),
        *((protocol, ["Half ", Wait()], "Half ") for protocol in PROTOCOLS),
        ("chat", ["I'll ask.", Call("hanging")], "I'll ask."),
    ],
    ids=["before it speaks", *PROTOCOLS, "a tool that hangs"],
)
def test_an_answer_that_stops_dead_times_out(protocol: str, answer: list[Any], kept: str) -> None:
    agent = Agent(name="Hanging", tools=[hanging])
    with talking_to(protocol, answer, ["Next."], agent=agent, turn_timeout=0.7) as (client, _):
        events = client.send_message("hi")
        assert (events[-2]["code"], events[-2]["allow_retry"], said(events)) == ("timeout", True, kept)
        rows = [row for row in client.messages(1) if row["role"] != "user"]
        assert "".join(row["content"] for row in rows) == kept
        assert not rows or rows[-1]["status"] == "failed"
        assert said(client.send_message("again", 1)) == "Next."


def test_what_counts_is_the_status_that_a_provider_gave() -> None:
    """LiteLLM takes a port or a length in the provider's text for a status."""

    class Guessed(Exception):
        status_code = 403

    class Given(Exception):
        status_code = 503

    error = Guessed("from 127.0.0.1:34033")
    error.__context__ = Given()
    assert ck.explain(error)[0] == "unreachable"


@pytest.mark.parametrize("protocol", ["chat", "gemini"])
def test_a_provider_that_is_not_there_is_unreachable(protocol: str) -> None:
    with talking_to(protocol, ["Never."]) as (client, provider):
        provider.shutdown()
        provider.server_close()
        assert [event["code"] for event in client.send_message("hi") if event["type"] == "error"] == ["unreachable"]


# ---- what leaves the machine, and what the log says


def env_of(settings: dict[str, str]) -> dict[str, str]:
    return {ck.Settings.env_name(name): value for name, value in settings.items()}


def test_no_key_that_a_provider_quotes_comes_into_the_log(tmp_path: Path) -> None:
    answers: list[list[Any]] = [[Status(401)], ["Half ", Raw(b"data: " + KEY.encode() + b"\n\n")], [""]]
    with Provider() as provider:
        (settings, _), (others, env) = (pointing_at(provider, protocol) for protocol in ("chat", "gemini"))
        env |= env_of(others) | env_of(settings) | {"CHATKIT_MODELS": others["model"], "CHATKIT_LOG_LEVEL": "debug"}
        with Process("--database", ":memory:", cwd=tmp_path, env=env) as process, process.client() as client:
            told = []
            for model in (settings["model"], others["model"]):
                for answer in answers:
                    provider.says(answer)
                    told += client.send_message("hi", model=model)
            process.stop(signal.SIGTERM)
            assert process.process.stdout is not None
            printed = "\n".join([*process.lines, process.process.stdout.read(), process.log_file.read_text()])
    assert [event["status"] for event in told if event["type"] == "done"] == ["failed"] * 6
    assert printed.count("the turn failed") == 6 and "[secret]" in printed
    assert KEY not in printed and KEY not in json.dumps(told)


WHO_IS_CALLED = """
import atexit, os, sys

called = []
def note(event, arguments):
    if event == "socket.getaddrinfo":
        called.append(arguments[:2])
    elif event == "socket.connect":
        called.append(arguments[1][:2])
sys.addaudithook(note)
atexit.register(lambda: print(called))  # registered first, it runs last

import asyncio
import chatkit_server as ck

async def ask(model):
    async with ck.Store(":memory:") as store:
        settings = ck.Settings.from_env(model=model)
        async for event in ck.stream_agent("hi", store=store, settings=settings):
            print(event, file=sys.stderr)

asyncio.run(ask("gpt-x"))
assert "litellm" not in sys.modules
asyncio.run(ask("gemini/gemini-2.5-flash"))
assert "litellm" in sys.modules
"""


def test_only_the_provider_is_called_and_litellm_is_imported_when_it_is_needed(tmp_path: Path) -> None:
    call = [Call("add_task", {"title": "milk"})]
    with Provider(call, ["One."], call, ["Two."]) as provider:
        (settings, _), (others, env) = (pointing_at(provider, protocol) for protocol in ("chat", "gemini"))
        env = {**CLEAN_ENV, **env, **env_of(others), **env_of(settings)}
        command = [sys.executable, "-c", WHO_IS_CALLED]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "'One.'" in result.stderr and "'Two.'" in result.stderr, result.stderr
    assert len(provider.requests) == 4
    assert set(ast.literal_eval(result.stdout)) == {("127.0.0.1", provider.server_port)}


# ---- choosing a model


@pytest.mark.parametrize(
    ("env", "model", "kind"),
    [
        ({"CHATKIT_MODEL": "demo", "OPENAI_API_KEY": "k", "GEMINI_API_KEY": "k"}, "demo", "DemoModel"),
        ({"CHATKIT_MODEL": "ollama_chat/llama3", "OPENAI_API_KEY": "k"}, "ollama_chat/llama3", "LitellmModel"),
        ({"CHATKIT_MODEL": "anthropic/c", "OPENAI_BASE_URL": "http://x/v1"}, "anthropic/c", "LitellmModel"),
        ({"CHATKIT_MODEL": "gpt-x", "OPENAI_API_KEY": "k"}, "gpt-x", "OpenAIResponsesModel"),
        ({"CHATKIT_MODEL": "m", "OPENAI_BASE_URL": "http://localhost:1234/v1"}, "m", "OpenAIChatCompletionsModel"),
        ({"CHATKIT_MODEL": "m", "OPENAI_BASE_URL": "https://api.openai.com/v1/", "OPENAI_API_KEY": "k"}, "m",
         "OpenAIResponsesModel"),
        ({"OPENAI_API_KEY": "k", "GEMINI_API_KEY": "k"}, get_default_model(), "OpenAIResponsesModel"),
        ({"GEMINI_API_KEY": "k"}, "gemini/gemini-2.5-flash", "LitellmModel"),
        ({"GEMINI_API_KEY": "k", "GEMINI_MODEL": "gemini-9"}, "gemini/gemini-9", "LitellmModel"),
        ({"GEMINI_API_KEY": "k", "GEMINI_MODEL": "gemini/gemini-9"}, "gemini/gemini-9", "LitellmModel"),
        ({"OPENAI_API_KEY": "", "GEMINI_API_KEY": " "}, "demo", "DemoModel"),
        ({}, "demo", "DemoModel"),
    ],
)  # fmt: skip
def test_the_first_that_is_given_chooses_the_model(
    env: dict[str, str], model: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    chat = ck.create_app(database=":memory:").state.chat
    assert (chat.model_name, type(chat.agent.model).__name__) == (model, kind)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("gpt-x", "needs OPENAI_API_KEY"),
        ("nobody/gpt-x", "LiteLLM knows no provider"),
        ("/", "LiteLLM knows no provider"),
    ],
)
def test_a_model_that_cannot_work_is_refused_at_the_start(
    model: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ck.main(["--model", model, "--database", ":memory:", "--port", "0"]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert model in printed.err and says in printed.err


# ============================================================================================= the ChatKit protocol
# The types of the official SDK are the judge: what `exchange()` sends and gets goes through them, where it is
# installed. The recorded exchange that some tests compare with is one of its server.

SDK = TEST_ALL or importlib.util.find_spec("chatkit") is not None


class InProcess(httpx.BaseTransport):
    """Has an app answer without a socket, on an event loop that runs while a request does."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.loop = asyncio.new_event_loop()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self.loop.run_until_complete(self._answer(request))

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        response = await httpx.ASGITransport(self.app).handle_async_request(request)
        return httpx.Response(response.status_code, headers=response.headers, content=await response.aread())

    def close(self) -> None:
        self.loop.run_until_complete(self.app.state.chat.close())
        self.loop.close()


@contextlib.contextmanager
def in_process(agent: Agent[Any] | None = None, **settings: Any) -> Iterator[Client]:
    """As `serving()`, without a socket: quicker by 0.2 s, for what is not about sockets."""
    handlers = {name: settings.pop(name) for name in ("on_action", "transcribe") if name in settings}
    app = ck.create_app(
        agent, settings=ck.Settings(**{"database": ":memory:", "model": "demo", **settings}), **handlers
    )
    with Client(transport=InProcess(app), base_url="http://testserver") as client:
        yield client


def canonical(value: Any) -> str:
    """JSON that is equal where the values are: times are compared as times, and 1 is not true."""

    def timed(part: Any) -> Any:
        if isinstance(part, list):
            return [timed(child) for child in part]
        if not isinstance(part, dict):
            return part
        return {
            key: datetime.fromisoformat(child.replace("Z", "+00:00")).timestamp()
            if key == "created_at"
            else timed(child)
            for key, child in part.items()
        }

    return json.dumps(timed(value), sort_keys=True)


@functools.cache
def sdk_type(name: str) -> Any:
    """Reads and writes a type of the SDK; Page[...] too."""
    from pydantic import TypeAdapter

    types = optional("chatkit.types")
    page_of = name.removeprefix("Page ")
    kind = getattr(types, page_of)
    return TypeAdapter(kind if page_of == name else types.Page[kind])


ANSWER_TYPES = {
    "threads.list": "Page Thread",
    "threads.get_by_id": "Thread",
    "threads.update": "Thread",
    "items.list": "Page ThreadItem",
    "threads.sync_custom_action": "SyncCustomActionResponse",
    "attachments.create": "Attachment",
    "input.transcribe": "TranscriptionResult",
}


def validated(operation: str, answer: Any) -> Any:
    """An answer, once the SDK's types have read it and written it again unchanged."""
    if not SDK:
        return answer
    if isinstance(answer, list):
        for event in answer:
            same("ThreadStreamEvent", event)
    elif operation in ANSWER_TYPES:
        same(ANSWER_TYPES[operation], answer)
    else:
        assert answer == {}, operation
    return answer


def same(type_name: str, sent: Any) -> None:
    kind = sdk_type(type_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the SDK prefers templates to its own widget classes
        again = kind.dump_python(kind.validate_python(sent), mode="json", exclude_none=True)
    assert canonical(again) == canonical(sent)


def exchange(client: Client, operation: str, **params: Any) -> Any:
    """A request that the SDK's types accept, and its answer, which they accept too."""
    if SDK:
        sdk_type("ChatKitReq").validate_python({"type": operation, "params": params})
    return validated(operation, client.operate(operation, **params))


def refused(client: Client, operation: str, **params: Any) -> tuple[int, str]:
    """The status of a request that must not be granted, and its text."""
    response = client.post("/chatkit", json={"type": operation, "params": params})
    assert 400 <= response.status_code < 500, response.text
    assert list(response.json()) == ["detail"]
    detail = response.json()["detail"]
    assert isinstance(detail, str) and detail
    return response.status_code, detail


def create(client: Client, text: str = "hello", **fields: Any) -> str:
    """Begin a thread; its id."""
    events = exchange(client, "threads.create", input=user_input(text, **fields))
    return str(events[0]["thread"]["id"])


def send(client: Client, thread_id: str, text: str, **fields: Any) -> list[dict[str, Any]]:
    events = exchange(client, "threads.add_user_message", thread_id=thread_id, input=user_input(text, **fields))
    assert isinstance(events, list)
    return events


def items(client: Client, thread_id: str, *types: str) -> list[dict[str, Any]]:
    """What is in a thread, oldest first; only of some types where those are given."""
    page = exchange(client, "items.list", thread_id=thread_id, limit=100, order="asc")
    assert not page["has_more"]
    return [item for item in page["data"] if not types or item["type"] in types]


def texts(client: Client, thread_id: str) -> list[str]:
    """What the person and the model said."""
    return [item["content"][0]["text"] for item in items(client, thread_id, "user_message", "assistant_message")]


def last_item(events: list[dict[str, Any]]) -> dict[str, Any]:
    item = [event["item"] for event in events if "item" in event][-1]
    assert isinstance(item, dict)
    return item


def shape(events: list[dict[str, Any]]) -> list[str]:
    """Event types; with the type of the update or of the item, where there is one."""
    return [
        event["update"]["type"]
        if "update" in event
        else " ".join(filter(None, [event["type"], event.get("item", {}).get("type", "")]))
        for event in events
    ]


CARD = {"type": "Card", "children": [{"id": "t", "type": "Text", "value": "hi"}]}
CHOICE = {
    "type": "multiple_choice",
    "id": "q1",
    "question": "Which?",
    "options": [{"value": "a"}, {"value": "b"}],
    "multiple": False,
}
SEVERAL = {**CHOICE, "id": "q2", "question": "Which ones?", "multiple": True}
OPEN = {"type": "freeform", "id": "q3", "question": "Why?", "description": "In your words"}


@function_tool
async def pick(wrapper: RunContextWrapper[ck.TurnContext]) -> Any:
    """Have the frontend say what is selected."""
    return wrapper.context.client_tool("get_selection", {"x": 1})


@function_tool
async def survey(wrapper: RunContextWrapper[ck.TurnContext]) -> Any:
    """Ask the person."""
    return wrapper.context.ask([CHOICE, SEVERAL, OPEN])


@function_tool
async def draw(wrapper: RunContextWrapper[ck.TurnContext]) -> str:
    """Show a card."""
    return str(await wrapper.context.widget(CARD, copy_text="a card"))


@function_tool
async def bustle(wrapper: RunContextWrapper[ck.TurnContext]) -> str:
    """Say what one is doing."""
    context = wrapper.context
    await context.progress("Searching…", icon="search")
    await context.effect("flash", {"times": 2, "colour": None})
    await context.notice("warning", "Slow today", title="Mind")
    context.emit({"type": "thinking", "content": "Nearly there"})
    return "bustled"


@function_tool
async def locale(wrapper: RunContextWrapper[ck.TurnContext]) -> str:
    """Tell the person's language."""
    return wrapper.context.locale


PROTOCOL_TOOLS: list[Any] = [echo, pick, survey, draw, bustle, locale]


def talker(*responses: list[Any]) -> Agent[Any]:
    """A scripted agent with all the tools above."""
    return scripted(*responses, tools=PROTOCOL_TOOLS)


def seen(agent: Agent[Any], call: int = -1) -> list[Any]:
    """What the model was given at a call, the last one if none is named."""
    assert isinstance(agent.model, Script)
    return agent.model.seen[call]


def shown(agent: Agent[Any]) -> str:
    """All that the model was given at its last call, as text."""
    return json.dumps(seen(agent), ensure_ascii=False)


async def redraw(context: ck.TurnContext, action: dict[str, Any], item: dict[str, Any] | None) -> None:
    """An action handler: says "changed" on the widget, or what the action asks for."""
    if action["type"] == "refuse":
        raise ValueError("no such action")
    if action["type"] == "break":
        raise RuntimeError("a bug in the handler")
    if action["type"] == "bustle":
        await context.progress("Working")
        await context.effect("flash")
        await context.widget(CARD)
    if item is not None:
        await context.replace_widget(item["id"], item["extra"]["widget"], copy_text="changed")


MODEL_REQUEST: Any = httpx.Request("POST", "http://model")
FULL: list[list[Any]] = [
    [Think("Let "), Think("me "), Call("echo", {"text": "x"}), Call("bustle")],
    ["Echoed."],
    [Call("pick")],  # completed
    ["Selected."],
    [Call("pick")],  # not answered
    ["Never mind."],
    [Call("survey")],  # answered
    ["Thanks."],
    [Call("survey")],  # skipped
    ["As you like."],
    [Call("draw")],
    ["Drawn."],
    [openai.APIConnectionError(request=MODEL_REQUEST)],
    [Call("pick"), Call("survey")],  # both pending
]
TAG = {
    "type": "input_tag",
    "id": "u1",
    "text": "Ann",
    "data": {"team": None, "path": [None, {"deep": None}], "n": 1.0},
    "group": "People",
    "interactive": True,
}


def full_thread(client: Client) -> tuple[str, list[dict[str, Any]]]:
    """A thread with an item of every type in every state, and all the events it took; for `talker(*FULL)`."""
    content = [{"type": "input_text", "text": "Ask "}, TAG, {"type": "input_text", "text": " about it"}]
    options = {"tool_choice": {"id": "echo"}}
    events = exchange(
        client,
        "threads.create",
        input=user_input("", content=content, quoted_text="what\nyou said", inference_options=options),
    )
    thread_id = events[0]["thread"]["id"]
    events += send(client, thread_id, "pick")
    events += exchange(client, "threads.add_client_tool_output", thread_id=thread_id, result={"selected": [1, None]})
    events += send(client, thread_id, "pick again")
    events += send(client, thread_id, "I will not")
    for answers in (
        {"status": "answered", "answers": {"q1": {"values": ["a"]}, "q3": {"skipped": True}}},
        {"status": "skipped", "answers": {}},
    ):
        events += send(client, thread_id, "ask me")
        item_id = items(client, thread_id, "structured_input")[-1]["id"]
        events += exchange(client, "threads.add_structured_input", thread_id=thread_id, item_id=item_id, input=answers)
    events += send(client, thread_id, "draw")
    widget_id = items(client, thread_id, "widget")[0]["id"]
    target = {"thread_id": thread_id, "item_id": widget_id}
    for kind in ("toggle", "bustle", "break"):
        events += exchange(client, "threads.custom_action", **target, action={"type": kind, "payload": {"id": None}})
    exchange(client, "threads.sync_custom_action", **target, action={"type": "toggle"})
    events += send(client, thread_id, "fail")
    events += send(client, thread_id, "pick and ask")
    return thread_id, events


def test_every_event_and_every_item_is_of_the_sdks_types(tmp_path: Path) -> None:
    optional("chatkit.types")
    database = str(tmp_path / "chat.db")
    with in_process(talker(*FULL), database=database, on_action=redraw) as client:
        thread_id, events = full_thread(client)
        before = items(client, thread_id)
        exchange(client, "items.feedback", thread_id=thread_id, item_ids=[before[0]["id"]], kind="negative")
        exchange(client, "threads.update", thread_id=thread_id, title="Anything")
        exchange(client, "threads.retry_after_item", thread_id=create(client), item_id=str(int(before[-1]["id"]) + 1))
        exchange(client, "threads.delete", thread_id=exchange(client, "threads.list")["data"][0]["id"])
    assert " ".join(sorted({event["type"] for event in events})) == (
        "client_effect error notice progress_update stream_options "
        "thread.created thread.item.added thread.item.done thread.item.replaced thread.item.updated"
    )
    assert sorted({f"{item['type']} {item.get('status', '')}".strip() for item in before}) == [
        *("assistant_message", "client_tool_call completed", "client_tool_call pending"),
        *("structured_input answered", "structured_input pending", "structured_input skipped"),
        *("task", "user_message", "widget", "workflow"),
    ]
    final = {e["item"]["id"]: e["item"] for e in events if e["type"] in ("thread.item.done", "thread.item.replaced")}
    assert set(final) == {item["id"] for item in before}
    # That a client tool's call is completed is the one thing that the stream need not say: the frontend knows.
    assert [final[i["id"]] for i in before if "output" not in i] == [i for i in before if "output" not in i]
    with in_process(talker(*FULL), database=database) as client:
        assert items(client, thread_id) == before
        assert exchange(client, "threads.get_by_id", thread_id=thread_id)["items"]["data"] == before[:20]


TOKENS = ["tok ", "tok ", "tok "]
MESSAGE = ["thread.item.done user_message", "stream_options"]
ANSWER = [
    "thread.item.added assistant_message",
    "assistant_message.content_part.added",
    *["assistant_message.content_part.text_delta"] * 3,
    "assistant_message.content_part.done",
    "thread.item.done assistant_message",
]


def test_the_events_are_those_of_the_recorded_exchange() -> None:
    agent = talker(
        *[TOKENS] * 3,  # hello, again, retried
        [Call("echo", {"text": "x"})],
        TOKENS,
        [Call("pick")],
        TOKENS,
        [Call("draw")],
        TOKENS,
        [Call("survey")],
        TOKENS,
        [RuntimeError("boom")],
    )
    with in_process(agent, on_action=redraw) as client:

        def exchanged(operation: str, **params: Any) -> list[str]:
            return shape(exchange(client, operation, **params))

        def message(text: str) -> list[str]:
            return exchanged("threads.add_user_message", thread_id="1", input=user_input(text))

        def last(kind: str) -> str:
            return str(items(client, "1", kind)[-1]["id"])

        assert exchanged("threads.create", input=user_input("hello")) == ["thread.created", *MESSAGE, *ANSWER]
        assert message("again") == [*MESSAGE, *ANSWER]
        retried = exchanged("threads.retry_after_item", thread_id="1", item_id="1")
        assert retried == ["stream_options", *ANSWER]
        assert message("task") == [*MESSAGE, "progress_update", "thread.item.done task", *ANSWER]
        # The recorded server showed these three without the model's having called a tool; here a tool does it.
        assert message("clienttool") == [*MESSAGE, "progress_update", "thread.item.done client_tool_call"]
        output = exchanged("threads.add_client_tool_output", thread_id="1", result={"selected": [1]})
        assert output == ["stream_options", *ANSWER]
        drawn = ["progress_update", "thread.item.done widget", "thread.item.done task"]
        assert message("widget") == [*MESSAGE, *drawn, *ANSWER]
        action = {"type": "toggle", "payload": {"id": 1}}
        acted = exchanged("threads.custom_action", thread_id="1", item_id=last("widget"), action=action)
        assert acted == ["stream_options", "thread.item.replaced widget"]
        assert message("question") == [*MESSAGE, "progress_update", "thread.item.done structured_input"]
        answers = {"status": "answered", "answers": {"q1": {"values": ["a"]}}}
        answered = exchanged(
            "threads.add_structured_input", thread_id="1", item_id=last("structured_input"), input=answers
        )
        assert answered == ["stream_options", "thread.item.replaced structured_input", *ANSWER]
        assert message("boom") == [*MESSAGE, "error"]


def test_the_first_answer_is_the_recorded_one_word_for_word() -> None:
    def item(number: int, **fields: Any) -> dict[str, Any]:
        return {"id": f"<{number}>", "thread_id": "<1>", "created_at": "<time>", **fields}

    def part(text: str) -> dict[str, Any]:
        return {"annotations": [], "text": text, "type": "output_text"}

    def update(kind: str, **fields: Any) -> dict[str, Any]:
        kind = f"assistant_message.content_part.{kind}"
        return {"type": "thread.item.updated", "item_id": "<2>", "update": {"type": kind, "content_index": 0, **fields}}

    thread = {
        "title": "hello",  # the one addition
        "id": "<1>",
        "created_at": "<time>",
        "status": {"type": "active"},
        "metadata": {},
        "items": {"data": [], "has_more": False},
    }
    words = [{"type": "input_text", "text": "hello"}]
    mine = item(1, type="user_message", content=words, attachments=[], inference_options={})
    with in_process(talker(TOKENS)) as client:
        events = exchange(client, "threads.create", input=user_input("hello"))

    def masked(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: masked(child, key) for key, child in value.items()}
        if isinstance(value, list):
            return [masked(child) for child in value]
        return "<time>" if name == "created_at" else f"<{value}>" if name in ("id", "thread_id", "item_id") else value

    assert masked(events) == [
        {"type": "thread.created", "thread": thread},
        {"type": "thread.item.done", "item": mine},
        {"type": "stream_options", "stream_options": {"allow_cancel": True}},
        {"type": "thread.item.added", "item": item(2, type="assistant_message", content=[])},
        update("added", content=part("")),
        *[update("text_delta", delta="tok ")] * 3,
        update("done", content=part("tok tok tok ")),
        {"type": "thread.item.done", "item": item(2, type="assistant_message", content=[part("tok tok tok ")])},
    ]


# ---- ids


def test_ids_of_the_stream_are_those_of_the_store() -> None:
    with in_process(talker(["one"], ["two"])) as client:
        created, message, _, added, *_ = exchange(client, "threads.create", input=user_input("hello"))
        thread_id, user_id, answer_id = created["thread"]["id"], message["item"]["id"], added["item"]["id"]
        assert [item["id"] for item in items(client, thread_id)] == [user_id, answer_id]
        exchange(client, "items.feedback", thread_id=thread_id, item_ids=[answer_id], kind="positive")
        again = exchange(client, "threads.retry_after_item", thread_id=thread_id, item_id=user_id)
        new_id = again[1]["item"]["id"]
        assert new_id != answer_id and [item["id"] for item in items(client, thread_id)] == [user_id, new_id]
        assert {event["item_id"] for event in again if "item_id" in event} == {new_id}


def test_five_answers_of_a_model_that_gives_one_id_to_all_are_there_after_a_restart(tmp_path: Path) -> None:
    database = str(tmp_path / "chat.db")
    with serving(talker(*([f"answer {n}"] for n in range(5))), database=database) as client:
        thread_id = create(client, "question 0")
        for n in range(1, 5):
            send(client, thread_id, f"question {n}")
    with serving(database=database) as client:
        assert texts(client, thread_id) == [text for n in range(5) for text in (f"question {n}", f"answer {n}")]
        assert len({item["id"] for item in items(client, thread_id)}) == 10


# ---- one conversation, two dialects


def test_a_conversation_goes_on_in_the_other_dialect_and_shows_in_rest() -> None:
    agent = talker(["one"], ["two"], ["three"])
    with in_process(agent) as client:
        thread_id = create(client, "first")
        assert said(client.send_message("second", thread_id)) == "two"
        send(client, thread_id, "third")
        wanted = ["first", "one", "second", "two", "third", "three"]
        assert texts(client, thread_id) == wanted
        assert [message["content"] for message in client.messages(int(thread_id))] == wanted
        assert all(word in shown(agent) for word in ("first", "one", "second", "two", "third"))
        assert [row["id"] for row in client.get("/api/conversations").json()] == [int(thread_id)]


def test_a_conversation_of_the_plain_dialect_opens_in_chatkit() -> None:
    with in_process(talker([Call("echo", {"text": "x"})], ["done"])) as client:
        thread_id = str(client.send_message("begin here")[0]["thread_id"])
        thread = exchange(client, "threads.get_by_id", thread_id=thread_id)
        assert thread["title"] == "begin here"
        assert [item["type"] for item in thread["items"]["data"]] == ["user_message", "task", "assistant_message"]
        exchange(client, "threads.update", thread_id=thread_id, title="Renamed")
        assert client.get(f"/api/conversations/{thread_id}").json()["title"] == "Renamed"
        exchange(client, "threads.delete", thread_id=thread_id)
        assert client.get(f"/api/conversations/{thread_id}").status_code == 404


# ---- tools and thoughts


def test_a_tool_call_is_progress_while_it_runs_and_a_task_when_it_is_done() -> None:
    with in_process(talker([Call("echo", {"text": "x"})], ["done"])) as client:
        events = exchange(client, "threads.create", input=user_input("hello"))
        assert {"type": "progress_update", "text": "Running echo"} in events
        task = next(event["item"] for event in events if event.get("item", {}).get("type") == "task")
        assert task["task"]["title"] == "echo" and task["task"]["status_indicator"] == "complete"
        assert '"x"' in task["task"]["content"]
        assert items(client, "1", "task") == [task]
        assert task in exchange(client, "threads.get_by_id", thread_id="1")["items"]["data"]


def test_reasoning_is_a_workflow_whose_thought_grows() -> None:
    with in_process(talker([Think("Let "), Think("me "), Think("see"), "Done."])) as client:
        events = exchange(client, "threads.create", input=user_input("hello"))
        added = next(event["item"] for event in events if event["type"] == "thread.item.added")
        assert added["workflow"] == {"type": "reasoning", "tasks": [], "expanded": False}
        updates = [event["update"] for event in events if event.get("item_id") == added["id"]]
        assert [update["type"] for update in updates] == ["workflow.task.added", *["workflow.task.updated"] * 2]
        assert [update["task"]["content"] for update in updates] == ["Let ", "Let me ", "Let me see"]
        final = items(client, "1", "workflow")
        assert [task["content"] for task in final[0]["workflow"]["tasks"]] == ["Let me see"]
        assert {"type": "thread.item.done", "item": final[0]} in events


def test_progress_effects_and_notices_arrive_while_the_tool_runs() -> None:
    gate = Wait()

    @function_tool
    async def slow(wrapper: RunContextWrapper[ck.TurnContext]) -> str:
        """Take one's time."""
        await wrapper.context.progress("Searching…", icon="search")
        await wrapper.context.effect("flash", {"times": 2})
        await wrapper.context.notice("info", "Patience")
        await gate.pass_through()
        return "found"

    with serving(scripted([Call("slow")], ["done"], tools=[slow])) as client:
        request = {"type": "threads.create", "params": {"input": user_input("hello")}}
        with client.stream("POST", "/chatkit", json=request) as response:
            lines = (line for line in response.iter_lines() if line)
            early = [json.loads(next(lines)[6:]) for _ in range(7)]
            assert gate.reached.is_set() and not gate.gate.is_set()
            gate.gate.set()
            late = [json.loads(line[6:]) for line in lines]
    validated("", early + late)
    assert early[4:] == [
        {"type": "progress_update", "text": "Searching…", "icon": "search"},
        {"type": "client_effect", "name": "flash", "data": {"times": 2}},
        {"type": "notice", "level": "info", "message": "Patience"},
    ]
    assert shape(late)[0] == "thread.item.done task"


def test_quotes_and_tags_are_kept_returned_and_told_apart_for_the_model() -> None:
    agent = talker(["ok"])
    content = [{"type": "input_text", "text": "Ask "}, TAG]
    with in_process(agent) as client:
        events = exchange(client, "threads.create", input=user_input("", content=content, quoted_text="some words"))
        item = events[1]["item"]
        assert item["content"] == content and item["quoted_text"] == "some words"
        assert items(client, "1", "user_message") == [item]
        parts = [part["text"] for part in seen(agent, 0)[0]["content"]]
        assert parts[-1] == "Ask @Ann"
        assert "some words" in parts[0] and "quote" in parts[0]
        assert '"u1"' in parts[1] and '"deep": null' in parts[1]
        assert events[0]["thread"]["title"] == "Ask @Ann"


def test_a_message_may_be_as_long_as_the_limit_however_many_parts_it_has() -> None:
    halves = [{"type": "input_text", "text": "ü" * 10}] * 2
    with in_process(talker(["ok"]), max_message_chars=20) as client:
        create(client, content=halves)
        assert refused(client, "threads.create", input=user_input("ü" * 21))[0] == 413
        assert refused(client, "threads.create", input=user_input("ü", content=halves, quoted_text="x"))[0] == 413


@pytest.mark.parametrize(
    ("header", "wanted"), [("de-DE", "de-DE"), ("fr, en;q=0.5", "fr"), ("pt-BR;q=0.9", "pt-BR"), ("", "en")]
)
def test_the_locale_reaches_the_tools(header: str, wanted: str) -> None:
    with in_process(talker([Call("locale")], ["ok"])) as client:
        client.headers["Accept-Language"] = header
        create(client)
        assert items(client, "1", "task")[0]["task"]["content"].endswith(wanted)


# ---- the stop button


def stop_after(client: Client, wait: Wait, text: str) -> str:
    """Begin a thread, close the connection when the model waits, as the stop button does; the thread's id."""
    request = {"type": "threads.create", "params": {"input": user_input("hello")}}
    with client.stream("POST", "/chatkit", json=request) as response:
        for line in response.iter_lines():
            if text in line:
                break
        until(wait.reached.is_set)
    return response.headers["x-thread-id"]


def test_the_stop_button_closes_the_models_request_and_keeps_what_was_said() -> None:
    wait = Wait()
    with serving(talker(["One ", "two", wait, " three"])) as client:
        thread_id = stop_after(client, wait, '"two"')
        assert wait.left.wait(1)
        until(lambda: client.messages(int(thread_id))[-1]["status"] == "cancelled")
        assert texts(client, thread_id) == ["hello", "One two"]


def test_the_model_is_told_of_the_stop_and_no_client_is() -> None:
    wait = Wait()
    agent = talker(["One", wait], ["Fine."])
    with serving(agent) as client:
        thread_id = stop_after(client, wait, '"One"')
        until(lambda: client.messages(int(thread_id))[-1]["status"] == "cancelled")
        events = until(lambda: (r := client.post("/chatkit", json=again(thread_id))).status_code == 200 and r.text)
        assert ck.STOPPED in shown(agent)
        answers = [events, client.get(f"/api/conversations/{thread_id}").text]
        for limit in (1, 2, 3, 4, 5):
            for order in ("asc", "desc"):
                pages = walk(client, "items.list", limit=limit, order=order, thread_id=thread_id)
                assert len([item for page in pages for item in page["data"]]) == 4
                answers.append(json.dumps(pages))
        answers.append(json.dumps(exchange(client, "threads.get_by_id", thread_id=thread_id)))
        assert not [answer for answer in answers if "stopped" in answer or "system" in answer]
        assert [item["id"] for item in items(client, thread_id)] == ["1", "2", "4", "5"]  # 3 is the hidden one
        assert refused(client, "items.list", thread_id=thread_id, after="3")[0] == 404
        assert refused(client, "threads.retry_after_item", thread_id=thread_id, item_id="3")[0] == 404
        assert refused(client, "items.feedback", thread_id=thread_id, item_ids=["3"], kind="positive")[0] == 404


def again(thread_id: str) -> dict[str, Any]:
    return {"type": "threads.add_user_message", "params": {"thread_id": thread_id, "input": user_input("go on")}}


def test_with_continue_a_turn_goes_on_without_its_reader() -> None:
    wait = Wait()
    with serving(talker(["One ", wait, "two"]), on_disconnect="continue") as client:
        thread_id = stop_after(client, wait, '"One "')
        wait.gate.set()
        until(lambda: client.messages(int(thread_id))[-1]["status"] == "done")
        assert texts(client, thread_id) == ["hello", "One two"]


def is_answering(client: Client, thread_id: str) -> bool:
    with client.stream("GET", f"/api/conversations/{thread_id}/stream") as response:
        return response.status_code == 200


def test_a_reader_that_leaves_at_once_stops_the_turn_too() -> None:
    wait = Wait()
    with serving(talker([wait])) as client:
        body = json.dumps({"type": "threads.create", "params": {"input": user_input("hello")}})
        head = "POST /chatkit HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: client.get("/api/conversations").json())
        until(lambda: not is_answering(client, "1"))
        assert wait.left.is_set() or not wait.reached.is_set()
        assert texts(client, "1") == ["hello"]


def test_deleting_the_thread_that_answers_ends_its_stream_properly() -> None:
    wait = Wait()
    with serving(talker(["One", wait])) as client:
        request = {"type": "threads.create", "params": {"input": user_input("hello")}}
        with client.stream("POST", "/chatkit", json=request) as response:
            until(wait.reached.is_set)
            exchange(client, "threads.delete", thread_id="1")
            events = validated("", chatkit_events(response.read().decode()))
        assert "error" not in kinds(events) and wait.left.is_set()
        assert refused(client, "threads.get_by_id", thread_id="1")[0] == 404


# ---- retry


def test_retry_removes_what_came_after_and_answers_anew() -> None:
    agent = talker(["one"], ["two"], ["three"], ["anew"])
    with in_process(agent) as client:
        thread_id = create(client, "first")
        second = send(client, thread_id, "second")[0]["item"]["id"]
        send(client, thread_id, "third")
        exchange(client, "threads.retry_after_item", thread_id=thread_id, item_id=second)
        assert texts(client, thread_id) == ["first", "one", "second", "anew"]
        assert len(client.messages(int(thread_id))) == 4
        assert "two" not in shown(agent) and "third" not in shown(agent)


def test_retry_refuses_what_is_not_a_message_of_the_person_in_this_thread() -> None:
    with in_process(talker([Call("echo", {"text": "x"})], ["one"], ["two"])) as client:
        thread_id, other = create(client, "first"), create(client, "other")
        before = items(client, thread_id)
        foreign = items(client, other)[0]["id"]
        wrong = [item["id"] for item in before[1:]] + [foreign, "999", "0", "-1", "x", "", "1.0", str(2**63)]
        statuses = [refused(client, "threads.retry_after_item", thread_id=thread_id, item_id=i)[0] for i in wrong]
        assert statuses == [400, 400] + [404] * 8
        assert refused(client, "threads.retry_after_item", thread_id="999", item_id=before[0]["id"])[0] == 404
        assert items(client, thread_id) == before and len(items(client, other)) == 2


def test_a_thread_that_answers_refuses_a_retry_a_message_and_an_action() -> None:
    wait = Wait()
    with serving(talker(["One", wait]), on_action=redraw) as client:
        request = {"type": "threads.create", "params": {"input": user_input("hello")}}
        with client.stream("POST", "/chatkit", json=request) as response:
            until(wait.reached.is_set)
            thread_id = response.headers["x-thread-id"]
            before = items(client, thread_id)
            for operation, params in {
                "threads.retry_after_item": {"item_id": before[0]["id"]},
                "threads.add_user_message": {"input": user_input("more")},
                "threads.add_client_tool_output": {"result": 1},
                "threads.custom_action": {"action": {"type": "toggle"}},
                "threads.add_structured_input": {"item_id": before[0]["id"], "input": {}},
            }.items():
                assert refused(client, operation, thread_id=thread_id, **params)[0] == 409, operation
            wait.gate.set()
            response.read()
        assert [item["id"] for item in items(client, thread_id)] == [item["id"] for item in before]


# ---- pages


def walk(client: Client, operation: str, between: Callable[[], Any] = lambda: None, **params: Any) -> list[Any]:
    """All pages, each asked for with the `after` of the one before; `between` is called in between."""
    pages = [exchange(client, operation, **params)]
    while pages[-1]["has_more"]:
        assert pages[-1]["after"] == pages[-1]["data"][-1]["id"]
        between()
        pages.append(exchange(client, operation, **params, after=pages[-1]["after"]))
    assert "after" not in pages[-1]
    return pages


def ids_of(pages: list[Any]) -> list[str]:
    return [row["id"] for page in pages for row in page["data"]]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_are_right_at_every_boundary(order: str) -> None:
    with in_process(talker(["ok"])) as client:
        assert walk(client, "threads.list", limit=1, order=order) == [{"data": [], "has_more": False}]
        for number in range(1, 5):
            create(client, f"thread {number}")
        for _ in range(2):
            send(client, "1", "more")
        first = [item["id"] for item in items(client, "1")]
        assert len(first) == 6
        tables: list[tuple[str, list[str], dict[str, Any]]] = [
            ("threads.list", ["1", "2", "3", "4"], {}),
            ("items.list", first, {"thread_id": "1"}),
        ]
        for operation, ids, params in tables:
            wanted = ids if order == "asc" else ids[::-1]
            for limit in range(1, len(ids) + 2):
                pages = walk(client, operation, limit=limit, order=order, **params)
                assert [[row["id"] for row in page["data"]] for page in pages] == [
                    wanted[at : at + limit] for at in range(0, len(ids), limit)
                ]
            end = exchange(client, operation, order=order, after=wanted[-1], **params)
            assert end == {"data": [], "has_more": False}


def test_pages_are_stable_while_rows_are_added() -> None:
    with in_process(talker(["ok"])) as client:
        for _ in range(4):
            create(client)
        send(client, "1", "more")

        def add() -> None:
            create(client)
            send(client, "1", "even more")

        tables: list[tuple[str, dict[str, Any]]] = [("threads.list", {}), ("items.list", {"thread_id": "1"})]
        for operation, params in tables:
            known = ids_of(walk(client, operation, order="asc", **params))
            assert ids_of(walk(client, operation, add, order="desc", limit=1, **params)) == known[::-1]
            added = iter([add, add])
            up = ids_of(walk(client, operation, lambda: next(added, bool)(), order="asc", limit=3, **params))  # noqa: B023
            assert up == ids_of(walk(client, operation, order="asc", **params)) and len(up) > len(known)


def test_an_opened_thread_has_its_first_twenty_items_and_says_where_to_go_on() -> None:
    with in_process(talker(["ok"])) as client:
        create(client)
        for _ in range(10):
            send(client, "1", "more")
        page = exchange(client, "threads.get_by_id", thread_id="1")["items"]
        assert len(page["data"]) == 20 and page["has_more"] and page["after"] == page["data"][-1]["id"]
        rest = exchange(client, "items.list", thread_id="1", order="asc", after=page["after"])
        assert len(rest["data"]) == 2 and not rest["has_more"]
        assert exchange(client, "items.list", thread_id="1")["data"] == (page["data"] + rest["data"])[:1:-1]


def test_an_after_that_does_not_exist_is_not_found() -> None:
    with in_process(talker(["ok"]), jwt_secret=SECRET) as client:
        client.headers.update(bearer("ann"))
        create(client)
        foreign = items(client, create(client))[0]["id"]
        client.headers.update(bearer("bob"))
        create(client)
        for after in ("999", "0", "x", "", "-1", "1", "2", "1" * 40):
            assert refused(client, "threads.list", after=after)[0] == 404
        for after in ("999", "0", "x", foreign):
            assert refused(client, "items.list", thread_id="3", after=after)[0] == 404


# ---- feedback, status, who may


def test_feedback_is_kept_can_be_changed_and_is_seen_in_rest() -> None:
    with in_process(talker(["ok"])) as client:
        create(client)
        exchange(client, "items.feedback", thread_id="1", item_ids=["2"], kind="positive")
        assert [message["feedback"] for message in client.messages(1)] == [None, "positive"]
        exchange(client, "items.feedback", thread_id="1", item_ids=["1", "2", "2"], kind="negative")
        assert [message["feedback"] for message in client.messages(1)] == ["negative", "negative"]


@pytest.mark.parametrize("item_ids", [["999"], ["2", "999"], ["x"], ["4"], ["2", ""]])
def test_feedback_for_an_item_that_is_not_there_changes_none(item_ids: list[str]) -> None:
    with in_process(talker(["ok"])) as client:
        create(client), create(client)
        assert refused(client, "items.feedback", thread_id="1", item_ids=item_ids, kind="positive")[0] == 404
        assert {message["feedback"] for number in (1, 2) for message in client.messages(number)} == {None}


@pytest.mark.parametrize("status", ["locked", "closed"])
def test_a_thread_that_is_not_active_says_so_and_refuses_messages_in_both_dialects(status: str) -> None:
    with in_process(talker(["ok"])) as client:
        create(client)
        client.patch("/api/conversations/1", json={"status": status, "reason": "Holidays"}).raise_for_status()
        wanted = {"type": status, "reason": "Holidays"}
        assert exchange(client, "threads.get_by_id", thread_id="1")["status"] == wanted
        assert exchange(client, "threads.list")["data"][0]["status"] == wanted
        code, detail = refused(client, "threads.add_user_message", thread_id="1", input=user_input("more"))
        assert code == 409 and "Holidays" in detail
        assert refused(client, "threads.retry_after_item", thread_id="1", item_id="1")[0] == 409
        plain = client.post("/chatkit", json={"message": "more", "thread_id": 1})
        assert plain.status_code == 409 and "Holidays" in plain.json()["detail"]
        assert len(items(client, "1")) == 2
        client.patch("/api/conversations/1", json={"status": "active"}).raise_for_status()
        assert exchange(client, "threads.get_by_id", thread_id="1")["status"] == {"type": "active"}
        send(client, "1", "more")


def test_another_users_thread_is_not_found_whatever_the_operation() -> None:
    with in_process(talker([Call("draw")], ["ok"]), jwt_secret=SECRET, on_action=redraw) as client:
        client.headers.update(bearer("ann"))
        create(client)
        before = items(client, "1")
        widget = items(client, "1", "widget")[0]["id"]
        client.headers.update(bearer("bob"))
        for operation, params in VALID.items():
            if "thread_id" in params:
                params = {**params, "thread_id": "1", **({"item_id": widget} if "item_id" in params else {})}
                assert refused(client, operation, **params) == (404, "Conversation not found"), operation
        assert exchange(client, "threads.list")["data"] == []
        client.headers.update(bearer("ann"))
        assert items(client, "1") == before


# ---- failures


def status_error(kind: type[openai.APIStatusError], status: int) -> openai.APIStatusError:
    response: Any = httpx.Response(status, request=MODEL_REQUEST)
    return kind("your key sk-0123456789abcdef is wrong", response=response, body=None)


@pytest.mark.parametrize(
    ("error", "allow_retry"),
    [
        (openai.APIConnectionError(request=MODEL_REQUEST), True),
        (status_error(openai.RateLimitError, 429), True),
        (status_error(openai.AuthenticationError, 401), False),
        (status_error(openai.BadRequestError, 400), False),
        (RuntimeError("password: hunter2"), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failing_model_ends_the_stream_with_a_safe_error(error: Exception, allow_retry: bool) -> None:
    with in_process(talker(["One "], ["Half", error], ["whole"])) as client:
        create(client)
        events = send(client, "1", "more")
        assert events[-1] == {
            "type": "error",
            "code": "custom",
            "message": ck.explain(error)[1],
            "allow_retry": allow_retry,
        }
        assert "sk-" not in json.dumps(events) and "hunter2" not in json.dumps(events)
        assert texts(client, "1") == ["hello", "One ", "more", "Half"]
        retried = exchange(client, "threads.retry_after_item", thread_id="1", item_id="3")
        assert retried[-1]["type"] == "thread.item.done"
        assert texts(client, "1") == ["hello", "One ", "more", "whole"]


@pytest.mark.parametrize(
    "arguments",
    ['{"text": NaN}', '{"text": [1e999]}', '{"text": ' + "9" * 5000 + "}", "", "nothing"],
    ids=lambda text: text[:20],
)
def test_arguments_that_are_not_quite_json_do_not_end_the_answer(arguments: str) -> None:
    with in_process(talker([Call("echo", arguments)], ["Done."])) as client:
        events = exchange(client, "threads.create", input=user_input("hello"))
        assert events[-1]["item"]["content"][0]["text"] == "Done."
        plain = client.send_message("more", 1)
        assert plain[-1]["status"] == "completed"


@pytest.mark.parametrize(
    "result",
    ["[NaN]", '{"a": "\\ud83d"}', "[1e999]", "\ud83d", "", *["[" * depth + "]" * depth for depth in (970, 3000)]],
)
@pytest.mark.parametrize("dialect", ["plain", "chatkit"])
def test_a_result_that_is_not_quite_json_does_not_break_the_stream(result: str, dialect: str) -> None:
    @function_tool
    async def odd(wrapper: RunContextWrapper[ck.TurnContext]) -> str:
        """Answer oddly."""
        return result

    def strict(text: str) -> Any:
        raise AssertionError(f"{text} is not JSON")

    body = (
        {"message": "hello"} if dialect == "plain" else {"type": "threads.create", "params": {"input": user_input("h")}}
    )
    with in_process(scripted([Call("odd")], ["Done."], tools=[odd])) as client:
        text = client.post("/chatkit", json=body).text
        frames = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
        events = [json.loads(frame, parse_constant=strict) for frame in frames]
        assert "Done." in json.dumps(events[-3:]) and "error" not in kinds(events)


@pytest.mark.parametrize(
    "event",
    [
        {"type": "progress"},
        {"type": "progress", "content": "x"},
        {"type": "effect", "name": "x"},
        {"type": "notice", "message": "x", "level": "shout"},
        {"type": "thinking", "content": 5},
        {"type": "thinking"},
        {"type": "widget", "id": 1},
        {"type": "mine", "n": float("nan")},
        {"type": "thinking", "content": "\ud83d"},
    ],
    ids=json.dumps,
)
def test_whatever_a_tool_emits_the_stream_stays_whole(event: dict[str, Any]) -> None:
    @function_tool
    async def odd(wrapper: RunContextWrapper[ck.TurnContext]) -> str:
        """Emit something."""
        wrapper.context.emit(event)
        return "emitted"

    with in_process(scripted([Call("odd")], ["Done."], tools=[odd])) as client:
        assert last_item(exchange(client, "threads.create", input=user_input("hi")))["content"][0]["text"] == "Done."
        assert said(client.send_message("hi")) == "Done."


# ---- client tools


def test_a_client_tool_waits_and_its_output_lets_the_agent_go_on() -> None:
    agent = talker([Call("pick", call_id="call_1")], ["You selected 1."])
    with in_process(agent) as client:
        pending = last_item(exchange(client, "threads.create", input=user_input("hello")))
        call = {"call_id": "call_1", "name": "get_selection", "arguments": {"x": 1}}
        assert {**pending, **call, "type": "client_tool_call", "status": "pending"} == pending
        assert items(client, "1", "client_tool_call") == [pending]
        exchange(client, "threads.add_client_tool_output", thread_id="1", result={"selected": [1]})
        assert items(client, "1", "client_tool_call") == [
            {**pending, "status": "completed", "output": {"selected": [1]}}
        ]
        history = seen(agent)
        assert [item.get("type") for item in history[-2:]] == ["function_call", "function_call_output"]
        assert json.loads(history[-1]["output"]) == {"selected": [1]} and history[-1]["call_id"] == "call_1"


def test_of_two_pending_calls_one_is_completed_and_the_other_closed() -> None:
    agent = talker([Call("pick"), Call("pick")], ["ok"])
    with in_process(agent) as client:
        create(client)
        events = exchange(client, "threads.add_client_tool_output", thread_id="1", result="mine")
        assert shape(events)[:2] == ["stream_options", "thread.item.replaced client_tool_call"]
        assert [item.get("output") for item in items(client, "1", "client_tool_call")] == [None, "mine"]
        history = seen(agent)
        outputs = [item["output"] for item in history if item.get("type") == "function_call_output"]
        assert len(outputs) == 2 and "did not answer" in outputs[0] and outputs[1] == "mine"


@pytest.mark.parametrize("result", [None, "", "text", 0, False, [], {}, {"a": None}, "é\u2028\0"], ids=json.dumps)
def test_a_client_tools_output_may_be_any_json(result: Any) -> None:
    with in_process(talker([Call("pick")], ["ok"])) as client:
        create(client)
        assert exchange(client, "threads.add_client_tool_output", thread_id="1", result=result)[-1]["type"] != "error"
        item = items(client, "1", "client_tool_call")[0]
        assert item["status"] == "completed" and item.get("output") == result


def test_an_output_that_nobody_waits_for_is_refused() -> None:
    with in_process(talker(["ok"], [Call("pick")], ["done"])) as client:
        create(client)
        assert refused(client, "threads.add_client_tool_output", thread_id="1", result=1)[0] == 409
        send(client, "1", "pick")
        exchange(client, "threads.add_client_tool_output", thread_id="1", result=1)
        assert refused(client, "threads.add_client_tool_output", thread_id="1", result=2)[0] == 409
        assert items(client, "1", "client_tool_call")[0]["output"] == 1


@pytest.mark.parametrize(("tool", "kind"), [("pick", "client_tool_call"), ("survey", "structured_input")])
def test_a_new_message_closes_what_was_pending_and_the_model_is_told(tool: str, kind: str) -> None:
    agent = talker([Call(tool)], ["Never mind."])
    with in_process(agent) as client:
        create(client)
        events = send(client, "1", "something else")
        assert f"thread.item.replaced {kind}" in shape(events)
        assert [item["status"] for item in items(client, "1", kind)] in (["completed"], ["skipped"])
        output = [item for item in seen(agent) if item.get("type") == "function_call_output"]
        assert len(output) == 1 and "did not answer" in output[0]["output"]
        assert refused(client, "threads.add_client_tool_output", thread_id="1", result=1)[0] == 409


def test_a_client_tool_begun_in_chatkit_can_be_answered_in_the_plain_dialect() -> None:
    with in_process(
        talker([Call("pick", call_id="c")], ["Thanks."], [Call("pick", call_id="d")], ["Again."])
    ) as client:
        create(client)
        response = client.post("/api/conversations/1/tool_output", json={"id": "c", "result": [1]})
        assert "Thanks." in response.text
        assert [event["type"] for event in client.send_message("more", 1)][-2:] == ["client_tool", "done"]
        events = exchange(client, "threads.add_client_tool_output", thread_id="1", result=[2])
        assert last_item(events)["content"][0]["text"] == "Again."


@pytest.mark.parametrize(
    ("tool", "operation"), [("pick", "threads.add_client_tool_output"), ("survey", "threads.add_structured_input")]
)
def test_the_model_that_a_message_asked_for_goes_on_with_it(
    tool: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"demo": Script(["default"]), "other": Script([Call(tool)], ["chosen"])}
    monkeypatch.setattr(ck.Models, "_make", lambda self, name: made[name])
    with in_process(Agent(name="Two", tools=PROTOCOL_TOOLS), models=("other",)) as client:
        create(client, inference_options={"model": "other"})
        given = {"result": 1} if tool == "pick" else {"item_id": "2", "input": {}}
        events = exchange(client, operation, thread_id="1", **given)
        assert last_item(events)["content"][0]["text"] == "chosen"


# ---- questions

ANSWERS: list[tuple[Any, list[Any]]] = [
    ({"answers": {"q1": {"values": ["a"]}}}, [["a"], None, None]),
    ({"answers": {"q1": {"values": ["a", "b"]}, "q2": {"values": ["a", "b"]}}}, [["a"], ["a", "b"], None]),
    ({"answers": {"q1": {"values": ["mine"]}, "q3": {"values": ["Because."]}}}, [["mine"], None, ["Because."]]),
    ({"answers": {"q9": {"values": ["a"]}, "q1": {"values": ["b"]}}}, [["b"], None, None]),
    ({"answers": {"q1": {"values": ["a"], "skipped": True}}}, [None, None, None]),
    ({"status": "skipped", "answers": {"q1": {"values": ["a"]}}}, [None, None, None]),
    ({}, [None, None, None]),
]


@pytest.mark.parametrize(("given", "wanted"), ANSWERS)
def test_answers_are_recorded_and_the_agent_goes_on_knowing_them(given: Any, wanted: list[Any]) -> None:
    agent = talker([Call("survey")], ["Thanks."])
    with in_process(agent) as client:
        pending = last_item(exchange(client, "threads.create", input=user_input("hello")))
        assert pending["status"] == "pending" and pending["inputs"] == [CHOICE, SEVERAL, OPEN]
        assert items(client, "1", "structured_input") == [pending]
        events = exchange(client, "threads.add_structured_input", thread_id="1", item_id=pending["id"], input=given)
        item = events[1]["item"]
        assert events[1]["type"] == "thread.item.replaced" and item["id"] == pending["id"]
        assert item["status"] == given.get("status", "answered")
        answers = [question["answer"] for question in item["inputs"]]
        assert answers == [{"values": values or [], "skipped": values is None} for values in wanted]
        assert items(client, "1", "structured_input") == [item]
        for values in wanted:
            assert all(json.dumps(value) in shown(agent).replace('\\"', '"') for value in values or [])
        assert "Thanks." in json.dumps(events)


def test_questions_are_answered_once() -> None:
    with in_process(talker([Call("survey")], ["Thanks."])) as client:
        item = last_item(exchange(client, "threads.create", input=user_input("hello")))
        params = {"thread_id": "1", "item_id": item["id"], "input": {"answers": {"q1": {"values": ["a"]}}}}
        exchange(client, "threads.add_structured_input", **params)
        before = items(client, "1")
        assert refused(client, "threads.add_structured_input", **params)[0] == 409
        for wrong, status in (("1", 400), (before[-1]["id"], 400), ("999", 404), ("x", 404)):
            assert refused(client, "threads.add_structured_input", **{**params, "item_id": wrong})[0] == status
        assert items(client, "1") == before


# ---- widgets and actions


def test_an_action_replaces_the_widget_in_the_stream_and_in_the_store() -> None:
    with in_process(talker([Call("draw")], ["ok"]), on_action=redraw) as client:
        create(client)
        widget = items(client, "1", "widget")[0]
        assert widget["widget"] == CARD and widget["copy_text"] == "a card"
        action = {"type": "toggle", "payload": {"id": 1}}
        events = exchange(client, "threads.custom_action", thread_id="1", item_id=widget["id"], action=action)
        changed = {**widget, "copy_text": "changed"}
        assert events[1:] == [{"type": "thread.item.replaced", "item": changed}]
        assert items(client, "1", "widget") == [changed]


def test_a_synchronous_action_returns_the_widget_as_it_is_then() -> None:
    with in_process(talker([Call("draw")], ["ok"]), on_action=redraw) as client:
        create(client)
        widget = items(client, "1", "widget")[0]
        answer = exchange(
            client, "threads.sync_custom_action", thread_id="1", item_id=widget["id"], action={"type": "toggle"}
        )
        assert answer == {"updated_item": {**widget, "copy_text": "changed"}}
        assert items(client, "1", "widget") == [answer["updated_item"]]
        assert exchange(client, "threads.sync_custom_action", thread_id="1", action={"type": "x"}) == {}


@pytest.mark.parametrize("operation", ["threads.custom_action", "threads.sync_custom_action"])
def test_an_action_without_a_handler_or_on_no_widget_is_refused(operation: str) -> None:
    with in_process(talker(["ok"])) as client:
        create(client)
        status, detail = refused(client, operation, thread_id="1", action={"type": "toggle"})
        assert status == 400 and "on_action" in detail
    with in_process(talker(["ok"]), on_action=redraw) as client:
        create(client)
        for item_id, status in (("1", 400), ("2", 400), ("3", 404), ("x", 404)):
            assert refused(client, operation, thread_id="1", item_id=item_id, action={"type": "x"})[0] == status


def test_an_action_that_the_handler_refuses_is_an_error_in_either_form() -> None:
    with in_process(talker(["ok"]), on_action=redraw) as client:
        create(client)
        action = {"type": "refuse"}
        assert exchange(client, "threads.custom_action", thread_id="1", action=action)[-1]["type"] == "error"
        assert refused(client, "threads.sync_custom_action", thread_id="1", action=action)[0] == 400


def test_a_bug_in_the_action_handler_is_an_answer_that_a_frontend_can_read() -> None:
    with in_process(talker(["ok"]), on_action=redraw) as client:
        create(client)
        params = {"thread_id": "1", "action": {"type": "break"}}
        assert exchange(client, "threads.custom_action", **params)[-1]["type"] == "error"
        response = client.post("/chatkit", json={"type": "threads.sync_custom_action", "params": params})
        assert response.status_code == 500 and response.json() == {"detail": "Something went wrong while answering."}


def test_a_reader_that_leaves_during_an_action_has_stopped_no_answer() -> None:
    wait = Wait()
    agent = talker(["ok"])

    async def slow(context: ck.TurnContext, action: dict[str, Any], item: dict[str, Any] | None) -> None:
        await wait.pass_through()

    with serving(agent, on_action=slow) as client:
        create(client)
        request = {"type": "threads.custom_action", "params": {"thread_id": "1", "action": {"type": "x"}}}
        with client.stream("POST", "/chatkit", json=request):
            until(wait.reached.is_set)
        until(lambda: wait.left.is_set() and not is_answering(client, "1"))
        send(client, "1", "more")
        assert ck.STOPPED not in shown(agent)


def test_ticking_a_task_in_the_assistants_list_completes_it_in_the_database() -> None:
    with in_process() as client:
        create(client, "add buy milk to my list")
        send(client, "1", "add call Ann to my list")
        events = send(client, "1", "show my tasks")
        widget = next(event["item"] for event in events if event.get("item", {}).get("type") == "widget")
        boxes = widget["widget"]["children"]
        assert [(box["label"], box["defaultChecked"]) for box in boxes] == [("buy milk", False), ("call Ann", False)]
        target = {"thread_id": "1", "item_id": widget["id"]}

        def action(box: dict[str, Any]) -> dict[str, Any]:
            return {key: box["onChangeAction"][key] for key in ("type", "payload")}

        replaced = exchange(client, "threads.custom_action", **target, action=action(boxes[0]))[1]
        assert replaced["type"] == "thread.item.replaced"
        assert [task["done"] for task in client.get("/api/tasks").json()] == [True, False]
        boxes = replaced["item"]["widget"]["children"]
        assert [box["defaultChecked"] for box in boxes] == [True, False]
        item = exchange(client, "threads.sync_custom_action", **target, action=action(boxes[0]))["updated_item"]
        assert [task["done"] for task in client.get("/api/tasks").json()] == [False, False]
        assert items(client, "1", "widget") == [item]
        assert "1. buy milk" in item["copy_text"] and "(done)" not in item["copy_text"]
        for payload in (None, 5, {}, {"id": "1"}, {"id": True}, {"id": None}):
            wrong = {"type": "toggle_task", "payload": payload}
            assert refused(client, "threads.sync_custom_action", **target, action=wrong)[0] == 400
        gone = {"type": "toggle_task", "payload": {"id": 999}}
        assert "notice" in kinds(exchange(client, "threads.custom_action", **target, action=gone))


def test_a_ticked_task_stays_another_users() -> None:
    with in_process(jwt_secret=SECRET) as client:
        for user in ("ann", "bob"):
            client.headers.update(bearer(user))
            create(client, "add buy milk to my list")
        action = {"type": "toggle_task", "payload": {"id": 1}}
        exchange(client, "threads.sync_custom_action", thread_id="2", action=action)
        client.headers.update(bearer("ann"))
        assert [task["done"] for task in client.get("/api/tasks").json()] == [False]


# ---- choices


def test_a_model_or_tool_that_is_not_there_is_refused_with_what_is() -> None:
    with in_process(talker(["ok"])) as client:
        create(client)
        for options, known in (
            ({"model": "gpt-x"}, "demo"),
            ({"tool_choice": {"id": "rm"}}, "echo"),
            ({"model": ""}, "demo"),
        ):
            message = user_input("hello", inference_options=options)
            status, detail = refused(client, "threads.add_user_message", thread_id="1", input=message)
            assert status == 400 and known in detail
        for body in ({"model": "gpt-x"}, {"tool_choice": "rm"}):
            assert client.post("/chatkit", json={"message": "hi", **body}).status_code == 400
        assert len(items(client, "1")) == 2


def test_a_choice_reaches_the_model_and_comes_back_with_the_message() -> None:
    agent = talker(["ok"])
    options = {"tool_choice": {"id": "echo"}, "model": "demo"}
    with in_process(agent) as client:
        assert isinstance(agent.model, Script)
        create(client, inference_options={"tool_choice": {"id": "echo"}})
        assert agent.model.settings[0].tool_choice == "echo"
        create(client)
        assert agent.model.settings[-1].tool_choice is None
        create(client, inference_options=options)
        assert items(client, "3", "user_message")[0]["inference_options"] == options


# ---- files

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")


def form(data: bytes, name: str = "a.txt", mime_type: str = "text/plain") -> dict[str, tuple[str, bytes, str]]:
    return {"file": (name, data, mime_type)}


def upload(client: Client, data: bytes, name: str = "a.txt", mime_type: str = "text/plain") -> dict[str, Any]:
    """A file in two phases; the attachment."""
    announced = exchange(client, "attachments.create", name=name, size=len(data), mime_type=mime_type)
    descriptor = announced.pop("upload_descriptor")
    assert descriptor["method"] == "POST" and descriptor["headers"] == {}
    stored = client.post(descriptor["url"], files=form(data, name, mime_type))
    assert stored.status_code == 200, stored.text
    assert validated("attachments.create", stored.json()) == announced
    return announced


def test_a_file_is_announced_uploaded_sent_and_there_after_a_restart(tmp_path: Path) -> None:
    database = str(tmp_path / "chat.db")
    with in_process(talker(["ok"]), database=database) as client:
        text, image = upload(client, b"abc"), upload(client, PNG, "a.png", "image/png")
        assert (text["type"], text["name"], text["mime_type"]) == ("file", "a.txt", "text/plain")
        assert image["type"] == "image" and client.get(image["preview_url"]).content == PNG
        message = user_input("see", attachments=[text["id"], image["id"]])
        item = exchange(client, "threads.create", input=message)[1]["item"]
        assert item["attachments"] == [{**file, "thread_id": "1"} for file in (text, image)]
    with in_process(talker(["ok"]), database=database) as client:
        assert items(client, "1", "user_message") == [item]
        assert client.get(f"/attachments/{text['id']}").content == b"abc"


def test_a_direct_upload_gives_an_attachment() -> None:
    with in_process(talker(["ok"])) as client:
        response = client.post("/attachments", files=form(PNG, "ä.png", "image/png"))
        file = validated("attachments.create", response.raise_for_status().json())
        assert (file["type"], file["name"], file["mime_type"]) == ("image", "ä.png", "image/png")
        create(client, attachments=[file["id"]])
        assert items(client, "1")[0]["attachments"][0]["id"] == file["id"]
        assert client.get(file["preview_url"]).content == PNG


def test_a_message_may_be_files_alone() -> None:
    with in_process(talker(["ok"])) as client:
        file = upload(client, b"abc")
        message = user_input("", content=[], attachments=[file["id"]])
        item = exchange(client, "threads.create", input=message)[1]["item"]
        assert item["content"] == [] and items(client, "1")[0] == item


def test_images_reach_the_model_as_images_and_text_as_text() -> None:
    agent = talker(["ok"])
    with in_process(agent) as client:
        ids = [
            upload(client, *file)["id"]
            for file in ((b"some\nwords", "a.md", "text/markdown"), (PNG, "a.png", "image/png"))
        ]
        create(client, "look", attachments=ids)
        for _ in range(2):
            text, image, words = seen(agent)[0]["content"]
            assert "some\nwords" in text["text"] and "a.md" in text["text"] and words["text"] == "look"
            assert image["type"] == "input_image"
            assert image["image_url"] == "data:image/png;base64," + base64.b64encode(PNG).decode()
            send(client, "1", "again")


def test_a_file_that_no_model_can_read_is_an_error_and_the_message_is_kept() -> None:
    agent = talker(["ok"])
    with in_process(agent) as client:
        file = upload(client, b"\0\xff", "a.zip", "application/zip")
        events = exchange(client, "threads.create", input=user_input("look", attachments=[file["id"]]))
        assert events[-1]["type"] == "error" and "a.zip" in events[-1]["message"]
        assert items(client, "1")[0]["attachments"][0]["id"] == file["id"]
        assert last_item(send(client, "1", "without it"))["content"][0]["text"] == "ok"
        assert "a.zip" in shown(agent)


def test_a_file_is_its_owners() -> None:
    with in_process(talker(["ok"]), jwt_secret=SECRET) as client:
        client.headers.update(bearer("ann"))
        file, sent = upload(client, PNG, "a.png", "image/png"), upload(client, b"abc")
        create(client, attachments=[sent["id"]])
        del client.headers["authorization"]
        assert client.get(f"/attachments/{file['id']}").status_code == 401
        assert client.post("/attachments", files=form(b"abc")).status_code == 401
        for key in ("", "x", "null"):
            assert client.get(f"/attachments/{file['id']}", params={"key": key}).status_code == 404
        assert client.get(file["preview_url"]).content == PNG  # the key is what an <img> has
        client.headers.update(bearer("bob"))
        for each in (file, sent):
            assert client.get(f"/attachments/{each['id']}").status_code == 404
            assert refused(client, "attachments.delete", attachment_id=each["id"])[0] == 404
            message = user_input("hello", attachments=[each["id"]])
            assert refused(client, "threads.create", input=message)[0] == 404
        assert exchange(client, "threads.list")["data"] == []


def test_an_upload_url_works_once() -> None:
    with in_process(talker(["ok"])) as client:
        announced = exchange(client, "attachments.create", name="a.txt", size=3, mime_type="text/plain")
        url = announced["upload_descriptor"]["url"]
        assert refused(client, "threads.create", input=user_input("x", attachments=[announced["id"]]))[0] == 404
        assert client.get(f"/attachments/{announced['id']}").status_code == 404
        assert client.post(url.split("?")[0], files=form(b"abc")).status_code == 404
        assert client.post(url + "x", files=form(b"abc")).status_code == 404
        assert client.post(url, files=form(b"abc")).status_code == 200
        assert client.post(url, files=form(b"xyz")).status_code == 404
        assert client.get(f"/attachments/{announced['id']}").content == b"abc"


def test_of_two_uploads_at_once_one_counts() -> None:
    with in_process(talker(["ok"])) as client:
        announced = exchange(client, "attachments.create", name="a.txt", size=3, mime_type="text/plain")
        url, transport = announced["upload_descriptor"]["url"], client._transport
        assert isinstance(transport, InProcess)

        async def both() -> list[httpx.Response]:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(transport.app)) as another:
                return await asyncio.gather(*(another.post(url, files=form(data)) for data in (b"abc", b"xyz")))

        first, second = sorted(transport.loop.run_until_complete(both()), key=lambda response: response.status_code)
        assert (first.status_code, second.status_code) == (200, 404)


@pytest.mark.parametrize(
    ("data", "mime_type", "status"),
    [(b"ab", "text/plain", 400), (b"abcd", "text/plain", 413), (b"abc", "text/html", 400)],
)
def test_what_was_announced_is_what_is_stored(data: bytes, mime_type: str, status: int) -> None:
    with in_process(talker(["ok"])) as client:
        announced = exchange(client, "attachments.create", name="a.txt", size=3, mime_type="text/plain; charset=utf-8")
        url = announced["upload_descriptor"]["url"]
        response = client.post(url, files=form(data, "other.txt", mime_type))
        assert response.status_code in (status, 400) and response.json()["detail"]
        assert client.post(url, files=form(b"abc", "other.txt")).json()["name"] == "a.txt"


def test_a_file_that_is_too_large_is_refused_while_it_is_read() -> None:
    app = ck.create_app(
        talker(["ok"]), settings=ck.Settings(database=":memory:", model="demo", max_attachment_bytes=1000)
    )
    with Client(transport=InProcess(app), base_url="http://testserver") as client:
        assert refused(client, "attachments.create", name="a", size=1001, mime_type="text/plain")[0] == 413
        assert exchange(client, "attachments.create", name="a", size=1000, mime_type="text/plain")["id"]
        assert client.post("/attachments", files=form(b"x" * 1001)).status_code == 413
        assert client.post("/attachments", files=form(b"x" * 1000)).status_code == 200
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        taken, sent = 0, []

        async def receive() -> dict[str, Any]:
            nonlocal taken
            taken += 1
            return {"type": "http.request", "body": head if taken == 1 else b"x" * 10_000, "more_body": taken < 10_000}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"multipart/form-data; boundary=b"), (b"host", b"testserver")]
        scope = {"type": "http", "method": "POST", "path": "/attachments", "headers": headers, "query_string": b""}
        scope |= {"server": ("testserver", 80), "scheme": "http", "http_version": "1.1", "root_path": ""}
        transport = client._transport
        assert isinstance(transport, InProcess)
        transport.loop.run_until_complete(app(scope, receive, send))
        assert sent[0]["status"] == 413 and taken < 20


def test_only_what_was_not_sent_can_be_deleted() -> None:
    with in_process(talker(["ok"])) as client:
        file = upload(client, b"abc")
        assert exchange(client, "attachments.delete", attachment_id=file["id"]) == {}
        assert client.get(f"/attachments/{file['id']}").status_code == 404
        assert refused(client, "attachments.delete", attachment_id=file["id"])[0] == 404
        sent = upload(client, b"abc")
        create(client, attachments=[sent["id"]])
        assert refused(client, "attachments.delete", attachment_id=sent["id"])[0] == 404
        assert refused(client, "threads.create", input=user_input("x", attachments=[sent["id"]]))[0] == 404
        assert len(exchange(client, "threads.list")["data"]) == 1


def test_files_go_with_their_conversation_or_after_a_day_unsent(tmp_path: Path) -> None:
    database = str(tmp_path / "chat.db")
    with in_process(talker(["ok"]), database=database) as client:
        sent, replied, unsent = (upload(client, b"abc") for _ in range(3))
        create(client, attachments=[sent["id"]])
        send(client, "1", "more", attachments=[replied["id"]])
        exchange(client, "threads.retry_after_item", thread_id="1", item_id="1")
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
            connection.execute("UPDATE attachments SET created_at = '2020-01-01T00:00:00.000Z'")
        upload(client, b"new")
        statuses = [client.get(f"/attachments/{file['id']}").status_code for file in (sent, replied, unsent)]
        assert statuses == [200, 404, 404]
        exchange(client, "threads.delete", thread_id="1")
        assert client.get(f"/attachments/{sent['id']}").status_code == 404


def test_a_downloaded_file_can_run_nothing_in_this_origin() -> None:
    with in_process(talker(["ok"])) as client:
        name = 'a"\r\nX-Evil: 1\n/../é.html'
        announced = exchange(client, "attachments.create", name=name, size=3, mime_type="text/html")
        client.post(announced["upload_descriptor"]["url"], files=form(b"<b>", "x", "text/html")).raise_for_status()
        headers = client.get(f"/attachments/{announced['id']}").headers
        assert headers["x-content-type-options"] == "nosniff" and "sandbox" in headers["content-security-policy"]
        assert headers["content-disposition"].startswith("attachment;") and "x-evil" not in headers


MULTIPART = "multipart/form-data; boundary=b"
FORMS: list[tuple[str, bytes, int]] = [
    ("application/json", b"{}", 415),
    ("", b"", 415),
    ("multipart/form-data", b"--b--", 400),
    ("multipart/form-data; boundary=", b"--b--", 400),
    (MULTIPART, b"", 400),
    (MULTIPART, b"--b--\r\n", 400),
    (MULTIPART, b"nonsense", 400),
    (MULTIPART, b"--b\r\n\r\nx\r\n--b--\r\n", 400),
    (MULTIPART, b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc\r\n--b--\r\n', 400),
    (MULTIPART, b'--b\r\nContent-Disposition: form-data; name="x"; filename="a"\r\n\r\nabc\r\n--b--\r\n', 400),
    (
        MULTIPART,
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\nContent-Type: \xff/\r\n\r\na\r\n--b--',
        400,
    ),
]


@pytest.mark.parametrize(("content_type", "body", "status"), FORMS)
def test_a_malformed_upload_is_refused(content_type: str, body: bytes, status: int) -> None:
    with in_process(talker(["ok"])) as client:
        announced = exchange(client, "attachments.create", name="a", size=3, mime_type="text/plain")
        for url in ("/attachments", announced["upload_descriptor"]["url"]):
            response = client.post(url, content=body, headers={"Content-Type": content_type})
            assert response.status_code == status and response.json()["detail"]
        assert client.post(announced["upload_descriptor"]["url"], files=form(b"abc")).status_code == 200


# ---- dictation


def test_a_recording_becomes_text() -> None:
    heard: list[Any] = []

    async def transcribe(audio: bytes, media_type: str) -> str:
        heard.append((audio, media_type))
        return "hello"

    with in_process(talker(["ok"]), transcribe=transcribe) as client:
        audio = base64.b64encode(b"\0\1\2").decode()
        answer = exchange(client, "input.transcribe", audio_base64=audio, mime_type="audio/webm;codecs=opus")
        assert answer == {"text": "hello"} and heard == [(b"\0\1\2", "audio/webm")]


def test_a_recording_may_be_as_large_as_a_file_and_no_larger() -> None:
    async def transcribe(audio: bytes, media_type: str) -> str:
        return str(len(audio))

    with in_process(talker(["ok"]), transcribe=transcribe, max_attachment_bytes=2_000_000) as client:
        for size in (2_000_000, 2_000_001, 2_000_002, 2_100_000):
            params = {"audio_base64": base64.b64encode(bytes(size)).decode(), "mime_type": "audio/webm"}
            if size == 2_000_000:
                assert exchange(client, "input.transcribe", **params) == {"text": "2000000"}
            else:
                assert refused(client, "input.transcribe", **params)[0] == 413


def test_dictation_that_is_not_set_up_says_what_to_configure() -> None:
    with in_process(talker(["ok"])) as client:
        params = {"audio_base64": "AAAA", "mime_type": "audio/webm"}
        response = client.post("/chatkit", json={"type": "input.transcribe", "params": params})
        assert response.status_code == 501 and "OPENAI_API_KEY" in response.json()["detail"]


# ---- malformed requests

# One valid request of each operation; {t} is a thread, {u} a user message, {w} a widget, {q} a pending question,
# {p} a thread with a pending call, {d} one to delete, {a} a file.
VALID: dict[str, dict[str, Any]] = {
    "threads.create": {"input": user_input("", content=[{"type": "input_text", "text": "hi"}, TAG], quoted_text="x")},
    "threads.add_user_message": {"thread_id": "{t}", "input": user_input("more", quoted_text="x", attachments=["{a}"])},
    "threads.retry_after_item": {"thread_id": "{t}", "item_id": "{u}"},
    "threads.add_client_tool_output": {"thread_id": "{p}", "result": {"selected": [1]}},
    "threads.add_structured_input": {
        "thread_id": "{t}",
        "item_id": "{q}",
        "input": {"status": "answered", "answers": {"q1": {"values": ["a"], "skipped": False}}},
    },
    "threads.custom_action": {"thread_id": "{t}", "item_id": "{w}", "action": {"type": "toggle", "payload": {"id": 1}}},
    "threads.sync_custom_action": {"thread_id": "{t}", "item_id": "{w}", "action": {"type": "toggle", "payload": {}}},
    "threads.list": {"limit": 2, "order": "desc", "after": "{t}"},
    "threads.get_by_id": {"thread_id": "{t}"},
    "threads.update": {"thread_id": "{t}", "title": "Title"},
    "threads.delete": {"thread_id": "{d}"},
    "items.list": {"thread_id": "{t}", "limit": 2, "order": "asc", "after": "{u}"},
    "items.feedback": {"thread_id": "{t}", "item_ids": ["{u}", "{w}"], "kind": "positive"},
    "attachments.create": {"name": "a.txt", "size": 3, "mime_type": "text/plain"},
    "attachments.delete": {"attachment_id": "{a}"},
    "input.transcribe": {"audio_base64": "AAAA", "mime_type": "audio/webm"},
}

ODD: tuple[Any, ...] = (None, 5, True, [], {})  # what is hardly ever right
# Values that are wrong wherever they stand: by operation and by the path of what they replace in its VALID params.
MALFORMED: dict[tuple[str, str], list[Any]] = {
    ("threads.list", "limit"): [0, -1, 101, 1.5, "x", [], 10**30],
    ("threads.list", "order"): [*ODD, "", "ASC"],
    ("threads.list", "after"): [5, True, [], {}],
    ("threads.get_by_id", "thread_id"): [*ODD, 1, 1.0],
    ("threads.retry_after_item", "item_id"): [*ODD, 1],
    ("threads.update", "title"): [*ODD, "", " ", "x" * 201],
    ("threads.create", "input"): [*ODD, "hello"],
    ("threads.create", "input.content"): [None, 5, True, {}, "hello"],
    ("threads.create", "input.content.0"): [*ODD, {"text": "x"}, {"type": "output_text", "text": "x"}],
    ("threads.create", "input.content.0.text"): [*ODD, ["x"]],
    ("threads.create", "input.content.1.id"): [*ODD],
    ("threads.create", "input.content.1.data"): [None, 5, True, [], "x"],
    ("threads.create", "input.content.1.group"): [5, True, [], {}],
    ("threads.create", "input.content.1.interactive"): [None, 5, [], {}, "perhaps"],
    ("threads.create", "input.attachments"): [None, 5, True, {}, "a", [5], [None]],
    ("threads.create", "input.quoted_text"): [5, True, [], {}, ["x"]],
    ("threads.create", "input.inference_options"): [None, 5, True, [], "x"],
    ("threads.create", "input.inference_options.model"): [5, True, [], {}],
    ("threads.create", "input.inference_options.tool_choice"): [5, True, [], {}, "echo", {"id": None}],
    ("items.feedback", "item_ids"): [None, 5, True, {}, "1", [1], [None], ["1"] * 101],
    ("items.feedback", "kind"): [*ODD, "", "neutral"],
    ("threads.custom_action", "action"): [*ODD, "toggle", {"type": 5}, {"payload": {}}],
    ("threads.custom_action", "item_id"): [5, True, [], {}],
    ("threads.add_structured_input", "input"): [None, 5, True, [], {"status": "pending"}],
    ("threads.add_structured_input", "input.answers"): [None, 5, [], {"q1": ["a"]}, {"q1": {"values": "a"}}],
    ("threads.add_structured_input", "input.answers.q1.values"): [None, "a", [1], [None], {}],
    ("threads.add_structured_input", "input.answers.q1.skipped"): [None, 5, [], {}, "perhaps"],
    ("attachments.create", "name"): [*ODD, "", "x" * 256],
    ("attachments.create", "size"): [None, 0, -1, 1.5, "x", [], {}],
    ("attachments.create", "mime_type"): [*ODD, "text", "text/", "/", "text/x\r\nA: b", "a/b/c", "t\u00e9xt/x", "*/*"],
    ("attachments.delete", "attachment_id"): [*ODD],
    ("input.transcribe", "audio_base64"): [*ODD, "A", "AA A", "\u00e9", "\0"],
    ("input.transcribe", "mime_type"): [*ODD],
}


@pytest.mark.parametrize(("operation", "path"), MALFORMED)
def test_a_malformed_field_is_refused_and_named(operation: str, path: str) -> None:
    async def transcribe(audio: bytes, media_type: str) -> str:
        raise AssertionError

    with in_process(talker(["ok"]), on_action=redraw, transcribe=transcribe) as client:
        create(client)
        for value in MALFORMED[operation, path]:
            params = filled(VALID[operation], dict.fromkeys("tpduwqa", "1"))
            *parents, last = path.split(".")
            place = functools.reduce(lambda part, key: part[int(key) if key.isdigit() else key], parents, params)
            place[int(last) if last.isdigit() else last] = value
            status, detail = refused(client, operation, **params)
            assert status == 400 and all(part in detail for part in path.split(".")), (value, detail)
        assert len(items(client, "1")) == 2 and len(exchange(client, "threads.list")["data"]) == 1


LONG_TAG = {**TAG, "data": {"x": "x" * 32_000}}
BLANK: list[Any] = [[], [{"type": "input_text", "text": " \n\u3000"}]]
BODIES: list[tuple[Any, int]] = [
    *[({"type": kind}, 400) for kind in ("", "threads", "threads.create ", "THREADS.LIST", "__class__", "x" * 10_000)],
    *[({"type": kind}, 400) for kind in (*ODD, ["threads.list"], {"a": "threads.list"})],
    *[({"type": kind}, 400) for kind in VALID if kind != "threads.list"],
    *[({"type": "threads.list", "params": params}, 400) for params in (*ODD[:4], "", 0, False, "x", [{}])],
    *[
        ({"type": "threads.get_by_id", "params": {"thread_id": thread_id}}, 404)
        for thread_id in ("", "0", "-1", "999", "1.0", "1e0", " 1", "1\n", "+1", "0x1", "\u0661", "9" * 19, "9" * 500)
    ],
    *[({"type": "threads.create", "params": {"input": user_input("", content=content)}}, 400) for content in BLANK],
    ({"type": "threads.create", "params": {"input": user_input("x" * 32_001)}}, 413),
    ({"type": "threads.create", "params": {"input": user_input("x", quoted_text="x" * 32_001)}}, 413),
    ({"type": "threads.create", "params": {"input": user_input("", content=[LONG_TAG])}}, 413),
    ({"type": "threads.create", "params": {"input": user_input("x", attachments=["att_0"])}}, 404),
    ({"type": "attachments.create", "params": {"name": "a", "size": 2**63, "mime_type": "text/plain"}}, 413),
    *[(body, 400) for body in (*ODD, "x", [{"type": "threads.list"}])],
    *[(body, 400) for body in (b"", b"{", b"\xff", b'{"type": "threads.list"', b'{"type": "\\ud800"}', b'{"a": NaN}')],
    (b'{"type": "threads.create", "params": ' + b'{"a": ' * 5000 + b"1" + b"}" * 5001, 400),
    (b'{"type": "threads.list", "params": ' + b'{"a": ' * 70 + b"1" + b"}" * 71, 400),
    (b'{"type": "threads.list", "params": {"limit": ' + b"9" * 5000 + b"}}", 400),
    (b'{"type": "threads.list", "x": "' + b"x" * 1024 * 1024 + b'"}', 413),
]


def test_a_malformed_body_is_refused_and_nothing_is_kept() -> None:
    with in_process(talker(["ok"]), on_action=redraw) as client:
        for body, status in BODIES:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            response = client.post("/chatkit", content=content, headers={"Content-Type": "application/json"})
            assert response.status_code == status, content[:200]
            assert isinstance(response.json()["detail"], str) and response.json()["detail"], content[:200]
        assert exchange(client, "threads.list") == {"data": [], "has_more": False}


JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**63, 10**30, 1.5, -0.0, 1e308, [], {}, [[]], [None], {"type": "input_text"}),
    *("", " ", "0", "1", "2", "-1", "01", "9" * 19, "9" * 40, "\0", "\U0001f600", "\u2028", "\u0663", "x" * 33_000),
    *("threads.create", "input_tag", "answered", "skipped", "positive", {"values": []}, {"": None}, ["1", "1"], "../x"),
]


def mutated(chance: random.Random, request: Any) -> bytes:
    """A request with one to three things about it changed, as it goes over the wire."""
    request = copy.deepcopy(request)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = [(container, key) for container in containers(request) for key in list(keys(container))]
        if not places:
            break
        container, key = chance.choice(places)
        what = chance.random()
        if what < 0.6:
            container[key] = copy.deepcopy(chance.choice(JUNK))
        elif what < 0.75:
            del container[key]
        elif what < 0.85 and isinstance(container, dict):
            container[chance.choice(["", "type", "thread_id", "__proto__", "é"])] = chance.choice(JUNK)
        elif what < 0.92 and isinstance(container, list):
            container *= chance.choice((2, 50))
        else:
            other, there = chance.choice(places)
            if there in keys(other) and key in keys(container):
                container[key] = copy.deepcopy(other[there])
    text = json.dumps(request).encode()
    if chance.random() < 0.08:
        at = chance.randrange(len(text))
        text = chance.choice([text[:at], text[:at] + bytes([chance.randrange(256)]) + text[at + 1 :], text[at:]])
    return text


def keys(container: Any) -> Any:
    return container.keys() if isinstance(container, dict) else range(len(container))


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from containers(child)


def filled(template: Any, ids: dict[str, str]) -> Any:
    if isinstance(template, dict):
        return {key: filled(child, ids) for key, child in template.items()}
    if isinstance(template, list):
        return [filled(child, ids) for child in template]
    if isinstance(template, str) and template[:1] == "{":
        return ids[template[1]]
    return template


def test_no_mutation_of_a_request_breaks_anything() -> None:
    chance = random.Random(4)
    statuses: dict[int, int] = {}
    failed: list[Any] = []

    def prepare(client: Client) -> dict[str, str]:
        """What stands in VALID for ids."""
        events = client.operate("threads.create", input=user_input("call draw"))
        ids = {"t": events[0]["thread"]["id"], "u": events[1]["item"]["id"]}
        ids["w"] = next(event["item"]["id"] for event in events if event.get("item", {}).get("type") == "widget")
        ids["p"] = client.operate("threads.create", input=user_input("call pick"))[0]["thread"]["id"]
        ids["d"] = client.operate("threads.create", input=user_input("hello"))[0]["thread"]["id"]
        asked = client.operate("threads.add_user_message", thread_id=ids["t"], input=user_input("call survey"))
        ids["a"] = client.post("/attachments", files=form(b"abc")).json()["id"]
        return {**ids, "q": asked[-1]["item"]["id"]}

    def check(content: bytes, response: httpx.Response) -> None:
        if response.status_code != 200:
            assert 400 <= response.status_code < 500, response.status_code
            assert isinstance(response.json()["detail"], str) and response.json()["detail"]
        elif response.headers["content-type"].startswith("text/event-stream"):
            if "type" in json.loads(content):
                assert "stream_options" in kinds(validated("", chatkit_events(response.text)))
        else:
            validated(json.loads(content)["type"], response.json())

    agent = Agent(name="Demo", model=ck.DemoModel(delay=0), tools=PROTOCOL_TOOLS)

    async def transcribe(audio: bytes, media_type: str) -> str:
        return "hello"

    with in_process(agent, on_action=redraw, transcribe=transcribe) as client:
        for _ in range(40):
            ids = prepare(client)
            for _ in range(60):
                operation, params = chance.choice(list(VALID.items()))
                content = mutated(chance, {"type": operation, "params": filled(params, ids)})
                try:
                    response = client.post("/chatkit", content=content, headers={"Content-Type": "application/json"})
                    statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                    check(content, response)
                except Exception as error:
                    failed.append((content[:300], repr(error)[:300]))
    assert not failed, f"{len(failed)}: " + "\n".join(map(str, failed[:10]))
    assert statuses[200] > 300 and statuses[400] > 300 and statuses[404] > 100 and statuses[409] > 20, statuses


# ========================================================================================================== Faults
# What breaks around the server, and what must survive it. Failing providers are in a section of their own.

slow = pytest.mark.skipif(not TEST_ALL, reason="takes long: set CHATKIT_TEST_ALL=1")


def rows_of(path: Path | str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    """What the file holds, read by somebody else than the server."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql, values).fetchall()


def dump(path: Path | str) -> list[str]:
    """The whole database as SQL; unlike the file's bytes, it changes only where a row does."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def assert_sound(path: Path | str) -> None:
    assert rows_of(path, "PRAGMA integrity_check") == [("ok",)]
    assert rows_of(path, "PRAGMA foreign_key_check") == []
    assert rows_of(path, "SELECT id FROM messages WHERE status = 'streaming'") == []


@contextlib.contextmanager
def locked(path: Path | str) -> Iterator[None]:
    """Another process is in the middle of writing to the file."""
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN IMMEDIATE')\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-S", "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        try:
            yield
        finally:
            process.stdin.close()
            process.wait()


@contextlib.contextmanager
def serving_chat(agent: Agent[Any] | None = None, **settings: Any) -> Iterator[tuple[Client, ck.Chat]]:
    """As serving(), with the app's state beside the client."""
    app = ck.create_app(agent, settings=ck.Settings(**{"database": ":memory:", "model": "demo", **settings}))
    with ck.serve_in_background(app) as url, Client(base_url=url, timeout=DEADLINE) as client:
        client.get("/health").raise_for_status()  # open
        yield client, app.state.chat


def in_loop_of(chat: ck.Chat, work: Coroutine[Any, Any, Any]) -> Any:
    assert chat._keeper is not None
    return asyncio.run_coroutine_threadsafe(work, chat._keeper.get_loop()).result(DEADLINE)


def pragma(chat: ck.Chat, text: str) -> None:
    """Change what the server's own connection may do."""
    in_loop_of(chat, chat.store._read(f"PRAGMA {text}"))


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(0)` to `work(count - 1)` come to, each in a thread of its own."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


# ---- the process dies


class Paced(Script):
    """Says a word, calls the tool `pause`, then says a hundred words, 20 ms apart; "briefly" makes it three.

    Keeps nothing between two calls: so it answers in any number of conversations at once.
    """

    async def stream_response(
        self, system_instructions: Any, input: Any, *rest: Any, **more: Any
    ) -> AsyncIterator[Any]:
        words = 3 if "briefly" in json.dumps(input[-4:]) else 100
        if input[-1].get("type") == "function_call_output":
            steps: list[Any] = [f"w{number} " for number in range(words)]
        else:
            steps = ["Wait. ", Call("pause", call_id="call_" + secrets.token_hex(4))]
        async for event in Script(steps, delay=0.02).stream_response(system_instructions, input, *rest, **more):
            yield event


@function_tool
async def pause(wrapper: RunContextWrapper[ck.TurnContext]) -> str:
    """Take a while."""
    await asyncio.sleep(0.2)
    return json.dumps({"rested": True})


def paced_agent() -> Agent[Any]:
    return Agent(name="Paced", model=Paced(), tools=[pause])


PACED_SERVER = f"""
import functools, sys
import {Path(__file__).stem} as tests
tests.ck.create_app = functools.partial(tests.ck.create_app, tests.paced_agent())
sys.exit(tests.ck.main())
"""


class PacedProcess(Process):
    """The server as `python chatkit_server.py` starts it, but with the paced agent."""

    def __init__(self, cwd: Path) -> None:
        self.log_file = cwd / "log.txt"
        self._log = self.log_file.open("ab")
        self.process = self.launch(cwd)
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline().rstrip() for _ in range(3)]
        self.url = self.lines[0].removeprefix("Listening on ")

    @staticmethod
    def launch(cwd: Path) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(HERE), str(Path(__file__).parent)])
        with open(cwd / "log.txt", "ab") as log_file:
            return subprocess.Popen(
                [sys.executable, "-c", PACED_SERVER, "--port", "0"],
                cwd=cwd,
                env={**CLEAN_ENV, "PYTHONPATH": path},
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
            )


@dataclass
class Heard:
    """What one reader was told of one turn, until the stream ended or broke."""

    message: str
    conversation_id: int = 0  # 0: the response had not begun
    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)  # each with the time it came
    ended: bool = False

    def listen(self, url: str, thread_id: int | None, timeout: float = DEADLINE) -> Heard:
        body = {"message": self.message, **({"thread_id": thread_id} if thread_id else {})}
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.Client(base_url=url, timeout=timeout) as client,
            client.stream("POST", "/chatkit", json=body) as response,
        ):
            assert response.status_code == 200, response.read()
            self.conversation_id = int(response.headers["x-thread-id"])
            for event in plain_events(response):
                self.events.append((time.monotonic(), event))
            self.ended = True
        return self

    def texts(self, before: float = math.inf) -> dict[int, str]:
        """What was said up to a moment, by message."""
        texts: dict[int, str] = {}
        for when, event in self.events:
            if event["type"] == "text" and when < before:
                texts[event["message_id"]] = texts.get(event["message_id"], "") + event["content"]
        return texts


class Victim:
    """A server that is killed and started again, each time with ten turns, on one file."""

    def __init__(self, cwd: Path, seed: int, *, long: bool) -> None:
        cwd.mkdir()
        self.long = long
        self.cwd = cwd
        self.random = random.Random(seed)
        self.heard: list[Heard] = []  # all that was ever acknowledged
        self.conversations: list[int] = []
        self.killed_at = 0.0
        self.kills = 0

    def kill_at_start(self) -> None:
        process = PacedProcess.launch(self.cwd)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.random.uniform(0.5, 3))
        assert process.poll() is None, "a start failed"
        process.kill()
        process.communicate()

    def kill_in_turns(self) -> None:
        """Start, look whether all is there that must be, have ten turns begun, and kill it while they run."""
        with PacedProcess(self.cwd) as server:
            self.check()
            with ThreadPoolExecutor(10) as pool:
                turns = [pool.submit(self._talk, server.url, slot) for slot in range(10)]
                time.sleep(self.random.uniform(0.05, 3.5 if self.long else 0.8))
                self.killed_at = time.monotonic()
                server.stop(signal.SIGKILL)
            heard = [turn.result() for turn in turns]
        self.kills += 1
        self.heard += [each for each in heard if each.conversation_id]
        self.conversations = sorted({each.conversation_id for each in self.heard})

    def _talk(self, url: str, slot: int) -> Heard:
        wait, number = self.random.uniform(0, 1.5 if self.long else 0.3), self.random.randrange(10**9)
        time.sleep(wait)
        known = self.conversations[slot] if slot < len(self.conversations) else None
        heard = Heard(f"turn {number}").listen(url, known)
        return Heard(f"and {number}").listen(url, heard.conversation_id) if heard.ended else heard

    def check(self) -> None:
        path = self.cwd / "chatkit.db"
        assert_sound(path)
        stored = {row[0]: row[1:] for row in rows_of(path, "SELECT id, conversation_id, role, content FROM messages")}
        users = {(conversation, content) for conversation, role, content in stored.values() if role == "user"}
        for heard in self.heard:
            assert (heard.conversation_id, heard.message) in users
            before = math.inf if heard.ended else self.killed_at - 0.5
            for message_id, text in heard.texts(before).items():
                assert stored[message_id][2].startswith(text), (heard.message, text, stored[message_id])
        self.heard = [each for each in self.heard if each.ended]  # the next kill is not theirs; those stay as they are

    def check_that_it_goes_on(self) -> None:
        with PacedProcess(self.cwd) as server:
            self.check()
            assert self.conversations
            count = len(self.conversations)
            for heard in at_once(count, lambda n: Heard("go on, briefly").listen(server.url, self.conversations[n])):
                assert heard.ended and heard.events[-1][1]["status"] == "completed"
            with server.client() as client:
                for conversation_id in self.conversations:
                    assert {row["status"] for row in client.messages(conversation_id)} <= {"done", "interrupted"}
        assert "Traceback" not in (self.cwd / "log.txt").read_text()


@pytest.mark.parametrize(("servers", "kills"), [(2, 1), pytest.param(2, 10, marks=slow)])
def test_whenever_it_is_killed_what_was_acknowledged_is_there_and_it_goes_on(
    tmp_path: Path, servers: int, kills: int
) -> None:
    """Ten turns in each server when it is killed: 200 turns in the long run, and starts that are killed in between."""

    def torment(seed: int) -> None:
        victim = Victim(tmp_path / str(seed), seed, long=kills > 1)
        for number in range(kills):
            if kills > 1 and number % 2:
                victim.kill_at_start()
            victim.kill_in_turns()
        victim.check_that_it_goes_on()

    at_once(servers, torment)


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=slow)])
def test_a_signal_ends_fifty_turns_saved_and_explained_within_two_seconds(tmp_path: Path, how: signal.Signals) -> None:
    readers = [Heard(f"turn {number}") for number in range(50)]
    with PacedProcess(tmp_path) as server, ThreadPoolExecutor(50) as pool:
        following = [pool.submit(reader.listen, server.url, None) for reader in readers]
        until(lambda: all(reader.texts() for reader in readers))
        began = time.monotonic()
        status = server.stop(how)
        assert time.monotonic() - began < 2
        for each in following:
            each.result()
    assert status in (0, -how)
    assert [each.name for each in tmp_path.glob("chatkit.db*")] == ["chatkit.db"]  # which may be copied: no -wal beside
    stored = dict(rows_of(tmp_path / "chatkit.db", "SELECT id, content FROM messages WHERE role = 'assistant'"))
    for reader in readers:
        assert reader.ended
        error, done = (event for _, event in reader.events[-2:])
        assert (error["type"], error["code"], error["allow_retry"]) == ("error", "shutdown", True)
        assert (done["type"], done["status"]) == ("done", "failed")
        assert {message_id: stored[message_id] for message_id in reader.texts()} == reader.texts()
    assert_sound(tmp_path / "chatkit.db")
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


# ---- the database


@pytest.mark.parametrize("seconds", [0.3, pytest.param(3, marks=slow)])
def test_a_short_lock_is_waited_for(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "chatkit.db"
    with serving(scripted(["Hello."]), database=str(path)) as client, ThreadPoolExecutor(1) as pool:
        with locked(path):
            answer = pool.submit(client.send_message, "hi")
            time.sleep(seconds)
            assert not answer.done()
        assert said(answer.result(DEADLINE)) == "Hello."


@pytest.mark.parametrize("patience", [0.2, pytest.param(5, marks=slow)])
def test_a_long_lock_is_a_503_that_leaves_nothing_behind(
    tmp_path: Path, patience: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Eight at a time, again and again for a minute (or a second): each is told within two waits of one of them."""
    path, end = tmp_path / "chatkit.db", 60 if patience == 5 else 0.3
    with serving_chat(scripted(["Hello."]), database=str(path)) as (client, chat):
        pragma(chat, f"busy_timeout = {int(patience * 1000)}")
        thread_id = client.send_message("before")[0]["thread_id"]
        before = dump(path)
        requests: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/chatkit", {"message": "new"}),
            ("POST", "/chatkit", {"message": "more", "thread_id": thread_id}),
            ("PATCH", f"/api/conversations/{thread_id}", {"title": "other"}),
            ("POST", "/chatkit", {"type": "threads.create", "params": {"input": user_input("new")}}),
        ]
        requests += [("POST", "/chatkit", {"message": "new"})] * 4

        def ask(number: int) -> tuple[httpx.Response, float]:
            method, url, body = requests[number]
            began = time.monotonic()
            response = client.request(method, url, json=body, timeout=60)
            return response, time.monotonic() - began

        with locked(path):
            until_when = time.monotonic() + end
            while time.monotonic() < until_when:
                for response, took in at_once(len(requests), ask):
                    assert response.status_code == 503 and response.headers["retry-after"]
                    assert "locked" in response.json()["detail"]
                    assert took < 3 * patience
            assert client.get(f"/api/conversations/{thread_id}").status_code == 200  # readers do not mind
        assert "the database failed" in caplog.text
        assert dump(path) == before
        assert said(client.send_message("after", thread_id)) == "Hello."
        assert_sound(path)


@pytest.mark.parametrize("seconds", [0.4, pytest.param(12, marks=slow)])
@pytest.mark.parametrize("moment", ["before the first word", "in the middle", "after the last word"])
def test_a_lock_during_a_turn_does_not_lose_the_answer(
    tmp_path: Path, moment: str, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The lock lasts longer than SQLite waits by itself."""
    path, wait = tmp_path / "chatkit.db", Wait()
    steps: dict[str, list[Any]] = {
        "before the first word": [wait, "Hello ", "world."],
        "in the middle": ["Hello ", wait, "world."],
        "after the last word": ["Hello ", "world.", wait],
    }
    with serving_chat(scripted(steps[moment]), database=str(path)) as (client, chat), ThreadPoolExecutor(1) as pool:
        if seconds < 5:
            pragma(chat, "busy_timeout = 100")
        answer = pool.submit(Heard("hi").listen, str(client.base_url), None, 60)
        assert wait.reached.wait(DEADLINE)
        with locked(path):
            wait.gate.set()
            time.sleep(seconds)
        heard = answer.result(60)
        assert heard.ended and heard.events[-1][1]["status"] == "completed"
        assert [m["content"] for m in client.messages(1)] == ["hi", "Hello world."]
    assert_sound(path)


def test_text_said_during_a_lock_is_saved_after_it_without_waiting_for_more(tmp_path: Path) -> None:
    path, locking, silence = tmp_path / "chatkit.db", Wait(), Wait()
    agent = scripted(["one ", locking, *["two "] * 30, silence, "three"], delay=0.02)
    with serving_chat(agent, database=str(path)) as (client, chat), ThreadPoolExecutor(1) as pool:
        pragma(chat, "busy_timeout = 100")
        answer = pool.submit(client.send_message, "hi")
        assert locking.reached.wait(DEADLINE)
        with locked(path):
            locking.gate.set()
            assert silence.reached.wait(DEADLINE)
        until(lambda: rows_of(path, "SELECT 1 FROM messages WHERE content LIKE '%' || ?", "two " * 30), 1.5)
        silence.gate.set()
        answer.result(DEADLINE)


@pytest.mark.parametrize(
    ("limit", "lift", "told"),
    [
        ("max_page_count = 1", "max_page_count = 100000", "The disk is full"),
        ("query_only = ON", "query_only = OFF", "The database is read-only"),
    ],
)
def test_a_database_that_takes_nothing_more_is_a_503_that_says_why(
    tmp_path: Path, limit: str, lift: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, wait = tmp_path / "chatkit.db", Wait()
    with serving_chat(scripted(["Hello ", wait, "x" * 50_000]), database=str(path)) as (client, chat):
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(client.send_message, "hi")
            assert wait.reached.wait(DEADLINE)
            pragma(chat, limit)
            wait.gate.set()
            error, done = running.result(DEADLINE)[-2:]
        assert (error["type"], error["code"], done["status"]) == ("error", "storage", "failed")
        assert error["message"].startswith(told)
        full = "x" * 30_000
        bodies = [
            {"message": full},
            {"message": full, "thread_id": 1},
            {"type": "threads.create", "params": {"input": user_input(full)}},
        ]
        for body in bodies * 2:
            response = client.post("/chatkit", json=body)
            assert response.status_code == 503 and response.json()["detail"].startswith(told)
            assert response.headers["retry-after"]
        assert len(re.findall("the database failed", caplog.text)) >= 6
        assert client.get("/api/conversations/1").status_code == 200
        assert rows_of(path, "SELECT content FROM messages WHERE role = 'user'") == [("hi",)]
        assert rows_of(path, "SELECT COUNT(*) FROM conversations") == [(1,)]
        pragma(chat, lift)
        assert client.send_message("again", 1)[-1]["status"] == "completed"
        first, failed, *rest = [row["status"] for row in client.messages(1)]
        assert failed in ("failed", "interrupted") and {first, *rest} == {"done"}
    assert_sound(path)


@pytest.mark.parametrize("fate", ["deleted", "replaced"])
def test_a_file_that_went_away_takes_no_more_messages(
    tmp_path: Path, fate: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite would go on writing to the deleted file, and all of it would be gone at the end."""
    path = tmp_path / "chatkit.db"
    with serving(scripted(["Hello."]), database=str(path)) as client:
        client.send_message("hi")
        path.unlink()
        if fate == "replaced":
            with contextlib.closing(sqlite3.connect(path)) as other:
                other.execute("CREATE TABLE mine (x)")
        for body in ({"message": "more"}, {"message": "more", "thread_id": 1}):
            response = client.post("/chatkit", json=body)
            assert response.status_code == 503 and "Stop the server" in response.json()["detail"]
        assert client.get("/health").status_code == 503
        assert "the database failed" in caplog.text
    assert not path.exists() or rows_of(path, "SELECT name FROM sqlite_schema") == [("mine",)]


def test_the_working_directory_may_change_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(scripted(["Hello."]), database="chatkit.db") as client:
        monkeypatch.chdir("/")  # as notebooks do
        assert said(client.send_message("hi")) == "Hello."


def make_unusable(path: Path, kind: str) -> None:
    if kind == "a directory":
        path.mkdir()
        return
    if kind == "not a database":
        path.write_bytes(b"Dear diary, " * 1000)
        return
    if kind == "of a newer version":
        asyncio.run(open_and_close(path))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        if kind == "of a newer version":
            connection.execute(f"PRAGMA user_version = {ck.SCHEMA_VERSION + 1}")
        else:
            connection.execute("CREATE TABLE recipes (name TEXT, status TEXT)")
            connection.execute("INSERT INTO recipes VALUES ('soup', 'streaming')")
        if kind == "of another program with a version":
            connection.execute(f"PRAGMA user_version = {ck.SCHEMA_VERSION}")


async def open_and_close(path: Path) -> None:
    async with ck.Store(path):
        pass


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("not a database", "not a database"),
        ("a directory", "unable to open"),
        ("of a newer version", "newer version"),
        ("of another program", "something else"),
        ("of another program with a version", "something else"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(
    tmp_path: Path, kind: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.db"
    make_unusable(path, kind)
    before = path.read_bytes() if path.is_file() else b""
    assert ck.main(["--port", "0", "--database", str(path), "--model", "demo"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("chatkit_server: ")]) == 1 and told in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert (path.read_bytes() if path.is_file() else b"") == before
    assert [each.name for each in tmp_path.iterdir()] == ["some.db"]


def test_a_row_edited_by_hand_into_bad_json_is_read_as_far_as_it_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "chatkit.db"
    with serving(parrot_agent(), database=str(path)) as client:
        for number, (column, broken) in enumerate(
            [("tool_calls", "{"), ("tool_calls", "[1]"), ("tool_calls", "5"), ("extra", "]"), ("extra", "5")], 1
        ):
            client.send_message("hi")
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
                connection.execute("PRAGMA ignore_check_constraints = ON")
                connection.execute(f"UPDATE messages SET {column} = ? WHERE conversation_id = ?", (broken, number))
            assert [row["content"] for row in client.messages(number)] == ["hi", "hi", "hi+hi"]
            assert len(client.operate("items.list", thread_id=str(number))["data"]) == 3
            assert said(client.send_message("more", number)) == "more+more"
        assert "cannot be read" in caplog.text


# ---- the store


def test_writers_that_fail_take_nobody_elses_rows_along(tmp_path: Path) -> None:
    async def interleave() -> None:
        async with ck.Store(tmp_path / "chatkit.db") as store:
            conversation, _ = await store.add_user_message("ann", None, "title", "first")

            def two_statements(db: sqlite3.Connection) -> None:
                db.execute("INSERT INTO tasks (user_id, title) VALUES ('ann', 'half')")
                db.execute("INSERT INTO tasks (user_id, title) VALUES ('ann', NULL)")

            async def fail_in_transaction() -> None:
                with pytest.raises(sqlite3.IntegrityError):
                    await store._transaction(two_statements)

            async def fail_in_statement() -> None:
                with pytest.raises(sqlite3.IntegrityError):
                    await store.add_message("ann", conversation["id"], "no such role")

            async def fail_in_begin() -> None:
                with pytest.raises(sqlite3.Error):
                    await store.add_user_message("ann", None, "half", cast(Any, None))

            work: list[Coroutine[Any, Any, Any]] = []
            for number in range(100):
                work += [
                    store.add_task("ann", f"task {number}"),
                    fail_in_transaction(),
                    store.add_message("ann", conversation["id"], "user", f"message {number}"),
                    fail_in_statement(),
                    store.add_user_message("ann", None, f"conversation {number}", "first"),
                    fail_in_begin(),
                ]
            random.Random(1).shuffle(work)
            await asyncio.gather(*work)

    asyncio.run(interleave())
    count = "SELECT (SELECT COUNT(*) FROM tasks), (SELECT COUNT(*) FROM messages), (SELECT COUNT(*) FROM conversations)"
    assert rows_of(tmp_path / "chatkit.db", count) == [(100, 201, 101)]
    assert_sound(tmp_path / "chatkit.db")


def test_a_beginning_that_is_cancelled_leaves_both_rows_or_none(tmp_path: Path) -> None:
    async def cancel_each_step() -> int:
        kept = 0
        async with ck.Store(tmp_path / "chatkit.db") as store:
            for step in range(60):
                cancelled = asyncio.create_task(store.add_user_message("ann", None, f"cancelled {step}", "first"))
                others = [asyncio.create_task(store.add_task("ann", f"{step}-{number}")) for number in range(3)]
                for _ in range(step // 3):
                    await asyncio.sleep(0)
                await asyncio.sleep(step % 3 * 0.0002)
                cancelled.cancel()
                cancelled.cancel()
                done = await asyncio.gather(cancelled, return_exceptions=True)
                kept += not isinstance(done[0], BaseException)
                await asyncio.gather(*others)
                assert store._connection is not None and not store._connection.in_transaction
                assert not store._lock.locked()
        return kept

    acknowledged = asyncio.run(cancel_each_step())
    path = tmp_path / "chatkit.db"
    assert rows_of(path, "SELECT COUNT(*) FROM tasks") == [(180,)]
    alone = "SELECT id FROM conversations c WHERE (SELECT COUNT(*) FROM messages WHERE conversation_id = c.id) <> 1"
    assert rows_of(path, alone) == []
    assert rows_of(path, "SELECT COUNT(*) FROM conversations")[0][0] >= acknowledged
    assert_sound(path)


def test_two_servers_may_start_at_once_on_a_new_file(tmp_path: Path) -> None:
    async def use(path: Path) -> None:
        async with ck.Store(path) as store:
            await store.add_user_message("ann", None, "title", "first")

    for number in range(10):
        path = tmp_path / f"{number}.db"
        at_once(4, lambda _, path=path: asyncio.run(use(path)))  # type: ignore[misc]
        assert rows_of(path, "SELECT COUNT(*) FROM messages") == [(4,)]
        assert_sound(path)


# ---- readers


def raw_request(client: Client, body: dict[str, Any], **headers: str) -> bytes:
    content = json.dumps(body).encode()
    head = {"Host": client.base_url.netloc.decode(), "Content-Type": "application/json", **headers}
    lines = [f"{name}: {value}" for name, value in {**head, "Content-Length": str(len(content))}.items()]
    return "\r\n".join(["POST /chatkit HTTP/1.1", *lines, "", ""]).encode() + content


def connect(client: Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=DEADLINE)


@pytest.mark.parametrize("moment", ["in the request", "before the first event", "during", "after the last event"])
def test_a_reader_that_leaves_does_not_stop_the_answer(moment: str, caplog: pytest.LogCaptureFixture) -> None:
    wait = Wait()
    with serving(scripted(["Hello ", wait, "world."])) as client:
        whole = raw_request(client, {"message": "hi"})
        with connect(client) as reader:
            reader.sendall(whole if moment != "in the request" else whole[:-5])
            if moment == "in the request":
                time.sleep(0.1)
            elif moment != "before the first event":
                got = b""
                while b"Hello " not in got:
                    got += reader.recv(4096)
            if moment == "after the last event":
                wait.gate.set()
                while b'"done"' not in got:
                    got += reader.recv(65536)
        if moment == "in the request":
            assert client.get("/api/conversations").json() == []
            client.get("/health").raise_for_status()
        else:
            assert wait.reached.wait(DEADLINE)
            wait.gate.set()
            until(lambda: [row["content"] for row in client.messages(1)] == ["hi", "Hello world."])
            until(lambda: client.messages(1)[-1]["status"] == "done")
            assert client.send_message("more", 1)[-1]["status"] == "completed"
    assert not [record for record in caplog.records if record.exc_info or "Traceback" in record.getMessage()]


def test_readers_that_come_back_get_each_event_once_and_none_is_missing() -> None:
    first, second = Wait(), Wait()
    agent = scripted([Call("echo", {"text": "x"})], ["a", "b", first, "c", "d", second, "e"])
    with serving(agent) as client, ThreadPoolExecutor(30) as pool:
        started = pool.submit(client.send_message, "hi")
        assert first.reached.wait(DEADLINE)
        with client.stream("GET", "/api/conversations/1/stream") as response:
            so_far: list[dict[str, Any]] = []
            for event in plain_events(response):
                so_far.append(event)
                if event.get("content") == "b":
                    break
        turn = so_far[0]["_id"].split("-")[0]
        wrong = [
            "", "nonsense", f"{turn}-999999", f"{turn}--1", f"{turn}-1e1", f"{turn}-", f"{turn}-\u0661", f"x{turn}-2",
            "-", "00000000-3", "-1", "1", "9" * 5000,
        ]  # fmt: skip

        def come_back(last: str | None) -> list[dict[str, Any]]:
            headers: dict[bytes, bytes] = {} if last is None else {b"Last-Event-ID": last.encode()}
            with client.stream("GET", "/api/conversations/1/stream", headers=headers) as response:
                assert response.status_code == 200
                return list(plain_events(response))

        seen = [event["_id"] for event in so_far]
        asked = [None, *wrong, *seen]
        back = [pool.submit(come_back, last) for last in asked]
        time.sleep(0.1)
        first.gate.set()
        assert second.reached.wait(DEADLINE)
        second.gate.set()
        everything = started.result(DEADLINE)
        ids = [event["_id"] for event in everything]
        assert len(set(ids)) == len(ids) and everything[: len(so_far)] == so_far
        for last, each in zip(asked, back, strict=True):
            expected = everything[ids.index(last) + 1 :] if last in ids else everything
            assert each.result(DEADLINE) == expected, last
        assert client.get("/api/conversations/1/stream").status_code == 204


def test_the_last_event_id_of_another_turn_means_nothing_here() -> None:
    wait = Wait()
    with serving(scripted(["one"], ["two ", wait, "three"])) as client, ThreadPoolExecutor(1) as pool:
        foreign = client.send_message("hi")
        running = pool.submit(client.send_message, "again")
        assert wait.reached.wait(DEADLINE)
        headers = {"Last-Event-ID": foreign[3]["_id"]}
        with client.stream("GET", "/api/conversations/2/stream", headers=headers) as response:
            wait.gate.set()
            assert list(plain_events(response)) == running.result(DEADLINE)


def test_two_chatkit_readers_and_a_plain_one_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = Wait()
    with serving(scripted(["Hello ", wait, "world."])) as client, ThreadPoolExecutor(3) as pool:
        talking = pool.submit(client.operate, "threads.create", input=user_input("hi"))
        assert wait.reached.wait(DEADLINE)

        def follow(_: int) -> list[dict[str, Any]]:
            with client.stream("GET", "/api/conversations/1/stream") as response:
                return list(plain_events(response))

        following = [pool.submit(follow, number) for number in range(2)]
        time.sleep(0.05)
        wait.gate.set()
        plain = [each.result(DEADLINE) for each in following]
        assert plain[0] == plain[1] and said(plain[0]) == "Hello world."
        deltas = [event["update"].get("delta", "") for event in talking.result(DEADLINE) if "update" in event]
        assert "".join(deltas) == "Hello world."


@pytest.mark.parametrize("dialect", ["plain", "ChatKit"])
def test_a_conversation_deleted_under_a_reader_ends_its_stream(tmp_path: Path, dialect: str) -> None:
    wait, path = Wait(), tmp_path / "chatkit.db"
    with serving(scripted(["Hello ", wait, "world."]), database=str(path)) as client, ThreadPoolExecutor(1) as pool:
        if dialect == "plain":
            running = pool.submit(client.send_message, "hi")
        else:
            running = pool.submit(client.operate, "threads.create", input=user_input("hi"))
        assert wait.reached.wait(DEADLINE)
        assert client.delete("/api/conversations/1").json() == {"status": "deleted", "id": 1}
        events = running.result(DEADLINE)
        assert dialect != "plain" or events[-1]["status"] == "cancelled"
        assert client.get("/api/conversations/1/stream").status_code == 404
    assert rows_of(path, "SELECT * FROM messages") == rows_of(path, "SELECT * FROM conversations") == []


@pytest.mark.parametrize("dialect", ["plain", "ChatKit"])
def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch, dialect: str) -> None:
    monkeypatch.setattr(ck, "KEEP_ALIVE", 0.05)
    wait = Wait()
    chatkit = {"type": "threads.create", "params": {"input": user_input("hi")}}
    with serving(scripted(["Hello ", wait, "world."])) as client:
        body = {"message": "hi"} if dialect == "plain" else chatkit
        with client.stream("POST", "/chatkit", json=body) as response:
            raw = b""
            for chunk in response.iter_raw():
                raw += chunk
                if raw.count(b": keep-alive\n\n") == 3:
                    wait.gate.set()
    assert raw.index(b"Hello ") < raw.index(b": keep-alive") < raw.rindex(b": keep-alive") < raw.index(b"world.")
    assert raw.count(b": keep-alive") <= 5


# =========================================================================================================== Abuse
# Whoever means harm, or does it without meaning to.


class Parrot(Script):
    """Has the tool `give_back` give the person's words back, and says them twice; keeps nothing between two calls."""

    async def stream_response(
        self, system_instructions: Any, input: Any, *rest: Any, **more: Any
    ) -> AsyncIterator[Any]:
        words = next(item["content"] for item in reversed(input) if item.get("role") == "user")
        steps: list[Any] = [words, "+", words]
        if input[-1].get("type") != "function_call_output":
            steps = [Call("give_back", {"what": words}, "call_" + secrets.token_hex(4))]
        async for event in Script(steps).stream_response(system_instructions, input, *rest, **more):
            yield event


@function_tool
async def give_back(wrapper: RunContextWrapper[ck.TurnContext], what: str) -> str:
    """Answer with exactly this text."""
    return what


def parrot_agent() -> Agent[Any]:
    return Agent(name="Parrot", model=Parrot(), tools=[give_back])


@pytest.fixture(scope="module")
def parrot() -> Iterator[Client]:
    """A server for whoever abuses it: what one test leaves behind must not matter to the next."""
    with serving(parrot_agent(), max_attachment_bytes=ck.MAX_BODY) as client:
        yield client


@pytest.fixture(scope="module")
def guarded() -> Iterator[Client]:
    """The same, for those who have a token."""
    with serving(parrot_agent(), jwt_secret=SECRET) as client:
        yield client


def stored(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/api/conversations?limit=100").raise_for_status().json()
    return found


# ---- other people's ids


@dataclass
class Belongings:
    """What one user has: ids to abuse. Made in the file before the server opens it."""

    thread: int
    user: int
    assistant: int
    tool: int
    input: int
    widget: int
    task: int
    file: str
    key: str
    announced: str

    @classmethod
    async def add(cls, store: ck.Store, user_id: str) -> Belongings:
        conversation, message = await store.add_user_message(user_id, None, f"{user_id}'s", f"{user_id}'s words")

        async def add(role: str, **columns: Any) -> int:
            row = await store.add_message(user_id, conversation["id"], role, f"{user_id}'s", **columns)
            assert row is not None
            return int(row["id"])

        call = [{"id": f"call_{user_id}", "name": "get", "args": {}}]
        client = {"client": {"name": "get", "arguments": {}}}
        question = {"inputs": [{"type": "freeform", "id": "q", "question": "?"}]}
        file = await store.add_attachment(user_id, f"{user_id}'s.txt", "text/plain", 4, b"mine")
        announced = await store.add_attachment(user_id, f"{user_id}'s.txt", "text/plain", 4)
        return cls(
            thread=conversation["id"],
            user=message["id"],
            assistant=await add("assistant"),
            tool=await add("tool", tool_calls=call, status="pending", extra=client),
            input=await add("input", tool_calls=call, status="pending", extra=question),
            widget=await add("widget", extra={"widget": {"type": "Card", "children": []}}),
            task=(await store.add_task(user_id, f"{user_id}'s"))["id"],
            file=file["id"],
            key=file["key"],
            announced=announced["id"],
        )

    @classmethod
    def make(cls, path: Path, user_id: str) -> Belongings:
        async def make() -> Belongings:
            async with ck.Store(path) as store:
                return await cls.add(store, user_id)

        return asyncio.run(make())


def operation(kind: str, /, **params: Any) -> tuple[str, str, dict[str, Any]]:
    return "POST", "/chatkit", {"type": kind, "params": params}


def attempts(mine: Belongings, theirs: Belongings) -> dict[str, list[tuple[str, str, Any]]]:
    """By route, and by ChatKit operation: every way to name something of theirs. All of them must be a 404.

    An empty list says that nothing can be named there; what those show is tested below.
    """
    at, action = f"/api/conversations/{theirs.thread}", {"type": "toggle_task", "payload": {"id": theirs.task}}
    own, other = str(mine.thread), str(theirs.thread)
    answers = {"item_id": theirs.input, "answers": {"q": {"values": ["x"]}}}
    item_ids = [theirs.user, theirs.assistant, theirs.tool, theirs.input, theirs.widget]
    structured = {"status": "answered", "answers": {}}
    form = {"files": {"file": ("a.txt", b"evil", "text/plain")}}
    return {
        "GET /": [],
        "GET /health": [],
        "GET /docs": [],
        "GET /openapi.json": [],
        "GET /api/conversations": [],
        "GET /api/conversations/recent/first": [],
        "GET /api/tasks": [],
        "POST /attachments": [],
        "POST /chatkit": [
            ("POST", "/chatkit", {"message": "hi", "thread_id": theirs.thread}),
            ("POST", "/chatkit", {"message": "hi", "thread_id": other}),
            ("POST", "/chatkit", {"message": "hi", "attachments": [theirs.file]}),
            ("POST", "/chatkit", {"message": "hi", "thread_id": mine.thread, "attachments": [theirs.file]}),
        ],
        "GET /api/conversations/{conversation_id}": [("GET", at, None)],
        "PATCH /api/conversations/{conversation_id}": [
            ("PATCH", at, {"title": "evil"}),
            ("PATCH", at, {"status": "locked"}),
        ],
        "DELETE /api/conversations/{conversation_id}": [("DELETE", at, None)],
        "GET /api/conversations/{conversation_id}/stream": [("GET", at + "/stream", None)],
        "POST /api/conversations/{conversation_id}/cancel": [("POST", at + "/cancel", None)],
        "POST /api/conversations/{conversation_id}/retry": [("POST", at + "/retry", None)],
        "POST /api/conversations/{conversation_id}/tool_output": [
            ("POST", at + "/tool_output", {"result": "evil"}),
            ("POST", at + "/tool_output", {"result": "evil", "id": "call_ann"}),
        ],
        "POST /api/conversations/{conversation_id}/answers": [
            ("POST", at + "/answers", answers),
            ("POST", f"/api/conversations/{own}/answers", answers),
        ],
        "PATCH /api/tasks/{task_id}": [("PATCH", f"/api/tasks/{theirs.task}", {"done": True})],
        "POST /attachments/{attachment_id}": [
            ("POST", f"/attachments/{theirs.announced}?key={mine.key}", form),
            ("POST", f"/attachments/{theirs.announced}?key={theirs.key}", form),
            ("POST", f"/attachments/{theirs.announced}?key=", form),
            ("POST", f"/attachments/{theirs.announced}", form),
        ],
        "GET /attachments/{attachment_id}": [
            ("GET", f"/attachments/{theirs.file}", None),
            ("GET", f"/attachments/{theirs.file}?key=", None),
            ("GET", f"/attachments/{theirs.file}?key={mine.key}", None),
            ("GET", f"/attachments/{theirs.announced}", None),
        ],
        "threads.create": [operation("threads.create", input=user_input("hi", attachments=[theirs.file]))],
        "threads.add_user_message": [
            operation("threads.add_user_message", thread_id=other, input=user_input("hi")),
            operation("threads.add_user_message", thread_id=own, input=user_input("hi", attachments=[theirs.file])),
        ],
        "threads.retry_after_item": [
            operation("threads.retry_after_item", thread_id=thread, item_id=str(theirs.user)) for thread in (own, other)
        ],
        "threads.add_client_tool_output": [operation("threads.add_client_tool_output", thread_id=other, result="evil")],
        "threads.add_structured_input": [
            operation("threads.add_structured_input", thread_id=thread, item_id=str(theirs.input), input=structured)
            for thread in (own, other)
        ],
        "threads.custom_action": [
            operation("threads.custom_action", thread_id=thread, item_id=str(theirs.widget), action=action)
            for thread in (own, other)
        ],
        "threads.sync_custom_action": [
            operation("threads.sync_custom_action", thread_id=thread, item_id=str(theirs.widget), action=action)
            for thread in (own, other)
        ],
        "threads.list": [operation("threads.list", after=other)],
        "threads.get_by_id": [operation("threads.get_by_id", thread_id=other)],
        "threads.update": [operation("threads.update", thread_id=other, title="evil")],
        "threads.delete": [operation("threads.delete", thread_id=other)],
        "items.list": [
            operation("items.list", thread_id=other),
            operation("items.list", thread_id=own, after=str(theirs.assistant)),
        ],
        "items.feedback": [
            operation("items.feedback", thread_id=thread, item_ids=[str(item)], kind="negative")
            for thread in (own, other)
            for item in item_ids
        ],
        "attachments.create": [],
        "attachments.delete": [operation("attachments.delete", attachment_id=theirs.file)],
        "input.transcribe": [],
    }


def test_everything_of_somebody_elses_is_not_found_and_stays_untouched(tmp_path: Path) -> None:
    path = tmp_path / "chatkit.db"
    theirs, mine = Belongings.make(path, "ann"), Belongings.make(path, "ben")
    with serving(database=str(path), jwt_secret=SECRET) as client:
        client.headers.update(bearer("ben"))
        before = dump(path)
        for where, ways in attempts(mine, theirs).items():
            for method, url, body in ways:
                extra = body if isinstance(body, dict) and "files" in body else {"json": body} if body else {}
                response = client.request(method, url, **extra)
                assert response.status_code == 404, (where, url, body, response.text)
                assert "ann" not in response.text
            assert dump(path) == before, where
        own = ["/api/conversations", "/api/conversations/recent/first", "/api/tasks", "/api/conversations?q=words"]
        for url in own:
            assert "ben's" in client.get(url).text and "ann" not in client.get(url).text, url
        assert "ann" not in json.dumps(client.operate("threads.list"))


def test_the_list_of_what_could_be_somebody_elses_is_complete() -> None:
    """Add a route or an operation, and say in attempts() how somebody else's things could be named there."""
    listed = set(attempts(*[Belongings(*range(1, 8), *"abc")] * 2))  # type: ignore[arg-type]
    app = ck.create_app(settings=ck.Settings(database=":memory:", model="demo"))
    there: set[str] = set(ck.OPERATIONS)
    for route in app.routes:
        methods = set(getattr(route, "methods", None) or {"MOUNT"}) - {"HEAD", "OPTIONS"}
        there |= {f"{method} {route.path}" for method in methods}  # type: ignore[attr-defined]
    assert there - listed == set()


# ---- tokens


def encode(claims: dict[str, Any], key: Any = SECRET, algorithm: str = "HS256", **header: Any) -> str:
    return jwt.encode(claims, key, algorithm=algorithm, headers=header or None)


def by_hand(header: Any, claims: Any, signature: bytes = b"") -> str:
    """A token that no library would make."""
    parts = [header if isinstance(header, bytes) else json.dumps(header).encode()]
    parts += [claims if isinstance(claims, bytes) else json.dumps(claims).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


IN_AN_HOUR = int(time.time()) + 3600
GOOD: dict[str, Any] = {"sub": "ann", "exp": IN_AN_HOUR}

BAD_TOKENS: dict[str, Callable[[], str]] = {
    "no token at all": lambda: "nonsense",
    "two dots": lambda: "..",
    "no algorithm": lambda: by_hand({"alg": "none", "typ": "JWT"}, GOOD),
    "no algorithm, shouted": lambda: by_hand({"alg": "NONE"}, GOOD),
    "an empty algorithm": lambda: by_hand({"alg": ""}, GOOD),
    "no header field alg": lambda: by_hand({"typ": "JWT"}, GOOD),
    "an algorithm that is a list": lambda: by_hand({"alg": ["HS256"]}, GOOD),
    "a header that is a list": lambda: by_hand([], GOOD),
    "a header nested too deep": lambda: by_hand(b"[" * 5000, GOOD),
    "a critical header field": lambda: encode(GOOD, crit=["x"], x=1),
    "another algorithm of the secret": lambda: encode(GOOD, SECRET * 2, "HS512"),
    "another key": lambda: encode(GOOD, SECRET + "!"),
    "an empty key": lambda: by_hand({"alg": "HS256"}, GOOD, b"\0" * 32),
    "a cut signature": lambda: encode(GOOD)[:-2],
    "a public key's algorithm": lambda: by_hand({"alg": "RS256", "kid": "x"}, GOOD, b"x" * 256),
    "expired": lambda: encode({**GOOD, "exp": int(time.time()) - 1}),
    "not yet valid": lambda: encode({**GOOD, "nbf": IN_AN_HOUR}),
    "issued in the future": lambda: encode({**GOOD, "iat": IN_AN_HOUR}),
    "no exp": lambda: encode({"sub": "ann"}),
    "exp that is text": lambda: encode({**GOOD, "exp": "tomorrow"}),
    "exp that is null": lambda: encode({**GOOD, "exp": None}),
    "exp beyond all numbers": lambda: encode({**GOOD, "exp": math.inf}),
    "no subject": lambda: encode({"exp": IN_AN_HOUR}),
    "a subject that is a number": lambda: encode({"id": 5, "exp": IN_AN_HOUR}),
    "a subject that is a list": lambda: encode({"id": ["ann"], "exp": IN_AN_HOUR}),
    "a blank subject": lambda: encode({"sub": "  ", "exp": IN_AN_HOUR}),
    "an empty subject and an id": lambda: encode({"sub": "", "id": "ann", "exp": IN_AN_HOUR}),
    "a subject of 256 characters": lambda: encode({"sub": "a" * 256, "exp": IN_AN_HOUR}),
    "a subject that is half a character": lambda: encode({"sub": "\ud83d", "exp": IN_AN_HOUR}),
    "claims that are a list": lambda: encode(GOOD).split(".")[0] + "." + by_hand({}, [GOOD]).split(".", 1)[1],
    "very long": lambda: encode({**GOOD, "more": "x" * 20_000}),
}


def signed_by_hand(header: Any, claims: Any, secret: bytes = SECRET.encode()) -> str:
    """With a secret that no library would take, or claims that none would sign."""
    head = by_hand(header, claims).rsplit(".", 1)[0]
    signature = hmac.digest(secret, head.encode(), "sha512" if header["alg"] == "HS512" else "sha256")
    return head + "." + base64.urlsafe_b64encode(signature).decode().rstrip("=")


BAD_TOKENS["claims nested too deep"] = lambda: signed_by_hand({"alg": "HS256"}, b"[" * 5000)
BAD_TOKENS["a sub that is a number"] = lambda: signed_by_hand({"alg": "HS256"}, {"sub": 5, "exp": IN_AN_HOUR})
BAD_TOKENS["a sub that is null"] = lambda: signed_by_hand(
    {"alg": "HS256"}, {"sub": None, "id": "ann", "exp": IN_AN_HOUR}
)


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_a_bad_token_is_a_401(guarded: Client, name: str) -> None:
    response = guarded.get("/api/conversations", headers={"Authorization": f"Bearer {BAD_TOKENS[name]()}"})
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert set(response.json()) == {"detail"} and SECRET not in response.text


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer")],
        [("Authorization", "Basic YW5uOmFubg==")],
        [("Authorization", "Token {}")],
        [("Authorization", "{}")],
        [("Authorization", "Bearer {} {}")],
        [("Authorization", "Bearer {}"), ("Authorization", "Bearer {}")],
        [("Authorization", "Bearer {}, Bearer {}")],
        [("X-Authorization", "Bearer {}")],
        [("Cookie", "Authorization=Bearer {}")],
    ],
)
def test_a_token_counts_in_one_authorization_header_only(guarded: Client, headers: list[tuple[str, str]]) -> None:
    given = [(name, value.replace("{}", encode(GOOD))) for name, value in headers]
    response = guarded.get("/api/conversations", headers=given)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert guarded.get("/api/conversations?token=" + encode(GOOD)).status_code == 401


@pytest.mark.parametrize(
    "claims", [{"sub": "ann"}, {"id": "ann"}, {"sub": "ann", "id": "ben"}, {"sub": "ann", "aud": "x"}]
)
def test_the_user_is_the_subject_or_else_the_id(guarded: Client, claims: dict[str, str]) -> None:
    as_ann, as_ben = bearer("ann"), bearer("ben")
    headers = {"Authorization": "bearer  " + encode({**claims, "exp": IN_AN_HOUR})}
    events = list(plain_events(guarded.post("/chatkit", json={"message": "hi"}, headers=headers)))
    url = f"/api/conversations/{events[0]['thread_id']}"
    assert (guarded.get(url, headers=as_ann).status_code, guarded.get(url, headers=as_ben).status_code) == (200, 404)


@pytest.fixture(scope="module")
def choosy() -> Iterator[Client]:
    with serving(jwt_secret=SECRET, jwt_audience="chat", jwt_issuer="https://me") as client:
        yield client


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({}, 401),
        ({"aud": "chat"}, 401),
        ({"iss": "https://me"}, 401),
        ({"aud": "other", "iss": "https://me"}, 401),
        ({"aud": "chat", "iss": "https://me/"}, 401),
        ({"aud": [], "iss": "https://me"}, 401),
        ({"aud": "chat", "iss": "https://me"}, 200),
        ({"aud": ["other", "chat"], "iss": "https://me"}, 200),
    ],
)
def test_audience_and_issuer_must_fit_where_they_are_set(choosy: Client, claims: dict[str, Any], status: int) -> None:
    headers = {"Authorization": "Bearer " + encode({**GOOD, **claims})}
    assert choosy.get("/api/conversations", headers=headers).status_code == status


class KeyServer:
    """A JWKS URL on loopback; `answer` is what it says, and None that it is out of order. Counts what it is asked."""

    def __init__(self) -> None:
        self.answer: bytes | None = b""
        self.asked = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                self.send_response(200 if server.answer is not None else 500)
                self.end_headers()
                self.wfile.write(server.answer or b"")

            def log_message(self, *_: Any) -> None:
                return

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/jwks"

    def show(self, *keys: SigningKey) -> None:
        self.answer = json.dumps({"keys": [key.public for key in keys]}).encode()

    def __enter__(self) -> KeyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class SigningKey:
    """A private key, and its public half as a JWK."""

    def __init__(self, algorithm: str, key_id: str) -> None:
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

        self.algorithm, self.key_id = algorithm, key_id
        makers: dict[str, Callable[[], Any]] = {
            "EdDSA": ed25519.Ed25519PrivateKey.generate,
            "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
            "RS256": lambda: rsa.generate_private_key(65537, 2048),
        }
        self.private = makers[algorithm]()
        methods = jwt.get_algorithm_by_name(algorithm)
        self.public = json.loads(methods.to_jwk(self.private.public_key()))  # type: ignore[attr-defined]
        self.public.update({"alg": algorithm, "kid": key_id})

    def sign(self, claims: dict[str, Any] | None = None, **header: Any) -> dict[str, str]:
        header = {"kid": self.key_id, **header}
        token = encode(GOOD if claims is None else claims, self.private, self.algorithm, **header)
        return {"Authorization": "Bearer " + token}

    def pem(self) -> bytes:
        from cryptography.hazmat.primitives import serialization as form

        public: bytes = self.private.public_key().public_bytes(
            form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
        )
        return public


@functools.cache
def signing_keys() -> list[SigningKey]:
    """One of each kind; made once, because that takes a while."""
    return [SigningKey(algorithm, algorithm) for algorithm in ("EdDSA", "ES256", "RS256")]


def status_with(client: Client, headers: dict[str, str]) -> int:
    return client.get("/api/conversations", headers=headers).status_code


@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_token_signed_with_a_public_key_at_the_url_counts(secret: str | None) -> None:
    with KeyServer() as keys, serving(jwks_url=keys.url, jwt_secret=secret) as client:
        keys.show(*signing_keys())
        if secret:  # a key need not say what it is for
            named = [{name: key.public[name] for name in key.public if name != "alg"} for key in signing_keys()]
            keys.answer = json.dumps({"keys": named}).encode()
        for key in signing_keys():
            assert [status_with(client, key.sign()) for _ in range(3)] == [200] * 3
            assert status_with(client, {"Authorization": key.sign()["Authorization"][:-8] + "AAAAAAAA"}) == 401
            assert status_with(client, key.sign({"sub": "ann", "exp": IN_AN_HOUR - 7200})) == 401
            assert status_with(client, key.sign({"sub": "ann"})) == 401
        assert keys.asked == 1
        assert status_with(client, bearer("ann")) == (200 if secret else 401)


@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_public_key_is_never_taken_for_a_shared_secret(secret: str | None) -> None:
    signers = signing_keys()
    with KeyServer() as keys, serving(jwks_url=keys.url, jwt_secret=secret) as client:
        keys.show(*signers)
        for key in signers:
            assert status_with(client, key.sign()) == 200
            jwk = json.dumps(key.public, separators=(",", ":")).encode()
            parts = [key.public[name] for name in ("x", "y", "n") if name in key.public]
            raw = [base64.urlsafe_b64decode(part + "==") for part in parts]
            for forged_with in (key.pem(), key.pem().strip(), jwk, b"", *raw, *map(str.encode, parts)):
                for name in ("HS256", "HS512", "none", key.algorithm):
                    token = signed_by_hand({"alg": name, "kid": key.key_id}, GOOD, forged_with)
                    assert status_with(client, {"Authorization": "Bearer " + token}) == 401, (name, forged_with)


def test_a_key_serves_its_own_algorithm_alone() -> None:
    ed, es, rs = signing_keys()
    with KeyServer() as keys, serving(jwks_url=keys.url) as client:
        keys.show(ed, es, rs)
        for key in (ed, es, rs):
            assert status_with(client, key.sign()) == 200
            for other in {ed, es, rs} - {key}:
                assert status_with(client, key.sign(kid=other.key_id)) == 401
        for algorithm in ("RS384", "PS256"):
            token = encode(GOOD, rs.private, algorithm, kid=rs.key_id)
            assert status_with(client, {"Authorization": "Bearer " + token}) == 401
        assert status_with(client, rs.sign(jku=keys.url, jwk=rs.public, kid="unknown")) == 401


def test_keys_change_without_a_restart_and_go_on_to_count_while_the_url_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ck.PublicKeys, "AT_MOST_EVERY", 0.05)
    old, new = SigningKey("EdDSA", "old"), SigningKey("EdDSA", "new")
    with KeyServer() as keys, serving(jwks_url=keys.url) as client:
        keys.answer = None
        assert status_with(client, old.sign()) == 503
        keys.show(old)
        until(lambda: status_with(client, old.sign()) == 200)
        asked = keys.asked
        for number in range(30):
            assert status_with(client, new.sign(kid=f"guess {number}")) == 401
        assert keys.asked < asked + 15  # not one request for each token that somebody makes up
        keys.show(old, new)
        until(lambda: status_with(client, new.sign()) == 200)
        assert status_with(client, old.sign()) == 200
        keys.show(new)
        monkeypatch.setattr(ck.PublicKeys, "KEEP", 0.05)
        until(lambda: status_with(client, old.sign()) == 401)
        unknown = b'{"keys": [{"kty": "XX"}]}'
        for broken in (None, b"<html>", b"[]", b'{"keys": []}', b'{"keys": 5}', unknown, b"[" * 9999):
            keys.answer, asked = broken, keys.asked
            until(lambda asked=asked: status_with(client, new.sign()) == 200 and keys.asked > asked)  # type: ignore[misc]


# ---- other sites


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"message=hi", 415),
        ({"Content-Type": "text/plain"}, b'{"message": "hi"}', 415),
        ({"Content-Type": "text/plain; x=application/json"}, b'{"message": "hi"}', 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b'--x\r\n\r\n{"message": "hi"}\r\n--x--', 415),
        ({}, b'{"message": "hi"}', 415),
        ({"Origin": "https://evil.example"}, None, 403),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, None, 403),
        ({"Origin": "null"}, None, 403),
        ({"Origin": ""}, None, 403),
        ({"Origin": "http://localhost:3000.evil.example"}, None, 403),
        ({"Origin": "http://localhost:3001"}, None, 403),
        ({"Host": "evil.example"}, None, 403),
        ({"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}, None, 403),
        ({"Host": "localhost.evil.example"}, None, 403),
        ({"Host": "127.0.0.1.evil.example"}, None, 403),
        ({"Host": "localhost@evil.example"}, None, 403),
        ({"Host": "0.0.0.0"}, None, 403),
        ({"Host": ""}, None, 403),
        ({"Origin": "http://localhost:3000"}, None, 200),
        ({"Host": "localhost:8000"}, None, 200),
        ({"Host": "[::1]:8000"}, None, 200),
        ({"Host": "LOCALHOST:8000", "Origin": "http://localhost:8000"}, None, 200),
    ],
)
def test_no_other_site_gets_in_without_a_token(
    parrot: Client, headers: dict[str, str], content: bytes | None, status: int
) -> None:
    before = len(stored(parrot))
    chatkit = operation("threads.create", input=user_input("hi"))[2]
    for body in (json.dumps({"message": "hi"}).encode(), json.dumps(chatkit).encode()):
        kind = {} if content is not None else {"Content-Type": "application/json"}
        response = parrot.post("/chatkit", headers={**kind, **headers}, content=content or body)
        assert response.status_code == status, response.text
        assert response.headers.get("access-control-allow-origin") in (None, "http://localhost:3000")
    assert len(stored(parrot)) - before == (2 if status == 200 else 0)
    host = {name: value for name, value in headers.items() if name == "Host"}
    assert parrot.get("/api/conversations", headers=host).status_code == (403 if status == 403 and host else 200)


@pytest.mark.parametrize("host", ["GET / HTTP/1.0\r\n", "GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n"])
def test_a_request_with_no_host_or_two_of_them_gets_nothing(parrot: Client, host: str) -> None:
    with connect(parrot) as caller:
        caller.sendall(host.replace("GET /", "GET /api/conversations").encode() + b"\r\n")
        assert int(caller.recv(4096).split()[1]) in (400, 403)


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://localhost:5173", True),
        ("http://localhost:3001", False),
        ("https://evil.example", False),
        ("null", False),
    ],
)
def test_a_preflight_lets_listed_origins_pass(parrot: Client, guarded: Client, origin: str, allowed: bool) -> None:
    asks = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, last-event-id",
    }
    for client in (parrot, guarded):
        response = client.options("/chatkit", headers=asks)
        assert response.status_code == (200 if allowed else 400)
        assert response.headers.get("access-control-allow-origin") == (origin if allowed else None)
        assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "myhost.example"])
def test_listening_elsewhere_without_a_secret_is_refused(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ck.main(["--host", host, "--port", "0", "--database", ":memory:"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("chatkit_server: ") and "CHATKIT_JWT_SECRET" in lines[-1]
    with pytest.raises(ck.SettingsError):
        ck.serve_in_background(ck.create_app(database=":memory:", model="demo"), host=host)


# ---- size and shape


@pytest.mark.parametrize("path", ["/chatkit", "/attachments", "/api/conversations/1/tool_output"])
def test_a_body_that_never_ends_is_refused_while_it_is_read(parrot: Client, path: str) -> None:
    limit = ck.MAX_BODY
    with connect(parrot) as caller:
        kind = "multipart/form-data; boundary=x" if path == "/attachments" else "application/json"
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
        form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        start = form if path == "/attachments" else b'{"a":"'
        caller.sendall(head.encode() + b"%x\r\n%b\r\n" % (len(start), start))
        sent, answer = 0, b""
        caller.setblocking(False)
        until_when = time.monotonic() + DEADLINE
        with contextlib.suppress(ConnectionError):
            while not answer and time.monotonic() < until_when:
                with contextlib.suppress(BlockingIOError):
                    sent += caller.send(b"%x\r\n%b\r\n" % (65536, b"x" * 65536)) if sent < 64 * limit else 0
                with contextlib.suppress(BlockingIOError):
                    answer = caller.recv(4096)
        assert answer.startswith(b"HTTP/1.1 413 ") and sent < 16 * limit  # what the sockets hold, beside the limit


def test_a_body_that_only_claims_to_be_a_recording_is_not_read_to_a_recordings_length() -> None:
    with serving(scripted(["Hello."])) as client:
        for body in (
            {"x": "input.transcribe", "message": "hi", "rest": "x" * 2_000_000},
            {"x": "input.transcribe", "type": "threads.list", "rest": "x" * 2_000_000},
        ):
            assert client.post("/chatkit", json=body).status_code == 413
        assert client.get("/api/conversations").json() == []


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


ODD_BODIES: dict[str, str | bytes] = {
    "deep lists": f'{{"message": "hi", "x": {nested(500_000 // 2)}}}',
    "deep objects": '{"message": "hi", "x": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}",
    "rather deep": f'{{"message": "hi", "x": {nested(900)}}}',
    "a huge number": f'{{"message": "hi", "thread_id": {"9" * 5000}}}',
    "a number beyond doubles": '{"message": "hi", "x": 1e999}',
    "NaN": '{"message": "hi", "x": NaN}',
    "Infinity": '{"message": "hi", "x": -Infinity}',
    "half a character": '{"message": "hi \\ud83d"}',
    "half a character in a key": '{"message": "hi", "\\udc00": 1}',
    "not UTF-8": b'{"message": "hi \xff"}',
    "half an encoded character": b'{"message": "hi \xed\xa0\xbd"}',
    "two values": '{"message": "hi"} {}',
    "nothing": "",
    "a list": "[]",
    "a type that is a list": '{"type": ["threads.list"]}',
    "a type that is an object": '{"type": {}}',
    "a type that is null": '{"type": null}',
    "params that are a list": '{"type": "threads.create", "params": []}',
    "an id that is true": '{"message": "hi", "thread_id": true}',
    "an id that is negative": '{"message": "hi", "thread_id": -1}',
    "an id beyond 64 bits": '{"message": "hi", "thread_id": "9223372036854775808"}',
    "an id in other digits": '{"message": "hi", "thread_id": "\\u0661"}',
    "an id that is a fraction": '{"message": "hi", "thread_id": 1.0}',
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_BODIES)
def test_an_odd_body_is_refused_and_nothing_is_kept(parrot: Client, name: str) -> None:
    body, before = ODD_BODIES[name], stored(parrot)
    content = body if isinstance(body, bytes) else body.encode()
    response = parrot.post("/chatkit", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 404), response.text
    assert stored(parrot) == before


@pytest.mark.parametrize(
    "text",
    ["\0", "\x01\x1b[31m\x7f", "a\0b", "\u202e\u200b\ufeff", "\U0010ffff", "'; DROP TABLE tasks; --", "%s {0} \\"],
)
def test_odd_characters_are_kept_as_they_were_said(parrot: Client, text: str) -> None:
    events = parrot.send_message(text)
    thread_id, url = events[0]["thread_id"], f"/api/conversations/{events[0]['thread_id']}"
    assert said(events) == f"{text}+{text}"
    assert [row["content"] for row in parrot.messages(thread_id)] == [text, text, f"{text}+{text}"]
    assert parrot.patch(url, json={"title": text + "!"}).json()["title"] == text + "!"
    assert parrot.get(url).json()["title"] == text + "!"
    assert parrot.operate("items.list", thread_id=str(thread_id))["data"][-1]["content"][0]["text"] == text


@pytest.mark.parametrize(
    "words",
    ["\0", '"', "*", "zz OR", "NEAR(", "owner : zz", "^", "\ud800", "-", "(" * 200, "'", 'zz*b"c', "{zz}", "zz AND"],
)
def test_a_search_for_anything_is_a_search(parrot: Client, words: str) -> None:
    query = "".join(f"%{byte:02x}" for byte in words.encode("utf-8", "surrogatepass"))
    assert parrot.get(f"/api/conversations?q={query}").json() == []


NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 10**30, -(2**63), 2**63, "", " ", "0", "1", "01", "-1", "x", "\0", "\n", "\x1b",
    "\u2028", "\U0001f600", "a" * 300, "a" * 40_000, "9" * 30, "null", "../..", "__proto__", [], {}, [[]], [None],
    {"": None}, [1, "1"], {"type": "x"}, {"type": "input_text", "text": "x"}, "threads.create", "threads.delete",
    "items.list", "demo",
]  # fmt: skip


def valid_requests(mine: Belongings) -> list[tuple[str, str, Any]]:
    """One of each kind that works, to be spoiled."""
    ways = [way for listed in attempts(mine, mine).values() for way in listed]
    ways = [way for way in ways if way[2] is None or "files" not in way[2]]
    return [
        *ways,
        ("POST", "/chatkit", {"message": "add milk", "model": "demo", "tool_choice": "add_task", "attachments": []}),
        operation("threads.create", input=user_input("hi", quoted_text="x", inference_options={"model": "demo"})),
        operation(
            "threads.create", input={"content": [{"type": "input_tag", "id": "1", "text": "t", "data": {"a": 1}}]}
        ),
        operation("attachments.create", name="a.png", size=4, mime_type="image/png"),
        operation("input.transcribe", audio_base64="AAAA", mime_type="audio/webm"),
        operation("input.transcribe", audio_base64="\u00c4\u00c4", mime_type="audio/webm"),
        ("GET", "/api/conversations?limit=5&offset=1&q=milk", None),
        ("GET", "/openapi.json", None),
        ("GET", "/health", None),
    ]


def mutate(value: Any, chance: random.Random) -> Any:
    """The same with one thing changed, somewhere in it."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        what = chance.random()
        if what < 0.1:
            return {name: part for name, part in value.items() if name != key}
        if what < 0.15:
            return {**value, str(chance.choice(NASTY)): value[key]}
        return {**value, key: mutate(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        if chance.random() < 0.2:
            return value * chance.choice([0, 2, 200])
        return [*value[:at], mutate(value[at], chance), *value[at + 1 :]]
    return chance.choice(NASTY)


def spoil(content: bytes, chance: random.Random) -> bytes:
    """Bytes changed, lost, doubled or put in."""
    at, span = chance.randrange(len(content) + 1), chance.randrange(1, 8)
    put = chance.choice([b"\0", b"\xff", b'"', b"}", b"\\ud800", b"NaN", b"1e999", b"\\", b"[" * 3000, b"\r\n", b""])
    return content[:at] + put + content[at + chance.choice([0, span]) :]


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=slow)])
def test_random_mutations_of_valid_requests_never_break_it(tmp_path: Path, count: int) -> None:
    path = tmp_path / "chatkit.db"
    chance = random.Random(6)
    settings = ck.Settings(database=str(path), model="demo")

    async def transcribe(audio: bytes, media_type: str) -> str:
        return "hi"

    app = ck.create_app(settings=settings, transcribe=transcribe)
    app.state.chat.models.get_model("demo").delay = 0
    statuses: dict[int, int] = {}

    async def fire() -> None:
        transport = httpx.ASGITransport(app)  # which raises what the app does not catch
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await client.get("/health")
            for number in range(count):
                if number % 100 == 0:  # what there was is renamed, locked and deleted by now
                    requests = valid_requests(await Belongings.add(app.state.chat.store, "local"))
                method, url, body = chance.choice(requests)
                headers = {"Content-Type": "application/json"}
                if body is None or chance.random() < 0.1:
                    part, other = chance.choice(re.findall(r"\w+", url)), chance.choice([*NASTY, "\xff", "a/b"])
                    url = url.replace(part, urllib.parse.quote(str(other)[:500], safe=""))
                if chance.random() < 0.05:
                    method = chance.choice(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "X"])
                if chance.random() < 0.05:
                    name = chance.choice(
                        ["Content-Type", "Last-Event-ID", "Accept-Language", "Origin", "Authorization"]
                    )
                    headers[name] = chance.choice(["", "x", "\x7f", "application/json; charset=x", "1-2", "a" * 9000])
                for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
                    body = mutate(body, chance) if body is not None else None
                content = b"" if body is None else json.dumps(body).encode()
                if chance.random() < 0.2:
                    content = spoil(content, chance)
                response = await client.request(method, url, content=content, headers=headers)
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                assert response.status_code < 500, (number, method, url, content[:500], response.text)
            await asyncio.gather(*(turn.wait() for turn in list(app.state.chat.turns.values())))
            assert (await client.get("/health")).status_code == 200
            assert len([task for task in asyncio.all_tasks() if not task.done()]) < 5
        await app.state.chat.close()

    asyncio.run(fire())
    assert statuses[200] > count / 20 and statuses[400] > count / 20, statuses  # it did get in, and was refused
    assert_sound(path)


@slow
def test_what_schemathesis_makes_of_the_openapi_document_breaks_nothing(tmp_path: Path) -> None:
    schemathesis = optional("schemathesis")
    hypothesis = optional("hypothesis")
    path = tmp_path / "chatkit.db"
    Belongings.make(path, "local")
    with serving(database=str(path)) as client:
        document = client.get("/openapi.json").json()
        schema = schemathesis.openapi.from_dict(document)
        kinds_tried: dict[str, int] = {}
        for found in schema.get_all_operations():
            operation_ = found.ok()

            @hypothesis.given(case=operation_.as_strategy())
            @hypothesis.settings(
                max_examples=60, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )  # fmt: skip
            def attack(case: Any) -> None:
                try:
                    response = case.call(base_url=str(client.base_url))
                except ValueError:  # what no HTTP client would send
                    return
                kinds_tried[case.path] = kinds_tried.get(case.path, 0) + 1
                assert response.status_code < 500, case.as_curl_command()

            attack()
        assert len(kinds_tried) >= 10
        client.get("/health").raise_for_status()
    assert_sound(path)


FILE = b'--x\r\nContent-Disposition: form-data; name="file"'


@pytest.mark.parametrize(
    ("parameters", "content"),
    [
        ("", b""),
        ("; boundary=", b""),
        ("; boundary=x", b""),
        ("; boundary=x", b"--x"),
        ("; boundary=x", b"--x\r\n\r\nhi\r\n--x--"),
        ("; boundary=x", FILE + b"\r\n\r\nhi\r\n--x--"),
        ("; boundary=x", FILE + b'; filename=""\r\n\r\nhi\r\n--x--'),
        ("; boundary=x", FILE + b'; filename="a\0/../b"\r\n\r\nhi\r\n--x--'),
        ("; boundary=x", FILE + b'; filename="a"\r\nContent-Type: \xff/\0\r\n\r\nhi\r\n--x--'),
        ("; boundary=x", FILE + b'; filename="' + b"a" * 3000 + b'"\r\n\r\nhi\r\n--x--'),
        ("; boundary=x; charset=utf-7", FILE + b'; filename="+2AA-"\r\n\r\nhi\r\n--x--'),
        ("; boundary=x; charset=nonsense", FILE + b'; filename="\xff"\r\n\r\nhi\r\n--x--'),
        ("; boundary=x; charset=undefined", FILE + b'; filename="\xff\0"\r\n\r\nhi\r\n--x--'),
        ("; boundary=x", (FILE + b"\r\n\r\nhi\r\n") * 30),
    ],
)
def test_an_odd_form_is_refused_or_taken_but_breaks_nothing(parrot: Client, parameters: str, content: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data" + parameters}
    response = parrot.post("/attachments", content=content, headers=headers)
    assert response.status_code in (200, 400, 413, 415), response.text
    if response.status_code == 200:
        assert parrot.get(f"/attachments/{response.json()['id']}").content == b"hi"


# ---- events


FORGED = [
    "a\rb", "a\nb", "a\r\nb", "a\r\n\r\nb", "\u2028", "\u2029", "\x85", "\x0b\x0c\x1c\x1d\x1e", "data: x",
    "\ndata: [DONE]\n\n", "[DONE]", '\n\nid: 9\ndata: {"type": "done"}\n\n', ": comment", "event: x\n", "retry: 1",
    "\ufeff", '"}', "\\n\\u0000", "\0",
]  # fmt: skip


def sse(raw: bytes) -> list[str]:
    """The data of each event, as the HTML standard has a browser read them."""
    found: list[str] = []
    data: list[str] = []
    for line in re.split(r"\r\n|\r|\n", raw.decode().removeprefix("\ufeff")):
        if not line and data:
            found.append("\n".join(data))
            data = []
        name, _, value = line.partition(":")
        if name == "data":
            data.append(value.removeprefix(" "))
        assert not line or name in ("data", "id", ""), line
    return found


@pytest.mark.parametrize("text", FORGED)
def test_text_arrives_as_it_was_said_and_forges_no_event(parrot: Client, text: str) -> None:
    plain = sse(parrot.post("/chatkit", json={"message": f"!{text}!"}).content)
    assert plain[-1] == "[DONE]" and plain.count("[DONE]") == 1
    events = [json.loads(data) for data in plain[:-1]]
    assert kinds(events) == ["thread", "thinking", "tool_call", "tool_result", "text", "done"]
    assert said(events) == f"!{text}!+!{text}!"
    assert [e["result"] for e in events if e["type"] == "tool_result"] == [f"!{text}!"]
    assert [e["args"] for e in events if e["type"] == "tool_call"] == [{"what": f"!{text}!"}]
    body = operation("threads.create", input=user_input(f"!{text}!"))[2]
    events = [json.loads(data) for data in sse(parrot.post("/chatkit", json=body).content)]
    deltas = [e["update"]["delta"] for e in events if "delta" in e.get("update", {})]
    assert "".join(deltas) == f"!{text}!+!{text}!"
    done = [e["item"] for e in events if e["type"] == "thread.item.done"]
    assert [item["type"] for item in done] == ["user_message", "task", "assistant_message"]
    assert [item["content"][0]["text"] for item in done if "content" in item] == [f"!{text}!", f"!{text}!+!{text}!"]


def strictly(data: str) -> Any:
    """JSON as a browser takes it, which Python's parser is not as strict as."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    value = json.loads(data, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode()
    return value


ODD_JSON = [
    '{"a": "\\ud83d"}', '{"a": NaN}', '{"a": 1e999}', '["\\udc00"]', "[" * 5000, '{"a": ' + "9" * 5000 + "}", "[DONE]",
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_JSON)
def test_a_tools_result_that_is_not_quite_json_is_text_or_mended(parrot: Client, odd: str) -> None:
    events = [strictly(data) for data in sse(parrot.post("/chatkit", json={"message": odd}).content)[:-1]]
    assert said(events) == f"{odd}+{odd}" and events[-1]["status"] == "completed"
    mended = [{"a": "\ufffd"}, ["\ufffd"]] if "\\u" in odd else []
    assert next(e["result"] for e in events if e["type"] == "tool_result") in [odd, *mended]
    thread_id = str(events[0]["thread_id"])
    assert len(parrot.operate("items.list", thread_id=thread_id)["data"]) == 3
    body = operation("threads.add_user_message", thread_id=thread_id, input=user_input(odd))[2]
    events = [strictly(data) for data in sse(parrot.post("/chatkit", json=body).content)]
    assert events[-1]["type"] == "thread.item.done"


def test_a_models_arguments_that_are_not_quite_json_do_not_break_the_stream() -> None:
    agent = scripted(tools=[give_back])
    with serving(agent) as client:
        for number, odd in enumerate(ODD_JSON, 1):
            cast(Script, agent.model).responses = [[Call("give_back", odd)], ["Well."]]
            cast(Script, agent.model).seen.clear()
            plain = sse(client.post("/chatkit", json={"message": "hi"}).content)
            assert plain[-1] == "[DONE]" and [strictly(data) for data in plain[:-1]][-1]["type"] == "done"
            assert {row["status"] for row in client.messages(number)} <= {"done", "failed"}
            assert said(client.send_message("and now", number)) == "Well."


def test_a_tool_cannot_emit_what_no_reader_could_read() -> None:
    @function_tool
    async def emit(wrapper: RunContextWrapper[ck.TurnContext]) -> str:
        """Send something odd."""
        for odd in (math.nan, math.inf):
            for event in ({"type": "mine", "value": odd}, {"type": "thinking", "content": odd}):
                with pytest.raises(ValueError):  # noqa: PT011
                    wrapper.context.emit(event)
            with pytest.raises(ValueError):  # noqa: PT011
                await wrapper.context.widget({"type": "Card", "children": [odd]})
        return "refused"

    with serving(scripted([Call("emit")], ["Well."], tools=[emit])) as client:
        events = client.send_message("hi")
        assert [e["result"] for e in events if e["type"] == "tool_result"] == ["refused"]
        assert said(events) == "Well."


# ---- limits


@pytest.mark.parametrize("dialect", ["plain", "ChatKit"])
@pytest.mark.parametrize(("settings", "status"), [({"max_concurrent_turns": 4}, 503), ({"max_turns_per_user": 4}, 429)])
def test_beyond_the_limits_the_answer_is_no_at_once(dialect: str, settings: dict[str, int], status: int) -> None:
    wait = Wait()
    body = {"message": "hi"} if dialect == "plain" else operation("threads.create", input=user_input("hi"))[2]
    with serving(scripted([wait, "Hello."]), jwt_secret=SECRET, **settings) as client, ThreadPoolExecutor(20) as pool:

        def ask(user_id: str) -> tuple[int, float, str]:
            began = time.monotonic()
            response = client.post("/chatkit", json=body, headers=bearer(user_id))
            return response.status_code, time.monotonic() - began, response.headers.get("retry-after", "")

        asked = [pool.submit(ask, "ann") for _ in range(20)]
        until(lambda: sum(each.done() for each in asked) == 16)
        for each in asked:
            if each.done():
                code, took, retry_after = each.result()
                assert code == status and took < 2 and int(retry_after) > 0
        if status == 429:
            others = pool.submit(ask, "ben")
        wait.gate.set()
        assert sorted(each.result(DEADLINE)[0] for each in asked) == [200] * 4 + [status] * 16
        if status == 429:
            assert others.result(DEADLINE)[0] == 200
        assert ask("ann")[0] == 200
        assert len(client.get("/api/conversations", headers=bearer("ann")).json()) == 5  # what is refused is not kept


def test_without_tokens_everybody_is_one_user_without_a_limit_of_their_own() -> None:
    wait = Wait()
    with serving(scripted([wait, "Hello."]), max_turns_per_user=2) as client, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(client.send_message, "hi") for _ in range(6)]
        until(lambda: len(client.get("/api/conversations").json()) == 6)
        wait.gate.set()
        assert all(said(each.result(DEADLINE)) == "Hello." for each in asked)


# ============================================================================================================ Page
# In one class, because the browser's event loop stays in the thread for as long as the browser is there: async tests
# must come before it or after.

MARKDOWN = """# A heading
One paragraph with **bold**, *italics*, `a * b`, a [link](https://example.org/a_(b)?c=1),
and https://example.org/bare. snake_case_name, 2 * 3 * 4, \\*plain\\*.

1. first
   - inner **one**
   - inner two
2. second

```python
def f(x):

    return "<b>" + x
```

~~~
```
~~~
The end."""

EVIL = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">
[a](javascript:window.hacked=3) [b](JAVASCRIPT:alert(1)) [c](data:text/html,<script>hacked=4</script>) [d](//e.example)
<svg onload="window.hacked=5"> <a href="javascript:window.hacked=6">e</a> **<iframe src="javascript:hacked=7">**
[f](https://x.example/"onmouseover="hacked=9)
```html
<img src=x onerror="window.hacked = 10">
```"""

FITS = "document.documentElement.scrollWidth <= innerWidth && document.querySelector('#log').scrollWidth <= innerWidth"

LOW_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d");
  const rgb = (css) => {
    Object.assign(canvas, {fillStyle: css}).fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const channel = (v) => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  const opaque = (css) => css !== "rgba(0, 0, 0, 0)";
  const ground = (node) => opaque(getComputedStyle(node).backgroundColor) ? node : ground(node.parentElement);
  const written = (node) => node.checkVisibility() && !node.closest("[disabled]")
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  return [...document.querySelectorAll("body *")].filter(written).map((node) => {
    const colours = [getComputedStyle(node).color, getComputedStyle(ground(node)).backgroundColor];
    const [low, high] = colours.map((css) => light(rgb(css))).sort((a, b) => a - b);
    return [node.textContent.slice(0, 30), (high + .05) / (low + .05)];
  }).filter(([, ratio]) => ratio < 4.5);
}"""


class Tab:
    """A page in the browser, and what a person does and sees there."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.expect = optional("playwright.sync_api").expect
        self.input = page.get_by_label("Message", exact=True)
        self.answer = page.locator(".assistant").last
        self.log = page.locator("#log")
        page.goto(url)

    def say(self, text: str) -> None:
        self.input.fill(text)
        self.input.press("Enter")

    def sees(self, text: str, selector: str = "#log") -> None:
        self.expect(self.page.locator(selector)).to_contain_text(text)

    def sees_no(self, selector: str) -> None:
        self.expect(self.page.locator(f":is({selector}):visible")).to_have_count(0)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name)

    def is_idle(self) -> None:
        self.expect(self.page.locator("#send")).to_have_attribute("aria-label", "Send")

    def is_busy(self) -> None:
        self.expect(self.page.locator("#send")).to_have_attribute("aria-label", "Stop")

    def texts(self, selector: str = ".assistant") -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]


@pytest.fixture(scope="class")
def chromium() -> Iterator[Any]:
    playwright = optional("playwright.sync_api")
    playwright.expect.set_options(timeout=DEADLINE * 1000)
    with playwright.sync_playwright() as tools:
        try:
            browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except playwright.Error:
            if TEST_ALL:
                raise
            pytest.skip("needs a Chromium, which is not installed")
        yield browser
        browser.close()


@pytest.fixture
def context(chromium: Any) -> Iterator[Any]:
    """What a window of the browser shares with no other; in none of its pages may anything go wrong."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(DEADLINE * 1000)
    wrong: list[str] = []
    context.on("weberror", lambda error: wrong.append(str(error.error)))  # unhandled rejections as well
    context.on("console", lambda line: wrong.append(line.text) if "Content Security Policy" in line.text else None)
    yield context
    context.close()
    assert not wrong


@pytest.fixture
def visit(context: Any) -> Callable[..., Tab]:
    """Open a server's page in a new tab."""
    return lambda client, path="": Tab(context.new_page(), f"{str(client.base_url).rstrip('/')}/{path}")


def counted(number: int) -> list[str]:
    """The deltas of an answer of so many words."""
    return [f"w{n} " for n in range(number)]


class TestPage:
    def test_an_answer_is_shown_while_it_is_written(self, visit: Callable[..., Tab]) -> None:
        first, last = Wait(), Wait()
        with serving(scripted([first, *counted(9), last, "the end"], ["again"])) as client:
            tab = visit(client)
            tab.say("  hello\nyou ")
            tab.is_busy()
            tab.sees("Thinking", "#thinking")
            first.gate.set()
            tab.sees("w8")
            tab.sees_no("#thinking")
            assert "the end" not in tab.log.inner_text() and tab.page.locator("#announce").inner_text() == ""
            last.gate.set()
            tab.is_idle()
            assert tab.texts() == ["w0 w1 w2 w3 w4 w5 w6 w7 w8 the end"]
            tab.sees("the end", "#announce")
            tab.sees("hello you", "#title")
            tab.sees("hello you", "#list .current")
            assert tab.page.url.endswith("#/1")
            tab.sees_no("#note, #tries, #tasks")
            tab.say("more")
            tab.is_idle()
            assert len(tab.texts()) == 2 and len(client.get("/api/conversations").json()) == 1

    def test_the_demo_with_its_tools_and_tasks(self, visit: Callable[..., Tab]) -> None:
        with serving() as client:
            tab = visit(client)
            tab.sees("OPENAI_API_KEY", "#note")
            tab.sees("demo", "#model")
            tab.button("add buy milk to my list").click()
            tab.sees("done", ".tool")
            tab.sees_no("#welcome, .tool pre")
            tab.page.locator(".tool summary").click()
            tab.sees('"title": "buy milk"', ".tool pre >> nth=0")
            tab.sees('"done": false', ".tool pre >> nth=1")
            tab.is_idle()
            task = tab.page.get_by_role("complementary", name="To-do list").get_by_label("buy milk")
            tab.expect(task).not_to_be_checked()
            tab.say("complete buy milk")
            tab.expect(task).to_be_checked()
            tab.is_idle()
            task.click()
            until(lambda: client.get("/api/tasks").json()[0]["done"] is False)
            tab.say("show my tasks")
            tab.is_idle()
            tab.page.reload()
            tab.expect(task).not_to_be_checked()
            tab.expect(tab.page.locator(".tool.done")).to_have_count(4)
            tab.sees_no(".widget")

    def test_thoughts_widgets_and_notices(self, visit: Callable[..., Tab]) -> None:
        @function_tool
        async def report(wrapper: RunContextWrapper[ck.TurnContext]) -> str:
            """Show what there is to show."""
            await wrapper.context.widget({"type": "Card", "children": []}, copy_text="A card")
            await wrapper.context.notice("warning", "Mind the **gap**.", "Careful")
            await wrapper.context.effect("confetti")
            return "ok"

        wait = Wait()
        with serving(scripted([Think("weigh this"), wait, Call("report")], ["So."], tools=[report])) as client:
            tab = visit(client)
            tab.say("x")
            tab.sees("weigh this", "#thinking")
            wait.gate.set()
            tab.is_idle()
            tab.sees("A card", ".widget")
            tab.sees("CarefulMind the gap.", ".notice.warning")
            assert tab.texts() == ["So."] and "weigh" not in tab.page.locator("main").inner_text()
            tab.page.reload()
            tab.sees("A card", ".widget")

    def test_markdown(self, context: Any, visit: Callable[..., Tab]) -> None:
        with serving(scripted(re.findall(r"[^\n]{1,7}|\n", MARKDOWN), delay=0.001)) as client:
            tab = visit(client)
            tab.say("x")
            for _ in ("as it came", "as it was loaded"):
                tab.sees("The end.")
                tab.is_idle()
                for selector, texts in {
                    "h3": ["A heading"],
                    "strong": ["bold", "one"],
                    "em": ["italics"],
                    "p code": ["a * b"],
                    "a": ["link", "https://example.org/bare"],
                    "ol > li > ul > li": ["inner one", "inner two"],
                    "pre": ['def f(x):\n\n    return "<b>" + x', "```"],
                }.items():
                    assert tab.texts(f".assistant {selector}") == texts
                assert tab.page.locator("ol > li").count() == 2
                assert (
                    tab.page.get_by_role("link", name="link").get_attribute("href") == "https://example.org/a_(b)?c=1"
                )
                tab.sees("snake_case_name, 2 * 3 * 4, *plain*.")
                tab.page.reload()
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            tab.button("Copy").first.click()
            tab.expect(tab.button("Copied")).to_be_visible()
            assert tab.page.evaluate("navigator.clipboard.readText()") == 'def f(x):\n\n    return "<b>" + x'

    def test_nothing_that_is_written_can_run(self, visit: Callable[..., Tab]) -> None:
        with serving(scripted([EVIL], [mark * 3000 for mark in ("*", "`", "[", "- ", "> ", "**a ", "_a")])) as client:
            tab = visit(client)
            tab.say(EVIL)
            for _ in ("as it came", "as it was loaded"):
                tab.sees("hacked = 10", ".assistant pre")
                tab.is_idle()
                assert tab.page.evaluate("window.hacked") is None
                assert tab.page.locator("#log :is(script, img, svg, iframe)").count() == 0
                hrefs = [link.get_attribute("href") for link in tab.page.locator("#log a").all()]
                assert hrefs == ['https://x.example/"onmouseover="hacked=9']
                tab.sees('<img src=x onerror="window.hacked = 2">', ".user")
                tab.page.reload()
            tab.say("much of everything")
            tab.is_idle()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=\"", ck.PAGE)

    def test_stop(self, visit: Callable[..., Tab]) -> None:
        wait = Wait()
        with serving(scripted(["so far ", wait, "too far"])) as client:
            tab = visit(client)
            tab.say("x")
            tab.sees("so far")
            tab.button("Stop").click()
            tab.is_idle()
            assert wait.left.wait(DEADLINE)
            for _ in ("as it came", "as it was loaded"):
                tab.sees("Stopped")
                assert tab.texts() == ["so far"]
                tab.page.reload()

    def test_reloading_in_mid_answer(self, visit: Callable[..., Tab]) -> None:
        with serving(scripted(["let me see", Call("echo", {"text": "x"})], counted(60), delay=0.03)) as client:
            tab = visit(client)
            tab.say("x")
            for word in ("see", "w7", "w23", "w41"):
                tab.sees(f"{word} " if word != "see" else word)
                tab.page.reload()
                tab.is_busy()
            tab.is_idle()
            assert tab.texts() == ["let me see", "".join(counted(60)).strip()]
            assert tab.texts(".tool summary") == ["echo\ndone"] and tab.texts(".user") == ["x"]

    def test_the_network_is_away_for_a_while(self, context: Any) -> None:
        settings = ck.Settings(database=":memory:", model="demo")
        server = ck.serve_in_background(ck.create_app(scripted(counted(70), delay=0.03), settings=settings))
        with server as url:
            tab = Tab(context.new_page(), url)
            tab.say("x")
            tab.sees("w7 ")
            context.set_offline(True)  # for new connections; those there are:
            for connection in list(server._server.server_state.connections):
                connection.loop.call_soon_threadsafe(connection.transport.abort)
            tab.sees("The server does not answer", "#banner")
            context.set_offline(False)
            tab.is_busy()
            tab.is_idle()
            assert tab.texts() == ["".join(counted(70)).strip()] and tab.texts(".user") == ["x"]
            tab.sees_no("#banner")

    def test_the_server_dies_and_comes_back(self, tmp_path: Path, visit: Callable[..., Tab]) -> None:
        port = ("--port", str(free_port()))
        with Process(*port, cwd=tmp_path) as process:
            tab = visit(process.client())
            tab.say("hello")
            tab.sees("rules")
            until(lambda: "rules" in process.client().messages(1)[-1]["content"])
        tab.sees("The server does not answer", "#banner")
        with Process(*port, cwd=tmp_path):
            tab.sees("Interrupted")
            tab.sees_no("#banner")
        tab.say("are you there?")
        tab.sees("Not sent: the server does not answer", "#problem")
        tab.expect(tab.input).to_have_value("are you there?")
        assert tab.texts(".user") == ["hello"]
        with Process(*port, cwd=tmp_path):
            tab.expect(tab.button("Retry")).to_be_visible()
            tab.sees_no("#banner")
            tab.input.press("Enter")
            tab.sees("start the server again.")
            tab.is_idle()
            assert tab.texts(".user") == ["hello", "are you there?"]

    def test_two_tabs(self, visit: Callable[..., Tab]) -> None:
        wait = Wait()
        with serving(scripted(["one ", wait, "two"], ["three"])) as client:
            first = visit(client)
            first.say("x")
            first.sees("one")
            second = visit(client, "#/1")
            second.sees("one")
            second.is_busy()
            second.say("y")  # Enter does nothing while it is being answered
            wait.gate.set()
            second.is_idle()
            second.input.press("Enter")
            second.sees("three")
            second.is_idle()
            first.page.evaluate("dispatchEvent(new Event('focus'))")
            first.sees("three")
            assert first.texts() == second.texts() == ["one two", "three"]

    def test_conversations_are_searched_renamed_and_deleted(self, visit: Callable[..., Tab]) -> None:
        with serving(scripted(["ok"])) as client:
            for text in ("apples are red", "pears are green", "plums are blue"):
                client.send_message(text)
            tab = visit(client)
            rows = tab.page.locator("#list .row")
            tab.expect(rows).to_have_text(["plums are blue", "pears are green", "apples are red"])
            search = tab.page.get_by_label("Search conversations")
            search.fill("green")
            tab.expect(rows).to_have_count(1)
            search.fill("nothing like it")
            tab.sees("Nothing found.", "#nothing")
            search.fill("")
            tab.expect(rows).to_have_count(3)
            tab.page.get_by_role("link", name="pears are green").click()
            tab.button("Rename pears are green").click()
            tab.page.keyboard.type("Pears!")
            tab.page.keyboard.press("Enter")
            tab.sees("Pears!", "#title")
            tab.sees("Pears!", "#list .current")
            tab.button("Delete Pears!").click()
            tab.button("Cancel").click()
            tab.button("Delete Pears!").click()
            assert len(client.get("/api/conversations").json()) == 3
            tab.sees("Pears!", "dialog")
            tab.button("OK").click()
            tab.expect(rows).to_have_count(2)
            tab.sees("How can I help?", "#welcome")

    def test_addresses_go_back_and_forward(self, visit: Callable[..., Tab]) -> None:
        wait = Wait()
        with serving(scripted(["one"], ["two ", wait, "three"])) as client:
            client.send_message("first")
            tab = visit(client)
            tab.say("second")
            tab.sees("two")
            tab.page.get_by_role("link", name="first").click()
            tab.sees("one")
            tab.is_idle()
            tab.page.go_back()
            tab.sees("two")
            tab.is_busy()
            tab.page.go_forward()
            tab.sees("one")
            wait.gate.set()
            tab.page.get_by_role("link", name="second").click()
            tab.sees("two three")
            tab.is_idle()
            tab.page.get_by_role("link", name="New conversation").click()
            tab.sees("How can I help?", "#welcome")
            assert not tab.texts()
            tab.page.evaluate("location.hash = '#/99'")
            tab.sees("Conversation not found", "#problem")

    def test_a_token_is_asked_for_and_stays_in_the_tab(self, visit: Callable[..., Tab]) -> None:
        with serving(scripted(["hello"]), jwt_secret=SECRET) as client:
            tab = visit(client)
            tab.sees("asks for a token", "dialog")
            tab.page.keyboard.type("wrong \u2603")
            tab.page.keyboard.press("Enter")
            tab.sees("The token is not valid", "dialog")
            token = bearer("ann")["Authorization"].removeprefix("Bearer ")
            tab.page.keyboard.type(token)
            tab.page.keyboard.press("Enter")
            tab.sees_no("dialog")
            tab.say("x")
            tab.is_idle()
            tab.page.reload()
            tab.sees("hello")
            kept = tab.page.evaluate("[...Object.values(sessionStorage), localStorage.length, document.cookie]")
            assert kept == [token, 0, ""]

    def test_questions(self, visit: Callable[..., Tab]) -> None:
        @function_tool
        async def survey(wrapper: RunContextWrapper[ck.TurnContext]) -> Any:
            """Ask the person."""
            choice = {"type": "multiple_choice", "options": [{"value": "Small"}, {"value": "Large"}]}
            return wrapper.context.ask(
                [
                    {**choice, "id": "size", "question": "Which size?"},
                    {**choice, "id": "more", "question": "Which as well?", "multiple": True},
                    {"type": "freeform", "id": "note", "question": "Anything else?"},
                ]
            )

        agent = scripted([Call("survey")], ["Thanks."], tools=[survey])
        with serving(agent) as client:
            tab = visit(client)
            tab.say("x")
            tab.is_idle()
            tab.button("Send answers").click()  # which says what is missing
            tab.page.reload()
            tab.page.get_by_label("Large").first.check()
            tab.page.get_by_label("Anything else?").last.fill("No <b>sugar</b>")
            tab.button("Send answers").click()
            tab.sees("Thanks.")
            tab.is_idle()
            tab.sees_no("form")
            told = json.loads(client.messages(1)[1]["content"])
            assert [answer.get("values") for answer in told] == [["Large"], None, ["No <b>sugar</b>"]]

    def test_errors_can_be_retried(self, visit: Callable[..., Tab]) -> None:
        with serving(scripted(["so "], [RuntimeError("no")], [RuntimeError("no")], ["well"])) as client:
            tab = visit(client)
            tab.say("x")
            tab.is_idle()
            tab.say("y")
            tab.expect(tab.page.get_by_role("alert").get_by_role("button", name="Retry")).to_be_visible()
            tab.is_idle()
            tab.page.reload()
            tab.button("Retry").click()
            tab.expect(tab.page.get_by_role("alert").get_by_role("button", name="Retry")).to_be_visible()
            tab.button("Retry").click()
            tab.sees("well")
            tab.is_idle()
            assert tab.texts() == ["so", "well"] and tab.texts(".user") == ["x", "y"]
            tab.sees_no(".notice, .retry")

    def test_a_refused_message_is_given_back(self, visit: Callable[..., Tab]) -> None:
        with serving(scripted(["ok"])) as client:
            client.send_message("x")
            tab = visit(client, "#/1")
            tab.sees("ok")
            client.patch("/api/conversations/1", json={"status": "locked"})
            tab.say("more")
            tab.sees("Not sent: The conversation is locked", "#problem")
            tab.expect(tab.input).to_have_value("more")
            client.patch("/api/conversations/1", json={"status": "active"})
            tab.input.press("Enter")
            tab.expect(tab.page.locator(".assistant")).to_have_count(2)
            tab.is_idle()
            assert tab.texts(".user") == ["x", "more"]
            tab.sees_no("#problem")

    def test_the_keyboard_is_enough(self, visit: Callable[..., Tab]) -> None:
        wait = Wait()
        with serving(scripted([wait, "ok"])) as client:
            tab = visit(client)
            tab.expect(tab.input).to_be_focused()
            low = tab.input.bounding_box()["height"]
            tab.page.keyboard.type("one")
            tab.page.keyboard.press("Shift+Enter")
            tab.page.keyboard.type("two")
            assert tab.input.input_value() == "one\ntwo" and tab.input.bounding_box()["height"] > low
            tab.page.keyboard.press("Enter")
            tab.is_busy()
            assert tab.texts(".user") == ["one\ntwo"] and tab.input.bounding_box()["height"] == low
            tab.page.keyboard.press("Tab")
            tab.page.keyboard.press("Enter")
            assert wait.left.wait(DEADLINE)
            tab.is_idle()
            nameless = """[...document.querySelectorAll("button, a, input, textarea")].filter((node) => !(node.ariaLabel
                || node.textContent.trim() || node.ariaLabelledByElements?.length || node.labels?.length)).length"""
            assert tab.page.evaluate(nameless) == 0

    def test_the_view_follows_unless_scrolled_up(self, visit: Callable[..., Tab]) -> None:
        with serving(scripted([f"line {n}\n\n" for n in range(100)], delay=0.02)) as client:
            tab = visit(client)
            tab.page.set_viewport_size({"width": 1280, "height": 400})
            tab.say("x")
            tab.sees("line 40")
            assert tab.page.evaluate("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight") < 60
            tab.page.mouse.move(600, 150)
            tab.page.mouse.wheel(0, -300)
            until(lambda: tab.page.evaluate("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight") > 250)
            top = tab.page.evaluate("scroller.scrollTop")
            tab.sees("line 70")
            assert tab.page.evaluate("scroller.scrollTop") == top
            tab.page.mouse.wheel(0, 9999)
            tab.is_idle()
            tab.expect(tab.page.get_by_text("line 99", exact=True)).to_be_in_viewport()

    @pytest.mark.parametrize("width", [1280, 390])
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_fits_and_can_be_read(self, visit: Callable[..., Tab], width: int, scheme: str) -> None:
        with serving() as client:
            for text in ("an earlier conversation with a title that does not fit", "add milk", "x" * 300):
                client.send_message(text)
            client.post("/chatkit", json={"message": MARKDOWN, "thread_id": 2})
            tab = visit(client)
            tab.page.emulate_media(color_scheme=scheme)
            tab.page.set_viewport_size({"width": width, "height": 800})
            for number in ("", "2", "3", "99"):
                tab.page.evaluate(f"location.hash = '#/{number}'")
                tab.sees({"": "How can I", "2": "The end.", "3": "xxx", "99": "not found"}[number], "main")
                assert tab.page.evaluate(FITS)
                assert tab.page.evaluate(LOW_CONTRAST) == []
            if width == 390:
                tab.sees_no("#sidebar, #tasks")
                tab.button("To-do list").click()
                tab.expect(tab.page.get_by_role("checkbox", name="milk")).to_be_visible()
                tab.page.keyboard.press("Escape")
                tab.button("Conversations").click()
                tab.page.get_by_role("link", name="an earlier").click()
                tab.sees_no("#sidebar, #tasks")
                tab.sees("an earlier", ".user")

    def test_it_works_mounted_in_another_app(self, context: Any) -> None:
        app = ck.create_app(scripted(["hello"]), settings=ck.Settings(database=":memory:", model="demo"))
        outer = FastAPI()
        outer.mount("/some/where", app)
        outer.state.chat = app.state.chat
        with ck.serve_in_background(outer) as url:
            tab = Tab(context.new_page(), f"{url}/some/where")
            tab.say("x")
            tab.sees("hello")
            tab.is_idle()
            tab = Tab(context.new_page(), f"{url}/some/where/#/1")
            tab.sees("hello")
            tab.say("y")
            tab.expect(tab.page.locator(".assistant")).to_have_count(2)


# ============================================================================================================= Load


async def follow_one(port: int, mark: str, words: int, pause: float) -> tuple[str, str, float]:
    """One plain stream over a socket of its own: its thread id, its text, and the seconds that it took."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post({"message": f"say {words} words {pause} apart as {mark}"}).encode())
    raw = (await reader.read()).decode()
    writer.close()
    seconds = time.monotonic() - began
    assert raw.startswith("HTTP/1.1 200 "), raw[:300]
    events = [json.loads(data) for data in re.findall(r"^data: (\{.*\})\r?$", raw, re.MULTILINE)]
    assert events[-1]["status"] == "completed"
    assert not [event for event in events if event["type"] == "error"]
    return str(events[0]["thread_id"]), said(events), seconds


@pytest.mark.skipif(not TEST_ALL, reason="takes half a minute: CHATKIT_TEST_ALL=1 runs it")
def test_a_thousand_streams_at_once_lose_and_mix_up_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    streams, words, pause = 1000, 200, 0.02
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, limits[1]), limits[1]))
    try:
        with contextlib.ExitStack() as stack:
            bench = Benchmark(tmp_path, stack)
            port = bench.serve("ours", str(tmp_path / "chat.db"))
            before = bench.usage(port)

            async def all_at_once() -> tuple[list[tuple[str, str, float]], float]:
                tasks = [asyncio.create_task(follow_one(port, f"s{n}", words, pause)) for n in range(streams)]
                await asyncio.sleep(words * pause * 0.9)
                usage = await asyncio.to_thread(bench.usage, port)
                return await asyncio.gather(*tasks), usage["memory"]

            results, memory = asyncio.run(all_at_once())
            cpu = bench.usage(port)["cpu"] - before["cpu"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for number, (_, text, _) in enumerate(results):
        assert text == "".join(f" s{number}.{word}" for word in range(words))
    with contextlib.closing(sqlite3.connect(tmp_path / "chat.db")) as db:
        stored = db.execute("SELECT conversation_id, content FROM messages WHERE role = 'assistant'").fetchall()
        assert {str(thread): text for thread, text in stored} == {thread: text for thread, text, _ in results}
        assert len(stored) == len({thread for thread, _, _ in results}) == streams
    times = sorted(seconds for _, _, seconds in results)
    with capsys.disabled():
        print(
            f"\n{streams} streams of {words} words: {statistics.median(times):.1f} s each in the middle, "
            f"{times[-1]:.1f} s the last ({words * pause:.1f} s is the model's own), "
            f"{cpu / streams / words * 1e6:.0f} us CPU a token, "
            f"{(memory - before['memory']) / streams / 1e3:.0f} kB a stream"
        )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_readers_that_stop_reading_hold_up_nobody_and_take_no_memory() -> None:
    """Fifty readers of an answer of 8 MB read nothing: neither its turn nor others notice, and it is kept once."""
    start, rest = Wait(), Wait()
    answer = ["x" * 400] * 20_000
    agent = scripted([start, *answer[:1], rest, *answer[1:]], ["Quick."])
    with serving(agent, database=":memory:") as client, contextlib.ExitStack() as stack:
        with client.stream("POST", "/chatkit", json={"message": "Talk"}) as response:  # one leaves when it began
            until(start.reached.is_set)
            thread = int(response.headers["x-thread-id"])
            for _ in range(50):
                reader = stack.enter_context(socket.create_connection((client.base_url.host, client.base_url.port)))
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                reader.sendall(f"GET /api/conversations/{thread}/stream HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert reader.recv(15) == b"HTTP/1.1 200 OK"
            start.gate.set()
            until(rest.reached.is_set)
        before = memory_used()
        rest.gate.set()
        until(lambda: client.messages(thread)[-1]["status"] == "done", 30)
        assert len(client.messages(thread)[-1]["content"]) == 8_000_000
        assert said(client.send_message("Hello")) == "Quick."
        # The answer, and this process's own look at it, come to some 150 MB; fifty copies would be 400 more.
        assert memory_used() - before < 300e6


def statements() -> list[Any]:
    """Each SQL statement that stands in the Store, under its method's name."""
    methods = [node for node in ast.walk(ast.parse(inspect.getsource(ck.Store))) if hasattr(node, "decorator_list")]
    return [
        pytest.param(node.value, id=method.name)
        for method in methods
        if isinstance(method, ast.AsyncFunctionDef)
        for node in ast.walk(method)
        if isinstance(node, ast.Constant)
        and re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b", str(node.value))
        and method.name not in ("_prepare", "check")  # once at the start; one row
    ]


@pytest.mark.parametrize("sql", statements())
def test_no_statement_goes_through_a_table(sql: str) -> None:
    """By SQLite's own plans. What may be gone through, or sorted: ids that the statement was given, and search hits."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript((HERE / "schema.sql").read_text(encoding="utf-8"))
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", [None] * sql.count("?"))]
    assert not [step for step in plan if re.match(r"SCAN (?!.*VIRTUAL TABLE|wanted|found|hit|\(subquery)", step)]
    if "_search" not in sql and "DISTINCT" not in sql:
        assert not [step for step in plan if "TEMP B-TREE" in step]


@pytest.mark.skipif(not TEST_ALL, reason="depends on what else the machine does: CHATKIT_TEST_ALL=1 runs it")
def test_the_server_is_ready_as_soon_as_its_imports_are(tmp_path: Path) -> None:
    ready, imports = [], []
    for _ in range(5):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import agents, fastapi, uvicorn"], check=True, env=CLEAN_ENV)
        imports.append(time.monotonic() - began)
        began = time.monotonic()
        with Process("--model", "demo", cwd=tmp_path):
            ready.append(time.monotonic() - began)
    assert statistics.median(ready) < 1.15 * statistics.median(imports), (ready, imports)


# ======================================================================================================== Benchmark
# What `python test_chatkit_server.py` prints
#
# Each server is a process of its own, under uvicorn with uvloop and httptools, on a database in a temporary directory.
# One more process is the client. All take turns, so that a busy machine troubles each of them alike.

MARKS = {  # what each text event holds once, and nothing else does
    "plain": b'data: {"type": "text"',
    "chatkit": b'"assistant_message.content_part.text_delta"',
}
ROUNDS = 5


class Typist(Model):
    """Says what the last message asks for: "say 200 words 0.02 apart" is 200 deltas, that many seconds after each.

    With "as red" the words are red.0, red.1 and so on.

    At 0 it lets others run after each delta, as one who reads from a network does. It streams the events that OpenAI's
    models do, under an id of its own for each message, which the official SDK needs.
    """

    async def get_response(self, *args: Any, **kwargs: Any) -> ModelResponse:
        raise AssertionError

    async def stream_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> AsyncIterator[Any]:
        asked = re.search(
            r"say (\d+) words ([\d.]+) apart(?: as (\w+))?", str(input[-1:] if isinstance(input, list) else input)
        )
        assert asked is not None
        count, pause, item_id = int(asked[1]), float(asked[2]), f"msg_{secrets.token_hex(8)}"
        words = [f" {asked[3]}.{number}" if asked[3] else " word" for number in range(count)]
        place: dict[str, Any] = {"item_id": item_id, "output_index": 0, "content_index": 0, "sequence_number": 0}
        message = ResponseOutputMessage(id=item_id, type="message", role="assistant", status="in_progress", content=[])
        part = ResponseOutputText(type="output_text", text="", annotations=[])
        yield ResponseOutputItemAddedEvent(
            type="response.output_item.added", item=message, output_index=0, sequence_number=0
        )
        yield ResponseContentPartAddedEvent(type="response.content_part.added", part=part, **place)
        for word in words:
            yield ResponseTextDeltaEvent(type="response.output_text.delta", delta=word, logprobs=[], **place)
            await asyncio.sleep(pause)
        part = ResponseOutputText(type="output_text", text="".join(words), annotations=[])
        message = message.model_copy(update={"content": [part], "status": "completed"})
        yield ResponseTextDoneEvent(type="response.output_text.done", text=part.text, logprobs=[], **place)
        yield ResponseContentPartDoneEvent(type="response.content_part.done", part=part, **place)
        yield ResponseOutputItemDoneEvent(
            type="response.output_item.done", item=message, output_index=0, sequence_number=0
        )
        usage = ResponseUsage(
            input_tokens=1,
            output_tokens=count,
            total_tokens=count + 1,
            input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
            output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        )
        response = Response(
            id="resp", created_at=0, model="typist", object="response", output=[message], tools=[],
            tool_choice="auto", parallel_tool_calls=True, usage=usage,
        )  # fmt: skip
        yield ResponseCompletedEvent(type="response.completed", sequence_number=0, response=response)


def official_app(database: str) -> Any:
    """The official SDK as its documentation sets it up: FastAPI, StreamingResponse, and a plain SQLite store."""
    from chatkit.agents import AgentContext, simple_to_agent_input, stream_agent_response
    from chatkit.server import ChatKitServer, StreamingResult
    from chatkit.store import NotFoundError, Store
    from chatkit.types import Page, ThreadItem, ThreadMetadata
    from fastapi.responses import StreamingResponse
    from pydantic import TypeAdapter

    item_type: TypeAdapter[Any] = TypeAdapter(ThreadItem)

    class SqliteStore(Store):  # type: ignore[misc]  # no types where it is not installed
        def __init__(self) -> None:
            self.db = sqlite3.connect(database, isolation_level=None)
            self.db.executescript(
                """PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
                   CREATE TABLE threads (id TEXT PRIMARY KEY, data TEXT);
                   CREATE TABLE items (id TEXT PRIMARY KEY, thread_id TEXT, data TEXT);
                   CREATE INDEX items_in_order ON items (thread_id)"""
            )

        async def load_thread(self, thread_id: str, context: Any) -> Any:
            row = self.db.execute("SELECT data FROM threads WHERE id = ?", (thread_id,)).fetchone()
            if row is None:
                raise NotFoundError
            return ThreadMetadata.model_validate_json(row[0])

        async def save_thread(self, thread: Any, context: Any) -> None:
            self.db.execute("INSERT OR REPLACE INTO threads VALUES (?, ?)", (thread.id, thread.model_dump_json()))

        async def load_thread_items(self, thread_id: str, after: Any, limit: int, order: str, context: Any) -> Any:
            direction = "DESC" if order == "desc" else "ASC"
            rows = self.db.execute(
                f"SELECT data FROM items WHERE thread_id = ? ORDER BY rowid {direction} LIMIT ?", (thread_id, limit)
            )
            return Page(data=[item_type.validate_json(row[0]) for row in rows])

        async def save_item(self, thread_id: str, item: Any, context: Any) -> None:
            self.db.execute(
                "INSERT OR REPLACE INTO items VALUES (?, ?, ?)", (item.id, thread_id, item.model_dump_json())
            )

        add_thread_item = save_item

        async def unused(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

        save_attachment = load_attachment = delete_attachment = unused
        load_threads = load_item = delete_thread = delete_thread_item = unused

    class OfficialServer(ChatKitServer):  # type: ignore[misc]
        agent = Agent[Any](name="Typist", model=Typist())

        async def respond(self, thread: Any, item: Any, context: Any) -> AsyncIterator[Any]:
            page = await self.store.load_thread_items(thread.id, None, 40, "desc", context)
            agent_context = AgentContext(thread=thread, store=self.store, request_context=context)
            run = Runner.run_streamed(self.agent, await simple_to_agent_input(page.data[::-1]), context=agent_context)
            async for event in stream_agent_response(agent_context, run):
                yield event

    server, app = OfficialServer(SqliteStore()), FastAPI()

    @app.post("/chatkit")
    async def post_chatkit(request: Request) -> Any:
        result = await server.process(await request.body(), {})
        assert isinstance(result, StreamingResult)
        return StreamingResponse(result, media_type="text/event-stream")

    return app


def memory_used() -> int:
    """Bytes of RAM that this process has; where there is no /proc, the most that it ever had."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve_for_benchmark(kind: str, database: str) -> None:
    """A server process: prints its port; GET /usage says what it has used so far."""
    set_tracing_disabled(True)
    settings = ck.Settings(database=database, max_concurrent_turns=2000)
    typist = Agent[Any](name="Typist", model=Typist())
    app = official_app(database) if kind == "official" else ck.create_app(typist, settings=settings)

    @app.get("/usage")
    async def get_usage() -> Any:
        return {"cpu": time.process_time(), "memory": memory_used()}

    listener = ck.listen("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    if kind == "official":
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])
    else:
        server = ck.make_server(app)
        ck.spare_collector()
        ck.run(ck.serve(server, app.state.chat, listener), server)


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop as uvicorn would make it."""
    return (uvicorn.Config("").get_loop_factory() or asyncio.new_event_loop)()


def post(body: dict[str, Any]) -> str:
    text = json.dumps(body)
    return (
        "POST /chatkit HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n{text}"
    )


class Reader(asyncio.Protocol):
    """One request of the client: counts the marks in the answer, and notes when the first came."""

    def __init__(self, request: bytes, mark: bytes) -> None:
        self.request = request
        self.mark = mark
        self.count = 0
        self.head = self.tail = b""
        self.first = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.began = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.head = self.head or data[:15]
        data = self.tail + data
        found = data.count(self.mark)
        self.tail = data[1 - len(self.mark) :]  # a mark may come in two pieces
        if found:
            self.first = self.first or time.perf_counter() - self.began
            self.count += found

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)


async def load(port: int, request: str, mark: str, streams: int) -> dict[str, Any]:
    """The same request `streams` times at once; what came of it."""
    loop, readers = asyncio.get_running_loop(), []
    began = time.perf_counter()
    for _ in range(streams):
        _, reader = await loop.create_connection(lambda: Reader(request.encode(), mark.encode()), "127.0.0.1", port)
        readers.append(reader)
    await asyncio.wait([reader.ended for reader in readers])
    assert all(b" 200 " in reader.head for reader in readers), readers[0].head
    seconds = time.perf_counter() - began
    return {"count": sum(r.count for r in readers), "seconds": seconds, "first": [r.first for r in readers]}


def client_for_benchmark() -> None:
    """The client process: a line of JSON in, a line of JSON out."""
    loop = new_loop()
    for line in sys.stdin:
        print(json.dumps(loop.run_until_complete(load(**json.loads(line)))), flush=True)


class Contestant:
    """A server process, or without a `kind` the bare loop in this process, and what was measured of it."""

    def __init__(self, name: str, dialect: str = "", port: int = 0) -> None:
        self.name = name
        self.dialect = dialect
        self.port = port
        self.figures: dict[str, list[float]] = {}

    def note(self, what: str, value: float) -> None:
        self.figures.setdefault(what, []).append(value)


class Benchmark:
    """The processes, and the measurements with them."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.directory = directory
        self.stack = stack
        self.client = self.start("client")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=CLEAN_ENV, cwd=self.directory,
        )  # fmt: skip
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process

    def serve(self, kind: str, database: str) -> int:
        """The port of a new server."""
        process = self.start("serve", kind, database)
        assert process.stdout is not None
        return int(process.stdout.readline())

    def ask(self, port: int, request: str, mark: bytes = b"", streams: int = 1) -> dict[str, Any]:
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        task = {"port": port, "request": request, "mark": mark.decode(), "streams": streams}
        print(json.dumps(task), file=self.client.stdin, flush=True)
        return json.loads(self.client.stdout.readline())  # type: ignore[no-any-return]

    def say(self, one: Contestant, words: int, pause: float, streams: int = 1) -> dict[str, Any]:
        """The client's report of so many streams, with the CPU seconds that they took and the memory of each."""
        text = f"say {words} words {pause} apart"
        if not one.port:
            return self.bare(text, words, streams)
        body: dict[str, Any] = {"message": text}
        if one.dialect == "chatkit":
            body = {"type": "threads.create", "params": {"input": user_input(text)}}
        before, memory = self.usage(one.port), [0.0]
        sampler = threading.Timer(words * pause * 0.9, lambda: memory.append(self.usage(one.port)["memory"]))
        if pause:
            sampler.start()
        report = self.ask(one.port, post(body), MARKS[one.dialect], streams)
        sampler.cancel()
        assert report["count"] == words * streams, f"{one.name}: {report['count']} of {words * streams} words"
        report["cpu"] = self.usage(one.port)["cpu"] - before["cpu"]
        report["memory"] = memory[-1] - before["memory"]
        return report

    @staticmethod
    def usage(port: int) -> dict[str, float]:
        return httpx.get(f"http://127.0.0.1:{port}/usage").json()  # type: ignore[no-any-return]

    @staticmethod
    def bare(text: str, words: int, streams: int) -> dict[str, Any]:
        """The same as say(), of nothing but the Agents SDK."""

        async def one() -> float:
            began, first, count = time.perf_counter(), 0.0, 0
            run = Runner.run_streamed(Agent[Any](name="Typist", model=Typist()), text)
            async for event in run.stream_events():
                if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                    first, count = first or time.perf_counter() - began, count + 1
            assert count == words
            return first

        async def all_at_once() -> list[float]:
            return list(await asyncio.gather(*(one() for _ in range(streams))))

        began, cpu = time.perf_counter(), time.process_time()
        first = new_loop().run_until_complete(all_at_once())
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "cpu": time.process_time() - cpu, "first": first, "memory": 0.0}


def measure_speed(bench: Benchmark, contestants: list[Contestant]) -> None:
    """Fill in the contestants' figures; each takes its turn in every round."""
    for one in contestants:
        if one.port:
            one.note("start", bench.usage(one.port)["memory"] / 1e6)
            bench.say(one, 3, 0.0, 10)
            one.note("memory", bench.say(one, 50, 0.02, 200)["memory"] / 200 / 1e3)
    for number in range(ROUNDS + 1):
        for one in contestants:
            single = bench.say(one, 4000, 0.0)
            hundred = bench.say(one, 200, 0.0, 100)
            first = [bench.say(one, 2, 0.02)["first"][0] for _ in range(10)]
            if number == 0:
                continue  # the first round warms up
            one.note("single", 4000 / single["seconds"])
            one.note("hundred", 20_000 / hundred["seconds"])
            one.note("first", statistics.median(first) * 1e3)
            if number % 2:
                one.note("cpu", bench.say(one, 200, 0.02, 200)["cpu"] / 40_000 * 1e6)


def make_database(path: Path, conversations: int, messages: int, strangers: int = 0) -> str:
    """A file with that many conversations of the one user; all `messages` are in the first, one in each other.

    Strangers have a hundred conversations each, with ten messages in each. Every message has `apples`, few `pears`.
    """
    count = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
    add = f"""{count} INSERT INTO messages (conversation_id, role, content)
              SELECT {{}}, CASE i % 2 WHEN 1 THEN 'user' ELSE 'assistant' END,
                     'Message ' || i || ' is about apples' || CASE WHEN i <= 5 THEN ' and pears' ELSE '' END FROM n"""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -200000")
        db.executescript((HERE / "schema.sql").read_text(encoding="utf-8"))
        db.execute(f"PRAGMA user_version = {ck.SCHEMA_VERSION}")
        begin = f"{count} INSERT INTO conversations (user_id, title) SELECT {{}}, 'Conversation ' || i FROM n"
        db.execute(begin.format("'local'"), (conversations,))
        db.execute(add.format("1"), (messages,))
        db.execute(add.format("1 + i"), (conversations - 1,))
        if strangers:
            db.execute(begin.format("'stranger' || i / 100"), (strangers * 100,))
            db.execute(add.format(f"{conversations} + 1 + i % {strangers * 100}"), (strangers * 1000,))
        # A file that grew message by message has an index in few pieces; one that was filled at once, in many.
        db.execute("INSERT INTO message_search (message_search) VALUES ('optimize')")
        db.commit()
    return str(path)


def get(path: str) -> str:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


SCALE_REQUESTS = {
    "first event": post({"message": "say 1 words 0 apart", "thread_id": 1}),
    "list of conversations": get("/api/conversations"),
    "page of items": post({"type": "items.list", "params": {"thread_id": "1", "limit": 20, "order": "desc"}}),
    "page of threads": post({"type": "threads.list", "params": {"limit": 20, "order": "desc"}}),
    "search": get("/api/conversations?q=pears"),
    "search, in every message": get("/api/conversations?q=apples"),
}


def measure_scale(bench: Benchmark) -> None:
    """Print what the size of a file costs: milliseconds in a small one, and how many times that in large ones."""
    sizes = {
        "small": (100, 100, 0),
        "100,000 in one": (100, 100_000, 0),
        "100,000 of one user": (100_000, 100, 0),
        "a million in the file": (100, 100, 1000),
    }
    ports = {}
    for number, (name, size) in enumerate(sizes.items()):
        ports[name] = bench.serve("ours", make_database(bench.directory / f"{number}.db", *size))
    print(f"\n{'Milliseconds, and times that':28}" + "".join(f"{name:>24}" for name in sizes))
    for what, request in SCALE_REQUESTS.items():
        times: dict[str, list[float]] = {name: [] for name in sizes}
        for _ in range(60):
            for name, port in ports.items():
                report = bench.ask(port, request, MARKS["plain"])
                times[name].append((report["first"][0] or report["seconds"]) * 1e3)
        small = statistics.median(times["small"][10:])
        row = [f"{small:.2f} ms"] + [f"{statistics.median(times[name][10:]) / small:.2f} x" for name in [*sizes][1:]]
        print(f"{what:28}" + "".join(f"{cell:>24}" for cell in row))


def seconds_until_ready(directory: Path) -> tuple[float, float]:
    """Of the server, and of nothing but importing what it is built on."""
    began = time.perf_counter()
    with Process("--model", "demo", cwd=directory):
        ready = time.perf_counter() - began
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import agents, fastapi, uvicorn"], check=True, env=CLEAN_ENV)
    return ready, time.perf_counter() - began


TABLE = [  # figure, how it is called, and what it should be against the official SDK
    ("single", "tokens/s, one stream", "3.5 x"),
    ("hundred", "tokens/s, 100 streams", "3 x"),
    ("first", "ms to the first text", "0.35 x"),
    ("cpu", "us CPU a token, 200 at 50/s", "0.45 x"),
    ("start", "MB of memory at the start", ""),
    ("memory", "kB of memory an open stream", ""),
]


def print_table(contestants: list[Contestant]) -> None:
    """Medians, and the least and the most of all rounds; `x` is our ChatKit dialect against the official SDK."""
    print(f"\n{'':28}" + "".join(f"{one.name:>26}" for one in contestants) + f"{'x':>8}{'goal':>8}")
    for figure, label, goal in TABLE:
        row = f"{label:28}"
        medians = {}
        for one in contestants:
            values = one.figures.get(figure)
            if values:
                medians[one.name] = statistics.median(values)
                digits = 1 if medians[one.name] < 100 else 0
                spread = f"({min(values):,.{digits}f} to {max(values):,.{digits}f})"
                row += f"{f'{medians[one.name]:,.{digits}f} {spread}':>26}"
            else:
                row += f"{'':26}"
        if "official SDK" in medians:
            row += f"{medians['ours, ChatKit'] / medians['official SDK']:8.2f}{goal:>8}"
        print(row)


def main() -> None:
    """Measure, and print the table. It takes less than five minutes, and leaves nothing behind."""
    set_tracing_disabled(True)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        bench = Benchmark(directory, stack)
        contestants = [Contestant("Agents SDK alone")]
        if importlib.util.find_spec("chatkit"):
            contestants.append(
                Contestant("official SDK", "chatkit", bench.serve("official", str(directory / "sdk.db")))
            )
        for dialect, title in (("plain", "ours, plain"), ("chatkit", "ours, ChatKit")):
            contestants.append(Contestant(title, dialect, bench.serve("ours", str(directory / f"{dialect}.db"))))
        measure_speed(bench, contestants)
        print_table(contestants)
        measure_scale(bench)
        times = [seconds_until_ready(directory) for _ in range(ROUNDS)]
        ready, imports = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"\nReady after {ready:.2f} s: {ready / imports:.2f} x its imports alone (goal 1.15 x)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve_for_benchmark(*sys.argv[2:])
    elif sys.argv[1:2] == ["client"]:
        client_for_benchmark()
    else:
        main()
