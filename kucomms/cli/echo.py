# SPDX-License-Identifier: MIT
"""``kucomms echo``: sends back what it gets."""

from __future__ import annotations

import asyncio

import click
import msgspec

from kucomms import Endpoint, KucommsError, Link, PeerClosedError
from kucomms.cli._common import (
    join,
    json_option,
    note,
    print_json,
    ring_size_option,
    somebody,
    stop_on_signals,
    timeout_option,
)
from kucomms.transports.base import Listener

__all__ = ["command"]


class Totals(msgspec.Struct):
    """What was echoed."""

    url: str
    links: int = 0
    messages: int = 0
    bytes: int = 0


async def _run(
    url: str,
    *,
    connect: bool,
    reply: bool,
    once: bool,
    ring_size: int | None,
    timeout: float | None,
    quiet: bool,
) -> Totals:
    totals = Totals(url)
    tasks: set[asyncio.Task[None]] = set()
    came = asyncio.Event()
    went = asyncio.Event()

    # One task for each link and no message handler: so the echoes of a peer that does
    # not read them hold up nobody but that peer.
    async def echo(link: Link) -> None:
        try:
            async for message in link:
                if reply:
                    await link.reply(message, message.data, user_value=message.user_value)
                else:
                    await link.send(message)
                totals.messages += 1
                totals.bytes += len(message)
        except PeerClosedError:
            pass  # before it had all its echoes, or it died: the close handler says

    def opened(link: Link) -> None:
        totals.links += 1
        came.set()
        task = asyncio.get_running_loop().create_task(echo(link))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(
            lambda task: None if task.cancelled() or not task.exception() else stop.fail(
                task.exception() or RuntimeError()
            )
        )

    def closed(_link: Link, error: KucommsError | None) -> None:
        if error is not None:
            note(f"{error}")
        went.set()

    with stop_on_signals() as stop:
        endpoint = Endpoint(
            "echo", on_link_open=opened, on_link_close=closed, on_error=stop.fail
        )
        async with endpoint:
            joined = await join(
                endpoint,
                url,
                listen=not connect,
                ring_size=ring_size,
                timeout=timeout,
                quiet=quiet,
            )
            if not connect:
                await somebody(stop, came, url, timeout)
            if once or connect:
                await stop.until(went)
            else:
                await stop.wait()
            if isinstance(joined, Listener):
                await joined.aclose()
        await asyncio.gather(*tasks, return_exceptions=True)
        stop.raise_error()
    return totals


EPILOG = """\b
Example, in two terminals:
  kucomms echo shm://lab --reply
  kucomms send shm://lab hello --request
"""


@click.command("echo", epilog=EPILOG)
@click.argument("url")
@click.option("--connect", is_flag=True, help="Connect to URL; else listen at it.")
@click.option(
    "--reply",
    is_flag=True,
    help="Answer with link.reply(), as the requests of 'kucomms send --request' need it; on "
    "the wire a request is a message like any other, so an echo server cannot know.",
)
@click.option("--once", is_flag=True, help="End when the first link is closed.")
@ring_size_option
@timeout_option
@json_option("At the end, print one JSON object with the totals.")
def command(
    *,
    url: str,
    connect: bool,
    reply: bool,
    once: bool,
    ring_size: int | None,
    timeout: float | None,
    as_json: bool,
) -> int:
    """Listen at URL and send every message back to its sender.

    Serves any number of peers until control-C, and then exits with 0. With --connect it
    serves the listener at URL until that closes the link.
    """
    import kucomms

    totals = kucomms.run(
        _run(
            url,
            connect=connect,
            reply=reply,
            once=once,
            ring_size=ring_size,
            timeout=timeout,
            quiet=as_json,
        )
    )
    if as_json:
        print_json(totals)
    else:
        print(f"{totals.messages} messages, {totals.bytes} bytes echoed on {totals.links} links")
    return 0
