"""What wrk prints, read."""

import pytest

from benchmarks.ground import CannotMeasure
from benchmarks.web import Load, Transfer, parse_wrk

WRK = """\
Running 2s test @ http://10.0.0.254:80/
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.69ms    9.14ms 205.98ms   99.18%
    Req/Sec    31.28k     4.60k   37.46k    85.00%
  Latency Distribution
     50%  838.00us
     75%    1.06ms
     90%    1.32ms
     99%    1.02s
  62265 requests in 2.01s, 9.80MB read
Requests/sec:  31023.02
Transfer/sec:      4.88MB
"""


def test_latencies_are_read_in_milliseconds_whatever_their_unit() -> None:
    assert parse_wrk(WRK) == Load(
        requests=62265, per_second=31023.02, p50=0.838, p99=1020.0, errors=0
    )


def test_all_kinds_of_errors_are_counted() -> None:
    told = "  Socket errors: connect 1, read 20, write 300, timeout 4000\n"
    told += "  Non-2xx or 3xx responses: 50000\nRequests/sec:"
    assert parse_wrk(WRK.replace("Requests/sec:", told)).errors == 54321


@pytest.mark.parametrize("lost", ["requests in", "Requests/sec:", "50%", "99%"])
def test_what_wrk_does_not_tell_is_not_made_up(lost: str) -> None:
    text = "".join(line for line in WRK.splitlines(keepends=True) if lost not in line)
    with pytest.raises(CannotMeasure, match="wrk doesn't tell"):
        parse_wrk(text)


def test_a_rate_is_in_millions_of_bytes() -> None:
    assert Transfer(bytes=3e9, seconds=2).megabytes_per_second == 1500
