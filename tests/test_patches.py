"""Patches are taken back on every way out, in any order, and leave no attribute that was not there."""

from __future__ import annotations

import functools
import itertools
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest

from tp_planner.patches import Patch, added, replaced, wrap_for_good, wrapped


class Base:
    def call(self) -> str:
        return "plain"

    @staticmethod
    def alone() -> str:
        return "alone"


class Derived(Base):
    pass


def saying(word: str) -> Callable[[Any], Any]:
    """Return a wrapper that puts a word before what the plain function says."""

    def wrapper(plain: Any) -> Any:
        @functools.wraps(plain)
        def call(*args: Any) -> str:
            return f"{word} {plain(*args)}"

        return call

    return wrapper


def test_taken_back_after_an_error() -> None:
    plain = vars(Base)["call"]

    def fail() -> None:
        with wrapped(Base, "call", saying("loud"), "a test"):
            raise ValueError(Base().call())

    with pytest.raises(ValueError, match=r"^loud plain$"):
        fail()
    assert vars(Base)["call"] is plain


def test_static_methods_stay_static() -> None:
    plain = vars(Base)["alone"]
    with replaced(Base, "alone", staticmethod(lambda: "replaced"), "a test"):
        assert Base().alone() == "replaced"
    assert vars(Base)["alone"] is plain


def test_an_inherited_attribute_is_inherited_again() -> None:
    with wrapped(Derived, "call", saying("derived"), "a test"):
        assert (Derived().call(), Base().call()) == ("derived plain", "plain")
    assert "call" not in vars(Derived)


def test_an_attribute_that_was_missing_is_missing_again() -> None:
    owner = types.SimpleNamespace()
    with added(owner, "name", 1, "a test"):
        assert owner.name == 1
    assert vars(owner) == {}
    with added(owner, "name", 1, "a test"):
        del owner.name  # by someone else
    assert vars(owner) == {}


@pytest.mark.parametrize(
    "patch",
    [
        lambda owner: replaced(owner, "gone", 1, "a test"),
        lambda owner: wrapped(owner, "gone", saying("loud"), "a test"),
    ],
)
def test_what_a_version_no_longer_has_is_not_patched_in_silence(patch: Callable[[Any], Patch]) -> None:
    owner = types.ModuleType("library.core")
    before = dict(vars(owner))
    with pytest.raises(AttributeError) as caught, patch(owner):
        pass
    assert str(caught.value) == (
        "there is no library.core.gone, which tp_planner replaces (a test); "
        "use the versions of Keras and torch that its pyproject.toml names"
    )
    assert vars(owner) == before


def test_nothing_is_patched_by_a_wrapper_that_fails() -> None:
    owner = types.SimpleNamespace(number=0)
    with pytest.raises(ZeroDivisionError), wrapped(owner, "number", lambda number: 1 / number, "a test"):
        pass
    with replaced(owner, "number", 2, "a test"):
        assert owner.number == 2
    assert owner.number == 0


@pytest.mark.parametrize("own", [True, False], ids=["own", "inherited"])
@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_overlapping_patches_end_in_any_order(order: tuple[str, ...], own: bool) -> None:
    """Those that stand are as if those that ended had never been."""
    owner = Base if own else Derived
    before = vars(owner).get("call")
    patches = {word: wrapped(owner, "call", saying(word), "a test") for word in "abc"}
    for patch in patches.values():
        patch.__enter__()
    standing = ["a", "b", "c"]
    for word in order:
        assert owner().call() == " ".join([*reversed(standing), "plain"])
        patches[word].__exit__(None, None, None)
        standing.remove(word)
    assert vars(owner).get("call") is before
    assert ("call" in vars(owner)) == own


def test_a_value_beneath_another_ends_first() -> None:
    """Equal values are told apart: it is the patch that ends."""
    owner = types.SimpleNamespace(away=False)
    first, second = (replaced(owner, "away", True, "a test") for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert owner.away is True
    second.__exit__(None, None, None)
    assert owner.away is False


def test_each_thread_has_patches_of_its_own() -> None:
    local = threading.local()
    seen = []

    def other() -> None:
        local.value = "other"
        with replaced(local, "value", "other, patched", "a test"):
            seen.append(local.value)
        seen.append(local.value)

    local.value = "first"
    with replaced(local, "value", "first, patched", "a test"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert local.value == "first, patched"
    assert (local.value, seen) == ("first", ["other, patched", "other"])


def test_wrapped_for_good_once() -> None:
    owner, loud = types.SimpleNamespace(call=lambda: "plain"), saying("loud")
    for _ in range(3):
        wrap_for_good(owner, "call", loud, "a test")
    assert owner.call() == "loud plain"
    wrap_for_good(owner, "call", saying("another"), "a test")
    assert owner.call() == "another loud plain"


def test_wrapped_for_good_under_a_patch_of_another() -> None:
    """One that began while a patch stood outlives it; one that another took off with its own is put on again."""
    owner, loud = types.SimpleNamespace(call=lambda: "plain"), saying("loud")
    with wrapped(owner, "call", saying("watched"), "a test"):
        wrap_for_good(owner, "call", loud, "a test")
        assert owner.call() == "loud watched plain"
    assert owner.call() == "loud plain"
    owner.call = lambda: "plain"
    wrap_for_good(owner, "call", loud, "a test")
    assert owner.call() == "loud plain"


def test_a_patch_says_what_and_why() -> None:
    assert repr(replaced(Base, "call", None, "a test has no call")) == "<patch of Base.call: a test has no call>"
