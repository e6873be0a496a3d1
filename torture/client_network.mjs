/**
 * ChatWebSocket and the drafts keep their promises, whatever the network does.
 *
 *     node --experimental-vm-modules torture/client_network.mjs [SCENARIOS] [FIRST SEED]
 *
 * A scenario has one user with up to four tabs, and a simulated server. Each tab runs
 * the real chat-websocket.js in a realm of its own, which can end at any
 * moment, also between two writes to storage. The server keeps an event log and stores
 * each client_id once, as chatd does. Time is virtual and all random choices come from
 * the seed, so a scenario that fails can be repeated. In a scenario,
 *
 * - sockets are refused, and closed with any code;
 * - answers are late, come twice, or are lost before or after they take effect;
 * - messages are refused for a while, or for good: then the user sends them again, drops
 *   them, or takes them back into the field;
 * - the user writes into the field of a tab, and sends or erases it there or in another;
 * - the user signs out in a tab and comes back;
 * - the server is away for a while, or has another epoch, as after a restore;
 * - tabs are closed and opened, storage is full, and the clock jumps by hours;
 * - a service sends messages in the user's name, and other devices mark some as read;
 * - messages are edited and deleted by the tabs and by others, while the tabs load
 *   history, search, and fetch their chats; a restore undoes changes.
 *
 * These claims must hold:
 *
 * - each tab receives each message once and in order of n, or a resync;
 * - no answer of the server is ignored;
 * - each text that the user has typed is at any time in a draft, unsent or stored, until
 *   the user erases it or is told its fate, even if the tab has closed (but a text that
 *   is in memory only, since storage is full, is lost with its tab);
 * - each text that the user has sent is stored once, in the order of writing, and then no
 *   tab shows it as a draft (but if the tab ends between the two writes of sending, it
 *   stays a draft, too); a draft is never sent by itself;
 * - each tab that counts by the rule of docs/protocol.md has read what the server says
 *   that the user has read: never more, and in the end no less;
 * - each tab shows each message as the server has it. A tab takes what an event or an
 *   answer says as it is: the client applies the rule of rev;
 * - each edit and deletion ends: it is stored, refused for good, or replaced by a later
 *   one, even if the tab has closed. None that is reported as sent is lost. An edit with
 *   if_rev never undoes a later one;
 * - at the end, no unsent message is left in storage.
 */
import { readFileSync } from "node:fs";
import vm from "node:vm";

const CLIENT = readFileSync(new URL("../web/chat-websocket.js", import.meta.url), "utf8");
/** What the engine keeps of the compiled script. */
let cachedData;
const DRAFT_KEY = "chatd.draft.1.1";
const TOKEN = `h.${Buffer.from('{"user_id":1}').toString("base64url")}.s`;

/** mulberry32: random numbers from 0 to 1, the same for each seed. */
function randomFrom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** What has become of each text that the user has typed. */
class Texts {
  /** text -> "draft", "sent", or "told": the user knows that it is gone. */
  fates = new Map();
  /**
   * Those that did not fit into storage, or that were sent before the client knew the
   * user: a tab may take them along when it closes.
   */
  inMemoryOnly = new Set();
  /** Those that were refused by the server for good: they are out of order. */
  refused = new Set();
  /** A tab has ended between two writes: a text may be in the draft and unsent, too. */
  torn = new Set();
  /** The tab in which the user has dealt with a refused message, by client_id. */
  dealtIn = new Map();

  /** @returns {string[]} those that are nowhere, without the user's knowledge */
  lost(server, storage) {
    const known = new Set(server.stored.map(({ content }) => content));
    for (const item of storage.items.values()) known.add(textIn(item));
    for (const tab of storage.tabs.filter(({ alive }) => alive)) {
      known.add(tab.field);
      tab.client.unsent(1).forEach(({ content }) => known.add(content));
    }
    return [...this.fates.keys()].filter(
      (text) =>
        this.fates.get(text) !== "told" &&
        !known.has(text) &&
        !this.inMemoryOnly.has(text),
    );
  }
}

/** The text of a draft or of an unsent message in storage. */
function textIn(item = "null") {
  if (!item.startsWith("{")) return undefined;
  const { text, content } = JSON.parse(item);
  return text ?? content;
}

/** Virtual time, chance, and the faults that the network and the server have now. */
class World {
  time = 0;
  wall = 1_700_000_000_000;
  timers = new Map();
  lastTimer = 0;
  socketsBlocked = false;
  serverAway = false;
  storageFull = false;
  httpLoss = 0;
  refusals = 0;
  /** Refusals for good. */
  finalRefusals = 0;
  /** Claims that do not hold. @type {string[]} */
  broken = [];
  texts = new Texts();

  constructor(seed) {
    this.random = randomFrom(seed);
  }

  chance(probability) {
    return this.random() < probability;
  }

  pick(things) {
    return things[Math.floor(this.random() * things.length)];
  }

  /** Runs `task` later, unless its tab has closed by then. */
  after(milliseconds, task, tab = null) {
    const id = ++this.lastTimer;
    this.timers.set(id, { due: this.time + Math.max(0, milliseconds), task, tab, id });
    return id;
  }

