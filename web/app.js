// @ts-check
/**
 * app.js: chatd's page, explained in docs/page.md. The types are in page.d.ts. Text that
 * users have written enters the page only as textContent.
 */
import { ChatError, ChatWebSocket, Drafts } from "./chat-websocket.js";
import { contentNode, folded, isBlank, markedNode, visibleText } from "./text.js";
import { isolated, locale, say } from "./words.js";

/* -------------------------------------------------------------------------------------
 * Loading. Until a screen is shown, any exception ends in words.
 * ---------------------------------------------------------------------------------- */

const SCREENS = ["loading", "sign-in", "join", "chat"];
let loading = true;

/** @param {any} event */
function onLoadError(event) {
  const error = event.error ?? event.reason;
  // Without an error it is only a notice.
  if (!loading || !error) return;
  const text = `${say("broken")} (${error.message ?? error})`;
  for (const id of SCREENS)
    document.getElementById(id)?.toggleAttribute("hidden", id !== "loading");
  document.getElementById("loading")?.replaceChildren(text);
}

addEventListener("error", onLoadError);
addEventListener("unhandledrejection", onLoadError);

/* -------------------------------------------------------------------------------------
 * Tools.
 * ---------------------------------------------------------------------------------- */

/** @template {Element} Kind @param {string} id @param {new () => Kind} kind */
function byId(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`index.html has no #${id}`);
  return found;
}

const box = (/** @type {string} */ id) => byId(id, HTMLElement);
const dialog = (/** @type {string} */ id) => byId(id, HTMLDialogElement);
const field = (/** @type {string} */ id) => byId(id, HTMLInputElement);

/**
 * Makes an element. Strings become text. What is false, null or "" is left out.
 * @template {keyof HTMLElementTagNameMap} Tag @param {Tag} tag
 * @param {Attributes} [attributes] @param {...Child} children
 */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    const text = [value].flat().filter(Boolean).join(" ");
    if (text) node.setAttribute(name, text);
  }
  for (const child of children) if (child) node.append(child);
  return node;
}

