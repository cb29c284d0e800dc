"""What is due in which second, against a list that is searched."""

from hypothesis import given
from hypothesis import strategies as st

from knet.timerwheel import Wheel


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.floats(0, 5000)),
            st.tuples(st.just("look"), st.sampled_from([0.1, 0.9, 1.0, 3.0, 70.0, 4000.0])),
        ),
        max_size=60,
    )
)
def test_each_thing_comes_once_in_its_second_or_at_the_next_look(
    script: list[tuple[str, float]],
) -> None:
    wheel, waiting, now = Wheel[int](), dict[int, float](), 0.0
    for number, (verb, value) in enumerate(script):
        if verb == "put":
            when = now + value
            wheel.put(wheel.second(when), number)
            waiting[number] = when
            continue
        now += value
        found = list(wheel.due(now))
        seconds = [second for second, _ in found]
        things = [thing for _, some in found for thing in some]

        assert seconds == sorted(seconds)
        assert len(things) == len(set(things))
        for thing in things:
            assert waiting.pop(thing) <= now
        assert all(int(when) + 1 > int(now) for when in waiting.values())


def test_what_is_cleared_never_comes() -> None:
    wheel = Wheel[str]()
    wheel.put(wheel.second(3.5), "a")
    wheel.clear()

    assert list(wheel.due(100.0)) == []
    assert wheel.second(3.5) == 101
