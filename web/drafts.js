// @ts-check
/** drafts.js: what users have written but not sent, in storage or else in memory. */

const PREFIX = "chatd.draft.";
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
    return `${PREFIX}${this.userId()}.${chatId}`;
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

  /** Where this user has drafts. */
  chatIds() {
    const prefix = this.key("");
    const keys = Object.keys({ ...this.storage, ...this.#unstored });
    return keys
      .filter((key) => key.startsWith(prefix))
      .map((key) => Number(key.slice(prefix.length)));
  }

  /** Drops the oldest drafts of all users, but never the newest. */
  prune() {
    let room = MAX_CHARACTERS;
    const drafts = Object.entries({ ...this.storage })
      .filter(([key]) => key.startsWith(PREFIX))
      .map(([key, item]) => ({ key, item, at: readDraft(item).at }))
      .sort((a, b) => b.at - a.at);
    for (const { key, item } of drafts.slice(1)) {
      room -= key.length + item.length;
      if (room < 0) this.storage?.removeItem(key);
    }
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
