"""Faults in how a run drives the provider: what is sent when, what is waited for, what stops it."""

from __future__ import annotations

from billing_orchestration_tests.torture.mutant import Edit, Mutant

_ATTEMPTS = "database/attempts.py"
_TRANSLATION = "provider/translation.py"
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
)
