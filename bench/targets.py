# SPDX-License-Identifier: MIT
"""What kucomms wants to reach, computed from the results.

A report, not a test: numbers depend on the machine and on what else it does. What was not
measured in this run is "unknown".
"""

from bench.contestants import contestants
from bench.groups.floors import HANDLER
from bench.groups.idle import NOTHING, SUBJECT, TICKING
from bench.groups.probe import POLL

SLICE = 50_000
"""Nanoseconds of polling between two turns of the loop; see Endpoint."""


class Lines:
    """The results, to be asked for numbers; None for what is not there."""

    def __init__(self, results):
        self._results = results
        self._peers = {
            one.name for one in contestants()
            if not one.ours and not one.solo and not one.reference
        }

    def median(self, group, name, case):
        """The median of a line."""
        result = self._results.get((group, name, case))
        return result.median if result else None

    def further(self, key, group, name, case):
        """One of a line's further numbers."""
        result = self._results.get((group, name, case))
        return result.further(key) if result else None

    def best_peer(self, group, case):
        """(nanoseconds, name) of the fastest peer."""
        found = [
            (result.median, name) for (its_group, name, its_case), result in self._results.items()
            if its_group == group and its_case == case and name in self._peers and result.samples
        ]
        return min(found, default=(None, "no peer"))

    def of_kind(self, group, name):
        """The one line of that name, with whatever case."""
        for (its_group, its_name, case), result in self._results.items():
            if its_group == group and its_name == name and result.samples:
                return self.median(group, name, case)
        return None


def ratio(above, below):
    """A ratio, or None when a part of it is missing."""
    return above / below if above is not None and below else None


def targets(results):
    """Each target: what, measured, wanted, outcome (met, missed, unknown), note."""
    lines = Lines(results)
    found = []

    def want(what, measured, limit, least=False, note="", unit=""):
        sign = ">=" if least else "<="
        if measured is None:
            outcome = "unknown"
        else:
            met = measured >= limit if least else measured <= limit
            outcome = "met" if met else "missed"
        found.append({
            "what": what, "measured": measured,
            "wanted": f"{sign} {limit:.4g}{unit}" if limit is not None else "-",
            "outcome": outcome, "note": f"{unit} {note}".rstrip() if measured is not None else "",
        })

    _one_way(lines, want)
    _round_trips(lines, want)
    _in_process(lines, want)
    _idle(lines, want)
    _many_links(lines, want)
    _core(lines, want)
    _beside_others(lines, want)
    return found


def _one_way(lines, want):
    for size in (64, 1024):
        case = f"{size} B"
        floor = lines.median("floors", HANDLER, case)
        peer, peer_name = lines.best_peer("throughput", case)
        for form in ("send_many", "send"):
            ours = lines.median("throughput", f"kucomms shm {form}", case)
            want(f"{case}: {form} / floor", ratio(ours, floor), 3)
            want(f"{case}: best peer / {form}", ratio(peer, ours), 2, True, f"({peer_name})")
    size = 65536
    ours = lines.median("throughput", "kucomms shm loan+borrow", f"{size} B")
    bandwidth = ratio(size, ours)  # bytes per nanosecond are GB per second
    memcpy = lines.of_kind("core", f"memcpy {size} B through shared memory")
    want("64 KiB: loan+borrow / bare memcpy", ratio(bandwidth, memcpy), 0.5, True)


def _round_trips(lines, want):
    ours = lines.median("latency", "kucomms shm", "busy")
    peer, peer_name = lines.best_peer("latency", "busy")
    tail = lines.further("p99", "latency", "kucomms shm", "busy")
    note = f"({peer_name})" + ("" if tail is None else f", p99 {tail / 1000:.1f} µs")
    want("round trip, polling: p50 / best peer", ratio(ours, peer), 0.5, note=note)
    floor = lines.median("latency", "two eventfds, uvloop", "parked")
    limit = None if floor is None or ours is None else (floor + ours) / 1000
    # The line that never polls: only then both sides have really gone to sleep.
    parked = lines.median("latency", "kucomms shm no polling", "parked")
    measured = None if parked is None or limit is None else parked / 1000
    want("round trip, parked: p50", measured, limit, unit=" µs",
         note="limit: eventfds parked + own polling")


def _in_process(lines, want):
    queue = lines.median("inproc", "asyncio.Queue", "64 B")
    for form in ("receive", "handler", "send_many"):
        ours = lines.median("inproc", f"kucomms inproc {form}", "64 B")
        want(f"inproc {form} / asyncio.Queue", ratio(queue, ours), 1.3, True)


def _idle(lines, want):
    want("idle: wake-ups", lines.median("idle", SUBJECT, NOTHING), 0)
    percent = lines.further("percent_of_a_core", "idle", SUBJECT, TICKING)
    want("100 Hz handler: CPU", percent, 1.5, unit=" %")


def _many_links(lines, want):
    for case, limit in (("one busy", 1.1), ("all active", 1.5)):
        one = lines.median("links", "1 links", case)
        many = lines.median("links", "1000 links", case)
        want(f"1000 links, {case} / 1 link", ratio(many, one), limit)


def _core(lines, want):
    ours = lines.of_kind("core", "kucomms round trip 64 B")
    want("core: round trip / ping-pong 96 B", ratio(ours, lines.of_kind("core", "ping-pong 96 B")),
         3)


def _beside_others(lines, want):
    for form in ("send_many", "send"):
        name = f"kucomms shm {form}"
        alone = lines.median("busy", name, "undisturbed")
        for case in ("busy receiver", "busy sender"):
            disturbed = lines.median("busy", name, case)
            want(f"{case}: {form}, of undisturbed", ratio(alone, disturbed), 0.4, True)
    polling, without = f"busy_poll={POLL:g}", "busy_poll=0"
    longest = lines.median("probe", polling, "ping-pong")
    note = ""
    if longest is not None:
        tail = lines.further("p99.9", "probe", polling, "ping-pong") / 1000
        noise = lines.median("probe", without, "ping-pong")
        note = f"p99.9 {tail:.1f} µs" + (
            "" if noise is None else f"; max without polling {noise / 1000:.0f} µs"
        )
    want("polling: longest turn of the loop", None if longest is None else longest / 1000,
         SLICE / 1000, unit=" µs", note=note)
