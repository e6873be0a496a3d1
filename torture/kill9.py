"""Kill -9 under load loses no acked message, doubles none, and disturbs no order.

A crowd writes over sockets and HTTP, makes chats, changes members and marks messages as
read; at moments of chance the server is killed and started again. Whoever got no answer
repeats with the same client_id; every device comes back with its cursor, over the
socket or over polls.
"""

from __future__ import annotations

import trio
from crowd import Crowd
from harness import Chatd, Figures, run_trio, seeded_rng


async def act(chatd: Chatd, crowd: Crowd, kills: int) -> None:
    """Kill and start, at moments of chance; some while everybody comes back."""
    dice = seeded_rng("kill9 moments")
    await crowd.settle()
    async with trio.open_nursery() as nursery:
        crowd.start(nursery)
        await trio.sleep(0.5)
        for _ in range(kills):
            early = dice.random() < 0.2
            await trio.sleep(dice.uniform(0, 0.05) if early else dice.uniform(0.1, 0.8))
            chatd.kill()
            await chatd.start_in_thread()
        await trio.sleep(0.5)
        crowd.talking = False
    await crowd.hush()


def prove(full: bool) -> Figures:
    """Kill many times; then hold what everybody was told against the file."""
    kills = 150 if full else 30
    with Chatd() as chatd:
        crowd = Crowd(chatd, "kill9")
        run_trio(act, chatd, crowd, kills, seconds=60 + 5 * kills)
        numbers = crowd.judge()
        chatd.check()
    return Figures(
        "kill -9: no acked message is lost, none is stored twice, each sender's order "
        "is kept, `n` and `seq` have no holes, every cursor is honoured",
        f"{kills} kills under load, {numbers['acked']:,} acked messages: 0 lost, "
        f"0 double, 0 out of order; {numbers['devices']} devices received "
        f"{numbers['heard']:,} events, each once",
        {"kills": kills, **numbers},
    )
