"""tests.mistakes: a planted mistake that does not fit the broker is an error, not a finding."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.mistakes import MistakePlanter


class Owner:
    limit = 3

    def double(self, number: int, *, times: int = 1) -> int:
        return number * 2 * times

    async def wait(self, number: int) -> int:
        return number


def test_fitting_mistake_replaces_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def triple(self: Owner, number: int, *, times: int = 1) -> int:
        return number * 3

    planter = MistakePlanter(monkeypatch)
    planter.replace(Owner, "double", triple)
    assert Owner().double(2, times=5) == 6
    planter.check()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("halve", lambda *_: 0),
        ("double", lambda self: 0),
        ("double", lambda self, number: 0),
        ("wait", lambda: 0),
    ],
)
def test_mistake_with_another_name_or_signature_is_rejected(
    name: str, wrong: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError):
        MistakePlanter(monkeypatch).replace(Owner, name, wrong)


def test_mistake_that_fails_in_its_body_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    planter = MistakePlanter(monkeypatch)
    planter.replace(Owner, "double", lambda self, number, *, times=1: self.factor)
    with pytest.raises(AttributeError):
        Owner().double(2)
    with pytest.raises(AssertionError, match="factor"):
        planter.check()


async def test_asynchronous_mistake_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait(self: Owner, number: int) -> int:
        return self.factor  # type: ignore[attr-defined]

    planter = MistakePlanter(monkeypatch)
    planter.replace(Owner, "wait", wait)
    with pytest.raises(AttributeError):
        await Owner().wait(1)
    with pytest.raises(AssertionError, match="factor"):
        planter.check()


def test_mistake_that_makes_the_original_fail_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Owner.double

    def wrong(self: Owner, number: int, *, times: int = 1) -> int:
        return right(self, None, times=times)  # type: ignore[arg-type]

    planter = MistakePlanter(monkeypatch)
    planter.replace(Owner, "double", wrong)
    with pytest.raises(TypeError):
        Owner().double(2)
    planter.check()


def test_mistake_that_is_never_called_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    planter = MistakePlanter(monkeypatch)
    planter.replace(Owner, "double", lambda *_, **__: 0)
    with pytest.raises(AssertionError, match=r"Owner\.double"):
        planter.check()
