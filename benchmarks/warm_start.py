"""An encoder-decoder whose encoder is MiniLM's against the same one from nothing:
`python benchmarks/warm_start.py TEXT.jsonl MINILM_FOLDER --minutes 10`.

Both are trained on span denoising with the same settings, tokenizer and steps. MiniLM's tokenizer has no sentinels: the
first hundred of its tokens that no text gives ([unused0] …) are renamed. What came of it goes to
benchmarks/results/warm_start.json and docs/warm_start.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from pretraining import SETTINGS, documents, drawn, measured, n_steps

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "warm_start.json"
PICTURE = ROOT / "docs" / "warm_start.png"
N_SENTINELS = 100
# MiniLM is BERT in small; the decoder is as wide, and two layers deep.
MODEL = [
    *("model=bert_base", "model.family=encoder_decoder", "model.next_sentence=false", "model.dropout=0.0"),
    *("model.dim=384", "model.ffn_dim=1536", "model.n_layers=6", "+model.n_decoder_layers=2"),
]
TRAINING = ["experiment=t5_pretrain", "optimizer.lr=1e-3", "model.tie_embeddings=false"]
PROMPTS = "callback.sample.prompts=['it was a <extra_id_0>, and i']"


def with_sentinels(folder: Path, out: Path) -> None:
    """A copy of the weights, and of the tokenizer with sentinels."""
    out.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        shutil.copy(folder / name, out / name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for number in range(N_SENTINELS):
        name, index = f"<extra_id_{number}>", vocabulary.pop(f"[unused{number}]")
        vocabulary[name] = index
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": index, "content": name, "special": True, **flags})
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))


def main() -> None:
    """Both runs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path, help="JSON lines, maybe .gz, with `text` or `paragraphs`")
    parser.add_argument("encoder", type=Path, help="MiniLM's folder")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, each run")
    parser.add_argument("--steps", type=int, help="of training, each run, in place of the minutes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        documents(options.text, folder / "text.jsonl")
        with_sentinels(options.encoder, folder / "encoder")
        tokenizer = ["tokenizer=pretrained", f"tokenizer.path={folder / 'encoder'}"]
        overrides = [*TRAINING, *MODEL, PROMPTS, *SETTINGS, *tokenizer, f"data.path={folder / 'text.jsonl'}"]
        steps = options.steps or n_steps(overrides, folder / "calibration", options.minutes)
        runs = {"fresh": [], "encoder from MiniLM": [f"init_from={folder / 'encoder'}"]}
        results = {
            name: measured(
                [*overrides, *start, f"schedule.warmup_steps={steps // 10}"], folder / name.partition(" ")[0], steps
            )
            for name, start in runs.items()
        }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    drawn(results, PICTURE)


if __name__ == "__main__":
    main()
