// @ts-check
/**
 * app.js: chatd's page.
 *
 * Events change the model, and every change asks for one render; a render makes the
 * page look like the model and is the only place that does. So there is no order of
 * events in which a badge, a tick or a list could be wrong for longer than a frame. The
 * connection and all its troubles live in chat-websocket.js; here is what a person sees
 * and does.
 *
 * Sections: Tools - Sign-in - Model - Events - Reading - Top and lists - The open chat
 * - Writing - Dialogs - Notifications - Start.
 *
 * Rule of this file: what people wrote is text. It enters the page by textContent only.
 */
import { ChatError, ChatWebSocket } from "./chat-websocket.js";

/** @typedef {import("./chat-websocket.js").Message} Message */
/** @typedef {import("./chat-websocket.js").Chat} WireChat */
/** @typedef {import("./chat-websocket.js").Delivery} Delivery */
/** @typedef {import("./chat-websocket.js").State} State */

/** Messages fetched at once. */
const HISTORY_LIMIT = 50;
/** Older messages are fetched when the reader is this near to the top (pixels). */
const HISTORY_MARGIN = 500;
/** The reader counts as being at the end within this (pixels). */
const END_MARGIN = 60;
/** A message counts as seen when this much of it is on the screen (pixels). */
const SEEN_PIXELS = 24;
/** "is typing" disappears after this: a little more than twice the repeat of 3 s. */
const TYPING_SECONDS = 7;
/** Messages of one person within this form a group. */
const GROUP_SECONDS = 300;
/**
 * A notification waits this long: perhaps another tab of mine shows the message
 * already.
 */
const NOTIFY_SECONDS = 1;
/** What has no place in a message: all but tab and line ends. */
const CONTROL = /[\0-\x08\x0b\x0c\x0e-\x1f\x7f]/g;
/** How long a passing remark stays. */
const TOAST_SECONDS = 6;
/** The socket waits so long for the list of chats, then it goes ahead. */
const LATE_SECONDS = 2;
/** After a failure the list of chats is fetched again so often. */
const AGAIN_SECONDS = 5;

/* -------------------------------------------------------------------------------------
 * Tools. Elements, keyed rows, times.
 * ---------------------------------------------------------------------------------- */

/**
 * @template {Element} Kind
 * @param {string} id
 * @param {new () => Kind} kind
 * @returns {Kind}
 */
function byId(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`index.html lacks #${id}`);
  return found;
}

const button = (/** @type {string} */ id) => byId(id, HTMLButtonElement);
const box = (/** @type {string} */ id) => byId(id, HTMLElement);
const dialog = (/** @type {string} */ id) => byId(id, HTMLDialogElement);
const field = (/** @type {string} */ id) => byId(id, HTMLInputElement);

/**
 * A new element. Strings become text, never markup; null children are left out.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string | number | boolean | null | undefined>} [attributes]
 *   true: an empty one; false, null, undefined: none
 * @param {...(Node | string | null)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/**
 * @param {string} base
 * @param {Record<string, boolean>} extra name -> whether it applies
 */
function classes(base, extra) {
  return [base, ...Object.keys(extra).filter((name) => extra[name])].join(" ");
}

/** @param {string} name @param {string} [className] */
function icon(name, className = "") {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", className);
  svg.append(use);
  return svg;
}

/**
 * @typedef {object} Row
 * @property {string} key who it is
 * @property {string} look everything that its appearance depends on
 * @property {() => HTMLElement} build
 */

/**
 * Makes the container show these rows, in this order. A row with the same key and look
 * keeps its element, and with it focus, selection and a screen reader's place.
 * @param {HTMLElement} container
 * @param {Row[]} rows
 */
function showRows(container, rows) {
  /** @type {Map<string | undefined, HTMLElement>} */
  const old = new Map();
  for (const child of container.children) {
    if (child instanceof HTMLElement) old.set(child.dataset["key"], child);
  }
  let at = container.firstElementChild;
  for (const row of rows) {
    const before = old.get(row.key);
    old.delete(row.key);
    const node = before?.dataset["look"] === row.look ? before : newRow(row);
    if (before && before !== node) {
      if (at === before) at = node;
      replaceRow(before, node);
    }
    if (node === at) at = at.nextElementSibling;
    else container.insertBefore(node, at);
  }
  for (const node of old.values()) node.remove();
}

/** @param {Row} row */
function newRow({ key, look, build }) {
  const node = build();
  node.dataset["key"] = key;
  node.dataset["look"] = look;
  return node;
}

/** @param {HTMLElement} before @param {HTMLElement} node */
function replaceRow(before, node) {
  const focused = before.contains(document.activeElement);
  before.replaceWith(node);
  if (!focused) return;
  /** @type {HTMLElement | null} */
  const heir = node.querySelector("a, button");
  heir?.focus({ preventScroll: true });
}

/** @param {string} word @param {number} count */
function plural(word, count) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

const clock = new Intl.DateTimeFormat(undefined, {
  hour: "numeric",
  minute: "2-digit",
});
const dayNear = new Intl.DateTimeFormat("en", {
  weekday: "long",
  day: "numeric",
  month: "long",
});
const dayFar = new Intl.DateTimeFormat("en", {
  day: "numeric",
  month: "long",
  year: "numeric",
});
const dayShort = new Intl.DateTimeFormat("en", { day: "numeric", month: "short" });
const moment = new Intl.DateTimeFormat("en", { dateStyle: "full", timeStyle: "short" });

/** Whole days from then to now, by the reader's calendar. @param {Date} then */
function daysAgo(then) {
  const midnight = (/** @type {Date} */ date) => new Date(date).setHours(0, 0, 0, 0);
  return Math.round((midnight(new Date()) - midnight(then)) / 86_400_000);
}

/** @param {string} created_at */
function dayName(created_at) {
  const date = new Date(created_at);
  const days = daysAgo(date);
  if (days === 0) return "Today";
  if (days === 1) return "Yesterday";
  return (days < 300 ? dayNear : dayFar).format(date);
}

/** @param {string} created_at */
function shortTime(created_at) {
  const date = new Date(created_at);
  return daysAgo(date) === 0 ? clock.format(date) : dayShort.format(date);
}

/** @param {number} seconds @param {() => void} task */
function after(seconds, task) {
  return Number(setTimeout(task, seconds * 1000));
}

/** Shows a remark for some seconds. @param {string} text */
function toast(text) {
  const node = el("p", { class: "toast" }, text);
  box("toasts").append(node);
  after(TOAST_SECONDS, () => node.remove());
}

/** Says it to screen readers only. @param {string} text */
function announce(text) {
  const node = el("p", {}, text);
  box("announcer").append(node);
  after(TOAST_SECONDS * 2, () => node.remove());
}

/** @param {unknown} error @returns {string} */
function sentence(error) {
  return error instanceof Error ? error.message : String(error);
}

/* -------------------------------------------------------------------------------------
 * Sign-in. A link's token is exchanged at once for a session token. That is the tab's
 * own (sessionStorage), so that two tabs can be two people; a copy in localStorage is
 * for the next visit. A tab becomes somebody else only after asking, and a new tab that
 * is somebody else says so and leaves the next visit alone: a link could be sent to
 * make you write under a name that its sender reads.
 * ---------------------------------------------------------------------------------- */

/**
 * @typedef {object} Session
 * @property {string} token
 * @property {number} user_id
 * @property {string | null} name
 */

const SESSION_KEY = "chatd.session";
/** Tells the other tabs who signed out. */
const signedOut = new BroadcastChannel("chatd.signed-out");

