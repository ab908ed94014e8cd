# SPDX-License-Identifier: MIT
"""What links, endpoints and pools count. All of it is a snapshot, frozen."""

import msgspec

__all__ = ["EndpointStatistics", "LinkStatistics", "PoolStatistics"]


class LinkStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of one link since it opened.

    Sizes are in bytes. A doorbell is *suppressed* when a message or space was
    published while the peer was awake, or had been rung for already.
    """

    messages_sent: int = 0
    bytes_sent: int = 0
    messages_received: int = 0
    bytes_received: int = 0
    full_waits: int = 0
    """Times that a send found no room."""
    doorbells_rung: int = 0
    doorbells_suppressed: int = 0
    doorbells_heard: int = 0
    polls_hit: int = 0
    """Polls before parking that found something."""
    polls_missed: int = 0
    protocol_errors: int = 0
    late_replies: int = 0
    """Replies that no request waited for (any more); they were dropped."""
    tx_high_water: int = 0
    """Most bytes seen waiting for the peer; looked at when the ring seems full."""
    rx_high_water: int = 0
    """Most bytes seen waiting here."""
    backlog_high_water: int = 0


class EndpointStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of one endpoint since it started.

    Times are in seconds. For each of the two tick handlers, ticks that were run
    and ticks that were missed add up to the time it was running times its rate.
    """

    message_calls: int = 0
    work_calls: int = 0
    """Ticks, and the calls that returning True asked for."""
    timer_calls: int = 0
    handler_errors: int = 0
    time_in_handlers: float = 0.0
    """Between the start and the end of handlers, waiting inside them included."""
    work_ticks: int = 0
    work_missed: int = 0
    timer_ticks: int = 0
    timer_missed: int = 0
    work_jitter_mean: float = 0.0
    work_jitter_max: float = 0.0
    timer_jitter_mean: float = 0.0
    timer_jitter_max: float = 0.0
    links_opened: int = 0
    links_closed: int = 0
    wakeups: int = 0
    """Times that the endpoint was woken after it had gone to sleep."""
    time_polling: float = 0.0
    """Spent looking for messages before going to sleep, in vain or not."""
    polls_hit: int = 0
    polls_missed: int = 0
    """Not counted: looks of a few microseconds that found nothing."""


class PoolStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of one pool since it was opened. Sizes are in bytes."""

    engine: str
    """What moves the bytes: ``io_uring`` or ``threads``."""
    engine_reason: str
    """Why ``threads``, or why nothing is registered."""
    size: int
    quota: int
    allocated: int
    """Whole pages; also of buffers that are free, but still in use by a transfer or a view.

    Of a pool of the peer's: what is here of it.
    """
    handed_over: int
    """Of those, what the peer has now."""
    registered: int
    """Of the pool's memory, what the kernel has pinned once for all transfers."""
    in_flight: int
    """Transfers that are not complete."""
    completed: int
    """With success or not."""
    failed: int
    """Of those, with an errno; ``cancelled`` included."""
    cancelled: int
    bytes_read: int
    """Read and received."""
    bytes_written: int
    """Written and sent."""
    dropped: int
    """Datagrams for which no buffer was posted."""
    system_calls: int
    """Those of ``io_uring``: two start and end any number of transfers."""
