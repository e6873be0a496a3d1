// @ts-check
/**
 * words.js: what the page says, in one table per language. `?lang=` chooses the language,
 * or else the browser does.
 */

/** @typedef {string | Partial<Record<Intl.LDMLPluralRule, string>>} Words */
/** @typedef {keyof typeof en} Key */

const en = {
  loading: "Loading…",
  broken:
    "chatd could not start. Reload the page. It needs JavaScript and a recent browser.",

  signInTo: "Sign in to chatd",
  openLink: "Open the sign-in link you were given, or paste it here.",
  signInLink: "Sign-in link",
  signIn: "Sign in",
  linkInvalid: "This link is no longer valid. Ask for a new one.",
  notALink: "This is not a sign-in link: it has no #token=.",
  continueAs: "Continue as {name}",
  continueAsText:
    "You are signed in as {me}. This link signs you in as {name}. Other tabs do not change.",
  twoUsers: "This tab is signed in as {me}, other tabs still as {name}.",
  noStorage: "This browser lets chatd store nothing: a reload will sign you out.",
  signOut: "Sign out",
  signOutText: "Unsent messages will be lost: {count}.",
  signedOut: "You are signed out.",
  signedOutElsewhere: "You signed out in another tab.",
  sessionEnded: "Your session has ended.",
  cancel: "Cancel",

  join: "Join the chat",
  joinTitle: "Join “{title}”",
  yourName: "Your name",
  badName: "Choose a name that others can read.",
  inviteValid: "Anyone who has this link can join until {when}.",
  revokeLinks: "Revoke earlier links",
  linksEnded: "Earlier invitation links no longer work.",
  copy: "Copy",
  copied: "Copied",
  share: "Share",

  wasChanged: "It was changed meanwhile.",
  wasDeleted: "It was deleted meanwhile.",
  tooLate: "It is too old to be changed.",
  notThere: "It no longer exists, or you may not see it.",
  notAllowed: "You are not allowed to do this.",
  notAccepted: "The server does not accept this.",
  busy: "The server cannot take this now. Try again in a moment.",
  serverError: "Something went wrong on the server. Try again later.",
  noAnswer: "The chat server does not answer.",
  mostPeople: "A chat has at most {most} people.",

  connecting: "Connecting…",
  connected: "Live",
  polling: "Delayed",
  offline: "Offline",
  too_many: "Paused",
  refused: "Disconnected",
  pollingText:
    "Live updates are interrupted. chatd checks for new messages every 5 seconds.",
  offlineText: "No connection. Your messages are kept and sent later.",
  tooManyText:
    "chatd is open in too many places. Close one of them, then come back here.",
  refusedText:
    "The server has closed the connection. Reload the page to connect again.",
  tryingIn: "Trying again in {seconds} s.",
  tryAgain: "Try again",

  skip: "Skip to the message field",
  account: "Your account:",
  signedInAs: "Signed in as {name}",
  draftsHere: "Drafts kept in this browser: {count}.",
  deleteDrafts: "Delete drafts",
  changeName: "Change your name",
  otherDevice: "Sign in on another device",
  otherDeviceText:
    "Open this link there within 10 minutes. Give it to no one else: it signs in as you.",
  newMessages: "New messages",
  newCount: { one: "{count} new message", other: "{count} new messages" },
  noneNew: "No new messages",
  offerNotify: "Get notified of new messages?",
  notify: "Turn on notifications",
  notifyDenied: "Notifications are blocked in this browser's settings.",

  chats: "Chats",
  newChat: "New chat",
  newGroup: "New group",
  groupWith:
    "A new group of {name} and the people you choose. The direct chat stays as it is.",
  noChats: "No chats yet.",
  startInvite: "Start a group, then invite people with a link.",
  startChat: "Start one. Others find you as {name}.",
  waitForChat: "Someone has to add you to one. Your name here is {name}.",
  chooseChat: "Choose a chat.",
  back: "Back to all chats",
  peopleHere: "People in this chat",
  directChat: "Direct chat",
  onlyYou: "Only you",
  people: { one: "{count} person", other: "{count} people" },
  you: "you",
  user: "User {id}",
  unread: "unread",
  muted: "Muted",
  ownLast: "You: {text}",
  lastOf: "{name}: {text}",
  senderIn: "{name} in {title}",
  draft: "Draft: {text}",
  today: "Today",
  yesterday: "Yesterday",
  latest: "Latest messages",

  search: "Search",
  searchHere: "Search in this chat",
  searching: "Searching…",
  found: "Messages found: {count}.",
  foundNothing: "No messages found.",

  beginning: "The beginning of this chat",
  noMessages: "No messages yet",
  notLoaded: "Messages could not be loaded.",
  typing: "{name} is typing…",
  manyTyping: "{name} are typing…",
  joined: "{name} joined",
  left: "{name} left",
  renamed: "{name} renamed the chat to “{title}”",
  nowCalled: "The chat is now called “{title}”",
  noLonger: "You are no longer in “{title}”.",
  blank: "(blank message)",
  showAll: "Show all",
  showLess: "Show less",
  sending: "Sending",
  sent: "Sent",
  read: "Read",
  readBy: "Read by {readers} of {people}",
  readers: "Who has read it",
  notYet: "Not yet",
  notSent: "Not sent",
  notSentText: "Not sent: {text}",
  notSaved: "Not saved: {text}",
  notDeleted: "Not deleted: {text}",

  actions: "Actions for the message",
  edit: "Edit",
  edited: "edited",
  editing: "Editing a message.",
  save: "Save",
  delete: "Delete",
  deleteTitle: "Delete this message?",
  deleted: "Message deleted",
  undo: "Undo",
  notCopied: "This browser does not let chatd copy.",
  yourMessage: "Your message",
  send: "Send",
  used: "{used} of {most} characters",
  over: "Too long by {count}: at most {most} characters fit.",

  addPeople: "Add people",
  invitePeople: "Invite people",
  findPeople: "Find people",
  title: "Title",
  add: "Add",
  create: "Create",
  close: "Close",
  noOneToAdd: "There is no one to add.",
  noOneCalled: "No one here is called “{name}”.",
  chosen: "{name} is chosen.",
  chooseOne: "Choose whom to add.",
  inviteLater: "If you give the group a title, you can invite people later.",
  andMore: "and {left} more",
  creator: "creator",
  online: "online",
  rename: "Rename",
  remove: "Remove",
  removeTitle: "Remove {name}?",
  removeText: "This person can no longer read and write in “{title}”.",
  leaveChat: "Leave chat",
  leaveTitle: "Leave “{title}”?",
  leaveText: "You get no more messages from it until someone adds you again.",
  mute: "Mute: no notifications, not counted as new",

  shortcuts: "Keyboard shortcuts",
  keyRows: "Move through the list of chats",
  keyOpen: "Open the chat, or send the message",
  keyLine: "New line",
  keyEdit: "Edit your last message, in an empty field",
};

