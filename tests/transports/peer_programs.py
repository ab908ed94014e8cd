# SPDX-License-Identifier: MIT
"""What the second processes of the tests do: ``python -m ... PROGRAM ARGUMENTS``.

Each program is a function here. It says on standard output how far it is, one line for
each thing that a test waits for, and ends with its standard input, if not before.
"""

import asyncio
import ctypes
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
from contextlib import asynccontextmanager, suppress

import kucomms
from kucomms import Endpoint, KucommsError, Message, PeerClosedError, _log
from tests.pool.partner import Partner
from tests.transports import raw_peer

LOAN_BEFORE, LOAN_AFTER = 10, 20
IDLE = 50
OTHER_USER = 65534


def say(line):
    print(line, flush=True)


async def told():
    """A line from standard input; '' at its end."""
    return (await asyncio.to_thread(sys.stdin.readline)).strip()


def fork_a_child():
    """A child that lives on with everything that it inherited open."""
    pid = os.fork()
    if not pid:
        os.read(0, 1)  # until the test closes it: our parent reads nothing
        os._exit(0)
    return pid


def number(value):
    return struct.pack("<Q", value)


def outcome(error):
    """One line about an error, for a test to compare."""
    name = type(error).__name__
    return f"{name} {error.errno}" if isinstance(error, OSError) and error.errno else name


@asynccontextmanager
async def linked(url, listens, **options):
    """A link with whoever is on the other side. Without a message handler."""
    opened = asyncio.get_running_loop().create_future()
    async with Endpoint("program") as endpoint:
        if listens:
            endpoint.on_link_open(lambda link: opened.done() or opened.set_result(link))
            await endpoint.listen(url, **options)
            say("ready")
            yield await opened
        else:
            yield await endpoint.connect(url, timeout=30, **options)


# ---- buffers in messages -------------------------------------------------------


async def partner(url):
    """Does with buffers what it is asked for."""
    async with Endpoint("partner") as endpoint:
        endpoint.on_message(Partner())
        await endpoint.listen(url)
        say("ready")
        await told()


# ---- to be killed, stopped, or to close ---------------------------------------


async def idle(url, listens):
    """Sends some, then nothing."""
    async with linked(url, int(listens)) as link:
        for value in range(IDLE):
            await link.send(number(value))
        say("sent")
        await told()


async def idle_with_child(url, listens):
    """As ``idle``; a child holds all that it had open at the time."""
    async with linked(url, int(listens)) as link:
        fork_a_child()
        for value in range(IDLE):
            await link.send(number(value))
        say("sent")
        await asyncio.Event().wait()


async def flood(url, listens, path):
    """Sends for ever. How many were sent for certain is in a mapped file."""
    with open(path, "r+b") as file:  # noqa: ASYNC230
        count = mmap.mmap(file.fileno(), 8)
    async with linked(url, int(listens)) as link:
        value = 0
        while True:
            await link.send(number(value))
            value += 1
            count[:] = number(value)


async def floods(url, size=8):
    """Sends faster than anybody can handle, until it is killed: numbers, 0 to 999 in turns."""
    batch = [number(value).ljust(int(size), b"x") for value in range(1000)]
    async with kucomms.connect(url, timeout=10) as link:
        say("floods")
        while True:
            await link.send_many(batch)


async def floods_with_replies(url):
    """Answers what nobody has asked, until it is killed."""
    async with kucomms.connect(url, timeout=10) as link:
        say("floods")
        while True:
            for value in range(1000):
                await link.reply(Message(b"", id=value), b"x" * 1000)


def discards(url, ring_size):
    """Fills its ring with what has to be skipped, over and over; told to, sends a message."""
    peer = raw_peer.connect_by_hand(url.removeprefix("shm://"), int(ring_size))
    peer.fill_with_discarded()
    peer.sock.setblocking(False)
    say("discards")
    while not select.select([sys.stdin], [], [], 0)[0]:
        peer.refill()
        with suppress(BlockingIOError):  # it has bells enough
            peer.ring()
    while peer.released < peer.position:
        pass
    peer.send(b"in the end")
    sys.stdin.read()


