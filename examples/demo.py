# SPDX-License-Identifier: MIT
"""The longtest between two processes over shared memory, live. ``make demo`` runs it.

    python demo.py [--seconds 10]

Starts ``kucomms longtest --listen`` as a second process and connects to it. Both sides
send as fast as they can, echo what they get, and verify every echo. Exits with 0 when
neither found an error and messages of both types went both ways. Control-C ends both.
"""

import argparse
import asyncio
import os
import secrets
import subprocess
import sys

import msgspec
from rich.console import Console
from rich.table import Table

import kucomms
from kucomms.cli._longtest_view import View
from kucomms.cli.longtest import Summary, run_side

console = Console()


async def demo(seconds: float) -> int:
    url = f"shm://demo_{os.getpid()}_{secrets.token_hex(4)}"
    listener = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kucomms", "longtest", "--listen", url, "--json"),
        *("--timeout", "30"),
        stdout=subprocess.PIPE,
    )
    try:
        live = console.is_terminal and not console.is_dumb_terminal
        side = asyncio.create_task(
            run_side(
                url,
                listen=False,
                seconds=seconds,
                timeout=30,
                plain=not live,
                view=View(seconds, console) if live else None,
            )
        )
        ended = asyncio.create_task(listener.wait())
        await asyncio.wait({side, ended}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({side}, timeout=5)
        if not side.done():  # it waits for a listener that has ended, and has said why
            side.cancel()
            await asyncio.wait({side})
            return 1
        ours = await side
        output, _ = await asyncio.wait_for(listener.communicate(), 10)
    finally:
        if listener.returncode is None:
            listener.terminate()
            await listener.wait()
    if not output:
        console.print("[bold red]The listening side ended without a summary.[/]")
        return 1
    theirs = msgspec.json.decode(output, type=Summary)
    show(ours, theirs)
    good = ours.ok and theirs.ok and listener.returncode == 0
    console.print("[green]no errors[/]" if good else "[bold red]FAILED[/]")
    return 0 if good else 1


def show(*sides: Summary) -> None:
    table = Table(title=f"{sides[0].url}, both sides")
    table.add_column()
    for side in sides:
        name = "A, connecting" if side.side == "A" else "B, listening"
        table.add_column(f"{name}\nprocess {side.pid}", justify="right")
    rows = {
        "seconds": "{0.seconds:.1f}",
        "type 0 sent": "{0.sent_count_0:,}",
        "type 0 received": "{0.received_count_0:,}",
        "type 1 sent": "{0.sent_count_1:,}",
        "type 1 received": "{0.received_count_1:,}",
        "messages/s, both ways": "{0.messages_per_second:,.0f}",
        "MB/s, both ways": "{0.megabytes_per_second:,.1f}",
        "add_error_count": "{0.add_error_count}",
        "compare_error_count": "{0.compare_error_count}",
    }
    for label, form in rows.items():
        table.add_row(label, *(form.format(side) for side in sides))
    console.print(table)
    for side in sides:
        if side.error:
            console.print(f"{side.side}: {side.error}", style="red")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="default: %(default)s")
    try:
        return kucomms.run(demo(parser.parse_args().seconds))
    except kucomms.KucommsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130


sys.exit(main())
