"""The real parts that every test above the pure rules talks to: a PostgreSQL and the sandbox provider over HTTP."""

pytest_plugins = [
    "billing_orchestration_tests.fixtures.installation",
    "billing_orchestration_tests.fixtures.postgres",
    "billing_orchestration_tests.fixtures.receiver",
    "billing_orchestration_tests.fixtures.sandbox",
    "billing_orchestration_tests.fixtures.service",
]
