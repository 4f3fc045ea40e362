"""The attention window of a layer, from the fields of a ``config.json``: one function per rule.

What an absent field means is what the class in transformers makes of it.
"""

from __future__ import annotations

from collections.abc import Callable

from moestro.workers.config_fields import Fields


def no_window(fields: Fields, layer: int) -> None:
    """Each token sees all before it."""
    return None


def every_layer(fields: Fields, layer: int) -> int | None:
    """One window for all layers."""
    return fields.integer("sliding_window") if fields.has("sliding_window") else None


def unless_null(fields: Fields, layer: int) -> int | None:
    """One window for all layers, 4096 where the field is absent; null turns it off (Mistral)."""
    return every_layer(fields, layer) if "sliding_window" in fields.raw else 4096


def every_layer_if_used(fields: Fields, layer: int) -> int | None:
    """One window for all layers, if a flag turns it on (Qwen3-MoE)."""
    return fields.integer("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None


def by_layer_type(slides: Callable[[Fields, int], bool]) -> Callable[[Fields, int], int | None]:
    """The window where ``layer_types`` says so; configs from before that field follow ``slides``."""

    def window(fields: Fields, layer: int) -> int | None:
        if not fields.flag("use_sliding_window", False):
            return None
        return fields.integer("sliding_window", 4096) if _slides(fields, layer, slides) else None

    return window


def _slides(fields: Fields, layer: int, before_layer_types: Callable[[Fields, int], bool]) -> bool:
    types = fields.strings("layer_types")
    if types is None:
        return before_layer_types(fields, layer)
    if layer >= len(types) or types[layer] not in ("full_attention", "sliding_attention"):
        raise fields.error("layer_types", f"must say full_attention or sliding_attention for layer {layer}")
    return types[layer] == "sliding_attention"


def qwen2_moe_slides(fields: Fields, layer: int) -> bool:
    """Every other layer of the first ``max_window_layers``."""
    return layer % 2 == 0 and layer < fields.integer("max_window_layers", 28, minimum=0)


def from_max_window_layers(default: int) -> Callable[[Fields, int], bool]:
    """All but the first ``max_window_layers``."""
    return lambda fields, layer: layer >= fields.integer("max_window_layers", default, minimum=0)


def dots1_window(fields: Fields, layer: int) -> int | None:
    """By layer, as ``by_layer_type``, but without a flag that turns it on: as in Mistral, null turns it off."""
    window = unless_null(fields, layer)
    return window if window is not None and _slides(fields, layer, from_max_window_layers(62)) else None
