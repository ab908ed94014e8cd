# SPDX-License-Identifier: MIT
"""``kernel://NAME``: the endpoint that a kernel module has registered as ``kucomms_NAME``.

Where that one numbers its channels, ``kernel://NAME/3`` is one of them, and ``kernel://NAME``
the lowest that is free.

Memory: pages of the kernel module, mmapped from ``/dev/kucomms_NAME``; each open file is
a link. Doorbell: an ioctl there, and ``poll`` here. The kernel's life: ``POLLHUP``. The
device's ABI is described in ``include/uapi/linux/kucomms.h`` of the module.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections.abc import Callable
from typing import Any

from kucomms import _core
from kucomms._core import lib, ring_device
from kucomms._pool_memory import PoolMemory, check_room
from kucomms.exceptions import (
    AddressError,
    BusyError,
    ChannelTakenError,
    KucommsError,
    NoSuchChannelError,
    NotReadyError,
    ProtocolError,
    ShutdownError,
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

__all__ = ["KernelConnection", "device_path", "transport"]

_RETRY_FIRST, _RETRY_LAST = 0.002, 0.05  # seconds between two looks for a device
_ANSWER = 1.0  # seconds that the kernel endpoint has for its answer, even when time is up
_ABSENT = (errno.ENOENT, errno.ENXIO, errno.ENODEV)


def device_path(name: str) -> str:
    """The device of the endpoint ``name``."""
    return f"/dev/kucomms_{name}"


class KernelConnection(Connection):
    """An open device, its channel, and an epoll descriptor of its own.

    The device is watched edge-triggered: an event is one ring of the doorbell, and there
    is nothing to be taken back when nobody wants to hear more of it.
    """

    def __init__(
        self, url: str, channel: _core.Channel, peer: Peer, fd: int, epoll: select.epoll
    ) -> None:
        super().__init__(url, channel, peer)
        self._fd = fd
        self._epoll = epoll
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken: Callable[[], None]
        self._gone: Callable[[KucommsError | None], None]

    def start(
        self, woken: Callable[[], None], gone: Callable[[KucommsError | None], None]
    ) -> None:
        """See ``Connection.start``."""
        self._woken = woken
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self.channel.attach(self.ring)
        self._loop.add_reader(self._epoll.fileno(), self._readable)

    def ring(self) -> None:
        """See ``Connection.ring``."""
        fd = self._fd
        if fd >= 0:
            ring_device(fd)  # that it is over, its reader will see

    def _readable(self) -> None:
        if self._fd < 0:
            return
        events = 0
        for _fd, event in self._epoll.poll(0):
            events |= event
        if events & select.EPOLLERR:
            self._gone(
                ProtocolError(
                    f"{self.url}: the kernel module closed the link, because what this process "
                    "wrote into the shared ring is nonsense; something overwrites its memory"
                )
            )
        elif events & select.EPOLLHUP:
            self._gone(None)
        elif events:
            self._woken()

    # ---- pools ---------------------------------------------------------------

    async def open_pool(self, size: int, contiguous: bool = False) -> tuple[int, PoolMemory]:
        """See ``Connection.open_pool``."""
        if self._fd < 0:
            raise _core.os_error(errno.ESHUTDOWN, f"{self.url}: the link is closed")
        check_room(size)
        # A large one takes a while, and the link may be closed meanwhile.
        device = os.dup(self._fd)
        return await asyncio.get_running_loop().run_in_executor(
            None, _open_pool, self.url, device, size, contiguous
        )

    def close_pool(self, number: int) -> bool:
        """See ``Connection.close_pool``."""
        if self._fd >= 0:
            _core.ioctl_close_pool(self._fd, number)  # fails when all is over
        return True

    def map_pool(self, size: int, offset: int) -> PoolMemory:
        """See ``Connection.map_pool``."""
        try:
            return PoolMemory(self._fd, size, offset)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            # It was closed before we have read of it: nothing of it will ever come.
            return PoolMemory.create(size)

    def close(self) -> None:
        """See ``Connection.close``."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        # A forked child shares the loop's epoll: what it took out there, it took from us.
        if self._loop is not None and not self._loop.is_closed() and not self.channel.forked:
            self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        os.close(fd)


_NO_POOL = {
    errno.EDQUOT: "the kernel endpoint allows the pools of a link no more (max_pool_bytes); close "
    "one, open a smaller one, or load its module with a larger limit",
    errno.EPERM: "this user may lock no more memory (RLIMIT_MEMLOCK); open a smaller one, or raise "
    "that limit ('ulimit -l', or memlock in /etc/security/limits.conf)",
}


