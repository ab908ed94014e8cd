# SPDX-License-Identifier: MIT
"""``shm://NAME``: an endpoint in another process of this machine.

Memory: a ``shm_open`` object for each link, made by the listening side, unlinked as
soon as it is open, and passed over the socket; for peers of other users a sealed memfd
of each side's own pages. Doorbell: an eventfd for each direction, and for peers of
other users, or that know no eventfds, a byte on the link's socket. The peer's life: end
of file on that socket, and a pidfd. How two processes meet is described in
``include/kucomms/rendezvous.h``.
"""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

from kucomms import _core, _log
from kucomms._core import (
    CLOSED,
    FULL,
    OK,
    PROTOCOL,
    drain_eventfd,
    drain_socket,
    lib,
    ring_socket,
)
from kucomms._log_limit import LogLimit
from kucomms._pool_memory import PAGE, PoolMemory, new_memory
from kucomms.exceptions import (
    BusyError,
    KucommsError,
    NotReadyError,
    ProtocolError,
    TransportError,
    UsageError,
    VersionError,
)
from kucomms.transports.base import (
    Address,
    Connection,
    ConnectOptions,
    Listener,
    ListenOptions,
    Peer,
)
from kucomms.transports.foreign_files import all_hang, close_files, close_socket
from kucomms.transports.peer_process import credentials, peer_pidfd
from kucomms.transports.runtime_directory import (
    BoundSocket,
    DirectoryLockedError,
    bind,
    connect_socket,
)

__all__ = ["transport"]

HANDSHAKE_TIMEOUT = 5.0
"""Seconds that a peer may take for its part of the rendezvous."""
HANDSHAKES = 256
"""Rendezvous that a listener has under way at once; more wait in the system's queue."""
LOCK_TIMEOUT = 5.0
"""Seconds that ``listen`` waits for others of our processes to be done with taking names."""

_RETRY_FIRST, _RETRY_LAST = 0.002, 0.05  # seconds between two looks for a listener
_RECORD_SIZE = len(_core.record_bytes(_core.new_record()))
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_VANISHED = (errno.ECONNRESET, errno.EPIPE, errno.ESRCH)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | 0x10
# 0x10: F_SEAL_FUTURE_WRITE, linux/fcntl.h, not in Python 3.11's fcntl
_SHM_PREFIX = "kucomms-"
_PIECE = 1 << 20
"""Bytes of memory that are allocated in one turn of the loop: about a millisecond's worth."""
_MAKERS = 4
"""Rendezvous of a listener that allocate at once, each a piece in each turn."""
_DECIDED = int(lib.KUCOMMS_FEATURE_TURNS)
"""Features that are in force when the listener was told so, and not when both sides know them."""
_SETUP_FILES = 3
"""Descriptors that come with a listener's answer at most: the memory and two doorbells."""
_POOL_STEPS = (lib.KUCOMMS_STEP_POOL, lib.KUCOMMS_STEP_MAPPED)
_RECORDS = 64
"""Of pools, that are read in one turn of the loop, and that may wait for the peer to read."""


