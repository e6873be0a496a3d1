// @ts-check
/**
 * chat-websocket.js: a dependable connection to chatd (docs/embedding.md). Each event
 * comes once and in order, or else "resync". What you send is stored once. The client
 * reconnects by itself, and polls while there is no socket.
 *
 * @import { Ack, ChatPage, ChatsQuery, Connected, Found, History, HistoryQuery, Joined,
 *   LoggedEvent, MemberPage, MembersQuery, NewChat, Options, Preview, Refusal,
 *   SearchQuery, Snapshot, StorageLike, Token, TokenSource,
 *   Unsent } from "./protocol.js"
 * @typedef {import("./protocol.js").Chat} Chat
 * @typedef {import("./protocol.js").ChatEvents} ChatEvents
 * @typedef {import("./protocol.js").Delivery} Delivery
 * @typedef {import("./protocol.js").Message} Message
 * @typedef {import("./protocol.js").State} State
 */

/** Doubled by each failure. */
const FIRST_RETRY_SECONDS = 0.5;
const FALLBACK_SECONDS = 5;
const POLL_SECONDS = 5;
const RETRY_SECONDS = 30;
const CONNECT_SECONDS = 10;
const STEADY_SECONDS = 5;
/** Then the client sends a `ping`: JavaScript cannot see the server's own. */
const SILENCE_SECONDS = 25;
const PONG_SECONDS = 10;
const PROBE_SECONDS = 4;
const WATCH_SECONDS = 2;
const RENEW_SECONDS = 15;
const ANSWER_SECONDS = 20;
const REQUEST_SECONDS = 15;
/** Without `retry_after`. */
const REFUSED_SECONDS = 2;
const ADOPT_SECONDS = 15;
const TYPING_REPEAT_SECONDS = 3;
const TYPING_STOP_SECONDS = 5;
const MARK_SECONDS = 1;
const CHATS_PER_PAGE = 100;

/** These fail for good. (After "internal", an event may say that it was stored.) */
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

/** The ids of the message that the page `wanted` to mark, and of the last answer. */
const NEW_MARK = { wanted: 0, settled: 0, sentAt: -Infinity, timer: 0 };

