# SPDX-License-Identifier: MIT
"""The directory where processes of one machine find each other's sockets.

Of our own user: ``$XDG_RUNTIME_DIR/kucomms``, or ``/tmp/kucomms-UID``, mode 0700. For
listeners that allow other users as well: ``/tmp/kucomms-UID-shared``, mode 0711.

The directory is opened, checked by its descriptor, and used through
``/proc/self/fd``: so nobody can put another one in its place in between, and the
length of its path does not matter for the address of a socket. ``flock`` on it guards
the taking and giving up of names.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from kucomms._core import os_error
from kucomms.exceptions import AddressInUseError, TransportError
from kucomms.transports.peer_process import listener_is_alive

__all__ = [
    "BoundSocket",
    "DirectoryLockedError",
    "bind",
    "connect_socket",
    "private_path",
    "shared_path",
]

_BACKLOG = 1024
_SHARED_MODE = 0o711
_PATIENCE = 0.02
"""Seconds that we stand still at most for others to be done with the directory."""


def private_path() -> str:
    """The directory for our own user."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        return os.path.join(runtime, "kucomms")
    return f"/tmp/kucomms-{os.geteuid()}"  # noqa: S108 - opened without following, checked


def shared_path(uid: int) -> str:
    """The directory in which the listeners of user ``uid`` meet other users."""
    return f"/tmp/kucomms-{uid}-shared"  # noqa: S108 - opened without following, checked


