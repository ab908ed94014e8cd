# SPDX-License-Identifier: MIT
"""Bugs to plant in a copy of the kernel module: a test or a checker has to find each of them.

\b
    python -m tests.kernel.plants --jobs 2      # all, some minutes each
    python -m tests.kernel.plants --only leak
    python -m tests.kernel.plants --list

Exit code 0: all found; 1: one was not, or the guest failed for another reason.
"""

import json
import queue
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
COPIES = ROOT / "build/planted"
console = Console(stderr=True)


@dataclass(frozen=True)
class Plant:
    """One bug: ``old`` is replaced by ``new`` in ``file``, below kernel_module/."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    """What is run, as pytest's arguments below tests/kernel."""
    told: str
    """What the run then prints: a regular expression."""
    kernel: str = "6.12"
    """Or a sanitized one: kasan, kcsan, rt."""


_PUT = "\terr = put(channel, message, flags);\n"

PLANTS = (
    Plant(
        "uninitialised-pages",
        "internal.h",
        "GFP_KERNEL_ACCOUNT | __GFP_ZERO |",
        "GFP_KERNEL_ACCOUNT |",
        "test_disclosure.py -k fresh_pages",
        r"FAILED .*test_fresh_pages_are_empty",
    ),
    Plant(
        "no-turns-of-others",
        "internal.h",
        "#define KUCOMMS_BATCH\t\t64\t/* messages of a channel in a row, */\n"
        "#define KUCOMMS_BATCH_BYTES\tSZ_256K",
        "#define KUCOMMS_BATCH\t\tINT_MAX\n#define KUCOMMS_BATCH_BYTES\tSZ_1G",
        "test_overload.py -k one_channel_floods",
        r"FAILED .*test_one_channel_floods",
    ),
    Plant(
        "writable-for-the-wrong-side",
        "channel.c",
        "\t\tif (vma->vm_flags & VM_WRITE)\n\t\t\treturn -EACCES;\n",
        "",
        "test_hostile.py -k rights_of_each_page",
        r"FAILED .*test_rights_of_each_page",
    ),
    Plant(
        "mapping-beyond-the-end",
        "channel.c",
        "first >= sides ||\n\t    count > sides - first)",
        "first >= sides + count)",
        "test_hostile.py -k more_than_there_is",
        r"FAILED .*test_more_than_there_is|BUG:|general protection|Bad page",
    ),
    Plant(
        "never-unregistered-device",
        "main.c",
        "\tdevice_destroy(&kucomms_class,\n\t\t       MKDEV(MAJOR(first_number), "
        "device->minor));\n\tfree_device(device);\n\treturn 0;",
        "\tfree_device(device);\n\treturn 0;",
        "test_lifecycle.py -k 200_devices",
        r"FAILED .*test_200_devices",
    ),
    Plant(
        "no-lock",
        "channel.c",
        f"\traw_spin_lock_irqsave(&channel->tx_lock, irq);\n{_PUT}"
        "\traw_spin_unlock_irqrestore(&channel->tx_lock, irq);\n",
        f"\tlocal_irq_save(irq);\n{_PUT}\tlocal_irq_restore(irq);\n",
        "test_kernel_api.py -k senders_in_every_context",
        r"FAILED .*test_senders_in_every_context",
    ),
    Plant(
        "leak",
        "channel.c",
        "\tkvfree(pages);\n",
        "",
        "test_lifecycle.py -k child_outlives",
        r"unreferenced object|suspected memory leak",
        kernel="kasan",
    ),
    Plant(
        "use-after-free",
        "runner.c",
        "\tkucomms_channel_get(channel);\n\traw_spin_lock_irq(",
        "\traw_spin_lock_irq(",
        "test_lifecycle.py -k child_outlives",
        r"use-after-free|refcount_t:|ODEBUG",
        kernel="kasan",
    ),
    Plant(
        "sleeps-under-a-lock",
        "channel.c",
        f"\traw_spin_lock_irqsave(&channel->tx_lock, irq);\n{_PUT}",
        f"\traw_spin_lock_irqsave(&channel->tx_lock, irq);\n\tmight_sleep();\n{_PUT}",
        "test_kernel_api.py -k echo",
        r"sleeping function called from invalid context|[Ii]nvalid wait context",
        kernel="kasan",
    ),
    Plant(
        "locks-in-two-orders",
        "device.c",
        "\tmutex_lock(&kucomms_lock);\n\tkfile->device->opens--;",
        "\tmutex_lock(&kucomms_lock);\n\tmutex_lock(&kfile->lock);\n"
        "\tmutex_unlock(&kfile->lock);\n\tkfile->device->opens--;",
        "test_lifecycle.py -k child_outlives",
        r"possible circular locking",
        kernel="kasan",
    ),
    Plant(
        "buffer-handed-over-twice",
        "pool.c",
        "\t\tif (used)\n\t\t\treturn false;\n",
        "\t\t(void)used;\n",
        "test_pool.py -k is_not_handed_over_again",
        r"FAILED .*test_what_the_kernel_has_is_not_handed_over_again",
    ),
    Plant(
        "buffer-beyond-its-pool",
        "pool.c",
        "\t    carried->length >\n\t    (u64)(pool->page_count - carried->page) << PAGE_SHIFT)",
        "\t    carried->length > (u64)pool->page_count << PAGE_SHIFT)",
        "test_pool.py -k wrong_buffer_breaks",
        r"FAILED .*test_a_wrong_buffer_breaks|unable to handle page fault",
    ),
    Plant(
        "buffer-comes-back-shorter",
        "pool.c",
        "buffer->owed.state) != OUT ||\n\t    carried->length != buffer->length)",
        "buffer->owed.state) != OUT)",
        "test_pool.py -k comes_back_as_it_went",
        r"FAILED .*test_a_buffer_of_the_kernel_comes_back_as_it_went",
    ),
    Plant(
        "pool-gone-before-its-messages",
        "pool.c",
        "(s64)(pool->channel->rx.position - pool->closed_at) >= 0)",
        "true)",
        "test_pool.py -k though_its_pool_was_closed",
        r"FAILED .*though_its_pool_was_closed",
    ),
    Plant(
        "pages-taken-from-io",
        "channel.c",
        "\t\tput_page(pages[i]);\n",
        "\t\tset_page_count(pages[i], 1);\n\t\tput_page(pages[i]);\n",
        "test_pool.py -k io_under_way",
        r"FAILED .*test_io_under_way|Bad page|BUG:",
    ),
    Plant(
        "give-back-overtaken",
        "channel.c",
        "\tif (kucomms_owes(channel))\n\t\terr = kucomms_pay(channel);\n",
        "",
        "test_pool.py -k given_back_before_the_next",
        r"FAILED .*test_what_was_freed_is_given_back_before_the_next_message",
    ),
    Plant(
        "retry-waits-for-ever",
        "runner.c",
        "\terr = look_ahead(channel);\n",
        "\terr = channel->pools ? -EAGAIN : look_ahead(channel);\n",
        "test_pool.py -k comes_back_behind",
        r"FAILED .*comes_back_behind_the_message",
    ),
    Plant(
        "look-ahead-forgets",
        "runner.c",
        "\tchannel->rx.available = ahead.available;\n\tchannel->rx.all_seen = ahead.all_seen;\n",
        "",
        "test_pool.py -k look_ahead_goes_on",
        r"FAILED .*test_a_look_ahead_goes_on_where_the_last_one_has_ended",
    ),
    Plant(
        "data-race",
        "channel.c",
        "\tif (err == -EPROTO)\n\t\tkucomms_channel_broken(channel);\n\telse if (err !=",
        "\tchannel->full++;\n\tif (err == -EPROTO)\n\t\tkucomms_channel_broken(channel);\n"
        "\telse if (err !=",
        "test_kernel_api.py -k senders_in_every_context",
        r"BUG: KCSAN: .*kucomms",
        kernel="kcsan",
    ),
    Plant(
        "loan-freed-by-the-program",
        "include/kucomms/ring.h",
        "\t\tif (p->held_count)\n\t\t\tlimit = p->held[0];\n",
        "",
        "test_hostile.py -k consumer_beyond_a_loan",
        r"FAILED .*consumer_beyond_a_loan",
    ),
    Plant(
        "stale-commit",
        "channel.c",
        "\tif (!err && loan->position != channel->tx.position)\n\t\terr = -ESTALE;\n",
        "",
        "test_kernel_api.py -k commits_that_come_too_late",
        r"FAILED .*test_commits_that_come_too_late",
    ),
    Plant(
        "ends-before-its-senders",
        "channel.c",
        "\treturn !atomic_read_acquire(&channel->copying);\n",
        "\treturn true;\n",
        "test_kernel_api.py -k long_messages_come_before",
        r"FAILED .*test_all_long_messages_come_before_the_end",
    ),
    Plant(
        "try-waits",
        "channel.c",
        "\tif (!raw_spin_trylock_irqsave(&channel->tx_lock, irq))\n\t\treturn -EBUSY;\n",
        "\traw_spin_lock_irqsave(&channel->tx_lock, irq);\n",
        "test_kernel_api.py -k interrupted_a_send",
        r"possible recursive locking detected|inconsistent lock state",
        kernel="kasan",
    ),
    Plant(
        "no-news-of-room",
        "runner.c",
        "\t\ttell_module(runner, channel, runner->endpoint->ops->writable);\n",
        "\t\ttell_module(runner, channel, NULL);\n",
        "test_kernel_api.py -k told_when_there_is_room",
        r"FAILED .*test_the_module_is_told_when_there_is_room",
    ),
    Plant(
        "extents-do-not-join",
        "extents.c",
        "if (page && entries[page - 1].pages) {",
        "if (page && !count) {",
        "test_extents.py -k as_in_a_model",
        r"FAILED .*test_free_pages_are_as_in_a_model",
    ),
    Plant(
        "last-page-not-looked-at",
        "pool.c",
        "kucomms_find_used(&pool->used, page, next);",
        "kucomms_find_used(&pool->used, page, next - 1);",
        "test_pool.py -k handed_over_again",
        r"FAILED .*handed_over_again",
    ),
    Plant(
        "chunks-not-looked-at",
        "extents.c",
        "first / KUCOMMS_CHUNK) <\n\t       chunks",
        "first / KUCOMMS_CHUNK) >\n\t       chunks",
        "test_pool.py -k of_a_long_buffer",
        r"FAILED .*test_a_page_of_a_long_buffer_is_handed_over_again",
    ),
)