  async pass(milliseconds) {
    const end = this.time + milliseconds;
    for (;;) {
      await new Promise(setImmediate); // until no promise is left that can settle
      const due = [...this.timers.values()].filter((timer) => timer.due <= end);
      if (due.length === 0) break;
      const next = due.reduce((a, b) => (b.due < a.due ? b : a));
      this.timers.delete(next.id);
      this.time = Math.max(this.time, next.due);
      if (!next.tab || next.tab.alive) next.task();
    }
    this.time = end;
  }
}

/** One chat with id 1, its event log, and the read mark of user 1, as in chatd. */
class Server {
  epoch = "e0";
  seq = 0;
  events = [];
  /** The messages as they were sent. */
  stored = [];
  /** The messages as they are now, by id. */
  messages = new Map();
  readN = 0;
  byClientId = new Map();
  connections = new Set();

  constructor(world) {
    this.world = world;
  }

  /** The state of the chat that its list has. */
  get chat() {
    const last_message = [...this.messages.values()].at(-1) ?? null;
    return { id: 1, ...this.marks, last_message };
  }

  /** An event as it is told now: it quotes the message as it is now. */
  told(event) {
    const message = this.messages.get(event.message?.id);
    return message ? { ...event, message } : event;
  }

  /** The two positions of user 1. */
  get marks() {
    return { last_n: this.stored.length, read_n: this.readN };
  }

  get cursor() {
    return `${this.epoch}.${this.seq}`;
  }

  /** Returns the events after a cursor; null: resync. */
  since(cursor) {
    const dot = cursor.lastIndexOf(".");
    const seq = Number(cursor.slice(dot + 1));
    if (cursor.slice(0, dot) !== this.epoch || seq > this.seq) return null;
    return this.events.filter((event) => event.seq > seq);
  }

  log(event) {
    this.events.push({ ...event, seq: ++this.seq, chat_id: 1 });
    for (const connection of this.connections)
      connection.send(this.told(this.events.at(-1)));
  }

  /**
   * Edits or deletes a message, with chatd's checks in their order. Returns the code of
   * a refusal, or nothing.
   */
  change(id, content, if_rev) {
    const message = this.messages.get(id);
    if (!message) return "not_found";
    if (message.deleted) return content === null ? undefined : "deleted";
    if (message.content === content) return undefined;
    if (if_rev !== undefined && if_rev !== (message.rev ?? id)) return "changed";
    this.#noteChange(id, content);
    const rev = this.seq + 1;
    const state =
      content === null ? { content: "", deleted: true } : { content, edited_at: "" };
    this.messages.set(id, { ...message, ...state, rev });
    const type = content === null ? "message_deleted" : "message_edited";
    this.log({ type, message: { id } });
    return undefined;
  }

  /** The edits that were ever stored, as `ID TEXT`, and the ids of deleted messages. */
  edits = new Set();
  deletions = new Set();
  /** When the last edit was written of each message that one tab edits. */
  #writtenAt = new Map();

