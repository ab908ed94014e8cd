# SPDX-License-Identifier: MIT
"""``make faults``: every step of a link's life, cut and failed at every point."""

import asyncio
import json
import secrets
import sys
import traceback

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.faults.campaign import LANGUAGES, Campaign, rows
from tests.faults.injector import Injector
from tests.faults.victim import STEPS


@click.command(
    epilog="Example: python -m tests.faults --step send --language C --most 100000"
)
@click.option("--step", multiple=True, type=click.Choice(STEPS), help="Only this; repeatable.")
@click.option("--language", multiple=True, type=click.Choice(LANGUAGES), help="Only this.")
@click.option("--most", default=60, show_default=True, help="Points for each cell of the table.")
@click.option("--seed", type=int, help="Of the points, where there are more.")
@click.option("--json", "as_json", is_flag=True, help="The counts and failures as JSON.")
def main(step, language, most, seed, as_json):
    """Kill, stop, and make fail one side of a shm:// link at each point of each step.

    Exit code 1 when anything was not as promised.
    """
    wanted = [
        row
        for row in rows()
        if (not step or row.step in step) and (not language or row.language in language)
    ]
    campaign = Campaign(most, secrets.randbits(32) if seed is None else seed)
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 130)
    try:
        asyncio.run(_run(campaign, wanted, console))
    except KeyboardInterrupt:
        console.print("interrupted; so far:")
        code = 130
    else:
        code = 1 if campaign.failures else 0
    if as_json:
        click.echo(json.dumps(_as_json(campaign), indent=2))
    else:
        console.print(campaign.table(wanted))
    missed = sum(campaign.missed.values())
    console.print(
        f"{sum(campaign.tried.values())} faults, {len(campaign.failures)} failures; {missed} "
        f"points were not met when their turn came; --seed {campaign.seed}"
    )
    sys.exit(code)


async def _run(campaign, wanted, console):
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(wanted))
        steps = iter(range(len(wanted)))
        current = None

        def show(row, done, count):
            nonlocal current
            if row is not current:
                current = row
                progress.update(task, completed=next(steps))
            progress.update(task, description=f"{row}: {done} of {count}")

        def failed(fault, error):
            console.print(f"[red]FAILED[/] {fault}", highlight=False)
            text = "".join(traceback.format_exception(error))
            console.print(text, markup=False, highlight=False)

        async with Injector() as injector:
            await campaign.run(injector, wanted, show, failed)
        progress.update(task, completed=len(wanted), description="done")


def _as_json(campaign):
    return {
        "seed": campaign.seed,
        "tried": [
            {"row": row, "fault": name, "count": count}
            for (row, name), count in campaign.tried.items()
        ],
        "missed": sum(campaign.missed.values()),
        "failures": [
            {"fault": str(fault), "error": str(error)} for fault, error in campaign.failures
        ],
    }


if __name__ == "__main__":
    main()
