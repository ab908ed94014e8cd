# SPDX-License-Identifier: MIT
"""``kucomms device`` and the module's create_device and remove_device, in the guest."""

import errno
import grp
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import kucomms
from kucomms import _core, cli
from kucomms.cli import device, doctor

CLASS = Path("/sys/devices/virtual/kucomms")
CONTROL = CLASS / "kucomms"
GROUP = grp.getgrgid(1).gr_name
NOBODY = 65534
LONGEST = "a" * _core.NAME_MAX
DEADLINE = 300  # the guest may be emulated

# What is written to create_device or remove_device, and what comes back.
BAD_NAMES = [
    (b"\n", errno.EINVAL),
    (b"longtest", errno.EINVAL),
    (b"longtest\n", errno.EINVAL),
    (b"kucomms", errno.EINVAL),
    (b"kucomms_", errno.EINVAL),
    (b"kucomms_\n", errno.EINVAL),
    (b"Kucomms_a", errno.EINVAL),
    (b" kucomms_a", errno.EINVAL),
    (b"kucomms_a ", errno.EINVAL),
    (b"kucomms_a/b", errno.EINVAL),
    (b"kucomms_/", errno.EINVAL),
    (b"kucomms_../null", errno.EINVAL),
    (b"kucomms_.", errno.EINVAL),
    (b"kucomms_a.b", errno.EINVAL),
    (b"kucomms_a-b", errno.EINVAL),
    (b"kucomms_a\nb", errno.EINVAL),
    (b"kucomms_\na", errno.EINVAL),
    (b"kucomms_a\n\n", errno.EINVAL),
    (b"kucomms_a\0", errno.EINVAL),
    (b"kucomms_a\0b", errno.EINVAL),
    (b"kucomms_%s%n", errno.EINVAL),
    (b"kucomms_a!b", errno.EINVAL),  # sysfs would make it a slash
    ("kucomms_é".encode(), errno.EINVAL),
    ("kucomms_é".encode("latin-1"), errno.EINVAL),
    (f"kucomms_{LONGEST}a".encode(), errno.ENAMETOOLONG),
    (f"kucomms_{LONGEST}a\n".encode(), errno.ENAMETOOLONG),
    (b"kucomms_" + b"a" * 4000, errno.ENAMETOOLONG),
    (b"kucomms_" + b"a" * 4088, errno.ENAMETOOLONG),  # all that sysfs passes on
]


@pytest.fixture(scope="module", autouse=True)
def module(load, unload):
    """kucomms.ko, alone."""
    load("kucomms")
    yield
    unload("kucomms")
    assert not CLASS.exists()


@pytest.fixture(autouse=True)
def no_devices(module):
    """Each test begins without devices, and whatever it made can be removed."""
    assert names() == []
    yield
    for name in names():
        (CONTROL / "remove_device").write_text(name)
    assert names() == []


@pytest.fixture
def run(capsys):
    """Run the command in this process: its exit code, stdout and stderr."""

    def run(*arguments):
        code = cli.main(["device", *arguments])
        return code, *capsys.readouterr()

    return run


def names():
    """The devices there are; sysfs and /dev agree."""
    found = sorted(path.name for path in CLASS.glob("kucomms_*"))
    assert found == sorted(path.name for path in Path("/dev").glob("kucomms_*"))
    return found


def write(attribute, data):
    """One write to an attribute; returns the errno, 0 for none."""
    fd = os.open(CONTROL / attribute, os.O_WRONLY)
    try:
        assert os.write(fd, data) == len(data)
    except OSError as error:
        return error.errno
    finally:
        os.close(fd)
    return 0


def rights(path):
    about = Path(path).stat()
    assert stat.S_ISCHR(about.st_mode)
    return stat.S_IMODE(about.st_mode), about.st_uid, about.st_gid