  #noteChange(id, content) {
    if (content === null) this.deletions.add(id);
    else this.edits.add(`${id} ${content}`);
    const [, at] = / has it at (.*)$/.exec(content ?? "") ?? [];
    if (!hasOwner(id) || !at) return;
    if (Number(at) < (this.#writtenAt.get(id) ?? 0))
      this.world.broken.push(`an edit of ${id} undoes a later one`);
    this.#writtenAt.set(id, Number(at));
  }

  /** A restore: half of the changes never happened. The messages stay. */
  restore(epoch) {
    this.epoch = epoch;
    for (const { id } of this.stored) {
      if (this.world.chance(0.5)) continue;
      this.messages.set(id, this.stored.find((sent) => sent.id === id));
    }
  }

  owners = new Map();

  ownedBy(id, tab) {
    if (!this.owners.has(id)) this.owners.set(id, tab);
    return this.owners.get(id) === tab;
  }

  history(before, limit) {
    const all = [...this.messages.values()];
    const older = all.filter(({ id }) => !before || id < before);
    return { messages: older.slice(-limit), more: older.length > limit };
  }

  store(sender_id, content, client_id, service = false) {
    const known = client_id && this.byClientId.get(client_id);
    if (known) return { message: known, duplicate: true };
    const id = this.seq + 1;
    const n = this.stored.length + 1;
    const message = {
      id,
      chat_id: 1,
      sender_id,
      content,
      n,
      client_id,
      created_at: "",
    };
    if (client_id) this.byClientId.set(client_id, message);
    const own = sender_id === 1;
    const isNext = this.readN === n - 1;
    const unread = own && service && !isNext ? { read: false } : {};
    this.messages.set(id, message);
    this.stored.push(message);
    this.log({ type: "new_message", message, ...unread });
    if (own && isNext) this.readN = n;
    else if (own && !service) this.mark(id);
    return { message, duplicate: false };
  }

  /** Moves the read mark of user 1, and over the user's own messages that follow. */
  mark(id) {
    const { stored } = this;
    let { n } = stored.find((message) => message.id === id);
    if (n <= this.readN) return;
    while (stored[n]?.sender_id === 1) n += 1;
    this.readN = n;
    this.log({ type: "message_read", message_id: stored[n - 1].id, read_by: 1, n });
  }

  refusal() {
    if (!this.world.chance(this.world.refusals)) return null;
    const code = this.world.pick(["rate_limited", "storage_failed"]);
    return { code, message: "later", retry_after: this.world.random() * 2 };
  }

  /** A message may also be refused for good, but not if it is stored already. */
  refusalOfMessage({ content, client_id }) {
    const { world } = this;
    if (this.byClientId.has(client_id) || !world.chance(world.finalRefusals))
      return this.refusal();
    world.texts.refused.add(content);
    return { code: "forbidden", message: "no" };
  }

  /** Handles an HTTP request. Returns [status, body]. */
  handle(method, url, body) {
    const before = Number(url.searchParams.get("before"));
    if (method === "PATCH" || method === "DELETE") {
      const error = this.refusal();
      if (error) return [429, { error }];
      const id = Number(url.pathname.split("/").at(-1));
      const code = this.change(id, body ? body.content : null, body?.if_rev);
      if (code) return [409, { error: { code, message: "no" } }];
      return body ? [200, { message: this.messages.get(id) }] : [204];
    }
    if (method === "GET" && url.pathname.endsWith("/messages"))
      return [200, this.history(before, 5)];
    switch (url.pathname) {
      case "/api/v1/search": {
        const { messages } = this.history(before, 20);
        return [200, { messages: messages.reverse(), before: null }];
      }
      case "/api/v2/ws-token":
        return [200, { token: "ticket", expires_in: 60 }];
      case "/api/v1/me":
        return [200, { user_id: 1, name: null }];
      case "/api/v1/chats":
        return [200, { chats: [this.chat], cursor: this.cursor }];
      case "/api/v1/events":
        return [200, this.poll(url.searchParams.get("cursor"))];
      case "/api/v1/chats/1/messages": {
        const error = this.refusalOfMessage(body);
        if (error) return [error.code === "forbidden" ? 403 : 429, { error }];
        return [201, this.store(1, body.content, body.client_id)];
      }
      default: {
        const [, id] = /^\/api\/v1\/messages\/(\d+)\/read$/.exec(url.pathname) ?? [];
        if (!id) return [404, { error: { code: "not_found", message: "?" } }];
        const error = this.refusal();
        if (error) return [429, { error }];
        this.mark(Number(id));
        return [200, {}];
      }
    }
  }

  poll(cursor) {
    const missed = cursor === null ? [] : this.since(cursor);
    if (!missed) return { events: [], cursor: this.cursor, more: false, resync: true };
    const page = missed.slice(0, this.world.chance(0.5) ? 2 : 100);
    const events = page.map((event) => this.told(event));
    const more = events.length < missed.length;
    const end = more ? `${this.epoch}.${events.at(-1).seq}` : this.cursor;
    return { events, cursor: end, more, resync: false };
  }

  cut(code) {
    for (const connection of [...this.connections]) connection.close(code);
  }
}

/** Each second message is changed only by one tab, the first that wants to. */
function hasOwner(id) {
  return id % 2 === 0;
}

/** The server's end of a socket. Frames arrive late, in order, or not at all. */
class Connection {
  open = true;
  #last = 0;

  constructor(world, server, socket, cursor) {
    Object.assign(this, { world, server, socket });
    const missed = cursor === null ? [] : server.since(cursor);
    const resume = cursor === null ? "fresh" : !missed ? "resync" : "replay";
    const start = resume === "replay" ? cursor : server.cursor;
    const chats = { 1: server.marks };
    this.send({ type: "connected", user_id: 1, cursor: start, resume, chats });
    missed?.forEach((event) => this.send(server.told(event)));
    server.connections.add(this);
  }

  send(frame) {
    const { world } = this;
    const late = world.random() * (world.chance(0.1) ? 600 : 30);
    this.#last = Math.max(this.#last, world.time) + late;
    const data = JSON.stringify(frame);
    world.after(this.#last - world.time, () => this.open && this.socket.receive(data));
  }

  receive(text) {
    const { type, ref, content, client_id, message_id: marked, ...rest } =
      JSON.parse(text);
    if (type === "ping") this.send({ type: "pong" });
    const changes = type === "edit_message" || type === "delete_message";
    if (!changes && type !== "send_message" && type !== "mark_read") return;
    const isMessage = type === "send_message";
    const refusal = isMessage
      ? this.server.refusalOfMessage({ content, client_id })
      : this.server.refusal();
    if (refusal) {
      // chatd 1.0 repeats only the ref. Either one must be enough.
      const name = client_id && this.world.chance(0.5) ? { client_id } : { ref };
      return this.send({ type: "error", ...name, ...refusal });
    }
    if (type === "mark_read") {
      this.server.mark(marked);
      return this.send({ type: "ack", ref });
    }
    if (changes) {
      const code = this.server.change(marked, content ?? null, rest.if_rev);
      const { rev } = this.server.messages.get(marked) ?? {};
      const ids = { ref, message_id: marked };
      if (code) return this.send({ type: "error", ...ids, code, message: "no" });
      return this.send({ type: "ack", ...ids, chat_id: 1, rev });
    }
    const { message, duplicate } = this.server.store(1, content, client_id);
    const { id: message_id, n } = message;
    const ack = { type: "ack", ref, client_id, message_id, chat_id: 1, n, duplicate };
    this.send(ack);
    if (this.world.chance(0.1)) this.send(ack);
  }

  close(code) {
    this.open = false;
    this.server.connections.delete(this);
    this.world.after(this.world.random() * 20, () => this.socket.closed(code));
  }
}

/** The localStorage that all tabs share. A change is an event in the other tabs. */
class SharedStorage {
  items = new Map();
  tabs = [];