async def many_links(url, count):
    """Has so many links; each time it is told to, gets a reply on each of them."""
    async with Endpoint("many") as endpoint:
        links = []
        for number_of_links in range(1, int(count) + 1):
            links.append(await endpoint.connect(url, timeout=30))
            if number_of_links % 111 == 0:
                say(f"linked {number_of_links}")
        while await told():
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(link.request(number(value), type=1, timeout=60))
                    for value, link in enumerate(links)
                ]
            for value, task in enumerate(tasks):
                assert task.result().data == number(value)
            say("all replied")


async def unfinished_loan(url, listens):
    """Is stopped by the test while it holds a loan, with messages before and after."""
    async with linked(url, int(listens)) as link:
        for value in range(LOAN_BEFORE):
            await link.send(number(value))
        with link.loan(1000) as loan:
            loan.data[:8] = b"half-wri"
            for value in range(LOAN_BEFORE, LOAN_AFTER):
                await link.send(number(value))
            say("sent")
            await asyncio.Event().wait()


async def reads_nothing(url, listens):
    """Until it is told; then everything, and says how much came in order."""
    async with linked(url, int(listens)) as link:
        say("linked")
        wanted = int(await told())
        for value in range(wanted):
            message = await link.receive()
            assert message.data[:8] == number(value), value
        say(f"received {wanted}")
        await told()


async def closes(url, listens, how):
    """Sends some, closes in order, and says what it got before."""
    async with linked(url, int(listens)) as link:
        for value in range(IDLE):
            await link.send(number(value))
        if how == "link":
            await link.aclose()
            say("closed")
            await told()


async def leaves(url, listens):
    """Sends some and is gone without closing anything."""
    async with linked(url, int(listens)) as link:
        for value in range(IDLE):
            await link.send(number(value))
        os._exit(0)


def dies_while_connecting(name):
    """Has greeted and got its answer."""
    sock = raw_peer.connect(name)
    raw_peer.send(sock, raw_peer.record(raw_peer.HELLO))
    raw_peer.receive(sock)
    say("halfway")
    sys.stdin.read()


def dies_while_accepting(name, child):
    """Has got a greeting, and does not answer."""
    listener = raw_peer.RawListener(name)
    if int(child):
        fork_a_child()
    say("ready")
    sock, _greeting = listener.accept()
    if int(child):
        fork_a_child()
    say("halfway")
    signal.pause()
    sock.close()


# ---- listening and connecting -------------------------------------------------


async def echo(url, options="{}"):
    """Listens and sends everything back; says when a link comes or goes."""
    async with Endpoint("echo") as endpoint:
        endpoint.on_link_open(lambda link: say(f"open {link.peer.uid}"))
        endpoint.on_link_close(
            lambda _link, error: say(f"close {'in order' if error is None else outcome(error)}")
        )
        endpoint.on_message(lambda message, link: link.send(message))
        options = json.loads(options)
        if "hello" in options:
            options["hello"] = options["hello"].encode()
        await endpoint.listen(url, **options)
        say("ready")
        await told()


async def echo_in_want(url):
    """As ``echo``; says when a peer has to wait until there are descriptors again."""

    def tell(_logger, _method, event):
        if "ulimit -n" in event.get("error", ""):
            say("out of descriptors")
        return event

    import structlog

    structlog.configure(processors=[tell, *structlog.get_config()["processors"]])
    await echo(url)


async def listens_with_child(url):
    """Listens, and has a child that holds the listening socket open."""
    async with Endpoint("parent") as endpoint:
        await endpoint.listen(url)
        fork_a_child()
        say("ready")
        await asyncio.Event().wait()


async def race(url):
    """Each time it is told to, tries to listen; says whether it won."""
    async with Endpoint("racer") as endpoint:
        endpoint.on_message(lambda message, link: link.send(message))
        say("ready")
        while await told():
            try:
                listener = await endpoint.listen(url)
            except kucomms.AddressInUseError:
                say("lost")
                await told()
            else:
                say("won")
                await told()
                await listener.aclose()
            say("done")


async def comes_and_goes(url, times):
    """Listens and closes, over and over, in a directory that comes and goes with it."""
    async with Endpoint("fickle") as endpoint:
        say("ready")
        await told()
        for _ in range(int(times)):
            listener = await endpoint.listen(url)
            await listener.aclose()
        say("done")


