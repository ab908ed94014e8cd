# SPDX-License-Identifier: MIT
"""The transports, found by the scheme of a URL."""

from importlib import import_module
from typing import cast

from kucomms.exceptions import AddressError
from kucomms.transports.base import Address, Transport, unknown_scheme

__all__ = ["find"]

_BUILT_IN = {
    "inproc": "kucomms.transports.inproc",
    "kernel": "kucomms.transports.kernel",
    "shm": "kucomms.transports.shm",
}


def find(address: Address) -> Transport:
    """The transport for ``address``. Raises AddressError when there is none."""
    transport = _find(address)
    if address.channel is not None and not getattr(transport, "numbered", False):
        raise AddressError(
            f"{address.url!r}: {address.scheme}:// has no channels with numbers; leave out "
            f"'/{address.channel}'"
        )
    return transport


def _find(address: Address) -> Transport:
    if address.scheme in _BUILT_IN:
        return cast(Transport, import_module(_BUILT_IN[address.scheme]).transport)
    from importlib.metadata import entry_points  # a fifth of the time of importing kucomms

    others = {entry.name: entry for entry in entry_points(group="kucomms.transports")}
    if address.scheme not in others:
        raise unknown_scheme(address.url, [*_BUILT_IN, *others])
    return cast(Transport, others[address.scheme].load())
