# SPDX-License-Identifier: MIT
"""What is cut: one end of a link that goes through all steps once. ``victim.c`` is its twin.

Reads lines ``ROLE URL STEP`` and forks a victim for each: ``listener`` or ``connector``,
and the step that is to be marked (``-`` for none). A victim says ``pid N``, waits for a
byte, and works. Each step is named in ``STEPS``. A step that fails says ``error STEP
EXCEPTION ERRNO`` and is done again, without marks. At the end it says ``leaked N``,
descriptors more than at the beginning, and this process ``status N``.
"""

import asyncio
import ctypes
import os
import signal
import sys

import structlog
import uvloop

from kucomms import Endpoint, KucommsError, Message
from tests.transports.processes import descriptors

__all__ = ["AFTER", "BEFORE", "COUNT", "DATA", "END", "LENGTH", "RING_SIZE", "STEPS", "content"]

STEPS = (
    "listen",
    "connect",
    "send",
    "reserve",
    "commit",
    "receive",
    "release",
    "close",
    "unlisten",
)
DATA, END, COUNT = 1, 2, 3  # types of messages
LENGTH = 64
BEFORE, AFTER = 3, 3  # messages before the step "send", and after all the others
RING_SIZE = 4096
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


def content(number):
    """The data of a message."""
    return bytes((number * 31 + i) & 0xFF for i in range(LENGTH))


def say(line):
    os.write(1, f"{line}\n".encode())


class Steps:
    """Marks the one that is to be cut, and tells of those that fail."""

    def __init__(self, cut):
        self._cut = cut

    def mark(self, step):
        if step == self._cut:
            os.kill(os.getpid(), signal.SIGTRAP)

    def do(self, step, function, *arguments):
        """``function()`` between marks, and once more if a fault made it fail."""
        while True:
            try:
                self.mark(step)
                result = function(*arguments)
                self.mark(step)
            except KucommsError as error:
                self._failed(step, error)
            else:
                return result

    async def do_async(self, step, function, *arguments, **options):
        """The same for a coroutine function."""
        while True:
            coroutine = function(*arguments, **options)
            try:
                self.mark(step)
                result = await coroutine
                self.mark(step)
            except KucommsError as error:
                self._failed(step, error)
            else:
                return result

    def _failed(self, step, error):
        number = error.errno if isinstance(error, OSError) else None
        say(f"error {step} {type(error).__name__} {number or 0}")
        self._cut = None


async def work(role, url, steps):
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: say(f"failed {context}"))
    opened = loop.create_future()
    async with Endpoint("victim") as endpoint:
        endpoint.on_link_open(lambda link: opened.done() or opened.set_result(link))
        listener = None
        if role == "listener":
            listener = await steps.do_async(
                "listen", endpoint.listen, url, ring_size=RING_SIZE
            )
            link = await steps.do_async("connect", asyncio.wait_for, opened, None)
        else:
            link = await steps.do_async("connect", endpoint.connect, url, ring_size=RING_SIZE)

        def message(number):
            return Message(content(number), type=DATA, id=number)

        for number in range(BEFORE):
            await link.send(message(number))
        await steps.do_async("send", link.send, message(BEFORE))
        loan = link.loan(LENGTH, type=DATA, id=BEFORE + 1)
        steps.do("reserve", loan.__enter__)
        await link.send(message(BEFORE + 2))  # behind what is half-written
        loan.data[:] = content(BEFORE + 1)
        steps.do("commit", loan.__exit__, None, None, None)
        borrowed = link.borrow()
        first = await steps.do_async("receive", borrowed.__aenter__)
        assert first.data == content(0)
        await steps.do_async("release", borrowed.__aexit__, None, None, None)
        for number in range(BEFORE + 3, BEFORE + 3 + AFTER):
            await link.send(message(number))
        count = 1
        while (received := await link.receive()).type != END:
            assert (received.id, received.data) == (count, content(count)), received
            count += 1
        await link.send(b"", type=COUNT, user_value=count)
        await steps.do_async("close", link.aclose)
        if listener is not None:
            await steps.do_async("unlisten", listener.aclose)


def victim(role, url, step, loop_factory):
    loop_factory().close()  # libuv opens a pipe for the whole process
    before = descriptors()
    # Not SIG_IGN, which the kernel undoes when a step is trapped.
    signal.signal(signal.SIGTRAP, lambda *_: None)
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
    say(f"pid {os.getpid()}")
    if os.read(0, 1) != b"g":
        return
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(work(role, url, Steps(step)))
    leaked = [what for fd, what in descriptors().items() if before.get(fd) != what]
    say(" ".join(["leaked", str(len(leaked)), *leaked]))


def line():
    """The next line, and nothing of what follows it, which is for the victim."""
    text = b""
    while not text.endswith(b"\n"):
        data = os.read(0, 1)
        if not data:
            return None
        text += data
    return text.decode()


def main():
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[sys.argv[1]]
    # Imported now, so that no victim spends its steps on that.
    import kucomms.transports.shm  # noqa: F401

    while (request := line()) is not None:
        pid = os.fork()
        if not pid:
            try:
                victim(*request.split(), factory)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        _pid, status = os.waitpid(pid, 0)
        say(f"status {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
