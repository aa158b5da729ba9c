"""A small subscription service on an eventful day: some 300 subscriptions and payments, and what the provider knows.

Every rule of the five jobs has at least one case, with a label and the expected outcome, so that the demo can print
what was expected beside what happened. Rows are written as the service writes them; the provider's side goes to the
sandbox. The data judges the jobs, so it shares no rule with them.
"""
