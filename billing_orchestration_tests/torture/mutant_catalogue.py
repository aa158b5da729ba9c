"""The faults that the suite must notice, each with the rule it breaks and the tests that hold the rule.

The first thirteen are those that this project has promised from the start; the others are what a sceptical payments
engineer would try next. The tests of a mutant are chosen narrowly: those whose rule it breaks.
"""

from __future__ import annotations

from billing_orchestration_tests.torture.mutant import Edit, Mutant
from billing_orchestration_tests.torture.mutants_of_clocks import CLOCKS
from billing_orchestration_tests.torture.mutants_of_databases import DATABASES
from billing_orchestration_tests.torture.mutants_of_looks import LOOKS
from billing_orchestration_tests.torture.mutants_of_pace import PACE
from billing_orchestration_tests.torture.mutants_of_privacy import PRIVACY
from billing_orchestration_tests.torture.mutants_of_shops import SHOPS
from billing_orchestration_tests.torture.mutants_of_terms import TERMS

_ANSWERS = "domain/answers.py"
_ATTEMPT = "domain/attempts.py"
_CHARGING = "jobs/autopayment/charging.py"
_PACE = "jobs/autopayment/pace.py"
_PIPELINE = "jobs/autopayment/pipeline.py"
_CLIENT = "provider/client.py"
_LISTS = "provider/lists.py"
_TRANSLATION = "provider/translation.py"
_RENEWALS = "domain/renewals.py"
_SETTLEMENT = "domain/settlement.py"
_SETTLING = "database/settling.py"
_FACTS = "database/settling_facts.py"
_ROWS = "database/settlement_rows.py"
_ATTEMPTS = "database/attempts.py"
_SECOND_LOOK = "database/second_look.py"
_SHARDING = "jobs/autopayment/shards.py"
_MIGRATION = "database/migrations/versions/0001_records_of_renewal_and_settlement.py"

_FAULTS = "jobs/test_charging_faults.py::"
_RACES = "jobs/test_charging_races.py::"
_AUTOPAYMENT = "jobs/test_autopayment.py::"
_MATCHING_BOTH = "jobs/test_both_matching_jobs.py::"
_PENDING = "jobs/test_matching_pending_payments.py::"
_SUCCESSFUL = "jobs/test_matching_successful_payments.py::"
_STALE = "jobs/test_expire_payments.py::"
_OVER = "jobs/test_expire_subscriptions.py::"
_RESTORED = "jobs/test_restored_database.py::"
_LOST = "database/test_lost_attempts.py::"
_SETTLING_RACES = "database/test_settling_races.py::"
_ATTEMPT_ROWS = "database/test_attempts.py::"
_SETTLING_DB = "database/test_settling.py::"
_PURCHASES = "domain/test_settlement.py::"

_SHARDS = "jobs/test_shards.py::"
_SHARDED_SLICE = "database/test_renewals.py::test_the_shards_together_hold_everything_once[3]"
_UNCLEAR = (
    "domain/test_settlement.py::test_a_renewal_that_the_webhook_has_written_beside_another_grant_is_left_to_a_person"
)

_OVER_WITH_ITS_GRACE = "paid_until <= today - timedelta(days=rules.grace_days)"
_MOVED_END = (
    "database/test_attempts.py::"
    "test_a_subscription_whose_end_was_moved_while_a_charge_was_open_or_in_review_is_not_charged"
)
_SETTLING_DRY = "jobs/test_run_config.py::test_a_dry_run_shows_what_the_run_would_do_and_writes_nothing_anywhere"
_LOST_ANSWER = (
    _FAULTS + "test_a_charge_whose_answer_is_lost_is_sent_again_with_the_same_key_and_body[the answer is cut off]"
)

_WRITE_ALL = "    payment_rows = _write(connection, stamp, rows)\n"

# --- the thirteen -------------------------------------------------------------------------------------------------

_USER_LOCK = Edit(_FACTS, "    lock_users(connection, batch)\n    books", "    books")
_ROW_LOCK = Edit(_FACTS, "\n        ORDER BY id FOR NO KEY UPDATE", "\n        ORDER BY id")
_SUBSCRIPTION_LOCK = Edit(_FACTS, "    ORDER BY s.id FOR NO KEY UPDATE OF s\n", "    ORDER BY s.id\n")
_ATTEMPT_LOCK = Edit(
    _FACTS,
    "ORDER BY subscription_id, period_start, number FOR UPDATE",
    "ORDER BY subscription_id, period_start, number",
)

PROMISED = (
    Mutant(
        "no key",
        "a charge carries its attempt's key, and nobody makes one up",
        # What the official SDK does where it is given none.
        (
            Edit(
                "provider/sdk.py",
                '{"Idempotence-Key": idempotence_key}',
                '{"Idempotence-Key": __import__("uuid").uuid4().hex}',
            ),
        ),
        (_LOST_ANSWER,),
    ),
    Mutant(
        "a random key",
        "the key is derived from the attempt's identity",
        (Edit(_ATTEMPT, "uuid.uuid5(_KEY_NAMESPACE, identity)", "uuid.uuid4()"),),
        ("domain/test_attempts.py::test_the_key_of_an_attempt_is_the_same_for_ever",),
    ),
    Mutant(
        "the key committed after the POST",
        "the attempt is committed before its first request",
        (
            Edit(
                _CHARGING,
                "return open_and_claim(connection, stamp, [work.attempt for work in group], view)",
                "return Claimed(dict.fromkeys([work.attempt.id for work in group], False), {})",
            ),
            Edit(
                _CHARGING,
                "        if names_another_attempt(attempt, answer):\n",
                "        if work.is_new and work.sends == 1:\n"
                "            with self.database.begin() as late:\n"
                "                open_and_claim(late, self.make_stamp(), [attempt])\n"
                "        if names_another_attempt(attempt, answer):\n",
            ),
        ),
        (_FAULTS + "test_an_attempt_is_committed_with_its_key_and_first_instant_before_its_request_arrives",),
    ),
    Mutant(
        "a re-send after 24 h",
        "a key that the provider may have forgotten is never sent",
        (Edit(_ATTEMPT, "KEY_LIFETIME_HOURS = 23", "KEY_LIFETIME_HOURS = 48"),),
        (_FAULTS + "test_a_key_is_sent_again_until_23_hours_and_never_after",),
    ),
    Mutant(
        "canceled taken for success",
        "only a success is granted",
        (
            Edit(
                _PIPELINE,
                "if isinstance(answer, ProviderPayment) and answer.status == SUCCEEDED:",
                'if isinstance(answer, ProviderPayment) and answer.status in (SUCCEEDED, "canceled"):',
            ),
            Edit(_SETTLEMENT, "if payment.status != SUCCEEDED:", 'if payment.status not in (SUCCEEDED, "canceled"):'),
        ),
        (_AUTOPAYMENT + "test_a_hard_decline_stops_further_charges_for_the_period",),
    ),
    Mutant(
        "a renewal's method id stored as its payment id",
        "the payment row holds the NEW payment's id",
        (
            Edit(
                _SETTLING,
                _WRITE_ALL,
                f"{_WRITE_ALL}"
                "    for d in decisions:\n"
                "        if isinstance(d, Settle) and d.attempt is not None and d.payment.method_id:\n"
                '            connection.exec_driver_sql("DROP INDEX bo_payments_external_payment_id_unique")\n'
                "            update = 'UPDATE payments SET external_payment_id=:m WHERE external_payment_id=:p'\n"
                '            connection.execute(sa.text(update), {"m": d.payment.method_id, "p": d.payment.id})\n',
            ),
        ),
        (_AUTOPAYMENT + "test_a_due_subscription_is_charged_and_extended_by_a_month_from_its_old_end",),
    ),
    Mutant(
        "renewal date from now",
        "a renewal extends from the old end",
        (
            Edit(
                _SETTLEMENT,
                "end = case.calendar.next_end(subscription.started_at, old_end, period)",
                "end = case.calendar.next_end(subscription.started_at, case.now, period)",
            ),
        ),
        (_AUTOPAYMENT + "test_an_overdue_subscription_is_extended_from_its_old_end_not_from_today",),
    ),
    Mutant(
        "the diff without REFUNDED rows",
        "what the service holds as REFUNDED is left",
        (Edit(_SETTLEMENT, 'FINAL_ROWS = ("SUCCEEDED", "REFUNDED")', 'FINAL_ROWS = ("SUCCEEDED",)'),),
        ("domain/test_matching.py::test_a_success_that_the_service_holds_as_succeeded_or_refunded_is_left",),
    ),
    Mutant(
        "a window on the DB side",
        "rows are looked up by the provider's ids, whatever their age",
        (
            Edit(
                "database/matching.py",
                '\n_WITH_ID = f"external_payment_id = ANY(:ids) AND',
                '\n_WITH_ID = f"external_payment_id = ANY(:ids) AND created_at >='
                " (SELECT max(created_at) FROM payments) - interval '1 hour' AND",
            ),
        ),
        (
            "database/test_matching.py::test_rows_are_found_by_id_whatever_their_status_and_age",
            _SUCCESSFUL + "test_rows_are_looked_up_by_id_so_that_no_orphan_is_invented_at_the_edge_of_the_window",
        ),
    ),
    Mutant(
        "the extension in another transaction",
        "grant and payment row are written together or not at all",
        (
            Edit(
                _SETTLING,
                _WRITE_ALL,
                "    extensions, rows.extensions = rows.extensions, []\n"
                f"{_WRITE_ALL}"
                "    if extensions:\n"
                '        connection.exec_driver_sql("COMMIT")\n'
                "        _write(connection, stamp, Rows(stamp.at, extensions=extensions))\n",
            ),
            Edit(
                _SETTLING,
                "if not (rows.changes or rows.settlements):",
                "if not (rows.changes or rows.settlements or rows.extensions):",
            ),
        ),
        (
            "jobs/test_bad_input.py::"
            "test_a_connection_that_is_cut_while_a_subscription_is_extended_leaves_its_payment_unsettled",
        ),
    ),
    Mutant(
        "a partial slice accepted",
        "a list that broke off decides nothing",
        (
            Edit(
                _LISTS,
                "            except ProviderError as fault:\n                raise IncompleteSlice(",
                "            except ProviderError as fault:\n"
                "                if page > 1:\n"
                "                    return pages\n"
                "                raise IncompleteSlice(",
            ),
        ),
        (_MATCHING_BOTH + "test_a_list_that_breaks_off_on_page_seven_fails_the_run_before_anything_is_applied",),
    ),
    Mutant(
        "no lock at apply",
        "every precondition is read under lock",
        (_USER_LOCK, _ROW_LOCK, _SUBSCRIPTION_LOCK, _ATTEMPT_LOCK),
        (_SETTLING_RACES + "test_eight_payments_of_one_customer_and_plan_make_one_subscription_of_eight_periods",),
    ),
    Mutant(
        "a stop at the first failure",
        "one poisoned row never stops the others",
        (
            Edit(
                "database/one_by_one.py",
                "        if is_about_every_row(error):\n            raise\n    else:",
                "        raise\n    else:",
            ),
        ),
        (_PENDING + "test_a_row_that_the_services_own_trigger_refuses_never_stops_the_others",),
    ),
)

