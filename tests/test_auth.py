"""Auth and limits: buckets, addresses, origins, keys, tokens, tickets, revocation.

Buckets get the time as an argument, and tokens carry it in their claims, so neither
test waits for a clock.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import errno
import hashlib
import hmac
import itertools
import json
import math
import os
import random
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import hypothesis
import jwt
import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

import chatd
from chatd import Keyring, Rate, Refusal, Settings, UsageError
from tests.client import (
    CLOSE,
    NO_RATES,
    TEXT,
    Disconnected,
    ServerProcess,
    SocketClient,
    command_bytes,
    frame_bytes,
    new_users,
    request_bytes,
    run_chatd,
    take_frames,
    upgrade_bytes,
    wait_until,
)
from tests.harness import (
    KEY_PARTS,
    VirtualServer,
    certificate_of,
    jwk_of,
    new_private_key,
    refusal_of,
    taking,
    usage_error_of,
    with_server,
)

# --- buckets -------------------------------------------------------------------------


def test_a_bucket_allows_its_burst_at_once_and_then_its_rate() -> None:
    bucket = chatd.Bucket(Rate(5, 20))
    assert [bucket.take(now=100.0) for _ in range(20)] == [0.0] * 20
    assert bucket.take(now=100.0) == pytest.approx(0.2)
    assert bucket.take(now=100.1) == pytest.approx(0.1)
    assert [bucket.take(now=100.2), bucket.take(now=100.2)] == pytest.approx([0.0, 0.2])


def test_an_idle_bucket_fills_up_to_its_burst_and_no_further() -> None:
    bucket = chatd.Bucket(Rate(1, 3))
    assert [bucket.take(now=0.0) for _ in range(4)] == pytest.approx([0, 0, 0, 1])
    assert [bucket.take(now=1e6) for _ in range(4)] == pytest.approx([0, 0, 0, 1])


def test_a_rate_of_0_means_no_limit() -> None:
    bucket, buckets = chatd.Bucket(Rate(0, 0)), chatd.bucket_table(Rate(0, 0))
    assert not any(bucket.take(now=0.0) for _ in range(1000))
    assert not any(buckets(key).take(now=0.0) for key in [*range(1000), *[0] * 1000])
    assert bucket.spend(-1, 0.0) == 0
    assert bucket.spend(1e12, 0.0) == 0
    assert not any(bucket.take(now=0.0) for _ in range(1000))


@given(
    st.integers(1, 50),
    st.integers(1, 20),
    st.lists(st.floats(0, 2), min_size=1, max_size=60),
)
def test_over_any_interval_a_bucket_allows_at_most_its_burst_plus_its_rate(
    rate: int, burst: int, pauses: list[float]
) -> None:
    bucket, given_at = chatd.Bucket(Rate(rate, burst)), list[float]()
    for now in itertools.accumulate(pauses):
        wait = bucket.take(now=now)
        if not wait:
            given_at.append(now)
        else:  # and the wait that it returns is long enough
            assert not copy_of(bucket).take(now=now + wait + 1e-6)
    for first, last in itertools.combinations(range(len(given_at)), 2):
        seconds = given_at[last] - given_at[first]
        assert last - first + 1 <= burst + seconds * rate + 1e-6


def copy_of(bucket: chatd.Bucket) -> chatd.Bucket:
    """A bucket in the same state."""
    copy = chatd.Bucket(bucket.rate)
    copy.full_at = bucket.full_at
    return copy


def test_each_key_has_its_own_bucket() -> None:
    buckets = chatd.bucket_table(Rate(1, 1))
    assert [buckets(key).take(now=5.0) for key in "aab"] == pytest.approx([0, 1, 0])


def test_a_bucket_token_that_is_given_back_can_be_taken_once_more() -> None:
    used, full = chatd.Bucket(Rate(1, 2)), chatd.Bucket(Rate(1, 2))
    assert [used.take(now=5.0) for _ in range(3)] == pytest.approx([0, 0, 1])
    used.spend(-1, 5.0)
    full.spend(-1, 5.0)
    assert [used.take(now=5.0) for _ in range(2)] == pytest.approx([0, 1])
    assert [full.take(now=5.0) for _ in range(3)] == pytest.approx([0, 0, 1])


def test_a_table_of_buckets_is_bounded_and_drops_the_least_recently_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chatd, "TABLE_KEYS", 3)
    buckets = chatd.bucket_table(Rate(1, 1))
    for key in ("a", "b", "c", "a", "d"):
        buckets(key).spend(1, 0.0)
    assert [buckets(key).take(now=0.0) for key in "cad"] == pytest.approx([1, 2, 1])
    assert buckets("b").take(now=0.0) == 0  # it was dropped, so its new bucket is full


def test_spend_may_overdraw_and_returns_the_seconds_until_the_debt_is_paid() -> None:
    bucket = chatd.Bucket(Rate(100, 500))
    assert bucket.spend(500, 10.0) == 0
    assert bucket.spend(250, 10.0) == pytest.approx(2.5)
    assert bucket.spend(0, 12.0) == pytest.approx(0.5)
    assert bucket.take(now=12.0) == pytest.approx(0.51)
    assert bucket.spend(0, 1000.0) == 0
    assert bucket.spend(501, 1000.0) == pytest.approx(0.01)


def test_a_refused_take_costs_nothing_and_an_overdraft_delays_the_next_take() -> None:
    bucket = chatd.Bucket(Rate(1, 2))
    assert [bucket.take(now=0.0) for _ in range(9)] == pytest.approx([0, 0] + [1] * 7)
    assert bucket.spend(3, 0.0) == pytest.approx(3)
    assert bucket.take(now=3.0) == pytest.approx(1)
    assert bucket.take(now=4.0) == 0


# --- addresses and origins -----------------------------------------------------------


PROXIES = ("127.0.0.0/8", "::1", "10.0.0.0/8", "2001:db8::/32")


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        # A peer that is not a trusted proxy: its header is ignored.
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        # From the right, the first address that is not a trusted proxy. Entries
        # further left are not verified.
        ("127.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", ["6.6.6.6, 198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", ["6.6.6.6", "198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", ["198.51.100.1, 10.1.2.3,127.0.0.1"], "198.51.100.1"),
        ("127.0.0.1", ["10.0.0.1, 10.0.0.2"], "10.0.0.1"),
        ("10.9.9.9", ["2001:db8::1, 2600::5, 2001:db8::2"], "2600::5"),
        # If an entry is no address, the peer counts; left of the client it is not
        # read.
        ("127.0.0.1", ["unknown"], "127.0.0.1"),
        ("127.0.0.1", ["198.51.100.1, x"], "127.0.0.1"),
        ("127.0.0.1", ["198.51.100.1,"], "127.0.0.1"),
        ("127.0.0.1", ["198.51.100.1, _hidden"], "127.0.0.1"),
        # Entries with a port, of any trusted proxy on the way.
        ("127.0.0.1", ["198.51.100.1:4711"], "198.51.100.1"),
        ("127.0.0.1", ["6.6.6.6, [2600::5]:443, 10.0.0.1:80"], "2600::5"),
        ("127.0.0.1", ["x, 198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", [""], "127.0.0.1"),
        ("127.0.0.1", [], "127.0.0.1"),
        # IPv4-mapped IPv6 addresses, as peer and as entry.
        ("::ffff:127.0.0.1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", ["198.51.100.1, ::ffff:10.0.0.1"], "198.51.100.1"),
    ],
)
def test_the_client_is_the_rightmost_address_that_is_not_a_trusted_proxy(
    peer: str, forwarded: list[str], client: str
) -> None:
    proxies = chatd.Proxies(PROXIES)
    found = proxies.client(chatd.parse_address(peer), ",".join(forwarded))
    assert str(found) == client


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        (" 192.0.2.1\t", "192.0.2.1"),
        ("192.0.2.1:1000", "192.0.2.1"),
        ("192.0.2.1:", "192.0.2.1"),
        ('"192.0.2.1:1000"', "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("2001:DB8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        (' "[2001:db8::1]:443" ', "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%25eth0]:443", "fe80::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("[::ffff:192.0.2.1]:1000", "192.0.2.1"),
        ("::ffff:c000:201", "192.0.2.1"),
        *[
            (text, "None")
            for text in (
                "", "-", "unknown", "_hidden", "unix:", "localhost", "for=192.0.2.1",
                "192.0.2.1:http", "192.0.2.1:80:80", "192.0.2.256", "1.2.3.4 1.2.3.4",
                "192.0.2", "٣.0.2.1:80", "[2001:db8::1", "2001:db8::1]:443", "[]:80",
                "192.0.2.1/32", ":80", '"', "%eth0",
            )
        ],
    ],
)  # fmt: skip
def test_an_address_is_read_in_every_form_that_proxies_write(
    text: str, address: str
) -> None:
    assert str(chatd.parse_address(text)) == address


def test_without_a_trusted_proxy_or_a_peer_address_no_header_is_believed() -> None:
    local = chatd.parse_address("127.0.0.1")
    assert chatd.Proxies(["none"]).client(local, "1.2.3.4") == local
    assert chatd.Proxies(PROXIES).client(None, "1.2.3.4") is None


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("198.51.100.1", "198.51.100.1"),
        ("::ffff:198.51.100.1", "198.51.100.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("nobody", "None"),
    ],
)
def test_an_ipv6_address_is_limited_by_its_64_prefix(address: str, key: str) -> None:
    assert chatd.address_key(chatd.parse_address(address)) == key


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("http://chat.example", "chat.example", True),
        ("http://chat.example", "chat.example:80", True),
        ("http://chat.example:80", "chat.example", True),
        ("https://chat.example", "chat.example:443", True),
        ("https://Chat.Example", "CHAT.example", True),
        ("http://[::1]:8086", "[::1]:8086", True),
        ("https://[::1]", "[::1]:443", True),
        ("https://chat.example:443", "chat.example:443", True),
        ("https://chat.example:8443", "chat.example:8443", True),
        ("https://chat.example:8443", "chat.example", False),
        ("http://chat.example:8080", "chat.example:80", False),
        ("https://chat.example", "evil/chat.example", False),
        ("http://localhost:8086", "localhost:8086", True),
        ("http://localhost:3000", "localhost:8086", False),
        ("https://chat.example", "chat.example:80", False),
        ("http://chat.example", "chat.example:443", False),
        ("http://chat.example.evil", "chat.example", False),
        ("http://evil", "chat.example", False),
        ("http://chat.example@evil", "chat.example", False),
        ("null", "null", False),
        ("", "", False),
        ("file://", "", False),
        ("ws://chat.example", "chat.example", False),
        ("chat.example", "chat.example", False),
    ],
)
def test_an_origin_is_our_own_if_it_names_the_requested_host(
    origin: str, host: str, same: bool
) -> None:
    assert chatd.same_origin(origin, ["other.example", host]) is same
    assert chatd.same_origin(origin, []) is False


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("https://shop.example", "https://shop.example"),
        ("https://shop.example/", "https://shop.example"),
        ("HTTPS://Shop.Example", "https://shop.example"),
        ("https://shop.example:443", "https://shop.example"),
        ("https://shop.example:443/", "https://shop.example"),
        ("https://shop.example:0443", "https://shop.example"),
        ("http://shop.example:80", "http://shop.example"),
        ("http://shop.example:443", "http://shop.example:443"),
        ("https://shop.example:80", "https://shop.example:80"),
        ("https://shop.example:8443", "https://shop.example:8443"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://127.0.0.1:80", "http://127.0.0.1"),
        ("http://my_host", "http://my_host"),
        ("http://[::1]:80", "http://[::1]"),
        ("http://[2001:DB8:0:0:0:0:0:1]:8086/", "http://[2001:db8::1]:8086"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("https://BÜCHER.Example:443", "https://xn--bcher-kva.example"),
        ("https://shop.münchen.example:8443", "https://shop.xn--mnchen-3ya.example:8443"),
        ("https://faß.example", "https://xn--fa-hia.example"),  # not fass
        ("https://例え.テスト", "https://xn--r8jz45g.xn--zckzah"),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
        # Apps: Capacitor, Ionic, Tauri, Electron; extensions; pages without an origin.
        ("capacitor://localhost", "capacitor://localhost"),
        ("Ionic://localhost/", "ionic://localhost"),
        ("tauri://localhost", "tauri://localhost"),
        ("https://tauri.localhost", "https://tauri.localhost"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("chrome-extension://abcdefghijklmnop", "chrome-extension://abcdefghijklmnop"),
        ("file://", "file://"),
        ("file:///", "file://"),
        ("null", "null"),
        ("NULL", "null"),
    ],
)  # fmt: skip
def test_an_allowed_origin_is_stored_as_browsers_send_it(text: str, sent: str) -> None:
    assert chatd.PARSERS["ORIGIN"](text) == sent
    assert chatd.PARSERS["ORIGIN"](sent) == sent


@pytest.mark.parametrize(
    "text",
    [
        "", "*", "https://*", "https://*.shop.example", "shop.example", "//a.example",
        "localhost:3000", "https:shop.example", "https:/shop.example", "https://",
        "https://:443", "https://shop.example/chat", "https://shop.example//",
        "https://shop.example?x", "https://shop.example#x", "https://me@shop.example",
        "https://me:pw@shop.example", "https://shop example", "https://shop.example:",
        "https://shop.example:0", "https://shop.example:65536", "https://shop.example:x",
        "https://shop.example:443:443", "https://a.example,https://b.example",
        "wss://shop.example", "ws://shop.example", "ftp://shop.example", "data:,x",
        "about:blank", "http://[::1", "http://[::g]", "http://[fe80::1%25eth0]",
        "http://[192.0.2.1]", "capacitor://localhost/x", "file:///home", "undefined",
    ],
)  # fmt: skip
def test_an_origin_that_no_browser_sends_is_refused_and_the_error_says_what_to_write(
    text: str,
) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        chatd.PARSERS["ORIGIN"](text)
    assert str(caught.value).startswith(f"{text!r} is not an origin: write ")
    assert "https://shop.example.org" in str(caught.value)


# --- tokens --------------------------------------------------------------------------


SECRET = b"s" * 32
SHARED_SECRET = b"f" * 40  # the secret of the backend


def time_in(seconds: float = 600) -> float:
    return int(time.time()) + seconds


def forge(header: dict[str, object], body: dict[str, object], key: bytes) -> str:
    """A token as an attacker makes it: with any header, and an HMAC with any key."""
    parts = [json.dumps(part).encode() for part in (header, body)]
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    mac = hmac.digest(key, signed, hashlib.sha256) if key else b""
    return (signed + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")).decode()


def keyring_of(*keys: Path, secret: bytes = SECRET, **more: Any) -> Keyring:
    return Keyring(Settings(jwt_key=keys, **more), secret)


def make_token(secret: bytes = SECRET, /, **claims: object) -> str:
    """A token of user 6 for ten minutes. A claim of `...` is left out."""
    body = {"user_id": 6, "exp": time_in()} | claims
    body = {name: value for name, value in body.items() if value is not ...}
    return forge({"alg": "HS256", "typ": "JWT"}, body, secret)


@pytest.fixture
def shared_key(tmp_path: Path) -> Path:
    """A --jwt-key file with the shared secret of the backend."""
    (tmp_path / "shared").write_bytes(SHARED_SECRET + b"\n")
    return tmp_path / "shared"


def public_pem(kind: str) -> bytes:
    pem: bytes = new_private_key(kind).public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
    return pem


@pytest.mark.parametrize(
    ("claims", "user_id"),
    [
        ({"user_id": 6}, 6),
        ({"user_id": 1}, 1),
        ({"user_id": 2**53 - 1}, 2**53 - 1),
        ({"user_id": "6"}, 6),
        ({"user_id": str(2**53 - 1)}, 2**53 - 1),
        ({"user_id": "6", "sub": "7"}, 6),
        ({"user_id": 6, "sub": "7"}, 6),
        ({"user_id": 6, "sub": None}, 6),
        ({"user_id": 6, "sub": ["x"]}, 6),
        ({"user_id": ..., "sub": 7}, 7),
        ({"user_id": ..., "sub": "7"}, 7),
        ({"user_id": ..., "sub": str(2**53 - 1)}, 2**53 - 1),
    ],
)
def test_the_user_is_the_claim_user_id_or_else_sub(
    claims: dict[str, object], user_id: int
) -> None:
    assert keyring_of().verify(make_token(**claims)).user_id == user_id


NO_USER: list[Any] = [
    "", "x", "6a", " 6", "6 ", "6\n", "-6", "+6", "6.0", "6e0", "0x6", "6_0", "٦", "６",
    "²", "0", "1" * 17, "9" * 30, str(2**53), str(2**64 + 6),
    "\ud83d", None, True, 6.0, 0, -1, 2**53, 10**30, [6], ["6"], {},
]  # fmt: skip


@pytest.mark.parametrize(
    "claims",
    [
        {"user_id": ...},
        *[{"user_id": wrong} for wrong in NO_USER],
        *[{"user_id": ..., "sub": wrong} for wrong in NO_USER],
        {"user_id": "x", "sub": "6"},
        {"user_id": None, "sub": "6"},
    ],
)
def test_a_token_without_a_valid_user_number_is_refused(
    claims: dict[str, object],
) -> None:
    refusal = refusal_of(keyring_of().verify, make_token(**claims))
    assert (refusal.code, refusal.status) == ("token_invalid", 401)
    assert "user_id" in refusal.message


NO_TIME: list[Any] = [None, "x", "", "\ud83d", True, [], {}, -1, -math.inf, 10**400]


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({"exp": ...}, "token_invalid"),
        ({"exp": 0}, "token_expired"),
        ({"exp": 1.5}, "token_expired"),
        ({"exp": -6}, "token_invalid"),
        ({"exp": "soon"}, "token_invalid"),
        ({"exp": "9999999999"}, "token_invalid"),
        ({"exp": None}, "token_invalid"),
        ({"exp": True}, "token_invalid"),
        ({"exp": [9]}, "token_invalid"),
        ({"exp": 1e12}, "token_invalid"),
        ({"exp": 10**400}, "token_invalid"),
        ({"exp": math.nan}, "token_invalid"),
        ({"exp": math.inf}, "token_invalid"),
        ({"iat": "x"}, "token_invalid"),
        ({"iat": "5"}, "token_invalid"),
        ({"iat": -1}, "token_invalid"),
        ({"iat": 4e9}, "token_invalid"),
        *[
            ({claim: wrong}, "token_invalid")
            for claim in ("exp", "iat", "nbf")
            for wrong in NO_TIME
        ],
        ({"nbf": 4e9}, "token_invalid"),
        ({"use": "fly"}, "token_invalid"),
        ({"use": 5}, "token_invalid"),
        ({"use": ["ticket"]}, "token_invalid"),
    ],
)
def test_a_token_with_an_invalid_time_or_use_is_refused(
    claims: dict[str, object], code: str
) -> None:
    refusal = refusal_of(keyring_of().verify, make_token(**claims))
    assert refusal.code == code
    (claim,) = claims
    assert code == "token_expired" or re.search(rf"\b{claim}\b", refusal.message)


def test_clocks_may_differ_by_less_than_5_seconds() -> None:
    ring = keyring_of()
    assert ring.verify(make_token(exp=time_in(-3))).expires_in() == 0
    assert ring.verify(make_token(iat=time_in(3), nbf=time_in(3))).user_id == 6
    for claims in ({"exp": time_in(-5)}, {"exp": time_in(-5) + 0.0}):
        assert refusal_of(ring.verify, make_token(**claims)).code == "token_expired"
    refusal = refusal_of(ring.verify, make_token(iat=time_in(60)))
    assert (refusal.code, "clocks" in refusal.message) == ("token_invalid", True)


def test_a_verified_token_yields_its_claims() -> None:
    exp = time_in()
    claims = keyring_of().verify(
        make_token(
            exp=exp, iat=5, name=" Bob\n", scope="stats service x", use="session"
        )
    )
    assert (claims.exp, claims.iat, claims.name, claims.ends) == (exp, 5, "Bob", exp)
    assert claims.scopes == {"stats", "service", "x"}
    assert claims.service
    assert 595 <= claims.expires_in() <= 600
    assert not keyring_of().verify(make_token(scope=["service"])).service


def test_a_cached_token_still_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    ring, token = keyring_of(), make_token(user_id=6, exp=time_in())
    assert ring.verify(token) is ring.verify(token)  # its signature is checked once
    late = time_in() + 60
    monkeypatch.setattr(time, "time", lambda: late)
    with pytest.raises(Refusal, match="token_expired"):
        ring.verify(token)


def test_a_cached_token_can_be_revoked() -> None:
    ring, token = keyring_of(), make_token(user_id=6, iat=time.time() - 60)
    ring.verify(token)
    ring.revoked[6] = int(time.time())
    with pytest.raises(Refusal, match="revoked"):
        ring.verify(token)


def test_the_cache_of_verified_tokens_is_bounded() -> None:
    ring = keyring_of(known_tokens=2)
    tokens = [make_token(user_id=user) for user in (1, 2, 3)]
    claims = [ring.verify(token) for token in tokens]
    assert ring.verify(tokens[2]) is claims[2]
    assert ring.verify(tokens[0]) is not claims[0]
    assert ring.verify(tokens[0]) == claims[0]


def bad_tokens() -> dict[str, str]:
    body: dict[str, object] = {"user_id": 6, "exp": time_in()}
    good = make_token()
    head, middle, mac = good.split(".")
    other = make_token(user_id=7).split(".")[1]
    hs256: dict[str, object] = {"alg": "HS256", "typ": "JWT"}
    deep = base64.urlsafe_b64encode(b"[" * 2500).decode().rstrip("=")
    return {
        "nothing": "",
        "one word": "token",
        "three words": "a.b.c",
        "no signature": f"{head}.{middle}.",
        "another signature": f"{head}.{middle}.{mac[::-1]}",
        "other claims under a signature": f"{head}.{other}.{mac}",
        "alg none": forge({"alg": "none"}, body, b""),
        "alg NONE, signed": forge({"alg": "NONE"}, body, SECRET),
        "no alg": forge({"typ": "JWT"}, body, SECRET),
        "alg of another family": forge({"alg": "RS256"}, body, SECRET),
        "alg HS512": jwt.encode(body, SECRET * 2, "HS512"),
        "another key": make_token(b"x" * 32),
        "an empty key": forge(hs256, body, b"\0"),
        "a kid that is no text": forge({**hs256, "kid": 5}, body, SECRET),
        "an unknown crit": forge({**hs256, "crit": ["x"]}, body, SECRET),
        "a body apart": forge({**hs256, "b64": False, "crit": ["b64"]}, body, SECRET),
        "a list for a body": forge(hs256, cast(Any, [body]), SECRET),
        "a deep body": f"{head}.{deep}.{mac}",
        "no ASCII": "é" * 40 + ".ü.ñ",
        "a lone surrogate": "\ud800.a.b",
        "five parts": f"{good}.a.b",
        "a line end": good.replace(".", ".\n", 1),
        "too long": make_token(name="x" * 4000),
    }


@pytest.mark.parametrize("what", bad_tokens())
def test_a_bad_token_is_refused_and_the_error_quotes_nothing_of_it(what: str) -> None:
    token = bad_tokens()[what]
    refusal = refusal_of(keyring_of().verify, token)
    assert (refusal.code, refusal.status) == ("token_invalid", 401)
    assert not any(
        part in refusal.message for part in token.split(".") if len(part) > 8
    )


@given(st.text(max_size=200) | st.from_regex(r"[\w-]+\.[\w-]+\.[\w-]+", fullmatch=True))
def test_arbitrary_text_is_refused_as_an_invalid_token(token: str) -> None:
    assert refusal_of(keyring_of().verify, token, "socket").code == "token_invalid"


def test_a_token_of_4_kib_is_accepted_and_one_byte_more_is_not() -> None:
    sizes = {len(token): token for token in (
        forge({"alg": "HS256", "kid": "k" * k},
                    {"user_id": 6, "exp": time_in(), "pad": "x" * n}, SECRET)
        for k in range(3) for n in range(2900, 3000))}  # fmt: skip
    assert keyring_of().verify(sizes[4096]).user_id == 6
    assert "4096" in refusal_of(keyring_of().verify, sizes[4097]).message


# --- keys of the backend -------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_public_key_verifies_its_own_algorithm_and_no_other(
    algorithm: str, tmp_path: Path
) -> None:
    path = tmp_path / "public.pem"
    path.write_bytes(public_pem(algorithm))
    body: dict[str, object] = {"user_id": 6, "exp": time_in()}
    ring = keyring_of(path)
    assert chatd.read_jwt_key(path).algorithm == algorithm
    token = jwt.encode(body, new_private_key(algorithm), algorithm)
    assert ring.verify(token).user_id == 6
    # CVE-2022-29217: the public key, which anyone has, used as a shared secret.
    for pem in (path.read_bytes(), path.read_bytes().strip()):
        for alg in ("HS256", algorithm, "none"):
            refusal_of(ring.verify, forge({"alg": alg}, body, pem))
    if algorithm == "RS256":
        other = jwt.encode(body, new_private_key(algorithm), "PS256")
        assert refusal_of(ring.verify, other).code == "token_invalid"


def test_with_several_keys_a_token_of_any_of_them_is_accepted(
    tmp_path: Path, shared_key: Path
) -> None:
    (tmp_path / "new").write_bytes(b"n" * 32)
    (tmp_path / "pem").write_bytes(public_pem("ES256"))
    ring = keyring_of(tmp_path / "pem", shared_key, tmp_path / "new")
    body = {"user_id": 6, "exp": time_in()}
    for secret in (SECRET, SHARED_SECRET, b"n" * 32):
        assert ring.verify(make_token(secret)).user_id == 6
    assert ring.verify(jwt.encode(body, new_private_key("ES256"), "ES256")).user_id == 6
    expired = make_token(b"n" * 32, exp=time_in(-60))
    assert refusal_of(ring.verify, expired).code == "token_expired"
    assert refusal_of(ring.verify, make_token(b"x" * 32)).code == "token_invalid"


def test_scope_and_use_count_only_in_tokens_signed_by_chatd(shared_key: Path) -> None:
    ring = keyring_of(shared_key)
    claims = ring.verify(
        make_token(SHARED_SECRET, scope="service stats", use="fly", name="Bob")
    )
    assert (claims.scopes, claims.use, claims.name) == (frozenset(), None, "Bob")
    ticket = make_token(SHARED_SECRET, use="ticket", boot=ring.boot, jti="j")
    assert ring.verify(ticket).use is None  # a plain token like any other
    signin = make_token(SHARED_SECRET, use="signin")
    assert refusal_of(ring.verify, signin, "signin").code == "token_invalid"


def test_claims_private_to_chatd_are_ignored_in_backend_tokens(
    shared_key: Path,
) -> None:
    token = make_token(
        SHARED_SECRET, until="tomorrow", boot=[], use={}, scope=1, jti=5, foreign=False
    )
    claims = keyring_of(shared_key).verify(token)
    assert (claims.user_id, claims.foreign) == (6, True)
    assert not keyring_of().verify(make_token(foreign=True)).foreign


@pytest.mark.parametrize(
    ("claims", "good"),
    [
        ({}, False),
        ({"iss": "shop"}, False),
        ({"aud": "chat"}, False),
        ({"iss": "shop", "aud": "chat"}, True),
        ({"iss": "shop", "aud": ["mail", "chat"]}, True),
        ({"iss": "shop", "aud": "mail"}, False),
        ({"iss": "shop", "aud": ["mail"]}, False),
        ({"iss": "shopping", "aud": "chat"}, False),
        ({"iss": "sho", "aud": "chat"}, False),
        ({"iss": ["shop"], "aud": "chat"}, False),
        ({"iss": None, "aud": "chat"}, False),
        ({"iss": "shop", "aud": None}, False),
        ({"iss": "shop", "aud": 5}, False),
        ({"iss": "shop", "aud": [["chat"]]}, False),
    ],
)
def test_issuer_and_audience_are_checked_in_backend_tokens_only(
    claims: dict[str, object], good: bool, shared_key: Path
) -> None:
    ring = keyring_of(shared_key, issuer="shop", audience="chat")
    token = make_token(SHARED_SECRET, **claims)
    if good:
        assert ring.verify(token).user_id == 6
    else:
        message = refusal_of(ring.verify, token).message
        assert re.search(r"\b(iss|aud)\b", message)
    assert ring.verify(make_token(iss="us", aud="us")).user_id == 6  # our own


@pytest.mark.parametrize("aud", ["mail", ["mail", "news"], 5])
def test_without_a_configured_audience_any_audience_is_accepted(
    aud: object, shared_key: Path
) -> None:
    token = make_token(SHARED_SECRET, aud=aud)
    assert keyring_of(shared_key).verify(token).user_id == 6


# --- tickets, sign-in links, revocation ----------------------------------------------


def test_a_ticket_ends_in_a_minute_but_its_socket_with_the_requesting_token() -> None:
    ring = keyring_of()
    asking = ring.verify(make_token(exp=time_in(9000), scope="service"))
    ticket = ring.verify(ring.ticket(asking)["token"], "socket")
    assert (ticket.user_id, ticket.use, ticket.ends) == (6, "ticket", asking.exp)
    assert ticket.service
    assert 55 <= ticket.exp - time.time() <= 60
    assert 8990 <= ticket.expires_in() <= 9000


def test_a_ticket_works_once() -> None:
    ring = keyring_of()
    token = ring.ticket(ring.verify(make_token()))["token"]
    first, second = ring.verify(token, "socket"), ring.verify(token + "=", "socket")
    ring.spend(first)
    for again in (first, second):
        assert refusal_of(ring.spend, again).code == "token_used"
    assert refusal_of(ring.verify, token, "socket").code == "token_used"


def test_two_tickets_from_one_token_are_independent() -> None:
    ring = keyring_of()
    asking = ring.verify(make_token())
    for _ in range(2):
        ring.spend(ring.verify(ring.ticket(asking)["token"], "socket"))
    ring.spend(asking)
    ring.spend(asking)  # a plain token can be used again
    assert len(ring.spent) == 2


def test_a_ticket_is_valid_only_in_the_process_that_issued_it() -> None:
    ring, next_process = keyring_of(), keyring_of()
    ticket = ring.ticket(ring.verify(make_token()))["token"]
    refusal = refusal_of(next_process.verify, ticket, "socket")
    assert (refusal.code, refusal.status) == ("token_used", 401)
    assert refusal.message == "a ticket from before a restart: get a new one"
    ring.spend(ring.verify(ticket, "socket"))
    assert "used already" in refusal_of(ring.verify, ticket, "socket").message


@pytest.mark.parametrize("use", [None, "signin"])
def test_a_ticket_is_never_a_bearer_token(use: str | None) -> None:
    ring = keyring_of()
    refusal = refusal_of(
        ring.verify, ring.ticket(ring.verify(make_token()))["token"], use
    )
    assert (refusal.code, "ticket" in refusal.message) == ("token_invalid", True)


@pytest.mark.parametrize(
    ("use", "purpose", "good"),
    [
        ("signin", "signin", True),
        ("signin", None, False),
        ("signin", "socket", False),
        ("signin", "edge", False),
        ("signin", "session", False),
        ("signin", "invite", False),
        (None, "signin", False),
        (None, "session", False),
        (None, "invite", False),
        (None, "user", True),
        (None, "socket", True),
        ("session", "signin", True),  # a renewal
        ("session", "session", True),
        ("session", None, True),
        ("session", "socket", True),
        ("session", "edge", True),
        ("session", "invite", False),
        ("invite", "invite", True),
        *[
            ("invite", purpose, False)
            for purpose in (
                None, "user", "service", "stats", "socket", "edge", "signin", "session",
            )
        ],
    ],
)  # fmt: skip
def test_each_kind_of_token_works_only_for_its_purposes(
    use: str | None, purpose: str | None, good: bool
) -> None:
    ring = keyring_of()
    token = ring.sign(6, 60, use=use)
    if good:
        assert ring.verify(token, purpose).use == use
    else:
        assert "sign-in link" in refusal_of(ring.verify, token, purpose).message


def test_spent_tickets_are_kept_only_until_they_expire() -> None:
    ring = keyring_of()

    def spend(jti: str, exp: float) -> None:
        ring.spend(
            chatd.Claims(user_id=6, exp=exp, use="ticket", jti=jti, boot=ring.boot)
        )

    for jti in range(100):
        spend(f"old {jti}", 5.0)
    assert len(ring.spent) <= 2
    for jti in range(100):
        spend(f"new {jti}", 9e9)
    assert sum(jti.startswith("new") for jti in ring.spent) == 100


@pytest.mark.parametrize(
    ("secret", "iat", "good"),
    [
        *[(SECRET, iat, True) for iat in (1001, 1001.5, 1006)],
        *[(SECRET, iat, False) for iat in (1000.9, 1000, 999, 0, ...)],
        # The clock of the backend may be 5 s ahead.
        *[(SHARED_SECRET, iat, True) for iat in (1006, 1006.5)],
        *[(SHARED_SECRET, iat, False) for iat in (1005.5, 1005, 1001, 999, 0, ...)],
    ],
)
def test_a_revocation_refuses_tokens_of_its_second_and_of_the_backend_5_s_more(
    secret: bytes, iat: object, good: bool, shared_key: Path
) -> None:
    ring = keyring_of(shared_key)
    ring.revoked[6] = 1000
    assert ring.verify(make_token(secret, user_id=7)).user_id == 7
    token = make_token(secret, iat=iat)
    if good:
        assert ring.verify(token).iat == iat
    else:
        assert "revoked" in refusal_of(ring.verify, token).message


class Clock:
    """The wall clock, standing still until a test steps it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 2_000_000_000.5
        monkeypatch.setattr(time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def revoke(ring: Keyring, user: int = 6) -> int:
    ring.revoked[user] = revoked_at = ring.time_to_sign(user)
    return revoked_at


def new_tokens(ring: Keyring) -> list[tuple[str, str | None]]:
    """A session token, a sign-in link's and a ticket, signed now; and their uses."""
    session = ring.sign(6, 3600)
    return [
        (session, None),
        (ring.sign(6, 60, use="signin"), "signin"),
        (ring.ticket(ring.verify(session))["token"], "socket"),
    ]


def test_however_often_a_user_is_revoked_in_one_second_new_tokens_work_at_once(
    clock: Clock,
) -> None:
    ring, old = keyring_of(), list[tuple[str, str | None]]()
    for _ in range(20):
        new = new_tokens(ring)
        for token, use in new:
            assert ring.verify(token, use).user_id == 6
        for token in (new[0][0], new[2][0]):  # at a proxy, which knows no revocation
            assert keyring_of().verify(token, "edge").user_id == 6
        old += new
        revoke(ring)
        for token, use in old:
            assert "revoked" in refusal_of(ring.verify, token, use).message
    assert ring.verify(ring.sign(7, 60)).iat == int(clock.now)


@pytest.mark.parametrize("step", [-50, -30, -6, -5, -1, 0, 0.4, 0.6, 5, 3600, 4e7])
def test_a_revocation_holds_and_new_tokens_work_across_a_step_of_the_clock(
    step: float, clock: Clock
) -> None:
    ring = keyring_of()
    old = make_token(exp=clock.now + 1e9, iat=int(clock.now))
    revoke(ring)
    clock.now += step
    for token, use in new_tokens(ring):
        assert ring.verify(token, use).user_id == 6
    assert keyring_of().verify(ring.sign(6, 60), "edge").user_id == 6
    refusal_of(ring.verify, old)
    assert revoke(ring) >= clock.now - 1
    refusal_of(ring.verify, old)
    for token, use in new_tokens(ring):
        assert ring.verify(token, use).user_id == 6


@pytest.mark.parametrize("ahead", [120, 3600, 400 * 86_400])
def test_a_revocation_by_a_clock_that_was_ahead_is_mended_by_revoking_again(
    ahead: float, clock: Clock, shared_key: Path
) -> None:
    ring, right = keyring_of(shared_key), clock.now
    clock.now += ahead
    revoke(ring)
    clock.now = right
    old = ring.sign(6, 60)
    assert "revoked" in refusal_of(ring.verify, old).message
    assert revoke(ring) == int(right)
    for token, use in new_tokens(ring):
        assert ring.verify(token, use).user_id == 6
    assert "revoked" in refusal_of(ring.verify, old).message
    clock.now += 6
    foreign = make_token(SHARED_SECRET, iat=int(clock.now), exp=clock.now + 60)
    assert ring.verify(foreign).user_id == 6


def test_a_token_from_the_future_is_refused_also_if_it_was_accepted_before(
    clock: Clock, shared_key: Path
) -> None:
    ring = keyring_of(shared_key)
    for secret in (SECRET, SHARED_SECRET):
        for claim in ("iat", "nbf"):
            token = make_token(secret, exp=clock.now + 9000, **{claim: clock.now})
            assert ring.verify(token).user_id == 6
            clock.now -= 6
            assert claim in refusal_of(ring.verify, token).message
            clock.now += 1
            assert ring.verify(token).user_id == 6
            clock.now += 5


@pytest.mark.parametrize("purpose", [None, "socket", "signin"])
def test_a_revocation_covers_tickets_and_sign_in_links(purpose: str | None) -> None:
    ring = keyring_of()
    token = {
        None: ring.sign(6, 60),
        "socket": ring.ticket(ring.verify(ring.sign(6, 60)))["token"],
        "signin": ring.sign(6, 60, use="signin"),
    }[purpose]
    ring.revoked[6] = chatd.now_seconds()
    assert refusal_of(ring.verify, token, purpose).code == "token_invalid"


# --- secrets and key files -----------------------------------------------------------


def test_a_secret_has_at_least_32_bytes_without_surrounding_white_space(
    tmp_path: Path,
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b" \n" + b"k" * 32 + b"\r\n")
    path.chmod(0o600)
    assert chatd.read_secret(path) == b"k" * 32
    path.write_bytes(b"k" * 31 + b" " * 20)
    message = usage_error_of(lambda: chatd.read_secret(path))
    assert f"secret {path}: 31 bytes; it must have at least 32" in message
    assert "openssl" in message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o601])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"k" * 32)
    path.chmod(mode)
    message = usage_error_of(lambda: chatd.read_secret(path))
    assert f"mode {mode:04o}" in message
    assert f"chmod 600 {path}" in message
    assert chatd.read_jwt_key(path).key == b"k" * 32


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o444, 0o640])
def test_a_secret_in_the_credentials_directory_may_have_any_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    provided, elsewhere = tmp_path / "credentials", tmp_path / "etc"
    for folder in (provided, elsewhere):
        folder.mkdir()
    for path in (provided / "chatd.secret", elsewhere / "chatd.secret"):
        path.write_bytes(b"k" * 32)
        path.chmod(mode)
    (elsewhere / "link").symlink_to(provided / "chatd.secret")
    (provided / "link").symlink_to(elsewhere / "chatd.secret")
    (tmp_path / "run").symlink_to(provided)
    for directory in (provided, tmp_path / "run", f"{tmp_path}/etc/../credentials/"):
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
        for path in (provided / "chatd.secret", elsewhere / "link"):
            assert chatd.read_secret(path) == b"k" * 32
            assert len(chatd.read_keyring(Settings(secret_file=path)).keys) == 1
        assert len(chatd.read_keyring(Settings()).keys) == 1
    # A file counts only if it really is in that directory.
    for path in (elsewhere / "chatd.secret", provided / "link"):
        if mode & 0o077:
            message = usage_error_of(chatd.read_secret, path)
            assert message.startswith(
                f"secret {path}: others can read it (mode 0{mode:o})"
            )
        else:
            assert chatd.read_secret(path) == b"k" * 32
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    if mode & 0o077:
        usage_error_of(chatd.read_secret, provided / "chatd.secret")


