# SPDX-License-Identifier: MIT
"""``kucomms doctor``: what works on this machine, what is missing, how to get it."""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal

import click
import msgspec

import kucomms
from kucomms.cli import device
from kucomms.cli._common import json_option, print_json
from kucomms.transports.runtime_directory import private_path

__all__ = ["command"]

Status = Literal["ok", "warn", "fail"]
_TIMEOUT = 10.0
_ROUND_TRIPS = 2000
_FREE_WANTED = 64 << 20
_FILES_WANTED = 1024


class Check(msgspec.Struct, frozen=True):
    """One line of the report."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    """What to do, when it is not ok."""


class Report(msgspec.Struct, frozen=True):
    """All of them; ``ok`` when nothing that is required fails."""

    ok: bool
    checks: list[Check]


def _python() -> Check:
    running = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036 - it may be run from a checkout
        return Check("Python", "fail", running, "use Python 3.11 or newer")
    return Check("Python", "ok", f"{running}, {sys.executable}")


def _core() -> Check:
    from kucomms import _core

    return Check(
        "compiled core",
        "ok",
        f"kucomms {kucomms.__version__}, ABI version {_core.lib.KUCOMMS_ABI_VERSION}, "
        f"{platform.machine()}",
    )


def _uvloop() -> Check:
    import uvloop

    return Check("uvloop", "ok", version(uvloop.__name__))


def _system() -> Check:
    if sys.platform != "linux":
        return Check("kernel", "fail", platform.platform(), "shm:// needs Linux")
    return Check("kernel", "ok", f"Linux {platform.release()}")


def _dev_shm() -> Check:
    name, path = "shared memory", "/dev/shm"  # noqa: S108 - it is looked at, not used
    if not os.path.ismount(path) and not os.path.isdir(path):
        return Check(name, "fail", f"no {path}", f"mount -t tmpfs tmpfs {path}")
    about = os.statvfs(path)
    free = about.f_bavail * about.f_frsize
    detail = f"{path}, {free >> 20} MiB free"
    if not os.access(path, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{detail}, not writable", f"chmod 1777 {path}")
    if free < _FREE_WANTED:
        return Check(
            name, "warn", detail,
            f"make room; a link takes about twice its ring_size (containers: --shm-size; else: "
            f"mount -o remount,size=1G {path})",
        )
    return Check(name, "ok", detail)


def _memfd() -> Check:
    try:
        os.close(os.memfd_create("kucomms-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except OSError as error:
        return Check(
            "memfd", "warn", f"memfd_create: {error.strerror}",
            "needed only for peers of other users (listen(..., allow=...)); allow the system call",
        )
    return Check("memfd", "ok", "sealed memory for peers of other users")


async def _pool() -> Check:
    name = "asynchronous I/O"
    async with kucomms.open_pool(1 << 20) as pool:
        statistics = pool.statistics()
    if statistics.engine != "io_uring":
        return Check(
            name, "warn", f"pools use threads: {statistics.engine_reason}",
            "pools work, and cost more CPU time; allow the system calls of io_uring",
        )
    if not statistics.registered:
        return Check(
            name, "warn", f"io_uring, {statistics.engine_reason}",
            "pools work, and cost more CPU time; raise the limit of locked memory",
        )
    return Check(name, "ok", "pools use io_uring, with registered memory")


def _pidfd() -> Check:
    name = "peer's death"
    so_peerpidfd = 77
    here, there = socket.socketpair()
    with here, there:
        try:
            os.close(here.getsockopt(socket.SOL_SOCKET, so_peerpidfd))
            return Check(name, "ok", "seen by SO_PEERPIDFD")
        except OSError as error:
            missing = error.strerror
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return Check(
            name, "fail", f"pidfd_open: {error.strerror}",
            "shm:// needs Linux 5.3 or newer, and a sandbox that allows pidfd_open",
        )
    return Check(name, "ok", f"seen by pidfd_open (SO_PEERPIDFD: {missing}, from Linux 6.5 on)")


async def _rendezvous() -> Check:
    path = private_path()
    how = "XDG_RUNTIME_DIR" if path.endswith("/kucomms") else "XDG_RUNTIME_DIR is not set"
    url = f"shm://kucomms_doctor_{secrets.token_hex(8)}"
    try:
        async with kucomms.Endpoint("doctor") as endpoint:
            await endpoint.listen(url)
    except (kucomms.KucommsError, OSError) as error:
        return Check(
            "directory of sockets", "fail", str(error),
            "set XDG_RUNTIME_DIR to a directory that is yours, mode 0700",
        )
    return Check("directory of sockets", "ok", f"{path} ({how})")


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} open files; a link over shm:// takes two"
    if soft < _FILES_WANTED:
        return Check("RLIMIT_NOFILE", "warn", detail, f"ulimit -n {hard}")
    return Check("RLIMIT_NOFILE", "ok", detail)


async def _measure(link: kucomms.Link) -> str:
    """Round trips over ``link``, in microseconds."""
    times = []
    for number in range(_ROUND_TRIPS):
        data = number.to_bytes(64, "little")
        begin = perf_counter()
        reply = await link.request(data, timeout=_TIMEOUT)
        times.append(perf_counter() - begin)
        if reply.data != data:
            raise kucomms.ProtocolError(f"{link.url}: request {number} came back changed")
    times.sort()
    return (
        f"{_ROUND_TRIPS} round trips of 64 bytes: median {median(times) * 1e6:.0f} µs, "
        f"99 % below {times[_ROUND_TRIPS * 99 // 100] * 1e6:.0f} µs"
    )


async def _inproc() -> Check:
    async def answer(message: kucomms.Message, link: kucomms.Link) -> None:
        await link.reply(message, message.data)

    url = f"inproc://kucomms_doctor_{secrets.token_hex(8)}"
    async with kucomms.Endpoint("doctor", on_message=answer) as endpoint:
        await endpoint.listen(url)
        async with kucomms.connect(url, timeout=_TIMEOUT) as link:
            return Check("inproc://", "ok", await _measure(link))


async def _shm() -> Check:
    url = f"shm://kucomms_doctor_{secrets.token_hex(8)}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kucomms", "echo", url, "--reply", "--once", "--timeout",
        str(_TIMEOUT), "--json", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )
    try:
        async with kucomms.connect(url, timeout=_TIMEOUT) as link:
            detail = await _measure(link)
        return Check("shm://", "ok", detail)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


def _c_client() -> Check:
    name = "C client"
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return Check(
            name, "warn", "no C compiler",
            "needed only for programs in C and C++: install gcc or clang",
        )
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "check.c")
        source.write_text("#include <kucomms/client.h>\nint main(void) { return 0; }\n")
        result = subprocess.run(
            [compiler, "-I", kucomms.get_include(), source, "-o", Path(directory, "check")],
            capture_output=True, check=False, text=True, errors="replace",
        )
    if result.returncode:
        first = result.stderr.strip().splitlines() or ["?"]
        return Check(
            name, "warn", f"{compiler} cannot compile kucomms/client.h: {first[0]}",
            "install the C library's headers (libc6-dev, glibc-devel)",
        )
    return Check(name, "ok", f"{compiler} -I {kucomms.get_include()}")


# ---- the kernel side, which is optional: nothing here fails -------------------

_KERNEL_MODULE = "kernel module"
_UDEV_RULES = ("etc/udev/rules.d", "run/udev/rules.d", "usr/lib/udev/rules.d", "lib/udev/rules.d")


def _loaded_version() -> str | None:
    """The version of the module that is loaded; "?" when it does not say, None when none is."""
    directory = device.SYSFS / "module/kucomms"
    if not directory.is_dir():
        return None
    return device.read_attribute(directory / "version") or "?"


def _modinfo(*arguments: str) -> str | None:
    """What modinfo says of kucomms; "" when it does not find it, None without modinfo."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    modinfo = shutil.which("modinfo", path=path)
    if modinfo is None:
        return None
    result = subprocess.run(
        [modinfo, *arguments, "kucomms"],
        capture_output=True, check=False, text=True, errors="replace",
    )
    return "" if result.returncode else result.stdout.strip()


