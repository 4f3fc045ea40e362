"""Every checkpoint that cannot be served is refused, by name of file and tensor and with the reason."""

from __future__ import annotations

import json
import re
import shutil
import struct

import pytest
import torch
from benchmarks.small_models import make_model, save_model
from safetensors.torch import load_file, save_file

from moestro.protos.errors import CheckpointError
from moestro.workers.checkpoint import check_tokenizer, open_checkpoint, read_json
from moestro.workers.loading import load_model
from moestro.workers.safetensors_header import read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TENSOR = "model.layers.1.self_attn.q_proj.weight"


def refused(folder, *parts: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    return message


def resave(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def rewrite_header(path, change) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


# config.json


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"architectures": ["BertModel"]}, ("architectures", "BertModel", "Qwen3MoeForCausalLM")),
        ({"architectures": None}, ("architectures", "None")),
        ({"architectures": "Qwen3MoeForCausalLM"}, ("architectures", "list of strings")),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, ("auto_map", "never")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "not supported yet")),
        ({"hidden_act": "gelu"}, ("hidden_act", "'silu'", "'gelu'")),
        ({"hidden_size": None}, ("hidden_size", "missing")),
        ({"hidden_size": "64"}, ("hidden_size", "integer", "'64'")),
        ({"hidden_size": -1}, ("hidden_size", "at least 1", "-1")),
        ({"num_hidden_layers": True}, ("num_hidden_layers", "integer", "True")),
        ({"rms_norm_eps": float("nan")}, ("rms_norm_eps", "finite", "nan")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "divide", "4", "3")),
        ({"num_experts_per_tok": 9}, ("num_experts_per_tok", "at most", "8", "9")),
        ({"dtype": "int8"}, ("dtype", "bfloat16", "int8")),
        ({"rope_parameters": {"rope_type": "longrope"}}, ("rope_parameters", "rope_type", "longrope")),
        ({"rope_parameters": {"rope_type": "linear"}}, ("rope_parameters", "factor", "missing")),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor",)),
        ({"rope_parameters": [1]}, ("rope_parameters", "object")),
        ({"norm_topk_prob": "yes"}, ("norm_topk_prob", "true or false", "'yes'")),
        ({"head_dim": 23}, ("head_dim", "even", "23")),
    ],
)
def test_a_config_that_cannot_be_served(folder, edit, fields, parts):
    edit(folder / "config.json", **fields)
    refused(folder, "config.json", *parts)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '{"a":' * 100_000])
def test_a_config_that_is_not_a_json_object(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", "JSON")


def test_a_config_in_no_encoding(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    refused(folder, "config.json", "JSON")


def test_no_config_and_no_folder(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json", "missing")
    refused(folder / "nowhere", "no such folder")


def test_layer_types_that_say_something_else(tmp_path, edit):
    save_model(make_model("qwen3"), tmp_path)
    edit(tmp_path / "config.json", use_sliding_window=True, sliding_window=4, layer_types=["full_attention", "linear"])
    refused(tmp_path, "config.json", "layer_types", "layer 1")
    edit(tmp_path / "config.json", layer_types=["full_attention"])
    refused(tmp_path, "config.json", "layer_types", "layer 1")


GROUPS = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"n_group": 5}, ("n_group", "divide", "n_routed_experts 12", "5")),
        ({"topk_group": 5}, ("topk_group", "at most n_group 4", "5")),
        ({"n_group": 12}, ("n_group", "groups of 2 experts", "12")),
        ({"num_experts_per_tok": 7}, ("num_experts_per_tok", "topk_group 2 groups, 6", "7")),
        ({"n_group": 1, "topk_group": 1, "num_experts_per_tok": 13}, ("num_experts_per_tok", "n_routed_experts 12")),
        ({"n_shared_experts": 0}, ("n_shared_experts", "at least 1", "0")),
        ({"routed_scaling_factor": 0}, ("routed_scaling_factor", "above 0", "0")),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, ("partial_rotary_factor", "at most 1", "1.5")),
        ({"rope_parameters": {"partial_rotary_factor": 0.3}}, ("head_dim", "even", "7 of 24")),
        ({"rope_parameters": {"partial_rotary_factor": 0.01}}, ("head_dim", "even", "0 of 24")),
        ({"num_nextn_predict_layers": -1}, ("num_nextn_predict_layers", "at least 0", "-1")),
    ],
)
def test_a_gate_or_rope_that_cannot_be(tmp_path, edit, fields, parts):
    save_model(make_model("glm4_moe"), tmp_path)
    edit(tmp_path / "config.json", **(GROUPS | fields))
    refused(tmp_path, "config.json", *parts)


# tensors


def test_a_missing_tensor(folder):
    resave(folder, lambda tensors: tensors.pop(TENSOR))
    refused(folder, TENSOR, "missing")


