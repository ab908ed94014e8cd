# SPDX-License-Identifier: MIT
"""What all processes of the soak tell each other: 64-bit words in a mapped file.

A file, since what a process has noted there is still there after it was killed.
"""

import mmap
import os

PEER, HUB, KILL = range(3)
"""Who ends a session: the peer closes, the hub closes, or the peer is killed."""

# Row 0 is everybody's, row N that of line N. Each word has one writer.
ROW = 32
RUN, GOING, PEERS_STOP, ALL_STOP = 0, 0, 1, 2

# Written by the peer: the session that it has begun last, how that is to end, messages that it
# has checked and those that were wrong, sessions whose end it has judged itself.
SESSION, ENDS, PEER_CHECKED, PEER_WRONG, PEER_JUDGED = range(5)
# By the hub: the same; deaths are the sessions that ended by one.
HUB_CHECKED, HUB_WRONG, HUB_JUDGED, DEATHS = range(8, 12)
# Of the last four sessions, by number modulo 4: messages that the peer has sent for certain,
# whose these are, and what the hub has sent.
SENT, OWNER, HUB_SENT = 16, 20, 24


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

    def stop(self, what):
        self.words[RUN] = what
