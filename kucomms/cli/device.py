# SPDX-License-Identifier: MIT
"""``kucomms device``: makes, removes and lists the devices of the kernel module."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from kucomms import AddressError, AddressInUseError, BusyError, NotReadyError, TransportError, _core
from kucomms.cli._common import json_option, print_json

__all__ = [
    "INSTALL",
    "Device",
    "command",
    "control_directory",
    "device_name",
    "devices",
    "read_attribute",
]

F = TypeVar("F", bound=Callable[..., Any])

ROOT = Path("/")
SYSFS = ROOT / "sys"
DEV = ROOT / "dev"
PROC = ROOT / "proc"
MODULES = ROOT / "lib/modules"
UDEV = ROOT / "run/udev/control"
"""Here when udev runs."""

INSTALL = "make -C kernel_module && make -C kernel_module install"
"""How the module gets onto a machine, in the sources of kucomms."""

_PREFIX = "kucomms_"
_URL_PREFIX = "kernel://"
_NAME = re.compile(rf"[A-Za-z0-9_]{{1,{_core.NAME_MAX}}}")
_NODE_TIMEOUT = 1.0
_NODE_POLL = 0.005
_SETTLE_TIMEOUT = 5
_DENIED = (errno.EACCES, errno.EPERM)


class Device(msgspec.Struct, frozen=True):
    """A device of the kernel module; None: not known, or not there."""

    name: str
    url: str
    path: str
    mode: str | None
    """Octal, as 0660. None, as the owner and the group, when there is nothing at ``path``."""
    owner: str | None
    group: str | None
    endpoint: bool | None
    """Whether a kernel endpoint is registered for it."""
    channels: int | None

    @property
    def rights(self) -> str:
        """Mode, owner and group in a few words."""
        if self.mode is None:
            return f"no {self.path}"
        return f"{self.mode} {self.owner}:{self.group}"


# ---- names and attributes ---------------------------------------------------


def device_name(name: str) -> str:
    """Return kucomms_NAME for NAME, kucomms_NAME or kernel://NAME. Raises AddressError."""
    if name.startswith(_URL_PREFIX):
        short = name.removeprefix(_URL_PREFIX)
    else:
        short = name.removeprefix(_PREFIX)
    if not _NAME.fullmatch(short):
        raise AddressError(
            f"{name!r} cannot be the name of a device: write NAME, kucomms_NAME or kernel://NAME, "
            f"where NAME is 1 to {_core.NAME_MAX} of the characters A-Z a-z 0-9 _"
        )
    return _PREFIX + short


def _class_directory() -> Path:
    return SYSFS / "devices/virtual/kucomms"


def control_directory() -> Path:
    """Return where the module has its own attributes; it is there while the module is loaded."""
    return _class_directory() / "kucomms"


def read_attribute(path: Path) -> str | None:
    """Return an attribute of sysfs without its newline; None when it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _device(name: str) -> Device:
    path = DEV / name
    try:
        about = path.stat()
    except OSError:
        about = None
    directory = _class_directory() / name
    endpoint = read_attribute(directory / "endpoint")
    channels = read_attribute(directory / "channels") or ""
    return Device(
        name=name,
        url=_URL_PREFIX + name.removeprefix(_PREFIX),
        path=str(path),
        mode=f"{stat.S_IMODE(about.st_mode):04o}" if about else None,
        owner=_user(about.st_uid) if about else None,
        group=_group(about.st_gid) if about else None,
        endpoint={"0": False, "1": True}.get(endpoint or ""),
        channels=int(channels) if channels.isdecimal() else None,
    )


def devices() -> list[Device]:
    """Return all devices, by name."""
    return [_device(path.name) for path in sorted(_class_directory().glob(f"{_PREFIX}*"))]


def _require_module() -> None:
    if not control_directory().is_dir():
        raise NotReadyError(
            "the kernel module kucomms is not loaded: modprobe kucomms. If modprobe does not find "
            f"it, build and install it, in the sources of kucomms: {INSTALL}"
        )


# ---- the module's two attributes --------------------------------------------


def _write(path: Path, text: str) -> None:
    """Write an attribute of sysfs in one system call."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _create(name: str) -> None:
    try:
        _write(control_directory() / "create_device", name)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise AddressInUseError(
                f"there is a device {name} already (kucomms device list shows it)"
            ) from error
        raise _explain(error, name, "make") from error


def _remove(name: str) -> None:
    try:
        _write(control_directory() / "remove_device", name)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise NotReadyError(
                f"there is no device {name} (kucomms device list shows those there are)"
            ) from error
        if error.errno == errno.EBUSY:
            raise BusyError(f"{name} is in use: {_users_of(name)}") from error
        raise _explain(error, name, "remove") from error


