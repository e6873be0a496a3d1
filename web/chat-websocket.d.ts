/**
 * chat-websocket.js: a dependable connection to chatd, for any page.
 *
 *     import { ChatWebSocket } from "https://chat.example.com/web/chat-websocket.js";
 *
 *     const chat = new ChatWebSocket();
 *     chat.on("new_message", ({ message }) => show(message));
 *     chat.connect(token);                  // or: chat.connect(async () => newToken())
 *     chat.send(3, "Hello");                // sent again until it is stored
 *
 * It makes three promises:
 *
 * - Every event of your chats reaches your listeners once and in order, or "resync"
 *   tells you to fetch your chats again. The client keeps the server's cursor.
 * - A message that you send is stored once. It stays in localStorage until the server's
 *   ack, and the server stores each client_id once. Edits and deletions wait in line.
 * - The client reconnects by itself, after a random delay, so that ten thousand pages
 *   do not reconnect at once. After 5 s without a socket it polls, and tries the socket
 *   again every 30 s.
 *
 * Only typing is best effort. This file needs no other file.
 */
export type Message = {
    id: number;
    chat_id: number;
    sender_id: number;
    content: string;
    /**
     * UTC, RFC 3339
     */
    created_at: string;
    /**
     * its position in the chat: 1, 2, 3, without holes
     */
    n: number;
    client_id?: string;
    rev?: number;
    edited_at?: string;
    deleted?: boolean;
};
export type Member = {
    user_id: number;
    name: string | null;
    read_n: number;
    online?: boolean;
};
export type Chat = {
    id: number;
    title: string | null;
    direct: boolean;
    created_by: number | null;
    member_count: number;
    /**
     * empty if there are many: see members()
     */
    members: Member[];
    /**
     * the `n` of its last message; 0: it has none
     */
    last_n: number;
    last_message: Message | null;
    /**
     * the `n` of the last message that you have read
     */
    read_n?: number;
    unread?: number;
};
export type Connected = {
    type: "connected";
    user_id: number;
    timestamp: string;
    cursor: string;
    resume: "fresh" | "live" | "replay" | "resync";
    /**
     * seconds
     */
    expires_in: number;
    chats: Record<string, {
        last_n: number;
        read_n: number;
    }>;
    /**
     * `chats` has only the newest ones
     */
    more_chats?: boolean;
};
export type NewMessage = {
    type: "new_message";
    seq: number;
    chat_id: number;
    message: Message;
    read?: false;
};
export type MessageRead = {
    type: "message_read";
    seq: number;
    message_id: number;
    chat_id: number;
    read_by: number;
    n: number;
};
export type ChatAdded = {
    type: "chat_added";
    seq: number;
    chat_id: number;
    chat: Chat;
};
export type MemberAdded = {
    type: "member_added";
    seq: number;
    chat_id: number;
    user_id: number;
    name: string | null;
};
export type MemberRemoved = {
    type: "member_removed";
    seq: number;
    chat_id: number;
    user_id: number;
};
export type ChatRenamed = {
    type: "chat_renamed";
    seq: number;
    chat_id: number;
    title: string | null;
    user_id: number | null;
};
export type Changed<Type extends string> = {
    type: Type;
    seq: number;
    chat_id: number;
    message: Message;
};
export type Typing = {
    type: "typing";
    chat_id: number;
    user_id: number;
    is_typing: boolean;
};
export type Ack = {
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
};
export type Refusal = {
    type: "error";
    code: string;
    message: string;
    ref?: string;
    client_id?: string;
    chat_id?: number;
    message_id?: number;
    retry_after?: number;
};
export type LoggedEvent = NewMessage | MessageRead | Changed<"message_edited"> | Changed<"message_deleted"> | ChatAdded | ChatRenamed | MemberAdded | MemberRemoved;
export type State = "connecting" | "connected" | "polling" | "offline" | "signed_out" | "too_many" | "refused" | "closed";
export type StateChange = {
    state: State;
    /**
     * seconds until the next attempt to open a socket;
     * null: none is scheduled
     */
    retryIn: number | null;
};
export type Delivery = {
    state: "sending" | "sent" | "failed" | "discarded";
    kind: "message" | "edit" | "delete";
    client_id: string;
    /**
     * of a message; 0 for a change
     */
    chat_id: number;
    /**
     * of a change; 0 for a message
     */
    message_id: number;
    content: string;
    /**
     * it is in storage and survives a reload; false if storage is
     * full or forbidden
     */
    kept: boolean;
    /**
     * the stored message, if `state` is "sent" and no event
     * or answer that came before has brought it
     */
    message?: Message;
    /**
     * the code of the error, if `state` is "failed"
     */
    code?: string;
    /**
     * the same error as a sentence
     */
    reason?: string;
};
export type Snapshot = {
    chats: Chat[];
    cursor: string;
};
export type ChatPage = Snapshot & {
    more?: boolean;
    position?: string | number;
};
export type History = {
    messages: Message[];
    more: boolean;
    more_after?: boolean;
};
export type Token = {
    token: string;
    expires_in: number;
};
export type ChatEvents = {
    state: StateChange;
    delivery: Delivery;
    /**
     * the answer of fetchChats
     */
    chats: Snapshot;
    /**
     * too much was missed: call fetchChats, and load again what you
     * show
     */
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
    pong: {
        type: "pong";
        timestamp: string;
    };
    token_expiring: {
        type: "token_expiring";
        expires_in: number;
    };
    bye: {
        type: "bye";
        retry_after: number;
    };
};
export type TokenSource = string | (() => string | Promise<string>);
export type StorageLike = Pick<Storage, "getItem" | "setItem" | "removeItem" | "key" | "length">;
export type Options = {
    /**
     * chatd's address. Default: the server that this file
     * came from.
     */
    server?: string | URL;
    /**
     * the token for HTTP requests. With it, connect()
     * needs no token: the client fetches a ticket, so that the long-lived token is in no
     * URL.
     */
    bearer?: TokenSource;
    /**
     * where unsent messages are kept across
     * reloads. Default: localStorage; null: nowhere.
     */
    storage?: StorageLike | null;
    /**
     * where the client writes log lines.
     * Default: the console; null: nowhere.
     */
    log?: Pick<Console, "log"> | null;
};
/**
 * `rev` grows with each edit or deletion; without it, the `id` counts as the `rev`.
 * @typedef {object} Message
 * @property {number} id
 * @property {number} chat_id
 * @property {number} sender_id
 * @property {string} content
 * @property {string} created_at UTC, RFC 3339
 * @property {number} n its position in the chat: 1, 2, 3, without holes
 * @property {string} [client_id]
 * @property {number} [rev]
 * @property {string} [edited_at]
 * @property {boolean} [deleted]
 */
