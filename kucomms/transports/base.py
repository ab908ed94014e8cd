# SPDX-License-Identifier: MIT
"""What a transport is: memory plus a doorbell, and a way to see that the peer is gone.

A transport serves one URL scheme. It is an object with the two methods of
``Transport``; those of other packages are found by the entry point group
``kucomms.transports``, whose name is the scheme.

A link uses its connection's ``channel`` by the methods of ``kucomms._core.Channel``.
A transport over memory gets one from the C core; one that is not memory (a network)
brings an object with the same methods.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import msgspec

from kucomms import _core
from kucomms.exceptions import AddressError, KucommsError, ProtocolError

if TYPE_CHECKING:
    from kucomms._core import Channel
    from kucomms._link_pools import LinkPools
    from kucomms._pool_memory import PoolMemory

__all__ = [
    "RING_LIMIT",
    "Address",
    "ConnectOptions",
    "Connection",
    "ListenOptions",
    "Listener",
    "Peer",
    "Transport",
]

RING_LIMIT = 1 << 26
"""Bytes per direction: what a listener gives at most unless it is told otherwise, and what is
taken from another user's listener unless more was asked for."""

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_NAME = re.compile(rf"([A-Za-z0-9_]{{1,{_core.NAME_MAX}}})(?:/(0|[1-9][0-9]{{,9}}))?")
_CHANNELS = 1 << 32


class Address(msgspec.Struct, frozen=True):
    """A URL, taken apart: ``scheme://name``, or ``scheme://name/channel``."""

    url: str
    scheme: str
    name: str
    channel: int | None = None

    @classmethod
    def parse(cls, url: str) -> Address:
        """Take ``url`` apart. Raises AddressError."""
        match = _URL.fullmatch(url) if isinstance(url, str) else None
        if match is None:
            raise AddressError(f"{url!r} is not a URL; write SCHEME://NAME, such as 'shm://sensor'")
        scheme, rest = match.groups()
        match = _NAME.fullmatch(rest)
        if match is None or int(match[2] or 0) >= _CHANNELS:
            raise AddressError(
                f"{url!r}: the name has to be 1 to {_core.NAME_MAX} of the characters "
                f"A-Z a-z 0-9 _ ('/' comes before the number of a channel, '?' is reserved)"
            )
        return cls(url, scheme, match[1], None if match[2] is None else int(match[2]))


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Who is at the other side of a link.

    ``pid`` and ``uid`` as the system told them at set-up, None for the kernel;
    ``hello``: the bytes that the other side gave to ``listen`` or ``connect``;
    ``channel``: which of the other side's numbered channels this link is.
    """

    pid: int | None = None
    uid: int | None = None
    hello: bytes = b""
    kernel: bool = False
    channel: int | None = None


class ListenOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What ``Endpoint.listen`` was given; see there."""

    ring_size: int
    max_ring_size: int
    max_links: int
    allow: frozenset[int]
    hello: bytes
    turns: bool = False

    @property
    def features(self) -> int:
        """The features in force on the links, KUCOMMS_FEATURE_..."""
        return int(_core.lib.KUCOMMS_FEATURE_TURNS) if self.turns else 0

    def agree(self, wanted: int) -> int:
        """The ring size for a peer that wants ``wanted`` bytes (0: no wish)."""
        limit = _core.ring_size_for(self.max_ring_size)
        wanted = min(wanted or self.ring_size, limit)
        return min(_core.ring_size_for(wanted), limit)


class ConnectOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What ``Endpoint.connect`` was given; see there."""

    ring_size: int
    timeout: float | None
    hello: bytes
    owner: int | None

    def most(self, own: bool) -> int:
        """The largest ring size that a listener, of our own user or not, may answer with.

        Less than was asked for is fine, more is not: the memory is ours, too.
        """
        return self.ring_size or (1 << 32 if own else RING_LIMIT)


class Connection(ABC):
    """One end of an established link, as its transport sees it."""

    pollable = True
    """Whether the peer can send while this thread spins: it does not run in its loop."""
    carries_buffers = False
    """Whether messages can hand over buffers: both sides know how. Then ``channel`` has
    ``on_frame`` and ``send_front``, and the methods below are implemented."""
    contiguous_max = 0
    """Bytes of the largest pool that can be physically contiguous; 0: none can."""
    side = 1
    """Ours, of the channel: 0 for who listens. Its pools have numbers of 2k + side."""
    pools: LinkPools | None = None
    """The link's; from its first pool on."""
    pool_opened: Callable[[int, PoolMemory], int]
    """Set by the link before ``start``: to be called, in the loop, when the peer has opened
    a pool, with its number and the memory as it is mapped here. Returns 0, and the memory is
    the link's; or an errno for who opened it. Raises ProtocolError when the peer broke the
    rules."""

    def __init__(self, url: str, channel: Channel, peer: Peer) -> None:
        self.url = url
        self.channel = channel
        self.peer = peer

    @abstractmethod
    def start(
        self, woken: Callable[[], None], gone: Callable[[KucommsError | None], None]
    ) -> None:
        """Watch the doorbell and the peer's life in the running loop.

        ``woken()`` is called, in the loop, when the peer has rung; ``gone(error)``
        once, when the peer is not there any more: with an error when the transport
        knows better than the channel's ``peer_state`` why.
        """

    @abstractmethod
    def ring(self) -> None:
        """Wake the peer. From any thread; never blocks, never raises."""

    @abstractmethod
    def close(self) -> None:
        """Stop watching and give back what is not memory. Twice is fine."""

    async def open_pool(self, size: int, contiguous: bool = False) -> tuple[int, PoolMemory]:
        """Make memory of so many bytes, whole pages, that both sides have mapped.

        ``contiguous``, physically: asked for up to ``contiguous_max`` bytes only.

        Returns the number of the pool, and the memory as it is mapped here. Not cancelled
        but by the end of the loop. Raises OSError: no memory, or the peer did not map it,
        or went.
        """
        raise NotImplementedError

    def close_pool(self, number: int) -> bool:
        """Tell the peer that our pool of this number is closed; False: a frame has to."""
        return False

    def map_pool(self, size: int, offset: int) -> PoolMemory:
        """Map a pool of the peer's that it has announced by a frame.

        Raises OSError, and ProtocolError where pools are not announced so.
        """
        raise ProtocolError(f"{self.url}: the other side announces a pool in the ring")


class Listener(ABC):
    """Somebody who takes connections at a URL, until it is closed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.closed = False

    @abstractmethod
    async def aclose(self) -> None:
        """Take no more; the links that there are stay. Twice is fine."""


class Transport(Protocol):
    """A URL scheme.

    One whose URLs can name a channel, ``scheme://name/3``, has an attribute ``numbered``
    that is true; for others, such a URL is an AddressError.
    """

    async def listen(
        self,
        address: Address,
        options: ListenOptions,
        accept: Callable[[Connection], None],
        links: Callable[[], int],
    ) -> Listener:
        """Take connections; give each to ``accept``. ``links()``: how many there are now.

        With ``options.turns``, ``options.features`` have to be in force on their channels.
        """
        ...

    async def connect(self, address: Address, options: ConnectOptions) -> Connection:
        """Make a connection. Raises NotReadyError after ``options.timeout`` seconds."""
        ...


def unknown_scheme(url: str, known: Iterable[str]) -> AddressError:
    """The error for a URL that no transport serves."""
    schemes = ", ".join(f"{scheme}://" for scheme in sorted(known))
    return AddressError(f"{url!r}: no transport for this scheme; there are {schemes}")