# --- and others ---------------------------------------------------------------------------------------------------

_SPOILT = "jobs/test_refused_rows.py::test_one_row_that_a_trigger_spoils_never_stops_the_others"

FURTHER = (
    Mutant(
        "a trigger's code taken for the database's",
        "a code of the database's that only one row meets is that row's fault",
        (Edit("database/one_by_one.py", "SchemaProblem)) and not error.is_doubtful", "SchemaProblem))"),),
        (_SPOILT + "[extensions-a table that is missing]",),
    ),
    Mutant(
        "only data and integrity taken for a row's",
        "whatever is not about the connection, rights, shape or resources is the row's fault",
        (
            Edit(
                "database/engine.py",
                "    if state[:2] not in _OF_THE_DATABASE:\n",
                '    if state[:2] in ("22", "23", "P0"):\n',
            ),
        ),
        ("jobs/test_refused_rows.py::test_what_is_each_rows_own_fault_puts_each_before_a_person",),
    ),
    Mutant(
        "no end to a doubt",
        "what a few rows in a row meet alike is the database's fault",
        (Edit("database/one_by_one.py", "        if self._in_a_row >= FEW:\n", "        if False:\n"),),
        (
            "jobs/test_refused_rows.py::"
            "test_what_every_row_meets_alike_stops_the_run_with_the_reason_and_fills_no_quarantine[purchases]",
        ),
    ),
    Mutant(
        "an extension that was reverted",
        "what RETURNING says is compared with what was meant",
        (Edit(_SETTLING, "'extended', count(*) FILTER (WHERE as_meant)", "'extended', count(*)"),),
        (
            "jobs/test_refused_rows.py::"
            "test_a_renewal_that_is_paid_and_cannot_be_granted_is_told_and_never_stops_the_others[reverted]",
        ),
    ),
    Mutant(
        "an expiry that was reverted",
        "what RETURNING says is compared with what was meant",
        (Edit("database/expiry.py", "FILTER (WHERE NOT is_expired)", "FILTER (WHERE false)"),),
        (_SPOILT + "[subscriptions that are over-reverted]",),
    ),
    Mutant(
        "a deferred trigger heard at commit",
        "a deferred trigger speaks up while its rows are known",
        (Edit("database/expiry.py", "            connection.execute(_CHECK_DEFERRED)\n", ""),),
        (_SPOILT + "[subscriptions that are over-at commit]",),
    ),
    Mutant(
        "the new subscription in another transaction",
        "a created subscription and its payment row are written together or not at all",
        (
            Edit(
                _SETTLING,
                "    rows = Rows(stamp.at)\n",
                '    connection.exec_driver_sql("COMMIT")\n    rows = Rows(stamp.at)\n',
            ),
        ),
        ("jobs/test_bad_input.py::test_a_connection_that_is_cut_in_the_middle_of_applying_changes_nothing_twice",),
    ),
    Mutant(
        "another key for each send",
        "a lost answer is asked for with the same key",
        (Edit(_CHARGING, "str(attempt.idempotence_key), before_send", "str(uuid.uuid4()), before_send"),),
        (_LOST_ANSWER,),
    ),
    Mutant(
        "the POST repeated inside the client",
        "one call is one POST",
        (
            Edit(
                _CLIENT,
                "answer = self._send(call, lambda: charges.post(sent, idempotence_key))",
                "answer, _ = self._within_bound(lambda: self._send(call, lambda: charges.post(sent, idempotence_key)))",
            ),
        ),
        ("provider/test_client_wire.py::test_what_is_not_understood_of_a_charge_is_unknown_and_sent_once",),
    ),
    Mutant(
        "first_sent_at not written",
        "what may have been sent is known to be so after a crash",
        (Edit(_ATTEMPTS, ":at, :at, :at, 1, true, :run_id", ":at, NULL, :at, 1, true, :run_id"),),
        (_ATTEMPT_ROWS + "test_what_is_written_ahead_is_all_that_the_next_run_needs",),
    ),
    Mutant(
        "the SQL guard on old keys dropped",
        "a claim itself refuses a key of 23 h",
        (
            Edit(
                _ATTEMPTS,
                "AND (w.first_sent_at IS NULL OR w.first_sent_at > :oldest_key)",
                "AND CAST(:oldest_key AS timestamptz) IS NOT NULL",
            ),
        ),
        (_ATTEMPT_ROWS + "test_a_key_of_23_hours_is_never_sent_again",),
    ),
    Mutant(
        "the decision ignores the key's age",
        "an unknown outcome of 23 h is searched for",
        (Edit(_ATTEMPT, "now - attempt.first_sent_at >= KEY_LIFETIME", "False"),),
        ("domain/test_renewals.py::test_an_unknown_outcome_older_than_23_hours_is_never_sent_again",),
    ),
    Mutant(
        "the attempt's lock dropped",
        "two processes never send one key at the same time",
        (Edit(_ATTEMPTS, "pg_try_advisory_lock(:class, hashtext(CAST(id AS text)))", "(:class > 0)"),),
        (_RACES + "test_a_run_that_meets_an_attempt_in_anothers_hands_leaves_it_alone",),
    ),
    Mutant(
        "the subscription not looked at before sending",
        "renewed, canceled or paused meanwhile: not charged",
        (
            Edit(_SECOND_LOOK, "WHEN s.status IS DISTINCT FROM 'ACTIVE'", "WHEN false"),
            Edit(_SECOND_LOOK, "WHEN s.ended_at IS DISTINCT FROM w.period_start", "WHEN false"),
        ),
        (_ATTEMPT_ROWS + "test_a_subscription_that_changed_is_not_charged",),
    ),
    Mutant(
        "a charge beside an open one of another period",
        "an open attempt is answered before the next charge",
        (Edit(_SECOND_LOOK, "AND (a.state IN {sql_list(*OPEN)} OR", "AND ("),),
        (_MOVED_END,),
    ),
    Mutant(
        "a charge beside one in review of another period",
        "what a person judges is judged before the next charge",
        (Edit(_SECOND_LOOK, 'OR {in_review("a")}', ""),),
        (_MOVED_END,),
    ),
    Mutant(
        "a charge beside one in review, as decided",
        "what a person judges is judged before the next charge",
        (Edit(_RENEWALS, "for attempt in in_review if not", "for attempt in () if not"),),
        ("domain/test_renewals.py::test_a_subscription_with_an_attempt_of_another_period_in_review_is_not_charged",),
    ),
    Mutant(
        "a settled period charged once more when its end was moved back",
        "no period begins before the end of one that was settled",
        (Edit(_SECOND_LOOK, "AND st.period_end > w.period_start)", "AND false)"),),
        (_ATTEMPT_ROWS + "test_no_period_begins_before_the_end_of_one_that_was_settled",),
    ),
    Mutant(
        "a settled period decided to be charged once more",
        "no period begins before the end of one that was settled",
        (Edit(_RENEWALS, "due.ended_at < due.settled_until:", "False:"),),
        (
            "domain/test_renewals.py::test_no_period_begins_before_the_end_of_one_that_was_settled",
            _AUTOPAYMENT + "test_an_end_that_is_moved_back_into_a_settled_period_brings_no_second_charge",
        ),
    ),
    Mutant(
        "an entry that names the charge overlooked",
        "an open quarantine entry that names the attempt holds it",
        (Edit(_SECOND_LOOK, "(q.attempt_id = w.id OR (", "(false OR ("),),
        (_ATTEMPT_ROWS + "test_an_open_quarantine_entry_about_an_attempt_holds_it",),
    ),
    Mutant(
        "an entry about another try of the period overlooked",
        "a paid attempt that our records have lost holds its subscription",
        (Edit(_SECOND_LOOK, "AND q.subscription_id = w.subscription_id)))", "AND false)))"),),
        (_ATTEMPT_ROWS + "test_a_paid_attempt_that_our_records_have_lost_holds_its_subscription_whatever_its_number",),
    ),
    Mutant(
        "an entry that names the planned attempt not decided by",
        "an open quarantine entry that names the attempt holds it",
        (Edit(_RENEWALS, "if (why := holds.find(attempt)) is not None:", "if False:"),),
        ("domain/test_renewals.py::test_an_open_quarantine_entry_that_names_the_planned_attempt_holds_the_charge",),
    ),
    *(
        Mutant(
            f"a lost renewal granted: {what}",
            "a lost attempt is settled by itself only where id, subscription, period and amount fit",
            (Edit("domain/lost_attempts.py", old, new),),
            (_LOST + f"test_a_renewal_whose_attempt_was_lost_and_that_does_not_fit_waits_for_a_person[{case}]",),
        )
        for what, old, new, case in (
            ("any id", "[0] == named", "[0] != named", "an id that is not derived from it"),
            ("any amount", "if payment.money not in plan.prices:", "if False:", "another amount"),
            (
                "any end",
                "if not is_written and subscription.ended_at != identity.period_start:",
                "if False:",
                "an end that was moved",
            ),
            (
                "any user",
                "(claims.user_id, claims.plan_id) != (subscription.user_id, subscription.plan_id) or",
                "",
                "another user",
            ),
        )
    ),
    Mutant(
        "a lost renewal left to a person",
        "what its metadata proves is settled by itself",
        (
            Edit(
                _FACTS,
                "for id_, attempt in rebuilt.items() if isinstance(attempt, Attempt)",
                "for id_, attempt in rebuilt.items() if attempt is None",
            ),
        ),
        (
            "jobs/test_restored_database.py::test_a_charge_that_the_database_has_lost_is_settled_by_a_matching_tick_and_not_made_again",
        ),
    ),
    Mutant(
        "no search for lost charges",
        "what the provider charged and our records have lost is settled before anybody is charged",
        (
            Edit(
                "jobs/autopayment/steps.py", "may_charge = bool(found.due or found.open_attempts)", "may_charge = False"
            ),
        ),
        (_RESTORED + "test_a_run_settles_what_the_database_has_lost_before_it_charges_anybody[whole]",),
    ),
    Mutant(
        "a lost charge that cannot be read holds nothing",
        "an unreadable record holds the attempt and the subscription that it names, whichever job has seen it",
        (Edit("jobs/settling.py", "charge, _ = charge_of(item)", "charge = None"),),
        (_RESTORED + "test_a_lost_charge_whose_record_cannot_be_read_is_not_made_again",),
    ),
    Mutant(
        "an unreadable record of a known charge holds it",
        "an unreadable record holds nothing where our records have its charge in hand",
        (Edit("database/second_look.py", "AND NOT ({entry}.kind = '{UNREADABLE}' AND", "AND NOT (false AND"),),
        (
            _ATTEMPT_ROWS
            + "test_an_unreadable_record_holds_its_subscription_unless_our_records_have_its_charge_in_hand",
            _RESTORED + "test_a_record_that_cannot_be_read_holds_nothing_where_our_records_have_its_charge",
        ),
    ),
    Mutant(
        "a success beside a try that may be paid holds nothing",
        "what may be paid twice is neither charged nor ended before it is known whether it is",
        (Edit("domain/problem_kinds.py", "UNREADABLE, SECOND_SUCCESS)", "UNREADABLE)"),),
        (
            _ATTEMPT_ROWS + "test_a_success_beside_another_attempt_holds_its_period_once_that_one_is_closed_unpaid",
            _FAULTS + "test_a_late_success_beside_a_try_that_never_arrived_keeps_it_from_being_sent_again",
            _RESTORED + "test_a_paid_subscription_does_not_expire_because_its_payment_came_beside_a_pending_try",
        ),
    ),
    Mutant(
        "a true second success holds the next period",
        "a second success of a period that is granted holds no other",
        (Edit(_SECOND_LOOK, "AND NOT ({entry}.kind = '{SECOND_SUCCESS}' AND", "AND NOT (false AND"),),
        (
            _ATTEMPT_ROWS + "test_a_second_success_of_a_period_that_is_granted_does_not_hold_the_next",
            _FAULTS + "test_a_late_success_beside_a_try_that_is_paid_too_is_left_to_a_person_and_holds_no_later_period",
        ),
    ),
    Mutant(
        "a lost attempt of a second success not written down",
        "it is known which period a second success was paid for",
        (Edit(_SETTLEMENT, "lost=attempt if attempt.is_recreated else None", "lost=None"),),
        (_LOST + "test_a_lost_renewal_of_a_period_that_another_attempt_has_taken_is_a_second_success",),
    ),
    Mutant(
        "a success left alone waits for a person",
        "a success beside a try that has turned out unpaid is granted by itself",
        (
            Edit(
                "jobs/autopayment/steps.py",
                "        settle_doubtful(report, database, provider, stamp, threads)\n",
                "",
            ),
        ),
        (
            _FAULTS
            + "test_a_late_success_beside_a_pending_try_is_granted_once_that_one_is_declined_and_nothing_is_charged",
        ),
    ),
    Mutant(
        "an open entry that never learns whose charge it is about",
        "an open entry about an unreadable record learns which attempt that names",
        (Edit("database/audit.py", "WHERE q.kind = '{UNREADABLE}' AND q.attempt_id IS NULL", "WHERE false"),),
        (_RESTORED + "test_an_open_entry_learns_whose_charge_it_is_about_once_that_can_be_read",),
    ),
    Mutant(
        "a canceled lost charge held for ever",
        "a charge that the provider says is canceled holds nothing any more",
        (Edit("jobs/autopayment/doubtful_charges.py", "elif answer.status == CANCELED:", "elif False:"),),
        (_RESTORED + "test_a_lost_charge_that_can_be_read_again_is_settled_or_holds_nothing_more[False]",),
    ),
    Mutant(
        "a lost charge that cannot be read passed over",
        "a record that cannot be read and names an attempt may be its charge",
        (Edit("jobs/autopayment/lost_charges.py", "odd.extend(part.unusable)", "pass"),),
        (_RESTORED + "test_a_lost_charge_whose_record_cannot_be_read_is_not_made_again",),
    ),
    Mutant(
        "no search for lost charges before shards",
        "what the provider charged and our records have lost is settled before anybody is charged",
        (Edit(_SHARDING, "may_charge = bool(counts.due or counts.open_attempts)", "may_charge = False"),),
        (_RESTORED + "test_a_run_settles_what_the_database_has_lost_before_it_charges_anybody[in shards]",),
    ),
    Mutant(
        "pending charges left to their shards",
        "what became of a pending charge is written down before any shard of the run decides",
        (Edit(_SHARDING, "    conclude_pending(report, database, provider, clock, threads, stamp)\n", "    pass\n"),),
        (
            _SHARDS + "test_a_card_that_a_pending_charge_of_any_shard_has_stopped_is_charged_by_none",
            _RESTORED
            + "test_a_lost_success_beside_a_try_that_counts_as_pending_still_is_not_charged_again_and_is_granted",
        ),
    ),
    Mutant(
        "a watermark trusted beyond its gap",
        "our records are whole only as far as a matching run can have caught up",
        (Edit("domain/lost_attempts.py", " and whole_until >= now - LONGEST_CATCH_UP", ""),),
        (
            _RESTORED + "test_a_watermark_that_has_left_a_gap_does_not_prove_that_nothing_is_lost",
            "domain/test_lost_attempts.py::test_the_list_is_searched_from_where_our_records_are_whole",
        ),
    ),
    Mutant(
        "a matching run trusted about what is not paid",
        "a matching run proves nothing about a charge that is still pending",
        (
            Edit(
                "domain/lost_attempts.py", "Stretches((since, settled) if since < settled else None,", "Stretches(None,"
            ),
        ),
        (
            _RESTORED
            + "test_a_matching_run_that_has_come_before_does_not_hide_a_lost_charge_that_is_still_pending[whole]",
            "domain/test_lost_attempts.py::test_the_list_is_searched_from_where_our_records_are_whole",
        ),
    ),
    Mutant(
        "what is paid searched for before what is not",
        "a lost charge that is paid while the list is read is found",
        (
            Edit(
                "jobs/autopayment/lost_charges.py",
                "((fetch_unfinished, stretches.unfinished), (fetch_day, stretches.whole))",
                "((fetch_day, stretches.whole), (fetch_unfinished, stretches.unfinished))",
            ),
        ),
        (_RESTORED + "test_a_lost_charge_that_is_paid_while_the_list_is_read_is_settled_and_not_made_again",),
    ),
    Mutant(
        "a launch that has not looked vouches for our records",
        "records count as whole only since a run that has searched",
        (
            Edit(
                "jobs/autopayment/lost_charges.py", "        return Search()", "        return Search(whole_until=now)"
            ),
        ),
        (_RESTORED + "test_launches_one_after_another_do_not_leave_a_lost_charge_behind",),
    ),
    Mutant(
        "a lost charge that is still pending forgotten",
        "a lost charge that may still be paid holds its period",
        (Edit("jobs/autopayment/lost_charges.py", "map(_unfinished, lost.unfinished)", "map(_unfinished, ())"),),
        (_RESTORED + "test_a_lost_charge_that_is_still_pending_holds_its_period_and_is_settled_once_paid",),
    ),
    Mutant(
        "a lost renewal that does not fit holds nothing",
        "a paid attempt that our records have lost holds its subscription",
        (
            Edit(
                _SETTLEMENT,
                "held = claimed_subscription(payment.metadata) if is_ours else None",
                "held = None",
            ),
        ),
        (_LOST + "test_a_renewal_whose_attempt_was_lost_and_that_does_not_fit_waits_for_a_person[another amount]",),
    ),
    Mutant(
        "the second look older than its lock",
        "what is found while the subscription is waited for counts",
        (
            Edit(
                _ATTEMPTS,
                '_LOCK_SUBSCRIPTIONS, {"ids": [attempt.subscription_id for attempt in attempts]}',
                '_LOCK_SUBSCRIPTIONS, {"ids": []}',
            ),
        ),
        (_ATTEMPT_ROWS + "test_what_is_found_while_the_subscription_is_waited_for_holds_the_charge",),
    ),
    Mutant(
        "two active subscriptions of one user and plan charged",
        "only the one that ends last is charged",
        (Edit(_RENEWALS, "if due.outlasted_by is not None:", "if False:"),),
        (
            "domain/test_renewals.py::test_of_two_active_subscriptions_of_one_user_and_plan_the_one_that_ends_first_waits_for_a_person",
        ),
    ),
    Mutant(
        "two active subscriptions of one user and plan claimed",
        "only the one that ends last is charged",
        (Edit(_SECOND_LOOK, "WHEN EXISTS (SELECT FROM subscriptions t WHERE {OUTLASTS})", "WHEN false"),),
        (
            _ATTEMPT_ROWS
            + "test_of_two_active_subscriptions_of_one_user_and_plan_only_the_one_that_ends_last_is_charged",
        ),
    ),
    Mutant(
        "a claim that never grows old",
        "a run that slept for a day sends nothing",
        (Edit(_CHARGING, "_CLAIM_LIFETIME = timedelta(seconds=5)", "_CLAIM_LIFETIME = timedelta(days=9)"),),
        (_RACES + "test_a_run_that_slept_for_a_day_between_claim_and_send_sends_nothing",),
    ),
    Mutant(
        "the unique index on live attempts not unique",
        "one live or successful attempt of a period",
        (
            Edit(
                _MIGRATION,
                "CREATE UNIQUE INDEX renewal_attempts_one_live_per_period",
                "CREATE INDEX renewal_attempts_one_live_per_period",
            ),
        ),
        (_ATTEMPT_ROWS + "test_the_database_itself_refuses_a_second_live_attempt_of_a_period",),
    ),
    Mutant(
        "REVIEW not in the unique index",
        "a period whose charge is in review is not charged again",
        (
            Edit(
                _MIGRATION,
                "'PLANNED', 'UNKNOWN', 'PENDING', 'SUCCEEDED', 'REVIEW', 'REFUNDED')\n    \"\"\"",
                "'PLANNED', 'UNKNOWN', 'PENDING', 'SUCCEEDED', 'REFUNDED')\n    \"\"\"",
            ),
        ),
        (_ATTEMPT_ROWS + "test_a_period_with_a_live_attempt_gets_no_second_one",),
    ),
    Mutant(
        "settlements without their primary key",
        "one grant for one provider payment",
        (
            Edit(
                _MIGRATION,
                "CREATE TABLE billing_orchestration.settlements (\n        external_payment_id text PRIMARY KEY,",
                "CREATE TABLE billing_orchestration.settlements (\n        external_payment_id text NOT NULL,",
            ),
        ),
        ("database/test_migrations.py::test_the_migrated_schema_is_the_one_that_the_code_knows",),
    ),
    Mutant(
        "conclude without its precondition",
        "what is closed stays as it is",
        (
            Edit(
                _ATTEMPTS,
                "WHERE a.state IN {sql_list(*OPEN)}\n          -- A send counts up",
                "WHERE true\n          -- A send counts up",
            ),
        ),
        (_ATTEMPT_ROWS + "test_what_is_closed_stays_as_it_is",),
    ),
    Mutant(
        "conclude whatever was sent since",
        "a decision from an old reading does not close a claimed attempt",
        (
            Edit(
                _ATTEMPTS,
                "AND (NOT x.as_read OR (a.state = x.read_state AND a.sends = x.read_sends))",
                "AND (x.as_read OR true)",
            ),
        ),
        (_ATTEMPT_ROWS + "test_an_attempt_that_was_sent_since_it_was_read_is_not_closed_as_read",),
    ),
    Mutant(
        "the breaker removed",
        "a provider that fails for everyone gets few requests",
        (Edit(_PACE, "BREAKER_LIMIT = 8", "BREAKER_LIMIT = 10**9"),),
        (
            _FAULTS + "test_a_provider_that_fails_for_everyone_gets_few_requests_and_the_rest_is_named_and_untouched"
            "[500 before the charge]",
        ),
    ),
    Mutant(
        "429 taken for a decline",
        "a 429 slows down, and its charge is tried again",
        (
            Edit(
                _CHARGING,
                "    work.uncounted += isinstance",
                "    if isinstance(answer, RateLimited):\n"
                "        return Closing(attempt, 'DECLINED', str(answer))\n"
                "    work.uncounted += isinstance",
            ),
        ),
        (_FAULTS + "test_a_storm_of_429_ends_in_charges_not_in_failures",),
    ),
    Mutant(
        "a 429 that slows nobody down",
        "after a 429 nobody sends before the provider wishes",
        (Edit(_CLIENT, "            self.rate.slow_down(error.retry_after_s)\n", "            pass\n"),),
        (_FAULTS + "test_nobody_sends_before_the_provider_wishes_after_a_429",),
    ),
    Mutant(
        "silence taken for never sent",
        "no answer means unknown, never unsent",
        (
            Edit(
                _TRANSLATION,
                '            return OutcomeUnknown(f"{call.what}: no answer within the time allowed.'
                ' {_unknown(call)}", timed_out=True)',
                '            return NeverSent(f"{call.what}: no answer within the time allowed.")',
            ),
        ),
        (
            _FAULTS + "test_a_charge_whose_answers_are_all_lost_is_unknown_never_failed_and_concluded_by_the_next_run"
            "[silence after the charge]",
        ),
    ),
    Mutant(
        "never sent taken for unknown",
        "an attempt that never left stays planned and unsent",
        (Edit(_CHARGING, "if isinstance(answer, (Withheld, NeverSent)):", "if isinstance(answer, Withheld):"),),
        (_FAULTS + "test_a_provider_that_nobody_reaches_leaves_attempts_planned_and_sends_the_same_key_later",),
    ),
    Mutant(
        "a 500 taken for a refusal",
        "what is not recognised is unknown, never failed",
        (Edit(_TRANSLATION, "if by_provider and status == 400:", "if by_provider and status in (400, 500):"),),
        (
            _FAULTS
            + "test_a_charge_whose_answer_is_lost_is_sent_again_with_the_same_key_and_body[500 after the charge]",
        ),
    ),
    Mutant(
        "a refused re-send closes the attempt",
        "a refusal says nothing about an earlier send",
        (
            Edit(
                _ANSWERS,
                "    if sent_before:\n        reason = f",
                "    if False:\n        reason = f",
            ),
        ),
        (_FAULTS + "test_a_refusal_of_a_second_send_says_nothing_about_the_first",),
    ),
    Mutant(
        "a wrong shop key does not stop the run",
        "a wrong shop key costs one request",
        (
            Edit(
                _PACE,
                "            self.stop(str(answer), type(answer).__name__)\n",
                "            self._breaker.heard()\n",
            ),
            Edit(_CHARGING, "if isinstance(answer, WrongCredentials):", "if False:"),
        ),
        (_FAULTS + "test_a_shop_key_that_is_withdrawn_during_a_run_stops_it_and_nobody_is_charged_twice",),
    ),
    Mutant(
        "a sender goes on after a wrong shop key",
        "a shop key that is withdrawn costs no more requests than are under way",
        (Edit(_CHARGING, "if isinstance(answer, WrongCredentials):", "if False:"),),
        (_FAULTS + "test_a_sender_that_hears_of_a_wrong_shop_key_sends_nothing_more",),
    ),
    Mutant(
        "an answer about another attempt believed",
        "an answer that names another attempt concludes nothing",
        (
            Edit(
                _ANSWERS,
                "return payment.claims.names_an_attempt and payment.claims.renewal_attempt_id != attempt.id",
                "return False",
            ),
        ),
        (
            _FAULTS + "test_a_charge_whose_answer_is_lost_is_sent_again_with_the_same_key_and_body"
            "[an answer about another attempt]",
            _FAULTS + "test_an_answer_about_another_payment_to_the_question_about_a_pending_one_concludes_nothing",
        ),
    ),
    Mutant(
        "a pending charge sent again",
        "a pending charge is only asked about",
        (
            Edit(
                _RENEWALS,
                "    if attempt.state == State.PENDING:\n        return NotCharged(\n",
                "    if False:\n        return NotCharged(\n",
            ),
            Edit(
                _ATTEMPTS,
                "AND w.state IN {sql_list(State.PLANNED, State.UNKNOWN)}\n",
                "AND w.state IN {sql_list(*OPEN)}\n",
            ),
        ),
        ("domain/test_renewals.py::test_a_pending_attempt_is_only_asked_about_and_never_sent_again",),
    ),
    Mutant(
        "one search is enough",
        "absence takes two complete scans",
        (
            Edit(
                _RENEWALS,
                "    if attempt.first_absent_at is None or is_in_future(attempt.first_absent_at, now):\n",
                "    if False:\n",
            ),
            Edit(_RENEWALS, "if now - attempt.first_absent_at < SCAN_DISTANCE:", "if False:"),
        ),
        (_FAULTS + "test_a_list_that_lags_is_why_absence_takes_two_searches",),
    ),
    Mutant(
        "two searches in one minute",
        "the two scans are an hour apart",
        (Edit(_ATTEMPT, "SCAN_DISTANCE = timedelta(hours=1)", "SCAN_DISTANCE = timedelta(minutes=1)"),),
        (_FAULTS + "test_a_charge_that_two_searches_an_hour_apart_do_not_find_is_void_and_a_new_one_follows",),
    ),
    Mutant(
        "an unreadable item proves absence",
        "an item that may be the charge proves nothing absent",
        (Edit(_ANSWERS, "elif unreadable or any(str(attempt.id) in text for text in odd):", "elif False:"),),
        (_FAULTS + "test_an_unreadable_item_that_names_the_attempt_proves_nothing_absent",),
    ),
    Mutant(
        "the metadata's attempt id ignored",
        "a success that names an attempt closes it, and creates nothing",
        (
            Edit(
                "domain/provider_payment.py",
                "        return uuid.UUID(value) if isinstance(value, str) else None",
                "        return None",
            ),
        ),
        (_SUCCESSFUL + "test_a_success_of_our_own_renewal_closes_its_attempt_and_extends_that_subscription",),
    ),
    Mutant(
        "refunded in full granted",
        "nothing is granted for money that went back",
        (Edit(_SETTLEMENT, "    if payment.refunded_in_full:\n", "    if False:\n"),),
        (_PENDING + "test_one_refunded_in_full_is_recorded_as_refunded_and_grants_nothing",),
    ),
    Mutant(
        "refunded in part taken for in full",
        "a partial refund leaves the grant",
        (Edit("domain/provider_payment.py", "self.refunded_amount >= self.money.amount", "self.refunded_amount > 0"),),
        (_PENDING + "test_one_refunded_in_part_is_granted",),
    ),
    Mutant(
        "a test payment granted in a live shop",
        "a test payment grants nothing in production",
        (Edit(_SETTLEMENT, "if payment.is_test and is_live and ruling is None:", "if False:"),),
        (_PENDING + "test_a_test_payment_in_a_live_shop_grants_nothing_and_goes_to_a_person",),
    ),
    Mutant(
        "currency ignored for a row",
        "5 RUB is not 5 USD: a purchase",
        (
            Edit(
                _SETTLEMENT,
                "    if case.row is not None and case.has_other_money and ruling is None:",
                "    if case.row and case.row.money and case.row.money.amount != payment.money.amount and not ruling:",
            ),
        ),
        (_PENDING + "test_an_amount_or_a_currency_that_differs_goes_to_a_person",),
    ),
    Mutant(
        "currency ignored for a renewal",
        "5 RUB is not 5 USD: a renewal",
        (
            Edit(
                _SETTLEMENT,
                "if payment.money != attempt.money and case.ruling is None:",
                "if payment.money.amount != attempt.money.amount and case.ruling is None:",
            ),
        ),
        (_FAULTS + "test_an_answer_with_another_amount_or_currency_goes_to_a_person_and_grants_nothing",),
    ),
    Mutant(
        "amount ignored",
        "a renewal of another amount goes to a person",
        (Edit(_SETTLEMENT, "if payment.money != attempt.money and case.ruling is None:", "if False:"),),
        (_FAULTS + "test_an_answer_with_another_amount_or_currency_goes_to_a_person_and_grants_nothing",),
    ),
    Mutant(
        "another user's metadata believed",
        "metadata that names another user than the row's goes to a person",
        (Edit(_SETTLEMENT, "if linked is not None and linked.user_id != user_id:", "if False:"),),
        (_PENDING + "test_metadata_of_another_user_than_the_rows_own_goes_to_a_person",),
    ),
    Mutant(
        "settled before, and settled again",
        "a payment is settled at most once",
        (Edit(_SETTLEMENT, "    if facts.settled_as is not None:\n", "    if False:\n"),),
        ("domain/test_settlement.py::test_a_payment_is_settled_at_most_once_ever",),
    ),
    Mutant(
        "a second success granted",
        "one attempt, one grant",
        (Edit(_SETTLEMENT, "    if other is not None:\n        return", "    if False:\n        return"),),
        (_FAULTS + "test_two_successes_for_one_attempt_are_one_grant_and_a_case_for_a_person",),
    ),
    Mutant(
        "an expired row not revived",
        "a late success revives an expired payment",
        (
            Edit(
                _SETTLEMENT,
                'SETTLEABLE_ROWS = ("PENDING", "CREATED", "EXPIRED")',
                'SETTLEABLE_ROWS = ("PENDING", "CREATED")',
            ),
        ),
        (_SUCCESSFUL + "test_a_late_success_revives_an_expired_payment",),
    ),
    Mutant(
        "a canceled row granted",
        "canceled here and paid there is for a person",
        (
            Edit(
                _SETTLEMENT,
                'SETTLEABLE_ROWS = ("PENDING", "CREATED", "EXPIRED")',
                'SETTLEABLE_ROWS = ("PENDING", "CREATED", "EXPIRED", "CANCELED")',
            ),
        ),
        (_SUCCESSFUL + "test_a_row_that_is_canceled_goes_to_a_person",),
    ),
    Mutant(
        "a renewal's own id taken for a saved method",
        "only the payment that saved a method names it",
        (Edit("database/renewals.py", "WHERE a.external_payment_id = p.external_payment_id)", "WHERE false)"),),
        ("database/test_renewals.py::test_a_renewals_payment_is_never_taken_for_a_saved_method",),
    ),
    Mutant(
        "a renewal replaces the saved method",
        "a renewal never changes the saved method",
        (
            Edit(_ROWS, "if grant.attempt is None and payment.method_saved and payment", "if payment"),
            Edit(_ROWS, '"payment_method_id": payment.method_id,', '"payment_method_id": payment.id,'),
        ),
        ("database/test_settling.py::test_a_renewal_never_changes_the_saved_method",),
    ),
    Mutant(
        "users not locked",
        "two settlers of one user wait for each other",
        (_USER_LOCK,),
        (_SETTLING_RACES + "test_eight_payments_of_one_customer_and_plan_make_one_subscription_of_eight_periods",),
    ),
    Mutant(
        "payment rows neither locked nor compared",
        "a webhook that finishes the row first is waited for",
        (
            _ROW_LOCK,
            Edit(
                _SETTLING,
                "WHERE p.id = x.id AND p.status::text IS NOT DISTINCT FROM x.old_status",
                "WHERE p.id = x.id",
            ),
        ),
        (_SETTLING_RACES + "test_a_webhook_that_finishes_the_row_first_is_waited_for_and_nothing_is_granted_again",),
    ),
    Mutant(
        "rows that appear meanwhile not looked for",
        "a webhook that inserts and extends first is not granted again",
        (Edit(_FACTS, "    if appeared:\n", "    if False:\n"),),
        (_SETTLING_RACES + "test_a_webhook_that_writes_a_purchases_row_and_extends_first_is_not_granted_again",),
    ),
    Mutant(
        "the extension without lock and precondition",
        "a subscription that changed meanwhile is not overwritten",
        (
            _SUBSCRIPTION_LOCK,
            Edit(
                _SETTLING,
                "WHERE s.id = x.id AND s.ended_at = x.old_ended_at"
                " AND s.status::text IS NOT DISTINCT FROM x.old_status",
                "WHERE s.id = x.id",
            ),
        ),
        (_SETTLING_RACES + "test_a_subscription_that_the_service_cancels_meanwhile_is_not_extended_by_a_purchase",),
    ),
    Mutant(
        "only created payments looked for",
        "a payment captured late is found",
        (
            Edit(
                _LISTS,
                '            for instant in ("created_at", "captured_at")\n            for first, last in bounds',
                '            for instant in ("created_at",)\n            for first, last in bounds',
            ),
            Edit(
                _LISTS,
                '        for instant in ("created_at", "captured_at"):\n            self._collect("payments", _filters',
                '        for instant in ("created_at",):\n            self._collect("payments", _filters',
            ),
        ),
        (_PENDING + "test_cash_that_is_paid_on_the_eighth_day_is_settled",),
    ),
    Mutant(
        "the overlap of windows removed",
        "what a tick left to the webhook is covered again",
        (Edit("domain/run_scope.py", "CATCH_UP_OVERLAP = timedelta(minutes=15)", "CATCH_UP_OVERLAP = timedelta(0)"),),
        ("jobs/test_watermarks.py::test_a_tick_after_an_outage_covers_all_of_it_with_an_overlap",),
    ),
    Mutant(
        "an outage not caught up",
        "a tick after an outage covers all of it",
        (Edit("domain/run_scope.py", "wanted = min(start, watermark - CATCH_UP_OVERLAP)", "wanted = start"),),
        ("jobs/test_watermarks.py::test_a_tick_after_an_outage_covers_all_of_it_with_an_overlap",),
    ),
    Mutant(
        "the watermark moves over what failed",
        "what must be retried is covered again",
        (Edit("jobs/matching_slice.py", "if not report.again and is_covered:", "if is_covered:"),),
        (_PENDING + "test_a_row_that_somebody_keeps_locked_is_left_for_another_try_and_the_others_are_settled",),
    ),
    Mutant(
        "the watermark moves over what was left to the webhook",
        "a watermark never moves past anything that was left",
        (
            Edit(
                "domain/run_scope.py",
                "end = window.end if left_since is None else min(window.end, left_since)",
                "end = window.end",
            ),
        ),
        (
            "jobs/test_watermarks.py::test_a_watermark_stays_behind_what_a_webhook_has_half_written_and_the_next_tick"
            "_settles_it",
        ),
    ),
    Mutant(
        "the watermark never goes back to what was left",
        "a watermark never moves past anything that was left",
        (
            Edit(
                "domain/run_scope.py",
                "if scope.heals and left_since is not None and left_since < watermark:",
                "if False:",
            ),
        ),
        (
            "jobs/test_watermarks.py::test_a_watermark_stays_behind_what_a_webhook_has_half_written_and_the_next_tick"
            "_settles_it",
        ),
    ),
    Mutant(
        "a backfill is green over what it left",
        "no tick covers the time of a backfill again",
        (Edit("jobs/matching_slice.py", "if not scope.heals:\n", "if False:\n"),),
        (
            "jobs/test_watermarks.py::test_a_backfill_that_leaves_something_to_a_webhook_is_red_for_no_tick_covers_its"
            "_time_again",
        ),
    ),
    Mutant(
        "a row's age limits pending matches",
        "a PENDING row of any age counts",
        (
            Edit(
                "database/matching.py",
                "AND status = 'PENDING' AND {_OURS} ORDER BY id\"",
                "AND status = 'PENDING' AND {_OURS} AND created_at >= '2025-01-01' ORDER BY id\"",
            ),
        ),
        (_PENDING + "test_a_row_of_any_age_counts_when_its_provider_payment_is_in_the_window",),
    ),
    Mutant(
        "today by as_of",
        "what may be charged is measured by the clock on the wall, whatever day a backfill stands for",
        (
            Edit(
                "jobs/autopayment/steps.py",
                "        now=clock.now(),\n        rules=renewals.rules,\n        in_review",
                "        now=renewals.scope.as_of,\n        rules=renewals.rules,\n        in_review",
            ),
        ),
        (
            _AUTOPAYMENT + "test_a_backfill_of_three_days_is_not_three_tries_on_one_card",
            _AUTOPAYMENT + "test_a_decline_whose_grace_is_over_is_not_tried_again_through_its_old_day",
            _AUTOPAYMENT + "test_a_backfill_of_nine_weeks_on_three_days_charges_no_customer_twice",
        ),
    ),
    Mutant(
        "overdue by as_of",
        "what may be charged is measured by the clock on the wall, whatever day a backfill stands for",
        (
            Edit(
                "jobs/autopayment/steps.py",
                "calendar.day_of(clock.now()) - timedelta(days=max_overdue_days)",
                "calendar.day_of(scope.as_of) - timedelta(days=max_overdue_days)",
            ),
            Edit(
                "jobs/autopayment/steps.py",
                "        now=clock.now(),\n        rules=renewals.rules,\n        in_review",
                "        now=renewals.scope.as_of,\n        rules=renewals.rules,\n        in_review",
            ),
        ),
        (_AUTOPAYMENT + "test_a_backfill_of_old_days_charges_nobody_for_periods_that_are_over",),
    ),
    Mutant(
        "a hard decline tried again",
        "a hard decline stops the period",
        (Edit("domain/declines.py", "STOPPING = frozenset({HARD, ACT, OURS})", "STOPPING = frozenset({ACT, OURS})"),),
        (_AUTOPAYMENT + "test_a_hard_decline_stops_further_charges_for_the_period",),
    ),
    Mutant(
        "a retry with the declined attempt's number",
        "a retry has another key",
        (Edit(_RENEWALS, "number = 1 + max((a.number for a in due.attempts), default=0)", "number = 1"),),
        (_AUTOPAYMENT + "test_a_soft_decline_is_tried_again_on_a_later_day_with_a_new_key",),
    ),
    Mutant(
        "grace off by one, expiry",
        "three whole billing days of grace",
        (
            Edit(
                "domain/expiry.py",
                "calendar.day_of(as_of) - timedelta(days=grace_days)",
                "calendar.day_of(as_of) - timedelta(days=grace_days - 1)",
            ),
        ),
        (_OVER + "test_the_grace_of_three_days_is_counted_in_whole_billing_days",),
    ),
    Mutant(
        "grace off by one, retries",
        "a soft decline is tried again within the grace",
        (
            Edit(
                _RENEWALS,
                "if declined and overdue_days > rules.grace_days:",
                "if declined and overdue_days > rules.grace_days + 1:",
            ),
        ),
        (_AUTOPAYMENT + "test_a_soft_decline_is_not_tried_again_when_the_grace_is_over",),
    ),
    Mutant(
        "the anchor day lost",
        "31 January, 28 February, 31 March",
        (Edit("domain/billing_calendar.py", "return start_day if clamped else end.day", "return end.day"),),
        (_AUTOPAYMENT + "test_the_anchor_day_survives_a_short_month",),
    ),
    Mutant(
        "expired while its charge is unknown",
        "no expiry while a charge is open",
        (Edit("database/expiry.py", "sql_list(State.UNKNOWN, State.PENDING)", "sql_list(State.PENDING)"),),
        (_OVER + "test_one_whose_charge_is_unknown_pending_or_in_review_is_held_back_and_reported",),
    ),
    Mutant(
        "the guard on the blast radius removed",
        "a run that would end too many stops",
        (Edit("domain/run_scope.py", "GUARD_COUNT = 100", "GUARD_COUNT = 10**9"),),
        (_OVER + "test_a_run_that_would_end_more_than_a_fifth_and_more_than_a_hundred_stops_before_applying",),
    ),
    Mutant(
        "silence expires a payment",
        "a payment nobody answered for stays PENDING",
        (
            Edit(
                "domain/expiry.py",
                "    if isinstance(answer, NoAnswer):\n",
                "    if isinstance(answer, NoAnswer):\n"
                "        return ExpirePayment(row, answer.reason, Code.NO_ANSWER)\n"
                "    if isinstance(answer, NoAnswer):\n",
            ),
        ),
        (_STALE + "test_about_which_the_provider_does_not_answer_stays_pending_and_the_run_is_red_at_its_end",),
    ),
    Mutant(
        "held money expired",
        "waiting_for_capture stays PENDING",
        (Edit("domain/expiry.py", "if answer.status == WAITING_FOR_CAPTURE:", "if False:"),),
        (_STALE + "test_one_whose_money_is_held_stays_pending_and_is_reported",),
    ),
    Mutant(
        "any 404 taken for not found",
        "not found is the provider's own word only",
        (Edit(_TRANSLATION, "if by_provider and status == 404 and call.by_id:", "if status == 404 and call.by_id:"),),
        (_STALE + "test_about_which_the_provider_does_not_answer_stays_pending_and_the_run_is_red_at_its_end",),
    ),
    Mutant(
        "an expiry that overwrites",
        "a row that the webhook finished meanwhile is skipped",
        (
            # The row is found by its id, whatever has become of it since it was read.
            Edit("database/expiry.py", " AND p.status = 'PENDING'\n        RETURNING p.id", "\n        RETURNING p.id"),
        ),
        (_STALE + "test_a_row_that_the_webhook_finishes_while_the_provider_is_asked_is_skipped_and_reported",),
    ),
    Mutant(
        "a dry run that writes",
        "a dry run shows and writes nothing",
        (
            Edit(
                "jobs/settling.py",
                "        if dry_run:\n            with database.read()",
                "        if False:\n            with database.read()",
            ),
        ),
        (_SETTLING_DRY,),
    ),
    Mutant(
        "a dry run that charges",
        "a dry run sends nothing",
        (
            Edit(
                "jobs/autopayment/steps.py",
                "    if scope.dry_run:\n        report.decisions = [",
                "    if False:\n        report.decisions = [",
            ),
        ),
        (_AUTOPAYMENT + "test_a_dry_run_shows_every_decision_and_sends_and_writes_nothing",),
    ),
    Mutant(
        "a charge given up after 10 s",
        "the provider may take 30 s to answer a charge",
        (Edit(_CLIENT, "charge_read_s: float = 40.0", "charge_read_s: float = 10.0"),),
        ("provider/test_client_wire.py::test_production_waits_for_a_charge_longer_than_the_provider_may_take",),
    ),
    Mutant(
        "credentials in an error's text",
        "no text holds a credential",
        (Edit(_TRANSLATION, 'text = text.replace(secret, "***")', "pass"),),
        ("provider/test_client_wire.py::test_credentials_are_in_no_text_no_repr_and_no_log",),
    ),
    # --- a run in shards
    Mutant(
        "a shard that is missed",
        "the shards together hold everything that is due",
        (Edit("database/renewals.py", "% :shards = :remainder", "% :shards = :remainder + 1"),),
        (_SHARDED_SLICE, _SHARDS + "test_every_due_subscription_is_charged_once_by_its_shard[3]"),
    ),
    Mutant(
        "the last shard not made",
        "every remainder has a shard",
        (Edit("domain/shards.py", "range(1, count + 1)", "range(1, count)"),),
        (
            "domain/test_shards.py::test_every_remainder_belongs_to_one_shard",
            _SHARDS + "test_every_due_subscription_is_charged_once_by_its_shard[3]",
        ),
    ),
    Mutant(
        "two shards that overlap",
        "a subscription belongs to one shard",
        (Edit("database/renewals.py", "% :shards = :remainder", "% :shards <= :remainder"),),
        (_SHARDED_SLICE,),
    ),
    Mutant(
        "open attempts in more than one shard",
        "an attempt belongs to its subscription's shard",
        (Edit(_ATTEMPTS, "% shard.count == shard.number - 1", "% shard.count >= shard.number - 1"),),
        (_SHARDED_SLICE, _SHARDS + "test_an_open_attempt_is_concluded_by_its_own_shard"),
    ),
    Mutant(
        "the run's limits taken by each shard",
        "all shards together stay within the run's limits",
        (Edit(_SHARDING, "            limits_of_a_shard(config, division.at_once),\n", "            config,\n"),),
        (_SHARDS + "test_two_processes_charge_their_shards_side_by_side_within_the_limit_of_the_run",),
    ),
    Mutant(
        "the cap on requests not divided",
        "all shards together stay within the run's requests a second",
        (Edit(_SHARDING, "None if rate is None else rate / at_once", "rate"),),
        (_SHARDS + "test_shards_that_run_at_a_time_share_the_runs_concurrency_and_its_cap_on_requests",),
    ),
    Mutant(
        "the limits divided by the number of shards",
        "limits are shared by what runs at once",
        (Edit("definitions.py", "Sharding(shards, min(at_once, shards))", "Sharding(shards, shards)"),),
        (_SHARDS + "test_limits_are_shared_by_what_runs_at_once",),
    ),
    Mutant(
        "an executor that nobody has seen work",
        "executors are refused by name",
        (Edit("jobs/autopayment/executors.py", "if name not in (_ONE_PROCESS, _PROCESSES, *_MACHINES):", "if False:"),),
        (_SHARDS + "test_an_executor_that_nobody_has_seen_work_is_refused_by_name",),
    ),
    Mutant(
        "max_changes of each shard",
        "a limit on changes holds for the whole run",
        (Edit(_SHARDING, "    if scope.max_changes is not None:\n", "    if False:\n"),),
        (_SHARDS + "test_max_changes_holds_for_the_whole_run_and_stops_it_before_the_first_shard",),
    ),
    Mutant(
        "shards with a clock of their own",
        "all shards are about the instant at which the run began",
        (
            Edit(
                _SHARDING,
                "return replace(scope, as_of=division.as_of_at(clock.now()), source=division.source), division",
                "return replace(scope, source=division.source), division",
            ),
        ),
        (_SHARDS + "test_all_shards_are_about_the_instant_at_which_the_run_began",),
    ),
    Mutant(
        "a shard that knows only its own declines",
        "a card that was declined in one shard is not tried by the next",
        (
            Edit(
                "database/renewals.py",
                "declined = _instants(connection, _DECLINED_TODAY",
                "declined = {} if shard else _instants(connection, _DECLINED_TODAY",
            ),
        ),
        (_SHARDS + "test_a_card_of_two_shards_that_is_declined_in_one_is_not_tried_by_the_next",),
    ),
    # --- and rules that came later
    Mutant(
        "a card tried twice in one run",
        "a card that was declined a moment ago is not tried again",
        (Edit("jobs/autopayment/waiting.py", "if method in self._declined and not work.sent_before:", "if False:"),),
        (_AUTOPAYMENT + "test_a_card_of_two_subscriptions_that_is_declined_for_one_is_not_tried_for_the_other",),
    ),
    Mutant(
        "a period charged that is over with its grace",
        "nobody pays for a period that would be expired the same morning",
        (Edit(_RENEWALS, f"    if {_OVER_WITH_ITS_GRACE}:", "    if False:"),),
        ("domain/test_renewals.py::test_a_period_that_would_be_over_with_its_grace_is_not_charged",),
    ),
    Mutant(
        "a period charged on the day it expires",
        "the grace of a period to pay for is counted as expiry counts it",
        (
            Edit(
                _RENEWALS,
                f"    if {_OVER_WITH_ITS_GRACE}:",
                f"    if {_OVER_WITH_ITS_GRACE.replace('<=', '<')}:",
            ),
        ),
        ("domain/test_renewals.py::test_a_period_that_would_be_over_with_its_grace_is_not_charged",),
    ),
    Mutant(
        "an unclear grant granted again",
        "what the webhook may have granted already is a person's to decide",
        (
            Edit(
                _SETTLEMENT,
                "    if case.ruling is not None:\n        return None\n    # Nothing",
                "    return None\n    # Nothing",
            ),
        ),
        (_UNCLEAR,),
    ),
    Mutant(
        "an unclear grant taken for granted",
        "a paid renewal is not lost behind another grant",
        (
            Edit(
                _SETTLEMENT,
                "if granted_until is not None and not facts.paid_meanwhile:",
                "if granted_until is not None:",
            ),
        ),
        (_UNCLEAR,),
    ),
    Mutant(
        "an end that was moved back taken for no grant",
        "an end that is not where the period began proves no renewal ungranted",
        (Edit(_SETTLEMENT, "    if ended_at == attempt.period_start:", "    if ended_at <= attempt.period_start:"),),
        ("domain/test_settlement.py::test_an_end_that_moved_by_something_else_than_the_period_is_no_grant",),
    ),
    Mutant(
        "a bonus day taken for the grant",
        "an end that moved by something else than the period proves no renewal granted",
        (Edit(_SETTLEMENT, "if abs(ended_at - end) <= min(GRANT_TOLERANCE, (end - start) / 4):", "if True:"),),
        (
            "domain/test_settlement.py::test_an_end_that_moved_by_something_else_than_the_period_is_no_grant",
            "database/test_settling.py::test_a_bonus_day_on_top_of_a_paid_renewal_is_not_taken_for_its_grant",
        ),
    ),
    Mutant(
        "the service's own grant without its period",
        "no period begins before the end of one that the service granted for a renewal",
        (
            Edit(
                _ROWS,
                "        return decision.attempt.period_start, decision.period_end\n",
                "        return None, None\n",
            ),
        ),
        ("database/test_settling.py::test_a_renewal_that_the_webhook_has_paid_and_extended_only_closes_the_attempt",),
    ),
    Mutant(
        "a grant of the meantime not looked for",
        "an end that another payment has moved proves no renewal granted",
        (Edit(_FACTS, "    if not sent:\n        return set()\n", "    if True:\n        return set()\n"),),
        (
            "database/test_settling.py::"
            "test_a_renewal_whose_row_the_webhook_wrote_beside_another_grant_is_left_to_a_person",
        ),
    ),
    Mutant(
        "a spent period not told",
        "a customer who paid for a period that was over is reported to a person",
        (Edit(_SETTLEMENT, "notice=_spent_before_it_was_paid(case.payment, subscription, end),", "notice=None,"),),
        ("domain/test_settlement.py::test_a_customer_who_paid_for_a_period_that_was_over_already_is_told_to_a_person",),
    ),
    Mutant(
        "the night's numbers wiped out at noon",
        "a day's point counts all runs of that day",
        (Edit("jobs/run_report.py", "(0 if name in levels else before.get(name, 0))", "0"),),
        ("jobs/test_numbers_over_time.py::test_a_later_run_of_a_day_adds_to_what_the_first_has_charged",),
    ),
    *(
        Mutant(
            f"a red run not plotted: {what}",
            "the numbers of a red run are plotted",
            # Dagster drops what an op has logged when the op fails; it keeps what was yielded.
            (Edit(file, "yield plotted(", "(lambda *a, **k: context.log_event(plotted(*a, **k)))("),),
            (f"jobs/test_plots.py::test_the_numbers_of_a_red_{test}",),
        )
        for what, file, test in (
            ("renewals", "jobs/autopayment/__init__.py", "renewal_run_are_plotted[whole]"),
            ("shards", _SHARDING, "renewal_run_are_plotted[divided]"),
            ("matching", "jobs/matching_slice.py", "matching_run_are_plotted"),
            ("expiry of payments", "jobs/expire_payments.py", "expiry_of_payments_are_plotted"),
            ("expiry of subscriptions", "jobs/expire_subscriptions.py", "expiry_of_subscriptions_are_plotted"),
        )
    ),
    # --- purchases: what a webhook leaves half done, and what nobody has written down
    Mutant(
        "a rouble buys any plan",
        "a success without a row must be one of the plan's prices",
        (Edit(_SETTLEMENT, "if case.row is None and case.payment.money not in plan.prices:", "if False:"),),
        (
            _PURCHASES + "test_without_a_row_a_success_must_be_one_of_the_plans_prices",
            _SUCCESSFUL + "test_a_rouble_without_a_row_buys_no_plan_until_a_person_accepts_it",
        ),
    ),
    Mutant(
        "a webhook that died half-way taken for a grant",
        "a SUCCEEDED row that was granted to nobody is settled",
        (
            Edit(
                _SETTLEMENT, "if row.status in FINAL_ROWS and not row.is_half_settled)", "if row.status in FINAL_ROWS)"
            ),
        ),
        (
            _PURCHASES + "test_a_row_that_is_succeeded_and_granted_to_nobody_is_settled_and_linked",
            _SUCCESSFUL + "test_a_success_whose_webhook_died_before_the_grant_is_granted_and_linked",
        ),
    ),
    Mutant(
        "a webhook that is half-way overtaken",
        "a row that became SUCCEEDED a moment ago is left to the webhook",
        (
            Edit(
                _SETTLEMENT, "if (at_work := _webhook_at_work(case)) is not None:", "if (at_work := None) is not None:"
            ),
        ),
        (_PURCHASES + "test_a_row_that_became_succeeded_this_very_minute_is_left_to_the_webhook",),
    ),
    Mutant(
        "an unlinked grant granted again",
        "a subscription that was changed since the payment may be its grant",
        (Edit(_FACTS, "    if not asked:\n        return set()\n", "    if True:\n        return set()\n"),),
        (_SETTLING_DB + "test_a_subscription_that_was_changed_since_may_be_the_grant_that_was_never_linked",),
    ),
    Mutant(
        "an unlinked grant ignored",
        "what the webhook may have granted already is a person's to decide",
        (Edit(_SETTLEMENT, "if case.facts.changed_meanwhile and any(", "if False and any("),),
        (_PURCHASES + "test_a_row_that_is_succeeded_is_left_to_a_person_when_its_grant_may_be_there_unlinked",),
    ),
    Mutant(
        "the customer's own row passed over",
        "the row that names a subscription is settled, its duplicates are not",
        (Edit(_SETTLEMENT, "(row.subscription_id is None, row.money != money,", "(row.money != money,"),),
        (
            _SETTLING_DB + "test_the_customers_own_row_is_settled_and_not_a_duplicate_without_a_subscription",
            _STALE + "test_the_customers_own_row_never_expires_as_a_duplicate",
        ),
    ),
    Mutant(
        "another subscription's row expired as a duplicate",
        "a row that names a subscription which was not granted never expires as a duplicate",
        (
            Edit(
                "jobs/expire_payments.py",
                "if row.subscription_id in (None, *_granted_to(result)):",
                "if True:",
            ),
        ),
        (
            _STALE + "test_a_row_that_names_a_subscription_which_the_payment_was_not_granted_to"
            "_does_not_expire_as_a_duplicate",
        ),
    ),
    Mutant(
        "no minute for a webhook that has its row",
        "a payment younger than a minute is left to the webhook, with a row or without",
        (
            Edit(
                "domain/matching.py",
                "        elif payment.succeeded_within(webhook_grace, now):",
                "        elif not found and payment.succeeded_within(webhook_grace, now):",
            ),
            Edit(
                "domain/matching.py",
                "            if payment.succeeded_within(webhook_grace, now):",
                "            if False:",
            ),
        ),
        (_SUCCESSFUL + "test_a_webhook_without_locks_is_not_granted_beside",),
    ),
    Mutant(
        "a success granted to nobody not told",
        "a money check says when a SUCCEEDED payment was granted to nobody",
        (
            Edit(
                "database/money_checks.py",
                "AND p.subscription_id IS NULL\n",
                "AND p.subscription_id IS NULL AND false\n",
            ),
        ),
        ("jobs/test_alerts.py::test_a_success_that_was_granted_to_nobody_breaks_its_check",),
    ),
    Mutant(
        "charged without a contact",
        "nobody is charged without a receipt that reaches somebody",
        (
            Edit(
                _RENEWALS, "    if rules.receipt is not None and not _contact_of(", "    if False and not _contact_of("
            ),
        ),
        ("domain/test_receipts.py::test_without_a_contact_nobody_is_charged",),
    ),
    Mutant(
        "an old receipt sent",
        "one that was never sent is made anew when its receipt has changed",
        (Edit(_RENEWALS, "    if _from_settings(wanted.body) != _from_settings(attempt.body):", "    if False:"),),
        ("domain/test_receipts.py::test_one_never_sent_is_made_anew_when_its_receipt_has_changed",),
    ),
    Mutant(
        "expired for want of a contact",
        "what waits for a contact is held back from expiry",
        (
            Edit(
                "database/expiry.py",
                "    WHERE q.kind = '{NO_CONTACT}' AND q.resolved_at IS NULL",
                "    WHERE false AND q.resolved_at IS NULL",
            ),
        ),
        ("jobs/test_receipts.py::test_one_that_waits_for_a_contact_is_held_back_from_expiry_until_it_is_charged",),
    ),
    Mutant(
        "expired while a lost charge may be paid",
        "what waits for a charge that our records have lost is held back from expiry",
        (
            Edit(
                "database/expiry.py",
                "    WHERE q.kind IN {sql_list(*HOLDING)} AND q.subscription_id IS NOT NULL",
                "    WHERE false AND q.subscription_id IS NOT NULL",
            ),
        ),
        (
            _RESTORED + "test_what_a_lost_charge_holds_does_not_expire_before_it_is_decided[pending]",
            _RESTORED + "test_what_a_lost_charge_holds_does_not_expire_before_it_is_decided[paid]",
        ),
    ),
    Mutant(
        "a settled payment's row taken from another payment",
        "a settled payment whose row is gone is named, whichever row has its number",
        (
            Edit(
                "database/money_checks.py",
                " AND p.external_payment_id = s.external_payment_id\n    WHERE s.settled_at",
                "\n    WHERE s.settled_at",
            ),
        ),
        ("jobs/test_alerts.py::test_a_settled_payment_whose_row_number_is_another_payments_breaks_its_check",),
    ),
    Mutant(
        "a contact in the quarantine",
        "a contact stands in no quarantine entry",
        (Edit("jobs/autopayment/steps.py", '{"body": mask_body(attempt.body)}', '{"body": attempt.body}'),),
        ("jobs/test_receipts.py::test_a_refused_receipt_shows_its_contact_nowhere",),
    ),
    Mutant(
        "consent withdrawn and charged",
        "the service's view is looked at again in the statement that claims",
        (Edit(_SECOND_LOOK, "    if view is None:\n", "    if True:\n"),),
        ("jobs/test_renewal_view.py::test_a_consent_that_is_withdrawn_after_the_reading_stops_the_charge",),
    ),
    Mutant(
        "charged without consent",
        "may_charge = false wins",
        (Edit(_RENEWALS, "    if said.rows and not said.may_charge:", "    if False:"),),
        ("jobs/test_renewal_view.py::test_without_consent_or_one_clear_row_nobody_is_charged",),
    ),
    Mutant(
        "a stopped method charged for another subscription",
        "a hard decline blocks the method for all subscriptions until another id comes",
        (Edit(_RENEWALS, "    if due.method_stopped_at is not None:", "    if False:"),),
        (
            "jobs/test_renewal_view.py::test_a_hard_decline_blocks_the_method_for_every_subscription_until_another_comes",
        ),
    ),
    Mutant(
        "a canceled registration unseen",
        "a paid renewal without a receipt is told",
        (Edit("domain/provider_payment.py", "self.receipt_registration == CANCELED", "False"),),
        ("jobs/test_receipts.py::test_a_canceled_registration_is_a_persons_and_the_grant_stands",),
    ),
)

