"""The real parts that every test above the pure rules talks to: a PostgreSQL and the sandbox provider over HTTP."""

# Its pytest plugin imports it at the very end of a session, when a garbage collection in the middle of parsing it can
# end in "SystemError: AST constructor recursion depth mismatch" (CPython 3.11), and a green session in exit code 1.
import hypothesis  # noqa: F401

pytest_plugins = [
    "billing_orchestration_tests.fixtures.postgres",
    "billing_orchestration_tests.fixtures.sandbox",
]
