# SPDX-License-Identifier: MIT
"""``joined://NAME``: two processes on ``/dev/kucomms_NAME``, joined by a kernel module.

For tests only. The module ``kucomms_join`` forwards every message from one channel of the
device to another; so both ends of a link are in Python, each byte goes through the kernel
twice, and the conformance suite runs over ``kernel://``'s transport.
"""

import asyncio
import gc
import itertools
import multiprocessing
import os
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path

import uvloop

from kucomms import QueueFull, testing, transports
from kucomms._core import STATE_CLOSED, ring_size_for
from kucomms.transports import kernel
from kucomms.transports.base import Address, Connection, ConnectOptions, Listener, Peer
from tests.transports.harnesses import responding

SYSFS = Path("/sys/devices/virtual/kucomms/kucomms")
PARAMETERS = Path("/sys/module/kucomms_join/parameters")

_HELLO = b"listen"
_JOINED = 2**64 - 1
_DEFAULT_LIMIT = ring_size_for(1 << 26)
"""``max_ring_size`` of a listen() that does not say."""

_names = itertools.count()
_ring_sizes = {}
"""By URL, what a listener of this harness was given; a connecting side cannot ask the
kernel, because the rings of the two sides are different ones."""


def stuck():
    """How many channels have had no room for a while for what is to be forwarded to them."""
    return int((PARAMETERS / "stuck").read_text())


def fill(link, start):
    """Instead of ``kucomms.testing._fill``: a full ring counts when it stays so.

    The kernel forwards until the other ring is full, too, and it has a message in hand.
    """
    for number in itertools.count(start):
        message = testing.numbered(number, 500, testing.SINK)
        while True:
            was_stuck = stuck()
            try:
                link.send_nowait(message)
                break
            except QueueFull:
                if was_stuck:
                    return number
    raise AssertionError


# ---- the transport ----------------------------------------------------------


class JoinedConnection(Connection):
    """A channel, begun before anybody wanted it, and given to a link later."""

    def __init__(self, inner, peer):
        super().__init__(inner.url, inner.channel, peer)
        self._inner = inner
        self._woken = None
        self._gone = None
        self._was_gone = None

    def begin(self, woken, gone):
        self._woken = woken
        self._gone = gone
        self._inner.start(self._on_woken, self._on_gone)

    def start(self, woken, gone):
        self._woken = woken
        self._gone = gone
        loop = asyncio.get_running_loop()
        loop.call_soon(self._on_woken)
        if self._was_gone is not None:
            loop.call_soon(self._on_gone, *self._was_gone)

    def _on_woken(self):
        if self._woken is not None:
            self._woken()

    def _on_gone(self, error):
        self._was_gone = (error,)
        if self._gone is not None:
            self._gone(error)

    def ring(self):
        self._inner.ring()

    def close(self):
        self._woken = None
        self._gone = None
        self._inner.close()


class JoinedListener(Listener):
    """Keeps one channel waiting to be joined."""

    def __init__(self, address, options, accept, links):
        super().__init__(address.url)
        self._address = address
        self._options = options
        self._accept = accept
        self._links = links
        self._spare = None
        self._opener = None

    async def open(self):
        options = self._options
        # A larger ring does what a smaller one does, and any size can be asked for then.
        size = options.ring_size
        if options.max_ring_size != _DEFAULT_LIMIT:
            size = options.max_ring_size
        wishes = {"ring_size": size, "timeout": testing.PATIENCE, "hello": _HELLO}
        inner = await _connect(self._address, **wishes)
        self._spare = JoinedConnection(inner, Peer(kernel=True))
        if self.closed:
            self._close_spare()
        else:
            self._spare.begin(self._look, self._spare_gone)
            self._look()

    def _look(self):
        """Whether the spare has been joined."""
        spare = self._spare
        messages = []
        while not messages:
            spare.channel.receive(1, 1 << 20, messages, messages, True)
            if not messages and not spare.channel.park_receive():
                return
        (first,) = messages
        assert first.type == _JOINED, first
        spare.peer = Peer(kernel=True, hello=first.data)
        if self._links() >= self._options.max_links:
            self._close_spare()
        else:
            self._spare = None
            self._accept(spare)
        if not self.closed:
            self._opener = asyncio.ensure_future(self.open())

    def _spare_gone(self, error):
        spare = self._spare
        self._look()  # whom it was joined to may have closed already
        if self._spare is spare:
            self._close_spare()
            raise error or AssertionError(f"{self.url}: a channel that waited was closed")

    def _close_spare(self):
        spare, self._spare = self._spare, None
        if spare is not None:
            _close(spare)

    async def aclose(self):
        self.closed = True
        if self._opener is not None:
            await self._opener
        if self._spare is not None:
            self._look()  # who was joined already keeps its link
        self._close_spare()


def _close(connection):
    connection.channel.stop_sending(STATE_CLOSED)
    connection.close()
    connection.channel.unmap()


def _connect(address, **options):
    # the URL stays ours, for what errors say
    there = Address(address.url, "kernel", address.name)
    return kernel.transport.connect(there, ConnectOptions(owner=None, **options))


class JoinedTransport:
    """See the module."""

    async def listen(self, address, options, accept, links):
        listener = JoinedListener(address, options, accept, links)
        await listener.open()
        return listener

    async def connect(self, address, options):
        size, limit = _ring_sizes.get(address.url, (1 << 20, _DEFAULT_LIMIT))
        return await _connect(
            address,
            ring_size=min(options.ring_size or size, limit),
            timeout=options.timeout,
            hello=options.hello,
        )


transport = JoinedTransport()
transports._BUILT_IN["joined"] = "tests.kernel.joined"


# ---- the harness ------------------------------------------------------------


class KernelJoin(testing.Harness):
    """The responder in a process of its own, behind the kernel.

    As a context manager it removes the devices that it has made; whoever still holds one
    open is an error, unless there is one already.
    """

    turns = False  # what goes from one channel to another one has no turn of its own

    def __enter__(self):
        self._devices = []
        return self

    def __exit__(self, error, *_):
        gc.collect()
        for device in self._devices:
            (PARAMETERS / "unregister").write_text(device)
            with suppress(OSError) if error else nullcontext():
                (SYSFS / "remove_device").write_text(device)

    def new_url(self):
        name = f"conformance_{os.getpid()}_{next(_names)}"
        device = f"kucomms_{name}"
        (SYSFS / "create_device").write_text(device)
        self._devices.append(device)
        (PARAMETERS / "register").write_text(device)
        return f"joined://{name}"

    @asynccontextmanager
    async def responder(self, url, **options):
        size = ring_size_for(options.get("ring_size", 1 << 20))
        _ring_sizes[url] = size, ring_size_for(options.get("max_ring_size", _DEFAULT_LIMIT))
        here = asyncio.get_running_loop()
        factory = uvloop.new_event_loop if isinstance(here, uvloop.Loop) else asyncio.new_event_loop
        ours, theirs = _processes.Pipe()
        process = _processes.Process(target=_respond, args=(theirs, url, factory, options))
        process.start()
        theirs.close()
        try:
            assert await here.run_in_executor(None, ours.recv) == "ready"
            yield
        finally:
            ours.close()
            await here.run_in_executor(None, process.join)
        assert process.exitcode == 0


# Python starts slowly in an emulated guest, so the responders are forked from one that has
# imported all they need.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__, "uvloop"])


def _respond(told, url, factory, options):
    """Be the other side, until ``told`` is closed."""

    async def main():
        async with responding(url, options):
            told.send("ready")
            with suppress(EOFError):
                await asyncio.get_running_loop().run_in_executor(None, told.recv)

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
