"""picows on uvloop, the fastest peer in Python. Rooms by path; no token or storage."""

import asyncio
import sys

import uvloop
from picows import (
    WSFrame,
    WSListener,
    WSMsgType,
    WSTransport,
    WSUpgradeRequest,
    ws_create_server,
)

ROOMS: dict[bytes, set[WSTransport]] = {}


class Member(WSListener):
    """One connection."""

    def __init__(self, path: bytes) -> None:
        self.room = ROOMS.setdefault(path, set())

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Join the room."""
        self.room.add(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Send a message to all members of the room."""
        if frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()
        elif frame.msg_type == WSMsgType.TEXT:
            payload = frame.get_payload_as_bytes()
            for member in self.room:
                member.send(WSMsgType.TEXT, payload)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        """Leave the room."""
        self.room.discard(transport)


def greet(request: WSUpgradeRequest) -> WSListener:
    """Make the listener of a new connection."""
    return Member(request.path.partition(b"?")[0])


async def main() -> None:
    """Serve until a signal."""
    server = await ws_create_server(greet, "127.0.0.1", int(sys.argv[1]), backlog=4096)
    await server.serve_forever()


asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
uvloop.run(main())
