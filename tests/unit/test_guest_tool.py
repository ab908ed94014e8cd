# SPDX-License-Identifier: MIT
"""The parts of tools/guest.py that need no guest, and what tests/kernel/log.py calls a fault."""

import fcntl
import os

import click
import pytest

from tests.kernel.log import (
    MARKER,
    findings,
    findings_after_marker,
    is_within_race,
    races_elsewhere,
)
from tools import guest

INSTALLED = [
    "6.1.0-9-amd64",
    "6.1.0-56-amd64",
    "6.1.0-57-cloud-amd64",
    "6.1.0-58-rt-amd64",
    "6.10.11+bpo-amd64",
    "6.12.99+deb12-amd64",
    "6.12.117+deb12-amd64",
    "6.12.118+deb12-cloud-amd64",
    "6.12.119+deb12-rt-amd64",
    "6.12.120-custom",
]

FAULTS = [
    "BUG: kernel NULL pointer dereference, address: 0000000000000008",
    "BUG: unable to handle page fault for address: ffffc90000123000",
    "BUG: KASAN: slab-use-after-free in a+0xd3/0x1000 [kucomms]",
    "BUG: KFENCE: out-of-bounds read in a+0x11/0x1000",
    "BUG: KCSAN: data-race in a / b",
    "BUG: sleeping function called from invalid context at mm/slab.h:100",
    "BUG: scheduling while atomic: python/300/0x00000002",
    "BUG: spinlock bad magic on CPU#0, python/300",
    "BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 40s!",
    "BUG kmalloc-64 (Tainted: G        O): Objects remaining in kmalloc-64",
    "kmem_cache_destroy kucomms: Slab cache still has objects when called from b+0x1/0x2",
    "WARNING: CPU: 0 PID: 257 at /x/kucomms.c:11 a+0x11/0x1000 [kucomms]",
    "WARNING: possible circular locking dependency detected",
    "WARNING: possible recursive locking detected",
    "WARNING: possible irq lock inversion dependency detected",
    "WARNING: inconsistent lock state",
    "WARNING: bad unlock balance detected!",
    "WARNING: held lock freed!",
    "WARNING: lock held when returning to user space!",
    "WARNING: suspicious RCU usage",
    "DEBUG_LOCKS_WARN_ON(lock->magic != lock)",
    "ODEBUG: free active (active state 0) object type: timer_list",
    "Illegal context switch in RCU read-side critical section!",
    "Oops: 0002 [#1] PREEMPT SMP NOPTI",
    "Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI",
    "Call Trace:",
    "Kernel panic - not syncing: Fatal exception",
    "UBSAN: array-index-out-of-bounds in /x/channel.c:7:3",
    "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
    "rcu: INFO: rcu_sched self-detected stall on CPU",
    "rcu: rcu_preempt kthread starved for 2500 jiffies!",
    "watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [kucomms:300]",
    "NMI watchdog: Watchdog detected hard LOCKUP on cpu 0",
    "INFO: task python:300 blocked for more than 120 seconds.",
    "general protection fault, probably for non-canonical address 0xdead000000000100",
    "Unable to handle kernel paging request at virtual address 0008",
    "unchecked MSR access error: RDMSR from 0x1",
    "divide error: 0000 [#1] SMP",
    "invalid opcode: 0000 [#1] SMP",
    "traps: double fault",
    "stack guard page was hit at 00000000a1",
    "python[300]: segfault at 8 ip 00007f sp 00007f error 4",
    "Bad page state in process python  pfn:12345",
    "BUG: Bad rss-counter state mm:00000000 type:MM_SHMEMPAGES val:1",
    "kmemleak: 1 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
    "unreferenced object 0xffff888004ea9d00 (size 96):",
    "refcount_t: underflow; use-after-free.",
    "list_del corruption. prev->next should be ffff, but was 0000",
    "list_add corruption. next->prev should be prev",
    "usercopy: Kernel memory exposure attempt detected from SLUB object",
    "python: page allocation failure: order:4, mode:0xcc0",
    "printk messages dropped: the log was overwritten before it was read",
    "** 12 printk messages dropped **",
    "kmemleak: Kernel memory leak detector disabled",
    "turning off the locking correctness validator.",
]

ORDINARY = [
    "kucomms: loading out-of-tree module taints kernel.",
    "kucomms: module verification failed: signature and/or required key missing",
    "kucomms kucomms_echo: channel 3 opened",
    "kucomms_longtest: 1000 messages, 0 errors",
    "kucomms: a peer broke the protocol, its channel is closed",
    "virtme-ng-init: triggering udev coldplug",
    "random: crng init done",
    "systemd-journald: no problem",
    "debug: the bug count is 0",
    "rcu: Preemptible hierarchical RCU implementation.",
    "kmemleak: Kernel memory leak detector initialized (mem pool available: 15671)",
    "clocksource: tsc: mask: 0xffffffffffffffff",
    "",
]


