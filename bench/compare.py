# SPDX-License-Identifier: MIT
"""What a message costs before and after a change: two revisions of kucomms, in turns.

Both are cloned and built below ``build/compare/``. Each round measures the earlier one, the later
one, and the earlier one once more; the order changes from round to round. The ratio of the two
measurements of the earlier one is the noise: a difference within it means nothing::

    python -m bench.compare HEAD~5 HEAD docs/bench-compare.md

It measures the C core (``bench/core``), ``send_nowait`` and ``loan`` of Python, and
``kucomms_send()`` and ``kucomms_reserve()`` of the kernel module (``bench/kernel``, in a guest).
"""

import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from bench.markdown import table

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "compare"
BEFORE, AFTER, AGAIN = "before", "after", "before, again"
TREES = (BEFORE, AFTER, AGAIN)
CORE = (
    "kucomms one thread 64 B",
    "kucomms one thread with copies 64 B",
    "kucomms one thread with copies 1024 B",
)
KERNEL = {
    "kucomms-copied": "kernel: `kucomms_send()`, 1 KiB, cycles",
    "kucomms": "kernel: `kucomms_reserve()` and `kucomms_commit()`, 1 KiB, cycles",
}
SIZE = 64
BURST = 256
BURSTS = 400


# ---- in a process of its own, with the package of one of the trees ---------------


async def _bursts(link, other):
    """{what sent the messages: nanoseconds for each, the median of all bursts}."""
    found = {"Python: `send_nowait()`, 64 B, ns": [], "Python: `loan()`, 64 B, ns": []}
    sending, lending = found.values()
    data = bytes(SIZE)
    for _ in range(BURSTS):
        begin = time.perf_counter_ns()
        for _ in range(BURST):
            link.send_nowait(data)
        sending.append(time.perf_counter_ns() - begin)
        for _ in range(BURST):
            other.receive_nowait()
        begin = time.perf_counter_ns()
        for _ in range(BURST):
            with link.loan(SIZE) as loan:
                loan.data[:] = data
        lending.append(time.perf_counter_ns() - begin)
        for _ in range(BURST):
            other.receive_nowait()
    return {name: statistics.median(values) / BURST for name, values in found.items()}


async def _python_side(tree):
    import kucomms

    assert Path(kucomms.__file__).is_relative_to(tree), kucomms.__file__
    url = f"shm://bench_compare_{os.getpid()}"
    linked = asyncio.get_running_loop().create_future()
    async with kucomms.Endpoint("receiver") as endpoint:
        endpoint.on_link_open(linked.set_result)
        await endpoint.listen(url)
        async with kucomms.connect(url) as link:
            return await _bursts(link, await linked)


# ---- here --------------------------------------------------------------------------


def _run(command, **options):
    """Its standard output. Raises click.ClickException when it fails."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-5:]
        raise click.ClickException(f"{' '.join(map(str, command))}:\n" + "\n".join(said))
    return done.stdout


def check_out(number):
    """The tree of a commit, with its C code built."""
    tree = BUILD / number
    if not tree.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        # A clone and no worktree: nothing of it stays in .git/ when build/ is removed.
        _run(["git", "clone", "--quiet", "--no-checkout", ROOT, tree])
        _run(["git", "-C", tree, "checkout", "--quiet", number])
    _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=tree)
    _run(["make", "-C", "bench/core", "HAVE_CK="], cwd=tree)
    return tree


def measure_core(tree):
    """{what: nanoseconds}, by ``core-bench``."""
    program = tree / "bench" / "core" / "core-bench"
    options = [part for name in CORE for part in ("--only", name)]
    lines = map(json.loads, _run([program, *options]).splitlines())
    return {f"C: {one['name'].removeprefix('kucomms ')}, ns": one["value"] for one in lines}


def measure_python(tree):
    """{what: nanoseconds}, by a process that imports the package of this tree."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    with tempfile.TemporaryDirectory() as runtime:
        environment["XDG_RUNTIME_DIR"] = runtime
        command = [sys.executable, "-P", __file__, "--side", tree]
        return json.loads(_run(command, env=environment, cwd=tree))