def _kernel_module() -> Check:
    from kucomms import _core

    loaded = _loaded_version()
    if loaded is None:
        return Check(
            _KERNEL_MODULE, "warn", "not loaded",
            "needed only for kernel:// URLs: modprobe kucomms",
        )
    abi = device.read_attribute(device.control_directory() / "abi_version") or "?"
    detail = f"version {loaded}, ABI version {abi}"
    ours = _core.lib.KUCOMMS_ABI_VERSION
    again = f"install the one of this version ({device.INSTALL}), rmmod kucomms, modprobe kucomms"
    if abi != str(ours):
        return Check(
            _KERNEL_MODULE, "warn",
            f"{detail}; this package has ABI version {ours}, so kernel:// cannot work", again,
        )
    if loaded != kucomms.__version__:
        return Check(
            _KERNEL_MODULE, "warn", f"{detail}; this package is version {kucomms.__version__}",
            f"they can work together; to have the same: {again}",
        )
    return Check(_KERNEL_MODULE, "ok", f"loaded, {detail}")


def _installed_module() -> Check:
    name, release = "modprobe kucomms", platform.release()
    found = _modinfo("-F", "filename")
    if found is None:
        return Check(
            name, "warn", "cannot tell, there is no modinfo",
            "needed only for kernel:// URLs: install kmod",
        )
    if not found:
        return Check(
            name, "warn", f"finds no module for Linux {release}",
            "needed only for kernel:// URLs; build and install it, in the sources of kucomms: "
            f"{device.INSTALL}",
        )
    return Check(name, "ok", f"finds {found}, version {_modinfo('-F', 'version') or '?'}")


