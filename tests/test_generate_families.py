"""Beam search against a search over every text and against lists; gaps filled where they are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from llm.generate import beam_search, complete, continue_text, fill_mask, fill_spans, generate
from llm.generate.beam import length_penalty
from llm.model import Source, Transformer, TransformerConfig
from llm.tokenizer import ByteLevelBPE, Unigram, WordPiece

EOS = 1
SENTENCES = ["the cat sees a dog", "a dog runs over the house", "big trees and small cats", "never often under red"]


def network(family: str, vocab_size: int, **changes: object) -> Transformer:
    torch.manual_seed(0)
    settings = {"dim": 16, "n_layers": 2, "n_heads": 2, "max_length": 24, "family": family, "vocab_size": vocab_size}
    model = Transformer(TransformerConfig(**{**settings, **changes})).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def sources(n: int, vocab_size: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(vocab_size, (1, 3 + 2 * i), generator=draw) for i in range(n)]


def together(rows: list[torch.Tensor]) -> Source:
    width = max(row.shape[1] for row in rows)
    pad = [torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows]
    real = [torch.nn.functional.pad(torch.ones_like(row), (0, width - row.shape[1])) for row in rows]
    return Source(torch.cat(pad), torch.cat(real))


def log_probability(model: Transformer, source: torch.Tensor, text: tuple[int, ...]) -> float:
    tokens = torch.tensor([[0, *text]])
    scores = model.logits(model(tokens, source=Source(source))).log_softmax(-1)[0]
    return sum(scores[i, token].item() for i, token in enumerate(text))


def texts(vocab_size: int, n: int) -> list[tuple[int, ...]]:
    """All that end with EOS or are `n` long."""
    others = [token for token in range(vocab_size) if token != EOS]
    ended = [(*text, EOS) for k in range(n) for text in itertools.product(others, repeat=k)]
    return [*ended, *itertools.product(others, repeat=n)]


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_with_enough_beams_the_best_of_all_texts_is_found(alpha: float) -> None:
    model = network("encoder_decoder", 4)
    rows = sources(3, 4)
    found = beam_search(
        model, torch.zeros(3, 1, dtype=torch.long), 3, n_beams=64, alpha=alpha, eos_id=EOS, source=together(rows)
    )
    for row, source in zip(found[:, 1:].tolist(), rows, strict=True):
        best = max(
            texts(4, 3), key=lambda text, s=source: log_probability(model, s, text) / length_penalty(len(text), alpha)
        )
        assert row[: len(best)] == list(best)
        assert set(row[len(best) :]) <= {EOS}


@torch.no_grad()
def searched(model: Transformer, source: torch.Tensor, n_beams: int, n: int, alpha: float) -> list[int]:
    """The search with lists, without a cache and never ending early."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, n + 1):
        candidates = []
        for score, text in live:
            scores = model.logits(model(torch.tensor([[0, *text]]), source=Source(source)))[0, -1].log_softmax(-1)
            candidates += [(score + more, (*text, token)) for token, more in enumerate(scores.tolist())]
        candidates.sort(reverse=True)
        ended += [(s / length_penalty(length, alpha), t) for s, t in candidates[:n_beams] if t[-1] == EOS]
        live = [(s, t) for s, t in candidates[: 2 * n_beams] if t[-1] != EOS][:n_beams]
    ended += [(s / length_penalty(n, alpha), t) for s, t in live]
    return list(max(ended)[1])


@pytest.mark.parametrize(("n_beams", "alpha"), [(1, 0.0), (2, 0.6), (4, 1.0)])
def test_beam_search_is_the_search_with_lists(n_beams: int, alpha: float) -> None:
    model = network("encoder_decoder", 12, position="relative")
    rows = sources(4, 12)
    start = torch.zeros(4, 1, dtype=torch.long)
    found = beam_search(model, start, 7, n_beams=n_beams, alpha=alpha, eos_id=EOS, source=together(rows))
    for row, source in zip(found[:, 1:].tolist(), rows, strict=True):
        expected = searched(model, source, n_beams, 7, alpha)
        assert row[: len(expected)] == expected


def test_one_beam_is_greedy_for_decoders_too() -> None:
    model = network("decoder", 12)
    prompts, padding = torch.randint(12, (3, 5), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 4])
    greedy = generate(model, prompts, 6, temperature=0, padding=padding)
    assert torch.equal(beam_search(model, prompts, 6, n_beams=1, padding=padding), greedy)


@torch.no_grad()
def test_sources_of_unequal_length_are_answered_as_alone() -> None:
    model = network("encoder_decoder", 12)
    rows = sources(4, 12)
    start = torch.zeros(4, 1, dtype=torch.long)
    answers = generate(model, start, 8, temperature=0, source=together(rows))
    for answer, source in zip(answers, rows, strict=True):
        tokens = start[:1]
        for _ in range(8):  # without a cache
            tokens = torch.cat((tokens, model.logits(model(tokens, source=Source(source)))[:, -1:].argmax(-1)), 1)
        assert torch.equal(answer, tokens[0])


