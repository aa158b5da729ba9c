"""What accountants read in a reconciliation's report, in Russian and English."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from billing_orchestration.domain.reconciled import CLASSES

SUMS_HEADER = (
    "day", "result", "currency", "lines", "paid at the provider", "fee", "refunded at the provider", "paid here",
    "refunded here",
)  # fmt: skip
LINES_HEADER = (
    "day", "result", "line", "id", "payment id", "time (UTC)", "status at the provider", "amount at the provider",
    "currency at the provider", "fee", "row", "status here", "amount here", "currency here", "rows here",
)  # fmt: skip
REGISTRY_HEADER = (
    "registry line", "id", "amount in the registry", "currency in the registry", "amount at the provider", "result",
    "difference",
)  # fmt: skip
WHY = "why"
NO_PAYMENTS = "there are no payments in this period, on either side"
_RUSSIAN: Mapping[str, str] = {
    "sums": "Суммы",
    "lines": "Строки",
    "differences": "Расхождения",
    "registry": "Реестр",
    "day": "День",
    "all days": "Все дни",
    "result": "Результат",
    "currency": "Валюта",
    "paid at the provider": "Оплачено у провайдера",
    "fee": "Комиссия",
    "refunded at the provider": "Возвращено у провайдера",
    "paid here": "Оплачено у нас",
    "refunded here": "Возвращено у нас",
    "paid there": "Оплачено у провайдера",
    "refunded there": "Возвращено у провайдера",
    NO_PAYMENTS: "за этот период платежей нет ни у провайдера, ни у нас",
    "line": "Операция",
    "payment": "платёж",
    "refund": "возврат",
    "id": "Идентификатор",
    "payment id": "Идентификатор платежа",
    "time (UTC)": "Время (UTC)",
    "status at the provider": "Статус у провайдера",
    "amount at the provider": "Сумма у провайдера",
    "currency at the provider": "Валюта у провайдера",
    "row": "Строка у нас",
    "status here": "Статус у нас",
    "amount here": "Сумма у нас",
    "currency here": "Валюта у нас",
    "rows here": "Строк у нас",
    "registry line": "Строка реестра",
    "amount in the registry": "Сумма в реестре",
    "currency in the registry": "Валюта в реестре",
    "difference": "Расхождение с реестром",
    WHY: "Причина",
    "agrees with the registry": "сходится",
    "not in the registry": "нет в реестре",
    "not at the provider": "нет у провайдера",
    "another amount or currency": "другая сумма или валюта",
    "another income": "другая сумма за вычетом комиссии",
    CLASSES["agrees"]: "сходится",
    CLASSES["paid_there"]: "оплачено у провайдера, у нас нет или не завершено",
    CLASSES["granted_to_nobody"]: "оплачено у провайдера, у нас никому не выдано",
    CLASSES["not_paid_there"]: "оплачено у нас, не оплачено у провайдера",
    CLASSES["amount_differs"]: "расходится сумма или валюта",
    CLASSES["refunded_there"]: "возвращено у провайдера, не у нас",
    CLASSES["refunded_here"]: "возвращено у нас, не у провайдера",
    CLASSES["doubled_here"]: "несколько оплаченных строк у нас на один платёж",
    CLASSES["unreadable"]: "запись провайдера не читается",
    CLASSES["canceled_there"]: "отменено у провайдера, у нас ещё открыто: истечёт само",
    CLASSES["foreign"]: "чужое: не этого сервиса",
}


class Words:
    """A word or a title in the reader's language."""

    def __init__(self, language: str) -> None:
        self.russian = language == "ru"

    def __call__(self, word: str) -> str:
        """The word itself where the language has none."""
        # The sheet "lines" and the number of lines are one word in English.
        return _RUSSIAN.get(word, word) if self.russian else word

    def header(self, words: Sequence[str]) -> list[str]:
        """A header."""
        return [self("Строк" if word == "lines" and self.russian else word) for word in words]
