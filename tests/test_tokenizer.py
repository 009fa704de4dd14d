"""Encoding loses nothing, special tokens never come out of text, and every kind of folder is read."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.tokenizer import END_OF_TEXT, ByteLevelBPE, Bytes, Pretrained, Tokenizer

CODE = "def add(a, b):\n    if a:\n        return a + b\n\n\nclass Café:\n\tname = '日本語 😀'\n"
TEXTS = [
    CODE * 20,
    "The quick brown fox jumps over 12345 lazy dogs.\r\n" * 20,
    " leading and trailing  ",
    "a",
    "ab" * 5000,
]


def run_python(code: str, environment: Mapping[str, str] = os.environ) -> str:
    command, root = [sys.executable, "-c", code], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, encoding="utf8", check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return ByteLevelBPE(400).build(TEXTS)


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tokenizer(request: pytest.FixtureRequest, bpe: Tokenizer) -> Tokenizer:
    return bpe if request.param == "bpe" else Bytes().build()


@given(text=st.text())
@settings(deadline=None, max_examples=200)
def test_any_text_survives_and_its_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[np.array(ids, np.int64)].sum() == len(text.encode())
    assert tokenizer.eot_id not in ids


@pytest.mark.parametrize("text", TEXTS)
def test_whitespace_and_code_survive(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_literal_end_of_text_is_ordinary_text(tokenizer: Tokenizer) -> None:
    text = f"if token == '{END_OF_TEXT}': {END_OF_TEXT}"
    for ids in (tokenizer.encode(text), tokenizer.encode_batch([text, text])[1].tolist()):
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode(ids) == text


def test_training_on_the_literal_does_not_merge_it_into_the_special_token() -> None:
    tokenizer = ByteLevelBPE(300).build([f"{END_OF_TEXT}{END_OF_TEXT} {END_OF_TEXT}\n" * 500])
    assert tokenizer.eot_id not in tokenizer.encode(END_OF_TEXT)
    assert tokenizer.decode(tokenizer.encode(END_OF_TEXT)) == END_OF_TEXT


def test_ids_of_bytes_are_the_bytes() -> None:
    tokenizer = Bytes().build()
    assert tokenizer.encode(CODE) == list(CODE.encode())
    assert (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.pad_id) == (257, 256, 256)
    assert Bytes().vocab_size == 257


def test_a_batch_is_its_texts(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode_batch(TEXTS)
    assert [ids.dtype for ids in batch] == [np.dtype("uint32")] * len(TEXTS)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in TEXTS]


def test_decode_shows_or_hides_special_tokens(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("hi"), tokenizer.eot_id]
    assert tokenizer.decode(ids) == "hi" + END_OF_TEXT
    assert tokenizer.decode(np.array(ids), skip_special=True) == "hi"


def test_a_character_cut_in_two_decodes_to_the_replacement_character() -> None:
    tokenizer = Bytes().build()
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_special_tokens_stand_for_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.eot_id] == 0
    assert (np.delete(tokenizer.token_bytes, tokenizer.eot_id) > 0).all()


def test_saved_and_loaded_is_the_same_for_us_and_for_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.eot_id
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) == theirs.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text


def test_training_does_not_depend_on_threads_or_hash_seed() -> None:
    code = f"from llm.tokenizer import *; print(ByteLevelBPE(400).build({TEXTS!r}).fingerprint)"
    fingerprints = set()
    for threads in "12":
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PYTHONIOENCODING": "utf8"}
        fingerprints.add(run_python(code, environment))
    assert len(fingerprints) == 1


def test_fingerprints_tell_tokenizers_apart(bpe: Tokenizer) -> None:
    assert ByteLevelBPE(400).build(TEXTS).fingerprint == bpe.fingerprint
    assert len({bpe.fingerprint, Bytes().build().fingerprint, ByteLevelBPE(300).build(TEXTS).fingerprint}) == 3


def test_little_text_gives_a_smaller_vocabulary() -> None:
    assert ByteLevelBPE(5000).build(["hello hello"]).vocab_size < 300


def test_indentation_is_one_token_with_its_line_break(bpe: Tokenizer) -> None:
    texts = [bpe.decode([index]) for index in bpe.encode(CODE)]
    assert ":\n        " in texts


def test_importing_loads_neither_torch_nor_tokenizers() -> None:
    code = "import sys, llm.tokenizer; print(sorted({'torch', 'tokenizers', 'transformers'} & set(sys.modules)))"
    assert run_python(code) == "[]"


class TestPretrained:
    def word_piece(self, folder: Path) -> None:
        """As sentence encoders are published: truncation and padding switched on, a template, no end of text."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "wor", "##ld", "the"]
        backend = Backend(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
        backend.enable_truncation(2)
        backend.enable_padding(length=9)
        backend.save(str(folder / "tokenizer.json"))
        config = {"sep_token": {"content": "[SEP]"}, "pad_token": "[PAD]", "tokenizer_class": "BertTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    def test_word_piece_without_its_truncation_padding_and_template(self, tmp_path: Path) -> None:
        self.word_piece(tmp_path)
        recipe = Pretrained(str(tmp_path))
        tokenizer = recipe.build([])
        assert tokenizer.encode("Hello world the hello") == [4, 5, 6, 7, 4]
        assert (recipe.vocab_size, tokenizer.eot_id, tokenizer.pad_id) == (8, 3, 0)
        assert not tokenizer.is_byte_level
        assert tokenizer.token_bytes.tolist() == [0, 0, 0, 0, 6, 4, 2, 4]  # with the space before a word
        tokenizer.save(tmp_path / "again")
        assert Tokenizer.load(tmp_path / "again").fingerprint == tokenizer.fingerprint

    def test_unigram_with_byte_fallback(self, tmp_path: Path) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        scores = [("<unk>", 0.0), ("</s>", 0.0), ("▁hello", -1.0), ("▁", -2.0), ("é", -3.0)]
        scores += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
        backend = Backend(models.Unigram(scores, unk_id=0, byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        spaces = (decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0))
        backend.decoder = decoders.Sequence([spaces[0], decoders.ByteFallback(), decoders.Fuse(), spaces[1]])
        backend.add_special_tokens(["<unk>", "</s>"])
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
        tokenizer = Pretrained(str(tmp_path)).build([])
        assert tokenizer.eot_id == tokenizer.pad_id == 1
        ids = tokenizer.encode("hello é😀")
        assert tokenizer.decode(ids) == "hello é😀"
        assert tokenizer.token_bytes[ids].sum() == len(" hello é😀".encode())

    def test_a_folder_that_only_transformers_reads(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##s"]))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        tokenizer = Pretrained(str(tmp_path)).build([])
        assert tokenizer.encode("Hellos hello") == [5, 6, 5]
        assert (tokenizer.eot_id, tokenizer.pad_id) == (3, 0)

    def test_special_tokens_in_text_are_text(self, tmp_path: Path, bpe: Tokenizer) -> None:
        bpe.save(tmp_path)
        tokenizer = Pretrained(str(tmp_path)).build([])
        assert tokenizer.eot_id not in tokenizer.encode(END_OF_TEXT)

    def test_the_rest_of_its_configuration_travels_along(self, tmp_path: Path, bpe: Tokenizer) -> None:
        bpe.save(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages }}"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        Tokenizer.load(tmp_path).save(tmp_path / "again")
        assert Tokenizer.load(tmp_path / "again").config["chat_template"] == "{{ messages }}"

    def test_errors_name_the_key_and_the_remedy(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"tokenizer\.path=nowhere: no such folder; give one that holds a tokenizer"
        ):
            Pretrained("nowhere")
        with pytest.raises(ValueError, match=r"tokenizer\.path=.*transformers finds no tokenizer in it"):
            Pretrained(str(tmp_path)).build([])
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer that the tokenizers library reads"):
            Pretrained(str(tmp_path)).build([])

    def test_without_transformers_the_remedy_is_to_install_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ValueError, match=r"has no tokenizer\.json; other formats need `pip install transformers`"):
            Pretrained(str(tmp_path)).build([])

    def test_a_tokenizer_that_the_library_cannot_hold(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        transformers = pytest.importorskip("transformers")
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: object())
        with pytest.raises(ValueError, match=r"object has no form for the tokenizers library; convert it"):
            Pretrained(str(tmp_path)).build([])

    def test_no_end_of_text_is_an_error(self, tmp_path: Path) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import models

        Backend(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=r"no token that ends a text; name one as eos_token in tokenizer_config"):
            Pretrained(str(tmp_path)).build([])


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=256: .* at least 257"):
        ByteLevelBPE(256)
