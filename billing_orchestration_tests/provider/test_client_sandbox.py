"""The client against the sandbox provider: the provider's own ledger says whether money moved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from itertools import count
from threading import Event
from typing import Any

import pytest

from billing_orchestration.domain.money import Money
from billing_orchestration.provider.client import PaymentProvider, Timeouts
from billing_orchestration.provider.errors import (
    Forbidden,
    IncompleteSlice,
    OutcomeUnknown,
    PaymentNotFound,
    RateLimited,
    RequestRejected,
    StillProcessing,
    WrongCredentials,
)
from billing_orchestration.provider.pacing import map_concurrently
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration.threads import OF_THE_SYSTEM

METADATA = {"attempt_id": "a-1", "subscription_id": "7", "user_id": "u-1", "plan_id": "3", "payment_provider_id": "1"}
NOW = datetime(2026, 3, 1, 10, 0, tzinfo=timezone.utc)
MINUTE = timedelta(minutes=1)


def renewal(method_id: str, **other: Any) -> str:
    return json.dumps(
        {
            "amount": {"value": "499.00", "currency": "RUB"},
            "capture": True,
            "payment_method_id": method_id,
            "description": "Продление подписки",
            "metadata": METADATA,
            **other,
        },
        ensure_ascii=False,
    )


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def provider(sandbox: Sandbox, waits: list[float]) -> Iterator[PaymentProvider]:
    client = PaymentProvider(
        shop_id=sandbox.shop_id,
        secret_key=sandbox.secret_key,
        api_url=sandbox.url,
        timeouts=Timeouts(connect_s=2, charge_read_s=0.8, read_s=0.8),
        sleep=waits.append,
    )
    yield client
    client.close()


def test_a_renewal_is_charged_and_tells_its_new_id_and_its_old_method(
    sandbox: Sandbox, provider: PaymentProvider
) -> None:
    method = sandbox.provider.add_method("saved-1")
    told = provider.create_payment(renewal(method.id), "key-1")
    assert (told.status, told.money) == ("succeeded", Money(Decimal("499.00"), "RUB"))
    assert (told.method_id, told.method_type, told.method_saved) == ("saved-1", "bank_card", True)
    assert told.id != "saved-1"
    assert told.metadata == METADATA
    assert told.captured_at is not None
    assert provider.get_payment(told.id) == told
    (charge,) = sandbox.provider.charges()
    assert (charge.payment_id, charge.idempotence_key) == (told.id, "key-1")
    assert sandbox.requests[0].body == renewal(method.id).encode()


def test_the_same_key_and_bytes_charge_once_whatever_the_first_answer_was(
    sandbox: Sandbox, provider: PaymentProvider
) -> None:
    method = sandbox.provider.add_method()
    effects = [
        "cut_before", "cut_after", "reset_before", "reset_after", "error_before", "error_after", "silence_before",
        "silence_after", "processing_before", "processing_after", "html_before", "html_after", "truncated", "drip",
    ]  # fmt: skip
    for effect in effects:
        rule = sandbox.misbehave("create", effect, seconds=3.0)
        with pytest.raises(OutcomeUnknown) as raised:
            provider.create_payment(renewal(method.id), f"key-{effect}")
        assert rule.fired == 1, effect
        assert raised.value.timed_out == (effect.startswith("silence") or effect == "drip"), effect
        assert isinstance(raised.value, StillProcessing) == effect.startswith("processing")
        assert sandbox.count("create") == 1, "a charge is never repeated by the client"
        moved_before = len(sandbox.provider.charges())
        assert moved_before == (0 if effect.endswith("before") else 1), effect

        told = provider.create_payment(renewal(method.id), f"key-{effect}")
        assert told.status == "succeeded"
        assert [charge.payment_id for charge in sandbox.provider.charges()] == [told.id], effect
        first, second = sandbox.requests
        assert first.body == second.body
        sandbox.reset()
        method = sandbox.provider.add_method()


def test_a_429_moves_nothing_and_is_told_with_the_wish(
    sandbox: Sandbox, provider: PaymentProvider, waits: list[float]
) -> None:
    method = sandbox.provider.add_method()
    sandbox.misbehave("create", "too_many_requests", retry_after_s=3)
    with pytest.raises(RateLimited) as raised:
        provider.create_payment(renewal(method.id), "key-1")
    assert raised.value.retry_after_s == 3
    assert sandbox.provider.charges() == []
    assert provider.rate.turns(1) == 0
    provider.check()
    assert waits == [pytest.approx(3, abs=0.5)]
    provider.create_payment(renewal(method.id), "key-1")
    assert len(sandbox.provider.charges()) == 1


def test_a_decline_is_an_answer_not_an_error(sandbox: Sandbox, provider: PaymentProvider) -> None:
    method = sandbox.provider.add_method(script="canceled:insufficient_funds")
    told = provider.create_payment(renewal(method.id), "key-1")
    assert (told.status, told.cancellation_reason) == ("canceled", "insufficient_funds")
    assert told.cancellation_party
    assert sandbox.provider.charges() == []


def test_what_the_provider_rejects_moves_nothing(sandbox: Sandbox, provider: PaymentProvider) -> None:
    method = sandbox.provider.add_method()
    with pytest.raises(RequestRejected, match="metadata"):
        provider.create_payment(renewal(method.id, metadata={f"k{n}": "v" for n in range(17)}), "key-1")
    sandbox.misbehave("create", "forbidden")
    with pytest.raises(Forbidden):
        provider.create_payment(renewal(method.id), "key-2")
    assert sandbox.provider.charges() == []


def test_a_used_key_with_other_bytes_is_unknown_for_the_first_may_have_charged(
    sandbox: Sandbox, provider: PaymentProvider
) -> None:
    method = sandbox.provider.add_method()
    provider.create_payment(renewal(method.id), "key-1")
    with pytest.raises(OutcomeUnknown, match="knows this key already"):
        provider.create_payment(renewal(method.id, description="Other"), "key-1")


def test_wrong_credentials_stop_after_one_request(sandbox: Sandbox) -> None:
    stranger = PaymentProvider(shop_id=sandbox.shop_id, secret_key="test_not-the-key", api_url=sandbox.url)
    with pytest.raises(WrongCredentials):
        list(map_concurrently(stranger.get_payment, [f"id-{n}" for n in range(50)], 8, threads=OF_THE_SYSTEM))
    assert sandbox.count() == 1
    with pytest.raises(WrongCredentials):
        stranger.fetch_slice(NOW, NOW)
    with pytest.raises(WrongCredentials):
        stranger.check()
    assert sandbox.count() == 3


def test_a_wrong_path_is_told_with_a_hint_at_the_url(sandbox: Sandbox, provider: PaymentProvider) -> None:
    provider.check()
    lost = PaymentProvider(
        shop_id=sandbox.shop_id, secret_key=sandbox.secret_key, api_url=sandbox.url.replace("/v3", "/v4")
    )
    with pytest.raises(OutcomeUnknown, match="YOOKASSA_API_URL"):
        lost.check()


def test_a_slice_holds_what_was_created_or_captured_in_the_window_each_once(
    sandbox: Sandbox, provider: PaymentProvider
) -> None:
    window = (NOW - 60 * MINUTE, NOW)
    add = sandbox.provider.add_payment
    add(id="within", created_at=NOW - 30 * MINUTE)
    add(id="on-the-first-instant", created_at=NOW - 60 * MINUTE)
    add(id="on-the-last-instant", created_at=NOW)
    add(id="captured-late", created_at=NOW - timedelta(days=9), captured_at=NOW - MINUTE)
    add(id="captured-after", created_at=NOW - MINUTE, captured_at=NOW + MINUTE)
    add(id="before", created_at=NOW - 61 * MINUTE)
    add(id="after", created_at=NOW + timedelta(milliseconds=1))
    add(id="pending", status="pending", created_at=NOW - MINUTE)
    told = provider.fetch_slice(*window)
    assert sorted(payment.id for payment in told.payments) == [
        "captured-after", "captured-late", "on-the-first-instant", "on-the-last-instant", "within",
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_a_slice_read_in_parts_side_by_side_is_the_same_slice(
    sandbox: Sandbox, provider: PaymentProvider, parts: int
) -> None:
    start = NOW - 60 * MINUTE
    history = [{"id": f"each-second-{n}", "created_at": start + timedelta(seconds=n)} for n in range(0, 3601, 10)]
    bounds = [start + (NOW - start) / parts * n for n in range(parts + 1)]
    history += [{"id": f"bound-{n}", "created_at": bound} for n, bound in enumerate(bounds)]
    history += [
        {"id": f"late-{n}", "created_at": start - timedelta(days=n + 1), "captured_at": bound}
        for n, bound in enumerate(bounds)
    ]
    sandbox.provider.add_payments(history)
    whole = provider.fetch_slice(start, NOW)
    told = provider.fetch_slice(start, NOW, parallel_windows=parts)
    assert {payment.id for payment in told.payments} == {str(one["id"]) for one in history}
    assert sorted(told.payments, key=lambda one: one.id) == sorted(whole.payments, key=lambda one: one.id)
    sandbox.misbehave("list", "html_before", times=None, skip=parts)
    with pytest.raises(IncompleteSlice):
        provider.fetch_slice(start, NOW, parallel_windows=parts)


@pytest.mark.parametrize("parts", [1, 4, None])
def test_a_slice_is_complete_when_payments_arrive_while_it_is_read(
    sandbox: Sandbox, provider: PaymentProvider, parts: int | None
) -> None:
    start = NOW - 60 * MINUTE
    instants = [start + timedelta(seconds=4 * n) for n in range(900)]
    before = sandbox.provider.add_payments([{"created_at": at} for at in instants])
    # Cash is paid days after it was ordered: only the list by capture tells these.
    before += sandbox.provider.add_payments(
        [{"created_at": at - timedelta(days=3), "captured_at": at} for at in instants]
    )
    too_many = sandbox.misbehave("list", "too_many_requests", times=3, skip=5)
    over = Event()

    def go_on_paying() -> None:
        """New ones at the head of the list, late captures of old ones, and a straggler in the midst of every page."""
        for n in count():
            sandbox.provider.add_payment(created_at=NOW - timedelta(milliseconds=n))
            sandbox.provider.add_payment(created_at=start - timedelta(days=1), captured_at=NOW)
            sandbox.provider.add_payment(created_at=start + timedelta(seconds=n % 3600))
            if over.wait(0.002):
                return

    with ThreadPoolExecutor(1) as service:
        service.submit(go_on_paying)
        try:
            told = provider.fetch_slice(start, NOW, parallel_windows=parts)
        finally:
            over.set()
    found = [payment.id for payment in told.payments]
    assert len(found) == len(set(found))
    assert {payment.id for payment in before} <= set(found)
    assert set(found) - {payment.id for payment in before}, "nothing arrived while it was read"
    assert too_many.fired == 3


@pytest.mark.parametrize(("payments", "requests"), [(0, 2), (100, 2), (300, 6)])
def test_a_short_slice_costs_no_request_more_than_its_pages(
    sandbox: Sandbox, provider: PaymentProvider, payments: int, requests: int
) -> None:
    sandbox.provider.add_payments([{"created_at": NOW - timedelta(seconds=n)} for n in range(payments)])
    told = provider.fetch_slice(NOW - 60 * MINUTE, NOW, parallel_windows=None)
    assert (len(told.payments), sandbox.count("list")) == (payments, requests)


def test_sixty_four_threads_charge_each_key_once(sandbox: Sandbox, provider: PaymentProvider) -> None:
    patient = PaymentProvider(shop_id=sandbox.shop_id, secret_key=sandbox.secret_key, api_url=sandbox.url)
    method = sandbox.provider.add_method()
    sandbox.misbehave("create", "none", delay_s=0.02, times=None)
    with ThreadPoolExecutor(64) as threads:
        told = list(threads.map(lambda n: patient.create_payment(renewal(method.id), f"key-{n}"), range(256)))
    assert len({payment.id for payment in told}) == 256
    assert len(sandbox.provider.charges()) == 256
    assert sandbox.peak_in_flight > 16
    patient.close()


# --- The provider's clock


def test_the_date_of_any_answer_tells_how_far_the_clock_there_is_ahead(
    sandbox: Sandbox, provider: PaymentProvider
) -> None:
    assert provider.clock_offset is None
    provider.check()
    assert provider.clock_offset == timedelta(0)
    for hours in (3, -3):
        sandbox.clock.run(timedelta(hours=hours))
        for _ in range(3):
            with pytest.raises(PaymentNotFound):
                provider.get_payment("22e12f66-000f-5000-8000-18db351245c7")
        offset = provider.clock_offset
        assert offset is not None
        assert abs(offset - timedelta(hours=hours)) < timedelta(seconds=60)
        assert provider.is_clock_suspicious


def test_answers_without_a_date_tell_nothing_and_are_asked_for_once(
    sandbox: Sandbox, provider: PaymentProvider
) -> None:
    sandbox.provider.switches.date_header = False
    provider.make_sure_of_clock()
    assert (provider.clock_offset, sandbox.count()) == (None, 1)


def test_a_clock_that_is_right_costs_one_request_and_one_that_is_wrong_three(
    sandbox: Sandbox, provider: PaymentProvider
) -> None:
    provider.make_sure_of_clock()
    provider.make_sure_of_clock()
    assert sandbox.count() == 1
    sandbox.clock.run(timedelta(hours=1))
    provider.check()
    provider.make_sure_of_clock()
    assert sandbox.count() == 1 + 3
    provider.make_sure_of_clock()
    assert sandbox.count() == 1 + 3


def test_a_provider_that_gives_no_answer_tells_no_time(sandbox: Sandbox, provider: PaymentProvider) -> None:
    sandbox.misbehave("any", "cut_before", times=None)
    with pytest.raises(OutcomeUnknown):
        provider.make_sure_of_clock()
    sandbox.behave()
    # A refusal is an answer, and has its date.
    sandbox.misbehave("any", "forbidden", times=None)
    provider.make_sure_of_clock()
    assert provider.clock_offset == timedelta(0)
