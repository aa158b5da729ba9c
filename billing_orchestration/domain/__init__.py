"""The rules, and nothing else: what is due, what differs, what to do, and why.

Nothing in here knows Dagster, SQL or HTTP, reads a clock or an environment variable. Every function takes what it
needs, `now` included, and returns decisions as data, so a rule can be read, tested and argued about on its own.
"""
