# SPDX-License-Identifier: MIT
"""The matrix of the conformance suite: where the responder runs, over which transport."""

import asyncio
import itertools
import json
import os
import signal
import sys
import threading
from contextlib import asynccontextmanager, contextmanager

import uvloop

from kucomms.testing import Harness, Responder

_numbers = itertools.count()

LISTEN_OPTIONS = ("ring_size", "max_ring_size", "max_links", "turns")


def split_options(options):
    """What goes to listen, and what to the responder."""
    listen = {key: options[key] for key in LISTEN_OPTIONS if key in options}
    return listen, {key: options[key] for key in options if key not in listen}


@asynccontextmanager
async def responding(url, options):
    listen, rest = split_options(options)
    async with Responder(**rest) as responder:
        await responder.endpoint.listen(url, **listen)
        yield


class InprocSameLoop(Harness):
    """Both endpoints in one loop."""

    exact_doorbells = True

    def new_url(self):
        return f"inproc://conformance_{next(_numbers)}"

    def responder(self, url, **options):
        return responding(url, options)


class InprocThreads(Harness):
    """The responder in a thread with a loop of its own."""

    def new_url(self):
        return f"inproc://conformance_{next(_numbers)}"

    @asynccontextmanager
    async def responder(self, url, **options):
        ready: asyncio.Future = asyncio.get_running_loop().create_future()
        here = asyncio.get_running_loop()
        stop = None

        async def main():
            nonlocal stop
            stop = asyncio.Event()
            async with responding(url, options):
                self.loop = asyncio.get_running_loop()
                here.call_soon_threadsafe(ready.set_result, None)
                await stop.wait()

        factory = uvloop.new_event_loop if isinstance(here, uvloop.Loop) else None

        def run():
            try:
                with asyncio.Runner(loop_factory=factory) as runner:
                    runner.run(main())
            except BaseException as raised:
                if not ready.done():
                    here.call_soon_threadsafe(ready.set_exception, raised)
                raise

        thread = threading.Thread(target=run)
        thread.start()
        try:
            await ready
            yield
        finally:
            if stop is not None:
                self.loop.call_soon_threadsafe(stop.set)
            await asyncio.to_thread(thread.join)

    @contextmanager
    def paused(self):
        held, go_on = threading.Event(), threading.Event()

        def hold():
            held.set()
            go_on.wait()

        self.loop.call_soon_threadsafe(hold)
        held.wait()
        try:
            yield
        finally:
            go_on.set()


class Shm(Harness):
    """The responder in a process of its own."""

    def new_url(self):
        return f"shm://conformance_{os.getpid()}_{next(_numbers)}"

    @asynccontextmanager
    async def responder(self, url, **options):
        loop = "uvloop" if isinstance(asyncio.get_running_loop(), uvloop.Loop) else "asyncio"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.transports.responder_process", url, loop,
            json.dumps(options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self.pid = process.pid
        try:
            assert await process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.stdin.close()
            status = await process.wait()
        assert status == 0

    @contextmanager
    def paused(self):
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


HARNESSES = {
    "inproc_same_loop": InprocSameLoop,
    "inproc_two_threads": InprocThreads,
    "shm": Shm,
}