  constructor(world) {
    this.world = world;
  }

  #change(tab, key, newValue) {
    const { items, world } = this;
    const oldValue = items.get(key) ?? null;
    tab.write();
    if (world.storageFull && newValue?.length > (oldValue?.length ?? 0)) {
      world.texts.inMemoryOnly.add(textIn(newValue));
      throw new Error("QuotaExceededError");
    }
    if (newValue === null) items.delete(key);
    else items.set(key, newValue);
    for (const other of this.tabs.filter((one) => one !== tab)) {
      const notify = () => other.dispatch("storage", { key, oldValue, newValue });
      other.eventsUntil = Math.max(other.eventsUntil, world.time + world.random() * 10);
      world.after(other.eventsUntil - world.time, notify, other);
    }
  }

  /** The localStorage object of one tab. */
  for(tab) {
    const { items } = this;
    const methods = {
      get length() {
        return items.size;
      },
      key: (i) => [...items.keys()][i] ?? null,
      getItem: (key) => items.get(key) ?? null,
      setItem: (key, value) => this.#change(tab, key, value),
      removeItem: (key) => this.#change(tab, key, null),
    };
    return new Proxy(methods, {
      ownKeys: () => [...items.keys()],
      getOwnPropertyDescriptor: (_, key) =>
        items.has(key)
          ? { value: items.get(key), enumerable: true, configurable: true }
          : undefined,
    });
  }
}

/** A realm with a ChatWebSocket, and the events that its page has received. */
class Tab {
  alive = true;
  /** @type {Map<string, Set<Function>>} */
  #listeners = new Map();
  /** The n of the last message; null: any n may be next. */
  n = null;
  /** The n up to which the user has read, by the rule of docs/protocol.md. */
  readN = 0;
  /** The largest n that this tab has marked as read. */
  marked = 0;
  /** The received messages: n -> id. */
  ids = new Map();
  /** The texts that were sent here, in order. */
  written = [];
  deliveries = new Map();
  /** The text in the field of the open chat. */
  field = "";
  /** Storage events arrive in order. This is when the last one does. */
  eventsUntil = 0;
  /** The tab ends before it has written to storage this often; null: it does not. */
  writesLeft = null;
  /** The messages that this tab shows: id -> message. */
  shown = new Map();
  /** The state of each edit and deletion, by client_id. */
  changes = new Map();
  /** The last edit of each message that only this tab edits: id -> text. */
  lastEdits = new Map();

  constructor(world, server, storage) {
    Object.assign(this, { world, server, storage, name: storage.tabs.length });
    this.localStorage = storage.for(this);
    storage.tabs.push(this);
  }

  /** Before each write to storage: at some of them, the tab ends. */
  write() {
    if (this.writesLeft === 0) this.alive = false;
    if (!this.alive) throw new Error("The tab has ended.");
    if (this.writesLeft !== null) this.writesLeft -= 1;
  }

  dispatch(type, event) {
    this.#listenersOf(type).forEach((listener) => listener(event));
  }

  #listenersOf(type) {
    if (!this.#listeners.has(type)) this.#listeners.set(type, new Set());
    return this.#listeners.get(type);
  }

  async open() {
    const context = vm.createContext(this.#globals());
    vm.runInContext("Date.now = __now; Math.random = __random", context);
    const initializeImportMeta = (meta) => {
      meta.url = "http://chat.example/web/chat-websocket.js";
    };
    const cached = cachedData && { cachedData };
    const module = new vm.SourceTextModule(CLIENT, {
      context,
      initializeImportMeta,
      ...cached,
    });
    cachedData ??= module.createCachedData();
    await module.link(() => {});
    await module.evaluate();
    const { ChatWebSocket, Drafts } = module.namespace;
    this.drafts = new Drafts(this.localStorage, () => 1);
    this.field = this.drafts.get(1).text;
    this.#listenersOf("storage").add(({ key }) => {
      if (key === this.drafts.key(1)) this.field = this.drafts.get(1).text;
    });
    const source = this.world.pick(["bearer", "token", "function"]);
    const options = source === "bearer" ? { bearer: TOKEN } : {};
    const log = (text) => {
      if (text.includes("No answer")) this.world.broken.push("an answer was ignored");
    };
    this.client = new ChatWebSocket({ log: { log }, ...options });
    this.#listen();
    if (source === "bearer") {
      this.fetchChats();
      this.world.after(2000, () => this.client.connect(), this);
    } else this.client.connect(source === "token" ? TOKEN : async () => TOKEN);
    return this;
  }

