# SPDX-License-Identifier: MIT
"""Every check of the conformance suite, for every transport, on every loop."""

import pytest

from kucomms.testing import CHECKS
from tests.transports.harnesses import HARNESSES


@pytest.mark.asyncio
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("transport", HARNESSES)
async def test_conformance(transport, check):
    await check(HARNESSES[transport]())
