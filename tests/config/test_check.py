"""Each message of `check`, read; and that they come together."""

from collections.abc import Callable
from typing import Any

import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from llm.config import ConfigError, check
from llm.config.check import find

Found = Callable[[dict[str, Any]], list[str]]
NET = {"_target_": "toyhouse.Net", "dim": 8}
ADAM = {"_target_": "toyhouse.Optimizer", "lr": 0.001}


def test_right_configuration_passes(mistakes: Found) -> None:
    schedule = {"_target_": "toyhouse.Linear", "warmup_steps": 3}
    right = {
        "betas": [0.9, 1],
        "schedule": schedule,
        "names": ["a"],
        "sizes": {"a": 1},
        "colour": "blue",
        "folder": "x",
    }
    assert mistakes({"model": {**NET, "dropout": 0, "bias": None}, "optimizer": {**ADAM, **right}}) == []


def test_error_counts_and_lists(mistakes: Found) -> None:
    with pytest.raises(ConfigError) as caught:
        check(OmegaConf.create({"packages": ["toyhouse"], "seed": -1, "model": {**NET, "dim": 0}}))
    assert str(caught.value).splitlines() == [
        "2 mistakes in the configuration, nothing was started:",
        "  seed: -1 - must be a whole number at least 0 and less than 4294967296",
        "  model.dim: 0 - must be a whole number greater than 0",
    ]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", "abc", "optimizer.lr: 'abc' - must be a number greater than 0"),
        ("lr", "0.1", "optimizer.lr: '0.1' - must be a number greater than 0 - write 0.1 without quotes"),
        ("lr", float("nan"), "optimizer.lr: nan - must be a finite number"),
        ("lr", float("inf"), "optimizer.lr: inf - must be a finite number"),
        ("lr", True, "optimizer.lr: true - must be a number greater than 0"),
        ("lr", None, "optimizer.lr: null - must be a number greater than 0"),
        ("lr", 0, "optimizer.lr: 0 - must be a number greater than 0"),
        ("lr", "???", "optimizer.lr: ??? - must be set - write optimizer.lr=…"),
        ("betas", 0.9, "optimizer.betas: 0.9 - must be a list of 2: a number, a number - write a list: [0.9]"),
        ("betas", [0.9], "optimizer.betas: [0.9] - must be a list of 2: a number, a number, has 1"),
        ("betas", [0.9, "x"], "optimizer.betas.1: 'x' - must be a number"),
        ("names", "abc", "optimizer.names: 'abc' - must be a list, each item text - write a list: [abc]"),
        ("names", ["a", 1], "optimizer.names.1: 1 - must be text"),
        ("sizes", {"a": 1.0}, "optimizer.sizes.a: 1.0 - must be a whole number - write 1"),
        ("colour", "reed", "optimizer.colour: 'reed' - must be 'red' or 'blue' - did you mean 'red'?"),
        ("limits", 3, "optimizer.limits: 3 - must be a mapping or null"),
        ("implicit", 1.5, "optimizer.implicit: 1.5 - must be a whole number"),
        ("schedule", "linear", "optimizer.schedule: 'linear' - must be a node that builds a Schedule or null"),
        (
            "schedule",
            {"warmup_steps": 3},
            "optimizer.schedule: {'warmup_steps': 3} - must be a node that builds a Schedule or null"
            " - a node names its class with _target_",
        ),
        (
            "schedule",
            {"_target_": "toyhouse.Net"},
            "optimizer.schedule: a Net - must be a node that builds a Schedule or null",
        ),
        ("lrr", 1, "optimizer.lrr: 1 - toyhouse.Optimizer has no such argument - did you mean optimizer.lr?"),
        ("_args_", [1], "optimizer._args_: arguments are given by name - it takes lr, betas"),
    ],
)
def test_value(mistakes: Found, key: str, value: Any, message: str) -> None:
    found = mistakes({"optimizer": {**ADAM, key: value}})
    assert len(found) == 1
    assert found[0].startswith(message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dim", 8.0, "model.dim: 8.0 - must be a whole number greater than 0 - write 8"),
        ("dim", True, "model.dim: true - must be a whole number greater than 0"),
        ("activation", "gleu", "'gelu' or 'relu' or 'swiglu' - did you mean 'gelu'?"),
        ("dropout", 1.0, "model.dropout: 1.0 - must be a number at least 0 and less than 1"),
        ("bias", "yes", "model.bias: 'yes' - must be true or false or null"),
        ("width", 3, "toyhouse.Net has no such argument - it takes dim, n_heads, activation, dropout, bias"),
    ],
)
def test_value_of_a_dataclass(mistakes: Found, key: str, value: Any, message: str) -> None:
    (found,) = mistakes({"model": {**NET, key: value}})
    assert message in found


