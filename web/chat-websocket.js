// @ts-check
/**
 * chat-websocket.js: a dependable connection to chatd, for any page.
 *
 *     import { ChatWebSocket } from "https://chat.example.com/web/chat-websocket.js";
 *
 *     const chat = new ChatWebSocket();
 *     chat.on("new_message", ({ message }) => show(message));
 *     chat.connect(token);                  // or: chat.connect(async () => newToken())
 *     chat.send(3, "Hello");                // sent again until it is stored
 *
 * It makes three promises:
 *
 * - Every event of your chats reaches your listeners once and in order, or "resync"
 *   tells you to fetch your chats again. The client keeps the server's cursor.
 * - A message that you send is stored once. It stays in localStorage until the server's
 *   ack, and the server stores each client_id once. Edits and deletions wait in line.
 * - The client reconnects by itself, after a random delay, so that ten thousand pages
 *   do not reconnect at once. After 5 s without a socket it polls, and tries the socket
 *   again every 30 s.
 *
 * Only typing is best effort. This file needs no other file.
 */

/* -------------------------------------------------------------------------------------
 * Limits.
 * ---------------------------------------------------------------------------------- */

/**
 * A reconnect waits for a random part of this bound. Each failure doubles the bound.
 */
const FIRST_RETRY_SECONDS = 0.5;
/** After this long without a socket the client polls, and the state says so. */
const FALLBACK_SECONDS = 5;
/** The pause between two polls. */
const POLL_SECONDS = 5;
/** While the client polls, it tries the socket again this often. */
const RETRY_SECONDS = 30;
/** A socket that is not ready after this long counts as refused. */
const CONNECT_SECONDS = 10;
/** A connection that lasted this long resets the bound of the delay. */
const STEADY_SECONDS = 5;
/**
 * After this long without a message from the server, the client sends a `ping`. The
 * server's own pings are WebSocket frames that JavaScript cannot see.
 */
const SILENCE_SECONDS = 25;
/** Without an answer to that ping for this long, the connection is dead. */
const PONG_SECONDS = 10;
/** The same, after the network has changed or the tab has become visible. */
const PROBE_SECONDS = 4;
/** How often the client checks for silence. */
const WATCH_SECONDS = 2;
/** The shortest time between two renewals: the new token may expire soon, too. */
const RENEW_SECONDS = 15;
/** A message without an answer for this long means that the connection is dead. */
const ANSWER_SECONDS = 20;
/** An HTTP request fails after this long. */
const REQUEST_SECONDS = 15;
/** The wait after a refusal without `retry_after`. */
const REFUSED_SECONDS = 2;
/**
 * How often the client looks in storage for messages of other tabs. A message that it
 * finds twice was left by a closed tab, so the client sends it.
 */
const ADOPT_SECONDS = 15;
/** `is_typing: true` is sent at most this often. */
const TYPING_REPEAT_SECONDS = 3;
/** `is_typing: false` is sent this long after the last call of sendTyping. */
const TYPING_STOP_SECONDS = 5;
/** A read mark is sent at most this often for each chat. */
const MARK_SECONDS = 1;
/** fetchChats fetches this many chats with one request. */
const CHATS_PER_PAGE = 100;

