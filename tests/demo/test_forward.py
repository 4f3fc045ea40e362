"""The training forward against transformers and plain autograd."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

from moestro.demo.distill import divergence, draft_config
from moestro.demo.forward import cross_entropy, decoder
from moestro.demo.train import model_config


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_loss_and_gradients_match_transformers(kind: str) -> None:
    torch.manual_seed(0)
    config = model_config() if kind == "moe" else draft_config()
    config.num_hidden_layers = 2
    model = Qwen3MoeForCausalLM(config) if kind == "moe" else Qwen3ForCausalLM(config)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for value in params.values():
            # Ordinary initial weights leave the branches so small that an error in them would not show.
            value.mul_(2).copy_(value.bfloat16().float())
    rows = torch.randint(0, config.vocab_size, (2, 65))
    ids, targets = rows[:, :-1], rows[:, 1:].reshape(-1)

    logits = model(ids).logits.view(-1, config.vocab_size)
    expected = F.cross_entropy(logits, targets)
    expected_grads = torch.autograd.grad(expected, list(params.values()))
    loss = cross_entropy(decoder(params, ids, config).states_NM, params["model.embed_tokens.weight"], targets)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)

    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    for name, grad, want in zip(params, grads, expected_grads, strict=True):
        assert grad is not None, name
        # bfloat16 products against float32 ones: directions agree, but a near-tie may route elsewhere.
        cosine = F.cosine_similarity(grad.flatten(), want.flatten(), dim=0).item()
        assert cosine > 0.95, (name, cosine)
        assert grad.norm().item() == pytest.approx(want.norm().item(), rel=0.1), name


def test_divergence_matches_its_definition() -> None:
    torch.manual_seed(1)
    states = torch.randn(700, 16, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(50, 16).bfloat16().float().requires_grad_()
    teacher = torch.randn(700, 24, dtype=torch.bfloat16), torch.randn(50, 24, dtype=torch.bfloat16)
    student_log = F.log_softmax(states.float() @ head.T, dim=-1)
    teacher_log = F.log_softmax(teacher[0].float() @ teacher[1].float().T, dim=-1)
    expected = F.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean")
    want_states, want_head = torch.autograd.grad(expected, [states, head])
    loss = divergence(states, head, teacher)
    grad_states, grad_head = torch.autograd.grad(loss, [states, head])
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    torch.testing.assert_close(grad_head, want_head, rtol=0.05, atol=2e-3)
    torch.testing.assert_close(grad_states.float(), want_states.float(), rtol=0.05, atol=1e-4)
