# SPDX-License-Identifier: MIT
"""What a device tells who waits for it, by poll, select, epoll and ioctl; and its memory."""

import errno
import os
import select
import signal
import threading
from pathlib import Path

import pytest

from tests.kernel.lifecycle import (
    DATA,
    PAGE,
    PATIENCE,
    SPACE,
    SPAN,
    Child,
    Raw,
    all_comes_back,
    create,
    failing,
    remove,
    until,
)

IN, OUT, HUP = select.POLLIN, select.POLLOUT, select.POLLHUP
BIG = 16 << 20
"""The largest ring."""


@pytest.fixture(scope="module", autouse=True)
def device(load, unload):
    load("kucomms")
    create("tutorial")
    yield
    remove("tutorial")
    unload("kucomms")


@pytest.fixture(autouse=True)
def comes_back(device):
    with all_comes_back(all_descriptors=True):
        yield


@pytest.fixture
def tutorial(device, load, unload):
    load("kucomms_tutorial")
    yield
    unload("kucomms_tutorial")


# ---- poll ----------------------------------------------------------------


def epoll_of(raw, flags=0):
    epoll = select.epoll()
    epoll.register(raw.fd, IN | OUT | flags)
    return epoll


def test_poll_before_the_set_up_tells_of_the_endpoint(load, unload):
    with Raw() as raw, epoll_of(raw) as epoll:
        assert raw.poll() == 0
        assert epoll.poll(0) == []
        assert select.select([raw.fd], [raw.fd], [], 0) == ([], [], [])
        with failing(errno.ENOTCONN):
            raw.setup()
        loader = threading.Thread(target=load, args=("kucomms_tutorial",))
        loader.start()
        assert raw.poll(PATIENCE) == IN | OUT
        loader.join()
        assert epoll.poll(0) == [(raw.fd, IN | OUT)]
        assert select.select([raw.fd], [raw.fd], [], 0) == ([raw.fd], [raw.fd], [])
        unload("kucomms_tutorial")
        assert raw.poll() == 0


def test_level_and_edge(tutorial):
    with Raw.linked() as raw, epoll_of(raw) as level, epoll_of(raw, select.EPOLLET) as edge:
        raw.park()
        assert raw.poll() == 0
        assert (level.poll(0), edge.poll(0)) == ([], [])
        raw.send(1)
        assert raw.poll(PATIENCE) == IN
        for _ in range(3):
            assert raw.poll() == IN
            assert level.poll(0) == [(raw.fd, IN)]
            assert select.select([raw.fd], [raw.fd], [], 0) == ([raw.fd], [], [])
        assert edge.poll(0) == [(raw.fd, IN)]
        assert edge.poll(0) == []
        assert raw.receive() == 1
        raw.park()
        assert raw.poll() == 0
        assert (level.poll(0), edge.poll(0)) == ([], [])


def test_poll_tells_of_room(tutorial):
    with Raw.linked() as raw:
        messages = PAGE // SPAN
        for number in range(2 * messages):  # fills the ring there and the one back
            until(raw.has_room, "no room")
            raw.send(number)
        until(lambda: raw.producer(0).position == PAGE, "not all was echoed")
        assert not raw.has_room()
        producer = raw.producer(1)
        producer.wanted = SPAN
        producer.parked += 1
        raw.kick()
        assert raw.poll() == 0
        with failing(errno.ETIMEDOUT):
            raw.wait(SPACE, timeout=0.01)
        assert raw.receive() == 0
        raw.kick()
        assert raw.wait(SPACE | DATA) == SPACE
        assert raw.poll() == OUT
        assert raw.has_room()


def test_the_end_is_for_good(load, unload):
    load("kucomms_tutorial")
    with Raw.linked() as raw, epoll_of(raw) as level, epoll_of(raw, select.EPOLLET) as edge:
        unload("kucomms_tutorial")
        load("kucomms_tutorial")
        try:
            for _ in range(3):
                assert raw.poll() == IN | HUP
                assert level.poll(0) == [(raw.fd, IN | HUP)]
                assert select.select([raw.fd], [], [], 0) == ([raw.fd], [], [])
            assert edge.poll(0) == [(raw.fd, IN | HUP)]
            assert edge.poll(0) == []
            for use in (raw.kick, raw.wait):
                with failing(errno.ESHUTDOWN):
                    use()
            assert raw.producer(0).state == 2
            raw.send(1, kick=False)  # what is mapped stays memory
            with Raw.linked() as new:
                new.echo(1)
        finally:
            unload("kucomms_tutorial")


