"""The conventional Python stack with storage: Starlette, uvicorn, SQLite.

uvicorn runs with uvloop and httptools, without compression and access log. Each message
is committed and then sent to its room. A commit is as durable as chatd's: WAL, with
synchronous=FULL. The event loop itself commits, because a thread for each commit costs
more CPU. The token (HS256) is checked at the upgrade and at each post. History is not
replayed.
"""

import json
import os
import sqlite3
import sys
import time

import jwt
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

ROOMS: dict[int, set[WebSocket]] = {}
DB = sqlite3.connect(os.environ["BENCH_DB"], isolation_level=None)
DB.execute("PRAGMA journal_mode = WAL")
DB.execute("PRAGMA synchronous = FULL")
DB.execute(
    "CREATE TABLE IF NOT EXISTS message (id INTEGER PRIMARY KEY, chat_id INTEGER,"
    " sender_id INTEGER, content TEXT, created_at INTEGER)"
)


def user_of(token: str) -> int | None:
    """Return the user of a token; None if the token is not valid."""
    try:
        claims = jwt.decode(token, os.environ["BENCH_SECRET"], ["HS256"])
    except jwt.InvalidTokenError:
        return None
    return int(claims["user_id"])


def store(chat_id: int, sender_id: int, content: str) -> str:
    """Commit a message; return the event as JSON."""
    row = (chat_id, sender_id, content, int(time.time()))
    cursor = DB.execute(
        "INSERT INTO message (chat_id, sender_id, content, created_at)"
        " VALUES (?, ?, ?, ?)",
        row,
    )
    keys = ("id", "chat_id", "sender_id", "content", "created_at")
    message = dict(zip(keys, (cursor.lastrowid, *row), strict=True))
    return json.dumps({"type": "new_message", "chat_id": chat_id, "message": message})


async def tell(room: set[WebSocket], text: str) -> None:
    """Send a text to all members of a room."""
    for member in list(room):
        try:
            await member.send_text(text)
        except (WebSocketDisconnect, RuntimeError):
            room.discard(member)


async def talk(socket: WebSocket) -> None:
    """Serve one WebSocket."""
    user_id = user_of(socket.query_params.get("token", ""))
    if user_id is None:
        await socket.close()
        return
    await socket.accept()
    chat_id = socket.path_params["chat_id"]
    room = ROOMS.setdefault(chat_id, set())
    room.add(socket)
    try:
        while True:
            content = await socket.receive_text()
            await tell(room, store(chat_id, user_id, content))
    except WebSocketDisconnect:
        pass
    finally:
        room.discard(socket)


async def post(request: Request) -> JSONResponse:
    """Store a posted message, send it to its room, answer 201."""
    user_id = user_of(request.headers.get("authorization", "").removeprefix("Bearer "))
    if user_id is None:
        return JSONResponse({"error": "token"}, 401)
    chat_id = request.path_params["chat_id"]
    text = store(chat_id, user_id, (await request.json())["content"])
    await tell(ROOMS.get(chat_id, set()), text)
    return JSONResponse(json.loads(text)["message"], 201)


app = Starlette(
    routes=[
        WebSocketRoute("/{chat_id:int}", talk),
        Route("/chats/{chat_id:int}/messages", post, methods=["POST"]),
    ]
)
uvicorn.run(
    app,
    host="127.0.0.1",
    port=int(sys.argv[1]),
    loop="uvloop",
    http="httptools",
    ws="websockets-sansio",
    ws_per_message_deflate=False,
    access_log=False,
    log_level="warning",
    backlog=4096,
)
