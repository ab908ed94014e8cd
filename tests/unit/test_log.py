# SPDX-License-Identifier: MIT
"""The log is structlog's, imported when there is something to say, and not lost without it."""

import subprocess
import sys

import pytest

FAILS = """
import asyncio, errno, os, sys
import kucomms
assert "structlog" not in sys.modules

async def main():
    async with kucomms.Endpoint("fails") as endpoint:
        done = asyncio.Event()

        @endpoint.on_work
        def work():
            done.set()
            raise ValueError("a mistake of the user")

        {before}
        await done.wait()
        await asyncio.sleep(0)

asyncio.run(main())
"""
NO_DESCRIPTORS = """
        files = []
        try:
            while True:
                files.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE
"""


def run(before):
    done = subprocess.run(
        [sys.executable, "-c", FAILS.format(before=before)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_it_is_structlogs():
    done = run("")
    assert "handler_failed" in done.stdout
    assert "a mistake of the user" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "before",
    ["sys.modules['structlog'] = None", NO_DESCRIPTORS],
    ids=["not_installed", "no_descriptors"],
)
def test_without_structlog_it_goes_to_standard_error(before):
    done = run(before)
    assert done.stdout == ""
    assert "kucomms error: handler_failed endpoint='fails' handler='on_work'" in done.stderr
    assert "ValueError: a mistake of the user" in done.stderr
