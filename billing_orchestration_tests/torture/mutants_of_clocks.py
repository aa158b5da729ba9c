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
        "a claim by a clock that was set since it was compared",
        "a charge is claimed by a clock that nobody has set since it was compared",
        (
            Edit(
                "jobs/autopayment/charging.py",
                "        if not self.provider.is_clock_suspicious:\n            return stamp\n",
                "        if stamp:\n            return stamp\n",
            ),
        ),
        (
            _JOBS + "test_a_clock_that_is_set_before_the_first_charge_is_seen_before_it",
            _JOBS + "test_nothing_is_claimed_by_a_clock_that_was_set_since_it_was_compared",
        ),
    ),
    Mutant(
        "our clock not held against one that nobody sets",
        "our clock is held against the machine's steady one between two answers",
        (Edit(_DOMAIN, "return abs(self._moved) > HARMFUL", "return False"),),
        (_JOBS + "test_nothing_is_claimed_by_a_clock_that_was_set_since_it_was_compared",),
    ),
    Mutant(
        "answers to another clock still counted",
        "what was told before our clock was set says nothing about it",
        (Edit(_DOMAIN, "        if self._was_set:\n", "        if False:\n"),),
        ("domain/test_clocks.py::test_a_clock_that_was_set_since_the_last_answer_is_suspicious",),
    ),
    Mutant(
        "an absence noted by another clock than was compared",
        "a run decides for the moment at which its clocks were compared",
        (Edit("jobs/autopayment/steps.py", "absent_since=plan.at", "absent_since=stamp.at"),),
        (_JOBS + "test_a_clock_that_is_set_after_it_was_compared_changes_no_decision",),
    ),
)