const LONE_SURROGATE =
  /[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

/**
 * Close codes from 4500 to 4999 mean "stay away". These two have states of their own.
 */
const STAY_AWAY = /** @type {Record<number, "signed_out" | "too_many">} */ ({
  4503: "signed_out", // revoked, or the token of another user
  4504: "too_many", // too many connections of this user
});
const STAY_AWAY_FROM = 4500;

/**
 * What is refused with one of these codes fails, so that it does not block what was
 * written after it. After "internal" the message may be stored nevertheless; then its
 * event reports it as sent.
 */
const FINAL_REFUSALS = new Set([
  "bad_field",
  "bad_json",
  "changed",
  "deleted",
  "forbidden",
  "idempotency_mismatch",
  "internal",
  "not_found",
  "too_large",
  "too_late",
  "unknown_type",
]);

/* -------------------------------------------------------------------------------------
 * Types. The server messages, and the client's own events.
 * ---------------------------------------------------------------------------------- */

/**
 * `rev` grows with each edit or deletion; without it, the `id` counts as the `rev`.
 * @typedef {object} Message
 * @property {number} id
 * @property {number} chat_id
 * @property {number} sender_id
 * @property {string} content
 * @property {string} created_at UTC, RFC 3339
 * @property {number} n its position in the chat: 1, 2, 3, without holes
 * @property {string} [client_id]
 * @property {number} [rev]
 * @property {string} [edited_at]
 * @property {boolean} [deleted]
 */
/**
 * @typedef {{user_id: number, name: string | null, read_n: number,
 *   online?: boolean}} Member
 */
/**
 * @typedef {object} Chat
 * @property {number} id
 * @property {string | null} title
 * @property {boolean} direct
 * @property {number | null} created_by
 * @property {number} member_count
 * @property {Member[]} members empty if there are many: see members()
 * @property {number} last_n the `n` of its last message; 0: it has none
 * @property {Message | null} last_message
 * @property {number} [read_n] the `n` of the last message that you have read
 * @property {number} [unread]
 */
/**
 * @typedef {object} Connected
 * @property {"connected"} type
 * @property {number} user_id
 * @property {string} timestamp
 * @property {string} cursor
 * @property {"fresh" | "live" | "replay" | "resync"} resume
 * @property {number} expires_in seconds
 * @property {Record<string, {last_n: number, read_n: number}>} chats
 * @property {boolean} [more_chats] `chats` has only the newest ones
 */
/**
 * Its sender has read the chat up to it, unless `read` is false: then a service has sent
 * it in the sender's name, and the messages before it are still unread.
 * @typedef {{type: "new_message", seq: number, chat_id: number,
 *   message: Message, read?: false}} NewMessage
 */
/**
 * @typedef {{type: "message_read", seq: number, message_id: number, chat_id: number,
 * read_by: number, n: number}} MessageRead
 */
/**
 * @typedef {{type: "chat_added", seq: number, chat_id: number, chat: Chat}} ChatAdded
 */
/**
 * @typedef {{type: "member_added", seq: number, chat_id: number, user_id: number,
 * name: string | null}} MemberAdded
 */
/**
 * @typedef {{type: "member_removed", seq: number, chat_id: number,
 *   user_id: number}} MemberRemoved
 */
/**
 * @typedef {{type: "chat_renamed", seq: number, chat_id: number,
 *   title: string | null, user_id: number | null}} ChatRenamed
 */
/**
 * `message` is the newest known state: an edited message may have been deleted since.
 * @template {string} Type
 * @typedef {{type: Type, seq: number, chat_id: number, message: Message}} Changed
 */
/**
 * @typedef {{type: "typing", chat_id: number, user_id: number,
 *   is_typing: boolean}} Typing
 */
/**
 * @typedef {{type: "ack", ref?: string, client_id?: string, message_id?: number,
 * chat_id?: number, n?: number, created_at?: string, duplicate?: boolean, rev?: number,
 * expires_in?: number}} Ack
 */
/**
 * @typedef {{type: "error", code: string, message: string, ref?: string,
 * client_id?: string, chat_id?: number, message_id?: number, retry_after?: number
 * }} Refusal
 */
/**
 * @typedef {NewMessage | MessageRead | Changed<"message_edited">
 *   | Changed<"message_deleted"> | ChatAdded | ChatRenamed | MemberAdded
 *   | MemberRemoved} LoggedEvent
 */

/**
 * The state of the connection:
 * - `connecting`: there is no socket yet, or it was lost less than 5 s ago
 * - `polling`: there is no socket; the client uses HTTP
 * - `offline`: polls fail, too
 * - `signed_out`: the token is no longer valid; call connect with a new one
 * - `too_many`: too many connections; the client waits until the user comes back
 * - `refused`: the server told the client to stay away
 * - `closed`: disconnect was called, or connect was never called
 * @typedef {"connecting" | "connected" | "polling" | "offline" | "signed_out"
 *   | "too_many"
 *   | "refused" | "closed"} State
 */
/**
 * @typedef {object} StateChange
 * @property {State} state
 * @property {number | null} retryIn seconds until the next attempt to open a socket;
 *   null: none is scheduled
 */
/**
 * The state of a message that you sent, or of a change: an edit or a deletion.
 * `discarded` follows `failed`, forget(), a later change, or the same in another tab.
 * @typedef {object} Delivery
 * @property {"sending" | "sent" | "failed" | "discarded"} state
 * @property {"message" | "edit" | "delete"} kind
 * @property {string} client_id
 * @property {number} chat_id of a message; 0 for a change
 * @property {number} message_id of a change; 0 for a message
 * @property {string} content
 * @property {boolean} kept it is in storage and survives a reload; false if storage is
 *   full or forbidden
 * @property {Message} [message] the stored message, if `state` is "sent" and no event
 *   or answer that came before has brought it
 * @property {string} [code] the code of the error, if `state` is "failed"
 * @property {string} [reason] the same error as a sentence
 */
/** @typedef {{chats: Chat[], cursor: string}} Snapshot */
/** @typedef {Snapshot & {more?: boolean, position?: string | number}} ChatPage */
/** @typedef {{messages: Message[], more: boolean, more_after?: boolean}} History */
/** @typedef {{token: string, expires_in: number}} Token */
/**
 * @typedef {object} ChatEvents
 * @property {StateChange} state
 * @property {Delivery} delivery
 * @property {Snapshot} chats the answer of fetchChats
 * @property {{}} resync too much was missed: call fetchChats, and load again what you
 *   show
 * @property {Connected} connected
 * @property {NewMessage} new_message
 * @property {MessageRead} message_read
 * @property {Changed<"message_edited">} message_edited
 * @property {Changed<"message_deleted">} message_deleted
 * @property {ChatAdded} chat_added
 * @property {ChatRenamed} chat_renamed
 * @property {MemberAdded} member_added
 * @property {MemberRemoved} member_removed
 * @property {Typing} typing
 * @property {Ack} ack
 * @property {Refusal} error
 * @property {{type: "pong", timestamp: string}} pong
 * @property {{type: "token_expiring", expires_in: number}} token_expiring
 * @property {{type: "bye", retry_after: number}} bye
 */

/** @typedef {string | (() => string | Promise<string>)} TokenSource */
/**
 * @typedef {Pick<Storage, "getItem" | "setItem" | "removeItem" | "key" | "length">
 *   } StorageLike
 */
/**
 * @typedef {object} Options
 * @property {string | URL} [server] chatd's address. Default: the server that this file
 *   came from.
 * @property {TokenSource} [bearer] the token for HTTP requests. With it, connect()
 *   needs no token: the client fetches a ticket, so that the long-lived token is in no
 *   URL.
 * @property {StorageLike | null} [storage] where unsent messages are kept across
 *   reloads. Default: localStorage; null: nowhere.
 * @property {Pick<Console, "log"> | null} [log] where the client writes log lines.
 *   Default: the console; null: nowhere.
 */

/** A request that was refused (`status` is the HTTP status) or not answered (0). */
export class ChatError extends Error {
  /**
   * @param {number} status
   * @param {string} code chatd's error code, e.g. "not_found"; "unreachable" if
   *   `status` is 0
   * @param {string} message a sentence for the user
   * @param {number} [retryAfter] seconds
   */
  constructor(status, code, message, retryAfter) {
    super(message);
    this.name = "ChatError";
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/* -------------------------------------------------------------------------------------
 * Unsent messages, edits and deletions, in the order of writing. Each is an item of its
 * own in storage, so that tabs never overwrite each other's. Another tab, or the next
 * visit, adopts what a closed tab has left. If two tabs send one message, the server
 * stores its client_id once. But a tab drops an edit or a deletion that another tab has
 * settled, because a later edit may have followed.
 * ---------------------------------------------------------------------------------- */

/**
 * @typedef {object} Unsent
 * @property {Delivery["kind"]} kind
 * @property {string} client_id
 * @property {number} chat_id
 * @property {number} message_id
 * @property {string} content
 * @property {number | undefined} [if_rev]
 * @property {string} [epoch] in another one, message_id may mean another message
 * @property {boolean} kept it is in storage, too
 * @property {"waiting" | "socket" | "http" | "failed"} place on its way, or refused
 * @property {number} sentAt when it was last sent over the socket, as now()
 * @property {boolean} tried it may have been sent
 * @property {string | undefined} [code] the code of the error, if it failed
 * @property {string | undefined} [reason]
 */

/** The value of an item just before it is removed, so that other tabs drop it, too. */
const DISCARDED = "discarded";

class UnsentMessages {
  /** Oldest first. @type {Unsent[]} */
  entries = [];
  #storage;
  /** Begins the keys in storage. "" until the user is known: nothing is stored yet. */
  #prefix = "";
  #lastTime = 0;
  /** The items of other tabs at the last call of adopt. @type {Set<string>} */
  #othersBefore = new Set();

  /** @param {StorageLike | null} storage */
  constructor(storage) {
    this.#storage = storage;
  }

  /**
   * Stores the entries under this prefix from now on, and adopts the entries that are
   * already there. A second call does nothing.
   * @param {string} prefix
   */
  open(prefix) {
    if (this.#prefix) return;
    this.#prefix = prefix;
    this.entries.forEach((entry) => this.#keep(entry));
    this.#insert(this.#others());
  }

  /**
   * Adopts the items of other tabs that were in storage at the last call and still are.
   * @returns {Unsent[]}
   */
  adopt() {
    const others = this.#others();
    const left = others.filter(({ client_id }) => this.#othersBefore.has(client_id));
    this.#othersBefore = new Set(others.map(({ client_id }) => client_id));
    this.#insert(left);
    return left;
  }

  /** @param {Partial<Unsent>} fields @returns {Unsent} */
  add(fields) {
    const entry = newUnsent(this.#newId(), fields);
    this.entries.push(entry);
    // Also the entries that did not fit before, so that a tab that adopts them later
    // has all of them in order.
    this.entries.filter(({ kept }) => !kept).forEach((unkept) => this.#keep(unkept));
    return entry;
  }

  /** @param {string | undefined} clientId */
  find(clientId) {
    return this.entries.find((entry) => entry.client_id === clientId);
  }

  /** @param {Unsent} entry @param {Partial<Unsent>} fields */
  update(entry, fields) {
    Object.assign(entry, fields);
    this.#keep(entry);
  }

  /**
   * Removes an entry that the server has stored.
   * @param {Unsent} entry @param {number} [rev] of the message after a change
   */
  remove(entry, rev) {
    this.entries = this.entries.filter((other) => other !== entry);
    const key = this.#prefix + entry.client_id;
    if (rev) this.#store((storage) => storage.setItem(key, String(rev)));
    this.#store((storage) => storage.removeItem(key));
    this.#rebase(entry, rev);
  }

  /**
   * An edit was stored. A later edit of the same state becomes one of the new state.
   * @param {Unsent} edit @param {number | undefined} rev
   */
  #rebase({ message_id, if_rev }, rev) {
    for (const later of this.entries)
      if (rev && if_rev && later.message_id === message_id && later.if_rev === if_rev) {
        later.if_rev = rev;
        this.#keep(later);
      }
  }

  /** Removes an unsent entry in all tabs. @param {Unsent} entry */
  discard(entry) {
    this.#store((storage) =>
      storage.setItem(this.#prefix + entry.client_id, DISCARDED),
    );
    this.remove(entry);
  }

  /**
   * Another tab has changed an item in storage. If it has discarded an entry of this
   * tab, or settled a change, removes that entry and returns it.
   * @param {string | null} key
   * @param {string | null} value
   */
  discardedElsewhere(key, value) {
    if (!this.#prefix || !key?.startsWith(this.#prefix)) return;
    const entry = this.find(key.slice(this.#prefix.length));
    const rev = Number(value); // as in remove, or 0, or NaN
    const settled = rev >= 0 && entry?.kind !== "message";
    if (!entry || (value !== DISCARDED && !settled)) return;
    this.entries = this.entries.filter((other) => other !== entry);
    this.#rebase(entry, rev);
    return entry;
  }

  /** Whether another tab has settled this change. @param {Unsent} entry */
  isGone(entry) {
    /** @type {string | null} */
    let item = "";
    this.#store((storage) => {
      item = storage.getItem(this.#prefix + entry.client_id);
    });
    return entry.kind !== "message" && entry.kept && item === null;
  }

  /**
   * Lets the entries that are on their way wait again.
   * @param {"socket" | "http"} place
   */
  requeue(place) {
    for (const entry of this.at(place)) entry.place = "waiting";
  }

  /** @param {Unsent["place"]} place */
  at(place) {
    return this.entries.filter((entry) => entry.place === place);
  }

  /** Ids sort in the order of writing, across reloads and if the clock is set back. */
  #newId() {
    this.#lastTime = Math.max(this.#lastTime + 1, Date.now());
    const random = crypto.getRandomValues(new Uint32Array(3));
    const digits = [...random].map((number) => number.toString(36).padStart(7, "0"));
    return `${this.#lastTime.toString(36).padStart(9, "0")}-${digits.join("")}`;
  }

  /** @param {Unsent[]} entries */
  #insert(entries) {
    const all = [...this.entries, ...entries];
    this.entries = all.sort((a, b) => (a.client_id < b.client_id ? -1 : 1));
    const last = parseInt(all.at(-1)?.client_id ?? "0", 36); // it stops at the "-"
    this.#lastTime = Math.max(this.#lastTime, last);
  }

  /** @param {Unsent} entry */
  #keep(entry) {
    // A page of 1.0 would send an item with a chat_id as a message.
    const change = ["kind", "message_id", "if_rev", "epoch"];
    const target = entry.kind === "message" ? ["chat_id"] : change;
    const text = JSON.stringify(entry, [...target, "content", "code", "reason"]);
    entry.kept = this.#store((storage) =>
      storage.setItem(this.#prefix + entry.client_id, text),
    );
  }

  /** The items in storage that are not among the entries. @returns {Unsent[]} */
  #others() {
    /** @type {Unsent[]} */
    const found = [];
    this.#store((storage) => {
      for (let i = 0; i < storage.length; i++) {
        const key = storage.key(i);
        if (!key?.startsWith(this.#prefix)) continue;
        const entry = readUnsent(key.slice(this.#prefix.length), storage.getItem(key));
        if (entry && !this.find(entry.client_id)) found.push(entry);
      }
    });
    return found;
  }

  /**
   * Storage may be full or forbidden. Then an entry is in memory only, and its `kept`
   * is false.
   * @param {(storage: StorageLike) => void} use
   * @returns {boolean} whether it worked
   */
  #store(use) {
    if (!this.#storage || !this.#prefix) return false;
    try {
      use(this.#storage);
      return true;
    } catch {
      return false;
    }
  }
}

/** @param {string} client_id @param {Partial<Unsent>} fields @returns {Unsent} */
function newUnsent(client_id, fields) {
  return {
    kind: "message",
    chat_id: 0,
    message_id: 0,
    content: "",
    kept: false,
    place: "waiting",
    sentAt: 0,
    tried: false,
    ...fields,
    client_id,
  };
}

/**
 * @param {string} clientId
 * @param {string | null} text
 * @returns {Unsent | null} null: the item is not an unsent message, or no longer one
 */
function readUnsent(clientId, text) {
  const item = parseObject(text) ?? {};
  const { kind = "message", chat_id, message_id, content, code } = item;
  const id = kind === "message" ? chat_id : message_id;
  if (typeof content !== "string" || !Number.isInteger(id)) return null;
  if (!["message", "edit", "delete"].includes(kind)) return null;
  const place = code ? "failed" : "waiting";
  return newUnsent(clientId, { ...item, kept: true, tried: true, place });
}

/** @param {Unsent} entry @returns {object} the command that sends it */
function commandFor({ kind, client_id, chat_id, message_id, content, if_rev }) {
  const ref = client_id;
  if (kind === "edit")
    return { type: "edit_message", message_id, content, if_rev, ref };
  if (kind === "delete") return { type: "delete_message", message_id, ref };
  return { type: "send_message", chat_id, content, client_id, ref };
}

/** @param {Unsent} entry @returns {[string, string, object?]} the same over HTTP */
function requestFor({ kind, client_id, chat_id, message_id, content, if_rev }) {
  const path = `/api/v1/messages/${message_id}`;
  if (kind === "edit") return ["PATCH", path, { content, if_rev }];
  if (kind === "delete") return ["DELETE", path];
  return ["POST", `/api/v1/chats/${chat_id}/messages`, { content, client_id }];
}

/** @returns {StorageLike | null} */
function defaultStorage() {
  try {
    return globalThis.localStorage ?? null;
  } catch {
    return null; // a browser may forbid even the access to the property
  }
}

/* -------------------------------------------------------------------------------------
 * The rule of rev: of two states of a message, the one with the larger rev counts.
 * Events and answers overtake each other. So the client keeps the newest state as long
 * as an older one may be on its way, in an earlier event or in the answer to a request.
 * ---------------------------------------------------------------------------------- */

class NewestMessages {
  /** @type {Map<number, Message>} */
  #changed = new Map();
  /** Requests without an answer. */
  #requests = 0;

  /** The newest known state of a message. @param {Message} message */
  of(message) {
    const known = this.#changed.get(message.id);
    if (known && (known.rev ?? 0) > (message.rev ?? message.id)) return known;
    if (message.rev) this.#changed.set(message.id, message);
    return message;
  }

  /** Puts the newest states into an answer or an event. @param {any} answer */
  putInto(answer) {
    const { message, messages, chat, chats = [chat] } = answer ?? {};
    if (message) answer.message = this.of(message);
    if (messages)
      answer.messages = messages.map((/** @type {Message} */ m) => this.of(m));
    for (const one of chats)
      if (one?.last_message) one.last_message = this.of(one.last_message);
  }

  requestBegins() {
    this.#requests += 1;
  }

  /** @param {number} seq of the cursor */
  requestEnds(seq) {
    this.#requests -= 1;
    this.prune(seq);
  }

  /** Forgets what is no longer needed. @param {number} seq of the cursor */
  prune(seq) {
    if (this.#requests > 0) return;
    for (const [id, { rev = 0 }] of this.#changed)
      if (rev <= seq) this.#changed.delete(id);
  }

  /** In another epoch, each rev means something else. */
  forget() {
    this.#changed.clear();
  }
}

/**
 * @param {string} cursor `"<epoch>.<seq>"`
 * @returns {{epoch: string, seq: number}}
 */
function parseCursor(cursor) {
  const dot = cursor.lastIndexOf(".");
  return { epoch: cursor.slice(0, dot), seq: Number(cursor.slice(dot + 1)) };
}

/* -------------------------------------------------------------------------------------
 * ChatWebSocket. It owns at most one socket, at most one poll, and the cursor. The
 * state is not stored: #state computes it from these, so it cannot be out of date.
 * After an `await`, a method checks whether its work is still wanted (#attempt,
 * AbortController).
 * ---------------------------------------------------------------------------------- */

export class ChatWebSocket {
  #base;
  #bearer;
  #log;
  #unsent;
  #newest = new NewestMessages();
  /** @type {Map<string, Set<(event: any) => void>>} */
  #listeners = new Map();

  /** The argument of connect. @type {TokenSource | undefined} */
  #token;
  /** The last token of the token function, for HTTP. @type {string | undefined} */
  #fetchedToken;
  /** @type {number | undefined} */
  #userId;

  /**
   * The state that ended the connection; null: it has not ended.
   * @type {State | null}
   */
  #ended = "closed";
  /** @type {WebSocket | null} */
  #socket = null;
  /** `connected` has arrived on #socket. */
  #ready = false;
  /** Counts attempts. A method that finds a new number after an `await` returns. */
  #attempt = 0;
  #failures = 0;
  #connectedAt = 0;
  #attemptAt = 0;
  /** The last socket closed as it would if the token were refused. */
  #tokenInDoubt = false;
  /** The `retry_after` of `bye`. @type {number | null} */
  #byeSeconds = null;
  /** When the next attempt to open a socket begins, as now(). @type {number | null} */
  #retryAt = null;
  #retryTimer = 0;
  #connectTimer = 0;
  #watchTimer = 0;
  #watchedAt = 0;
  #adoptTimer = 0;
  #receivedAt = 0;
  /** When the answer to a ping is due, as now(); 0: no ping is unanswered. */
  #pongBy = 0;
  #renewedAt = -Infinity;

  /** A poll is running or scheduled. */
  #polling = false;
  #pollTimer = 0;
  /** Aborts every request that replaces the socket. */
  #fallback = new AbortController();
  /** The last poll was answered. */
  #reachable = true;

  /** The position in the event log up to which events were accepted. */
  #cursor = { epoch: "", seq: -1 };
  /** No event after this seq was missed. A list of chats from before it is too old. */
  #gaplessFrom = -1;
  /** Counts the restarts at another cursor. */
  #gaps = 0;
  /** The last list of chats has what the events up to here say of them. */
  #listedUpTo = -1;
  /**
   * Events that wait for fetchChats; null: it does not run.
   * @type {LoggedEvent[] | null}
   */
  #held = null;
  /** @type {Promise<Snapshot> | null} */
  #fetching = null;

  /** No message is sent before this time, as now(): the server asked for a wait. */
  #sendNotBefore = 0;
  #sendTimer = 0;
  /**
   * The read mark of each chat, as message ids: the one that the page `wanted`, and the
   * one for which the server's answer has `settled` it.
   * @type {Map<number,
   *   {wanted: number, settled: number, sentAt: number, timer: number}>}
   */
  #marks = new Map();
  /** @type {Map<number, {sentAt: number, timer: number}>} */
  #typing = new Map();
  #lastState = "";

  /** @param {Options} [options] */
  constructor(options = {}) {
    this.#base = new URL(options.server ?? new URL("..", import.meta.url));
    if (!this.#base.pathname.endsWith("/")) this.#base.pathname += "/";
    this.#bearer = options.bearer;
    this.#log = options.log === undefined ? console : options.log;
    this.#unsent = new UnsentMessages(
      options.storage === undefined ? defaultStorage() : options.storage,
    );
    this.#learnUserFrom(this.#bearer);
  }

  /* ---- public methods ---- */

  /**
   * Calls `listener` for each event of this type, until the returned function is
   * called. An exception in a listener is reported as an uncaught error.
   * @template {keyof ChatEvents} Type
   * @param {Type} type
   * @param {(event: ChatEvents[Type]) => void} listener
   * @returns {() => void}
   */
  on(type, listener) {
    const listeners = this.#listeners.get(type) ?? new Set();
    this.#listeners.set(type, listeners.add(listener));
    return () => listeners.delete(listener);
  }

  /**
   * Connects, until disconnect is called; "state" events report the progress. A second
   * call reconnects with the new token.
   * @param {TokenSource} [token] a JWT, or a function that fetches one for each
   *   connection. If it throws an error whose `status` is 401, the client stops
   *   (`signed_out`). If it returns tickets (GET /api/v2/ws-token), which cannot poll,
   *   also pass `bearer` to the constructor. Default: the client fetches tickets.
   */
  connect(token) {
    if (token === undefined && this.#bearer === undefined) {
      throw new TypeError("connect: pass a token, or pass `bearer` to the constructor");
    }
    this.#stop();
    this.#token = token;
    this.#fetchedToken = undefined;
    this.#tokenInDoubt = false;
    if (!this.#learnUserFrom(token)) return;
    this.#start();
  }

  /** Closes the connection until the next connect. Unsent messages are kept. */
  disconnect() {
    this.#end("closed");
  }

  /** Like disconnect, and discards the user's unsent messages: for signing out. */
  forget() {
    this.disconnect();
    for (const entry of this.#unsent.entries) this.#discard(entry);
  }

  /** Tries to open the socket now, if an attempt is scheduled, or in `too_many`. */
  retry() {
    if (this.#ended === "too_many") {
      this.#start();
    } else if (this.#retryTimer) {
      void this.#open();
    }
  }

  /** @returns {State} */
  get state() {
    return this.#state();
  }

  /** Seconds until the next attempt to open a socket; null: none is scheduled. */
  get retryIn() {
    return this.#retryAt === null ? null : Math.max(0, (this.#retryAt - now()) / 1000);
  }

  /** The user's id; undefined until it is known. */
  get userId() {
    return this.#userId;
  }

  /**
   * Sends a message now, or as soon as possible, even after a reload. "delivery" events
   * report its state.
   * @param {number} chatId
   * @param {string} content
   * @returns {string} its client_id
   */
  send(chatId, content) {
    return this.#enqueue({ chat_id: chatId, content: validText(content) });
  }

  /**
   * Edits a message like send. Replaces edits of it that failed or were never tried.
   * @param {number} messageId
   * @param {string} content
   * @param {{ifRev?: number}} [options] the `rev`, or else the `id`, of the message
   *   that the user has edited: if it was changed since, the edit fails ("changed")
   * @returns {string} its client_id
   */
  editMessage(messageId, content, { ifRev } = {}) {
    this.#dropChanges(
      messageId,
      ({ kind, tried, place }) => kind === "edit" && (!tried || place === "failed"),
    );
    const edit = { message_id: messageId, content: validText(content), if_rev: ifRev };
    return this.#enqueue({ kind: "edit", ...edit });
  }

  /**
   * Deletes a message like send. Drops its edits that wait, and changes that failed.
   * @param {number} messageId
   * @returns {string} its client_id
   */
  deleteMessage(messageId) {
    this.#dropChanges(
      messageId,
      ({ kind, place }) => kind === "edit" || place === "failed",
    );
    const deletion = this.#unsent.entries.find(
      ({ kind, message_id }) => kind === "delete" && message_id === messageId,
    );
    if (deletion) return deletion.client_id;
    return this.#enqueue({ kind: "delete", message_id: messageId });
  }

  /**
   * The unsent messages of a chat, oldest first.
   * @param {number} chatId
   * @returns {Delivery[]}
   */
  unsent(chatId) {
    return this.#pending((entry) => entry.chat_id === chatId);
  }

  /** The edits and deletions that wait or have failed, oldest first. */
  unsentChanges() {
    return this.#pending((entry) => entry.kind !== "message");
  }

  /** Sends again what has failed. @param {string} clientId */
  resend(clientId) {
    const entry = this.#unsent.find(clientId);
    if (entry?.place !== "failed") return;
    this.#unsent.update(entry, { place: "waiting", code: undefined, reason: undefined });
    this.#reportDelivery(entry);
    this.#sendUnsent();
  }

  /** Drops what has failed. @param {string} clientId */
  discard(clientId) {
    const entry = this.#unsent.find(clientId);
    if (entry?.place === "failed") this.#discard(entry);
  }

  /**
   * Shows the other members that the user is typing. Call it at each key; the typing
   * sign ends by itself 5 s after the last call.
   * @param {number} chatId
   * @param {boolean} isTyping
   */
  sendTyping(chatId, isTyping) {
    const before = this.#typing.get(chatId);
    clearTimeout(before?.timer);
    if (!isTyping) {
      if (this.#typing.delete(chatId)) this.#sendTypingCommand(chatId, false);
      return;
    }
    const due = !before || elapsed(before.sentAt) >= TYPING_REPEAT_SECONDS;
    if (due) this.#sendTypingCommand(chatId, true);
    this.#typing.set(chatId, {
      sentAt: due ? now() : before.sentAt,
      timer: after(TYPING_STOP_SECONDS, () => this.sendTyping(chatId, false)),
    });
  }

  /**
   * Marks a chat as read up to this message. The mark is sent at most once a second for
   * each chat, and again until the server answers.
   * @param {number} chatId
   * @param {number} messageId
   */
  markRead(chatId, messageId) {
    const mark = this.#marks.get(chatId) ?? {
      wanted: 0,
      settled: 0,
      sentAt: -Infinity,
      timer: 0,
    };
    if (messageId <= mark.wanted) return;
    mark.wanted = messageId;
    this.#marks.set(chatId, mark);
    this.#sendMark(chatId);
  }

  /**
   * Fetches all chats of the user. Events wait meanwhile: "chats" comes first, then the
   * events after it. Call it before connect if you passed `bearer`, otherwise at the
   * first "connected"; and call it at each "resync".
   * @returns {Promise<Snapshot>}
   * @throws {ChatError} the events that waited are delivered anyway; try again
   */
  fetchChats() {
    this.#held ??= [];
    this.#fetching ??= this.#fetchChats();
    return this.#fetching;
  }

  /**
   * Fetches messages, oldest first: the newest, or those before, after or around an id.
   * @param {number} chatId
   * @param {{before?: number | null, after?: number, around?: number,
   *   limit?: number}} [where]
   * @returns {Promise<History>}
   */
  history(chatId, where) {
    return this.request("GET", `/api/v1/chats/${chatId}/messages${query(where)}`);
  }

  /**
   * Searches messages for all words of `q`, newest first. Any page may be empty: go on
   * with its `before` until that is null.
   * @param {{q: string, chatId?: number, before?: number | null}} what
   * @param {AbortSignal} [signal] ends the request
   * @returns {Promise<{messages: Message[], before: number | null}>}
   */
  search({ q, chatId, before }, signal) {
    const text = query({ q, chat_id: chatId, before });
    return this.request("GET", `/api/v1/search${text}`, undefined, signal);
  }

  /**
   * Fetches a page of the list of chats. (fetchChats fetches all, in step with events.)
   * @param {{limit?: number, before?: string | number}} [page] `before`: a `position`
   * @returns {Promise<ChatPage>}
   */
  chats(page) {
    return this.request("GET", `/api/v1/chats${query(page)}`);
  }

  /** @param {number} chatId @returns {Promise<Chat>} members have `online` */
  async chat(chatId) {
    return (await this.request("GET", `/api/v1/chats/${chatId}`)).chat;
  }

  /**
   * Fetches members of a chat: those with these ids (at most 100), or a page.
   * @param {number} chatId
   * @param {{ids?: number[], after?: number, limit?: number}} [which] `after`: an id
   * @returns {Promise<{members: Member[], more: boolean}>}
   */
  members(chatId, { ids, ...page } = {}) {
    const text = query({ ids: ids?.join(","), ...page });
    return this.request("GET", `/api/v1/chats/${chatId}/members${text}`);
  }

  /**
   * Creates a chat. With `direct` or the same `clientId` it may be there already.
   * @param {{title?: string | null, memberIds: number[], direct?: boolean,
   *   clientId?: string}} chat
   * @returns {Promise<Chat>}
   */
  async createChat({ title, memberIds, direct, clientId }) {
    const body = { title, member_ids: memberIds, direct, client_id: clientId };
    return (await this.request("POST", "/api/v1/chats", body)).chat;
  }

  /** @param {number} chatId @param {string | null} title @returns {Promise<any>} */
  renameChat(chatId, title) {
    return this.request("PATCH", `/api/v1/chats/${chatId}`, { title });
  }

  /**
   * Makes an invitation, for a link to `/#invite=TOKEN`.
   * @param {number} chatId
   * @param {{ttlSeconds?: number}} [options] default: 7 days
   * @returns {Promise<Token>}
   */
  createInvite(chatId, { ttlSeconds } = {}) {
    const body = { ttl_seconds: ttlSeconds };
    return this.request("POST", `/api/v1/chats/${chatId}/invites`, body);
  }

  /** Revokes a chat's invitations. @param {number} chatId @returns {Promise<any>} */
  revokeInvites(chatId) {
    return this.request("DELETE", `/api/v1/chats/${chatId}/invites`);
  }

  /**
   * Tells what an invitation is for, also before anyone has signed in.
   * @param {string} token
   * @returns {Promise<{title: string | null, member_count: number}>}
   */
  previewInvite(token) {
    return this.#fetch("POST", "/api/v1/join", null, { token });
  }

  /**
   * Accepts an invitation as a new user. The answer's token is a session token.
   * @param {string} token @param {string} name
   * @returns {Promise<Token & {user_id: number, name: string, chat_id: number}>}
   */
  joinAsNewUser(token, name) {
    return this.#fetch("POST", "/api/v1/join", null, { token, name });
  }

  /**
   * Accepts an invitation as the signed-in user.
   * @param {string} token @returns {Promise<{chat_id: number}>}
   */
  join(token) {
    return this.request("POST", "/api/v1/join", { token });
  }

  /** Renames the user. @param {string} name @returns {Promise<any>} */
  renameMe(name) {
    return this.request("PATCH", "/api/v1/me", { name });
  }

  /**
   * Makes a sign-in token for a second device, for a link to `/#token=TOKEN`.
   * @returns {Promise<Token>}
   */
  linkDevice() {
    return this.request("POST", "/api/v1/me/link");
  }

  /**
   * Sends one HTTP request to chatd, with the token. Where a message in the answer is
   * older than what is known, it is replaced by its newest state.
   * @param {string} method
   * @param {string} path e.g. "/api/v1/chats"
   * @param {object} [body] sent as JSON
   * @param {AbortSignal} [signal]
   * @returns {Promise<any>} the answer's JSON; null for 204
   * @throws {ChatError}
   */
  async request(method, path, body, signal) {
    for (let tries = 1; ; tries++) {
      const gaps = this.#gaps;
      const { epoch } = this.#cursor;
      this.#newest.requestBegins();
      try {
        const answer = await this.#request(method, path, body, signal);
        // What happened in a gap may be missing in the answer.
        const old = gaps !== this.#gaps && method === "GET" && answer.messages;
        if (old && tries < 5) continue;
        if (epoch === this.#cursor.epoch) this.#newest.putInto(answer);
        return answer;
      } finally {
        this.#newest.requestEnds(this.#cursor.seq);
      }
    }
  }

  /** @param {Partial<Unsent>} fields @returns {string} its client_id */
  #enqueue(fields) {
    const entry = this.#unsent.add({ epoch: this.#cursor.epoch, ...fields });
    this.#reportDelivery(entry);
    this.#sendUnsent();
    return entry.client_id;
  }

  /**
   * Drops changes of a message that are not on their way.
   * @param {number} messageId @param {(change: Unsent) => boolean} which
   */
  #dropChanges(messageId, which) {
    for (const entry of [...this.#unsent.at("waiting"), ...this.#unsent.at("failed")])
      if (entry.message_id === messageId && which(entry)) this.#discard(entry);
  }

  /** @param {(entry: Unsent) => boolean} which @returns {Delivery[]} */
  #pending(which) {
    return this.#unsent.entries.filter(which).map((entry) => delivery(entry));
  }

  /* ---- connecting ---- */

  #start() {
    this.#ended = null;
    this.#failures = 0;
    this.#listenToBrowser(true);
    this.#adoptTimer = every(ADOPT_SECONDS, () => this.#adopt());
    this.#schedulePolling();
    void this.#open();
  }

  /** Fetches a token and opens a socket. Then #receive or #connectionLost is called. */
  async #open() {
    const attempt = ++this.#attempt;
    clearTimeout(this.#retryTimer);
    this.#retryTimer = 0;
    this.#retryAt = null;
    this.#attemptAt = now();
    this.#reportState();
    this.#connectTimer = after(CONNECT_SECONDS, () => this.#connectionLost(1006));
    try {
      const token = await this.#socketToken();
      if (attempt === this.#attempt) this.#socket = this.#newSocket(token);
    } catch (error) {
      if (attempt !== this.#attempt) return;
      if (isSignedOut(error)) this.#end("signed_out");
      else this.#connectionLost(0, retryAfter(error));
    }
  }

  /** @param {string} token @returns {WebSocket} */
  #newSocket(token) {
    const url = new URL("ws/chat", this.#base);
    url.protocol = url.protocol.replace("http", "ws");
    url.search = query({ token, cursor: this.#cursorText() });
    const socket = new WebSocket(url);
    socket.onopen = () => this.#log?.log("[WebSocket] Connected");
    socket.onmessage = ({ data }) => this.#receive(data);
    socket.onclose = ({ code }) => {
      this.#log?.log(`[WebSocket] Closed ${code}`);
      this.#connectionLost(code);
    };
    return socket;
  }

  /** @returns {Promise<string>} */
  async #socketToken() {
    if (!this.#token) return (await this.request("GET", "/api/v2/ws-token")).token;
    if (typeof this.#token === "string") {
      // A browser does not say why a handshake was refused: perhaps because of this
      // token. Then this request ends the connection.
      if (this.#tokenInDoubt) await this.request("GET", "/api/v1/me").catch(() => {});
      return this.#token;
    }
    const token = await this.#token();
    if (typeof token !== "string")
      throw new TypeError("connect: the token function did not return a string");
    if (this.#bearer === undefined) this.#fetchedToken = token;
    this.#learnUserFrom(token);
    return token;
  }

  /**
   * The socket has closed, or could not be opened. Decides whether and when to
   * reconnect.
   * @param {number} code the close code; 0: no token could be fetched
   * @param {number} [retryAfterSeconds] the wait that the server asked for
   */
  #connectionLost(code, retryAfterSeconds) {
    const steady = this.#ready && elapsed(this.#connectedAt) >= STEADY_SECONDS;
    const wait = this.#byeSeconds ?? retryAfterSeconds;
    if (code === 1009) this.#frameTooLarge();
    this.#dropSocket(1000);
    if (steady) this.#failures = 0;
    if (code >= STAY_AWAY_FROM && code < 5000) {
      this.#end(STAY_AWAY[code] ?? "refused");
      return;
    }
    this.#tokenInDoubt = code === 1006 || code === 4401;
    this.#schedulePolling();
    this.#retryIn(wait ?? this.#backoff());
  }

  /** Full jitter: a random part of a bound that doubles. @returns {number} seconds */
  #backoff() {
    if (this.#polling) return Math.max(0, RETRY_SECONDS - elapsed(this.#attemptAt));
    const bound = Math.min(RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** this.#failures);
    this.#failures += 1;
    return Math.random() * bound;
  }

  /** @param {number} seconds */
  #retryIn(seconds) {
    clearTimeout(this.#retryTimer);
    this.#retryAt = now() + seconds * 1000;
    this.#retryTimer = after(seconds, () => void this.#open());
    this.#reportState();
  }

  /** The network may be back, or have changed: tests the socket, or opens one now. */
  #probeOrRetry() {
    if (this.#ready) this.#ping(PROBE_SECONDS);
    else if (elapsed(this.#attemptAt) >= 1) this.retry();
  }

  /**
   * Closes the socket, in any state, and ignores what still arrives on it.
   * @param {number} code the close code
   */
  #dropSocket(code) {
    this.#attempt += 1;
    clearTimeout(this.#connectTimer);
    clearInterval(this.#watchTimer);
    const socket = this.#socket;
    this.#socket = null;
    this.#ready = false;
    this.#byeSeconds = null;
    this.#pongBy = 0;
    this.#unsent.requeue("socket");
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close(code);
  }

  /** Ends the socket, the polls and the timers. */
  #stop() {
    this.#dropSocket(1000);
    this.#stopPolling();
    clearTimeout(this.#retryTimer);
    clearTimeout(this.#sendTimer);
    clearInterval(this.#adoptTimer);
    for (const { timer } of this.#typing.values()) clearTimeout(timer);
    for (const mark of this.#marks.values()) {
      clearTimeout(mark.timer);
      mark.timer = 0;
    }
    this.#typing.clear();
    this.#retryTimer = this.#sendTimer = 0;
    this.#retryAt = null;
  }

  /** @param {State} state */
  #end(state) {
    this.#stop();
    this.#ended = state;
    if (state !== "too_many") this.#listenToBrowser(false);
    this.#reportState();
  }

  /* ---- receiving ---- */

  /** @param {any} data */
  #receive(data) {
    const frame = parseObject(data);
    if (!frame) return; // not from chatd; perhaps from a proxy
    this.#log?.log("WebSocket message:", frame);
    this.#receivedAt = now();
    this.#pongBy = 0;
    if (frame.type === "connected") this.#handleConnected(frame);
    else if (typeof frame.seq === "number") this.#acceptEvent(frame);
    else this.#handleTransient(frame);
  }

  /** @param {any} frame one without a seq: it is not in the event log */
  #handleTransient(frame) {
    switch (frame.type) {
      case "ack":
        this.#handleAck(frame);
        break;
      case "error":
        this.#handleError(frame);
        break;
      case "token_expiring":
        void this.#renewToken();
        break;
      case "bye":
        this.#byeSeconds = frame.retry_after;
        break;
    }
    this.#emit(frame.type, frame);
  }

  /** @param {Connected} frame */
  #handleConnected(frame) {
    if (!this.#acceptUser(frame.user_id)) return;
    clearTimeout(this.#connectTimer);
    this.#stopPolling();
    this.#ready = true;
    this.#sendNotBefore = 0;
    this.#connectedAt = now();
    this.#watchedAt = Date.now();
    clearInterval(this.#watchTimer);
    this.#watchTimer = every(WATCH_SECONDS, () => this.#watch());
    // "fresh" means that the socket was opened without a cursor. If there is a cursor
    // now, a poll brought it meanwhile, and the events between the two are missing.
    const hasCursor = this.#cursor.seq >= 0;
    const fresh = frame.resume === "fresh";
    const resync = frame.resume === "resync" || (fresh && hasCursor);
    if (fresh || resync) this.#restartAt(frame.cursor);
    else this.#moveCursor(frame.cursor);
    this.#reportState();
    this.#emit("connected", frame);
    if (resync) this.#emit("resync", {});
    for (const chatId of this.#marks.keys()) this.#sendMark(chatId);
    this.#sendUnsent();
  }

  /**
   * Reads the user's id from the token, so that a message written before the server
   * answers is stored for the right user.
   * @param {TokenSource | undefined} token
   * @returns {boolean} false: it is the token of another user than before
   */
  #learnUserFrom(token) {
    const userId = typeof token === "string" ? userIdOf(token) : undefined;
    return userId === undefined || this.#acceptUser(userId);
  }

  /**
   * Sets the user's id, or compares it with the known one. Another user than before
   * ends the connection, because chats and unsent messages belong to one user.
   * @param {number} userId
   * @returns {boolean} false: it is another user than before
   */
  #acceptUser(userId) {
    if (this.#userId !== undefined && this.#userId !== userId) {
      this.#end("signed_out");
      return false;
    }
    if (this.#userId === undefined) {
      this.#userId = userId;
      this.#unsent.open(`chatd.unsent.${this.#base.host}.${userId}.`);
      for (const entry of this.#unsent.entries) this.#reportDelivery(entry);
    }
    return true;
  }

  /**
   * Delivers an event from the socket or a poll, unless the cursor has passed it.
   * @param {LoggedEvent} event
   */
  #acceptEvent(event) {
    if (event.seq <= this.#cursor.seq) return;
    this.#cursor.seq = event.seq;
    this.#newest.putInto(event);
    if (event.type === "new_message") this.#messageStored(event.message);
    if (this.#held) this.#held.push(event);
    else this.#deliver(event);
  }

  /** @param {LoggedEvent} event */
  #deliver(event) {
    // The list of chats does not have the changes of older messages.
    const change = event.type === "message_edited" || event.type === "message_deleted";
    if (!change && event.seq <= this.#listedUpTo) return;
    this.#newest.putInto(event);
    this.#emit(event.type, event);
    this.#newest.prune(this.#cursor.seq);
  }

  /**
   * Moves the cursor, but never back within an epoch: a poll may have been ahead of the
   * socket.
   * @param {string} text
   */
  #moveCursor(text) {
    const cursor = parseCursor(text);
    const sameEpoch = cursor.epoch === this.#cursor.epoch;
    if (!sameEpoch) this.#restartAt(text);
    else if (cursor.seq > this.#cursor.seq) this.#cursor = cursor;
  }

  /** Continues at another cursor and skips the events between. @param {string} text */
  #restartAt(text) {
    const { epoch } = this.#cursor;
    this.#cursor = parseCursor(text);
    this.#gaps += 1;
    this.#listedUpTo = -1;
    this.#gaplessFrom = this.#cursor.seq;
    if (this.#held) this.#held = [];
    if (epoch !== this.#cursor.epoch) this.#handleNewEpoch(!epoch);
  }

  /**
   * A backup was restored, unless this is the first epoch that the client knows. Ids may
   * be those of other messages now.
   * @param {boolean} first
   */
  #handleNewEpoch(first) {
    if (!first) {
      this.#newest.forget();
      this.#marks.clear();
    }
    // Not when an entry is adopted later: its tab may have known a newer epoch than this.
    for (const entry of this.#unsent.at("waiting"))
      if (entry.kind !== "message" && entry.epoch && entry.epoch !== this.#cursor.epoch)
        this.#messageRefused(entry, "not_found", "A backup was restored since.");
  }

  #cursorText() {
    const { epoch, seq } = this.#cursor;
    return seq < 0 ? null : `${epoch}.${seq}`;
  }

  /** @returns {Promise<Snapshot>} */
  async #fetchChats() {
    this.#newest.requestBegins();
    try {
      const snapshot = await this.#freshSnapshot();
      const { epoch, seq } = parseCursor(snapshot.cursor);
      const known = this.#cursor;
      if (epoch === known.epoch) {
        this.#listedUpTo = seq;
      } else {
        this.#restartAt(snapshot.cursor);
        // After a restore, this list may be the first to tell of it.
        if (known.seq >= 0) this.#emit("resync", {});
      }
      this.#emit("chats", snapshot);
      return snapshot;
    } finally {
      const held = this.#held ?? [];
      this.#held = this.#fetching = null; // a listener may call fetchChats again
      for (const event of held) this.#deliver(event);
      this.#newest.requestEnds(this.#cursor.seq);
    }
  }

  /**
   * Fetches the list of chats until it is new enough. A list from before #gaplessFrom
   * would leave a gap. A list of another epoch is older than the cursor if the cursor's
   * epoch has changed since the request began.
   * @returns {Promise<Snapshot>}
   */
  async #freshSnapshot() {
    for (let tries = 0; tries < 5; tries++) {
      const before = this.#cursor.epoch;
      const snapshot = await this.#allChats();
      const { epoch, seq } = parseCursor(snapshot.cursor);
      const known = this.#cursor.epoch;
      if (epoch === known ? seq >= this.#gaplessFrom : before === known)
        return snapshot;
    }
    throw unreachable("The server's list of chats is out of date.");
  }

  /**
   * Fetches all chats. One that becomes active meanwhile moves to the first page, so
   * that page is fetched again until it has no new chat.
   * @returns {Promise<Snapshot>}
   */
  async #allChats() {
    /** @type {Map<number, Chat>} */
    const chats = new Map();
    const fetchPage = async (/** @type {{before?: any}} */ where) => {
      const page = await this.chats({ limit: CHATS_PER_PAGE, ...where });
      for (const chat of page.chats) chats.set(chat.id, chat);
      return page;
    };
    const first = await fetchPage({});
    for (let page = first; page.more; )
      page = await fetchPage({ before: page.position });
    for (let known = 0; first.more && known < chats.size; await fetchPage({}))
      known = chats.size;
    return { chats: [...chats.values()], cursor: first.cursor };
  }

  /* ---- keeping alive ---- */

  /** Runs every 2 s while connected. A late run means that the computer has slept. */
  #watch() {
    const slept = Date.now() - this.#watchedAt > SILENCE_SECONDS * 1000;
    this.#watchedAt = Date.now();
    const oldest = this.#unsent.at("socket")[0];
    const unanswered = oldest && elapsed(oldest.sentAt) > ANSWER_SECONDS;
    const dead = this.#pongBy > 0 && now() > this.#pongBy;
    if (dead || unanswered) {
      this.#log?.log("[WebSocket] No answer from the server, closing");
      this.#connectionLost(1006);
    } else if (slept) {
      this.#ping(PROBE_SECONDS);
    } else if (elapsed(this.#receivedAt) > SILENCE_SECONDS) {
      this.#ping(PONG_SECONDS);
    }
  }

  /** @param {number} seconds for the answer */
  #ping(seconds) {
    const by = now() + seconds * 1000;
    if (this.#pongBy && this.#pongBy <= by) return;
    this.#pongBy = by;
    this.#sendCommand({ type: "ping" });
  }

  /** @param {boolean} on */
  #listenToBrowser(on) {
    const change = on ? "addEventListener" : "removeEventListener";
    const page = globalThis.document;
    globalThis[change]?.("online", this.#onNetwork);
    globalThis[change]?.("offline", this.#onNetwork);
    globalThis[change]?.("focus", this.#onVisible);
    globalThis[change]?.("storage", this.#onStorage);
    page?.[change]("visibilitychange", this.#onVisible);
  }

  #onNetwork = () => {
    if (this.#ended) return;
    if (globalThis.navigator?.onLine === false && !this.#ready) this.#reportState();
    else this.#probeOrRetry();
  };

  #onStorage = (/** @type {any} */ { key, newValue }) => {
    const entry = this.#unsent.discardedElsewhere(key, newValue);
    if (!entry) return;
    this.#reportDelivery(entry, "discarded");
    this.#sendUnsent(); // the discarded entry may have been on its way
  };

  #onVisible = () => {
    if (globalThis.document?.visibilityState !== "hidden") this.#probeOrRetry();
  };

  /** Sends a newer token before this one ends. The answer needs no action. */
  async #renewToken() {
    if (typeof this.#token === "string") return; // there is no newer one; 4401 follows
    const attempt = this.#attempt;
    const wait = RENEW_SECONDS - elapsed(this.#renewedAt);
    if (wait > 0) await new Promise((resolve) => after(wait, () => resolve(0)));
    if (attempt !== this.#attempt) return;
    this.#renewedAt = now();
    try {
      const token = await this.#socketToken();
      if (attempt === this.#attempt)
        this.#sendCommand({ type: "auth", token, ref: "auth" });
    } catch {
      // The socket stays open until the token ends. Then 4401 closes it, and the client
      // reconnects.
    }
  }

  /* ---- polling ---- */

  /** Starts to poll in 5 s, unless that is scheduled already. */
  #schedulePolling() {
    this.#pollTimer ||= after(FALLBACK_SECONDS, () => {
      this.#log?.log(`[WebSocket] Not connected, polling every ${POLL_SECONDS} s`);
      this.#polling = true;
      this.#reachable = true;
      this.#reportState();
      void this.#pollOnce();
    });
  }

  /**
   * Fetches events and delivers them. Runs again in 5 s, or at once if there are more.
   */
  async #pollOnce() {
    const { signal } = this.#fallback;
    let wait = POLL_SECONDS;
    try {
      const cursor = this.#cursorText();
      const path = `/api/v1/events${query({ limit: 500, cursor })}`;
      const answer = await this.request("GET", path, undefined, signal);
      if (signal.aborted) return;
      if (answer.more) wait = 0;
      this.#handlePoll(answer, cursor === null);
    } catch (error) {
      if (signal.aborted) return;
      wait = Math.max(wait, retryAfter(error) ?? 0);
      this.#setReachable(false);
    }
    if (signal.aborted) return;
    this.#pollTimer = after(wait, () => void this.#pollOnce());
  }

  /**
   * @param {{events: LoggedEvent[], cursor: string, more: boolean, resync: boolean}}
   *   answer
   * @param {boolean} withoutCursor the request had no cursor
   */
  #handlePoll(answer, withoutCursor) {
    const { signal } = this.#fallback;
    for (const event of answer.events) {
      if (signal.aborted) return; // a listener has called disconnect
      this.#acceptEvent(event);
    }
    if (answer.resync || (withoutCursor && this.#cursor.seq < 0))
      this.#restartAt(answer.cursor);
    else if (!withoutCursor) this.#moveCursor(answer.cursor);
    if (answer.resync) this.#emit("resync", {});
    this.#setReachable(true);
    for (const chatId of this.#marks.keys()) this.#sendMark(chatId);
    this.#sendUnsent();
  }

  /**
   * Once the server answers again, the client tries to open a socket at once.
   * @param {boolean} reachable
   */
  #setReachable(reachable) {
    const back = reachable && !this.#reachable;
    this.#reachable = reachable;
    this.#reportState();
    if (back) this.#probeOrRetry();
  }

  #stopPolling() {
    clearTimeout(this.#pollTimer);
    this.#fallback.abort();
    this.#fallback = new AbortController();
    this.#pollTimer = 0;
    this.#polling = false;
    this.#unsent.requeue("http");
  }

  /* ---- sending ---- */

  /**
   * Sends the oldest unsent entry. The next one waits for the answer, or else the server
   * could refuse the first with `rate_limited` and store the second before it.
   */
  #sendUnsent() {
    if (this.#ended) return;
    const [next] = this.#unsent.at("waiting");
    if (!next || this.#unsent.at("socket").length || this.#unsent.at("http").length)
      return;
    if (this.#unsent.isGone(next)) {
      this.#discard(next);
      this.#sendUnsent();
      return;
    }
    const wait = (this.#sendNotBefore - now()) / 1000;
    clearTimeout(this.#sendTimer);
    if (wait > 0) this.#sendTimer = after(wait, () => this.#sendUnsent());
    else if (this.#ready) this.#sendBySocket(next);
    else if (this.#polling) void this.#sendByHttp(next);
  }

  /** @param {Unsent} entry */
  #sendBySocket(entry) {
    Object.assign(entry, { place: "socket", sentAt: now(), tried: true });
    this.#sendCommand(commandFor(entry));
  }

  /** @param {Unsent} entry */
  async #sendByHttp(entry) {
    const { client_id } = entry;
    const { signal } = this.#fallback;
    Object.assign(entry, { place: "http", tried: true });
    const [method, path, body] = requestFor(entry);
    try {
      const answer = await this.request(method, path, body, signal);
      if (entry.kind !== "message") {
        const { message } = answer ?? {};
        return this.#changeStored(entry, message?.rev ?? message?.id, message);
      }
      this.#acceptUser(answer.message.sender_id);
      this.#messageStored({ ...answer.message, client_id });
    } catch (error) {
      if (signal.aborted) return; // the socket is back and sends the message
      // Or else no token could be fetched.
      const known = error instanceof ChatError ? error : unreachable();
      const { status, code, message, retryAfter } = known;
      this.#messageRefused(entry, code, message, status ? retryAfter : POLL_SECONDS);
      this.#sendUnsent();
    }
  }

  /** @param {string} [ref] `read CHAT MESSAGE`, or that of another command */
  #markOf(ref = "") {
    const [kind, chatId, messageId] = ref.split(" ");
    const mark = kind === "read" ? this.#marks.get(Number(chatId)) : undefined;
    return { mark, chatId: Number(chatId), messageId: Number(messageId) };
  }

  /** @param {Ack} ack */
  #handleAck(ack) {
    const { mark, messageId } = this.#markOf(ack.ref);
    if (mark) mark.settled = Math.max(mark.settled, messageId);
    const entry = this.#unsent.find(ack.client_id ?? ack.ref);
    if (!entry || ack.message_id === undefined) return;
    if (entry.kind !== "message") return this.#changeStored(entry, ack.rev);
    const { chat_id, content, client_id } = entry;
    const { message_id: id, created_at = "", n = 0 } = ack;
    const sender_id = this.#userId ?? 0;
    const message = { id, chat_id, sender_id, content, created_at, n, client_id };
    this.#messageStored(message, ack.duplicate);
  }

  /** @param {Refusal} refusal */
  #handleError({ ref, client_id, code, message, retry_after }) {
    const { mark, chatId, messageId } = this.#markOf(ref);
    if (mark && FINAL_REFUSALS.has(code)) mark.settled = messageId;
    else if (mark) after(retry_after ?? REFUSED_SECONDS, () => this.#sendMark(chatId));
    const entry = this.#unsent.find(client_id ?? ref); // chatd 1.0 repeats only `ref`
    if (entry?.place !== "socket") return;
    this.#messageRefused(entry, code, message, retry_after);
    this.#sendUnsent();
  }

  /**
   * The server has stored the message. The ack, the 201 and the event all say so; the
   * first to arrive counts.
   * @param {Message} message @param {boolean} [mayHaveChanged]
   */
  #messageStored(message, mayHaveChanged) {
    const entry = this.#unsent.find(message.client_id);
    if (!entry || message.sender_id !== this.#userId) return;
    this.#unsent.remove(entry);
    const stored = !mayHaveChanged && { message: this.#newest.of(message) };
    this.#emit("delivery", { ...delivery(entry, "sent"), ...stored });
    this.#sendUnsent();
  }

  /**
   * The server has stored an edit or a deletion.
   * @param {Unsent} entry @param {number | undefined} rev @param {Message} [message]
   */
  #changeStored(entry, rev, message) {
    if (!this.#unsent.entries.includes(entry)) return;
    this.#unsent.remove(entry, rev);
    this.#emit("delivery", { ...delivery(entry, "sent"), ...(message && { message }) });
    this.#sendUnsent();
  }

  /**
   * The entry was not stored. It has failed, or it is sent again after a wait.
   * @param {Unsent} entry
   * @param {string} code
   * @param {string} reason
   * @param {number} [seconds] the wait that the server asked for
   */
  #messageRefused(entry, code, reason, seconds) {
    if (!this.#unsent.entries.includes(entry)) return; // another tab has dropped it
    if (FINAL_REFUSALS.has(code)) {
      this.#unsent.update(entry, { place: "failed", code, reason });
      this.#reportDelivery(entry);
      return;
    }
    entry.place = "waiting";
    this.#sendNotBefore = now() + (seconds ?? REFUSED_SECONDS) * 1000;
  }

  /**
   * The server refused a frame as too large (1009): the message must not be repeated.
   */
  #frameTooLarge() {
    const [entry] = this.#unsent.at("socket");
    if (entry) this.#messageRefused(entry, "too_large", "The message is too long.");
  }

  /** Sends the messages that closed tabs have left. */
  #adopt() {
    for (const entry of this.#unsent.adopt()) this.#reportDelivery(entry);
    this.#sendUnsent();
  }

  /** @param {Unsent} entry */
  #discard(entry) {
    this.#unsent.discard(entry);
    this.#reportDelivery(entry, "discarded");
  }

  /** @param {number} chatId */
  #sendMark(chatId) {
    const mark = this.#marks.get(chatId);
    if (!mark || mark.settled >= mark.wanted || mark.timer || this.#ended) return;
    const wait = MARK_SECONDS - elapsed(mark.sentAt);
    if (wait > 0) {
      mark.timer = after(wait, () => {
        mark.timer = 0;
        this.#sendMark(chatId);
      });
      return;
    }
    const message_id = mark.wanted;
    mark.sentAt = now();
    if (this.#ready) {
      this.#sendCommand({
        type: "mark_read",
        message_id,
        ref: `read ${chatId} ${message_id}`,
      });
    } else if (this.#polling) {
      this.request("POST", `/api/v1/messages/${message_id}/read`).then(
        () => {
          mark.settled = Math.max(mark.settled, message_id);
        },
        (error) => {
          if (FINAL_REFUSALS.has(error.code)) mark.settled = message_id;
          // after any other error, the next poll or connection sends it again
        },
      );
    }
  }

  /** @param {number} chat_id @param {boolean} is_typing */
  #sendTypingCommand(chat_id, is_typing) {
    if (this.#ready) this.#sendCommand({ type: "typing", chat_id, is_typing });
  }

  /** @param {object} command */
  #sendCommand(command) {
    if (this.#socket?.readyState === 1) this.#socket.send(JSON.stringify(command));
  }

  /* ---- HTTP ---- */

  /**
   * After a 401, repeats the request once with a new token: a function fetches it, or
   * connect was called with it meanwhile. Without one, the user has to sign in again.
   * (The token function of connect may return tickets, which HTTP refuses.)
   * @param {string} method @param {string} path @param {object} [body]
   * @param {AbortSignal} [signal] @returns {Promise<any>}
   */
  async #request(method, path, body, signal) {
    // There, a 401 may be about the invitation. So another request tries the token.
    const joins = path === "/api/v1/join";
    if (joins) await this.#request("GET", "/api/v1/me", undefined, signal);
    const token = await this.#httpToken(false);
    try {
      return await this.#fetch(method, path, token, body, signal);
    } catch (refusal) {
      if (joins || !isSignedOut(refusal)) throw refusal;
      try {
        const newer = await this.#httpToken(true);
        if (newer === token) throw refusal;
        return await this.#fetch(method, path, newer, body, signal);
      } catch (error) {
        const mayBeTicket = !this.#bearer && typeof this.#token === "function";
        if (!mayBeTicket && isSignedOut(error)) this.#end("signed_out");
        throw error;
      }
    }
  }

  /**
   * @param {boolean} fresh fetch a new one
   * @returns {Promise<string>}
   */
  async #httpToken(fresh) {
    const source = this.#bearer ?? this.#token;
    if (source === undefined)
      throw new TypeError("request: call connect with a token first");
    if (typeof source === "string") return source;
    if (fresh || this.#fetchedToken === undefined) this.#fetchedToken = await source();
    return this.#fetchedToken;
  }

  /**
   * @param {string} method @param {string} path
   * @param {string | null} token null: none
   * @param {object} [body] @param {AbortSignal} [signal]
   */
  async #fetch(method, path, token, body, signal) {
    /** @type {Record<string, string>} */
    const headers = token === null ? {} : { Authorization: `Bearer ${token}` };
    if (body) headers["Content-Type"] = "application/json";
    const limit = new AbortController();
    const abort = () => limit.abort();
    const timer = after(REQUEST_SECONDS, abort);
    if (signal?.aborted) abort();
    signal?.addEventListener("abort", abort);
    try {
      return await readAnswer(
        await fetch(new URL(path.replace(/^\//, ""), this.#base), {
          method,
          headers,
          body: body ? JSON.stringify(body) : null,
          cache: "no-store",
          credentials: "omit",
          signal: limit.signal,
        }),
      );
    } catch (error) {
      if (error instanceof ChatError) throw error;
      throw unreachable();
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", abort);
    }
  }

  /* ---- reporting ---- */

  /** @returns {State} */
  #state() {
    if (this.#ended) return this.#ended;
    if (this.#ready) return "connected";
    const network = globalThis.navigator?.onLine !== false;
    if (this.#polling) return this.#reachable && network ? "polling" : "offline";
    return "connecting";
  }

  #reportState() {
    const state = this.#state();
    const text = `${state} ${this.#retryAt}`;
    if (text === this.#lastState) return;
    this.#lastState = text;
    this.#emit("state", { state, retryIn: this.retryIn });
  }

  /** @param {Unsent} entry @param {Delivery["state"]} [state] */
  #reportDelivery(entry, state) {
    this.#emit("delivery", delivery(entry, state));
  }

  /** @param {string} type @param {object} event */
  #emit(type, event) {
    for (const listener of this.#listeners.get(type) ?? []) {
      try {
        listener(event);
      } catch (error) {
        reportError(error);
      }
    }
  }
}

/* -------------------------------------------------------------------------------------
 * Small functions.
 * ---------------------------------------------------------------------------------- */

/**
 * @param {Unsent} entry @param {Delivery["state"]} [state] @returns {Delivery}
 */
function delivery(entry, state = entry.place === "failed" ? "failed" : "sending") {
  const { kind, client_id, chat_id, message_id, content, kept, code, reason } = entry;
  const failure = code && { code, reason: reason ?? "" };
  return { state, kind, client_id, chat_id, message_id, content, kept, ...failure };
}

/**
 * Half of a surrogate pair is not valid text: the server would refuse it.
 * @param {string} content
 */
function validText(content) {
  return String(content).replace(LONE_SURROGATE, "\ufffd");
}

/** @param {object} [parameters] those that are null or undefined are left out */
function query(parameters = {}) {
  const given = Object.entries(parameters).filter(([, value]) => value != null);
  return given.length ? `?${new URLSearchParams(given)}` : "";
}

/** @param {any} text JSON @returns {any} the object, or null */
function parseObject(text) {
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" ? value : null;
  } catch {
    return null;
  }
}

/**
 * Reads the user's id from a token, as chatd does. Only the server checks the token.
 * @param {string} token
 * @returns {number | undefined} undefined: the token has no readable id
 */
function userIdOf(token) {
  try {
    const part = (token.split(".")[1] ?? "").replace(/-/g, "+").replace(/_/g, "/");
    const { user_id, sub } = JSON.parse(atob(part));
    const userId = Number(user_id ?? sub);
    return Number.isSafeInteger(userId) && userId > 0 ? userId : undefined;
  } catch {
    return undefined;
  }
}

/** @param {Response} answer @returns {Promise<any>} */
async function readAnswer(answer) {
  if (answer.status === 204) return null;
  const body = await answer.json().catch(() => null);
  if (answer.ok && body) return body;
  const {
    // A proxy answers while chatd is away, or too slow for it: that is no refusal.
    code = /^4(?!08|29)/.test(String(answer.status)) ? "internal" : "upstream",
    message = `The chat server answered with HTTP status ${answer.status}.`,
    retry_after,
  } = body?.error ?? {};
  throw new ChatError(answer.status, code, message, retry_after);
}

/** @param {unknown} error */
function isSignedOut(error) {
  return Number(/** @type {{status?: number}} */ (error)?.status) === 401;
}

/** @param {unknown} error @returns {number | undefined} seconds */
function retryAfter(error) {
  return error instanceof ChatError ? error.retryAfter : undefined;
}

function unreachable(text = "The chat server does not answer.") {
  return new ChatError(0, "unreachable", text);
}

/** Milliseconds of a clock that never goes back, unlike Date.now(). */
function now() {
  return performance.now();
}

/** @param {number} since as now() @returns {number} seconds */
function elapsed(since) {
  return (now() - since) / 1000;
}

/** @param {number} seconds @param {() => void} task @returns {number} */
function after(seconds, task) {
  return Number(setTimeout(task, seconds * 1000));
}

/** @param {number} seconds @param {() => void} task @returns {number} */
function every(seconds, task) {
  return Number(setInterval(task, seconds * 1000));
}
