# SPDX-License-Identifier: MIT
"""What every message must hold, from the seed, its link and its number alone.

Cheap, so that it does not become what is measured: a slice of a pattern. ``native.c`` does the
same. Where the slice begins and how long it is repeat only after 500 million messages.
"""

import random
import struct

RING_SIZE = 1 << 18
LONGEST = RING_SIZE - 32

_OFFSETS = 65521
_SIZES = 8191


class Content:
    """The messages of one seed."""

    def __init__(self, seed):
        chosen = random.Random(seed)
        self.sizes = [_size(chosen) for _ in range(_SIZES)]
        for position in chosen.sample(range(_SIZES), 3):
            self.sizes[position] = chosen.randint(LONGEST // 2, LONGEST)
        self.sizes[chosen.randrange(_SIZES)] = LONGEST
        self._pattern = chosen.randbytes(_OFFSETS + LONGEST)

    def data(self, key, number):
        """The data of one message."""
        start = (number * 40503 + key * 2654435761) % _OFFSETS
        return self._pattern[start : start + self.sizes[(number + key) % _SIZES]]

    def write(self, path):
        """For ``native.c``: the sizes, then the pattern."""
        path.write_bytes(struct.pack(f"<{_SIZES}I", *self.sizes) + self._pattern)


def key(line, session, from_hub):
    """Says whose a message is: which line's, in which of its sessions, and from which end."""
    return (line * 1_000_003 + session) * 2 + from_hub


def _size(chosen):
    kind = chosen.random()
    return chosen.randrange(128 if kind < 0.9 else 2048 if kind < 0.99 else 16384)
