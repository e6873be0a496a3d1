// @ts-check
/**
 * words.js: what the page says, in one table per language, and the locale of its times
 * and numbers. `?lang=` in the address chooses the language, or else the browser does.
 */

/** @typedef {string | Partial<Record<Intl.LDMLPluralRule, string>>} Words */
/** @typedef {keyof typeof en} Key */

const en = {
  opening: "Opening your chats…",
  stuck:
    "This takes long. If it stays so, reload the page, or try another browser: this one may be too old, or it blocks scripts.",
  broken:
    "chatd could not open in this browser. Reload the page; if that does not help, try another browser. ({error})",
  tooOld: "It is too old.",

  signInTo: "Sign in to chatd",
  openLink: "Open the sign-in link you were given, or paste it here.",
  signInLink: "Sign-in link",
  signIn: "Sign in",
  linkInvalid: "This sign-in link is no longer valid. Please ask for a new one.",
  notALink: "This is not a sign-in link: it has no #token=.",
  continueAsTitle: "Continue as {name}?",
  continueAsText:
    "You are signed in as {me}. This link signs this tab in as {name}. Your other tabs do not change.",
  continueAs: "Continue as {name}",
  stayAs: "Stay as {name}",
  twoUsers: "This tab is signed in as {me}. Other tabs stay signed in as {name}.",
  noStorage: "This browser lets chatd store nothing: a reload will sign you out.",
  signOutTitle: "Sign out?",
  signOutText: {
    one: "{count} unsent message will be lost.",
    other: "{count} unsent messages will be lost.",
  },
  signOut: "Sign out",
  cancel: "Cancel",
  signedOut: "You are signed out.",
  draftsStay: "Your drafts stay in this browser.",
  sessionEnded: "Your session has ended.",
  signedOutElsewhere: "You signed out in another tab.",

  joinTitle: "Join “{title}”",
  joinChat: "Join a chat",
  join: "Join",
  membersSoFar: { one: "{count} member so far.", other: "{count} members so far." },
  joinAs: "You join as {name}.",
  yourName: "Your name",
  inviteExpired: "This invitation has expired. Please ask for a new one.",
  inviteInvalid: "This invitation is no longer valid. Please ask for a new one.",
  noInvites: "There are no invitations here at the moment.",
  badName: "Give a name that the others can read.",
  chatFull: "The chat is full.",
  inviteValid: {
    one: "For {count} day, anyone who has this link can join.",
    other: "For {count} days, anyone who has this link can join.",
  },
  revokeLinks: "Revoke earlier links",
  linksEnded: "Earlier invitation links no longer work.",
  copy: "Copy",
  copied: "Copied",

  wasChanged: "It was changed meanwhile.",
  wasDeleted: "It was deleted meanwhile.",
  notAllowed: "You are not allowed to do this.",
  serverError: "Something went wrong on the server. Try again later.",
  notThere: "It is not there any more, or not for you.",
  busy: "The server is busy. Try again in a moment.",
  tooMuch: "That was too much at once. Wait a moment, then try again.",
  cannotStore: "The server can store nothing at the moment. Try again later.",
  tooLong: "It is too long.",
  tooLate: "It is too old to be changed.",
  noAnswer: "The chat server does not answer.",
  otherError: "It did not work ({code}).",
  badTitle: "Choose another title: this one cannot be used.",
  notAccepted: "The server does not accept this.",
  mostPeople: "A chat has at most {most} people.",
  cannotAdd: "These people cannot be added.",

  connecting: "Connecting…",
  connected: "Live",
  polling: "Delayed",
  offline: "Offline",
  too_many: "Paused",
  refused: "Disconnected",
  connection: "Connection",
  pollingTitle: "Live updates are interrupted.",
  pollingText: "chatd checks for new messages every 5 seconds.",
  offlineTitle: "No connection.",
  offlineText: "Your messages are kept and sent later.",
  tooManyTitle: "chatd is open in too many places.",
  tooManyText: "Close one of them, then come back here.",
  refusedTitle: "The server has closed the connection.",
  refusedText: "Reload the page to connect again.",
  tryingIn: "Trying again in {seconds} s.",
  tryingNow: "Trying again now…",
  tryNow: "Try now",

  skip: "Skip to the message field",
  allChats: "chatd, all chats",
  account: "Your account:",
  signedInAs: "Signed in as {name}",
  eachTab:
    "Each tab signs in separately. Another tab can be signed in as another user.",
  draftsHere: {
    one: "{count} draft in this browser.",
    other: "{count} drafts in this browser.",
  },
  draftsKept: "They stay when you sign out.",
  deleteThem: "Delete them",
  deleteDraftsTitle: "Delete your drafts?",
  deleteDraftsText:
    "Everything that you have written in this browser and not sent will be lost.",
  deleteDrafts: "Delete drafts",
  newMessages: "New messages",
  newCount: { one: "{count} new message", other: "{count} new messages" },
  noneNew: "No new messages",
  nothingNew: "Nothing new.",
  notify: "Turn on desktop notifications",
  notifyDenied: "Desktop notifications are blocked in this browser's settings.",
  arriving: "New messages as they arrive",

  chats: "Chats",
  newChat: "New chat",
  newGroup: "New group",
  groupWith:
    "The direct chat stays as it is. This is a new group: {name} and the people you choose.",
  noChats: "No chats yet.",
  startInvite: "Start a group, then invite people with a link.",
  startChat: "Start one. The others find you as {name}.",
  waitForChat: "Someone else has to add you to one. Your name here is {name}.",
  loading: "Loading…",
  unread: "unread",
  you: "you",
  youSaid: "You:",
  user: "User {id}",
  onlyYou: "Only you",
  people: { one: "{count} person", other: "{count} people" },
  ownLast: "You: {text}",
  lastOf: "{name}: {text}",
  lastIn: "{name} in {title}: {text}",
  senderIn: "{name} in {title}",
  draft: "Draft: {text}",
  noMessages: "No messages yet",
  today: "Today",
  yesterday: "Yesterday",

  chooseChat: "Choose a chat to read and write messages.",
  noChat: "No chat is open",
  back: "Back to all chats",
  peopleHere: "People in this chat",
  directChat: "Direct chat",
  messagesIn: "Messages in {title}",
  latest: "Latest messages",

  search: "Search",
  searchChat: "Search in this chat",
  searchHere: "Only in this chat",
  searching: "Searching…",
  searchedBack: "Searched back to {when}.",
  found: { one: "{count} message found.", other: "{count} messages found." },
  foundNothing: "No messages found.",
  beginning: "The beginning of this chat",
  sayHello: "No messages yet. Say hello.",
  notLoaded: "Messages could not be loaded.",
  tryAgain: "Try again",
  typing: "{name} is typing…",
  twoTyping: "{name} and {other} are typing…",
  manyTyping: "Several people are typing…",
  blank: "(blank message)",
  deleted: "Message deleted",
  joined: "{name} joined",
  left: "{name} left",
  renamed: "{name} renamed the chat to “{title}”",
  nowCalled: "The chat is now called “{title}”",
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
  notSentReason: "Your message was not sent: {reason}",
  notSentIn: "A message in “{title}” was not sent.",
  notChanged: "A message could not be changed: {reason}",
  tooLongBy: {
    one: "It is {count} character too long: at most {most} fit.",
    other: "It is {count} characters too long: at most {most} fit.",
  },
  badCharacters: "It has characters that cannot be sent.",
  mayNotWrite: "You may not write in this chat.",
  edit: "Edit",
  delete: "Delete",
  actions: "Actions for the message",
  notCopied: "This browser does not let chatd copy.",
  undo: "Undo",
  edited: "edited",
  editing: "Editing a message.",
  save: "Save",
  discard: "Discard",
  notSaved: "Not saved: {text}",
  notDeleted: "Not deleted: {text}",
  deleteTitle: "Delete this message?",
  deleteText: "Nothing is left of its text.",
  noLonger: "You are no longer in “{title}”.",

  yourMessage: "Your message",
  write: "Write a message",
  send: "Send",
  used: "{used} of {most} characters",
  over: { one: "{count} character too long", other: "{count} characters too long" },
  invisible: "Nothing of this message could be seen, so it was not sent.",
  writingAnother: "You are writing another message. Send it or delete it first.",

  addPeople: "Add people",
  addPeopleTo: "Add people to “{title}”",
  invitePeople: "Invite people",
  add: "Add",
  create: "Create",
  title: "Title",
  findPeople: "Find people",
  choosable: "People",
  noOneToAdd: "There is no one to add.",
  inviteLater: "Choose a title, then invite people.",
  noOneCalled: "No one here is called “{name}”.",
  chosen: "{name} is chosen.",
  chooseOne: "Choose whom to add.",
  chooseOrTitle: "Choose people, or give the group a title and invite people later.",
  close: "Close",
  andMore: "and {left} more",
  creator: "creator",
  online: "online",
  rename: "Rename",
  remove: "Remove",
  removeTitle: "Remove {name}?",
  removeText: "This person can no longer read and write here.",
  leaveChat: "Leave chat",
  leaveTitle: "Leave “{title}”?",
  leaveText:
    "You will receive no more messages from this chat unless someone adds you again.",
  leave: "Leave",
  stay: "Stay",

  changeName: "Change your name",
  otherDevice: "Sign in on another device",
  otherDeviceText:
    "Open this link there within 10 minutes. Whoever has it is signed in as you, so give it to nobody else.",
  share: "Share",
  mute: "Mute: no notifications, and not counted as new",
  muted: "Muted",
  offerNotify: "Be notified of new messages while you look elsewhere?",
  turnOn: "Turn on",
  shortcuts: "Keyboard shortcuts",
  keyFind: "Find messages",
  keyRows: "Move in the list of chats",
  keyOpen: "Open the chat, or send the message",
  keyLine: "New line",
  keyEdit: "Edit your last message, in an empty field",
  keyClose: "Leave what is open",
};

