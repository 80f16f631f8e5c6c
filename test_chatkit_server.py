"""The tests of chatkit_server.py; run with `pytest`. As a script it prints the benchmark table.

Each test drives the app from outside: over a real socket where it is about streaming, leaving or stopping,
over ASGI where it is not. What answers is the demo model or a `Script`; fakes stand at the model's edge only.
Nothing sleeps to hope: `until()` waits on a condition, with a deadline. Tests that need an optional tool skip
where it is missing, and fail instead where CHATKIT_TEST_ALL=1.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import collections
import contextlib
import functools
import gc
import hmac
import importlib
import importlib.util
import inspect
import itertools
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
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import httpx
import jwt
import openai
import pytest
import uvicorn

from agents import (  # isort: skip
    Agent, AgentOutputSchema, GuardrailFunctionOutput, Model, ModelResponse, RunContextWrapper, Runner,
    ShellTool, ToolGuardrailFunctionOutput, ToolOutputImage, ToolOutputText, Usage, function_tool, handoff,
    input_guardrail, output_guardrail, set_tracing_disabled, tool_input_guardrail,
)  # fmt: skip
from agents.extensions.handoff_filters import remove_all_tools
from agents.mcp import MCPServerStdio
from agents.models.default_models import get_default_model
from agents.testing import ScriptedModel, assistant_message
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from fastapi import FastAPI
from openai.types.responses import ResponseStreamEvent, ResponseTextDeltaEvent
from starlette.requests import Request
from starlette.testclient import TestClient

import chatkit_server as ck

pytestmark = pytest.mark.anyio

HERE = Path(__file__).resolve().parent
TEST_ALL = os.environ.pop("CHATKIT_TEST_ALL", "") == "1"
slow = pytest.mark.skipif(not TEST_ALL, reason="takes long: set CHATKIT_TEST_ALL=1")
DEADLINE = 10.0  # seconds that anything may take
Json = dict[str, Any]  # an object
Wrapper = RunContextWrapper[ck.TurnContext]
parametrize = pytest.mark.parametrize

# What the environment of whoever runs the tests says must not count, and no .env file.
for name in [*os.environ]:
    if name.startswith(("CHATKIT_", "OPENAI_", "GEMINI_")) or name.endswith(("_API_KEY", "_AUTH_SECRET")):
        del os.environ[name]
os.environ["PYTHON_DOTENV_DISABLED"] = "1"
CLEAN_ENV = {**os.environ, "PYTHONPATH": str(HERE)}
ck.DemoModel.__init__.__defaults__ = (0.0,)  # nobody watches its words come one by one


@pytest.fixture(scope="session", autouse=True)
def say_how_long_it_takes(request: pytest.FixtureRequest) -> None:
    """Before the first dot, also with -q."""
    plugins, tests = request.config.pluginmanager, len(request.session.items)
    long = "ten minutes" if TEST_ALL else "60 to 90 seconds; CHATKIT_TEST_ALL=1 runs the long ones too"
    if tests > 100 and (reporter := plugins.getplugin("terminalreporter")):
        with plugins.getplugin("capturemanager").global_and_fixture_disabled():
            reporter.write_line(f"{tests} tests, which take two cores {long}.")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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
    """A step of a Script: call a tool, or hand over (`transfer_to_...`)."""

    def __init__(self, name: str, arguments: Any = None, call_id: str = "") -> None:
        self.name = name
        self.arguments = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
        self.call_id = call_id


class Think(str):
    """A step of a Script: a delta of a reasoning summary."""


class Refuse(str):
    """A step of a Script: a delta of a refusal."""


class End(str):
    """The last step, where it is not the usual one: why the answer ends, as the API calls it."""


class Wait:
    """A step of a Script: wait until `gate` is set; `reached`: the model got here; `left`: it was stopped.

    Threading events, because a test and the server that it drives have an event loop each.
    """

    def __init__(self) -> None:
        self.gate, self.reached, self.left = threading.Event(), threading.Event(), threading.Event()

    async def pass_through(self) -> None:
        self.reached.set()
        try:
            while not self.gate.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.left.set()
            raise


DELTAS = {str: "output_text", Think: "reasoning_summary_text", Refuse: "refusal"}  # what a step is a delta of
CITATIONS = ("url_citation", "file_citation", "container_file_citation", "file_path")
KEY = "the-key-that-nobody-may-see"
USAGE = {"input_tokens": 7, "output_tokens": 5}  # of every answer
USAGE_DETAILS: Json = {"total_tokens": 12, "output_tokens_details": {"reasoning_tokens": 0}}
USAGE_DETAILS["input_tokens_details"] = {"cached_tokens": 0, "cache_write_tokens": 0}


def pieces(text: str) -> list[str]:
    return [text[start : start + 7] for start in range(0, len(text), 7)]


def grown_item(kind: str, text: str, annotations: list[Any]) -> Json:
    """The output item that deltas come to."""
    part = {"type": kind, "text": text, "annotations": annotations, "logprobs": []}
    if kind == "reasoning_summary_text":
        return {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]}
    if kind == "refusal":
        part = {"type": kind, "refusal": text}
    return {"type": "message", "role": "assistant", "content": [part]}


def responses_api(steps: list[Any], body: Json, own_id: str = "") -> Iterator[Any]:
    """Steps as the events of OpenAI's Responses API; what is no step of its comes through as it is."""
    output, numbers = list[Any](), itertools.count()
    response = {"id": "resp_" + secrets.token_hex(4), "object": "response", "created_at": 1, "output": output}
    response |= {"model": body["model"], "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    kind, texts, cited = "", list[str](), list[Any]()  # of what is being said

    def event(name: str, **fields: Any) -> Json:
        place = {"output_index": len(output), "content_index": 0, "summary_index": 0, "logprobs": []}
        place |= {"item_id": own_id or f"{response['id']}_{len(output)}", "sequence_number": next(numbers)}
        return {"type": f"response.{name}", **place, **fields}

    def begin(item: Json, name: str = "added", status: str = "in_progress") -> Json:
        change = event(f"output_item.{name}")
        return {**change, "item": {"id": change["item_id"], **item, "status": status}}

    def end(item: Json) -> Json:
        done = begin(item, "done", "completed")
        output.append(done["item"])
        return done

    yield event("created", response={**response, "status": "in_progress"})
    for step in [*steps, End("completed")]:
        delta, parts = DELTAS.get(type(step), ""), list[Any]()
        if isinstance(step, Call):
            parts = [event("function_call_arguments.delta", delta=piece) for piece in pieces(step.arguments)]
            call = {"type": "function_call", **vars(step)}
            step = {**call, "call_id": step.call_id or f"call_{secrets.token_hex(4)}"}
        is_item = isinstance(step, dict) and step["type"] not in CITATIONS
        if kind and (is_item or isinstance(step, End) or delta not in ("", kind)):
            yield event(f"{kind}.done", text="".join(texts), refusal="".join(texts))
            yield end(grown_item(kind, "".join(texts), cited))
            kind, texts, cited = "", [], []
        if isinstance(step, End):
            break
        if is_item:
            yield begin(step)
            if picture := step.get("partial_image_b64"):
                seen = {"partial_image_b64": picture, "partial_image_index": 0, "item_id": step["id"]}
                yield event("image_generation_call.partial_image", **seen)
            yield from parts
            yield end(step)
        elif delta:
            if not kind:
                yield begin(grown_item(delta, "", []))
            kind = delta
            texts.append(str(step))
            yield event(f"{kind}.delta", delta=texts[-1])
        elif isinstance(step, dict):
            cited.append(step)
            yield event("output_text.annotation.added", annotation=step, annotation_index=len(cited) - 1)
        else:
            yield step
    error = {"code": "server_error", "message": f"{KEY} broke"} if step == "failed" else None
    yield event(step, response={**response, "status": step, "usage": USAGE | USAGE_DETAILS, "error": error})


EVENT_TYPES = get_args(get_args(ResponseStreamEvent)[0])
API_EVENTS = {get_args(event.model_fields["type"].annotation)[0]: event for event in EVENT_TYPES}


class Script(Model):
    """Says its responses one after the other, the last one for ever. `seen` is the input of each call.

    A response is a list of steps: text is a delta, an exception is raised; Call, Think, Refuse, Wait, End.
    A dict is what the Responses API has by its `type`: an annotation (`url_citation`) of the message that is
    being said, or else an output item (`web_search_call`). Like every model but OpenAI's it calls each item
    that has no id `__fake_id__`.
    """

    def __init__(self, *responses: list[Any], delay: float = 0.0) -> None:
        self.responses = list(responses)
        self.delay = delay  # seconds after each delta
        self.seen: list[list[Any]] = []
        self.settings: list[Any] = []

    async def get_response(self, *args: Any, **kwargs: Any) -> ModelResponse:
        events = [event async for event in self.stream_response(*args, **kwargs)]
        return ModelResponse(output=events[-1].response.output, usage=Usage(), response_id=None)

    async def stream_response(
        self, system_instructions: Any, input: Any, model_settings: Any, *_: Any, **__: Any
    ) -> AsyncIterator[Any]:
        self.seen.append(list(input) if isinstance(input, list) else [{"role": "user", "content": input}])
        self.settings.append(model_settings)
        steps = self.responses[min(len(self.seen), len(self.responses)) - 1]
        for event in responses_api(steps, {"model": "script"}, "__fake_id__"):
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Wait):
                await event.pass_through()
                continue
            kind = API_EVENTS.get(event["type"], openai.BaseModel)
            if "delta" not in event:
                yield kind.construct(**event)  # as leniently as OpenAI's client does
                continue
            yield kind(**event)  # much quicker
            if self.delay:
                await asyncio.sleep(self.delay)


@function_tool
async def echo(wrapper: Wrapper, text: str) -> str:
    """Give back what it is given."""
    return json.dumps({"echo": text})


def scripted(*responses: list[Any], tools: Any = None, delay: float = 0.0, **more: Any) -> Agent[Any]:
    """An agent whose model is a Script; `agent.model.seen` is what the model was shown."""
    model = Script(*responses, delay=delay)
    return Agent(**{"name": "Scripted", "model": model, "tools": [echo] if tools is None else tools, **more})


def shown_to(agent: Agent[Any], call: int = -1) -> list[Any]:
    """The input of one call of a scripted agent's model."""
    return cast(Script, agent.model).seen[call]


def doing(work: Callable[[ck.TurnContext], Any], *then: Any, answer: Any = ("Done.",)) -> Agent[Any]:
    """An agent that calls a tool which does this, and then answers."""

    @function_tool
    async def tool(wrapper: Wrapper) -> Any:
        """Do it."""
        return await work(wrapper.context)

    return scripted([Call("tool")], [*answer], *then, tools=[tool])


# ---- a server, and clients of it


async def hurry(seconds: float) -> None:
    """For uvicorn's two pauses of 0.1 s at each server's end, which add up to a minute."""
    await asyncio.sleep(seconds / 20)


uvicorn.server.asyncio = SimpleNamespace(**{**vars(asyncio), "sleep": hurry})  # type: ignore[assignment]


class Client(httpx.Client):
    """An HTTP client that speaks both dialects."""

    def __init__(self, **options: Any) -> None:
        """Without certificates, which take longer to load than most tests to run."""
        super().__init__(**{"timeout": DEADLINE, "verify": False, **options})

    def send_message(self, message: str, thread_id: Any = None, **body: Any) -> list[Json]:
        """The events of the answer to a message, in the plain dialect."""
        body = {"message": message, **({} if thread_id is None else {"thread_id": thread_id}), **body}
        with self.stream("POST", "/chatkit", json=body) as response:
            assert response.status_code == 200, response.read()
            return list(plain_events(response))

    def operate(self, operation: str, **params: Any) -> Any:
        """A ChatKit request's answer."""
        response = self.post("/chatkit", json={"type": operation, "params": params})
        assert response.status_code == 200, response.text
        return answer_in(response)

    def messages(self, thread_id: int) -> list[Json]:
        response = self.get(f"/api/conversations/{thread_id}").raise_for_status()
        return cast(list[Any], response.json()["messages"])


def plain_events(response: httpx.Response) -> Iterator[Json]:
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


def chatkit_events(text: str) -> list[Json]:
    frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    assert all(frame.startswith("data: ") for frame in frames)
    return [json.loads(frame[6:]) for frame in frames]


def answer_in(response: httpx.Response) -> Any:
    """Of a ChatKit request: the events of a stream, or the JSON."""
    streamed = response.headers["content-type"].startswith("text/event-stream")
    return chatkit_events(response.text) if streamed else response.json()


def said(events: list[Json]) -> str:
    """The text of all plain `text` events."""
    return "".join(event["content"] for event in of_type(events, "text"))


def kinds(events: list[Json]) -> list[str]:
    """The types of events, a run of one type once."""
    return [kind for kind, _ in itertools.groupby(event["type"] for event in events)]


def of_type(events: list[Json], kind: str) -> list[Json]:
    return [event for event in events if event["type"] == kind]


def user_input(text: str, **fields: Any) -> Json:
    """ChatKit's `input` of a message."""
    content = [{"type": "input_text", "text": text}]
    return {"content": content, "attachments": [], "inference_options": {}, **fields}


def make_app(agent: Any = None, **options: Any) -> FastAPI:
    """An app with these settings, in memory unless told otherwise, and these arguments of create_app()."""
    names = {"store", "on_action", "on_feedback", "transcribe", "lifespan"} & options.keys()
    arguments = {name: options.pop(name) for name in names}
    settings = ck.Settings(**{"database": ":memory:", "model": "demo", **options})
    return ck.create_app(agent, settings=settings, **arguments)


@contextlib.contextmanager
def serving(agent: Any = None, **options: Any) -> Iterator[Client]:
    """A client of a real server in a thread of its own; `options` as for make_app()."""
    with ck.serve_in_background(make_app(agent, **options)) as url, Client(base_url=url) as client:
        yield client


@contextlib.contextmanager
def answering(agent: ck.AgentSource, wait: Wait, **options: Any) -> Iterator[tuple[Client, Future[Any]]]:
    """A server that has come as far as `wait` in its first answer, and the events to come of that."""
    with serving(agent, **options) as client, ThreadPoolExecutor(1) as pool:
        events = pool.submit(client.send_message, "hi")
        assert wait.reached.wait(DEADLINE)
        yield client, events


SECRET = "a secret of more than thirty-two characters"


def bearer(user_id: str) -> dict[str, str]:
    return {"Authorization": "Bearer " + ck.make_token(ck.Settings(jwt_secret=SECRET), user_id)}


class Process:
    """The server as `python chatkit_server.py` starts it: `lines` it says first, `log_file` has its log."""

    def __init__(self, *arguments: str, cwd: Path, env: Any = None, module: Path = HERE) -> None:
        self.log_file = cwd / "log.txt"
        command = [sys.executable, str(module / "chatkit_server.py"), "--port", "0", *arguments]
        env = {**CLEAN_ENV, "PYTHONPATH": str(module), **(env or {})}
        with self.log_file.open("ab") as log:
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": log}
            self.process: Any = subprocess.Popen(command, cwd=cwd, env=env, text=True, **pipes)
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline().rstrip() for _ in range(3)]
        self.url = self.lines[0].removeprefix("Listening on ")

    def client(self, **kwargs: Any) -> Client:
        return Client(base_url=self.url, **kwargs)

    def stop(self, how: int) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(how)
        return cast(int, self.process.wait(DEADLINE))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            self.process.kill()


def readme_block(name: str) -> str:
    """A code block of the README, by the file name in its first line."""
    blocks = re.split("```.*\n", (HERE / "README.md").read_text(encoding="utf-8"))
    return next(block for block in blocks if f"# {name}" in block[:80])


def readme_example(name: str) -> Json:
    """What a code block of the README defines."""
    names: Json = {"__name__": "example"}
    exec(readme_block(name), names)
    return names


# ===================================================================================================== Start

PIPES: Json = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


def our_threads() -> int:
    """How many threads of servers and of databases there are."""
    names = [thread.name for thread in threading.enumerate()]
    return len([name for name in names if "chatkit" in name or "_connection_worker_thread" in name])


def test_the_first_minute(tmp_path: Path) -> None:
    """What the README promises: start, add, stop with Ctrl-C, start again, list."""
    with Process(cwd=tmp_path) as server:
        assert server.lines == [f"Listening on {server.url}", "Model: demo", "Data:  chatkit.db"]
        assert server.url.startswith("http://localhost:")
        with server.client() as client:
            assert client.get("/health").json() == {"status": "healthy", "model": "demo"}
            call = of_type(client.send_message("add buy milk to my list"), "tool_call")[0]
            assert (call["name"], call["args"]) == ("add_task", {"title": "buy milk"})
        with Process("--port", server.url.rpartition(":")[2], cwd=tmp_path) as second:
            assert (second.process.wait(DEADLINE), second.lines) == (2, [""] * 3)
            assert "something listens there already" in second.log_file.read_text()
        assert server.stop(signal.SIGINT) == 0
        assert "Traceback" not in server.log_file.read_text()
    with Process(cwd=tmp_path) as server, server.client() as client:
        assert "buy milk" in said(client.send_message("show my tasks", thread_id=1))


CANNOT_START = {
    "--port 99999": "CHATKIT_PORT",
    "--host no.such.host.invalid": "Cannot listen on no.such.host",
    "--database missing/chat.db": "Cannot use missing/chat.db as the database",
    "--database .": "Cannot use . as the database",
    "--token alice": "CHATKIT_JWT_SECRET",
    "--model nobody/x": "nobody/x",
}
OPEN_TO_OTHERS = [f"--host {host}" for host in ("0.0.0.0", "::", "192.168.1.5", "my.example")]
CANNOT_START |= dict.fromkeys(OPEN_TO_OTHERS, "CHATKIT_JWT_SECRET")


