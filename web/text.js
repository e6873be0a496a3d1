// @ts-check
/**
 * text.js: the texts of messages as nodes: links, `code`, blocks of code, quotes and
 * large emoji. Text is never markup. A node has the whole text of its message, also the
 * signs of code and quotes: they are hidden, but copied. Long texts are walked once.
 */
import { say } from "./words.js";

/** A character that can be seen. Many that are not white space leave nothing to see. */
const VISIBLE =
  /[^\s\p{Z}\p{Cc}\p{DI}\u2800\ufff9-\ufffb\u{13441}\u{13442}\u{16fe4}\u{1d159}]/u;
/** So many links, codes and quoted lines of one message are shown as such. */
const MAX_PARTS = 300;

/** Whether nothing of the text can be seen. @param {string} text */
export function isBlank(text) {
  return !VISIBLE.test(text);
}

/** What a message is shown as. @param {string} content */
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

const EMOJI = new RegExp("^(?:\\p{RGI_Emoji}\\s*){1,3}$", "v");
/** A line that begins code, or one of a quote. */
const BLOCK = /^(?:```[\w+#.-]*[ \t\r]*\n|> [^\n]*\n?)/gm;
const CODE_END = /^```[ \t\r]*(?:\n|$)/gm;

/** How many more parts the message that is being shown may have. */
let room = 0;

/** @param {string} content of a message */
export function contentNode(content) {
  const text = visibleText(content);
  const emoji = text.length < 100 && EMOJI.test(text) ? "emoji" : "";
  const className = `content ${text === content ? emoji : "blank"}`;
  const node = make("div", "", { className, dir: "auto" });
  /** @type {HTMLElement | null} */
  let quote = null;
  let done = 0;
  let canEnd = true;
  room = MAX_PARTS;
  BLOCK.lastIndex = 0;
  for (let block; room > 0 && (block = BLOCK.exec(text)); room--) {
    const [line] = block;
    const before = text.slice(done, block.index);
    if (before) quote = null;
    if (line.startsWith(">")) {
      appendText(node, before);
      if (!quote) node.append((quote = make("blockquote", "")));
      quote.append(hiddenSign("span", "> "));
      appendText(quote, line.slice(2));
    } else if (canEnd) {
      const start = (CODE_END.lastIndex = BLOCK.lastIndex);
      const end = CODE_END.exec(text);
      canEnd = end !== null;
      if (!end) continue;
      const code = text.slice(start, end.index);
      const pre = make("pre", "", { dir: "ltr" });
      pre.append(make("code", code, { tabIndex: 0 }));
      appendText(node, before);
      node.append(hiddenSign("div", line), pre, hiddenSign("div", end[0]));
      BLOCK.lastIndex = CODE_END.lastIndex;
      quote = null;
    } else continue;
    done = BLOCK.lastIndex;
  }
  appendText(node, text.slice(done));
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

/** A syllable of Hangul, or any character, with its marks. */
const LETTER = /(?:[\u1100-\u115f][\u1160-\u11ff]+|[^])\p{M}*/gu;
const RESULT_LETTERS = 200;
const RESULT_LETTERS_BEFORE = 30;

/**
 * The text around the first match of a search, with the words of the query marked.
 * @param {string} content
 * @param {string} query
 */
export function markedNode(content, query) {
  const words = query.split(/\s+/).map(folded).filter(Boolean);
  const escaped = (/** @type {string} */ one) => one.replace(/[^\p{L}\p{N}]/u, "\\$&");
  const pattern = words.map((word) => [...word].map(escaped).join("\0*")).join("|");
  // \0 stands between letters, \1 and \2 around matches: no message has them.
  const letters = content.match(LETTER) ?? [];
  const all = letters.map(folded).join("\0");
  const parts = all.replace(new RegExp(pattern, "g"), "\x01$&\x02").split("\0");
  const first = parts.findIndex((part) => part.includes("\x01"));
  const start = Math.max(0, first - RESULT_LETTERS_BEFORE);
  const node = make("span", start > 0 ? "…" : "", { dir: "auto" });
  let target = node;
  letters.slice(start, start + RESULT_LETTERS).forEach((letter, i) => {
    const part = parts[start + i] ?? "";
    if (part.includes("\x01")) node.append((target = make("mark", "")));
    target.append(letter);
    if (/\x02[^\x01]*$/.test(part)) target = node;
  });
  return node;
}

/* -------------------------------------------------------------------------------------
 * Links: http and https, www. and mail addresses. A sentence may go on right after an
 * address, so the page takes all that could belong to it, and then cuts off the rest.
 * ---------------------------------------------------------------------------------- */

/**
 * A character of an address: no white space, no quote, and no mark outside of ASCII
 * that ends a sentence, opens or closes. (But ’ may be part of a French title.)
 */
const IN_ADDRESS =
  "(?!(?![\\x00-\\x7f’])[\\p{Term}\\p{Ps}\\p{Pe}\\p{Pi}\\p{Pf}…—―〜" +
  "\\uff01-\\uff20\\uff3b-\\uff40\\uff5b-\\uff65])" +
  '[^\\s\\p{Cc}<>"`\\\\\\u200b\\u200e\\u200f\\u202a-\\u202e\\u2060-\\u206f]';
const LABEL = "[\\p{L}\\p{N}](?:[\\p{L}\\p{N}-]{0,61}[\\p{L}\\p{N}])?";
const PART = new RegExp(
  [
    "(?<!`)(?<ticks>`{1,3})(?=[ \\t]*[^`\\s])(?<code>[^`\\n]+)\\k<ticks>(?!`)",
    `(?<web>(?<![a-z\\d])https?://(?:${IN_ADDRESS}){1,4000})`,
    `(?<www>(?<![a-z\\d@./-])www\\.(?:${IN_ADDRESS}){1,4000})`,
    "(?<mail>(?<![\\p{Script=Latin}\\p{N}._%+/@-])" +
      `[a-z\\d](?:[a-z\\d._%+'-]{0,62}[a-z\\d_+-])?@(?:${LABEL}\\.){1,9}` +
      // The last part is ASCII, or has none: other text may follow without a space.
      "(?:xn--[a-z\\d-]{2,59}|[a-z]{2,63}|(?:(?![\\x00-\\x7f])\\p{L}){2,63})" +
      "(?![a-z\\d@_]|[:/][a-z\\d]))", // git@host:path is no mail address
  ].join("|"),
  "giu",
);
/** All but the signs at the end that belong to the sentence. */
const KEPT = /^.*(?![.,:;!?*'~|([{]|(?![\x00-\x7f])[\p{P}\p{S}\ufe0f\u200d])./su;

/** Appends text with its links and codes. @param {Element} node @param {string} text */
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
    const address = mail ?? addressIn(match[0], text[match.index - 1] ?? "");
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

/**
 * Cuts off what belongs to the sentence around the address.
 * @param {string} found
 * @param {string} before the character before it
 */
function addressIn(found, before) {
  const list = /[,;|]+(?=https?:\/\/|www\.)|\*\*/iu; // the next address, bold text
  const [first = ""] = found.split(list, 1);
  const end = before === "‘" ? "’" : "'*|".includes(before) ? before : "";
  const [inside = ""] = end ? first.split(end, 1) : [first];
  const address = withoutTextAfterHost(inside.slice(0, closedAt(inside)));
  const [short = ""] = KEPT.exec(address) ?? [];
  return before === "_" ? short.replace(/(?<!_)_+$/, "") : short;
}

/** The place of the first bracket that closes and was not opened in the address. */
function closedAt(/** @type {string} */ address) {
  const open = [];
  for (let i = 0; i < address.length; i++) {
    const sign = address[i] ?? "";
    const opening = "([{"[")]}".indexOf(sign)];
    if ("([{".includes(sign)) open.push(sign);
    else if (opening && open.pop() !== opening) return i;
  }
  return address.length;
}

/**
 * In "example.comを見て" and "example.com's" a text follows the host: the last part of
 * a host never mixes ASCII with another script, and has no punctuation.
 * @param {string} address
 */
function withoutTextAfterHost(address) {
  const [host = ""] = /^(?:https?:\/\/)?[^/?#]*/iu.exec(address) ?? [];
  const start = Math.max(...[".", "/", "@"].map((sign) => host.lastIndexOf(sign))) + 1;
  const label =
    /^(?:[a-z\d-]{2,}|\d+)(?::\d*)?(?=[!$&'()*+,;=|]|(?!\p{M})[^\x00-\u024f])/iu;
  const [last] = label.exec(host.slice(start)) ?? [];
  return last ? address.slice(0, start + last.length) : address;
}

/** @param {string} text @param {number} labels that its host has at least */
function isWebAddress(text, labels) {
  try {
    return new URL(text).hostname.split(".").filter(Boolean).length >= labels;
  } catch {
    return false;
  }
}
