"""The procfs-like behaviour, with times and texts as plain values."""

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from procfs_sim.state import EMPTY_GRACE, TreeState, applied_text, errors_text
from procfs_sim.tree import DEFAULTS, SETTINGS, Config, conflicts, in_force, parse

TEXTS = {
    "gport": ["17000\n", "80", "53", "abc", "0017000", "9000\n"],
    "real_ip": ["10.0.0.1\n", "10.0.0.99", "::1"],
    "start": ["1\n", "0", "yes"],
    "services": ["tcp/17000", "tcp/80\nudp/53", "tcp/22", "tcp/9000 tcp/16000"],
    "source": ["relay", "other"],
    "datapath": ["queue", "kernel"],
    "limits/flows": ["10", "x"],
}


def own_address(old: Config, new: Config, changed: frozenset[str]) -> Mapping[str, str]:
    """A host whose address is 10.0.0.99."""
    if "real_ip" in changed and str(new.real_ip) == "10.0.0.99":
        return {"real_ip": "'10.0.0.99' is this host's own address"}
    return {}


def test_a_good_text_is_in_force_and_left_as_it_is() -> None:
    state = TreeState()

    outcome = state.written({"gport": "17000\n"}, now=0)

    assert outcome.config.gport == state.config.gport == 17000
    assert outcome.changed == {"gport"}
    assert state.generation == 2
    assert (outcome.refused, dict(outcome.show), state.errors) == ((), {}, {})


def test_a_bad_text_is_replaced_by_the_value_in_force_and_says_why() -> None:
    state = TreeState()

    outcome = state.written({"gport": "abc\n"}, now=0)

    line = "gport: 'abc' is not a port (1-65535); 16000 stays in force"
    assert outcome.refused == (line,)
    assert outcome.show == {"gport": "16000\n"}
    assert outcome.judged == {"gport": "abc\n"}
    assert errors_text(state.errors) == line + "\n"
    assert (state.config, state.generation, outcome.changed) == (DEFAULTS, 1, frozenset())


def test_the_echo_of_what_was_shown_does_not_clear_the_error_but_a_second_one_does() -> None:
    state = TreeState()
    state.written({"gport": "abc"}, now=0)

    state.written({"gport": "16000\n"}, now=0)
    assert "gport" in state.errors

    state.written({"gport": "16000\n"}, now=1)
    assert state.errors == {}


def test_a_good_text_clears_the_error_of_its_own_file_only() -> None:
    state = TreeState()
    state.written({"gport": "abc", "start": "maybe"}, now=0)

    state.written({"gport": "17000"}, now=1)

    assert list(state.errors) == ["start"]


def test_the_same_value_again_is_no_change() -> None:
    state = TreeState()

    outcome = state.written({"gport": "16000", "start": "0\n"}, now=0)

    assert outcome.changed == frozenset()
    assert state.generation == 1


def test_a_text_that_is_not_canonical_is_shown_canonically() -> None:
    outcome = TreeState().written({"gport": "017000\n", "services": "tcp/80\nudp/53\n"}, now=0)

    assert outcome.show == {"gport": "17000\n", "services": "tcp/80 udp/53\n"}


def test_a_removed_file_is_shown_again() -> None:
    state = TreeState()

    outcome = state.written({"real_ip": None}, now=0)

    assert outcome.show == {"real_ip": "192.168.0.10\n"}
    assert state.errors == {}


def test_unknown_names_are_ignored() -> None:
    outcome = TreeState().written({"gport~": "1", "status/state": None}, now=0)

    assert (dict(outcome.show), dict(outcome.judged)) == ({}, {})


def test_an_empty_file_is_judged_after_a_second_only() -> None:
    state = TreeState()

    assert not state.written({"gport": ""}, now=10).show
    assert state.next_deadline() == 10 + EMPTY_GRACE
    assert not state.on_time(10.99).show
    outcome = state.on_time(11)

    assert outcome.show == {"gport": "16000\n"}
    assert outcome.judged == {"gport": ""}
    assert outcome.refused == ("gport: '' is not a port (1-65535); 16000 stays in force",)
    assert state.next_deadline() is None
    assert not state.on_time(12).show


def test_an_empty_file_that_is_written_meanwhile_is_forgiven() -> None:
    state = TreeState()
    state.written({"gport": " \n"}, now=10)

    state.written({"gport": "17000"}, now=10.5)

    assert state.next_deadline() is None
    assert state.on_time(99).refused == ()
    assert state.config.gport == 17000


def test_truncating_again_does_not_prolong_the_grace() -> None:
    state = TreeState()
    state.written({"gport": ""}, now=10)
    state.written({"gport": "\n"}, now=10.9)

    assert state.on_time(11).judged == {"gport": "\n"}


def test_the_earliest_deadline_counts() -> None:
    state = TreeState()
    state.written({"gport": ""}, now=10)
    state.written({"start": ""}, now=10.5)

    assert state.next_deadline() == 11
    assert list(state.on_time(11).show) == ["gport"]
    assert state.next_deadline() == 11.5


