"""What the simulation sees of charges on the wire, and what must hold at the moment one is sent."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from billing_orchestration_tests.torture.simulation.wire import status_of

if TYPE_CHECKING:
    from billing_orchestration_tests.torture.simulation.world import World


class Charges:
    """Remembers first sends, declines and tries."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._first_posts: dict[str, tuple[datetime, bytes]] = {}
        self._declines: dict[str, tuple[datetime, bool]] = {}
        self._tries: dict[tuple[str, Any], str] = {}

    def note_answer(self, key: str, answer: Any) -> None:
        """What a run was told about a charge."""
        status, method_id = status_of(answer)
        if status == "canceled" and method_id is not None:
            self._declines[method_id] = (self._world.now, self._world.is_busy)
        if answer.status in (401, 403):
            # Refused because of the shop: nobody's card was tried.
            self._tries = {name: tried for name, tried in self._tries.items() if tried != key}

    def look_at(self, key: str, body: bytes, as_of: datetime, began: datetime, *, reaches: bool) -> None:
        """What must hold at the moment a charge is sent. `reaches`: a connection to the provider can be made."""
        text = body.decode()
        wrong = self._world.oracle.wrong_send(key, text, began)
        if key not in self._first_posts:
            wrong += self._world.oracle.wrong_charge(key, text, self._world.provider.payments(), as_of, self._world.now)
        for words in wrong:
            self._world.fault(words)
        document = json.loads(text)
        method_id = document["payment_method_id"]
        subscription = document["metadata"]["subscription_id"]
        self._world.tell(f"POST {subscription} from {document['metadata']['period_start']} key {key[:8]}")
        first = self._first_posts.get(key)
        if not reaches:
            return
        if first is None:
            self._first_posts[key] = (self._world.now, body)
            declined_at, by_another_run = self._declines.get(method_id, (None, False))
            # What another run hears while this one is under way is not known to it.
            if by_another_run and declined_at is not None and declined_at >= began:
                declined_at = None
            if declined_at is not None and declined_at.astimezone(self._world.zone).date() == self._world.day():
                self._world.fault(
                    f"TRIED TWICE A DAY: method {method_id} was declined at {declined_at} and is charged again"
                )
            other = self._tries.setdefault((subscription, self._world.day()), key)
            if other != key:
                self._world.fault(f"TRIED TWICE A DAY: subscription {subscription} by {other} and {key}")
        else:
            sent_at, sent = first
            if sent != body:
                self._world.fault(f"key {key} is sent with two bodies")
            if self._world.now - sent_at >= timedelta(hours=24):
                self._world.fault(f"RE-SENT TOO LATE: key {key} was first sent at {sent_at}")
