"""The PyTorch module."""

from conftest import optional

import segattn

torch = optional("torch")
from segattn.module import SegmentAttention  # noqa: E402


def test_the_module_is_the_operation_with_its_roles():
    tensors = {name: torch.randn(1, 5, heads, 8) for name, heads in zip("qkvab", (4, 2, 2, 2, 2))}
    module = SegmentAttention(4, prior_heads=[True, False] * 2, past_heads=[True, True, False, False], learn_gates=True)
    assert [name for name, _ in module.named_parameters()] == ["past_gate"]
    q, k, v, a, b = tensors.values()
    out, lse = module(q, k, v, prior=(a, b), past=(b, a), return_lse=True, past_len=[3])
    roles = {"prior_heads": module.prior_heads, "past_heads": module.past_heads, "past_len": [3]}
    expected = segattn.segment_attention(q, k, v, prior_k=a, prior_v=b, past_k=b, past_v=a, **roles)
    assert torch.equal(out, expected) and lse.shape == (1, 4, 5)
    out.sum().backward()
    gradient = module.past_gate.grad
    assert gradient[:2].abs().min() > 0 and not gradient[2:].any()
    # Without a past the gate is not read.
    assert torch.equal(module(q, k, v), segattn.segment_attention(q, k, v))
