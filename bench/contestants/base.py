# SPDX-License-Identifier: MIT
"""What a contestant is."""

from importlib.util import find_spec


class Contestant:
    """A way to pass messages, in its best documented form.

    Only what a contestant can do is overridden; the groups look at ``can_stream`` and
    ``can_echo``. Each method runs in a worker process of its own. Objects are pickled,
    so they hold plain settings only; ``open`` runs in the parent and makes what workers
    must inherit.
    """

    name = ""
    package = None
    """The module to import, when it may be missing."""
    solo = False
    """Whether both sides are in one process; then ``both`` is called instead."""
    max_size = 1 << 62
    can_stream = True
    can_echo = True
    echo_modes = ("parked", "busy")
    reference = False
    """A floor, not a rival."""
    ours = False

    def missing(self):
        """Why it cannot run here, or None."""
        if self.package is not None and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None

    def open(self, _meeting, _size):
        """In the parent: what sender and receiver each inherit."""
        return None, None

    def close(self, ends):
        """In the parent: release what ``open`` made."""

    def send(self, meeting, end, sending):
        """Send every message of every run."""
        raise NotImplementedError

    def receive(self, meeting, end, receiving):
        """Set ``meeting.ready``, then take ``receiving.total`` messages."""
        raise NotImplementedError

    def both(self, meeting, sending, receiving):
        """For those in one process."""
        raise NotImplementedError

    def ping(self, meeting, end, trips):
        """Make the round trips."""
        raise NotImplementedError

    def pong(self, meeting, end, trips):
        """Set ``meeting.ready``, then answer ``trips.total`` messages with themselves."""
        raise NotImplementedError
