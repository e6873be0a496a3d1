/** The types of app.js, which need no import there. Only type checkers read this file. */
import type { ChatWebSocket } from "./chat-websocket.js";
import type * as protocol from "./protocol.js";
import type * as words from "./words.js";

declare global {
  type Chat = protocol.Chat;
  type ChatEvents = protocol.ChatEvents;
  type Delivery = protocol.Delivery;
  type MembersQuery = protocol.MembersQuery;
  type Message = protocol.Message;
  type State = protocol.State;
  type Key = words.Key;

  /** What the page looks for by a selector is always HTML. */
  interface ParentNode {
    querySelector<Tag extends keyof HTMLElementTagNameMap>(
      selector: Tag,
    ): HTMLElementTagNameMap[Tag] | null;
    querySelector(selector: string): HTMLElement | null;
    querySelectorAll<Tag extends keyof HTMLElementTagNameMap>(
      selector: Tag,
    ): NodeListOf<HTMLElementTagNameMap[Tag]>;
    querySelectorAll(selector: string): NodeListOf<HTMLElement>;
  }
  interface Element {
    closest(selector: string): HTMLElement | null;
  }

  /** A row of a list: see showRows. */
  interface Row {
    /** Identifies the row in its container. */
    key: string;
    /** Everything that the row's appearance depends on. */
    look: string;
    build: () => HTMLElement;
    /** What a row of the open chat shows. */
    message?: Message;
  }

  /** A button: of a toast, or of a menu. */
  interface Action {
    text: string;
    press: () => void;
    danger?: boolean;
  }

  type Value = string | number | boolean | null | undefined;
  /** The arguments of el. What is false, null or "" is left out. */
  type Attributes = Record<string, Value | Value[]>;
  type Child = Node | string | false | null | undefined;

  type EventHandlers = {
    [Type in keyof ChatEvents]?: (event: ChatEvents[Type]) => void;
  };
  type ChatEventHandlers = {
    [Type in keyof ChatEvents]?: (event: ChatEvents[Type], chat: ChatView) => void;
  };

  type StorageName = "localStorage" | "sessionStorage";

  interface Session {
    token: string;
    user_id: number;
    name: string | null;
  }

  /** `server` in the answer to GET /api/v1/me. */
  interface ServerRules {
    max_content_chars: number;
    edit_seconds: number | null;
    create_chats: boolean;
    invites: boolean;
    rename: boolean;
  }

  /** Everything that the page shows. */
  interface Model {
    session: Session | null;
    client: ChatWebSocket | null;
    chats: Map<number, ChatView>;
    open: ChatView | null;
    /** By the id of the user. null: without a name, or asked for. */
    names: Map<number, string | null>;
    /** What `connected` said of each chat. */
    marks: ChatEvents["connected"]["chats"];
    /** The users that one may add to a chat; null: not known yet. */
    people: number[] | null;
    /** What the server allows this user; empty until it has said so. */
    server: Partial<ServerRules>;
    connection: State;
    /** The list of chats has arrived at least once. */
    chatsLoaded: boolean;
    /** The epoch of the last list of chats. Another epoch resets all counters. */
    epoch: string;
    /** The longest message; a guess until the server has said what it takes. */
    maxCharacters: number;
  }

  /** What the page knows of a chat. */
  interface ChatView {
    id: number;
    title: string | null;
    direct: boolean;
    created_by: number | null;
    /** User id -> read_n; empty if there are many. */
    members: Map<number, number>;
    memberCount: number;
    last_n: number;
    read_n: number;
    last_message: Message | null;
    /** The loaded messages, without holes. */
    messages: Message[];
    /** No event was missed since they were loaded. */
    loaded: boolean;
    /** There are messages before the loaded ones. */
    more: boolean;
    /** There are messages after the loaded ones. */
    moreAfter: boolean;
    loading: "no" | "yes" | "failed";
    /** The message that the composer edits, as it was. */
    editing: Message | null;
    /** The new messages begin after this n. */
    divider: number | null;
    /** User id -> colour. */
    hues: Map<number, number>;
    /** User id -> timer that ends the typing sign. */
    typing: Map<number, number>;
    lines: Line[];
    /** ms, when it was added, or the user wrote in it, during this visit; otherwise 0. */
    activeAt: number;
    /** The user made it, and no event or list of chats has told of it yet. */
    isNew?: boolean;
    /** In this browser; undefined: not looked up yet. */
    muted?: boolean | undefined;
  }

  /** Something that has happened during this visit, after message n. */
  interface Line {
    seq: number;
    n: number;
    text: () => string;
  }

  /** The open chat. */
  interface Pane {
    /** A message's id, or "start": the first new message or else the end. */
    goTo: "stay" | "start" | "end" | number;
    /** The message that the address names. */
    at: string | undefined;
    /** The end is visible and stays visible. */
    follow: boolean;
    /** The newest n that was drawn. A message after it appears with a small animation. */
    drawn: number;
    /** The long messages that the user has unfolded, as keys of rows. */
    unfolded: Set<string>;
    /** The sizes when the position was last right. */
    sizes: string;
    /** The row at the top of the view, and how far below the top it begins. */
    anchor: { key: string; id: number; top: number };
    /** Whether the chat's end is visible. */
    atEnd(): boolean;
    currentSizes(): string;
    remember(): void;
    hidePastDays(): void;
    restore(): void;
    /** The last message that counts as seen. */
    lastSeen(): Message | undefined;
    render(): void;
    renderHead(chat: ChatView): void;
    showFolds(): void;
    /** Unfolds or folds a long message. */
    toggleFold(key: string): void;
    go(chat: ChatView): void;
    showLatest(): void;
    onScroll(): void;
    onResize(): void;
    onMoved(): void;
  }

  /** The state of a message: an icon, its meaning, a class for the icon. */
  type Tick = [icon: string, text: string, className?: string];

  /** What a row of the list says of its chat. `kind` is a part of a class in style.css. */
  type LastLine = [
    kind: "failed" | "typing" | "sending" | "draft" | "message",
    text: string,
  ];

  /** States of the connection that a banner explains. */
  type Banners = Partial<Record<State, Key>>;

  /** The words for what was not done. */
  type NotDone = Record<Delivery["kind"], Key>;

  /** The field in which the user writes. */
  interface Composer {
    readonly field: HTMLTextAreaElement;
    /** An edit has a draft of its own, with the negative id of its message. */
    draftId(chat: ChatView): number;
    /** Shows the draft of a chat. */
    show(chat: ChatView | null): void;
    /** Says what the field is for. */
    showMode(chat: ChatView): void;
    /** Gives the field the height of its text, and counts when there is little room left. */
    fit(): void;
    onInput(): void;
    /** Enter sends. With Shift, or on a touch keyboard, it begins a new line. */
    onKey(event: KeyboardEvent): void;
    send(event: Event): void;
    /** Takes a message, or its unsent edit, into the field. */
    change(message: Message): void;
    /** `before` is the message as it was when the edit began. */
    save(before: Message, content: string): Promise<void>;
    /** Ends an edit and shows the draft of the chat again. */
    leave(keepsDraft?: boolean): void;
    /** Takes a refused text back into the field. */
    edit(refused: Delivery): void;
  }

  /** The search for messages. */
  interface Search {
    q: string;
    /** 0: in all chats. */
    chatId: number;
    found: Message[];
    /** It goes on before this id; undefined: it begins; null: it has ended. */
    before: number | null | undefined;
    /** It waits for an answer, or before it asks. */
    busy: boolean;
    /** Why it does not go on. */
    error: string;
    timer: number;
    running: AbortController;
    /** `here`: in the open chat. */
    open(here: boolean): void;
    /** Begins if the user asks for something else, or `again`. */
    start(again?: boolean): void;
    retry(seconds?: number): void;
    goOn(): Promise<void>;
    /** Needs the chats in their order. */
    render(chats: ChatView[]): void;
    /** A found message, as a link to its place. */
    row(message: Message): Row;
    onClick(event: MouseEvent & { target: Element }): void;
  }

  /**
   * Asks a question or, if `most` characters fit, for a name. To close the dialog means no.
   * It stays open until `save` succeeds.
   */
  type Ask = (
    title: string,
    text: string,
    yes?: string,
    most?: number,
    value?: string | null,
    save?: (text: string) => Promise<unknown>,
  ) => Promise<boolean>;

  /** Says why a request has failed: in an element, or elsewhere if its dialog was closed. */
  type Submit = (
    errorId: string,
    /** `isOpen`: the dialog has not been closed since. */
    request: (isOpen: () => boolean) => Promise<unknown>,
  ) => Promise<void>;

  /** The dialog that chooses people. */
  interface People {
    /** It receives the chosen people; null: they get a new chat. */
    chat: ChatView | null;
    /** The other one of a direct chat, which stays as it is. */
    given: number[];
    /** The same choice, tried again, makes one chat. */
    key: string;
    open(chat: ChatView | null, given?: number[]): void;
    /** Returns how many people have a name that contains the filter's text. */
    render(): number;
    row(id: number): Row;
    /** The ids of the chosen people. */
    chosen(): number[];
    /** People can be invited to a new group later. */
    mayBeAlone(): boolean;
    /** What is wrong, and what may be done instead. */
    orInvite(key: Key): string;
    onChoice(): void;
    onFilterKey(event: KeyboardEvent): void;
    /** Adds the chosen people, or creates a chat with them and opens it. */
    submit(isOpen: () => boolean): Promise<void>;
  }

  /** The dialog of the open chat: its members, of whom pages are loaded, and more. */
  interface Info {
    /** User id -> whether that user is online. */
    online: Map<number, boolean>;
    nextPage: MembersQuery;
    /** There are more pages. */
    more: boolean;
    /** The chat that the user has asked to leave. */
    left: ChatView | null;
    open(): void;
    /** Loads these members, or the next page. */
    load(which?: MembersQuery): void;
    render(): void;
    row(chat: ChatView, id: number): Row;
    /** Removes another member, or oneself, if the user is sure. */
    remove(chat: ChatView, id: number): Promise<void>;
  }

  /** The id of an element, and the type of an event if it is not a click -> what to do. */
  type Listeners = Record<string, (event: any) => unknown>;
}
