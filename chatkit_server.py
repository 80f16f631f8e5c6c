"""A complete ChatKit backend in one file.

Run with:

    python chatkit_server.py

and open http://localhost:8000, or talk to it with curl, or point OpenAI's <openai-chatkit> component at
http://localhost:8000/chatkit. One module holds everything that runs; schema.sql beside it holds the tables.

A message travels like this:

    POST /chatkit -- decode --> Turn ------> the agent: model, tools
       (plain or ChatKit)        |  a task of its own, one for each conversation
                                 |-> Store   every item is written as it happens
                                 '-> EventStream -- encode --> server-sent events
                                     any number of readers     (plain or ChatKit)

The sections, each of which uses only what stands above it:

    Settings         what can be configured; the only place that reads the environment
    Store            all SQL, and nothing but SQL
    Agent            what tools can do, the to-do assistant, the offline demo model, choosing a model
    Turn             answering one message: running the agent, our events, following them
    Chat             what one app holds: beginning turns, and stopping them
    Plain dialect    events as anyone can read them with curl
    ChatKit dialect  the same as the ChatKit protocol
    HTTP             create_app(), who may call, the routes
    Page             the built-in web page
    Start            main() and serve_in_background()

The ChatKit dialect was checked against the types of the official Python SDK, openai-chatkit 1.6.5.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036  # said here, where an older Python still gets to
    sys.exit(f"chatkit_server.py needs Python 3.10 or newer; this is Python {sys.version.split()[0]}.")

import argparse
import asyncio
import base64
import contextlib
import errno
import gc
import hashlib
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import socket
import sqlite3
import threading
import time
import traceback
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar, cast

try:
    import aiosqlite
    import openai
    import uvicorn
    from agents import (
        Agent,
        InputGuardrailTripwireTriggered,
        ItemHelpers,
        MaxTurnsExceeded,
        Model,
        ModelBehaviorError,
        ModelProvider,
        ModelRefusalError,
        ModelResponse,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        OutputGuardrailTripwireTriggered,
        RunConfig,
        RunContextWrapper,
        RunHooks,
        Runner,
        RunResultStreaming,
        StreamEvent,
        Tool,
        ToolErrorFormatterArgs,
        ToolInputGuardrailTripwireTriggered,
        ToolOutputGuardrailTripwireTriggered,
        TResponseInputItem,
        Usage,
        function_tool,
        set_tracing_disabled,
    )
    from agents.exceptions import ModelTimeoutError, _mark_error_to_drain_stream_events
    from agents.items import TResponseStreamEvent
    from agents.models.default_models import get_default_model
    from dotenv import load_dotenv
    from fastapi import Depends, FastAPI, Header, Query
    from fastapi.exceptions import RequestValidationError
    from openai import AsyncOpenAI
    from openai.types.responses import (
        Response as ModelOutput,
        ResponseCompletedEvent,
        ResponseFunctionToolCall,
        ResponseOutputItem,
        ResponseOutputItemDoneEvent,
        ResponseOutputMessage,
        ResponseOutputText,
        ResponseTextDeltaEvent,
        ResponseUsage,
    )
    from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
    from pydantic import BaseModel, ConfigDict, Field, ValidationError
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"chatkit_server: {missing.name} is not installed. The README's first command installs what is needed.")

__all__ = [
    "ClientTool",
    "Questions",
    "Refused",
    "Settings",
    "SettingsError",
    "Store",
    "StoreError",
    "TurnContext",
    "create_app",
    "serve_in_background",
    "stream_agent",
]

# ======================================================================================================== Settings
# What can be configured. `Settings.from_env()` is the only place that reads the environment.

HERE = Path(__file__).resolve().parent
log = logging.getLogger("chatkit")


class SettingsError(ValueError):
    """A setting that makes no sense; the text names it and says what would."""


@dataclass(frozen=True)
class Settings:
    """How one app behaves. Each field's environment name is CHATKIT_ and its name, unless a comment says otherwise."""

    host: str = "127.0.0.1"
    port: int = 8000
    database: str = "chatkit.db"  # a path, or ":memory:"
    model: str | None = None  # see Models for what the names mean
    models: tuple[str, ...] = ()  # further models that a message may ask for
    jwt_secret: str | None = field(default=None, repr=False)  # also BETTER_AUTH_SECRET
    jwt_audience: str | None = None
    jwt_issuer: str | None = None
    jwks_url: str | None = None  # public keys, for EdDSA, ES256 and RS256 tokens
    cors_origins: tuple[str, ...] = ("http://localhost:3000", "http://localhost:5173")
    history_limit: int = 40  # items that the model is shown
    on_disconnect: str = "cancel"  # what a ChatKit reader that leaves does to its turn: "cancel" or "continue"
    max_message_chars: int = 32_000
    max_attachment_bytes: int = 10 * 1024 * 1024
    max_steps: int = 10  # model calls a turn
    max_concurrent_turns: int = 256
    max_turns_per_user: int = 8  # for users who come with a token
    turn_timeout: float = 300.0  # seconds
    tracing: bool = False  # send the Agents SDK's traces to OpenAI
    log_level: str = "info"
    openai_api_key: str | None = field(default=None, repr=False)  # OPENAI_API_KEY
    openai_base_url: str | None = None  # OPENAI_BASE_URL
    gemini_api_key: str | None = field(default=None, repr=False)  # GEMINI_API_KEY
    gemini_model: str = "gemini-2.5-flash"  # GEMINI_MODEL

    def __post_init__(self) -> None:
        """Raises SettingsError, one line that names the setting."""

        def check(name: str, fits: bool, wanted: str) -> None:
            if not fits:
                raise SettingsError(f"{self.env_name(name)} must be {wanted}, not {getattr(self, name)!r}.")

        check("port", 0 <= self.port <= 65535, "a port from 0 to 65535")
        check("database", bool(self.database.strip()) and "\0" not in self.database, "a file name or :memory:")
        check("on_disconnect", self.on_disconnect in ("cancel", "continue"), "cancel or continue")
        check("log_level", self.log_level in ("debug", "info", "warning", "error"), "debug, info, warning or error")
        check("turn_timeout", 0 < self.turn_timeout < float("inf"), "a number of seconds above 0")
        for name in ("history_limit", "max_message_chars", "max_attachment_bytes", "max_steps"):
            check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("max_concurrent_turns", "max_turns_per_user"):
            check(name, getattr(self, name) >= 1, "1 or more")
        check("jwks_url", (self.jwks_url or "https:").startswith(("http:", "https:")), "an http or https URL")
        for origin in self.cors_origins:
            check("cors_origins", origin.startswith(("http://", "https://")), "origins such as http://localhost:3000")

    @property
    def needs_token(self) -> bool:
        """Whether a caller must show who it is."""
        return bool(self.jwt_secret or self.jwks_url)

    @staticmethod
    def env_name(name: str) -> str:
        return name.upper() if name.startswith(("openai_", "gemini_")) else "CHATKIT_" + name.upper()

    @classmethod
    def from_env(cls, **overrides: Any) -> Settings:
        """The environment's settings, those of a .env file beside this module added, `overrides` on top.

        An empty value counts as not set. Raises SettingsError.
        """
        load_dotenv(HERE / ".env")  # into os.environ, where LiteLLM looks for keys; what is set there already wins
        values: dict[str, Any] = {}
        for each in fields(cls):
            name = cls.env_name(each.name)
            text = os.environ.get(name, "").strip()
            if each.name == "jwt_secret":
                text = text or os.environ.get("BETTER_AUTH_SECRET", "").strip()
            if text:
                values[each.name] = cls._parse(name, text, each.default)
            elif name in os.environ and name.endswith("_API_KEY") and each.name not in overrides:
                log.warning("%s is set but empty, which counts as not set.", name)
        return cls(**{**values, **overrides})

    @staticmethod
    def _parse(name: str, text: str, default: object) -> object:
        """A value from the environment, in the type of its field's default."""
        if isinstance(default, bool):
            if text.lower() not in ("0", "1", "false", "true", "no", "yes"):
                raise SettingsError(f"{name} must be 1 or 0, not {text!r}.")
            return text.lower() in ("1", "true", "yes")
        if isinstance(default, (int, float)):
            try:
                return type(default)(text)
            except ValueError:
                kind = "a whole number" if isinstance(default, int) else "a number"
                raise SettingsError(f"{name} must be {kind}, not {text!r}.") from None
        if isinstance(default, tuple):
            return tuple(part.strip().rstrip("/") for part in text.split(",") if part.strip())
        return text


# =========================================================================================================== Store
# All SQL, and nothing but SQL. Rows come out as plain dicts whose JSON columns are decoded.

SCHEMA_VERSION = 2

# What an older file needs beside schema.sql, by the version that it has.
UPGRADES = {
    1: """INSERT INTO message_search (rowid, owner, body)
          SELECT m.id, hex(c.user_id), m.content FROM messages m JOIN conversations c ON c.id = m.conversation_id
          WHERE m.role IN ('user', 'assistant') AND m.status <> 'streaming';
          INSERT INTO title_search (rowid, owner, body) SELECT id, hex(user_id), title FROM conversations;"""
}

SEARCH_DEPTH = 1000  # the newest hits that a search looks at: its time does not grow with the file

T = TypeVar("T")
Row = dict[str, Any]
Page = tuple[list[Row], bool]  # the rows, and whether there are more


class StoreError(Exception):
    """The database cannot be opened or used; the text says why, and is safe to show."""


