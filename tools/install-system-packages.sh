#!/bin/sh
# SPDX-License-Identifier: MIT
# What the build needs and pip cannot bring: a C and C++ compiler, Python's headers
# and venv. Installs it where it may (root on Debian), else says what to install.
set -eu

PYTHON=${PYTHON:-python3}
missing=
command -v cc >/dev/null && command -v make >/dev/null || missing="$missing build-essential"
command -v c++ >/dev/null || missing="$missing g++"
"$PYTHON" -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
"$PYTHON" - <<'EOF' || missing="$missing python3-dev"
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
EOF
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	echo "installing$missing"
	apt-get update -qq
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing
else
	echo "kucomms needs these packages, please install them:$missing" >&2
	exit 1
fi
