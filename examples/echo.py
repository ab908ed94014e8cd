# SPDX-License-Identifier: MIT
"""The smallest server and client: a message handler that echoes, and somebody who asks.

    python echo.py                   both in this process, over inproc://
    python echo.py shm://lab         the same over shared memory

With shm:// the two need not be in one process: take the server's half into one program
and the client's into another, nothing else changes.
"""

import sys

import kucomms

endpoint = kucomms.Endpoint("echo")


@endpoint.on_message
async def echo(message: kucomms.Message, link: kucomms.Link) -> None:
    await link.send(message)


async def main(url: str) -> None:
    async with endpoint:
        await endpoint.listen(url)

        async with kucomms.connect(url, timeout=5) as link:
            await link.send(b"hello", type=1, id=7)
            answer = await link.receive()
            print(f"{url}: {answer}")


kucomms.run(main(sys.argv[1] if len(sys.argv) > 1 else "inproc://echo"))