def test_the_error_for_a_missing_secret_names_the_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        message = usage_error_of(lambda p=path: chatd.read_secret(p))
        assert str(path) in message


@pytest.mark.parametrize("kind", ["RSA 1024", "P-384", "secp256k1"])
def test_a_weak_or_unsupported_key_is_refused_and_the_error_lists_good_ones(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "public.pem"
    path.write_bytes(public_pem(kind))
    message = usage_error_of(chatd.read_jwt_key, path)
    assert f"--jwt-key {path}: " in message
    assert "2048 bits" in message


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            b"-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----\n",
            "not a PEM public",
        ),
        (
            b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
            "openssl x509 -pubkey -noout -in ",
        ),
        (b"short", "5 bytes"),
        (b"k" * 65_537, "over 65536 bytes"),
    ],
)
def test_a_file_that_holds_no_key_is_refused(
    text: bytes, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_bytes(text)
    assert why in usage_error_of(chatd.read_jwt_key, path)


# Encodings of a DER key that are not PEM.
def base64_lines(width: int) -> Callable[[bytes], bytes]:
    """Base64 in lines of `width` characters, as in the body of a PEM file."""

    def write(der: bytes) -> bytes:
        text = base64.b64encode(der)
        return b"\n".join(text[i : i + width] for i in range(0, len(text), width))

    return write


KEY_ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "DER": bytes,
    "base64": base64.b64encode,
    "base64 in lines of 64": base64_lines(64),
    "base64 in lines of 7": base64_lines(7),
    "base64 with CRLF": lambda der: base64_lines(76)(der).replace(b"\n", b"\r\n"),
    "base64 with backslash and n": lambda der: base64_lines(64)(der).replace(
        b"\n", b"\\n"
    ),
    "base64 without padding": lambda der: base64.b64encode(der).rstrip(b"="),
    "base64url": base64.urlsafe_b64encode,
    "base64url without padding": lambda der: base64.urlsafe_b64encode(der).rstrip(b"="),
    "base64 of base64": lambda der: base64.b64encode(base64.b64encode(der)),
    "percent signs": lambda der: quote(base64.b64encode(der), safe="").encode(),
    "hex": lambda der: der.hex().encode(),
    "hex in capitals": lambda der: der.hex().upper().encode(),
    "hex with colons": lambda der: der.hex(":").encode(),
    "hex in lines": lambda der: der.hex("\n", 16).encode(),
    "hex as C writes it": lambda der: ("{0x" + der.hex(",").replace(",", ", 0x") + "}")
    .encode(),
    "base64 of hex": lambda der: base64.b64encode(der.hex().encode()),
    "quotes": lambda der: b'"' + base64.b64encode(der) + b'"',
    "a name before it": lambda der: b"KEY=" + base64.b64encode(der),
    "a line before it": lambda der: b"the key\n" + base64_lines(64)(der),
    "a comment behind it": lambda der: base64.b64encode(der) + b" # of 2026",
    "hex after a name": lambda der: b"JWT_KEY=" + der.hex().encode(),
    "hex after a line": lambda der: b"# the backend\n" + der.hex().encode(),
    "hex with dots": lambda der: der.hex(".").encode(),
    "hex in quotes": lambda der: b"x'" + der.hex().encode() + b"'",
    "hex as Node prints it": lambda der: f"<Buffer {der.hex(' ')}>".encode(),
    "hex as xxd -i prints it": lambda der: (
        "unsigned char key[] = {\n  0x" + der.hex(",").replace(",", ",\n  0x") + "\n};"
    ).encode(),
    "70 words before it": lambda der: b"some words " * 35 + base64.b64encode(der),
    "a letter before it": lambda der: b"x" + base64.b64encode(der),
    "a byte order mark": lambda der: b"\xef\xbb\xbf" + base64.b64encode(der),
}  # fmt: skip