/** Storage may be forbidden; then the session lives as long as the page. */
const shelves = {
  tab: () => window.sessionStorage,
  browser: () => window.localStorage,
};

/**
 * @param {() => Storage} shelf
 * @returns {Session | null | undefined} null: signed out; undefined: nothing is known
 */
function readSession(shelf) {
  try {
    const session = JSON.parse(shelf().getItem(SESSION_KEY) ?? "");
    return session === null || typeof session.token === "string" ? session : undefined;
  } catch {
    return undefined;
  }
}

/** @param {() => Storage} shelf @param {Session | null} session */
function writeSession(shelf, session) {
  try {
    shelf().setItem(SESSION_KEY, JSON.stringify(session));
  } catch {
    // Named above.
  }
}

/** The tab's own, else the one kept for the next visit. */
function sessionToResume() {
  const mine = readSession(shelves.tab);
  return mine === undefined ? readSession(shelves.browser) : mine;
}

/**
 * Takes the link's token out of the address bar.
 * @param {string} [place] the hash that stood there before
 * @returns {string | null}
 */
function takeLinkToken(place = "") {
  const match = /^#token=(.+)$/.exec(location.hash);
  if (!match?.[1]) return null;
  history.replaceState(null, "", location.pathname + location.search + place);
  return decoded(match[1]);
}

/** @param {string} text as an address has it, or as somebody mistyped it */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** @param {string} token of a sign-in link @returns {Promise<Session>} */
async function exchange(token) {
  const once = new ChatWebSocket({ bearer: token, storage: null, log: null });
  const answer = await once.request("POST", "/api/v1/session");
  return { token: answer.token, user_id: answer.user_id, name: answer.name ?? null };
}

/** @param {string} token of a sign-in link */
async function signInWith(token) {
  const mine = model.session ?? readSession(shelves.tab);
  const kept = readSession(shelves.browser);
  try {
    const session = await exchange(token);
    if (mine && !(await mayBecome(session, mine))) start(mine);
    else if (!mine && kept && kept.user_id !== session.user_id)
      startBeside(session, kept);
    else keepAndStart(session);
  } catch (error) {
    signInFailed(token, error);
  }
}

/** @param {Session} session @param {Session} current @returns {Promise<boolean>} */
async function mayBecome(session, current) {
  if (session.user_id === current.user_id) return true;
  const other = personName(session.user_id, session.name);
  const me = personName(current.user_id, current.name);
  return ask({
    title: `Continue as ${other}?`,
    text:
      `You are ${me} here. This link signs this tab in as ${other}; ` +
      "your other tabs stay as they are.",
    yes: `Continue as ${other}`,
    no: `Stay ${me}`,
  });
}

/** @param {string} token @param {unknown} error */
function signInFailed(token, error) {
  const current = model.session ?? sessionToResume();
  const refused = error instanceof ChatError && error.status > 0;
  const why =
    refused && error.status === 401
      ? "This sign-in link is no longer good. Please ask for a new one."
      : sentence(error);
  if (current) {
    toast(why);
    start(current);
    return;
  }
  showSignIn({ error: why });
  // Without an answer the link may still be good: one press tries it again.
  if (!refused) field("sign-in-link").value = `${location.origin}/#token=${token}`;
}

/** Who is here already goes on undisturbed. @param {Session} session */
function keepAndStart(session) {
  for (const shelf of [shelves.tab, shelves.browser]) writeSession(shelf, session);
  if (model.session?.user_id !== session.user_id) start(session);
}

/**
 * In a new tab, as somebody else than the next visit will be.
 * @param {Session} session
 * @param {Session} kept
 */
function startBeside(session, kept) {
  start(session);
  const [me, other] = [session, kept].map((who) => personName(who.user_id, who.name));
  toast(`This tab is signed in as ${me}. Other tabs stay ${other}.`);
}

/**
 * @param {{why?: string, error?: string}} [words] why one is here; what was wrong with
 *   a link
 */
function showSignIn({ why = "", error = "" } = {}) {
  showScreen("sign-in");
  document.title = "Sign in · chatd";
  field("sign-in-link").value = "";
  setText(
    "sign-in-why",
    `${why} Open the sign-in link that you were given, or paste it here.`,
  );
  setText("sign-in-error", error);
}

/** @param {"loading" | "sign-in" | "chat"} screen */
function showScreen(screen) {
  for (const id of ["loading", "sign-in", "chat"]) box(id).hidden = id !== screen;
}

/** @param {SubmitEvent} event */
function onSignInForm(event) {
  event.preventDefault();
  const text = field("sign-in-link").value.trim();
  const token =
    /#token=(\S+)$/.exec(text)?.[1] ?? /^[\w-]+\.[\w-]+\.[\w-]+$/.exec(text)?.[0];
  if (!token) {
    setText("sign-in-error", "That is not a sign-in link: a link has #token= in it.");
    return;
  }
  setText("sign-in-error", "");
  void signInWith(decoded(token));
}

/** What would be lost if it were given up now. */
function allUnsent() {
  return [...model.chats.keys()].flatMap((id) => model.client?.unsent(id) ?? []);
}

/**
 * Where storage is full or forbidden, a message lives only as long as the page.
 * @param {Event} event
 */
function onLeaving(event) {
  if (allUnsent().some(({ kept }) => !kept)) event.preventDefault();
}

async function onSignOut() {
  box("me-panel").hidePopover();
  const unsent = allUnsent();
  const sure =
    unsent.length === 0 ||
    (await ask({
      title: "Sign out?",
      text: `${plural("message", unsent.length)} not yet sent will be lost.`,
      yes: "Sign out",
      no: "Stay",
    }));
  if (!sure) return;
  signedOut.postMessage(myId());
  model.client?.forget();
  leave("You are signed out.");
}

/**
 * Ends this tab's session; the copy for the next visit goes too, if it is the same
 * person's.
 * @param {string} why
 */
function leave(why) {
  const kept = readSession(shelves.browser);
  if (kept?.user_id === model.session?.user_id) writeSession(shelves.browser, null);
  writeSession(shelves.tab, null);
  model.client?.disconnect();
  forgetModel();
  history.replaceState(null, "", location.pathname + location.search);
  showSignIn({ why });
}

/** The server does not take our token any more. Perhaps a newer link was opened. */
function onSignedOut() {
  const mine = model.session;
  const newer = [shelves.tab, shelves.browser]
    .map(readSession)
    .find((kept) => kept?.user_id === mine?.user_id && kept?.token !== mine?.token);
  if (newer) start(newer);
  else leave("Your session has ended.");
}

/**
 * Another tab signed out: so do we, if it was the same person's.
 * @param {MessageEvent} event
 */
function onSignedOutElsewhere({ data }) {
  if (!model.session || data !== myId()) return;
  model.client?.forget();
  leave("You signed out in another tab.");
}

/* -------------------------------------------------------------------------------------
 * Model. Everything the page shows. Counters only grow, so it does not matter whether
 * an event, an answer or `connected` brought a number first.
 * ---------------------------------------------------------------------------------- */

/**
 * @typedef {object} ChatView
 * @property {number} id
 * @property {string | null} title
 * @property {Map<number, number>} members user id -> read_n
 * @property {number} last_n
 * @property {number} read_n
 * @property {Message | null} last_message
 * @property {Message[]} messages those loaded: a run without holes up to the newest
 *   known
 * @property {boolean} loaded `messages` reaches to the present
 * @property {boolean} more there are older ones than those loaded
 * @property {"no" | "yes" | "failed"} loading
 * @property {number | null} divider the new ones begin after this n
 * @property {Map<number, number>} typing user id -> timer that ends it
 * @property {number} arrived ms, when it was added during this visit; else 0
 * @property {string} draft
 */

