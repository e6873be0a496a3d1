/**
 * chat-websocket.js: a dependable connection to chatd (docs/embedding.md). Each event
 * comes once and in order, or else "resync". What you send is stored once. The client
 * reconnects by itself, and polls while there is no socket.
 *
 * @import { Ack, ChatPage, ChatsQuery, Connected, Found, History, HistoryQuery, Joined,
 *   LoggedEvent, MemberPage, MembersQuery, NewChat, Options, Preview, Refusal,
 *   SearchQuery, Snapshot, StorageLike, Token, TokenSource,
 *   Unsent } from "./protocol.js"
 * @typedef {import("./protocol.js").Chat} Chat
 * @typedef {import("./protocol.js").ChatEvents} ChatEvents
 * @typedef {import("./protocol.js").Delivery} Delivery
 * @typedef {import("./protocol.js").Message} Message
 * @typedef {import("./protocol.js").State} State
 */
import type { ChatPage, ChatsQuery, Found, History, HistoryQuery, Joined, MemberPage, MembersQuery, NewChat, Options, Preview, SearchQuery, Snapshot, Token, TokenSource } from "./protocol.js";
export type Chat = import("./protocol.js").Chat;
export type ChatEvents = import("./protocol.js").ChatEvents;
export type Delivery = import("./protocol.js").Delivery;
export type Message = import("./protocol.js").Message;
export type State = import("./protocol.js").State;
/** A request that was refused (`status` is the HTTP status) or not answered (0). */
export declare class ChatError extends Error {
    status: number;
    code: string;
    retryAfter: number | undefined;
    /**
     * @param {number} status @param {string} code of docs/protocol.md, or "unreachable"
     * @param {string} message @param {number} [retryAfter] seconds
     */
    constructor(status: number, code: string, message: string, retryAfter?: number);
}
/** After an `await`, #attempt says whether the work is still wanted. */
export declare class ChatWebSocket {
    #private;
    /** @param {Options} [options] */
    constructor({ server, bearer, storage, log }?: Options);
    /**
     * Calls `listener` for each such event, until the returned function is called.
     * @template {keyof ChatEvents} Type
     * @param {Type} type @param {(event: ChatEvents[Type]) => void} listener
     * @returns {() => void}
     */
    on<Type extends keyof ChatEvents>(type: Type, listener: (event: ChatEvents[Type]) => void): () => void;
    /**
     * Connects, or connects anew.
     * @param {TokenSource} [token] a JWT, or a function that fetches one for each
     *   connection, or throws an error with `status` 401. Default: tickets, by `bearer`.
     */
    connect(token?: TokenSource): void;
    /** Closes the connection until the next connect. */
    disconnect(): void;
    /** Also drops what is unsent: for signing out. */
    forget(): void;
    /** Tries the socket now, if an attempt is scheduled, or after `too_many`. */
    retry(): void;
    /** @returns {State} */
    get state(): State;
    /** Seconds until the next attempt to open a socket; null: none is scheduled. */
    get retryIn(): number | null;
    get userId(): number | undefined;
    /**
     * Sends a message as soon as possible; "delivery" events report its state.
     * @param {number} chatId @param {string} content @returns {string} its client_id
     */
    send(chatId: number, content: string): string;
    /**
     * Replaces edits of the message that failed or were never tried.
     * @param {number} messageId @param {string} content
     * @param {{ifRev?: number}} [options] the edit fails if the message has another rev
     * @returns {string} its client_id
     */
    editMessage(messageId: number, content: string, { ifRev }?: {
        ifRev?: number;
    }): string;
    /**
     * Drops the message's edits that wait, and changes that failed.
     * @param {number} messageId @returns {string} its client_id
     */
    deleteMessage(messageId: number): string;
    /** The unsent messages of a chat, oldest first. @param {number} chatId */
    unsent(chatId: number): import("./protocol.js").Delivery[];
    /** The edits and deletions that wait or have failed. */
    unsentChanges(): import("./protocol.js").Delivery[];
    /** Sends again what has failed. @param {string} clientId */
    resend(clientId: string): void;
    /** Drops what has failed. @param {string} clientId */
    discard(clientId: string): void;
    /**
     * Call it at each key; the typing sign ends 5 s after the last call.
     * @param {number} chatId @param {boolean} isTyping
     */
    sendTyping(chatId: number, isTyping: boolean): void;
    /** Up to this message. @param {number} chatId @param {number} messageId */
    markRead(chatId: number, messageId: number): void;
    /**
     * Fetches all chats. Events wait meanwhile: "chats" comes first, then what followed.
     * @returns {Promise<Snapshot>} @throws {ChatError} then try again
     */
    fetchChats(): Promise<Snapshot>;
    /**
     * Fetches messages, oldest first.
     * @param {number} chatId @param {HistoryQuery} [where] @returns {Promise<History>}
     */
    history(chatId: number, where?: HistoryQuery): Promise<History>;
    /**
     * Newest first; go on with `before` until it is null.
     * @param {SearchQuery} what @param {AbortSignal} [signal] @returns {Promise<Found>}
     */
    search({ q, chatId, before }: SearchQuery, signal?: AbortSignal): Promise<Found>;
    /** One page. @param {ChatsQuery} [page] @returns {Promise<ChatPage>} */
    chats(page?: ChatsQuery): Promise<ChatPage>;
    /** @param {number} chatId @returns {Promise<Chat>} members have `online` */
    chat(chatId: number): Promise<Chat>;
    /**
     * @param {number} chatId @param {MembersQuery} [which] @returns {Promise<MemberPage>}
     */
    members(chatId: number, { ids, ...page }?: MembersQuery): Promise<MemberPage>;
    /** @param {NewChat} chat @returns {Promise<Chat>} */
    createChat({ title, memberIds, direct, clientId }: NewChat): Promise<Chat>;
    /** @param {number} chatId @param {string | null} title */
    renameChat(chatId: number, title: string | null): Promise<any>;
    /**
     * For a link to `/#invite=TOKEN`.
     * @param {number} chatId @param {{ttlSeconds?: number}} [options]
     * @returns {Promise<Token>}
     */
    createInvite(chatId: number, { ttlSeconds }?: {
        ttlSeconds?: number;
    }): Promise<Token>;
    /** Revokes all of the chat. @param {number} chatId */
    revokeInvites(chatId: number): Promise<any>;
    /** Needs no connect. @param {string} token @returns {Promise<Preview>} */
    previewInvite(token: string): Promise<Preview>;
    /**
     * Needs no connect.
     * @param {string} token @param {string} name @returns {Promise<Joined>}
     */
    joinAsNewUser(token: string, name: string): Promise<Joined>;
    /** @param {string} token @returns {Promise<{chat_id: number}>} */
    join(token: string): Promise<{
        chat_id: number;
    }>;
    /** @param {string} name */
    renameMe(name: string): Promise<any>;
    /** For a link to `/#token=TOKEN`. @returns {Promise<Token>} */
    linkDevice(): Promise<Token>;
    /**
     * Sends one HTTP request, with the token.
     * @param {string} method @param {string} path e.g. "/api/v1/chats"
     * @param {object} [body] sent as JSON @param {AbortSignal} [signal]
     * @returns {Promise<any>} the answer's JSON; null for 204
     * @throws {ChatError}
     */
    request(method: string, path: string, body?: object, signal?: AbortSignal): Promise<any>;
}
