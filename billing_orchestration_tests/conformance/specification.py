"""The provider's published OpenAPI file as a judge: what is wrong with a request, and what with an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml
from openapi_core import Config, OpenAPI
from openapi_core.testing import MockRequest, MockResponse

HOST = "https://api.yookassa.ru"
# Ids as the provider makes them. Tests put in payments under short ids, so the length is asked of new ones only.
ID_LENGTH = 36


@dataclass(frozen=True)
class Exchange:
    """A request, and what was answered to it."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    status: int = 0
    answer: bytes = b""

    @property
    def accepted(self) -> bool:
        return 200 <= self.status < 300

    @property
    def answered(self) -> Any:
        """The answer, decoded."""
        return json.loads(self.answer)


class Specification:
    """The file, with the help that a validator needs: choices that are complete, and no `allOf`."""

    def __init__(self, document: dict[str, Any]) -> None:
        schemas = document.get("components", {}).get("schemas", {})
        prefix = urlsplit(document["servers"][0]["url"]).path
        for place in list(_places(document)):
            _complete_discriminator(place, schemas)
            if place.get("minLength") == place.get("maxLength") == ID_LENGTH:
                del place["minLength"], place["maxLength"]
        for place in list(_places(document)):
            _merge(place, schemas)
        self._operations = {
            f"{method.upper()} {path}": re.compile(f"{method.upper()} {prefix}{re.sub('{[^}]*}', '[^/]+', path)}")
            for path, methods in document["paths"].items()
            for method in methods
        }
        shared = document.get("components", {}).get("parameters", {})
        self._query_names = {
            f"{method.upper()} {path}": frozenset(
                shared[given["$ref"].rpartition("/")[2]]["name"] if "$ref" in given else given["name"]
                for given in operation.get("parameters", ())
            )
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        }
        # The file itself is not valid in places that do not matter here (a default that is too long).
        config = Config(spec_validator_cls=None, additional_properties_default_policy="forbid")
        self._api = OpenAPI.from_dict(document, config=config)  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path) -> Specification:
        """The published YAML or JSON."""
        return cls(yaml.safe_load(path.read_text(encoding="utf-8")))

    def faults_of_request(self, exchange: Exchange) -> list[str]:
        """What the file objects to in the request: parameters, headers, body."""
        faults = [
            fault for error in self._api.request_validator.iter_errors(_request(exchange)) for fault in _told(error)
        ]
        known = self._query_names.get(self.operation(exchange) or "", frozenset())
        given = [name for name, _ in parse_qsl(urlsplit(exchange.target).query, keep_blank_values=True)]
        return [*faults, *(f"unknown query parameter {name}" for name in given if name not in known)]

    def faults_of_answer(self, exchange: Exchange) -> list[str]:
        """What the file objects to in the answer: an undocumented status, the body."""
        response = MockResponse(exchange.answer, exchange.status, content_type="application/json")
        errors = self._api.response_validator.iter_errors(_request(exchange), response)
        return [fault for error in errors for fault in _told(error)]

    def operation(self, exchange: Exchange) -> str | None:
        """`GET /payments/{payment_id}`; None for what the file does not know."""
        path = urlsplit(exchange.target).path
        for name, form in self._operations.items():
            if form.fullmatch(f"{exchange.method} {path}"):
                return name
        return None


def _request(exchange: Exchange) -> MockRequest:
    target = urlsplit(exchange.target)
    query = dict(parse_qsl(target.query, keep_blank_values=True))
    content_type = next((value for name, value in exchange.headers.items() if name.lower() == "content-type"), "")
    return MockRequest(
        HOST,
        exchange.method,
        target.path,
        args=query,
        headers=dict(exchange.headers),
        data=exchange.body or None,
        content_type=content_type.partition(";")[0] or "application/json",
    )


def _told(error: Exception) -> list[str]:
    """Each fault in a line: where, and what."""
    cause = error.__cause__
    below = [*getattr(error, "schema_errors", ()), *getattr(cause, "schema_errors", ())]
    if below:
        return [f"{'.'.join(map(str, fault.absolute_path))}: {fault.message}" for fault in below]
    return [f"{type(error).__name__}: {error}" if cause is None else f"{type(cause).__name__}: {cause}"]


def _places(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for below in list(node.values()):
            yield from _places(below)
    elif isinstance(node, list):
        for below in node:
            yield from _places(below)


def _complete_discriminator(place: dict[str, Any], schemas: Mapping[str, Any]) -> None:
    """Say what decides a choice, and what each value means: many places leave it to the base that the members share."""
    choice = place.get("oneOf")
    if not isinstance(choice, list) or "mapping" in place.get("discriminator", {}):
        return
    members = {member["$ref"] for member in choice if "$ref" in member}
    for reference in members:
        for base in schemas[reference.rpartition("/")[2]].get("allOf", ()):
            shared = schemas.get(base.get("$ref", "").rpartition("/")[2], {}).get("discriminator", {})
            known = {value: target for value, target in shared.get("mapping", {}).items() if target in members}
            if known:
                decides = place.setdefault("discriminator", {"propertyName": shared["propertyName"]})
                decides.setdefault("mapping", {}).update(known)


def _merge(place: dict[str, Any], schemas: Mapping[str, Any]) -> None:
    """Put the parts of an `allOf` into one schema, so that a field which none of them knows can be told."""
    for part in place.pop("allOf", ()):
        whole = dict(schemas[part["$ref"].rpartition("/")[2]]) if "$ref" in part else dict(part)
        _merge(whole, schemas)
        whole.pop("discriminator", None)
        place["properties"] = {**whole.pop("properties", {}), **place.get("properties", {})}
        place["required"] = sorted({*whole.pop("required", ()), *place.get("required", ())})
        for name, value in whole.items():
            place.setdefault(name, value)
    for name in ("properties", "required"):
        if not place.get(name, True):
            del place[name]
