"""The Dagster UI for people: the official webserver behind a guard. It needs neither the shop nor the database."""