/**
 * @typedef {{user_id: number, name: string | null, read_n: number,
 *   online?: boolean}} Member
 */
/**
 * @typedef {object} Chat
 * @property {number} id
 * @property {string | null} title
 * @property {boolean} direct
 * @property {number | null} created_by
 * @property {number} member_count
 * @property {Member[]} members empty if there are many: see members()
 * @property {number} last_n the `n` of its last message; 0: it has none
 * @property {Message | null} last_message
 * @property {number} [read_n] the `n` of the last message that you have read
 * @property {number} [unread]
 */
/**
 * @typedef {object} Connected
 * @property {"connected"} type
 * @property {number} user_id
 * @property {string} timestamp
 * @property {string} cursor
 * @property {"fresh" | "live" | "replay" | "resync"} resume
 * @property {number} expires_in seconds
 * @property {Record<string, {last_n: number, read_n: number}>} chats
 * @property {boolean} [more_chats] `chats` has only the newest ones
 */
/**
 * Its sender has read the chat up to it, unless `read` is false: then a service has sent
 * it in the sender's name, and the messages before it are still unread.
 * @typedef {{type: "new_message", seq: number, chat_id: number,
 *   message: Message, read?: false}} NewMessage
 */
/**
 * @typedef {{type: "message_read", seq: number, message_id: number, chat_id: number,
 * read_by: number, n: number}} MessageRead
 */
/**
 * @typedef {{type: "chat_added", seq: number, chat_id: number, chat: Chat}} ChatAdded
 */
/**
 * @typedef {{type: "member_added", seq: number, chat_id: number, user_id: number,
 * name: string | null}} MemberAdded
 */
/**
 * @typedef {{type: "member_removed", seq: number, chat_id: number,
 *   user_id: number}} MemberRemoved
 */
/**
 * @typedef {{type: "chat_renamed", seq: number, chat_id: number,
 *   title: string | null, user_id: number | null}} ChatRenamed
 */
/**
 * `message` is the newest known state: an edited message may have been deleted since.
 * @template {string} Type
 * @typedef {{type: Type, seq: number, chat_id: number, message: Message}} Changed
 */
/**
 * @typedef {{type: "typing", chat_id: number, user_id: number,
 *   is_typing: boolean}} Typing
 */
