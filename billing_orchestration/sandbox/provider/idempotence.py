"""One key, one execution: what a repeated request under the same idempotence key gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from billing_orchestration.sandbox.provider.answers import Answer, Refused, invalid
from billing_orchestration.sandbox.provider.bodies import idempotence_key, parse_body
from billing_orchestration.sandbox.provider.switches import Switches

KEY_LIFETIME = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class IdempotenceRecord:
    """The first request under a key: its body, its time, the answer, and the id of what it made, if anything."""

    body: str
    first_at: datetime
    answer: Answer
    made: str | None


class Made(Protocol):
    """What a request makes: a payment, a refund, a payment method."""

    @property
    def id(self) -> str: ...

    def json(self) -> bytes:
        """As the API shows it."""


class Keys:
    """The keys of a shop. `shown` gives what was made under an id, as it is now."""

    def __init__(self, records: dict[str, IdempotenceRecord], shown: Callable[[str], bytes]) -> None:
        self._records = records
        self._shown = shown

    def record(self, key: str, now: datetime) -> IdempotenceRecord | None:
        """What the key got first, if that was less than 24 hours ago."""
        record = self._records.get(key)
        return record if record is not None and now - record.first_at < KEY_LIFETIME else None

    def answer(
        self,
        body: bytes,
        key: str | None,
        now: datetime,
        switches: Switches,
        carry_out: Callable[[Any, str], Made],
        *,
        looked_up: bool = False,
    ) -> Answer:
        """Carry the request out (`carry_out` takes the parsed body and the key), or give the key's first answer.

        `looked_up`: the key was unknown when this request came in, whatever happened since (switch `serialise_keys`).
        """
        try:
            key = idempotence_key(key)
            parsed = parse_body(body)
        except Refused as refused:
            return refused.answer()
        canonical = json.dumps(parsed, sort_keys=True)
        record = self.record(key, now)
        if record is not None and not looked_up:
            if record.body != canonical:
                return invalid("Idempotence key duplicated", "Idempotence-Key").answer()
            if switches.replay == "current" and record.made is not None:
                return Answer(200, self._shown(record.made))
            return record.answer
        made = None
        try:
            made = carry_out(parsed, key)
            answer = Answer(200, made.json())
        except Refused as refused:
            answer = refused.answer()
        if record is None and (made is not None or switches.remember_errors):
            self._records[key] = IdempotenceRecord(canonical, now, answer, made.id if made else None)
        return answer
