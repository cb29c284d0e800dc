"""What follows from a config: the policy of new flows, and the rules."""

from ipaddress import IPv4Address, IPv4Network

from knet.endpoint import Proto, Source
from krelay.daemon import apply
from krelay.host.hostview import HostView
from krelay.nat.flow import Footprint
from krelay.rules.spec import RuleSpec
from procfs_sim.tree import Config, parse

OWN = IPv4Address("192.168.0.2").packed
BESIDE = IPv4Network("192.168.0.0/24")
VIEW = HostView(frozenset({OWN}), (BESIDE,), OWN, True, 1400)


def config(
    services: str = "tcp/80 tcp/443=forward udp/53 udp/69+any-port", **more: object
) -> Config:
    values = {"services": parse("services", services), **more}
    return Config(**values)


def rules(of: Config, *footprints: Footprint, has_maps: bool = True) -> RuleSpec:
    return apply.rules(
        of,
        VIEW,
        16000,
        footprints,
        name="krelay",
        queue=7,
        room=0,
        has_maps=has_maps,
        tells_unmatched=True,
    )


def test_the_policy_says_what_is_relayed_and_how() -> None:
    policy = apply.policy(config(), VIEW, 16000, frozenset({16000}))
    assert policy.tcp == {80, 443}
    assert policy.forwarded == {443}
    assert policy.udp == {53, 69}
    assert policy.any_port == {69}
    assert policy.gport == 16000
    assert policy.served == {16000}
    assert policy.backends == {IPv4Address("192.168.0.10").packed}
    assert policy.own == {OWN}
    assert (policy.beside, policy.towards, policy.mtu) == ((BESIDE,), OWN, 1400)


def test_the_policy_takes_source_and_refusal_from_their_settings() -> None:
    of = config(source="relay", limits_refusal="drop")
    policy = apply.policy(of, VIEW, 16000, frozenset())
    assert policy.source is Source.RELAY
    assert not policy.answers
    assert apply.policy(config(), VIEW, 16000, frozenset()).answers


def test_limits_and_timeouts_are_those_of_the_config() -> None:
    of = config(limits_flows=10, limits_flows_per_client=5, limits_new_flows_per_client=3)
    assert apply.limits(of) == (10, 5, 3)
    assert apply.timeouts(config(timeouts_udp=9)).udp == 9


def test_the_rules_hold_a_gateway_port_only_where_tcp_is_terminated() -> None:
    assert rules(config()).gports == (16000,)
    assert rules(config("udp/53 tcp/80=forward")).gports == ()


def test_the_rules_hold_what_flows_that_live_still_need() -> None:
    elsewhere = IPv4Address("192.168.0.99")
    former = Footprint(Proto.TCP, 8080, 17000, elsewhere.packed, False)
    spec = rules(config(), former)
    assert spec.gports == (16000, 17000)
    assert elsewhere in spec.servers
    assert (8080, 8080) in spec.tcp


def test_rules_without_maps_ask_for_nothing_that_takes_one() -> None:
    with_maps, without = rules(config()), rules(config(), has_maps=False)
    assert (with_maps.asked_within, with_maps.tells_unmatched) == (300, True)
    assert (without.asked_within, without.tells_unmatched) == (0, False)
    assert (with_maps.lets_offloaded_pass, without.lets_offloaded_pass) == (True, False)
