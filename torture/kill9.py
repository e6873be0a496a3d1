"""Kill -9 under load loses no acked message, edit or deletion, and keeps every order.

A crowd writes over sockets and HTTP, edits, deletes, creates chats, changes members and
marks messages as read. At random moments the server is killed and started again. A
client without an answer repeats its request. Every device comes back with its cursor,
over the socket or over polls. Some load pages and search all the while; what they hold
at the end is what the database has. After a last kill the deleted texts, and those that
were edited away, are soon in no byte of the files.
"""

from __future__ import annotations

import trio
from crowd import Crowd, verify_gone, wait_until_erased
from harness import Chatd, Figures, run_trio, seeded_rng


async def act(chatd: Chatd, crowd: Crowd, kills: int) -> None:
    """Kill and start at random moments, sometimes while the clients come back."""
    rng = seeded_rng("kill9 moments")
    await crowd.make_chats()
    async with trio.open_nursery() as nursery:
        crowd.start(nursery)
        await trio.sleep(0.5)
        for _ in range(kills):
            early = rng.random() < 0.2
            await trio.sleep(rng.uniform(0, 0.05) if early else rng.uniform(0.1, 0.8))
            chatd.kill()
            await chatd.start_in_thread()
        await trio.sleep(0.5)
        crowd.running = False
    await crowd.catch_up()
    chatd.kill()
    verify_gone(crowd.gone(), chatd.db)
    await chatd.start_in_thread()
    await wait_until_erased(crowd.gone(), chatd.db)


def prove(full: bool) -> Figures:
    """Kill many times; then compare what the clients received with the database."""
    kills = 150 if full else 30
    with Chatd() as chatd:
        crowd = Crowd(chatd, "kill9")
        run_trio(act, chatd, crowd, kills, seconds=60 + 5 * kills)
        numbers = crowd.verify()
        chatd.check()
    return Figures(
        "kill -9: no acked message, edit or deletion is lost, no message is stored "
        "twice, each sender's order is kept, `n` and `seq` have no holes, every cursor "
        "is honoured; clients that go by `rev` end with the database's state",
        f"{kills} kills under load, {numbers['acked']:,} acked messages, "
        f"{numbers['edited']:,} edits and {numbers['deleted']:,} deletions: 0 lost, "
        f"0 double, 0 out of order; {numbers['devices']} devices received "
        f"{numbers['received']:,} events, each once; of {numbers['held']:,} messages "
        "that clients held from pages, searches and events 0 differ",
        {"kills": kills, **numbers},
    )
