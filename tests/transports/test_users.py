# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110, ASYNC230, ASYNC240
"""Processes of other users: kept out, or let in over memory that protects both."""

import asyncio
import errno
import itertools
import json
import os
import re
import shutil
import stat
import threading
import time

import pytest
import structlog

import kucomms
from kucomms import Endpoint, NotReadyError, PeerClosedError, ProtocolError, TransportError
from kucomms.transports import shm
from tests.transports.peer_programs import IDLE, OTHER_USER
from tests.transports.processes import PATIENCE, Process, descriptors, objects_in_shm

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
]

_numbers = itertools.count()
MIB = 1 << 20
SHARED = f"/tmp/kucomms-{os.geteuid()}-shared"


@pytest.fixture
def name():
    return f"users_{os.getpid()}_{next(_numbers)}"


@pytest.fixture(autouse=True)
def clean():
    """What the sockets of killed processes keep from being removed."""
    yield
    for path in (f"/tmp/kucomms-{OTHER_USER}", f"/tmp/kucomms-{OTHER_USER}-shared"):
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def url(name):
    return f"shm://{name}"


class Listening:
    """An endpoint that echoes; ``opened`` and ``closed`` are futures of its only link."""

    def __init__(self, url, **options):
        loop = asyncio.get_running_loop()
        self.opened, self.closed = loop.create_future(), loop.create_future()
        self.endpoint = Endpoint("root")
        self.endpoint.on_message(lambda message, link: link.send(message))
        self.endpoint.on_link_open(self.opened.set_result)
        self.endpoint.on_link_close(lambda _link, error: self.closed.set_result(error))
        self._url, self._options = url, options

    async def __aenter__(self):
        await self.endpoint.__aenter__()
        try:
            await self.endpoint.listen(self._url, **self._options)
        except BaseException:
            await self.endpoint.aclose()
            raise
        return self

    async def __aexit__(self, *exception):
        await self.endpoint.__aexit__(*exception)


# ---- kept out -------------------------------------------------------------------


@pytest.mark.parametrize("allow", [(), (1, 2)], ids=["nobody_allowed", "others_allowed"])
async def test_other_users_are_kept_out(url, allow):
    async with Listening(url, allow=allow) as listening:
        options = json.dumps({"owner": 0, "timeout": 0.2})
        with Process("connects_as_another", url, options) as process:
            line = await process.line()
            assert line in ("NotReadyError", f"TransportError {errno.EACCES}")
            if allow:
                assert line == f"TransportError {errno.EACCES}"
            assert await process.ended() == 0
        # by the way into our own directory, too
        with Process("connects_as_another", url, json.dumps({"timeout": 0.2})) as process:
            assert await process.line() == f"TransportError {errno.EACCES}"
        assert not listening.opened.done()


async def test_strangers_who_knock_do_not_fill_the_log(url, name):
    """A line a second at most, and how many there were."""
    count = 300
    begin = time.monotonic()
    with structlog.testing.capture_logs() as logs:
        async with Listening(url, allow={1}) as listening:
            with Process("knocks_as_another", name, SHARED, count) as process:
                await process.says(f"refused {count}")
            async with kucomms.connect(url, timeout=0) as link:
                await link.send(b"x")
                assert (await link.receive()).data == b"x"
            assert listening.opened.result().peer.uid == os.geteuid()
    lines = [entry for entry in logs if entry["event"] == "peer_refused"]
    assert f"user {OTHER_USER} is not allowed" in lines[0]["error"]
    assert 1 <= len(lines) <= 1 + time.monotonic() - begin
    assert len(lines) + sum(entry.get("others", 0) for entry in logs) == count


async def test_other_users_do_not_take_our_names(url):
    """Without an XDG_RUNTIME_DIR everybody has a directory of his own."""
    environment = {"XDG_RUNTIME_DIR": ""}
    with Process("echo_as_another", url, env=environment) as process:
        await process.says("ready")
        async with Listening(url) as listening, kucomms.connect(url) as link:
            assert link.peer.uid == 0
            await listening.opened
        process.tell()
        assert await process.ended() == 0
    assert not os.path.exists(f"/tmp/kucomms-{OTHER_USER}")


