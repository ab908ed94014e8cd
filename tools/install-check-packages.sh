#!/bin/sh
# SPDX-License-Identifier: MIT
# What the proofs and attacks need beside the compiler: spin, clang with its sanitizers, fuzzer
# and coverage, and strace. Installs what is missing where it may (root on Debian), else says
# what to install.
set -eu

# Whether clang finds its fuzzer.
fuzzer() {
	command -v clang >/dev/null && [ -n "$(find "$(clang -print-resource-dir)/" \
		-name 'libclang_rt.fuzzer-*.a' 2>/dev/null | head -n 1)" ]
}

missing=
command -v spin >/dev/null || missing="$missing spin"
command -v clang >/dev/null || missing="$missing clang"
fuzzer || missing="$missing libclang-rt-14-dev"
command -v llvm-cov >/dev/null || missing="$missing llvm"
command -v strace >/dev/null || missing="$missing strace"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	echo "installing$missing"
	apt-get update -qq
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing
else
	echo "the tests need these packages, please install them:$missing" >&2
	exit 1
fi