# ---- the two attributes ------------------------------------------------------


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("name", ["kucomms_a", "kucomms_Z_09", "kucomms__", f"kucomms_{LONGEST}"])
def test_create_and_remove(name, end):
    data = name.encode() + end
    assert write("create_device", data) == 0
    assert names() == [name]
    assert rights(f"/dev/{name}") == (0o600, 0, 0)
    numbers = os.stat(f"/dev/{name}").st_rdev
    assert (CLASS / name / "dev").read_text() == f"{os.major(numbers)}:{os.minor(numbers)}\n"
    assert (CLASS / name / "endpoint").read_text() == "0\n"
    assert (CLASS / name / "channels").read_text() == "0\n"
    assert write("create_device", data) == errno.EEXIST
    assert names() == [name]
    assert write("remove_device", data) == 0
    assert names() == []
    assert write("remove_device", data) == errno.ENOENT


@pytest.mark.parametrize("attribute", ["create_device", "remove_device"])
@pytest.mark.parametrize(("data", "number"), BAD_NAMES)
def test_bad_names(attribute, data, number):
    assert write("create_device", b"kucomms_a") == 0
    assert write(attribute, data) == number
    assert names() == ["kucomms_a"]


@pytest.mark.parametrize("attribute", ["create_device", "remove_device"])
def test_nothing_written_is_nothing_done(attribute):
    assert write(attribute, b"") == 0  # sysfs does not pass it on
    assert names() == []


def test_a_name_and_one_that_it_begins_with():
    for name in (b"kucomms_ab", b"kucomms_a", b"kucomms_abc", b"kucomms_kucomms"):
        assert write("create_device", name) == 0
    assert write("remove_device", b"kucomms_a") == 0
    assert names() == ["kucomms_ab", "kucomms_abc", "kucomms_kucomms"]


def test_open_devices_are_busy():
    assert write("create_device", b"kucomms_a") == 0
    fd = os.open("/dev/kucomms_a", os.O_RDWR)
    second = os.dup(fd)
    assert write("remove_device", b"kucomms_a") == errno.EBUSY
    os.close(fd)
    assert write("remove_device", b"kucomms_a") == errno.EBUSY
    os.close(second)
    assert write("remove_device", b"kucomms_a") == 0


def test_rights_of_the_attributes():
    assert stat.S_IMODE((CONTROL / "create_device").stat().st_mode) == 0o200
    assert stat.S_IMODE((CONTROL / "remove_device").stat().st_mode) == 0o200
    version = CONTROL / "abi_version"
    assert stat.S_IMODE(version.stat().st_mode) == 0o444
    assert version.read_text() == f"{_core.lib.KUCOMMS_ABI_VERSION}\n"


# ---- the command -------------------------------------------------------------


def test_without_the_module(run, load, unload):
    assert run("create", "a")[0] == 0
    unload("kucomms")  # and with it the device
    assert not Path("/dev/kucomms_a").exists()
    code, out, err = run("create", "a")
    load("kucomms")
    assert (code, out) == (1, "")
    assert err.startswith("error: the kernel module kucomms is not loaded: modprobe kucomms.")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), (0o600, 0, 0)),
        (("--mode", "0640"), (0o640, 0, 0)),
        (("--group", GROUP), (0o660, 0, 1)),
        (("--group", "1", "--mode", "0620"), (0o620, 0, 1)),
        (("--mode", "0666", "--group", GROUP), (0o666, 0, 1)),
    ],
)
def test_create_with_rights(run, options, expected):
    code, out, err = run("create", "a", *options, "--json")
    assert (code, err) == (0, "")
    assert rights("/dev/kucomms_a") == expected
    assert json.loads(out) == {
        "name": "kucomms_a",
        "url": "kernel://a",
        "path": "/dev/kucomms_a",
        "mode": f"{expected[0]:04o}",
        "owner": "root",
        "group": grp.getgrgid(expected[2]).gr_name,
        "endpoint": False,
        "channels": 0,
    }


def test_the_ways_to_write_a_name(run):
    for name in ("a", "kucomms_b", "kernel://c"):
        assert run("create", name)[::2] == (0, "")
    assert names() == ["kucomms_a", "kucomms_b", "kucomms_c"]
    for name in ("kernel://a", "b", "kucomms_c"):
        assert run("remove", name)[::2] == (0, "")
    assert names() == []


@pytest.mark.parametrize("name", ["", "kucomms_", "a/b", ".", "a\nb", "a\n", LONGEST + "a"])
def test_bad_names_of_the_command(run, name):
    for command in ("create", "remove"):
        code, out, err = run(command, name)
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {name!r} cannot be the name of a device")
    assert names() == []


