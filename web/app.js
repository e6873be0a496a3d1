// @ts-check
/**
 * app.js: chatd's page.
 *
 * An event changes the model, and each change requests a render. Only a render writes
 * to the page: it makes the page show the model. So a badge, a tick or a list is right
 * after the next frame, whatever the order of the events was. chat-websocket.js owns
 * the connection; this file has what the user sees and does.
 *
 * Sections: Loading, Tools, Sign-in, Invitations, Model, Events, Reading, Top and
 * lists, The open chat, Changing, Drafts, Writing, Dialogs, Notifications, Start.
 *
 * A rule of this file: text that users have written is never markup. It enters the page
 * only through textContent.
 */
import { ChatError, ChatWebSocket } from "./chat-websocket.js";
import { Drafts } from "./drafts.js";
import { contentNode, folded, isBlank, markedNode, visibleText } from "./text.js";
import { locale, say } from "./words.js";

/** @typedef {import("./chat-websocket.js").Message} Message */
/** @typedef {import("./chat-websocket.js").Chat} ServerChat */
/** @typedef {import("./chat-websocket.js").Delivery} Delivery */
/** @typedef {import("./chat-websocket.js").State} State */
/** @typedef {import("./words.js").Key} Key */

/** One request for history fetches this many messages. */
const HISTORY_LIMIT = 50;
/** Older messages are fetched when the top is less than this many pixels away. */
const HISTORY_MARGIN = 500;
/** The end counts as visible when it is less than this many pixels away. */
const END_MARGIN = 60;
/** A message counts as seen when this many pixels of it are on the screen. */
const SEEN_PIXELS = 24;
/** A typing sign ends after this long: a little more than twice the repeat of 3 s. */
const TYPING_SECONDS = 7;
/** Messages of one sender form a group if each follows within this time. */
const GROUP_SECONDS = 300;
/** A notification waits this long, because another tab may show the message already. */
const NOTIFY_SECONDS = 1;
/** All control characters but tab, line feed and carriage return. */
const CONTROL_CHARACTERS = /[\0-\x08\x0b\x0c\x0e-\x1f\x7f]/g;
/** The longest message, until the server has said what it allows. */
const USUAL_MAX_CHARACTERS = 4000;
/** The composer counts from this part of the longest message on. */
const COUNT_FROM = 0.9;
/** A text below this size is never folded, so its height need not be measured. */
const SHORT_CHARACTERS = 600;
const SHORT_LINES = 20;
/** A deletion can be undone for this long. */
const UNDO_SECONDS = 5;
/** A touch opens the menu of a message after this long. */
const LONG_TOUCH_SECONDS = 0.5;
/** A chat keeps so many lines about joining, leaving and renaming. */
const MAX_LINES = 50;
/** So many colours of people can be told apart. */
const HUES = 12;
/** How long a toast stays. */
const TOAST_SECONDS = 6;
/** A search begins when the user has paused for this long. */
const SEARCH_PAUSE_SECONDS = 0.3;
/** The first connection waits at most this long for the list of chats. */
const FIRST_LIST_SECONDS = 2;
/** After a failure, the list of chats is fetched again after this long. */
const REFETCH_SECONDS = 5;

/* -------------------------------------------------------------------------------------
 * Loading. Until the page shows the user's chats or asks to sign in, any exception ends
 * in words. So this section comes first and uses only words.js. For a script that
 * cannot even be loaded or read, style.css shows the words .stuck after some seconds.
 * ---------------------------------------------------------------------------------- */

const SCREENS = ["loading", "sign-in", "join", "chat"];
let loading = true;

/** @param {any} event an error event, or a rejection that nobody handles */
function onLoadError(event) {
  const error = event.error ?? event.reason;
  // Without an error it is only a notice, for example of a ResizeObserver.
  if (!loading || !error) return;
  for (const id of SCREENS) {
    const screen = document.getElementById(id);
    if (screen) screen.hidden = id !== "loading";
  }
  const words = document.getElementById("loading");
  if (words) words.textContent = say("broken", { error: error.message ?? `${error}` });
}

addEventListener("error", onLoadError);
addEventListener("unhandledrejection", onLoadError);

/* -------------------------------------------------------------------------------------
 * Tools. Elements, keyed rows, times, words.
 * ---------------------------------------------------------------------------------- */