def _explain(error: OSError, name: str, what: str) -> Exception:
    """Return what to raise for an errno that means the same for both attributes."""
    number = error.errno or 0
    if number in (errno.EINVAL, errno.ENAMETOOLONG):
        return AddressError(
            f"the kernel module does not take the name {name}: {os.strerror(number)}; the rule is "
            f"kucomms_ and 1 to {_core.NAME_MAX} of the characters A-Z a-z 0-9 _"
        )
    if number in _DENIED:
        return TransportError(
            number, f"cannot {what} {name}: {os.strerror(number)}; only root may, so try sudo"
        )
    return TransportError(
        number, f"cannot {what} {name}: {os.strerror(number)}; the kernel log (dmesg) may say why"
    )


def _users_of(name: str) -> str:
    """Say who uses a device, and what to do."""
    uses = []
    if _device(name).endpoint:
        uses.append("a kernel endpoint is registered for it (rmmod the module that did it)")
    if holders := list(_holders(name)):
        who = ", ".join(f"{pid} ({program})" for pid, program in holders)
        uses.append(f"process {who} has it open" if len(holders) == 1 else
                    f"the processes {who} have it open")
    return "; ".join(uses) or "some process has it open that this user may not look at (try sudo)"


def _holders(name: str) -> Iterator[tuple[int, str]]:
    """Processes that have the device open or mapped, as far as this user may see."""
    path = str(DEV / name)
    numbers = sorted(int(entry.name) for entry in PROC.glob("[0-9]*") if entry.name.isdecimal())
    for pid in numbers:
        if _has_open(PROC / str(pid), path):
            yield pid, read_attribute(PROC / str(pid) / "comm") or "?"


def _has_open(process: Path, path: str) -> bool:
    try:
        descriptors = os.listdir(process / "fd")
    except OSError:  # it ended, or is another user's
        return False
    for descriptor in descriptors:
        try:
            if os.readlink(process / "fd" / descriptor) == path:
                return True
        except OSError:
            continue
    maps = read_attribute(process / "maps") or ""  # a mapping outlives its descriptor
    return any(line.endswith(f" {path}") for line in maps.splitlines())


# ---- the node in /dev -------------------------------------------------------


def _is_node(path: Path) -> bool:
    """Whether there is a character device."""
    try:
        return stat.S_ISCHR(path.lstat().st_mode)
    except OSError:
        return False


def _wait_for_node(path: Path) -> None:
    """Wait for what devtmpfs makes with the device itself, and udev soon after."""
    deadline = time.monotonic() + _NODE_TIMEOUT
    while not _is_node(path):
        if time.monotonic() >= deadline:
            raise NotReadyError(
                f"the kernel module made the device, but {path} was not there within "
                f"{_NODE_TIMEOUT:g} s: neither devtmpfs nor udev made it, so the device was "
                f"removed again. Is a devtmpfs mounted at {DEV}? (A container may have another one)"
            )
        time.sleep(_NODE_POLL)


def _settle() -> None:
    """Wait until udev has applied its rules, if it runs, so that ours come last."""
    udevadm = shutil.which("udevadm")
    if udevadm and UDEV.exists():
        subprocess.run(
            [udevadm, "settle", f"--timeout={_SETTLE_TIMEOUT}"], capture_output=True, check=False
        )


def _set_rights(path: Path, mode: int | None, gid: int | None) -> None:
    if mode is None and gid is None:
        return
    _settle()
    try:
        if gid is not None:
            os.chown(path, -1, gid)
        if mode is not None:
            path.chmod(mode)
    except OSError as error:
        raise TransportError(
            error.errno or 0,
            f"cannot set the rights of {path}: {error.strerror}; the device was removed again",
        ) from error


def _make(name: str, mode: int | None, gid: int | None) -> Device:
    """Make a device with these rights, or none at all."""
    _create(name)
    try:
        _wait_for_node(DEV / name)
        _set_rights(DEV / name, mode, gid)
    except BaseException:
        _remove(name)
        raise
    return _device(name)


# ---- the commands -----------------------------------------------------------


class _Mode(click.ParamType[int]):
    """Rights, in octal."""

    name = "mode"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """The rights as a number."""
        if isinstance(value, int):
            return value
        if not re.fullmatch(r"(0o?)?[0-7]{3}", str(value)):
            self.fail(f"{value!r} is not a mode; write it in octal, as 0660", param, ctx)
        return int(str(value), 8)


