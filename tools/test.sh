#!/bin/sh
# SPDX-License-Identifier: MIT
# The tests on this machine, and meanwhile those in a guest with the older kernel, which an
# emulator's one processor keeps busy while the tests here wait for time to pass; then the guest
# with the newer one. Two guests at once would take longer than one after the other.
set -eu
cd "$(dirname "$0")/.."

BIN=.venv/bin
OUTPUT=build/guest-6.1.output

mkdir -p build
"$BIN/python" tools/guest.py --kernel 6.1 >"$OUTPUT" 2>&1 &
guest=$!
trap 'kill $guest 2>/dev/null && wait $guest; exit 130' INT TERM
trap 'kill $guest 2>/dev/null && wait $guest' EXIT
"$BIN/python" -m pytest
echo "waiting for the guest with Linux 6.1, which writes to $OUTPUT"
status=0
wait $guest || status=$?
trap - EXIT
cat "$OUTPUT"
[ "$status" -eq 0 ] || exit "$status"
exec "$BIN/python" tools/guest.py --kernel 6.12