class Store:
    """Conversations, their items and the to-do list, in one SQLite file.

    `async with Store(path) as store:` opens and closes it. Ids are positive integers. Every method that touches a
    user's rows takes that user's id and finds nothing of anybody else's. Failing SQL raises sqlite3.Error.

    One connection serves all coroutines, in autocommit: were it not, a BEGIN in one and an INSERT in another would
    become one transaction, and a rollback would take the stranger's row along. A write is one statement; the few
    that are more go to `_transaction()`, which runs them in one go.
    """

    def __init__(self, path: str | Path = "chatkit.db") -> None:
        self.path = str(path)
        self._connection: aiosqlite.Connection | None = None
        self._lock = asyncio.Lock()
        self._file = os.path.abspath(path)  # whatever becomes of the working directory
        self._gave_up = 0.0  # when a writer last waited for another program's lock in vain
        self._inode: tuple[int, int] | None = None  # of the open file: to notice when it is deleted under us

    async def __aenter__(self) -> Store:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Open the file, making or bringing forward its tables. Raises StoreError. A newer file is left untouched."""
        if sqlite3.sqlite_version_info < (3, 37):
            raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old: STRICT tables need 3.37.")
        connection = None
        try:
            sqlite3.connect(self.path).close()  # a file that cannot be opened fails here, before there is a thread
            connection = await aiosqlite.connect(self.path, isolation_level=None)
            connection.row_factory = sqlite3.Row
            self._connection = connection
            for attempt in range(50):
                try:
                    await self._prepare()
                    break
                except sqlite3.OperationalError as error:
                    # Another process makes the same file at this moment: its search tables cannot be read half-way.
                    if attempt == 49 or "vtable constructor" not in str(error):
                        raise
                    if connection.in_transaction:
                        await self._read("ROLLBACK")
                    await asyncio.sleep(0.1)
        except (sqlite3.Error, OSError, StoreError) as error:
            self._connection = None
            if connection is not None:
                await connection.close()
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"Cannot use {self.path} as the database: {error}.") from error
        if self.path != ":memory:":
            status = os.stat(self._file)
            self._inode = (status.st_dev, status.st_ino)

    async def _prepare(self) -> None:
        await self._read("PRAGMA busy_timeout = 5000")
        # In this order: another process that makes the same file at this moment commits tables and version together.
        tables = {row[0] for row in await self._read("SELECT name FROM sqlite_schema")}
        version = (await self._read("PRAGMA user_version"))[0][0]
        if version > SCHEMA_VERSION:
            raise StoreError(f"{self.path} was written by a newer version (schema {version}, not {SCHEMA_VERSION}).")
        if tables and not (version and {"conversations", "messages"} <= tables):
            raise StoreError(f"{self.path} is a database of something else; name another file.")
        for attempt in range(50):  # SQLite itself does not wait here, while another process does the same
            try:
                await self._read("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if attempt == 49 or "locked" not in str(error):
                    raise
                await asyncio.sleep(0.1)
        await self._read("PRAGMA synchronous = NORMAL")
        await self._read("PRAGMA foreign_keys = ON")
        if version < SCHEMA_VERSION:
            schema = (HERE / "schema.sql").read_text(encoding="utf-8")
            assert self._connection is not None
            upgrades = " ".join(UPGRADES[step] for step in range(max(version, 1), SCHEMA_VERSION) if version)
            await self._connection.executescript(
                f"BEGIN IMMEDIATE; {schema}; {upgrades} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT"
            )
        # What was being written when the process died stays as it is, and says so.
        await self._write(
            """UPDATE messages SET status = 'interrupted'
               WHERE status IN ('streaming', 'pending') AND status = 'streaming'"""
        )

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _read(self, sql: str, *values: object) -> list[sqlite3.Row]:
        if self._connection is None:
            raise StoreError("The database is closed.")
        return list(await self._connection.execute_fetchall(sql, values))

    async def _write(self, sql: str, *values: object) -> list[sqlite3.Row]:
        async with self._writing():
            return await self._read(sql, *values)

    async def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Statements that stand or fall together: `work` runs in the connection's thread, which does nothing between.

        It is one hop to that thread; one for each statement would each wait for the interpreter under load. No cursor
        may leave the thread: its end elsewhere would disturb SQLite. aiosqlite has no public way to do this.
        """
        connection = self._connection
        if connection is None:
            raise StoreError("The database is closed.")

        def run() -> T:
            db = connection._conn
            try:
                db.execute("BEGIN IMMEDIATE")
                result = work(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite has rolled back already, on a full disk
                    db.execute("ROLLBACK")
                raise
            return result

        async with self._writing():
            return cast(T, await connection._execute(run))  # type: ignore[no-untyped-call]  # see above

    @contextlib.asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        """One writer at a time.

        SQLite waits five seconds for another program's lock. Whoever stood in line behind a writer that waited in vain
        is told the same at once: else the tenth in the line would wait fifty.
        """
        came = time.monotonic()
        async with self._lock:
            self._check_file()
            if self._gave_up > came:
                raise sqlite3.OperationalError("database is locked")
            try:
                yield
            except sqlite3.OperationalError as error:
                if "locked" in str(error):
                    self._gave_up = time.monotonic()
                raise

    def _check_file(self) -> None:
        """A deleted file can still be written to, and all of that would be lost at the end: better to refuse."""
        if self._inode is None:
            return
        try:
            status = os.stat(self._file)
        except OSError:
            raise StoreError("The database file is gone. Stop the server and start it again.") from None
        if (status.st_dev, status.st_ino) != self._inode:
            raise StoreError("The database file was replaced. Stop the server and start it again.")

    async def check(self) -> None:
        """One query, for the health route. Raises sqlite3.Error or StoreError."""
        self._check_file()
        await self._read("SELECT 1 FROM conversations LIMIT 1")

    # ---- conversations

    async def conversation(self, user_id: str, conversation_id: int) -> Row | None:
        sql = "SELECT * FROM conversations WHERE id = ? AND user_id = ?"
        return _first(await self._read(sql, conversation_id, user_id))

    async def conversations(self, user_id: str, limit: int = 50, offset: int = 0) -> list[Row]:
        """The most recently used first."""
        sql = "SELECT * FROM conversations WHERE user_id = ? ORDER BY updated_at DESC, id DESC LIMIT ? OFFSET ?"
        return [dict(row) for row in await self._read(sql, user_id, limit, offset)]

    async def search_conversations(self, user_id: str, words: str, limit: int = 50, offset: int = 0) -> list[Row]:
        """Those whose title, or one of whose messages, has all these words, or words that begin so.

        A word that more than SEARCH_DEPTH messages of the file have must be whole.
        """
        terms = []
        for word in words.replace("\0", " ").split():
            term = '"' + word.replace('"', '""') + '"'
            # A word that is everywhere is found at once as a whole, but slowly as the beginning of others.
            sql = "SELECT rowid FROM message_search WHERE message_search MATCH ? ORDER BY rowid DESC LIMIT 1 OFFSET ?"
            terms.append(term if await self._read(sql, f"body : {term}", SEARCH_DEPTH) else term + "*")
        if not terms:
            return []
        match = f'owner : "{user_id.encode().hex().upper()}" AND body : ({" AND ".join(terms)})'
        sql = """
            WITH hits AS (
                SELECT m.conversation_id AS id FROM (
                    SELECT rowid FROM message_search WHERE message_search MATCH ? ORDER BY rowid DESC LIMIT ?
                ) hit CROSS JOIN messages m ON m.id = hit.rowid
                UNION
                SELECT rowid FROM (
                    SELECT rowid FROM title_search WHERE title_search MATCH ? ORDER BY rowid DESC LIMIT ?
                )
            )
            SELECT c.* FROM hits CROSS JOIN conversations c ON c.id = hits.id WHERE c.user_id = ?
            ORDER BY c.updated_at DESC, c.id DESC LIMIT ? OFFSET ?"""
        values = (match, SEARCH_DEPTH, match, SEARCH_DEPTH, user_id, limit, offset)
        return [dict(row) for row in await self._read(sql, *values)]

    async def conversation_page(self, user_id: str, limit: int, order: str, after: int | None) -> Page:
        """A page in the order in which conversations were begun, which new messages do not change."""
        sql = "SELECT * FROM conversations WHERE user_id = ? AND id > ? ORDER BY id LIMIT ?"
        if order == "desc":
            sql = "SELECT * FROM conversations WHERE user_id = ? AND id < ? ORDER BY id DESC LIMIT ?"
        rows = [dict(row) for row in await self._read(sql, user_id, _edge(order, after), limit + 1)]
        return rows[:limit], len(rows) > limit

    async def rename_conversation(self, user_id: str, conversation_id: int, title: str) -> Row | None:
        sql = "UPDATE conversations SET title = ? WHERE id = ? AND user_id = ? RETURNING *"
        return _first(await self._write(sql, title, conversation_id, user_id))

    async def set_conversation_status(
        self, user_id: str, conversation_id: int, status: str, reason: str | None = None
    ) -> Row | None:
        """`status` is active, locked or closed; the last two refuse new messages."""
        sql = "UPDATE conversations SET status = ?, status_reason = ? WHERE id = ? AND user_id = ? RETURNING *"
        return _first(await self._write(sql, status, reason, conversation_id, user_id))

    async def delete_conversation(self, user_id: str, conversation_id: int) -> bool:
        sql = "DELETE FROM conversations WHERE id = ? AND user_id = ? RETURNING id"
        return bool(await self._write(sql, conversation_id, user_id))

    # ---- messages: the items of a conversation

    async def add_user_message(
        self,
        user_id: str,
        conversation_id: int | None,
        title: str,
        content: str,
        extra: Row | None = None,
        attachment_ids: list[str] | None = None,
    ) -> tuple[Row, Row]:
        """A conversation and the user's message in it, a new one with `title` where none is named: both, or neither.

        The attachments become the message's; what a message needs to know of them is in its extra. Raises LookupError
        where the user has no such conversation, or no such uploaded file that is not yet sent.
        """
        wanted = json.dumps(attachment_ids)

        def work(db: sqlite3.Connection) -> tuple[Row, Row]:
            if conversation_id is None:
                sql = "INSERT INTO conversations (user_id, title) VALUES (?, ?) RETURNING *"
                conversation = _first(db.execute(sql, (user_id, title)).fetchall())
            else:
                sql = "SELECT * FROM conversations WHERE id = ? AND user_id = ?"
                conversation = _first(db.execute(sql, (conversation_id, user_id)).fetchall())
            if conversation is None:
                raise LookupError("Conversation not found")
            columns = extra
            if attachment_ids:
                sql = """
                    SELECT a.id, a.key, a.name, a.mime_type, a.size
                    FROM json_each(?) w JOIN attachments a ON a.id = w.value
                    WHERE a.user_id = ? AND a.message_id IS NULL AND a.data IS NOT NULL"""
                files = [dict(file) for file in db.execute(sql, (wanted, user_id))]
                if len(files) < len(attachment_ids):
                    raise LookupError("Attachment not found")
                columns = {**(extra or {}), "attachments": files}
            sql = "INSERT INTO messages (conversation_id, role, content, extra) VALUES (?, 'user', ?, ?) RETURNING *"
            message = _message(db.execute(sql, (conversation["id"], content, _json(columns))).fetchall()[0])
            if attachment_ids:
                sql = """
                    UPDATE attachments SET message_id = ?
                    WHERE user_id = ? AND id IN (SELECT value FROM json_each(?))"""
                db.execute(sql, (message["id"], user_id, wanted))
            return conversation, message

        return await self._transaction(work)

    async def add_message(
        self,
        user_id: str,
        conversation_id: int,
        role: str,
        content: str = "",
        *,
        tool_calls: list[Row] | None = None,
        status: str = "done",
        extra: Row | None = None,
    ) -> Row | None:
        """The new row, or None where the user has no such conversation."""
        sql = """
            INSERT INTO messages (conversation_id, role, content, tool_calls, status, extra)
            SELECT id, ?, ?, ?, ?, ? FROM conversations WHERE id = ? AND user_id = ? RETURNING *"""
        values = (role, content, _json(tool_calls), status, _json(extra), conversation_id, user_id)
        return _first(await self._write(sql, *values), _message)

    async def update_message(
        self,
        user_id: str,
        message_id: int,
        *,
        content: str | None = None,
        status: str | None = None,
        role: str | None = None,
        extra: Row | None = None,
    ) -> Row | None:
        """Changes what is given and leaves the rest; the row as it is then, or None where there is none."""
        sql = """
            UPDATE messages SET content = COALESCE(?, content), status = COALESCE(?, status),
                role = COALESCE(?, role), extra = COALESCE(?, extra)
            WHERE id = ? AND EXISTS (SELECT 1 FROM conversations c WHERE c.id = conversation_id AND c.user_id = ?)
            RETURNING *"""
        return _first(await self._write(sql, content, status, role, _json(extra), message_id, user_id), _message)

    async def save_texts(self, texts: list[tuple[str, int, str]]) -> None:
        """The content of messages that grow, of many turns at once; each with the message's id and the user's."""
        sql = """
            UPDATE messages SET content = ?
            WHERE id = ? AND status = 'streaming'
                AND EXISTS (SELECT 1 FROM conversations c WHERE c.id = conversation_id AND c.user_id = ?)"""

        def work(db: sqlite3.Connection) -> None:  # no cursor leaves the thread: its end elsewhere would disturb SQLite
            db.executemany(sql, texts)

        await self._transaction(work)

    async def message(self, user_id: str, conversation_id: int, message_id: int) -> Row | None:
        """One item, hidden context excepted."""
        sql = "SELECT * FROM items WHERE id = ? AND conversation_id = ? AND user_id = ? AND role <> 'system'"
        return _first(await self._read(sql, message_id, conversation_id, user_id), _message)

    async def messages(self, user_id: str, conversation_id: int) -> list[Row]:
        """All items, oldest first, hidden context excepted."""
        sql = "SELECT * FROM items WHERE conversation_id = ? AND user_id = ? AND role <> 'system' ORDER BY id"
        return [_message(row) for row in await self._read(sql, conversation_id, user_id)]

    async def message_page(self, user_id: str, conversation_id: int, limit: int, order: str, after: int | None) -> Page:
        """A page of items, hidden context excepted. Rows that are added while one pages do not disturb it."""
        sql = """
            SELECT * FROM items WHERE conversation_id = ? AND user_id = ? AND role <> 'system' AND id > ?
            ORDER BY id LIMIT ?"""
        if order == "desc":
            sql = """
            SELECT * FROM items WHERE conversation_id = ? AND user_id = ? AND role <> 'system' AND id < ?
            ORDER BY id DESC LIMIT ?"""
        found = await self._read(sql, conversation_id, user_id, _edge(order, after), limit + 1)
        return [_message(row) for row in found[:limit]], len(found) > limit

    async def history(self, user_id: str, conversation_id: int, limit: int) -> list[Row]:
        """The last `limit` items that the model is to see, oldest first: all but its own reasoning."""
        sql = """
            SELECT * FROM items WHERE conversation_id = ? AND user_id = ? AND role <> 'reasoning'
            ORDER BY id DESC LIMIT ?"""
        return [_message(row) for row in reversed(await self._read(sql, conversation_id, user_id, limit))]

    async def last_user_message(self, user_id: str, conversation_id: int) -> Row | None:
        sql = """
            SELECT * FROM items WHERE conversation_id = ? AND user_id = ? AND role = 'user'
            ORDER BY id DESC LIMIT 1"""
        return _first(await self._read(sql, conversation_id, user_id), _message)

    async def pending_messages(self, user_id: str, conversation_id: int) -> list[Row]:
        """The client tool calls and questions that wait for the person's side, oldest first."""
        sql = """
            SELECT * FROM messages
            WHERE conversation_id = (SELECT id FROM conversations WHERE id = ? AND user_id = ?) AND status = 'pending'
                AND status IN ('streaming', 'pending')
            ORDER BY id"""
        return [_message(row) for row in await self._read(sql, conversation_id, user_id)]

    async def end_unfinished(self, user_id: str, conversation_id: int) -> list[Row]:
        """What waits for the person's side gets cancelled; what could not be saved to its end, interrupted."""
        sql = """
            UPDATE messages SET status = CASE status WHEN 'pending' THEN 'cancelled' ELSE 'interrupted' END
            WHERE conversation_id = (SELECT id FROM conversations WHERE id = ? AND user_id = ?)
                AND status IN ('streaming', 'pending')
            RETURNING *"""
        return [_message(row) for row in await self._write(sql, conversation_id, user_id)]

    async def end_streaming(self, user_id: str, conversation_id: int, status: str) -> list[Row]:
        """What is still being written gets another status; the rows that did."""
        sql = """
            UPDATE messages SET status = ?
            WHERE conversation_id = (SELECT id FROM conversations WHERE id = ? AND user_id = ?)
                AND status = 'streaming' AND status IN ('streaming', 'pending')
            RETURNING *"""
        return [_message(row) for row in await self._write(sql, status, conversation_id, user_id)]

    async def delete_messages_after(self, user_id: str, conversation_id: int, message_id: int) -> None:
        sql = """
            DELETE FROM messages
            WHERE conversation_id = (SELECT id FROM conversations WHERE id = ? AND user_id = ?) AND id > ?"""
        await self._write(sql, conversation_id, user_id, message_id)

    async def set_feedback(self, user_id: str, conversation_id: int, message_ids: list[int], kind: str) -> int:
        """How many of these items there are; if any is missing, none is changed."""
        sql = """
            WITH wanted AS (SELECT DISTINCT value AS id FROM json_each(?)),
                found AS (SELECT i.id FROM wanted JOIN items i ON i.id = wanted.id
                          WHERE i.conversation_id = ? AND i.user_id = ? AND i.role <> 'system')
            UPDATE messages SET feedback = ?
            WHERE id IN (SELECT id FROM found) AND (SELECT COUNT(*) FROM found) = (SELECT COUNT(*) FROM wanted)
            RETURNING id"""
        return len(await self._write(sql, json.dumps(message_ids), conversation_id, user_id, kind))

    # ---- attachments: files that a person sends

    async def add_attachment(
        self, user_id: str, name: str, mime_type: str, size: int, data: bytes | None = None
    ) -> Row:
        """A file that is announced, or with `data` is there; what nobody sent within a day is removed on the way."""
        sql = """
            DELETE FROM attachments
            WHERE message_id IS NULL AND created_at < strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-1 day')"""
        await self._write(sql)
        sql = """
            INSERT INTO attachments (id, key, user_id, name, mime_type, size, data) VALUES (?, ?, ?, ?, ?, ?, ?)
            RETURNING id, key, name, mime_type, size"""
        file_id, key = "att_" + secrets.token_hex(12), secrets.token_urlsafe(24)
        return dict((await self._write(sql, file_id, key, user_id, name, mime_type, size, data))[0])

    async def announced_attachment(self, attachment_id: str, key: str) -> Row | None:
        """A file that waits for its upload, for whoever has its key."""
        sql = "SELECT id, name, mime_type, size FROM attachments WHERE id = ? AND key = ? AND data IS NULL"
        return _first(await self._read(sql, attachment_id, key))

    async def fill_attachment(self, attachment_id: str, key: str, data: bytes) -> Row | None:
        """The upload, which works once."""
        sql = """
            UPDATE attachments SET data = ? WHERE id = ? AND key = ? AND data IS NULL
            RETURNING id, key, name, mime_type, size"""
        return _first(await self._write(sql, data, attachment_id, key))

    async def attachment(self, attachment_id: str, *, user_id: str | None = None, key: str | None = None) -> Row | None:
        """A file with its bytes, for its owner or for whoever has its key."""
        sql = """
            SELECT id, name, mime_type, size, data FROM attachments
            WHERE id = ? AND (user_id = ? OR key = ?) AND data IS NOT NULL"""
        return _first(await self._read(sql, attachment_id, user_id, key))

    async def attachment_data(self, user_id: str, message_ids: list[int]) -> dict[str, bytes]:
        """The bytes of all files of some messages, by the file's id."""
        sql = """
            SELECT a.id, a.data FROM json_each(?) w JOIN attachments a ON a.message_id = w.value
            WHERE a.user_id = ?"""
        return {row["id"]: row["data"] for row in await self._read(sql, json.dumps(message_ids), user_id)}

    async def delete_attachment(self, user_id: str, attachment_id: str) -> bool:
        """Only what was not sent: a message keeps its files."""
        sql = "DELETE FROM attachments WHERE id = ? AND user_id = ? AND message_id IS NULL RETURNING id"
        return bool(await self._write(sql, attachment_id, user_id))

    # ---- tasks: the to-do list of the built-in assistant

    async def add_task(self, user_id: str, title: str) -> Row:
        sql = "INSERT INTO tasks (user_id, title) VALUES (?, ?) RETURNING *"
        return _task((await self._write(sql, user_id, title))[0])

    async def tasks(self, user_id: str) -> list[Row]:
        return [_task(row) for row in await self._read("SELECT * FROM tasks WHERE user_id = ? ORDER BY id", user_id)]

    async def update_task(
        self, user_id: str, task_id: int, *, title: str | None = None, done: bool | None = None
    ) -> Row | None:
        sql = """
            UPDATE tasks SET title = COALESCE(?, title), done = COALESCE(?, done)
            WHERE id = ? AND user_id = ? RETURNING *"""
        return _first(await self._write(sql, title, done, task_id, user_id), _task)

    async def delete_task(self, user_id: str, task_id: int) -> Row | None:
        sql = "DELETE FROM tasks WHERE id = ? AND user_id = ? RETURNING *"
        return _first(await self._write(sql, task_id, user_id), _task)


def _first(rows: list[sqlite3.Row], convert: Callable[[sqlite3.Row], Row] = dict) -> Row | None:
    return convert(rows[0]) if rows else None


def _edge(order: str, after: int | None) -> int:
    """Where a page begins: after a given id, or before all of them."""
    if after is not None:
        return after
    return 2**63 - 1 if order == "desc" else 0


def _json(value: object) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _unjson(text: str | None, where: int) -> Any:
    """A JSON column's value; one that somebody broke by hand counts as empty, and the log says so."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        log.warning("message %d holds JSON that cannot be read; it is left out", where)
        return None


def _message(row: sqlite3.Row) -> Row:
    message = dict(row)
    calls, extra = _unjson(row["tool_calls"], row["id"]), _unjson(row["extra"], row["id"])
    well_formed = isinstance(calls, list) and calls and isinstance(calls[0], dict)
    message["tool_calls"] = [{"id": "", "name": "", "args": {}, **calls[0]}] if well_formed else None
    message["extra"] = extra if isinstance(extra, dict) else {}
    return message


def _task(row: sqlite3.Row) -> Row:
    return {"id": row["id"], "title": row["title"], "done": bool(row["done"])}


# =========================================================================================================== Agent
# What a tool can do (TurnContext), the built-in to-do assistant, the demo model, and choosing a model.

Event = dict[str, Any]

# What only the turn itself may say: a tool that could send these could forge an answer or its end.
RESERVED_EVENTS = {"thread", "text", "tool_call", "tool_result", "error", "done", "item", "client_tool", "input"}
RESERVED_EVENTS |= {"progress", "effect", "notice", "widget"}  # these have methods, which know their fields
MAX_DEPTH = 64  # of nested JSON, from whatever side: the stack has an end, and not the same one for all who encode it


def json_copy(value: object) -> Any:
    """A value as JSON can carry it, half characters replaced. Raises TypeError or ValueError for what is not JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not is_shallow(value):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return json.loads(text if _is_unicode(text) else _mend(text)[0])


def is_shallow(value: object) -> bool:
    """Whether it is nested at most MAX_DEPTH levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = (part for part in level if isinstance(part, (dict, list, tuple)))
        level = [child for part in containers for child in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return True
    return False


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mend(text: str) -> tuple[str, str]:
    """Text whose surrogates are paired or replaced, and a first half at its end that may still find its second.

    Providers that escape JSON to ASCII may send the two halves of an emoji in two deltas; neither can be stored.
    """
    held = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
    text = text[: len(text) - len(held)]
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), held


@dataclass(frozen=True)
class ClientTool:
    """What a tool returns to have the frontend do the work: see TurnContext.client_tool."""

    name: str
    arguments: Row


@dataclass(frozen=True)
class Questions:
    """What a tool returns to ask the person something: see TurnContext.ask."""

    inputs: list[Row]


@dataclass
class TurnContext:
    """What a tool or an action handler gets: who asks, where, and how to reach them while it works.

    A tool receives it inside the Agents SDK's wrapper:

        @function_tool
        async def whoami(wrapper: RunContextWrapper[TurnContext]) -> str:
            await wrapper.context.progress("Looking you up")
            return wrapper.context.user_id

    The user's id comes from the request alone. Never make it an argument of a tool: the model must not choose it.
    """

    user_id: str
    conversation_id: int
    store: Store
    send: Callable[[Event], None] = field(repr=False)  # the turn's own; tools use emit() and the methods below
    locale: str = "en"  # the first of the request's Accept-Language

    def emit(self, event: Event) -> None:
        """Send an event of one's own to the readers, such as {"type": "thinking", "content": "..."}. Not stored.

        Raises ValueError for a type that only the turn or a method may use, and, like TypeError, for what is not JSON.
        """
        kind = event.get("type")
        if not isinstance(kind, str) or kind in RESERVED_EVENTS:
            raise ValueError(f"a tool cannot emit an event of type {kind!r}")
        if kind == "thinking" and not isinstance(event.get("content"), str):
            raise ValueError("the content of a thinking event is text")
        self.send(json_copy(event))

    async def progress(self, text: str, icon: str | None = None) -> None:
        """Say what the tool is doing. `icon` is one of ChatKit's names, such as "search". Not stored."""
        self.send(json_copy({"type": "progress", "content": str(text), "icon": icon}))

    async def effect(self, name: str, data: Row | None = None) -> None:
        """Have the frontend do something, once: ChatKit calls its onEffect with name and data. Not stored."""
        self.send(json_copy({"type": "effect", "name": name, "data": data or {}}))

    async def notice(self, level: str, message: str, title: str | None = None) -> None:
        """Show a notice beside the conversation; `level` is info, warning or danger. Not stored."""
        if level not in ("info", "warning", "danger"):
            raise ValueError(f"level must be info, warning or danger, not {level!r}")
        self.send(json_copy({"type": "notice", "level": level, "message": str(message), "title": title}))

    async def widget(self, root: Any, copy_text: str | None = None) -> int:
        """Show a widget and keep it; its item id comes back.

        `root` is a dict, or an object of the ChatKit SDK's widget classes, whose type is Card, ListView or Basic.
        `copy_text` is the same in words: what is copied, and what the model and plain readers are given.
        """
        row = await self.store.add_message(
            self.user_id, self.conversation_id, "widget", copy_text or "", extra={"widget": _widget_root(root)}
        )
        if row is None:
            raise LookupError("the conversation was deleted")
        self._show_widget(row, "done")
        return int(row["id"])

    async def replace_widget(self, item_id: int, root: Any, copy_text: str | None = None) -> None:
        """Draw a widget of this conversation anew. Raises LookupError where there is none with that id."""
        row = await self.store.message(self.user_id, self.conversation_id, int(item_id))
        if row is None or row["role"] != "widget":
            raise LookupError(f"there is no widget {item_id} in this conversation")
        row = await self.store.update_message(
            self.user_id, row["id"], content=copy_text, extra={"widget": _widget_root(root)}
        )
        if row is not None:
            self._show_widget(row, "replaced")

    def _show_widget(self, row: Row, change: str) -> None:
        self.send({"type": "widget", "id": row["id"], "widget": row["extra"]["widget"], "copy_text": row["content"]})
        self.send({"type": "item", "change": change, "row": row})

    def client_tool(self, name: str, arguments: Row | None = None) -> ClientTool:
        """`return ctx.client_tool("get_selection", {...})` from a tool has the frontend answer in its place.

        The turn ends; when the frontend has sent its result, the agent goes on with it as this call's result.
        """
        return ClientTool(name, json_copy(arguments or {}))

    def ask(self, inputs: list[Row]) -> Questions:
        """`return ctx.ask([...])` from a tool asks the person; the agent goes on when they answered or skipped.

        Each question is {"type": "multiple_choice", "id", "question", "options": [{"value"}], "multiple"} or
        {"type": "freeform", "id", "question", "description"?}. Raises ValueError for any other.
        """
        questions = []
        for given in inputs:
            kind, question = given.get("type"), {key: given.get(key) for key in ("type", "id", "question")}
            if kind == "multiple_choice":
                question["options"] = [{"value": str(option["value"])} for option in given["options"]]
                question["multiple"] = bool(given.get("multiple", False))
            elif kind == "freeform" and given.get("description") is not None:
                question["description"] = str(given["description"])
            elif kind != "freeform":
                raise ValueError(f"a question is of type multiple_choice or freeform, not {kind!r}")
            if not isinstance(question["id"], str) or not isinstance(question["question"], str):
                raise ValueError("a question has an id and a question, both text")
            questions.append(question)
        if not questions or len({question["id"] for question in questions}) < len(questions):
            raise ValueError("ask at least one question, and give each an id of its own")
        return Questions(json_copy(questions))


def _widget_root(root: Any) -> Row:
    """A widget as JSON. The types are those of chatkit/widgets.py in openai-chatkit."""
    if hasattr(root, "model_dump"):
        root = root.model_dump(mode="json", exclude_none=True)
    if not isinstance(root, dict) or root.get("type") not in ("Card", "ListView", "Basic"):
        raise ValueError("a widget's root is a Card, a ListView or a Basic")
    return cast(Row, json_copy(root))


# ---- the to-do assistant

INSTRUCTIONS = (
    "You keep the person's to-do list with your tools. Use them for whatever concerns the list, and never claim a "
    "change that no tool made. Tasks are known by number; look them up when the person names one by its title. "
    "Answer briefly, in the person's language."
)


def _task_result(task: Row | None, task_id: int) -> str:
    return json.dumps(task or {"error": f"There is no task {task_id}."}, ensure_ascii=False)


@function_tool
async def add_task(wrapper: RunContextWrapper[TurnContext], title: str) -> str:
    """Put a task on the person's to-do list.

    Args:
        title: What is to be done, in a few words.
    """
    if not title.strip():
        return json.dumps({"error": "A task needs a title."})
    context = wrapper.context
    return json.dumps(await context.store.add_task(context.user_id, title.strip()[:200]), ensure_ascii=False)


@function_tool
async def list_tasks(wrapper: RunContextWrapper[TurnContext], show: bool = True) -> str:
    """Look up all tasks on the person's to-do list, with their numbers.

    Args:
        show: Whether to show the list to the person as well; false when only you need it.
    """
    context = wrapper.context
    tasks = await context.store.tasks(context.user_id)
    if show and tasks:
        await context.widget(task_widget(tasks), copy_text=task_text(tasks))
    return json.dumps(tasks, ensure_ascii=False)


@function_tool
async def complete_task(wrapper: RunContextWrapper[TurnContext], task_id: int) -> str:
    """Mark a task as done.

    Args:
        task_id: The task's number.
    """
    context = wrapper.context
    return _task_result(await _change_task(context, task_id, done=True), task_id)


@function_tool
async def update_task(wrapper: RunContextWrapper[TurnContext], task_id: int, title: str) -> str:
    """Give a task another title.

    Args:
        task_id: The task's number.
        title: The new title.
    """
    if not title.strip():
        return json.dumps({"error": "A task needs a title."})
    return _task_result(await _change_task(wrapper.context, task_id, title=title.strip()[:200]), task_id)


@function_tool
async def delete_task(wrapper: RunContextWrapper[TurnContext], task_id: int) -> str:
    """Take a task off the list.

    Args:
        task_id: The task's number.
    """
    context = wrapper.context
    task = await context.store.delete_task(context.user_id, task_id) if 0 < task_id < 2**63 else None
    return _task_result(task, task_id)


async def _change_task(context: TurnContext, task_id: int, **change: Any) -> Row | None:
    return await context.store.update_task(context.user_id, task_id, **change) if 0 < task_id < 2**63 else None


def task_text(tasks: list[Row]) -> str:
    return "\n".join(f"{task['id']}. {task['title']}{' (done)' if task['done'] else ''}" for task in tasks)


def task_widget(tasks: list[Row]) -> Row:
    """A card with a checkbox for each task; ticking one sends the action `toggle_task` with the task's number.

    What has a default in the SDK's classes is written out: a frontend gets the same from either.
    """
    return {
        "type": "Card",
        "children": [
            {
                "type": "Checkbox",
                "key": str(task["id"]),
                "name": f"task_{task['id']}",
                "label": task["title"],
                "defaultChecked": task["done"],
                "onChangeAction": {
                    "type": "toggle_task",
                    "payload": {"id": task["id"], "done": not task["done"]},
                    "handler": "server",
                    "loadingBehavior": "auto",
                    "streaming": True,
                },
            }
            for task in tasks
        ],
    }


async def toggle_task(context: TurnContext, action: Row, item: Row | None) -> None:
    """The action handler that goes with the to-do assistant: tick the task, and draw the widget again."""
    payload: Any = action.get("payload")
    payload = payload if isinstance(payload, dict) else {}
    task_id = payload.get("id")
    if action.get("type") != "toggle_task" or type(task_id) is not int:
        raise ValueError("the only action here is toggle_task, whose payload has the id of a task")
    if await _change_task(context, task_id, done=bool(payload.get("done", True))) is None:
        await context.notice("warning", f"There is no task {task_id} any more.")
    tasks = await context.store.tasks(context.user_id)
    if item is not None and item["role"] == "widget":
        await context.replace_widget(item["id"], task_widget(tasks), copy_text=task_text(tasks))


def todo_agent() -> Agent[TurnContext]:
    """The assistant that answers where create_app() is given no agent."""
    return Agent(
        name="To-do assistant",
        instructions=INSTRUCTIONS,
        tools=[add_task, list_tasks, complete_task, update_task, delete_task],
    )


# ---- the demo model


@dataclass(frozen=True)
class Command:
    """What a sentence asks for: `verb` is a tool's name, `target` and `title` are the words it is about."""

    verb: str
    target: str = ""
    title: str = ""


_LIST_WORDS = r"(?:my|the)\s+(?:[\w-]+\s+)?(?:list|tasks?|to-?dos?)"
_SENTENCES: tuple[tuple[str, str], ...] = (
    (r"(?:show|list|display|see|read)\b.*\b(?:tasks?|list|to-?dos?|everything|them)\b.*", "list_tasks"),
    (r"(?:show|list)(?: all)?", "list_tasks"),
    (r"what(?:'s|s| is| are| do i)\b.*\b(?:tasks?|list|to-?dos?|to do|have|left|open)\b.*", "list_tasks"),
    (rf"(?:add|put|create|make)\s+(?:an?\s+)?(?:new\s+)?(?:tasks?|to-?dos?)(?:\s*:\s*|\s+(?:to|called|named)\s+|\s+)"
     rf"(?P<title>.+?)(?:\s+(?:to|on)\s+{_LIST_WORDS})?", "add_task"),
    (rf"(?:add|put)\s+(?P<title>.+?)(?:\s+(?:to|on|onto)\s+{_LIST_WORDS})?", "add_task"),
    (r"(?:new\s+task|task|to-?do)\s*:\s*(?P<title>.+)", "add_task"),
    (r"(?:remind\s+me\s+to|i\s+(?:need|have|want)\s+to|don't\s+forget\s+to)\s+(?P<title>.+)", "add_task"),
    (r"(?:rename|change|update)\s+(?P<target>.+?)\s+(?:to|into|as)\s+(?P<title>.+)", "update_task"),
    (r"mark\s+(?P<target>.+?)(?:\s+as)?\s+(?:done|completed?|finished)", "complete_task"),
    (r"(?:complete|finish|tick(?:\s+off)?|check(?:\s+off)?|i\s+(?:did|finished|completed)|done\s+with)\s+"
     r"(?P<target>.+?)(?:\s+(?:on|from)\s+" + _LIST_WORDS + ")?", "complete_task"),
    (r"(?P<target>.+?)\s+(?:is|are)\s+(?:done|completed?|finished)", "complete_task"),
    (rf"(?:delete|remove|drop|erase|clear)\s+(?P<target>.+?)(?:\s+(?:from|off|on)\s+{_LIST_WORDS})?", "delete_task"),
)  # fmt: skip
_STARTS = (
    r"(?:please\s+)?(?:add|put|create|make|new|show|list|display|what|remind|rename|change|update|mark|complete|finish"
    r"|tick|check|delete|remove|drop|erase|clear)\b"
)
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
_NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def understand(text: str) -> list[Command]:
    """The to-do commands in a message, in order; empty where it holds none."""
    commands = []
    for clause in re.split(rf"(?:[.;!?\n]+\s*|,?\s+(?:and\s+then|then|and)\s+|,\s*)(?={_STARTS})", text, flags=re.I):
        clause = re.sub(r"^(?:(?:please|then|and|now|can you|could you|would you)\s+)+", "", clause.strip(), flags=re.I)
        clause = re.sub(r"(?:\s*,?\s*please)?[\s.!?,;]*$", "", clause, flags=re.I)
        for pattern, verb in _SENTENCES:
            found = re.fullmatch(pattern, clause, flags=re.I | re.S)
            if found is None:
                continue
            words = {"target": "", "title": "", **{k: v.strip() for k, v in found.groupdict().items() if v}}
            titles = [words["title"]]
            if verb == "add_task" and "," in words["title"]:  # "add milk, eggs and bread" is three
                titles = [part for part in re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+", words["title"]) if part]
            commands += [Command(verb, words["target"], _unquoted(title)) for title in titles]
            break
    return commands


def _unquoted(text: str) -> str:
    return text.strip().strip("\"'\u201c\u201d\u2018\u2019")


def _find_tasks(target: str, tasks: list[Row]) -> list[int]:
    """The numbers of the tasks that some words mean: by number, by position, by title. Empty: none, or unclear."""
    words = _unquoted(re.sub(r"^(?:(?:the|my|task|number|no\.?)\s+)+", "", target.lower().strip()))
    words = re.sub(r"\s+(?:task|item|one|to-?do)s?$", "", words)
    if re.fullmatch(r"#?\d{1,18}", words):
        return [int(words.lstrip("#"))]
    if words in ("all", "everything", "all of them", "all my", "them all"):
        return [task["id"] for task in tasks]
    if words in ("last", "latest"):
        return [tasks[-1]["id"]] if tasks else []
    for position, (ordinal, number) in enumerate(zip(_ORDINALS, _NUMBERS, strict=True)):
        if words == ordinal:
            return [tasks[position]["id"]] if position < len(tasks) else []
        if words == number:
            return [position + 1]
    exact = [task["id"] for task in tasks if task["title"].lower() == words]
    part = [task["id"] for task in tasks if words and words in task["title"].lower()]
    return exact[:1] or (part if len(part) == 1 else [])


class DemoModel(Model):
    """A model without a network: it understands a handful of to-do sentences, and says so.

    It takes the same way as any model: it streams Responses events, and its tool calls go through the runner.
    Like any model it keeps nothing between two calls; what it did already is in the items that it is given.
    """

    def __init__(self, delay: float = 0.02) -> None:
        self.delay = delay  # seconds between two words, so that one can see it stream

    async def get_response(self, *args: Any, **kwargs: Any) -> ModelResponse:
        async for event in self.stream_response(*args, **kwargs):
            if event.type == "response.completed":
                return ModelResponse(output=event.response.output, usage=Usage(), response_id=None)
        raise AssertionError("the stream ends with response.completed")

    async def stream_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        *_: Any,
        **__: Any,
    ) -> AsyncIterator[TResponseStreamEvent]:
        items = [{"role": "user", "content": input}] if isinstance(input, str) else cast(list[Row], input)
        calls, text = self._decide(items, [tool.name for tool in tools], model_settings.tool_choice)
        output: list[ResponseOutputItem] = []
        if calls:
            for name, arguments in calls:
                output.append(
                    ResponseFunctionToolCall(
                        type="function_call",
                        id="fc_demo",
                        call_id="call_" + secrets.token_hex(8),
                        name=name,
                        arguments=json.dumps(arguments, ensure_ascii=False),
                    )
                )
        else:
            for word in re.findall(r"\S+\s*|\s+", text):
                yield ResponseTextDeltaEvent(
                    type="response.output_text.delta",
                    item_id="msg_demo",
                    output_index=0,
                    content_index=0,
                    sequence_number=0,
                    delta=word,
                    logprobs=[],
                )
                await asyncio.sleep(self.delay)
            part = ResponseOutputText(type="output_text", text=text, annotations=[])
            output.append(
                ResponseOutputMessage(
                    type="message", id="msg_demo", role="assistant", status="completed", content=[part]
                )
            )
        for index, item in enumerate(output):
            yield ResponseOutputItemDoneEvent(
                type="response.output_item.done", item=item, output_index=index, sequence_number=0
            )
        said, heard = len(text.split()), len(json.dumps(items).split())  # words: a demo has no tokens
        yield ResponseCompletedEvent(
            type="response.completed",
            sequence_number=0,
            response=ModelOutput(
                id="resp_demo",
                created_at=0,
                model="demo",
                object="response",
                output=output,
                tools=[],
                tool_choice="auto",
                parallel_tool_calls=True,
                usage=ResponseUsage(
                    input_tokens=heard,
                    output_tokens=said,
                    total_tokens=heard + said,
                    input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
                    output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
                ),
            ),
        )

    def _decide(self, items: list[Row], tools: list[str], forced: object) -> tuple[list[tuple[str, Row]], str]:
        """What to do next: tools to call, or else what to say."""
        start = max((n for n, item in enumerate(items) if item.get("role") == "user"), default=0)
        message = _own_words(items[start]) if items else ""
        outputs = {i["call_id"]: i["output"] for i in items if i.get("type") == "function_call_output"}
        done = [
            (item["name"], _object(item["arguments"]), _value(outputs.get(item["call_id"])))
            for item in items[start:]
            if item.get("type") == "function_call"
        ]
        if forced in tools and not done:
            arguments = {"title": message} if forced in ("add_task", "update_task") else {}
            wanted = [(c.verb, c.title) for c in understand(message) if c.verb == forced]
            return [(str(forced), {"title": wanted[0][1]} if wanted and wanted[0][1] else arguments)], ""
        named = re.search(r"\bcall\s+(\w+)\s*(\{.*\})?", message, re.S)
        if named and named[1] in tools:
            if not done:
                return [(named[1], _object(named[2] or "{}"))], ""
            return [], "\n\n".join(f"The tool `{name}` answered: {_text(result)}" for name, _, result in done)
        commands = understand(message) if "add_task" in tools else []
        if not commands:
            return [], self._introduction(tools, items, done)

        looked_up = [result for name, args, result in done if name == "list_tasks" and args.get("show") is False]
        acted = [call for call in done if not (call[0] == "list_tasks" and call[1].get("show") is False)]
        calls, missing = self._plan(commands, _known_tasks(items), looked_up)
        if calls is None:
            return [("list_tasks", {"show": False})], ""
        rest = calls[len(acted) :]
        if rest:  # a list is shown once what comes before it has been done
            until = next((n for n, (name, _) in enumerate(rest) if name == "list_tasks"), len(rest))
            return rest[: max(until, 1)], ""
        said = [self._say(*call) for call in acted]
        said += [f"I found no single task that fits \u201c{target}\u201d." for target in missing]
        return [], "\n\n".join(said)

    @staticmethod
    def _plan(
        commands: list[Command], shown: list[Row] | None, looked_up: list[Any]
    ) -> tuple[list[tuple[str, Row]] | None, list[str]]:
        """The calls that the commands come to, None where the tasks must be looked up first; and targets not found."""
        calls: list[tuple[str, Row]] = []
        missing = []
        for command in commands:
            if command.verb == "add_task":
                calls.append(("add_task", {"title": command.title}))
            elif command.verb == "list_tasks":
                calls.append(("list_tasks", {"show": True}))
            else:
                # "the second one" means the list that the person saw last; a title means the tasks there are now.
                by_position = re.search(rf"\b(?:{'|'.join(_ORDINALS)}|last|latest)\b", command.target.lower())
                tasks = shown if by_position and shown is not None else looked_up[0] if looked_up else None
                found = _find_tasks(command.target, tasks or [])
                if tasks is None and not re.search(r"^\D*#?\d+$", command.target):
                    return None, []
                if not found:
                    missing.append(command.target)
                title = {"title": command.title} if command.verb == "update_task" else {}
                calls += [(command.verb, {"task_id": task_id, **title}) for task_id in found]
        return calls, missing

    @staticmethod
    def _say(name: str, arguments: Row, result: Any) -> str:
        if name == "list_tasks" and isinstance(result, list):
            if not result:
                return "Your list is empty."
            lines = [f"- **{t['id']}** {t['title']}{' (done)' if t['done'] else ''}" for t in result]
            return "Your tasks:\n\n" + "\n".join(lines)
        if not isinstance(result, dict) or "title" not in result:
            return str(result.get("error", result)) if isinstance(result, dict) else f"That did not work: {result}"
        title = f"\u201c{result['title']}\u201d"
        return {
            "add_task": f"Added {title} to your list. It is task {result['id']}.",
            "complete_task": f"Marked {title} as done.",
            "update_task": f"Task {result['id']} is now {title}.",
            "delete_task": f"Removed {title} from your list.",
        }.get(name, _text(result))

    @staticmethod
    def _introduction(tools: list[str], items: list[Row], done: list[tuple[str, Row, Any]]) -> str:
        if done:
            return "\n\n".join(f"The tool `{name}` answered: {_text(result)}" for name, _, result in done)
        files = (
            [part for part in _parts(items[-1]) if part.get("type") in ("input_image", "input_file")] if items else []
        )
        seen = f"You sent {len(files)} file(s), which I cannot look at. " if files else ""
        what = (
            "I keep a to-do list: try \u201cadd buy milk to my list\u201d, \u201cshow my tasks\u201d, "
            "\u201ccomplete buy milk\u201d, \u201crename 1 to buy oat milk\u201d or \u201cdelete the first one\u201d. "
            if "add_task" in tools
            else "I can call the tools of this app: " + ", ".join(f"\u201ccall {name}\u201d" for name in tools) + ". "
            if tools
            else ""
        )
        return (
            f"{seen}I am the built-in demo model: a few rules, no language model behind them. {what}"
            "For real answers, set OPENAI_API_KEY, GEMINI_API_KEY or CHATKIT_MODEL and start the server again."
        )


def _parts(item: Row) -> list[Row]:
    content = item.get("content")
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else list(content or [])


def _own_words(item: Row) -> str:
    """The last text of a user's message: what stands before it is context that the server added."""
    texts = [part["text"] for part in _parts(item) if part.get("type") == "input_text"]
    return texts[-1] if texts else ""


def _value(output: Any) -> Any:
    """A tool's output, decoded where it is a JSON object or array; NaN, which Python takes for JSON, is none."""
    if isinstance(output, str) and output[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            return json_copy(json.loads(output))
    return output


def _object(text: str) -> Row:
    """A tool call's arguments, empty where they are not a JSON object."""
    value = _value(text)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _known_tasks(items: list[Row]) -> list[Row] | None:
    """The tasks that the person was shown last, from the results in the history."""
    shown = {
        item["call_id"] for item in items if item.get("name") == "list_tasks" and _object(item["arguments"]).get("show")
    }
    for item in reversed(items):
        if item.get("type") == "function_call_output" and item["call_id"] in shown:
            tasks = _value(item["output"])
            return tasks if isinstance(tasks, list) else None
    return None


# ---- choosing a model


class Models(ModelProvider):
    """Finds the model for a name; each is made once.

    demo                       the offline demo model
    gemini/gemini-2.5-flash    with a slash: LiteLLM
    gpt-5.6-luna               without: OpenAI's Responses API, or chat completions at OPENAI_BASE_URL

    Without a name, `default`: CHATKIT_MODEL, or what the keys in the environment allow, or the demo model.
    """

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where the default model cannot work."""
        self.settings = settings
        self._models: dict[str, Model] = {}
        self._client: AsyncOpenAI | None = None
        if settings.model:
            self.default = settings.model
        elif settings.openai_api_key:
            self.default = get_default_model()
        elif settings.gemini_api_key:
            self.default = "gemini/" + settings.gemini_model.split("/")[-1]
        else:
            self.default = "demo"
        for name in self.names:
            self.get_model(name)  # a name that cannot work is told now, not at the first message

    @property
    def names(self) -> list[str]:
        """The models that a message may ask for."""
        return list(dict.fromkeys([self.default, *self.settings.models]))

    def get_model(self, model_name: str | None) -> Model:
        name = model_name or self.default
        if name not in self._models:
            self._models[name] = self._make(name)
        return self._models[name]

    def _make(self, name: str) -> Model:
        if name == "demo":
            return DemoModel()
        if "/" in name:
            return self._make_litellm(name)
        if not self.settings.openai_api_key and not self.settings.openai_base_url:
            raise SettingsError(
                f"The model {name!r} is one of OpenAI's and needs OPENAI_API_KEY, or OPENAI_BASE_URL for a server "
                "that speaks its API. Names of other providers have a slash, as in gemini/gemini-2.5-flash."
            )
        if self.client.base_url.host == "api.openai.com":
            return OpenAIResponsesModel(model=name, openai_client=self.client)
        return OpenAIChatCompletionsModel(model=name, openai_client=self.client)

    @property
    def client(self) -> AsyncOpenAI:
        if self._client is None:
            self._client = AsyncOpenAI(
                api_key=self.settings.openai_api_key or "none",  # local servers ask for none
                base_url=self.settings.openai_base_url or "https://api.openai.com/v1",  # or it looks in the environment
                http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [_no_long_wait]}),
            )
        return self._client

    async def transcribe(self, audio: bytes, mime_type: str) -> str:
        """Speech to text at OpenAI, which knows a recording's format by its file name."""
        name = "audio." + mime_type.split("/")[-1]
        model = "gpt-4o-mini-transcribe"
        return (await self.client.audio.transcriptions.create(model=model, file=(name, audio, mime_type))).text

    def _make_litellm(self, name: str) -> Model:
        # LiteLLM costs two seconds and 50 MB; and it fetches a price list at import unless it is told not to.
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        import litellm
        from agents.extensions.models.litellm_model import LitellmModel

        litellm.suppress_debug_info = True  # it prints advice to standard output otherwise
        litellm.drop_params = True  # a setting that one provider does not know is left out, rather than refused
        litellm.disable_aiohttp_transport = True  # that one keeps the connection of a stopped answer, and hides breaks
        _mend_litellm()
        try:
            litellm.get_llm_provider(name)
        except Exception as error:
            raise SettingsError(
                f"LiteLLM knows no provider for the model {name!r}; names look like gemini/gemini-2.5-flash."
            ) from error
        key = self.settings.gemini_api_key if name.startswith("gemini/") else None
        return LitellmModel(model=name, api_key=key)

    async def close(self) -> None:
        client, self._client = self._client, None
        self._models.clear()
        if client is not None:
            await client.close()


async def _no_long_wait(response: Any) -> None:
    """The client obeys a Retry-After of up to two minutes, twice, without a word; a person is better told at once."""
    if not re.fullmatch(r"[0-5](\.[0-9]+)?", response.headers.get("retry-after", "0")):
        response.headers["x-should-retry"] = "false"


def _mend_litellm() -> None:
    """Where a stream of Gemini's ends within a chunk, LiteLLM 1.83 asks for the rest for ever and stops the process."""
    from litellm.llms.vertex_ai.gemini.vertex_and_google_ai_studio_gemini import ModelResponseIterator

    parse = ModelResponseIterator.handle_accumulated_json_chunk

    def parse_or_end(self: Any, chunk: str) -> Any:
        if not chunk:
            rest, self.accumulated_json = self.accumulated_json, ""
            return json.loads(rest)  # which raises, or it would have been taken before
        return parse(self, chunk)

    if parse.__name__ != parse_or_end.__name__:
        ModelResponseIterator.handle_accumulated_json_chunk = parse_or_end  # type: ignore[method-assign]  # on purpose


class EmptyAnswer(Exception):
    """The model ended without a word."""


def _http_status(error: BaseException | None) -> int:
    """The HTTP status behind an error, 0 if there is none.

    LiteLLM goes by digits in the provider's text, where a port or a length may look like a status; so what counts is
    the error that its own came from.
    """
    status = 0
    while error is not None:
        found = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
        status = found if isinstance(found, int) else status
        error = error.__cause__ or error.__context__
    return status


def explain(error: BaseException) -> tuple[str, str, bool]:
    """An error as a person may see it: its code, a text from a fixed list, and whether to try again is worth it.

    The error's own text stays out: providers put keys, addresses and prompts into theirs.
    """
    error = getattr(error, "original_exception", None) or error  # what LiteLLM has wrapped in one of its own
    status = _http_status(error)
    if not status and isinstance(
        error, (openai.APITimeoutError, ModelTimeoutError, asyncio.TimeoutError, TimeoutError)
    ):
        return "timeout", "The model took too long to answer.", True
    if status in (401, 403):
        return "key_rejected", "The model's provider rejected the API key.", False
    if status in (402, 429):
        return "rate_limited", "The model's provider says: too many requests, or no credit left. Try again later.", True
    if status == 404:
        return "model_not_found", "The model's provider does not know this model. Check the model's name.", False
    if status == 408:
        return "timeout", "The model took too long to answer.", True
    if 400 <= status < 500 and status != 409:
        return "refused", "The model's provider refused the request.", False
    if isinstance(error, (openai.APIConnectionError, ConnectionError)) or status:
        return "unreachable", "The model's provider cannot be reached, or is out of order.", True
    if isinstance(error, MaxTurnsExceeded):
        return "too_many_steps", "The assistant took too many steps without an answer.", True
    if isinstance(
        error,
        (
            InputGuardrailTripwireTriggered,
            OutputGuardrailTripwireTriggered,
            ToolInputGuardrailTripwireTriggered,
            ToolOutputGuardrailTripwireTriggered,
        ),
    ):
        return "guardrail", "This was blocked by a guardrail.", False
    if isinstance(error, ModelRefusalError):
        return "refusal", "The model declined to answer.", False
    if isinstance(error, UnreadableFile):
        return "unreadable_file", str(error), False
    if isinstance(error, (ModelBehaviorError, json.JSONDecodeError)):
        return "bad_answer", "The model's provider broke off, or sent what is no answer.", True
    if isinstance(error, EmptyAnswer):
        return "empty", "The model gave no answer.", True
    if isinstance(error, (sqlite3.Error, StoreError)):
        return "storage", storage_text(error), True
    if isinstance(error, openai.APIError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore"):
        return "unreachable", "The connection to the model's provider broke.", True
    return "internal", "Something went wrong while answering.", True


def storage_text(error: BaseException) -> str:
    """What a failing database means for the person."""
    if isinstance(error, StoreError):
        return str(error)
    text = str(error).lower()
    if "locked" in text or "busy" in text:
        return "The database is locked by another program. Try again in a moment."
    if "full" in text:
        return "The disk is full; nothing new can be kept."
    if "readonly" in text:
        return "The database is read-only; nothing new can be kept."
    return "The database cannot be used right now."


# ---- what the model is shown


class UnreadableFile(Exception):
    """A file that no model can be given; the text is safe to show."""


def model_input(rows: list[Row], cut: bool, files: dict[str, bytes]) -> list[TResponseInputItem]:
    """Stored items as the Agents SDK's input items (those of OpenAI's Responses API).

    `files` has the bytes of attachments by their id. Raises UnreadableFile for one of the newest message.

    `cut` says that older items exist. Item ids are left out: an id would make OpenAI look for the reasoning that
    belongs to it. Call ids go back verbatim: LiteLLM keeps Gemini's thought signatures in them. The calls of one
    model response stay together, in front of their outputs: a response is signed in its first call only.
    """
    items: list[Row] = []
    outputs: list[Row] = []  # of the calls of one response
    notes: list[str] = []  # context, which goes in front of the person's next words
    group = None
    if cut and rows and rows[0]["role"] != "user":
        # Some providers insist that a conversation begins with the person.
        items.append({"role": "user", "content": "(Earlier messages are left out.)"})
    newest = max((row["id"] for row in rows if row["role"] == "user"), default=0)
    for row in rows:
        role, extra = row["role"], row["extra"]
        if role != "widget" and (not row["tool_calls"] or extra.get("group") != group):
            items += outputs
            outputs = []
        if role == "user":
            parts = [{"type": "input_text", "text": note} for note in notes] + _user_parts(
                row, files, row["id"] == newest
            )
            notes = []
            items.append({"role": "user", "content": parts[0]["text"] if len(parts) == 1 else parts})
        elif role == "assistant":
            items.append({"role": "assistant", "content": row["content"]})
        elif row["tool_calls"] and not extra.get("hosted"):  # a hosted tool's call means nothing to another provider
            call, group = row["tool_calls"][0], extra.get("group")
            signed = {"provider_data": extra["provider_data"]} if "provider_data" in extra else {}
            call = {"call_id": call["id"], "name": call["name"], "arguments": _json(call["args"]), **signed}
            items.append({"type": "function_call", **call})
            outputs.append({"type": "function_call_output", "call_id": call["call_id"], "output": _tool_output(row)})
        elif role == "widget":
            shown = row["content"] or json.dumps(extra.get("widget"), ensure_ascii=False)
            notes.append(f"<context>\nThe person was shown this widget:\n{shown}\n</context>")
        elif role == "system":
            notes.append(f"<context>\n{row['content']}\n</context>")
    items += outputs
    if notes:
        items.append({"role": "user", "content": "\n".join(notes)})
    return cast(list[TResponseInputItem], items)


def _tool_output(row: Row) -> str:
    """A stored call's result, as the model is told it; every call has one, or providers refuse the history."""
    if row["status"] == "done":
        return row["content"] or "(no output)"
    if row["role"] == "input" or "client" in row["extra"]:
        return "(The person's side did not answer this.)"
    return "(The call did not finish.)"


def _user_parts(row: Row, files: dict[str, bytes], newest: bool) -> list[Row]:
    """A user's message, its own words last; what is quoted, tagged or attached stands apart from them."""
    extra = row["extra"]
    parts = []
    if extra.get("quoted_text"):
        quoted = f"The person quotes from this conversation:\n<quoted_text>\n{extra['quoted_text']}\n</quoted_text>"
        parts.append({"type": "input_text", "text": quoted})
    for tag in extra.get("parts") or []:
        if tag["type"] == "input_tag":
            about = json.dumps({key: tag[key] for key in ("id", "text", "data")}, ensure_ascii=False)
            parts.append({"type": "input_text", "text": f"The person's message names this as @{tag['text']}:\n{about}"})
    for file in extra.get("attachments") or []:
        part = None if extra.get("unread") and not newest else _file_part(file, files.get(file["id"], b""))
        if part is None and newest:
            raise UnreadableFile(f"The model cannot read {file['name']} ({file['mime_type']}).")
        lost = f"(The person attached {file['name']}, which the model cannot read.)"
        parts.append(part or {"type": "input_text", "text": lost})
    parts.append({"type": "input_text", "text": row["content"] or "(The person sent this without words.)"})
    return parts


def _file_part(file: Row, data: bytes) -> Row | None:
    """A file as the model is given it: an image, a PDF or a text; None for what is neither."""
    mime_type = file["mime_type"]
    url = f"data:{mime_type};base64,{base64.b64encode(data).decode()}"
    if mime_type in ("image/png", "image/jpeg", "image/gif", "image/webp"):
        return {"type": "input_image", "image_url": url, "detail": "auto"}
    if mime_type == "application/pdf":
        return {"type": "input_file", "filename": file["name"], "file_data": url}
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if "\0" in text or mime_type.startswith(("image/", "audio/", "video/")):
        return None
    name = json.dumps(file["name"], ensure_ascii=False)
    return {"type": "input_text", "text": f"The person attached the file {name}:\n<file>\n{text}\n</file>"}


# ============================================================================================================ Turn
# Answering one message: the agent runs, what happens is written down and becomes events, and readers follow those.
#
# Events are plain dicts; their types and fields are those of the plain dialect, which the README lists. One more is
# for the ChatKit dialect alone: {"type": "item", "change": "added" | "done" | "replaced", "row": Row}, a stored item
# that begins to grow, is final, or was changed.

SAVE_EVERY = 0.4  # seconds that text may be on a screen and not yet in the file
STOP_WITHIN = 1.0  # seconds that a stopped model or tool has to let go

STOPPED = "The person stopped the answer above before it was complete. Do not go on with it unless they ask."

# Why a turn was stopped: the error that readers are told, if any; the status of `done`; the status of what was said.
STOP_REASONS: dict[str, tuple[tuple[str, str, bool] | None, str, str]] = {
    "cancelled": (None, "cancelled", "cancelled"),
    "deleted": (None, "cancelled", "cancelled"),
    "timeout": (("timeout", "The answer took too long.", True), "failed", "failed"),
    "shutdown": (("shutdown", "The server is being stopped. What was said so far is kept.", True), "failed",
                 "interrupted"),
}  # fmt: skip


class Draft:
    """A row whose text is still growing; Chat.save_soon() keeps the file at most SAVE_EVERY behind."""

    def __init__(self, turn: Turn, row: Row) -> None:
        self.turn = turn
        self.row = row
        self.id: int = row["id"]
        self.closed = False
        self._parts: list[str] = []
        self._held = ""  # the first half of a character that a provider cut in two

    def add(self, delta: str) -> str:
        """Take a delta; what of it can be shown comes back."""
        if self._held or not _is_unicode(delta):
            delta, self._held = _mend(self._held + delta)
        if delta:
            self._parts.append(delta)
            if self not in self.turn.chat.unsaved:
                self.turn.chat.save_soon(self)
        return delta

    @property
    def text(self) -> str:
        text = "".join(self._parts)
        self._parts = [text]
        return text

    async def close(self, status: str) -> Row:
        """The final row, saved. Raises sqlite3.Error or StoreError."""
        self.closed = True
        self.turn.chat.unsaved.discard(self)
        store, user_id = self.turn.chat.store, self.turn.user_id
        row = await patiently(lambda: store.update_message(user_id, self.id, content=self.text, status=status))
        return row or {**self.row, "content": self.text, "status": status}  # None: the conversation was deleted


async def patiently(write: Callable[[], Awaitable[Any]]) -> Any:
    """A write that must not be lost: another program's lock is waited out for up to half a minute, then it raises."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return await write()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            log.warning("the database is locked by another program; trying again")
            await asyncio.sleep(0.2)


class Turn:
    """One answer being made, in a task of its own; it goes on whether anybody follows or not.

    `events` is what happened so far, and grows until `finished`.
    """

    def __init__(self, chat: Chat, user_id: str, conversation: Row, locale: str = "en") -> None:
        self.chat = chat
        self.id = secrets.token_hex(4)
        self.user_id = user_id
        self.conversation = conversation
        self.conversation_id: int = conversation["id"]
        self.context = TurnContext(user_id, self.conversation_id, chat.store, self.emit, locale)
        self.user_message: Row | None = None  # what it answers
        self.model: str | None = None  # what that message asked for; None is the default
        self.tool_choice: str | None = None
        self.events: list[Event] = []
        self.finished = False
        self.usage = {"input_tokens": 0, "output_tokens": 0}
        self.last_message_id: int | None = None
        self._task: asyncio.Task[None] | None = None
        self._working = False  # not yet putting things away
        self._waiting: list[asyncio.Future[None]] = []
        self._stopped: str | None = None  # a key of STOP_REASONS
        self._run: RunResultStreaming | None = None
        self._draft: Draft | None = None
        self._calls: dict[str, Row] = {}  # tool rows without a result, by call id
        self._announcing = asyncio.Lock()
        self._idle = asyncio.Event()  # set while all that the model said so far has been dealt with
        self._step = 0  # of the model's responses in this turn
        self._step_open = False
        self._messages_seen = 0  # messages of this step that came as deltas
        self._messages_done = 0
        self._answered = False  # something was said since the last tool result
        self._shown = False  # a widget was
        self._unread = False  # the model would not take the message's files

    # ---- events and those who follow them

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if event["type"] == "widget":
            self._shown = True
        if self._waiting:
            self.wake()

    async def wait_beyond(self, seen: int) -> None:
        """Return when there may be more than `seen` events, or it has finished; sometimes for nothing."""
        if len(self.events) <= seen and not self.finished:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future

    def wake(self, *_: object) -> None:
        """Have everybody who waits look again."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    async def follow(self) -> AsyncIterator[Event]:
        """All events from the first to `done`, as they happen."""
        seen = 0
        while not (self.finished and seen == len(self.events)):
            await self.wait_beyond(seen)
            for event in self.events[seen:]:
                seen += 1
                if event["type"] != "item":
                    yield event

    # ---- its life

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Begin; `work` does what this turn is for, `answer` mostly."""
        self._task = asyncio.get_running_loop().create_task(self._live(work), name=f"turn {self.conversation_id}")

    def stop(self, reason: str) -> None:
        """Have it end soon, with what it has; `reason` is one of STOP_REASONS. The first reason counts."""
        if self._stopped or self.finished:
            return
        self._stopped = reason
        if self._run is not None:
            self._run.cancel()  # closes the model's connection, and ends stream_events() without an error
        if self._task is not None:
            asyncio.get_running_loop().call_later(STOP_WITHIN, self._insist)

    @property
    def stopping(self) -> bool:
        return self._stopped is not None

    def _insist(self) -> None:
        if self._working and self._task is not None:
            self._task.cancel()

    async def wait(self) -> None:
        """Until it has ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _live(self, work: Callable[[], Awaitable[None]]) -> None:
        began = time.monotonic()
        timer = asyncio.get_running_loop().call_later(self.chat.settings.turn_timeout, self.stop, "timeout")
        error: tuple[str, str, bool] | None = None
        status, row_status = "completed", "done"
        self.emit({"type": "thread", "thread_id": self.conversation_id, "title": self.conversation["title"]})
        try:
            if self._stopped is None:
                self._working = True
                await work()
        except asyncio.CancelledError:
            self._stopped = self._stopped or "shutdown"  # the event loop itself is closing
        except Exception as exception:
            if self._stopped is None:
                error, status, row_status = explain(exception), "failed", "failed"
                self.chat.log_exception(f"thread {self.conversation_id}: the turn failed", exception)
                if error[0] == "refused" and self.user_message and self.user_message["extra"].get("attachments"):
                    error = (
                        error[0],
                        "The model's provider refused the request, perhaps for the attached files.",
                        False,
                    )
                    self._unread = True
        self._working = False
        timer.cancel()
        reason = self._stopped  # one that comes later comes too late
        if reason is not None:
            error, status, row_status = STOP_REASONS[reason]
        try:
            await self._put_away(row_status, reason)
        except (sqlite3.Error, StoreError) as exception:
            self.chat.log_exception(f"thread {self.conversation_id}: the answer could not be saved", exception)
            error, status = explain(exception), "failed"
        # From here to the end nothing waits: whoever reads `done` can send the next message at once.
        self.chat.forget(self)
        if error is not None:
            self.emit({"type": "error", "message": error[1], "code": error[0], "allow_retry": error[2]})
        self.emit(
            {
                "type": "done",
                "status": status,
                "thread_id": self.conversation_id,
                "message_id": self.last_message_id,
                "usage": self.usage,
            }
        )
        self.finished = True
        self.wake()
        log.info(
            "turn user=%s thread=%d model=%s in=%d out=%d %.2fs %s",
            printable(self.user_id),
            self.conversation_id,
            self.model or self.chat.model_name,
            self.usage["input_tokens"],
            self.usage["output_tokens"],
            time.monotonic() - began,
            status if error is None else f"{status} ({error[0]})",
        )

    async def _put_away(self, row_status: str, reason: str | None) -> None:
        """Leave nothing half-written: what was growing, tools that were running, a note about the stop."""
        if self._run is not None:
            usage = self._run.context_wrapper.usage
            self.usage = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
        if reason == "deleted":
            if self._draft is not None:
                draft, self._draft = self._draft, None
                await draft.close(row_status)
            return
        await self._close_draft(row_status)
        store = self.chat.store
        ended = await patiently(lambda: store.end_streaming(self.user_id, self.conversation_id, row_status))
        for row in ended:
            self.emit({"type": "item", "change": "done", "row": row})
        if self._unread and self.user_message is not None:  # so that the next message is not refused for them too
            extra = {**self.user_message["extra"], "unread": True}
            await store.update_message(self.user_id, self.user_message["id"], extra=extra)
        if reason == "cancelled" and (self.user_message or self._run):  # an action is no answer
            await patiently(lambda: store.add_message(self.user_id, self.conversation_id, "system", STOPPED))

    # ---- the agent's run

    async def answer(self) -> None:
        """Run the agent on what the conversation holds, and turn what the SDK reports into rows and events."""
        chat = self.chat
        self.emit({"type": "thinking", "content": ""})
        settings = chat.settings
        rows = await chat.store.history(self.user_id, self.conversation_id, settings.history_limit + 1)
        cut = len(rows) > settings.history_limit
        rows = rows[1:] if cut else rows
        with_files = [row["id"] for row in rows if row["extra"].get("attachments")]
        files = await chat.store.attachment_data(self.user_id, with_files) if with_files else {}
        self._run = run = Runner.run_streamed(
            chat.agent,
            model_input(rows, cut, files),
            context=self.context,
            max_turns=settings.max_steps,
            hooks=ToolHooks(self),
            run_config=chat.run_config(self.model, self.tool_choice),
        )
        if self._stopped:
            run.cancel()
        stream = cast(AsyncGenerator[StreamEvent, None], run.stream_events())
        running = run.run_loop_task
        try:
            while True:
                self._idle.set()
                if running is not None and running.done():
                    self._keep_what_was_said(running)
                try:
                    event = await stream.__anext__()
                except StopAsyncIteration:
                    break
                self._idle.clear()
                if event.type == "raw_response_event":
                    if event.data.type == "response.output_text.delta":  # the hot path: one of these a token
                        if not event.data.delta:
                            continue
                        if self._draft is None or self._draft.row["role"] != "assistant":
                            await self._open_draft("assistant", event.data.delta)
                        draft = cast(Draft, self._draft)
                        delta = draft.add(event.data.delta)
                        if delta:
                            self.emit({"type": "text", "content": delta, "message_id": draft.id})
                    else:
                        await self._take_raw(event.data)
                elif event.type == "run_item_stream_event":
                    await self._take_item(event.name, event.item)
        finally:
            self._idle.set()
            await stream.aclose()
        if self._stopped is None:
            await self._close_draft("done")
            await self._conclude(run.final_output)

    @staticmethod
    def _keep_what_was_said(running: asyncio.Task[Any]) -> None:
        """The SDK raises a failure ahead of the deltas that came before it, and drops those; unless it is marked."""
        error = None if running.cancelled() else running.exception()
        if error is not None:
            _mark_error_to_drain_stream_events(error)

    async def _take_raw(self, data: Any) -> None:
        """What a model's response says beside its text."""
        if not self._step_open:
            self._step_open = True
            self._step += 1
            self._messages_seen = self._messages_done = 0
        kind = data.type
        if kind == "response.refusal.delta":
            await self._say("assistant", data.delta)
        elif kind in ("response.reasoning_summary_text.delta", "response.reasoning_text.delta"):
            await self._say("reasoning", data.delta)
        elif kind == "response.reasoning_summary_part.added" and self._draft is not None and self._draft.text:
            await self._say("reasoning", "\n\n")
        elif kind == "response.output_item.done" and data.item.type in ("message", "reasoning"):
            if data.item.type == "message" or (self._draft is not None and self._draft.row["role"] == "reasoning"):
                await self._close_draft("done")
        elif kind in ("response.completed", "response.incomplete"):
            await self._close_draft("done")

    async def _take_item(self, name: str, item: Any) -> None:
        """What the runner made of a response: messages, tool calls and their results."""
        if name == "message_output_created":
            self._messages_done += 1
            if self._messages_done > self._messages_seen:  # a model that streams no deltas
                text = ItemHelpers.text_message_output(item)
                if text:
                    await self._say("assistant", text)
            await self._close_draft("done")
        elif name == "tool_called":
            raw = item.raw_item
            call_id = getattr(raw, "call_id", None) or getattr(raw, "id", None) or "call_" + secrets.token_hex(8)
            if getattr(raw, "type", "") == "function_call":
                await self.announce(call_id, raw.name, raw.arguments, getattr(raw, "provider_data", None))
            else:  # a tool on the provider's side, such as a web search: done by the time we hear of it
                await self.announce(call_id, getattr(raw, "name", None) or str(raw.type).removesuffix("_call"), "{}")
                await self._end_call(call_id, "", hosted=True)
        elif name == "tool_output":
            raw = item.raw_item
            call_id = raw.get("call_id") if isinstance(raw, dict) else getattr(raw, "call_id", None)
            await self._end_call(call_id or "", item.output)

    async def _say(self, role: str, text: str) -> None:
        if self._draft is None or self._draft.row["role"] != role:
            await self._open_draft(role, text)
        draft = cast(Draft, self._draft)
        text = draft.add(text)
        if text and role == "assistant":
            self.emit({"type": "text", "content": text, "message_id": draft.id})
        elif text:
            self.emit({"type": "thinking", "content": text})

    async def _open_draft(self, role: str, text: str) -> None:
        """A row that begins with `text`. Its id is ours: most models call every message `__fake_id__`."""
        await self._close_draft("done")
        self._step_open = True
        row = await self._add_row(role, content=text if _is_unicode(text) else "", status="streaming")
        self._draft = Draft(self, row)
        if role == "assistant":
            self._messages_seen += 1
            self.last_message_id = row["id"]
            self._answered = True
        self.emit({"type": "item", "change": "added", "row": row})

    async def _close_draft(self, status: str) -> None:
        if self._draft is not None:
            draft, self._draft = self._draft, None
            self.emit({"type": "item", "change": "done", "row": await draft.close(status)})

    async def _add_row(self, role: str, **columns: Any) -> Row:
        store = self.chat.store
        row = await patiently(lambda: store.add_message(self.user_id, self.conversation_id, role, **columns))
        if row is None:
            raise LookupError("the conversation was deleted")
        return cast(Row, row)

    async def announce(self, call_id: str, name: str, arguments: str, provider_data: Row | None = None) -> None:
        """Write down and report a tool call, once. `provider_data` is the SDK's: Gemini's signature of the call."""
        async with self._announcing:
            if call_id in self._calls:
                return
            await self._close_draft("done")
            call = {"id": call_id, "name": name, "args": _object(arguments or "{}")}
            extra: Row = {"group": f"{self.id}-{self._step}"}
            if provider_data and provider_data.keys() - {"model", "response_id"}:
                extra["provider_data"] = provider_data
            row = await self._add_row("tool", tool_calls=[call], status="streaming", extra=extra)
            self._calls[call_id] = row
            self.emit({"type": "tool_call", **call})

    async def caught_up(self) -> None:
        """Until all that the model said has been dealt with, so that what a tool emits comes after it."""
        while not self._idle.is_set():
            await self._idle.wait()

    async def _end_call(self, call_id: str, output: Any, hosted: bool = False) -> None:
        """A tool's result; or what it waits for, if it handed the work to the person's side."""
        row = self._calls.pop(call_id, None)
        if row is None:
            return
        self._step_open = self._answered = False
        call, extra = row["tool_calls"][0], row["extra"]
        store, user_id = self.chat.store, self.user_id
        if isinstance(output, (ClientTool, Questions)):
            asked = {"client": {"name": output.name, "arguments": output.arguments}} if isinstance(
                output, ClientTool
            ) else {"inputs": output.inputs}  # fmt: skip
            role = "tool" if isinstance(output, ClientTool) else "input"
            row = await store.update_message(user_id, row["id"], role=role, status="pending", extra={**extra, **asked})
            if row is not None:
                self._answered = True
                if isinstance(output, ClientTool):
                    self.emit({"type": "client_tool", "id": call["id"], "name": output.name, "args": output.arguments})
                else:
                    self.emit({"type": "input", "id": row["id"], "inputs": output.inputs})
                self.emit({"type": "item", "change": "done", "row": row})
            return
        if hosted:
            extra = {**extra, "hosted": True}
        text = output if isinstance(output, str) else _jsonable_text(output)
        text = _mend(text)[0] if not _is_unicode(text) else text
        row = await patiently(
            lambda: store.update_message(user_id, row["id"], content=text, status="done", extra=extra)
        )
        self.emit({"type": "tool_result", "id": call["id"], "name": call["name"], "result": _value(text)})
        if row is not None:
            self.emit({"type": "item", "change": "done", "row": row})

    def hand_over(self) -> None:
        """End the run after this step: a tool has asked the person's side for something."""
        if self._run is not None:
            self._run.cancel(mode="after_turn")

    async def _conclude(self, final_output: Any) -> None:
        """A run may end without a message: on a tool's output, which then is the answer, or with nothing at all."""
        if self._answered or self._shown:
            return
        if isinstance(final_output, str) and final_output.strip():
            await self._say("assistant", final_output)
            await self._close_draft("done")
        else:
            raise EmptyAnswer


def _jsonable_text(value: Any) -> str:
    """A tool's output as JSON, whatever it is."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    return json.dumps(value, ensure_ascii=False, default=str)


def printable(text: str) -> str:
    """For the log, where a line break in a name would forge a line."""
    return text if text.isprintable() else repr(text)


class ToolHooks(RunHooks[TurnContext]):
    """The SDK starts a tool as soon as it can; this makes it wait until the call has been written down."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    async def on_tool_start(self, context: Any, agent: Any, tool: Any) -> None:
        await self.turn.caught_up()
        if getattr(context, "tool_call_id", None):
            await self.turn.announce(context.tool_call_id, context.tool_name, context.tool_arguments)

    async def on_tool_end(self, context: Any, agent: Any, tool: Any, result: object) -> None:
        if isinstance(result, (ClientTool, Questions)):
            self.turn.hand_over()


# ============================================================================================================ Chat
# What one app holds: its store, its agent, and the turns that are running.


class Refused(Exception):
    """A request that cannot be granted: an HTTP status and a text for the person."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after = retry_after  # seconds


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    user_id: str = "local"
    by_token: bool = False
    locale: str = "en"


@dataclass
class UserMessage:
    """What a person sends, the same from either dialect."""

    text: str
    parts: list[Row] | None = None  # ChatKit's content, where it is more than one text
    attachments: list[str] = field(default_factory=list)  # ids of uploaded files
    quoted_text: str | None = None
    model: str | None = None
    tool_choice: str | None = None

    @property
    def extra(self) -> Row | None:
        columns = ("parts", "quoted_text", "model", "tool_choice")
        return {name: getattr(self, name) for name in columns if getattr(self, name)} or None


def make_title(text: str) -> str:
    """The first 50 characters of a message, white space folded."""
    folded = " ".join(text.split())
    return folded[:50] + ("..." if len(folded) > 50 else "")


Transcriber = Callable[[bytes, str], Awaitable[str]]  # audio and its media type, such as "audio/webm"
ActionHandler = Callable[[TurnContext, Row, Row | None], Awaitable[None]]


class Chat:
    """One app's state. It opens when it is first needed, and closes with the event loop at the latest.

    So it works under a server that runs its lifespan, mounted in another application, whose server does not, and
    without any server.
    """

    def __init__(
        self,
        settings: Settings,
        agent: Agent[Any] | None = None,
        *,
        store: Store | None = None,
        on_action: ActionHandler | None = None,
        transcribe: Transcriber | None = None,
    ) -> None:
        """Raises SettingsError where the model cannot work."""
        self.settings = settings
        self.store = store or Store(settings.database)
        self.models = Models(settings)
        self.has_tasks = agent is None
        self.on_action = toggle_task if agent is None else on_action
        self._transcribe = transcribe or (self.models.transcribe if settings.openai_api_key else None)
        agent = agent or todo_agent()
        self.model_name = self.models.default
        if agent.model is None:
            for name in self.models.names:
                self.models.get_model(name)  # a name that cannot work is told now, not at the first message
            agent = agent.clone(model=self.models.get_model(None))
        else:
            self.model_name = str(getattr(agent.model, "model", None) or getattr(agent.model, "name", None) or (
                agent.model if isinstance(agent.model, str) else type(agent.model).__name__))  # fmt: skip
        self.agent = agent
        self.turns: dict[int, Turn] = {}  # those that are running, by conversation id
        self.unsaved: set[Draft] = set()  # those with text that is not in the file
        self._saving: asyncio.Task[None] | None = None
        self._run_configs: dict[tuple[str | None, str | None], RunConfig] = {}
        self._beginning: list[str] = []  # whose conversations are being made for a turn
        self._keeper: asyncio.Task[None] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._owns_store = store is None
        secrets_here = (settings.jwt_secret, settings.openai_api_key, settings.gemini_api_key)
        self.secrets = [secret for secret in secrets_here if secret]

    # ---- opening and closing

    async def open(self) -> None:
        """Open the store, unless it is open. Raises StoreError."""
        if self._keeper is not None and not self._keeper.done():
            return
        if self._opening is None or self._opening.done():
            self._opening = asyncio.get_running_loop().create_task(self._open())
        await asyncio.shield(self._opening)

    async def _open(self) -> None:
        if self._owns_store:
            await self.store.open()
        self._keeper = asyncio.get_running_loop().create_task(self._keep(), name="keeper of the store")

    async def _keep(self) -> None:
        """Wait to be cancelled, by close() or by the end of the event loop, and close everything then."""
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await self.stop_turns()
            if self._saving is not None:
                self._saving.cancel()
            if self._owns_store:
                await self.store.close()
            await self.models.close()

    async def close(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None and not keeper.done():
            keeper.cancel()
            await asyncio.wait([keeper])

    async def stop_turns(self) -> None:
        """Save and end all that is running."""
        turns = list(self.turns.values())
        for turn in turns:
            turn.stop("shutdown")
        for turn in turns:
            await turn.wait()

    def log_exception(self, what: str, error: BaseException) -> None:
        """A line and a traceback for the log, without the secrets that providers like to quote."""
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
        log.error("%s\n%s", what, redact(text, self.secrets))

    # ---- what all turns share

    def save_soon(self, draft: Draft) -> None:
        """Save a draft's text within SAVE_EVERY, all drafts at once: a hop to the store for each was costly."""
        self.unsaved.add(draft)
        if self._saving is None or self._saving.done():
            self._saving = asyncio.get_running_loop().create_task(self._save_drafts())

    async def _save_drafts(self) -> None:
        while self.unsaved:
            await asyncio.sleep(SAVE_EVERY)
            drafts, self.unsaved = self.unsaved, set()
            try:  # what close() saves stands in line behind this
                await self.store.save_texts([(draft.text, draft.id, draft.turn.user_id) for draft in drafts])
            except (sqlite3.Error, StoreError) as error:
                log.warning("saving %d answers so far failed: %s", len(drafts), error)
                self.unsaved |= {draft for draft in drafts if not draft.closed}

    def run_config(self, model: str | None, tool_choice: str | None) -> RunConfig:
        """What the SDK is told of a run. Kept: making one takes as long as all else that it does before the model."""
        key = model, tool_choice
        if key not in self._run_configs:
            self._run_configs[key] = RunConfig(
                model=self.models.get_model(model) if model else None,
                model_provider=self.models,
                # Usage is zero from chat completions unless one asks for it.
                model_settings=ModelSettings(include_usage=True, tool_choice=tool_choice),
                tracing_disabled=not self.settings.tracing,
                tool_not_found_behavior="return_error_to_model",
                tool_error_formatter=self._tool_error,
            )
        return self._run_configs[key]

    def _tool_error(self, args: ToolErrorFormatterArgs[TurnContext]) -> str | None:
        """What the model, and so perhaps the person, is told of a tool that raised: not the exception's text."""
        if args.kind != "tool_exception":
            return None
        if isinstance(args.error, ModelBehaviorError):
            return json.dumps({"error": f"These arguments do not fit the parameters of {args.tool_name}."})
        if args.error is not None:
            conversation_id = args.run_context.context.conversation_id
            self.log_exception(f"thread {conversation_id}: the tool {args.tool_name} failed", args.error)
        return json.dumps({"error": f"The tool {args.tool_name} failed."})

    # ---- beginning a turn

    async def conversation(self, user_id: str, conversation_id: int) -> Row:
        """Raises Refused where the user has no such conversation."""
        conversation = await self.store.conversation(user_id, conversation_id)
        if conversation is None:
            raise Refused(404, "Conversation not found")
        return conversation

    async def _active_conversation(self, user_id: str, conversation_id: int) -> Row:
        conversation = await self.conversation(user_id, conversation_id)
        if conversation["status"] != "active":
            reason = f": {conversation['status_reason']}" if conversation["status_reason"] else ""
            raise Refused(409, f"The conversation is {conversation['status']}{reason}")
        return conversation

    @contextlib.asynccontextmanager
    async def _take_up(self, caller: Caller, conversation_id: int) -> AsyncIterator[Turn]:
        """A registered turn in an existing conversation, for the block to prepare; forgotten if that raises."""
        conversation = await self._active_conversation(caller.user_id, conversation_id)
        running = self.turns.get(conversation_id)
        if running is not None and running.stopping:  # who pressed stop may send the next message at once
            await running.wait()
        self._check_room(caller)
        turn = self._register(Turn(self, caller.user_id, conversation, caller.locale))
        try:
            yield turn
        except BaseException:
            self.forget(turn)
            raise

    def _register(self, turn: Turn) -> Turn:
        if turn.conversation_id in self.turns:
            raise Refused(409, "The conversation is being answered already")
        self.turns[turn.conversation_id] = turn
        return turn

    def _check_room(self, caller: Caller) -> None:
        if len(self.turns) + len(self._beginning) >= self.settings.max_concurrent_turns:
            raise Refused(503, "The server is busy. Try again in a moment.", retry_after=5)
        mine = [*self._beginning, *(turn.user_id for turn in self.turns.values())].count(caller.user_id)
        if caller.by_token and mine >= self.settings.max_turns_per_user:
            raise Refused(429, "Too many answers are being written for you at once.", retry_after=5)

    def forget(self, turn: Turn) -> None:
        if self.turns.get(turn.conversation_id) is turn:
            del self.turns[turn.conversation_id]

    def _check_message(self, message: UserMessage) -> None:
        if not message.text.strip() and not message.attachments:
            raise Refused(400, "Message is required")
        tags = [part for part in message.parts or [] if part["type"] == "input_tag"]
        data = "".join(json.dumps(tag["data"], ensure_ascii=False) for tag in tags)  # the one thing not in the text
        length = len(message.text) + len(message.quoted_text or "") + len(data)
        if length > self.settings.max_message_chars:
            raise Refused(413, f"Message is longer than {self.settings.max_message_chars} characters")
        if message.model is not None and message.model not in self.models.names:
            raise Refused(400, f"There is no model {message.model!r} here; there is {', '.join(self.models.names)}")
        tools = [tool.name for tool in self.agent.tools]
        if message.tool_choice is not None and message.tool_choice not in tools:
            raise Refused(400, f"There is no tool {message.tool_choice!r} here; there is {', '.join(tools) or 'none'}")

    async def begin_message(self, caller: Caller, message: UserMessage, conversation_id: int | None = None) -> Turn:
        """Keep a message, in a new conversation where none is named, and have it answered.

        When this returns, the message is in the file. Raises Refused, sqlite3.Error, StoreError.
        """
        self._check_message(message)
        user_id, text, extra = caller.user_id, message.text, message.extra
        title = make_title(text) or "(attachment)"
        files = list(dict.fromkeys(message.attachments))
        try:
            if conversation_id is not None:
                async with self._take_up(caller, conversation_id) as turn:
                    _, row = await self.store.add_user_message(user_id, conversation_id, title, text, extra, files)
            else:
                self._check_room(caller)
                self._beginning.append(user_id)
                try:
                    conversation, row = await self.store.add_user_message(user_id, None, title, text, extra, files)
                finally:
                    self._beginning.remove(user_id)
                turn = self._register(Turn(self, user_id, conversation, caller.locale))
        except LookupError as error:
            raise Refused(404, str(error)) from None
        self._answer(turn, row, new=conversation_id is None)
        return turn

    def _answer(self, turn: Turn, user_message: Row, *, new: bool = False) -> None:
        turn.user_message = user_message
        turn.model = user_message["extra"].get("model")
        turn.tool_choice = user_message["extra"].get("tool_choice")

        async def work() -> None:
            if not new:
                await self._close_pending(turn)
            await turn.answer()

        turn.start(work)

    async def _close_pending(self, turn: Turn) -> None:
        """What the person's side was asked for and did not give: the model is told, and nobody waits any more."""
        for row in await self.store.end_unfinished(turn.user_id, turn.conversation_id):
            turn.emit({"type": "item", "change": "replaced", "row": row})

    async def begin_retry(self, caller: Caller, conversation_id: int, message_id: int | None = None) -> Turn:
        """Remove all that came after a user's message, the last one if none is named, and answer it anew."""
        async with self._take_up(caller, conversation_id) as turn:
            if message_id is None:
                row = await self.store.last_user_message(caller.user_id, conversation_id)
            else:
                row = await self.store.message(caller.user_id, conversation_id, message_id)
            if row is None:
                raise Refused(404, "Message not found")
            if row["role"] != "user":
                raise Refused(400, "Only a user's message can be answered again")
            await self.store.delete_messages_after(caller.user_id, conversation_id, row["id"])
        self._answer(turn, row)
        return turn

    async def begin_tool_output(
        self, caller: Caller, conversation_id: int, result: Any, call_id: str | None = None
    ) -> Turn:
        """Complete the pending client tool call, the last one if none is named, and let the agent go on."""
        async with self._take_up(caller, conversation_id) as turn:
            pending = await self.store.pending_messages(caller.user_id, conversation_id)
            waiting = [row for row in pending if "client" in row["extra"] and row["tool_calls"]]
            if call_id is not None:
                waiting = [row for row in waiting if row["tool_calls"][0]["id"] == call_id]
            if not waiting:
                raise Refused(409, "No client tool call is pending")
            content = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
            extra = {**waiting[-1]["extra"], "output": result}
            row = await self.store.update_message(
                caller.user_id, waiting[-1]["id"], content=content, status="done", extra=extra
            )
            if row is None:
                raise Refused(404, "Conversation not found")
        self._go_on(turn, row, result, show=False)
        return turn

    async def begin_answers(
        self, caller: Caller, conversation_id: int, item_id: int, status: str, answers: dict[str, Row]
    ) -> Turn:
        """Record the answers to pending questions, or that they were skipped, and let the agent go on.

        `answers` has {"values": [...], "skipped": bool} by question id. Ids that were not asked are ignored, and a
        question with one answer keeps the first.
        """
        async with self._take_up(caller, conversation_id) as turn:
            row = await self.store.message(caller.user_id, conversation_id, item_id)
            if row is None:
                raise Refused(404, "Item not found")
            if row["role"] != "input":
                raise Refused(400, "This item asks nothing")
            if row["status"] != "pending":
                raise Refused(409, "This was answered already")
            inputs = []
            for question in row["extra"].get("inputs", []):
                given = answers.get(question["id"]) or {}
                values = list(given.get("values") or [])
                if question["type"] == "multiple_choice" and not question["multiple"]:
                    values = values[:1]
                skipped = status == "skipped" or bool(given.get("skipped")) or not values
                answer = {"values": [], "skipped": True} if skipped else {"values": values, "skipped": False}
                inputs.append({**question, "answer": answer})
            told = [
                {"question": i["question"], **({"skipped": True} if i["answer"]["skipped"] else i["answer"])}
                for i in inputs
            ]
            row = await self.store.update_message(
                caller.user_id,
                item_id,
                content=json.dumps(told, ensure_ascii=False),
                status="done",
                extra={**row["extra"], "inputs": inputs, "answered": status},
            )
            if row is None:
                raise Refused(404, "Conversation not found")
        self._go_on(turn, row, told, show=True)
        return turn

    def _go_on(self, turn: Turn, row: Row, result: Any, *, show: bool) -> None:
        """The agent's next step, with what the person's side gave as the result of its call."""
        call = row["tool_calls"][0]

        async def work() -> None:
            await self._close_pending(turn)
            asked = await self.store.last_user_message(turn.user_id, turn.conversation_id)
            turn.model = asked["extra"].get("model") if asked else None  # what was chosen for the message goes on
            turn.emit({"type": "tool_result", "id": call["id"], "name": call["name"], "result": result})
            if show:
                turn.emit({"type": "item", "change": "replaced", "row": row})
            await turn.answer()

        turn.start(work)

    async def _widget(self, caller: Caller, conversation_id: int, item_id: int | None) -> Row | None:
        if self.on_action is None:
            raise Refused(400, "This server has no handler for actions: give create_app() an on_action")
        if item_id is None:
            return None
        row = await self.store.message(caller.user_id, conversation_id, item_id)
        if row is None:
            raise Refused(404, "Item not found")
        if row["role"] != "widget":
            raise Refused(400, "This item is not a widget")
        return row

    async def begin_action(self, caller: Caller, conversation_id: int, item_id: int | None, action: Row) -> Turn:
        """Have the action handler deal with what was clicked in a widget; what it emits is the turn's."""
        async with self._take_up(caller, conversation_id) as turn:
            item = await self._widget(caller, conversation_id, item_id)
        handler = cast(ActionHandler, self.on_action)
        turn.start(lambda: handler(turn.context, action, item))
        return turn

    async def act(self, caller: Caller, conversation_id: int, item_id: int | None, action: Row) -> Row | None:
        """The same without a stream: the widget as it is afterwards. What the handler emits reaches nobody."""
        await self._active_conversation(caller.user_id, conversation_id)
        item = await self._widget(caller, conversation_id, item_id)
        context = TurnContext(caller.user_id, conversation_id, self.store, lambda event: None, caller.locale)
        try:
            await cast(ActionHandler, self.on_action)(context, action, item)
        except (ValueError, LookupError) as error:
            self.log_exception(f"thread {conversation_id}: the action was refused", error)
            raise Refused(400, "The action was refused") from error
        except Exception as error:
            self.log_exception(f"thread {conversation_id}: the action failed", error)
            raise Refused(500, explain(error)[1]) from error
        return await self.store.message(caller.user_id, conversation_id, item["id"]) if item else None

    async def transcribe(self, audio_base64: str, mime_type: str) -> str:
        """What was said in a recording. Raises Refused."""
        if self._transcribe is None:
            raise Refused(
                501, "Dictation is not set up: set OPENAI_API_KEY, or give create_app() a transcribe function"
            )
        if len(audio_base64) > self.settings.max_attachment_bytes * 4 // 3 + 4:
            raise Refused(413, f"A recording may have {self.settings.max_attachment_bytes:,} bytes")
        try:
            audio = base64.b64decode(audio_base64, validate=True)
        except ValueError:  # binascii.Error, and what is not ASCII
            raise Refused(400, "params.audio_base64: not base64") from None
        if len(audio) > self.settings.max_attachment_bytes:
            raise Refused(413, f"A recording may have {self.settings.max_attachment_bytes:,} bytes")
        try:
            return await self._transcribe(audio, mime_type.split(";")[0].strip().lower())
        except Exception as error:
            self.log_exception("dictation failed", error)
            raise Refused(502, explain(error)[1]) from error

    async def delete_conversation(self, user_id: str, conversation_id: int) -> None:
        await self.conversation(user_id, conversation_id)
        await self._end_turn(conversation_id)
        if not await self.store.delete_conversation(user_id, conversation_id):
            raise Refused(404, "Conversation not found")
        await self._end_turn(conversation_id)  # one that began in between; it has nothing to write to any more

    async def _end_turn(self, conversation_id: int) -> None:
        turn = self.turns.get(conversation_id)
        if turn is not None:
            turn.stop("deleted")
            await turn.wait()

    async def cancel(self, user_id: str, conversation_id: int) -> None:
        """Stop the running answer and keep what was said. Raises Refused."""
        await self.conversation(user_id, conversation_id)
        turn = self.turns.get(conversation_id)
        if turn is None:
            raise Refused(409, "Nothing is being answered here")
        turn.stop("cancelled")
        await turn.wait()


def redact(text: str, secret_values: list[str]) -> str:
    """A text without secrets: known ones, and what looks like a key or a token."""
    for secret in secret_values:
        text = text.replace(secret, "[secret]")
    text = re.sub(r"\b(sk|AIza|ghp|xox[bp])[-_A-Za-z0-9]{12,}", "[secret]", text)
    text = re.sub(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*", "[token]", text)
    return re.sub(
        r"(?i)\b(bearer|api[-_]?key|key)([\"']?\s*[=:]\s*[\"']?|\s+)[-_.A-Za-z0-9]{12,}", r"\1\2[secret]", text
    )


async def stream_agent(
    message: str,
    *,
    agent: Agent[Any] | None = None,
    store: Store,
    user_id: str = "local",
    conversation_id: int | None = None,
    settings: Settings | None = None,
) -> AsyncIterator[Event]:
    """Answer one message without a server, and yield the events of the plain dialect as they happen.

        async with Store(":memory:") as store:
            async for event in stream_agent("add buy milk", store=store):
                print(event)

    Goes on in `conversation_id`, or begins a new conversation, whose id is in the first event. Leaving the loop early
    stops the answer. Raises Refused, with a status and a detail as in the HTTP API; a failing model does not raise,
    it is an `error` event.
    """
    chat = Chat(settings or Settings.from_env(), agent, store=store)
    await chat.open()
    try:
        turn = await chat.begin_message(Caller(user_id), UserMessage(message), conversation_id)
        try:
            async for event in turn.follow():
                yield event
        finally:
            turn.stop("cancelled")
            await turn.wait()
    finally:
        await chat.close()


# =================================================================================================== Plain dialect
# Events as anyone can read them: `id: <turn>-<n>`, `data: {json}`, and `data: [DONE]` at the end.
# The format of a stream is the HTML standard's: https://html.spec.whatwg.org/multipage/server-sent-events.html


class Encoder(Protocol):
    """Turns a turn's events into the bytes of a stream, for one reader."""

    def begin(self) -> bytes: ...

    def encode(self, seen: int, events: list[Event]) -> bytes:
        """`events` come after the first `seen` ones."""

    def end(self) -> bytes: ...


quote = json.encoder.encode_basestring  # a JSON string with its quotes: several times faster than json.dumps
to_json = json.JSONEncoder(ensure_ascii=False).encode


class PlainEncoder:
    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def begin(self) -> bytes:
        return b""

    def encode(self, seen: int, events: list[Event]) -> bytes:
        frames = []
        for number, event in enumerate(events, seen + 1):
            if event["type"] == "text":
                data = f'{{"type": "text", "content": {quote(event["content"])}, "message_id": {event["message_id"]}}}'
            elif event["type"] == "item":
                continue
            else:
                data = to_json(event)
            frames.append(f"id: {self.turn.id}-{number}\ndata: {data}\n\n")
        return "".join(frames).encode()

    def end(self) -> bytes:
        return b"data: [DONE]\n\n"

    def seen_by(self, last_event_id: str | None) -> int:
        """How many events a reader has that comes back with this Last-Event-ID; 0 if it is not one of this turn's."""
        turn_id, _, number = (last_event_id or "").rpartition("-")
        if turn_id != self.turn.id or not re.fullmatch(r"[0-9]{1,9}", number):
            return 0
        return int(number) if int(number) <= len(self.turn.events) else 0


def plain_message(body: Row) -> tuple[UserMessage, int | None]:
    """The body of a plain request: the message, and the conversation it goes on in. Raises Refused."""
    text, files = body.get("message"), body.get("attachments", [])
    if not isinstance(text, str) or not text.strip():
        raise Refused(400, "Message is required")
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise Refused(400, "attachments must be a list of ids")
    for name in ("model", "tool_choice"):
        if not isinstance(body.get(name), (str, type(None))):
            raise Refused(400, f"{name} must be text")
    message = UserMessage(text, attachments=files, model=body.get("model"), tool_choice=body.get("tool_choice"))
    thread_id = body.get("thread_id")
    return message, None if thread_id is None else row_id(thread_id, "Conversation")


def row_id(value: object, what: str) -> int:
    """A row's id from the wire, a whole number or its decimal string. Raises Refused (404) for what cannot be one."""
    if type(value) is int or (isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}", value)):
        number = int(cast(Any, value))
        if 0 < number < 2**63:
            return number
    raise Refused(404, f"{what} not found")


def rest_conversation(conversation: Row) -> Row:
    return {name: conversation[name] for name in ("id", "title", "created_at", "updated_at")}


def rest_message(row: Row) -> Row:
    names = ("id", "role", "content", "tool_calls", "status", "feedback", "created_at")
    message = {name: row[name] for name in names}
    if row["extra"]:
        message["extra"] = row["extra"]
    return message


# ================================================================================================= ChatKit dialect
# The protocol of OpenAI's <openai-chatkit> component. Its source is the official Python SDK, openai-chatkit:
# chatkit/types.py has the types, chatkit/server.py the behaviour. Here a conversation is called a thread.
# Ids on the wire are our row ids as text.

DEFAULT_PAGE = 20


class Wire(BaseModel):
    """A part of a request. Fields that it does not name are ignored, as the SDK does."""

    model_config = ConfigDict(extra="ignore")


class TextPart(Wire):
    type: Literal["input_text"]
    text: str


class TagPart(Wire):
    type: Literal["input_tag"]
    id: str
    text: str
    data: dict[str, Any]
    group: str | None = None
    interactive: bool = False


class ToolChoice(Wire):
    id: str


class InferenceOptions(Wire):
    model: str | None = None
    tool_choice: ToolChoice | None = None


class MessageInput(Wire):
    content: list[Annotated[TextPart | TagPart, Field(discriminator="type")]]
    attachments: list[str] = []
    quoted_text: str | None = None
    inference_options: InferenceOptions = InferenceOptions()

    def message(self) -> UserMessage:
        text = "".join(part.text if part.type == "input_text" else f"@{part.text}" for part in self.content)
        simple = len(self.content) == 1 and self.content[0].type == "input_text"
        choice = self.inference_options.tool_choice
        return UserMessage(
            text,
            parts=None if simple else [part.model_dump(exclude_none=True) for part in self.content],
            attachments=self.attachments,
            quoted_text=self.quoted_text,
            model=self.inference_options.model,
            tool_choice=choice.id if choice else None,
        )


class InThread(Wire):
    thread_id: str


class PageParams(Wire):
    limit: int | None = Field(default=None, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


class CreateParams(Wire):
    input: MessageInput


class AddMessageParams(InThread):
    input: MessageInput


class ItemParams(InThread):
    item_id: str


class ItemsPageParams(PageParams, InThread):
    """A page, and the thread that it is of."""


class RenameParams(InThread):
    title: str


class FeedbackParams(InThread):
    item_ids: list[str] = Field(max_length=100)
    kind: Literal["positive", "negative"]


class ToolOutputParams(InThread):
    result: Any


class Answer(Wire):
    values: list[str] = []
    skipped: bool = False


class Answers(Wire):
    status: Literal["answered", "skipped"] = "answered"
    answers: dict[str, Answer] = {}


class AnswersParams(ItemParams):
    input: Answers


class Action(Wire):
    type: str
    payload: Any = None


class ActionParams(InThread):
    item_id: str | None = None
    action: Action


class NewAttachmentParams(Wire):
    name: str = Field(min_length=1, max_length=255)
    size: int = Field(ge=1)
    mime_type: str


class AttachmentParams(Wire):
    attachment_id: str


class AudioParams(Wire):
    audio_base64: str
    mime_type: str


OPERATIONS: dict[str, type[Wire]] = {
    "threads.create": CreateParams,
    "threads.add_user_message": AddMessageParams,
    "threads.retry_after_item": ItemParams,
    "threads.add_client_tool_output": ToolOutputParams,
    "threads.add_structured_input": AnswersParams,
    "threads.custom_action": ActionParams,
    "threads.sync_custom_action": ActionParams,
    "threads.list": PageParams,
    "threads.get_by_id": InThread,
    "threads.update": RenameParams,
    "threads.delete": InThread,
    "items.list": ItemsPageParams,
    "items.feedback": FeedbackParams,
    "attachments.create": NewAttachmentParams,
    "attachments.delete": AttachmentParams,
    "input.transcribe": AudioParams,
}


def thread_json(conversation: Row, items: Row | None = None) -> Row:
    status = {"type": conversation["status"]}
    if conversation["status"] != "active" and conversation["status_reason"]:
        status["reason"] = conversation["status_reason"]
    return {
        "title": conversation["title"],
        "id": str(conversation["id"]),
        "created_at": conversation["created_at"],
        "status": status,
        "metadata": {},
        "items": items or page_json([], False),
    }


def page_json(data: list[Row], more: bool) -> Row:
    page: Row = {"data": data, "has_more": more}
    if more:
        page["after"] = data[-1]["id"]
    return page


def output_text(text: str) -> Row:
    return {"annotations": [], "text": text, "type": "output_text"}


def attachment_json(file: Row, base: str, *, upload: bool = False, thread_id: str | None = None) -> Row:
    """An attachment; with `upload`, where its bytes are to be sent. `base` is the app's own URL."""
    url = f"{base}/attachments/{file['id']}?key={file['key']}"
    image = file["mime_type"].startswith("image/")
    attachment = {"id": file["id"], "name": file["name"], "mime_type": file["mime_type"]}
    if upload:
        attachment["upload_descriptor"] = {"url": url, "method": "POST", "headers": {}}
    if thread_id is not None:
        attachment["thread_id"] = thread_id
    attachment["type"] = "image" if image else "file"
    return {**attachment, "preview_url": url} if image else attachment


def item_json(row: Row, base: str) -> Row:
    """A stored item as a thread item; `base` is the app's own URL."""
    extra, role = row["extra"], row["role"]
    item: Row = {"id": str(row["id"]), "thread_id": str(row["conversation_id"]), "created_at": row["created_at"]}
    call = row["tool_calls"][0] if row["tool_calls"] else {"id": "", "name": "", "args": {}}
    if role == "user":
        item["type"] = "user_message"
        text = [{"type": "input_text", "text": row["content"]}] if row["content"] else []
        item["content"] = extra.get("parts") or text
        files = extra.get("attachments") or []
        item["attachments"] = [attachment_json(file, base, thread_id=item["thread_id"]) for file in files]
        if extra.get("quoted_text"):
            item["quoted_text"] = extra["quoted_text"]
        item["inference_options"] = {}
        if extra.get("tool_choice"):
            item["inference_options"]["tool_choice"] = {"id": extra["tool_choice"]}
        if extra.get("model"):
            item["inference_options"]["model"] = extra["model"]
    elif role == "assistant":
        item["type"] = "assistant_message"
        item["content"] = [output_text(row["content"])]
    elif role == "reasoning":
        thought = {"type": "thought", "content": row["content"], "status_indicator": "complete"}
        item["type"] = "workflow"
        item["workflow"] = {"type": "reasoning", "tasks": [thought], "expanded": False}
    elif role == "widget":
        item["type"] = "widget"
        item["widget"] = extra.get("widget", {"type": "Card", "children": []})
        if row["content"]:
            item["copy_text"] = row["content"]
    elif role == "input":
        skipped = row["status"] != "pending" and extra.get("answered") != "answered"
        item["type"] = "structured_input"
        item["status"] = "pending" if row["status"] == "pending" else "skipped" if skipped else "answered"
        item["inputs"] = extra.get("inputs", [])
    elif "client" in extra:
        item["type"] = "client_tool_call"
        item["status"] = "pending" if row["status"] == "pending" else "completed"
        item["call_id"] = call["id"]
        item["name"] = extra["client"]["name"]
        item["arguments"] = extra["client"]["arguments"]
        if extra.get("output") is not None:
            item["output"] = extra["output"]
    else:
        running = row["status"] == "streaming"
        item["type"] = "task"
        item["task"] = {
            "type": "custom",
            "title": call["name"],
            "content": to_json(call["args"]) + (f"\n{row['content']}" if row["content"] else ""),
            "status_indicator": "loading" if running else "complete" if row["status"] == "done" else "none",
        }
    return item


class ChatKitEncoder:
    """A turn's events as the protocol's. What begins the stream depends on the operation."""

    def __init__(self, turn: Turn, base: str, *, created: bool = False, new_message: bool = False) -> None:
        self.turn = turn
        self.base = base
        self.created = created
        self.new_message = new_message
        self._thought: str | None = None  # what the growing workflow item says so far
        self._thought_id = ""

    def begin(self) -> bytes:
        events: list[Row] = []
        if self.created:
            events.append({"type": "thread.created", "thread": thread_json(self.turn.conversation)})
        if self.new_message and self.turn.user_message is not None:
            events.append({"type": "thread.item.done", "item": item_json(self.turn.user_message, self.base)})
        events.append({"type": "stream_options", "stream_options": {"allow_cancel": True}})
        return "".join(self._frame(event) for event in events).encode()

    def encode(self, seen: int, events: list[Event]) -> bytes:
        frames: list[str] = []
        for event in events:
            if event["type"] == "text":
                frames.append(
                    f'data: {{"type":"thread.item.updated","item_id":"{event["message_id"]}","update":'
                    '{"type":"assistant_message.content_part.text_delta","content_index":0,'
                    f'"delta":{quote(event["content"])}}}}}\n\n'
                )
            else:
                frames += map(self._frame, self._translate(event))
        return "".join(frames).encode()

    def end(self) -> bytes:
        return b""

    @staticmethod
    def _frame(event: Row) -> str:
        return f"data: {to_json(event)}\n\n"

    def _translate(self, event: Event) -> list[Row]:
        """The protocol's events for one of ours; mostly one or none."""
        kind = event["type"]
        if kind == "item":
            return self._item(event["change"], event["row"])
        if kind == "thinking" and event.get("content"):
            if self._thought is None:
                return [{"type": "progress_update", "text": event["content"]}]
            update = "workflow.task.updated" if self._thought else "workflow.task.added"
            self._thought += event["content"]
            thought = {"type": "thought", "content": self._thought, "status_indicator": "loading"}
            return [self._update(self._thought_id, {"type": update, "task_index": 0, "task": thought})]
        if kind == "tool_call":
            return [{"type": "progress_update", "text": f"Running {event['name']}"}]
        if kind == "progress":
            return [_without_none({"type": "progress_update", "icon": event["icon"], "text": event["content"]})]
        if kind == "effect":
            return [{"type": "client_effect", "name": event["name"], "data": event["data"]}]
        if kind == "notice":
            return [_without_none(event)]
        if kind == "error":
            retry = event["allow_retry"]
            return [{"type": "error", "code": "custom", "message": event["message"], "allow_retry": retry}]
        return []

    def _item(self, change: str, row: Row) -> list[Row]:
        item = item_json(row, self.base)
        if change == "replaced":
            return [{"type": "thread.item.replaced", "item": item}]
        if change == "added" and row["role"] == "assistant":
            item["content"] = []
            added = {"type": "assistant_message.content_part.added", "content_index": 0, "content": output_text("")}
            return [{"type": "thread.item.added", "item": item}, self._update(item["id"], added)]
        if change == "added":
            self._thought, self._thought_id = "", item["id"]
            item["workflow"]["tasks"] = []
            return [{"type": "thread.item.added", "item": item}]
        done: list[Row] = [{"type": "thread.item.done", "item": item}]
        if row["role"] == "assistant":
            part = {"type": "assistant_message.content_part.done", "content_index": 0, "content": item["content"][0]}
            done.insert(0, self._update(item["id"], part))
        elif row["role"] == "reasoning":
            self._thought = None
        return done

    @staticmethod
    def _update(item_id: str, update: Row) -> Row:
        return {"type": "thread.item.updated", "item_id": item_id, "update": update}


def _without_none(event: Row) -> Row:
    return {name: value for name, value in event.items() if value is not None}


async def answer_chatkit(chat: Chat, caller: Caller, body: Row, base: str) -> Response:
    """One request of the protocol; `base` is the app's own URL. Raises Refused."""
    operation = body["type"]
    if not isinstance(operation, str) or operation not in OPERATIONS:
        raise Refused(400, f"Unknown type {str(operation)[:100]!r}")
    try:
        params: Any = OPERATIONS[operation].model_validate(body.get("params", {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("params", *first["loc"])))
        raise Refused(400, f"{where}: {first['msg']}") from None
    user_id, store = caller.user_id, chat.store
    thread_id = row_id(params.thread_id, "Thread") if isinstance(params, InThread) else 0

    def stream(turn: Turn, **begins: bool) -> Response:
        leave = None if chat.settings.on_disconnect == "continue" else lambda: turn.stop("cancelled")
        return EventStream(turn, ChatKitEncoder(turn, base, **begins), on_leave=leave)

    if operation == "threads.create":
        turn = await chat.begin_message(caller, params.input.message())
        return stream(turn, created=True, new_message=True)
    if operation == "threads.add_user_message":
        return stream(await chat.begin_message(caller, params.input.message(), thread_id), new_message=True)
    if operation == "threads.retry_after_item":
        return stream(await chat.begin_retry(caller, thread_id, row_id(params.item_id, "Item")))
    if operation == "threads.add_client_tool_output":
        return stream(await chat.begin_tool_output(caller, thread_id, params.result))
    if operation == "threads.add_structured_input":
        answers = {key: answer.model_dump() for key, answer in params.input.answers.items()}
        item_id = row_id(params.item_id, "Item")
        return stream(await chat.begin_answers(caller, thread_id, item_id, params.input.status, answers))
    if operation in ("threads.custom_action", "threads.sync_custom_action"):
        item = None if params.item_id is None else row_id(params.item_id, "Item")
        action = params.action.model_dump()
        if operation == "threads.custom_action":
            return stream(await chat.begin_action(caller, thread_id, item, action))
        row = await chat.act(caller, thread_id, item, action)
        return JSONResponse({"updated_item": item_json(row, base)} if row else {})
    if operation == "threads.list":
        after = None if params.after is None else row_id(params.after, "Thread")
        if after is not None:
            await chat.conversation(user_id, after)
        rows, more = await store.conversation_page(user_id, params.limit or DEFAULT_PAGE, params.order, after)
        return JSONResponse(page_json([thread_json(row) for row in rows], more))
    if operation == "attachments.create":
        mime_type = check_file(chat.settings, params.mime_type, params.size)
        file = await store.add_attachment(user_id, params.name, mime_type, params.size)
        return JSONResponse(attachment_json(file, base, upload=True))
    if operation == "attachments.delete":
        if not await store.delete_attachment(user_id, params.attachment_id):
            raise Refused(404, "Attachment not found, or sent already")
        return JSONResponse({})
    if operation == "input.transcribe":
        return JSONResponse({"text": await chat.transcribe(params.audio_base64, params.mime_type)})
    conversation = await chat.conversation(user_id, thread_id)
    if operation == "threads.get_by_id":
        rows, more = await store.message_page(user_id, thread_id, DEFAULT_PAGE, "asc", None)
        return JSONResponse(thread_json(conversation, page_json([item_json(row, base) for row in rows], more)))
    if operation == "threads.update":
        return JSONResponse(thread_json(await rename(chat, user_id, thread_id, params.title)))
    if operation == "threads.delete":
        await chat.delete_conversation(user_id, thread_id)
        return JSONResponse({})
    if operation == "items.list":
        after = None if params.after is None else row_id(params.after, "Item")
        if after is not None and await store.message(user_id, thread_id, after) is None:
            raise Refused(404, "Item not found")
        rows, more = await store.message_page(user_id, thread_id, params.limit or DEFAULT_PAGE, params.order, after)
        return JSONResponse(page_json([item_json(row, base) for row in rows], more))
    assert operation == "items.feedback"
    item_ids = [row_id(item_id, "Item") for item_id in params.item_ids]
    if await store.set_feedback(user_id, thread_id, item_ids, params.kind) < len(set(item_ids)):
        raise Refused(404, "Item not found")
    return JSONResponse({})


def check_file(settings: Settings, mime_type: str, size: int = 0) -> str:
    """A file's type without its parameters. Raises Refused for what is not a type, and for what is too large."""
    if size > settings.max_attachment_bytes:
        raise Refused(413, f"A file may have {settings.max_attachment_bytes:,} bytes")
    mime_type = mime_type.split(";")[0].strip().lower() or "application/octet-stream"
    if not re.fullmatch(r"[a-z0-9][\w.+-]{0,99}/[a-z0-9][\w.+-]{0,99}", mime_type, re.ASCII):
        raise Refused(400, "params.mime_type: not a media type")
    return mime_type


async def rename(chat: Chat, user_id: str, conversation_id: int, title: object) -> Row:
    """The conversation with its new title. Raises Refused."""
    if not isinstance(title, str) or not 1 <= len(title.strip()) <= 200:
        raise Refused(400, "title must be text of 1 to 200 characters")
    conversation = await chat.store.rename_conversation(user_id, conversation_id, title.strip())
    if conversation is None:
        raise Refused(404, "Conversation not found")
    return conversation


# ============================================================================================================ HTTP
# create_app(), who may call, the routes.

KEEP_ALIVE = 15.0  # seconds of silence after which a comment keeps proxies from closing a stream
COALESCE = 0.008  # seconds between two chunks of a stream that flows: nobody sees it, and a hundred streams feel it
COALESCE_EACH = 0.00025  # or this for each stream that runs, if that is more: at 200 it saves a tenth of the CPU
COALESCE_MOST = 0.1
CHUNK = 1000  # events in one chunk at most: a reader that stopped reading keeps one in memory, not the whole answer
MAX_BODY = 1024 * 1024  # bytes


class EventStream(Response):
    """A turn as server-sent events, from the `seen`-th event on, until it ends or the reader leaves.

    A reader that takes all its time holds up nobody: `send` waits for it here, and the turn goes on.
    """

    def __init__(
        self, turn: Turn, encoder: Encoder, *, seen: int = 0, on_leave: Callable[[], None] | None = None
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"X-Thread-Id": str(turn.conversation_id), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self.turn = turn
        self.encoder = encoder
        self.seen = seen
        self.on_leave = on_leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        turn, loop = self.turn, asyncio.get_running_loop()
        left = loop.create_task(_until_disconnect(receive))
        left.add_done_callback(turn.wake)
        heartbeat: asyncio.TimerHandle | None = None

        def beat() -> None:
            nonlocal heartbeat
            heartbeat = None
            turn.wake()

        async def write(chunk: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await write(self.encoder.begin())
            last, flowing = loop.time(), False
            while not left.done():
                if len(turn.events) > self.seen:
                    rest = min(max(COALESCE, COALESCE_EACH * len(turn.chat.turns)), COALESCE_MOST)
                    pause = last + rest - loop.time()
                    if flowing and pause > 0 and not turn.finished:
                        await asyncio.sleep(pause)
                    events = turn.events[self.seen : self.seen + CHUNK]
                    await write(self.encoder.encode(self.seen, events))
                    self.seen += len(events)
                    last, flowing = loop.time(), events[-1]["type"] == "text"
                elif turn.finished:
                    await write(self.encoder.end(), more=False)
                    return
                elif loop.time() - last >= KEEP_ALIVE:
                    await write(b": keep-alive\n\n")
                    last = loop.time()
                else:
                    if heartbeat is None:  # one timer for many waits
                        heartbeat = loop.call_later(KEEP_ALIVE - (loop.time() - last), beat)
                    await turn.wait_beyond(self.seen)
        finally:
            if heartbeat is not None:
                heartbeat.cancel()
            left.remove_done_callback(turn.wake)
            left.cancel()
            if not turn.finished and self.on_leave is not None:
                self.on_leave()


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def read_body(request: Request, audio_limit: int) -> bytes:
    """The body, refused while it is read where it is too long. Raises Refused.

    A recording may be longer than other requests; its "type" must stand at the beginning then, where ChatKit has it.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        limit = audio_limit if b'"input.transcribe"' in body[:200] else MAX_BODY
        if len(body) > limit:
            raise Refused(413, f"The request is larger than {limit:,} bytes")
    return bytes(body)


async def read_file(request: Request, limit: int) -> tuple[str, str, bytes]:
    """The field `file` of a form: its name, type and bytes. Refused while it is read where it is too long."""

    async def body() -> AsyncIterator[bytes]:
        total = 0
        async for chunk in request.stream():
            total += len(chunk)
            if total > limit + 64 * 1024:  # the form around the file is not counted too closely
                raise Refused(413, f"A file may have {limit:,} bytes")
            yield chunk

    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refused(415, "Send the file as multipart/form-data, in a field named file")
    try:
        form = await MultiPartParser(request.headers, cast(Any, body()), max_files=1, max_fields=10).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refused(400, f"The form cannot be read: {error}") from None
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise Refused(400, "Send the file in a field named file")
        data = await file.read()
        if len(data) > limit:
            raise Refused(413, f"A file may have {limit:,} bytes")
        name = (file.filename or "file")[:255]
        return (name if _is_unicode(name) else "file"), file.content_type or "", data  # charset=utf-7 makes halves
    finally:
        await form.close()


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a JSON number")
    return number


async def read_json(request: Request, audio_limit: int = MAX_BODY) -> Row:
    """The body as a JSON object whose text can be stored. Raises Refused.

    Only JSON is taken as JSON: a page on another site can post text/plain or a form to localhost without asking.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refused(415, "The content type must be application/json")
    body = await read_body(request, audio_limit)
    try:
        value = json.loads(body, parse_float=_finite, parse_constant=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # not JSON, not UTF-8, half a character, a number of thousands of digits
        raise Refused(400, "Invalid JSON") from None
    if not isinstance(value, dict):
        raise Refused(400, "Invalid JSON")
    if len(body) > MAX_BODY and value.get("type") != "input.transcribe":
        raise Refused(413, f"The request is larger than {MAX_BODY:,} bytes")
    if not is_shallow(value):
        raise Refused(400, f"The JSON is nested more than {MAX_DEPTH} levels deep")
    return value


class Gate:
    """ASGI middleware in front of every route: who may call, trailing slashes, and one log line a request."""

    def __init__(self, app: ASGIApp, chat: Chat, authenticate: Authenticate) -> None:
        self.app = app
        self.chat = chat
        self.authenticate = authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, caller = time.monotonic(), 500, None
        path = scope["path"][len(scope.get("root_path", "")) :].rstrip("/") or "/"
        scope = {**scope, "path": scope.get("root_path", "") + path}  # with and without a trailing slash, no redirect

        async def noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            request = Request(scope)
            self._check_origin(request)
            keyed = path.startswith("/attachments/") and "key" in request.query_params  # the route checks the key
            if path not in OPEN_PATHS and not keyed:
                caller = await self.authenticate(request)
                scope.setdefault("state", {})["caller"] = caller
            await self.chat.open()
            await self.app(scope, receive, noting_status)
        except (Refused, StoreError, sqlite3.Error) as error:
            await failure(self.chat, error)(scope, receive, noting_status)
        finally:
            log.info(
                "%s %s %d %.0fms user=%s",
                scope["method"],
                printable(path),
                status,
                (time.monotonic() - began) * 1000,
                printable(caller.user_id) if caller else "-",
            )

    def _check_origin(self, request: Request) -> None:
        """Keep other sites' pages out. Raises Refused.

        Without a token, being on this machine is all that a caller shows. So the connection must have come in over
        loopback, the Host must be a name for it (another one is DNS rebinding), and what changes anything must not
        come from a foreign page. Addresses that are not IP addresses are those of tests, or of a Unix socket.
        """
        server = request.scope.get("server") or ("", None)
        host, *more = request.headers.getlist("host") or [""]
        if more:
            raise Refused(400, "Give one Host")
        if not self.chat.settings.needs_token and is_ip(server[0]):
            if not is_loopback(server[0]):
                raise Refused(403, "Without CHATKIT_JWT_SECRET this server answers on loopback only")
            if not is_loopback(host_name(host)):
                raise Refused(403, "The Host is not a name of this machine")
        origin = request.headers.get("origin")
        if origin is None or request.method in ("GET", "HEAD", "OPTIONS"):
            return
        same = origin.split("://")[-1].lower() == host.lower()
        if not same and origin.rstrip("/") not in self.chat.settings.cors_origins:
            raise Refused(403, "Requests from this origin are not allowed: see CHATKIT_CORS_ORIGINS")


OPEN_PATHS = ("/", "/health")  # what anybody may read


def host_name(host: str) -> str:
    """The Host header without its port."""
    return host[1:].split("]")[0] if host.startswith("[") else host.split(":")[0]


def is_ip(host: object) -> bool:
    try:
        ipaddress.ip_address(str(host))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    if is_ip(host):
        address = ipaddress.ip_address(host)
        return bool((getattr(address, "ipv4_mapped", None) or address).is_loopback)
    return host.lower() in ("localhost", "localhost.") or host.lower().endswith(".localhost")


def failure(chat: Chat, error: Exception) -> Response:
    """The response for what a route raised."""
    if isinstance(error, ClientDisconnect):
        error = Refused(400, "The request broke off")  # nobody is there to read it; the log says it
    if isinstance(error, Refused):
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        return JSONResponse({"detail": error.detail}, error.status, headers)
    chat.log_exception("the database failed", error)
    return JSONResponse({"detail": storage_text(error)}, 503, {"Retry-After": "5"})


# ---- who may call

Authenticate = Callable[[Request], Awaitable[Caller]]

MAX_TOKEN = 8192  # characters


def authenticator(settings: Settings) -> Authenticate:
    """A function that finds out who sent a request, and raises Refused (401) where that is not clear."""
    public_keys = PublicKeys(settings.jwks_url) if settings.jwks_url else None

    async def authenticate(request: Request) -> Caller:
        locale = request.headers.get("accept-language", "").split(",")[0].split(";")[0].strip()[:35] or "en"
        if not settings.needs_token:
            return Caller(locale=locale)
        given = request.headers.getlist("authorization")
        scheme, _, token = given[0].strip().partition(" ") if len(given) == 1 else ("", "", "")
        token = token.strip()
        if scheme.lower() != "bearer" or not token or len(token) > MAX_TOKEN:
            raise Refused(401, "A bearer token is required")
        return Caller(await verify_token(token, settings, public_keys), by_token=True, locale=locale)

    return authenticate


async def verify_token(token: str, settings: Settings, public_keys: PublicKeys | None) -> str:
    """The user whom a JSON Web Token (RFC 7519) names. Raises Refused (401).

    The token's header chooses between the secret and the public keys, and each serves its own algorithms alone: a
    public key taken for a secret would let anybody sign.
    """
    import jwt  # here, because without tokens nobody waits for it

    try:
        header = jwt.get_unverified_header(token)
        algorithm, key_id = header.get("alg"), header.get("kid")
        key: Any = None
        if algorithm == "HS256" and settings.jwt_secret:
            key = settings.jwt_secret
        elif algorithm in ("EdDSA", "ES256", "RS256") and public_keys is not None:
            key = await public_keys.find(key_id, algorithm)
        if key is None:
            raise jwt.InvalidKeyError
        claims = jwt.decode(
            token,
            key,
            algorithms=[str(algorithm)],
            audience=settings.jwt_audience,
            issuer=settings.jwt_issuer,
            options={"require": ["exp"], "verify_aud": settings.jwt_audience is not None},
        )
    except jwt.ExpiredSignatureError:
        raise Refused(401, "The token has expired") from None
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        log.debug("a token was rejected: %s", type(error).__name__)
        raise Refused(401, "The token is not valid") from None
    user_id = claims.get("sub", claims.get("id"))
    if not isinstance(user_id, str) or not user_id.strip() or len(user_id) > 255 or not _is_unicode(user_id):
        raise Refused(401, "The token names no user")
    return user_id


class PublicKeys:
    """The keys at a JWKS URL (RFC 7517), kept for five minutes; an unknown key id has them fetched anew, not too often.

    While the URL does not answer, the keys that are known go on to count.
    """

    KEEP = 300.0  # seconds
    AT_MOST_EVERY = 10.0

    def __init__(self, url: str) -> None:
        self.url = url
        self._keys: list[Any] = []
        self._fetched = float("-inf")
        self._lock = asyncio.Lock()

    async def find(self, key_id: object, algorithm: str) -> Any:
        """The key, None where there is none. Raises Refused (503) while no key could ever be fetched."""
        async with self._lock:
            age = time.monotonic() - self._fetched
            known = any(key.key_id == key_id for key in self._keys)
            if age > self.KEEP or (not known and age > self.AT_MOST_EVERY):
                await self._fetch()
            if not self._keys:
                raise Refused(503, "Tokens cannot be checked right now", retry_after=int(self.AT_MOST_EVERY) + 1)
        fits = [key for key in self._keys if key.algorithm_name == algorithm]
        if key_id is None:
            return fits[0].key if len(fits) == 1 else None
        return next((key.key for key in fits if key.key_id == key_id), None)

    async def _fetch(self) -> None:
        import jwt

        try:
            found = await asyncio.to_thread(jwt.PyJWKClient(self.url, cache_jwk_set=False, timeout=5).get_jwk_set)
            self._keys = found.keys
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError, OSError) as error:  # it may answer with anything
            log.warning("the keys at CHATKIT_JWKS_URL cannot be fetched: %s", error)
        self._fetched = time.monotonic()


def make_token(settings: Settings, user_id: str, seconds: int = 24 * 3600) -> str:
    """A signed token for a user, for trying things out. Raises SettingsError without a secret."""
    import jwt

    if not settings.jwt_secret:
        raise SettingsError("Set CHATKIT_JWT_SECRET first: a token is signed with it.")
    claims: Row = {"sub": user_id, "exp": int(time.time()) + seconds}
    if settings.jwt_audience:
        claims["aud"] = settings.jwt_audience
    if settings.jwt_issuer:
        claims["iss"] = settings.jwt_issuer
    return jwt.encode(claims, settings.jwt_secret, algorithm="HS256")


# ---- the app


async def caller_of(request: Request) -> Caller:
    return cast(Caller, request.state.caller)


def base_url(request: Request) -> str:
    """The app's own URL, as this request reached it."""
    return str(request.base_url).rstrip("/")


Who = Annotated[Caller, Depends(caller_of)]


def create_app(
    agent: Agent[Any] | None = None,
    *,
    settings: Settings | None = None,
    on_action: ActionHandler | None = None,
    transcribe: Transcriber | None = None,
    **overrides: Any,
) -> FastAPI:
    """The application, ready for uvicorn, a test client, or mounting in another one.

        app = create_app(my_agent, database=":memory:")

    `agent` is any Agents SDK agent; without one, the to-do assistant answers. If it names no model, it gets the one
    that Models finds. `settings` are Settings.from_env() where they are not given; `overrides` are fields of them.
    `on_action(context, action, item)` deals with clicks in widgets: `action` is {"type", "payload"}, `item` the
    widget's row or None; ValueError and LookupError refuse it. `transcribe(audio, media_type)` makes text of
    recordings; without one, OpenAI does where there is an OPENAI_API_KEY. Raises SettingsError.
    """
    if settings is None:
        settings = Settings.from_env(**overrides)
    elif overrides:
        settings = replace(settings, **overrides)
    chat = Chat(settings, agent, on_action=on_action, transcribe=transcribe)
    set_tracing_disabled(not settings.tracing)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await chat.open()
        try:
            yield
        finally:
            await chat.close()

    app = FastAPI(title="ChatKit server", docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False)
    app.state.chat = chat
    app.add_middleware(Gate, chat=chat, authenticate=authenticator(settings))
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Last-Event-ID"],
        expose_headers=["X-Thread-Id", "Retry-After"],
    )

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(Refused)
    @app.exception_handler(StoreError)
    @app.exception_handler(sqlite3.Error)
    async def refuse(_: Request, error: Exception) -> Response:
        return failure(chat, error)

    @app.exception_handler(RequestValidationError)
    async def refuse_parameters(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)

    def plain_stream(turn: Turn) -> Response:
        return EventStream(turn, PlainEncoder(turn))

    @app.post("/chatkit", openapi_extra=body_schema(CHATKIT_BODY))
    async def post_chatkit(request: Request, caller: Who) -> Response:
        """Answer a message (plain dialect), or one request of the ChatKit protocol."""
        body = await read_json(request, audio_limit=settings.max_attachment_bytes * 4 // 3 + 1024)
        if "type" in body:
            return await answer_chatkit(chat, caller, body, base_url(request))
        message, conversation_id = plain_message(body)
        return plain_stream(await chat.begin_message(caller, message, conversation_id))

    @app.get("/api/conversations")
    async def get_conversations(
        caller: Who,
        limit: Annotated[int, Query(ge=1, le=100)] = 50,
        offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
        q: Annotated[str, Query(max_length=200)] = "",
    ) -> Response:
        """The caller's conversations, the most recent first; with `q`, those in which all its words occur."""
        if q.strip():
            rows = await chat.store.search_conversations(caller.user_id, q, limit, offset)
        else:
            rows = await chat.store.conversations(caller.user_id, limit, offset)
        return JSONResponse([rest_conversation(row) for row in rows])

    @app.get("/api/conversations/recent/first")
    async def get_most_recent(caller: Who) -> Response:
        """The most recent conversation, or null."""
        rows = await chat.store.conversations(caller.user_id, 1)
        return JSONResponse(rest_conversation(rows[0]) if rows else None)

    @app.get("/api/conversations/{conversation_id}")
    async def get_conversation(conversation_id: str, caller: Who) -> Response:
        """A conversation with all its messages."""
        conversation = await chat.conversation(caller.user_id, row_id(conversation_id, "Conversation"))
        rows = await chat.store.messages(caller.user_id, conversation["id"])
        return JSONResponse({**rest_conversation(conversation), "messages": [rest_message(row) for row in rows]})

    @app.patch("/api/conversations/{conversation_id}", openapi_extra=body_schema(PATCH_BODY))
    async def patch_conversation(conversation_id: str, request: Request, caller: Who) -> Response:
        """Rename a conversation, or lock, close or reopen it."""
        number = row_id(conversation_id, "Conversation")
        conversation = await chat.conversation(caller.user_id, number)
        body = await read_json(request)
        status, reason = body.get("status"), body.get("reason")
        if "title" not in body and "status" not in body:
            raise Refused(400, "Give a title, or a status")
        if "status" in body and status not in ("active", "locked", "closed"):
            raise Refused(400, "status must be active, locked or closed")
        if reason is not None and (not isinstance(reason, str) or len(reason) > 500):
            raise Refused(400, "reason must be text of at most 500 characters")
        if "title" in body:
            conversation = await rename(chat, caller.user_id, number, body["title"])
        if "status" in body:
            changed = await chat.store.set_conversation_status(caller.user_id, number, cast(str, status), reason)
            conversation = changed or conversation
        fields = rest_conversation(conversation)
        return JSONResponse({**fields, "status": conversation["status"], "reason": conversation["status_reason"]})

    @app.delete("/api/conversations/{conversation_id}")
    async def delete_conversation(conversation_id: str, caller: Who) -> Response:
        """Stop what is being answered, and remove the conversation with all that belongs to it."""
        number = row_id(conversation_id, "Conversation")
        await chat.delete_conversation(caller.user_id, number)
        return JSONResponse({"status": "deleted", "id": number})

    @app.get("/api/conversations/{conversation_id}/stream")
    async def get_stream(
        conversation_id: str, caller: Who, last_event_id: Annotated[str | None, Header()] = None
    ) -> Response:
        """Join the running answer, from its start or after Last-Event-ID; 204 where none runs."""
        conversation = await chat.conversation(caller.user_id, row_id(conversation_id, "Conversation"))
        turn = chat.turns.get(conversation["id"])
        if turn is None:
            return Response(status_code=204)
        encoder = PlainEncoder(turn)
        return EventStream(turn, encoder, seen=encoder.seen_by(last_event_id))

    @app.post("/api/conversations/{conversation_id}/cancel")
    async def post_cancel(conversation_id: str, caller: Who) -> Response:
        """Stop the running answer; what was said so far is kept. 409 where none runs."""
        await chat.cancel(caller.user_id, row_id(conversation_id, "Conversation"))
        return JSONResponse({"status": "cancelled"})

    @app.post("/api/conversations/{conversation_id}/retry")
    async def post_retry(conversation_id: str, caller: Who) -> Response:
        """Remove all that came after the last user's message, and answer that anew: a plain stream."""
        return plain_stream(await chat.begin_retry(caller, row_id(conversation_id, "Conversation")))

    @app.post("/api/conversations/{conversation_id}/tool_output", openapi_extra=body_schema(TOOL_OUTPUT_BODY))
    async def post_tool_output(conversation_id: str, request: Request, caller: Who) -> Response:
        """Give the pending client tool call its result; the agent goes on: a plain stream."""
        number = row_id(conversation_id, "Conversation")
        body = await read_json(request)
        if "result" not in body or not isinstance(body.get("id"), (str, type(None))):
            raise Refused(400, "Give a result, and the id of the call if you like")
        return plain_stream(await chat.begin_tool_output(caller, number, body["result"], body.get("id")))

    @app.post("/api/conversations/{conversation_id}/answers", openapi_extra=body_schema(ANSWERS_BODY))
    async def post_answers(conversation_id: str, request: Request, caller: Who) -> Response:
        """Answer pending questions, or skip them; the agent goes on: a plain stream."""
        number = row_id(conversation_id, "Conversation")
        body = await read_json(request)
        try:
            given = Answers.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            raise Refused(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        answers = {key: answer.model_dump() for key, answer in given.answers.items()}
        item_id = row_id(body.get("item_id"), "Item")
        return plain_stream(await chat.begin_answers(caller, number, item_id, given.status, answers))

    @app.post("/attachments")
    async def post_attachment(request: Request, caller: Who) -> Response:
        """A direct upload: the field `file` of a form becomes an attachment, whose JSON comes back."""
        name, mime_type, data = await read_file(request, settings.max_attachment_bytes)
        mime_type = check_file(settings, mime_type, len(data))
        file = await chat.store.add_attachment(caller.user_id, name, mime_type, len(data), data)
        return JSONResponse(attachment_json(file, base_url(request)))

    @app.post("/attachments/{attachment_id}")
    async def post_upload(attachment_id: str, request: Request, key: str = "") -> Response:
        """The second phase of an upload: the bytes of an announced attachment. The key works once."""
        announced = await chat.store.announced_attachment(attachment_id, key)
        if announced is None:
            raise Refused(404, "Attachment not found, or uploaded already")
        _, mime_type, data = await read_file(request, announced["size"])
        if len(data) != announced["size"] or check_file(settings, mime_type) != announced["mime_type"]:
            raise Refused(400, "The file is not of the size and type that were announced")
        file = await chat.store.fill_attachment(attachment_id, key, data)
        if file is None:
            raise Refused(404, "Attachment not found, or uploaded already")
        return JSONResponse(attachment_json(file, base_url(request)))

    @app.get("/attachments/{attachment_id}")
    async def get_attachment(attachment_id: str, request: Request, key: str = "") -> Response:
        """A file's bytes, for its owner or whoever has its key. Nothing in it can run in this origin."""
        caller = getattr(request.state, "caller", None)
        user_id = caller.user_id if caller else None
        file = await chat.store.attachment(attachment_id, user_id=user_id, key=key or None)
        if file is None:
            raise Refused(404, "Attachment not found")
        headers = {
            "Content-Type": file["mime_type"],
            "Content-Disposition": f"attachment; filename*=UTF-8''{urllib.parse.quote(file['name'], safe='')}",
            "Content-Security-Policy": "sandbox; default-src 'none'",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "private, no-store",
        }
        return Response(file["data"], headers=headers)

    if chat.has_tasks:

        @app.get("/api/tasks")
        async def get_tasks(caller: Who) -> Response:
            """The to-do list of the built-in assistant."""
            return JSONResponse(await chat.store.tasks(caller.user_id))

        @app.patch("/api/tasks/{task_id}", openapi_extra=body_schema(TASK_BODY))
        async def patch_task(task_id: str, request: Request, caller: Who) -> Response:
            """Tick a task, or untick it."""
            number = row_id(task_id, "Task")
            done = (await read_json(request)).get("done")
            if not isinstance(done, bool):
                raise Refused(400, "done must be true or false")
            task = await chat.store.update_task(caller.user_id, number, done=done)
            if task is None:
                raise Refused(404, "Task not found")
            return JSONResponse(task)

    @app.get("/", include_in_schema=False)
    async def get_page() -> Response:
        """The page."""
        return HTMLResponse(PAGE, headers=page_headers())

    @app.get("/health")
    async def get_health() -> Response:
        """Whether the database answers; and which model does."""
        await chat.store.check()
        return JSONResponse({"status": "healthy", "model": chat.model_name})

    return app


def page_headers() -> dict[str, str]:
    """A Content-Security-Policy that allows the page's own script and style, by their hashes, and nothing else."""

    def digest(tag: str) -> str:
        text = PAGE.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self' http://localhost:* http://127.0.0.1:*"  # a notebook may show it
    )
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def body_schema(properties: Row) -> Row:
    """What the OpenAPI document says of a body that a route reads by itself."""
    schema = {"type": "object", "properties": properties}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


CHATKIT_BODY: Row = {
    "message": {"type": "string", "description": "plain dialect: what the person says"},
    "thread_id": {"type": "integer", "description": "plain dialect: the conversation to go on with"},
    "attachments": {"type": "array", "items": {"type": "string"}},
    "model": {"type": "string"},
    "tool_choice": {"type": "string"},
    "type": {"type": "string", "enum": list(OPERATIONS), "description": "ChatKit protocol: the operation"},
    "params": {"type": "object", "description": "ChatKit protocol: its parameters"},
}
PATCH_BODY: Row = {
    "title": {"type": "string", "minLength": 1, "maxLength": 200},
    "status": {"type": "string", "enum": ["active", "locked", "closed"]},
    "reason": {"type": "string"},
}
TOOL_OUTPUT_BODY: Row = {"result": {}, "id": {"type": "string"}}
ANSWERS_BODY: Row = {
    "item_id": {"type": "integer"},
    "status": {"type": "string", "enum": ["answered", "skipped"]},
    "answers": {"type": "object"},
}
TASK_BODY: Row = {"done": {"type": "boolean"}}


# ============================================================================================================ Page
# The built-in web page: one file of HTML, CSS and JavaScript, and a whole client for the plain dialect.

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ChatKit</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E%3Cpath
 fill='%230b6e66' d='M7 4h18a5 5 0 0 1 5 5v9a5 5 0 0 1-5 5H14l-7 6v-6a5 5 0 0 1-5-5V9a5 5 0 0 1 5-5z'/%3E%3C/svg%3E">
<style>
:root { color-scheme: light dark; --bg: light-dark(#fff, #1b1c1d); --side: light-dark(#f7f7f5, #151617);
  --line: light-dark(#e5e4e0, #333537); --text: light-dark(#1f1e1c, #e8e7e4); --muted: light-dark(#66635d, #a5a39e);
  --soft: light-dark(#eef3f2, #263130); --hover: light-dark(#ecebe8, #26282a); --accent: light-dark(#0b6e66, #74cfc3);
  --back: light-dark(#fff, #06231f); --danger: light-dark(#a8201a, #ffa69e); --warn: light-dark(#855300, #eec46f); }
* { box-sizing: border-box; overflow-wrap: anywhere; }
body { margin: 0; height: 100dvh; display: flex; overflow: hidden; background: var(--bg); color: var(--text);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
[hidden], .row button, body:not(.demo) .demo, body:has(#tasks:not([hidden])) .widget { display: none !important; }
button, input, textarea, fieldset, .tool, .notice, .code, #box, #model, dialog {
  font: inherit; color: inherit; border: 1px solid var(--line); border-radius: .7rem; background: var(--bg); }
button { cursor: pointer; padding: .35rem .8rem; white-space: nowrap; flex: none; }
button:disabled { opacity: .5; cursor: default; }
button:hover, .new:hover, .row:hover, .current { background: var(--hover); }
button.primary { background: var(--accent); border-color: var(--accent); color: var(--back); }
button.icon { border: 0; padding: .4rem; line-height: 0; color: var(--muted); background: none; }
input, textarea { width: 100%; padding: .5rem .75rem; }
[type=checkbox], [type=radio] { width: 1.05rem; height: 1.05rem; margin: 0; flex: none; accent-color: var(--accent); }
svg { width: 1.2em; height: 1.2em; flex: none; fill: none; stroke: currentColor; stroke-width: 1.75; }
a { color: var(--accent); } #box:focus-within { border-color: var(--accent); } h1, h2 { font-size: 1rem; margin: 0; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
::placeholder, .quiet, .widget, #model, dialog p { color: var(--muted); opacity: 1; }
.quiet, .widget, #model { font-size: .875rem; margin: 0; }
/* The side panels: popovers on narrow screens (Esc and a click outside close them), columns on wide ones. */
.panel { position: fixed; inset: 0 auto 0 0; margin: 0; width: min(18rem, 86vw); height: 100dvh; padding: 1rem;
  border: 0; background: var(--side); color: var(--text); flex-direction: column; gap: .7rem; overflow-y: auto; }
.panel::backdrop, dialog::backdrop { background: #0006; } .panel ul { list-style: none; margin: 0; padding: 0; }
.new, .row, label, header, summary, .code > div { display: flex; align-items: center; gap: .6rem; }
.new, .row { border-radius: .7rem; } .new, .row a { color: inherit; text-decoration: none; padding: .4rem .6rem; }
.row { gap: 0; font-size: .925rem; }
.row a, h1 { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.row:is(.current, :hover, :focus-within) button { display: block !important; }
#tasks { left: auto; right: 0; }
#tasks :checked + span { color: var(--muted); text-decoration: line-through; }
.panel:popover-open { display: flex; }
@media (min-width: 50rem) { #sidebar { position: static; display: flex; flex: 0 0 17rem; } #menu { display: none; } }
@media (min-width: 70rem) { #tasks { position: static; display: flex; flex: 0 0 16rem; } #toTasks { display: none; } }
/* The conversation */
main { flex: 1; min-width: 0; display: flex; flex-direction: column; }
header { padding: .6rem 1.25rem; min-height: 3.5rem; } #model { padding: .1rem .65rem; border-radius: 1rem; }
#banner { margin: 0; padding: .4rem; text-align: center; color: var(--warn); background: var(--side); }
#scroller { flex: 1; overflow: hidden auto; outline-offset: -3px; }
#log, #thinking, #composer { max-width: 46rem; margin: 0 auto; width: 100%; padding: 0 1.25rem .75rem; }
#log > * { margin: 1.25rem 0; } #welcome { text-align: center; padding: 14vh 1.25rem 0; }
#welcome h2 { font-size: 1.6rem; margin-bottom: .4rem; }
#welcome button { border-radius: 1.2rem; padding: .4rem 1rem; margin: .7rem .2rem 0; }
#log > .user { width: fit-content; max-width: 85%; margin-left: auto; padding: .6rem 1rem; white-space: pre-wrap;
  background: var(--soft); border-radius: 1.2rem 1.2rem .3rem 1.2rem; }
.assistant :is(p, ul, ol) { margin: 0 0 .75rem; padding: 0; white-space: pre-line; }
.assistant li { margin: .25rem 0 .25rem 1.5rem; } .assistant li :is(ul, ol) { margin: 0; }
.assistant :is(h3, h4, h5, h6) { font-size: 1.1rem; margin: 1.25rem 0 .5rem; }
code, pre { font: .875em/1.5 ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, monospace; }
:not(pre, summary) > code { background: var(--hover); border-radius: .35rem; padding: .1em .35em; }
pre { margin: 0; padding: .8rem 1rem; overflow: auto; overflow-wrap: normal; } pre code { font: inherit; }
.code { margin: .5rem 0 .9rem; background: var(--side); overflow: hidden; } .code button { padding: 0 .6rem; }
.code > div { justify-content: space-between; padding: .3rem .4rem .3rem 1rem; border-bottom: 1px solid var(--line); }
.code > div, .tool, #thinking, #problem, #note { font-size: .875rem; }
summary { padding: .45rem .9rem; cursor: pointer; }
summary::before { content: ""; padding: .25rem; border-radius: 50%; border: 2px solid var(--muted); }
summary::after { content: "\25BE"; margin-left: auto; color: var(--muted); }
.done summary::before { border-color: var(--accent); background: var(--accent); }
.tool p { padding: .2rem .9rem 0; }
.tool pre { max-height: 18rem; padding: .2rem .9rem .7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
#thinking { white-space: pre-line; }
.notice, fieldset { border-left: 3px solid var(--accent); padding: .7rem 1rem; }
.warning { border-left-color: var(--warn); }
.danger { border-left-color: var(--danger); display: flex; justify-content: space-between; align-items: center; }
fieldset > div { margin-bottom: .9rem; } label { padding: .3rem 0; }
#problem { margin: 0 0 .5rem; color: var(--danger); }
#box { display: flex; align-items: flex-end; gap: .4rem; padding: .4rem; border-radius: 1.4rem; }
#input { border: 0; outline: 0; background: none; resize: none; max-height: 40dvh; padding: .35rem .75rem; }
#send { border-radius: 50%; padding: .5rem; line-height: 0; }
#note { text-align: center; text-wrap: balance; margin-top: .6rem; }
#announce { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
dialog { width: min(26rem, calc(100vw - 2rem)); padding: 1.4rem; box-shadow: 0 1rem 4rem #0004; }
dialog div { display: flex; justify-content: flex-end; gap: .6rem; margin-top: 1.2rem; }
</style>
</head>
<body>
<nav id="sidebar" class="panel" popover aria-label="Conversations">
  <a class="new" href="#/">
    <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 5v14M5 12h14"/></svg><b>New conversation</b></a>
  <input id="search" type="search" placeholder="Search" aria-label="Search conversations" autocomplete="off">
  <ul id="list"></ul>
  <p id="nothing" class="quiet" role="status"></p>
</nav>
<main>
  <header>
    <button id="menu" class="icon" popovertarget="sidebar" aria-label="Conversations">
      <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M4 7h16M4 12h16M4 17h10"/></svg></button>
    <h1 id="title"></h1><span id="model" title="The model that answers" hidden></span>
    <button id="toTasks" class="icon" popovertarget="tasks" aria-label="To-do list" hidden>
      <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M4 7l2 2 3-3M4 16l2 2 3-3M13 8h7M13 17h7"/></svg></button>
  </header>
  <p id="banner" role="status" hidden></p>
  <div id="scroller" role="log" aria-live="off" aria-label="Messages" tabindex="0">
    <div id="welcome" hidden><h2>How can I help?</h2><span class="quiet demo">Three things to try</span>
      <div id="tries" class="demo"><button>add buy milk to my list</button><button>show my tasks</button>
      <button>complete buy milk</button></div></div>
    <div id="log"></div><p id="thinking" class="quiet" hidden></p>
  </div>
  <div id="composer">
    <p id="problem" role="alert" hidden></p>
    <div id="box">
      <textarea id="input" rows="1" placeholder="Write a message" aria-label="Message" autofocus></textarea>
      <button id="send" class="primary"><svg viewBox="0 0 24 24" aria-hidden="true"><path id="glyph"/></svg></button>
    </div>
    <p id="note" class="quiet demo">This is the built-in demo. To use a real model, set OPENAI_API_KEY,
      GEMINI_API_KEY or CHATKIT_MODEL and start again.</p>
  </div>
</main>
<aside id="tasks" class="panel" popover aria-label="To-do list" hidden><h2>To do</h2><ul id="todo"></ul></aside>
<dialog id="dialog" aria-labelledby="question"><form method="dialog">
  <h2 id="question"></h2><p id="explanation"></p><input id="field" aria-labelledby="question" autocomplete="off">
  <div><button id="no" type="button">Cancel</button><button id="yes" class="primary" value="yes">OK</button></div>
</form></dialog>
<p id="announce" role="status"></p>
<template id="row"><li class="row"><a></a>
  <button class="icon"><svg viewBox="0 0 24 24" aria-hidden="true"><path d="M4 20h4L19 9l-4-4L4 16z"/></svg></button>
  <button class="icon"><svg viewBox="0 0 24 24" aria-hidden="true"><path d="M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13"/></svg>
</button></li></template>
<script>
"use strict";
// A whole client for the plain dialect: JSON requests, and answers as server-sent events. No library, no build.
const base = location.pathname.replace(/\/?$/, "/"); // whatever prefix the server is mounted under
const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Every node is made here, from properties and text. Nothing is parsed as HTML, so nothing that is written can run.
function el(tag, props, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}
const quiet = (textContent, tag = "p") => el(tag, { className: "quiet", textContent });
const show = (node, text) => Object.assign(node, { textContent: text, hidden: !text });

// ---------- Requests ----------
const tokenKey = `chatkit token ${base}`; // in sessionStorage, which is this tab's alone
let asking = null, polling = null;

// Every request, with the token if there is one. Throws: an error with a status is the server's refusal.
async function api(path, method = "GET", body) {
  for (;;) {
    const token = sessionStorage.getItem(tokenKey), headers = { "Content-Type": "application/json" };
    if (token) headers.Authorization = `Bearer ${token}`;
    const response = await fetch(base + path, { method, headers, body: JSON.stringify(body), cache: "no-store" });
    if (response.ok) return response;
    const { detail } = await response.json().catch(() => ({}));
    const error = new Error(detail ?? `The server answered with status ${response.status}.`);
    if (response.status !== 401) throw Object.assign(error, { status: response.status });
    // One question for all requests that are refused together, and none if the token has changed meanwhile.
    if (token === sessionStorage.getItem(tokenKey)) await (asking ??= askToken(token && error.message));
  }
}
const getJson = async (path) => (await api(path)).json();
async function askToken(reason) {
  const given = await ask("This server asks for a token", reason || "It stays in this tab only.", "", "password");
  sessionStorage.setItem(tokenKey, (given ?? "").replace(/[^!-~]/g, "")); // what a header can carry
  asking = null;
}

// Resolves to what was given in the dialog, or to null if it was left. Without a value there is no field to fill.
function ask(title, text, value, type = "text") {
  show(page.question, title);
  show(page.explanation, text);
  Object.assign(page.field, { type, value: value ?? "", hidden: value === undefined });
  page.dialog.returnValue = "";
  page.dialog.showModal();
  page.field.select();
  return new Promise((resolve) => {
    page.dialog.onclose = () => resolve(page.dialog.returnValue ? page.field.value : null);
  });
}
page.no.onclick = () => page.dialog.close();

// Waits until the server is there. All who wait share one poll.
const serverBack = () => polling ??= (async () => {
  for (let pause = 400; ; pause = Math.min(5000, pause * 2)) {
    const health = await getJson("health").catch(() => null);
    show(page.banner, health ? "" : "The server does not answer. Trying again\u2026");
    show(page.model, health?.model ?? page.model.textContent);
    document.body.classList.toggle("demo", page.model.textContent === "demo");
    if (health) return polling = null;
    await sleep(pause);
  }
})();

// Server-sent events by hand, as EventSource can neither POST nor send a token. Ends at [DONE]; throws when the stream
// ends without it or is silent for a minute (the server's keep-alive comments come more often).
async function* readEvents(response, view) {
  const reader = view.reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let buffer = ""; ;) {
      const silence = setTimeout(() => reader.cancel(), 60_000);
      const { value, done } = await reader.read().finally(() => clearTimeout(silence));
      if (done) throw new Error("The stream broke off");
      const blocks = (buffer + value).split("\n\n");
      buffer = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// ---------- Markdown: the common subset, as nodes ----------
const BLOCK = new RegExp([ // code to its end or to that of the text, or whatever else stands without a gap
  /^(?<indent>[ \t]*)(?<fence>`{3,}|~{3,})(?<language>[^`\n]*)(?:\n(?<code>[^]*?))?(?:^[ \t]*\k<fence>[ \t]*$|(?![^]))/,
  /(?:^(?![ \t]*(?:`{3,}[^`\n]*$|~{3})).*\S.*\n?)+/,
].map((part) => part.source).join("|"), "gm");
const PART = /\n(?=[ \t]*(?:#{1,6}|[-*+]|\d{1,9}[.)]) )|(?<=^#{1,6} .*)\n/m; // what headings and items are cut at

function blockNodes(source, { code, fence, indent, language }) {
  if (fence) return [codeBlock(language.trim() || "code", `\n${code ?? ""}`.replaceAll(`\n${indent}`, "\n"))];
  const nodes = [], lists = []; // lists: those that are open, the outermost first
  for (const part of source.trimEnd().split(PART)) {
    const [, { length: depth }, level, bullet, start, text] =
      /^([ \t]*)(?:(#{1,6}) |([-*+]) |(\d{1,9})[.)] )?([^]*)$/.exec(part);
    const item = bullet || start;
    while (lists.length && !(item && lists.at(-1).depth <= depth)) lists.pop();
    if (item && !(depth < lists.at(-1)?.depth + 2)) { // the first, or deeper than the one before
      const list = el(start ? "ol" : "ul", { depth, ...(start && { start }) });
      lists.length ? lists.at(-1).lastChild.append(list) : nodes.push(list);
      lists.push(list);
    }
    if (item) lists.at(-1).append(el("li", {}, ...inline(text)));
    else nodes.push(el(level ? `h${Math.min(6, level.length + 2)}` : "p", {}, ...inline(text)));
  }
  return nodes;
}
function codeBlock(language, text) {
  const pre = el("pre", { tabIndex: 0 }, el("code", {}, text.replace(/^\n|\n$/g, "")));
  const copy = el("button", { textContent: "Copy", onclick: async () => { // plain http has no clipboard
    const copied = await navigator.clipboard?.writeText(pre.textContent).then(() => "Copied", () => null);
    copy.textContent = copied ?? "No clipboard";
  } });
  return el("div", { className: "code" }, el("div", { className: "quiet" }, language, copy), pre);
}

const INLINE = new RegExp([
  /\\(?<escaped>[!-/:-@[-`{-~])/, /(?<!`)(?<ticks>`{1,2})(?!`)(?<code>.+?)(?<!`)\k<ticks>(?!`)/,
  /\*\*(?=\S)(?<stars>.+?)\*\*(?!\*)/, /(?<!\w)__(?=\S)(?<bold>.+?)__(?!\w)/,
  /\*(?=[^\s*])(?<star>[^*]*[^\s*])\*/, /(?<!\w)_(?=[^\s_])(?<em>[^_]*[^\s_])_(?!\w)/,
  /\[(?<label>[^[\]]+)\]\((?<href>https?:\/\/(?:[^\s()]|\([^\s()]*\))+)\)/,
  /(?<url>\bhttps?:\/\/[^\s<>]*[^\s<>.,:;!?'")\]*_])/,
].map((part) => part.source).join("|"), "gs");
function inline(text) {
  const nodes = [];
  let end = 0;
  for (const { 0: whole, index, groups } of text.matchAll(INLINE)) {
    const { escaped, code, stars, bold = stars, star, em = star, label, url, href = url } = groups;
    nodes.push(text.slice(end, index));
    end = index + whole.length;
    if (escaped) nodes.push(escaped);
    else if (code) nodes.push(el("code", {}, code));
    else if (bold) nodes.push(el("strong", {}, ...inline(bold)));
    else if (em) nodes.push(el("em", {}, ...inline(em)));
    else nodes.push(el("a", { href, target: "_blank", rel: "noopener" }, ...(label ? inline(label) : [url])));
  }
  return [...nodes, text.slice(end)];
}

// ---------- What a conversation shows ----------
let shown = null; // the open conversation: its id (null: not begun), whether it is busy, its items by their ids, ...

function put(node) {
  page.welcome.hidden = true;
  return page.log.appendChild(node);
}
const putUser = (text) => put(el("div", { className: "user" }, text));
const itemOf = (view, id, make) => view.items.get(id) ?? view.items.set(id, make()).get(id);
const messageOf = (view, id) => itemOf(view, id, () => ({ node: put(el("div", { className: "assistant" })) }));

function paint(message) { // of a message that grows, only the last block is made anew
  const { node, text } = message, blocks = [...text.replaceAll("\r", "").matchAll(BLOCK)];
  message.frame = null;
  while (node.children.length > blocks.length) node.lastChild.remove();
  blocks.forEach(({ 0: source, groups }, i) => {
    if (node.children[i]?.source === source) return;
    node.children[i]?.remove();
    node.insertBefore(el("div", { source }, ...blockNodes(source, groups)), node.children[i] ?? null);
  });
}
const toolOf = (view, { id, name, args }) => itemOf(view, id, () => {
  const pretty = (value) => typeof value === "string" ? value : JSON.stringify(value, null, 2);
  const state = quiet("running\u2026", "span"), result = el("pre", { tabIndex: 0 });
  const node = put(el("details", { className: "tool" }, el("summary", {}, el("code", {}, name), state),
    quiet("Arguments"), el("pre", { tabIndex: 0 }, pretty(args ?? {})), quiet("Result"), result));
  return { end(how, value = "") {
    if (node.classList.contains("done")) return;
    node.className = `tool ${state.textContent = how}`;
    result.textContent = pretty(value);
  } };
});
function form(view, { id, inputs }) { // what a tool asks the person
  const groups = inputs.map(({ id: name, type, question, description = "", options, multiple }) => {
    const choice = ({ value }) => el("label", {},
      el("input", { type: multiple ? "checkbox" : "radio", name, value, required: !multiple }), value);
    const fields = type === "multiple_choice" ? options.map(choice)
      : [el("textarea", { rows: 2, name, required: true, ariaLabel: question })];
    return el("div", { role: "group", ariaLabel: question }, el("strong", {}, question), quiet(description), ...fields);
  });
  const node = el("form", {}, el("fieldset", {}, ...groups, el("button", { className: "primary" }, "Send answers")));
  node.onsubmit = (event) => {
    event.preventDefault();
    const given = new FormData(node);
    const answers = Object.fromEntries(inputs.map((input) => [input.id, { values: given.getAll(input.id) }]));
    goOn(view, "answers", { item_id: id, status: "answered", answers });
  };
  return node;
}
const retryButton = (view) => el("button", { className: "retry", onclick: () => goOn(view, "retry") }, "Retry");

// ---------- An answer ----------
const handlers = {
  __proto__: null, // so that no unknown type is found
  thread: (view, { title }) => showTitle(title),
  thinking: (view, { content }) => page.thinking.append(content),
  progress: (view, { content }) => page.thinking.append(`${content}\n`),
  text(view, { content, message_id }) { // told from its beginning: what was loaded of it, half-saved, is replaced
    const message = view.last = messageOf(view, message_id);
    message.text = message.streamed ? message.text + content : content;
    message.streamed = true;
    message.frame ??= requestAnimationFrame(() => paint(message)); // at most once per frame
  },
  tool_call: toolOf,
  tool_result: (view, call) => refreshTasks(toolOf(view, call).end("done", call.result)),
  widget: (view, { id, copy_text }) => show(itemOf(view, id, () => put(el("p", { className: "widget" }))), copy_text),
  input: (view, event) => itemOf(view, event.id, () => put(form(view, event))),
  notice(view, { level, title, message }) {
    const heading = title ? [el("b", {}, title), el("br")] : [];
    put(el("div", { className: `notice ${level}` }, el("span", {}, ...heading, ...inline(message))));
  },
  error(view, { message, allow_retry }) {
    const retry = allow_retry ? [retryButton(view)] : [];
    put(el("div", { className: "notice danger", role: "alert" }, el("span", {}, message), ...retry));
  },
  done(view, { status }) { // told to screen readers once, at the end, and not word by word
    page.announce.textContent = status === "completed" ? view.last?.text ?? "" : status;
    for (const item of view.items.values()) item.end?.(status === "completed" ? "waiting" : "stopped");
    if (status === "cancelled") put(quiet("Stopped"));
  },
};

function setBusy(view, busy) {
  view.busy = busy;
  if (view !== shown) return;
  page.send.ariaLabel = busy ? "Stop" : "Send";
  page.glyph.setAttribute("d", busy ? "M8 8h8v8H8z" : "M12 19V5M6 11l6-6 6 6");
  page.scroller.ariaBusy = String(busy);
  show(page.thinking, busy ? "Thinking\u2026\n" : "");
  fitComposer();
}

// Follows an answer to its end. After a stream that broke, everything is loaded anew: nothing is lost, nothing doubled.
async function follow(view, response) {
  setBusy(view, true);
  try {
    for await (const event of readEvents(response, view)) {
      if (view !== shown) return;
      handlers[event.type]?.(view, event);
      page.thinking.hidden = !["thread", "thinking", "progress"].includes(event.type);
      if (page.thinking.hidden) page.thinking.textContent = "Thinking\u2026\n";
    }
    setBusy(view, false);
    refresh();
  } catch {
    reopen(view, "Reconnecting\u2026");
  }
}

async function send(text) {
  const view = shown;
  if (view.busy || view.loading || !text.trim()) return;
  page.log.querySelectorAll(".retry").forEach((button) => button.remove()); // they retry the last message only
  const bubble = putUser(text);
  page.input.value = "";
  page.input.focus();
  show(page.problem, "");
  pinned = true;
  Object.assign(view, { last: null, stopping: false });
  setBusy(view, true);
  try {
    const response = await api("chatkit", "POST", { message: text, ...(view.id && { thread_id: view.id }) });
    refreshList();
    if (view !== shown) return response.body.cancel(); // the person went on; it is joined when they come back
    view.id = Number(response.headers.get("X-Thread-Id"));
    history.replaceState(null, "", `#/${view.id}`);
    if (view.stopping) stop(view);
    follow(view, response);
  } catch (error) { // the person gets back what they wrote
    bubble.remove();
    page.input.value = `${text}\n\n${page.input.value}`.trim();
    show(page.problem, `Not sent: ${error.status ? error.message : "the server does not answer."}`);
    setBusy(view, false);
    if (view.id || !error.status) reopen(view, ""); // perhaps an answer is running that we do not know of
  }
}

function stop(view) {
  view.stopping = true; // an answer that has no address yet is stopped when it gets one
  if (view.id) api(`api/conversations/${view.id}/cancel`, "POST").catch(() => {}); // 409: it is over already
}
async function goOn(view, action, body) { // has the server answer without a new message
  if (view.busy) return;
  setBusy(view, true);
  try {
    const response = await api(`api/conversations/${view.id}/${action}`, "POST", body);
    view === shown ? openConversation(view.id, response) : response.body.cancel();
  } catch (error) {
    show(page.problem, error.message);
    setBusy(view, false);
  }
}

// ---------- Opening a conversation ----------
async function openConversation(id, joined) {
  shown?.reader?.cancel().catch(() => {}); // an answer that is left goes on at the server
  const same = id && shown?.id === id, view = shown = { id, items: new Map(), loading: Boolean(id) };
  if (!same) {
    page.log.replaceChildren();
    show(page.problem, "");
    showTitle("");
    pinned = true;
  }
  page.welcome.hidden = Boolean(id);
  setBusy(view, false);
  refreshList();
  if (!id) return page.input.focus();
  try {
    // Joined first and loaded second, so that nothing falls in between; what comes twice has the same ids.
    const stream = joined ?? await api(`api/conversations/${id}/stream`);
    const { title, updated_at, messages } = await getJson(`api/conversations/${id}`);
    if (view !== shown) return stream.body?.cancel();
    Object.assign(view, { loading: false, updated: updated_at });
    showTitle(title);
    page.log.replaceChildren();
    for (const message of messages) showRow(view, message);
    const { role, status } = messages.at(-1) ?? {};
    if (stream.status === 200) follow(view, stream);
    else if (role === "user" || ["failed", "interrupted"].includes(status)) put(retryButton(view));
  } catch (error) {
    if (error.status !== 404) return reopen(view, error.message);
    if (view !== shown) return;
    show(page.problem, error.message);
    Object.assign(view, { id: null, loading: false }); // the next message begins a new one
  }
}
const ENDED = { cancelled: "Stopped", interrupted: "Interrupted", failed: "The answer failed" };

function showRow(view, { id, role, content, tool_calls, status, extra }) {
  if (role === "user") putUser(content);
  if (role === "assistant") paint(Object.assign(messageOf(view, id), { text: content }));
  if (role === "assistant" && ENDED[status]) put(quiet(ENDED[status]));
  if (role === "widget") handlers.widget(view, { id, copy_text: content });
  const state = { done: "done", pending: "waiting", streaming: "running\u2026" }[status] ?? "stopped";
  for (const call of tool_calls ?? []) toolOf(view, call).end(state, content);
  if (role === "input" && status === "pending") handlers.input(view, { id, inputs: extra.inputs });
}

async function reopen(view, reason) {
  if (view === shown) show(page.banner, reason);
  await sleep(500);
  await serverBack();
  refresh();
  if (view === shown && view.id) openConversation(view.id);
}
function showTitle(title) {
  page.title.textContent = title || "New conversation";
  document.title = title ? `${title} \u2013 ChatKit` : "ChatKit";
}
const route = () => openConversation(Number(/^#\/(\d+)$/.exec(location.hash)?.[1]) || null);
addEventListener("hashchange", route);
page.sidebar.addEventListener("click", (event) => { if (event.target.closest("a")) page.sidebar.hidePopover(); });

// ---------- The lists beside it ----------
const refresh = () => [refreshList(), refreshTasks()];

function fill(list, nodes) { // what had the focus has it again
  const focused = list.contains(document.activeElement) && document.activeElement.id;
  list.replaceChildren(...nodes);
  if (focused) document.getElementById(focused)?.focus();
}

async function refreshList(elsewhere = false) {
  const query = page.search.value;
  const found = await getJson(`api/conversations?limit=100&q=${encodeURIComponent(query)}`).catch(() => null);
  if (!found || query !== page.search.value) return;
  fill(page.list, found.map(rowOf));
  show(page.nothing, found.length ? "" : query ? "Nothing found." : "No conversations yet.");
  const updated = found.find(({ id }) => id === shown.id)?.updated_at ?? shown.updated;
  if (shown.busy || shown.loading || updated === shown.updated) return;
  shown.updated = updated;
  if (elsewhere) openConversation(shown.id); // it went on in another tab
}
addEventListener("focus", () => refreshList(true));
function rowOf({ id, title }) {
  const row = page.row.content.firstElementChild.cloneNode(true), [link, edit, bin] = row.children;
  row.classList.toggle("current", id === shown.id);
  link.ariaCurrent = id === shown.id ? "page" : null;
  Object.assign(link, { id: `open${id}`, href: `#/${id}`, textContent: title, title });
  Object.assign(edit, { id: `edit${id}`, ariaLabel: `Rename ${title}`, onclick: () => rename(id, title) });
  Object.assign(bin, { id: `bin${id}`, ariaLabel: `Delete ${title}`, onclick: () => remove(id, title) });
  return row;
}
async function change(path, method, body) { // true if it was done
  const problem = await api(path, method, body).then(() => "", (error) => error.message);
  show(page.problem, problem);
  refresh();
  return !problem;
}
async function rename(id, old) {
  const title = (await ask("Rename conversation", "", old))?.trim();
  if (title && await change(`api/conversations/${id}`, "PATCH", { title }) && id === shown.id) showTitle(title);
}
async function remove(id, title) {
  if (await ask("Delete this conversation?", title) === null) return;
  if (await change(`api/conversations/${id}`, "DELETE") && id === shown.id) location.hash = "#/";
  page.input.focus();
}
async function refreshTasks() {
  const tasks = await getJson("api/tasks").catch(() => null);
  page.tasks.hidden = page.toTasks.hidden = !tasks; // another agent has no such list
  if (tasks) fill(page.todo, tasks.length ? tasks.map(taskOf) : [quiet("Nothing to do.", "li")]);
}
function taskOf({ id, title, done }) {
  const onchange = (event) => change(`api/tasks/${id}`, "PATCH", { done: event.target.checked });
  const box = el("input", { id: `task${id}`, type: "checkbox", checked: done, onchange });
  return el("li", {}, el("label", {}, box, el("span", {}, title)));
}

// ---------- The composer and the view ----------
let pinned = true, lastTop = 0; // the view follows the answer until the person scrolls up, and again from the end
page.scroller.onscroll = () => {
  const { scrollTop, scrollHeight, clientHeight } = page.scroller;
  pinned = scrollHeight - scrollTop - clientHeight < 40 || (pinned && scrollTop >= lastTop);
  lastTop = scrollTop;
};
const follower = new ResizeObserver(() => { if (pinned) page.scroller.scrollTop = page.scroller.scrollHeight; });
for (const node of [page.log, page.thinking, page.scroller]) follower.observe(node);
page.log.addEventListener("click", (event) => { if (event.target.closest("summary")) pinned = false; });
function fitComposer() {
  page.input.style.height = "auto";
  page.input.style.height = `${page.input.scrollHeight}px`;
  page.send.disabled = !shown.busy && !page.input.value.trim();
}
page.input.oninput = fitComposer;
page.input.onkeydown = (event) => {
  // The Enter that ends a composition is not meant for us (Safari tells it by the key code alone).
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send(page.input.value);
};
page.send.onclick = () => shown.busy ? stop(shown) : send(page.input.value);
page.tries.onclick = ({ target }) => { if (target !== page.tries) send(target.innerText); };
page.search.oninput = () => refreshList();
[route, serverBack, refreshTasks].forEach((start) => start());
</script>
</body>
</html>
"""


# =========================================================================================================== Start
# main() and serve_in_background().


class Server(uvicorn.Server):
    """uvicorn, which says where it listens, and ends the running turns before it waits for their readers to leave."""

    announcement = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.announcement:
            print(self.announcement, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.config.app.state.chat.stop_turns()  # type: ignore[union-attr]  # the app is always create_app()'s
        await super().shutdown(sockets)


def make_server(app: FastAPI) -> Server:
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one. Raises SettingsError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = "something listens there already; stop it, or choose another with --port"
        raise SettingsError(f"Cannot listen on {host} port {port}: {reason}.") from None


def check_exposure(settings: Settings) -> None:
    """Raises SettingsError where everybody on the network could call without a token."""
    if not settings.needs_token and not is_loopback(settings.host):
        raise SettingsError(
            f"Listening on {settings.host} lets others in: set CHATKIT_JWT_SECRET, so that they need a token."
        )


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    everywhere = ipaddress.ip_address(host).is_unspecified
    name = "localhost" if is_loopback(host) or everywhere else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


class BackgroundServer:
    """A server in a thread of its own: see serve_in_background()."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        """Starts it, and returns when it answers. Raises SettingsError, StoreError."""
        check_exposure(replace(app.state.chat.settings, host=host))
        self._listener = listen(host, port)
        self.url = url_of(self._listener)
        self._server = make_server(app)
        self._chat: Chat = app.state.chat
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="chatkit server", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)
        if self._failure is not None:
            self._listener.close()
            raise self._failure

    def _serve(self) -> None:
        try:
            run(serve(self._server, self._chat, self._listener), self._server)
        except (StoreError, SettingsError) as error:
            self._failure = error

    def stop(self) -> None:
        """Save and end what is running, and return when nothing of the server is left."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> str:
        return self.url

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve_in_background(app: FastAPI | None = None, *, host: str = "127.0.0.1", port: int = 0) -> BackgroundServer:
    """Serve an app of create_app() beside what this process does, in a notebook above all.

        server = serve_in_background(create_app(my_agent, database=":memory:"))
        server.url
        server.stop()

    or `with serve_in_background() as url:`. Port 0 is a free one. Raises SettingsError, StoreError.
    """
    return BackgroundServer(app or create_app(), host, port)


async def serve(server: Server, chat: Chat, listener: socket.socket) -> None:
    await chat.open()  # here rather than in the lifespan, which would report a failure with a traceback
    try:
        await server.serve(sockets=[listener])
    finally:
        await chat.close()


def spare_collector() -> None:
    """For a process that only serves: going through all modules again and again took a third of it at 100 streams."""
    gc.freeze()
    gc.set_threshold(10_000)


def run(main: Coroutine[Any, Any, None], server: Server) -> None:
    """asyncio.run(), on the event loop that uvicorn prefers."""
    loop = (server.config.get_loop_factory() or asyncio.new_event_loop)()
    try:
        loop.run_until_complete(main)
    finally:
        leftover = asyncio.all_tasks(loop)
        for task in leftover:
            task.cancel()
        if leftover:
            loop.run_until_complete(asyncio.wait(leftover))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


class LogFormatter(logging.Formatter):
    """One readable line, without secrets."""

    def __init__(self, secret_values: list[str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s", "%H:%M:%S")
        self.secret_values = secret_values

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record), self.secret_values)


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
        handler = logging.StreamHandler()
        logging.basicConfig(handlers=[handler], level=logging.WARNING)
        log.setLevel(settings.log_level.upper())
        if user is not None:
            print(make_token(settings, user))
            return 0
        check_exposure(settings)
        app = create_app(settings=settings)
        chat: Chat = app.state.chat
        handler.setFormatter(LogFormatter(chat.secrets))
        listener = listen(settings.host, settings.port)
        with contextlib.closing(listener):
            server = make_server(app)
            server.announcement = (
                f"Listening on {url_of(listener)}\n"
                f"Model: {chat.model_name}\n"
                f"Data:  {'in memory, gone at the end' if settings.database == ':memory:' else settings.database}"
            )
            spare_collector()
            run(serve(server, chat, listener), server)
    except (SettingsError, StoreError) as error:
        print(f"chatkit_server: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0  # all is saved by now
    return 0


if __name__ == "__main__":
    exit_status = main()
    if threading.active_count() > 1:  # a tool that hangs in a thread must not keep the process
        logging.shutdown()
        sys.stdout.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