/** A request that was refused (`status` is the HTTP status) or not answered (0). */
export class ChatError extends Error {
  /**
   * @param {number} status @param {string} code of docs/protocol.md, or "unreachable"
   * @param {string} message @param {number} [retryAfter] seconds
   */
  constructor(status, code, message, retryAfter) {
    super(message);
    this.name = "ChatError";
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/** The last value of an item that other tabs shall drop, too. */
const DISCARDED = "discarded";

/**
 * Messages, edits and deletions, each in an item of its own, because tabs share the
 * storage. If two tabs send a message, the server stores it once. But a tab drops a
 * change that another tab has settled: a later one may have followed.
 */
class UnsentMessages {
  /** Oldest first. @type {Unsent[]} */
  entries = [];
  #storage;
  /** Of the keys; "" until the user is known: nothing is stored yet. */
  #prefix = "";
  #lastTime = 0;
  /** @type {Set<string>} */
  #othersBefore = new Set();

  /** @param {StorageLike | null | undefined} storage */
  constructor(storage) {
    this.#storage = storage;
  }

  /** @param {string} prefix */
  open(prefix) {
    this.#prefix = prefix;
    this.#keepAll();
    this.#insert(this.#others());
  }

  /** Adopts what was there at the last call and still is: its tab has closed. */
  adopt() {
    const others = this.#others();
    const left = others.filter(({ client_id }) => this.#othersBefore.has(client_id));
    this.#othersBefore = new Set(others.map(({ client_id }) => client_id));
    this.#insert(left);
    this.#keepAll();
    return left;
  }

  /** @param {Partial<Unsent>} fields */
  add(fields) {
    const entry = newUnsent(this.#newId(), fields);
    this.entries.push(entry);
    this.#keepAll();
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

  /** @param {Unsent} entry @param {number} [rev] */
  remove(entry, rev) {
    const key = this.#prefix + entry.client_id;
    if (rev) this.#store((storage) => storage.setItem(key, String(rev)));
    this.#store((storage) => storage.removeItem(key));
    this.#drop(entry, rev);
  }

  /**
   * A later edit of the same state becomes one of the new state.
   * @param {Unsent} entry @param {number | undefined} rev
   */
  #drop(entry, rev) {
    const { message_id, if_rev } = entry;
    this.entries = this.entries.filter((other) => other !== entry);
    for (const later of this.entries)
      if (rev && if_rev && later.message_id === message_id && later.if_rev === if_rev)
        this.update(later, { if_rev: rev });
  }

  /** @param {Unsent} entry */
  discard(entry) {
    const key = this.#prefix + entry.client_id;
    this.#store((storage) => storage.setItem(key, DISCARDED));
    this.remove(entry);
  }

  /**
   * Another tab has settled an entry.
   * @param {string | null} key @param {string | null} value
   */
  discardedElsewhere(key, value) {
    if (!this.#prefix || !key?.startsWith(this.#prefix)) return;
    const entry = this.find(key.slice(this.#prefix.length));
    const rev = Number(value); // as in remove, or 0, or NaN
    // The server will tell of a message that is on its way.
    const waits = entry?.kind === "message" && entry.place !== "failed";
    const settled = rev >= 0 && !waits;
    if (!entry || (value !== DISCARDED && !settled)) return;
    this.#drop(entry, rev);
    return entry;
  }

  /** @param {Unsent} entry */
  isGone({ kind, kept, client_id }) {
    let gone = false;
    this.#store((storage) => {
      gone = storage.getItem(this.#prefix + client_id) === null;
    });
    return gone && kept && kind !== "message";
  }

  /** @param {"socket" | "http"} place */
  requeue(place) {
    for (const entry of this.at(place)) entry.place = "waiting";
  }

  /** @param {Unsent["place"]} place */
  at(place) {
    return this.entries.filter((entry) => entry.place === place);
  }

  /** Ids sort in the order of writing. */
  #newId() {
    this.#lastTime = Math.max(this.#lastTime + 1, Date.now());
    const random = crypto.getRandomValues(new Uint32Array(3)).join("-");
    return `${this.#lastTime.toString(36).padStart(9, "0")}-${random}`;
  }

  /** @param {Unsent[]} entries */
  #insert(entries) {
    const all = [...this.entries, ...entries];
    this.entries = all.sort((a, b) => (a.client_id < b.client_id ? -1 : 1));
    const last = parseInt(all.at(-1)?.client_id ?? "0", 36); // it stops at the "-"
    this.#lastTime = Math.max(this.#lastTime, last);
  }

  /** Also those that did not fit before: storage must not have only the later ones. */
  #keepAll() {
    for (const entry of this.entries) if (!entry.kept) this.#keep(entry);
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

  /** Whether it worked. @param {(storage: StorageLike) => void} use */
  #store(use) {
    if (this.#storage === null || !this.#prefix) return false;
    try {
      use(this.#storage ?? localStorage);
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

/** @param {string} clientId @param {string | null} text */
function readUnsent(clientId, text) {
  const item = parseObject(text) ?? {};
  const { kind = "message", chat_id, message_id, content, code } = item;
  const id = kind === "message" ? chat_id : message_id;
  if (typeof content !== "string" || !Number.isInteger(id)) return null;
  if (!["message", "edit", "delete"].includes(kind)) return null;
  const place = code ? "failed" : "waiting";
  return newUnsent(clientId, { ...item, kept: true, tried: true, place });
}

/** @param {Unsent} entry */
function commandFor({ kind, client_id, chat_id, message_id, content, if_rev }) {
  const ref = client_id;
  if (kind === "edit")
    return { type: "edit_message", message_id, content, if_rev, ref };
  if (kind === "delete") return { type: "delete_message", message_id, ref };
  return { type: "send_message", chat_id, content, client_id, ref };
}

/** @param {Unsent} entry @returns {[string, string, object?]} */
function requestFor({ kind, client_id, chat_id, message_id, content, if_rev }) {
  const path = `/api/v1/messages/${message_id}`;
  if (kind === "edit") return ["PATCH", path, { content, if_rev }];
  if (kind === "delete") return ["DELETE", path];
  return ["POST", `/api/v1/chats/${chat_id}/messages`, { content, client_id }];
}

/**
 * The rule of rev: of two states of a message, the one with the larger rev counts. The
 * newest is kept as long as an older one may be on its way, in an event or an answer.
 */
class NewestMessages {
  /** @type {Map<number, Message>} */
  #changed = new Map();
  #requests = 0;

  /** @param {Message} message */
  of(message) {
    const known = this.#changed.get(message.id);
    if (known && (known.rev ?? 0) > (message.rev ?? message.id)) return known;
    if (message.rev) this.#changed.set(message.id, message);
    return message;
  }

  /** @param {any} answer */
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

  /** @param {number} seq */
  requestEnds(seq) {
    this.#requests -= 1;
    this.prune(seq);
  }

  /** @param {number} seq */
  prune(seq) {
    if (this.#requests > 0) return;
    for (const [id, { rev = 0 }] of this.#changed)
      if (rev <= seq) this.#changed.delete(id);
  }

  forget() {
    this.#changed.clear();
  }
}

/** @param {string} cursor */
function parseCursor(cursor) {
  const dot = cursor.lastIndexOf(".");
  return { epoch: cursor.slice(0, dot), seq: Number(cursor.slice(dot + 1)) };
}

/** After an `await`, #attempt says whether the work is still wanted. */
export class ChatWebSocket {
  #base;
  #bearer;
  #log;
  #unsent;
  #newest = new NewestMessages();
  /** @type {Map<string, Set<(event: any) => void>>} */
  #listeners = new Map();

  /** @type {TokenSource | undefined} */
  #token;
  /** @type {string | undefined} */
  #fetchedToken;
  /** @type {number | undefined} */
  #userId;

  /** @type {State | null} */
  #ended = "closed";
  /** @type {WebSocket | null} */
  #socket = null;
  #ready = false;
  #attempt = 0;
  #failures = 0;
  #connectedAt = 0;
  #attemptAt = 0;
  #tokenInDoubt = false;
  /** @type {number | null} */
  #byeSeconds = null;
  /** @type {number | null} */
  #retryAt = null;
  #retryTimer = 0;
  #connectTimer = 0;
  #watchTimer = 0;
  #watchedAt = 0;
  #adoptTimer = 0;
  #receivedAt = 0;
  #pongBy = 0;
  #renewedAt = -Infinity;

  #polling = false;
  #pollTimer = 0;
  /** Aborts every request that replaces the socket. */
  #fallback = new AbortController();
  #reachable = true;

  #cursor = { epoch: "", seq: -1 };
  /** No event after this seq was missed. */
  #gaplessFrom = -1;
  #gaps = 0;
  /** The last list of chats has what the events up to here say of them. */
  #listedUpTo = -1;
  /** Events that wait for #fetching. @type {LoggedEvent[] | null} */
  #held = null;
  /** @type {Promise<Snapshot> | null} */
  #fetching = null;

  #sendNotBefore = 0;
  #sendTimer = 0;
  /** @type {Map<number, typeof NEW_MARK>} */
  #marks = new Map();
  /** @type {Map<number, {sentAt: number, timer: number}>} */
  #typing = new Map();
  #lastState = "";

  /** @param {Options} [options] */
  constructor({ server, bearer, storage, log = console } = {}) {
    this.#base = new URL(server ?? new URL("..", import.meta.url));
    if (!this.#base.pathname.endsWith("/")) this.#base.pathname += "/";
    this.#bearer = bearer;
    this.#log = log;
    this.#unsent = new UnsentMessages(storage);
    this.#learnUserFrom(bearer);
  }

  /* ---- public methods ---- */

  /**
   * Calls `listener` for each such event, until the returned function is called.
   * @template {keyof ChatEvents} Type
   * @param {Type} type @param {(event: ChatEvents[Type]) => void} listener
   * @returns {() => void}
   */
  on(type, listener) {
    const listeners = this.#listeners.get(type) ?? new Set();
    this.#listeners.set(type, listeners.add(listener));
    return () => listeners.delete(listener);
  }

  /**
   * Connects, or connects anew.
   * @param {TokenSource} [token] a JWT, or a function that fetches one for each
   *   connection, or throws an error with `status` 401. Default: tickets, by `bearer`.
   */
  connect(token) {
    if (token === undefined && this.#bearer === undefined)
      throw new TypeError("connect: pass a token, or pass `bearer` to the constructor");
    this.#stop();
    this.#token = token;
    this.#fetchedToken = undefined;
    this.#tokenInDoubt = false;
    if (this.#learnUserFrom(token)) this.#start();
  }

  /** Closes the connection until the next connect. */
  disconnect() {
    this.#end("closed");
  }

  /** Also drops what is unsent: for signing out. */
  forget() {
    this.disconnect();
    for (const entry of this.#unsent.entries) this.#discard(entry);
  }

  /** Tries the socket now, if an attempt is scheduled, or after `too_many`. */
  retry() {
    if (this.#ended === "too_many") this.#start();
    else if (this.#retryAt !== null) void this.#open();
  }

  /** @returns {State} */
  get state() {
    if (this.#ended) return this.#ended;
    if (this.#ready) return "connected";
    const network = globalThis.navigator?.onLine !== false;
    if (this.#polling) return this.#reachable && network ? "polling" : "offline";
    return "connecting";
  }

  /** Seconds until the next attempt to open a socket; null: none is scheduled. */
  get retryIn() {
    return this.#retryAt === null ? null : Math.max(0, (this.#retryAt - now()) / 1000);
  }

  get userId() {
    return this.#userId;
  }

  /**
   * Sends a message as soon as possible; "delivery" events report its state.
   * @param {number} chatId @param {string} content @returns {string} its client_id
   */
  send(chatId, content) {
    return this.#enqueue({ chat_id: chatId, content });
  }

  /**
   * Replaces edits of the message that failed or were never tried.
   * @param {number} messageId @param {string} content
   * @param {{ifRev?: number}} [options] the edit fails if the message has another rev
   * @returns {string} its client_id
   */
  editMessage(messageId, content, { ifRev } = {}) {
    const replaced = this.#changesOf(
      messageId,
      ({ kind, tried, place }) => kind === "edit" && (!tried || place === "failed"),
    );
    const edit = { message_id: messageId, content, if_rev: ifRev };
    return this.#enqueue({ kind: "edit", ...edit }, replaced);
  }

  /**
   * Drops the message's edits that wait, and changes that failed.
   * @param {number} messageId @returns {string} its client_id
   */
  deleteMessage(messageId) {
    const replaced = this.#changesOf(
      messageId,
      ({ kind, place }) => kind === "edit" || place === "failed",
    );
    const deletion = this.#unsent.entries.find(
      ({ kind, message_id, place }) =>
        kind === "delete" && message_id === messageId && place !== "failed",
    );
    if (!deletion)
      return this.#enqueue({ kind: "delete", message_id: messageId }, replaced);
    for (const entry of replaced) this.#discard(entry);
    return deletion.client_id;
  }

  /** The unsent messages of a chat, oldest first. @param {number} chatId */
  unsent(chatId) {
    return this.#pending((entry) => entry.chat_id === chatId);
  }

  /** The edits and deletions that wait or have failed. */
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
   * Call it at each key; the typing sign ends 5 s after the last call.
   * @param {number} chatId @param {boolean} isTyping
   */
  sendTyping(chatId, isTyping) {
    const before = this.#typing.get(chatId);
    const command = { type: "typing", chat_id: chatId, is_typing: isTyping };
    clearTimeout(before?.timer);
    if (!isTyping) {
      if (this.#typing.delete(chatId)) this.#sendCommand(command);
      return;
    }
    const due = !before || elapsed(before.sentAt) >= TYPING_REPEAT_SECONDS;
    if (due) this.#sendCommand(command);
    this.#typing.set(chatId, {
      sentAt: due ? now() : before.sentAt,
      timer: after(TYPING_STOP_SECONDS, () => this.sendTyping(chatId, false)),
    });
  }

  /** Up to this message. @param {number} chatId @param {number} messageId */
  markRead(chatId, messageId) {
    const mark = this.#marks.get(chatId) ?? { ...NEW_MARK };
    if (messageId <= mark.wanted) return;
    mark.wanted = messageId;
    this.#marks.set(chatId, mark);
    this.#sendMark(chatId);
  }

  /**
   * Fetches all chats. Events wait meanwhile: "chats" comes first, then what followed.
   * @returns {Promise<Snapshot>} @throws {ChatError} then try again
   */
  fetchChats() {
    this.#held ??= [];
    this.#fetching ??= this.#fetchChats();
    return this.#fetching;
  }

  /**
   * Fetches messages, oldest first.
   * @param {number} chatId @param {HistoryQuery} [where] @returns {Promise<History>}
   */
  history(chatId, where) {
    return this.request("GET", `/api/v1/chats/${chatId}/messages${query(where)}`);
  }

  /**
   * Newest first; go on with `before` until it is null.
   * @param {SearchQuery} what @param {AbortSignal} [signal] @returns {Promise<Found>}
   */
  search({ q, chatId, before }, signal) {
    const text = query({ q, chat_id: chatId, before });
    return this.request("GET", `/api/v1/search${text}`, undefined, signal);
  }

  /** One page. @param {ChatsQuery} [page] @returns {Promise<ChatPage>} */
  chats(page) {
    return this.request("GET", `/api/v1/chats${query(page)}`);
  }

  /** @param {number} chatId @returns {Promise<Chat>} members have `online` */
  async chat(chatId) {
    return (await this.request("GET", `/api/v1/chats/${chatId}`)).chat;
  }

  /**
   * @param {number} chatId @param {MembersQuery} [which] @returns {Promise<MemberPage>}
   */
  members(chatId, { ids, ...page } = {}) {
    const text = query({ ids: ids?.join(","), ...page });
    return this.request("GET", `/api/v1/chats/${chatId}/members${text}`);
  }

  /** @param {NewChat} chat @returns {Promise<Chat>} */
  async createChat({ title, memberIds, direct, clientId }) {
    const body = { title, member_ids: memberIds, direct, client_id: clientId };
    return (await this.request("POST", "/api/v1/chats", body)).chat;
  }

  /** @param {number} chatId @param {string | null} title */
  renameChat(chatId, title) {
    return this.request("PATCH", `/api/v1/chats/${chatId}`, { title });
  }

  /**
   * For a link to `/#invite=TOKEN`.
   * @param {number} chatId @param {{ttlSeconds?: number}} [options]
   * @returns {Promise<Token>}
   */
  createInvite(chatId, { ttlSeconds } = {}) {
    const body = { ttl_seconds: ttlSeconds };
    return this.request("POST", `/api/v1/chats/${chatId}/invites`, body);
  }

  /** Revokes all of the chat. @param {number} chatId */
  revokeInvites(chatId) {
    return this.request("DELETE", `/api/v1/chats/${chatId}/invites`);
  }

  /** Needs no connect. @param {string} token @returns {Promise<Preview>} */
  previewInvite(token) {
    return this.#fetch("POST", "/api/v1/join", null, { token });
  }

  /**
   * Needs no connect.
   * @param {string} token @param {string} name @returns {Promise<Joined>}
   */
  joinAsNewUser(token, name) {
    return this.#fetch("POST", "/api/v1/join", null, { token, name });
  }

  /** @param {string} token @returns {Promise<{chat_id: number}>} */
  join(token) {
    return this.request("POST", "/api/v1/join", { token });
  }

  /** @param {string} name */
  renameMe(name) {
    return this.request("PATCH", "/api/v1/me", { name });
  }

  /** For a link to `/#token=TOKEN`. @returns {Promise<Token>} */
  linkDevice() {
    return this.request("POST", "/api/v1/me/link");
  }

  /**
   * Sends one HTTP request, with the token.
   * @param {string} method @param {string} path e.g. "/api/v1/chats"
   * @param {object} [body] sent as JSON @param {AbortSignal} [signal]
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

  /** @param {Partial<Unsent>} fields @param {Unsent[]} [replaced] */
  #enqueue(fields, replaced = []) {
    const content = String(fields.content ?? "").toWellFormed();
    const entry = this.#unsent.add({ ...fields, content, epoch: this.#cursor.epoch });
    for (const old of replaced) this.#discard(old); // now: a crash loses no change
    this.#reportDelivery(entry);
    this.#sendUnsent();
    return entry.client_id;
  }

  /** @param {number} messageId @param {(change: Unsent) => boolean} which */
  #changesOf(messageId, which) {
    return [...this.#unsent.at("waiting"), ...this.#unsent.at("failed")].filter(
      (entry) => entry.message_id === messageId && which(entry),
    );
  }

  /** @param {(entry: Unsent) => boolean} which */
  #pending(which) {
    return this.#unsent.entries.filter(which).map((entry) => delivery(entry));
  }

  /* ---- connecting ---- */

  #start() {
    this.#ended = null;
    this.#failures = 0;
    this.#listenToBrowser(true);
    this.#adoptTimer = every(ADOPT_SECONDS, () => {
      for (const entry of this.#unsent.adopt()) this.#reportDelivery(entry);
      this.#sendUnsent();
    });
    this.#schedulePolling();
    void this.#open();
  }

  async #open() {
    const attempt = ++this.#attempt;
    clearTimeout(this.#retryTimer);
    this.#retryAt = null;
    this.#attemptAt = now();
    this.#reportState();
    this.#connectTimer = after(CONNECT_SECONDS, () => this.#connectionLost(1006));
    try {
      const token = await this.#socketToken();
      if (attempt === this.#attempt) this.#socket = this.#newSocket(token);
    } catch (/** @type {any} */ error) {
      if (attempt !== this.#attempt) return;
      if (isSignedOut(error)) this.#end("signed_out");
      else this.#connectionLost(0, error?.retryAfter);
    }
  }

  /** @param {string} token */
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
      // A browser does not say why a handshake was refused, but a request does.
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

  /** @param {number} code @param {number} [retryAfterSeconds] */
  #connectionLost(code, retryAfterSeconds) {
    const steady = this.#ready && elapsed(this.#connectedAt) >= STEADY_SECONDS;
    const wait = this.#byeSeconds ?? retryAfterSeconds;
    const [onItsWay] = this.#unsent.at("socket");
    if (code === 1009 && onItsWay)
      this.#messageRefused(onItsWay, "too_large", "The message is too long.");
    this.#dropSocket();
    if (steady) this.#failures = 0;
    if (code === 4503) return this.#end("signed_out");
    if (code === 4504) return this.#end("too_many");
    if (code >= 4500 && code < 5000) return this.#end("refused");
    this.#tokenInDoubt = code === 1006 || code === 4401;
    this.#schedulePolling();
    this.#retryIn(wait ?? this.#backoff());
  }

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

  #probeOrRetry() {
    if (this.#ready) this.#ping(PROBE_SECONDS);
    else if (elapsed(this.#attemptAt) >= 1) this.retry();
  }

  #dropSocket() {
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
    socket.close(1000);
  }

  #stop() {
    this.#dropSocket();
    this.#stopPolling();
    clearTimeout(this.#retryTimer);
    clearInterval(this.#adoptTimer);
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
    const { type } = frame;
    if (type === "connected") return this.#handleConnected(frame);
    if (frame.seq) return this.#acceptEvent(frame);
    if (type === "ack") this.#handleAck(frame);
    else if (type === "error") this.#handleError(frame);
    else if (type === "token_expiring") void this.#renewToken();
    else if (type === "bye") this.#byeSeconds = frame.retry_after;
    this.#emit(type, frame);
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
    this.#watchTimer = every(WATCH_SECONDS, () => this.#watch());
    // A socket without a cursor is "fresh". If a poll has brought a cursor meanwhile,
    // the events between the two are missing.
    const hasCursor = this.#cursor.seq >= 0;
    const fresh = frame.resume === "fresh";
    const resync = frame.resume === "resync" || (fresh && hasCursor);
    if (fresh || resync) this.#restartAt(frame.cursor);
    else this.#moveCursor(frame.cursor);
    this.#reportState();
    this.#emit("connected", frame);
    if (resync) this.#emit("resync", {});
    this.#sendWaiting();
  }

  /** @param {TokenSource | undefined} token @returns {boolean} */
  #learnUserFrom(token) {
    const userId = typeof token === "string" ? userIdOf(token) : undefined;
    return userId === undefined || this.#acceptUser(userId);
  }

  /** Another user than before ends it. @param {number} userId @returns {boolean} */
  #acceptUser(userId) {
    if (this.#userId === undefined) {
      this.#userId = userId;
      globalThis.addEventListener?.("storage", this.#onStorage); // also before connect
      this.#unsent.open(`chatd.unsent.${this.#base.host}.${userId}.`);
      for (const entry of this.#unsent.entries) this.#reportDelivery(entry);
    }
    if (this.#userId === userId) return true;
    this.#end("signed_out");
    return false;
  }

  /** @param {LoggedEvent} event */
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

  /** A poll may be ahead of the socket. @param {string} text */
  #moveCursor(text) {
    const cursor = parseCursor(text);
    if (cursor.epoch !== this.#cursor.epoch) this.#restartAt(text);
    else if (cursor.seq > this.#cursor.seq) this.#cursor = cursor;
  }

  /** @param {string} text */
  #restartAt(text) {
    const { epoch } = this.#cursor;
    this.#cursor = parseCursor(text);
    this.#gaps += 1;
    this.#listedUpTo = -1;
    this.#gaplessFrom = this.#cursor.seq;
    if (this.#held) this.#held = [];
    if (epoch === this.#cursor.epoch) return;
    if (epoch) {
      // A backup was restored: ids may mean others now.
      this.#newest.forget();
      this.#marks.clear();
    }
    // Not when an entry is adopted later: its tab may have known a newer epoch.
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

  /** A list from before #gaplessFrom has a gap; one of another epoch may be older. */
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

  /** A chat that becomes active moves to the first page, so it is fetched once more. */
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

  /** A late run means that the computer has slept. */
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

  /** @param {number} seconds */
  #ping(seconds) {
    const by = now() + seconds * 1000;
    if (this.#pongBy && this.#pongBy <= by) return;
    this.#pongBy = by;
    this.#sendCommand({ type: "ping" });
  }

  /** @param {boolean} on */
  #listenToBrowser(on) {
    const change = on ? "addEventListener" : "removeEventListener";
    globalThis[change]?.("online", this.#onNetwork);
    globalThis[change]?.("offline", this.#onNetwork);
    globalThis[change]?.("focus", this.#onVisible);
    globalThis.document?.[change]("visibilitychange", this.#onVisible);
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
      // The client reconnects after 4401.
    }
  }

  /* ---- polling ---- */

  #schedulePolling() {
    this.#pollTimer ||= after(FALLBACK_SECONDS, () => {
      this.#log?.log(`[WebSocket] Not connected, polling every ${POLL_SECONDS} s`);
      this.#polling = true;
      this.#reachable = true;
      this.#reportState();
      void this.#pollOnce();
    });
  }

  async #pollOnce() {
    const { signal } = this.#fallback;
    const cursor = this.#cursorText();
    let wait = POLL_SECONDS;
    try {
      const path = `/api/v1/events${query({ limit: 500, cursor })}`;
      const answer = await this.request("GET", path, undefined, signal);
      if (answer.more) wait = 0;
      if (!signal.aborted) this.#handlePoll(answer, cursor === null);
    } catch (/** @type {any} */ error) {
      wait = Math.max(wait, error.retryAfter ?? 0);
      if (!signal.aborted) this.#setReachable(false);
    }
    if (!signal.aborted) this.#pollTimer = after(wait, () => void this.#pollOnce());
  }

  /**
   * @param {{events: LoggedEvent[], cursor: string, resync: boolean}} answer
   * @param {boolean} withoutCursor
   */
  #handlePoll({ events, cursor, resync }, withoutCursor) {
    const { signal } = this.#fallback;
    for (const event of events) {
      if (signal.aborted) return; // a listener has called disconnect
      this.#acceptEvent(event);
    }
    if (resync || (withoutCursor && this.#cursor.seq < 0)) this.#restartAt(cursor);
    else if (!withoutCursor) this.#moveCursor(cursor);
    if (resync) this.#emit("resync", {});
    this.#setReachable(true);
    this.#sendWaiting();
  }

  /** @param {boolean} reachable */
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

  #sendWaiting() {
    for (const chatId of this.#marks.keys()) this.#sendMark(chatId);
    this.#sendUnsent();
  }

  /** One at a time, or the server could refuse the first and store the second. */
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
    else if (this.#ready) {
      Object.assign(next, { place: "socket", sentAt: now(), tried: true });
      this.#sendCommand(commandFor(next));
    } else if (this.#polling) void this.#sendByHttp(next);
  }

  /** @param {Unsent} entry */
  async #sendByHttp(entry) {
    const { client_id } = entry;
    const { signal } = this.#fallback;
    Object.assign(entry, { place: "http", tried: true });
    const [method, path, body] = requestFor(entry);
    try {
      const { message } = (await this.request(method, path, body, signal)) ?? {};
      if (entry.kind !== "message")
        return this.#changeStored(entry, message?.rev ?? message?.id, message);
      this.#acceptUser(message.sender_id);
      this.#messageStored({ ...message, client_id });
    } catch (error) {
      if (signal.aborted) return; // the socket is back and sends the message
      // Or else no token could be fetched.
      const known = error instanceof ChatError ? error : unreachable();
      const { status, code, message, retryAfter } = known;
      this.#messageRefused(entry, code, message, status ? retryAfter : POLL_SECONDS);
      this.#sendUnsent();
    }
  }

  /** @param {string} [ref] `read CHAT MESSAGE` @param {number} [retry] seconds */
  #markAnswered(ref = "", retry) {
    const [kind, chatId, messageId] = ref.split(" ");
    const mark = this.#marks.get(Number(chatId));
    if (kind !== "read" || !mark) return;
    if (retry !== undefined) after(retry, () => this.#sendMark(Number(chatId)));
    else mark.settled = Math.max(mark.settled, Number(messageId));
  }

  /** @param {Ack} ack */
  #handleAck(ack) {
    this.#markAnswered(ack.ref);
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
    const final = FINAL_REFUSALS.has(code);
    this.#markAnswered(ref, final ? undefined : (retry_after ?? REFUSED_SECONDS));
    const entry = this.#unsent.find(client_id ?? ref); // chatd 1.0 repeats only `ref`
    if (entry?.place !== "socket") return;
    this.#messageRefused(entry, code, message, retry_after);
    this.#sendUnsent();
  }

  /**
   * The ack, the 201 and the event all say so; the first to arrive counts.
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
   * @param {Unsent} entry @param {number | undefined} rev @param {Message} [message]
   */
  #changeStored(entry, rev, message) {
    if (!this.#unsent.entries.includes(entry)) return;
    this.#unsent.remove(entry, rev);
    this.#emit("delivery", { ...delivery(entry, "sent"), ...(message && { message }) });
    this.#sendUnsent();
  }

  /**
   * @param {Unsent} entry @param {string} code @param {string} reason
   * @param {number} [seconds]
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
    const settle = () => {
      mark.settled = Math.max(mark.settled, message_id);
    };
    mark.sentAt = now();
    if (this.#ready) {
      const ref = `read ${chatId} ${message_id}`;
      this.#sendCommand({ type: "mark_read", message_id, ref });
    } else if (this.#polling) {
      this.request("POST", `/api/v1/messages/${message_id}/read`).then(
        settle,
        ({ code }) => FINAL_REFUSALS.has(code) && settle(),
      );
    }
  }

  /** @param {object} command */
  #sendCommand(command) {
    if (this.#ready && this.#socket?.readyState === 1)
      this.#socket.send(JSON.stringify(command));
  }

  /* ---- HTTP ---- */

  /**
   * After a 401, tries a newer token once. (The function of connect may return tickets,
   * which HTTP refuses.)
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

  /** @param {boolean} fresh */
  async #httpToken(fresh) {
    const source = this.#bearer ?? this.#token;
    if (source === undefined)
      throw new TypeError("request: call connect with a token first");
    if (typeof source === "string") return source;
    if (fresh || this.#fetchedToken === undefined) this.#fetchedToken = await source();
    return this.#fetchedToken;
  }

  /**
   * @param {string} method @param {string} path @param {string | null} token
   * @param {object} [body] @param {AbortSignal} [signal]
   */
  async #fetch(method, path, token, body, signal) {
    const limit = new AbortController();
    const abort = () => limit.abort();
    const timer = after(REQUEST_SECONDS, abort);
    if (signal?.aborted) abort();
    signal?.addEventListener("abort", abort); // AbortSignal.any leaks in Node 20
    try {
      return await readAnswer(
        await fetch(new URL(path.replace(/^\//, ""), this.#base), {
          method,
          headers: {
            ...(token && { Authorization: `Bearer ${token}` }),
            ...(body && { "Content-Type": "application/json" }),
          },
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

  #reportState() {
    const { state, retryIn } = this;
    const text = `${state} ${this.#retryAt}`;
    if (text === this.#lastState) return;
    this.#lastState = text;
    this.#emit("state", { state, retryIn });
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

/* ---- small functions ---- */

/** @param {Unsent} entry @param {Delivery["state"]} [state] @returns {Delivery} */
function delivery(entry, state = entry.place === "failed" ? "failed" : "sending") {
  const { kind, client_id, chat_id, message_id, content, kept, code, reason } = entry;
  const failure = code && { code, reason: reason ?? "" };
  return { state, kind, client_id, chat_id, message_id, content, kept, ...failure };
}

/** @param {object} [parameters] */
function query(parameters = {}) {
  const given = Object.entries(parameters).filter(([, value]) => value != null);
  return given.length ? `?${new URLSearchParams(given)}` : "";
}

/** @param {any} text @returns {any} */
function parseObject(text) {
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" ? value : null;
  } catch {
    return null;
  }
}

/** @param {string} token @returns {number | undefined} */
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
    // A proxy answers while chatd is away or slow: that is no refusal.
    code = /^4(?!08|29)/.test(String(answer.status)) ? "internal" : "upstream",
    message = `The chat server answered with HTTP status ${answer.status}.`,
    retry_after,
  } = body?.error ?? {};
  throw new ChatError(answer.status, code, message, retry_after);
}

/** @param {any} error */
function isSignedOut(error) {
  return Number(error?.status) === 401;
}

function unreachable(text = "The chat server does not answer.") {
  return new ChatError(0, "unreachable", text);
}

/** Unlike Date.now(), it never goes back. */
function now() {
  return performance.now();
}

/** @param {number} since @returns {number} */
function elapsed(since) {
  return (now() - since) / 1000;
}

/** @param {number} seconds @param {() => void} task */
function after(seconds, task) {
  return setTimeout(task, seconds * 1000);
}

/** @param {number} seconds @param {() => void} task */
function every(seconds, task) {
  return setInterval(task, seconds * 1000);
}