def measure_kernel(tree):
    """{what: cycles}, by the module of this tree in a guest."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "bench/kernel/run.py", "--json", "--rounds", 3]
    command += [part for name in KERNEL for part in ("--only", name)]
    result = json.loads(_run(command, env=environment, cwd=tree))
    return {
        KERNEL[row["mechanism"]]: row["kernel_cycles"]["median"]
        for row in result["rows"]
        if row["direction"] == "kernel to user"
    }


def measure(trees, rounds, kernel_rounds, say):
    """{what: {which tree: values}}; a value for each round."""
    found = {}
    plan = [(measure_core, rounds), (measure_python, rounds), (measure_kernel, kernel_rounds)]
    for measuring, count in plan:
        for number in range(count):
            for turn in range(len(TREES)):
                which = TREES[(number + turn) % len(TREES)]
                for what, value in measuring(trees[which]).items():
                    found.setdefault(what, {which: [] for which in TREES})[which].append(value)
            say(f"{measuring.__name__.removeprefix('measure_')}: round {number + 1} of {count}")
    return found


def ratios(found):
    """{what: (before, after, their ratio, the ratio of before to itself: least, most)}."""
    result = {}
    for what, values in found.items():
        noise = [b / a for a, b in zip(values[BEFORE], values[AGAIN], strict=True)]
        own = statistics.median(values[BEFORE] + values[AGAIN])
        new = statistics.median(values[AFTER])
        result[what] = own, new, new / own, min(noise), max(noise)
    return result


def page(found, numbers):
    """The lines of the page."""
    yield "# Before and after"
    yield ""
    yield (
        f"`{numbers[0]}` and `{numbers[1]}`; {os.cpu_count()} cores of a virtual machine, Linux "
        f"{platform.release()}, Python {platform.python_version()}. Medians of "
        f"{', '.join(str(len(values[AFTER])) for values in found.values())} rounds, a row each. "
        "The noise is what the earlier revision differs from itself by, in one round. The "
        "kernel's processor is emulated: read its ratio only. How to repeat it:"
    )
    yield ""
    yield "```sh"
    yield f"make bench-compare BASE={numbers[0]} AFTER={numbers[1]}"
    yield "```"
    yield ""
    rows = [
        [what, f"{own:,.1f}", f"{new:,.1f}", f"{ratio:.2f}", f"{least:.2f} to {most:.2f}"]
        for what, (own, new, ratio, least, most) in ratios(found).items()
    ]
    head = ["", "before", "after", "after / before", "noise: before / before"]
    yield from list(table(head, rows))[:-1]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("before", required=False)
@click.argument("after", default="HEAD")
@click.argument("target", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
@click.option("--kernel-rounds", type=click.IntRange(0), default=3, show_default=True,
              help="Each boots three guests.")
@click.option("--json", "as_json", is_flag=True, help="All values on stdout; the rest on stderr.")
@click.option("--side", type=click.Path(path_type=Path), hidden=True)
def main(before, after, target, rounds, kernel_rounds, as_json, side):
    r"""Measure what a message costs in the revisions BEFORE and AFTER; write the page TARGET.

    \b
    Example:
        python -m bench.compare HEAD~5 HEAD build/compare.md --kernel-rounds 0
    """
    if side:
        print(json.dumps(asyncio.run(_python_side(side))))
        return
    if before is None:
        raise click.UsageError("which revisions? See --help.")
    numbers = [
        _run(["git", "rev-parse", "--verify", "--short=12", f"{name}^{{commit}}"], cwd=ROOT).strip()
        for name in (before, after)
    ]
    try:
        earlier, later = map(check_out, numbers)
        trees = {BEFORE: earlier, AFTER: later, AGAIN: earlier}
        found = measure(trees, rounds, kernel_rounds, lambda text: click.echo(text, err=as_json))
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)
    text = "\n".join(page(found, numbers)) + "\n"
    if target:
        target.write_text(text)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(text)


if __name__ == "__main__":
    main(prog_name="python -m bench.compare")
