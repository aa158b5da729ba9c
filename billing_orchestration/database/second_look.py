"""The second look: what forbids a charge, seen in the statement that claims it, with its subscription under lock.

`decide_renewals` has asked the same of the run's slice, which may be hours old by then.
"""

from __future__ import annotations

from billing_orchestration.database.conventions import of_this_shop, sql_list
from billing_orchestration.domain.attempts import OPEN, TAKEN, State
from billing_orchestration.domain.problem_kinds import HOLDING, IGNORED, SECOND_SUCCESS, UNREADABLE


def in_review(attempt: str) -> str:
    """SQL: whether a person decides about an attempt, named by its alias.

    A payment that a person ignored grants nothing, so its attempt holds nothing back.
    """
    return f"""({attempt}.state = '{State.REVIEW}' AND NOT EXISTS (
        SELECT FROM billing_orchestration.quarantine q
        WHERE q.attempt_id = {attempt}.id AND q.external_payment_id = {attempt}.external_payment_id
          AND q.resolution = '{IGNORED}'))"""


def is_in_hand(attempt: str) -> str:
    """SQL: whether our records know that an attempt, named by its alias, may have charged: then they settle it."""
    return f"""({attempt}.state IN {sql_list(*TAKEN)}
        OR ({attempt}.state IN {sql_list(*OPEN)} AND {attempt}.first_sent_at IS NOT NULL))"""


def holds_a_charge(entry: str) -> str:
    """SQL: whether a quarantine entry, named by its alias, is open and holds the attempt that it names.

    An unreadable record holds nothing where our records have its charge in hand, or had its answer before it became
    unreadable. A second success holds nothing where the period is granted (the other payment has it, and the next one
    is due), or where nobody knows its period.
    """
    return f"""({entry}.resolved_at IS NULL AND {entry}.attempt_id IS NOT NULL
        AND NOT ({entry}.kind = '{UNREADABLE}' AND EXISTS (
            SELECT FROM billing_orchestration.renewal_attempts k
            WHERE k.id = {entry}.attempt_id
              AND ({is_in_hand("k")} OR k.external_payment_id = {entry}.external_payment_id)))
        AND NOT ({entry}.kind = '{SECOND_SUCCESS}' AND NOT EXISTS (
            SELECT FROM billing_orchestration.renewal_attempts k
            WHERE k.id = {entry}.attempt_id AND NOT EXISTS (
                SELECT FROM billing_orchestration.renewal_attempts t
                WHERE t.subscription_id = k.subscription_id AND t.period_start = k.period_start
                  AND t.state IN {sql_list(*TAKEN)}))))"""


# Which of several ACTIVE subscriptions `t` of one user and plan outlasts `s`.
OUTLASTS = """t.user_id = s.user_id AND t.plan_id = s.plan_id AND t.status = 'ACTIVE'
    AND (coalesce(t.ended_at, 'infinity'), t.id) > (coalesce(s.ended_at, 'infinity'), s.id)"""

# NULL: `w`, an attempt, may be sent. `s` is its subscription, if there is one. Else a clause that says why not.
WHY_NOT = f"""CASE
    WHEN {of_this_shop("w.payment_provider_id")} IS NOT TRUE
        THEN 'payment provider ' || w.payment_provider_id || ' is not this shop''s'
    WHEN s.id IS NULL THEN 'the subscription is gone'
    WHEN s.status IS DISTINCT FROM 'ACTIVE' THEN 'the subscription is ' || coalesce(s.status::text, 'without a status')
    WHEN s.ended_at IS DISTINCT FROM w.period_start THEN 'its end has moved to ' || coalesce(s.ended_at::text, 'none')
    WHEN s.plan_id IS DISTINCT FROM w.plan_id THEN 'it is on another plan'
    WHEN s.user_id IS DISTINCT FROM w.user_id THEN 'it belongs to another user'
    WHEN NOT EXISTS (SELECT FROM plans pl WHERE pl.id = w.plan_id AND pl.is_recurring)
        THEN 'its plan is not renewed any more'
    WHEN NOT EXISTS (
        SELECT FROM plans pl
        WHERE pl.id = w.plan_id AND pl.duration = coalesce(w.period_count, pl.duration)
          AND pl.duration_unit = coalesce(w.period_unit, pl.duration_unit))
        THEN 'the period of its plan has changed'
    WHEN (SELECT array_agg(pr.amount) FROM prices pr WHERE pr.plan_id = w.plan_id AND pr.currency::text = w.currency)
        IS DISTINCT FROM ARRAY[w.amount]
        THEN 'the price of its plan has changed'
    -- An end that was moved while a charge was under way: that charge may have paid for this very time.
    WHEN EXISTS (
        SELECT FROM billing_orchestration.renewal_attempts a
        WHERE a.subscription_id = w.subscription_id AND a.period_start <> w.period_start
          AND (a.state IN {sql_list(*OPEN)} OR {in_review("a")}))
        THEN 'an attempt for another period of it is open or in review'
    WHEN EXISTS (
        SELECT FROM billing_orchestration.settlements st
        WHERE st.subscription_id = w.subscription_id AND st.period_end > w.period_start)
        THEN 'a period that was settled ends later'
    WHEN EXISTS (
        SELECT FROM billing_orchestration.quarantine q
        WHERE {holds_a_charge("q")}
          AND (q.attempt_id = w.id OR (q.kind IN {sql_list(*HOLDING)} AND q.subscription_id = w.subscription_id)))
        THEN 'an open quarantine entry is about this charge'
    WHEN EXISTS (SELECT FROM subscriptions t WHERE {OUTLASTS})
        THEN 'another ACTIVE subscription of the same user and plan ends later'
END"""


def why_not(view: str | None) -> str:
    """The same, with the service's view, if there is one, as the last word: consent may be withdrawn at any moment."""
    if view is None:
        return WHY_NOT
    consents = f"(SELECT bool_and(v.may_charge IS TRUE) FROM {view} v WHERE v.subscription_id = w.subscription_id)"
    return f"CASE WHEN {consents} IS NOT TRUE THEN 'the service says that it may not be charged' ELSE {WHY_NOT} END"
