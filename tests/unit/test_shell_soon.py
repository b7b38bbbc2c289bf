"""What is asked for again and again is done once, and later."""

from __future__ import annotations

import asyncio

from tunnel.shell.soon import Soon


def test_once_later_and_never_after_the_end() -> None:
    async def test() -> None:
        done: list[int] = []
        soon = Soon(asyncio.get_running_loop(), lambda: done.append(1))
        soon()
        soon()
        assert done == []
        await asyncio.sleep(0)
        assert done == [1]
        soon()
        await asyncio.sleep(0)
        assert done == [1, 1]
        soon()
        soon.stop()
        soon()
        await asyncio.sleep(0)
        assert done == [1, 1]

    asyncio.run(test())


def test_an_action_may_ask_for_itself() -> None:
    async def test() -> None:
        done: list[int] = []

        def action() -> None:
            done.append(1)
            if len(done) < 3:
                soon()

        soon = Soon(asyncio.get_running_loop(), action)
        soon()
        for _ in range(5):
            await asyncio.sleep(0)
        assert done == [1, 1, 1]

    asyncio.run(test())
