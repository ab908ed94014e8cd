# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC220, PLW0108, PT012, PT017
"""Forking and executing with live links: it works, or it is a clear error."""

import asyncio
import gc
import itertools
import os
import subprocess
import sys

import pytest

import kucomms
from kucomms import Endpoint, UsageError
from tests.transports.processes import PATIENCE, Process, in_child, read_all

pytestmark = pytest.mark.asyncio

_numbers = itertools.count()


@pytest.fixture(params=["shm", "inproc"])
def url(request):
    return f"{request.param}://fork_{os.getpid()}_{next(_numbers)}"


def run_at_once(coroutine):
    """Run a coroutine that does not have to wait; the child has no loop."""
    try:
        coroutine.send(None)
    except StopIteration as result:
        return result.value
    coroutine.close()
    raise AssertionError("it waits")


class Pair:
    """Two endpoints here, linked; ``other`` echoes."""

    async def __aenter__(self):
        self.endpoint, self.other = Endpoint("mine"), Endpoint("other")
        await self.endpoint.__aenter__()
        await self.other.__aenter__()
        self.other.on_message(lambda message, link: link.send(message))
        return self

    async def connect(self, url):
        self.listener = await self.other.listen(url)
        self.link = await self.endpoint.connect(url, timeout=0)
        await self.check()

    async def check(self):
        async with asyncio.timeout(PATIENCE):
            for size in (0, 1, 100_000):
                await self.link.send(bytes(size))
                assert len(await self.link.receive()) == size
        statistics = self.link.statistics()
        assert statistics.messages_sent == statistics.messages_received

    async def __aexit__(self, *exception):
        await self.endpoint.__aexit__(*exception)
        await self.other.__aexit__(*exception)


async def test_links_cannot_be_used_in_the_child(url):
    async with Pair() as pair:
        await pair.connect(url)
        link, endpoint = pair.link, pair.endpoint
        before = link.statistics()

        def child():
            attempts = {
                "send": lambda: run_at_once(link.send(b"x")),
                "send_nowait": lambda: link.send_nowait(b"x"),
                "send_threadsafe": lambda: link.send_threadsafe(b"x"),
                "send_many": lambda: run_at_once(link.send_many([b"x"])),
                "send_many_nowait": lambda: link.send_many_nowait([b"x"]),
                "loan": lambda: link.loan(10).__enter__(),
                "receive": lambda: run_at_once(link.receive()),
                "receive_nowait": lambda: link.receive_nowait(),
                "borrow": lambda: link.borrow(),
                "request": lambda: run_at_once(link.request(b"x")),
                "reply": lambda: run_at_once(link.reply(kucomms.Message(b""), b"x")),
                "aclose": lambda: run_at_once(link.aclose()),
                "wait_closed": lambda: run_at_once(link.wait_closed()),
                "iterate": lambda: run_at_once(link.__anext__()),
                "connect": lambda: run_at_once(endpoint.connect(url)),
                "listen": lambda: run_at_once(endpoint.listen(url + "_new")),
                "endpoint.aclose": lambda: run_at_once(endpoint.aclose()),
                "broadcast": lambda: endpoint.broadcast(b"x"),
            }
            for what, attempt in attempts.items():
                try:
                    attempt()
                except UsageError as error:
                    assert "fork" in str(error), (what, error)
                else:
                    raise AssertionError(f"{what} does not mind the fork")
            assert link.statistics() == before
            assert endpoint.statistics().links_opened == 1
            assert (link.tx_avail, link.tx_free, link.rx_avail) == (0, 0, 0)

        await in_child(child)
        await pair.check()


async def test_sends_that_wait_in_the_parent_are_not_seen_in_the_child(url):
    async with Pair() as pair:
        await pair.other.listen(url)
        link = await pair.endpoint.connect(url)
        with pytest.raises(kucomms.QueueFull):
            while True:  # the other side has no message handler (yet), and reads nothing
                link.send_nowait(bytes(100_000))
        waiting = asyncio.create_task(link.send(bytes(500_000)))
        await asyncio.sleep(0)
        assert not waiting.done()

        def child():
            for attempt in (link.send_nowait, link.send_threadsafe):
                with pytest.raises(UsageError, match="fork"):
                    attempt(b"x")
            with pytest.raises(UsageError, match="fork"), link.loan(10):
                pass

        await in_child(child)
        pair.other.on_message(lambda message, link: None)
        async with asyncio.timeout(PATIENCE):
            await waiting