@pytest.mark.parametrize("line", FAULTS)
@pytest.mark.parametrize("prefix", ["", "[   12.445515] "])
def test_a_fault_is_found(line, prefix):
    assert findings(["before", prefix + line, "after"]) == [prefix + line]


@pytest.mark.parametrize("line", ORDINARY)
def test_an_ordinary_line_is_no_fault(line):
    assert findings([line, f"[   12.445515] {line}"]) == []


def test_no_stack_for_a_new_thread():
    """The kernel says so by itself, and a test provokes it; anybody else's trace counts."""
    said = [
        "kthreadd: vmalloc error: size 32768",
        "CPU: 0 UID: 0 PID: 2",
        "Tainted: [O]=OOT_MODULE",
    ]
    assert findings([*said, "Call Trace:", " <TASK>"]) == []
    assert findings([*said, "", "Call Trace:", "Call Trace:"]) == ["Call Trace:"]
    assert findings(["python: vmalloc error: size 1", "Call Trace:"]) == ["Call Trace:"]


def test_a_kill_in_a_memory_cgroup_is_no_finding():
    began = "hog invoked oom-killer: gfp_mask=0xcc0"
    group = "Memory cgroup out of memory: Killed process 5 (hog)"
    assert findings([began, "Call Trace:", "Tasks state", group]) == []
    assert findings([began, "Call Trace:", group, "Call Trace:"]) == ["Call Trace:"]
    whole = "Out of memory: Killed process 6 (bystander)"
    assert findings([began, "Call Trace:", whole]) == ["Call Trace:"]


def test_findings_keep_their_order_and_number():
    assert findings(["Oops: 1", "fine", "WARNING: 2", "Oops: 1"]) == [
        "Oops: 1", "WARNING: 2", "Oops: 1",
    ]  # fmt: skip


def race(first, second, *, stack=()):
    return [
        "=" * 66,
        f"BUG: KCSAN: data-race in {first} / {second}",
        "",
        "write to 0xffff8880034a8040 of 8 bytes by task 90 on cpu 1:",
        f" {first}+0x41/0x90",
        *stack,
        "",
        "Reported by Kernel Concurrency Sanitizer on:",
        "CPU: 0 UID: 0 PID: 91 Comm: python3 Tainted: G           O       6.12.94 #1",
        "=" * 66,
    ]


OURS = [
    race("kucomms_channel_events", "put"),
    race("put", "kucomms_channel_events"),
    race("memcpy", "memcpy", stack=[" fill+0x1/0x2 [kucomms]"]),
    race("a", "b", stack=[" test_echo+0x1/0x2 [kucomms_test]"]),
]


@pytest.mark.parametrize("prefix", ["", "[   12.445515] "])
@pytest.mark.parametrize("report", OURS)
def test_a_race_of_ours_is_found(report, prefix):
    report = [prefix + line for line in report]
    assert findings(["x", *report, "y"]) == [report[1]]
    assert races_elsewhere(report) == []


def test_a_race_of_the_scheduler_that_we_have_only_called_is_elsewhere():
    stack = [" __cond_resched+0x4f/0x54", " kucomms_channel_new+0x36e/0x79f [kucomms]"]
    report = race("rcu_all_qs", "rcu_report_qs_rdp", stack=stack)
    assert findings(report) == []
    assert races_elsewhere(report) == [report[1]]


@pytest.mark.parametrize("prefix", ["", "[   12.445515] "])
def test_races_elsewhere_are_counted_and_fail_nothing(prefix):
    others = [prefix + line for line in [*race("p9_a", "b"), "", *race("c", "d")]]
    assert findings(others) == []
    assert races_elsewhere(others) == [others[1], others[11]]
    between = [*others[:9], "kucomms: between two reports", *others[10:]]
    assert findings(between) == []
    assert races_elsewhere(between) == [others[1], others[11]]
    both = [*others, *OURS[0], *others]
    assert findings(both) == [OURS[0][1]]
    assert len(races_elsewhere(both)) == 4


def test_a_fault_amid_a_report_of_a_race_elsewhere_is_found():
    report = race("p9_a", "b")
    report.insert(4, "BUG: KASAN: slab-out-of-bounds in f")
    assert findings(report) == ["BUG: KASAN: slab-out-of-bounds in f"]
    assert len(races_elsewhere(report)) == 1