/** @type {Record<Key, Words>} */
const ru = {
  opening: "Открываем ваши чаты…",
  stuck:
    "Что-то долго. Если так и останется, перезагрузите страницу или попробуйте другой браузер: этот, возможно, устарел или блокирует скрипты.",
  broken:
    "chatd не открылся в этом браузере. Перезагрузите страницу; если не поможет, попробуйте другой браузер. ({error})",
  tooOld: "Он устарел.",

  signInTo: "Вход в chatd",
  openLink: "Откройте полученную ссылку для входа или вставьте её сюда.",
  signInLink: "Ссылка для входа",
  signIn: "Войти",
  linkInvalid: "Эта ссылка для входа больше не действует. Попросите новую.",
  notALink: "Это не ссылка для входа: в ней нет #token=.",
  continueAsTitle: "Продолжить как {name}?",
  continueAsText:
    "Вы вошли как {me}. По этой ссылке вы войдёте в этой вкладке как {name}. Другие вкладки не изменятся.",
  continueAs: "Продолжить как {name}",
  stayAs: "Остаться как {name}",
  twoUsers: "В этой вкладке вы вошли как {me}, в других по-прежнему как {name}.",
  noStorage:
    "Браузер не даёт chatd ничего сохранить: после перезагрузки вы выйдете.",
  signOutTitle: "Выйти?",
  signOutText: "Неотправленные сообщения будут потеряны: {count}.",
  signOut: "Выйти",
  cancel: "Отмена",
  signedOut: "Вы вышли.",
  draftsStay: "Ваши черновики остались в этом браузере.",
  sessionEnded: "Ваш сеанс завершён.",
  signedOutElsewhere: "Вы вышли в другой вкладке.",

  joinTitle: "Вступить в чат «{title}»",
  joinChat: "Вступить в чат",
  join: "Вступить",
  membersSoFar: "Участников сейчас: {count}.",
  joinAs: "Вы вступите как {name}.",
  yourName: "Ваше имя",
  inviteExpired: "Срок этого приглашения истёк. Попросите новое.",
  inviteInvalid: "Это приглашение больше не действует. Попросите новое.",
  noInvites: "Приглашений здесь сейчас нет.",
  badName: "Укажите имя, которое смогут прочитать другие.",
  chatFull: "В чате нет мест.",
  inviteValid: {
    one: "{count} день по этой ссылке может вступить любой.",
    few: "{count} дня по этой ссылке может вступить любой.",
    many: "{count} дней по этой ссылке может вступить любой.",
    other: "{count} дня по этой ссылке может вступить любой.",
  },
  revokeLinks: "Отозвать прежние ссылки",
  linksEnded: "Прежние ссылки-приглашения больше не действуют.",
  copy: "Копировать",
  copied: "Скопировано",

  wasChanged: "Оно уже изменено.",
  wasDeleted: "Оно уже удалено.",
  notAllowed: "Вам это не разрешено.",
  serverError: "На сервере что-то пошло не так. Повторите позже.",
  notThere: "Этого больше нет, или оно вам недоступно.",
  busy: "Сервер занят. Повторите чуть позже.",
  tooMuch: "Слишком много сразу. Подождите немного и повторите.",
  cannotStore: "Сервер сейчас ничего не может сохранить. Повторите позже.",
  tooLong: "Слишком длинно.",
  tooLate: "Менять уже поздно.",
  noAnswer: "Сервер чата не отвечает.",
  otherError: "Не получилось ({code}).",
  badTitle: "Выберите другое название: это не подходит.",
  notAccepted: "Сервер этого не принимает.",
  mostPeople: "Участников в чате может быть не больше {most}.",
  cannotAdd: "Этих людей добавить нельзя.",

  connecting: "Соединение…",
  connected: "На связи",
  polling: "С задержкой",
  offline: "Нет связи",
  too_many: "Пауза",
  refused: "Отключено",
  connection: "Соединение",
  pollingTitle: "Связь прерывается.",
  pollingText: "chatd проверяет новые сообщения каждые 5 секунд.",
  offlineTitle: "Нет соединения.",
  offlineText: "Ваши сообщения сохранены и будут отправлены позже.",
  tooManyTitle: "chatd открыт в слишком многих местах.",
  tooManyText: "Закройте одно из них и вернитесь сюда.",
  refusedTitle: "Сервер закрыл соединение.",
  refusedText: "Чтобы соединиться снова, перезагрузите страницу.",
  tryingIn: "Повтор через {seconds} с.",
  tryingNow: "Повторяем…",
  tryNow: "Повторить",

  skip: "Перейти к полю сообщения",
  allChats: "chatd, все чаты",
  account: "Ваша учётная запись:",
  signedInAs: "Вы вошли как {name}",
  eachTab:
    "Вкладки независимы: в другой вкладке можно войти под другим именем.",
  draftsHere: "Черновиков в этом браузере: {count}.",
  draftsKept: "После выхода они останутся.",
  deleteThem: "Удалить их",
  deleteDraftsTitle: "Удалить черновики?",
  deleteDraftsText:
    "Всё, что вы написали в этом браузере и не отправили, будет потеряно.",
  deleteDrafts: "Удалить черновики",
  newMessages: "Новые сообщения",
  newCount: {
    one: "{count} новое сообщение",
    few: "{count} новых сообщения",
    many: "{count} новых сообщений",
    other: "{count} нового сообщения",
  },
  noneNew: "Новых сообщений нет",
  nothingNew: "Ничего нового.",
  notify: "Включить уведомления",
  notifyDenied: "Уведомления запрещены в настройках браузера.",
  arriving: "Новые сообщения по мере поступления",

  chats: "Чаты",
  newChat: "Новый чат",
  newGroup: "Новая группа",
  groupWith:
    "Личный чат останется как есть. Это новая группа: {name} и те, кого вы выберете.",
  noChats: "Чатов пока нет.",
  startInvite: "Создайте группу и пригласите людей по ссылке.",
  startChat: "Начните первый. Другие найдут вас по имени {name}.",
  waitForChat: "Вас должен добавить кто-то другой. Ваше имя здесь: {name}.",
  loading: "Загрузка…",
  unread: "не прочитано",
  you: "вы",
  youSaid: "Вы:",
  user: "Пользователь {id}",
  onlyYou: "Только вы",
  people: {
    one: "{count} участник",
    few: "{count} участника",
    many: "{count} участников",
    other: "{count} участника",
  },
  ownLast: "Вы: {text}",
  lastOf: "{name}: {text}",
  lastIn: "{name} в чате «{title}»: {text}",
  senderIn: "{name} в чате «{title}»",
  draft: "Черновик: {text}",
  noMessages: "Сообщений пока нет",
  today: "Сегодня",
  yesterday: "Вчера",

  chooseChat: "Выберите чат, чтобы читать и писать сообщения.",
  noChat: "Чат не открыт",
  back: "Назад ко всем чатам",
  peopleHere: "Участники чата",
  directChat: "Личный чат",
  messagesIn: "Сообщения чата «{title}»",
  latest: "Последние сообщения",

  search: "Поиск",
  searchChat: "Поиск в этом чате",
  searchHere: "Только в этом чате",
  searching: "Идёт поиск…",
  searchedBack: "Просмотрено вплоть до: {when}.",
  found: {
    one: "Найдено {count} сообщение.",
    few: "Найдено {count} сообщения.",
    many: "Найдено {count} сообщений.",
    other: "Найдено {count} сообщения.",
  },
  foundNothing: "Сообщений не найдено.",
  beginning: "Начало чата",
  sayHello: "Сообщений пока нет. Поздоровайтесь.",
  notLoaded: "Не удалось загрузить сообщения.",
  tryAgain: "Повторить",
  typing: "{name} печатает…",
  twoTyping: "{name} и {other} печатают…",
  manyTyping: "Несколько человек печатают…",
  blank: "(пустое сообщение)",
  deleted: "Сообщение удалено",
  joined: "{name} теперь в чате",
  left: "{name} больше не в чате",
  renamed: "{name} меняет название чата на «{title}»",
  nowCalled: "Чат теперь называется «{title}»",
  showAll: "Показать полностью",
  showLess: "Свернуть",
  sending: "Отправляется",
  sent: "Отправлено",
  read: "Прочитано",
  readBy: "Прочитали {readers} из {people}",
  readers: "Кто прочитал",
  notYet: "Ещё нет",
  notSent: "Не отправлено",
  notSentText: "Не отправлено: {text}",
  notSentReason: "Ваше сообщение не отправлено: {reason}",
  notSentIn: "Сообщение в чате «{title}» не отправлено.",
  notChanged: "Не удалось изменить сообщение: {reason}",
  tooLongBy: "Лишних символов: {count}, помещается не больше {most}.",
  badCharacters: "В нём есть символы, которые нельзя отправить.",
  mayNotWrite: "Вы не можете писать в этот чат.",
  edit: "Изменить",
  delete: "Удалить",
  actions: "Действия с сообщением",
  notCopied: "Браузер не даёт chatd копировать.",
  undo: "Вернуть",
  edited: "изменено",
  editing: "Изменение сообщения.",
  save: "Сохранить",
  discard: "Отменить изменение",
  notSaved: "Не сохранено: {text}",
  notDeleted: "Не удалено: {text}",
  deleteTitle: "Удалить это сообщение?",
  deleteText: "От текста ничего не осталось.",
  noLonger: "Вы больше не участвуете в чате «{title}».",

  yourMessage: "Ваше сообщение",
  write: "Напишите сообщение",
  send: "Отправить",
  used: "Символов: {used} из {most}",
  over: "Лишних символов: {count}",
  invisible: "В сообщении нечего увидеть, поэтому оно не отправлено.",
  writingAnother:
    "Вы пишете другое сообщение. Сначала отправьте его или удалите.",

  addPeople: "Добавить людей",
  addPeopleTo: "Добавить людей в чат «{title}»",
  invitePeople: "Пригласить людей",
  add: "Добавить",
  create: "Создать",
  title: "Название",
  findPeople: "Найти людей",
  choosable: "Люди",
  noOneToAdd: "Добавить некого.",
  inviteLater: "Выберите название, затем пригласите людей.",
  noOneCalled: "Здесь никого не зовут «{name}».",
  chosen: "Выбрано: {name}.",
  chooseOne: "Выберите, кого добавить.",
  chooseOrTitle:
    "Выберите людей или дайте группе название, а людей пригласите позже.",
  close: "Закрыть",
  andMore: "и ещё {left}",
  creator: "создатель",
  online: "в сети",
  rename: "Переименовать",
  remove: "Удалить",
  removeTitle: "Удалить участника {name}?",
  removeText: "Этот человек больше не сможет читать и писать здесь.",
  leaveChat: "Покинуть чат",
  leaveTitle: "Покинуть чат «{title}»?",
  leaveText: "Вы не будете получать сообщения этого чата, пока вас не добавят снова.",
  leave: "Покинуть",
  stay: "Остаться",

  changeName: "Изменить имя",
  otherDevice: "Войти на другом устройстве",
  otherDeviceText:
    "Откройте эту ссылку там в течение 10 минут. По ней входят под вашим именем, поэтому никому её не передавайте.",
  share: "Поделиться",
  mute: "Без звука: не уведомлять и не считать новые сообщения",
  muted: "Без уведомлений",
  offerNotify: "Уведомлять о новых сообщениях, когда вы не смотрите сюда?",
  turnOn: "Включить",
  shortcuts: "Сочетания клавиш",
  keyFind: "Найти сообщения",
  keyRows: "Перемещаться по списку чатов",
  keyOpen: "Открыть чат или отправить сообщение",
  keyLine: "Новая строка",
  keyEdit: "Изменить своё последнее сообщение (в пустом поле)",
  keyClose: "Выйти из того, что открыто",
};

/** @type {Record<string, Record<Key, Words>>} */
export const TABLES = { en, ru };
/** Letters and marks that turn the direction of the words around them. */
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
    return TURNS.test(value) ? `\u2068${value}\u2069` : value;
  });
}

const page = document.documentElement;
page.lang = language;
page.dir = /^(ar|fa|he|ur)$/.test(language) ? "rtl" : "ltr";
for (const [name, target] of [
  ["data-say", ""],
  ["data-say-label", "aria-label"],
  ["data-say-placeholder", "placeholder"],
]) {
  for (const node of page.querySelectorAll(`[${name}]`)) {
    const text = say(/** @type {Key} */ (node.getAttribute(`${name}`)));
    if (target) node.setAttribute(target, text);
    else node.textContent = text;
  }
}