class ShmConnection(Connection):
    """A link's socket, its pidfd, its eventfds if it has some, and its channel.

    ``bells``: the eventfds that are rung for us and for the peer. Takes over all of them.
    """

    def __init__(
        self,
        url: str,
        channel: _core.Channel,
        peer: Peer,
        sock: socket.socket,
        pidfd: int,
        bells: tuple[int, int] | None,
    ) -> None:
        super().__init__(url, channel, peer)
        self._pool_number = 0
        self._opening: dict[int, asyncio.Future[int]] = {}
        self._outbox: deque[tuple[bytes, list[int]]] = deque()
        self._sock: socket.socket | None = sock
        self._pidfd = pidfd
        self._bells = bells
        self._foreign = peer.uid != os.geteuid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken: Callable[[], None]
        self._gone: Callable[[KucommsError | None], None]

    def start(
        self, woken: Callable[[], None], gone: Callable[[KucommsError | None], None]
    ) -> None:
        assert self._sock is not None
        self._woken = woken
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self.channel.attach(self.ring if self._bells is None else self._bells[1])
        try:
            self._loop.add_reader(self._sock.fileno(), self._readable)
            self._loop.add_reader(self._pidfd, self._died)
            if self._bells is not None:
                self._loop.add_reader(self._bells[0], self._rung)
        except OSError as error:
            raise TransportError(
                error.errno, f"{self.url}: cannot watch the link: {error.strerror}"
            ) from error

    def ring(self) -> None:
        sock = self._sock
        if sock is not None:
            ring_socket(sock.fileno())  # that it is broken, its reader will see

    def _rung(self) -> None:
        if self._bells is not None:
            drain_eventfd(self._bells[0])
            self._woken()

    def _readable(self) -> None:
        """Read to the end of what is there.

        A peer that closes without having read our doorbells makes the socket report an
        error, and after that uvloop calls this once and never again.
        """
        if self._sock is None:
            return
        status = drain_socket(self._sock.fileno())
        try:
            if status == PROTOCOL and self.carries_buffers:
                status = self._read_records(self._sock)
        except ProtocolError as error:
            self._gone(error)
            return
        if self._sock is None:  # closed by what a record said
            return
        if status == CLOSED:
            self._gone(None)
        elif status == PROTOCOL:
            self._gone(self._nonsense())
        else:
            if status == FULL:
                assert self._loop is not None
                self._loop.call_soon(self._readable)
            self._woken()

    def _died(self) -> None:
        self._gone(None)

    def _nonsense(self) -> ProtocolError:
        return ProtocolError(
            f"{self.url}: the other side wrote nonsense into the link's socket; the link was closed"
        )

    # ---- pools ---------------------------------------------------------------

    async def open_pool(self, size: int, contiguous: bool = False) -> tuple[int, PoolMemory]:
        memory = await new_memory(size)
        try:
            number, self._pool_number = self.side + self._pool_number, self._pool_number + 2
            answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._opening[number] = answered
            try:
                self._send_later(
                    _record(lib.KUCOMMS_STEP_POOL, pool=number, ring_size=size), [memory.fd]
                )
                problem = await answered
            finally:
                self._opening.pop(number, None)
            if problem:
                raise _core.os_error(problem, f"{self.url}: the other side cannot map the pool")
            return number, memory
        except BaseException:
            self._outbox = deque(one for one in self._outbox if memory.fd not in one[1])
            memory.close()
            raise

    def _send_later(self, record: bytes, fds: list[int]) -> None:
        self._outbox.append((record, fds))
        self._flush()

    def _flush(self) -> None:
        """Send the records that wait for room in the socket."""
        sock = self._sock
        if sock is None:
            self._end_opening()
            return
        assert self._loop is not None
        self._loop.remove_writer(sock.fileno())
        while self._outbox:
            record, fds = self._outbox[0]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            try:
                sock.sendmsg([record], ancillary if fds else [], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._loop.add_writer(sock.fileno(), self._flush)
                return
            except OSError:  # its reader will see why
                return
            self._outbox.popleft()

    def _read_records(self, sock: socket.socket) -> int:
        """Read what is not doorbells. What ``drain_socket`` says after it.

        Raises ProtocolError.
        """
        for _ in range(_RECORDS):
            try:
                head = sock.recv(_RECORD_SIZE, socket.MSG_PEEK)
                bells = len(head) - len(head.lstrip(b"\1"))
                if bells:  # before a record with a file, at which ``drain_socket`` stops
                    sock.recv(bells)
                elif head:
                    self._read_record(sock)
            except (BlockingIOError, ConnectionResetError):
                pass  # as is said below
            if self._sock is None:
                return OK
            status = drain_socket(sock.fileno())
            if status != PROTOCOL:
                return status
        return FULL

    def _read_record(self, sock: socket.socket) -> None:
        fds: list[int] = []
        try:
            room = socket.CMSG_LEN(array.array("i").itemsize)
            data, ancillary, flags, _ = sock.recvmsg(_RECORD_SIZE, room, socket.MSG_CMSG_CLOEXEC)
            for _level, _kind, payload in ancillary:
                fds.extend(array.array("i", payload))
            if len(data) != _RECORD_SIZE or (flags & socket.MSG_CTRUNC and fds):
                raise self._nonsense()
            step = _core.new_record(data).step
            if step not in _POOL_STEPS:
                raise self._nonsense()
            record = _check_record(self.url, data, step)
            if step == lib.KUCOMMS_STEP_MAPPED:
                answered = self._opening.get(record.pool)
                if answered is None or answered.done() or fds:
                    raise self._nonsense()
                answered.set_result(record.status)
            else:
                # without a file: we have no descriptor left for it
                status = self._take_pool(record, fds[0]) if fds else errno.EMFILE
                if not fds and not flags & socket.MSG_CTRUNC:
                    raise self._nonsense()
                if len(self._outbox) > _RECORDS:
                    raise self._nonsense()  # it asks, and does not read the answers
                self._send_later(
                    _record(lib.KUCOMMS_STEP_MAPPED, pool=record.pool, status=status), []
                )
        finally:
            _close_all(fds)

    def _take_pool(self, record: Any, fd: int) -> int:
        """Map a pool of the peer's. 0 or an errno. Raises ProtocolError."""
        size = int(record.ring_size)
        try:
            if not size or size % PAGE:
                raise ValueError
            memory = PoolMemory.passed(fd, size)
        except (ValueError, OverflowError):
            raise ProtocolError(
                f"{self.url}: the other side did not pass the {size} bytes of sealed memory that "
                "it announced for a pool; the link was closed"
            ) from None
        except OSError as error:
            return error.errno or errno.ENOMEM
        status = errno.EPROTO
        try:
            status = self.pool_opened(int(record.pool), memory)
        finally:
            if status:
                memory.close()
        return status

    def _end_opening(self) -> None:
        for answered in self._opening.values():
            if not answered.done():
                answered.set_result(errno.ECONNRESET)

    def close(self) -> None:
        sock, self._sock = self._sock, None
        bells, self._bells = self._bells, None
        if sock is None:
            return
        self._outbox.clear()
        self._end_opening()
        self.channel.mute()
        # A forked child shares the loop's epoll: what it took out there, it took from us.
        if self._loop is not None and not self._loop.is_closed() and not self.channel.forked:
            self._loop.remove_reader(sock.fileno())
            self._loop.remove_writer(sock.fileno())
            self._loop.remove_reader(self._pidfd)
            if bells is not None:
                self._loop.remove_reader(bells[0])
        if self._foreign and not self.channel.forked:
            close_socket(sock)
        else:
            sock.close()
        _close_all([self._pidfd, *(bells or ())])


# ---- the records of the rendezvous ------------------------------------------


def _record(step: int, *, hello: bytes = b"", **fields: int) -> bytes:
    record = _core.new_record()
    record.magic = lib.KUCOMMS_MAGIC
    record.version = lib.KUCOMMS_ABI_VERSION
    record.step = step
    record.hello_length = len(hello)
    record.hello[0 : len(hello)] = hello
    for name, value in fields.items():
        setattr(record, name, value)
    return _core.record_bytes(record)


def _check_record(url: str, data: bytes, step: int) -> Any:
    record = _core.new_record(data)
    if record.magic != lib.KUCOMMS_MAGIC:
        raise ProtocolError(f"{url}: what answers at this socket is no kucomms")
    if record.version != lib.KUCOMMS_ABI_VERSION or record.features & ~lib.KUCOMMS_FEATURES:
        raise VersionError(
            f"{url}: the other side speaks version {record.version} of the kucomms ABI, with "
            f"features {record.features:#x}; this is version {lib.KUCOMMS_ABI_VERSION}. Use the "
            "same version on both sides"
        )
    if (
        record.step != step
        or (record.pool and step not in _POOL_STEPS)
        or record.hello_length > lib.KUCOMMS_HELLO_MAX
        or record.flags & ~lib.KUCOMMS_RENDEZVOUS_FLAGS
    ):
        raise ProtocolError(f"{url}: the other side sent nonsense instead of its greeting")
    return record


def _check_offer(url: str, offered: int, needed: int) -> None:
    """Raises when the peer that connects does not know all features that are to be in force."""
    if needed & ~offered:
        raise VersionError(
            f"{url}: the links of this listener have turns, and the other side does not know those "
            "(its kucomms is older, or not complete); use the same version on both sides"
        )


def _known_features(own: bool) -> int:
    """Those that a link with a peer of our own user, or not, may have."""
    known = int(lib.KUCOMMS_FEATURES)
    # A pool is written by both sides, and what is read of it can change meanwhile.
    return known if own else known & ~int(lib.KUCOMMS_FEATURE_POOLS)


def _hello_of(record: Any) -> bytes:
    return bytes(record.hello[0 : record.hello_length])


def _is_ring_size(size: int) -> bool:
    """Whether a ring can have exactly this many bytes."""
    return 0 < size <= 1 << 32 and _core.ring_size_for(size) == size


async def _wait_readable(
    sock: socket.socket, pidfd: int, ended: asyncio.Future[None] | None
) -> bool:
    """Wait for the peer to say something; whether this is the last chance to hear it.

    That is so when it is dead, which shows only in the pidfd when a forked child of it
    holds the socket open, and when ``ended`` is done.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    last = False

    def readable() -> None:
        if not ready.done():
            ready.set_result(None)

    def over(_ended: object = None) -> None:
        nonlocal last
        last = True
        readable()

    try:
        loop.add_reader(sock.fileno(), readable)
        loop.add_reader(pidfd, over)
        if ended is not None:
            ended.add_done_callback(over)
        await ready
    finally:
        loop.remove_reader(sock.fileno())
        loop.remove_reader(pidfd)
        if ended is not None:
            ended.remove_done_callback(over)
    return last


async def _receive_record(
    url: str,
    sock: socket.socket,
    pidfd: int,
    step: int,
    fds: list[int],
    *,
    most: int,
    own: bool = False,
    ended: asyncio.Future[None] | None = None,
) -> Any:
    """The next record, and in ``fds`` the descriptors that came with it, at most so many.

    More are never taken, nor dropped: see ``foreign_files``. Those that are taken are held
    before the record's part is, so that this does not drop the last hold on them.
    ``own``: the peer is of our own user, and the file of a pool may follow the record, for
    which MSG_PEEK would take it. ``ended``: when it is done, only what has arrived already is
    taken.
    """
    data = b""
    last = False
    item = array.array("i").itemsize
    peek = 0 if own else socket.MSG_PEEK
    while len(data) < _RECORD_SIZE:
        room = most - len(fds)
        # CMSG_SPACE would have room for one more, where that aligns it.
        space = socket.CMSG_LEN(item * room) if room else 0
        try:
            part, ancillary, flags, _address = sock.recvmsg(
                _RECORD_SIZE - len(data), space, peek | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            if last:
                raise _dropped(url, errno.ECONNRESET) from None
            last = await _wait_readable(sock, pidfd, ended)
            continue
        except OSError as error:
            raise _dropped(url, error.errno) from error
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                passed = array.array("i")
                passed.frombytes(payload[: len(payload) - len(payload) % item])
                fds.extend(passed)
        if flags & socket.MSG_CTRUNC:
            if len(fds) == most:
                raise ProtocolError(f"{url}: the other side passed files that nobody asked for")
            raise _core.os_error(errno.EMFILE, f"{url}: no descriptor for the link's memory")
        if not part:
            raise _dropped(url, errno.ECONNRESET)
        try:
            data += sock.recv(len(part)) if peek else part
        except OSError as error:
            raise _dropped(url, error.errno) from error
    return _check_record(url, data, step)


def _check_there(url: str, sock: socket.socket) -> None:
    """Raises when the peer has hung up. Takes nothing of what it has sent."""
    try:
        if sock.recv(1, socket.MSG_PEEK):
            return
    except BlockingIOError:
        return
    except OSError as error:
        if error.errno not in _VANISHED:
            return  # who cannot look will see it later
        raise _dropped(url, error.errno) from error
    raise _dropped(url, errno.ECONNRESET)


def _dropped(url: str, number: int | None) -> TransportError:
    return TransportError(number, f"{url}: the other side dropped the link while it was set up")


def _send_record(url: str, sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send a record; a new socket has room for it."""
    ancillary = []
    if fds:
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)))
    try:
        sent = sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
    except OSError as error:
        raise _dropped(url, error.errno) from error
    if sent != len(data):
        raise TransportError(errno.EAGAIN, f"{url}: the other side does not read its socket")


