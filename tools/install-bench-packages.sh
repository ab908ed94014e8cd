#!/bin/sh
# SPDX-License-Identifier: MIT
# What the benches need beside the compiler: clang and libbpf for the BPF programs, busybox for the
# guest's first steps, and Concurrency Kit. Installs what is missing where it may (root on Debian), else says what to install.
set -eu

# Whether the C compiler finds a header.
header() {
	echo "#include <$1>" | cc -E -x c - >/dev/null 2>&1
}

missing=
command -v clang >/dev/null || missing="$missing clang"
header bpf/libbpf.h || missing="$missing libbpf-dev"
header libelf.h || missing="$missing libelf-dev"
command -v busybox >/dev/null || missing="$missing busybox-static"
header ck_ring.h || missing="$missing libck-dev"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	echo "installing$missing"
	apt-get update -qq
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing
else
	echo "the benches need these packages, please install them:$missing" >&2
	exit 1
fi
