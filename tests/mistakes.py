"""Planting mistakes: replace a function of the broker by a wrong one, and fail if the replacement no longer fits.

A check is trusted because it finds mistakes that are planted on purpose. A replacement that only fails because the
broker has changed around it would be found as well, and prove nothing. So a planted mistake is an error itself if

- the name that it replaces does not exist,
- it cannot be called as the original can,
- it raises `AttributeError`, `NameError` or `TypeError` in its own body, or
- it was never called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest

STALE = (AttributeError, NameError, TypeError)
"""What a replacement raises if the broker has changed around it."""


class MistakePlanter:
    """Plants mistakes through a `MonkeyPatch`, and knows what became of them. Call `check` after the test."""

    def __init__(self, patch: pytest.MonkeyPatch, on_stale: Callable[[BaseException], object] | None = None) -> None:
        self.errors: list[BaseException] = []
        self._patch = patch
        self._on_stale = on_stale or self.errors.append
        self._not_called: set[str] = set()

    def replace(self, owner: Any, name: str, wrong: Callable[..., Any]) -> None:
        """Replace `owner.name` by `wrong`. Raises `AssertionError` if `wrong` does not fit there."""
        where = f"{owner.__name__}.{name}"
        assert hasattr(owner, name), f"there is no {where}: the planted mistake {wrong.__qualname__} has to follow"
        _assert_callable_alike(where, getattr(owner, name), wrong)
        self._not_called.add(where)
        self._patch.setattr(owner, name, self._observed(where, wrong))

    def check(self) -> None:
        """Raise `AssertionError` unless every replacement was called, and none failed in its own body."""
        assert not self.errors, f"the planted mistake itself fails: {self.errors[0]!r}"
        assert not self._not_called, f"nothing has called {', '.join(sorted(self._not_called))}"

    def _observed(self, where: str, wrong: Callable[..., Any]) -> Callable[..., Any]:
        def note(error: BaseException) -> None:
            # The first traceback entry is the wrapper's, the second the replacement's.
            within = error.__traceback__ and error.__traceback__.tb_next
            if within is None or within.tb_next is None:
                self._on_stale(error)

        if inspect.iscoroutinefunction(wrong):

            @wraps(wrong)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                self._not_called.discard(where)
                try:
                    return await wrong(*args, **kwargs)
                except STALE as error:
                    note(error)
                    raise

            return call_async

        @wraps(wrong)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._not_called.discard(where)
            try:
                return wrong(*args, **kwargs)
            except STALE as error:
                note(error)
                raise

        return call


def _assert_callable_alike(where: str, right: Callable[..., Any], wrong: Callable[..., Any]) -> None:
    """Raise `AssertionError` unless every parameter of `right` can be given to `wrong`."""
    parameters = inspect.signature(wrong).parameters.values()
    kinds = {each.kind for each in parameters}
    names = {each.name for each in parameters}
    positional = sum(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in parameters)
    for index, each in enumerate(inspect.signature(right).parameters.values()):
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD):
            fits = index < positional or each.VAR_POSITIONAL in kinds
        else:
            fits = each.name in names or each.VAR_KEYWORD in kinds or each.kind in kinds
        assert fits, f"{where} takes {each}, and the planted mistake {wrong.__qualname__} does not"