def test_unresolvable_hint_leaves_the_others_judged(mistakes: Found) -> None:
    assert mistakes({"optimizer": {**ADAM, "unknown": 3, "implicit": None}}) == []
    assert len(mistakes({"optimizer": {**ADAM, "unknown": 3, "lr": "x"}})) == 1


def test_inherited_field_is_judged(mistakes: Found) -> None:
    found = mistakes({"model": {"_target_": "toyhouse.Wide", "dim": "8", "depth": 0}})
    assert [text.split(":")[0] for text in found] == ["model.dim", "model.depth"]


def test_required_argument(mistakes: Found) -> None:
    missing = "optimizer.lr: not set - toyhouse.Optimizer requires it - write +optimizer.lr=…"
    assert mistakes({"optimizer": {"_target_": "toyhouse.Optimizer"}}) == [missing]
    assert mistakes({"optimizer": {"_target_": "toyhouse.Optimizer", "_partial_": True}}) == []


def test_keyword_arguments_take_any_name_but_a_misspelt_one(mistakes: Found) -> None:
    assert mistakes({"data": {"_target_": "toyhouse.Open", "anything": 3}}) == []
    (found,) = mistakes({"data": {"_target_": "toyhouse.Open", "nmae": 3, "namee": "x"}})
    assert found.endswith("did you mean data.name?")


def test_dataclass_checks_itself_across_keys(mistakes: Found) -> None:
    assert mistakes({"model": {**NET, "dim": 1001, "n_heads": 2}}) == [
        "model.dim: 1001 - must be a multiple of model.n_heads=2",
        "model: dim=1001 is too wide for a toy",
    ]


def test_nodes_are_judged_by_class(mistakes: Found) -> None:
    def with_schedule(target: str, **extra: Any) -> list[str]:
        return mistakes({"optimizer": {**ADAM, "schedule": {"_target_": target, **extra}}})

    assert (
        with_schedule("toyhouse.Linear") == with_schedule("toyhouse.linear") == with_schedule("toyhouse.unsaid") == []
    )
    assert "a Net - must be" in with_schedule("toyhouse.Net")[0]
    assert "a partial - must be" in with_schedule("toyhouse.Linear", _partial_=True)[0]
    hook = {"_target_": "toyhouse.Linear", "_partial_": True}
    assert mistakes({"optimizer": {**ADAM, "hook": hook}}) == []


def test_inner_node_is_judged_where_it_is_written(mistakes: Found) -> None:
    inner = {"_target_": "toyhouse.Linear", "warmup": 3}
    for nodes in (
        {"optimizer": {**ADAM, "schedule": inner}},
        {"data": {"_target_": "toyhouse.Open", "sources": {"a": inner}}},
        {"data": {"_target_": "toyhouse.Open", "sources": [inner]}},
        {"callback": {"a": inner}},
    ):
        (found,) = mistakes(nodes)
        assert "toyhouse.Linear has no such argument" in found
    referred = {"schedule": inner, "optimizer": {**ADAM, "schedule": "${schedule}"}}
    assert [text.split(":")[0] for text in mistakes(referred)] == ["schedule.warmup"]


def test_wrong_value_is_named_where_it_is_written(mistakes: Found) -> None:
    nodes = {"model": {**NET, "dim": "x"}, "schedule": {"_target_": "toyhouse.Linear", "warmup_steps": "${model.dim}"}}
    assert [text.split(":")[0] for text in mistakes(nodes)] == ["model.dim"]
    nodes["model"]["dim"] = 8
    nodes["schedule"]["warmup_steps"] = "${model.bias}"
    nodes["model"]["bias"] = True
    (found,) = mistakes(nodes)
    assert found.startswith("schedule.warmup_steps: true (from model.bias) - must be a whole number at least 0")


def test_interpolation_that_leads_nowhere(mistakes: Found) -> None:
    nodes = {"model": {**NET, "n_heads": "${modle.dim}"}, "optimizer": {**ADAM, "anything": "${oc.env:NO_SUCH_NAME}"}}
    found = mistakes(nodes)
    assert found[0] == "model.n_heads: ${modle.dim} - modle.dim does not exist - did you mean ${model.dim}?"
    assert "NO_SUCH_NAME' not found" in found[1]
    assert found[1].startswith("optimizer.anything: ${oc.env:NO_SUCH_NAME} - ")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "model._target_: os.system - is outside llm, lightning, toyhouse - packages=[NAME] allows"),
        ("toyhouse.os.system", "leads into os, which a configuration may not name"),
        ("toyhouse.math", "is no class or function"),
        ("toyhouse.Path", "is defined in pathlib, which a configuration may not name"),
        ("toyhouse.Nett", "toyhouse has no Nett - did you mean toyhouse.Net?"),
        ("toyhouse.Net.__init__", "must be a public dotted name"),
        ("llm.nowhere.Model", "llm has no nowhere"),
        (3, "must name a class, as in llm.optimizer.AdamW"),
        (None, "must name a class"),
    ],
)
def test_target(mistakes: Found, target: Any, message: str) -> None:
    (found,) = mistakes({"model": {"_target_": target}})
    assert message in found


