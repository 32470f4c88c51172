"""HTML elements made of text that is always escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tp_planner.report.amounts import bytes_text

_VOID = frozenset({"input", "meta"})
Attribute = str | int | bool | None


class Markup(str):
    """Text that is HTML already: the only text that is not escaped."""

    __slots__ = ()


def element(name: str, /, *content: str, **attributes: Attribute) -> Markup:
    """Return an element; content that is not Markup is escaped, and so is every attribute.

    In names of attributes ``_`` stands for ``-``, at the end for nothing. False and None leave an attribute out.

    >>> element("td", "a < b", class_="x", data_value=3)
    '<td class="x" data-value="3">a &lt; b</td>'
    """
    opened = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    return Markup(opened if name in _VOID else f"{opened}{join(*content)}</{name}>")


def join(*parts: str) -> Markup:
    """Return the parts one after the other, those that are not Markup escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def tip(content: str, id: str, lines: Sequence[str], class_: str = "") -> Markup:
    """Return content that shows lines of explanation while it is pointed at or has the focus."""
    shown = element("span", *(element("span", line) for line in lines), role="tooltip", id=id)
    return element("span", content, shown, class_=f"tip {class_}".rstrip(), tabindex=0, aria_describedby=id)


def bytes_element(count: int) -> Markup:
    """Return a number of bytes to be read, in an element that has the exact number too."""
    return element("data", bytes_text(count), value=count, title=f"{count} bytes")
