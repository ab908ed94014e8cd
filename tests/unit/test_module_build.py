# SPDX-License-Identifier: MIT
"""For which kernels and machines the module can be built, without building it."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULE = ROOT / "kernel_module"
WHOLE = ("CONFIG_64BIT", "CONFIG_MMU")


def preprocess(*defined: str) -> subprocess.CompletedProcess[str]:
    command = ["gcc", "-E", *(f"-D{name}=1" for name in defined), MODULE / "requirements.h"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_machine_that_has_everything_is_accepted():
    assert preprocess(*WHOLE).returncode == 0


@pytest.mark.parametrize(
    ("defined", "sentence"),
    [
        (["CONFIG_MMU"], "kucomms needs a 64-bit kernel"),
        (["CONFIG_64BIT"], "kucomms needs a kernel with an MMU"),
        *(
            ([*WHOLE, f"CONFIG_{name}"], "kucomms needs data caches that do not alias")
            for name in ("ARCH_HAS_CPU_CACHE_ALIASING", "CPU_CACHE_ALIASING")
        ),
        *(
            ([*WHOLE, f"CONFIG_{name}"], "kucomms needs data caches that do not alias")
            for name in ("MIPS", "PARISC", "SPARC")
        ),
    ],
)
def test_another_machine_is_refused_with_one_sentence(defined, sentence):
    refused = preprocess(*defined)
    assert refused.returncode != 0
    [line] = [line for line in refused.stderr.splitlines() if "error:" in line]
    assert f'#error "{sentence}' in line


def test_the_module_includes_its_requirements_before_all_else():
    first = re.search(r"^#include (.*)", (MODULE / "main.c").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == '"requirements.h"'


def dkms_conf(name: str) -> str:
    """Return a variable of dkms.conf, as dkms reads it."""
    script = f"set -eu; dkms_tree=; kernel_source_dir=; . {shlex.quote(str(MODULE / 'dkms.conf'))}"
    return subprocess.run(
        ["bash", "-c", f'{script}; printf %s "${{{name}}}"'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def dkms_matches(value: str, expression: str) -> bool:
    matched = subprocess.run(["bash", "-c", "[[ $0 =~ $1 ]]", value, expression], check=False)
    return matched.returncode == 0


@pytest.mark.parametrize(
    ("release", "accepted"),
    [
        ("2.6.32-5-amd64", False),
        ("4.19.0-27-amd64", False),
        ("5.1.0", False),
        ("5.4.0-216-generic", False),
        ("5.9.16", False),
        ("5.10.0-46-amd64", True),
        ("5.15.0-1-rt-amd64", True),
        ("5.19.0", True),
        ("6.1.0-57-amd64", True),
        ("6.12.117+deb12-rt-amd64", True),
        ("7.0.0-rc1", True),
        ("10.2.0", True),
        ("15.1.0", True),
    ],
)
def test_dkms_builds_for_5_10_and_later(release, accepted):
    assert dkms_matches(release, dkms_conf("BUILD_EXCLUSIVE_KERNEL")) == accepted


@pytest.mark.parametrize(
    ("machine", "accepted"),
    [
        ("x86_64", True),
        ("aarch64", True),
        ("riscv64", True),
        ("ppc64le", True),
        ("s390x", True),
        ("i686", False),
        ("armv7l", False),
        ("mips64", False),
        ("parisc64", False),
        ("sparc64", False),
    ],
)
def test_dkms_builds_for_machines_that_are_accepted(machine, accepted):
    assert dkms_matches(machine, dkms_conf("BUILD_EXCLUSIVE_ARCH")) == accepted


def test_dkms_asks_for_what_the_module_requires():
    wanted = dkms_conf("BUILD_EXCLUSIVE_CONFIG").split()
    assert {*WHOLE, "!CONFIG_ARCH_HAS_CPU_CACHE_ALIASING"} <= set(wanted)


def test_one_version_of_the_module():
    version = dkms_conf("PACKAGE_VERSION")
    assert f'MODULE_VERSION("{version}")' in (MODULE / "main.c").read_text()
    assert f"kucomms-headers-{version}\n" in (MODULE / "Makefile").read_text()
