# SPDX-License-Identifier: MIT
"""Builds the kernel modules, boots real kernels, and runs a command in each as root.

The guest (virtme-ng, in qemu) sees the host's file system: this repository and its virtual
environment are simply there, read-only. What a run writes goes to ``--log-dir``. A kernel log
that reports a fault fails the run, whatever the command's exit code.
"""

import contextlib
import fcntl
import filecmp
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.kernel.log import (  # noqa: E402
    MARKER,
    after_marker,
    findings_after_marker,
    races_elsewhere,
)

SERIES = ("6.1", "6.12")
SOURCES = ("kernel_module", "examples/kernel", "tests/kernel/module")
PROGRAMS = "tests/kernel/programs"
_MAKE = shutil.which("make") or "make"
MODULES = Path("/lib/modules")
BOOT = Path("/boot")
BIN = Path(sys.prefix, "bin")
DEFAULT_COMMAND = ("python", "-m", "pytest", "--durations=15", "tests/kernel")

# The host's file system once more, with a cache: what programs are started from does not change
# meanwhile, and without one each component of each path that Python tries is asked of the host.
_CACHED = "kucomms_cached"
_SHARED = "trans=virtio,version=9p2000.L,access=any,msize=524288,cache=loose"
_STARTED_FROM = (
    *(Path(sys.base_prefix), Path(sys.prefix), *(ROOT / name for name in ("kucomms", "tests"))),
    *(Path("/usr", name) for name in ("bin", "include", "lib/gcc", "lib/x86_64-linux-gnu")),
)

# A directory in the guest, whose /tmp nobody else sees.
_SCRATCH = "/tmp/kucomms-guest"  # noqa: S108

_BUILT = re.compile(r"\.|__pycache__$|.*\.(o|ko|mod|mod\.c|cmd|a|order)$|Module\.symvers$")
_WARNING = re.compile(r"\bwarning:|\berror:", re.IGNORECASE)
# The headers' compiler was a patch release older than ours: nothing that our code can mend.
_OTHER_COMPILER = "warning: the compiler differs from the one used to build the kernel"
_PASSED_ON = re.compile(r"(CI|LANG|LC_.*|TERM|COLUMNS|PYTEST_ADDOPTS|KUCOMMS_.*|.*_COLORS?)$")
# Everything reaches the serial console; an oops ends the guest; KASAN reports more than once.
# The first is for kernels that mount their root themselves, as the sanitized ones do: with the
# cache they start programs three times as fast.
_BOOT_OPTIONS = (
    f"rootflags={_SHARED}",
    # While the kernel identifies the processor, an interrupt does not see that there are five
    # levels of page tables, and KASAN takes every address for a wild one.
    "no5lvl",
    *("ignore_loglevel", "printk.devkmsg=on", "log_buf_len=4M"),
    # What the module forgets to clear has to show.
    *("oops=panic", "kasan_multi_shot", "init_on_alloc=0"),
)
# An emulated processor can meet the breakpoint of a code patch after it has gone, and the kernel
# patches itself when it boots: an "Oops: int3" in some hundred boots.
_BOOTS = 3


@dataclass(frozen=True)
class Kernel:
    """A kernel to boot, and the build tree of its modules."""

    version: str
    vmlinuz: Path
    kdir: Path


