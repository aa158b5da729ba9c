"""Can these jobs work on this database at all? It is somebody else's, and what cannot work must not begin.

Runs ask before they read, and again before their first change: nothing is charged that could not be written down
afterwards. `doctor` shows the same findings one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from billing_orchestration.database.conventions import SCHEMA, SERVICE_TABLES
from billing_orchestration.database.errors import Unfit
from billing_orchestration.database.health import VERSION_TABLE, name_the_schema
from billing_orchestration.database.session import HOLDERS, is_shared, not_pinned

POOLER, SETTINGS, PATH, HIDDEN = "session.shared", "session.settings", "tables.path", "tables.hidden_rows"
MANDATORY, NO_DEFAULT, IDS, PRIVILEGES = "tables.mandatory", "tables.no_default", "tables.ids", "privileges.missing"
RULES = "tables.rules"

# Fewer ids than this are used up before anybody has read the alert.
FEWEST_IDS = 1000
# What the jobs write, column by column.
INSERTED = {
    "subscriptions": ("user_id", "status", "started_at", "ended_at", "plan_id", "created_at", "updated_at"),
    "payments": (
        "subscription_id", "payment_provider_id", "payment_method", "status", "currency", "amount",
        "external_payment_id", "created_at", "updated_at",
    ),
}  # fmt: skip
UPDATED = {
    "subscriptions": ("status", "ended_at", "updated_at"),
    "payments": ("status", "subscription_id", "payment_method", "amount", "currency", "updated_at"),
}


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why the jobs cannot work here, and the way out. `code` stays when the words change."""

    code: str
    text: str
    way_out: str


def check_reading(connection: sa.Connection) -> None:
    """Return when what a session reads is what there is; else raise Unfit. The connection's transaction may end."""
    _refuse(reading_obstacles(connection))


def check_writing(connection: sa.Connection) -> None:
    """Return when what the jobs write can be written; else raise Unfit."""
    _refuse(writing_obstacles(connection))


def _refuse(obstacles: Sequence[Obstacle]) -> None:
    if obstacles:
        first, more = obstacles[0], len(obstacles) - 1
        others = f" (and {more} more: billing-orchestration doctor lists them)" if more else ""
        raise Unfit(f"{first.text}: {first.way_out}{others}")


def reading_obstacles(connection: sa.Connection) -> list[Obstacle]:
    """What would make a session read less, or something else, than there is."""
    if is_shared(connection):
        # Whatever else is asked in such a session may be answered by another one.
        return [
            Obstacle(
                POOLER,
                "a pooler lends the session to others between two statements (PgBouncer with pool_mode = transaction"
                " or statement), so locks and settings do not last",
                "connect to PostgreSQL itself, or use pool_mode = session",
            )
        ]
    obstacles = [
        Obstacle(SETTINGS, f"the session does not keep its settings: {difference}", "look at the pooler in between")
        for difference in not_pinned(connection)
    ]
    holders = list(connection.execute(_HOLDING).scalars())
    if len(holders) > 1:
        obstacles.append(
            Obstacle(
                PATH,
                f"the service's tables are in several schemas on the search path: {', '.join(holders)}",
                name_the_schema(holders[0]),
            )
        )
    for table, policies in connection.execute(_HIDDEN, {"tables": list(SERVICE_TABLES)}).tuples():
        named = f"by policy {', '.join(policies)}" if policies else "by default, without a policy"
        obstacles.append(
            Obstacle(
                HIDDEN,
                f"row level security hides rows of {table} from this role ({named})",
                "ALTER ROLE … BYPASSRLS for the role of BILLING_DATABASE_URL",
            )
        )
    return obstacles


