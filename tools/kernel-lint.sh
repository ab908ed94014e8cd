#!/bin/sh
# SPDX-License-Identifier: MIT
# Checks the kernel code: the kernel's own checkpatch.pl over every file, then gcc with W=1 and
# sparse, against the newest 6.1 and 6.12 that are installed. Any finding is a failure.
set -eu
cd "$(dirname "$0")/.."

OUT=build/checkpatch
SANITIZED=build/sanitized/linux
PACKAGE=linux-source-6.12
SCRIPTS="checkpatch.pl spelling.txt const_structs.checkpatch"
PYTHON=.venv/bin/python
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
try:
    print(*guest.choose(guest.SERIES, guest.installed_kernels()))
except guest.click.ClickException as failure:
    sys.exit(failure.message)
')
# Builds for one kernel; fails for any finding, which it prints.
build() {
	version=$1
	found=
	echo "gcc W=1 and sparse, $version"
	# Anew each time: make does not compile again what it has warned of.
	tree=$PWD/build/lint/$version
	rm -rf "$tree"
	$PYTHON -c '
import sys
from tools import guest
for source in (*guest.SOURCES, "bench/kernel/module"):
    if (guest.ROOT / source).is_dir():
        guest.sync(guest.ROOT / source, guest.Path(sys.argv[1]) / source)
' "$tree"
	kdir=/lib/modules/$version/build
	sparse='-Wbitwise-pointer -Wcast-from-as -Wreturn-void'
	{
		make -C "$tree/kernel_module" KDIR="$kdir" W=1 C=2 CF="$sparse" all &&
			make -C "$kdir" M="$tree/bench/kernel/module" W=1 C=2 CF="$sparse" \
				KUCOMMS="$tree/kernel_module" \
				KBUILD_EXTRA_SYMBOLS="$tree/kernel_module/Module.symvers" modules
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
	build "$version" >"$OUT/$version.output" 2>&1 &
	running="$running $!"
done
for pid in $running; do
	wait "$pid" || failed=yes
done
for version in $versions; do
	cat "$OUT/$version.output"
done

[ -z "$failed" ] || { echo "kernel-lint: failed" >&2; exit 1; }