async def test_connector_checks_the_owner(url, monkeypatch):
    """A listener of somebody else at our place is not what was meant."""
    with Process(
        "echo_as_another", url, json.dumps({"allow": [0]}), env={"XDG_RUNTIME_DIR": ""}
    ) as process:
        await process.says("ready")
        async with Endpoint("root") as endpoint:
            with pytest.raises(NotReadyError):
                await endpoint.connect(url, timeout=0)
            with pytest.raises(NotReadyError):
                await endpoint.connect(url, timeout=0, owner=1)
            shared = f"/tmp/kucomms-{OTHER_USER}-shared"
            os.rename(shared, SHARED)
            try:
                monkeypatch.setattr(os, "geteuid", lambda: 5)  # so that 0 is another user
                with pytest.raises(TransportError, match=re.escape(SHARED)) as caught:
                    await endpoint.connect(url, timeout=0, owner=0)
                assert caught.value.errno == errno.EPERM
            finally:
                monkeypatch.undo()
                os.rename(SHARED, shared)
        process.tell()
        assert await process.ended() == 0


# ---- let in ---------------------------------------------------------------------


@pytest.mark.parametrize("turns", [False, True], ids=["", "turns"])
async def test_allowed_user(url, turns):
    options = json.dumps({"owner": 0, "timeout": PATIENCE, "hello": "from another"})
    given = {"allow": {OTHER_USER}, "hello": b"from root", "turns": turns}
    async with Listening(url, **given) as listening:
        assert stat.S_IMODE(os.stat(SHARED).st_mode) == 0o711
        await asyncio.to_thread(lambda: None)
        before = descriptors()
        with Process("connects_as_another", url, options) as process:
            during = descriptors()
            async with asyncio.timeout(PATIENCE):
                link = await listening.opened
            assert link.turns == turns
            assert link.peer.uid == OTHER_USER
            assert link.peer.pid == process.pid
            assert link.peer.hello == b"from another"
            await process.says("echoed 0 from root")
            process.tell()
            assert await process.ended() == 0
            async with asyncio.timeout(PATIENCE):
                assert await listening.closed is None
            assert descriptors() == during
        assert descriptors() == before
        with open("/proc/self/maps") as maps:
            assert "memfd:kucomms" not in maps.read()
    assert not os.path.exists(os.path.join(SHARED, url.removeprefix("shm://")))


async def test_own_user_connects_to_a_shared_name(url):
    async with Listening(url, allow={OTHER_USER}), kucomms.connect(url, owner=0) as link:
        await link.send(b"x")
        assert (await link.receive()).data == b"x"


@pytest.mark.parametrize("turns", [False, True], ids=["", "turns"])
async def test_root_connects_to_another(url, turns):
    options = json.dumps({"allow": [0], "hello": "from another", "turns": turns})
    with Process("echo_as_another", url, options, env={"XDG_RUNTIME_DIR": ""}) as process:
        await process.says("ready")
        async with kucomms.connect(url, owner=OTHER_USER, timeout=0, hello=b"x") as link:
            await process.says("open 0")
            assert link.peer.uid == OTHER_USER
            assert link.peer.pid == process.pid
            assert link.peer.hello == b"from another"
            assert link.turns == turns
            for size in (0, 1, 100_000):
                assert link.has_turn
                await link.send(bytes(size))
                assert len(await link.receive()) == size
        await process.says("close in order")
        process.tell()
        assert await process.ended() == 0
    assert not os.path.exists(f"/tmp/kucomms-{OTHER_USER}-shared")


