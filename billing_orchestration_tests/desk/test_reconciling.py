"""`reconcile`: a period as a report for accountants, and a registry as the third side. It changes nothing."""

from __future__ import annotations

import csv
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import openpyxl
import pytest

from billing_orchestration.cli import main
from billing_orchestration.desk import report_files
from billing_orchestration.desk.reconciling import Wanted, reconcile_period
from billing_orchestration.desk.report_files import LINES, Sheet, open_report
from billing_orchestration.desk.resolving import Desk
from billing_orchestration.domain.reconciled import NotReconciled
from billing_orchestration.provider.errors import IncompleteSlice
from billing_orchestration_tests.fixtures.installation import command
from billing_orchestration_tests.jobs.service import Service

UTC = timezone.utc
TENTH, ELEVENTH = date(2026, 3, 10), date(2026, 3, 11)
NOON_OF_11TH = datetime(2026, 3, 11, 12, 0, tzinfo=UTC)
HEADER = "Идентификатор платежа;Сумма платежа;Валюта платежа;Время платежа;Описание заказа"


@pytest.fixture
def shop(service: Service) -> Service:
    """On the 10th one payment on both sides; on the 11th one that is missing here, and one whose amount differs."""
    service.provider.switches.fee_percent = 3.0
    for name, at in (("a", NOON_OF_11TH - timedelta(days=1)), ("b", NOON_OF_11TH), ("c", NOON_OF_11TH)):
        service.paid_there(name, user=name, plan_id=service.monthly, created_at=at)
    for name, amount in (("a", "299.00"), ("c", "199.00")):
        at = NOON_OF_11TH - timedelta(days=name == "a")
        service.payment(
            name, subscription_id=service.subscription(name), status="SUCCEEDED", amount=amount, created_at=at
        )
    return service


def desk_of(service: Service, **settings: Any) -> Desk:
    chosen = service.settings.model_copy(update=settings)
    connect = lambda: service.connect_provider(chosen)  # noqa: E731
    return Desk(service.engine, connect, service.calendar, chosen, lambda: service.now)


def run(service: Service, *, settings: dict[str, Any] | None = None, **wanted: Any) -> tuple[list[str], bool]:
    before = service.snapshot()
    told = reconcile_period(
        desk_of(service, **(settings or {})), Wanted(**{"first": TENTH, "last": ELEVENTH, **wanted})
    )
    assert service.snapshot() == before
    return told


