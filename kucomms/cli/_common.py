# SPDX-License-Identifier: MIT
"""What the commands share: options, signals, how a message is shown."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
import msgspec

from kucomms import Endpoint, Link, Message, NotReadyError
from kucomms.transports.base import Listener

__all__ = [
    "SIZE",
    "Stop",
    "describe",
    "fields_of",
    "is_live",
    "join",
    "json_option",
    "note",
    "print_json",
    "ring_size_option",
    "somebody",
    "stop_on_signals",
    "timeout_option",
]

F = TypeVar("F", bound=Callable[..., Any])

CONNECT_TIMEOUT = 10.0
_TWICE = 0.5
"""Seconds within which a second signal is taken for an echo of the first: some programs
signal a process and then its group."""


class _Size(click.ParamType[int]):
    """Bytes, with K or M for the powers of 1024."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        text = str(value).strip().upper()
        factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        digits = text[:-1] if factor > 1 else text
        if not digits.isdecimal() or not 0 < int(digits) * factor <= 1 << 32:
            self.fail(f"{value!r} is not a size; write bytes, as 65536, 64K or 1M", param, ctx)
        return int(digits) * factor


SIZE = _Size()


def ring_size_option(function: F) -> F:
    """Add ``--ring-size``."""
    return click.option(
        "--ring-size",
        type=SIZE,
        help="Bytes of each direction's ring, as 65536, 64K or 1M.  [default: 1M, or the "
        "listener's]",
    )(function)


def timeout_option(function: F) -> F:
    """Add ``--timeout``."""
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="How long to wait for the other side.  [default: "
        f"{CONNECT_TIMEOUT:g} to connect, for ever to listen]",
    )(function)


def json_option(text: str) -> Callable[[F], F]:
    """Add ``--json``; ``text`` says what is printed."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def note(text: str) -> None:
    """Say something that is no result: on stderr, at once."""
    click.echo(text, err=True)


def print_json(value: object) -> None:
    """One JSON object on a line of its own."""
    print(msgspec.json.encode(value).decode(), flush=True)


# ---- control-C --------------------------------------------------------------


class Stop:
    """Whether the command was asked to stop, and why it has to."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.error: BaseException | None = None

    @property
    def asked(self) -> bool:
        """Whether it was."""
        return self._event.is_set()

    def set(self) -> None:
        """Ask for it."""
        self._event.set()

    def fail(self, error: BaseException, _handler_name: str = "") -> None:
        """Ask for it because of ``error``: to be an endpoint's ``on_error``."""
        self.error = self.error or error
        self.set()

    async def wait(self) -> None:
        """Wait until it is asked for."""
        await self._event.wait()

    async def until(self, what: asyncio.Event, timeout: float | None = None) -> None:
        """Wait for ``what``, for at most ``timeout`` seconds, or until asked to stop."""
        waits = [asyncio.ensure_future(self.wait()), asyncio.ensure_future(what.wait())]
        try:
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def raise_error(self) -> None:
        """Raise what ``fail`` was called with, if it was."""
        if self.error is not None:
            raise self.error


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside, SIGINT and SIGTERM ask to stop; a second one, later, cancels the task."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    stop = Stop()
    first = 0.0

    def signalled() -> None:
        nonlocal first
        if not first:
            first = loop.time()
            stop.set()
        elif loop.time() - first > _TWICE:
            task.cancel()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, signalled)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


# ---- connecting and listening ----------------------------------------------


async def join(
    endpoint: Endpoint,
    url: str,
    *,
    listen: bool,
    ring_size: int | None,
    timeout: float | None,
    quiet: bool,
    max_links: int = 4096,
    hello: bytes = b"",
) -> Link | Listener:
    """Listen at ``url``, and say so unless ``quiet``, or connect to it."""
    if listen:
        listener = await endpoint.listen(
            url, ring_size=ring_size or 1 << 20, max_links=max_links, hello=hello
        )
        if not quiet:
            note(f"listening at {url}")
        return listener
    return await endpoint.connect(
        url,
        ring_size=ring_size,
        timeout=CONNECT_TIMEOUT if timeout is None else timeout,
        hello=hello,
    )


async def somebody(
    stop: Stop, came: asyncio.Event, url: str, timeout: float | None
) -> None:
    """Wait until the first peer came, or asked to stop. Raises NotReadyError."""
    await stop.until(came, timeout)
    if not came.is_set() and not stop.asked:
        raise NotReadyError(f"{url}: nobody connected within {timeout:g} s")


# ---- messages ---------------------------------------------------------------


def describe(data: bytes, as_hex: bool = False) -> str:
    """Data for a person: text if it is printable, else a bytes literal; or hexadecimal."""
    if as_hex:
        return data.hex(" ")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return repr(data)
    return text if text.isprintable() else repr(data)


def fields_of(message: Message, as_hex: bool = False) -> dict[str, Any]:
    """A message for JSON: ``text`` where the data is UTF-8, else ``hex``."""
    fields: dict[str, Any] = {
        "type": message.type,
        "id": message.id,
        "user_value": message.user_value,
        "length": len(message),
    }
    if not as_hex:
        try:
            return fields | {"text": message.data.decode()}
        except UnicodeDecodeError:
            pass
    return fields | {"hex": message.data.hex()}


def is_live(stream: Any = None) -> bool:
    """Whether to show something that moves: only on a terminal that can."""
    from rich.console import Console

    console = Console(file=stream or sys.stdout)
    return console.is_terminal and not console.is_dumb_terminal