const model = {
  /** @type {Session | null} */
  session: null,
  /** @type {ChatWebSocket | null} */
  client: null,
  /** @type {Map<number, ChatView>} */
  chats: new Map(),
  /** @type {ChatView | null} */
  open: null,
  /** @type {Map<number, string | null>} */
  names: new Map(),
  /** Those one may invite; null: this server lets nobody. @type {number[] | null} */
  people: null,
  /** @type {State} */
  link: "closed",
  /** The list of chats came at least once. */
  known: false,
  /** Of the last list: numbers of another epoch cannot be compared with it. */
  epoch: "",
};

function forgetModel() {
  document.querySelectorAll("dialog").forEach((node) => node.close());
  selectChat(null);
  Object.assign(model, {
    session: null,
    client: null,
    people: null,
    known: false,
    epoch: "",
    link: "closed",
  });
  model.chats.clear();
  model.names.clear();
}

const myId = () => model.session?.user_id ?? 0;
const unread = (/** @type {ChatView} */ chat) => Math.max(0, chat.last_n - chat.read_n);

/** @param {number} userId @param {string | null} [name] */
function personName(userId, name = model.names.get(userId) ?? null) {
  return name || `User ${userId}`;
}

/** @param {ChatView} chat */
function others(chat) {
  return [...chat.members.keys()].filter((id) => id !== myId());
}

/** @param {ChatView} chat */
function chatTitle(chat) {
  if (chat.title) return chat.title;
  const names = others(chat).map((id) => personName(id));
  return names.join(", ") || "Only you";
}

/**
 * Newest activity first; a chat that was just added counts as activity.
 * @returns {ChatView[]}
 */
function sortedChats() {
  const when = (/** @type {ChatView} */ chat) =>
    Math.max(Date.parse(chat.last_message?.created_at ?? "") || 0, chat.arrived);
  return [...model.chats.values()].sort(
    (a, b) =>
      when(b) - when(a) || (b.last_message?.id ?? 0) - (a.last_message?.id ?? 0),
  );
}

/**
 * Takes a chat as the server describes it, keeping what only the page knows.
 * @param {WireChat} wire
 * @returns {ChatView}
 */
function putChat(wire) {
  const before = model.chats.get(wire.id);
  for (const { user_id, name } of wire.members) model.names.set(user_id, name);
  const mine = wire.members.find(({ user_id }) => user_id === myId());
  /** @type {ChatView} */
  const chat = before ?? {
    id: wire.id,
    title: null,
    members: new Map(),
    last_n: 0,
    read_n: 0,
    last_message: null,
    messages: [],
    loaded: false,
    more: true,
    loading: "no",
    divider: null,
    typing: new Map(),
    arrived: 0,
    draft: "",
  };
  chat.title = wire.title;
  chat.last_message = newer(chat.last_message, wire.last_message);
  chat.last_n = Math.max(chat.last_n, wire.last_n);
  chat.read_n = Math.max(chat.read_n, wire.read_n ?? mine?.read_n ?? 0);
  chat.members = new Map(
    wire.members.map(({ user_id, read_n }) => [
      user_id,
      Math.max(read_n ?? 0, chat.members.get(user_id) ?? 0),
    ]),
  );
  model.chats.set(chat.id, chat);
  return chat;
}

/** @param {Message | null} a @param {Message | null} b */
function newer(a, b) {
  return (a?.n ?? 0) >= (b?.n ?? 0) ? a : b;
}

/** @param {ChatView} chat @param {number} userId @param {number} n */
function hasRead(chat, userId, n) {
  if (userId === myId()) chat.read_n = Math.max(chat.read_n, n);
  const before = chat.members.get(userId);
  if (before !== undefined) chat.members.set(userId, Math.max(before, n));
}

/**
 * Adds messages to those loaded. What lies before a hole is forgotten: it is fetched
 * again when somebody scrolls there.
 * @param {ChatView} chat
 * @param {Message[]} messages
 */
function merge(chat, messages) {
  const byN = new Map(
    [...chat.messages, ...messages].map((message) => [message.n, message]),
  );
  const all = [...byN.values()].sort((a, b) => a.n - b.n);
  let first = all.length - 1;
  while (first > 0 && all[first - 1]?.n === (all[first]?.n ?? 0) - 1) first -= 1;
  chat.messages = all.slice(Math.max(0, first));
  chat.more = (chat.messages[0]?.n ?? 1) > 1;
}

/** @param {Message} message */
function putMessage(message) {
  const chat = model.chats.get(message.chat_id);
  if (!chat) return;
  chat.last_n = Math.max(chat.last_n, message.n);
  chat.last_message = newer(chat.last_message, message);
  hasRead(chat, message.sender_id, message.n);
  stopTyping(chat, message.sender_id);
  if (chat.loaded || chat.loading === "yes") merge(chat, [message]);
}

/** @param {ChatView} chat @param {number} userId */
function stopTyping(chat, userId) {
  clearTimeout(chat.typing.get(userId));
  chat.typing.delete(userId);
}

/** @param {number} chatId */
function removeChat(chatId) {
  const chat = model.chats.get(chatId);
  if (!chat) return;
  chat.typing.forEach((timer) => clearTimeout(timer));
  model.chats.delete(chatId);
  if (model.open === chat) location.hash = "#chats";
}

/* -------------------------------------------------------------------------------------
 * Events. One table: what the connection tells, and what it does to the model.
 * ---------------------------------------------------------------------------------- */

/** @typedef {import("./chat-websocket.js").ChatEvents} ChatEvents */
/** @type {{[Type in keyof ChatEvents]?: (event: ChatEvents[Type]) => void}} */
const reactions = {
  state: onState,
  resync: () => void fetchChats(),
  chats: onChats,
  connected: ({ chats }) => onConnected(chats),
  new_message: ({ message }) => onNewMessage(message),
  message_read: ({ chat_id, read_by, n }) => {
    const chat = model.chats.get(chat_id);
    if (chat) hasRead(chat, read_by, n);
  },
  chat_added: ({ chat }) => {
    putChat(chat).arrived = Date.now();
    route();
  },
  member_added: ({ chat_id, user_id, name }) => {
    const chat = model.chats.get(chat_id);
    model.names.set(user_id, name);
    chat?.members.set(user_id, chat.last_n);
  },
  member_removed: ({ chat_id, user_id }) => onMemberRemoved(chat_id, user_id),
  typing: ({ chat_id, user_id, is_typing }) => onTyping(chat_id, user_id, is_typing),
  delivery: onDelivery,
};

/** @param {ChatWebSocket} client */
function listen(client) {
  for (const [type, react] of Object.entries(reactions)) {
    client.on(/** @type {keyof ChatEvents} */ (type), (event) => {
      if (client !== model.client) return;
      /** @type {(event: any) => void} */ (react)(event);
      askForRender();
    });
  }
}

/** @param {import("./chat-websocket.js").StateChange} change */
function onState({ state }) {
  const [title] = bannerText(state);
  if (state !== model.link && title) announce(title);
  model.link = state;
  if (state === "signed_out") onSignedOut();
}

/** @param {import("./chat-websocket.js").Snapshot} snapshot */
function onChats({ chats, cursor }) {
  const epoch = cursor.slice(0, cursor.lastIndexOf("."));
  if (epoch !== model.epoch) model.chats.forEach(forgetCounts);
  model.epoch = epoch;
  const ids = new Set(chats.map(({ id }) => id));
  for (const id of model.chats.keys()) if (!ids.has(id)) removeChat(id);
  for (const wire of chats) putChat(wire).loaded = false;
  model.known = true;
  route();
  if (model.open) void loadLatest(model.open);
}

