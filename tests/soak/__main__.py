# SPDX-License-Identifier: MIT
"""The soak: every transport at once, links that come and go, processes that are killed.

One process, the hub, stays all the time and holds one end of every line; the other ends, the
peers, close their links, have theirs closed, or are killed. Every message is verified. What the
hub and the kernel use is sampled, and must be at the end what it was at the beginning.
"""

if __name__ == "__main__":
    # Every new process imports this file; what the command needs is not for them.
    from tests.soak.command import main

    main()
