"""The environment, read and checked once: one line names each missing or wrong setting before anything else happens.

A value comes from the environment, else from `.env` in the working directory. An empty one counts as missing.
`load_settings` reports all faults together, each with its variable and the way out, and never quotes a value: a secret
may have been put into the wrong variable.
Definitions load without any setting: `partition_timezone`, `partition_first_day` and `renewal_sharding` never fail, and
the run names the fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date
from typing import Annotated, Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from billing_orchestration.database_address import read_address, read_run_history_address
from billing_orchestration.loopback import is_loopback
from billing_orchestration.ui_login import LoginProxy, Passwords, read_login

PRODUCTION_API_URL = "https://api.yookassa.ru/v3"
DEFAULT_TIMEZONE = "UTC"
DEFAULT_UI_URL = "http://localhost:3000"
DEFAULT_FIRST_DAY = date(2026, 1, 1)
# What customers and accountants read; the first is the default. Operators' texts are English.
LANGUAGES = ("ru", "en")
# Ten years. More is a typing error, and dates overflow.
LONGEST_SPAN_DAYS = 3650
_HOST_AND_PORT = re.compile(r"([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]+)?")
# As in domain/shards.py, which the webserver does without.
MOST_SHARDS = 256
# By then YooKassa has finished with a charge: it answers within 30 s, or with HTTP 500. A run waits for it, so there is
# an upper bound.
CHARGE_DONE_S = 45.0
LONGEST_CHARGE_S = 600.0


class SettingsError(ValueError):
    """Settings are missing or wrong. The text is one line; `faults` holds the same by variable."""

    def __init__(self, faults: dict[str, str]) -> None:
        super().__init__("; ".join(faults.values()))
        self.faults = faults


def _billing_address(text: str) -> str:
    return read_address(text).render_as_string(hide_password=False)


def _run_history_address(text: str) -> str:
    return read_run_history_address(text).render_as_string(hide_password=False)


def _api_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("is not a URL; it must look like " + PRODUCTION_API_URL) from None
    if parts.scheme not in {"http", "https"} or not host or any(sign.isspace() for sign in text):
        raise ValueError("is not an http(s) URL; it must look like " + PRODUCTION_API_URL)
    if parts.username is not None or parts.password is not None:
        raise ValueError("must hold no user and password; put them into YOOKASSA_SHOP_ID and YOOKASSA_SECRET_KEY")
    if parts.query or parts.fragment:
        raise ValueError("must end with the path, without ? and #, as in " + PRODUCTION_API_URL)
    if parts.scheme == "http" and not is_loopback(host):
        raise ValueError("is plain http to another machine: the secret key would travel in clear; use https")
    return text.rstrip("/")


def _credential(text: str) -> str:
    # Both travel in an HTTP Basic header, which other characters would break.
    if not all("!" <= sign <= "~" for sign in text):
        raise ValueError("holds a space or a character outside ASCII; copy it again from the shop's settings")
    return text


def _shop_id(text: str) -> str:
    if text.startswith(("live_", "test_")):
        raise ValueError("holds a secret key; put the shop's number here, and the key into YOOKASSA_SECRET_KEY")
    if not (text.isascii() and text.isdigit()):
        raise ValueError("is not the shop's number; it is digits alone, without the secret key")
    return text


def _timezone(value: str | ZoneInfo) -> ZoneInfo:
    if isinstance(value, ZoneInfo):
        return value
    try:
        return ZoneInfo(value)
    except (KeyError, ValueError, OSError):  # unknown, malformed, or the name of a whole folder of zones
        raise ValueError("is not a time zone; use an IANA name such as Europe/Moscow or UTC") from None


def _language(text: str) -> str:
    if text.lower() not in LANGUAGES:
        raise ValueError(f"is not a language; use {' or '.join(LANGUAGES)}")
    return text.lower()


def _day(value: str | date) -> date:
    if isinstance(value, date):
        return value
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise ValueError("is not a day; write it as 2026-01-31") from None


def _days(at_least: int) -> Callable[[str | int], int]:
    def check(value: str | int) -> int:
        try:
            days = int(value)
        except ValueError:
            days = -1
        if not at_least <= days <= LONGEST_SPAN_DAYS:
            raise ValueError(f"is not a whole number of days from {at_least} to {LONGEST_SPAN_DAYS}")
        return days

    return check


def _ui_url(text: str) -> str:
    try:
        parts = urlsplit(text)
    except ValueError:
        raise ValueError("is not a URL; it must look like " + DEFAULT_UI_URL) from None
    if parts.scheme not in {"http", "https"} or not parts.netloc or any(sign.isspace() for sign in text):
        raise ValueError("is not an http(s) URL; it must look like " + DEFAULT_UI_URL)
    return text.rstrip("/")


def _docs_url(text: str) -> str:
    try:
        return _ui_url(text)
    except ValueError:
        raise ValueError("is not an http(s) URL; it must name the folder of operations.md") from None


def _ui_auth(value: str | SecretStr) -> SecretStr:
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    read_login(text)
    return SecretStr(text)


def _ui_hosts(text: str) -> str:
    names = [name.strip().lower() for name in text.split(",")]
    if not all(_HOST_AND_PORT.fullmatch(name) for name in names):
        raise ValueError("must hold names as a browser shows them, with the port if it shows one, separated by commas")
    return ",".join(names)


def _yes_or_no(value: str | bool) -> bool:
    if isinstance(value, bool):
        return value
    if value not in {"yes", "no"}:
        raise ValueError("must be yes or no")
    return value == "yes"


def _heartbeat_url(value: str | SecretStr) -> SecretStr:
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.netloc or any(sign.isspace() for sign in text):
        raise ValueError("is not an http(s) URL; it must look like https://hc-ping.com/UUID")
    return SecretStr(text)


def _alert_urls(value: str | SecretStr) -> SecretStr:
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    # Only their form: `doctor` has the library read each.
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://\S", text.strip()):
        raise ValueError(
            "must hold URLs of the apprise library, separated by commas, as in mailto://... or tgram://..."
        )
    return SecretStr(text)


def _one_of(*values: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in values:
            raise ValueError(f"is none of {', '.join(sorted(values))}")
        return value

    return check


def _code(highest: int) -> Callable[[str | int], int]:
    def check(value: str | int) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= highest):
            raise ValueError(f"is not a whole number from 1 to {highest}")
        return int(text)

    return check


# What a receipt's item says about when it was paid.
_PAYMENT_MODES = (
    "advance", "credit", "credit_payment", "full_payment", "full_prepayment", "partial_payment", "partial_prepayment",
)  # fmt: skip


def _ids(value: str) -> str:
    ids = [part.strip() for part in value.split(",")]
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", id_) for id_ in ids):
        raise ValueError("must hold ids of payment_providers, separated by commas, such as 1 or 1,3")
    return ",".join(ids)


def _word(value: str) -> str:
    if not re.fullmatch(r"[a-z_]{1,64}", value):
        raise ValueError("is not one of the provider's words, such as service or piece")
    return value


def _email(value: str) -> str:
    if not re.fullmatch(r"[^@\s]+@[^@\s]+\.[^@\s.]+", value) or len(value) > 254:
        raise ValueError("is not an email address")
    return value


def _view_name(value: str) -> str:
    # It becomes part of statements.
    if not re.fullmatch(r"([a-z_][a-z0-9_]{0,62}\.)?[a-z_][a-z0-9_]{0,62}", value):
        raise ValueError("is not a view's name, in small letters, such as billing_renewals or public.billing_renewals")
    return value


def _template(*names: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if set(re.findall(r"\{([^{}]*)\}", value)) - set(names):
            raise ValueError(f"has a name in braces that is none of {', '.join(sorted(names))}")
        return value

    return check


# Where no value can be guessed, what to put there.
_WAYS_OUT = {
    "BILLING_DATABASE_URL": "the billing service's database, as postgresql://USER:PASSWORD@HOST:5432/DATABASE",
    "YOOKASSA_SHOP_ID": "the shop's id from its settings at the provider",
    "YOOKASSA_SECRET_KEY": "the shop's secret key from its settings at the provider (test_... or live_...)",
}


# Valid, and of no use.
_STAND_INS = {
    "billing_database_url": "postgresql://not-set.invalid/not_set",
    "yookassa_shop_id": "0",
    "yookassa_secret_key": "not-set",
}


class Settings(BaseSettings):
    """All settings, checked. `load_settings` builds it and words the faults."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        populate_by_name=True,
        validate_default=False,
    )

    billing_database_url: Annotated[str, BeforeValidator(_billing_address)] = Field(repr=False)
    yookassa_shop_id: Annotated[str, BeforeValidator(_shop_id)]
    yookassa_secret_key: SecretStr
    yookassa_api_url: Annotated[str, BeforeValidator(_api_url)] = PRODUCTION_API_URL
    yookassa_charge_done_s: float = CHARGE_DONE_S
    billing_timezone: Annotated[ZoneInfo, BeforeValidator(_timezone)] = ZoneInfo(DEFAULT_TIMEZONE)
    reconciliation_timezone: Annotated[ZoneInfo | None, BeforeValidator(_timezone)] = None
    billing_language: Annotated[str, BeforeValidator(_language)] = LANGUAGES[0]
    pending_payment_ttl_days: Annotated[int, BeforeValidator(_days(1))] = 7
    subscription_grace_days: Annotated[int, BeforeValidator(_days(0))] = 3
    run_history_days: Annotated[int, BeforeValidator(_days(1))] = 30
    run_history_changed_days: Annotated[int, BeforeValidator(_days(1))] = 365
    # Three years: as long as a customer can claim money back in most of the countries that these jobs serve.
    evidence_days: Annotated[int, BeforeValidator(_days(30))] = 1095
    dagster_postgres_url: Annotated[str | None, BeforeValidator(_run_history_address)] = Field(default=None, repr=False)
    alert_urls: Annotated[SecretStr | None, BeforeValidator(_alert_urls)] = None
    report_urls: Annotated[SecretStr | None, BeforeValidator(_alert_urls)] = None
    heartbeat_url: Annotated[SecretStr | None, BeforeValidator(_heartbeat_url)] = None
    dagster_ui_url: Annotated[str, BeforeValidator(_ui_url)] = DEFAULT_UI_URL
    docs_url: Annotated[str | None, BeforeValidator(_docs_url)] = None
    ui_auth: Annotated[SecretStr | None, BeforeValidator(_ui_auth)] = None
    ui_hosts: Annotated[str | None, BeforeValidator(_ui_hosts)] = None
    ui_read_only: Annotated[bool, BeforeValidator(_yes_or_no)] = False
    billing_renewal_view: Annotated[str | None, BeforeValidator(_view_name)] = None
    charge_description: Annotated[str | None, BeforeValidator(_template("plan", "period_start", "subscription_id"))] = (
        None
    )
    yookassa_gateway_id: Annotated[str | None, BeforeValidator(_credential)] = None
    yookassa_provider_ids: Annotated[str | None, BeforeValidator(_ids)] = None
    matching_look_first: Annotated[str, BeforeValidator(_one_of("on", "off"))] = "on"
    foreign_payments: Annotated[str, BeforeValidator(_one_of("ignore", "quarantine"))] = "ignore"
    receipt_vat_code: Annotated[int | None, BeforeValidator(_code(12))] = None
    receipt_payment_mode: Annotated[str | None, BeforeValidator(_one_of(*_PAYMENT_MODES))] = None
    receipt_payment_subject: Annotated[str, BeforeValidator(_word)] = "service"
    receipt_measure: Annotated[str, BeforeValidator(_word)] = "piece"
    receipt_tax_system_code: Annotated[int | None, BeforeValidator(_code(6))] = None
    receipt_fallback_email: Annotated[str | None, BeforeValidator(_email)] = Field(default=None, repr=False)
    receipt_item: Annotated[str, BeforeValidator(_template("plan", "period_start"))] = "{plan}"
    # After those that it needs.
    receipts: Annotated[str, BeforeValidator(_one_of("off", "with_payment"))] = "off"
    renewal_shards: Annotated[int | None, BeforeValidator(_code(MOST_SHARDS))] = None
    renewal_shards_at_once: Annotated[int | None, BeforeValidator(_code(MOST_SHARDS))] = None
    first_partition_day: Annotated[date, BeforeValidator(_day)] = Field(
        default=DEFAULT_FIRST_DAY, validation_alias="BILLING_FIRST_DAY"
    )

    @model_validator(mode="before")
    @classmethod
    def _blank_is_missing(cls, values: dict[str, Any]) -> dict[str, Any]:
        stripped = {name: value.strip() if isinstance(value, str) else value for name, value in values.items()}
        return {name: value for name, value in stripped.items() if value not in ("", None)}

    @field_validator("yookassa_secret_key", mode="before")
    @classmethod
    def _secret_key(cls, value: str | SecretStr) -> SecretStr:
        return SecretStr(_credential(value.get_secret_value() if isinstance(value, SecretStr) else value))

    @field_validator("yookassa_charge_done_s", mode="before")
    @classmethod
    def _charge_done_s(cls, value: str | float, info: ValidationInfo) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds <= LONGEST_CHARGE_S:
            raise ValueError(f"is not a number of seconds from {CHARGE_DONE_S:g} to {LONGEST_CHARGE_S:g}")
        # An address that is wrong is not among the data, and is a fault of its own.
        api_url = info.data.get("yookassa_api_url")
        if seconds < CHARGE_DONE_S and api_url and not is_loopback(urlsplit(api_url).hostname or ""):
            raise ValueError(
                f"is below {CHARGE_DONE_S:g}, which is only for the sandbox: the provider may still be at work on a"
                " charge, and a second one with its key could charge twice"
            )
        return seconds

    @field_validator("receipts")
    @classmethod
    def _complete(cls, receipts: str, info: ValidationInfo) -> str:
        needed = ("receipt_vat_code", "receipt_payment_mode")
        # One that is wrong is not among the data, and is a fault of its own.
        missing = [name.upper() for name in needed if info.data.get(name, "wrong") is None]
        if receipts != "off" and missing:
            raise ValueError(f"needs {' and '.join(missing)}: ask the shop's accountant")
        return receipts

    @field_validator("renewal_shards_at_once")
    @classmethod
    def _of_shards(cls, at_once: int | None, info: ValidationInfo) -> int | None:
        if at_once is not None and info.data.get("renewal_shards", "wrong") is None:
            raise ValueError("needs RENEWAL_SHARDS: into how many parts a renewal run is divided")
        return at_once

    @property
    def reconciliation_zone(self) -> ZoneInfo:
        """Where a reconciled day begins and ends: the billing time zone, unless another was set."""
        return self.reconciliation_timezone or self.billing_timezone

    @property
    def is_live_shop(self) -> bool:
        """Whether the secret key is a live shop's, where a test payment must never grant anything."""
        return self.yookassa_secret_key.get_secret_value().startswith("live_")

    @property
    def runbook(self) -> str:
        """The address of docs/operations.md: below DOCS_URL, else where `billing-orchestration webserver` serves it."""
        return f"{self.docs_url or f'{self.dagster_ui_url}/docs'}/operations.md"

    @property
    def ui_login(self) -> Passwords | LoginProxy | None:
        """Who may use the UI; None: everybody on this machine."""
        return None if self.ui_auth is None else read_login(self.ui_auth.get_secret_value())

    @property
    def ui_names(self) -> frozenset[str]:
        """Under which names, with their ports, the UI is opened, beside those of this machine."""
        return frozenset({urlsplit(self.dagster_ui_url).netloc.lower(), *(self.ui_hosts or "").split(",")} - {""})


