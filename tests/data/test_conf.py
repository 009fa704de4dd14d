"""Every file of conf/data and conf/tokenizer builds what it names, once its open places are filled."""

from pathlib import Path

import pytest
from hydra.utils import instantiate

from llm.data import Files, Hub, Lines, StandardLibrary, TextData
from llm.tokenizer import ByteLevelBPE, Bytes, Pretrained, Unigram, WordPiece
from tests.runs import CONF, composed

DATA = {
    "stdlib": ([], {"python": StandardLibrary()}),
    "files": (["data.path=a.jsonl", "data.column=body"], {"files": Files("a.jsonl", "body")}),
    "text": (["data.sources.text.path=a.txt"], {"text": Files("a.txt", document="paragraph")}),
    "book": (["data.sources.text.path=a.txt"], {"text": Files("a.txt", document="file", val_share=0.1)}),
    "hub": ([], {"hub": Hub("HuggingFaceFW/fineweb-edu", "sample-10BT")}),
    "lines": (["data.sources.lines.paths={en:a.en,de:a.de}"], {"lines": Lines({"en": "a.en", "de": "a.de"})}),
    "banking77": ([], {"banking77": Hub("mteb/banking77", val_split="test")}),
    "mrpc": ([], {"mrpc": Hub("nyu-mll/glue", "mrpc", val_split="validation", column="sentence1")}),
    "multi30k": ([], {"multi30k": Hub("bentrevett/multi30k", val_split="validation", column="en")}),
    "scitldr": ([], {"scitldr": Hub("allenai/scitldr", "Abstract", val_split="validation", column="source")}),
    "smoltalk": ([], {"smoltalk": Hub("HuggingFaceTB/smoltalk", "all", val_split="test", column="messages")}),
    "gsm8k": ([], {"gsm8k": Hub("openai/gsm8k", "main", val_split="test", column="question")}),
    "ultrafeedback": (
        [],
        {
            "ultrafeedback": Hub(
                "HuggingFaceH4/ultrafeedback_binarized", split="train_prefs", val_split="test_prefs", column="prompt"
            )
        },
    ),
    "squad": ([], {"squad": Hub("rajpurkar/squad", val_split="validation", column="context")}),
    "mixture": (
        ["data.sources.files.path=a.jsonl"],
        {"python": StandardLibrary(weight=3.0), "files": Files("a.jsonl", weight=1.0)},
    ),
    "wikipedia_books": (
        [],
        {
            "wikipedia": Hub("wikimedia/wikipedia", "20231101.en", weight=2.5),
            "books": Hub("sedthh/gutenberg_english", column="TEXT", weight=0.8),
        },
    ),
}
TOKENIZER = {
    "bpe": ByteLevelBPE(4096),
    "bytes": Bytes(),
    "pretrained": Pretrained(str(CONF)),
    "unigram": Unigram(4096),
    "wordpiece": WordPiece(4096),
}


def build(*overrides: str) -> TextData:
    return instantiate(composed(overrides, []).data, _convert_="all")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "data").glob("[!_]*.yaml")))
def test_data(name: str) -> None:
    overrides, sources = DATA[name]
    assert build(f"data={name}", *overrides).sources == sources


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "tokenizer").glob("*.yaml")))
def test_tokenizer(name: str) -> None:
    path = [f"tokenizer.path={CONF}"] if name == "pretrained" else []
    assert build(f"tokenizer={name}", *path).recipe == TOKENIZER[name]


def test_the_cache_goes_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_CACHE_DIR", raising=False)
    assert build().cache_dir == Path("~/.cache/llm-on-lightning").expanduser()
    monkeypatch.setenv("LLM_CACHE_DIR", "/elsewhere")
    assert build().cache_dir == Path("/elsewhere")
    assert build("data.cache_dir=/here").cache_dir == Path("/here")
