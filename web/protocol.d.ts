/**
 * The types of chat-websocket.js: the server messages of docs/protocol.md, and the
 * client's own events and options. Only type checkers read this file.
 */

/** A message of a chat. Of two states of one message, the larger `rev` is the newer. */
export interface Message {
  id: number;
  chat_id: number;
  sender_id: number;
  content: string;
  /** UTC, RFC 3339. */
  created_at: string;
  /** Its position in the chat: 1, 2, 3, without holes. */
  n: number;
  client_id?: string;
  /** Grows with each edit or deletion. Without it, the `id` counts as the `rev`. */
  rev?: number;
  /** When it was last edited: UTC, RFC 3339. */
  edited_at?: string;
  /** Then `content` is empty. */
  deleted?: boolean;
}

export interface Member {
  user_id: number;
  name: string | null;
  /** The `n` of the last message that this member has read. */
  read_n: number;
  /** Only in the answers for one chat: chat() and members(). */
  online?: boolean;
}

export interface Chat {
  id: number;
  title: string | null;
  direct: boolean;
  created_by: number | null;
  member_count: number;
  /** Empty if there are many: see members(). */
  members: Member[];
  /** The `n` of its last message; 0: it has none. */
  last_n: number;
  last_message: Message | null;
  /** The `n` of the last message that you have read. */
  read_n?: number;
  unread?: number;
}

/* ---- server messages ---- */

export interface Connected {
  type: "connected";
  user_id: number;
  timestamp: string;
  cursor: string;
  resume: "fresh" | "live" | "replay" | "resync";
  /** The seconds until the token ends. */
  expires_in: number;
  /** By the id of the chat. */
  chats: Record<string, { last_n: number; read_n: number }>;
  /** `chats` has only the most recently active ones. */
  more_chats?: boolean;
}

/**
 * Its sender has read the chat up to it, unless `read` is false: then a service has sent
 * it in the sender's name, and the messages before it are still unread.
 */
export interface NewMessage {
  type: "new_message";
  seq: number;
  chat_id: number;
  message: Message;
  read?: false;
}

export interface MessageRead {
  type: "message_read";
  seq: number;
  chat_id: number;
  message_id: number;
  read_by: number;
  n: number;
}

export interface ChatAdded {
  type: "chat_added";
  seq: number;
  chat_id: number;
  chat: Chat;
}

export interface MemberAdded {
  type: "member_added";
  seq: number;
  chat_id: number;
  user_id: number;
  name: string | null;
}

export interface MemberRemoved {
  type: "member_removed";
  seq: number;
  chat_id: number;
  user_id: number;
}

export interface ChatRenamed {
  type: "chat_renamed";
  seq: number;
  chat_id: number;
  title: string | null;
  /** The user that renamed it; null: a service. */
  user_id: number | null;
}

/**
 * `message` is the newest known state: an edited message may have been deleted since.
 */
export interface Changed<Type extends string> {
  type: Type;
  seq: number;
  chat_id: number;
  message: Message;
}

export interface Typing {
  type: "typing";
  chat_id: number;
  user_id: number;
  is_typing: boolean;
}

export interface Ack {
  type: "ack";
  ref?: string;
  client_id?: string;
  message_id?: number;
  chat_id?: number;
  n?: number;
  created_at?: string;
  duplicate?: boolean;
  rev?: number;
  expires_in?: number;
}

export interface Refusal {
  type: "error";
  code: string;
  message: string;
  ref?: string;
  client_id?: string;
  chat_id?: number;
  message_id?: number;
  /** Seconds. */
  retry_after?: number;
}

/** An event of the event log: it has a `seq`, and moves the cursor. */
export type LoggedEvent =
  | NewMessage
  | MessageRead
  | Changed<"message_edited">
  | Changed<"message_deleted">
  | ChatAdded
  | ChatRenamed
  | MemberAdded
  | MemberRemoved;

/* ---- requests and their answers ---- */

export interface Snapshot {
  chats: Chat[];
  cursor: string;
}

export interface ChatsQuery {
  limit?: number;
  /** The `position` of the page before. */
  before?: string | number;
}

export interface ChatPage extends Snapshot {
  more?: boolean;
  position?: string | number;
}

/** Ids of messages. Without them: the newest messages. */
export interface HistoryQuery {
  before?: number | null;
  after?: number;
  around?: number;
  limit?: number;
}

export interface History {
  /** Oldest first. */
  messages: Message[];
  /** There are older ones. */
  more: boolean;
  /** There are newer ones. */
  more_after?: boolean;
}

export interface SearchQuery {
  /** Up to 8 words, all of which must occur in a message; at most 200 characters. */
  q: string;
  /** Default: all chats of the user. */
  chatId?: number | null;
  /** Goes on from the `before` of the page before. */
  before?: number | null;
}

