"""Payments that hold a charge until it is known what became of them: asked about again by each run that charges.

A success that came beside another try of its period (`second_success`) is granted by itself once that try has turned
out unpaid. A charge that our records have lost, and whose record could not be read or was not finished, is settled once
it is paid, and holds nothing any more once it is canceled.
"""

from collections.abc import Callable

from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.quarantine import close_canceled, doubtful_charges, successes_left_alone
from billing_orchestration.domain.provider_payment import CANCELED, SUCCEEDED, ProviderPayment
from billing_orchestration.jobs.run_report import RunReport
from billing_orchestration.jobs.settling import report_settled, settle_all
from billing_orchestration.provider.errors import ProviderError, RequestRejected
from billing_orchestration.provider.pacing import map_concurrently
from billing_orchestration.resources import BillingDatabase, ProviderConnection
from billing_orchestration.threads import Threads

# At once: there are few.
_QUESTIONS = 8


def settle_doubtful(
    report: RunReport,
    database: BillingDatabase,
    provider: ProviderConnection,
    make_stamp: Callable[[], Stamp],
    threads: Threads,
) -> None:
    """Settle those of them that are paid, as the provider shows them now; entries about canceled ones are closed.

    What moves: nothing at the provider; a grant in the service's books, by the function that all jobs use. Killed
    before its commit, or without an answer: the entry is open still, it holds the subscription, and the next run asks
    again.
    """
    with database.read() as connection:
        asked = list(dict.fromkeys([*successes_left_alone(connection), *doubtful_charges(connection)]))
    paid: list[ProviderPayment] = []
    canceled: list[str] = []
    for payment_id, answer in map_concurrently(provider.client.get_payment, asked, _QUESTIONS, threads=threads):
        if isinstance(answer, ProviderPayment):
            if answer.status == SUCCEEDED:
                paid.append(answer)
            elif answer.status == CANCELED:
                canceled.append(payment_id)
        elif isinstance(answer, ProviderError) and not isinstance(answer, RequestRejected):
            report.again.append(f"payment {payment_id} holds a charge until its end is known: {answer}")
        elif isinstance(answer, Exception) and not isinstance(answer, ProviderError):
            raise answer
        # What the provider does not know or shows oddly stays before a person.
    if canceled:
        with database.begin() as connection:
            report.applied += close_canceled(connection, make_stamp(), canceled)
    if paid:
        results = settle_all(database, paid, make_stamp=make_stamp, is_live=provider.client.is_live, dry_run=False)
        report_settled(report, results, database=database, stamp=make_stamp(), dry_run=False)
