# SPDX-License-Identifier: MIT
"""The errors of kucomms: one per meaning.

Every message says what happened, to which URL, and what to do. Most errors are
also of the class of the standard library that means the same, so that code which
catches ``asyncio.QueueFull``, ``TimeoutError`` or ``OSError`` goes on working.
"""

import asyncio

__all__ = [
    "AddressError",
    "AddressInUseError",
    "BusyError",
    "ChannelTakenError",
    "ClosedError",
    "HeaderValueError",
    "KucommsError",
    "MessageTooLargeError",
    "NoSuchChannelError",
    "NotReadyError",
    "OutOfTurnError",
    "PeerClosedError",
    "PoolFull",
    "ProtocolError",
    "QueueEmpty",
    "QueueFull",
    "ShutdownError",
    "TransportError",
    "UsageError",
    "VersionError",
]


class KucommsError(Exception):
    """Base of all errors that kucomms raises on its own account."""


class ClosedError(KucommsError):
    """You closed this link, listener or endpoint."""


class PeerClosedError(KucommsError):
    """The other side closed the link, or died."""


class ShutdownError(PeerClosedError):
    """The kernel module on the other side is going away."""


class NotReadyError(KucommsError, TimeoutError):
    """Nobody is there yet: no listener, no device, no kernel endpoint."""


class NoSuchChannelError(NotReadyError):
    """The kernel endpoint is there, but has announced no channel of this number (yet)."""


class BusyError(KucommsError):
    """The other side is there, but takes no more links."""


class ChannelTakenError(BusyError):
    """Somebody else has the channel of this number."""


class AddressError(KucommsError, ValueError):
    """The URL or the name in it cannot be used."""


class AddressInUseError(KucommsError):
    """Somebody listens at this URL already."""


class QueueFull(KucommsError, asyncio.QueueFull):
    """No room for the message now, or others wait for room already."""


class PoolFull(QueueFull):
    """No room for the buffer in the pool now, or others wait for room already."""


class QueueEmpty(KucommsError, asyncio.QueueEmpty):
    """No message is waiting."""


class MessageTooLargeError(KucommsError, ValueError):
    """The message can never fit into the ring of this link; nothing was sent."""


class UsageError(KucommsError, RuntimeError):
    """Used in a way that cannot work: the wrong thread, after a fork, twice."""


class OutOfTurnError(UsageError):
    """On a link with turns: it is the other side's turn to send. Nothing was sent."""


class HeaderValueError(UsageError, ValueError):
    """A header value (type, id, user_value) is not an unsigned 64-bit integer."""


class ProtocolError(KucommsError):
    """The other side broke the rules of the channel; the link was closed."""


class VersionError(ProtocolError):
    """The other side speaks another version of the channel, or unknown features."""


class TransportError(KucommsError, OSError):
    """The operating system refused something that the transport needs.

    ``errno`` and ``strerror`` are those of the system.
    """
