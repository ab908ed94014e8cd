# SPDX-License-Identifier: MIT
"""Endpoint behaviour that has to do with time, life and misuse; on both loops."""

import asyncio
import os
import subprocess
import sys
import time

import pytest

import kucomms
from kucomms import ClosedError, Endpoint, UsageError


async def _until(condition, patience=30.0):
    """Give way to the loop until something is so."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0)


def _ticks(endpoint):
    seen = endpoint.statistics()
    return seen.work_ticks + seen.work_missed


@pytest.mark.parametrize("flood", [False, True], ids=["quiet", "flood"])
@pytest.mark.asyncio
async def test_ten_seconds_of_100_hz(flood):
    """Calls and counted misses add up to 1000 +- 1, also while messages flood in."""
    endpoint = Endpoint("ticks")
    calls = timer_calls = 0
    messages = 0

    @endpoint.on_work
    def work():
        nonlocal calls
        calls += 1

    @endpoint.on_timer
    def timer(now):
        nonlocal timer_calls
        timer_calls += 1

    @endpoint.on_message
    def message(message, link):
        nonlocal messages
        messages += 1
        link.send_nowait(message)  # to and fro for ever

    other = Endpoint("other", on_message=lambda message, link: link.send_nowait(message))
    async with other, endpoint:
        await endpoint.listen("inproc://ticks")
        link = await other.connect("inproc://ticks")
        if flood:
            for _ in range(500):
                link.send_nowait(bytes(64))
        await asyncio.sleep(10.0)  # time is the subject
        seen = endpoint.statistics()
    assert abs(seen.work_ticks + seen.work_missed - 1000) <= 1, seen
    assert calls == seen.work_ticks == seen.work_calls
    assert abs(seen.timer_ticks + seen.timer_missed - 10) <= 1
    assert timer_calls == seen.timer_ticks
    assert seen.work_ticks > 500, seen
    if flood:
        assert messages > 10_000
    else:
        assert seen.work_missed <= 20, seen  # none on an idle machine; this may not be one


@pytest.mark.asyncio
async def test_slow_handler_delays_the_ticks_and_is_made_up_for_never():
    """Ticks missed behind a slow handler are counted, and the rate is right afterwards."""
    endpoint = Endpoint("slow")
    stamps = []
    release = asyncio.Event()
    held = asyncio.Event()

    @endpoint.on_work
    def work():
        stamps.append(time.monotonic())

    @endpoint.on_message
    async def message(message, link):
        held.set()
        await release.wait()

    async with endpoint:
        await endpoint.listen("inproc://slow")
        async with kucomms.connect("inproc://slow") as link:
            await link.send(b"")
            await held.wait()
            before, begin = len(stamps), time.monotonic()
            await asyncio.sleep(0.5)  # time is the subject
            assert len(stamps) == before, "a tick ran beside the handler"
            release.set()
            await _until(lambda: len(stamps) > before)
            first = time.monotonic() - begin
            missed = endpoint.statistics().work_missed
            assert abs(missed - first * 100) <= 3
            # no burst: the next ones come a period apart, on the average 100 Hz
            start, ticks = time.monotonic(), _ticks(endpoint)
            await asyncio.sleep(2.0)  # time is the subject
            elapsed, ticks = time.monotonic() - start, _ticks(endpoint) - ticks
            assert abs(ticks - elapsed * 100) <= 2
    gaps = [b - a for a, b in zip(stamps[before:], stamps[before + 1 :], strict=False)]
    assert sorted(gaps)[len(gaps) // 2] == pytest.approx(0.01, abs=0.003)


@pytest.mark.asyncio
async def test_blocking_handler_lets_ticks_in_between_messages():
    """A handler that blocks the loop delays a tick by a few messages, not by a batch."""
    endpoint = Endpoint("blocks", batch=1000)
    order = []

    @endpoint.on_work
    def work():
        order.append("work")

    @endpoint.on_message
    def message(message, link):
        order.append("message")
        end = time.monotonic() + 0.002
        while time.monotonic() < end:
            pass

    async with endpoint:
        await endpoint.listen("inproc://blocks")
        async with kucomms.connect("inproc://blocks") as link:
            await link.send_many([b""] * 300)
            await _until(lambda: order.count("message") == 300)
    # 300 messages of 2 ms are 60 ticks; a look at the clock comes every 8 messages
    assert order.count("work") > 20


@pytest.mark.asyncio
async def test_work_that_returns_true_is_called_again_and_starves_nobody():
    endpoint = Endpoint("again", work_hz=1.0)
    calls = seen = turns = 0

    @endpoint.on_work
    async def work():
        nonlocal calls
        calls += 1
        return True

    @endpoint.on_message
    def message(message, link):
        nonlocal seen
        seen += 1

    async def other_task():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with endpoint:
        await endpoint.listen("inproc://again")
        task = asyncio.ensure_future(other_task())
        async with kucomms.connect("inproc://again") as link:
            await _until(lambda: calls > 1000)
            for _ in range(100):
                await link.send(b"")
            before = calls
            await _until(lambda: seen == 100)
            assert calls - before < 10_000
        assert turns > 100
        task.cancel()
    assert endpoint.statistics().work_ticks <= 60
    assert endpoint.statistics().work_calls == calls


@pytest.mark.asyncio
async def test_idle_endpoint_costs_no_wakeups():
    """No handlers but messages, nothing to do: not one turn of the loop."""
    endpoint = Endpoint("idle", on_message=lambda message, link: None)
    async with endpoint:
        await endpoint.listen("shm://idle")
        async with kucomms.connect("shm://idle") as link:
            await link.send(b"")
            await _until(lambda: endpoint.statistics().message_calls == 1)
            await _until(lambda: endpoint._sleep is not None)  # it has parked
            wakeups = endpoint.statistics().wakeups

            def switches():
                with open("/proc/self/status") as status:
                    return sum(int(line.split()[1]) for line in status if "_switches" in line)

            before = switches()
            await asyncio.sleep(2.0)  # time is the subject
            assert switches() - before <= 5  # the end of this sleep, and reading the file
            assert endpoint.statistics().wakeups == wakeups


@pytest.mark.asyncio
async def test_life_of_an_endpoint():
    endpoint = Endpoint("once")
    with pytest.raises(UsageError, match="not running"):
        await endpoint.connect("inproc://nobody", timeout=0)
    async with endpoint:
        waiting = asyncio.ensure_future(endpoint.serve_forever())
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting
    await endpoint.aclose()
    with pytest.raises(ClosedError):
        await endpoint.listen("inproc://once")
    with pytest.raises(UsageError, match="make a new one"):
        await endpoint.__aenter__()


@pytest.mark.asyncio
async def test_leaving_cancels_a_waiting_handler_and_runs_the_close_handlers():
    endpoint = Endpoint("leaving")
    events = []
    held = asyncio.Event()

    @endpoint.on_message
    async def message(message, link):
        held.set()
        try:
            await asyncio.Event().wait()
        finally:
            events.append("handler ended")

    @endpoint.on_link_close
    async def closed(link, error):
        await asyncio.sleep(0)
        events.append(error)

    async with endpoint:
        await endpoint.listen("inproc://leaving")
        link = await kucomms.connect("inproc://leaving")
        await link.send(b"")
        await held.wait()
    assert events == ["handler ended", None]
    with pytest.raises(kucomms.PeerClosedError):
        await link.receive()


@pytest.mark.asyncio
async def test_endpoint_can_be_closed_by_its_own_handler():
    endpoint = Endpoint("suicide")
    closed = []

    @endpoint.on_message
    async def message(message, link):
        await endpoint.aclose()
        await endpoint.aclose()

    endpoint.on_link_close(lambda link, error: closed.append(error))
    async with endpoint:
        await endpoint.listen("inproc://suicide")
        async with kucomms.connect("inproc://suicide") as link:
            await link.send(b"")
            await endpoint.serve_forever()
            with pytest.raises(kucomms.PeerClosedError):
                await link.receive()
    assert closed == [None]


@pytest.mark.asyncio
async def test_handler_may_close_its_link():
    endpoint = Endpoint("closer")
    seen = []

    @endpoint.on_message
    async def message(message, link):
        seen.append(message.id)
        if message.id == 3:
            await link.aclose()

    async with endpoint:
        await endpoint.listen("inproc://closer")
        async with kucomms.connect("inproc://closer") as link:
            await link.send_many([kucomms.Message(id=number) for number in range(10)])
            async for _ in link:
                pass
    assert seen == [0, 1, 2, 3]


@pytest.mark.asyncio
async def test_unreported_errors_are_logged_and_counted(capsys):
    def fails():
        raise ValueError("broken work")

    endpoint = Endpoint("logs", on_work=fails, work_hz=1000.0)
    async with endpoint:
        await _until(lambda: endpoint.statistics().handler_errors >= 2)
    text = capsys.readouterr().out
    assert "handler_failed" in text
    assert "broken work" in text


@pytest.mark.asyncio
async def test_many_urls_and_many_listeners():
    endpoint = Endpoint("many", on_message=lambda message, link: link.send_nowait(message))
    async with endpoint:
        listeners = [
            await endpoint.listen(url) for url in ("inproc://many_a", "inproc://many_b",
                                                   "shm://many_a")
        ]
        for listener in listeners:
            async with kucomms.connect(listener.url) as link:
                await link.send(b"hi")
                assert (await link.receive()).data == b"hi"
        link = await kucomms.connect("shm://many_a")
        await listeners[2].aclose()
        with pytest.raises(kucomms.NotReadyError):
            await kucomms.connect("shm://many_a", timeout=0)
        await link.send(b"still")  # closing a listener keeps its links
        assert (await link.receive()).data == b"still"
        await link.aclose()
        await listeners[2].aclose()


@pytest.mark.asyncio
async def test_busy_polling_finds_messages_and_gives_way():
    """With busy_poll the endpoint polls before it parks; other tasks have their turns."""
    endpoint = Endpoint("polls", busy_poll=0.005)
    endpoint.on_message(lambda message, link: link.send_nowait(message))
    async with endpoint:
        await endpoint.listen("shm://polls")
        async with kucomms.connect("shm://polls") as link:
            for number in range(300):
                await link.send(b"", id=number)
                assert (await link.receive()).id == number
            seen = endpoint.statistics()
            assert seen.polls_hit + seen.polls_missed > 0
            assert seen.time_polling > 0
            assert endpoint.links[0].statistics().polls_hit <= seen.polls_hit


@pytest.mark.asyncio
async def test_bad_options():
    for options in ({"batch": 0}, {"backlog": -1}, {"busy_poll": -1.0}, {"work_hz": 0.0}):
        with pytest.raises(ValueError):  # noqa: PT011
            Endpoint("bad", **options)
    with pytest.raises(TypeError, match="callable"):
        Endpoint("bad", on_message=5)
    async with Endpoint("bad") as endpoint:
        with pytest.raises(ValueError, match="hello"):
            await endpoint.listen("inproc://bad", hello=bytes(65))
        with pytest.raises(ValueError, match="ring_size"):
            await endpoint.listen("inproc://bad", ring_size=0)
        with pytest.raises(ValueError, match="ring_size"):
            await endpoint.connect("inproc://bad", ring_size=1 << 33)


@pytest.mark.asyncio
async def test_connect_link_ends_what_is_behind_it():
    before = len(asyncio.all_tasks())
    fds = len(os.listdir("/proc/self/fd"))
    async with Endpoint("behind") as endpoint:
        await endpoint.listen("shm://behind")
        link = await kucomms.connect("shm://behind")
        await link.aclose()
        await _until(lambda: not endpoint.links)
    await _until(lambda: len(asyncio.all_tasks()) <= before)
    assert len(os.listdir("/proc/self/fd")) <= fds


def test_run_uses_uvloop():
    import uvloop

    async def main():
        return isinstance(asyncio.get_running_loop(), uvloop.Loop)

    assert kucomms.run(main())


@pytest.mark.asyncio
async def test_closing_while_the_error_handler_waits():
    endpoint = Endpoint("reports")
    events = []
    held = asyncio.Event()

    @endpoint.on_message
    async def message(message, link):
        raise ValueError

    @endpoint.on_error
    async def failed(error, name):
        held.set()
        await asyncio.Event().wait()

    endpoint.on_link_close(lambda link, error: events.append(error))
    async with endpoint:
        await endpoint.listen("inproc://reports")
        link = await kucomms.connect("inproc://reports")
        await link.send(b"")
        await held.wait()
    assert events == [None]
    await link.aclose()


@pytest.mark.asyncio
async def test_a_second_close_leaves_the_close_handlers_alone():
    endpoint = Endpoint("twice")
    events = []
    held, release = asyncio.Event(), asyncio.Event()

    @endpoint.on_link_close
    async def closed(link, error):
        held.set()
        await release.wait()
        events.append("ran to its end")

    await endpoint.__aenter__()
    await endpoint.listen("inproc://twice")
    link = await kucomms.connect("inproc://twice")
    first = asyncio.ensure_future(endpoint.aclose())
    await held.wait()
    second = asyncio.ensure_future(endpoint.aclose())
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(first, second)
    assert events == ["ran to its end"]
    await link.aclose()


@pytest.mark.asyncio
async def test_a_handler_that_is_registered_ends_receives():
    async with Endpoint("takes") as endpoint:
        await endpoint.listen("inproc://takes")
        link = await endpoint.connect("inproc://takes")
        waiting = asyncio.ensure_future(link.receive())
        await asyncio.sleep(0)
        endpoint.on_message(lambda message, link: None)
        with pytest.raises(UsageError, match="message handler"):
            await waiting


@pytest.mark.asyncio
async def test_close_before_the_other_side_has_begun():
    """In process, the listener may close before the connecting side has started."""
    import threading

    listening, over = threading.Event(), threading.Event()

    def serve():
        async def main():
            async with Endpoint("early") as endpoint:
                endpoint.on_link_open(lambda link: link._close_here())
                await endpoint.listen("inproc://early")
                listening.set()
                await asyncio.to_thread(over.wait)

        asyncio.run(main())

    thread = threading.Thread(target=serve)
    thread.start()
    listening.wait()
    for _ in range(20):
        connecting = asyncio.ensure_future(kucomms.connect("inproc://early")._open())
        await asyncio.sleep(0)
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            threading.Event().wait(0.001)  # this loop is blocked, the other side gets ahead
        link = await connecting
        with pytest.raises(kucomms.PeerClosedError):
            await asyncio.wait_for(link.receive(), 10.0)
    over.set()
    await asyncio.to_thread(thread.join)


@pytest.mark.asyncio
async def test_python_code_that_runs_inside_the_core_may_close_the_link():
    """The garbage collector, or a sequence's own code, closes the link in mid-call."""
    import gc

    class Closer:
        def __init__(self, link):
            self.link = link
            self.me = self

        def __del__(self):
            self.link._close_here()

    class Closing(list):
        def __init__(self, items, link):
            super().__init__(items)
            self.link = link

        def __getitem__(self, index):
            if index == 5:
                self.link._close_here()
            return super().__getitem__(index)

    async with Endpoint("core") as endpoint:
        opened = []
        endpoint.on_link_open(opened.append)
        await endpoint.listen("inproc://core")
        link = await kucomms.connect("inproc://core")
        with pytest.raises(ClosedError):
            link.send_many_nowait(Closing([b"x"] * 10, link))
        link = await kucomms.connect("inproc://core")
        await _until(lambda: len(opened) == 2)
        opened[1].send_many_nowait([b"y"] * 500)
        thresholds = gc.get_threshold()
        gc.set_threshold(1)
        try:
            Closer(link)  # a cycle: the collector will find it
            with pytest.raises(ClosedError):  # noqa: PT012
                while True:
                    await link.receive()
        finally:
            gc.set_threshold(*thresholds)


