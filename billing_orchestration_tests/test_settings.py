"""Settings: each fault named with its variable, all of them at once, and never the value of a secret."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from billing_orchestration.resources import receipt_rules
from billing_orchestration.settings import (
    PRODUCTION_API_URL,
    SettingsError,
    load_database_url,
    load_settings,
    load_ui_settings,
    load_what_is_right,
    partition_first_day,
    partition_timezone,
    reconciliation_partition_timezone,
)

REQUIRED = {
    "BILLING_DATABASE_URL": "postgresql://billing:secret-word@db.example:5432/billing",
    "YOOKASSA_SHOP_ID": "100500",
    "YOOKASSA_SECRET_KEY": "test_secret-key",
}
VARIABLES = (
    *REQUIRED,
    "YOOKASSA_API_URL",
    "YOOKASSA_CHARGE_DONE_S",
    "BILLING_TIMEZONE",
    "RECONCILIATION_TIMEZONE",
    "BILLING_LANGUAGE",
    "BILLING_FIRST_DAY",
    "PENDING_PAYMENT_TTL_DAYS",
    "SUBSCRIPTION_GRACE_DAYS",
    "RENEWAL_SHARDS",
    "RENEWAL_SHARDS_AT_ONCE",
    "RUN_HISTORY_DAYS",
    "RUN_HISTORY_CHANGED_DAYS",
    "EVIDENCE_DAYS",
    "DAGSTER_POSTGRES_URL",
    "ALERT_URLS",
    "HEARTBEAT_URL",
    "REPORT_URLS",
    "DAGSTER_UI_URL",
    "DOCS_URL",
    "UI_AUTH",
    "UI_HOSTS",
    "UI_READ_ONLY",
    "BILLING_RENEWAL_VIEW",
    "CHARGE_DESCRIPTION",
    "YOOKASSA_GATEWAY_ID",
    "YOOKASSA_PROVIDER_IDS",
    "FOREIGN_PAYMENTS",
    "MATCHING_LOOK_FIRST",
    "RECEIPTS",
    "RECEIPT_VAT_CODE",
    "RECEIPT_PAYMENT_MODE",
    "RECEIPT_PAYMENT_SUBJECT",
    "RECEIPT_MEASURE",
    "RECEIPT_TAX_SYSTEM_CODE",
    "RECEIPT_FALLBACK_EMAIL",
    "RECEIPT_ITEM",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment of its own, in an empty working directory, with what has no default."""
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in REQUIRED.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def fault() -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings()
    text = str(caught.value)
    assert "\n" not in text
    assert "secret" not in text.replace("SECRET_KEY", "").replace("secret key", "")
    return text


