"""Which links get the programs of the data path, and what becomes of what others have there.

Each test has a network namespace of its own, in which the thread of the test is.  What is there in
the end is read by tc, not by what put it there.
"""

import ctypes
import json
import os
import select
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import pytest

from knet.bpf import kernel
from knet.bpf.kernel import BpfProgram
from knet.netlink import rtnetlink, tc
from knet.netlink.rtnetlink import HostLink
from knet.netlink.socket import NetlinkSocket
from krelay.host import attachment
from krelay.host.attachment import Attachment, fit
from tests.tools.instructions import answer

pytestmark = pytest.mark.net

CLONE_NEWNET = 0x40000000
NAME, OTHER = "krelay", "krelay-0badcafe"
PATIENCE = 10_000  # milliseconds
WAYS = {"in": "ingress", "out": "egress"}
LAYERS = ("ethernet", "ip")


class Seen(NamedTuple):
    """A filter, as tc shows it."""

    way: str
    priority: int
    name: str
    program: int


@pytest.fixture(autouse=True)
def _host() -> Iterator[None]:
    """A namespace with nothing but `lo`."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        yield
    finally:
        assert libc.setns(home, CLONE_NEWNET) == 0
        os.close(home)


@pytest.fixture
def ours() -> Iterator[Attachment]:
    with closing(Attachment(NAME)) as made:
        yield made


@pytest.fixture
def programs() -> Iterator[dict[str, BpfProgram]]:
    loaded = load()
    yield loaded
    for each in loaded.values():
        each.close()


def load() -> dict[str, BpfProgram]:
    """Programs that do nothing, as those of the data path are named."""
    kernel.allow_memory()
    return {
        f"{way}_{layer}": BpfProgram.load(f"{way}_{layer}", answer(tc.UNSPEC))
        for way in WAYS
        for layer in LAYERS
    }


def ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, capture_output=True)


def add(name: str, *kind: str) -> int:
    """A new link; its number.  Skips the test where the kernel has no such kind."""
    words = ("tuntap", "add", name, *kind) if kind[0] == "mode" else ("link", "add", name, *kind)
    done = subprocess.run(("ip", *words), capture_output=True, text=True)
    if "nknown device type" in done.stderr or "not supported" in done.stderr:
        pytest.skip(f"the kernel has no links like {' '.join(kind)}")
    assert done.returncode == 0, done.stderr
    return number(name)


def veth(name: str = "w0", peer: str = "w1") -> int:
    add(name, "type", "veth", "peer", "name", peer)
    return number(name)


def number(name: str) -> int:
    return int(show("link", "show", "dev", name)[0]["ifindex"])


def show(*words: str) -> Any:
    return json.loads(subprocess.check_output(("ip", "-j", *words)))


def tc_shows(*words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(subprocess.check_output(("tc", "-j", *words)) or "[]")
    return found


def seen(name: str) -> set[Seen]:
    """All filters of a link."""
    return {
        Seen(way, each["pref"], each["options"]["bpf_name"], each["options"]["prog"]["id"])
        for way, parent in WAYS.items()
        for each in tc_shows("filter", "show", "dev", name, parent)
        if "options" in each and "bpf_name" in each["options"]
    }


def has_clsact(name: str) -> bool:
    return any(each["kind"] == "clsact" for each in tc_shows("qdisc", "show", "dev", name))


def of_ours(name: str) -> dict[str, int]:
    """By way, the number of the program in our filter; there is one at most."""
    found = [each for each in seen(name) if each.name == NAME]
    assert len({each.way for each in found}) == len(found)
    return {each.way: each.program for each in found}


def numbers(programs: Mapping[str, BpfProgram], layer: str = "ethernet") -> dict[str, int]:
    """What `of_ours` finds where these are attached."""
    return {way: kernel.program_number(programs[f"{way}_{layer}"].descriptor) for way in WAYS}


# Which links


def test_both_ends_of_a_wire_get_them_and_loopback_none(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    one = veth()
    ip("link", "set", "w1", "mtu", "1400")

    assert ours.attach_all(programs) == {one: 1500, number("w1"): 1400}
    assert of_ours("w0") == of_ours("w1") == numbers(programs)
    assert seen("lo") == set()
    assert not has_clsact("lo")


def test_a_bridge_gets_them_and_its_ports_none(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    veth()
    bridge = add("br0", "type", "bridge")
    ip("link", "set", "w0", "master", "br0")

    assert ours.attach_all(programs).keys() == {bridge, number("w1")}
    assert of_ours("br0") == numbers(programs)
    assert not has_clsact("w0")


def test_a_port_that_leaves_its_bridge_gets_them(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    one, bridge = veth(), add("br0", "type", "bridge")
    ip("link", "set", "w0", "master", "br0")
    ours.attach_all(programs)
    ip("link", "set", "w0", "nomaster")

    assert ours.attach_all(programs).keys() == {one, bridge, number("w1")}
    assert of_ours("w0") == numbers(programs)


def test_a_link_that_becomes_a_port_loses_them(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    one, bridge = veth(), add("br0", "type", "bridge")
    assert one in ours.attach_all(programs)
    ip("link", "set", "w0", "master", "br0")

    assert ours.attach_all(programs).keys() == {bridge, number("w1")}
    assert not has_clsact("w0")
    assert of_ours("w1") == numbers(programs)


def test_a_link_of_ip_alone_gets_the_programs_for_that(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    tun, tap = add("tun0", "mode", "tun"), add("tap0", "mode", "tap")

    assert ours.attach_all(programs).keys() == {tun, tap}
    assert of_ours("tun0") == numbers(programs, "ip")
    assert of_ours("tap0") == numbers(programs, "ethernet")


@pytest.mark.parametrize(
    "kind", ["dummy", "ifb", "vlan link w0 id 5", "macvlan link w0", "bond", "vrf table 5"]
)
def test_links_of_other_kinds(kind: str, ours: Attachment, programs: dict[str, BpfProgram]) -> None:
    veth()
    name, *words = kind.split()
    beneath = words[:2] if "link" in words else []
    made = add("x0", *beneath, "type", name, *words[len(beneath) :])

    assert (made in ours.attach_all(programs)) is (name != "vrf")
    assert bool(of_ours("x0")) is (name != "vrf")
    assert of_ours("w0")


def link(
    at: int,
    kind: int = 1,
    *,
    master: int = 0,
    driver: str = "",
    is_loopback: bool = False,
    other: str = "c0000201",
) -> HostLink:
    return HostLink(at, f"l{at}", kind, is_loopback, 1500, master, driver, bytes.fromhex(other))


@pytest.mark.parametrize("owner", ["bridge", "bond", "team", "openvswitch"])
def test_what_belongs_to_another_link_has_none(owner: str) -> None:
    found = [link(1, master=2), link(2, driver=owner), link(3)]

    assert [each.number for each in fit(found)] == [2, 3]


def test_in_a_vrf_the_links_get_them_and_it_has_none() -> None:
    assert [each.number for each in fit([link(1, master=2), link(2, driver="vrf")])] == [1]


@pytest.mark.parametrize("kind", [65534, 512, 768, 776, 778, 1])
def test_links_that_carry_ip_get_them(kind: int) -> None:
    assert fit([link(5, kind)]) == [link(5, kind)]
    assert fit([link(5, kind, is_loopback=True)]) == []


@pytest.mark.parametrize("other", ["00000000", "e0000001", ""])
def test_gre_with_many_ends_has_a_head_of_its_own_and_gets_none(other: str) -> None:
    assert fit([link(5, 778, other=other)]) == []
    assert fit([link(5, 768, other=other)]) == [link(5, 768, other=other)]


@pytest.mark.parametrize("kind", [32, 280, 801, 772])
def test_links_with_other_heads_get_none(kind: int) -> None:
    assert fit([link(5, kind)]) == []


# What others have there


def test_filters_of_others_stay_with_what_holds_them(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    veth()
    before = set()
    with closing(Attachment(OTHER)) as others:
        others.attach_all(programs)
        before = seen("w0")
        assert len(before) == 2
        ours.attach_all(programs)
        assert seen("w0") > before
        assert len(seen("w0")) == 4
        assert set(ours.detach_all()) == {"w0", "w1"}
        assert seen("w0") == before
        assert has_clsact("w0")
        ours.attach_all(programs)
        assert others.detach_all()
    assert {each.name for each in seen("w0")} == {NAME}
    assert len(seen("w0")) == 2
    assert ours.detach_all()
    assert not has_clsact("w0")


def test_a_filter_of_another_kind_keeps_clsact(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    veth()
    subprocess.run(("tc", "qdisc", "add", "dev", "w0", "clsact"), check=True)
    words = "filter add dev a egress prio 7 protocol ip"
    for kind in ("matchall action pass", "matchall", "u32 match u32 0 0", "basic"):
        done = subprocess.run(("tc", *words.split(), *kind.split()), capture_output=True)
        if done.returncode == 0:
            break
    else:
        pytest.skip("the kernel has none of the filters matchall, u32 and basic")
    before = tc_shows("filter", "show", "dev", "w0", "egress")
    assert before

    ours.attach_all(programs)
    assert set(ours.detach_all()) == {"w0", "w1"}

    assert tc_shows("filter", "show", "dev", "w0", "egress") == before
    assert has_clsact("w0")
    assert not has_clsact("w1")


def test_another_programs_filter_of_bpf_keeps_clsact(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    one = veth()
    ours.attach_all(programs)
    put("w0", 1, "cilium", programs["in_ip"])
    assert ours.attached().keys() == {one, number("w1")}

    ours.detach_all()

    assert {each.name for each in seen("w0")} == {"cilium"}


def put(name: str, priority: int, label: str, program: BpfProgram, parent: int = tc.IN) -> None:
    """Another program's filter."""
    with closing(NetlinkSocket(rtnetlink.FAMILY, timeout=5)) as asked:
        request = tc.set_filter(1, number(name), parent, priority, program.descriptor, label)
        asked.carry_out(request, 1)