/** The server goes on from a backup: what came after it is gone. @param {ChatView} chat */
function forgetCounts(chat) {
  const gone = {
    last_n: 0,
    read_n: 0,
    last_message: null,
    messages: [],
    divider: null,
  };
  Object.assign(chat, gone, { members: new Map() });
}

/** @param {Record<string, {last_n: number, read_n: number}>} chats */
function onConnected(chats) {
  for (const [id, { last_n, read_n }] of Object.entries(chats)) {
    const chat = model.chats.get(Number(id));
    if (!chat) continue;
    chat.last_n = Math.max(chat.last_n, last_n);
    hasRead(chat, myId(), read_n);
  }
  void loadPeople();
}

/** @param {Message} message */
function onNewMessage(message) {
  putMessage(message);
  const chat = model.chats.get(message.chat_id);
  if (!chat || message.sender_id === myId() || chat.read_n >= message.n) return;
  if (chat === model.open && chat.divider === null && !watchesEnd()) {
    chat.divider = message.n - 1;
  }
  const where = chat === model.open ? "" : ` in ${chatTitle(chat)}`;
  announce(
    `${personName(message.sender_id)}${where}: ${message.content.slice(0, 200)}`,
  );
  notify(chat, message);
}

/** @param {number} chatId @param {number} userId */
function onMemberRemoved(chatId, userId) {
  const chat = model.chats.get(chatId);
  if (!chat) return;
  if (userId !== myId()) {
    chat.members.delete(userId);
    stopTyping(chat, userId);
    return;
  }
  toast(`You are no longer in “${chatTitle(chat)}”.`);
  removeChat(chatId);
}

/** @param {number} chatId @param {number} userId @param {boolean} isTyping */
function onTyping(chatId, userId, isTyping) {
  const chat = model.chats.get(chatId);
  if (!chat) return;
  stopTyping(chat, userId);
  if (!isTyping) return;
  chat.typing.set(
    userId,
    after(TYPING_SECONDS, () => {
      stopTyping(chat, userId);
      askForRender();
    }),
  );
}

/** @param {Delivery} delivery */
function onDelivery({ state, client_id, chat_id, message, reason }) {
  if (state === "sent" && message) putMessage(message);
  if (state !== "failed") return;
  announce(`Your message was not sent: ${reason}`);
  // Of a chat that one was removed from, nobody could see it and try again.
  if (model.known && !model.chats.has(chat_id)) model.client?.discard(client_id);
}

/** Fetches the chats, again and again until it succeeds or nobody wants it any more. */
async function fetchChats() {
  const { client } = model;
  try {
    await client?.fetchChats();
    // Who only polls is never told `connected`.
    if (client === model.client && model.people === null) void loadPeople();
  } catch (error) {
    const final = error instanceof ChatError && error.status === 401;
    if (!final)
      after(AGAIN_SECONDS, () => void (client === model.client && fetchChats()));
  }
}

async function loadPeople() {
  const { client } = model;
  try {
    const { users } = await client?.request("GET", "/api/v1/users");
    if (client !== model.client) return;
    for (const { user_id, name } of users) model.names.set(user_id, name);
    model.people = users.map((/** @type {{user_id: number}} */ { user_id }) => user_id);
  } catch (error) {
    // Refused: this server lets only its operator create chats. No answer: the next
    // connection asks again.
    if (error instanceof ChatError && error.status > 0) model.people = null;
  }
  askForRender();
}

/* -------------------------------------------------------------------------------------
 * Reading. A message is read when it was on the screen, in a tab that is being looked
 * at.
 * ---------------------------------------------------------------------------------- */

/** The reader looks at the end of the open chat. */
function watchesEnd() {
  return document.visibilityState === "visible" && pane.atEnd();
}

/**
 * Tells the server, and our badges, up to where the open chat has been on the screen.
 */
function markSeen() {
  const chat = model.open;
  if (!chat || document.visibilityState !== "visible" || unread(chat) === 0) return;
  const seen = pane.lastSeen();
  if (!seen || seen.n <= chat.read_n) return;
  hasRead(chat, myId(), seen.n);
  model.client?.markRead(chat.id, seen.id);
  askForRender();
}

/** Loads the newest messages. @param {ChatView} chat */
async function loadLatest(chat) {
  await loadHistory(chat, "");
  chat.loaded = chat.loading === "no";
  askForRender();
}

/** @param {ChatView} chat */
async function loadOlder(chat) {
  const [first] = chat.messages;
  if (first && chat.more) await loadHistory(chat, `&before=${first.id}`);
  if (!chat.loaded) await loadLatest(chat); // a resync came meanwhile
}

/** @param {ChatView} chat @param {string} before a query, or nothing for the newest */
async function loadHistory(chat, before) {
  if (chat.loading === "yes") return;
  chat.loading = "yes";
  askForRender();
  try {
    const path = `/api/v1/chats/${chat.id}/messages?limit=${HISTORY_LIMIT}${before}`;
    const { messages, more } = await model.client?.request("GET", path);
    merge(chat, messages);
    if (!more) chat.more = false;
    chat.loading = "no";
  } catch {
    chat.loading = "failed";
  }
  askForRender();
}

/* -------------------------------------------------------------------------------------
 * Top and lists. Connection, bell, banner, chats.
 * ---------------------------------------------------------------------------------- */

/**
 * One render for all that changed in this turn; a hidden tab has no frames, so a timer.
 */
function askForRender() {
  if (renderAsked) return;
  renderAsked = true;
  if (document.visibilityState === "hidden") after(0, render);
  else requestAnimationFrame(render);
}
let renderAsked = false;

function render() {
  renderAsked = false;
  if (!model.session) return;
  renderTop();
  renderBanner();
  renderList();
  renderBell();
  pane.render();
  markSeen();
}

/** @type {Record<State, string>} */
const LINK_TEXT = {
  connecting: "Connecting…",
  connected: "Live",
  polling: "Every 5 s",
  offline: "Offline",
  signed_out: "Signed out",
  too_many: "Paused",
  refused: "Closed",
  closed: "Connecting…",
};

function renderTop() {
  const state = model.link;
  const total = [...model.chats.values()].reduce((sum, chat) => sum + unread(chat), 0);
  const me = personName(myId(), model.session?.name);
  setText("link-text", LINK_TEXT[state]);
  box("link").dataset["state"] = state === "closed" ? "connecting" : state;
  setText("me-name", me);
  setText("me-panel-name", `Signed in as ${me}`);
  fillAvatar(box("me-avatar"), myId(), me);
  setText("bell-count", total > 99 ? "99+" : String(total));
  box("bell-count").hidden = total === 0;
  setText("bell-label", total ? plural("new message", total) : "No new messages");
  const place = model.open ? `${chatTitle(model.open)} · chatd` : "chatd";
  document.title = total ? `(${total}) ${place}` : place;
  button("new-chat").hidden = model.people === null;
}

/**
 * Only a real change, so that a screen reader is not told again.
 * @param {string} id
 * @param {string} text
 */
function setText(id, text) {
  const node = box(id);
  if (node.textContent !== text) node.textContent = text;
}

