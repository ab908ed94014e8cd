# SPDX-License-Identifier: MIT
"""The benchmark of kucomms in user space: ``python -m bench``. See README.md here."""
