"""`python -m llm COMMAND`: what a user does beside training."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llm.cluster import commands as cluster
from llm.command import CONF, Parser, at_least, beside, compose
from llm.plan import commands as planning
from llm.submit import commands as submitting
from llm.sweep import commands as sweep

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Generator

    from llm.model import Transformer
    from llm.tokenizer import Tokenizer


def prepare(arguments: Sequence[str]) -> None:
    """Make the tokenizer and the token cache that train.py with the same overrides will use."""
    parser = Parser("python -m llm prepare", description=prepare.__doc__)
    parser.add_argument("--list", action="store_true", help="show what data.cache_dir holds, and make nothing")
    parser.add_argument("--clean", action="store_true", help="empty data.cache_dir, and make nothing")
    parser.add_argument(
        "--share",
        metavar="K/N",
        help="tokenise share K of N, from 0; who ends last merges them",
    )
    options, overrides = parser.parse_known_args(list(arguments))
    cfg = compose(overrides)
    cache_dir = Path(cfg.data.cache_dir).expanduser()
    if options.list or options.clean:
        from llm.data.cache import caches, remove_caches

        found = caches(cache_dir)
        print("\n".join(f"{cache.n_bytes / 1e6:9.1f} MB  {cache.path}" for cache in found) or f"{cache_dir}: nothing")
        if options.clean:
            print(f"{remove_caches(cache_dir) / 1e6:.1f} MB freed")
        return
    from llm.run import prepare as prepare_data

    number, _, of = (options.share or "0/1").partition("/")
    if not (number.isdecimal() and of.isdecimal()):
        parser.error(f"--share {options.share}: give K/N, as 2/4 for the third of four")
    prepare_data(cfg, None if options.share is None else (int(number), int(of)))


def stage(arguments: Sequence[str]) -> None:
    """Copy the data that a run reads to a folder of this node's own, for data.cache_dir: what slurm/job.sh does."""
    parser = Parser("python -m llm stage", description=stage.__doc__)
    parser.add_argument("folder", type=Path, help="to make, or to add to")
    options, overrides = parser.parse_known_args(list(arguments))
    from llm.run import stage as stage_data

    stage_data(compose(overrides), options.folder)


def _generate_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m llm generate", description=generate.__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints/step-*")
    parser.add_argument("--prompt", action="append", help="text to complete; may be given several times")
    parser.add_argument("--file", type=Path, help="a prompt in each line; a JSON line with prompt and text for each")
    parser.add_argument("--chat", action="store_true", help="talk: what you write, line by line, is answered")
    parser.add_argument("--system", help="with --chat: what the system says first")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=None, help="draw from the k likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="draw from the likeliest tokens with this probability"
    )
    parser.add_argument("--n-beams", type=int, default=1, help="more than 1 search for the likeliest text")
    parser.add_argument("--alpha", type=float, default=0.6, help="with beams, how much longer texts are favoured")
    parser.add_argument("--stop", action="append", default=[], help="a text at which what is written ends")
    parser.add_argument("--seed", type=at_least(0, most=2**64 - 1), default=0)
    parser.add_argument("--adapter", metavar="RUN", help="run with adapter=lora that began with this one's weights")
    options = parser.parse_args(list(arguments))
    given = [f"--{name}" for name in ("prompt", "file", "chat") if getattr(options, name)]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)}: one of them at a time")
    if options.system is not None and not options.chat:
        parser.error("--system: goes with --chat")
    if "" in options.stop:
        parser.error("--stop: is empty, and every text begins with that; give the text at which to end")
    for name in ("stop", "n_beams", "alpha"):
        if options.chat and getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')}: does not go with --chat, which draws until a turn ends")
    return options