export interface Found {
  /** Newest first. Any page may be empty. */
  messages: Message[];
  /** null: this was the last page. */
  before: number | null;
}

/** Either some users by their `ids`, at most 100, or a page. */
export interface MembersQuery {
  ids?: number[];
  /** The user_id of the last member of the page before. */
  after?: number;
  limit?: number;
}

export interface MemberPage {
  members: Member[];
  more: boolean;
}

export interface NewChat {
  title?: string | null;
  memberIds: number[];
  /** The only chat between two people. It may be there already. */
  direct?: boolean;
  /** The creator's own name of the chat: the same name is the same chat. */
  clientId?: string;
}

export interface Token {
  token: string;
  /** Seconds. */
  expires_in: number;
}

/** What an invitation is for. */
export interface Preview {
  title: string | null;
  member_count: number;
}

/** A new user, with a session token. */
export interface Joined extends Token {
  user_id: number;
  name: string;
  chat_id: number;
}

/* ---- the client's own events, and its options ---- */

/**
 * The state of the connection:
 * - `connecting`: there is no socket yet, or it was lost less than 5 s ago
 * - `polling`: there is no socket; the client uses HTTP
 * - `offline`: polls fail, too
 * - `signed_out`: the token is no longer valid; call connect with a new one
 * - `too_many`: too many connections; the client waits until the user comes back
 * - `refused`: the server told the client to stay away
 * - `closed`: disconnect was called, or connect was never called
 */
export type State =
  | "connecting"
  | "connected"
  | "polling"
  | "offline"
  | "signed_out"
  | "too_many"
  | "refused"
  | "closed";

export interface StateChange {
  state: State;
  /** Seconds until the next attempt to open a socket; null: none is scheduled. */
  retryIn: number | null;
}

/** The state of a message that you sent, or of a change: an edit or a deletion. */
export interface Delivery {
  /** `discarded` follows `failed`, forget(), a later change, or the same elsewhere. */
  state: "sending" | "sent" | "failed" | "discarded";
  kind: "message" | "edit" | "delete";
  client_id: string;
  /** Of a change, only if the page has given it; otherwise 0. */
  chat_id: number;
  /** Of a change; 0 for a message. */
  message_id: number;
  content: string;
  /** It is in storage and survives a reload; false if storage is full or forbidden. */
  kept: boolean;
  /**
   * The stored message, if `state` is "sent" and no event or answer that came before has
   * brought it.
   */
  message?: Message;
  /**
   * Of the message, after a change that is "sent", if the answer named it: over HTTP not
   * for a deletion, nor for an edit without `ifRev`.
   */
  rev?: number;
  /** The code of the error, if `state` is "failed". */
  code?: string;
  /** The same error as a sentence. */
  reason?: string;
}

/** A message, an edit or a deletion inside the client. */
export interface Unsent
  extends Pick<Delivery, "kind" | "client_id" | "chat_id" | "message_id" | "content"> {
  if_rev?: number | undefined;
  /** Of a change. A page of 1.0 would take a change with a chat_id for a message. */
  chat?: number | undefined;
  /** The epoch of the writing. In another one, message_id may mean another message. */
  epoch?: string;
  /** It is in storage, too. */
  kept: boolean;
  /** On its way, or refused for good. */
  place: "waiting" | "socket" | "http" | "failed";
  /** When it was last sent, as performance.now(). null: never; 0: perhaps long ago. */
  sentAt: number | null;
  /** The error, if it failed. */
  code?: string | undefined;
  reason?: string | undefined;
}

/** The newest message of a chat that the page has marked as read. */
export interface ReadMark {
  messageId: number;
  /** The server has it, or has refused it for good. */
  settled?: boolean;
  /** When it was last sent, as performance.now(). */
  sentAt: number;
  /** Of the next attempt: marks are sent at most once a second. */
  timer?: number;
}

export interface ChatEvents {
  state: StateChange;
  delivery: Delivery;
  /** The answer of fetchChats. */
  chats: Snapshot;
  /** Too much was missed: call fetchChats, and load again what you show. */
  resync: {};
  connected: Connected;
  new_message: NewMessage;
  message_read: MessageRead;
  message_edited: Changed<"message_edited">;
  message_deleted: Changed<"message_deleted">;
  chat_added: ChatAdded;
  chat_renamed: ChatRenamed;
  member_added: MemberAdded;
  member_removed: MemberRemoved;
  typing: Typing;
  ack: Ack;
  error: Refusal;
  pong: { type: "pong"; timestamp: string };
  token_expiring: { type: "token_expiring"; expires_in: number };
  bye: { type: "bye"; retry_after: number };
}

/**
 * A JWT, or a function that fetches one for each connection. If the function throws an
 * error whose `status` is 401, the state becomes `signed_out`.
 */