class _Group(click.ParamType[int]):
    """A group, by name or number; found before anything is made."""

    name = "group"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """The group's number."""
        if isinstance(value, int):
            return value
        text = str(value)
        try:
            return grp.getgrnam(text).gr_gid
        except (KeyError, ValueError):
            if text.isdecimal() and int(text) < 0xFFFFFFFF:
                return int(text)
        self.fail(f"there is no group {text!r}; groupadd makes one", param, ctx)


def _name_argument(function: F) -> F:
    return click.argument("name", metavar="NAME")(function)


GROUP_EPILOG = """\b
Example:
  kucomms device create longtest --mode 0660 --group dialout
  kucomms device list --json
  kucomms device remove longtest
"""


@click.group("device", epilog=GROUP_EPILOG)
def command() -> None:
    """Make, remove and list the devices of the kernel module.

    NAME may be written as longtest, kucomms_longtest or kernel://longtest. Each of these
    commands takes --json.
    """


CREATE_EPILOG = """\b
Examples:
  kucomms device create longtest
  kucomms device create kernel://longtest --mode 0660 --group dialout
"""


@command.command("create", epilog=CREATE_EPILOG)
@_name_argument
@click.option(
    "--mode",
    type=_Mode(),
    metavar="MODE",
    help="The rights, in octal.  [default: 0660 with --group, else what the kernel module (0600) "
    "and udev's rules make it]",
)
@click.option(
    "--group", "gid", type=_Group(), metavar="GROUP", help="The group, by name or number."
)
@json_option('Print one JSON object: {"name", "url", "path", "mode", "owner", "group", ...}.')
def create(*, name: str, mode: int | None, gid: int | None, as_json: bool) -> int:
    """Make the device /dev/kucomms_NAME; a kernel endpoint may be registered or not.

    It stays until it is removed, or the kernel module unloaded. Exit code: 0 when it is there
    with the rights that were asked for, 1 when not, and then there is none.
    """
    if gid is not None and mode is None:
        mode = 0o660
    full_name = device_name(name)
    _require_module()
    device = _make(full_name, mode, gid)
    if as_json:
        print_json(device)
    else:
        print(f"made {device.path} ({device.rights}): {device.url}")
    return 0


REMOVE_EPILOG = """\b
Example:
  kucomms device remove longtest
"""


@command.command("remove", epilog=REMOVE_EPILOG)
@_name_argument
@json_option('Print one JSON object: {"name", "url", "path", "removed"}.')
def remove(*, name: str, as_json: bool) -> int:
    """Remove the device /dev/kucomms_NAME.

    Not while it is open, or a kernel endpoint is registered for it: the error says who uses
    it. Exit code: 0 when it is gone, 1 when not.
    """
    full_name = device_name(name)
    _require_module()
    _remove(full_name)
    path = str(DEV / full_name)
    if as_json:
        url = _URL_PREFIX + full_name.removeprefix(_PREFIX)
        print_json({"name": full_name, "url": url, "path": path, "removed": True})
    else:
        print(f"removed {path}")
    return 0


LIST_EPILOG = """\b
Examples:
  kucomms device list
  kucomms device list --json | jq -r '.devices[] | select(.endpoint) | .url'
"""


@command.command("list", epilog=LIST_EPILOG)
@json_option(
    'Print one JSON object: {"devices": [{"name", "url", "path", "mode", "owner", "group", '
    '"endpoint", "channels"}]}.'
)
def list_(*, as_json: bool) -> int:
    """List the devices, their rights, and who is at the other end.

    endpoint: whether a kernel endpoint is registered for it. channels: how many are open.
    Exit code: 0 when the kernel module is loaded, also without any device, 1 when not.
    """
    _require_module()
    found = devices()
    if as_json:
        print_json({"devices": found})
    else:
        _show(found)
    return 0


def _show(found: list[Device]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = [
        (
            device.name,
            device.url,
            device.mode or "-",
            "-" if device.mode is None else f"{device.owner}:{device.group}",
            {True: "registered", False: "none", None: "?"}[device.endpoint],
            "?" if device.channels is None else str(device.channels),
        )
        for device in found
    ]
    console = Console()
    if not console.is_terminal:
        for row in rows:
            print("  ".join(row))
        return
    if not rows:
        console.print("no devices; kucomms device create NAME makes one")
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("device", "URL", "mode", "owner", "endpoint", "channels"):
        table.add_column(
            column, overflow="fold", justify="right" if column == "channels" else "left"
        )
    for row in rows:
        table.add_row(*row)
    console.print(table)
