"""What autopayment_job meets: subscriptions whose day has come, and cards of every kind."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, time, timedelta, timezone
from functools import partial

from billing_orchestration.sandbox.example_data.book import Book
from billing_orchestration.sandbox.example_data.dates import day_31_before, month_ends, months, periods
from billing_orchestration.sandbox.example_data.records import AUTOPAYMENT_JOB, Expectation

RENEWED = Expectation(status="ACTIVE", attempt="SUCCEEDED", charges=1, grant="renewed")
NOT_CHARGED = Expectation(status="ACTIVE", attempt="", charges=0, grant="")


def ordinary(book: Book) -> None:
    """Charged, and one period longer."""
    case, now, ended = partial(book.case, AUTOPAYMENT_JOB), book.now, book.ago(hours=3)
    case("ordinary monthly subscriptions, ended today or yesterday", "charged once, one period longer", RENEWED,
         [book.due(book.ago(hours=0.4 + number * 0.6)) for number in range(36)])  # fmt: skip
    tonight = datetime.combine(now.date(), time(23, 59), timezone.utc)
    case("ends later today (23:59): due today", "charged once, one period longer", RENEWED,
         [book.due(tonight) for _ in range(3)])  # fmt: skip
    last, after = month_ends(now)
    case(f"month end: bought on a 31st, ended {last:%d %B}", f"until {after:%d %B}: the 31st stays the anchor",
         replace(RENEWED, until=f"{after:%Y-%m-%d}"),
         [book.due(last, started_at=day_31_before(last, book.now)) for _ in range(2)])  # fmt: skip
    for plan, count, length in ((book.yearly, 3, "a year"), (book.ten_days, 4, "10 days"),
                                (book.quarterly, 2, "3 months")):  # fmt: skip
        end = f"{periods(ended, plan, 1):%Y-%m-%d}"
        case(f"plan “{plan.name}”", f"charged {plan.price()} RUB, {length} longer: {end}", replace(RENEWED, until=end),
             [book.due(ended, plan) for _ in range(count)])  # fmt: skip
    case("first paid in dollars", "charged the plan's dollar price", RENEWED,
         [book.due(ended, currency="USD") for _ in range(2)])  # fmt: skip


def declined(book: Book) -> None:
    """Declined, or left open."""
    case, hours = partial(book.case, AUTOPAYMENT_JOB), 1.0
    for reason, count, expected, state in (
        ("insufficient_funds", 5, "declined (soft): stays ACTIVE, tried again tomorrow", "DECLINED"),
        ("card_expired", 4, "declined (hard): this period is not charged again", "STOPPED"),
        ("3d_secure_failed", 1, "declined, the customer must act: not charged again", "STOPPED"),
        ("general_decline", 3, "declined without a reason: at most two more tries", "DECLINED"),
        ("not_in_any_documentation", 1, "an unknown reason is never treated as hard", "DECLINED"),
    ):
        ends = [book.ago(hours=hours + 0.7 * number) for number in range(1, count + 1)]
        hours += 0.7 * count
        case(f"card declined: {reason}", expected, replace(NOT_CHARGED, attempt=state),
             [book.due(end, script=f"canceled:{reason}") for end in ends])  # fmt: skip
    case("the charge stays pending", "asked about daily, never sent again, not expired",
         replace(NOT_CHARGED, attempt="PENDING"),
         [book.due(book.ago(days=days, minutes=5), script="pending") for days in (1, 4)])  # fmt: skip
    case("the charge is pending, then succeeds", "the next run asks, and grants it once", RENEWED,
         book.due(book.ago(hours=5), script="pending:succeeded:2"))  # fmt: skip


def badly_answered(book: Book) -> None:
    """The answer is lost, or says nothing about the money."""
    case, hours = partial(book.case, AUTOPAYMENT_JOB), 10.8
    once = "same key again: charged once, granted once"
    for label, effect, count, times, expected in (
        ("the answer was lost after the charge", "cut_after", 2, 1, once),
        ("the request was lost before the charge", "cut_before", 1, 1, once),
        ("HTTP 500 after the charge", "error_after", 1, 1, once),
        ("a page of HTML instead of the answer", "html_after", 1, 1, once),
        ("charged, but no answer during the whole run", "cut_after", 1, None,
         "unknown; the next run sends the same key: one charge"),
    ):  # fmt: skip
        # Far apart in the queue: six failures in a row would open the breaker.
        ends = [book.ago(hours=hours + 2.3 * number) for number in range(1, count + 1)]
        hours += 2.3 * count
        case(label, expected, RENEWED, [book.fails(book.due(end), effect, times) for end in ends])


def not_charged(book: Book) -> None:
    """Due or not, with a reason not to charge."""
    case, yesterday = partial(book.case, AUTOPAYMENT_JOB), book.ago(hours=20)
    case("given for free: no saved method", "not charged, reported", NOT_CHARGED,
         [book.due(yesterday, bought=False) for _ in range(2)])  # fmt: skip
    case("the saved card is no longer active", "the provider is asked first: not charged, one person is told",
         NOT_CHARGED, book.due(yesterday, saved=False))  # fmt: skip
    case("the customer has withdrawn the consent (376-FZ)", "not charged, reported", NOT_CHARGED,
         book.due(yesterday, may_charge=False))  # fmt: skip
    case("no email and no phone for the receipt (54-FZ)", "not charged, one person is told, held back from expiry",
         NOT_CHARGED, book.due(book.ago(days=4), email=None))  # fmt: skip
    case("a plan without a price", "not charged, reported", NOT_CHARGED, book.due(yesterday, book.priceless))
    case("a plan with two prices in the same currency", "not charged, reported", NOT_CHARGED,
         book.due(yesterday, book.ambiguous))  # fmt: skip
    case("a plan that does not renew", "not charged", NOT_CHARGED,
         [book.due(yesterday, book.one_off) for _ in range(3)])  # fmt: skip
    case("paused, or canceled by the customer", "untouched",
         replace(NOT_CHARGED, status=None, until=f"{yesterday:%Y-%m-%d}"),
         [book.due(yesterday, status=status) for status in ("PAUSED", "CANCELED") * 2])  # fmt: skip
    later = [book.now + timedelta(days=1 + number % 28, hours=1 + number % 5) for number in range(90)]
    case("not due yet", "untouched", NOT_CHARGED, [book.due(end, started_at=months(end, -1)) for end in later])


def tried_before(book: Book) -> None:
    """What yesterday's runs left behind."""
    case, sent = partial(book.case, AUTOPAYMENT_JOB), book.ago(hours=26)
    case("declined (soft) yesterday, the card is covered today", "second try with a new key: renewed", RENEWED,
         [book.attempt(book.due(book.ago(hours=30)), "DECLINED", sent, reason="insufficient_funds",
                       decline_class="soft") for _ in range(2)])  # fmt: skip
    case("stopped by a hard decline yesterday", "not charged, even if the card would pay today",
         replace(NOT_CHARGED, attempt="STOPPED"),
         book.attempt(book.due(book.ago(hours=31)), "STOPPED", sent, reason="permission_revoked",
                      decline_class="hard"))  # fmt: skip
    case("outcome unknown for 26 h: the provider has forgotten the key", "not sent again: found by a search, granted",
         RENEWED, book.attempt(book.due(book.ago(hours=32)), "UNKNOWN", sent, charged_at=sent))  # fmt: skip
    case("unknown for 26 h: the provider never got it, a first search did not find it",
         "absent from a second search too: given up, charged once with a new key", RENEWED,
         book.attempt(book.due(book.ago(days=5)), "UNKNOWN", sent, absent_since=book.ago(hours=2)))  # fmt: skip
    case("pending since yesterday, paid in the meantime", "asked about: granted once", RENEWED,
         book.attempt(book.due(book.ago(hours=33)), "PENDING", sent, charged_at=book.ago(hours=20)))  # fmt: skip
