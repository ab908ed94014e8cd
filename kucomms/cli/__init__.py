# SPDX-License-Identifier: MIT
"""The ``kucomms`` command: a group of commands, one module for each.

Exit codes: 0 it worked, 1 it did not (one line ``error: ...`` on stderr says why), 2 the
command line was wrong, 130 ended by control-C. The commands that serve until they are
told to stop (echo, listen, longtest) end in order at control-C, with their usual code.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import click

from kucomms import KucommsError, __version__, _log
from kucomms.cli import bench, device, doctor, echo, listen, longtest, send

__all__ = ["main"]

INTERRUPTED = 130  # what a shell gives a command that SIGINT ended


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kucomms")
def group() -> None:
    r"""Message endpoints over in-process, shared and kernel memory.

    A URL says where the other side is: shm://NAME is another process of this machine,
    kernel://NAME an endpoint in a kernel module.
    Try, in two terminals:

    \b
        kucomms longtest --listen shm://lab
        kucomms longtest shm://lab --seconds 10
    """


for module in (bench, device, doctor, echo, listen, longtest, send):
    group.add_command(module.command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        # Standard output is for what was asked for; the log of the library is not.
        _log.to_stderr = True
        code = group.main(arguments, prog_name="kucomms", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone, as in "| head". Nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KucommsError, OSError) as error:
        click.echo(f"error: {_one_line(error)}", err=True)
        return 1
    return code if isinstance(code, int) else 0


def _one_line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