_WAIT_FOR_A_LOOP = """
import asyncio, os, queue, sys, threading, uvloop
import kucomms

how, which = sys.argv[1:]
loop = {"asyncio": asyncio, "uvloop": uvloop}[which].new_event_loop()

async def start():
    endpoint = await kucomms.Endpoint("idle").__aenter__()
    await endpoint.listen("inproc://stopped")
    link = await kucomms.connect("inproc://stopped")
    while how == "send" and link.tx_free > 1000:
        await link.send(bytes(500))
    return endpoint, link

async def until(condition):
    while not condition():
        await asyncio.sleep(0)

endpoint, link = loop.run_until_complete(start())
ended = queue.Queue()

def wait(timeout):
    try:
        if how == "receive":
            link.receive_threadsafe(timeout)
        else:
            link.send_threadsafe(bytes(2000), timeout=timeout)
    except kucomms.KucommsError as error:
        ended.put(error)

def begin(timeout):
    threading.Thread(target=wait, args=[timeout], daemon=True).start()

for timeout in (0, 0.05):
    begin(timeout)
    print(type(ended.get(timeout=10)).__name__)
if how == "receive":  # who gave up takes no message
    loop.run_until_complete(endpoint.links[0].send(b"there"))
    for _ in range(10):
        loop.run_until_complete(asyncio.sleep(0))
    print(loop.run_until_complete(link.receive()).data)
begin(None)
loop.run_until_complete(until(lambda: link._receive_queue or link._send_queue))
loop.close()
error = ended.get(timeout=10)
print(type(error).__name__, "loop of the endpoint has ended" in str(error), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("which", ["asyncio", "uvloop"])
@pytest.mark.parametrize("how", ["receive", "send"])
def test_threads_that_wait_for_a_loop_that_does_not_run(which, how):
    """Their time-out is kept; when the loop is closed, they hear of that."""
    command = [sys.executable, "-c", _WAIT_FOR_A_LOOP, how, which]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    full = ["QueueFull"] * 2 if how == "send" else ["QueueEmpty", "QueueEmpty", "b'there'"]
    assert ended.stdout.splitlines() == [*full, "ClosedError True"], ended.stderr
