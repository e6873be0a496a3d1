// @ts-check
/**
 * app.js: chatd's page (docs/page.md). An event or a click changes the model; only a
 * render writes to the page. Text that users have written enters it as textContent.
 *
 * @import { Action, Attributes, Chat, ChatEventHandlers, ChatView, Child, Delivery,
 *   EventHandlers, Key, Message, Model, Row, Session, State, StorageName } from "./page.js"
 */
import { ChatError, ChatWebSocket } from "./chat-websocket.js";
import { Drafts } from "./drafts.js";
import { contentNode, folded, isBlank, markedNode, visibleText } from "./text.js";
import { locale, say } from "./words.js";

/* -------------------------------------------------------------------------------------
 * Loading. Until a screen is shown, any exception ends in words. So this comes first,
 * and uses only words.js. For a script that does not load, style.css shows .stuck.
 * ---------------------------------------------------------------------------------- */

const SCREENS = ["loading", "sign-in", "join", "chat"];
let loading = true;

/** @param {any} event */
function onLoadError(event) {
  const error = event.error ?? event.reason;
  // Without an error it is only a notice, for example of a ResizeObserver.
  if (!loading || !error) return;
  const text = `${say("broken")} (${error.message ?? error})`;
  for (const id of SCREENS)
    document.getElementById(id)?.toggleAttribute("hidden", id !== "loading");
  document.getElementById("loading")?.replaceChildren(text);
}

addEventListener("error", onLoadError);
addEventListener("unhandledrejection", onLoadError);

/* -------------------------------------------------------------------------------------
 * Tools. Elements, keyed rows, times, words.
 * ---------------------------------------------------------------------------------- */

/** @template {Element} Kind @param {string} id @param {new () => Kind} kind */
function byId(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`index.html has no #${id}`);
  return found;
}

const button = (/** @type {string} */ id) => byId(id, HTMLButtonElement);
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
  for (const [name, value] of Object.entries(attributes))
    if (value) node.setAttribute(name, String(value));
  for (const child of children) if (child) node.append(child);
  return node;
}

/** @param {string} base @param {Record<string, boolean>} extra */
function classes(base, extra) {
  return [base, ...Object.keys(extra).filter((name) => extra[name])].join(" ");
}

/** @param {string} name @param {string} [className] */
function icon(name, className = "") {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `web/icons.svg#${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", className);
  svg.append(use);
  return svg;
}

/**
 * A row with the same key and look keeps its element, and so its focus, its selection
 * and a screen reader's position.
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
  /** @type {HTMLElement | null | undefined} */
  const first = row?.querySelector("a, button") ?? container.closest("[tabindex]");
  const same = row?.contains(activeElement) && activeElement instanceof HTMLElement;
  (same ? activeElement : first)?.focus({ preventScroll: true });
}

/** @param {Row} row @param {HTMLElement} [before] */
function newRow({ key, look, build }, before) {
  const node = build();
  Object.assign(node.dataset, { key, look });
  const more = before?.querySelector(".more"); // an open menu may belong to it
  if (more) node.querySelector(".more")?.replaceWith(more);
  before?.replaceWith(node);
  return node;
}

/** @param {string} id @returns {HTMLElement[]} */
function rowsOf(id) {
  return /** @type {HTMLElement[]} */ ([...box(id).children]);
}

/** So many pixels are left to scroll. @param {string} id */
function below(id) {
  const { scrollHeight, scrollTop, clientHeight } = box(id);
  return scrollHeight - scrollTop - clientHeight;
}

/** The end counts as visible when it is less than this many pixels away. */
const END_MARGIN = 60;

/** What the browser may forbid or not know. @template Value @param {() => Value} get */
function attempt(get) {
  try {
    return get();
  } catch {
    return undefined;
  }
}

/** In the page's locale, with the user's clock of 12 or 24 hours. */
function newFormats() {
  const user = attempt(() => new Intl.DateTimeFormat(undefined, { hour: "numeric" }));
  const hourCycle = user?.resolvedOptions().hourCycle;
  const format = (/** @type {Intl.DateTimeFormatOptions} */ options) =>
    new Intl.DateTimeFormat(locale, options);
  return {
    offset: new Date().getTimezoneOffset(),
    clock: format({ timeStyle: "short", hourCycle }),
    dayNear: format({ weekday: "long", day: "numeric", month: "long" }),
    dayFar: format({ dateStyle: "long" }),
    dayShort: format({ day: "numeric", month: "short" }),
    dayShortFar: format({ dateStyle: "medium" }),
    moment: format({ dateStyle: "full", timeStyle: "short", hourCycle }),
  };
}

let formats = newFormats();

/** Whole days from then to now, by the reader's calendar. @param {Date} then */
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

/** Characters as the server counts them: code points. @param {string} text */
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
  box("toasts").append(node);
  after(TOAST_SECONDS, end);
}

/** To screen readers only. @param {string} text */
function announce(text) {
  const node = el("p", {}, text);
  box("announcer").append(node);
  after(TOAST_SECONDS * 2, () => node.remove());
}

/** @type {Record<string, Key>} */
const REFUSALS = {
  changed: "wasChanged",
  deleted: "wasDeleted",
  forbidden: "notAllowed",
  internal: "serverError",
  not_found: "notThere",
  overloaded: "busy",
  rate_limited: "busy",
  storage_failed: "serverError",
  too_large: "notAccepted",
  too_late: "tooLate",
  unreachable: "noAnswer",
  upstream: "noAnswer",
};

/** The server's own sentence is for programmers. @param {string} code @param {string} detail */
function refusalText(code, detail) {
  const known = REFUSALS[code];
  if (known) return say(known);
  if (code !== "bad_field") return say("otherError", { code });
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
 * A link may be for an account that its sender can read. So no tab changes its user, nor
 * the copy, without asking or a notice.
 * ---------------------------------------------------------------------------------- */

const SESSION_KEY = "chatd.session";
/** @type {StorageName[]} */
const STORAGES = ["sessionStorage", "localStorage"];
/** Tells the other tabs the id of a user that has signed out. */
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

/** Follows a link, if the address has one. @param {string} [hash] replaces it there */
function followLink(hash = "") {
  const [, kind, token] = /^#(token|invite)=(.+)$/.exec(location.hash) ?? [];
  if (!token) return false;
  history.replaceState(null, "", location.pathname + location.search + hash);
  void (kind === "token" ? signInWith : openInvite)(decoded(token));
  return true;
}

/** @param {string} text from an address; it may be mistyped */
function decoded(text) {
  return attempt(() => decodeURIComponent(text)) ?? text;
}

/** @param {string} token of a link */
async function signInWith(token) {
  const current = model.session ?? readSession("sessionStorage");
  try {
    /** @type {Session} */
    const session = await visitor(token).request("POST", "/api/v1/session");
    if (!current) startFirst(session);
    else if (await confirmSwitch(session, current)) saveAndStart(session);
    else start(current);
  } catch (error) {
    signInFailed(token, error);
  }
}

/** The first of a tab. @param {Session} session */
function startFirst(session) {
  const saved = readSession("localStorage");
  if (!saved || saved.user_id === session.user_id) return saveAndStart(session);
  start(session);
  toast(say("twoUsers", { me: userName(session), name: userName(saved) }));
}

/** @param {Session} session @param {Session} current */
async function confirmSwitch(session, current) {
  if (session.user_id === current.user_id) return true;
  const name = userName(session);
  const me = userName(current);
  const [title, text] = [say("continueAs", { name }), say("continueAsText", { me, name })];
  return ask(title, text, title, say("stayAs", { name: me }));
}

/** @param {string} token @param {unknown} error */
function signInFailed(token, error) {
  const { status } = /** @type {ChatError} */ (error);
  linkFailed(status === 401 ? say("linkInvalid") : errorText(error));
  // Without an answer the link may still be valid, so the button can try it again.
  const { href } = new URL(`#token=${token}`, location.href);
  if (!status) field("sign-in-link").value = href;
}

/** @param {string} text */
function linkFailed(text) {
  const session = model.session ?? sessionToResume();
  if (!session) return showSignIn("", text);
  toast(text);
  start(session);
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
  /** @type {HTMLElement | null} */
  const first = box(screen).querySelector("input, nav");
  if (hadFocus) first?.focus();
  loading = screen === "chat"; // until its chats are there
}

/** @param {SubmitEvent} event */
function onSignInForm(event) {
  event.preventDefault();
  const text = field("sign-in-link").value.trim();
  const token =
    /#token=(\S+)$/.exec(text)?.[1] ?? /^[\w-]+\.[\w-]+\.[\w-]+$/.exec(text)?.[0];
  setText("sign-in-error", token ? "" : say("notALink"));
  if (token) void signInWith(decoded(token));
}

function allUnsent() {
  const { chats, client } = model;
  const messages = [...chats.keys()].map((id) => client?.unsent(id) ?? []);
  return [...messages, client?.unsentChanges() ?? []].flat();
}

/** The browser asks if unsent messages are not in storage. @param {Event} event */
function onBeforeUnload(event) {
  if (allUnsent().some(({ kept }) => !kept)) event.preventDefault();
}

async function onSignOut() {
  releaseAll();
  const unsent = allUnsent().length;
  const text = say("signOutText", { count: unsent });
  if (unsent > 0 && !(await ask(say("signOut"), text))) return;
  signedOut?.postMessage(myId());
  model.client?.forget();
  const count = drafts.keys().length;
  endSession(say("signedOut") + (count ? ` ${say("draftsHere", { count })}` : ""));
}

/** Also its copy for the next visit. @param {string} reason */
function endSession(reason) {
  const saved = readSession("localStorage");
  if (saved?.user_id === model.session?.user_id)
    writeStored("localStorage", SESSION_KEY, null);
  writeStored("sessionStorage", SESSION_KEY, null);
  model.client?.disconnect();
  resetModel();
  history.replaceState(null, "", location.pathname + location.search);
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
  model.client?.forget();
  endSession(say("signedOutElsewhere"));
}

/* -------------------------------------------------------------------------------------
 * Invitations. A link lets anyone into a chat.
 * ---------------------------------------------------------------------------------- */

let invite = "";

/** Not the model's client, whose token it would send. */
function visitor(bearer = "") {
  return new ChatWebSocket({ bearer, storage: null, log: null });
}

