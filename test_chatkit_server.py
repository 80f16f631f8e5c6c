"""The tests of chatkit_server.py; run with `pytest`. As a script it prints the benchmark table.

Each test drives the app from outside: over a real socket where it is about streaming, leaving or stopping, over ASGI
where it is not. What answers is the demo model or a `Script`; fakes stand at the model's edge only. Nothing sleeps to
hope: `until()` waits on a condition, with a deadline. Tests that need an optional tool skip where it is missing, and
fail instead where CHATKIT_TEST_ALL=1.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx
import pytest
from agents import Agent, Model, ModelResponse, RunContextWrapper, Usage, function_tool
from fastapi import FastAPI
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
    ResponseReasoningSummaryTextDeltaEvent,
    ResponseTextDeltaEvent,
    ResponseUsage,
)
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
        text, output = "", []
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

        def join(last_event_id: str | None = None) -> list[dict[str, Any]]:
            headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
            with client.stream("GET", "/api/conversations/1/stream", headers=headers) as response:
                assert response.status_code == 200
                return list(plain_events(response))

        whole = pool.submit(join)
        with client.stream("GET", "/api/conversations/1/stream") as response:
            seen = [next(events) for events in [plain_events(response)] for _ in range(3)]
        rest = pool.submit(join, seen[-1]["_id"])
        foreign = [pool.submit(join, wrong) for wrong in ("nonsense", "0-1", seen[0]["_id"].replace("-1", "-99"), "")]
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

    threads = threading.active_count()
    asyncio.run(visit())
    assert threading.active_count() <= threads
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

    threads = threading.active_count()
    first, second = serve("one"), serve("two")
    assert (ask(first), ask(second)) == ("one", "two")
    first.stop()
    again = serve("three", port=int(first.url.rpartition(":")[2]))
    assert ask(again) == "three"
    again.stop()
    second.stop()
    second.stop()
    assert threading.active_count() <= threads


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