def sheets_of(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    book = openpyxl.load_workbook(path)
    return {sheet.title: list(sheet.iter_rows(values_only=True)) for sheet in book.worksheets}


def test_a_period_is_told_with_its_sums_and_its_differences(shop: Service) -> None:
    english = {"billing_language": "en"}
    told, agrees = run(shop, settings=english)
    assert not agrees
    assert told[:3] == [
        "both sides agree: 1 (paid there 299.00 RUB, fee 8.97 RUB, paid here 299.00 RUB)",
        "paid there, missing or unfinished here: 1 (paid there 299.00 RUB, fee 8.97 RUB)",
        "the amount or the currency differs: 1 (paid there 299.00 RUB, fee 8.97 RUB, paid here 199.00 RUB)",
    ]
    assert [line.split(":")[0] for line in told[3:]] == ["2026-03-11", "2026-03-11"]
    assert run(shop, last=TENTH)[1]
    assert run(shop, first=date(2026, 3, 1), last=date(2026, 3, 2), settings=english) == (
        ["there are no payments in this period, on either side"],
        True,
    )


def test_the_terminal_has_russian_headers_over_reasons_in_english(shop: Service) -> None:
    told, _ = run(shop)
    assert told[:3] == [
        "сходится: 1 (оплачено у провайдера 299.00 RUB, комиссия 8.97 RUB, оплачено у нас 299.00 RUB)",
        "оплачено у провайдера, у нас нет или не завершено: 1 (оплачено у провайдера 299.00 RUB, комиссия 8.97 RUB)",
        "расходится сумма или валюта: 1"
        " (оплачено у провайдера 299.00 RUB, комиссия 8.97 RUB, оплачено у нас 199.00 RUB)",
    ]
    assert told[3].startswith("2026-03-11: payment b: оплачено у провайдера, у нас нет или не завершено: ")
    assert run(shop, first=date(2026, 3, 1), last=date(2026, 3, 2))[0] == [
        "за этот период платежей нет ни у провайдера, ни у нас"
    ]


def test_a_workbook_has_sums_lines_and_differences_under_russian_headers(shop: Service, tmp_path: Path) -> None:
    path = tmp_path / "march.xlsx"
    told, _ = run(shop, output=path)
    assert told[-1] == f"written: {path}"
    sheets = sheets_of(path)
    assert list(sheets) == ["Суммы", "Строки", "Расхождения"]
    assert sheets["Суммы"][0][:5] == ("День", "Результат", "Валюта", "Строк", "Оплачено у провайдера")
    assert ("Все дни", "сходится", "RUB", 1, 299, 8.97, 0, 299, 0) in sheets["Суммы"]
    assert ("2026-03-11", "расходится сумма или валюта", "RUB", 1, 299, 8.97, 0, 199, 0) in sheets["Суммы"]
    assert [row[3] for row in sheets["Строки"]] == ["Идентификатор", "a", "b", "c"]
    assert [row[3] for row in sheets["Расхождения"]] == ["Идентификатор", "b", "c"]
    assert sheets["Расхождения"][0][-1] == "Причина"
    assert list(tmp_path.iterdir()) == [path]


def test_a_workbook_in_english(shop: Service, tmp_path: Path) -> None:
    run(shop, output=tmp_path / "march.xlsx", settings={"billing_language": "en"})
    sheets = sheets_of(tmp_path / "march.xlsx")
    assert list(sheets) == ["sums", "lines", "differences"]
    assert sheets["lines"][1][:4] == ("2026-03-10", "both sides agree", "payment", "a")


@pytest.mark.parametrize(("language", "separator", "amount"), [("ru", ";", "299,00"), ("en", ",", "299.00")])
def test_csv_has_a_file_for_each_sheet_as_a_spreadsheet_reads_it(
    shop: Service, tmp_path: Path, language: str, separator: str, amount: str
) -> None:
    run(shop, output=tmp_path / "march.csv", settings={"billing_language": language})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["march.csv", "march.differences.csv", "march.sums.csv"]
    data = (tmp_path / "march.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")
    rows = list(csv.reader(data.decode("utf-8-sig").splitlines(), delimiter=separator))
    assert [(row[3], row[7]) for row in rows[1:]] == [("a", amount), ("b", amount), ("c", amount)]


def test_foreign_text_becomes_no_formula_and_breaks_no_cell(shop: Service, tmp_path: Path) -> None:
    shop.payment("=HYPERLINK(1)\x07", created_at=NOON_OF_11TH)
    for name in ("odd.csv", "odd.xlsx"):
        run(shop, output=tmp_path / name)
    assert "'=HYPERLINK(1)\ufffd" in (tmp_path / "odd.csv").read_text(encoding="utf-8-sig")
    assert "'=HYPERLINK(1)\ufffd" in [row[3] for row in sheets_of(tmp_path / "odd.xlsx")["Строки"]]


def test_a_full_sheet_goes_on_in_the_next(shop: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_files, "ROWS_OF_A_SHEET", 3)
    run(shop, output=tmp_path / "long.xlsx")
    sheets = sheets_of(tmp_path / "long.xlsx")
    assert [row[3] for row in sheets["Строки"]] == ["Идентификатор", "a", "b"]
    assert [row[3] for row in sheets["Строки 2"]] == ["Идентификатор", "c"]


@pytest.mark.parametrize("name", ["march.csv", "march.xlsx"])
def test_a_list_that_breaks_off_leaves_no_report(shop: Service, tmp_path: Path, name: str) -> None:
    shop.sandbox.misbehave("list_refunds", "error_before", times=None, skip=1)
    with pytest.raises(IncompleteSlice):
        run(shop, output=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_difference_that_two_days_of_a_period_see_is_one(shop: Service) -> None:
    shop.paid_there("d", status="canceled", created_at=NOON_OF_11TH - timedelta(days=1))
    row = shop.payment("d", status="SUCCEEDED", created_at=NOON_OF_11TH - timedelta(days=1))
    shop.execute("UPDATE payments SET updated_at = '2026-03-11 09:00' WHERE id = :id", id=row)
    told, _ = run(shop)
    assert len([line for line in told if "payment d:" in line]) == 1
    assert len([line for line in run(shop, first=ELEVENTH)[0] if "payment d:" in line]) == 1


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_read(shop: Service, tmp_path: Path) -> None:
    registered = registry(tmp_path, A)
    requests = shop.sandbox.count()
    for output, words in (
        (tmp_path / "none" / "march.xlsx", "none does not exist"),
        (registered / "march.csv", "r.csv is no folder"),
        (tmp_path, "must end with"),
        (registered, "r.csv is the registry itself"),
    ):
        with pytest.raises(NotReconciled, match=words):
            run(shop, output=output, registry=registered)
    for name in ("a.xlsx", "b.sums.csv"):
        (tmp_path / name).mkdir()
    for name, words in (("a.xlsx", "a.xlsx is a folder"), ("b.csv", "b.sums.csv is a folder")):
        with pytest.raises(NotReconciled, match=words):
            run(shop, output=tmp_path / name)
    assert shop.sandbox.count() == requests
    assert registered.read_text(encoding="utf-8").endswith(A)


@pytest.mark.parametrize("name", ["march.csv", "march.xlsx"])
def test_a_report_replaces_an_older_one_whole(shop: Service, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("older")
    shop.sandbox.misbehave("list_refunds", "error_before", times=1, skip=1)
    run(shop, output=path)
    assert not path.read_bytes().startswith(b"older")
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", ["march.csv", "march.xlsx"])
def test_a_report_that_fails_in_its_last_moment_leaves_nothing_half(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    def write() -> None:
        with open_report(path, [Sheet(LINES, LINES, ["id"])], russian=False) as file:
            file.write(LINES, ["a"])
            path.mkdir()

    with pytest.raises(IsADirectoryError):
        write()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("wanted", "words"), [
    ({"first": None, "last": None}, "give the period: --from"),
    ({"first": ELEVENTH, "last": TENTH}, "before it begins"),
    ({"last": date(2026, 3, 13)}, "in the future"),
    ({"output": Path("march.ods")}, "must end with .xlsx or .csv"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_before_anything_is_read(
    shop: Service, wanted: dict[str, Any], words: str
) -> None:
    requests = shop.sandbox.count()
    with pytest.raises(NotReconciled, match=words):
        run(shop, **wanted)
    assert shop.sandbox.count() == requests


def test_from_the_terminal_it_exits_with_1_where_something_differs(
    healthy: pytest.MonkeyPatch, shop: Service, tmp_path: Path
) -> None:
    process = command("reconcile", "--from", "2026-03-10", "--to", "2026-03-11", "--output", str(tmp_path / "m.xlsx"))
    assert (process.returncode, process.stderr) == (1, "")
    assert "расходится сумма или валюта: 1" in process.stdout
    assert command("reconcile", "--from", "2026-03-10").returncode == 0
    no_period = command("reconcile")
    assert no_period.returncode == 1
    assert no_period.stderr.startswith("billing-orchestration: give the period")


@pytest.mark.parametrize("arguments", [["--from", "yesterday"], ["--column", "amount"], ["--column", "sum=X"]])
def test_wrong_usage_of_reconcile_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["reconcile", *arguments])
    assert caught.value.code == 2


# --- the registry -------------------------------------------------------------------------------------------------


def registry(folder: Path, *lines: str, header: str = HEADER, encoding: str = "utf-8", name: str = "r.csv") -> Path:
    path = folder / name
    path.write_bytes("\n".join([header, *lines]).encode(encoding))
    return path


A = "a;299.00;RUB;10.03.2026 15:00:00;Первый"
B = "b;299.00;RUB;11.03.2026 15:00:00;Второй"
C = "c;299.00;RUB;11.03.2026 15:00:00;Третий"


def compared(service: Service, path: Path, **wanted: Any) -> list[str]:
    """What is told of a registry."""
    told, _ = run(service, **{"first": None, "last": None, "registry": path, **wanted})
    return [line for line in told if line.startswith("registry")]


def test_a_registry_is_the_third_side_and_tells_its_own_days(shop: Service, tmp_path: Path) -> None:
    assert compared(shop, registry(tmp_path, A, B, C)) == ["registry of payments: 3 agree, 0 differ"]
    assert compared(shop, registry(tmp_path, A, "", "Итого;299.00;;;")) == ["registry of payments: 1 agree, 0 differ"]


def test_each_difference_of_a_registry_is_told_with_its_line(shop: Service, tmp_path: Path) -> None:
    path = registry(tmp_path, A, B.replace("299.00", "300.00"), C.replace("c;", "x;"))
    assert compared(shop, path) == [
        "registry of payments: 1 agree, 3 differ",
        "registry, line 3: payment b: another amount or currency: 300.00 RUB in the registry, 299.00 at the provider",
        "registry, no line: payment c: not in the registry: nothing in the registry, 299.00 at the provider",
        "registry, line 4: payment x: not at the provider: 299.00 RUB in the registry, nothing at the provider",
    ]


def test_columns_are_found_by_name_in_any_order_and_others_are_kept(shop: Service, tmp_path: Path) -> None:
    header = "Comment,Payment currency,Payment ID,Ours,Payment amount"
    path = registry(tmp_path, "first,RUB,a,7,299.00", header=header)
    output = tmp_path / "march.xlsx"
    assert compared(shop, path, first=TENTH, output=output) == ["registry of payments: 1 agree, 0 differ"]
    sheet = sheets_of(output)["Реестр"]
    assert sheet[0][-2:] == ("Comment", "Ours")
    assert sheet[1] == (2, "a", 299, "RUB", 299, "сходится", "сходится", "first", "7")


def test_a_description_that_begins_like_a_total_is_a_payment_all_the_same(shop: Service, tmp_path: Path) -> None:
    path = registry(tmp_path, A.replace("Первый", "Total access"), B.replace("Второй", "Итого за март"), C)
    assert compared(shop, path) == ["registry of payments: 3 agree, 0 differ"]
    for total in ("Итого:;299.00;;;", ";299.00;;;Всего", "Всего платежей: 1;299.00;;;", "Total"):
        assert compared(shop, registry(tmp_path, A, total)) == ["registry of payments: 1 agree, 0 differ"]


def test_a_column_of_another_name_can_be_named(shop: Service, tmp_path: Path) -> None:
    path = registry(tmp_path, A, header=HEADER.replace("Идентификатор платежа", "Номер"))
    with pytest.raises(NotReconciled, match="line 1: no column «идентификатор платежа»"):
        compared(shop, path)
    assert compared(shop, path, named={"payment_id": "Номер"}) == ["registry of payments: 1 agree, 0 differ"]


def test_the_income_is_compared_where_the_registry_tells_it(shop: Service, tmp_path: Path) -> None:
    header = f"{HEADER};Сумма платежа за вычетом комиссии НКО"
    assert "1 agree" in compared(shop, registry(tmp_path, f"{A};290.03", header=header))[0]
    assert "another income" in compared(shop, registry(tmp_path, f"{A};290.04", header=header))[1]


def test_a_registry_of_refunds(shop: Service, tmp_path: Path) -> None:
    shop.provider.refund("a", "99.00", at=NOON_OF_11TH)
    [entry] = [entry for entry in shop.provider.ledger() if entry.kind == "refund"]
    header = "Идентификатор возврата;Идентификатор платежа;Сумма возврата;Валюта возврата;Время возврата"
    path = registry(tmp_path, f"{entry.refund_id};a;99.00;RUB;11.03.2026 15:00:00", header=header)
    assert compared(shop, path) == ["registry of refunds: 1 agree, 0 differ"]


def test_a_registry_of_refunds_may_tell_their_payments_too(shop: Service, tmp_path: Path) -> None:
    shop.provider.refund("a", "99.00", at=NOON_OF_11TH)
    [entry] = [entry for entry in shop.provider.ledger() if entry.kind == "refund"]
    header = (
        "Идентификатор платежа;Время платежа;Сумма платежа;Валюта платежа;"
        "Идентификатор возврата;Время возврата;Сумма возврата;Валюта возврата"
    )
    line = f"a;10.03.2026 15:00:00;299.00;RUB;{entry.refund_id};11.03.2026 15:00:00;99.00;RUB"
    assert compared(shop, registry(tmp_path, line, header=header)) == ["registry of refunds: 1 agree, 0 differ"]


def test_a_registry_with_a_byte_order_mark_and_tabs_is_read(shop: Service, tmp_path: Path) -> None:
    path = registry(tmp_path, A.replace(";", "\t"), header=HEADER.replace(";", "\t"), encoding="utf-8-sig")
    assert compared(shop, path) == ["registry of payments: 1 agree, 0 differ"]


def test_a_registry_without_lines_is_of_a_day_on_which_nothing_was_paid(shop: Service, tmp_path: Path) -> None:
    quiet = date(2026, 3, 9)
    assert compared(shop, registry(tmp_path), first=quiet) == ["registry of payments: 0 agree, 0 differ"]
    assert compared(shop, registry(tmp_path), first=TENTH)[1] == (
        "registry, no line: payment a: not in the registry: nothing in the registry, 299.00 at the provider"
    )


def test_a_registry_is_of_days_of_moscow(shop: Service, tmp_path: Path) -> None:
    # Half past eleven of the 11th in UTC is the 12th in Moscow.
    shop.paid_there("late", plan_id=shop.monthly, created_at=datetime(2026, 3, 11, 21, 30, tzinfo=UTC))
    assert compared(shop, registry(tmp_path, B, C))[0] == "registry of payments: 2 agree, 0 differ"


def test_a_workbook_is_a_registry_too(shop: Service, tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.append(["Реестр платежей", None, None, None])
    sheet.append(["Идентификатор платежа", "Сумма платежа", "Валюта платежа", "Время платежа"])
    sheet.append(["a", 299.0, "RUB", datetime(2026, 3, 10, 15, 0)])  # noqa: DTZ001 - as a workbook holds it
    sheet.append(["Итого", 299, None, None])
    book.save(tmp_path / "r.xlsx")
    assert compared(shop, tmp_path / "r.xlsx") == ["registry of payments: 1 agree, 0 differ"]


def test_a_workbook_whose_rows_end_with_their_last_filled_cell_is_read(shop: Service, tmp_path: Path) -> None:
    """As many programs write them: nothing says how wide the sheet is, and sums are binary."""
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(["Реестр платежей"])
    sheet.append(HEADER.split(";"))
    sheet.append(["a", 299.0, "RUB", datetime(2026, 3, 10, 15, 0)])  # noqa: DTZ001 - as a workbook holds it
    for name in ("b", "c"):
        sheet.append([name, 299.0, "RUB", datetime(2026, 3, 11, 15, 0), "told", None])  # noqa: DTZ001
    sheet.append(["Итого", 0.1 + 0.2 + 896.7])
    book.save(tmp_path / "r.xlsx")
    assert compared(shop, tmp_path / "r.xlsx") == ["registry of payments: 3 agree, 0 differ"]


def broken_workbook(folder: Path) -> Path:
    """Whole as an archive, and no workbook in it."""
    book = openpyxl.Workbook()
    book.save(folder / "whole.xlsx")
    with ZipFile(folder / "whole.xlsx") as whole, ZipFile(folder / "r.xlsx", "w") as broken:
        for name in whole.namelist():
            broken.writestr(name, "<sheet" if "sheet1" in name else whole.read(name))
    return folder / "r.xlsx"


def an_archive(folder: Path) -> Path:
    with ZipFile(folder / "r.xlsx", "w") as archive:
        archive.writestr("registry.csv", A)
    return folder / "r.xlsx"


def an_old_workbook(folder: Path) -> Path:
    path = folder / "r.xls"
    path.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\x00" * 600)
    return path


def cp1251(folder: Path) -> Path:
    return registry(folder, A, encoding="cp1251")


BROKEN: list[tuple[Callable[[Path], Path], str]] = [
    (cp1251, "line 1 is not utf-8 text: try --encoding cp1251"),
    (lambda folder: registry(folder, A, header=HEADER.replace(";", "|")), "line 1: no column «идентификатор платежа»"),
    (lambda folder: registry(folder, "a;299.00;RUB"), "line 2 has 3 cells, and the header in line 1 has 5"),
    (lambda folder: registry(folder, A, B, A), "line 4: payment a stands in line 2 already"),
    (lambda folder: registry(folder, A, "Итого;300.00;;;"), "line 3: the total is 300.00, and the lines above come to"),
    (lambda folder: registry(folder, A.replace("299.00", "1 299,00")), "line 2: '1 299,00' is not an amount"),
    (lambda folder: registry(folder, A.replace("RUB", "руб.")), "line 2: the currency"),
    (lambda folder: registry(folder, A.replace("10.03.2026 15", "2026-03-10 15")), "line 2: .* is not a time"),
    (lambda folder: registry(folder, A.replace("a;", ";", 1)), "line 2 has no id"),
    (
        lambda folder: registry(folder, "a;1;", header="Идентификатор платежа;Сумма платежа;"),
        "no column for currency",
    ),
    (lambda folder: folder / "missing.csv", "cannot be read"),
    (broken_workbook, "line 1: not a workbook"),
    (an_archive, "line 1: not a workbook"),
    (an_old_workbook, "line 1: a workbook of an old kind"),
]


@pytest.mark.parametrize(("broken", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_a_file_that_is_no_whole_registry_is_told_with_its_line(
    shop: Service, tmp_path: Path, broken: Callable[[Path], Path], words: str
) -> None:
    requests = shop.sandbox.count()
    with pytest.raises(NotReconciled, match=words):
        compared(shop, broken(tmp_path))
    assert shop.sandbox.count() == requests


def test_a_registry_in_another_encoding_can_be_read_by_its_name(shop: Service, tmp_path: Path) -> None:
    assert compared(shop, cp1251(tmp_path), encoding="cp1251") == ["registry of payments: 1 agree, 0 differ"]
    with pytest.raises(NotReconciled, match="is not an encoding"):
        compared(shop, cp1251(tmp_path), encoding="klingon")


def test_a_registry_without_a_time_needs_the_period(shop: Service, tmp_path: Path) -> None:
    path = registry(tmp_path, "a;299.00;RUB", header="Идентификатор платежа;Сумма платежа;Валюта платежа")
    with pytest.raises(NotReconciled, match="tells no time"):
        compared(shop, path)
    assert compared(shop, path, first=TENTH) == ["registry of payments: 1 agree, 0 differ"]
