# SPDX-License-Identifier: MIT
"""The plots, as PNG files. matplotlib is imported only here."""

from importlib.util import find_spec

from bench.contestants import contestants

PEER_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "p", "h", "*")

PASSES_REFERENCES = ("asyncio.Queue",)
"""Their bytes per second say nothing."""


def draw(plan, out):
    """Draw what the results have; returns the files, or None without matplotlib."""
    if not find_spec("matplotlib"):
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, function in (("throughput", throughput), ("latency", latency), ("links", links)):
        results = [
            result for result in plan.results.values()
            if result.group == name and result.samples
        ]
        if results:
            path = out / f"{name}.png"
            figure = function(results)
            figure.savefig(path, dpi=120, bbox_inches="tight")
            files.append(path)
    return files


def _styles():
    """A look for every contestant: kucomms in strong lines, peers thinner, each its own marker."""
    every = contestants()
    ours = [one.name for one in every if one.ours]
    others = [one.name for one in every if not one.ours]
    styles = {}
    warm = {
        "kucomms shm send": "tab:red", "kucomms shm send_many": "tab:orange",
        "kucomms shm loan+borrow": "tab:purple", "kucomms shm": "tab:red",
        "kucomms shm receive": "brown", "kucomms shm busy_poll": "gold",
        "kucomms shm request": "tab:orange", "kucomms shm future": "hotpink",
        "kucomms shm no polling": "darkviolet",
    }
    inside = ("magenta", "hotpink", "black")
    cold = ("tab:blue", "tab:green", "tab:cyan", "navy", "limegreen", "teal", "steelblue", "olive",
            "dimgray", "darkseagreen", "slateblue", "black")
    for name in ours:
        styles[name] = {"color": warm.get(name, "black"), "linewidth": 2.5, "marker": "o"}
    for number, name in enumerate(one.name for one in every if one.ours and one.solo):
        styles[name] |= {"color": inside[number % len(inside)], "linestyle": ":"}
    for number, name in enumerate(others):
        styles[name] = {
            "color": cold[number % len(cold)], "linewidth": 1.2, "linestyle": "--",
            "marker": PEER_MARKERS[number % len(PEER_MARKERS)],
        }
    return styles


def _in_order(names):
    order = [one.name for one in contestants()]
    return sorted(set(names), key=order.index)


def _by_name(results):
    names = _in_order(result.name for result in results)
    return {name: [result for result in results if result.name == name] for name in names}


def _size_label(size, _position=None):
    for unit, factor in (("M", 1 << 20), ("K", 1 << 10)):
        if size >= factor:
            return f"{size / factor:g}{unit}"
    return f"{size:g}"


def throughput(results):
    """Messages and bytes per second by message size."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(15, 7))
    left, right = figure.subplots(1, 2)
    styles = _styles()
    for name, lines in _by_name(results).items():
        sizes = [int(line.case.split()[0]) for line in lines]
        left.plot(sizes, [1e3 / line.median for line in lines], label=name, markersize=6,
                  **styles[name])
        if name in PASSES_REFERENCES:
            continue
        right.plot(sizes, [size / line.median for size, line in zip(sizes, lines, strict=True)],
                   label=name, markersize=6, **styles[name])
        if lines[0].ours and len(lines[0].values) > 1:
            left.fill_between(
                sizes, [1e3 / max(line.values) for line in lines],
                [1e3 / min(line.values) for line in lines],
                color=styles[name]["color"], alpha=0.12, linewidth=0,
            )
    ticks = sorted({int(result.case.split()[0]) for result in results})
    for axes, label in ((left, "million messages per second"), (right, "GB per second")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(FuncFormatter(_size_label))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        axes.set_xlabel("message size in bytes")
        axes.set_ylabel(label)
        axes.grid(True, which="major", alpha=0.3)
    right.legend(*left.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.02, 0.5),
                 frameon=False)
    figure.suptitle("one way; median of the rounds, band: min to max", y=0.94)
    return figure


def latency(results):
    """Round trip by percentile, parked and busy."""
    from matplotlib.figure import Figure

    modes = [mode for mode in ("parked", "busy") if any(one.case == mode for one in results)]
    figure = Figure(figsize=(7.5 * len(modes), 7))
    all_axes = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    styles = _styles()
    points = (50, 90, 99, 99.9)
    titles = {"parked": "both asleep before each trip", "busy": "back to back"}
    for axes, mode in zip(all_axes, modes, strict=True):
        for name, lines in _by_name([one for one in results if one.case == mode]).items():
            curve = [(point, value) for point, value in lines[0].curve.items() if point >= 10]
            axes.plot(
                [100 / (100 - point) for point, _value in curve],
                [value / 1000 for _point, value in curve],
                label=name, markersize=5, markevery=3, **styles[name],
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([100 / (100 - point) for point in points])
        axes.set_xticklabels([f"p{point:g}" for point in points])
        axes.minorticks_off()
        axes.set_title(titles[mode])
        axes.set_xlabel("percentile")
        axes.grid(True, alpha=0.3)
    handles = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = _in_order(handles)
    all_axes[-1].legend([handles[name] for name in names], names, frameon=False,
                        loc="center left", bbox_to_anchor=(1.02, 0.5))
    low = min(min(one.curve.values()) for one in results) / 1000
    high = max(max(one.curve.values()) for one in results) / 1000
    ticks = [tick * 10**power for power in range(6) for tick in (1, 2, 5)]
    ticks = [tick for tick in ticks if low / 2 <= tick <= high * 2]
    all_axes[0].set_yticks(ticks)
    all_axes[0].set_yticklabels([f"{tick:g}" for tick in ticks])
    all_axes[0].set_ylabel("microseconds")
    figure.suptitle("round trip of 64 B, all rounds together", y=0.97)
    return figure


def links(results):
    """Time per message by number of links."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for case, color in (("one busy", "tab:blue"), ("all active", "tab:red")):
        lines = [result for result in results if result.case == case]
        numbers = [int(line.name.split()[0]) for line in lines]
        medians = [line.median for line in lines]
        spread = [
            [line.median - min(line.values) for line in lines],
            [max(line.values) - line.median for line in lines],
        ]
        axes.errorbar(numbers, medians, spread, label=case, color=color, marker="o", capsize=4)
    axes.set_xscale("log")
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("links of one endpoint")
    axes.set_ylabel("ns per message of 64 B")
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title("many links; median, bars: min to max")
    return figure