def public_key_forms(private: Any) -> dict[str, bytes]:
    """A public key in every form but PEM."""
    public, forms = private.public_key(), {}
    for part, (encoding, form) in KEY_PARTS.items():
        with suppress(ValueError, TypeError):
            forms[part] = public.public_bytes(encoding, form)
    binary = {**forms, "a certificate": certificate_of(private)}
    forms = {}
    if line := binary.pop("OpenSSH", b""):  # OpenSSH has no secp256k1
        binary["an OpenSSH blob"] = base64.b64decode(line.split()[1])
        forms = {"OpenSSH": line, "OpenSSH, of known_hosts": b"host.example " + line}
    for part, der in binary.items():
        for name, write in KEY_ENCODINGS.items():
            forms[f"{part}, {name}"] = write(der)
    jwk = json.dumps(jwk_of(private))
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return forms | {
        "JWK": jwk.encode(),
        "JWK in base64url": base64.urlsafe_b64encode(jwk.encode()).rstrip(b"="),
        "JWK as Python prints it": repr(json.loads(jwk)).encode(),
        "JWKS": json.dumps({"keys": [json.loads(jwk)]}, indent=1).encode(),
        "PEM in JSON": json.dumps({"key": pem.decode()}).encode(),
        "PEM in base64": base64.b64encode(pem),
        "PEM in UTF-16": pem.decode().encode("utf-16"),
        "PEM with backslash and n": pem.replace(b"\n", b"\\n"),
        "PEM without its first line": pem.split(b"\n", 1)[1],
        "PEM without its last line": pem.rsplit(b"-----END", 1)[0],
    }


