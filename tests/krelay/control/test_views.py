"""What the control socket shows beside flows."""

from krelay.control.views import other_port_values, tcp_status_values


def test_of_tcp_relays_totals_what_is_now_is_status() -> None:
    totals = {"open": 3, "held": 0, "accepted": 10, "from_client": 2**64, "zebra": 1}
    assert list(tcp_status_values(totals).items()) == [("tcp_open", 3), ("tcp_held", 0)]


def test_services_that_answer_elsewhere_are_shown_if_there_are_any() -> None:
    assert other_port_values({}) == {}
    assert other_port_values({69: 2, 53: 1}) == {"other_port": {"udp/53": 1, "udp/69": 2}}