def _kernel_headers() -> Check:
    name, release = "kernel headers", platform.release()
    build = device.MODULES / release / "build"
    if (build / "Makefile").exists():
        return Check(name, "ok", str(build))
    if _loaded_version() is not None or _modinfo("-F", "filename"):
        return Check(name, "ok", f"no {build}; needed only to build the kernel module again")
    return Check(
        name, "warn", f"no {build}",
        "needed only to build the kernel module; install those of the running kernel (Debian: "
        f"apt-get install linux-headers-{release})",
    )


def _kernel_devices() -> Check:
    name = "kernel devices"
    found = device.devices()
    if not found:
        return Check(name, "ok", "none; kucomms device create NAME makes one, with the module")
    detail = ", ".join(f"{each.url} ({each.rights})" for each in found)
    closed = [each for each in found if not os.access(each.path, os.R_OK | os.W_OK)]
    if closed:
        urls = ", ".join(each.url for each in closed)
        return Check(
            name, "warn", f"{detail}; not for this user: {urls}",
            "as root: kucomms device create NAME --group GROUP, or chgrp and chmod, or a udev rule",
        )
    return Check(name, "ok", detail)


def _udev_rule() -> Check:
    found = [
        str(path)
        for directory in _UDEV_RULES
        for path in sorted((device.ROOT / directory).glob("*kucomms*.rules"))
    ]
    if not found:
        return Check(
            "udev rule", "ok",
            "none: devices are root's, but for those made with --mode or --group "
            "(kernel_module/99-kucomms.rules is an example)",
        )
    return Check("udev rule", "ok", ", ".join(found))


# In this order; of these, the required ones have to work for the machine to be fit for kucomms.
_CHECKS: tuple[tuple[str, Callable[[], Check] | Callable[[], Awaitable[Check]]], ...] = (
    ("Python", _python),
    ("compiled core", _core),
    ("uvloop", _uvloop),
    ("kernel", _system),
    ("shared memory", _dev_shm),
    ("memfd", _memfd),
    ("peer's death", _pidfd),
    ("asynchronous I/O", _pool),
    ("directory of sockets", _rendezvous),
    ("RLIMIT_NOFILE", _open_files),
    ("inproc://", _inproc),
    ("shm://", _shm),
    ("C client", _c_client),
    (_KERNEL_MODULE, _kernel_module),
    ("modprobe kucomms", _installed_module),
    ("kernel headers", _kernel_headers),
    ("kernel devices", _kernel_devices),
    ("udev rule", _udev_rule),
)


async def _run() -> Report:
    checks = []
    for name, function in _CHECKS:
        try:
            result = function()
            check = result if isinstance(result, Check) else await result
        except Exception as error:  # whatever it is, it belongs in the report
            text = str(error) or type(error).__name__
            check = Check(name, "fail", text, "see the lines that are not ok above, if any")
        checks.append(check)
    return Report(all(check.status != "fail" for check in checks), checks)


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for check in report.checks:
            print(f"{check.status:4}  {check.name}: {check.detail}")
            if check.remedy:
                print(f"      {check.remedy}")
        return
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for check in report.checks:
        found = Text(check.detail)
        if check.remedy:
            found.append(f"\n→ {check.remedy}", "bold")
        table.add_row(Text(check.status, colours[check.status]), check.name, found)
    console.print(table)
    if report.ok:
        console.print("[green]Everything that kucomms needs works here.[/]")
    else:
        console.print("[bold red]Something that kucomms needs does not work here.[/]")


EPILOG = """\b
Example:
  kucomms doctor
  kucomms doctor --json | jq '.checks[] | select(.status != "ok")'
"""


@click.command("doctor", epilog=EPILOG)
@json_option('Print one JSON object: {"ok", "checks": [{"name", "status", "detail", "remedy"}]}.')
def command(as_json: bool) -> int:
    """Check what works on this machine, and say how to get what is missing.

    Sends real messages, within this process and to another one. Exit code: 0 when
    everything that is required works (warn: something optional is missing), 1 when not,
    130 after control-C.
    """
    report = kucomms.run(_run())
    if as_json:
        print_json(report)
    else:
        _show(report)
    return 0 if report.ok else 1