def generate(arguments: Sequence[str]) -> None:
    """Complete prompts with the model of a run: continue them, or fill their [MASK] or <extra_id_0>, <extra_id_1> …, or
    say which label they have; or talk with it."""
    options = _generate_options(arguments)
    import torch

    from llm.checkpoint import load, put_on
    from llm.config import ConfigError

    model, tokenizer = load(options.run)
    if options.adapter is not None:
        put_on(model, options.adapter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    prompts = options.prompt or [""]
    if options.file is not None:
        try:
            lines = options.file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")  # no others end one
        except UnicodeDecodeError as error:
            raise ConfigError([f"--file: {options.file} - is no UTF-8 ({error}) - convert it"]) from None
        prompts = [line.removesuffix("\r") for line in lines]
    generator = torch.Generator(device).manual_seed(options.seed)
    family, n_labels = model.config.family, model.config.n_labels
    if options.chat and (family != "decoder" or n_labels is not None):
        has = f"model.family={family}" + ("" if n_labels is None else f" and model.n_labels={n_labels}")
        raise ConfigError([f"--chat: talks with a decoder, and {options.run} has {has} - give --prompt or --file"])
    try:
        if options.chat:
            _chat(model, tokenizer, options, generator)
            return
        if model.config.n_labels is not None:
            texts = _labelled(model, tokenizer, options.adapter or options.run, prompts)
        else:
            texts = _completed(model, tokenizer, prompts, options, generator)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if options.file is not None:
        pairs = zip(prompts, texts, strict=True)
        texts = [json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) for prompt, text in pairs]
    print("\n".join(texts))


def _completed(
    model: Transformer, tokenizer: Tokenizer, prompts: list[str], options: argparse.Namespace, generator: Generator
) -> list[str]:
    """The text of each prompt."""
    from llm.generate import complete

    names = ("temperature", "top_k", "top_p", "n_beams", "alpha", "stop")
    settings = {name: getattr(options, name) for name in names}
    return complete(model, tokenizer, prompts, options.max_new_tokens, generator=generator, **settings)


def _chat(model: Transformer, tokenizer: Tokenizer, options: argparse.Namespace, generator: Generator) -> None:
    """Answer what is typed, until the end of the input."""
    from llm.talk import talk

    drawing = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")} | {"generator": generator}
    write = partial(print, end="", flush=True)
    length = options.max_new_tokens
    talk(model, tokenizer, _lines(), write, system=options.system, max_new_tokens=length, **drawing)


def _lines() -> Iterator[str]:
    """What is typed, until the end of the input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _labelled(model: Transformer, tokenizer: Tokenizer, run: str, prompts: list[str]) -> list[str]:
    """A line for each text: its likeliest labels."""
    from llm.checkpoint import find, labels_of
    from llm.config import ConfigError
    from llm.data.labelling import read_by_encoder
    from llm.generate.classify import label_scores

    names, _ = labels_of(find(run))
    if model.config.label_of != "text":
        raise ConfigError([f"{run}: labels no whole texts - python -m llm evaluate {run} answers rows of data"])
    room = model.config.max_length - 2
    shown = [read_by_encoder([ids[:room]], tokenizer) for ids in tokenizer.encode_batch(prompts)]
    lines = []
    for scores in label_scores(model, shown, tokenizer.pad_id):
        shares, labels = scores[0].softmax(-1).topk(min(5, scores.shape[-1]))
        pairs = zip(shares.tolist(), labels.tolist(), strict=True)
        lines.append("  ".join(f"{names[label] if names else label} {share:.1%}" for share, label in pairs))
    return lines


def evaluate(arguments: Sequence[str]) -> None:
    """Score a run on held-out rows of its data, or all of data.path=FILE, by a task's metrics (docs/finetuning.md):
    that of its training, or task=NAME of conf/data/tasks."""
    parser = Parser("python -m llm evaluate", description=evaluate.__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints/step-*")
    parser.add_argument(
        "--metric", action="append", default=[], help="instead of the task's; may be given several times"
    )
    parser.add_argument("--max-new-tokens", type=at_least(1), default=128)
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--n-beams", type=at_least(1), default=1, help="more than 1 search for the likeliest text")
    parser.add_argument(
        "--alpha", type=at_least(0.0, float), default=0.6, help="with beams, how much longer texts are favoured"
    )
    parser.add_argument("--temperature", type=at_least(0.0, float), default=0.0, help="0 takes the likeliest token")
    parser.add_argument(
        "--bootstrap", type=at_least(0), default=0, metavar="N", help="95%% intervals from N drawings of the rows"
    )
    parser.add_argument("--limit", type=at_least(1), help="so many rows at most")
    parser.add_argument("--run-programs", action="store_true", help="task=code: run what the model writes, with limits")
    parser.add_argument("--out", type=Path, help="where predictions go (default RUN/predictions.jsonl)")
    options, overrides = parser.parse_known_args(list(arguments))
    chosen = [override for override in overrides if override.startswith("task=")]
    overrides = [override for override in overrides if override not in chosen]
    from llm.evaluate import Decoding, table, task_from
    from llm.evaluate import evaluate as scored

    names = ("max_new_tokens", "batch_size", "n_beams", "alpha", "temperature")
    decoding = Decoding(**{name: getattr(options, name) for name in names})
    task = task_from(CONF / "data" / "tasks", chosen[-1].removeprefix("task=")) if chosen else None
    out = options.out or beside(Path(options.run)) / "predictions.jsonl"
    found = scored(
        options.run,
        overrides,
        task,
        options.metric,
        decoding,
        n_bootstrap=options.bootstrap,
        limit=options.limit,
        settings=_settings_of_weights,
        run_programs=options.run_programs,
        out=out,
    )
    print(f"{table(found)}\n{out}: every prediction; {out.with_suffix('.scores.json').name}: the scores")


def import_weights(arguments: Sequence[str]) -> None:
    """Make a checkpoint of ours from a folder of Hugging Face's (docs/huggingface.md)."""
    parser = Parser("python -m llm import", description=import_weights.__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="folder with config.json and safetensors, or a .gguf file")
    parser.add_argument("out", metavar="OUT", help="directory to make, for generate, init_from= and export")
    options = parser.parse_args(list(arguments))
    from llm.checkpoint import import_folder

    anew, unused = import_folder(options.folder, options.out)
    print(f"{options.out}: written")
    for what, names in (("not in it, so new", anew), ("has no place here, so left out", unused)):
        if names:
            print(f"{options.folder}: {what}: {', '.join(names)}")


