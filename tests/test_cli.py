# SPDX-License-Identifier: MIT
"""The ``kucomms`` command, run as users run it: real processes."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading

import pytest

KUCOMMS = [sys.executable, "-m", "kucomms"]
DEADLINE = 60
COMMANDS = ("bench", "device", "doctor", "echo", "listen", "longtest", "send")

LINE_1 = re.compile(r"avail_tx0=\d+ : add_error_count=\d+ : compare_error_count=\d+")
LINE_2 = re.compile(
    r"sent_count_0=\d+ : sent_count_1=\d+ : received_count_0=\d+ : received_count_1=\d+"
)

# An echo server that mistreats the hundredth message of type 0, as argv[2] says.
BAD_ECHO = """
import asyncio, sys
import kucomms

async def main(url, fault):
    gone = asyncio.Event()
    count = 0
    held = None

    async def message(message, link):
        nonlocal count, held
        count += 1
        if held is not None:
            await link.send(message)
            message, held = held, None
        elif count == 100:
            if fault == "swap":
                held = message
                return
            if fault == "drop":
                return
            if fault == "double":
                await link.send(message)
            if fault == "change":
                data = message.data[:-1] + bytes([message.data[-1] ^ 1]) if message.data else b"x"
                message = kucomms.Message(data, message.type, message.id, message.user_value)
            if fault == "user_value":
                message = kucomms.Message(message.data, message.type, message.id, 0)
            if fault == "id":
                message = kucomms.Message(message.data, message.type, 1 << 63, message.user_value)
            if fault == "close":
                await link.aclose()
                return
        await link.send(message)
        if count == 100:  # of type 1, so that this side's direction is not empty
            await link.send(b"", type=1)

    endpoint = kucomms.Endpoint("bad", on_message=message)
    endpoint.on_link_close(lambda link, error: gone.set())
    async with endpoint:
        await endpoint.listen(url)
        await gone.wait()

kucomms.run(main(*sys.argv[1:]))
"""

# Listens, and asks the first who connects.
ASKER = """
import asyncio, sys
import kucomms

async def main(url):
    answered = asyncio.Event()

    async def opened(link):
        await link.send(b"x", type=1, id=2, user_value=3)

    def message(message, link):
        print(message)
        answered.set()

    async with kucomms.Endpoint("asker", on_message=message, on_link_open=opened) as endpoint:
        await endpoint.listen(url)
        await answered.wait()

