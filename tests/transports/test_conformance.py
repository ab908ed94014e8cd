# SPDX-License-Identifier: MIT
"""Every check of the conformance suite, for every transport, on every loop.

Once on the machine as it is, and once beside processes that keep all cores busy.
"""

import os
import subprocess
import sys

import pytest

from kucomms.testing import CHECKS
from tests.transports.harnesses import HARNESSES


@pytest.fixture(scope="module", params=["quiet", "busy"])
def machine(request):
    """Processes that keep every core busy, or none."""
    count = os.cpu_count() if request.param == "busy" else 0
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    yield
    for hog in hogs:
        hog.kill()
        hog.wait()


@pytest.mark.asyncio
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("transport", HARNESSES)
async def test_conformance(machine, transport, check):
    await check(HARNESSES[transport]())