/** @param {State} state @returns {string[]} the warning, and what happens meanwhile */
function bannerText(state) {
  switch (state) {
    case "polling":
      return [
        "Live updates are interrupted.",
        "New messages are fetched every 5 seconds.",
      ];
    case "offline":
      return ["No connection.", "What you write is kept and sent when it is back."];
    case "too_many":
      return [
        "chatd is open in too many places.",
        "Close another one, then come back here.",
      ];
    case "refused":
      return [
        "The server has closed this connection.",
        "Load the page again to go on.",
      ];
    default:
      return [];
  }
}

function renderBanner() {
  const state = model.link;
  const [title, meanwhile = ""] = bannerText(state);
  box("banner").hidden = !title;
  setText("banner-title", title ?? "");
  if (!title) return;
  const seconds = Math.ceil(model.client?.retryIn ?? 0);
  const waiting = state === "polling" || state === "offline";
  const next = seconds > 0 ? `Next try in ${seconds} s.` : "Trying now…";
  setText("banner-next", waiting ? `${meanwhile} ${next}` : meanwhile);
  button("banner-retry").hidden = state === "refused";
  button("banner-retry").disabled = waiting && seconds === 0;
}

function renderList() {
  const rows = sortedChats().map((chat) => chatRow(chat, chat === model.open));
  showRows(box("chat-list"), rows);
  box("chat-list-empty").hidden = rows.length > 0 || !model.known;
}

/** @param {ChatView} chat @param {boolean} current @returns {Row} */
function chatRow(chat, current) {
  const title = chatTitle(chat);
  const typing = typingText(chat);
  const last = typing || lastLine(chat);
  const when = chat.last_message ? shortTime(chat.last_message.created_at) : "";
  const count = unread(chat);
  return {
    key: String(chat.id),
    look: JSON.stringify([title, last, when, count, current, Boolean(typing)]),
    build: () =>
      el(
        "li",
        {},
        el(
          "a",
          {
            class: classes("row", { unread: count > 0 }),
            href: `#chat/${chat.id}`,
            "aria-current": current ? "page" : null,
          },
          avatar(chat),
          el("span", { class: "row-title", dir: "auto" }, title),
          el("span", { class: "row-time" }, when),
          el(
            "span",
            { class: classes("row-last", { "is-typing": typing !== "" }), dir: "auto" },
            last,
          ),
          count ? badge(count) : null,
        ),
      ),
  };
}

/** @param {ChatView} chat */
function lastLine(chat) {
  const message = chat.last_message;
  if (!message) return "No messages yet";
  const text = message.content.slice(0, 120);
  if (message.sender_id === myId()) return `You: ${text}`;
  const [first] = personName(message.sender_id).split(" ");
  return others(chat).length > 1 ? `${first}: ${text}` : text;
}

/** @param {number} count */
function badge(count) {
  return el(
    "span",
    { class: "badge" },
    count > 99 ? "99+" : String(count),
    el("span", { class: "sr-only" }, " unread"),
  );
}

/** @param {ChatView} chat */
function avatar(chat) {
  const [first = myId(), second] = others(chat);
  const direct = !chat.title && second === undefined;
  const node = el("span", { class: "avatar", "aria-hidden": "true" });
  fillAvatar(node, direct ? first : chat.id * 7, chatTitle(chat));
  return node;
}

/** @param {HTMLElement} node @param {number} seed @param {string} name */
function fillAvatar(node, seed, name) {
  const words = name.split(/\s+/).map((word) => word.replace(/[^\p{L}\p{N}]/gu, ""));
  const letters = words
    .filter(Boolean)
    .slice(0, 2)
    .map((word) => [...word][0] ?? "");
  node.textContent = letters.join("").toUpperCase() || "?";
  node.style.setProperty("--hue", String((seed * 67 + 110) % 360));
}

function renderBell() {
  const rows = sortedChats()
    .filter(unread)
    .map((chat) => chatRow(chat, false));
  showRows(box("bell-list"), rows);
  box("bell-empty").hidden = rows.length > 0;
  const permission = "Notification" in window ? Notification.permission : "unsupported";
  button("notify").hidden = permission !== "default";
  box("notify-denied").hidden = permission !== "denied";
}

/* -------------------------------------------------------------------------------------
 * The open chat. The place of the reader comes first: after each render he sees what he
 * saw before, or the end if he was at the end.
 * ---------------------------------------------------------------------------------- */

const pane = {
  /** Where to go once the messages are there. @type {"stay" | "start"} */
  goTo: "stay",
  follow: true,
  /** Newest n that was drawn: what comes after it arrives with a little motion. */
  drawn: Infinity,

  atEnd() {
    const { scrollHeight, scrollTop, clientHeight } = box("scroller");
    return scrollHeight - scrollTop - clientHeight < END_MARGIN;
  },

  toEnd() {
    this.follow = true;
    box("scroller").scrollTop = box("scroller").scrollHeight;
  },

  /**
   * The last message of which enough is on the screen.
   * @returns {{id: number, n: number} | null}
   */
  lastSeen() {
    const view = box("scroller").getBoundingClientRect();
    if (view.height === 0) return null;
    for (
      let row = box("messages").lastElementChild;
      row;
      row = row.previousElementSibling
    ) {
      if (!(row instanceof HTMLElement) || !row.dataset["n"]) continue;
      const { top, height } = row.getBoundingClientRect();
      if (top + Math.min(height, SEEN_PIXELS) <= view.bottom) {
        return { id: Number(row.dataset["id"]), n: Number(row.dataset["n"]) };
      }
    }
    return null;
  },

  render() {
    const chat = model.open;
    box("chat").classList.toggle("reading", chat !== null);
    for (const id of ["pane-head", "pane-body", "composer"]) box(id).hidden = !chat;
    box("pane-empty").hidden = chat !== null;
    box("typing").hidden = !chat;
    if (!chat) return;
    this.renderHead(chat);
    this.keepPlace(() => showRows(box("messages"), messageRows(chat)));
    this.drawn = chat.messages.at(-1)?.n ?? this.drawn;
    this.begin(chat);
    this.renderJump(chat);
    setText("typing", typingText(chat));
    this.wantOlder(chat);
  },

  /** @param {ChatView} chat */
  renderHead(chat) {
    const title = chatTitle(chat);
    const people = others(chat);
    const names = [...people.map((id) => personName(id)), "you"].join(", ");
    setText("pane-title", title);
    setText("pane-members", chat.title || people.length > 1 ? names : "Direct chat");
    const direct = !chat.title && people.length === 1;
    fillAvatar(box("pane-avatar"), direct ? (people[0] ?? 0) : chat.id * 7, title);
    box("scroller").setAttribute("aria-label", `Messages in ${title}`);
  },

  /** @param {() => void} change */
  keepPlace(change) {
    const anchor = this.follow ? null : this.firstVisible();
    const top = anchor?.getBoundingClientRect().top ?? 0;
    change();
    if (this.follow) this.toEnd();
    else if (anchor?.isConnected) this.moveBy(anchor.getBoundingClientRect().top - top);
  },

  /**
   * Not by nothing: even that would stop a finger's scrolling.
   * @param {number} pixels
   */
  moveBy(pixels) {
    if (Math.abs(pixels) >= 1) box("scroller").scrollTop += pixels;
  },

  firstVisible() {
    const { top } = box("scroller").getBoundingClientRect();
    return [...box("messages").children].find(
      (row) =>
        row instanceof HTMLElement &&
        row.dataset["n"] &&
        row.getBoundingClientRect().bottom > top,
    );
  },

  /** Just opened: to the first new message, else to the end. @param {ChatView} chat */
  begin(chat) {
    if (this.goTo !== "start" || !chat.loaded) return;
    this.goTo = "stay";
    const divider = box("messages").querySelector(".divider");
    if (!divider) return this.toEnd();
    // Not scrollIntoView: that would move the whole page where it can.
    const scroller = box("scroller");
    const { top, height } = scroller.getBoundingClientRect();
    scroller.scrollTop += divider.getBoundingClientRect().top - top - height / 3;
    this.follow = this.atEnd();
  },

  /** @param {ChatView} chat */
  renderJump(chat) {
    const count = unread(chat);
    button("jump").hidden = this.atEnd();
    setText("jump-text", count ? plural("new message", count) : "Latest");
  },

  /** @param {ChatView} chat */
  wantOlder(chat) {
    const scroller = box("scroller");
    const near = scroller.clientHeight > 0 && scroller.scrollTop < HISTORY_MARGIN;
    if (near && chat.loaded && chat.loading === "no" && chat.more) void loadOlder(chat);
  },

  onScroll() {
    const { open } = model;
    if (!open) return;
    this.follow = this.atEnd();
    this.renderJump(open);
    this.wantOlder(open);
    markSeen();
  },
};

