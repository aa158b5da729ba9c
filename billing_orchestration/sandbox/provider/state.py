"""The sandbox provider's state as a file: it outlives the process, so `make dev` opens the demo's data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from billing_orchestration.sandbox.provider.answers import Answer
from billing_orchestration.sandbox.provider.clock import aware_utc, iso
from billing_orchestration.sandbox.provider.idempotence import IdempotenceRecord
from billing_orchestration.sandbox.provider.methods import SavedMethod
from billing_orchestration.sandbox.provider.payments import Payment
from billing_orchestration.sandbox.provider.records import LedgerEntry, Outcome, Registration, outcome
from billing_orchestration.sandbox.provider.refunds import Refund

_Item = TypeVar("_Item", Payment, Refund)
_INSTANTS = frozenset({"created_at", "changed_at", "captured_at", "expires_at"})
_AMOUNTS = frozenset({"amount", "refunded"})


@dataclass(slots=True)
class ProviderState:
    """Everything the provider knows, but for what can be derived. The agenda holds (due in ms, order, id, outcome)."""

    payments: dict[str, Payment] = field(default_factory=dict)
    refunds: dict[str, Refund] = field(default_factory=dict)
    methods: dict[str, SavedMethod] = field(default_factory=dict)
    keys: dict[str, IdempotenceRecord] = field(default_factory=dict)
    ledger: list[LedgerEntry] = field(default_factory=list)
    agenda: list[tuple[int, int, str, Outcome | Registration]] = field(default_factory=list)
    sequence: int = 0


def write_document(document: Any, path: Path) -> None:
    """Write the whole file, or leave it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(document), encoding="utf-8")
    os.replace(beside, path)


def read_document(path: Path) -> Any:
    """What `write_document` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def state_document(state: ProviderState) -> dict[str, Any]:
    """The whole state as JSON."""
    return {
        "sequence": state.sequence,
        "payments": [_item_out(payment) for payment in state.payments.values()],
        "refunds": [_item_out(refund) for refund in state.refunds.values()],
        "methods": [
            {**_plain(method), "script": [_plain(item) for item in method.script]} for method in state.methods.values()
        ],
        "keys": {
            key: {
                "body": record.body,
                "first_at": iso(record.first_at),
                "status": record.answer.status,
                "answer": record.answer.body.decode(),
                "made": record.made,
            }
            for key, record in state.keys.items()
        },
        "ledger": [entry.document() for entry in state.ledger],
        "agenda": [[due, order, item_id, _plain(event)] for due, order, item_id, event in state.agenda],
    }


def state_of(document: Mapping[str, Any]) -> ProviderState:
    """The state of `state_document`."""
    payments = [_item_in(Payment, item) for item in document["payments"]]
    refunds = [_item_in(Refund, item) for item in document["refunds"]]
    methods = [
        SavedMethod(**{**item, "script": [outcome(step) for step in item["script"]]}) for item in document["methods"]
    ]
    return ProviderState(
        payments={payment.id: payment for payment in payments},
        refunds={refund.id: refund for refund in refunds},
        methods={method.id: method for method in methods},
        keys={
            key: IdempotenceRecord(
                item["body"],
                aware_utc(item["first_at"]),
                Answer(item["status"], item["answer"].encode()),
                item["made"],
            )
            for key, item in document["keys"].items()
        },
        ledger=[
            LedgerEntry(**{**item, "amount": Decimal(item["amount"]), "at": aware_utc(item["at"])})
            for item in document["ledger"]
        ],
        agenda=[(due, order, item_id, _event(given)) for due, order, item_id, given in document["agenda"]],
        sequence=document["sequence"],
    )


def _event(given: Mapping[str, Any]) -> Outcome | Registration:
    return Registration(**given) if "status" in given else outcome(given)


def _plain(record: SavedMethod | Outcome | Registration) -> dict[str, Any]:
    return {
        name: iso(value) if isinstance(value, datetime) else value
        for name, value in asdict(record).items()
        if value is not None
    }


def _item_out(item: Payment | Refund) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for part in fields(item):
        value = getattr(item, part.name)
        if value is None or part.name == "_json":
            continue
        if part.name in _INSTANTS:
            value = iso(value)
        elif part.name in _AMOUNTS:
            value = str(value)
        elif isinstance(value, Outcome):
            value = _plain(value)
        shown[part.name] = value
    return shown


def _item_in(kind: type[_Item], item: Mapping[str, Any]) -> _Item:
    given = dict(item)
    for name in _INSTANTS & given.keys():
        given[name] = aware_utc(given[name])
    for name in _AMOUNTS & given.keys():
        given[name] = Decimal(given[name])
    for name in {"without", "registers"} & given.keys():
        given[name] = tuple(given[name])
    if "after_receipt" in given:
        given["after_receipt"] = outcome(given["after_receipt"])
    return kind(**given)
