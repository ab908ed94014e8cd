# SPDX-License-Identifier: MIT
"""Percentiles of times in nanoseconds, by hdrhistogram where it is installed."""

from importlib.util import find_spec

POINTS = (50.0, 90.0, 99.0, 99.9)
CURVE = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 92.5, 95, 96, 97, 98, 98.5, 99, 99.25,
         99.5, 99.6, 99.7, 99.8, 99.85, 99.9)


def percentiles(values, points):
    """What ``points`` per cent of the values are below, as a dictionary."""
    if not values:
        return dict.fromkeys(points, 0.0)
    if find_spec("hdrh"):
        from hdrh.histogram import HdrHistogram

        histogram = HdrHistogram(1, 60_000_000_000, 3)
        for value in values:
            histogram.record_value(max(1, int(value)))
        return {point: float(histogram.get_value_at_percentile(point)) for point in points}
    ordered = sorted(values)
    last = len(ordered) - 1
    return {point: float(ordered[min(last, int(len(ordered) * point / 100))]) for point in points}
