# SPDX-License-Identifier: MIT
"""``kucomms device`` and what ``kucomms doctor`` says of the kernel, with files for sysfs.

The kernel itself is in tests/kernel/test_device_command.py.
"""

import errno
import grp
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

import kucomms
from kucomms import _core, _log, cli
from kucomms.cli import device, doctor


@pytest.fixture(autouse=True)
def log_of_the_process():
    """The command sets where the log goes, to a stream that pytest closes after the test."""
    yield
    _log.to_stderr = False
    structlog.reset_defaults()

ROOT = Path(__file__).resolve().parents[1]
GROUP = grp.getgrgid(os.getgid()).gr_name
LONGEST = "a" * _core.NAME_MAX
BAD_NAMES = [
    "", "kucomms_", "kernel://", LONGEST + "a", f"kucomms_{LONGEST}a", "a/b", "../a", ".", "a.b",
    "a\n", "a\nb", "\na", "a b", "a-b", "é", "shm://a", "kernel://a/b", "kernel://kernel://a",
]  # fmt: skip


class Kernel:
    """Plays the kernel module: does what is written to its attributes, or refuses it."""

    def __init__(self, root):
        self.sysfs = root / "sys"
        self.dev = root / "dev"
        self.proc = root / "proc"
        self.classes = self.sysfs / "devices/virtual/kucomms"
        self.written = []
        self.refuses = {}
        self.has_devtmpfs = True
        for directory in (self.sysfs, self.dev, self.proc):
            directory.mkdir()

    def load(self, version=kucomms.__version__, abi=_core.lib.KUCOMMS_ABI_VERSION):
        (self.classes / "kucomms").mkdir(parents=True)
        (self.classes / "kucomms/abi_version").write_text(f"{abi}\n")
        (self.sysfs / "module/kucomms").mkdir(parents=True)
        (self.sysfs / "module/kucomms/version").write_text(f"{version}\n")

    def write(self, path, text):
        assert path.parent == self.classes / "kucomms"
        self.written.append((path.name, text))
        if number := self.refuses.get(path.name):
            raise OSError(number, os.strerror(number), str(path))
        if path.name == "create_device":
            self.make(text)
        else:
            self.remove(text)

    def make(self, name, endpoint="0", channels="0"):
        (self.classes / name).mkdir()
        (self.classes / name / "endpoint").write_text(f"{endpoint}\n")
        (self.classes / name / "channels").write_text(f"{channels}\n")
        if self.has_devtmpfs:
            (self.dev / name).touch(0o600)

    def remove(self, name):
        for path in (self.classes / name).iterdir():
            path.unlink()
        (self.classes / name).rmdir()
        (self.dev / name).unlink(missing_ok=True)

    def process(self, pid, program, *links, maps=""):
        directory = self.proc / str(pid)
        (directory / "fd").mkdir(parents=True)
        (directory / "comm").write_text(f"{program}\n")
        (directory / "maps").write_text(maps)
        for number, link in enumerate(links):
            (directory / "fd" / str(number)).symlink_to(link)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A machine in tmp_path; nothing is loaded yet. The files stand for device nodes."""
    kernel = Kernel(tmp_path)
    monkeypatch.setattr(device, "ROOT", tmp_path)
    monkeypatch.setattr(device, "SYSFS", kernel.sysfs)
    monkeypatch.setattr(device, "DEV", kernel.dev)
    monkeypatch.setattr(device, "PROC", kernel.proc)
    monkeypatch.setattr(device, "UDEV", tmp_path / "no udev")
    monkeypatch.setattr(device, "MODULES", tmp_path / "modules")
    monkeypatch.setattr(device, "_is_node", Path.exists)
    monkeypatch.setattr(device, "_write", kernel.write)
    return kernel


@pytest.fixture
def loaded(kernel):
    kernel.load()
    return kernel


@pytest.fixture
def run(capsys):
    """Run the command in this process: its exit code, stdout and stderr."""

    def run(*arguments):
        code = cli.main(["device", *arguments])
        return code, *capsys.readouterr()

    return run


# ---- the frame --------------------------------------------------------------


@pytest.mark.parametrize("command", [(), ("create",), ("remove",), ("list",)])
def test_help_has_an_example_and_json(run, command):
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert " ".join(("kucomms device", *command)) in out.split("Example")[1]
    assert "--json" in out


def test_as_a_process():
    result = subprocess.run(
        [sys.executable, "-m", "kucomms", "device", "create", "a.b"],
        capture_output=True, text=True, check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"error: 'a\.b' cannot be the name of a device: .*\n", result.stderr)


@pytest.mark.parametrize("command", [("create", "a"), ("remove", "a"), ("list",)])
@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_without_the_module(run, kernel, command, as_json):
    code, out, err = run(*command, *as_json)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: the kernel module kucomms is not loaded: .*\n", err)
    assert "modprobe kucomms" in err
    assert "make -C kernel_module && make -C kernel_module install" in err
    assert kernel.written == []


# ---- names ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("longtest", "kucomms_longtest"),
        ("kucomms_longtest", "kucomms_longtest"),
        ("kernel://longtest", "kucomms_longtest"),
        ("kernel://kucomms_longtest", "kucomms_kucomms_longtest"),
        ("kucomms", "kucomms_kucomms"),
        ("_", "kucomms__"),
        (LONGEST, f"kucomms_{LONGEST}"),
        (f"kernel://{LONGEST}", f"kucomms_{LONGEST}"),
    ],
)
def test_names(run, loaded, name, full):
    assert run("create", name)[0] == 0
    assert run("remove", name)[0] == 0
    assert loaded.written == [("create_device", full), ("remove_device", full)]


@pytest.mark.parametrize("command", ["create", "remove"])
@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_never_reach_the_kernel(run, loaded, command, name):
    code, out, err = run(command, "--", name)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: .* 1 to 48 of the characters A-Z a-z 0-9 _\n", err)
    assert loaded.written == []


# ---- create -----------------------------------------------------------------


def test_create(run, loaded):
    code, out, err = run("create", "longtest")
    assert (code, err) == (0, "")
    node = loaded.dev / "kucomms_longtest"
    assert out.startswith(f"made {node} (0600 ")
    assert out.endswith(": kernel://longtest\n")


def test_create_with_rights(run, loaded):
    code, out, err = run("create", "longtest", "--mode", "0640", "--group", GROUP, "--json")
    assert (code, err) == (0, "")
    about = json.loads(out)
    assert about.pop("owner")
    assert about == {
        "name": "kucomms_longtest",
        "url": "kernel://longtest",
        "path": str(loaded.dev / "kucomms_longtest"),
        "mode": "0640",
        "group": GROUP,
        "endpoint": False,
        "channels": 0,
    }
    assert (loaded.dev / "kucomms_longtest").stat().st_mode & 0o7777 == 0o640


@pytest.mark.parametrize("group", [GROUP, str(os.getgid())])
def test_a_group_may_read_and_write_when_no_mode_is_given(run, loaded, group, monkeypatch):
    owners = []
    monkeypatch.setattr(os, "chown", lambda *arguments: owners.append(arguments))
    assert run("create", "a", "--group", group)[0] == 0
    assert owners == [(loaded.dev / "kucomms_a", -1, os.getgid())]
    assert (loaded.dev / "kucomms_a").stat().st_mode & 0o7777 == 0o660


@pytest.mark.parametrize("mode", ["660", "0660", "0o660"])
def test_modes(run, loaded, mode):
    assert json.loads(run("create", "a", "--mode", mode, "--json")[1])["mode"] == "0660"


@pytest.mark.parametrize(
    "option",
    [
        *(("--mode", mode) for mode in ("", "66", "0888", "rw", "-660", "04660", "0x1b0")),
        *(("--group", group) for group in ("", "no such group", "-1", "4294967295", "a\0b")),
    ],
)
def test_bad_rights_are_seen_before_anything_is_made(run, loaded, option):
    code, out, err = run("create", "a", *option)
    assert (code, out) == (2, "")
    assert "is not a mode" in err or "there is no group" in err
    assert loaded.written == []


def test_rights_that_are_refused_leave_no_device(run, loaded, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chown", refuse)
    code, out, err = run("create", "a", "--group", GROUP)
    assert (code, out) == (1, "")
    assert re.fullmatch("error: cannot set the rights of .*/kucomms_a: .* removed again\n", err)
    assert [attribute for attribute, _ in loaded.written] == ["create_device", "remove_device"]
    assert device.devices() == []


def test_a_node_that_does_not_come(run, loaded, monkeypatch):
    monkeypatch.setattr(device, "_NODE_TIMEOUT", 0.0)
    loaded.has_devtmpfs = False
    code, out, err = run("create", "a")
    assert (code, out) == (1, "")
    assert "neither devtmpfs nor udev made it" in err
    assert device.devices() == []


def test_a_file_in_the_place_of_the_node_is_not_touched(run, loaded, monkeypatch):
    monkeypatch.undo()
    assert device._is_node(Path("/dev/null"))
    file = loaded.dev / "kucomms_a"
    file.touch()
    link = loaded.dev / "kucomms_b"
    link.symlink_to("/dev/null")
    for path in (file, link, loaded.dev / "kucomms_c"):
        assert not device._is_node(path)


def test_create_waits_for_udev_before_it_sets_the_rights(run, loaded, monkeypatch, tmp_path):
    ran = []
    (tmp_path / "no udev").touch()
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/bin/{name}")

    def settle(command, **options):
        mode = (loaded.dev / "kucomms_a").stat().st_mode & 0o7777
        ran.append((command[:2], mode))

    monkeypatch.setattr(device.subprocess, "run", settle)
    assert run("create", "a", "--mode", "0666")[0] == 0
    assert ran == [(["/bin/udevadm", "settle"], 0o600)]
    assert (loaded.dev / "kucomms_a").stat().st_mode & 0o7777 == 0o666


# ---- what the kernel refuses -------------------------------------------------


@pytest.mark.parametrize(
    ("command", "number", "said"),
    [
        ("create", errno.EEXIST, "there is a device kucomms_a already"),
        ("remove", errno.ENOENT, "there is no device kucomms_a"),
        ("remove", errno.EBUSY, "kucomms_a is in use: "),
        *((c, errno.EINVAL, "does not take the name kucomms_a") for c in ("create", "remove")),
        *((c, errno.ENAMETOOLONG, "does not take the name") for c in ("create", "remove")),
        *((c, errno.EACCES, "Permission denied; only root may") for c in ("create", "remove")),
        *((c, errno.EPERM, "Operation not permitted; only root") for c in ("create", "remove")),
        *((c, errno.ENOMEM, "Cannot allocate memory") for c in ("create", "remove")),
    ],
)
def test_refusals(run, loaded, command, number, said):
    loaded.refuses[f"{command}_device"] = number
    code, out, err = run(command, "a", "--json")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert said in err
    assert len(loaded.written) == 1


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EINVAL, kucomms.AddressError),
        (errno.EEXIST, kucomms.AddressInUseError),
        (errno.EACCES, kucomms.TransportError),
    ],
)
def test_errors_of_kucomms(loaded, number, error):
    loaded.refuses["create_device"] = number
    with pytest.raises(error) as caught:
        device._create("kucomms_a")
    assert isinstance(caught.value.__cause__, OSError)
    if error is kucomms.TransportError:
        assert caught.value.errno == number


def test_busy_names_who_has_it_open(run, loaded):
    node = str(loaded.dev / "kucomms_a")
    loaded.make("kucomms_a", endpoint="1", channels="2")
    loaded.process(7, "init", "/dev/null", node + "b")
    loaded.process(12, "python", "/dev/null", node)
    loaded.process(103, "mapper", maps=f"7f00-7f01 rw-s 00000000 00:05 12    {node}\n")
    (loaded.proc / "self").symlink_to(loaded.proc / "12")
    (loaded.proc / "13").mkdir()  # ends just now
    loaded.refuses["remove_device"] = errno.EBUSY
    code, _, err = run("remove", "a")
    assert code == 1
    assert err == (
        "error: kucomms_a is in use: a kernel endpoint is registered for it (rmmod the module "
        "that did it); the processes 12 (python), 103 (mapper) have it open\n"
    )


def test_busy_by_one_process(run, loaded):
    loaded.make("kucomms_a")
    loaded.process(12, "python", loaded.dev / "kucomms_a")
    loaded.refuses["remove_device"] = errno.EBUSY
    assert run("remove", "a")[2].endswith("in use: process 12 (python) has it open\n")


def test_busy_by_somebody_who_cannot_be_seen(run, loaded):
    loaded.make("kucomms_a")
    loaded.refuses["remove_device"] = errno.EBUSY
    assert "some process has it open that this user may not look at" in run("remove", "a")[2]


def test_remove(run, loaded):
    loaded.make("kucomms_a")
    loaded.make("kucomms_b")
    node = loaded.dev / "kucomms_a"
    assert run("remove", "a") == (0, f"removed {node}\n", "")
    assert [each.name for each in device.devices()] == ["kucomms_b"]
    code, out, err = run("remove", "kernel://b", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "name": "kucomms_b",
        "url": "kernel://b",
        "path": str(loaded.dev / "kucomms_b"),
        "removed": True,
    }


# ---- list -------------------------------------------------------------------


def test_list(run, loaded):
    assert run("list") == (0, "", "")
    assert json.loads(run("list", "--json")[1]) == {"devices": []}
    loaded.make("kucomms_b", endpoint="1", channels="12")
    loaded.make("kucomms_a")
    loaded.has_devtmpfs = False
    loaded.make("kucomms_c", endpoint="", channels="x")
    code, out, err = run("list")
    assert (code, err) == (0, "")
    a, b, c = out.splitlines()
    assert re.fullmatch(r"kucomms_a  kernel://a  0600  \S+:\S+  none  0", a)
    assert re.fullmatch(r"kucomms_b  kernel://b  0600  \S+:\S+  registered  12", b)
    assert c == "kucomms_c  kernel://c  -  -  ?  ?"
    found = json.loads(run("list", "--json")[1])["devices"]
    assert [each["url"] for each in found] == ["kernel://a", "kernel://b", "kernel://c"]
    assert [each["endpoint"] for each in found] == [False, True, None]
    assert [each["channels"] for each in found] == [0, 12, None]
    assert found[2]["mode"] is found[2]["owner"] is found[2]["group"] is None


def test_a_device_that_goes_while_it_is_listed(loaded):
    assert device._device("kucomms_gone").mode is None


def test_list_on_a_terminal(run, loaded, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "kucomms device create NAME makes one" in run("list")[1]
    loaded.make("kucomms_a", endpoint="1", channels="3")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", run("list")[1])
    assert re.search(r"^device +URL +mode +owner +endpoint +channels *$", plain, re.MULTILINE)
    assert re.search(r"^kucomms_a +kernel://a +0600 .* registered +3 *$", plain, re.MULTILINE)


# ---- doctor -----------------------------------------------------------------


@pytest.fixture
def modinfo(monkeypatch):
    """What modinfo says; None when there is none."""
    said = {"filename": "", "version": ""}
    monkeypatch.setattr(doctor, "_modinfo", lambda *arguments: said[arguments[-1]])
    return said


def test_doctor_without_the_kernel_side(kernel, modinfo):
    for check in (doctor._kernel_module(), doctor._installed_module(), doctor._kernel_headers()):
        assert check.status == "warn"
        assert check.remedy.startswith("needed only ")
    assert "modprobe kucomms" in doctor._kernel_module().remedy
    assert device.INSTALL in doctor._installed_module().remedy
    assert f"linux-headers-{os.uname().release}" in doctor._kernel_headers().remedy
    assert doctor._kernel_devices().status == "ok"
    assert doctor._udev_rule().status == "ok"


def test_doctor_never_fails_for_the_kernel_side():
    result = subprocess.run(
        [sys.executable, "-m", "kucomms", "doctor", "--json"],
        capture_output=True, text=True, check=True,
    )
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    names = {"kernel module", "modprobe kucomms", "kernel headers", "kernel devices", "udev rule"}
    assert names <= checks.keys()
    for name in names:
        assert checks[name]["status"] in ("ok", "warn")


def test_doctor_knows_the_version_of_the_module(kernel):
    kernel.load()
    check = doctor._kernel_module()
    assert (check.status, check.remedy) == ("ok", "")
    assert check.detail == (
        f"loaded, version {kucomms.__version__}, ABI version {_core.lib.KUCOMMS_ABI_VERSION}"
    )


def test_doctor_sees_another_version(kernel):
    kernel.load(version="0.0.9")
    check = doctor._kernel_module()
    assert check.status == "warn"
    assert f"this package is version {kucomms.__version__}" in check.detail


@pytest.mark.parametrize("abi", ["99", ""])
def test_doctor_sees_a_foreign_abi(kernel, abi):
    kernel.load(abi=abi)
    check = doctor._kernel_module()
    assert check.status == "warn"
    assert f"ABI version {abi or '?'}; " in check.detail
    assert "kernel:// cannot work" in check.detail
    assert "rmmod kucomms" in check.remedy


def test_doctor_finds_the_installed_module(kernel, modinfo):
    modinfo |= {"filename": "/lib/modules/1/updates/kucomms.ko", "version": "0.1.0"}
    check = doctor._installed_module()
    assert check.status == "ok"
    assert check.detail == "finds /lib/modules/1/updates/kucomms.ko, version 0.1.0"
    assert doctor._kernel_headers().status == "ok"  # not there, and not needed
    modinfo["filename"] = None
    assert "install kmod" in doctor._installed_module().remedy


def test_doctor_runs_modinfo(tmp_path, monkeypatch):
    program = tmp_path / "modinfo"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._modinfo("-F", "version") == "-F version kucomms"
    program.write_text("#!/bin/sh\necho nonsense\nexit 1\n")
    assert doctor._modinfo("-F", "version") == ""
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path: None)
    assert doctor._modinfo("-F", "version") is None


def test_doctor_finds_the_headers(kernel, modinfo):
    build = device.MODULES / os.uname().release / "build"
    build.mkdir(parents=True)
    (build / "Makefile").touch()
    check = doctor._kernel_headers()
    assert (check.status, check.detail) == ("ok", str(build))


def test_doctor_knows_who_may_open_the_devices(loaded, monkeypatch):
    loaded.make("kucomms_a")
    loaded.make("kucomms_b")
    check = doctor._kernel_devices()
    assert check.status == "ok"
    assert re.fullmatch(
        r"kernel://a \(0600 \S+:\S+\), kernel://b \(0600 \S+:\S+\)", check.detail
    )
    monkeypatch.setattr(os, "access", lambda path, mode: path.endswith("_a"))
    check = doctor._kernel_devices()
    assert check.status == "warn"
    assert check.detail.endswith("; not for this user: kernel://b")
    assert "--group" in check.remedy


def test_doctor_finds_the_udev_rule(kernel, tmp_path):
    directory = tmp_path / "etc/udev/rules.d"
    directory.mkdir(parents=True)
    (directory / "99-kucomms.rules").touch()
    assert doctor._udev_rule().detail == str(directory / "99-kucomms.rules")


# ---- packaging --------------------------------------------------------------


def test_dkms_has_our_version():
    text = (ROOT / "kernel_module/dkms.conf").read_text()
    assert f'PACKAGE_VERSION="{kucomms.__version__}"' in text
    readme = (ROOT / "kernel_module/README.md").read_text()
    assert set(re.findall(r"kucomms/(\d[\w.]*)", readme)) == {kucomms.__version__}