/** @param {string} token */
async function openInvite(token) {
  const session = model.session ?? sessionToResume();
  if (session) start(session);
  try {
    const { title: called, member_count: count } = await visitor().previewInvite(token);
    const unnamed = isBlank(called ?? "");
    const title = say(unnamed ? "join" : "joinTitle", { title: called ?? "" });
    const text = say("people", { count });
    if (session) {
      const me = say("signedInAs", { name: userName(session) });
      if (!(await ask(title, `${text} · ${me}`, say("join")))) return;
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
    linkFailed(inviteErrorText(error));
  }
}

/** @param {SubmitEvent} event */
function onJoinForm(event) {
  event.preventDefault();
  const join = async () => {
    const answer = await visitor().joinAsNewUser(invite, field("join-name").value);
    openChat(answer.chat_id);
    startFirst(answer);
  };
  void submit("join-error", join, inviteErrorText);
}

/** @param {unknown} error */
function inviteErrorText(error) {
  const { status } = /** @type {ChatError} */ (error);
  if (status === 401) return say("linkInvalid");
  return status === 403 ? say("noInvites") : errorText(error);
}

/** With a new link. @param {boolean} [revoke] the earlier links */
async function showInvite(revoke = false) {
  const { client, open: chat } = model;
  if (!client || !chat) return;
  if (revoke) {
    await client.revokeInvites(chat.id);
    field("link-url").value = ""; // it has ended, even if there will be no new one
  }
  const { token, expires_in } = await client.createInvite(chat.id);
  if (chat !== model.open) return;
  const end = new Date(Date.now() + expires_in * 1000);
  const valid = say("inviteValid", { when: shortTime(end.toISOString()) });
  const text = revoke ? `${say("linksEnded")} ${valid}` : valid;
  showLink("invitePeople", text, `#invite=${token}`);
}

function onInvite() {
  void showInvite().catch(toastError);
}

/* -------------------------------------------------------------------------------------
 * Model. Everything that the page shows. Its counters only grow, so an event, an answer
 * and `connected` may bring a number in any order.
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
  document.querySelectorAll("dialog").forEach((node) => node.close());
  selectChat(null);
  Object.assign(model, newModel());
  field("search-text").value = "";
  search.start();
}

const myId = () => model.session?.user_id ?? 0;
const unread = (/** @type {ChatView} */ chat) => Math.max(0, chat.last_n - chat.read_n);
/** Muting is for one user in one browser. @param {ChatView} chat */
const mutedKey = (chat) => `chatd.muted.${myId()}.${chat.id}`;
/** @param {ChatView} chat */
const isMuted = (chat) => readStored("localStorage", mutedKey(chat)) === true;
/** What the title and the badges count. @param {ChatView} chat */
const counted = (chat) => (isMuted(chat) ? 0 : unread(chat));

/** @param {{user_id: number, name?: string | null | undefined}} user */
function userName({ user_id, name }) {
  return name && !isBlank(name) ? name : say("user", { id: `${user_id}` });
}

/** @param {number} user_id */
function personName(user_id) {
  return userName({ user_id, name: model.names.get(user_id) });
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
  const names = others(chat).map(personName);
  return names.join(", ") || say("onlyYou");
}

/** Newest activity first. To be added and to write offline count as such. */
function sortedChats() {
  const when = (/** @type {ChatView} */ { last_message, activeAt }) =>
    Math.max(Date.parse(last_message?.created_at ?? "") || 0, activeAt);
  const last = (/** @type {ChatView} */ chat) => chat.last_message?.id ?? 0;
  const all = [...model.chats.values()];
  return all.sort((a, b) => when(b) - when(a) || last(b) - last(a));
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
  // A large chat that the user was just added to says nothing of the user's mark.
  const mark = marks.get(myId()) ?? model.marks[id]?.read_n;
  const read_n = received.read_n ?? mark ?? (before ? 0 : last_n);
  Object.assign(chat, received, {
    memberCount,
    members: marks,
    read_n: Math.max(chat.read_n, read_n),
    last_n: Math.max(chat.last_n, last_n),
    last_message: newer(chat.last_message, last_message),
  });
  model.chats.set(id, chat);
  if (chat.last_message) void learnNames(chat, [chat.last_message.sender_id]);
  return chat;
}

/** Fetches names in a large chat. @param {ChatView} chat @param {number[]} userIds */
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

/**
 * Adds to the loaded messages. Those before a hole are dropped, and fetched again when
 * the user scrolls there.
 * @param {ChatView} chat @param {Message[]} messages
 */
function merge(chat, messages) {
  const byN = new Map(chat.messages.map((message) => [message.n, message]));
  for (const message of messages)
    byN.set(message.n, newer(byN.get(message.n) ?? null, message) ?? message);
  const all = [...byN.values()].sort((a, b) => a.n - b.n);
  const first = all.findLastIndex(({ n }, i) => all[i - 1]?.n !== n - 1);
  chat.messages = all.slice(first);
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
  const upToDate = chat.loaded || chat.loading === "yes";
  if (upToDate && !chat.moreAfter) merge(chat, [message]);
}

/** @param {ChatView} chat @param {number} userId */
function stopTyping(chat, userId) {
  clearTimeout(chat.typing.get(userId));
  chat.typing.delete(userId);
}

/** @param {ChatView} chat */
function removeChat(chat) {
  model.chats.delete(chat.id);
  if (model.open === chat) location.hash = "#chats";
}

/* -------------------------------------------------------------------------------------
 * Events. Two tables: each event of the client, and what it changes in the model.
 * ---------------------------------------------------------------------------------- */

/** @type {EventHandlers} */
const handlers = {
  state: ({ state }) => {
    const problem = BANNERS[state];
    if (state !== model.connection && problem) announce(say(problem));
    model.connection = state;
    if (state === "signed_out") onSignedOut();
  },
  resync: () => void fetchChats(),
  chats: ({ chats, cursor }) => {
    const epoch = cursor.slice(0, cursor.lastIndexOf("."));
    const ids = new Set(chats.map(({ id }) => id));
    for (const chat of model.chats.values()) if (!ids.has(chat.id)) removeChat(chat);
    if (epoch !== model.epoch) model.chats.clear(); // a backup was restored
    model.epoch = epoch;
    for (const received of chats) putChat(received).loaded = false;
    const [only] = chats;
    if (only && !chats[1] && !model.chatsLoaded && !location.hash) openChat(only.id);
    model.chatsLoaded = true;
    route();
    if (model.open) retryLoading(model.open);
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
    if (model.open && !model.open.loaded) retryLoading(model.open);
    if (search.error) search.retry();
    void loadServer();
  },
  chat_added: ({ chat }) => {
    putChat(chat).activeAt = Date.now();
    route();
  },
  delivery: (delivery) => {
    if (delivery.kind !== "message") return onChangeDelivery(delivery);
    const { state, client_id, chat_id, message } = delivery;
    const chat = model.chats.get(chat_id);
    if (chat && message) putMessage(chat, message);
    if (state !== "failed") return;
    const text = say("notSentText", { text: failureText(delivery) });
    if (chat && chat === model.open) announce(text);
    else if (chat) toast(say("lastOf", { name: chatTitle(chat), text }));
    // The user is no longer in this chat, so the page cannot show the failed message.
    else if (model.chatsLoaded) model.client?.discard(client_id);
  },
};

