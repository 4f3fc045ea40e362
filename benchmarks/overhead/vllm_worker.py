"""vLLM v1's scheduler under the load of ``load.py``; runs in vLLM's own environment and imports nothing of ours.

Reads one JSON object a line, {"running": N, "steps": n}, and answers with the medians of n steps in microseconds of the
thread's CPU time: {"schedule", "update", "step"}. The scheduler is built as vLLM's engine core builds it, with its
defaults but for the bounds: prefix caching on, block hashes by vLLM's default function, statistics off. What the model
runner would return is made outside of what is timed, and the heap is frozen as vLLM's engine core does.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
from time import thread_time_ns

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
answers = os.fdopen(os.dup(1), "w")  # vLLM may print; what it prints goes to stderr
os.dup2(2, 1)

import torch  # noqa: E402
import vllm  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import get_hash_fn_by_name  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: E402
from vllm.v1.outputs import ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

BLOCK_SIZE = 16
PROMPT_TOKENS = 100
CONTEXT = 4096
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 65536,
    "max_position_embeddings": CONTEXT,
    "torch_dtype": "bfloat16",
}


def filled(folder: str, running: int, steps: int) -> Scheduler:
    """All prompts are taken in by one step."""
    arguments = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=CONTEXT,
        max_num_seqs=running,
        max_num_batched_tokens=max(CONTEXT, running * (PROMPT_TOKENS + BLOCK_SIZE)),
        block_size=BLOCK_SIZE,
        enable_prefix_caching=True,
        async_scheduling=False,
    )
    config = arguments.create_engine_config()
    num_blocks = 1 + 2 * running * ((PROMPT_TOKENS + BLOCK_SIZE + steps) // BLOCK_SIZE + 2)
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=16, dtype=torch.bfloat16)
    cache = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    scheduler = Scheduler(config, cache, StructuredOutputManager(config), block_size=BLOCK_SIZE)
    hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(hash_function)
    hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
    for number in range(running):
        sampling = SamplingParams(temperature=0.0, max_tokens=CONTEXT, ignore_eos=True)
        prompt = list(range(number, number + PROMPT_TOKENS + number % BLOCK_SIZE))
        scheduler.add_request(Request(str(number), prompt, sampling, None, block_hasher=hasher))
    return scheduler


def measure(folder: str, running: int, steps: int) -> dict[str, float]:
    scheduler = filled(folder, running, steps)
    gc.collect()
    gc.freeze()
    schedules, updates = [], []
    for _ in range(steps + 1):
        start = thread_time_ns()
        plan = scheduler.schedule()
        schedules.append(thread_time_ns() - start)
        names = list(plan.num_scheduled_tokens)
        assert len(names) == running, f"{len(names)} of {running} were scheduled"
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[7] for _ in names],
        )
        start = thread_time_ns()
        outputs = scheduler.update_from_output(plan, result)
        updates.append(thread_time_ns() - start)
        assert len(outputs[0].outputs) == running
    gc.unfreeze()
    both = [schedule + update for schedule, update in zip(schedules, updates, strict=True)]
    parts = {"schedule": schedules, "update": updates, "step": both}
    # The first step took the prompts in.
    return {part: statistics.median(times[1:]) / 1e3 for part, times in parts.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/config.json", "w") as file:
            json.dump(MODEL, file)
        print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
        for line in sys.stdin:
            question = json.loads(line)
            print(json.dumps(measure(folder, question["running"], question["steps"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
