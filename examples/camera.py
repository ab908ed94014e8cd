# SPDX-License-Identifier: MIT
"""Frames of a kernel module as NumPy arrays, none of them copied.

    python camera.py                     until control-C
    python camera.py --frames 100 --hold 4

The module is examples/kernel/kucomms_camera.c, which says how to load it. Each message hands over
a buffer of the module's pool, with a frame in it; freed, it goes back there. ``--hold`` keeps so
many of the last frames: with all of the module's 16 there is none for the next one, and frames
are dropped.
"""

import argparse
import asyncio
import signal
import struct
from collections import deque
from contextlib import suppress

import numpy as np

import kucomms

INFO = struct.Struct("=IIQ")  # struct camera_info: width, height, when it was taken


def image_of(message: kucomms.Message) -> np.ndarray:
    """The frame, where it is. Nothing of it may live on when its buffer is freed."""
    width, height, _taken = INFO.unpack(message.data)
    return np.frombuffer(message.buffers[0].data, np.uint16).reshape(height, width)


def is_whole(message: kucomms.Message) -> bool:
    """Whether each pixel is what the module has written."""
    image = image_of(message)
    expected = np.arange(image.size, dtype=np.uint64) + np.uint64(message.id)
    return bool((image.ravel() == expected.astype(np.uint16)).all())


async def watch(url: str, most: int, hold: int) -> None:
    loop = asyncio.get_running_loop()
    held: deque[kucomms.Message] = deque()
    frames = torn = dropped = shown = 0
    begin = told = loop.time()
    with suppress(asyncio.CancelledError):
        async with kucomms.connect(url, timeout=5) as link:
            task = asyncio.current_task()
            assert task is not None
            loop.add_signal_handler(signal.SIGINT, task.cancel)
            async for message in link:
                frames += 1
                torn += not is_whole(message)
                dropped = message.user_value
                held.append(message)
                while len(held) > hold:
                    for buffer in held.popleft().buffers:
                        buffer.free()
                now = loop.time()
                if now - told >= 1:
                    rate = (frames - shown) / (now - told)
                    print(f"frame {message.id}: {rate:.1f} a second, {dropped} dropped")
                    told, shown = now, frames
                if frames == most:
                    break
            held.clear()  # who is not kept any more goes back by itself
    print(f"{frames} frames in {loop.time() - begin:.1f} s, {dropped} dropped, {torn} torn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("url", nargs="?", default="kernel://camera")
    parser.add_argument("--frames", type=int, default=0, help="end after so many; 0: never")
    parser.add_argument("--hold", type=int, default=0, help="frames to keep, the last ones")
    options = parser.parse_args()
    try:
        kucomms.run(watch(options.url, options.frames, options.hold))
    except kucomms.KucommsError as error:
        raise SystemExit(f"error: {error}") from None


main()
