# SPDX-License-Identifier: MIT
"""iceoryx2, publish-subscribe of byte slices; polling, and with events and a WaitSet.

No safe overflow, and the publisher retries until delivered, so nothing is lost. The
sender copies into the loan, the receiver copies out of the sample, as all others do. It
has no form for asyncio.

A publisher does not wait for a subscriber that has not received anything yet, whatever
the strategy says, so there is a first message before those that count.
"""

import ctypes
import time

from bench.contestants.base import Contestant
from bench.messages import queue_length


class _Side:
    """A node with one service to write to and one to read from."""

    def __init__(self, meeting, size, out, back):
        import iceoryx2

        self._iox = iceoryx2
        iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
        self.node = iceoryx2.NodeBuilder.new().create(iceoryx2.ServiceType.Ipc)
        self._prefix = meeting.name
        self._size = size
        self.publisher = self.subscriber = self.notifier = self.waitset = None
        if out:
            service = self._service(out)
            self.publisher = (
                service.publisher_builder()
                .initial_max_slice_len(size)
                .backpressure_strategy(iceoryx2.BackpressureStrategy.RetryUntilDelivered)
                .create()
            )
            self.notifier = self._event(out).notifier_builder().create()
        if back:
            self.subscriber = self._service(back).subscriber_builder().create()
            self.listener = self._event(back).listener_builder().create()
            self.waitset = iceoryx2.WaitSetBuilder.new().create(iceoryx2.ServiceType.Ipc)
            self._guard = self.waitset.attach_notification(self.listener)

    def _service(self, name):
        length = min(1024, queue_length(self._size))
        return (
            self.node.service_builder(self._iox.ServiceName.new(f"{self._prefix}/{name}"))
            .publish_subscribe(self._iox.Slice[ctypes.c_uint8])
            .enable_safe_overflow(False)
            .history_size(0)
            .subscriber_max_buffer_size(length)
            .max_publishers(1)
            .max_subscribers(1)
            .open_or_create()
        )

    def _event(self, name):
        name = self._iox.ServiceName.new(f"{self._prefix}/{name}")
        return self.node.service_builder(name).event().open_or_create()

    def send(self, data):
        """Copy into a loan and publish it."""
        size = len(data)
        sample = self.publisher.loan_slice_uninit(size)
        ctypes.memmove(sample.payload_ptr, data, size)
        sample.assume_init().send()

    def try_receive(self):
        """A copy of the next message, or None."""
        sample = self.subscriber.receive()
        if sample is None:
            return None
        payload = sample.payload()
        data = ctypes.string_at(payload.as_ptr(), payload.len())
        sample.delete()
        return data

    def receive(self):
        """Poll for the next message."""
        while True:
            data = self.try_receive()
            if data is not None:
                return data

    def wait(self):
        """Sleep until the other side has notified, and clear that."""
        self.waitset.wait_and_process()
        while self.listener.try_wait():
            pass

    def receive_sleeping(self):
        """The next message; sleeps in the WaitSet while there is none."""
        while True:
            data = self.try_receive()
            if data is not None:
                return data
            self.wait()


class Polling(Contestant):
    """The receiver asks over and over."""

    name = "iceoryx2 polling"
    package = "iceoryx2"
    echo_modes = ("busy",)
    events = False

    def send(self, meeting, _end, sending):
        """See the base."""
        meeting.wait_ready()
        side = _Side(meeting, sending.runs[0].size, "there", None)
        side.send(b"x")
        meeting.linked.wait()
        send, notify = side.send, side.notifier.notify
        for run in sending:
            for data in run.messages():
                send(data)
                if self.events:
                    notify()
        meeting.wait_finished()

    def receive(self, meeting, _end, receiving):
        """See the base."""
        side = _Side(meeting, receiving.size, None, "there")
        meeting.ready.set()
        side.receive()
        meeting.linked.set()
        receive = side.receive_sleeping if self.events else side.receive
        take = receiving.take
        for _ in range(receiving.total):
            take(receive())

    def ping(self, meeting, _end, trips):
        """See the base."""
        meeting.wait_ready()
        side = _Side(meeting, len(trips.data), "there", "back")
        receive = side.receive_sleeping if self.events else side.receive
        for _ in trips.times():
            if trips.pause:
                time.sleep(trips.pause)
            begin = time.perf_counter_ns()
            side.send(trips.data)
            if self.events:
                side.notifier.notify()
            trips.add(begin, receive())

    def pong(self, meeting, _end, trips):
        """See the base."""
        side = _Side(meeting, len(trips.data), "back", "there")
        meeting.ready.set()
        receive = side.receive_sleeping if self.events else side.receive
        for _ in trips.times():
            side.send(receive())
            if self.events:
                side.notifier.notify()
        meeting.wait_finished()


class Events(Polling):
    """Each message is followed by a notification; the receiver sleeps in a WaitSet."""

    name = "iceoryx2 events"
    echo_modes = ("parked", "busy")
    events = True


CONTESTANTS = [Polling(), Events()]
