# SPDX-License-Identifier: MIT
"""A file is copied through a pool, with up to 64 requests in flight.

    python copy_file.py SOURCE TARGET [--direct]

Each of 64 tasks has a buffer of the pool; it reads a block of the source into it, writes
it to the target, and takes the next. Python never sees the bytes. --direct goes past the
page cache (O_DIRECT), which wants whole blocks: the last one is written whole, and the file
then cut to its size.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count

from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

import kucomms

IN_FLIGHT = 64
BLOCK = 256 << 10
ALIGN = 4096  # of O_DIRECT: a multiple of every block size in use


async def copy(source: int, target: int, size: int, *, whole: bool, progress: Progress) -> str:
    bar = progress.add_task("copied", total=size)
    numbers = count()
    tasks = min(IN_FLIGHT, -(-size // BLOCK))

    async def copy_blocks(pool: kucomms.Pool) -> None:
        with pool.allocate(BLOCK) as buffer:
            while (at := next(numbers) * BLOCK) < size:
                length = min(BLOCK, size - at)
                await everything(partial(pool.read, source), buffer, at, length, whole)
                await everything(partial(pool.write, target), buffer, at, length, whole)
                progress.advance(bar, length)

    async with kucomms.open_pool(max(tasks, 1) * BLOCK) as pool:
        await asyncio.gather(*(copy_blocks(pool) for _ in range(tasks)))
        return pool.statistics().engine


async def everything(
    transfer: Callable[..., Awaitable[int]],
    buffer: kucomms.Buffer,
    at: int,
    length: int,
    whole: bool,
) -> None:
    """Transfers may be shorter than what was asked for, as those of the system."""
    done = 0
    while done < length:
        wanted = length - done
        if whole:
            wanted = -(-wanted // ALIGN) * ALIGN
        moved = await transfer((buffer, done, wanted), at + done)
        if not moved:
            raise OSError(f"the source became shorter at byte {at + done}")
        done += moved


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--direct", action="store_true", help="past the page cache")
    arguments = parser.parse_args()
    flags = os.O_DIRECT if arguments.direct else 0
    console = Console()
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    try:
        source = os.open(arguments.source, os.O_RDONLY | flags)
        target = os.open(arguments.target, os.O_WRONLY | os.O_CREAT | flags, 0o666)
        if os.path.sameopenfile(source, target):
            raise OSError(f"{arguments.source} and {arguments.target} are the same file")
        os.ftruncate(target, 0)  # not before that was known
        size = os.fstat(source).st_size
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            engine = kucomms.run(
                copy(source, target, size, whole=arguments.direct, progress=progress)
            )
        os.ftruncate(target, size)
    except (OSError, kucomms.KucommsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"copied {size} bytes with {engine}")
    return 0


sys.exit(main())
