# SPDX-License-Identifier: MIT
"""Every order in which a program can open, map, share and leave a device."""

import array
import errno
import mmap
import os
import select
import signal
import socket
import struct
from contextlib import nullcontext

import pytest

from tests.kernel.lifecycle import (
    PAGE,
    PATIENCE,
    SPAN,
    Child,
    Raw,
    all_comes_back,
    channels,
    create,
    ends,
    failing,
    has_device,
    mremap,
    munmap,
    remove,
    until,
    until_channels,
)

IN, HUP = select.POLLIN, select.POLLHUP
MREMAP_MAYMOVE = 1
BIG = 16 << 20
"""The largest ring: it takes its time to set up."""


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


def has_ended(raw):
    """The channel is over for its user, for good."""
    assert raw.poll(PATIENCE) & HUP
    for use in (raw.kick, raw.wait, lambda: raw.map_pages(0, 1)):
        with failing(errno.ESHUTDOWN):
            use()
    with failing(errno.EALREADY):
        raw.setup()


# ---- open, map, unmap, close ---------------------------------------------------


def test_close_without_mapping(tutorial):
    with Raw() as raw:
        raw.setup()
        assert channels() == 1
    until_channels(0)


def test_mappings_outlive_the_descriptor(tutorial):
    with Raw.linked() as raw:
        raw.echo(1)
        raw.close()
        assert channels() == 1
        raw.send(2, kick=False)
        assert raw.producer(1).position == 2 * SPAN
        assert raw.producer(0).position == SPAN
        raw.unmap(0)
        assert channels() == 1
        assert raw.consumer(1).position == SPAN
        raw.unmap(1)
        until_channels(0)


def test_unmapped_then_closed(tutorial):
    with Raw.linked() as raw:
        raw.echo(1)
        raw.unmap(1)
        assert channels() == 1
        raw.unmap(0)
        until_channels(0)
        has_ended(raw)


def test_parts(tutorial):
    """The channel lives until the last piece of it goes."""
    with Raw.linked(ring_size=4 * PAGE) as raw:
        extra = raw.map_pages(3, 3)  # these once more
        munmap(raw.sides[1] + 4 * PAGE, PAGE)  # a hole, behind what is used
        munmap(raw.sides[0] + 4 * PAGE, PAGE)
        raw.echo(1)
        raw.unmap(0)
        munmap(raw.sides[1], 4 * PAGE)
        munmap(raw.sides[1] + 5 * PAGE, PAGE)
        munmap(extra, 2 * PAGE)
        raw.kick()
        assert channels() == 1
        raw.unmap(1)
        raw.kick()
        assert channels() == 1
        munmap(extra + 2 * PAGE, PAGE)
        until_channels(0)
        has_ended(raw)


def test_mremap(tutorial):
    with Raw.linked(ring_size=4 * PAGE) as raw:
        size = raw.side_size
        for flags in (0, MREMAP_MAYMOVE):
            for length in (size + PAGE, 2 * size):
                with failing(errno.EFAULT):
                    mremap(raw.sides[1], size, length, flags)
        raw.echo(1)
        assert mremap(raw.sides[1], size, size - PAGE, 0) == raw.sides[1]
        raw.echo(2)
        raw.unmap(1)
        assert channels() == 1
        raw.unmap(0)
        until_channels(0)


def test_set_up_twice(tutorial):
    with Raw.linked() as raw:
        for _ in range(2):
            with failing(errno.EALREADY):
                raw.setup()
        raw.echo(1)


def test_before_the_set_up(tutorial):
    with Raw() as raw:
        for use in (raw.kick, raw.wait, lambda: raw.map_pages(0, 1)):
            with failing(errno.ENOTCONN):
                use()


def test_a_foreign_version_is_told_ours(tutorial):
    with Raw() as raw:
        for wrong in ({"version": 99}, {"version": 0}, {"features": 1 << 63}):
            with pytest.raises(OSError) as failure:  # noqa: PT011
                raw.setup(**wrong)
            assert failure.value.errno == errno.EPROTONOSUPPORT
            assert struct.unpack_from("<I4xQ", failure.value.argument) == (1, 3)  # turns, pools
        raw.setup()


def test_a_duplicate_descriptor(tutorial):
    with Raw.linked() as raw:
        first = raw.fd
        raw.fd = os.dup(first)
        os.close(first)
        raw.echo(1)
        with Raw.adopted(os.dup(raw.fd), raw.ring_size) as again:
            raw.close()
            again.kick()
            raw.fd, again.fd = again.fd, -1
        raw.echo(2)


