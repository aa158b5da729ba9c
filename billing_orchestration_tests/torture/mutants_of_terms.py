"""Faults of what an attempt is charged for: by which shop, by which card, at which price and for which period."""

from __future__ import annotations

from billing_orchestration_tests.torture.mutant import Edit, Mutant

_ATTEMPTS = "database/attempts.py"
_RENEWALS = "domain/renewals.py"
_LOOK = "database/second_look.py"
_CHANGED_PLAN = "database/test_attempts.py::test_a_subscription_whose_plan_has_changed_is_not_charged"
_TERMS = "jobs/test_attempts_keep_their_terms.py::"

TERMS = (
    Mutant(
        "a decline that is heard of now frees nothing",
        "a run that hears of a decline makes the day's try itself: a second launch finds nothing to do",
        (Edit(_RENEWALS, "        elif attempt.id in closed:\n", "        elif False:\n"),),
        (
            "jobs/test_charging_faults.py::"
            "test_a_pending_charge_that_is_canceled_later_is_a_decline_and_tried_again_with_a_new_key",
            "domain/test_renewals.py::test_a_decline_of_an_earlier_day_that_is_heard_of_now_is_followed_by_the_next_try",
        ),
    ),
    Mutant(
        "a hard decline that is heard of now stops nobody else",
        "a hard decline blocks the card for all its subscriptions in the run that hears of it",
        (
            Edit(
                "domain/conclusions.py",
                "method_stopped_at=_later(one.method_stopped_at, stopped.get(one.method_id)),",
                "method_stopped_at=one.method_stopped_at,",
            ),
        ),
        ("domain/test_renewals.py::test_a_card_that_is_declined_now_is_declined_for_its_other_subscriptions_too",),
    ),
    Mutant(
        "an attempt sent by whatever shop",
        "an attempt is sent again by the shop that it names and by no other",
        (Edit(_ATTEMPTS, "w.shop_id = :shop_id AND ", ":shop_id <> '' AND "),),
        ("database/test_attempts.py::test_an_attempt_is_sent_again_by_the_shop_that_it_names_and_by_no_other",),
    ),
    Mutant(
        "another shop's attempt given up",
        "only the list of the shop that an attempt names can tell that it was never executed",
        (
            Edit(_RENEWALS, "if attempt.may_have_been_sent and attempt.shop_id not in (None, shop_id):", "if False:"),
            Edit("jobs/autopayment/steps.py", "if attempt.shop_id in ours]", "if ours]"),
        ),
        (_TERMS + "test_a_charge_whose_answer_the_old_shop_owes_is_not_made_again_by_the_new_one",),
    ),
    Mutant(
        "an attempt of nobody's shop given up",
        "one whose shop nobody wrote down is left to a person when it is not found",
        (
            Edit(
                _RENEWALS,
                '    if attempt.shop_id is None:\n        return _left_to("a person"',
                '    if attempt.shop_id == "":\n        return _left_to("a person"',
            ),
        ),
        (
            "domain/test_renewals.py"
            "::test_a_sent_attempt_whose_shop_nobody_wrote_down_is_searched_and_neither_sent_nor_given_up",
        ),
    ),
    Mutant(
        "a charge under way searched for as lost",
        "what another run is hearing the answer of is not lost",
        (Edit("domain/lost_attempts.py", "known.get(attempt_id, False) or ", ""),),
        ("domain/test_lost_attempts.py::test_lost_is_what_is_paid_and_not_settled_or_unfinished_and_not_known",),
    ),
    Mutant(
        "records whole by a wrong clock",
        "with a wrong clock no time counts as searched",
        (
            Edit(
                "jobs/autopayment/lost_charges.py",
                " and look_at_clocks(database, clock, provider).may_be_trusted",
                "",
            ),
        ),
        ("jobs/test_restored_database.py::test_with_a_wrong_clock_our_records_do_not_count_as_whole",),
    ),
    Mutant(
        "a plan that is not recurring any more renewed",
        "the second look asks whether the plan is still renewed",
        (Edit(_LOOK, "pl.id = w.plan_id AND pl.is_recurring)", "pl.id = w.plan_id)"),),
        (_CHANGED_PLAN + "[first send-recurring switched off]",),
    ),
    Mutant(
        "a price that was corrected meanwhile asked",
        "the second look asks whether the price is still the plan's only one",
        (Edit(_LOOK, "IS DISTINCT FROM ARRAY[w.amount]", "IS NULL"),),
        (_CHANGED_PLAN + "[first send-a price corrected]",),
    ),
    Mutant(
        "a period that was changed meanwhile paid for",
        "the second look asks whether the plan's period is still the one that is asked for",
        (Edit(_LOOK, "coalesce(w.period_unit, pl.duration_unit))", "pl.duration_unit)"),),
        (_CHANGED_PLAN + "[first send-another period]",),
    ),
    Mutant(
        "a person and a settling who do not wait for each other",
        "ignoring and settling take the same lock, whatever the evidence's size",
        (
            Edit(
                "database/settling_facts.py",
                "WHERE external_payment_id = ANY(%(ids)s) ORDER BY id FOR NO KEY UPDATE\n    )\n    SELECT 'row'",
                "WHERE external_payment_id = ANY(%(ids)s) ORDER BY id\n    )\n    SELECT 'row'",
            ),
        ),
        ("desk/test_resolving.py::test_settling_waits_for_a_person_who_ignores_its_payment_and_then_leaves_it",),
    ),
    Mutant(
        "the plan's period at settling",
        "the period that was paid is granted, whatever the plan says by then",
        (Edit("domain/settlement.py", "    if attempt.period_count is None:\n", "    if True:\n"),),
        (_TERMS + "test_a_year_that_was_paid_is_granted_although_the_plan_is_monthly_by_now",),
    ),
)
