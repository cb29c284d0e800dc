"""Texts of settings: what is taken, what is refused and with which words."""

from dataclasses import fields
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procfs_sim.tree import (
    DEFAULTS,
    SETTINGS,
    Config,
    Service,
    SettingRefused,
    conflicts,
    in_force,
    parse,
    render,
    services,
)

LIKE = "is not a service (like tcp/80, udp/53 or tcp/8000-8100)"

GOOD = [
    ("gport", "17000", "17000"),
    ("gport", " \t17000\r\n\n", "17000"),
    ("gport", "00080", "80"),
    ("gport", "1", "1"),
    ("gport", "65535", "65535"),
    ("real_ip", "10.1.2.3\n", "10.1.2.3"),
    ("real_ip", "169.254.1.1", "169.254.1.1"),
    ("start", "1\n", "1"),
    ("start", "0", "0"),
    ("services", "udp/53\ntcp/80\n", "udp/53 tcp/80"),
    ("services", "tcp/80 udp/53 tcp/80", "tcp/80 udp/53"),
    ("services", "tcp/8000-8100", "tcp/8000-8100"),
    ("services", "tcp/80-80", "tcp/80"),
    ("services", "tcp/80-90 udp/80-90 tcp/91", "tcp/80-90 udp/80-90 tcp/91"),
    ("services", "tcp/22!", "tcp/22!"),
    ("services", "tcp/20-25!", "tcp/20-25!"),
    ("services", "udp/069+any-port\nudp/53", "udp/69+any-port udp/53"),
    ("services", "udp/60-69+any-port tcp/69", "udp/60-69+any-port tcp/69"),
    ("services", "udp/69+any-port!", "udp/69+any-port!"),
    ("services", "udp/22", "udp/22"),
    ("services", "tcp/1-65535!", "tcp/1-65535!"),
    ("source", "relay\n", "relay"),
    ("source", "client", "client"),
    ("datapath", "queue\n", "queue"),
    ("datapath", " auto", "auto"),
    ("timeouts/udp", "1", "1"),
    ("timeouts/udp_dns", "604800", "604800"),
    ("limits/flows", "1000000", "1000000"),
    ("limits/new_flows_per_client", "0\n", "0"),
    ("limits/new_flows_per_client", "1000000", "1000000"),
    ("limits/refusal", "drop\n", "drop"),
    ("limits/refusal", "reset", "reset"),
]

