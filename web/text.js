// @ts-check
/**
 * text.js: a message as nodes. The signs of code and quotes are hidden, but copied.
 */
import { say } from "./words.js";

const { raw } = String;

/** Many characters that are no white space are invisible, too. @param {string} text */
export function isBlank(text) {
  const visible =
    /[^\s\p{Z}\p{Cc}\p{DI}\u2800\ufff9-\ufffb\u{13441}\u{13442}\u{16fe4}\u{1d159}]/u;
  return !visible.test(text);
}

/** @param {string} content */
export function visibleText(content) {
  return isBlank(content) ? say("blank") : content;
}

/** @param {string} tag @param {string} textContent @param {object} [properties] */
function make(tag, textContent, properties) {
  return Object.assign(document.createElement(tag), { textContent }, properties);
}

/** @param {string} tag @param {string} text */
function hiddenSign(tag, text) {
  return make(tag, text, { className: "sign", ariaHidden: "true" });
}

const EMOJI = new RegExp(raw`^(?:\p{RGI_Emoji}\s*){1,3}$`, "v");
const CODE_BEGINS = /^```[\w+#.-]*[ \t\r]*\n/;
const CODE_ENDS = /^```[ \t\r]*\n?$/;

/** How many more links, codes and quoted lines of a message are shown as such. */
let room = 0;

