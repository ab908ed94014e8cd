# SPDX-License-Identifier: MIT
"""Asyncio message endpoints over in-process, shared and kernel memory."""

from kucomms._run import get_include, run
from kucomms.endpoint import Endpoint, connect
from kucomms.exceptions import (
    AddressError,
    AddressInUseError,
    BusyError,
    ChannelTakenError,
    ClosedError,
    HeaderValueError,
    KucommsError,
    MessageTooLargeError,
    NoSuchChannelError,
    NotReadyError,
    OutOfTurnError,
    PeerClosedError,
    PoolFull,
    ProtocolError,
    QueueEmpty,
    QueueFull,
    ShutdownError,
    TransportError,
    UsageError,
    VersionError,
)
from kucomms.link import Link
from kucomms.message import Message, Token
from kucomms.pool import Buffer, Completion, Pool, open_pool
from kucomms.statistics import EndpointStatistics, LinkStatistics, PoolStatistics
from kucomms.transports.base import Listener, Peer

__all__ = [
    "AddressError",
    "AddressInUseError",
    "Buffer",
    "BusyError",
    "ChannelTakenError",
    "ClosedError",
    "Completion",
    "Endpoint",
    "EndpointStatistics",
    "HeaderValueError",
    "KucommsError",
    "Link",
    "LinkStatistics",
    "Listener",
    "Message",
    "MessageTooLargeError",
    "NoSuchChannelError",
    "NotReadyError",
    "OutOfTurnError",
    "Peer",
    "PeerClosedError",
    "Pool",
    "PoolFull",
    "PoolStatistics",
    "ProtocolError",
    "QueueEmpty",
    "QueueFull",
    "ShutdownError",
    "Token",
    "TransportError",
    "UsageError",
    "VersionError",
    "connect",
    "get_include",
    "open_pool",
    "run",
]

__version__ = "0.1.0"
