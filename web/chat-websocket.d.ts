/**
 * A dependable connection to chatd (docs/embedding.md): each event comes once and in
 * order, or else "resync". What you send is stored once.
 *
 * @import { Ack, ChatPage, ChatsQuery, Client, Connected, Found, History, HistoryQuery,
 *   Joined, LoggedEvent, MemberPage, MembersQuery, NewChat, Options, Preview, ReadMark,
 *   Refusal, SearchQuery, Snapshot, StorageLike, Token, TokenSource,
 *   Unsent } from "./protocol.js"
 * @typedef {import("./protocol.js").Chat} Chat
 * @typedef {import("./protocol.js").ChatEvents} ChatEvents
 * @typedef {import("./protocol.js").Delivery} Delivery
 * @typedef {import("./protocol.js").Message} Message
 * @typedef {import("./protocol.js").State} State
 */
import type { ChatPage, ChatsQuery, Client, Found, History, HistoryQuery, Joined, MemberPage, MembersQuery, NewChat, Options, Preview, SearchQuery, Snapshot, Token, TokenSource } from "./protocol.js";
export type Chat = import("./protocol.js").Chat;
export type ChatEvents = import("./protocol.js").ChatEvents;
export type Delivery = import("./protocol.js").Delivery;
export type Message = import("./protocol.js").Message;
export type State = import("./protocol.js").State;
/** `status`: of HTTP, or 0 */
export declare class ChatError extends Error {
    status: number;
    code: string;
    retryAfter: number | undefined;
    /**
     * @param {number} status @param {string} code @param {string} message
     * @param {number} [retryAfter] seconds
     */
    constructor(status: number, code: string, message: string, retryAfter?: number);
}
/** @implements {Client} */
export declare class ChatWebSocket implements Client {
    #private;
    /** @param {Options} [options] */
    constructor({ server, bearer, storage, log }?: Options);
    /**
     * @template {keyof ChatEvents} Type
     * @param {Type} type @param {(event: ChatEvents[Type]) => void} listener
     * @returns {() => void}
     */
    on<Type extends keyof ChatEvents>(type: Type, listener: (event: ChatEvents[Type]) => void): () => void;
    /** @param {TokenSource} [token] */
    connect(token?: TokenSource): void;
    disconnect(): void;
    forget(): void;
    retry(): void;
    /** @returns {State} */
    get state(): State;
    get retryIn(): number | null;
    get userId(): number | undefined;
    /** @param {number} chatId @param {string} content */
    send(chatId: number, content: string): string;
    /**
     * @param {number} messageId @param {string} content
     * @param {{ifRev?: number, chatId?: number | undefined}} [options]
     */
    editMessage(messageId: number, content: string, { ifRev, chatId }?: {
        ifRev?: number;
        chatId?: number | undefined;
    }): string;
    /** @param {number} messageId @param {{chatId?: number | undefined}} [options] */
    deleteMessage(messageId: number, { chatId }?: {
        chatId?: number | undefined;
    }): string;
    /** @param {number} [chatId] */
    unsent(chatId?: number): import("./protocol.js").Delivery[];
    unsentChanges(): import("./protocol.js").Delivery[];
    /** @param {string} clientId */
    resend(clientId: string): void;
    /** @param {string} clientId */
    discard(clientId: string): void;
    /** @param {number} chatId @param {boolean} isTyping */
    sendTyping(chatId: number, isTyping: boolean): void;
    /** @param {number} chatId @param {number} messageId */
    markRead(chatId: number, messageId: number): void;
    fetchChats(): Promise<Snapshot>;
    /**
     * @param {number} chatId @param {HistoryQuery} [where] @returns {Promise<History>}
     */
    history(chatId: number, where?: HistoryQuery): Promise<History>;
    /**
     * @param {SearchQuery} what @param {AbortSignal} [signal] @returns {Promise<Found>}
     */
    search({ q, chatId, before }: SearchQuery, signal?: AbortSignal): Promise<Found>;
    /** @param {ChatsQuery} [page] @returns {Promise<ChatPage>} */
    chats(page?: ChatsQuery): Promise<ChatPage>;
    /** @param {number} chatId @returns {Promise<Chat>} */
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
     * @param {number} chatId @param {{ttlSeconds?: number}} [options]
     * @returns {Promise<Token>}
     */
    createInvite(chatId: number, { ttlSeconds }?: {
        ttlSeconds?: number;
    }): Promise<Token>;
    /** @param {number} chatId */
    revokeInvites(chatId: number): Promise<any>;
    /** @param {string} token @returns {Promise<Preview>} */
    previewInvite(token: string): Promise<Preview>;
    /** @param {string} token @param {string} name @returns {Promise<Joined>} */
    joinAsNewUser(token: string, name: string): Promise<Joined>;
    /** @param {string} token @returns {Promise<{chat_id: number}>} */
    join(token: string): Promise<{
        chat_id: number;
    }>;
    /** @param {string} name */
    renameMe(name: string): Promise<any>;
    /** @returns {Promise<Token>} */
    linkDevice(): Promise<Token>;
    /**
     * @param {string} method @param {string} path @param {object} [body]
     * @param {AbortSignal} [signal] @returns {Promise<any>}
     */
    request(method: string, path: string, body?: object, signal?: AbortSignal): Promise<any>;
}
/** What users have written but not sent, in storage or else in memory. */
export declare class Drafts {
    #private;
    storage: Storage | null;
    userId: () => number;
    /** What a reload would lose. @type {Record<string, string>} */
    unstored: Record<string, string>;
    /** @param {Storage | null} storage @param {() => number} userId */
    constructor(storage: Storage | null, userId: () => number);
    /** @param {number | string} chatId */
    key(chatId: number | string): string;
    /** @param {number} chatId */
    get(chatId: number): string;
    /** @param {number} chatId */
    base(chatId: number): import("./protocol.js").Message | undefined;
    /** @param {number} chatId @param {string} text @param {Message | null} [base] */
    set(chatId: number, text: string, base?: Message | null): void;
    /** Where this user has drafts. */
    chatIds(): number[];
    /** Drops the oldest drafts of all users, but never the newest. */
    prune(): void;
}