  #listen() {
    const { client } = this;
    client.on("new_message", ({ message }) => this.shown.set(message.id, message));
    for (const type of ["message_edited", "message_deleted"])
      client.on(type, ({ message }) => {
        if (this.shown.has(message.id)) this.shown.set(message.id, message);
      });
    client.on("new_message", ({ message: { id, n, sender_id }, read }) => {
      if (this.n !== null && n !== this.n + 1)
        this.world.broken.push(`tab ${this.name} received n ${n} after ${this.n}`);
      this.n = n;
      this.ids.set(n, id);
      if (sender_id === 1 && read !== false) this.read(n);
    });
    // A page may fetch its chats again while events still wait for a list.
    client.on("message_deleted", () => this.world.chance(0.5) && this.fetchChats());
    client.on("message_read", ({ n, read_by }) => {
      if (read_by === 1) this.read(n);
    });
    client.on("connected", ({ resume, chats }) => {
      if (resume === "fresh") this.n ??= chats[1].last_n;
      this.read(chats[1].read_n);
    });
    client.on("resync", () => {
      this.n = null;
      this.shown.clear();
      this.fetchChats();
    });
    client.on("chats", ({ chats, cursor }) => {
      const [epoch] = cursor.split(".");
      this.epoch = epoch;
      this.n = chats[0].last_n;
      this.read(chats[0].read_n);
      const { last_message } = chats[0];
      if (last_message) this.shown.set(last_message.id, last_message);
      this.load({});
    });
    client.on("delivery", (delivery) => {
      const { kind, client_id, message_id, content, state, message, code } = delivery;
      const { broken, texts } = this.world;
      if (kind === "message") this.deliveries.set(content, state);
      else this.changes.set(client_id, code ?? state);
      if (kind === "message" && state === "discarded" && this.signsOut)
        texts.fates.set(content, "told");
      if (kind === "edit" && state === "sent")
        if (!this.server.edits.has(`${message_id} ${content}`))
          broken.push(`the lost edit ${content} is reported as sent`);
      if (kind === "delete" && state === "sent" && !this.server.deletions.has(message_id))
        broken.push(`the lost deletion of ${message_id} is reported as sent`);
      if (kind !== "message" && code) client.discard(client_id);
      if (kind === "edit" && message && this.shown.has(message.id))
        this.shown.set(message.id, message);
    });
  }

  /** The user opens the chat or scrolls up, or searches. */
  load(where) {
    const show = ({ messages }) =>
      messages.forEach((message) => this.shown.set(message.id, message));
    const ask = where.q ? this.client.search(where) : this.client.history(1, where);
    ask.then(show, () => {});
  }

  /** The user edits or deletes a message that this tab shows. */
  change() {
    const { world } = this;
    const again = world.chance(0.4) && this.shown.get([...this.lastEdits.keys()].at(-1));
    const message = again || world.pick([...this.shown.values()]);
    if (!message || message.sender_id !== 1) return;
    const { id, rev = id } = message;
    const text = `${message.n} as tab ${this.name} has it at ${world.time}`;
    if (hasOwner(id)) {
      if (!this.server.ownedBy(id, this)) return;
      const edit = this.client.editMessage(id, text, { ifRev: rev });
      const kept = [...this.storage.items.values()].some((one) => textIn(one) === text);
      if (this.alive || kept) this.lastEdits.set(id, { text, edit, epoch: this.epoch });
    } else if (world.chance(0.3)) this.client.deleteMessage(id);
    else this.client.editMessage(id, text, world.chance(0.5) ? { ifRev: rev } : {});
  }

  fetchChats() {
    this.client
      .fetchChats()
      .catch(() => this.world.after(1000, () => this.fetchChats(), this));
  }

  read(n) {
    this.readN = Math.max(this.readN, n);
    if (this.readN > this.server.readN)
      this.world.broken.push(`tab ${this.name} has read ${n} before the server`);
  }

  /** The user looks at one of the messages that this tab has received. */
  mark() {
    const n = this.world.pick([...this.ids.keys()]);
    if (n === undefined) return;
    this.client.markRead(1, this.ids.get(n));
    this.marked = Math.max(this.marked, n);
  }

  /** The user writes a text into the field, or erases what is there. */
  type(text) {
    const { fates } = this.world.texts;
    const before = this.field;
    this.#replaceDraft(() => this.drafts.set(1, text));
    if (!this.alive) return; // the text was not typed
    if (fates.get(before) === "draft") fates.set(before, "told");
    this.field = text;
    if (text) fates.set(text, "draft");
  }

  /** The user sends what is in the field, or erases it if it was sent already. */
  enter() {
    const { fates, torn, inMemoryOnly } = this.world.texts;
    const text = this.field;
    if (!text || !this.alive) return;
    const inChat = [...this.server.stored, ...this.client.unsent(1)];
    const isThere = inChat.some(({ content }) => content === text);
    if (isThere || fates.get(text) === "sent") {
      this.type("");
      fates.set(text, "sent");
      return;
    }
    if (this.client.userId === undefined) inMemoryOnly.add(text);
    this.#replaceDraft(() => {
      this.client.send(1, text); // in this order, as the page does it
      this.drafts.set(1, "");
    });
    const unsent = [...this.storage.items].some(
      ([key, item]) => key !== DRAFT_KEY && textIn(item) === text,
    );
    if (!this.alive) torn.add(text);
    if (!this.alive && !unsent) return; // it is still a draft
    fates.set(text, "sent");
    this.field = "";
    this.written.push(text);
  }

  /**
   * All tabs show one draft of a chat. If storage was full, a tab may show another text:
   * what the user does there replaces the draft in storage.
   */
  #replaceDraft(task) {
    const { fates } = this.world.texts;
    const stored = textIn(this.storage.items.get(DRAFT_KEY));
    task();
    const replaced = stored !== textIn(this.storage.items.get(DRAFT_KEY));
    if (replaced && stored !== this.field && fates.get(stored) === "draft")
      fates.set(stored, "told");
  }

  /** The user deals with a message that was refused for good. */
  dealWithRefused() {
    const { fates, torn, dealtIn } = this.world.texts;
    const failed = this.client.unsent(1).find(({ state }) => state === "failed");
    if (!failed) return;
    const { client_id, content } = failed;
    if (!dealtIn.has(client_id)) dealtIn.set(client_id, this);
    if (dealtIn.get(client_id) !== this) return;
    const choice = this.world.pick(["resend", "discard", "take back"]);
    if (choice === "resend") this.client.resend(client_id);
    else if (choice === "discard") {
      fates.set(content, "told");
      this.client.discard(client_id);
    } else if (this.field === "") {
      this.drafts.set(1, content);
      this.client.discard(client_id);
      if (!this.alive) torn.add(content);
      const kept = textIn(this.storage.items.get(DRAFT_KEY)) === content;
      if (this.alive || kept) fates.set(content, "draft");
      this.field = content;
    }
  }

  /** The user signs out here: each tab drops what it has not sent, and ends. */
  signOut() {
    for (const tab of this.storage.tabs.filter(({ alive }) => alive)) {
      const end = () => {
        tab.signsOut = true;
        tab.client.forget();
        if (tab.client.unsent(1).length + tab.client.unsentChanges().length)
          this.world.broken.push(`tab ${tab.name} has not dropped what it had not sent`);
        tab.alive = false;
      };
      if (tab === this) end();
      else this.world.after(this.world.random() * 10, end, tab);
    }
  }

  #globals() {
    const { world } = this;
    const every = (milliseconds, task, id = ++world.lastTimer) => {
      const tick = () => (every(milliseconds, task, id), task());
      world.timers.set(id, {
        due: world.time + milliseconds,
        task: tick,
        tab: this,
        id,
      });
      return id;
    };
    const cancel = (id) => world.timers.delete(id);
    return {
      URL,
      URLSearchParams,
      AbortController,
      AbortSignal,
      atob,
      console,
      crypto: { getRandomValues: (words) => words.map(() => world.random() * 2 ** 32) },
      performance: { now: () => world.time },
      __now: () => Math.floor(world.wall + world.time),
      __random: world.random,
      setTimeout: (task, milliseconds) => world.after(milliseconds, task, this),
      setInterval: (task, milliseconds) => every(milliseconds, task),
      clearTimeout: cancel,
      clearInterval: cancel,
      addEventListener: (type, listener) => this.#listenersOf(type).add(listener),
      removeEventListener: (type, listener) => this.#listenersOf(type).delete(listener),
      localStorage: this.localStorage,
      navigator: { onLine: true },
      reportError: (error) => world.broken.push(`a listener threw ${error.stack}`),
      fetch: (url, options) => this.#fetch(new URL(url), options),
      WebSocket: this.#socketClass(),
    };
  }

  /** The request is lost, or its answer is; then it has taken effect. */
  #fetch(url, { method, body, signal }) {
    const { world, server } = this;
    const slow = world.chance(0.1) ? 4000 : 200;
    return new Promise((resolve, reject) => {
      if (!this.alive) return;
      const lost = () => reject(new TypeError("Failed to fetch"));
      signal.addEventListener("abort", lost);
      const arrive = () => {
        if (world.serverAway || world.chance(world.httpLoss)) return lost();
        const [status, answer] = server.handle(method, url, body && JSON.parse(body));
        const text = JSON.stringify(answer ?? null);
        const response = {
          status,
          ok: status < 300,
          json: async () => JSON.parse(text),
        };
        const back = () => (world.chance(world.httpLoss) ? lost() : resolve(response));
        world.after(world.random() * slow, back);
      };
      world.after(world.random() * slow, arrive);
    });
  }

  #socketClass() {
    const { world, server } = this;
    const tab = this;
    return class {
      readyState = 0;
      #connection = null;
      #last = 0;

      constructor(url) {
        const cursor = new URL(url).searchParams.get("cursor");
        world.after(world.random() * 100, () => this.#arrive(cursor), tab);
      }

      #arrive(cursor) {
        if (this.readyState !== 0) return;
        const refused = world.serverAway || world.socketsBlocked || world.chance(0.05);
        if (refused) return this.closed(1006);
        this.readyState = 1;
        this.onopen?.();
        if (world.chance(0.03)) return this.closed(world.pick([1006, 1013, 4008]));
        this.#connection = new Connection(world, server, this, cursor);
      }

      send(text) {
        if (!tab.alive) return;
        const connection = this.#connection;
        this.#last = Math.max(this.#last, world.time) + world.random() * 30;
        world.after(
          this.#last - world.time,
          () => connection?.open && connection.receive(text),
        );
      }

      close() {
        this.readyState = 3;
        const connection = this.#connection;
        if (!connection) return;
        world.after(world.random() * 20, () => {
          connection.open = false;
          server.connections.delete(connection);
        });
      }

      receive(data) {
        if (this.readyState === 1 && tab.alive) this.onmessage?.({ data });
      }

      closed(code) {
        if (this.readyState === 3) return;
        this.readyState = 3;
        if (tab.alive) this.onclose?.({ code });
      }
    };
  }
}

