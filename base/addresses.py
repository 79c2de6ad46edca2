"""Addresses of the network: which of them a server may call at the wish of a client.

A client names a URL, and the server calls it from where it stands: also a database beside it, or a cloud's metadata.
So only public addresses are called, and those that an operator allows.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Self

Address = IPv4Address | IPv6Address

HOST_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*\.?", re.IGNORECASE)
_NAT64 = IPv6Network("64:ff9b::/96")
_SPECIAL = (IPv4Network("192.0.0.0/24"), IPv6Network("fec0::/10"))
"""What some versions of Python call global: protocol assignments, and the former site-local addresses."""
_LOW_32 = 0xFFFF_FFFF


def is_public(address: Address) -> bool:
    """Return whether an address belongs to a machine of the internet.

    An IPv6 address that holds an IPv4 address (mapped, 6to4, Teredo, NAT64) is what that one is.
    """
    held = _held(address)
    if held is not None:
        return is_public(held)
    special = address.is_multicast or address.is_reserved or address.is_link_local or address.is_unspecified
    return address.is_global and not special and not any(address in network for network in _SPECIAL)


def _held(address: Address) -> IPv4Address | None:
    """Return the IPv4 address that an IPv6 address holds."""
    if isinstance(address, IPv4Address):
        return None
    if address in _NAT64:
        return IPv4Address(int(address) & _LOW_32)
    if address.teredo is not None:
        return address.teredo[1]
    return address.ipv4_mapped or address.sixtofour


@dataclass(frozen=True)
class Allowed:
    """The hosts and networks that an operator allows beside public addresses: `10.0.0.0/8, ::1, hooks.internal`."""

    names: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def of(cls, text: str) -> Self:
        """Read the entries, which commas separate. Raises ValueError for one that is neither a host nor a network."""
        names, networks = set(), list[IPv4Network | IPv6Network]()
        for entry in filter(None, (part.strip() for part in text.split(","))):
            try:
                networks.append(ip_network(entry, strict=False))
            except ValueError:
                if "/" in entry or not HOST_NAME.fullmatch(entry):
                    raise ValueError(f"{entry!r} is neither a host name nor a network such as 10.0.0.0/8") from None
                names.add(_plain(entry))
        return cls(frozenset(names), tuple(networks))

    def allows_name(self, host: str) -> bool:
        """Return whether whatever this host's name stands for is allowed."""
        return _plain(host) in self.names

    def allows_address(self, address: Address) -> bool:
        """Return whether an address is in an allowed network. A mapped one counts as what it stands for."""
        plain = (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
        return any(plain in network for network in self.networks)


def literal(host: str) -> Address | None:
    """Return the address that a host of a URL is; None if it is a name."""
    try:
        return ip_address(host.strip("[]"))
    except ValueError:
        return None


def _plain(host: str) -> str:
    return host.lower().rstrip(".")
