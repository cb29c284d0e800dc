"""Endpoints and flows as text, and the errors of text that is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.endpoint import (
    Endpoint,
    FiveTuple,
    FlowKey,
    Proto,
    Source,
    flow_key,
    key_addrs,
    key_dst,
    key_dst_end,
    key_ports,
    key_src,
    key_src_end,
    reverse_key,
    with_dst,
)
from tests.tools.strategies import addresses, endpoints, flows


@given(addresses, st.integers(0, 0xFFFF))
def test_an_endpoint_is_read_as_it_is_written(addr: bytes, port: int) -> None:
    endpoint = Endpoint(addr, port)

    assert Endpoint.parse(str(endpoint)) == endpoint
    assert Endpoint.of(endpoint.host, port) == endpoint
    assert str(endpoint) == ".".join(map(str, addr)) + f":{port}"


def test_an_address_of_another_family_has_its_own_text() -> None:
    assert Endpoint(bytes(15) + b"\1", 80).host == "::1"


@given(endpoints)
def test_on_the_wire_the_address_comes_first(endpoint: Endpoint) -> None:
    assert endpoint.wire == endpoint.addr + bytes((endpoint.port >> 8, endpoint.port & 0xFF))


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "10.0.0.1",
        "10.0.0.1:",
        ":80",
        "10.0.0.1:65536",
        "10.0.0.1:-1",
        "10.0.0.1:+1",
        "10.0.0.1: 80",
        "10.0.0.1:8_0",
        "10.0.0.1:٨٠",
        "10.0.0.256:80",
        "10.0.0:80",
        "10.0.0.01:80",
        "relay:80",
        "10.0.0.1:80:80",
        "10.0.0.1:" + "9" * 5000,
    ],
)
def test_other_text_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Endpoint.parse(text)


@given(st.text())
def test_any_text_is_an_endpoint_or_a_value_error(text: str) -> None:
    try:
        endpoint: Endpoint | None = Endpoint.parse(text)
    except ValueError:
        endpoint = None

    assert endpoint is None or 0 <= endpoint.port <= 0xFFFF


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_an_error_that_names_the_range(port: int) -> None:
    with pytest.raises(ValueError, match="0-65535"):
        Endpoint.of("10.0.0.1", port)


@given(flows())
def test_the_reply_to_a_reply_is_the_flow(flow: FiveTuple) -> None:
    reply = flow.reply()

    assert (reply.proto, reply.src, reply.dst) == (flow.proto, flow.dst, flow.src)
    assert reply.reply() == flow


def test_a_flow_reads_as_people_write_it() -> None:
    client, service = Endpoint.parse("10.0.0.1:4000"), Endpoint.parse("192.168.0.2:53")

    assert str(FiveTuple(Proto.UDP, client, service)) == "udp 10.0.0.1:4000 > 192.168.0.2:53"


def test_protocols_and_sources_are_the_words_of_the_contract() -> None:
    assert {str(proto): int(proto) for proto in Proto} == {"tcp": 6, "udp": 17}
    assert set(Source) == {"client", "relay"}


ports = st.integers(0, 0xFFFF)
either_family = st.sampled_from((4, 16)).flatmap(
    lambda size: st.tuples(
        *[st.builds(Endpoint, st.binary(min_size=size, max_size=size), ports)] * 3
    )
)


@given(either_family)
def test_a_flow_key_of_either_family_is_read_as_it_is_written(
    ends: tuple[Endpoint, Endpoint, Endpoint],
) -> None:
    src, dst, other = ends
    key = flow_key(src, dst)

    assert key == src.addr + dst.addr + src.wire[-2:] + dst.wire[-2:]
    assert FlowKey.unpack(key) == FlowKey(src, dst)
    assert FlowKey(src, dst).pack() == key
    assert reverse_key(key) == flow_key(dst, src) == FlowKey(src, dst).reverse().pack()
    assert (key_src(key), key_dst(key)) == (src.addr, dst.addr)
    assert (key_src_end(key), key_dst_end(key)) == (src, dst)
    assert key_addrs(key) + key_ports(key) == key
    assert with_dst(key, other.addr) == flow_key(src, Endpoint(other.addr, dst.port))