/** @type {Record<Key, Words>} */
const ru = {
  loading: "Загрузка…",
  broken:
    "chatd не запустился. Перезагрузите страницу. Нужен новый браузер со скриптами.",

  signInTo: "Вход в chatd",
  openLink: "Откройте полученную ссылку для входа или вставьте её сюда.",
  signInLink: "Ссылка для входа",
  signIn: "Войти",
  linkInvalid: "Эта ссылка больше не действует. Попросите новую.",
  notALink: "Это не ссылка для входа: в ней нет #token=.",
  continueAs: "Продолжить как {name}",
  continueAsText:
    "Вы вошли как {me}. По этой ссылке вы войдёте как {name}. Другие вкладки не изменятся.",
  twoUsers: "В этой вкладке вы вошли как {me}, в других по-прежнему как {name}.",
  noStorage: "Браузер не даёт chatd ничего сохранить: после перезагрузки вы выйдете.",
  signOut: "Выйти",
  signOutText: "Неотправленные сообщения будут потеряны: {count}.",
  signedOut: "Вы вышли.",
  signedOutElsewhere: "Вы вышли в другой вкладке.",
  sessionEnded: "Ваш сеанс завершён.",
  cancel: "Отмена",

  join: "Вступить в чат",
  joinTitle: "Вступить в чат «{title}»",
  yourName: "Ваше имя",
  badName: "Выберите имя, которое смогут прочитать другие.",
  inviteValid: "До {when} по этой ссылке может вступить любой.",
  revokeLinks: "Отозвать прежние ссылки",
  linksEnded: "Прежние ссылки-приглашения больше не действуют.",
  copy: "Копировать",
  copied: "Скопировано",
  share: "Поделиться",

  wasChanged: "Оно уже изменено.",
  wasDeleted: "Оно уже удалено.",
  tooLate: "Менять уже поздно.",
  notThere: "Этого больше нет, или оно вам недоступно.",
  notAllowed: "У вас нет на это прав.",
  notAccepted: "Сервер этого не принимает.",
  busy: "Сервер сейчас не может это принять. Повторите чуть позже.",
  serverError: "На сервере что-то пошло не так. Повторите позже.",
  noAnswer: "Сервер чата не отвечает.",
  mostPeople: "В чате может быть не больше {most} участников.",

  connecting: "Соединение…",
  connected: "На связи",
  polling: "С задержкой",
  offline: "Нет связи",
  too_many: "Пауза",
  refused: "Отключено",
  pollingText: "Связь прерывается. chatd проверяет новые сообщения каждые 5 секунд.",
  offlineText: "Нет соединения. Сообщения сохранены и будут отправлены позже.",
  tooManyText:
    "chatd открыт в слишком многих местах. Закройте одно из них и вернитесь сюда.",
  refusedText:
    "Сервер закрыл соединение. Чтобы подключиться снова, перезагрузите страницу.",
  tryingIn: "Повтор через {seconds} с.",
  tryAgain: "Повторить",

  skip: "Перейти к полю сообщения",
  account: "Ваша учётная запись:",
  signedInAs: "Вы вошли как {name}",
  draftsHere: "Черновики остаются в этом браузере: {count}.",
  deleteDrafts: "Удалить черновики",
  changeName: "Изменить имя",
  otherDevice: "Войти на другом устройстве",
  otherDeviceText:
    "Откройте эту ссылку там в течение 10 минут. Никому её не передавайте: по ней входят под вашим именем.",
  newMessages: "Новые сообщения",
  newCount: {
    one: "{count} новое сообщение",
    few: "{count} новых сообщения",
    many: "{count} новых сообщений",
    other: "{count} нового сообщения",
  },
  noneNew: "Новых сообщений нет",
  offerNotify: "Уведомлять о новых сообщениях?",
  notify: "Включить уведомления",
  notifyDenied: "Уведомления запрещены в настройках браузера.",

  chats: "Чаты",
  newChat: "Новый чат",
  newGroup: "Новая группа",
  groupWith:
    "Новая группа: {name} и те, кого вы выберете. Личный чат останется как есть.",
  noChats: "Чатов пока нет.",
  startInvite: "Создайте группу и пригласите людей по ссылке.",
  startChat: "Начните первый. Другие найдут вас по имени {name}.",
  waitForChat: "Подождите, пока вас добавят. Ваше имя здесь: {name}.",
  chooseChat: "Выберите чат.",
  back: "Назад ко всем чатам",
  peopleHere: "Участники чата",
  directChat: "Личный чат",
  onlyYou: "Только вы",
  people: {
    one: "{count} участник",
    few: "{count} участника",
    many: "{count} участников",
    other: "{count} участника",
  },
  you: "вы",
  user: "Пользователь {id}",
  unread: "не прочитано",
  muted: "Без уведомлений",
  ownLast: "Вы: {text}",
  lastOf: "{name}: {text}",
  senderIn: "{name} в чате «{title}»",
  draft: "Черновик: {text}",
  today: "Сегодня",
  yesterday: "Вчера",
  latest: "Последние сообщения",

  search: "Поиск",
  searchHere: "Поиск в этом чате",
  searching: "Идёт поиск…",
  found: "Найдено сообщений: {count}.",
  foundNothing: "Сообщений не найдено.",

  beginning: "Начало чата",
  noMessages: "Сообщений пока нет",
  notLoaded: "Не удалось загрузить сообщения.",
  typing: "{name} печатает…",
  manyTyping: "{name} печатают…",
  joined: "{name} теперь в чате",
  left: "{name} больше не в чате",
  renamed: "{name} меняет название чата на «{title}»",
  nowCalled: "Чат теперь называется «{title}»",
  noLonger: "Вы больше не участник чата «{title}».",
  blank: "(пустое сообщение)",
  showAll: "Показать полностью",
  showLess: "Свернуть",
  sending: "Отправляется",
  sent: "Отправлено",
  read: "Прочитано",
  readBy: "Прочитали: {readers} из {people}",
  readers: "Кто прочитал",
  notYet: "Ещё нет",
  notSent: "Не отправлено",
  notSentText: "Не отправлено: {text}",
  notSaved: "Не сохранено: {text}",
  notDeleted: "Не удалено: {text}",

  actions: "Действия с сообщением",
  edit: "Изменить",
  edited: "изменено",
  editing: "Изменение сообщения.",
  save: "Сохранить",
  delete: "Удалить",
  deleteTitle: "Удалить это сообщение?",
  deleted: "Сообщение удалено",
  undo: "Вернуть",
  notCopied: "Браузер не даёт chatd копировать.",
  yourMessage: "Сообщение",
  send: "Отправить",
  used: "Символов: {used} из {most}",
  over: "Лишних символов: {count}. Помещается не больше {most}.",

  addPeople: "Добавить участников",
  invitePeople: "Пригласить людей",
  findPeople: "Найти людей",
  title: "Название",
  add: "Добавить",
  create: "Создать",
  close: "Закрыть",
  noOneToAdd: "Добавить некого.",
  noOneCalled: "Здесь никого не зовут «{name}».",
  chosen: "Выбрано: {name}.",
  chooseOne: "Выберите, кого добавить.",
  inviteLater: "Если дать группе название, людей можно пригласить позже.",
  andMore: "и ещё {left}",
  creator: "создатель",
  online: "в сети",
  rename: "Переименовать",
  remove: "Удалить",
  removeTitle: "Удалить участника {name}?",
  removeText: "Этот участник больше не сможет читать и писать в чате «{title}».",
  leaveChat: "Покинуть чат",
  leaveTitle: "Покинуть чат «{title}»?",
  leaveText: "Вы не будете получать его сообщения, пока вас не добавят снова.",
  mute: "Без звука: не уведомлять и не считать новые сообщения",

  shortcuts: "Сочетания клавиш",
  keyRows: "Перейти по списку чатов",
  keyOpen: "Открыть чат или отправить сообщение",
  keyLine: "Новая строка",
  keyEdit: "Изменить последнее своё сообщение (в пустом поле)",
};