def load_settings() -> Settings:
    """Read and check the environment. Raises SettingsError with every fault in one line."""
    settings, faults = load_what_is_right()
    if faults:
        raise SettingsError(faults)
    return settings


def load_database_url() -> str:
    """Read the one setting that `migrate` needs. Raises SettingsError."""
    return _load_only("BILLING_DATABASE_URL").billing_database_url


def load_ui_settings() -> Settings:
    """Read what the webserver needs; do not use the other settings. Raises SettingsError."""
    return _load_only("UI_AUTH", "UI_HOSTS", "UI_READ_ONLY", "DAGSTER_UI_URL")


def _load_only(*variables: str) -> Settings:
    settings, faults = load_what_is_right()
    wrong = {variable: fault for variable, fault in faults.items() if variable in {*variables, ".env"}}
    if wrong:
        raise SettingsError(wrong)
    return settings


def load_what_is_right() -> tuple[Settings, dict[str, str]]:
    """Read the environment for `doctor`: the settings, and the faults by variable.

    A setting with a fault holds its default or a stand-in. Do not use it.
    """
    try:
        return _read(".env")
    except (OSError, UnicodeDecodeError):
        settings, _ = _read(None)
        return settings, {
            ".env": ".env cannot be read as UTF-8 text: fix it, or remove it and set the variables themselves"
        }


