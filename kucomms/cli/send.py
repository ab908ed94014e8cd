# SPDX-License-Identifier: MIT
"""``kucomms send``: sends one message, or each line of stdin, or a file."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import click

import kucomms
from kucomms import KucommsError
from kucomms.cli._common import fields_of, json_option, print_json, ring_size_option

__all__ = ["command"]

F = TypeVar("F", bound=Callable[..., Any])


async def _stdin_lines() -> AsyncIterator[bytes]:
    """The lines of stdin, without their ends, as they come.

    A thread reads them, since stdin may be a file, and control-C must not wait for it.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(1)

    def read() -> None:
        rest = b""
        try:
            while chunk := os.read(0, 1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    asyncio.run_coroutine_threadsafe(queue.put(line), loop).result()
            if rest:
                asyncio.run_coroutine_threadsafe(queue.put(rest), loop).result()
        finally:
            asyncio.run_coroutine_threadsafe(queue.put(None), loop).result()

    threading.Thread(target=read, daemon=True).start()
    while (line := await queue.get()) is not None:
        yield line


async def _messages(data: bytes | None, count: int) -> AsyncIterator[bytes]:
    if data is None:
        async for line in _stdin_lines():
            yield line
    else:
        for _ in range(count):
            yield data


async def _run(
    url: str,
    *,
    data: bytes | None,
    count: int,
    header: dict[str, Any],
    request: bool,
    timeout: float,
    ring_size: int | None,
    as_json: bool,
) -> dict[str, Any]:
    result: dict[str, Any] = {"url": url, "messages": 0, "bytes": 0}
    if request:
        result["replies"] = []
    async with kucomms.connect(url, timeout=timeout, ring_size=ring_size) as link:
        async for message in _messages(data, count):
            if request:
                reply = await link.request(message, **header, timeout=timeout)
                if as_json:
                    result["replies"].append(fields_of(reply))
                else:
                    sys.stdout.buffer.write(reply.data + b"\n")
                    sys.stdout.buffer.flush()
            else:
                try:
                    async with asyncio.timeout(timeout):
                        await link.send(message, **header)
                except TimeoutError as error:
                    if isinstance(error, KucommsError):
                        raise
                    raise TimeoutError(
                        f"{url}: no room in the ring for {timeout:g} s; the other side does not "
                        "read"
                    ) from None
            result["messages"] += 1
            result["bytes"] += len(message)
    return result


def _header_option(name: str, text: str) -> Callable[[F], F]:
    return click.option(name, type=click.IntRange(0, (1 << 64) - 1), metavar="N", help=text)


EPILOG = """\b
Examples:
  kucomms send shm://lab hello --type 1 --id 7
  kucomms send shm://lab --request what
  seq 1000 | kucomms send shm://lab -
"""


@click.command("send", epilog=EPILOG)
@click.argument("url")
@click.argument("data", required=False)
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Send the content of this file as one message.",
)
@_header_option("--type", "The message's type.  [default: 0]")
@_header_option("--id", "The message's id.  [default: 0; for a request, one that is free]")
@_header_option("--user-value", "The message's user value.  [default: 0]")
@click.option(
    "--request",
    is_flag=True,
    help="Wait for the reply, and print its data and a newline. The other side has to answer "
    "with link.reply(), as 'kucomms echo --reply' does.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the listener, for room, and for each reply.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Send it N times.  [default: 1]",
)
@ring_size_option
@json_option("At the end, print one JSON object: messages, bytes, and replies for requests.")
def command(
    *,
    url: str,
    data: str | None,
    file: Path | None,
    type: int | None,
    id: int | None,
    user_value: int | None,
    request: bool,
    timeout: float,
    count: int,
    ring_size: int | None,
    as_json: bool,
) -> int:
    """Send DATA to the listener at URL; "-" sends each line of stdin as a message.

    Exit code: 0 when all was sent and, for requests, answered; 130 after control-C.
    """
    if (data is None) == (file is None):
        raise click.UsageError("give either DATA, '-' for the lines of stdin, or --file")
    content = os.fsencode(data) if data is not None else b""
    if file is not None:
        content = file.read_bytes()
    lines = data == "-"
    if lines and count != 1:
        raise click.UsageError("--count does not go with the lines of stdin")
    header = {"type": type, "id": id, "user_value": user_value}
    result = kucomms.run(
        _run(
            url,
            data=None if lines else content,
            count=count,
            header=header,
            request=request,
            timeout=timeout,
            ring_size=ring_size,
            as_json=as_json,
        )
    )
    if as_json:
        print_json(result)
    return 0
