#!/bin/sh
# SPDX-License-Identifier: MIT
# Puts the headers of Debian 11's Linux 5.10 into build/headers/5.10, and prints the build tree in
# there, for KDIR. Nothing on the machine changes: apt has its own list of sources for this, from
# the mirror of the machine's sources. Exit code 1: that mirror does not have them.
set -eu
cd "$(dirname "$0")/.."

OUT=$PWD/build/headers
BUILD=$OUT/5.10/usr/src/build

# apt with directories of its own.
private() {
	"$@" -o Dir::Etc::SourceList="$OUT/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
		-o Dir::State="$OUT/apt/state" -o Dir::State::status=/dev/null \
		-o Dir::Cache="$OUT/apt/cache" -o APT::Sandbox::User=root
}

# Debian 11's sources on the mirrors that the machine has for its own Debian.
sources() {
	# shellcheck disable=SC2016
	apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' |
		sort -u | sed -n -e 's/^Debian Debian \(.*\)/deb \1 bullseye main/p' \
		-e 's/^Debian Debian-Security \(.*\)/deb \1 bullseye-security main/p'
}

fetch() {
	rm -rf "$OUT/apt" "$OUT/unpacking"
	mkdir -p "$OUT/apt/state/lists/partial" "$OUT/apt/cache/archives/partial" "$OUT/unpacking"
	sources >"$OUT/apt/sources.list"
	private apt-get update -qq --error-on=any
	newest=$(private apt-cache pkgnames linux-headers-5.10. |
		grep -Ex 'linux-headers-5\.10\.0-[0-9]+-amd64' | sort -V | tail -n 1)
	cd "$OUT/apt"
	private apt-get download -qq "$newest" "${newest%-amd64}-common" linux-kbuild-5.10
	for package in *.deb; do
		dpkg-deb -x "$package" "$OUT/unpacking"
	done
	cd "$OUT/unpacking/usr/src"
	mv "$newest" build
	# The one path in there that is absolute.
	sed -i "s|^include /usr/src/|include $OUT/5.10/usr/src/|" build/Makefile
	mv "$OUT/unpacking" "$OUT/5.10"
	rm -r "$OUT/apt"
}

trap '[ -e "$BUILD" ] || echo "the headers of Debian 11 (Linux 5.10) cannot be had" >&2' EXIT
[ -e "$BUILD" ] || fetch
echo "$BUILD"
