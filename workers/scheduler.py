"""Which tokens a step computes. No I/O, no clock, no torch: calls in, plans and deltas out (sans-IO, as etcd/raft).

A sequence is its known tokens and how many of them are computed; each step hands out a budget of tokens so that
computed catches up with known (the idea of vLLM v1). There are no phases: a prompt, a found prefix, a sequence that
lost its blocks and one replayed after a fault differ only in the two numbers.

Everything is served in one total order, (priority, arrival). The sequence first in that order is never the one that
gives way, so it always advances and ends; by induction so does every other. See SCHEDULER.md.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import attrgetter
from types import MappingProxyType

from moestro.protos.errors import FieldViolation, InvalidRequest, Overloaded
from moestro.protos.sequences import (
    EngineLoad,
    FinishReason,
    SampledToken,
    SequenceDelta,
    SequenceRequest,
    TokenLogprobs,
)
from moestro.workers.kv_blocks import BlockPool
from moestro.workers.scheduler_config import SchedulerConfig
from moestro.workers.scheduler_policies import ADMISSIONS, RESERVATIONS
from moestro.workers.scheduler_refusals import why_never
from moestro.workers.scheduler_sequence import SequenceState, Span, StepPlan
from moestro.workers.scheduler_tables import TableManager

_BY_KEY = attrgetter("key")
_new_tuple = tuple.__new__  # of a NamedTuple's fields, without the detour through Python that its own __new__ takes
_ABSENT = (SampledToken(-1), SampledToken(-1, error="the step gave no token"))  # by whether the span samples
_NO_LOGPROBS: Mapping[str, Sequence[TokenLogprobs | None]] = MappingProxyType({})


def build_pools(config: SchedulerConfig) -> tuple[BlockPool, ...]:
    """One empty pool for each cache group."""
    return tuple(BlockPool(group.num_blocks) for group in config.groups)


class Scheduler:
    """Sequences in, one plan at a time out: ``add`` and ``cancel`` at any time, ``plan`` and ``apply`` in turn.

    Deterministic: two schedulers with equal configurations that are fed the same calls make the same plans, whatever
    the times they are told; times reach ledgers only.
    """

    def __init__(self, config: SchedulerConfig, pools: Sequence[BlockPool] | None = None) -> None:
        config.validate()
        self.config = config
        self.context_limit = config.context_limit
        self._pools = tuple(build_pools(config) if pools is None else pools)
        if [pool.num_usable + 1 for pool in self._pools] != [group.num_blocks for group in config.groups]:
            raise ValueError("pools must have the num_blocks of groups, in their order")
        self._tables = TableManager(config.groups, self._pools, config.block_size)
        self._admission = ADMISSIONS[config.admission]
        self._reservation = RESERVATIONS[config.reservation]
        self._waiting: list[SequenceState] = []  # in the order of service; none holds a block
        self._running: list[SequenceState] = []  # in the order of service; all of them are in every plan
        self._by_id: dict[str, SequenceState] = {}
        self._cancelled: list[SequenceState] = []  # gone, their last delta not yet handed out
        self._to_preempt: list[SequenceState] = []  # those that asked for it and have not had it
        self._in_flight: StepPlan | None = None
        self._spare = 0  # tokens of the step being planned that are owed to nobody
        self._num_arrivals = 0
        self._num_steps = 0
        self._step_s = 0.0

    # Sequences in and out.

    def check(self, request: SequenceRequest) -> str | None:
        """Why a sequence could never be served here, or None. ``max_tokens`` beyond the context is no reason: the
        sequence ends with LENGTH where the context does."""
        refusal = why_never(request, self.context_limit)
        return None if refusal is None else str(refusal)

    def add(self, request: SequenceRequest, now: float) -> None:
        """Takes a sequence in. Raises Overloaded when ``max_waiting`` sequences wait, InvalidRequest where ``check``
        has a reason (ContextOverflow if it is the context) or the id is in use; nothing has changed then."""
        if request.sequence_id in self._by_id:
            raise InvalidRequest([FieldViolation("sequence_id", f"{request.sequence_id!r} is in use")])
        refusal = why_never(request, self.context_limit)
        if refusal is not None:
            raise refusal
        if len(self._waiting) >= self.config.max_waiting:
            raise Overloaded(f"{len(self._waiting)} sequences wait; max_waiting is {self.config.max_waiting}")
        sequence = SequenceState(request, self._num_arrivals, self.context_limit, len(self._pools), now)
        self._num_arrivals += 1
        self._by_id[sequence.sequence_id] = sequence
        insort(self._waiting, sequence, key=_BY_KEY)
        if sequence.preempt_at is not None:
            self._to_preempt.append(sequence)

    def cancel(self, sequence_id: str) -> bool:
        """Ends a sequence; False if there is none of that name. Legal at any time. Blocks are freed at once, or in the
        ``apply`` of the step in flight, which may still write into them. The last delta, CANCELLED with its ledger,
        comes from the next ``apply``; no token comes after the cancel."""
        sequence = self._by_id.get(sequence_id)
        if sequence is None or sequence.is_cancelled:
            return False
        sequence.is_cancelled = True
        if not _take_out(self._waiting, sequence):
            if self._in_flight is not None:
                return True
            _take_out(self._running, sequence)
            self._leave(sequence)
        del self._by_id[sequence_id]
        self._cancelled.append(sequence)
        return True

    @property
    def sequence_ids(self) -> tuple[str, ...]:
        """Those whose last delta is still to come."""
        return (*self._by_id, *(sequence.sequence_id for sequence in self._cancelled))

    @property
    def has_work(self) -> bool:
        """Whether a step has something to compute or to say. A plan without spans is legal; apply it all the same."""
        return bool(self._running or self._waiting or self._cancelled)

    def load(self) -> EngineLoad:
        """Load as of the last step. Blocks that are only findable count as unused."""
        return EngineLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_blocks_used=sum(pool.num_used for pool in self._pools),
            kv_blocks_total=sum(pool.num_usable for pool in self._pools),
            num_steps=self._num_steps,
            step_s=self._step_s,
        )

    # One step.

    def plan(self, now: float) -> StepPlan:
        """What the next step computes. Must be followed by ``apply`` or ``abandon``.

        One walk through the running sequences in the order of service. A waiting sequence is admitted at its place in
        that order, which is after all the running ones unless it is more urgent. Each running sequence is owed one
        token; what the budget holds beyond that goes to the first who can use it. Whoever finds no free block takes
        those of the last in the order. So a sequence that has its span in a plan is never preempted in the same plan.
        """
        if self._in_flight is not None:
            raise RuntimeError("plan: the last plan was neither applied nor abandoned")
        running = self._running
        decodes: list[Span] = []
        longer: list[Span] = []
        self._spare = self.config.max_num_tokens - len(running)
        is_open = bool(self._waiting) and self._admission(len(running))
        urgent = self._waiting[0].priority if is_open else None
        index = 0
        while index < len(running):
            sequence = running[index]
            if urgent is not None and urgent < sequence.priority:
                is_open = self._admit(index, now)
                urgent = self._waiting[0].priority if is_open and self._waiting else None
                if not is_open:
                    continue  # look at the same sequence again, if it still runs
                sequence = running[index]
            start = sequence.num_computed
            if start < sequence.steady_until:  # nearly all, nearly always
                decodes.append(_new_tuple(Span, (sequence, start, 1, True)))
            else:
                self._serve(index, decodes, longer)
            index += 1
        while is_open and self._admit(len(running), now):
            self._serve(len(running) - 1, decodes, longer)
        num_tokens = len(decodes) + sum(span.length for span in longer)
        plan = StepPlan((*decodes, *longer), len(decodes), num_tokens, now)
        self._in_flight = plan
        return plan

    def apply(
        self,
        plan: StepPlan,
        sampled: Mapping[str, SampledToken],
        now: float,
        prompt_logprobs: Mapping[str, Sequence[TokenLogprobs | None]] = _NO_LOGPROBS,
    ) -> list[SequenceDelta]:
        """Takes a computed step in: appends tokens, ends sequences, frees their blocks.

        ``sampled`` has an entry for each span that samples; an entry with an error ends its sequence, and so does a
        missing one. ``prompt_logprobs`` has, for each span of a sequence that ``wants_prompt_logprobs``, those of the
        prompt tokens ``start + 1`` to ``start + length`` that exist; they go out joined with the first output token.
        """
        self._land(plan)
        self._num_steps += 1
        self._step_s = now - plan.planned_at
        deltas = self._take_cancelled(now)
        windows = self._tables.has_windows
        num_known = len(self._by_id)
        for sequence, start, length, samples in plan.spans:
            sequence.num_computed = start + length
            token_id, logprobs, error = sampled.get(sequence.sequence_id, _ABSENT[samples])
            if sequence.is_cancelled:
                deltas.append(self._end(sequence, FinishReason.CANCELLED, now))
            elif error is not None:
                deltas.append(self._end(sequence, FinishReason.ERROR, now, error=error))
            elif samples:
                joined = None
                if sequence.first_output_at is None:
                    joined = self._first_output(sequence, now, prompt_logprobs)
                deltas.append(self._advance(sequence, token_id, logprobs, joined, now))
            else:
                sequence.prompt_logprobs.extend(prompt_logprobs.get(sequence.sequence_id, ()))
            if windows:
                self._tables.trim(sequence)
        if len(self._by_id) < num_known:
            self._running = [sequence for sequence in self._running if sequence.sequence_id in self._by_id]
        if self._to_preempt:
            self._preempt_on_demand()
        return deltas

    def abandon(self, plan: StepPlan) -> None:
        """The step failed and computed nothing that can be trusted: its sequences wait again, with all their tokens,
        and what it would have written cannot be found. What earlier steps wrote can."""
        self._land(plan)
        for sequence, start, _, _ in plan.spans:
            self._leave(sequence, forget_from=start // self.config.block_size)
            sequence.prompt_logprobs = [None]
            if sequence.is_cancelled:
                del self._by_id[sequence.sequence_id]
                self._cancelled.append(sequence)
            else:
                insort(self._waiting, sequence, key=_BY_KEY)
        self._running = []

    def check_integrity(self) -> None:
        """Asserts every invariant of sequences, tables and pools. Valid at any time, idle or with a step in flight."""
        running, waiting = self._running, self._waiting
        for queue in (running, waiting):
            assert all(a.key < b.key for a, b in pairwise(queue)), f"out of order: {queue}"
        assert len(running) <= self.config.max_num_sequences, f"{len(running)} run"
        assert {s.sequence_id: s for s in (*running, *waiting)} == self._by_id, "sequences and ids disagree"
        for s in (*running, *waiting):
            assert s.num_prompt <= len(s.token_ids) < s.max_known, f"{s} should have ended"
            assert s.num_computed < len(s.token_ids), f"{s}: nothing left to compute"
        for s in waiting:
            assert not any(s.block_tables), f"{s} waits and holds blocks"
            assert s.num_computed == s.capacity == 0, f"{s} waits and has something computed"
            assert not s.is_cancelled, f"{s} waits and is cancelled"
        if self._in_flight is None:
            assert not any(s.is_cancelled for s in running), "a cancelled sequence still runs"
        else:
            assert {id(span.sequence) for span in self._in_flight.spans} == {id(s) for s in running}, (
                "not all are served"
            )
            assert self._in_flight.num_tokens <= self.config.max_num_tokens, "the budget was exceeded"
            for s, start, length, samples in self._in_flight.spans:
                assert s.num_computed == start < start + length <= s.capacity, f"{s}: no room for {length}"
                assert samples == (start + length == len(s.token_ids)), f"{s}: samples is {samples}"
        self._tables.check_integrity(running)

    # Inside a step.

    def _serve(self, index: int, decodes: list[Span], longer: list[Span]) -> None:
        """Plans what the budget and the pools allow of the sequence at ``index``, or preempts it."""
        sequence = self._running[index]
        start, known = sequence.num_computed, len(sequence.token_ids)
        end = min(known, start + min(1 + self._spare, sequence.max_chunk))
        if end > sequence.capacity:
            # A shorter chunk costs nobody anything; the blocks of others are taken only to advance at all.
            while (reachable := self._tables.reachable(sequence)) <= start:
                is_last = len(self._running) == index + 1
                self._preempt_last()
                if is_last:
                    return
            end = min(end, reachable)
            self._tables.extend(sequence, end)
        self._tables.commit(sequence, end)
        self._spare -= end - start - 1
        if end == known:
            sequence.steady_until = self._tables.steady_until(end)
        span = Span(sequence, start, end - start, end == known)
        (decodes if end - start == 1 else longer).append(span)

    def _admit(self, index: int, now: float) -> bool:
        """Moves the first waiting sequence to ``index`` of the running ones, if budget, slots and blocks allow; those
        that run from ``index`` on are less urgent and give way. The first one that cannot be admitted holds up all
        behind it, or a long prompt would wait for ever behind short ones."""
        if not self._waiting or self._spare + len(self._running) - index < 1:
            return False
        sequence = self._waiting[0]
        victims = self._running[index:]
        if not victims and not self._may_fit(index):
            return False
        num_found = self._tables.find_prefix(sequence)
        if victims and not self._fits(sequence, index, num_found, victims):
            return False
        while not self._fits(sequence, index, num_found, ()):
            if len(self._running) == index:
                return False
            self._preempt_last()
        if self._spare < 1:
            return False
        del self._waiting[0]
        self._running.insert(index, sequence)
        self._spare -= 1
        sequence.num_steps -= self._num_steps  # it is in every plan until it leaves
        if sequence.started_at is None:
            sequence.started_at = now
            sequence.num_cached = min(num_found * self.config.block_size, sequence.num_prompt)
        self._tables.hold(sequence, self._reservation.num_tokens(sequence), num_found)
        return True

    def _may_fit(self, index: int) -> bool:
        """A slot, and in every group a block beyond those to stay free: what any sequence needs. Looked at first, since
        a full rank should not search for the prefix of the same sequence in every step."""
        free = min(pool.num_free for pool in self._pools)
        return len(self._running) < self.config.max_num_sequences and free > self._reservation.num_spare(index)

    def _fits(self, sequence: SequenceState, index: int, num_found: int, victims: Sequence[SequenceState]) -> bool:
        """Whether there is a slot and blocks, were ``victims`` gone. The ``index`` sequences before it may count on the
        blocks that the policy wants to stay free; those after it may not."""
        if len(self._running) - len(victims) >= self.config.max_num_sequences:
            return False
        num_tokens = self._reservation.num_tokens(sequence)
        return self._tables.fits(sequence, num_tokens, num_found, self._reservation.num_spare(index), victims)

    def _preempt_last(self) -> None:
        """The last running sequence gives back its blocks and its token of this step, keeps all its tokens, and waits
        at its place in the order of service."""
        self._preempt(self._running.pop())
        self._spare += 1

    def _preempt(self, sequence: SequenceState) -> None:
        """A sequence that has just left the running ones waits again, with nothing computed."""
        self._leave(sequence)
        sequence.num_preemptions += 1
        sequence.prompt_logprobs = [None]
        insort(self._waiting, sequence, key=_BY_KEY)

    def _preempt_on_demand(self) -> None:
        """Preempts those whose diagnostics ask for it now: once, and to compute everything anew. Others that came later
        run on, so it goes behind them in the order of service."""
        waiting_for_it = []
        for sequence in self._to_preempt:
            assert sequence.preempt_at is not None
            if self._by_id.get(sequence.sequence_id) is not sequence or sequence.num_output > sequence.preempt_at:
                continue
            if sequence.num_computed == 0 or sequence.num_output < sequence.preempt_at:
                waiting_for_it.append(sequence)
                continue
            sequence.recomputes = True
            _take_out(self._running, sequence)
            sequence.key = (sequence.priority, self._num_arrivals)
            self._num_arrivals += 1
            self._preempt(sequence)
        self._to_preempt = waiting_for_it

    def _land(self, plan: StepPlan) -> None:
        if plan is not self._in_flight:
            raise RuntimeError("this plan is not the one in flight")
        self._in_flight = None

    def _leave(self, sequence: SequenceState, forget_from: int | None = None) -> None:
        """A sequence runs no more: gives its blocks back, and counts the steps since it was admitted."""
        self._tables.release(sequence, forget_from)
        sequence.num_steps += self._num_steps

    def _first_output(
        self,
        sequence: SequenceState,
        now: float,
        prompt_logprobs: Mapping[str, Sequence[TokenLogprobs | None]],
    ) -> tuple[TokenLogprobs | None, ...] | None:
        """Notes the time, and joins the log probabilities of the prompt where they are wanted."""
        sequence.first_output_at = now
        if not sequence.wants_prompt_logprobs:
            return None
        sequence.wants_prompt_logprobs = False
        gathered, sequence.prompt_logprobs = sequence.prompt_logprobs, []
        return (*gathered, *prompt_logprobs.get(sequence.sequence_id, ()))

    def _advance(
        self,
        sequence: SequenceState,
        token_id: int,
        logprobs: TokenLogprobs | None,
        prompt_logprobs: tuple[TokenLogprobs | None, ...] | None,
        now: float,
    ) -> SequenceDelta:
        """One more known token, which may be the last."""
        token_ids = sequence.token_ids
        token_ids.append(token_id)
        sequence.last_output_at = now
        told = () if logprobs is None else (logprobs,)
        if len(token_ids) >= sequence.max_known or token_id in sequence.end_ids:
            reason = sequence.finish_reason(token_id)
            if reason is not None:
                return self._end(sequence, reason, now, (token_id,), told, prompt_logprobs)
        return SequenceDelta(sequence.sequence_id, (token_id,), told, prompt_logprobs)

    def _end(
        self,
        sequence: SequenceState,
        reason: FinishReason,
        now: float,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None,
        error: str | None = None,
    ) -> SequenceDelta:
        """Frees a running sequence and makes its last delta. What a failed one computed is not offered to others."""
        self._leave(sequence, forget_from=0 if reason is FinishReason.ERROR else None)
        del self._by_id[sequence.sequence_id]
        ledger = sequence.ledger(now)
        return SequenceDelta(sequence.sequence_id, token_ids, logprobs, prompt_logprobs, reason, error, ledger)

    def _take_cancelled(self, now: float) -> list[SequenceDelta]:
        """The last deltas of those that were cancelled while no step was in flight, or waited."""
        gone, self._cancelled = self._cancelled, []
        return [SequenceDelta(s.sequence_id, finish_reason=FinishReason.CANCELLED, ledger=s.ledger(now)) for s in gone]


def _take_out(queue: list[SequenceState], sequence: SequenceState) -> bool:
    """Removes a sequence from a queue in the order of service, if it is there."""
    place = bisect_left(queue, sequence.key, key=_BY_KEY)
    if place == len(queue) or queue[place] is not sequence:
        return False
    del queue[place]
    return True
