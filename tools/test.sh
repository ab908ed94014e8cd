#!/bin/sh
# SPDX-License-Identifier: MIT
# The tests on this machine, and meanwhile those in guests, one after the other, which keep an
# emulator's one processor busy while the tests here wait for time to pass. Two guests at once
# would take longer than one after the other.
set -eu
cd "$(dirname "$0")/.."

BIN=.venv/bin
OUTPUT=build/guests.output

mkdir -p build
"$BIN/python" tools/guest.py >"$OUTPUT" 2>&1 &
guests=$!
trap 'kill $guests 2>/dev/null && wait $guests; exit 130' INT TERM
trap 'kill $guests 2>/dev/null && wait $guests' EXIT
"$BIN/python" -m pytest --durations=15
echo "waiting for the guests, which write to $OUTPUT"
status=0
wait $guests || status=$?
trap - EXIT
cat "$OUTPUT"
exit "$status"