@dataclass
class Verdict:
    """What came of one kernel. ``seconds`` is the build, the boot and the command.

    ``boots``: more than one where a kernel died before the command began.
    ``races_elsewhere``: what KCSAN says of the rest of the kernel, which fails nothing.
    """

    kernel: str
    logs: str
    built: bool = False
    boots: int = 0
    exit_code: int | None = None
    findings: list[str] = field(default_factory=list)
    races_elsewhere: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether everything went well."""
        return self.built and self.exit_code == 0 and not self.findings and self.error is None


def installed_kernels(boot: Path = BOOT, modules: Path = MODULES) -> list[str]:
    """Return the versions that have an image, modules and a build tree, in no order."""
    names = (path.name.removeprefix("vmlinuz-") for path in boot.glob("vmlinuz-*"))
    return [
        name
        for name in names
        if (modules / name / "modules.dep").exists() and (modules / name / "build").exists()
    ]


def newest(installed: Iterable[str], series: str) -> str | None:
    """Return the newest kernel of a series: "6.1", without cloud, rt and debug, or "6.1-rt"."""
    number, dash, flavour = series.partition("-")
    whole = rf"{re.escape(number)}\.\d+(?:\+[a-z]+\d*)?(?:-\d+)?{dash}{re.escape(flavour)}-amd64"
    fitting = [name for name in installed if re.fullmatch(whole, name)]
    return max(fitting, key=lambda n: [int(d) for d in re.findall(r"\d+", n)], default=None)


def choose(wanted: Iterable[str], installed: list[str]) -> list[str]:
    """Return one version for each that is wanted: a full version, or a series for its newest.

    A ``click.ClickException`` says what is not installed.
    """
    chosen = []
    for want in wanted:
        version = want if want in installed else newest(installed, want)
        if version is None:
            raise click.ClickException(
                f"no kernel {want} is installed with image, modules and headers in {BOOT} and "
                f"{MODULES}; tools/install-kernel-packages.sh installs those that are needed"
            )
        chosen.append(version)
    return chosen


def build_warnings(output: str) -> list[str]:
    """Return the lines of a build's output that warn."""
    lines = output.splitlines()
    return [line for line in lines if _WARNING.search(line) and _OTHER_COMPILER not in line]


def sync(source: Path, target: Path) -> None:
    """Make the sources below ``target`` those below ``source``; what make built there stays.

    A file that has not changed keeps its modification time, so that make builds it no more.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in source.iterdir() if not _BUILT.match(path.name)}
    for path in target.iterdir():
        same_kind = path.name in names and path.is_dir() == (source / path.name).is_dir()
        if not same_kind and not _BUILT.match(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in names:
        path, copy = source / name, target / name
        if path.is_dir():
            sync(path, copy)
        elif not copy.exists() or not filecmp.cmp(path, copy, shallow=False):
            shutil.copyfile(path, copy)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for others that build there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(kernel: Kernel, log: Path) -> Path:
    """Build the modules for a kernel; return the directory. ``click.ClickException``: it failed."""
    tree = ROOT / "build" / "kernel" / kernel.version
    with locked(tree.parent / f"{kernel.version}.lock"):
        return build_in(tree, kernel, log)


def make(*arguments: str, tree: Path, log: Path) -> None:
    """Run make, add what it says to the log, and leave nothing of ``tree`` where it complains."""
    made = subprocess.run(
        [_MAKE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        # "warning:" in other languages is another word; a make above us has jobs of its own.
        env=os.environ | {"LC_ALL": "C", "MAKEFLAGS": ""},
    )
    with log.open("a") as written:
        written.write(made.stdout)
    warnings = build_warnings(made.stdout)
    if made.returncode or warnings:
        # Make would not compile again what it has warned of, and the next run would be silent.
        shutil.rmtree(tree)
        lines = warnings or made.stdout.splitlines()[-20:]
        raise click.ClickException("\n".join([f"the build failed, see {log}:", *lines]))


def build_in(tree: Path, kernel: Kernel, log: Path) -> Path:
    """As build(), in this directory."""
    for source in SOURCES:
        if (ROOT / source).is_dir():
            sync(ROOT / source, tree / source)
        else:
            shutil.rmtree(tree / source, ignore_errors=True)
    make("-C", f"{tree}/kernel_module", f"KDIR={kernel.kdir}", "all", tree=tree, log=log)
    if (ROOT / PROGRAMS).is_dir():
        make("-C", f"{ROOT}/{PROGRAMS}", f"BUILD={tree}/{PROGRAMS}", tree=tree, log=log)
    index(kernel, tree)
    return tree


def index(kernel: Kernel, tree: Path) -> None:
    """Prepare in ``tree``/root what modprobe needs to find the built modules by name.

    Here and not in the guest, where depmod takes its time over 4000 modules.
    """
    modules = tree / "root" / MODULES.relative_to("/") / kernel.version
    built = [path for source in SOURCES for path in sorted((tree / source).rglob("*.ko"))]
    updates = modules / "updates"
    last = modules / "modules.dep"
    if (
        last.exists()
        and {path.name for path in updates.iterdir()} == {path.name for path in built}
        and all(path.stat().st_mtime < last.stat().st_mtime for path in built)
    ):
        return
    shutil.rmtree(modules, ignore_errors=True)
    updates.mkdir(parents=True)
    for path in built:
        shutil.copyfile(path, updates / path.name)
    own = MODULES / kernel.version
    if (own / "kernel").is_dir():
        (modules / "kernel").symlink_to(own / "kernel")
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        found = next((d / name for d in (own, kernel.kdir) if (d / name).exists()), None)
        if found:
            shutil.copyfile(found, modules / name)
    subprocess.run(["/sbin/depmod", "-b", str(tree / "root"), kernel.version], check=True)


def compile_python() -> None:
    """Write the byte code that the guest cannot write, and compiles slowly; what fails shows there.

    Of the tests twice: pytest has its own, which it writes when it collects.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["KUCOMMS_MODULES"] = "collected only"
    quiet = ("-m", "compileall", "-q", "kucomms", "tests", "examples", "tools")
    collect = ("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/kernel")
    for arguments in (quiet, collect):
        subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )


