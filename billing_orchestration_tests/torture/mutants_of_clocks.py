"""Faults in how three clocks are compared, and in what a wrong one forbids."""

from __future__ import annotations

from billing_orchestration_tests.torture.mutant import Edit, Mutant

_DOMAIN = "domain/clocks.py"
_JOBS = "jobs/test_clocks.py::"
_JUMP = _JOBS + "test_a_clock_that_is_set_in_mid_run_stops_charging_with_the_next_answer"

CLOCKS = (
    Mutant(
        "a wrong clock trusted",
        "beyond five minutes nothing is charged",
        (Edit(_DOMAIN, "return self.apart <= HARMFUL", "return True"),),
        (_JOBS + "test_with_a_wrong_clock_nothing_is_charged_and_the_run_is_red_and_names_it",),
    ),
    Mutant(
        "the provider's clock not asked for",
        "the provider's clock is known before the first charge",
        (Edit("jobs/autopayment/steps.py", "        provider.client.make_sure_of_clock()\n", "        pass\n"),),
        (_JOBS + "test_with_a_wrong_clock_nothing_is_charged_and_the_run_is_red_and_names_it",),
    ),
    Mutant(
        "a clock set in mid-run not noticed",
        "each answer's Date is looked at while a run charges",
        (
            Edit(
                "jobs/autopayment/charging.py",
                "        clocks = self.clocks_apart()\n",
                "        clocks = None\n",
            ),
        ),
        (_JUMP,),
    ),
    Mutant(
        "one odd answer condemns a clock",
        "the least suspicious of several answers counts",
        (Edit(_DOMAIN, "ANSWERS_COMPARED = 3", "ANSWERS_COMPARED = 1"),),
        (_JOBS + "test_one_odd_answer_among_good_ones_stops_nobody",),
    ),
    Mutant(
        "a watermark moved by a wrong clock",
        "with a wrong clock no time counts as covered",
        (
            Edit(
                "jobs/matching_slice.py",
                "is_covered = plan.is_whole and plan.clocks.may_be_trusted",
                "is_covered = plan.is_whole",
            ),
        ),
        (_JOBS + "test_with_a_wrong_clock_what_is_found_is_settled_and_no_watermark_moves",),
    ),
    Mutant(
        "a watermark in the future trusted",
        "a run reaches back seven days from a watermark in the future",
        (
            Edit(
                "domain/run_scope.py",
                "    if is_in_future(watermark, now):\n        return Window(",
                "    if False:\n        return Window(",
            ),
        ),
        (_JOBS + "test_a_watermark_in_the_future_is_not_trusted_and_put_right",),
    ),
    Mutant(
        "payments expired by a wrong clock",
        "with a wrong clock nothing expires",
        (Edit("jobs/expire_payments.py", "if not asked.clocks.may_be_trusted:", "if False:"),),
        (_JOBS + "test_with_a_wrong_clock_no_payment_expires_and_what_is_paid_is_settled",),
    ),
    Mutant(
        "a key from the future sent again",
        "a send in the future counts as past its key's lifetime",
        (
            Edit(
                "domain/attempts.py",
                ">= KEY_LIFETIME or was_sent_by_wrong_clock(attempt, now)",
                ">= KEY_LIFETIME",
            ),
        ),
        ("domain/test_attempts.py::test_a_key_that_a_wrong_clock_has_sent_counts_as_too_old",),
    ),
    Mutant(
        "a key from the future claimed",
        "a claim itself refuses a key from the future",
        (
            Edit(
                "database/attempts.py",
                "          AND coalesce(greatest(w.first_sent_at, w.last_sent_at) <= :latest, true)"
                " AND w.first_absent_at IS NULL\n",
                "",
            ),
        ),
        ("database/test_attempts.py::test_a_key_that_a_wrong_clock_has_sent_is_never_sent_again",),
    ),
    Mutant(
        "a clock that was set since it was compared not seen",
        "a clock is looked at again right before the first charge",
        (
            Edit(
                "jobs/autopayment/steps.py",
                "    if (apart := clocks_apart(database, clock, provider)) is not None:",
                "    if (apart := charging.clocks_apart() if not to_send else None) is not None:",
            ),
        ),
        ("jobs/test_clocks.py::test_a_clock_that_is_set_before_the_first_charge_is_seen_before_it",),
    ),
)
