#!/bin/sh
# SPDX-License-Identifier: MIT
# Checks the kernel code: the kernel's own checkpatch.pl over every file, then gcc with W=1 and
# sparse, against the newest 6.1 and 6.12 that are installed, their real-time variants, and the
# headers of 5.10, for which the modules of tests and benchmarks are not made. Any finding is a
# failure. Where the headers of 5.10 cannot be had the script says so, and passes without them.
set -eu
cd "$(dirname "$0")/.."

OUT=build/checkpatch
SANITIZED=build/sanitized/linux
PACKAGE=linux-source-6.12
SCRIPTS="checkpatch.pl spelling.txt const_structs.checkpatch"
PYTHON=.venv/bin/python
ALL="kernel_module examples/kernel tests/kernel/module bench/kernel/module"
export LC_ALL=C

# The scripts are in no package but the kernel's source, 140 MB, of which these stay.
if [ ! -e $OUT/complete ]; then
	rm -rf $OUT
	mkdir -p $OUT/deb
	if [ -e $SANITIZED/scripts/checkpatch.pl ]; then
		for script in $SCRIPTS; do
			cp $SANITIZED/scripts/"$script" $OUT/
		done
	else
		echo "fetching checkpatch.pl from $PACKAGE"
		[ "$(id -u)" != 0 ] || apt-get update -qq
		(cd $OUT/deb && apt-get download -qq $PACKAGE)
		dpkg-deb --fsys-tarfile $OUT/deb/*.deb |
			tar -xO --wildcards './usr/src/linux-source-*.tar.xz' >$OUT/deb/source.tar.xz
		for script in $SCRIPTS; do
			echo "$PACKAGE/scripts/$script"
		done | tar -xJf $OUT/deb/source.tar.xz -C $OUT --strip-components=2 -T -
	fi
	rm -r $OUT/deb
	touch $OUT/complete
fi

failed=

# Checks the files that stdin names; fails for any finding.
checkpatch() {
	xargs -r perl $OUT/checkpatch.pl --strict --no-tree --terse --show-types --no-summary \
		"$@" -f
}

echo "checkpatch"
find kernel_module examples/kernel tests/kernel/module bench/kernel/module -name '*.[ch]' \
	! -name '*.mod.c' | sort >$OUT/files
# A tracepoint is declared with macros that are laid out like the code they stand for: the
# kernel's own include/trace/events has these findings at every one.
grep '/trace\.h$' $OUT/files |
	checkpatch --ignore OPEN_ENDED_LINE,PARENTHESIS_ALIGNMENT || failed=yes
grep -v '/trace\.h$' $OUT/files | checkpatch || failed=yes

versions=$($PYTHON -c '
import sys
from tools import guest
series = *guest.SERIES, *(f"{number}-rt" for number in guest.SERIES)
built_for = [path.parent.name for path in guest.MODULES.glob("*/build/") if path.is_dir()]
try:
    print(*guest.choose(series, built_for))
except guest.click.ClickException as failure:
    sys.exit(failure.message)
')
old=$(sh tools/old-headers.sh) || old=
# Builds for one kernel; fails for any finding, which it prints.
build() {
	version=$1
	kdir=$2
	sources=$3
	found=
	echo "gcc W=1 and sparse, $version"
	# Anew each time: make does not compile again what it has warned of.
	tree=$PWD/build/lint/$version
	rm -rf "$tree"
	$PYTHON -c '
import sys
from tools import guest
tree, *sources = sys.argv[1:]
for source in sources:
    if (guest.ROOT / source).is_dir():
        guest.sync(guest.ROOT / source, guest.Path(tree) / source)
' "$tree" $sources
	sparse='-Wbitwise-pointer -Wcast-from-as -Wreturn-void'
	# The compiler that Debian 11 made its kernel with is in no newer Debian.
	set -- W=1 C=2 CF="$sparse" CC=gcc
	{
		make -C "$tree/kernel_module" KDIR="$kdir" "$@" all &&
			{ [ ! -d "$tree/bench" ] ||
				make -C "$kdir" M="$tree/bench/kernel/module" "$@" \
					KUCOMMS="$tree/kernel_module" \
					KBUILD_EXTRA_SYMBOLS="$tree/kernel_module/Module.symvers" \
					modules; }
	} >"$tree/log" 2>&1 || { found=yes && tail -n 20 "$tree/log"; }
	# What counts: a finding at one of our files, from the linker of modules, or from gcc
	# wherever it is, as that of a macro is reported in the header. Sparse has findings inside
	# the kernel's headers, which are not ours.
	if grep -iE '\b(warning|error):' "$tree/log" | sed "s|$tree/|OURS: |" |
		grep -E 'OURS: |modpost:|\[-W[^]]*\]$' | sed 's|OURS: ||' | sort -u | grep .; then
		found=yes
	fi
	[ -z "$found" ]
}

# All kernels at once.
running=
for version in $versions; do
	build "$version" "/lib/modules/$version/build" "$ALL" >"$OUT/$version.output" 2>&1 &
	running="$running $!"
done
if [ -n "$old" ]; then
	build 5.10 "$old" "kernel_module examples/kernel" >"$OUT/5.10.output" 2>&1 &
	running="$running $!"
	versions="$versions 5.10"
fi
for pid in $running; do
	wait "$pid" || failed=yes
done
for version in $versions; do
	cat "$OUT/$version.output"
done

[ -z "$failed" ] || { echo "kernel-lint: failed" >&2; exit 1; }