def _read(env_file: str | None) -> tuple[Settings, dict[str, str]]:
    fields = {str(field.validation_alias or name): field for name, field in Settings.model_fields.items()}
    faults: dict[str, str] = {}
    # Arguments win over the environment.
    stand_ins: dict[str, Any] = {}
    while True:
        try:
            return Settings(_env_file=env_file, **stand_ins), faults  # type: ignore[call-arg]  # of BaseSettings
        except ValidationError as error:
            found = {_variable(fault): _in_words(fault) for fault in error.errors()}
        # What only misses a setting that has a stand-in by now gets one too, and is no fault of its own.
        faults = faults or found
        new = {
            name: _STAND_INS[name] if field.is_required() else field.default
            for name, field in fields.items()
            if name.upper() in found and name not in stand_ins
        }
        if not new:
            raise SettingsError(faults)
        stand_ins |= new


def _variable(fault: Any) -> str:
    return str(fault["loc"][0]).upper() if fault["loc"] else ".env"


def _in_words(fault: Any) -> str:
    variable = _variable(fault)
    if fault["type"] == "missing":
        return f"{variable} is not set: put {_WAYS_OUT[variable]}, into the environment or .env"
    return f"{variable} {fault['msg'].removeprefix('Value error, ')}"


class _ReadAtLoading(BaseSettings):
    """The texts behind what definitions are built of (partition grids, shards), unchecked."""

    model_config = Settings.model_config

    billing_timezone: str = DEFAULT_TIMEZONE
    reconciliation_timezone: str = ""
    billing_first_day: str = DEFAULT_FIRST_DAY.isoformat()
    renewal_shards: str = ""
    renewal_shards_at_once: str = ""