def test_what_the_module_says_of_a_name_is_passed_on():
    for attribute, name in ((device._create, "kucomms_a b"), (device._remove, "kucomms_a/b")):
        with pytest.raises(kucomms.AddressError, match="does not take the name"):
            attribute(name)
    with pytest.raises(kucomms.AddressError, match="name too long"):
        device._create(f"kucomms_{LONGEST}a")


def test_twice(run):
    assert run("create", "a", "--mode", "0640")[0] == 0
    code, _, err = run("create", "a", "--mode", "0666")
    assert (code, err.split(" (")[0]) == (1, "error: there is a device kucomms_a already")
    assert rights("/dev/kucomms_a")[0] == 0o640  # the one that was there was left alone
    assert run("remove", "a")[0] == 0
    code, _, err = run("remove", "a")
    assert (code, err.split(" (")[0]) == (1, "error: there is no device kucomms_a")


def test_a_group_that_is_not_there_makes_nothing(run):
    code, _, err = run("create", "a", "--group", "no_such_group")
    assert code == 2
    assert "there is no group 'no_such_group'" in err
    assert names() == []


def test_busy_names_the_process(run):
    assert run("create", "a")[0] == 0
    holder = subprocess.Popen(
        ["sh", "-c", "exec 3<>/dev/kucomms_a; echo open; read nothing"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with holder:
        assert holder.stdout.readline() == "open\n"
        code, _, err = run("remove", "a")
        assert code == 1
        assert err == (f"error: kucomms_a is in use: process {holder.pid} (sh) has it open\n")
        holder.communicate("\n", timeout=DEADLINE)
    assert run("remove", "a")[0] == 0


def test_a_registered_endpoint(run, load, unload):
    assert run("create", "longtest")[0] == 0
    load("kucomms_longtest")
    try:
        code, _, err = run("remove", "longtest")
        listed = json.loads(run("list", "--json")[1])["devices"]
    finally:
        unload("kucomms_longtest")
    assert code == 1
    assert "kucomms_longtest is in use: a kernel endpoint is registered for it" in err
    assert [(each["url"], each["endpoint"]) for each in listed] == [("kernel://longtest", True)]
    assert json.loads(run("list", "--json")[1])["devices"][0]["endpoint"] is False
    assert run("remove", "longtest")[0] == 0


def test_list(run):
    assert run("list") == (0, "", "")
    assert run("create", "b", "--group", GROUP)[0] == 0
    assert run("create", "a")[0] == 0
    assert run("list") == (
        0,
        "kucomms_a  kernel://a  0600  root:root  none  0\n"
        f"kucomms_b  kernel://b  0660  root:{GROUP}  none  0\n",
        "",
    )


@pytest.mark.parametrize("command", ["create", "remove"])
def test_not_for_everybody(run, command):
    assert run("create", "a")[0] == 0
    os.seteuid(NOBODY)
    try:
        code, out, err = run(command, "a")
    finally:
        os.seteuid(0)
    assert (code, out) == (1, "")
    what = {"create": "make", "remove": "remove"}[command]
    assert err == (
        f"error: cannot {what} kucomms_a: Permission denied; only root may, so try sudo\n"
    )
    assert names() == ["kucomms_a"]


def test_as_a_process():
    """It worked; that it exits with 1 if it did not, others see."""
    result = subprocess.run(
        [sys.executable, "-m", "kucomms", "device", "create", "a"],
        capture_output=True, text=True, check=False, timeout=DEADLINE,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert names() == ["kucomms_a"]


# ---- doctor ------------------------------------------------------------------


def test_doctor(run):
    check = doctor._kernel_module()
    assert (check.status, check.remedy) == ("ok", "")
    assert re.match(rf"loaded, version {re.escape(kucomms.__version__)}, ", check.detail)
    check = doctor._installed_module()
    assert check.status == "ok"
    assert "/kucomms.ko" in check.detail
    assert check.detail.endswith(f"version {kucomms.__version__}")
    assert run("create", "a")[0] == 0
    assert doctor._kernel_devices().detail == "kernel://a (0600 root:root)"
