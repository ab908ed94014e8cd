# SPDX-License-Identifier: MIT
"""The package as such: imports, names, documentation, the compiled parts."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kucomms
from kucomms import exceptions

CONTRACT = {
    "KucommsError", "ClosedError", "PeerClosedError", "ShutdownError", "NotReadyError",
    "BusyError", "AddressError", "AddressInUseError", "QueueFull", "QueueEmpty",
    "MessageTooLargeError", "UsageError", "ProtocolError", "VersionError", "TransportError",
    "NoSuchChannelError", "ChannelTakenError",
    "Endpoint", "Message", "connect", "run", "get_include",
}


def test_import_starts_no_thread_and_opens_no_file():
    program = """
import os, threading
before = set(os.listdir("/proc/self/fd"))
import kucomms, kucomms.transports.shm, kucomms.transports.inproc
assert threading.active_count() == 1
assert os.listdir("/proc/self/task") == [str(os.getpid())]
assert set(os.listdir("/proc/self/fd")) == before, os.listdir("/proc/self/fd")
import sys
assert "uvloop" not in sys.modules and "kucomms.cli" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_name_of_the_contract_is_there():
    assert set(kucomms.__all__) >= CONTRACT
    for name in kucomms.__all__:
        assert getattr(kucomms, name) is not None


def _public_things():
    for name in kucomms.__all__:
        thing = getattr(kucomms, name)
        yield name, thing
        if inspect.isclass(thing):
            for attribute, value in vars(thing).items():
                if attribute.startswith("_"):
                    continue
                if inspect.isfunction(value) or isinstance(value, property | classmethod):
                    yield f"{name}.{attribute}", value


@pytest.mark.parametrize(
    "thing", [pytest.param(thing, id=name) for name, thing in _public_things()]
)
def test_every_public_name_is_documented(thing):
    assert inspect.getdoc(thing)


def test_errors_are_what_they_mean():
    import asyncio

    assert issubclass(kucomms.NotReadyError, TimeoutError)
    assert issubclass(kucomms.QueueFull, asyncio.QueueFull)
    assert issubclass(kucomms.QueueEmpty, asyncio.QueueEmpty)
    assert issubclass(kucomms.AddressError, ValueError)
    assert issubclass(kucomms.MessageTooLargeError, ValueError)
    assert issubclass(kucomms.UsageError, RuntimeError)
    assert issubclass(kucomms.TransportError, OSError)
    assert issubclass(kucomms.ShutdownError, kucomms.PeerClosedError)
    assert issubclass(kucomms.VersionError, kucomms.ProtocolError)
    assert issubclass(kucomms.NoSuchChannelError, kucomms.NotReadyError)
    assert issubclass(kucomms.ChannelTakenError, kucomms.BusyError)
    for name in exceptions.__all__:
        assert issubclass(getattr(exceptions, name), kucomms.KucommsError)
    error = kucomms.TransportError(12, "no memory")
    assert (error.errno, error.strerror) == (12, "no memory")


def test_get_include_has_the_headers():
    include = Path(kucomms.get_include())
    for header in ("kucomms/client.h", "kucomms/ring.h", "linux/kucomms.h", "asm/barrier.h"):
        assert (include / header).is_file()


def test_ring_is_one_source():
    include = Path(kucomms.get_include())
    tree = include.parent.parent / "kernel_module" / "include"
    assert (include / "kucomms/ring.h").samefile(tree / "kucomms/ring.h")
    assert (include / "linux/kucomms.h").samefile(tree / "uapi/linux/kucomms.h")


def test_wheel_has_what_it_needs(tmp_path):
    root = Path(kucomms.__file__).parent.parent
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(tmp_path), str(root)],
        check=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert "cp311-abi3" in wheel.name
    target = tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target),
         str(wheel)],
        check=True,
    )
    program = f"""
import sys
sys.path.insert(0, {str(target)!r})
import kucomms, os
assert kucomms.__file__.startswith({str(target)!r})
for header in ("kucomms/client.h", "kucomms/ring.h", "linux/kucomms.h", "asm/barrier.h"):
    assert os.path.isfile(os.path.join(kucomms.get_include(), header)), header
import asyncio
async def main():
    endpoint = kucomms.Endpoint("wheel")
    @endpoint.on_message
    async def echo(message, link):
        await link.send(message)
    async with endpoint:
        await endpoint.listen("inproc://wheel")
        async with kucomms.connect("inproc://wheel") as link:
            await link.send(b"x")
            assert (await link.receive()).data == b"x"
kucomms.run(main())
"""
    subprocess.run([sys.executable, "-I", "-c", program], check=True, cwd=tmp_path)
