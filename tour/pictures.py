#!/usr/bin/env python3
"""Draw the pictures of the tour: its task tree, and the path of one message.

python tour/pictures.py        writes task-tree.svg and message.svg beside this file
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from smallchatd import JOBS, OUTBOX_FRAMES, WRITE_SECONDS

HERE = Path(__file__).resolve().parent
CHAR = 8.5  # the width of a letter of monospaced text of 14 px

STYLE = """
  text { font: 14px ui-monospace, "DejaVu Sans Mono", monospace; fill: #1f2328; }
  .note { fill: #59636e; }
  .box { fill: #f6f8fa; stroke: #8c959f; rx: 6px; }
  .nursery { fill: none; stroke: #0969da; stroke-width: 1.5; rx: 10px; }
  .nursery-name { fill: #0969da; }
  .queue { fill: #ffffff; stroke: #8c959f; stroke-dasharray: 4 4; rx: 15px; }
  .thread { fill: #fff1e5; stroke: #bc4c00; rx: 6px; }
  .arrow { fill: none; stroke: #59636e; stroke-width: 1.5; marker-end: url(#tip); }
  #tip path { fill: #59636e; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .note { fill: #9198a1; }
    .box { fill: #151b23; stroke: #656c76; }
    .queue { fill: #0d1117; stroke: #656c76; }
    .nursery { stroke: #4493f8; }
    .nursery-name { fill: #4493f8; }
    .thread { fill: #3d2310; stroke: #db6d28; }
    .arrow { stroke: #9198a1; }
    #tip path { fill: #9198a1; }
  }
"""
TIP = """<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8"
 markerHeight="8" orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker>"""


class Picture:
    """The shapes of an SVG, and how to write them."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.shapes: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        """Write a line whose letters stand on y."""
        self.shapes.append(
            f'<text class="{kind}" x="{x}" y="{y}">{escape(text)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """Draw a rectangle from its upper left corner."""
        self.shapes.append(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}"/>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """Draw an arrow."""
        self.shapes.append(f'<path class="arrow" d="M{x} {y} L{to_x} {to_y}"/>')

    def write(self, name: str, width: float, height: float) -> None:
        """Write the file, with room for what was drawn."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" role="img">'
        )
        title = f"<title>{escape(self.title)}</title>"
        lines = [head, title, f"<style>{STYLE}</style>", TIP, *self.shapes, "</svg>"]
        (HERE / name).write_text("\n".join(lines) + "\n", "utf-8")


# A task is its function and what it does; a nursery is its name and what runs in it.
Node = tuple[str, "str | list[Node]"]
TREE: Node = (
    "nursery: Server.run, ends with the hub",
    [
        ("Store.run", "commits, one Job after another"),
        ("Hub.run", "publishes"),
        (
            "connections: ends with its last connection",
            [
                (
                    "accepting: ends at the signal to stop",
                    [("trio.serve_listeners", "starts a task for each connection")],
                ),
                (
                    "Server.serve_socket, in Server.connection: one for each WebSocket",
                    [
                        ("Session.write", "runs in Server.connection's own task"),
                        ("Session.read", "waits for commands"),
                        ("Session.ping", "ends it if the client does not answer"),
                        ("trio-websocket", "its task takes frames from the network"),
                    ],
                ),
            ],
        ),
    ],
)


def draw_tree(picture: Picture, node: Node, x: float, y: float) -> float:
    """Draw a task, or a nursery around its tasks. Returns the height."""
    name, content = node
    width = 660 - 2 * x
    if isinstance(content, str):
        picture.box(x, y, width, 30, "box")
        picture.text(x + 12, y + 20, name)
        picture.text(x + 12 + 22 * CHAR, y + 20, content, "note")
        return 30
    height = 34.0
    for each in content:
        height += draw_tree(picture, each, x + 16, y + height) + 10
    picture.text(x + 14, y + 22, name, "nursery-name")
    picture.box(x, y, width, height + 4, "nursery")
    return height + 4


# What a message passes, from the top down: kind, name, what happens there. Of what has
# "each" in front of its kind, every session has its own.
STEPS = (
    ("each box", "Session.read", "JSON, then a Job"),
    ("queue", "Store.jobs", f"at most {JOBS}; then Session.read waits"),
    ("box", "Store.run", "one Job at a time"),
    ("thread", "Store.transact", "a worker thread: INSERT, COMMIT. Durable."),
    ("queue", "to_hub", "at most 1; then the store waits"),
    ("box", "Hub.run", "publish: the event, then the ack. Never waits"),
    (
        "each queue",
        "Session.outbox",
        f"at most {OUTBOX_FRAMES}; then the client is cut",
    ),
    ("each box", "Session.write", f"waits for its client, at most {WRITE_SECONDS} s"),
)


def draw_message(picture: Picture) -> float:
    """Draw the path of one message. Returns the height."""
    y = 16.0
    for place, (kind, name, note) in enumerate(STEPS):
        if place:
            picture.arrow(140, y, 140, y + 24)
            y += 26
        each, _, shape = kind.rpartition(" ")
        for shift in (12, 6, 0) if each else (0,):
            picture.box(40 + shift, y + shift, 200, 30, shape)
        picture.text(140 - len(name) * CHAR / 2, y + 20, name)
        picture.text(272, y + 20, note, "note")
        y += 42 if each else 30
    return y + 16


def main() -> None:
    """Draw both."""
    tree = Picture("The tasks of smallchatd, each in the nursery that outlives it")
    tree.write("task-tree.svg", 660, draw_tree(tree, TREE, 8, 8) + 16)
    message = Picture("The path of one message through smallchatd")
    message.write("message.svg", 700, draw_message(message))


if __name__ == "__main__":
    main()
