#!/bin/sh
# SPDX-License-Identifier: MIT
# The tests on this machine, and meanwhile the first half of those in guests, which keep an
# emulator's one processor busy while the tests here wait for time to pass. The other half runs
# when the tests here have ended: three at once would take longer. Each half is all kernels.
set -eu
cd "$(dirname "$0")/.."

BIN=.venv/bin

# In the background: the half of this name, without these files. (With a file that it is given
# pytest does not ask conftest.py whether that is for this kernel.)
start_guests() {
	"$BIN/python" tools/guest.py --log-dir "build/guest/$1" -- \
		python -m pytest --durations=15 --ignore-glob="$2" tests/kernel \
		>"build/guests-$1.output" 2>&1 &
	guests="$guests $!"
}

stop_guests() {
	for pid in $guests; do
		kill "$pid" 2>/dev/null && wait "$pid" || true
	done
}

guests=
mkdir -p build
trap 'stop_guests; exit 130' INT TERM
trap stop_guests EXIT
start_guests first '*/test_[m-z]*.py'
"$BIN/python" -m pytest --durations=15
start_guests second '*/test_[a-l]*.py'
echo "waiting for the guests, which write to build/guests-*.output"
status=0
for pid in $guests; do
	wait "$pid" || status=$?
done
trap - EXIT
cat build/guests-first.output build/guests-second.output
exit "$status"