kucomms.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def start():
    """Start a command; whatever still runs at the end of the test is killed."""
    processes = []

    def start(*arguments, program=KUCOMMS, **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        process = subprocess.Popen([*program, *arguments], **options)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def run(start):
    """Run a command to its end: its exit code, stdout and stderr."""

    def run(*arguments, feed=None, **options):
        process = start(*arguments, stdin=subprocess.PIPE, **options)
        out, err = process.communicate(feed, timeout=DEADLINE)
        return process.returncode, out, err

    return run


def end(process):
    """Its exit code, and what it still had to say."""
    out, err = process.communicate(timeout=DEADLINE)
    return process.returncode, out, err


def listening(process, url):
    """Wait until it says so."""
    assert process.stderr.readline() == f"listening at {url}\n"


# ---- the frame --------------------------------------------------------------


def test_help_names_all_commands(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", out, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example_and_json(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert "Example" in out
    assert f"kucomms {command}" in out.split("Example")[1]
    assert "--json" in out


def test_version(run):
    import kucomms

    assert run("--version")[:2] == (0, f"kucomms, version {kucomms.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("send", "shm://nobody", "x", "--timeout", "0"), "nobody listens"),
        (("send", "nonsense", "x"), "not a URL"),
        (("send", "carrier://pigeon", "x"), "no transport"),
        (("send", "shm://a/b", "x"), "characters"),
        (("echo", "shm://a?b"), "characters"),
        (("listen", "inproc://alone", "--timeout", "0"), "nobody connected"),
        (("longtest", "shm://nobody", "--timeout", "0"), "nobody listens"),
        (("longtest", "shm://nobody", "--timeout", "0", "--json"), "nobody listens"),
        (("longtest", "shm://nobody", "--listen", "--timeout", "0", "--json"), "nobody connected"),
    ],
)
def test_an_error_is_one_line(run, arguments, said):
    code, out, err = run(*arguments)
    assert code == 1
    assert out == ""
    *before, line = err.splitlines()
    assert all(text.startswith("listening at") for text in before)
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("dance",),
        ("send", "shm://x"),
        ("send", "shm://x", "data", "--file", os.devnull),
        ("send", "shm://x", "-", "--count", "2"),
        ("send", "shm://x", "data", "--type", "-1"),
        ("send", "shm://x", "data", "--id", str(1 << 64)),
        ("longtest", "shm://x", "--ring-size", "4096"),
        ("longtest", "shm://x", "--ring-size", "1G1"),
        ("longtest", "shm://x", "--seconds", "0"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: kucomms" in err
    assert "Traceback" not in err


def test_the_name_is_taken(start, run):
    first = start("listen", "shm://taken")
    listening(first, "shm://taken")
    code, out, err = run("listen", "shm://taken")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: shm://taken: another process listens there already.*\n", err)


# ---- echo, send, listen -----------------------------------------------------


def test_send_request_is_answered_by_echo_reply(start, run):
    echo = start("echo", "shm://lab", "--reply", "--json")
    assert run("send", "shm://lab", "hello", "--request") == (0, "hello\n", "")
    code, out, err = run(
        *("send", "shm://lab", "hi", "--request", "--json", "--count", "2"),
        *("--type", "5", "--user-value", str((1 << 64) - 1)),
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    reply = {"type": 5, "user_value": (1 << 64) - 1, "length": 2, "text": "hi"}
    assert [reply | {"id": number} for number in (1, 2)] == result.pop("replies")
    assert result == {"url": "shm://lab", "messages": 2, "bytes": 4}
    echo.send_signal(signal.SIGINT)
    code, out, err = end(echo)
    assert (code, err) == (0, "")
    assert json.loads(out) == {"url": "shm://lab", "links": 2, "messages": 3, "bytes": 9}


def test_a_request_that_is_only_echoed_times_out(start, run):
    start("echo", "shm://lab")
    code, out, err = run("send", "shm://lab", "hello", "--request", "--timeout", "2")
    assert (code, out) == (1, "")
    assert err.startswith("error: shm://lab: no reply to request")


def test_echo_connects_to_a_listener(start):
    echo = start("echo", "shm://lab", "--connect", "--json")
    asker = start("shm://lab", program=[sys.executable, "-c", ASKER])
    assert end(asker) == (0, "Message(data=b'x', type=1, id=2, user_value=3)\n", "")
    code, out, err = end(echo)
    assert (code, err) == (0, "")
    assert json.loads(out) == {"url": "shm://lab", "links": 1, "messages": 1, "bytes": 1}


def test_listen_prints_what_arrives(start, run):
    listen = start("listen", "shm://lab", "--count", "5")
    listening(listen, "shm://lab")
    assert run("send", "shm://lab", "-", "--type", "3", feed="one\ntwo\n\nend")[0] == 0
    assert run("send", "shm://lab", "two\nlines", "--id", "7", "--user-value", "9")[0] == 0
    code, out, _ = end(listen)
    assert code == 0
    assert out.splitlines() == [
        "type=3 id=0 user_value=0 length=3: one",
        "type=3 id=0 user_value=0 length=3: two",
        "type=3 id=0 user_value=0 length=0: ",
        "type=3 id=0 user_value=0 length=3: end",
        "type=0 id=7 user_value=9 length=9: b'two\\nlines'",
    ]


def test_listen_hex_and_json(start, run, tmp_path):
    binary = tmp_path / "data"
    binary.write_bytes(b"\xff\x00\x01")
    hexadecimal = start("listen", "shm://hex", "--count", "1", "--hex")
    objects = start("listen", "shm://json", "--count", "2", "--json")
    assert run("send", "shm://hex", "AB")[0] == 0
    assert run("send", "shm://json", "AB")[0] == 0
    assert run("send", "shm://json", "--file", str(binary))[0] == 0
    assert end(hexadecimal)[1] == "type=0 id=0 user_value=0 length=2: 41 42\n"
    code, out, err = end(objects)
    assert (code, err) == (0, "")
    header = {"type": 0, "id": 0, "user_value": 0}
    assert [json.loads(line) for line in out.splitlines()] == [
        header | {"length": 2, "text": "AB"},
        header | {"length": 3, "hex": "ff0001"},
    ]


def test_send_many_lines_loses_none(start, run, tmp_path):
    printed = tmp_path / "printed"
    count = 5000
    with printed.open("w") as file:
        listen = start(
            *("listen", "shm://lab", "--json", "--count", str(count), "--ring-size", "4K"),
            stdout=file,
        )
    lines = [f"line {number}" for number in range(count)]
    code, out, err = run("send", "shm://lab", "-", "--json", feed="\n".join(lines))
    assert (code, err) == (0, "")
    assert json.loads(out)["messages"] == count
    assert listen.wait(DEADLINE) == 0
    assert [json.loads(line)["text"] for line in printed.read_text().splitlines()] == lines


def test_send_says_when_the_listener_is_stopped(start, run):
    listen = start("listen", "shm://lab", "--ring-size", "4K")
    listening(listen, "shm://lab")
    listen.send_signal(signal.SIGSTOP)
    code, _, err = run("send", "shm://lab", "x", "--timeout", "0.2")
    listen.send_signal(signal.SIGCONT)
    assert code == 1
    assert re.fullmatch("error: .*says nothing.*\n", err)


def test_listen_into_a_pipe_that_closes(start, run):
    listen = start("listen", "shm://lab")
    listening(listen, "shm://lab")
    listen.stdout.close()
    assert run("send", "shm://lab", "x")[0] == 0
    assert listen.wait(DEADLINE) == 1
    assert listen.stderr.read() == ""
    listen.stdout = None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["echo", "listen"])
def test_servers_end_in_order_at_a_signal(start, command, number):
    server = start(command, "shm://lab")
    listening(server, "shm://lab")
    server.send_signal(number)
    code, _, err = end(server)
    assert (code, err) == (0, "")


def test_send_ends_with_130_at_control_c(start):
    listen = start("listen", "shm://lab")
    listening(listen, "shm://lab")
    send = start("send", "shm://lab", "-", stdin=subprocess.PIPE)
    send.stdin.write("one\n")
    send.stdin.flush()
    assert listen.stdout.readline().endswith(": one\n")
    send.send_signal(signal.SIGINT)
    assert send.wait(DEADLINE) == 130
    assert send.stderr.read().strip() == ""  # an empty line, to come after the ^C


# ---- doctor -----------------------------------------------------------------


def test_doctor_finds_this_machine_fit(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert re.search(r"^ok +shm://: \d+ round trips .* median \d+ µs", out, re.MULTILINE)


def test_doctor_json(run):
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["ok"] is True
    assert {"Python", "compiled core", "inproc://", "shm://", "C client"} <= {
        check["name"] for check in report["checks"]
    }
    for check in report["checks"]:
        assert check["status"] in ("ok", "warn", "fail")
        assert bool(check["remedy"]) == (check["status"] != "ok")


def test_doctor_says_where_pools_use_threads(run):
    code, out, err = run("doctor", "--json", env=os.environ | {"KUCOMMS_IO": "threads"})
    assert (code, err) == (0, "")
    (check,) = (one for one in json.loads(out)["checks"] if one["name"] == "asynchronous I/O")
    assert check["status"] == "warn"
    assert "threads" in check["detail"]
    assert "io_uring" in check["remedy"]


def test_doctor_says_what_is_wrong(run, tmp_path):
    directory = tmp_path / "kucomms"
    directory.mkdir()
    directory.chmod(0o777)
    code, out, err = run("doctor", "--json", env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)})
    assert (code, err) == (1, "")
    report = json.loads(out)
    assert report["ok"] is False
    failed = {check["name"]: check for check in report["checks"] if check["status"] == "fail"}
    assert set(failed) == {"directory of sockets", "shm://"}
    assert str(directory) in failed["directory of sockets"]["detail"]


# ---- longtest ---------------------------------------------------------------


def longtest_pair(start, *arguments, url="shm://longtest", a=(), b=()):
    listener = start("longtest", "--listen", url, *arguments, *b)
    return start("longtest", url, *arguments, *a), listener


def both_good(a, b):
    """Nothing was lost between the two."""
    for side in (a, b):
        assert side["ok"] is True
        assert side["error"] is None
        assert side["add_error_count"] == side["compare_error_count"] == 0
        assert side["unanswered"] == 0
        for kind in (0, 1):
            assert side[f"sent_count_{kind}"] == side[f"received_count_{kind}"] > 0
            assert side[f"sent_count_{kind}"] == a[f"sent_count_{kind}"]
        assert side["bytes_sent"] == side["bytes_received"] == a["bytes_sent"] > 0
    assert (a["side"], b["side"]) == ("A", "B")
    assert (a["pid"], b["pid"]) == (b["peer_pid"], a["peer_pid"])


@pytest.mark.parametrize("ring_size", ["8K", "64K", "1M"])
def test_longtest_loses_nothing(start, ring_size):
    a, b = longtest_pair(start, "--json", a=("--seconds", "2", "--ring-size", ring_size))
    results = [end(process) for process in (a, b)]
    assert [(code, err) for code, _, err in results] == [(0, "")] * 2
    summaries = [json.loads(out) for _, out, _ in results]
    both_good(*summaries)
    size = int(ring_size[:-1]) << {"K": 10, "M": 20}[ring_size[-1]]
    assert [summary["ring_size"] for summary in summaries] == [size] * 2


def test_longtest_keeps_to_its_rate(start):
    a, b = longtest_pair(start, "--json", "--rate", "300", a=("--seconds", "3"))
    summaries = [json.loads(end(process)[1]) for process in (a, b)]
    both_good(*summaries)
    for summary in summaries:  # never more; less on a machine that is busy
        assert summary["sent_count_0"] <= 300 * (summary["seconds"] + 0.3)
        assert summary["sent_count_1"] <= 300 * (summary["seconds"] + 0.3)


def test_longtest_prints_the_lines_of_the_manual(start):
    a, b = longtest_pair(start, a=("--seconds", "2.5"))
    listening(b, "shm://longtest")
    for process in (a, b):
        code, out, err = end(process)
        assert (code, err) == (0, "")
        lines = out.splitlines()
        at = next(n for n, line in enumerate(lines) if line.startswith("longtest "))
        assert at >= 2
        assert at % 2 == 0
        for n in range(0, at, 2):
            assert LINE_1.fullmatch(lines[n])
            assert LINE_2.fullmatch(lines[n + 1])
        assert re.fullmatch(r"longtest [AB] at shm://longtest: ok", lines[at])
        assert "  errors     add_error_count=0 compare_error_count=0" in lines[at:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("who", ["a", "b", "ab"])
def test_control_c_ends_both_sides_in_order(start, who, number):
    sides = dict(zip("ab", longtest_pair(start), strict=True))
    listening(sides["b"], "shm://longtest")
    for process in sides.values():
        assert LINE_1.fullmatch(process.stdout.readline().rstrip())
    for side in who:
        sides[side].send_signal(number)
    counts = []
    for process in sides.values():
        code, out, err = end(process)
        assert (code, err) == (0, "")
        assert "ok\n" in out
        counts.append(re.findall(r"type ([01]) +(\d+) sent, (\d+) received", out))
    assert counts[0] == counts[1]
    for _, sent, received in counts[0]:
        assert sent == received != "0"


def test_control_c_before_anybody_came(start):
    listener = start("longtest", "--listen", "shm://longtest")
    listening(listener, "shm://longtest")
    listener.send_signal(signal.SIGINT)
    code, out, err = end(listener)
    assert code == 1  # nothing went either way
    assert out.startswith("longtest B at shm://longtest: FAILED\n")
    assert err == ""


def test_the_listener_can_end_it(start):
    a, b = longtest_pair(start, "--json", b=("--seconds", "1"))
    both_good(*(json.loads(end(process)[1]) for process in (a, b)))


def test_a_killed_side_is_an_error_of_the_other(start):
    a, b = longtest_pair(start)
    assert a.stdout.readline()
    b.kill()
    code, out, err = end(a)
    assert (code, err) == (1, "")
    assert "longtest A at shm://longtest: FAILED\n" in out
    assert "died" in out


@pytest.mark.parametrize(
    ("fault", "errors"),
    [("drop", 1), ("change", 1), ("user_value", 1), ("id", 2), ("double", 1), ("swap", 2)],
)
def test_longtest_counts_what_is_wrong(start, fault, errors):
    url = "shm://bad"
    server = start(url, fault, program=[sys.executable, "-c", BAD_ECHO])
    a = start("longtest", url, "--seconds", "1", "--json")
    code, out, err = end(a)
    assert (code, err) == (1, "")
    summary = json.loads(out)
    assert summary["compare_error_count"] == errors
    assert summary["add_error_count"] == 0
    assert summary["ok"] is False
    assert summary["sent_count_0"] > 100
    assert end(server)[0] == 0


def test_longtest_with_any_echo_server(start):
    """It has nothing to say of its own: all is well, but one direction is empty."""
    echo = start("echo", "shm://lab", "--once")
    listening(echo, "shm://lab")
    code, out, err = end(start("longtest", "shm://lab", "--seconds", "1", "--json"))
    assert (code, err) == (1, "")
    summary = json.loads(out)
    assert summary["add_error_count"] == summary["compare_error_count"] == 0
    assert summary["sent_count_0"] == summary["received_count_0"] > 0
    assert summary["sent_count_1"] == 0
    assert end(echo)[0] == 0


def test_longtest_takes_one_peer(start, run):
    a, b = longtest_pair(start)
    assert a.stdout.readline()  # they have met
    code, out, err = run("longtest", "shm://longtest", "--json", "--timeout", "0")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    for process in (a, b):
        assert process.poll() is None


# ---- live -------------------------------------------------------------------


def on_a_terminal(start, *arguments, program=KUCOMMS):
    """Start a command on a terminal of its own: the process, and its end of it."""
    ours, its = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 40, 110, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    process = start(
        *arguments, program=program, stdin=its, stdout=its, stderr=its, text=False, env=environment
    )
    os.close(its)
    return process, ours


def read_terminal(fd):
    """What comes until the process at the other end has gone."""
    chunks = []
    while True:
        try:
            chunk = os.read(fd, 65536)
        except OSError:  # EIO: nobody has it open any more
            chunk = b""
        if not chunk:
            os.close(fd)
            return b"".join(chunks).decode()
        chunks.append(chunk)


def test_a_terminal_gets_the_live_view(start):
    listener = start("longtest", "--listen", "shm://live", "--json")
    process, terminal = on_a_terminal(start, "longtest", "shm://live", "--seconds", "2")
    text = read_terminal(terminal)
    assert process.wait(DEADLINE) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    frames = plain.count("kucomms longtest shm://live side A")
    assert frames >= 4
    assert "\x1b[1A" in text  # it draws over itself
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    assert re.search(r"throughput +[▁▂▃▄▅▆▇█]+", plain)
    assert re.search(r"ring to peer +[█░]+ +\d+ % of 1024 KiB", plain)
    assert LINE_1.search(plain)
    assert LINE_2.search(plain)
    assert "longtest A at shm://live: ok" in plain
    assert json.loads(end(listener)[1])["ok"] is True


def test_control_c_on_the_terminal(start):
    listener = start("longtest", "--listen", "shm://live", "--json")
    process, terminal = on_a_terminal(start, "longtest", "shm://live")
    seen = b""
    while b"type 0 sent" not in seen:
        seen += os.read(terminal, 65536)
    texts = []
    reader = threading.Thread(target=lambda: texts.append(read_terminal(terminal)))
    reader.start()
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == 0
    reader.join()
    assert "longtest A at shm://live: ok" in texts[0]
    assert "Traceback" not in texts[0]
    assert end(listener)[0] == 0
