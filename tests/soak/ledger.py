# SPDX-License-Identifier: MIT
"""What all processes of the soak tell each other: 64-bit words in a mapped file.

A file, since what a process has noted there is still there after it was killed.
"""

import mmap
import os
import time

PEER, HUB, KILL = range(3)
"""Who ends a session: the peer closes, the hub closes, or the peer is killed."""

# Row 0 is everybody's, row N that of line N. Each word has one writer at a time.
ROW = 96
RUN, GOING, PEERS_STOP, ALL_STOP = 0, 0, 1, 2

# Written by the peer: the session that it has begun last, how that is to end, messages that it
# has checked and those that were wrong, sessions whose end it has judged itself.
SESSION, ENDS, PEER_CHECKED, PEER_WRONG, PEER_JUDGED = range(5)
# By the hub: the same; deaths are the sessions that ended by one; the longest time between the
# end of a peer's session and when it was judged, in nanoseconds.
HUB_CHECKED, HUB_WRONG, HUB_JUDGED, DEATHS, LATEST = range(8, 13)
# Of the last sessions, by number modulo RECENT: messages that the peer has sent for certain,
# whose these are, what the hub has sent, and when the peer closed or was dead (CLOCK_MONOTONIC).
RECENT = 16
SENT, OWNER, HUB_SENT, ENDED = range(16, 16 + 4 * RECENT, RECENT)


class Ledger:
    """The file, mapped. ``words[row * ROW + WORD]``."""

    def __init__(self, path, rows=0):
        flags = os.O_RDWR | (os.O_CREAT if rows else 0)
        fd = os.open(path, flags, 0o600)
        try:
            if rows:
                os.truncate(fd, rows * ROW * 8)
            self.words = memoryview(mmap.mmap(fd, 0)).cast("Q")
        finally:
            os.close(fd)

    def word(self, line, word):
        return self.words[line * ROW + word]

    @property
    def stopping(self):
        return self.words[RUN] != GOING

    def end(self, line, session):
        """The peer has closed the link, or is dead."""
        self.words[line * ROW + ENDED + session % RECENT] = time.monotonic_ns()

    def stop(self, what):
        self.words[RUN] = what
