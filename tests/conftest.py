# SPDX-License-Identifier: MIT
"""What all tests share: every asynchronous test runs on asyncio and on uvloop.

But for those of modules that say otherwise with ``LOOPS``, since the loop is not what they test,
and in guests, for want of time: there it is asyncio on the older kernels, which also do without
the tests of free pages, polling and half a minute of longtest, and uvloop on the newer ones.
KUCOMMS_ALL=1 overrules that, as ``make test-kernel`` does.
"""

import asyncio
import gc
import os
import shutil
import signal
import tempfile

import pytest
import uvloop

# Who was started in the background of a shell ignores control-C, and so would what is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# These run as root on a kernel of their own: tools/guest.py boots it, and sets this there.
IN_GUEST = "KUCOMMS_MODULES" in os.environ
collect_ignore = [] if IN_GUEST else ["kernel"]
SHORT = IN_GUEST and not os.environ.get("KUCOMMS_ALL")
OLDER = os.environ.get("KUCOMMS_KERNEL", "").startswith("6.1.")
if SHORT and OLDER:
    collect_ignore += [f"kernel/test_{name}.py" for name in ("extents", "polling", "session")]
# In the sanitized kernel; tests/kernel/test_guest.py sees to it that it is not left out there.
if not os.path.exists("/sys/kernel/debug/failslab"):  # as who is not root may ask
    collect_ignore.append("kernel/test_fault_injection.py")


def pytest_collection_finish(session):
    """Many tests have the collector run; what is here for as long as pytest is left out of it."""
    gc.collect()
    gc.freeze()


def pytest_asyncio_loop_factories(config, item):
    loops = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    some = ["asyncio" if OLDER else "uvloop"] if SHORT else loops
    wanted = getattr(item.module, "LOOPS", some)
    return {name: loops[name] for name in wanted}


@pytest.fixture(autouse=True)
def runtime_dir(monkeypatch):
    """A rendezvous directory of this test's own."""
    path = tempfile.mkdtemp(prefix="kucomms-test-")
    monkeypatch.setenv("XDG_RUNTIME_DIR", path)
    yield path
    shutil.rmtree(path)
