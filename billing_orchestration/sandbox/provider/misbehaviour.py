"""How the sandbox provider misbehaves on request: rules that say which call, which occurrence, and what happens.

A rule is looked for before each call of the API, in the order in which the rules were given; the first that fires is
the only one that acts. "Before" and "after" say on which side of the execution it strikes: after means that the
money has moved and the client does not learn it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from billing_orchestration.sandbox.provider.account import SandboxProvider
from billing_orchestration.sandbox.provider.answers import (
    NO_RECURRING,
    Answer,
    Refused,
    forbidden,
    internal_error,
    processing,
    too_many_requests,
)

CALLS = frozenset((
    "create", "list", "get", "create_refund", "list_refunds", "get_refund", "create_method", "get_method", "me", "any",
))  # fmt: skip
_NOT_EXECUTED, _EXECUTED = "nothing was executed", "the call was executed"
_ON_EITHER_SIDE = {
    "cut": "the connection is closed without an answer",
    "reset": "TCP RST",
    "error": "HTTP 500 in the provider's body form",
    "silence": "no byte for `seconds` (None: until the client gives up), then closed",
    "processing": "HTTP 202 `processing`",
    "html": "a page of HTML with HTTP `status`",
    "body": "`body` verbatim with HTTP `status`",
}
_REFUSALS = {
    "too_many_requests": "HTTP 429, with `retry_after_s` if given",
    "invalid_credentials": "HTTP 401 in the provider's body form",
    "forbidden": "HTTP 403 in the provider's body form",
}
EFFECTS: Mapping[str, str] = {
    "none": "only the delay, if one is given",
    "truncated": "the true answer, but the connection closes in the middle of its body",
    "drip": "the true answer, its body byte by byte over `seconds`",
    "change": "the true answer, changed: `set` and `remove` by dotted path, `transform` in Python",
    "duplicate": "the request is delivered twice; the answer to the second is sent",
    **{f"{name}_before": f"{what}; {_NOT_EXECUTED}" for name, what in _ON_EITHER_SIDE.items()},
    **{f"{name}_after": f"{what}; {_EXECUTED}" for name, what in _ON_EITHER_SIDE.items()},
    **{name: f"{what}; {_NOT_EXECUTED}" for name, what in _REFUSALS.items()},
}
HTML = "<html><head><title>{status}</title></head><body><h1>{status}</h1><p>nginx</p></body></html>"


@dataclass(slots=True)
class Misbehaviour:
    """One rule. The occurrences are counted over the calls that match it.

    call: one of CALLS; create, list and get are the payments'. effect: see EFFECTS. delay_s: waited before anything
    is executed, whether or not the client is still there. times: fires so often at most (None: always). skip: lets
    this many pass first. every: then fires at each k-th. page: only at the n-th page of a list. payment_method_id,
    idempotence_key, payment_id, metadata, shop_id: only for that method, key, payment (get), a charge whose metadata
    holds all of these, or that shop.
    """

    call: str = "any"
    effect: str = "none"
    delay_s: float = 0.0
    times: int | None = 1
    skip: int = 0
    every: int = 1
    page: int | None = None
    payment_method_id: str | None = None
    idempotence_key: str | None = None
    payment_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    shop_id: str | None = None
    seconds: float | None = None
    retry_after_s: int | None = None
    status: int = 502
    body: str | None = None
    content_type: str = "application/json"
    set: Mapping[str, Any] = field(default_factory=dict)
    remove: tuple[str, ...] = ()
    transform: Callable[[Any], Any] | None = None
    matched: int = 0
    fired: int = 0

    def __post_init__(self) -> None:
        if self.call not in CALLS:
            raise ValueError(f"call {self.call!r} is none of {', '.join(sorted(CALLS))}")
        if self.effect not in EFFECTS:
            raise ValueError(f"effect {self.effect!r} is none of {', '.join(EFFECTS)}")
        if self.every < 1 or self.skip < 0 or (self.times is not None and self.times < 1):
            raise ValueError("every and times are at least 1, skip is at least 0")
        self.remove = tuple(self.remove)

    @property
    def kind(self) -> str:
        """The effect without its side."""
        return self.effect.removesuffix("_before").removesuffix("_after")

    @property
    def executes(self) -> bool:
        """Whether the call is executed before the rule strikes."""
        return not self.effect.endswith("_before") and self.effect not in _REFUSALS

    def answer(self) -> Answer:
        """What is sent in place of the true answer."""
        match self.kind:
            case "error":
                return internal_error()
            case "processing":
                return processing()
            case "too_many_requests":
                return too_many_requests(self.retry_after_s)
            case "forbidden":
                return forbidden(NO_RECURRING).answer()
            case "invalid_credentials":
                return Refused(401, "invalid_credentials", "Error in shopId or secret key").answer()
            case "html":
                page = HTML.format(status=self.status) if self.body is None else self.body
                return Answer(self.status, page.encode(), content_type="text/html; charset=utf-8")
            case "body":
                return Answer(self.status, (self.body or "").encode(), content_type=self.content_type)
        raise ValueError(f"{self.effect} sends no answer of its own")

    def changed(self, document: Any) -> Any:
        """The answer with `set`, `remove` and `transform` applied. A path: `items.0.amount.value`, `items.*.status`."""
        for path, value in self.set.items():
            _at(document, path.split("."), value)
        for path in self.remove:
            _at(document, path.split("."), _ABSENT)
        return document if self.transform is None else self.transform(document)

    def document(self) -> dict[str, Any]:
        """The rule as JSON, with how often it matched and fired."""
        shown = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "transform"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in shown.items()}


_ABSENT = object()


def _at(document: Any, path: list[str], value: Any) -> None:
    name, rest = path[0], path[1:]
    if name == "*":
        keys: Iterable[Any] = range(len(document)) if isinstance(document, list) else list(document)
    else:
        keys = [int(name)] if isinstance(document, list) else [name]
    for key in keys:
        if rest:
            _at(document[key], rest, value)
        elif value is not _ABSENT:
            document[key] = value
        elif isinstance(document, list):
            del document[key]
        else:
            document.pop(key, None)


@dataclass(frozen=True, slots=True)
class Call:
    """What a rule can ask about a request: whose it is (`shop`), which page (1 for a list without a cursor) …"""

    name: str
    shop: SandboxProvider
    page: int | None = None
    payment_id: str | None = None
    idempotence_key: str | None = None
    body: bytes = b""


class Misbehaviours:
    """The rules in force."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Misbehaviour] = []

    def add(self, rule: Misbehaviour) -> Misbehaviour:
        """Append a rule; the object says afterwards how often it fired."""
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Behave again."""
        with self._lock:
            self._rules.clear()

    def rules(self) -> list[Misbehaviour]:
        """The rules, used up or not."""
        with self._lock:
            return list(self._rules)

    def pick(self, call: Call) -> Misbehaviour | None:
        """The rule that acts on this call, if any. Every rule that matches counts it, until one fires."""
        if not self._rules:
            return None
        with self._lock:
            for rule in self._rules:
                if not _matches(rule, call) or (rule.times is not None and rule.fired >= rule.times):
                    continue
                rule.matched += 1
                if rule.matched > rule.skip and (rule.matched - rule.skip) % rule.every == 0:
                    rule.fired += 1
                    return rule
        return None


def _matches(rule: Misbehaviour, call: Call) -> bool:
    if rule.call not in {"any", call.name}:
        return False
    if rule.shop_id is not None and rule.shop_id != call.shop.shop_id:
        return False
    if rule.page is not None and rule.page != call.page:
        return False
    if rule.payment_id is not None and rule.payment_id != call.payment_id:
        return False
    if rule.idempotence_key is not None and rule.idempotence_key != call.idempotence_key:
        return False
    if rule.payment_method_id is None and not rule.metadata:
        return True
    try:
        body = json.loads(call.body)
        metadata = body.get("metadata") or {}
        return (rule.payment_method_id in {None, body.get("payment_method_id")}) and all(
            metadata.get(name) == value for name, value in rule.metadata.items()
        )
    except (ValueError, AttributeError, TypeError):
        return False
