# SPDX-License-Identifier: MIT
"""Request and reply between two processes.

    python requests.py

The client starts the server as a process of its own and asks it a few things, the slow
one first. Replies find their requests by the id of the message, in whatever order they
come; the server does not block on the slow one, because a task answers it.
"""

import asyncio
import os
import sys

import kucomms

SLOW, FAST = 1, 2  # types of message: what they mean is up to you


async def serve(url: str) -> None:
    tasks = set()
    gone = asyncio.Event()

    async def answer_slowly(message: kucomms.Message, link: kucomms.Link) -> None:
        await asyncio.sleep(0.2)
        await link.reply(message, b"slow " + message.data)

    async def answer(message: kucomms.Message, link: kucomms.Link) -> None:
        if message.type == SLOW:
            task = asyncio.create_task(answer_slowly(message, link))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        else:
            await link.reply(message, b"fast " + message.data)

    endpoint = kucomms.Endpoint("server", on_message=answer)
    endpoint.on_link_close(lambda link, error: gone.set())
    async with endpoint:
        await endpoint.listen(url)
        await gone.wait()


async def ask(url: str) -> None:
    server = await asyncio.create_subprocess_exec(sys.executable, __file__, url)
    async with kucomms.connect(url, timeout=10) as link:

        async def show(data: bytes, type: int) -> None:
            reply = await link.request(data, type=type, timeout=5)
            print(f"{data.decode()}: {reply.data.decode()}, from process {link.peer.pid}")

        await asyncio.gather(
            show(b"first", SLOW), show(b"second", FAST), show(b"third", FAST)
        )
    await server.wait()


if len(sys.argv) > 1:
    kucomms.run(serve(sys.argv[1]))
else:
    kucomms.run(ask(f"shm://requests_{os.getpid()}"))
