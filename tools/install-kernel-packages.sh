#!/bin/sh
# SPDX-License-Identifier: MIT
# What the kernel module's tests need beside the compiler: qemu, the busybox that a guest starts
# with, sparse, depmod, dkms, the newest 6.1 and 6.12 kernels of Debian 12 with their headers, and
# the headers of their real-time variants. Installs what is missing where it may (root on Debian),
# else says what to install. A kernel that is there already is not replaced by a newer one.
set -eu

BOOT=${BOOT:-/boot}
MODULES=${MODULES:-/lib/modules}
PATH=$PATH:/usr/sbin:/sbin

# The versions of a series, without cloud and dbg. As tools/guest.py has it.
versions() {
	case $1 in
	6.1) echo '6\.1\.[0-9]+-[0-9]+-amd64' ;;
	6.12) echo '6\.12\.[0-9]+\+deb12-amd64' ;;
	6.1-rt) echo '6\.1\.[0-9]+-[0-9]+-rt-amd64' ;;
	6.12-rt) echo '6\.12\.[0-9]+\+deb12-rt-amd64' ;;
	esac
}

# Whether a kernel of a series is there with headers, image and modules; of -rt, with headers.
installed() {
	for tree in "$MODULES/${1%-rt}".*/build; do
		version=${tree%/build}
		version=${version##*/}
		echo "$version" | grep -Eqx "$(versions "$1")" || continue
		[ -e "$tree/Makefile" ] || continue
		case $1 in
		*-rt) return ;;
		esac
		[ -e "$BOOT/vmlinuz-$version" ] && [ -e "$MODULES/$version/modules.dep" ] && return
	done
	return 1
}

# The newest version of a series that has both an image and headers, or nothing; of -rt, headers.
# The signed image comes days after the unsigned one; both boot in qemu.
newest() {
	apt-cache pkgnames linux-headers-"${1%-rt}". | sed 's/^linux-headers-//' |
		grep -Ex "$(versions "$1")" | sort -rV |
		while read -r version; do
			case $1 in
			*-rt)
				available "linux-headers-$version" || continue
				echo "linux-headers-$version"
				exit
				;;
			esac
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
command -v dkms >/dev/null || tools="$tools dkms"
series=
for wanted in 6.1 6.12 6.1-rt 6.12-rt; do
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
	case $wanted in
	*-rt)
		echo "the kernel tests need the headers of a Linux $wanted (Debian 12:" \
			"linux-headers-${wanted%-rt}*-rt-amd64, bookworm-security)" >&2
		;;
	*)
		echo "the kernel tests need a Linux $wanted with image, modules and headers" \
			"(Debian 12: linux-image-$wanted*-amd64 and linux-headers-$wanted*-amd64," \
			"bookworm-security)" >&2
		;;
	esac
done
exit 1