class _UiAddress(BaseSettings):
    """The text behind the links of the UI's pages, unchecked."""

    model_config = Settings.model_config

    dagster_ui_url: str = DEFAULT_UI_URL
    docs_url: str = ""


def ui_prefix() -> str:
    """The path of `DAGSTER_UI_URL`, before every other path of the UI: empty, or as `/dagster`. It never fails.

    An address that cannot be one gives no path: it may be a secret in the wrong variable.
    """
    try:
        return urlsplit(_ui_url(_UiAddress().dagster_ui_url.strip())).path
    except (ValueError, OSError):
        return ""


def runbook_link() -> str:
    """The runbook as a page of the UI links to it: `DOCS_URL`'s, else the webserver's own. It never fails."""
    try:
        folder = _ui_url(_UiAddress().docs_url.strip())
    except (ValueError, OSError):
        folder = f"{ui_prefix()}/docs"
    return f"{folder}/operations.md"


def partition_timezone() -> str:
    """The partition grid's time zone: `BILLING_TIMEZONE` if valid, else UTC."""
    try:
        return _timezone(_ReadAtLoading().billing_timezone.strip() or DEFAULT_TIMEZONE).key
    except (ValueError, OSError):
        return DEFAULT_TIMEZONE


def reconciliation_partition_timezone() -> str:
    """The same for the days that are reconciled: `RECONCILIATION_TIMEZONE` if given and valid."""
    try:
        name = _ReadAtLoading().reconciliation_timezone.strip()
        return _timezone(name).key if name else partition_timezone()
    except (ValueError, OSError):
        return partition_timezone()


def partition_first_day() -> date:
    """The partition grid's first day: `BILLING_FIRST_DAY` if valid, else the default."""
    try:
        return _day(_ReadAtLoading().billing_first_day.strip() or DEFAULT_FIRST_DAY)
    except (ValueError, OSError):
        return DEFAULT_FIRST_DAY


def renewal_sharding() -> tuple[int | None, int | None]:
    """`RENEWAL_SHARDS` and `RENEWAL_SHARDS_AT_ONCE`, None where not given; both None if one is not valid."""
    try:
        texts = _ReadAtLoading()
        shards, at_once = (
            _code(MOST_SHARDS)(text.strip()) if text.strip() else None
            for text in (texts.renewal_shards, texts.renewal_shards_at_once)
        )
    except (ValueError, OSError):
        return None, None
    return shards, at_once