# ---- the WAIT ioctl -------------------------------------------------------------------


def test_wait_does_not_wait(tutorial):
    with Raw.linked() as raw:
        os.set_blocking(raw.fd, False)  # the set-up waits for the endpoint's answer
        for events in (DATA, SPACE, DATA | SPACE):
            with failing(errno.EAGAIN):
                raw.wait(events)
        raw.park()
        raw.send(1)
        assert raw.poll(PATIENCE) == IN
        assert raw.wait() == DATA
        with failing(errno.EAGAIN):
            raw.wait(SPACE)


def test_wait_for_a_time(tutorial):
    with Raw.linked() as raw:
        for timeout in (0, 1e-9, 0.02):
            with failing(errno.ETIMEDOUT):
                raw.wait(timeout=timeout)


@pytest.mark.parametrize("timeout", [PATIENCE, None])
def test_wait_is_interrupted(tutorial, timeout):
    alarms = []
    before = signal.signal(signal.SIGALRM, lambda *_: alarms.append(0))
    try:
        with Raw.linked() as raw:
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
            with failing(errno.EINTR):
                raw.wait(timeout=timeout)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert alarms


def is_in_ioctl(thread):
    path = Path(f"/proc/self/task/{thread.native_id}")
    return (path / "stat").read_text().rpartition(")")[2].split()[0] == "S" and (
        path / "syscall"
    ).read_text().startswith("16 ")


@pytest.mark.parametrize("timeout", [PATIENCE, None])
@pytest.mark.parametrize("what", ["data", "shutdown"])
def test_wait_wakes(load, unload, what, timeout):
    load("kucomms_tutorial")
    loaded = True
    found = []

    def wait():
        try:
            found.append(raw.wait(timeout=timeout))
        except OSError as error:
            found.append(error.errno)

    try:
        with Raw.linked() as raw:
            raw.park()
            waiter = threading.Thread(target=wait)
            waiter.start()
            until(lambda: is_in_ioctl(waiter), "the thread does not wait")
            assert not found
            if what == "data":
                raw.send(1)
            else:
                unload("kucomms_tutorial")
                loaded = False
            waiter.join(PATIENCE)
            assert found == [DATA if what == "data" else errno.ESHUTDOWN]
    finally:
        if loaded:
            unload("kucomms_tutorial")


# ---- memory ------------------------------------------------------------------------


def current(cgroup):
    return int((cgroup / "memory.current").read_text())


def test_memory_is_the_users(tutorial, cgroup):
    """What a channel takes is on the account of who opened it."""

    def program(talk):
        (cgroup / "cgroup.procs").write_text("0")
        for size in (PAGE, BIG):
            with Raw() as raw:
                raw.setup(ring_size=size)
                talk.send(b"open")
                talk.recv(9)

    with Child(program) as child:
        child.says("open")
        least = current(cgroup)
        child.tell()
        child.says("open")
        assert current(cgroup) - least > 2 * BIG * 0.9
        child.tell()
        child.ends_well()
    until(lambda: current(cgroup) < BIG, "the memory is still charged")


def test_memory_limit(tutorial, cgroup):
    (cgroup / "memory.max").write_text(str(BIG // 2))

    def program(talk):
        (cgroup / "cgroup.procs").write_text("0")
        for _ in range(3):
            with Raw() as raw:
                with failing(errno.ENOMEM):
                    raw.setup(ring_size=BIG)
                raw.setup()
                raw.map(0)
                raw.map(1)
                raw.echo(1)

    with Child(program) as child:
        child.ends_well()
    assert "oom_kill 0" in (cgroup / "memory.events").read_text()
