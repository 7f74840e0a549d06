"""Decode attention in triton against the gathered one: on a GPU, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU", allow_module_level=True)

from calibrate import kernels, paged_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("processors", [1, 4, 64])
@pytest.mark.parametrize(
    ("sequences", "heads", "groups", "size", "block"),
    [(3, 8, 2, 64, 16), (1, 4, 4, 48, 4), (5, 6, 1, 16, 16), (2, 32, 2, 128, 16), (70, 4, 2, 16, 16)],
)
def test_blocks_read_in_place_give_what_gathered_ones_do(
    sequences: int, heads: int, groups: int, size: int, block: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts a sequence is split into, some of which are empty; queries need not lie side by side."""
    monkeypatch.setattr(paged_attention, "_processors", lambda _: processors)
    torch.manual_seed(0)
    keys, values = (torch.randn(4 * sequences + 7, block, groups, size, device=DEVICE) for _ in range(2))
    tables = torch.randperm(len(keys), device=DEVICE)[: 4 * sequences].view(sequences, 4)
    contexts = torch.randint(1, 4 * block + 1, (sequences,), device=DEVICE)
    contexts[0] = 1
    query = torch.randn(sequences, heads + 3, size, device=DEVICE)[:, :heads]
    found = paged_attention.decode(query, keys, values, tables, contexts)
    torch.testing.assert_close(found, kernels._decode_together(query, keys, values, tables, contexts))