def guest_script(kernel: Kernel, tree: Path, out: Path, command: Iterable[str]) -> str:
    """Return the shell script that runs as root in the guest; its last act is ``out``/status."""
    environment = {k: v for k, v in os.environ.items() if _PASSED_ON.match(k)} | {
        "PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": _SCRATCH,
        "TMPDIR": _SCRATCH,
        "KUCOMMS_KERNEL": kernel.version,
        "KUCOMMS_MODULES": str(tree),
        "HYPOTHESIS_STORAGE_DIRECTORY": f"{_SCRATCH}/hypothesis",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    addopts = environment.get("PYTEST_ADDOPTS", "")
    environment["PYTEST_ADDOPTS"] = f"-p no:cacheprovider {addopts}".strip()
    settings = " ".join(shlex.quote(f"{k}={v}") for k, v in sorted(environment.items()))
    modules = MODULES / kernel.version
    cached = " ".join(shlex.quote(str(path)) for path in _STARTED_FROM if path.is_dir())
    prepared = shlex.quote(f"{tree}/root{modules}")
    return f"""
exec 2>&1
mount_missing() {{ mountpoint -q "$2" || {{ mkdir -p "$2"; mount -t "$1" "$1" "$2"; }}; }}
mount_missing tmpfs /dev/shm
mount_missing tmpfs /tmp
mount_missing debugfs /sys/kernel/debug
mount_missing tracefs /sys/kernel/tracing
mkdir -p {_SCRATCH} /run/{_CACHED}
if mount -t 9p -o ro,{_SHARED} {_CACHED} /run/{_CACHED}; then
	for directory in {cached}; do mount --bind /run/{_CACHED}$directory $directory; done
fi
# A link to a build tree, from virtme-ng, or the host's directory below a writable overlay.
if [ -L {modules} ]; then rm {modules}; fi
mkdir -p {modules}
cp -r --no-dereference {prepared}/updates {prepared}/modules.* {modules}/
cd {shlex.quote(str(ROOT))}
leaks=/sys/kernel/debug/kmemleak
if [ -e $leaks ]; then echo clear >$leaks; fi
echo {shlex.quote(MARKER)} >/dev/kmsg
env -i {settings} {shlex.join(command)} </dev/null
status=$?
if [ -e $leaks ]; then
	# What a module that is still there points to would be no leak.
	for module in $(sed -n 's/^\\(kucomms[a-z_]*\\) .*/\\1/p' /proc/modules); do rmmod $module; done
	sleep 6  # kmemleak passes over what is younger than 5 s
	echo scan >$leaks  # takes checksums; a leak is what has the same one in the next scan
	echo scan >$leaks || {{ echo "kmemleak does not scan"; status=70; }}
	cat $leaks >{shlex.quote(str(out))}/kmemleak.log
fi
echo $status >{shlex.quote(str(out))}/status
"""


def copy_stream(stream: IO[bytes], *targets: IO[bytes]) -> None:
    """Copy to all targets as it comes, until the end. Closes nothing."""
    while chunk := os.read(stream.fileno(), 65536):
        for target in targets:
            target.write(chunk)
            target.flush()


def has_kvm() -> bool:
    """Whether hardware virtualisation works; /dev/kvm is there on machines where it hangs."""
    flags = re.search(r"^flags.*\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return flags is not None and os.access("/dev/kvm", os.R_OK | os.W_OK)


def boot(
    kernel: Kernel,
    script: Path,
    out: Path,
    show: IO[bytes],
    *,
    cpus: int,
    memory: str,
    timeout: float,
) -> str | None:
    """Boot, run the script, and wait for power-off. The console goes to ``out``/dmesg.log.

    The command's output goes to ``show`` as it comes, and to ``out``/output.log. Returns what
    went wrong with the guest, if anything did. Leaves no process behind, even when interrupted.
    """
    command = [str(BIN / "vng"), "--verbose", "--run", str(kernel.vmlinuz), "--force-9p"]
    command += ["--cpus", str(cpus), "--memory", memory]
    # The guest has a /tmp of its own: a repository there has to be brought in whole.
    in_tmp = ROOT.is_relative_to("/tmp")  # noqa: S108
    command += ["--rwdir", str(ROOT if in_tmp else out)]
    command += ["--rodir", f"/usr/lib/udev/rules.d={ROOT / 'tools/guest-udev'}"]
    command += [] if has_kvm() else ["--disable-kvm"]
    export = "readonly=on,security_model=none,multidevs=remap"
    command += [f"--qemu-opts=-virtfs local,path=/,mount_tag={_CACHED},{export}"]
    for option in _BOOT_OPTIONS:
        command += ["--append", option]
    command += ["--exec", f"sh {shlex.quote(str(script))}"]
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="kucomms-guest-"))
        # vng finds its own parts by PATH, and leaves files in TMPDIR when it is killed.
        environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "TMPDIR": scratch}
        # Standard error carries the console alone: the script sends both of its own to output.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout
        assert process.stderr
        output = stack.enter_context((out / "output.log").open("wb"))
        console = stack.enter_context((out / "dmesg.log").open("wb"))
        readers = [
            threading.Thread(target=copy_stream, args=(process.stdout, output, show)),
            threading.Thread(target=copy_stream, args=(process.stderr, console)),
        ]
        for reader in readers:
            reader.start()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"the guest had not ended after {timeout:g} s"
        finally:
            # The group is qemu too, whoever of it is left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for reader in readers:
                reader.join()
            process.stdout.close()
            process.stderr.close()
    return None


