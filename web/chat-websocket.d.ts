/** The types of chat-websocket.js; those of what it sends and receives: protocol.d.ts. */
import type { Client, Message, Options } from "./protocol.js";
export type * from "./protocol.js";

/** A refused or failed request. */
export class ChatError extends Error {
  /**
   * @param status of HTTP, or 0 if the server did not answer
   * @param code of docs/protocol.md; or "unreachable", or "upstream" if a proxy answered
   * @param retryAfter seconds
   */
  constructor(status: number, code: string, message: string, retryAfter?: number);
  status: number;
  code: string;
  retryAfter: number | undefined;
}

/**
 * A dependable connection to chatd (docs/embedding.md): each event comes once and in
 * order, or else "resync". What you send is stored once.
 */
export class ChatWebSocket {
  constructor(options?: Options);
}
export interface ChatWebSocket extends Client {}

/** What users have written but not sent, in storage or else in memory. */
export class Drafts {
  constructor(storage: Storage | null, userId: () => number);
  /** What a reload would lose, by the key of its draft. */
  unstored: Record<string, string>;
  /** Of the draft, in storage and in `unstored`. */
  key(chatId: number | string): string;
  /** `base`: the message that the draft edits, as it was. */
  get(chatId: number): { text: string; base?: Message };
  /** An empty text removes the draft. */
  set(chatId: number, text: string, base?: Message | null): void;
  /** Where this user has drafts. */
  chatIds(): number[];
  /** Drops the oldest drafts of all users, but never the newest. */
  prune(): void;
}
