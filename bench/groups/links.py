# SPDX-License-Identifier: MIT
"""One endpoint with 1 to 1000 shm:// links from one other process, 64 B.

One busy: all messages come on one link, in batches, among the others that are idle.
All active: the sender goes round and puts 16 messages on each link by ``send_many``,
so what a link has when its turn comes is 16 messages or more. Also what a link takes of
the receiver's memory, before any message.
"""

import asyncio
import os
import resource
from pathlib import Path

import kucomms
from bench.messages import BATCH, Receiving, Run, Sending
from bench.pair import meeting, run_together
from bench.plan import Job, Sample

URL = "shm://bench"
RING = 1 << 16
SIZE = 64
EACH = 16


def _more_files():
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _memory():
    """Bytes of this process: its own, and shared; and open files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, shared = (int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))
    return own, shared, len(os.listdir("/proc/self/fd"))


def _receiver(meet, links, runs):
    _more_files()
    receiving = Receiving(runs)

    async def main():
        over, all_open = asyncio.Event(), asyncio.Event()
        receiving.done = over.set
        opened = []

        def on_open(link):
            opened.append(link)
            if len(opened) == links:
                all_open.set()

        endpoint = kucomms.Endpoint("receiver", on_message=receiving.handle, on_link_open=on_open)
        async with endpoint:
            await endpoint.listen(URL, ring_size=RING)
            before = _memory()
            meet.ready.set()
            await all_open.wait()
            after = _memory()
            meet.linked.set()
            await over.wait()
            meet.finished.set()
            return [(new - old) / links for new, old in zip(after, before, strict=True)]

    memory = kucomms.run(main())
    return receiving.wall, receiving.cpu, memory


def _sender(meet, links, runs, active):
    _more_files()
    sending = Sending(runs)
    meet.wait_ready()

    async def main():
        async with kucomms.Endpoint("sender") as endpoint:
            opened = [await endpoint.connect(URL, timeout=30) for _ in range(links)]
            await asyncio.get_running_loop().run_in_executor(None, meet.linked.wait)
            for run in sending:
                if active:
                    await _go_round(opened, run)
                else:
                    busy = opened[links // 2]
                    for batch in run.batches():
                        await busy.send_many(batch)
            await meet.until_finished()

    kucomms.run(main())
    return sending.cpu


async def _go_round(links, run):
    """Batches of 16, each on the next link."""
    number = 0
    for batch in run.batches(EACH):
        await links[number].send_many(batch)
        number += 1
        if number == len(links):
            number = 0


class Links(Job):
    """So many links, one or all of them active."""

    def __init__(self, links, active, options):
        case = "all active" if active else "one busy"
        super().__init__("links", f"{links} links", case, ours=True)
        self.links = links
        self.active = active
        self.seconds = options.run_seconds
        self.count = None

    def _session(self, count):
        runs = [Run(SIZE, max(count // 4, self.links * EACH)), Run(SIZE, count)]
        with meeting() as meet:
            return run_together(
                (_sender, (meet, self.links, runs, self.active)),
                (_receiver, (meet, self.links, runs)),
            )

    def prepare(self):
        """How many messages make a good run."""
        count = max(20_000, 2 * self.links * EACH)
        _sender_cpu, (wall, _cpu, _memory) = self._session(count)
        step = self.links * EACH if self.active else BATCH
        self.count = max(count, int(count * self.seconds / wall[1])) // step * step

    def sample(self):
        """Nanoseconds per message, and the memory per link."""
        sender_cpu, (wall, cpu, memory) = self._session(self.count)
        own, shared, files = memory
        return Sample(
            wall[1] / self.count * 1e9,
            (sender_cpu[1] + cpu[1]) / self.count * 1e9,
            {"messages": self.count, "own_bytes_per_link": own, "shared_bytes_per_link": shared,
             "files_per_link": files},
        )


def jobs(options):
    """1 to 1000 links."""
    numbers = (1, 1000) if options.quick else (1, 10, 100, 1000)
    return [
        Links(links, active, options) for active in (False, True) for links in numbers
    ], []