/** @type {Record<string, Record<Key, Words>>} */
export const TABLES = { en, ru };
/** Letters that turn the direction of their neighbours. */
const TURNS =
  /[\p{Bidi_C}\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;

/** @param {string} tag @returns {string} "": it is not valid */
function languageOf(tag) {
  try {
    return new Intl.Locale(tag).language;
  } catch {
    return "";
  }
}

const wanted = new URLSearchParams(location.search).get("lang") ?? "";
const languages = [...(navigator.languages ?? [])];
export const language =
  [wanted, ...languages].map(languageOf).find((one) => TABLES[one]) ?? "en";
/** The language, with the user's region. */
export const locale = languages.find((tag) => languageOf(tag) === language) ?? language;

/** @type {Record<Key, Words>} */
const table = TABLES[language] ?? en;
const plurals = new Intl.PluralRules(language);
const numbers = new Intl.NumberFormat(locale);

/**
 * @param {Key} key
 * @param {Record<string, string | number>} [values] `count` chooses the plural form
 */
export function say(key, values = {}) {
  const words = table[key];
  const text =
    typeof words === "string" ? words : words[plurals.select(Number(values["count"]))];
  return (text ?? key).replace(/\{(\w+)\}/g, (_, /** @type {string} */ name) => {
    const value = values[name] ?? "";
    if (typeof value === "number") return numbers.format(value);
    return isolated(value);
  });
}

/** @param {string} text within another one */
export function isolated(text) {
  return TURNS.test(text) ? `\u2068${text}\u2069` : text;
}

const page = document.documentElement;
page.lang = language;
page.dir = /^(ar|fa|he|ur)$/.test(language) ? "rtl" : "ltr";
for (const node of page.querySelectorAll("[data-say], [data-say-label]")) {
  const key = node.getAttribute("data-say");
  const label = node.getAttribute("data-say-label");
  const text = say(/** @type {Key} */ (key ?? label));
  if (key) node.textContent = text;
  else node.ariaLabel = text;
  if (label && "placeholder" in node) node.placeholder = text;
}