/** Plays one scenario. Returns the claims that do not hold. */
async function play(seed) {
  const world = new World(seed);
  const server = new Server(world);
  const storage = new SharedStorage(world);
  const openTab = () => new Tab(world, server, storage).open();
  /** An open tab. It may end within what the user does there now. */
  const pickTab = () => {
    const tab = world.pick(storage.tabs.filter(({ alive }) => alive));
    if (world.chance(0.04)) tab.writesLeft = world.pick([0, 1, 2]);
    return tab;
  };
  const mayFill = world.chance(0.3);
  await openTab();
  for (let step = 0; step < 150; step++) {
    if (!storage.tabs.some((tab) => tab.alive)) await openTab();
    const alive = storage.tabs.filter((tab) => tab.alive);
    switch (Math.floor(world.random() * 27)) {
      case 0:
        server.cut(world.pick([1006, 1012, 1013, 4008, 4401]));
        break;
      case 1:
        world.socketsBlocked = world.chance(0.7);
        if (world.socketsBlocked && world.chance(0.7)) server.cut(1006);
        break;
      case 2:
        world.httpLoss = world.pick([0, 0, 0.3, 1]);
        break;
      case 3:
        world.refusals = world.pick([0, 0, 0.3, 0.7]);
        world.finalRefusals = world.pick([0, 0, 0.3]);
        break;
      case 4:
        world.serverAway = world.chance(0.4);
        if (world.serverAway) server.cut(world.pick([1006, 1012]));
        break;
      case 5: {
        const tab = world.pick(alive);
        if (world.chance(0.4)) tab.alive = false;
        else if (world.chance(0.3)) tab.writesLeft = world.pick([0, 1, 2, 3, 4]);
        else if (world.chance(0.2)) tab.signOut();
        break;
      }
      case 6:
        if (alive.length < 4) await openTab();
        break;
      case 7:
        if (world.chance(0.7)) break;
        server.restore(`e${step}`);
        server.cut(1006);
        break;
      case 8:
        server.store(2, `from another user, ${step}`);
        break;
      case 9:
        world.wall += (world.random() - 0.5) * 10_000_000;
        break;
      case 10:
        world.storageFull = mayFill && world.chance(0.5);
        break;
      case 11:
        server.store(1, `from a service, ${step}`, undefined, true);
        break;
      case 12:
        pickTab().mark();
        break;
      case 13:
        // Another device marks a message as read.
        if (server.stored.length) server.mark(world.pick(server.stored).id);
        break;
      case 14:
      case 15:
      case 16:
        pickTab().change();
        break;
      case 17: {
        // Another user, or another device.
        const { id } = world.pick(server.stored) ?? {};
        const text = world.chance(0.3) ? null : `changed elsewhere, ${step}`;
        if (id && !hasOwner(id)) server.change(id, text);
        break;
      }
      case 18:
      case 19: {
        const tab = world.pick(alive);
        if (!tab.epoch) break; // it has no list of chats yet
        const before = world.pick([...tab.shown.keys()]);
        tab.load(world.pick([{ before }, {}, { q: "a", before }]));
        // Meanwhile, other devices change some of these messages.
        for (const { id } of server.stored.filter((one) => !hasOwner(one.id)).slice(-4))
          world.after(world.random() * 400, () => server.change(id, `other ${step}`));
        break;
      }
      case 20:
        pickTab().fetchChats();
        break;
      case 21:
        pickTab().type(world.chance(0.8) ? `draft ${step}` : "");
        break;
      case 22:
        pickTab().dealWithRefused();
        break;
      default: {
        const tab = pickTab();
        if (tab.field === "" || world.chance(0.5)) tab.type(`${step}`);
        tab.enter();
      }
    }
    // Within 10 ms, the other tabs know of a draft. The user is slower.
    await world.pass(world.pick([11, 50, 500, 3000, 9000]));
    for (const text of world.texts.lost(server, storage)) {
      world.broken.push(`the text ${text} is lost`);
      world.texts.fates.set(text, "told");
    }
    world.broken.push(...lostEdits(world, server, storage));
    world.broken.push(...staleRefusals(world, storage));
    if (world.broken.length) return world.broken;
  }
  Object.assign(world, {
    socketsBlocked: false,
    serverAway: false,
    storageFull: false,
  });
  Object.assign(world, { httpLoss: 0, refusals: 0, finalRefusals: 0 });
  for (const tab of storage.tabs) tab.writesLeft = null;
  if (!storage.tabs.some((tab) => tab.alive)) await openTab();
  await world.pass(60_000); // until what closed tabs have left is adopted
  for (const { client } of storage.tabs.filter(({ alive }) => alive)) {
    client.unsent(1).forEach(({ client_id }) => client.resend(client_id));
    client.unsentChanges().forEach(({ client_id }) => client.discard(client_id));
  }
  await world.pass(60_000);
  // Only events can tell the tabs of these.
  server.store(2, "the last but one");
  server.store(1, "the last, from a service", undefined, true);
  if (world.chance(0.5)) server.mark(server.stored.at(-2).id);
  await world.pass(60_000);
  return [...world.broken, ...brokenAtEnd(world, server, storage)];
}

