# SPDX-License-Identifier: MIT
from collections.abc import Callable, Sequence
from typing import Any

OK: int
FULL: int
EMPTY: int
TOO_LARGE: int
CLOSED: int
PROTOCOL: int
WRONG_THREAD: int
FORKED: int
TOO_MANY_LOANS: int
FLAG_REPLY: int
STATE_OPEN: int
STATE_CLOSED: int
STATE_SHUTDOWN: int
HEADER_SIZE: int

def configure(message_type: type, /) -> None: ...
def ring_socket(fd: int, /) -> int: ...
def drain_socket(fd: int, /) -> int: ...

class Reservation:
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def commit(self) -> int: ...
    def discard(self) -> bool: ...

class Borrow:
    type: int
    id: int
    user_value: int
    flags: int
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def release(self) -> bool: ...

class Channel:
    peer_state: int
    peer_starves: bool
    tx_avail: int
    tx_free: int
    rx_avail: int
    address: int
    ring_size: int
    forked: bool
    def __new__(cls, address: int, /) -> Channel: ...
    def attach(self, doorbell: Callable[[], object], /) -> None: ...
    def on_room(self, callback: Callable[[], object], /) -> None: ...
    def send(
        self,
        data: Any,
        type: int | None,
        id: int | None,
        user_value: int | None,
        flags: int,
        /,
    ) -> int: ...
    def send_threadsafe(
        self,
        data: Any,
        type: int | None,
        id: int | None,
        user_value: int | None,
        flags: int,
        /,
    ) -> int: ...
    def send_many(self, messages: Sequence[Any], start: int, /) -> tuple[int, int]: ...
    def reserve(
        self, size: int, type: int | None, id: int | None, user_value: int | None, /
    ) -> Reservation | int: ...
    def receive(
        self, limit: int, budget: int, messages: list[Any], replies: list[Any], /
    ) -> int: ...
    def borrow(self) -> Borrow | int: ...
    def park_receive(self) -> bool: ...
    def park_send(self, size: int, /) -> bool: ...
    def unpark_send(self) -> None: ...
    def stop_sending(self, state: int, /) -> None: ...
    def finish(self) -> None: ...
    def unmap(self) -> None: ...
    def counters(self) -> tuple[int, ...]: ...