def run(kernel: Kernel, command: Iterable[str], logs: Path, show: IO[bytes], **how: Any) -> Verdict:
    """Build for a kernel, boot it, run the command, and judge the log."""
    started = time.monotonic()
    out = logs.resolve() / kernel.version
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    verdict = Verdict(kernel.version, str(out))
    try:
        tree = build(kernel, out / "build.log")
        verdict.built = True
        script = out / "run.sh"
        script.write_text(guest_script(kernel, tree, out, command))
        began = False
        while not began and verdict.error is None and verdict.boots < _BOOTS:
            if verdict.boots:
                (out / "dmesg.log").rename(out / f"dmesg-{verdict.boots}.log")
            verdict.boots += 1
            verdict.error = boot(kernel, script, out, show, **how)
            log = (out / "dmesg.log").read_text(errors="replace")
            began = bool(after_marker(log)[1])
        verdict.findings = findings_after_marker(log)
        verdict.races_elsewhere = races_elsewhere(after_marker(log)[1])
        status = out / "status"
        if status.exists():
            verdict.exit_code = int(status.read_text())
        elif verdict.error is None:
            tail = "\n".join(log.splitlines()[-20:])
            verdict.error = f"the guest died before the command ended; its last words:\n{tail}"
    except click.ClickException as failure:
        verdict.error = failure.message
    verdict.seconds = round(time.monotonic() - started, 1)
    return verdict


