"""trio-websocket, used in the obvious way: a channel and a task for each connection.

chatd would be like this without its outbox. Rooms by path; no token, no storage.
"""

import sys

import trio
from trio_websocket import ConnectionClosed, WebSocketRequest, serve_websocket

ROOMS: dict[str, set[trio.MemorySendChannel[str | bytes]]] = {}


async def talk(request: WebSocketRequest) -> None:
    """Serve one connection. This task reads, and another one writes."""
    connection = await request.accept()
    sender, receiver = trio.open_memory_channel[str | bytes](256)

    async def write() -> None:
        async for text in receiver:
            await connection.send_message(text)

    room = ROOMS.setdefault(request.path.partition("?")[0], set())
    room.add(sender)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            while True:
                text = await connection.get_message()
                for member in room.copy():
                    await member.send(text)
    except* ConnectionClosed:
        pass
    finally:
        room.discard(sender)


trio.run(serve_websocket, talk, "127.0.0.1", int(sys.argv[1]), None)