/** Returns the edits that are neither unsent nor stored nor refused. */
function lostEdits(world, server, { items, tabs }) {
  const open = new Set([...items.values()].map(textIn));
  for (const { client } of tabs.filter(({ alive }) => alive))
    client.unsentChanges().forEach(({ content }) => open.add(content));
  const isLost = ([id, { text, edit }]) => {
    const ends = tabs.map(({ changes }) => changes.get(edit));
    const refused = ["changed", "deleted", "not_found"].some((end) => ends.includes(end));
    const known = open.has(text) || refused || world.texts.inMemoryOnly.has(text);
    return !known && !server.edits.has(`${id} ${text}`);
  };
  if (tabs.some(({ signsOut }) => signsOut)) return [];
  const lost = tabs.flatMap(({ lastEdits }) => [...lastEdits].filter(isLost));
  return lost.map(([id, { text }]) => `the edit ${text} of ${id} is lost`);
}

/** Returns the messages that a tab shows as failed after another tab has dealt with them. */
function staleRefusals(world, { items, tabs }) {
  return tabs
    .filter(({ alive, eventsUntil }) => alive && eventsUntil < world.time)
    .flatMap(({ client }) => client.unsent(1))
    .filter(({ state, kept }) => state === "failed" && kept)
    .filter(({ client_id }) => !items.has(`chatd.unsent.chat.example.1.${client_id}`))
    .map(({ content }) => `the message ${content} still counts as failed`);
}

