"""Signs of life: who is named as lost, and who is not."""

import threading
import time
from collections.abc import Iterator

import pytest

from pretrain.run import heartbeat
from pretrain.run.heartbeat import Heartbeat

LIMIT = 0.4


class Store:
    """A store in this process; `silent` makes it hang, as that of a stopped process 0."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.answers = threading.Event()
        self.answers.set()

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def add(self, key: str, number: int) -> int:
        self.values[key] = str(int(self.values.get(key, b"0")) + number).encode()
        return int(self.values[key])

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.answers.wait()
        return [self.values[key] for key in keys]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a heartbeat would say before its process leaves."""
    found: list[str] = []
    monkeypatch.setattr(heartbeat, "_leave", found.append)
    return found


@pytest.fixture
def pair() -> Iterator[tuple[Store, Heartbeat, Heartbeat]]:
    store = Store()
    both = [Heartbeat(store, rank, 2, LIMIT, local=1) for rank in range(2)]  # type: ignore[arg-type]
    yield store, *both
    store.answers.set()
    for each in both:
        each.end()


def wait_for(said: list[str]) -> str:
    deadline = time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    return said[0]


def test_processes_that_answer_are_left_alone_however_long_a_step_takes(
    pair: tuple[Store, Heartbeat, Heartbeat], said: list[str]
) -> None:
    time.sleep(3 * LIMIT)  # the first thread does nothing for the others
    assert said == []


def test_a_process_that_stands_still_is_named_with_its_machine_and_step(
    pair: tuple[Store, Heartbeat, Heartbeat], said: list[str]
) -> None:
    _, _, one = pair
    one.step = 7
    time.sleep(LIMIT)
    one._ended.set()  # no more signs of life
    says = wait_for(said)
    assert says.startswith("process 1 on ") and "(last at step 7)" in says and "process_timeout=0.4" in says


def test_a_store_that_does_not_answer_is_process_0s(pair: tuple[Store, Heartbeat, Heartbeat], said: list[str]) -> None:
    store, zero, _ = pair
    time.sleep(LIMIT / 2)
    zero._ended.set()
    store.answers.clear()
    assert wait_for(said).startswith("process 0 on ")


def test_a_process_that_never_comes_is_named(said: list[str]) -> None:
    zero = Heartbeat(Store(), 0, 3, LIMIT)  # type: ignore[arg-type]
    assert wait_for(said).startswith("process 1 has not begun for") and ", nor has 2:" in said[0]
    zero.end()


def test_a_process_that_has_ended_is_not_lost(pair: tuple[Store, Heartbeat, Heartbeat], said: list[str]) -> None:
    _, _, one = pair
    one.end()
    time.sleep(3 * LIMIT)
    assert said == []


def test_the_others_wait_for_process_0_without_a_limit(
    pair: tuple[Store, Heartbeat, Heartbeat], said: list[str]
) -> None:
    _, zero, one = pair
    answers: list[str] = []
    waits = threading.Thread(target=lambda: answers.append(one.from_main()))
    waits.start()
    time.sleep(2 * LIMIT)
    assert answers == [] == said
    zero.from_main("0")
    waits.join(5)
    assert answers == ["0"]


def test_process_0_ends_after_its_last_answer_has_been_read(pair: tuple[Store, Heartbeat, Heartbeat]) -> None:
    """Its store, from which the others read, ends with it."""
    _, zero, one = pair
    zero.from_main("0")
    ends = threading.Thread(target=zero.end)
    ends.start()
    ends.join(LIMIT)
    assert ends.is_alive()
    assert one.from_main() == "0"
    ends.join(3)
    assert not ends.is_alive()
