"""Python's `websockets` on uvloop, with its broadcast(). Rooms by path; no storage.

Compression is off, as its documentation advises for speed. The token (HS256) is checked
before the upgrade. The keep-alive pings (every 20 s) are on, as by default.
"""

import http
import os
import sys
import urllib.parse

import jwt
import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.http11 import Request, Response

ROOMS: dict[str, set[ServerConnection]] = {}


def check(connection: ServerConnection, request: Request) -> Response | None:
    """Refuse a request without a valid token."""
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(request.path).query)
    try:
        jwt.decode(query["token"][0], os.environ["BENCH_SECRET"], ["HS256"])
    except (KeyError, jwt.InvalidTokenError):
        return connection.respond(http.HTTPStatus.UNAUTHORIZED, "token\n")
    return None


async def talk(connection: ServerConnection) -> None:
    """Send what the connection receives to all members of its room."""
    assert connection.request is not None
    room = ROOMS.setdefault(connection.request.path.partition("?")[0], set())
    room.add(connection)
    try:
        async for message in connection:
            broadcast(room, message)
    finally:
        room.discard(connection)


async def main() -> None:
    """Serve until a signal."""
    port = int(sys.argv[1])
    async with serve(
        talk, "127.0.0.1", port, compression=None, process_request=check, backlog=4096
    ) as server:
        await server.serve_forever()


uvloop.run(main())
