from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llm.model import Transformer, TransformerConfig
from llm.optimizer import AdamW, MuonAdamW, muon
from llm.optimizer.groups import decay_groups, hidden_matrices
from llm.optimizer.muon import orthogonalise, share_out

LAST_PLACE = 1e-2 * 0.2 * 32**0.5 * 2**-8  # of bfloat16, in an update of these models' largest matrices at lr 1e-2


def model(**settings: object) -> Transformer:
    torch.manual_seed(0)
    defaults = TransformerConfig(
        dim=16, n_layers=2, n_heads=2, ffn_dim=32, vocab_size=11, max_length=8, bias=True, norm="layer"
    )
    return Transformer(replace(defaults, **settings))  # type: ignore[arg-type]


def train(network: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int, first: int = 0) -> None:
    for step in range(first, first + n_steps):
        tokens = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(step))
        logits = network.logits(network(tokens))  # type: ignore[operator]
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
def test_vectors_do_not_decay_and_every_weight_is_in_one_group(tied: bool) -> None:
    network = model(tie_embeddings=tied)
    decayed, rest = decay_groups(network, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in rest["params"])
    ids = [id(p) for group in (decayed, rest) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in network.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_matrices_of_the_blocks_only(tied: bool) -> None:
    network = model(tie_embeddings=tied)
    expected = {id(p) for name, p in network.named_parameters() if ".blocks." in name and p.ndim == 2}
    assert {id(p) for p in hidden_matrices(network)} == expected


def test_adamw_is_torch_adamw() -> None:
    ours, theirs = model(), model()
    train(ours, AdamW(lr=1e-2, weight_decay=0.1).build(ours), 5)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    train(theirs, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True), 5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_adamw_goes_on_from_torchs_state_and_torch_from_its() -> None:
    """Also where a parameter has no gradient for some steps: its moments stay, and its own count of steps."""
    ours, theirs = model(), model()
    mine = AdamW(lr=1e-2, weight_decay=0.1).build(ours)
    groups = [{**group, "params": of(theirs, ours, group["params"])} for group in mine.param_groups]
    other = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    for step in range(6):
        for network in (ours, theirs):
            give_gradients(network.parameters(), step)
            if step % 2:
                next(network.parameters()).grad = None
        mine.step()
        other.step()
        if step == 3:
            first, second = copy.deepcopy(mine.state_dict()), copy.deepcopy(other.state_dict())
            torch.testing.assert_close(first, second, rtol=0, atol=0)
            mine.load_state_dict(second)
            other.load_state_dict(first)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert {float(state["step"]) for state in mine.state.values()} == {3.0, 6.0}


def test_adamw_counts_beyond_256_where_the_default_dtype_is_bfloat16() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        network = model()
        optimizer = AdamW(lr=1e-3).build(network)
        give_gradients(network.parameters(), 0)
        optimizer.step()
        assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_adamw_calls_its_closure_under_grad() -> None:
    network = model()
    optimizer = AdamW(lr=1e-2).build(network)
    assert optimizer.step(lambda: torch.is_grad_enabled()) is True


def of(network: nn.Module, other: nn.Module, parameters: list[Tensor]) -> list[Tensor]:
    """Those of `network` that are called as these of `other`."""
    names = {id(parameter): name for name, parameter in other.named_parameters()}
    return [network.get_parameter(names[id(parameter)]) for parameter in parameters]


def give_gradients(parameters: Iterable[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_adamw_is_muon_and_adamw_side_by_side() -> None:
    """AdamW to the bit; Muon but for the order of sums, of which one in bfloat16 moves a result by one per cent."""
    ours, theirs = model(), model()
    start = copy.deepcopy(theirs.state_dict())
    both = MuonAdamW(lr=1e-2, weight_decay=0.1).build(ours)
    matrices = hidden_matrices(theirs)
    rest = [p for p in theirs.parameters() if all(p is not m for m in matrices)]
    theirs_muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    for step in range(5):
        give_gradients(ours.parameters(), step)
        give_gradients(theirs.parameters(), step)
        both.step()
        theirs_muon.step()
        adamw.step()
    names = {id(p): name for name, p in theirs.named_parameters()}
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if any(other is m for m in matrices):
            moved = other - start[names[id(other)]]
            assert ((mine - other).norm() / moved.norm()).item() < 0.03
            momentum = theirs_muon.state[other]["momentum_buffer"]
            torch.testing.assert_close(both.state[mine]["momentum_buffer"], momentum, rtol=0, atol=0)
        else:
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


SHAPES = [(16, 16), (16, 16), (16, 48), (48, 16), (7, 5), (5, 7), (1, 9)]


def newton_schulz(matrix: Tensor) -> Tensor:
    """As it is written: Jordan et al. 2024, in double precision."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_orthogonalised_together_as_one_by_one() -> None:
    """Tall ones too, and none at all; a matrix of zeros stays one."""
    torch.manual_seed(0)
    matrices = [torch.randn(shape).bfloat16() for shape in SHAPES] + [torch.zeros(16, 48).bfloat16()]
    results = orthogonalise(matrices)
    for matrix, result in zip(matrices[:-1], results, strict=False):
        expected = newton_schulz(matrix)
        assert result.shape == matrix.shape
        assert result.dtype == torch.bfloat16
        assert ((result.double() - expected).norm() / expected.norm()).item() < 0.03
    assert not results[-1].any()
    assert orthogonalise([]) == []


def test_one_batched_product_for_all_matrices_of_a_shape() -> None:
    with Counted() as counted:
        orthogonalise([torch.randn(shape).bfloat16() for shape in SHAPES])
    assert counted.n_calls["bmm"] == 5 * len({tuple(sorted(shape)) for shape in SHAPES})
    assert counted.n_calls["baddbmm"] == 2 * counted.n_calls["bmm"]


class Counted(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self) -> None:
        super().__init__()
        self.n_calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.n_calls[function.__name__.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def test_what_is_worked_on_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rounds change nothing."""
    ours, bounded = model(), model()
    for network, room in ((ours, 2**25), (bounded, 600)):
        monkeypatch.setattr(muon, "_ROOM", room)
        optimizer = MuonAdamW(lr=1e-2).build(network)
        give_gradients(network.parameters(), 0)
        optimizer.step()
    sizes = [sum(m.numel() for m in round_.matrices) for round_ in muon.plan(hidden_matrices(bounded))]
    assert len(sizes) > 1
    assert max(sizes) <= 600
    torch.testing.assert_close(bounded.state_dict(), ours.state_dict(), rtol=0, atol=LAST_PLACE)


def test_groups_of_other_rates_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under mup, where not all widths grow alike."""
    network = model(parametrization="mup", base_dim=8, base_ffn_dim=32)
    optimizer = MuonAdamW(lr=1e-2).build(network)
    groups = [group for group in optimizer.param_groups if group["algorithm"] == "muon"]
    assert len(groups) == 2  # from dim to anything, and from the feed-forward back
    assert [group["lr"] * group["weight_decay"] for group in groups] == pytest.approx([1e-3, 1e-3])
    planned: list[int] = []
    made = muon.plan
    monkeypatch.setattr(muon, "plan", lambda matrices: planned.append(len(matrices)) or made(matrices))
    for step in range(3):
        give_gradients(network.parameters(), step)
        optimizer.step()
    assert planned == [len(group["params"]) for group in groups]


def test_a_matrix_without_a_gradient_stays() -> None:
    network = model()
    optimizer = MuonAdamW(lr=1e-2).build(network)
    still = hidden_matrices(network)[0]
    before = still.detach().clone()
    for step in range(2):
        give_gradients(network.parameters(), step)
        still.grad = None
        optimizer.step()
    assert torch.equal(still, before)
    give_gradients(network.parameters(), 2)
    optimizer.step()
    assert not torch.equal(still, before)


def test_the_costliest_jobs_are_shared_out_first() -> None:
    assert share_out([1, 1, 4, 1, 1], 2) == [1, 1, 0, 1, 1]
    assert share_out([5], 3) == [0]


@pytest.mark.parametrize("recipe", [AdamW(lr=1e-2), MuonAdamW(lr=1e-2)])
def test_state_dict_round_trip_goes_on_bitwise(recipe: AdamW | MuonAdamW) -> None:
    straight = model()
    optimizer = recipe.build(straight)
    train(straight, optimizer, 3)
    resumed = model()
    resumed.load_state_dict(straight.state_dict())
    again = recipe.build(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(straight, optimizer, 3, first=3)
    train(resumed, again, 3, first=3)
    torch.testing.assert_close(straight.state_dict(), resumed.state_dict(), rtol=0, atol=0)


def test_learning_rate_of_every_group_can_be_set_from_outside() -> None:
    network = model()
    before = copy.deepcopy(network.state_dict())
    optimizer = MuonAdamW(lr=1e-2).build(network)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(network, optimizer, 2)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