/** @param {string} content of a message */
export function contentNode(content) {
  const text = visibleText(content);
  const kind = text !== content ? "blank" : EMOJI.test(text) ? "emoji" : "";
  const node = make("div", "", { className: `content ${kind}`, dir: "auto" });
  // The lines that may begin or end a block, and the texts between them.
  const parts = text.split(/^((?:> |```)[^\n]*\n?)/m).filter(Boolean);
  const lastEnd = parts.findLastIndex((part) => CODE_ENDS.test(part));
  /** @type {HTMLElement | null} */
  let quote = null;
  /** @type {HTMLElement | null} */
  let code = null;
  room = 300;
  parts.forEach((part, i) => {
    if (code && CODE_ENDS.test(part)) {
      node.append(hiddenSign("div", part));
      code = null;
    } else if (code) {
      code.append(part);
    } else if (room > 0 && part.startsWith("> ")) {
      room--;
      if (!quote) node.append((quote = make("blockquote", "")));
      quote.append(hiddenSign("span", "> "));
      return appendText(quote, part.slice(2));
    } else if (i < lastEnd && room > 0 && CODE_BEGINS.test(part)) {
      room--;
      code = make("code", "", { tabIndex: 0 });
      const pre = make("pre", "", { dir: "ltr" });
      pre.append(code);
      node.append(hiddenSign("div", part), pre);
    } else {
      appendText(node, part);
    }
    quote = null;
  });
  return node;
}

/** Without case, accents and widths, as the server's search. @param {string} text */
export function folded(text) {
  return [...text]
    .map((one) => one.normalize("NFKD").toUpperCase().toLowerCase())
    .join("")
    .replace(/(?![\u3099\u309a])\p{Mn}/gu, "") // those two make other letters
    .normalize("NFC");
}

/** The text around the first match. @param {string} content @param {string} query */
export function markedNode(content, query) {
  const words = query.split(/\s+/).map(folded).filter(Boolean);
  const escaped = (/** @type {string} */ one) => one.replace(/[^\p{L}\p{N}]/u, "\\$&");
  const pattern = words.map((word) => [...word].map(escaped).join("\0*")).join("|");
  // \0 stands between letters, \x01 and \x02 around matches: no message has them.
  const letters = [...new Intl.Segmenter().segment(content)].map((one) => one.segment);
  const all = letters.map(folded).join("\0");
  const parts = all.replace(new RegExp(pattern, "g"), "\x01$&\x02").split("\0");
  const first = parts.findIndex((part) => part.includes("\x01"));
  const start = Math.max(0, first - 30);
  const node = make("span", start > 0 ? "…" : "");
  let target = node;
  letters.slice(start, start + 200).forEach((letter, i) => {
    const part = parts[start + i] ?? "";
    if (part.includes("\x01")) node.append((target = make("mark", "")));
    target.append(letter);
    if (/\x02[^\x01]*$/.test(part)) target = node;
  });
  node.normalize(); // or else Safari does not join Arabic letters
  return node;
}

// A sentence may go on right after an address, so all that could belong to the address
// is taken, and then the rest is cut off.

/** No mark outside of ASCII that ends a sentence; but ’ is part of French titles. */
const IN_ADDRESS =
  raw`(?!(?![\x00-\x7f’])[\p{Term}\p{Ps}\p{Pe}\p{Pi}\p{Pf}…—―〜\uff01-\uff20` +
  raw`\uff3b-\uff40\uff5b-\uff65])` +
  /[^\s\p{Cc}<>"`\\\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f]/u.source;
const PART = new RegExp(
  [
    /(?<!`)(?<ticks>`{1,3})(?=[ \t]*[^`\s])(?<code>[^`\n]+)\k<ticks>(?!`)/u.source,
    raw`(?<web>(?<![a-z\d])https?://(?:${IN_ADDRESS}){1,4000})`,
    raw`(?<![a-z\d@./-])www\.(?:${IN_ADDRESS}){1,4000}`,
    raw`(?<mail>(?<![\p{Script=Latin}\p{N}._%+/@-])` +
      raw`[a-z\d](?:[a-z\d._%+'-]{0,62}[a-z\d_+-])?@` +
      raw`(?:[\p{L}\p{N}](?:[\p{L}\p{N}-]{0,61}[\p{L}\p{N}])?\.){1,9}` +
      // The last part is ASCII, or has none: other text may follow without a space.
      raw`(?:xn--[a-z\d-]{2,59}|[a-z]{2,63}|(?:(?![\x00-\x7f])\p{L}){2,63})` +
      raw`(?![a-z\d@_]|[:/][a-z\d]))`, // git@host:path is no mail address
  ].join("|"),
  "giu",
);
/** All but the signs at the end. */
const KEPT = /^.*(?![.,:;!?*'~|([{]|(?![\x00-\x7f])[\p{P}\p{S}\ufe0f\u200d])./su;

/** @param {Element} node @param {string} text */
function appendText(node, text) {
  let done = 0;
  PART.lastIndex = 0;
  for (let match; room > 0 && (match = PART.exec(text)); room--) {
    const { ticks, code = "", web, mail } = match.groups ?? {};
    const before = text.slice(done, match.index);
    if (ticks) {
      const tick = () => hiddenSign("span", ticks);
      node.append(before, tick(), make("code", code), tick());
      done = PART.lastIndex;
      continue;
    }
    const address = mail ?? addressIn(match[0], text[match.index - 1] ?? " ");
    const href = mail ? `mailto:${mail}` : web ? address : `https://${address}`;
    // What is cut off may begin with the next address.
    PART.lastIndex = match.index + Math.max(address.length, "www.".length);
    if (!mail && !isWebAddress(href, web ? 1 : 3)) continue;
    const target = mail ? "" : "_blank";
    const rel = "noopener noreferrer nofollow";
    node.append(before, make("a", address, { href, target, rel }));
    done = match.index + address.length;
  }
  node.append(text.slice(done));
}

/** @param {string} found @param {string} before the character before it */
function addressIn(found, before) {
  const [first = ""] = found.split(/[,;|]+(?=https?:\/\/|www\.)/iu, 1);
  const end = before === "‘" ? "’" : "'*|".includes(before) ? before : "**";
  const [inside = ""] = first.split(end, 1);
  const address = withoutTextAfterHost(untilClosed(inside));
  const [short = ""] = KEPT.exec(address) ?? [];
  return before === "_" ? short.replace(/(?<!_)_+$/, "") : short;
}

/** Ends where a bracket closes that was not opened here. @param {string} address */
function untilClosed(address) {
  const open = [];
  for (const { 0: sign, index } of address.matchAll(/[()[\]{}]/g)) {
    const opening = "([{"[")]}".indexOf(sign)];
    if (!opening) open.push(sign);
    else if (open.pop() !== opening) return address.slice(0, index);
  }
  return address;
}

/** As in "example.comを見て" and "example.com's". @param {string} address */
function withoutTextAfterHost(address) {
  const [host = ""] = /^(?:https?:\/\/)?[^/?#]*/iu.exec(address) ?? [];
  const start = host.search(/(?<![^./@])[^./@]*$/);
  const label =
    /^(?:[a-z\d-]{2,}|\d+)(?::\d*)?(?=[!$&'()*+,;=|]|(?!\p{M})[^\x00-\u024f])/iu;
  const [last] = label.exec(host.slice(start)) ?? [];
  return last ? address.slice(0, start + last.length) : address;
}

/** @param {string} href @param {number} labels that its host has at least */
function isWebAddress(href, labels) {
  const host = URL.canParse(href) ? new URL(href).hostname : "";
  return host.split(".").filter(Boolean).length >= labels;
}