async def test_death_of_another_user(url):
    options = json.dumps({"owner": 0, "timeout": PATIENCE})
    received = []
    async with Listening(url, allow={OTHER_USER}) as listening:
        listening.endpoint.on_message(lambda message, link: received.append(message.data))
        with Process("died_link_as_another", url, options) as process:
            await process.says("sent")
            process.kill()
            async with asyncio.timeout(PATIENCE):
                assert type(await listening.closed) is PeerClosedError
            assert len(received) == IDLE
            assert objects_in_shm(os.getpid(), process.pid) == []


# ---- the memory -----------------------------------------------------------------


async def test_other_user_cannot_tamper_with_our_memory(url, name):
    async with Listening(url, allow={OTHER_USER}):
        with Process("tampers_as_another", name, SHARED) as process:
            results = json.loads(await process.line())
        assert results.pop("setup") == [1, 0]  # sealed, accepted
        assert set(results) == {
            "shrink", "grow", "write", "map", "protect", "punch", "reopen", "proc",
        }  # fmt: skip
        for what, error in results.items():
            assert error in (errno.EPERM, errno.EACCES, errno.EIO, errno.EFAULT), (what, error)


@pytest.mark.parametrize(
    "flaw",
    [
        "unsealed memory",
        "shrinkable",
        "writable",
        "not offered as sealed",
        "wrong size",
        "no memfd",
    ],
)
async def test_flawed_memory_of_another_user_is_refused(url, name, flaw):
    with Process("offers_as_another", name, flaw) as process:
        await process.says("ready")
        async with Endpoint("root") as endpoint:
            await asyncio.to_thread(lambda: None)
            before = descriptors()
            with pytest.raises(ProtocolError):
                await endpoint.connect(url, timeout=PATIENCE, owner=OTHER_USER)
            await until(lambda: descriptors() == before)  # what is no memory, by a thread
        await process.says("dropped")
        assert await process.ended() == 0


async def test_good_memory_of_another_user_is_taken(url, name):
    """The control of the test above: it is the flaw that is refused."""
    with Process("offers_as_another", name, "no flaw") as process:
        await process.says("ready")
        async with Endpoint("root") as endpoint:
            link = await endpoint.connect(url, timeout=PATIENCE, owner=OTHER_USER)
            assert link.peer.uid == OTHER_USER
            await process.says("attached 1")


@pytest.mark.parametrize(
    ("asked", "offered", "attached"),
    [
        (None, MIB << 6, True),
        (None, MIB << 7, False),
        (MIB << 7, MIB << 7, True),
        (MIB, MIB, True),
        (MIB, MIB << 1, False),
    ],
)
async def test_another_user_does_not_decide_on_our_memory(url, name, asked, offered, attached):
    """We bring a side of our own: as much as we asked for, or 64 MiB, is the most of it."""
    with Process("offers_as_another", name, "no flaw", offered) as process:
        await process.says("ready")
        async with Endpoint("root") as endpoint:
            options = {"ring_size": asked, "timeout": PATIENCE, "owner": OTHER_USER}
            if attached:
                link = await endpoint.connect(url, **options)
                assert link.ring_size == offered
                await process.says("attached 1")
            else:
                with pytest.raises(ProtocolError, match=f"{url}: .*{offered} bytes of ring"):
                    await endpoint.connect(url, **options)
                await process.says("dropped")
        assert await process.ended() == 0


@pytest.mark.parametrize("parts", [[2], [1, 1], [0, 1, 3], [253]])
async def test_other_user_passes_too_many_files(url, name, parts, monkeypatch):
    """A few with each byte of a record: dropped with the first that is one too many."""
    monkeypatch.setattr(shm, "HANDSHAKE_TIMEOUT", 10 * PATIENCE)
    with structlog.testing.capture_logs() as logs:
        async with Listening(url, allow={OTHER_USER}):
            before = descriptors()
            with Process("passes_too_many_as_another", name, SHARED, *parts) as process:
                await process.says("dropped")
                assert await process.ended() == 0
            await until(lambda: descriptors() == before)
    assert [entry["event"] for entry in logs] == ["peer_refused"]
    assert "files" in logs[0]["error"]