/**
 * @typedef {{type: "ack", ref?: string, client_id?: string, message_id?: number,
 * chat_id?: number, n?: number, created_at?: string, duplicate?: boolean, rev?: number,
 * expires_in?: number}} Ack
 */
/**
 * @typedef {{type: "error", code: string, message: string, ref?: string,
 * client_id?: string, chat_id?: number, message_id?: number, retry_after?: number
 * }} Refusal
 */
/**
 * @typedef {NewMessage | MessageRead | Changed<"message_edited">
 *   | Changed<"message_deleted"> | ChatAdded | ChatRenamed | MemberAdded
 *   | MemberRemoved} LoggedEvent
 */
/**
 * The state of the connection:
 * - `connecting`: there is no socket yet, or it was lost less than 5 s ago
 * - `polling`: there is no socket; the client uses HTTP
 * - `offline`: polls fail, too
 * - `signed_out`: the token is no longer valid; call connect with a new one
 * - `too_many`: too many connections; the client waits until the user comes back
 * - `refused`: the server told the client to stay away
 * - `closed`: disconnect was called, or connect was never called
 * @typedef {"connecting" | "connected" | "polling" | "offline" | "signed_out"
 *   | "too_many"
 *   | "refused" | "closed"} State
 */
/**
 * @typedef {object} StateChange
 * @property {State} state
 * @property {number | null} retryIn seconds until the next attempt to open a socket;
 *   null: none is scheduled
 */
/**
 * The state of a message that you sent, or of a change: an edit or a deletion.
 * `discarded` follows `failed`, forget(), a later change, or the same in another tab.
 * @typedef {object} Delivery
 * @property {"sending" | "sent" | "failed" | "discarded"} state
 * @property {"message" | "edit" | "delete"} kind
 * @property {string} client_id
 * @property {number} chat_id of a message; 0 for a change
 * @property {number} message_id of a change; 0 for a message
 * @property {string} content
 * @property {boolean} kept it is in storage and survives a reload; false if storage is
 *   full or forbidden
 * @property {Message} [message] the stored message, if `state` is "sent" and no event
 *   or answer that came before has brought it
 * @property {string} [code] the code of the error, if `state` is "failed"
 * @property {string} [reason] the same error as a sentence
 */
/** @typedef {{chats: Chat[], cursor: string}} Snapshot */
/** @typedef {Snapshot & {more?: boolean, position?: string | number}} ChatPage */
/** @typedef {{messages: Message[], more: boolean, more_after?: boolean}} History */
/** @typedef {{token: string, expires_in: number}} Token */
/**
 * @typedef {object} ChatEvents
 * @property {StateChange} state
 * @property {Delivery} delivery
 * @property {Snapshot} chats the answer of fetchChats
 * @property {{}} resync too much was missed: call fetchChats, and load again what you
 *   show
 * @property {Connected} connected
 * @property {NewMessage} new_message
 * @property {MessageRead} message_read
 * @property {Changed<"message_edited">} message_edited
 * @property {Changed<"message_deleted">} message_deleted
 * @property {ChatAdded} chat_added
 * @property {ChatRenamed} chat_renamed
 * @property {MemberAdded} member_added
 * @property {MemberRemoved} member_removed
 * @property {Typing} typing
 * @property {Ack} ack
 * @property {Refusal} error
 * @property {{type: "pong", timestamp: string}} pong
 * @property {{type: "token_expiring", expires_in: number}} token_expiring
 * @property {{type: "bye", retry_after: number}} bye
 */
/** @typedef {string | (() => string | Promise<string>)} TokenSource */
/**
 * @typedef {Pick<Storage, "getItem" | "setItem" | "removeItem" | "key" | "length">
 *   } StorageLike
 */
/**
 * @typedef {object} Options
 * @property {string | URL} [server] chatd's address. Default: the server that this file
 *   came from.
 * @property {TokenSource} [bearer] the token for HTTP requests. With it, connect()
 *   needs no token: the client fetches a ticket, so that the long-lived token is in no
 *   URL.
 * @property {StorageLike | null} [storage] where unsent messages are kept across
 *   reloads. Default: localStorage; null: nowhere.
 * @property {Pick<Console, "log"> | null} [log] where the client writes log lines.
 *   Default: the console; null: nowhere.
 */
