#!/bin/sh
# SPDX-License-Identifier: MIT
# The tests on this machine, and meanwhile those in guests, which keep an emulator's one processor
# busy while the tests here wait for time to pass: the older kernel, then the first half with the
# newer one. Its other half runs when the tests here have ended: three at once would take longer.
set -eu
cd "$(dirname "$0")/.."

BIN=.venv/bin

# In a guest: how the run is named, which kernel, without which files. (With a file that it is
# given pytest does not ask conftest.py whether that is for this kernel.)
guest() {
	"$BIN/python" tools/guest.py --log-dir "build/guest/$1" --kernel "$2" -- \
		python -m pytest --durations=15 ${3:+"--ignore-glob=$3"} tests/kernel \
		>"build/guest-$1.output" 2>&1 &
	child=$!
	wait "$child"
}

stop() {
	for pid in "$@"; do
		kill "$pid" 2>/dev/null && wait "$pid" || true
	done
}

guests_meanwhile() {
	child=
	trap 'stop $child; exit 130' INT TERM
	status=0
	guest older 6.1 '' || status=$?
	guest newer-first 6.12 '*/test_[m-z]*.py' || status=$?
	exit "$status"
}

child=
meanwhile=
mkdir -p build
trap 'stop $child $meanwhile; exit 130' INT TERM
trap 'stop $child $meanwhile' EXIT
guests_meanwhile &
meanwhile=$!
"$BIN/python" -m pytest --durations=15
echo "waiting for the guests, which write to build/guest-*.output"
status=0
guest newer-second 6.12 '*/test_[a-l]*.py' || status=$?
wait "$meanwhile" || status=$?
trap - EXIT
cat build/guest-older.output build/guest-newer-first.output build/guest-newer-second.output
exit "$status"