def report(verdicts: list[Verdict], console: Console) -> None:
    """Print what was found, and a row for each kernel."""
    columns = ("kernel", "built", "boots", "exit code", "log findings", "races elsewhere")
    table = Table(*columns, "seconds", "verdict")
    for v in verdicts:
        for line in ([v.error] if v.error else []) + v.findings:
            console.print(f"[red]{escape(v.kernel)}:[/] {escape(line)}", soft_wrap=True)
        exit_code = "-" if v.exit_code is None else str(v.exit_code)
        counts = (len(v.findings), len(v.races_elsewhere), f"{v.seconds:.1f}")
        verdict = "[green]ok[/]" if v.ok else "[red]failed[/]"
        row = ("yes" if v.built else "no", v.boots, exit_code, *counts)
        table.add_row(v.kernel, *map(str, row), verdict)
    console.print(table)
    console.print(f"logs: {' '.join(v.logs for v in verdicts)}", soft_wrap=True, highlight=False)


@click.command(
    help=f"""Build the modules, boot kernels, and run COMMAND in each as root.

    Without --kernel: the newest {SERIES[0]} and the newest {SERIES[1]} that are installed. Without
    COMMAND: {" ".join(DEFAULT_COMMAND)}.

    \b
    Example:
        python tools/guest.py --kernel 6.12 -- python -m pytest tests/kernel -k load

    Exit code 0: all well; 1: something failed; 130: interrupted.
    """
)
@click.option("--kernel", "wanted", multiple=True, metavar="VERSION", help="Version or series.")
@click.option("--vmlinuz", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--kdir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --vmlinuz: a kernel of one's own, and its build tree.",
)
@click.option(
    "--log-dir", "logs", type=click.Path(path_type=Path), default="build/guest", show_default=True
)
@click.option("--cpus", type=click.IntRange(1), default=2, show_default=True)
@click.option("--memory", default="2G", show_default=True)
@click.option("--timeout", default=1800.0, show_default=True, help="Seconds for each guest.")
@click.option("--keep-going", is_flag=True, help="Go on with the next kernel after a failure.")
@click.option("--json", "as_json", is_flag=True, help="The verdict on stdout; the rest on stderr.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def main(
    wanted: tuple[str, ...],
    vmlinuz: Path | None,
    kdir: Path | None,
    logs: Path,
    *,
    keep_going: bool,
    as_json: bool,
    command: tuple[str, ...],
    **how: Any,
) -> None:
    """See the help above."""
    if (vmlinuz is None) != (kdir is None) or (vmlinuz and wanted):
        raise click.UsageError("--vmlinuz and --kdir go together, and without --kernel")
    if vmlinuz and kdir:
        release = kdir / "include/config/kernel.release"
        if not release.exists():
            raise click.ClickException(f"{release} is not there: is the kernel built?")
        kernels = [Kernel(release.read_text().strip(), vmlinuz.resolve(), kdir.resolve())]
    else:
        kernels = [
            Kernel(version, BOOT / f"vmlinuz-{version}", MODULES / version / "build")
            for version in choose(wanted or SERIES, installed_kernels())
        ]
    if shutil.which("qemu-system-x86_64") is None:
        raise click.ClickException("there is no qemu: run tools/install-kernel-packages.sh")
    # Ending with a signal is the same as control-C: no guest is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(stderr=as_json)
    compile_python()
    verdicts = []
    show = sys.stderr.buffer if as_json else sys.stdout.buffer
    try:
        for kernel in kernels:
            console.rule(kernel.version)
            verdicts.append(run(kernel, command or DEFAULT_COMMAND, logs, show, **how))
            if not verdicts[-1].ok and not keep_going:
                break
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(130)
    ok = all(v.ok for v in verdicts)
    report(verdicts, console)
    if as_json:
        kernels_json = [asdict(v) | {"ok": v.ok} for v in verdicts]
        print(json.dumps({"ok": ok, "kernels": kernels_json}, indent=2))
    sys.exit(not ok)


if __name__ == "__main__":
    main()