# ---- doorbells --------------------------------------------------------------


@cache
def _eventfds_work() -> bool:
    """Whether an eventfd can be read without ever blocking; a sandbox may forbid how."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        return drain_eventfd(fd) == errno.EAGAIN
    finally:
        os.close(fd)


def _new_bells(fds: list[int]) -> tuple[int, int]:
    """Two eventfds, also added to ``fds``: rung for the listener, for the connecting side."""
    for _ in range(2):
        fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    return fds[-2], fds[-1]


def _check_bells(url: str, fds: list[int]) -> tuple[int, int]:
    """The two eventfds that were passed after the memory, in the order of ``_new_bells``."""
    bells = fds[1:]
    if len(bells) != 2 or any(
        os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]" for fd in bells
    ):
        raise ProtocolError(f"{url}: the other side did not pass the two eventfds it announced")
    return bells[0], bells[1]


# ---- memory -----------------------------------------------------------------


def _sweep() -> None:
    """Remove what a process left that was killed between making and unlinking.

    An object under its name is never in use: its maker holds a descriptor already and
    would unlink it next. So whatever is there may go, whoever is doing what.
    """
    ours = f"{_SHM_PREFIX}{os.geteuid()}-"
    with suppress(OSError):
        for name in os.listdir("/dev/shm"):  # noqa: S108 - where shm_open puts them
            if name.startswith(ours):
                with suppress(OSError):
                    _core.shm_unlink("/" + name)


async def _new_memory(url: str, size: int, sealed: bool, go_on: Callable[[], None]) -> int:
    """A descriptor of ``size`` bytes that are really there.

    Taken piece by piece, with a turn of the loop between: a peer that asks for much, and
    again, must not hold up the others. ``go_on`` is called before each piece, and raises
    when nobody wants the memory any more.
    """
    try:
        if sealed:
            fd = os.memfd_create("kucomms", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        else:
            name = f"/{_SHM_PREFIX}{os.geteuid()}-{os.getpid()}-{secrets.token_hex(16)}"
            fd = _core.shm_create(name)
            _core.shm_unlink(name)
        try:
            for at in range(0, size, _PIECE):
                if at:
                    await asyncio.sleep(0)
                go_on()
                # Without it a full file system would show as SIGBUS at the first touch.
                os.posix_fallocate(fd, at, min(_PIECE, size - at))
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        if isinstance(error, KucommsError):
            raise
        number = error.errno or 0
        if number in _NO_DESCRIPTORS:
            raise _core.os_error(number, f"{url}: no descriptor for the link's memory") from error
        raise TransportError(
            number,
            f"{url}: no {size} bytes of shared memory: {error.strerror}; use a smaller "
            "ring_size or make room in /dev/shm",
        ) from error
    return fd


def _check_memory(url: str, fds: list[int], size: int, sealed: bool) -> int:
    """The one descriptor that was passed, if it is what was agreed on."""
    if sealed and len(fds) == 1:  # before anything that a file of theirs could hold up
        try:
            seals = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS)
        except OSError:
            seals = 0
        if seals & _SEALS != _SEALS:
            raise ProtocolError(
                f"{url}: the other user's memory is not sealed against being changed under us"
            )
    if len(fds) != 1 or os.fstat(fds[0]).st_size != size:
        raise ProtocolError(
            f"{url}: the other side did not pass the {size} bytes of memory that it announced"
        )
    return fds[0]


def _seal(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()


def _hang_up(sock: socket.socket, uid: int) -> None:
    if uid != os.geteuid():
        close_socket(sock)
    else:
        sock.close()


# ---- listening --------------------------------------------------------------


class ShmListener(Listener):
    """One or two listening sockets, and the rendezvous that are under way."""

    def __init__(
        self,
        address: Address,
        options: ListenOptions,
        accept: Callable[[Connection], None],
        links: Callable[[], int],
    ) -> None:
        super().__init__(address.url)
        self._options = options
        self._accept = accept
        self._links = links
        self._loop = asyncio.get_running_loop()
        self._sockets: list[BoundSocket] = []
        self._handshakes: set[asyncio.Task[None]] = set()
        self._watched: set[BoundSocket] = set()
        self._refusing = False  # it was logged that nobody can be accepted
        self._refusals = LogLimit()  # of single peers: anybody may knock
        self._promised = 0  # links that are being set up
        self._making = asyncio.Semaphore(_MAKERS)
        self._pid = os.getpid()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        _sweep()
        try:
            self._sockets.append(bind(address.url, address.name, shared=False))
            if options.allow:
                self._sockets.append(bind(address.url, address.name, shared=True))
            self._watch(True)
        except BaseException as error:
            self._close_sockets()
            if isinstance(error, OSError) and not isinstance(error, KucommsError):
                raise TransportError(
                    error.errno, f"{self.url}: cannot listen: {error.strerror}"
                ) from error
            raise

    def _watch(self, on: bool, *only: BoundSocket) -> None:
        for bound in only or self._sockets:
            if on and bound not in self._watched:
                self._loop.add_reader(bound.sock.fileno(), self._incoming, bound)
                self._watched.add(bound)
            elif not on and bound in self._watched:
                self._watched.remove(bound)
                self._loop.remove_reader(bound.sock.fileno())

    def _incoming(self, bound: BoundSocket) -> None:
        for _ in range(HANDSHAKES):
            if len(self._handshakes) >= HANDSHAKES:
                self._watch(False)
                return
            if bound.shared and all_hang():
                self._watch(False, bound)
                self._loop.call_later(0.1, self._look_again)
                return
            try:
                sock, _address = bound.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptor or memory left. The peers wait in the system's queue;
                # look again when something may have been given back.
                if not self._refusing:
                    self._refusing = True
                    what = f"{self.url}: cannot accept more links, so they wait"
                    reason = _core.os_error(error.errno or 0, what)
                    _log.warning("cannot_accept", url=self.url, error=str(reason))
                self._watch(False)
                self._loop.call_later(0.1, self._look_again)
                return
            self._refusing = False
            sock.setblocking(False)
            try:
                pid, uid = credentials(sock)
            except OSError as error:
                _hang_up(sock, -1)  # of whomever
                self._log_refused(f"{self.url}: who it is cannot be told: {error}")
                continue
            if uid != os.geteuid() and uid not in self._options.allow:
                self._refuse(sock, lib.KUCOMMS_REFUSED_USER)
                _hang_up(sock, uid)
                self._log_refused(f"{self.url}: user {uid} is not allowed")
                continue
            task = self._loop.create_task(
                self._welcome(sock, pid, uid), name=f"kucomms {self.url}"
            )
            self._handshakes.add(task)
            task.add_done_callback(partial(self._welcomed, sock, uid))

    def _look_again(self) -> None:
        if not self._sockets:
            return
        try:
            self._watch(True)
        except OSError:  # still none left
            self._watch(False)
            self._loop.call_later(0.1, self._look_again)

    def _welcomed(self, sock: socket.socket, uid: int, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        if task.cancelled():
            _hang_up(sock, uid)  # the task may not even have begun
        if len(self._handshakes) < HANDSHAKES:
            self._look_again()
        if not task.cancelled() and task.exception() is not None:
            self._loop.call_exception_handler(
                {"message": f"{self.url}: rendezvous failed", "exception": task.exception()}
            )

    async def _welcome(self, sock: socket.socket, pid: int, uid: int) -> None:
        """One peer's rendezvous. A bad peer is dropped and disturbs nobody."""
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                connection = await self._rendezvous(sock, pid, uid)
            self._accept(connection)
        except (KucommsError, TimeoutError) as error:
            _hang_up(sock, uid)
            # One who only looked whether somebody is there, or died, was not refused.
            if not isinstance(error, TransportError) or error.errno not in _VANISHED:
                self._log_refused(str(error) or "it said nothing")
        except BaseException:
            _hang_up(sock, uid)
            raise

    def _log_refused(self, error: str) -> None:
        """Log it, unless one was a moment ago; ``others``: how many were not logged since."""
        if self._refusals.due():
            others = {"others": self._refusals.skipped} if self._refusals.skipped else {}
            _log.warning("peer_refused", url=self.url, error=error, **others)
            self._refusals.logged()

    async def _rendezvous(self, sock: socket.socket, pid: int, uid: int) -> ShmConnection:
        url = self.url
        fds: list[int] = []
        pidfd = -1
        half = None
        promised = 0
        try:
            own = uid == os.geteuid()
            pidfd = peer_pidfd(sock, url)
            try:
                wanted = await _receive_record(
                    url, sock, pidfd, lib.KUCOMMS_STEP_HELLO, [], most=0, ended=self._ended
                )
                _check_offer(url, wanted.features, self._options.features)
            except VersionError:
                self._refuse(sock, lib.KUCOMMS_REFUSED_VERSION)
                raise
            if wanted.ring_size > 1 << 32:
                raise ProtocolError(f"{url}: the other side sent nonsense as its greeting")
            if self._links() + self._promised >= self._options.max_links:
                self._refuse(sock, lib.KUCOMMS_REFUSED_BUSY)
                raise BusyError(f"{url}: all links are taken")
            promised = 1
            self._promised += 1
            ring_size = self._options.agree(wanted.ring_size)
            side = _core.side_size(ring_size)
            try:
                async with self._making:
                    size = side if not own else 2 * side
                    go_on = partial(self._check_wanted, sock)
                    fd = await _new_memory(url, size, sealed=not own, go_on=go_on)
                    fds.append(fd)
                features = self._options.features
                features |= int(wanted.features) & _known_features(own) & ~_DECIDED
                half = _core.HalfChannel(url, 0, ring_size, fd, 0, features)
                if not own:
                    _seal(fd)
            except OSError as error:
                # For want of descriptors it is dropped, as when it could not be accepted.
                if error.errno not in (*_NO_DESCRIPTORS, *_VANISHED):
                    self._refuse(sock, lib.KUCOMMS_REFUSED_MEMORY)
                raise
            flags = 0 if own else lib.KUCOMMS_SEALED
            bells = None
            if own and wanted.flags & lib.KUCOMMS_EVENTFDS and _eventfds_work():
                flags |= lib.KUCOMMS_EVENTFDS
                bells = _new_bells(fds)
            _send_record(
                url,
                sock,
                _record(
                    lib.KUCOMMS_STEP_SETUP,
                    hello=self._options.hello,
                    ring_size=ring_size,
                    flags=flags,
                    features=features,
                ),
                fds,
            )
            channel = await self._attached(sock, pidfd, half, fd, side, own)
            peer = Peer(pid=pid, uid=uid, hello=_hello_of(wanted))
            connection = ShmConnection(url, channel, peer, sock, pidfd, bells)
            connection.side = 0
            connection.carries_buffers = bool(features & lib.KUCOMMS_FEATURE_POOLS)
            pidfd = -1
            del fds[1:]  # the bells, which are the connection's
            return connection
        except OSError as error:
            if isinstance(error, KucommsError):
                raise
            raise _core.os_error(error.errno or 0, f"{url}: cannot set up the link") from error
        finally:
            self._promised -= promised  # it is made now, in the same turn of the loop, or not
            _close_all(fds)
            if half is not None:
                half.close()
            if pidfd >= 0:
                os.close(pidfd)

    async def _attached(
        self,
        sock: socket.socket,
        pidfd: int,
        half: _core.HalfChannel,
        fd: int,
        side: int,
        own: bool,
    ) -> _core.Channel:
        """The channel, when the peer has answered; which proves that the pidfd is its."""
        passed: list[int] = []
        try:
            await _receive_record(
                self.url,
                sock,
                pidfd,
                lib.KUCOMMS_STEP_ATTACH,
                passed,
                most=0 if own else 1,
                own=own,
                ended=self._ended,
            )
            if own:
                return half.attach(fd, side)
            theirs = _check_memory(self.url, passed, side, sealed=True)
            return half.attach(theirs, 0)
        finally:
            close_files(passed)

    def _check_wanted(self, sock: socket.socket) -> None:
        """Raises when nobody waits for our answer any more."""
        _check_there(self.url, sock)
        if self.closed:
            raise _dropped(self.url, errno.ECONNRESET)

    def _refuse(self, sock: socket.socket, status: int) -> None:
        known = int(lib.KUCOMMS_FEATURES)
        record = _record(lib.KUCOMMS_STEP_SETUP, status=status, features=known)
        with suppress(TransportError):
            _send_record(self.url, sock, record)

    def _close_sockets(self) -> None:
        self._watch(False)
        for bound in self._sockets:
            bound.close()
        self._sockets.clear()

    async def aclose(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                f"{self.url}: this listener was made before a fork and cannot be closed in the "
                "child; it belongs to the parent"
            )
        self.closed = True
        self._close_sockets()
        if not self._ended.done():
            self._ended.set_result(None)
        # A peer that has finished its part has a link already, and keeps it.
        if self._handshakes:
            await asyncio.wait(self._handshakes)
        if self._refusals.skipped:
            _log.warning("peers_refused", url=self.url, others=self._refusals.skipped)
            self._refusals.logged()