/** For the events of a chat that the page has. @type {ChatEventHandlers} */
const chatHandlers = {
  new_message: ({ message, read = true }, chat) => {
    const { sender_id, n, content, deleted } = message;
    const here = chat === model.open;
    putMessage(chat, message, read);
    if (sender_id === myId() || chat.read_n >= n || deleted) return;
    if (here && chat.divider === null && !(isWatched() && pane.atEnd()))
      chat.divider = n - 1;
    const sender = personName(sender_id);
    const name = here ? sender : say("senderIn", { name: sender, title: chatTitle(chat) });
    const text = visibleText(content).slice(0, 200);
    if (here || counted(chat)) announce(say("lastOf", { name, text }));
    if (counted(chat)) notify(chat, message);
  },
  message_edited: ({ message }, chat) => onChange(chat, message),
  message_deleted: ({ message }, chat) => onChange(chat, message),
  message_read: ({ read_by, n }, chat) => moveReadMark(chat, read_by, n),
  chat_renamed: (event, chat) => {
    chat.title = event.title;
    addLine(chat, event.user_id ? "renamed" : "nowCalled", event);
  },
  member_added: (event, chat) => {
    const { user_id, name } = event;
    model.names.set(user_id, name);
    addLine(chat, "joined", event);
    if (chat.members.has(user_id)) return;
    if (isWhole(chat)) chat.members.set(user_id, chat.last_n);
    chat.memberCount += 1;
    if (chat === model.open && dialog("info").open)
      void loadMembers({ ids: [user_id] });
  },
  member_removed: (event, chat) => {
    const { user_id } = event;
    if (user_id === myId()) {
      toast(say("noLonger", { title: chatTitle(chat) }));
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
function contains({ messages, last_message }, id) {
  return [...messages, last_message].some((message) => message?.id === id);
}

/** @param {Delivery} delivery of an edit or a deletion */
function onChangeDelivery(delivery) {
  const { state, client_id, message_id, message, code } = delivery;
  const chat = message && model.chats.get(message.chat_id);
  if (chat) onChange(chat, message);
  if (state !== "failed") return;
  const text = say(NOT_DONE[delivery.kind], { text: failureText(delivery) });
  if (model.open && contains(model.open, message_id)) return announce(text);
  toast(text);
  if (code === "not_found") model.client?.discard(client_id); // no row can show it
}

/** Until it succeeds or the user changes. */
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
 * Reading. A message is read once it has been on the screen, in a visible tab of the
 * window that has the focus.
 * ---------------------------------------------------------------------------------- */

function isWatched() {
  return document.visibilityState === "visible" && document.hasFocus();
}

function markSeen() {
  const chat = model.open;
  if (!chat || !isWatched() || unread(chat) === 0) return;
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
  const { before, after, around } = where;
  if (!client || chat.loading === "yes") return;
  chat.loading = "yes";
  requestRender();
  try {
    const { messages } = await client.history(chat.id, { limit: 50, ...where });
    if (!before && !after) {
      // What was loaded before may be old, but not what came meanwhile.
      chat.messages = around ? [] : chat.messages.filter(({ n }) => n > last_n);
      chat.loaded = true;
    }
    merge(chat, messages);
    const newest = chat.messages.at(-1)?.n ?? 0;
    if (after || around) chat.moreAfter = messages.length > 0 && newest < chat.last_n;
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
  if (gone) location.replace(`#chat/${chat.id}`);
  else if (!chat.loaded) return; // the user can try again
  pane.goTo = gone ? "start" : "stay";
  chat.loading = "no";
}

/** @param {ChatView} chat */
function retryLoading(chat) {
  if (chat.loading === "failed") chat.loading = "no";
  requestRender();
}

/* -------------------------------------------------------------------------------------
 * Top and lists. Connection, bell, banner, chats.
 * ---------------------------------------------------------------------------------- */

/**
 * Renders once for all changes of this frame. A hidden tab has no frames: use a timer.
 */
function requestRender() {
  if (renderRequested) return;
  renderRequested = true;
  if (document.visibilityState === "hidden") after(0, render);
  else requestAnimationFrame(render);
}
let renderRequested = false;

function render() {
  renderRequested = false;
  if (!model.session) return;
  renderTop();
  renderBanner();
  renderList();
  renderBell();
  renderEmpty();
  if (dialog("people").open) renderPeople();
  if (dialog("info").open) renderInfo();
  pane.render();
  search.render();
  if (!menuAnchor?.isConnected && box("menu").contains(document.activeElement)) {
    box("menu").hidePopover();
    box("scroller").focus({ preventScroll: true });
  }
  markSeen();
  if (model.chatsLoaded) loading = false;
}

function renderTop() {
  const { connection } = model;
  const closed = connection === "closed" || connection === "signed_out";
  const state = closed ? "connecting" : connection;
  const total = [...model.chats.values()].reduce((sum, chat) => sum + counted(chat), 0);
  const elsewhere = total - (model.open ? counted(model.open) : 0);
  const me = personName(myId());
  setText("connection-text", say(state));
  box("connection").dataset["state"] = state;
  setText("me-name", me);
  setText("me-panel-name", say("signedInAs", { name: me }));
  fillAvatar(box("me-avatar"), hueOf(myId()), me);
  showBadge("bell-count", total);
  showBadge("back-count", elsewhere);
  setText("bell-label", total ? say("newCount", { count: total }) : say("noneNew"));
  const more = elsewhere ? `, ${say("newCount", { count: elsewhere })}` : "";
  setText("back-label", say("back") + more);
  showTitle(model.open ? chatTitle(model.open) : "", total);
  button("rename-me").hidden = !model.server.rename;
}

/** @param {number} count */
const badgeText = (count) => (count > 99 ? "99+" : String(count));

/** @param {string} id @param {number} count */
function showBadge(id, count) {
  setText(id, badgeText(count));
  box(id).hidden = count === 0;
}

let shownTitle = "";

/**
 * The icons of the tab and of an installed app say, too, that messages are new.
 * @param {string} place @param {number} [total]
 */
function showTitle(place, total = 0) {
  const title = (total ? `(${total}) ` : "") + (place && `${place} · `) + "chatd";
  if (title === shownTitle) return;
  document.title = shownTitle = title;
  const icon = byId("tab-icon", HTMLLinkElement);
  icon.href = total ? "web/icon-new.svg" : "web/icon.svg";
  navigator.setAppBadge?.(total).catch(() => {}); // the title says it anyway
}

/**
 * Writes only if the text has changed, so that screen readers do not read it again.
 * @param {string} id
 * @param {string} text
 */
function setText(id, text) {
  const node = box(id);
  if (node.textContent !== text) node.textContent = text;
}

/** @type {Partial<Record<State, Key>>} */
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
  button("banner-retry").hidden = state === "refused";
}

function renderList() {
  const rows = sortedChats().map((chat) => chatRow(chat, chat === model.open));
  showRows(box("chat-list"), rows);
}

/** What to do while no chat is open. */
function renderEmpty() {
  const { create_chats, invites } = model.server;
  const start = model.chats.size === 0 && model.chatsLoaded && create_chats;
  setText("empty-text", emptyText());
  button("empty-start").hidden = !start;
  button("new-chat").hidden = !create_chats || start === true;
  setText("empty-start", say(invites ? "invitePeople" : "newChat"));
}

function emptyText() {
  const { create_chats, invites } = model.server;
  if (model.chats.size > 0) return say("chooseChat");
  if (!model.chatsLoaded || create_chats === undefined) return say("loading");
  const start = invites ? "startInvite" : "startChat";
  const name = personName(myId());
  return `${say("noChats")} ${say(create_chats ? start : "waitForChat", { name })}`;
}

/** @param {ChatView} chat @param {boolean} current @returns {Row} */
function chatRow(chat, current) {
  const title = chatTitle(chat);
  const last = lastLine(chat, current);
  const stored = last.kind !== "failed" && last.kind !== "sending";
  const when =
    stored && chat.last_message ? shortTime(chat.last_message.created_at) : "";
  const count = unread(chat);
  const muted = isMuted(chat);
  return {
    key: String(chat.id),
    look: JSON.stringify([title, last, when, count, current, muted]),
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
          el(
            "span",
            { class: "row-time" },
            muted ? icon("muted") : null,
            muted ? el("span", { class: "sr-only" }, say("muted")) : null,
            when,
          ),
          el(
            "span",
            { class: `row-last is-${last.kind}`, dir: "auto" },
            last.kind === "sending" ? icon("sending") : null,
            last.kind === "sending"
              ? el("span", { class: "sr-only" }, say("sending"))
              : null,
            last.text,
          ),
          count ? badge(count, muted) : null,
        ),
      ),
  };
}

/**
 * What a row says of its chat: a message that was not sent comes before anything else.
 * @param {ChatView} chat
 * @param {boolean} current
 * @returns {{kind: string, text: string}} the kind is a part of a class in style.css
 */
function lastLine(chat, current) {
  const changes = (model.client?.unsentChanges() ?? []).filter(({ message_id }) =>
    contains(chat, message_id),
  );
  const unsent = [...changes, ...notYetStored(chat)];
  const failed = unsent.filter(({ state }) => state === "failed").at(-1);
  if (failed) {
    const text = excerpt(failed.content || failureText(failed));
    return { kind: "failed", text: say(NOT_DONE[failed.kind], { text }) };
  }
  const typing = typingText(chat);
  if (typing) return { kind: "typing", text: typing };
  const waiting = unsent.at(-1);
  if (waiting) {
    const text = excerpt(waiting.content || say("deleted"));
    return { kind: "sending", text: say("ownLast", { text }) };
  }
  const draft = current || unread(chat) > 0 ? "" : drafts.get(chat.id);
  if (!isBlank(draft))
    return { kind: "draft", text: say("draft", { text: excerpt(draft) }) };
  return { kind: "message", text: lastMessageText(chat) };
}

/** @param {ChatView} chat */
function lastMessageText(chat) {
  const message = chat.last_message;
  if (!message) return say("noMessages");
  const { content, deleted } = shown(message);
  const text = deleted ? say("deleted") : excerpt(content);
  if (message.sender_id === myId()) return say("ownLast", { text });
  const [name = ""] = personName(message.sender_id).split(" ");
  return chat.memberCount > 2 ? say("lastOf", { name, text }) : text;
}

/** @param {string} content */
function excerpt(content) {
  return visibleText(content).trim().slice(0, 120);
}

/** @param {number} count @param {boolean} muted */
function badge(count, muted) {
  return el(
    "span",
    { class: classes("badge", { muted }) },
    badgeText(count),
    el("span", { class: "sr-only" }, ` ${say("unread")}`),
  );
}

/** @param {ChatView} chat @param {HTMLElement} [node] */
function avatar(chat, node = el("span", { class: "avatar", "aria-hidden": "true" })) {
  const [first = myId(), second] = others(chat);
  const direct = !chat.title && second === undefined;
  const hue = direct ? hueOf(first, chat) : hueOf(chat.id);
  return fillAvatar(node, hue, chatTitle(chat));
}

/** So many colours of people can be told apart. */
const HUES = 12;

/**
 * Of two members with the same colour, the one met later takes the next free one.
 * @param {number} id @param {ChatView} [chat]
 */
function hueOf(id, chat) {
  let hue = chat?.hues.get(id) ?? ((id % HUES) * 5) % HUES;
  if (!chat || chat.hues.has(id)) return hue;
  const taken = new Set(chat.hues.values());
  while (taken.has(hue) && taken.size < HUES) hue = (hue + 1) % HUES;
  chat.hues.set(id, hue);
  return hue;
}

/** @param {HTMLElement} node @param {number} hue */
function paint(node, hue) {
  node.style.setProperty("--hue", String((hue * 360) / HUES));
  return node;
}

/** @param {HTMLElement} node @param {number} hue @param {string} name */
function fillAvatar(node, hue, name) {
  const words = name.split(/\s+/).map((word) => word.replace(/[^\p{L}\p{N}]/gu, ""));
  const letters = words
    .filter(Boolean)
    .slice(0, 2)
    .map((word) => [...word][0] ?? "");
  node.textContent = letters.join("").toUpperCase() || "?";
  return paint(node, hue);
}

function renderBell() {
  const rows = sortedChats()
    .filter(counted)
    .map((chat) => chatRow(chat, false));
  showRows(box("bell-list"), rows);
  box("bell-empty").hidden = rows.length > 0;
  // Phones allow notifications only from service workers, and chatd has none.
  const phone = matchMedia("(pointer: coarse)").matches;
  const permission = phone ? "" : window.Notification?.permission;
  button("notify").hidden = permission !== "default";
  box("notify-denied").hidden = permission !== "denied";
}

/* -------------------------------------------------------------------------------------
 * The open chat. The most important rule: only the user moves the messages that the
 * user reads, neither a render nor a new size of the window or the composer. If the end
 * was visible before, it is visible afterwards.
 *
 * A browser reports a move of the scroller without its reason. So the pane remembers
 * the sizes. If they are the same, the user has scrolled. If not, the browser has, and
 * the pane scrolls back.
 * ---------------------------------------------------------------------------------- */

/** Older or newer messages are fetched when the place is less than this many pixels away. */
const HISTORY_MARGIN = 500;
/** A message counts as seen when this many pixels of it are on the screen. */
const SEEN_PIXELS = 24;

const pane = {
  /** A message's id, or "start": the first new message or else the end.
   * @type {"stay" | "start" | number} */
  goTo: "stay",
  /** The message that the address names. @type {string | undefined} */
  at: undefined,
  /** The end is visible and stays visible. */
  follow: true,
  /** The newest n that was drawn. A message after it appears with a small animation. */
  drawn: Infinity,
  /** The long messages that the user has unfolded, as keys of rows. */
  unfolded: new Set(),
  /** The sizes when the position was last right. */
  sizes: "",
  /** The row at the top of the view, and how far below the top it begins. */
  anchor: { key: "", id: 0, top: 0 },

  /** Whether the chat's end is visible. */
  atEnd() {
    return !model.open?.moreAfter && below("scroller") < END_MARGIN;
  },

  scrollToEnd() {
    this.follow = true;
    this.restore();
  },

  currentSizes() {
    const { scrollHeight, clientHeight, clientWidth } = box("scroller");
    return `${clientWidth} ${clientHeight} ${scrollHeight}`;
  },

  /** Notes what is where, so that restore can put it there again. */
  remember() {
    this.hidePastDays();
    this.sizes = this.currentSizes();
    if (this.follow) return;
    const view = box("scroller").getBoundingClientRect();
    const row = this.firstVisible(view.top);
    if (row)
      this.anchor = {
        key: row.dataset["key"] ?? "",
        id: Number(row.dataset["id"]),
        top: row.getBoundingClientRect().top - view.top,
      };
  },

  /** Of the days that stick to the top, only the last is visible. */
  hidePastDays() {
    let next = Infinity;
    for (const day of [...box("messages").querySelectorAll(".day")].reverse()) {
      const { top, bottom } = day.getBoundingClientRect();
      day.classList.toggle("past", next < bottom);
      next = top;
    }
  },

  /** Shows the end again, or else the first visible row where it was. */
  restore() {
    const scroller = box("scroller");
    if (scroller.clientHeight === 0) return; // it is not on the screen
    if (this.follow) {
      scroller.scrollTop = scroller.scrollHeight;
    } else {
      const row = rowsOf("messages").find(
        ({ dataset }) => dataset["key"] === this.anchor.key,
      );
      const top = scroller.getBoundingClientRect().top + this.anchor.top;
      if (row) this.scrollBy(row.getBoundingClientRect().top - top);
    }
    this.remember();
  },

  /**
   * The last message that counts as seen.
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
    composer.showMode(chat);
    showRows(box("messages"), messageRows(chat));
    this.showFolds();
    this.restore();
    this.drawn = chat.messages.at(-1)?.n ?? this.drawn;
    this.go(chat);
    this.renderJump(chat);
    setText("typing", typingText(chat));
    this.loadMore(chat);
  },

  /** @param {ChatView} chat */
  renderHead(chat) {
    const people = others(chat);
    const names = isWhole(chat)
      ? [...people.map(personName), say("you")].join(", ")
      : say("people", { count: chat.memberCount });
    setText("pane-title", chatTitle(chat));
    setText("pane-members", chat.direct ? say("directChat") : names);
    avatar(chat, box("pane-avatar"));
  },

  /**
   * Does nothing below one pixel: any write to scrollTop stops a touch scroll.
   * @param {number} pixels
   */
  scrollBy(pixels) {
    if (Math.abs(pixels) >= 1) box("scroller").scrollTop += pixels;
  },

  /** @param {number} top of the view */
  firstVisible(top) {
    return rowsOf("messages").find(
      (row) => row.dataset["n"] && row.getBoundingClientRect().bottom > top,
    );
  },

  /** A long message that is folded, or was, has a button to unfold or fold it. */
  showFolds() {
    for (const row of box("messages").querySelectorAll(".long")) {
      const content = row.querySelector(".content");
      const fold = row.querySelector(".fold");
      if (!content || !(fold instanceof HTMLElement)) continue;
      const cut = content.scrollHeight > content.clientHeight + 1;
      fold.hidden = !cut && !row.classList.contains("unfolded");
    }
  },

  /** Loads what the user wants to see, and goes there. @param {ChatView} chat */
  go(chat) {
    const { goTo, follow, anchor } = this;
    const id = Number(goTo) || (goTo === "stay" && !follow ? anchor.id : 0);
    const there = id ? chat.messages.some((one) => one.id === id) : !chat.moreAfter;
    if (!chat.loaded || !there) {
      if (chat.loading !== "no") return;
      // The shown messages stay until the answer, unless a hole follows them.
      if (!id && chat.moreAfter)
        Object.assign(chat, { messages: [], loaded: false, moreAfter: false });
      return void loadHistory(chat, id ? { around: id } : {});
    }
    if (goTo === "stay") return;
    this.goTo = "stay";
    const target = goTo === "start" ? ".divider" : `[data-id="${id}"]`;
    /** @type {HTMLElement | null} */
    const row = box("messages").querySelector(target);
    if (!row) return this.scrollToEnd();
    // scrollIntoView could also scroll the page itself.
    const scroller = box("scroller");
    const { top, height } = scroller.getBoundingClientRect();
    // On a low screen there is room for the new message only.
    const above = Math.max(0, Math.min(height / 3, height - 150));
    scroller.scrollTop += row.getBoundingClientRect().top - top - above;
    this.follow = this.atEnd();
    this.remember();
    if (goTo === "start") return;
    row.tabIndex = -1;
    row.focus({ preventScroll: true });
  },

  /** Shows the newest messages. The address names no older one any more. */
  showLatest() {
    if (this.at) location.hash = `#chat/${model.open?.id}`;
    else this.scrollToEnd();
  },

  /** @param {ChatView} chat */
  renderJump(chat) {
    const count = unread(chat);
    button("jump").hidden = this.atEnd();
    setText("jump-text", count ? say("newCount", { count }) : say("latest"));
  },

  /** Loads older or newer messages if their place is near. @param {ChatView} chat */
  loadMore(chat) {
    const { clientHeight, scrollTop } = box("scroller");
    if (clientHeight === 0 || !chat.loaded || chat.loading !== "no") return;
    const [first, last] = [chat.messages[0], chat.messages.at(-1)];
    if (first && chat.more && scrollTop < HISTORY_MARGIN)
      void loadHistory(chat, { before: first.id });
    else if (last && chat.moreAfter && below("scroller") < HISTORY_MARGIN)
      void loadHistory(chat, { after: last.id });
  },

  onScroll() {
    const { open } = model;
    if (!open) return;
    if (this.sizes !== this.currentSizes()) return this.onResize();
    this.follow = this.atEnd();
    this.remember();
    this.renderJump(open);
    this.loadMore(open);
    markSeen();
  },

  /** The window, the composer, the messages or a font has another size. */
  onResize() {
    this.showFolds();
    this.restore();
    if (model.open) this.renderJump(model.open);
    markSeen();
  },
};

/** @param {ChatView} chat @returns {string} "": no one is typing */
function typingText(chat) {
  const [name, other, ...more] = [...chat.typing.keys()].map(personName);
  if (!name) return "";
  if (more.length > 0) return say("manyTyping");
  return other ? say("twoTyping", { name, other }) : say("typing", { name });
}

/**
 * The rows of the open chat, from top to bottom.
 * @param {ChatView} chat
 * @returns {Row[]}
 */
function messageRows(chat) {
  const linesAfter = (/** @type {number} */ after) =>
    chat.lines.filter(({ n }) => n === after).map(({ seq, text }) => ({
      key: `line ${seq}`,
      look: text(),
      build: () => el("li", { class: "history line" }, text()),
    }));
  let lines = linesAfter((chat.messages[0]?.n ?? 1) - 1);
  /** @type {Row[]} */
  const rows = [historyRow(chat, "older", chat.more), ...lines];
  /** @type {Message | null} */
  let before = null;
  for (const message of chat.messages) {
    const newDay =
      !before || dayName(before.created_at) !== dayName(message.created_at);
    const newPart = chat.divider !== null && message.n === chat.divider + 1;
    if (newDay) rows.push(dayRow(message));
    if (newPart) rows.push(DIVIDER_ROW);
    const apart = newDay || newPart || lines.length > 0;
    const first = apart || !before || !sameGroup(before, message);
    lines = linesAfter(message.n);
    rows.push(messageRow(chat, message, first), ...lines);
    before = message;
  }
  if (chat.moreAfter) return [...rows, historyRow(chat, "newer", true)];
  const unsent = notYetStored(chat);
  const startsGroup = lines.length > 0 || before?.sender_id !== myId();
  return [
    ...rows,
    ...unsent.map((delivery, i) => {
      const message = { ...delivery, id: 0, n: 0, sender_id: myId(), created_at: "" };
      return messageRow(chat, message, startsGroup && i === 0, delivery);
    }),
  ];
}

/**
 * The unsent messages that are not among the chat's messages. A message can be in both
 * lists for a moment: after its answer was lost, or when another tab has sent it.
 * @param {ChatView} chat
 */
function notYetStored(chat) {
  const own = chat.messages.filter(({ sender_id }) => sender_id === myId());
  const stored = new Set(own.map(({ client_id }) => client_id));
  const unsent = model.client?.unsent(chat.id) ?? [];
  return unsent.filter(({ client_id }) => !stored.has(client_id));
}

/**
 * The beginning of the chat, or the state of loading.
 * @param {ChatView} chat @param {string} key @param {boolean} more @returns {Row}
 */
function historyRow(chat, key, more) {
  const look = chat.loading === "no" ? (more ? "more" : "start") : chat.loading;
  const text = { more: "", yes: say("loading"), failed: say("notLoaded") };
  return {
    key,
    look: `${look} ${chat.last_n > 0}`,
    build: () => {
      if (look === "start") {
        return el(
          "li",
          { class: "history" },
          chat.last_n > 0 ? say("beginning") : say("noMessages"),
        );
      }
      const row = el("li", { class: "history" }, text[look]);
      if (look === "failed")
        row.append(
          " ",
          textButton(say("tryAgain"), () => retryLoading(chat)),
        );
      return row;
    },
  };
}

/** @param {Message} message @returns {Row} */
function dayRow({ created_at, n }) {
  const name = dayName(created_at);
  return {
    key: `day ${n}`, // not the date: a clock that is set back repeats a day
    look: name,
    build: () => el("li", { class: "day" }, name),
  };
}

/** @type {Row} */
const DIVIDER_ROW = {
  key: "divider",
  look: "",
  build: () => el("li", { class: "divider" }, say("newMessages")),
};

/** Messages of one sender form a group if each follows within this time. */
const GROUP_SECONDS = 300;

/** @param {Message} a @param {Message} b */
function sameGroup(a, b) {
  const seconds = (Date.parse(b.created_at) - Date.parse(a.created_at)) / 1000;
  return a.sender_id === b.sender_id && seconds < GROUP_SECONDS;
}

/**
 * @param {ChatView} chat
 * @param {Message} message
 * @param {boolean} first of a group
 * @param {Delivery} [unsent] if the message is not stored yet
 * @returns {Row}
 */
function messageRow(chat, message, first, unsent) {
  const { id, n, rev } = message;
  const own = message.sender_id === myId();
  const name = personName(message.sender_id);
  const { change = unsent, content, deleted } = shown(message);
  const failed = change?.state === "failed";
  const tick = change ? unsentTick(change) : own ? tickOf(chat, n) : null;
  const arriving = n > pane.drawn && pane.follow && !own;
  const key = own && message.client_id ? `c ${message.client_id}` : `m ${id}`;
  const unfolded = pane.unfolded.has(key);
  const state = [tick, unfolded, formats.offset, held.has(id), change];
  return {
    key,
    look: JSON.stringify([n, rev, first, name, ...state]),
    build: () =>
      el(
        "li",
        {
          id: id ? `message-${id}` : null,
          class: classes("message", { own, first, arriving, failed }),
          "data-id": id || null,
          "data-n": n || null,
        },
        own ? null : personAvatar(message.sender_id, chat),
        el(
          "div",
          { class: "bubble" },
          paint(senderLine(own, first, name), hueOf(message.sender_id, chat)),
          flow(
            key,
            { content, deleted },
            held.has(id)
              ? textButton(say("undo"), () => release(id, true))
              : stamp(message, tick),
          ),
          failed ? failureLine(change) : null,
        ),
        id && !deleted ? moreButton(id) : null,
      ),
  };
}

/** Opens the message's menu: see openActions. @param {number} id */
function moreButton(id) {
  const label = { "aria-label": say("actions"), "aria-describedby": `message-${id}` };
  const attributes = { class: "icon-button more", type: "button", tabindex: -1 };
  return el("button", { ...attributes, ...label }, icon("more"));
}

/** A text below this size is never folded, so its height need not be measured. */
const SHORT_CHARACTERS = 600;
const SHORT_LINES = 20;

/**
 * A message's text and its stamp. A long text is folded until the user unfolds it.
 * @param {string} key of the row
 * @param {{content: string, deleted?: boolean}} message
 * @param {HTMLElement} stamp
 */
function flow(key, { content, deleted = false }, stamp) {
  const lines = content.split("\n", SHORT_LINES + 1).length;
  const long = content.length > SHORT_CHARACTERS || lines > SHORT_LINES;
  const unfolded = pane.unfolded.has(key);
  const fold = textButton(unfolded ? say("showLess") : say("showAll"), () => {
    if (unfolded) pane.unfolded.delete(key);
    else pane.unfolded.add(key);
    pane.follow = false; // the user reads on where the text was cut
    pane.remember();
    if (unfolded) Object.assign(pane.anchor, { key, top: 0 });
    requestRender();
  });
  fold.classList.add("fold");
  fold.setAttribute("aria-expanded", String(unfolded));
  return el(
    "div",
    { class: classes("flow", { long, unfolded: long && unfolded }) },
    deleted
      ? el("div", { class: "content blank" }, say("deleted"))
      : contentNode(content),
    long ? fold : null,
    stamp,
  );
}

/** @param {number} userId @param {ChatView} [chat] */
function personAvatar(userId, chat) {
  const node = el("span", { class: "avatar small", "aria-hidden": "true" });
  return fillAvatar(node, hueOf(userId, chat), personName(userId));
}

/**
 * The sender's name is visible above a group. Screen readers read it with each message.
 * @param {boolean} own
 * @param {boolean} first
 * @param {string} name
 */
function senderLine(own, first, name) {
  if (own) return el("p", { class: "sr-only" }, say("ownLast", { text: "" }));
  return el("p", { class: first ? "sender" : "sr-only", dir: "auto" }, name);
}

/** Who has read the user's message. @param {ChatView} chat @param {number} n */
function tickOf(chat, n) {
  const people = others(chat).length;
  const readers = others(chat).filter((id) => (chat.members.get(id) ?? 0) >= n).length;
  if (readers === 0) return { icon: "sent", text: say("sent") };
  if (readers < people) return { icon: "read", text: say("readBy", { readers, people }) };
  return { icon: "read", text: say("read"), className: "tick-read" };
}

/** @param {Delivery} delivery */
function unsentTick({ state }) {
  if (state === "failed") return { icon: "failed", text: say("notSent") };
  return { icon: "sending", text: say("sending") };
}

/** Whether the page can tell who has read a message. @param {ChatView} chat */
function knowsReaders(chat) {
  return !chat.direct && isWhole(chat) && others(chat).length > 0;
}

/** @param {ChatView} chat @param {Message} message */
function showReaders(chat, { n, sender_id }) {
  const ids = [...chat.members.keys()].filter((id) => id !== sender_id);
  const hasRead = (/** @type {number} */ id) => (chat.members.get(id) ?? 0) >= n;
  ids.sort((a, b) => Number(hasRead(b)) - Number(hasRead(a)));
  const note = (/** @type {number} */ id) => say(hasRead(id) ? "read" : "notYet");
  const row = (/** @type {number} */ id) =>
    el("li", { class: "person" }, ...personCells(id), el("span", { class: "quiet" }, note(id)));
  box("readers-list").replaceChildren(...ids.map(row));
  dialog("readers").showModal();
}

/** A click on a tick. @param {{target: Element}} event */
function onTick({ target }) {
  const { open } = model;
  const n = Number(target.closest(".own .stamp")?.closest("li")?.dataset["n"]);
  const message = open?.messages.find((one) => one.n === n);
  if (open && message && knowsReaders(open)) showReaders(open, message);
}

/** A copy is plain text; of one message, as it was written. @param {ClipboardEvent} event */
function onCopy(event) {
  const selection = getSelection();
  if (!selection || selection.isCollapsed) return;
  const range = selection.getRangeAt(0);
  const { commonAncestorContainer: node } = range;
  const parent = node instanceof Element ? node : node.parentElement;
  const copied = parent?.closest(".content") ? range : selection;
  event.clipboardData?.setData("text/plain", String(copied));
  event.preventDefault();
}

/**
 * @param {{created_at?: string, edited_at?: string, deleted?: boolean}} message
 * @param {{icon: string, text: string, className?: string} | null} tick
 */
function stamp({ created_at, edited_at, deleted }, tick) {
  return el(
    "span",
    { class: "stamp", title: tick?.text },
    edited_at && !deleted ? timeNode(edited_at, say("edited")) : null,
    created_at ? timeNode(created_at) : null,
    tick && icon(tick.icon, tick.className),
    tick && el("span", { class: "sr-only" }, tick.text),
  );
}

/** @param {string} at @param {string} [text] instead of the time */
function timeNode(at, text) {
  const date = new Date(at);
  const title = formats.moment.format(date);
  const spoken = text ? el("span", { class: "sr-only" }, ` ${title}`) : null;
  const attributes = { datetime: at, title };
  return el("time", attributes, text ?? formats.clock.format(date), spoken);
}

/** @type {Record<Delivery["kind"], import("./words.js").Key>} */
const NOT_DONE = { message: "notSentText", edit: "notSaved", delete: "notDeleted" };

/**
 * The user can edit a text that was refused, and repeat what may succeed later.
 * @param {Delivery} delivery
 */
function failureLine(delivery) {
  const { client_id, kind, code = "" } = delivery;
  const textIsWrong = ["bad_field", "too_large", "changed"].includes(code);
  const message = kind === "message";
  let repeat = null;
  if (textIsWrong) repeat = textButton(say("edit"), () => composer.edit(delivery));
  else if (message || code === "internal")
    repeat = textButton(say("tryAgain"), () => model.client?.resend(client_id));
  const discard = () => model.client?.discard(client_id);
  const text = say(NOT_DONE[kind], { text: failureText(delivery) });
  const last = textButton(say(message ? "delete" : "cancel"), discard);
  return el("p", { class: "failure" }, `${text} `, repeat, last);
}

/** Why it was not done. @param {Delivery} delivery @returns {string} */
function failureText({ kind, content, code = "", reason = "" }) {
  const most = maximumIn(reason) || model.maxCharacters;
  const over = countCharacters(content) - most;
  if ((code === "bad_field" || code === "too_large") && over > 0)
    return say("over", { count: over, most });
  if (kind === "message" && code === "not_found") return say("notAllowed");
  return refusalText(code, reason);
}

/** @param {string} text @param {() => void} press */
function textButton(text, press) {
  const node = el("button", { class: "text-button", type: "button" }, text);
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
    if (node.id !== "ask") node.close();
  box("messages").replaceChildren();
  pane.drawn = Infinity;
  pane.follow = true;
  pane.goTo = "start";
  pane.at = undefined;
  pane.unfolded.clear();
  composer.show(chat);
  if (!chat) return;
  chat.divider = unread(chat) > 0 ? chat.read_n : null;
  retryLoading(chat);
}

/** Opens a chat, also as the first thing of a visit. Back leads to the list. */
function openChat(/** @type {number} */ id) {
  if (!location.hash) history.replaceState(null, "", "#chats");
  location.hash = `#chat/${id}`;
}

/** The address says which chat is open, and perhaps at which message. */
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
  const mayMove = !before || document.activeElement !== document.body;
  if (before !== chat && !at && mayMove) {
    requestAnimationFrame(() => moveFocus(before));
  }
}

