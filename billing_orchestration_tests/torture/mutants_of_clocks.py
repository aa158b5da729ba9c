"""Faults in how three clocks are compared, and in what a wrong one forbids."""

from __future__ import annotations

from billing_orchestration_tests.torture.mutant import Edit, Mutant

_DOMAIN = "domain/clocks.py"
_JOBS = "jobs/test_clocks.py::"
_PRUNE = "jobs/test_prune_run_history.py::"
_JUMP = _JOBS + "test_the_providers_clock_set_in_mid_run_stops_charging_with_the_next_answer"

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
        "old runs deleted by a wrong clock",
        "with a wrong clock nothing is deleted",
        (Edit("jobs/prune_run_history.py", "    stop_if_clocks_are_apart(old.clocks)\n", "    pass\n"),),
        (_PRUNE + "test_with_a_wrong_clock_nothing_is_deleted_and_the_run_is_red_and_names_it",),
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
        "our clock read again in mid-run",
        "our clock is read once a run: who sets it in mid-run changes nothing of that run",
        (
            Edit(
                "resources.py",
                "return self._began + timedelta(seconds=self._steady_s() - self._began_s)",
                "return self._now()",
            ),
            Edit(
                "resources.py",
                "        self._steady_s = steady_s\n",
                "        self._steady_s, self._now = steady_s, now\n",
            ),
        ),
        (
            _JOBS + "test_our_clock_set_in_mid_run_changes_nothing_of_the_run",
            _JOBS + "test_a_wrong_clock_that_is_put_right_in_mid_run_stays_wrong_for_the_run",
        ),
    ),
    Mutant(
        "a claim by our own clock",
        "a claim has PostgreSQL's time, which is the same for every machine",
        (Edit("jobs/autopayment/charging.py", "return replace(stamp, at=told)", "return stamp"),),
        (
            _JOBS + "test_a_claim_has_postgresqls_time_which_is_the_same_for_every_machine",
            "jobs/test_charges_under_way.py::test_another_machine_whose_clock_is_ahead_waits_as_long_as_any_other",
        ),
    ),
    Mutant(
        "a claim once PostgreSQL's clock was set",
        "nothing is claimed by a clock of PostgreSQL's that was set in mid-run",
        (
            Edit(
                "jobs/autopayment/charging.py",
                "        if not clocks.may_be_trusted:\n            raise ClockWasSet",
                "        if False:\n            raise ClockWasSet",
            ),
        ),
        (_JOBS + "test_nothing_is_claimed_once_postgresqls_clock_was_set",),
    ),
    Mutant(
        "a shard looks ahead of its own clock",
        "what another process has read from a wrong clock lets no shard charge before its day",
        (Edit("domain/shards.py", "return min(self.as_of, now)", "return self.as_of"),),
        ("domain/test_shards.py::test_a_shard_does_not_look_ahead_of_its_own_clock",),
    ),
)