NO_ADDRESS = "is not an IPv4 address"
FOUR_NUMBERS = "its four numbers are 0-255, without zeros in front"
NO_NAMES = "write the address of that name, names are not looked up"
BAD = [
    ("gport", "abc", "'abc' is not a port (1-65535)"),
    ("gport", "", "'' is not a port (1-65535)"),
    ("gport", "0", "'0' is not a port (1-65535)"),
    ("gport", "65536", "'65536' is not a port (1-65535)"),
    ("gport", "+5", "'+5' is not a port (1-65535)"),
    ("gport", "-5", "'-5' is not a port (1-65535)"),
    ("gport", "1_0", "'1_0' is not a port (1-65535)"),
    ("gport", "80 81", "'80 81' is not a port (1-65535)"),
    ("gport", "80\x00", "'80\\x00' is not a port (1-65535)"),
    ("gport", "\u0661\u0662", "'\u0661\u0662' is not a port (1-65535)"),
    ("gport", "\xa080", "'\\xa080' is not a port (1-65535)"),
    ("gport", "9" * 5000, f"'{'9' * 27}...{'9' * 28}' is not a port (1-65535)"),
    ("real_ip", "::1", f"'::1' {NO_ADDRESS}; write the server's IPv4 address, IPv6 is not relayed"),
    (
        "real_ip",
        "[::1]",
        f"'[::1]' {NO_ADDRESS}; write the server's IPv4 address, IPv6 is not relayed",
    ),
    (
        "real_ip",
        "10.0.0.1:80",
        f"'10.0.0.1:80' {NO_ADDRESS}; write 10.0.0.1, and the port in services",
    ),
    ("real_ip", "10.0.0.1/24", f"'10.0.0.1/24' {NO_ADDRESS}; write 10.0.0.1"),
    ("real_ip", "10.0.0.1.", f"'10.0.0.1.' {NO_ADDRESS}"),
    ("real_ip", "10.0.0.0/8", f"'10.0.0.0/8' {NO_ADDRESS}; write 10.0.0.0"),
    ("real_ip", "10.0.0.01", f"'10.0.0.01' {NO_ADDRESS}; {FOUR_NUMBERS}"),
    ("real_ip", "10.0.0.256", f"'10.0.0.256' {NO_ADDRESS}; {FOUR_NUMBERS}"),
    ("real_ip", "server", f"'server' {NO_ADDRESS}; {NO_NAMES}"),
    ("real_ip", "a-b.example.org", f"'a-b.example.org' {NO_ADDRESS}; {NO_NAMES}"),
    ("timeouts/udp", "5m", "'5m' is not a number of seconds (1-604800); write 300"),
    ("timeouts/udp_dns", "20 s", "'20 s' is not a number of seconds (1-604800); write 20"),
    ("timeouts/tcp_established", "2W", "'2W' is not a number of seconds (1-604800)"),
    ("timeouts/tcp_transitory", "1h", "'1h' is not a number of seconds (1-604800); write 3600"),
    ("limits/flows", "1k", "'1k' is not a number of flows (1-1000000); write 1000"),
    ("limits/flows", "65,536", "'65,536' is not a number of flows (1-1000000); write 65536"),
    ("limits/flows", "2M", "'2M' is not a number of flows (1-1000000)"),
    ("limits/flows", "5x", "'5x' is not a number of flows (1-1000000)"),
    ("gport", "16k", "'16k' is not a port (1-65535)"),
    ("real_ip", "0.0.0.0", "'0.0.0.0' is an unspecified address (0.0.0.0/8), no server has it"),
    ("real_ip", "127.0.0.1", "'127.0.0.1' is a loopback address (127.0.0.0/8), no server has it"),
    ("real_ip", "224.0.0.1", "'224.0.0.1' is a multicast address (224.0.0.0/4), no server has it"),
    ("real_ip", "240.0.0.1", "'240.0.0.1' is a class E address (240.0.0.0/4), no server has it"),
    ("real_ip", "255.255.255.255", "'255.255.255.255' is the broadcast address, no server has it"),
    ("start", "yes", "'yes' is neither 0 nor 1"),
    ("start", "01", "'01' is neither 0 nor 1"),
    ("source", "server", "'server' is neither client nor relay"),
    ("datapath", "kernel", "'kernel' is neither auto nor queue"),
    ("datapath", "Queue", "'Queue' is neither auto nor queue"),
    ("services", "", "'' names no service (like tcp/80, udp/53 or tcp/8000-8100)"),
    ("services", "tcp/80 http", f"'http' {LIKE}"),
    (
        *("services", "tcp/80,udp/53"),
        "'tcp/80,udp/53' is not a service; write blanks between services, tcp/80 udp/53",
    ),
    ("services", "TCP/80", f"'TCP/80' {LIKE}"),
    ("services", "tcp/+80", f"'tcp/+80' {LIKE}"),
    ("services", "tcp/\u0661", f"'tcp/\u0661' {LIKE}"),
    ("services", "tcp/0", "'tcp/0' has a port that is not in 1-65535"),
    ("services", "udp/5-65536", "'udp/5-65536' has a port that is not in 1-65535"),
    ("services", "tcp/9-5", "'tcp/9-5' runs backwards; write tcp/5-9"),
    ("services", "tcp/22", "'tcp/22' would relay ssh, tcp/22; write tcp/22! if you mean it"),
    (
        "services",
        "tcp/20-25",
        "'tcp/20-25' would relay ssh, tcp/22; write tcp/20-25! if you mean it",
    ),
    ("services", "tcp/80 tcp/70-90", "'tcp/70-90' and 'tcp/80' overlap; write one range"),
    ("services", "tcp/80 tcp/80!", "'tcp/80' and 'tcp/80!' overlap; write one range"),
    ("services", "tcp/80 tcp/80=forward", "'tcp/80' and 'tcp/80=forward' overlap; keep one"),
    (
        "services",
        "tcp/22=forward",
        "'tcp/22=forward' would relay ssh, tcp/22; write tcp/22=forward! if you mean it",
    ),
    (
        "services",
        "tcp/22!=forward",
        "'tcp/22!=forward' has its ! in the middle; write it last, =forward!",
    ),
    (
        "services",
        "tcp/80=splice",
        "'tcp/80=splice' has a mode that is not forward (like tcp/443=forward)",
    ),
    ("services", "tcp/80=", "'tcp/80=' has a mode that is not forward (like tcp/443=forward)"),
    (
        "services",
        "udp/53=forward",
        "'udp/53=forward': udp is always forwarded; write it without =forward",
    ),
    (
        "services",
        "tcp/80=forward=forward",
        "'tcp/80=forward=forward' is not a service (like tcp/80, udp/53 or tcp/8000-8100)",
    ),
    (
        "services",
        "tcp/80+any-port",
        "'tcp/80+any-port': any-port is for udp; tcp answers from its own port",
    ),
    (
        "services",
        "udp/69+anyport",
        "'udp/69+anyport' has an option that is not any-port (udp/69+any-port)",
    ),
    ("services", "udp/69+", "'udp/69+' has an option that is not any-port (udp/69+any-port)"),
    (
        "services",
        "udp/69!+any-port",
        "'udp/69!+any-port' has its ! in the middle; write it last, +any-port!",
    ),
    (
        "services",
        "udp/69=forward+any-port",
        "'udp/69=forward+any-port': udp is always forwarded; write it without =forward",
    ),
    (
        "services",
        "udp/69+any-port+any-port",
        "'udp/69+any-port+any-port' is not a service (like tcp/80, udp/53 or tcp/8000-8100)",
    ),
    ("services", "tcp/22!!", f"'tcp/22!!' {LIKE}"),
    ("services", "udp/69 udp/69+any-port", "'udp/69' and 'udp/69+any-port' overlap; keep one"),
    (
        "services",
        "udp/60-70+any-port udp/69+any-port",
        "'udp/60-70+any-port' and 'udp/69+any-port' overlap; write one range",
    ),
    ("timeouts/udp", "0", "'0' is not a number of seconds (1-604800)"),
    ("timeouts/tcp_established", "1.5", "'1.5' is not a number of seconds (1-604800)"),
    ("limits/flows", "1000001", "'1000001' is not a number of flows (1-1000000)"),
    ("limits/flows", "0", "'0' is not a number of flows (1-1000000)"),
    (
        "limits/new_flows_per_client",
        "-1",
        "'-1' is not a number of flows a second (0-1000000)",
    ),
    ("limits/refusal", "icmp", "'icmp' is neither reset nor drop"),
]

