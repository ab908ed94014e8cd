# SPDX-License-Identifier: MIT
"""A TCP echo server whose payload Python never copies, and clients that check it.

    python echo_tcp.py               server and 20 clients, in this process
    python echo_tcp.py --listen 7    only the server, at this port, until control-C

Each connection has a buffer of the pool. What arrives is received into it, and sent from
it: the kernel moves the bytes, Python only sees how many there were.
"""

import argparse
import asyncio
import os
import socket
from contextlib import suppress

import kucomms

CONNECTIONS, BUFFER = 64, 64 << 10
CLIENTS, BYTES = 20, 1 << 20


async def serve(pool: kucomms.Pool, listener: socket.socket) -> None:
    async with asyncio.TaskGroup() as group:
        while True:
            buffer = await pool.allocate_when_room(BUFFER)  # before there is a connection for it
            try:
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            except BaseException:
                buffer.free()
                raise
            group.create_task(echo(pool, buffer, sock))


async def echo(pool: kucomms.Pool, buffer: kucomms.Buffer, sock: socket.socket) -> None:
    with buffer, sock:
        try:
            while received := await pool.receive(sock, buffer):
                sent = 0
                while sent < received:
                    sent += await pool.send(sock, (buffer, sent, received - sent))
        except kucomms.TransportError as error:
            print(f"a connection ended: {error.strerror}")


async def check(address: tuple[str, int]) -> int:
    """A client, with ordinary streams. Returns how many bytes came back."""
    reader, writer = await asyncio.open_connection(*address)
    data = os.urandom(BYTES)

    async def send() -> None:
        writer.write(data)
        await writer.drain()

    _, echoed = await asyncio.gather(send(), reader.readexactly(BYTES))
    assert echoed == data
    writer.close()
    await writer.wait_closed()
    return len(echoed)


async def main(port: int | None) -> None:
    with socket.create_server(("127.0.0.1", port or 0)) as listener:
        listener.setblocking(False)
        address = listener.getsockname()
        async with kucomms.open_pool(CONNECTIONS * BUFFER) as pool:
            server = asyncio.create_task(serve(pool, listener))
            if port is None:
                echoed = await asyncio.gather(*(check(address) for _ in range(CLIENTS)))
                server.cancel()
                await asyncio.wait([server])
                print(f"{sum(echoed)} bytes echoed to {len(echoed)} clients")
                statistics = pool.statistics()
                print(f"{statistics.bytes_read} received, {statistics.bytes_written} sent")
            else:
                print(f"listening at {address[0]}:{address[1]}", flush=True)
                await server


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--listen", type=int, metavar="PORT", help="only the server")
with suppress(KeyboardInterrupt):
    kucomms.run(main(parser.parse_args().listen))
