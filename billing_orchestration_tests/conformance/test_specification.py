"""The judge itself, on a small file with the gaps that the published one has: it must object to each kind of fault."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openapi_core", reason="make conformance installs it")

from billing_orchestration_tests.conformance.deviations import DEVIATIONS
from billing_orchestration_tests.conformance.specification import Exchange, Specification

DOCUMENTS = Path(__file__).parents[2] / "docs" / "conformance.md"
CHOICE = {"oneOf": [{"$ref": "#/components/schemas/Card"}, {"$ref": "#/components/schemas/Cash"}]}
FILE: dict[str, Any] = {
    "openapi": "3.0.2",
    "info": {"title": "A small one", "version": "1"},
    "servers": [{"url": "https://api.yookassa.ru/v3"}],
    "paths": {
        "/payments/{payment_id}": {
            "post": {
                "parameters": [
                    {
                        "name": "payment_id",
                        "in": "path",
                        "required": True,
                        "schema": {"$ref": "#/components/schemas/Id"},
                    },
                    {"$ref": "#/components/parameters/Key"},
                ],
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"type": "object", "properties": {"by": CHOICE}}}},
                },
                "responses": {
                    "200": {
                        "description": "",
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Payment"}}},
                    }
                },
            }
        }
    },
    "components": {
        "parameters": {"Key": {"name": "Key", "in": "header", "required": True, "schema": {"type": "string"}}},
        "schemas": {
            "Id": {"type": "string", "minLength": 36, "maxLength": 36},
            # The base names the choices, the places that choose do not.
            "Method": {
                "type": "object",
                "properties": {"type": {"type": "string"}},
                "required": ["type"],
                "discriminator": {
                    "propertyName": "type",
                    "mapping": {"card": "#/components/schemas/Card", "cash": "#/components/schemas/Cash"},
                },
            },
            "Card": {
                "allOf": [
                    {"$ref": "#/components/schemas/Method"},
                    {"type": "object", "properties": {"last4": {"type": "string"}}, "required": ["last4"]},
                ]
            },
            "Cash": {"allOf": [{"$ref": "#/components/schemas/Method"}, {"type": "object"}]},
            "Payment": {
                "type": "object",
                "properties": {
                    "id": {"$ref": "#/components/schemas/Id"},
                    "method": {**CHOICE, "discriminator": {"propertyName": "type"}},
                },
                "required": ["id"],
            },
        },
    },
}
CARD = {"type": "card", "last4": "4444"}


def exchange(
    answer: Any = None, body: Any = None, *, target: str = "/v3/payments/short", status: int = 200, **headers: str
) -> Exchange:
    given = {"Key": "k", "Content-Type": "application/json", **headers}
    return Exchange(
        "POST",
        target,
        {name: value for name, value in given.items() if value},
        json.dumps(body if body is not None else {"by": CARD}).encode(),
        status,
        json.dumps(answer if answer is not None else {"id": "short", "method": CARD}).encode(),
    )


@pytest.fixture(scope="module")
def specification() -> Specification:
    return Specification(copy.deepcopy(FILE))


def test_what_is_as_the_file_says_is_not_objected_to(specification: Specification) -> None:
    good = exchange()
    assert specification.operation(good) == "POST /payments/{payment_id}"
    assert specification.faults_of_request(good) == specification.faults_of_answer(good) == []
    assert specification.faults_of_answer(exchange({"id": "short", "method": {"type": "cash"}})) == []


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"method": CARD}, "'id' is a required property"),
        ({"id": 7}, "id: 7 is not of type 'string'"),
        ({"id": "short", "colour": "red"}, "'colour' was unexpected"),
        ({"id": "short", "method": {"type": "card"}}, "method: 'last4' is a required property"),
        ({"id": "short", "method": {"type": "cash", "last4": "4444"}}, "'last4' was unexpected"),
        ({"id": "short", "method": {"type": "cheque"}}, "could not be resolved"),
    ],
)
def test_an_answer_that_the_file_does_not_describe_is_objected_to(
    specification: Specification, answer: Any, told: str
) -> None:
    (fault,) = specification.faults_of_answer(exchange(answer))
    assert told in fault


def test_a_status_that_the_file_leaves_out_is_objected_to(specification: Specification) -> None:
    assert specification.faults_of_answer(exchange(status=409)) == [
        "ResponseNotFound: Unknown response http status: 409"
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (exchange(Key=""), "Missing required header parameter: Key"),
        (exchange(body={"by": {"type": "card"}}), "by: 'last4' is a required property"),
        (exchange(body={"by": CARD, "colour": "red"}), "'colour' was unexpected"),
        (exchange(target="/v3/payments/short?colour=red"), "unknown query parameter colour"),
    ],
)
def test_a_request_that_the_file_does_not_describe_is_objected_to(
    specification: Specification, given: Exchange, told: str
) -> None:
    (fault,) = specification.faults_of_request(given)
    assert told in fault


def test_what_the_file_does_not_know_has_no_name(specification: Specification) -> None:
    assert specification.operation(exchange(target="/v3/nowhere")) is None
    assert specification.operation(exchange(target="/v3/payments/a/b")) is None


def test_the_documents_tell_every_deviation_and_its_reason() -> None:
    told = DOCUMENTS.read_text(encoding="utf-8")
    for deviation in DEVIATIONS:
        assert f"| {deviation.name} | {deviation.why} |" in told
