"""Faults in reading less: what a tick's look must not hide, and what a list must not decide."""

from __future__ import annotations

from billing_orchestration_tests.torture.mutant import Edit, Mutant

_LOOK = "jobs/matching_look.py"
_TESTS = "jobs/test_matching_look.py::"

LOOKS = (
    Mutant(
        "the look hides a difference",
        "a tick that finds something to settle starts its run",
        (Edit(_LOOK, "if differing := len(compared.diff.to_settle) - len(waiting):", "if differing := 0:"),),
        (_TESTS + "test_a_paid_payment_without_a_row_starts_a_run_of_the_job_that_creates_it",),
    ),
    Mutant(
        "a look that leaves to a person what is paid by now",
        "what was said of a payment before it was paid is no word on its grant",
        (Edit("database/audit.py", "ARRAY['books', 'unfinished']", "ARRAY['books']"),),
        (_TESTS + "test_a_lost_charge_that_is_paid_at_last_starts_a_run",),
    ),
    Mutant(
        "a look at a part of the list",
        "a list longer than a page is read by a run, to its end",
        (Edit("provider/lists.py", "            if slice_.is_cut:\n                return False\n", ""),),
        (_TESTS + "test_a_list_longer_than_a_page_starts_a_run",),
    ),
    Mutant(
        "looks instead of runs for ever",
        "a run covers the hour whole within every hour",
        (Edit("domain/run_scope.py", "    if tick - watermark >= COVERED_EVERY:\n", "    if False:\n"),),
        (_TESTS + "test_a_run_covers_the_hour_whole_within_every_hour[matching_pending_payments_job]",),
    ),
    Mutant(
        "a case about books that hides a purchase",
        "only a case that settling has opened stands for the grant",
        (Edit("database/audit.py", "ARRAY['books', 'unfinished']", "ARRAY['unfinished']"),),
        (_TESTS + "test_a_case_about_books_or_about_a_row_says_nothing_about_the_grant",),
    ),
    Mutant(
        "a created run that nobody launches",
        "a tick whose run was created asks for it again",
        (Edit(_LOOK, "        if unfinished:\n", "        if False:\n"),),
        (_TESTS + "test_a_run_that_was_created_and_not_launched_is_asked_for_again",),
    ),
    Mutant(
        "a list that decides what may still change",
        "what may be paid or held is asked about by its id",
        (
            Edit(
                "provider/slices.py",
                "(self._shown if record.status == self._status else self._otherwise).add(record.id)",
                "self._shown.add(record.id)",
            ),
            Edit(
                "provider/lists.py",
                'filters = _filters(status, "created_at"',
                'filters = _filters(None, "created_at"',
            ),
        ),
        ("jobs/test_expire_payments.py::test_whatever_the_lists_do_not_show_as_unpaid_is_asked_about",),
    ),
    Mutant(
        "a list that broke off decides",
        "a list is used whole or not at all",
        (
            Edit(
                "provider/lists.py",
                "return None if names.is_cut else frozenset(names.ids)",
                "return frozenset(names.ids)",
            ),
        ),
        ("jobs/test_expire_payments.py::test_a_list_that_is_not_whole_is_not_used[it is too long]",),
    ),
)