@parametrize("arguments", CANNOT_START)
def test_what_cannot_start_says_why(arguments: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHATKIT_JWT_SECRET", SECRET if "no.such.host" in arguments else "")
    assert ck.main(["--port", "0", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert CANNOT_START[arguments] in err and (out, err.count("\n")) == ("", 1)


def test_an_older_python_is_told_which_one_it_needs() -> None:
    """The check stands before anything that it cannot read: the module compiles as Python 3.9."""
    ast.parse((HERE / "chatkit_server.py").read_text(), feature_version=(3, 9))


def test_settings_come_from_the_environment_and_flags_win(monkeypatch: Any) -> None:
    given = {"PORT": "1234", "CORS_ORIGINS": "https://A.example:443/, http://b.example:80", "TRACING": "yes"}
    for name, value in {**given, "STARTERS": "Soup | Something quick|"}.items():
        monkeypatch.setenv(f"CHATKIT_{name}", value)
    monkeypatch.setenv("BETTER_AUTH_SECRET", SECRET)
    settings = ck.Settings.from_env(host="::1")
    assert (settings.port, settings.host, settings.tracing) == (1234, "::1", True)
    assert (settings.jwt_secret, settings.starters) == (SECRET, ("Soup", "Something quick"))
    assert settings.cors_origins == ("https://a.example", "http://b.example")
    assert ck.Settings.from_env(port=4321).port == 4321 and SECRET not in repr(settings)
    assert ck.Settings(database=Path("x.db")).database == "x.db"


def test_settings_may_stand_in_a_file_and_an_empty_variable_is_not_set(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(ck, "HERE", tmp_path)
    monkeypatch.delenv("PYTHON_DOTENV_DISABLED")
    for name, value in {"TITLE": " ", "PORT": "1"}.items():
        monkeypatch.setenv(f"CHATKIT_{name}", value)
    (tmp_path / ".env").write_text("CHATKIT_TITLE=K\u00fcche\nCHATKIT_PORT=2", encoding="utf-8-sig")
    settings = ck.Settings.from_env()
    assert (settings.title, settings.port) == ("K\u00fcche", 1)
    (tmp_path / ".env").write_text("CHATKIT_TITLE=K\u00fcche", encoding="utf-16")
    with pytest.raises(ck.SettingsError, match=r"\.env.*UTF-8"):
        ck.Settings.from_env()


def test_the_address_is_one_where_it_listens() -> None:
    urls = {ck.url_of(host, 80) for host in ("127.0.0.1", "0.0.0.0", "::")}
    assert urls == {"http://localhost:80"} and ck.url_of("::1", 80) == "http://[::1]:80"
    assert ck.url_of("127.0.0.2", 80) == "http://127.0.0.2:80"


# ============================================================================================= Plain dialect


def test_a_plain_stream_has_its_headers_ids_events_and_end_and_becomes_rows() -> None:
    with serving(scripted(["one ", Call("echo", {"text": "x"}, "c1")], [Think("hm"), "two"])) as client:
        response = client.post("/chatkit/", json={"message": "  hello\n\tyou  "})
        rows = client.messages(1)
    headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
    headers |= {"x-accel-buffering": "no", "x-thread-id": "1"}
    assert response.headers.items() >= headers.items()
    frames = [frame.split("\n") for frame in response.text.split("\n\n") if frame]
    assert frames.pop() == ["data: [DONE]"]
    numbers = [int(frame[0].rpartition("-")[2]) for frame in frames]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    events = [json.loads(frame[1][6:]) for frame in frames]
    call = {"id": "c1", "name": "echo", "args": {"text": "x"}}
    thought = rows[3]["item"]
    assert (thought["type"], thought["workflow"]["type"]) == ("workflow", "reasoning")
    assert [event for event in events if event["type"] != "item" or event["item"] == thought] == [
        {"type": "thread", "thread_id": 1, "title": "hello you"},
        {"type": "thinking", "content": ""},
        {"type": "text", "content": "one ", "message_id": 2},
        {"type": "tool_call", **call},
        {"type": "tool_result", "id": "c1", "name": "echo", "result": {"echo": "x"}},
        {"type": "thinking", "content": "hm"},
        {"type": "item", "item": thought},
        {"type": "text", "content": "two", "message_id": 5},
        {"type": "done", "status": "completed", "thread_id": 1, "message_id": 5}
        | {"usage": {"input_tokens": 14, "output_tokens": 10}},
    ]
    assert [(row["role"], row["content"], row["tool_calls"], row["status"]) for row in rows] == [
        ("user", "  hello\n\tyou  ", None, "done"),
        ("assistant", "one ", None, "done"),
        ("tool", '{"echo": "x"}', [call], "done"),
        ("item", "hm", None, "done"),
        ("assistant", "two", None, "done"),
    ]


@pytest.fixture(scope="module")
def hello() -> Iterator[Client]:
    """A server that always says hello."""
    with serving(scripted(["hello"])) as client:
        yield client


def test_titles_are_folded_and_cut_at_fifty_characters(hello: Client) -> None:
    titles = {"a\n b": "a b", "x" * 50: "x" * 50, "x" * 51: "x" * 50 + "..."}
    assert {text: hello.send_message(text)[0]["title"] for text in titles} == titles


def test_a_model_that_never_answers_is_stopped_after_some_steps() -> None:
    with serving(scripted([Call("echo", {"text": "again"})]), max_steps=3) as client:
        events = client.send_message("hi")
    assert events[-2]["code"] == "too_many_steps" and len(of_type(events, "tool_call")) == 3


# ===================================================================================================== Turns


def test_deleting_a_conversation_while_it_answers_leaves_nothing(tmp_path: Path) -> None:
    wait = Wait()
    file = tmp_path / "chat.db"
    with answering(scripted(["so far", wait], ["new"]), wait, database=str(file)) as (client, answer):
        assert client.delete("/api/conversations/1").json() == {"status": "deleted", "id": 1}
        assert wait.left.wait(1)
        assert answer.result(DEADLINE)[-1]["status"] == "cancelled"
        assert rows_of(file, "SELECT id FROM conversations UNION SELECT id FROM messages") == []
        assert client.send_message("new")[0]["thread_id"] == 2  # an id never comes back


def test_a_silent_stream_carries_comments(monkeypatch: Any) -> None:
    monkeypatch.setattr(ck, "KEEP_ALIVE", 0.1)
    wait = Wait()
    path = "/api/conversations/1/stream"
    with answering(scripted([wait, "at last"]), wait) as (client, _), client.stream("GET", path) as response:
        comments = (line for line in response.iter_lines() if line.startswith(":"))
        assert [next(comments) for _ in range(3)] == [": keep-alive"] * 3
        wait.gate.set()


def test_two_requests_at_once_are_one_answer_and_one_refusal() -> None:
    wait = Wait()
    with serving(scripted(["first"], [wait, "second"])) as client, ThreadPoolExecutor(2) as pool:
        client.send_message("hi")
        body = {"message": "x", "thread_id": 1}
        posts = [pool.submit(client.post, "/chatkit", json=body) for _ in range(2)]
        assert next(as_completed(posts, DEADLINE)).result().status_code == 409
        wait.gate.set()
        assert sorted(post.result(DEADLINE).status_code for post in posts) == [200, 409]
        assert [row["role"] for row in client.messages(1)] == ["user", "assistant", "user", "assistant"]


def test_the_model_is_shown_the_last_items_with_calls_and_results_paired() -> None:
    both = [Call("echo", {"text": "a"}, "c1"), Call("echo", {"text": "b"}, "c2")]
    agent = scripted(both, ["one"], ["two"], ["three"])
    with serving(agent, history_limit=4) as client:
        client.send_message("first")
        client.send_message("second", 1)
        client.send_message("third", 1)
    # Rows at the second message: user, call, call, assistant, user. The window is the last four of them.
    note, *window = shown_to(agent, 2)
    assert "left out" in note["content"] and all("id" not in item for item in window)
    told = [f"{item.get('type') or item['role']} {item.get('call_id', '')}".strip() for item in window]
    calls = ["function_call c1", "function_call c2"]
    outputs = ["function_call_output c1", "function_call_output c2"]
    assert told == [*calls, *outputs, "assistant", "user"]
    assert [item["content"] for item in shown_to(agent, 3)[1:]] == ["one", "second", "two", "third"]


# ====================================================================================================== REST


def test_conversations_are_listed_by_their_last_use_renamed_and_deleted(hello: Client) -> None:
    first, second, third = (hello.send_message(message)[0]["thread_id"] for message in "abc")
    assert hello.send_message("again", thread_id=str(first))[0]["thread_id"] == first
    listed = hello.get("/api/conversations?limit=9999").json()
    assert [row["id"] for row in listed[:3]] == [first, third, second]
    assert set(listed[0]) == {"id", "title", "created_at", "updated_at", "status", "reason", "metadata"}
    assert hello.get("/api/conversations?limit=1&offset=1").json() == listed[1:2]
    assert hello.get("/api/conversations/recent/first/").json() == listed[0]
    path = f"/api/conversations/{first}"
    assert hello.patch(path, json={"title": " New "}).json()["title"] == "New"
    assert hello.get(path).json()["title"] == "New"
    assert hello.delete(path + "/").json() == {"status": "deleted", "id": first}
    assert hello.get(path).status_code == 404


def test_search_finds_titles_and_messages_by_the_beginnings_of_words() -> None:
    with serving(scripted(["Gr\u00fc\u00dfe aus Z\u00fcrich"], ["nothing"])) as client:
        client.send_message("alpha beta")
        client.send_message("gamma")
        client.patch("/api/conversations/2", json={"title": "Delta"})

        def found(q: str) -> list[int]:
            return [row["id"] for row in client.get("/api/conversations", params={"q": q}).json()]

        assert found("alp") == found("beta ALPHA") == found("zurich") == found("alpha & beta \u2013") == [1]
        assert found("delt") == found("gamma") == [2]
        assert found("lpha") == found("nope") == found('"*()') == found("- &") == []
        assert found(" ") == [2, 1]
        client.delete("/api/conversations/1")
        assert found("alpha") == []


def test_tasks_can_be_read_and_ticked_where_the_todo_assistant_answers(hello: Client) -> None:
    with serving() as client:
        client.send_message("add milk")
        task = {"id": 1, "title": "milk", "done": False}
        assert client.get("/api/tasks").json() == [task]
        assert client.patch("/api/tasks/1", json={"done": True}).json() == {**task, "done": True}
        assert client.patch("/api/tasks/1", json={"done": 1}).status_code == 400
        assert client.patch("/api/tasks/2", json={"done": True}).status_code == 404
    assert hello.get("/api/tasks").status_code == 404


# ================================================================================================= Extending


def test_uvicorn_starts_the_factory(tmp_path: Path, monkeypatch: Any) -> None:
    """As `uvicorn chatkit_server:create_app --factory` does, which knows nothing of serve_in_background()."""
    monkeypatch.chdir(tmp_path)
    server = uvicorn.Server(uvicorn.Config("chatkit_server:create_app", factory=True, log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.run, [listener])
        with Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            assert said(client.send_message("add milk"))
        server.should_exit = True
        running.result(DEADLINE)
    assert [file.name for file in tmp_path.iterdir()] == ["chatkit.db"]  # no -wal: the connection was closed


def test_the_app_works_mounted_in_another_one_and_in_starlettes_test_client(tmp_path: Path) -> None:
    """A mounted app has no lifespan: its store opens all the same, and closes with the event loop."""
    threads, outer = our_threads(), FastAPI()
    outer.mount("/assistant", make_app(database=str(tmp_path / "chat.db")))
    with TestClient(outer, base_url="http://test") as client:
        assert "Added" in client.post("/assistant/chatkit", json={"message": "add milk"}).text
        for path in ("", "health", "api/conversations/", "api/conversations/1"):
            assert client.get(f"/assistant/{path}").status_code == 200
    assert until(lambda: our_threads() <= threads) and not (tmp_path / "chat.db-wal").exists()


def test_servers_in_the_background_start_stop_and_keep_apart() -> None:
    def said_by(server: Any) -> str:
        with Client(base_url=server.url) as client:
            return said(client.send_message("x"))

    threads = our_threads()
    apps = [make_app(scripted([answer])) for answer in ("one", "two", "three")]
    first, second = map(ck.serve_in_background, apps[:2])
    with pytest.raises(ck.StoreError, match="served already"):
        ck.serve_in_background(apps[0])
    assert (said_by(first), said_by(second)) == ("one", "two")
    first.stop()
    again = ck.serve_in_background(apps[2], port=int(first.url.rpartition(":")[2]))
    assert said_by(again) == "three"
    for server in (again, second, second):  # twice is as good as once
        server.stop()
    assert until(lambda: our_threads() <= threads)


# ================================================================================================== Old files
# A file of schema version 2, with each kind of row that the first version's server wrote until it was killed.

VERSION_2 = """
CREATE TABLE conversations (id INTEGER PRIMARY KEY AUTOINCREMENT, user_id TEXT NOT NULL, title TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'active', status_reason TEXT, created_at TEXT NOT NULL DEFAULT '',
    updated_at TEXT NOT NULL DEFAULT '') STRICT;
CREATE INDEX conversations_by_use ON conversations (user_id, updated_at DESC, id DESC);
CREATE INDEX conversations_by_age ON conversations (user_id, id);
CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation_id INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE, role TEXT NOT NULL,
    content TEXT NOT NULL, tool_calls TEXT, extra TEXT, status TEXT, feedback TEXT, created_at TEXT) STRICT;
CREATE INDEX messages_in_order ON messages (conversation_id, id);
CREATE INDEX messages_open ON messages (conversation_id, status) WHERE status IN ('streaming', 'pending');
CREATE VIEW items AS SELECT m.*, c.user_id FROM messages m JOIN conversations c ON c.id = m.conversation_id;
CREATE TRIGGER message_moves_conversation AFTER INSERT ON messages BEGIN
    UPDATE conversations SET updated_at = new.created_at WHERE id = new.conversation_id; END;
CREATE TABLE tasks (id INTEGER PRIMARY KEY AUTOINCREMENT, user_id TEXT NOT NULL, title TEXT NOT NULL,
    done INTEGER NOT NULL DEFAULT 0, created_at TEXT NOT NULL DEFAULT '') STRICT;
CREATE INDEX tasks_of_user ON tasks (user_id, id);
CREATE TABLE attachments (id TEXT PRIMARY KEY, user_id TEXT NOT NULL,
    message_id INTEGER REFERENCES messages (id) ON DELETE CASCADE, key TEXT NOT NULL, name TEXT NOT NULL,
    mime_type TEXT NOT NULL, size INTEGER NOT NULL, data BLOB, created_at TEXT NOT NULL DEFAULT '') STRICT;
CREATE INDEX attachments_of_message ON attachments (message_id);
CREATE INDEX attachments_unsent ON attachments (created_at) WHERE message_id IS NULL;
CREATE VIRTUAL TABLE message_search USING fts5 (owner, body, content = '');
CREATE VIRTUAL TABLE title_search USING fts5 (owner, body, content = '');
CREATE TRIGGER message_found AFTER INSERT ON messages BEGIN
    INSERT INTO message_search (rowid, owner, body)
    SELECT new.id, hex(user_id), new.content FROM conversations WHERE id = new.conversation_id; END;
CREATE TRIGGER title_found AFTER INSERT ON conversations BEGIN
    INSERT INTO title_search (rowid, owner, body) VALUES (new.id, hex(new.user_id), new.title); END;
CREATE TRIGGER title_lost BEFORE DELETE ON conversations BEGIN
    DELETE FROM messages WHERE conversation_id = old.id; END;
INSERT INTO conversations (id, user_id, title, status, status_reason) VALUES
    (1, 'local', 'Add milk and tea', 'active', NULL), (2, 'local', 'Ask @Ann about it', 'active', NULL),
    (3, 'local', 'Order a shirt', 'active', NULL), (4, 'local', 'It breaks', 'locked', 'Under review'),
    (5, 'zoë', 'Zoë''s café', 'active', NULL);
INSERT INTO tasks (user_id, title, done)
    VALUES ('local', 'Milk', 1), ('local', 'Tea ☕', 0), ('zoë', 'Z''s', 0);
"""


@dataclass
class OldRow:
    """A message of the old file, and the item that ChatKit shows, where the rest does not say it."""

    conversation_id: int
    role: str
    content: str = ""
    call: tuple[str, str, Any] | None = None  # id, name, arguments
    extra: Any = None
    status: str = "done"
    shown: Any = None
    feedback: str | None = None


OLD_FILES: dict[str, tuple[int | None, str, str, bytes | None]] = {  # row of the message, name, type, data
    "att_1": (8, "notes.txt", "text/plain", "café at 9\n".encode()),
    "att_2": (8, "dot.png", "image/png", b"\x89PNG\r\n\x1a\n..."),
    "att_3": (11, "odd.pdf", "application/pdf", b"%PDF-1.4"),
    "att_4": (None, "unsent.txt", "text/plain", b"later"),
    "att_5": (None, "never.png", "image/png", None),
}


def old_file_of(file_id: str) -> Json:
    """As `extra` has an attachment."""
    _, name, mime_type, data = OLD_FILES[file_id]
    return {"id": file_id, "key": "k" * 32, "name": name, "mime_type": mime_type, "size": len(data or b"")}


def shown_file(file_id: str, kind: str = "file", **more: Any) -> Json:
    _, name, mime_type, _ = OLD_FILES[file_id]
    return {"id": file_id, "name": name, "mime_type": mime_type, "type": kind, "thread_id": "2", **more}


MILK, TEA = '{"id": 1, "title": "Milk", "done": false}', '{"id": 2, "title": "Tea ☕", "done": false}'
TICK_MILK = {"type": "toggle_task", "payload": {"id": 1}}
OLD_CARD = {"type": "Card", "children": [{"type": "Checkbox", "name": "task_1", "onChangeAction": TICK_MILK}]}
OLD_THOUGHT = {"type": "thought", "content": "Two tasks.", "status_indicator": "complete"}
ANN = {"type": "input_tag", "id": "p1", "text": "Ann", "data": {"age": 7}, "group": "People"}
OLD_MESSAGE = [
    {"type": "input_text", "text": "Ask "}, {**ANN, "interactive": True},
    {"type": "input_text", "text": " about it"},
]  # fmt: skip
WHY: Json = {"type": "freeform", "id": "why", "question": "Why?", "description": "In a word"}
OLD_ANSWERED = [{**WHY, "answer": {"values": ["Cold"], "skipped": False}}]
NOT_ANSWERED = [{**WHY, "answer": {"values": [], "skipped": True}}]
OLD_ANSWERS = '[{"question": "Why?", "values": ["Cold"], "skipped": false}]'
NO_ANSWERS = '[{"question": "Why?", "skipped": true}]'
LOCATE = {"name": "get_location", "arguments": {"exact": True}}


def old_question(state: str, inputs: Any = (WHY,)) -> Json:
    return {"type": "structured_input", "status": state, "inputs": [*inputs]}


def old_location(state: str, call_id: str, **more: Any) -> Json:
    return {"type": "client_tool_call", "status": state, "call_id": call_id, **LOCATE, **more}


def old_task(title: str, state: str, **more: Any) -> Json:
    return {"type": "task", "task": {"type": "custom", "title": title, "status_indicator": state, **more}}


OLD_ROWS = [
    OldRow(1, "user", "Add milk and tea"),
    OldRow(1, "reasoning", "Two tasks.", shown={
        "type": "workflow", "workflow": {"type": "reasoning", "expanded": False, "tasks": [OLD_THOUGHT]}}),
    OldRow(1, "tool", MILK, ("a1", "add_task", {"title": "Milk"}), {"group": "g1", "provider_data": {
        "model": "gemini/gemini-2.5-flash", "response_id": "r1", "thought_signature": "EpQB"}}),
    OldRow(1, "tool", TEA, ("a2", "add_task", {"title": "Tea ☕"}), {"group": "g1"}),
    OldRow(1, "tool", f"[{MILK}, {TEA}]", ("a3", "list_tasks", {}), {"group": "g2"}),
    OldRow(1, "widget", "1. Milk", extra={"widget": OLD_CARD},
           shown={"type": "widget", "widget": OLD_CARD, "copy_text": "1. Milk"}),
    OldRow(1, "assistant", "Both are on your list.", feedback="positive"),
    OldRow(2, "user", "Ask @Ann about it", extra={
        "parts": OLD_MESSAGE, "quoted_text": "on your list", "model": "demo", "tool_choice": "broken",
        "attachments": [old_file_of("att_1"), old_file_of("att_2")]},
        shown={"type": "user_message", "content": OLD_MESSAGE, "quoted_text": "on your list",
               "inference_options": {"model": "demo", "tool_choice": {"id": "broken"}},
               "attachments": [shown_file("att_1"), shown_file(
                   "att_2", "image", preview_url="data:image/png;base64,iVBORw0KGgouLi4=")]}),
    OldRow(2, "tool", "", ("ws_1", "web_search", {}), {"group": "g3", "hosted": True},
           shown=old_task("web_search", "complete")),
    OldRow(2, "assistant", "Rain.", feedback="negative"),
    OldRow(2, "user", extra={"attachments": [old_file_of("att_3")], "unread": True}, shown={
        "type": "user_message", "content": [], "inference_options": {},
        "attachments": [shown_file("att_3")]}),
    OldRow(2, "assistant", "It was going to be", status="cancelled"),
    OldRow(2, "system", "The person stopped the answer above."),
    OldRow(3, "user", "Order a shirt"),
    OldRow(3, "tool", '{"city": "Oslo"}', ("c1", "locate", {}),
           {"group": "g4", "client": LOCATE, "output": {"city": "Oslo"}},
           shown=old_location("completed", "c1", output={"city": "Oslo"})),
    OldRow(3, "input", OLD_ANSWERS, ("c2", "choose", {}),
           {"group": "g5", "inputs": OLD_ANSWERED, "answered": "answered"},
           shown=old_question("answered", OLD_ANSWERED)),
    OldRow(3, "input", NO_ANSWERS, ("c3", "choose", {}),
           {"group": "g6", "inputs": NOT_ANSWERED, "answered": "skipped"},
           shown=old_question("skipped", NOT_ANSWERED)),
    OldRow(3, "tool", "", ("c4", "locate", {}), {"group": "g7", "client": LOCATE}, "cancelled",
           old_task("get_location was not answered", "none")),
    OldRow(3, "input", "", ("c5", "choose", {}), {"group": "g7", "inputs": [WHY]}, "cancelled",
           old_question("skipped")),
    OldRow(3, "user", "Never mind"),
    OldRow(3, "tool", "", ("c6", "locate", {}), {"group": "g8", "client": LOCATE}, "pending",
           old_location("pending", "c6")),
    OldRow(3, "input", "", ("c7", "choose", {}), {"group": "g8", "inputs": [WHY]}, "pending",
           old_question("pending")),
    OldRow(4, "user", "It breaks"),
    OldRow(4, "assistant", "Half a", status="failed"),
    OldRow(4, "tool", "", ("e1", "slow", {"text": "x"}), {"group": "g9"}, "streaming",
           old_task("slow", "none", content='{"text": "x"}')),
    OldRow(5, "user", "café question"),
    OldRow(5, "tool", "{}", ("f1", "add_task", {"title": "Z's task"}), {"group": "g10"}),
    OldRow(5, "assistant", "An answer that is cut", status="streaming"),
]  # fmt: skip
# What the model is shown of a conversation; `>` is a call, `<` its output, `<?` one that came to no end.
TOLD = {
    1: ["Add milk and tea", '> a1 add_task {"title": "Milk"}', '> a2 add_task {"title": "Tea ☕"}',
        f"< a1 {MILK}", f"< a2 {TEA}", "> a3 list_tasks {}", f"< a3 [{MILK}, {TEA}]", "1. Milk",
        "Both are on your list."],
    2: ["on your list|@Ann:|café at 9|image/png;base64,iVBOR|Ask @Ann about it", "Rain.",
        "odd.pdf, which the model cannot read|without words", "It was going to be", "The person stopped"],
    3: ["Order a shirt", "> c1 locate {}", '< c1 {"city": "Oslo"}', "> c2 choose {}", f"< c2 {OLD_ANSWERS}",
        "> c3 choose {}", f"< c3 {NO_ANSWERS}", "> c4 locate {}", "> c5 choose {}", "<? c4", "<? c5",
        "Never mind", "> c6 locate {}", "> c7 choose {}", "<? c6", "<? c7"],
    4: ["It breaks", "Half a", '> e1 slow {"text": "x"}', "<? e1"],
}  # fmt: skip
FOUND = {("local", "café"): [], ("local", "milk"): [1], ("local", "going"): [2], ("local", "gone"): [],
         ("zoë", "cafe"): [5], ("zoë", "cut"): [5], ("zoë", "milk"): []}  # fmt: skip


def old_time(row_id: int) -> str:
    return f"2025-11-21T12:00:{row_id:02}.000Z"


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    with contextlib.closing(sqlite3.connect(tmp_path / "old.db", isolation_level=None)) as db:
        db.executescript(VERSION_2)
        for number, row in enumerate(OLD_ROWS, 1):
            call = row.call and json.dumps([dict(zip(("id", "name", "args"), row.call, strict=True))])
            values = [number, row.conversation_id, row.role, row.content, call]
            values += [row.extra and json.dumps(row.extra), row.status, row.feedback, old_time(number)]
            db.execute(f"INSERT INTO messages VALUES ({', '.join('?' * 9)})", values)
        for file_id, (row_id, *file) in OLD_FILES.items():
            sql = "INSERT INTO attachments VALUES (?, 'local', ?, 'k', ?, ?, 5, ?, '')"
            db.execute(sql, (file_id, row_id, *file))
        db.executescript("UPDATE sqlite_sequence SET seq = seq + 3; PRAGMA user_version = 2")
    return tmp_path / "old.db"


def shown_of(row: OldRow) -> Json:
    if row.shown:
        return cast(Json, row.shown)
    if row.call:
        _, name, arguments = row.call
        content = f"{json.dumps(arguments, ensure_ascii=False)}\n{row.content}" if arguments else row.content
        return old_task(name, "complete", content=content)
    if row.role == "user":
        return {"type": "user_message", **user_input(row.content)}
    text = [{"type": "output_text", "text": row.content, "annotations": []}]
    return {"type": "assistant_message", "content": text}


def told(item: Json) -> str:
    if item.get("type") == "function_call":
        return f"> {item['call_id']} {item['name']} {item['arguments']}"
    if item.get("type") == "function_call_output":
        return f"< {item['call_id']} {item['output']}"
    parts = item["content"] if isinstance(item["content"], list) else [{"text": item["content"]}]
    return "|".join(part.get("text") or part["image_url"] for part in parts)


@parametrize("thread", TOLD)
def test_an_older_file_is_shown_as_before_to_the_reader_and_to_the_model(old_file: Path, thread: int) -> None:
    """Twice: the file is brought forward once."""
    of_thread = [(number, row) for number, row in enumerate(OLD_ROWS, 1) if row.conversation_id == thread]
    old = [(number, row) for number, row in of_thread if row.role != "system"]
    agent, path = scripted(["Yes."]), f"/api/conversations/{thread}"
    for _ in range(2):
        with serving(agent, database=str(old_file)) as client:
            assert [each["id"] for each in client.get("/api/conversations").json()] == [4, 3, 2, 1]
            page = client.operate("items.list", thread_id=str(thread), order="asc", limit=100)
            rows = client.messages(thread)
    assert page["data"] == [
        {"id": str(number), "thread_id": str(thread), "created_at": old_time(number)} | shown_of(row)
        for number, row in old
    ]
    assert [(row["id"], row["status"], row["feedback"]) for row in rows] == [
        (number, row.status.replace("streaming", "interrupted"), row.feedback) for number, row in old
    ]
    with serving(agent, database=str(old_file)) as client:
        client.patch(path, json={"status": "active"}).raise_for_status()
        client.send_message("Go on", thread)
    *shown, last = shown_to(agent)
    assert told(last) == "Go on"
    for item, wanted in zip(map(told, shown), TOLD[thread], strict=True):
        for part in wanted.split("|"):
            assert part.removeprefix("<? ") in item if part[:2] != "> " else part == item
    signed = [item["call_id"] for item in shown if item.get("provider_data", {}).get("thought_signature")]
    assert signed == (["a1"] if thread == 1 else [])


async def test_an_older_file_keeps_its_search_tasks_files_ids_and_other_tables(old_file: Path) -> None:
    change(
        old_file,
        """CREATE TABLE notes (message_id INTEGER REFERENCES messages (id), text TEXT);
           CREATE INDEX notes_by_text ON notes (text);
           CREATE TRIGGER noted AFTER INSERT ON notes BEGIN UPDATE notes SET text = upper(text); END;
           INSERT INTO notes VALUES (1, 'mine')""",
    )
    async with ck.Store(old_file) as store, ck.Store(":memory:") as new:
        for (user_id, words), found in FOUND.items():
            assert [row["id"] for row in await store.search_conversations(user_id, words, 9)] == found, words
        tasks = {task["title"]: task["done"] for task in await store.tasks("local")}
        assert tasks == {"Milk": True, "Tea ☕": False}
        assert (await store.conversation("local", 4) or {})["status_reason"] == "Under review"
        assert await store.attachment_data("local", ["att_1"]) == {"att_1": OLD_FILES["att_1"][-1]}
        assert not await store.delete_attachment("local", "att_1")  # sent
        assert await store.delete_attachment("local", "att_4")  # not sent
        assert await store.delete_conversation("local", 2)
        assert await store.attachment_data("local", ["att_1"]) == {}
        last = await store.execute("SELECT seq FROM sqlite_sequence ORDER BY name")
        assert [row["seq"] - 3 for row in last] == [5, len(OLD_ROWS), 3]  # conversations, messages, tasks
        assert await store.execute("INSERT INTO notes VALUES (3, 'new') RETURNING text") == [{"text": "new"}]
        assert [row["text"] for row in await store.execute("SELECT text FROM notes")] == ["MINE", "NEW"]
        assert await store.execute("PRAGMA foreign_key_check") == []
        names = "SELECT type, name FROM sqlite_schema WHERE tbl_name <> 'notes' ORDER BY type, name"
        assert await store.execute(names) == await new.execute(names)


async def test_a_file_that_cannot_be_brought_forward_stays_as_it_was(old_file: Path) -> None:
    change(old_file, """UPDATE messages SET tool_calls = '[{"id": "x"}]' WHERE role = 'tool'""")
    before = dump(old_file)
    with pytest.raises(ck.StoreError, match="Cannot use"):
        await ck.Store(old_file).open()
    assert (dump(old_file), rows_of(old_file, "PRAGMA user_version")) == (before, [(2,)])
    assert not old_file.with_name("old.db-server").exists()


# ================================================================================================= Demo model

THREE = "buy milk, call mom, water plants"
SENTENCES = """
add buy tea to my list | THREE, buy tea | Added “buy tea” to your list
Please add “tea” to the to-do list! | THREE, tea | It is task 4
remind me to call Dr. Smith | THREE, call Dr. Smith | Added
add tea, eggs and bread | THREE, tea, eggs, bread | It is task 6
show my tasks | THREE | - **2** call mom
What's on my list? | THREE | - **3** water plants
What\u2019s on the list? | THREE | - **3** water plants
add tea to list / add eggs /please show my tasks. | THREE, tea, eggs | - **5** eggs
mark call mom done / mark 3 as finished | buy milk, call mom!, water plants! | as done
complete 1 and 2; delete water plants, 1 | call mom! | Removed “water plants”
complete buy milk | buy milk!, call mom, water plants | Marked “buy milk” as done
mark task 3 as done | buy milk, call mom, water plants! | Marked “water plants” as done
finish the water | buy milk, call mom, water plants! | Marked
rename 1 to buy oat milk | buy oat milk, call mom, water plants | Task 1 is now “buy oat milk”
delete buy milk from my list | call mom, water plants | Removed “buy milk” from your list
Delete #3, please! | buy milk, call mom | Removed “water plants”
delete 77 | THREE | There is no single task “77”
complete the washing | THREE | There is no single task “the washing”
remove m | THREE | There is no single task “m”
add tea, then complete tea, delete 3; show my list | buy milk, call mom, tea! | tea (done)
call add_task {"title": "show my tasks"} | THREE, show my tasks | Added
call complete_task {"task": " "} | THREE | These arguments do not fit
what is the meaning of life? | THREE | demo model
"""


@parametrize("sentence", SENTENCES.split("\n")[1:-1])
def test_the_demo_model_keeps_a_list_in_ordinary_sentences(sentence: str) -> None:
    message, tasks, answer = (part.strip() for part in sentence.replace("THREE", THREE).split("|"))
    message = message.replace("/", "\n")
    with serving() as client:
        client.send_message(f"add {THREE}")
        events = client.send_message(message, thread_id=1)
        assert answer in said(events) and events[-1]["status"] == "completed"
        listed = client.get("/api/tasks").json()
        assert ", ".join(task["title"] + "!" * task["done"] for task in listed) == tasks


@function_tool
async def sketch() -> list[Any]:
    """A text and a picture."""
    return [ToolOutputText(text="a dot"), ToolOutputImage(image_url="data:image/png;base64,AAAA")]


@function_tool
async def silence() -> None:
    """Nothing."""


@function_tool
async def refund(text: str) -> str:
    """Give money back."""
    return f"refunded {text}"


CALLS = """
hello | | set OPENAI_API_KEY, GEMINI_API_KEY or CHATKIT_MODEL
hello | | “call echo”
call nothing | | “call sketch”
call echo {"text": "hi"} | {"text": "hi"} | {"echo": "hi"}
Call echo {"text": "call me"} and call sketch | {"text": "call me"}, {} | `sketch` answered: a dot
call sketch then call silence | {}, {} | `silence` answered
call echo {text: hi} | {} | These arguments do not fit the parameters of echo
call transfer_to_billing | {} | Billing has taken over
call transfer_to_billing, then call refund {"text": "5"} | {}, {"text": "5"} | refunded 5
echo: hi | {"text": "hi"} | The tool `echo` answered
echo: call echo {"text": "x"} | {"text": "x"} | The tool `echo` answered
sketch: x | {} | The tool `sketch` answered
"""


@pytest.fixture(scope="module")
def desk() -> Iterator[Client]:
    billing = Agent[Any](name="Billing", tools=[refund])
    with serving(Agent(name="Desk", tools=[echo, sketch, silence], handoffs=[billing])) as client:
        yield client


@parametrize("row", CALLS.split("\n")[1:-1])
def test_the_demo_model_calls_what_is_named_or_forced_of_any_agent(row: str, desk: Client) -> None:
    message, calls, answer = (part.strip() for part in row.split("|"))
    forced, _, rest = message.partition(": ")
    is_forced = forced in ("echo", "sketch")
    events = desk.send_message(rest, tool_choice=forced) if is_forced else desk.send_message(message)
    assert [event["args"] for event in of_type(events, "tool_call")] == json.loads(f"[{calls}]")
    assert answer in said(events) and events[-1]["status"] == "completed"
    assert desk.get("/health").json()["model"] == "demo"


def test_the_demo_model_streams_words_and_counts_them() -> None:
    with serving() as client:
        events = client.send_message("hello")
    words = [event["content"] for event in of_type(events, "text")]
    assert len(words) == len("".join(words).split()) == events[-1]["usage"]["output_tokens"] > 20


@parametrize("message", ["\n" * 32_000, "!" * 31_999 + "x", "and " * 8000, "to my x " * 3900])
def test_the_demo_model_is_not_held_up_by_odd_texts(message: str) -> None:
    started = time.monotonic()
    ck.understand(message)
    assert time.monotonic() - started < 2


# ======================================================================================= Providers to talk to
# A server on loopback that speaks as OpenAI (both APIs) and Gemini do, says what a test wants, and remembers
# what it was asked. So what is tested is all between two real sockets: dialects, app, SDK, provider's client.
#
# The steps of an answer are a Script's (dicts for the Responses API only), End and Status; a float is a pause
# in seconds, bytes are sent as they are, a ConnectionResetError breaks the connection.


class Status(int):
    """The whole of an answer: an HTTP error, which quotes the request's headers as some proxies do."""


CHAT_DELTAS = {str: "content", Think: "reasoning_content", Refuse: "refusal"}


def chat_completion(steps: list[Any], body: Json) -> Iterator[Any]:
    """Steps as `chat.completion.chunk`s."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    calls, reason = itertools.count(), "stop"

    def chunk(delta: Json, reason: str | None = None) -> Json:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    for step in steps:
        if type(step) in CHAT_DELTAS:
            yield chunk({CHAT_DELTAS[type(step)]: step})
        elif isinstance(step, Call):
            index, reason = next(calls), "tool_calls"
            start = {"index": index, "id": step.call_id or f"call_{index}", "type": "function"}
            yield chunk({"tool_calls": [{**start, "function": {"name": step.name, "arguments": ""}}]})
            for piece in pieces(step.arguments):
                yield chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
        elif isinstance(step, End):
            reason = step
        else:
            yield step
    yield chunk({}, reason)
    if body.get("stream_options", {}).get("include_usage"):
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        yield {**head, "choices": [], "usage": usage}
    yield b"data: [DONE]\n\n"


def gemini(steps: list[Any], body: Json) -> Iterator[Any]:
    """Steps as what `streamGenerateContent?alt=sse` sends."""

    def chunk(part: Json, **fields: Any) -> Json:
        return {"candidates": [{"content": {"parts": [part], "role": "model"}, "index": 0, **fields}]}

    reason = "STOP"
    for step in steps:
        if isinstance(step, Refuse):
            reason = "SAFETY"
        elif isinstance(step, End):
            reason = step
        elif isinstance(step, str):
            yield chunk({"text": step, "thought": isinstance(step, Think)})
        elif isinstance(step, Call):  # whole; its call_id, which Gemini has not, is the signature here
            call = {"functionCall": {"name": step.name, "args": json.loads(step.arguments)}}
            yield chunk({**call, "thoughtSignature": step.call_id} if step.call_id else call)
        else:
            yield step
    usage = {"promptTokenCount": 7, "candidatesTokenCount": 5, "totalTokenCount": 12}
    yield {**chunk({"text": ""}, finishReason=reason), "usageMetadata": usage}


class Provider(ThreadingHTTPServer):
    """Gives its answers one after the other, the last for ever; `requests` is what came: path and body.

    An answer is a list of steps, or a function that makes one of the request's body.
    """

    daemon_threads, request_queue_size = True, 100

    def __init__(self, *answers: Any) -> None:
        super().__init__(("127.0.0.1", 0), ProviderHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.says(*answers)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def says(self, *answers: Any) -> None:
        """From now on."""
        self.answers, self.requests = answers, list[Json]()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what some tests are about."""


class ProviderHandler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True
    server: Provider

    def log_message(self, format: str, *args: Any) -> None:
        """Not a word."""

    def do_GET(self) -> None:
        """As somebody who has public keys: the answer as it is; where that is nothing, he is out of order."""
        self.server.requests.append({"path": self.path})
        self.send_response(200 if self.server.answers[0] else 500)
        self.end_headers()
        self.wfile.write(self.server.answers[0])

    def do_POST(self) -> None:
        provider, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        path = self.path.removeprefix("http://api.openai.com")
        provider.requests.append({"path": path, "body": body})
        answer = provider.answers[min(len(provider.requests), len(provider.answers)) - 1]
        steps = answer(body) if callable(answer) else answer
        while isinstance(steps[0], (Wait, ConnectionResetError)):
            self.do(steps[0])
            steps = steps[1:]
        speak = chat_completion if path == "/v1/chat/completions" else responses_api
        speak = gemini if path.endswith(":streamGenerateContent?alt=sse") else speak
        code, told = 200, speak(steps, body)
        if isinstance(steps[0], Status):
            error = {"code": steps[0], "message": f"No. You sent:\n{self.headers}", "status": "X"}
            code, told = steps[0], iter([json.dumps({"error": error}).encode()])
        self.send_response(code)
        self.send_header("content-type", "text/event-stream" if code == 200 else "application/json")
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        for step in told:
            self.do(step)

    def do(self, step: Any) -> None:
        """Raises ConnectionResetError where nobody is connected any more."""
        if isinstance(step, Wait):
            step.reached.set()
            while not step.gate.is_set():
                if select.select([self.connection], [], [], 0.005)[0]:
                    step.left.set()
                    raise ConnectionResetError
        elif isinstance(step, float):
            time.sleep(step)
        elif isinstance(step, ConnectionResetError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            raise step
        else:
            data = step if isinstance(step, bytes) else f"data: {json.dumps(step)}\n\n".encode()
            if isinstance(step, dict) and "type" in step:
                data = f"event: {step['type']}\n".encode() + data
            self.wfile.write(data)


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


def env_of(settings: dict[str, str]) -> dict[str, str]:
    return {ck.Settings.env_name(name): value for name, value in settings.items()}


@contextlib.contextmanager
def talking_to(
    protocol: str, *answers: Any, agent: Agent[Any] | None = None, **settings: Any
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


Line = tuple[str, Client, Provider]


@pytest.fixture(scope="module", params=PROTOCOLS)
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    """One app and one provider for all tests of a protocol: to start them takes longer than most tests."""

    @function_tool
    async def raising() -> str:
        raise RuntimeError(f"with {KEY} in its text")

    agent = ck.todo_agent()
    agent.tools += [raising]
    with talking_to(request.param, [], agent=agent) as (client, provider):
        yield request.param, client, provider


def provider_was_shown(request: Json) -> list[tuple[str, str]]:
    """What the model was shown in any protocol: ("user", text), ("call", id), ("output", id) and so on.

    Gemini has no ids: a call has its signature instead, and an output nothing.
    """
    body, shown = request["body"], list[tuple[str, str]]()
    for entry in body.get("input") or body.get("messages") or body["contents"]:
        inner = [entry.get(name) for name in ("content", "parts", "tool_calls")]
        for part in [entry, *(part for parts in inner if isinstance(parts, list) for part in parts)]:
            match {**part, "role": entry.get("role")}:
                case {"role": "system" | "developer"}:
                    pass
                case {"type": "function_call", "call_id": id_} | {"type": "function", "id": id_}:
                    shown.append(("call", id_))
                case {"type": "function_call_output", "call_id": id_} | {"tool_call_id": id_}:
                    shown.append(("output", id_))
                case {"function_call": _}:
                    shown.append(("call", part.get("thoughtSignature", "")))
                case {"function_response": _}:
                    shown.append(("output", ""))
                case {"role": role, "content": str(text)} | {"role": role, "text": text}:
                    shown.append(("assistant" if role == "model" else role, text))
    return shown


# ---- what each of them says arrives, and what each is told is right


def test_the_provider_speaks_the_responses_api_as_its_types_say() -> None:
    hosted = [SEARCHED, FILES, CODE, MCP_CALL, SHELL, LISTED, {**DRAWN, "partial_image_b64": PIXEL}]
    steps = [Think("Hm."), *hosted, "It rains.", CITED, Refuse("No."), Call("echo")]
    for event in responses_api(steps, {"model": "m"}):
        API_EVENTS[event["type"]].model_validate(event)


def test_a_providers_deltas_arrive_as_they_come(line: Line) -> None:
    protocol, client, provider = line
    pause = Wait()
    provider.says([Think("Hm"), Think("m."), "Hel", pause, "lo", "."])
    events = []
    with client.stream("POST", "/chatkit", json={"message": "hi"}) as response:
        for event in plain_events(response):
            events.append(event)
            if event["type"] == "text" and not pause.gate.is_set():
                assert event["content"] == "Hel" and pause.reached.wait(DEADLINE)
                pause.gate.set()
    shown = kinds([event for event in events if event["type"] != "item"])  # which a thought is
    assert shown == ["thread", "thinking", "text", "done"]
    assert [event["content"] for event in of_type(events, "text")] == ["Hel", "lo", "."]
    assert [event["content"] for event in of_type(events, "thinking")] == ["", "Hm", "m."]
    assert events[-1]["status"] == "completed" and events[-1]["usage"] == USAGE
    sent = json.dumps(provider.requests[-1]["body"])
    assert protocol == "responses" or not re.search("reasoning|verbosity", sent)  # OpenAI's own defaults


def test_a_providers_tool_calls_run_and_go_back_to_it_as_they_were(line: Line) -> None:
    protocol, client, provider = line
    ids = ["call_" + "c2lnbmVk" * 250, "call_2"]
    calls = [Call("add_task", {"title": "milk"}, ids[0]), Call("add_task", {"title": "eggs"}, ids[1])]
    provider.says(calls, ["Both ", "are in."], ["Yes."])
    events = client.send_message("add milk and eggs")
    client.send_message("sure?", events[0]["thread_id"])
    made, given = of_type(events, "tool_call"), of_type(events, "tool_result")
    assert [event["args"] for event in made] == [{"title": "milk"}, {"title": "eggs"}]
    assert [event["result"]["title"] for event in given] == ["milk", "eggs"]
    assert [event["id"] for event in made] == [event["id"] for event in given]
    assert said(events) == "Both are in."
    assert events[-1]["usage"] == {name: 2 * count for name, count in USAGE.items()}
    _, within, after = map(provider_was_shown, provider.requests)
    answered = [("call", ids[0]), ("call", ids[1]), ("output", ids[0]), ("output", ids[1])]
    earlier = answered
    if protocol == "gemini":  # outputs stand behind their calls, and signatures are sent within the turn only
        answered = [("call", ids[0]), ("output", ""), ("call", ids[1]), ("output", "")]
        earlier = [("call", ""), ("output", "")] * 2
    asked = ("user", "add milk and eggs")
    assert within == [asked, *answered]
    assert after == [asked, *earlier, ("assistant", "Both are in."), ("user", "sure?")]


@parametrize("early", [True, False])
@parametrize("way", ["cancel", "leave"])
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
    kept = [(row["content"], row["status"]) for row in client.messages(thread)[1:] if row["role"] != "system"]
    assert kept == ([] if early else [("Half", "cancelled")])
    assert said(client.send_message("go on", thread)) == "Well."
    told = json.dumps(provider.requests[1]["body"])
    assert ("Half" in told) != early
    assert told.rindex("hi" if early else "Half") < told.index("stopped") < told.index("go on")


# ---- failing

OOPS, BREAK = b"data: {oops\n\n", ConnectionResetError()
WORTH_A_RETRY = ("rate_limited", "unreachable", "bad_answer", "empty")
STATUSES = {401: "key_rejected", 402: "rate_limited", 429: "rate_limited", 400: "refused", 413: "refused"}
STATUSES |= {403: "key_rejected", 404: "model_not_found", 500: "unreachable", 503: "unreachable"}
Failure = tuple[list[Any], str, str]  # what the provider does; the error's code; what was said until then
FAILURES: dict[str, Failure] = {
    **{str(status): ([Status(status)], code, "") for status, code in STATUSES.items()},
    "reset": ([BREAK], "unreachable", ""),
    "reset in the middle": (["Half ", BREAK], "unreachable", "Half "),
    "not JSON": ([OOPS], "bad_answer", ""),
    "not JSON in the middle": ([*"a long half", OOPS], "bad_answer", "a long half"),
    "no content": ([""], "empty", ""),
    "no room for content": ([End("length")], "bad_answer", ""),
    "refusal": ([Refuse("I can't "), Refuse("do that.")], "refusal", "I can't do that."),
    "refusal in the middle": (["Well, ", Refuse("no.")], "refusal", "Well, no."),
    "a call id twice": ([Call("add_task", {"title": each}, "same") for each in "ab"], "bad_answer", ""),
}
FAILURES_OF_GEMINI: dict[str, Failure | None] = {  # where it, or LiteLLM, is otherwise
    "not JSON": ([OOPS], "unreachable", ""),
    "not JSON in the middle": ([*"a long half", OOPS], "unreachable", "a long half"),
    "no room for content": ([End("MAX_TOKENS")], "empty", ""),
    "refusal": ([Refuse("")], "refusal", "Response withheld by the provider's content filter."),
    "refusal in the middle": None,
    "a call id twice": None,
}
SAFE_TEXTS = re.compile(r"The (model|answer|connection)[A-Za-z' ,:.]+")


@parametrize("failure", FAILURES)
def test_a_provider_that_fails_is_explained_and_the_next_message_works(line: Line, failure: str) -> None:
    protocol, client, provider = line
    case = {**FAILURES, **(FAILURES_OF_GEMINI if protocol == "gemini" else {})}[failure]
    if case is None:
        pytest.skip("Gemini has no such thing")
    steps, code, kept = case
    provider.says(steps)
    events = client.send_message("hi")
    others = client.operate("threads.create", input=user_input("hi"))
    thread, error = events[0]["thread_id"], events[-2]
    assert (error["code"], events[-1]["status"], said(events)) == (code, "failed", kept)
    for each, expected in ((error, code), (others[-1], "custom")):
        assert (each["type"], each["code"], each["allow_retry"]) == ("error", expected, code in WORTH_A_RETRY)
        assert SAFE_TEXTS.fullmatch(each["message"])
    rows = client.messages(thread)
    assert "".join(row["content"] for row in rows if row["role"] == "assistant") == kept
    assert not [row for row in rows if row["status"] == "streaming"]
    assert KEY not in json.dumps([events, others, rows])
    provider.says(["Next."])
    assert said(client.send_message("again", thread)) == "Next."
    told = provider_was_shown(provider.requests[0])
    assert told[0] == ("user", "hi") and told[-1] == ("user", "again")
    assert "".join(text for role, text in told if role == "assistant") == kept


MISFIT = {"error": "These arguments do not fit the parameters of add_task."}
BAD_CALLS: dict[Call, Any] = {  # with their results
    Call("no_such_tool"): "Tool 'no_such_tool' not found.",
    Call("add_task", '{"title": "mi'): MISFIT,
    Call("add_task", {"titel": "milk"}): MISFIT,
    Call("raising"): {"error": "The tool raising failed."},
}


@parametrize("call", BAD_CALLS, ids=lambda call: call.name)
def test_a_failing_tool_call_is_told_to_the_model_which_goes_on(line: Line, call: Call) -> None:
    protocol, client, provider = line
    if protocol == "gemini" and not call.arguments.endswith("}"):
        pytest.skip("Gemini sends arguments as an object")
    provider.says([call], ["Sorry."])
    events = client.send_message("hi")
    assert [event["result"] for event in of_type(events, "tool_result")] == [BAD_CALLS[call]]
    assert said(events) == "Sorry." and events[-1]["status"] == "completed" and KEY not in json.dumps(events)
    assert [item[0] for item in provider_was_shown(provider.requests[1])] == ["user", "call", "output"]
    provider.says(["Next."])
    assert said(client.send_message("again", events[0]["thread_id"])) == "Next."


@parametrize("protocol", PROTOCOLS)
def test_an_answer_that_stops_dead_times_out_and_a_gone_provider_is_unreachable(protocol: str) -> None:
    @function_tool
    async def hanging() -> None:
        await asyncio.Event().wait()

    dead: list[list[Any]] = [[Wait()], ["Half ", Wait()], ["I'll ask.", Call("hanging")]]

    def answer(body: Json) -> list[Any]:
        return next(steps for number, steps in enumerate(dead) if f"message {number}" in json.dumps(body))

    agent = Agent(name="Hanging", tools=[hanging])
    with talking_to(protocol, ["Ready."], agent=agent, turn_timeout=0.8) as (client, provider):
        client.send_message("hi")  # the first of all takes longer
        provider.says(answer)
        turns = at_once(3, lambda number: client.send_message(f"message {number}"))
        provider.says(["Next."])
        for events, kept in zip(turns, ["", "Half ", "I'll ask."], strict=True):
            thread, error = events[0]["thread_id"], events[-2]
            assert (error["code"], error["allow_retry"], said(events)) == ("timeout", True, kept)
            rows = [row for row in client.messages(thread) if row["role"] != "user"]
            assert "".join(row["content"] for row in rows) == kept
            assert not rows or rows[-1]["status"] == "failed"
            assert said(client.send_message("again", thread)) == "Next."
        provider.__exit__()
        assert client.send_message("hi")[-2]["code"] == "unreachable"


def test_what_counts_is_the_status_that_a_provider_gave() -> None:
    """LiteLLM takes a port or a length in the provider's text for a status."""
    guessed, given = RuntimeError("from 127.0.0.1:34033"), RuntimeError()
    guessed.status_code, given.status_code = 403, 503  # type: ignore[attr-defined]  # as libraries do
    guessed.__context__ = given
    with serving(scripted([guessed])) as client:
        assert client.send_message("hi")[-2]["code"] == "unreachable"


# ---- what leaves the machine, and what the log says

WATCHED = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
sys.modules["uvloop"] = None  # its connections pass no audit

def note(event, arguments):
    if event in ("socket.getaddrinfo", "socket.connect"):
        print("called", *(arguments[1] if event == "socket.connect" else arguments)[:2], file=sys.stderr)
sys.addaudithook(note)

import chatkit_server as ck
ck.create_app(model="gpt-x", database=":memory:")
if "litellm" not in sys.modules:
    print("LiteLLM is not imported yet", file=sys.stderr)
os.environ["CHATKIT_MODELS"] = "gemini/gemini-2.5-flash"
sys.exit(ck.main())
"""


@slow
def test_only_the_provider_is_called_and_no_key_that_it_quotes_comes_into_the_log(tmp_path: Path) -> None:
    (tmp_path / "chatkit_server.py").write_text(WATCHED)
    answers = [[Status(401)], ["Half ", b"data: " + KEY.encode() + b"\n\n"], [""], ["Well."]]
    told: list[Json] = []
    with Provider() as provider:
        (settings, _), (others, env) = (pointing_at(provider, protocol) for protocol in ("chat", "gemini"))
        env |= env_of(others) | env_of(settings) | {"CHATKIT_LOG_LEVEL": "debug"}
        with Process(cwd=tmp_path, env=env, module=tmp_path) as server, server.client() as client:
            for model, answer in itertools.product((settings["model"], others["model"]), answers):
                provider.says(answer)
                told += client.send_message("hi", model=model)
            server.stop(signal.SIGTERM)
            printed = "\n".join([*server.lines, server.process.stdout.read(), server.log_file.read_text()])
    assert [event["status"] for event in of_type(told, "done")] == [*["failed"] * 3, "completed"] * 2
    assert "[secret]" in printed and KEY not in printed and KEY not in json.dumps(told)
    own = {"127.0.0.1 0"}  # where it listens
    assert set(re.findall("^called (.+)", printed, re.M)) - own == {f"127.0.0.1 {provider.server_port}"}
    assert "LiteLLM is not imported yet" in printed  # where no model needs it


# ---- choosing a model


GIVEN_MODELS = f"""
demo DemoModel: CHATKIT_MODEL=demo OPENAI_API_KEY=k GEMINI_API_KEY=k
ollama_chat/llama3 LitellmModel: CHATKIT_MODEL=ollama_chat/llama3 OPENAI_API_KEY=k
anthropic/c LitellmModel: CHATKIT_MODEL=anthropic/c ANTHROPIC_API_KEY=k
gpt-x OpenAIResponsesModel: CHATKIT_MODEL=gpt-x OPENAI_API_KEY=k
m OpenAIChatCompletionsModel: CHATKIT_MODEL=m OPENAI_BASE_URL=http://localhost:1234/v1
m OpenAIResponsesModel: CHATKIT_MODEL=m OPENAI_BASE_URL=https://api.openai.com/v1/ OPENAI_API_KEY=k
huggingface/a/b LitellmModel: CHATKIT_MODEL=huggingface/a/b HF_TOKEN=k
azure/gpt-x LitellmModel: CHATKIT_MODEL=azure/gpt-x AZURE_API_KEY=k AZURE_API_BASE=https://a.example
{get_default_model()} OpenAIResponsesModel: OPENAI_API_KEY=k GEMINI_API_KEY=k
gemini/gemini-2.5-flash LitellmModel: GEMINI_API_KEY=k
gemini/gemini-9 LitellmModel: GEMINI_API_KEY=k GEMINI_MODEL=gemini-9
gemini/gemini-9 LitellmModel: GEMINI_API_KEY=k GEMINI_MODEL=gemini/gemini-9
demo DemoModel: OPENAI_API_KEY= GEMINI_API_KEY=
demo DemoModel:
"""


@parametrize("choice", GIVEN_MODELS.split("\n")[1:-1])
def test_the_first_that_is_given_chooses_the_model(choice: str, monkeypatch: Any) -> None:
    chosen, _, given = choice.partition(":")
    for name, _, value in (each.partition("=") for each in given.split()):
        monkeypatch.setenv(name, value)
    models = ck.Models(ck.Settings.from_env())
    assert f"{models.default} {type(models.get_model(models.default)).__name__}" == chosen


# ---- names of models

# A name that cannot work, and what its refusal must say: the variable to set, or the name to use.
WRONG_NAMES = {
    "gpt-x": "OPENAI_API_KEY",
    "openai/gpt-4o": "OPENAI_API_KEY",
    "anthropic/claude-x": "ANTHROPIC_API_KEY",
    "gemini/gemini-2.5-flash": "GEMINI_API_KEY",
    "litellm/gemini/gemini-2.5-flash": "GEMINI_API_KEY",
    "gemini-2.5-flash": "gemini/gemini-2.5-flash",
    "claude-x": "anthropic/claude-x",
    "Gemini/x": "gemini/x",
    "nobody/x": "LiteLLM knows no provider",
    "/": "LiteLLM knows no provider",
}
WHERE_NAMED: dict[str, Callable[[str], tuple[Any, Json]]] = {  # agent and settings
    "CHATKIT_MODEL": lambda name: (None, {"model": name}),
    "CHATKIT_MODELS": lambda name: (None, {"models": f"fast=demo,smart={name}"}),
    "the agent's": lambda name: (Agent(name="A", model=name), {}),
    "of a handoff": lambda name: (Agent(name="A", handoffs=[Agent(name="B", model=name)]), {}),
    "of a tool": lambda name: (Agent(name="A", tools=[Agent(name="B", model=name).as_tool("b", "b")]), {}),
    "of a handoff()": lambda name: (Agent(name="A", handoffs=[handoff(Agent(name="B", model=name))]), {}),
}


@parametrize("name", WRONG_NAMES)
@parametrize("place", WHERE_NAMED)
def test_a_model_that_cannot_work_is_refused_at_the_start(place: str, name: str) -> None:
    agent, settings = WHERE_NAMED[place](name)
    with pytest.raises(ck.SettingsError) as refusal:
        ck.create_app(agent, database=":memory:", **settings)
    told = str(refusal.value)
    assert name.removeprefix("litellm/") in told and WRONG_NAMES[name] in told and "\n" not in told
    assert name in ("gpt-x", "openai/gpt-4o") or "OpenAI" not in told


@parametrize("name", ["litellm/gemini/gemini-2.5-flash", "gemini/gemini-2.5-flash"])
def test_a_name_in_an_agent_means_what_it_means_in_the_settings(name: str) -> None:
    agent = Agent(name="A", model=name)
    with talking_to("gemini", ["Hello."], agent=agent) as (client, provider):
        assert said(client.send_message("hi")) == "Hello."
        assert client.get("/api/config").json()["model"] == "gemini/gemini-2.5-flash"
    assert provider.requests[0]["path"].startswith("/v1beta/models/gemini-2.5-flash:")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LiteLLM's
def test_a_name_with_a_slash_may_be_that_of_a_local_server_which_asks_for_no_key() -> None:
    with talking_to("chat", ["Hello."], model="openai/google/x", openai_api_key=None) as (client, provider):
        assert said(client.send_message("hi")) == "Hello."
    assert provider.requests[0]["body"]["model"] == "google/x"


# ================================================================================= Whatever an agent does
# What an agent of the SDK can do, in both dialects: live, after a restart, and in the model's next input.

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SOURCE = {"type": "url", "url": "https://example.com/oats"}
SEARCH = {"type": "search", "query": "oat milk", "sources": [SOURCE]}
SEARCHED = {"type": "web_search_call", "id": "ws_1", "action": SEARCH}
FILES = {"type": "file_search_call", "id": "fs_1", "queries": ["oats"], "results": [{"filename": "oats.pdf"}]}
CODE: Json = {"type": "code_interpreter_call", "id": "ci_1", "code": "print(6 * 7)"}
CODE |= {"container_id": "c1", "outputs": [{"type": "logs", "logs": "42"}]}
MCP_CALL = {"type": "mcp_call", "id": "mcp_1", "name": "lookup", "server_label": "s", "arguments": "{}"}
DRAWN = {"type": "image_generation_call", "id": "ig_1", "result": PIXEL}
CITED = {"type": "url_citation", "url": "https://e.com", "title": "E", "start_index": 0, "end_index": 3}


@dataclass
class Told:
    """What came of one message: a dialect's events; REST's messages and ChatKit's items after a restart."""

    events: list[Json]
    order: list[str]  # of the events, called as the plain dialect does
    rows: list[Json]
    items: list[Json]
    next_input: list[Any]  # what the model was shown for a further message

    @property
    def roles(self) -> str:
        return " ".join(row["role"] for row in self.rows)


PLAIN_NAMES = {
    "thread.item.done task": "item",
    "assistant_message.content_part.annotation_added": "item",
    "assistant_message.content_part.text_delta": "text",
    "thread.item.removed": "item_removed",
}


@pytest.fixture(params=["plain", "chatkit"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tell(tmp_path: Path, dialect: str) -> Callable[..., Told]:
    """Have an agent answer a message in a dialect; restart; look at what is kept; and send another one."""

    def tell(agent: Any, message: str = "go") -> Told:
        options = {"database": str(tmp_path / "told.db")}
        with serving(agent, **options) as client:
            events = create(client, message) if dialect == "chatkit" else client.send_message(message)
        with serving(agent, **options) as client:
            rows, kept = client.messages(1), items(client)
            client.send_message("and now?", 1)
        names = kinds(events) if dialect == "plain" else shape(events)
        order = [PLAIN_NAMES.get(name, name) for name in names]
        return Told(events, order, rows, kept, shown_to(agent) if isinstance(agent, Agent) else [])

    return tell


@parametrize(
    ("call", "kind", "shows"),
    [
        (SEARCHED, "web_search", ["oat milk", "https://example.com/oats"]),
        (FILES, "file", ["oats", "oats.pdf"]),
        (CODE, "custom", ["Code interpreter", "print(6 * 7)", "42"]),
        (MCP_CALL, "custom", ["lookup"]),
    ],
)
def test_a_hosted_tool_is_an_item_where_it_ran(call: Any, kind: str, shows: list[str], tell: Any) -> None:
    agent = scripted([call, "It is ", "so."], ["Again."])
    told = tell(agent)
    assert told.roles == "user tool assistant" and told.rows[2]["content"] == "It is so."
    assert [item["type"] for item in told.items] == ["user_message", "task", "assistant_message"]
    task = told.items[1]["task"]
    assert (task["type"], task["status_indicator"]) == (kind, "complete")
    assert [text for text in shows if text not in json.dumps(task)] == []
    assert told.order.index("item") < told.order.index("text")
    # A call goes back to its own provider only, which this is not.
    assert [item["role"] for item in told.next_input] == ["user", "assistant", "user"]


def test_what_the_responses_api_streams_arrives_once_and_goes_back_to_it() -> None:
    steps = [Think("Hm."), SEARCHED, CODE, {**DRAWN, "partial_image_b64": PIXEL}, "See ", "this.", CITED]
    with talking_to("responses", steps, ["Again."], agent=Agent(name="A")) as (client, provider):
        events = create(client, "go")
        kept = items(client)
        client.send_message("and now?", 1)
    types = "user_message workflow task task generated_image assistant_message"
    assert " ".join(item["type"] for item in kept) == types
    [partial] = [update["image"] for update in updates_in(events) if "image" in update]
    assert partial["url"].startswith("http")
    [content] = kept[-1]["content"]
    assert content["text"] == "See this." and len(content["annotations"]) == 1
    sent = [item for item in provider.requests[-1]["body"]["input"] if "type" in item]
    assert [item["type"] for item in sent] == [step["type"] for step in (SEARCHED, CODE, DRAWN)]
    assert sent[0]["action"] == SEARCH and "id" not in sent[0]


def test_a_picture_in_the_making_is_shown_to_plain_readers_too() -> None:
    steps = [{**DRAWN, "partial_image_b64": PIXEL}, "There."]
    with talking_to("responses", steps, agent=Agent(name="A")) as (client, _):
        shown = [event["item"] for event in client.send_message("draw") if event["type"] == "item"]
    assert ["image" in item for item in shown] == [False, True, True]
    assert {item["id"] for item in shown} == {shown[0]["id"]}


def test_pictures_are_files_at_urls_of_ours_and_carried_by_nothing_else(tell: Any, tmp_path: Path) -> None:
    shot = ToolOutputImage(image_url=f"data:image/png;base64,{PIXEL}")
    snap = function_tool(lambda: shot, name_override="snap")
    agent = scripted([Call("snap"), DRAWN], ["Look."], ["Again."], tools=[snap])
    told = tell(agent)
    pictures = [item["image"]["url"] for item in told.items if item["type"] == "generated_image"]
    paths = [httpx.URL(picture).raw_path.decode() for picture in pictures]
    assert len(paths) == 2
    assert PIXEL not in json.dumps([told.events, told.rows, told.items])
    with serving(agent, database=str(tmp_path / "told.db")) as client:
        for path in paths:
            response = client.get(path)
            assert response.headers["content-type"] == "image/png" and response.content[1:4] == b"PNG"
        client.delete("/api/conversations/1")
        assert client.get(paths[0]).status_code == 404
    [output] = [item["output"] for item in told.next_input if item.get("type") == "function_call_output"]
    assert output[0]["type"] == "input_image" and PIXEL in output[0]["image_url"]


@parametrize(
    ("given", "source"),
    [
        (CITED, {"type": "url", "url": "https://e.com", "title": "E"}),
        ({"type": "file_citation", "file_id": "f", "filename": "a.txt", "index": 2}, {"filename": "a.txt"}),
        ({"type": "container_file_citation", "file_id": "f", "filename": "b.csv"}, {"filename": "b.csv"}),
        ({"type": "file_path", "file_id": "f", "index": 1}, None),
        ({"type": "url_citation", "address": "https://e.com"}, None),
    ],
)
def test_citations_become_annotations_and_an_odd_one_costs_itself(given: Any, source: Any, tell: Any) -> None:
    told = tell(scripted(["As said ", given, "there."], ["Again."]))
    [content] = told.items[-1]["content"]
    assert content["text"] == "As said there."
    assert len(content["annotations"]) == told.order.count("item") == bool(source)
    assert not source or content["annotations"][0]["source"].items() >= source.items()


# ---- approvals


@function_tool(needs_approval=True)
def wipe(path: str) -> str:
    """Remove a file."""
    return f"wiped {path}"


def asking(*paths: str) -> Agent[Any]:
    calls = [Call("wipe", {"path": path}, f"c{path}") for path in paths]
    return scripted(calls, ["Done."], ["Again."], tools=[wipe])


def answer(client: Client, answers: Any, dialect: str) -> list[Json]:
    """The events after answers to the question in conversation 1."""
    [item] = items(client, "structured_input")
    body = {"item_id": item["id"], "input": {"status": "answered", "answers": answers}}
    if dialect == "chatkit":
        return list(exchange(client, "threads.add_structured_input", **body))
    response = client.post("/api/conversations/1/answers", json={"item_id": item["id"], **body["input"]})
    return list(plain_events(response))


def outcomes(agent: Agent[Any]) -> dict[str, str]:
    return {item["call_id"]: item["output"] for item in shown_to(agent) if "output" in item}


def test_a_tool_that_needs_approval_asks_and_goes_on_after_a_restart(tmp_path: Path, dialect: str) -> None:
    agent, file = asking("1", "2", "3"), str(tmp_path / "a.db")
    with serving(agent, database=file) as client:
        create(client, "go") if dialect == "chatkit" else client.send_message("go")
        [item] = items(client, "structured_input")
    assert [each["id"] for each in item["inputs"]] == ["c1", "c2", "c3"] and item["status"] == "pending"
    assert "wipe" in item["inputs"][0]["question"] and '"1"' in item["inputs"][0]["question"]
    approve, reject = (option["value"] for option in item["inputs"][0]["options"])
    assert (approve.split()[0], reject.split()[0]) == ("Approve", "Reject")
    answers = {"c1": {"values": [approve]}, "c2": {"values": [reject]}, "c3": {"values": [approve]}}
    decided = {"c1": "wiped 1", "c2": "The person rejected this call.", "c3": "wiped 3"}
    with serving(agent, database=file) as client:
        events = answer(client, answers, dialect)
        assert "Done." in json.dumps(events) and outcomes(agent) == decided
        assert dialect == "chatkit" or events[-1]["usage"] == USAGE
        assert [row["status"] for row in client.messages(1)] == ["done"] * 6
        assert client.send_message("more", 1)[-1]["status"] == "completed"
    assert outcomes(agent) == decided


SHELL: Json = {"type": "shell_call", "id": "sh_1", "call_id": "c1"}
SHELL["action"] = {"commands": ["ls -l"], "timeout_ms": None, "max_output_length": None}
LISTED: Json = {"type": "shell_call_output", "id": "so_1", "call_id": "c2", "max_output_length": None}
LISTED["output"] = [{"stdout": "b.txt", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]


def test_a_shell_here_asks_and_is_kept_with_its_output_and_one_of_the_providers_too() -> None:
    here = ShellTool(executor=lambda request: "a.txt", needs_approval=True)
    there = SHELL | {"id": "sh_2", "call_id": "c2"}
    unanswered = SHELL | {"id": "sh_3", "call_id": "c3"}
    steps: Any = [SHELL], ["One file."], [there, LISTED, "Another."], [unanswered], ["As you like."]
    with talking_to("responses", *steps, agent=Agent(name="A", tools=[here])) as (client, provider):
        client.send_message("go")
        [asked] = items(client, "structured_input")[0]["inputs"]
        assert "ls -l" in asked["question"]
        approved = answer(client, {"c1": {"values": ["Approve"]}}, "plain")
        assert said(approved) == "One file." and of_type(approved, "tool_result")[0]["result"] == "a.txt"
        assert said(client.send_message("there", 1)) == "Another."
        client.send_message("again", 1)
        assert said(client.send_message("never mind", 1)) == "As you like."
        shown = [
            (task["task"]["status_indicator"], task["task"]["content"]) for task in items(client, "task")
        ]
    assert [indicator for indicator, _ in shown] == ["complete", "complete", "none"]
    assert "a.txt" in shown[0][1] and "b.txt" in shown[1][1]
    sent = [item.get("type") for item in provider.requests[-1]["body"]["input"]]
    assert [kind for kind in sent if kind and "shell" in kind] == ["shell_call", "shell_call_output"] * 2


def test_an_approval_may_be_in_words_and_its_agent_may_be_gone(tmp_path: Path) -> None:
    agent, file = asking("1", "2"), str(tmp_path / "a.db")
    with serving(agent, database=file) as client:
        client.send_message("go")
        said_so = {"c1": {"values": ["approve, but be quick"]}, "c2": {"values": ["Later."]}}
        answer(client, said_so, "plain")
        assert outcomes(agent) == {"c1": "wiped 1", "c2": "The person rejected this call. They said: Later."}
    billing = scripted([Call("wipe", {"path": "1"}, "c1")], name="Billing", tools=[wipe])
    desk = scripted([Call("transfer_to_billing", {}, "h1")], name="Desk", handoffs=[billing])
    with serving(desk, database=str(tmp_path / "b.db")) as client:
        client.send_message("go")
    with serving(scripted(["Here."]), database=str(tmp_path / "b.db")) as client:
        [*_, error, done] = answer(client, {"c1": {"values": ["Approve wipe"]}}, "plain")
        assert (error["code"], done["status"]) == ("refused", "failed") and "not here" in error["message"]
        assert said(client.send_message("anyone?", 1)) == "Here."


def test_an_agent_may_be_a_tool_that_gives_its_words_and_asks_for_approval(tmp_path: Path) -> None:
    inner, file = asking("1"), str(tmp_path / "a.db")
    helper = inner.as_tool("helper", "Helps.")
    outer = scripted([Call("helper", {"input": "x"}, "o1")], ["All done."], tools=[helper])
    with serving(outer, database=file) as client:
        client.send_message("go")
        [asked] = items(client, "structured_input")[0]["inputs"]
    with serving(outer, database=file) as client:
        answers = {asked["id"]: {"values": [asked["options"][0]["value"]]}}
        assert said(answer(client, answers, "plain")) == "All done."
        said_last = [row["content"] for row in client.messages(1) if row["role"] != "item"]
    assert said_last == ["go", "Done.", "All done."]
    assert outcomes(inner) == {"c1": "wiped 1"}


# ---- handoffs, tools, guardrails


@parametrize("kind", ["agent", "handoff", "filter"])
def test_a_handoff_is_shown_and_lasts(kind: str, tmp_path: Path, tell: Any) -> None:
    billing = scripted(["Billing here."], ["Still billing."], name="Billing")
    passed = handoff(billing, input_filter=remove_all_tools if kind == "filter" else None)
    handoffs = [billing if kind == "agent" else passed]
    root = scripted([Call("transfer_to_billing", {}, "h1")], ["The root."], handoffs=handoffs, name="Root")
    told = tell(root)
    assert told.roles == "user tool assistant"
    assert told.rows[1]["tool_calls"][0]["name"] == "transfer_to_billing"
    assert json.loads(told.rows[1]["content"]) == {"assistant": "Billing"}
    assert len(told.next_input) == len(cast(Script, root.model).seen) == 1
    assert shown_to(billing)[-1]["content"] == "and now?"
    with serving(root, database=str(tmp_path / "told.db")) as client:  # which answers the first message again
        client.post("/api/conversations/1/retry", json={"message_id": 1}).raise_for_status()
        assert client.messages(1)[-1]["content"] == "The root."
    alone = scripted(["Who?"], name="Root")  # the agent that had the last word is no longer there
    with serving(alone, database=str(tmp_path / "told.db")) as client:
        assert said(client.send_message("hello", 1)) == "Who?"


@parametrize("says", ["Done.", ""])
def test_a_workflow_that_is_left_open_ends_with_the_next_message_or_the_turn(says: str, tell: Any) -> None:
    @function_tool
    async def work(wrapper: RunContextWrapper[ck.TurnContext]) -> None:
        await wrapper.context.add_workflow_task(
            {"type": "custom", "title": "Looking", "status_indicator": "loading"}
        )

    told = tell(scripted([Call("work")], [says], tools=[work]))
    [workflow] = [item["workflow"] for item in told.items if item["type"] == "workflow"]
    assert workflow["summary"] == {"duration": 0}
    assert {row["status"] for row in told.rows} == {"done"}


def test_what_a_tool_streams_is_a_message_of_its_own(tell: Any) -> None:
    @function_tool
    async def mumble(wrapper: RunContextWrapper[ck.TurnContext]) -> str:
        await wrapper.context.stream({"type": "text", "content": "Hm."})
        return "ok"

    told = tell(scripted([Call("mumble")], ["Done."], tools=[mumble]))
    assert [row["content"] for row in told.rows] == ["go", "ok", "Hm.", "Done."]


class Late(Script):
    """Streams nothing but its end."""

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        *_, end = [event async for event in super().stream_response(*args, **kwargs)]
        yield end


def test_a_model_that_streams_only_its_end_says_it_all_once(tell: Any) -> None:
    model = Late(["Let me see.", Call("echo", {"text": "x"})], ["Done."])
    told = tell(Agent(name="Late", model=model, tools=[echo]))
    assert told.roles == "user assistant tool assistant"
    assert [told.rows[1]["content"], told.rows[3]["content"]] == ["Let me see.", "Done."]


@parametrize(("calls", "says"), [("nothing", []), ("all nothing", ["42"]), ("look", [])])
def test_stopping_at_a_tool_says_what_it_returns_to_the_person(calls: str, says: Any, tell: Any) -> None:
    def look(wrapper: RunContextWrapper[ck.TurnContext]) -> ck.ClientTool:
        return wrapper.context.client_tool("look")

    values = {"nothing": None, "all": "42"}.items()
    tools = [function_tool(lambda value=value: value, name_override=name) for name, value in values]
    steps = [Call(name) for name in calls.split()]
    told = tell(scripted(steps, tools=[*tools, function_tool(look)], tool_use_behavior="stop_on_first_tool"))
    assert [row["content"] for row in told.rows if row["role"] == "assistant"] == says
    assert not re.search(r"None|ClientTool\(", json.dumps(told.events))


def test_structured_output_is_a_code_block_and_the_model_sees_it_as_it_was(tell: Any) -> None:
    output_type = AgentOutputSchema(dict[str, int], strict_json_schema=False)
    told = tell(scripted(['{"count"', ": 3}"], output_type=output_type))
    assert told.rows[-1]["content"] == '```json\n{"count": 3}\n```'
    assert told.next_input[1]["content"] == '{"count": 3}'


@parametrize("error", [SystemExit, KeyboardInterrupt])
@parametrize("is_async", [False, True])
def test_a_tool_that_exits_fails_like_any_other(error: Any, is_async: bool) -> None:
    def leave() -> str:
        raise error

    async def leave_async() -> str:
        return leave()

    tool = function_tool(leave_async if is_async else leave, name_override="leave")
    with serving(scripted([Call("leave")], ["It failed."], tools=[tool])) as client:
        events = client.send_message("go")
        assert "failed" in json.dumps(of_type(events, "tool_result")) and said(events) == "It failed."
        assert client.get("/health").status_code == 200


async def no_secrets(context: Any, agent: Any, text: Any) -> GuardrailFunctionOutput:
    await asyncio.sleep(0.02)
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered="secret" in json.dumps(text))


@parametrize("parallel", [True, False])
def test_a_message_that_a_guardrail_blocks_is_left_out_of_what_follows(parallel: bool) -> None:
    guardrail = input_guardrail(run_in_parallel=parallel)(no_secrets)
    agent = scripted(["Here ", "it is."], ["Fine."], input_guardrails=[guardrail])
    with serving(agent) as client:
        assert of_type(client.send_message("the secret"), "error")[0]["code"] == "guardrail"
        assert client.send_message("something else", 1)[-1]["status"] == "completed"
        assert {row["status"] for row in client.messages(1)[:-2]} == {"blocked"}
    assert [item["content"] for item in shown_to(agent)] == ["something else"]


def test_what_a_guardrail_blocks_of_a_client_tools_output_is_left_out_too() -> None:
    agent = doing(lambda context: then(context.client_tool("look")), ["Fine."], answer=["Never said."])
    agent.input_guardrails = [input_guardrail(run_in_parallel=False)(no_secrets)]
    with serving(agent) as client:
        client.send_message("go")
        client.post("/api/conversations/1/tool_output", json={"result": "the secret"})
        client.send_message("something else", 1)
        assert [row["status"] for row in client.messages(1)] == ["blocked", "blocked", "done", "done"]
    assert [item["content"] for item in shown_to(agent)] == ["something else"]


def test_what_an_output_guardrail_blocks_is_removed(tell: Any) -> None:
    turns: list[Any] = [[Call("echo", {"text": "x"})], ["The secret."], ["Fine."]]
    told = tell(scripted(*turns, output_guardrails=[output_guardrail(no_secrets)]))
    assert told.roles == "user tool" and "item_removed" in told.order
    assert "secret" not in json.dumps([told.rows, told.next_input])
    assert told.rows[1]["error"]["code"] == "guardrail"


# ---- tools side by side, and failures while they run


async def then(value: Any) -> Any:
    return value


STEP = {"type": "custom", "title": "Looking", "status_indicator": "loading"}


def test_tools_that_speak_side_by_side_leave_nothing_open() -> None:
    async def talk(wrapper: RunContextWrapper[ck.TurnContext]) -> str:
        for word in ("one", "two", "three"):
            await wrapper.context.stream({"type": "text", "content": word})
            await wrapper.context.add_workflow_task(STEP)
            await wrapper.context.say(word)
            await wrapper.context.start_workflow({"type": "custom", "tasks": [STEP]})
        return "ok"

    with serving(scripted([Call("talk")] * 4, ["Done."], ["More."], tools=[function_tool(talk)])) as client:
        events = create(client)
        assert {row["status"] for row in client.messages(1)} == {"done"}
        kept = {item["id"]: item for item in items(client)}
    done = {
        item["id"]: item for item in items_in([each for each in events if each["type"] == "thread.item.done"])
    }
    assert kept == done
    last = [
        next(i for i, event in reversed([*enumerate(events)]) if key in json.dumps(event)) for key in done
    ]
    assert all(events[i]["type"] == "thread.item.done" for i in last)


def test_a_client_tool_call_beside_another_tool_is_that_of_the_tool_that_asked() -> None:
    async def choose(wrapper: RunContextWrapper[ck.TurnContext]) -> str:
        wrapper.context.client_tool_call = {"name": "look", "arguments": {}}
        return "asked"

    calls = [Call("echo", {"text": "x"}, "c1"), Call("choose", {}, "c2")]
    agent = scripted(calls, ["Done."], tools=[function_tool(choose), echo])
    with serving(agent) as client:
        client.send_message("go")
        client.post("/api/conversations/1/tool_output", json={"result": "seen"})
    assert outcomes(agent) == {"c1": '{"echo": "x"}', "c2": "seen"}


def test_a_client_tool_call_of_an_agent_used_as_a_tool_waits_as_that_tools() -> None:
    inner = doing(lambda context: then(context.client_tool("look")), answer=["Asked."])
    agent = scripted(
        [Call("helper", {"input": "x"}, "o1")], ["Done."], tools=[inner.as_tool("helper", "Helps.")]
    )
    with serving(agent) as client:
        client.send_message("go")
        [call] = items(client, "client_tool_call")
        client.post("/api/conversations/1/tool_output", json={"result": "seen"})
    assert (call["name"], call["call_id"], outcomes(agent)) == ("look", "o1", {"o1": "seen"})


def test_calls_side_by_side_are_all_told_to_the_model_after_a_stop() -> None:
    wait = Wait()

    async def work(wrapper: RunContextWrapper[ck.TurnContext]) -> None:
        await wait.pass_through()

    agent = scripted([Call("work", {}, "c1"), Call("work", {}, "c2")], ["Yes."], tools=[function_tool(work)])
    with answering(agent, wait) as (client, events):
        client.post("/api/conversations/1/cancel")
        assert events.result(DEADLINE)[-1]["status"] == "cancelled"
        client.send_message("and now?", 1)
    assert [*outcomes(agent)] == ["c1", "c2"]


def test_what_a_tool_changes_of_the_thread_stands_beside_what_the_person_changes() -> None:
    wait = Wait()

    async def work(context: ck.TurnContext) -> None:
        context.thread.title = "Of the tool"
        await wait.pass_through()

    with answering(doing(work), wait) as (client, events):
        client.patch("/api/conversations/1", json={"metadata": {"of": "the person"}})
        wait.gate.set()
        events.result(DEADLINE)
        kept = client.get("/api/conversations/1").json()
    assert (kept["title"], kept["metadata"]) == ("Of the tool", {"of": "the person"})


def test_half_a_calls_arguments_are_not_sent_again(tell: Any) -> None:
    told = tell(scripted([Call("echo", '{"text": "so')], ["Well."], ["Again."]))
    assert [item["arguments"] for item in told.next_input if "arguments" in item] == ["{}"]


def test_an_event_that_cannot_be_kept_fails_the_turn_at_once() -> None:
    picture = function_tool(
        lambda: ToolOutputImage(image_url="data:image/png;base64,A"), name_override="draw"
    )
    steps: Any = [Call("draw")], [Call("echo", {"text": "x"})], ["Done."]
    with serving(scripted(*steps, tools=[picture, echo]), turn_timeout=DEADLINE) as client:
        assert of_type(client.send_message("go"), "error")[0]["code"] == "internal"
        assert client.send_message("more", 1)[-1]["status"] == "completed"


def test_an_action_may_speak_before_the_agent_does() -> None:
    async def on_action(context: ck.TurnContext, action: Json, item: Any) -> AsyncIterator[str]:
        yield "Let me ask. "
        await context.answer()

    with serving(scripted(["First."], ["The answer."]), on_action=on_action) as client:
        client.send_message("go")
        exchange(client, "threads.custom_action", action={"type": "ask"})
        assert [row["content"] for row in client.messages(1)[1:]] == ["First.", "Let me ask. ", "The answer."]


def test_what_grows_is_kept_and_shown_to_plain_readers_as_it_grows() -> None:
    wait = Wait()

    async def work(context: ck.TurnContext) -> None:
        async def states() -> AsyncIterator[Json]:
            for count in range(1, 3):
                yield {"type": "Card", "children": [{"type": "Divider"}] * count}
            await context.add_workflow_task(STEP)
            await context.add_workflow_task(STEP)
            await wait.pass_through()

        await context.stream_widget(states())

    with answering(doing(work), wait) as (client, events):
        widget, workflow = (row["item"] for row in client.messages(1)[2:])
        assert len(widget["widget"]["children"]) == len(workflow["workflow"]["tasks"]) == 2
        wait.gate.set()
        grown = items_in(events.result(DEADLINE))
    assert [len(item["widget"]["children"]) for item in grown if item["type"] == "widget"] == [1, 2, 2]
    assert [len(item["workflow"]["tasks"]) for item in grown if item["type"] == "workflow"] == [1, 2, 2]


# ---- functions and generators

waiting = {"wait": Wait(), "stream": Wait()}
BEGUN = {"type": "thread.item.added", "item": {"id": "m1", "type": "assistant_message", "content": []}}
GROWS = {"type": "assistant_message.content_part.text_delta", "content_index": 0, "delta": "As the SDK does."}


class Panic(BaseException):
    pass


async def chatty(context: ck.TurnContext, history: list[Any]) -> AsyncIterator[Any]:
    """Does what the last message says."""
    message = history[-1]["content"]
    if message != "nothing":
        yield "You said: "
    if message == "raise":
        raise ValueError("on purpose")
    if message == "panic":
        raise Panic
    if message == "stream":
        yield BEGUN
        yield {"type": "thread.item.updated", "item_id": "m1", "update": GROWS}
    if message in waiting:
        await waiting[message].pass_through()
    for _ in range(10_000 if message == "much" else message == "hello"):
        yield f"{message} "
    if message == "hello":
        yield {"type": "progress", "content": "thinking", "icon": None}
        yield {"type": "item", "item": {"type": "widget", "widget": CARD, "copy_text": "hi"}}


def test_a_generator_is_an_agent(tell: Any) -> None:
    told = tell(chatty, "hello")
    assert told.roles == "user assistant item"
    assert told.rows[1]["content"] == "You said: hello " and told.items[2]["widget"] == CARD


def test_what_a_tool_guardrail_rejects_is_told_to_the_model() -> None:
    @tool_input_guardrail
    async def never(data: Any) -> Any:
        return ToolGuardrailFunctionOutput.reject_content("not allowed")

    tool = function_tool(lambda: "ran", name_override="run")
    tool.tool_input_guardrails = [never]
    agent = scripted([Call("run", {}, "c1")], ["I see."], tools=[tool])
    with serving(agent) as client:
        assert said(client.send_message("go")) == "I see."
    assert outcomes(agent) == {"c1": "not allowed"}


TALK = {"raise": ("failed", ["You said: "]), "wait": ("cancelled", ["You said: "])}
TALK["stream"] = ("cancelled", ["You said: ", "As the SDK does."])
TALK |= {"much": ("completed", ["You said: " + "much " * 10_000]), "nothing": ("completed", [])}
TALK["panic"] = TALK["raise"]  # by what is no Exception


@parametrize("message", TALK)
def test_a_generator_may_raise_have_much_or_nothing_to_say_and_be_stopped(
    message: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(ck, "STOP_WITHIN", 0.1)
    status, answers = TALK[message]
    with serving(chatty) as client, ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.send_message, message)
        if message in waiting:
            assert waiting[message].reached.wait(DEADLINE)
            assert client.post("/api/conversations/1/cancel").status_code == 200
        events = future.result(DEADLINE)
        assert status != "failed" or events[-2]["message"] == "Something went wrong while answering."
        assert events[-1]["status"] == status and said(events) == "".join(answers)
        assert [row["content"] for row in client.messages(1)[1:] if row["role"] == "assistant"] == answers


def test_a_function_makes_the_agent_of_each_turn() -> None:
    made: list[Any] = []

    async def make(context: ck.TurnContext) -> Agent[Any]:  # or `def`, as below
        made.append((context.user_id, context.tool_choice, context.thread.title))
        return scripted([f"As {context.tool_choice}."])

    with serving(make) as client:
        assert said(client.send_message("hi", tool_choice="poet")) == "As poet."
    assert made == [("local", "poet", "hi")]


async def test_without_a_server_an_answer_goes_on_and_leaving_stops_it(tmp_path: Path, caplog: Any) -> None:
    wait, file = Wait(), tmp_path / "left.db"
    agent = scripted(["Ready."], ["So far. ", wait])
    async with ck.Store(file) as store:
        with pytest.raises(ck.Refused, match="Conversation not found"):
            await anext(ck.stream_agent("x", agent=agent, store=store, conversation_id=99))
        events = [event async for event in ck.stream_agent("hi", agent=agent, store=store)]
        assert kinds(events) == ["thread", "thinking", "text", "done"]
        async for event in ck.stream_agent("go on", agent=agent, store=store, conversation_id=1):
            if event["type"] == "text":
                break
    answers = rows_of(file, "SELECT status FROM messages WHERE role = 'assistant'")
    assert (answers, wait.left.is_set()) == ([("done",), ("cancelled",)], True)
    assert_no_traceback(caplog)


# ---- MCP

TINY_MCP = """
import os
from mcp.server import MCPServer
app = MCPServer("tiny")
@app.tool()
def add(a: int, b: int) -> str:
    return str(a + b)
@app.tool()
def die() -> str:
    os._exit(1)
app.run()
"""


def test_mcp_servers_are_connected_also_anew_and_one_that_cannot_be_is_a_warning(
    tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "tiny.py").write_text(TINY_MCP)
    params: Any = {"command": sys.executable, "args": [str(tmp_path / "tiny.py")]}
    good = MCPServerStdio(params, name="tiny", client_session_timeout_seconds=20)
    bad = MCPServerStdio(cast(Any, {"command": str(tmp_path / "nothing")}), name="broken")
    three: Any = [Call("add", {"a": 1, "b": 2})], ["Three."]
    agent = scripted(*three, [Call("die", {})], *three, tools=[], mcp_servers=[good, bad])
    app, outer = make_app(agent), FastAPI()
    outer.mount("/inner", app)
    outer.state.chat = app.state.chat
    with ck.serve_in_background(outer) as url, Client(base_url=f"{url}/inner") as client:
        first, died, anew = (client.send_message("go") for _ in range(3))
    for events in (first, anew):
        assert of_type(events, "tool_result")[0]["result"] == "3" and said(events) == "Three."
    assert died[-1]["status"] == "failed"
    assert any("broken" in record.getMessage() for record in caplog.records if record.levelname == "WARNING")


@slow
def test_mcp_servers_that_a_function_makes_for_each_answer_do_not_pile_up(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY_MCP)
    made: list[MCPServerStdio] = []

    def make(context: ck.TurnContext) -> Agent[Any]:
        made.append(MCPServerStdio({"command": sys.executable, "args": [str(tmp_path / "tiny.py")]}))
        return scripted(["Hi."], mcp_servers=made[-1:])

    with serving(make, turn_timeout=DEADLINE) as client:
        assert said(client.send_message("go")) == "Hi." and made[0].session
        with pytest.MonkeyPatch.context() as patch:
            later = time.monotonic() + DEADLINE + 1
            patch.setattr(
                "chatkit_server.time", SimpleNamespace(**{**vars(time), "monotonic": lambda: later})
            )
            client.send_message("go")
        assert [bool(server.session) for server in made] == [False, True]
    assert made[-1].session is None


# ======================================================================================= the ChatKit protocol
# The types of the official SDK judge what `exchange()` sends and gets, where it is installed.

SDK = TEST_ALL or importlib.util.find_spec("chatkit") is not None


@functools.cache
def sdk_type(name: str) -> Any:
    """Reads and writes a type of the SDK; Page[...] too."""
    types, pydantic = optional("chatkit.types"), optional("pydantic")
    kind = getattr(types, name.removeprefix("Page "))
    return pydantic.TypeAdapter(types.Page[kind] if name.startswith("Page ") else kind)


ANSWER_TYPES = {
    "threads.list": "Page Thread", "threads.get_by_id": "Thread", "threads.update": "Thread",
    "items.list": "Page ThreadItem", "threads.sync_custom_action": "SyncCustomActionResponse",
    "attachments.create": "Attachment", "input.transcribe": "TranscriptionResult",
}  # fmt: skip


def canonical(value: Any) -> str:
    """JSON as text, without its times, which the SDK writes in another way."""
    return re.sub('"created_at": "[^"]*"', "", json.dumps(value, sort_keys=True))


def validated(operation: str, answer: Any) -> Any:
    """An answer, once the SDK's types have read it and written it again unchanged."""
    streamed = isinstance(answer, list)
    name = "ThreadStreamEvent" if streamed else ANSWER_TYPES.get(operation)
    assert name or answer == {}, operation
    for each in (answer if streamed else [answer]) if SDK and name else ():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it would rather have templates
            kind = sdk_type(name)
            again = kind.dump_python(kind.validate_python(each), mode="json", exclude_none=True)
        assert canonical(again) == canonical(each)
    return answer


def asked(operation: str, **params: Any) -> Json:
    """A request's body; in thread 1 where no other is named."""
    elsewhere = operation in ("threads.create", "threads.list", "input.transcribe")
    at = {} if elsewhere or operation.startswith("attachments.") else {"thread_id": "1"}
    return {"type": operation, "params": {**at, **params}}


def exchange(client: Client, operation: str, **params: Any) -> Any:
    """A request that the SDK's types accept, and its answer, which they accept too."""
    body = asked(operation, **params)
    if SDK:
        sdk_type("ChatKitReq").validate_python(body)
    return validated(operation, client.operate(operation, **body["params"]))


def refused(client: Client, operation: str, **params: Any) -> tuple[int, str]:
    """A status, and what is said; an `error` event is 200, or 503 where it may be tried again."""
    response = client.post("/chatkit", json=asked(operation, **params))
    if response.status_code == 200:
        [event] = validated(operation, chatkit_events(response.text))
        assert event["type"] == "error" and event["code"] == "custom"
        return 503 if event["allow_retry"] else 200, event["message"]
    assert 400 <= response.status_code < 500, response.text
    detail = str(response.json()["detail"])
    assert response.json() == {"detail": detail, "message": detail} and detail
    return response.status_code, detail


def create(client: Client, text: str = "hello", **fields: Any) -> list[Json]:
    """Begin a thread."""
    return list(exchange(client, "threads.create", input=user_input(text, **fields)))


def send(client: Client, text: str, thread_id: str = "1", **fields: Any) -> list[Json]:
    """Go on in a thread."""
    message = user_input(text, **fields)
    return list(exchange(client, "threads.add_user_message", thread_id=thread_id, input=message))


def items(client: Client, *types: str, thread_id: str = "1") -> list[Json]:
    """What is in a thread, oldest first; only of some types where those are given."""
    page = exchange(client, "items.list", thread_id=thread_id, limit=1000, order="asc")
    assert not page["has_more"]
    return [item for item in page["data"] if not types or item["type"] in types]


def texts(client: Client) -> list[str]:
    """What the person and the model said."""
    return [item["content"][0]["text"] for item in items(client, "user_message", "assistant_message")]


def items_in(events: list[Json], *types: str) -> list[Json]:
    """The items that events bring."""
    found = [event["item"] for event in events if "item" in event]
    return [item for item in found if not types or item["type"] in types]


def last_item(events: list[Json]) -> Json:
    return items_in(events)[-1]


def updates_in(events: list[Json]) -> list[Json]:
    return [event["update"] for event in events if "update" in event]


def shape(events: list[Json]) -> list[str]:
    """Event types; with the type of the item where there is one, and for an update the type of that."""
    types = [(event["type"], event.get("item", {}).get("type"), event.get("update", {})) for event in events]
    return [update.get("type") or (f"{event} {item}" if item else event) for event, item, update in types]


CARD = {"type": "Card", "children": [{"id": "t", "type": "Text", "value": "hi"}]}
CHOICE = {"type": "multiple_choice", "id": "q1", "question": "Which?", "multiple": False}
CHOICE["options"] = [{"value": "a"}, {"value": "b"}]
SEVERAL = {**CHOICE, "id": "q2", "question": "Which ones?", "multiple": True}
OPEN = {"type": "freeform", "id": "q3", "question": "Why?", "description": "In your words"}


@function_tool
async def choose(wrapper: Wrapper) -> Any:
    return wrapper.context.client_tool("get_selection", {"x": 1})


@function_tool
async def survey(wrapper: Wrapper) -> Any:
    return wrapper.context.ask([CHOICE, SEVERAL, OPEN])


@function_tool
async def draw(wrapper: Wrapper) -> str:
    return str(await wrapper.context.widget(CARD, copy_text="a card"))


@function_tool
async def bustle(wrapper: Wrapper) -> None:
    await wrapper.context.progress("Searching…", icon="search")
    await wrapper.context.effect("flash", {"times": 2, "colour": None})
    await wrapper.context.notice("warning", "Slow today", title="Mind")


@function_tool
async def give_back(what: str) -> str:
    return what


TOOLBOX = Agent[Any](name="Demo", tools=[give_back, choose, survey, draw])  # calls what a person names


def talker(*responses: list[Any]) -> Agent[Any]:
    """A scripted agent with all the tools above."""
    return scripted(*responses, tools=[echo, choose, survey, draw, bustle, wipe])


def shown(agent: Agent[Any]) -> str:
    """All that the model was given at its last call, as text."""
    return json.dumps(shown_to(agent), ensure_ascii=False)


async def redraw(context: ck.TurnContext, action: Json, item: Json | None) -> None:
    """An action handler: says "changed" on the widget, or fails as the action asks."""
    if action["type"] == "refuse":
        raise ValueError("no such action")
    if action["type"] == "break":
        raise RuntimeError("a bug in the handler")
    if item is not None:
        await context.replace_widget(item["id"], item["widget"], copy_text="changed")


@pytest.fixture
def chat() -> Iterator[Client]:
    """A server that says ok."""
    with serving(talker(["ok"])) as client:
        yield client


TOKENS: list[Any] = ["tok ", "tok ", "tok "]
MESSAGE = ["thread.item.done user_message", "stream_options"]
PART = "assistant_message.content_part."
SPOKEN = [f"{PART}added", *[f"{PART}text_delta"] * 3, f"{PART}done"]
ANSWER = ["thread.item.added assistant_message", *SPOKEN, "thread.item.done assistant_message"]
CALLED = [*MESSAGE, "progress_update"]


def test_the_events_are_those_of_the_recorded_exchange_and_what_they_end_in_is_stored(tmp_path: Path) -> None:
    agent = talker(
        *[TOKENS] * 3, [Call("echo", {"text": "x"})], TOKENS, [Call("choose")], TOKENS,
        [Call("draw")], TOKENS, [Call("survey")], TOKENS, [RuntimeError("boom")], [Call("bustle")], [],
    )  # fmt: skip
    database, every = str(tmp_path / "chat.db"), list[Json]()
    with serving(agent, on_action=redraw, database=database) as client:

        def exchanged(operation: str, **params: Any) -> list[str]:
            events = exchange(client, operation, **params)
            every.extend(events)
            return [event for event in shape(events) if event != "thread.item.added task"]  # the one addition

        def message(text: str) -> list[str]:
            return exchanged("threads.add_user_message", input=user_input(text))

        events = create(client, "hello")
        assert shape(events) == ["thread.created", *MESSAGE, *ANSWER]
        empty = {"annotations": [], "text": "", "type": "output_text"}
        full = {**empty, "text": "tok tok tok "}
        parts: list[Any] = [{"content": empty}, *[{"delta": "tok "}] * 3, {"content": full}]
        updates = zip(SPOKEN, parts, strict=True)
        assert updates_in(events) == [{"type": kind, "content_index": 0, **part} for kind, part in updates]
        assert [item["content"] for item in items_in(events, "assistant_message")] == [[], [full]]
        assert message("again") == [*MESSAGE, *ANSWER]
        assert exchanged("threads.retry_after_item", item_id="1") == ["stream_options", *ANSWER]
        assert message("task") == [*CALLED, "thread.item.done task", *ANSWER]
        added, done = items_in(every, "task")
        assert (added["id"], added["task"]["status_indicator"]) == (done["id"], "loading")
        assert (done["task"]["title"], done["task"]["status_indicator"]) == ("echo", "complete")
        assert {"type": "progress_update", "text": "Running echo"} in every
        assert '"x"' in done["task"]["content"]
        # The recorded server showed these three without a tool call of the model's.
        assert message("clienttool") == [*CALLED, "thread.item.done client_tool_call"]
        assert exchanged("threads.add_client_tool_output", result=[1]) == ["stream_options", *ANSWER]
        assert message("widget") == [*CALLED, "thread.item.done widget", "thread.item.done task", *ANSWER]
        [widget] = items(client, "widget")
        assert widget["widget"] == CARD and widget["copy_text"] == "a card"
        target = {"item_id": widget["id"], "action": {"type": "toggle", "payload": {}}}
        replaced = ["stream_options", "thread.item.replaced widget"]
        assert exchanged("threads.custom_action", **target) == replaced
        changed = {"updated_item": {**widget, "copy_text": "changed"}}
        assert exchange(client, "threads.sync_custom_action", **target) == changed
        assert exchange(client, "threads.sync_custom_action", action={"type": "x"}) == {}
        assert message("question") == [*CALLED, "thread.item.done structured_input"]
        answers = {"status": "answered", "answers": {"q1": {"values": ["a"]}}}
        question = {"item_id": last_item(every)["id"], "input": answers}
        answered = ["stream_options", "thread.item.replaced structured_input", *ANSWER]
        assert exchanged("threads.add_structured_input", **question) == answered
        assert message("boom") == [*MESSAGE, "error"]
        message("bustle")
        before = items(client)
    assert {"type": "client_effect", "name": "flash", "data": {"times": 2, "colour": None}} in every
    assert {"type": "progress_update", "text": "Searching…", "icon": "search"} in every
    assert {"type": "notice", "level": "warning", "message": "Slow today", "title": "Mind"} in every
    final = {item["id"]: item for item in items_in(every)}
    told = [item for item in before[1:] if "output" not in item]  # a client tool's output is sent, not told
    assert [final[item["id"]] for item in told] == told
    with serving(agent, database=database) as client:
        assert items(client) == before


def test_reasoning_is_a_workflow_whose_thought_grows_and_says_how_long_it_took() -> None:
    with serving(talker([Think("Let "), Think("me "), Think("see"), "Done."])) as client:
        events = create(client)
        begun, final = items_in(events, "workflow")
        assert begun["workflow"] == {"type": "reasoning", "tasks": [], "expanded": False}
        assert type(final["workflow"]["summary"]["duration"]) is int and items(client, "workflow") == [final]
        changes = [update for update in updates_in(events) if "task" in update]
        thoughts = {change["type"]: change["task"]["content"] for change in changes}
        assert list(thoughts) == ["workflow.task.added", "workflow.task.updated"][: len(thoughts)]
        assert [*thoughts.values()][-1] == "Let me see" == final["workflow"]["tasks"][0]["content"]


TAG = {"type": "input_tag", "id": "u1", "text": "Ann", "group": "People", "interactive": True}
TAG["data"] = {"team": None, "path": [None, {"deep": None}], "n": 1.0}


def test_quotes_and_tags_are_kept_returned_and_told_apart_for_the_model() -> None:
    agent = talker(["ok"])
    content = [{"type": "input_text", "text": "Ask "}, TAG]
    with serving(agent) as client:
        events = create(client, content=content, quoted_text="some words")
        item = items_in(events)[0]
        assert item == {**item, "content": content, "quoted_text": "some words"} == items(client)[0]
        quote, tag, words = [part["text"] for part in shown_to(agent)[0]["content"]]
        assert words == "Ask @Ann" == events[0]["thread"]["title"]
        assert "some words" in quote and "quote" in quote and '"u1"' in tag and '"deep": null' in tag


# ---- the stop button, retry, and failures


def streaming(client: Client, operation: str = "threads.create", **params: Any) -> Any:
    """A request whose answer is read as it comes; `hello` where nothing else is named."""
    body = asked(operation, **params or {"input": user_input("hello")})
    return client.stream("POST", "/chatkit", json=body)


def test_the_stop_button_stops_the_model_which_is_told_and_no_client_is() -> None:
    wait = Wait()
    agent = talker(["One ", wait, "two"], ["Fine."])
    with serving(agent, on_disconnect="cancel") as client:
        with streaming(client) as response:
            next(line for line in response.iter_lines() if '"One "' in line)
            until(wait.reached.is_set)
        assert wait.left.wait(DEADLINE)
        until(lambda: client.get("/api/conversations/1/stream").status_code == 204)
        assert texts(client) == ["hello", "One "] and client.messages(1)[-1]["status"] == "cancelled"
        answers: list[Any] = [send(client, "go on"), client.messages(1), items(client)]
        assert "stopped" in shown(agent)
        assert "stopped" not in json.dumps(answers) and '"system"' not in json.dumps(answers)
        ids = {int(item["id"]) for item in answers[2]}
        for hidden in set(range(1, max(ids))) - ids:
            assert refused(client, "items.list", after=str(hidden))[0] == 404
            assert refused(client, "threads.retry_after_item", item_id=str(hidden))[0] == 404


def test_retry_removes_what_came_after_also_a_failure_and_answers_anew() -> None:
    agent = talker(["one"], ["Half", RuntimeError("no")], ["three"], ["anew"])
    with serving(agent) as client:
        create(client, "first")
        events = send(client, "second")
        assert events[-1]["type"] == "error" and texts(client)[2:] == ["second", "Half"]
        send(client, "third")
        again = exchange(client, "threads.retry_after_item", item_id=items_in(events)[0]["id"])
        assert texts(client) == ["first", "one", "second", "anew"] and len(client.messages(1)) == 4
        assert {event["item_id"] for event in again if "item_id" in event} == {items(client)[-1]["id"]}
        assert "Half" not in shown(agent) and "third" not in shown(agent)
        before, foreign = items(client), items_in(create(client))[0]["id"]
        for item_id, status in [(before[1]["id"], 400), (foreign, 404)]:
            assert refused(client, "threads.retry_after_item", item_id=item_id)[0] == status
        assert items(client) == before


ODD_EVENTS: list[Any] = [
    {}, "nothing", {"type": "thinking", "content": "\ud83d"}, {"type": "thinking"}, {"type": "item"},
    {"type": "progress", "content": 5}, {"type": "effect", "name": None}, {"type": "thread.item.done"},
    {"type": "notice", "message": "x", "level": "shout"}, {"type": "done", "status": "completed"},
    {"type": "thread.item.removed", "item_id": "999"},
]  # fmt: skip


def test_whatever_a_tool_streams_the_stream_stays_whole() -> None:
    """What no reader could read, a number that JSON has not, the tool itself is told of."""

    @function_tool
    async def odd(wrapper: Wrapper, number: int) -> None:
        await wrapper.context.stream(ODD_EVENTS[number])

    @function_tool
    async def unreadable(wrapper: Wrapper) -> int:
        context, refusals = wrapper.context, 0
        for value in ({"value": math.nan}, {"value": math.inf}):
            event = {"type": "client_effect", "name": "mine", "data": value}
            card = {"type": "Card", "children": [value]}
            for sending in (context.effect("mine", value), context.widget(card), context.stream(event)):
                with contextlib.suppress(ValueError):
                    await sending
                    continue
                refusals += 1
        return refusals

    calls = [Call("odd", {"number": number}) for number in range(len(ODD_EVENTS))]
    turn = [*calls, Call("unreadable")], ["Done."]
    with serving(scripted(*turn, *turn, tools=[odd, unreadable])) as client:
        assert last_item(create(client)) == items(client)[-1] and texts(client)[-1] == "Done."
        events = client.send_message("hi")
    assert of_type(events, "tool_result")[-1]["result"] == "6" and events[-1]["status"] == "completed"


# ---- pages


def pages(client: Client, operation: str, between: Callable[[], Any] = int, **params: Any) -> list[list[str]]:
    """The ids of all pages, each asked for with the `after` of the one before; calls `between` in between."""
    found = [exchange(client, operation, **params)]
    while found[-1]["has_more"]:
        assert found[-1]["after"] == found[-1]["data"][-1]["id"]
        between()
        found.append(exchange(client, operation, **{**params, "after": found[-1]["after"]}))
    assert "after" not in found[-1]
    return [[row["id"] for row in page["data"]] for page in found]


@parametrize("operation", ["threads.list", "items.list"])
def test_pages_are_right_at_every_boundary_and_stable_while_rows_come(chat: Client, operation: str) -> None:
    assert pages(chat, "threads.list", limit=1) == [[]]
    for _ in range(4):
        create(chat)
    send(chat, "more")
    ids = ["1", "2", "3", "4"] if operation == "threads.list" else [item["id"] for item in items(chat)]
    for order, wanted in (("asc", ids), ("desc", ids[::-1])):
        for limit in (1, 3, 4, 5):
            cut = [wanted[at : at + limit] for at in range(0, 4, limit)]
            assert pages(chat, operation, limit=limit, order=order) == cut
    more = functools.partial(lambda: [create(chat), send(chat, "even more")])
    assert pages(chat, operation, more, order="desc", limit=1) == [[each] for each in ids[::-1]]


# ---- client tools and questions

RESULTS: list[Any] = [{"selected": [1]}, None, "", 0, False, [], {"a": None}, "é\u2028\0"]


def test_a_client_tool_waits_for_its_output_which_may_be_any_json_and_comes_once() -> None:
    agent = talker(*([Call("choose", call_id="call_1")], ["You selected it."]) * len(RESULTS))
    with serving(agent) as client:
        for number, result in enumerate(RESULTS, 1):
            at, pending = {"thread_id": str(number)}, last_item(create(client))
            call = {"call_id": "call_1", "name": "get_selection", "arguments": {"x": 1}, "status": "pending"}
            assert {**pending, **call, "type": "client_tool_call"} == pending
            assert items(client, "client_tool_call", **at) == [pending]
            exchange(client, "threads.add_client_tool_output", **at, result=result)
            [item] = items(client, "client_tool_call", **at)
            assert item == {**item, **pending, "status": "completed"}
            assert canonical(item.get("output")) == canonical(result)
            assert number > 1 or json.loads(outcomes(agent)["call_1"]) == result
            assert "pending" in refused(client, "threads.add_client_tool_output", **at, result=1)[1]


@parametrize(
    ("tools", "overtaken", "became", "told"),
    [
        (["choose", "choose"], False, [None, "completed"], [True, False]),
        (["choose"], True, [None], [True]),  # a call that looks neither pending nor completed
        (["survey"], True, ["skipped"], [True]),
        (["wipe"], True, ["skipped"], [True]),  # which was not approved
    ],
)
def test_what_was_pending_and_got_no_answer_is_closed_and_the_model_is_told(
    tools: list[str], overtaken: bool, became: list[str | None], told: list[bool]
) -> None:
    agent = talker([*map(Call, tools)], ["Never mind."])
    with serving(agent) as client:
        pending = [item["id"] for item in items_in(create(client)) if item.get("status") == "pending"]
        if overtaken:
            events = send(client, "something else")
        else:
            events = exchange(client, "threads.add_client_tool_output", result="mine")
        now = [item for item in items(client) if item["id"] in pending]
        assert sorted(str(item.get("status")) for item in now) == sorted(map(str, became))
        assert not overtaken or {"type": "thread.item.replaced", "item": now[0]} in events
        assert ["did not" in output for output in outcomes(agent).values()] == told


def test_the_model_that_a_message_asked_for_goes_on_with_it() -> None:
    agent: Agent[Any] = Agent(name="Two", tools=[choose])
    answers = [Call("choose")], ["ok"]
    with talking_to("chat", *answers, agent=agent, models="other=gpt-y") as (client, provider):
        create(client, inference_options={"model": "other"})
        exchange(client, "threads.add_client_tool_output", result=1)
        send(client, "more")
        assert [request["body"]["model"] for request in provider.requests] == ["gpt-y", "gpt-y", "gpt-x"]


ANSWERS: list[tuple[Any, list[Any]]] = [
    ({"answers": {"q1": {"values": ["a", "b"]}, "q2": {"values": ["a", "b"]}}}, [["a"], ["a", "b"], []]),
    ({"answers": {"q1": {"values": ["mine"]}, "q3": {"values": ["Because."]}}}, [["mine"], [], ["Because."]]),
    ({"answers": {"q9": {"values": ["a"]}, "q1": {"values": ["a"], "skipped": True}}}, [[], [], []]),
    ({"status": "skipped", "answers": {"q1": {"values": ["a"]}}}, [[], [], []]),
]


def test_answers_are_recorded_once_and_the_agent_goes_on_knowing_them() -> None:
    agent = talker(*([Call("survey")], ["Thanks."]) * len(ANSWERS))
    with serving(agent) as client:
        for number, (given, wanted) in enumerate(ANSWERS, 1):
            at, pending = {"thread_id": str(number)}, last_item(create(client))
            assert pending["status"] == "pending" and pending["inputs"] == [CHOICE, SEVERAL, OPEN]
            answer = {"input": given, **at}
            events = exchange(client, "threads.add_structured_input", **answer, item_id=pending["id"])
            item = items_in(events)[0]
            assert (item["id"], item["status"]) == (pending["id"], given.get("status", "answered"))
            answers = [question["answer"] for question in item["inputs"]]
            assert answers == [{"values": values, "skipped": not values} for values in wanted]
            for value in itertools.chain(*wanted):
                assert json.dumps(value) in shown(agent).replace('\\"', '"')
            before = items(client, **at)
            assert item in before and last_item(events) == before[-1]
            for wrong, status in [(item["id"], 503), (before[0]["id"], 400), ("99", 404)]:
                assert refused(client, "threads.add_structured_input", **answer, item_id=wrong)[0] == status
            assert items(client, **at) == before


# ---- widgets and actions


def test_a_reader_that_leaves_during_an_action_has_stopped_no_answer() -> None:
    wait, agent = Wait(), talker(["ok"])

    async def slow(context: ck.TurnContext, action: Any, item: Any) -> None:
        await wait.pass_through()

    with serving(agent, on_action=slow) as client:
        create(client)
        with streaming(client, "threads.custom_action", action={"type": "x"}):
            until(wait.reached.is_set)
        until(wait.left.is_set)
        send(client, "more")
        assert "stopped" not in shown(agent)


def test_ticking_a_task_in_the_assistants_list_completes_it_in_the_database() -> None:
    with serving() as client:
        create(client, "add buy milk"), send(client, "show my tasks")
        for operation, wanted in (("custom_action", True), ("sync_custom_action", False)):
            [widget] = items(client, "widget")
            tick = widget["widget"]["children"][0]["onChangeAction"]
            action = {name: tick[name] for name in ("type", "payload")}
            exchange(client, f"threads.{operation}", item_id=widget["id"], action=action)
            [widget] = items(client, "widget")
            assert widget["widget"]["children"][0]["defaultChecked"] == wanted
            assert ("**1** buy milk (done)" in widget["copy_text"]) == wanted
            assert client.get("/api/tasks").json()[0]["done"] == wanted
        for number, answer in (("one", "error"), (99, "notice")):
            action = {"type": "toggle_task", "payload": {"id": number}}
            assert answer in kinds(exchange(client, "threads.custom_action", action=action))


# ---- files and dictation

PNG, PNG_URL = base64.b64decode(PIXEL), f"data:image/png;base64,{PIXEL}"


def form(data: bytes, name: str = "a.txt", mime_type: str = "text/plain") -> Any:
    return {"file": (name, data, mime_type)}


def announce(client: Client, name: str = "a.txt", size: int = 3, mime_type: str = "text/plain") -> Any:
    """The first phase of an upload: the attachment's id, and where to send it."""
    announced = exchange(client, "attachments.create", name=name, size=size, mime_type=mime_type)
    url = announced["upload_descriptor"]["url"]
    assert announced["upload_descriptor"] == {"url": url, "method": "POST", "headers": {}}
    return announced["id"], url


def upload(client: Client, data: bytes, name: str = "a.txt", mime_type: str = "text/plain") -> Json:
    """A file in two phases; the attachment."""
    _, url = announce(client, name, len(data), mime_type)
    stored = client.post(url, files=form(data, name, mime_type)).raise_for_status()
    return dict(validated("attachments.create", stored.json()))


def fetched(client: Client, *files: Any) -> list[Any]:
    """What comes for files: their bytes, or a status."""
    responses = [client.get(f"/attachments/{file['id']}") for file in files]
    return [response.content if response.is_success else response.status_code for response in responses]


def test_a_file_is_announced_uploaded_sent_there_after_a_restart_and_can_run_nothing(tmp_path: Path) -> None:
    database = str(tmp_path / "chat.db")
    with serving(talker(["ok"]), database=database) as client:
        direct = client.post("/attachments", files=form(PNG, "ä.png", "image/png")).raise_for_status()
        files = [upload(client, b"abc"), validated("attachments.create", direct.json())]
        assert [[file["type"], file["name"], file["mime_type"]] for file in files] == [
            ["file", "a.txt", "text/plain"], ["image", "ä.png", "image/png"],
        ]  # fmt: skip
        item = items_in(create(client, content=[], attachments=[file["id"] for file in files]))[0]
        assert item["attachments"] == [{**file, "thread_id": "1"} for file in files]
    with serving(talker(["ok"]), database=database) as client:
        assert items(client, "user_message") == [item] and fetched(client, *files) == [b"abc", PNG]
        evil = upload(client, b"<b>", 'a"\r\nX-Evil: 1\n/../é.html', "text/html")
        headers = client.get(f"/attachments/{evil['id']}").headers  # nothing in it runs in this origin
        assert headers["x-content-type-options"] == "nosniff" and "x-evil" not in headers
        assert "sandbox" in headers["content-security-policy"]
        assert headers["content-disposition"].startswith("attachment;")


def test_the_model_sees_images_and_text_and_what_it_cannot_read_is_an_error() -> None:
    agent = talker(["ok"])
    with serving(agent) as client:
        note = upload(client, b"some\nwords", "a.md", "text/markdown")
        create(client, "look", attachments=[note["id"], upload(client, PNG, "a.png", "image/png")["id"]])
        zipped = upload(client, b"\0\xff", "a.zip", "application/zip")
        error = send(client, "look", attachments=[zipped["id"]])[-1]
        assert error["type"] == "error" and "a.zip" in error["message"]
        assert items(client, "user_message")[1]["attachments"][0]["id"] == zipped["id"]
        send(client, "without it")
        assert texts(client)[-1] == "ok" and "a.zip" in shown(agent)
        text, image, words = shown_to(agent)[0]["content"]
        assert "some\nwords" in text["text"] and "a.md" in text["text"] and words["text"] == "look"
        assert image == {"type": "input_image", "image_url": PNG_URL, "detail": "auto"}


def test_an_upload_url_works_once_and_for_what_was_announced(chat: Client) -> None:
    file_id, url = announce(chat, mime_type="text/plain; charset=utf-8")
    assert fetched(chat, {"id": file_id}) == [404]
    assert chat.post(url + "x", files=form(b"abc")).status_code == 404
    for data, mime_type in [(b"ab", "text/plain"), (b"abcd", "text/plain"), (b"abc", "text/html")]:
        response = chat.post(url, files=form(data, mime_type=mime_type))
        assert response.status_code in (400, 413) and response.json()["detail"]
    both = at_once(2, lambda _: chat.post(url, files=form(b"abc", "other.txt")))
    assert sorted(response.status_code for response in both) == [200, 404]
    assert [response.json()["name"] for response in both if response.is_success] == ["a.txt"]
    assert fetched(chat, {"id": file_id}) == [b"abc"]


def test_a_file_stays_while_any_message_has_it_or_for_a_day(tmp_path: Path) -> None:
    path = tmp_path / "chat.db"
    with serving(talker(["ok"]), database=str(path)) as client:
        sent, replied, unsent, deleted = (upload(client, b"abc") for _ in range(4))
        create(client, attachments=[sent["id"]]), create(client, attachments=[sent["id"]])
        send(client, "again", attachments=[sent["id"], replied["id"]])
        assert exchange(client, "attachments.delete", attachment_id=deleted["id"]) == {}
        for file in (deleted, sent):
            assert refused(client, "attachments.delete", attachment_id=file["id"])[0] == 404
        exchange(client, "threads.retry_after_item", item_id="1")
        exchange(client, "threads.delete", thread_id="2")
        change(path, "UPDATE attachments SET created_at = '2020-01-01T00:00:00.000Z'")
        upload(client, b"new")
        assert fetched(client, sent, replied, unsent, deleted) == [b"abc", 404, 404, 404]
        exchange(client, "threads.delete")
        assert fetched(client, sent) == [404]


async def transcribe(audio: bytes, media_type: str) -> str:
    return f"{len(audio)} {media_type}"


def test_a_recording_becomes_text_and_may_be_as_large_as_a_file() -> None:
    def recording(size: int) -> Json:
        audio = base64.b64encode(bytes(size)).decode()
        return {"audio_base64": audio, "mime_type": "audio/webm;codecs=opus"}

    with serving(talker(["ok"]), transcribe=transcribe, max_attachment_bytes=2_000_000) as client:
        for size in (3, 2_000_000):
            assert exchange(client, "input.transcribe", **recording(size)) == {"text": f"{size} audio/webm"}
        for size in (2_000_001, 2_100_000):
            assert refused(client, "input.transcribe", **recording(size))[0] == 413


def test_what_is_not_set_up_is_said(chat: Client) -> None:
    create(chat)
    assert "on_action" in refused(chat, "threads.custom_action", action={"type": "x"})[1]
    recording = asked("input.transcribe", audio_base64="AAAA", mime_type="audio/webm")
    response = chat.post("/chatkit", json=recording)
    assert response.status_code == 501 and "OPENAI_API_KEY" in response.json()["message"]


# ---- requests

# What the real component was seen to send; <...> is an id of belongings().
INPUT: Any = {"attachments": [], "quoted_text": "", "inference_options": {}}
INPUT["content"] = [
    {"type": "input_text", "text": "hello"},
    {"type": "input_tag", "text": "Milk", "id": "t1", "data": {"a": "b"}},
]
CHOSEN = {**INPUT, "inference_options": {"model": "demo", "tool_choice": {"id": "draw"}}}
ANSWERED = {"status": "answered", "answers": {"main": {"values": ["soup"], "skipped": False}}}
RECORDED = """
threads.list {"limit": 9999, "order": "desc"}
threads.get_by_id {"thread_id": "<thread>"}
items.list {"thread_id": "<thread>", "limit": 9999, "order": "asc", "after": "<user_message>"}
threads.create {"input": INPUT}
threads.add_structured_input {"thread_id": "<thread>", "item_id": "<structured_input>", "input": ANSWERED}
threads.add_user_message {"thread_id": "<thread>", "input": CHOSEN}
threads.add_client_tool_output {"thread_id": "<calling>", "result": {"ok": true}}
threads.custom_action {"thread_id": "<thread>", "item_id": "<widget>", "action": {"type": "x", "payload": {}}}
threads.retry_after_item {"thread_id": "<thread>", "item_id": "<user_message>"}
threads.update {"thread_id": "<thread>", "title": "Oslo weather"}
items.feedback {"thread_id": "<thread>", "item_ids": ["<user_message>", "client_1"], "kind": "positive"}
attachments.create {"name": "red.png", "size": 178, "mime_type": "image/png"}
attachments.delete {"attachment_id": "<file>"}
input.transcribe {"audio_base64": "GkXfo59ChoEB", "mime_type": "audio/webm;codecs=opus"}
threads.delete {"thread_id": "<thread>"}
"""
for name, value in {"INPUT": INPUT, "CHOSEN": CHOSEN, "ANSWERED": ANSWERED}.items():
    RECORDED = RECORDED.replace(name, json.dumps(value))


def recorded(ids: Any) -> Iterator[tuple[str, Any]]:
    """Operations and params, with ids where they belong."""
    for line in RECORDED.split("\n")[1:-1]:
        operation, _, params = re.sub("<(.*?)>", lambda name: ids[name[1]], line).partition(" ")
        yield operation, json.loads(params)


# ======================================================================== the real component, and its samples
# What OpenAI's component was seen to do; then the SDK's own API for tools, and two agents as in its samples.

BROWSER = {"chatkit-frame-instance-id": "7a406c65-dee8-41fb-bbdf-f86674d076b2", "sec-fetch-mode": "cors"}
ORIGINS = [f"http://{host}:{port}" for host in ("localhost", "127.0.0.1") for port in (3000, 5173)]


def test_every_request_that_the_component_was_seen_to_make_is_answered() -> None:
    with serving(TOOLBOX, on_action=redraw, transcribe=transcribe) as client:
        for operation, params in recorded(belongings(client, "ann")):
            body = {"type": operation, "params": params}
            response = client.post("/chatkit", json=body, headers={**BROWSER, "origin": ORIGINS[1]})
            assert response.status_code == 200, (operation, params, response.text)
            assert response.headers["access-control-allow-origin"] == ORIGINS[1]
            answer = validated(operation, answer_in(response))
            assert '"error"' not in json.dumps(answer), (operation, answer)


def test_a_long_thread_opens_with_its_oldest_items_and_the_rest_in_large_pages(tmp_path: Path) -> None:
    path = tmp_path / "chat.db"
    with serving(talker(["ok"]), database=str(path)) as client:
        create(client)
        numbers = "WITH n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1100)"
        rows = f"{numbers} SELECT 1, 'local', 'user', i FROM n"
        change(path, f"INSERT INTO messages (conversation_id, user_id, role, content) {rows}")
        first = exchange(client, "threads.get_by_id")["items"]
        more = pages(client, "items.list", limit=9999, order="asc", after=first["after"])
        assert [len(page) for page in [first["data"], *more]] == [20, 1000, 82]
        assert client.messages(1)[-1]["id"] == int(more[-1][-1])


def test_what_the_component_leaves_out_is_not_missed() -> None:
    with serving(talker([Call("choose")], ["ok"])) as client:
        file_id, url = announce(client, "strange.xyzq", 0, "")
        client.post(url, files=form(b"", mime_type="application/octet-stream")).raise_for_status()
        tag = {name: TAG[name] for name in ("type", "id", "text")}
        message = user_input("", content=[tag], attachments=[file_id])
        item = validated("", client.operate("threads.create", input=message))[1]["item"]
        assert item["content"][0]["data"] == {} and item["attachments"][0]["name"] == "strange.xyzq"
        client.operate("threads.add_client_tool_output", thread_id="1")
        assert items(client, "client_tool_call")[0]["status"] == "completed"


def test_while_an_answer_is_written_another_may_be_tried_later() -> None:
    wait, operations = Wait(), Json(add_user_message={"input": user_input("more")})
    operations |= {"retry_after_item": {"item_id": "1"}, "add_client_tool_output": {"result": 1}}
    agent = talker(["One ", wait, "two"], ["ok"])
    with answering(agent, wait) as (client, answer):  # which began in the other dialect
        assert texts(client) == ["hi", "One "]  # what a reload shows
        for operation, params in operations.items():
            status, says = refused(client, f"threads.{operation}", **params)
            assert status == 503 and "already" in says
        wait.gate.set()
        assert said(answer.result(DEADLINE)) == "One two"
        send(client, "more")
        assert texts(client) == ["hi", "One two", "more", "ok"]
        assert all(word in shown(agent) for word in texts(client)[:-1])


# ---- what a thread shows


def test_a_locked_thread_says_why_until_it_is_active_again(chat: Client) -> None:
    create(chat)
    for given in ({"status": "locked"}, {"status": "closed", "reason": "Holidays"}, {"status": "active"}):
        chat.patch("/api/conversations/1", json=given).raise_for_status()
        shown = exchange(chat, "threads.get_by_id")["status"]
        assert given.items() <= {**shown, "status": shown["type"]}.items()
        assert bool(shown.get("reason")) == (shown["type"] != "active")
        assert exchange(chat, "threads.list")["data"][0]["status"] == shown
    send(chat, "more")


def test_pictures_are_data_where_the_component_could_not_load_them() -> None:
    with serving(talker(["ok"]), jwt_secret=SECRET) as client:
        client.headers.update(bearer("ann"))
        picture = client.post("/attachments", files=form(PNG, "a.png", "image/png")).json()
        item = create(client, attachments=[picture["id"]])[1]["item"]
        assert item["attachments"][0]["preview_url"] == picture["preview_url"] == PNG_URL
        client.headers["x-forwarded-proto"] = "https"
        url = items(client)[0]["attachments"][0]["preview_url"]
        assert url.startswith("https://")
        del client.headers["authorization"]
        assert client.get(url.replace("https", "http")).content == PNG  # an <img> sends no token


def test_a_thread_that_changes_says_so_in_the_stream() -> None:
    async def close_up(context: ck.TurnContext) -> None:
        await context.update_thread(title="Mine", status="closed", reason="Done", metadata={"a": [1]})

    wait = Wait()
    with serving(doing(close_up, answer=[wait, "ok"])) as client:
        with streaming(client) as response:
            until(wait.reached.is_set)
            client.patch("/api/conversations/1", json={"title": "Theirs"}).raise_for_status()
            wait.gate.set()
            events = validated("", chatkit_events(response.read().decode()))
        thread = exchange(client, "threads.get_by_id")
        assert thread["metadata"] == {"a": [1]} and thread["status"] == {"type": "closed", "reason": "Done"}
        first, last = [event["thread"] for event in events if event["type"] == "thread.updated"]
        assert (first["title"], last["title"], first["metadata"]) == ("Mine", "Theirs", {"a": [1]})
        assert {**last, "items": thread["items"]} == thread


def test_metadata_headers_locale_and_choices_reach_the_agent_but_no_secret_does() -> None:
    agent, contexts = talker(["ok"]), list[ck.TurnContext]()

    def make(context: ck.TurnContext) -> Agent[Any]:
        contexts.append(context)
        return agent

    chosen = {"model": "fast", "tool_choice": {"id": "poetry"}}  # which is a mode, as it is no tool
    asked_in = {"de-DE": chosen, "fr, en;q=0.5": {"tool_choice": {"id": "echo"}}, "": {}}
    with serving(make, models="fast=demo,smart=demo") as client:
        client.headers.update({"Authorization": "Bearer x", "Cookie": "x=y", "Map-Id": "orbital"})
        for locale, options in asked_in.items():
            body = asked("threads.create", input=user_input("hi", inference_options=options))
            body["metadata"], client.headers["Accept-Language"] = {"plan": "gold"}, locale
            client.post("/chatkit", json=body).raise_for_status()
        assert items(client)[0]["inference_options"] == chosen
    given = contexts[0].request_context
    assert given["metadata"] == {"plan": "gold"} and given["headers"]["map-id"] == "orbital"
    assert not {"authorization", "cookie"} & set(given["headers"])
    told = [(context.locale, context.tool_choice) for context in contexts]
    assert told == [("de-DE", "poetry"), ("fr", "echo"), ("en", None)]
    assert [settings.tool_choice for settings in cast(Script, agent.model).settings] == ["echo", None]


def test_feedback_is_kept_and_reaches_the_apps_handler_with_the_items_that_there_are() -> None:
    heard: list[Any] = []

    async def on_feedback(context: ck.TurnContext, items: list[Json], kind: str) -> None:
        heard.append((context.user_id, [item["type"] for item in items], kind))

    with serving(talker(["ok"]), on_feedback=on_feedback) as client:
        create(client), create(client)
        for ids in (["client_1"], ["1", "2", "4", "9"]):
            exchange(client, "items.feedback", item_ids=ids, kind="negative")
        exchange(client, "items.feedback", item_ids=["2"], kind="positive")
        feedback = [message["feedback"] for number in (1, 2) for message in client.messages(number)]
    both = ["user_message", "assistant_message"]
    assert heard == [("local", both, "negative"), ("local", both[1:], "positive")]
    assert feedback == ["negative", "positive", None, None]


# ---- the SDK's API for tools and actions


def check_stored(client: Client, events: list[Json]) -> None:
    """What was streamed, in the order of its appearance and as it was in the end, is what a reload shows."""
    final: Json = {}
    for event in events:
        if event["type"] == "thread.item.removed":
            del final[event["item_id"]]
        elif "item" in event:
            final[event["item"]["id"]] = event["item"]
    assert list(final.values()) == items(client)


def run_tool(work: Callable[[ck.TurnContext], Coroutine[Any, Any, Any]]) -> list[Json]:
    """What a thread streams in which a tool did this, checked against what is stored."""
    with serving(doing(work)) as client:
        events = create(client)
        check_stored(client, events)
        assert texts(client)[-1] == "Done."
    return events


def test_a_widget_that_grows_is_streamed_as_what_was_added() -> None:
    def card(text: str, title: str = "A") -> Json:
        grows = {"type": "Text", "id": "t", "value": text, "streaming": True}
        return {"type": "Card", "children": [{"type": "Title", "value": title}, grows]}

    async def states() -> AsyncIterator[Any]:
        for state in (("One",), ("One two",), ("One two",), ("One two", "B"), ("Three", "B")):
            yield card(*state)

    events = run_tool(lambda context: context.stream_widget(states(), copy_text="three"))
    added, done = items_in(events, "widget")
    assert added["widget"] == card("One")
    assert (done["widget"], done["copy_text"]) == (card("Three", "B"), "three")
    assert [update for update in updates_in(events) if update["type"].startswith("widget")] == [
        {"type": "widget.streaming_text.value_delta", "component_id": "t", "delta": " two", "done": False},
        {"type": "widget.root.updated", "widget": card("One two", "B")},
        {"type": "widget.root.updated", "widget": card("Three", "B")},
    ]


def test_a_tool_may_show_work_say_hide_remove_and_turn_the_stop_button_off() -> None:
    look = {"type": "custom", "title": "Look", "status_indicator": "loading"}
    done = {**look, "title": "Think", "status_indicator": "complete"}
    source = {"type": "url", "title": "Cats", "url": "https://cats.example"}
    cited = {"type": "annotation", "source": source, "index": 8}
    unstoppable = {"type": "stream_options", "stream_options": {"allow_cancel": False}}

    async def work(context: ck.TurnContext) -> None:
        await context.stream(unstoppable)
        await context.start_workflow({"type": "custom", "tasks": []})
        await context.add_workflow_task(look)
        await context.add_workflow_task({**look, "title": "Think"})
        await context.update_workflow_task(done, task_index=1)
        await context.end_workflow({"title": "All done"}, expanded=True)
        await context.remove(await context.say("Wait"))
        await context.hidden("The cat sleeps.")
        await context.say("See here", annotations=[cited])

    events = run_tool(work)
    assert unstoppable in events and "sleeps" not in json.dumps(events)
    assert [update["annotation"] for update in updates_in(events) if "annotation" in update] == [cited]
    shown = [event for event in events if "workflow" in json.dumps(event)]
    changes = ["workflow.task.added", "workflow.task.updated"]
    assert shape(shown) == ["thread.item.added workflow", *changes, "thread.item.done workflow"]
    wanted = {"type": "custom", "tasks": [look, done], "summary": {"title": "All done"}, "expanded": True}
    assert last_item(shown)["workflow"] == wanted


def test_an_action_may_come_while_an_answer_is_written_and_have_the_agent_speak_after_it() -> None:
    async def on_action(context: ck.TurnContext, action: Any, item: Any) -> None:
        await context.hidden("They clicked.")
        await context.say("Clicked.")
        if action["type"] == "ask":
            await context.answer()

    wait = Wait()
    agent = talker(["One ", wait, "two"], ["So you did."])
    with answering(agent, wait, on_action=on_action) as (client, first):
        events = exchange(client, "threads.custom_action", action={"type": "tell"})
        assert shape(events)[-1] == "thread.item.done assistant_message"
        assert exchange(client, "threads.custom_action", action={"type": "ask"})[-1]["type"] == "error"
        wait.gate.set()
        first.result(DEADLINE)
        exchange(client, "threads.custom_action", action={"type": "ask"})
        assert texts(client) == ["hi", "One two", *["Clicked."] * 3, "So you did."]
        assert shown(agent).count("They clicked.") == 3


# ---- the SDK's own types


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cat_lounge_written_with_the_sdks_own_types() -> None:
    types, widgets, agents = (optional(f"chatkit.{name}") for name in ("types", "widgets", "agents"))

    def card(name: str, **more: Any) -> Any:
        action = widgets.ActionConfig(type="select", payload={"name": name})
        return widgets.Card(children=[widgets.Button(label=name, onClickAction=action, **more)])

    async def show_cat(context: ck.TurnContext) -> None:
        async def add(kind: Any, **fields: Any) -> None:
            head = {"id": context.generate_id("message"), "thread_id": context.thread.id}
            item = kind(**head, created_at=datetime.now(), **fields)
            await context.stream(types.ThreadItemDoneEvent(item=item))

        source = types.URLSource(title="Cats", url="https://cats.example")
        cited = [types.Annotation(source=source, index=4)]
        picture = types.GeneratedImage(id="cat", url="https://x.example/tom.png")
        await context.start_workflow(types.Workflow(type="custom", tasks=[]))
        await context.add_workflow_task(types.CustomTask(title="Reading the list"))
        await context.update_workflow_task(types.CustomTask(title="Read"), task_index=0)
        await add(types.AssistantMessageItem, content=[{"text": "This is Tom.", "annotations": cited}])
        await add(types.HiddenContextItem, content="<FED>tuna</FED>")
        await add(types.GeneratedImageItem, image=picture)
        await context.stream_widget(card("Tom"), copy_text="Tom")
        context.client_tool_call = agents.ClientToolCall(name="update_cat", arguments={"fed": "tuna"})

    async def on_action(context: ck.TurnContext, action: Json, item: Any) -> None:
        name = action["payload"]["name"]
        chosen = {"widget": card(name, disabled=True)}
        drawn = types.WidgetItem.model_validate(item).model_copy(update=chosen)
        await context.stream(types.ThreadItemReplacedEvent(item=drawn))
        context.thread.title = f"{name}'s Lounge"
        context.thread.status = types.LockedStatus(reason="The cat sleeps.")

    agent = doing(show_cat, answer=["Purr."])
    agent.tool_use_behavior = {"stop_at_tool_names": ["tool"]}
    with serving(agent, on_action=on_action) as client:
        events = create(client)
        [widget] = items(client, "widget")
        click = widget["widget"]["children"][0]["onClickAction"]
        action = {name: click[name] for name in ("type", "payload")}
        events += exchange(client, "threads.custom_action", item_id=widget["id"], action=action)
        check_stored(client, events)
        thread = next(event["thread"] for event in events if event["type"] == "thread.updated")
        assert (thread["title"], thread["status"]["reason"]) == ("Tom's Lounge", "The cat sleeps.")
        client.patch("/api/conversations/1", json={"status": "active"}).raise_for_status()
        [call] = items(client, "client_tool_call")
        assert call == {**call, "name": "update_cat", "arguments": {"fed": "tuna"}, "status": "pending"}
        exchange(client, "threads.add_client_tool_output", result={"ok": True})
        assert "<FED>tuna" in shown(agent) and texts(client) == ["hello", "This is Tom.", "Purr."]
        assert items(client, "generated_image")[0]["image"]["url"] == "https://x.example/tom.png"


# ================================================================================================= Faults
# What breaks around the server, and what must survive it. Failing providers are in a section of their own.


def rows_of(path: Path | str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    """What the file holds, read by somebody else than the server."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql, values).fetchall()


def dump(path: Path | str) -> list[str]:
    """The whole database as SQL; unlike the file's bytes, it changes only where a row does."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def change(path: Path | str, sql: str) -> None:
    """Somebody else does this to the file."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(sql)


@contextlib.contextmanager
def locked(path: Path | str) -> Iterator[None]:
    """Somebody else is in the middle of writing to the file."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


def assert_sound(path: Path | str) -> None:
    assert rows_of(path, "PRAGMA integrity_check") == [("ok",)]
    assert rows_of(path, "PRAGMA foreign_key_check") == []
    assert rows_of(path, "SELECT id FROM messages WHERE status = 'streaming'") == []


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(0)` to `work(count - 1)` come to, each in a thread of its own."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@contextlib.contextmanager
def serving_file(path: Path, *responses: Any, **options: Any) -> Iterator[tuple[Client, Any]]:
    """A server on a file, and a function for SQL on its own connection; conversation 1 is "hi", "Ready."."""
    held: list[Any] = []

    async def instructions(wrapper: Wrapper, _: Any) -> str:
        held[:] = wrapper.context.store, asyncio.get_running_loop()
        return ""

    agent = scripted(["Ready."], *responses, instructions=instructions, **options)
    with serving(agent, database=str(path)) as client:
        client.send_message("hi")
        store, loop = held
        yield client, lambda sql: asyncio.run_coroutine_threadsafe(store.execute(sql), loop).result(DEADLINE)


def assert_no_traceback(caplog: Any) -> None:
    assert not [record for record in caplog.records if record.exc_info or "Traceback" in record.getMessage()]


# ---- the process dies


def paced(body: Json) -> list[Any]:
    """An answer: a word and a tool call, then four thousand words, 20 ms apart; "briefly" makes it three."""
    if body["messages"][-1]["role"] != "tool":
        return ["Wait. ", 0.2, Call("add_task", {"title": "rest"}, "call_" + secrets.token_hex(4))]
    words = 3 if "briefly" in json.dumps(body["messages"][-3:]) else 4000
    return [step for number in range(words) for step in (f"w{number} ", 0.02)]


@pytest.fixture(scope="module")
def paced_env() -> Iterator[dict[str, str]]:
    """The environment in which `python chatkit_server.py` is answered by a paced provider."""
    with Provider(paced) as provider:
        yield env_of(pointing_at(provider, "chat")[0])


@dataclass
class Heard:
    """What one reader was told of one turn, until the stream ended or broke."""

    message: str
    conversation_id: int | None = None  # of a new one, as soon as the response begins
    events: list[tuple[float, Json]] = field(default_factory=list)  # each with the time it came
    ended: bool = False

    def listen(self, url: str) -> Heard:
        body = {"message": self.message, "thread_id": self.conversation_id}
        with (
            contextlib.suppress(httpx.HTTPError),
            Client(base_url=url, timeout=60) as client,
            client.stream("POST", "/chatkit", json=body) as response,
        ):
            self.conversation_id = int(response.headers["x-thread-id"])
            for event in plain_events(response):
                self.events.append((time.monotonic(), event))
            self.ended = True
        return self


def check_kept(path: Path, heard: list[Heard], stopped_at: float) -> None:
    """All that was acknowledged is there: messages, and what was said until half a second before a kill."""
    assert_sound(path)
    rows = rows_of(path, "SELECT id, conversation_id, role, content FROM messages")
    stored = {row[0]: row[3] for row in rows}
    for each in heard:
        assert (each.conversation_id, "user", each.message) in {row[1:] for row in rows}
        texts = collections.defaultdict[int, str](str)
        for when, event in each.events:
            if event["type"] == "text" and (each.ended or when < stopped_at - 0.5):
                texts[event["message_id"]] += event["content"]
        for message_id, text in texts.items():
            kept = stored[message_id]
            assert kept == text if each.ended else kept.startswith(text)


@parametrize(
    ("how", "rounds"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGTERM, 1, marks=slow),
        pytest.param(signal.SIGINT, 1, marks=slow),
        pytest.param(signal.SIGKILL, 20, marks=slow),
    ],
)
def test_whenever_it_is_killed_or_stopped_what_was_acknowledged_is_there_and_it_goes_on(
    tmp_path: Path, paced_env: dict[str, str], how: signal.Signals, rounds: int
) -> None:
    """A signal ends fifty turns explained, within two seconds; the long run kills two hundred."""
    path, chance = tmp_path / "chatkit.db", random.Random(rounds)
    readers, words = (10, 30) if how == signal.SIGKILL else (50, 1)
    heard, stopped_at = list[Heard](), 0.0

    def all_are_answered() -> bool:
        return all(len(each.events) > 2 + words for each in heard)

    for number in range(rounds + 1):
        if number and number % 2 == 0:
            command = [sys.executable, str(HERE / "chatkit_server.py"), "--port", "0"]
            env, seconds = {**CLEAN_ENV, **paced_env}, chance.uniform(0.5, 3)
            with pytest.raises(subprocess.TimeoutExpired):  # which kills it; or the start failed
                subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=seconds)
        with Process(cwd=tmp_path, env=paced_env) as server, ThreadPoolExecutor(50) as pool:
            listen = functools.partial(Heard.listen, url=server.url)
            check_kept(path, heard, stopped_at)
            for after in pool.map(listen, [Heard("briefly", each.conversation_id) for each in heard[:10]]):
                assert after.ended and after.events[-1][1]["status"] == "completed"
            if number == rounds:
                break
            heard = [Heard(f"turn {turn}") for turn in range(readers)]
            turns = [pool.submit(listen, each) for each in heard]
            if rounds > 1:
                time.sleep(chance.uniform(0.05, 3.5))
            else:
                until(all_are_answered, 30)
            stopped_at = time.monotonic()
            assert server.stop(how) in (0, -how) and time.monotonic() - stopped_at < 2
            heard = [turn.result() for turn in turns if turn.result().conversation_id]
        if how != signal.SIGKILL:
            assert not [*tmp_path.glob("chatkit.db-*")]  # no -wal: the file may be copied
            for each in heard:
                error, done = (event for _, event in each.events[-2:])
                assert (error["type"], error["code"], error["allow_retry"]) == ("error", "shutdown", True)
                assert each.ended and (done["type"], done["status"]) == ("done", "failed")
    statuses = {status for (status,) in rows_of(path, "SELECT status FROM messages")}
    assert statuses == {"done", "interrupted"}
    assert "Traceback" not in server.log_file.read_text()


# ---- the database


@parametrize("words_before", [0, 1, 2])
def test_what_is_said_during_a_lock_is_saved_soon_after_it(tmp_path: Path, words_before: int) -> None:
    """The lock lasts longer than SQLite waits by itself; a short one afterwards holds up the next message."""
    path, lock, silence = tmp_path / "chatkit.db", Wait(), Wait()
    steps: list[Any] = ["Hello ", "world.", silence]
    steps.insert(words_before, lock)
    with serving_file(path, steps) as (client, sql), ThreadPoolExecutor(1) as pool:
        sql("PRAGMA busy_timeout = 100")
        answer = pool.submit(client.send_message, "hi")
        assert lock.reached.wait(DEADLINE)
        with locked(path):
            lock.gate.set()
            if words_before == 2:
                silence.gate.set()  # the end comes during the lock too
            time.sleep(0.3)
        until(lambda: rows_of(path, "SELECT 1 FROM messages WHERE content = 'Hello world.'"), 1.5)
        silence.gate.set()
        assert answer.result(DEADLINE)[-1]["status"] == "completed"
        assert [row["content"] for row in client.messages(2)] == ["hi", "Hello world."]
        sql("PRAGMA busy_timeout = 5000")
        with locked(path):
            answer = pool.submit(client.send_message, "more", 2)
            time.sleep(0.1)
            assert not answer.done()
        assert answer.result(DEADLINE) and len(client.messages(2)) == 4
    assert_sound(path)


def test_a_start_that_waits_for_a_lock_can_be_interrupted(tmp_path: Path, monkeypatch: Any) -> None:
    def interrupt(_: float) -> None:
        until((tmp_path / "chat.db-server").exists)
        raise KeyboardInterrupt

    monkeypatch.setattr(ck, "time", SimpleNamespace(**{**vars(time), "sleep": interrupt}))
    began, threads = time.monotonic(), our_threads()
    with locked(tmp_path / "chat.db"), pytest.raises(KeyboardInterrupt):
        ck.serve_in_background(make_app(database=str(tmp_path / "chat.db")))
    assert our_threads() == threads and time.monotonic() - began < 4


def takes_nothing(client: Client, told: str, text: str = "new") -> None:
    """What must write is refused: with a 503, or on ChatKit's streams, where it shows nowhere, an `error`."""
    bodies: list[Any] = [{"message": text}, {"message": text, "thread_id": 1}]
    bodies.append(asked("threads.create", input=user_input(text)))
    *responses, stream = at_once(3, lambda number: client.post("/chatkit", json=bodies[number], timeout=60))
    (error,) = chatkit_events(stream.raise_for_status().text)
    assert error["message"].startswith(told) and error["allow_retry"]
    for response in [*responses, client.patch("/api/conversations/1", json={"metadata": {"a": text}})]:
        assert response.status_code == 503 and response.headers["retry-after"]
        assert response.json()["detail"].startswith(told)


FAULTS = [  # on the server's own connection
    ("max_page_count = 1", "max_page_count = 100000", "The disk is full"),
    ("query_only = ON", "query_only = OFF", "The database is read-only"),
    ("busy_timeout = 150", "busy_timeout = 5000", "The database is locked"),
]


@parametrize(("limit", "lift", "told"), FAULTS)
def test_what_the_database_does_not_take_is_refused_and_the_next_is_taken(
    tmp_path: Path, limit: str, lift: str, told: str, caplog: Any
) -> None:
    path, wait, lock = tmp_path / "chatkit.db", Wait(), "locked" in told
    with serving_file(path, ["Hello ", wait, "x" * 50_000]) as (client, sql), ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.send_message, "hi")
        assert wait.reached.wait(DEADLINE)
        sql(f"PRAGMA {limit}")
        with locked(path) if lock else contextlib.nullcontext():
            wait.gate.set()
            if not lock:  # which an answer outlives
                error, done = running.result(DEADLINE)[-2:]
                assert (error["type"], error["code"], done["status"]) == ("error", "storage", "failed")
                assert error["message"].startswith(told)
            before, began = dump(path), time.monotonic()
            takes_nothing(client, told, "x" * 30_000)
            assert time.monotonic() - began < 2
            assert len(client.messages(1)) == 2 and dump(path) == before  # readers do not mind
        assert lock or caplog.text.count("the database failed") >= 3
        sql(f"PRAGMA {lift}")
        assert lock == (running.result(DEADLINE)[-1]["status"] == "completed")
        assert client.send_message("again", 2)[-1]["status"] == "completed"
        states = [row["status"] for row in client.messages(2)]
        assert states.pop(1) in (("done",) if lock else ("failed", "interrupted")) and set(states) == {"done"}
    assert_sound(path)


@parametrize("fate", ["is gone", "was replaced"])
def test_a_file_that_went_away_takes_no_more_messages(tmp_path: Path, fate: str) -> None:
    """SQLite would go on writing to the deleted file, and all of it would be gone at the end."""
    path = tmp_path / "chatkit.db"
    with serving_file(path) as (client, _):
        path.unlink()
        if fate == "was replaced":
            change(path, "CREATE TABLE mine (x)")
        takes_nothing(client, f"The database file {fate}. Stop the server")
        assert client.get("/health").status_code == 503
    assert not path.exists() or rows_of(path, "SELECT name FROM sqlite_schema") == [("mine",)]


def test_the_directory_may_change_while_it_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(scripted(["Hello."]), database="chatkit.db") as client:
        monkeypatch.chdir("/")  # as notebooks do
        assert said(client.send_message("hi")) == "Hello."


OURS = (HERE / "schema.sql").read_text(encoding="utf-8")
THIS_VERSION = f"PRAGMA user_version = {ck.SCHEMA_VERSION}"
NOT_OURS = {  # what is in a file, and what is said of it
    "Dear diary, " * 1000: "not a database",
    f"{OURS}; PRAGMA user_version = {ck.SCHEMA_VERSION + 1}": "newer version",
    f"CREATE TABLE conversations (name, status); {THIS_VERSION}": "something else",
    "CREATE TABLE messages (mine TEXT); CREATE TABLE recipes (name)": "messages",
    "CREATE TABLE tasks (mine TEXT); CREATE TABLE recipes (name)": "tasks",
}


@parametrize("content", NOT_OURS, ids=[*NOT_OURS.values()])
def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, content: str, capsys: Any) -> None:
    path = tmp_path / "some.db"
    if content.startswith("Dear"):
        path.write_text(content)
    else:
        change(path, content)
    before = path.read_bytes()
    assert ck.main(["--port", "0", "--database", str(path), "--model", "demo"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("chatkit_server: ") and NOT_OURS[content] in line
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ---- the store


async def begin(store: ck.Store, message: str = "hi", begun: list[int] | None = None) -> None:
    """One message, answered without a server; the id of its conversation comes into `begun`."""
    async for event in ck.stream_agent(message, agent=scripted(["Hello."]), store=store):
        if begun is not None and event["type"] == "thread":
            begun.append(event["thread_id"])


def test_writers_that_fail_or_are_cancelled_take_nobody_elses_rows_along(tmp_path: Path) -> None:
    """Each row stands for a beginning or a note that succeeds; a beginning is two rows or none."""
    path, begun, chance = tmp_path / "chatkit.db", list[int](), random.Random(1)

    async def fail(work: Coroutine[Any, Any, Any]) -> None:
        with pytest.raises((sqlite3.Error, ck.StoreError)):
            await work

    async def cancel(store: ck.Store, step: int) -> None:
        beginning = asyncio.create_task(begin(store, begun=begun))
        for _ in range(step // 3):
            await asyncio.sleep(0)
        await asyncio.sleep(step % 3 * 0.0002)
        beginning.cancel()
        beginning.cancel()
        await asyncio.wait([beginning])

    async def interleave() -> None:
        async with ck.Store(path) as store:
            when = "WHEN NEW.content = 'half' BEGIN SELECT RAISE(ABORT, 'no'); END"
            await store.execute(f"CREATE TRIGGER t BEFORE INSERT ON messages {when}")
            await store.execute("CREATE TABLE notes (text TEXT NOT NULL)")
            note = functools.partial(store.execute, "INSERT INTO notes VALUES (?)")
            for step in range(60):
                work = [begin(store, begun=begun), fail(begin(store, "half")), note("x"), fail(note(None))]
                others = chance.sample(work, 4)
                await asyncio.gather(*others[:2], cancel(store, step), *others[2:])
                await asyncio.to_thread(change, path, "BEGIN IMMEDIATE")  # nobody holds a transaction open

    asyncio.run(interleave())
    assert rows_of(path, "SELECT COUNT(*) FROM notes") == [(60,)]
    users = "SELECT COUNT(*) FROM messages WHERE role = 'user' AND conversation_id = c.id"
    assert rows_of(path, f"SELECT id FROM conversations c WHERE ({users}) <> 1") == []
    there = {row[0] for row in rows_of(path, "SELECT id FROM conversations")}
    assert len(begun) >= 60 and set(begun) <= there
    assert_sound(path)


def test_four_servers_may_start_at_once_on_a_new_file(tmp_path: Path) -> None:
    async def use(path: Path) -> None:
        async with ck.Store(path) as store:
            await begin(store)

    for path in [tmp_path / f"{number}.db" for number in range(10)]:
        at_once(4, lambda _, path=path: asyncio.run(use(path)))  # type: ignore[misc]
        assert rows_of(path, "SELECT COUNT(*) FROM messages WHERE role = 'user'") == [(4,)]
        assert_sound(path)


# ---- readers


@parametrize("dialect", ["plain", "ChatKit"])
def test_a_reader_that_leaves_does_not_stop_the_answer(dialect: str, caplog: Any) -> None:
    wait, body, options = Wait(), {"message": "hi"}, Json()
    if dialect == "ChatKit":  # where leaving is how the component's stop button says so
        body, options = asked("threads.create", input=user_input("hi")), {"on_disconnect": "continue"}
    with serving(scripted(["Hello ", wait, "world."]), **options) as client:
        with client.stream("POST", "/chatkit", json=body) as response:
            next(line for line in response.iter_lines() if "Hello" in line)
        assert wait.reached.wait(DEADLINE)
        wait.gate.set()
        until(lambda: client.get("/api/conversations/1/stream").status_code == 204)
        assert texts(client) == ["hi", "Hello world."]
        assert client.send_message("more", 1)[-1]["status"] == "completed"
    assert_no_traceback(caplog)


def test_a_request_that_breaks_off_begins_nothing(caplog: Any) -> None:
    with serving(scripted(["Never."])) as client:
        with dial(client) as caller:
            head = "POST /chatkit HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            caller.sendall(f'{head}Content-Length: 99\r\n\r\n{{"message": "hi"'.encode())
            time.sleep(0.1)
        client.get("/health").raise_for_status()
        assert client.get("/api/conversations").json() == []
    assert_no_traceback(caplog)


def test_readers_that_come_back_get_each_event_once_and_none_is_missing() -> None:
    """An id that is not of this turn means nothing here: they get all of it."""
    first, second = Wait(), Wait()
    agent = scripted(["Before."], [Call("echo", {"text": "x"})], ["a", "b", first, "c", "d", second, "e"])
    with serving(agent) as client, ThreadPoolExecutor(30) as pool:
        foreign = client.send_message("hi")[2]["_id"]
        started = pool.submit(client.send_message, "hi")
        assert first.reached.wait(DEADLINE)

        def come_back(last: str | None, until_text: str = "") -> list[Json]:
            headers: dict[bytes, bytes] = {} if last is None else {b"Last-Event-ID": last.encode()}
            with client.stream("GET", "/api/conversations/2/stream", headers=headers) as response:
                found = []
                for event in plain_events(response):
                    found.append(event)
                    if until_text and event.get("content") == until_text:
                        break
                return found

        so_far = come_back(None, "b")
        turn = so_far[0]["_id"].split("-")[0]
        wrong = ["", "nonsense", "-", "00000000-3", "-1", "1", "9" * 5000, f"x{turn}-2", foreign]
        wrong += [f"{turn}-{number}" for number in ("999999", "-1", "1e1", "", "\u0661")]
        asked = [None, *wrong, *(event["_id"] for event in so_far)]
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
        assert client.get("/api/conversations/2/stream").status_code == 204


# ====================================================================================================== Abuse
# Whoever means harm, or does it without meaning to.

JSON = {"Content-Type": "application/json"}
MAX_BODY = 1024 * 1024  # bytes that a request may have


@pytest.fixture(scope="module")
def parrot() -> Iterator[Client]:
    """A server whose tests do not mind what others left behind. There is 1; 2 is locked, and 3 closed."""
    options: Any = {"transcribe": transcribe, "on_action": redraw}
    with serving(TOOLBOX, max_attachment_bytes=MAX_BODY, **options) as client:
        for status in ("active", "locked", "closed"):
            url = f"/api/conversations/{client.send_message('hi')[0]['thread_id']}"
            client.patch(url, json={"status": status, "reason": "Holidays"}).raise_for_status()
        yield client


@pytest.fixture(scope="module")
def guarded() -> Iterator[Client]:
    """The same, for those who have a token."""
    with serving(TOOLBOX, jwt_secret=SECRET) as client:
        yield client


def lines(table: str) -> list[str]:
    """The lines of a table; one with (this | that) stands for two."""
    found: list[str] = []
    for line in filter(None, table.split("\n")):
        choice = re.search(r"\(([^()]*\|[^()]*)\)", line)
        each = [line.replace(choice[0], part.strip(), 1) for part in choice[1].split("|")] if choice else []
        found += lines("\n".join(each)) or [line]
    return found


def request_of(line: str) -> tuple[str, str, str]:
    """The method, path and body of a line: METHOD PATH BODY, or of a ChatKit request: OPERATION PARAMS."""
    first, path, body = (*line.split(" ", 2), "")[:3]
    if first.isupper():
        return first, path, body
    return "POST", "/chatkit", f'{{"type": "{first}", "params": {line.partition(" ")[2]}}}'


# ---- other people's ids

WORDS = '"content": [{"type": "input_text", "text": "hi"}]'
PAGES = "GET /(component | docs | docs/oauth2-redirect | openapi.json | health | )"  # which anybody may see
NAMELESS = """
GET /api/(config | tasks | conversations | conversations/recent/first)
POST /attachments
attachments.create {"name": "a.png", "size": 4, "mime_type": "image/png"}
input.transcribe {"audio_base64": "AAAA", "mime_type": "audio/webm"}
"""
# Every way to name <something> of theirs: it is not found.
ATTEMPTS = """
POST /chatkit {"message": "hi", "thread_id": (<thread> | "<thread>")}
POST /chatkit {"message": "hi"(, "thread_id": <my thread> | ), "attachments": ["<file>"]}
(GET | DELETE) /api/conversations/<thread>
GET /api/conversations/<thread>(?format=markdown | /stream)
PATCH /api/conversations/<thread> {("title": "evil" | "status": "locked" | "metadata": {"a": 1})}
POST /api/conversations/<thread>/cancel
POST /api/conversations/<thread>/retry {("message": "evil" | "message_id": <user_message> | )}
POST /api/conversations/<my thread>/retry {"message_id": <user_message>, "message": "evil"}
POST /api/conversations/<calling>/tool_output {"result": "evil"}
POST /api/conversations/EITHER/answers {"item_id": <structured_input>, "answers": {}}
PATCH /api/tasks/<todo> {"done": true}
POST /attachments/<announced>( | ?key= | ?key=<my key> | ?key=<file>)
GET /attachments/(<announced> | <file>)( | ?key= | ?key=<my key>)
threads.create {"input": {WORDS, "attachments": ["<file>"]}}
threads.add_user_message {"thread_id": "<thread>", "input": {WORDS}}
threads.add_user_message {"thread_id": "<my thread>", "input": {WORDS, "attachments": ["<file>"]}}
threads.retry_after_item {"thread_id": "EITHER", "item_id": "<user_message>"}
threads.add_client_tool_output {"thread_id": "<calling>", "result": "evil"}
threads.add_structured_input {"thread_id": "EITHER", "item_id": "<structured_input>", "input": SKIP}
threads.(sync_custom_action | custom_action) {"thread_id": "EITHER", "item_id": "<widget>", "action": CLICK}
threads.list {"after": "<thread>"}
(threads.get_by_id | threads.delete | items.list) {"thread_id": "<thread>"}
threads.update {"thread_id": "<thread>", "title": "evil"}
items.list {"thread_id": "<my thread>", "after": "<assistant_message>"}
items.feedback {"thread_id": "EITHER", "item_ids": ["(<user_message> | <widget>)"], "kind": "negative"}
attachments.delete {"attachment_id": "<file>"}
""".replace("EITHER", "(<my thread> | <thread>)").replace("WORDS", WORDS)
ATTEMPTS = ATTEMPTS.replace("SKIP", '{"status": "skipped"}').replace("CLICK", '{"type": "toggle_task"}')


def belongings(client: Client, name: str) -> dict[str, str]:
    """What the table of attempts names, made in a server of TOOLBOX."""
    began = create(client, "call draw {}")
    thread = began[0]["thread"]["id"]
    client.operate("threads.update", thread_id=thread, title=f"{name}'s")
    asked = send(client, "call survey {}", thread)
    announced, url = announce(client, f"{name}.txt", 4)
    return {
        **{event["item"]["type"]: event["item"]["id"] for event in [*asked, *began] if "item" in event},
        "thread": thread,
        "calling": create(client, "call choose {}")[0]["thread"]["id"],
        "file": client.post("/attachments", files=form(b"mine", f"{name}.txt")).json()["id"],
        "announced": announced,
        "key": url.partition("key=")[2],
        "todo": "1",
    }


def attempts(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """The lines of the table, with ids put in."""
    return lines(re.sub("<(my )?(.*?)>", lambda id_: (mine if id_[1] else theirs)[id_[2]], ATTEMPTS))


def test_everything_of_somebody_elses_is_not_found_and_stays_untouched(tmp_path: Path) -> None:
    file, has = tmp_path / "chatkit.db", {}
    with serving(TOOLBOX, database=str(file), jwt_secret=SECRET) as client:
        for name in ("ann", "ben"):
            client.headers.update(bearer(name))
            has[name] = belongings(client, name)
    with serving(database=str(file), jwt_secret=SECRET) as client:
        for name in ("ann", "ben"):
            client.headers.update(bearer(name))
            client.send_message(f"add {name}'s milk")
        before = dump(file)
        for line in attempts(has["ben"], has["ann"]):
            method, path, body = request_of(line)
            upload = {"files": form(b"evil")}
            sent: Any = upload if line.startswith("POST /att") else {"content": body, "headers": JSON}
            response = client.request(method, path, **sent)
            if response.status_code != 404 and "items.feedback" not in line:
                assert kinds(chatkit_events(response.text)) == ["error"], (line, response.text)
            assert "ann" not in response.text and dump(file) == before, line
        for which in ("conversations", "conversations/recent/first", "conversations?q=milk", "tasks"):
            shown = client.get("/api/" + which).text
            assert "ben" in shown and "ann" not in shown, which
        assert "ann" not in json.dumps(client.operate("threads.list"))


def test_every_route_is_in_these_tables_and_all_but_the_pages_want_a_token() -> None:
    """Add a route or an operation, and say in ATTEMPTS how somebody else's things could be named there."""
    there: list[Any] = make_app().routes
    routes = {f"{way} {each.path}" for each in there for way in getattr(each, "methods", None) or {"MOUNT"}}
    routes = {route for route in routes if not route.startswith(("HEAD ", "OPTIONS "))}
    table = [line.split("?")[0] + " " for line in lines(ATTEMPTS + NAMELESS + PAGES)]
    for where in routes | set(ck.OPERATIONS):
        pattern = re.compile(re.sub(r"\{\w+\}", "<[^/]+>", where) + " ")
        assert any(map(pattern.match, table)), where
    with serving(jwt_secret=SECRET) as client:
        for route in routes:
            method, path = re.sub(r"\{\w+\}", "1", route).split(" ")
            assert client.request(method, path).status_code == (200 if route in lines(PAGES) else 401), route
            if "{attachment_id}" not in route and route not in lines(PAGES):  # a key opens one file
                assert client.request(method, path + "?key=x").status_code == 401, route


# ---- tokens

NOW, HS256 = int(time.time()), {"alg": "HS256"}
SOON = {"exp": NOW + 3600}
CLAIMS: Json = {"sub": "ann", **SOON}


def token(claims: Any = CLAIMS, header: Any = HS256, secret: bytes = SECRET.encode()) -> str:
    """Made by hand, because no library would make some of these."""
    given = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in given)
    signature = hmac.digest(secret, signed, "sha512" if "HS512" in str(header) else "sha256")
    return f"{signed.decode()}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


BAD_CLAIMS: dict[str, list[Any]] = {
    "sub": [5, None, "", "  ", ["ann"], "a" * 256, "\ud83d"],
    "exp": [1, NOW - 1, None, "tomorrow", math.inf],
    "nbf": [NOW + 3600],
    "iat": [NOW + 3600],
    "more": ["x" * 20_000],
}
BAD_PARTS: list[Any] = [[CLAIMS], b"[" * 5000, SOON, {"sub": "ann"}]
BAD_PARTS += [{"id": user_id, **SOON} for user_id in (5, ["ann"], "")]
BAD_PARTS += [{"id": "ann", **CLAIMS, name: bad} for name in BAD_CLAIMS for bad in BAD_CLAIMS[name]]
BAD_HEADERS: list[Any] = [{"typ": "JWT"}, [], b"[" * 5000, {**HS256, "crit": ["x"], "x": 1}]
BAD_HEADERS += [{"alg": name} for name in ("none", "NONE", "", None, ["HS256"], "HS512", "RS256")]
BAD_TOKENS = ["nonsense", "..", "a.b.c", token()[:-2], token().rsplit(".", 1)[0] + "."]
BAD_TOKENS += [token(secret=secret) for secret in (b"", SECRET.encode() + b"!")]
BAD_TOKENS += [*map(token, BAD_PARTS), *(token(header=header) for header in BAD_HEADERS)]
# A good token, but not as it should be given.
MISPLACED = ["Bearer", "Basic YW5uOmFubg==", "Token {}", "{}", "Bearer {} {}", "Bearer {}, Bearer {}"]


def status_with(client: Client, token: str) -> int:
    return client.get("/api/conversations", headers={"Authorization": f"Bearer {token}"}).status_code


def test_a_bad_token_or_a_misplaced_one_is_a_401(guarded: Client) -> None:
    good = token()
    assert status_with(guarded, good) == 200
    given = [[f"Bearer {bad}"] for bad in BAD_TOKENS] + [[way.replace("{}", good)] for way in MISPLACED]
    for texts in [*given, [], [f"Bearer {good}"] * 2]:
        headers = [("Authorization", text) for text in texts]
        headers += [("X-Authorization", f"Bearer {good}"), ("Cookie", f"Authorization=Bearer {good}")]
        response = guarded.get(f"/api/conversations?token={good}", headers=headers)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), texts
        assert set(response.json()) == {"detail"} and SECRET not in response.text


def test_the_user_is_the_subject_or_else_the_id(guarded: Client) -> None:
    for claims in ({"sub": "ann"}, {"id": "ann"}, {"sub": "ann", "id": "ben"}, {"sub": "ann", "aud": "x"}):
        given = {"Authorization": "bearer  " + token({**claims, **SOON})}
        thread = guarded.post("/chatkit", json={"message": "hi"}, headers=given).headers["x-thread-id"]
        url = f"/api/conversations/{thread}"
        assert [guarded.get(url, headers=bearer(name)).status_code for name in ("ann", "ben")] == [200, 404]


def test_audience_and_issuer_must_fit_where_they_are_set() -> None:
    fits = {**CLAIMS, "iss": "https://me", "aud": "chat"}
    changes: list[Any] = [{}, {"aud": ["x", "chat"]}, {"aud": "x"}, {"aud": []}, {"iss": "https://me/"}]
    with serving(jwt_secret=SECRET, jwt_audience="chat", jwt_issuer="https://me") as client:
        statuses = [status_with(client, token(claims)) for claims in ({**fits, **each} for each in changes)]
        assert [*statuses, status_with(client, token())] == [200, 200, 401, 401, 401, 401]


@functools.cache
def private_keys() -> Json:
    """By their algorithm, which is their id too; made once, because that takes a while."""
    keys = ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)
    return {"EdDSA": ed25519.Ed25519PrivateKey.generate(), "ES256": keys[0], "RS256": keys[1]}


def sign(name: str, claims: Json = CLAIMS, algorithm: str = "", **header: Any) -> str:
    return jwt.encode(claims, private_keys()[name], algorithm or name, headers={"kid": name, **header})


def jwk(name: str) -> Json:
    public = cast(Any, jwt.get_algorithm_by_name(name)).to_jwk(private_keys()[name].public_key())
    return {"kid": name, **json.loads(public)}


def jwks(*names: str) -> bytes:
    return json.dumps({"keys": [*map(jwk, names)]}).encode()


@parametrize("secret", [None, SECRET])
def test_a_public_key_at_the_url_serves_its_own_algorithm_alone(secret: str | None) -> None:
    keys = jwks(*private_keys())
    with Provider(keys) as provider, serving(jwks_url=provider.url, jwt_secret=secret) as client:
        assert [status_with(client, sign(name)) for name in [*private_keys()] * 2] == [200] * 6
        assert len(provider.requests) == 1
        bad = [sign("RS256", algorithm=algorithm) for algorithm in ("RS384", "PS256")]
        bad.append(sign("RS256", jku="http://127.0.0.1/", jwk=jwk("RS256"), kid="unknown"))
        form_ = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        for name, key in private_keys().items():
            bad += [sign(name, {**CLAIMS, "exp": 1}), sign(name, {"sub": "ann"}), sign(name)[:-8] + "A" * 8]
            bad += [sign(name, kid=other) for other in private_keys() if other != name]
            pem = key.public_key().public_bytes(*form_)
            known = [pem, pem.strip(), json.dumps(jwk(name), separators=(",", ":")).encode(), b""]
            for algorithm in ("HS256", "HS512", "none", name):  # what everybody knows, taken for a secret
                bad += [token(CLAIMS, {"alg": algorithm, "kid": name}, each) for each in known]
        assert {status_with(client, each) for each in bad} == {401}
        assert status_with(client, token()) == (200 if secret else 401)


def test_keys_change_without_a_restart_and_outlive_their_url(monkeypatch: Any) -> None:
    gone_by, clock, old, new = [0.0], SimpleNamespace(**vars(time)), "ES256", "EdDSA"
    clock.monotonic = lambda: time.monotonic() + sum(gone_by)
    for module in (ck, jwt.api_jwk, jwt.jwk_set_cache, jwt.jwks_client):
        monkeypatch.setattr(module, "time", clock)
    with Provider() as provider, serving(jwks_url=provider.url) as client:
        asked = provider.requests

        def later(seconds: float, answer: bytes) -> list[int]:
            """What tokens of the new and of the old key come to then, if the URL says this."""
            gone_by.append(seconds)
            provider.answers = (answer,)
            return [status_with(client, sign(name)) for name in (new, old)]

        assert later(0, b"") == [503, 503]
        assert later(60, jwks(old)) == [401, 200]
        before = len(asked)
        assert {status_with(client, sign(new, kid=f"guess {number}")) for number in range(30)} == {401}
        assert len(asked) <= before + 1  # not one request for each token that somebody makes up
        assert later(60, jwks(old, new)) == [200, 200]
        assert later(3600, jwks(new)) == [200, 401]
        for broken in (b"", b"<html>", b"[]", b'{"keys": []}', b'{"keys": [{"kty": "XX"}]}', b"[" * 9999):
            before = len(asked)
            assert later(3600, broken) == [200, 401] and len(asked) > before, broken


# ---- what is refused: other sites, size and shape

BEGIN, HI = f'{{"type": "threads.create", "params": {{"input": {{{WORDS}}}}}}}', '{"message": "hi"}'
EVIL, LONG = "https://evil.example", "x" * (2 * MAX_BODY)
# 40* is 400 or 404, 200 an `error` event, 503 one that may be tried again. A \x stands for a byte. What is
# said has the word after #.
REFUSALS = r"""
400 POST /chatkit (null | 5 | true | [] | {} | "hi" | [{}] | {"message": "hi" | {"message": "hi"} {} | )
400 POST /chatkit {"message": (null | 5 | true | [] | {} | "" | " \n" | "\ud83d" | "\xff" | "\xed\xa0\xbd")}
400 POST /chatkit {"message": "hi", ("\udc00": 1 | "x": NaN | "x": -Infinity)}
400 POST /chatkit {"message": "hi", "(model | tool_choice)": (5 | [] | {} | "unknown")}
400 POST /chatkit {"message": "hi", "attachments": ("x" | {} | [5])}
404 POST /chatkit {"message": "hi", "attachments": ["x"]}
40* POST /chatkit {"message": "hi", "thread_id": (true | -1 | 0 | 1.0 | 99999 | [1])}
40* POST /chatkit {"message": "hi", "thread_id": "(x | \u0661 | 1.0 | 0x1 | 9223372036854775808)"}
400 POST /chatkit {"type": (null | 5 | ["threads.list"] | {} | "x" | "")}
400 POST /chatkit {"type": "threads.create", "params": []}
413 POST /chatkit {"x": "input.transcribe", "(message | type)": "threads.list", "y": "LONG"}
413 POST /chatkit {"message": ("32001" | "LONG")}
400 GET /api/conversations?(limit=0 | limit=-1 | limit=x | limit=1.5 | offset=-1 | offset=x)
404 GET /api/conversations/(x | 0 | 1.0 | 18446744073709551616)
400 GET /api/conversations/1?format=pdf
400 PATCH /api/conversations/1 ({} | {"title": ""} | {"title": 7} | {"status": "open"} | {"metadata": 5})
400 PATCH /api/conversations/1 {"status": "locked", ("reason": 7 | "status_reason": "why")}
400 POST /api/conversations/1/tool_output ([] | {"id": "x"} | {"result": 1, "id": 5} | {"result": 1e999})
400 POST /api/conversations/1/tool_output {"result": 1, "call_id": "x"} # call_id
400 POST /api/conversations/1/answers {"item_id": 1, "ansers": {}} # ansers
400 POST /api/conversations/1/retry ({"id": 1} | {"mesage": "x", "message_id": 1})
409 POST /api/conversations/1/tool_output {"result": 1}
40* POST /api/conversations/1/answers ({"answers": {}} | {"item_id": 1, "status": "maybe"})
40* POST /api/conversations/1/answers {"item_id": 1, "answers": ([] | {"q": 5} | {"q": {"values": "x"}})}
409 POST /api/conversations/1/cancel {}
40* POST /api/conversations/1/retry ([] | {"message_id": "x"} | {"message_id": 99999} | {"message": 7})
404 (GET | POST) /nowhere {}
404 GET /attachments/x
405 (PUT /chatkit | GET /chatkit | DELETE /health)
415 POST /attachments {}
400 POST /chatkit {"message": "hi", "threadId": 1} # thread_id
400 POST /chatkit {"message": "hi", "toolChoice": 1} # tool_choice
409 POST /chatkit {"message": "hi", "thread_id": 2} # Holidays
409 POST /api/conversations/2/retry {} # Holidays
413 attachments.create {"name": "a", "size": 9223372036854775808, "mime_type": "a/b"}
400 threads.create {"input": {"content": [( | {"type": "input_text", "text": " \n\u3000"})]}}
200 threads.create {"input": {"content": [{"type": "input_text", "text": "32001"}]}} # 32
200 threads.create {"input": {WORDS, "quoted_text": "32001"}} # 32
200 threads.create {"input": {WORDS, "inference_options": {"model": "x"}}} # demo
200 threads.create {"input": {WORDS, "inference_options": {"tool_choice": {"id": "x"}}}} # give_back
200 threads.create {"input": {WORDS, "attachments": ["att_0"]}} # ttachment
200 threads.add_user_message {"thread_id": "2", "input": {WORDS}} # Holidays
200 threads.retry_after_item {"thread_id": "3", "item_id": "5"} # closed
200 threads.add_client_tool_output {"thread_id": "1", "result": 1} # pending
(200 threads. | 400 threads.sync_)custom_action {"thread_id": "1", "action": {"type": "refuse"}} # refused
(503 threads. | 500 threads.sync_)custom_action {"thread_id": "1", "action": {"type": "break"}} # wrong
""".replace("WORDS", WORDS)
DEEP = ["[" * 900 + "]" * 900, "[" * 250_000 + "]" * 250_000, '{"a":' * 100_000 + "1" + "}" * 100_000]
FOREIGN = """
403 Host: (evil.example | localhost.evil.example | localhost@evil.example | 127.0.0.1.evil.example)
403 Host: (0.0.0.0 | )
403 Host: evil.example:8000, Origin: http://evil.example:8000
403 Origin: (https://evil.example | http://localhost:3000.evil.example | http://localhost:3001 | null | )
403 Origin: https://localhost:3000, Sec-Fetch-Site: same-site
415 Content-Type: (text/plain | text/plain; x=application/json | application/x-www-form-urlencoded | x/x | )
"""
# What can be no value of a kind, and what must not stand in a place though it is of the right kind.
WRONG_KIND: dict[type, list[Any]] = {str: [5, []], int: ["x", [], 1.5], bool: [5, "perhaps"]}
WRONG_KIND |= {list: [5, "x", {}], dict: [True, "x", []]}
IDS = ("thread_id", "item_id", "after", "attachment_id")
ODD_IDS = ["", "-1", "999", "1.0", " 1", "0x1", "\u0661", "9" * 500]  # are not found
WRONG_VALUE: dict[str, list[Any]] = {
    "threads.list limit": [0, -1],
    "threads.list order": ["ASC"],
    "threads.update title": [None, " ", "x" * 201],
    "threads.add_user_message input.content.0": [None, {"text": "x"}, {"type": "output_text", "text": "x"}],
    "threads.add_user_message input.attachments": [None, [5]],
    "threads.add_structured_input input.status": ["pending"],
    "items.feedback item_ids": [None, [1]],
    "items.feedback kind": [None, "neutral"],
    "attachments.create name": [None, "", "x" * 256],
    "attachments.create size": [None, -1],
    "attachments.create mime_type": [None, "text", "/", "a/b\r\nA: b", "a/b/c", "t\u00e9/x", "*/*"],
    "input.transcribe audio_base64": [None, "A", "AA A", "\u00e9"],
}


def malformed(operation: str, valid: Any, at: Any, *parents: Any) -> Iterator[str]:
    """Lines of requests with a wrong value in one place, which is named in what is said."""
    for key, child in at.items() if isinstance(at, dict) else enumerate(at):
        place, anything = [*parents, key], key in ("result", "payload", "data")
        wrong = [] if anything else WRONG_KIND[type(child)] + ODD_IDS * (key in IDS)
        for value in [*wrong, *WRONG_VALUE.get(f"{operation} {'.'.join(map(str, place))}", [])]:
            at[key] = value
            status, names = "40*" if key in IDS else "400", " ".join(map(str, place))
            yield f"{status} {operation} {json.dumps(valid)} # {names}"
        at[key] = child
        if isinstance(child, (dict, list)) and not anything:
            yield from malformed(operation, valid, child, *place)


REFUSED = [("", line) for line in lines(REFUSALS)]
REFUSED += [("", f'400 POST /chatkit {{"message": "hi", "x": {text}}}') for text in [*DEEP, "9" * 5000]]
REFUSED += [(way[4:], f"{way[:4]}POST /chatkit {body}") for way in lines(FOREIGN) for body in (HI, BEGIN)]
REFUSED += [(way[4:], "403 GET /api/conversations ") for way in lines(FOREIGN) if "Host" in way]
for operation, params in recorded(collections.defaultdict(lambda: "1")):
    REFUSED += [("", line) for line in malformed(operation, params, params)]


def test_what_is_not_right_is_refused_in_a_sentence_and_nothing_is_kept(parrot: Client) -> None:
    def kept(*numbers: int) -> list[Any]:
        paths = ["?limit=100", *(f"/{number}" for number in numbers)]
        return [parrot.get("/api/conversations" + path).json() for path in paths]

    before, all_before = kept(), kept(1, 2, 3)
    for way, line in REFUSED:
        headers = dict(header.split(": ") for header in way.split(", ") if way)
        wanted, request, words = line[:3], *line[4:].partition(" # ")[::2]
        method, path, body = request_of(request)
        raw = re.sub(rb"\\x(..)", lambda code: bytes.fromhex(code[1].decode()), body.encode())
        content = raw.replace(b"LONG", LONG.encode()).replace(b"32001", b"x" * 32_001)
        response = parrot.request(method, path, headers={**JSON, **headers}, content=content)
        status, answer = response.status_code, answer_in(response)
        if streamed := isinstance(answer, list):
            answer = validated("", answer)[-1]
            assert answer["type"] == "error", line
            status = 503 if answer["allow_retry"] else 200
        detail = answer.get("detail") or answer["message"]
        told = way, line[:200], status, response.text
        assert re.fullmatch(wanted.replace("*", "[04]"), str(status)) and isinstance(detail, str), told
        assert streamed or request[0].isupper() or answer == {"detail": detail, "message": detail}, told
        assert detail and (status == 404 or all(word in detail for word in words.split())), told
        assert "access-control-allow-origin" not in response.headers and kept() == before, told
    assert kept(1, 2, 3) == all_before


@parametrize("body", [HI, BEGIN])
def test_this_machine_and_listed_pages_get_in(parrot: Client, body: str) -> None:
    same, kind = {"Host": "LOCALHOST:8", "Origin": "http://localhost:8"}, "Application/JSON; charset=utf-8"
    listed = {"Host": "[::1]:8000", "Content-Type": kind, "Origin": "http://localhost:3000"}
    for way in ({"Host": "localhost:8000"}, same, listed):
        response = parrot.post("/chatkit", headers={**JSON, **way}, content=body)
        assert response.status_code == 200, way
    assert response.headers["access-control-allow-origin"] == "http://localhost:3000"


def test_preflights_let_listed_pages_in_and_others_are_logged(guarded: Client, caplog: Any) -> None:
    caplog.set_level("INFO", "chatkit")
    names = {"chatkit-frame-instance-id", "content-type", "x-of-the-page"}
    asks = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": ",".join(names)}
    for origin in [*ORIGINS, "http://localhost:5174", "null", EVIL]:
        listed = origin in ORIGINS
        headers = guarded.options("/attachments", headers={"Origin": origin, **asks}).headers
        assert headers.get("access-control-allow-origin") == (origin if listed else None)
        if listed:
            assert headers["access-control-allow-credentials"] == "true"
            assert names <= set(re.findall(r"[\w-]+", headers["access-control-allow-headers"].lower()))
            assert "CHATKIT_CORS_ORIGINS" not in caplog.text
    until(lambda: re.search(f"WARNING.*{EVIL}.*CHATKIT_CORS_ORIGINS", caplog.text))  # after the answer


def dial(client: Client) -> socket.socket:
    return socket.create_connection(("127.0.0.1", client.base_url.port or 80), DEADLINE)


@parametrize("head", ["HTTP/1.0\r\n", "HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n"])
def test_a_request_with_no_host_or_two_of_them_gets_nothing(parrot: Client, head: str) -> None:
    with dial(parrot) as caller:
        caller.sendall(f"GET /api/conversations {head}\r\n".encode())
        assert int(caller.recv(4096).split()[1]) in (400, 403)


FILE = b'--x\r\nContent-Disposition: form-data; name="file"'


@parametrize("path", ["/chatkit", "/attachments", "/api/conversations/1/tool_output"])
def test_a_body_that_never_ends_is_refused_while_it_is_read(parrot: Client, path: str) -> None:
    kind, start = "application/json", b'{"a":"'
    if path == "/attachments":
        kind, start = "multipart/form-data; boundary=x", FILE + b'; filename="a"\r\n\r\n'
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked"
    with dial(parrot) as caller:
        caller.sendall(head.encode() + b"\r\n\r\nFFFFFFF\r\n" + start)
        caller.setblocking(False)
        sent = 0
        while sent < 16 * MAX_BODY and not select.select([caller], [], [], 0)[0]:
            assert any(select.select([caller], [caller], [], DEADLINE))
            with contextlib.suppress(BlockingIOError, ConnectionError):
                sent += caller.send(b"x" * 65536)
        assert caller.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_an_odd_form_is_refused_or_taken_but_breaks_nothing(parrot: Client) -> None:
    names = [b"", b'; filename=""', b'; filename="a\0/../b"', b'; filename="' + b"a" * 3000 + b'"']
    names += [b'; filename="+2AA-\xff\0"', b'; filename="a"\r\nContent-Type: \xff/\0']
    forms = [FILE + name + b"\r\n\r\nhi\r\n--x--" for name in names]
    forms += [b"", b"--x", b"--x\r\n\r\nhi\r\n--x--", (FILE + b"\r\n\r\nhi\r\n") * 30]
    x = "; boundary=x"
    kinds = ["", "; boundary=", x, f"{x}; charset=utf-7", f"{x}; charset=undefined"]
    for kind, content in itertools.product(kinds, forms):
        headers = {"Content-Type": "multipart/form-data" + kind}
        response = parrot.post("/attachments", content=content, headers=headers)
        assert response.status_code in (200, 400, 413, 415), (kind, content, response.text)
        if response.status_code == 200:
            assert parrot.get(f"/attachments/{response.json()['id']}").content == b"hi"


# ---- anything at all

NASTY_JSON = r"""
null true 0 -1 1 1.5 01 NaN 1e999 9223372036854775808 "" "0" "-1" "x" "\ud800" "\u2028" "\u0000" "../.." "a/b"
[] {} [[]] [null] {"":null} {"type":"x"} "\ud83d\ude00"
"""
NASTY = [*NASTY_JSON.split(), "", " ", "\0", "\udcff", "[" * 3000, "9" * 30, json.dumps(["1"] * 300)]
NASTY += [json.dumps("a" * count) for count in (300, 40_000)]
PIECES = r'("[^"]*"|\w+|[][{}:,])', r"(\[[^][]*\]|\{[^{}]*\})"  # of JSON: the least; lists and objects
MORE = """
POST /chatkit {"message": "hi", "model": "demo", "tool_choice": "give_back", "attachments": []}
threads.create {"input": {"content": [{"type": "input_tag", "id": "1", "text": "t", "data": {"a": 1}}]}}
GET /(openapi.json | api/conversations?limit=5&offset=1&q=milk)
"""


def spoilt(line: str, chance: random.Random) -> tuple[str, str, bytes]:
    """A request with up to three pieces of its JSON replaced, and now and then one of its path."""
    method, url, body = request_of(line)
    if not body or chance.random() < 0.1:
        part, other = chance.choice(re.findall(r"\w+", url)), chance.choice(NASTY)[:500]
        url = url.replace(part, urllib.parse.quote(other, safe="", errors="surrogateescape"))
    for _ in range(chance.choice([0, 1, 1, 1, 2, 3]) if body else 0):
        parts = re.split(chance.choice(PIECES), body)
        if len(parts) > 1:
            parts[chance.randrange(1, len(parts), 2)] = chance.choice(NASTY)
        body = "".join(parts)
    return method, url, body.encode(errors="surrogateescape")


@parametrize("count", [300, pytest.param(10_000, marks=slow)])
def test_no_mutation_of_a_valid_request_breaks_it_or_its_answer(tmp_path: Path, count: int) -> None:
    chance, statuses, file = random.Random(6), collections.Counter[int](), tmp_path / "chatkit.db"
    with serving(TOOLBOX, database=str(file), transcribe=transcribe, on_action=redraw) as client:
        for number in range(count):
            if number % 100 == 0:  # what there was is renamed, locked and deleted by now
                mine = belongings(client, "local")
                valid = attempts(mine, mine) + lines(NAMELESS + MORE)
            method, url, content = spoilt(chance.choice(valid), chance)
            response = client.request(method, url, content=content, headers=JSON)
            statuses[response.status_code] += 1
            assert response.status_code < 500, (number, method, url, content[:500], response.text)
            if response.status_code == 200 and url == "/chatkit" and "type" in json.loads(content):
                validated(json.loads(content)["type"], answer_in(response))
        there = client.get("/api/conversations?limit=100").json()
        running = [f"/api/conversations/{conversation['id']}/stream" for conversation in there]
        until(lambda: {client.get(url).status_code for url in running} == {204})
    assert min(statuses[200], statuses[400]) > count / 20, statuses  # it did get in, and was refused
    assert_sound(file)


# ---- events

FORGED = [
    "a\rb", "a\r\n\r\nb", "\u2028", "\x85", "\x0b\x0c\x1c\x1d\x1e", "data: x", "\ndata: [DONE]\n\n", "[DONE]",
    '\n\nid: 9\ndata: {"type": "done"}\n\n', ": comment", "retry: 1\n", "\ufeff", '"}', "\\n\\u0000", "\0",
    "\x1b[31m\x7f", "\u202e\u200b", "\U0010ffff", "'; DROP TABLE", "%s {0}",
]  # fmt: skip
ODD_JSON = ['{"a": "\\ud83d"}', '{"a": NaN}', '{"a": 1e999}', "[" * 5000, "[" + "9" * 5000 + "]", "[DONE]"]


def both_streams(client: Client, text: str) -> list[list[Any]]:
    """A message's events in either dialect, read as the HTML standard has a browser do, and as strictly."""
    both = []
    for body in ({"message": text}, asked("threads.create", input=user_input(text))):
        stream = re.sub("\r\n?", "\n", client.post("/chatkit", json=body).text)
        assert set(re.findall("^[^:\n]*", stream, re.M)) <= {"data", "id", ""}
        told = re.findall("^data: (.*)", stream, re.M)
        assert "type" in body or told.pop() == "[DONE]"
        both.append([json.loads(data) for data in told])
    json.dumps(both, ensure_ascii=False, allow_nan=False).encode()
    return both


@parametrize("text", FORGED)
def test_text_is_shown_and_kept_as_it_was_said_and_forges_no_event(text: str) -> None:
    once, twice = f"!{text}!", f"!{text}!+!{text}!"
    turn = [Call("give_back", {"what": once})], [once, "+", once]
    with serving(scripted(*turn, *turn, tools=[give_back])) as client:
        events, chatkit = both_streams(client, once)
        kept = [row["content"] for row in client.messages(1)]
        url = "/api/conversations/1"
        titles = client.patch(url, json={"title": once}), client.get(url)
    assert kinds(events) == ["thread", "thinking", "tool_call", "tool_result", "text", "done"]
    assert (said(events), events[2]["args"], events[3]["result"]) == (twice, {"what": once}, once)
    assert kept == [once, once, twice]
    assert "".join(update["delta"] for update in updates_in(chatkit) if "delta" in update) == twice
    done = [event["item"] for event in of_type(chatkit, "thread.item.done")]
    assert [item["type"] for item in done] == ["user_message", "task", "assistant_message"]
    assert [item["content"][0]["text"] for item in done if "content" in item] == [once, twice]
    assert [response.json()["title"] for response in titles] == [once, once]


@parametrize("odd", ODD_JSON)
def test_results_and_arguments_that_are_not_quite_json_break_nothing(odd: str) -> None:
    turn = [Call("give_back", {"what": odd})], [odd]
    with serving(scripted(*turn, *turn, tools=[give_back])) as client:
        events, _ = both_streams(client, odd)
        assert said(events) == odd and len(items(client, thread_id="2")) == 3
        assert of_type(events, "tool_result")[0]["result"] in (odd, {"a": "\ufffd"})
    for begin_with in (Client.send_message, create):
        with serving(scripted([Call("give_back", odd)], ["Well."], tools=[give_back])) as client:
            assert begin_with(client, "hi")[-1]["type"] in ("done", "thread.item.done", "error")
            assert {row["status"] for row in client.messages(1)} <= {"done", "failed"}
            assert said(client.send_message("and now", 1)) == "Well."


# ---- limits


@parametrize("body", [HI, BEGIN], ids=["plain", "ChatKit"])
@parametrize(("limit", "status"), [("max_concurrent_turns", 503), ("max_turns_per_user", 429)])
def test_beyond_the_limits_the_answer_is_no_at_once(body: str, limit: str, status: int) -> None:
    wait = Wait()
    agent = scripted([wait, "Hello."])
    with serving(agent, jwt_secret=SECRET, **{limit: 2}) as client, ThreadPoolExecutor(9) as pool:

        def got_in(user_id: str) -> bool:
            response = client.post("/chatkit", content=body, headers={**JSON, **bearer(user_id)})
            if body == BEGIN:  # the component shows an `error` event, and of a 503 nothing
                return not any(event.get("allow_retry") for event in chatkit_events(response.text))
            assert response.status_code in (200, status)
            return response.status_code == 200 or not int(response.headers["retry-after"])

        asked = [pool.submit(got_in, "ann") for _ in range(8)]
        until(lambda: sum(each.done() for each in asked) == 6)  # while those who got in wait for the model
        other = pool.submit(got_in, "ben")
        until(lambda: other.done() or len(cast(Script, agent.model).seen) == 3)
        wait.gate.set()
        assert other.result(DEADLINE) == (status == 429)
        assert sum(each.result(DEADLINE) for each in asked) == 2
        assert got_in("ann")
        assert len(client.get("/api/conversations", headers=bearer("ann")).json()) == 3


def test_a_message_may_be_as_long_as_is_set() -> None:
    with serving(scripted(["Long."]), max_message_chars=2 * MAX_BODY) as client:
        assert said(client.send_message("x" * 2 * MAX_BODY)) == "Long."


def test_without_tokens_everybody_is_one_user_without_a_limit_of_their_own() -> None:
    wait = Wait()
    with serving(scripted([wait, "Hello."]), max_turns_per_user=2) as client, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(client.send_message, "hi") for _ in range(6)]
        until(lambda: len(client.get("/api/conversations").json()) == 6)
        wait.gate.set()
        assert all(said(each.result(DEADLINE)) == "Hello." for each in asked)


# =================================================================================================== Students
# The first hour: what is written wrong, data of one's own, what the documents say, and the notebook.

# What somebody writes, and what the one sentence about it must say.
WRONG = {
    'create_app("my agent")': "Agent",
    "create_app(Agent)": "Agent(",
    "create_app(agent=7)": "Agent",
    'create_app(port="abc")': "port",
    'create_app(databse="x.db")': "database",
    'create_app(settings={"port": 1})': "Settings",
    'create_app(store="x.db")': "Store(",
    "create_app(lifespan=7)": "lifespan",
    "create_app(models=None)": "models",
    "create_app(models=[agent])": "models",
    'create_app(model="a/b", openai_base_url="http://localhost:1/v1")': "openai/a/b",
    'create_app(model="xai/b", openai_base_url="http://localhost:1/v1")': "openai/xai/b",
    "create_app(on_action=print)": "async def",
    "create_app(on_feedback=print)": "async def",
    "create_app(transcribe=print)": "async def",
    'create_app(jwt_secret="only a short secret")': "32",
    'Settings(jwt_secret="only a short secret")': "32",
    "serve_in_background(agent)": "create_app(",
    'serve_in_background("my agent")': "create_app(",
    'serve_in_background(create_app(agent, database=":memory:"), host="0.0.0.0")': "CHATKIT_JWT_SECRET",
}


@parametrize("code", WRONG)
def test_a_wrong_argument_is_answered_with_what_belongs_there(code: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        eval(code, {**vars(ck), "Agent": Agent, "agent": scripted(["hello"])})
    text = str(caught.value)
    assert WRONG[code] in text and text.count("\n") == 0 and len(text) < 300, text
    assert "only a short secret" not in text


# The same of the context, in a generator, a tool or an action handler.
WRONG_CALLS = {
    'widget({"type": "Text"})': "Card",
    'ask([{"type": "freeform", "id": "a", "question": "?"}] * 2)': "an id of its own",
    "ask([])": "at least 1",
    'client_tool("x", {"y": object()})': "object",
    "update_workflow_task({}, 0)": "task 0",
    "answer()": "action handlers",
    'stream({"type": "done"})': "'done'",
    'stream({"type": "thread.item.updated", "item_id": "1", "update": "x"})': "no update",
    'stream({"type": "thread.item.updated", "item_id": "x", "update": {}})': "no item x",
    'stream({"type": "notice", "level": "loud", "message": "!"})': "'notice'",
    "remove(999)": "999",
    'replace_widget(1, {"type": "Card"})': "no widget 1",
    'update_thread(status="gone")': "closed",
}


def test_a_wrong_call_of_the_context_is_answered_with_what_is_wrong() -> None:
    async def answer(context: Any, history: Any) -> AsyncIterator[str]:
        for code in WRONG_CALLS:
            try:
                called = eval("context." + code, {"context": context})
                yield f"{code}: {await called}"
            except (TypeError, ValueError, LookupError, RuntimeError) as error:
                yield f"{error}\n"

    with serving(answer) as visitor:
        *events, done = visitor.send_message("go")
    assert done["status"] == "completed"
    texts = said(events).splitlines()
    assert [word for word in WRONG_CALLS.values() if not any(word in text for text in texts)] == []


BAD_SETTINGS = """
CHATKIT_PORT http 99999 -1 1.5
CHATKIT_HISTORY_LIMIT 0 -1 many
CHATKIT_MAX_MESSAGE_CHARS 0 long
CHATKIT_MAX_ATTACHMENT_BYTES 0 10MB
CHATKIT_MAX_STEPS 0 1.5
CHATKIT_MAX_CONCURRENT_TURNS 0 x
CHATKIT_MAX_TURNS_PER_USER 0 x
CHATKIT_TURN_TIMEOUT 0 -1 nan inf soon
CHATKIT_ON_DISCONNECT explode
CHATKIT_LOG_LEVEL loud
CHATKIT_TRACING perhaps
CHATKIT_SHOW_TOOLS some
CHATKIT_CORS_ORIGINS localhost:3000 ftp://x
CHATKIT_JWKS_URL ftp://x keys.json http://
OPENAI_BASE_URL localhost:1234 http//localhost:1234/v1
CHATKIT_JWT_SECRET only-a-short-secret
"""


@parametrize("line", BAD_SETTINGS.split("\n")[1:-1])
def test_a_setting_that_makes_no_sense_is_named(line: str, monkeypatch: Any) -> None:
    name, *values = line.split()
    for value in values:
        monkeypatch.setenv(name, value)
        with pytest.raises(ck.SettingsError) as caught:
            ck.Settings.from_env()
        assert name in str(caught.value) and "\n" not in str(caught.value)
        assert "only-a-short-secret" not in str(caught.value)


def test_an_unknown_variable_gets_a_warning_with_the_nearest_name(monkeypatch: Any, caplog: Any) -> None:
    for name in ("CHATKIT_TITLE", "CHATKIT_DATABSE"):
        monkeypatch.setenv(name, "x")
    ck.Settings.from_env()
    assert "CHATKIT_DATABSE" in caplog.text and "CHATKIT_DATABASE" in caplog.text
    assert "CHATKIT_TITLE" not in caplog.text


def test_the_module_alone_says_what_is_missing(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    shutil.copy(HERE / "chatkit_server.py", tmp_path / "copied_alone.py")
    monkeypatch.syspath_prepend(tmp_path)
    alone = importlib.import_module("copied_alone")
    assert alone.main(["--port", "0", "--database", str(tmp_path / "x.db"), "--model", "demo"]) == 2
    assert "schema.sql" in capsys.readouterr().err.splitlines()[-1]


def test_the_modules_own_list_of_packages_is_that_of_requirements_txt() -> None:
    source = (HERE / "chatkit_server.py").read_text(encoding="utf-8")
    block = source.partition("# /// script\n")[2].partition("# ///\n")[0]
    assert '# requires-python = ">=3.10"' in block
    needed = (HERE / "requirements.txt").read_text(encoding="utf-8").partition("# For the tests")[0]
    listed = re.findall(r'^# +"([^";]+)', block, re.M)
    wanted = re.findall(r"^[^#;\n]+", needed, re.M)
    assert listed and sorted(map(str.strip, listed)) == sorted(map(str.strip, wanted))


def test_a_token_comes_with_an_invitation(guarded: Client, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("CHATKIT_JWT_SECRET", SECRET)
    assert ck.main(["--token", "ann", "--port", "8123"]) == 0
    invitation = re.search(r"http://localhost:8123/#\S*?([\w-]+\.[\w-]+\.[\w-]+)\s", capsys.readouterr().out)
    assert invitation is not None and status_with(guarded, invitation[1]) == 200


# ---- data of one's own


async def test_a_store_and_its_file_may_be_shared_and_have_tables_of_ones_own(tmp_path: Path) -> None:
    async def note(context: ck.TurnContext) -> str:
        await context.store.execute("INSERT INTO notes VALUES (?, ?)", context.user_id, text)
        return json.dumps(await context.store.execute("SELECT * FROM notes"))

    text, file = "'; DROP TABLE notes; --", tmp_path / "chat.db"
    change(file, "CREATE TABLE notes (user_id TEXT, text TEXT)")
    agent, store = doing(note, [Call("tool")], ["Done."]), ck.Store(file)
    with pytest.raises(ck.StoreError, match="async with"):
        await store.execute("SELECT 1")
    async with store:
        app = make_app(agent, store=store)
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            await client.post("http://localhost/chatkit", json={"message": "hi"})
        own = {"user_id": "local", "text": text}
        assert await store.execute("SELECT * FROM notes WHERE text = ?", text) == [own]
    with serving(agent, store=ck.Store(file)) as visitor:  # opened and closed with the app
        assert of_type(visitor.send_message("hi"), "tool_result")[0]["result"] == [own, own]


def test_a_later_opener_is_warned_and_breaks_no_running_answer(tmp_path: Path, caplog: Any) -> None:
    """Also where the first one has gone meanwhile."""
    file, wait, first = tmp_path / "shared.db", Wait(), contextlib.ExitStack()
    first.enter_context(serving(scripted(["x"]), database=str(file)))
    with answering(scripted(["Half ", wait, "whole."]), wait, database=str(file)) as (_, events):
        first.close()
        until(lambda: rows_of(file, "SELECT id FROM messages WHERE status = 'streaming'"))
        caplog.clear()
        with serving(scripted(["x"]), database=str(file)) as third:
            assert [row["status"] for row in third.messages(1)] == ["done", "streaming"]
        assert re.search("WARNING.*shared.db", caplog.text)
        wait.gate.set()
        assert said(events.result(DEADLINE)) == "Half whole."
    assert rows_of(file, "SELECT status FROM messages") == [("done",), ("done",)]
    assert [*tmp_path.iterdir()] == [file]


# ---- one's own page, what is shown, and retry


def test_the_config_says_what_a_page_needs(hello: Client) -> None:
    config: Json = {"title": "ChatKit", "greeting": "How can I help?", "starters": []}
    config["model"] = "Script"
    config |= {"models": ["Script"], "uploads": {"max_bytes": 10 * 1024 * 1024}, "dictation": False}
    config |= {"tools": [{"name": "echo", "description": "Give back what it is given."}]}
    assert hello.get("/api/config").json() == config
    with serving(title="Kitchen", greeting="Hungry?") as client:
        config = client.get("/api/config").json()
    assert (config["title"], config["greeting"], len(config["starters"])) == ("Kitchen", "Hungry?", 3)


HIDDEN = {"full": [], "names": ["ARGUMENT", "RESULT"], "none": ["ARGUMENT", "RESULT", "secretive"]}


@parametrize("show", HIDDEN)
def test_readers_are_shown_as_much_of_tools_as_is_set(show: str) -> None:
    @function_tool
    async def secretive(text: str) -> str:
        return "RESULT"

    turn: list[list[Any]] = [[Call("secretive", {"text": "ARGUMENT"})], ["Done."]]
    agent = scripted(*turn, *turn, tools=[secretive])
    with serving(agent, show_tools=show) as client:
        seen = [client.post("/chatkit", content=body, headers=JSON).text for body in (HI, BEGIN)]
        seen += [client.get("/api/conversations/1" + query).text for query in ("", "?format=markdown")]
        seen += [json.dumps(client.operate("items.list", thread_id=thread)) for thread in ("1", "2")]
    for text in seen:
        assert "Done." in text and not any(word in text for word in HIDDEN[show]), text
        assert show == "none" or "secretive" in text, text
    assert "ARGUMENT" in str(shown_to(agent)) and "RESULT" in str(shown_to(agent))


def test_a_conversation_can_be_had_as_a_markdown_file() -> None:
    with serving(scripted([Call("echo", {"text": "x"})], ["**Bold** and `code`"])) as client:
        client.send_message("What *is* it?\nTell me.")
        client.send_message("", 1, attachments=[upload(client, b"hi", "tea.txt")["id"]])
        client.patch("/api/conversations/1", json={"title": "Gr\u00fc\u00dfe / 1"})
        response = client.get("/api/conversations/1?format=markdown")
    assert response.headers["content-type"].startswith("text/markdown")
    assert re.match(r"attachment; .*\.md\b", response.headers["content-disposition"])
    assert response.text.startswith("# Gr\u00fc\u00dfe / 1\n")
    assert re.search(r"What \*is\* it\?\nTell me\.(?s:.*)echo(?s:.*)\*\*Bold\*\* and `code`", response.text)
    assert "`code`\n\n**You**\n\n- tea.txt\n\n**Assistant**\n\n**Bold**" in response.text


def test_an_earlier_message_is_answered_anew_with_other_words() -> None:
    agent = scripted(["one"], ["two"], ["three"], ["four"])
    with serving(agent) as client:
        client.send_message("first")
        client.send_message("second", 1)
        retry = "/api/conversations/1/retry"
        events = list(plain_events(client.post(retry, json={"message_id": 1, "message": "better"})))
        assert said(events) == "three"
        assert texts(client) == ["better", "three"]
        assert [item["content"] for item in shown_to(agent)] == ["better"]
        found = [client.get("/api/conversations", params={"q": word}).json() for word in ("better", "second")]
        assert len(found[0]) == 1 and found[1] == []
        assert said(list(plain_events(client.post(retry)))) == "four"
        assert texts(client) == ["better", "four"]


# ---- the documents


@functools.cache
def document() -> Json:
    """What /openapi.json says of each route, with its references followed."""
    with serving() as client:
        assert "/openapi.json" in client.get("/docs").text
        text = client.get("/openapi.json").text
    schemas = json.loads(text)["components"]["schemas"]

    def follow(part: Json) -> Any:
        return schemas[part["$ref"].rpartition("/")[2]] if "$ref" in part else part

    paths = json.loads(text, object_hook=follow)["paths"]
    return {f"{way.upper()} {path}": paths[path][way] for path in paths for way in paths[path]}


def test_the_document_has_each_routes_body_answer_and_errors() -> None:
    keyed = ("GET /health", "GET /attachments/{attachment_id}", "POST /attachments/{attachment_id}")
    assert len(document()) >= 17
    for route, told in document().items():
        answers = told["responses"]
        errors = [status for status in answers if status >= "400"]
        for status in set(answers) - {"204"}:
            content = answers[status]["content"]
            assert status < "400" or content["application/json"]["schema"]["properties"]["detail"], route
        assert told["summary"] and answers, route
        assert route in keyed or {"401", "403"} <= set(errors), route
        assert "{" not in route or "404" in errors, route
        if route.startswith(("POST ", "PATCH ")) and not route.endswith("/cancel"):
            assert re.search("'properties': {.*'type'", str(told["requestBody"]["content"])), route
            assert {"400", "413", "415"} <= set(errors) and "422" not in errors, route


def test_the_examples_of_both_dialects_work(hello: Client) -> None:
    chatkit = document()["POST /chatkit"]
    examples = chatkit["requestBody"]["content"]["application/json"]["examples"]
    bodies = [example["value"] for example in examples.values()]
    assert {"type" in body for body in bodies} == {True, False}
    assert [hello.post("/chatkit", json=body).status_code for body in bodies] == [200] * len(bodies)
    stream = str(chatkit["responses"]["200"]["content"]["text/event-stream"])
    assert "data: " in stream and "[DONE]" in stream


@slow
def test_no_status_and_no_answer_is_other_than_the_document_says(tmp_path: Path) -> None:
    schemathesis, hypothesis = optional("schemathesis"), optional("hypothesis")
    checks = optional("schemathesis.specs.openapi.checks")
    judged = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
    judges = [getattr(checks, name) for name in judged]
    healthy: Json = {"suppress_health_check": list(hypothesis.HealthCheck)}
    tried, file = set[str](), str(tmp_path / "chat.db")
    with serving(TOOLBOX, database=file) as client:
        belongings(client, "local")
    with serving(database=file, transcribe=transcribe) as client:
        for found in schemathesis.openapi.from_dict(client.get("/openapi.json").json()).get_all_operations():

            @hypothesis.given(case=found.ok().as_strategy())
            @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, **healthy)
            def attack(case: Any) -> None:
                with contextlib.suppress(ValueError):  # what no HTTP client would send
                    response = case.call(base_url=str(client.base_url))
                    tried.add(case.path)
                    case.validate_response(response, checks=judges)

            attack()
    assert len(tried) >= 10
    assert_sound(file)


# ---- the notebook

CELLS = '''
# %% imports
import asyncio, gc, os, signal, sys, threading, warnings
import httpx, psutil, chatkit_server as ck
warnings.simplefilter("error")
# %% serve
server = ck.serve_in_background(ck.create_app(database=":memory:"))
server
# %% use
url = server.url
print(httpx.post(url + "/chatkit", json={"message": "add milk"}).text)
other = ck.serve_in_background(ck.create_app(database=":memory:"))
# %% leave
for each in (url, server.url, other.url):
    try: print(httpx.get(each + "/health").status_code)
    except httpx.ConnectError: print("gone")
store = ck.Store("chat.db")
await store.open()
async for event in ck.stream_agent("add milk", store=store):
    if event["type"] == "text": break
# %% interrupt
async def slow(context, history):
    yield "Half "
    await asyncio.sleep(60)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
async for event in ck.stream_agent("hi", agent=slow, store=store, conversation_id=1): pass
# %% change
async def echo(context, history):
    yield history[-1]["content"]
async for event in ck.stream_agent("hello", agent=echo, store=store, conversation_id=1): print(event)
# %% mcp
from agents import Agent
from agents.mcp import MCPServerStdio
CLOCK = """
import time, mcp.server
server = mcp.server.MCPServer("clock")
server.add_tool(lambda: time.ctime(), "now", description="Say what time it is.")
server.run()
"""
clock = MCPServerStdio({"command": sys.executable, "args": ["-c", CLOCK]})
desk = Agent(name="Desk", mcp_servers=[clock])
async for event in ck.stream_agent("call now", agent=desk, store=store): print(event)
# %% end
for row in await store.execute("SELECT content, status FROM messages"): print(row)
await store.close()
server.stop()
other.stop()
gc.collect()
print([t.name for t in threading.enumerate() if "chatkit" in t.name or "connection" in t.name])
print(psutil.Process().children())
'''


def test_the_cells_of_a_notebook_run_in_a_kernel(tmp_path: Path, monkeypatch: Any) -> None:
    optional("ipykernel")
    nbformat, nbclient = optional("nbformat"), optional("nbclient")
    codes = dict(cell.split("\n", 1) for cell in CELLS.split("# %% ")[1:])
    cells = {name: nbformat.v4.new_code_cell(code) for name, code in codes.items()}
    cells["interrupt"]["metadata"]["tags"] = ["raises-exception"]
    for name, value in {**CLEAN_ENV, "JUPYTER_PLATFORM_DIRS": "1"}.items():
        monkeypatch.setenv(name, value)
    # What is worth a warning, and what would keep a kernel from having a stderr that processes can write to.
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "CHATKIT_TEST_ALL", "PYTEST_CURRENT_TEST"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.v4.new_notebook(cells=list(cells.values()))
    client = nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3")
    client.resources["metadata"] = {"path": str(tmp_path)}
    printed: dict[str, str] = {}
    with client.setup_kernel():
        for name in ("imports", "serve", "use", "serve", "leave", "interrupt", "change", "mcp", "end"):
            client.execute_cell(cells[name], list(cells).index(name))
            outputs = cells[name]["outputs"]
            assert not [out for out in outputs if out.get("name") == "stderr"], outputs
            printed[name] = "".join(out.get("text", "") for out in outputs)
    [shown] = cells["serve"]["outputs"]
    assert re.search(r'<a [^>]*href="http://localhost:\d+', shown["data"]["text/html"])
    assert "Added" in printed["use"]
    # The cell's first server, its second, and the other.
    assert printed["leave"].split() == ["gone", "200", "200"]
    assert cells["interrupt"]["outputs"][-1]["ename"] in ("KeyboardInterrupt", "CancelledError")
    assert "'hello'" in printed["change"] and "'completed'" in printed["change"]
    assert time.strftime("%Y") in str(re.findall("'tool_result'.*", printed["mcp"]))
    *rows, threads, processes = printed["end"].splitlines()
    assert "'Half '" in str(rows) and "streaming" not in str(rows) and threads == processes == "[]"


# ===================================================================================================== README
# What the README says: each example runs as it stands, and each table is complete.


def section(heading: str) -> str:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def in_code(text: str) -> list[str]:
    return re.findall("`([^`]+)`", " ".join(text.split()))


def told_in(heading: str, column: int = 0) -> list[list[str]]:
    """What stands in code in one column of a section's table, row by row."""
    rows = [line.replace("\\|", "").split("|") for line in section(heading).splitlines() if line[:1] == "|"]
    return [in_code(row[column + 1]) for row in rows[2:]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def example(request: pytest.FixtureRequest, here: Path) -> Iterator[Client]:
    """A client of the app that an example defines."""
    with ck.serve_in_background(readme_example(request.param)["app"]) as url, Client(base_url=url) as client:
        yield client


def test_the_readmes_curl_prints_what_it_says() -> None:
    command, printed = re.findall(r"^```\w*\n(.*?)^```", section("Talk to it"), re.S | re.M)
    with serving() as client:
        answer = client.post("/chatkit", json=json.loads(command.split("'")[1])).text
    lines = [line for line in answer.splitlines() if "data" in line]
    texts = [number for number, line in enumerate(lines) if '"text"' in line]
    assert len(texts) == 10
    lines[texts[1] : texts[-1] + 1] = ["(nine more of these, a word each)"]
    same = functools.partial(re.sub, r"call_\w+|_tokens\": \d+|\n$", "")
    assert same("\n".join(lines)) == same(printed)


@slow
def test_the_readmes_generators(here: Path, monkeypatch: Any) -> None:
    (here / "generators.py").write_text(readme_block("generators.py").replace("port=8000", "port=0"))
    with subprocess.Popen([sys.executable, "generators.py"], env=CLEAN_ENV, text=True, **PIPES) as process:
        assert process.stdout is not None
        with Client(base_url=process.stdout.readline().strip()) as client:
            assert said(client.send_message("Hello there")) == "Hello there "
        process.communicate("\n", DEADLINE)
    assert process.returncode == 0
    ask_openai = readme_example("generators.py")["ask_openai"]
    with Provider(["From ", "afar."]) as provider, serving(ask_openai) as client:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", provider.url + "/v1")
        assert said(client.send_message("hi")) == "From afar."
        client.send_message("and?", thread_id=1)
    assert [item["content"] for item in provider.requests[1]["body"]["input"]] == ["hi", "From afar.", "and?"]


@parametrize("example", ["tools.py"], indirect=True)
def test_the_readmes_tools_tell_and_ask_the_person(example: Client) -> None:
    events = example.send_message('call weather {"city": "Oslo"}')
    assert kinds(events)[2:7] == ["tool_call", "progress", "effect", "notice", "tool_result"]
    [item] = of_type(example.send_message("call get_selection"), "item")
    assert item["item"]["arguments"] == {"kind": "text"}
    answer = example.post("/api/conversations/2/tool_output", json={"result": {"lines": 2}})
    assert '"result": {"lines": 2}' in answer.text
    [item] = of_type(example.send_message("call plan_dinner"), "item")
    body = {"item_id": item["item"]["id"], "answers": {"main": {"values": ["soup"]}}}
    assert '"values": ["soup"]' in example.post("/api/conversations/3/answers", json=body).text
    spoken = example.operate("input.transcribe", audio_base64="AAAA", mime_type="audio/webm;codecs=opus")
    assert spoken == {"text": "3 bytes of audio/webm"}


@parametrize("example", ["desk.py"], indirect=True)
def test_the_readmes_desk_hands_over_asks_for_approval_and_looks_at_its_clock(example: Client) -> None:
    assert of_type(example.send_message("call now"), "tool_result")[0]["result"][-4:].isdigit()  # the year
    assert of_type(example.send_message("my card is 4111"), "error")[0]["code"] == "guardrail"
    [item] = of_type(example.send_message('call transfer_to_billing call refund {"euros": 5}'), "item")
    [asked] = item["item"]["inputs"]
    answers = {asked["id"]: {"values": [asked["options"][0]["value"]]}}
    body = {"item_id": item["item"]["id"], "answers": answers}
    assert "5 euros are on their way." in example.post("/api/conversations/3/answers", json=body).text


@parametrize("example", ["recipes.py"], indirect=True)
def test_the_readmes_recipe_counts_clicks(example: Client) -> None:
    click = re.findall(r"-d '(.*?)'", section("Extending"), re.S)[-1]
    [item] = of_type(example.send_message('call add_recipe {"name": "Soup"}'), "item")
    assert item["item"]["widget"]["children"][0]["label"] == "Soup: cooked 0 times"
    events = chatkit_events(example.post("/chatkit", json=json.loads(click)).text)
    assert events[-1]["item"]["widget"]["children"][0]["label"] == "Soup: cooked 1 times"


async def test_the_cells_of_the_readmes_lesson(here: Path, capsys: Any) -> None:
    first, *cells = readme_block("lesson.py").split("# %%\n")
    names: Json = {"__name__": "__main__"}
    exec(first, names)
    with Client(base_url=names["server"].url) as client:
        assert said(await asyncio.to_thread(client.send_message, "hello")) == "hello"
    for cell in cells:
        waiting = eval(compile(cell, "cell", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        await (waiting or asyncio.sleep(0))
    told = capsys.readouterr().out
    assert "'name': 'add', 'result': '3'" in told and "(2, 'assistant', 'hello', 'done')" in told


def test_the_readme_lists_every_route_and_what_comes_back() -> None:
    with serving() as client:
        paths = client.get("/openapi.json").json()["paths"]
        client.send_message("call list_tasks")
        [conversation] = client.get("/api/conversations").json()
        message = {name for row in client.messages(1) for name in row}
        file = client.post("/attachments", files={"file": ("a.png", b"", "image/png")}).json()
    found = {f"{way.upper()} {re.sub('{[^}]*}', '{id}', path)}" for path in paths for way in paths[path]}
    found |= {f"GET /{page}" for page in ("", "component", "docs", "openapi.json")}
    assert sorted(itertools.chain(*told_in("Routes"))) == sorted(found)
    shapes = [re.findall(r'"(\w+)"', code) for code in in_code(section("Routes"))]
    assert list(conversation) in shapes and list(file) in shapes
    assert any(message | {"item", "error"} == set(shape) for shape in shapes)


def test_the_readme_lists_every_event_and_every_code_of_an_error() -> None:
    async def everything(context: ck.TurnContext) -> None:
        await context.progress("on it")
        await context.effect("ring")
        await context.notice("info", "look")
        await context.remove(await context.widget({"type": "Card", "children": []}))
        await context.update_thread(title="new")

    with serving(doing(everything, answer=["so far", ConnectionError()])) as client:
        seen = {event["type"]: sorted(set(event) - {"type", "_id"}) for event in client.send_message("go")}
    names, fields = told_in("Events"), told_in("Events", 1)
    assert seen == {name: sorted(field) for [name], field in zip(names, fields, strict=True)}
    codes = in_code(section("Events").partition("Error codes:")[2])
    assert {*codes} == {*ck.REASONS, "unreadable_file", "storage", "shutdown"}


def test_the_readme_lists_every_setting_what_a_context_has_and_the_sections_of_the_module() -> None:
    settings = [ck.Settings.env_name(name) for name in ck.Settings.model_fields]
    told = itertools.chain(*told_in("Settings"))
    assert sorted(told) == sorted([*settings, "BETTER_AUTH_SECRET"])
    table = str(told_in("Extending") + told_in("Extending", 1))
    public = [name for name in {*dir(ck.TurnContext), *ck.TurnContext.__annotations__} if name[0] != "_"]
    assert [name for name in public if not re.search(rf"\b{name}\b", table)] == ["turn"]
    banners = re.findall(r"^# ={20,} (.+)$", Path(ck.__file__).read_text(encoding="utf-8"), re.M)
    assert re.findall(r"\*\*(.+?)\*\*", " ".join(section("Reading it").split())) == banners


def test_each_section_uses_what_stands_above_it_and_else_what_the_map_says() -> None:
    source = Path(ck.__file__).read_text(encoding="utf-8")
    banners = list(re.finditer("^# ={20,} (.+)$", source, re.M))
    starts = {banner[1]: source[: banner.start()].count("\n") for banner in banners}
    tops = [top for top in ast.parse(source).body if top.lineno > min(starts.values())]

    def section_of(node: ast.stmt) -> str:
        return [name for name, start in starts.items() if start < node.lineno][-1]

    def names_in(node: ast.stmt, kind: type[ast.expr_context]) -> set[str]:
        names = (each for each in ast.walk(node) if isinstance(each, ast.Name))
        return {each.id for each in names if isinstance(each.ctx, kind)}

    home: dict[str, str] = {}
    for top in tops:
        names = {getattr(top, "name", "")} if hasattr(top, "name") else names_in(top, ast.Store)
        home |= dict.fromkeys(names - {*home}, section_of(top))
    below: dict[str, set[str]] = {name: set() for name in starts}
    for top in tops:
        own = {each.arg for each in ast.walk(top) if isinstance(each, ast.arg)}
        own |= names_in(top, ast.Store) if hasattr(top, "name") else set()
        used = {home[name] for name in (names_in(top, ast.Load) - own) & {*home}}
        below[section_of(top)] |= {name for name in used if starts[name] > starts[section_of(top)]}
    lines = str(ck.__doc__).partition("in brackets:")[2].strip().splitlines()
    told = [re.fullmatch(r" *(.+?)  +.*?(?: \(([A-Z].*)\))?", line) for line in lines]
    assert {line[1]: {*(line[2] or "").split(", ")} - {""} for line in told if line} == below


# ======================================================================================================= Page
# In one class, because the browser's event loop stays in the thread for as long as the browser is there:
# async tests must come before it or after.

MARKDOWN = """# A heading
One paragraph with **bold**, *italics*, ~~struck~~, `a * b`, a [link](https://example.org/a_(b)?c=1),
and https://example.org/bare. snake_case_name, 2 * 3 * 4, \\*plain\\*.
See (https://example.org/c_(d)), _https://example.org/e_f_!

---

1. first
   - inner **one**

   - inner two
2. second

> A quote
> of *two* lines

| What | Much |
|:-----|-----:|
| `Oat` | 1 \\| 2 |

```python
def f(x):

    return "<b>" + x
```

~~~
```
~~~
The end."""
WHAT_IS_DRAWN = {  # what becomes of it, by selector
    "h3": ["A heading"],
    "strong": ["bold", "one"],
    "em": ["italics", "two"],
    "s": ["struck"],
    "p code": ["a * b"],
    "a": ["link", *(f"https://example.org/{path}" for path in ("bare", "c_(d)", "e_f"))],
    "p + hr": [""],
    "ol > li > ul > li": ["inner one", "inner two"],
    "blockquote": ["A quote\nof two lines"],
    "th": ["What", "Much"],
    "td": ["Oat", "1 | 2"],
    "pre": ['def f(x):\n\n    return "<b>" + x', "```"],
}
HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">
[a](javascript:hacked=3) [c](data:text/html,<script>hacked=4</script>) [d](//e.example)
<svg onload="window.hacked=5"> ![g](javascript:h=11) ![h](http://x.example/a.png)
[f](https://x.example/"onmouseover="hacked=9) **<iframe src="javascript:hacked=7">**
```html
<img src=x onerror="window.hacked = 10">
```"""
LOW_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d");
  const channel = (v) => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = (css) => {
    Object.assign(canvas, {fillStyle: css}).fillRect(0, 0, 1, 1);
    const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
    return .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  };
  const opaque = (css) => css !== "rgba(0, 0, 0, 0)";
  const ground = (node) => opaque(getComputedStyle(node).backgroundColor) ? node : ground(node.parentElement);
  const written = (node) => node.checkVisibility() && !node.closest("[disabled]")
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  return [...document.querySelectorAll("body *")].filter(written).map((node) => {
    const colours = [getComputedStyle(node).color, getComputedStyle(ground(node)).backgroundColor];
    const [low, high] = colours.map(light).sort((a, b) => a - b);
    return [node.textContent.slice(0, 30), (high + .05) / (low + .05)];
  }).filter(([, ratio]) => ratio < 4.5);
}"""
UNNAMED = """() => [...document.querySelectorAll("button, a, input, textarea, select")].filter((node) =>
  !(node.ariaLabel || node.title || node.textContent.trim() || node.ariaLabelledByElements?.length
  || node.labels?.length)).length"""
FITS = "Math.max(document.documentElement.scrollWidth, log.scrollWidth) <= innerWidth"
COMPONENT_SCRIPT = "https://cdn.platform.openai.com/deployments/chatkit/chatkit.js"
STANDIN = """customElements.define("openai-chatkit", class extends HTMLElement {
  setOptions(options) { this.options = options; }
  async connectedCallback() {
    const { api, header, startScreen, composer } = this.options, { fetch = window.fetch } = api;
    const headers = { "content-type": "application/json", "chatkit-frame-instance-id": "x" };
    const post = async (type, params) =>
      (await fetch(api.url, { method: "POST", headers, body: JSON.stringify({ type, params }) })).text();
    const form = new FormData();
    form.append("file", new File(["oats"], "oats.txt", { type: "text/plain" }));
    const sent = await fetch(api.uploadStrategy.uploadUrl, { method: "POST", body: form });
    const content = [{ type: "input_text", text: startScreen.prompts[0].prompt }];
    const inference_options = { model: composer.models?.[1].id, tool_choice: { id: composer.tools[0].id } };
    const attachments = [(await sent.json()).id];
    await post("threads.create", { input: { content, attachments, inference_options } });
    const { data } = JSON.parse(await post("threads.list", { limit: 9999, order: "desc" }));
    this.append(`${header.title.text} ${startScreen.greeting} ${data[0].title}`);
  }
});"""


def part(kind: str, *children: Any, **fields: Any) -> Json:
    """A component of a widget; `does` is the type of the action that a click on it is."""
    if action := fields.pop("does", None):
        fields["onClickAction"] = {"type": action, "payload": {"id": 7}}
    return {"type": kind, **fields, **({"children": list(children)} if children else {})}


def text(value: str, **fields: Any) -> Json:
    return part("Text", value=value, **fields)


ROWS = [part("Table.Row", part("Table.Cell", text(value))) for value in ("What", "Flour")]
SERIES = [{"type": "bar", "dataKey": "cups", "label": "Cups"}]
COMPONENTS = [  # each with what is to be seen of it: a selector, and the text
    (part("Title", value="Pancakes", size="lg"), "h3", "Pancakes"),
    (part("Row", part("Badge", label="easy", color="success")), ".row .badge", "easy"),
    (part("Icon", name="star-filled", color="warning"), "[title=star-filled]", "★"),
    (part("Row", part("Spacer"), part("Caption", value="20 minutes")), ".spacer + p", "20 minutes"),
    (part("Divider"), "hr", ""),
    (part("Box", text("Mix", weight="bold"), padding={"x": 3}, direction="row"), ".row[style] p", "Mix"),
    (part("Col", part("Markdown", value="**Fry** it")), ".col strong", "Fry"),
    (part("Image", src=f"data:image/png;base64,{PIXEL}", alt="A pan", size=40), "img[alt='A pan']", ""),
    (part("Button", label="Cook", style="primary", iconStart="play", does="cook"), ".primary", "▶ Cook"),
    (part("Transition", text("Served", italic=True)), "p[style*=italic]", "Served"),
    (part("Hologram", text("inside"), value="unheard of"), ".col:has(> p:text('inside'))", "unheard of"),
    (part("Chart", data=[{"d": "Mon", "cups": 3}], series=SERIES, xAxis={"dataKey": "d"}), "th + th", "Cups"),
    (part("Table", *ROWS), "td:has(p:text('Flour'))", "Flour"),
]
RECIPE = part("Card", *[each for each, _, _ in COMPONENTS], status={"text": "A recipe", "icon": "book-open"})
OPTIONS = [{"value": value, "label": f"Kind {value}"} for value in "ab"]
ORDER = part(
    "Card",
    part("Label", value="Your name", fieldName="name"),
    part("Input", name="name", required=True),
    part("Textarea", name="wish", defaultValue="no onions"),
    part("Select", name="size", placeholder="Size", options=OPTIONS),
    part("RadioGroup", name="kind", options=OPTIONS, defaultValue="a"),
    part("DatePicker", name="day", defaultValue="2026-12-24T00:00:00Z"),
    part("Checkbox", name="hot", label="Hot", defaultChecked=True),
    text("Table 3", editable={"name": "table"}),
    asForm=True,
    confirm={"label": "Order", "action": {"type": "order", "payload": {"id": 1}}},
    cancel={"label": "Leave", "action": {"type": "leave"}},
)
TICK = part("Checkbox", name="milk", label="Milk", onChangeAction={"type": "tick", "payload": {}})
ENTRIES = [part("ListViewItem", text(f"Choice {n}"), does=f"choose {n}") for n in range(3)]
SHOPPING = part("ListView", part("ListViewItem", TICK), *ENTRIES, limit=2)


class Tab:
    """A page in the browser, and what a person does and sees there."""

    def __init__(self, page: Any, url: str, *replies: str) -> None:
        self.page = page
        self.expect = optional("playwright.sync_api").expect
        self.input = page.get_by_label("Message", exact=True)
        self.replies = list(replies)  # to the questions that come; where there is none, it is Cancel
        self.asked: list[str] = []
        page.on("dialog", self._reply)
        page.goto(url)

    def _reply(self, dialog: Any) -> None:
        self.asked.append(dialog.message)
        dialog.accept(self.replies.pop(0)) if self.replies else dialog.dismiss()

    def say(self, message: str) -> None:
        self.input.fill(message)
        self.input.press("Enter")

    def ask(self, message: str) -> None:
        """Say it, and wait for the end of the answer."""
        self.say(message)
        self.is_idle()

    def type(self, *keys: str) -> None:
        keyboard = self.page.keyboard
        for key in keys:
            (keyboard.press if key in ("Enter", "Tab", "Shift+Enter") else keyboard.type)(key)

    def sees(self, message: str, selector: str = "#log") -> None:
        self.expect(self.page.locator(selector)).to_contain_text(message)

    def sees_no(self, selector: str) -> None:
        self.expect(self.page.locator(f":is({selector}):visible")).to_have_count(0)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name).last

    def link(self, name: str) -> Any:
        return self.page.get_by_role("link", name=name, exact=True)

    def is_idle(self) -> None:
        self.expect(self.page.locator("#send")).to_have_attribute("aria-label", "Send")

    def is_busy(self) -> None:
        self.expect(self.page.locator("#send")).to_have_attribute("aria-label", "Stop")

    def texts(self, selector: str = ".assistant") -> list[str]:
        return [each.strip() for each in self.page.locator(selector).all_inner_texts()]

    def now_and_after_a_reload(self) -> Iterator[None]:
        """What follows holds for what came live, and for what is loaded."""
        yield
        self.page.reload()
        self.expect(self.page.locator(".item:not(:empty)").first).to_be_attached()
        self.is_idle()
        yield


@pytest.fixture(scope="class")
def chromium() -> Iterator[Any]:
    playwright = optional("playwright.sync_api")
    playwright.expect.set_options(timeout=DEADLINE * 1000)
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with playwright.sync_playwright() as tools:
        try:
            browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
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
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    wrong: list[str] = []
    context.on("weberror", lambda error: wrong.append(str(error.error)))  # unhandled rejections as well
    context.on("console", lambda line: wrong.append(line.text) if "Security Policy" in line.text else None)
    yield context
    context.close()
    assert not wrong


@pytest.fixture
def visit(context: Any) -> Callable[..., Any]:
    """A server and its page, or another tab of one that runs."""

    @contextlib.contextmanager
    def visiting(agent: Any = None, **options: Any) -> Iterator[tuple[Client, Tab]]:
        with serving(agent, **options) as client:
            yield client, Tab(context.new_page(), str(client.base_url))

    return visiting


def counted(number: int) -> list[str]:
    """The deltas of an answer of so many words."""
    return [f"w{n} " for n in range(number)]


def showing(*widgets: Any, answer: Any = ("Done.",)) -> Agent[Any]:
    async def work(context: ck.TurnContext) -> None:
        for widget in widgets:
            await context.widget(widget, copy_text="A widget")

    return doing(work, answer=answer)


class TestPage:
    def test_an_answer_is_shown_while_it_is_written(self, context: Any, visit: Any) -> None:
        failed: list[str] = []
        context.on("response", lambda each: failed.append(each.url) if each.status >= 400 else None)
        first, last = Wait(), Wait()
        with visit(scripted([first, *counted(9), last, "the end"], ["again"])) as (client, tab):
            tab.say("  hello\nyou ")
            tab.is_busy()
            tab.sees("Thinking", "#thinking")
            first.gate.set()
            tab.sees("w8")
            tab.sees_no("#thinking")
            assert not tab.texts("#announce")[0]
            last.gate.set()
            tab.is_idle()
            assert tab.texts() == ["w0 w1 w2 w3 w4 w5 w6 w7 w8 the end"]
            tab.sees("the end", "#announce")
            tab.sees(f"{USAGE['input_tokens']} tokens in, {USAGE['output_tokens']} out", ".item >> nth=-1")
            tab.sees("hello you", "#title")
            tab.sees("hello you", "#list [aria-current]")
            tab.sees_no("#note, #tries, #models, .retry")
            tab.ask("more")
            assert tab.page.url.endswith("#/1")
            assert len(tab.texts()) == 2 and len(client.get("/api/conversations").json()) == 1
        assert not failed

    def test_the_demo_with_its_list(self, visit: Any) -> None:
        with visit() as (client, tab):
            tab.sees("OPENAI_API_KEY", "#note")
            tab.sees("demo", "#model")
            tab.button("add buy milk").click()
            tab.sees("done", ".tool")
            tab.sees_no("#welcome, .tool pre")
            tab.page.locator(".tool summary").click()
            tab.sees('"title": "buy milk"', ".tool pre >> nth=0")
            tab.is_idle()
            tab.ask("show my tasks")
            box = tab.page.get_by_role("checkbox", name="buy milk")
            tab.expect(box).not_to_be_checked()
            box.press("Space")
            until(lambda: client.get("/api/tasks").json()[0]["done"])
            tab.sees_no("[aria-busy=true]")
            tab.expect(box).to_be_focused()  # though it was drawn anew
            tab.page.reload()
            tab.expect(box).to_be_checked()

    def test_title_greeting_starters_models_and_tools_are_the_apps_own(self, visit: Any) -> None:
        own: Json = {"title": "Kitchen", "greeting": "Hungry?"}
        own["starters"] = ("Cook <b>soup</b>",)
        own["models"] = {"fast": "demo", "smart": "demo"}
        with visit(Agent(name="Own", tools=[echo]), **own) as (_, tab):
            tab.sees("Hungry?", "#welcome")
            tab.sees("Kitchen", "#sidebar")
            sent: list[Any] = []
            tab.page.on("request", lambda each: sent.extend([each.post_data_json] * ("chatkit" in each.url)))
            tab.page.get_by_label("Model", exact=True).select_option("smart")
            tab.page.get_by_label("Tool", exact=True).select_option("echo")
            tab.input.fill("a draft")
            tab.button("Cook <b>soup</b>").click()
            tab.is_idle()
            tab.expect(tab.input).to_have_value("a draft")
            tab.page.evaluate("getJson('api/config').then(configure)")  # as after a reconnection
            tab.ask("and now?")
            chosen = [(each["model"], each.get("tool_choice")) for each in sent]
            assert chosen == [("smart", "echo"), ("smart", None)]
            assert tab.page.title() == "Cook <b>soup</b> \u2013 Kitchen"

    def test_thoughts_progress_and_notices(self, visit: Any) -> None:
        wait = Wait()

        async def report(context: ck.TurnContext) -> None:
            await context.progress("Looking about")
            await wait.pass_through()
            await context.notice("warning", "Mind the **gap**.", "Careful")
            await context.effect("confetti")

        agent = doing(report)
        thinking = Wait()
        cast(Script, agent.model).responses[0][:0] = [Think("weigh **this** "), thinking, Think("and that")]
        with visit(agent) as (_, tab):
            tab.say("x")
            tab.sees("weigh this", "#thinking")
            assert tab.texts("#thinking strong") == ["this"]
            thinking.gate.set()
            tab.sees("Looking about", "#thinking")
            wait.gate.set()
            tab.is_idle()
            assert tab.texts(".notice.warning") == ["Careful\nMind the gap."] and tab.texts() == ["Done."]
            for _ in tab.now_and_after_a_reload():
                tab.sees("Thought for", ".tool >> nth=0")
                assert "weigh" not in tab.page.locator("main").inner_text()
            tab.page.get_by_text("Thought for").click()
            tab.sees("this", ".tool strong")

    def test_markdown(self, visit: Any) -> None:
        with visit(scripted(re.findall(r"[^\n]{1,7}|\n", MARKDOWN), delay=0.001)) as (_, tab):
            tab.ask("x")
            for _ in tab.now_and_after_a_reload():
                tab.sees("The end.")
                drawn = {selector: tab.texts(f".assistant {selector}") for selector in WHAT_IS_DRAWN}
                assert drawn == WHAT_IS_DRAWN
                assert tab.page.locator("ol > li").count() == 2
                assert tab.link("link").get_attribute("href") == "https://example.org/a_(b)?c=1"
                tab.sees("snake_case_name, 2 * 3 * 4, *plain*.")
                tab.sees("See (https://example.org/c_(d)), _https://example.org/e_f_!")
            tab.page.get_by_role("button", name="Copy").first.click()
            tab.expect(tab.button("Copied")).to_be_visible()
            assert tab.page.evaluate("navigator.clipboard.readText()") == WHAT_IS_DRAWN["pre"][0]

    def test_nothing_that_is_written_can_run(self, visit: Any) -> None:
        marks = ("*", "`", "[", "- ", "> ", "**a ", "_a", "~~a ", "![", "|", "|a\n|-\n")
        much = [mark * 3000 for mark in marks]
        evil = part("Card", text(HOSTILE), part("Image", src="javascript:hacked=12", alt="evil"))
        evil |= {"background": "url(https://x.example/spy)", "padding": "1px; background: url(//x.example)"}

        async def work(context: ck.TurnContext) -> None:
            await context.widget(evil, copy_text=HOSTILE)
            await context.notice("info", HOSTILE, HOSTILE)

        asked: list[str] = []
        with visit(doing(work, much, answer=[HOSTILE])) as (client, tab):
            tab.page.on("request", lambda each: asked.append(each.url))
            tab.ask(HOSTILE)
            for _ in tab.now_and_after_a_reload():
                tab.sees("hacked = 10", ".assistant pre")
                assert tab.page.evaluate("window.hacked") is None
                tab.sees_no("#log :is(script, img, iframe, [onload], [onerror])")
                links = tab.page.locator(".assistant a").all()
                hrefs = [link.get_attribute("href") for link in links]
                assert hrefs == ['https://x.example/"onmouseover="hacked=9']
            tab.ask("much of everything")
        assert all(url.startswith(str(client.base_url)) for url in asked)
        assert not re.search(r"(inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\b", ck.PAGE)

    def test_a_widget_is_drawn_and_its_buttons_act(self, visit: Any) -> None:
        seen: list[Any] = []

        async def on_action(context: ck.TurnContext, action: Any, item: Any) -> None:
            seen.append((action["type"], action["payload"], item["id"]))
            await context.replace_widget(item["id"], part("Card", part("Title", value="Cooked")))
            await context.notice("info", "It smells good.")
            await context.say("Enjoy.")

        here = part("Button", label="Here", onClickAction={"type": "here", "handler": "client"})
        with visit(showing(part("Card", here), RECIPE), on_action=on_action) as (client, tab):
            tab.ask("x")
            for _ in tab.now_and_after_a_reload():
                tab.sees("A recipe", ".widget >> nth=1")
                for _, selector, shown in COMPONENTS:
                    tab.sees(shown, f".card {selector} >> nth=0")
            tab.button("Here").click()
            tab.sees("frontend of yours", "#problem")
            tab.button("Cook").dblclick()  # and yet it is done once
            tab.sees("It smells good.", ".notice")
            for _ in tab.now_and_after_a_reload():
                tab.sees("Cooked", ".widget >> nth=1")
                tab.sees("Enjoy.")
                assert tab.texts() == ["Done.", "Enjoy."]
            assert seen == [("cook", {"id": 7}, client.messages(1)[3]["item"]["id"])]

    def test_forms_ticks_and_choices_send_their_values(self, visit: Any) -> None:
        seen: list[Any] = []

        async def on_action(context: ck.TurnContext, action: Any, item: Any) -> None:
            seen.append((action["type"], action["payload"]))
            if action["type"] == "tick":
                await context.replace_widget(item["id"], {**item["widget"], "key": "another"})
            if action["type"] == "leave":
                await context.remove(item["id"])

        with visit(showing(ORDER, SHOPPING), on_action=on_action) as (client, tab):
            tab.ask("x")
            tab.button("Order").click()  # which says that the name is missing
            tab.page.get_by_label("Your name").fill("Ann")
            tab.page.get_by_role("combobox", name="Size").select_option("b")
            tab.page.get_by_label("Kind b").check()
            tab.button("Order").click()
            given: Json = {"id": 1, "name": "Ann", "wish": "no onions", "size": "b", "kind": "b"}
            given |= {"day": "2026-12-24", "hot": True, "table": "Table 3"}
            assert until(lambda: seen and seen.pop()) == ("order", given)
            tab.expect(tab.page.get_by_text("Choice 2")).to_be_hidden()
            tab.page.get_by_text("2 more").click()
            tab.page.get_by_label("Milk").click()
            assert until(lambda: seen and seen.pop()) == ("tick", {"milk": True})
            tab.sees_no("[aria-busy=true]")
            tab.expect(tab.page.get_by_label("Milk")).not_to_be_checked()  # for it was drawn anew
            tab.button("Choice 2").press("Enter")
            assert until(lambda: seen and seen.pop()) == ("choose 2", {"id": 7})
            tab.sees_no("[aria-busy=true]")
            tab.button("Choice 2").press("Space")
            assert until(lambda: seen and seen.pop()) == ("choose 2", {"id": 7})
            tab.button("Leave").click()
            tab.sees_no(".card")
            assert seen[0][0] == "leave" and len(client.messages(1)) == 4

    def test_an_action_may_come_while_an_answer_is_written_and_be_answered(self, visit: Any) -> None:
        async def on_action(context: ck.TurnContext, action: Any, item: Any) -> None:
            await (context.answer() if action["type"] == "reply" else context.say("Said meanwhile."))

        wait, buttons = Wait(), [part("Button", label=name, does=name) for name in ("tell", "reply")]
        agent = showing(part("Card", *buttons), answer=["One ", wait, "two"])
        cast(Script, agent.model).responses.append(counted(5))
        with visit(agent, on_action=on_action) as (_, tab):
            tab.say("x")
            tab.sees("One")
            tab.button("tell").click()
            tab.sees("Said meanwhile.")
            tab.is_busy()
            wait.gate.set()
            tab.is_idle()
            tab.button("reply").click()
            for _ in tab.now_and_after_a_reload():
                tab.sees("w4")
                assert sorted(tab.texts()) == ["One two", "Said meanwhile.", "w0 w1 w2 w3 w4"]

    def test_pictures_of_others_are_shown_after_a_click_only(self, context: Any, visit: Any) -> None:
        image = {"content_type": "image/png", "body": base64.b64decode(PIXEL)}
        asked: list[str] = []

        def serve(each: Any) -> None:
            asked.append(each.request.url)
            each.fulfill(**image)

        context.route("https://pics.example/*", serve)
        drawn = {"id": "ig_1", "type": "image_generation_call", "result": PIXEL}
        with visit(scripted([drawn, "See ![a cat](https://pics.example/cat.png)."])) as (_, tab):
            tab.ask("x")
            loaded = "[...document.querySelectorAll('#log img')].filter((image) => image.naturalWidth).length"
            for _ in tab.now_and_after_a_reload():
                tab.expect(tab.page.get_by_role("img", name="Generated picture")).to_be_visible()
                until(lambda: tab.page.evaluate(loaded) == 1)
                assert not asked
                tab.button("Show picture from pics.example: a cat").click()
                until(lambda: tab.page.evaluate(loaded) == 2)
                assert len(asked) == 1
                asked.clear()

    def test_citations_tasks_and_workflows(self, visit: Any) -> None:
        book = {"type": "url", "title": "The book", "url": "https://books.example/a_(b)"}
        sources = [(book, 3), ({"type": "entity", "id": "e", "title": "Oolong"}, 18), (book, 18)]
        notes = [{"type": "annotation", "source": source, "index": index} for source, index in sources]

        async def work(context: ck.TurnContext) -> None:
            await context.start_workflow({"type": "custom", "tasks": []})
            await context.add_workflow_task({"type": "custom", "title": "Look", "content": "At **it**"})
            await context.end_workflow({"title": "All planned"})
            await context.say("One https://a.b/cd.", annotations=notes)
            empty: Json = {"id": "e", "type": "assistant_message", "content": []}
            await context.stream({"type": "thread.item.done", "item": empty})

        found = [{"type": "url", "url": "https://tea.example"}]
        search: Json = {"id": "ws", "type": "web_search_call"}
        search |= {"action": {"type": "search", "query": "tea", "sources": found}}
        with visit(doing(work, answer=[search, "Done."])) as (_, tab):
            tab.ask("x")
            for _ in tab.now_and_after_a_reload():
                tab.sees("All planned")
                assert sorted(tab.texts("sup")) == ["1", "1", "2"]
                assert tab.texts("ol.quiet:visible li") == ["The book", "Oolong"]
                hrefs = [link.get_attribute("href") for link in tab.page.locator(".assistant a").all()]
                assert sorted(hrefs) == ["https://a.b/cd", book["url"], book["url"]]
                assert len(tab.texts("#log > .item > .tool")) == 3  # the workflow, the tool, and the search
                tab.sees("tea", ".tool >> nth=-1")
            tab.page.get_by_text("All planned").click()
            tab.page.get_by_text("Look", exact=True).click()
            tab.sees("it", ".tool strong")

    def test_stop(self, visit: Any) -> None:
        wait = Wait()
        with visit(scripted(["so far ", wait, "too far"])) as (_, tab):
            tab.say("x")
            tab.sees("so far")
            tab.button("Stop").click()
            tab.is_idle()
            assert wait.left.wait(DEADLINE)
            for _ in tab.now_and_after_a_reload():
                tab.sees("Stopped")
                assert tab.texts() == ["so far"]

    def test_reloading_in_mid_answer(self, visit: Any) -> None:
        agent = scripted(["let me see", Call("echo", {"text": "x"})], counted(80), delay=0.03)
        with visit(agent) as (_, tab):
            tab.say("x")
            for word in ("see", "w7 ", "w23 ", "w41 "):
                tab.sees(word)
                tab.page.reload()
                tab.is_busy()
            tab.is_idle()
            assert tab.texts() == ["let me see", "".join(counted(80)).strip()]
            assert tab.texts(".tool summary") == ["echo done"] and tab.texts(".user") == ["x"]

    def test_the_network_is_away_for_a_while(self, context: Any) -> None:
        server = ck.serve_in_background(make_app(scripted(counted(70), delay=0.03)))
        with server as url:
            tab = Tab(context.new_page(), url)
            tab.say("x")
            tab.sees("w7 ")
            context.set_offline(True)  # for new connections; those there are:
            for connection in list(server.server_state.connections):
                connection.loop.call_soon_threadsafe(connection.transport.abort)
            tab.sees("The server does not answer", "#banner")
            tab.say("more")
            tab.sees("Not sent: the server does not answer", "#problem")
            context.set_offline(False)
            tab.is_busy()
            tab.is_idle()
            assert tab.texts() == ["".join(counted(70)).strip()] and tab.texts(".user") == ["x"]
            tab.sees_no("#banner")

    def test_the_server_dies_and_comes_back(self, tmp_path: Path, context: Any) -> None:
        with Process(cwd=tmp_path) as process:
            port = "--port", process.url.rpartition(":")[2]
            tab = Tab(context.new_page(), process.url)
            tab.say("hello")
            tab.sees("hello", ".user")
            until(lambda: any(row["content"] for row in process.client().messages(1)[1:]))
        tab.sees("The server does not answer", "#banner")
        tab.button("Export").click()
        tab.sees("Failed to fetch", "#problem")
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
            tab.expect(tab.page.locator(".assistant")).to_have_count(2)
            tab.is_idle()
            assert tab.texts(".user") == ["hello", "are you there?"]

    def test_two_tabs(self, context: Any, visit: Any) -> None:
        wait = Wait()
        with visit(scripted(["one ", wait, "two"], ["three"])) as (client, first):
            first.say("x")
            first.sees("one")
            second = Tab(context.new_page(), f"{client.base_url}#/1")
            second.sees("one")
            second.is_busy()
            second.say("y")
            second.sees("Not sent: an answer is still being written", "#problem")
            wait.gate.set()
            second.is_idle()
            second.sees_no("#problem")
            second.input.press("Enter")
            second.sees("three")
            second.is_idle()
            first.page.evaluate("dispatchEvent(new Event('focus'))")
            first.sees("three")
            assert first.texts() == second.texts() == ["one two", "three"]
            first.page.evaluate("dispatchEvent(new Event('focus')); send('z')")  # as by a click into it
            first.expect(first.page.locator(".assistant")).to_have_count(3)

    def test_conversations_are_searched_renamed_exported_and_deleted(self, visit: Any) -> None:
        with visit(scripted(["ok"])) as (client, tab):
            for message in ("apples are red", "pears are green", "plums are blue"):
                client.send_message(message)
            tab.page.reload()
            titles, search = tab.page.locator("#list a"), tab.page.get_by_label("Search conversations")
            tab.expect(titles).to_have_text(["plums are blue", "pears are green", "apples are red"])
            tab.sees_no("#actions")
            for query, count in (("green", 1), ("nothing like it", 0), ("", 3)):
                search.fill(query)
                tab.expect(titles).to_have_count(count)
                tab.expect(tab.page.locator("#nothing")).to_have_text("" if count else "Nothing found.")
            tab.link("pears are green").click()
            tab.replies = ["Pears!"]
            tab.button("Rename").click()
            tab.sees("Pears!", "#title")
            tab.sees("Pears!", "#list [aria-current]")
            with tab.page.expect_download() as download:
                tab.button("Export").click()
            assert download.value.suggested_filename.endswith(".md")
            assert "pears are green" in Path(download.value.path()).read_text(encoding="utf-8")
            for replies, count in (([], 3), ([""], 2)):
                tab.replies = replies
                tab.button("Delete").click()
                assert "Pears!" in tab.asked[-1]
                tab.expect(titles).to_have_count(count)
            tab.expect(tab.page.locator("#welcome")).to_be_visible()

    def test_addresses_go_back_and_forward(self, visit: Any) -> None:
        wait = Wait()
        with visit(scripted(["one"], ["two ", wait, "three"])) as (_, tab):
            tab.ask("first")
            tab.link("+ New conversation").click()
            tab.say("second")
            tab.sees("two")
            tab.link("first").click()
            tab.sees("one")
            tab.is_idle()
            tab.page.go_back()
            tab.sees("two")
            tab.is_busy()
            tab.page.go_forward()
            tab.sees("one")
            wait.gate.set()
            tab.link("second").click()
            tab.sees("two three")
            failed: list[str] = []
            tab.page.on("response", lambda each: failed.append(each.url) if each.status >= 400 else None)
            tab.page.evaluate("location.hash = '#/99'")
            tab.sees("Conversation not found", "#problem")
            tab.page.reload()
            tab.sees("Conversation not found", "#problem")
            assert not tab.texts() and not failed

    def test_a_token_is_asked_for_and_an_invitation_brings_it_along(self, context: Any, visit: Any) -> None:
        token = bearer("ann")["Authorization"].removeprefix("Bearer ")
        with visit(scripted(["hello"]), jwt_secret=SECRET) as (client, tab):
            tab.sees("load the page again", "#problem")
            tab.page.evaluate("dispatchEvent(new Event('focus'))")
            tab.say("x")  # which asks again, and all that wait for an answer share it
            tab.sees("Not sent: ", "#problem")
            assert ["asks for a token" in asked for asked in tab.asked] == [True, True]
            tab.page.goto(f"{client.base_url}/#/1")
            tab.replies = [token]
            tab.page.reload()
            tab.sees("Conversation not found", "#problem")
            assert len(tab.asked) == 3
            tab.page.close()
            tab = Tab(context.new_page(), str(client.base_url), "wrong \u2603", token)
            tab.ask("x")
            assert not tab.replies and tab.asked[-1].startswith("The token is not valid")
            tab.page.reload()
            tab.sees("hello")
            invited = Tab(context.new_page(), f"{client.base_url}#token={token}")
            invited.link("x").click()
            invited.sees("hello")
            kept = "[...Object.values(sessionStorage), localStorage.length, document.cookie, location.hash]"
            for each in (tab, invited):
                assert each.page.evaluate(kept) == [token, 0, "", "#/1"]
            assert not invited.asked
            refused = Tab(context.new_page(), str(client.base_url))
            refused.sees("To give a token", "#problem")
            refused.page.goto(f"{client.base_url}#token={token}")  # which loads nothing anew
            refused.sees("How can I help?", "#welcome")
            invited.page.go_back()
            assert "token" not in invited.page.url

    def test_questions(self, visit: Any) -> None:
        choice = {"type": "multiple_choice", "options": [{"value": "Small"}, {"value": "Large"}]}
        asked: list[Json] = [
            {**choice, "id": "size", "question": "Which size?"},
            {**choice, "id": "more", "question": "Which as well?", "multiple": True},
            {"type": "freeform", "id": "note", "question": "Anything else?"},
        ]

        wait = Wait()

        async def survey(context: ck.TurnContext) -> Any:
            await wait.pass_through()
            return context.ask(asked)

        with visit(doing(survey)) as (client, tab):
            tab.say("x")
            tab.page.locator(".tool summary").click()  # the questions take its place
            wait.gate.set()
            tab.is_idle()
            tab.button("Send answers").click()  # which says what is missing
            tab.page.reload()
            tab.page.get_by_label("Large").first.check()
            tab.page.get_by_role("textbox", name="Anything else?").fill("No <b>sugar</b>")
            tab.button("Send answers").click()
            tab.sees("Done.")
            for _ in tab.now_and_after_a_reload():
                tab.sees("Which size? Large")
                tab.sees("Anything else? No <b>sugar</b>")
                tab.sees_no("#log form")
            told = json.loads(client.messages(1)[1]["content"])
            assert [answer["values"] for answer in told] == [["Large"], [], ["No <b>sugar</b>"]]

    def test_a_tool_that_needs_approval_has_two_buttons_and_several_are_one_form(self, visit: Any) -> None:
        wiped: list[str] = []

        @function_tool(needs_approval=True)
        def wipe(path: str) -> None:
            """Remove a file."""
            wiped.append(path)

        calls = [Call("wipe", {"path": path}) for path in "ab"]
        with visit(scripted(calls, ["Done."], [calls[0]], ["Over."], tools=[wipe])) as (_, tab):
            tab.ask("x")
            tab.sees("wipe", "fieldset")
            tab.sees_no(".tool")
            tab.page.get_by_label("Approve").first.check()
            tab.page.get_by_label("Reject").last.check()
            tab.button("Send answers").click()
            tab.sees("Done.")
            tab.is_idle()
            assert wiped == ["a"]
            tab.ask("y")
            tab.page.reload()
            tab.button("Approve").press("Enter")
            tab.sees("Over.")
            tab.expect(tab.page.get_by_role("log")).to_be_focused()
            assert wiped == ["a", "a"]

    def test_a_client_tool_call_says_what_it_waits_for(self, visit: Any) -> None:
        async def selection(context: ck.TurnContext) -> Any:
            return context.client_tool("get_selection", {"kind": "text"})

        with visit(doing(selection)) as (_, tab):
            tab.ask("x")
            for _ in tab.now_and_after_a_reload():
                assert tab.texts(".tool") == ["get_selection waits for a frontend that has this tool"]

    def test_errors_say_why_after_a_reload_too_and_can_be_retried(self, visit: Any) -> None:
        with visit(scripted(["so "], [RuntimeError("no")], [RuntimeError("no")], ["well"])) as (_, tab):
            tab.ask("x")
            tab.ask("y")
            alert = tab.page.get_by_role("alert").get_by_role("button", name="Retry")
            tab.expect(alert).to_be_visible()
            said = tab.texts(".notice.danger")
            for _ in tab.now_and_after_a_reload():
                tab.expect(alert).to_be_visible()
                assert len(said[0]) > 15 and tab.texts(".notice.danger") == said
            for _ in range(2):
                tab.button("Retry").click()
                tab.is_idle()
            assert tab.texts() == ["so", "well"] and tab.texts(".user") == ["x", "y"]
            tab.sees_no(".notice, .retry")

        async def warn(context: ck.TurnContext) -> None:
            await context.notice("info", "Old news.")

        with visit(doing(warn, answer=[RuntimeError("no")])) as (_, tab):
            tab.ask("x")
            tab.sees("Old news.", ".notice >> nth=-1")
            tab.expect(tab.page.get_by_role("alert").get_by_role("button", name="Retry")).to_be_visible()

    def test_what_guardrails_block_is_marked_or_gone(self, visit: Any) -> None:
        @input_guardrail
        async def polite(context: Any, agent: Any, given: Any) -> GuardrailFunctionOutput:
            return GuardrailFunctionOutput(None, "rude" in json.dumps(given))

        @output_guardrail
        async def discreet(context: Any, agent: Any, output: Any) -> GuardrailFunctionOutput:
            return GuardrailFunctionOutput(None, "secret" in str(output))

        guards: Any = {"input_guardrails": [polite], "output_guardrails": [discreet]}
        with visit(scripted(["The ", "secret."], **guards)) as (_, tab):
            tab.ask("please")
            for _ in tab.now_and_after_a_reload():
                tab.expect(tab.page.locator(".notice.danger")).to_have_count(1)
                assert not tab.texts()
            tab.ask("rude")
            for _ in tab.now_and_after_a_reload():
                tab.sees("Blocked", ".item >> nth=-1")
                assert not tab.texts() and tab.texts(".user") == ["please", "rude"]

    def test_a_refused_message_is_given_back_and_a_locked_conversation_says_why(self, visit: Any) -> None:
        with visit(scripted(["ok"])) as (client, tab):
            tab.ask("x")
            client.patch("/api/conversations/1", json={"status": "locked", "reason": "The cook sleeps."})
            tab.say("more")
            tab.sees("Not sent: ", "#problem")
            tab.sees("This conversation is locked: The cook sleeps.", "#locked")
            tab.expect(tab.input).to_have_value("more")
            client.patch("/api/conversations/1", json={"status": "active"})
            tab.input.press("Enter")
            tab.expect(tab.page.locator(".assistant")).to_have_count(2)
            tab.is_idle()
            assert tab.texts(".user") == ["x", "more"]
            tab.sees_no("#problem, #locked")

    def test_files_are_attached_by_button_drop_and_paste(self, visit: Any) -> None:
        with visit(scripted(["Nice."]), max_attachment_bytes=1000) as (_, tab):
            picture = {"name": "red.png", "mimeType": "image/png", "buffer": base64.b64decode(PIXEL)}
            large = {"name": "large.txt", "mimeType": "text/plain", "buffer": b"x" * 1001}
            tab.page.locator("#file").set_input_files([picture, large])
            tab.sees("large.txt is not attached: ", "#problem")
            for kind, field in (("paste", "clipboardData"), ("drop", "dataTransfer")):
                tab.page.evaluate(f"""() => {{
                  const carried = new DataTransfer();
                  carried.items.add(new File(["a {kind} note"], "{kind}.txt", {{ type: "text/plain" }}));
                  const event = new Event("{kind}", {{ bubbles: true }});
                  input.dispatchEvent(Object.assign(event, {{ {field}: carried }}));
                }}""")
            drag = "new Event('dragover', { bubbles: true, cancelable: true })"
            drag = f"Object.assign({drag}, {{ dataTransfer: new DataTransfer() }})"
            for place, is_taken in (("input", False), ("log", True)):  # what is no file may fall into the box
                assert tab.page.evaluate(f"!{place}.dispatchEvent({drag})") == is_taken
            tab.expect(tab.page.get_by_role("button", name="Remove ")).to_have_count(3)
            tab.button("Remove drop.txt").click()
            tab.expect(tab.page.locator("#files img")).to_be_visible()
            tab.page.locator("#send").click()  # without a word
            tab.sees("Nice.")
            tab.sees_no("#files li")
            for _ in tab.now_and_after_a_reload():
                tab.expect(tab.page.locator("#log .chips img")).to_be_visible()
                with tab.page.expect_download() as download:
                    tab.button("paste.txt").click()
                assert Path(download.value.path()).read_text(encoding="utf-8") == "a paste note"

    def test_a_message_is_edited_and_an_answer_had_anew(self, visit: Any) -> None:
        with visit(scripted(["one"], ["two"], ["three"], ["four"])) as (client, tab):
            tab.ask("x")
            tab.ask("y")
            tab.button("Answer anew").click()
            assert "What came after it" in tab.asked[0]
            tab.replies = [""]
            tab.button("Answer anew").click()
            tab.sees("three")
            tab.is_idle()
            assert tab.texts() == ["one", "three"] and tab.texts(".user") == ["x", "y"]
            tab.button("Good").click()
            tab.expect(tab.button("Good")).to_have_attribute("aria-pressed", "true")
            assert client.messages(1)[-1]["feedback"] == "positive"
            tab.button("Copy").click()
            until(lambda: tab.page.evaluate("navigator.clipboard.readText()") == "three")
            tab.input.fill("a draft")
            tab.page.get_by_role("button", name="Edit").first.click()
            tab.expect(tab.input).to_have_value("a draft")
            tab.replies = [""]
            tab.page.get_by_role("button", name="Edit").first.click()
            tab.expect(tab.input).to_have_value("x")
            note = {"name": "note.txt", "mimeType": "text/plain", "buffer": b"later"}
            tab.page.locator("#file").set_input_files([note])
            tab.expect(tab.button("Remove note.txt")).to_be_visible()
            tab.input.fill("z")
            tab.type("Shift+Enter", "zz", "Enter")
            tab.expect(tab.input).to_have_value("z\nzz")
            assert "What came after it" in tab.asked[-1] and tab.texts(".user") == ["x", "y"]
            tab.replies = [""]
            tab.type("Enter")
            tab.sees("four")
            tab.is_idle()
            tab.expect(tab.button("Remove note.txt")).to_be_visible()
            for _ in tab.now_and_after_a_reload():
                tab.sees("four")
                assert tab.texts() == ["four"] and tab.texts(".user") == ["z\nzz"]

    def test_the_keyboard_is_enough(self, visit: Any) -> None:
        wait = Wait()
        with visit(scripted([wait, "ok"])) as (_, tab):
            tab.expect(tab.input).to_be_focused()
            low = tab.input.bounding_box()["height"]
            tab.type("one", "Shift+Enter", "two")
            assert tab.input.input_value() == "one\ntwo" and tab.input.bounding_box()["height"] > low
            tab.type("Enter")
            tab.expect(tab.page.locator(".user")).to_have_text("one\ntwo")
            until(lambda: tab.input.bounding_box()["height"] == low)
            while tab.page.evaluate("document.activeElement.id") != "send":
                tab.type("Tab")
            tab.type("Enter")
            assert wait.left.wait(DEADLINE)
            tab.is_idle()
            assert tab.page.evaluate(UNNAMED) == 0

    def test_the_view_follows_unless_scrolled_up(self, visit: Any) -> None:
        with visit(scripted([f"line {n}\n\n" for n in range(100)], delay=0.02)) as (_, tab):
            tab.page.set_viewport_size({"width": 1280, "height": 400})
            tab.say("x")
            tab.sees("line 40")
            below = "-scroller.scrollTop"
            assert tab.page.evaluate(below) < 60
            tab.page.mouse.move(600, 150)
            tab.page.mouse.wheel(0, -300)
            until(lambda: tab.page.evaluate(below) > 250)
            where = "document.querySelector('.assistant p').getBoundingClientRect().top"
            top = tab.page.evaluate(where)
            tab.sees("line 70")
            assert abs(tab.page.evaluate(where) - top) < 1
            until(lambda: tab.page.mouse.wheel(0, 9999) or tab.page.evaluate(below) < 1)
            tab.is_idle()
            tab.expect(tab.page.get_by_text("line 99", exact=True)).to_be_in_viewport()

    def test_it_fits_and_can_be_read(self, visit: Any) -> None:
        agent = showing(RECIPE, ORDER, SHOPPING, answer=[MARKDOWN])
        places = (("", "How can I"), ("1", "The end."), ("2", "xxx"), ("99", "not found"))
        with visit(agent, models={"fast": "demo", "smart": "demo"}) as (client, tab):
            for message in ("an earlier conversation with a title that does not fit", "x" * 300):
                client.send_message(message)
            for width, scheme in itertools.product((1280, 390), ("light", "dark")):
                tab.page.emulate_media(color_scheme=scheme)
                tab.page.set_viewport_size({"width": width, "height": 800})
                for number, seen in places:
                    tab.page.evaluate(f"location.hash = '#/{number}'")
                    tab.sees(seen, "main")
                    assert tab.page.evaluate(FITS)
                    assert tab.page.evaluate(LOW_CONTRAST) == []
                    assert tab.page.evaluate(UNNAMED) == 0
            tab.sees_no("#sidebar")
            tab.button("Conversations").click()
            tab.page.get_by_role("link", name="an earlier").click()
            tab.sees_no("#sidebar")
            tab.sees("an earlier", ".user")

    def test_it_works_mounted_in_another_app(self, context: Any) -> None:
        app, outer = make_app(scripted(["hello"])), FastAPI()
        outer.mount("/some/where", app)
        outer.state.chat = app.state.chat
        with ck.serve_in_background(outer) as url:
            tab = Tab(context.new_page(), f"{url}/some/where")
            tab.ask("x")
            tab = Tab(context.new_page(), f"{url}/some/where/#/1")
            tab.sees("hello")
            tab.ask("x")
            tab.expect(tab.page.locator(".assistant")).to_have_count(2)

    def test_the_page_of_the_real_component(self, context: Any) -> None:
        """With a stand-in for OpenAI's script, which does on the wire what COMPONENT.md says that it does."""
        own = {"title": "Kitchen", "greeting": "Hungry?", "starters": ("Cook soup",), "jwt_secret": SECRET}
        with serving(Agent(name="Own", tools=[echo]), **own, models={"fast": "demo"}) as client:
            client.headers.update(bearer("ann"))
            page, expect = context.new_page(), optional("playwright.sync_api").expect
            context.route(COMPONENT_SCRIPT, lambda route: route.abort())
            page.goto(f"{client.base_url}/component")
            expect(page.get_by_role("status")).to_contain_text("cannot be loaded")
            context.unroute(COMPONENT_SCRIPT)
            answer = {"content_type": "text/javascript", "body": STANDIN}
            context.route(COMPONENT_SCRIPT, lambda route: route.fulfill(**answer))
            page.goto(f"{client.base_url}/component")
            expect(page.get_by_role("status")).to_contain_text("token")
            page.goto(f"{client.base_url}/#token={client.headers['Authorization'].removeprefix('Bearer ')}")
            page.goto(f"{client.base_url}/component")
            expect(page.locator("openai-chatkit")).to_have_text("Kitchen Hungry? Cook soup")
            options = client.messages(1)[0]["item"]["inference_options"]
            assert options == {"model": "fast", "tool_choice": {"id": "echo"}}


# ====================================================================================================== Load


@slow
def test_a_thousand_streams_at_once_lose_and_mix_up_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, limits[1]), limits[1]))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        ours = Served("ours", "plain", tmp_path, stack)

        async def all_at_once() -> list[tuple[bytes, float]]:
            texts = (f"say 200 words 0.02 apart as s{number}" for number in range(1000))
            return await asyncio.gather(*map(ours.stream, texts))

        answers = asyncio.run(all_at_once())
    told = {}
    for number, (raw, _) in enumerate(answers):
        events = [json.loads(data) for data in re.findall(r"^data:(\{.*\})\r?$", raw.decode(), re.MULTILINE)]
        assert events[-1]["status"] == "completed"
        assert said(events) == "".join(f" s{number}.{word}" for word in range(200))
        told[events[0]["thread_id"]] = said(events)
    [file] = tmp_path.glob("*.db")
    stored = rows_of(file, "SELECT conversation_id, content FROM messages WHERE role = 'assistant'")
    assert (len(stored), dict(stored)) == (1000, told)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_readers_that_stop_reading_hold_up_nobody_and_take_no_memory() -> None:
    """Fifty readers of an answer of 4 MB read nothing: nobody notices, and the answer is kept once."""
    start, rest = Wait(), Wait()
    agent = scripted([start, "x" * 400, rest, *["x" * 400] * 10_000], ["Quick."])
    with answering(agent, start) as (client, answer), contextlib.ExitStack() as stack:
        for _ in range(50):
            address = (client.base_url.host, client.base_url.port)
            reader = stack.enter_context(socket.create_connection(address))
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.sendall(b"GET /api/conversations/1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert reader.recv(15) == b"HTTP/1.1 200 OK"
        start.gate.set()
        until(rest.reached.is_set)
        before = used()["memory"]
        rest.gate.set()
        assert len(said(answer.result(30))) == 4_000_400
        assert said(client.send_message("Hello")) == "Quick."
        assert len(client.messages(1)[-1]["content"]) == 4_000_400
        # The answer, and this process's own look at it, come to some 60 MB; fifty copies would be 200 more.
        assert used()["memory"] - before < 150e6


def test_no_statement_of_the_store_goes_through_a_table() -> None:
    """By SQLite's own plans. What may be gone through, or sorted: ids that it was given, and search hits."""
    nodes = ast.walk(ast.parse(inspect.getsource(ck.Store)))
    texts = [str(node.value) for node in nodes if isinstance(node, ast.Constant)]
    whole = r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b.*\s(FROM|WHERE|VALUES)\b"  # not a part of one
    statements = [re.sub(r":\w+|\?\d+", "?", text) for text in texts if re.match(whole, text, re.DOTALL)]
    slow = []
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript((HERE / "schema.sql").read_text(encoding="utf-8"))
        for sql in statements:
            for *_, step in db.execute(f"EXPLAIN QUERY PLAN {sql}", [None] * sql.count("?")):
                scan = re.match(r"SCAN (?!.*VIRTUAL TABLE|wanted|found|hit|\(subquery)", step)
                sort = "TEMP B-TREE" in step and not re.search("_search|DISTINCT", sql)
                slow += [(sql, step)] if scan or sort else []
    assert not slow and len(statements) > 20


@slow
def test_the_server_is_ready_as_soon_as_its_imports_are(tmp_path: Path) -> None:
    ready, imports = zip(*(seconds_until_ready(tmp_path, HERE) for _ in range(5)), strict=True)
    assert statistics.median(ready) < 1.15 * statistics.median(imports), (ready, imports)


# ================================================================================================= Benchmark
# What `python test_chatkit_server.py` prints; `--against PATH` puts another checkout of it beside this one.
#
# Each server is a process of its own with nothing in it but what it serves, on uvloop and httptools, on a
# database in a temporary directory; this process is the client. All take turns, so that a busy machine
# troubles each of them alike.


class Typist(Model):
    """Says what the last message asks for: "say 200 words 0.02 apart", the seconds after each delta.

    With "as red" the words are red.0, red.1 and so on. At 0 it lets others run after each delta, as one who
    reads from a network does. The events are those of OpenAI's models, whose items have ids of their own.
    """

    async def get_response(self, *args: Any, **kwargs: Any) -> ModelResponse:
        raise AssertionError

    async def stream_response(
        self, system_instructions: Any, input: Any, *rest: Any, **more: Any
    ) -> AsyncIterator[Any]:
        last = str(input[-1:] if isinstance(input, list) else input)
        count, pause, name = re.findall(r"say (\d+) words ([\d.]+) apart(?: as (\w+))?", last)[-1]
        words = [f" {name}.{number}" if name else " word" for number in range(int(count))]
        message = assistant_message("".join(words), item_id=f"msg_{secrets.token_hex(8)}")
        async for event in ScriptedModel([[message]]).stream_response(None, "", *rest, **more):
            if event.type != "response.output_text.delta":
                yield event
                continue
            place = event.model_dump(exclude={"delta"})
            for word in words:
                yield ResponseTextDeltaEvent(delta=word, **place)
                await asyncio.sleep(float(pause))


def official_app(database: str) -> Any:
    """The official SDK as its documentation sets it up, with what it needs of a plain SQLite store."""
    from chatkit.agents import AgentContext, simple_to_agent_input, stream_agent_response
    from chatkit.server import ChatKitServer
    from chatkit.store import Store
    from chatkit.types import Page, ThreadItem
    from fastapi.responses import StreamingResponse
    from pydantic import TypeAdapter

    item_type: Any = TypeAdapter(ThreadItem)
    db = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    db.executescript(
        """PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
           CREATE TABLE kept (id TEXT PRIMARY KEY, thread_id TEXT, data TEXT);
           CREATE INDEX items_in_order ON kept (thread_id)"""
    )

    class SqliteStore(Store):  # type: ignore[misc]  # no types where it is not installed
        async def save_thread(self, thread: Any, context: Any) -> None:
            await self.save_item(None, thread, context)

        async def save_item(self, thread_id: str | None, item: Any, context: Any) -> None:
            values = (item.id, thread_id, item.model_dump_json())
            db.execute("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", values)

        add_thread_item = save_item

        async def load_thread_items(self, thread_id: str, after: Any, limit: int, order: str, _: Any) -> Any:
            sql = f"SELECT data FROM kept WHERE thread_id = ? ORDER BY rowid {order} LIMIT ?"
            return Page(data=[item_type.validate_json(row[0]) for row in db.execute(sql, (thread_id, limit))])

    class OfficialServer(ChatKitServer):  # type: ignore[misc]
        agent = Agent[Any](name="Typist", model=Typist())

        async def respond(self, thread: Any, item: Any, context: Any) -> AsyncIterator[Any]:
            page = await self.store.load_thread_items(thread.id, None, 40, "desc", context)
            told = await simple_to_agent_input(page.data[::-1])
            agent_context = AgentContext(thread=thread, store=self.store, request_context=context)
            run = Runner.run_streamed(self.agent, told, context=agent_context)
            async for event in stream_agent_response(agent_context, run):
                yield event

    SqliteStore.__abstractmethods__ = frozenset()
    server, app = OfficialServer(cast(Any, SqliteStore)()), FastAPI()

    @app.post("/chatkit")
    async def post_chatkit(request: Request) -> Any:
        stream: Any = await server.process(await request.body(), {})
        return StreamingResponse(stream, media_type="text/event-stream")

    return app


def used() -> dict[str, float]:
    """Seconds of CPU and bytes of memory of this process; without /proc, the most that it ever had."""
    memory, statm = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Path("/proc/self/statm")
    if statm.exists():
        memory = int(statm.read_text().split()[1]) * resource.getpagesize()
    return {"cpu": time.process_time(), "memory": memory}


def serve_for_benchmark(kind: str, database: str) -> None:
    """A server process: prints its port, and for each line that it is given what it has used so far."""
    set_tracing_disabled(True)
    if kind.startswith("official"):
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        port = listener.getsockname()[1]
        config = uvicorn.Config(official_app(database), log_level="warning", access_log=False)
        threading.Thread(target=uvicorn.Server(config).run, args=([listener],), daemon=True).start()
    else:
        import chatkit_server  # this one, or the one to compare it with

        typist = Agent[Any](name="Typist", model=Typist())
        app = chatkit_server.create_app(typist, database=database, max_concurrent_turns=2000)
        port = int(chatkit_server.serve_in_background(app).url.rpartition(":")[2])
        gc.freeze()  # as `python chatkit_server.py` does
        gc.set_threshold(10_000)
    print(port, flush=True)
    for _ in sys.stdin:
        print(json.dumps(used()), flush=True)


OFFICIAL = "official SDK"
SERVER_SCRIPT = """
from __future__ import annotations
import asyncio, gc, json, re, resource, secrets, socket, sqlite3, sys, threading, time
from pathlib import Path
from typing import Any, AsyncIterator, cast
import uvicorn
from agents import Agent, Model, ModelResponse, Runner, set_tracing_disabled
from agents.testing import ScriptedModel, assistant_message
from fastapi import FastAPI
from openai.types.responses import ResponseTextDeltaEvent
from starlette.requests import Request
"""


class BareLoop:
    """Nothing but the Agents SDK, in this process."""

    name = "Agents SDK alone"

    def used(self) -> dict[str, float]:
        return used()

    async def answer(self, text: str) -> tuple[int, float]:
        """How many words came, and the seconds after which the first one did."""
        began, first, count = time.perf_counter(), 0.0, 0
        run = Runner.run_streamed(Agent[Any](name="Typist", model=Typist()), text)
        async for event in run.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                first, count = first or time.perf_counter() - began, count + 1
        return count, first


class Served(BareLoop):
    """A server process on a new database."""

    def __init__(
        self, kind: str, dialect: str, directory: Path, stack: contextlib.ExitStack, module: Path = HERE
    ) -> None:
        self.name, self.plain = kind if kind == OFFICIAL else f"{kind}, {dialect}", dialect == "plain"
        parts = [inspect.getsource(part) for part in (Typist, official_app, used, serve_for_benchmark)]
        code = "\n\n".join([SERVER_SCRIPT, *parts, "serve_for_benchmark(*sys.argv[1:])\n"])
        command = [sys.executable, "-c", code, kind, str(directory / f"{secrets.token_hex(4)}.db")]
        env = {**CLEAN_ENV, "PYTHONPATH": str(module)}
        self.process: Any = subprocess.Popen(command, env=env, cwd=directory, text=True, **PIPES)
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def used(self) -> dict[str, float]:
        print(file=self.process.stdin, flush=True)
        return cast(dict[str, float], json.loads(self.process.stdout.readline()))

    async def stream(self, text: str, mark: bytes = b"") -> tuple[bytes, float]:
        """The whole answer to a message, and the seconds after which the mark was in it."""
        chatkit = {"type": "threads.create", "params": {"input": user_input(text)}}
        body = json.dumps({"message": text} if self.plain else chatkit)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        began, first, chunks = time.perf_counter(), 0.0, list[bytes]()
        head = "POST /chatkit HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        while data := (await reader.read(1 << 20)).replace(b": ", b":"):  # however the JSON is spaced
            if not first and mark in data:
                first = time.perf_counter() - began
            chunks.append(data)
        writer.close()
        assert b" 200 " in chunks[0][:15], chunks[0]
        return b"".join(chunks), first

    async def answer(self, text: str) -> tuple[int, float]:
        # What each text event holds once, and nothing else does.
        mark = b'"type":"text"' if self.plain else b"assistant_message.content_part.text_delta"
        raw, first = await self.stream(text, mark)
        return raw.count(mark), first


def measure(one: BareLoop, words: int, pause: float, streams: int = 1) -> dict[str, float]:
    """What so many streams take: seconds, to the first word of one, of CPU; bytes of memory near the end."""

    async def look() -> float:
        await asyncio.sleep(words * pause * 0.9)
        return (await asyncio.to_thread(one.used))["memory"] if pause else 0.0

    async def all_at_once() -> tuple[Any, ...]:
        text = f"say {words} words {pause} apart"
        return tuple(await asyncio.gather(look(), *(one.answer(text) for _ in range(streams))))

    before, began = one.used(), time.perf_counter()
    loop = (uvicorn.Config("").get_loop_factory() or asyncio.new_event_loop)()  # as uvicorn would make it
    memory, *answers = loop.run_until_complete(all_at_once())
    seconds, cpu = time.perf_counter() - began, one.used()["cpu"] - before["cpu"]
    loop.close()
    assert [count for count, _ in answers] == [words] * streams, one.name
    return {"seconds": seconds, "first": answers[0][1], "cpu": cpu, "memory": memory - before["memory"]}


def seconds_until_ready(directory: Path, module: Path) -> tuple[float, float]:
    """Of the server, and of nothing but importing what it is built on."""
    began = time.perf_counter()
    with Process("--model", "demo", cwd=directory, module=module):
        ready = time.perf_counter() - began
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import agents, fastapi, uvicorn"], check=True, env=CLEAN_ENV)
    return ready, time.perf_counter() - began


AT_FIRST: dict[str, Callable[[BareLoop], float]] = {  # of servers only, once
    "MB of memory at the start": lambda one: one.used()["memory"] / 1e6,
    "kB of memory an open stream": lambda one: measure(one, 150, 0.02, 200)["memory"] / 200 / 1e3,
}
EACH_ROUND: dict[str, Callable[[BareLoop], float]] = {
    "tokens/s, one stream": lambda one: 4000 / measure(one, 4000, 0.0)["seconds"],
    "tokens/s, 100 streams": lambda one: 20_000 / measure(one, 200, 0.0, 100)["seconds"],
    "ms to the first text": lambda one: statistics.median(
        measure(one, 2, 0.02)["first"] * 1e3 for _ in range(10)
    ),
    "µs of CPU a token, 200 streams at 50 tokens/s": lambda one: measure(one, 200, 0.02, 200)["cpu"] / 0.04,
}


def print_row(*cells: str) -> None:
    """A row of a Markdown table, for the README."""
    print("| " + " | ".join(cells) + " |", flush=True)


def cell(values: list[float], official: list[float] | None) -> str:
    """The median, the least and the most, and what it is of the official SDK's."""
    if not values:
        return ""
    median = statistics.median(values)
    told = [f"{value:,.{0 if median > 100 else 1}f}" for value in (median, min(values), max(values))]
    ratio = f" {median / statistics.median(official):.2f} x" if official else ""
    return f"{told[0]} ({told[1]} to {told[2]}){ratio}"


def main() -> None:
    """Measure, and print the table. It takes five minutes, and leaves nothing behind."""
    parser = argparse.ArgumentParser(description="The benchmark of chatkit_server.py.")
    add = parser.add_argument
    add("--against", type=Path, metavar="PATH", help="a directory with another chatkit_server.py")
    add("--rounds", type=int, default=5)
    options = parser.parse_args()
    set_tracing_disabled(True)
    gc.freeze()
    modules = {"ours": HERE, **({"against": options.against.resolve()} if options.against else {})}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        is_there = importlib.util.find_spec("chatkit")
        servers = [Served(OFFICIAL, "chatkit", directory, stack)] if is_there else []
        for kind, module in modules.items():
            servers += [Served(kind, each, directory, stack, module) for each in ("plain", "chatkit")]
        contestants = [BareLoop(), *servers]
        values = collections.defaultdict[tuple[str, str], list[float]](list)
        for one, (label, figure) in itertools.product(servers, AT_FIRST.items()):
            values[label, one.name] = [figure(one)]
            measure(one, 3, 0.0, 10)  # what is loaded at the first use is no stream's
        for _ in range(options.rounds + 1):  # the first warms up
            for contestant, (label, figure) in itertools.product(contestants, EACH_ROUND.items()):
                values[label, contestant.name].append(figure(contestant))
        print_row("", *(one.name for one in contestants))
        print_row(*["---"] * (1 + len(contestants)))
        for label in (*EACH_ROUND, *AT_FIRST):
            kept = {one.name: values[label, one.name][-options.rounds :] for one in contestants}
            print_row(label, *(cell(each, kept.get(OFFICIAL)) for each in kept.values()))
        for kind, module in modules.items():
            times = [seconds_until_ready(directory, module) for _ in range(options.rounds)]
            ready, imports = (statistics.median(column) for column in zip(*times, strict=True))
            spread = f"({min(times)[0]:.2f} to {max(times)[0]:.2f})"
            print(f"{kind}: ready after {ready:.2f} s {spread}, {ready / imports:.2f} x its imports alone")


if __name__ == "__main__":
    main()