@pytest.mark.parametrize("end", range(2, 8))
def test_a_report_of_a_race_that_does_not_end_is_a_fault(end):
    cut = race("p9_a", "b")[:end]
    assert findings(cut) == [cut[1]]
    assert races_elsewhere(cut) == []
    assert is_within_race(cut)
    # the next begins
    assert (findings([*cut, *race("c", "d")]) == []) == (end > 6)


def test_reports_of_races_that_have_ended():
    assert not is_within_race([])
    assert not is_within_race(["=" * 66])
    assert not is_within_race(race("a", "b"))
    assert not is_within_race([*race("a", "b"), "x"])


def test_races_elsewhere_of_the_boot_do_not_count():
    log = "\n".join([*race("a", "b"), MARKER, *race("c", "d")])
    assert findings_after_marker(log) == []


def test_only_a_panic_counts_before_the_marker():
    log = "\n".join(["WARNING: of the boot", "Kernel panic - not syncing: x", MARKER, "fine"])
    assert findings_after_marker(log) == ["Kernel panic - not syncing: x"]


def test_a_fault_counts_after_the_marker():
    log = f"BUG: of the boot\r\n[ 3.2] {MARKER}\r\nfine\r\nBUG: ours\r\nKernel panic\r\n"
    assert findings_after_marker(log) == ["BUG: ours", "Kernel panic"]


def test_a_log_without_the_marker_is_the_boots():
    assert findings_after_marker("WARNING: of the boot\nnot syncing: no root\n") == [
        "not syncing: no root"
    ]
    assert findings_after_marker("") == []


def test_newest_compares_numbers_and_passes_over_the_special_kernels():
    assert guest.newest(INSTALLED, "6.1") == "6.1.0-56-amd64"
    assert guest.newest(INSTALLED, "6.12") == "6.12.117+deb12-amd64"
    assert guest.newest(reversed(INSTALLED), "6.1") == "6.1.0-56-amd64"
    assert guest.newest(INSTALLED, "6.1-rt") == "6.1.0-58-rt-amd64"
    assert guest.newest(INSTALLED, "6.12-rt") == "6.12.119+deb12-rt-amd64"
    assert guest.newest(["6.12.9+deb12-amd64"], "6.1") is None
    assert guest.newest([], "6.12") is None


def test_newest_prefers_no_debug_kernel():
    names = ["6.1.0-56-amd64", "6.1.0-57-amd64-dbg", "6.1.0-57-amd64-unsigned"]
    assert guest.newest(names, "6.1") == "6.1.0-56-amd64"


def test_choose_takes_series_and_versions():
    assert guest.choose(guest.SERIES, INSTALLED) == ["6.1.0-56-amd64", "6.12.117+deb12-amd64"]
    assert guest.choose(["6.12.120-custom"], INSTALLED) == ["6.12.120-custom"]
    assert guest.choose([], INSTALLED) == []


@pytest.mark.parametrize("want", ["6.6", "6.1.0-1-amd64", "6"])
def test_choose_says_what_is_missing(want):
    with pytest.raises(click.ClickException, match=rf"no kernel {want} .*install-kernel-packages"):
        guest.choose(["6.1", want], INSTALLED)


def test_installed_kernels_have_image_modules_and_headers(tmp_path):
    boot, modules = tmp_path / "boot", tmp_path / "modules"
    boot.mkdir()
    for name in ("whole", "no-headers", "no-modules", "no-image"):
        if name != "no-image":
            (boot / f"vmlinuz-{name}").touch()
        (modules / name).mkdir(parents=True)
        if name != "no-modules":
            (modules / name / "modules.dep").touch()
        if name != "no-headers":
            (modules / name / "build").mkdir()
    (boot / "config-whole").touch()
    (modules / "dangling").mkdir()
    (boot / "vmlinuz-dangling").touch()
    (modules / "dangling/modules.dep").touch()
    (modules / "dangling/build").symlink_to(tmp_path / "removed")
    assert guest.installed_kernels(boot, modules) == ["whole"]
    assert guest.installed_kernels(tmp_path / "nothing", modules) == []


def test_build_warnings():
    said = [
        "/x/main.c:5:6: warning: no previous prototype for 'f' [-Wmissing-prototypes]",
        "/x/main.c:7:1: error: expected ';' before '}' token",
        "WARNING: modpost: missing MODULE_DESCRIPTION() in /x/kucomms.o",
        'ERROR: modpost: "f" [/x/kucomms.ko] undefined!',
    ]
    silent = [
        "warning: the compiler differs from the one used to build the kernel",
        "  The kernel was built by: gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0",
        "  CC [M]  /x/kernel_module/warning.o",
        "Skipping BTF generation for /x/kucomms.ko due to unavailability of vmlinux",
    ]
    assert guest.build_warnings("\n".join([silent[0], *said, *silent[1:]])) == said
    assert guest.build_warnings("") == []


