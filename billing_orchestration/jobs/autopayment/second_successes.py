"""A success that came beside another try of its period: granted by itself once that try has turned out unpaid.

Until then the two may be a payment too many, so its entry (`second_success`) holds the subscription. A run of
autopayment_job is what hears of the other try's end, and it settles the success right after.
"""

from collections.abc import Callable

from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.quarantine import successes_left_alone
from billing_orchestration.domain.provider_payment import SUCCEEDED, ProviderPayment
from billing_orchestration.jobs.run_report import RunReport
from billing_orchestration.jobs.settling import report_settled, settle_all
from billing_orchestration.provider.errors import ProviderError, RequestRejected
from billing_orchestration.provider.pacing import map_concurrently
from billing_orchestration.resources import BillingDatabase, ProviderConnection
from billing_orchestration.threads import Threads

# At once: there are few.
_QUESTIONS = 8


def settle_left_alone(
    report: RunReport,
    database: BillingDatabase,
    provider: ProviderConnection,
    make_stamp: Callable[[], Stamp],
    threads: Threads,
) -> None:
    """Settle these successes, as the provider shows them now; their entries close with it.

    What moves: nothing at the provider; a grant in the service's books, by the function that all jobs use. Killed
    before its commit, or without an answer: the entry is open still, it holds the subscription, and the next run asks
    again.
    """
    with database.read() as connection:
        alone = successes_left_alone(connection)
    paid: list[ProviderPayment] = []
    for payment_id, answer in map_concurrently(provider.client.get_payment, alone, _QUESTIONS, threads=threads):
        if isinstance(answer, ProviderPayment):
            if answer.status == SUCCEEDED:
                paid.append(answer)
        elif isinstance(answer, ProviderError) and not isinstance(answer, RequestRejected):
            report.again.append(f"payment {payment_id}: it came beside a try that is unpaid, and {answer}")
        elif isinstance(answer, Exception) and not isinstance(answer, ProviderError):
            raise answer
        # What the provider does not know or shows oddly stays before a person.
    if paid:
        results = settle_all(database, paid, make_stamp=make_stamp, is_live=provider.client.is_live, dry_run=False)
        report_settled(report, results, database=database, stamp=make_stamp(), dry_run=False)
