// @ts-check
/**
 * chat-websocket.js: a dependable connection to chatd, for any page.
 *
 *     import { ChatWebSocket } from "https://chat.example.com/web/chat-websocket.js";
 *
 *     const chat = new ChatWebSocket();
 *     chat.on("new_message", ({ message }) => show(message));
 *     chat.on("state", ({ state }) => console.log(state));
 *     chat.connect(token);                  // or: chat.connect(async () => newToken())
 *     chat.send(3, "Hello");                // kept, and sent again, until it is stored
 *
 * What it promises, and how:
 *
 * - Every event of your chats reaches your listeners once and in order, or "resync"
 *   tells you to fetch your chats again. It keeps the server's cursor, gives it back at
 *   each reconnect and each poll, and drops what is not ahead of it. So it does not
 *   matter which of the two brought an event.
 * - A message you send is stored once. It has a client_id, is kept in localStorage
 *   until the server's ack, and may be sent as often as needed: the server knows the
 *   client_id.
 * - It comes back by itself, at a random moment, so that ten thousand pages do not
 *   knock at once. After 5 s without a socket it polls; every 30 s it tries the socket
 *   again.
 *
 * Only typing is best effort. The file depends on nothing: no library, and not on
 * chatd's page.
 */

/* -------------------------------------------------------------------------------------
 * Limits. Each is a duration in seconds (or a count), with what it buys.
 * ---------------------------------------------------------------------------------- */

/** The first wait before a reconnect is a random part of this; it doubles each time. */
const FIRST_RETRY_SECONDS = 0.5;
/** Without a socket for so long we poll, and the state says so. */
const FALLBACK_SECONDS = 5;
/** The pause between two polls. */
const POLL_SECONDS = 5;
/** While we poll, the socket is tried again so often. */
const RETRY_SECONDS = 30;
/** A socket that is not ready by then counts as refused. */
const CONNECT_SECONDS = 10;
/**
 * A connection that lived so long was a good one: the next retry starts small again.
 */
const STEADY_SECONDS = 5;
/**
 * After so much silence we ask for a sign of life: a page cannot see the server's
 * pings.
 */
const SILENCE_SECONDS = 25;
/** ... and without one for so long the connection is dead. */
const PONG_SECONDS = 10;
/**
 * The same after a hint (the network changed, the tab was looked at again): be quick.
 */
const PROBE_SECONDS = 4;
/** How often silence is looked at. */
const WATCH_SECONDS = 2;
/** `token_expiring` is answered at most so often: the new token may end as soon. */
const RENEW_SECONDS = 15;
/**
 * A message without an answer for so long means that the connection is not what it
 * seems.
 */
const ANSWER_SECONDS = 20;
/** An HTTP request is given up after this. */
const REQUEST_SECONDS = 15;
/** Where a refusal does not say how long to wait. */
const REFUSED_SECONDS = 2;
/**
 * A message that lies in storage for so long, and is not ours, was left by a tab that
 * is gone: whoever sees it sends it.
 */
const ADOPT_SECONDS = 15;
/** `typing: true` is repeated at most so often ... */
const TYPING_REPEAT_SECONDS = 3;
/** ... and taken back when sendTyping was not called for so long. */
const TYPING_STOP_SECONDS = 5;
/** A reading mark is sent at most so often for each chat. */
const MARK_SECONDS = 1;

