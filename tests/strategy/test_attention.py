"""Which kernel computes attention: any gives the same, and a run keeps the one that it began with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm.config import ConfigError
from llm.run import run
from llm.strategy import attention
from llm.strategy.attention import Kernel, agreed, calls_of, fastest, problems, serves, use, way_of
from tests.ranks import run_on_ranks
from tests.runs import Compose, saved
from tests.strategy.test_apply import NETWORKS, built, gradients

CPU = torch.device("cpu")
LLAMA = NETWORKS["llama"]


@pytest.fixture(autouse=True)
def torch_s_own_choice() -> Iterator[None]:
    yield
    use(None)


def served() -> str:
    """Which kernel a plain call gets."""
    query = torch.randn(1, 2, 8, 16, requires_grad=True)
    return type(F.scaled_dot_product_attention(query, query, query).grad_fn).__name__


@pytest.mark.parametrize("kernel", ["flash", "math"])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_kernels_agree(name: str, kernel: Kernel) -> None:
    expected = gradients(built(name))
    use(kernel)
    torch.testing.assert_close(gradients(built(name)), expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_serves_until_another_one_does() -> None:
    own = served()
    assert own.startswith("ScaledDotProductFlashAttention")
    use("math")
    assert served() != own
    use("flash")
    assert served() == own
    use("math")
    use(None)
    assert served() == own


def test_calls_are_those_of_the_model() -> None:
    (call,) = calls_of(LLAMA, 3, 8)
    assert call.query == (3, 4, 8, 8)
    assert call.mask is not None, "rows hold several documents"
    (alone,) = calls_of(LLAMA, 3, 8, documents=False)
    assert (alone.mask, alone.causal) == (None, True)
    (shared,) = calls_of(LLAMA, 3, 8, n_shares=2)
    assert shared.query == (3, 2, 8, 8)
    kinds = calls_of(NETWORKS["t5"], 3, 8)
    assert {call.mask[1:] for call in kinds if call.mask} == {(torch.float32, True), (torch.bool, False)}


def test_how_documents_are_hidden() -> None:
    wide, gpu = replace(LLAMA, head_dim=64), torch.device("cuda")
    assert way_of("auto", LLAMA, CPU, compiled=False) == way_of("math", LLAMA, CPU, compiled=False) == "runs"
    assert way_of("auto", LLAMA, CPU, compiled=True) == "dense"
    assert way_of("auto", wide, gpu, compiled=False) == way_of("auto", wide, gpu, compiled=True) == "blocks"
    dense = [("cudnn", wide), ("auto", replace(wide, dropout=0.1)), ("auto", replace(wide, head_dim=8))]
    assert [way_of(asked, config, gpu, compiled=True) for asked, config in dense] == ["dense"] * 3


def test_the_fastest_of_those_that_serve() -> None:
    calls, cost = calls_of(replace(LLAMA, position="learned"), 2, 8), {"flash": 2.0, "math": 3.0}
    told = fastest(calls, CPU, torch.float32, lambda kernel, *_: cost[kernel])
    assert told == "flash", "of cudnn and efficient nobody asked the cost: a CPU has none"
    with_dropout = [call._replace(dropout=0.1) for call in calls]
    assert not serves("flash", with_dropout[0], CPU, torch.float32)
    assert fastest(with_dropout, CPU, torch.float32, lambda kernel, *_: cost[kernel]) == "math"
    assert fastest([], CPU, torch.float32) is None


def test_trying_takes_time_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    calls = calls_of(LLAMA, 2, 8)
    assert fastest(calls, CPU, torch.float32) in ("flash", "math")
    assert attention.seconds("math", calls, CPU, torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_serve_is_refused() -> None:
    assert problems("auto", LLAMA, "cpu", "32-true") == problems("flash", LLAMA, "cpu", "32-true") == []
    assert problems("cudnn", LLAMA, "cpu", "32-true") == [
        "strategy.attention: cudnn - a CPU has flash and math only - take auto, or one of them"
    ]
    assert problems("flash", replace(LLAMA, dropout=0.1), "cpu", "32-true") == [
        "strategy.attention: flash - cannot do what the model asks for (heads of 8, a mask of truth values, dropout "
        "0.1) - take auto"
    ]
    assert problems("flash", LLAMA, "cuda", "32-true") == [
        "strategy.attention: flash - computes in 16 bits, and trainer.precision is 32-true - take "
        "trainer.precision=bf16-mixed, or auto or efficient"
    ]


def test_refused_before_anything_is_written(compose_run: Compose, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.attention: efficient - a CPU has flash and math only"):
        run(compose_run("strategy.attention=efficient", f"run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def answer(rank_s: dict[int, Kernel | None]) -> Kernel | None:
    return agreed(rank_s[torch.distributed.get_rank()], CPU)


@pytest.mark.parametrize("first", ["efficient", None])
def test_all_take_the_first_one_s_answer(first: Kernel | None) -> None:
    assert run_on_ranks(answer, 2, {0: first, 1: "math"}) == [first, first]


def test_a_run_keeps_its_kernel(compose_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fastest may be another one on the next machine: it rounds otherwise."""
    cost = {"flash": 1.0, "math": 2.0}
    monkeypatch.setattr(attention, "measurable", lambda device: True)
    monkeypatch.setattr(attention, "seconds", lambda kernel, *_: cost[kernel])
    settings = ["model.dropout=0", f"run_dir={tmp_path / 'run'}", "~callback.sample"]
    run(compose_run(*settings, "trainer.max_steps=2", "schedule=constant"))
    assert saved(tmp_path / "run")["attention"] == "flash"
    cost["flash"] = 3.0
    run(compose_run(*settings, "trainer.max_steps=4", "schedule=constant"))
    assert saved(tmp_path / "run")["attention"] == "flash"
    assert torch.compiler.config.cache_key_tag == "", "and leaves nothing behind"
    run(compose_run(*settings, "trainer.max_steps=6", "schedule=constant", "strategy.attention=math"))
    assert saved(tmp_path / "run")["attention"] == "math", "who asks for one gets it"