/** @param {ChatView} chat @returns {string} "" when nobody does */
function typingText(chat) {
  const names = [...chat.typing.keys()].map((id) => personName(id));
  if (names.length === 0) return "";
  if (names.length > 2) return "Several people are typing…";
  return `${names.join(" and ")} ${names.length === 1 ? "is" : "are"} typing…`;
}

/**
 * Everything in the open chat, top to bottom.
 * @param {ChatView} chat
 * @returns {Row[]}
 */
function messageRows(chat) {
  /** @type {Row[]} */
  const rows = [historyRow(chat)];
  /** @type {Message | null} */
  let before = null;
  for (const message of chat.messages) {
    const newDay =
      !before || dayName(before.created_at) !== dayName(message.created_at);
    const newPart = chat.divider !== null && message.n === chat.divider + 1;
    if (newDay) rows.push(dayRow(message));
    if (newPart) rows.push(DIVIDER_ROW);
    const first = newDay || newPart || !before || !sameGroup(before, message);
    rows.push(messageRow(chat, message, first));
    before = message;
  }
  const unsent = unseen(chat);
  const apart = before?.sender_id !== myId();
  return [
    ...rows,
    ...unsent.map((delivery, i) => unsentRow(delivery, apart && i === 0)),
  ];
}

/**
 * What is under way and not among the messages yet: where an answer was lost, or
 * another tab sent it, the message may be here before its outbox knows.
 * @param {ChatView} chat
 */
function unseen(chat) {
  const mine = chat.messages.filter(({ sender_id }) => sender_id === myId());
  const here = new Set(mine.map(({ client_id }) => client_id));
  const unsent = model.client?.unsent(chat.id) ?? [];
  return unsent.filter(({ client_id }) => !here.has(client_id));
}

/**
 * @param {ChatView} chat
 * @returns {Row} the top: the beginning, or the way to older ones
 */
function historyRow(chat) {
  const look = chat.loading === "no" ? (chat.more ? "more" : "start") : chat.loading;
  const text = { more: "", yes: "Loading…", failed: "Messages could not be loaded." };
  return {
    key: "history",
    look: `${look} ${chat.last_n > 0}`,
    build: () => {
      if (look === "start") {
        return el(
          "li",
          { class: "history" },
          chat.last_n > 0
            ? "The beginning of this chat"
            : "No messages yet. Say hello.",
        );
      }
      const row = el("li", { class: "history" }, text[look]);
      if (look === "failed")
        row.append(
          " ",
          textButton("Try again", () => void reload(chat)),
        );
      return row;
    },
  };
}

/** @param {ChatView} chat */
function reload(chat) {
  return chat.loaded ? loadOlder(chat) : loadLatest(chat);
}

/** @param {Message} message @returns {Row} */
function dayRow({ created_at }) {
  const name = dayName(created_at);
  const day = new Date(created_at).toDateString();
  return {
    key: `day ${day}`,
    look: name,
    build: () => el("li", { class: "day" }, name),
  };
}

/** @type {Row} */
const DIVIDER_ROW = {
  key: "divider",
  look: "",
  build: () => el("li", { class: "divider" }, "New messages"),
};

/** @param {Message} a @param {Message} b */
function sameGroup(a, b) {
  const seconds = (Date.parse(b.created_at) - Date.parse(a.created_at)) / 1000;
  return a.sender_id === b.sender_id && seconds < GROUP_SECONDS;
}

/**
 * @param {ChatView} chat
 * @param {Message} message
 * @param {boolean} first of a group
 * @returns {Row}
 */
function messageRow(chat, message, first) {
  const own = message.sender_id === myId();
  const name = personName(message.sender_id);
  const tick = own ? readBy(chat, message.n) : "";
  const arriving = message.n > pane.drawn && !own;
  return {
    key: own && message.client_id ? `c ${message.client_id}` : `m ${message.id}`,
    look: JSON.stringify([message.n, first, name, tick]),
    build: () =>
      el(
        "li",
        {
          class: classes("message", { own, first, arriving }),
          "data-id": message.id,
          "data-n": message.n,
        },
        own ? null : personAvatar(message.sender_id),
        el(
          "div",
          { class: "bubble" },
          senderLine(own, first, name),
          el(
            "div",
            { class: "flow" },
            contentNode(message.content),
            stamp(message.created_at, tick),
          ),
        ),
      ),
  };
}

/** @param {number} userId */
function personAvatar(userId) {
  const node = el("span", { class: "avatar small", "aria-hidden": "true" });
  fillAvatar(node, userId, personName(userId));
  return node;
}

/**
 * Names stand above a group; a screen reader hears one with each message.
 * @param {boolean} own
 * @param {boolean} first
 * @param {string} name
 */
function senderLine(own, first, name) {
  if (own) return el("p", { class: "sr-only" }, "You:");
  return el("p", { class: first ? "sender" : "sr-only", dir: "auto" }, name);
}

/** @param {ChatView} chat @param {number} n @returns {string} what the tick says */
function readBy(chat, n) {
  const people = others(chat);
  const readers = people.filter((id) => (chat.members.get(id) ?? 0) >= n).length;
  if (readers === 0) return "Sent";
  return readers === people.length ? "Read" : `Read by ${readers} of ${people.length}`;
}

/** @param {string} created_at @param {string} tick @returns {HTMLElement} */
function stamp(created_at, tick) {
  const date = new Date(created_at);
  const read = tick.startsWith("Read");
  const node = el(
    "span",
    { class: "stamp", title: tick || null },
    el(
      "time",
      { datetime: created_at, title: moment.format(date) },
      clock.format(date),
    ),
  );
  if (tick) {
    node.append(
      icon(read ? "read" : "sent", tick === "Read" ? "tick-read" : ""),
      el("span", { class: "sr-only" }, tick),
    );
  }
  return node;
}

/** @param {Delivery} delivery @param {boolean} first @returns {Row} */
function unsentRow(delivery, first) {
  const { client_id, content, state, reason = "" } = delivery;
  const failed = state === "failed";
  return {
    key: `c ${client_id}`,
    look: JSON.stringify([state, reason, first]),
    build: () =>
      el(
        "li",
        { class: classes("message own", { first, failed }) },
        el(
          "div",
          { class: "bubble" },
          senderLine(true, first, ""),
          el(
            "div",
            { class: "flow" },
            contentNode(content),
            el(
              "span",
              { class: "stamp" },
              icon(failed ? "failed" : "sending"),
              el("span", { class: "sr-only" }, failed ? "Not sent" : "Sending"),
            ),
          ),
          failed ? failureLine(delivery) : null,
        ),
      ),
  };
}

