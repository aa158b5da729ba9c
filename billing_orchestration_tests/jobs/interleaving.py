"""Two runs at once, in an order that the test decides: a run is held at a call of the provider until it is let go."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

from billing_orchestration.domain.provider_payment import ProviderPayment, UnusablePayment
from billing_orchestration.provider.client import PaymentProvider
from billing_orchestration.resources import Connect
from billing_orchestration.settings import Settings
from billing_orchestration_tests.jobs.service import Run, Service

# Only a test that would fail anyway waits this long.
_PATIENCE_S = 60.0


class Held:
    """A place where a run waits: `reached` when it is there, `let_go` to go on."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._free = threading.Event()

    def wait_here(self) -> None:
        """The run's side."""
        self._reached.set()
        if not self._free.wait(_PATIENCE_S):
            raise TimeoutError("nobody let the run go on")

    def reached(self) -> None:
        """The test's side: return when the run is there."""
        if not self._reached.wait(_PATIENCE_S):
            raise TimeoutError("the run never got here")

    def let_go(self) -> None:
        """The test's side: the run goes on."""
        self._free.set()


class HeldProvider(PaymentProvider):
    """The real client over HTTP, which waits before (or after) the calls that the test names.

    A charge of a method in `elsewhere` goes through another client: one whose address nobody listens at.
    """

    holds: dict[str, Held]
    elsewhere: dict[str, PaymentProvider]

    def _hold(self, place: str) -> None:
        held = self.holds.get(place)
        if held is not None:
            held.wait_here()

    def create_payment(self, body: str, idempotence_key: str, *more: Any, **options: Any) -> ProviderPayment:
        """`before charge METHOD`, `after charge METHOD`."""
        method = json.loads(body)["payment_method_id"]
        self._hold(f"before charge {method}")
        try:
            if method in self.elsewhere:
                return self.elsewhere[method].create_payment(body, idempotence_key, *more, **options)
            return super().create_payment(body, idempotence_key, *more, **options)
        finally:
            self._hold(f"after charge {method}")

    def get_payment(self, payment_id: str) -> ProviderPayment | UnusablePayment:
        """`before get PAYMENT`."""
        self._hold(f"before get {payment_id}")
        return super().get_payment(payment_id)


class Worker:
    """A process of its own, as far as the database can tell: own engine, own provider client, own Dagster instance."""

    def __init__(self, service: Service, holds: dict[str, Held] | None = None) -> None:
        self.service = copy.copy(service)
        self.service._instance = None
        if holds is not None:
            self.service.connect_provider = self._connect_held(holds)  # type: ignore[method-assign,assignment]
        self._elsewhere: dict[str, PaymentProvider] = {}
        self._thread: threading.Thread | None = None
        self._run: Run | None = None
        self._error: BaseException | None = None

    def _connect_held(self, holds: dict[str, Held]) -> Connect:
        def connect(settings: Settings, now: Callable[[], datetime]) -> PaymentProvider:
            provider = HeldProvider(
                shop_id=settings.yookassa_shop_id,
                secret_key=settings.yookassa_secret_key.get_secret_value(),
                api_url=settings.yookassa_api_url,
                timeouts=self.service.timeouts,
                now=now,
            )
            provider.holds = holds
            provider.elsewhere = self._elsewhere
            return provider

        return connect

    def nobody_listens_for(self, method: str, url: str) -> None:
        """From now on, the charges of this method are sent to an address where nobody listens."""
        settings = self.service.settings.model_copy(update={"yookassa_api_url": url})
        self._elsewhere[method] = Service.connect_provider(self.service, settings)

    def start(self, job: str, **run: Any) -> Worker:
        """Begin a run."""

        def target() -> None:
            try:
                self._run = self.service.run(job, **run)
            except BaseException as error:  # noqa: BLE001 - told to the test by `finished`
                self._error = error
            finally:
                # In the thread that opened it: SQLite insists.
                if self.service._instance is not None:
                    self.service._instance.dispose()
                    self.service._instance = None

        self._thread = threading.Thread(target=target, name=f"worker {job}", daemon=True)
        self._thread.start()
        return self

    def finished(self) -> Run:
        """Wait for the run's end."""
        assert self._thread is not None
        self._thread.join(_PATIENCE_S)
        if self._error is not None:
            raise self._error
        assert self._run is not None, "the run did not end"
        return self._run
