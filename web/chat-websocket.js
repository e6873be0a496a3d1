// @ts-check
/**
 * A dependable connection to chatd (docs/embedding.md): each event comes once and in
 * order, or else "resync". What you send is stored once.
 *
 * @import { Ack, Chat, Client, Connected, Delivery, LoggedEvent, Message, Options, ReadMark,
 *   Refusal, Snapshot, State, StorageLike, TokenSource, Unsent } from "./protocol.js"
 */

/** Doubled by each failure. */
const FIRST_RETRY_SECONDS = 0.5;
const FALLBACK_SECONDS = 5;
const POLL_SECONDS = 5;
const RETRY_SECONDS = 30;
const CONNECT_SECONDS = 10;
const STEADY_SECONDS = 5;
/** JavaScript cannot see the server's pings, so the client sends its own. */
const SILENCE_SECONDS = 25;
const PONG_SECONDS = 10;
const PROBE_SECONDS = 4;
const WATCH_SECONDS = 2;
const RENEW_SECONDS = 15;
const ANSWER_SECONDS = 20;
const REQUEST_SECONDS = 15;
const RETRY_AFTER_SECONDS = 2;
const ADOPT_SECONDS = 15;
const TYPING_REPEAT_SECONDS = 3;
const TYPING_STOP_SECONDS = 5;
const MARK_SECONDS = 1;

/** For good, but after "internal" an event may still say that it was stored. */
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

export class ChatError extends Error {
  /**
   * @param {number} status @param {string} code @param {string} message
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

/** What is unsent, in all tabs. A change that two of them send could undo a later one. */
class UnsentMessages {
  /** Oldest first. @type {Unsent[]} */
  entries = [];
  #storage;
  /** Empty until the user is known. */
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
    this.adoptAll();
  }

  adoptAll() {
    this.#keepAll();
    this.#insert(this.#others());
  }

  /** Adopts what was there at the last call, too: its tab has closed. */
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

  /** @param {number} messageId */
  changesOf(messageId) {
    return this.entries.filter((entry) => entry.message_id === messageId);
  }

  /** @param {Unsent} entry @param {Partial<Unsent>} fields */
  update(entry, fields) {
    Object.assign(entry, fields);
    this.#keep(entry);
  }

  /** @param {Unsent} entry @param {number | "discarded"} [news] for other tabs */
  remove(entry, news) {
    const key = this.#prefix + entry.client_id;
    if (news) this.#store((storage) => storage.setItem(key, String(news)));
    this.#store((storage) => storage.removeItem(key));
    this.#drop(entry, Number(news));
  }

