# SPDX-License-Identifier: MIT
"""Throughput of 64 B while another thread of one of the two processes computes in Python."""

from bench.groups.throughput import FORMS, Stream

CASES = {"undisturbed": (), "busy receiver": ("receiver",), "busy sender": ("sender",)}


def jobs(options):
    """kucomms, with each of its ways to send."""
    return [
        Stream(contestant, 64, options, group="busy", case=case, disturb=disturb)
        for contestant in options.chosen()
        if contestant.name in FORMS
        for case, disturb in CASES.items()
    ], []