# ---- connecting -------------------------------------------------------------


async def _find_socket(address: Address, options: ConnectOptions) -> socket.socket:
    """A socket connected to the listener; waits for one to appear."""
    delay = _RETRY_FIRST
    while True:
        sock = connect_socket(address.url, address.name, options.owner)
        if sock is not None:
            return sock
        if options.timeout is not None and options.timeout <= 0:
            raise _nobody(address)
        await asyncio.sleep(delay)
        delay = min(2 * delay, _RETRY_LAST)


async def _attach(
    address: Address, options: ConnectOptions, sock: socket.socket
) -> ShmConnection:
    """The connecting side's part of the rendezvous."""
    url = address.url
    fds: list[int] = []
    pidfd = -1
    half = None
    foreign = False
    try:
        pid, uid = credentials(sock)
        expected = os.geteuid() if options.owner is None else options.owner
        if uid != expected:
            raise TransportError(
                errno.EPERM,
                f"{url}: the listener is of user {uid}, not {expected}; give owner={uid} if "
                "that is meant",
            )
        pidfd = peer_pidfd(sock, url)
        foreign = uid != os.geteuid()
        known = _known_features(own=not foreign)
        hello = _record(
            lib.KUCOMMS_STEP_HELLO,
            features=known,
            hello=options.hello,
            ring_size=options.ring_size,
            flags=lib.KUCOMMS_EVENTFDS if _eventfds_work() else 0,
        )
        try:
            _send_record(url, sock, hello)
        except TransportError as error:
            # One who is not allowed is refused at sight: the answer may be there already.
            if error.errno not in _VANISHED:
                raise
        # This answer proves that the pidfd is the peer's.
        most = 1 if foreign else _SETUP_FILES
        setup = await _receive_record(url, sock, pidfd, lib.KUCOMMS_STEP_SETUP, fds, most=most)
        _check_status(url, setup.status)
        features = int(setup.features)
        if features & ~known:
            raise ProtocolError(
                f"{url}: the listener answers with features {features:#x}, and asked for were "
                f"{known:#x}"
            )
        ring_size = int(setup.ring_size)
        if not _is_ring_size(ring_size):
            raise ProtocolError(f"{url}: the other side says that the ring has {ring_size} bytes")
        limit = options.most(own=not foreign)
        if ring_size > limit:
            raise ProtocolError(
                f"{url}: the listener answers with {ring_size} bytes of ring, and {limit} are the "
                "most that we take; if you want more, give connect() a ring_size"
            )
        side = _core.side_size(ring_size)
        sealed = bool(setup.flags & lib.KUCOMMS_SEALED)
        if foreign and not sealed:
            raise ProtocolError(f"{url}: another user's listener must offer sealed memory")
        bells = None
        if setup.flags & lib.KUCOMMS_EVENTFDS and not sealed:
            theirs_rung, ours_rung = _check_bells(url, fds)
            bells = ours_rung, theirs_rung
        theirs = _check_memory(
            url, fds[:1] if bells else fds, side if sealed else 2 * side, sealed
        )
        mine = []
        if sealed:
            go_on = partial(_check_there, url, sock)
            mine = [await _new_memory(url, side, sealed=True, go_on=go_on)]
            fds.extend(mine)
            half = _core.HalfChannel(url, 1, ring_size, mine[0], 0, features)
            _seal(mine[0])
        else:
            half = _core.HalfChannel(url, 1, ring_size, theirs, side, features)
        channel = half.attach(theirs, 0)
        attach = _record(lib.KUCOMMS_STEP_ATTACH, ring_size=ring_size, features=features)
        _send_record(url, sock, attach, mine)
        peer = Peer(pid=pid, uid=uid, hello=_hello_of(setup))
        connection = ShmConnection(url, channel, peer, sock, pidfd, bells)
        connection.carries_buffers = bool(features & lib.KUCOMMS_FEATURE_POOLS)
        pidfd = -1
        if bells:
            del fds[1:]  # they are the connection's now
        return connection
    except OSError as error:
        if isinstance(error, KucommsError):
            raise
        raise _core.os_error(error.errno or 0, f"{url}: cannot set up the link") from error
    finally:
        (close_files if foreign else _close_all)(fds)
        if half is not None:
            half.close()
        if pidfd >= 0:
            os.close(pidfd)


