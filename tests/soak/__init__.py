# SPDX-License-Identifier: MIT
"""The soak: every transport at once, for as long as one likes; see ``__main__``."""
