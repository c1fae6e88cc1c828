"""Turns: with streams and events that keep a log in CUDA's place."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_vit.turns import Turns


class Stream:
    def __init__(self, log: list[str], number: int) -> None:
        self.log, self.cuda_stream, self.device_index = log, number, 0

    def wait_event(self, event: Any) -> None:
        self.log.append(f"{self.cuda_stream} waits for {event.recorded}")


class Event:
    recorded = -1

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self, stream: Stream) -> None:
        self.recorded = stream.cuda_stream
        self.log.append(f"{stream.cuda_stream} recorded")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.recorded}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch.cuda with a log; .streams are two, .stream the current one's number, .device the current device."""
    log: list[str] = []
    fake = SimpleNamespace(log=log, streams=[Stream(log, 0), Stream(log, 1)], stream=0, device=0)

    def on(device: torch.device) -> Any:
        log.append(f"on {device}")
        return threading.Lock()  # anything that can be entered

    fakes = SimpleNamespace(
        Event=lambda: Event(log), current_stream=lambda: fake.streams[fake.stream], current_device=lambda: fake.device,
        device=on,
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", fakes)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: fake.stream, raising=False)
    return fake


def test_a_stream_waits_for_the_last_turn_of_another(cuda: SimpleNamespace) -> None:
    turns = Turns(torch.device("cuda", 0))
    turns.wait()
    for stream in (0, 0, 1, 1, 0):
        cuda.stream = stream
        with turns.take():
            cuda.log.append("work")
    turns.wait()
    assert cuda.log == [
        "work", "0 recorded", "work", "0 recorded",
        "1 waits for 0", "work", "1 recorded", "work", "1 recorded",
        "0 waits for 1", "work", "0 recorded", "host waits for 0",
    ]  # fmt: skip


def test_a_wait_within_a_turn_is_for_that_turns_work_too(cuda: SimpleNamespace) -> None:
    """A call of two packs outgrows the slab that its first one runs in. Fails where only the turn before is over."""
    turns = Turns(torch.device("cuda", 0))
    with turns.take():
        cuda.log.append("work")
    cuda.stream = 1
    with turns.take():
        cuda.log.append("work")
        turns.wait()
    assert cuda.log[2:] == ["1 waits for 0", "work", "1 recorded", "host waits for 1", "1 recorded"]


def test_the_end_of_a_turn_that_fails_is_recorded_and_the_next_begins(cuda: SimpleNamespace) -> None:
    turns = Turns(torch.device("cuda", 0))
    with pytest.raises(ValueError), turns.take():
        raise ValueError
    cuda.stream = 1
    with turns.take():
        pass
    assert cuda.log == ["0 recorded", "1 waits for 0", "1 recorded"]


def test_a_device_that_is_not_current_is_made_so(cuda: SimpleNamespace) -> None:
    turns = Turns(torch.device("cuda", 1))
    with turns.take():
        pass
    cuda.device = 1
    with turns.take():
        pass
    assert cuda.log == ["on cuda:1", "0 recorded", "0 recorded"]


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_one_caller_at_a_time(cuda: SimpleNamespace, device: str) -> None:
    turns, inside = Turns(torch.device(device)), threading.Event()

    def other() -> None:
        with turns.take():
            inside.set()

    thread = threading.Thread(target=other)
    with turns.take():
        thread.start()
        assert not inside.wait(0.2)
    thread.join()
    assert inside.is_set() and (cuda.log == []) == (device == "cpu")
