"""Faults by which a secret or a customer's name gets out, or what holds the promise is erased."""

from __future__ import annotations

from billing_orchestration_tests.torture.mutant import Edit, Mutant

_PERSONAL, _CUSTOMERS = "domain/personal.py", "database/customers.py"
_NAMED = ("jobs/test_personal_data.py::test_no_customer_is_named_in_the_run_history_or_an_alert",)
_DATABASE = ("test_secrets.py::test_no_part_of_a_databases_address_gets_out",)
_ERASED = "desk/test_customers.py::test_"

PRIVACY = (
    Mutant(
        "a whole card number in the evidence",
        "of a card the last four digits are kept",
        (Edit(_PERSONAL, '_CARD.sub(r"…\\1", text)', "text"),),
        ("domain/test_personal.py::test_of_a_card_no_more_than_the_last_four_digits_are_shown",),
    ),
    Mutant(
        "a user named where metadata and row disagree",
        "no report names a user",
        (
            Edit(
                "domain/settlement.py",
                'reason = f"metadata names another user than the row\'s subscription {linked.id}"',
                'reason = f"metadata names user {user_id}, the row user {linked.user_id}"',
            ),
        ),
        _NAMED,
    ),
    Mutant(
        "a trigger names its customer",
        "a refused row's words are shown without its customer",
        (Edit("jobs/settling.py", "        refused = _unnamed(connection, refused)\n", ""),),
        _NAMED,
    ),
    Mutant(
        "the provider repeats whom a charge names",
        "what the provider says of a charge is shown without its customer",
        (Edit("provider/translation.py", "if call is not None and call.body and text:", "if False:"),),
        ("provider/test_translation.py::test_whom_a_charge_names_is_left_out_of_what_the_provider_repeats",),
    ),
    Mutant(
        "the driver's words about an address",
        "what cannot be connected to is named by no part of its address",
        (
            Edit(
                "database/engine.py",
                'f"cannot connect to the database of BILLING_DATABASE_URL: {what}; {way_out}"',
                'f"cannot connect to the database of BILLING_DATABASE_URL: {reason}; {way_out}"',
            ),
        ),
        _DATABASE,
    ),
    Mutant(
        "Dagster's log repeats the run history's address",
        "Dagster logs no word of the driver about the run history",
        (Edit("definitions.py", "keep_addresses_out_of_logs()\n", "pass\n"),),
        ("test_secrets.py::test_dagster_logs_no_word_of_the_driver_about_the_run_history",),
    ),
    Mutant(
        "a key in any text",
        "what looks like a key is masked, whoever says it",
        (Edit("domain/printable.py", 'text = _SECRET_KEY.sub(r"\\1_***", text)', "pass"),),
        ("test_secrets.py::test_what_looks_like_a_key_is_masked_whoever_says_it",),
    ),
    Mutant(
        "a redirect followed",
        "a redirect takes the credentials nowhere",
        (Edit("provider/wire.py", "                retries=False,\n                redirect=False,\n", ""),),
        ("provider/test_wire.py::test_a_redirect_takes_the_credentials_nowhere",),
    ),
    Mutant(
        "erased while a charge is open",
        "nobody is erased while the outcome of a charge is open",
        (Edit("desk/customers.py", "        _refuse_open(customer)\n", ""),),
        (_ERASED + "nobody_is_erased_while_the_outcome_of_a_charge_is_open",),
    ),
    Mutant(
        "a settlement erased with its customer",
        "what keeps a payment from being granted twice is never erased",
        (
            Edit(
                _CUSTOMERS,
                "    UPDATE billing_orchestration.settlements SET user_id = %(pseudonym)s WHERE user_id = %(user)s\n",
                "    DELETE FROM billing_orchestration.settlements WHERE user_id = %(user)s\n",
            ),
        ),
        (_ERASED + "an_erased_customer_is_named_nowhere_in_our_schema_and_the_promise_holds",),
    ),
    Mutant(
        "evidence of an open entry emptied",
        "what waits for a person keeps its evidence",
        (
            Edit(
                "database/retention.py",
                "        SELECT id FROM billing_orchestration.quarantine\n        WHERE resolved_at",
                "        SELECT id FROM billing_orchestration.quarantine\n        WHERE opened_at",
            ),
        ),
        ("jobs/test_prune_run_history.py::"
         "test_evidence_and_audit_trail_end_after_their_days_and_what_holds_the_promise_stays",),
    ),
)  # fmt: skip