/** A request that was refused (`status` is the HTTP status) or not answered (0). */
export declare class ChatError extends Error {
    status: number;
    code: string;
    retryAfter: number | undefined;
    /**
     * @param {number} status
     * @param {string} code chatd's error code, e.g. "not_found"; "unreachable" if
     *   `status` is 0
     * @param {string} message a sentence for the user
     * @param {number} [retryAfter] seconds
     */
    constructor(status: number, code: string, message: string, retryAfter?: number);
}
export type Unsent = {
    kind: Delivery["kind"];
    client_id: string;
    chat_id: number;
    message_id: number;
    content: string;
    if_rev?: number | undefined;
    /**
     * in another one, message_id may mean another message
     */
    epoch?: string;
    /**
     * it is in storage, too
     */
    kept: boolean;
    /**
     * on its way, or refused
     */
    place: "waiting" | "socket" | "http" | "failed";
    /**
     * when it was last sent over the socket, as now()
     */
    sentAt: number;
    /**
     * it may have been sent
     */
    tried: boolean;
    /**
     * the code of the error, if it failed
     */
    code?: string | undefined;
    reason?: string | undefined;
};
export declare class ChatWebSocket {
    #private;
    /** @param {Options} [options] */
    constructor(options?: Options);
    /**
     * Calls `listener` for each event of this type, until the returned function is
     * called. An exception in a listener is reported as an uncaught error.
     * @template {keyof ChatEvents} Type
     * @param {Type} type
     * @param {(event: ChatEvents[Type]) => void} listener
     * @returns {() => void}
     */
    on<Type extends keyof ChatEvents>(type: Type, listener: (event: ChatEvents[Type]) => void): () => void;
    /**
     * Connects, until disconnect is called; "state" events report the progress. A second
     * call reconnects with the new token.
     * @param {TokenSource} [token] a JWT, or a function that fetches one for each
     *   connection. If it throws an error whose `status` is 401, the client stops
     *   (`signed_out`). If it returns tickets (GET /api/v2/ws-token), which cannot poll,
     *   also pass `bearer` to the constructor. Default: the client fetches tickets.
     */
    connect(token?: TokenSource): void;
    /** Closes the connection until the next connect. Unsent messages are kept. */
    disconnect(): void;
    /** Like disconnect, and discards the user's unsent messages: for signing out. */
    forget(): void;
    /** Tries to open the socket now, if an attempt is scheduled, or in `too_many`. */
    retry(): void;
    /** @returns {State} */
    get state(): State;
    /** Seconds until the next attempt to open a socket; null: none is scheduled. */
    get retryIn(): number | null;
    /** The user's id; undefined until it is known. */
    get userId(): number | undefined;
    /**
     * Sends a message now, or as soon as possible, even after a reload. "delivery" events
     * report its state.
     * @param {number} chatId
     * @param {string} content
     * @returns {string} its client_id
     */
    send(chatId: number, content: string): string;
    /**
     * Edits a message like send. Replaces edits of it that failed or were never tried.
     * @param {number} messageId
     * @param {string} content
     * @param {{ifRev?: number}} [options] the `rev`, or else the `id`, of the message
     *   that the user has edited: if it was changed since, the edit fails ("changed")
     * @returns {string} its client_id
     */
    editMessage(messageId: number, content: string, { ifRev }?: {
        ifRev?: number;
    }): string;
    /**
     * Deletes a message like send. Drops its edits that wait, and changes that failed.
     * @param {number} messageId
     * @returns {string} its client_id
     */
    deleteMessage(messageId: number): string;
    /**
     * The unsent messages of a chat, oldest first.
     * @param {number} chatId
     * @returns {Delivery[]}
     */
    unsent(chatId: number): Delivery[];
    /** The edits and deletions that wait or have failed, oldest first. */
    unsentChanges(): Delivery[];
    /** Sends again what has failed. @param {string} clientId */
    resend(clientId: string): void;
    /** Drops what has failed. @param {string} clientId */
    discard(clientId: string): void;
    /**
     * Shows the other members that the user is typing. Call it at each key; the typing
     * sign ends by itself 5 s after the last call.
     * @param {number} chatId
     * @param {boolean} isTyping
     */
    sendTyping(chatId: number, isTyping: boolean): void;
    /**
     * Marks a chat as read up to this message. The mark is sent at most once a second for
     * each chat, and again until the server answers.
     * @param {number} chatId
     * @param {number} messageId
     */
    markRead(chatId: number, messageId: number): void;
    /**
     * Fetches all chats of the user. Events wait meanwhile: "chats" comes first, then the
     * events after it. Call it before connect if you passed `bearer`, otherwise at the
     * first "connected"; and call it at each "resync".
     * @returns {Promise<Snapshot>}
     * @throws {ChatError} the events that waited are delivered anyway; try again
     */
    fetchChats(): Promise<Snapshot>;
    /**
     * Fetches messages, oldest first: the newest, or those before, after or around an id.
     * @param {number} chatId
     * @param {{before?: number | null, after?: number, around?: number,
     *   limit?: number}} [where]
     * @returns {Promise<History>}
     */
    history(chatId: number, where?: {
        before?: number | null;
        after?: number;
        around?: number;
        limit?: number;
    }): Promise<History>;
    /**
     * Searches messages for all words of `q`, newest first. Any page may be empty: go on
     * with its `before` until that is null.
     * @param {{q: string, chatId?: number, before?: number | null}} what
     * @param {AbortSignal} [signal] ends the request
     * @returns {Promise<{messages: Message[], before: number | null}>}
     */
    search({ q, chatId, before }: {
        q: string;
        chatId?: number;
        before?: number | null;
    }, signal?: AbortSignal): Promise<{
        messages: Message[];
        before: number | null;
    }>;
    /**
     * Fetches a page of the list of chats. (fetchChats fetches all, in step with events.)
     * @param {{limit?: number, before?: string | number}} [page] `before`: a `position`
     * @returns {Promise<ChatPage>}
     */
    chats(page?: {
        limit?: number;
        before?: string | number;
    }): Promise<ChatPage>;
    /** @param {number} chatId @returns {Promise<Chat>} members have `online` */
    chat(chatId: number): Promise<Chat>;
    /**
     * Fetches members of a chat: those with these ids (at most 100), or a page.
     * @param {number} chatId
     * @param {{ids?: number[], after?: number, limit?: number}} [which] `after`: an id
     * @returns {Promise<{members: Member[], more: boolean}>}
     */
    members(chatId: number, { ids, ...page }?: {
        ids?: number[];
        after?: number;
        limit?: number;
    }): Promise<{
        members: Member[];
        more: boolean;
    }>;
    /**
     * Creates a chat. With `direct` or the same `clientId` it may be there already.
     * @param {{title?: string | null, memberIds: number[], direct?: boolean,
     *   clientId?: string}} chat
     * @returns {Promise<Chat>}
     */
    createChat({ title, memberIds, direct, clientId }: {
        title?: string | null;
        memberIds: number[];
        direct?: boolean;
        clientId?: string;
    }): Promise<Chat>;
    /** @param {number} chatId @param {string | null} title @returns {Promise<any>} */
    renameChat(chatId: number, title: string | null): Promise<any>;
    /**
     * Makes an invitation, for a link to `/#invite=TOKEN`.
     * @param {number} chatId
     * @param {{ttlSeconds?: number}} [options] default: 7 days
     * @returns {Promise<Token>}
     */
    createInvite(chatId: number, { ttlSeconds }?: {
        ttlSeconds?: number;
    }): Promise<Token>;
    /** Revokes a chat's invitations. @param {number} chatId @returns {Promise<any>} */
    revokeInvites(chatId: number): Promise<any>;
    /**
     * Tells what an invitation is for, also before anyone has signed in.
     * @param {string} token
     * @returns {Promise<{title: string | null, member_count: number}>}
     */
    previewInvite(token: string): Promise<{
        title: string | null;
        member_count: number;
    }>;
    /**
     * Accepts an invitation as a new user. The answer's token is a session token.
     * @param {string} token @param {string} name
     * @returns {Promise<Token & {user_id: number, name: string, chat_id: number}>}
     */
    joinAsNewUser(token: string, name: string): Promise<Token & {
        user_id: number;
        name: string;
        chat_id: number;
    }>;
    /**
     * Accepts an invitation as the signed-in user.
     * @param {string} token @returns {Promise<{chat_id: number}>}
     */
    join(token: string): Promise<{
        chat_id: number;
    }>;
    /** Renames the user. @param {string} name @returns {Promise<any>} */
    renameMe(name: string): Promise<any>;
    /**
     * Makes a sign-in token for a second device, for a link to `/#token=TOKEN`.
     * @returns {Promise<Token>}
     */
    linkDevice(): Promise<Token>;
    /**
     * Sends one HTTP request to chatd, with the token. Where a message in the answer is
     * older than what is known, it is replaced by its newest state.
     * @param {string} method
     * @param {string} path e.g. "/api/v1/chats"
     * @param {object} [body] sent as JSON
     * @param {AbortSignal} [signal]
     * @returns {Promise<any>} the answer's JSON; null for 204
     * @throws {ChatError}
     */
    request(method: string, path: string, body?: object, signal?: AbortSignal): Promise<any>;
}
