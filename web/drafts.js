// @ts-check
/**
 * drafts.js: what users have written but not sent, in storage or else in memory.
 * @import { ChatWebSocket, Delivery } from "./chat-websocket.js"
 */

/** All drafts but the newest. localStorage has room for ten times this. */
const MAX_CHARACTERS = 500_000;

export class Drafts {
  /** By key. @type {Record<string, string>} */
  #unstored = {};

  /** @param {Storage | null} storage @param {() => number} userId */
  constructor(storage, userId) {
    this.storage = storage;
    this.userId = userId;
  }

  /** @param {number | string} chatId */
  key(chatId) {
    return `chatd.draft.${this.userId()}.${chatId}`;
  }

  /** @param {number} chatId */
  get(chatId) {
    const key = this.key(chatId);
    return this.#unstored[key] ?? readDraft(this.storage?.getItem(key)).text;
  }

  /** @param {number} chatId @param {string} text "": none */
  set(chatId, text) {
    const key = this.key(chatId);
    this.#unstored[key] = text;
    try {
      if (text) this.storage?.setItem(key, JSON.stringify({ text, at: Date.now() }));
      else this.storage?.removeItem(key);
      if (this.storage || !text) delete this.#unstored[key];
    } catch {
      // Storage is full.
    }
  }

  /** @param {ChatWebSocket} client @param {number} chatId @param {string} text */
  send(client, chatId, text) {
    client.send(chatId, text); // first: a crash must not lose the text
    this.set(chatId, "");
  }

  /** @param {ChatWebSocket} client @param {Delivery} refused */
  takeBack(client, { client_id, chat_id, content }) {
    this.set(chat_id, content);
    client.discard(client_id);
  }

  /** Of this user. @param {string} [prefix] */
  keys(prefix = this.key("")) {
    const all = Object.keys({ ...this.storage, ...this.#unstored });
    return all.filter((key) => key.startsWith(prefix));
  }

  /** Drops the oldest drafts of all users, but never the newest. */
  prune() {
    let room = MAX_CHARACTERS;
    const drafts = this.keys("chatd.draft.").map((key) => {
      return { key, ...readDraft(this.storage?.getItem(key)) };
    });
    for (const { key, text } of drafts.sort((a, b) => b.at - a.at).slice(1)) {
      room -= key.length + text.length;
      if (room < 0) this.storage?.removeItem(key);
    }
  }

  /**
   * Another tab has changed a draft. Returns what a field that shows this text shows
   * now: a text that was sent there must not stay here.
   * @param {StorageEvent} event @param {number} chatId @param {string} shown
   */
  follow({ key, oldValue, newValue }, chatId, shown) {
    const follows = key === this.key(chatId) && shown === readDraft(oldValue).text;
    return follows ? readDraft(newValue).text : shown;
  }
}

/** @param {string | null} [item] @returns {{text: string, at: number}} */
function readDraft(item) {
  try {
    const { text, at } = JSON.parse(item ?? "");
    return { text: String(text), at: Number(at) };
  } catch {
    return { text: "", at: 0 };
  }
}