/**
 * Moves the focus into the open chat, or else to the row of the chat that was closed.
 * @param {ChatView | null} [before]
 */
function moveFocus(before) {
  /** @type {HTMLElement | null} */
  const target = model.open
    ? matchMedia("(pointer: fine)").matches
      ? composer.field
      : box("scroller")
    : box("chat-list").querySelector(`[href="#chat/${before?.id}"]`);
  (target ?? box("chats")).focus({ preventScroll: true });
}

/* -------------------------------------------------------------------------------------
 * Changing. An edit or a deletion waits like a message, and the row shows what will be.
 * A deletion is held for some seconds before, and can be undone.
 * ---------------------------------------------------------------------------------- */

/** Message id -> timer that sends its deletion. @type {Map<number, number>} */
const held = new Map();

/** The newest unsent change of a message. @param {number} id */
function changeOf(id) {
  const changes = model.client?.unsentChanges() ?? [];
  return changes.filter(({ message_id }) => message_id === id).at(-1);
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
function mayEdit({ sender_id, created_at, deleted }) {
  const { edit_seconds = 0 } = model.server;
  const left = Date.parse(created_at) + (edit_seconds ?? Infinity) * 1000 - Date.now();
  return sender_id === myId() && !deleted && left > 0;
}

/** A message of the open chat. @param {number} id */
function messageOf(id) {
  return model.open?.messages.find((message) => message.id === id);
}

/** Opens the menu of a message. @param {HTMLElement} row */
function openActions(row) {
  /** @type {HTMLElement | null} */
  const anchor = row.querySelector(".more");
  const chat = model.open;
  const message = messageOf(Number(row.dataset["id"]));
  if (!anchor || !chat || !message) return;
  const copy = { text: say("copy"), press: () => copyText(shown(message).content) };
  const edit = { text: say("edit"), press: () => composer.change(message) };
  const remove = { text: say("delete"), press: () => hold(message.id), danger: true };
  const owner = !chat.direct && chat.created_by === myId() && !message.deleted;
  const readers = { text: say("readers"), press: () => showReaders(chat, message) };
  const editable = mayEdit(message);
  showMenu(anchor, [
    copy,
    ...(editable ? [edit] : []),
    ...(message.sender_id === myId() && knowsReaders(chat) ? [readers] : []),
    ...(editable || owner ? [remove] : []),
  ]);
}

const LONG_TOUCH_SECONDS = 0.5;
let longTouch = 0;

/** The browser has a menu of its own for a link. @param {PointerEvent} event */
function isTouchOfText({ pointerType, target }) {
  return pointerType === "touch" && !(/** @type {Element} */ (target).closest("a, button"));
}

/** iOS reports no long touch. @param {PointerEvent & {target: Element}} event */
function onTouch(event) {
  clearTimeout(longTouch);
  const row = event.target.closest("li");
  if (!row || !isTouchOfText(event)) return;
  longTouch = after(LONG_TOUCH_SECONDS, () => {
    openActions(row);
    // Or else the menu would close when the finger is lifted outside of it.
    box("menu").setPointerCapture(event.pointerId);
  });
}

/** Up and down move between the messages. @param {KeyboardEvent} event */
function onMessagesKey(event) {
  const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  /** @type {NodeListOf<HTMLElement>} */
  const found = box("messages").querySelectorAll(".more");
  const all = [...found];
  const end = box("scroller").getBoundingClientRect().bottom;
  const visible = all.filter((node) => node.getBoundingClientRect().bottom <= end);
  const at = all.findIndex((node) => node === document.activeElement);
  const next = at < 0 ? visible.at(-1) : all[at + (step ?? 0)];
  if (!step || !next) return;
  event.preventDefault();
  next.focus();
}

const UNDO_SECONDS = 5;

/** @param {number} id */
function hold(id) {
  if (model.open?.editing?.id === id) composer.leave();
  const timer = after(UNDO_SECONDS, () => release(id));
  held.set(id, timer);
  requestRender();
}

/** @param {number} id @param {boolean} [undo] */
function release(id, undo) {
  clearTimeout(held.get(id));
  held.delete(id);
  if (!undo) model.client?.deleteMessage(id);
  requestRender();
}

/** Nothing can be undone where the user does not see it. */
function releaseAll() {
  for (const id of held.keys()) release(id);
}

/** @param {string} text */
function copyText(text) {
  const { activeElement } = document;
  const node = el("textarea", {}, text); // navigator.clipboard would need https
  document.body.append(node);
  node.select();
  toast(say(document.execCommand("copy") ? "copied" : "notCopied"));
  node.remove();
  if (activeElement instanceof HTMLElement) activeElement.focus();
}

/* -------------------------------------------------------------------------------------
 * Drafts (drafts.js) survive a reload, the end of the session and a sign-out in any tab;
 * the panel of the account shows how many there are, and deletes them.
 * ---------------------------------------------------------------------------------- */

const drafts = new Drafts(attempt(() => localStorage) ?? null, myId);

/** @param {StorageEvent} event */
function onDraftElsewhere(event) {
  const shown = composer.field.value;
  const text = drafts.follow(event, model.open ? composer.draftId(model.open) : 0, shown);
  if (text !== shown) composer.setText(text);
  requestRender();
}

function showDrafts() {
  const count = drafts.keys().length;
  box("drafts").hidden = count === 0;
  setText("drafts-text", say("draftsHere", { count }));
}

async function onDeleteDrafts() {
  const text = say("draftsHere", { count: drafts.keys().length });
  if (!(await ask(say("deleteDrafts"), text, say("delete")))) return;
  for (const key of drafts.keys()) drafts.set(Number(key.split(".").at(-1)), "");
  composer.show(model.open);
  requestRender();
}

/* -------------------------------------------------------------------------------------
 * Writing. The composer owns its field: the text, the height, the draft, the counter,
 * what Enter means, and sending. Nothing else writes to the field.
 * ---------------------------------------------------------------------------------- */

/** The composer counts from this part of the longest message on. */
const COUNT_FROM = 0.9;

const composer = {
  field: byId("composer-text", HTMLTextAreaElement),

  /** An edit has a draft of its own. @param {ChatView} chat */
  draftId({ id, editing }) {
    return editing ? -editing.id : id;
  },

  /** Shows the draft of a chat. @param {ChatView | null} chat */
  show(chat) {
    drafts.prune();
    const draft = chat && drafts.get(this.draftId(chat));
    this.setText(draft || (chat?.editing?.content ?? ""));
  },

  /** Says what the field is for. @param {ChatView} chat */
  showMode({ editing }) {
    box("edit-bar").hidden = !editing;
    button("send").ariaLabel = say(editing ? "save" : "send");
    if (!editing) return;
    const now = shown(messageOf(editing.id) ?? editing);
    const changed = now.content === editing.content ? "" : say("wasChanged");
    const news = now.deleted ? say("wasDeleted") : changed;
    setText("edit-text", `${say("editing")} ${news}`);
  },

  /** @param {string} text */
  setText(text) {
    this.field.value = text;
    this.fit();
  },

  /**
   * Gives style.css a copy of the text, which makes the field as high as its text. (To
   * measure the field, it would have to become low first: that moves the messages.)
   * Counts the characters when there is little room left.
   */
  fit() {
    box("composer-box").dataset["text"] = this.field.value;
    const used = countCharacters(sendable(this.field.value));
    const most = model.maxCharacters;
    const over = used > most;
    const text = over ? say("over", { count: used - most, most }) : say("used", { used, most });
    setText("composer-count", used < COUNT_FROM * most ? "" : text);
    box("composer-count").classList.toggle("over", over);
  },

  onInput() {
    this.fit();
    if (!model.open) return;
    const { editing, id } = model.open;
    const { value } = this.field;
    drafts.set(this.draftId(model.open), value === editing?.content ? "" : value);
    if (!editing) model.client?.sendTyping(id, !isBlank(value));
  },

  /**
   * Enter sends the message. With Shift, or on a touch keyboard, it begins a new line.
   * @param {KeyboardEvent} event
   */
  onKey(event) {
    if (isComposing(event)) return;
    const enter = event.key === "Enter" && !event.shiftKey;
    if (enter && !matchMedia("(pointer: coarse)").matches) return this.send(event);
    const { editing = null, messages = [] } = model.open ?? {};
    if (event.key === "Escape" && editing) this.leave();
    if (event.key !== "ArrowUp" || editing || this.field.value) return;
    const last = messages.filter((one) => mayEdit(one) && !shown(one).deleted).at(-1);
    if (!last) return;
    event.preventDefault();
    this.change(last);
  },

  /** @param {Event} event */
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
    if (model.client) drafts.send(model.client, chat.id, content);
    this.setText("");
    pane.showLatest();
    requestRender();
  },

  /** Takes a message, or its failed edit, into the field. @param {Message} message */
  change(message) {
    const chat = model.open;
    if (!chat) return;
    let { content } = message;
    const change = changeOf(message.id);
    if (change?.state === "failed") {
      if (change.content) drafts.set(-message.id, change.content);
      model.client?.discard(change.client_id);
    } else if (change) content = change.content;
    chat.editing = { ...message, content };
    this.show(chat);
    this.field.focus();
    requestRender();
  },

  /** @param {Message} before what is edited @param {string} content */
  async save(before, content) {
    const { id } = before;
    if (isBlank(content)) {
      if (await ask(say("deleteTitle"), "", say("delete"))) hold(id);
      return;
    }
    // The user's edit before this one may have been stored meanwhile.
    const now = messageOf(id);
    const { rev = id } = now?.content === before.content ? now : before;
    if (content !== sendable(before.content))
      model.client?.editMessage(id, content, { ifRev: rev });
    this.leave();
  },

  /** Ends an edit and shows the draft again. */
  leave() {
    const chat = model.open;
    if (!chat?.editing) return;
    drafts.set(-chat.editing.id, "");
    chat.editing = null;
    this.show(chat);
    this.field.focus();
    requestRender();
  },

  /** Takes a refused text back into the field. @param {Delivery} delivery */
  edit(delivery) {
    const message = messageOf(delivery.message_id);
    if (message) return this.change(message);
    if (model.open?.editing || !isBlank(this.field.value)) {
      toast(say("writingAnother"));
    } else if (model.client) {
      drafts.takeBack(model.client, delivery);
      this.setText(delivery.content);
    }
    this.field.focus();
  },
};

