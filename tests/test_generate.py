"""Generation against loops without a cache, draws against sorted lists, and the model left as it was."""

import math
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.generate import answer, choose, complete, continue_text, generate, room_for_prompt
from llm.model import Transformer, TransformerConfig
from llm.tokenizer import Bytes


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only make threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["rotary", "learned", "sinusoidal"])
def model(request):
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(
            dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=40, max_length=24, position=request.param
        )
    )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)  # far enough from uniform that the next token is no tie
    return model


@pytest.fixture
def prompts():
    return torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(1))


def naive(model, tokens, n):
    model.eval()
    for _ in range(n):
        tokens = torch.cat((tokens, model.logits(model(tokens))[:, -1:].argmax(-1)), dim=1)
    return tokens


def test_greedy_is_the_naive_loop(model, prompts):
    expected = naive(model, prompts, 12)
    assert len(expected[:, 7:].unique()) > 5
    assert torch.equal(generate(model, prompts, 12, temperature=0), expected)
    assert torch.equal(generate(model, prompts[:, :1], 3, temperature=0), naive(model, prompts[:, :1], 3))


def test_padded_prompts_go_on_as_alone(model, prompts):
    padding = torch.tensor([0, 3, 6])
    together = generate(model, prompts, 10, temperature=0, padding=padding)
    assert torch.equal(together[:, :7], prompts)
    for row, n in enumerate(padding.tolist()):
        assert torch.equal(together[row, n:], naive(model, prompts[row : row + 1, n:], 10)[0])


def test_ends_where_the_context_is_full(model, prompts):
    assert generate(model, prompts, 1000, temperature=0).shape == (3, 24)
    assert torch.equal(generate(model, prompts, 1000, temperature=0), naive(model, prompts, 17))


def test_a_finished_row_is_filled_and_all_finished_end(model, prompts):
    plain = generate(model, prompts, 12, temperature=0)
    eos = int(plain[0, 9])
    stopped = generate(model, prompts, 12, temperature=0, eos_id=eos)
    for row, free in zip(stopped, plain, strict=True):
        new = free[7:].tolist()
        end = 7 + new.index(eos) + 1 if eos in new else 19
        assert torch.equal(row[:end], free[:end][: len(row)])
        assert (row[end:] == eos).all()
    one = generate(model, prompts[:1], 12, temperature=0, eos_id=eos)
    assert one.shape[1] == 7 + plain[0, 7:].tolist().index(eos) + 1


def test_the_same_seed_draws_the_same_and_torch_is_left_alone(model, prompts):
    before = torch.get_rng_state()
    first, second, third = (
        generate(model, prompts, 15, top_k=30, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    torch.manual_seed(3)
    free = generate(model, prompts, 15)
    torch.manual_seed(3)
    assert torch.equal(generate(model, prompts, 15), free)


def test_a_model_in_training_is_not_disturbed(prompts):
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(dim=16, n_layers=2, n_heads=2, vocab_size=40, max_length=24, dropout=0.5)
    ).train()
    model.blocks[1].eval()  # a frozen part keeps its own mode
    modes = [module.training for module in model.modules()]
    model.logits(model(prompts)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    before = torch.get_rng_state()
    out = generate(model, prompts, 5, temperature=0)
    assert torch.equal(generate(model, prompts, 5, temperature=0), out)  # no dropout
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, model.parameters(), strict=True))
    model.logits(model(prompts)).sum().backward()  # nothing of inference mode stays behind
    with pytest.raises(IndexError):
        generate(model, prompts + 1000, 5)
    assert [module.training for module in model.modules()] == modes


def test_a_compiled_model_is_not_compiled_anew(model, prompts):
    from torch._dynamo.utils import counters

    for block in model.blocks:
        block.compile(backend="eager")
    model(prompts)
    compiled = counters["stats"]["unique_graphs"]
    generate(model, prompts, 5, temperature=0)
    assert counters["stats"]["unique_graphs"] == compiled


LOGITS = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.integers(1, 15), st.floats(0.2, 3.0), st.integers(0, 2**30))
def test_top_k_gives_only_the_k_likeliest(logits, k, temperature, seed):
    rows = torch.tensor(logits).expand(64, -1)
    drawn = choose(rows, temperature, top_k=k, generator=torch.Generator().manual_seed(seed))
    assert drawn.shape == (64, 1)
    least = sorted(logits, reverse=True)[: min(k, len(logits))][-1]
    assert all(logits[i] >= least for i in drawn.flatten().tolist())
    assert len(drawn.unique()) <= k  # ties do not let more in


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(0.01, 1.0), st.integers(0, 2**30))
def test_top_p_gives_only_the_nucleus(logits, p, seed):
    rows = torch.tensor(logits).expand(64, -1)
    drawn = choose(rows, top_p=p, generator=torch.Generator().manual_seed(seed)).flatten().tolist()
    weights = [math.exp(x) for x in logits]
    for i in set(drawn):
        likelier = sum(w for w in weights if w > weights[i]) / sum(weights)
        assert likelier < p + 1e-5
    if p <= max(weights) / sum(weights):
        assert len(set(drawn)) == 1