# ---- files that block who closes them -------------------------------------------


def hanging():
    """How many threads wait for such a file."""
    return sum(thread.name == "kucomms closes a file" for thread in threading.enumerate())


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("when", "allowed"),
    [("hello", False), ("hello", True), ("memory", True), ("besides", True), ("doorbell", True)],
)
async def test_files_of_other_users_do_not_block_us(url, name, when, allowed):
    """Whoever passes them, and when: the loop goes on while they are closed."""
    async with Listening(url) as own, Listening(f"{url}_", allow={OTHER_USER if allowed else 1}):
        await asyncio.to_thread(lambda: None)
        async with kucomms.connect(url, timeout=0) as link:
            await own.opened
            before = descriptors()
            arguments = "passes_lingering_as_another", f"{name}_", SHARED, when
            with Process(*arguments) as process:
                await process.says("ready")
                if when != "hello":
                    process.tell()
                    await process.says("set up")
                process.does("pass it", "passed")
                during = descriptors()
                async with asyncio.timeout(PATIENCE / 2):  # it blocks for longer
                    await until(lambda: hanging() == 1)
                    for _ in range(20):
                        await link.send(b"x")
                        assert (await link.receive()).data == b"x"
                assert len(descriptors()) <= len(during) + 1
                assert hanging() == 1
            await until(lambda: not hanging() and descriptors() == before)


async def test_strangers_cannot_make_us_keep_many_files(url, name):
    """Who is of our own user is let in meanwhile; the others wait, for those who knock."""
    async with Listening(url, allow={1}) as listening:
        await asyncio.to_thread(lambda: None)
        before = descriptors()
        with Process("passes_lingering_as_another", name, SHARED, "hello", 30) as process:
            await process.says("ready")
            process.does("pass them", "passed")
            await until(lambda: hanging() == 16)
            async with asyncio.timeout(PATIENCE / 2), kucomms.connect(url, timeout=0) as link:
                await link.send(b"x")
                assert (await link.receive()).data == b"x"
            assert hanging() == 16
            assert await listening.closed is None
        await until(lambda: not hanging() and descriptors() == before)


@pytest.mark.parametrize("flaw", ["lingering", "lingering besides"])
async def test_files_of_a_listener_of_another_user_do_not_block_us(url, name, flaw):
    async with Endpoint("root") as endpoint:
        await asyncio.to_thread(lambda: None)
        before = descriptors()
        with Process("offers_as_another", name, flaw) as process:
            await process.says("ready")
            async with asyncio.timeout(PATIENCE / 2):
                connecting = asyncio.create_task(
                    endpoint.connect(url, timeout=PATIENCE, owner=OTHER_USER)
                )
                await process.says("asked")
                process.does("pass it", "passed")
                with pytest.raises(ProtocolError):
                    await connecting
                await process.says("dropped")
            assert hanging() == 1
            process.tell()
        await until(lambda: not hanging() and descriptors() == before)


# ---- what others put in our way -------------------------------------------------


@pytest.fixture
def private(runtime_dir):
    """Our directory, which somebody made before us."""
    path = os.path.join(runtime_dir, "kucomms")
    os.mkdir(path, 0o700)
    yield path
    if os.path.islink(path):
        os.unlink(path)
    else:
        shutil.rmtree(path)


async def assert_refused(url, path, number):
    async with Endpoint("careful") as endpoint:
        before = descriptors()
        with pytest.raises(TransportError, match=re.escape(path)) as caught:
            await endpoint.listen(url)
        assert caught.value.errno == number
        assert url in str(caught.value)
        with pytest.raises(TransportError, match=re.escape(path)) as caught:
            await endpoint.connect(url, timeout=0)
        assert caught.value.errno == number
        assert descriptors() == before


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o710, 0o701, 0o750])
async def test_directory_that_others_can_enter(url, private, mode):
    os.chmod(private, mode)
    await assert_refused(url, private, errno.EPERM)
    assert os.listdir(private) == []