def test_refused_target_is_not_imported(mistakes: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "harmful.py").write_text("raise SystemExit('imported')")
    (found,) = mistakes({"model": {"_target_": "harmful.Net"}})
    assert "is outside" in found
    (tmp_path / "halfdone.py").write_text("import no_such_library")
    (found,) = mistakes({"model": {"_target_": "halfdone.Net"}, "packages": ["halfdone"]})
    assert "cannot be imported: No module named 'no_such_library'" in found


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ({"seed": "abc"}, "seed: 'abc' - must be a whole number at least 0 and less than 4294967296"),
        ({"stage": "train"}, "stage: 'train' - must be 'fit' or 'validate'"),
        ({"run_name": None}, "run_name: null - must be text of length at least 1"),
        ({"run_dir": "~/runs"}, "run_dir: '~/runs' - only a shell knows whose home that is - write the path out"),
        ({"init_from": 3}, "init_from: 3 - must be text or null"),
        ({"resume": "atuo"}, "resume: 'atuo' - must be auto, must, never or a path that exists - did you mean auto?"),
        ({"packages": "os"}, "packages: 'os' - must be a list, each item text - write a list: [os]"),
        ({"modle": {}}, "modle: {} - no such key - did you mean model?"),
        ({"model": 3}, "model: 3 - must be a node: a mapping with _target_ - choose one: model=…"),
        ({"model": "???"}, "model: ??? - must be set - choose one: model=…"),
        ({"model": {"dim": 3}}, "model._target_: not set - names the class to build"),
        (
            {"callback": {"sample": None}},
            "callback.sample: null - must be a node: a mapping with _target_ - to remove it write ~callback.sample",
        ),
    ],
)
def test_root(mistakes: Found, root: dict[str, Any], message: str) -> None:
    found = mistakes(root)
    assert len(found) == 1
    assert found[0].startswith(message)


def test_resume_takes_a_path_that_exists(mistakes: Found, tmp_path: Any) -> None:
    assert mistakes({"resume": str(tmp_path)}) == []
    assert "a path that exists" in mistakes({"resume": str(tmp_path / "none")})[0]


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 20), st.floats(), st.sampled_from(["gelu", "relu", "8", "x", ""]),
    st.lists(st.one_of(st.floats(0, 1), st.integers(0, 3), st.text("ab", max_size=2)), max_size=3),
)  # fmt: skip
_NET = st.dictionaries(st.sampled_from(["dim", "n_heads", "activation", "dropout", "bias", "dims"]), _VALUES)
_ADAM = st.dictionaries(st.sampled_from(["lr", "betas", "names", "sizes", "schedule", "lrs"]), _VALUES)


@settings(max_examples=150, deadline=None)
@given(net=_NET, adam=_ADAM)
def test_what_is_accepted_can_be_built(net: dict[str, Any], adam: dict[str, Any]) -> None:
    cfg = OmegaConf.create({"packages": ["toyhouse"]})
    cfg.model, cfg.optimizer = {"_target_": "toyhouse.Net", **net}, {"_target_": "toyhouse.Optimizer", **adam}
    if find(cfg):
        return
    model, optimizer = instantiate(cfg.model), instantiate(cfg.optimizer)
    assert type(model.dim) is int
    assert model.dim % model.n_heads == 0
    assert optimizer.lr > 0
    assert len(optimizer.betas) == 2


@settings(max_examples=100, deadline=None)
@given(
    key=st.sampled_from(["dim", "n_heads", "activation", "dropout", "bias"]),
    where=st.integers(0, 9),
    letter=st.sampled_from("abkz_"),
)
def test_mutated_key_is_always_found(key: str, where: int, letter: str) -> None:
    names = {"dim", "n_heads", "activation", "dropout", "bias"}
    mutated = key[: where % len(key)] + letter + key[where % len(key) + 1 :]
    if mutated in names:
        return
    cfg = OmegaConf.create({"packages": ["toyhouse"], "model": {"_target_": "toyhouse.Net", mutated: 2}})
    with pytest.raises(ConfigError, match=rf"model\.{mutated}: 2 - toyhouse\.Net has no such argument"):
        check(cfg)
