# SPDX-License-Identifier: MIT
"""What others on this machine can see of a link: nothing, whatever the umask is.

Who may connect, and what users that were let in can do, is in test_users.py.
"""

import asyncio
import os
import socket
import stat
from contextlib import contextmanager

import pytest
import structlog

import kucomms
from kucomms import Endpoint, _core
from kucomms.transports import shm
from tests.transports import raw_peer
from tests.transports.processes import descriptors
from tests.transports.raw_peer import PAGE, SETUP, record, side_size

pytestmark = pytest.mark.asyncio

RING = 4 * PAGE


@pytest.fixture
def name():
    return f"exposure_{os.getpid()}"


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def memory_of_a_link(name):
    """What a listener passes to who connects: the descriptors."""
    with raw_peer.connect(name) as sock:
        raw_peer.send(sock, record(raw_peer.HELLO, ring_size=RING, flags=raw_peer.EVENTFDS))
        setup, fds = raw_peer.receive(sock)
        assert (setup.step, setup.ring_size) == (SETUP, RING)
        try:
            yield fds
        finally:
            for fd in fds:
                os.close(fd)


async def test_only_the_directory_and_the_socket_have_names(name, runtime_dir):
    """The directory is ours alone; so it does not matter what the socket's mode is."""
    before = set(os.listdir("/dev/shm"))
    with umask(0):
        async with Endpoint("listener") as endpoint:
            await endpoint.listen(f"shm://{name}")
            async with kucomms.connect(f"shm://{name}") as link:
                await link.send(b"x")
                (directory,) = os.scandir(runtime_dir)
                about = directory.stat(follow_symlinks=False)
                assert stat.S_IMODE(about.st_mode) == 0o700
                assert about.st_uid == os.geteuid()
                (only,) = os.scandir(directory)  # no lock file either
                assert only.name == name
                assert stat.S_ISSOCK(only.stat(follow_symlinks=False).st_mode)
                ours = f"kucomms-{os.geteuid()}-{os.getpid()}-"
                assert not [n for n in set(os.listdir("/dev/shm")) - before if n.startswith(ours)]


async def test_shared_memory_is_ours_alone_from_the_start(monkeypatch):
    """Also between being made and being unlinked, when it has a name."""
    seen = []

    def unlink(path):
        seen.append((path, os.stat("/dev/shm" + path)))
        _unlink(path)

    _unlink = _core.shm_unlink
    monkeypatch.setattr(_core, "shm_unlink", unlink)
    with umask(0):
        for _ in range(2):
            os.close(await shm._new_memory("shm://x", PAGE, sealed=False, go_on=lambda: None))
    assert len({path for path, _about in seen}) == 2
    for path, about in seen:
        assert stat.S_IMODE(about.st_mode) == 0o600
        assert about.st_uid == os.geteuid()
        assert len(path.rsplit("-", 1)[1]) == 32  # 128 bits that nobody guesses


async def test_what_is_passed_has_no_name_and_no_content(name):
    """But for the geometry of the side that has made it. And links share nothing."""
    async with Endpoint("listener") as endpoint:
        await endpoint.listen(f"shm://{name}")

        def look():
            with memory_of_a_link(name) as one, memory_of_a_link(name) as other:
                for fd in (one[0], other[0]):
                    about = os.fstat(fd)
                    assert (stat.S_IMODE(about.st_mode), about.st_nlink) == (0o600, 0)
                    assert about.st_uid == os.geteuid()
                    content = os.pread(fd, about.st_size, 0)
                    assert len(content) == 2 * side_size(RING)
                    assert content.rstrip(b"\0") == raw_peer.geometry(0, RING).rstrip(b"\0")
                inodes = {os.fstat(fd).st_ino for fd in (one[0], other[0])}
                assert len(inodes) == 2
                os.pwrite(one[0], b"\xff" * 100, PAGE)
                assert os.pread(other[0], 100, PAGE) == bytes(100)

        await asyncio.to_thread(look)


async def test_records_say_nothing_that_is_not_meant(name):
    """All of each, also what is reserved and behind a short greeting, is as it should be."""
    async with Endpoint("listener") as endpoint:
        await endpoint.listen(f"shm://{name}", hello=b"short")

        def look():
            with raw_peer.connect(name) as sock:
                raw_peer.send(sock, record(raw_peer.HELLO, ring_size=RING))
                data, ancillary, _flags, _address = sock.recvmsg(1000, socket.CMSG_SPACE(4))
                assert data == record(SETUP, ring_size=RING, hello=b"short")
                os.close(int.from_bytes(ancillary[0][2][:4], "little"))

        await asyncio.to_thread(look)


@pytest.mark.parametrize("step", ["hello", "attach"])
async def test_files_that_nobody_asked_for_are_not_taken(name, step):
    """Not even to be closed, which blocks if the peer's own file system does."""

    def connect():
        with raw_peer.connect(name) as sock, open("/dev/null") as file:
            if step == "attach":
                raw_peer.send(sock, record(raw_peer.HELLO, ring_size=RING))
                _setup, (fd,) = raw_peer.receive(sock)
                os.pwrite(fd, raw_peer.geometry(1, RING), side_size(RING))
                os.close(fd)
            what = raw_peer.HELLO if step == "hello" else raw_peer.ATTACH
            raw_peer.send(sock, record(what), [file.fileno()])
            assert raw_peer.is_closed(sock)

    with structlog.testing.capture_logs() as logs:
        async with Endpoint("listener") as endpoint:
            await endpoint.listen(f"shm://{name}")
            await asyncio.to_thread(connect)
    assert [entry["event"] for entry in logs] == ["peer_refused"]
    assert "files that nobody asked for" in logs[0]["error"]


async def test_descriptors_are_not_inherited(name):
    before = descriptors()
    async with Endpoint("listener") as endpoint:
        await endpoint.listen(f"shm://{name}")
        async with kucomms.connect(f"shm://{name}") as link:
            await link.send(b"x")
            made = descriptors().keys() - before
            assert len(made) > 6  # both ends: sockets, pidfds, eventfds
            assert [fd for fd in made if os.get_inheritable(fd)] == []
