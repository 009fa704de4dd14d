from __future__ import annotations

import pytest
import torch

from llm.reduce import Totals, all_mean, n_processes


def part(total: float, count: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(total), torch.tensor(count)


def test_totals_add_up_and_start_again() -> None:
    totals = Totals()
    totals.add({"loss": part(3.0, 2), "tokens": part(5.0, 1)})
    totals.add({"loss": part(4.0, 5), "tokens": part(7.0, 1)})
    assert totals.reduce() == {"loss": (7.0, 7.0), "tokens": (12.0, 2.0)}
    assert totals.reduce() == {}


def test_totals_keep_the_digits_of_millions_of_terms() -> None:
    totals = Totals()
    for _ in range(100):
        totals.add({"loss": part(16_777_217.0, 1)})  # 2^24 + 1, which float32 cannot add to
    assert totals.reduce()["loss"] == (pytest.approx(100 * torch.tensor(16_777_217.0).item(), abs=0), 100.0)


def test_totals_survive_a_checkpoint() -> None:
    one, two = Totals(), Totals()
    one.add({"loss": part(1.5, 2)})
    two.load_state_dict(one.state_dict())
    one.add({"loss": part(2.5, 2)})  # the copy does not follow
    assert two.reduce() == {"loss": (1.5, 2.0)}


def test_names_must_stay_the_same() -> None:
    totals = Totals()
    totals.add({"loss": part(1.0, 1)})
    with pytest.raises(AssertionError, match="other"):
        totals.add({"other": part(1.0, 1)})


def test_one_process_is_its_own_mean() -> None:
    assert n_processes() == 1
    assert all_mean(torch.tensor([2.0, 3.0])).tolist() == [2.0, 3.0]
