"""A whole small model of this backend: close to the plain one, and the same bits however its tokens are fed."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from tests.kernels.cuda.interpreted.attention_cases import CPU
from tests.model.oracle import Driver

from moestro.kernels.backend import Backend
from moestro.kernels.cuda.backend import CudaBackend
from moestro.kernels.plain import PlainBackend
from moestro.router.expert_parallel import all_here
from moestro.router.parallel import NoTensorParallel
from moestro.workers.architectures import parse_config
from moestro.workers.model.decoder import build_decoder

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
}


@dataclass(frozen=True, slots=True)
class RandomSource:
    """Weights that depend on their names alone."""

    backend: Backend
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = CPU

    def read_(self, out, name, row=0, column=0):
        assert (row, column) == (0, 0), "one rank"
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        out.copy_(torch.randn(out.shape, generator=generator) * 0.2 + ("norm" in name))


def driver(backend: Backend) -> Driver:
    config = parse_config(CONFIG)
    experts = all_here(config.num_experts, config.num_moe_layers)
    return Driver(build_decoder(config, RandomSource(backend), NoTensorParallel(), experts))


def fed(backend, ids, sizes, company=()):
    """Logits of all tokens of ``ids``, fed in spans of these sizes beside another sequence's."""
    steps, at, made = [], 0, driver(backend)
    for size in sizes:
        spans = [(7, ids[at : at + size]), *((9, other) for other in company)]
        spans.sort(key=lambda span: len(span[1]) > 1)
        logits = made.step(spans)
        steps.append(logits[next(i for i, (sequence, _) in enumerate(spans) if sequence == 7)])
        at += size
    assert at == len(ids)
    return torch.cat(steps)


def test_close_to_plain_and_the_same_bits_however_it_is_fed():
    ids = torch.randint(64, (11,), generator=torch.Generator().manual_seed(1)).tolist()
    whole_TV = fed(CudaBackend(), ids, [11])
    plain_TV = fed(PlainBackend(), ids, [11])
    assert (whole_TV - plain_TV).norm() < 0.02 * plain_TV.norm()
    assert torch.equal(fed(CudaBackend(), ids, [5, 1, 1, 4], company=[[3, 1, 4, 1]]), whole_TV)
