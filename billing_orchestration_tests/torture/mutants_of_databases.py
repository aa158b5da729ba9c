"""Faults in how a stranger's database is met: what a session pins, and what is refused before money moves."""

from __future__ import annotations

from billing_orchestration_tests.torture.mutant import Edit, Mutant

_FITNESS = "database/fitness.py"
_SESSION = "database/session.py"
_STRANGE = "jobs/test_strange_databases.py::"
_REFUSED = _STRANGE + "test_what_could_not_be_written_after_a_charge_is_refused_before_it"
_DEFAULTS = _STRANGE + "test_what_a_database_sets_for_its_sessions_changes_nothing_for_ours"
_BEFORE_MONEY = "what could not be written after a charge is refused before it"
_OURS = "what a database, role or pooler sets for its sessions does not hold for ours"

DATABASES = (
    Mutant(
        "a mandatory column not looked for",
        _BEFORE_MONEY,
        (Edit(_FITNESS, "    WHERE a.attnotnull AND NOT", "    WHERE false AND a.attnotnull AND NOT"),),
        (_REFUSED,),
    ),
    Mutant(
        "ids that run out not looked for",
        _BEFORE_MONEY,
        (Edit(_FITNESS, "if left < FEWEST_IDS:", "if left < 0:"),),
        (_REFUSED,),
    ),
    Mutant(
        "a rule that replaces what is written not looked for",
        _BEFORE_MONEY,
        (Edit(_FITNESS, "    WHERE r.is_instead AND", "    WHERE false AND r.is_instead AND"),),
        (_REFUSED,),
    ),
    Mutant(
        "a right that is missing not looked for",
        _BEFORE_MONEY,
        (Edit(_FITNESS, "if missing := missing_privileges(connection):", "if missing := []:"),),
        (_REFUSED,),
    ),
    Mutant(
        "a policy's hidden rows not looked for",
        "rows that a policy hides are an error and no empty answer",
        (Edit(_FITNESS, "AND t.relrowsecurity AND row_security_active(t.oid)", "AND false"),),
        (_STRANGE + "test_rows_that_a_policy_hides_are_refused_by_the_policys_name",),
    ),
    Mutant("the database's style of dates kept", _OURS, (Edit(_SESSION, '"DateStyle": "ISO",', ""),), (_DEFAULTS,)),
    Mutant(
        "two schemas with the service's tables taken for one",
        "where several schemas on the path hold the tables, a person names one",
        (Edit(_FITNESS, "if len(holders) > 1:", "if len(holders) > 2:"),),
        (_STRANGE + "test_two_sets_of_tables_on_the_search_path_are_refused_until_one_is_named",),
    ),
)
