# SPDX-License-Identifier: MIT
"""The kernel examples; what the longtest does for half a minute is in test_session.py."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kucomms
from kucomms.testing import numbered, verify

ROOT = Path(__file__).resolve().parents[2]
SYSFS = Path("/sys/devices/virtual/kucomms/kucomms")
PATIENCE = 120.0


@pytest.fixture
def tutorial(main_module, load, unload):
    (SYSFS / "create_device").write_text("kucomms_tutorial\n")
    load("kucomms_tutorial")
    yield
    unload("kucomms_tutorial")
    (SYSFS / "remove_device").write_text("kucomms_tutorial\n")


@pytest.mark.asyncio
async def test_tutorial_echoes(tutorial):
    count, ahead = 10_000, 500
    async with kucomms.connect("kernel://tutorial", timeout=PATIENCE) as link:
        assert link.peer.kernel
        room = asyncio.Semaphore(ahead)

        async def send():
            for number in range(count):
                await room.acquire()
                await link.send(numbered(number, number % 200, type=number % 7))

        sender = asyncio.ensure_future(send())
        async with asyncio.timeout(PATIENCE):
            for number in range(count):
                message = await link.receive()
                verify(message, number)
                assert (message.type, len(message)) == (number % 7, number % 200)
                room.release()
        await sender
        top = kucomms.Message(b"", 2**64 - 1, 2**64 - 1, 2**64 - 1)
        await link.send(top)
        assert await asyncio.wait_for(link.receive(), PATIENCE) == top


@pytest.mark.asyncio
async def test_tutorial_keeps_an_echo_of_the_largest_message(tutorial):
    async with kucomms.connect("kernel://tutorial", ring_size=1 << 14, timeout=PATIENCE) as link:
        for number in range(20):
            await link.send(numbered(number, link.max_message_size))
            verify(await asyncio.wait_for(link.receive(), PATIENCE), number)


async def read_late(url):
    """Send, and read nothing, until all rings are full; then nothing is lost."""
    count = 300
    async with kucomms.connect(url, ring_size=1 << 12, timeout=PATIENCE) as link:

        async def send():
            for number in range(count):
                await link.send(numbered(number, 1000))

        async with asyncio.timeout(PATIENCE):
            sender = asyncio.ensure_future(send())
            span = 1032
            while link.tx_free >= span or link.rx_free >= span:  # noqa: ASYNC110
                await asyncio.sleep(0)
            number = 0
            while number < count:
                message = await link.receive()
                if message.type == 0:
                    verify(message, number)
                    number += 1
            await sender


@pytest.mark.asyncio
async def test_tutorial_waits_for_one_who_does_not_read(tutorial):
    await read_late("kernel://tutorial")


@pytest.mark.asyncio
async def test_tutorial_lets_go_of_one_who_never_reads(tutorial):
    """An echo that waits for room does not keep the channel."""
    async with kucomms.connect("kernel://tutorial", ring_size=1 << 12, timeout=PATIENCE) as link:
        async with asyncio.timeout(PATIENCE):
            while link.rx_free >= 1032 or link.tx_free >= 1032:
                with contextlib.suppress(kucomms.QueueFull):
                    link.send_nowait(bytes(1000))
                await asyncio.sleep(0)
    channels = SYSFS.parent / "kucomms_tutorial" / "channels"
    async with asyncio.timeout(PATIENCE):
        while int(channels.read_text()):  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.fixture
def longtest(main_module, load, unload):
    (SYSFS / "create_device").write_text("kucomms_longtest\n")
    load("kucomms_longtest")
    yield
    unload("kucomms_longtest")
    (SYSFS / "remove_device").write_text("kucomms_longtest\n")


@pytest.mark.asyncio
async def test_longtest_waits_for_one_who_does_not_read(longtest):
    await read_late("kernel://longtest")


@pytest.mark.asyncio
async def test_longtest_counts_what_is_wrong(longtest, kernel_log):
    """An echo that was changed, and one that does not come."""
    async with kucomms.connect("kernel://longtest", timeout=PATIENCE) as link:
        async with asyncio.timeout(PATIENCE):
            for number in range(1, 20):
                message = await link.receive()
                assert (message.type, message.id) == (1, number)
                if number == 5:
                    await link.send(message, user_value=0)
                elif number != 9:
                    await link.send(message)
    lines = []
    expected = f"pid {os.getpid()}: avail_tx1="
    async with asyncio.timeout(PATIENCE):
        while not any(expected in x and "compare_error_count=2" in x for x in lines):
            await asyncio.sleep(0)
            lines += kernel_log()


# ---- the camera -----------------------------------------------------------------


@pytest.fixture
def camera(main_module, load, unload):
    (SYSFS / "create_device").write_text("kucomms_camera\n")
    load("kucomms_camera", "rate=100")
    yield
    unload("kucomms_camera")
    (SYSFS / "remove_device").write_text("kucomms_camera\n")


def watch_camera(*arguments, meanwhile=None):
    """What the example prints in its last line; ``meanwhile(process)``: after its first one."""
    with subprocess.Popen(
        [sys.executable, "-u", ROOT / "examples" / "camera.py", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            if meanwhile is not None:
                assert process.stdout.readline().startswith("frame ")
                meanwhile(process)
            out, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")
    last = out.splitlines()[-1]
    found = re.fullmatch(r"(\d+) frames in [\d.]+ s, (\d+) dropped, (\d+) torn", last)
    return [int(number) for number in found.groups()]


def test_the_camera_shows_whole_frames_and_drops_what_nobody_has_room_for(camera):
    """One program after the other; of the second 15 of 16 are kept, and the last one as well
    while the program stands still.
    """
    frames, _dropped, torn = watch_camera("--frames", "40")
    assert (frames, torn) == (40, 0)

    def stand_still(process):
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)  # time is the subject: 50 frames
        process.send_signal(signal.SIGCONT)

    frames, dropped, torn = watch_camera("--frames", "250", "--hold", "15", meanwhile=stand_still)
    assert (frames, torn) == (250, 0)
    assert dropped > 0


@pytest.mark.asyncio
async def test_the_camera_goes_on_when_frames_come_back(camera):
    """With all of its buffers here it drops and counts, and nothing more comes."""
    async with kucomms.connect("kernel://camera", timeout=PATIENCE) as link:
        async with asyncio.timeout(PATIENCE):
            kept = [await link.receive() for _ in range(16)]
            assert [message.id for message in kept] == sorted(message.id for message in kept)
            # It has found no room for the next ones; it says so with the next that comes.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):  # time is the subject
                    await link.receive()
            for message in kept:
                message.buffers[0].free()
            message = await link.receive()
        assert message.user_value > 0
        assert message.id == 16 + message.user_value
