-- schema.sql: chatd's one database, as a list of steps.
--
-- Each "-- version N" line opens the step that brings a database from version N-1 to
-- N. A new file runs them all, an older one only what it lacks, always in ONE
-- transaction together with user_version, so a migration happens whole or not at all.
-- To change the schema, append a step; never edit one that was released.
--
-- STRICT tables refuse a text where an integer belongs, foreign keys are on, and every
-- index names the query that it serves.

-- version 1

-- Facts about this file. key 'epoch': the first half of every cursor; `chatd restore`
-- makes a new one, because the seqs that come after a restore are given out twice.
-- key 'probe': rewritten to learn whether a full disk takes writes again.
CREATE TABLE meta (
    key     TEXT PRIMARY KEY,
    value   TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Everybody a token or a member list has named. Tokens say who a user is; this table
-- only remembers what others want to see (name) and what tokens cannot say (revoked_at,
-- Unix seconds: older tokens are refused).
CREATE TABLE user (
    id          INTEGER PRIMARY KEY CHECK (id > 0),
    name        TEXT,
    revoked_at  INTEGER
) STRICT;

-- At start: whose older tokens are refused.
CREATE INDEX user_revoked ON user (revoked_at) WHERE revoked_at IS NOT NULL;

CREATE TABLE chat (
    id          INTEGER PRIMARY KEY,
    title       TEXT,
    created_at  INTEGER NOT NULL
) STRICT;

-- Who is in a chat now. joined_seq is the seq of the member's own chat_added: later
-- events of the chat are for him. read_n is how far he has read: unread is the chat's
-- last n minus read_n, so it is never counted, and never wrong.
CREATE TABLE member (
    chat_id     INTEGER NOT NULL REFERENCES chat (id),
    user_id     INTEGER NOT NULL REFERENCES user (id),
    joined_seq  INTEGER NOT NULL,
    read_n      INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (chat_id, user_id)
) STRICT, WITHOUT ROWID;

-- The chats of a user: greeting, chat list, poll.
CREATE INDEX member_user ON member (user_id);

-- A message's id is the seq of the event that announced it, so "as of seq S" is
-- "id <= S". n is its place in its chat: 1, 2, 3, without holes. created_at is Unix
-- seconds. client_id is the sender's own key: a repeated send is found by it.
CREATE TABLE message (
    id          INTEGER PRIMARY KEY,
    chat_id     INTEGER NOT NULL REFERENCES chat (id),
    n           INTEGER NOT NULL,
    sender_id   INTEGER NOT NULL REFERENCES user (id),
    content     TEXT NOT NULL,
    created_at  INTEGER NOT NULL,
    client_id   TEXT,
    UNIQUE (chat_id, n)     -- the next n; the last message; history, page by page
) STRICT;

-- A repeated send.
CREATE UNIQUE INDEX message_client ON message (sender_id, client_id)
    WHERE client_id IS NOT NULL;

-- The log: everything lasting that happened, in order. seq is dense: 1, 2, 3.
-- kind is the `type` of the frame. An event is seen by the chat's members (to_chat),
-- by one user (to_user), or by both: a removal is told to the removed one too.
-- user_id is whom it is about: the reader, the added, the removed.
CREATE TABLE event (
    seq         INTEGER PRIMARY KEY,
    kind        TEXT NOT NULL CHECK (kind IN ('new_message', 'message_read',
                    'chat_added', 'member_added', 'member_removed')),
    chat_id     INTEGER NOT NULL REFERENCES chat (id),
    to_chat     INTEGER NOT NULL CHECK (to_chat IN (0, 1)),
    to_user     INTEGER REFERENCES user (id),
    user_id     INTEGER REFERENCES user (id),
    message_id  INTEGER REFERENCES message (id)
) STRICT;

-- events_after, its two halves: what a chat's members see, what one user sees.
CREATE INDEX event_chat ON event (chat_id, seq) WHERE to_chat = 1;
CREATE INDEX event_user ON event (to_user, seq) WHERE to_user IS NOT NULL;