ports = st.integers(1, 65535)
ranges = st.lists(ports, min_size=2, max_size=20, unique=True).map(sorted)
any_text = st.text() | st.text(alphabet="0123456789./-!=+ tcpudforwany\n", max_size=40)


@st.composite
def service_lists(draw: st.DrawFn) -> tuple[Service, ...]:
    bounds = draw(ranges)
    found = []
    for low, high in zip(bounds[::2], bounds[1::2], strict=False):
        proto = draw(st.sampled_from(["tcp", "udp"]))
        kind = draw(st.booleans())
        found.append(
            Service(proto, low, high, True, proto == "tcp" and kind, proto == "udp" and kind)
        )
    return tuple(draw(st.permutations(found)))


VALUES = {
    "gport": ports,
    "real_ip": st.ip_addresses(v=4).filter(
        lambda a: (
            not a.is_multicast and not a.is_reserved and not a.is_loopback and a.packed[0] != 0
        )
    ),
    "start": st.booleans(),
    "services": service_lists(),
    "source": st.sampled_from(["client", "relay"]),
    "datapath": st.sampled_from(["auto", "queue"]),
    **{name: st.integers(1, 604800) for name in SETTINGS if "/" in name},
    "limits/new_flows_per_client": st.integers(0, 1_000_000),
    "limits/refusal": st.sampled_from(["reset", "drop"]),
}


@pytest.mark.parametrize(("name", "text", "canonical"), GOOD)
def test_a_good_text_has_one_canonical_form(name: str, text: str, canonical: str) -> None:
    assert render(name, parse(name, text)) == canonical


@pytest.mark.parametrize(("name", "text", "reason"), BAD)
def test_a_bad_text_is_refused_with_its_reason(name: str, text: str, reason: str) -> None:
    with pytest.raises(SettingRefused) as refused:
        parse(name, text)

    assert str(refused.value) == reason