def _open_pool(url: str, device: int, size: int, contiguous: bool) -> tuple[int, PoolMemory]:
    """A new pool, mapped. Closes the descriptor. Raises OSError."""
    try:
        number, offset = _core.ioctl_open_pool(device, size, contiguous=contiguous)
        try:
            return number, PoolMemory(device, size, offset)
        except OSError:
            _core.ioctl_close_pool(device, number)
            raise
    except OSError as error:
        why = _NO_POOL.get(error.errno or 0)
        if why is None:
            raise
        what = f"{url}: cannot open a pool of {size} bytes"
        raise _core.os_error(error.errno or 0, what, why) from error
    finally:
        os.close(device)


def _open(address: Address) -> int:
    """The device's descriptor. Raises NotReadyError when there is none."""
    path = device_path(address.name)
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _ABSENT:
            raise NotReadyError(
                f"{address.url}: there is no device {path}; load the module (modprobe kucomms) "
                f"and make it with 'kucomms device create {address.name}', or give connect() a "
                "longer timeout"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise TransportError(
                error.errno,
                f"{address.url}: no right to open {path}; let root set its mode and group, with "
                f"'kucomms device create {address.name} --mode 0660 --group ...' or a udev rule",
            ) from error
        raise _core.os_error(error.errno or 0, f"{address.url}: cannot open {path}") from error


def _request(address: Address, options: ConnectOptions) -> Any:
    """The ``struct kucomms_setup`` that asks for such a link."""
    record = _core.new_setup()
    record.version = lib.KUCOMMS_ABI_VERSION
    record.features = lib.KUCOMMS_FEATURES
    record.ring_size = options.ring_size
    record.hello_length = len(options.hello)
    record.hello[0 : len(options.hello)] = options.hello
    if address.channel is not None:
        record.flags = lib.KUCOMMS_SETUP_NUMBER
        record.channel = address.channel
    return record


def _attach(url: str, device: int, record: Any) -> KernelConnection:
    """The link of a device that was set up, with a descriptor of its own.

    Raises VersionError, TransportError.
    """
    half = None
    epoll = None
    fd = -1
    ring_size = int(record.ring_size)
    features = int(record.features)
    try:
        if record.side_size != _core.side_size(ring_size) or features & ~lib.KUCOMMS_FEATURES:
            raise VersionError(
                f"{url}: the module lays its memory out otherwise than this version of kucomms; "
                "use the same version of both"
            )
        fd = os.dup(device)
        epoll = select.epoll()
        epoll.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        half = _core.HalfChannel(url, 1, ring_size, fd, int(record.side_offset[1]), features)
        channel = half.attach(fd, int(record.side_offset[0]))
    except BaseException as error:
        if half is not None:
            half.close()
        if epoll is not None:
            epoll.close()
        if fd >= 0:
            os.close(fd)
        if isinstance(error, OSError) and not isinstance(error, KucommsError):
            raise _core.os_error(error.errno or 0, f"{url}: cannot watch the device") from error
        raise
    hello = bytes(record.hello[0 : record.hello_length])
    numbered = bool(record.flags & lib.KUCOMMS_SETUP_NUMBER)
    peer = Peer(hello=hello, kernel=True, channel=int(record.channel) if numbered else None)
    connection = KernelConnection(url, channel, peer, fd, epoll)
    if features & lib.KUCOMMS_FEATURE_POOLS:
        connection.carries_buffers = True
        connection.contiguous_max = lib.KUCOMMS_POOL_CONTIGUOUS_MAX
    return connection


def _refused(address: Address, number: int, record: object) -> KucommsError:
    """The error for what KUCOMMS_IOC_SETUP said."""
    url = address.url
    if address.channel is not None:
        if number == errno.ECHRNG:
            return NoSuchChannelError(
                f"{url}: the kernel endpoint has no channel {address.channel}, or not yet; give "
                "connect() a longer timeout if it is going to be announced"
            )
        if number == errno.EADDRINUSE:
            return ChannelTakenError(
                f"{url}: somebody else has channel {address.channel}; have him close it, or take "
                f"any that is free with '{address.scheme}://{address.name}'"
            )
    if number == errno.ENOTCONN:
        return NotReadyError(
            f"{url}: the device is there, but no kernel module has registered its endpoint; load "
            "the module that does, or give connect() a longer timeout"
        )
    if number == errno.ESHUTDOWN:
        return ShutdownError(
            f"{url}: the kernel module went away while it was asked for a link; connect again "
            "when it is back, or give connect() a longer timeout"
        )
    if number == errno.EDQUOT:
        return BusyError(
            f"{url}: this user has all the links that the kernel endpoint gives one user "
            "(max_user_channels); close one, or load its module with a larger limit"
        )
    if number == errno.EBUSY:
        return BusyError(f"{url}: the kernel endpoint has all the links that it takes")
    if number == errno.EPROTONOSUPPORT:
        return VersionError(
            f"{url}: the module speaks version {record.version} of the kucomms ABI, with "  # type: ignore[attr-defined]
            f"features {record.features:#x}; this is version {lib.KUCOMMS_ABI_VERSION}. Use the "  # type: ignore[attr-defined]
            "same version of both"
        )
    if number == errno.ENOTTY:
        return VersionError(f"{url}: this device is not of a kucomms module that we know")
    if number == errno.ENOMEM:
        return _core.os_error(
            number,
            f"{url}: the kernel has no memory for the rings, or too little would be left for "
            "others; ask for a smaller ring_size",
        )
    return _core.os_error(number, f"{url}: the kernel endpoint refused the link")


async def _ask(address: Address, device: int, record: Any) -> int:
    """Have the kernel begin a set-up; 0 or an errno.

    It waits for nobody else, but allocates, so it has a thread. And that has a descriptor of
    its own of the open ``device``, because it may outlive this.
    """
    try:
        fd = os.dup(device)
    except OSError as error:
        raise _core.os_error(error.errno or 0, f"{address.url}: cannot connect") from error

    def ask() -> int:
        try:
            return _core.ioctl_setup(fd, record)
        finally:
            os.close(fd)

    try:
        asked = asyncio.get_running_loop().run_in_executor(None, ask)
    except RuntimeError as failed:
        os.close(fd)
        raise TransportError(errno.EAGAIN, f"{address.url}: {failed}") from failed
    # Cancelled before it has begun, it would not close the descriptor.
    return await asyncio.shield(asked)


async def _try_set_up(address: Address, options: ConnectOptions, device: int) -> Connection:
    """Make a link of an open device, or raise why there is none.

    The kernel waits for nobody in there: this does, for the answer of the endpoint, and for a
    channel that is just being closed. When it is cancelled, who closes ``device`` gives the
    set-up up.
    """
    while True:
        record = _request(address, options)
        number = await _ask(address, device, record)
        while number == errno.EINPROGRESS:
            await _has_news(address, device, None)
            number = _core.ioctl_setup(device, record)
        if number != errno.EAGAIN:
            break
        await _has_news(address, device, None)
    if number:
        raise _refused(address, number, record)
    return _attach(address.url, device, record)


async def _connect_once(
    address: Address, options: ConnectOptions, give_up: float | None
) -> Connection:
    """Open the device and connect. Waits for a channel as long as its endpoint is there."""
    loop = asyncio.get_running_loop()
    device = _open(address)
    try:
        while True:
            try:
                # What has begun may end: its own error says better what is wrong.
                last = None if give_up is None else max(give_up, loop.time() + _ANSWER)
                async with asyncio.timeout_at(last):
                    return await _try_set_up(address, options, device)
            except NoSuchChannelError:
                if not await _has_news(address, device, give_up):
                    raise
    except NotReadyError:
        raise
    except TimeoutError:
        raise NotReadyError(
            f"{address.url}: the kernel endpoint is there, but does not answer; does one "
            "of its callbacks block?"
        ) from None
    finally:
        os.close(device)


async def _has_news(address: Address, device: int, give_up: float | None) -> bool:
    """Wait until it may be worth another try; false when the time is up."""
    loop = asyncio.get_running_loop()
    news = asyncio.Event()
    try:
        epoll = select.epoll()
        # The device is readable all the time: the loop itself cannot wait for this alone.
        epoll.register(device, select.EPOLLPRI)
    except OSError as error:
        raise _core.os_error(error.errno or 0, f"{address.url}: cannot wait") from error
    with epoll:
        loop.add_reader(epoll.fileno(), news.set)
        try:
            async with asyncio.timeout_at(give_up):
                await news.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(epoll.fileno())
    return True


class KernelTransport:
    """See the module."""

    numbered = True

    async def listen(
        self,
        address: Address,
        options: ListenOptions,
        accept: Callable[[Connection], None],
        links: Callable[[], int],
    ) -> Listener:
        raise AddressError(
            f"{address.url}: only a kernel module can listen there, with kucomms_register(); "
            "connect to it"
        )

    async def connect(self, address: Address, options: ConnectOptions) -> Connection:
        if options.owner is not None:
            raise UsageError(f"{address.url}: owner= means nothing here; the kernel listens")
        loop = asyncio.get_running_loop()
        give_up = None if options.timeout is None else loop.time() + options.timeout
        delay = _RETRY_FIRST
        while True:
            try:
                return await _connect_once(address, options, give_up)
            except (NotReadyError, ShutdownError):
                # Not waited for with the device open: it could not be removed meanwhile. (That
                # makes no difference while an endpoint is registered.)
                left = delay if give_up is None else give_up - loop.time()
                if left <= 0:
                    raise
            await asyncio.sleep(min(delay, left))
            delay = min(2 * delay, _RETRY_LAST)


transport = KernelTransport()
