"""Interleaved timing: who is called when, and what is made of the clock. No speed is asserted."""

from __future__ import annotations

import pytest

from expedit_d2.analysis import timing
from expedit_d2.analysis.timing import Timing, interleaved


class FakeClock:
    """Time passes only in the functions made here."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def function(self, name: str, *seconds: float):
        """A function that takes these times, one after the other and the last for ever."""
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(timing.time, "perf_counter", fake.perf_counter)
    return fake


def test_turns_are_taken_forth_and_back(clock):
    fns = {name: clock.function(name, 1.0) for name in "abc"}
    result = interleaved(fns, repeats=3, warmup=1)
    assert "".join(clock.calls) == "cba" + "abc" + "cba" + "abc"
    assert list(result) == ["a", "b", "c"]


def test_warmup_is_not_counted(clock):
    fns = {"slow start": clock.function("slow start", 50.0, 50.0, 2.0), "b": clock.function("b", 3)}
    assert interleaved(fns, repeats=2, warmup=2) == {
        "slow start": Timing(2.0, 2.0, 2.0),
        "b": Timing(3.0, 3.0, 3.0),
    }
    assert len(clock.calls) == 8


def test_median_and_middle_half(clock):
    timing_of = interleaved({"a": clock.function("a", 5, 1, 2, 100, 3)}, repeats=5, warmup=0)
    assert timing_of["a"] == Timing(median=3.0, low=2.0, high=5.0)


def test_one_repeat(clock):
    assert interleaved({"a": clock.function("a", 7)}, 1, 0)["a"] == Timing(7.0, 7.0, 7.0)


class FakeEvent:
    """Takes the clock's time in milliseconds, as a CUDA event does."""

    clock: FakeClock

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.clock.calls.append("event")
        self.at = self.clock.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def gpu(clock, monkeypatch) -> FakeClock:
    monkeypatch.setattr(timing.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", clock.function("wait", 10.0))
    monkeypatch.setattr(FakeEvent, "clock", clock, raising=False)
    monkeypatch.setattr(timing.torch.cuda, "Event", FakeEvent)
    return clock


def test_on_a_gpu_events_take_the_time(gpu):
    result = interleaved({"a": gpu.function("a", 1.0)}, repeats=2, warmup=0)
    assert gpu.calls == ["wait", "event", "a", "event", "wait"] * 2
    # Waiting is not part of it: the events are in the GPU's own queue.
    assert result["a"].median == 1.0


def test_another_clock_waits_for_the_gpu_on_both_sides(gpu):
    result = interleaved(
        {"a": gpu.function("a", 1.0)}, repeats=2, warmup=0, clock=lambda: 2 * gpu.now
    )
    assert gpu.calls == ["wait", "a", "wait"] * 2
    # What the call left in the queue is its own time; what was there before is not.
    assert result["a"].median == 22.0


def test_leaves_an_unused_gpu_alone(clock, monkeypatch):
    monkeypatch.setattr(timing.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing.torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", clock.function("wait", 10.0))
    interleaved({"a": clock.function("a", 1.0)}, repeats=1, warmup=0)
    assert clock.calls == ["a"]


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (-1, 1), (1, -1)])
def test_refuses(repeats, warmup):
    with pytest.raises(ValueError, match="repeats >= 1 and warmup >= 0"):
        interleaved({}, repeats, warmup)


def test_scaled_and_printed():
    one = Timing(0.010, 0.0095, 0.012)
    assert str(one) == "10.0 (9.5-12.0) ms"
    assert one.scaled(2) == Timing(0.020, 0.019, 0.024)
