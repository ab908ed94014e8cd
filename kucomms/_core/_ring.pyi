# SPDX-License-Identifier: MIT
from collections.abc import Callable, Sequence, Sized
from typing import Any

from kucomms.message import Message

OK: int
FULL: int
EMPTY: int
TOO_LARGE: int
CLOSED: int
PROTOCOL: int
WRONG_THREAD: int
FORKED: int
TOO_MANY_LOANS: int
PAUSE: int
MORE: int
OUT_OF_TURN: int
NO_TOKEN: int
FLAG_REPLY: int
FLAG_TOKEN: int
FLAG_NOTICE: int
KIND_BUFFER: int
KIND_POOL: int
CARRIED_MAX: int
POOLS_MAX: int
STATE_OPEN: int
STATE_CLOSED: int
STATE_SHUTDOWN: int
HEADER_SIZE: int

def configure(message_type: type, token_type: type, coroutine_type: type, /) -> None: ...
def ring_socket(fd: int, /) -> int: ...
def ring_device(fd: int, /) -> int: ...
def drain_socket(fd: int, /) -> int: ...
def drain_eventfd(fd: int, /) -> int: ...
def poll(channels: list[Channel], nanoseconds: int, /) -> int: ...

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
    def release(self, lazily: bool = False, /) -> bool: ...

class Channel:
    may_receive: int
    peer_state: int
    peer_starves: bool
    turns: bool
    has_turn: bool
    loans: int
    owing: bool
    calls: int
    polls_hit: int
    poll_ns: int
    tx_avail: int
    tx_free: int
    rx_position: int
    rx_avail: int
    address: int
    ring_size: int
    forked: bool
    def __new__(cls, address: int, /) -> Channel: ...
    def attach(self, doorbell: Callable[[], object] | int, /) -> None: ...
    def mute(self) -> None: ...
    def expect(self, requests: dict[int, Any], /) -> None: ...
    def hold_turn(self) -> None: ...
    def take_turn(self) -> None: ...
    def on_room(self, callback: Callable[[], object], /) -> None: ...
    def send(
        self, data: Any, type: int | None, id: int | None, user_value: int | None, /
    ) -> int: ...
    def send_paced(
        self, data: Any, type: int | None, id: int | None, user_value: int | None, /
    ) -> int: ...
    def send_reply(
        self, data: Any, type: int | None, id: int | None, user_value: int | None, /
    ) -> int: ...
    def send_threadsafe(
        self, data: Any, type: int | None, id: int | None, user_value: int | None, /
    ) -> int: ...
    def on_frame(
        self, callback: Callable[[int, int, int, bytes, int, int, int], Message | bool | None], /
    ) -> None: ...
    def send_front(
        self,
        data: Any,
        type: int | None,
        id: int | None,
        user_value: int | None,
        front: bytes,
        kind: int,
        flags: int,
        /,
    ) -> int: ...
    def send_many(self, messages: Sequence[Any], start: int, /) -> tuple[int, int]: ...
    def reserve(
        self, size: int, type: int | None, id: int | None, user_value: int | None, /
    ) -> Reservation | int: ...
    def receive(
        self,
        limit: int,
        budget: int,
        messages: list[Any],
        replies: list[Any],
        first: bool,
        /,
    ) -> int: ...
    def serve(
        self,
        handler: Callable[..., Any],
        link: Any,
        messages: list[Any],
        replies: list[Any],
        limit: int,
        budget: int,
        deadline: float,
        poll: int,
        poll_until: float,
        others: Sized,
        events: Sized,
        inbox: Sized,
        /,
    ) -> int | tuple[Any, Any]: ...
    def wake_producer(self) -> None: ...
    def borrow(self) -> Borrow | Message | int: ...
    def park_receive(self) -> bool: ...
    def park_send(self, size: int, /) -> bool: ...
    def unpark_send(self) -> None: ...
    def stop_sending(self, state: int, /) -> None: ...
    def finish(self) -> None: ...
    def unmap(self) -> None: ...
    def counters(self) -> tuple[int, ...]: ...