def test_an_old_error_stays_while_the_file_is_empty() -> None:
    state = TreeState()
    state.written({"gport": "abc"}, now=0)
    state.written({"gport": ""}, now=1)

    assert "'abc'" in state.errors["gport"]


def test_the_gateway_port_may_not_be_a_relayed_port() -> None:
    state = TreeState()

    outcome = state.written({"gport": "80"}, now=0)

    assert outcome.refused == (
        "gport: '80' is a relayed service port (tcp/80); 16000 stays in force",
    )


def test_gport_and_services_that_fit_only_each_other_change_together() -> None:
    state = TreeState()

    outcome = state.written({"gport": "80", "services": "tcp/16000"}, now=0)

    assert outcome.refused == ()
    assert outcome.changed == {"gport", "services"}
    assert state.generation == 2


def test_only_the_offender_of_two_is_refused() -> None:
    state = TreeState()

    outcome = state.written({"services": "tcp/17000", "gport": "17000"}, now=0)

    assert outcome.changed == {"gport"}
    assert outcome.refused == (
        "services: 'tcp/17000' holds the gateway port, 17000; "
        "tcp/80 tcp/443 udp/53 tcp/53 stays in force",
    )


def test_an_offender_does_not_drag_down_what_fits_the_rest() -> None:
    state = TreeState(host_check=own_address)

    outcome = state.written({"gport": "53", "real_ip": "10.0.0.99", "services": "tcp/80"}, now=0)

    assert outcome.changed == {"gport", "services"}
    assert outcome.refused == (
        "real_ip: '10.0.0.99' is this host's own address; 192.168.0.10 stays in force",
    )
    assert outcome.show == {"real_ip": "192.168.0.10\n"}


def test_the_host_is_asked_with_old_new_and_what_changes() -> None:
    asked = []

    def check(old: Config, new: Config, changed: frozenset[str]) -> Mapping[str, str]:
        asked.append((old.gport, new.gport, changed))
        return {"start": "blamed on a file that did not change"}

    outcome = TreeState(host_check=check).written({"gport": "9000", "source": "client"}, now=0)

    assert set(asked) == {(16000, 9000, frozenset({"gport"}))}
    assert outcome.refused == ("gport: blamed on a file that did not change; 16000 stays in force",)


def test_applied_lists_generation_and_all_values() -> None:
    lines = applied_text(DEFAULTS, 7).splitlines()

    assert lines[:5] == [
        "generation=7",
        "gport=16000",
        "real_ip=192.168.0.10",
        "start=0",
        "services=tcp/80 tcp/443 udp/53 tcp/53",
    ]
    assert [line.partition("=")[0] for line in lines[1:]] == list(SETTINGS)


def test_errors_are_listed_in_the_order_of_the_settings() -> None:
    state = TreeState()
    state.written({"start": "x"}, now=0)
    state.written({"gport": "x"}, now=0)

    names = [line.partition(":")[0] for line in errors_text(state.errors).splitlines()]
    assert names == ["gport", "start"]


@st.composite
def writes(draw: st.DrawFn) -> dict[str, str | None]:
    names = draw(st.lists(st.sampled_from(list(TEXTS)), min_size=1, max_size=4, unique=True))
    blank = st.sampled_from([None, "", "\n"])
    return {
        name: draw(st.sampled_from(TEXTS[name]) | blank | st.text(max_size=5)) for name in names
    }


@given(script=st.lists(st.tuples(writes(), st.floats(0, 1.5), st.booleans()), max_size=12))
def test_once_the_grace_is_over_every_file_shows_the_value_in_force(
    script: list[tuple[dict[str, str | None], float, bool]],
) -> None:
    state = TreeState(host_check=own_address)
    files: dict[str, str | None] = {name: in_force(name, DEFAULTS) + "\n" for name in SETTINGS}
    now = 0.0

    def show(texts: Mapping[str, str], seen: bool) -> None:
        files.update(texts)
        if seen:
            assert not state.written(texts, now).show

    for texts, pause, echo_seen in script:
        before, generation = state.config, state.generation
        files.update(texts)
        show(state.written(texts, now).show, echo_seen)
        assert state.generation - generation == (state.config != before)
        now += pause
        show(state.on_time(now).show, echo_seen)
        assert conflicts(state.config, frozenset(SETTINGS)) == {}
        assert str(state.config.real_ip) != "10.0.0.99"
        due = state.next_deadline()
        assert due is None or now < due <= now + EMPTY_GRACE
    show(state.on_time(now + EMPTY_GRACE).show, True)

    assert state.next_deadline() is None
    for name, text in files.items():
        assert text is not None
        assert text.strip(" \t\r\n\v\f") == in_force(name, state.config)
        assert parse(name, text) == getattr(state.config, SETTINGS[name].field)
