#!/usr/bin/env python3
"""Tell people about chat messages that stay unread, by mail (SMTP) or push (ntfy).

    notify.py --recipients people.txt --token-file service.token --smtp localhost:25

It needs Python 3.11 and nothing else. It uses two requests of chatd:

- The feed, every few seconds, says that there is a new message: --older-than seconds
  later somebody may have to be told.
- Then the unread list names the members to tell. Nothing else decides, so a message
  that came while this program did not run is told like any other. It is asked for at
  least every ten minutes.

NOBODY IS FORGOTTEN, AND NOBODY IS TOLD TWICE

A member is told once that there is something unread in a chat, and again only about
messages that were sent later, when the ones before are read. For each such member
--state holds a time: whatever was sent before it is told. It is the time of the oldest
unread message plus --older-than. The list showed the member, so chatd's clock was past
that time already. The clock of this machine only says when old notes may be dropped. If
chatd's clock was far ahead and is set right, move the notes away: they are from a time
that is still to come.

The note is written after the mail server has accepted the mail. If this program is
killed between the two, it repeats the mail, with the same Message-ID.
"""

from __future__ import annotations

import argparse
import email.header
import email.message
import email.policy
import email.utils
import fcntl
import http.client
import json
import os
import signal
import smtplib
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

NET_SECONDS = 30  # for the next bytes of chatd, of the mail server, or of ntfy
WHOLE_SECONDS = 120  # for a whole mail, push or request, however it dawdles
RETRY_SECONDS = 60  # after a failure; doubled each time, up to an hour
LOOK_SECONDS = 600  # the unread list is asked for at least so often


class Problem(Exception):
    """Something that an operator should know: a sentence."""


def say(sentence: object) -> None:
    # One line, whatever a server has answered.
    print("notify:", *str(sentence).split(), file=sys.stderr, flush=True)