# ---- processes -------------------------------------------------------------------


def test_open_and_exit(tutorial, unload, load):
    def program(talk):
        Raw()
        talk.send(b"open")
        talk.recv(9)

    with Child(program) as child:
        child.says("open")
        unload("kucomms_tutorial")
        with failing(errno.EBUSY):
            remove("tutorial")
        child.tell()
        child.ends_well()
        remove("tutorial")
        create("tutorial")
        load("kucomms_tutorial")


@pytest.mark.parametrize("mapped", [True, False])
def test_a_child_outlives_its_parent(tutorial, mapped):
    """Mapped, the channel ends with its process. Before that it is whoever holds it."""

    def program(talk):
        raw = Raw.linked() if mapped else Raw()
        if mapped:
            raw.echo(1)
        else:
            raw.setup()
        if os.fork():
            signal.pause()
        talk.send(str(os.getpid()).encode())
        talk.recv(9)
        assert bool(raw.poll() & HUP) == mapped
        with failing(errno.ESHUTDOWN) if mapped else nullcontext():
            raw.kick()
        talk.send(b"done")
        talk.recv(9)

    with Child(program) as parent:
        child = int(parent.hears())
        assert channels() == 1
        parent.kill()
        if mapped:
            until_channels(0)
        assert has_device(child)
        assert channels() == (not mapped)
        parent.tell()
        parent.says("done")
        with ends(child):
            parent.tell()
        until_channels(0)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_exec(tutorial, kept, mapped):
    """A program that is executed has no mappings, and the descriptor where that was asked for."""

    def program(talk):
        flags = 0 if kept else os.O_CLOEXEC
        if mapped:
            Raw.linked(flags=flags).echo(1)
        else:
            Raw(flags=flags).setup()
        os.dup2(talk.fileno(), 0)
        os.dup2(talk.fileno(), 1)
        os.execv("/bin/cat", ["cat"])

    with Child(program) as child:
        child.tell("it runs")
        child.says("it runs")
        until_channels(int(kept and not mapped))
        assert has_device(child.pid) == kept
        child.kill()
        until_channels(0)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_descriptor_given_away(tutorial, mapped):
    """Over a Unix socket. The channel is theirs who have it mapped."""

    def program(talk):
        raw = Raw.linked()
        raw.echo(1)
        fds = array.array("i", [raw.fd])
        talk.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        raw.close()
        signal.pause()

    with Child(program) as giver:
        _, ancillary, _, _ = giver.socket.recvmsg(1, socket.CMSG_SPACE(4))
        (fd,) = array.array("i", ancillary[0][2])
        with Raw.adopted(fd, PAGE) as raw:
            raw.kick()
            assert raw.poll() & IN  # the bell that rang for the giver
            if mapped:
                raw.map(0)
                raw.map(1)
            giver.kill()
            if not mapped:
                until_channels(0)
                has_ended(raw)
            else:
                assert channels() == 1
                for number in range(100):
                    raw.echo(number)
    until_channels(0)


@pytest.mark.parametrize("after", [1, 2, 3, 5, 8, 13, 21, 64, 65, 200, 500])
def test_killed_in_the_middle_of_a_stream(tutorial, after):
    count = mmap.mmap(-1, PAGE)

    def program(talk):
        raw = Raw.linked()
        talk.send(b"begins")
        number = 0
        while True:
            while raw.has_room():
                raw.send(number, kick=number % 5 == 0)
                number += 1
            raw.kick()
            while raw.receive() is not None:
                count[:8] = struct.pack("<Q", struct.unpack("<Q", count[:8])[0] + 1)

    with count, Child(program) as child:
        child.says("begins")
        until(lambda: struct.unpack("<Q", count[:8])[0] >= after, "nothing is echoed")
        child.kill()
    until_channels(0)


def test_killed_in_the_set_up(tutorial):
    count = mmap.mmap(-1, PAGE)

    def program(talk):
        talk.send(b"begins")
        while True:
            with Raw() as raw:
                count[0] = 1
                raw.setup(ring_size=BIG)
                count[0] = 0
                count[1] = min(count[1] + 1, 255)

    inside = 0
    with count:
        for number in range(20):
            count[:2] = bytes(2)
            with Child(program) as child:
                child.says("begins")
                until(lambda: count[1] >= number % 3 and count[0], "no set-up begins")  # noqa: B023
                for _ in range(number * 50):  # elsewhere in there each time
                    os.getppid()
                child.kill()
                inside += count[0]
    assert inside >= 5
    until_channels(0)
