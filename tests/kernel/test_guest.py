# SPDX-License-Identifier: MIT
"""We are in the guest, as root, with the modules that were just built."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import collect_ignore
from tests.kernel.log import findings


def test_the_kernel_is_the_one_asked_for():
    assert os.uname().release == os.environ["KUCOMMS_KERNEL"]
    assert os.geteuid() == 0


def test_modprobe_finds_what_was_built(modules):
    built = {path.name for path in modules.glob("kernel_module/**/*.ko")}
    assert built
    updates = Path("/lib/modules", os.uname().release, "updates")
    assert built <= {path.name for path in updates.iterdir()}
    for name in sorted(path.stem for path in updates.glob("*.ko")):
        found = subprocess.run(
            ["modprobe", "--show-depends", name], capture_output=True, text=True, check=True
        )
        assert f"insmod {updates}/{name}.ko" in found.stdout


@pytest.mark.parametrize("path", ["/dev/shm", "/tmp", "/sys/kernel/debug", "/sys/kernel/tracing"])
def test_file_systems(path):
    assert os.path.ismount(path)


def test_a_module_that_is_not_there_fails_with_the_reason(load):
    with pytest.raises(pytest.fail.Exception, match="no_such_module") as failure:
        load("no_such_module")
    assert "the end of the kernel log" in str(failure.value)


def test_the_kernel_log_is_read(kernel_log):
    Path("/dev/kmsg").write_text("a line of a test\n")
    assert "a line of a test" in kernel_log()
    assert kernel_log() == []
    assert findings(["a line of a test"]) == []


def test_allocations_fail_where_leaks_are_looked_for():
    """That is what tools/kasan.config promises; then tests/kernel/test_fault_injection.py runs."""
    sanitized = Path("/sys/kernel/debug/kmemleak").exists()
    assert ("kernel/test_fault_injection.py" in collect_ignore) == (not sanitized)
