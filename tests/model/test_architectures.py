"""The table of architectures against transformers' config classes: defaults, old names, layer types."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from benchmarks.small_models import MODELS, make_model

from moestro.kernels.gate import GateSpec, GroupSpec, Score
from moestro.workers.architectures import ARCHITECTURES, parse_config
from moestro.workers.model.weights import tensor_shapes
from moestro.workers.model_config import DenseSpec, MoeSpec, SharedSpec

SIZES = {
    "vocab_size": 50,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "n_routed_experts": 6,
    "n_shared_experts": 3,
}


def minimal(family: str) -> dict[str, object]:
    """Only what has no default worth the name."""
    experts = "num_local_experts" if family == "Mixtral" else "num_experts"
    return {"architectures": [f"{family}ForCausalLM"], experts: 6, **SIZES}


def through_transformers(raw: dict[str, object]) -> dict[str, object]:
    """The same config after transformers has filled in its class's defaults."""
    family = str(raw["architectures"][0]).removesuffix("ForCausalLM")
    fields = {name: value for name, value in raw.items() if name != "architectures"}
    return getattr(transformers, f"{family}Config")(**fields).to_dict() | {"architectures": raw["architectures"]}


def test_the_table_has_a_row_for_every_model_of_these_tests():
    assert {f"{family}ForCausalLM" for family, _ in MODELS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("family", [family for family, _ in MODELS.values()])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_sliding_window": True, "sliding_window": 16},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 5},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-4, "eos_token_id": [3, 7]},
        {"norm_topk_prob": True, "decoder_sparse_step": 3, "mlp_only_layers": [2, 5]},
        {"rope_theta": 77.0},
        {"first_k_dense_replace": 3, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5},
        {"n_group": 3, "topk_group": 3, "norm_topk_prob": False, "use_qk_norm": True, "attention_bias": True},
        {"sliding_window": None, "max_window_layers": 5},
    ],
)
def test_absent_fields_mean_what_transformers_makes_of_them(family, options):
    raw = minimal(family) | options
    full = parse_config(through_transformers(raw))
    ours = parse_config(raw)
    # A token id is not a matter of the architecture: absent means none.
    assert replace(ours, eos_token_ids=()) == replace(full, eos_token_ids=())
    if "eos_token_id" in options:
        assert ours.eos_token_ids == full.eos_token_ids == (3, 7)


def test_cache_groups_come_in_the_order_of_the_layers():
    raw = minimal("Qwen2Moe") | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}
    config = parse_config(raw)
    assert config.windows == (16, None)
    assert [layer.attention.window for layer in config.layers][:5] == [16, None, 16, None, None]
    assert parse_config(minimal("Llama")).windows == (None,)


def test_a_gate_with_groups_and_one_where_they_leave_nothing_out():
    raw = minimal("Glm4Moe") | {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5}
    dense, moe = (layer.mlp for layer in parse_config(raw).layers[:2])
    assert dense == DenseSpec(48)
    assert moe == MoeSpec(
        GateSpec(6, 2, True, Score.SIGMOID, True, GroupSpec(3, 2), scaling=2.5, fp32_logits=True),
        width=24,
        shared=SharedSpec(3 * 24, gated=False),
    )
    (whole,) = {layer.mlp for layer in parse_config(raw | {"topk_group": 3}).layers[1:]}
    assert whole == replace(moe, gate=replace(moe.gate, groups=None))


@pytest.mark.parametrize(("style", "want"), [({}, 32), ({"partial_rotary_factor": 0.25}, 16)])
def test_part_of_a_head_is_rotated(style, want):
    raw = minimal("Glm4Moe") | {"head_dim": 64}
    new = raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0} | style}
    for config in (raw | style, new, through_transformers(raw | style)):
        assert parse_config(config).rope.rotary_dim == want


def test_counts_of_experts():
    config = parse_config(minimal("Qwen3Moe") | {"decoder_sparse_step": 2})
    assert (config.num_experts, config.num_moe_layers) == (6, 16)
    assert not isinstance(config.layers[0].mlp, MoeSpec)
    dense = parse_config(minimal("Llama"))
    assert (dense.num_experts, dense.num_moe_layers) == (0, 0)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_add_up_to_transformers_parameters(name):
    model = make_model(name)
    config = parse_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
    ours = sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert ours == sum(tensor.numel() for tensor in [*model.parameters(), *biases])
