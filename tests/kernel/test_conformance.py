# SPDX-License-Identifier: MIT
"""Every check of the conformance suite, on every loop, with the kernel between the two ends."""

import asyncio

import pytest

import kucomms
from kucomms import testing
from kucomms.testing import CHECKS
from tests.kernel.joined import KernelJoin, fill


@pytest.fixture(scope="module", autouse=True)
def joined(load, unload):
    load("kucomms")
    load("kucomms_join", "names=")
    yield
    unload("kucomms_join")
    unload("kucomms")


@pytest.fixture(autouse=True)
def full_means_full(monkeypatch):
    monkeypatch.setattr(testing, "_fill", fill)


async def bursts_ring_at_most_once_each(harness):
    async with harness.link() as link:
        before = link.statistics()
        for number in range(300):
            link.send_nowait(b"burst", type=testing.SINK, id=number)
        after = link.statistics()
        rung = after.doorbells_rung - before.doorbells_rung
        assert after.doorbells_suppressed - before.doorbells_suppressed == 300 - rung
        assert (await testing.report(link)).count == 300


INSTEAD = {
    # The suite stops the peer's process for it. Here the peer is a thread of the kernel, which
    # nothing stops: it drains the burst, parks, and is rung for again, rightly.
    "check_burst_rings_once": bursts_ring_at_most_once_each,
}
"""What is asserted instead of a check that cannot hold through a pair of channels."""


@pytest.mark.asyncio
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check):
    with KernelJoin() as harness:
        await INSTEAD.get(check.__name__, check)(harness)


@pytest.mark.asyncio
async def test_the_hello_of_each_side_and_a_limit_of_links():
    """What the suite's harness does not pass on; so the pair itself is right."""
    with KernelJoin() as harness:
        url = harness.new_url()
        async with kucomms.Endpoint("listens") as endpoint:
            opened = asyncio.Queue()
            endpoint.on_link_open(opened.put_nowait)
            listener = await endpoint.listen(url, max_links=1)
            async with kucomms.connect(url, hello=b"it is me", timeout=60) as link:
                accepted = await asyncio.wait_for(opened.get(), 60)
                assert accepted.peer.hello == b"it is me"
                assert accepted.peer.kernel
                assert link.peer.kernel
                async with kucomms.connect(url, timeout=60) as surplus:
                    with pytest.raises(kucomms.PeerClosedError):
                        await surplus.receive()
            await listener.aclose()
