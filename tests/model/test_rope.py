"""Every rope variant against transformers: frequencies, logits and greedy tokens."""

from __future__ import annotations

import pytest
import torch
import transformers
from benchmarks.small_models import random_ids
from tests.model.oracle import Driver, greedy, reference_greedy, reference_logits
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moestro.kernels.rotary import rotary_tables, rotate, rotate_reference
from moestro.workers.architectures import parse_config
from moestro.workers.model.rope import make_rope

VARIANTS: dict[str, dict[str, object]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with all options": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "truncate": False,
    },
    "yarn with its own attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
    },
}


def options(variant: str) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": 5000.0, **VARIANTS[variant]}, "max_position_embeddings": 40}


@pytest.mark.parametrize("variant", VARIANTS)
def test_frequencies(pair, variant):
    model, decoder = pair("llama", **options(variant))
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[str(VARIANTS[variant]["rope_type"])](model.config, "cpu")
    torch.testing.assert_close(decoder.rope.inv_freq_h, inv_freq, rtol=1e-6, atol=0)
    assert decoder.rope.scale == pytest.approx(attention_factor, rel=1e-6)


@pytest.mark.parametrize("variant", ["default", *VARIANTS])
def test_a_part_of_each_head(pair, variant):
    spec = {"rope_theta": 5000.0, "partial_rotary_factor": 0.75, "rope_type": "default"} | VARIANTS.get(variant, {})
    model, decoder = pair("glm4_moe", head_dim=16, rope_parameters=spec, max_position_embeddings=40)
    torch.testing.assert_close(decoder.rope.inv_freq_h, model.model.rotary_emb.original_inv_freq, rtol=1e-6, atol=0)
    ids = random_ids(40, seed=7)
    (logits,) = Driver(decoder).step([(0, ids)])
    torch.testing.assert_close(logits, reference_logits(model, ids), rtol=0, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_within_the_first_context(pair, variant):
    model, decoder = pair("llama", **options(variant))
    ids = random_ids(40, seed=5)
    driver = Driver(decoder)
    logits = torch.cat([driver.step([(0, ids[:30])])[0], *(driver.step([(0, [i])])[0] for i in ids[30:])])
    torch.testing.assert_close(logits, reference_logits(model, ids), rtol=0, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_far_beyond_it(pair, variant):
    model, decoder = pair("llama", **options(variant))
    ids = random_ids(25, seed=6)
    assert greedy(Driver(decoder), {0: ids}, 128)[0] == reference_greedy(model, ids, 128)


@pytest.mark.parametrize("length", [40, 41, 100])
def test_dynamic_base_of_the_longest_position_equals_transformers(pair, length):
    model, decoder = pair("llama", **options("dynamic"))
    want, _ = ROPE_INIT_FUNCTIONS["dynamic"](model.config, "cpu", seq_len=length)
    position = length - 1
    torch.testing.assert_close(decoder.rope.angles(torch.tensor([position]))[0], want * position, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", ["default", *VARIANTS])
def test_old_and_new_style_of_config_are_the_same(variant):
    spec = VARIANTS.get(variant, {"rope_type": "default"})
    common = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
    }
    new = parse_config(common | {"rope_parameters": {"rope_theta": 5000.0, **spec}, "dtype": "bfloat16"})
    old_scaling = {("type" if k == "rope_type" else k): v for k, v in spec.items()}
    old = parse_config(common | {"rope_theta": 5000.0, "rope_scaling": old_scaling, "torch_dtype": "bfloat16"})
    assert new == old
    assert new.dtype == torch.bfloat16
    theirs = transformers.LlamaConfig(**{k: v for k, v in common.items() if k != "architectures"})
    assert parse_config(common).rope.theta == theirs.rope_parameters["rope_theta"]


def test_rotation_is_the_complex_product():
    generator = torch.Generator().manual_seed(0)
    x_THD = torch.randn(7, 3, 16, generator=generator)
    config = parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 10,
            "hidden_size": 32,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 40,
        }
    )
    angles_Th = make_rope(config.rope, torch.device("cpu")).angles(torch.tensor([0, 1, 5, 39, 1000, 7, 7]))
    got = rotate(x_THD, *rotary_tables(angles_Th, 1.3))
    torch.testing.assert_close(got, rotate_reference(x_THD, angles_Th, 1.3), rtol=0, atol=1e-5)