/** All control characters but tab, line feed and carriage return. */
const CONTROL_CHARACTERS = /[\0-\x08\x0b\x0c\x0e-\x1f\x7f]/g;

/**
 * The text as it is sent: without the control characters of a terminal, empty lines
 * before it and white space after it. The first line keeps its indent.
 * @param {string} text
 */
function sendable(text) {
  const clean = text.replace(CONTROL_CHARACTERS, "").trimEnd();
  return clean.replace(/^\s*\n/, "");
}

/**
 * Whether a key belongs to an input method. Safari reports the Enter that ends a
 * composition after its end, with the key code 229.
 * @param {KeyboardEvent} event
 */
function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

/* -------------------------------------------------------------------------------------
 * Search. Each request looks back for a moment. A render lets the search go on while
 * the end of the list is on the screen.
 * ---------------------------------------------------------------------------------- */

/** A search begins when the user has paused for this long. */
const SEARCH_PAUSE_SECONDS = 0.3;

const search = {
  q: "",
  /** 0: in all chats */
  chatId: 0,
  /** @type {Message[]} */
  found: [],
  /** It goes on before this id; null: no further. @type {number | null | undefined} */
  before: null,
  busy: false,
  error: "",
  timer: 0,
  running: new AbortController(),

  /** @param {boolean} here in the open chat */
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
    this.running = new AbortController();
    Object.assign(this, { q, chatId, found: [], before: q ? undefined : null });
    this.retry(SEARCH_PAUSE_SECONDS);
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
      const where = chatId ? { chatId } : {};
      const what = { q, before: before ?? null, ...where };
      const answer = await model.client?.search(what, signal);
      if (signal.aborted || !answer) return;
      this.found.push(...answer.messages);
      this.before = answer.before;
      for (const chat of model.chats.values()) {
        const here = answer.messages.filter(({ chat_id }) => chat_id === chat.id);
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

  render() {
    if (!dialog("search").open) return;
    const { q, chatId, before, error } = this;
    const { open, chats } = model;
    box("search-scope").hidden = !open;
    const called = sortedChats().filter((chat) => !chatId && isCalled(chat, q));
    const found = this.found.filter((one) => !one.deleted && chats.has(one.chat_id));
    showRows(box("search-list"), [
      ...called.slice(0, 5).map((chat) => chatRow(chat, false)),
      ...found.map((message) => this.row(message)),
    ]);
    if (below("search-list") < END_MARGIN) void this.goOn();
    const count = found.length;
    const result = count ? say("found", { count }) : say("foundNothing");
    const text = error || (this.busy ? say("searching") : result);
    box("search-status").setAttribute("aria-busy", String(this.busy)); // not read out
    setText("search-status", q && `${text} ${before ? this.searchedBack(before) : ""}`);
    button("search-retry").hidden = !error;
  },

  /** An answer says only the id up to which it has looked. @param {number} before */
  searchedBack(before) {
    const last = sortedChats().flatMap((chat) => chat.last_message ?? []);
    const later = [...this.found, ...last].filter(({ id }) => id >= before);
    const [when] = later.map(({ created_at }) => created_at).sort();
    return when ? say("searchedBack", { when: shortTime(when) }) : "";
  },

  /** @param {Message} message @returns {Row} */
  row({ id, chat_id, sender_id, created_at, content, rev }) {
    const { q, chatId } = this;
    const chat = model.chats.get(chat_id);
    const name = personName(sender_id);
    const names = [...new Set([name, chat && !chatId ? chatTitle(chat) : name])];
    const when = shortTime(created_at);
    const text = () => markedNode(visibleText(content), q);
    const bdi = (/** @type {string} */ one) => el("bdi", {}, one);
    return {
      key: `m ${id}`,
      look: JSON.stringify([names, when, rev, q]),
      build: () =>
        el(
          "li",
          {},
          el(
            "a",
            { class: "row found", href: `#chat/${chat_id}/${id}` },
            personAvatar(sender_id),
            el("span", { class: "row-title" }, ...names.map(bdi)),
            el("span", { class: "row-time" }, when),
            el("span", { class: "row-last", dir: "auto" }, text()),
          ),
        ),
    };
  },

  /** @param {KeyboardEvent} event */
  onKey(event) {
    /** @type {HTMLElement[]} */
    const stops = [field("search-text"), ...box("search-list").querySelectorAll("a")];
    const at = stops.findIndex((node) => node === document.activeElement);
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) stops[at + step]?.focus();
    else if (event.key !== "Enter" || at !== 0 || isComposing(event)) return;
    else stops[1]?.click();
    event.preventDefault();
  },

  /** The address may have been the same before. @param {Event} event */
  onClick({ target, currentTarget }) {
    if (target === currentTarget) return;
    dialog("search").close();
    pane.at = undefined;
    after(0, route);
  },
};

