# SPDX-License-Identifier: MIT
"""The conformance suite beside processes that keep every core busy.

On one loop, for want of time; with KUCOMMS_ALL=1 on all, as ``make matrix`` does.
"""

import os
import subprocess
import sys

import pytest

from tests.transports.test_conformance import test_conformance

__all__ = ["test_conformance"]

if not os.environ.get("KUCOMMS_ALL"):
    LOOPS = ["asyncio"]


@pytest.fixture(scope="module", autouse=True)
def busy_machine():
    hogs = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count())
    ]
    yield
    for hog in hogs:
        hog.kill()
        hog.wait()
