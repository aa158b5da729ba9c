"""Faults in how a run drives the provider: what is sent when, what is waited for, what stops it."""

from __future__ import annotations

from billing_orchestration_tests.torture.mutant import Edit, Mutant

_ATTEMPTS = "database/attempts.py"
_TRANSLATION = "provider/translation.py"
_ANSWERS = "domain/answers.py"
_CHARGING_STEPS = "jobs/autopayment/steps.py"
_PACE = "jobs/autopayment/pace.py"
_PIPELINE = "jobs/autopayment/pipeline.py"
_PACING = "provider/pacing.py"
_PURE = "jobs/test_charging_pace.py::"
_STOPS = "jobs/test_charging_stops.py::"
_UNDER_WAY = "jobs/test_charges_under_way.py::"

PACE = (
    Mutant(
        "an unanswered charge sent again at once",
        "no key is sent while the provider may be at work on it",
        (Edit(_ATTEMPTS, "a.unanswered AND a.last_sent_at > :done_before AS is_at_work", "false AS is_at_work"),),
        (_UNDER_WAY + "test_a_run_that_is_killed_during_a_charge_and_launched_again_at_once_charges_once",),
    ),
    Mutant(
        "a claim that forgets its answer is due",
        "a claim without a conclusion counts as a charge under way",
        (Edit(_ATTEMPTS, "sends = a.sends + 1, unanswered = true", "sends = a.sends + 1, unanswered = false"),),
        (
            "database/test_attempts.py::"
            "test_a_send_without_an_answer_is_not_repeated_before_the_provider_can_have_finished",
        ),
    ),
    Mutant(
        "a proxy's word taken for the provider's",
        "only the provider's own answer says that it has finished",
        (Edit(_TRANSLATION, "retry_after_s=delay_s, answered=by_provider", "retry_after_s=delay_s, answered=True"),),
        ("provider/test_client_wire.py::test_only_the_providers_own_answer_says_that_it_has_finished_with_a_charge",),
    ),
    Mutant(
        "a breaker that counts one card twice",
        "a card that fails again and again is one card",
        (Edit(_PACING, "max(weight, self._row.get(subject, 0))", "weight + self._row.get(subject, 0)"),),
        (_PURE + "test_a_card_that_fails_again_and_again_counts_once",),
    ),
    Mutant(
        "a breaker that counts cards that hang alone",
        "a card that hangs while others are answered is not everybody's failure",
        (Edit(_PACING, "if heard_before is not None and heard_before < self.heard_so_far:", "if False:"),),
        (_PURE + "test_cards_that_hang_while_others_are_answered_never_open_the_breaker",),
    ),
    Mutant(
        "bad cards tried one after another",
        "healthy cards are tried before the breaker opens",
        (Edit(_PIPELINE, "in_doubt=self.pace.in_doubt", "in_doubt=False"),),
        (_STOPS + "test_cards_that_hang_or_fail_never_stop_the_others",),
    ),
    Mutant(
        "charges that run ahead of the first grant",
        "the first charge goes alone until its grant is committed",
        (
            Edit(
                _PACE,
                "        self.width = 1\n        self.stop_reason",
                "        self.width = 8\n        self.stop_reason",
            ),
        ),
        (_PURE + "test_the_first_charge_goes_alone_until_its_grant_is_committed",),
    ),
    Mutant(
        "grants that are refused without end",
        "a few paid charges that cannot be granted stop the run",
        (Edit(_PIPELINE, "self.pace.not_granted(told.reason)", "pass"),),
        (_STOPS + "test_books_that_take_no_grant_stop_the_run_after_a_few_charges_and_these_are_granted_later",),
    ),
    Mutant(
        "every customer asked of a shop that is refused",
        "one refusal of the first charges is the shop's",
        (Edit(_PACE, "MOST_REFUSED_ALIKE = 5", "MOST_REFUSED_ALIKE = 50"),),
        (_STOPS + "test_a_shop_that_is_refused_stops_after_a_few_requests_and_all_are_charged_once_it_is_mended",),
    ),
    Mutant(
        "a refused shop's charges counted as tries",
        "what the shop was refused for is charged the same day once it is mended",
        (Edit(_ANSWERS, 'SHOP_REFUSALS = ("401", "403", SHOP)', 'SHOP_REFUSALS = ("401", "403")'),),
        (_STOPS + "test_a_shop_that_is_refused_stops_after_a_few_requests_and_all_are_charged_once_it_is_mended",),
    ),
    Mutant(
        "a refused charge that stays open after a success",
        "an entry about a refused charge closes with the next success",
        (Edit("database/settling.py", 'if row["kind"] != "refunded"', "if False"),),
        (_STOPS + "test_a_refused_charge_of_one_customer_is_closed_by_the_next_success_of_that_subscription",),
    ),
    Mutant(
        "a claim before its turn",
        "the turn at the rate limit is waited for before the claim",
        (Edit(_PIPELINE, "turns = rate.turns(room) if room else 0", "turns = room"),),
        (_STOPS + "test_who_cancels_while_a_charge_waits_for_its_turn_is_not_charged",),
    ),
    Mutant(
        "a 429 forgotten",
        "a 429 is remembered for the run",
        (Edit(_PACE, "self._ceiling, self._grants_at_ceiling = self.width, 0", "pass"),),
        (_PURE + "test_a_429_halves_the_width_once_a_burst_and_is_remembered_for_the_run",),
    ),
    Mutant(
        "a terminated run that goes on charging",
        "a terminated run begins no further charge",
        (
            Edit(
                _CHARGING_STEPS,
                "with interrupts_held_back(pipeline.terminate) as held:",
                "with interrupts_held_back(lambda: None) as held:",
            ),
        ),
        (_STOPS + "test_a_terminated_run_concludes_what_is_under_way_and_begins_nothing_more",),
    ),
)
