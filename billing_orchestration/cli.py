"""The command `billing-orchestration`: what a person or CI does from a shell.

An expected failure is one line on stderr. Exit codes: 0 done, 1 failed, 2 wrong usage; of `doctor --live` 2 says that
the deployment does not work. Each command imports only what it needs, so that `--help` and a typing error answer at
once.
"""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

from billing_orchestration.domain.printable import printable, printable_json

FAILED = 1
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        print(f"billing-orchestration: {printable(reason)}", file=sys.stderr)
        return FAILED


def _reason(error: Exception) -> str | None:
    """What an expected failure says; None for any other, which is a defect of ours."""
    from billing_orchestration.database.errors import BillingDatabaseError
    from billing_orchestration.desk.customers import NotDone
    from billing_orchestration.desk.resolving import NotResolved
    from billing_orchestration.desk.switching import NotSwitched
    from billing_orchestration.domain.reconciled import NotReconciled
    from billing_orchestration.provider.errors import ProviderError
    from billing_orchestration.settings import SettingsError

    if isinstance(error, ProviderError):
        return f"the provider gave no usable answer, so nothing was changed: {error}"
    expected = (
        NotDone,
        NotResolved,
        NotSwitched,
        NotReconciled,
        SettingsError,
        BillingDatabaseError,
        argparse.ArgumentTypeError,
    )
    if isinstance(error, expected):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("billing_orchestration"):
        return f"{error.name} is not installed: this command needs pip install 'billing-orchestration[sandbox]'"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="billing-orchestration", description="Keeps a billing database and its payment provider in agreement."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    migrate = commands.add_parser(
        "migrate",
        help="create or upgrade the schema that this version needs; safe to repeat at any time",
        description="Creates our schema and adds indexes to the service's tables; never rewrites their rows.",
    )
    migrate.set_defaults(run=_migrate)
    migrate.add_argument(
        "--downgrade",
        action="store_true",
        help="remove our schema with ALL ITS RECORDS, and our indexes; the service's tables stay",
    )
    doctor = commands.add_parser("doctor", help="check settings, database, schema and provider; say how to fix each")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--live", action="store_true", help="tell in one line whether the deployment works now")
    doctor.add_argument("--daemon", action="store_true", help="with --live: the daemon alone, for its liveness probe")
    _add_json(doctor)
    _add_plan(commands)
    _add_upcoming(commands)
    _add_switches(commands)
    _add_webserver(commands)
    _add_casework(commands)
    _add_customer(commands)
    sandbox = commands.add_parser("sandbox", help="start the provider's sandbox on this machine")
    sandbox.set_defaults(run=_sandbox)
    sandbox.add_argument("--port", type=_port, help="the port to listen on, 0 for any free one (default: 8071)")
    sandbox.add_argument("--shop-id", help="the shop id it accepts (default: 100500)")
    sandbox.add_argument("--secret-key", help="the secret key it accepts (default: test_sandbox)")
    demo = commands.add_parser("demo", help="run the five jobs on example data, and show what changed")
    demo.set_defaults(run=_demo)
    return parser


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser("plan", help="show every decision that a job would make now, and its plan's hash")
    plan.set_defaults(run=_plan)
    plan.add_argument("job", metavar="JOB", help="autopayment_job, expire_payments_job, ...")
    plan.add_argument("--as-of", type=_instant, help="an instant such as 2026-01-31T03:00:00Z (default: now)")
    plan.add_argument("--format", choices=("table", "json"), default="table")
    _add_json(plan)
    plan.add_argument("--fail-on-changes", action="store_true", help="exit with 1 if the job would change anything")