def test_top_p_counts_after_top_k():
    """Of .4 .3 .2 .1, two likeliest: .57 .43. So .5 is reached by the first alone, .6 by both."""
    rows = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(500, -1)
    generator = torch.Generator().manual_seed(0)
    assert choose(rows, top_k=2, top_p=0.5, generator=generator).unique().tolist() == [0]
    assert choose(rows, top_k=2, top_p=0.6, generator=generator).unique().tolist() == [0, 1]
    assert choose(rows, top_p=0.75, generator=generator).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 4])
def test_draws_follow_the_probabilities(temperature, top_k):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    n = 20_000
    drawn = choose(logits.expand(n, -1), temperature, top_k, generator=torch.Generator().manual_seed(0))
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    for i, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs((drawn == i).sum().item() / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_low_temperature_is_greedy():
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(logits, 1e-3), logits.argmax(-1, keepdim=True))
    assert torch.equal(choose(logits, 0), logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokens": torch.zeros(7, dtype=torch.long)},
            "tokens has shape (7,): must be [prompts, length], both at least 1",
        ),
        (
            {"tokens": torch.zeros(2, 0, dtype=torch.long)},
            "tokens has shape (2, 0): must be [prompts, length], both at least 1",
        ),
        (
            {"tokens": torch.zeros(2, 24, dtype=torch.long)},
            "a prompt of 24 tokens leaves no room in model.max_length = 24; give at most its last 23 tokens",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"temperature": -0.1}, "temperature = -0.1: must be at least 0 (greedy) and finite"),
        ({"temperature": float("nan")}, "temperature = nan: must be at least 0 (greedy) and finite"),
        ({"top_k": 0}, "top_k = 0: must be at least 1; leave it out to draw among all tokens"),
        ({"top_p": 0.0}, "top_p = 0.0: must be above 0 and at most 1; leave it out to draw among all tokens"),
        ({"top_p": 1.5}, "top_p = 1.5: must be above 0 and at most 1; leave it out to draw among all tokens"),
        ({"padding": torch.tensor([1])}, "padding has shape (1,): must be [3], one count a prompt"),
        (
            {"padding": torch.tensor([0, 7, 1])},
            "padding = [0, 7, 1]: must leave each prompt of 7 tokens at least one of them",
        ),
    ],
)
def test_refuses(prompts, changes, message):
    model = Transformer(TransformerConfig(dim=8, n_layers=1, n_heads=2, vocab_size=40, max_length=24))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        generate(model, **{"tokens": prompts, "max_new_tokens": 5, **changes})


def test_refuses_a_generator_elsewhere(prompts):
    model = Transformer(TransformerConfig(dim=8, n_layers=1, n_heads=2, vocab_size=40, max_length=24))
    message = "generator is on cpu, tokens on meta; take torch.Generator(device='meta')"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        generate(model.to("meta"), prompts.to("meta"), 5, generator=torch.Generator())


def test_continue_text_is_the_prompt_and_what_generate_adds() -> None:
    tokenizer = Bytes().build([])
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(dim=16, n_layers=1, n_heads=2, vocab_size=257, max_length=24))
    text = continue_text(model, tokenizer, "abc", 5, temperature=0)
    prompt = torch.tensor([[tokenizer.eot_id, *tokenizer.encode("abc")]])
    assert text == tokenizer.decode(generate(model, prompt, 5, temperature=0)[0, 1:].tolist())
    assert text.startswith("abc")
    assert continue_text(model, tokenizer, "x" * 100, 5, temperature=0).startswith("x" * 23)


@pytest.mark.parametrize(("max_new", "room"), [(5, 19), (8, 18), (128, 18)])
def test_an_answer_takes_no_more_than_a_quarter_of_the_context_from_its_prompt(
    max_new: int, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What is asked for may be longer than the context: the prompt is read all the same."""
    torch.manual_seed(0)
    tokenizer = Bytes().build([])
    config = TransformerConfig(dim=32, n_layers=1, n_heads=2, vocab_size=tokenizer.vocab_size, max_length=24)
    model = Transformer(config)
    assert room_for_prompt(24, max_new) == room
    prompts = [tokenizer.encode("a" * room), tokenizer.encode("b" + "a" * room)]
    expected = generate(model, torch.tensor(prompts[:1]), max_new, temperature=0, eos_id=tokenizer.eot_id)[0, room:]
    found = answer(model, tokenizer, prompts, max_new)
    assert found == [tokenizer.decode(expected.tolist(), skip_special=True)] * 2
    assert f"1 of 2 inputs are cut to {room} tokens" in caplog.text


def test_a_stop_ends_what_is_new_and_leaves_the_prompt() -> None:
    tokenizer = Bytes().build([])
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(dim=16, n_layers=1, n_heads=2, vocab_size=257, max_length=24))
    whole = continue_text(model, tokenizer, "a.b", 8, temperature=0)
    new = whole.removeprefix("a.b")
    assert len(new) > 2
    assert continue_text(model, tokenizer, "a.b", 8, temperature=0, stop=["."]) == whole
    assert continue_text(model, tokenizer, "a.b", 8, temperature=0, stop=[new[2:]]) == f"a.b{new[: new.find(new[2:])]}"
    assert complete(model, tokenizer, ["a.b"], 8, temperature=0, stop=["a", new[0]]) == ["a.b"]
