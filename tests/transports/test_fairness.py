# SPDX-License-Identifier: MIT
"""One link that never ends, and those who share its endpoint."""

import asyncio
import os

import pytest

import kucomms
from kucomms import Endpoint
from tests.transports.processes import PATIENCE, Process


@pytest.mark.asyncio
@pytest.mark.parametrize("busy_poll", [0.0, 200e-6])
@pytest.mark.parametrize("borrow", [False, True])
async def test_a_flood_leaves_the_other_links_their_turn(busy_poll, borrow):
    """A link that was found empty beside one that never is has to be heard again."""
    url = f"shm://fairness_{os.getpid()}"
    flooded = 0

    async def handle(message, link):
        nonlocal flooded
        if message.type:
            await link.reply(message, bytes(message.data))
        else:
            flooded += 1

    endpoint = Endpoint("flooded", busy_poll=busy_poll)
    endpoint.on_message(borrow=borrow)(handle)
    async with endpoint:
        await endpoint.listen(url)
        with Process("floods", url) as flooder:
            await flooder.says("floods")
            async with kucomms.connect(url) as link, asyncio.timeout(PATIENCE):
                for value in range(100):
                    before = flooded
                    reply = await link.request(value.to_bytes(8, "little"), type=1)
                    assert int.from_bytes(reply.data, "little") == value
                    while flooded == before:  # noqa: ASYNC110 - both get on
                        await asyncio.sleep(0)