/**
 * What the text is to blame for can be edited, else tried again.
 * @param {Delivery} delivery
 */
function failureLine({ client_id, content, code, reason }) {
  const textIsWrong = code === "bad_field" || code === "too_large";
  const discard = () => model.client?.discard(client_id);
  return el(
    "p",
    { class: "failure" },
    `Not sent: ${reason} `,
    textIsWrong
      ? textButton("Edit", () => {
          discard();
          composer.value = content;
          growComposer();
          composer.focus();
        })
      : textButton("Try again", () => model.client?.resend(client_id)),
    textButton("Delete", discard),
  );
}

/** @param {string} text @param {() => void} press */
function textButton(text, press) {
  const node = el("button", { class: "text-button", type: "button" }, text);
  node.addEventListener("click", press);
  return node;
}

/** The words of a message, with links for http and https. @param {string} content */
function contentNode(content) {
  const node = el("div", { class: "content", dir: "auto" });
  let from = 0;
  for (const match of content.matchAll(/\bhttps?:\/\/[^\s<>"]+/giu)) {
    const address = withoutEnd(match[0]);
    if (!isWebAddress(address)) continue;
    node.append(
      content.slice(from, match.index),
      el(
        "a",
        {
          href: address,
          target: "_blank",
          rel: "noopener noreferrer nofollow",
        },
        address,
      ),
    );
    from = match.index + address.length;
  }
  node.append(content.slice(from));
  return node;
}

/**
 * Punctuation at the end belongs to the sentence, and so does a bracket that was not
 * opened in the address.
 * @param {string} address
 * @returns {string}
 */
function withoutEnd(address) {
  const short = address.replace(/[.,;:!?'”»…]+$/u, "");
  const count = (/** @type {string} */ sign) => short.split(sign).length;
  const closed = short.endsWith(")") && count(")") > count("(");
  return closed ? withoutEnd(short.slice(0, -1)) : short;
}

/** @param {string} text */
function isWebAddress(text) {
  try {
    return ["http:", "https:"].includes(new URL(text).protocol);
  } catch {
    return false;
  }
}

/** @param {ChatView | null} chat */
function selectChat(chat) {
  const before = model.open;
  if (before === chat) return;
  if (before) {
    before.draft = composer.value;
    before.divider = null;
    model.client?.sendTyping(before.id, false);
  }
  model.open = chat;
  box("messages").replaceChildren();
  pane.drawn = Infinity;
  pane.follow = true;
  pane.goTo = "start";
  composer.value = chat?.draft ?? "";
  if (!chat) return;
  chat.divider = unread(chat) > 0 ? chat.read_n : null;
  if (!chat.loaded) void loadLatest(chat);
}

/** The address bar says which chat is open, so the browser's back button works. */
function route() {
  const match = /^#chat\/(\d+)$/.exec(location.hash);
  const chat = model.chats.get(Number(match?.[1])) ?? null;
  if (match && !chat && !model.known) return; // the list of chats is still on its way
  const before = model.open;
  selectChat(chat);
  askForRender();
  if (before !== chat && document.activeElement !== document.body) {
    requestAnimationFrame(() => moveFocus(before));
  }
}

/**
 * Into the chat that was opened; back to its row in the list when it was closed.
 * @param {ChatView | null} before
 */
function moveFocus(before) {
  const typist = matchMedia("(pointer: fine)").matches;
  /** @type {HTMLElement | null} */
  const target = model.open
    ? typist
      ? composer
      : box("scroller")
    : box("chat-list").querySelector(`[href="#chat/${before?.id}"]`);
  target?.focus({ preventScroll: true });
}

/* -------------------------------------------------------------------------------------
 * Writing.
 * ---------------------------------------------------------------------------------- */

const composer = byId("composer-text", HTMLTextAreaElement);

/** @param {Event} [event] */
function submitMessage(event) {
  event?.preventDefault();
  const chat = model.open;
  // What is pasted from a terminal may have control characters; the server refuses them.
  const content = composer.value.replace(CONTROL, "").trim();
  if (!chat || !content) return;
  composer.value = "";
  growComposer();
  chat.divider = null;
  model.client?.sendTyping(chat.id, false);
  model.client?.send(chat.id, content);
  pane.follow = true;
  askForRender();
}

/** As high as its text, within the limit of the style sheet. */
function growComposer() {
  composer.style.height = "auto";
  const border = composer.offsetHeight - composer.clientHeight;
  composer.style.height = `${composer.scrollHeight + border}px`;
}

function onComposerInput() {
  growComposer();
  if (model.open) model.client?.sendTyping(model.open.id, composer.value.trim() !== "");
}

/**
 * Enter sends; with Shift, or on a touch keyboard, it begins a new line.
 * @param {KeyboardEvent} event
 */
function onComposerKey(event) {
  const touch = matchMedia("(pointer: coarse)").matches;
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch) return;
  submitMessage(event);
}

/* -------------------------------------------------------------------------------------
 * Dialogs.
 * ---------------------------------------------------------------------------------- */

/**
 * Asks a question and waits for the answer; closing it means no.
 * @param {{title: string, text: string, yes: string, no: string}} words
 * @returns {Promise<boolean>}
 */
function ask({ title, text, yes, no }) {
  const node = dialog("ask");
  if (node.open) node.close("no");
  setText("ask-title", title);
  setText("ask-text", text);
  setText("ask-yes", yes);
  setText("ask-no", no);
  node.returnValue = "no";
  node.showModal();
  return new Promise((resolve) => {
    node.addEventListener("close", () => resolve(node.returnValue === "yes"), {
      once: true,
    });
  });
}

/**
 * Whom the people dialog adds to; null: it makes a new chat.
 * @type {ChatView | null}
 */
let addingTo = null;

/** @param {ChatView | null} chat */
function choosePeople(chat) {
  addingTo = chat;
  setText("people-title", chat ? `Add people to “${chatTitle(chat)}”` : "New chat");
  setText("people-submit", chat ? "Add" : "Create");
  setText("people-error", "");
  box("people-name").hidden = chat !== null;
  field("people-chat-title").value = "";
  field("people-filter").value = "";
  showCandidates();
  dialog("people").showModal();
  void loadPeople().then(showCandidates);
}

/** Fills the list of the people dialog; those already chosen stay chosen. */
function showCandidates() {
  const inside = addingTo?.members ?? new Map([[myId(), 0]]);
  const ids = (model.people ?? []).filter((id) => !inside.has(id));
  ids.sort((a, b) => personName(a).localeCompare(personName(b)));
  showRows(
    box("people-list"),
    ids.map((id) => ({
      key: String(id),
      look: personName(id),
      build: () => candidate(id),
    })),
  );
  box("people-empty").hidden = ids.length > 0;
  filterCandidates();
}

/** @param {number} userId */
function candidate(userId) {
  return el(
    "li",
    {},
    el(
      "label",
      { class: "person" },
      el("input", { type: "checkbox", value: userId }),
      personAvatar(userId),
      el("span", { dir: "auto" }, personName(userId)),
    ),
  );
}

function filterCandidates() {
  const wanted = field("people-filter").value.trim().toLowerCase();
  for (const row of box("people-list").children) {
    if (!(row instanceof HTMLElement)) continue;
    const chosen = row.querySelector("input")?.checked;
    row.hidden = !chosen && !row.dataset["look"]?.toLowerCase().includes(wanted);
  }
}

/** @param {SubmitEvent} event */
async function onPeopleForm(event) {
  event.preventDefault();
  const inputs = [...box("people-list").querySelectorAll("input")];
  const chosen = inputs
    .filter(({ checked }) => checked)
    .map(({ value }) => Number(value));
  if (chosen.length === 0) {
    setText("people-error", "Choose at least one person.");
    return;
  }
  button("people-submit").disabled = true;
  try {
    if (addingTo) await addMembers(addingTo, chosen);
    else await createChat(field("people-chat-title").value.trim() || null, chosen);
    dialog("people").close();
  } catch (error) {
    setText("people-error", sentence(error));
  } finally {
    button("people-submit").disabled = false;
    askForRender();
  }
}

/** @param {ChatView} chat @param {number[]} userIds */
async function addMembers(chat, userIds) {
  for (const user_id of userIds) {
    await model.client?.request("POST", `/api/v1/chats/${chat.id}/members`, {
      user_id,
    });
  }
}

/**
 * Opens the chat that it creates, or the direct chat that exists.
 * @param {string | null} title
 * @param {number[]} member_ids
 */
async function createChat(title, member_ids) {
  const direct =
    !title &&
    member_ids.length === 1 &&
    [...model.chats.values()].find(
      (chat) =>
        !chat.title &&
        others(chat).length === 1 &&
        chat.members.has(member_ids[0] ?? 0),
    );
  if (direct) {
    location.hash = `#chat/${direct.id}`;
    return;
  }
  const { chat } = await model.client?.request("POST", "/api/v1/chats", {
    title,
    member_ids,
  });
  putChat(chat).arrived = Date.now();
  location.hash = `#chat/${chat.id}`;
}

function showInfo() {
  const chat = model.open;
  if (!chat) return;
  setText("info-title", chatTitle(chat));
  const people = [...others(chat), myId()];
  box("info-members").replaceChildren(
    ...people.map((id) =>
      el(
        "li",
        { class: "person" },
        personAvatar(id),
        el("span", { dir: "auto" }, personName(id)),
        id === myId() ? el("span", { class: "quiet" }, "you") : null,
      ),
    ),
  );
  button("info-add").hidden = model.people === null;
  dialog("info").showModal();
}

function onInfoAdd() {
  dialog("info").close();
  if (model.open) choosePeople(model.open);
}

async function onInfoLeave() {
  const chat = model.open;
  dialog("info").close();
  if (!chat) return;
  const sure = await ask({
    title: `Leave “${chatTitle(chat)}”?`,
    text: "You will get no more messages from it. Somebody in it can add you again.",
    yes: "Leave",
    no: "Stay",
  });
  if (!sure) return;
  try {
    await model.client?.request("DELETE", `/api/v1/chats/${chat.id}/members/${myId()}`);
  } catch (error) {
    toast(sentence(error));
  }
}

/* -------------------------------------------------------------------------------------
 * Notifications. Only while the tab is hidden, only after a click that allowed them.
 * ---------------------------------------------------------------------------------- */

async function onNotifyButton() {
  await Notification.requestPermission();
  askForRender();
}

/** @param {ChatView} chat @param {Message} message */
function notify(chat, message) {
  const allowed = "Notification" in window && Notification.permission === "granted";
  if (!allowed || document.visibilityState === "visible") return;
  after(NOTIFY_SECONDS, () => {
    const seen = chat.read_n >= message.n || document.visibilityState === "visible";
    if (!seen && model.chats.has(chat.id)) showNotification(chat, message);
  });
}

/** @param {ChatView} chat @param {Message} message */
function showNotification(chat, message) {
  const sender = personName(message.sender_id);
  const title = chat.title ? `${sender} in ${chat.title}` : sender;
  try {
    const shown = new Notification(title, {
      body: message.content.slice(0, 200),
      tag: `chatd.${myId()}.${chat.id}`, // the tabs of one person show one
    });
    shown.addEventListener("click", () => {
      window.focus();
      location.hash = `#chat/${chat.id}`;
      shown.close();
    });
  } catch {
    // Some phones notify only from service workers: there the badge must do.
  }
}

/* -------------------------------------------------------------------------------------
 * Start.
 * ---------------------------------------------------------------------------------- */

/**
 * Shows this person's chats and connects. Replaces whoever was here.
 * @param {Session} session
 */
function start(session) {
  if (model.session?.token === session.token) return;
  model.client?.disconnect();
  forgetModel();
  writeSession(shelves.tab, session);
  const client = new ChatWebSocket({ bearer: session.token });
  model.session = session;
  model.client = client;
  model.names.set(session.user_id, session.name);
  listen(client);
  showScreen("chat");
  askForRender();
  // With the place of the list the socket goes on without a gap; but a slow answer must
  // not keep us from connecting, and from saying that something is wrong.
  const late = new Promise((resolve) => void after(LATE_SECONDS, () => resolve(null)));
  void Promise.race([fetchChats(), late]).then(() => {
    if (client === model.client) client.connect();
  });
}

function wireUp() {
  const on = (
    /** @type {EventTarget} */ target,
    /** @type {string} */ type,
    /** @type {(event: any) => void} */ react,
  ) => target.addEventListener(type, react);
  on(window, "hashchange", onHash);
  on(signedOut, "message", onSignedOutElsewhere);
  on(window, "beforeunload", onLeaving);
  // At once: a frame that was asked for may never come to a tab that is now hidden.
  on(document, "visibilitychange", render);
  on(box("sign-in-form"), "submit", onSignInForm);
  on(button("sign-out"), "click", () => void onSignOut());
  on(button("banner-retry"), "click", () => model.client?.retry());
  on(button("notify"), "click", () => void onNotifyButton());
  on(box("bell-list"), "click", () => box("bell-panel").hidePopover());
  on(box("skip"), "click", onSkip);
  on(button("jump"), "click", onJump);
  on(box("scroller"), "scroll", () => pane.onScroll());
  on(box("composer"), "submit", submitMessage);
  on(composer, "input", onComposerInput);
  on(composer, "keydown", onComposerKey);
  on(button("new-chat"), "click", () => choosePeople(null));
  on(box("people-form"), "submit", (event) => void onPeopleForm(event));
  on(field("people-filter"), "input", filterCandidates);
  on(button("people-cancel"), "click", () => dialog("people").close());
  on(button("chat-info"), "click", showInfo);
  on(button("info-close"), "click", () => dialog("info").close());
  on(button("info-add"), "click", onInfoAdd);
  on(button("info-leave"), "click", () => void onInfoLeave());
  on(button("ask-yes"), "click", () => dialog("ask").close("yes"));
  on(button("ask-no"), "click", () => dialog("ask").close("no"));
  new ResizeObserver(onResize).observe(box("scroller"));
  setInterval(onSecond, 1000);
}

/** @param {HashChangeEvent} event */
function onHash({ oldURL }) {
  const token = takeLinkToken(new URL(oldURL).hash);
  if (token) void signInWith(token);
  else route();
}

/** @param {Event} event */
function onSkip(event) {
  event.preventDefault();
  (model.open ? composer : box("chat-list").querySelector("a"))?.focus();
}

function onJump() {
  pane.toEnd(); // at once: a smooth way through a long history makes one dizzy
  box("scroller").focus({ preventScroll: true });
}

/** A keyboard came up or the window changed: who was at the end stays there. */
function onResize() {
  if (pane.follow) pane.toEnd();
  markSeen();
}

/** Counts down to the next try. */
function onSecond() {
  if (!box("banner").hidden) renderBanner();
}

function begin() {
  wireUp();
  const token = takeLinkToken();
  const session = sessionToResume();
  if (token) void signInWith(token);
  else if (session) start(session);
  else showSignIn();
}

begin();