def _open(url: str, path: str, uid: int, shared: bool) -> int:
    """A descriptor of the directory, checked. Raises FileNotFoundError, TransportError."""
    # That of another user we can pass through, not read.
    access = os.O_RDONLY if uid == os.geteuid() else os.O_PATH
    try:
        fd = os.open(path, access | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            about = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
    except FileNotFoundError:
        raise
    except OSError as error:
        raise os_error(error.errno or 0, f"{url}: cannot open the directory {path}") from error
    forbidden = stat.S_IWGRP | stat.S_IWOTH if shared else stat.S_IRWXG | stat.S_IRWXO
    if about.st_uid != uid or about.st_mode & forbidden:
        os.close(fd)
        raise TransportError(
            errno.EPERM,
            f"{url}: the directory {path} must belong to user {uid} and be "
            f"{'writable' if shared else 'accessible'} by nobody else; remove it or mend it",
        )
    return fd


def _make(url: str, path: str, shared: bool) -> int:
    """As ``_open``, for our own user, made if it is missing."""
    while True:
        with suppress(FileNotFoundError):
            return _open(url, path, os.geteuid(), shared)
        try:
            os.mkdir(path, _SHARED_MODE if shared else 0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise os_error(error.errno or 0, f"{url}: cannot make the directory {path}") from error


@contextmanager
def _locked(url: str, path: str, shared: bool) -> Iterator[int]:
    """The directory, made if it is missing, locked against others who take names.

    Raises DirectoryLockedError when it stays locked: others hold it for a few system calls
    only, but may be stopped meanwhile, and this loop must not stop with them.
    """
    give_up = time.monotonic() + _PATIENCE
    while True:
        fd = _make(url, path, shared)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > give_up:
                    raise DirectoryLockedError(
                        errno.EWOULDBLOCK,
                        f"{url}: another process keeps the directory {path} locked; is one of "
                        "yours stopped in the middle of listening? Let it go on, or kill it",
                    ) from error
                time.sleep(0.001)
                continue
            if _is_at(fd, path):
                if shared:
                    _let_others_pass(url, path, fd)
                yield fd
                return
        finally:
            os.close(fd)


def _let_others_pass(url: str, path: str, fd: int) -> None:
    """Not only when it is made: the umask may have kept them out, or somebody since."""
    try:
        if stat.S_IMODE(os.fstat(fd).st_mode) != _SHARED_MODE:
            os.fchmod(fd, _SHARED_MODE)
    except OSError as error:
        raise os_error(
            error.errno or 0, f"{url}: cannot let others pass through {path}"
        ) from error


class DirectoryLockedError(TransportError):
    """Another process holds the lock of the directory, for longer than it ever should."""


def _is_at(fd: int, path: str) -> bool:
    """Whether the directory was not removed while we waited for its lock."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(fd))


def _address(directory: int, name: str) -> str:
    return f"/proc/self/fd/{directory}/{name}"


class BoundSocket:
    """A listening socket and the name that it holds."""

    def __init__(
        self, url: str, path: str, name: str, shared: bool, sock: socket.socket,
        about: os.stat_result,
    ) -> None:
        self.sock = sock
        self._url = url
        self._path = path
        self._name = name
        self.shared = shared
        self._about = about
        self._spare = os.dup(sock.fileno())

    def close(self) -> None:
        """Give the name up, unless somebody else has it by now; remove what is empty.

        If the directory stays locked, the name stays, and the next ``bind`` takes it over.
        """
        os.close(self._spare)  # so that there is one for the directory, if for nothing else
        with suppress(OSError, TransportError), _locked(self._url, self._path, self.shared) as fd:
            with suppress(FileNotFoundError):
                there = os.stat(self._name, dir_fd=fd, follow_symlinks=False)
                if os.path.samestat(there, self._about):
                    os.unlink(self._name, dir_fd=fd)
            os.rmdir(self._path)  # fails, rightly, when others are in it
        self.sock.close()


def bind(url: str, name: str, shared: bool) -> BoundSocket:
    """Listen at ``name``. Raises AddressInUseError when somebody alive has it.

    And DirectoryLockedError, after which to try again.
    """
    path = shared_path(os.geteuid()) if shared else private_path()
    with _locked(url, path, shared) as fd:
        address = _address(fd, name)
        try:
            taken = _check_socket(url, path, fd, name, os.geteuid()) and _is_taken(url, address)
        except FileNotFoundError:
            taken = False
        if taken:
            raise AddressInUseError(
                f"{url}: another process listens there already; stop it, or use another name"
            )
        sock = _new_socket(url)
        bound = False
        try:
            sock.bind(address)
            bound = True
            if shared:
                os.chmod(name, 0o666, dir_fd=fd)  # noqa: S103 - the peer's uid is checked
            sock.listen(_BACKLOG)
            about = os.stat(name, dir_fd=fd, follow_symlinks=False)
            return BoundSocket(url, path, name, shared, sock, about)
        except OSError as error:
            if bound:
                with suppress(OSError):
                    os.unlink(name, dir_fd=fd)
            sock.close()
            raise os_error(error.errno or 0, f"{url}: cannot listen in {path}") from error


def _new_socket(url: str) -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise os_error(error.errno or 0, f"{url}: no socket") from error


def _check_socket(url: str, path: str, directory: int, name: str, uid: int) -> bool:
    """True for a socket of this user. Raises FileNotFoundError, TransportError."""
    about = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if about.st_uid != uid or not stat.S_ISSOCK(about.st_mode):
        raise TransportError(
            errno.EPERM, f"{url}: {path}/{name} is not a socket of user {uid}; remove it"
        )
    return True


def _is_taken(url: str, address: str) -> bool:
    """Whether a living process listens; what a dead one left is removed."""
    with _new_socket(url) as probe:
        try:
            probe.connect(address)
        except FileNotFoundError:
            return False
        except ConnectionRefusedError:
            alive = False
        except OSError:  # EAGAIN: its queue is full
            alive = True
        else:
            # A forked child of a dead listener keeps the socket open, but does not serve.
            alive = listener_is_alive(probe)
    if not alive:
        with suppress(FileNotFoundError):
            os.unlink(address)
    return alive


def connect_socket(url: str, name: str, owner: int | None) -> socket.socket | None:
    """A socket connected to the listener, or None when there is none (yet)."""
    other = owner is not None and owner != os.geteuid()
    uid = owner if owner is not None else os.geteuid()
    path = shared_path(uid) if other else private_path()
    try:
        fd = _open(url, path, uid, other)
    except FileNotFoundError:
        return None
    try:
        address = _address(fd, name)
        sock = _new_socket(url)
        try:
            _check_socket(url, path, fd, name, uid)
            sock.connect(address)
        except TransportError:
            sock.close()
            raise
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            sock.close()
            return None
        except OSError as error:
            sock.close()
            raise os_error(error.errno or 0, f"{url}: cannot connect to {path}/{name}") from error
        return sock
    finally:
        os.close(fd)