_RECONCILING = "domain/reconciliation.py"
_RECONCILED = "jobs/test_reconciliation.py::"
_DAY_LISTS = "provider/test_day_lists.py::"
_CLASSED = "domain/test_reconciliation.py::"

_ROWS_OF_DAY = "database/test_reconciliation.py::"

RECONCILIATION = (
    Mutant(
        "rows with a blank id in one line",
        "each row without the provider's id is a line of its own",
        (
            Edit(
                "database/reconciliation.py",
                "CASE WHEN btrim(external_payment_id) <> '' THEN external_payment_id END",
                "external_payment_id",
            ),
        ),
        (_ROWS_OF_DAY + "test_rows_with_a_blank_id_are_rows_without_one",),
    ),
    Mutant(
        "a row from the far future on no day",
        "each row is of a day that is compared",
        (
            Edit(
                "database/reconciliation.py",
                "THEN LEAST(created_at, updated_at) ELSE '2000-01-01' END",
                "THEN created_at ELSE '2000-01-01' END",
            ),
        ),
        (_ROWS_OF_DAY + "test_a_date_that_is_none_leaves_the_row_in_its_day",),
    ),
    Mutant(
        "a class that swallows",
        "each line is in the class of its difference",
        (Edit(_RECONCILING, "        (other_money, AMOUNT_DIFFERS),\n", "        (other_money, AGREES),\n"),),
        (_RECONCILED + "test_a_difference_opens_one_entry_and_takes_nothing_back[amount_differs]",),
    ),
    Mutant(
        "a line that is lost",
        "the classes add up to what the provider took",
        (Edit(_RECONCILING, "lines = lines[own | brought]", 'lines = lines[(own | brought) & (lines["rows"] > 0)]'),),
        (
            _CLASSED + "test_sums_are_by_class_and_currency_and_know_the_fee",
            _CLASSED + "test_of_any_books_every_line_is_in_one_class_and_the_sums_close",
        ),
    ),
    Mutant(
        "a page of a day left out",
        "a list is read to its last page",
        (
            Edit(
                _LISTS,
                '            if following in (None, ""):\n',
                '            if following in (None, "") or page == 2:\n',
            ),
        ),
        (_DAY_LISTS + "test_a_long_day_is_read_to_the_last_page_and_its_refunds_too[1]",),
    ),
    Mutant(
        "a refund counted twice",
        "what was given back is added up once",
        (
            Edit(
                _RECONCILING,
                'refunded_there=lines["kopecks"].where(~is_payment & succeeded, 0)',
                'refunded_there=lines["kopecks"].where(succeeded & (~is_payment | lines["in_full"]), 0)',
            ),
        ),
        (_CLASSED + "test_the_parts_of_a_refund_agree_once_the_row_says_refunded",),
    ),
    Mutant(
        "the next day's first instant in a day",
        "a payment is of one day",
        (Edit(_RECONCILING, '(lines["at"] < pd.Timestamp(day.end))', '(lines["at"] <= pd.Timestamp(day.end))'),),
        (_CLASSED + "test_a_day_ends_where_the_next_one_begins",),
    ),
    Mutant(
        "silence about a paid row taken for never paid",
        "what could not be looked up decides nothing",
        (
            Edit(
                _CLIENT,
                "            elif isinstance(answer, ProviderError):\n                raise IncompleteSlice(",
                "            elif isinstance(answer, ProviderError):\n"
                "                found[payment_id] = None\n"
                "            elif isinstance(answer, MemoryError):\n"
                "                raise IncompleteSlice(",
            ),
        ),
        (_RECONCILED + "test_a_paid_row_that_cannot_be_looked_up_fails_the_run_before_anything_is_applied",),
    ),
    Mutant(
        "missed purchases shown and not settled",
        "what settling may repair is repaired",
        (
            Edit(
                "jobs/reconciliation/__init__.py",
                'ids = set(lines.loc[lines["class"].isin(REPAIRABLE) | unrecorded, "payment_id"])',
                'ids = set(lines.loc[unrecorded, "payment_id"])',
            ),
        ),
        (_RECONCILED + "test_a_purchase_that_the_matching_jobs_missed_is_granted",),
    ),
    Mutant(
        "an ignored difference set aside for settling",
        "an entry about books says nothing about a grant",
        (Edit(_FACTS, "      AND NOT jsonb_exists(evidence, 'books')\n", ""),),
        (_RECONCILED + "test_an_ignored_difference_does_not_keep_a_later_payment_from_being_settled",),
    ),
    Mutant(
        "a day with differences that is green",
        "a day is red until a person has decided about each difference",
        (
            Edit(
                "jobs/reconciliation/ends.py",
                "        if not self.waiting and not self.nobodys:\n",
                "        if not self.nobodys:\n",
            ),
        ),
        (_RECONCILED + "test_a_difference_opens_one_entry_and_takes_nothing_back[doubled_here]",),
    ),
)

ALL = (*PROMISED, *FURTHER, *PACE, *CLOCKS, *DATABASES, *LOOKS, *SHOPS, *TERMS, *RECONCILIATION, *PRIVACY)
