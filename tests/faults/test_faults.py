# SPDX-License-Identifier: MIT
"""A sample of ``make faults`` in every step of both sides, and whether it can fail at all."""

import asyncio
import platform
import secrets
import traceback

import pytest
from rich.console import Console

from tests.faults.campaign import ALWAYS, COLUMNS, ERRNOS, Campaign, rows
from tests.faults.injector import Fault, Injector, Row
from tests.faults.victim import STEPS

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="inject.c knows the registers of x86-64 only"
)

MOST = 2
"""Points for each cell of the table; ``make faults ARGS="--most 1000000"`` tries all."""
OLD = {"pidfd_open"}
"""What is called only where the kernel has no SO_PEERPIDFD."""


def test_every_step_cut_and_failed(capsys):
    wanted = [row for row in rows() if row.language != "uvloop"]
    campaign = Campaign(MOST, secrets.randbits(32))

    async def run():
        async with Injector() as injector:
            await campaign.run(injector, wanted)

    asyncio.run(run())
    with capsys.disabled():
        print()
        Console(width=120).print(campaign.table(wanted))
    for fault, error in campaign.failures:
        print(f"FAILED {fault}; --seed {campaign.seed}")
        traceback.print_exception(error)
    assert campaign.failures == []
    # No row is empty, and nearly all points were met.
    for row in wanted:
        for kind in ("kill", "stop"):
            assert any(campaign.tried[str(row), name] for name in COLUMNS if kind in name), row
    assert {row.step for row in wanted} == set(STEPS)
    # Where a link is made, every errno was tried, in each language; only who connects in C
    # asks for no room.
    assert {
        (str(row), name)
        for row in wanted
        for name in ERRNOS
        if row.step in ("listen", "connect") and not campaign.tried[str(row), name]
    } == {("connect, connector (C)", "ENOSPC")}
    assert campaign.met >= ALWAYS
    named = {(name, call) for name, calls in ERRNOS.items() for call in calls - OLD}
    assert named <= campaign.met, f"never called: {named - campaign.met}"
    assert sum(campaign.missed.values()) < sum(campaign.tried.values()) / 10


@pytest.mark.parametrize("language", ["python", "C"])
@pytest.mark.parametrize(
    ("step", "name", "left"),
    [("connect", "unlink", "kucomms-"), ("unlisten", "unlinkat", "kucomms/faults_")],
    ids=["shared memory", "socket"],
)
def test_missing_unlink_is_found(language, step, name, left):
    """A listener whose unlink does nothing leaves its object, or its socket, behind."""

    async def run():
        async with Injector() as injector:
            row = Row(language, "listener", step)
            calls, _instructions = await injector.survey(row)
            (call,) = [call for call in calls if call.name == name]
            with pytest.raises(AssertionError, match=f"left behind: .*{left}"):
                await injector.inject(Fault(row, "nothing", call))

    asyncio.run(run())
