"""What every statement takes for granted: names, and how an instant is written. Imported without the tables."""

from __future__ import annotations

from datetime import datetime, timezone

SCHEMA = "billing_orchestration"
# The service's own, in the order in which one refers to the next.
SERVICE_TABLES = ("plans", "prices", "payment_providers", "subscriptions", "payments")


def naive_utc(instant: datetime) -> datetime:
    """An aware instant as the service's `timestamp without time zone` columns hold it. Refuses a naive one."""
    if instant.tzinfo is None:
        raise ValueError("a naive instant must not reach the database")
    return instant.astimezone(timezone.utc).replace(tzinfo=None)


def sql_list(*labels: str) -> str:
    """Words of ours as a list in SQL, such as `IN ('PLANNED', 'UNKNOWN')`: indexes serve words, not parameters."""
    return f"({', '.join(repr(label) for label in labels)})"


# A setting of each session: the ids of this shop's rows in payment_providers. Without it all rows are this shop's.
PROVIDER_IDS = f"{SCHEMA}.provider_ids"
_PROVIDER_IDS = f"(SELECT nullif(current_setting('{PROVIDER_IDS}', true), ''))"


def session_of_shop(provider_ids: str | None) -> dict[str, str]:
    """What each session of a run is told. None: all payment providers are this shop's."""
    return {PROVIDER_IDS: provider_ids} if provider_ids else {}


def of_this_shop(column: str) -> str:
    """SQL that is true for an id of this shop's payment providers. Every statement that reads `payments` uses it.

    But for three that must see more: the customer's grants (whoever paid for them), `explain`, and the duplicates
    that no unique index can be built on.
    """
    return f"({_PROVIDER_IDS} IS NULL OR {column} = ANY (CAST(string_to_array({_PROVIDER_IDS}, ',') AS bigint[])))"


def of_this_shop_first(row: str) -> str:
    """SQL for rows of `payments` that are looked up by the provider's payment id: this shop's rows.

    Another shop's counts only where this shop has none with that id: what was granted there is not granted again, and
    what is unfinished there is a contradiction for a person.
    """
    # A count, where EXISTS might be answered by one scan of the whole table.
    return f"""({of_this_shop(f"{row}.payment_provider_id")} OR 0 = (
        SELECT count(*) FROM payments o
        WHERE o.external_payment_id = {row}.external_payment_id AND {of_this_shop("o.payment_provider_id")}))"""


def readable(column: str) -> str:
    """SQL for a timestamp that Python can compute with in any zone, else NULL: real data has 'infinity' and worse."""
    return f"CASE WHEN {column} >= '0002-01-01' AND {column} < '9999-01-01' THEN {column} END"
