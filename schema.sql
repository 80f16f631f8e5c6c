-- The whole memory of the server: who talked about what, and what is still to do.
--
-- `Store.open()` runs this file on every database that is older than its SCHEMA_VERSION, new ones among them, in one
-- transaction; so everything in it can be run again. The version of a file is its `PRAGMA user_version`.
-- Times are UTC, ISO 8601 with milliseconds and a Z. JSON is kept as text.

-- One conversation, which ChatKit calls a thread.
CREATE TABLE IF NOT EXISTS conversations (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,  -- an id that was deleted never comes back to mean something else
    user_id       TEXT NOT NULL,
    title         TEXT NOT NULL,
    status        TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'locked', 'closed')),
    status_reason TEXT,                               -- shown to whoever tries to write in a locked or closed one
    created_at    TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    updated_at    TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
) STRICT;

-- Newest first, as the REST list shows them; and in the order they were begun, as ChatKit pages through them.
CREATE INDEX IF NOT EXISTS conversations_by_use ON conversations (user_id, updated_at DESC, id DESC);
CREATE INDEX IF NOT EXISTS conversations_by_age ON conversations (user_id, id);

-- One item of a conversation: a row is what the model is shown, what REST returns, and what ChatKit calls an item.
--   user       what the person wrote                       assistant  what the model said
--   tool       one tool call and, in content, its result   reasoning  the model's summary of its thoughts
--   widget     a widget; content is its plain text         input      questions to the person; content is the answers
--   system     context for the model, never shown
CREATE TABLE IF NOT EXISTS messages (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation_id INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    role            TEXT NOT NULL
                    CHECK (role IN ('user', 'assistant', 'tool', 'reasoning', 'widget', 'input', 'system')),
    content         TEXT NOT NULL DEFAULT '',
    tool_calls      TEXT CHECK (tool_calls IS NULL OR json_valid(tool_calls)),  -- [{"id", "name", "args"}], just one
    status          TEXT NOT NULL DEFAULT 'done'
                    CHECK (status IN ('streaming', 'pending', 'done', 'cancelled', 'failed', 'interrupted')),
    feedback        TEXT CHECK (feedback IN ('positive', 'negative')),
    extra           TEXT CHECK (extra IS NULL OR json_valid(extra)),            -- what only one kind of row has
    created_at      TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
) STRICT;

CREATE INDEX IF NOT EXISTS messages_in_order ON messages (conversation_id, id);
-- The few rows that are not finished: what a crash left behind, and what waits for the person's side.
-- SQLite uses it where a query has the same condition, word for word.
DROP INDEX IF EXISTS messages_streaming;
DROP INDEX IF EXISTS messages_pending;
CREATE INDEX IF NOT EXISTS messages_open ON messages (conversation_id, status) WHERE status IN ('streaming', 'pending');

-- Messages with their owner, so that each query can ask for both.
DROP VIEW IF EXISTS items;
CREATE VIEW items AS
    SELECT m.*, c.user_id FROM messages m JOIN conversations c ON c.id = m.conversation_id;

DROP TRIGGER IF EXISTS message_moves_conversation;
CREATE TRIGGER message_moves_conversation AFTER INSERT ON messages BEGIN
    UPDATE conversations SET updated_at = new.created_at WHERE id = new.conversation_id;
END;

-- The to-do list that the built-in assistant works on.
CREATE TABLE IF NOT EXISTS tasks (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id    TEXT NOT NULL,
    title      TEXT NOT NULL,
    done       INTEGER NOT NULL DEFAULT 0 CHECK (done IN (0, 1)),
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
) STRICT;

CREATE INDEX IF NOT EXISTS tasks_of_user ON tasks (user_id, id);