const LONE_SURROGATE =
  /[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

/** Close codes from 4500 mean "stay away"; what the two we know mean is here. */
const STAY_AWAY = /** @type {Record<number, "signed_out" | "too_many">} */ ({
  4503: "signed_out", // revoked, or another user
  4504: "too_many", // open in too many places
});
const STAY_AWAY_FROM = 4500;

/**
 * Refusals that waiting does not mend: such a message is reported as failed, so that it
 * does not stand in the way of the others. After "internal" it may be stored all the
 * same; then its event says so.
 */
const FINAL_REFUSALS = new Set([
  "bad_field",
  "bad_json",
  "forbidden",
  "idempotency_mismatch",
  "internal",
  "not_found",
  "too_large",
  "unknown_type",
]);

/* -------------------------------------------------------------------------------------
 * Words. What travels, as the server writes it, and the three events that we add.
 * ---------------------------------------------------------------------------------- */

/**
 * @typedef {object} Message
 * @property {number} id
 * @property {number} chat_id
 * @property {number} sender_id
 * @property {string} content
 * @property {string} created_at UTC, RFC 3339
 * @property {number} n its ordinal in the chat: 1, 2, 3 without holes
 * @property {string} [client_id]
 */
/** @typedef {{user_id: number, name: string | null, read_n: number}} Member */
/**
 * @typedef {object} Chat
 * @property {number} id
 * @property {string | null} title
 * @property {Member[]} members
 * @property {number} last_n the ordinal of its last message, 0 without one
 * @property {Message | null} last_message
 * @property {number} [read_n] up to where you have read
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
 */
/**
 * @typedef {{type: "new_message", seq: number, chat_id: number,
 *   message: Message}} NewMessage
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
 * @typedef {{type: "typing", chat_id: number, user_id: number,
 *   is_typing: boolean}} Typing
 */
/**
 * @typedef {{type: "ack", ref?: string, client_id?: string, message_id?: number,
 * chat_id?: number, n?: number, created_at?: string, duplicate?: boolean, expires_in?:
 * number}} Ack
 */
/**
 * @typedef {{type: "error", code: string, message: string, ref?: string,
 * retry_after?: number}} Refusal
 */
/**
 * @typedef {NewMessage | MessageRead | ChatAdded | MemberAdded
 *   | MemberRemoved} LoggedEvent
 */

/**
 * Where the connection stands:
 * - `connecting`: no socket yet, or lost a moment ago
 * - `connected`: live
 * - `polling`: no socket; events come every 5 s, messages go by HTTP
 * - `offline`: polling does not get through either
 * - `signed_out`: the token is no longer good; call connect with a new one
 * - `too_many`: the user is open in too many places; it waits until this tab is looked
 *   at
 * - `refused`: the server told us to stay away
 * - `closed`: disconnect was called, or connect never was
 * @typedef {"connecting" | "connected" | "polling" | "offline" | "signed_out"
 *   | "too_many"
 *   | "refused" | "closed"} State
 */
/**
 * @typedef {object} StateChange
 * @property {State} state
 * @property {number | null} retryIn seconds until the socket is tried again; null: it
 *   is open, or being tried, or nothing is due
 */
/**
 * What became of a message that you sent. `discarded` follows `failed`, or forget().
 * @typedef {object} Delivery
 * @property {"sending" | "sent" | "failed" | "discarded"} state
 * @property {string} client_id
 * @property {number} chat_id
 * @property {string} content
 * @property {boolean} kept it outlives the page: false if storage is full or forbidden
 * @property {Message} [message] as stored, when sent
 * @property {string} [code] why it failed
 * @property {string} [reason] the same as a sentence
 */
/** @typedef {{chats: Chat[], cursor: string}} Snapshot */
/**
 * @typedef {object} ChatEvents
 * @property {StateChange} state
 * @property {Delivery} delivery
 * @property {Snapshot} chats the answer of fetchChats
 * @property {{}} resync your picture is too old: call fetchChats and load what you show
 *   again
 * @property {Connected} connected
 * @property {NewMessage} new_message
 * @property {MessageRead} message_read
 * @property {ChatAdded} chat_added
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
 * @typedef {Pick<Storage, "getItem" | "setItem" | "removeItem" | "key" | "length">} Shelf
 */
/**
 * @typedef {object} Options
 * @property {string | URL} [server] chatd's address. Default: where this file came
 *   from.
 * @property {TokenSource} [bearer] the token for HTTP requests. With it, connect()
 *   needs no token: it asks for a ticket of 60 s, so that the long-lived token never
 *   stands in a URL.
 * @property {Shelf | null} [storage] where unsent messages outlive the page. Default:
 *   localStorage; null: nowhere.
 * @property {Pick<Console, "log"> | null} [log] Default: the console; null: silence.
 */

/** A request that was refused (`status` as in HTTP) or got no answer (`status` 0). */
export class ChatError extends Error {
  /**
   * @param {number} status
   * @param {string} code chatd's stable word for it, e.g. "not_found"; "unreachable"
   *   for 0
   * @param {string} message a sentence for people
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
 * Outbox. The messages that are not yet known to be stored, in the order they were
 * written. Each is an item of its own in storage, written before it is sent and removed
 * after its ack. So the tabs of one user never overwrite each other, and a tab may be
 * closed at any moment: what it leaves is taken over by another, or by the next visit.
 * Two tabs that send the same item change nothing: it has one client_id, which the
 * server knows.
 * ---------------------------------------------------------------------------------- */

/**
 * @typedef {object} Unsent
 * @property {string} client_id
 * @property {number} chat_id
 * @property {string} content
 * @property {boolean} kept in storage too
 * @property {"waiting" | "socket" | "http" | "failed"} on where it is
 * @property {number} sentAt when it was handed over last, as now()
 * @property {string | undefined} code why it failed
 * @property {string | undefined} reason
 */

/** What an item says for a moment before it goes: the other tabs must drop it too. */
const DISCARDED = "discarded";

class Outbox {
  /** Oldest first. @type {Unsent[]} */
  entries = [];
  #storage;
  /** "" until the user is known: until then only in memory. */
  #prefix = "";
  #lastTime = 0;
  /** Items of others at the last look. @type {Set<string>} */
  #strange = new Set();

  /** @param {Shelf | null} storage */
  constructor(storage) {
    this.#storage = storage;
  }

  /**
   * From now on entries are kept under this prefix, and what lies there is ours. Does
   * nothing the second time.
   * @param {string} prefix
   */
  open(prefix) {
    if (this.#prefix) return;
    this.#prefix = prefix;
    this.entries.forEach((entry) => this.#keep(entry));
    this.#take(this.#others());
  }

  /**
   * Takes over items that others had stored when it was called last, and that are still
   * there.
   * @returns {Unsent[]}
   */
  adopt() {
    const others = this.#others();
    const left = others.filter(({ client_id }) => this.#strange.has(client_id));
    this.#strange = new Set(others.map(({ client_id }) => client_id));
    this.#take(left);
    return left;
  }

  /**
   * @param {number} chat_id
   * @param {string} content
   * @returns {Unsent}
   */
  add(chat_id, content) {
    const entry = newUnsent(this.#newId(), chat_id, content);
    this.entries.push(entry);
    // With those that storage had no room for: whoever takes over takes them in order.
    this.entries.filter(({ kept }) => !kept).forEach((unkept) => this.#keep(unkept));
    return entry;
  }

  /** @param {string | undefined} clientId */
  find(clientId) {
    return this.entries.find((entry) => entry.client_id === clientId);
  }

  /** @param {Unsent} entry @param {string} code @param {string} reason */
  fail(entry, code, reason) {
    Object.assign(entry, { on: "failed", code, reason });
    this.#keep(entry);
  }

  /** @param {Unsent} entry */
  retry(entry) {
    Object.assign(entry, { on: "waiting", code: undefined, reason: undefined });
    this.#keep(entry);
  }

  /** It is stored. @param {Unsent} entry */
  remove(entry) {
    this.entries = this.entries.filter((other) => other !== entry);
    this.#store((storage) => storage.removeItem(this.#prefix + entry.client_id));
  }

  /** Nobody wants it any more, in any tab. @param {Unsent} entry */
  discard(entry) {
    this.#store((storage) =>
      storage.setItem(this.#prefix + entry.client_id, DISCARDED),
    );
    this.remove(entry);
  }

  /**
   * Another tab changed its storage: which entry of ours was discarded there?
   * @param {string | null} key
   * @param {string | null} value
   */
  discardedElsewhere(key, value) {
    if (value !== DISCARDED || !this.#prefix || !key?.startsWith(this.#prefix)) return;
    const entry = this.find(key.slice(this.#prefix.length));
    this.entries = this.entries.filter((other) => other !== entry);
    return entry;
  }

  /** The way it was sent is gone: it waits again. @param {"socket" | "http"} way */
  rewind(way) {
    for (const entry of this.on(way)) entry.on = "waiting";
  }

  /** @param {Unsent["on"]} place */
  on(place) {
    return this.entries.filter((entry) => entry.on === place);
  }

  /**
   * Ids sort in the order of writing, also across reloads and when the clock is set
   * back.
   */
  #newId() {
    this.#lastTime = Math.max(this.#lastTime + 1, Date.now());
    const random = crypto.getRandomValues(new Uint32Array(3));
    const words = [...random].map((word) => word.toString(36).padStart(7, "0"));
    return `${this.#lastTime.toString(36).padStart(9, "0")}-${words.join("")}`;
  }

  /** @param {Unsent[]} entries */
  #take(entries) {
    const all = [...this.entries, ...entries];
    this.entries = all.sort((a, b) => (a.client_id < b.client_id ? -1 : 1));
    const last = parseInt(all.at(-1)?.client_id ?? "0", 36); // up to the "-"
    this.#lastTime = Math.max(this.#lastTime, last);
  }

  /** @param {Unsent} entry */
  #keep(entry) {
    const { client_id, chat_id, content, code, reason } = entry;
    const text = JSON.stringify({ chat_id, content, code, reason });
    entry.kept = this.#store((storage) =>
      storage.setItem(this.#prefix + client_id, text),
    );
  }

  /** What is stored and not among our entries. @returns {Unsent[]} */
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
   * Storage may be full or forbidden; then a message lives as long as the page, and
   * `kept` says so.
   * @param {(storage: Shelf) => void} use
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

/**
 * @param {string} client_id
 * @param {number} chat_id
 * @param {string} content
 * @returns {Unsent}
 */
function newUnsent(client_id, chat_id, content) {
  return {
    client_id,
    chat_id,
    content,
    kept: false,
    on: "waiting",
    sentAt: 0,
    code: undefined,
    reason: undefined,
  };
}

/**
 * @param {string} clientId
 * @param {string | null} text
 * @returns {Unsent | null} null: not one of ours, or no longer one
 */
function readUnsent(clientId, text) {
  const { chat_id, content, code, reason } = parseObject(text) ?? {};
  if (typeof content !== "string" || !Number.isInteger(chat_id)) return null;
  const entry = newUnsent(clientId, chat_id, content);
  const on = code ? "failed" : "waiting";
  return Object.assign(entry, { kept: true, on, code, reason });
}

/** @returns {Shelf | null} */
function defaultStorage() {
  try {
    return globalThis.localStorage ?? null;
  } catch {
    return null; // A browser may forbid even the question.
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
 * ChatWebSocket. It owns one socket at most, one poll at most, and the cursor. The
 * state is never stored: it follows from what there is (#state), so it cannot be wrong.
 * Everything that outlives an `await` asks afterwards whether it is still wanted
 * (#attempt, AbortController).
 * ---------------------------------------------------------------------------------- */

export class ChatWebSocket {
  #base;
  #bearer;
  #log;
  #outbox;
  /** @type {Map<string, Set<(event: any) => void>>} */
  #listeners = new Map();

  /** What connect was given. @type {TokenSource | undefined} */
  #token;
  /** What a token function returned last, for HTTP. @type {string | undefined} */
  #fetchedToken;
  /** @type {number | undefined} */
  #userId;

  /** Why we do not connect; null while we do or try to. @type {State | null} */
  #ended = "closed";
  /** @type {WebSocket | null} */
  #socket = null;
  /** The server's `connected` was heard on #socket. */
  #ready = false;
  /** Counts attempts; whoever awaited and finds another number gives up. */
  #attempt = 0;
  #failures = 0;
  #connectedAt = 0;
  #attemptAt = 0;
  /** The last socket ended as if our token were refused. */
  #doubt = false;
  /** What `bye` asked for, seconds. @type {number | null} */
  #byeSeconds = null;
  /** When the socket is tried next, as now(). @type {number | null} */
  #retryAt = null;
  #retryTimer = 0;
  #connectTimer = 0;
  #watchTimer = 0;
  #watchedAt = 0;
  #adoptTimer = 0;
  #heardAt = 0;
  /** A ping is out and must be answered until then (as now()); 0: none is. */
  #pongBy = 0;
  #renewedAt = -Infinity;

  /** A poll is running or due. */
  #polling = false;
  #pollTimer = 0;
  /** Ends every request that stands in for the socket. */
  #fallback = new AbortController();
  /** The last poll got an answer. */
  #reachable = true;

  /** The place in the server's log up to where events were taken. */
  #cursor = { epoch: "", seq: -1 };
  /** Where the events that we have without a gap begin: older pictures are too old. */
  #runStart = -1;
  /** Events that wait for fetchChats; null: none runs. @type {LoggedEvent[] | null} */
  #held = null;
  /** @type {Promise<Snapshot> | null} */
  #fetching = null;

  /** Nothing is sent before (as now()): the server asked us to wait. */
  #sendFrom = 0;
  #sendTimer = 0;
  /**
   * @type {Map<number, {wanted: number, known: number, sentAt: number, timer: number}>}
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
    this.#outbox = new Outbox(
      options.storage === undefined ? defaultStorage() : options.storage,
    );
    this.#learnUser(this.#bearer);
  }

  /* ---- for the page ---- */

  /**
   * Calls `listener` for each event of this type, until the returned function is
   * called. A listener that throws is reported as an uncaught error and harms nobody
   * else.
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
   * Connects, and stays connected until disconnect. Returns at once; "state" tells the
   * rest. Called again, it starts anew with the new token and keeps cursor and unsent
   * messages.
   *
   * @param {TokenSource} [token] a JWT, or a function that fetches one for each
   *   connection. A function that fails with an error whose `status` is 401 means "sign
   *   in again"; any other failure is tried again. Where it returns tickets (GET
   *   /api/v2/ws-token), give the constructor a `bearer` too: a ticket opens sockets,
   *   and cannot poll. Without a token: tickets, fetched with `bearer`.
   */
  connect(token) {
    if (token === undefined && this.#bearer === undefined) {
      throw new TypeError("connect: give it a token, or give the constructor a bearer");
    }
    this.#stop();
    this.#token = token;
    this.#fetchedToken = undefined;
    this.#doubt = false;
    if (!this.#learnUser(token)) return;
    this.#begin();
  }

  /** Closes, and stays closed until connect. Unsent messages are kept for then. */
  disconnect() {
    this.#end("closed");
  }

  /** Closes, and discards what this user has not sent: for signing out. */
  forget() {
    this.disconnect();
    for (const entry of this.#outbox.entries) this.#discard(entry);
  }

  /** Tries the socket now, if it is waiting to. */
  retry() {
    if (this.#ended === "too_many") {
      this.#begin();
    } else if (this.#retryTimer) {
      void this.#open();
    }
  }

  /** @returns {State} */
  get state() {
    return this.#state();
  }

  /** Seconds until the socket is tried again; null: it is not waiting to. */
  get retryIn() {
    return this.#retryAt === null ? null : Math.max(0, (this.#retryAt - now()) / 1000);
  }

  /** Your user id, once it is known. */
  get userId() {
    return this.#userId;
  }

  /**
   * Sends a message: at once, or as soon as that is possible, also after a reload.
   * "delivery" events tell what becomes of it.
   * @param {number} chatId
   * @param {string} content
   * @returns {string} its client_id
   */
  send(chatId, content) {
    // Half of a surrogate pair is no text: as JSON it could not be refused by name.
    const text = String(content).replace(LONE_SURROGATE, "\ufffd");
    const entry = this.#outbox.add(chatId, text);
    this.#reportDelivery(entry, "sending");
    this.#sendUnsent();
    return entry.client_id;
  }

  /**
   * The messages of a chat that are not yet known to be stored, oldest first.
   * @param {number} chatId
   * @returns {Delivery[]}
   */
  unsent(chatId) {
    return this.#outbox.entries
      .filter((entry) => entry.chat_id === chatId)
      .map((entry) => delivery(entry, entry.on === "failed" ? "failed" : "sending"));
  }

  /** Gives a failed message another chance. @param {string} clientId */
  resend(clientId) {
    const entry = this.#outbox.find(clientId);
    if (entry?.on !== "failed") return;
    this.#outbox.retry(entry);
    this.#reportDelivery(entry, "sending");
    this.#sendUnsent();
  }

  /** Throws a failed message away. @param {string} clientId */
  discard(clientId) {
    const entry = this.#outbox.find(clientId);
    if (entry?.on === "failed") this.#discard(entry);
  }

  /**
   * Tells the others that you type. Call it at each key: it is repeated no more often
   * than every 3 s, and taken back by itself 5 s after the last call. Lost without a
   * socket.
   * @param {number} chatId
   * @param {boolean} isTyping
   */
  sendTyping(chatId, isTyping) {
    const before = this.#typing.get(chatId);
    clearTimeout(before?.timer);
    if (!isTyping) {
      if (this.#typing.delete(chatId)) this.#sayTyping(chatId, false);
      return;
    }
    const due = !before || elapsed(before.sentAt) >= TYPING_REPEAT_SECONDS;
    if (due) this.#sayTyping(chatId, true);
    this.#typing.set(chatId, {
      sentAt: due ? now() : before.sentAt,
      timer: after(TYPING_STOP_SECONDS, () => this.sendTyping(chatId, false)),
    });
  }

  /**
   * Marks a chat as read up to this message. Sent at most once a second for each chat,
   * and again after a reconnect if it was not answered. An older message changes
   * nothing.
   * @param {number} chatId
   * @param {number} messageId
   */
  markRead(chatId, messageId) {
    const mark = this.#marks.get(chatId) ?? {
      wanted: 0,
      known: 0,
      sentAt: -Infinity,
      timer: 0,
    };
    if (messageId <= mark.wanted) return;
    mark.wanted = messageId;
    this.#marks.set(chatId, mark);
    this.#sendMark(chatId);
  }

  /**
   * Fetches your chats with members, last message and reading positions. Events wait
   * meanwhile: first "chats" brings the answer, then come the events after it, so
   * nothing is missed and nothing counted twice. Call it before connect if you gave a
   * bearer, else at the first "connected"; and at each "resync".
   * @returns {Promise<Snapshot>}
   * @throws {ChatError} then the events that waited come all the same; try again
   */
  fetchChats() {
    this.#held ??= [];
    this.#fetching ??= this.#fetchChats().finally(() => {
      this.#fetching = null;
    });
    return this.#fetching;
  }

  /**
   * One HTTP request to chatd, with the bearer.
   * @param {string} method
   * @param {string} path e.g. "/api/v1/chats"
   * @param {object} [body] sent as JSON
   * @param {AbortSignal} [signal]
   * @returns {Promise<any>} the JSON of the answer; null for 204
   * @throws {ChatError}
   */
  async request(method, path, body, signal) {
    const token = await this.#httpToken(false);
    try {
      return await this.#ask(method, path, token, body, signal);
    } catch (error) {
      if (!isSignedOut(error)) throw error;
      return this.#askAgain(method, path, body, signal, error);
    }
  }

  /* ---- connecting ---- */

  #begin() {
    this.#ended = null;
    this.#failures = 0;
    this.#listenToBrowser(true);
    this.#adoptTimer = every(ADOPT_SECONDS, () => this.#adopt());
    this.#fallBackLater();
    void this.#open();
  }

  /** Fetches a token and opens a socket. The answer comes to #hear or #lost. */
  async #open() {
    const attempt = ++this.#attempt;
    clearTimeout(this.#retryTimer);
    this.#retryTimer = 0;
    this.#retryAt = null;
    this.#attemptAt = now();
    this.#reportState();
    this.#connectTimer = after(CONNECT_SECONDS, () => this.#lost(1006));
    try {
      const token = await this.#socketToken();
      if (attempt === this.#attempt) this.#socket = this.#newSocket(token);
    } catch (error) {
      if (attempt !== this.#attempt) return;
      if (isSignedOut(error)) this.#end("signed_out");
      else this.#lost(0, retryAfter(error));
    }
  }

  /** @param {string} token @returns {WebSocket} */
  #newSocket(token) {
    const url = new URL("ws/chat", this.#base);
    url.protocol = url.protocol.replace("http", "ws");
    url.searchParams.set("token", token);
    if (this.#cursor.seq >= 0) url.searchParams.set("cursor", this.#cursorText());
    const socket = new WebSocket(url);
    socket.onopen = () => this.#log?.log("[WebSocket] Connected");
    socket.onmessage = ({ data }) => this.#hear(data);
    socket.onclose = ({ code }) => {
      this.#log?.log(`[WebSocket] Closed ${code}`);
      this.#lost(code);
    };
    return socket;
  }

  /** @returns {Promise<string>} */
  async #socketToken() {
    if (!this.#token) return (await this.request("GET", "/api/v2/ws-token")).token;
    if (typeof this.#token === "string") {
      if (this.#doubt) await this.#checkToken();
      return this.#token;
    }
    const token = await this.#token();
    if (typeof token !== "string") throw new TypeError("connect: no token was fetched");
    if (this.#bearer === undefined) this.#fetchedToken = token;
    this.#learnUser(token);
    return token;
  }

  /**
   * A browser does not say why a handshake was refused. A fixed token may be the
   * reason, and then trying again for ever would be wrong: a request can tell.
   */
  async #checkToken() {
    try {
      await this.request("GET", "/api/v1/me");
    } catch {
      // A 401 has ended us already (#askAgain); else it says nothing about the token.
    }
  }

  /**
   * There is no socket (any more): decides whether and when to come back.
   * @param {number} code the close code; 0: not even an attempt, there was no token
   * @param {number} [retryAfterSeconds] as the server asked
   */
  #lost(code, retryAfterSeconds) {
    const steady = this.#ready && elapsed(this.#connectedAt) >= STEADY_SECONDS;
    const wait = this.#byeSeconds ?? retryAfterSeconds;
    if (code === 1009) this.#tooLarge();
    this.#dropSocket(1000);
    if (steady) this.#failures = 0;
    if (code >= STAY_AWAY_FROM && code < 5000) {
      this.#end(STAY_AWAY[code] ?? "refused");
      return;
    }
    this.#doubt = code === 1006 || code === 4401;
    this.#fallBackLater();
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

  /** Something changed in our favour: do not wait for the next try. */
  #hurry() {
    if (this.#ready) this.#ping(PROBE_SECONDS);
    else if (elapsed(this.#attemptAt) >= 1) this.retry();
  }

  /**
   * Forgets the socket, whatever state it is in.
   * @param {number} code to close it with
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
    this.#outbox.rewind("socket");
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close(code);
  }

  /** No socket, no poll, no timer. */
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

  /** @param {State} why */
  #end(why) {
    this.#stop();
    this.#ended = why;
    if (why !== "too_many") this.#listenToBrowser(false);
    this.#reportState();
  }

  /* ---- hearing ---- */

  /** @param {any} data */
  #hear(data) {
    const frame = parseObject(data);
    if (!frame) return; // not from chatd; a proxy's word, perhaps
    this.#log?.log("WebSocket message:", frame);
    this.#heardAt = now();
    this.#pongBy = 0;
    if (frame.type === "connected") this.#connected(frame);
    else if (typeof frame.seq === "number") this.#take(frame);
    else this.#answer(frame);
  }

  /** @param {any} frame one that is not in the log */
  #answer(frame) {
    switch (frame.type) {
      case "ack":
        this.#acked(frame);
        break;
      case "error":
        this.#refused(frame);
        break;
      case "token_expiring":
        void this.#renew();
        break;
      case "bye":
        this.#byeSeconds = frame.retry_after;
        break;
    }
    this.#emit(frame.type, frame);
  }

  /** @param {Connected} frame */
  #connected(frame) {
    if (!this.#isUser(frame.user_id)) return;
    clearTimeout(this.#connectTimer);
    this.#stopPolling();
    this.#ready = true;
    this.#sendFrom = 0;
    this.#connectedAt = now();
    this.#watchedAt = Date.now();
    clearInterval(this.#watchTimer);
    this.#watchTimer = every(WATCH_SECONDS, () => this.#watch());
    // "fresh" although we know a place means that we asked before we knew it (a poll
    // told us meanwhile): what lies between the two is missing, so it is a resync.
    const known = this.#cursor.seq >= 0;
    const fresh = frame.resume === "fresh";
    const resync = frame.resume === "resync" || (fresh && known);
    if (fresh || resync) this.#jump(frame.cursor);
    else this.#moveCursor(frame.cursor);
    this.#reportState();
    this.#emit("connected", frame);
    if (resync) this.#emit("resync", {});
    for (const chatId of this.#marks.keys()) this.#sendMark(chatId);
    this.#sendUnsent();
  }

  /**
   * A token says whose it is, so that what is written before the server answers, or
   * without it, is kept for the right user.
   * @param {TokenSource | undefined} token
   */
  #learnUser(token) {
    const userId = typeof token === "string" ? userIdOf(token) : undefined;
    return userId === undefined || this.#isUser(userId);
  }

  /**
   * Learns who we are. Another user than before ends everything: his chats are not
   * ours, and our unsent messages are not his.
   * @param {number} userId
   */
  #isUser(userId) {
    if (this.#userId !== undefined && this.#userId !== userId) {
      this.#end("signed_out");
      return false;
    }
    if (this.#userId === undefined) {
      this.#userId = userId;
      this.#outbox.open(`chatd.unsent.${this.#base.host}.${userId}.`);
      this.#reportAdopted(this.#outbox.entries);
    }
    return true;
  }

  /**
   * One event of the log, from the socket or a poll: passed on unless it is known.
   * @param {LoggedEvent} event
   */
  #take(event) {
    if (event.seq <= this.#cursor.seq) return;
    this.#cursor.seq = event.seq;
    if (event.type === "new_message") this.#stored(event.message);
    if (this.#held) this.#held.push(event);
    else this.#emit(event.type, event);
  }

  /**
   * Moves the cursor, never back within an epoch: a poll may have been ahead of the
   * socket.
   * @param {string} text
   */
  #moveCursor(text) {
    const cursor = parseCursor(text);
    const sameLog = cursor.epoch === this.#cursor.epoch;
    if (!sameLog) this.#jump(text);
    else if (cursor.seq > this.#cursor.seq) this.#cursor = cursor;
  }

  /** Goes on at another place, without what lies between. @param {string} text */
  #jump(text) {
    this.#cursor = parseCursor(text);
    this.#runStart = this.#cursor.seq;
    if (this.#held) this.#held = [];
  }

  #cursorText() {
    return `${this.#cursor.epoch}.${this.#cursor.seq}`;
  }

  /** @returns {Promise<Snapshot>} */
  async #fetchChats() {
    let from = -1;
    try {
      const snapshot = await this.#freshSnapshot();
      this.#moveCursor(snapshot.cursor);
      from = parseCursor(snapshot.cursor).seq;
      this.#emit("chats", snapshot);
      return snapshot;
    } finally {
      const held = this.#held ?? [];
      this.#held = null;
      for (const event of held) if (event.seq > from) this.#emit(event.type, event);
    }
  }

  /**
   * A picture taken before the events that we hold begin would leave a gap, and one of
   * another epoch is older than ours if we learned ours meanwhile: take another.
   * @returns {Promise<Snapshot>}
   */
  async #freshSnapshot() {
    for (let tries = 0; tries < 5; tries++) {
      const before = this.#cursor.epoch;
      /** @type {Snapshot} */
      const snapshot = await this.request("GET", "/api/v1/chats");
      const { epoch, seq } = parseCursor(snapshot.cursor);
      const known = this.#cursor.epoch;
      if (epoch === known ? seq >= this.#runStart : before === known) return snapshot;
    }
    throw new ChatError(0, "unreachable", "The chat server's answers are too old.");
  }

  /* ---- signs of life ---- */

  /** Every 2 s while connected. After a sleep (a late tick) it looks more closely. */
  #watch() {
    const slept = Date.now() - this.#watchedAt > SILENCE_SECONDS * 1000;
    this.#watchedAt = Date.now();
    const oldest = this.#outbox.on("socket")[0];
    const unanswered = oldest && elapsed(oldest.sentAt) > ANSWER_SECONDS;
    const dead = this.#pongBy > 0 && now() > this.#pongBy;
    if (dead || unanswered) {
      this.#log?.log("[WebSocket] No answer, closing");
      this.#lost(1006);
    } else if (slept) {
      this.#ping(PROBE_SECONDS);
    } else if (elapsed(this.#heardAt) > SILENCE_SECONDS) {
      this.#ping(PONG_SECONDS);
    }
  }

  /** @param {number} seconds until an answer is due */
  #ping(seconds) {
    const by = now() + seconds * 1000;
    if (this.#pongBy && this.#pongBy <= by) return;
    this.#pongBy = by;
    this.#say({ type: "ping" });
  }

  /** @param {boolean} on */
  #listenToBrowser(on) {
    const change = on ? "addEventListener" : "removeEventListener";
    const page = globalThis.document;
    globalThis[change]?.("online", this.#onNetwork);
    globalThis[change]?.("offline", this.#onNetwork);
    globalThis[change]?.("focus", this.#onLook);
    globalThis[change]?.("storage", this.#onStorage);
    page?.[change]("visibilitychange", this.#onLook);
  }

  #onNetwork = () => {
    if (this.#ended) return;
    if (globalThis.navigator?.onLine === false && !this.#ready) this.#reportState();
    else this.#hurry();
  };

  #onStorage = (/** @type {any} */ { key, newValue }) => {
    const entry = this.#outbox.discardedElsewhere(key, newValue);
    if (!entry) return;
    this.#reportDelivery(entry, "discarded");
    this.#sendUnsent(); // it may have been the one under way
  };

  #onLook = () => {
    if (globalThis.document?.visibilityState !== "hidden") this.#hurry();
  };

  /** Before the token ends, show a newer one. What it answers needs no action. */
  async #renew() {
    if (typeof this.#token === "string") return; // nothing newer; 4401 will come
    const attempt = this.#attempt;
    const wait = RENEW_SECONDS - elapsed(this.#renewedAt);
    if (wait > 0) await pause(wait);
    if (attempt !== this.#attempt) return;
    this.#renewedAt = now();
    try {
      const token = await this.#socketToken();
      if (attempt === this.#attempt) this.#say({ type: "auth", token, ref: "auth" });
    } catch {
      // The socket lives on to its end; then 4401 starts a connection and its retries.
    }
  }

  /* ---- without a socket ---- */

  /** Starts the 5 s after which we poll, unless they run already. */
  #fallBackLater() {
    this.#pollTimer ||= after(FALLBACK_SECONDS, () => {
      this.#log?.log(`[WebSocket] Not connected, polling every ${POLL_SECONDS} s`);
      this.#polling = true;
      this.#reachable = true;
      this.#reportState();
      void this.#pollOnce();
    });
  }

  /**
   * Asks for events, tells what came, and is due again in 5 s, or at once if there is
   * more.
   */
  async #pollOnce() {
    const { signal } = this.#fallback;
    let wait = POLL_SECONDS;
    try {
      const blind = this.#cursor.seq < 0;
      const answer = await this.request("GET", this.#pollPath(), undefined, signal);
      if (signal.aborted) return;
      if (answer.more) wait = 0;
      this.#polled(answer, blind);
    } catch (error) {
      if (signal.aborted) return;
      wait = Math.max(wait, retryAfter(error) ?? 0);
      this.#isReachable(false);
    }
    if (signal.aborted) return;
    this.#pollTimer = after(wait, () => void this.#pollOnce());
  }

  #pollPath() {
    const query = new URLSearchParams({ limit: "500" });
    if (this.#cursor.seq >= 0) query.set("cursor", this.#cursorText());
    return `/api/v1/events?${query}`;
  }

  /**
   * @param {{events: LoggedEvent[], cursor: string, more: boolean, resync: boolean}}
   *   answer
   * @param {boolean} blind we asked without a cursor
   */
  #polled(answer, blind) {
    const { signal } = this.#fallback;
    for (const event of answer.events) {
      if (signal.aborted) return; // a listener has disconnected us
      this.#take(event);
    }
    if (answer.resync || (blind && this.#cursor.seq < 0)) this.#jump(answer.cursor);
    else if (!blind) this.#moveCursor(answer.cursor);
    if (answer.resync) this.#emit("resync", {});
    this.#isReachable(true);
    for (const chatId of this.#marks.keys()) this.#sendMark(chatId);
    this.#sendUnsent();
  }

  /**
   * A server that answers again after it did not is worth an immediate try of the
   * socket.
   * @param {boolean} reachable
   */
  #isReachable(reachable) {
    const back = reachable && !this.#reachable;
    this.#reachable = reachable;
    this.#reportState();
    if (back) this.#hurry();
  }

  #stopPolling() {
    clearTimeout(this.#pollTimer);
    this.#fallback.abort();
    this.#fallback = new AbortController();
    this.#pollTimer = 0;
    this.#polling = false;
    this.#outbox.rewind("http");
  }

  /* ---- sending ---- */

  /**
   * Hands over the oldest unsent message: by the socket, or over HTTP while we poll.
   * The next waits for its answer: were two under way, and the first refused because it
   * came too soon, the second would overtake it. Nobody writes faster than answers come.
   */
  #sendUnsent() {
    if (this.#ended) return;
    const [next] = this.#outbox.on("waiting");
    if (!next || this.#outbox.on("socket").length || this.#outbox.on("http").length)
      return;
    const wait = (this.#sendFrom - now()) / 1000;
    clearTimeout(this.#sendTimer);
    if (wait > 0) this.#sendTimer = after(wait, () => this.#sendUnsent());
    else if (this.#ready) this.#sendBySocket(next);
    else if (this.#polling) void this.#sendByHttp(next);
  }

  /** @param {Unsent} entry */
  #sendBySocket(entry) {
    const { client_id, chat_id, content } = entry;
    entry.on = "socket";
    entry.sentAt = now();
    this.#say({ type: "send_message", chat_id, content, client_id, ref: client_id });
  }

  /** @param {Unsent} entry */
  async #sendByHttp(entry) {
    const { client_id, chat_id, content } = entry;
    const { signal } = this.#fallback;
    entry.on = "http";
    const path = `/api/v1/chats/${chat_id}/messages`;
    try {
      const answer = await this.request("POST", path, { content, client_id }, signal);
      this.#isUser(answer.message.sender_id);
      this.#stored({ ...answer.message, client_id });
    } catch (error) {
      if (signal.aborted) return; // the socket is back, and has taken it over
      const { status, code, message, retryAfter } = asChatError(error);
      this.#notStored(entry, code, message, status ? retryAfter : POLL_SECONDS);
      this.#sendUnsent();
    }
  }

  /** @param {Ack} ack */
  #acked(ack) {
    const [word, chatId, messageId] = (ack.ref ?? "").split(" ");
    const mark = word === "read" ? this.#marks.get(Number(chatId)) : undefined;
    if (mark) mark.known = Math.max(mark.known, Number(messageId));
    const entry = this.#outbox.find(ack.client_id);
    if (!entry || ack.message_id === undefined) return;
    this.#stored({
      id: ack.message_id,
      chat_id: entry.chat_id,
      sender_id: this.#userId ?? 0,
      content: entry.content,
      created_at: ack.created_at ?? "",
      n: ack.n ?? 0,
      client_id: entry.client_id,
    });
  }

  /** @param {Refusal} refusal */
  #refused({ ref, code, message, retry_after }) {
    const [word, chatId, messageId] = (ref ?? "").split(" ");
    const mark = word === "read" ? this.#marks.get(Number(chatId)) : undefined;
    if (mark && FINAL_REFUSALS.has(code)) mark.known = Number(messageId);
    else if (mark)
      after(retry_after ?? REFUSED_SECONDS, () => this.#sendMark(Number(chatId)));
    const entry = this.#outbox.find(ref);
    if (entry?.on !== "socket") return;
    this.#notStored(entry, code, message, retry_after);
    this.#sendUnsent();
  }

  /**
   * The server has it: an ack, a 201, or the event itself said so, whichever came
   * first.
   * @param {Message} message
   */
  #stored(message) {
    const entry = this.#outbox.find(message.client_id);
    if (!entry || message.sender_id !== this.#userId) return;
    this.#outbox.remove(entry);
    this.#emit("delivery", { ...delivery(entry, "sent"), message });
    this.#sendUnsent();
  }

  /**
   * @param {Unsent} entry
   * @param {string} code
   * @param {string} reason
   * @param {number} [seconds] to wait, as the server asked
   */
  #notStored(entry, code, reason, seconds) {
    if (FINAL_REFUSALS.has(code)) {
      this.#outbox.fail(entry, code, reason);
      this.#reportDelivery(entry, "failed");
      return;
    }
    entry.on = "waiting";
    this.#sendFrom = now() + (seconds ?? REFUSED_SECONDS) * 1000;
  }

  /** The server would not read a frame so large: it must not be repeated. */
  #tooLarge() {
    const [entry] = this.#outbox.on("socket");
    if (entry) this.#notStored(entry, "too_large", "The message is too long.");
  }

  /** Sends on what a tab that is gone has left. */
  #adopt() {
    this.#reportAdopted(this.#outbox.adopt());
    this.#sendUnsent();
  }

  /** @param {Unsent[]} entries */
  #reportAdopted(entries) {
    for (const entry of entries) {
      this.#reportDelivery(entry, entry.on === "failed" ? "failed" : "sending");
    }
  }

  /** @param {Unsent} entry */
  #discard(entry) {
    this.#outbox.discard(entry);
    this.#reportDelivery(entry, "discarded");
  }

  /** @param {number} chatId */
  #sendMark(chatId) {
    const mark = this.#marks.get(chatId);
    if (!mark || mark.known >= mark.wanted || mark.timer || this.#ended) return;
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
      this.#say({ type: "mark_read", message_id, ref: `read ${chatId} ${message_id}` });
    } else if (this.#polling) {
      this.request("POST", `/api/v1/messages/${message_id}/read`).then(
        () => {
          mark.known = Math.max(mark.known, message_id);
        },
        (error) => {
          if (FINAL_REFUSALS.has(error.code)) mark.known = message_id;
          // else the next poll, or the next connection, tries again
        },
      );
    }
  }

  /** @param {number} chat_id @param {boolean} is_typing */
  #sayTyping(chat_id, is_typing) {
    if (this.#ready) this.#say({ type: "typing", chat_id, is_typing });
  }

  /** @param {object} command */
  #say(command) {
    if (this.#socket?.readyState === 1) this.#socket.send(JSON.stringify(command));
  }

  /* ---- HTTP ---- */

  /**
   * @param {boolean} fresh not the one that was used before
   * @returns {Promise<string>}
   */
  async #httpToken(fresh) {
    const source = this.#bearer ?? this.#token;
    if (source === undefined)
      throw new TypeError("request: give connect a token first");
    if (typeof source === "string") return source;
    if (fresh || this.#fetchedToken === undefined) this.#fetchedToken = await source();
    return this.#fetchedToken;
  }

  /**
   * After a 401: once more with a fresh token where there is a function to fetch it. A
   * token of our own that is refused means "sign in again"; a function's may have been
   * a ticket.
   * @param {string} method @param {string} path @param {object | undefined} body
   * @param {AbortSignal | undefined} signal @param {unknown} refusal
   */
  async #askAgain(method, path, body, signal, refusal) {
    const source = this.#bearer ?? this.#token;
    try {
      if (typeof source !== "function") throw refusal;
      return await this.#ask(method, path, await this.#httpToken(true), body, signal);
    } catch (error) {
      const ours = typeof source === "string" || this.#bearer !== undefined;
      if (ours && isSignedOut(error)) this.#end("signed_out");
      throw error;
    }
  }

  /**
   * @param {string} method @param {string} path @param {string} token
   * @param {object} [body] @param {AbortSignal} [signal]
   */
  async #ask(method, path, token, body, signal) {
    /** @type {Record<string, string>} */
    const headers = { Authorization: `Bearer ${token}` };
    if (body) headers["Content-Type"] = "application/json";
    const limit = new AbortController();
    const abort = () => limit.abort();
    const timer = after(REQUEST_SECONDS, abort);
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
      throw new ChatError(0, "unreachable", "The chat server does not answer.");
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", abort);
    }
  }

  /* ---- telling ---- */

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

  /** @param {Unsent} entry @param {Delivery["state"]} state */
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
 * Small change.
 * ---------------------------------------------------------------------------------- */

/** @param {Unsent} entry @param {Delivery["state"]} state @returns {Delivery} */
function delivery({ client_id, chat_id, content, kept, code, reason }, state) {
  const why = code && { code, reason: reason ?? "" };
  return { state, client_id, chat_id, content, kept, ...why };
}

/** @param {any} text @returns {any} the object that it is as JSON, or null */
function parseObject(text) {
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" ? value : null;
  } catch {
    return null;
  }
}

/**
 * Whose token it is, read as chatd reads it; the server checks it, not we.
 * @param {string} token
 * @returns {number | undefined} undefined where it cannot be told
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
    code = "internal",
    message = `HTTP ${answer.status}`,
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

/** @param {unknown} error of a token function, perhaps @returns {ChatError} */
function asChatError(error) {
  if (error instanceof ChatError) return error;
  return new ChatError(0, "unreachable", "There is no token at the moment.");
}

/** Milliseconds that only grow: people and networks set the other clock. */
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

/** @param {number} seconds @returns {Promise<void>} */
function pause(seconds) {
  return new Promise((resolve) => void after(seconds, resolve));
}

/** @param {number} seconds @param {() => void} task @returns {number} */
function every(seconds, task) {
  return Number(setInterval(task, seconds * 1000));
}
