"""The documents in two languages say the same: neither falls behind, and what would fall behind is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from billing_orchestration_tests.translations import TRANSLATED, fallen_behind

ROOT = Path(__file__).parents[1]
ENGLISH = """\
# The jobs

[По-русски](README.ru.md). Read [the runbook](docs/operations.md#red-runs).

## Start

- Set `ALERT_URLS`; RENEWAL_SHARDS divides 1,440 runs.
- Wait 23 h.

```sh
make demo    # two minutes
make dev
```

| job | when |
|---|---|
| `autopayment_job` | daily, 03:00 |
| `run_history_job` | daily, [kept](docs/history.md) |

## Stop

**Never** stop.

Nothing.
"""
RUSSIAN = """\
# Задания

[In English](README.md). Читайте [регламент](docs/ru/operations.md#упавшие-запуски).

## Начало

- Задайте `ALERT_URLS`; RENEWAL_SHARDS делит 1\u00a0440 запусков.
- Подождите 23 ч.

```sh
make demo    # две минуты
make dev
```

| задание | когда |
|---|---|
| `autopayment_job` | ежедневно, 03:00 |
| `run_history_job` | ежедневно, [что хранится](docs/history.md) |

## Конец

**Никогда** не выключайте.

Ничего.
"""
STOP = RUSSIAN[RUSSIAN.index("## Конец") :]
RUNBOOKS = {
    "docs/operations.md": "# Operations\n\n## Red runs\n",
    "docs/ru/operations.md": "# Р\n\n## Упавшие запуски\n",
}


def texts_of(folder: Path) -> dict[str, str]:
    return {
        name: (folder / name).read_text() for pair in TRANSLATED.items() for name in pair if (folder / name).exists()
    }


@pytest.mark.parametrize("english", TRANSLATED)
def test_neither_language_has_fallen_behind(english: str) -> None:
    assert fallen_behind(english, texts_of(ROOT)) == []


def behind(english: str = ENGLISH, russian: str = RUSSIAN) -> list[str]:
    return fallen_behind("README.md", {"README.md": english, "README.ru.md": russian, **RUNBOOKS})


def test_a_true_translation_is_not_blamed() -> None:
    assert behind() == []


@pytest.mark.parametrize(
    ("there", "instead", "told"),
    [
        pytest.param(STOP, "", "README.md has ## Stop (line 20); README.ru.md has none", id="part"),
        pytest.param("## Конец", "### Конец", "## Stop (line 20); README.ru.md has ### Конец (line 20)", id="level"),
        pytest.param("make dev", "make test", "'make dev' in English, 'make test' in Russian", id="command"),
        pytest.param("make dev\n", "", "'make dev' in English, '(nothing)' in Russian", id="lost_command"),
        pytest.param("`ALERT_URLS`", "`ALERTS`", "code only in English: ALERT_URLS", id="code"),
        pytest.param("RENEWAL_SHARDS", "Настройка", "settings only in English: RENEWAL_SHARDS", id="setting"),
        pytest.param("23 ч", "24 ч", "numbers only in English: 23", id="number"),
        pytest.param("- Подождите 23 ч.", "Подождите 23 ч.", "list items: 2 in English, 1 in Russian", id="list"),
        pytest.param("\n\nНичего.", "", "paragraphs: 2 in English, 1 in Russian", id="paragraph"),
        pytest.param("**Никогда**", "Никогда", "bold passages: 1 in English, 0 in Russian", id="bold"),
        pytest.param("| `autopayment_job` | ежедневно, 03:00 |\n", "", "`autopayment_job` is not there", id="row"),
        pytest.param("ежедневно, 03:00 |", "ежедневно | 03:00 |", "2 columns in English, 3 in Russian", id="column"),
        pytest.param("ежедневно, 03:00", "ежедневно, 04:00", "column 2: numbers only in English: 0300", id="cell"),
        pytest.param("(docs/history.md)", "(docs/safety.md)", "links only in English: docs/history.md", id="link"),
        pytest.param("#упавшие-запуски", "#регламент", "docs/ru/operations.md#упавшие-запуски", id="heading_of_a_link"),
        pytest.param("docs/ru/operations.md#упавшие-запуски", "docs/operations.md#red-runs",
                     "links only in Russian: docs/operations.md#red-runs", id="link_to_the_english_document"),
        pytest.param("[In English](README.md)", "По-английски", "links only in English: README.md", id="way_back"),
    ],
)  # fmt: skip
def test_what_has_fallen_behind_is_named_with_its_place(there: str, instead: str, told: str) -> None:
    assert there in RUSSIAN
    found = behind(russian=RUSSIAN.replace(there, instead))
    assert any(told in line for line in found), found
    assert all("README.ru.md" in line for line in found)


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        pytest.param("Wait 23 h.", "Wait 45 h.", id="number"),
        pytest.param("make dev", "make dev\nmake bench", id="command"),
        pytest.param("## Stop", "## In between\n\nNew.\n\n## Stop", id="section"),
        pytest.param("| `run_history_job`", "| `new_job` | daily |\n| `run_history_job`", id="row"),
    ],
)
def test_what_is_new_in_english_is_missed_in_russian(there: str, instead: str) -> None:
    assert there in ENGLISH
    assert len(behind(english=ENGLISH.replace(there, instead))) >= 1


def test_a_heading_that_is_missing_is_told_of_its_own_document_alone() -> None:
    texts = {"README.md": ENGLISH, "README.ru.md": RUSSIAN, **RUNBOOKS}
    texts["docs/operations.md"] = "# Operations\n\n## Alerts\n\n### matching_job\n\n### new_job\n\n## Red runs\n"
    texts["docs/ru/operations.md"] = "# Регламент\n\n## Оповещения\n\n### matching_job\n\n## Упавшие запуски\n"
    assert fallen_behind("README.md", texts) == []
    assert fallen_behind("docs/operations.md", texts) == [
        "other headings: docs/operations.md has ### new_job (line 7); docs/ru/operations.md has none there"
    ]


def test_a_document_without_its_translation_is_named() -> None:
    assert fallen_behind("README.md", {"README.md": ENGLISH}) == [
        "README.ru.md is missing: README.md has no translation"
    ]