/** @param {ChatView} chat @param {string} q */
function isCalled(chat, q) {
  const names = others(chat).map(personName);
  return folded([chatTitle(chat), ...names].join()).includes(folded(q));
}

/** @param {KeyboardEvent} event */
function onSearchKey(event) {
  const { key, code, ctrlKey, metaKey, shiftKey, altKey } = event;
  const isCommand = (ctrlKey || metaKey) && !shiftKey && !altKey;
  if (!isCommand || (key !== "k" && code !== "KeyK") || box("chat").hidden) return;
  event.preventDefault();
  if (!document.querySelector("dialog[open]:not(#search)")) search.open(false);
}

/* -------------------------------------------------------------------------------------
 * Dialogs.
 * ---------------------------------------------------------------------------------- */

/**
 * Asks a question or, with a value, for a text. To close the dialog means no.
 * @param {string} title @param {string} text @param {string} [yes] @param {string} [no]
 * @param {string} [value] @returns {Promise<boolean>}
 */
function ask(title, text, yes = title, no = say("cancel"), value) {
  const node = dialog("ask");
  const input = field("ask-input");
  node.close();
  setText("ask-title", title);
  setText("ask-text", text);
  setText("ask-yes", yes);
  setText("ask-no", no);
  input.hidden = value === undefined;
  input.value = value ?? "";
  node.returnValue = "";
  node.showModal();
  input.select();
  return new Promise((resolve) => {
    // The event of the question before may come in the next frame.
    node.onclose = () => node.open || resolve(node.returnValue === "yes");
  });
}

