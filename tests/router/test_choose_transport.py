"""Which transport is taken, and the reasons that are given: hand-written cases and properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.protos.errors import ConfigError
from moestro.router.transports.choose import KINDS, Deployment, Problem, choose_transport, num_parts

SMALL = Problem((16, 16, 16, 16), 4, 512, torch.bfloat16, 4)
LARGE = replace(SMALL, num_tokens_N=(4096, 4096, 4096, 4096))
GLOO = Deployment()
ONE_HOST = Deployment(board_bytes=2**20)
NCCL = Deployment("cuda", frozenset({"gloo", "nccl"}))
WITH_DEEP_EP = replace(NCCL, deep_ep=True, deep_ep_tokens=64, asked_for="deep_ep")
FITS_DEEP_EP = Problem((1, 64), 4, 4096, torch.bfloat16, 8)


@pytest.mark.parametrize(
    ("problem", "deployment", "kind", "reason"),
    [
        (replace(SMALL, num_tokens_N=(4,)), GLOO, "local", "one rank holds every slot"),
        (SMALL, ONE_HOST, "shared_memory", "the ranks share the memory of one host"),
        (LARGE, ONE_HOST, "all_to_all", "a gather brings a rank some 5308416 bytes too many"),
        (SMALL, GLOO, "gather_scatter", "a gather brings a rank some 20736 bytes too many"),
        (LARGE, GLOO, "all_to_all", "a gather brings a rank some 5308416 bytes too many"),
        (replace(SMALL, num_tokens_N=(0, 0)), GLOO, "gather_scatter", "some 0 bytes"),
        (SMALL, replace(NCCL, captured_tokens=16), "fixed_capacity", "the step may be captured"),
        (SMALL, replace(NCCL, captured_tokens=15), "gather_scatter", "an exchange of counts is worth"),
        (LARGE, replace(GLOO, asked_for="gather_scatter"), "gather_scatter", "it was asked for"),
        (FITS_DEEP_EP, WITH_DEEP_EP, "deep_ep", "it was asked for"),
        (FITS_DEEP_EP, replace(WITH_DEEP_EP, asked_for=None), "gather_scatter", "an exchange of counts is worth"),
    ],
)
def test_what_is_taken_and_why(problem: Problem, deployment: Deployment, kind: str, reason: str) -> None:
    choice = choose_transport(problem, deployment)
    assert choice.kind == kind
    assert reason in choice.reason
    print(choice)


@pytest.mark.parametrize(
    ("problem", "deployment", "reason"),
    [
        (SMALL, replace(GLOO, asked_for="local"), "the slots lie on 4 ranks"),
        (SMALL, replace(GLOO, asked_for="deep_ep"), "deep_ep is not installed"),
        (
            SMALL,
            Deployment(asked_for="shared_memory", no_board="rank 1: no compiler"),
            "there is no board: rank 1: no com",
        ),
        (
            LARGE,
            replace(ONE_HOST, asked_for="shared_memory"),
            "a rank's part of the board holds 1048576 bytes, not 16842816",
        ),
        (SMALL, replace(ONE_HOST, device="cuda", asked_for="shared_memory"), "it needs ranks on cpu, not on cuda"),
        (
            replace(SMALL, dtype=torch.float16),
            replace(ONE_HOST, asked_for="shared_memory"),
            "it adds up bfloat16 and float32, not float16",
        ),
        (FITS_DEEP_EP, replace(WITH_DEEP_EP, device="cpu"), "it needs cuda, the ranks are on cpu"),
        (replace(FITS_DEEP_EP, dtype=torch.float32), WITH_DEEP_EP, "it carries bfloat16, not float32"),
        (replace(FITS_DEEP_EP, width=512), WITH_DEEP_EP, "it serves model widths 2048, .*, not 512"),
        (replace(FITS_DEEP_EP, num_tokens_N=(1, 65)), WITH_DEEP_EP, "its buffer holds 64 tokens a rank, not 65"),
        (replace(FITS_DEEP_EP, top_k=8), WITH_DEEP_EP, "its queues hold 508 rows a rank, not 512"),
        (SMALL, replace(NCCL, captured_tokens=16, asked_for="all_to_all"), "it reads sizes back from the device"),
        (SMALL, replace(NCCL, captured_tokens=16, asked_for="gather_scatter"), "it reads sizes back from the device"),
        (SMALL, replace(GLOO, device="cuda", asked_for="all_to_all"), "a group on cuda needs nccl, which is missing"),
    ],
)
def test_what_was_asked_for_and_cannot_serve_is_refused(problem: Problem, deployment: Deployment, reason: str) -> None:
    message = f"transport: {deployment.asked_for} was asked for and cannot serve: {reason}"
    with pytest.raises(ConfigError, match=message):
        choose_transport(problem, deployment)


def test_where_none_can_serve_each_says_why() -> None:
    with pytest.raises(ConfigError, match=r"none can serve: local: the slots lie on 4 ranks; .*; gather_scatter.*nccl"):
        choose_transport(SMALL, replace(NCCL, backends=frozenset()))


PROBLEMS = st.builds(
    Problem,
    st.lists(st.integers(0, 5000), min_size=1, max_size=9).map(tuple),
    st.integers(1, 16),
    st.sampled_from((64, 512, 4096)),
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.integers(1, 64),
)
DEPLOYMENTS = st.builds(
    Deployment,
    st.sampled_from(("cpu", "cuda")),
    st.sampled_from((frozenset({"gloo"}), frozenset({"gloo", "nccl"}))),
    st.integers(0, 200),
    st.sampled_from((0, 2**16, 2**24)),
    st.just("no reason"),
    st.booleans(),
    st.integers(0, 200),
    st.sampled_from((None, *KINDS)),
)


@given(PROBLEMS, DEPLOYMENTS)
def test_every_choice_is_explained_and_replaces_nothing_asked_for(problem: Problem, deployment: Deployment) -> None:
    try:
        choice = choose_transport(problem, deployment)
    except ConfigError:  # the tests above say when
        return
    assert deployment.asked_for in (None, choice.kind)
    assert {choice.kind, *choice.others} == set(KINDS)
    reasons = [choice.reason, *choice.others.values()]
    assert all(reason and "\n" not in reason for reason in reasons)
    is_captured = 0 < max(problem.num_tokens_N) <= deployment.captured_tokens
    assert not (is_captured and choice.kind in ("all_to_all", "gather_scatter", "shared_memory"))


@given(PROBLEMS, st.integers(0, 5000))
def test_what_is_gathered_when_large_is_gathered_when_small(problem: Problem, fewer: int) -> None:
    """Over a group, fewer tokens never make a gather less worth it."""
    least = replace(problem, num_tokens_N=tuple(max(0, n - fewer) for n in problem.num_tokens_N))
    if choose_transport(problem, GLOO).kind == "gather_scatter":
        assert choose_transport(least, GLOO).kind == "gather_scatter"


def test_halves_where_the_busiest_rank_has_tokens_enough() -> None:
    assert num_parts((100, 3), GLOO) == 1
    assert num_parts((100, 3), Deployment(two_batches_from=101)) == 1
    assert num_parts((100, 3), Deployment(two_batches_from=100)) == 2
    assert num_parts((1, 0), Deployment(two_batches_from=0)) == 1
    assert num_parts((100, 3), Deployment(two_batches_from=2, asked_for="deep_ep")) == 1
