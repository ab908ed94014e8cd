# SPDX-License-Identifier: MIT
"""One module for each group of measurements; each has ``jobs(options)``.

It returns the jobs, and notes on what was left out.
"""