/** Returns the claims that do not hold at the end of a scenario. */
function brokenAtEnd(world, server, storage) {
  const broken = [];
  const stored = server.stored.map(({ content }) => content);
  for (const tab of storage.tabs) {
    const behind = tab.alive && tab.n !== null && tab.n !== stored.length;
    if (behind) broken.push(`tab ${tab.name} is at n ${tab.n} of ${stored.length}`);
    if (tab.alive && tab.readN !== server.readN)
      broken.push(`tab ${tab.name} has read ${tab.readN}, the server ${server.readN}`);
    if (tab.alive && tab.marked > server.readN)
      broken.push(`the mark of tab ${tab.name} at ${tab.marked} is lost`);
    if (tab.alive && tab.n !== null) broken.push(...brokenChanges(server, tab));
    broken.push(...brokenLastEdits(world, server, tab, storage.tabs));
    const { fates, refused, torn } = world.texts;
    for (const text of tab.alive ? tab.written : [])
      if (fates.get(text) === "sent" && tab.deliveries.get(text) !== "sent")
        if (!refused.has(text))
          broken.push(`message ${text} is ${tab.deliveries.get(text)}, not sent`);
    if (tab.alive && fates.get(tab.field) === "sent" && !torn.has(tab.field))
      broken.push(`tab ${tab.name} still shows ${tab.field}, which was sent`);
    const places = tab.written
      .filter((text) => fates.get(text) === "sent" && !refused.has(text))
      .map((text) => stored.indexOf(text))
      .filter((at) => at >= 0);
    if (places.some((at, i) => i > 0 && at < places[i - 1]))
      broken.push(`the messages of tab ${tab.name} are out of order`);
  }
  for (const [text, fate] of world.texts.fates) {
    const count = stored.filter((one) => one === text).length;
    const { torn, inMemoryOnly } = world.texts;
    const mayBeLost = fate === "told" || inMemoryOnly.has(text);
    const counts = fate === "draft" ? [0] : mayBeLost ? [0, 1] : [1];
    if (torn.has(text)) counts.push(0, 1);
    if (!counts.includes(count))
      broken.push(`the text ${text} (${fate}) is stored ${count} times`);
  }
  // A tab that ended between two writes may leave a settled item: it is not JSON.
  for (const [key, item] of storage.items)
    if (key !== DRAFT_KEY && item.startsWith("{"))
      broken.push(`${key} is left in storage`);
  return broken;
}

/** Returns the claims about edits and deletions that do not hold for an open tab. */
function brokenChanges(server, tab) {
  const broken = [];
  for (const [id, message] of tab.shown) {
    const [shown, stored] = [message, server.messages.get(id)].map((one) => [
      one.content,
      one.rev,
      one.deleted,
    ]);
    if (`${shown}` !== `${stored}`)
      broken.push(`tab ${tab.name} shows ${id} as ${shown}, the server has ${stored}`);
  }
  const ends = ["sent", "discarded", "deleted", "changed", "not_found"];
  for (const [id, end] of tab.changes)
    if (!ends.includes(end)) broken.push(`change ${id} of tab ${tab.name} is ${end}`);
  return broken;
}

/** Returns the last edits of a tab that are neither stored nor refused. */
function brokenLastEdits(world, server, tab, tabs) {
  const broken = [];
  for (const [id, { text, edit, epoch }] of tab.lastEdits) {
    const { content } = server.messages.get(id);
    if (epoch !== server.epoch || content === text) continue;
    const ends = tabs.map(({ changes }) => changes.get(edit));
    // Another tab has sent an earlier edit, before this tab knew of it.
    if (ends.includes("changed") || tabs.some(({ signsOut }) => signsOut)) continue;
    if (!tab.alive && world.texts.inMemoryOnly.has(text)) continue;
    broken.push(`${id} is "${content}", but its last edit was "${text}"`);
  }
  return broken;
}

const [count = 200, first = 1] = process.argv.slice(2).map(Number);
let failed = 0;
for (let seed = first; seed < first + count; seed++) {
  const broken = await play(seed);
  if (broken.length === 0) continue;
  failed += 1;
  console.log(`seed ${seed}: ${broken.slice(0, 5).join("; ")}`);
}
console.log(`${count} scenarios from seed ${first}: ${failed} failed`);
process.exit(failed ? 1 : 0);