  /** @param {Unsent} entry @param {number} rev */
  #drop(entry, rev) {
    const { message_id, if_rev } = entry;
    this.entries = this.entries.filter((other) => other !== entry);
    // A later edit of the same state becomes one of the new state.
    for (const later of this.entries)
      if (rev && if_rev && later.message_id === message_id && later.if_rev === if_rev)
        this.update(later, { if_rev: rev });
  }

  /** @param {string | null} key @param {string | null} value */
  settledElsewhere(key, value) {
    if (!this.#prefix || !key?.startsWith(this.#prefix)) return;
    const entry = this.find(key.slice(this.#prefix.length));
    const rev = Number(value); // 0: removed; NaN: written
    // The server tells of a message that is on its way.
    const waits = entry?.kind === "message" && entry.place !== "failed";
    const settled = rev >= 0 && !waits;
    if (!entry || (value !== "discarded" && !settled)) return;
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

  /** If storage was full, it must not have only the later entries. */
  #keepAll() {
    for (const entry of this.entries) if (!entry.kept) this.#keep(entry);
  }

  /** @param {Unsent} entry */
  #keep(entry) {
    // A page of 1.0 would send an item with a chat_id as a message.
    const change = ["kind", "message_id", "if_rev", "epoch", "chat"];
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

  /** @param {(storage: StorageLike) => void} use */
  #store(use) {
    if (this.#storage === null || !this.#prefix) return false;
    try {
      use(this.#storage ?? localStorage);
      return true;
    } catch {
      return false; // full or forbidden
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
    sentAt: null,
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
  return newUnsent(clientId, { ...item, kept: true, sentAt: 0, place });
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

/** Keeps the newest state of a message as long as an older one may arrive. */
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
    if (messages) answer.messages = messages.map(this.of, this);
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

/** @param {string} [cursor] */
function parseCursor(cursor = ".-1") {
  const [epoch = "", seq] = cursor.split(".");
  return { epoch, seq: Number(seq) };
}

/** @implements {Client} */
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
  /** If it has changed after an `await`, stop. */
  #attempt = 0;
  #failures = 0;
  #connectedAt = 0;
  #attemptAt = 0;
  #tokenInDoubt = false;
  /** @type {number | undefined} */
  #byeSeconds;
  /** @type {number | null} */
  #retryAt = null;
  #retryTimer = 0;
  #connectTimer = 0;
  #watchTimer = 0;
  #watchedAt = 0;
  #adoptTimer = 0;
  #receivedAt = 0;
  #pongBy = Infinity;
  #renewedAt = -Infinity;

  /** @type {"polling" | "offline" | null} */
  #polling = null;
  #pollTimer = 0;
  #fallback = new AbortController();

  #cursor = { epoch: "", seq: -1 };
  /** No event since this cursor was missed. */
  #gapless = this.#cursor;
  /** The last list of chats has the events up to here. */
  #listedUpTo = -1;
  /** Events that wait for #fetching. @type {LoggedEvent[] | null} */
  #held = null;
  /** @type {Promise<Snapshot> | null} */
  #fetching = null;

  #sendNotBefore = 0;
  #sendTimer = 0;
  /** @type {Map<number, ReadMark>} */
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

  /* ---- public methods: see Client in protocol.d.ts ---- */

  /** @type {Client["on"]} */
  on(type, listener) {
    const listeners = this.#listeners.get(type) ?? new Set();
    this.#listeners.set(type, listeners.add(listener));
    return () => listeners.delete(listener);
  }

  /** @type {Client["connect"]} */
  connect(token) {
    if (!(token || this.#bearer))
      throw new TypeError("connect: pass a token, or pass `bearer` to the constructor");
    this.#stop();
    this.#token = token;
    this.#fetchedToken = undefined;
    this.#tokenInDoubt = false;
    if (this.#learnUserFrom(token)) this.#start();
  }

  disconnect() {
    this.#end("closed");
  }

  forget() {
    this.disconnect();
    this.#unsent.adoptAll();
    for (const entry of this.#unsent.entries) this.#discard(entry);
  }

  retry() {
    if (this.#ended === "too_many") this.#start();
    else if (this.#retryAt !== null) void this.#open();
  }

  /** @returns {State} */
  get state() {
    if (this.#ended) return this.#ended;
    if (this.#ready) return "connected";
    const network = globalThis.navigator?.onLine !== false;
    if (this.#polling && !network) return "offline";
    return this.#polling ?? "connecting";
  }

  get retryIn() {
    return this.#retryAt && Math.max(0, (this.#retryAt - now()) / 1000);
  }

  get userId() {
    return this.#userId;
  }

  /** @type {Client["send"]} */
  send(chatId, content) {
    return this.#enqueue({ chat_id: chatId, content });
  }

  /** @type {Client["editMessage"]} */
  editMessage(messageId, content, { ifRev, chatId } = {}) {
    const replaced = this.#unsent
      .changesOf(messageId)
      .filter(
        ({ kind, sentAt, place }) =>
          kind === "edit" && (sentAt === null || place === "failed"),
      );
    const edit = { message_id: messageId, content, if_rev: ifRev, chat: chatId };
    return this.#enqueue({ kind: "edit", ...edit }, replaced);
  }

  /** @type {Client["deleteMessage"]} */
  deleteMessage(messageId, { chatId } = {}) {
    const changes = this.#unsent.changesOf(messageId);
    const replaced = changes.filter(
      ({ kind, place }) =>
        place === "failed" || (kind === "edit" && place === "waiting"),
    );
    const same = changes.find(
      ({ kind, place }) => kind === "delete" && place !== "failed",
    );
    const deletion = { message_id: messageId, chat: chatId };
    if (!same) return this.#enqueue({ kind: "delete", ...deletion }, replaced);
    for (const entry of replaced) this.#discard(entry);
    return same.client_id;
  }

  /** @type {Client["unsent"]} */
  unsent(chatId) {
    if (!chatId) this.#unsent.adoptAll();
    return this.#pending((entry) => !chatId || entry.chat_id === chatId);
  }

  unsentChanges() {
    return this.#pending((entry) => entry.kind !== "message");
  }

  /** @type {Client["resend"]} */
  resend(clientId) {
    const entry = this.#unsent.find(clientId);
    if (entry?.place !== "failed") return;
    const fresh = { code: undefined, reason: undefined };
    this.#unsent.update(entry, { place: "waiting", ...fresh });
    this.#emit("delivery", delivery(entry));
    this.#sendUnsent();
  }

  /** @type {Client["discard"]} */
  discard(clientId) {
    const entry = this.#unsent.find(clientId);
    if (entry?.place === "failed") this.#discard(entry);
  }

  /** @type {Client["sendTyping"]} */
  sendTyping(chatId, isTyping) {
    const { sentAt = -Infinity, timer } = this.#typing.get(chatId) ?? {};
    const command = { type: "typing", chat_id: chatId, is_typing: isTyping };
    clearTimeout(timer);
    if (!isTyping) {
      if (this.#typing.delete(chatId)) this.#sendCommand(command);
      return;
    }
    const due = elapsed(sentAt) >= TYPING_REPEAT_SECONDS;
    if (due) this.#sendCommand(command);
    this.#typing.set(chatId, {
      sentAt: due ? now() : sentAt,
      timer: after(TYPING_STOP_SECONDS, () => this.sendTyping(chatId, false)),
    });
  }

  /** @type {Client["markRead"]} */
  markRead(chatId, messageId) {
    const mark = this.#marks.get(chatId) ?? { messageId: 0, sentAt: -Infinity };
    if (messageId <= mark.messageId) return;
    this.#marks.set(chatId, Object.assign(mark, { messageId, settled: false }));
    this.#sendMark(chatId);
  }

  fetchChats() {
    return (this.#fetching ??= this.#fetchChats());
  }

  /** @type {Client["history"]} */
  history(chatId, where) {
    return this.request("GET", `/api/v1/chats/${chatId}/messages${query(where)}`);
  }

  /** @type {Client["search"]} */
  search({ q, chatId, before }, signal) {
    const text = query({ q, chat_id: chatId, before });
    return this.request("GET", `/api/v1/search${text}`, undefined, signal);
  }

  /** @type {Client["chats"]} */
  chats(page) {
    return this.request("GET", `/api/v1/chats${query(page)}`);
  }

  /** @type {Client["chat"]} */
  async chat(chatId) {
    return (await this.request("GET", `/api/v1/chats/${chatId}`)).chat;
  }

  /** @type {Client["members"]} */
  members(chatId, { ids, ...page } = {}) {
    const text = query({ ids: ids?.join(","), ...page });
    return this.request("GET", `/api/v1/chats/${chatId}/members${text}`);
  }

  /** @type {Client["createChat"]} */
  async createChat({ title, memberIds, direct, clientId }) {
    const body = { title, member_ids: memberIds, direct, client_id: clientId };
    return (await this.request("POST", "/api/v1/chats", body)).chat;
  }

  /** @type {Client["renameChat"]} */
  renameChat(chatId, title) {
    return this.request("PATCH", `/api/v1/chats/${chatId}`, { title });
  }

  /** @type {Client["createInvite"]} */
  createInvite(chatId, { ttlSeconds } = {}) {
    const body = { ttl_seconds: ttlSeconds };
    return this.request("POST", `/api/v1/chats/${chatId}/invites`, body);
  }

  /** @type {Client["revokeInvites"]} */
  revokeInvites(chatId) {
    return this.request("DELETE", `/api/v1/chats/${chatId}/invites`);
  }

  /** @type {Client["previewInvite"]} */
  previewInvite(token) {
    return this.#fetch("POST", "/api/v1/join", null, { token });
  }

  /** @type {Client["joinAsNewUser"]} */
  joinAsNewUser(token, name) {
    return this.#fetch("POST", "/api/v1/join", null, { token, name });
  }

  /** @type {Client["join"]} */
  join(token) {
    return this.request("POST", "/api/v1/join", { token });
  }

  /** @type {Client["renameMe"]} */
  renameMe(name) {
    return this.request("PATCH", "/api/v1/me", { name });
  }

  /** @type {Client["linkDevice"]} */
  linkDevice() {
    return this.request("POST", "/api/v1/me/link");
  }

  /** @type {Client["request"]} */
  async request(method, path, body, signal) {
    for (let tries = 1; ; tries++) {
      const gapless = this.#gapless;
      this.#newest.requestBegins();
      try {
        const answer = await this.#request(method, path, body, signal);
        // What happened in a gap may be missing in the answer.
        const old = gapless !== this.#gapless && method === "GET" && answer.messages;
        if (old && tries < 5) continue;
        if (gapless.epoch === this.#cursor.epoch) this.#newest.putInto(answer);
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
    this.#emit("delivery", delivery(entry));
    this.#sendUnsent();
    return entry.client_id;
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
    this.#adoptTimer = setInterval(() => {
      for (const entry of this.#unsent.adopt()) this.#emit("delivery", delivery(entry));
      this.#sendUnsent();
    }, ADOPT_SECONDS * 1000);
    this.#schedulePolling();
    void this.#open();
  }

  async #open() {
    const attempt = ++this.#attempt;
    clearTimeout(this.#retryTimer);
    this.#retryAt = null;
    this.#byeSeconds = undefined;
    this.#attemptAt = now();
    this.#reportState();
    this.#connectTimer = after(CONNECT_SECONDS, () => this.#connectionLost(1006));
    try {
      const token = await this.#socketToken();
      if (attempt === this.#attempt) this.#socket = this.#newSocket(token);
    } catch (/** @type {any} */ error) {
      this.#log?.log(`[WebSocket] ${error}`);
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

  async #socketToken() {
    if (!this.#token) return (await this.request("GET", "/api/v2/ws-token")).token;
    if (typeof this.#token === "string") {
      // A refused handshake does not say why, but a request does.
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

  /** @param {number} code @param {number} [retryAfter] */
  #connectionLost(code, retryAfter) {
    if (this.#ready && elapsed(this.#connectedAt) >= STEADY_SECONDS) this.#failures = 0;
    const [onItsWay] = this.#unsent.at("socket");
    if (code === 1009 && onItsWay)
      this.#refused(onItsWay, "too_large", "The message is too long.");
    this.#dropSocket();
    if (code === 4503) return this.#end("signed_out");
    if (code === 4504) return this.#end("too_many");
    if (code >= 4500) return this.#end("refused");
    this.#tokenInDoubt = code === 1006 || code === 4401;
    this.#schedulePolling();
    const wait = this.#byeSeconds ?? retryAfter ?? this.#backoff();
    this.#retryAt = now() + wait * 1000;
    this.#retryTimer = after(wait, () => void this.#open());
    this.#reportState();
  }

  #backoff() {
    if (this.#polling) return Math.max(0, RETRY_SECONDS - elapsed(this.#attemptAt));
    const bound = Math.min(RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** this.#failures);
    this.#failures += 1;
    return Math.random() * bound;
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
    this.#pongBy = Infinity;
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
    if (!frame) return; // from a proxy
    this.#log?.log("WebSocket message:", frame);
    this.#receivedAt = now();
    this.#pongBy = Infinity;
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
    this.#watchTimer = setInterval(() => this.#watch(), WATCH_SECONDS * 1000);
    // If a poll has brought a cursor meanwhile, the events in between are missing.
    const missed = frame.resume === "fresh" && this.#cursor.seq >= 0;
    const resync = frame.resume === "resync" || missed;
    if (resync) this.#restartAt(frame.cursor);
    else this.#moveCursor(frame.cursor);
    this.#reportState();
    this.#emit("connected", frame);
    if (resync) this.#emit("resync", {});
    this.#sendWaiting();
  }

  /** @param {TokenSource} [token] */
  #learnUserFrom(token) {
    const userId = typeof token === "string" ? userIdOf(token) : undefined;
    return userId === undefined || this.#acceptUser(userId);
  }

  /** Another user than before ends it. @param {number} userId */
  #acceptUser(userId) {
    if (this.#userId === undefined) {
      this.#userId = userId;
      globalThis.addEventListener?.("storage", this.#onStorage); // also before connect
      this.#unsent.open(`chatd.unsent.${this.#base.host}.${userId}.`);
      for (const entry of this.#unsent.entries) this.#emit("delivery", delivery(entry));
    }
    if (this.#userId === userId) return true;
    this.#end("signed_out");
    return false;
  }

  /** @param {LoggedEvent} event */
  #acceptEvent(event) {
    if (event.seq <= this.#cursor.seq) return;
    this.#cursor = { ...this.#cursor, seq: event.seq };
    this.#newest.putInto(event);
    if (event.type === "new_message" && event.message.sender_id === this.#userId)
      this.#stored(this.#unsent.find(event.message.client_id), event.message);
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
    this.#cursor = this.#gapless = parseCursor(text);
    this.#listedUpTo = -1;
    if (this.#held) this.#held = [];
    if (epoch === this.#cursor.epoch) return;
    if (epoch) {
      // A backup was restored: ids may mean others now.
      this.#newest.forget();
      this.#marks.clear();
    }
    // But not entries adopted later: their tab may have known a newer epoch.
    for (const entry of this.#unsent.at("waiting"))
      if (entry.kind !== "message" && entry.epoch && entry.epoch !== this.#cursor.epoch)
        this.#refused(entry, "not_found", "A backup was restored since.");
  }

  #cursorText() {
    const { epoch, seq } = this.#cursor;
    return seq < 0 ? null : `${epoch}.${seq}`;
  }

  async #fetchChats() {
    this.#held = [];
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

  /** A list from before #gapless is too old; one of another epoch may be. */
  async #freshSnapshot() {
    for (let tries = 0; tries < 5; tries++) {
      const before = this.#cursor.epoch;
      const snapshot = await this.#allChats();
      const { epoch, seq } = parseCursor(snapshot.cursor);
      const known = this.#cursor.epoch;
      if (epoch === known ? seq >= this.#gapless.seq : before === known)
        return snapshot;
    }
    throw unreachable("The server's list of chats is out of date.");
  }

  /** Ends with the first page: a chat that becomes active moves there. */
  async #allChats() {
    /** @type {Map<number, Chat>} */
    const chats = new Map();
    const fetchPage = async (/** @type {any} */ before) => {
      const page = await this.chats({ limit: 100, before });
      for (const chat of page.chats) chats.set(chat.id, chat);
      return page;
    };
    const first = await fetchPage(null);
    for (let page = first; page.more; ) page = await fetchPage(page.position);
    for (let known = 0; first.more && known < chats.size; await fetchPage(null))
      known = chats.size;
    return { chats: [...chats.values()], cursor: first.cursor };
  }

  /* ---- keeping alive ---- */

  /** If it runs late, the computer has slept. */
  #watch() {
    const slept = Date.now() - this.#watchedAt > SILENCE_SECONDS * 1000;
    this.#watchedAt = Date.now();
    const [onItsWay] = this.#unsent.at("socket");
    const unanswered = elapsed(onItsWay?.sentAt ?? now()) > ANSWER_SECONDS;
    if (unanswered || now() > this.#pongBy) {
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
    if (this.#pongBy <= by) return;
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
    const entry = this.#unsent.settledElsewhere(key, newValue);
    if (!entry) return;
    this.#emit("delivery", delivery(entry, "discarded"));
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
      this.#polling = "polling";
      this.#reportState();
      void this.#pollOnce();
    });
  }

  async #pollOnce() {
    const { signal } = this.#fallback;
    const since = this.#cursorText();
    let wait = POLL_SECONDS;
    try {
      const path = `/api/v1/events${query({ limit: 500, cursor: since })}`;
      const answer = await this.request("GET", path, undefined, signal);
      if (answer.more) wait = 0;
      // A listener may call disconnect.
      for (const event of answer.events) if (!signal.aborted) this.#acceptEvent(event);
      if (signal.aborted) return;
      if (answer.resync) this.#restartAt(answer.cursor);
      // Without `since`, it would skip the events after a known cursor.
      else if (since || this.#cursor.seq < 0) this.#moveCursor(answer.cursor);
      if (answer.resync) this.#emit("resync", {});
      this.#polled("polling");
      this.#sendWaiting();
    } catch (/** @type {any} */ error) {
      wait = Math.max(wait, error?.retryAfter ?? 0);
      if (!signal.aborted) this.#polled("offline");
    }
    if (!signal.aborted) this.#pollTimer = after(wait, () => void this.#pollOnce());
  }

  /** @param {"polling" | "offline"} state */
  #polled(state) {
    const back = state === "polling" && this.#polling === "offline";
    this.#polling = state;
    this.#reportState();
    if (back) this.#probeOrRetry();
  }

  #stopPolling() {
    clearTimeout(this.#pollTimer);
    this.#fallback.abort();
    this.#fallback = new AbortController();
    this.#pollTimer = 0;
    this.#polling = null;
    this.#unsent.requeue("http");
  }

  /* ---- sending ---- */

  #sendWaiting() {
    for (const chatId of this.#marks.keys()) this.#sendMark(chatId);
    this.#sendUnsent();
  }

  /** One at a time: the server may refuse the first and store the second. */
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
    else if (this.#ready || this.#polling) {
      next.place = this.#ready ? "socket" : "http";
      next.sentAt = now();
      if (this.#ready) this.#sendCommand(commandFor(next));
      else void this.#sendByHttp(next);
    }
  }

  /** @param {Unsent} entry */
  async #sendByHttp(entry) {
    const { signal } = this.#fallback;
    const [method, path, body] = requestFor(entry);
    try {
      const { message } = (await this.request(method, path, body, signal)) ?? {};
      if (entry.kind === "message" && !this.#acceptUser(message.sender_id)) return;
      this.#stored(entry, message, entry.if_rev && (message.rev ?? message.id));
    } catch (error) {
      if (signal.aborted) return; // the socket is back and sends it
      // Or else no token could be fetched.
      const known = error instanceof ChatError ? error : unreachable();
      const { status, code, message, retryAfter } = known;
      this.#refused(entry, code, message, status ? retryAfter : POLL_SECONDS);
      this.#sendUnsent();
    }
  }

  /** @param {string} [ref] `read CHAT MESSAGE` @param {number} [retry] seconds */
  #markAnswered(ref = "", retry) {
    const [kind, chatId, messageId] = ref.split(" ");
    const mark = this.#marks.get(Number(chatId));
    if (kind !== "read" || !mark) return;
    if (retry !== undefined) after(retry, () => this.#sendMark(Number(chatId)));
    else if (mark.messageId === Number(messageId)) mark.settled = true;
  }

  /** @param {Ack} ack */
  #handleAck(ack) {
    this.#markAnswered(ack.ref);
    const entry = this.#unsent.find(ack.client_id ?? ack.ref);
    if (!entry) return;
    const { chat_id, content, client_id } = entry;
    const { message_id: id = 0, created_at = "", n = 0 } = ack;
    const sender_id = this.#userId ?? 0;
    const message = { id, chat_id, sender_id, content, created_at, n, client_id };
    // A duplicate may have been edited since.
    const known = entry.kind === "message" && !ack.duplicate;
    this.#stored(entry, known ? this.#newest.of(message) : undefined, ack.rev);
  }

  /** @param {Refusal} refusal */
  #handleError({ ref, client_id, code, message, retry_after = RETRY_AFTER_SECONDS }) {
    this.#markAnswered(ref, FINAL_REFUSALS.has(code) ? undefined : retry_after);
    const entry = this.#unsent.find(client_id ?? ref); // chatd 1.0 repeats only `ref`
    if (entry?.place !== "socket") return;
    this.#refused(entry, code, message, retry_after);
    this.#sendUnsent();
  }

  /** @param {Unsent} [entry] @param {Message} [message] @param {number} [rev] */
  #stored(entry, message, rev) {
    // The answer and the event both say so: the first one counts.
    if (!entry || !this.#unsent.entries.includes(entry)) return;
    this.#unsent.remove(entry, rev);
    const news = { ...(message && { message }), ...(rev && { rev }) };
    this.#emit("delivery", { ...delivery(entry, "sent"), ...news });
    this.#sendUnsent();
  }

  /**
   * @param {Unsent} entry @param {string} code @param {string} reason
   * @param {number} [seconds]
   */
  #refused(entry, code, reason, seconds = RETRY_AFTER_SECONDS) {
    if (!this.#unsent.entries.includes(entry)) return; // another tab has dropped it
    if (FINAL_REFUSALS.has(code)) {
      this.#unsent.update(entry, { place: "failed", code, reason });
      this.#emit("delivery", delivery(entry));
      return;
    }
    entry.place = "waiting";
    this.#sendNotBefore = now() + seconds * 1000;
  }

  /** @param {Unsent} entry */
  #discard(entry) {
    this.#unsent.remove(entry, "discarded");
    this.#emit("delivery", delivery(entry, "discarded"));
  }

  /** @param {number} chatId */
  #sendMark(chatId) {
    const mark = this.#marks.get(chatId);
    if (!mark || mark.settled || mark.timer || this.#ended) return;
    const wait = MARK_SECONDS - elapsed(mark.sentAt);
    if (wait > 0) {
      mark.timer = after(wait, () => {
        mark.timer = 0;
        this.#sendMark(chatId);
      });
      return;
    }
    mark.sentAt = now();
    const message_id = mark.messageId;
    const ref = `read ${chatId} ${message_id}`;
    if (this.#ready) this.#sendCommand({ type: "mark_read", message_id, ref });
    else if (this.#polling)
      this.request("POST", `/api/v1/messages/${message_id}/read`).then(
        () => this.#markAnswered(ref),
        (error) => FINAL_REFUSALS.has(error?.code) && this.#markAnswered(ref),
      );
  }

  /** @param {object} command */
  #sendCommand(command) {
    if (this.#ready && this.#socket?.readyState === 1)
      this.#socket.send(JSON.stringify(command));
  }

  /* ---- HTTP ---- */

  /**
   * @param {string} method @param {string} path @param {object} [body]
   * @param {AbortSignal} [signal] @returns {Promise<any>}
   */
  async #request(method, path, body, signal) {
    // Its 401 may be about the invitation, so try the token before.
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
        // HTTP refuses tickets.
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
        await fetch(new URL(path.replace(/^\/?/, "./"), this.#base), {
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

  /** @param {string} type @param {object} event */
  #emit(type, event) {
    for (const listener of this.#listeners.get(type) ?? []) {
      try {
        listener(event);
      } catch (error) {
        (globalThis.reportError ?? console.error)(error);
      }
    }
  }
}

/* ---- small functions ---- */

/** @param {Unsent} entry @param {Delivery["state"]} [state] @returns {Delivery} */
function delivery(entry, state = entry.place === "failed" ? "failed" : "sending") {
  const { kind, client_id, message_id, content, kept, code, reason } = entry;
  const chat_id = entry.chat ?? entry.chat_id;
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

/** @param {string} token */
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

const DRAFT_PREFIX = "chatd.draft.";
/** All drafts but the newest. localStorage has room for ten times this. */
const MAX_DRAFT_CHARACTERS = 500_000;

export class Drafts {
  /** @type {Record<string, string>} */
  unstored = {};

  /** @param {Storage | null} storage @param {() => number} userId */
  constructor(storage, userId) {
    this.storage = storage;
    this.userId = userId;
  }

  /** @param {number | string} chatId */
  key(chatId) {
    return `${DRAFT_PREFIX}${this.userId()}.${chatId}`;
  }

  /** @param {number} chatId */
  get(chatId) {
    const key = this.key(chatId);
    return readDraft(this.unstored[key] ?? this.storage?.getItem(key));
  }

  /** @param {number} chatId @param {string} text @param {Message | null} [base] */
  set(chatId, text, base) {
    const key = this.key(chatId);
    const item = JSON.stringify({ text, at: Date.now(), base });
    this.unstored[key] = item;
    try {
      if (text) this.storage?.setItem(key, item);
      else this.storage?.removeItem(key);
      if (this.storage || !text) delete this.unstored[key];
    } catch {
      // Storage is full.
    }
  }

  chatIds() {
    const prefix = this.key("");
    const keys = Object.keys({ ...this.storage, ...this.unstored });
    return keys
      .filter((key) => key.startsWith(prefix))
      .map((key) => Number(key.slice(prefix.length)));
  }

  prune() {
    let room = MAX_DRAFT_CHARACTERS;
    const drafts = Object.entries({ ...this.storage })
      .filter(([key]) => key.startsWith(DRAFT_PREFIX))
      .map(([key, item]) => ({ key, item, at: readDraft(item).at }))
      .sort((a, b) => b.at - a.at);
    for (const { key, item } of drafts.slice(1)) {
      room -= key.length + item.length;
      if (room < 0) this.storage?.removeItem(key);
    }
  }
}

/** @param {string | null} [item] @returns {{text: string, at: number, base?: Message}} */
function readDraft(item) {
  return { text: "", at: 0, ...parseObject(item) };
}

/** @param {Response} answer */
async function readAnswer(answer) {
  if (answer.status === 204) return null;
  const body = await answer.json().catch(() => null);
  if (answer.ok && body) return body;
  const {
    // While chatd is away, a proxy answers: that is no refusal.
    code = /^4(?!08|29)/.test(String(answer.status)) ? "internal" : "upstream",
    message = `The chat server answered with HTTP status ${answer.status}.`,
    retry_after,
  } = body?.error ?? {};
  throw new ChatError(answer.status, code, message, retry_after);
}

/** @param {any} error */
function isSignedOut(error) {
  return error?.status === 401;
}

function unreachable(text = "The chat server does not answer.") {
  return new ChatError(0, "unreachable", text);
}

/** Never goes back. */
function now() {
  return performance.now();
}

/** @param {number} since */
function elapsed(since) {
  return (now() - since) / 1000;
}

/** @param {number} seconds @param {() => void} task */
function after(seconds, task) {
  return setTimeout(task, seconds * 1000);
}
