"""What the simulation sees of charges on the wire, and what must hold at the moment one is sent."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from billing_orchestration.domain.clocks import HARMFUL
from billing_orchestration_tests.torture.simulation.wire import status_of

if TYPE_CHECKING:
    from billing_orchestration_tests.torture.simulation.world import World

# After a send without an answer: by then the provider has executed it, or never will.
PROVIDER_HAS_FINISHED = timedelta(seconds=45)


class Charges:
    """Remembers first sends, declines and tries."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._first_posts: dict[str, tuple[datetime, bytes]] = {}
        self._declines: dict[str, tuple[datetime, bool]] = {}
        self._tries: dict[tuple[str, Any], str] = {}
        # When a charge was claimed, and whether it has got an answer.
        self._claimed: dict[str, datetime] = {}
        self._unanswered: set[str] = set()

    def forget_tries(self, taken_at: datetime) -> None:
        """The database was set back to an instant: of what was tried since, nobody here can know.

        What took money, or may yet, is known to the provider's list, and a key of it must never be sent as a new one.
        What was declined, refused, or never came to be there, may be tried anew.
        """
        self._tries.clear()
        self._declines.clear()
        world = self._world
        there = world.provider.payments()
        may_take_money = {payment.idempotence_key for payment in there if payment.status != "canceled"}
        known = {payment.idempotence_key for payment in there if payment.id not in world.journal.lost}
        for key, (sent_at, body) in list(self._first_posts.items()):
            if key not in may_take_money | known and sent_at >= taken_at:
                del self._first_posts[key]
                # The next send of it asks for the period that the plan has by then.
                world.journal.agreed.pop(json.loads(body)["metadata"].get("renewal_attempt_id"), None)

    def seconds_since_claim(self, key: str) -> float:
        """How long ago the run that sends it has claimed it: other threads may have had their turn since."""
        return (self._world.now - self._claimed.get(key, self._world.now)).total_seconds()

    def note_answer(self, key: str, answer: Any) -> None:
        """What a run was told about a charge."""
        self._unanswered.discard(key)
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
        self._note_claim(key)
        if first is None:
            self._first_posts[key] = (self._world.now, body)
            if periods := self._world.oracle.periods_asked_for(key):
                self._world.journal.agreed.setdefault(document["metadata"]["renewal_attempt_id"], periods)
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

    def _note_claim(self, key: str) -> None:
        world, before = self._world, self._claimed.get(key)
        claimed_at = world.oracle.claimed_at(key)
        if claimed_at is not None and abs(claimed_at - world.now) > HARMFUL + timedelta(minutes=1):
            world.fault(f"CLAIMED BY A WRONG CLOCK: key {key} is sent, and was claimed at {claimed_at}")
        claimed_at = world.now if claimed_at is None else min(world.now, claimed_at - world.database_error)
        # What seems to be long ago was written down before our clock was set.
        self._claimed[key] = claimed_at if world.now - claimed_at < PROVIDER_HAS_FINISHED else world.now
        too_soon = before is not None and self._claimed[key] - before < PROVIDER_HAS_FINISHED
        if key in self._unanswered and too_soon and world.plays("charges under way"):
            world.fault(f"RE-SENT TOO SOON: key {key} was claimed at {before}, and nobody has heard of it since")
        self._unanswered.add(key)
