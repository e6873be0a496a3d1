"""Python's `websockets` on uvloop: rooms by path, its broadcast(), no storage.

No compression, as its documentation advises for speed; the token (HS256) is checked
before the upgrade. Its keep-alive pings (20 s) are on, as by default.
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
    """Refuse who has no good token."""
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(request.path).query)
    try:
        jwt.decode(query["token"][0], os.environ["BENCH_SECRET"], ["HS256"])
    except (KeyError, jwt.InvalidTokenError):
        return connection.respond(http.HTTPStatus.UNAUTHORIZED, "token\n")
    return None


async def talk(connection: ServerConnection) -> None:
    """Let the room hear what one says."""
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
