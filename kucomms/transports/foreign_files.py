# SPDX-License-Identifier: MIT
"""Giving back files of other users without waiting for them.

To close a file, or to drop one that was passed and not taken, can block for as long as its
owner likes: his own file system does not answer, or a TCP socket lingers. So such a file
is given back by a thread, which may hang; there are a few of them, and who would need one
more has to wait.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

__all__ = ["all_hang", "close_files", "close_socket"]

_THREADS = 16
"""That hang, before no more peers of other users are let in."""
_LOOKS = 64
"""Parts of what is unread that are looked at before a socket is closed."""

_NAME = "kucomms closes a file"


def all_hang() -> bool:
    """Whether there are as many threads as there should be."""
    return sum(thread.name == _NAME for thread in threading.enumerate()) >= _THREADS


def _apart(close: Callable[[], None]) -> None:
    """Call it in a thread that nobody waits for, not even the end of the process."""
    try:
        threading.Thread(target=close, name=_NAME, daemon=True).start()
    except RuntimeError:  # no more threads
        close()


def close_files(fds: list[int]) -> None:
    """Close what was passed by a peer of another user."""
    for fd in fds:
        try:
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # only memory has such
        except OSError:
            _apart(lambda fd=fd: os.close(fd))  # type: ignore[misc]
        else:
            os.close(fd)
    fds.clear()


def close_socket(sock: socket.socket) -> None:
    """Close a connection of another user, with all that is in it."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # after it, nothing more can come
    if _holds_files(sock):
        _apart(sock.close)
    else:
        sock.close()


def _holds_files(sock: socket.socket) -> bool:
    """Whether there is, or may be, a file in what is unread; takes what is before it."""
    try:
        for _ in range(_LOOKS):
            part, _none, flags, _address = sock.recvmsg(1 << 16, 0, socket.MSG_PEEK)
            if flags & socket.MSG_CTRUNC:
                return True
            if not part:
                return False
            sock.recv(len(part))
    except OSError:  # empty, and broken
        return False
    return True
