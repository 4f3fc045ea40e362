"""Requests depend on the seed and their number alone; traces and objectives are read strictly."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cluster.bench.arrivals import Extent, OpenLoop, arrival_times
from moestro.cluster.bench.lengths import parse_lengths
from moestro.cluster.bench.seeds import round_seed
from moestro.cluster.bench.slo import Slo, parse_slo
from moestro.cluster.bench.trace import parse_trace
from moestro.cluster.bench.workload import RandomPrompts, TextPrompts, Workload, check_context, sample_lengths
from moestro.protos.errors import ConfigError

GOLDEN = ((45, 23, 1, 36), 16, 35, 5578743731182594264)
GOLDEN_ARRIVALS = (0.596173088, 1.266413344, 1.692200571)
GOLDEN_ROUND = 7764645870245362157
OUTPUT = parse_lengths("--output", "lognormal:mean=30,cv=1")


def random_workload(seed: int, spec: str = "uniform:min=1,max=40", vocab_size: int = 50) -> Workload:
    return Workload(seed, RandomPrompts(parse_lengths("--input", spec), vocab_size), OUTPUT)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**63 - 1), order=st.permutations(range(8)))
def test_a_request_does_not_depend_on_those_before(seed, order):
    workload = random_workload(seed)
    straight = [workload.request(i) for i in range(8)]
    assert {i: random_workload(seed).request(i) for i in order} == dict(enumerate(straight))
    assert all(0 <= token < 50 for r in straight for token in r.prompt)
    assert all(r.input_tokens == len(r.prompt) for r in straight)


def test_workloads_recorded_before_stay_what_they_were():
    """Golden: a saved report names a seed, and that seed must keep meaning the same requests. A change here (ours or
    numpy's) makes saved reports incomparable, and needs a new report format."""
    r = random_workload(7).request(3)
    assert (r.prompt[:4], r.input_tokens, r.output_tokens, r.seed) == GOLDEN
    assert arrival_times(OpenLoop(2.0), Extent(3), 7) == pytest.approx(GOLDEN_ARRIVALS)
    assert round_seed(7, 1) == GOLDEN_ROUND


def test_seeds_and_numbers_tell_requests_apart():
    prompts = {random_workload(seed, "64").request(i).prompt for seed in range(5) for i in range(20)}
    assert len(prompts) == 100
    assert len({random_workload(0).request(i).seed for i in range(100)}) == 100


def test_prompt_lengths_leave_the_output_lengths_alone():
    short, long = random_workload(3, "5"), random_workload(3, "lognormal:mean=90,cv=1")
    assert [short.request(i).output_tokens for i in range(50)] == [long.request(i).output_tokens for i in range(50)]


def test_sampled_lengths_are_those_of_the_workload():
    assert sample_lengths(OUTPUT, 50, 3) == tuple(random_workload(3).request(i).output_tokens for i in range(50))


def test_rounds_have_seeds_of_their_own_and_round_zero_keeps_the_seed():
    seeds = [round_seed(11, i) for i in range(100)]
    assert seeds[0] == 11
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [round_seed(11, i) for i in range(100)]
    assert not set(seeds[1:]) & {round_seed(12, i) for i in range(100)}


@pytest.mark.parametrize("seed", [0, 1])
def test_text_prompts_all_come_before_any_comes_again(seed):
    lines = tuple(f"line {i}" for i in range(7))
    workload = Workload(seed, TextPrompts(lines), OUTPUT)
    got = [workload.request(i).prompt for i in range(21)]
    for start in (0, 7, 14):
        assert sorted(got[start : start + 7]) == sorted(lines)
    assert got != list(lines) * 3
    assert workload.request(0).input_tokens is None


def test_lengths_of_a_trace_come_in_its_order_and_again():
    workload = Workload(0, RandomPrompts((3, 5), 10), (7, 9))
    assert [(r.input_tokens, r.output_tokens) for r in map(workload.request, range(4))] == [(3, 7), (5, 9)] * 2


def test_a_request_beyond_the_context_is_named():
    requests = tuple(Workload(0, RandomPrompts((10, 30), 9), (5, 6)).request(i) for i in range(2))
    check_context(requests, 36)
    with pytest.raises(ConfigError, match=r"context of 35 tokens together, got 30 \+ 6 in request 1"):
        check_context(requests, 35)


def row(input_tokens: object, output_tokens: object, arrival_s: object = None, **more: object) -> str:
    arrival = {} if arrival_s is None else {"arrival_s": arrival_s}
    return json.dumps({"input_tokens": input_tokens, "output_tokens": output_tokens, **arrival, **more})


def test_trace_with_and_without_arrivals():
    trace = parse_trace("--trace", [row(5, 2, 0), "", row(6, 1, 0.5, user="x")])
    assert (trace.input_tokens, trace.output_tokens, trace.arrivals_s) == ((5, 6), (2, 1), (0.0, 0.5))
    assert parse_trace("--trace", [row(1, 1)]).arrivals_s is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "--trace must hold at least one request"),
        (["{"], "--trace line 1: not JSON"),
        (["[1]"], r"--trace line 1: must be a JSON object, got '\[1\]'"),
        (['{"input_tokens": 1}'], "line 1: output_tokens must be a whole number of at least 1, got None"),
        ([row(0, 1)], "line 1: input_tokens .* got 0"),
        ([row(True, 1)], "line 1: input_tokens .* got True"),
        ([row(1, 1, -1)], "arrival_s must be a number of at least 0 .* got -1"),
        ([row(1, 1, 2), "", row(1, 1, 1)], "line 3: arrival_s must be a number of at least 2"),
        ([row(1, 1), row(1, 1, 1)], "line 2: arrival_s must be on every line or on none"),
        ([row(1, 1, 1), row(1, 1)], "line 2: arrival_s must be on every line or on none"),
        ([row(1, 1, math.nan)], "arrival_s .* got nan"),
    ],
)
def test_bad_traces_are_named(lines, message):
    with pytest.raises(ConfigError, match=message):
        parse_trace("--trace", lines)


def test_slo_is_read_with_units_and_holds_at_its_bound():
    slo = parse_slo("--slo", "ttft=500ms, tpot=50ms,e2e=1.5m")
    assert slo == Slo(0.5, 0.05, 90.0)
    assert parse_slo("--slo", str(slo)) == slo
    assert slo.met_by(0.5, 0.05, 90.0)
    assert not slo.met_by(0.501, 0.05, 90.0)
    assert not slo.met_by(0.5, 0.0501, 90.0)
    assert not slo.met_by(0.5, 0.05, 90.1)
    assert slo.met_by(0.5, None, 1.0)
    assert Slo(tpot_s=0.1).met_by(1e9, 0.1, 1e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft=500", "--slo ttft must be a number with a unit of us, ms, s or m .* got '500'"),
        ("ttft=0ms", "--slo ttft must be a finite number above 0, got 0"),
        ("ttft=-1s", "--slo ttft .* got '-1s'"),
        ("latency=1s", "--slo must bound ttft, tpot or e2e, got 'latency'"),
        ("ttft", "--slo must be name=value pairs"),
        ("", "--slo must be name=value pairs"),
        ("ttft=1s,ttft=2s", "--slo gives ttft twice"),
    ],
)
def test_bad_slos_are_named(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_slo("--slo", text)
