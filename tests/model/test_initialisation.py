"""Where weights start, and that a build on the meta device starts there too."""

import math

import pytest
import torch
from torch import nn

from llm.model import Transformer, initialise

FAMILIES = [
    {"initialisation": "gpt2", "position": "learned", "norm": "layer", "bias": True, "tie_embeddings": True},
    {"initialisation": "llama", "qk_norm": True},
    {"initialisation": "gpt2", "position": "sinusoidal", "norm_position": "post", "tie_embeddings": True},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_build_equals_direct_build(config, family):
    torch.manual_seed(3)
    direct = Transformer(config(**family))
    drawn = torch.get_rng_state()
    with torch.device("meta"):
        meta = Transformer(config(**family))
    meta.to_empty(device="cpu")
    for parameter in meta.parameters():
        nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(3)
    initialise(meta)
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, tensor in direct.state_dict().items():
        assert torch.equal(meta.state_dict()[name], tensor), name
    tokens = torch.randint(50, (2, 7))
    assert torch.equal(meta.logits(meta(tokens)), direct.logits(direct(tokens)))


@pytest.mark.parametrize("family", FAMILIES)
def test_lightning_materialises_the_same(config, family):
    """Lightning calls every module's reset_parameters, in the order of modules()."""
    torch.manual_seed(3)
    direct = Transformer(config(**family))
    with torch.device("meta"):
        meta = Transformer(config(**family))
    meta.to_empty(device="cpu")
    torch.manual_seed(3)
    for module in meta.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(direct.parameters(), meta.parameters(), strict=True))


def test_a_module_that_cannot_start_anew_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU())
    model.odd = nn.ParameterList([torch.zeros(2)])
    with pytest.raises(
        TypeError, match=r"^odd \(ParameterList\) owns parameters or buffers but has no reset_parameters"
    ):
        initialise(model)


def test_ties_survive(config):
    with torch.device("meta"):
        model = Transformer(config(tie_embeddings=True))
    assert model.head.weight is model.embed.weight
    model.to_empty(device="cpu")
    assert model.head.weight is model.embed.weight
    model.to(torch.float64)
    assert model.head.weight is model.embed.weight
    model.embed.weight = nn.Parameter(torch.zeros(50, 32))
    model.tie()
    assert model.head.weight is model.embed.weight
    untied = Transformer(config())
    untied.tie()
    assert untied.head.weight is not untied.embed.weight


@pytest.mark.parametrize(("family", "residual"), [("gpt2", 0.02 / math.sqrt(2 * 8)), ("llama", 0.02)])
def test_deviations(config, family, residual):
    torch.manual_seed(0)
    model = Transformer(config(dim=64, n_layers=8, initialisation=family, position="learned", bias=True))
    names = {"out": [], "down": [], "other": []}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter) * name.endswith("weight")), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            kind = name.split(".")[-2]
            names[kind if kind in names else "other"].append(parameter.flatten())
    for kind, expected in {"out": residual, "down": residual, "other": 0.02}.items():
        values = torch.cat(names[kind])
        assert abs(values.mean()) < 4 * expected / math.sqrt(len(values))
        assert values.std().item() == pytest.approx(expected, rel=0.03)  # > 4 standard errors at 30k values


def test_first_loss_is_that_of_guessing(config):
    torch.manual_seed(0)
    model = Transformer(config(dim=64, initialisation="gpt2", tie_embeddings=True))
    tokens = torch.randint(50, (8, 24))
    loss = nn.functional.cross_entropy(model.logits(model(tokens)).flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(math.log(50), abs=0.05)