def test_three_settings_are_enough_and_the_rest_has_defaults() -> None:
    settings = load_settings()
    assert settings.billing_database_url == "postgresql+psycopg://billing:secret-word@db.example:5432/billing"
    assert settings.yookassa_shop_id == "100500"
    assert settings.yookassa_secret_key.get_secret_value() == "test_secret-key"
    assert settings.yookassa_api_url == PRODUCTION_API_URL == "https://api.yookassa.ru/v3"
    assert settings.billing_timezone.key == "UTC"
    assert settings.pending_payment_ttl_days == 7
    assert settings.subscription_grace_days == 3
    assert (settings.run_history_days, settings.run_history_changed_days) == (30, 365)
    assert settings.dagster_postgres_url is None
    assert settings.first_partition_day == date(2026, 1, 1)


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("value", [None, "", "   "])
def test_a_missing_setting_is_named_with_the_way_out_and_an_empty_one_counts_as_missing(
    environment: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    if value is None:
        environment.delenv(name)
    else:
        environment.setenv(name, value)
    assert fault().startswith(f"{name} is not set: put ")


def test_an_empty_setting_that_has_a_default_is_the_default(environment: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        if name not in REQUIRED:
            environment.setenv(name, " ")
    settings = load_settings()
    assert settings.yookassa_api_url == PRODUCTION_API_URL
    assert settings.first_partition_day == date(2026, 1, 1)
    assert settings.dagster_postgres_url is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("BILLING_DATABASE_URL", "mysql://u:secret@h/db", "must begin with postgresql://"),
        ("ALERT_URLS", "secret-token", "must hold URLs of the apprise library"),
        ("DAGSTER_UI_URL", "localhost:3000", "is not an http(s) URL"),
        ("DAGSTER_UI_URL", "http://[secret/", "is not a URL"),
        ("DOCS_URL", "docs/operations.md", "is not an http(s) URL"),
        ("UI_AUTH", "vera:secret", "begins with neither basic: nor header:"),
        ("UI_AUTH", "basic:vera:secret", "without the hash of a password"),
        ("UI_AUTH", "basic:secret", "without the hash of a password"),
        ("UI_AUTH", "header:X Secret", "names no header"),
        ("UI_AUTH", "header:X-Forwarded-User from secret", "must name the proxy by addresses or networks"),
        ("UI_HOSTS", "https://secret.example", "must hold names as a browser shows them"),
        ("UI_HOSTS", "*.secret.example", "must hold names as a browser shows them"),
        ("UI_READ_ONLY", "secret", "must be yes or no"),
        ("RECONCILIATION_TIMEZONE", "secret", "not a time zone"),
        ("BILLING_LANGUAGE", "secret", "is not a language; use ru or en"),
        ("YOOKASSA_SHOP_ID", "100500:test_secret", "is not the shop's number"),
        ("YOOKASSA_SHOP_ID", "live_swapped", "holds a secret key"),
        ("YOOKASSA_SHOP_ID", "100 500", "is not the shop's number"),
        ("YOOKASSA_SECRET_KEY", "test_secret key", "holds a space"),
        ("YOOKASSA_SECRET_KEY", "тест_secret", "outside ASCII"),
        ("YOOKASSA_SECRET_KEY", "test_secret\nX-Header: 1", "holds a space"),
        ("YOOKASSA_API_URL", "api.yookassa.ru/v3", "not an http(s) URL"),
        ("YOOKASSA_API_URL", "ftp://api.yookassa.ru/v3", "not an http(s) URL"),
        ("YOOKASSA_API_URL", "https:///v3", "not an http(s) URL"),
        ("YOOKASSA_API_URL", "https://[::1/v3", "not a URL"),
        ("YOOKASSA_API_URL", "https://h:port/v3", "not a URL"),
        ("YOOKASSA_API_URL", "https://shop:secret@h/v3", "no user and password"),
        ("YOOKASSA_API_URL", "https://h/v3?x=secret", "without ? and #"),
        ("YOOKASSA_API_URL", "http://secret.yookassa.ru/v3", "would travel in clear"),
        ("YOOKASSA_API_URL", "http://127.0.0.1.example.com/v3", "would travel in clear"),
        ("YOOKASSA_API_URL", "http://10.0.0.1/v3", "would travel in clear"),
        ("YOOKASSA_API_URL", "http://secret.localhost/v3", "would travel in clear"),
        ("YOOKASSA_CHARGE_DONE_S", "44.9", "is below 45, which is only for the sandbox"),
        ("YOOKASSA_CHARGE_DONE_S", "secret", "from 45 to 600"),
        ("YOOKASSA_CHARGE_DONE_S", "601", "from 45 to 600"),
        ("YOOKASSA_CHARGE_DONE_S", "nan", "from 45 to 600"),
        ("BILLING_RENEWAL_VIEW", "secret; DROP TABLE plans", "is not a view's name"),
        ("CHARGE_DESCRIPTION", "{secret}", "a name in braces"),
        ("RECEIPTS", "secret", "is none of off, with_payment"),
        ("RECEIPTS", "with_payment", "needs RECEIPT_VAT_CODE and RECEIPT_PAYMENT_MODE"),
        ("RECEIPT_VAT_CODE", "0", "from 1 to 12"),
        ("RECEIPT_VAT_CODE", "13", "from 1 to 12"),
        ("RECEIPT_VAT_CODE", "secret", "from 1 to 12"),
        ("RECEIPT_PAYMENT_MODE", "secret", "is none of advance"),
        ("RECEIPT_PAYMENT_SUBJECT", "Secret service", "is not one of the provider's words"),
        ("RECEIPT_TAX_SYSTEM_CODE", "7", "from 1 to 6"),
        ("RECEIPT_FALLBACK_EMAIL", "secret", "is not an email address"),
        ("RECEIPT_ITEM", "{secret}", "a name in braces"),
        ("YOOKASSA_PROVIDER_IDS", "1;3", "ids of payment_providers"),
        ("FOREIGN_PAYMENTS", "yes", "none of ignore, quarantine"),
        ("MATCHING_LOOK_FIRST", "yes", "none of off, on"),
        ("BILLING_TIMEZONE", "live_secret", "not a time zone"),
        ("BILLING_TIMEZONE", "Europe", "not a time zone"),
        ("BILLING_TIMEZONE", "../../etc/passwd", "not a time zone"),
        ("BILLING_TIMEZONE", "/etc/localtime", "not a time zone"),
        ("BILLING_TIMEZONE", "+03:00", "not a time zone"),
        ("PENDING_PAYMENT_TTL_DAYS", "0", "from 1 to 3650"),
        ("PENDING_PAYMENT_TTL_DAYS", "a week", "from 1 to 3650"),
        ("PENDING_PAYMENT_TTL_DAYS", "7.5", "from 1 to 3650"),
        ("PENDING_PAYMENT_TTL_DAYS", "999999999999", "from 1 to 3650"),
        ("SUBSCRIPTION_GRACE_DAYS", "-1", "from 0 to 3650"),
        ("RUN_HISTORY_DAYS", "0", "from 1 to 3650"),
        ("RUN_HISTORY_CHANGED_DAYS", "live_secret", "from 1 to 3650"),
        ("BILLING_FIRST_DAY", "live_secret", "write it as 2026-01-31"),
        ("BILLING_FIRST_DAY", "2026-02-30", "write it as 2026-01-31"),
        ("DAGSTER_POSTGRES_URL", "postgresql+psycopg://u:secret@h/db", "names psycopg 3"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line_without_a_secret(
    environment: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    environment.setenv(name, value)
    text = fault()
    assert text.startswith(f"{name} ")
    assert words in text


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"RECEIPTS": "with_payment", "RECEIPT_PAYMENT_MODE": "full_payment", "RECEIPT_VAT_CODE": "13"},
         "RECEIPT_VAT_CODE"),
        ({"RENEWAL_SHARDS_AT_ONCE": "2", "RENEWAL_SHARDS": "many"}, "RENEWAL_SHARDS"),
        ({"YOOKASSA_CHARGE_DONE_S": "3", "YOOKASSA_API_URL": "http://127.0.0.1:port/v3"}, "YOOKASSA_API_URL"),
    ],
    ids=["receipts", "shards", "sandbox"],
)  # fmt: skip
def test_a_wrong_setting_that_another_needs_is_the_only_fault(
    environment: pytest.MonkeyPatch, given: dict[str, str], wrong: str
) -> None:
    for name, value in given.items():
        environment.setenv(name, value)
    assert set(load_what_is_right()[1]) == {wrong}
    assert fault().startswith(f"{wrong} ")