/**
 * @template {Element} Kind
 * @param {string} id
 * @param {new () => Kind} kind
 * @returns {Kind}
 */
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
 * Makes an element. Strings become text, never markup; null children are left out.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string | number | boolean | null | undefined>} [attributes]
 *   true: an empty attribute; false, null, undefined: none
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
  use.setAttribute("href", `web/icons.svg#${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", className);
  svg.append(use);
  return svg;
}

/**
 * @typedef {object} Row
 * @property {string} key identifies the row in its container
 * @property {string} look everything that the row's appearance depends on
 * @property {() => HTMLElement} build
 */

/**
 * Makes the container show these rows, in this order. A row with the same key and look
 * keeps its element, and so its focus, its selection and a screen reader's position.
 * @param {HTMLElement} container
 * @param {Row[]} rows
 */
function showRows(container, rows) {
  const before = rowsOf(container.id);
  const focused = before.findIndex((row) => row.contains(document.activeElement));
  const old = new Map(before.map((row) => [row.dataset["key"], row]));
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
  if (focused < 0 || document.activeElement !== document.body) return;
  // The row with the focus was moved or is gone.
  const key = before[focused]?.dataset["key"];
  const now = rowsOf(container.id);
  const row = now.find(({ dataset }) => dataset["key"] === key) ?? now[focused] ?? now.at(-1);
  /** @type {HTMLElement | null | undefined} */
  const target = row?.querySelector("a, button") ?? container.closest("[tabindex]");
  target?.focus({ preventScroll: true });
}

/** So many pixels are left to scroll. @param {string} id */
function below(id) {
  const { scrollHeight, scrollTop, clientHeight } = box(id);
  return scrollHeight - scrollTop - clientHeight;
}

/** @param {string} id of a container @returns {HTMLElement[]} */
function rowsOf(id) {
  return /** @type {HTMLElement[]} */ ([...box(id).children]);
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
  const { activeElement } = document;
  const focused = before.contains(activeElement);
  const more = before.querySelector(".more"); // an open menu may belong to it
  if (more) node.querySelector(".more")?.replaceWith(more);
  before.replaceWith(node);
  if (!focused) return;
  const first = node.querySelector("a, button") ?? node.closest("[tabindex]");
  const target = node.contains(activeElement) ? activeElement : first;
  if (target instanceof HTMLElement) target.focus({ preventScroll: true });
}

/** The formats of times, all of the page's locale, with the user's clock of 12 or 24 hours. */
function newFormats() {
  const hours = hourCycle();
  const cycle = hours ? { hourCycle: hours } : {};
  const format = (/** @type {Intl.DateTimeFormatOptions} */ options) =>
    new Intl.DateTimeFormat(locale, options);
  return {
    /** Another offset means another time zone, or the other half of the year. */
    offset: new Date().getTimezoneOffset(),
    clock: format({ timeStyle: "short", ...cycle }),
    dayNear: format({ weekday: "long", day: "numeric", month: "long" }),
    dayFar: format({ day: "numeric", month: "long", year: "numeric" }),
    dayShort: format({ day: "numeric", month: "short" }),
    dayShortFar: format({ day: "numeric", month: "short", year: "numeric" }),
    moment: format({ dateStyle: "full", timeStyle: "short", ...cycle }),
  };
}

function hourCycle() {
  try {
    const user = new Intl.DateTimeFormat(undefined, { hour: "numeric" });
    return user.resolvedOptions().hourCycle;
  } catch {
    return undefined; // the browser's own locale may be one that it does not know
  }
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
  return Number(setTimeout(task, seconds * 1000));
}

/** @param {{content: string, deleted?: boolean}} message */
function shownText({ content, deleted }) {
  return deleted ? say("deleted") : visibleText(content);
}

/** Characters as the server counts them: code points. @param {string} text */
function countCharacters(text) {
  return [...text].length;
}

/**
 * Shows a short text for some seconds.
 * @param {string} text @param {{text: string, press: () => void}} [action]
 */
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

/** Announces a text to screen readers only. @param {string} text */
function announce(text) {
  const node = el("p", {}, text);
  box("announcer").append(node);
  after(TOAST_SECONDS * 2, () => node.remove());
}

/**
 * The page's own words for the codes of docs/protocol.md that a user can meet. The
 * server's sentences are for programmers.
 * @type {Record<string, Key>}
 */
const REFUSALS = {
  changed: "wasChanged",
  deleted: "wasDeleted",
  forbidden: "notAllowed",
  internal: "serverError",
  not_found: "notThere",
  overloaded: "busy",
  rate_limited: "tooMuch",
  storage_failed: "cannotStore",
  too_large: "tooLong",
  too_late: "tooLate",
  unreachable: "noAnswer",
  upstream: "noAnswer",
};

/**
 * @param {string} code
 * @param {string} detail the server's sentence: it begins with the field that is wrong
 */
function refusalText(code, detail) {
  const most = maximumIn(detail);
  const known = REFUSALS[code];
  if (known) return say(known);
  if (code !== "bad_field") return say("otherError", { code });
  if (detail.startsWith("title")) return say("badTitle");
  if (detail.startsWith("name")) return say("badName");
  if (!detail.startsWith("member_ids") && !detail.startsWith("user_id"))
    return say("notAccepted");
  return most ? say("mostPeople", { most }) : say("cannotAdd");
}

/** @param {string} detail @returns {number} the limit that it names; else 0 */
function maximumIn(detail) {
  return Number(/at most (\d+)/.exec(detail)?.[1] ?? 0);
}

/** @param {unknown} error @returns {string} */
function errorText(error) {
  if (error instanceof ChatError) return refusalText(error.code, error.message);
  return error instanceof Error ? error.message : String(error);
}

/* -------------------------------------------------------------------------------------
 * Sign-in. The page exchanges the token of a sign-in link for a session token at once.
 * The session belongs to the tab (sessionStorage), so that two tabs can be two users. A
 * copy in localStorage is for the next visit.
 *
 * Somebody could send you a link for an account that they can read, and hope that you
 * write under its name. So an open tab asks before it changes its user, and a new tab
 * with another user shows a notice and does not change the copy for the next visit.
 * ---------------------------------------------------------------------------------- */

/**
 * @typedef {object} Session
 * @property {string} token
 * @property {number} user_id
 * @property {string | null} name
 */

const SESSION_KEY = "chatd.session";
/**
 * Carries the id of a user that has signed out to the other tabs. null: the browser
 * forbids it, as Firefox does when cookies are blocked.
 */
const signedOut = openChannel("chatd.signed-out");

/** @param {string} name @returns {BroadcastChannel | null} */
function openChannel(name) {
  try {
    return new BroadcastChannel(name);
  } catch {
    return null;
  }
}

/** A browser may forbid storage. Then the session ends with the page. */
const storages = {
  tab: () => window.sessionStorage,
  browser: () => window.localStorage,
};

/**
 * @param {() => Storage} storage
 * @returns {Session | null | undefined} null: signed out; undefined: nothing is known
 */
function readSession(storage) {
  const session = readStored(storage, SESSION_KEY);
  return session === null || typeof session?.token === "string" ? session : undefined;
}

/** @param {() => Storage} storage @param {string} key @returns {any} */
function readStored(storage, key) {
  try {
    return JSON.parse(storage().getItem(key) ?? "0");
  } catch {
    return undefined;
  }
}

/**
 * @param {() => Storage} storage
 * @param {unknown} value
 * @param {string} [key]
 * @returns {boolean} false: storage is forbidden or full
 */
function writeSession(storage, value, key = SESSION_KEY) {
  try {
    storage().setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** Returns the tab's session, or else the copy that was saved for the next visit. */
function sessionToResume() {
  const own = readSession(storages.tab);
  return own === undefined ? readSession(storages.browser) : own;
}

/**
 * Follows a sign-in link or an invitation, and removes it from the address bar.
 * @param {string} [hash] the part of the address that replaces it
 * @returns {boolean} whether the address has one
 */
function followLink(hash = "") {
  const match = /^#(token|invite)=(.+)$/.exec(location.hash);
  if (!match?.[2]) return false;
  history.replaceState(null, "", location.pathname + location.search + hash);
  void (match[1] === "token" ? signInWith : openInvite)(decoded(match[2]));
  return true;
}

/** @param {string} text from an address; it may be mistyped */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** @param {string} token of a sign-in link @returns {Promise<Session>} */
async function exchangeLinkToken(token) {
  const answer = await visitor(token).request("POST", "/api/v1/session");
  return { token: answer.token, user_id: answer.user_id, name: answer.name ?? null };
}

/** @param {string} token of a sign-in link */
async function signInWith(token) {
  const current = model.session ?? readSession(storages.tab);
  try {
    const session = await exchangeLinkToken(token);
    if (current && !(await confirmSwitch(session, current))) start(current);
    else if (current) saveAndStart(session);
    else startFirst(session);
  } catch (error) {
    signInFailed(token, error);
  }
}

/** Starts the first session of a tab. @param {Session} session */
function startFirst(session) {
  const saved = readSession(storages.browser);
  if (saved && saved.user_id !== session.user_id) startInThisTab(session, saved);
  else saveAndStart(session);
}

/** @param {Session} session @param {Session} current @returns {Promise<boolean>} */
async function confirmSwitch(session, current) {
  if (session.user_id === current.user_id) return true;
  const name = personName(session.user_id, session.name);
  const me = personName(current.user_id, current.name);
  return ask({
    title: say("continueAsTitle", { name }),
    text: say("continueAsText", { me, name }),
    yes: say("continueAs", { name }),
    no: say("stayAs", { name: me }),
  });
}

/** @param {string} token @param {unknown} error */
function signInFailed(token, error) {
  const current = model.session ?? sessionToResume();
  const refused = error instanceof ChatError && error.status > 0;
  const text =
    refused && error.status === 401 ? say("linkInvalid") : errorText(error);
  if (current) {
    toast(text);
    start(current);
    return;
  }
  showSignIn({ error: text });
  // Without an answer the link may still be valid, so the button can try it again.
  if (!refused) field("sign-in-link").value = new URL(`#token=${token}`, location.href).href;
}

/**
 * Saves the session. If its user is in this tab already, nothing else changes.
 * @param {Session} session
 */
function saveAndStart(session) {
  for (const storage of [storages.tab, storages.browser])
    writeSession(storage, session);
  if (model.session?.user_id !== session.user_id) start(session);
}

/**
 * A new tab starts with another user than the one saved for the next visit.
 * @param {Session} session
 * @param {Session} saved
 */
function startInThisTab(session, saved) {
  start(session);
  const me = personName(session.user_id, session.name);
  toast(say("twoUsers", { me, name: personName(saved.user_id, saved.name) }));
}

/**
 * @param {{reason?: string, error?: string}} [texts] why the user has to sign in; what
 *   was wrong with a link
 */
function showSignIn({ reason = "", error = "" } = {}) {
  showScreen("sign-in");
  showTitle(say("signIn"));
  field("sign-in-link").value = "";
  setText("sign-in-text", `${reason} ${say("openLink")}`);
  setText("sign-in-error", error);
  loading = false;
}

/** @param {"loading" | "sign-in" | "join" | "chat"} screen */
function showScreen(screen) {
  const hadFocus = document.activeElement !== document.body;
  for (const id of SCREENS) box(id).hidden = id !== screen;
  /** @type {HTMLElement | null} */
  const first = box(screen).querySelector("input, nav");
  if (hadFocus) first?.focus();
}

/** @param {SubmitEvent} event */
function onSignInForm(event) {
  event.preventDefault();
  const text = field("sign-in-link").value.trim();
  const token =
    /#token=(\S+)$/.exec(text)?.[1] ?? /^[\w-]+\.[\w-]+\.[\w-]+$/.exec(text)?.[0];
  if (!token) {
    setText("sign-in-error", say("notALink"));
    return;
  }
  setText("sign-in-error", "");
  void signInWith(decoded(token));
}

/** The unsent messages of all chats, and the unsent edits and deletions. */
function allUnsent() {
  const messages = [...model.chats.keys()].map((id) => model.client?.unsent(id) ?? []);
  return [...messages, model.client?.unsentChanges() ?? []].flat();
}

/**
 * The browser asks before it closes the page if unsent messages are not in storage.
 * @param {Event} event
 */
function onBeforeUnload(event) {
  if (allUnsent().some(({ kept }) => !kept)) event.preventDefault();
}

