# SPDX-License-Identifier: MIT
"""Doorbells per million messages in a steady stream, of both sides."""

from bench.groups.throughput import FORMS, Stream
from bench.plan import Sample


class Wakes(Stream):
    """Counts of the links, not times."""

    def __init__(self, contestant, options):
        super().__init__(contestant, 64, options, group="wakes", case="per million messages")
        self.unit = "doorbells"

    def sample(self):
        """Doorbells of both sides."""
        extra = super().sample().extra
        rung = extra["sender_doorbells_per_million"] + extra["receiver_doorbells_per_million"]
        keep = ("sender_doorbells", "receiver_doorbells", "sender_full_waits")
        return Sample(rung, None, {key: extra[f"{key}_per_million"] for key in keep})


def jobs(options):
    """kucomms, with each of its ways to send."""
    return [
        Wakes(contestant, options)
        for contestant in options.chosen()
        if contestant.name in FORMS
    ], []
