"""What a rank receives and sends survives the wire unchanged."""

from hypothesis import given
from hypothesis import strategies as st

from moestro.protos import wire
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import (
    Diagnostics,
    EngineLimits,
    EngineLoad,
    FinishReason,
    PositionTrace,
    SamplingParams,
    SequenceDelta,
    SequenceLedger,
    SequenceRequest,
    TokenLogprobs,
)

ids = st.integers(0, 2**32 - 1)
id_tuples = st.lists(ids, max_size=5).map(tuple)
floats = st.floats(allow_nan=False)
optional_k = st.none() | st.integers(0, 20)

sampling = st.builds(
    SamplingParams,
    temperature=floats,
    top_k=ids,
    top_p=floats,
    min_p=floats,
    repetition_penalty=floats,
    presence_penalty=floats,
    frequency_penalty=floats,
    logit_bias=st.dictionaries(ids, floats, max_size=3),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=ids,
    min_tokens=ids,
    ignore_eos=st.booleans(),
    eos_token_ids=id_tuples,
    stop_token_ids=id_tuples,
    logprobs=optional_k,
    prompt_logprobs=optional_k,
)
requests = st.builds(
    SequenceRequest,
    sequence_id=st.text(max_size=8),
    prompt_ids=id_tuples,
    sampling=sampling,
    output_ids=id_tuples,
    priority=st.integers(-100, 100),
    diagnostics=st.builds(
        Diagnostics, rank=st.just(""), max_chunk=ids, preempt_at=st.none() | ids, trace=st.booleans()
    ),
)
logprobs = st.builds(
    TokenLogprobs, token_id=ids, logprob=floats, top=st.lists(st.tuples(ids, floats), max_size=3).map(tuple)
)
counts = st.integers(0, 2**32 - 1)
ledgers = st.builds(SequenceLedger, floats, floats, floats, counts, counts, counts)
digests = st.integers(0, 2**64 - 1)
traces = st.lists(st.builds(PositionTrace, ids, st.lists(digests, max_size=3).map(tuple)), max_size=3).map(tuple)
deltas = st.builds(
    SequenceDelta,
    sequence_id=st.text(max_size=8),
    token_ids=id_tuples,
    logprobs=st.lists(logprobs, max_size=3).map(tuple),
    prompt_logprobs=st.none(),
    finish_reason=st.none(),
    error=st.none(),
    ledger=st.none(),
    trace=traces,
)
last_deltas = st.builds(
    SequenceDelta,
    sequence_id=st.text(max_size=8),
    token_ids=id_tuples,
    logprobs=st.lists(logprobs, max_size=3).map(tuple),
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, min_size=1, max_size=3).map(tuple),
    finish_reason=st.sampled_from(FinishReason),
    error=st.none() | st.text(min_size=1, max_size=5),
    ledger=st.none() | ledgers,
    trace=traces,
)


@given(requests)
def test_request(request: SequenceRequest) -> None:
    data = wire.encode_request(request).SerializeToString()
    assert wire.decode_request(pb.Sequence.FromString(data)) == request


@given(deltas | last_deltas)
def test_delta(delta: SequenceDelta) -> None:
    data = wire.encode_delta(delta).SerializeToString()
    assert wire.decode_delta(pb.Delta.FromString(data)) == delta


@given(st.builds(EngineLoad, counts, counts, counts, counts, counts, floats))
def test_load(load: EngineLoad) -> None:
    assert wire.decode_load(wire.encode_load(load)) == load


@given(st.builds(EngineLimits, counts, counts, counts))
def test_limits(limits: EngineLimits) -> None:
    assert wire.decode_limits(wire.encode_limits(limits)) == limits
