# SPDX-License-Identifier: MIT
"""A Responder in a process of its own, until its standard input ends."""

import asyncio
import json
import sys

import uvloop

from tests.transports.harnesses import responding


async def main(url: str, options: dict) -> None:
    async with responding(url, options):
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    factory = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}[sys.argv[2]]
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(sys.argv[1], json.loads(sys.argv[3])))