def draw_private_key(draw: Callable[[Any], Any]) -> Any:
    """Any private key; of RSA only two, because new ones are slow to make."""
    curves = [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1()]
    match draw(st.sampled_from(["RSA", "EC", "Ed25519"])):
        case "RSA":
            return new_private_key(draw(st.sampled_from(["RS256", "RSA 3072"])))
        case "EC":
            number = draw(st.integers(1, 2**250))
            return ec.derive_private_key(number, draw(st.sampled_from(curves)))
        case _:
            seed = draw(st.binary(min_size=32, max_size=32))
            return ed25519.Ed25519PrivateKey.from_private_bytes(seed)


def test_a_public_key_is_never_the_secret_of_a_token() -> None:
    # chatd keeps what PyJWT found about a secret, but not that it refused one.
    numbers = {"kty": "RSA", "n": "AQAB" * 20, "e": "AQAB"}
    key = json.dumps(numbers).encode("utf-16")
    secret = os.urandom(32)
    token = jwt.encode({"user_id": 6}, secret, "HS256")
    for _ in range(2):
        assert jwt.decode(token, secret, algorithms=["HS256"]) == {"user_id": 6}
        with pytest.raises(jwt.InvalidKeyError):
            jwt.encode({"user_id": 6}, key, "HS256")
        with pytest.raises(jwt.InvalidKeyError):
            jwt.decode(token, key, algorithms=["HS256"])


