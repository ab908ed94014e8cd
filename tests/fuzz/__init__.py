# SPDX-License-Identifier: MIT
"""The ring under attack: fuzz targets in C, and what drives them."""