def copy(tree: Path) -> None:
    """Make a tree of what is tracked and of what was built for Python."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    built = [str(path.relative_to(ROOT)) for path in ROOT.glob("kucomms/_core/*.so")]
    for name in [*filter(None, listed.stdout.split("\0")), *built]:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    (tree / ".venv").symlink_to(sys.prefix)
    (tree / "build").mkdir()
    (tree / "build/sanitized").symlink_to(ROOT / "build/sanitized")


def find(plant: Plant, tree: Path) -> tuple[bool, str]:
    """Run the tests with the bug in this tree; whether it was found, and what was printed."""
    file = tree / "kernel_module" / plant.file
    text = file.read_text()
    if text.count(plant.old) != 1:
        raise click.ClickException(f"{plant.name}: not once in {plant.file}: {plant.old}")
    first, *rest = shlex.split(plant.tests)
    tests = ["python", "-m", "pytest", "-x", f"tests/kernel/{first}", *rest]
    if plant.kernel == "kcsan":
        # It looks at one access in 2000, which is enough for all tests, and not for a few.
        often = "echo 50 >/sys/module/kcsan/parameters/skip_watch"
        tests = ["sh", "-c", f"{often} && exec {shlex.join(tests)}"]
    tests.insert(0, "--")
    if plant.kernel in ("kasan", "kcsan", "rt"):
        command = ["sh", "tools/kernel-sanitized.sh", plant.kernel, *tests]
    else:
        command = [sys.executable, "tools/guest.py", "--kernel", plant.kernel, *tests]
    file.write_text(text.replace(plant.old, plant.new))
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    finally:
        file.write_text(text)
    found = done.returncode == 1 and re.search(plant.told, done.stdout) is not None
    return found, done.stdout


def find_all(plants: list[Plant], jobs: int) -> dict[str, bool]:
    """Look for all of them, some at a time, each in a tree that no other uses; {name: found}."""
    shutil.rmtree(COPIES, ignore_errors=True)
    trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for number in range(jobs):
        copy(COPIES / str(number))
        trees.put(COPIES / str(number))

    def look(plant: Plant) -> tuple[bool, str]:
        tree = trees.get()
        try:
            return find(plant, tree)
        finally:
            trees.put(tree)

    result = {}
    with ThreadPoolExecutor(jobs) as executor, console.status("planting") as status:
        looking = {executor.submit(look, plant): plant for plant in plants}
        for done in as_completed(looking):
            plant = looking[done]
            try:
                result[plant.name], output = done.result()
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise
            status.update(f"{len(result)} of {len(plants)}")
            console.print(f"{plant.name}: {'found' if result[plant.name] else 'NOT FOUND'}")
            if not result[plant.name]:
                console.print(output, markup=False, highlight=False)
    return result


def names(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> list[Plant]:
    """The plants of these names, or all."""
    known = {plant.name: plant for plant in PLANTS}
    for name in given:
        if name not in known:
            raise click.BadParameter(f"{name}: there are {', '.join(known)}")
    return [known[name] for name in given] or list(PLANTS)


@click.command(help=__doc__)
@click.option("--only", "plants", multiple=True, callback=names, help="These alone.")
@click.option("--list", "only_list", is_flag=True, help="Say which there are, and end.")
@click.option("--kernel", help="This one for each: 6.1, 6.12, kasan, kcsan, rt.")
@click.option("--jobs", type=click.IntRange(1), default=1, help="Guests at a time.  [default: 1]")
@click.option("--json", "as_json", is_flag=True, help="The result on stdout.")
def main(
    plants: list[Plant], only_list: bool, kernel: str | None, jobs: int, as_json: bool
) -> None:
    if kernel is not None:
        plants = [replace(plant, kernel=kernel) for plant in plants]
    found = {} if only_list else find_all(plants, jobs)
    table = Table("planted in", "bug", "kernel", "found by", "")
    results = []
    for plant in plants:
        results.append({**asdict(plant), "found": found.get(plant.name)})
        mark = {True: "found", False: "NOT FOUND", None: ""}[found.get(plant.name)]
        table.add_row(plant.file, plant.name, plant.kernel, plant.tests, mark)
    if as_json:
        click.echo(json.dumps(results))
    else:
        Console().print(table)
    if any(result["found"] is False for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
