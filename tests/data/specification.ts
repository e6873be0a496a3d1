// The client of the specification, in TypeScript, against web/chat-websocket.d.ts:
// connect, sendTyping, disconnect, and dispatch by type. CI compiles it.
import { ChatWebSocket } from "../../web/chat-websocket.js";
import type { ChatEvents, Message } from "../../web/chat-websocket.js";

class ChatPage {
  readonly messages: Message[] = [];
  private readonly chat = new ChatWebSocket({ server: "https://chat.example.org" });

  constructor(private readonly show: (text: string) => void) {
    this.chat.on("connected", ({ user_id, timestamp }) =>
      show(`connected as ${user_id} at ${timestamp}`),
    );
    this.chat.on("pong", ({ timestamp }) => show(`pong ${timestamp}`));
    this.chat.on("new_message", ({ chat_id, message }) => {
      this.messages.push(message);
      show(`${message.sender_id}: ${message.content}`);
      this.chat.markRead(chat_id, message.id);
    });
    this.chat.on("message_edited", ({ message }) => this.replace(message));
    this.chat.on("message_deleted", ({ message }) => this.replace(message));
    this.chat.on("message_read", ({ message_id, chat_id, read_by }) =>
      show(`${read_by} read ${message_id} of ${chat_id}`),
    );
    this.chat.on("typing", ({ user_id, is_typing }) =>
      show(`${user_id} ${is_typing ? "types" : "stops"}`),
    );
    this.chat.on("delivery", this.onDelivery);
  }

  connect(token: string): void {
    this.chat.connect(token);
  }

  sendTyping(chatId: number, isTyping: boolean): void {
    this.chat.sendTyping(chatId, isTyping);
  }

  edit(message: Message, content: string): string {
    return this.chat.editMessage(message.id, content, {
      ifRev: message.rev ?? message.id,
    });
  }

  async older(chatId: number): Promise<boolean> {
    const [first] = this.messages;
    const where = first ? { before: first.id } : {};
    const { messages, more } = await this.chat.history(chatId, where);
    this.messages.unshift(...messages);
    return more;
  }

  disconnect(): void {
    this.chat.disconnect();
  }

  private replace(message: Message): void {
    const at = this.messages.findIndex(({ id }) => id === message.id);
    if (at >= 0) this.messages[at] = message;
  }

  private readonly onDelivery = (delivery: ChatEvents["delivery"]): void => {
    if (delivery.state === "failed") this.show(delivery.reason ?? "");
  };
}

const page = new ChatPage(console.log);
page.connect("token");
page.sendTyping(3, true);
// @ts-expect-error: an id is a number
page.sendTyping("3", true);
page.disconnect();