def test_all_faults_are_told_at_once(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("YOOKASSA_SHOP_ID")
    environment.setenv("BILLING_TIMEZONE", "Moscow")
    environment.setenv("SUBSCRIPTION_GRACE_DAYS", "many")
    assert [part.split()[0] for part in fault().split("; ") if part.split()[0].isupper()] == [
        "YOOKASSA_SHOP_ID",
        "BILLING_TIMEZONE",
        "SUBSCRIPTION_GRACE_DAYS",
    ]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("https://api.yookassa.ru/v3/", "https://api.yookassa.ru/v3"),
        ("http://127.0.0.1:8080/v3//", "http://127.0.0.1:8080/v3"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://[::1]:8080/v3", "http://[::1]:8080/v3"),
    ],
)
def test_a_trailing_slash_goes_and_plain_http_is_for_this_machine(
    environment: pytest.MonkeyPatch, given: str, read: str
) -> None:
    environment.setenv("YOOKASSA_API_URL", given)
    assert load_settings().yookassa_api_url == read


def test_only_a_sandbox_may_be_said_to_finish_its_charges_sooner(environment: pytest.MonkeyPatch) -> None:
    assert load_settings().yookassa_charge_done_s == 45.0
    environment.setenv("YOOKASSA_API_URL", "http://127.0.0.1:8080/v3")
    environment.setenv("YOOKASSA_CHARGE_DONE_S", "3")
    assert load_settings().yookassa_charge_done_s == 3.0


