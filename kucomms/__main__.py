# SPDX-License-Identifier: MIT
"""``python -m kucomms``: the ``kucomms`` command."""

import sys

from kucomms.cli import main

sys.exit(main())
