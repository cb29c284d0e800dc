"""The command line without a daemon, or with one whose answers are made up: words in, words out."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from knet.version import VERSION
from krelay.cli.main import main
from krelay.control import client
from krelay.control.client import NoDaemon, Rejected
from krelay.doctor.findings import Finding, Level
from procfs_sim.__main__ import main as procfs_sim
from procfs_sim.ondisk import FileTree
from procfs_sim.tree import DEFAULTS, SETTINGS, in_force
from tcp_relay import tcpproxy
from tcp_relay.__main__ import main as tcp_relay

COMMANDS = [  # those of the contract
    *("daemon", "up", "start", "stop", "set", "get", "status", "nat", "counters", "trace"),
    *("kill", "doctor", "clean", "demo"),
]
NO_DAEMON = "no krelay serves {root}; start one with `krelay daemon` or `krelay up`"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file tree that nobody serves."""
    FileTree(tmp_path / "tree").create()
    return tmp_path / "tree"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(root: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command on the tree: exit status, output, errors."""

    def run(command: str, *words: str) -> tuple[int, str, str]:
        status = main([command, "--root", str(root), *words])
        return status, *capsys.readouterr()

    return run


def answers(monkeypatch: pytest.MonkeyPatch, *lines: str) -> list[str]:
    """A daemon that says this to everyone; what it was asked."""
    asked: list[str] = []

    def ask(_root: Path, request: str) -> list[str]:
        asked.append(request)
        return list(lines)

    monkeypatch.setattr(client, "ask", ask)
    return asked


# usage


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["set", "gport"],
        ["set", "colour", "red"],
        ["get", "colour"],
        ["daemon", "--queue-num", "65536"],
        ["daemon", "--queue-num", "-1"],
        ["daemon", "--queue-num", "٣"],
        ["daemon", "--log-level", "loud"],
        ["up", "--log-level", "loud"],
        ["status", "--watch"],
        ["start", "now"],
        ["stop", "--no-doctor"],
        ["kill"],
        ["up", "--workers", "0"],
        ["up", "--buffer", "5x"],
        ["up", "--half-close", "never"],
        ["kill", "x"],
        ["kill", "-1"],
        ["kill", "1", "2"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2_and_shows_the_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(words)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()

    assert (status, out) == (2, "")
    assert err.startswith("usage: krelay")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("set", "gport", "1", "2"), "gport has one value, not 2"),
        (("set", "gport", "17000", "--flush"), "--flush goes with real_ip alone"),
        (("nat", "17"), "'17' is no filter; there are proto=, client=, state=, service="),
        (("nat", "proto=icmp"), "proto is tcp or udp, not 'icmp'"),
        (("nat", "client=x"), "client is ADDRESS or ADDRESS:PORT, not 'x'"),
        (("nat", "--json", "service=80"), "service is written tcp/80, not '80'"),
        (("trace", "17"), "'17' is no filter; there are proto=, client=, state=, service="),
        (("trace", "verdict=lost"), "verdict is one or more of rewrite,drop,pass, not 'lost'"),
    ],
)
def test_words_that_mean_nothing_are_wrong_usage(
    words: tuple[str, ...], reason: str, run: Run
) -> None:
    """Also where no krelay is that could say so."""
    status, out, err = run(*words)

    assert (status, out) == (2, "")
    usage, *_, last = err.splitlines()
    assert usage.startswith(f"usage: krelay {words[0]}")
    assert last == f"krelay {words[0]}: error: {reason}"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_of_every_command_shows_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*filter(None, [command]), "--help"])
    text = " ".join(capsys.readouterr().out.split())

    assert end.value.code == 0
    assert f"example: krelay {command}" in text


def test_each_command_is_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = [line.split()[:1] for line in capsys.readouterr().out.splitlines()]

    assert all([command] in listed for command in COMMANDS)


def test_without_a_command_the_help_is_shown_and_it_is_2(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    expected = capsys.readouterr().out

    for words in ([], ["--root", str(root)]):
        assert main(words) == 2
        assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_may_be_asked_for_by_a_word(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for words in (["help", command], [command, "--help"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        texts.append(capsys.readouterr().out)

    assert texts[0] == texts[1]


@pytest.mark.parametrize("program", [main, tcp_relay, tcpproxy.main, procfs_sim])
def test_the_version_is_that_of_all_packages(
    program: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--version", "-V"):
        with pytest.raises(SystemExit) as end:
            program([option])

        assert end.value.code == 0
        assert capsys.readouterr().out.endswith(f" {VERSION}\n")


MEANT = [
    ("stauts", "no command 'stauts'; did you mean status or start?"),
    ("version", "no command 'version'; did you mean --version?"),
    ("--hlep", "unrecognized arguments: --hlep; did you mean --help?"),
    ("set real-ip 1.2.3.4", "no setting 'real-ip'; did you mean real_ip?"),
    ("get Gport", "no setting 'Gport'; did you mean gport?"),
    ("get udp", "no setting 'udp'; did you mean timeouts/udp?"),
    ("set gport=17000", "no setting 'gport=17000'; did you mean gport 17000?"),
    ("get gport x", "unrecognized arguments: x"),
    ("nat clinet=10.0.0.1", "'clinet=10.0.0.1' is no filter; did you mean client=?"),
    ("nat --client=1.2.3.4", "unrecognized arguments: --client=1.2.3.4; did you mean client=?"),
    ("trace verdcit=drop", "'verdcit=drop' is no filter; did you mean verdict=?"),
    ("status --jsno", "unrecognized arguments: --jsno; did you mean --json?"),
    ("status --watch", "unrecognized arguments: --watch"),
    ("up --real_ip 1.2.3.4", "unrecognized arguments: --real_ip 1.2.3.4; did you mean --real-ip?"),
    (
        "daemon --log-level warn",
        "argument --log-level: invalid choice: 'warn' "
        "(choose from 'debug', 'info', 'warning', 'error'); did you mean warning?",
    ),
    ("--root= get", "argument --root: an empty name is no folder's"),
    ("--root /x demo", "demo has a file tree of its own; leave out --root"),
]


@pytest.mark.parametrize(("typed", "said"), MEANT)
def test_a_wrong_word_is_told_what_was_probably_meant(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(typed.split())
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()

    assert (status, out) == (2, "")
    assert err.startswith("usage: krelay")
    assert err.splitlines()[-1].partition(": error: ")[2] == said


@pytest.mark.parametrize("before", [True, False])
def test_the_tree_is_named_before_or_after_the_command(
    before: bool, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "gport").write_text("17001\n")
    tree, command = ["--root", str(root)], ["get", "gport"]

    assert main([*tree, *command] if before else [*command, *tree]) == 0
    assert capsys.readouterr() == ("17001\n", "")


def test_of_two_trees_the_one_after_the_command_is_meant(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--root", "/nowhere", "get", "gport", "--root", str(root)]) == 0
    assert capsys.readouterr() == ("16000\n", "")


def test_the_tree_is_taken_from_the_environment_if_no_other_is_named(
    root: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KRELAY_ROOT", str(tmp_path / "elsewhere"))

    assert main(["get", "gport"]) == 1
    assert str(tmp_path / "elsewhere" / "gport") in capsys.readouterr().err
    assert run("get", "gport")[0] == 0


# without a daemon


@pytest.mark.parametrize("command", ["status", "counters", "nat", "trace", "start", "stop"])
def test_without_a_daemon_it_is_1_and_one_line(command: str, run: Run, root: Path) -> None:
    expected = f"krelay {command}: {NO_DAEMON.format(root=root)}\n"

    assert run(command) == (1, "", expected)
    if command in ("nat", "counters", "status"):
        assert run(command, "--json") == (1, "", expected)
    assert (root / "start").read_text() == "0\n"


REFUSED = [
    ("gport", "abc", "'abc' is not a port (1-65535)"),
    ("gport", "70000", "'70000' is not a port (1-65535)"),
    (
        *("real_ip", "::1"),
        "'::1' is not an IPv4 address; write the server's IPv4 address, IPv6 is not relayed",
    ),
    ("real_ip", "127.0.0.1", "'127.0.0.1' is a loopback address (127.0.0.0/8), no server has it"),
    ("services", "tcp/80 tcp/22", "'tcp/22' would relay ssh, tcp/22; write tcp/22! if you mean it"),
    (
        *("services", "tcp/80,udp/53"),
        "'tcp/80,udp/53' is not a service; write blanks between services, tcp/80 udp/53",
    ),
    ("services", "http", "'http' is not a service (like tcp/80, udp/53 or tcp/8000-8100)"),
    ("start", "yes", "'yes' is neither 0 nor 1"),
    ("source", "server", "'server' is neither client nor relay"),
    ("datapath", "fast", "'fast' is neither auto nor queue"),
    ("timeouts/udp", "0", "'0' is not a number of seconds (1-604800)"),
    ("limits/flows", "x", "'x' is not a number of flows (1-1000000)"),
]

UP_OPTIONS = ("gport", "real_ip", "source", "datapath")
"""Settings of these that are options of `krelay up`, too."""


@pytest.mark.parametrize(("key", "value", "reason"), REFUSED)
def test_a_bad_value_is_refused_with_the_reason_and_never_written(
    key: str, value: str, reason: str, run: Run, root: Path
) -> None:
    before = (root / key).stat()

    assert run("set", key, value) == (1, "", f"krelay set: {key}: {reason}\n")
    after = (root / key).stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert (root / key).read_text() == in_force(key, DEFAULTS) + "\n"


@pytest.mark.parametrize(
    ("option", "value", "reason"), [each for each in REFUSED if each[0] in UP_OPTIONS]
)
def test_up_refuses_a_bad_value_before_it_starts_anything(
    option: str, value: str, reason: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"--{option.replace('_', '-')}", value)
    started: list[object] = []

    def start(*given: object) -> int:  # a test that fails must not start it on this host
        started.append(given)
        return 0

    monkeypatch.setattr("krelay.cli.up.run", start)
    assert run("up", *words) == (1, "", f"krelay up: {option}: {reason}\n")
    assert started == []


def test_without_a_daemon_a_value_is_written_and_that_is_said(run: Run, root: Path) -> None:
    assert run("set", "services", "  udp/53   tcp/80 ") == (
        0,
        "",
        f"services is written; no krelay serves {root}, the next one will heed it\n",
    )
    assert (root / "services").read_text() == "udp/53 tcp/80\n"


def test_without_a_tree_nothing_is_made(run: Run, root: Path) -> None:
    (root / "gport").unlink()
    missing = f"there is no {root}/gport; start a krelay, it makes the file tree\n"

    assert run("set", "gport", "17000") == (1, "", f"krelay set: {missing}")
    (root / "start").unlink()
    assert run("get", "gport") == (1, "", f"krelay get: {missing}")
    assert not (root / "gport").exists()


def test_a_file_that_cannot_be_written_is_one_line(run: Run, root: Path) -> None:
    (root / "gport").unlink()
    (root / "gport").mkdir()
    owner = (root / "gport").owner()

    assert run("set", "gport", "17000") == (
        1,
        "",
        f"krelay set: {root}/gport is a directory, owner {owner}, and no setting; "
        f"rm {root}/gport, or choose another tree with --root\n",
    )


def test_get_shows_one_value_or_all(run: Run, root: Path) -> None:
    (root / "timeouts" / "udp").write_text(" 77 \n")

    assert run("get", "timeouts/udp") == (0, "77\n", "")
    status, out, err = run("get")
    lines = dict(line.split("=", 1) for line in out.splitlines())
    assert (status, err) == (0, "")
    assert list(lines) == list(SETTINGS)
    expected = {name: in_force(name, DEFAULTS) for name in SETTINGS}
    assert lines == expected | {"timeouts/udp": "77"}


def test_clean_names_what_it_removed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for removed, shown in (([], "nothing was left\n"), (["a", "b"], "removed a\nremoved b\n")):
        monkeypatch.setattr("krelay.host.cleanup.clean", lambda *_, removed=removed, **__: removed)
        assert run("clean") == (0, shown, "")


# with a daemon that is made up


def test_figures_are_shown_for_people_or_as_they_came(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers(monkeypatch, '{"T1": 3, "dropped_x": 0}')

    assert run("counters", "--json") == (0, '{"T1": 3, "dropped_x": 0}\n', "")
    status, out, _ = run("counters")
    assert (status, out.split()) == (0, ["T1", "3", "dropped_x", "0"])
    assert "\x1b" not in out
    run("status")
    assert asked == ["show counters json"] * 2 + ["show status json"]


def test_some_figures_may_be_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, '{"T1": 3, "T2": 4, "dropped_table_full": 0}')

    assert run("counters", "T2", "T1") == (0, "T2  4\nT1  3\n", "")
    assert run("status", "T2", "--json") == (0, '{"T2": 4}\n', "")
    status, out, err = run("counters", "T2", "dropped_tabel_full")
    assert (status, out) == (2, "")
    assert err.endswith(
        "krelay counters: error: no counter 'dropped_tabel_full'; "
        "did you mean dropped_table_full?\n"
    )


def test_what_tcp_relays_count_is_shown_in_full(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(
        monkeypatch, '{"tcp_relays": 2, "tcp_open": 3, "tcp_from_client": 18446744073709551614}'
    )

    for command in ("status", "counters"):
        assert run(command) == (
            0,
            "tcp_relays       2\ntcp_open         3\ntcp_from_client  18446744073709551614\n",
            "",
        )


def test_filters_go_to_the_daemon_and_flows_come_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers(monkeypatch, '{"id": 1, "proto": "tcp"}', '{"id": 2, "proto": "udp"}')
    status, out, _ = run("nat", "state=closing", "client=10.0.0.1")

    assert (status, asked) == (0, ["show nat json state=closing client=10.0.0.1"])
    assert [line.split() for line in out.splitlines() if line.strip()][-2:] == [
        ["1", "tcp"],
        ["2", "udp"],
    ]
    assert run("nat", "--json")[1].splitlines() == [
        '{"id": 1, "proto": "tcp"}',
        '{"id": 2, "proto": "udp"}',
    ]


def test_a_value_that_krelay_refuses_is_1_with_its_reason(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "gport: port 18500 is in use by x (pid 1); 16000 stays in force"

    def ask(_root: Path, _request: str) -> list[str]:
        assert (root / "gport").read_text() == "18500\n"
        (root / "gport").write_text("16000\n")  # as krelay does
        (root / "status" / "errors").write_text(f"source: another\n{reason}\n")
        return ['{"gport": "16000"}']

    monkeypatch.setattr(client, "ask", ask)
    assert run("set", "gport", "18500") == (1, "", f"krelay set: {reason}\n")


def test_set_ends_well_when_the_value_is_in_force(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers(monkeypatch, '{"gport": "18500"}')

    assert run("set", "gport", "18500") == (0, "", "")
    assert (asked, (root / "gport").read_text()) == (["show config json"], "18500\n")


def test_start_fails_with_the_reason_that_krelay_gives(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("krelay.doctor.command.before_start", lambda _: [])
    answers(monkeypatch, '{"state": "failed: queue 1600 is served by another", "start": "1"}')

    assert run("start") == (1, "", "krelay start: queue 1600 is served by another\n")
    assert (root / "start").read_text() == "1\n"


def test_start_says_what_is_wrong_and_does_not_begin_where_it_cannot(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Finding("forwarding", Level.FAILED, "it doesn't", "sysctl -w x=1")
    fatal = Finding("queue", Level.FAILED, "there is none", "modprobe y", fatal=True)
    unsure = Finding("UDP GRO", Level.WARNING, "it joins", "ethtool -K eth0 x off")
    answers(monkeypatch, '{"state": "running", "start": "1"}')
    said = "failed  forwarding  it doesn't; fix: sysctl -w x=1\n"

    monkeypatch.setattr("krelay.doctor.command.after_start", lambda _: [slow, fatal])
    monkeypatch.setattr("krelay.doctor.command.before_start", lambda _: [fatal])
    assert run("start") == (1, "", f"{said}krelay start: there is none; fix: modprobe y\n")
    assert (root / "start").read_text() == "0\n"
    assert run("start", "--no-doctor") == (0, "", "")
    (root / "start").write_text("0\n")
    monkeypatch.setattr("krelay.doctor.command.after_start", lambda _: [slow, unsure])
    monkeypatch.setattr("krelay.doctor.command.before_start", lambda _: [])
    also = "warning  UDP GRO  it joins; fix: ethtool -K eth0 x off\n"
    assert run("start") == (0, "", said + also)
    assert (root / "start").read_text() == "1\n"
    assert run("start", "--no-doctor") == (0, "", "")


def test_set_says_what_is_wrong_with_what_is_in_force_then(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(tree: Path) -> list[Finding]:
        assert (tree / "gport").read_text() == "18500\n"
        return [Finding("firewall", Level.FAILED, "dropped", "nft x"), Finding("y", Level.OK, "")]

    monkeypatch.setattr("krelay.doctor.command.after_start", look)
    answers(monkeypatch, '{"gport": "18500"}')
    assert run("set", "gport", "18500")[::2] == (
        0,
        "failed  firewall  dropped; fix: nft x\nok  y  \n",
    )
    assert run("set", "gport", "18500", "--no-doctor") == (0, "", "")


def test_what_never_comes_into_force_is_not_waited_for_for_ever(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("krelay.cli.asking.IN_FORCE_WITHIN", 0.03)
    answers(monkeypatch, '{"state": "running", "start": "1", "gport": "1"}')

    assert run("stop")[2].startswith("krelay stop: not stopped after 0 seconds; see the daemon's ")
    assert run("set", "gport", "18500")[2].startswith("krelay set: gport isn't in force after")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Rejected("proto is tcp or udp, not 'icmp'"), "proto is tcp or udp, not 'icmp'"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError("it hung up"), "it hung up"),
    ],
)
@pytest.mark.parametrize(
    "words", [("nat",), ("status",), ("start",), ("set", "gport", "17000")], ids=lambda w: w[0]
)
def test_a_daemon_that_answers_badly_is_1_and_one_line(
    words: tuple[str, ...],
    error: Exception,
    said: str,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask(_root: Path, _request: str) -> list[str]:
        raise error

    monkeypatch.setattr(client, "ask", ask)
    status, out, err = run(*words)

    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"krelay {words[0]}: ")
    assert err.endswith(f"{said}\n")


def test_a_trace_is_printed_until_the_daemon_ends(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def follow(_root: Path, request: str) -> Iterator[str]:
        yield request
        yield "T1 [S] => > flow 1"

    monkeypatch.setattr(client, "follow", follow)

    assert run("trace", "proto=tcp") == (
        1,
        "trace proto=tcp\nT1 [S] => > flow 1\n",
        "krelay trace: krelay has ended\n",
    )


@pytest.mark.parametrize("error", [NoDaemon("no krelay"), Rejected("no filter"), OSError("gone")])
def test_a_trace_that_is_refused_is_one_line(
    error: Exception, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def follow(_root: Path, _request: str) -> Iterator[str]:
        raise error
        yield

    monkeypatch.setattr(client, "follow", follow)

    assert run("trace") == (1, "", f"krelay trace: {error}\n")


def test_ctrl_c_is_130_and_says_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def follow(_root: Path, _request: str) -> Iterator[str]:
        yield "T1 one"
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "follow", follow)

    assert run("trace") == (130, "T1 one\n", "")


def test_a_reader_who_has_enough_of_a_trace_ends_it_in_peace(root: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "control.sock"))
        listener.listen()
        reader, writer = os.pipe()
        with subprocess.Popen(
            [sys.executable, "-m", "krelay", "trace", "--root", str(root)],
            stdout=writer,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        ) as program:
            os.close(writer)
            listener.settimeout(10)
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"T1 one\n")
                with os.fdopen(reader) as lines:
                    assert lines.readline() == "T1 one\n"
                connection.sendall(b"T1 two\n")
                _, err = program.communicate(timeout=10)

    assert (program.returncode, err) == (0, b"")
