"""A folder as Hugging Face has it: config.json, safetensors and a tokenizer. Never a pickle, which can run code."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from llm.checkpoint.huggingface import settings, weights
from llm.checkpoint.huggingface.weights import Translated
from llm.checkpoint.store import CheckpointError, unused
from llm.model import TransformerConfig
from llm.tokenizer import Tokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
log = logging.getLogger(__name__)


def is_folder(path: str | Path) -> bool:
    """Whether `path` is a folder of Hugging Face's, or a GGUF file, rather than a run of ours."""
    path = Path(path)
    return (path / CONFIG).is_file() or path.suffix == ".gguf"


def read(path: str | Path) -> Translated:
    """The configuration and the weights of a folder, or of a GGUF file, all of them and nothing else.

    Raises:
        CheckpointError: naming each setting that is not honoured and each weight that is missing or left over.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from llm.checkpoint.huggingface.gguf import dequantised

        theirs, tensors = dequantised(path)
    else:
        theirs, tensors = _json(path / CONFIG), _tensors(path)
    architecture = settings.architecture_of(theirs, str(path))
    config = settings.from_theirs(theirs, architecture, str(path / CONFIG))
    return weights.from_theirs(tensors, theirs, architecture, config, str(path))


def configuration(path: str | Path) -> TransformerConfig | None:
    """What config.json says; of a GGUF file, which has to be read whole for that, None.

    Raises:
        CheckpointError: naming each setting that is not honoured.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return None
    theirs = _json(path / CONFIG)
    return settings.from_theirs(theirs, settings.architecture_of(theirs, str(path)), str(path / CONFIG))


def labels_of(path: str | Path) -> list[str]:
    """The names of a classifier's labels in the order of its scores, start and end where those are of an answer's; none
    where they are but numbered."""
    path = Path(path)
    theirs = {} if path.suffix == ".gguf" else _json(path / CONFIG)
    if any(kind.endswith("ForQuestionAnswering") for kind in theirs.get("architectures") or ()):
        return ["start", "end"]
    names = [str(name) for _, name in sorted((theirs.get("id2label") or {}).items(), key=lambda pair: int(pair[0]))]
    numbered = all(name.removeprefix("LABEL_") == str(number) for number, name in enumerate(names))
    return [] if numbered else names


def tokenizer_of(path: str | Path) -> Tokenizer | None:
    """The tokenizer in a folder or GGUF file; None if there is none, or Marian's, which cannot be carried along.

    Raises:
        CheckpointError: if it cannot be read.
    """
    path = Path(path)
    if path.suffix != ".gguf" and not any((path / name).is_file() for name in _TOKENIZERS):
        return None
    if (path / "source.spm").is_file() and not (path / _TOKENIZERS[0]).is_file():
        log.warning("%s: its two SentencePiece models have no form for the tokenizers library: no tokenizer", path)
        return None
    try:
        return Tokenizer.load(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def write(
    config: TransformerConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    out: str | Path,
    labels: Sequence[str] = (),
    *,
    spans: bool = False,
) -> None:
    """A folder that transformers loads; whole or absent. `labels` are the names of a classifier's; with `spans` its two
    scores are those of an answer's start and end.

    Raises:
        CheckpointError: if `out` exists, or no architecture computes what the model does.
    """
    from safetensors.torch import save_file

    out = unused(out)
    pad_id = tokenizer.pad_id if tokenizer is not None else 1
    architecture, theirs = settings.to_theirs(config, pad_id)
    tensors = weights.to_theirs(state, theirs, architecture, config)
    dtype = str(state["embed.weight"].dtype).removeprefix("torch.")
    kind = "BertForPreTraining" if config.next_sentence else architecture.classes[0]
    if config.n_labels is not None:
        kind = f"BertFor{'Sequence' if config.label_of == 'text' else 'Token'}Classification"
        names = dict(enumerate(labels or map(str, range(config.n_labels))))
        theirs |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    if spans:
        kind = "BertForQuestionAnswering"
        tensors = {name.replace("classifier.", "qa_outputs."): tensor for name, tensor in tensors.items()}
    theirs |= {"architectures": [kind], "torch_dtype": dtype} | _ids(config, tokenizer, pad_id)
    with new_folder(out) as folder:
        if tokenizer is not None:
            tokenizer.save(folder)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        _write_json(folder / CONFIG, theirs)
        if config.family != "encoder":
            _write_json(folder / "generation_config.json", _ids(config, tokenizer, pad_id))


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which is `out` once it is whole and on the disk; if something fails there is none."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _ids(config: TransformerConfig, tokenizer: Tokenizer | None, pad_id: int) -> dict[str, Any]:
    """The ids that generation needs. Targets start with padding here."""
    ids: dict[str, Any] = {"pad_token_id": pad_id, "bos_token_id": None, "eos_token_id": None}
    if tokenizer is not None:
        ids |= {"eos_token_id": tokenizer.eot_id, "bos_token_id": tokenizer.start_id}
    if config.family == "encoder_decoder":
        ids["decoder_start_token_id"] = pad_id
        ids["forced_eos_token_id"] = ids["eos_token_id"]
    return ids


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / INDEX).is_file():
        names: dict[str, str] = _json(folder / INDEX)["weight_map"]
        files = sorted({folder / Path(name).name for name in names.values()})
    elif (folder / WEIGHTS).is_file():
        names, files = {}, [folder / WEIGHTS]
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        why = f"only {', '.join(pickles)}, a pickle, which can run code" if pickles else "no weights"
        raise CheckpointError(f"{folder}: {why} - give a folder with {WEIGHTS}, as save_pretrained writes it")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except FileNotFoundError:
            raise CheckpointError(f"{file}: not there, though {INDEX} names it - copy it too") from None
        except SafetensorError as error:
            raise CheckpointError(f"{file}: cannot be read ({error}) - copy it again") from error
    unlike = sorted(set(names) ^ set(tensors)) if names else []
    if unlike:
        raise CheckpointError(f"{folder}: {', '.join(unlike)}: not in both {INDEX} and its files - copy them again")
    return tensors


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: not there - give a folder of Hugging Face's") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error}) - mend it") from None


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
