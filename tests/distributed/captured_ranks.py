"""What each rank does in test_captured: runs in processes of its own."""

from __future__ import annotations

import torch
from tests.captured.test_captured_runner import config_of

from moestro.kernels.plain import PlainBackend
from moestro.protos.sequences import EngineLimits, SamplingParams, SequenceRequest
from moestro.router.assign import lay_out
from moestro.router.expert_parallel import all_here, over_group
from moestro.router.mesh import Mesh, StoreAddress, join
from moestro.router.parallel import GroupShape, NoTensorParallel
from moestro.router.placement import Placement
from moestro.router.transports.choose import Problem, choose_transport
from moestro.workers.captured.graph import Called
from moestro.workers.captured.runner import capture_runner
from moestro.workers.captured.sizes import GraphSizes, graph_sizes
from moestro.workers.engine import Engine
from moestro.workers.loading import RandomSource
from moestro.workers.model.decoder import Decoder, build_decoder
from moestro.workers.model.moe import expert_fill
from moestro.workers.runner import Runner
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig

CPU = torch.device("cpu")
BLOCK, CONTEXT, LARGEST = 8, 64, 8
Told = dict[str, list[int]]


def prompts(rank: int) -> list[tuple[int, str, tuple[int, ...]]]:
    """(step of arrival, name, prompt): rank 1 is idle at first, and both take prompts while the other decodes."""
    first = [(0, "a", (5, 6, 7)), (0, "b", (9,)), (6, "c", (11, 12, 13, 14, 15, 16, 17))]
    second = [(4, "d", (21, 22, 23)), (9, "e", tuple(range(30, 50)))]
    return (first, second)[rank]


def source() -> RandomSource:
    return RandomSource(torch.bfloat16, CPU, PlainBackend(), 5, 0.1)


def engine_of(decoder: Decoder, sizes: GraphSizes, num_ranks: int) -> Engine:
    num_blocks = 8 * CONTEXT // BLOCK + 1
    groups = tuple(CacheGroup(window, num_blocks) for window in decoder.cache_spec.windows)
    config = SchedulerConfig(groups, BLOCK, max_num_sequences=6, max_num_tokens=24, max_context=CONTEXT)
    runner = Runner(decoder, decoder.cache_spec.allocate(num_blocks + 1, BLOCK), CPU)
    limits = EngineLimits(decoder.config.vocab_size, CONTEXT, 100)
    if not sizes.rows:
        return Engine(Scheduler(config), runner, limits)
    return Engine(
        Scheduler(config), capture_runner(runner, decoder, sizes, CONTEXT // BLOCK, num_ranks, Called), limits
    )


def add(engine: Engine, rank: int, step: int) -> None:
    for at, name, prompt in prompts(rank):
        if at == step:
            sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
            assert engine.add(SequenceRequest(name, prompt, sampling), 0.0) is None


def alone(rank: int) -> Told:
    """The same requests on one rank that holds everything, eagerly."""
    config = config_of("qwen3_moe")
    decoder = build_decoder(config, source(), NoTensorParallel(), all_here(config.num_experts, config.num_moe_layers))
    engine, told = engine_of(decoder, GraphSizes(()), 1), {}
    for step in range(60):
        add(engine, rank, step)
        for delta in engine.step(lambda: 0.0):
            told.setdefault(delta.sequence_id, []).extend(delta.token_ids)
    return told


def serve(rank: int, world_size: int, address: StoreAddress, dp: int, tp: int) -> list[object]:
    """Tokens, steps that were replayed, steps computed eagerly beside a replay of another rank, rows of each slot."""
    torch.set_num_threads(1)
    shape = GroupShape(dp, tp)
    with join(shape, rank, address.connect(30), timeout_s=30) as mesh:
        config = config_of("qwen3_moe")
        num = config.num_experts
        before = placed(num, world_size, 0)
        parallel = over_group(mesh, (before,) * config.num_moe_layers, captured_tokens=LARGEST)
        problem = Problem((LARGEST,) * world_size, config.top_k, config.hidden_size, torch.bfloat16, before.capacity)
        assert choose_transport(problem, parallel.transport.deployment).kind == "fixed_capacity"
        decoder = build_decoder(config, source(), mesh.tp, parallel)
        engine = engine_of(decoder, graph_sizes(LARGEST, shape), world_size)
        return [*drive(mesh, engine, decoder, placed(num, world_size, 3)), alone(shape.dp_rank(rank))]


def placed(num: int, ranks: int, turn: int) -> Placement:
    """Experts in turn over the ranks, and behind them as spare ones those of the next rank."""
    each = num // ranks
    order = [(expert + turn) % num for expert in range(num)]
    dealt = [tuple(order[r * each : (r + 1) * each]) for r in range(ranks)]
    return Placement(num, tuple(own + dealt[(r + 1) % ranks][:1] for r, own in enumerate(dealt)))


def drive(mesh: Mesh, engine: Engine, decoder: Decoder, after: Placement) -> list[object]:
    told: Told = {}
    replayed = beside = tokens = 0
    for step in range(60):
        add(engine, mesh.shape.dp_rank(mesh.rank), step)
        plan = engine.plan(0.0)
        everyone = tuple(mesh.control.all_gather(torch.tensor([plan.num_tokens])).flatten().tolist())
        if step == 12:
            switch(decoder, mesh.rank, after)
        if not any(everyone):
            engine.skip(plan, 0.0)
            continue
        launched = engine.launch(plan, everyone)
        is_replayed = type(launched).__name__ == "_Replayed"
        for delta in engine.collect(plan, launched, lambda: 0.0):
            assert not delta.error, delta.error
            told.setdefault(delta.sequence_id, []).extend(delta.token_ids)
        kinds = mesh.control.all_gather(torch.tensor([is_replayed])).flatten().tolist()
        replayed += is_replayed
        beside += not is_replayed and any(kinds)
        tokens += plan.num_tokens
    rows = [int(bank.rows_L.sum()) for bank in decoder.banks.values()]
    return [told, replayed, beside, tokens, rows]


def switch(decoder: Decoder, rank: int, after: Placement) -> None:
    for bank in decoder.banks.values():
        fills = [(slot, expert_fill(source(), bank.prefix, expert)) for slot, expert in enumerate(after.slots[rank])]
        bank.switch_(lay_out(after, rank, CPU), {slot: bank.experts.stage(fill) for slot, fill in fills})