_HOLDING = sa.text(f"SELECT name FROM ({HOLDERS}) AS holders WHERE holds ORDER BY place")
_HIDDEN = sa.text(f"""
    SELECT t.relname, ARRAY(SELECT CAST(p.polname AS text) FROM pg_policy p WHERE p.polrelid = t.oid ORDER BY 1)
    FROM pg_class t
    WHERE (t.oid IN (SELECT to_regclass(quote_ident(name)) FROM unnest(CAST(:tables AS text[])) AS name)
           OR t.relnamespace = to_regnamespace('{SCHEMA}'))
      AND t.relrowsecurity AND row_security_active(t.oid)
    ORDER BY 1
""")


def writing_obstacles(connection: sa.Connection) -> list[Obstacle]:
    """What would refuse a grant after its charge. Ask it only where all the tables are there."""
    obstacles = [
        Obstacle(
            NO_DEFAULT if column == "id" else MANDATORY,
            f"{table}.{column} is NOT NULL and has no default, and these jobs do not fill it, so no row can be added",
            f"ALTER TABLE {table} ALTER COLUMN {column} SET DEFAULT … (ask the service's team)",
        )
        for table, column in connection.execute(_UNFILLED, _filled()).tuples()
    ]
    for table, left in ids_left(connection).items():
        if left < FEWEST_IDS:
            obstacles.append(
                Obstacle(
                    IDS,
                    f"{table} has {max(0, left)} ids left",
                    f"ALTER TABLE {table} ALTER COLUMN id TYPE bigint, and its sequence AS bigint",
                )
            )
    obstacles += [
        Obstacle(
            RULES,
            f"the rule {rule} on {table} replaces what is written, and PostgreSQL refuses to say what became of it",
            f"DROP RULE {rule} ON {table}, and make it a trigger (ask the service's team)",
        )
        for table, rule in connection.execute(_REPLACING_RULES, {"tables": list(INSERTED)}).tuples()
    ]
    if missing := missing_privileges(connection):
        obstacles.append(
            Obstacle(
                PRIVILEGES,
                f"the role of BILLING_DATABASE_URL lacks {', '.join(missing)}",
                'grant them (the runbook, "The role\'s least rights")',
            )
        )
    return obstacles


def ids_left(connection: sa.Connection) -> dict[str, int]:
    """How many more rows the service's tables can number, where that is known."""
    return {table: int(left) for table, left in connection.execute(_IDS_LEFT, {"tables": list(INSERTED)}).tuples()}


def _filled() -> dict[str, list[str]]:
    pairs = [(table, column) for table, columns in INSERTED.items() for column in columns]
    return {"tables": [table for table, _ in pairs], "columns": [column for _, column in pairs]}


# A trigger before the INSERT may fill what has no default.
_UNFILLED = sa.text("""
    WITH filled AS (SELECT * FROM unnest(CAST(:tables AS text[]), CAST(:columns AS text[])) AS f (name, filled)),
    tables AS (SELECT DISTINCT name, to_regclass(quote_ident(name)) AS oid FROM filled)
    SELECT t.name, CAST(a.attname AS text)
    FROM tables t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN pg_type y ON y.oid = a.atttypid
    WHERE a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND y.typdefault IS NULL
      AND NOT EXISTS (SELECT FROM pg_trigger g
                      WHERE g.tgrelid = t.oid AND NOT g.tgisinternal AND g.tgenabled <> 'D' AND g.tgtype & 7 = 7)
      AND NOT EXISTS (SELECT FROM filled f WHERE f.name = t.name AND f.filled = a.attname)
    ORDER BY 1, 2
""")
# INSERT or UPDATE … RETURNING fails for every row of such a table, whatever the rule's condition.
_REPLACING_RULES = sa.text("""
    SELECT name, CAST(r.rulename AS text)
    FROM unnest(CAST(:tables AS text[])) AS name JOIN pg_rewrite r ON r.ev_class = to_regclass(quote_ident(name))
    WHERE r.is_instead AND r.ev_type IN ('2', '3') AND r.ev_enabled <> 'D' AND pg_get_ruledef(r.oid) !~* 'RETURNING'
    ORDER BY 1, 2
""")
# By the sequence that belongs to `id` or fills its default, and by the range of the column itself.
_IDS_LEFT = sa.text("""
    WITH tables AS (
        SELECT name, to_regclass(quote_ident(name)) AS oid FROM unnest(CAST(:tables AS text[])) AS name
    ), numbered AS (
        SELECT t.name, a.atttypid, d.refobjid AS sequence
        FROM tables t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attname = 'id'
        JOIN pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
        JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid
             AND d.refclassid = 'pg_class'::regclass
        UNION
        SELECT t.name, a.atttypid, d.objid
        FROM tables t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attname = 'id'
        JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = t.oid AND d.refobjsubid = a.attnum
             AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
    )
    SELECT n.name, min((least(s.seqmax, CASE n.atttypid WHEN 'int2'::regtype THEN 32767 WHEN 'int4'::regtype
                              THEN 2147483647 ELSE s.seqmax END)
                        - coalesce(pg_sequence_last_value(s.seqrelid), s.seqstart - s.seqincrement)) / s.seqincrement)
    FROM numbered n JOIN pg_sequence s ON s.seqrelid = n.sequence
    WHERE s.seqincrement > 0 AND NOT s.seqcycle AND has_sequence_privilege(s.seqrelid, 'USAGE, SELECT')
    GROUP BY n.name ORDER BY n.name
""")