/**
 * Asks for a name or a title until it is saved.
 * @param {string} title @param {string | null | undefined} value
 * @param {number} most characters @param {(text: string) => Promise<unknown>} save
 */
async function askName(title, value, most, save) {
  const input = field("ask-input");
  input.maxLength = most;
  let problem = "";
  while (await ask(title, problem, say("save"), say("cancel"), value ?? "")) {
    value = input.value.trim();
    try {
      return await save(value);
    } catch (error) {
      problem = errorText(error);
    }
  }
}

let submitting = false;

/** One at a time. (A button that is disabled loses the focus.)
 * @param {string} errorId @param {() => Promise<unknown>} request */
async function submit(errorId, request, words = errorText) {
  if (submitting) return;
  submitting = true;
  setText(errorId, "");
  await explain(errorId, request, words);
  submitting = false;
}

/** @param {string} errorId @param {() => Promise<unknown>} request */
async function explain(errorId, request, words = errorText) {
  try {
    await request();
  } catch (error) {
    setText(errorId, words(error));
  }
  requestRender();
}

/** @param {unknown} error */
function toastError(error) {
  toast(errorText(error));
}

/** It may also change in another tab or device. @param {string | null} name */
function setMyName(name) {
  if (model.session) model.session.name = name;
  model.names.set(myId(), name);
  requestRender();
}

async function onLinkDevice() {
  const { client } = model;
  const answer = await client?.linkDevice().catch(toastError);
  if (!answer || client !== model.client) return;
  showLink("otherDevice", say("otherDeviceText"), `#token=${answer.token}`);
}

/** @param {Key} title @param {string} text @param {string} hash */
function showLink(title, text, hash) {
  setText("link-title", say(title));
  setText("link-text", text);
  setText("link-copy", say("copy"));
  setText("link-error", "");
  field("link-url").value = new URL(hash, location.href).href;
  button("link-share").hidden = !("share" in navigator);
  button("link-revoke").hidden = title !== "invitePeople";
  if (!dialog("link").open) dialog("link").showModal();
}

/** What the menu belongs to. @type {HTMLElement | null} */
let menuAnchor = null;

/** @param {HTMLElement} anchor @param {Action[]} actions */
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

const people = {
  /** It receives the chosen people; null: they get a new chat. @type {ChatView | null} */
  chat: null,
  /** The other one of a direct chat, which stays as it is. @type {number[]} */
  given: [],
  /** The same choice, tried again, makes one chat. */
  key: "",
};

/** @param {ChatView | null} chat @param {number[]} [given] */
function choosePeople(chat, given = []) {
  Object.assign(people, { chat, given });
  const [other] = given;
  const what = chat ? "addPeople" : other ? "newGroup" : "newChat";
  setText("people-title", say(what));
  setText("people-note", other ? say("groupWith", { name: personName(other) }) : "");
  setText("people-submit", say(chat ? "add" : "create"));
  byId("people-form", HTMLFormElement).reset();
  box("people-list").replaceChildren();
  onChoice();
  dialog("people").showModal();
  void explain("people-error", async () => {
    const { client, names } = model;
    /** @type {{users: Session[]}} */
    const { users } = await client?.request("GET", "/api/v1/users");
    if (client !== model.client) return;
    for (const { user_id, name } of users) names.set(user_id, name);
    model.people = users.map(({ user_id }) => user_id);
  });
}

/** @param {Iterable<number>} ids */
function sortedByName(ids) {
  return [...ids].sort((a, b) => personName(a).localeCompare(personName(b)));
}

/** @returns {number} how many people have a name that contains the filter's text */
function renderPeople() {
  const { chat, given } = people;
  const members = chat?.members ?? new Map([[myId(), 0]]);
  const ids = sortedByName(new Set([...(model.people ?? []), ...given]));
  const checkbox = (/** @type {number} */ value) =>
    el("input", { type: "checkbox", value, checked: given.includes(value) });
  const candidates = ids.filter((id) => !members.has(id)).map((id) => ({
    key: `${id}`,
    look: personName(id),
    build: () =>
      el("li", {}, el("label", { class: "person" }, checkbox(id), ...personCells(id))),
  }));
  showRows(box("people-list"), candidates);

  const name = field("people-filter").value.trim();
  const rows = rowsOf("people-list");
  const fitting = rows.filter(({ dataset }) =>
    folded(dataset["look"] ?? "").includes(folded(name)),
  );
  // Enter chooses the next one: see onFilterKey.
  const next = name && fitting.find((row) => !row.matches(":has(:checked)"));
  for (const row of rows) {
    row.hidden = !fitting.includes(row) && !row.matches(":has(:checked)");
    row.classList.toggle("next", row === next);
  }
  const none = rows.length > 0 ? say("noOneCalled", { name }) : orInvite("noOneToAdd");
  setText("people-empty", fitting.length > 0 || !model.people ? "" : none);

  // Only a group has a title. Without one, it is shown as the names of its members.
  const chosen = chosenPeople();
  const grows = chosen.length > given.length;
  const direct = grows && chosen.length === 1;
  box("people-name").hidden = chat !== null || direct || !(grows || mayBeAlone());
  field("people-chat-title").placeholder = chosen.map(personName).join(", ");
  return fitting.length;
}

/** @param {number} id @param {ChatView} [chat] */
function personCells(id, chat) {
  return [personAvatar(id, chat), el("span", { dir: "auto" }, personName(id))];
}

function chosenPeople() {
  const inputs = box("people-list").querySelectorAll("input");
  return [...inputs].filter(({ checked }) => checked).map(({ value }) => Number(value));
}

function onChoice() {
  people.key = `${Math.random()}`;
  setText("people-error", "");
  renderPeople();
}

/** People can be invited to a new group later. */
const mayBeAlone = () => model.server.invites === true && !people.chat;
const orInvite = (/** @type {Key} */ key) =>
  say(key) + (mayBeAlone() ? ` ${say("inviteLater")}` : "");

/** Adds the chosen people, or creates a chat with them and opens it. */
async function addPeople() {
  const { client, chats } = model;
  const { chat, given, key: clientId } = people;
  const memberIds = chosenPeople();
  const title = field("people-chat-title").value.trim();
  const alone = memberIds.length <= given.length;
  if (alone && !title) throw new Error(orInvite("chooseOne"));
  if (chat) {
    for (const user_id of memberIds)
      await client?.request("POST", `/api/v1/chats/${chat.id}/members`, { user_id });
    return dialog("people").close();
  }
  // With one person it is the direct chat, old or new.
  const direct = box("people-name").hidden === true;
  const made = await client?.createChat(
    direct ? { memberIds, direct } : { title: title || null, memberIds, clientId },
  );
  if (!made || client !== model.client) return;
  const isNew = !chats.has(made.id);
  const opened = putChat(made);
  if (isNew) opened.activeAt = Date.now();
  openChat(made.id);
  route();
  dialog("people").close();
  if (alone) onInvite();
}

/** Without a filter, Enter submits, as in any field. @param {KeyboardEvent} event */
function onFilterKey(event) {
  const filter = field("people-filter");
  if (event.key !== "Enter" || !filter.value.trim() || isComposing(event)) return;
  event.preventDefault();
  if (renderPeople() === 0) return;
  /** @type {HTMLInputElement | null} */
  const next = box("people-list").querySelector(".next input");
  if (next) {
    next.checked = true;
    announce(say("chosen", { name: personName(Number(next.value)) }));
  }
  filter.value = "";
  onChoice();
}

/** The members that the info dialog has loaded, by pages. */
const info = {
  /** User id -> whether that user is online. @type {Map<number, boolean>} */
  online: new Map(),
  nextPage: {},
  more: true,
};

function showInfo() {
  if (!model.open) return;
  info.online.clear();
  Object.assign(info, { nextPage: {}, more: true });
  setText("info-error", "");
  field("info-mute").checked = isMuted(model.open);
  dialog("info").showModal();
  renderInfo();
  loadMembers();
}

/** @param {{ids?: number[]}} [which] or the next page */
function loadMembers(which) {
  void explain("info-error", async () => {
    const { client, open: chat } = model;
    if (!client || !chat) return;
    const { members, more } = await client.members(chat.id, which ?? info.nextPage);
    if (client !== model.client || chat !== model.open) return;
    for (const { user_id, name, online = false } of members) {
      model.names.set(user_id, name);
      info.online.set(user_id, online);
    }
    const nextPage = { after: members.at(-1)?.user_id };
    if (!which) Object.assign(info, { nextPage, more });
    // An event can tell of a member that the list of chats has counted already.
    if (!info.more && !isWhole(chat)) chat.memberCount = info.online.size;
  });
}

