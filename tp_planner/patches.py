"""Patches: attributes of Keras, of torch or of an object of ours that are something else for a while, and why.

Every patch is taken back on the way out, whatever way that is. Patches of one attribute may end in any order: one that
ends beneath others leaves theirs in place, made anew on what was there before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_MISSING = object()  # an attribute that its owner does not have itself; it may inherit it
_lock = threading.RLock()
_standing: dict[tuple[int, str, int | None], list[Patch]] = {}  # those of one attribute, the innermost last


class Patch:
    """While it is entered, ``name`` of ``owner`` is what ``make`` returns, given the value before; enter it once.

    The owner is a module, a class, or an object with attributes of its own; those of a ``threading.local`` are patched
    on one thread. ``why`` is for those who find it there.

    Entering raises AttributeError where there is no such attribute, own or inherited, unless it ``may_be_new``.
    """

    def __init__(
        self, owner: Any, name: str, make: Callable[[Any], Any], why: str, *, may_be_new: bool = False
    ) -> None:
        self.owner, self.name, self.why = owner, name, why
        self._make, self._may_be_new = make, may_be_new
        self._before: Any = _MISSING
        thread = threading.get_ident() if isinstance(owner, threading.local) else None
        self._key = id(owner), name, thread

    def __repr__(self) -> str:
        return f"<patch of {self._where}: {self.why}>"

    def __enter__(self) -> None:
        with _lock:
            if not (self._may_be_new or hasattr(self.owner, self.name)):
                raise AttributeError(
                    f"there is no {self._where}, which tp_planner replaces ({self.why}); "
                    f"use the versions of Keras and torch that its pyproject.toml names"
                )
            self._put()
            _standing.setdefault(self._key, []).append(self)

    def __exit__(self, *error: object) -> None:
        with _lock:
            patches = _standing[self._key]
            position = patches.index(self)
            above = patches[position + 1 :]
            del patches[position]
            if not patches:
                del _standing[self._key]
            self._put_back()
            for patch in above:
                patch._put()

    def _put(self) -> None:
        before = vars(self.owner).get(self.name, _MISSING)
        setattr(self.owner, self.name, self._make(getattr(self.owner, self.name, None)))
        self._before = before

    def _put_back(self) -> None:
        if self._before is not _MISSING:
            setattr(self.owner, self.name, self._before)
        elif self.name in vars(self.owner):
            delattr(self.owner, self.name)

    @property
    def _where(self) -> str:
        return f"{getattr(self.owner, '__name__', type(self.owner).__name__)}.{self.name}"


def replaced(owner: Any, name: str, new: Any, why: str) -> Patch:
    """Return a context manager inside which an attribute is ``new``."""
    return Patch(owner, name, lambda before: new, why)


def added(owner: Any, name: str, new: Any, why: str) -> Patch:
    """Return a context manager inside which an attribute is ``new`` that the owner need not have."""
    return Patch(owner, name, lambda before: new, why, may_be_new=True)


def wrapped(owner: Any, name: str, wrapper: Callable[[Any], Any], why: str) -> Patch:
    """Return a context manager inside which an attribute is ``wrapper`` of what it is."""
    return Patch(owner, name, wrapper, why)


def wrap_for_good(owner: Any, name: str, wrapper: Callable[[Any], Any], why: str) -> None:
    """Let a function be ``wrapper`` of what it is from now on; it is wrapped once, however often this is called.

    ``wrapper`` returns a function that does what the plain one does wherever no parallel model is involved.
    """

    def marked(plain: Any) -> Any:
        function = wrapper(plain)
        function.wrapped_for_good = (*getattr(plain, "wrapped_for_good", ()), wrapper)
        return function

    with _lock:
        # What another has wrapped since then by functools.wraps still says so; what another has put back does not.
        if wrapper not in getattr(getattr(owner, name), "wrapped_for_good", ()):
            Patch(owner, name, marked, why).__enter__()
