# SPDX-License-Identifier: MIT
"""The session of the reference manual, as it is written there."""

import re
import signal
import subprocess
import sys
import threading

SESSION = 30.0
"""Seconds for which the longtest runs, from its first counters on."""
PATIENCE = 120.0

COUNTERS = re.compile(
    r"avail_tx0=\d+ : add_error_count=(\d+) : compare_error_count=(\d+)\n"
    r"sent_count_0=(\d+) : sent_count_1=(\d+) : received_count_0=(\d+) : received_count_1=(\d+)\n"
)


def shell(command):
    subprocess.run(["sh", "-ec", command], check=True)


def test_session_of_the_manual():
    shell("modprobe kucomms")
    shell("echo kucomms_longtest > /sys/devices/virtual/kucomms/kucomms/create_device")
    shell("modprobe kucomms_longtest")
    out = run_longtest()
    counters = [[int(value) for value in found] for found in COUNTERS.findall(out)]
    assert len(counters) > SESSION / 3, out
    assert all(errors == [0, 0] for *errors, _, _, _, _ in counters), out
    for column in range(2, 6):
        values = [line[column] for line in counters]
        assert values == sorted(values)
        assert values[-1] > values[len(values) // 2] > values[0], out
    assert "longtest A at kernel://longtest: ok" in out
    assert re.search(r"errors +add_error_count=0 compare_error_count=0\n", out)
    shell("rmmod kucomms_longtest")
    shell("rmmod kucomms")


def run_longtest():
    """Run the command for the time of the session, end it with control-C; what it printed."""
    longtest = subprocess.Popen(
        [sys.executable, "-m", "kucomms", "longtest", "kernel://longtest"],
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    begun, ended = threading.Event(), threading.Event()

    def read():
        for line in longtest.stdout:
            lines.append(line)
            begun.set()
        ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert begun.wait(PATIENCE)
        assert not ended.wait(SESSION), lines  # time is the subject
        longtest.send_signal(signal.SIGINT)
        assert longtest.wait(PATIENCE) == 0, lines
    finally:
        longtest.kill()
        longtest.wait()
        reader.join()
        longtest.stdout.close()
    return "".join(lines)
