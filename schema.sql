-- The whole memory of the server: who talked about what, and what is still to do.
-- `Store` runs this file on every database that is older than its SCHEMA_VERSION (which is in `PRAGMA
-- user_version`), new ones among them, in one transaction; so everything in it can be run again.
-- Times are UTC, ISO 8601 with milliseconds and a Z. JSON is kept as text.

-- One conversation, which ChatKit calls a thread.
CREATE TABLE IF NOT EXISTS conversations (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,  -- an id that was deleted never comes back
    user_id       TEXT NOT NULL,
    title         TEXT NOT NULL,
    status        TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'locked', 'closed')),
    status_reason TEXT,                               -- shown to who tries to write in a locked or closed one
    metadata      TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(metadata)),
    agent         TEXT,                               -- who had the last word, if not the first
    created_at    TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    updated_at    TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
) STRICT;

-- In the order of use, as the REST list shows them; and as they were begun, as ChatKit pages through them.
CREATE INDEX IF NOT EXISTS conversations_by_use ON conversations (user_id, updated_at DESC, id DESC);
CREATE UNIQUE INDEX IF NOT EXISTS conversations_by_age ON conversations (user_id, id);

-- One item of a conversation: what the model is shown, what ChatKit shows, and plain text, in one row.
--   user       what the person wrote                       assistant  what the agent said
--   tool       one tool call and, in content, its result   system     context for the model, never shown
--   item       all that only ChatKit has a word for: widgets, questions, pictures, thoughts, ...
CREATE TABLE IF NOT EXISTS messages (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation_id INTEGER NOT NULL,
    user_id         TEXT NOT NULL,  -- the conversation's: each query asks for it
    role            TEXT NOT NULL CHECK (role IN ('user', 'assistant', 'tool', 'system', 'item')),
    content         TEXT NOT NULL DEFAULT '',
    tool_calls      TEXT CHECK (tool_calls IS NULL OR json_valid(tool_calls)),  -- [{"id", "name", "args"}]
    -- ChatKit's thread item without id, thread_id and created_at; NULL where role and content say it all.
    item            TEXT CHECK (item IS NULL OR json_valid(item)),
    -- The Agents SDK's input items for this row; NULL where role and content say it all. Of tools that wait
    -- for the person's approval, an object: the run that goes on with the answer.
    input           TEXT CHECK (input IS NULL OR json_valid(input)),
    status          TEXT NOT NULL DEFAULT 'done' CHECK (status IN
                    ('streaming', 'pending', 'done', 'cancelled', 'failed', 'interrupted', 'blocked')),
    feedback        TEXT CHECK (feedback IN ('positive', 'negative')),
    error           TEXT CHECK (error IS NULL OR json_valid(error)),  -- {"code", "message", "allow_retry"}
    created_at      TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    FOREIGN KEY (user_id, conversation_id) REFERENCES conversations (user_id, id) ON DELETE CASCADE
) STRICT;
CREATE INDEX IF NOT EXISTS messages_in_order ON messages (conversation_id, id);
-- What a crash left behind, or waits for the person's side; used where a query has the same condition.
CREATE INDEX IF NOT EXISTS messages_open ON messages (conversation_id)
    WHERE status IN ('streaming', 'pending');
CREATE TRIGGER IF NOT EXISTS message_moves_conversation AFTER INSERT ON messages BEGIN
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

-- Files of a person, and pictures of an agent. Its key is all that an upload needs, once, or an <img>.
CREATE TABLE IF NOT EXISTS attachments (
    id         TEXT PRIMARY KEY,
    user_id    TEXT NOT NULL,
    key        TEXT NOT NULL,
    name       TEXT NOT NULL,
    mime_type  TEXT NOT NULL,
    size       INTEGER NOT NULL,                                   -- bytes, as announced and as stored
    data       BLOB,                                               -- NULL until it is uploaded
    sent       INTEGER NOT NULL DEFAULT 0 CHECK (sent IN (0, 1)),  -- a message has it
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
) STRICT;
CREATE INDEX IF NOT EXISTS attachments_unsent ON attachments (created_at) WHERE sent = 0;

-- Which messages have which files: a file stays while any message has it.
CREATE TABLE IF NOT EXISTS message_attachments (
    message_id    INTEGER NOT NULL REFERENCES messages (id) ON DELETE CASCADE,
    attachment_id TEXT NOT NULL REFERENCES attachments (id) ON DELETE CASCADE,
    PRIMARY KEY (message_id, attachment_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS messages_of_attachment ON message_attachments (attachment_id);
CREATE TRIGGER IF NOT EXISTS attachment_sent AFTER INSERT ON message_attachments BEGIN
    UPDATE attachments SET sent = 1 WHERE id = new.attachment_id;
END;
CREATE TRIGGER IF NOT EXISTS attachment_lost AFTER DELETE ON message_attachments
WHEN NOT EXISTS (SELECT 1 FROM message_attachments WHERE attachment_id = old.attachment_id) BEGIN
    DELETE FROM attachments WHERE id = old.attachment_id;
END;

-- Full-text search. The tables hold an index and no text; rowids are those of messages and conversations, and
-- `owner` is the user's id in hexadecimal, one word, so that the index itself leaves out other people's rows.
CREATE VIRTUAL TABLE IF NOT EXISTS message_search
    USING fts5 (owner, body, content = '', tokenize = 'unicode61 remove_diacritics 2');
CREATE VIRTUAL TABLE IF NOT EXISTS title_search
    USING fts5 (owner, body, content = '', tokenize = 'unicode61 remove_diacritics 2');

-- What still streams is not in it. A row is taken out by giving the index once more what was put in.
CREATE TRIGGER IF NOT EXISTS message_found AFTER INSERT ON messages
WHEN new.role IN ('user', 'assistant') AND new.status <> 'streaming' BEGIN
    INSERT INTO message_search (rowid, owner, body) VALUES (new.id, hex(new.user_id), new.content);
END;
CREATE TRIGGER IF NOT EXISTS message_lost AFTER DELETE ON messages
WHEN old.role IN ('user', 'assistant') AND old.status <> 'streaming' BEGIN
    INSERT INTO message_search (message_search, rowid, owner, body)
    VALUES ('delete', old.id, hex(old.user_id), old.content);
END;
CREATE TRIGGER IF NOT EXISTS message_changed AFTER UPDATE OF content, status ON messages BEGIN
    INSERT INTO message_search (message_search, rowid, owner, body)
    SELECT 'delete', old.id, hex(old.user_id), old.content
    WHERE old.role IN ('user', 'assistant') AND old.status <> 'streaming';
    INSERT INTO message_search (rowid, owner, body) SELECT new.id, hex(new.user_id), new.content
    WHERE new.role IN ('user', 'assistant') AND new.status <> 'streaming';
END;
CREATE TRIGGER IF NOT EXISTS title_found AFTER INSERT ON conversations BEGIN
    INSERT INTO title_search (rowid, owner, body) VALUES (new.id, hex(new.user_id), new.title);
END;
CREATE TRIGGER IF NOT EXISTS title_lost AFTER DELETE ON conversations BEGIN
    INSERT INTO title_search (title_search, rowid, owner, body)
    VALUES ('delete', old.id, hex(old.user_id), old.title);
END;
CREATE TRIGGER IF NOT EXISTS title_changed AFTER UPDATE OF title ON conversations BEGIN
    INSERT INTO title_search (title_search, rowid, owner, body)
    VALUES ('delete', old.id, hex(old.user_id), old.title);
    INSERT INTO title_search (rowid, owner, body) VALUES (new.id, hex(new.user_id), new.title);
END;