def test_an_env_file_is_read_and_the_environment_goes_before_it(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.delenv("YOOKASSA_SHOP_ID")
    (tmp_path / ".env").write_text(
        "# the shop\nYOOKASSA_SHOP_ID=424242\nYOOKASSA_SECRET_KEY=from-file\nBILLING_TIMEZONE='Asia/Tokyo'\n"
        "BILLING_FIRST_DAY=2026-03-01\nSOMETHING_ELSE=1\n"
    )
    settings = load_settings()
    assert settings.yookassa_shop_id == "424242"
    assert settings.yookassa_secret_key.get_secret_value() == "test_secret-key"
    assert settings.billing_timezone.key == partition_timezone() == "Asia/Tokyo"
    assert settings.first_partition_day == partition_first_day() == date(2026, 3, 1)


def test_days_are_reconciled_in_the_billing_time_zone_unless_another_is_set(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("BILLING_TIMEZONE", "Asia/Tokyo")
    assert load_settings().reconciliation_zone.key == reconciliation_partition_timezone() == "Asia/Tokyo"
    environment.setenv("RECONCILIATION_TIMEZONE", "Europe/Moscow")
    assert load_settings().reconciliation_zone.key == reconciliation_partition_timezone() == "Europe/Moscow"
    environment.setenv("RECONCILIATION_TIMEZONE", "Moscow")
    assert reconciliation_partition_timezone() == "Asia/Tokyo"


def test_an_env_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"YOOKASSA_SHOP_ID=\xff\xfe\x00")
    assert fault().startswith(".env cannot be read as UTF-8 text")
    assert partition_timezone() == "UTC"


def test_the_example_file_lists_every_setting_and_holds_the_defaults(environment: pytest.MonkeyPatch) -> None:
    example = Path(__file__).parents[1] / ".env.example"
    lines = [line for line in example.read_text().splitlines() if line and not line.startswith("#")]
    assert sorted(line.split("=")[0] for line in lines) == sorted(VARIABLES)
    without_file = load_settings()
    Path(".env").write_text(example.read_text())
    assert load_settings() == without_file


def test_neither_text_nor_representation_of_the_settings_shows_a_secret(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("DAGSTER_POSTGRES_URL", "postgresql://u:secret-too@h/dagster")
    environment.setenv("ALERT_URLS", "mailto://u:secret-mail@h, tgram://secret-token/1")
    settings = load_settings()
    assert "secret-" not in f"{settings!r} {settings}"


def test_settings_cannot_be_changed_after_they_were_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().billing_database_url = "postgresql://elsewhere/db"


@pytest.mark.parametrize("value", ["Moscow", "Europe", "", "../x", "\x00"])
def test_definitions_load_with_a_wrong_time_zone_and_the_run_names_it(
    environment: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    (tmp_path / ".env").write_text(f"BILLING_TIMEZONE={value}\nBILLING_FIRST_DAY={value}\n")
    assert partition_timezone() == "UTC"
    assert partition_first_day() == date(2026, 1, 1)


def test_definitions_load_without_any_setting(environment: pytest.MonkeyPatch) -> None:
    for name in REQUIRED:
        environment.delenv(name)
    assert partition_timezone() == "UTC"
    assert partition_first_day() == date(2026, 1, 1)


def test_migrate_needs_the_database_url_alone(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("YOOKASSA_SECRET_KEY")
    environment.setenv("BILLING_TIMEZONE", "Moscow")
    assert load_database_url() == "postgresql+psycopg://billing:secret-word@db.example:5432/billing"
    environment.delenv("BILLING_DATABASE_URL")
    with pytest.raises(SettingsError, match=r"^BILLING_DATABASE_URL is not set: put [^;]*$"):
        load_database_url()


def test_the_webserver_needs_neither_shop_nor_database(environment: pytest.MonkeyPatch) -> None:
    for name in REQUIRED:
        environment.delenv(name)
    environment.setenv("DAGSTER_UI_URL", "https://Dagster.example/billing")
    environment.setenv("UI_HOSTS", "other.example, 10.0.0.5:3000")
    environment.setenv("UI_READ_ONLY", "yes")
    settings = load_ui_settings()
    assert settings.ui_names == {"dagster.example", "other.example", "10.0.0.5:3000"}
    assert (settings.ui_login, settings.ui_read_only) == (None, True)
    environment.setenv("UI_AUTH", "nobody")
    with pytest.raises(SettingsError, match=r"^UI_AUTH begins"):
        load_ui_settings()


def test_what_is_right_can_be_used_beside_what_is_wrong(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("BILLING_TIMEZONE", "Moscow")
    environment.setenv("BILLING_FIRST_DAY", "soon")
    environment.setenv("PENDING_PAYMENT_TTL_DAYS", "9")
    environment.delenv("YOOKASSA_SECRET_KEY")
    settings, faults = load_what_is_right()
    assert set(faults) == {"BILLING_TIMEZONE", "BILLING_FIRST_DAY", "YOOKASSA_SECRET_KEY"}
    assert settings.pending_payment_ttl_days == 9
    assert settings.yookassa_shop_id == "100500"
    assert settings.billing_timezone.key == "UTC"


@pytest.mark.parametrize(("key", "live"), [("live_abc", True), ("test_abc", False), ("abc", False)])
def test_a_live_shop_is_known_by_its_key(environment: pytest.MonkeyPatch, key: str, live: bool) -> None:
    environment.setenv("YOOKASSA_SECRET_KEY", key)
    assert load_settings().is_live_shop is live


def test_a_shop_with_receipts_needs_what_its_accountant_says(environment: pytest.MonkeyPatch) -> None:
    assert receipt_rules(load_settings()) is None
    environment.setenv("RECEIPTS", "with_payment")
    environment.setenv("RECEIPT_VAT_CODE", "12")
    assert fault().startswith("RECEIPTS needs RECEIPT_PAYMENT_MODE:")
    environment.setenv("RECEIPT_PAYMENT_MODE", "full_prepayment")
    rules = receipt_rules(load_settings())
    assert rules is not None
    assert (rules.vat_code, rules.payment_mode, rules.payment_subject, rules.measure, rules.tax_system_code) == (
        12, "full_prepayment", "service", "piece", None,
    )  # fmt: skip