# What the jobs do with the service's tables and sequences, and with ours.
_MISSING_PRIVILEGES = sa.text(f"""
    SELECT 'SELECT on ' || n FROM unnest(CAST(:read AS text[])) AS n
    WHERE NOT has_table_privilege(to_regclass(quote_ident(n)), 'SELECT')
    UNION ALL
    SELECT CASE WHEN has_any_column_privilege(to_regclass(quote_ident(n)), p)
           THEN p || ' (' || string_agg(c, ', ' ORDER BY place) || ') on ' || n ELSE p || ' on ' || n END
    FROM unnest(CAST(:privileges AS text[]), CAST(:tables AS text[]), CAST(:columns AS text[])) WITH ORDINALITY
         AS w (p, n, c, place)
    WHERE NOT has_column_privilege(to_regclass(quote_ident(n)), c, p) GROUP BY p, n
    UNION ALL
    SELECT DISTINCT 'USAGE on ' || s FROM unnest(CAST(:tables AS text[])) AS n,
           pg_get_serial_sequence(quote_ident(n), 'id') AS s
    WHERE s IS NOT NULL AND NOT has_sequence_privilege(s, 'USAGE')
    UNION ALL
    SELECT 'USAGE on schema {SCHEMA}' WHERE NOT has_schema_privilege(to_regnamespace('{SCHEMA}'), 'USAGE')
    UNION ALL
    SELECT p || ' on {SCHEMA}.' || c.relname
    FROM pg_class c, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS p
    WHERE c.relnamespace = to_regnamespace('{SCHEMA}') AND c.relkind = 'r' AND NOT has_table_privilege(c.oid, p)
      -- Records that only grow, and the version, which `migrate` writes.
      AND NOT (p = 'UPDATE' AND c.relname IN ('audit_trail', 'settlements'))
      AND NOT (p <> 'SELECT' AND c.relname = '{VERSION_TABLE}')
""")


def missing_privileges(connection: sa.Connection) -> list[str]:
    """Name what the role would have to be granted for the jobs. Ask it only where all the tables are there."""
    written = [
        (privilege, table, column)
        for privilege, columns in (("INSERT", INSERTED), ("UPDATE", UPDATED))
        for table in columns
        for column in columns[table]
    ]
    privileges, tables, columns_ = (list(column) for column in zip(*written, strict=True))
    bound = {"read": list(SERVICE_TABLES), "privileges": privileges, "tables": tables, "columns": columns_}
    return list(connection.scalars(_MISSING_PRIVILEGES, bound))
