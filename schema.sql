-- schema.sql: chatd's one database, as a list of steps.
--
-- Each "-- version N" line opens the step that brings a database from version N-1 to
-- N. A new file runs them all, an older one only what it lacks, always in ONE
-- transaction together with user_version, so a migration happens whole or not at all.
-- To change the schema, append a step; never edit one that was released.
--
-- STRICT tables refuse a text where an integer belongs, and foreign keys are on, but for
-- the time of a step. A comment names the query that each index serves.
--
-- What was deleted is gone from every byte of the file. secure_delete alone does not do
-- that: it overwrites a row, not the copies of it that stay in the unused part of a page
-- when SQLite moves rows to make room. So from version 2 on, texts and names are in tables
-- whose rows are never moved: they are only appended, and overwritten in place, with as
-- many bytes (`message`, `change`, `user_name`). Other fields that change are in other
-- tables.

-- version 1

-- Facts about this file. Key 'epoch' is the first half of every cursor. `chatd restore`
-- makes a new one, because seqs that were given out before a restore are given out again
-- after it. Key 'probe' is rewritten to learn whether a full disk takes writes again.
CREATE TABLE meta (
    key     TEXT PRIMARY KEY,
    value   TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Every user that is or was a member, or has a name. A token says which user it is for.
-- This table keeps what other users see (name), and what a token cannot say: tokens older
-- than revoked_at (Unix seconds) are refused.
CREATE TABLE user (
    id          INTEGER PRIMARY KEY CHECK (id > 0),
    name        TEXT,
    revoked_at  INTEGER
) STRICT;

-- At start: the users whose older tokens are refused.
CREATE INDEX user_revoked ON user (revoked_at) WHERE revoked_at IS NOT NULL;

CREATE TABLE chat (
    id          INTEGER PRIMARY KEY,
    title       TEXT,
    created_at  INTEGER NOT NULL
) STRICT;

-- The members of each chat, now. joined_seq is the seq of the member's own chat_added:
-- the member sees the chat's events that come later. The member has read all messages up
-- to n = read_n; the next one, if there is one, is of another sender. Unread is the chat's
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

-- The event log as chatd 1.0 had it. Schema version 2, below, replaces this table.
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

CREATE INDEX event_chat ON event (chat_id, seq) WHERE to_chat = 1;
CREATE INDEX event_user ON event (to_user, seq) WHERE to_user IS NOT NULL;

-- version 2

-- The names that users got, each new one in a new row, the newest in user.name_id. NULL:
-- the user has no name any more.
CREATE TABLE user_name (
    id          INTEGER PRIMARY KEY,
    user_id     INTEGER NOT NULL REFERENCES user (id),
    name        TEXT
) STRICT;

INSERT INTO user_name (user_id, name)
SELECT id, name FROM user WHERE name IS NOT NULL ORDER BY id;

-- named_at is when the user got its name, in Unix seconds: the iat of the token that said
-- it; a second after the request, if the user chose it. The newest name wins. 0: that token
-- had no iat. NULL: by chatd 1.0, or never named.
CREATE TABLE user_2 (
    id          INTEGER PRIMARY KEY CHECK (id > 0),
    revoked_at  INTEGER,
    named_at    INTEGER,
    name_id     INTEGER     -- a row of user_name (REFERENCES would scan user for each name)
) STRICT;

INSERT INTO user_2
SELECT u.id, u.revoked_at, NULL, a.id FROM user u LEFT JOIN user_name a ON a.user_id = u.id;

DROP TABLE user;
ALTER TABLE user_2 RENAME TO user;

CREATE INDEX user_revoked ON user (revoked_at) WHERE revoked_at IS NOT NULL;

-- Overwrites the earlier name.
CREATE TRIGGER name_erases AFTER INSERT ON user_name BEGIN
    UPDATE user_name SET name = nullif(
        CAST(zeroblob(length(CAST(name AS BLOB))) AS TEXT), '')
    WHERE id = (SELECT name_id FROM user WHERE id = new.user_id);
    UPDATE user SET name_id = new.id WHERE id = new.user_id;
END;

-- direct_key is set in a direct chat, of two users: their ids, the smaller first, as
-- '3:7'. Once one of them is forgotten it is the chat's own id, without a colon: the chat
-- stays direct, the other may leave it, and the pair may have a new one. created_by is
-- the user who created the chat (NULL: a service, or by chatd 1.0), client_id that
-- creator's own key: a repeated creation is found by it. last_n is the n of the newest
-- message: it gives the next n, and the unread list. Invitations to the chat name its
-- invite_key; a new key ends them.
ALTER TABLE chat ADD COLUMN direct_key TEXT;
ALTER TABLE chat ADD COLUMN created_by INTEGER REFERENCES user (id);
ALTER TABLE chat ADD COLUMN client_id TEXT;
ALTER TABLE chat ADD COLUMN last_n INTEGER NOT NULL DEFAULT 0;
ALTER TABLE chat ADD COLUMN invite_key TEXT;

UPDATE chat SET last_n = coalesce((SELECT max(n) FROM message WHERE chat_id = chat.id), 0);

-- Of each pair's chats of two members and no title, the one with the newest message
-- becomes direct. If none has a message, the newest chat does.
UPDATE chat SET direct_key = pair.key
FROM (
    SELECT id, key, row_number() OVER (
        PARTITION BY key ORDER BY newest DESC NULLS LAST, id DESC) AS place
    FROM (
        SELECT c.id, min(b.user_id) || ':' || max(b.user_id) AS key, m.id AS newest
        FROM chat c JOIN member b ON b.chat_id = c.id
                    LEFT JOIN message m ON m.chat_id = c.id AND m.n = c.last_n
        WHERE c.title IS NULL GROUP BY c.id HAVING count(*) = 2)
) pair
WHERE chat.id = pair.id AND pair.place = 1;

-- The direct chat of a pair; a repeated creation. All services count as one creator.
CREATE UNIQUE INDEX chat_direct ON chat (direct_key) WHERE direct_key IS NOT NULL;
CREATE UNIQUE INDEX chat_client ON chat (coalesce(created_by, 0), client_id)
    WHERE client_id IS NOT NULL;

-- The messages once more, as in version 1. folded is the text that a search looks through,
-- where it differs from the content: chatd.py's fold(content). The texts of a message that
-- was changed are overwritten with NULs, as is the client_id of a forgotten user. No
-- client has sent any of these with a NUL.
CREATE TABLE message_2 (
    id          INTEGER PRIMARY KEY,
    chat_id     INTEGER NOT NULL REFERENCES chat (id),
    n           INTEGER NOT NULL,
    sender_id   INTEGER NOT NULL REFERENCES user (id),
    content     TEXT NOT NULL,
    created_at  INTEGER NOT NULL,
    client_id   TEXT,
    folded      TEXT,
    UNIQUE (chat_id, n)     -- the next n; the last message; history, page by page
) STRICT;

INSERT INTO message_2
SELECT id, chat_id, n, sender_id, content, created_at, client_id,
       nullif(fold(content), content)
FROM message ORDER BY id;

DROP TABLE message;
ALTER TABLE message_2 RENAME TO message;

-- A repeated send.
CREATE UNIQUE INDEX message_client ON message (sender_id, client_id)
    WHERE client_id >= ' ';

-- The edits and deletions. A message is what its newest change says: the one with the
-- largest rev, which is the seq of its event. The content of a deleted message is ''.
-- edited_at is the time of the last edit in Unix seconds (NULL: none). The texts of older
-- changes are overwritten with NULs.
CREATE TABLE change (
    rev         INTEGER PRIMARY KEY,
    message_id  INTEGER NOT NULL REFERENCES message (id),
    content     TEXT NOT NULL,
    folded      TEXT,
    edited_at   INTEGER,
    deleted     INTEGER NOT NULL
) STRICT;

-- The newest change of a message.
CREATE INDEX change_message ON change (message_id);

-- Overwrites the earlier texts of the message.
CREATE TRIGGER change_erases AFTER INSERT ON change BEGIN
    UPDATE message SET
        content = CAST(zeroblob(length(CAST(content AS BLOB))) AS TEXT),
        folded = nullif(CAST(zeroblob(length(CAST(folded AS BLOB))) AS TEXT), '')
    WHERE id = new.message_id AND content >= char(1);
    UPDATE change SET
        content = CAST(zeroblob(length(CAST(content AS BLOB))) AS TEXT),
        folded = nullif(CAST(zeroblob(length(CAST(folded AS BLOB))) AS TEXT), '')
    WHERE rev = (SELECT max(rev) FROM change
                 WHERE message_id = new.message_id AND rev < new.rev);
END;

ALTER TABLE event RENAME TO event_1;
DROP INDEX event_chat;
DROP INDEX event_user;

-- The event log: everything lasting that happened, in order. seq is dense: 1, 2, 3.
-- kind is the `type` of a subclass of Event in chatd.py. The audience of an event is the
-- members of the chat (to_chat), one user (to_user), or both: the remaining members and
-- the removed one all see a removal.
--
-- A message's text, a user's name and a chat are never copied into an event. They are
-- read when the event is: message_id and user_id say whose. body has the event's other
-- fields as a JSON object.
CREATE TABLE event (
    seq         INTEGER PRIMARY KEY,
    kind        TEXT NOT NULL,
    chat_id     INTEGER NOT NULL REFERENCES chat (id),
    to_chat     INTEGER NOT NULL CHECK (to_chat IN (0, 1)),
    to_user     INTEGER REFERENCES user (id),
    user_id     INTEGER REFERENCES user (id),       -- the event shows the user's name
    message_id  INTEGER REFERENCES message (id),    -- the event shows the message
    body        TEXT                                -- NULL: none, or all at their default
) STRICT;

INSERT INTO event
SELECT e.seq, e.kind, e.chat_id, e.to_chat, e.to_user,
       CASE e.kind WHEN 'member_added' THEN e.user_id END,
       CASE e.kind WHEN 'new_message' THEN e.message_id END,
       CASE e.kind
           WHEN 'message_read' THEN json_object(
               'message_id', e.message_id, 'read_by', e.user_id, 'n', m.n)
           WHEN 'member_removed' THEN json_object('user_id', e.user_id)
       END
FROM event_1 e LEFT JOIN message m ON m.id = e.message_id;

DROP TABLE event_1;

-- events_after, its two halves: what a chat's members see, what one user sees.
CREATE INDEX event_chat ON event (chat_id, seq) WHERE to_chat = 1;
CREATE INDEX event_user ON event (to_user, seq) WHERE to_user IS NOT NULL;

-- A message is an event, the newest of its chat, and its sender has read it if nothing
-- else was unread. This is done here, because a message then takes two statements of
-- Python instead of four: its lock changes hands for each.
CREATE TRIGGER message_event AFTER INSERT ON message BEGIN
    INSERT INTO event (seq, kind, chat_id, to_chat, message_id)
    VALUES (new.id, 'new_message', new.chat_id, 1, new.id);
    UPDATE chat SET last_n = new.n WHERE id = new.chat_id;
    UPDATE member SET read_n = new.n
    WHERE chat_id = new.chat_id AND user_id = new.sender_id AND read_n = new.n - 1;
END;