@pytest.mark.parametrize("name", SETTINGS)
@given(data=st.data())
def test_parse_gives_back_what_render_wrote(name: str, data: st.DataObject) -> None:
    value = data.draw(VALUES[name])

    assert parse(name, render(name, value)) == value
    assert parse(name, f"\n {render(name, value)}\t\n") == value


@pytest.mark.parametrize("name", SETTINGS)
@given(text=any_text)
def test_any_text_gives_a_value_or_one_short_printable_line(name: str, text: str) -> None:
    try:
        value = parse(name, text)
    except SettingRefused as refused:
        reason = str(refused)
    else:
        reason = ""
        assert parse(name, render(name, value)) == value
    assert reason.isprintable()
    assert len(reason) < 250


def test_the_defaults_are_those_of_the_contract() -> None:
    assert {name: in_force(name, DEFAULTS) for name in SETTINGS} == {
        "gport": "16000",
        "real_ip": "192.168.0.10",
        "start": "0",
        "services": "tcp/80 tcp/443 udp/53 tcp/53",
        "source": "client",
        "datapath": "auto",
        "timeouts/udp": "300",
        "timeouts/udp_dns": "20",
        "timeouts/tcp_transitory": "240",
        "timeouts/tcp_established": "7440",
        "timeouts/stall": "300",
        "limits/flows": "65536",
        "limits/flows_per_client": "4096",
        "limits/new_flows_per_client": "0",
        "limits/refusal": "reset",
    }
    assert conflicts(DEFAULTS, frozenset(SETTINGS)) == {}


def test_each_field_of_config_has_its_file_in_the_same_order() -> None:
    assert [setting.field for setting in SETTINGS.values()] == [f.name for f in fields(Config)]


@given(found=service_lists(), proto=st.sampled_from(["tcp", "udp"]), port=ports)
def test_serves_agrees_with_the_set_of_all_ports(
    found: tuple[Service, ...], proto: str, port: int
) -> None:
    slow = {(s.proto, p) for s in found for p in range(s.first, s.last + 1)}
    near = {p for s in found for p in (s.first - 1, s.first, s.last, s.last + 1)}

    for number in near | {port}:
        assert Config(services=found).serves(proto, number) == ((proto, number) in slow)


@given(
    words=st.lists(
        st.builds(
            Service,
            st.just("tcp"),
            st.integers(1, 9),
            st.integers(1, 9),
            st.just(True),
            any_port=st.just(False),
        ).filter(lambda s: s.first <= s.last),
        min_size=1,
        max_size=4,
    )
)
def test_overlaps_are_found_wherever_they_stand(words: list[Service]) -> None:
    distinct = list(dict.fromkeys(words))
    all_ports = [p for s in distinct for p in range(s.first, s.last + 1)]
    text = " ".join(map(str, words))

    if len(all_ports) == len(set(all_ports)):
        assert services(text) == tuple(distinct)
    else:
        with pytest.raises(SettingRefused, match="overlap"):
            services(text)


def test_the_gateway_port_is_no_relayed_tcp_port_but_may_be_a_udp_one() -> None:
    tcp = Config(gport=85, services=services("tcp/80-90"))
    udp = Config(gport=85, services=services("udp/80-90"))
    both = frozenset({"gport", "services"})

    assert conflicts(tcp, {"gport"}) == {"gport": "'85' is a relayed service port (tcp/80-90)"}
    assert conflicts(tcp, both)["services"] == "'tcp/80-90' holds the gateway port, 85"
    assert conflicts(udp, both) == {}


def test_a_value_is_fit_for_the_config() -> None:
    assert parse("real_ip", "10.0.0.1") == IPv4Address("10.0.0.1")
    assert parse("start", "1") is True
    assert parse("services", "tcp/20-25!") == (Service("tcp", 20, 25, True),)
    text = "tcp/8000-8100=forward tcp/22=forward! tcp/80 udp/53"
    through = (Service("tcp", 8000, 8100, False, True), Service("tcp", 22, 22, True, True))
    config = Config(services=parse("services", text))
    assert config.services[:2] == through
    assert render("services", config.services) == text
    assert config.terminated == (Service("tcp", 80, 80),)
    assert config.forwarded == (*through, Service("udp", 53, 53))