def export_weights(arguments: Sequence[str]) -> None:
    """Make a folder that transformers loads from a run (docs/huggingface.md)."""
    parser = Parser("python -m llm export", description=export_weights.__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints/step-*")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--adapter", action="store_true", help="of a run with adapter=lora the adapter alone, for peft")
    options = parser.parse_args(list(arguments))
    from llm.checkpoint import export_folder, write_peft

    (write_peft if options.adapter else export_folder)(options.run, options.out)
    print(f"{options.out}: written")


def average_weights(arguments: Sequence[str]) -> None:
    """Make a checkpoint of the mean of a run's last checkpoints, which is often better than the last one."""
    parser = Parser("python -m llm average", description=average_weights.__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("out", metavar="OUT", help="directory to make, for generate, evaluate, init_from= and export")
    parser.add_argument("--last", type=at_least(1), default=5, metavar="N", help="of so many checkpoints (default 5)")
    options = parser.parse_args(list(arguments))
    from llm.checkpoint import average

    taken = average(options.run, options.out, options.last)
    print(f"{options.out}: the mean of {', '.join(step.name for step in taken)}")


def audit(arguments: Sequence[str]) -> None:
    """Prove from a run's ledger that no sample was lost or used twice, or show what steps were trained on."""
    parser = Parser("python -m llm audit", description=audit.__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--step", type=int, help="show the text of one step")
    parser.add_argument("--steps", metavar="A:B", help="which sources steps A to B were of, most unusual first")
    options = parser.parse_args(list(arguments))
    from llm.audit import check, show_step, show_window

    if options.step is not None:
        print(show_step(options.run, options.step))
    elif options.steps is not None:
        first, _, last = options.steps.partition(":")
        if not (first.isdecimal() and last.isdecimal()):
            parser.error(f"--steps {options.steps}: give two steps, as 100:200")
        print(show_window(options.run, int(first), int(last)))
    else:
        report, sound = check(options.run)
        print(report)
        if not sound:
            sys.exit(74)


def verify(arguments: Sequence[str]) -> None:
    """Prove that runs of a configuration survive interruptions bit for bit: a short one, interrupted and continued."""
    parser = Parser("python -m llm verify", description=verify.__doc__)
    parser.add_argument("--steps", type=int, default=12, help="of the short run, at least 8")
    parser.add_argument("--out", type=Path, help="directory to make, for certificate.json (default runs/verify-TIME)")
    options, overrides = parser.parse_known_args(list(arguments))
    if options.steps < 8:
        parser.error(f"--steps {options.steps}: give at least 8")
    out = options.out or Path("runs") / time.strftime("verify-%Y-%m-%d_%H-%M-%S")
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out {out}: is not empty; give another directory")
    cfg = compose(overrides)
    from llm import verify as certificate

    made = certificate.plan(cfg, overrides, options.steps)
    print(f"{out}: {options.steps} steps at a time", flush=True)
    rows = certificate.verify(made, out, certificate.train_in_process, partial(print, flush=True))
    passed = certificate.write_certificate(out, made, rows)
    print(certificate.table(rows))
    print(f"{out / 'certificate.json'}: {'passed' if passed else 'NOT PASSED'}")
    if not passed:
        sys.exit(1)


def coordinates(arguments: Sequence[str]) -> None:
    """Check whether what a configuration learns in a step is as large at every width (docs/transfer.md)."""
    parser = Parser("python -m llm coordinates", description=coordinates.__doc__)
    parser.add_argument("--widths", default="32,64,128,256", help="of the residual stream (default 32,64,128,256)")
    parser.add_argument("--steps", type=int, default=4, help="that are trained at each width (default 4)")
    parser.add_argument("--seeds", type=int, default=2, help="runs whose mean is taken (default 2)")
    parser.add_argument("--out", type=Path, help="folder for coordinates.json and .png (default runs/coordinates-TIME)")
    options, overrides = parser.parse_known_args(list(arguments))
    widths = options.widths.split(",")
    if not all(width.isdecimal() and int(width) for width in widths) or len(set(widths)) < 2:
        parser.error(f"--widths {options.widths}: give two or more, as 32,64,128,256")
    for name in ("steps", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give at least 1")
    out = options.out or Path("runs") / time.strftime("coordinates-%Y-%m-%d_%H-%M-%S")
    cfg = compose(overrides)
    from llm import coordinates as coordinate_check

    say = partial(print, flush=True)
    found = coordinate_check.check(cfg, sorted(map(int, widths)), options.steps, options.seeds, say)
    coordinate_check.write(found, out)
    print(coordinate_check.table(found))
    print(f"{out / 'coordinates.png'}: model.parametrization={found.parametrization}: ", end="")
    print("passed" if found.passed else "NOT PASSED")
    if not found.passed:
        sys.exit(1)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "prepare": prepare,
    "stage": stage,
    "generate": generate,
    "evaluate": evaluate,
    "import": import_weights,
    "export": export_weights,
    "average": average_weights,
    "audit": audit,
    "verify": verify,
    "coordinates": coordinates,
    "plan": planning.plan,
    "report": sweep.report,
    "submit": submitting.submit,
    "status": cluster.status,
    "logs": cluster.logs,
    "cancel": cluster.cancel,
    "where": submitting.where,
    "combination": submitting.combination,
}


def main(arguments: Sequence[str]) -> None:
    """Run a command; mistakes of the user's are one line and an exit code, as for train.py."""
    asked = not arguments or arguments[0] in ("-h", "--help")
    if asked or arguments[0] not in COMMANDS:
        lines = [f"  {name:<12}{function.__doc__}" for name, function in COMMANDS.items()]
        print("usage: python -m llm COMMAND …\n" + "\n".join(lines), file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 64)
    from llm.exit import guarded

    with guarded():
        COMMANDS[arguments[0]](arguments[1:])


def _settings_of_weights(step: Path) -> DictConfig:
    """Of a run that reads files by the tokenizer of a step directory: for what was imported, and has none."""
    from llm.config import quoted

    tokenizer = ["tokenizer=pretrained", f"tokenizer.path={quoted(step / 'tokenizer')}"]
    return compose(["data=files", "data.path=rows", "logger=none", *tokenizer])


if __name__ == "__main__":
    main(sys.argv[1:])
