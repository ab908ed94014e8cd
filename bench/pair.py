# SPDX-License-Identifier: MIT
"""Worker processes: every sample is taken in one or two fresh ones.

They are forked from a small server that has kucomms, uvloop and asyncio imported
already and nothing else running. They die with the program that started them, ignore
control-C (the program ends them) and have a time limit.
"""

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
PR_SET_PDEATHSIG = 1


class SessionError(Exception):
    """A worker failed, or took too long."""


class Meeting:
    """What both workers of a session know: where they meet, and when."""

    def __init__(self, directory):
        self.directory = directory
        self.name = Path(directory).name.replace("-", "_")
        self.ready = CONTEXT.Event()
        self.linked = CONTEXT.Event()
        self.finished = CONTEXT.Event()

    def path(self, name="socket"):
        """A path for a Unix socket."""
        return str(Path(self.directory) / name)

    def wait_ready(self):
        """In the worker that connects: wait until the other one listens."""
        if not self.ready.wait(30):
            raise SessionError("the other side was not ready in time")

    def wait_finished(self):
        """In the sender: stay until the receiver has everything."""
        self.finished.wait()

    async def until_finished(self):
        """As ``wait_finished``, while the loop goes on."""
        await asyncio.get_running_loop().run_in_executor(None, self.finished.wait)


def _pin(number):
    """Keep this process to one CPU, another one for each number; without a second one, not."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) > 1:
        os.sched_setaffinity(0, {allowed[number % len(allowed)]})


def _worker(result, environment, pinned, function, arguments):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)
    if pinned is not None:
        _pin(pinned)
    try:
        result.send((True, function(*arguments)))
    except BaseException:
        result.send((False, traceback.format_exc()))
        os._exit(1)


@contextlib.contextmanager
def _undisturbed():
    """Put off control-C and SIGTERM until after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def workers(*tasks, apart=False):
    """Start a process for each (function, arguments); end what is left of them after the block.

    ``apart``: each stays on a CPU of its own. Gives a list of (process, connection), where the
    result will arrive.
    """
    started = []
    try:
        for number, (function, arguments) in enumerate(tasks):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            environment = {"XDG_RUNTIME_DIR": os.environ.get("XDG_RUNTIME_DIR", "/tmp")}  # noqa: S108
            process = CONTEXT.Process(
                target=_worker,
                args=(theirs, environment, number if apart else None, function, arguments),
                daemon=True,
            )
            with _undisturbed():  # or nobody would know of a process that was just made
                process.start()
                started.append((process, ours))
            theirs.close()
        yield started
    finally:
        for process, ours in started:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
            ours.close()


def results(started, timeout):
    """Wait for what each worker returns. Raises SessionError as soon as one fails."""
    deadline = time.monotonic() + timeout
    values = {}
    while len(values) < len(started):
        pending = [ours for _process, ours in started if ours not in values]
        arrived = wait(pending, max(0.0, deadline - time.monotonic()))
        if not arrived:
            raise SessionError(f"not finished after {timeout:.0f} s")
        for ours in arrived:
            try:
                good, value = ours.recv()
            except EOFError:
                raise SessionError("a worker died") from None
            if not good:
                raise SessionError(value)
            values[ours] = value
    for process, _ours in started:
        process.join(max(0.1, deadline - time.monotonic()))
    return [values[ours] for _process, ours in started]


@contextlib.contextmanager
def meeting():
    """A Meeting with a directory of its own, which is also kucomms' runtime directory."""
    directory = tempfile.mkdtemp(prefix="kucomms-bench-")
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = directory
    try:
        yield Meeting(directory)
    finally:
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before
        shutil.rmtree(directory, ignore_errors=True)


def run_together(*tasks, timeout=60.0, apart=False):
    """Run each (function, arguments) in a process of its own; return what they return."""
    with workers(*tasks, apart=apart) as started:
        return results(started, timeout)


def prepare():
    """Start the server that workers are forked from."""
    CONTEXT.set_forkserver_preload(["asyncio", "uvloop", "kucomms"])
    forkserver.ensure_running()
    run_together((os.getpid, ()))