def test_an_extra_tensor(folder):
    resave(folder, lambda tensors: tensors.update({"model.layers.2.mlp.gate.weight": torch.zeros(2)}))
    refused(folder, WEIGHTS, "model.layers.2.mlp.gate.weight", "no such tensor")


def test_a_wrong_shape(folder):
    resave(folder, lambda tensors: tensors.update({TENSOR: torch.zeros(64, 96)}))
    refused(folder, WEIGHTS, TENSOR, "(96, 64)", "(64, 96)")


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.float8_e4m3fn])
def test_a_wrong_dtype(folder, dtype):
    resave(folder, lambda tensors: tensors.update({TENSOR: tensors[TENSOR].to(dtype)}))
    refused(folder, WEIGHTS, TENSOR, "dtype", "BF16")


# experts

DOWN = "model.layers.1.mlp.experts.7.down_proj.weight"


def test_a_missing_expert(folder):
    resave(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".1.mlp.experts.7." in name])
    refused(folder, "layer 1 has no expert 7", "model.layers.1.mlp.experts.7.gate_proj.weight", "missing")


def test_a_missing_part_of_an_expert(folder):
    resave(folder, lambda tensors: tensors.pop(DOWN))
    refused(folder, "layer 1 has no expert 7", DOWN, "missing")


def test_a_missing_expert_of_a_mixtral_goes_by_its_own_name(tmp_path):
    save_model(make_model("mixtral"), tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.3.w3.weight"
    resave(tmp_path, lambda tensors: tensors.pop(name))
    refused(tmp_path, "layer 0 has no expert 3", name, "missing")


def test_a_missing_expert_that_the_index_names(sharded):
    shard = json.loads((sharded / INDEX).read_text())["weight_map"][DOWN]
    tensors = load_file(sharded / shard)
    del tensors[DOWN]
    save_file(tensors, sharded / shard)
    refused(sharded, "layer 1 has no expert 7", shard, DOWN, INDEX)


def test_an_expert_in_two_shards(sharded):
    names = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(shard for shard in names.values() if shard != names[DOWN])
    tensors = load_file(sharded / other)
    tensors[DOWN] = load_file(sharded / names[DOWN])[DOWN]
    save_file(tensors, sharded / other)
    refused(sharded, "layer 1 has expert 7 in two files", DOWN, other, names[DOWN])


def test_an_expert_by_itself_and_within_its_layers_tensor(tmp_path):
    save_model(make_model("qwen3_moe"), tmp_path, save_original_format=False)
    resave(tmp_path, lambda tensors: tensors.update({DOWN: torch.zeros(64, 32)}))
    refused(tmp_path, "layer 1 has expert 7 twice", DOWN, "model.layers.1.mlp.experts.down_proj", WEIGHTS)


def test_an_expert_of_a_mixtral_under_both_its_names(tmp_path):
    save_model(make_model("mixtral"), tmp_path)
    theirs, ours = (
        f"model.layers.0.{name}.weight" for name in ("block_sparse_moe.experts.2.w1", "mlp.experts.2.gate_proj")
    )
    resave(tmp_path, lambda tensors: tensors.update({ours: tensors[theirs].clone()}))
    refused(tmp_path, "layer 0 has expert 2 twice", theirs, ours)


def test_an_expert_too_many(folder):
    name = "model.layers.0.mlp.experts.8.up_proj.weight"
    resave(folder, lambda tensors: tensors.update({name: torch.zeros(32, 64)}))
    refused(folder, "layer 0 must have experts 0 to 7, not 8", name)


@pytest.mark.parametrize("num_experts", [7, 9])
def test_a_layers_tensor_of_fewer_experts_or_of_more(tmp_path, num_experts):
    save_model(make_model("qwen3_moe"), tmp_path, save_original_format=False)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    resave(tmp_path, lambda tensors: tensors.update({name: torch.zeros(num_experts, 64, 64)}))
    refused(tmp_path, f"layer 1 has {num_experts} experts, and must have 8", name, f"({num_experts}, 64, 64)")


# files


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1, -1000])
def test_a_truncated_file(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    refused(folder, WEIGHTS, "truncated")


def test_a_file_that_shrinks_after_it_was_checked(folder):
    checkpoint = open_checkpoint(folder)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1000])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: the file is another than when it was checked"):
        load_model(checkpoint)


def test_bytes_that_belong_to_no_tensor(folder):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    refused(folder, WEIGHTS, "4 bytes at its end")