async def test_views_that_a_child_inherits(url):
    """They read as zeros; letting go of them does no harm on either side."""
    async with Pair() as pair:
        await pair.connect(url)
        await pair.link.send(b"borrowed")
        async with pair.link.borrow() as message:
            with pair.link.loan(16) as loan:
                loan.data[:] = b"of the parent..."

                def child():
                    assert bytes(message.data) == bytes(8)
                    loan.data[:] = b"of the child...."
                    with pytest.raises(UsageError, match="fork"):
                        loan.__exit__(None, None, None)
                    message.data.release()

                await in_child(child)
                assert message.data == b"borrowed"
                assert loan.data == b"of the parent..."
        assert (await pair.link.receive()).data == b"of the parent..."
        await pair.check()


async def test_listener_cannot_be_closed_in_the_child():
    url = f"shm://fork_{os.getpid()}_{next(_numbers)}"
    async with Pair() as pair:
        await pair.connect(url)

        def child():
            with pytest.raises(UsageError, match="fork"):
                run_at_once(pair.listener.aclose())

        await in_child(child)
        link = await pair.endpoint.connect(url, timeout=0)
        await link.send(b"x")
        assert (await link.receive()).data == b"x"


async def test_child_goes_on_with_endpoints_of_its_own(url):
    """Also under the same name, in a loop of its own."""
    async with Pair() as pair:
        await pair.connect(url)

        def child():
            async def main():
                async with Pair() as new:
                    if url.startswith("shm"):
                        with pytest.raises(kucomms.AddressInUseError):
                            await new.endpoint.listen(url)
                        link = await new.endpoint.connect(url)  # to the parent
                        await link.send(b"x")
                        assert (await link.receive()).data == b"x"
                        assert link.peer.pid == os.getppid()
                        await new.connect(url + "_child")
                    else:
                        with pytest.raises(kucomms.NotReadyError):
                            await new.endpoint.connect(url, timeout=0)
                        await new.connect(url)
                    await new.check()

            asyncio.run(main())

        await in_child(child)
        await pair.check()


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_child_that_unwinds(url):
    """A child that leaves by an exception tears down its copy of everything."""
    async with Pair() as pair:
        await pair.connect(url)

        def child():
            # what the end of the endpoints' tasks does, and the end of the interpreter
            for endpoint in (pair.endpoint, pair.other):
                endpoint._runner.get_coro().close()
                for link in endpoint.links:
                    link._close_here()
            pair.link = None
            gc.collect()

        await in_child(child)
        await pair.check()


async def test_parent_dies_and_its_child_lives():
    url = "shm://fork"
    async with Endpoint("survivor") as endpoint:
        closed = asyncio.get_running_loop().create_future()
        endpoint.on_link_close(lambda link, error: closed.set_result(error))
        await endpoint.listen(url)
        with Process("idle_with_child", url, 0) as victim:
            await victim.says("sent")
            victim.kill()
            (link,) = endpoint.links
            with pytest.raises(kucomms.PeerClosedError):
                while True:
                    await link.receive()
            assert type(await closed) is kucomms.PeerClosedError


async def test_programs_inherit_nothing():
    """What is executed by a process with links has none of their descriptors."""
    url = f"shm://fork_{os.getpid()}_{next(_numbers)}"
    async with Pair() as pair:
        await pair.connect(url)
        code = (
            "import os\n"
            "print(*[os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')"
            " if os.path.lexists(f'/proc/self/fd/{fd}')], sep='\\n')"
        )
        read, write = os.pipe()
        os.set_inheritable(write, True)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=write, close_fds=False)
        os.close(write)
        try:
            listing = await asyncio.to_thread(read_all, read)
        finally:
            os.close(read)
            process.wait()
        found = listing.decode().split()
        assert len(found) >= 3
        assert [what for what in found if "socket" in what or "anon_inode" in what] == []
        assert [what for what in found if "kucomms" in what or "memfd" in what] == []
        await pair.check()
