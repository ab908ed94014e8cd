# SPDX-License-Identifier: MIT
"""The examples run as they are, and end by themselves."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DEADLINE = 60


def run(*arguments, **options):
    result = subprocess.run(
        [sys.executable, EXAMPLES / arguments[0], *arguments[1:]],
        capture_output=True, text=True, timeout=DEADLINE, check=False, **options,
    )
    assert result.stderr == ""
    return result.returncode, result.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.iterdir() if path.is_file()))
def test_each_says_what_it_shows(name):
    text = (EXAMPLES / name).read_text()
    assert "SPDX-License-Identifier" in text.splitlines()[0]
    if name.endswith(".py"):
        assert name in text.split('"""')[1]  # and how to run it


@pytest.mark.parametrize("url", ["inproc://echo", "shm://echo"])
def test_echo(url):
    answer = "Message(data=b'hello', type=1, id=7, user_value=0)"
    assert run("echo.py", url) == (0, f"{url}: {answer}\n")


def test_requests():
    code, out = run("requests.py")
    assert code == 0
    *fast, slow = (line.split(",")[0] for line in out.splitlines())
    # Both may come at once, and then either task may be the first to go on.
    assert sorted(fast) == ["second: fast second", "third: fast third"]
    assert slow == "first: slow first"


def test_threads():
    code, out = run("threads.py")
    assert code == 0
    assert out.startswith("4000 messages from 4 threads, all in order\n")


@pytest.mark.parametrize("engine", ["", "threads"])
def test_echo_tcp(engine):
    code, out = run("echo_tcp.py", env=os.environ | {"KUCOMMS_IO": engine})
    assert code == 0
    total = 20 << 20
    assert out == (
        f"{total} bytes echoed to 20 clients\n{total} received, {total} sent\n"
    )


def test_copy_file_says_what_is_wrong(tmp_path):
    result = subprocess.run(
        [sys.executable, EXAMPLES / "copy_file.py", tmp_path / "nothing", tmp_path / "target"],
        capture_output=True, text=True, timeout=DEADLINE, check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert str(tmp_path / "nothing") in result.stderr


def good_table(out):
    """Both columns of the demo's table agree and have no errors."""
    rows = dict(re.findall(r"^│ (.+?) +│ +([\d,.]+ │ +[\d,.]+) │$", out, re.MULTILINE))
    rows = {name: re.split(r" │ +", values) for name, values in rows.items()}
    for name in ("type 0 sent", "type 0 received", "type 1 sent", "type 1 received"):
        assert rows[name][0] == rows[name][1] != "0"
    assert rows["add_error_count"] == rows["compare_error_count"] == ["0", "0"]
    assert out.endswith("no errors\n")


def test_demo():
    code, out = run("demo.py", "--seconds", "2")
    assert code == 0
    good_table(out)


def test_two_demos_at_once():
    demos = [
        subprocess.Popen(
            [sys.executable, EXAMPLES / "demo.py", "--seconds", "1"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]
    for demo in demos:
        out, err = demo.communicate(timeout=DEADLINE)
        assert (demo.returncode, err) == (0, "")
        good_table(out)


@pytest.mark.parametrize("group", [False, True], ids=["alone", "with its child"])
def test_control_c_ends_the_demo_and_its_child(group):
    demo = subprocess.Popen(
        [sys.executable, EXAMPLES / "demo.py"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )
    first = demo.stdout.readline()
    assert first.startswith("avail_tx0=")
    if group:
        os.killpg(demo.pid, signal.SIGINT)
    else:
        demo.send_signal(signal.SIGINT)
    out, err = demo.communicate(timeout=DEADLINE)
    assert (demo.returncode, err) == (0, "")
    good_table(out)
    with pytest.raises(ProcessLookupError):
        os.killpg(demo.pid, 0)


def test_demo_says_when_the_other_side_cannot_start(tmp_path):
    directory = tmp_path / "kucomms"
    directory.mkdir()
    directory.chmod(0o777)
    result = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py"],
        capture_output=True, text=True, timeout=DEADLINE, check=False,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert result.returncode == 1
    assert all(line.startswith("error: ") for line in result.stderr.splitlines())
    assert str(directory) in result.stderr
