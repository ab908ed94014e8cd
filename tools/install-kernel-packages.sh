#!/bin/sh
# SPDX-License-Identifier: MIT
# What the kernel module's tests need beside the compiler: qemu, the busybox that a guest starts
# with, sparse, depmod, and the newest 6.1 and 6.12 kernels of Debian 12 with their headers.
# Installs what is missing where it may (root on Debian), else says what to install. A kernel
# that is there already is not replaced by a newer one.
set -eu

BOOT=${BOOT:-/boot}
MODULES=${MODULES:-/lib/modules}
PATH=$PATH:/usr/sbin:/sbin

# Without cloud, rt and dbg. As tools/guest.py has it.
plain() {
	case $1 in
	6.1) echo '6\.1\.[0-9]+-[0-9]+-amd64' ;;
	6.12) echo '6\.12\.[0-9]+\+deb12-amd64' ;;
	esac
}

# Whether a kernel of a series is there with image, modules and headers.
installed() {
	for image in "$BOOT"/vmlinuz-"$1".*; do
		version=${image##*/vmlinuz-}
		echo "$version" | grep -Eqx "$(plain "$1")" || continue
		[ -e "$image" ] && [ -e "$MODULES/$version/modules.dep" ] &&
			[ -e "$MODULES/$version/build/Makefile" ] && return
	done
	return 1
}

# The newest version of a series that has both an image and headers, or nothing. The signed
# image comes days after the unsigned one; both boot in qemu.
newest() {
	apt-cache pkgnames linux-headers-"$1". | sed 's/^linux-headers-//' |
		grep -Ex "$(plain "$1")" | sort -rV |
		while read -r version; do
			for image in "linux-image-$version" "linux-image-$version-unsigned"; do
				if available "$image" && available "linux-headers-$version"; then
					echo "$image linux-headers-$version"
					exit
				fi
			done
		done
}

# Names remain in apt's lists that only a dependency mentions.
available() {
	apt-cache show --no-all-versions "$1" >/dev/null 2>&1
}

tools=
command -v qemu-system-x86_64 >/dev/null || tools="$tools qemu-system-x86"
command -v busybox >/dev/null || tools="$tools busybox-static"
command -v sparse >/dev/null || tools="$tools sparse"
command -v depmod >/dev/null || tools="$tools kmod"
series=
for wanted in 6.1 6.12; do
	installed $wanted || series="$series $wanted"
done
[ -n "$tools$series" ] || exit 0

may_install=
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	may_install=yes
	apt-get update -qq
fi

missing=$tools
unknown=
for wanted in $series; do
	packages=
	if command -v apt-cache >/dev/null; then
		packages=$(newest "$wanted")
	fi
	if [ -n "$packages" ]; then
		missing="$missing $packages"
	else
		unknown="$unknown $wanted"
	fi
done

if [ -n "$may_install" ] && [ -n "$missing" ]; then
	echo "installing$missing"
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing
	missing=
fi
[ -n "$missing$unknown" ] || exit 0
if [ -n "$missing" ]; then
	echo "the kernel tests need these packages, please install them:$missing" >&2
fi
for wanted in $unknown; do
	echo "the kernel tests need a Linux $wanted with image, modules and headers (Debian 12:" \
		"linux-image-$wanted*-amd64 and linux-headers-$wanted*-amd64, bookworm-security)" >&2
done
exit 1
