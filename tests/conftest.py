# SPDX-License-Identifier: MIT
"""What all tests share: every asynchronous test runs on asyncio and on uvloop.

But for those of modules that say otherwise with ``LOOPS``, since the loop is not what they test,
and on older kernels, where for want of time only what may differ there is tested: on asyncio,
and without the tests of polling. KUCOMMS_ALL=1 overrules that.
"""

import asyncio
import os
import shutil
import signal
import tempfile

import pytest
import uvloop

# Who was started in the background of a shell ignores control-C, and so would what is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# These run as root on a kernel of their own: tools/guest.py boots it, and sets this there.
collect_ignore = [] if "KUCOMMS_MODULES" in os.environ else ["kernel"]
OLDER = os.environ.get("KUCOMMS_KERNEL", "").startswith("6.1.")
SHORT = OLDER and not os.environ.get("KUCOMMS_ALL")
if SHORT:
    collect_ignore.append("kernel/test_polling.py")
# In the sanitized kernel; tests/kernel/test_guest.py sees to it that it is not left out there.
if not os.path.exists("/sys/kernel/debug/failslab"):  # as who is not root may ask
    collect_ignore.append("kernel/test_fault_injection.py")


def pytest_asyncio_loop_factories(config, item):
    loops = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    wanted = getattr(item.module, "LOOPS", ["asyncio"] if SHORT else loops)
    return {name: loops[name] for name in wanted}


@pytest.fixture(autouse=True)
def runtime_dir(monkeypatch):
    """A rendezvous directory of this test's own."""
    path = tempfile.mkdtemp(prefix="kucomms-test-")
    monkeypatch.setenv("XDG_RUNTIME_DIR", path)
    yield path
    shutil.rmtree(path)