def _tree(path):
    return {
        str(p.relative_to(path)): p.read_text() if p.is_file() else None for p in path.rglob("*")
    }


def test_sync_copies_changes_and_removes(tmp_path):
    source, target = tmp_path / "source", tmp_path / "a/target"
    (source / "include/uapi").mkdir(parents=True)
    (source / "Kbuild").write_text("obj-m += x.o\n")
    (source / "x.c").write_text("1")
    (source / "include/uapi/x.h").write_text("2")
    guest.sync(source, target)
    assert _tree(target) == _tree(source)

    (source / "x.c").write_text("3")
    (source / "Kbuild").unlink()
    (source / "include/uapi/x.h").unlink()
    (source / "include/uapi").rmdir()
    guest.sync(source, target)
    assert _tree(target) == _tree(source) == {"x.c": "3", "include": None}


def test_sync_leaves_what_has_not_changed_and_what_make_built(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "x.c").write_text("1")
    (source / "y.c").write_text("1")
    guest.sync(source, target)
    for name in ("x.c", "y.c"):
        os.utime(target / name, (1000, 1000))
    built = {"x.o", "x.ko", "x.mod", "x.mod.c", ".x.o.cmd", "Module.symvers", "modules.order"}
    for name in built:
        (target / name).write_text("built")
    (source / "y.c").write_text("2")
    guest.sync(source, target)
    assert (target / "x.c").stat().st_mtime == 1000
    assert (target / "y.c").stat().st_mtime != 1000
    assert {p.name for p in target.iterdir()} == built | {"x.c", "y.c"}


def test_sync_copies_nothing_that_was_built_in_the_source(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "__pycache__").mkdir(parents=True)
    for name in ("x.c", "x.o", "x.ko", ".x.o.cmd", "Module.symvers", "x.mod.c"):
        (source / name).touch()
    guest.sync(source, target)
    assert _tree(target) == {"x.c": ""}


def test_sync_replaces_a_directory_by_a_file_and_back(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "x").mkdir(parents=True)
    (source / "x/y").write_text("1")
    guest.sync(source, target)
    (source / "x/y").unlink()
    (source / "x").rmdir()
    (source / "x").write_text("2")
    guest.sync(source, target)
    assert _tree(target) == {"x": "2"}
    (source / "x").unlink()
    (source / "x").mkdir()
    (source / "x/y").write_text("3")
    guest.sync(source, target)
    assert _tree(target) == {"x": None, "x/y": "3"}


def run_with(tmp_path, monkeypatch, vng):
    """A run where a shell script takes the place of virtme-ng, and nothing is built."""
    tree, program = tmp_path / "tree", tmp_path / "bin/vng"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncd {tmp_path}\necho boot >>boots\n{vng}\n")
    program.chmod(0o755)
    monkeypatch.setattr(guest, "BIN", program.parent)
    monkeypatch.setattr(guest, "build", lambda *_: tree)
    kernel = guest.Kernel("6.12", tmp_path / "vmlinuz", tmp_path)
    with (tmp_path / "shown").open("wb") as show:
        return guest.run(kernel, ["true"], tmp_path / "logs", show, cpus=1, memory="1G", timeout=60)


def test_a_kernel_that_dies_while_it_boots_is_booted_again(tmp_path, monkeypatch):
    verdict = run_with(
        tmp_path,
        monkeypatch,
        'if [ "$(wc -l <boots)" -lt 3 ]; then echo "Kernel panic: int3" >&2; exit; fi\n'
        f'echo "{MARKER}" >&2; echo 0 >logs/6.12/status',
    )
    assert verdict.ok
    assert verdict.boots == 3
    assert "int3" in (tmp_path / "logs/6.12/dmesg-2.log").read_text()


def test_a_kernel_that_never_boots_fails(tmp_path, monkeypatch):
    verdict = run_with(tmp_path, monkeypatch, 'echo "Kernel panic - not syncing: no root" >&2')
    assert not verdict.ok
    assert verdict.boots == 3
    assert "no root" in verdict.error
    assert len(verdict.findings) == 1


def test_a_kernel_that_dies_under_the_command_is_not_booted_again(tmp_path, monkeypatch):
    verdict = run_with(
        tmp_path, monkeypatch, f'echo "{MARKER}" >&2; echo "Kernel panic - not syncing: x" >&2'
    )
    assert not verdict.ok
    assert verdict.boots == 1
    assert len(verdict.findings) == 1


def test_one_build_of_a_kernel_at_a_time(tmp_path):
    path = tmp_path / "kernel" / "6.12.lock"
    with guest.locked(path), path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