async function onSignOut() {
  box("me-panel").hidePopover();
  releaseAll();
  const unsent = allUnsent();
  const sure =
    unsent.length === 0 ||
    (await ask({
      title: say("signOutTitle"),
      text: say("signOutText", { count: unsent.length }),
      yes: say("signOut"),
      no: say("cancel"),
    }));
  if (!sure) return;
  signedOut?.postMessage(myId());
  model.client?.forget();
  const kept = drafts.keys().length > 0;
  endSession(say("signedOut") + (kept ? ` ${say("draftsStay")}` : ""));
}

/**
 * Ends this tab's session. The copy for the next visit is removed if it belongs to the
 * same user.
 * @param {string} reason
 */
function endSession(reason) {
  const saved = readSession(storages.browser);
  if (saved?.user_id === model.session?.user_id) writeSession(storages.browser, null);
  writeSession(storages.tab, null);
  model.client?.disconnect();
  resetModel();
  history.replaceState(null, "", location.pathname + location.search);
  showSignIn({ reason });
}

/** The server refused the token. Another tab may have stored a newer one. */
function onSignedOut() {
  const old = model.session;
  const newer = [storages.tab, storages.browser]
    .map(readSession)
    .find((saved) => saved?.user_id === old?.user_id && saved?.token !== old?.token);
  if (newer) start(newer);
  else endSession(say("sessionEnded"));
}

/**
 * A user has signed out in another tab. This tab follows if it has the same user.
 * @param {MessageEvent} event
 */
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