async def connects(url, options="{}"):
    """Connects, echoes one message against an echo, says how that went."""
    options = json.loads(options)
    if "hello" in options:
        options["hello"] = options["hello"].encode()
    try:
        async with kucomms.connect(url, **options) as link:
            await link.send(b"there and back")
            message = await link.receive()
            assert message.data == b"there and back"
            say(f"echoed {link.peer.uid} {link.peer.hello.decode()}")
            await told()
    except KucommsError as error:
        say(outcome(error))


def become_another_user():
    """For good. The interpreter's own files may be out of reach then."""
    import concurrent.futures.thread  # noqa: F401

    import kucomms.transports.shm  # noqa: F401

    os.setgroups([])
    os.setresgid(OTHER_USER, OTHER_USER, OTHER_USER)
    os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)


async def connects_as_another(url, options="{}"):
    """As ``connects``, as a user who may nothing."""
    become_another_user()
    await connects(url, options)


async def echo_as_another(url, options="{}"):
    """As ``echo``, as a user who may nothing."""
    become_another_user()
    await echo(url, options)


async def died_link_as_another(url, options="{}"):
    """Connects as another user and is killed by the test."""
    become_another_user()
    link = await kucomms.connect(url, **json.loads(options))
    for value in range(IDLE):
        await link.send(number(value))
    say("sent")
    await asyncio.Event().wait()


def tampers_as_another(name, directory):
    """Gets the memory of a listener of another user and tries what it must not."""
    become_another_user()
    sock = raw_peer.connect(name, directory)
    raw_peer.send(sock, raw_peer.record(raw_peer.HELLO))
    setup, (fd,) = raw_peer.receive(sock)
    size = raw_peer.side_size(setup.ring_size)
    assert os.fstat(fd).st_size == size

    shared = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    address = _address_of(shared)
    libc = ctypes.CDLL(None, use_errno=True)

    def protect():
        if libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError(ctypes.get_errno(), "mprotect")

    def punch():
        keep_size_punch_hole = 3
        if libc.fallocate(fd, keep_size_punch_hole, ctypes.c_long(0), ctypes.c_long(mmap.PAGESIZE)):
            raise OSError(ctypes.get_errno(), "fallocate")

    def write_through_proc():
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            os.pwrite(again, b"x", 0)
        finally:
            os.close(again)

    def write_own_memory():
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(address)
            memory.write(b"x")

    attempts = {
        "shrink": lambda: os.ftruncate(fd, 0),
        "grow": lambda: os.ftruncate(fd, 2 * size),
        "write": lambda: os.pwrite(fd, b"x", 0),
        "map": lambda: mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        "protect": protect,
        "punch": punch,
        "reopen": write_through_proc,
        "proc": write_own_memory,
    }
    results = {"setup": [setup.flags, setup.status]}
    for what, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            results[what] = error.errno
        else:
            results[what] = 0
    say(json.dumps(results))
    sys.stdin.read()


def passes_too_many_as_another(name, directory, *parts):
    """Answers a listener byte by byte, with so many files each, and waits to be dropped."""
    become_another_user()
    sock = raw_peer.connect(name, directory)
    raw_peer.send(sock, raw_peer.record(raw_peer.HELLO))
    _setup, fds = raw_peer.receive(sock)
    for count in parts:
        raw_peer.send(sock, raw_peer.record(raw_peer.ATTACH)[:1], fds * int(count))
    say("dropped" if raw_peer.is_closed(sock) else "not dropped")


def knocks_as_another(name, directory, times):
    """So often, and says how often it was refused."""
    become_another_user()
    refused = 0
    for _ in range(int(times)):
        with raw_peer.connect(name, directory) as sock:
            answer, fds = raw_peer.receive(sock)
            refused += (answer.status, fds) == (raw_peer.REFUSED_USER, [])
    say(f"refused {refused}")