export type TokenSource = string | (() => string | Promise<string>);

export type StorageLike = Pick<
  Storage,
  "getItem" | "setItem" | "removeItem" | "key" | "length"
>;

export interface Options {
  /** chatd's address. Default: the server that chat-websocket.js came from. */
  server?: string | URL;
  /**
   * The token for HTTP requests. With it, connect() needs no token: the client fetches a
   * ticket, so that the long-lived token is in no URL.
   */
  bearer?: TokenSource;
  /**
   * Where unsent messages are kept across reloads. Default: localStorage; null: nowhere.
   */
  storage?: StorageLike | null;
  /** Where the client writes log lines. Default: the console; null: nowhere. */
  log?: Pick<Console, "log"> | null;
}

/** The methods of ChatWebSocket. */
export interface Client {
  /**
   * Calls `listener` for each event of this type, until the returned function is called.
   */
  on<Type extends keyof ChatEvents>(
    type: Type,
    listener: (event: ChatEvents[Type]) => void,
  ): () => void;
  /** Connects, or connects anew. Without a token it uses tickets, by `bearer`. */
  connect(token?: TokenSource): void;
  /** Closes the connection until the next connect. */
  disconnect(): void;
  /** Disconnects, and drops what is unsent, in all tabs: for signing out. */
  forget(): void;
  /** Tries the socket now, if an attempt is scheduled, or after `too_many`. */
  retry(): void;
  readonly state: State;
  /** Seconds until the next attempt to open a socket; null: none is scheduled. */
  readonly retryIn: number | null;
  /** Of the token; undefined as long as the client does not know it. */
  readonly userId: number | undefined;

  /** Sends a message as soon as possible. Returns the client_id of its deliveries. */
  send(chatId: number, content: string): string;
  /**
   * Edits a message as soon as possible; fails if the message is not at `ifRev`. It
   * replaces edits that failed or were never tried. Deliveries repeat `chatId`. Returns
   * their client_id.
   */
  editMessage(
    messageId: number,
    content: string,
    options?: { ifRev?: number; chatId?: number | undefined },
  ): string;
  /**
   * Deletes a message as soon as possible, and drops its edits that wait and its changes
   * that failed. Deliveries repeat `chatId`. Returns their client_id.
   */
  deleteMessage(messageId: number, options?: { chatId?: number | undefined }): string;
  /**
   * The unsent messages of a chat, oldest first. Without a chat: all that is unsent, edits
   * and deletions too, also of other tabs; this one then sends those, too.
   */
  unsent(chatId?: number): Delivery[];
  /** The edits and deletions that wait or have failed. */
  unsentChanges(): Delivery[];
  /** Sends again what has failed. */
  resend(clientId: string): void;
  /** Drops what has failed. */
  discard(clientId: string): void;
  /** Call it at each key; the typing sign ends 5 s after the last call. */
  sendTyping(chatId: number, isTyping: boolean): void;
  /** Marks the messages of the chat as read, up to this one. */
  markRead(chatId: number, messageId: number): void;

  /**
   * Fetches all chats. Events wait meanwhile: "chats" comes first, then what followed.
   * After a ChatError, try again.
   */
  fetchChats(): Promise<Snapshot>;
  history(chatId: number, where?: HistoryQuery): Promise<History>;
  search(what: SearchQuery, signal?: AbortSignal): Promise<Found>;
  /** One page of the list of chats. */
  chats(page?: ChatsQuery): Promise<ChatPage>;
  chat(chatId: number): Promise<Chat>;
  members(chatId: number, which?: MembersQuery): Promise<MemberPage>;
  createChat(chat: NewChat): Promise<Chat>;
  renameChat(chatId: number, title: string | null): Promise<any>;
  /** For a link to `/#invite=TOKEN`. */
  createInvite(chatId: number, options?: { ttlSeconds?: number }): Promise<Token>;
  /** Revokes all invitations of the chat. */
  revokeInvites(chatId: number): Promise<any>;
  /** Needs no connect. */
  previewInvite(token: string): Promise<Preview>;
  /** Needs no connect. If its answer is lost, trying again makes a second user. */
  joinAsNewUser(token: string, name: string): Promise<Joined>;
  join(token: string): Promise<{ chat_id: number }>;
  renameMe(name: string): Promise<any>;
  /** For a link to `/#token=TOKEN`. */
  linkDevice(): Promise<Token>;
  /**
   * Sends one HTTP request, with the token. `path` is like "/api/v1/chats", `body` is
   * sent as JSON. Returns the answer's JSON; null for 204. Throws a ChatError, as all
   * these requests do: `unreachable` also if `signal` has aborted it. Before connect, it
   * throws a TypeError. An error of the token's function passes through.
   */
  request(method: string, path: string, body?: object, signal?: AbortSignal): Promise<any>;
}
