"""Faults in what a real shop needs: receipts, methods that were saved, its own rows among those of several."""

from __future__ import annotations

from billing_orchestration_tests.torture.mutant import Edit, Mutant

_TESTS = "jobs/test_providers.py::"
_UNTOUCHED = _TESTS + "test_no_job_touches_a_row_of_another_shop_or_asks_about_it"
_SAME_ID = _TESTS + "test_a_payment_is_settled_beside_another_shops_row_with_the_same_id"
_OPEN = _TESTS + "test_an_open_attempt_of_another_shop_is_left_to_it_and_its_subscription_is_not_charged"
_NUMBERS = _TESTS + "test_the_money_checks_and_the_plotted_numbers_are_of_this_shop"

_FIRST = "jobs/test_first_use.py::"

SHOPS = (
    Mutant(
        "a method charged that was never saved",
        "payment_method.saved must be true before the first charge",
        (Edit("domain/methods.py", "    if word == NOT_SAVED:\n", "    if False:\n"),),
        (_FIRST + "test_a_method_that_was_not_saved_is_not_charged_and_one_person_is_told_once",),
    ),
    Mutant(
        "a payment's id charged instead of its method's",
        "what is charged is payment_method.id",
        (
            Edit(
                "domain/methods.py", "MethodAnswer(question, SAVED, payment.method_id)", "MethodAnswer(question, SAVED)"
            ),
        ),
        (_FIRST + "test_what_the_payment_says_is_charged_by_the_methods_own_id_and_asked_once",),
    ),
    Mutant(
        "a method charged although the provider is silent about it",
        "without an answer about its first use nobody is charged",
        (Edit("domain/methods.py", "    if word == SILENT:\n", "    if False:\n"),),
        (_FIRST + "test_without_an_answer_nobody_is_charged_and_the_next_run_asks_again",),
    ),
    Mutant(
        "a method asked about again",
        "a payment is asked about once",
        (Edit("jobs/autopayment/steps.py", "            remember(connection, stamp, part)\n", "            pass\n"),),
        (_FIRST + "test_what_the_payment_says_is_charged_by_the_methods_own_id_and_asked_once",),
    ),
    Mutant(
        "a hard decline forgotten under the method's own id",
        "a hard decline stops a method, however it is found",
        (Edit("first_use.py", "    if others:\n", "    if False:\n"),),
        (_FIRST + "test_a_hard_decline_of_the_methods_own_id_counts",),
    ),
    Mutant(
        "an inactive method charged",
        "a method that is not active at the provider is told as such",
        (Edit("domain/methods.py", "    if word == INACTIVE:\n", "    if False:\n"),),
        (_FIRST + "test_a_method_of_the_view_that_is_not_active_is_told_as_such[inactive]",),
    ),
    Mutant(
        "a receipt that is canceled late not looked for",
        "a day's reconciliation reads the registration of its receipts",
        (
            Edit(
                "jobs/reconciliation/__init__.py",
                "report_without_receipt(report, both.provider.payments.values(), database",
                "report_without_receipt(report, (), database",
            ),
        ),
        ("jobs/test_receipts.py::test_a_registration_that_is_canceled_late_is_found_by_the_days_reconciliation",),
    ),
    Mutant(
        "every payment provider this shop's",
        "YOOKASSA_PROVIDER_IDS says which rows of payment_providers are this shop's",
        (
            Edit(
                "database/conventions.py",
                'return f"({_PROVIDER_IDS} IS NULL OR {column}',
                'return f"(true OR {_PROVIDER_IDS} IS NULL OR {column}',
            ),
        ),
        (_UNTOUCHED + "[PENDING-expire_payments_job]",),
    ),
    Mutant(
        "another shop's row with the same id settled",
        "of rows with the provider's payment id this shop's come first",
        (
            Edit(
                "database/settling_facts.py",
                'FROM payments WHERE external_payment_id = ANY(%(ids)s) AND {of_this_shop_first("payments")}\n'
                "        ORDER BY id FOR NO KEY UPDATE\n",
                "FROM payments WHERE external_payment_id = ANY(%(ids)s) ORDER BY id FOR NO KEY UPDATE\n",
            ),
        ),
        (_SAME_ID,),
    ),
    Mutant(
        "a payment agreed by another shop's row with the same id",
        "of rows with the provider's payment id this shop's come first",
        (
            Edit(
                "database/matching.py",
                """_WITH_ID = f"external_payment_id = ANY(:ids) AND {of_this_shop_first('payments')} ORDER BY id\"""",
                """_WITH_ID = "external_payment_id = ANY(:ids) ORDER BY id\"""",
            ),
        ),
        (_SAME_ID + "[SUCCEEDED-matching_successful_payments_job]",),
    ),
    Mutant(
        "what another shop has granted granted again",
        "another shop's row counts where this shop has none with that id",
        (
            Edit(
                "database/conventions.py",
                'f"""({of_this_shop(f"{row}.payment_provider_id")} OR 0 = (',
                'f"""({of_this_shop(f"{row}.payment_provider_id")} AND 0 = (',
            ),
        ),
        (_TESTS + "test_what_another_shop_has_granted_is_not_granted_again",),
    ),
    Mutant(
        "a refund written into another shop's row",
        "a payment whose only row is another shop's is before a person, refunded or not",
        (
            Edit(
                "domain/settlement.py",
                "    if case.row is not None and case.row.payment_provider_id not in facts.provider_ids and ruling",
                "    if False and ruling",
            ),
        ),
        (_TESTS + "test_a_payment_whose_only_row_is_another_shops_is_before_a_person",),
    ),
    Mutant(
        "this provider asked about another shop's attempt",
        "an open attempt of another shop is left to it",
        (
            Edit(
                "database/attempts.py",
                "select_attempts(_IS_OPEN, _IS_OURS, *of_shard",
                "select_attempts(_IS_OPEN, *of_shard",
            ),
        ),
        (_OPEN,),
    ),
    Mutant(
        "a charge beside another shop's open attempt",
        "an open attempt of whichever shop comes first",
        (
            Edit(
                "database/attempts.py",
                "OR (renewal_attempts.state IN {sql_list(*OPEN)} AND NOT {_IS_OURS.text})",
                "OR false",
            ),
        ),
        (_OPEN,),
    ),
    Mutant(
        "a claim that does not ask whose provider it is",
        "the statement that claims looks at the payment provider again",
        (
            Edit(
                "database/second_look.py",
                'WHEN {of_this_shop("w.payment_provider_id")} IS NOT TRUE',
                "WHEN false",
            ),
        ),
        ("database/test_attempts.py::test_an_attempt_of_another_shop_is_not_claimed",),
    ),
    Mutant(
        "a method stopped by a decline at another shop",
        "what is known of a method is known of it at this shop",
        (
            Edit(
                "database/renewal_view.py",
                """          AND {of_this_shop("h.payment_provider_id")})""",
                ")",
            ),
        ),
        (_TESTS + "test_a_decline_elsewhere_says_nothing_about_a_method_with_the_same_id[STOPPED]",),
    ),
    Mutant(
        "a method guessed from another shop's payment",
        "only payments of this shop say which method is charged",
        (
            Edit(
                "database/renewals.py",
                """f"{of_this_shop('c.payment_provider_id')} DESC, no.is_no""",
                'f"no.is_no',
            ),
        ),
        (_TESTS + "test_only_payments_of_this_shop_say_which_method_is_charged",),
    ),
    Mutant(
        "a kept card that outlives a newer one",
        "the newest card that was saved is charged, whoever settled its payment",
        (
            Edit(
                "database/renewals.py",
                "no.is_no, c.created_at DESC, c.id DESC",
                "no.is_no, c.is_kept DESC, c.created_at DESC, c.id DESC",
            ),
        ),
        ("jobs/test_first_use.py::test_a_newer_card_that_a_webhook_settled_takes_the_place_of_the_kept_one",),
    ),
    Mutant(
        "of several cards the one before the last passed by",
        "the newest card that was saved and not refunded is charged",
        (Edit("database/renewals.py", "ROWS BETWEEN 1 FOLLOWING AND", "ROWS BETWEEN 2 FOLLOWING AND"),),
        (
            "jobs/test_first_use.py"
            "::test_of_several_cards_the_newest_that_was_saved_and_not_refunded_is_charged_at_once",
        ),
    ),
    Mutant(
        "a kept card that outlives a refund of its payment",
        "a card whose payment was refunded in full is not charged",
        (Edit("database/renewals.py", "AND (p.status = 'REFUNDED' OR (", "AND (("),),
        ("jobs/test_first_use.py::test_a_kept_card_whose_payment_the_service_holds_as_refunded_is_not_charged",),
    ),
    Mutant(
        "another shop's stale payment plotted as ours",
        "the oldest unfinished payment is this shop's",
        (
            Edit(
                "database/money_checks.py",
                """AND created_at > '-infinity' AND {of_this_shop("payment_provider_id")}""",
                "AND created_at > '-infinity'",
            ),
        ),
        (_NUMBERS,),
    ),
    Mutant(
        "a row of another shop corrected by a person's word about this one's",
        "the provider's truth is taken over by this shop's rows alone",
        (
            Edit(
                "database/reconciliation.py", '    ours = of_this_shop("payment_provider_id")\n', '    ours = "true"\n'
            ),
        ),
        (_TESTS + "test_a_persons_word_about_the_books_changes_no_row_of_another_shop",),
    ),
)
