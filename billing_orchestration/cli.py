"""The command `billing-orchestration`: migrate, doctor, quarantine, explain, sandbox, demo.

An expected failure is one line on stderr and an exit code other than 0 (1: it failed, 2: wrong usage). Each command
imports only what it needs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from billing_orchestration.desk.resolving import Desk

FAILED = 1
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    commands = {"migrate": _migrate, "doctor": _doctor, "sandbox": _sandbox, "demo": _demo}
    commands |= {"quarantine": _quarantine, "explain": _explain}
    try:
        return commands[arguments.command](arguments)
    except KeyboardInterrupt:
        return INTERRUPTED


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
    migrate.add_argument(
        "--downgrade",
        action="store_true",
        help="remove our schema with ALL ITS RECORDS, and our indexes; the service's tables stay",
    )
    commands.add_parser(
        "doctor", help="check settings, database, schema and provider, and say how to fix what is wrong"
    )
    _add_casework(commands)
    sandbox = commands.add_parser("sandbox", help="start the provider's sandbox on this machine")
    sandbox.add_argument("--port", type=_port, help="the port to listen on, 0 for any free one (default: 8071)")
    sandbox.add_argument("--shop-id", help="the shop id it accepts (default: 100500)")
    sandbox.add_argument("--secret-key", help="the secret key it accepts (default: test_sandbox)")
    commands.add_parser("demo", help="run the five jobs on example data, and show what changed")
    return parser


def _add_casework(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    quarantine = commands.add_parser("quarantine", help="list, show and resolve what waits for a person")
    actions = quarantine.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list the open entries, one line each")
    listing.add_argument("--all", action="store_true", help="include resolved entries")
    show = actions.add_parser("show", help="show one entry with its evidence and the ways to resolve it")
    show.add_argument("id", type=_entry_id, metavar="ID")
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
    explain = commands.add_parser("explain", help="show the whole history of one customer's case")
    explain.add_argument("what", choices=("payment", "subscription"))
    explain.add_argument("id", metavar="ID", help="the provider's payment id or the row's; the subscription's id")


def _entry_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of an entry")
    return int(text)


def _row_id(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else 0
    if not 1 <= number <= 2_147_483_647:
        raise argparse.ArgumentTypeError(f"{text!r} is not the id of a row")
    return number


def _port(text: str) -> int:
    port = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return port


def _migrate(arguments: argparse.Namespace) -> int:
    from billing_orchestration.settings import SettingsError, load_database_url

    try:
        url = load_database_url()
    except SettingsError as error:
        return _fail(error)
    from billing_orchestration.database.engine import create_engine
    from billing_orchestration.database.errors import BillingDatabaseError
    from billing_orchestration.database.migrating import downgrade, migrate

    engine = create_engine(url, application_name="billing-orchestration migrate")
    try:
        report = downgrade(engine, _say) if arguments.downgrade else migrate(engine, _say)
    except BillingDatabaseError as error:
        return _fail(error)
    finally:
        engine.dispose()
    if not report.done:
        _say("nothing to do" if not report.not_done else "nothing else to do")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:  # noqa: ARG001
    from billing_orchestration.desk.doctor import Level, diagnose

    faults = 0
    for finding in diagnose():
        _say(str(finding))
        faults += finding.level is Level.FAULT
    return FAILED if faults else 0


def _quarantine(arguments: argparse.Namespace) -> int:
    from billing_orchestration.desk.quarantine_report import listed, shown

    def work(desk: Desk) -> list[str]:
        if arguments.action == "list":
            return listed(desk.engine, with_resolved=arguments.all)
        if arguments.action == "show":
            return shown(desk.engine, arguments.id)
        from billing_orchestration.desk.resolving import Resolution, resolve

        word = "accepted" if arguments.accept else "ignored" if arguments.ignore else "attached"
        by = arguments.by or _user()
        ruling = Resolution(word, arguments.reason, by, arguments.attach)
        return resolve(desk.engine, desk.connect, desk.calendar, arguments.id, ruling, desk.now)

    return _at_desk(work)


def _explain(arguments: argparse.Namespace) -> int:
    from billing_orchestration.desk.explaining import explain_payment, explain_subscription

    def work(desk: Desk) -> list[str]:
        if not arguments.id.strip():
            raise argparse.ArgumentTypeError("give the id of a payment or a subscription")
        if arguments.what == "payment":
            return explain_payment(desk.engine, desk.connect, arguments.id)
        return explain_subscription(desk.engine, desk.connect, _row_id(arguments.id))

    return _at_desk(work)


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"uid {os.getuid()}"


def _at_desk(work: Callable[[Desk], list[str]]) -> int:
    """Do one piece of work on the settings' database and provider, and print the result."""
    from billing_orchestration.database.errors import BillingDatabaseError
    from billing_orchestration.desk.resolving import NotResolved, open_desk
    from billing_orchestration.provider.errors import ProviderError
    from billing_orchestration.settings import SettingsError

    try:
        with open_desk() as desk:
            for line in work(desk):
                _say(line)
    except argparse.ArgumentTypeError as error:
        return _fail(error)
    except (NotResolved, SettingsError, BillingDatabaseError) as error:
        return _fail(error)
    except ProviderError as error:
        return _fail(f"the provider gave no usable answer, so nothing was changed: {error}")
    return 0


def _sandbox(arguments: argparse.Namespace) -> int:
    try:
        from billing_orchestration.sandbox.provider.server import serve
    except ModuleNotFoundError as error:
        return _needs_extra(error)
    given = {name: getattr(arguments, name) for name in ("port", "shop_id", "secret_key")}
    serve(**{name: value for name, value in given.items() if value is not None})
    return 0


def _demo(arguments: argparse.Namespace) -> int:  # noqa: ARG001
    try:
        from billing_orchestration.sandbox.demo import main as demo
    except ModuleNotFoundError as error:
        return _needs_extra(error)
    return int(demo() or 0)


def _needs_extra(error: ModuleNotFoundError) -> int:
    if (error.name or "").startswith("billing_orchestration"):
        raise error
    return _fail(f"{error.name} is not installed: this command needs pip install 'billing-orchestration[sandbox]'")


def _say(line: str) -> None:
    # Flushed, so that a pipe shows each step as it is done. A closed pipe must not stop the work.
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(reason: object) -> int:
    print(f"billing-orchestration: {reason}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
