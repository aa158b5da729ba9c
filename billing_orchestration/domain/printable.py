"""Texts from outside, made harmless to look at.

A user's id, a plan's name or a provider's text may hold an escape sequence that rewrites the terminal's lines, a mark
that turns the reading direction, or a line break that forges a line. Whatever a person decides by passes here first.
"""

from __future__ import annotations

import json
import re
from typing import Any

_SCHEME = re.compile(r"\b(h)tt(ps?)(?=://)", re.IGNORECASE)
# A dot before what may be a top-level domain: mail and chats make links of bare host names, too.
_DOT = re.compile(r"(?<=[\w-])\.(?=[a-z]{2,}\b)", re.IGNORECASE)
# As the provider issues them. The sandbox's are shorter.
_SECRET_KEY = re.compile(r"\b(live|test)_(?=[\w-]*[A-Z0-9])[\w-]{16,}")
# A cell that begins so is a formula to a spreadsheet.
_FORMULA = ("=", "+", "-", "@")
_CHAT_MARKUP = re.compile(r"<(?=[!@#])")


def printable(text: str) -> str:
    r"""The text with each character that does not print shown as its escape, such as \x1b, \n or \u202e.

    A shop's secret key in it is masked, however it came there.
    """
    text = _SECRET_KEY.sub(r"\1_***", text)
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def printable_json(data: Any, indent: int | None = None) -> str:
    """As JSON, with each character that does not print as JSON escapes it. What JSON does not know is written as text.

    `printable` would spoil it: JSON has no \\xa0.
    """
    text = json.dumps(data, ensure_ascii=False, indent=indent, default=str)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(sign if sign == "\n" or sign.isprintable() else json.dumps(sign)[1:-1] for sign in text)


def no_formula(text: str) -> str:
    """A text for a cell of a spreadsheet, which must not calculate with it."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def without_links(text: str) -> str:
    """A printable text in which mails and chats find no link and no mention: hxxp://evil[.]example, (at)all."""
    harmless = _SCHEME.sub(r"\1xx\2", printable(text))
    return _CHAT_MARKUP.sub("(", _DOT.sub("[.]", harmless)).replace("@", "(at)")
