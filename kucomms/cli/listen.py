# SPDX-License-Identifier: MIT
"""``kucomms listen``: prints what arrives."""

from __future__ import annotations

import asyncio

import click

from kucomms import Endpoint, KucommsError, Link, Message
from kucomms.cli._common import (
    describe,
    fields_of,
    join,
    json_option,
    note,
    print_json,
    ring_size_option,
    somebody,
    stop_on_signals,
    timeout_option,
)

__all__ = ["command"]


async def _run(
    url: str,
    *,
    connect: bool,
    count: int | None,
    as_hex: bool,
    as_json: bool,
    ring_size: int | None,
    timeout: float | None,
) -> None:
    came = asyncio.Event()
    left = count

    def message(message: Message, _link: Link) -> None:
        nonlocal left
        if left == 0:
            return
        if as_json:
            print_json(fields_of(message, as_hex))
        else:
            print(
                f"type={message.type} id={message.id} user_value={message.user_value} "
                f"length={len(message)}: {describe(message.data, as_hex)}",
                flush=True,
            )
        if left is not None:
            left -= 1
            if left == 0:
                stop.set()

    def closed(_link: Link, error: KucommsError | None) -> None:
        if error is not None:
            note(f"{error}")
        if connect:
            stop.set()

    with stop_on_signals() as stop:
        endpoint = Endpoint(
            "listen",
            on_message=message,
            on_link_open=lambda _link: came.set(),
            on_link_close=closed,
            on_error=stop.fail,
        )
        async with endpoint:
            await join(
                endpoint,
                url,
                listen=not connect,
                ring_size=ring_size,
                timeout=timeout,
                quiet=as_json,
            )
            if not connect:
                await somebody(stop, came, url, timeout)
            await stop.wait()
        stop.raise_error()


EPILOG = """\b
Example, in two terminals:
  kucomms listen shm://lab --count 3
  seq 3 | kucomms send shm://lab -
"""


@click.command("listen", epilog=EPILOG)
@click.argument("url")
@click.option("--connect", is_flag=True, help="Connect to URL; else listen at it.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N messages.")
@click.option("--hex", "as_hex", is_flag=True, help="Show the data in hexadecimal.")
@ring_size_option
@timeout_option
@json_option(
    "One JSON object per message, each on a line of its own, with type, id, user_value, length, "
    "and the data: text where it is UTF-8, else hex."
)
def command(
    *,
    url: str,
    connect: bool,
    count: int | None,
    as_hex: bool,
    ring_size: int | None,
    timeout: float | None,
    as_json: bool,
) -> int:
    """Listen at URL and print the messages of all who connect.

    Goes on until control-C, and then exits with 0.
    """
    import kucomms

    kucomms.run(
        _run(
            url,
            connect=connect,
            count=count,
            as_hex=as_hex,
            as_json=as_json,
            ring_size=ring_size,
            timeout=timeout,
        )
    )
    return 0
