# SPDX-License-Identifier: MIT
"""The module installed into a directory, a driver built against that alone, and DKMS."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import guest

ROOT = Path(__file__).parents[1]
MODULE = ROOT / "kernel_module"
BUILDS = [path.parent for path in sorted(guest.MODULES.glob("*/build")) if path.is_dir()]
RELEASE = guest.newest([path.name for path in BUILDS], "6.1")

pytestmark = pytest.mark.skipif(
    RELEASE is None, reason="no headers of Linux 6.1: tools/install-kernel-packages.sh has them"
)


def run(*command: str | Path, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ | {"LC_ALL": "C", "MAKEFLAGS": ""} | environment,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def modinfo(module: Path, field: str) -> str:
    return run("/sbin/modinfo", "-F", field, module).strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is in the repository, without what was built there."""
    copy = tmp_path_factory.mktemp("source")
    guest.sync(MODULE, copy)
    return copy


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    kdir = guest.MODULES / RELEASE / "build"
    run("make", "-C", source, f"KDIR={kdir}", f"DESTDIR={root}", "install")
    return root


def driver_kbuild() -> str:
    """What README.md tells a driver to have."""
    found = re.search(r"```make\n(KUCOMMS .*?)```", (MODULE / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def test_what_is_installed(installed):
    devel = "usr/src/kucomms-headers-0.1.0"
    modules = f"lib/modules/{RELEASE}"
    names = [name for name in files(installed) if not name.startswith(f"{modules}/modules.")]
    [module] = [name for name in names if name.startswith(modules)]
    assert re.fullmatch(rf"{modules}/(updates|extra)/kucomms\.ko", module)
    names.remove(module)
    assert names == [
        "etc/udev/rules.d/99-kucomms.rules",
        f"{devel}/include/kucomms/kucomms.h",
        f"{devel}/include/uapi/linux/kucomms.h",
        f"{devel}/symvers/{RELEASE}",
    ]


def test_a_driver_is_built_against_what_is_installed_alone(installed, tmp_path):
    """As README.md says it, but for the place."""
    kbuild = driver_kbuild()
    [devel] = re.findall(r"^KUCOMMS \?= (.*)", kbuild)
    (tmp_path / "Kbuild").write_text(kbuild)
    shutil.copy(ROOT / "examples/kernel/kucomms_tutorial.c", tmp_path / "my_driver.c")
    kdir = guest.MODULES / RELEASE / "build"
    said = run("make", "-C", kdir, f"M={tmp_path}", f"KUCOMMS={installed}{devel}", "modules")
    assert guest.build_warnings(said) == []
    assert modinfo(tmp_path / "my_driver.ko", "depends") == "kucomms"
    # The loader compares the symbols' checksums.
    symbols = (installed / devel.lstrip("/") / "symvers" / RELEASE).read_text()
    [wanted] = re.findall(r"^(0x\w+)\tkucomms_send\t", symbols, re.MULTILINE)
    versions = run("/sbin/modprobe", "--dump-modversions", tmp_path / "my_driver.ko")
    assert f"{wanted}\tkucomms_send\n" in versions


def dkms(directory: Path, action: str, *arguments: str | Path, code: int = 0) -> str:
    trees = (f"--{name}tree={directory / name}" for name in ("dkms", "source", "install"))
    return run("dkms", action, *trees, *arguments, code=code, DESTDIR=str(directory / "root"))


@pytest.mark.skipif(os.geteuid() != 0, reason="dkms is root's")
@pytest.mark.skipif(not shutil.which("dkms"), reason="no dkms here")
def test_dkms_builds_it_and_passes_over_older_kernels(source, tmp_path):
    for name in ("dkms", "source", "install"):
        (tmp_path / name).mkdir()
    dkms(tmp_path, "add", source)
    old = ("-k", "5.4.0-1-amd64", "--kernelsourcedir", guest.MODULES / RELEASE / "build")
    said = dkms(tmp_path, "build", "kucomms/0.1.0", *old, code=77)
    assert "BUILD_EXCLUSIVE directive which does not match this kernel" in said
    dkms(tmp_path, "build", "kucomms/0.1.0", "-k", RELEASE)
    [module] = (tmp_path / "dkms/kucomms/0.1.0" / RELEASE).rglob("kucomms.ko*")
    assert modinfo(module, "vermagic").split()[0] == RELEASE
    devel = tmp_path / "root/usr/src/kucomms-headers-0.1.0"
    assert (devel / "symvers" / RELEASE).exists()