@pytest.mark.parametrize("length", [2**63, 10**8 + 1, 2**64 - 1])
def test_an_absurd_header_length(folder, length):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])
    refused(folder, WEIGHTS, "header", str(length))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda h: b"not json", ("not JSON",)),
        (lambda h: b"\xff\xff", ("not JSON",)),
        (lambda h: b"[1, 2]", ("JSON object",)),
        (lambda h: b"[" * 200_000, ("not JSON",)),
        (lambda h: json.dumps(h).encode().replace(b'"lm_head.weight"', f'"{TENSOR}"'.encode()), (TENSOR, "twice")),
        (lambda h: h[TENSOR].update(data_offsets=h["lm_head.weight"]["data_offsets"]), (TENSOR, "bytes")),
        (lambda h: h[TENSOR].update(data_offsets=[-4, 4]), (TENSOR, "data_offsets")),
        (lambda h: h[TENSOR].update(data_offsets=[8, 4]), (TENSOR, "data_offsets")),
        (lambda h: h[TENSOR].update(data_offsets=[0.5, 4]), (TENSOR, "data_offsets")),
        (lambda h: h[TENSOR].update(data_offsets=None), (TENSOR, "data_offsets")),
        (lambda h: h[TENSOR].update(shape=[96, -64]), (TENSOR, "shape")),
        (lambda h: h[TENSOR].update(shape=[2**62, 2**62]), (TENSOR, "bytes")),
        (lambda h: h[TENSOR].update(shape="96"), (TENSOR, "shape")),
        (lambda h: h[TENSOR].update(dtype="F4096"), (TENSOR, "dtype", "F4096")),
        (lambda h: h[TENSOR].update(dtype=7), (TENSOR, "dtype")),
        (lambda h: h.update({TENSOR: 3}), (TENSOR, "object")),
        (lambda h: h.pop(TENSOR) and None, ("belong to no tensor",)),
    ],
)
def test_a_lying_header(folder, change, parts):
    def changed(header):
        text = change(header)
        return text if isinstance(text, bytes) else None

    rewrite_header(folder / WEIGHTS, changed)
    refused(folder, WEIGHTS, *parts)


def test_offsets_that_overlap_or_leave_the_file(folder):
    def shift(by):
        def change(header):
            begin, end = header[TENSOR]["data_offsets"]
            header[TENSOR]["data_offsets"] = [begin + by, end + by]

        return change

    original = (folder / WEIGHTS).read_bytes()
    rewrite_header(folder / WEIGHTS, shift(-8))
    refused(folder, WEIGHTS, TENSOR, "overlaps")
    (folder / WEIGHTS).write_bytes(original)
    rewrite_header(folder / WEIGHTS, shift(10**9))
    refused(folder, WEIGHTS, "belong to no tensor")


def test_headers_read_as_the_formats_own_library_reads_them(folder):
    tensors = load_file(folder / WEIGHTS)
    infos = read_header(folder / WEIGHTS)
    assert infos.keys() == tensors.keys()
    data = (folder / WEIGHTS).read_bytes()
    for name, info in infos.items():
        assert info.shape == tuple(tensors[name].shape)
        assert data[info.offset : info.offset + info.num_bytes] == tensors[name].numpy().tobytes()


# shards


def test_a_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, shard.name, "missing", INDEX)


def change_map(folder, change) -> None:
    raw = json.loads((folder / INDEX).read_text())
    change(raw["weight_map"])
    (folder / INDEX).write_text(json.dumps(raw))


def test_an_index_that_names_a_tensor_nobody_has(sharded):
    change_map(sharded, lambda names: names.update({"model.extra": names[TENSOR]}))
    refused(sharded, "model.extra", "not in this file")


def test_an_index_that_names_the_wrong_shard(sharded):
    def change(names):
        names[TENSOR] = next(shard for shard in names.values() if shard != names[TENSOR])

    change_map(sharded, change)
    refused(sharded, TENSOR, "not in this file")


def test_a_tensor_that_the_index_leaves_out(sharded):
    change_map(sharded, lambda names: names.pop(TENSOR))
    refused(sharded, TENSOR, INDEX, "does not name it")


def test_a_tensor_in_two_shards(sharded):
    names = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(shard for shard in names.values() if shard != names[TENSOR])
    tensors = load_file(sharded / other)
    tensors[TENSOR] = load_file(sharded / names[TENSOR])[TENSOR]
    save_file(tensors, sharded / other)
    refused(sharded, TENSOR, other, names[TENSOR])


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", ".hidden.safetensors", "w.bin", 3, None],
)
def test_a_shard_name_that_leaves_the_folder_or_is_no_safetensors(sharded, shard):
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "model.safetensors")
    change_map(sharded, lambda names: names.update({TENSOR: shard}))
    refused(sharded, INDEX, "shard")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_unreadable_index(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


# other weights, other files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_only_pickled_weights(folder, name):
    (folder / WEIGHTS).rename(folder / name)
    message = refused(folder, name, "pickle is never read")
    assert not re.search(r"trust|allow", message)


def test_no_weights_at_all(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, WEIGHTS, "missing")


def test_the_tokenizer_is_asked_for_apart(folder):
    open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*missing"):
        check_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*JSON"):
        check_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert check_tokenizer(folder) == folder / "tokenizer.json"


def test_a_file_that_is_a_folder(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        read_json(tmp_path / "config.json")
