"""The scheduler's behaviour as plain text, to be read and reviewed by a person (after etcd/raft's data-driven tests).

A transcript is a list of commands, each followed by ``----`` and what it printed. Commands:

    config block_size=4 blocks=9[,9] [windows=none,8] [tokens=16] [seqs=4] [context=64] [waiting=8]
           [admission=static] [reservation=max_length]
    add NAME prompt=1..10 [output=7,8] [max_tokens=4] [priority=0] [eos=2] [stop=3] [min_tokens=0] [prompt_logprobs]
    cancel NAME
    plan                      what the next step computes, and in which blocks
    apply [NAME=TOKEN|error]  takes it in; a token that is not given is 100 + the number of output tokens so far
    abandon                   the step failed
    step [COUNT] [NAME=...]   plan and apply; each step takes one second
    state                     who runs, who waits, which blocks are free

``MOESTRO_REWRITE_TRANSCRIPTS=1 pytest tests/scheduler`` writes what was printed into the files; read the diff.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from moestro.protos.errors import MoestroError
from moestro.protos.sequences import (
    Diagnostics,
    SampledToken,
    SamplingParams,
    SequenceDelta,
    SequenceRequest,
    TokenLogprobs,
)
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig
from moestro.workers.scheduler_sequence import SequenceState, Span, StepPlan

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))
REWRITE = os.environ.get("MOESTRO_REWRITE_TRANSCRIPTS") == "1" and "CI" not in os.environ


class Driver:
    """Runs one command line at a time against a scheduler."""

    def __init__(self) -> None:
        self.scheduler: Scheduler | None = None
        self.in_flight: StepPlan | None = None
        self.now = 0.0

    def run(self, line: str) -> list[str]:
        command, *words = line.split()
        positional = [word for word in words if "=" not in word]
        options = dict(word.split("=", 1) for word in words if "=" in word)
        printed: list[str] = list(getattr(self, f"do_{command}")(positional, options))
        if self.scheduler is not None:
            self.scheduler.check_integrity()
        return printed or ["ok"]

    def do_config(self, positional: list[str], options: dict[str, str]) -> Iterator[str]:
        blocks = [int(word) for word in options["blocks"].split(",")]
        windows = options.get("windows", ",".join("none" for _ in blocks)).split(",")
        groups = tuple(CacheGroup(None if w == "none" else int(w), n) for w, n in zip(windows, blocks, strict=True))
        self.scheduler = Scheduler(
            SchedulerConfig(
                groups,
                block_size=int(options["block_size"]),
                max_num_sequences=int(options.get("seqs", 4)),
                max_num_tokens=int(options.get("tokens", 16)),
                max_context=int(options.get("context", 64)),
                max_waiting=int(options.get("waiting", 8)),
                admission=options.get("admission", "continuous"),  # type: ignore[arg-type]
                reservation=options.get("reservation", "paged"),  # type: ignore[arg-type]
            )
        )
        self.in_flight, self.now = None, 0.0
        yield from ()

    def do_add(self, positional: list[str], options: dict[str, str]) -> Iterator[str]:
        assert self.scheduler is not None
        sampling = SamplingParams(
            max_tokens=int(options.get("max_tokens", 4)),
            min_tokens=int(options.get("min_tokens", 0)),
            eos_token_ids=parse_ids(options.get("eos", "")),
            stop_token_ids=parse_ids(options.get("stop", "")),
            prompt_logprobs=0 if "prompt_logprobs" in positional else None,
        )
        prompt, output = parse_ids(options["prompt"]), parse_ids(options.get("output", ""))
        diagnostics = Diagnostics(
            max_chunk=int(options.get("max_chunk", 0)),
            preempt_at=int(options["preempt_at"]) if "preempt_at" in options else None,
        )
        priority = int(options.get("priority", 0))
        request = SequenceRequest(positional[0], prompt, sampling, output, priority, diagnostics)
        try:
            self.scheduler.add(request, self.now)
        except MoestroError as error:
            yield f"{type(error).__name__}: {error}"

    def do_cancel(self, positional: list[str], options: dict[str, str]) -> Iterator[str]:
        assert self.scheduler is not None
        yield "cancelled" if self.scheduler.cancel(positional[0]) else "no such sequence"

    def do_plan(self, positional: list[str], options: dict[str, str]) -> Iterator[str]:
        assert self.scheduler is not None
        self.in_flight = plan = self.scheduler.plan(self.now)
        yield f"{plan.num_tokens} tokens, {plan.num_decodes} spans of one token"
        for span in plan.spans:
            yield f"  {show_span(span)}"

    def do_apply(self, positional: list[str], options: dict[str, str]) -> Iterator[str]:
        assert self.scheduler is not None
        assert self.in_flight is not None
        self.now += 1.0
        sampled, logprobs = {}, {}
        for sequence, start, length, samples in self.in_flight.spans:
            name = sequence.sequence_id
            if options.get(name) == "error":
                sampled[name] = SampledToken(0, error="logits are not finite")
            elif samples:
                sampled[name] = SampledToken(int(options.get(name, 100 + sequence.num_output)))
            if sequence.wants_prompt_logprobs:
                following = sequence.token_ids[start + 1 : min(start + length + 1, sequence.num_prompt)]
                logprobs[name] = [TokenLogprobs(token, -1.0) for token in following]
        for delta in self.scheduler.apply(self.in_flight, sampled, self.now, logprobs):
            yield show_delta(delta)

    def do_abandon(self, positional: list[str], options: dict[str, str]) -> Iterator[str]:
        assert self.scheduler is not None
        assert self.in_flight is not None
        self.scheduler.abandon(self.in_flight)
        yield from ()

    def do_step(self, positional: list[str], options: dict[str, str]) -> Iterator[str]:
        for _ in range(int(positional[0]) if positional else 1):
            yield from self.do_plan([], {})
            yield from self.do_apply([], options)

    def do_state(self, positional: list[str], options: dict[str, str]) -> Iterator[str]:
        assert self.scheduler is not None
        for state, queue in (("running", self.scheduler._running), ("waiting", self.scheduler._waiting)):
            for sequence in queue:
                yield f"{state} {show_state(sequence)}"
        load = self.scheduler.load()
        yield f"blocks {load.kv_blocks_used} of {load.kv_blocks_total} used"


def parse_ids(text: str) -> tuple[int, ...]:
    """``1..4,9`` is 1, 2, 3, 4, 9."""
    ids: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("..")
        ids.extend(range(int(first), int(last or first) + 1))
    return tuple(ids)


def show_blocks(sequence: SequenceState) -> str:
    return " ".join("[" + " ".join(map(str, table)) + "]" for table in sequence.block_tables)


def show_span(span: Span) -> str:
    sequence, start, length, samples = span
    end = "samples" if samples else f"of {len(sequence.token_ids)}"
    return f"{sequence.sequence_id} {start}..{start + length - 1} {end}, blocks {show_blocks(sequence)}"


def show_state(sequence: SequenceState) -> str:
    known = f"{sequence.num_computed} of {len(sequence.token_ids)} computed"
    return f"{sequence.sequence_id}: {known}, blocks {show_blocks(sequence)}"


def show_delta(delta: SequenceDelta) -> str:
    words = [delta.sequence_id, *(f"+{token}" for token in delta.token_ids)]
    if delta.prompt_logprobs is not None:
        words.append("prompt:" + ",".join("-" if p is None else str(p.token_id) for p in delta.prompt_logprobs))
    if delta.finish_reason is not None:
        words.append(f"ends: {delta.finish_reason.value}{f' ({delta.error})' if delta.error else ''}")
    if delta.ledger is not None:
        times = f"queued {delta.ledger.queued_s:g} s, prefill {delta.ledger.prefill_s:g} s"
        counts = f"{delta.ledger.num_cached_tokens} cached, {delta.ledger.num_preemptions} preempted"
        words.append(f"[{times}, decode {delta.ledger.decode_s:g} s, {counts}, {delta.ledger.num_steps} steps]")
    return " ".join(words)


def replay(text: str) -> str:
    """The transcript with the output that its commands print now."""
    driver, out, lines = Driver(), [], iter(text.splitlines())
    for line in lines:
        out.append(line)
        if not line or line.startswith("#"):
            continue
        for old in lines:  # what was printed before, up to the blank line
            if not old:
                break
        out.extend(["----", *driver.run(line), ""])
    return "\n".join(out).rstrip("\n") + "\n"


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    expected = path.read_text()
    actual = replay(expected)
    if REWRITE:
        path.write_text(actual)
    else:
        assert actual == expected


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) >= 8
