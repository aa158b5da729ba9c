"""Everything that is said to PostgreSQL: tables, statements, migrations. The caller owns the transaction."""