def _add_upcoming(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    upcoming = commands.add_parser(
        "upcoming", help="show who will be charged in the next days, and who will not and why"
    )
    upcoming.set_defaults(run=_upcoming)
    upcoming.add_argument("--days", type=_days, default=3, help="how many days from now (default: %(default)s)")
    upcoming.add_argument("--format", choices=("table", "csv", "json"), default="table")
    _add_json(upcoming)


def _add_switches(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    stop = commands.add_parser("stop", help="switch schedules off, at once and for sure; without a JOB, all of them")
    stop.set_defaults(run=_stop)
    start = commands.add_parser(
        "start", help="switch schedules on after a look by doctor, charging last; without a JOB, all of them"
    )
    start.set_defaults(run=_start)
    start.add_argument("-w", "--workspace", type=Path, help="where the code is (default: the deployment's own)")
    start.add_argument("--without-doctor", action="store_true", help="do not look at settings and database first")
    for switch in (stop, start):
        _add_json(switch)
        switch.add_argument("jobs", nargs="*", metavar="JOB", help="autopayment_job, expire_payments_job, ...")


def _add_webserver(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    # Short options as Dagster's own command has them, so -h is none of help's.
    webserver = commands.add_parser(
        "webserver",
        add_help=False,
        help="serve the Dagster UI, guarded: who may open it, from where, and in which form",
        description="Serves the Dagster UI. Beyond this machine it asks for a login (UI_AUTH).",
    )
    webserver.set_defaults(run=_webserver)
    webserver.add_argument("--help", action="help", help="show this help message and exit")
    webserver.add_argument("-h", "--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    webserver.add_argument("-p", "--port", type=_port, default=3000, help="the port (default: %(default)s)")
    webserver.add_argument(
        "-w", "--workspace", type=Path, default=Path("workspace.yaml"), help="where the code is (default: %(default)s)"
    )
    webserver.add_argument(
        "-l", "--path-prefix", type=_prefix, default="", help="the path before every other, as in /dagster"
    )
    webserver.add_argument("--new-login", metavar="USER", help="make a password for a user instead, and show it once")


def _add_casework(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    quarantine = commands.add_parser("quarantine", help="list, show and resolve what waits for a person")
    quarantine.set_defaults(run=_quarantine)
    actions = quarantine.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list the open entries, one line each")
    listing.add_argument("--all", action="store_true", help="include resolved entries")
    _add_json(listing)
    show = actions.add_parser("show", help="show one entry with its evidence and the ways to resolve it")
    show.add_argument("id", type=_entry_id, metavar="ID")
    _add_json(show)
    resolving = actions.add_parser(
        "resolve",
        help="close an entry",
        description="Safe at any time: at most one grant, in one transaction, with the audit trail.",
    )
    resolving.add_argument("id", type=_entry_id, metavar="ID")
    word = resolving.add_mutually_exclusive_group(required=True)
    word.add_argument("--accept", action="store_true", help="book the payment as it is")
    word.add_argument(
        "--attach", type=_row_id, metavar="SUBSCRIPTION", help="grant it as one period of this subscription"
    )
    word.add_argument("--ignore", action="store_true", help="grant nothing for it, now or later")
    resolving.add_argument("--reason", required=True, help="why, for whoever reads it next")
    resolving.add_argument("--by", help="who decided (default: the user of this shell)")
    _add_reconcile(commands)
    explain = commands.add_parser("explain", help="show the whole history of one customer's case")
    explain.set_defaults(run=_explain)
    _add_json(explain)
    explain.add_argument("what", choices=("payment", "subscription"))
    explain.add_argument("id", metavar="ID", help="the provider's payment id or the row's; the subscription's id")


def _add_customer(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    customer = commands.add_parser("customer", help="copy out or erase what our schema holds about one customer")
    customer.set_defaults(run=_customer)
    actions = customer.add_subparsers(dest="action", required=True, metavar="ACTION")
    exporting = actions.add_parser("export", help="write everything about a customer to a JSON file")
    exporting.add_argument("--output", type=Path, required=True, metavar="FILE", help="a new file")
    erasing = actions.add_parser(
        "erase",
        help="show what can be erased; with --yes erase it",
        description="What the money needs stays under a pseudonym and is named with the reason.",
    )
    erasing.add_argument("--yes", action="store_true", help="do it; without it nothing is changed")
    erasing.add_argument("--reason", default="", help="why, for the audit trail (a request's number, not a name)")
    erasing.add_argument("--by", help="who does it (default: the user of this shell)")
    for action in (exporting, erasing):
        action.add_argument("user_id", metavar="USER_ID", help="as subscriptions.user_id holds it")


def _add_reconcile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    reconcile = commands.add_parser(
        "reconcile",
        help="compare both sides' books of a period, line by line, and write a report; changes nothing",
        description="Exit code 1 when something differs. The days are those of RECONCILIATION_TIMEZONE; those of a"
        " registry are Moscow's.",
    )
    reconcile.set_defaults(run=_reconcile)
    _add_json(reconcile)
    reconcile.add_argument("--from", dest="first", type=_date, metavar="DAY", help="the first day, as 2026-11-01")
    reconcile.add_argument("--to", dest="last", type=_date, metavar="DAY", help="the last day (default: the first)")
    reconcile.add_argument("--output", type=Path, metavar="FILE", help="FILE.xlsx, or FILE.csv with two more beside it")
    reconcile.add_argument("--registry", type=Path, metavar="FILE", help="a registry (CSV or XLSX) as the third side")
    reconcile.add_argument(
        "--column",
        action="append",
        default=[],
        type=_column,
        metavar="FIELD=TITLE",
        help="a column of the registry with another title: payment_id, refund_id, amount, currency, income, at",
    )
    reconcile.add_argument("--encoding", default="utf-8", help="of a registry in CSV (default: utf-8)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    """Every command that lists something has it."""
    parser.add_argument("--json", action="store_true", help="the same as JSON, for programs")


def _show(arguments: argparse.Namespace, lines: Iterable[str], data: Any) -> None:
    """Print what a command lists: as lines for a person, or all of it as JSON."""
    _say_all(printable_json(data, indent=2).split("\n") if arguments.json else lines)


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day; write it as 2026-11-01") from None


def _column(text: str) -> tuple[str, str]:
    name, sign, title = text.partition("=")
    if not sign or not title.strip() or name not in ("payment_id", "refund_id", "amount", "currency", "income", "at"):
        raise argparse.ArgumentTypeError(f"{text!r} names no column of a registry; write payment_id=TITLE")
    return name, title


def _entry_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of an entry")
    return int(text)


def _row_id(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 19 else 0
    if not 1 <= number <= 2**63 - 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not the id of a row")
    return number


def _instant(text: str) -> datetime:
    try:
        instant = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no instant; write it as 2026-01-31T03:00:00Z") from None
    if instant.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text!r} has no offset; write it as 2026-01-31T03:00:00Z")
    return instant


def _days(text: str) -> int:
    days = int(text) if text.isascii() and text.isdigit() and len(text) <= 3 else -1
    if not 0 <= days <= 366:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days (0 to 366)")
    return days


def _port(text: str) -> int:
    port = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return port


def _prefix(text: str) -> str:
    if text and not text.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with a slash")
    return text.rstrip("/")


def _migrate(arguments: argparse.Namespace) -> None:
    from billing_orchestration.database.engine import create_engine
    from billing_orchestration.database.migrating import downgrade, migrate
    from billing_orchestration.settings import load_database_url

    engine = create_engine(load_database_url(), application_name="billing-orchestration migrate")
    try:
        report = downgrade(engine, _say) if arguments.downgrade else migrate(engine, _say)
    finally:
        engine.dispose()
    if not report.done:
        _say("nothing to do" if not report.not_done else "nothing else to do")


def _doctor(arguments: argparse.Namespace) -> int:
    from billing_orchestration.desk.doctor import HEADER, Level, diagnose

    if arguments.live:
        return _doctor_live(arguments)
    if arguments.daemon:
        raise argparse.ArgumentTypeError("--daemon belongs to --live")
    findings = []
    if not arguments.json:
        _say(HEADER)
    for finding in diagnose():  # a person sees each as it is known
        findings.append(finding)
        if not arguments.json:
            _say_all(finding.lines)
    fit = all(finding.level is not Level.FAULT for finding in findings)
    verdict = "fit: the jobs can work here" if fit else "unfit: jobs fail until each FAULT is fixed"
    _show(arguments, [verdict], {"fit": fit, "findings": [finding.fields for finding in findings]})
    return 0 if fit else FAILED


def _doctor_live(arguments: argparse.Namespace) -> int:
    from billing_orchestration.desk.live import NOT_LIVE, as_json, as_line, is_live, look

    findings = look(datetime.now(timezone.utc), daemon_only=arguments.daemon)
    _say(as_json(findings) if arguments.json else as_line(findings))
    return 0 if is_live(findings) else NOT_LIVE


def _plan(arguments: argparse.Namespace) -> int | None:
    from billing_orchestration.definitions import PLANNED, build_definitions
    from billing_orchestration.planning import NotPlanned, make_plan
    from billing_orchestration.settings import load_settings

    if arguments.job not in PLANNED:
        raise argparse.ArgumentTypeError(f"no job is called {arguments.job!r}: there are {', '.join(PLANNED)}")
    try:
        # In one piece: a plan is shown, hashed and approved as a whole.
        plan = make_plan(build_definitions(renewal_shards=0), arguments.job, arguments.as_of)
    except NotPlanned as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    arguments.json |= arguments.format == "json"
    _show(arguments, plan.as_table(load_settings().billing_language), plan.as_data())
    return FAILED if arguments.fail_on_changes and plan.changes else None


def _upcoming(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from billing_orchestration.desk.resolving import open_desk
    from billing_orchestration.desk.upcoming import find_upcoming, in_form

    with open_desk() as desk:
        lines = find_upcoming(desk.engine, desk.connect(), desk.settings, desk.now(), arguments.days)
    arguments.json |= arguments.format == "json"
    told = in_form(lines, arguments.format, desk.settings.billing_language)
    _show(arguments, told, [asdict(line) for line in lines])


def _stop(arguments: argparse.Namespace) -> None:
    from billing_orchestration.desk.switching import open_history, stop

    with open_history() as history:
        told = list(stop(history, arguments.jobs))
    _show(arguments, told, {"told": told})


def _start(arguments: argparse.Namespace) -> int | None:
    from billing_orchestration.desk.doctor import Level, diagnose
    from billing_orchestration.desk.switching import open_history, own_workspace, start

    faults = [] if arguments.without_doctor else [found for found in diagnose() if found.level is Level.FAULT]
    if faults:
        _say_all(str(found) for found in faults)
        _say("No schedule was switched on: fix what doctor names, then repeat the command.")
        return FAILED
    with open_history() as history:
        told = list(start(history, arguments.workspace or own_workspace(), arguments.jobs))
    _show(arguments, told, {"told": told})
    return None


def _quarantine(arguments: argparse.Namespace) -> None:
    from billing_orchestration.desk.quarantine_report import entries_of, entry_of, fields_of, listed, shown
    from billing_orchestration.desk.resolving import Resolution, open_desk, resolve

    with open_desk() as desk:
        if arguments.action == "list":
            entries = entries_of(desk.engine, with_resolved=arguments.all)
            _show(arguments, listed(entries), [fields_of(entry) for entry in entries])
        elif arguments.action == "show":
            entry = entry_of(desk.engine, arguments.id)
            _show(arguments, shown(entry), fields_of(entry))
        else:
            word = "accepted" if arguments.accept else "ignored" if arguments.ignore else "attached"
            ruling = Resolution(word, arguments.reason, arguments.by or _user(), arguments.attach)
            _say_all(resolve(desk.engine, desk.connect, desk.calendar, arguments.id, ruling, desk.now))


def _customer(arguments: argparse.Namespace) -> None:
    from billing_orchestration.desk.customers import erase_customer, export
    from billing_orchestration.desk.resolving import open_desk

    with open_desk() as desk:
        if arguments.action == "export":
            _say_all(export(desk, arguments.user_id, arguments.output))
        else:
            by = arguments.by or _user()
            _say_all(erase_customer(desk, arguments.user_id, by, arguments.reason, yes=arguments.yes))


def _reconcile(arguments: argparse.Namespace) -> int:
    from billing_orchestration.desk.reconciling import Wanted, reconcile_period
    from billing_orchestration.desk.resolving import open_desk
    from billing_orchestration.desk.tables import folded

    wanted = Wanted(
        arguments.first,
        arguments.last,
        arguments.output,
        arguments.registry,
        dict(arguments.column),
        arguments.encoding,
    )
    with open_desk() as desk:
        told, agrees = reconcile_period(desk, wanted)
    _show(arguments, folded(told), {"agrees": agrees, "told": told})
    return 0 if agrees else FAILED


def _explain(arguments: argparse.Namespace) -> None:
    from billing_orchestration.desk.explaining import explain_payment, explain_subscription
    from billing_orchestration.desk.resolving import open_desk
    from billing_orchestration.desk.tables import folded

    with open_desk() as desk:
        if not arguments.id.strip():
            raise argparse.ArgumentTypeError("give the id of a payment or a subscription")
        if arguments.what == "payment":
            told = explain_payment(desk.engine, desk.connect, arguments.id)
        else:
            told = explain_subscription(desk.engine, desk.connect, _row_id(arguments.id))
    _show(arguments, folded(told), {"told": told})


def _webserver(arguments: argparse.Namespace) -> None:
    if arguments.new_login is not None:
        from billing_orchestration.ui_login import new_login

        try:
            password, entry = new_login(arguments.new_login)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        _say(f"The password of {arguments.new_login}, shown only now: {password}")
        _say(f"Put into .env: UI_AUTH={entry}")
        _say("For several users: UI_AUTH=basic:USER:HASH,USER:HASH")
        return
    from billing_orchestration.ui.webserver import serve

    serve(arguments.host, arguments.port, arguments.workspace, arguments.path_prefix)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"uid {os.getuid()}"


def _sandbox(arguments: argparse.Namespace) -> None:
    from billing_orchestration.sandbox.provider.server import serve

    given = {name: getattr(arguments, name) for name in ("port", "shop_id", "secret_key")}
    serve(**{name: value for name, value in given.items() if value is not None})


def _demo(arguments: argparse.Namespace) -> int | None:  # noqa: ARG001
    from billing_orchestration.sandbox.demo import main as demo

    return demo()


def _say_all(lines: Iterable[str]) -> None:
    for line in lines:
        _say(line)


def _say(line: str) -> None:
    # Flushed, so that a pipe shows each step as it is done. A closed pipe must not stop the work.
    try:
        print(printable(line), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
