# SPDX-License-Identifier: MIT
"""The ring in C, measured by the program in bench/core, which prints a JSON line for each."""

import json
import subprocess
from pathlib import Path

from bench.pair import SessionError
from bench.plan import Job, Sample

PROGRAM = Path(__file__).resolve().parent.parent / "core" / "core-bench"
LIMIT = 300


QUICK = (
    "ping-pong 96 B", "memcpy 65536 B through shared memory", "kucomms round trip 64 B",
    "kucomms one way 64 B",
)


class Core(Job):
    """All of its measurements, or a few in short; each line becomes a result."""

    def __init__(self, quick):
        super().__init__("core", "core-bench", None, ours=True)
        self.options = ["--seconds", "0.1" if quick else "0.25"]
        if quick:
            for name in QUICK:
                self.options += ["--only", name]

    def sample(self):
        """Run it once."""
        try:
            done = subprocess.run(
                [str(PROGRAM), *self.options],
                capture_output=True, text=True, timeout=LIMIT, check=True,
            )
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        except subprocess.CalledProcessError as error:
            raise SessionError(f"core-bench failed: {error.stderr or error}") from None
        except subprocess.TimeoutExpired:
            raise SessionError(f"core-bench took more than {LIMIT} s") from None
        except ValueError as error:
            raise SessionError(f"core-bench printed what is not JSON: {error}") from None
        return [
            (line["name"], f"{line['size']} B" if line.get("size") else "", line["unit"],
             Sample(line["value"], line.get("cpu")))
            for line in lines
        ]


def jobs(options):
    """What it measures, if the program was built."""
    if not PROGRAM.exists():
        return [], ["core: left out, bench/core/core-bench is not there; make -C bench/core"]
    return [Core(options.quick)], []