@contextmanager
def limited() -> Iterator[None]:
    """Raise TimeoutError after WHOLE_SECONDS.

    A socket's timeout begins anew with each byte. Without this, a server that sends a
    byte now and then would stop everything.
    """

    def too_long(*_: object) -> None:
        raise TimeoutError(f"not done after {WHOLE_SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, WHOLE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes an error of a redirect: urllib would follow that of a POST with a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


web = urllib.request.build_opener(NoRedirect)
NO_ANSWER = (OSError, ValueError, http.client.HTTPException)


# --- chatd ---------------------------------------------------------------------------


def ask(options: argparse.Namespace, path: str, **query: object) -> Any:
    """Send a request to chatd; return its answer. Raises Problem."""
    url = f"{options.url}/api/v1/internal/chat/{path}?{urllib.parse.urlencode(query)}"
    # The token is read each time, so that a new one needs no restart.
    headers = {"Authorization": f"Bearer {read_token(options)}"}
    try:
        request = urllib.request.Request(url, headers=headers)
        with limited(), web.open(request, timeout=NET_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        why = ""
        with error, suppress(*NO_ANSWER), limited():
            why = error.read(500).decode(errors="replace")
        advice = ""
        if error.code in (401, 403):
            advice = "; make a token with: chatd token 1 --scope service"
        raise Problem(f"chatd answers {error.code}: {why}{advice}") from None
    except NO_ANSWER as error:
        raise Problem(f"chatd at {options.url} does not answer: {error}") from None


def read_token(options: argparse.Namespace) -> str:
    if not options.token_file:
        return str(os.environ["CHATD_TOKEN"]).strip()
    return read_file("--token-file", options.token_file).strip()


def read_file(what: str, path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeError) as error:
        raise Problem(f"{what} {path}: {error}") from None


class Feed:
    """The event log from now on. It only tells when a message has been sent."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cursor = ""
        self.found = True

    def has_new_messages(self) -> bool:
        """Read up to the end. True also where it cannot know: at first, and after a
        restore of the database."""
        more = True
        while more:
            query = {"cursor": self.cursor, "limit": 500} if self.cursor else {}
            page = ask(self.options, "events", **query)
            kinds = {event["type"] for event in page["events"]}
            # Kept, in case the next page fails.
            self.found |= page["resync"] or "new_message" in kinds
            self.cursor, more = page["cursor"], page["more"]
        found, self.found = self.found, False
        return found


class Unread(NamedTuple):
    """A member whose oldest unread message of a chat was sent at `since`."""

    user_id: int
    name: str | None
    chat_id: int
    unread: int
    since: str

    @property
    def key(self) -> str:
        return f"{self.chat_id}-{self.user_id}"

    @property
    def sent_at(self) -> int:
        return int(datetime.fromisoformat(self.since).timestamp())

    def message_id(self, options: argparse.Namespace) -> str:
        """The same whenever the same unread messages are told."""
        _, _, domain = email.utils.parseaddr(options.sender)[1].rpartition("@")
        return f"<chatd.{self.user_id}.{self.chat_id}.{self.sent_at}@{domain}>"


def unread_list(options: argparse.Namespace) -> Iterator[Unread]:
    query = {"older_than": options.older_than, "limit": 500}
    more = True
    while more:
        page = ask(options, "unread", **query)
        more = page["more"]
        for row in page["unread"]:
            yield Unread(*(row[field] for field in Unread._fields))
            query["after"] = row["position"]


# --- what is told already ------------------------------------------------------------


class Told:
    """The file that says up to which time a member was told of a chat's messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.upto: dict[str, int] = {}  # "CHAT-USER": Unix seconds
        if path.exists():
            text = read_file("--state", path)
            try:
                self.upto = {str(key): int(at) for key, at in json.loads(text).items()}
            except (ValueError, AttributeError, TypeError) as error:
                raise Problem(
                    f"--state {path}: not written by this program ({error}); "
                    "move it away: then everybody with unread messages is told again"
                ) from None

    def save(self) -> None:
        """Replace the file: after a crash it is the old one or the new one, whole."""
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump(self.upto, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise Problem(f"--state {self.path}: {error}; nobody is told") from None

    def prune(self, listed: set[str], older_than: int) -> None:
        """Drop notes of members who have read everything that they were told of.

        The list has all who have not, once the newest message of a note is old enough.
        """
        old = time.time() - 2 * older_than
        kept = {k: at for k, at in self.upto.items() if k in listed or at > old}
        if kept != self.upto:
            self.upto = kept
            self.save()


def lock(path: Path) -> TextIO:
    """Keep a second process from telling everybody twice. Hold the result."""
    file = path.with_name(path.name + ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Problem(f"--state {path}: another notify.py uses it") from None
    return file


# --- telling -------------------------------------------------------------------------


def read_recipients(options: argparse.Namespace) -> dict[int, str]:
    """Read lines such as `6 anna@example.org`, `7 https://ntfy.sh/topic`, `8 topic`.

    A wrong line is said, and is no reason not to tell the others.
    """
    found: dict[int, str] = {}
    text = read_file("--recipients", options.recipients)
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if len(words) == 2 and words[0].isdecimal():
            found[int(words[0])] = words[1]
        elif words:
            say(f"{options.recipients}, line {number}: not a user id and an address")
    return found


def text_about(unread: Unread, options: argparse.Namespace) -> tuple[str, str]:
    """Write the subject and the text. Change this to your own words."""
    many = (
        "1 unread message" if unread.unread == 1 else f"{unread.unread} unread messages"
    )
    where = (
        f"\n\n{options.link.replace('CHAT', str(unread.chat_id))}"
        if options.link
        else ""
    )
    return (
        f"You have {many}",
        f"Hello {unread.name or 'there'},\n\nyou have {many}.{where}\n",
    )


class Mailer:
    """One connection to the mail server, made when it is needed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.server: smtplib.SMTP | None = None
        self.down = False  # no answer: do not wait for one for each recipient

    def send(self, address: str, unread: Unread) -> None:
        """Return when the mail server has accepted the mail. Raises Problem."""
        options = self.options
        if not options.smtp:
            raise Problem("no mail server: give --smtp HOST:PORT")
        mail = email.message.EmailMessage(email.policy.SMTP)
        try:
            mail["From"], mail["To"] = options.sender, address
            subject, text = text_about(unread, options)
            mail["Subject"] = subject
            mail["Date"] = email.utils.localtime()
            mail["Message-ID"] = unread.message_id(options)
            mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: no auto-reply
            mail.set_content(text)
        except (ValueError, IndexError) as error:
            raise Problem(f"{address}: {error}") from None
        host, _, port = options.smtp.rpartition(":")
        began = time.monotonic()
        try:
            with limited():
                if self.server is None:
                    self.server = smtplib.SMTP(
                        host.strip("[]"), int(port), timeout=NET_SECONDS
                    )
                self.server.send_message(mail)
        except smtplib.SMTPRecipientsRefused as error:
            if self.server and not self.server.sock:  # 421 ends the connection
                self.close()
            raise Problem(f"refused: {error.recipients}") from None
        except (OSError, UnicodeError) as error:  # smtplib's errors are OSErrors
            hangs = time.monotonic() - began >= NET_SECONDS
            self.down = self.server is None or hangs
            self.close()
            raise Problem(f"mail server {options.smtp}: {error}") from None

    def close(self) -> None:
        """Leave, if there is a connection. What was accepted stays accepted."""
        server, self.server = self.server, None
        if server is not None:
            with suppress(OSError), limited():
                server.quit()


def push(topic: str, unread: Unread, options: argparse.Namespace) -> None:
    """Send a push to a topic of ntfy. Return when it is accepted. Raises Problem."""
    url = topic if "://" in topic else f"{options.ntfy.rstrip('/')}/{topic}"
    subject, text = text_about(unread, options)
    headers = {
        "Title": email.header.Header(subject).encode(maxlinelen=0),
        "Message-ID": unread.message_id(options),
    }
    try:
        request = urllib.request.Request(url, text.encode(), headers, method="POST")
        with limited(), web.open(request, timeout=NET_SECONDS):
            return
    except urllib.error.HTTPError as error:
        error.close()
        raise Problem(f"{url} answers {error.code}") from None
    except NO_ANSWER as error:
        raise Problem(f"{url}: {error}") from None


class Round:
    """Tells those who are to be told, and remembers whom it could not reach."""

    def __init__(self, options: argparse.Namespace, told: Told) -> None:
        self.options = options
        self.told = told
        self.waits: dict[str, tuple[float, float]] = {}  # key: not before, next wait

    def run(self) -> bool:
        """Ask for the unread list and tell. Return False if somebody is left."""
        options, told = self.options, self.told
        told.save()  # or raise Problem: without notes it would tell again and again
        recipients, mailer = read_recipients(options), Mailer(options)
        listed: set[str] = set()
        left: set[str] = set()
        try:
            for unread in unread_list(options):
                listed.add(unread.key)
                address = recipients.get(unread.user_id)
                if not address or unread.sent_at < told.upto.get(unread.key, 0):
                    continue
                by_mail = "@" in address and "://" not in address
                not_before, wait = self.waits.get(unread.key, (0.0, RETRY_SECONDS))
                if time.monotonic() < not_before or (by_mail and mailer.down):
                    left.add(unread.key)
                    continue
                try:
                    if by_mail:
                        mailer.send(address, unread)
                    else:
                        push(address, unread, options)
                except Problem as problem:
                    say(f"user {unread.user_id}: {problem}")
                    again = time.monotonic() + wait
                    self.waits[unread.key] = again, min(2 * wait, 3600)
                    left.add(unread.key)
                    continue
                told.upto[unread.key] = unread.sent_at + options.older_than
                told.save()
        finally:
            mailer.close()
        self.waits = {key: wait for key, wait in self.waits.items() if key in left}
        told.prune(listed, options.older_than)
        return not left


def run(options: argparse.Namespace) -> None:
    """Tell whenever a message may have become old enough, for ever.

    It also looks every LOOK_SECONDS: an address may have been corrected, or a clock
    set.
    """
    feed, tell = Feed(options), Round(options, Told(options.state))
    due: set[float] = set()
    look, wait = 0.0, options.every
    while True:
        try:
            if feed.has_new_messages():
                # A second more: the times of messages are in whole seconds.
                due.add(time.monotonic() // 1 + options.older_than + 1)
            now = time.monotonic()
            if min(due | {look}) <= now:
                look = now + (LOOK_SECONDS if tell.run() else RETRY_SECONDS)
                due = {at for at in due if at > now}
            wait = options.every
        except Problem as problem:
            say(problem)
            wait = min(2 * wait, RETRY_SECONDS)
        time.sleep(wait)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Tell people about chat messages that stay unread.",
        epilog="docs/operating.md says how to run it as a service.",
    )
    add = parser.add_argument
    add(
        "--recipients",
        type=Path,
        required=True,
        metavar="FILE",
        help="lines of a user id and a mail address, the URL of an ntfy topic, or a "
        "topic at --ntfy; read again each time",
    )
    add("--url", default="http://127.0.0.1:8086", help="chatd (default %(default)s)")
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="a token of chatd with scope service, else in $CHATD_TOKEN",
    )
    add(
        "--smtp",
        metavar="HOST:PORT",
        help="the mail server; it must take mail of this machine without a password",
    )
    add(
        "--from",
        dest="sender",
        default="chatd@localhost",
        metavar="ADDRESS",
        help="the sender of the mails (default %(default)s)",
    )
    add(
        "--ntfy",
        default="https://ntfy.sh",
        metavar="URL",
        help="the ntfy server of topics without one (default %(default)s)",
    )
    add(
        "--link",
        default="",
        metavar="URL",
        help="the page to open; CHAT in it becomes the id of the chat",
    )
    add(
        "--older-than",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long a message stays unread before it is told (default %(default)s)",
    )
    add(
        "--state",
        type=Path,
        default=Path("notify.json"),
        metavar="FILE",
        help="what was told (default %(default)s)",
    )
    add(
        "--every",
        type=float,
        default=5,
        metavar="SECONDS",
        help="how often to look at the feed (default %(default)s)",
    )
    add(
        "--once",
        action="store_true",
        help="ask for the unread list once, tell, and exit: 1 if somebody is left",
    )
    options = parser.parse_args()  # fmt: skip
    options.url = options.url.rstrip("/")
    host, _, port = (options.smtp or "localhost:25").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        parser.error(f"--smtp {options.smtp}: not HOST:PORT")
    if options.older_than < 1 or options.every <= 0:
        parser.error("--older-than and --every must be more than 0")
    if not options.token_file and "CHATD_TOKEN" not in os.environ:
        parser.error("no token: give --token-file FILE, or $CHATD_TOKEN")
    return options


def main() -> int:
    """Return the exit status: 0, 1 if --once left somebody, 2 for a wrong option."""
    options = read_options()
    try:
        with lock(options.state):
            if options.once:
                return 0 if Round(options, Told(options.state)).run() else 1
            read_recipients(options)
            run(options)
    except (Problem, OSError) as problem:
        say(problem)
        return 1 if options.once else 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