async def test_directory_of_another_user(url, private):
    os.chown(private, OTHER_USER, OTHER_USER)
    await assert_refused(url, private, errno.EPERM)
    assert os.stat(private).st_uid == OTHER_USER


async def test_directory_is_a_symbolic_link(url, private, tmp_path):
    os.rmdir(private)
    target = tmp_path / "target"
    target.mkdir(0o700)
    os.symlink(target, private)
    await assert_refused(url, private, errno.ENOTDIR)
    assert os.readlink(private) == str(target)
    assert os.listdir(target) == []


async def test_directory_is_a_file(url, private):
    os.rmdir(private)
    with open(private, "w") as file:
        file.write("mine")
    await assert_refused(url, private, errno.ENOTDIR)
    with open(private) as file:
        assert file.read() == "mine"
    os.unlink(private)
    os.mkdir(private)


@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo"])
async def test_name_is_not_a_socket(url, name, private, kind):
    path = os.path.join(private, name)
    match kind:
        case "file":
            open(path, "w").close()
        case "directory":
            os.mkdir(path)
        case "link":
            os.symlink("elsewhere", path)
        case "fifo":
            os.mkfifo(path)
    before = os.lstat(path)
    await assert_refused(url, path, errno.EPERM)
    assert os.path.samestat(os.lstat(path), before)


async def test_socket_of_another_user(url, name, private):
    """Alive or not, it is not ours to take over."""
    with Process("echo", url) as process:
        await process.says("ready")
        path = os.path.join(private, name)
        os.chown(path, OTHER_USER, OTHER_USER)
        await assert_refused(url, path, errno.EPERM)
        process.kill()
        await process.ended()
        await assert_refused(url, path, errno.EPERM)
        assert os.lstat(path).st_uid == OTHER_USER


async def test_shared_directory_that_others_can_write(url):
    """Only one that we made, or could have made, is used; the rest is given back."""
    async with Endpoint("careful") as endpoint:
        before = descriptors()
        os.mkdir(SHARED)
        try:
            os.chmod(SHARED, 0o777)
            with pytest.raises(TransportError, match=re.escape(SHARED)) as caught:
                await endpoint.listen(url, allow={OTHER_USER})
            assert caught.value.errno == errno.EPERM
            assert descriptors() == before
            with pytest.raises(NotReadyError):  # not in the private directory either
                await endpoint.connect(url, timeout=0)
        finally:
            os.rmdir(SHARED)
        await endpoint.listen(url, allow={OTHER_USER})


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o711])
async def test_shared_directory_lets_others_pass(url, mode):
    """Whatever its mode was: a process may have been killed while it made it."""
    options = json.dumps({"owner": 0, "timeout": PATIENCE})
    os.mkdir(SHARED)
    os.chmod(SHARED, mode)
    async with Listening(url, allow={OTHER_USER}):
        assert stat.S_IMODE(os.stat(SHARED).st_mode) == 0o711
        with Process("connects_as_another", url, options) as process:
            await process.says("echoed 0 ")
    assert not os.path.exists(SHARED)


async def test_shared_directory_does_not_depend_on_the_umask(url):
    before = os.umask(0o077)
    try:
        async with Listening(url, allow={OTHER_USER}):
            assert stat.S_IMODE(os.stat(SHARED).st_mode) == 0o711
    finally:
        os.umask(before)


async def test_fallback_directory(url, name, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    fallback = f"/tmp/kucomms-{os.geteuid()}"
    async with Listening(url), kucomms.connect(url, timeout=0) as link:
        about = os.lstat(fallback)
        assert stat.S_ISDIR(about.st_mode)
        assert stat.S_IMODE(about.st_mode) == 0o700
        assert about.st_uid == os.geteuid()
        assert stat.S_ISSOCK(os.lstat(os.path.join(fallback, name)).st_mode)
        await link.send(b"x")
        assert (await link.receive()).data == b"x"
    assert not os.path.exists(os.path.join(fallback, name))
