#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: kernel-sanitized.sh kasan|kcsan|rt [--build-only | arguments of tools/guest.py]
#
# Builds Linux 6.12 with checkers into build/sanitized/ and runs tools/guest.py on it. kasan:
# KASAN, lockdep, kmemleak, sleep checks, checks of objects' lives, allocations that fail; kcsan:
# KCSAN; rt: PREEMPT_RT with KASAN, sleep checks, and lockdep that knows which locks sleep there.
# All: preemption, UBSAN, checks of lists and of copies to user space. A build takes about ten
# minutes on two cores, once for each version of our configuration; for a newer source package
# remove build/sanitized.
set -eu
cd "$(dirname "$0")/.."

CHECKER=${1:-}
case $CHECKER in
kasan)
	WANTED="PREEMPT KASAN KASAN_VMALLOC PROVE_LOCKING DEBUG_ATOMIC_SLEEP DEBUG_KMEMLEAK DEBUG_VM
		DEBUG_OBJECTS_FREE DEBUG_OBJECTS_TIMERS DEBUG_OBJECTS_WORK DEBUG_OBJECTS_RCU_HEAD
		FAILSLAB FAIL_PAGE_ALLOC FAULT_INJECTION_STACKTRACE_FILTER"
	;;
kcsan)
	WANTED="PREEMPT KCSAN KCSAN_STRICT KCSAN_WEAK_MEMORY KCSAN_INTERRUPT_WATCHER"
	;;
rt)
	WANTED="PREEMPT_RT KASAN KASAN_VMALLOC PROVE_LOCKING PROVE_RAW_LOCK_NESTING
		DEBUG_ATOMIC_SLEEP DEBUG_RT_MUTEXES"
	;;
*)
	sed -n '3,10s/^# \{0,1\}//p' "$0" >&2
	exit 2
	;;
esac
shift
JOBS=${JOBS:-$(nproc)}
PACKAGE=linux-source-6.12
OUT=build/sanitized
SOURCE=$OUT/linux
TREE=$OUT/$CHECKER
CONFIG="$PWD/tools/sanitized-guest.config $PWD/tools/$CHECKER.config"

missing=
for tool in flex bison bc cpio xz; do
	command -v $tool >/dev/null || missing="$missing $tool"
done
[ -e /usr/include/libelf.h ] || missing="$missing libelf-dev"
[ -e /usr/include/openssl/ssl.h ] || missing="$missing libssl-dev"
missing=$(echo "$missing" | sed 's/ xz/ xz-utils/')
if [ -n "$missing" ]; then
	if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		echo "installing$missing"
		apt-get update -qq
		# shellcheck disable=SC2086
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing
	else
		echo "the sanitized kernel needs these packages, please install them:$missing" >&2
		exit 1
	fi
fi

if [ ! -e $SOURCE/Makefile ]; then
	# The package is unpacked here and not installed: nothing outside build/ changes.
	rm -rf $OUT
	mkdir -p $OUT/deb
	(cd $OUT/deb && apt-get download -qq $PACKAGE)
	dpkg-deb --fsys-tarfile $OUT/deb/$PACKAGE*.deb |
		tar -xO --wildcards './usr/src/linux-source-*.tar.xz' >$OUT/source.tar.xz
	mkdir $OUT/unpacking
	tar -xJf $OUT/source.tar.xz -C $OUT/unpacking --strip-components=1
	mv $OUT/unpacking $SOURCE
	rm -r $OUT/deb $OUT/source.tar.xz
fi

# shellcheck disable=SC2086
if [ "$(cat $CONFIG)" != "$(cat "$TREE/built" 2>/dev/null)" ]; then
	rm -f "$TREE/built"
	mkdir -p "$TREE"
	log=$TREE/build.log
	echo "building the $CHECKER kernel; output in $log"
	{
		make -C $SOURCE O="$PWD/$TREE" tinyconfig &&
			(cd "$TREE" && ../linux/scripts/kconfig/merge_config.sh -m .config $CONFIG) &&
			make -C "$TREE" olddefconfig
	} >"$log" 2>&1 || { tail -n 30 "$log" >&2; exit 1; }
	# Options that lost a dependency disappear in silence, and the checks with them.
	for wanted in $WANTED UBSAN UBSAN_SHIFT HARDENED_USERCOPY DEBUG_LIST \
		IA32_EMULATION MEMCG OVERLAY_FS MODULE_UNLOAD DM_DELAY BLK_DEV_RAM KPROBES \
		PM_SLEEP_DEBUG; do
		grep -q "^CONFIG_$wanted=y" "$TREE/.config" ||
			{ echo "CONFIG_$wanted is off in $TREE/.config" >&2; exit 1; }
	done
	if grep -q '^CONFIG_SLUB_TINY=y' "$TREE/.config"; then
		echo "CONFIG_SLUB_TINY is on in $TREE/.config: KASAN would see nothing" >&2
		exit 1
	fi
	make -C "$TREE" -j"$JOBS" bzImage modules >>"$log" 2>&1 || { tail -n 30 "$log" >&2; exit 1; }
	cat $CONFIG >"$TREE/built"
fi

[ "${1:-}" != --build-only ] || exit 0
# Races are looked for where a program rewrites what is shared.
export KUCOMMS_STORM_SECONDS="${KUCOMMS_STORM_SECONDS:-3}"
exec .venv/bin/python tools/guest.py --memory 3G --timeout 7200 \
	--log-dir "build/guest-$CHECKER" \
	--vmlinuz "$TREE/arch/x86/boot/bzImage" --kdir "$TREE" "$@"