def test_beam_search_refuses() -> None:
    model = network("decoder", 12)
    for settings, message in (
        ({"n_beams": 0}, "n_beams = 0: must be at least 1"),
        ({"n_beams": 2, "alpha": -1.0}, "alpha = -1.0: must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            beam_search(model, torch.zeros(1, 1, dtype=torch.long), 2, **settings)  # type: ignore[arg-type]
    encoder = network("encoder", 12)
    with pytest.raises(ValueError, match=r"model\.family=encoder continues nothing"):
        generate(encoder, torch.zeros(1, 1, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="source has 1 rows and tokens 2: must be as many"):
        generate(model, torch.zeros(2, 1, dtype=torch.long), 2, source=Source(torch.zeros(1, 3, dtype=torch.long)))


@torch.no_grad()
def test_masks_are_filled_with_the_likeliest() -> None:
    tokenizer = WordPiece(vocab_size=120).build(SENTENCES)
    model = network("encoder", tokenizer.vocab_size)
    text, masks = fill_mask(model, tokenizer, "the [MASK] sees a [MASK]", top_k=3)
    ids = [tokenizer.cls_id, *tokenizer.encode("the"), tokenizer.mask_id, *tokenizer.encode("sees a"),
           tokenizer.mask_id, tokenizer.sep_id]  # fmt: skip
    shares = model.logits(model(torch.tensor([ids]))).softmax(-1)[0]
    for mask, place in zip(masks, [i for i, token in enumerate(ids) if token == tokenizer.mask_id], strict=True):
        best = shares[place].topk(3)
        assert [share for _, share in mask] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert [word for word, _ in mask] == [tokenizer.decode([token]).strip() for token in best.indices.tolist()]
    assert "[MASK]" not in text
    (shown,) = complete(model, tokenizer, ["the [MASK] sees"], 5)
    assert shown.splitlines()[1].startswith("  mask 1: ")
    assert len(fill_mask(model, tokenizer, "the cat")[1]) == 1  # asked for the next word
    assert len(fill_mask(model, tokenizer, "cat " * 50 + "[MASK]")[1]) == 1  # beyond the context
    with pytest.raises(ValueError, match=r"model\.family=encoder fills no spans"):
        fill_spans(model, tokenizer, ["the"])


def test_spans_are_filled_where_they_are() -> None:
    tokenizer = Unigram(vocab_size=150, n_sentinels=10).build(SENTENCES * 20)
    model = network("encoder_decoder", tokenizer.vocab_size)
    first, second, third = tokenizer.sentinel_ids[:3]
    cat, dog = tokenizer.encode("cat"), tokenizer.encode("dog runs")
    seen: list[Source] = []

    def write(_: Transformer, start: torch.Tensor, source: Source) -> torch.Tensor:
        seen.append(source)
        told = [tokenizer.pad_id, first, *cat, second, *dog, third, tokenizer.eot_id, first]
        return torch.tensor([told] * len(start))

    prompts = ["the <extra_id_0> sees a <extra_id_1> over", "<extra_id_5> the"]
    filled, other = fill_spans(model, tokenizer, prompts, write=write)
    assert " ".join(filled.split()) == "the cat sees a dog runs over"
    assert "<extra_id_5>" in other  # nothing was said for it
    the, sees = tokenizer.encode("the"), tokenizer.encode("sees a")
    assert seen[0].tokens[0, : len(the) + 1 + len(sees)].tolist() == [*the, first, *sees]  # no space left over
    assert seen[0].documents is not None
    assert seen[0].documents[1].tolist().count(0) > 0
    assert len(fill_spans(model, tokenizer, prompts, 4)) == 2
    beams = complete(model, tokenizer, ["the cat", *prompts], 6, n_beams=3)
    assert len(beams) == 3


def test_what_follows_a_gap_is_tokenised_as_in_the_midst_of_a_text() -> None:
    tokenizer = Unigram(vocab_size=150, n_sentinels=10).build([f"{text} (x): call(x)" for text in SENTENCES] * 20)
    whole, gap = tokenizer.encode("call(x): (x)"), tokenizer.sentinel_ids[0]
    for cut in range(1, len(whole)):
        prompt = (
            f"{tokenizer.decode(whole[:cut])}<extra_id_0>{tokenizer.decode([gap, *whole[cut:]])[len('<extra_id_0>') :]}"
        )
        marked = tokenizer.encode_marked(prompt)
        after = marked[marked.index(gap) + 1 :]
        assert tokenizer.decode([*whole[:cut], *after]) == "call(x): (x)", prompt


def test_a_middle_is_put_between_prefix_and_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteLevelBPE(vocab_size=300, fill_in_the_middle=True).build(SENTENCES)
    model = network("decoder", tokenizer.vocab_size, max_length=48)
    monkeypatch.setattr("llm.generate.text.generate", lambda _, tokens, *a, **k: torch.cat(
        (tokens, torch.tensor([tokenizer.encode(" MIDDLE ")])), 1))  # fmt: skip
    text = continue_text(model, tokenizer, "<fim_prefix>the<fim_suffix>dog<fim_middle>", 9)
    assert text == "the MIDDLE dog"


def test_longer_texts_are_favoured_by_the_penalty_of_the_paper() -> None:
    assert length_penalty(1, 0.6) == 1
    assert length_penalty(7, 0.6) == pytest.approx(math.pow(2, 0.6))
