from ipaddress import ip_address

import pytest

from base.addresses import Allowed, is_public, literal

PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",  # noqa: S104
    "192.0.0.8",
    "198.18.0.1",
    "192.0.2.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "2001:db8::1",
    "fec0::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a01:203",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2002:a01:203::",
    "2001:0:0:0:0:0:f5fe:fdfc",
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]


@pytest.mark.parametrize("address", PRIVATE)
def test_is_public_is_false_of_what_only_this_network_reaches(address: str):
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_is_public_is_true_of_machines_of_the_internet(address: str):
    assert is_public(ip_address(address))


def test_allowed_reads_hosts_and_networks():
    allowed = Allowed.of("10.0.0.0/8, ::1,Hooks.Internal., 192.168.1.7 ,")
    assert allowed.names == {"hooks.internal"}
    assert allowed.allows_name("hooks.internal.") and not allowed.allows_name("other.internal")
    for address, expected in {
        "10.255.0.1": True, "::ffff:10.0.0.1": True, "11.0.0.1": False, "::1": True, "::2": False,
        "192.168.1.7": True, "192.168.1.8": False,
    }.items():  # fmt: skip
        assert allowed.allows_address(ip_address(address)) is expected, address
    assert Allowed.of("") == Allowed()


@pytest.mark.parametrize("text", ["10.0.0.0/33", "http://host", "a b", "host:80", "-x", "1.2.3.4/x"])
def test_allowed_refuses_what_is_neither(text: str):
    with pytest.raises(ValueError, match="neither a host name nor a network"):
        Allowed.of(text)


def test_literal_is_the_address_in_a_url_or_nothing():
    assert literal("[::1]") == ip_address("::1") and literal("127.0.0.1") == ip_address("127.0.0.1")
    assert literal("127.1") is literal("example.org") is None