def _check_status(url: str, status: int) -> None:
    if status == lib.KUCOMMS_REFUSED_BUSY:
        raise BusyError(f"{url}: the listener has all the links that it takes; try again later")
    if status == lib.KUCOMMS_REFUSED_VERSION:
        raise VersionError(
            f"{url}: the listener does not speak version {lib.KUCOMMS_ABI_VERSION} of the kucomms "
            "ABI, or its links have features that this side does not know; use the same version on "
            "both sides"
        )
    if status == lib.KUCOMMS_REFUSED_MEMORY:
        raise TransportError(
            errno.ENOSPC,
            f"{url}: the listener has no memory for the rings; ask for a smaller ring_size, or "
            "make room in /dev/shm",
        )
    if status == lib.KUCOMMS_REFUSED_USER:
        raise TransportError(
            errno.EACCES,
            f"{url}: the listener does not allow user {os.geteuid()}; it has to name it in "
            "listen(..., allow=...)",
        )
    if status != lib.KUCOMMS_ACCEPTED:
        raise ProtocolError(f"{url}: the listener answered with the unknown status {status}")


class ShmTransport:
    """See the module."""

    async def listen(
        self,
        address: Address,
        options: ListenOptions,
        accept: Callable[[Connection], None],
        links: Callable[[], int],
    ) -> Listener:
        give_up = asyncio.get_running_loop().time() + LOCK_TIMEOUT
        while True:
            try:
                return ShmListener(address, options, accept, links)
            except DirectoryLockedError:
                if asyncio.get_running_loop().time() > give_up:
                    raise
            await asyncio.sleep(_RETRY_LAST)

    async def connect(self, address: Address, options: ConnectOptions) -> Connection:
        loop = asyncio.get_running_loop()
        once = options.timeout is not None and options.timeout <= 0
        uid = os.geteuid() if options.owner is None else options.owner
        give_up = None if options.timeout is None else loop.time() + options.timeout
        silent = None
        while True:
            try:
                async with asyncio.timeout_at(None if once else give_up):
                    sock = await _find_socket(address, options)
            except TimeoutError as error:
                if isinstance(error, KucommsError):
                    raise
                raise _nobody(address) from silent
            try:
                limit = loop.time() + HANDSHAKE_TIMEOUT if once else give_up
                async with asyncio.timeout_at(limit):
                    return await _attach(address, options, sock)
            except TransportError as error:
                _hang_up(sock, uid)
                # The listener went between accepting and greeting: as if it had not been.
                if error.errno not in _VANISHED:
                    raise
                if once:
                    raise _nobody(address) from error
                silent = error
            except TimeoutError as error:
                _hang_up(sock, uid)
                if isinstance(error, KucommsError):
                    raise
                raise NotReadyError(
                    f"{address.url}: somebody listens there, but says nothing; is the loop of "
                    "the listener blocked?"
                ) from None
            except BaseException:
                _hang_up(sock, uid)
                raise
            try:
                async with asyncio.timeout_at(give_up):
                    await asyncio.sleep(_RETRY_LAST)
            except TimeoutError:
                raise _nobody(address) from silent


def _nobody(address: Address) -> NotReadyError:
    return NotReadyError(
        f"{address.url}: nobody listens there; start the listener, or give connect() a longer "
        "timeout"
    )


transport = ShmTransport()