@hypothesis.settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_encoding_of_a_public_key_is_accepted_as_a_shared_secret(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "key"
    for form, text in public_key_forms(draw_private_key(data.draw)).items():
        path.write_bytes(text)
        path.chmod(0o600)
        try:
            assert chatd.read_jwt_key(path).algorithm != "HS256", form
        except UsageError as error:
            message = str(error)
            assert message.startswith(f"--jwt-key {path}: "), form
            assert re.search(r"PEM|PUBLIC KEY|is not text", message), (form, message)
            if "UTF-16" not in form:  # but --secret-file may hold any bytes
                with pytest.raises(UsageError):
                    chatd.read_secret(path)


def test_an_elliptic_curve_point_that_ends_in_white_space_is_no_secret(
    tmp_path: Path,
) -> None:
    private, path = (
        ec.derive_private_key(23_657_309_607, ec.SECP384R1()),
        tmp_path / "k",
    )
    point = private.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    assert point[-1:].isspace()
    path.write_bytes(point)
    path.chmod(0o600)
    assert "a point of an elliptic curve" in usage_error_of(chatd.read_secret, path)


def test_a_secret_is_checked_for_a_key_only_with_its_first_token() -> None:
    keyring = keyring_of()
    checked = chatd.CheckedOnce.prepare_key.cache_info
    tokens = [keyring.sign(user, 60) for user in (5, 6, 7)]
    before = checked()
    for token in tokens:
        keyring.verify(token, "socket")
    assert checked().misses == before.misses
    assert checked().hits == before.hits + len(tokens)


@pytest.mark.parametrize("start", ["ssh-rsa", "ssh-ed25519", "ecdsa-sha2-nistp256"])
def test_what_pyjwt_does_not_sign_with_is_no_secret(tmp_path: Path, start: str) -> None:
    """It takes any text that begins like an OpenSSH key for one."""
    path, secret = tmp_path / "key", f"{start} is how this long secret sentence begins"
    path.write_text(secret)
    path.chmod(0o600)
    with pytest.raises(jwt.InvalidKeyError):
        jwt.encode({}, secret, "HS256")
    for read in chatd.read_secret, chatd.read_jwt_key:
        assert "an OpenSSH key, which is not a shared secret" in usage_error_of(
            read, path
        )


def test_a_binary_key_that_ends_in_white_space_is_no_secret(tmp_path: Path) -> None:
    private = ec.derive_private_key(3_813_670_921_486_769_586_176, ec.SECP256R1())
    point = private.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    assert point.endswith(b" ")
    path = tmp_path / "key"
    path.write_bytes(point)
    path.chmod(0o600)
    said = usage_error_of(chatd.read_secret, path)
    assert "a point of an elliptic curve, which is not a shared secret" in said


def test_a_random_secret_is_accepted_in_every_usual_encoding(tmp_path: Path) -> None:
    numbers, path = random.Random(1), tmp_path / "key"
    for size in [24, 32, 33, 48, 64, 65, 128] * 60:
        secret = numbers.randbytes(size)
        for text in (
            base64.b64encode(secret), base64.urlsafe_b64encode(secret).rstrip(b"="),
            base64_lines(64)(secret), secret.hex().encode(), secret.hex(":").encode(),
        ):  # fmt: skip
            path.write_bytes(b"\xef\xbb\xbf" + text + b"\n")
            assert chatd.read_jwt_key(path) == ("HS256", text, path)


@pytest.mark.parametrize(
    "text",
    ["correct horse battery staple, and some more words", "9" * 40, "ключ" * 10,
     "my-public-keyring-of-chat-example", "{b?V<4:)Wq;h&~n0#p}=zL_c8^u-R[T]", "%" * 40,
     "=" * 40, "true true true true true true true true", "two lines of words\n" * 2],
)  # fmt: skip
def test_any_other_text_is_accepted_as_a_secret(text: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(text, "utf-8")
    assert chatd.read_jwt_key(tmp_path / "key").key == text.strip().encode()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"secret": "0123456789abcdef0123456789abcdef"}', "JSON"),
        (b'["0123456789abcdef0123456789abcdef"]', "JSON"),
        (b'"0123456789abcdef0123456789abcdef"', "JSON"),
        (b"https://id.example/.well-known/jwks.json", "a URL"),
        (b"id.example/realms/chat/.well-known/openid-configuration", "a URL"),
        (b"data:application/json;base64,e30K0123456789abcdef", "a URL"),
        (b"\x00" * 40, "not text"),
        (b"\xff" * 40, "not text"),
        (b"k" * 32 + b"\x07", "not text"),
        ("k".encode("utf-16") * 20, "not text"),
        (b"<RSAKeyValue><Modulus>0123456789abcdef</Modulus></RSAKeyValue>", "XML"),
        (b"RSA Public-Key: (2048 bit)\nModulus:\n    00:c3:1f", "description"),
        (b"Modulus=C31F0123456789ABCDEF0123456789ABCDEF", "description"),
        (b"w8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8M\nAQAB\n", "description"),
        (b"k4.public.HrnbuRrsBqQ2rsHHxz6WvfvKHJEIXwQx1hV1l0qmYBw", "description"),
    ],
)
def test_text_that_cannot_be_a_secret_is_refused_and_the_error_says_why(
    text: bytes, why: str, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(text)
    assert why in usage_error_of(chatd.read_jwt_key, tmp_path / "key")


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_pem_file_may_have_text_around_the_key_and_any_line_ends(
    algorithm: str, tmp_path: Path
) -> None:
    path, pem = tmp_path / "public.pem", public_pem(algorithm)
    token = jwt.encode(
        {"user_id": 6, "exp": time_in()}, new_private_key(algorithm), algorithm
    )
    for text in (
        pem.strip(), b"\xef\xbb\xbf" + pem, pem.replace(b"\n", b"\r\n"),
        b"Bag Attributes\n  friendlyName: chat\n" + pem, b"Schl\xfcssel\n" + pem,
        b"\xef\xbb\xbfof the chat\r\n\r\n" + pem.replace(b"\n", b"\r\n") + b"\r\nend",
        b"my PRIVATE KEY is elsewhere, and the CERTIFICATE too\n" + pem,
        b"  " + pem.replace(b"\n", b"\n  "),
    ):  # fmt: skip
        path.write_bytes(text)
        assert chatd.read_jwt_key(path).algorithm == algorithm
        assert keyring_of(path).verify(token).user_id == 6
    path.write_bytes(pem * 2)
    assert "2 keys in one file" in usage_error_of(chatd.read_jwt_key, path)


def test_a_key_on_an_unknown_curve_is_refused(tmp_path: Path) -> None:
    # SubjectPublicKeyInfo of a curve with the object identifier 1.2.3.4.
    der = bytes.fromhex("301c300c06072a8648ce3d0201") + bytes.fromhex("06032a0304")
    der = b"\x30\x1a" + der[2:] + bytes.fromhex("030a00") + b"\x04" + b"\x01" * 8
    lines = b"-----BEGIN PUBLIC KEY-----", b"-----END PUBLIC KEY-----"
    (tmp_path / "key").write_bytes(
        b"\n".join([lines[0], base64_lines(64)(der), lines[1]])
    )
    assert "not a PEM public key" in usage_error_of(
        chatd.read_jwt_key, tmp_path / "key"
    )


def test_a_private_key_is_refused_because_chatd_needs_only_the_public_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "private.pem"
    path.write_bytes(
        new_private_key("ES256").private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    assert "give chatd the public one" in usage_error_of(chatd.read_jwt_key, path)


def test_the_secret_comes_from_the_flag_or_the_credential_or_beside_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Settings(db=tmp_path / "chat" / "my.db")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert chatd.secret_path(beside) == tmp_path / "chat" / "chatd.secret"
    (tmp_path / "chatd.secret").touch()
    assert chatd.secret_path(beside) == tmp_path / "chatd.secret"
    flag = dataclasses.replace(beside, secret_file=Path("/etc/s"))
    assert chatd.secret_path(flag) == Path("/etc/s")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    assert chatd.secret_path(beside) == tmp_path / "chat" / "chatd.secret"


def test_make_secret_writes_a_long_private_secret_and_never_overwrites_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "chatd.secret"
    old = os.umask(0)
    try:
        chatd.make_secret(path)
    finally:
        os.umask(old)
    secret = chatd.read_secret(path)
    assert (stat.S_IMODE(path.stat().st_mode), len(secret) >= 32) == (0o600, True)
    chatd.make_secret(path)
    assert chatd.read_secret(path) == secret
    assert "none/s" in usage_error_of(chatd.make_secret, tmp_path / "none" / "s")


def test_a_secret_that_could_not_be_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "chatd.secret"
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        message = usage_error_of(chatd.make_secret, path)
    assert message == f"secret {path}: No space left on device"
    assert list(tmp_path.iterdir()) == []
    chatd.make_secret(path)
    assert len(chatd.read_secret(path)) >= 32


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("Bob", "Bob"),
        ("  Боб  Иванов\t", "Боб Иванов"),
        ("a\nb\x1b[2J\u202ec\x00", "a b [2J c"),
        ("x" * 100, "x" * 64),
        ("\ud800Bob", "Bob"),
        ("🎉 Bob", "🎉 Bob"),
        *[(empty, "") for empty in ("", " \n", "\x00\x1b", "\ud800", "\u200b")],
        *[(nothing, None) for nothing in (None, 5, True)],
        (["Bob"], None),
        ({}, None),
    ],
)
def test_a_name_is_one_line_of_at_most_64_characters(
    name: object, clean: str | None
) -> None:
    assert chatd.clean_name(name) == clean


@given(st.text())
def test_cleaning_a_name_twice_changes_nothing(name: str) -> None:
    clean = chatd.clean_name(name)
    assert chatd.clean_name(clean) == clean
    assert clean is not None
    assert clean.isprintable()
    assert len(clean) <= 64


# --- rates of a connection -----------------------------------------------------------


@with_server()
async def test_a_connection_may_send_60_commands_at_once_and_then_30_a_second(
    server: VirtualServer,
) -> None:
    peer = await server.join(6)
    for _ in range(60):
        assert (await peer.ask("ping"))["type"] == "pong"
    error = await peer.refused("ping")
    assert (error["code"], error["retry_after"]) == ("rate_limited", 0.033)
    await trio.sleep(1)
    for _ in range(30):
        assert (await peer.ask("ping"))["type"] == "pong"
    assert (await peer.refused("ping"))["code"] == "rate_limited"
    assert (await server.stats())["rate_limited"] == {"commands": 2}


@with_server()
async def test_100_refused_commands_in_a_row_close_the_connection_with_4008(
    server: VirtualServer,
) -> None:
    peer = await server.join(6)
    for _ in range(60 + 99):
        await peer.send_command("ping")
    for kind, number in (("pong", 60), ("error", 99)):
        for _ in range(number):
            await peer.receive(kind)
    await peer.receives_nothing(0.01)
    await peer.send_command("ping")
    received, code = await peer.end()
    assert [frame["code"] for frame in received] == ["rate_limited"]
    assert code == 4008


@with_server()
async def test_after_4008_no_further_command_of_a_flood_is_handled(
    server: VirtualServer,
) -> None:
    raw = await server.join_raw(6)
    await raw.send(command_bytes("ping") * 250)  # one segment
    kinds = []
    while (frame := await raw.frame())[0] == TEXT:
        kinds.append(json.loads(frame[1])["type"])
    assert frame[1][:2] == (4008).to_bytes(2, "big")
    assert kinds == ["pong"] * 60 + ["error"] * 100


@with_server()
async def test_an_accepted_command_resets_the_count_of_refused_ones(
    server: VirtualServer,
) -> None:
    peer = await server.join(6)
    for _ in range(5):
        for _ in range(60 + 99):
            await peer.send_command("ping")
        for _ in range(60 + 99):
            await peer.ws.get_message()
        await trio.sleep(2)
    assert (await peer.ask("ping"))["type"] == "pong"


@with_server()
async def test_a_bad_command_counts_against_the_rate_too(server: VirtualServer) -> None:
    peer = await server.join(6)
    for _ in range(60):
        await peer.ws.send_message("nonsense")
        assert (await peer.receive("error"))["code"] == "bad_json"
    await peer.ws.send_message("nonsense")
    assert (await peer.receive("error"))["code"] == "rate_limited"