/** Shows what an invitation is for. @param {string} token */
async function openInvite(token) {
  const session = model.session ?? sessionToResume();
  if (session) start(session);
  try {
    const preview = await visitor().previewInvite(token);
    const of = preview.title ?? "";
    const title = isBlank(of) ? say("joinChat") : say("joinTitle", { title: of });
    let text = say("membersSoFar", { count: preview.member_count });
    if (session) {
      const name = personName(session.user_id, session.name);
      text += ` ${say("joinAs", { name })}`;
      if (!(await ask({ title, text, yes: say("join"), no: say("cancel") }))) return;
      const joined = await model.client?.join(token);
      if (joined) openChat(joined.chat_id);
      return;
    }
    invite = token;
    setText("join-title", title);
    setText("join-text", text);
    setText("join-error", "");
    showScreen("join");
    field("join-name").focus();
    showTitle(say("join"));
    loading = false;
  } catch (error) {
    if (model.session) toast(inviteErrorText(error));
    else if (!session) showSignIn({ error: inviteErrorText(error) });
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

/** @param {unknown} error @returns {string} */
function inviteErrorText(error) {
  const { code, status, message } = /** @type {ChatError} */ (error);
  if (code === "token_expired") return say("inviteExpired");
  if (status === 401) return say("inviteInvalid");
  if (status === 403) return say("noInvites");
  return (maximumIn(message) ? `${say("chatFull")} ` : "") + errorText(error);
}

/**
 * Shows a new link into the open chat.
 * @param {boolean} [revoke] the earlier links end
 */
async function showInvite(revoke = false) {
  const { client, open: chat } = model;
  if (!client || !chat) return;
  if (revoke) {
    await client.revokeInvites(chat.id);
    field("link-url").value = ""; // it has ended, even if there will be no new one
  }
  const { token, expires_in } = await client.createInvite(chat.id);
  if (chat !== model.open) return;
  const valid = say("inviteValid", { count: Math.round(expires_in / 86_400) });
  const text = revoke ? `${say("linksEnded")} ${valid}` : valid;
  const url = new URL(`#invite=${token}`, location.href).href;
  showLink(say("invitePeople"), text, url, true);
}

async function onInvite() {
  dialog("info").close();
  await showInvite().catch((error) => toast(errorText(error)));
}

/* -------------------------------------------------------------------------------------
 * Model. Everything that the page shows. The counters only grow, so an event, an answer
 * and `connected` may bring a number in any order.
 * ---------------------------------------------------------------------------------- */

/**
 * `server` in the answer to GET /api/v1/me.
 * @typedef {{max_content_chars: number, edit_seconds: number | null,
 *   create_chats: boolean, invites: boolean, rename: boolean}} ServerRules
 */

/**
 * @typedef {object} ChatView
 * @property {number} id
 * @property {string | null} title
 * @property {boolean} direct
 * @property {number | null} created_by
 * @property {Map<number, number>} members user id -> read_n; empty if there are many
 * @property {number} memberCount
 * @property {number} last_n
 * @property {number} read_n
 * @property {Message | null} last_message
 * @property {Message[]} messages the loaded messages, without holes
 * @property {boolean} loaded no event was missed since they were loaded
 * @property {boolean} more there are messages before the loaded ones
 * @property {boolean} moreAfter there are messages after the loaded ones
 * @property {"no" | "yes" | "failed"} loading
 * @property {Message | null} editing the message that the composer edits, as it was
 * @property {number | null} divider the new messages begin after this n
 * @property {Map<number, number>} hues user id -> colour
 * @property {Map<number, number>} typing user id -> timer that ends the typing sign
 * @property {{seq: number, n: number, text: () => string}[]} lines what has happened
 *   during this visit, each after a message n
 * @property {number} activeAt ms, when it was added, or the user wrote in it, during
 *   this visit; otherwise 0
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
  /**
   * What `connected` said of each chat.
   * @type {ChatEvents["connected"]["chats"]}
   */
  marks: {},
  /** The users one may add to a chat; null: not known yet. @type {number[] | null} */
  people: null,
  /** What the server allows this user; empty until it has said so. */
  server: /** @type {Partial<ServerRules>} */ ({}),
  /** @type {State} */
  connection: "closed",
  /** The list of chats has arrived at least once. */
  chatsLoaded: false,
  /** The epoch of the last list of chats. Another epoch resets all counters. */
  epoch: "",
  /** The longest message that the server is known to take. */
  maxCharacters: USUAL_MAX_CHARACTERS,
};

function resetModel() {
  document.querySelectorAll("dialog").forEach((node) => node.close());
  selectChat(null);
  Object.assign(model, {
    session: null,
    client: null,
    marks: {},
    people: null,
    server: {},
    chatsLoaded: false,
    epoch: "",
    connection: "closed",
    maxCharacters: USUAL_MAX_CHARACTERS,
  });
  model.chats.clear();
  model.names.clear();
  field("search-text").value = "";
  search.start();
}

const myId = () => model.session?.user_id ?? 0;
const unread = (/** @type {ChatView} */ chat) => Math.max(0, chat.last_n - chat.read_n);
/** Muting is for one user in one browser. @param {ChatView} chat */
const mutedKey = (chat) => `chatd.muted.${myId()}.${chat.id}`;
/** @param {ChatView} chat */
const isMuted = (chat) => readStored(storages.browser, mutedKey(chat)) === true;
/** What the title and the badges count. @param {ChatView} chat */
const counted = (chat) => (isMuted(chat) ? 0 : unread(chat));

/** @param {number} userId @param {string | null} [name] */
function personName(userId, name = model.names.get(userId) ?? null) {
  return name && !isBlank(name) ? name : say("user", { id: `${userId}` });
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
  const names = others(chat).map((id) => personName(id));
  return names.join(", ") || say("onlyYou");
}

/**
 * The chats, newest activity first. Being added to a chat, and writing in it even
 * without a connection, count as activity.
 * @returns {ChatView[]}
 */
function sortedChats() {
  const when = (/** @type {ChatView} */ chat) =>
    Math.max(Date.parse(chat.last_message?.created_at ?? "") || 0, chat.activeAt);
  return [...model.chats.values()].sort(
    (a, b) =>
      when(b) - when(a) || (b.last_message?.id ?? 0) - (a.last_message?.id ?? 0),
  );
}

/**
 * Puts a chat from the server into the model, and keeps what only the page knows of it.
 * @param {ServerChat} received
 * @returns {ChatView}
 */
function putChat(received) {
  const before = model.chats.get(received.id);
  for (const { user_id, name } of received.members) model.names.set(user_id, name);
  const mine = received.members.find(({ user_id }) => user_id === myId());
  /** @type {ChatView} */
  const chat = before ?? {
    id: received.id,
    title: null,
    direct: false,
    created_by: null,
    members: new Map(),
    memberCount: 0,
    last_n: 0,
    read_n: 0,
    last_message: null,
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
  chat.title = received.title;
  chat.direct = received.direct;
  chat.created_by = received.created_by;
  chat.last_message = newer(chat.last_message, received.last_message);
  chat.last_n = Math.max(chat.last_n, received.last_n);
  // A large chat that the user was just added to says nothing of the user's mark.
  const mark = mine?.read_n ?? model.marks[received.id]?.read_n;
  const read_n = received.read_n ?? mark ?? (before ? 0 : received.last_n);
  chat.read_n = Math.max(chat.read_n, read_n);
  chat.memberCount = received.member_count ?? received.members.length;
  chat.members = new Map(
    received.members.map(({ user_id, read_n }) => [
      user_id,
      Math.max(read_n ?? 0, chat.members.get(user_id) ?? 0),
    ]),
  );
  for (const id of chat.members.keys()) hueOf(id, chat);
  model.chats.set(chat.id, chat);
  void learnNames(chat, chat.last_message ? [chat.last_message.sender_id] : []);
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
    if (client !== model.client) return;
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

/** A message was edited or deleted. @param {Message} message */
function onChange(message) {
  const chat = model.chats.get(message.chat_id);
  if (!chat) return;
  if (chat.last_message?.n === message.n)
    chat.last_message = newer(chat.last_message, message);
  if (chat.messages.some(({ n }) => n === message.n)) merge(chat, [message]);
  for (const one of search.found)
    if (one.id === message.id) Object.assign(one, newer(one, message));
}

/**
 * The user has read up to n.
 * @param {ChatView} chat @param {number} userId @param {number} n
 */
function moveReadMark(chat, userId, n) {
  if (userId === myId()) chat.read_n = Math.max(chat.read_n, n);
  const before = chat.members.get(userId);
  if (before !== undefined) chat.members.set(userId, Math.max(before, n));
}

/**
 * Adds messages to the loaded ones. Messages before a hole are dropped: they are
 * fetched again when the user scrolls there.
 * @param {ChatView} chat
 * @param {Message[]} messages
 */
function merge(chat, messages) {
  const byN = new Map(chat.messages.map((message) => [message.n, message]));
  for (const message of messages)
    byN.set(message.n, newer(byN.get(message.n) ?? null, message) ?? message);
  const all = [...byN.values()].sort((a, b) => a.n - b.n);
  let first = all.length - 1;
  while (first > 0 && all[first - 1]?.n === (all[first]?.n ?? 0) - 1) first -= 1;
  chat.messages = all.slice(Math.max(0, first));
  chat.more = (chat.messages[0]?.n ?? 1) > 1;
  const senders = messages.map(({ sender_id }) => sender_id);
  void learnNames(chat, senders);
}

/**
 * @param {Message} message
 * @param {boolean} [read] whether its sender has read the chat up to it; by default the
 *   user has, if nothing before it is unread
 */
function putMessage(message, read) {
  const chat = model.chats.get(message.chat_id);
  if (!chat) return;
  chat.last_n = Math.max(chat.last_n, message.n);
  chat.last_message = newer(chat.last_message, message);
  if (read ?? message.n === chat.read_n + 1)
    moveReadMark(chat, message.sender_id, message.n);
  stopTyping(chat, message.sender_id);
  void learnNames(chat, [message.sender_id]);
  const upToDate = chat.loaded || chat.loading === "yes";
  if (upToDate && !chat.moreAfter) merge(chat, [message]);
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
 * Events. One table: each event of the client, and what it changes in the model.
 * ---------------------------------------------------------------------------------- */

/** @typedef {import("./chat-websocket.js").ChatEvents} ChatEvents */
/** @type {{[Type in keyof ChatEvents]?: (event: ChatEvents[Type]) => void}} */
const handlers = {
  state: onState,
  resync: () => void fetchChats(),
  chats: onChats,
  connected: ({ chats }) => onConnected(chats),
  new_message: ({ message, read }) => onNewMessage(message, read !== false),
  message_edited: ({ message }) => onChange(message),
  message_deleted: ({ message }) => onChange(message),
  message_read: ({ chat_id, read_by, n }) => {
    const chat = model.chats.get(chat_id);
    if (chat) moveReadMark(chat, read_by, n);
  },
  chat_added: ({ chat }) => {
    putChat(chat).activeAt = Date.now();
    route();
  },
  chat_renamed: ({ chat_id, title, user_id, seq }) => {
    const chat = model.chats.get(chat_id);
    if (!chat) return;
    chat.title = title;
    const shown = chatTitle(chat);
    void learnNames(chat, user_id ? [user_id] : []);
    addLine(chat, seq, () =>
      user_id
        ? say("renamed", { name: personName(user_id), title: shown })
        : say("nowCalled", { title: shown }),
    );
  },
  member_added: ({ chat_id, user_id, name, seq }) => {
    const chat = model.chats.get(chat_id);
    model.names.set(user_id, name);
    if (!chat) return;
    addLine(chat, seq, () => say("joined", { name: personName(user_id) }));
    if (chat.members.has(user_id)) return;
    if (isWhole(chat)) chat.members.set(user_id, chat.last_n);
    chat.memberCount += 1;
    if (chat === model.open && dialog("info").open)
      void loadMembers({ ids: [user_id] });
  },
  member_removed: ({ chat_id, user_id, seq }) => onMemberRemoved(chat_id, user_id, seq),
  typing: ({ chat_id, user_id, is_typing }) => onTyping(chat_id, user_id, is_typing),
  delivery: onDelivery,
};

/** @param {ChatWebSocket} client */
function addHandlers(client) {
  for (const [type, handle] of Object.entries(handlers)) {
    client.on(/** @type {keyof ChatEvents} */ (type), (event) => {
      if (client !== model.client) return;
      /** @type {(event: any) => void} */ (handle)(event);
      requestRender();
    });
  }
}

/** @param {ChatEvents["state"]} change */
function onState({ state }) {
  const [title] = BANNERS[state] ?? [];
  if (state !== model.connection && title) announce(say(title));
  model.connection = state;
  if (state === "signed_out") onSignedOut();
}

/** @param {ChatEvents["chats"]} snapshot */
function onChats({ chats, cursor }) {
  const epoch = cursor.slice(0, cursor.lastIndexOf("."));
  if (epoch !== model.epoch) model.chats.forEach(resetChat);
  model.epoch = epoch;
  const ids = new Set(chats.map(({ id }) => id));
  for (const id of model.chats.keys()) if (!ids.has(id)) removeChat(id);
  for (const received of chats) putChat(received).loaded = false;
  const [only] = chats;
  if (only && !chats[1] && !model.chatsLoaded && !location.hash) openChat(only.id);
  model.chatsLoaded = true;
  route();
  if (model.open) retryLoading(model.open);
  search.start(true); // what was found may have changed
}

/** A backup was restored, so the newer events are gone. @param {ChatView} chat */
function resetChat(chat) {
  const empty = {
    last_n: 0,
    read_n: 0,
    last_message: null,
    messages: [],
    moreAfter: false,
    lines: [],
    divider: null,
  };
  Object.assign(chat, empty, { members: new Map() });
  pane.follow = true;
}

/** @param {Record<string, {last_n: number, read_n: number}>} chats */
function onConnected(chats) {
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
}

/** @param {Message} message @param {boolean} read */
function onNewMessage(message, read) {
  putMessage(message, read);
  const chat = model.chats.get(message.chat_id);
  if (!chat || message.sender_id === myId() || chat.read_n >= message.n) return;
  if (message.deleted) return;
  if (chat === model.open && chat.divider === null && !endIsVisible()) {
    chat.divider = message.n - 1;
  }
  const name = personName(message.sender_id);
  const text = visibleText(message.content).slice(0, 200);
  if (chat === model.open) announce(say("lastOf", { name, text }));
  else if (counted(chat)) announce(say("lastIn", { name, text, title: chatTitle(chat) }));
  if (counted(chat)) notify(chat, message);
}

/** @param {number} chatId @param {number} userId @param {number} seq */
function onMemberRemoved(chatId, userId, seq) {
  const chat = model.chats.get(chatId);
  if (!chat) return;
  if (userId !== myId()) {
    // The chat may have come without this member already.
    if (chat.members.delete(userId) || !isWhole(chat)) chat.memberCount -= 1;
    if (chat === model.open) info.online.delete(userId);
    stopTyping(chat, userId);
    addLine(chat, seq, () => say("left", { name: personName(userId) }));
    return;
  }
  toast(say("noLonger", { title: chatTitle(chat) }));
  removeChat(chatId);
}

/** @param {ChatView} chat @param {number} seq @param {() => string} text */
function addLine(chat, seq, text) {
  if (chat.lines.some((line) => line.seq === seq)) return;
  // `connected` has moved last_n over the messages that a replay brings only now.
  const line = { seq, n: chat.last_message?.n ?? 0, text };
  chat.lines = [...chat.lines, line].slice(-MAX_LINES);
  if (chat === model.open) announce(text());
}

/** @param {number} chatId @param {number} userId @param {boolean} isTyping */
function onTyping(chatId, userId, isTyping) {
  const chat = model.chats.get(chatId);
  if (!chat) return;
  stopTyping(chat, userId);
  if (!isTyping) return;
  void learnNames(chat, [userId]);
  chat.typing.set(
    userId,
    after(TYPING_SECONDS, () => {
      stopTyping(chat, userId);
      requestRender();
    }),
  );
}

/** @param {Delivery} delivery */
function onDelivery(delivery) {
  if (delivery.kind !== "message") return onChangeDelivery(delivery);
  const { state, client_id, chat_id, content, message, reason = "" } = delivery;
  if (state === "sent" && message) {
    putMessage(message);
    model.maxCharacters = Math.max(model.maxCharacters, countCharacters(content));
  }
  if (state !== "failed") return;
  if (reason.startsWith("content"))
    model.maxCharacters = maximumIn(reason) || model.maxCharacters;
  const chat = model.chats.get(chat_id);
  if (chat === model.open)
    announce(say("notSentReason", { reason: failureText(delivery) }));
  else if (chat) toast(say("notSentIn", { title: chatTitle(chat) }));
  // The user is no longer in this chat, so the page cannot show the failed message.
  else if (model.chatsLoaded) model.client?.discard(client_id);
}

/** Whether the page has the message. @param {ChatView} chat @param {number} id */
function contains({ messages, last_message }, id) {
  return [...messages, last_message].some((message) => message?.id === id);
}

/** The state of an edit or a deletion. @param {Delivery} delivery */
function onChangeDelivery(delivery) {
  const { state, client_id, message_id, message, code } = delivery;
  if (message) onChange(message);
  if (state !== "failed") return;
  const text = say("notChanged", { reason: failureText(delivery) });
  if (model.open && contains(model.open, message_id)) return announce(text);
  toast(text);
  if (code === "not_found") model.client?.discard(client_id); // no row can show it
}

/** Fetches the list of chats, and tries again until it succeeds or the user changes. */
async function fetchChats() {
  const { client } = model;
  try {
    await client?.fetchChats();
    // A client that polls never receives `connected`.
    if (client === model.client && !("invites" in model.server)) void loadServer();
  } catch (error) {
    const refused = error instanceof ChatError && error.status === 401;
    if (!refused)
      after(REFETCH_SECONDS, () => void (client === model.client && fetchChats()));
  }
}

/** Learns what the server allows. If it does not answer, the next connection asks. */
async function loadServer() {
  const { client } = model;
  const me = await client?.request("GET", "/api/v1/me").catch(() => null);
  if (client !== model.client || !me?.server) return;
  model.server = me.server;
  model.maxCharacters = me.server.max_content_chars ?? model.maxCharacters;
  setMyName(me.name);
  composer.fit();
  requestRender();
}

/* -------------------------------------------------------------------------------------
 * Reading. A message is read once it has been on the screen, in a visible tab of the
 * window that has the focus: behind another window, or beside it, nobody may look.
 * ---------------------------------------------------------------------------------- */

function isWatched() {
  return document.visibilityState === "visible" && document.hasFocus();
}

/** Whether the user sees the end of the open chat. */
function endIsVisible() {
  return isWatched() && pane.atEnd();
}

/** Moves the user's read mark to the last message that is on the screen. */
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
  const { after, around } = where;
  if (!client || chat.loading === "yes") return;
  chat.loading = "yes";
  requestRender();
  try {
    const page = { limit: HISTORY_LIMIT, ...where };
    const { messages } = await client.history(chat.id, page);
    if (!where.before && !after) {
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
  renderDialogs();
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

/** @type {Partial<Record<State, [problem: Key, meanwhile: Key]>>} */
const BANNERS = {
  polling: ["pollingTitle", "pollingText"],
  offline: ["offlineTitle", "offlineText"],
  too_many: ["tooManyTitle", "tooManyText"],
  refused: ["refusedTitle", "refusedText"],
};

function renderBanner() {
  const state = model.connection;
  const [title, text] = BANNERS[state] ?? [];
  if (!title && box("banner").contains(document.activeElement)) moveFocus();
  box("banner").hidden = !title;
  if (!title || !text) return;
  setText("banner-title", say(title));
  const seconds = Math.ceil(model.client?.retryIn ?? 0);
  const waiting = state === "polling" || state === "offline";
  const next = seconds > 0 ? say("tryingIn", { seconds }) : say("tryingNow");
  setText("banner-next", waiting ? `${say(text)} ${next}` : say(text));
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
  const text = excerpt(shownText(shown(message)));
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
    const title = chatTitle(chat);
    const people = others(chat);
    const names = isWhole(chat)
      ? [...people.map((id) => personName(id)), say("you")].join(", ")
      : say("people", { count: chat.memberCount });
    setText("pane-title", title);
    setText("pane-members", chat.direct ? say("directChat") : names);
    avatar(chat, box("pane-avatar"));
    box("scroller").setAttribute("aria-label", say("messagesIn", { title }));
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
  const [name, other, ...more] = [...chat.typing.keys()].map((id) => personName(id));
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
          chat.last_n > 0 ? say("beginning") : say("sayHello"),
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
  if (own) return el("p", { class: "sr-only" }, say("youSaid"));
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
  box("readers-list").replaceChildren(
    ...ids.map((id) =>
      el(
        "li",
        { class: "person" },
        personAvatar(id),
        el("span", { dir: "auto" }, personName(id)),
        el("span", { class: "quiet" }, hasRead(id) ? say("read") : say("notYet")),
      ),
    ),
  );
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
  const last = textButton(say(message ? "delete" : "discard"), discard);
  return el("p", { class: "failure" }, `${text} `, repeat, last);
}

/** Why it was not done. @param {Delivery} delivery @returns {string} */
function failureText({ kind, content, code = "", reason = "" }) {
  const most = maximumIn(reason) || model.maxCharacters;
  const over = countCharacters(content) - most;
  if ((code === "bad_field" || code === "too_large") && over > 0)
    return say("tooLongBy", { count: over, most });
  if (code === "bad_field") return say("badCharacters");
  if (kind === "message" && (code === "not_found" || code === "forbidden"))
    return say("mayNotWrite");
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

const drafts = new Drafts(openStorage(), myId);

function openStorage() {
  try {
    return localStorage;
  } catch {
    return null; // it is forbidden
  }
}

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
  box("me-panel").hidePopover();
  const sure = await ask({
    title: say("deleteDraftsTitle"),
    text: say("deleteDraftsText"),
    yes: say("deleteDrafts"),
    no: say("cancel"),
  });
  if (!sure) return;
  for (const key of drafts.keys()) drafts.set(Number(key.split(".").at(-1)), "");
  composer.show(model.open);
  requestRender();
}

/* -------------------------------------------------------------------------------------
 * Writing. The composer owns its field: the text, the height, the draft, the counter,
 * what Enter means, and sending. Nothing else writes to the field.
 * ---------------------------------------------------------------------------------- */

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
    const text =
      used > most ? say("over", { count: used - most }) : say("used", { used, most });
    setText("composer-count", used < COUNT_FROM * most ? "" : text);
    box("composer-count").classList.toggle("over", used > most);
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
    if (event.key === "Escape" && editing) {
      event.preventDefault(); // the chat stays open
      return this.leave();
    }
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
      toast(say("invisible"));
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
      const [yes, no] = [say("delete"), say("cancel")];
      const text = say("deleteText");
      if (await ask({ title: say("deleteTitle"), text, yes, no })) hold(id);
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
  const names = others(chat).map((id) => personName(id));
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
 * Asks a question and waits for the answer. Closing the dialog means no.
 * @param {{title: string, text: string, yes: string, no: string, value?: string}} texts
 *   value: asks for a text, too
 * @returns {Promise<boolean>}
 */
function ask({ title, text, yes, no, value }) {
  const node = dialog("ask");
  if (node.open) node.close("no");
  setText("ask-title", title);
  setText("ask-text", text);
  setText("ask-yes", yes);
  setText("ask-no", no);
  const input = field("ask-input");
  input.hidden = value === undefined;
  input.value = value ?? "";
  node.returnValue = "no";
  node.showModal();
  input.select();
  return new Promise((resolve) => {
    // The event of the question before may come in the next frame.
    node.onclose = () => node.open || resolve(node.returnValue === "yes");
  });
}

/**
/**
 * Sends a form's request, one at a time. (A button that is disabled loses the focus.)
 * @param {string} errorId where a failure is explained
 * @param {() => Promise<unknown>} request
 */
async function submit(errorId, request, words = errorText) {
  if (submitting) return;
  submitting = true;
  setText(errorId, "");
  try {
    await request();
  } catch (error) {
    setText(errorId, words(error));
  } finally {
    submitting = false;
    requestRender();
  }
}
let submitting = false;

/**
 * Asks for a name or a title until it is saved.
 * @param {string} title @param {string} value @param {number} most characters
 * @param {(text: string) => Promise<unknown>} save
 */
async function askName(title, value, most, save) {
  const input = field("ask-input");
  input.maxLength = most;
  let text = "";
  while (await ask({ title, text, value, yes: say("save"), no: say("cancel") })) {
    try {
      value = input.value.trim();
      await save(value);
      return;
    } catch (error) {
      text = errorText(error);
    }
  }
}

function onRenameMe() {
  box("me-panel").hidePopover();
  const { client, names } = model;
  void askName(say("changeName"), names.get(myId()) ?? "", 64, async (text) => {
    const { name } = await client?.renameMe(text);
    if (client === model.client) setMyName(name);
  });
}

/** It may also change in another tab or device. @param {string | null} name */
function setMyName(name) {
  if (model.session) model.session.name = name;
  model.names.set(myId(), name);
  requestRender();
}

async function onLinkDevice() {
  box("me-panel").hidePopover();
  const { client } = model;
  try {
    const answer = await client?.linkDevice();
    if (!answer || client !== model.client) return;
    const url = new URL(`#token=${answer.token}`, location.href).href;
    showLink(say("otherDevice"), say("otherDeviceText"), url);
  } catch (error) {
    toast(errorText(error));
  }
}

/**
 * Shows a link to copy or, where the browser can, to share.
 * @param {string} title @param {string} text @param {string} url
 */
function showLink(title, text, url, isInvite = false) {
  setText("link-title", title);
  setText("link-text", text);
  setText("link-copy", say("copy"));
  setText("link-error", "");
  field("link-url").value = url;
  button("link-share").hidden = !("share" in navigator);
  button("link-revoke").hidden = !isInvite;
  if (!dialog("link").open) dialog("link").showModal();
}

function onLinkCopy() {
  field("link-url").select();
  // navigator.clipboard would need https.
  if (document.execCommand("copy")) setText("link-copy", say("copied"));
  button("link-copy").focus();
}

function onLinkShare() {
  // It is rejected if the user cancels. The link can still be copied.
  navigator.share({ url: field("link-url").value }).catch(() => {});
}

/** What the menu belongs to. @type {HTMLElement | null} */
let menuAnchor = null;

/**
 * Shows a menu at an element. The focus goes in, and back when the menu closes.
 * @param {HTMLElement} anchor
 * @param {{text: string, press: () => void, danger?: boolean}[]} items
 */
function showMenu(anchor, items) {
  const menu = box("menu");
  menu.hidePopover();
  menuAnchor = anchor;
  const buttons = items.map(({ text, press, danger = false }) => {
    const attributes = { role: "menuitem", type: "button" };
    const item = el("button", { ...attributes, class: danger && "danger" }, text);
    item.addEventListener("click", () => {
      menu.hidePopover();
      press();
    });
    return item;
  });
  menu.replaceChildren(...buttons);
  // Outside of an open dialog it would be inert.
  (anchor.closest("dialog") ?? box("main")).append(menu);
  menu.showPopover();
  buttons[0]?.focus();
  const { left, top, bottom } = anchor.getBoundingClientRect();
  const { clientWidth, clientHeight } = box("chat");
  const above = bottom + menu.offsetHeight > clientHeight;
  const x = Math.min(left, clientWidth - menu.offsetWidth - 8);
  const y = above ? top - menu.offsetHeight : bottom;
  menu.style.left = `${Math.max(8, x)}px`;
  menu.style.top = `${Math.max(8, y)}px`;
}

/** @param {KeyboardEvent} event */
function onMenuKey(event) {
  const items = rowsOf("menu");
  const at = items.findIndex((item) => item === document.activeElement);
  const to = { ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: -1 }[event.key];
  if (event.key === "Tab") box("menu").hidePopover();
  if (to === undefined) return;
  event.preventDefault();
  items.at(to % items.length)?.focus();
}

/**
 * The people dialog. `chat` receives the chosen people; null: they get a new chat.
 * `chosen` is the other one of a direct chat, which stays as it is: a group begins.
 * The same choice has the same `key`: tried again, it makes one chat.
 */
const people = {
  /** @type {ChatView | null} */
  chat: null,
  /** @type {number[]} */
  chosen: [],
  key: "",
};

/** @param {ChatView | null} chat @param {number[]} [chosen] */
function choosePeople(chat, chosen = []) {
  Object.assign(people, { chat, chosen });
  const [other] = chosen;
  const title = chat
    ? say("addPeopleTo", { title: chatTitle(chat) })
    : say(other ? "newGroup" : "newChat");
  setText("people-title", title);
  setText("people-note", other ? say("groupWith", { name: personName(other) }) : "");
  setText("people-submit", say(chat ? "add" : "create"));
  byId("people-form", HTMLFormElement).reset();
  box("people-list").replaceChildren();
  showCandidates();
  onChoice();
  dialog("people").showModal();
  void loadPeople();
}

async function loadPeople() {
  const { client } = model;
  try {
    const { users } = await client?.request("GET", "/api/v1/users");
    if (client !== model.client) return;
    for (const { user_id, name } of users) model.names.set(user_id, name);
    model.people = users.map((/** @type {{user_id: number}} */ { user_id }) => user_id);
  } catch (error) {
    setText("people-error", errorText(error));
  }
  requestRender();
}

/** Shows in the open dialogs what has changed. */
function renderDialogs() {
  if (dialog("people").open) showCandidates();
  if (dialog("info").open) renderInfo();
}

/** @param {Iterable<number>} ids */
function sortedByName(ids) {
  return [...ids].sort((a, b) => personName(a).localeCompare(personName(b)));
}

/** Fills the list of the people dialog. Users who are chosen already stay chosen. */
function showCandidates() {
  const members = people.chat?.members ?? new Map([[myId(), 0]]);
  const all = new Set([...(model.people ?? []), ...people.chosen]);
  const ids = sortedByName(all).filter((id) => !members.has(id));
  showRows(
    box("people-list"),
    ids.map((id) => ({
      key: String(id),
      look: personName(id),
      build: () => candidate(id),
    })),
  );
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
      el("input", {
        type: "checkbox",
        value: userId,
        checked: people.chosen.includes(userId),
      }),
      personAvatar(userId),
      el("span", { dir: "auto" }, personName(userId)),
    ),
  );
}

/**
 * Shows the people whose names contain the filter's text, and those who are chosen.
 * Highlights the one that Enter chooses.
 * @returns {{found: number, next: HTMLInputElement | undefined}} next: its checkbox
 */
function filterCandidates() {
  const text = field("people-filter").value.trim();
  /** @type {HTMLInputElement | undefined} */
  let next;
  let found = 0;
  for (const row of rowsOf("people-list")) {
    const input = row.querySelector("input") ?? undefined;
    const fits = folded(row.dataset["look"] ?? "").includes(folded(text));
    if (fits) found += 1;
    row.hidden = !fits && !input?.checked;
    const isNext = text !== "" && fits && !next && !input?.checked;
    if (isNext) next = input;
    row.classList.toggle("next", isNext);
  }
  const anyone = box("people-list").childElementCount > 0;
  const nobody = say("noOneToAdd") + (mayBeAlone() ? ` ${say("inviteLater")}` : "");
  const none = anyone ? say("noOneCalled", { name: text }) : nobody;
  setText("people-empty", found > 0 || !model.people ? "" : none);
  showTitleField();
  return { found, next };
}

function onChoice() {
  people.key = String(Math.random());
  setText("people-error", "");
  filterCandidates();
}

/** Only a group has a title. Without one, it is shown as the names of its members. */
function showTitleField() {
  const chosen = chosenPeople();
  const grows = chosen.length > people.chosen.length;
  const direct = grows && chosen.length === 1;
  box("people-name").hidden = people.chat !== null || direct || !(grows || mayBeAlone());
  field("people-chat-title").placeholder = chosen.map((id) => personName(id)).join(", ");
}

/**
 * Enter chooses the highlighted person. Without a filter it submits, as in any field.
 * @param {KeyboardEvent} event
 */
function onFilterKey(event) {
  const text = field("people-filter").value.trim();
  if (event.key !== "Enter" || text === "" || isComposing(event)) return;
  event.preventDefault();
  const { found, next } = filterCandidates();
  if (found === 0) return;
  if (next) {
    next.checked = true;
    announce(say("chosen", { name: personName(Number(next.value)) }));
  }
  field("people-filter").value = "";
  onChoice();
}

function chosenPeople() {
  const inputs = box("people-list").querySelectorAll("input");
  return [...inputs].filter(({ checked }) => checked).map(({ value }) => Number(value));
}

/** People can be invited to a new group later. */
const mayBeAlone = () => model.server.invites === true && !people.chat;

/** @param {SubmitEvent} event */
function onPeopleForm(event) {
  event.preventDefault();
  void submit("people-error", async () => {
    const { chat } = people;
    const chosen = chosenPeople();
    const grows = chosen.length > people.chosen.length;
    const title = box("people-name").hidden
      ? null
      : field("people-chat-title").value.trim() || null;
    if (!grows && !title) throw new Error(say(mayBeAlone() ? "chooseOrTitle" : "chooseOne"));
    if (chat) await addMembers(chat, chosen);
    else await createChat(title, chosen, !grows);
    dialog("people").close();
  });
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
 * Creates a chat and opens it. With one person it is the direct chat, old or new.
 * @param {string | null} title @param {number[]} memberIds @param {boolean} invites
 */
async function createChat(title, memberIds, invites) {
  const { client } = model;
  const direct = !invites && memberIds.length === 1;
  const made = await client?.createChat(
    direct ? { memberIds, direct } : { title, memberIds, clientId: people.key },
  );
  if (!made || client !== model.client) return;
  const isNew = !model.chats.has(made.id);
  const chat = putChat(made);
  if (isNew) chat.activeAt = Date.now();
  openChat(chat.id);
  route();
  if (invites) void onInvite();
}

/** The members that the info dialog has loaded, by pages. */
const info = {
  /** user id -> whether that user is online @type {Map<number, boolean>} */
  online: new Map(),
  /** The last id of a page. */
  after: 0,
  more: true,
};

function showInfo() {
  info.online.clear();
  Object.assign(info, { after: 0, more: true });
  setText("info-error", "");
  if (model.open) field("info-mute").checked = isMuted(model.open);
  dialog("info").showModal();
  renderInfo();
  void loadMembers();
}

/** Fetches members of the open chat. @param {{ids?: number[]}} [which] or a page */
async function loadMembers(which) {
  const { client, open: chat } = model;
  if (!client || !chat) return;
  try {
    const page = info.after ? { after: info.after, limit: 100 } : { limit: 100 };
    const { members, more } = await client.members(chat.id, which ?? page);
    if (client !== model.client || chat !== model.open) return;
    for (const { user_id, name, online = false } of members) {
      model.names.set(user_id, name);
      info.online.set(user_id, online);
    }
    if (!which) Object.assign(info, { more, after: members.at(-1)?.user_id });
    // An event can tell of a member that the list of chats has counted already.
    if (!info.more && !isWhole(chat)) chat.memberCount = info.online.size;
  } catch (error) {
    setText("info-error", errorText(error));
  }
  requestRender();
}

function renderInfo() {
  const chat = model.open;
  if (!chat) return;
  const { create_chats = false, invites = false } = model.server;
  const known = isWhole(chat) ? chat.members : info.online;
  const ids = sortedByName(known.keys()).filter((id) => id !== myId());
  const rows = [myId(), ...ids].map((id) => memberRow(chat, id));
  const left = chat.memberCount - rows.length;
  if (left > 0) rows.push(moreMembersRow(left));
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
  const notes = [me && say("you"), id === creator && say("creator")];
  const removable = !me && creator === myId() && model.server.create_chats;
  return {
    key: String(id),
    look: JSON.stringify([name, online, notes, removable]),
    build: () => {
      const remove = textButton(say("remove"), () => void removeMember(chat, id));
      remove.setAttribute("aria-label", `${say("remove")} ${name}`);
      return el(
        "li",
        { class: classes("person", { online }) },
        personAvatar(id, chat),
        el("span", { dir: "auto" }, name),
        online ? el("span", { class: "sr-only" }, say("online")) : null,
        el("span", { class: "quiet" }, notes.filter(Boolean).join(", ")),
        removable ? remove : null,
      );
    },
  };
}

/** @param {number} count @returns {Row} */
function moreMembersRow(count) {
  const load = () => void loadMembers();
  return {
    key: "more",
    look: String(count),
    build: () => el("li", {}, textButton(say("andMore", { left: count }), load)),
  };
}

function onInfoRename() {
  const { client, open: chat } = model;
  if (!chat) return;
  void askName(say("rename"), chat.title ?? "", 200, async (text) => {
    await client?.renameChat(chat.id, text || null);
    chat.title = text || null;
  });
}

/** In a direct chat, a group begins. */
function onInfoAdd() {
  const { open: chat } = model;
  dialog("info").close();
  if (chat?.direct) choosePeople(null, others(chat));
  else choosePeople(chat);
}

/** @param {ChatView} chat @param {number} userId the user, who leaves, or another one */
async function removeMember(chat, userId) {
  const leaves = userId === myId();
  const ends = model.server.invites ? ` ${say("linksEnded")}` : "";
  const sure = await ask(
    leaves
      ? {
          title: say("leaveTitle", { title: chatTitle(chat) }),
          text: say("leaveText"),
          yes: say("leave"),
          no: say("stay"),
        }
      : {
          title: say("removeTitle", { name: personName(userId) }),
          text: say("removeText") + ends,
          yes: say("remove"),
          no: say("cancel"),
        },
  );
  if (!sure) return;
  await submit("info-error", async () => {
    const path = `/api/v1/chats/${chat.id}/members/${userId}`;
    await model.client?.request("DELETE", path);
    if (leaves) removeChat(chat.id);
    else dialog("info").querySelector("button")?.focus(); // the row goes
  });
}

/* -------------------------------------------------------------------------------------
 * Notifications. They appear only while the user does not watch the tab, and only after
 * the user has turned them on. A chat can be muted: in this browser, like a draft.
 * ---------------------------------------------------------------------------------- */

async function onNotifyButton() {
  await Notification.requestPermission();
  if (document.activeElement === button("notify")) button("bell").focus();
  requestRender();
}

/** Offers notifications once: to a user who comes back and finds new messages. */
function offerNotifications() {
  const key = "chatd.notify";
  if (button("notify").hidden || readStored(storages.browser, key)) return;
  if (writeSession(storages.browser, "offered", key))
    toast(say("offerNotify"), { text: say("turnOn"), press: onNotifyButton });
}

function onMute() {
  const { open } = model;
  const { checked } = field("info-mute");
  if (open && !writeSession(storages.browser, checked, mutedKey(open)))
    toast(say("noStorage"));
  requestRender();
}

/** @param {ChatView} chat @param {Message} message */
function notify(chat, message) {
  if (window.Notification?.permission !== "granted" || isWatched()) return;
  after(NOTIFY_SECONDS, () => {
    const all = [...chat.messages, chat.last_message];
    const now = all.find((one) => one?.id === message.id) ?? message;
    const seen = chat.read_n >= message.n || isWatched() || now.deleted;
    if (!seen && model.chats.has(chat.id)) showNotification(chat, now);
  });
}

/** @param {ChatView} chat @param {Message} message */
function showNotification(chat, message) {
  const name = personName(message.sender_id);
  const { title } = chat;
  try {
    const shown = new Notification(title ? say("senderIn", { name, title }) : name, {
      body: visibleText(message.content).slice(0, 200),
      tag: `chatd.${myId()}.${chat.id}`, // all tabs of a user share one notification
    });
    shown.addEventListener("click", () => {
      window.focus();
      location.hash = `#chat/${chat.id}`;
      shown.close();
    });
  } catch {
    // Some phones allow notifications only from service workers. chatd has none.
  }
}

/* -------------------------------------------------------------------------------------
 * Start.
 * ---------------------------------------------------------------------------------- */

/**
 * Shows the chats of the session's user and connects. A previous session in this tab
 * ends.
 * @param {Session} session
 */
function start(session) {
  if (model.session?.token === session.token) return;
  loading = true;
  model.client?.disconnect();
  resetModel();
  if (!writeSession(storages.tab, session))
    toast(say("noStorage"));
  const client = new ChatWebSocket({ bearer: session.token });
  model.session = session;
  model.client = client;
  model.names.set(session.user_id, session.name);
  addHandlers(client);
  showScreen("chat");
  requestRender();
  // The socket continues without a gap from the cursor of the list. But a slow list
  // must not delay the connection, nor the notice that there is none.
  const timeout = new Promise((resolve) => {
    after(FIRST_LIST_SECONDS, () => resolve(null));
  });
  void Promise.race([fetchChats(), timeout]).then(() => {
    if (client === model.client) client.connect();
  });
}

function addListeners() {
  const on = (
    /** @type {EventTarget} */ target,
    /** @type {string} */ type,
    /** @type {(event: any) => void} */ handle,
  ) => target.addEventListener(type, handle);
  on(window, "hashchange", onHash);
  if (signedOut) on(signedOut, "message", onSignedOutElsewhere);
  on(window, "beforeunload", onBeforeUnload);
  on(window, "storage", onDraftElsewhere);
  on(window, "storage", requestRender);
  on(document, "keydown", onShortcut);
  // Renders at once: a tab that is hidden now may never get the requested frame.
  on(document, "visibilitychange", onWatched);
  on(window, "focus", onWatched);
  on(box("sign-in-form"), "submit", onSignInForm);
  on(box("join-form"), "submit", onJoinForm);
  on(button("sign-out"), "click", () => void onSignOut());
  on(box("me-panel"), "toggle", showDrafts);
  on(button("drafts-delete"), "click", () => void onDeleteDrafts());
  on(button("banner-retry"), "click", () => model.client?.retry());
  on(button("notify"), "click", () => void onNotifyButton());
  on(box("bell-list"), "click", () => box("bell-panel").hidePopover());
  on(box("skip"), "click", onSkip);
  on(button("jump"), "click", onJump);
  on(box("scroller"), "scroll", () => pane.onScroll());
  on(box("scroller"), "keydown", onMessagesKey);
  on(box("messages"), "click", ({ target }) => {
    if (target.closest(".more")) openActions(target.closest("li"));
  });
  on(box("messages"), "pointerdown", onTouch);
  on(box("messages"), "contextmenu", (event) => {
    if (isTouchOfText(event)) event.preventDefault();
  });
  // The touch that opens the menu clicks on nothing in it.
  on(box("messages"), "touchend", (event) => {
    if (box("menu").matches(":popover-open")) event.preventDefault();
  });
  for (const type of ["pointerup", "pointercancel"])
    on(window, type, () => clearTimeout(longTouch));
  on(box("menu"), "keydown", onMenuKey);
  on(button("edit-cancel"), "click", () => composer.leave());
  on(window, "pagehide", releaseAll);
  on(box("composer"), "submit", (event) => composer.send(event));
  on(composer.field, "input", () => composer.onInput());
  on(composer.field, "keydown", (event) => composer.onKey(event));
  // The focus stays in the field, or else a phone would close its keyboard.
  for (const id of ["send", "jump", "edit-cancel"])
    on(button(id), "mousedown", (event) => event.preventDefault());
  on(document, "keydown", onSearchKey);
  on(button("find"), "click", () => search.open(false));
  on(button("chat-find"), "click", () => search.open(true));
  on(field("search-text"), "input", () => search.start());
  on(field("search-here"), "change", () => search.start());
  on(dialog("search"), "keydown", (event) => search.onKey(event));
  on(box("search-list"), "click", (event) => search.onClick(event));
  on(box("search-list"), "scroll", () => requestRender());
  on(button("search-retry"), "click", () => search.retry());
  on(button("new-chat"), "click", () => choosePeople(null));
  on(button("empty-start"), "click", () => choosePeople(null));
  on(box("people-form"), "submit", onPeopleForm);
  on(box("people-form"), "input", onChoice);
  on(field("people-filter"), "keydown", onFilterKey);
  on(button("chat-info"), "click", showInfo);
  on(box("messages"), "click", onTick);
  on(box("messages"), "copy", onCopy);
  on(button("info-rename"), "click", onInfoRename);
  on(button("info-add"), "click", onInfoAdd);
  on(button("info-invite"), "click", () => void onInvite());
  on(field("info-mute"), "change", onMute);
  on(button("info-leave"), "click", () => {
    if (model.open) void removeMember(model.open, myId());
  });
  on(button("rename-me"), "click", onRenameMe);
  on(button("shortcuts"), "click", showKeys);
  on(button("link-device"), "click", () => void onLinkDevice());
  for (const node of document.querySelectorAll(".close"))
    on(node, "click", () => node.closest("dialog")?.close());
  on(button("link-copy"), "click", onLinkCopy);
  on(button("link-share"), "click", onLinkShare);
  const revoke = () => submit("link-error", () => showInvite(true));
  on(button("link-revoke"), "click", () => void revoke());
  const observer = new ResizeObserver(() => pane.onResize());
  for (const id of ["scroller", "messages"]) observer.observe(box(id));
  if (window.visualViewport) on(window.visualViewport, "resize", onViewport);
  setInterval(onSecond, 1000);
}

/** Dialogs and panels close by themselves. @param {any} event of a key */
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
  if (document.querySelector("dialog[open], :popover-open")) return;
  if (key === "Escape" && model.open) location.hash = "#chats";
  if (key === "?" && !target.matches("input, textarea")) showKeys();
}

function showKeys() {
  box("me-panel").hidePopover();
  dialog("keys").showModal();
}

/** @param {HashChangeEvent} event */
function onHash({ oldURL }) {
  if (!followLink(new URL(oldURL).hash)) route();
}

/** @param {Event} event */
function onSkip(event) {
  event.preventDefault();
  if (model.open) composer.field.focus();
  else moveFocus();
}

function onJump() {
  pane.showLatest(); // at once: smooth scrolling through a long history can make dizzy
  // The button is gone now. The keyboard of a phone stays as it is.
  if (document.activeElement !== composer.field)
    box("scroller").focus({ preventScroll: true });
}

/**
 * If an on-screen keyboard covers a part of the page, as on iOS, the page becomes as
 * high as the other part. To zoom with two fingers changes nothing.
 */
function onViewport() {
  const view = window.visualViewport;
  if (!view || view.scale > 1.01) return;
  const covered = view.height < window.innerHeight - 1;
  if (covered) box("chat").style.setProperty("--view-height", `${view.height}px`);
  else box("chat").style.removeProperty("--view-height");
  window.scrollTo(0, 0);
}

/** The user has come back, perhaps on another day. */
function onWatched() {
  if (isWatched() && [...model.chats.values()].some(counted)) offerNotifications();
  onSecond();
  render();
}

let today = new Date().toDateString();

/** Updates what time changes: the seconds in the banner, and the names of days. */
function onSecond() {
  if (!box("banner").hidden) renderBanner();
  const now = new Date();
  const sameZone = now.getTimezoneOffset() === formats.offset;
  if (sameZone && now.toDateString() === today) return;
  today = now.toDateString();
  if (!sameZone) formats = newFormats();
  requestRender();
}

function begin() {
  if (!("popover" in HTMLElement.prototype)) throw new Error(say("tooOld"));
  addListeners();
  if (followLink()) return;
  const session = sessionToResume();
  if (session) start(session);
  else showSignIn();
}

begin();