-- Files that a person attaches. `key` is a capability: an upload needs no other, and works once; an <img> can show it.
CREATE TABLE IF NOT EXISTS attachments (
    id         TEXT PRIMARY KEY,
    user_id    TEXT NOT NULL,
    message_id INTEGER REFERENCES messages (id) ON DELETE CASCADE,  -- NULL until it is sent
    key        TEXT NOT NULL,
    name       TEXT NOT NULL,
    mime_type  TEXT NOT NULL,
    size       INTEGER NOT NULL,                                    -- bytes, as announced and as stored
    data       BLOB,                                                -- NULL until it is uploaded
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
) STRICT;

CREATE INDEX IF NOT EXISTS attachments_of_message ON attachments (message_id);
CREATE INDEX IF NOT EXISTS attachments_unsent ON attachments (created_at) WHERE message_id IS NULL;

-- Full-text search. Both tables hold an index and no text; their rowids are those of messages and conversations.
-- `owner` is the user's id in hexadecimal, one word, so that the index itself leaves out other people's rows.
CREATE VIRTUAL TABLE IF NOT EXISTS message_search
    USING fts5 (owner, body, content = '', tokenize = 'unicode61 remove_diacritics 2');
CREATE VIRTUAL TABLE IF NOT EXISTS title_search
    USING fts5 (owner, body, content = '', tokenize = 'unicode61 remove_diacritics 2');

-- A row is taken out of such an index by giving it once more what was put in. What still streams is not in it.
DROP TRIGGER IF EXISTS message_found;
CREATE TRIGGER message_found AFTER INSERT ON messages
WHEN new.role IN ('user', 'assistant') AND new.status <> 'streaming' BEGIN
    INSERT INTO message_search (rowid, owner, body)
    SELECT new.id, hex(user_id), new.content FROM conversations WHERE id = new.conversation_id;
END;

DROP TRIGGER IF EXISTS message_lost;
CREATE TRIGGER message_lost BEFORE DELETE ON messages
WHEN old.role IN ('user', 'assistant') AND old.status <> 'streaming' BEGIN
    INSERT INTO message_search (message_search, rowid, owner, body)
    SELECT 'delete', old.id, hex(user_id), old.content FROM conversations WHERE id = old.conversation_id;
END;

DROP TRIGGER IF EXISTS message_changes;
CREATE TRIGGER message_changes BEFORE UPDATE OF content, status ON messages
WHEN old.role IN ('user', 'assistant') AND old.status <> 'streaming' BEGIN
    INSERT INTO message_search (message_search, rowid, owner, body)
    SELECT 'delete', old.id, hex(user_id), old.content FROM conversations WHERE id = old.conversation_id;
END;

DROP TRIGGER IF EXISTS message_changed;
CREATE TRIGGER message_changed AFTER UPDATE OF content, status ON messages
WHEN new.role IN ('user', 'assistant') AND new.status <> 'streaming' BEGIN
    INSERT INTO message_search (rowid, owner, body)
    SELECT new.id, hex(user_id), new.content FROM conversations WHERE id = new.conversation_id;
END;

DROP TRIGGER IF EXISTS title_found;
CREATE TRIGGER title_found AFTER INSERT ON conversations BEGIN
    INSERT INTO title_search (rowid, owner, body) VALUES (new.id, hex(new.user_id), new.title);
END;

DROP TRIGGER IF EXISTS title_changed;
CREATE TRIGGER title_changed AFTER UPDATE OF title ON conversations BEGIN
    INSERT INTO title_search (title_search, rowid, owner, body) VALUES ('delete', old.id, hex(old.user_id), old.title);
    INSERT INTO title_search (rowid, owner, body) VALUES (new.id, hex(new.user_id), new.title);
END;

-- The messages go first, while their owner can still be looked up.
DROP TRIGGER IF EXISTS title_lost;
CREATE TRIGGER title_lost BEFORE DELETE ON conversations BEGIN
    DELETE FROM messages WHERE conversation_id = old.id;
    INSERT INTO title_search (title_search, rowid, owner, body) VALUES ('delete', old.id, hex(old.user_id), old.title);
END;
