# SPDX-License-Identifier: MIT
"""Who is at the other end of a Unix socket, and whether it is still alive.

End of file on a socket is no proof of life: a forked child of a dead process can hold
it open for ever. A pidfd refers to one process and becomes readable at its end.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct

from kucomms._core import os_error
from kucomms.exceptions import TransportError

__all__ = ["credentials", "listener_is_alive", "peer_pidfd"]

_SO_PEERPIDFD = 77  # asm-generic/socket.h, from Linux 6.5 on
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7)


def credentials(sock: socket.socket) -> tuple[int, int]:
    """Process and user id of the peer, as they were when it connected or listened."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _gid = _UCRED.unpack(data)
    return pid, uid & 0xFFFFFFFF


def peer_pidfd(sock: socket.socket, url: str) -> int:
    """A pidfd of the peer; the caller closes it.

    On kernels before 6.5 it is opened by number, and only something that the peer says
    after that proves that the number had not changed hands.
    """
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENODATA):  # it was reaped, or is of no process
            raise TransportError(
                errno.ESRCH, f"{url}: the process at the other side is gone already"
            ) from error
        if error.errno != errno.ENOPROTOOPT:
            raise _cannot_watch(url, error) from error
    try:
        return os.pidfd_open(credentials(sock)[0])
    except OSError as error:
        raise _cannot_watch(url, error) from error


def _cannot_watch(url: str, error: OSError) -> TransportError:
    return os_error(error.errno or 0, f"{url}: cannot watch the process at the other side")


def listener_is_alive(sock: socket.socket) -> bool:
    """Whether the process that called listen() at the other end still runs."""
    try:
        fd = peer_pidfd(sock, "")
    except TransportError as error:
        return error.errno != errno.ESRCH
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return not poll.poll(0)
    finally:
        os.close(fd)