/** Or else a browser requests the file for each icon. */
async function loadIcons() {
  const sprite = await fetch("web/icons.svg");
  if (sprite.ok) document.body.insertAdjacentHTML("beforeend", await sprite.text());
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
 * A row with the same key and look keeps its element, and so its focus and selection.
 * @param {HTMLElement} container @param {Row[]} rows
 */
function showRows(container, rows) {
  const { activeElement } = document;
  const before = rowsOf(container.id);
  const focused = before.findIndex((node) => node.contains(activeElement));
  const old = new Map(before.map((node) => [node.dataset["key"], node]));
  const nodes = rows.map((row) => {
    const node = old.get(row.key);
    old.delete(row.key);
    return node?.dataset["look"] === row.look ? node : newRow(row, node);
  });
  old.forEach((node) => node.remove());
  nodes.forEach((node, i) => {
    const there = container.children[i] ?? null;
    if (node !== there) container.insertBefore(node, there);
  });
  if (focused < 0 || document.activeElement !== document.body) return;
  // The row with the focus was replaced or moved, or is gone.
  const key = before[focused]?.dataset["key"];
  const now = nodes.find((node) => node.dataset["key"] === key);
  const row = now ?? nodes[focused] ?? nodes.at(-1);
  const first = row?.querySelector("a, button") ?? container.closest("[tabindex]");
  const same = row?.contains(activeElement) && activeElement instanceof HTMLElement;
  (same ? activeElement : first)?.focus({ preventScroll: true });
}

/** @param {Row} row @param {HTMLElement} [before] */
function newRow({ key, look, build }, before) {
  const node = build();
  Object.assign(node.dataset, { key, look });
  // An open menu may belong to it, or a choice.
  const kept = before?.querySelector(".more, input");
  if (kept) node.querySelector(".more, input")?.replaceWith(kept);
  before?.replaceWith(node);
  return node;
}

/** @param {string} id @returns {HTMLElement[]} */
function rowsOf(id) {
  return /** @type {HTMLElement[]} */ ([...box(id).children]);
}

/** @param {string} id */
function below(id) {
  const { scrollHeight, scrollTop, clientHeight } = box(id);
  return scrollHeight - scrollTop - clientHeight;
}

const END_MARGIN = 60;

const isTouch = () => matchMedia("(pointer: coarse)").matches;

/** What the browser may forbid. @template Value @param {() => Value} get */
function attempt(get) {
  try {
    return get();
  } catch {
    return undefined;
  }
}

function newFormats() {
  const user = attempt(() => new Intl.DateTimeFormat(undefined, { hour: "numeric" }));
  const hourCycle = user?.resolvedOptions().hourCycle;
  const format = (/** @type {Intl.DateTimeFormatOptions} */ options) =>
    new Intl.DateTimeFormat(locale, options);
  return {
    clock: format({ timeStyle: "short", hourCycle }),
    dayNear: format({ weekday: "long", day: "numeric", month: "long" }),
    dayFar: format({ dateStyle: "long" }),
    dayShort: format({ day: "numeric", month: "short" }),
    dayShortFar: format({ dateStyle: "medium" }),
    moment: format({ dateStyle: "full", timeStyle: "short", hourCycle }),
  };
}

function dateAndZone() {
  const now = new Date();
  return `${now.toDateString()} ${now.getTimezoneOffset()}`;
}

let formats = newFormats();
let today = dateAndZone();

/** By the reader's calendar. @param {Date} then */
function daysAgo(then) {
  const midnight = (/** @type {Date} */ date) => new Date(date).setHours(0, 0, 0, 0);
  return Math.round((midnight(new Date()) - midnight(then)) / 86_400_000);
}

/** @param {string} created_at */
function dayName(created_at) {
  const date = new Date(created_at);
  const days = daysAgo(date);
  if (days === 0) return say("today");
  if (days === 1) return say("yesterday");
  return (Math.abs(days) < 300 ? formats.dayNear : formats.dayFar).format(date);
}

/** @param {string} created_at */
function shortTime(created_at) {
  const date = new Date(created_at);
  const days = daysAgo(date);
  if (days === 0) return formats.clock.format(date);
  return (Math.abs(days) < 300 ? formats.dayShort : formats.dayShortFar).format(date);
}

/** @param {number} seconds @param {() => void} task */
function after(seconds, task) {
  return setTimeout(task, seconds * 1000);
}

/** As the server counts them. @param {string} text */
function countCharacters(text) {
  return [...text].length;
}

const TOAST_SECONDS = 6;

/** @param {string} text @param {Action} [action] */
function toast(text, action) {
  const node = el("p", { class: "toast" }, text);
  const end = () => {
    if (node.contains(document.activeElement)) moveFocus();
    node.remove();
  };
  if (action) node.append(textButton(action.text, action.press));
  node.addEventListener("click", end);
  inFront("toasts").append(node);
  after(TOAST_SECONDS, end);
}

/** An open dialog makes what is outside of it inert. @param {string} id */
function inFront(id) {
  const node = box(id);
  const front = document.querySelector("dialog[open]") ?? document.body;
  if (node.parentElement !== front) front.append(node);
  return node;
}

/** To screen readers only. @param {string} text */
function announce(text) {
  const node = el("p", {}, text);
  inFront("announcer").append(node);
  after(TOAST_SECONDS * 2, () => node.remove());
}

/** @type {Record<string, Key>} */
const REFUSALS = {
  changed: "wasChanged",
  deleted: "wasDeleted",
  forbidden: "notAllowed",
  not_found: "notThere",
  overloaded: "busy",
  rate_limited: "busy",
  token_expired: "linkInvalid",
  token_invalid: "linkInvalid",
  too_large: "notAccepted",
  too_late: "tooLate",
  unreachable: "noAnswer",
  upstream: "noAnswer",
};

/** @param {string} code @param {string} detail */
function refusalText(code, detail) {
  const known = REFUSALS[code];
  if (known) return say(known);
  if (code !== "bad_field") return say("serverError");
  if (/^(title|name)/.test(detail)) return say("badName");
  const most = /^(member_ids|user_id)/.test(detail) && maximumIn(detail);
  return most ? say("mostPeople", { most }) : say("notAccepted");
}

/** The limit that a server's sentence names, or 0. @param {string} detail */
function maximumIn(detail) {
  return Number(/at most (\d+)/.exec(detail)?.[1] ?? 0);
}

/** @param {unknown} error */
function errorText(error) {
  if (error instanceof ChatError) return refusalText(error.code, error.message);
  return error instanceof Error ? error.message : String(error);
}

/* -------------------------------------------------------------------------------------
 * Sign-in. A session belongs to its tab; a copy in localStorage is for the next visit.
 * ---------------------------------------------------------------------------------- */

const SESSION_KEY = "chatd.session";
/** @type {StorageName[]} */
const STORAGES = ["sessionStorage", "localStorage"];
const signedOut = attempt(() => new BroadcastChannel("chatd.signed-out"));

/** @param {StorageName} storage @param {string} key @returns {any} */
function readStored(storage, key) {
  return attempt(() => JSON.parse(window[storage].getItem(key) ?? "0"));
}

/**
 * @param {StorageName} storage @param {string} key @param {unknown} value
 * @returns {boolean} false: storage is forbidden or full
 */
function writeStored(storage, key, value) {
  const write = () => {
    window[storage].setItem(key, JSON.stringify(value));
    return true;
  };
  return attempt(write) ?? false;
}

/**
 * @param {StorageName} storage
 * @returns {Session | null | undefined} null: signed out; undefined: nothing is known
 */
function readSession(storage) {
  const session = readStored(storage, SESSION_KEY);
  return session === null || session?.token ? session : undefined;
}

function sessionToResume() {
  const own = readSession("sessionStorage");
  return own === undefined ? readSession("localStorage") : own;
}

function showAddress(hash = "") {
  history.replaceState(null, "", location.pathname + location.search + hash);
}

/** @param {string} link or its end @param {string} [hash] that replaces it in the address */
function followLink(link, hash) {
  const [, kind, token] = /#(token|invite)=(\S+)$/.exec(link) ?? [];
  if (!token) return false;
  showAddress(hash);
  void (kind === "token" ? signInWith : openInvite)(token);
  return true;
}

/** @param {string} token of a link */
async function signInWith(token) {
  const current = model.session ?? readSession("sessionStorage");
  try {
    /** @type {Session} */
    const session = await visitor(token).request("POST", "/api/v1/session");
    if (!current) startFirst(session);
    else if (await confirmSwitch(session, current)) saveAndStart(session);
    else if (readSession("sessionStorage")) start(current); // or else it has ended
  } catch (error) {
    linkFailed(error, `#token=${token}`);
  }
}

/** @param {Session} session */
function startFirst(session) {
  const saved = readSession("localStorage");
  if (!saved || saved.user_id === session.user_id) return saveAndStart(session);
  start(session);
  toast(say("twoUsers", { me: userName(session), name: userName(saved) }));
}

/** @param {Session} session @param {Session} current */
async function confirmSwitch(session, current) {
  if (session.user_id === current.user_id) return true;
  const names = { name: userName(session), me: userName(current) };
  return ask(say("continueAs", names), say("continueAsText", names));
}

/** @param {unknown} error @param {string} hash of the link */
function linkFailed(error, hash) {
  const session = model.session ?? sessionToResume();
  if (session) {
    toastError(error);
    return start(session);
  }
  showSignIn("", errorText(error));
  // Without an answer the link may still be valid.
  if (/** @type {ChatError} */ (error).status) showAddress();
  else field("sign-in-link").value = new URL(hash, location.href).href;
}

/** @param {Session} session */
function saveAndStart(session) {
  for (const storage of STORAGES) writeStored(storage, SESSION_KEY, session);
  if (model.session?.user_id !== session.user_id) start(session);
}

function showSignIn(reason = "", error = "") {
  showTitle(say("signIn"));
  field("sign-in-link").value = "";
  setText("sign-in-text", `${reason} ${say("openLink")}`);
  setText("sign-in-error", error);
  showScreen("sign-in");
}

/** @param {"sign-in" | "join" | "chat"} screen */
function showScreen(screen) {
  const hadFocus = document.activeElement !== document.body;
  for (const id of SCREENS) box(id).hidden = id !== screen;
  const first = box(screen).querySelector("input, nav");
  if (hadFocus) first?.focus();
  loading = screen === "chat";
}

function onSignInForm() {
  const text = field("sign-in-link").value.trim();
  const link = text.replace(/^[\w-]+\.[\w-]+\.[\w-]+$/, "#token=$&");
  const isLink = followLink(link, location.hash);
  setText("sign-in-error", isLink ? "" : say("notALink"));
}

function allUnsent() {
  return model.client?.unsent() ?? [];
}

/** @param {Event} event */
function onBeforeUnload(event) {
  const inMemory = allUnsent().some(({ kept }) => !kept);
  if (inMemory || Object.keys(drafts.unstored)[0]) event.preventDefault();
}

async function onSignOut() {
  const { client } = model;
  releaseAll();
  if (allUnsent()[0]) await new Promise((resolve) => after(1, () => resolve(0)));
  const unsent = allUnsent().length;
  const text = say("signOutText", { count: unsent });
  if (unsent > 0 && !(await ask(say("signOut"), text))) return;
  if (client !== model.client) return;
  signedOut?.postMessage(myId());
  model.client?.forget();
  const count = drafts.chatIds().length;
  endSession(say("signedOut") + (count ? ` ${say("draftsHere", { count })}` : ""));
}

/** @param {string} reason */
function endSession(reason) {
  const saved = readSession("localStorage");
  if (saved?.user_id === model.session?.user_id)
    writeStored("localStorage", SESSION_KEY, null);
  writeStored("sessionStorage", SESSION_KEY, null);
  model.client?.disconnect();
  resetModel();
  showAddress();
  showSignIn(reason);
}

/** The server refused the token. Another tab may have stored a newer one. */
function onSignedOut() {
  const old = model.session;
  const newer = STORAGES.map(readSession).find(
    (saved) => saved?.user_id === old?.user_id && saved?.token !== old?.token,
  );
  if (newer) start(newer);
  else endSession(say("sessionEnded"));
}

/** @param {MessageEvent} event the id of a user */
function onSignedOutElsewhere({ data }) {
  if (!model.session || data !== myId()) return;
  releaseAll();
  model.client?.forget();
  endSession(say("signedOutElsewhere"));
}

/* -------------------------------------------------------------------------------------
 * Invitations.
 * ---------------------------------------------------------------------------------- */

let invite = "";

/** Not the model's client, whose token it would send. */
function visitor(bearer = "") {
  return new ChatWebSocket({ bearer, storage: null, log: null });
}

/** @param {string} token */
async function openInvite(token) {
  const hash = `#invite=${token}`;
  const session = model.session ?? sessionToResume();
  if (session) start(session);
  else showAddress(hash); // for a reload
  try {
    const { title: called, member_count: count } = await visitor().previewInvite(token);
    const unnamed = isBlank(called ?? "");
    const title = say(unnamed ? "join" : "joinTitle", { title: called ?? "" });
    const text = say("people", { count });
    if (model.session) {
      const me = say("signedInAs", { name: userName(model.session) });
      if (!(await ask(title, `${text} · ${me}`, say("join")))) return moveFocus();
      const joined = await model.client?.join(token);
      if (joined) openChat(joined.chat_id);
      return;
    }
    invite = token;
    setText("join-title", title);
    setText("join-text", text);
    setText("join-error", "");
    showTitle(say("join"));
    showScreen("join");
    field("join-name").focus();
  } catch (error) {
    linkFailed(error, hash);
  }
}

function onJoinForm() {
  const join = async () => {
    const answer = await visitor().joinAsNewUser(invite, field("join-name").value);
    showAddress();
    openChat(answer.chat_id);
    startFirst(answer);
  };
  void submit("join-error", join);
}

/** @param {() => boolean} [isOpen] of the dialog that revokes the earlier links */
async function showInvite(isOpen) {
  const { client, open: chat } = model;
  if (!client || !chat) return;
  let text = "";
  if (isOpen) {
    await client.revokeInvites(chat.id);
    if (!isOpen()) return;
    text = `${say("linksEnded")} `;
    showLink("invitePeople", text, ""); // there may be no new one
  }
  const { token, expires_in } = await client.createInvite(chat.id);
  if (chat !== model.open || isOpen?.() === false) return;
  const end = new Date(Date.now() + expires_in * 1000);
  text += say("inviteValid", { when: shortTime(end.toISOString()) });
  showLink("invitePeople", text, `#invite=${token}`);
}

function onInvite() {
  void showInvite().catch(toastError);
}

/* -------------------------------------------------------------------------------------
 * Model. Its counters only grow, so their news may come in any order.
 * ---------------------------------------------------------------------------------- */

/** @returns {Model} */
const newModel = () => ({
  session: null,
  client: null,
  chats: new Map(),
  open: null,
  names: new Map(),
  marks: {},
  people: null,
  server: {},
  connection: "closed",
  chatsLoaded: false,
  epoch: "",
  maxCharacters: 4000,
});

const model = newModel();

function resetModel() {
  document.querySelectorAll("dialog").forEach((node) => node.close("page"));
  selectChat(null);
  Object.assign(model, newModel());
  field("search-text").value = "";
  search.start();
}

const myId = () => model.session?.user_id ?? 0;
const unread = (/** @type {ChatView} */ chat) => Math.max(0, chat.last_n - chat.read_n);
/** @param {ChatView} chat */
const mutedKey = (chat) => `chatd.muted.${myId()}.${chat.id}`;
/** @param {ChatView} chat */
const isMuted = (chat) =>
  (chat.muted ??= readStored("localStorage", mutedKey(chat)) === true);
/** What the title and the badges count. @param {ChatView} chat */
const countNew = (chat) => (isMuted(chat) ? 0 : unread(chat));

/** @param {{user_id: number, name?: string | null | undefined}} user */
function userName({ user_id, name }) {
  return name && !isBlank(name) ? name : say("user", { id: `${user_id}` });
}

/** @param {number} user_id */
function personName(user_id) {
  return userName({ user_id, name: model.names.get(user_id) });
}

/** @param {number[]} ids */
function namesOf(ids) {
  return ids.map((id) => isolated(personName(id))).join(", ");
}

/** @param {ChatView} chat */
function others(chat) {
  return [...chat.members.keys()].filter((id) => id !== myId());
}

/** Whether the page knows all members. @param {ChatView} chat */
function isWhole(chat) {
  return chat.members.size >= chat.memberCount;
}

/** @param {ChatView} chat */
function chatTitle(chat) {
  if (chat.title && !isBlank(chat.title)) return chat.title;
  if (!isWhole(chat)) return say("people", { count: chat.memberCount });
  return namesOf(others(chat)) || say("onlyYou");
}

/** @param {ChatView} chat @param {number} userId */
function senderIn({ title }, userId) {
  const name = personName(userId);
  return title ? say("senderIn", { name, title }) : name;
}

function newestChatsFirst() {
  const all = [...model.chats.values()].map((chat) => {
    const { id = 0, created_at = "" } = chat.last_message ?? {};
    return { chat, id, when: Math.max(Date.parse(created_at) || 0, chat.activeAt) };
  });
  all.sort((a, b) => b.when - a.when || b.id - a.id);
  return all.map(({ chat }) => chat);
}

/** @param {Chat} received */
function putChat(received) {
  const { id, last_n, last_message, members, member_count: memberCount } = received;
  const before = model.chats.get(id);
  /** @type {ChatView} */
  const chat = before ?? {
    ...received,
    read_n: 0,
    members: new Map(),
    memberCount,
    messages: [],
    loaded: false,
    more: true,
    moreAfter: false,
    loading: "no",
    editing: null,
    divider: null,
    hues: new Map(),
    typing: new Map(),
    lines: [],
    activeAt: 0,
  };
  const marks = new Map();
  for (const { user_id, name, read_n } of members) {
    model.names.set(user_id, name);
    marks.set(user_id, Math.max(read_n, chat.members.get(user_id) ?? 0));
    hueOf(user_id, chat);
  }
  // A large chat says nothing of a new member's mark.
  const mark = marks.get(myId()) ?? model.marks[id]?.read_n;
  const read_n = received.read_n ?? mark ?? (before ? 0 : last_n);
  Object.assign(chat, received, {
    memberCount,
    members: marks,
    isNew: false,
    read_n: Math.max(chat.read_n, read_n),
    last_n: Math.max(chat.last_n, last_n),
    last_message: newer(chat.last_message, last_message),
  });
  model.chats.set(id, chat);
  if (chat.last_message) void learnNames(chat, [chat.last_message.sender_id]);
  return chat;
}

/** @param {ChatView} chat @param {number[]} userIds */
async function learnNames(chat, userIds) {
  const { client, names } = model;
  const ids = [...new Set(userIds)].filter((id) => !names.has(id)).slice(0, 100);
  if (isWhole(chat) || ids.length === 0) return;
  for (const id of ids) names.set(id, null); // asked once
  try {
    const answer = await client?.members(chat.id, { ids });
    for (const { user_id, name } of answer?.members ?? []) names.set(user_id, name);
    requestRender();
  } catch {
    for (const id of ids) if (!names.get(id)) names.delete(id);
  }
}

/** @param {Message | null} a @param {Message | null} b of the same chat */
function newer(a, b) {
  if (!a || !b || a.n !== b.n) return (a?.n ?? 0) >= (b?.n ?? 0) ? a : b;
  return (a.rev ?? 0) > (b.rev ?? 0) ? a : b;
}

/** @param {ChatView} chat @param {Message} message */
function onChange(chat, message) {
  const { n } = message;
  chat.last_message = newer(chat.last_message, message);
  if (chat.messages.some((one) => one.n === n)) merge(chat, [message]);
  const found = search.found.find(({ id }) => id === message.id);
  if (found) Object.assign(found, newer(found, message));
}

/** @param {ChatView} chat @param {number} userId @param {number} n */
function moveReadMark(chat, userId, n) {
  if (userId === myId()) chat.read_n = Math.max(chat.read_n, n);
  const before = chat.members.get(userId);
  if (before !== undefined) chat.members.set(userId, Math.max(before, n));
}

/** Drops those before a hole. @param {ChatView} chat @param {Message[]} messages */
function merge(chat, messages) {
  const byN = new Map(chat.messages.map((message) => [message.n, message]));
  for (const message of messages)
    byN.set(message.n, newer(byN.get(message.n) ?? null, message) ?? message);
  const all = [...byN.values()].sort((a, b) => a.n - b.n);
  const first = all.findLastIndex(({ n }, i) => all[i - 1]?.n !== n - 1);
  const most = chat === model.open && !pane.follow ? Infinity : 500;
  chat.messages = all.slice(Math.max(first, all.length - most));
  chat.more = (chat.messages[0]?.n ?? 1) > 1;
  void learnNames(chat, messages.map(({ sender_id }) => sender_id));
}

/**
 * @param {ChatView} chat @param {Message} message
 * @param {boolean} [read] its sender has read the chat up to it. Default: for one's own
 */
function putMessage(chat, message, read = message.n === chat.read_n + 1) {
  const { n, sender_id } = message;
  chat.last_n = Math.max(chat.last_n, n);
  chat.last_message = newer(chat.last_message, message);
  if (read) moveReadMark(chat, sender_id, n);
  stopTyping(chat, sender_id);
  void learnNames(chat, [sender_id]);
  if ((chat.loaded || chat.loading === "yes") && !chat.moreAfter) merge(chat, [message]);
}

/** @param {ChatView} chat @param {number} userId */
function stopTyping(chat, userId) {
  clearTimeout(chat.typing.get(userId));
  chat.typing.delete(userId);
}

/** @param {ChatView} chat */
function removeChat(chat) {
  model.chats.delete(chat.id);
  void giveBack();
  if (model.open === chat) location.hash = "#chats";
}

/* -------------------------------------------------------------------------------------
 * Events change the model.
 * ---------------------------------------------------------------------------------- */

/** @type {EventHandlers} */
const handlers = {
  state: ({ state }) => {
    const problem = BANNERS[state];
    if (state !== model.connection && problem) announce(say(problem));
    model.connection = state;
    if (state === "signed_out") onSignedOut();
  },
  resync: () => {
    releaseAll(true); // after a restore, an id may mean another message
    void fetchChats();
  },
  chats: ({ chats, cursor }) => {
    const [epoch = ""] = cursor.split(".");
    const ids = new Set(chats.map(({ id }) => id));
    for (const chat of model.chats.values())
      if (!ids.has(chat.id) && !chat.isNew) removeChat(chat);
    if (epoch !== model.epoch) model.chats.clear(); // a backup was restored
    model.epoch = epoch;
    for (const received of chats) putChat(received).loaded = false;
    const [only] = chats;
    if (only && !chats[1] && !model.chatsLoaded && !location.hash) openChat(only.id);
    model.chatsLoaded = true;
    route();
    if (model.open) retryLoading(model.open);
    void giveBack();
    search.start(true); // what was found may have changed
  },
  connected: ({ chats }) => {
    model.marks = chats;
    for (const [id, { last_n, read_n }] of Object.entries(chats)) {
      const chat = model.chats.get(Number(id));
      if (!chat) continue;
      chat.last_n = Math.max(chat.last_n, last_n);
      moveReadMark(chat, myId(), read_n);
    }
    if (model.open) retryLoading(model.open);
    if (search.error) search.retry();
    void loadServer();
  },
  chat_added: ({ chat }) => {
    putChat(chat).activeAt = Date.now();
    route();
  },
  delivery: (delivery) => {
    const { state, kind, chat_id, message_id, content, rev } = delivery;
    const chat = model.chats.get(chat_id);
    const isMessage = kind === "message";
    const known = chat && findIn(chat, message_id);
    // Its event may come later.
    const deleted = kind === "delete";
    const now = { content, rev: rev ?? known?.rev ?? message_id, deleted };
    const changed = known && state === "sent" && { ...known, ...now };
    const message = delivery.message ?? changed;
    if (chat && message) (isMessage ? putMessage : onChange)(chat, message);
    if (state !== "failed") return;
    const text = notDoneText(delivery);
    if (!chat || isLost(delivery)) void giveBack();
    else if (isMessage ? chat === model.open : messageOf(message_id)) announce(text);
    else toast(say("lastOf", { name: chatTitle(chat), text }));
  },
};

/** @type {ChatEventHandlers} */
const chatHandlers = {
  new_message: ({ message, read = true }, chat) => {
    const { sender_id, n, content, deleted } = message;
    const here = chat === model.open;
    putMessage(chat, message, read);
    if (sender_id === myId() || chat.read_n >= n || deleted) return;
    if (here && chat.divider === null && !(isWatched() && pane.atEnd()))
      chat.divider = n - 1;
    const name = here ? personName(sender_id) : senderIn(chat, sender_id);
    const text = excerpt(content);
    if (here || countNew(chat)) announce(say("lastOf", { name, text }));
    if (countNew(chat)) notify(chat, message);
  },
  message_edited: ({ message }, chat) => onChange(chat, message),
  message_deleted: ({ message }, chat) => onChange(chat, message),
  message_read: ({ read_by, n }, chat) => moveReadMark(chat, read_by, n),
  chat_renamed: (event, chat) => {
    chat.title = event.title;
    if (event.title) addLine(chat, event.user_id ? "renamed" : "nowCalled", event);
  },
  member_added: (event, chat) => {
    const { user_id, name } = event;
    model.names.set(user_id, name);
    addLine(chat, "joined", event);
    if (chat.members.has(user_id)) return;
    if (isWhole(chat)) chat.members.set(user_id, chat.last_n);
    chat.memberCount += 1;
    if (chat === model.open && dialog("info").open)
      info.load({ ids: [user_id] });
  },
  member_removed: (event, chat) => {
    const { user_id } = event;
    if (user_id === myId()) {
      if (chat !== info.left) toast(say("noLonger", { title: chatTitle(chat) }));
      return removeChat(chat);
    }
    // The chat may have come without this member already.
    if (chat.members.delete(user_id) || !isWhole(chat)) chat.memberCount -= 1;
    if (chat === model.open) info.online.delete(user_id);
    stopTyping(chat, user_id);
    addLine(chat, "left", event);
  },
  typing: ({ user_id, is_typing }, chat) => {
    stopTyping(chat, user_id);
    if (!is_typing) return;
    void learnNames(chat, [user_id]);
    // Clients repeat it every 3 s.
    const timer = after(7, () => {
      stopTyping(chat, user_id);
      requestRender();
    });
    chat.typing.set(user_id, timer);
  },
};

/** @param {ChatWebSocket} client */
function addHandlers(client) {
  /** @type {Record<string, (event: any, chat: any) => void>} */
  const all = { ...handlers, ...chatHandlers };
  for (const [type, handle] of Object.entries(all))
    client.on(/** @type {any} */ (type), (event) => {
      if (client !== model.client) return;
      const chat = model.chats.get(event.chat_id);
      if (chat || type in handlers) handle(event, chat);
      requestRender();
    });
}

/**
 * @param {ChatView} chat @param {Key} key
 * @param {{seq: number, user_id: number | null}} event
 */
function addLine(chat, key, { seq, user_id }) {
  const id = user_id ?? 0;
  const title = chatTitle(chat);
  const text = () => say(key, { name: personName(id), title });
  if (user_id) void learnNames(chat, [user_id]);
  // `connected` has moved last_n over the messages that a replay brings only now.
  const line = { seq, n: chat.last_message?.n ?? 0, text };
  chat.lines = [...chat.lines, line].slice(-50);
  if (chat === model.open) announce(text());
}

/** @param {ChatView} chat @param {number} id */
function findIn({ messages, last_message }, id) {
  return [...messages, last_message].find((message) => message?.id === id);
}

/** No row can show it. @param {Delivery} delivery */
function isLost({ state, chat_id, message_id, code }) {
  if (state !== "failed") return false;
  return !model.chats.has(chat_id) || (code === "not_found" && !messageOf(message_id));
}

async function giveBack() {
  const { client, chatsLoaded } = model;
  const lost = allUnsent().find(isLost);
  if (!chatsLoaded || !lost) return;
  if (dialog("ask").open) return void after(1, giveBack);
  const { client_id, content } = lost;
  const text = notDoneText(lost);
  const answer = content ? ask(text, content, say("copy")) : toast(text);
  box("ask-yes").focus(); // the user may be typing
  const copies = await answer;
  const closedByPage = dialog("ask").open || dialog("ask").returnValue === "page";
  if (copies ? copyText(content) : !closedByPage) client?.discard(client_id);
  void giveBack();
}

async function fetchChats() {
  const { client } = model;
  try {
    await client?.fetchChats();
    // A client that polls never receives `connected`.
    if (client === model.client && !("invites" in model.server)) void loadServer();
  } catch {
    after(5, () => void (client === model.client && fetchChats()));
  }
}

/** If the server does not answer, the next connection asks. */
async function loadServer() {
  const { client } = model;
  const me = await client?.request("GET", "/api/v1/me").catch(() => null);
  if (client !== model.client || !me?.server) return;
  model.server = me.server;
  model.maxCharacters = me.server.max_content_chars;
  setMyName(me.name);
  composer.fit();
}

/* -------------------------------------------------------------------------------------
 * Reading, and loading what there is to read.
 * ---------------------------------------------------------------------------------- */

function isWatched() {
  const covered = document.querySelector("dialog[open]");
  return !covered && document.visibilityState === "visible" && document.hasFocus();
}

function markSeen() {
  const chat = model.open;
  if (!chat || !isWatched() || unread(chat) === 0 || pane.goTo !== "stay") return;
  const seen = pane.lastSeen();
  if (!seen || seen.n <= chat.read_n) return;
  moveReadMark(chat, myId(), seen.n);
  model.client?.markRead(chat.id, seen.id);
  requestRender();
}

/**
 * @param {ChatView} chat
 * @param {{before?: number, after?: number, around?: number}} where {}: the newest
 */
async function loadHistory(chat, where) {
  const { client } = model;
  const { last_n } = chat;
  const { around } = where;
  if (!client || chat.loading === "yes") return;
  chat.loading = "yes";
  requestRender();
  try {
    const { messages } = await client.history(chat.id, { limit: 50, ...where });
    if (!where.before && !where.after) {
      // What was loaded before may be old, but not what came meanwhile.
      chat.messages = around ? [] : chat.messages.filter(({ n }) => n > last_n);
      chat.loaded = true;
    }
    merge(chat, messages);
    const newest = chat.messages.at(-1)?.n ?? 0;
    if (where.after || around) chat.moreAfter = messages.length > 0 && newest < chat.last_n;
    chat.loading = "no";
  } catch (error) {
    chat.loading = "failed";
    if (around && chat === model.open) cannotGo(chat, error);
  }
  requestRender();
}

/** @param {ChatView} chat @param {unknown} error */
function cannotGo(chat, error) {
  const gone = error instanceof ChatError && error.status === 400;
  toast(gone ? say("notThere") : errorText(error));
  if (gone) {
    location.replace(`#chat/${chat.id}`);
    moveFocus();
  } else if (!chat.loaded) return; // the user can try again
  if (pane.goTo !== "end") pane.goTo = gone ? "start" : "stay";
  chat.loading = "no";
}

/** @param {ChatView} chat */
function retryLoading(chat) {
  if (chat.loading === "failed") chat.loading = "no";
  requestRender();
}

/* -------------------------------------------------------------------------------------
 * Top and lists.
 * ---------------------------------------------------------------------------------- */

let renderRequested = false;

/** A hidden tab has no frames. */
function requestRender() {
  if (renderRequested) return;
  renderRequested = true;
  if (document.visibilityState === "hidden") after(0, render);
  else requestAnimationFrame(render);
}

function render() {
  renderRequested = false;
  if (!model.session) return;
  const chats = newestChatsFirst();
  renderTop();
  renderBanner();
  renderLists(chats);
  renderEmpty();
  if (dialog("people").open) people.render();
  if (dialog("info").open) info.render();
  pane.render();
  search.render(chats);
  if (!menuAnchor?.isConnected && box("menu").contains(document.activeElement)) {
    box("menu").hidePopover();
    scroller.focus({ preventScroll: true });
  }
  if (model.chatsLoaded) loading = false;
}

function renderTop() {
  const { chats, connection, open, server } = model;
  const closed = connection === "closed" || connection === "signed_out";
  const state = closed ? "connecting" : connection;
  const total = [...chats.values()].reduce((sum, chat) => sum + countNew(chat), 0);
  const elsewhere = total - (open ? countNew(open) : 0);
  const me = personName(myId());
  setText("connection", say(state));
  box("connection").dataset["state"] = state;
  setText("me-name", me);
  setText("me-panel-name", say("signedInAs", { name: me }));
  box("me-avatar").replaceChildren(personAvatar(myId()));
  setText("bell-count", badgeText(total));
  setText("back-count", badgeText(elsewhere));
  setText("bell-label", total ? say("newCount", { count: total }) : say("noneNew"));
  const more = elsewhere ? `, ${say("newCount", { count: elsewhere })}` : "";
  setText("back-label", say("back") + more);
  showTitle(open ? chatTitle(open) : "", total);
  box("rename-me").hidden = !server.rename;
}

/** @param {number} count */
const badgeText = (count) => (count > 99 ? "99+" : String(count || ""));

let shownTitle = "";

/** @param {string} place @param {number} [total] of new messages */
function showTitle(place, total = 0) {
  const title = (total ? `(${total}) ` : "") + (place && `${place} · `) + "chatd";
  if (title === shownTitle) return;
  document.title = shownTitle = title;
  const icon = byId("tab-icon", HTMLLinkElement);
  icon.href = total ? "web/icon-new.svg" : "web/icon.svg";
  navigator.setAppBadge?.(total).catch(() => {}); // the title says it anyway
}

/**
 * A screen reader would read the same text again.
 * @param {string} id @param {string} text
 */
function setText(id, text) {
  const node = box(id);
  if (node.textContent !== text) node.textContent = text;
}

/** @type {Banners} */
const BANNERS = {
  polling: "pollingText",
  offline: "offlineText",
  too_many: "tooManyText",
  refused: "refusedText",
};

function renderBanner() {
  const state = model.connection;
  const text = BANNERS[state];
  if (!text && box("banner").contains(document.activeElement)) moveFocus();
  box("banner").hidden = !text;
  if (!text) return;
  const seconds = Math.ceil(model.client?.retryIn ?? 0);
  const waiting = state === "polling" || state === "offline";
  const next = seconds > 0 ? say("tryingIn", { seconds }) : say("connecting");
  setText("banner-text", waiting ? `${say(text)} ${next}` : say(text));
  box("banner-retry").hidden = state === "refused";
}

/** @param {ChatView[]} chats */
function renderLists(chats) {
  const news = chats.filter(countNew);
  showRows(box("chat-list"), chats.map(chatRow));
  showRows(box("bell-list"), news.map(chatRow));
  box("bell-empty").hidden = news.length > 0;
  // Phones allow them only from service workers.
  const permission = isTouch() ? "" : window.Notification?.permission;
  box("notify").hidden = permission !== "default";
  box("notify-denied").hidden = permission !== "denied";
}

function renderEmpty() {
  const { chats, chatsLoaded, server } = model;
  const { create_chats, invites } = server;
  const none = chatsLoaded && create_chats !== undefined && chats.size === 0;
  const start = none && create_chats;
  const advice = invites ? "startInvite" : "startChat";
  const next = say(start ? advice : "waitForChat", { name: personName(myId()) });
  const text = say(chats.size > 0 ? "chooseChat" : "loading");
  setText("empty-text", none ? `${say("noChats")} ${next}` : text);
  setText("empty-start", say(invites ? "invitePeople" : "newChat"));
  box("empty-start").hidden = !start;
  box("new-chat").hidden = !create_chats || start;
}

/** @param {ChatView} chat @returns {Row} */
function chatRow(chat) {
  const current = chat === model.open;
  const title = chatTitle(chat);
  const [kind, text] = lastLine(chat);
  const at = chat.last_message?.created_at;
  const isUnsent = kind === "failed" || kind === "sending";
  const when = at && !isUnsent ? shortTime(at) : "";
  const count = unread(chat);
  const muted = isMuted(chat);
  const build = () => {
    const link = el(
      "a",
      {
        class: ["row", count > 0 && "unread"],
        href: `#chat/${chat.id}`,
        "aria-current": current && "page",
      },
      chatAvatar(chat),
      el("span", { class: "row-title", dir: "auto" }, title),
      el("span", { class: "row-time" }, muted && sign("muted", say("muted")), when),
      el(
        "span",
        { class: `row-last is-${kind}` },
        kind === "sending" && sign("sending", say("sending")),
        text,
      ),
      count > 0 &&
        el(
          "span",
          { class: ["badge", muted && "muted"] },
          badgeText(count),
          spoken(` ${say("unread")}`),
        ),
    );
    return el("li", {}, link);
  };
  const look = JSON.stringify([title, kind, text, when, count, current, muted]);
  return { key: String(chat.id), look, build };
}

/** For screen readers only. @param {string} text */
const spoken = (text) => el("span", { class: "sr-only" }, text);

/** @param {string} name @param {string} text @param {string} [className] */
function sign(name, text, className) {
  const parts = new DocumentFragment();
  parts.append(icon(name, className), spoken(text));
  return parts;
}

/** @param {ChatView} chat @returns {LastLine} */
function lastLine(chat) {
  const changes = model.client?.unsentChanges() ?? [];
  const unsent = [
    ...changes.filter(({ chat_id }) => chat_id === chat.id),
    ...notYetStored(chat),
  ];
  const failed = unsent.findLast(({ state }) => state === "failed");
  if (failed) {
    const text = excerpt(failed.content || failureText(failed));
    return ["failed", say(NOT_DONE[failed.kind], { text })];
  }
  const typing = typingText(chat);
  if (typing) return ["typing", typing];
  const waiting = unsent.at(-1);
  if (waiting) {
    const text = excerpt(waiting.content || say("deleted"));
    return ["sending", say("ownLast", { text })];
  }
  const draft = chat === model.open || unread(chat) > 0 ? "" : drafts.get(chat.id).text;
  if (!isBlank(draft)) return ["draft", say("draft", { text: excerpt(draft) })];
  return ["message", lastMessageText(chat)];
}

/** @param {ChatView} chat */
function lastMessageText({ last_message, memberCount }) {
  if (!last_message) return say("noMessages");
  const { content, deleted } = shown(last_message);
  const text = deleted ? say("deleted") : excerpt(content);
  if (last_message.sender_id === myId()) return say("ownLast", { text });
  const [name = ""] = personName(last_message.sender_id).split(" ");
  return memberCount > 2 ? say("lastOf", { name, text }) : text;
}

/** @param {string} content */
const excerpt = (content) => visibleText(content).trim().slice(0, 120);

/** @param {ChatView} chat */
function chatAvatar(chat) {
  const [first = myId(), second] = others(chat);
  const hue = chat.title || second ? hueOf(chat.id) : hueOf(first, chat);
  return avatar(chatTitle(chat), hue, "avatar");
}

/** @param {number} userId @param {ChatView} [chat] */
function personAvatar(userId, chat) {
  return avatar(personName(userId), hueOf(userId, chat), "avatar small");
}

/** @param {string} name @param {number} hue @param {string} className */
function avatar(name, hue, className) {
  const letters = name.split(/\s+/).flatMap((one) => one.match(/[\p{L}\p{N}]/u) ?? []);
  const text = letters.slice(0, 2).join("").toUpperCase() || "?";
  return paint(el("span", { class: className, "aria-hidden": "true" }, text), hue);
}

const HUES = 12;

/** @param {HTMLElement} node @param {number} hue */
function paint(node, hue) {
  node.style.setProperty("--hue", `${(hue * 360) / HUES}`);
  return node;
}

/** Members of a chat differ, up to HUES. @param {number} id @param {ChatView} [chat] */
function hueOf(id, chat) {
  const hues = chat?.hues ?? new Map();
  const taken = new Set(hues.values());
  let hue = (id % HUES) * 5;
  while (taken.has(hue % HUES) && taken.size < HUES) hue += 1;
  if (!hues.has(id)) hues.set(id, hue % HUES);
  return hues.get(id) ?? 0;
}

/* -------------------------------------------------------------------------------------
 * The open chat. Only the user moves what the user reads: see docs/page.md.
 * ---------------------------------------------------------------------------------- */

const HISTORY_MARGIN = 500;
const SEEN_PIXELS = 24;

const scroller = box("scroller");

/** @type {Pane} */
const pane = {
  goTo: "stay",
  at: undefined,
  follow: true,
  drawn: Infinity,
  unfolded: new Set(),
  sizes: "",
  anchor: { key: "", id: 0, top: 0 },

  atEnd() {
    return !model.open?.moreAfter && below("scroller") < END_MARGIN;
  },

  currentSizes() {
    const { scrollHeight, clientHeight, clientWidth } = scroller;
    return `${clientWidth} ${clientHeight} ${scrollHeight}`;
  },

  remember() {
    this.hidePastDays();
    this.sizes = this.currentSizes();
    if (this.follow) return;
    const row = rowsOf("messages").find(
      (one) => one.dataset["n"] && topOf(one) + one.offsetHeight > 0,
    );
    if (!row) return;
    const { key = "", id } = row.dataset;
    this.anchor = { key, id: Number(id), top: topOf(row) };
  },

  /** The labels stick to the top: only the last is visible. */
  hidePastDays() {
    let next = Infinity;
    for (const day of rowsOf("messages").reverse()) {
      if (!day.matches(".day, .divider")) continue;
      const { top, bottom } = day.getBoundingClientRect();
      if (topOf(day) + day.offsetHeight < 0) continue; // a divider above the view
      day.classList.toggle("past", next < bottom);
      next = top;
    }
  },

  restore() {
    const { key, top } = this.anchor;
    if (scroller.clientHeight === 0) return; // it is not on the screen
    const row = rowsOf("messages").find(({ dataset }) => dataset["key"] === key);
    const moved = row ? topOf(row) - top : 0;
    if (this.follow) scroller.scrollTop = scroller.scrollHeight;
    // Any write stops a touch scroll.
    else if (Math.abs(moved) >= 1) scroller.scrollTop += moved;
    this.remember();
  },

  lastSeen() {
    const { clientHeight } = scroller;
    const row = rowsOf("messages").findLast(
      (one) =>
        one.dataset["n"] &&
        topOf(one) + Math.min(one.offsetHeight, SEEN_PIXELS) <= clientHeight,
    );
    return clientHeight > 0 ? messageOf(Number(row?.dataset["id"])) : undefined;
  },

  render() {
    const chat = model.open;
    box("chat").classList.toggle("reading", chat !== null);
    if (!chat) return;
    this.renderHead(chat);
    composer.showMode(chat);
    showRows(box("messages"), messageRows(chat));
    this.showFolds();
    this.restore();
    this.drawn = chat.messages.at(-1)?.n ?? this.drawn;
    this.go(chat);
    setText("typing", typingText(chat));
    this.onMoved();
  },

  renderHead(chat) {
    const people = say("people", { count: chat.memberCount });
    const names = namesOf(others(chat));
    const members = isWhole(chat) ? `${names && `${names}, `}${say("you")}` : people;
    setText("pane-title", chatTitle(chat));
    setText("pane-members", chat.direct ? say("directChat") : members);
    box("pane-avatar").replaceChildren(chatAvatar(chat));
  },

  showFolds() {
    const folded = box("messages").querySelectorAll(".long:not(.unfolded) .content");
    for (const { scrollHeight, clientHeight, nextElementSibling } of folded)
      nextElementSibling?.toggleAttribute("hidden", scrollHeight <= clientHeight + 1);
  },

  toggleFold(key) {
    this.follow = false; // the user reads on where the text was cut
    this.remember();
    if (this.unfolded.delete(key)) Object.assign(this.anchor, { key, top: 0 });
    else this.unfolded.add(key);
    requestRender();
  },

  go(chat) {
    const { goTo, follow, anchor } = this;
    const id = Number(goTo) || (goTo === "stay" && !follow ? anchor.id : 0);
    const there = id ? messageOf(id) : !chat.moreAfter;
    if (!chat.loaded || !there) {
      if (chat.loading !== "no") return;
      // What is shown stays until the answer, unless a hole follows it.
      if (!id && chat.moreAfter)
        Object.assign(chat, { messages: [], loaded: false, moreAfter: false });
      void loadHistory(chat, id ? { around: id } : {});
      return;
    }
    if (goTo === "stay") return;
    const [first] = chat.messages;
    const firstNew = (chat.divider ?? Infinity) + 1;
    const mayLoad = chat.messages.length < 500 && chat.loading !== "failed";
    if (goTo === "start" && first && first.n > firstNew && mayLoad) {
      if (chat.loading === "no") void loadHistory(chat, { before: first.id });
      return;
    }
    this.goTo = "stay";
    const target = goTo === "start" ? ".divider" : `[data-id="${goTo}"]`;
    const row = box("messages").querySelector(target);
    if (!row) {
      this.follow = true;
      return this.restore();
    }
    const height = scroller.clientHeight;
    // scrollIntoView could also scroll the page.
    scroller.scrollTop += topOf(row) - Math.max(0, Math.min(height / 3, height - 150));
    this.follow = this.atEnd();
    this.remember();
    if (goTo === "start") return;
    row.tabIndex = -1;
    if (!composer.field.value) row.focus({ preventScroll: true });
  },

  showLatest() {
    if (this.at) location.hash = `#chat/${model.open?.id}`;
    Object.assign(this, { at: undefined, goTo: "end" });
    requestRender();
  },

  onScroll() {
    if (this.sizes !== this.currentSizes()) return this.onResize();
    this.follow = this.atEnd();
    if (!this.follow && this.goTo === "start") this.goTo = "stay";
    this.remember();
    this.onMoved();
  },

  onResize() {
    this.showFolds();
    this.restore();
    this.onMoved();
  },

  onMoved() {
    const chat = model.open;
    if (!chat) return;
    const { scrollTop, clientHeight } = scroller;
    const count = unread(chat);
    box("jump").hidden = this.atEnd();
    setText("jump-text", count ? say("newCount", { count }) : say("latest"));
    markSeen();
    if (clientHeight === 0 || !chat.loaded || chat.loading !== "no") return;
    const [first, last] = [chat.messages[0], chat.messages.at(-1)];
    if (first && chat.more && scrollTop < HISTORY_MARGIN)
      void loadHistory(chat, { before: first.id });
    else if (last && chat.moreAfter && below("scroller") < HISTORY_MARGIN)
      void loadHistory(chat, { after: last.id });
  },
};

/** Pixels below the top of the view. @param {Element} node */
function topOf(node) {
  return node.getBoundingClientRect().top - scroller.getBoundingClientRect().top;
}

/** @param {ChatView} chat @returns {string} "": no one is typing */
function typingText({ typing }) {
  const name = [...typing.keys()].map(personName).join(", ");
  return name && say(typing.size > 1 ? "manyTyping" : "typing", { name });
}

/** @param {ChatView} chat */
function messageRows(chat) {
  const { divider, members, messages } = chat;
  const marks = others(chat).map((id) => members.get(id) ?? 0);
  const rows = [historyRow(chat, "older", chat.more)];
  let day = "";
  for (const message of messages) {
    const { n, created_at } = message;
    const date = new Date(created_at).toDateString();
    rows.push(...linesAfter(chat, n - 1));
    // The key is not the date: a clock that is set back repeats a day.
    if (date !== day) rows.push(textRow(`day ${n}`, "day", dayName(created_at)));
    if (n - 1 === divider) rows.push(textRow("divider", "divider", say("newMessages")));
    rows.push(messageRow(chat, message, marks, rows.at(-1)?.message));
    day = date;
  }
  rows.push(...linesAfter(chat, messages.at(-1)?.n ?? 0));
  if (chat.moreAfter) return [...rows, historyRow(chat, "newer", true)];
  for (const unsent of notYetStored(chat)) {
    const message = { ...unsent, id: 0, n: 0, sender_id: myId(), created_at: "" };
    rows.push(messageRow(chat, message, marks, rows.at(-1)?.message, unsent));
  }
  return rows;
}

/** @param {ChatView} chat @param {number} place n of a message */
function linesAfter({ lines }, place) {
  const here = lines.filter(({ n }) => n === place);
  return here.map(({ seq, text }) => textRow(`line ${seq}`, "history line", text()));
}

/** If its answer was lost, a message is stored and unsent. @param {ChatView} chat */
function notYetStored({ id, messages }) {
  const unsent = model.client?.unsent(id) ?? [];
  return unsent.filter(
    ({ client_id }) =>
      !messages.some((one) => one.client_id === client_id && one.sender_id === myId()),
  );
}

/**
 * @param {string} key @param {string} className @param {string} text
 * @param {Child} [action]
 * @returns {Row}
 */
function textRow(key, className, text, action) {
  const build = () => el("li", { class: className }, text, action && " ", action);
  return { key, look: text, build };
}

/** @param {ChatView} chat @param {string} key @param {boolean} more */
function historyRow(chat, key, more) {
  const { loading, last_n } = chat;
  const start = more ? "" : say(last_n > 0 ? "beginning" : "noMessages");
  const texts = { no: start, yes: say("loading"), failed: say("notLoaded") };
  const retry = textButton(say("tryAgain"), () => retryLoading(chat));
  return textRow(key, "history", texts[loading], loading === "failed" && retry);
}

const GROUP_SECONDS = 300;

/** @param {Message} message @param {Message} [above] */
function startsGroup({ created_at, sender_id }, above) {
  const from = Date.parse(above?.created_at ?? "");
  const seconds = (Date.parse(created_at) - from) / 1000; // NaN: it is not sent yet
  return sender_id !== above?.sender_id || seconds >= GROUP_SECONDS;
}

/**
 * @param {ChatView} chat @param {Message} message @param {number[]} marks
 * @param {Message} [above] @param {Delivery} [unsent]
 * @returns {Row}
 */
function messageRow(chat, message, marks, above, unsent) {
  const { id, n, rev, edited_at, sender_id, client_id } = message;
  const own = sender_id === myId();
  const name = personName(sender_id);
  const { change = unsent, content, deleted } = shown(message);
  const failed = change?.state === "failed";
  const tick = change || own ? tickOf(marks, n, change) : null;
  const first = startsGroup(message, above);
  const arriving = n > pane.drawn && pane.follow && !own;
  const key = own && client_id ? `c ${client_id}` : `m ${id}`;
  const unfolded = pane.unfolded.has(key);
  const undo = held.has(id) && textButton(say("undo"), () => release(id, true));
  const build = () => {
    const more = {
      class: "icon-button more",
      tabindex: -1,
      "aria-label": say("actions"),
      "aria-haspopup": "menu",
      "aria-describedby": `message-${id}`,
    };
    const sender = el(
      "p",
      { class: first && !own ? "sender" : "sr-only", dir: "auto" },
      own ? say("ownLast", { text: "" }) : name,
    );
    const bubble = el(
      "div",
      { class: "bubble" },
      paint(sender, hueOf(sender_id, chat)),
      flow(key, content, deleted, undo || stamp(message, tick)),
      failed && failureLine(change),
    );
    return el(
      "li",
      {
        id: id > 0 && `message-${id}`,
        class: [
          "message",
          own && "own",
          first && "first",
          arriving && "arriving",
          failed && "failed",
        ],
        "data-id": id,
        "data-n": n,
      },
      !own && personAvatar(sender_id, chat),
      bubble,
      id > 0 && !deleted && el("button", more, icon("more")),
    );
  };
  const state = [n, rev, edited_at, first, name, tick, unfolded, today, change];
  return { key, look: JSON.stringify([...state, held.has(id)]), build, message };
}

/**
 * @param {string} key @param {string} content @param {boolean} deleted
 * @param {HTMLElement} stamp
 */
function flow(key, content, deleted, stamp) {
  // A shorter text has less than 40 lines.
  const long = content.length > 600 || content.split("\n").length > 20;
  const unfolded = long && pane.unfolded.has(key);
  const text = unfolded ? say("showLess") : say("showAll");
  const fold = textButton(text, () => pane.toggleFold(key), "fold");
  fold.ariaExpanded = String(unfolded);
  return el(
    "div",
    { class: ["flow", long && "long", unfolded && "unfolded"] },
    deleted
      ? el("div", { class: "content blank" }, say("deleted"))
      : contentNode(content),
    long && fold,
    stamp,
  );
}

/**
 * @param {number[]} marks of the others @param {number} n @param {Delivery} [change]
 * @returns {Tick}
 */
function tickOf(marks, n, change) {
  if (change?.state === "failed") return ["failed", say("notSent")];
  if (change) return ["sending", say("sending")];
  const people = marks.length;
  const readers = marks.filter((mark) => mark >= n).length;
  if (readers === 0) return ["sent", say("sent")];
  if (readers < people) return ["read", say("readBy", { readers, people })];
  return ["read", say("read"), "tick-read"];
}

/** @param {ChatView} chat */
function knowsReaders(chat) {
  return !chat.direct && isWhole(chat) && others(chat).length > 0;
}

/** @param {ChatView} chat @param {Message} message */
function showReaders(chat, { n, sender_id }) {
  const marks = [...chat.members].filter(([id]) => id !== sender_id);
  marks.sort(([, a], [, b]) => b - a);
  const rows = marks.map(([id, mark]) => {
    const note = el("span", { class: "quiet" }, say(mark >= n ? "read" : "notYet"));
    return el("li", { class: "person" }, ...personCells(id, chat), note);
  });
  box("readers-list").replaceChildren(...rows);
  dialog("readers").showModal();
}

/** @param {{target: Element}} event */
function onMessageClick({ target }) {
  const { open } = model;
  const row = target.closest("li");
  const message = messageOf(Number(row?.dataset["id"]));
  if (!open || !row || !message) return;
  if (target.closest(".more")) openActions(row);
  if (target.closest(".own .stamp") && knowsReaders(open)) showReaders(open, message);
}

/** Plain text; of one message, as it was written. @param {ClipboardEvent} event */
function onCopy(event) {
  const selection = getSelection();
  if (!selection || selection.isCollapsed) return;
  const range = selection.getRangeAt(0);
  const parts = [...range.cloneContents().querySelectorAll(".sender, .content")];
  const text = parts.map(({ textContent }) => textContent).join("\n");
  event.clipboardData?.setData("text/plain", text || String(range));
  event.preventDefault();
}

/** @param {Partial<Message>} message @param {Tick | null} tick */
function stamp({ created_at, edited_at, deleted }, tick) {
  return el(
    "span",
    { class: "stamp", title: tick?.[1] },
    edited_at && !deleted && timeNode(edited_at, say("edited")),
    created_at && timeNode(created_at),
    tick && sign(...tick),
  );
}

/** @param {string} datetime @param {string} [text] instead of the time */
function timeNode(datetime, text) {
  const date = new Date(datetime);
  const title = formats.moment.format(date);
  const note = text && spoken(` ${title}`);
  return el("time", { datetime, title }, text ?? formats.clock.format(date), note);
}

/** @type {NotDone} */
const NOT_DONE = { message: "notSentText", edit: "notSaved", delete: "notDeleted" };

/** @param {Delivery} delivery */
function failureLine(delivery) {
  const { client_id, kind, content, code = "" } = delivery;
  const textIsWrong = ["bad_field", "too_large", "changed"].includes(code);
  const isMessage = kind === "message";
  const edit = textButton(say("edit"), () => composer.edit(delivery));
  const repeat = textButton(say("tryAgain"), () => model.client?.resend(client_id));
  const discard = textButton(say(isMessage ? "delete" : "cancel"), () =>
    model.client?.discard(client_id),
  );
  const maySucceed = isMessage || code === "internal";
  const copy = content && textButton(say("copy"), () => copyText(content));
  const first = textIsWrong ? edit : maySucceed ? repeat : copy;
  return el("p", { class: "failure" }, `${notDoneText(delivery)} `, first, discard);
}

/** @param {Delivery} delivery */
function notDoneText(delivery) {
  return say(NOT_DONE[delivery.kind], { text: failureText(delivery) });
}

/** @param {Delivery} delivery @returns {string} */
function failureText({ kind, content, code = "", reason = "" }) {
  const most = maximumIn(reason) || model.maxCharacters;
  const over = countCharacters(content) - most;
  if ((code === "bad_field" || code === "too_large") && over > 0)
    return say("over", { count: over, most });
  if (kind === "message" && code === "not_found") return say("notAllowed");
  return refusalText(code, reason);
}

/** @param {string} text @param {() => void} press */
function textButton(text, press, className = "") {
  const node = el("button", { class: `text-button ${className}` }, text);
  node.addEventListener("click", press);
  return node;
}

/** @param {ChatView | null} chat */
function selectChat(chat) {
  const before = model.open;
  if (before === chat) return;
  if (before) {
    releaseAll();
    before.divider = null;
    model.client?.sendTyping(before.id, false);
  }
  model.open = chat;
  for (const node of document.querySelectorAll("dialog"))
    if (before || node.id !== "ask") node.close("page");
  box("messages").replaceChildren();
  pane.unfolded.clear();
  Object.assign(pane, { drawn: Infinity, follow: true, goTo: "start", at: undefined });
  drafts.prune();
  composer.show(chat);
  if (!chat) return;
  chat.divider = unread(chat) > 0 ? chat.read_n : null;
  retryLoading(chat);
}

/** Back leads to the list, even at first. @param {number} id */
function openChat(id) {
  if (!location.hash) history.replaceState(null, "", "#chats");
  location.hash = `#chat/${id}`;
}

function route() {
  const [, id, at] = /^#chat\/(\d+)(?:\/(\d+))?$/.exec(location.hash) ?? [];
  const chat = model.chats.get(Number(id)) ?? null;
  if (id && !chat && !model.chatsLoaded) return; // the list of chats will come
  const before = model.open;
  selectChat(chat);
  if (at !== pane.at) {
    pane.at = at;
    pane.goTo = Number(at) || "start";
    if (at && !chat) toast(say("notThere"));
  }
  requestRender();
  if (before !== chat && !at) requestAnimationFrame(() => moveFocus(before));
}

/** @param {ChatView | null} [before] the chat that was closed */
function moveFocus(before) {
  const row = box("chat-list").querySelector(`[href="#chat/${before?.id}"]`);
  const inChat = isTouch() ? scroller : composer.field;
  const target = model.open ? inChat : (row ?? box("chats"));
  target.focus({ preventScroll: true });
}

/* -------------------------------------------------------------------------------------
 * Changing. An edit or a deletion waits like a message, and the row shows what will be.
 * ---------------------------------------------------------------------------------- */

/** Message id -> timer that sends its deletion. @type {Map<number, number>} */
const held = new Map();

/** @param {number} id of a message */
function changeOf(id) {
  return model.client?.unsentChanges().findLast((change) => change.message_id === id);
}

/** A message as it will be. @param {Message} message */
function shown({ id, content, deleted = false }) {
  if (held.has(id)) return { content, deleted: true };
  const change = changeOf(id);
  if (change?.kind === "edit")
    return { change, content: change.content, deleted: false };
  return { change, content, deleted: deleted || change?.state === "sending" };
}

/** @param {Message} message */
function mayEdit(message) {
  const { sender_id, created_at, deleted } = message;
  if (sender_id !== myId() || deleted || shown(message).deleted) return false;
  const { edit_seconds = 0 } = model.server;
  const seconds = (Date.now() - Date.parse(created_at)) / 1000;
  return seconds < (edit_seconds ?? Infinity);
}

/** A message of the open chat. @param {number} id */
function messageOf(id) {
  return model.open?.messages.find((message) => message.id === id);
}

/** @param {HTMLElement} row */
function openActions(row) {
  const anchor = row.querySelector(".more");
  const chat = model.open;
  const message = messageOf(Number(row.dataset["id"]));
  if (!anchor || !chat || !message) return;
  const { id, sender_id } = message;
  const isReadable = sender_id === myId() && knowsReaders(chat);
  const isCreator = !chat.direct && chat.created_by === myId();
  const editable = mayEdit(message);
  const items = [
    { text: say("copy"), press: () => copyText(shown(message).content) },
    editable && { text: say("edit"), press: () => composer.change(message) },
    isReadable && { text: say("readers"), press: () => showReaders(chat, message) },
    (editable || isCreator) && { text: say("delete"), press: () => hold(id), danger: true },
  ];
  showMenu(anchor, items.filter((item) => item !== false));
}

let longTouch = 0;

/** The browser has a menu of its own for a link. @param {any} event */
function isTouchOfText({ pointerType, target }) {
  return pointerType === "touch" && !target.closest("a, button");
}

/** iOS reports no long touch. @param {any} event */
function onTouch(event) {
  clearTimeout(longTouch);
  const row = event.target.closest("li");
  if (!row || !isTouchOfText(event)) return;
  longTouch = after(0.5, () => {
    openActions(row);
    // Or else the lifted finger would close the menu.
    box("menu").setPointerCapture(event.pointerId);
  });
}

/** Deletes in five seconds. @param {number} id */
function hold(id) {
  if (model.open?.editing?.id === id) composer.leave(true); // the user may undo
  held.set(id, after(5, () => release(id)));
  announce(say("deleted"));
  requestRender();
}

/** @param {number} id @param {boolean} [undo] */
function release(id, undo) {
  clearTimeout(held.get(id));
  held.delete(id);
  if (!undo) {
    model.client?.deleteMessage(id, { chatId: model.open?.id });
    drafts.set(-id, "");
  }
  requestRender();
}

/** Nothing can be undone where the user does not see it. @param {boolean} [undo] */
function releaseAll(undo) {
  for (const id of held.keys()) release(id, undo);
}

/** @param {string} text */
function copyText(text) {
  const { activeElement } = document;
  const node = el("textarea", {}, text); // navigator.clipboard would need https
  inFront("toasts").append(node);
  node.select();
  const done = document.execCommand("copy");
  toast(say(done ? "copied" : "notCopied"));
  node.remove();
  if (activeElement instanceof HTMLElement) activeElement.focus({ preventScroll: true });
  return done;
}

/* -------------------------------------------------------------------------------------
 * Drafts.
 * ---------------------------------------------------------------------------------- */

const drafts = new Drafts(attempt(() => localStorage) ?? null, myId);

/** Or else a text that another tab has sent would stay. @param {StorageEvent} event */
function onStorage({ key, newValue }) {
  const { open } = model;
  const ended = open?.editing && !newValue; // there, but not here
  if (open && !ended && key === drafts.key(composer.draftId(open))) composer.show(open);
  for (const chat of model.chats.values()) chat.muted = undefined;
  requestRender();
}

function showDrafts() {
  const count = drafts.chatIds().length;
  box("drafts").hidden = count === 0;
  setText("drafts-text", say("draftsHere", { count }));
}

async function onDeleteDrafts() {
  const ids = drafts.chatIds();
  const text = say("draftsHere", { count: ids.length });
  if (!(await ask(say("deleteDrafts"), text, say("delete")))) return;
  for (const id of ids) drafts.set(id, "");
  composer.show(model.open);
  requestRender();
}

/* -------------------------------------------------------------------------------------
 * Writing. Only the composer writes to its field.
 * ---------------------------------------------------------------------------------- */

/** @type {Composer} */
const composer = {
  field: byId("composer-text", HTMLTextAreaElement),

  draftId({ id, editing }) {
    return editing ? -editing.id : id;
  },

  show(chat) {
    const draft = chat && drafts.get(this.draftId(chat)).text;
    this.field.value = draft || (chat?.editing?.content ?? "");
    this.fit();
  },

  showMode({ editing }) {
    box("edit-bar").hidden = !editing;
    box("send").ariaLabel = say(editing ? "save" : "send");
    if (!editing) return;
    const now = shown(messageOf(editing.id) ?? editing);
    const changed = now.content === editing.content ? "" : say("wasChanged");
    const news = now.deleted ? say("wasDeleted") : changed;
    setText("edit-text", `${say("editing")} ${news}`);
  },

  fit() {
    const { value } = this.field;
    // style.css makes the field as high as this copy: to measure it moves the messages.
    box("composer-box").dataset["text"] = value;
    const most = model.maxCharacters;
    const used = countCharacters(sendable(value));
    const over = used - most;
    const text = over > 0 ? say("over", { count: over, most }) : say("used", { used, most });
    setText("composer-count", used < 0.9 * most ? "" : text);
    const { classList } = box("composer-count");
    if (over > 0 && !classList.contains("over")) announce(text);
    classList.toggle("over", over > 0);
  },

  onInput() {
    this.fit();
    const chat = model.open;
    if (!chat) return;
    const { value } = this.field;
    const { editing } = chat;
    drafts.set(this.draftId(chat), value === editing?.content ? "" : value, editing);
    if (!editing) model.client?.sendTyping(chat.id, !isBlank(value));
  },

  onKey(event) {
    const { key, shiftKey } = event;
    const { editing = null, messages = [], moreAfter } = model.open ?? {};
    if (isComposing(event)) return;
    if (key === "Enter" && !shiftKey && !isTouch()) return this.send(event);
    if (key === "Escape" && editing) {
      event.preventDefault(); // or else the chat would close, too
      return this.leave();
    }
    if (key !== "ArrowUp" || editing || moreAfter || this.field.value) return;
    const last = messages.findLast(mayEdit);
    // The last own message may be one that waits.
    if (!last || !model.open || notYetStored(model.open).length > 0) return;
    event.preventDefault();
    this.change(last);
  },

  send(event) {
    event.preventDefault();
    const chat = model.open;
    const content = sendable(this.field.value);
    if (chat?.editing) return void this.save(chat.editing, content);
    if (!chat || !content) return;
    if (isBlank(content)) {
      toast(say("notSentText", { text: say("blank") }));
      return;
    }
    chat.divider = null;
    chat.activeAt = Date.now();
    model.client?.sendTyping(chat.id, false);
    model.client?.send(chat.id, content); // first: a crash must not lose the text
    drafts.set(chat.id, "");
    this.show(chat);
    pane.showLatest();
  },

  change(message) {
    const chat = model.open;
    if (!chat) return;
    const { id, rev = id } = message;
    const change = changeOf(id);
    const waits = change?.state === "sending";
    const now = { ...message, rev, content: waits ? change.content : message.content };
    if (change && !waits) {
      const text = `${change.content}\n${drafts.get(-id).text}`.trimEnd();
      drafts.set(-id, text, now);
      model.client?.discard(change.client_id);
    }
    // A draft may be older than the last change.
    chat.editing = drafts.get(-id).base ?? now;
    this.show(chat);
    this.field.focus();
    requestRender();
  },

  async save(before, content) {
    const { id } = before;
    if (isBlank(content)) {
      const sure = await ask(say("deleteTitle"), "", say("delete"));
      if (sure && model.open?.editing === before) hold(id);
      return;
    }
    // The user's edit before this one may have been stored meanwhile.
    const now = messageOf(id) ?? before;
    const { rev = id } = now.content === before.content ? now : before;
    const old = [before, shown(now)].map((one) => sendable(one.content));
    if (!old.includes(content))
      model.client?.editMessage(id, content, { ifRev: rev, chatId: model.open?.id });
    this.leave();
  },

  leave(keepsDraft) {
    const chat = model.open;
    if (!chat?.editing) return;
    if (!keepsDraft) drafts.set(-chat.editing.id, "");
    chat.editing = null;
    this.show(chat);
    this.field.focus();
    requestRender();
  },

  edit({ message_id, chat_id, client_id, content }) {
    const message = messageOf(message_id);
    if (message) return this.change(message);
    this.leave(true);
    drafts.set(chat_id, `${content}\n${drafts.get(chat_id).text}`.trimEnd());
    model.client?.discard(client_id);
    this.show(model.open);
    this.field.focus();
  },
};

/** The first line keeps its indent. @param {string} text */
function sendable(text) {
  const clean = text.replace(/[\0-\x08\x0b\x0c\x0e-\x1f\x7f]/g, "").trimEnd();
  return clean.replace(/^\s*\n/, "");
}

/** Safari reports its last Enter as key code 229. @param {KeyboardEvent} event */
function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

/* -------------------------------------------------------------------------------------
 * Search. It goes on while the end of the list is on the screen.
 * ---------------------------------------------------------------------------------- */

/** @type {Search} */
const search = {
  q: "",
  chatId: 0,
  found: [],
  before: null,
  busy: false,
  error: "",
  timer: 0,
  running: new AbortController(),

  open(here) {
    field("search-here").checked = here;
    if (!dialog("search").open) dialog("search").showModal();
    field("search-text").select();
    this.start();
  },

  start(again = false) {
    const q = field("search-text").value.trim();
    const chatId = (field("search-here").checked && model.open?.id) || 0;
    requestRender();
    if (!again && q === this.q && chatId === this.chatId) return;
    this.running.abort();
    const running = new AbortController();
    Object.assign(this, { q, chatId, running, found: [], before: q ? undefined : null });
    this.retry(0.3); // the user may go on typing
  },

  retry(seconds = 0) {
    this.busy = true;
    this.error = "";
    clearTimeout(this.timer);
    this.timer = after(seconds, () => {
      this.busy = false;
      requestRender();
    });
  },

  async goOn() {
    const { signal } = this.running;
    const { chatId, before } = this;
    if (this.busy || this.error || before === null) return;
    this.busy = true;
    try {
      const q = this.q.split(/\s+/, 8).join(" "); // the server takes no more words
      const what = { q, before: before ?? null, chatId: chatId || null };
      const answer = await model.client?.search(what, signal);
      if (signal.aborted || !answer) return;
      this.found.push(...answer.messages);
      this.before = answer.before;
      for (const [id, chat] of model.chats) {
        const here = answer.messages.filter(({ chat_id }) => chat_id === id);
        void learnNames(chat, here.map(({ sender_id }) => sender_id));
      }
    } catch (error) {
      if (signal.aborted) return;
      const { retryAfter } = /** @type {ChatError} */ (error);
      if (retryAfter) return this.retry(retryAfter);
      this.error = errorText(error);
    }
    this.busy = false;
    requestRender();
  },

  render(sorted) {
    if (!dialog("search").open) return;
    const { q, chatId, before, error } = this;
    const { open, chats } = model;
    box("search-scope").hidden = !open;
    const called = sorted.filter((chat) => !chatId && isCalled(chat, q));
    const found = this.found.filter((one) => !one.deleted && chats.has(one.chat_id));
    showRows(box("search-list"), [
      ...called.slice(0, 5).map(chatRow),
      ...found.map((message) => this.row(message)),
    ]);
    if (below("search-list") < END_MARGIN) void this.goOn();
    const count = found.length;
    const done = before === null;
    const nothing = done ? say("foundNothing") : "";
    const result = count ? say("found", { count: done ? count : `${count}+` }) : nothing;
    const text = error || `${result} ${this.busy ? say("searching") : ""}`;
    box("search-status").ariaBusy = String(this.busy); // not read out
    setText("search-status", q && text);
    box("search-retry").hidden = !error;
  },

  row({ id, chat_id, sender_id, created_at, content, rev }) {
    const { q, chatId } = this;
    const chat = model.chats.get(chat_id);
    const name = personName(sender_id);
    const names = [...new Set([name, chat && !chatId ? chatTitle(chat) : name])];
    const when = shortTime(created_at);
    const build = () => {
      const marked = markedNode(visibleText(content), q);
      const link = el(
        "a",
        { class: "row found", href: `#chat/${chat_id}/${id}` },
        personAvatar(sender_id),
        el("span", { class: "row-title" }, names.map(isolated).join(" · ")),
        el("span", { class: "row-time" }, when),
        el("span", { class: "row-last", dir: "auto" }, marked),
      );
      return el("li", {}, link);
    };
    return { key: `m ${id}`, look: JSON.stringify([names, when, rev, q]), build };
  },

  onClick({ target, ctrlKey, metaKey, shiftKey }) {
    if (!target.closest("a") || ctrlKey || metaKey || shiftKey) return;
    dialog("search").close();
    pane.at = undefined; // the address may stay the same
    after(0, route);
  },
};

/** @param {ChatView} chat @param {string} q */
function isCalled(chat, q) {
  return folded(`${chatTitle(chat)} ${namesOf(others(chat))}`).includes(folded(q));
}

/** @param {string} key */
const arrowStep = (key) => ({ ArrowUp: -1, ArrowDown: 1 })[key];

/** Up and down move between rows. @param {any} event */
function onListKey(event) {
  const list = event.target.closest("#chat-list, #bell-list, #search, #scroller");
  const step = arrowStep(event.key);
  if (!list || !step) return;
  const stops = [...list.querySelectorAll("#search-text, .row, .more")];
  const more = event.target.closest("li")?.querySelector(".more");
  const at = stops.indexOf(more ?? event.target);
  const { bottom } = list.getBoundingClientRect();
  const lastVisible = () =>
    stops.findLast((one) => one.getBoundingClientRect().bottom <= bottom);
  const next = at < 0 && list === scroller ? lastVisible() : stops[at + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
}

/* -------------------------------------------------------------------------------------
 * Dialogs.
 * ---------------------------------------------------------------------------------- */

/** @type {Ask} */
function ask(title, text, yes = title, most = 0, value, save) {
  const node = dialog("ask");
  const input = field("ask-input");
  node.close();
  node.returnValue = "";
  node.onclose?.(new Event("close")); // the question before is answered: no
  setText("ask-title", title);
  setText("ask-text", text);
  setText("ask-yes", yes);
  input.hidden = !most;
  input.maxLength = most;
  input.value = value ?? "";
  node.onsubmit = () =>
    submit("ask-text", async (isOpen) => {
      await save?.(input.value.trim());
      if (isOpen()) node.close("yes");
    });
  node.showModal();
  input.select();
  return new Promise((resolve) => {
    // The event of the question before may come in the next frame.
    node.onclose = () => node.open || resolve(node.returnValue === "yes");
  });
}

/** A dialog (null: a form without one) -> its request. @type {Map<unknown, unknown>} */
const requests = new Map();

/** @type {Submit} */
async function submit(errorId, request) {
  const { client } = model;
  const node = box(errorId).closest("dialog");
  if (requests.has(node)) return; // a button that is disabled would lose the focus
  const name = node?.querySelector("h2")?.textContent ?? "";
  const mine = {};
  const isOpen = () => requests.get(node) === mine;
  requests.set(node, mine);
  setText(errorId, "");
  try {
    await request(isOpen);
  } catch (error) {
    const text = errorText(error);
    if (isOpen()) setText(errorId, text);
    else if (client === model.client) toast(say("lastOf", { name, text }));
  }
  if (isOpen()) requests.delete(node);
  requestRender();
}

/** @param {string} errorId @param {() => Promise<unknown>} request */
async function explain(errorId, request) {
  setText(errorId, "");
  await request().catch((error) => setText(errorId, errorText(error)));
  requestRender();
}

/** @param {unknown} error */
function toastError(error) {
  toast(errorText(error));
}

/** @param {string | null} name */
function setMyName(name) {
  const { session } = model;
  if (session) session.name = name;
  if (session && readSession("localStorage")?.token === session.token) saveAndStart(session);
  model.names.set(myId(), name);
  requestRender();
}

async function onLinkDevice() {
  const { client } = model;
  const answer = await client?.linkDevice().catch(toastError);
  if (!answer || client !== model.client) return;
  showLink("otherDevice", say("otherDeviceText"), `#token=${answer.token}`);
}

/** @param {Key} title @param {string} text @param {string} hash "": there is no link */
function showLink(title, text, hash) {
  setText("link-title", say(title));
  setText("link-text", text);
  setText("link-error", "");
  field("link-url").value = hash && new URL(location.pathname + hash, location.origin).href;
  box("link-copy").hidden = !hash;
  box("link-share").hidden = !hash || !("share" in navigator);
  box("link-revoke").hidden = title !== "invitePeople";
  if (!dialog("link").open) dialog("link").showModal();
}

/** @type {Element | null} */
let menuAnchor = null;

/** @param {Element} anchor @param {Action[]} actions */
function showMenu(anchor, actions) {
  const menu = box("menu");
  menu.hidePopover();
  menuAnchor = anchor;
  const items = actions.map(({ text, press, danger }) => {
    const item = el("button", { role: "menuitem", class: danger && "danger" }, text);
    item.addEventListener("click", press);
    return item;
  });
  menu.replaceChildren(...items);
  menu.showPopover();
  items[0]?.focus();
  const { left, bottom } = anchor.getBoundingClientRect();
  const { offsetWidth, offsetHeight } = menu;
  const { clientWidth, clientHeight } = box("chat");
  menu.style.left = `${Math.max(8, Math.min(left, clientWidth - offsetWidth - 8))}px`;
  menu.style.top = `${Math.max(8, Math.min(bottom, clientHeight - offsetHeight - 8))}px`;
}

/** @param {number} id @param {ChatView} [chat] */
function personCells(id, chat) {
  return [personAvatar(id, chat), el("span", { dir: "auto" }, personName(id))];
}

/** @param {Iterable<number>} ids */
function sortedByName(ids) {
  return [...ids].sort((a, b) => personName(a).localeCompare(personName(b)));
}

/** @type {People} */
const people = {
  chat: null,
  given: [],
  key: "",

  open(chat, given = []) {
    Object.assign(people, { chat, given });
    const [other] = given;
    const what = chat ? "addPeople" : other ? "newGroup" : "newChat";
    setText("people-title", say(what));
    setText("people-note", other ? say("groupWith", { name: personName(other) }) : "");
    setText("people-submit", say(chat ? "add" : "create"));
    byId("people-form", HTMLFormElement).reset();
    box("people-list").replaceChildren();
    this.onChoice();
    dialog("people").showModal();
    void explain("people-error", async () => {
      const { client, names } = model;
      /** @type {{users: Pick<Session, "user_id" | "name">[]}} */
      const { users } = await client?.request("GET", "/api/v1/users");
      if (client !== model.client) return;
      for (const { user_id, name } of users) names.set(user_id, name);
      model.people = users.map(({ user_id }) => user_id);
    });
  },

  render() {
    const { chat, given } = this;
    const members = chat?.members ?? new Map([[myId(), 0]]);
    const ids = sortedByName(new Set([...(model.people ?? []), ...given]));
    const rows = ids.filter((id) => !members.has(id)).map((id) => this.row(id));
    showRows(box("people-list"), rows);

    const name = field("people-filter").value.trim();
    const nodes = rowsOf("people-list");
    const fitting = nodes.filter(({ dataset }) =>
      folded(dataset["look"] ?? "").includes(folded(name)),
    );
    const next = name && fitting.find((node) => !node.matches(":has(:checked)"));
    for (const node of nodes) {
      node.hidden = !fitting.includes(node) && !node.matches(":has(:checked)");
      node.classList.toggle("next", node === next);
    }
    const none = rows.length > 0 ? say("noOneCalled", { name }) : this.orInvite("noOneToAdd");
    setText("people-empty", fitting.length > 0 || !model.people ? "" : none);

    // Only a group has a title. Without one, it is shown as the names of its members.
    const chosen = this.chosen();
    const grows = chosen.length > given.length;
    const direct = grows && chosen.length === 1;
    box("people-name").hidden = chat !== null || direct || !(grows || this.mayBeAlone());
    field("people-chat-title").placeholder = namesOf(chosen);
    return fitting.length;
  },

  row(id) {
    const checked = this.given.includes(id);
    const input = () => el("input", { type: "checkbox", value: id, checked });
    const label = () => el("label", { class: "person" }, input(), ...personCells(id));
    return { key: `${id}`, look: personName(id), build: () => el("li", {}, label()) };
  },

  chosen() {
    const inputs = box("people-list").querySelectorAll("input");
    return [...inputs].filter(({ checked }) => checked).map(({ value }) => Number(value));
  },

  mayBeAlone() {
    return model.server.invites === true && !this.chat;
  },

  orInvite(key) {
    return say(key) + (this.mayBeAlone() ? ` ${say("inviteLater")}` : "");
  },

  onChoice() {
    this.key = `${Math.random()}`;
    setText("people-error", "");
    this.render();
  },

  // Without a filter, Enter submits, as in any field.
  onFilterKey(event) {
    const filter = field("people-filter");
    if (event.key !== "Enter" || !filter.value.trim() || isComposing(event)) return;
    event.preventDefault();
    if (this.render() === 0) return;
    const next = box("people-list").querySelector(".next input");
    if (next instanceof HTMLInputElement) {
      next.checked = true;
      announce(say("chosen", { name: personName(Number(next.value)) }));
    }
    filter.value = "";
    this.onChoice();
  },

  async submit(isOpen) {
    const { client, chats } = model;
    const { chat, given, key: clientId } = this;
    const memberIds = this.chosen();
    const title = field("people-chat-title").value.trim();
    const alone = memberIds.length <= given.length;
    if (alone && !title) throw new Error(this.orInvite("chooseOne"));
    if (chat) {
      for (const user_id of memberIds)
        await client?.request("POST", `/api/v1/chats/${chat.id}/members`, { user_id });
      if (isOpen()) dialog("people").close();
      return;
    }
    const direct = box("people-name").hidden === true;
    const made = await client?.createChat(
      direct ? { memberIds, direct } : { title: title || null, memberIds, clientId },
    );
    if (!made || client !== model.client) return;
    const isNew = !chats.has(made.id);
    const opened = putChat(made);
    if (isNew) Object.assign(opened, { activeAt: Date.now(), isNew });
    if (!isOpen()) return;
    openChat(made.id);
    route();
    dialog("people").close();
    if (alone) onInvite();
  },
};

/** @type {Info} */
const info = {
  online: new Map(),
  nextPage: {},
  more: true,
  left: null,

  open() {
    if (!model.open) return;
    this.online.clear();
    Object.assign(this, { nextPage: {}, more: true });
    box("info-members").replaceChildren(); // their buttons belong to a chat
    field("info-mute").checked = isMuted(model.open);
    dialog("info").showModal();
    this.render();
    this.load();
  },

  load(which) {
    void explain("info-error", async () => {
      const { client, open: chat } = model;
      if (!client || !chat) return;
      const page = which ?? { limit: 100, ...this.nextPage };
      const { members, more } = await client.members(chat.id, page);
      if (client !== model.client || chat !== model.open) return;
      for (const { user_id, name, online = false } of members) {
        model.names.set(user_id, name);
        this.online.set(user_id, online);
      }
      const nextPage = { after: members.at(-1)?.user_id };
      if (!which) Object.assign(this, { nextPage, more });
      // An event can tell of a member that the list of chats has counted already.
      if (!this.more && !isWhole(chat)) chat.memberCount = this.online.size;
    });
  },

  render() {
    const chat = model.open;
    if (!chat) return;
    const { create_chats = false, invites = false } = model.server;
    const known = isWhole(chat) ? chat.members : this.online;
    const ids = sortedByName(known.keys()).filter((id) => id !== myId());
    const rows = [myId(), ...ids].map((id) => this.row(chat, id));
    const left = chat.memberCount - rows.length;
    const load = () => textButton(say("andMore", { left }), () => this.load());
    if (left > 0)
      rows.push({ key: "more", look: `${left}`, build: () => el("li", {}, load()) });
    setText("info-title", chatTitle(chat));
    showRows(box("info-members"), rows);
    box("info-rename").hidden = chat.direct || !create_chats;
    box("info-add").hidden = !create_chats;
    box("info-invite").hidden = chat.direct || !invites;
    box("info-leave").hidden = chat.direct && ids.length > 0;
  },

  row(chat, id) {
    const name = personName(id);
    const online = this.online.get(id) === true;
    const me = id === myId();
    const creator = chat.direct ? null : chat.created_by;
    const notes = [me && say("you"), id === creator && say("creator")].filter(Boolean);
    const removable = !me && creator === myId() && model.server.create_chats;
    const build = () => {
      const remove = textButton(say("remove"), () => void this.remove(chat, id));
      remove.ariaLabel = `${say("remove")} ${name}`;
      return el(
        "li",
        { class: ["person", online && "online"] },
        ...personCells(id, chat),
        online && spoken(say("online")),
        el("span", { class: "quiet" }, notes.join(", ")),
        removable && remove,
      );
    };
    const look = JSON.stringify([name, online, notes, removable]);
    return { key: `${id}`, look, build };
  },

  async remove(chat, id) {
    const { client, server } = model;
    const leaves = id === myId();
    const values = { name: personName(id), title: chatTitle(chat) };
    const ends = server.invites ? ` ${say("linksEnded")}` : "";
    const text = leaves ? say("leaveText") : say("removeText", values) + ends;
    const title = say(leaves ? "leaveTitle" : "removeTitle", values);
    const yes = say(leaves ? "leaveChat" : "remove");
    const done = await ask(title, text, yes, 0, "", async () => {
      if (leaves) this.left = chat;
      await client?.request("DELETE", `/api/v1/chats/${chat.id}/members/${id}`);
      if (leaves && client === model.client) removeChat(chat);
    });
    if (done) dialog("info").querySelector("button")?.focus(); // the row goes
  },
};

/* -------------------------------------------------------------------------------------
 * Notifications.
 * ---------------------------------------------------------------------------------- */

async function onNotifyButton() {
  await Notification.requestPermission();
  if (document.activeElement === box("notify")) box("bell").focus();
  requestRender();
}

/** Once: to a user who comes back and finds new messages. */
function offerNotifications() {
  const key = "chatd.notify";
  if (box("notify").hidden || readStored("localStorage", key)) return;
  if (writeStored("localStorage", key, "offered"))
    toast(say("offerNotify"), { text: say("notify"), press: onNotifyButton });
}

/** @param {ChatView} chat @param {Message} message */
function notify(chat, message) {
  if (window.Notification?.permission !== "granted" || isWatched()) return;
  // Another tab may show the message already.
  after(1, () => {
    const { sender_id, content, deleted } = findIn(chat, message.id) ?? message;
    const { id } = chat;
    const gone = deleted || model.chats.get(id) !== chat;
    if (gone || chat.read_n >= message.n || isWatched()) return;
    const body = excerpt(content);
    const tag = `chatd.${myId()}.${id}`; // all tabs of a user share one notification
    const options = { body, tag };
    const note = attempt(() => new Notification(senderIn(chat, sender_id), options));
    note?.addEventListener("click", () => {
      window.focus();
      location.hash = `#chat/${id}`;
      note.close();
    });
  });
}

/* -------------------------------------------------------------------------------------
 * Start.
 * ---------------------------------------------------------------------------------- */

/** @param {Session} session */
function start(session) {
  if (model.session?.token === session.token) return;
  loading = true;
  model.client?.disconnect();
  resetModel();
  if (!writeStored("sessionStorage", SESSION_KEY, session)) toast(say("noStorage"));
  const client = new ChatWebSocket({ bearer: session.token });
  Object.assign(model, { session, client });
  model.names.set(session.user_id, session.name);
  addHandlers(client);
  showScreen("chat");
  requestRender();
  // A slow list does not delay the socket for long.
  const timeout = new Promise((resolve) => after(2, () => resolve(0)));
  void Promise.race([fetchChats(), timeout]).then(() => {
    if (client === model.client) client.connect();
  });
}

/** @type {Listeners} */
const LISTENERS = {
  "sign-in-form submit": onSignInForm,
  "join-form submit": onJoinForm,
  skip: (event) => {
    event.preventDefault();
    if (model.open) composer.field.focus();
    else moveFocus();
  },
  "banner-retry": () => model.client?.retry(),
  notify: onNotifyButton,

  "me-panel toggle": showDrafts,
  "drafts-delete": onDeleteDrafts,
  "rename-me": () => {
    const { client, names } = model;
    const name = names.get(myId());
    void ask(say("changeName"), "", say("save"), 64, name, async (text) => {
      const me = await client?.renameMe(text);
      if (client === model.client) setMyName(me.name);
    });
  },
  "link-device": onLinkDevice,
  shortcuts: () => dialog("keys").showModal(),
  "sign-out": onSignOut,

  find: () => search.open(false),
  "chat-find": () => search.open(true),
  "search-text input": () => search.start(),
  "search-here change": () => search.start(),
  "search submit": () => box("search-list").querySelector("a")?.click(),
  "search-list": (event) => search.onClick(event),
  "search-list scroll": requestRender,
  "search-retry": () => search.retry(),

  "scroller scroll": () => pane.onScroll(),
  jump: () => {
    pane.showLatest();
    // The button goes.
    if (document.activeElement !== composer.field)
      scroller.focus({ preventScroll: true });
  },
  messages: onMessageClick,
  "messages copy": onCopy,
  "messages pointerdown": onTouch,
  "messages contextmenu": (event) => {
    if (isTouchOfText(event)) event.preventDefault();
  },
  // The touch that opens the menu clicks on nothing in it.
  "messages touchend": (event) => {
    if (box("menu").matches(":popover-open")) event.preventDefault();
  },
  "menu keydown": (event) => {
    const items = rowsOf("menu");
    const at = items.findIndex((item) => item === event.target);
    const step = arrowStep(event.key);
    if (event.key === "Tab") box("menu").hidePopover();
    if (!step) return;
    event.preventDefault();
    items.at((at + step) % items.length)?.focus();
  },

  "composer submit": (event) => composer.send(event),
  "composer-text input": () => composer.onInput(),
  "composer-text keydown": (event) => composer.onKey(event),
  "edit-cancel": () => composer.leave(),

  "new-chat": () => people.open(null),
  "empty-start": () => people.open(null),
  "people-form input": () => people.onChoice(),
  "people-form submit": () => submit("people-error", (isOpen) => people.submit(isOpen)),
  "people-filter keydown": (event) => people.onFilterKey(event),

  "chat-info": () => info.open(),
  "info-mute change": ({ target }) => {
    const { open } = model;
    if (!open) return;
    open.muted = target.checked;
    if (!writeStored("localStorage", mutedKey(open), open.muted)) {
      toast(say("noStorage"));
      open.muted = target.checked = false;
    }
    requestRender();
  },
  "info-rename": () => {
    const { client, open: chat } = model;
    if (!chat) return;
    const title = say("lastOf", { name: say("rename"), text: chatTitle(chat) });
    void ask(title, "", say("save"), 200, chat.title, async (text) =>
      client?.renameChat(chat.id, text || null),
    );
  },
  // In a direct chat, a group begins.
  "info-add": () => {
    const { open: chat } = model;
    if (chat?.direct) people.open(null, others(chat));
    else people.open(chat);
  },
  "info-invite": onInvite,
  "info-leave": () => model.open && info.remove(model.open, myId()),

  "link-copy": () => copyText(field("link-url").value),
  // It is rejected if the user cancels.
  "link-share": () => navigator.share({ url: field("link-url").value }).catch(() => {}),
  "link-revoke": () => submit("link-error", showInvite),
};

/** @param {any} event of a key */
function onShortcut(event) {
  const { key, code, ctrlKey, metaKey, shiftKey, altKey, target } = event;
  if (event.defaultPrevented || isComposing(event)) return;
  onListKey(event);
  const isCommand = (ctrlKey || metaKey) && !shiftKey && !altKey;
  // Of a keyboard with other letters, the code says which key it is.
  const isSearch = isCommand && (key === "k" || code === "KeyK");
  if (isSearch && !box("chat").hidden) {
    event.preventDefault();
    if (!document.querySelector("dialog[open]:not(#search)")) search.open(false);
  }
  if (document.querySelector("dialog[open], :popover-open")) return;
  if (key === "Escape" && model.open) location.hash = "#chats";
  if (key === "?" && !target.matches("input, textarea")) dialog("keys").showModal();
}

function onWatched() {
  if (isWatched() && [...model.chats.values()].some(countNew)) offerNotifications();
  onSecond();
  render();
}

function onSecond() {
  if (!box("banner").hidden) renderBanner();
  if (dateAndZone() === today) return;
  today = dateAndZone();
  formats = newFormats();
  requestRender();
}

if (!("popover" in HTMLElement.prototype)) throw new Error("popover");
for (const [what, handle] of Object.entries(LISTENERS)) {
  const [id = "", type = "click"] = what.split(" ");
  box(id).addEventListener(type, handle);
}
// The focus stays in the field, or else a phone would close its keyboard.
for (const id of ["send", "jump", "edit-cancel"])
  box(id).addEventListener("mousedown", (event) => event.preventDefault());
// A choice closes its panel before its own handler moves the focus.
const closeAround = (/** @type {any} */ { target }) => {
  const choice = target.closest("#me-panel button, #bell-list a, #menu button");
  choice?.closest("[popover]").hidePopover();
  target.closest(".close")?.closest("dialog").close();
};
document.addEventListener("click", closeAround, true);
document.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", onShortcut);
const onClose = (/** @type {Event} */ { target }) => {
  requests.delete(target);
  ["toasts", "announcer"].forEach(inFront);
  requestRender();
};
document.addEventListener("close", onClose, true);
addEventListener("resize", () => box("menu").hidePopover());
// At once: a hidden tab may never get the requested frame.
document.addEventListener("visibilitychange", onWatched);
addEventListener("focus", onWatched);
addEventListener("beforeunload", onBeforeUnload);
addEventListener("pagehide", () => releaseAll());
addEventListener("storage", onStorage);
addEventListener("pointerup", () => clearTimeout(longTouch));
addEventListener("pointercancel", () => clearTimeout(longTouch));
addEventListener("hashchange", ({ oldURL }) => {
  if (!followLink(location.hash, new URL(oldURL).hash)) route();
});
signedOut?.addEventListener("message", onSignedOutElsewhere);
// As on iOS, a keyboard may cover a part of the page.
const view = window.visualViewport;
view?.addEventListener("resize", () => {
  if (view.scale > 1.01) return; // the user has zoomed in
  const covered = view.height < window.innerHeight - 1;
  box("chat").style.setProperty("--view-height", covered ? `${view.height}px` : "");
  window.scrollTo(0, 0);
});
const observer = new ResizeObserver(() => pane.onResize());
for (const id of ["scroller", "messages"]) observer.observe(box(id));
setInterval(onSecond, 1000);
loadIcons().catch(() => {}); // words stand beside each icon

if (!followLink(location.hash)) {
  const session = sessionToResume();
  if (session) start(session);
  else showSignIn();
}
