"""Texts from outside, made harmless to look at.

A user's id, a plan's name or a provider's text may hold an escape sequence that rewrites the terminal's lines, a mark
that turns the reading direction, or a line break that forges a line. Whatever a person decides by passes here first.
"""

from __future__ import annotations

import re

_SCHEME = re.compile(r"\b(h)tt(ps?)(?=://)", re.IGNORECASE)
# A dot before what may be a top-level domain: mail and chats make links of bare host names, too.
_DOT = re.compile(r"(?<=[\w-])\.(?=[a-z]{2,}\b)", re.IGNORECASE)
# As the provider issues them. The sandbox's are shorter.
_SECRET_KEY = re.compile(r"\b(live|test)_(?=[\w-]*[A-Z0-9])[\w-]{16,}")
_CHAT_MARKUP = re.compile(r"<(?=[!@#])")


def printable(text: str) -> str:
    r"""The text with each character that does not print shown as its escape, such as \x1b, \n or \u202e.

    A shop's secret key in it is masked, however it came there.
    """
    text = _SECRET_KEY.sub(r"\1_***", text)
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def without_links(text: str) -> str:
    """A printable text in which mails and chats find no link and no mention: hxxp://evil[.]example, (at)all."""
    harmless = _SCHEME.sub(r"\1xx\2", printable(text))
    return _CHAT_MARKUP.sub("(", _DOT.sub("[.]", harmless)).replace("@", "(at)")
