# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC220
"""A program that does anything to a device, at random, while somebody else uses it well.

``programs/random_peer.c`` draws system calls, their arguments and what it writes into its pages.
KUCOMMS_RANDOM_SECONDS: how long for each endpoint; KUCOMMS_SEED: for the same program again.
"""

import json
import os
import random
import subprocess

import pytest

from tests.kernel.test_hostile import bystander, module, nothing_is_left
from tests.kernel.test_kernel_api import TAME

__all__ = ["module", "nothing_is_left"]  # fixtures, for each test here as well

LOOPS = ["asyncio"]  # what is tested is the kernel

SECONDS = int(os.environ.get("KUCOMMS_RANDOM_SECONDS", "2"))
SEED = int(os.environ.get("KUCOMMS_SEED") or random.getrandbits(32))
# What the kernel refuses more often than not may have succeeded never in a short time; for the
# rest the program goes on if need be. The same in
# programs/random_peer.c.
RARE = {"ioctl", "remap", "fault", "fork", "other", "memory"}


@pytest.fixture(scope="session")
def random_peer(programs):
    return programs / "random_peer"


@pytest.mark.asyncio
@pytest.mark.parametrize("name", TAME)
async def test_anything(random_peer, capsys, name):
    async with bystander(name) as good:
        process = subprocess.Popen(
            [random_peer, f"/dev/kucomms_{name}", str(SECONDS), str(SEED)],
            stdout=subprocess.PIPE,
        )
        try:
            while process.poll() is None:
                await good.check()
            assert process.returncode == 0, f"seed {SEED}"
            done = json.loads(process.stdout.read())
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    with capsys.disabled():
        print(f"\n{name}, seed {SEED}: {done}", end="")
    assert all(count for what, count in done.items() if what not in RARE), done
