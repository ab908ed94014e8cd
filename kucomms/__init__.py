# SPDX-License-Identifier: MIT
"""Asyncio message endpoints over in-process, shared and kernel memory."""

from kucomms._run import get_include, run
from kucomms.endpoint import Endpoint, connect
from kucomms.exceptions import (
    AddressError,
    AddressInUseError,
    BusyError,
    ClosedError,
    HeaderValueError,
    KucommsError,
    MessageTooLargeError,
    NotReadyError,
    PeerClosedError,
    ProtocolError,
    QueueEmpty,
    QueueFull,
    ShutdownError,
    TransportError,
    UsageError,
    VersionError,
)
from kucomms.link import Link
from kucomms.message import Message
from kucomms.statistics import EndpointStatistics, LinkStatistics
from kucomms.transports.base import Listener, Peer

__all__ = [
    "AddressError",
    "AddressInUseError",
    "BusyError",
    "ClosedError",
    "Endpoint",
    "EndpointStatistics",
    "HeaderValueError",
    "KucommsError",
    "Link",
    "LinkStatistics",
    "Listener",
    "Message",
    "MessageTooLargeError",
    "NotReadyError",
    "Peer",
    "PeerClosedError",
    "ProtocolError",
    "QueueEmpty",
    "QueueFull",
    "ShutdownError",
    "TransportError",
    "UsageError",
    "VersionError",
    "connect",
    "get_include",
    "run",
]

__version__ = "0.1.0"
