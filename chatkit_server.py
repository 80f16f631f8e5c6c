# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "fastapi>=0.115,<1",
#     "uvicorn[standard]>=0.36,<1",
#     "aiosqlite>=0.22,<0.23",
#     "openai-agents>=0.24,<0.25",
#     "PyJWT[crypto]>=2.14,<3",
#     "litellm==1.83.0",
# ]
# ///
"""A complete ChatKit backend in one file.

Run with:

    python chatkit_server.py

and open http://localhost:8000, or talk to it with curl, or point OpenAI's <openai-chatkit> component at
http://localhost:8000/chatkit. One module holds everything that runs; schema.sql beside it holds the tables.

A message travels like this:

    POST /chatkit -- decode --> Turn -------> Run: the agent, its model, its tools
       (plain or ChatKit)        |  a task of its own, one for each conversation
                                 |-> Store   every item is written as it happens
                                 '-> event_stream -- encode --> server-sent events
                                     any number of readers      (plain or ChatKit)

The sections. Each uses only what stands above it, and below it what is in brackets:

    Settings         what can be configured; the only place that reads the environment
    Database         one SQLite file, and what stands or falls together in it (Old files)
    Store            all SQL, and nothing but SQL
    Old files        makes the tables, and brings an older file forward (Agent, Models, Items)
    Agent            what a tool, an action handler or a generator can do (Turn, Answering, Saying)
    Assistant        the to-do list's tools (Requests)
    Demo model       a model that needs no network (Answering)
    Models           choosing one by name, and what its failures mean (Requests)
    Items            how a row looks to the model, to ChatKit and in plain text (Files)
    Files            what a person attaches
    Turn             one answer being made, its events and its rows (Answering, Run, Saying, Requests, Chat)
    Answering        from a message to a run (Run, Saying, Requests)
    Run              what the Agents SDK reports becomes rows and events (Saying)
    Saying           texts that grow, and what tools stream
    Agents           who answers in an app: an Agent of the SDK's, a function or a generator
    Requests         what is asked of a Chat, and how it is refused (Chat)
    Chat             beginning turns, and stopping them
    Plain dialect    a turn's events as anyone can read them
    ChatKit dialect  the same as the ChatKit protocol, and its sixteen operations (HTTP)
    Who may call     tokens, origins, and bodies that are too long
    Bodies           what goes in and out, as /docs shows it
    HTTP             the routes: each asks the Chat, and answers in a dialect (Page)
    App              create_app(): all of it together
    Page             the built-in web page, and one with OpenAI's component
    Start            main() and serve_in_background()
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036  # said here, where an older Python still gets to
    sys.exit(f"chatkit_server.py needs Python 3.10 or newer; this is Python {sys.version.split()[0]}.")

import argparse
import asyncio
import base64
import contextlib
import contextvars
import copy
import difflib
import errno
import functools
import gc
import inspect
import itertools
import json
import logging
import os
import re
import secrets
import socket
import sqlite3
import threading
import time
import traceback
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast

try:
    import aiosqlite
    import jwt
    import openai
    import uvicorn
    from agents import (  # isort: skip
        Agent, FunctionTool, InputGuardrailTripwireTriggered, MaxTurnsExceeded, Model, ModelBehaviorError,
        ModelProvider, ModelRefusalError, ModelResponse, ModelSettings, OpenAIProvider,
        OpenAIResponsesModel, OutputGuardrailTripwireTriggered, RunConfig, RunContextWrapper, RunHooks,
        Runner, RunResultStreaming, RunState, ToolErrorFormatterArgs,
        ToolInputGuardrailTripwireTriggered, ToolOutputGuardrailTripwireTriggered, Usage, function_tool,
        set_tracing_disabled,
    )  # fmt: skip
    from agents.exceptions import ModelTimeoutError, UserError, _mark_error_to_drain_stream_events
    from agents.items import TResponseStreamEvent
    from agents.mcp import MCPServer, MCPServerManager
    from agents.models import get_default_model, get_default_model_settings
    from agents.testing import ModelCall, ModelStep, ScriptedModel, assistant_message, function_call
    from dotenv import load_dotenv
    from fastapi import Body, FastAPI, Header, Query, UploadFile
    from fastapi.exceptions import RequestValidationError
    from fastapi.routing import APIRoute, APIRouter
    from openai import AsyncOpenAI
    from pydantic import (  # isort: skip
        AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, NonNegativeInt,
        StringConstraints, Tag, TypeAdapter, ValidationError, ValidationInfo, create_model, field_validator,
        model_validator,
    )  # fmt: skip
    from pydantic_core import from_json, to_jsonable_python
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.types import Message, Receive, Scope, Send
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"chatkit_server: {missing.name} is not installed. The README's first command installs it.")

__all__ = [
    "ClientTool", "Questions", "Refused", "Settings", "SettingsError", "Store", "StoreError", "TurnContext",
    "create_app", "serve_in_background", "stream_agent",
]  # fmt: skip

# =================================================================================================== Settings
# What can be configured. `Settings.from_env()` is the only place that reads the environment.

HERE = Path(__file__).resolve().parent
log = logging.getLogger("chatkit")

Row = dict[str, Any]  # of the database, or any other JSON object
to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _as_browsers_say(origin: str) -> str:
    return re.sub("^(http://.*):80$|^(https://.*):443$", r"\1\2", origin.rstrip("/").lower())


Url = Annotated[str | None, Field(pattern="^https?://[^/]", description="http:// or https:// and a host")]
Origin = Annotated[str, Field(pattern="^https?://[^/]+/?$"), AfterValidator(_as_browsers_say)]
DEV_ORIGINS = tuple(f"http://{host}:{port}" for host in ("localhost", "127.0.0.1") for port in (3000, 5173))


class SettingsError(ValueError):
    """A setting or an argument that makes no sense; the text names it and says what would."""


class Settings(BaseModel):
    """How one app behaves. The environment's names are CHATKIT_ and the field's, unless a comment says so.

    A list may be given as text. Raises SettingsError, one line that names the setting that makes no sense.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    database: str = Field("chatkit.db", pattern=r"\S", description="a path or :memory:")
    title: str = "ChatKit"  # these three are for the pages
    greeting: str = "How can I help?"
    starters: tuple[str, ...] = ()  # separated by |
    model: str | None = None  # see Models for what the names mean
    models: dict[str, str] = {}  # what a message may ask for, and its model: names, or choice=name
    show_tools: Literal["full", "names", "none"] = "full"  # what readers see of tool calls
    jwt_secret: str | None = Field(
        None, min_length=32, repr=False, description="32 characters or more, also as BETTER_AUTH_SECRET"
    )
    jwt_audience: str | None = None
    jwt_issuer: str | None = None
    jwks_url: Url = None  # public keys, for EdDSA, ES256 and RS256 tokens
    cors_origins: tuple[Origin, ...] = Field(DEV_ORIGINS, description="origins such as http://localhost:3000")
    history_limit: int = Field(40, ge=1)  # items that the model is shown
    on_disconnect: Literal["cancel", "continue"] = "cancel"  # what a ChatKit reader does who leaves
    max_message_chars: int = Field(32_000, ge=1)
    max_attachment_bytes: int = Field(10 * 1024 * 1024, ge=1)
    max_steps: int = Field(10, ge=1)  # model calls a turn
    max_concurrent_turns: int = Field(256, ge=1)
    max_turns_per_user: int = Field(8, ge=1)  # for users who come with a token
    turn_timeout: float = Field(300.0, gt=0, allow_inf_nan=False)  # seconds
    tracing: bool = False  # send the Agents SDK's traces to OpenAI
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    openai_api_key: str | None = Field(None, repr=False)  # these four without CHATKIT_
    openai_base_url: Url = None
    gemini_api_key: str | None = Field(None, repr=False)
    gemini_model: str = "gemini-2.5-flash"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as failure:
            error, fields = failure.errors()[0], type(self).model_fields
            name = str(error["loc"][0])
            if name not in fields:
                raise SettingsError(f"There is no setting {name!r}{_nearest(name, fields) or '.'}") from None
            wanted = fields[name].description
            told = f"it must be {wanted}" if wanted else error["msg"]
            shown = "" if name.endswith(("_secret", "_key")) else f", not {error['input']!r:.99}"
            raise SettingsError(f"{name} ({self.env_name(name)}): {told}{shown}.") from None

    @field_validator("database", "starters", "models", "cors_origins", mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "database":
            return str(value) if isinstance(value, Path) else value
        if isinstance(value, str):
            parts = value.split("|" if info.field_name == "starters" else ",")
            value = [part.strip() for part in parts if part.strip()]
        if info.field_name == "models" and not isinstance(value, dict):
            with contextlib.suppress(AttributeError, TypeError):  # no texts: refused as it is
                pairs = [text.partition("=") for text in value]
                return {choice.strip(): model.strip() or choice.strip() for choice, _, model in pairs}
        return value

    @property
    def needs_token(self) -> bool:
        """Whether a caller must show who it is."""
        return bool(self.jwt_secret or self.jwks_url)

    @property
    def secrets(self) -> list[str]:
        """What must never be seen in a log."""
        return [secret for secret in (self.jwt_secret, self.openai_api_key, self.gemini_api_key) if secret]

    @staticmethod
    def env_name(name: str) -> str:
        return name.upper() if name.startswith(("openai_", "gemini_")) else "CHATKIT_" + name.upper()

    @classmethod
    def from_env(cls, **overrides: Any) -> Settings:
        """The environment's settings, those of a .env file beside this module added, `overrides` on top.

        An empty value counts as not set; an unknown CHATKIT_ variable gets a warning. Raises SettingsError.
        """
        names = {"BETTER_AUTH_SECRET": "jwt_secret"}  # CHATKIT_JWT_SECRET, which comes after it, wins
        names |= {cls.env_name(name): name for name in cls.model_fields}
        for variable, text in list(os.environ.items()):
            if not text.strip() and (variable in names or variable.endswith("_API_KEY")):
                del os.environ[variable]  # it counts as not set, but not for .env and LiteLLM
        try:  # into os.environ, where LiteLLM looks for keys; what is there wins
            load_dotenv(HERE / ".env", encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise SettingsError(f"Cannot read {HERE / '.env'}, which must be UTF-8: {error}.") from None
        given = {variable: text.strip() for variable, text in os.environ.items() if text.strip()}
        for variable in given:
            if variable.startswith("CHATKIT_") and variable not in names:
                log.warning("There is no setting %s%s", variable, _nearest(variable, names) or ".")
        values = {name: given[variable] for variable, name in names.items() if variable in given}
        return cls(**values | overrides)


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


# =================================================================================================== Database
# One SQLite file: opening it, one writer at a time, and what stands or falls together.

SCHEMA_VERSION = 3
OUR_TABLES = {"conversations", "messages", "message_search", "title_search", "tasks"}
OUR_TABLES |= {"attachments", "message_attachments"}

T = TypeVar("T")


class StoreError(Exception):
    """The database cannot be opened or used; the text says why, and is safe to show."""


async def patiently(work: Callable[..., Awaitable[T]], *values: Any, **columns: Any) -> T:
    """What must not fail because another program locks the file: that is waited out for half a minute."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return await work(*values, **columns)
        except sqlite3.OperationalError as error:
            # The latter is how SQLite says it while another process makes the tables.
            if time.monotonic() > deadline or not re.search("locked|vtable constructor", str(error)):
                raise
            log.warning("the database is locked by another program; trying again")
            await asyncio.sleep(0.2)


class Database:
    """One SQLite file, whose connection serves all coroutines, in autocommit.

    A write is one statement; the few that are more run under the lock that all writers take, or else a
    stranger's INSERT would be rolled back with them.
    """

    def __init__(self, path: str | Path = "chatkit.db") -> None:
        self.path = str(path)
        self.shared = False  # whether another server or Store had the file open when this one opened it
        self.before_close: set[Callable[[], Awaitable[None]]] = set()  # what still writes has its chance
        self.answering: dict[int, Any] = {}  # the turns that answer in it, by conversation id, of all apps
        self._file = self.path if self.path == ":memory:" else os.path.abspath(path)  # wherever we go
        self._connection: aiosqlite.Connection | None = None

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    async def open(self) -> None:
        """Open the file, making or bringing forward its tables. Raises StoreError, as for a newer file."""
        if sqlite3.sqlite_version_info < (3, 37):
            raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old: STRICT tables need 3.37.")
        if self.is_open:
            raise StoreError("The store is open already.")
        try:
            db: sqlite3.Connection = await patiently(asyncio.to_thread, self._connect)
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(f"Cannot use {self.path} as the database: {error}.") from error
        self._connection = await aiosqlite.Connection(lambda: db, iter_chunk_size=64)
        self._loop, self._lock = asyncio.get_running_loop(), asyncio.Lock()

    def _connect(self) -> sqlite3.Connection:
        with contextlib.ExitStack() as held:
            if self._file != ":memory:":
                held.enter_context(self._claim())
            db = sqlite3.connect(self._file, isolation_level=None, check_same_thread=False)
            held.enter_context(contextlib.closing(db))
            db.row_factory = sqlite3.Row
            self._prepare(db)
            self._opened = self._identity()
            self._held = held.pop_all()  # until close()
        return db

    @contextlib.contextmanager
    def _claim(self) -> Generator[None]:
        """Everybody shares a lock on an empty file beside the database; it ends with the process."""
        path = f"{self._file}-server"

        def is_alone() -> bool:
            try:
                claim.executescript("PRAGMA busy_timeout = 0; BEGIN EXCLUSIVE; COMMIT")
                return True
            except sqlite3.OperationalError as error:
                return "locked" not in str(error)

        with contextlib.closing(sqlite3.connect(path, check_same_thread=False)) as claim:
            self.shared = not is_alone()
            with contextlib.suppress(sqlite3.OperationalError):  # the claim is made as far as can be
                claim.executescript("PRAGMA busy_timeout = 1000; BEGIN; SELECT 1 FROM sqlite_schema")
            try:
                yield
            finally:
                claim.rollback()
                with contextlib.suppress(OSError):
                    if is_alone():
                        os.unlink(path)

    def _identity(self) -> tuple[int, int] | None:
        """Which file there is at the path, None for none."""
        with contextlib.suppress(OSError):
            file = os.stat(self._file)
            return file.st_dev, file.st_ino
        return None

    def _prepare(self, db: sqlite3.Connection) -> None:
        # In one statement: another process may make the same file, and commits tables and version together.
        sql = "SELECT user_version, lower(name) FROM pragma_user_version LEFT JOIN sqlite_schema"
        versions, names = zip(*db.execute(sql), strict=True)
        version, ours = versions[0], OUR_TABLES.intersection(names)
        if version > SCHEMA_VERSION:
            raise StoreError(f"{self.path} was written by a newer version (its schema is {version}).")
        if not {"conversations", "messages"} <= ours if version else ours:
            told = f"a database of something else, with {', '.join(sorted(ours)) or 'versions'} of its own"
            raise StoreError(f"{self.path} is {told}; name another file.")
        db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL")
        if version < SCHEMA_VERSION:
            bring_forward(db, version)
        db.execute("PRAGMA foreign_keys = ON")
        if not self.shared:  # what was being written when the process died stays as it is, and says so
            ended = "UPDATE messages SET status = replace(status, 'streaming', 'interrupted')"
            db.execute(f"{ended} WHERE status IN ('streaming', 'pending')")

    async def close(self) -> None:
        """Have everybody who writes here end, and close the file."""
        while self.before_close:
            await self.before_close.pop()()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
            self._held.close()

    async def execute(self, sql: str, *values: object) -> list[Row]:
        """Run one statement of your own, on tables of your own; its rows come back as dicts.

            await store.execute("CREATE TABLE IF NOT EXISTS recipes (id INTEGER PRIMARY KEY, name TEXT)")
            await store.execute("INSERT INTO recipes (name) VALUES (?)", "Borscht")

        Raises sqlite3.Error; and StoreError for BEGIN, as everybody shares this connection.
        """
        async with self._writing() as connection:
            rows = await connection.execute_fetchall(sql, values)
            if connection.in_transaction:
                await connection.rollback()
                raise StoreError("store.execute() runs one statement at a time, outside of transactions.")
            return [dict(row) for row in rows]

    @property
    def _open_connection(self) -> aiosqlite.Connection:
        if self._connection is None:
            raise StoreError("The database is not open: use it inside `async with Store(...) as store:`.")
        if self._loop is not asyncio.get_running_loop():
            raise StoreError("The store was opened in another event loop: open one of its own here.")
        return self._connection

    async def _read(self, sql: str, *values: object) -> list[Row]:
        """Lists and dicts go in as JSON, JSON columns come out decoded."""
        rows = await self._open_connection.execute_fetchall(sql, [_stored(value) for value in values])
        return [_decoded(row) for row in rows]

    async def _write(self, sql: str, *values: object) -> list[Row]:
        async with self._writing():
            return await self._read(sql, *values)

    @contextlib.asynccontextmanager
    async def _writing(self) -> AsyncIterator[aiosqlite.Connection]:
        connection = self._open_connection
        async with self._lock:
            there = self._identity()
            if there != self._opened:  # what is written to a deleted file would be lost at the end
                fate = "was replaced" if there else "is gone"
                raise StoreError(f"The database file {fate}. Stop the server and start it again.")
            yield connection

    @contextlib.asynccontextmanager
    async def _transaction(self) -> AsyncIterator[None]:
        """Statements that stand or fall together."""
        async with self._writing() as connection:
            try:
                await connection.execute_fetchall("BEGIN IMMEDIATE")
                yield
                await connection.execute_fetchall("COMMIT")
            except BaseException:
                # Also where BEGIN or COMMIT was cancelled: the connection's thread keeps to the order.
                with contextlib.suppress(ValueError):  # closed
                    await connection.rollback()
                raise


DECODE = dict.fromkeys(("tool_calls", "item", "input", "error", "metadata"), json.loads) | {"done": bool}


def _decoded(row: sqlite3.Row) -> Row:
    return {k: DECODE[k](v) if k in DECODE and v is not None else v for k, v in dict(row).items()}


def _stored(value: object) -> object:
    return to_json(value) if isinstance(value, (list, dict)) else value


def _first(rows: list[Row]) -> Row | None:
    return rows[0] if rows else None


# ====================================================================================================== Store
# All SQL, and nothing but SQL. Rows come out as plain dicts whose JSON columns are decoded.

SEARCH_DEPTH = 1000  # the newest hits that a search looks at: its time does not grow with the file
LAST = 2**63 - 1  # no id is larger
ITEMS = "SELECT * FROM messages WHERE conversation_id = ? AND user_id = ?"


class Store(Database):
    """Conversations, their items and the to-do list, in one SQLite file.

    `async with Store(path) as store:` opens and closes it. Ids are positive integers. A method that touches a
    user's rows takes that user's id and finds nothing of anybody else's. Failing SQL raises sqlite3.Error.
    """

    async def __aenter__(self) -> Store:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---- conversations

    async def conversation(self, user_id: str, conversation_id: int) -> Row | None:
        sql = "SELECT * FROM conversations WHERE id = ? AND user_id = ?"
        return _first(await self._read(sql, conversation_id, user_id))

    async def conversations(self, user_id: str, limit: int, offset: int = 0) -> list[Row]:
        """The most recently used first."""
        sql = """SELECT * FROM conversations WHERE user_id = ?
            ORDER BY updated_at DESC, id DESC LIMIT ? OFFSET ?"""
        return await self._read(sql, user_id, limit, offset)

    async def search_conversations(self, user_id: str, words: str, limit: int, offset: int = 0) -> list[Row]:
        """Those whose title, or one of whose messages, has all these words, or words that begin so."""
        given = words.replace("\0", " ").split()  # signs alone are in no index, and do not count
        terms = ['"' + word.replace('"', '""') + '"*' for word in given if any(map(str.isalnum, word))]
        if not terms:
            return [] if given else await self.conversations(user_id, limit, offset)
        match = f'owner : "{user_id.encode().hex().upper()}" AND body : ({" AND ".join(terms)})'
        sql = """WITH hits (id) AS (
                SELECT m.conversation_id FROM (
                    SELECT rowid FROM message_search(?1) ORDER BY rowid DESC LIMIT ?2
                ) hit CROSS JOIN messages m ON m.id = hit.rowid
                UNION SELECT rowid FROM (SELECT rowid FROM title_search(?1) ORDER BY rowid DESC LIMIT ?2)
            )
            SELECT c.* FROM hits CROSS JOIN conversations c ON c.id = hits.id WHERE c.user_id = ?3
            ORDER BY c.updated_at DESC, c.id DESC LIMIT ?4 OFFSET ?5"""
        return await self._read(sql, match, SEARCH_DEPTH, user_id, limit, offset)

    async def conversation_page(self, user_id: str, limit: int, order: str, after: int | None) -> list[Row]:
        """A page in the order in which conversations were begun, which new messages do not change."""
        sql = "SELECT * FROM conversations WHERE user_id = ?"
        return await self._page(sql, order, after, limit, user_id)

    async def _page(self, sql: str, order: str, after: int | None, limit: int, *values: object) -> list[Row]:
        """By id; `order` is "asc" or "desc", `after` what the page before ended with."""
        if order == "asc":
            return await self._read(f"{sql} AND id > ? ORDER BY id LIMIT ?", *values, after or 0, limit)
        return await self._read(f"{sql} AND id < ? ORDER BY id DESC LIMIT ?", *values, after or LAST, limit)

    async def update_conversation(self, user_id: str, conversation_id: int, **changes: Any) -> Row | None:
        """Changes title, status with its status_reason, metadata, agent; the row as it is then, if any."""
        if "status" in changes:
            changes.setdefault("status_reason", None)
        return await self._update("conversations", user_id, conversation_id, changes)

    async def _update(self, table: str, user_id: str, row_id: int, given: Row, told: str = "*") -> Row | None:
        changes = ", ".join(f"{name} = ?" for name in given)
        sql = f"UPDATE {table} SET {changes} WHERE id = ? AND user_id = ? RETURNING {told}"  # noqa: S608
        return _first(await self._write(sql, *given.values(), row_id, user_id))

    async def delete_conversation(self, user_id: str, conversation_id: int) -> bool:
        sql = "DELETE FROM conversations WHERE id = ? AND user_id = ? RETURNING id"
        return bool(await self._write(sql, conversation_id, user_id))

    # ---- messages: the items of a conversation

    async def add_user_message(
        self, user_id: str, conversation_id: int | None, title: str, message: Row, attachment_ids: list[str]
    ) -> tuple[Row, Row]:
        """A conversation, a new one where none is named, and the user's message in it: both, or neither.

        `message` has the columns of its row, and gets the attachments. Raises LookupError where the user has
        no such conversation, or no such uploaded file.
        """
        enter = "SELECT * FROM conversations WHERE id = ? AND user_id = ?"
        if conversation_id is None:
            enter = "INSERT INTO conversations (title, user_id) VALUES (?, ?) RETURNING *"
        add = """INSERT INTO messages (conversation_id, user_id, role, content, item)
            SELECT id, user_id, 'user', ?, ? FROM conversations
            WHERE id = COALESCE(?, last_insert_rowid()) AND user_id = ? RETURNING *"""
        async with self._transaction():
            item = message["item"]
            if attachment_ids:
                sql = """SELECT a.id, a.key, a.name, a.mime_type, a.size
                    FROM json_each(?) wanted JOIN attachments a ON a.id = wanted.value
                    WHERE a.user_id = ? AND a.data IS NOT NULL"""
                item = {**item, "attachments": await self._read(sql, attachment_ids, user_id)}
                if len(item["attachments"]) < len(attachment_ids):
                    raise LookupError("Attachment not found")
            # Together: the way to the connection's thread takes longer than each of them.
            entered = self._read(enter, conversation_id or title, user_id)
            added = self._read(add, message["content"], item, conversation_id, user_id)
            conversations, rows = await asyncio.gather(entered, added)
            if not rows:
                raise LookupError("Conversation not found")
            if attachment_ids:
                sql = "INSERT INTO message_attachments SELECT ?, value FROM json_each(?)"
                await self._read(sql, rows[0]["id"], attachment_ids)
        return conversations[0], rows[0]

    async def add_message(self, user_id: str, conversation_id: int, **columns: Any) -> Row | None:
        """The new row with these columns of `messages`, or None where the user has no such conversation."""
        names, values = ", ".join(columns), ", ".join("?" * len(columns))
        sql = f"INSERT INTO messages (conversation_id, user_id, {names}) SELECT id, user_id, {values}"
        sql += " FROM conversations WHERE id = ? AND user_id = ? RETURNING *"
        return _first(await self._write(sql, *columns.values(), conversation_id, user_id))

    async def update_message(self, user_id: str, message_id: int, **columns: Any) -> Row | None:
        """Changes these columns; the row as it is then, or None where there is none."""
        return await self._update("messages", user_id, message_id, columns)

    async def save_texts(self, texts: list[tuple[str, int, str]]) -> None:
        """The content of messages that grow, of many turns at once; each with message id and user id."""
        sql = """UPDATE messages SET content = json_extract(text.value, '$[0]') FROM json_each(?) text
            WHERE messages.id = json_extract(text.value, '$[1]')
                AND messages.user_id = json_extract(text.value, '$[2]') AND messages.status = 'streaming'"""
        await self._write(sql, texts)

    async def end_messages(self, user_id: str, ids: list[int], status: str, error: Row | None) -> list[Row]:
        """How a turn's unfinished rows end, and why, on the last row of all. Returns the rows."""
        sql = """UPDATE messages SET
                status = CASE WHEN status = 'streaming' OR ?1 = 'blocked' THEN ?1 ELSE status END,
                error = CASE WHEN id = (SELECT max(value) FROM json_each(?2)) THEN ?3 END
            WHERE id IN (SELECT value FROM json_each(?2)) AND user_id = ?4 RETURNING *"""
        rows = await self._write(sql, status, ids, error, user_id)
        return sorted(rows, key=lambda row: int(row["id"]))

    async def message(self, user_id: str, conversation_id: int, message_id: int) -> Row | None:
        """One item, hidden context excepted."""
        sql = f"{ITEMS} AND id = ? AND role <> 'system'"
        return _first(await self._read(sql, conversation_id, user_id, message_id))

    async def message_page(
        self, user_id: str, conversation_id: int, limit: int, order: str, after: int | None, hide: str = ""
    ) -> list[Row]:
        """A page of items, hidden context and one role excepted. New rows do not disturb the paging."""
        sql = f"{ITEMS} AND role NOT IN ('system', ?)"
        return await self._page(sql, order, after, limit, conversation_id, user_id, hide)

    async def history(self, user_id: str, conversation_id: int, limit: int) -> list[Row]:
        """The last `limit` items that the model may see, oldest first."""
        sql = f"{ITEMS} AND status <> 'blocked' ORDER BY id DESC LIMIT ?"
        return (await self._read(sql, conversation_id, user_id, limit))[::-1]

    async def last_user_message(self, user_id: str, conversation_id: int) -> Row | None:
        sql = f"{ITEMS} AND role = 'user' ORDER BY id DESC LIMIT 1"
        return _first(await self._read(sql, conversation_id, user_id))

    async def pending_messages(self, user_id: str, conversation_id: int) -> list[Row]:
        """What waits for the person's side, oldest first."""
        sql = f"{ITEMS} AND status IN ('streaming', 'pending') ORDER BY id"
        rows = await self._read(sql, conversation_id, user_id)
        return [row for row in rows if row["status"] == "pending"]

    async def end_unfinished(self, user_id: str, conversation_id: int) -> list[Row]:
        """What waits for the person's side is cancelled; what was not saved to its end, interrupted."""
        sql = """
            UPDATE messages SET status = CASE status WHEN 'pending' THEN 'cancelled' ELSE 'interrupted' END
            WHERE conversation_id = ? AND user_id = ? AND status IN ('streaming', 'pending') RETURNING *"""
        return await self._write(sql, conversation_id, user_id)

    async def rewind(self, user_id: str, conversation_id: int, message: Row) -> Row | None:
        """Remove all that came after a user's message, which becomes as if just sent, with these words."""
        sent, content, item = message["id"], message["content"], message["item"]
        async with self._transaction():
            sql = "DELETE FROM messages WHERE conversation_id = ? AND user_id = ? AND id > ?"
            await self._read(sql, conversation_id, user_id, sent)
            # Who had the last word then, as the result of the last handoff says.
            sql = """UPDATE conversations SET agent = (
                    SELECT json_extract(content, '$.assistant') FROM messages WHERE conversation_id = ?1
                        AND role = 'tool' AND content LIKE '{"assistant":%' AND json_valid(content)
                        AND (SELECT count(*) FROM json_each(content)) = 1
                    ORDER BY id DESC LIMIT 1)
                WHERE id = ?1 AND user_id = ?2"""
            await self._read(sql, conversation_id, user_id)
            sql = """UPDATE messages SET status = 'done', error = NULL, content = ?, item = ?
                WHERE id = ? AND user_id = ? RETURNING *"""
            return _first(await self._read(sql, content, item, sent, user_id))

    async def delete_messages(self, user_id: str, conversation_id: int, ids: list[int]) -> list[int]:
        """The ids of those that there were."""
        sql = """DELETE FROM messages WHERE id IN (SELECT value FROM json_each(?))
                AND conversation_id = ? AND user_id = ? RETURNING id"""
        return [row["id"] for row in await self._write(sql, ids, conversation_id, user_id)]

    async def set_feedback(self, user_id: str, conversation_id: int, ids: list[int], kind: str) -> list[Row]:
        """The items that there are of these, hidden context excepted."""
        sql = """UPDATE messages SET feedback = ? WHERE id IN (SELECT value FROM json_each(?))
                AND conversation_id = ? AND user_id = ? AND role <> 'system' RETURNING *"""
        return await self._write(sql, kind, ids, conversation_id, user_id)

    # ---- attachments: files that a person sends, and pictures that an agent makes

    async def add_attachment(
        self, user_id: str, name: str, mime_type: str, size: int, data: bytes | None = None
    ) -> Row:
        """A file that is announced, or with `data` is there. What nobody sent within a day is removed."""
        sql = """DELETE FROM attachments
            WHERE sent = 0 AND created_at < strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-1 day')"""
        await self._write(sql)
        sql = """INSERT INTO attachments (id, key, user_id, name, mime_type, size, data)
            VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING id, key, name, mime_type, size"""
        new_id, key = "att_" + secrets.token_hex(12), secrets.token_urlsafe(24)
        return (await self._write(sql, new_id, key, user_id, name, mime_type, size, data))[0]

    async def add_picture(self, user_id: str, message_id: int, mime_type: str, data: bytes) -> Row:
        """A picture that an item shows, and that lives as long as the item does."""
        name = "image." + mime_type.split("/")[-1]
        picture = await self.add_attachment(user_id, name, mime_type, len(data), data)
        await self._write("INSERT INTO message_attachments VALUES (?, ?)", message_id, picture["id"])
        return picture

    async def fill_attachment(self, attachment_id: str, key: str, data: bytes) -> bool:
        """The upload, which works once."""
        sql = "UPDATE attachments SET data = ? WHERE id = ? AND key = ? AND data IS NULL RETURNING id"
        return bool(await self._write(sql, data, attachment_id, key))

    async def attachment(self, attachment_id: str, key: str, user_id: str = "") -> Row | None:
        """A file for its owner, or for whoever has its key. Its `data` is None until its upload."""
        sql = "SELECT * FROM attachments WHERE id = ? AND (user_id = ? OR key = ?)"
        return _first(await self._read(sql, attachment_id, user_id, key))

    async def attachment_data(self, user_id: str, attachment_ids: list[str]) -> dict[str, bytes]:
        """The bytes of some files, by the file's id."""
        sql = """SELECT id, data FROM attachments
            WHERE id IN (SELECT value FROM json_each(?)) AND user_id = ? AND data IS NOT NULL"""
        return {row["id"]: row["data"] for row in await self._read(sql, attachment_ids, user_id)}

    async def delete_attachment(self, user_id: str, attachment_id: str) -> bool:
        """Only what was not sent: a message keeps its files."""
        sql = "DELETE FROM attachments WHERE id = ? AND user_id = ? AND sent = 0 RETURNING id"
        return bool(await self._write(sql, attachment_id, user_id))

    # ---- tasks: the to-do list of the built-in assistant

    async def add_task(self, user_id: str, title: str) -> Row:
        sql = "INSERT INTO tasks (user_id, title) VALUES (?, ?) RETURNING id, title, done"
        return (await self._write(sql, user_id, title))[0]

    async def tasks(self, user_id: str) -> list[Row]:
        return await self._read("SELECT id, title, done FROM tasks WHERE user_id = ? ORDER BY id", user_id)

    async def update_task(self, user_id: str, task_id: int, **changes: Any) -> Row | None:
        """Changes its title, or whether it is done."""
        return await self._update("tasks", user_id, task_id, changes, "id, title, done")

    async def delete_task(self, user_id: str, task_id: int) -> Row | None:
        sql = "DELETE FROM tasks WHERE id = ? AND user_id = ? RETURNING id, title, done"
        return _first(await self._write(sql, task_id, user_id))


# ================================================================================================== Old files
# Makes the tables; and brings a file of version 2 forward, where `extra` has what only one kind of row has.


def bring_forward(db: sqlite3.Connection, version: int) -> None:
    """Make the tables, or those of an older file new: all of it, or nothing. Raises StoreError."""
    schema = HERE / "schema.sql"
    if not schema.is_file():
        raise StoreError(f"{schema} is missing: it belongs beside chatkit_server.py.")
    with db:  # which commits, or rolls back
        db.execute("BEGIN IMMEDIATE")
        if db.execute("PRAGMA user_version").fetchone()[0] == version:  # nobody else did it meanwhile
            with items_pass_through(db) if version else contextlib.nullcontext():
                run_script(db, schema.read_text(encoding="utf-8"))
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def run_script(db: sqlite3.Connection, script: str) -> None:
    """Its statements one by one, within the open transaction: executescript() would commit that first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""


MAKE_ROOM = """
CREATE TEMP TABLE old_messages AS
    SELECT m.*, c.user_id, COALESCE(json_extract(extra, '$.group'), m.id) AS response,
        CASE WHEN json_extract(extra, '$.hosted') IS NULL THEN json_extract(tool_calls, '$[0]') END AS call
    FROM messages m JOIN conversations c ON c.id = m.conversation_id;
DROP VIEW items;
DROP TABLE messages;
DROP TABLE message_search;
DROP TRIGGER title_lost;
DROP INDEX conversations_by_age;
DROP INDEX attachments_of_message;
DROP INDEX attachments_unsent;
ALTER TABLE attachments ADD COLUMN sent INTEGER NOT NULL DEFAULT 0 CHECK (sent IN (0, 1));
ALTER TABLE conversations ADD COLUMN metadata TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(metadata));
ALTER TABLE conversations ADD COLUMN agent TEXT;
"""
BRING_BACK = """INSERT INTO messages VALUES (:id, :conversation_id, :user_id, :role, :content, :tool_calls,
    :item, :input, :status, :feedback, :error, :created_at)"""
CLEAR_UP = """
INSERT INTO message_attachments SELECT message_id, id FROM attachments WHERE message_id IS NOT NULL;
ALTER TABLE attachments DROP COLUMN message_id;
DROP TABLE old_messages;
"""


@contextlib.contextmanager
def items_pass_through(db: sqlite3.Connection) -> Generator[None]:
    """Make room, wait while schema.sql makes the tables, and fill them."""
    last_id = db.execute("SELECT * FROM sqlite_sequence WHERE name = 'messages'").fetchall()
    run_script(db, MAKE_ROOM)
    yield
    db.executemany("INSERT INTO sqlite_sequence VALUES (?, ?)", last_id)  # no id comes back
    inputs: dict[Any, list[Row]] = {}  # of each response: its first row has all calls, before the outputs
    for row in _old_rows(db):
        if call := row["call"]:
            told = {"call_id": call["id"], "name": call["name"], "arguments": to_json(call["args"])}
            told |= filled(type="function_call", provider_data=row["extra"].get("provider_data"))
            inputs.setdefault(row["response"], []).append(told)
    for row in _old_rows(db):
        item, call = _old_item(row), row["call"]
        given: Any = [] if row["extra"].get("hosted") or row["role"] == "reasoning" else None
        if call:
            given = inputs.pop(row["response"], [])
            output = {"type": "function_call_output", "call_id": call["id"]}
            given += [output | {"output": row["content"] or "(no output)"}] if row["status"] == "done" else []
        role = "item" if item and row["role"] != "user" else row["role"]
        error = reason_json("refused") if row["extra"].get("unread") else None
        stored = {"item": _stored(item), "input": _stored(given), "error": _stored(error)}
        db.execute(BRING_BACK, row | {"role": role, **stored})
    run_script(db, CLEAR_UP)


def _old_rows(db: sqlite3.Connection) -> Generator[Row]:
    """With the call that the model was shown, if any, and the response of the model's that it was in."""
    for row in db.execute("SELECT * FROM old_messages ORDER BY id"):
        yield {**row, "extra": json.loads(row["extra"] or "{}"), "call": json.loads(row["call"] or "null")}


def _old_item(row: Row) -> Row | None:
    """The thread item of an old row; None where role and content say it all."""
    extra, role = row["extra"], row["role"]
    if role == "user" and extra:
        tool = extra.get("tool_choice")
        options = filled(model=extra.get("model"), tool_choice={"id": tool} if tool else None)
        item = {"type": "user_message", "content": extra.get("parts"), "inference_options": options}
        item |= {name: extra.get(name) for name in ("attachments", "quoted_text")}
        return {name: part for name, part in item.items() if part}
    if role == "reasoning":
        thought = {"type": "thought", "content": row["content"], "status_indicator": "complete"}
        return {"type": "workflow", "workflow": {"type": "reasoning", "tasks": [thought], "expanded": False}}
    if role == "widget":
        return widget_item(extra["widget"], row["content"])
    if role == "input":
        item, answered = pending_item(Questions(extra["inputs"])), extra.get("answered")
    elif "client" in extra:
        item, answered = pending_item(ClientTool(**extra["client"]), row["call"]["id"]), "completed"
        item |= filled(output=extra.get("output"))
    else:
        return None
    return item | {"status": answered} if row["status"] == "done" else item


# ====================================================================================================== Agent
# What a tool, an action handler or a generator can do.

MAX_DEPTH = 64  # of nested JSON, from whatever side: the stack has an end, and not the same for all encoders
json_of_object = functools.partial(to_jsonable_python, by_alias=True, exclude_none=True)


def json_copy(value: Any) -> Any:
    """A value as JSON, ChatKit SDK objects too, half characters replaced. Raises TypeError or ValueError."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=json_of_object)
    copy = from_json(text.encode(errors="replace"))  # which itself refuses more than some 200 levels
    if depth(copy) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return copy


def depth(value: object) -> int:
    """How many lists and objects are in each other."""
    inner: Any = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inner), default=0) if isinstance(value, (dict, list)) else 0


def filled(**parts: Any) -> Row:
    """An object of the parts that are not None."""
    return {name: part for name, part in parts.items() if part is not None}


@dataclass(frozen=True)
class ClientTool:
    """What a tool returns to have the frontend do the work: see TurnContext.client_tool."""

    name: str
    arguments: Row


@dataclass(frozen=True)
class Questions:
    """What a tool returns to ask the person something: see TurnContext.ask."""

    inputs: list[Row]


class Option(BaseModel):
    value: Annotated[str, BeforeValidator(str)]


class MultipleChoice(BaseModel):
    type: Literal["multiple_choice"]
    id: str
    question: str
    options: list[Option]
    multiple: bool = False


class Freeform(BaseModel):
    type: Literal["freeform"]
    id: str
    question: str
    description: str | None = None


Question = Annotated[MultipleChoice | Freeform, Discriminator("type")]
QUESTIONS = TypeAdapter(Annotated[list[Question], Field(min_length=1)])


@dataclass
class Thread:
    """The conversation, as a tool may read and change it; a change is kept when the tool returns."""

    id: str
    title: str
    metadata: Row
    status: Any  # {"type": "active"}, or {"type": "locked" or "closed", "reason"?}; or the SDK's object


# The client_tool_call of the tool that runs: tools run side by side, some of them in threads.
ASKED: contextvars.ContextVar[list[Any]] = contextvars.ContextVar("ASKED")


@dataclass
class TurnContext:
    """What a tool gets in the Agents SDK's wrapper: who asks, where, and how to reach them while it works.

        @function_tool
        async def whoami(wrapper: RunContextWrapper[TurnContext]) -> str:
            await wrapper.context.progress("Looking you up")
            return wrapper.context.user_id

    The user's id is the request's. Never make it an argument of a tool: the model must not choose it.

    `stream` and what follows it are as in the AgentContext of the official SDK, openai-chatkit: they take its
    objects, or dicts of the same shape. All methods raise ValueError or TypeError for what cannot be shown.
    """

    user_id: str
    conversation_id: int
    thread: Thread
    store: Store
    turn: Turn = field(repr=False)  # where all that is said here goes
    locale: str = "en"  # the first of the request's Accept-Language
    request_context: Row = field(default_factory=dict)  # {"headers", "metadata"} of the request
    tool_choice: str | None = None  # what the person chose in the composer: a tool, or a mode
    _workflow: Row = field(default_factory=dict, repr=False)  # the thread item of the one that is open
    _workflow_began: float = 0.0
    _showing: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)  # it: tools run side by side

    async def progress(self, text: str, icon: str | None = None) -> None:
        """Say what the tool is doing. `icon` is one of ChatKit's names, such as "search". Not stored."""
        await self.stream(filled(type="progress_update", text=str(text), icon=icon))

    async def effect(self, name: str, data: Row | None = None) -> None:
        """Have the frontend do something, once: ChatKit calls its onEffect with name and data. Not stored."""
        await self.stream({"type": "client_effect", "name": name, "data": data or {}})

    async def notice(self, level: str, message: str, title: str | None = None) -> None:
        """Show a notice beside the conversation; `level` is info, warning or danger. Not stored."""
        await self.stream(filled(type="notice", level=level, message=str(message), title=title))

    async def say(self, text: str, annotations: Sequence[Any] = ()) -> int:
        """An assistant message; its item id comes back.

        An annotation is {"type": "annotation", "source": {"type": "url", "file" or "entity", "title", ...},
        "index"?}, the index being the character of the text that it stands behind.
        """
        return await say(self.turn, text, json_copy(list(annotations)))

    async def hidden(self, text: str) -> None:
        """Context for the model, which nobody is shown."""
        await self.turn.add_row("system", content=text)

    async def widget(self, root: Any, copy_text: str | None = None) -> int:
        """Show a widget and keep it; its item id comes back.

        `root` is a Card, a ListView or a Basic, as a dict or an object of the ChatKit SDK. `copy_text` is the
        same in words: what is copied, and what the model and plain readers are given.
        """
        made_up = self.generate_id("widget")
        await self.stream({"type": "item", "item": {"id": made_up, **widget_item(root, copy_text)}})
        return self.turn.names[made_up]

    async def replace_widget(self, item_id: int | str, root: Any, copy_text: str | None = None) -> None:
        """Draw a widget anew. Raises LookupError where this conversation has none with that id."""
        row = await self.turn.find_row(item_id)
        if (row["item"] or {}).get("type") != "widget":
            raise LookupError(f"there is no widget {item_id} in this conversation")
        text = row["content"] if copy_text is None else copy_text
        item = widget_item(root, text)
        await self.turn.change_row(row["id"], "thread.item.replaced", content=text, item=item)

    async def remove(self, item_id: int | str) -> None:
        """Take an item away. Raises LookupError where this conversation has none with that id."""
        await self.turn.remove_rows([(await self.turn.find_row(item_id))["id"]])

    async def update_thread(
        self, *, title: str | None = None, status: str | None = None, reason: str = "", metadata: Any = None
    ) -> None:
        """Rename the conversation; make it `active`, `locked` or `closed`; give it other metadata."""
        told = filled(type=status, reason=reason or None) if status else None
        vars(self.thread).update(filled(title=title, status=told, metadata=metadata))
        await self.turn.keep_thread()

    async def answer(self) -> None:
        """For an action handler: have the agent speak now. Raises Refused while it is speaking already."""
        turn = self.turn
        if turn.chat.answering.get(self.conversation_id) is turn:
            raise RuntimeError("answer() is for action handlers: the agent is speaking already")
        turn.chat.claim(turn)
        await speak(turn)

    def client_tool(self, name: str, arguments: Row | None = None) -> ClientTool:
        """`return context.client_tool("get_selection", {...})` from a tool has the frontend do its work.

        The turn ends; the agent goes on with what the frontend sends as this call's result.
        """
        return ClientTool(name, json_copy(arguments or {}))

    def ask(self, inputs: list[Row]) -> Questions:
        """`return context.ask([...])` from a tool asks the person; the agent goes on with what they answer.

        A question is {"type": "multiple_choice", "id", "question", "options": [{"value"}], "multiple"}
        or {"type": "freeform", "id", "question", "description"?}. Raises ValueError for any other.
        """
        questions = QUESTIONS.dump_python(QUESTIONS.validate_python(json_copy(inputs)), exclude_none=True)
        if len({question["id"] for question in questions}) < len(questions):
            raise ValueError("give each question an id of its own")
        return Questions(questions)

    # ---- the names of the official SDK's AgentContext

    @property
    def client_tool_call(self) -> Any:
        """{"name", "arguments"}, to be set by a tool: as if it had returned client_tool()."""
        return ASKED.get([None])[0]

    @client_tool_call.setter
    def client_tool_call(self, call: Any) -> None:
        ASKED.get([None])[0] = call

    async def stream(self, event: Any) -> None:
        """Any event of the ChatKit protocol, or one of ours such as {"type": "thinking", "content": "..."}.

        An item is stored; an id that was made up for it stands for the row's in all that follows.
        """
        await take(self.turn, json_copy(event))

    async def stream_widget(self, widget: Any, copy_text: str | None = None) -> None:
        """Show a widget; or one that grows, where `widget` is an async generator of its states."""
        if not hasattr(widget, "__aiter__"):
            await self.widget(widget, copy_text)
            return
        made_up, item = self.generate_id("widget"), Row()
        try:
            async for state in widget:
                before, item = item, widget_item(state, copy_text)
                if not before:
                    await self.stream({"type": "thread.item.added", "item": {"id": made_up, **item}})
                    continue
                for update in widget_updates(before["widget"], item["widget"]):
                    row_id = self.turn.names[made_up]
                    await self.turn.change_row(row_id, "thread.item.updated", update, item=item)
        finally:
            if item:  # as far as it came
                await self.stream({"type": "thread.item.done", "item": {"id": made_up, **item}})

    def generate_id(self, kind: str = "item", thread: Any = None) -> str:
        """An id to stream an item under; it may be forgotten once the item is done."""
        return f"{kind}_{secrets.token_hex(8)}"

    async def start_workflow(self, workflow: Any) -> None:
        """Begin to show steps of work; they appear with the first task, those of a reasoning at once.

        It is {"type": "custom" or "reasoning", "tasks": [...], "summary"?, "expanded"?}.
        """
        content = {"type": "custom", "tasks": [], "expanded": False, **json_copy(workflow)}
        while self._workflow:
            await self.end_workflow()
        self._workflow = {"id": self.generate_id("workflow"), "type": "workflow", "workflow": content}
        self._workflow_began = time.monotonic()
        await self._show_workflow("added", 0)

    async def add_workflow_task(self, task: Any) -> None:
        """One more step, such as {"type": "custom", "title": "...", "status_indicator": "loading"}."""
        while not self._workflow:  # another tool may close it at once
            await self.start_workflow({})
        tasks = self._workflow["workflow"]["tasks"]
        tasks.append(json_copy(task))
        await self._show_workflow("added", len(tasks) - 1)

    async def update_workflow_task(self, task: Any, task_index: int) -> None:
        """A step that changed. Raises LookupError where there is no such step."""
        tasks = self._workflow["workflow"]["tasks"] if self._workflow else []
        if not 0 <= task_index < len(tasks):
            raise LookupError(f"no workflow is open that has a task {task_index}")
        tasks[task_index] = json_copy(task)
        await self._show_workflow("updated", task_index)

    async def end_workflow(self, summary: Any = None, expanded: bool = False) -> None:
        """Close it, with {"title", "icon"?} for its summary line, or else {"duration": its seconds}.

        The next assistant message closes one that is open, and so does the end of the turn.
        """
        async with self._showing:
            item, self._workflow = self._workflow, {}
        if item and item["id"] in self.turn.names:
            took = {"duration": int(time.monotonic() - self._workflow_began)}
            item["workflow"].setdefault("summary", took)
            item["workflow"] |= filled(expanded=expanded, summary=json_copy(summary))
            await self.stream({"type": "thread.item.done", "item": item})

    async def _show_workflow(self, change: str, index: int) -> None:
        """A step that was added or updated; the first shows the workflow."""
        item, content = self._workflow, self._workflow["workflow"]
        async with self._showing:
            is_open = item is self._workflow  # or another tool has closed it meanwhile, with this step in it
            row_id = self.turn.names.get(item["id"])
            if row_id is None and (content["tasks"] or content["type"] == "reasoning"):
                await self.stream({"type": f"thread.item.{'added' if is_open else 'done'}", "item": item})
            elif row_id is not None and is_open:
                task, kept = content["tasks"][index], {"type": "workflow", "workflow": content}
                update = {"type": f"workflow.task.{change}", "task_index": index, "task": task}
                await self.turn.change_row(row_id, "thread.item.updated", update, item=kept)


def widget_item(root: Any, copy_text: str | None) -> Row:
    """A widget's thread item. The types of roots are those of chatkit/widgets.py in openai-chatkit."""
    root = json_copy(root)
    if not isinstance(root, dict) or root.get("type") not in ("Card", "ListView", "Basic"):
        raise ValueError("a widget's root is a Card, a ListView or a Basic")
    return filled(type="widget", widget=root, copy_text=copy_text or None)


def widget_updates(before: Row, after: Row) -> list[Row]:
    """From one state of a widget to the next: deltas where texts with an id only grew, or the new root."""
    (old_rest, old), (rest, texts) = split_texts(before), split_texts(after)
    if rest != old_rest or not all(texts[key][0].startswith(old[key][0]) for key in texts):
        return [{"type": "widget.root.updated", "widget": after}]
    deltas = []
    for key, (text, done) in texts.items():
        if (text, done) != old[key]:
            delta = {"component_id": key, "delta": text[len(old[key][0]) :], "done": done}
            deltas.append({"type": "widget.streaming_text.value_delta", **delta})
    return deltas


def split_texts(widget: Row) -> tuple[Row, dict[str, tuple[str, bool]]]:
    """A widget without what may grow; and that, by component id: a text, and whether it is whole."""
    texts = {}

    def without_text(part: Row) -> Row:
        if part.get("type") in ("Text", "Markdown") and "id" in part:
            texts[part["id"]] = str(part.pop("value", "")), not part.pop("streaming", False)
        return part

    return json.loads(to_json(widget), object_hook=without_text), texts


# ================================================================================================== Assistant
# The to-do assistant that answers where no agent is given.


def _words(text: str) -> str:
    """An argument that says something, and fits into a list."""
    if not text.strip():
        raise ValueError("it is empty")
    return text.strip()[:200]


Wrapper = RunContextWrapper[TurnContext]
WhichTask = Annotated[str, "The task's number, or its title.", AfterValidator(_words)]
TaskTitle = Annotated[str, "What is to be done, in a few words.", AfterValidator(_words)]


@function_tool
async def add_task(wrapper: Wrapper, title: TaskTitle) -> str:
    """Put a task on the person's to-do list."""
    return to_json(await wrapper.context.store.add_task(wrapper.context.user_id, title))


@function_tool
async def list_tasks(wrapper: Wrapper) -> str:
    """Show the person all tasks on their to-do list, with their numbers."""
    tasks = await wrapper.context.store.tasks(wrapper.context.user_id)
    if tasks:
        await wrapper.context.widget(task_widget(tasks), copy_text=task_text(tasks))
    return to_json(tasks)


@function_tool
async def complete_task(wrapper: Wrapper, task: WhichTask) -> str:
    """Mark a task as done."""
    return await _change_task(wrapper.context, task, done=True)


@function_tool
async def update_task(wrapper: Wrapper, task: WhichTask, title: TaskTitle) -> str:
    """Give a task another title."""
    return await _change_task(wrapper.context, task, title=title)


@function_tool
async def delete_task(wrapper: Wrapper, task: WhichTask) -> str:
    """Take a task off the list."""
    return await _change_task(wrapper.context, task)


async def _change_task(context: TurnContext, which: str, **changes: Any) -> str:
    """Change a task, or delete it where there are no changes; it as JSON, or {"error", "tasks"}.

    It is known by its number, its title, or a part that no other title has.
    """
    store, user_id = context.store, context.user_id
    words = re.sub("^(?:the |my |task |#)+", "", which.lower())
    tasks = await store.tasks(user_id)
    exact = [task for task in tasks if words in (str(task["id"]), task["title"].lower())]
    found = exact or [task for task in tasks if words in task["title"].lower()]
    if len(found) != 1:
        return to_json({"error": f"There is no single task “{which}”.", "tasks": tasks})
    change = store.update_task if changes else store.delete_task
    return to_json(await change(user_id, found[0]["id"], **changes))


def task_text(tasks: list[Row]) -> str:
    return "\n".join(f"- **{task['id']}** {task['title']}{' (done)' * task['done']}" for task in tasks)


def task_widget(tasks: list[Row]) -> Row:
    """A card with a checkbox for each task; ticking one sends the action `toggle_task` with its number."""
    # What has a default in the SDK's classes is written out: a frontend gets the same from either.
    how = {"type": "toggle_task", "handler": "server", "loadingBehavior": "auto", "streaming": True}
    boxes = []
    for task in tasks:
        number, done = task["id"], task["done"]
        action = {**how, "payload": {"id": number, "done": not done}}
        box = {"type": "Checkbox", "key": str(number), "name": f"task_{number}", "label": task["title"]}
        boxes.append({**box, "defaultChecked": done, "onChangeAction": action})
    return {"type": "Card", "children": boxes}


async def toggle_task(context: TurnContext, action: Row, item: Row | None) -> None:
    """The action handler that goes with the to-do assistant: tick the task, and draw the widget again."""
    store, user_id, payload = context.store, context.user_id, action["payload"]
    task_id = as_row_id(payload.get("id")) if isinstance(payload, dict) else None
    if action["type"] != "toggle_task" or task_id is None:
        raise ValueError("the only action here is toggle_task, whose payload has the id of a task")
    if not await store.update_task(user_id, task_id, done=bool(payload.get("done", True))):
        await context.notice("warning", f"There is no task {task_id}.")
    if item is not None:
        tasks = await store.tasks(user_id)
        await context.replace_widget(item["id"], task_widget(tasks), copy_text=task_text(tasks))


def todo_agent() -> Agent[TurnContext]:
    """The assistant that answers where create_app() is given no agent."""
    return Agent(
        name="To-do assistant",
        instructions=(
            "You keep the person's to-do list with your tools. Use them for whatever concerns the list, and "
            "never claim a change that no tool made. Answer briefly, in the person's language."
        ),
        tools=[add_task, list_tasks, complete_task, update_task, delete_task],
    )


# ================================================================================================= Demo model
# A model without a network that calls the real tools.


class DemoModel(Model):
    """Understands a handful of to-do sentences and `call NAME {json}`, by a few rules.

    It takes the same way as any model: it streams Responses events, and its tool calls go through the runner.
    """

    def __init__(self, delay: float = 0.02) -> None:
        self.delay = delay  # seconds after each word, so that one can see it stream

    async def get_response(self, *args: Any, **kwargs: Any) -> ModelResponse:
        return await ScriptedModel([ModelStep.respond(_respond)]).get_response(*args, **kwargs)

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[TResponseStreamEvent]:
        async for event in ScriptedModel([ModelStep.respond(_respond)]).stream_response(*args, **kwargs):
            if event.type == "response.output_text.delta":
                for word in re.findall(r"\S+\s*|\s+", event.delta):
                    yield event.model_copy(update={"delta": word})
                    await asyncio.sleep(self.delay)
            else:
                yield event


ToolCall = tuple[str, Row]  # a tool's name, and its arguments
TODO_STARTERS = ("add buy milk to my list", "show my tasks", "complete buy milk")
_COMMANDS = (  # verbs, what follows them, and the tool whose arguments its groups are
    ("show|list|what|what.s", r".*\b(?:tasks|list|to-?dos)", "list_tasks"),
    ("add|remind me to", "(?P<title>.+?)", "add_task"),
    ("rename|change", "(?P<task>.+?) to (?P<title>.+?)", "update_task"),
    ("complete|finish|mark", "(?P<task>.+?)(?: (?:as )?(?:done|finished|completed?))?", "complete_task"),
    ("delete|remove", "(?P<task>.+?)", "delete_task"),
)
_SAID = {
    "add_task": "Added “{title}” to your list. It is task {id}.",
    "complete_task": "Marked “{title}” as done.",
    "update_task": "Task {id} is now “{title}”.",
    "delete_task": "Removed “{title}” from your list.",
}


def _respond(call: ModelCall) -> ModelStep:
    """The next step: the calls that are asked for and were not made yet, or else a report of all.

    Like any model it keeps nothing between two steps: what it did is in the items that it is given.
    """
    words, outputs = "", Row()
    made: dict[str, ToolCall] = {}  # since the person spoke, by their ids
    for item in call.input:
        if item.get("role") == "user":
            content = item["content"]
            text = content if isinstance(content, str) else content[-1].get("text", "")
            if not text.startswith("<context>"):  # which the server put there
                words, made = text, {}
        elif item.get("role") == "assistant":  # what follows an answer is a click, or the like
            words, made = "", {}
        elif item.get("type") == "function_call":
            made[item["call_id"]] = (item["name"], json_object(item["arguments"]))
        elif item.get("type") == "function_call_output":
            outputs[item["call_id"]] = item["output"]
    tools = {tool.name: tool.params_json_schema for tool in call.tools if isinstance(tool, FunctionTool)}
    tools |= {handoff.tool_name: handoff.input_json_schema for handoff in call.handoffs}
    wanted = _wanted_calls(words, tools, str(call.model_settings.tool_choice))
    missing = [each for each in wanted if each not in made.values()]
    # One tool after the other: a list that is asked for last shows what was done before.
    now = [each for each in missing if each[0] == missing[0][0]]
    output: list[Any] = [function_call(*each, call_id="call_" + secrets.token_hex(8)) for each in now]
    text = ""
    if not output:
        reports = [_report(name, outputs.get(call_id)) for call_id, (name, _) in made.items()]
        text = "\n\n".join(reports) or _introduction(list(tools))
        output = [assistant_message(text)]
    heard, told = len(json.dumps(call.input, default=str).split()), len(text.split())  # it has no tokens
    return ModelStep(output, Usage(1, input_tokens=heard, output_tokens=told, total_tokens=heard + told))


def _wanted_calls(words: str, tools: dict[str, Row], forced: str) -> list[ToolCall]:
    """What a message asks for; where it does not ask for a tool that is `forced`, that one has it whole."""
    calls = _named_calls(words, tools) or (understand(words) if "add_task" in tools else [])
    if forced not in tools or forced in [name for name, _ in calls]:
        return calls
    kinds = tools[forced].get("properties", {}).items()
    return [(forced, {name: words for name, kind in kinds if kind.get("type") == "string"})]


def _named_calls(words: str, tools: Iterable[str]) -> list[ToolCall]:
    """What is named in `call echo {"text": "hi"} call transfer_to_billing`."""
    calls, end, pattern = [], 0, re.compile(r"\bcall\s+([\w-]+)\s*", re.I)
    while found := pattern.search(words, end):
        start = end = found.end()
        with contextlib.suppress(ValueError, RecursionError):
            _, end = json.JSONDecoder().raw_decode(words, start)
        if found[1] in tools:
            calls.append((found[1], json_object(words[start:end])))
    return calls


def understand(text: str) -> list[ToolCall]:
    """What the to-do commands in a message ask for."""
    calls: list[ToolCall] = []
    text = re.sub('["“”]', "", text[:1000]).replace("\n", "; ")  # a pattern may look at all of it often
    text = " ".join(text.split())
    any_verb = "|".join(verbs for verbs, _, _ in _COMMANDS)
    on_my_list = "(?: (?:to|on|from) (?:my |the )?(?:to-?do )?list)?(?:,? please)?"
    for clause in re.split(f"(?:[.;!?,]| and| then)+ (?=(?:please )?(?:{any_verb}) )", text, flags=re.I):
        for verbs, rest, tool in _COMMANDS:
            command = re.compile(f"(?:please )?(?:{verbs}) {rest}{on_my_list}", re.I)
            if found := command.fullmatch(clause.strip(" .!?,;")):
                given = found.groupdict()
                several = re.split("[,;]+ (?:and )?| and ", found[1]) if len(given) == 1 else []
                calls += [(tool, dict.fromkeys(given, each)) for each in several] or [(tool, given)]
    return calls


def _report(tool: str, output: Any) -> str:
    """What a tool answered, in words."""
    result = json_value(output)
    with contextlib.suppress(KeyError, TypeError):  # an agent's own tool may have one of these names
        if "error" in result:
            return str(result["error"])
        if tool == "list_tasks":
            return f"Your tasks:\n\n{task_text(result)}" if result else "Your list is empty."
        return _SAID.get(tool, "{assistant} has taken over.").format(**result)
    text = tool_text(output, output)[:1000]
    return f"The tool `{tool}` answered: {text}" if text else f"The tool `{tool}` is done."


def _introduction(tools: list[str]) -> str:
    tries = TODO_STARTERS if "add_task" in tools else [f"call {tool}" for tool in tools]
    what = f"Try “{'”, “'.join(tries)}”. " if tries else ""
    return (
        f"I am the built-in demo model: a few rules, no language model behind them. {what}"
        "For real answers, set OPENAI_API_KEY, GEMINI_API_KEY or CHATKIT_MODEL and start the server again."
    )


# ===================================================================================================== Models
# Choosing a model by its name, and what its failures mean for a person.

# Whose a name without a slash probably is, by how it begins.
MEANT = {name: name for name in ("gemini", "mistral", "deepseek")} | {"claude": "anthropic", "grok": "xai"}


class Models(ModelProvider):
    """Finds the model for a name; each is made once.

    demo                       the offline demo model
    gemini/gemini-2.5-flash    with a slash: LiteLLM
    gpt-5.6-luna               without: OpenAI's Responses API, or chat completions at OPENAI_BASE_URL

    Without a name, `default`: CHATKIT_MODEL, or what the keys in the environment allow, or the demo model.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._models: dict[str, Model] = {}
        if settings.model:
            self.default = settings.model.removeprefix("litellm/")
        elif settings.openai_api_key:
            self.default = get_default_model()
        elif settings.gemini_api_key:
            self.default = "gemini/" + settings.gemini_model.split("/")[-1]
        else:
            self.default = "demo"

    def name_of(self, model: str | Model | None) -> str:
        """A model's name, as people may see it."""
        if isinstance(model, Model):
            return str(getattr(model, "model", "") or type(model).__name__)
        return (model or self.default).removeprefix("litellm/")

    def get_model(self, model_name: str | Model | None) -> Model:
        """Raises SettingsError where it cannot work: the text says which variable to set, or another name."""
        if isinstance(model_name, Model):
            return model_name
        name = self.name_of(model_name)
        if name not in self._models:
            if name == "demo" and not self.settings.model:
                variables = "OPENAI_API_KEY, GEMINI_API_KEY or CHATKIT_MODEL"
                log.info("The demo model answers; for a real one set %s and start again.", variables)
            make = self._litellm_model if "/" in name else self._openai_model
            self._models[name] = DemoModel() if name == "demo" else make(name)
        return self._models[name]

    def _openai_model(self, name: str) -> Model:
        provider = MEANT.get(re.split("[^a-z]", name.lower())[0])
        if provider and not self.settings.openai_base_url:
            raise SettingsError(f"The model {name!r} needs its provider's name: write {provider}/{name}.")
        if not self.settings.openai_api_key and not self.settings.openai_base_url:
            raise SettingsError(
                f"The model {name!r} is one of OpenAI's: it needs OPENAI_API_KEY, or OPENAI_BASE_URL for "
                "a server that speaks its API. Others have a slash, as in gemini/gemini-2.5-flash."
            )
        is_openai = self.client.base_url.host == "api.openai.com"
        return OpenAIProvider(openai_client=self.client, use_responses=is_openai).get_model(name)

    @functools.cached_property
    def client(self) -> AsyncOpenAI:
        return AsyncOpenAI(
            api_key=self.settings.openai_api_key or "none",  # local servers ask for none
            base_url=self.settings.openai_base_url or "https://api.openai.com/v1",
            max_retries=1,  # it obeys a Retry-After of up to two minutes without a word, each time
        )

    async def transcribe(self, audio: bytes, mime_type: str) -> str:
        """Speech to text at OpenAI, which knows a recording's format by its file name."""
        file = ("audio." + mime_type.split("/")[-1], audio, mime_type)
        said = await self.client.audio.transcriptions.create(model="gpt-4o-mini-transcribe", file=file)
        return said.text

    def _litellm_model(self, name: str) -> Model:
        litellm, (provider, _, rest) = _litellm(), name.partition("/")
        from agents.extensions.models.litellm_model import LitellmModel

        known = [each.value for each in litellm.LlmProviders]
        local = f"openai/{name} for one at OPENAI_BASE_URL" if self.settings.openai_base_url else ""
        if provider not in known:
            near = difflib.get_close_matches(provider.lower(), known, 1)
            meant = local or (f"{near[0]}/{rest}" if near else "gemini/gemini-2.5-flash, say")
            raise SettingsError(f"LiteLLM knows no provider {provider!r}, for {name!r}: write {meant}.")
        key = getattr(self.settings, f"{provider}_api_key", None)  # OpenAI's and Gemini's are settings
        url = getattr(self.settings, f"{provider}_base_url", None)
        token = provider == "huggingface" and os.environ.get("HF_TOKEN")  # which LiteLLM reads
        missing = [] if key or url or token else litellm.validate_environment(name)["missing_keys"]
        # Azure's are all called missing where one of them is.
        if needed := [each for each in missing if each.endswith("_API_KEY") and not os.environ.get(each)]:
            text = " or ".join(needed) + (local and f"; write {local}")
            raise SettingsError(f"The model {name!r} needs {text}.")
        return LitellmModel(model=name, api_key=key or (url and "none"), base_url=url)

    async def close(self) -> None:
        self._models.clear()
        if client := self.__dict__.pop("client", None):
            await client.close()


@functools.cache
def _litellm() -> Any:
    """LiteLLM, made fit for us. It costs two seconds and 50 MB: only for those who use it."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or its import fetches a price list
    import litellm
    from litellm.llms.vertex_ai.gemini.vertex_and_google_ai_studio_gemini import ModelResponseIterator

    litellm.suppress_debug_info = True  # it prints advice to standard output otherwise
    litellm.drop_params = True  # a setting that one provider does not know is left out, not refused
    litellm.disable_aiohttp_transport = True  # it keeps a stopped answer's connection, and hides breaks
    parse = ModelResponseIterator.handle_accumulated_json_chunk

    def parse_or_end(self: Any, chunk: str) -> Any:
        # Where Gemini's stream ends within a chunk, LiteLLM 1.83 asks for the rest for ever, and stops all.
        return parse(self, chunk) if chunk else json.loads(self.accumulated_json)  # which raises

    cast(Any, ModelResponseIterator).handle_accumulated_json_chunk = parse_or_end
    return litellm


def agents_within(agent: Agent[Any]) -> list[Agent[Any]]:
    """An agent and all that it may hand over to or use as tools.

    The SDK has no public way to these agents: a test fails when the attributes change.
    """
    found = [agent]
    for each in found:  # which grows meanwhile
        handed = [to if isinstance(to, Agent) else cast(Any, to)._agent_ref() for to in each.handoffs]
        used = [getattr(tool, "_agent_instance", None) for tool in each.tools]
        found += [near for near in [*handed, *used] if isinstance(near, Agent) and near not in found]
    return found


class Failure(Exception):
    """Why there is no answer: its code, and what a person is told where REASONS has no text for that."""


# Why an answer failed, by its code: what a person is told, and where to try again is not worth it.
REASONS = {
    "timeout": "The answer took too long.",
    "shutdown": "The server is being stopped. What was said so far is kept.",
    "key_rejected": "The model's provider rejected the API key.",
    "rate_limited": "The model's provider says: too many requests, or no credit left. Try again later.",
    "model_not_found": "The model's provider does not know this model. Check the model's name.",
    "refused": "The model's provider refused the request.",
    "unreachable": "The model's provider cannot be reached, or is out of order.",
    "too_many_steps": "The assistant took too many steps without an answer.",
    "guardrail": "This was blocked by a guardrail.",
    "refusal": "The model declined to answer.",
    "bad_answer": "The model's provider broke off, or sent what is no answer.",
    "empty": "The model gave no answer.",
    "storage": "The database cannot be used right now.",
    "internal": "Something went wrong while answering.",
}
STORAGE_REASONS = {  # by a word in SQLite's own text
    "locked": "The database is locked by another program. Try again in a moment.",
    "full": "The disk is full; nothing new can be kept.",
    "readonly": "The database is read-only; nothing new can be kept.",
}
FINAL = {"key_rejected", "model_not_found", "refused", "unreadable_file", "guardrail", "refusal"}
BY_STATUS = {401: "key_rejected", 402: "rate_limited", 403: "key_rejected", 404: "model_not_found"}
BY_STATUS |= {408: "timeout", 409: "unreachable", 429: "rate_limited"}
MODEL_GUARDRAILS = (InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered)
TOOL_GUARDRAILS = (ToolInputGuardrailTripwireTriggered, ToolOutputGuardrailTripwireTriggered)
BY_CLASS: dict[str, tuple[type[BaseException], ...]] = {  # the first that fits counts
    "timeout": (openai.APITimeoutError, ModelTimeoutError, asyncio.TimeoutError, TimeoutError),
    "too_many_steps": (MaxTurnsExceeded,),
    "guardrail": (*MODEL_GUARDRAILS, *TOOL_GUARDRAILS),
    "refusal": (ModelRefusalError,),
    "bad_answer": (ModelBehaviorError, json.JSONDecodeError),
    "unreachable": (openai.APIError, ConnectionError),
}


def explain(error: BaseException) -> Row:
    """An error as a person may see it: its code, a text from a fixed list, and whether trying again may help.

    The error's own text stays out: providers put keys, addresses and prompts into theirs.
    """
    error = getattr(error, "original_exception", None) or error  # what LiteLLM has wrapped in one of its own
    if isinstance(error, Failure):
        return reason_json(*error.args)
    if isinstance(error, (Refused, SettingsError)):
        return reason_json("refused", str(getattr(error, "detail", error)))
    if isinstance(error, (sqlite3.Error, StoreError)):
        texts = (text for word, text in STORAGE_REASONS.items() if word in str(error))
        return reason_json("storage", str(error) if isinstance(error, StoreError) else next(texts, None))
    status = _http_status(error)
    if 400 <= status < 500:
        code = BY_STATUS.get(status, "refused")
    elif status or type(error).__module__.startswith(("httpx", "httpcore")):
        code = "unreachable"
    else:
        code = next((code for code, kinds in BY_CLASS.items() if isinstance(error, kinds)), "internal")
    return reason_json(code)


def reason_json(code: str, message: str | None = None) -> Row:
    return {"code": code, "message": message or REASONS[code], "allow_retry": code not in FINAL}


def _http_status(error: BaseException | None) -> int:
    """The HTTP status behind an error, 0 if there is none.

    LiteLLM goes by digits in the provider's text, where a port or a length may look like a status; so what
    counts is the error that its own came from.
    """
    status = 0
    while error is not None:
        for part in (getattr(error, "response", None), error):
            found = getattr(part, "status_code", None)
            status = found if isinstance(found, int) else status
        error = error.__cause__ or error.__context__
    return status


# ====================================================================================================== Items
# A row has three faces: what the model is shown again (input items of the Agents SDK, which are those of
# OpenAI's Responses API), what ChatKit shows (a thread item), and plain text. For each kind of row they stand
# side by side here. An item that passes through whole needs nothing of its own: `input`, `item` and `content`
# hold its faces.

# Types of input items; others mean something to one provider only.
OF_ANY_MODEL = (None, "message", "function_call", "function_call_output")


def model_input(rows: list[Row], hosted: bool) -> list[Row]:
    """What the model is shown of stored rows, which have their `files`.

    `hosted`: the model knows the items of OpenAI's own tools. Raises Failure for a file of the newest row
    that no model can be given.
    """
    items = [item for row in rows for item in row_input(row, newest=row is rows[-1])]
    if rows and rows[0]["role"] != "user":  # some providers insist that a conversation begins with the person
        items.insert(0, context_input("Earlier messages are left out."))
    return [item for item in _with_outputs(items) if hosted or item.get("type") in OF_ANY_MODEL]


def _with_outputs(items: list[Row]) -> list[Row]:
    """Each function call gets an output, and what else has no counterpart goes, or providers refuse it all.

    A turn may break off between the two, and the oldest rows may be cut between them. Outputs stand behind
    all calls of one response.
    """
    waiting: dict[str, Row] = {}  # calls, by ids, which some providers use again in each answer
    paired: set[int] = set()  # items, by identity
    for item in items:
        if call_id := item.get("call_id"):
            if not item["type"].endswith("_output"):
                waiting[call_id] = item
            elif call_id in waiting:
                paired |= {id(item), id(waiting.pop(call_id))}
    text = "(There is no result: the person's side did not let this come to its end.)"
    whole: list[Row] = []
    for are_calls, group in itertools.groupby(items, key=lambda item: item.get("type") == "function_call"):
        together = [item for item in group if are_calls or not item.get("call_id") or id(item) in paired]
        lost = [item["call_id"] for item in together if are_calls and id(item) not in paired]
        lost_output = {"type": "function_call_output", "output": text}
        whole += together + [{**lost_output, "call_id": call_id} for call_id in lost]
    return whole


def row_input(row: Row, *, newest: bool) -> list[Row]:
    """What the model is shown of one row; the end is after ThreadItemConverter in chatkit/agents.py."""
    given, item = row["input"], row["item"]
    if isinstance(given, list):
        return given
    if row["role"] == "user":
        return [user_input(row, newest=newest)]
    if row["role"] == "assistant":
        return [{"role": "assistant", "content": row["content"]}]
    if row["role"] == "system":
        return [context_input(row["content"])]
    if given or row["tool_calls"] or item["type"] == "end_of_turn":
        return []
    shown = row["content"] or to_json({name: value for name, value in item.items() if name != "type"})
    return [context_input(f"The person was shown this {item['type'].replace('_', ' ')}:\n{shown}")]


def thread_item(row: Row, base: str) -> Row:
    """A stored row as ChatKit's thread item; `base` is the app's own URL."""
    if row["role"] == "user":
        item = user_item(row, base)
    elif row["item"]:
        item = shown_item(row, base)
    elif row["role"] == "assistant":
        item = {"type": "assistant_message", "content": [output_text(row["content"])]}
    else:
        signs = {"streaming": "loading", "pending": "loading", "done": "complete"}
        told = "\n".join(tool_texts(row)) or None
        item = task_item(signs.get(row["status"], "none"), title=row["tool_calls"][0]["name"], content=told)
    ids = {"id": str(row["id"]), "thread_id": str(row["conversation_id"])}
    return {**ids, "created_at": row["created_at"], **item}


def as_shown(row: Row, show_tools: str) -> Row | None:
    """A row as readers may see it: CHATKIT_SHOW_TOOLS may hide a tool call's contents, or all of it."""
    if row["role"] != "tool" or show_tools == "full":
        return row
    calls = [{**call, "args": {}} for call in row["tool_calls"]]
    return {**row, "tool_calls": calls, "content": "", "item": None} if show_tools == "names" else None


def markdown(title: str, rows: list[Row]) -> str:
    """A conversation as a Markdown document."""
    parts = [f"# {title}"]
    for row in rows:
        files = [f"- {file['name']}" for file in (row["item"] or {}).get("attachments") or []]
        if row["role"] == "tool":
            parts += [f"**Tool** `{row['tool_calls'][0]['name']}`", *map(code_block, tool_texts(row))]
        elif row["content"] or files:
            who = {"user": ["**You**"], "assistant": ["**Assistant**"]}.get(row["role"], [])
            parts += filter(None, [*who, row["content"], *files])
        for annotation in annotations_of(row["item"] or {}):
            source = annotation.get("source") or {}
            name, url = source.get("title", "source"), source.get("url")
            parts.append(f"- [{name}]({url})" if url else f"- {name}")
    return "\n\n".join(parts) + "\n"


def code_block(text: str, language: str = "") -> str:
    """Text as a Markdown code block, whose fence is longer than any within it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


# ---- what the person wrote


def user_input(row: Row, *, newest: bool) -> Row:
    """The person's own words last; what is quoted, tagged or attached stands apart from them."""
    item, parts = row["item"] or {}, []
    if item.get("quoted_text"):
        parts.append(input_text(f"The person quotes from this conversation:\n{item['quoted_text']}"))
    for tag in item.get("content") or []:
        if tag["type"] == "input_tag":
            about = to_json({name: tag[name] for name in ("id", "text", "data")})
            parts.append(input_text(f"The person's message names this as @{tag['text']}:\n{about}"))
    for file in item.get("attachments") or []:
        readable = newest or (row["error"] or {}).get("code") != "refused"  # perhaps for this file
        part = file_input(file, row["files"].get(file["id"], b"")) if readable else None
        if part is None and newest:
            raise Failure("unreadable_file", f"The model cannot read {file['name']} ({file['mime_type']}).")
        told = f"(The person attached {file['name']}, which the model cannot read.)"
        parts.append(part or input_text(told))
    words = row["content"] or "(The person sent this without words.)"
    return {"role": "user", "content": [*parts, input_text(words)] if parts else words}


def context_input(text: str) -> Row:
    """What the model should know and nobody said: an item of its own, apart from the person's words."""
    return {"role": "user", "content": f"<context>\n{text}\n</context>"}


def input_text(text: str) -> Row:
    return {"type": "input_text", "text": text}


def user_item(row: Row, base: str) -> Row:
    kept, data, thread_id = row["item"] or {}, row.get("files", {}), str(row["conversation_id"])
    files = [attachment_json(file, base, data.get(file["id"])) for file in kept.get("attachments") or []]
    text = [input_text(row["content"])] if row["content"] else []
    item = {"type": "user_message", "content": text, "inference_options": {}, **kept}
    return {**item, "attachments": [{**file, "thread_id": thread_id} for file in files]}


# ---- what the agent said


def output_text(text: str, annotations: Sequence[Row] = ()) -> Row:
    return {"annotations": list(annotations), "text": text, "type": "output_text"}


def annotation_json(given: Any) -> Row | None:
    """A citation of the Responses API as ChatKit's annotation; None for one that names no source."""
    given = dict(given)
    url, name = given.get("url"), given.get("filename")
    if not (url or name):
        return None
    source = source_json("url", url, given.get("title")) if url else source_json("file", name)
    index = given.get("end_index", given.get("index"))
    return filled(type="annotation", source=source, index=index if isinstance(index, int) else None)


def annotations_of(item: Row) -> list[Row]:
    return [each for part in item.get("content") or [] for each in part.get("annotations") or []]


def source_json(kind: Literal["url", "file"], name: Any, title: Any = None) -> Row:
    return {"type": kind, "url" if kind == "url" else "filename": str(name), "title": str(title or name)}


# ---- a tool's call and its result


def tool_texts(row: Row) -> list[str]:
    """A call's arguments and its result, where there are any."""
    arguments = row["tool_calls"][0]["args"]
    return [text for text in (arguments and to_json(arguments), row["content"]) if text]


def task_item(indicator: str, **task: Any) -> Row:
    return {"type": "task", "task": {"type": "custom", "status_indicator": indicator, **filled(**task)}}


def hosted_args(raw: Row) -> Row:
    """What a call asks for that is none of a function."""
    names = ("queries", "action", "actions", "operation", "code", "arguments", "input")
    return {name: raw[name] for name in names if raw.get(name)}


def hosted_item(raw: Row, indicator: str) -> Row:
    """A call of a tool on the provider's side, such as a web search, as one of ChatKit's tasks.

    `raw` is the item of the Responses API: openai.types.responses has the types.
    """
    kind, action = raw["type"].removesuffix("_call"), raw.get("action") or {}
    if kind == "web_search":
        asked = action.get("queries") or [action.get(name) for name in ("query", "url", "pattern")]
        sources = [source_json("url", each["url"]) for each in action.get("sources") or [] if each.get("url")]
        return task_item(indicator, type=kind, queries=list(filter(None, asked)), sources=sources)
    if kind == "file_search":
        names = [result.get("filename") or result.get("file_id") for result in raw.get("results") or []]
        sources = [source_json("file", name) for name in dict.fromkeys(names)]
        return task_item(indicator, type="file", title=", ".join(raw.get("queries") or []), sources=sources)
    logs = [each.get("logs") for each in raw.get("outputs") or []]
    rest = {name: part for name, part in hosted_args(raw).items() if name != "code"}
    told = [raw.get("code"), *logs, rest and to_json(rest), raw.get("output"), raw.get("error")]
    content = "\n\n".join(code_block(str(text)) for text in told if text)
    title = raw.get("name") or kind.replace("_", " ").capitalize()
    return task_item(indicator, title=title, content=content)


# ---- what only ChatKit has a word for


def shown_item(row: Row, base: str) -> Row:
    """An item as it was given; but what waited for the person's side may have been overtaken."""
    item: Row = row["item"]
    if item.get("status") == "pending" and row["status"] != "pending":
        if item["type"] == "structured_input":
            return {**item, "status": "skipped"}
        return task_item("none", title=f"{item.get('name', 'The call')} was not answered")
    if row["role"] == "tool" and row["status"] not in ("streaming", "pending"):
        ended = item["task"]["status_indicator"].replace("loading", "none")
        return {**item, "task": {**item["task"], "status_indicator": ended}}
    image = item.get("image")
    if item["type"] == "generated_image" and image and str(image.get("url")).startswith("/attachments/"):
        return {**item, "image": {**image, "url": base + image["url"]}}
    return item


def item_text(item: Row) -> str:
    """The plain words of a thread item that somebody streams: searched, copied, and told to plain readers."""
    if item["type"] in ("assistant_message", "user_message"):
        return "".join(str(part.get("text", "")) for part in item.get("content") or [])
    workflow = item.get("workflow") or {"tasks": [item.get("task") or {}]}
    parts = [workflow.get("summary") or {}, *(workflow.get("tasks") or [])]
    texts = [str(part[name]) for part in parts for name in ("title", "content") if part.get(name)]
    return "\n".join(texts) or str(item.get("copy_text") or "")


def thought_item(text: str, seconds: int | None = None) -> Row:
    """A summary of the model's reasoning, which the model itself is not shown again."""
    indicator, summary = ("loading", None) if seconds is None else ("complete", {"duration": seconds})
    thought = {"type": "thought", "content": text, "status_indicator": indicator}
    workflow = filled(type="reasoning", tasks=[thought] if text else [], expanded=False, summary=summary)
    return {"type": "workflow", "workflow": workflow}


def pending_item(asked: ClientTool | Questions, call_id: str = "") -> Row:
    """What the person's side has to do: to answer questions, or a tool's work."""
    if isinstance(asked, Questions):
        return {"type": "structured_input", "status": "pending", "inputs": asked.inputs}
    return {"type": "client_tool_call", "status": "pending", "call_id": call_id, **vars(asked)}


def approval_question(call_id: str | None, name: str | None, args: Row) -> Row:
    """What the person is asked before a tool runs that needs their approval."""
    options = [{"value": f"{choice} {name}"} for choice in ("Approve", "Reject")]
    asked = {"type": "multiple_choice", "id": call_id, "question": f"Run {name} with {to_json(args)}?"}
    return {**asked, "options": options, "multiple": False}


def answered_item(item: Row, status: str, answers: dict[str, Row]) -> Row:
    """Questions with what the person answered: others are ignored, a single choice keeps the first."""
    inputs = []
    for question in item["inputs"]:
        given = answers.get(question["id"], {})
        values = [] if status == "skipped" or given.get("skipped") else given.get("values", [])
        if question["type"] == "multiple_choice" and not question.get("multiple"):
            values = values[:1]
        inputs.append({**question, "answer": {"values": values, "skipped": not values}})
    return {**item, "status": status, "inputs": inputs}


# ====================================================================================================== Files
# What a person attaches, as the model and as ChatKit see it.


async def with_files(store: Store, user_id: str, rows: list[Row], kind: str = "") -> list[Row]:
    """Rows whose `files` are the bytes of what is attached to them, by its id; `kind` may be "image/"."""
    attached = [file for row in rows for file in (row["item"] or {}).get("attachments") or []]
    ids = [file["id"] for file in attached if file["mime_type"].startswith(kind)]
    files = await store.attachment_data(user_id, ids) if ids else {}
    return [{**row, "files": files} for row in rows]


def file_input(file: Row, data: bytes) -> Row | None:
    """A file as the model is given it: an image, a PDF or a text; None for what is neither."""
    mime_type = file["mime_type"]
    if mime_type in ("image/png", "image/jpeg", "image/gif", "image/webp"):
        return {"type": "input_image", "image_url": data_url(mime_type, data), "detail": "auto"}
    if mime_type == "application/pdf":
        return {"type": "input_file", "filename": file["name"], "file_data": data_url(mime_type, data)}
    with contextlib.suppress(UnicodeDecodeError):
        if "\0" not in (text := data.decode()):
            name = to_json(file["name"])
            return input_text(f"The person attached the file {name}:\n<file>\n{text}\n</file>")
    return None


def attachment_json(file: Row, base: str, preview: bytes | None = None, *, upload: bool = False) -> Row:
    """An attachment; with `upload`, where its bytes are to be sent.

    The component's page is on https and may load no image from http: so it gets its bytes, the `preview`.
    """
    url = f"{base}/attachments/{file['id']}?key={file['key']}"
    attachment = {"id": file["id"], "name": file["name"], "mime_type": file["mime_type"], "type": "file"}
    if upload:
        attachment["upload_descriptor"] = {"url": url, "method": "POST", "headers": {}}
    if file["mime_type"].startswith("image/"):
        shown = data_url(file["mime_type"], preview) if preview and not base.startswith("https:") else url
        attachment |= {"type": "image", "preview_url": shown}
    return attachment


def data_url(mime_type: str, data: bytes) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"


# ======================================================================================================= Turn
# Answering one message, in a task of its own: what happens is written down and becomes events, and readers
# follow those. ChatKit's events are the protocol's, but that a stored item stands in them as its row:
# {"type": "thread.item.added", ".done" or ".replaced", "row": Row}. Ours are `thread`, `thinking`, `text`,
# `tool_call`, `tool_result`, `error` and `done`, as in the README. Both dialects are made of these.

Event = Row

SAVE_EVERY = 0.4  # seconds that text may be on a screen and not yet in the file
CHUNK = 1000  # events at once: a reader that stopped reading keeps so many in memory, not the whole answer
KEEP_ALIVE = 15.0  # seconds of silence after which proxies might close a stream
STOP_WITHIN = 1.0  # seconds that a stopped model or tool has to let go
ITEM_EVENTS = ("thread.item.added", "thread.item.done", "thread.item.replaced")
STOPPED = "The person stopped the answer above before it was complete. Do not go on with it unless they ask."
# What becomes of rows that were still growing when a turn ended, by the reason for which it was stopped.
ENDINGS = {None: "done", "cancelled": "cancelled", "deleted": "cancelled"}
ENDINGS |= {"timeout": "failed", "shutdown": "interrupted"}


def whole(work: T) -> T:
    """A method that a stop does not cut in two: what is in the file is told, too."""
    method = cast(Callable[..., Awaitable[Any]], work)
    return cast(T, functools.wraps(method)(lambda *given, **more: asyncio.shield(method(*given, **more))))


class Turn:
    """One answer being made, in a task of its own; it goes on whether anybody follows or not."""

    def __init__(self, chat: Chat, caller: Caller) -> None:
        self.chat = chat
        self.caller = caller
        self.id = secrets.token_hex(4)
        self.user_id = caller.user_id
        self.phase: Literal["working", "ending", "over"] = "working"
        self.reason: str | None = None  # a key of ENDINGS, where it was stopped
        self.events: list[Event] = []  # what happened so far; they end when `phase` is "over"
        self.news = asyncio.Event()  # set to have everybody who waits for events look again
        self.conversation: Row = {}
        self.conversation_id = 0  # until it has entered one
        self.user_message: Row = {}  # what it answers, if it is a message
        self.is_first = False  # whether that is all that the conversation holds
        self.model: str | None = None  # that the message asked for; None is the agent's own
        self.run: Run | None = None
        self.last_message_id: int | None = None
        self.draft: Draft | None = None  # what the model is saying
        self.opening = asyncio.Lock()  # it: tools speak side by side
        self.drafts: dict[int, Draft] = {}  # messages that are streamed from outside, by their rows' ids
        self.calls: dict[str, Row] = {}  # rows of what the model began and did not end, by call or item id
        self.row_ids: list[int] = []  # of the message, and of all that this turn stored
        self.growing: set[int] = set()  # those that are still to be done
        self.names: dict[str, int] = {}  # the rows of items, by the ids that those who streamed them made up
        self.shown = False  # something other than the model's text was
        self.keeping: Row = {}  # the thread as a tool left it, while that is being stored
        self._task: asyncio.Task[None] | None = None

    def enter(self, conversation: Row) -> None:
        """The conversation that it is in, known before anything else can happen."""
        self.conversation, self.conversation_id, caller = conversation, conversation["id"], self.caller
        place = (self.user_id, self.conversation_id, thread_of(conversation), self.chat.store)
        self.context = TurnContext(*place, self, caller.locale, caller.request_context)
        self.emit({"type": "thread", "thread_id": self.conversation_id, "title": conversation["title"]})

    # ---- events and those who follow them

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.news.set()

    def show(self, change: str, row: Row, update: Row | None = None) -> None:
        """Tell of a stored item; `change` is one of ITEM_EVENTS, or "thread.item.updated" by this update."""
        self.emit(filled(type=change, row=row, update=update))

    def update(self, row_id: int, kind: str, **parts: Any) -> None:
        """Tell how an item grows; `kind` and `parts` are one of the protocol's updates."""
        self.emit({"type": "thread.item.updated", "item_id": str(row_id), "update": {"type": kind, **parts}})

    async def follow(self) -> AsyncGenerator[list[Event], None]:
        """All its events, as they come; and none, after KEEP_ALIVE seconds of silence."""
        seen, loop = 0, asyncio.get_running_loop()
        while self.phase != "over" or seen < len(self.events):
            if seen == len(self.events):
                self.news.clear()
                timer = loop.call_later(KEEP_ALIVE, self.news.set)
                await self.news.wait()
                timer.cancel()
            events = self.events[seen : seen + CHUNK]
            seen += len(events)
            yield events

    # ---- its life

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Begin; `work` does what this turn is for."""
        self._task = asyncio.create_task(self._live(work), name=f"turn {self.conversation_id}")

    def stop(self, reason: str) -> None:
        """Have it end soon, with what it has; `reason` is one of ENDINGS. The first reason counts."""
        if self.reason or self.phase != "working":
            return
        self.reason, task = reason, self._task
        if self.run is not None:
            self.run.result.cancel()  # closes the model's connection; stream_events() ends without an error
        if task is not None:
            loop = asyncio.get_running_loop()
            loop.call_later(STOP_WITHIN, lambda: self.phase == "working" and task.cancel())

    async def wait(self) -> None:
        """Until it has ended; or, once it is stopped, until it is clear that its agent does not let go."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=3 * STOP_WITHIN if self.reason else None)
            if self.phase != "working":
                await asyncio.wait([self._task])

    async def _live(self, work: Callable[[], Awaitable[None]]) -> None:
        began, failure = time.monotonic(), None
        timer = asyncio.get_running_loop().call_later(self.chat.settings.turn_timeout, self.stop, "timeout")
        try:
            if self.reason is None:
                await work()
                await self.context.end_workflow()
                await self.keep_thread()
        except asyncio.CancelledError:
            self.reason = self.reason or "shutdown"  # the event loop itself is closing
        except BaseException as raised:  # whatever it is, the turn has to end
            failure = raised
        self.phase = "ending"
        timer.cancel()
        try:
            error = await self._put_away(failure)
        except Exception as unsaved:  # readers must not wait for ever, whatever happened
            self.chat.log_failure(f"thread {self.conversation_id}: the answer could not be saved", unsaved)
            error = explain(unsaved)
        # From here to the end nothing waits: whoever reads `done` can send the next message at once.
        self.chat.forget(self)
        if error is not None:
            self.emit({"type": "error", **error})
        status = "failed" if error else "cancelled" if self.reason else "completed"
        usage = self.run.result.context_wrapper.usage if self.run else Usage()
        tokens = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
        done = {"type": "done", "status": status, "thread_id": self.conversation_id}
        self.emit({**done, "message_id": self.last_message_id, "usage": tokens})
        self.phase = "over"
        how = f"{status} ({error['code']})" if error else status
        model, seconds = self.model or self.chat.agents.model_name, time.monotonic() - began
        facts = (printable(self.user_id), self.conversation_id, model, *tokens.values(), seconds, how)
        log.info("turn user=%s thread=%d model=%s in=%d out=%d %.2fs %s", *facts)
        if isinstance(failure, KeyboardInterrupt):
            raise failure

    async def _put_away(self, failure: BaseException | None) -> Row | None:
        """Leave nothing half-written: what was growing, tools that ran. Returns why it failed."""
        status = ENDINGS[self.reason]
        error = reason_json(self.reason) if self.reason in REASONS else None
        if failure is not None and self.reason is None:
            status = "blocked" if isinstance(failure, InputGuardrailTripwireTriggered) else "failed"
            error = await self._explain(failure)
        for draft in filter(None, [self.draft, *self.drafts.values()]):
            await draft.close(status)
        if status != "done":
            end = self.chat.store.end_messages
            for row in await patiently(end, self.user_id, self.row_ids, status, error):
                if row["id"] in self.growing:
                    self.show("thread.item.done", row)
        if self.reason == "cancelled" and (self.user_message or self.run):  # an action is no answer
            await self.add_row("system", content=STOPPED)
        return error

    async def _explain(self, failure: BaseException) -> Row:
        """What a failure means for the person, and for what was said before it."""
        self.chat.log_failure(f"thread {self.conversation_id}: the turn failed", failure)
        self.chat.agents.doubt()
        error, item = explain(failure), self.user_message.get("item") or {}
        if error["code"] == "refused" and item.get("attachments"):
            error["message"] = "The model's provider refused the request, perhaps for the attached files."
        if isinstance(failure, OutputGuardrailTripwireTriggered) and self.run is not None:
            await self.remove_rows(self.run.final_rows)
        return error

    # ---- what it is for

    def answer(self, message: Row, *, is_first: bool = False, resume: tuple[Row, Row] | None = None) -> None:
        """Have the agent answer a message, before which there is nothing where it `is_first`; or go on with
        its answer, see speak()."""
        self.user_message, self.is_first, self.row_ids = message, is_first, [message["id"]]
        options = (message["item"] or {}).get("inference_options") or {}
        self.model = self.chat.agents.choices.get(options.get("model") or "")
        self.context.tool_choice = (options.get("tool_choice") or {}).get("id")
        self.start(functools.partial(speak, self, resume))

    async def keep_thread(self) -> None:
        """Store what a tool changed of the conversation, and tell the readers."""
        thread = self.context.thread
        status = json_copy({"type": thread.status} if isinstance(thread.status, str) else thread.status)
        if replace(thread, status=status) == thread_of(self.conversation):
            return
        if status.get("type") not in ("active", "locked", "closed"):
            vars(thread).update(vars(thread_of(self.conversation)))
            raise ValueError("a conversation is active, locked or closed")
        changes = {"title": str(thread.title).strip()[:200], "metadata": json_copy(thread.metadata)}
        changes |= {"status": status["type"], "status_reason": status.get("reason")}
        self.keeping = copy.deepcopy(vars(thread))
        await self.chat.change_conversation(self.user_id, self.conversation_id, **changes)

    def thread_changed(self, conversation: Row) -> None:
        """Somebody renamed, locked or annotated the conversation, this turn or another reader."""
        known, now = self.keeping or vars(thread_of(self.conversation)), vars(self.context.thread)
        self.conversation, self.keeping = conversation, {}
        # What a tool has changed since then stays.
        now.update({key: new for key, new in vars(thread_of(conversation)).items() if now[key] == known[key]})
        self.emit({"type": "thread.updated", "conversation": conversation})

    # ---- rows

    @whole
    async def add_row(self, role: str, change: str | None = None, **columns: Any) -> Row:
        """A new item of the conversation; readers are told if `change` is one of ITEM_EVENTS.

        Raises LookupError where the conversation was deleted.
        """
        place = (self.user_id, self.conversation_id)
        row = await patiently(self.chat.store.add_message, *place, role=role, **columns)
        if row is None:
            raise LookupError("the conversation was deleted")
        self.row_ids.append(row["id"])
        if row["status"] == "streaming":
            self.growing.add(row["id"])
        if change is not None:
            self.show(change, row)
        return row

    @whole
    async def change_row(
        self, row_id: int, change: str = "thread.item.done", update: Row | None = None, **columns: Any
    ) -> None:
        """An item becomes something else, and readers are told, see show()."""
        row = await patiently(self.chat.store.update_message, self.user_id, row_id, **columns)
        if row is not None:
            if row["status"] != "streaming":
                self.growing.discard(row_id)
            self.show(change, row, update)

    async def find_row(self, item_id: Any) -> Row:
        """The row of an item, by its id or by what somebody made up for it. Raises LookupError."""
        row_id = self.names.get(str(item_id)) or as_row_id(item_id)
        row = await self.chat.store.message(self.user_id, self.conversation_id, row_id or 0)
        if row is None:
            raise LookupError(f"there is no item {item_id} in this conversation")
        return row

    async def remove_rows(self, row_ids: list[int]) -> None:
        removed = await self.chat.store.delete_messages(self.user_id, self.conversation_id, row_ids)
        self.row_ids = [row_id for row_id in self.row_ids if row_id not in removed]
        if self.last_message_id in removed:
            self.last_message_id = None
        for row_id in removed:
            self.drafts.pop(row_id, None)
            self.emit({"type": "thread.item.removed", "item_id": str(row_id)})

    async def show_picture(self, row: Row, url: str, **columns: Any) -> None:
        """The row's item becomes a picture."""
        item = {"type": "generated_image", "image": await self.image_json(row["id"], url)}
        await self.change_row(row["id"], item=item, status="done", **columns)

    async def image_json(self, row_id: int, url: str) -> Row:
        """No item and no event carries a picture's bytes: they become a file at a URL of ours."""
        if not url.startswith("data:"):
            return {"id": f"image_{row_id}", "url": url}
        data = base64.b64decode(url.partition("base64,")[2])
        kind = next((kind for start, kind in PICTURES.items() if data.startswith(start)), "image/png")
        file = await self.chat.store.add_picture(self.user_id, row_id, kind, data)
        return {"id": file["id"], "url": f"/attachments/{file['id']}?key={file['key']}"}


PICTURES = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


def thread_of(conversation: Row) -> Thread:
    """A conversation as a tool has it."""
    metadata = json_copy(conversation["metadata"])
    return Thread(str(conversation["id"]), conversation["title"], metadata, status_json(conversation))


def status_json(conversation: Row) -> Row:
    """A conversation's status as ChatKit has it. The component needs a reason to disable its composer."""
    status = {"type": conversation["status"]}
    if conversation["status"] != "active":
        status["reason"] = conversation["status_reason"] or f"It is {conversation['status']}."
    return status


def printable(text: str) -> str:
    """For the log, where a line break in a name would forge a line."""
    return text if text.isprintable() else repr(text)


# ================================================================================================== Answering
# From the message to the agent's run: what the model is shown, and the SDK's items as they are kept.


async def speak(turn: Turn, resume: tuple[Row, Row] | None = None) -> None:
    """Have the agent answer what the conversation holds.

    Or go on where its tools waited for approval: `resume` is the run's state, and the item with the answers.
    """
    agents = turn.chat.agents
    await close_draft(turn)  # of an action that has the agent speak
    if resume is None and not turn.is_first:  # what the person's side did not give is not waited for any more
        for row in await turn.chat.store.end_unfinished(turn.user_id, turn.conversation_id):
            turn.show("thread.item.replaced", row)
    turn.emit({"type": "thinking", "content": ""})
    if agents.generator is not None:
        return await say_parts(turn, agents.generator(turn.context, await history(turn, hosted=False)))
    agent = await agents.agent_for(turn, first=resume is not None)
    if resume is None:
        hosted = isinstance(agents.models.get_model(turn.model or agent.model), OpenAIResponsesModel)
        source: Any = await history(turn, hosted)
    else:
        source = await resumed(turn, agent, *resume)
    if turn.reason is None:
        turn.run = Run(turn, agent, source)
        await turn.run.follow()


async def say_parts(turn: Turn, parts: AsyncGenerator[Any, None]) -> None:
    """Say what a generator yields: text, or events."""
    async with contextlib.aclosing(parts):
        async for part in parts:
            if turn.reason:
                return  # how it ended is still to be said
            await (say_more(turn, "assistant", part) if isinstance(part, str) else turn.context.stream(part))
    await close_draft(turn)


async def history(turn: Turn, hosted: bool) -> list[Row]:
    """What the model is shown of the conversation."""
    store, limit = turn.chat.store, turn.chat.settings.history_limit
    rows = [turn.user_message]
    if not turn.is_first:
        rows = await store.history(turn.user_id, turn.conversation_id, limit)
    return model_input(await with_files(store, turn.user_id, rows), hosted)


async def resumed(turn: Turn, agent: Agent[Any], state: Row, item: Row) -> RunState[Any]:
    """A run whose tools waited for approval, as the person decided in `item`."""
    for row in await turn.chat.store.pending_messages(turn.user_id, turn.conversation_id):
        if row["role"] == "tool":
            turn.calls[row["tool_calls"][0]["id"]] = row
            turn.row_ids.append(row["id"])
            turn.growing.add(row["id"])
            await turn.chat.store.update_message(turn.user_id, row["id"], status="streaming")
    context = RunContextWrapper(turn.context)
    try:
        run_state = await RunState.from_json(agent, state, context_override=context)
    except UserError as error:
        raise Refused(409, "The agent that asked for this is not here any more") from error
    context.usage = Usage()  # what was used before is told already
    answers = {question["id"]: question["answer"]["values"] for question in item["inputs"]}
    for asked in run_state.get_interruptions():
        said = (answers.get(asked.call_id) or ["Reject"])[0]  # one of the options, or words of their own
        if said.lower().startswith("approve"):
            run_state.approve(asked)
        else:
            words = "" if said.startswith("Reject") else f" They said: {said}"
            run_state.reject(asked, rejection_message=f"The person rejected this call.{words}")
    return run_state


def input_of(raw: Any) -> Row:
    """An item of the SDK's as input, without its id: OpenAI would look for the reasoning behind that."""
    given = raw if isinstance(raw, dict) else raw.model_dump(mode="json", exclude_unset=True)
    return {name: part for name, part in json_copy(given).items() if name not in ("id", "created_by")}


def is_hosted(item: Any) -> bool:
    """Whether it is the call of a tool on the provider's side, as openai.types.responses has them."""
    kind = str(getattr(item, "type", ""))
    return kind.endswith("_call") and kind != "function_call"


def json_value(text: Any) -> Any:
    """A tool's result, decoded where it is a JSON object or array."""
    if isinstance(text, str) and text[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            return json_copy(from_json(text))
    return text


def json_object(text: str | None) -> Row:
    """A tool call's arguments, empty where they are not a JSON object."""
    value = json_value(text)
    return value if isinstance(value, dict) else {}


def tool_text(output: Any, parts: Any) -> str:
    """A tool's output in words; `parts` is what the SDK made of it, a list where there may be pictures."""
    if isinstance(parts, dict):
        return ""  # a screenshot
    if isinstance(parts, list) and all("type" in part for part in parts):
        return "\n".join(part["text"] for part in parts if part.get("type") == "input_text")
    if isinstance(output, str):
        return output
    if hasattr(output, "model_dump"):
        output = output.model_dump(mode="json")
    return "" if output is None else json.dumps(output, ensure_ascii=False, default=str)


# ======================================================================================================== Run
# What the Agents SDK reports becomes rows and events. It is taken at two places: text, calls, and what a
# provider's own tools do, from the model's raw events, which come in order; results and handoffs from the
# runner's items.


class Run(RunHooks[TurnContext]):
    """One run of an agent within a turn, from a history or a state; it begins at once."""

    def __init__(self, turn: Turn, agent: Agent[Any], source: Any) -> None:
        self.turn = turn
        self.agent = agent
        config, most = turn.chat.agents.run_configs[turn.model], turn.chat.settings.max_steps
        told: Any = {"context": turn.context, "hooks": self, "max_turns": most, "run_config": config}
        self.result = Runner.run_streamed(agent, source, **told)
        self.final_rows: list[int] = []  # messages since the last result of a tool
        self._itemized = False  # the model's response told of its items as they were done
        self._streamed = False  # the message that comes next was said in deltas
        self._reasons_since = 0.0  # when the model began to; what it thought comes later
        self._handoffs: list[str] = []  # ids of calls that hand over
        self._idle = asyncio.Event()  # set while all that the model said so far has been dealt with
        self._idle.set()

    async def follow(self) -> None:
        """What the SDK reports becomes rows and events, until the run's end."""
        turn, run = self.turn, self.result
        try:
            events: Any = run.stream_events()
            async with contextlib.aclosing(events), self._cancelled_by_failure():
                async for event in events:
                    self._idle.clear()
                    if event.type == "run_item_stream_event":
                        await self._take_item(event.name, event.item)
                    elif event.type == "agent_updated_stream_event":
                        await self._take_agent(event.new_agent)
                    elif event.data.type == "response.output_text.delta":  # the hot path: one a token
                        await self._say(event.data.delta)
                    else:
                        await self._take_raw(event.data)
                    self._idle.set()
                    if error := run.run_loop_exception:  # or it is raised ahead of the deltas before it
                        _mark_error_to_drain_stream_events(error)
        finally:
            self._idle.set()
        if turn.reason is None:
            await close_draft(turn)
            await self._conclude(run)

    @contextlib.asynccontextmanager
    async def _cancelled_by_failure(self) -> AsyncIterator[None]:
        """Where an event cannot be dealt with, the run must end first: its tools wait until all is."""
        try:
            yield
        except BaseException:
            self.result.cancel()
            raise

    # ---- from the model's raw events

    async def _say(self, text: str) -> None:
        draft = self.turn.draft
        if draft is not None and draft.role == "assistant":
            draft.add(text)
        elif text:
            is_json = self.result.current_agent.output_type not in (None, str)
            is_json = is_json and text.lstrip()[:1] in ("{", "[")
            draft = await say_more(self.turn, "assistant", JSON_FENCE + text if is_json else text)
            draft.fenced, self._streamed = is_json, True
            self.final_rows.append(draft.id)

    async def _take_raw(self, data: Any) -> None:
        """What a model's response says beside its text."""
        turn, kind = self.turn, data.type
        if kind == "response.output_item.added" and is_hosted(data.item):
            await self._begin_hosted(data.item)
        elif kind == "response.output_item.added" and data.item.type == "reasoning":
            self._reasons_since = time.monotonic()
        elif kind == "response.output_item.done":
            self._itemized = True
            await self._take_output(data.item)
        elif kind == "response.output_text.annotation.added" and turn.draft is not None:
            if annotation := annotation_json(data.annotation):
                turn.draft.annotate(annotation)
        elif kind == "response.refusal.delta":
            await self._say(data.delta)
        elif kind in ("response.reasoning_summary_text.delta", "response.reasoning_text.delta"):
            draft = await say_more(turn, "item", data.delta)
            draft.began = self._reasons_since or draft.began
        elif kind == "response.reasoning_summary_part.added" and turn.draft is not None and turn.draft.text:
            await say_more(turn, "item", "\n\n")
        elif kind == "response.image_generation_call.partial_image" and data.item_id in turn.calls:
            row = turn.calls[data.item_id]
            image = await turn.image_json(row["id"], f"data:;base64,{data.partial_image_b64}")
            item = {"type": "generated_image", "image": image}
            await turn.change_row(row["id"], "thread.item.updated", item=item)
        elif kind == "response.completed":
            if not self._itemized:  # a model that streams nothing but its end
                for item in data.response.output:
                    await self._take_output(item)
            self._itemized = False
            await close_draft(turn)

    async def _take_output(self, item: Any) -> None:
        """One item of the model's response is complete."""
        kind = getattr(item, "type", "")
        if kind == "message":
            if not self._streamed:
                parts = [getattr(part, "text", "") or getattr(part, "refusal", "") for part in item.content]
                await self._say("".join(parts))
            self._streamed = False
            await close_draft(self.turn)
        elif kind == "function_call":
            await self._begin_call(input_of(item))
        elif is_hosted(item):
            await self._end_hosted(item)
        elif kind.endswith("_output"):  # of such a call; the runner will tell it again, after the message
            result = input_of(item)
            await self._take_result(result.get("output"), result)

    async def _begin_call(self, call: Row) -> None:
        """A tool call, as an input item.

        The calls of one response stay together in the first one's row, in front of all outputs: Gemini
        signs only the first of a response.
        """
        args = json_object(call["arguments"])
        if not args:  # perhaps half of them, which providers would refuse ever after
            call["arguments"] = "{}"
        first = next((row for row in self.turn.calls.values() if row["input"]), None)
        if first is not None:
            first["input"].append(call)
            await self.turn.chat.store.update_message(self.turn.user_id, first["id"], input=first["input"])
        told = {"id": call["call_id"], "name": call["name"], "args": args}
        await self._begin(call["call_id"], tool_calls=[told], input=None if first else [call])

    async def _begin(self, call_id: str, role: str = "tool", **columns: Any) -> Row:
        """What the model calls or makes gets a row, which turn.calls has until it is done."""
        turn = self.turn
        await close_draft(turn)
        row = turn.calls[call_id] = await turn.add_row(role, status="streaming", **columns)
        for call in row["tool_calls"] or []:
            turn.emit({"type": "tool_call", **call})
        turn.show("thread.item.added", row)
        return row

    async def _end(self, row: Row, text: str, **columns: Any) -> None:
        """A tool's result."""
        call = row["tool_calls"][0]
        result = {"id": call["id"], "name": call["name"], "result": json_value(text)}
        self.turn.emit({"type": "tool_result", **result})
        await self.turn.change_row(row["id"], content=text, status="done", **columns)

    async def _begin_hosted(self, item: Any) -> Row:
        """A call of a tool on the provider's side, such as a web search, or a picture being made."""
        raw, call_id = input_of(item), str(item.id)
        if raw["type"] == "image_generation_call":
            self.turn.shown = True
            return await self._begin(call_id, "item", item={"type": "generated_image"}, input=[])
        call = {
            "id": raw.get("call_id") or call_id,
            "name": raw.get("name") or raw["type"].removesuffix("_call"),
        }
        call["args"] = hosted_args(raw)
        return await self._begin(call_id, tool_calls=[call], item=hosted_item(raw, "loading"), input=[])

    async def _end_hosted(self, item: Any) -> None:
        """The call is whole, and done, but for what this program does, such as moving a mouse."""
        turn, raw, item_id = self.turn, input_of(item), str(item.id)
        row = turn.calls.get(item_id) or await self._begin_hosted(item)
        if raw["type"] == "image_generation_call" and not item.result:
            return
        del turn.calls[item_id]
        if raw["type"] == "image_generation_call":
            text = str(raw.get("revised_prompt") or "")
            return await turn.show_picture(row, f"data:;base64,{item.result}", content=text, input=[raw])
        if call_id := raw.get("call_id"):  # its output is still to come, perhaps once the person approves
            called = [{**row["tool_calls"][0], "args": hosted_args(raw)}]
            columns: Row = {"item": hosted_item(raw, "loading"), "input": [raw], "tool_calls": called}
            turn.calls[call_id] = row | columns
            return await turn.change_row(row["id"], "thread.item.replaced", **columns)
        logs = [str(output["logs"]) for output in raw.get("outputs") or [] if output.get("logs")]
        text = "\n".join(filter(None, [*logs, str(raw.get("output") or "")]))
        await self._end(row, text, item=hosted_item(raw, "complete"), input=[raw])

    # ---- from the runner's items

    async def _take_item(self, name: str, item: Any) -> None:
        if name == "handoff_requested":
            self._handoffs.append(item.raw_item.call_id)
        elif name in ("tool_output", "handoff_occured"):  # the SDK's spelling
            result = input_of(item.to_input_item())
            await self._take_result(getattr(item, "output", result.get("output")), result)

    async def _take_agent(self, agent: Agent[Any]) -> None:
        """Another agent goes on. A handoff whose input filter dropped it is not reported otherwise."""
        turn = self.turn
        if agent.name != (turn.conversation["agent"] or self.agent.name):
            turn.conversation["agent"] = agent.name
            keep = turn.chat.store.update_conversation
            await patiently(keep, turn.user_id, turn.conversation_id, agent=agent.name)
        text = to_json({"assistant": agent.name})
        for call_id in self._handoffs:
            answer = {"type": "function_call_output", "call_id": call_id, "output": text}
            await self._take_result(text, answer)
        self._handoffs.clear()

    async def _take_result(self, output: Any, result: Row) -> None:
        """A tool's result, `result` being its input item; or what is left to the person's side."""
        turn, call_id = self.turn, str(result.get("call_id"))
        await close_draft(turn)  # what the tool said is a message of its own
        row = turn.calls.pop(call_id, None)
        if row is None:
            return
        self.final_rows.clear()
        if isinstance(output, (ClientTool, Questions)):
            turn.shown, item = True, pending_item(output, call_id)
            waiting: Row = {"role": "item", "status": "pending", "item": item, "input": row["input"]}
            return await turn.change_row(row["id"], **waiting)
        parts = result.get("output")
        text = storable(tool_text(output, parts))
        done = {"item": hosted_item({**row["input"][0], "output": text}, "complete")} if row["item"] else {}
        await self._end(row, text, input=[*(row["input"] or []), result], **done)
        for part in parts if isinstance(parts, list) else []:
            if part.get("type") == "input_image" and part.get("image_url"):
                columns: Row = {"item": {"type": "generated_image"}, "input": [], "status": "streaming"}
                await turn.show_picture(await turn.add_row("item", **columns), part["image_url"])

    # ---- its end

    async def _conclude(self, run: RunResultStreaming) -> None:
        """A run may end without a message: for approvals, on a tool's output, or silently."""
        if run.interruptions:
            return await self._ask_approval(run)
        for row in self.turn.calls.values():  # calls that nobody answers
            await self.turn.change_row(row["id"], status="done")
        if not self.final_rows and not self.turn.shown:
            if not any(item.type == "function_call" for item in run.raw_responses[-1].output):
                raise Failure("empty")
            output = run.final_output or ""  # a tool's, which is the answer then
            text = output if isinstance(output, str) else code_block(tool_text(output, None), "json")
            if text.strip() not in ("", "None"):  # which the SDK makes of None
                await say(self.turn, text)

    async def _ask_approval(self, run: RunResultStreaming) -> None:
        """The turn ends here; what the person says goes on from the run's state, also after a restart."""
        turn, calls = self.turn, run.interruptions
        for row in turn.calls.values():
            await turn.change_row(row["id"], "thread.item.added", status="pending", input=row["input"])
        asked = []
        for call in calls:
            raw = input_of(call.raw_item)
            args = json_object(call.arguments) if raw["type"] == "function_call" else hosted_args(raw)
            asked.append(approval_question(call.call_id, call.tool_name, args))
        text, item = "\n".join(each["question"] for each in asked), pending_item(Questions(asked))
        state = {"run_state": run.to_state().to_json(context_serializer=lambda context: {})}
        await turn.add_row("item", "thread.item.done", content=text, item=item, input=state, status="pending")

    # ---- the SDK's hooks

    async def on_tool_start(self, *_: Any) -> None:
        """It waits until all that the model said has been dealt with: what a tool shows comes after that."""
        while not self._idle.is_set():
            await self._idle.wait()

    async def on_tool_end(self, context: Any, agent: Any, tool: Any, result: object) -> None:
        await self.turn.keep_thread()
        if isinstance(result, (ClientTool, Questions)):
            self.result.cancel(mode="after_turn")


# ===================================================================================================== Saying
# What a turn says: texts that grow, and what tools, actions and generators stream.

JSON_FENCE = "```json\n"


async def say_more(turn: Turn, role: str, text: str) -> Draft:
    """More of the message or the thought that is open, or else a new one."""
    async with turn.opening:
        if turn.draft is not None and turn.draft.role == role:
            turn.draft.add(text)
        else:
            await close_draft(turn)
            turn.draft = await Draft.open(turn, role, text)
        return turn.draft


async def close_draft(turn: Turn) -> None:
    if turn.draft is not None:
        await turn.draft.close()


async def say(turn: Turn, text: str, annotations: Sequence[Row] = ()) -> int:
    """A whole assistant message, beside whatever the model says; its item id comes back."""
    draft = await Draft.open(turn, "assistant", text)
    await draft.complete(text, annotations)
    turn.shown = True
    return draft.id


def storable(text: str) -> str:
    """Text without halves of characters, which nobody can encode."""
    return text if text.isascii() else text.encode(errors="replace").decode()


@dataclass(eq=False)
class Draft:
    """A message or a thought that still grows; the Chat keeps the file at most SAVE_EVERY behind."""

    turn: Turn
    role: str
    id: int
    parts: list[str] = field(default_factory=list)
    annotations: list[Row] = field(default_factory=list)
    fenced: bool = False  # it is JSON, and stands in a code block
    began: float = field(default_factory=time.monotonic)

    @classmethod
    async def open(cls, turn: Turn, role: str, text: str) -> Draft:
        """It begins with `text`. Its id is ours: most models give none."""
        if role == "assistant":
            await turn.context.end_workflow()
        columns: Row = {"content": storable(text), "status": "streaming"}
        columns |= {"item": thought_item(""), "input": []} if role == "item" else {}
        row = await turn.add_row(role, "thread.item.added", **columns)
        draft = cls(turn, role, row["id"])
        if role == "assistant":
            turn.last_message_id = draft.id
            draft._tell("added", content=output_text(""))
        draft.add(text)
        return draft

    @property
    def text(self) -> str:
        self.parts = ["".join(self.parts)]
        return self.parts[0]

    def add(self, delta: str) -> None:
        """The hot path: once for each token."""
        if not delta:
            return
        turn, delta = self.turn, storable(delta)
        self.parts.append(delta)
        turn.chat.unsaved.add(self)
        if self.role == "assistant":
            turn.emit({"type": "text", "content": delta, "message_id": self.id})
        else:
            turn.emit({"type": "thinking", "content": delta, "draft": self})

    def take(self, update: Row) -> None:
        """What an update of the protocol adds; the rest of them tells what this tells itself."""
        if update.get("type") == "assistant_message.content_part.text_delta":
            self.add(update.get("delta", ""))
        elif update.get("type") == "assistant_message.content_part.annotation_added":
            self.annotate(update["annotation"])

    async def complete(self, text: str, annotations: Sequence[Row]) -> None:
        """The final row, of which some may have been told."""
        told = self.text
        if text.startswith(told):
            self.add(text.removeprefix(told))
        else:
            self.parts = [text]
        for annotation in annotations[len(self.annotations) :]:
            self.annotate(annotation)
        await self.close()

    def annotate(self, annotation: Row) -> None:
        self._tell("annotation_added", annotation_index=len(self.annotations), annotation=annotation)
        self.annotations.append(annotation)

    def _tell(self, change: str, **parts: Any) -> None:
        self.turn.update(self.id, f"assistant_message.content_part.{change}", content_index=0, **parts)

    async def close(self, status: str = "done") -> None:
        """The final row. Raises sqlite3.Error or StoreError."""
        turn = self.turn
        columns: Row = {"status": status}
        if turn.draft is self:
            turn.draft = None
        if self.fenced:
            columns["input"] = [{"role": "assistant", "content": self.text.removeprefix(JSON_FENCE)}]
            self.add("\n```")
        turn.chat.unsaved.discard(self)
        if self.role == "item":
            columns["item"] = thought_item(self.text, round(time.monotonic() - self.began))
        else:
            content = output_text(self.text, self.annotations)
            self._tell("done", content=content)
            if self.annotations:
                columns["item"] = {"type": "assistant_message", "content": [content]}
        await turn.change_row(self.id, content=self.text, **columns)


# The text that an event from outside must have, by its type.
TEXTS = {"text": "content", "thinking": "content", "notice": "message"}
TEXTS |= {"progress_update": "text", "client_effect": "name"}
NOTICES = ("info", "warning", "danger")


async def take(turn: Turn, event: Event) -> None:
    """An event from outside, ids made up there becoming those of rows. Raises ValueError for what is none."""
    kind = event.get("type") if isinstance(event, dict) else None
    if not isinstance(kind, str) or kind in ("thread", "tool_call", "tool_result", "done"):  # a forged answer
        raise ValueError(f"an event of type {kind!r} cannot be streamed from outside")
    text = event.get(TEXTS.get(kind, "type"))
    if not isinstance(text, str) or (kind == "notice" and event.get("level") not in NOTICES):
        raise ValueError(f"this is no event of type {kind!r}: {to_json(event)[:200]}")
    if kind in ("text", "thinking"):
        await say_more(turn, "assistant" if kind == "text" else "item", text)
    elif kind in ITEM_EVENTS or kind == "item":
        await close_draft(turn)
        await _take_item(turn, "thread.item.done" if kind == "item" else kind, event["item"])
    elif kind == "thread.item.removed":
        await turn.context.remove(event["item_id"])
    elif kind == "thread.item.updated":
        item_id, update = str(event.get("item_id")), event.get("update")
        if not isinstance(update, dict) or not isinstance(update.get("delta", ""), str):
            raise ValueError(f"this is no update: {to_json(event)[:200]}")
        row_id = turn.names.get(item_id) or (await turn.find_row(item_id))["id"]
        if draft := turn.drafts.get(row_id):
            draft.take(update)
        else:
            turn.emit({**event, "item_id": str(row_id)})
    elif kind == "thread.updated":
        thread, given = turn.context.thread, event["thread"]
        thread.title = given.get("title") or thread.title
        thread.status, thread.metadata = given["status"], given.get("metadata", {})
        await turn.keep_thread()
    elif kind == "progress":
        await turn.context.progress(event.get("content", ""), event.get("icon"))
    elif kind == "effect":
        await turn.context.effect(event["name"], event.get("data"))
    else:
        turn.emit(event)


# The roles of items that are streamed; all others have the role `item`.
ITEM_ROLES = {"assistant_message": "assistant", "user_message": "user"}
ITEM_ROLES |= {"hidden_context_item": "system", "sdk_hidden_context": "system"}


async def _take_item(turn: Turn, change: str, given: Row) -> None:
    """An item that begins to grow, is done, or was replaced: it gets a row, or changes the one it has."""
    made_up = str(given.get("id") or secrets.token_hex(8))
    item = {name: part for name, part in given.items() if name not in ("id", "thread_id", "created_at")}
    role, text, known = ITEM_ROLES.get(item["type"], "item"), item_text(item), turn.names.get(made_up)
    if role == "system":
        return await turn.context.hidden(str(item.get("content", "")))
    turn.shown = True
    if known is None and change == "thread.item.replaced":
        known = (await turn.find_row(made_up))["id"]
    if role == "assistant" and known is None:
        known = turn.names[made_up] = (begun := await Draft.open(turn, role, text)).id
        turn.drafts[known] = begun
    draft = turn.drafts.get(known or 0)
    if draft is not None and change == "thread.item.added":
        return
    if draft is not None:
        del turn.drafts[draft.id]
        if role == "assistant" and len(item.get("content") or []) < 2:
            return await draft.complete(text, annotations_of(item))
        turn.chat.unsaved.discard(draft)  # it becomes what a text cannot be
    final = "pending" if item.get("status") == "pending" else "done"
    columns: Row = {
        "content": text,
        "item": item,
        "status": "streaming" if change == ITEM_EVENTS[0] else final,
    }
    if known is None:
        turn.names[made_up] = (await turn.add_row(role, change, **columns))["id"]
    else:
        await turn.change_row(known, change, **columns)


# ===================================================================================================== Agents
# Who answers: an agent, a function that makes one, or a generator; its MCP servers, and what a run is told.

AnswerGenerator = Callable[[TurnContext, list[Row]], AsyncGenerator[Any, None]]
AgentSource = Agent[Any] | Callable[..., Any] | None
Transcriber = Callable[[bytes, str], Awaitable[str]]  # audio and its media type, such as "audio/webm"
ActionHandler = Callable[[TurnContext, Row, Row | None], Any]  # a coroutine, or an async generator
FeedbackHandler = Callable[[TurnContext, list[Row], str], Awaitable[None]]

# What OpenAI says of what its own tools did only if one asks for it.
INCLUDED = {"web_search": "web_search_call.action.sources"}
INCLUDED |= {"code_interpreter": "code_interpreter_call.outputs"}


class Agents:
    """What an app was given as its agent; the to-do assistant where that is nothing."""

    def __init__(self, models: Models, source: AgentSource) -> None:
        """Raises SettingsError where a model that is named cannot work: now, not at the first message."""
        self.models = models
        self.generator: AnswerGenerator | None = source if inspect.isasyncgenfunction(source) else None
        self._source: Any = todo_agent() if source is None else source
        self.graph = agents_within(self._source) if isinstance(self._source, Agent) else []
        self._connected: dict[MCPServer, MCPServerManager] = {}
        self._used: dict[MCPServer, float] = {}  # when an answer that may use it last began
        self._connecting = asyncio.Lock()
        self.in_doubt: set[MCPServer] = set()  # an answer failed, perhaps for one that went away
        used = [] if self.generator else [agent.model for agent in self.graph] or [None]
        for model in [*models.settings.models.values(), *used]:
            models.get_model(model)
        named = getattr(self.generator, "__name__", "generator")
        self.model_name = named if self.generator else models.name_of(used[0])
        self.offered = list(dict.fromkeys([self.model_name, *models.settings.models]))
        # What a message may ask for; None is the agent's own model.
        self.choices = {models.default: models.default, self.model_name: None, **models.settings.models}
        # By the model that a message asks for. Making one takes as long as all else before the model.
        self.run_configs = {
            model: RunConfig(
                model=model,
                model_provider=models,
                model_settings=ModelSettings(include_usage=True),  # or chat completions say nothing of it
                tracing_disabled=not models.settings.tracing,
                tool_not_found_behavior="return_error_to_model",
                tool_error_formatter=told_of_failure,
            )
            for model in {None, *self.choices.values()}
        }

    def tools(self) -> dict[str, str]:
        """What a message may choose, and what it does: the tools of all agents that there are."""
        return {tool.name: getattr(tool, "description", "") for agent in self.graph for tool in agent.tools}

    async def close(self) -> None:
        await self._disconnect([*self._connected])

    async def prepare(self, graph: list[Agent[Any]]) -> None:
        """Connect MCP servers that are not, and keep tools from ending the process."""
        async with self._connecting:
            servers, now = {server for agent in graph for server in agent.mcp_servers}, time.monotonic()
            self._used |= dict.fromkeys(servers, now)
            if not self.graph:  # a function may make some anew for each answer, and none lasts so long
                longest = self.models.settings.turn_timeout
                await self._disconnect([each for each in self._connected if now - self._used[each] > longest])
            managers = {server: MCPServerManager([server]) for server in servers - self._connected.keys()}
            await asyncio.gather(*(manager.connect_all() for manager in managers.values()))
            self._connected |= managers
            for server, manager in managers.items():
                if error := manager.errors.get(server):
                    await self._disconnect([server])
                    text = "The agent goes without the MCP server %r: %s"
                    log.warning(text, server.name, str(error) or repr(error))
        foreign = self.models.default != get_default_model()
        for agent in graph:
            included: Any = [INCLUDED[tool.name] for tool in agent.tools if tool.name in INCLUDED]
            if foreign and agent.model is None and agent.model_settings == get_default_model_settings():
                agent.model_settings = ModelSettings()  # the SDK's are OpenAI's, and others refuse them
            if included and agent.model_settings.response_include is None:
                agent.model_settings = replace(agent.model_settings, response_include=included)
            agent.mcp_servers = [server for server in agent.mcp_servers if server in self._connected]
            for tool in agent.tools:
                invoke = getattr(tool, "on_invoke_tool", None)
                if isinstance(tool, FunctionTool) and getattr(invoke, "func", None) is not contained:
                    tool.on_invoke_tool = functools.partial(contained, tool.name, tool.on_invoke_tool)

    def doubt(self) -> None:
        """Have the next answer see whether the MCP servers that it uses are still there."""
        self.in_doubt.update(self._connected)

    async def _disconnect(self, servers: list[MCPServer]) -> None:
        self.in_doubt.difference_update(servers)
        for server in servers:
            del self._used[server]
        await asyncio.gather(*(self._connected.pop(server).cleanup_all() for server in servers))

    async def _reconnect(self, servers: set[MCPServer]) -> None:
        """Those that do not answer any more: they were stopped, or the laptop slept."""
        async with self._connecting:
            doubtful = [*servers & self.in_doubt]  # another answer may just have seen to it
            answers = await asyncio.gather(*(each.list_tools() for each in doubtful), return_exceptions=True)
            for server, answer in zip(doubtful, answers, strict=True):
                manager = self._connected[server]
                if isinstance(answer, BaseException):
                    await manager.reconnect(failed_only=False)
                if not manager.errors:
                    self.in_doubt.discard(server)

    async def agent_for(self, turn: Turn, *, first: bool = False) -> Agent[Any]:
        """Who answers in this turn: the agent that had the last word, or the `first` of the graph."""
        graph, choice, last = self.graph, turn.context.tool_choice, turn.conversation["agent"]
        if not graph:
            made = self._source(turn.context)
            made = await made if inspect.isawaitable(made) else made
            if not isinstance(made, Agent):
                raise TypeError(f"the function that makes the agent returned a {type(made).__name__}")
            graph = agents_within(made)
            await self.prepare(graph)
        if self.in_doubt:
            await self._reconnect({server for agent in graph for server in agent.mcp_servers})
        agent = next((each for each in graph if each.name == last and not first), graph[0])
        if lost := [server for server in agent.mcp_servers if self._connected[server].errors]:
            log.warning("The answer goes without the MCP servers %s", [server.name for server in lost])
            agent = agent.clone(mcp_servers=[each for each in agent.mcp_servers if each not in lost])
        if choice in [tool.name for tool in agent.tools]:
            agent = agent.clone(model_settings=replace(agent.model_settings, tool_choice=choice))
        return agent


def told_of_failure(args: ToolErrorFormatterArgs[TurnContext]) -> str | None:
    """What the model, and so perhaps the person, is told of a tool that raised: not the error's text."""
    if args.error is None:
        return None  # the SDK's own words
    if isinstance(args.error, ModelBehaviorError):
        return to_json({"error": f"These arguments do not fit the parameters of {args.tool_name}."})
    turn = args.run_context.context.turn
    turn.chat.log_failure(f"thread {turn.conversation_id}: the tool {args.tool_name} failed", args.error)
    return to_json({"error": f"The tool {args.tool_name} failed."})


async def contained(name: str, invoke: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Call a tool, which may leave a client_tool_call behind.

    One that exits must not take the server along: asyncio lets such exceptions through.
    """
    called: list[Any] = [None]
    outer, token = ASKED.get(None), ASKED.set(called)
    try:
        output = await invoke(*args)
        if asked := json_copy(called[0]):
            output = ClientTool(asked["name"], asked.get("arguments") or {})
        if outer is None or not isinstance(output, ClientTool):
            return output
        outer[0] = vars(output)  # the call that waits is that of the agent which is used as a tool
        return "The person's side has been asked."
    except (SystemExit, KeyboardInterrupt) as error:
        log.error("the tool %s wanted to end the process: %r", name, error)
        return to_json({"error": f"The tool {name} failed."})
    finally:
        ASKED.reset(token)


def can_answer(source: Any) -> bool:
    """Whether it is an agent, or a function that can be called as one of the two kinds is."""
    if isinstance(source, (Agent, type)) or inspect.isgeneratorfunction(source):
        return isinstance(source, Agent)
    with contextlib.suppress(TypeError, ValueError):
        inspect.signature(source).bind(*[None] * (2 if inspect.isasyncgenfunction(source) else 1))
        return True
    return False


def is_async(handler: Any) -> bool:
    functions = handler, getattr(handler, "__call__", None)  # noqa: B004  # may be an object
    return any(map(inspect.iscoroutinefunction, functions)) or inspect.isasyncgenfunction(handler)


AN_AGENT = "give an Agent, such as Agent(name=..., instructions=...), a function of the context that returns "
AN_AGENT += "one, or an async generator function answer(context, history)"
# What an argument may be, and a sentence for what is not; all others are handlers.
ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "agent": (can_answer, AN_AGENT),
    "store": (lambda value: isinstance(value, Store), "give a Store, such as Store('chatkit.db')"),
    "settings": (lambda value: isinstance(value, Settings), "give Settings(...), or its fields by name"),
    "lifespan": (callable, "give an async context manager function of the app"),
}


def check_arguments(**arguments: Any) -> None:
    """Raises SettingsError: a sentence that says what belongs there."""
    for name, value in arguments.items():
        fits, sentence = ARGUMENTS.get(name, (is_async, f"write it as `async def {name}(...)`"))
        if value is not None and not fits(value):
            what = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
            raise SettingsError(f"{name} is {what}: {sentence}.")


# =================================================================================================== Requests
# What comes in, who sends it, what is refused, and what is kept out of the log.


class Refused(HTTPException):
    """A request that cannot be granted: an HTTP status and a text for the person.

    `by_doing`: a person's doing led here, as always to some statuses, and not a broken client: the ChatKit
    dialect tells it within a stream, as the real component shows nothing of a status.
    """

    def __init__(self, status: int, detail: str, *, by_doing: bool = False, retry_after: int = 0) -> None:
        headers = {"Retry-After": str(retry_after)} if retry_after else None
        super().__init__(status, detail, {"WWW-Authenticate": "Bearer"} if status == 401 else headers)
        self.by_doing = by_doing or status in (409, 413, 429, 503)


def found(row: T | None, what: str) -> T:
    """Raises Refused where there is none."""
    if row is None:
        raise Refused(404, f"{what} not found")
    return row


def as_row_id(value: object) -> int | None:
    """A row's id from the wire, a whole number or its decimal string; None for what cannot be one."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,19}", value):
        value = int(value)
    return value if type(value) is int and 0 < value <= LAST else None


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    user_id: str = "local"
    by_token: bool = False
    locale: str = "en"
    request_context: Row = field(default_factory=dict)  # {"headers", "metadata"}


MAX_BODY = 1024 * 1024  # bytes of JSON beside a message and a recording


class Call(Request):
    """A request with what serves it, and a body within limits."""

    def __init__(self, request: Request) -> None:
        super().__init__(request.scope, request.receive)
        self.chat, self.caller = cast(Chat, self.app.state.chat), cast(Caller, self.state.caller)
        self.store, self.user_id = self.chat.store, self.caller.user_id
        self.max_json = MAX_BODY + 6 * self.chat.settings.max_message_chars  # which may come as \u1234
        host, root = self.headers.get("host", ""), self.scope.get("root_path", "")
        self.base = f"{self.scope['scheme']}://{host}{root}"  # the app's own URL

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Raises Refused for what is longer than any file or recording may be."""
        total, limit = 0, self.chat.settings.max_attachment_bytes * 4 // 3 + self.max_json  # base64
        async for chunk in super().stream():
            total += len(chunk)
            if total > limit:
                raise Refused(413, f"The request is larger than {limit:,} bytes")
            yield chunk

    async def json(self) -> Any:
        """Raises Refused for what cannot be stored: half characters, NaN, endless depth, no JSON at all."""
        body = await self.body()
        try:
            value = json_copy(from_json(body))
            if not isinstance(value, dict):
                raise ValueError("an object is expected")
        except ValueError as error:
            raise Refused(400, f"Invalid JSON: {error}") from None
        self.state.operation = value.get("type")
        if len(body) > self.max_json and self.state.operation != "input.transcribe":
            raise Refused(413, f"The request is larger than {self.max_json:,} bytes")
        return value

    async def shown(self, rows: list[Row]) -> list[Row]:
        """Rows as thread items, images with their bytes where the component could not load them from here."""
        if not self.base.startswith("https:"):
            rows = await with_files(self.store, self.user_id, rows, "image/")
        seen = (as_shown(row, self.chat.settings.show_tools) for row in rows)
        return [thread_item(row, self.base) for row in seen if row]


def row_id(what: str) -> BeforeValidator:
    """Of a parameter: what cannot be an id is not found."""
    return BeforeValidator(lambda value: found(as_row_id(value), what), json_schema_input_type=str)


ThreadId = Annotated[int, row_id("Conversation")]
ItemId = Annotated[int, row_id("Item")]
Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
Limit = Annotated[int | None, Field(ge=1)]
Order = Literal["asc", "desc"]


class TextPart(BaseModel):
    type: Literal["input_text"] = "input_text"
    text: str


class TagPart(BaseModel):
    type: Literal["input_tag"]
    id: str
    text: str
    data: dict[str, Any] = {}
    group: str | None = None
    interactive: bool = False


class ToolChoice(BaseModel):
    id: str


class InferenceOptions(BaseModel):
    model: str | None = None
    tool_choice: ToolChoice | None = None


class UserMessage(BaseModel):
    """What a person sends."""

    content: list[Annotated[TextPart | TagPart, Field(discriminator="type")]]
    attachments: list[str] = []  # ids of uploaded files
    quoted_text: str | None = None
    inference_options: InferenceOptions = InferenceOptions()

    @property
    def text(self) -> str:
        return "".join(f"@{part.text}" if isinstance(part, TagPart) else part.text for part in self.content)

    @property
    def item(self) -> Row | None:
        """What is kept beside the text: a part of the thread item, its attachments still to come."""
        item = self.model_dump(exclude={"attachments"}, exclude_none=True)
        if [part.type for part in self.content] == ["input_text"]:
            del item["content"]  # the text says it all
        kept = {name: part for name, part in item.items() if part}
        return {"type": "user_message", **kept} if kept or self.attachments else None


class Answer(BaseModel):
    values: list[str] = []
    skipped: bool = False


class Answers(BaseModel):
    status: Literal["answered", "skipped"] = "answered"
    answers: dict[str, Answer] = {}  # by question id


class Action(BaseModel):
    type: str
    payload: Any = None


def check_message(chat: Chat, message: UserMessage) -> None:
    """Raises Refused for what cannot be answered here."""
    if not message.text.strip() and not message.attachments:
        raise Refused(400, "Message is required")
    tags = [to_json(part.data) for part in message.content if isinstance(part, TagPart)]
    limit, options = chat.settings.max_message_chars, message.inference_options
    if sum(map(len, [message.text, message.quoted_text or "", *tags])) > limit:
        raise Refused(413, f"Message is longer than {limit} characters")
    tool = options.tool_choice if chat.agents.graph else None  # a function or a generator may know more
    choices = ("model", options.model, chat.agents.choices), ("tool", tool and tool.id, chat.agents.tools())
    for what, chosen, names in choices:
        if chosen is not None and chosen not in names:
            there_is = ", ".join(names) or "none"
            raise Refused(400, f"There is no {what} {chosen!r} here; there is {there_is}", by_doing=True)


SECRETS = {  # what looks like one
    r"\b(sk|AIza|ghp|xox[bp])[-_A-Za-z0-9]{12,}": "[secret]",
    r"\beyJ[\w-]+\.[\w-]+\.[\w-]*": "[token]",
    r"(?i)\b(bearer|api[-_]?key|key)([\"']?\s*[=:]\s*[\"']?|\s+)[-_.A-Za-z0-9]{12,}": r"\1\2[secret]",
}


def redact(text: str, secret_values: list[str]) -> str:
    """A text without secrets: known ones, and what looks like a key or a token."""
    known = dict.fromkeys(map(re.escape, secret_values), "[secret]")
    for pattern, instead in (known | SECRETS).items():
        text = re.sub(pattern, instead, text)
    return text


# ======================================================================================================= Chat
# What one app holds: its store, its agents, the turns that are running. Beginning turns, and stopping them.

Take = Callable[..., Awaitable[None]]  # keeps what is given to a turn, and starts it: see take_message()


class Chat:
    """One app's state. It opens when it is first needed, and closes with the event loop at the latest: so it
    works under a server, mounted in another app, whose server runs no lifespan of ours, and without any."""

    def __init__(
        self, settings: Settings, agent: AgentSource = None, store: Store | None = None, **handlers: Any
    ) -> None:
        """Raises SettingsError for an argument that makes no sense, and where the model cannot work."""
        check_arguments(agent=agent, store=store, settings=settings, **handlers)
        self.settings = settings
        self.store = store or Store(settings.database)
        self.models = Models(settings)
        self.agents = Agents(self.models, agent)
        self.is_todo = agent is None
        own = toggle_task if self.is_todo else None
        self.on_action: ActionHandler | None = handlers.get("on_action") or own
        self.on_feedback: FeedbackHandler | None = handlers.get("on_feedback")
        ours = self.models.transcribe if settings.openai_api_key else None
        self.transcriber: Transcriber | None = handlers.get("transcribe") or ours
        self.turns: set[Turn] = set()  # those that are running
        self.answering: dict[int, Turn] = self.store.answering  # those in which an agent speaks
        self.unsaved: set[Draft] = set()  # those with text that is not in the file
        self._keeper: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()

    # ---- opening and closing

    async def open(self, ending: str = "shutdown") -> None:
        """Open all, unless it is open; `ending` is how turns end that run at its close. Raises StoreError."""
        async with self._opening, contextlib.AsyncExitStack() as stack:
            if self._keeper is not None and not self._keeper.done():
                if self._keeper.get_loop() is not asyncio.get_running_loop():
                    raise StoreError("This app is served already: stop that server, or create another app.")
                return
            if self.store.is_open:
                self.store.before_close.add(self.close)
            else:
                await stack.enter_async_context(self.store)
                if self.store.shared:
                    text = "Another server or notebook has %s open: each knows only of its own answers."
                    log.warning(text, self.store.path)
            stack.push_async_callback(self.models.close)
            stack.push_async_callback(self.agents.close)
            await self.agents.prepare(self.agents.graph)
            stack.callback(asyncio.create_task(self._save_texts()).cancel)
            stack.push_async_callback(self.stop_turns, ending)
            self._ending = asyncio.Event()  # which has the keeper close everything
            self._keeper = asyncio.create_task(self._keep(stack.pop_all()))
            await asyncio.sleep(0)  # a task that is cancelled before it began would close nothing

    async def _keep(self, stack: contextlib.AsyncExitStack) -> None:
        """Wait for close(), or for the end of the event loop, which cancels this, and close everything."""
        async with stack:
            await self._ending.wait()

    async def close(self) -> None:
        """Save and end what is running; whoever calls this meanwhile waits for it too."""
        if self._keeper is not None and not self._keeper.done():
            self._ending.set()
            await asyncio.wait([self._keeper])
        self.store.before_close.discard(self.close)

    async def stop_turns(self, reason: str = "shutdown", conversation_id: int | None = None) -> None:
        """Save and end all that is running, everywhere or in one conversation."""
        turns = [turn for turn in self.turns if conversation_id in (None, turn.conversation_id)]
        for turn in turns:
            turn.stop(reason)
        await asyncio.gather(*(turn.wait() for turn in turns))

    # ---- what all turns share

    def log_failure(self, what: str, error: BaseException) -> None:
        """A line for the log; with a traceback for what nobody expected, and for all at level debug."""
        code = explain(error)["code"]
        text = f"{what}: {code}: {traceback.format_exception_only(error)[-1].strip()[:500]}"
        if code == "internal" or log.isEnabledFor(logging.DEBUG):
            text += "\n" + "".join(traceback.format_exception(error)).rstrip()
        log.error("%s", redact(text, self.settings.secrets))

    async def _save_texts(self) -> None:
        """Save what grew, all drafts at once: a hop for each is costly."""
        while True:
            await asyncio.sleep(SAVE_EVERY)
            if not self.unsaved:
                continue
            drafts, self.unsaved = self.unsaved, set()
            texts = [(draft.text, draft.id, draft.turn.user_id) for draft in drafts]
            try:  # what a turn saves at its end stands in line behind this
                await self.store.save_texts(texts)
            except (sqlite3.Error, StoreError) as error:
                log.warning("saving %d answers so far failed: %s", len(drafts), error)
                self.unsaved |= {draft for draft in drafts if draft.turn.phase == "working"}

    async def conversation(self, user_id: str, conversation_id: int) -> Row:
        """Raises Refused where the user has no such conversation."""
        return found(await self.store.conversation(user_id, conversation_id), "Conversation")

    async def change_conversation(self, user_id: str, conversation_id: int, **changes: Any) -> Row:
        """Rename, lock or annotate a conversation, and tell those who follow an answer. Raises Refused."""
        row = await self.store.update_conversation(user_id, conversation_id, **changes)
        for turn in self.turns:
            if turn.conversation_id == conversation_id and row is not None:
                turn.thread_changed(row)
        return found(row, "Conversation")

    async def delete_conversation(self, user_id: str, conversation_id: int) -> None:
        """Raises Refused where there is none."""
        await self.conversation(user_id, conversation_id)
        await self.stop_turns("deleted", conversation_id)
        await self.store.delete_conversation(user_id, conversation_id)
        await self.stop_turns("deleted", conversation_id)  # what began in between

    async def cancel(self, user_id: str, conversation_id: int) -> None:
        """Stop the running answer and keep what was said. Raises Refused."""
        await self.conversation(user_id, conversation_id)
        turn = self.answering.get(conversation_id)
        if turn is None:
            raise Refused(409, "Nothing is being answered here")
        turn.stop("cancelled")
        await turn.wait()

    # ---- beginning a turn

    async def begin(self, caller: Caller, conversation_id: int | None, take: Take, *given: Any) -> Turn:
        """A turn in a conversation, or in one that is still to be made, for what is `given`.

        That is in the file when this returns. Raises Refused, sqlite3.Error, StoreError.
        """
        turn, running = Turn(self, caller), self.answering.get(conversation_id or 0)
        speaks = take is not take_action  # which may come while an answer is being written
        if speaks and running is not None and running.reason:  # stopped: the next may come at once
            await running.wait()
        if conversation_id is not None:
            conversation = await self.conversation(caller.user_id, conversation_id)
            status, reason = conversation["status"], conversation["status_reason"]
            if status != "active":
                raise Refused(409, f"The conversation is {status}{f': {reason}' if reason else ''}")
            turn.enter(conversation)
        if len(self.turns) >= self.settings.max_concurrent_turns:
            raise Refused(503, "The server is busy. Try again in a moment.", retry_after=5)
        mine = sum(turn.user_id == caller.user_id for turn in self.turns)
        if caller.by_token and mine >= self.settings.max_turns_per_user:
            raise Refused(429, "Too many answers are being written for you at once.", retry_after=5)
        self.turns.add(turn)
        try:
            if speaks and turn.conversation:
                self.claim(turn)
            await take(turn, *given)
        except BaseException:
            self.forget(turn)
            raise
        return turn

    def claim(self, turn: Turn) -> None:
        """An agent is going to speak in the turn's conversation, the only one at a time. Raises Refused."""
        if self.answering.setdefault(turn.conversation_id, turn) is not turn:
            raise Refused(409, "The conversation is being answered already")

    def forget(self, turn: Turn) -> None:
        self.turns.discard(turn)
        if self.answering.get(turn.conversation_id) is turn:
            del self.answering[turn.conversation_id]

    # ---- feedback, dictation

    async def rate(self, caller: Caller, conversation_id: int, item_ids: list[int], kind: str) -> None:
        """Keep a thumb up or down, and tell the app's handler. Ids that are not here are of lost answers."""
        conversation = await self.conversation(caller.user_id, conversation_id)
        rows = await self.store.set_feedback(caller.user_id, conversation_id, item_ids, kind)
        if self.on_feedback is not None and rows:
            turn, items = Turn(self, caller), [thread_item(row, "") for row in rows]
            turn.enter(conversation)
            self.turns.add(turn)
            turn.start(functools.partial(self.on_feedback, turn.context, items, kind))
            await turn.wait()

    async def transcribe(self, audio: bytes, mime_type: str) -> str:
        """What was said in a recording. Raises Refused."""
        if self.transcriber is None:
            raise Refused(501, "Dictation needs OPENAI_API_KEY, or create_app() a transcribe function")
        [said] = await asyncio.gather(self.transcriber(audio, mime_type), return_exceptions=True)
        if isinstance(said, BaseException):
            self.log_failure("dictation failed", said)
            raise Refused(502, explain(said)["message"])
        return said


# ---- what begins a turn: each raises Refused


async def take_message(turn: Turn, message: UserMessage) -> None:
    """Keep a message, in a new conversation where the turn is in none, and have it answered."""
    check_message(turn.chat, message)
    title = " ".join(message.text.split()) or "(attachment)"
    title = title if len(title) <= 50 else title[:50] + "..."
    columns, files = {"content": message.text, "item": message.item}, list(dict.fromkeys(message.attachments))
    is_first, place = not turn.conversation, (turn.user_id, turn.conversation_id or None)
    try:
        conversation, row = await turn.chat.store.add_user_message(*place, title, columns, files)
    except LookupError as error:
        raise Refused(404, str(error), by_doing=True) from None
    if is_first:
        turn.enter(conversation)
        turn.chat.claim(turn)
    turn.answer(row, is_first=is_first)


async def take_retry(turn: Turn, message_id: int | None = None, text: str | None = None) -> None:
    """Answer a user's message anew, the last one if none is named, with `text` in other words. What came
    after it goes."""
    place, store = (turn.user_id, turn.conversation_id), turn.chat.store
    row = await (store.message(*place, message_id) if message_id else store.last_user_message(*place))
    row = found(row, "Message")
    if row["role"] != "user":
        raise Refused(400, "Only a user's message can be answered again")
    if text is not None:
        item = {name: part for name, part in (row["item"] or {}).items() if name != "content"}
        files = [file["id"] for file in item.get("attachments") or []]
        check_message(turn.chat, UserMessage(content=[TextPart(text=text)], attachments=files))
        row |= {"content": text, "item": item or None}
    row = found(await store.rewind(*place, row), "Message")
    turn.conversation = await turn.chat.conversation(*place)
    turn.answer(row)


async def take_tool_output(turn: Turn, result: Any, call_id: str | None = None) -> None:
    """Complete the pending client tool call, the last one if none is named, and let the agent go on."""
    for row in reversed(await turn.chat.store.pending_messages(turn.user_id, turn.conversation_id)):
        item = row["item"] or {}
        if item.get("type") == "client_tool_call" and call_id in (None, item["call_id"]):
            return await _go_on(turn, row, item | filled(status="completed", output=result), result)
    raise Refused(409, "No client tool call is pending")


async def take_answers(turn: Turn, item_id: int, given: Answers) -> None:
    """Keep the answers to pending questions, or that they were skipped, and let the agent go on."""
    row = found(await turn.chat.store.message(turn.user_id, turn.conversation_id, item_id), "Item")
    if (row["item"] or {}).get("type") != "structured_input":
        raise Refused(400, "This item asks nothing")
    if row["status"] != "pending":
        raise Refused(409, "This was answered already")
    item = answered_item(row["item"], **given.model_dump(include={"status", "answers"}))
    told = [{"question": question["question"], **question["answer"]} for question in item["inputs"]]
    await _go_on(turn, row, item, told)


async def _go_on(turn: Turn, row: Row, item: Row, result: Any) -> None:
    """What the person's side gave becomes the call's result, and the agent takes its next step with it.
    What a tool streamed has no call; an approval has the state of a run, from which that goes on."""
    text, resume = result if isinstance(result, str) else to_json(result), None
    columns: Row = {"content": text, "item": item, "status": "done"}
    for call in row["tool_calls"] or []:
        output = {"type": "function_call_output", "call_id": call["id"], "output": text}
        columns["input"] = [*(row["input"] or []), output]
        turn.emit({"type": "tool_result", "id": call["id"], "name": call["name"], "result": result})
    if isinstance(row["input"], dict):
        columns["input"], resume = [], (row["input"]["run_state"], item)
    store = turn.chat.store
    message = found(await store.last_user_message(turn.user_id, turn.conversation_id), "Message")
    changed = found(await store.update_message(turn.user_id, row["id"], **columns), "Conversation")
    if item["type"] == "structured_input":  # the component knows itself what it gave a client tool
        turn.show("thread.item.replaced", changed)
    turn.answer(message, resume=resume)
    turn.row_ids.append(row["id"])


async def take_action(turn: Turn, item_id: int | None, action: Action) -> None:
    """Have the app deal with a click in a widget."""
    handler, item = turn.chat.on_action, None
    if handler is None:
        raise Refused(400, "There is no on_action here: give create_app() one", by_doing=True)
    if item_id is not None:
        row = await turn.chat.store.message(turn.user_id, turn.conversation_id, item_id)
        item = thread_item(found(row, "Item"), "")
        if item["type"] != "widget":
            raise Refused(400, "This item is not a widget")

    async def work() -> None:
        handled = handler(turn.context, action.model_dump(), item)
        try:
            await (say_parts(turn, handled) if hasattr(handled, "__aiter__") else handled)
        except (ValueError, LookupError) as error:
            raise Refused(400, "The action was refused") from error

    turn.start(work)


# ============================================================================================== Plain dialect
# Events as anyone can read them: `id: <turn>-<n>`, `data: {json}`, and `data: [DONE]` at the end.
# The format is the HTML standard's: https://html.spec.whatwg.org/multipage/server-sent-events.html

quote = json.encoder.encode_basestring  # a JSON string with its quotes: several times faster than json.dumps
Encoder = Callable[[list[Event]], bytes]  # makes frames of the events that come next


def plain_event(event: Event, base: str, show_tools: str) -> Event | None:
    """An event as the README has it, None for what readers need not know; `base` is the app's own URL."""
    kind = event["type"]
    if "row" in event:
        growing = kind == "thread.item.added" and event["row"]["role"] in ("assistant", "tool")
        row = None if growing else as_shown(event["row"], show_tools)
        return {"type": "item", "item": thread_item(row, base)} if row and row["item"] else None
    if kind in ("tool_call", "tool_result") and show_tools != "full":
        hidden: Row = {"args": {}} if kind == "tool_call" else {"result": None}
        return None if show_tools == "none" else {**event, **hidden}
    if kind == "thread.item.updated":
        if event["update"].get("type") != "assistant_message.content_part.text_delta":
            return None
        return {
            "type": "text",
            "content": event["update"].get("delta", ""),
            "message_id": int(event["item_id"]),
        }
    if kind == "thread.updated":
        thread = event["conversation"]
        return {"type": "thread_updated", **{name: thread[name] for name in ("title", "status", "metadata")}}
    return PLAIN_FORM.get(kind, dict)(event)


# What else there is of ChatKit's events; ours and unknown ones stay as they are.
PLAIN_FORM: dict[str, Callable[[Event], Event | None]] = {
    "thinking": lambda event: {"type": "thinking", "content": event["content"]},
    "thread.item.removed": lambda event: {"type": "item_removed", "id": event["item_id"]},
    "progress_update": lambda told: {"type": "progress", "content": told["text"], "icon": told.get("icon")},
    "client_effect": lambda event: {"type": "effect", "name": event["name"], "data": event.get("data") or {}},
    "notice": lambda event: {"title": None, **event},
    "error": lambda event: {"message": None, "code": "custom", **event},
    "stream_options": lambda event: None,
}


def plain_encoder(turn: Turn, base: str, last_event_id: str | None = None) -> Encoder:
    """A turn as the plain dialect has it, without the frames up to `last_event_id`."""
    turn_id, _, last = (last_event_id or "").partition("-")
    known = (as_row_id(last) or 0) if turn_id == turn.id else 0
    seen = known if known <= len(turn.events) else 0
    number, show_tools = 0, turn.chat.settings.show_tools

    def encode(events: list[Event]) -> bytes:
        nonlocal number
        frames = []
        for event in events:
            if event["type"] == "text":  # the hot path
                text, message_id = event["content"], event["message_id"]
                data = f'{{"type": "text", "content": {quote(text)}, "message_id": {message_id}}}'
            elif shown := plain_event(event, base, show_tools):
                data = to_json(shown)
            else:
                continue
            number += 1
            if number > seen:
                frames.append(f"id: {turn.id}-{number}\ndata: {data}\n\n")
        if events[-1]["type"] == "done":
            frames.append("data: [DONE]\n\n")
        return "".join(frames).encode()

    return encode


async def stream_agent(
    message: str,
    *,
    agent: AgentSource = None,
    store: Store,
    user_id: str = "local",
    conversation_id: int | None = None,
    settings: Settings | None = None,
) -> AsyncIterator[Event]:
    """Answer one message without a server, and yield the events of the plain dialect as they happen.

        async with Store(":memory:") as store:
            async for event in stream_agent("add buy milk", store=store):
                print(event)

    Goes on in `conversation_id`, or begins a new conversation, whose id is in the first event. Leaving the
    loop early stops the answer. Raises Refused, with a status and a detail as in the HTTP API; a failing
    model does not raise, it is an `error` event.
    """
    chat = Chat(settings or Settings.from_env(), agent, store=store)
    await chat.open(ending="cancelled")
    try:
        given = UserMessage(content=[TextPart(text=message)])
        turn = await chat.begin(Caller(user_id), conversation_id, take_message, given)
        async for events in turn.follow():
            for event in events:
                if shown := plain_event(event, "", chat.settings.show_tools):
                    yield shown
    finally:
        await chat.close()


# ============================================================================================ ChatKit dialect
# The protocol of OpenAI's <openai-chatkit> component. Its source is the official Python SDK, openai-chatkit:
# chatkit/types.py has the types, chatkit/server.py the behaviour. Here a conversation is called a thread.

DEFAULT_PAGE, MOST_THREADS, MOST_ITEMS = 20, 10_000, 1000
FileName = Annotated[str, Field(min_length=1, max_length=255)]


class Operation(NamedTuple):
    """One of the protocol's: what does it, the type of its request, and whether a turn comes of it."""

    run: Callable[..., Awaitable[Any]]
    body: type[BaseModel]
    streams: bool


OPERATIONS: dict[str, Operation] = {}


def operation(name: str, **given: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of a Call, whose other parameters are the operation's.

    Or, where their types are `given`, a function that begins a turn, and takes them in this order.
    """

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        fields: Row = dict(given)
        for each in () if given else [*inspect.signature(run, eval_str=True).parameters.values()][1:]:
            fields[each.name] = (each.annotation, ... if each.default is each.empty else each.default)
        title = re.sub("[._]", "", name.title())
        params: Any = create_model(title + "Params", **fields)
        body: Any = {"type": Literal[name], "params": (params, Field({}, validate_default=True))}
        model = create_model(title, __doc__=run.__doc__, **body, metadata=(Row, {}))
        OPERATIONS[name] = Operation(run, model, streams=bool(given))
        return run

    return register


operation("threads.create", input=UserMessage)(take_message)
operation("threads.add_user_message", input=UserMessage, thread_id=ThreadId)(take_message)
operation("threads.retry_after_item", thread_id=ThreadId, item_id=ItemId)(take_retry)
operation("threads.add_client_tool_output", thread_id=ThreadId, result=(Any, None))(take_tool_output)
operation("threads.add_structured_input", thread_id=ThreadId, item_id=ItemId, input=Answers)(take_answers)
operation("threads.custom_action", thread_id=ThreadId, item_id=(ItemId | None, None), action=Action)(
    take_action
)


async def operate(call: Call, given: Any) -> Response:
    """Do what was asked, a body of one of OPERATIONS."""
    call.caller.request_context["metadata"] = given.metadata
    operation, params = OPERATIONS[given.type], dict(given.params)
    if not operation.streams:
        return JSONResponse(await operation.run(call, **params))
    thread_id = params.pop("thread_id", None)
    turn = await call.chat.begin(call.caller, thread_id, operation.run, *params.values())
    first: list[Event] = []
    if given.type == "threads.create":
        first.append({"type": "thread.created", "thread": thread_json(turn.conversation)})
    if operation.run is take_message:  # the component does not know its id
        [item] = await call.shown([turn.user_message])
        first.append({"type": "thread.item.done", "item": item})
    stop_on_leave = call.chat.settings.on_disconnect == "cancel"
    return event_stream(turn, chatkit_encoder(turn, call.base, first), stop_on_leave)


@operation("threads.sync_custom_action")
async def sync_custom_action(
    call: Call, thread_id: ThreadId, action: Action, item_id: ItemId | None = None
) -> Row:
    """Have the action handler deal with a click; what comes back is the widget as it is afterwards."""
    turn = await call.chat.begin(call.caller, thread_id, take_action, item_id, action)
    await turn.wait()
    for event in turn.events:
        if event["type"] == "error":
            raise Refused(400 if event["code"] == "refused" else 500, event["message"])
    row = await call.store.message(call.user_id, thread_id, item_id) if item_id else None
    return {"updated_item": (await call.shown([row]))[0]} if row else {}


@operation("threads.list")
async def list_threads(
    call: Call, limit: Limit = None, order: Order = "desc", after: ThreadId | None = None
) -> Row:
    """A page of threads, without their items."""
    most = min(limit or DEFAULT_PAGE, MOST_THREADS)
    if after is not None:
        await call.chat.conversation(call.user_id, after)
    rows = await call.store.conversation_page(call.user_id, most + 1, order, after)
    return page_json([thread_json(row) for row in rows], most)


@operation("threads.get_by_id")
async def get_thread(call: Call, thread_id: ThreadId) -> Row:
    """A thread with its oldest items; the component asks for the rest."""
    conversation = await call.chat.conversation(call.user_id, thread_id)
    return thread_json(conversation, await list_items(call, thread_id, order="asc"))


@operation("threads.update")
async def rename_thread(call: Call, thread_id: ThreadId, title: Title) -> Row:
    """A thread gets another title."""
    return thread_json(await call.chat.change_conversation(call.user_id, thread_id, title=title))


@operation("threads.delete")
async def delete_thread(call: Call, thread_id: ThreadId) -> Row:
    """A thread goes, with all that is in it."""
    await call.chat.delete_conversation(call.user_id, thread_id)
    return {}


@operation("items.list")
async def list_items(
    call: Call, thread_id: ThreadId, limit: Limit = None, order: Order = "desc", after: ItemId | None = None
) -> Row:
    """A page of a thread's items."""
    most, place = min(limit or DEFAULT_PAGE, MOST_ITEMS), (call.user_id, thread_id)
    await call.chat.conversation(*place)
    if after is not None:
        found(await call.store.message(*place, after), "Item")
    hide = "tool" if call.chat.settings.show_tools == "none" else "system"
    rows = await call.store.message_page(*place, most + 1, order, after, hide)
    return page_json(await call.shown(rows), most)


@operation("items.feedback")
async def give_feedback(
    call: Call, thread_id: ThreadId, item_ids: list[str], kind: Literal["positive", "negative"]
) -> Row:
    """Thumbs up or down. Ids that are not ours are those of answers that never came."""
    await call.chat.rate(call.caller, thread_id, [*filter(None, map(as_row_id, item_ids))], kind)
    return {}


@operation("attachments.create")
async def create_attachment(call: Call, name: FileName, size: NonNegativeInt, mime_type: str) -> Row:
    """Announce a file; its bytes go to the URL that comes back."""
    mime_type = check_file(call.chat.settings, mime_type, size)
    file = await call.store.add_attachment(call.user_id, name, mime_type, size)
    return attachment_json(file, call.base, upload=True)


@operation("attachments.delete")
async def delete_attachment(call: Call, attachment_id: str) -> Row:
    """A file that was not sent goes."""
    if not await call.store.delete_attachment(call.user_id, attachment_id):
        raise Refused(404, "Attachment not found, or sent already")
    return {}


@operation("input.transcribe")
async def transcribe_audio(call: Call, audio_base64: str, mime_type: str) -> Row:
    """Speech to text."""
    try:
        audio = base64.b64decode(audio_base64, validate=True)
    except ValueError:
        raise Refused(400, "params.audio_base64: not base64") from None
    mime_type = check_file(call.chat.settings, mime_type, len(audio))
    return {"text": await call.chat.transcribe(audio, mime_type)}


def thread_json(conversation: Row, items: Row | None = None) -> Row:
    thread = {name: conversation[name] for name in ("title", "created_at", "metadata")}
    thread |= {"id": str(conversation["id"]), "status": status_json(conversation)}
    return {**thread, "items": items or page_json([], 0)}


def page_json(data: list[Row], most: int) -> Row:
    """A page of at most so many: what there is beyond is only to know that there is more."""
    more = len(data) > most
    return filled(data=data[:most], has_more=more, after=data[most - 1]["id"] if more else None)


def chatkit_event(event: Event, base: str, show_tools: str) -> Event | None:
    """The protocol's event for one of ours; those that are the protocol's already pass."""
    kind = event["type"]
    if "row" in event:
        row = as_shown(event["row"], show_tools)
        item = thread_item(row, base) if row else None
        if item and kind == "thread.item.updated":
            update = event.get("update") or {"type": "generated_image.updated", "image": item["image"]}
            return {"type": kind, "item_id": item["id"], "update": update}
        if item and kind == "thread.item.added" and item["type"] == "assistant_message":
            item["content"] = []
        return {"type": kind, "item": item} if item else None
    if kind == "tool_call" and show_tools != "none":
        return {"type": "progress_update", "text": f"Running {event['name']}"}
    if kind == "error":
        return error_json(event.get("message"), bool(event.get("allow_retry")))
    if kind == "thread.updated":
        return {"type": kind, "thread": thread_json(event["conversation"])}
    if kind == "thread":
        return {"type": "stream_options", "stream_options": {"allow_cancel": True}}
    return None if kind in ("thinking", "tool_call", "tool_result", "done") else event


def error_json(message: str | None, allow_retry: bool) -> Row:
    code = "custom" if message else "stream.error"
    return filled(type="error", code=code, message=message, allow_retry=allow_retry)


def chatkit_encoder(turn: Turn, base: str, first: list[Event]) -> Encoder:
    """A turn as the protocol has it, with `first` in front of its events."""
    show_tools, begun = turn.chat.settings.show_tools, set[Draft]()  # thoughts

    def encode(events: list[Event]) -> bytes:
        frames = []
        for event, following in itertools.pairwise([*events, {}]):
            if event["type"] == "text":  # the hot path
                frames.append(
                    f'data: {{"type":"thread.item.updated","item_id":"{event["message_id"]}","update":'
                    '{"type":"assistant_message.content_part.text_delta","content_index":0,'
                    f'"delta":{quote(event["content"])}}}}}\n\n'
                )
                continue
            shown = [chatkit_event(event, base, show_tools)]
            if event["type"] == "thread":
                shown = [*first, *shown]
            elif event["type"] == "thinking" and "draft" in event:
                draft: Draft = event["draft"]
                if draft.text and following.get("draft") is not draft:  # each tells all: the last will do
                    change = "updated" if draft in begun else "added"
                    task = thought_item(draft.text)["workflow"]["tasks"][0]
                    update = {"type": f"workflow.task.{change}", "task_index": 0, "task": task}
                    shown = [{"type": "thread.item.updated", "item_id": str(draft.id), "update": update}]
                    begun.add(draft)
            frames += [f"data: {to_json(each)}\n\n" for each in shown if each]
        return "".join(frames).encode()

    return encode


def check_file(settings: Settings, mime_type: str, size: int = 0) -> str:
    """A file's type without its parameters. Raises Refused for what is none, and for what is too large."""
    if size > settings.max_attachment_bytes:
        raise Refused(413, f"A file may have {settings.max_attachment_bytes:,} bytes")
    mime_type = mime_type.split(";")[0].strip().lower() or "application/octet-stream"
    if not re.fullmatch(r"[a-z0-9][\w.+-]{0,99}/[a-z0-9][\w.+-]{0,99}", mime_type, re.ASCII):
        raise Refused(400, "mime_type: not a media type")
    return mime_type


# =============================================================================================== Who may call
# Origins, tokens, and what a body may be.

LOOPBACK = re.compile(r"(.+\.)?localhost\.?|(::ffff:)?127(\.\d{1,3}){3}|::1", re.IGNORECASE)  # this machine


class GuardedRoute(APIRoute):
    """A route that only those reach who may, with a body of the kind that it takes.

    A page on another site can post text or a form to localhost without asking, but not JSON.
    """

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle, path = super().get_route_handler(), self.path
        kind = "multipart/form-data" if path.startswith("/attachments") else "application/json"

        async def guarded(request: Request) -> Response:
            settings = request.app.state.chat.settings
            check_origin(request, settings)
            keyed = "{attachment_id}" in path and "key" in request.query_params  # which the route checks
            anybody = keyed or path in ("/", "/component", "/health")
            request.state.caller = Caller("") if anybody else await caller_of(request, settings)
            length = request.headers.get("content-length", request.headers.get("transfer-encoding", "0"))
            given = request.headers.get("content-type", "").split(";")[0].strip().lower()
            if self.body_field and length != "0" and given != kind:
                raise Refused(415, f"The content type must be {kind}")
            await request.app.state.chat.open()
            return await handle(Call(request))

        return guarded


def check_origin(request: Request, settings: Settings) -> None:
    """Keep other sites' pages out. Raises Refused.

    Without a token, being on this machine is all that a caller shows: the connection must have come in over
    loopback, and the Host must say so (another one is DNS rebinding). A test's server has a name, no address.
    """
    server, host = (request.scope.get("server") or ("",))[0], ",".join(request.headers.getlist("host"))
    if not settings.needs_token and re.fullmatch(r"[\d.]+|.*:.*", server):
        if not LOOPBACK.fullmatch(server):
            raise Refused(403, "Without CHATKIT_JWT_SECRET this server answers on loopback only")
        if not LOOPBACK.fullmatch(re.sub(r"(:\d*)?$", "", host).strip("[]")):
            raise Refused(403, "The Host is not a name of this machine")
    foreign = foreign_origin(request.headers, settings.cors_origins)
    if foreign is not None and request.method not in ("GET", "HEAD"):
        raise Refused(403, "Requests from this origin are not allowed: see CHATKIT_CORS_ORIGINS")


def foreign_origin(headers: Headers, listed: Any) -> str | None:
    """The page that a request comes from, where it is neither this server's nor a listed one."""
    origin = headers.get("origin")
    own = origin is None or origin.split("://")[-1].lower() == headers.get("host", "").lower()
    return None if own or str(origin).rstrip("/") in listed else origin


async def caller_of(request: Request, settings: Settings) -> Caller:
    """Who sent a request. Raises Refused (401, 503)."""
    locale = request.headers.get("accept-language", "").split(",")[0].split(";")[0].strip()[:35] or "en"
    shown = {name: text for name, text in request.headers.items() if name not in ("authorization", "cookie")}
    caller = Caller(locale=locale, request_context={"headers": shown, "metadata": {}})
    if not settings.needs_token:
        return caller
    given = ",".join(request.headers.getlist("authorization"))
    bearer = re.fullmatch(r"\s*bearer +(\S{1,8192})\s*", given, re.IGNORECASE)
    if bearer is None:
        raise Refused(401, "A bearer token is required")
    whose = functools.partial(user_of, bearer[1], settings, request.app.state.public_keys)
    user_id = await asyncio.to_thread(whose) if settings.jwks_url else whose()
    return replace(caller, user_id=user_id, by_token=True)


class PublicKeys(jwt.PyJWKClient):
    """The keys at CHATKIT_JWKS_URL (RFC 7517). While it does not answer, the known ones go on to count."""

    known: Any = None

    def fetch_data(self) -> Any:
        try:
            self.known = super().fetch_data()
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError, OSError) as error:
            log.warning("the keys at CHATKIT_JWKS_URL cannot be fetched: %s", error)
            if self.known is None:
                raise Refused(503, "Tokens cannot be checked right now", retry_after=10) from None
        return self.known  # for five minutes


def user_of(token: str, settings: Settings, public_keys: PublicKeys | None) -> str:
    """Whom a JSON Web Token (RFC 7519) names. Raises Refused (401, 503).

    Its header chooses between the secret and the public keys, and each serves its own algorithms alone: a
    public key taken for a secret would let anybody sign.
    """
    try:
        key: Any = None
        algorithm: Any = jwt.get_unverified_header(token).get("alg")
        if algorithm == "HS256":
            key = settings.jwt_secret
        elif public_keys is not None and algorithm in ("EdDSA", "ES256", "RS256"):
            key = public_keys.get_signing_key_from_jwt(token)
        if key is None:
            raise jwt.InvalidKeyError
        audience, issuer = settings.jwt_audience, settings.jwt_issuer
        options: Any = {"require": ["exp"], "verify_aud": audience is not None}
        claims = jwt.decode(token, key, [algorithm], options, audience=audience, issuer=issuer)
    except jwt.ExpiredSignatureError:
        raise Refused(401, "The token has expired") from None
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        log.debug("a token was rejected: %s", type(error).__name__)
        raise Refused(401, "The token is not valid") from None
    user_id = claims.get("sub", claims.get("id"))
    if not isinstance(user_id, str) or not 0 < len(user_id.strip()) < 256 or user_id != storable(user_id):
        raise Refused(401, "The token names no user")
    return user_id


def make_token(settings: Settings, user_id: str) -> str:
    """A signed token for a user that is good for a day. Raises SettingsError without a secret."""
    if not settings.jwt_secret or not user_id.strip():
        raise SettingsError("Set CHATKIT_JWT_SECRET, which signs tokens, and name a user.")
    claims = filled(sub=user_id, aud=settings.jwt_audience, iss=settings.jwt_issuer)
    return jwt.encode({**claims, "exp": int(time.time()) + 24 * 3600}, settings.jwt_secret)


# ===================================================================================================== Bodies
# What goes in and out, as /docs shows it.

Status = Literal["active", "locked", "closed"]


class PlainMessage(BaseModel):
    """The plain dialect: what the person says, and the conversation that it goes on in."""

    message: str = ""
    thread_id: ThreadId | None = None
    model: str | None = None
    tool_choice: str | None = None
    attachments: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _no_slips(cls, given: Row) -> Row:
        """A field that is nearly one of ours would otherwise be ignored, and a new conversation begun."""
        for name in given.keys() - cls.model_fields:
            if hint := _nearest(name, cls.model_fields.keys() - given):
                raise ValueError(f"there is no field {name!r}{hint}")
        return given


class ConversationChange(BaseModel, extra="forbid"):
    """What is given changes."""

    title: Title | None = None
    status: Status | None = None
    status_reason: Annotated[str | None, StringConstraints(strip_whitespace=True, max_length=500)] = Field(
        None, alias="reason"
    )
    metadata: Row | None = None


class AnswersTo(Answers, extra="forbid"):
    item_id: ItemId


class Retry(BaseModel, extra="forbid"):  # or a misspelt message_id would have the wrong things removed
    message_id: ItemId | None = None
    message: str | None = None


class ToolOutput(BaseModel, extra="forbid"):
    result: Any
    id: str | None = None


class ConversationOut(BaseModel):
    id: int
    title: str
    created_at: str
    updated_at: str
    status: Status
    reason: Annotated[str | None, Field(validation_alias="status_reason")]
    metadata: Row


OrAbsent = Annotated[Row | None, Field(exclude_if=lambda value: value is None)]


class MessageOut(BaseModel):
    id: int
    role: Literal["user", "assistant", "tool", "item"]
    content: str
    tool_calls: list[Row] | None
    status: Literal["streaming", "pending", "done", "cancelled", "failed", "interrupted", "blocked"]
    feedback: Literal["positive", "negative"] | None
    created_at: str
    item: OrAbsent
    error: OrAbsent


class TranscriptOut(ConversationOut):
    messages: list[MessageOut]


class ConfigOut(BaseModel):
    title: str
    greeting: str
    starters: list[str]
    model: str
    models: list[str]
    tools: list[dict[str, str]]
    uploads: dict[str, int]
    dictation: bool


TaskOut: Any = create_model("TaskOut", id=int, title=str, done=bool)
FileOut: Any = create_model(
    "FileOut", id=str, type=Literal["file", "image"], name=str, mime_type=str, preview_url=(str | None, None)
)

# What a refused request gets; `message` in the ChatKit dialect only. "4XX" keeps out FastAPI's own 422.
Problem = create_model("Problem", detail=str, message=(str | None, None))
STATUSES = ("4XX", 400, 401, 403, 404, 409, 413, 415, 429, 500, 501, 502, 503)
PROBLEMS: Any = {status: {"model": Problem} for status in STATUSES}

# What a route answers where no model describes it.
A_FILE: Any = {200: {"content": {"text/markdown": {}}}}
ANY_FILE: Any = {200: {"content": {"*/*": {}}}}
EVENTS = (
    'id: 04738dfc-1\ndata: {"type": "thread", "thread_id": 1, "title": "hello"}\n\n'
    'id: 04738dfc-2\ndata: {"type": "text", "content": "Hello", "message_id": 2}\n\n'
    'id: 04738dfc-3\ndata: {"type": "done", "status": "completed", "thread_id": 1, "message_id": 2}\n\n'
    "data: [DONE]\n\n"
)
A_STREAM: Any = {200: {"content": {"text/event-stream": {"example": EVENTS}}}}


def kind_of_body(body: Any) -> str:
    """Which of the bodies of /chatkit this is: an operation of the protocol has a type."""
    kind = str(body.get("type", "plain"))
    if "type" in body and kind not in OPERATIONS:
        raise Refused(400, f"Unknown type {kind[:100]!r}")
    return kind


BODIES: dict[str, Any] = {"plain": PlainMessage, **{name: each.body for name, each in OPERATIONS.items()}}
INPUT = {"content": [{"type": "input_text", "text": "add buy milk to my list"}]}
EXAMPLES: Any = {
    "The plain dialect": {"value": {"message": "add buy milk to my list"}},
    "The ChatKit protocol": {"value": {"type": "threads.create", "params": {"input": INPUT}}},
}
ChatKitBody: Any = Annotated[
    Union[tuple(Annotated[body, Tag(kind)] for kind, body in BODIES.items())],  # noqa: UP007
    Discriminator(kind_of_body),
    Body(openapi_examples=EXAMPLES),
]


# ======================================================================================================= HTTP
# A turn as a stream, and the routes.

COALESCE = 0.008  # seconds between two chunks of flowing text: nobody sees it, a hundred streams feel it
COALESCE_EACH = 0.00025  # or this for each stream that runs, if it is more: a tenth of the CPU at 200 streams


def event_stream(turn: Turn, encode: Encoder, stop_on_leave: bool = False) -> Response:
    """A turn as server-sent events, until it ends or the reader leaves.

    A slow reader holds up nobody: the generator waits for it, and the turn goes on.
    """

    async def chunks() -> AsyncGenerator[bytes, None]:
        try:
            async for events in turn.follow():
                yield encode(events) if events else b": keep-alive\n\n"
                if events and events[-1]["type"] == "text" and turn.phase != "over":
                    await asyncio.sleep(max(COALESCE, COALESCE_EACH * len(turn.chat.turns)))
        finally:
            if stop_on_leave:
                turn.stop("cancelled")

    headers = {"X-Thread-Id": str(turn.conversation_id), "Cache-Control": "no-cache"}
    headers["X-Accel-Buffering"] = "no"  # nginx
    return StreamingResponse(chunks(), media_type="text/event-stream", headers=headers)


# ---- the routes


router = APIRouter(route_class=GuardedRoute, responses=PROBLEMS)
todo_router = APIRouter(route_class=GuardedRoute, responses=PROBLEMS)  # where the built-in assistant answers
CONVERSATION = "/api/conversations/{conversation_id}"
STREAM: Any = {"responses": A_STREAM, "response_class": Response}
FILE: Any = {"response_model": FileOut, "response_model_exclude_unset": True}


async def plain_stream(call: Call, conversation_id: int | None, take: Take, *given: Any) -> Response:
    turn = await call.chat.begin(call.caller, conversation_id, take, *given)
    return event_stream(turn, plain_encoder(turn, call.base))


@router.post("/chatkit", responses=A_STREAM, response_model=Row)
async def post_chatkit(call: Call, body: ChatKitBody) -> Response:
    """Answer a message in the plain dialect, or one request of the ChatKit protocol, which has a `type`."""
    if not isinstance(body, PlainMessage):
        return await operate(call, body)
    tool = ToolChoice(id=body.tool_choice) if body.tool_choice else None
    message = UserMessage(
        content=[TextPart(text=body.message)],
        attachments=body.attachments,
        inference_options=InferenceOptions(model=body.model, tool_choice=tool),
    )
    return await plain_stream(call, body.thread_id, take_message, message)


@router.get(CONVERSATION + "/stream", responses={**A_STREAM, 204: {}}, response_class=Response)
async def get_stream(
    conversation_id: ThreadId, call: Call, last_event_id: Annotated[str | None, Header()] = None
) -> Response:
    """Join the running answer, from its start or after Last-Event-ID; 204 where none runs."""
    await call.chat.conversation(call.user_id, conversation_id)
    turn = call.chat.answering.get(conversation_id)
    if turn is None:
        return Response(status_code=204)
    return event_stream(turn, plain_encoder(turn, call.base, last_event_id))


@router.post(CONVERSATION + "/cancel")
async def post_cancel(conversation_id: ThreadId, call: Call) -> dict[str, str]:
    """Stop the running answer; what was said so far is kept. 409 where none runs."""
    await call.chat.cancel(call.user_id, conversation_id)
    return {"status": "cancelled"}


@router.post(CONVERSATION + "/retry", **STREAM)
async def post_retry(conversation_id: ThreadId, call: Call, body: Retry | None = None) -> Response:
    """Answer a user's message anew, the last one if none is named, with other words if given. All that came
    after it goes."""
    given = body or Retry()
    return await plain_stream(call, conversation_id, take_retry, given.message_id, given.message)


@router.post(CONVERSATION + "/tool_output", **STREAM)
async def post_tool_output(conversation_id: ThreadId, call: Call, body: ToolOutput) -> Response:
    """Give the pending client tool call its result; the agent goes on."""
    return await plain_stream(call, conversation_id, take_tool_output, body.result, body.id)


@router.post(CONVERSATION + "/answers", **STREAM)
async def post_answers(conversation_id: ThreadId, call: Call, body: AnswersTo) -> Response:
    """Answer pending questions, approvals among them, or skip them; the agent goes on."""
    return await plain_stream(call, conversation_id, take_answers, body.item_id, body)


@router.get("/api/conversations", response_model=list[ConversationOut])
async def get_conversations(
    call: Call,
    limit: Annotated[int, Query(ge=1)] = 50,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
    q: Annotated[str, Query(max_length=200)] = "",
) -> list[Row]:
    """The caller's, the most recent first, at most 100; with `q`, those in which all its words occur."""
    return await call.store.search_conversations(call.user_id, q, min(limit, 100), offset)


@router.get("/api/conversations/recent/first", response_model=ConversationOut | None)
async def get_most_recent(call: Call) -> Row | None:
    """The most recent conversation, or null."""
    return next(iter(await call.store.conversations(call.user_id, 1)), None)


@router.get(CONVERSATION, response_model=TranscriptOut, responses=A_FILE)
async def get_conversation(
    conversation_id: ThreadId, call: Call, format: Literal["json", "markdown"] = "json"
) -> Row | Response:
    """A conversation with all its messages, as JSON or as a Markdown file."""
    conversation = await call.chat.conversation(call.user_id, conversation_id)
    page = await call.store.message_page(call.user_id, conversation_id, LAST, "asc", None)
    rows = [shown for row in page if (shown := as_shown(row, call.chat.settings.show_tools))]
    if format == "json":
        messages = [{**row, "item": row["item"] and thread_item(row, call.base)} for row in rows]
        return {**conversation, "messages": messages}
    headers = as_download(conversation["title"][:60] + ".md")
    return Response(markdown(conversation["title"], rows), media_type="text/markdown", headers=headers)


@router.patch(CONVERSATION, response_model=ConversationOut)
async def patch_conversation(conversation_id: ThreadId, call: Call, body: ConversationChange) -> Row:
    """Rename a conversation, lock, close or reopen it, or give it metadata."""
    changes = body.model_dump(exclude_none=True)
    if not changes.keys() - {"status_reason"}:
        raise Refused(400, "Give a title, a status, or metadata")
    return await call.chat.change_conversation(call.user_id, conversation_id, **changes)


@router.delete(CONVERSATION)
async def delete_conversation(conversation_id: ThreadId, call: Call) -> dict[str, str | int]:
    """Stop what is being answered, and remove the conversation with all that belongs to it."""
    await call.chat.delete_conversation(call.user_id, conversation_id)
    return {"status": "deleted", "id": conversation_id}


@router.post("/attachments", **FILE)
async def post_attachment(call: Call, file: UploadFile) -> Row:
    """A direct upload: the field `file` of a form becomes an attachment."""
    data, name = await file.read(), storable((file.filename or "file")[:255])
    mime_type = check_file(call.chat.settings, file.content_type or "", len(data))
    row = await call.store.add_attachment(call.user_id, name, mime_type, len(data), data)
    return attachment_json(row, call.base, data)


@router.post("/attachments/{attachment_id}", **FILE)
async def post_upload(attachment_id: str, call: Call, file: UploadFile, key: str = "") -> Row:
    """The second phase of an upload: the bytes of an announced attachment. The key works once."""
    data, row = await file.read(), await call.store.attachment(attachment_id, key)
    given = {"size": len(data), "mime_type": check_file(call.chat.settings, file.content_type or "")}
    if row is not None and given.items() - row.items():
        raise Refused(400, "The file is not of the size and type that were announced")
    if row is None or not await call.store.fill_attachment(attachment_id, key, data):
        raise Refused(404, "Attachment not found, or uploaded already")
    return attachment_json(row, call.base, data)


@router.get("/attachments/{attachment_id}", response_class=Response, responses=ANY_FILE)
async def get_attachment(attachment_id: str, call: Call, key: str = "") -> Response:
    """A file's bytes, for its owner or whoever has its key. Nothing in it can run in this origin."""
    file = await call.store.attachment(attachment_id, key, call.user_id)
    if file is None or file["data"] is None:
        raise Refused(404, "Attachment not found")
    headers = {"Content-Type": file["mime_type"], "Cache-Control": "private, no-store"}
    safe = {"Content-Security-Policy": "sandbox; default-src 'none'", "X-Content-Type-Options": "nosniff"}
    return Response(file["data"], headers={**as_download(file["name"]), **headers, **safe})


def as_download(name: str) -> dict[str, str]:
    return {"Content-Disposition": f"attachment; filename*=UTF-8''{urllib.parse.quote(name, safe='')}"}


@todo_router.get("/api/tasks", response_model=list[TaskOut])
async def get_tasks(call: Call) -> list[Row]:
    """The to-do list of the built-in assistant."""
    return await call.store.tasks(call.user_id)


@todo_router.patch("/api/tasks/{task_id}", response_model=TaskOut)
async def patch_task(
    task_id: Annotated[int, row_id("Task")], call: Call, done: Annotated[bool, Body(embed=True, strict=True)]
) -> Row:
    """Tick a task, or untick it."""
    return found(await call.store.update_task(call.user_id, task_id, done=done), "Task")


@router.get("/api/config")
async def get_config(call: Call) -> ConfigOut:
    """What a page needs to know."""
    chat, settings = call.chat, call.chat.settings
    return ConfigOut(
        title=settings.title,
        greeting=settings.greeting,
        starters=list(settings.starters or (TODO_STARTERS if chat.is_todo else ())),
        model=chat.agents.model_name,
        models=chat.agents.offered,
        tools=[{"name": name, "description": text} for name, text in chat.agents.tools().items()],
        uploads={"max_bytes": settings.max_attachment_bytes},
        dictation=chat.transcriber is not None,
    )


@router.get("/health")
async def get_health(call: Call) -> dict[str, str]:
    """Whether the database answers; and which model does."""
    await call.store.execute("SELECT 1 FROM conversations LIMIT 1")
    return {"status": "healthy", "model": call.chat.agents.model_name}


@router.get("/", include_in_schema=False)
@router.get("/component", include_in_schema=False)
async def get_page(request: Request) -> Response:
    """The page, or the same conversations in OpenAI's own component, whose script comes from OpenAI.

    The Content-Security-Policy allows the page's own script and style, and that host."""
    of_openai = request.url.path.endswith("/component")
    page, host = (COMPONENT_PAGE, "https://cdn.platform.openai.com") if of_openai else (PAGE, "")
    nonce = secrets.token_urlsafe()
    own, page = f"'nonce-{nonce}'", re.sub("<(style|script)>", rf'<\1 nonce="{nonce}">', page)
    policy = (
        f"default-src 'none'; script-src {own} {host}; style-src {own}; frame-src {host}; "
        "connect-src 'self'; img-src 'self' data: https:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self' http://localhost:* http://127.0.0.1:*"  # of notebooks
    )
    headers = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(page, headers={"Content-Security-Policy": policy, **headers})


# ======================================================================================================== App
# What stands around the routes, and create_app().


async def refuse(request: Request, error: Any) -> Response:
    """The answer to a request that failed. In the ChatKit dialect, what a person's doing led to is an event:
    the real component shows nothing of an HTTP status."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if part not in BODIES)
        error = Refused(400, f"{where}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": "))
    elif isinstance(error, (sqlite3.Error, StoreError)):
        request.app.state.chat.log_failure("the database failed", error)
        error = Refused(503, explain(error)["message"], retry_after=5)
    name, detail = getattr(request.state, "operation", None), str(error.detail)
    known = OPERATIONS.get(str(name))
    if known is not None and known.streams and getattr(error, "by_doing", False):
        event = error_json(detail, error.status_code in (429, 503) or "already" in detail)
        return Response(f"data: {to_json(event)}\n\n", media_type="text/event-stream")
    told = {"message": detail} if name is not None else {}
    return JSONResponse({"detail": detail, **told}, error.status_code, error.headers)


class Doorman(CORSMiddleware):
    """Around everything: other origins, paths with and without a trailing slash, a line for the log."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await super().__call__(scope, receive, send)
        began, status, root = time.monotonic(), 500, scope.get("root_path", "")
        path = scope["path"][len(root) :].rstrip("/") or "/"
        scope = {**scope, "path": root + path, "state": scope.get("state", {})}

        async def noting_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await super().__call__(scope, receive, noting_status)
        finally:
            origin = foreign_origin(Headers(scope=scope), self.allow_origins)
            hint = f" (to let {printable(origin)} in, add it to CHATKIT_CORS_ORIGINS)" if origin else ""
            user = printable(scope["state"].get("caller", Caller("")).user_id) or "-"
            shown, ms = printable(path), (time.monotonic() - began) * 1000
            level = logging.WARNING if origin else logging.INFO  # a warning is seen whatever the logging
            log.log(level, "%s %s %d %.0fms user=%s%s", scope["method"], shown, status, ms, user, hint)


def create_app(
    agent: AgentSource = None,
    *,
    settings: Settings | None = None,
    store: Store | None = None,
    on_action: ActionHandler | None = None,
    on_feedback: FeedbackHandler | None = None,
    transcribe: Transcriber | None = None,
    lifespan: Callable[[FastAPI], contextlib.AbstractAsyncContextManager[Any]] | None = None,
    **overrides: Any,
) -> FastAPI:
    """The application, ready for uvicorn, a test client, or mounting in another one.

        app = create_app(my_agent, database=":memory:")

    `agent` is an Agent of the SDK's; a function of the TurnContext that returns one; an async generator
    function answer(context, history) that yields text or events; or nothing: the to-do assistant. `settings`
    are Settings.from_env() if not given, `overrides` fields of them. `store` is one of your own, opened here
    unless it is open. `on_action(context, action, item)` deals with clicks in widgets: `action` is {"type",
    "payload"}, `item` the widget's thread item or None; ValueError and LookupError refuse it.
    `on_feedback(context, items, kind)` hears of thumbs. `transcribe(audio, media_type)` makes text of
    recordings, which OpenAI does else, with its key. `lifespan` is FastAPI's. Raises SettingsError.
    """
    check_arguments(settings=settings, lifespan=lifespan)
    settings = Settings(**{**dict(settings), **overrides}) if settings else Settings.from_env(**overrides)
    if store is not None and "database" in overrides:
        raise SettingsError("store and database are two files: give one of them.")
    chat = Chat(settings, agent, store, on_action=on_action, on_feedback=on_feedback, transcribe=transcribe)
    set_tracing_disabled(not settings.tracing)

    @contextlib.asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[Any]:
        async with contextlib.AsyncExitStack() as stack:
            await chat.open()  # first: the app's own lifespan may need the store
            stack.push_async_callback(chat.close)
            yield await stack.enter_async_context(lifespan(app)) if lifespan else None

    routes = [*router.routes, *(todo_router.routes if chat.is_todo else ())]
    app = FastAPI(title=settings.title, version="2", redoc_url=None, lifespan=living, routes=routes)
    app.state.chat = chat
    # An unknown key has it ask again, but not for each that somebody makes up.
    keys = PublicKeys(settings.jwks_url, timeout=5, cooldown_duration=10) if settings.jwks_url else None
    app.state.public_keys = keys
    allowed: Any = {"allow_methods": ["*"], "allow_headers": ["*"], "allow_credentials": True}
    exposed = ["X-Thread-Id", "Retry-After"]
    app.add_middleware(Doorman, allow_origins=settings.cors_origins, expose_headers=exposed, **allowed)
    for failure in (HTTPException, RequestValidationError, StoreError, sqlite3.Error):
        app.add_exception_handler(failure, refuse)
    return app


# ======================================================================================================= Page
# The built-in web page: one file of HTML, CSS and JavaScript, and a whole client for the plain dialect.

PAGE = r"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>ChatKit</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:image/gif;base64,R0lGODlhAQABAIAAAAtuZv///ywAAAAAAQABAAACAkQBADs=">
<style>
:root { color-scheme: light dark; --bg: light-dark(#fff, #1b1c1d); --side: light-dark(#f7f7f5, #151617);
  --line: light-dark(#e0dfda, #383a3c); --text: light-dark(#222, #e8e7e4); --soft: light-dark(#ecf1f0, #233);
  --secondary: light-dark(#666, #a5a39e); --accent: light-dark(#0b6e66, #74cfc3);
  --danger: light-dark(#a8201a, #ffa69e); --warning: light-dark(#855300, #eec46f); overflow-wrap: anywhere; }
* { box-sizing: border-box; unicode-bidi: plaintext; } .quiet, .foot, #actions { color: var(--secondary); }
body { margin: 0; height: 100dvh; display: flex; overflow: hidden; font: 1rem/1.6 system-ui, sans-serif; }
body, nav { background: var(--bg); color: var(--text); accent-color: var(--accent); }
[hidden], .item:empty, ul:empty, .row:empty, [aria-busy=true] .retry, [aria-busy=true] > :last-child .foot,
.item:has(~ .item:not(:empty, .notice)) .retry { display: none !important; }
button, input, select, textarea, fieldset, .tool, .notice, .code, .card, .list, #box {
  font: inherit; color: inherit; border: 1px solid var(--line); border-radius: .7rem; background: var(--bg); }
button { cursor: pointer; padding: .3rem .8rem; } textarea, select, input { padding: .45rem .7rem; }
:disabled, #box:has(ul:empty + :placeholder-shown) [aria-label=Send] { opacity: .5; cursor: default; }
:where(button, nav a, .entry[role]):hover, [aria-current], [aria-pressed=true] { background: var(--soft); }
button.primary { background: var(--accent); border-color: var(--accent); color: var(--bg); }
:is(.foot, .chips, .code, #actions) button, #attach { border: 0; padding: .2rem .5rem; font-size: .875rem; }
textarea, .chips { max-height: 40dvh; overflow: auto; } textarea { field-sizing: content; resize: none; }
textarea, input:not([type=checkbox], [type=radio]) { width: 100%; } a { color: var(--accent); }
.quiet, .tool, .chips, #composer p { font-size: .875rem; margin: 0; } h1 { font-size: 1rem; margin: 0; }
label, header, .row, .entry, .chips, .chips li, #box { display: flex; gap: .6rem; align-items: center; }
nav a, h1 { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
/* The side panel: a popover on narrow screens (Esc and a click outside close it), a column on wide ones. */
nav { position: fixed; inset: 0 auto 0 0; width: 17rem; height: 100dvh; margin: 0; padding: 1rem; border: 0;
  background: var(--side); flex-direction: column; gap: .7rem; overflow-y: auto; }
nav a { display: block; flex: none; color: inherit; text-decoration: none; border-radius: .7rem; }
nav ul, .chips { list-style: none; margin: 0; padding: 0; } nav a, #brand { padding: .35rem .6rem; }
nav:popover-open { display: flex; } ::backdrop { background: #0006; }
@media (min-width: 50rem) { nav { position: static; display: flex; flex: none; } #menu { display: none; } }
/* The conversation. The scroller counts from its end, and so it stays there. */
main, .card, .col, [data-type=user] { display: flex; flex-direction: column; min-width: 0; } main { flex: 1; }
header { padding: .6rem 1.25rem; flex-wrap: wrap; } header h1 { flex-basis: 9rem; }
#banner { margin: 0; padding: .4rem; text-align: center; color: var(--warning); background: var(--side); }
#scroller { flex: 1; overflow: hidden auto; display: flex; flex-direction: column-reverse; }
#scroller > *, #composer { max-width: 46rem; margin: 0 auto auto; width: 100%; padding: 0 1.25rem .75rem; }
[data-type=user] { align-items: flex-end; } #welcome { text-align: center; padding-top: 14vh; }
.user { max-width: 85%; padding: .6rem 1rem; background: var(--soft); border-radius: 1.2rem 1.2rem .3rem; }
#log > .item { margin: 1.25rem 0; } .user, .notice, fieldset, #thinking { white-space: pre-wrap; }
@media (hover: hover) { .item:not(:hover, :focus-within, :last-child) .foot { opacity: 0; } }
.md :is(p, ul, ol, blockquote, .table), .code { margin: 0 0 .75rem; white-space: pre-line; }
.md :is(ul, ol, blockquote) { padding-left: 1.5rem; } blockquote { border-left: 3px solid var(--line); }
.md :is(h3, h4, h5, h6) { font-size: 1.1rem; margin: 1.25rem 0 .5rem; } .code { background: var(--side); }
.md li :is(ul, ol), .md > :last-child { margin-bottom: 0; } .code > div { padding: .3rem .4rem .3rem 1rem; }
img { max-width: 100%; max-height: 32rem; border-radius: .7rem; object-fit: cover; } sup { line-height: 0; }
.chips { flex-wrap: wrap; } .chips img { height: 5rem; } .table { overflow: auto; overflow-wrap: break-word; }
td, th { padding: .35rem 1.5rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; }
code, pre { font: .875rem/1.5 ui-monospace, Menlo, Consolas, monospace; } table { border-collapse: collapse; }
pre { margin: 0; padding: .8rem 1rem; max-height: 30rem; overflow: auto; white-space: pre-wrap; }
.code button, #send { margin-left: auto; } summary { padding: .45rem .9rem; cursor: pointer; }
.tool > :not(summary) { margin: .2rem .9rem .7rem; } q { display: block; color: var(--secondary); }
.notice, fieldset { border-left: 3px solid var(--accent); padding: .7rem 1rem; margin: 0; }
.warning { border-left-color: var(--warning); } .danger { border-left-color: var(--danger); }
:is(fieldset, #welcome) button { margin: .3rem .5rem .3rem 0; } fieldset > div + * { margin-top: .9rem; }
.card, .col { gap: .5rem; } .card { padding: 1rem; } .card, .list { max-width: 34rem; } .spacer { flex: 1; }
.list > *, .list > details > * { padding: .6rem 1rem; } .list > details { padding: 0; }
:is(.list, .list > details) > * + * { border-top: 1px solid var(--line); }
.widget :is(p, h3, hr) { margin: 0; } .widget :is(button, .badge) { flex: none; } hr { width: 100%; }
.row:has(> button) { flex-wrap: wrap; } :is(.card, .col) > :is(button, .badge) { align-self: flex-start; }
.badge { border-radius: .4rem; padding: 0 .5rem; background: var(--soft); } .widget * { max-width: 100%; }
.item[aria-busy=true] > * { opacity: .6; pointer-events: none; } .entry[role] { cursor: pointer; }
/* The composer */ #composer p { margin-bottom: .5rem; } #problem { color: var(--danger); }
#box { flex-wrap: wrap; gap: .3rem; padding: .4rem; } #box:focus-within { border-color: var(--accent); }
#input { flex: 1; border: 0; outline: 0; padding: .35rem .6rem; } #box select { border: 0; max-width: 35%; }
#files, #box:has(select:not([hidden])) #input { flex-basis: 100%; } #locked { color: var(--warning); }
#send { border-radius: 50%; width: 2.3rem; height: 2.3rem; padding: 0; } #note { text-align: center; }
#announce { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
</style></head><body>
<nav id="sidebar" popover aria-label="Conversations"><b id="brand"></b><a href="#/">+ New conversation</a>
  <input id="search" type="search" placeholder="Search" aria-label="Search conversations" autocomplete="off">
  <ul id="list"></ul><p id="nothing" class="quiet" role="status"></p></nav>
<main><header><button id="menu" popovertarget="sidebar" aria-label="Conversations">&#9776;</button>
    <h1 id="title"></h1><span id="model" class="quiet" title="The model that answers" hidden></span>
    <span id="actions"><button id="rename">Rename</button><button id="save">Export</button><button
      id="remove">Delete</button></span></header><p id="banner" role="status" hidden></p>
  <div id="scroller" role="log" aria-live="off" aria-label="Messages" tabindex="0">
    <div><div id="welcome" hidden><h2 id="greeting"></h2><div id="tries"></div></div>
      <div id="log"></div><p id="thinking" class="quiet" hidden></p></div></div>
  <div id="composer"><p id="problem" role="alert" hidden></p><p id="locked" role="status" hidden></p>
    <div id="box"><input id="file" type="file" multiple hidden title="File"><ul id="files" class="chips"></ul>
      <textarea id="input" rows="1" placeholder="Write a message" aria-label="Message" autofocus></textarea>
      <button id="attach">Attach</button><select id="models" aria-label="Model" hidden></select>
      <select id="tools" aria-label="Tool" hidden></select><button id="send" class="primary"></button></div>
    <p id="note" class="quiet" hidden>This is the built-in demo. To use a real model, set OPENAI_API_KEY,
      GEMINI_API_KEY or CHATKIT_MODEL and start again.</p></div></main><p id="announce" role="status"></p>
<script>"use strict"; // No library. What is stored is drawn as it is loaded, and again after each event.
const base = location.pathname.replace(/\/?$/, "/"); // whatever prefix the server is mounted under
const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms)), THINKING = "Thinking…\n";
let config = {}, shown = {}; // the open conversation: its id, title, whether it is busy, ...
// Every node is made here, of properties and text. Nothing is parsed as HTML, so nothing written can run.
function el(tag, props, ...children) { // "p.quiet" is a p of the class quiet
  const [name, className = ""] = tag.split("."), node = document.createElement(name);
  node.append(...children.flat(Infinity).filter((child) => child || child === 0));
  return Object.assign(node, { className }, props);
}
const quiet = (text, tag = "p") => text && el(`${tag}.quiet`, {}, text);
const show = (node, text) => Object.assign(node, { textContent: text, hidden: !text });
const complain = (error) => show(page.problem, error.message) && error;
const link = (href, ...label) => href ? el("a", { href, target: "_blank", rel: "noopener" }, label) : label;
const push = (label, onclick, props) => el("button", { type: "button", onclick, ...props }, label);
// ---------- Requests ----------
const tokenKey = `chatkit token ${base}`; // in sessionStorage, which is this tab's alone
let mayAsk = true; // for a token: once dismissed, not before the person does something again
onkeydown = onpointerdown = () => { mayAsk = true; };
async function api(path, method = "GET", body) { // throws: an error with a status is the server's refusal
  const isForm = body instanceof FormData, headers = isForm ? {} : { "Content-Type": "application/json" };
  const options = { method, headers, body: isForm ? body : JSON.stringify(body), cache: "no-store" };
  for (;;) {
    const token = sessionStorage.getItem(tokenKey);
    if (token) headers.Authorization = `Bearer ${token}`;
    const response = await fetch(base + path, options), { status } = response;
    if (response.ok && method !== "GET" && !isForm) show(page.problem, ""); // what it said is over
    if (response.ok) return response;
    const { detail = `The server's status is ${status}.` } = await response.json().catch(() => ({}));
    if (status !== 401) throw refusal(detail, status);
    if (token !== sessionStorage.getItem(tokenKey)) continue; // another request has asked meanwhile
    const given = mayAsk && prompt(token ? detail : "This server asks for a token. It stays in this tab.");
    mayAsk = typeof given === "string";
    if (!mayAsk) throw complain(refusal("To give a token, send a message or load the page again.", status));
    sessionStorage.setItem(tokenKey, given.replace(/[^!-~]/g, "")); // what a header can carry
    if (!config.title) reopen(shown); // nothing was there without it
  }
}
const refusal = (message, status) => Object.assign(new Error(message), { status });
const getJson = async (path) => (await api(path)).json();
const here = (path = "") => `api/conversations/${shown.id}${path}`;
const operate = (type, params) => // in ChatKit's dialect
  api("chatkit", "POST", { type, params: { thread_id: String(shown.id), ...params } });
function configure(given) {
  const { title, greeting, starters, model, models, tools } = config = given;
  const offer = (node, none, names) => Object.assign(node, { hidden: !names.length }).replaceChildren(
    ...["", ...names].map((value) => el("option", { value, selected: value === node.value }, value || none)));
  offer(page.models, model, models.length > 1 ? models.filter((name) => name !== model) : []);
  offer(page.tools, "Any tool", tools.map(({ name }) => name));
  page.tries.replaceChildren(...starters.map((text) => push(text, () => send(text))));
  [page.brand.textContent, page.greeting.textContent, page.note.hidden] = [title, greeting, model !== "demo"];
  show(page.model, page.models.hidden && model);
  setThread({});
}
// A plain stream ends at [DONE], ChatKit's, which has no view, by closing. What breaks off before, throws.
async function* readEvents(response, view) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  if (view) view.reader = reader;
  for (let buffer = "", read = {}; !read.done;) {
    const silence = setTimeout(() => reader.cancel(), 60_000);
    read = await reader.read().finally(() => clearTimeout(silence));
    const lines = (buffer + (read.value ?? "")).split("\n");
    buffer = lines.pop();
    for (const line of lines.filter((each) => each.startsWith("data: ")))
      if (line === "data: [DONE]") return; else yield JSON.parse(line.slice(6));
  }
  if (view) throw new Error("The stream broke off");
}
const download = (path, name) => api(path).then(async (response) =>
  el("a", { href: URL.createObjectURL(await response.blob()), download: name }).click()).catch(complain);
// ---------- Markdown: what a text and a line consist of, and how what a pattern caught is drawn ----------
const ITEM = "[ \\t]*(?:[-*+]|\\d{1,9}[.)]) ", BEGIN = `${ITEM}|#{1,6} |>|\\||[ \\t]*(?:\`{3}|~{3})`;
const nested = (tag) => (text) => el(tag, {}, inline(text));
const BLOCKS = [
  [/^([ \t]*)(?<fence>`{3,}|~{3,})([^`\n]*)$\n?([^]*?)(?:^[ \t]*\k<fence>[ \t]*$|(?![^]))/, codeBlock],
  [/^(#{1,6}) (.+)$/, (marks, text) => nested(`h${Math.min(6, marks.length + 2)}`)(text)],
  [/((?:^>(?![> ]{16}).*\n?)+)/, (text) => el("blockquote", {}, blocks(text.replace(/^> ?/gm, "")))],
  [/((?:^\|.*\n?)+)/, tableOf], [/^(?:-{3,}|\*{3,})[ \t]*$/, () => el("hr")],
  [new RegExp(`(^${ITEM}.*(?:\\n\\s*(?=${ITEM}|[ \\t]{2,}\\S).*|\\n(?!${BEGIN}).*\\S.*)*)`), listOf],
  [new RegExp(`(^.*\\S.*(?:\\n(?!${BEGIN}).*\\S.*)*)`), nested("p")]];
const SPANS = [[/\\([!-/:-@[-`{-~])/, (text) => text], [/~~(?=\S)(.+?)~~/, nested("s")],
  [/(?<!`)(?<ticks>`{1,2})(?!`)(.+?)(?<!`)\k<ticks>(?!`)/, (ticks, text) => el("code", {}, text)],
  [/\*\*(?=\S)(.+?)\*\*(?!\*)/, nested("strong")], [/(?<!\w)__(?=\S)(.+?)__(?!\w)/, nested("strong")],
  [/\*(?=[^\s*])([^*]*[^\s*])\*/, nested("em")], [/(?<!\w)_(?=[^\s_])([^_]*[^\s_])_(?!\w)/, nested("em")],
  [/!\[([^[\]]*)\]\(([^\s()]+)[^()\n]*\)/, (alt, src) => picture(src, alt)],
  [/\[\^(\d+)\](?:\((https?:\/\/(?:[^\s()]|\([^\s()]*\))+)\))?/, (n, href) => el("sup", {}, link(href, n))],
  [/\[([^[\]]+)\]\((https?:\/\/(?:[^\s()]|\([^\s()]*\))+)\)/, (label, href) => link(href, inline(label))],
  [/(https?:\/\/(?:[^\s<>()]*(?:\([^\s<>()]*\)|[^\s<>.,:;!?'"()\]*_]))+)/, (href) => link(href, href)],
  [/((?:(?!https?:)[^\\`~*_![])+|.)/, (text) => text]];
const finder = (table, flags) => { // finds what a text consists of, with what draws each
  const any = new RegExp(table.map(([{ source }], i) => `(?<is${i}>${source})`).join("|"), `g${flags}`);
  return (text) => [...text.matchAll(any)].map(({ 0: source, groups }) => {
    const [pattern, drawing] = table.find((_, i) => groups[`is${i}`] !== undefined);
    return { source, make: () => drawing(...new RegExp(pattern, flags).exec(source).slice(1)) };
  });
};
const findBlocks = finder(BLOCKS, "m"), findSpans = finder(SPANS, "s");
const blocks = (text) => findBlocks(text).map(({ make }) => make());
const inline = (text) => findSpans(text).map(({ make }) => make());
function paint(node, text) { // of a text that grows, only what changed is made anew
  const found = findBlocks(text.replaceAll("\r", "")), old = [...node.children];
  const same = [...found, {}].findIndex(({ source }, i) => !source || source !== old[i]?.source);
  for (const each of old.slice(same)) each.remove();
  node.append(...found.slice(same).map(({ source, make }) => Object.assign(make(), { source })));
  return node;
}
const markdown = (text = "") => paint(el("div.md"), text);
function listOf(text) { // an item's first line, and what is indented below it
  const [, indent, start] = /^([ \t]*)(\d*)/.exec(text), deeper = `(?![ \\t]{${indent.length + 2}})`;
  const items = text.split(new RegExp(`\\n\\s*?(?=^${deeper}${ITEM})`, "m"));
  return el(start ? "ol" : "ul", start && { start }, items.map((item) => {
    const [, first, rest] = /^\s*\S+ (.*)([^]*)$/.exec(item);
    return el("li", {}, inline(first), blocks(rest));
  }));
}
const table = (rows) => el("div.table", { tabIndex: 0 }, el("table", {}, rows));
const grid = (rows) =>
  table(rows.map((row, i) => el("tr", {}, row.map((cell) => el(i ? "td" : "th", {}, cell)))));
function tableOf(text) {
  const rows = text.trimEnd().split("\n").map((row) => row.replace(/^\||\| *$/g, "").split(/(?<!\\)\|/));
  const isTable = rows[1] && rows.splice(1, 1)[0].every((cell) => /^ *:?-+:? *$/.test(cell));
  return !isTable ? nested("p")(text)
    : grid(rows.map((row) => row.map((cell) => inline(cell.trim().replaceAll("\\|", "|")))));
}
function codeBlock(indent, fence, language, text) {
  const code = `\n${text}`.replaceAll(`\n${indent}`, "\n").slice(1).replace(/\n$/, "");
  return el("div.code", {}, el("div.row quiet", {}, language.trim() || "code", copier(code)),
    el("pre", { tabIndex: 0 }, el("code", {}, code)));
}
const copier = (text) => push("Copy", async ({ target: node }) => { // plain http has no clipboard
  node.textContent = await navigator.clipboard?.writeText(text).then(() => "Copied", () => 0) || "Not copied";
});
function picture(src, alt = "") { // one from elsewhere, once the person has asked for it
  const { origin, protocol, host, href } = URL.parse(src, location.origin + base) ?? {};
  const image = () => el("img", { alt, title: alt, src: href });
  if (origin === location.origin || protocol === "data:") return image();
  const ask = push(`Show picture from ${host}: ${alt}`, () => ask.replaceWith(image()));
  return protocol === "https:" ? ask : alt;
}
// ---------- Widgets: from the type of a component to its drawing ----------
let drawn = ""; // the id of the item that is being drawn: its fields' ids are those of no other
const kids = ({ children = [] }) => [children].flat().filter(Boolean).map(widget);
const stack = (tag) => (w) => el(tag, {}, w.value ?? w.label, kids(w));
const along = (tag) => (w) => stack(`${tag}.${w.direction === "row" ? "row" : "col"}`)(w);
const headed = ({ status }) => status && el("p.quiet", {}, mark(status.icon), status.text);
const MARKS = { check: "✓", star: "★", mail: "✉", plus: "+", info: "i", play: "▶", write: "✎" };
const mark = (name) => name && el("span", { title: name }, MARKS[name.split("-")[0]] ?? "•", " ");
const field = (tag, { name, label, placeholder = "", required, disabled, defaultValue }, props, inner) =>
  el(tag, { id: `${drawn}/${name}`, name, placeholder, title: label ?? (placeholder || name), required,
    disabled, value: defaultValue ?? "", ...props }, inner ?? []);
const ticked = (w, { value = "", ...props }) => el("label", {}, // a radio button's id is its own
  field("input", w, { id: `${drawn}/${w.name}${value}`, value, ...props }), w.label);
const WIDGETS = { __proto__: null, // so that no unknown type is found
  Card: ({ confirm, cancel, ...w }) => el("div.card", {}, headed(w), kids(w), el("div.row", {},
    confirm && WIDGETS.Button({ label: confirm.label, style: "primary", submit: true }),
    cancel && widget({ type: "Button", label: cancel.label, onClickAction: cancel.action }))),
  ListView({ limit, ...w }) {
    const items = kids(w), rest = items.splice(limit > 0 ? limit : limit === "auto" ? 10 : items.length);
    const more = rest.length > 0 && el("details", {}, el("summary", {}, `${rest.length} more`), rest);
    return el("div.list", {}, headed(w), items, more);
  },
  ListViewItem: (w) => el("div.entry", w.onClickAction && { role: "button", tabIndex: 0 }, kids(w)),
  Basic: stack("div.col"), Col: stack("div.col"), Row: stack("div.row"), Spacer: stack("div.spacer"),
  Box: along("div"), Form: along("form"), Title: stack("h3"), Caption: stack("p.quiet"), Divider: stack("hr"),
  Badge: stack("span.badge"), Image: ({ src, alt }) => src && picture(src, alt),
  Text: (w) => w.editable ? field("input", { ...w.editable, defaultValue: w.value }) : el("p", {}, w.value),
  Markdown: (w) => markdown(w.value), Icon: ({ name }) => mark(name),
  Label: ({ value, fieldName }) => el("label", { htmlFor: `${drawn}/${fieldName}` }, value),
  Button: ({ label, iconStart, iconEnd, style = "", submit, disabled }) => el(`button.${style}`, { disabled,
    type: submit ? "submit" : "button", title: label ?? iconStart }, mark(iconStart), label, mark(iconEnd)),
  Checkbox: (w) => ticked(w, { type: "checkbox", checked: w.defaultChecked }),
  RadioGroup: ({ options = [], ...w }) => el("div.row", {}, options.map(({ value, label }) =>
    ticked({ ...w, label }, { type: "radio", value, checked: value === w.defaultValue }))),
  Select: ({ options = [], ...w }) => field("select", w, {}, [{ value: "", label: w.placeholder }, ...options]
    .map(({ value, label, disabled }) => el("option", { value, disabled }, label))),
  Input: (w) => field("input", w, { type: w.inputType ?? "text" }), Textarea: (w) => field("textarea", w),
  DatePicker: (w) => field("input", w, { type: "date", value: w.defaultValue?.slice(0, 10) ?? "" }),
  Chart: ({ data = [], series = [], xAxis }) => grid([
    ["", ...series.map(({ label, dataKey }) => label ?? dataKey)],
    ...data.map((row) => [row[xAxis?.dataKey ?? xAxis], ...series.map(({ dataKey }) => row[dataKey])])]),
  Table: (w) => table(kids(w)), "Table.Row": stack("tr"), "Table.Cell": stack("td") };
const px = (value, unit = 1) => typeof value === "number" ? `${value * unit}px` : value;
// Its looks go through CSSOM, which leaves out what it does not know; none of these loads anything.
function widget({ size, width = size, height = size, padding, ...w }) {
  const node = (WIDGETS[w.type] ?? stack("div.col"))(w);
  Object.assign(node?.style ?? {}, { width: px(width), height: px(height), flex: w.flex, gap: px(w.gap, 4),
    paddingBlock: px(padding?.y ?? padding, 4), paddingInline: px(padding?.x ?? padding, 4),
    alignItems: w.align, justifyContent: w.justify?.replace(/between|around|evenly/, "space-$&"),
    color: w.color && `var(--${w.color})`, background: w.background && "var(--side)", textAlign: w.textAlign,
    fontSize: w.value && { sm: "small", lg: "large", xl: "x-large" }[size], fontStyle: w.italic && "italic",
    fontWeight: `${w.weight}`.replace("semi", ""), textDecoration: w.lineThrough && "line-through" });
  for (const kind of ["Click", "Change", "Submit"])
    if (node && w[`on${kind}Action`]) node[`on${kind.toLowerCase()}`] = acting(w[`on${kind}Action`]);
  return node;
}
const CONTROLS = "a, button, label, input, select, textarea, [role=button]";
// Sends what was done in a widget, with the values of the fields around it, and draws what comes of it.
const acting = ({ type, payload, handler }) => (event) => {
  const { target, currentTarget: node } = event, view = shown, fields = {}, item = node.closest(".item");
  if (event.type === "click" && target.closest(CONTROLS) !== node) return; // another one within an entry
  if (item.ariaBusy === "true") return; // one at a time
  event.stopPropagation();
  if (handler === "client") return complain({ message: `“${type}” is for a frontend of yours.` });
  for (const { name, type, value, checked } of node.closest("form, .entry").querySelectorAll("[name]"))
    if (type !== "radio" || checked) fields[name] = type === "checkbox" ? checked : value;
  page.log.querySelectorAll(".item.notice").forEach((notice) => notice.remove());
  const action = { type, payload: Object.keys(fields).length ? { ...payload, ...fields } : payload };
  item.ariaBusy = "true";
  operate("threads.custom_action", { item_id: String(item.row.id), action }).then(async (response) => {
    for await (const told of readEvents(response)) if (view.id === shown.id) await happen(told);
  }).catch(complain).finally(() => {
    item.ariaBusy = "false";
    if (!shown.busy) think("");
  });
};
page.log.addEventListener("submit", (event) => event.preventDefault(), true); // what is sent, a script sends
// ---------- Items: from the type of a stored item to its drawing ----------
const nodeOf = (id) => document.getElementById(`item-${id}`);
const rowsShown = () => [...page.log.children].flatMap(({ row }) => row ?? []);
const oncePerFrame = (node, task) => node.frame ??= requestAnimationFrame(() => task(node.frame = null));
function draw(row) { // new or changed; at most once per frame
  const node = nodeOf(row.id) ?? page.log.insertBefore(el("div.item", { id: `item-${row.id}` }),
    [...page.log.children].find((each) => each.row?.id > row.id) ?? null);
  node.row = { usage: node.row?.usage, ...row };
  oncePerFrame(node, () => {
    const { role, item } = node.row, json = JSON.stringify(node.row);
    drawn = node.row.id;
    const type = node.dataset.type = ["user", "assistant"].includes(role) ? role : item?.type ?? role;
    if (json !== node.json) renew(node, [ITEMS[type]?.(node.row, item, node), tail(node.row)]);
    node.json = json;
  });
}
function renew(node, given) { // puts other nodes in; what had the focus has it again, what was open is open
  const nodes = given.flat(Infinity).filter(Boolean), folds = () => [...node.querySelectorAll("details")];
  const controls = () => [...node.querySelectorAll(`${CONTROLS}, summary`)];
  const at = controls().indexOf(document.activeElement), wereOpen = folds().map(({ open }) => open);
  for (const old of [...node.childNodes]) if (old !== nodes[0]) old.remove(); // that is a text which grows
  node.append(...nodes.filter((each) => each !== node.firstChild));
  folds().forEach((fold, i) => { fold.open ||= wereOpen[i]; });
  if (at >= 0) (controls()[at] ?? page.scroller).focus({ preventScroll: true });
}
function cited(text, notes = []) { // the text with the numbers of its sources, and those, each once
  const letters = [...text], keyOf = ({ url, title }) => url ?? title;
  const sources = new Map(notes.map(({ source }) => [keyOf(source), source])), keys = [...sources.keys()];
  for (const { index, source } of notes.toSorted((a, b) => b.index - a.index)) if (index >= 0)
    letters.splice(index, 0, "\u200a", // so thin a space ends an address before it
      `[^${keys.indexOf(keyOf(source)) + 1}]`, source.url ? `(${source.url})` : "");
  return [letters.join(""), listed([...sources.values()])];
}
const listed = (sources = []) => sources.length > 0 && el("ol.quiet", {}, sources.map(
  ({ url, title, filename }) => el("li", {}, link(/^https?:/.test(url) && url, title || filename || url))));
const RUNNING = "running…", line = (name, state, ...body) => // what happens, and where it opens, more of it
  el("details.tool", {}, el("summary", {}, name, " ", quiet(state, "span")), body);
const data = (label, value) => value !== undefined && value !== "" && [quiet(label),
  el("pre", { tabIndex: 0 }, typeof value === "string" ? value : JSON.stringify(value, null, 2))];
const called = (name, state, args, result) =>
  line(el("code", {}, name), state, data("Arguments", args), data("Result", result));
const taskLine = ({ type, title, title_query, content, queries, sources, status_indicator: state }) =>
  line(title ?? title_query ?? type.replace("_", " "), state === "loading" ? RUNNING : "",
    content && markdown(content), quiet(queries?.join(", ")), listed(sources));
const fileNode = ({ id, name, preview_url: src }) =>
  src ? el("img", { src, alt: name, title: name }) : push(name, () => download(`attachments/${id}`, name));
const ITEMS = { __proto__: null, user: ({ id, content }, item) => [
    item?.attachments?.length > 0 && el("div.chips", {}, item.attachments.map(fileNode)),
    el("div.user", {}, item?.quoted_text && el("q", {}, item.quoted_text), content),
    el("div.foot", {}, push("Edit", () => { // until what is in the box is sent, or removed
      if (page.input.value && !confirm("This replaces what is in the box.")) return;
      Object.assign(page.input, { value: content, editing: id }).focus();
    }))],
  assistant({ id, content, feedback }, item, node) {
    const [text, sources] = cited(content, item?.content[0]?.annotations), item_ids = [String(id)];
    const rate = (kind) => operate("items.feedback", { item_ids, kind }).then(load).catch(complain);
    const anew = () => confirm("Have this answered anew? What came after it goes.") && begin(here("/retry"),
      { message_id: rowsShown().findLast((row) => row.role === "user" && row.id < id).id });
    const thumb = (label, kind) => push(label, () => rate(kind), { ariaPressed: String(feedback === kind) });
    return [paint(node.body ??= el("div.assistant md"), text), sources, el("div.foot", {}, copier(content),
      thumb("Good", "positive"), thumb("Bad", "negative"), push("Answer anew", anew))];
  },
  tool: ({ tool_calls: [{ name, args }], status, content }) => status !== "pending" && // or a question
    called(name, { done: "done", streaming: RUNNING }[status] ?? "stopped", args, content),
  client_tool_call: (row, { name, status, arguments: args, output }) =>
    called(name, status === "pending" ? "waits for a frontend that has this tool" : "done", args, output),
  task: (row, { task }) => taskLine(task),
  workflow({ status }, { workflow: { type, tasks, summary, expanded: open } }) {
    if (type === "reasoning" && status === "streaming") return []; // it is told as it grows
    const took = summary?.duration !== undefined ? `Thought for ${summary.duration} s` : tasks.at(-1)?.title;
    const steps = tasks.map((task) => type === "reasoning" ? markdown(task.content) : taskLine(task));
    const state = summary || ENDED[status] ? "" : RUNNING;
    return Object.assign(line(summary?.title ?? took ?? "Thinking", state, steps), { open });
  },
  widget(row, { widget: root, copy_text }) { // all of it a form, which a Card confirms
    const node = el("form.widget", { onsubmit: root.confirm && acting(root.confirm.action) }, widget(root));
    return node.querySelector("img, input") || node.textContent ? node : quiet(copy_text);
  },
  generated_image: (row, { image }) => image && picture(image.url, "Generated picture"),
  structured_input: ({ id }, { status, inputs }) => status === "pending" ? questions(id, inputs)
    : inputs.map(({ question, answer }) =>
      el("p.quiet", {}, el("b", {}, `${question} `), answer?.values?.join(", ") || "Skipped")) };
const ENDED = { cancelled: "Stopped", interrupted: "Interrupted", failed: "The answer failed",
  blocked: "Blocked: the model is not shown this message" };
function tail({ role, status, error, usage }) { // how the turn ended here, if it did
  const again = error?.allow_retry ?? (role === "user" || ["failed", "interrupted"].includes(status));
  const retry = again && el("button.retry", { onclick: () => begin(here("/retry")) }, "Retry");
  return [!(error && status === "failed") && quiet(ENDED[status]),
    error ? el("div.notice danger", { role: "alert" }, `${error.message} `, retry) : retry,
    usage?.input_tokens > 0 && quiet(`${usage.input_tokens} tokens in, ${usage.output_tokens} out`, "span")];
}
function questions(item_id, inputs) { // what a tool asks; a single choice, as whether it may run, is a click
  const isClick = inputs.length === 1 && inputs[0].options && !inputs[0].multiple;
  const give = (valuesOf) => begin(here("/answers"), { item_id, status: "answered",
    answers: Object.fromEntries(inputs.map(({ id }) => [id, { values: valuesOf(id) }])) });
  const option = ({ id: name, multiple }) => ({ value }) => isClick ? push(value, () => give(() => [value]))
    : ticked({ name, label: value, required: !multiple }, { type: multiple ? "checkbox" : "radio", value });
  const group = (input) => el("div", { role: "group", ariaLabel: input.question },
    el("strong", {}, `${input.question}\n`), quiet(input.description), input.options?.map(option(input))
      ?? field("textarea", { name: input.id, label: input.question, required: true }));
  const onsubmit = ({ target }) => { const form = new FormData(target); give((id) => form.getAll(id)); };
  return el("form", { onsubmit },
    el("fieldset", {}, inputs.map(group), !isClick && el("button.primary", {}, "Send answers")));
}
// ---------- What happens ----------
async function load() { // what is stored of the conversation
  const view = shown, { messages, ...thread } = await getJson(here());
  if (view !== shown) return;
  setThread(thread);
  for (const { id } of rowsShown()) if (!messages.some((row) => row.id === id)) nodeOf(id).remove();
  for (const { status, content, ...row } of messages)
    draw({ ...row, status, content: (status === "streaming" && view.told[row.id]) || content });
  const isAnswered = messages.some(({ status }) => status === "streaming");
  if (isAnswered && !view.busy && !view.loading) openConversation(view.id); // by another tab, or an action
}
const think = (told) => oncePerFrame(Object.assign(page.thinking, { told }), () => // what goes on
  show(page.thinking, page.thinking.told).replaceChildren(...inline(page.thinking.told)));
const tells = ({ content, text = content }) => think(`${page.thinking.told}${text}\n`);
const EVENTS = { __proto__: null, thread: setThread, progress: tells, progress_update: tells,
  thinking: ({ content }) => think((page.thinking.told || THINKING) + content),
  "thread.item.updated"() {}, effect() {}, client_effect() {}, // nothing is to be loaded for these
  text({ content, message_id: id }) { // is told from its beginning, while what was loaded may be ahead
    const told = shown.told[id] = (shown.told[id] ?? "") + content, row = nodeOf(id)?.row;
    if (told.length > (row?.content.length ?? -1)) draw({ ...row, id, role: "assistant", content: told });
  },
  notice: ({ level, title, message }) =>
    page.log.append(el(`div.item notice ${level}`, {}, title && el("b", {}, `${title}\n`), inline(message))),
  error: ({ message }) => show(page.problem, message ?? "Something went wrong."),
  async done({ status, usage }) { // told to screen readers once, at the end, and not word by word
    if (status === "failed") show(page.problem, ""); // it stands where it happened
    const last = await load().then(() => rowsShown().at(-1));
    page.announce.textContent = status === "completed" ? last?.content : status;
    if (last) draw({ ...last, usage });
  } };
const happen = (event) => (EVENTS[event.type] ?? load)(event); // what is told otherwise, is stored
const BUSY = "Not sent: an answer is still being written. Wait for its end, or stop it.";
const AWAY = "Not sent: the server does not answer.";
function setBusy(view, busy) {
  view.busy = busy;
  if (view !== shown) return;
  Object.assign(page.send, { ariaLabel: busy ? "Stop" : "Send", textContent: busy ? "■" : "↑" });
  think(busy ? THINKING : "");
  page.log.ariaBusy = String(busy);
  if (page.problem.textContent === BUSY) show(page.problem, "");
}
async function begin(path, body) { // has the server answer, and follows the answer; true if it went
  if (shown.busy) return void show(page.problem, page.banner.hidden ? BUSY : AWAY);
  const view = Object.assign(shown, { loading: false }); // what was being opened, gives way to it
  setBusy(view, true);
  page.scroller.scrollTop = 0;
  try {
    const response = await api(path, "POST", body);
    view.id ??= Number(response.headers.get("X-Thread-Id"));
    view === shown ? openConversation(view.id, response) : response.body.cancel(); // joined later
    return true;
  } catch ({ status, message }) {
    show(page.problem, status ? `Not sent: ${message}` : AWAY);
    setBusy(view, false);
    if (!status || (view.id && status !== 401)) reopen(view); // perhaps an answer runs that we know not of
  }
}
async function send(message) {
  const { editing } = page.input, chips = [...page.files.children], files = chips.map(({ file }) => file?.id);
  if (files.includes(undefined)) return complain({ message: "Not sent: a file is still on its way." });
  if (!message.trim() && !files.length) return;
  if (editing && !confirm("Send the edited message? What came after it goes.")) return;
  page.input.value ||= message; // and there it stays until the server has it
  const [model, tool_choice] = [page.models, page.tools].map(({ value }) => value || undefined);
  const sent = editing ? begin(here("/retry"), { message, message_id: editing })
    : begin("chatkit", { message, thread_id: shown.id ?? undefined, attachments: files, model, tool_choice });
  if (!await sent) return;
  Object.assign(page.input, { value: page.input.value.replace(message, ""), editing: null }).focus();
  if (editing) return; // what is attached and chosen is for the next new message
  page.tools.value = "";
  chips.forEach((chip) => chip.remove()); // there may be others by now
}
// ---------- Opening a conversation ----------
async function openConversation(id, joined) { // shows what is stored, and follows what is being written
  const same = joined || (id && shown.id === id), { title, reader, busy } = shown;
  reader?.cancel().catch(() => {});
  const view = shown = { id, title: same && title, told: {}, loading: Boolean(id) };
  if (!same) {
    show(page.problem, page.input.editing = null);
    page.log.replaceChildren();
    setThread({ status: "active" });
  }
  page.welcome.hidden = Boolean(id);
  setBusy(view, Boolean(same && busy));
  const listing = refreshList(), isListed = () => page.list.querySelector(`[href="#/${id}"]`);
  if (!id) return page.input.focus();
  if (joined) history.replaceState(null, "", `#/${id}`);
  try {
    // Joined first and loaded second, so that nothing falls in between; what comes twice has the same ids.
    if (!joined && (same || !isListed()) && await listing && !isListed())
      throw refusal("Conversation not found", 404); // known without a request that fails
    const stream = joined ?? await api(here("/stream")), answering = stream.status === 200;
    await load();
    if (view !== shown || !view.loading) return stream.body?.cancel(); // or a message is on its way
    setBusy(Object.assign(view, { loading: false }), answering);
    if (!answering) return;
    page.log.querySelectorAll(".item.notice").forEach((node) => node.remove()); // the stream tells them again
    for await (const event of readEvents(stream, view)) {
      if (view !== shown) return;
      await happen(event);
      if (!["thread", "thinking", "progress"].includes(event.type)) think("");
    }
    refreshList(setBusy(view, false));
  } catch (error) { // what broke off is loaded and joined anew
    if (view !== shown) return;
    if (!(error.status < 500)) return reopen(view); // the network, or what stands before the server
    if (error.status === 404) openConversation(null); else setBusy(view, view.loading = false);
    complain(error);
  }
}
async function reopen(view) { // once the server answers; what it offers may be other things by then
  while (await getJson("api/config").then(configure, ({ status }) => !(status < 500))) {
    show(page.banner, "The server does not answer. Trying again…");
    await sleep(1000);
  }
  show(page.banner, "");
  await sleep(500);
  if (view === shown) view.id ? openConversation(view.id) : refreshList();
}
function setThread({ title = shown.title, status, reason }) {
  const { title: app = "ChatKit" } = config, why = reason ? `: ${reason}` : ".";
  page.title.textContent = (shown.title = title) || "New conversation";
  document.title = title ? `${title} \u2013 ${app}` : app;
  page.actions.hidden = !shown.id;
  if (status) show(page.locked, status !== "active" && `This conversation is ${status}${why}`);
}
addEventListener("hashchange", route);
function route() { // an invitation's address brings a token along, a conversation's its id
  const [, token, id] = /^#(?:token=([!-~]+)|\/(\d+))$/.exec(location.hash) ?? [];
  if (token) sessionStorage.setItem(tokenKey, token);
  if (token) history.replaceState(null, "", location.pathname + location.search);
  if (!config.title) reopen({}); // at the start, or when an invitation comes to a tab without a token
  openConversation(Number(id) || null);
}
if (!CSS.supports("overflow-anchor", "auto")) new ResizeObserver(() => { // Safari keeps nobody's place
  const { scrollTop: at, scrollHeight, last = scrollHeight } = page.scroller;
  Object.assign(page.scroller, { last: scrollHeight, scrollTop: at && at + last - scrollHeight });
}).observe(page.log);
page.sidebar.onclick = ({ target }) => { if (target.closest("a")) page.sidebar.hidePopover(); };
// ---------- The list and the composer ----------
async function refreshList() { // true if that is all that there are
  const query = page.search.value, path = `api/conversations?limit=100&q=${encodeURIComponent(query)}`;
  const found = await getJson(path).catch(() => null);
  if (!found || query !== page.search.value) return;
  renew(page.list, found.map(({ id, title }) => el("li", {},
    el("a", { href: `#/${id}`, title, ariaCurrent: id === shown.id ? "page" : null }, title))));
  show(page.nothing, found.length ? "" : query ? "Nothing found." : "No conversations yet.");
  return !query && found.length < 100;
}
addEventListener("focus", () => // another tab may have done something
  shown.id && !shown.busy && !shown.loading ? openConversation(shown.id) : refreshList());
page.search.oninput = refreshList;
const change = (method, body) => api(here(), method, body).catch(complain).finally(refreshList);
const rename = (title) => title?.trim() && change("PATCH", { title }).then(load).catch(complain);
page.rename.onclick = () => rename(prompt("Rename conversation", shown.title));
page.remove.onclick = () => {
  if (!confirm(`Delete “${shown.title}”?`)) return;
  change("DELETE");
  location.hash = "#/";
};
page.save.onclick = () => download(here("?format=markdown"), `${shown.title}.md`);
page.input.oninput = () => { if (!page.input.value) page.input.editing = null; }; // what comes is new
addEventListener("keydown", (event) => { // Enter sends, or does what a click would
  const { key, target, shiftKey, isComposing, keyCode } = event;
  if (target.role === "button" && [" ", "Enter"].includes(key)) target.click(event.preventDefault());
  // The Enter that ends a composition is not meant for us (Safari tells it by the key code alone).
  if (key !== "Enter" || shiftKey || isComposing || keyCode === 229) return;
  if (target === page.input) send(target.value, event.preventDefault());
});
page.send.onclick = () => !shown.busy ? send(page.input.value)
  : shown.id && api(here("/cancel"), "POST").catch(() => {}); // or it is over already
async function attach(file) { // uploads it, to go with the next message
  const chip = page.files.appendChild(el("li", {}, `${file.name}…`)), form = new FormData();
  const close = push("\u00D7", () => chip.remove(), { ariaLabel: `Remove ${file.name}` });
  form.append("file", file);
  try {
    if (file.size > config.uploads?.max_bytes) throw new Error("it is larger than the server takes.");
    chip.file = await (await api("attachments", "POST", form)).json();
    chip.replaceChildren(fileNode(chip.file), close);
  } catch ({ message }) {
    complain({ message: `${file.name} is not attached: ${message}` }, chip.remove());
  }
}
const attachAll = ({ files }) => [...files].forEach(attach);
page.attach.onclick = () => page.file.click(page.file.value = ""); // so that the same one can be chosen again
page.file.onchange = () => attachAll(page.file);
addEventListener("paste", ({ clipboardData }) => attachAll(clipboardData));
const isText = ({ target, dataTransfer: { types } }) => "selectionEnd" in target && !types.includes("Files");
addEventListener("dragover", (event) => isText(event) || event.preventDefault()); // or it is opened
addEventListener("drop", (event) => isText(event) || attachAll(event.dataTransfer, event.preventDefault()));
route();
</script></body></html>"""

COMPONENT_PAGE = r"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>ChatKit</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { margin: 0; font: 1rem/1.6 system-ui, sans-serif; color-scheme: light dark; }
p { padding: 1rem; } p:empty { display: none; } openai-chatkit { display: block; height: 100dvh; }
</style></head>
<body><p role="status">Loading OpenAI's component…</p>
<script>"use strict";
const base = location.pathname.replace(/component\/?$/, ""), url = location.origin + base;
const say = (text) => { document.querySelector("p").textContent = text; };
const call = (url, options = {}) => { // with the token that the page at / has in this tab, if any
  const token = sessionStorage.getItem(`chatkit token ${base}`), headers = new Headers(options.headers);
  if (token) headers.set("Authorization", `Bearer ${token}`);
  return fetch(url, { ...options, headers });
};
addEventListener("error", ({ target }) => {
  if (target.src) say(`OpenAI's component cannot be loaded from ${target.src}: it needs the network.`);
}, true);
customElements.whenDefined("openai-chatkit").then(async () => {
  const response = await call(`${base}api/config`), config = await response.json();
  if (!response.ok) return say(`${config.detail}. Give the token to the page at ${base} in this tab first.`);
  const { title, greeting, starters, model, models, tools, uploads, dictation } = config;
  const chat = document.createElement("openai-chatkit");
  const uploadStrategy = { type: "direct", uploadUrl: `${url}attachments` };
  chat.setOptions({
    api: { url: `${url}chatkit`, domainKey: "local-dev", uploadStrategy, fetch: call },
    header: { title: { text: title } },
    startScreen: { greeting, prompts: starters.map((prompt) => ({ label: prompt, prompt })) },
    composer: { // an empty list is refused
      attachments: { enabled: true, maxSize: uploads.max_bytes }, dictation: { enabled: dictation },
      ...(models.length && { models: models.map((id) => ({ id, label: id, default: id === model })) }),
      ...(tools.length && { tools: tools.map(({ name }) => ({ id: name, label: name, icon: "bolt" })) }),
    },
    history: { enabled: true },
    threadItemActions: { feedback: true, retry: true },
  });
  say("");
  document.title = title;
  document.body.append(chat);
});
</script>
<script src="https://cdn.platform.openai.com/deployments/chatkit/chatkit.js" async></script>
</body></html>
"""


# ====================================================================================================== Start
# main() and serve_in_background().


class Server(uvicorn.Server):
    """uvicorn with one app, in a thread of its own if it is start()ed: see serve_in_background()."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        """Listens; port 0 picks a free one. Raises SettingsError, also where anybody around could call."""
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2))
        self.chat: Chat = app.state.chat
        self.failure: Exception | None = None  # to open the store
        self._thread = threading.Thread(target=self.run, name="chatkit server", daemon=True)
        if not self.chat.settings.needs_token and not LOOPBACK.fullmatch(host):
            text = f"Listening on {host} lets others in: set CHATKIT_JWT_SECRET, so that they need a token."
            raise SettingsError(text)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family, backlog=2048)
        except (OSError, OverflowError, TypeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                reason = "something listens there already; stop it, or name another port"
            raise SettingsError(f"Cannot listen on {host} port {port}: {reason}.") from None
        self.url = url_of(host, self._listener.getsockname()[1])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Not in the lifespan, which would report a failure with a traceback.
        opening = asyncio.create_task(self.chat.open())
        while not (opening.done() or self.should_exit):  # Ctrl-C waits for no lock, and no MCP server
            await asyncio.wait([opening], timeout=0.1)
        if not opening.done():
            opening.cancel()  # which closes what is open
            await asyncio.wait([opening])
            return
        await opening
        await super().startup(sockets)
        if not self._thread.is_alive():
            model, data = self.chat.agents.model_name, self.chat.store.path
            print(f"Listening on {self.url}\nModel: {model}\nData:  {data}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.chat.stop_turns()  # before it waits for their readers to leave
        await super().shutdown(sockets)
        await self.chat.close()  # where another app is around ours, no lifespan has

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but that it does not wait for a tool that hangs in a thread."""
        loop = (self.config.get_loop_factory() or asyncio.new_event_loop)()
        try:
            loop.run_until_complete(self.serve(sockets or [self._listener]))
        except (StoreError, SettingsError) as error:
            self.failure = error
        finally:
            leftover = asyncio.all_tasks(loop)  # the keeper of a Chat that did not start among them
            for task in leftover:
                task.cancel()
            if leftover:
                loop.run_until_complete(asyncio.wait(leftover, timeout=2))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
            self._listener.close()

    def start(self) -> None:
        """Run in a thread, and return when it answers. Raises SettingsError, StoreError."""
        self._thread.start()
        try:
            while not self.started and self._thread.is_alive():
                time.sleep(0.005)
        except KeyboardInterrupt:
            self.stop()
            raise
        if not self.started:
            raise self.failure or SettingsError("The lifespan of the app failed; the log says why.")

    def stop(self) -> None:
        """Save and end what is running, and return when nothing of the server is left."""
        self.should_exit = True
        self._thread.join()

    def __repr__(self) -> str:
        return self.url

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        return f'<a href="{self.url}" target="_blank">{self.url}</a>'

    def __enter__(self) -> str:
        return self.url

    def __exit__(self, *_: object) -> None:
        self.stop()


def url_of(host: str, port: int) -> str:
    """Where a browser on this machine finds what listens there."""
    here = host == "127.0.0.1" or not host.strip("0.:")  # every address is one of this machine, too
    return f"http://{'localhost' if here else f'[{host}]' if ':' in host else host}:{port}"


_by_cell: dict[str, tuple[int, list[Server]]] = {}  # when each of a notebook's ran last, and what it started


def serve_in_background(app: FastAPI | None = None, *, host: str = "127.0.0.1", port: int = 0) -> Server:
    """Serve an app of create_app() beside what this process does, in a notebook above all.

        server = serve_in_background(create_app(my_agent, database=":memory:"))
        server.url
        server.stop()

    or `with serve_in_background() as url:`. Port 0 is a free one. A cell of a notebook that is run again
    stops the server that it started before. Raises SettingsError, StoreError.
    """
    if app is not None and not hasattr(getattr(app, "state", None), "chat"):
        what = type(app).__name__
        raise SettingsError(f"serve_in_background() takes an app: write create_app(...) around this {what}.")
    servers: list[Server] = []
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "get_parent"):  # that of a notebook's kernel
        request = shell.get_parent()
        cell = request["metadata"].get("cellId") or request["content"]["code"]
        ran, servers = _by_cell.get(cell, (0, servers))
        while servers and ran != shell.execution_count:
            servers.pop().stop()
        _by_cell[cell] = shell.execution_count, servers
    server = Server(app or create_app(), host, port)
    server.start()
    servers.append(server)
    return server


def log_readably(settings: Settings) -> None:
    """A line for each record on stderr, without secrets."""

    class Redacted(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return redact(super().format(record), settings.secrets)

    handler = logging.StreamHandler()
    handler.setFormatter(Redacted("%(asctime)s %(levelname)s %(name)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    log.setLevel(settings.log_level.upper())


def main(arguments: list[str] | None = None) -> int:
    """What `python chatkit_server.py` does; the exit status comes back."""
    parser = argparse.ArgumentParser(description="A complete ChatKit backend in one file.")
    parser.add_argument("--host", help="where to listen (127.0.0.1)")
    parser.add_argument("--port", type=int, help="0 is a free one (8000)")
    parser.add_argument("--database", help="a file, or :memory: (chatkit.db)")
    parser.add_argument("--model", help="demo, gpt-..., gemini/..., anthropic/..., ollama_chat/...")
    parser.add_argument("--token", metavar="USER", help="print a token for this user, and exit")
    flags = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    user = flags.pop("token", None)
    try:
        settings = Settings.from_env(**flags)
        log_readably(settings)
        if user is not None:
            token, url = make_token(settings, user), url_of(settings.host, settings.port)
            print(f"{token}\nInvitation: {url}/#token={token}")
            return 0
        server = Server(create_app(settings=settings), settings.host, settings.port)
        gc.freeze()  # going through all modules again and again took a third of the CPU at 100 streams
        gc.set_threshold(10_000)
        server.run()
        if server.failure:
            raise server.failure
    except (SettingsError, StoreError) as error:
        print(f"chatkit_server: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass  # all is saved by now
    return 0


if __name__ == "__main__":
    exit_status = main()
    if threading.active_count() > 1:  # a tool that hangs in a thread must not keep the process
        sys.stdout.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
