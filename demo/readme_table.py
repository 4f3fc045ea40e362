"""Print the README's results tables from `evaluation.json`.

python -m moestro.demo.readme_table
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def quality_table(result: dict[str, Any]) -> str:
    """Held-out quality of the model, the draft and the n-gram baseline."""
    rows = [("MoE", result["model"]), ("draft", result["draft"]), ("5-gram, Kneser-Ney", result["ngram"])]
    lines = ["| | parameters | perplexity per token | bits per byte |", "| --- | ---: | ---: | ---: |"]
    for name, row in rows:
        parameters = f"{row['parameters']:,}" if "parameters" in row else "counts"
        lines.append(f"| {name} | {parameters} | {row['perplexity']:.2f} | {row['bits_per_byte']:.3f} |")
    return "\n".join(lines)


def draft_table(result: dict[str, Any]) -> str:
    """Agreement of the draft with its target."""
    lines = [
        "| contexts from | positions | same greedy token | expected acceptance |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, key in (
        ("held-out text", "agreement_on_held_out_text"),
        ("text sampled from the MoE", "agreement_on_text_sampled_from_the_target"),
    ):
        row = result["draft"][key]
        lines.append(f"| {name} | {row['positions']:,} | {row['greedy_match']:.3f} | {row['acceptance']:.3f} |")
    return "\n".join(lines)


def expert_table(result: dict[str, Any]) -> str:
    """Load and specialisation per layer."""
    lines = [
        "| layer | load, least to most | bits | tokens shuffled | bits, label per entry | entries shuffled |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for index, layer in enumerate(result["experts"]["layers"]):
        lines.append(
            f"| {index} | {min(layer['load']):.3f} to {max(layer['load']):.3f} "
            f"| {layer['information_bits']:.3f} | {layer['shuffled_bits_max']:.5f} "
            f"| {layer['type_information_bits']:.3f} | {layer['type_shuffled_bits_max']:.3f} |"
        )
    return "\n".join(lines)


def samples(result: dict[str, Any]) -> str:
    """Greedy completions, each after its prompt."""
    blocks = [f"```python\n{prompt}⟶{text}\n```" for prompt, text in result["completions"].items()]
    return "\n\n".join(blocks)


if __name__ == "__main__":
    evaluation = json.loads((HERE / "evaluation.json").read_text())
    for make in (quality_table, draft_table, expert_table, samples):
        print(make(evaluation), end="\n\n")