function renderInfo() {
  const chat = model.open;
  if (!chat) return;
  const { create_chats = false, invites = false } = model.server;
  const known = isWhole(chat) ? chat.members : info.online;
  const ids = sortedByName(known.keys()).filter((id) => id !== myId());
  const rows = [myId(), ...ids].map((id) => memberRow(chat, id));
  const left = chat.memberCount - rows.length;
  const rest = () => textButton(say("andMore", { left }), () => loadMembers());
  if (left > 0)
    rows.push({ key: "more", look: `${left}`, build: () => el("li", {}, rest()) });
  setText("info-title", chatTitle(chat));
  showRows(box("info-members"), rows);
  button("info-rename").hidden = chat.direct || !create_chats;
  button("info-add").hidden = !create_chats;
  button("info-invite").hidden = chat.direct || !invites;
  button("info-leave").hidden = chat.direct && ids.length > 0;
}

/** @param {ChatView} chat @param {number} id @returns {Row} */
function memberRow(chat, id) {
  const name = personName(id);
  const online = info.online.get(id) === true;
  const me = id === myId();
  const creator = chat.direct ? null : chat.created_by;
  const notes = [me && say("you"), id === creator && say("creator")].filter(Boolean);
  const removable = !me && creator === myId() && model.server.create_chats;
  return {
    key: `${id}`,
    look: JSON.stringify([name, online, notes, removable]),
    build: () => {
      const remove = textButton(say("remove"), () => void removeMember(chat, id));
      remove.ariaLabel = `${say("remove")} ${name}`;
      return el(
        "li",
        { class: classes("person", { online }) },
        ...personCells(id, chat),
        online && el("span", { class: "sr-only" }, say("online")),
        el("span", { class: "quiet" }, notes.join(", ")),
        removable && remove,
      );
    },
  };
}

/** @param {ChatView} chat @param {number} userId the user, who leaves, or another one */
async function removeMember(chat, userId) {
  const leaves = userId === myId();
  const { client, server } = model;
  const ends = server.invites ? ` ${say("linksEnded")}` : "";
  const name = personName(userId);
  const sure = await (leaves
    ? ask(say("leaveTitle", { title: chatTitle(chat) }), say("leaveText"), say("leaveChat"))
    : ask(say("removeTitle", { name }), say("removeText") + ends, say("remove")));
  if (!sure) return;
  await submit("info-error", async () => {
    await client?.request("DELETE", `/api/v1/chats/${chat.id}/members/${userId}`);
    if (leaves) removeChat(chat);
    else dialog("info").querySelector("button")?.focus(); // the row goes
  });
}

/* -------------------------------------------------------------------------------------
 * Notifications. A chat can be muted: in this browser, like a draft.
 * ---------------------------------------------------------------------------------- */

async function onNotifyButton() {
  await Notification.requestPermission();
  if (document.activeElement === button("notify")) button("bell").focus();
  requestRender();
}

/** Offers notifications once: to a user who comes back and finds new messages. */
function offerNotifications() {
  const key = "chatd.notify";
  if (button("notify").hidden || readStored("localStorage", key)) return;
  if (writeStored("localStorage", key, "offered"))
    toast(say("offerNotify"), { text: say("notify"), press: onNotifyButton });
}

/** @param {ChatView} chat @param {Message} message */
function notify(chat, message) {
  if (window.Notification?.permission !== "granted" || isWatched()) return;
  // Another tab may show the message already.
  after(1, () => {
    const all = [...chat.messages, chat.last_message];
    const now = all.find((one) => one?.id === message.id) ?? message;
    const { sender_id, content, deleted } = now;
    if (deleted || chat.read_n >= message.n || isWatched() || !model.chats.has(chat.id)) return;
    const { id, title } = chat;
    const sender = personName(sender_id);
    const name = title ? say("senderIn", { name: sender, title }) : sender;
    const body = visibleText(content).slice(0, 200);
    const tag = `chatd.${myId()}.${id}`; // all tabs of a user share one notification
    // Some phones allow notifications only from service workers. chatd has none.
    const shown = attempt(() => new Notification(name, { body, tag }));
    shown?.addEventListener("click", () => {
      window.focus();
      location.hash = `#chat/${id}`;
      shown.close();
    });
  });
}

/* -------------------------------------------------------------------------------------
 * Start.
 * ---------------------------------------------------------------------------------- */

/** Ends the tab's session, if it has one, and begins another. @param {Session} session */
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
  // The socket continues without a gap from the cursor of the list. But a slow list
  // must not delay the connection, nor the notice that there is none.
  const timeout = new Promise((resolve) => after(2, () => resolve(0)));
  void Promise.race([fetchChats(), timeout]).then(() => {
    if (client === model.client) client.connect();
  });
}

/** An element's id, and an event if it is not a click -> what happens then.
 * @type {Record<string, (event: any) => unknown>} */
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
    return askName(say("changeName"), names.get(myId()), 64, async (text) => {
      const { name } = await client?.renameMe(text);
      if (client === model.client) setMyName(name);
    });
  },
  "link-device": onLinkDevice,
  shortcuts: () => dialog("keys").showModal(),
  "sign-out": onSignOut,

  find: () => search.open(false),
  "chat-find": () => search.open(true),
  "search-text input": () => search.start(),
  "search-here change": () => search.start(),
  "search keydown": (event) => search.onKey(event),
  "search-list": (event) => search.onClick(event),
  "search-list scroll": requestRender,
  "search-retry": () => search.retry(),

  "scroller scroll": () => pane.onScroll(),
  "scroller keydown": onMessagesKey,
  jump: () => {
    pane.showLatest(); // at once: smooth scrolling through a long history can make dizzy
    // The button is gone now. The keyboard of a phone stays as it is.
    if (document.activeElement !== composer.field)
      box("scroller").focus({ preventScroll: true });
  },
  messages: (event) => {
    onTick(event);
    if (event.target.closest(".more")) openActions(event.target.closest("li"));
  },
  "messages copy": onCopy,
  "messages pointerdown": onTouch,
  "messages contextmenu": (event) => {
    if (isTouchOfText(event)) event.preventDefault();
  },
  // The touch that opens the menu clicks on nothing in it.
  "messages touchend": (event) => {
    if (box("menu").matches(":popover-open")) event.preventDefault();
  },
  "menu keydown": (/** @type {KeyboardEvent} */ event) => {
    const items = rowsOf("menu");
    const at = items.findIndex((item) => item === event.target);
    const to = { ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: -1 }[event.key];
    if (event.key === "Tab") box("menu").hidePopover();
    if (to === undefined) return;
    event.preventDefault();
    items.at(to % items.length)?.focus();
  },

  "composer submit": (event) => composer.send(event),
  "composer-text input": () => composer.onInput(),
  "composer-text keydown": (event) => composer.onKey(event),
  "edit-cancel": () => composer.leave(),

  "new-chat": () => choosePeople(null),
  "empty-start": () => choosePeople(null),
  "people-form input": onChoice,
  "people-form submit": (event) => {
    event.preventDefault();
    return submit("people-error", addPeople);
  },
  "people-filter keydown": onFilterKey,

  "chat-info": showInfo,
  "info-mute change": ({ target }) => {
    const { open } = model;
    if (open && !writeStored("localStorage", mutedKey(open), target.checked))
      toast(say("noStorage"));
    requestRender();
  },
  "info-rename": () => {
    const { client, open: chat } = model;
    return askName(say("rename"), chat?.title, 200, async (text) => {
      if (chat) await client?.renameChat(chat.id, text || null);
    });
  },
  // In a direct chat, a group begins.
  "info-add": () => {
    const { open: chat } = model;
    if (chat?.direct) choosePeople(null, others(chat));
    else choosePeople(chat);
  },
  "info-invite": onInvite,
  "info-leave": () => model.open && removeMember(model.open, myId()),

  "link-copy": ({ target }) => {
    field("link-url").select();
    // navigator.clipboard would need https.
    if (document.execCommand("copy")) setText("link-copy", say("copied"));
    target.focus();
  },
  // It is rejected if the user cancels. The link can still be copied.
  "link-share": () => navigator.share({ url: field("link-url").value }).catch(() => {}),
  "link-revoke": () => submit("link-error", () => showInvite(true)),
};

/** @param {any} event of a key */
function onShortcut(event) {
  const { key, target } = event;
  if (event.defaultPrevented || isComposing(event)) return;
  /** @type {Record<string, string>} */
  const steps = { ArrowDown: "nextSibling", ArrowUp: "previousSibling" };
  const to = steps[key];
  const row = to && target.closest(".rows > li")?.[to];
  if (row) {
    event.preventDefault();
    row.querySelector("a").focus();
  }
  // These close by themselves.
  if (document.querySelector("dialog[open], :popover-open")) return;
  if (key === "Escape" && model.open) location.hash = "#chats";
  if (key === "?" && !target.matches("input, textarea")) dialog("keys").showModal();
}

/** The user has come back, perhaps on another day. */
function onWatched() {
  if (isWatched() && [...model.chats.values()].some(counted)) offerNotifications();
  onSecond();
  render();
}

let today = "";

function onSecond() {
  if (!box("banner").hidden) renderBanner();
  const now = new Date();
  const date = `${now.toDateString()} ${now.getTimezoneOffset()}`;
  if (date === today) return;
  today = date;
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
// A choice closes its panel: first, so that the focus is back when its handler moves it.
const closeAround = (/** @type {any} */ { target }) => {
  const choice = target.closest("#me-panel button, #bell-list a, #menu button");
  choice?.closest("[popover]").hidePopover();
  target.closest(".close")?.closest("dialog").close();
};
document.addEventListener("click", closeAround, true);
document.addEventListener("keydown", onShortcut);
document.addEventListener("keydown", onSearchKey);
// Renders at once: a tab that is hidden now may never get the requested frame.
document.addEventListener("visibilitychange", onWatched);
addEventListener("focus", onWatched);
addEventListener("beforeunload", onBeforeUnload);
addEventListener("pagehide", releaseAll);
addEventListener("storage", onDraftElsewhere);
addEventListener("pointerup", () => clearTimeout(longTouch));
addEventListener("pointercancel", () => clearTimeout(longTouch));
addEventListener("hashchange", ({ oldURL }) => {
  if (!followLink(new URL(oldURL).hash)) route();
});
signedOut?.addEventListener("message", onSignedOutElsewhere);
// If a keyboard covers a part of the page, as on iOS, the other part is the page.
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

if (!followLink()) {
  const session = sessionToResume();
  if (session) start(session);
  else showSignIn();
}
