"""What is active, and all that is known about it: recent traffic, what moves have earned, what moving costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.router.placement import Placement
from moestro.router.rebalance.accounts import Account, Accounts
from moestro.router.rebalance.config import Config
from moestro.router.rebalance.cost_model import Appraisal, Prices, Rates, fewer_rows, measure, step_samples
from moestro.router.rebalance.fit import FEWEST, Learned, Line, fit
from moestro.router.rebalance.ledger import Ledger
from moestro.router.rebalance.memory import Memory
from moestro.router.rebalance.messages import Floats, Observation
from moestro.router.rebalance.plan import Job, Plan
from moestro.router.rebalance.tables import bytes_to_load, loads_by_expert, tabulate
from moestro.router.rebalance.window import Bucket, Window


class Evidence:
    def __init__(self, config: Config, placements: tuple[Placement, ...], expert_bytes: int, ledger: Ledger) -> None:
        self.placements = placements
        self.tables = tabulate(placements)
        self.window = Window(config.window_s, (len(placements), placements[0].num_experts))
        self.accounts = Accounts(self.tables)
        self.now = 0.0
        self._config = config
        self._expert_bytes = expert_bytes
        self._ledger = ledger
        self._memory = Memory(config.backoff_s, doublings=6)
        self._slowdown = Learned(config.slowdown_s_per_byte, config.horizon_s)
        self._stall = Learned(config.switch_stall_s, config.horizon_s)
        self._s_per_row = 0.0  # as of the last appraisal
        self._unstalled: int | None = None  # ledger entry of a switch whose stall comes with the next observation

    def slow(self, slowness_R: Floats) -> None:
        """The ranks are so slow from here on."""
        if np.array_equal(slowness_R, self.tables.slowness_R):
            return
        self.cut()
        self.tables = self.tables.slowed(slowness_R)
        self.accounts.slow(slowness_R)

    def observe(self, seen: Observation) -> None:
        closed = self.window.add(seen, loads_by_expert(self.tables, seen.rows_LRC), self.tables.slowness_R)
        self.now = seen.now
        self._credit(closed)
        if self._unstalled is not None:
            stall_s = float(seen.switch_s_R.max())
            self._stall.add(stall_s, 1, self.now)
            self._ledger.stalled(self._unstalled, stall_s)
            self._unstalled = None

    def cut(self) -> None:
        """Lets no bucket span this moment."""
        self._credit(self.window.cut())

    def quiet_steps(self) -> Line | None:
        """Step time by tokens, from the part of the window in which nothing was loaded."""
        return fit(step_samples([bucket for bucket in self.window.closed if not bucket.loaded_bytes]))

    def loaded(self, job: Job) -> None:
        """Learns from a finished load by how much it slowed the steps."""
        if job.quiet is not None and job.tokens and job.loaded_bytes:
            slowdown_s = job.steps_s - job.quiet.expects([(job.steps, job.tokens, job.steps_s)])
            self._slowdown.add(slowdown_s, job.loaded_bytes, self.now)
            self._ledger.slowed(job.entry, slowdown_s)

    def switch(self, job: Job, new: Placement, *, judged: bool) -> None:
        """A layer is served by ``new`` from here on; ``judged`` opens an account for what that earns."""
        self.cut()
        previous = self.placements[job.layer]
        self.placements = (*self.placements[: job.layer], new, *self.placements[job.layer + 1 :])
        self.tables = self.tables.with_layer(job.layer, new)
        self.accounts.close(job.layer)
        if judged:
            self.accounts.open(job.layer, Account(job.entry, previous, job.rate, job.cost_s, self.now))
        self._unstalled = job.entry

    def disappointed(self, layer: int, rate: float) -> None:
        """A move that had promised ``rate`` did not pay: its account is closed and the layer left alone for a while."""
        self.accounts.close(layer)
        self._memory.disappointed(layer, rate, self.now)

    def rates(self, plan: Plan) -> Rates:
        return measure(self.window.since(plan.since))

    def appraise(self, plan: Plan, layers: Sequence[int]) -> list[Appraisal]:
        """Layers of a plan on the traffic since it was made; nothing if that is too little to tell."""
        buckets = self.window.since(plan.since)
        if sum(1 for bucket in buckets if bucket.tokens) < FEWEST:
            return []
        rates = measure(buckets)
        self._s_per_row = rates.s_per_row
        new = plan.tables.slowed(self.tables.slowness_R)
        fewer = fewer_rows(self.tables.only(layers), new.only(layers), buckets, layers)
        return [
            self.price(layer, plan.placements[layer], rows * rates.s_per_row / rates.wall_s)
            for layer, rows in zip(layers, fewer.surely_L.tolist(), strict=True)
        ]

    def price(self, layer: int, new: Placement, rate: float) -> Appraisal:
        """Moving a layer, if that saves ``rate`` seconds per second."""
        bytes_R = bytes_to_load(self.placements[layer], new, self._expert_bytes)
        slowest, prices = int(bytes_R.max()), self.prices()
        saved_s, cost_s = prices.saved_s(rate, slowest), prices.cost_s(slowest)
        return Appraisal(layer, rate, saved_s, cost_s, int(bytes_R.sum()), slowest)

    def prices(self) -> Prices:
        return Prices(
            slowdown_s_per_byte=self._slowdown.value(self.now),
            stall_s=self._stall.value(self.now),
            bytes_per_s=self._config.bytes_per_s,
            horizon_s=self._config.horizon_s,
        )

    def allows(self, appraisal: Appraisal) -> bool:
        """Whether the machine may move a layer again by itself. Its last move must first have earned what it cost; one
        that has not and lately earns less than half of what it promised has disappointed."""
        layer, account = appraisal.layer, self.accounts.get(appraisal.layer)
        if account is not None and not account.paid:
            lately = self.accounts.rate(layer, self.window.since(account.opened_at), self.tables, self._s_per_row)
            if 2 * lately >= account.predicted_rate:
                return False
            self.disappointed(layer, account.predicted_rate)
        return not self._memory.forbids(layer, appraisal.rate, self.now)

    def _credit(self, closed: Sequence[Bucket]) -> None:
        for bucket in closed:
            for layer, account, gained_s in self.accounts.credit(bucket, self.tables, self._s_per_row):
                self._ledger.realised(account.entry, gained_s)
                if account.paid and account.settled:
                    self._memory.paid(layer)
        for layer, account in self.accounts.items():
            if account.settled and self.now - account.opened_at >= self._config.horizon_s:
                self.accounts.close(layer)
                if not account.paid:
                    self._memory.disappointed(layer, account.predicted_rate, self.now)
