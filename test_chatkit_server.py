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
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from agents import Agent, Model, ModelResponse, RunContextWrapper, Usage, function_tool
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

import chatkit_server as ck

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
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "chatkit_server.py"), "--port", "0", *arguments],
            cwd=cwd,
            env={**CLEAN_ENV, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=open(cwd / "log.txt", "ab"),
            text=True,
        )
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline().rstrip() for _ in range(3)]
        self.url = self.lines[0].removeprefix("Listening on ")
        self.log_file = cwd / "log.txt"

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