@with_server()
async def test_the_21st_message_at_once_is_refused_with_the_seconds_to_wait(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer, tab = await server.join(6), await server.join(6)
    for number in range(20):
        sender = (peer, tab)[number % 2]  # one user, one bucket
        answer = await sender.ask("send_message", chat_id=chat, content=str(number))
        assert answer["type"] == "ack"
    error = await peer.refused("send_message", chat_id=chat, content="x")
    assert (error["code"], error["retry_after"]) == ("rate_limited", 0.2)
    await trio.sleep(0.2)
    for sender, kind in ((tab, "ack"), (peer, "error")):
        answer = await sender.ask("send_message", chat_id=chat, content="x")
        assert answer["type"] == kind
    assert (await server.stats())["rate_limited"] == {"sends": 2}


@with_server()
async def test_a_repeated_message_does_not_count_against_the_rate(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    for number in range(19):
        await peer.ask(
            "send_message", chat_id=chat, content=str(number), client_id=str(number)
        )
    for _ in range(25):  # one token is left in the bucket, and it stays
        repeat = await peer.ask(
            "send_message", chat_id=chat, content="3", client_id="3"
        )
        assert repeat["duplicate"] is True
    answer = await peer.ask("send_message", chat_id=chat, content="new")
    assert answer["type"] == "ack"
    error = await peer.refused("send_message", chat_id=chat, content="newer")
    assert error["code"] == "rate_limited"


@with_server()
async def test_over_the_rate_a_repeated_message_is_still_acked(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer, friend = await server.join(6), await server.join(7)
    for number in range(20):
        first = await peer.ask(
            "send_message", chat_id=chat, content=str(number), client_id=str(number)
        )
    await friend.receive("new_message")
    repeat = {"chat_id": chat, "content": "19", "client_id": "19"}
    answer = await peer.ask("send_message", **repeat)
    assert answer == first | {"duplicate": True}
    wrong = await peer.refused("send_message", **repeat | {"content": "other"})
    assert wrong["code"] == "idempotency_mismatch"
    unknown = await peer.refused("send_message", **repeat | {"client_id": "new"})
    assert unknown["code"] == "rate_limited"
    without = await peer.refused("send_message", chat_id=chat, content="19")
    assert without["code"] == "rate_limited"
    over_http = await server.ask(
        "POST", f"/api/v1/chats/{chat}/messages",
        {"content": "19", "client_id": "19"}, user=6,
    )  # fmt: skip
    assert (over_http.status, over_http.json["duplicate"]) == (200, True)


@with_server(sends=Rate(0.001, 1))
async def test_a_service_that_repeats_a_message_gives_its_sender_no_token(
    server: VirtualServer,
) -> None:
    path = f"/api/v1/chats/{await server.chat(6)}/messages"
    body = {"content": "a", "client_id": "1"}
    assert (await server.ask("POST", path, body, user=6)).status == 201
    for _ in range(3):
        repeat = await server.command("POST", path, {**body, "sender_id": 6})
        assert repeat["duplicate"] is True
    answer = await server.ask("POST", path, {"content": "b"}, user=6)
    assert (answer.status, answer.code) == (429, "rate_limited")


@with_server()
async def test_a_service_is_not_limited_by_the_rate_of_users(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6, token=server.token(6, scope="service"))
    for number in range(30):
        answer = await peer.ask("send_message", chat_id=chat, content=str(number))
        assert answer["type"] == "ack"


@with_server()
async def test_typing_over_the_rate_is_dropped_without_an_error(
    server: VirtualServer,
) -> None:
    chat, other = await server.chat(6, 7), await server.chat(6, 7)
    peer, friend = await server.join(6), await server.join(7)
    for _ in range(8):
        await peer.send_command("typing", chat_id=chat, is_typing=True)
    for _ in range(5):
        await friend.receive("typing")
    await friend.receives_nothing(0.1)
    await peer.send_command("typing", chat_id=other, is_typing=True)  # another bucket
    assert (await friend.receive("typing"))["chat_id"] == other
    await trio.sleep(1)
    for _ in range(2):
        await peer.send_command("typing", chat_id=chat, is_typing=True)
    await friend.receive("typing")
    await friend.receives_nothing(0.1)
    await peer.receives_nothing(0.1)
    assert (await server.stats())["rate_limited"] == {"typing": 4}


# --- tokens of an open connection ----------------------------------------------------


@with_server()
async def test_token_expiring_comes_60_s_before_the_token_ends_and_4401_25_s_after(
    server: VirtualServer,
) -> None:
    # Tokens are signed by the real clock, so a little tolerance is needed.
    peer = await server.join(6, token=server.token(6, 200))
    assert 190 <= peer.hello["expires_in"] < 200
    with taking(130, 142):
        warning = await peer.receive("token_expiring", within=300)
    assert 58 <= warning["expires_in"] <= 60
    with taking(83.9, 86.1):
        assert await peer.end(within=300) == ([], 4401)
    assert (await server.stats())["connections"]["closed"] == {"4401": 1}


@with_server()
@pytest.mark.parametrize("step", [3541, 3600, 86_400, 1e9])
async def test_a_clock_that_is_stepped_forward_ends_the_token_of_a_socket(
    server: VirtualServer, clock: Clock, step: float
) -> None:
    peer = await server.join(6, token=server.token(6, 3600))
    await peer.receives_nothing(3)
    clock.now += step
    await peer.receive("token_expiring", within=1.1)
    clock.now += 84
    assert await peer.end(within=1.1) == ([], 4401)


@with_server()
@pytest.mark.parametrize("step", [-1e9, -86_400, -60])
async def test_a_clock_that_is_stepped_back_does_not_make_a_sockets_token_last_longer(
    server: VirtualServer, clock: Clock, step: float
) -> None:
    peer = await server.join(6, token=server.token(6, 3600))
    clock.now += step
    with taking(3538, 3542):
        await peer.receive("token_expiring", within=3600)
    with taking(84, 87):
        assert await peer.end(within=90) == ([], 4401)


@with_server()
async def test_a_token_that_ends_within_a_minute_is_warned_about_at_once(
    server: VirtualServer,
) -> None:
    peer = await server.join(6, token=server.token(6, 30))
    assert 20 <= (await peer.receive("token_expiring", within=1.1))["expires_in"] <= 30
    with taking(44, 56):
        assert await peer.end(within=60) == ([], 4401)


@with_server()
async def test_token_expiring_follows_connected_however_long_that_takes(
    server: VirtualServer,
) -> None:
    server.disk.hold(reads=True)
    raw = server.dial()
    await raw.send(upgrade_bytes(server.target(6, token=server.token(6, 30))))
    assert (await raw.answer()).status == 101
    await trio.sleep(3)  # the sweeper has run
    server.disk.go()
    await raw.listen(2)
    frames = [json.loads(data) for _, data in take_frames(raw.data)]
    assert [frame["type"] for frame in frames] == ["connected", "token_expiring"]


@with_server()
async def test_auth_with_a_jwt_or_a_ticket_extends_the_connection(
    server: VirtualServer,
) -> None:
    peer = await server.join(6, token=server.token(6, 100))
    await peer.receive("token_expiring", within=45)
    ack = await peer.ask("auth", token=server.token(6, 400))
    assert 390 <= ack.pop("expires_in") < 400
    assert ack == {"type": "ack", "ref": "ask"}
    await peer.receives_nothing(330)  # the old token has ended, without 4401
    await peer.receive(
        "token_expiring", within=20
    )  # a second warning, for the new token
    asked = await server.ask("GET", "/api/v2/ws-token", token=server.token(6, 900))
    assert asked.json["expires_in"] == 60
    ack = await peer.ask("auth", token=asked.json["token"])
    assert 890 <= ack["expires_in"] <= 900  # as long as the requesting token
    await peer.receives_nothing(800)
    again = await peer.refused("auth", token=asked.json["token"])
    assert again["code"] == "token_used"


@with_server()
async def test_auth_within_25_s_after_the_end_of_the_token_is_in_time(
    server: VirtualServer,
) -> None:
    peer = await server.join(6, token=server.token(6, 4))
    await peer.receive("token_expiring", within=2)
    await trio.sleep(23)
    assert (await peer.ask("auth", token=server.token(6, 500)))["type"] == "ack"
    await peer.receives_nothing(100)


@with_server()
async def test_after_a_bad_auth_the_old_token_still_counts(
    server: VirtualServer,
) -> None:
    peer = await server.join(6, token=server.token(6, 100))
    ring = server.app.keyring
    for token, code in {
        "": "token_invalid",
        "nonsense": "token_invalid",
        "x" * 5000: "token_invalid",
        server.token(6, 900) + "x": "token_invalid",
        server.token(6, -60): "token_expired",
        server.token(6, 900, use="signin"): "token_invalid",
        ring.sign(6, 60, use="ticket", jti="j", boot="another", until=1e11): (
            "token_used"
        ),
    }.items():
        error = await peer.refused("auth", token=token)
        assert error["code"] == code
        assert token == "" or token not in error["message"]
    assert await peer.receive("token_expiring", within=45)
    with taking(84, 87):
        assert await peer.end(within=100) == ([], 4401)  # when the old token ends


@with_server()
async def test_auth_as_another_user_is_forbidden_and_closes_with_4503(
    server: VirtualServer,
) -> None:
    peer = await server.join(6)
    await peer.send_command("auth", token=server.token(7), ref="a")
    ((error,), code) = await peer.end()
    assert (error["type"], error["code"], error["ref"]) == ("error", "forbidden", "a")
    assert code == 4503


@with_server()
async def test_revoking_a_user_closes_all_of_its_connections_and_no_other(
    server: VirtualServer,
) -> None:
    theirs = [await server.join(6) for _ in range(3)]
    other = await server.join(7)
    old = server.token(6)
    revoke = await server.command(
        "POST", "/api/v1/internal/chat/revoke", {"user_id": 6}
    )
    assert revoke == {"user_id": 6, "closed": 3}
    for peer in theirs:
        assert await peer.end() == ([], 4503)
    assert (await other.ask("ping"))["type"] == "pong"
    # Tokens from before are refused everywhere, and a new one works at once.
    without_iat = make_token(server.app.keyring.secret, user_id=6)
    for token in (old, without_iat):
        answer = await server.ask("GET", "/api/v1/me", token=token)
        assert (answer.status, answer.code) == (401, "token_invalid")
    raw = server.dial()
    await raw.send(upgrade_bytes(server.target(token=old)))
    assert (await raw.answer()).code == "token_invalid"
    assert (await server.ask("GET", "/api/v1/me", user=6)).status == 200
    again = await server.join(6)
    assert (await again.refused("auth", token=old))["code"] == "token_invalid"
    link = server.token(6, use="signin")
    session = (await server.ask("POST", "/api/v1/session", {}, token=link)).json
    assert (await again.ask("auth", token=session["token"]))["type"] == "ack"


@with_server()
async def test_a_revocation_holds_although_its_answer_timed_out(
    server: VirtualServer,
) -> None:
    peer, old = await server.join(6), server.token(6)
    server.disk.hold()
    raw, auth = server.dial(), f"Bearer {server.token(1, scope='service')}"
    path, body = "/api/v1/internal/chat/revoke", b'{"user_id":6}'
    await raw.send(request_bytes("POST", path, body, Authorization=auth))
    assert (await raw.answer(within=16)).status == 503
    server.disk.go()
    assert await peer.end() == ([], 4503)
    assert (await server.ask("GET", "/api/v1/me", token=old)).status == 401


@with_server()
async def test_while_a_revocation_is_written_no_old_token_gets_a_new_one(
    server: VirtualServer, clock: Clock
) -> None:
    """However long fsync takes: a ticket signed meanwhile would be newer than it."""
    old, link = server.token(6), server.token(6, use="signin")
    ticket = (await server.ask("GET", "/api/v2/ws-token", token=old)).json["token"]
    server.disk.hold()
    raw, auth = server.dial(), f"Bearer {server.token(1, scope='service')}"
    path, body = "/api/v1/internal/chat/revoke", b'{"user_id":6}'
    await raw.send(request_bytes("POST", path, body, Authorization=auth))
    await wait_all_tasks_blocked()
    clock.now += 2
    for method, target, token in (
        ("GET", "/api/v2/ws-token", old),
        ("POST", "/api/v1/session", link),
        ("GET", "/api/v1/me", old),
    ):
        answer = await server.ask(method, target, token=token)
        assert (answer.status, answer.code) == (401, "token_invalid")
    server.disk.go()
    assert (await raw.answer()).json == {"user_id": 6, "closed": 0}
    socket = server.dial()
    await socket.send(upgrade_bytes(server.target(token=ticket)))
    assert (await socket.answer()).code == "token_invalid"


@with_server()
async def test_a_sign_in_whose_user_is_revoked_while_its_name_is_read_gets_401(
    server: VirtualServer, clock: Clock
) -> None:
    raw, auth = server.dial(), f"Bearer {server.token(6, use='signin')}"
    server.disk.hold(reads=True)
    await raw.send(request_bytes("POST", "/api/v1/session", b"{}", Authorization=auth))
    await wait_all_tasks_blocked()
    revoke(server.app.keyring)
    clock.now += 2
    server.disk.go()
    assert (await raw.answer()).code == "token_invalid"


@with_server()
@pytest.mark.parametrize("path", ["/api/v1/session", "/api/v1/chats"])
async def test_a_request_is_refused_if_its_user_is_revoked_before_the_body_is_complete(
    server: VirtualServer, path: str
) -> None:
    use = "signin" if path.endswith("session") else None
    auth = {
        "Authorization": f"Bearer {server.token(6, use=use)}",
        "Content_Length": "2",
    }
    slow = server.dial()
    await slow.send(request_bytes("POST", path, None, **auth))
    await wait_all_tasks_blocked()
    await server.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    await slow.send(b"{}")
    assert (await slow.answer()).code == "token_invalid"


@with_server(requests=Rate(1, 10))
async def test_creating_a_chat_costs_one_request_for_every_ten_members(
    server: VirtualServer,
) -> None:
    ids = [*range(1, 301)]
    made = await server.ask("POST", "/api/v1/chats", {"member_ids": ids}, user=6)
    assert made.status == 201
    late = await server.ask("GET", "/api/v1/me", user=6)
    assert (late.status, late.code) == (429, "rate_limited")
    await trio.sleep(float(late.json["error"]["retry_after"]) + 0.01)
    assert (await server.ask("GET", "/api/v1/me", user=6)).status == 200


@with_server()
async def test_a_token_revoked_during_its_handshake_gets_401_or_4503(
    server: VirtualServer,
) -> None:
    service = f"Bearer {server.token(999, scope='service')}"
    server.disk.hold()
    asked = server.dial()  # a commit that the others wait for
    await asked.send(
        request_bytes("POST", "/api/v1/chats", b"{}", Authorization=service)
    )
    await wait_all_tasks_blocked()
    raw, revoke = server.dial(), server.dial()
    # A new name is stored before the 101, so the handshake waits for it.
    target = server.target(token=server.token(6, name="Ann"))
    await raw.send(upgrade_bytes(target))
    await wait_all_tasks_blocked()
    body = b'{"user_id": 6}'
    path = "/api/v1/internal/chat/revoke"
    await revoke.send(request_bytes("POST", path, body, Authorization=service))
    await wait_all_tasks_blocked()
    server.disk.go()
    assert (await revoke.answer()).status == 200
    answer = await raw.answer()
    if answer.status == 101:  # `connected` may come before the close frame
        await raw.listen()
        *_, (opcode, payload) = take_frames(raw.data)
        assert (opcode, payload[:2]) == (CLOSE, (4503).to_bytes(2, "big"))
    else:
        assert (answer.status, answer.code) == (401, "token_invalid")


# --- tokens over HTTP ----------------------------------------------------------------


@with_server()
async def test_a_sign_in_link_yields_a_session_token_and_that_yields_another(
    server: VirtualServer,
) -> None:
    link = server.token(6, use="signin", name="Ann")
    answer = await server.ask("POST", "/api/v1/session", token=link)
    assert answer.status == 200
    session = answer.json
    token = session.pop("token")
    assert session == {"user_id": 6, "name": "Ann", "expires_in": 30 * 86_400}
    assert (await server.ask("GET", "/api/v1/me", token=token)).json["name"] == "Ann"
    assert (await server.join(6, token=token)).hello["user_id"] == 6
    renewed = await server.ask("POST", "/api/v1/session", token=token)
    assert renewed.status == 200
    assert renewed.json | session == renewed.json


@with_server()
async def test_a_scope_permits_only_the_requests_it_names(
    server: VirtualServer,
) -> None:
    stats, revoke = "/api/v1/internal/chat/ws/stats", "/api/v1/internal/chat/revoke"
    for scope, method, path, status in (
        (None, "GET", stats, 403),
        (None, "GET", "/metrics", 403),
        (None, "POST", revoke, 403),
        ("service", "GET", stats, 403),
        ("stats", "POST", revoke, 403),
        ("stats", "GET", stats, 200),
        ("stats", "GET", "/metrics", 200),
        ("stats service", "POST", revoke, 200),
    ):
        body = {"user_id": 50} if method == "POST" else None
        token = server.token(6, scope=scope)
        answer = await server.ask(method, path, body, token=token)
        assert answer.status == status, (scope, path)
    for path in (stats, "/metrics"):
        assert (await server.ask("GET", path)).status == 401


@with_server()
async def test_a_ticket_has_the_scopes_of_the_requesting_token(
    server: VirtualServer,
) -> None:
    token = server.token(6, scope="service")
    ticket = (await server.ask("GET", "/api/v2/ws-token", token=token)).json["token"]
    chat = await server.chat(7)
    peer = await server.join(6, token=ticket)
    answer = await peer.ask("send_message", chat_id=chat, content="hi")
    assert answer["type"] == "ack"


@with_server()
async def test_revoke_refuses_a_bad_user_id_and_works_without_open_connections(
    server: VirtualServer,
) -> None:
    token = server.token(999, scope="service")
    path = "/api/v1/internal/chat/revoke"
    for body in ({}, {"user_id": "6"}, {"user_id": 0}):
        answer = await server.ask("POST", path, body, token=token)
        assert (answer.status, answer.code) == (400, "bad_field")
    old = server.token(6)
    answer = await server.ask("POST", path, {"user_id": 6}, token=token)
    assert answer.json == {"user_id": 6, "closed": 0}
    assert (await server.ask("GET", "/api/v1/me", token=old)).status == 401


# --- whole process: identity ---------------------------------------------------------


async def test_a_token_of_chatd_token_works_right_after_a_revocation(
    shared_server: ServerProcess,
) -> None:
    server, user = shared_server, next(new_users)
    path, body = "POST /api/v1/internal/chat/revoke", {"user_id": user}
    old = (await run_chatd("token", user, "--db", server.db)).out.strip()
    for _ in range(9):  # several in a second: the last ones are ahead of the clock
        await server.want(200, path, server.service, body)
    await server.want(401, "GET /api/v1/me", old)
    new = await run_chatd("token", user, "--db", server.db)
    assert new.err == ""
    await server.want(200, "GET /api/v1/me", new.out.strip())
    await server.want(200, path, server.service, body)
    await server.want(401, "GET /api/v1/me", new.out.strip())


def forged_tokens(server: ServerProcess, user: int) -> dict[str, tuple[str, str]]:
    """Tokens that must be refused, each with its error code."""
    now = int(time.time())
    good = server.token(user)
    head, body, mark = good.split(".")
    admin = server.token(user, scope="service").split(".")[1]
    claims = {"sub": str(user), "iat": now, "exp": now + 3600}
    unsigned = jwt.encode(claims, "", algorithm="none")
    invalid = {
        "not a token": "abc",
        "three dots": "a.b.c",
        "alg none": unsigned,
        "alg none, our mark": f"{unsigned.split('.')[0]}.{body}.{mark}",
        "another body": f"{head}.{admin}.{mark}",
        "no mark": f"{head}.{body}.",
        "another key": server.token(user, key=b"k" * 32),
        "another algorithm": jwt.encode(claims, server.secret * 2, algorithm="HS512"),
        "a critical header": jwt.encode(claims, server.secret, headers={"crit": ["x"]}),
        "no exp": server.token(user, exp=None),
        "exp is text": server.token(user, exp="soon"),
        "not yet": server.token(user, nbf=now + 60),
        "issued in the future": server.token(user, iat=now + 60),
        "no user": server.token(),
        "sub is a name": server.token(sub="six"),
        "sub is a float": server.token(sub=6.5),
        "sub is true": server.token(sub=True),
        "user_id is true": server.token(user_id=True),
        "user_id is a float": server.token(user_id=6.5),
        "user_id is 0": server.token(user_id=0),
        "user_id is negative": server.token(user_id=-6),
        "user_id is too large": server.token(user_id=2**53),
        "sub is too large": server.token(sub=str(2**53)),
        "sub is much too large": server.token(sub="9" * 1000),
        "over 4 KiB": server.token(user, x="x" * 4096),
        "a sign-in link's": server.token(user, use="signin"),
    }
    codes = {name: (token, "token_invalid") for name, token in invalid.items()}
    codes["expired"] = (server.token(user, exp=now - 8), "token_expired")
    codes["expired long ago"] = (server.token(user, exp=1), "token_expired")
    return codes


async def test_a_forged_token_is_refused_over_http_and_in_the_handshake(
    shared_server: ServerProcess,
) -> None:
    server = shared_server
    user = next(new_users)
    async with await server.dial() as line:
        for name, (token, code) in forged_tokens(server, user).items():
            answer = await line.ask("GET", "/api/v1/me", token=token)
            assert (answer.status, answer.code) == (401, code), (name, answer)
            refused = await server.refusal(token)
            assert (refused.status, refused.code) == (401, code), (name, refused)
        for lines in ({}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer"}):
            answer = await line.ask("GET", "/api/v1/me", **lines)
            assert (answer.status, answer.code) == (401, "token_invalid"), lines
        target = f"/api/v1/me?token={server.token(user)}"  # for /ws/chat only
        assert (await line.ask("GET", target)).status == 401
        now = int(time.time())
        for claims in (
            {"sub": user},  # PyJWT itself would refuse an integer
            {"sub": str(user)},
            {"user_id": user},
            {"user_id": user, "sub": "somebody"},
            {"user_id": user, "aud": "anyone"},
            {"user_id": user, "exp": now - 2},  # within the leeway
            {"user_id": user, "iat": None},
        ):
            answer = await line.ask("GET", "/api/v1/me", token=server.token(**claims))
            assert answer.json["user_id"] == user, (claims, answer)


async def test_auth_never_changes_the_user_of_a_connection(
    either_server: ServerProcess,
) -> None:
    server = either_server
    ann, eve = next(new_users), next(new_users)
    chat = await server.chat(ann)
    peer = await server.peer(ann)
    forged = forged_tokens(server, ann).values()
    for token, code in [*forged, *forged_tokens(server, eve).values()]:
        answer = await peer.ask("auth", token=token)
        assert (answer["type"], answer["code"]) == ("error", code), answer
    ack = await peer.ask("send_message", chat_id=chat, content="still me")
    assert ack["type"] == "ack"
    assert (await server.history(chat, ann))[0]["sender_id"] == ann
    ack = await peer.ask("auth", token=server.token(ann, exp=int(time.time()) + 100))
    assert 95 < ack["expires_in"] <= 100
    ticket = await server.want(200, "GET /api/v2/ws-token", server.token(eve))
    for token in (server.token(eve), str(ticket["token"])):
        peer = await server.peer(ann)
        await peer.send_command("auth", token=token)
        await peer.send_command("send_message", chat_id=chat, content="who am I?")
        assert await peer.ended() == 4503
    assert len(await server.history(chat, ann)) == 1


async def test_tokens_of_the_backend_are_accepted_but_their_scopes_are_ignored(
    server: ServerProcess, tmp_path: Path
) -> None:
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pairs: dict[str, Any] = {
        "RS256": rsa_key,
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    }
    flags, publics = [], []
    for name, pair in pairs.items():
        pem = pair.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        path = tmp_path / f"{name}.pem"
        path.write_bytes(pem)
        publics.append(pem)
        flags += ["--jwt-key", str(path)]
    shared = tmp_path / "shared"
    shared.write_text("an application's secret of 32 bytes or more\n", "ascii")
    shared.chmod(0o600)
    async with server.serving(*flags, "--jwt-key", str(shared)):
        user, now = next(new_users), int(time.time())
        claims = {"sub": str(user), "iat": now, "exp": now + 60}
        all_scopes = {**claims, "scope": "service stats"}

        def signed(content: dict[str, object]) -> list[str]:
            tokens = [jwt.encode(content, k, algorithm=a) for a, k in pairs.items()]
            key = shared.read_bytes().strip()
            return [*tokens, jwt.encode(content, key, algorithm="HS256")]

        for token in signed(dict(claims)):
            assert (await server.ask("GET", "/api/v1/me", token)).json[
                "user_id"
            ] == user
            (await server.peer(token)).drop()
        for token in signed(dict(all_scopes)):
            stats = await server.ask("GET", "/api/v1/internal/chat/ws/stats", token)
            assert (stats.status, stats.code) == (403, "forbidden")
            body = {"user_id": user}
            revoke = "/api/v1/internal/chat/revoke"
            answer = await server.ask("POST", revoke, token, body)
            assert (answer.status, answer.code) == (403, "forbidden")
        for kind in ("signin", "ticket"):  # only chatd itself may sign these
            for token in signed({**claims, "use": kind, "jti": "1", "boot": "x"}):
                answer = await server.ask("POST", "/api/v1/session", token)
                assert answer.status == 401, kind
        for pem in (p for public in publics for p in (public, public.strip())):

            def b64(data: bytes) -> bytes:
                return base64.urlsafe_b64encode(data).rstrip(b"=")

            # The public key, used as a shared secret.
            head = b64(b'{"alg":"HS256","typ":"JWT"}')
            signing = head + b"." + b64(json.dumps(claims).encode())
            mark = b64(hmac.new(pem, signing, hashlib.sha256).digest())
            answer = await server.ask(
                "GET", "/api/v1/me", (signing + b"." + mark).decode()
            )
            assert (answer.status, answer.code) == (401, "token_invalid")
        strange = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        token = jwt.encode(claims, strange, algorithm="RS256")
        assert (await server.ask("GET", "/api/v1/me", token)).status == 401
        pss = jwt.encode(claims, rsa_key, algorithm="PS256")
        assert (await server.ask("GET", "/api/v1/me", pss)).status == 401


async def test_the_flags_for_issuer_and_audience_are_enforced(
    server: ServerProcess, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.write_text("k" * 32, "ascii")
    shared.chmod(0o600)
    flags = ("--issuer", "the-app", "--audience", "chat", "--jwt-key", str(shared))
    async with server.serving(*flags):
        user = next(new_users)
        both: dict[str, object] = {"iss": "the-app", "aud": "chat"}
        changes: list[tuple[dict[str, object], int]] = [
            ({}, 200),
            ({"aud": ["x", "chat"]}, 200),
            ({"iss": "other"}, 401),
            ({"iss": None}, 401),
            ({"aud": "other"}, 401),
            ({"aud": None}, 401),
        ]
        for change, status in changes:
            token = server.token(user, key="k" * 32, **{**both, **change})
            answer = await server.ask("GET", "/api/v1/me", token)
            assert answer.status == status, change
        token = server.token(user, key="k" * 32, **both)
        ticket = await server.want(200, "GET /api/v2/ws-token", token)
        await server.peer(str(ticket["token"]))  # chatd's own tokens need neither claim
        link = await run_chatd("token", user, "--db", server.db, "--link", "http://x")
        signin = link.out.partition("token=")[2].strip()
        session = await server.want(200, "POST /api/v1/session", signin)
        await server.want(200, "GET /api/v1/me", session["token"])


async def test_a_close_code_reaches_a_client_that_keeps_sending(
    server: ServerProcess,
) -> None:
    """A RST would discard the close frame, so the server reads on while it closes."""
    codes: list[int] = []
    talk = frame_bytes(10, b"p" * 125) * 50 + frame_bytes(9, b"p")

    async def chatter(peer: SocketClient) -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                await peer.stream.send_all(talk)

    async def listen(peer: SocketClient) -> None:
        async with trio.open_nursery() as talking:
            talking.start_soon(chatter, peer)
            codes.append(await peer.ended())
            assert await peer.stream.receive_some(1) == b"", "RST instead of an end"
            talking.cancel_scope.cancel()

    async with server.serving("--receive-bytes", "65536/65536"):
        user = next(new_users)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                peer = await server.peer(user)
                nursery.start_soon(listen, peer)
            target, body = "POST /api/v1/internal/chat/revoke", {"user_id": user}
            revoked = await server.want(200, target, server.service, body)
            assert revoked["closed"] == 10
        assert codes == [4503] * 10


async def test_with_chats_by_service_only_a_service_creates_chats(
    server: ServerProcess,
) -> None:
    async with server.serving("--chats-by", "service"):
        ann, bob = next(new_users), next(new_users)
        token, body = server.token(ann), {"title": "t", "member_ids": [bob]}
        answer = await server.ask("POST", "/api/v1/chats", token, body)
        assert (answer.status, answer.code) == (403, "forbidden")
        chat = await server.chat(ann)
        target, member = f"/api/v1/chats/{chat}/members", {"user_id": bob}
        assert (await server.ask("POST", target, token, member)).status == 403
        assert (await server.ask("GET", "/api/v1/users", token)).status in {403, 404}
        await server.want(201, f"POST {target}", server.service, member)


# --- whole process: limits -----------------------------------------------------------


async def test_sends_are_limited_per_user_and_repeats_are_free(
    server: ServerProcess,
) -> None:
    async with server.serving("--sends", "2/2"):
        ann, bob = next(new_users), next(new_users)
        chat = await server.chat(ann, bob)
        peers = [await server.peer(ann), await server.peer(ann)]
        say = {"chat_id": chat, "content": "x"}
        for number, peer in enumerate(peers):
            ack = await peer.ask("send_message", client_id=f"{number}", **say)
            assert ack["type"] == "ack"
        over = await peers[0].ask("send_message", client_id="2", **say)
        assert over["code"] == "rate_limited"
        assert 0 < over["retry_after"] <= 0.6
        again = await peers[1].ask("send_message", client_id="0", **say)
        assert again["duplicate"] is True  # although the rate is used up
        body = {"content": "x", "client_id": "3"}
        target = f"/api/v1/chats/{chat}/messages"
        by_http = await server.ask("POST", target, server.token(ann), body)
        assert (by_http.status, by_http.code) == (429, "rate_limited")
        assert 0 < by_http.json["error"]["retry_after"] <= 0.6
        assert int(by_http.headers["retry-after"]) == 1
        for number in range(5):  # a service is not limited by the rates of users
            await server.post(chat, ann, f"{number}")
        other = await server.peer(bob)
        assert (await other.ask("send_message", **say))["type"] == "ack"
        await trio.sleep(over["retry_after"])
        ack = await peers[0].ask("send_message", client_id="2", **say)
        assert ack["duplicate"] is False


async def test_many_repeats_at_once_are_all_acked_although_the_rate_is_used_up(
    server: ServerProcess,
) -> None:
    async with server.serving("--sends", "0.01/70"):
        user = next(new_users)
        chat, peer = await server.chat(user), await server.peer(user)
        keys = [*(str(number) for number in range(70)), *["0"] * 200]
        say = {"type": "send_message", "chat_id": chat, "content": "x"}
        texts = [json.dumps({**say, "client_id": key}).encode() for key in keys]
        await peer.stream.send_all(b"".join(frame_bytes(1, text) for text in texts))
        acks = [await peer.find("ack") for _ in keys]
        assert sorted(ack["client_id"] for ack in acks) == sorted(keys)
        new = [ack["client_id"] for ack in acks if not ack["duplicate"]]
        assert new == keys[:70]
        assert len({ack["message_id"] for ack in acks if ack["client_id"] == "0"}) == 1
        await peer.receives_nothing()


async def test_commands_are_limited_per_connection_and_a_flood_closes_it(
    server: ServerProcess,
) -> None:
    async with server.serving("--commands", "0.1/5"):
        user = next(new_users)
        peer, other = await server.peer(user), await server.peer(user)
        for _ in range(5):
            await peer.receives_nothing()
        for number in range(100):
            await peer.send_command("ping", ref=str(number))
            error = await peer.receive("error")
            assert error["code"] == "rate_limited"
            assert error["ref"] == str(number)
            assert error["retry_after"] > 0
        await peer.send_command("ping")
        assert await peer.ended() == 4008
        await other.receives_nothing()


async def test_the_flag_for_typing_limits_each_chat_separately(
    server: ServerProcess,
) -> None:
    async with server.serving("--typing", "0.1/2"):
        ann, bob = next(new_users), next(new_users)
        chats = [await server.chat(ann, bob), await server.chat(ann, bob)]
        a, b = await server.peer(ann), await server.peer(bob)
        for _ in range(5):
            for chat in chats:
                await a.send_command("typing", chat_id=chat, is_typing=True)
        await a.receives_nothing()
        for chat in chats * 2:
            assert (await b.receive("typing"))["chat_id"] == chat
        await b.receives_nothing()


async def test_requests_are_limited_per_user(server: ServerProcess) -> None:
    async with server.serving("--requests", "0.1/3"):
        ann, bob = next(new_users), next(new_users)
        for _ in range(3):
            await server.want(200, "GET /api/v1/me", server.token(ann))
        over = await server.ask("GET", "/api/v1/me", server.token(ann))
        assert (over.status, over.code) == (429, "rate_limited")
        assert 1 <= int(over.headers["retry-after"]) <= 11
        await server.want(200, "GET /api/v1/me", server.token(bob))
        for _ in range(5):
            await server.chat(ann)  # a service, again
        await server.want(200, "GET /healthz")


async def test_handshakes_and_bad_tokens_are_limited_per_address(
    server: ServerProcess,
) -> None:
    async with server.serving("--handshakes", "0.01/3"):
        user = next(new_users)

        async def status(address: str, token: str = "") -> int:
            path = server.socket_path(token or user)
            got = await server.knock(upgrade_bytes(path, X_Forwarded_For=address))
            if isinstance(got, SocketClient):
                got.drop()
                return 101
            if got.status == 429:
                assert got.code == "rate_limited"
                assert int(got.headers["retry-after"]) >= 1
            return got.status

        ok = [101, 101, 101, 429]
        assert [await status("203.0.113.1") for _ in range(4)] == ok
        assert [await status("8.8.8.8, 203.0.113.2") for _ in range(4)] == ok
        assert await status("203.0.113.1, 127.0.0.1") == 429  # a trusted proxy
        assert await status("8.8.8.8") == 101  # the forged entry was not counted
        guesses = [await status("203.0.113.3", "bad") for _ in range(4)]
        assert guesses == [401, 401, 401, 429]
        ipv6 = [f"2001:db8::{i}" for i in range(1, 4)]
        assert [await status(address) for address in [*ipv6, "2001:db8::9"]] == ok
        assert await status("2001:db8:0:1::1") == 101  # another /64
        wrong = [("203.0.113.4", "bad")] * 3
        for address, token in wrong:
            header = {"X_Forwarded_For": address}
            assert (
                await server.ask("GET", "/api/v1/me", token, **header)
            ).status == 401
        header = {"X_Forwarded_For": "203.0.113.4"}
        over = await server.ask("GET", "/api/v1/me", "bad", **header)
        assert over.status == 429
        own = ["nonsense", "203.0.113.5, nonsense", "999.1.1.1", "also bad"]
        assert [await status(address) for address in own] == ok  # all count as the peer
        await server.stop()
        await server.begin(*server.flags, "--trusted-proxy", "none")
        believed = [await status(f"203.0.113.{i}") for i in range(4)]
        assert believed == ok


async def test_connections_per_user_are_limited(server: ServerProcess) -> None:
    async with server.serving("--connections-per-user", "2"):
        ann, bob = next(new_users), next(new_users)
        peers = [await server.peer(ann) for _ in range(2)]
        head = upgrade_bytes(server.socket_path(ann))
        third = await server.knock(head)
        assert isinstance(third, SocketClient)
        with pytest.raises(Disconnected) as gone:  # the close frame comes first
            await third.receive()
        assert gone.value.code == 4504
        for peer in peers:
            await peer.receives_nothing()
        (await server.peer(bob)).drop()
        await peers.pop().leave()

        async def accepted() -> bool:
            got = await server.knock(head)
            assert isinstance(got, SocketClient)
            with suppress(Disconnected):
                return bool((await got.receive())["type"] == "connected")
            return False

        await wait_until(accepted)


async def test_messages_are_limited_in_bytes_and_in_characters(
    server: ServerProcess,
) -> None:
    flags = ("--max-message-bytes", "1000", "--max-content-chars", "10")
    async with server.serving(*flags):
        user = next(new_users)
        chat, peer = await server.chat(user), await server.peer(user)
        edge = await peer.ask("send_message", chat_id=chat, content="🙂" * 10)
        assert edge["type"] == "ack"
        over = await peer.ask("send_message", chat_id=chat, content="🙂" * 11)
        assert over["code"] == "bad_field"
        assert "content" in over["message"]
        target = f"/api/v1/chats/{chat}/messages"
        token, body = server.token(user), b'{"content":"c"}'
        answer = await server.ask("POST", target, token, {"content": "x" * 11})
        assert (answer.status, answer.code) == (400, "bad_field")
        await server.want(201, f"POST {target}", token, body.ljust(1000))
        await peer.receive("new_message")
        answer = await server.ask("POST", target, token, body.ljust(1001))
        assert (answer.status, answer.code) == (413, "too_large")
        await peer.send_frame('{"type":"ping"}'.ljust(1000))
        await peer.receive("pong")
        umlauts = '{"type":"ping","x":"' + "é" * 489 + '"}'
        assert len(umlauts.encode()) == 1000
        await peer.send_frame(umlauts)
        await peer.receive("pong")
        await peer.send_frame(umlauts + " ")  # 1001 bytes, 512 characters
        assert await peer.ended() == 1009


# --- whole process: the ready log line -----------------------------------------------


async def test_the_ready_log_line_names_each_backend_key_and_its_kind(
    server: ServerProcess,
) -> None:
    keys = {"RS256": "public key", "ES256": "public key", "EdDSA": "public key"}
    for algorithm in keys:
        (server.home / algorithm).write_bytes(public_pem(algorithm))
    keys["HS256"] = "shared secret"
    (server.home / "HS256").write_bytes(SHARED_SECRET)
    flags = [word for name in keys for word in ("--jwt-key", str(server.home / name))]
    async with server.serving(*flags):
        pass
    named = ", ".join(f"{server.home / n} ({n}, {kind})" for n, kind in keys.items())
    (line,) = re.findall(r"(?m)^\S+ INFO ready .*", server.output)
    assert line.endswith(f" jwt_keys='{named}'"), line
    async with server.serving(*NO_RATES):
        pass
    assert "jwt_keys" not in re.findall(r"(?m)^\S+ INFO ready .*", server.output)[1]
