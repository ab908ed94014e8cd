# SPDX-License-Identifier: MIT
"""client.h by way of its examples: C and C++ with each other, and with Python."""

import asyncio
import os
import re
import signal
import subprocess
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

import kucomms

EXAMPLES = Path(__file__).parents[1] / "examples"
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]
C = ["gcc", "-std=gnu11"]
CPP = ["g++", "-std=c++17"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
DEADLINE = 60
URL = "shm://native"
BOTH_HALVES = 6
"""Mappings of a channel that is linked: of each side its control pages, and its data twice."""


def compiled(compiler, source, program, *flags):
    include = f"-I{kucomms.get_include()}"
    done = subprocess.run(
        [*compiler, *WARNINGS, *flags, "-pthread", include, source, "-o", program],
        check=False,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return program


class Programs:
    """The two examples, built one way."""

    def __init__(self, directory, *flags):
        self.sender = compiled(C, EXAMPLES / "c_sender.c", directory / "c_sender", *flags)
        self.server = compiled(
            CPP, EXAMPLES / "cpp_echo_server.cpp", directory / "cpp_echo_server", *flags
        )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Programs(tmp_path_factory.mktemp("plain"), "-O2")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return Programs(tmp_path_factory.mktemp("sanitized"), *SANITIZE)


@pytest.fixture(params=["plain", "sanitized"])
def programs(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def nothing_left(runtime_dir):
    """Neither sockets and their directory nor shared memory outlive a test."""
    before = set(os.listdir("/dev/shm"))
    yield
    assert os.listdir(runtime_dir) == []
    assert set(os.listdir("/dev/shm")) <= before


@contextmanager
def started(*command):
    """A program; killed at the end if it has not ended by then."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def serving(programs, *options):
    with started(programs.server, URL, *options) as server:
        assert server.stdout.readline() == f"listening on {URL}\n"
        yield server


def ended(process):
    """Exit code and output of a program that ends by itself."""
    output, errors = process.communicate(timeout=DEADLINE)
    return process.returncode, output, errors


def run(*command):
    with started(*command) as process:
        return ended(process)


# ---- the header ---------------------------------------------------------------


@pytest.mark.parametrize("compiler", [C, CPP], ids=["c", "c++"])
@pytest.mark.parametrize("optimize", ["-O0", "-O2"])
def test_header_alone_gives_no_warning(tmp_path, compiler, optimize):
    source = tmp_path / ("client.c" if compiler is C else "client.cpp")
    source.write_text("#include <kucomms/client.h>\nint main(void) { return 0; }\n")
    compiled(compiler, source, tmp_path / "client", optimize)


# ---- C and C++ -----------------------------------------------------------------


def test_usage(programs):
    for program in (programs.sender, programs.server):
        for arguments in ([], [URL, "nonsense"], [URL, "1", "2"]):
            code, output, errors = run(program, *arguments)
            assert code == 2
            assert output == ""
            assert errors.startswith(f"usage: {program} shm://NAME")


@pytest.mark.parametrize("url", ["shm://", "shm://a-b", "shm://" + "x" * 49, "native", ""])
def test_bad_url(plain, url):
    for program in (plain.sender, plain.server):
        assert run(program, url) == (1, "", f"{url}: Invalid argument\n")


def test_exchange(programs):
    with serving(programs, "--once") as server:
        code, output, errors = run(programs.sender, URL, "3000")
        assert (code, errors) == (0, "")
        assert output.startswith("3000 messages, 31489500 bytes echoed, ")
        code, output, errors = ended(server)
        assert (code, errors) == (0, "")
        assert re.fullmatch(r"peer \d+: 3000 messages, 31489500 bytes echoed\n", output)


def test_sender_waits_for_the_server(programs):
    with started(programs.sender, URL, "10") as sender, serving(programs, "--once") as server:
        code, output, errors = ended(sender)
        assert (code, errors) == (0, "")
        assert output.startswith("10 messages, 315 bytes echoed, ")
        assert ended(server)[0] == 0


def test_one_peer_after_the_other(programs):
    with serving(programs) as server:
        for _ in range(3):
            assert run(programs.sender, URL, "5")[0] == 0
            assert server.stdout.readline().endswith(": 5 messages, 70 bytes echoed\n")
        server.terminate()
        assert ended(server) == (0, "", "")


def until_linked(server, sender):
    """The server is the last to map the other's half."""
    while shared_mappings(server) < BOTH_HALVES:
        assert sender.poll() is None


def shared_mappings(process):
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    return sum(line.split()[1].endswith("s") for line in maps.splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_both_in_order(programs, number):
    with serving(programs) as server:
        with started(programs.sender, URL, "0") as sender:
            until_linked(server, sender)
            sender.send_signal(number)
            code, output, errors = ended(sender)
            assert (code, errors) == (0, "")
            assert " bytes echoed, " in output
        assert server.stdout.readline().endswith(" bytes echoed\n")
        server.send_signal(number)
        assert ended(server) == (0, "", "")


def test_sender_sees_that_the_server_was_killed(programs):
    with serving(programs) as server, started(programs.sender, URL, "0") as sender:
        until_linked(server, sender)
        server.kill()
        code, output, errors = ended(sender)
        assert (code, output) == (1, "")
        assert errors.endswith(": Broken pipe\n")
    take_over(programs)


def take_over(programs):
    """Listen on what a killed server left behind, and leave nothing."""
    with serving(programs) as server:
        server.terminate()
        assert ended(server)[0] == 0


def test_address_in_use(programs):
    with serving(programs) as server:
        assert run(programs.server, URL) == (1, "", f"{URL}: Address already in use\n")
        assert run(programs.sender, URL, "5")[0] == 0
        server.kill()
        server.wait()
    take_over(programs)


# ---- with Python ---------------------------------------------------------------


@asynccontextmanager
async def python_echo():
    """An endpoint that echoes; also a queue of how its links ended."""
    endings = asyncio.Queue()
    endpoint = kucomms.Endpoint("native")

    @endpoint.on_message
    async def echo(message, link):
        await link.send(message)

    @endpoint.on_link_close
    def closed(link, error):
        endings.put_nowait(error)

    async with endpoint:
        await endpoint.listen(URL)
        yield endpoint, endings


@asynccontextmanager
async def started_async(*command):
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def serving_async(programs, *options):
    async with started_async(programs.server, URL, *options) as server:
        assert await server.stdout.readline() == f"listening on {URL}\n".encode()
        yield server


@pytest.mark.asyncio
async def test_c_sender_to_python(programs):
    async with asyncio.timeout(DEADLINE), python_echo() as (_endpoint, endings):
        async with started_async(programs.sender, URL, "2000") as sender:
            output, errors = await sender.communicate()
        assert (sender.returncode, errors) == (0, b"")
        assert output.startswith(b"2000 messages, 13993000 bytes echoed, ")
        assert await endings.get() is None  # in order


@pytest.mark.asyncio
async def test_python_client_to_cpp_server(programs):
    async with asyncio.timeout(DEADLINE), serving_async(programs, "--once") as server:
        async with kucomms.connect(URL) as link:
            for size in (0, 1, 31, 4096, 100_000, link.max_message_size):
                data = os.urandom(size)
                await link.send(data, type=2**64 - 1, id=size, user_value=1 << 63)
                message = await link.receive()
                assert message.data == data
                assert (message.type, message.id) == (2**64 - 1, size)
                assert message.user_value == 1 << 63
            with pytest.raises(kucomms.MessageTooLargeError):
                await link.send(bytes(link.max_message_size + 1))
        output, errors = await server.communicate()
        assert (server.returncode, errors) == (0, b"")
        assert b": 6 messages, " in output


@pytest.mark.asyncio
async def test_python_floods_cpp_server(programs):
    """Both rings fill up; each side parks for space and is woken again."""
    count, size = 20_000, 1000
    async with asyncio.timeout(DEADLINE), serving_async(programs, "--once") as server:
        async with kucomms.connect(URL, ring_size=65536) as link:
            assert link.ring_size == 65536

            async def send():
                for number in range(count):
                    await link.send(number.to_bytes(8, "little") * (size // 8), id=number)

            sending = asyncio.create_task(send())
            for number in range(count):
                message = await link.receive()
                assert message.id == number
                assert message.data[:8] == message.data[-8:] == number.to_bytes(8, "little")
            await sending
        output, errors = await server.communicate()
        assert (server.returncode, errors) == (0, b"")
        assert f": {count} messages, ".encode() in output


@pytest.mark.asyncio
async def test_python_sees_that_the_cpp_server_was_killed(plain):
    async with asyncio.timeout(DEADLINE):
        async with serving_async(plain) as server, kucomms.connect(URL) as link:
            await link.send(b"last words")
            assert (await link.receive()).data == b"last words"
            server.kill()
            with pytest.raises(kucomms.PeerClosedError):
                await link.receive()
            with pytest.raises(kucomms.PeerClosedError):
                await link.send(b"too late")
        async with python_echo():
            pass  # takes the name over and gives it back


@pytest.mark.asyncio
async def test_c_sender_sees_that_python_closed(programs):
    async with asyncio.timeout(DEADLINE), python_echo() as (endpoint, endings):
        enough = asyncio.Event()

        @endpoint.on_message
        async def echo(message, link):
            await link.send(message)
            if message.id == 100:
                enough.set()

        async with started_async(programs.sender, URL, "0") as sender:
            await enough.wait()
            (link,) = endpoint.links
            await link.aclose()
            output, errors = await sender.communicate()
        assert (sender.returncode, output) == (1, b"")
        assert errors.endswith(b": Broken pipe\n")
        assert await endings.get() is None


@pytest.mark.asyncio
async def test_c_sender_sees_a_full_listener(plain):
    async with asyncio.timeout(DEADLINE), kucomms.Endpoint("native") as endpoint:
        await endpoint.listen(URL, max_links=0)
        async with started_async(plain.sender, URL, "1") as sender:
            _output, errors = await sender.communicate()
        assert sender.returncode == 1
        assert errors.endswith(b": Device or resource busy\n")


@pytest.mark.asyncio
async def test_one_name_for_both_languages(plain):
    async with asyncio.timeout(DEADLINE):
        async with serving_async(plain) as server, kucomms.Endpoint("native") as endpoint:
            with pytest.raises(kucomms.AddressInUseError):
                await endpoint.listen(URL)
            server.terminate()
            await server.wait()
            await endpoint.listen(URL)
            async with started_async(plain.server, URL) as second:
                _output, errors = await second.communicate()
            assert second.returncode == 1
            assert errors.endswith(b": Address already in use\n")


def test_a_file_at_the_name_is_not_removed(plain, runtime_dir):
    """A file refuses a connection as a dead socket does; it must stay what it is."""
    directory = Path(runtime_dir) / "kucomms"
    directory.mkdir(mode=0o700)
    path = directory / URL.removeprefix("shm://")
    path.write_text("precious")
    done = subprocess.run(
        [plain.server, URL], check=False, timeout=DEADLINE, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "not permitted" in done.stderr
    assert path.read_text() == "precious"
    path.unlink()
    directory.rmdir()