def test_a_link_whose_place_is_taken_has_none_and_all_others_have(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    veth()
    done = subprocess.run(("tc", "qdisc", "add", "dev", "w0", "ingress"), capture_output=True)
    if done.returncode:
        pytest.skip(f"the kernel has no `ingress`: {done.stderr!r}")

    assert ours.attach_all(programs).keys() == {number("w1")}
    assert of_ours("w1") == numbers(programs)
    assert [each["kind"] for each in tc_shows("qdisc", "show", "dev", "w0")][-1] == "ingress"
    assert ours.detach_all() == ["w1"]


# In place of former ones, and away


@pytest.mark.parametrize(
    ("way", "priority", "counts"),
    [("egress", 1, False), ("egress", 0xC000, True), ("ingress", 1, True)],
)
def test_a_link_where_others_may_have_the_last_word_does_not_count(
    way: str, priority: int, counts: bool, ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    """What comes in then visits the worker.  What goes out would go as it is."""
    index = veth()
    words = "dev", "w0", way, "prio", str(priority)
    subprocess.run(("tc", "qdisc", "add", "dev", "w0", "clsact"), check=True)
    kind = "u32", "match", "u32", "0", "0"
    if subprocess.run(("tc", "filter", "add", *words, "protocol", "ip", *kind)).returncode:
        pytest.skip("the kernel has no filter u32")
    assert (index in ours.attach_all(programs)) == counts
    assert of_ours("w0") == numbers(programs)
    subprocess.run(("tc", "filter", "del", *words), check=True)
    assert index in ours.attach_all(programs)


def test_two_krelays_count_the_same_links(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    veth()
    with closing(Attachment(OTHER)) as other:
        found = ours.attach_all(programs)
        assert len(found) == 2
        assert other.attach_all(programs) == ours.attach_all(programs) == found


def test_what_is_there_already_is_left(ours: Attachment, programs: dict[str, BpfProgram]) -> None:
    veth()
    there = ours.attach_all(programs)
    before = seen("w0") | seen("w1")
    ours.drain()

    assert ours.attach_all(programs) == there
    assert seen("w0") | seen("w1") == before
    assert not ours.drain()  # or each look would be the cause of the next one


def test_other_programs_stand_in_place_of_the_former_ones(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    one = veth()
    ours.attach_all(programs)
    before = {(each.way, each.priority) for each in seen("w0")}
    newer = load()
    try:
        assert one in ours.attach_all(newer)
        assert of_ours("w0") == of_ours("w1") == numbers(newer) != numbers(programs)
        assert {(each.way, each.priority) for each in seen("w0")} == before
        assert ours.attached()[one] == numbers(newer)["in"]
    finally:
        for each in newer.values():
            each.close()


def test_a_filter_that_was_taken_out_is_put_back(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    one = veth()
    ours.attach_all(programs)
    for parent in ("ingress", "egress"):
        subprocess.run(("tc", "filter", "del", "dev", "w0", parent), check=True)
        assert one not in ours.attached()
        assert one in ours.attach_all(programs)
        assert of_ours("w0") == numbers(programs)
    subprocess.run(("tc", "qdisc", "del", "dev", "w0", "clsact"), check=True)
    assert one in ours.attach_all(programs)
    assert of_ours("w0") == numbers(programs)


def test_one_program_of_a_former_krelay_is_not_taken_for_both(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    one = veth()
    ours.attach_all(programs)
    newer = load()
    try:
        # A krelay that was killed between the two filters: what goes out is put in first.
        (priority,) = {each.priority for each in seen("w0")}
        put("w0", priority, NAME, newer["out_ethernet"], tc.OUT)
        assert one in ours.attach_all(newer)
        assert of_ours("w0") == numbers(newer)
    finally:
        for each in newer.values():
            each.close()


def test_nothing_is_left_of_what_was_attached(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    veth()
    add("br0", "type", "bridge")
    add("tun0", "mode", "tun")
    before = tc_shows("qdisc", "show")
    ours.attach_all(programs)

    assert set(ours.detach_all()) == {"w0", "w1", "br0", "tun0"}

    assert tc_shows("qdisc", "show") == before
    assert not any(map(seen, ("w0", "w1", "br0", "tun0")))
    assert ours.detach_all() == []
    assert ours.attached() == {}


def test_what_a_killed_krelay_has_left_is_taken_away(programs: dict[str, BpfProgram]) -> None:
    veth()
    with closing(Attachment(NAME)) as killed:
        killed.attach_all(programs)
    assert of_ours("w0") == numbers(programs)

    assert set(attachment.detach(NAME)) == {"w0", "w1"}
    assert attachment.detach(NAME) == []
    assert not has_clsact("w0")


def test_half_of_what_was_attached_is_taken_away(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    veth()
    ours.attach_all(programs)
    subprocess.run(("tc", "filter", "del", "dev", "w0", "ingress"), check=True)

    assert set(ours.detach_all()) == {"w0", "w1"}
    assert not has_clsact("w0")


# Links that come, go, and are renamed


def tells(ours: Attachment) -> bool:
    """Whether it is told of anything."""
    watched = select.poll()
    watched.register(ours.fileno(), select.POLLIN)
    return bool(watched.poll(PATIENCE)) and ours.drain()


def test_links_that_come_are_told_of_and_get_them(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    assert ours.attach_all(programs) == {}
    ours.drain()
    one = veth()

    assert tells(ours)
    assert ours.attach_all(programs).keys() == {one, number("w1")}
    assert of_ours("w0") == numbers(programs)


def test_links_that_go_are_told_of(ours: Attachment, programs: dict[str, BpfProgram]) -> None:
    veth()
    other = veth("c0", "d0")
    ours.attach_all(programs)
    ours.drain()
    ip("link", "del", "w0")

    assert tells(ours)
    assert ours.attach_all(programs).keys() == {other, number("d0")}
    assert set(ours.detach_all()) == {"c0", "d0"}


def test_filters_that_go_are_told_of(ours: Attachment, programs: dict[str, BpfProgram]) -> None:
    veth()
    ours.attach_all(programs)
    ours.drain()
    subprocess.run(("tc", "filter", "del", "dev", "w0", "ingress"), check=True)

    assert tells(ours)


def test_a_link_that_has_gone_meanwhile_is_none(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    veth()
    gone = next(each for each in ours.links() if each.name == "w0")
    ip("link", "del", "w0")

    assert not ours.attach(gone, programs)


def test_a_link_that_is_renamed_keeps_them(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    veth()
    there = ours.attach_all(programs)
    ip("link", "set", "w0", "name", "wan")

    assert ours.attach_all(programs) == there
    assert of_ours("wan") == numbers(programs)
    assert set(ours.detach_all()) == {"wan", "w1"}


def test_another_mtu_is_told_of(ours: Attachment, programs: dict[str, BpfProgram]) -> None:
    one = veth()
    ours.attach_all(programs)
    ours.drain()
    ip("link", "set", "w0", "mtu", "1280")

    assert tells(ours)
    assert ours.attach_all(programs)[one] == 1280


def test_more_links_than_fit_into_one_answer_get_them(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    for at in range(40):
        veth(f"a{at}", f"b{at}")

    assert len(ours.attach_all(programs)) == 80
    assert len(ours.attached()) == 80
    assert len(ours.detach_all()) == 80
    assert not has_clsact("a39")


def test_a_link_takes_what_its_smallest_route_takes(
    ours: Attachment, programs: dict[str, BpfProgram]
) -> None:
    ip(*["link", "add", "v0", "mtu", "1400", "type", "veth", "peer", "name", "v1"])
    ip(*["link", "set", "v0", "up"])
    ip(*["link", "set", "v1", "up"])
    ip(*["address", "add", "10.1.0.1/24", "dev", "v0"])
    index, other = number("v0"), number("v1")
    found = ours.attach_all(programs)
    assert (found[index], found[other]) == (1400, 1500)
    ours.drain()

    ip(*["route", "add", "10.2.0.0/24", "via", "10.1.0.2", "mtu", "1300"])
    ip(*["route", "add", "10.3.0.0/24", "via", "10.1.0.3", "mtu", "900"])
    assert ours.drain()
    assert ours.attach_all(programs)[index] == 900
    ip(*["route", "add", "10.4.0.0/24", "via", "10.1.0.3"])
    assert not ours.drain(), "one like most"
    ip(*["route", "del", "10.3.0.0/24"])
    assert ours.drain()
    found = ours.attach_all(programs)
    assert (found[index], found[other]) == (1300, 1500)
    hops = ("nexthop", "via", "10.1.0.2", "nexthop", "via", "10.1.0.3")
    ip("route", "replace", "10.2.0.0/24", "mtu", "1000", *hops)
    assert ours.drain()
    assert ours.attach_all(programs)[index] == 1000