def lingering_file():
    """A socket whose last close blocks, for half a minute or until its other end goes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        sock = socket.socket()
        sock.connect(listener.getsockname())
        other, _address = listener.accept()
    sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 16))
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
    return sock.detach(), other


def sealed_side(ring_size):
    """Memory of a connecting side, as it should be."""
    fd = raw_peer.memory(raw_peer.side_size(ring_size), seals=True)
    os.pwrite(fd, raw_peer.geometry(1, ring_size), 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, raw_peer.SEALS)
    return fd


def passes_lingering_as_another(name, directory, when, count=1):
    """Passes files that block who closes them, somewhere in the rendezvous or after it."""
    become_another_user()
    kept = []
    say("ready")
    # Told so that nobody takes the file before we have given up ours: the last one blocks.
    sys.stdin.readline()
    for _ in range(int(count)):
        fd, other = lingering_file()
        sock = raw_peer.connect(name, directory)
        kept += [sock, other]
        if when == "hello":
            raw_peer.send(sock, raw_peer.record(raw_peer.HELLO), [fd])
        else:
            raw_peer.send(sock, raw_peer.record(raw_peer.HELLO))
            setup, _fds = raw_peer.receive(sock)
            say("set up")
            sys.stdin.readline()
            attach = raw_peer.record(raw_peer.ATTACH)
            side = sealed_side(setup.ring_size)
            if when == "memory":
                raw_peer.send(sock, attach, [fd])
            elif when == "besides":
                raw_peer.send(sock, attach, [side, fd])
            else:
                raw_peer.send(sock, attach, [side])
                raw_peer.send(sock, b"\x01", [fd])
        os.close(fd)
    say("passed")
    sys.stdin.read()


def _address_of(mapping):
    """Where a read-only mmap object lies."""

    class PyBuffer(ctypes.Structure):
        _fields_ = (
            ("buf", ctypes.c_void_p),
            ("obj", ctypes.py_object),
            ("len", ctypes.c_ssize_t),
            ("itemsize", ctypes.c_ssize_t),
            ("readonly", ctypes.c_int),
            ("ndim", ctypes.c_int),
            ("format", ctypes.c_char_p),
            ("shape", ctypes.c_void_p),
            ("strides", ctypes.c_void_p),
            ("suboffsets", ctypes.c_void_p),
            ("internal", ctypes.c_void_p),
        )

    buffer = PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(
        ctypes.py_object(mapping), ctypes.byref(buffer), ctypes.c_int(0)
    )
    address = buffer.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address


def offers_as_another(name, flaw, ring_size=mmap.PAGESIZE):
    """A listener of another user with memory that is not as it has to be."""
    ring_size = int(ring_size)
    become_another_user()
    directory = f"/tmp/kucomms-{OTHER_USER}-shared"
    os.makedirs(directory, exist_ok=True)
    os.chmod(directory, 0o711)
    path = os.path.join(directory, name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o666)
    listener.listen()
    say("ready")
    try:
        sock, _address = listener.accept()
        raw_peer.receive(sock)
        size = raw_peer.side_size(ring_size)
        seals = raw_peer.SEALS
        flags = raw_peer.SEALED
        if flaw == "unsealed memory":
            seals = 0
        elif flaw == "shrinkable":
            seals &= ~fcntl.F_SEAL_SHRINK
        elif flaw == "writable":
            seals &= ~0x10
        elif flaw == "not offered as sealed":
            flags = 0
            size += size
        elif flaw == "wrong size":
            size += mmap.PAGESIZE
        files, other = [], None
        if flaw.startswith("lingering"):
            *files, other = lingering_file()
        fd = raw_peer.memory(size, seals=True)
        os.pwrite(fd, raw_peer.geometry(0, ring_size), 0)
        if flaw == "no memfd":
            os.close(fd)
            fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR, 0o600)
            os.ftruncate(fd, size)
            os.pwrite(fd, raw_peer.geometry(0, ring_size), 0)
        elif seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        if flaw == "lingering besides":
            files.insert(0, fd)
        setup = raw_peer.record(raw_peer.SETUP, ring_size=ring_size, flags=flags)
        if files:
            say("asked")
            sys.stdin.readline()
        raw_peer.send(sock, setup, files or [fd])
        for file in files:
            os.close(file)
        if files:
            say("passed")
        try:
            _attach, fds = raw_peer.receive(sock)
            say(f"attached {len(fds)}")
        except (EOFError, ConnectionResetError):
            say("dropped")
        if other is not None:
            sys.stdin.read()
    finally:
        os.unlink(path)
        os.rmdir(directory)


if __name__ == "__main__":
    _log.to_stderr = True
    program = globals()[sys.argv[1]]
    try:
        result = program(*sys.argv[2:])
        if asyncio.iscoroutine(result):
            asyncio.run(result)
    except PeerClosedError:
        say("peer closed")
