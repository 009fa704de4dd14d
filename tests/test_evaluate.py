"""Fine-tuning from a run's weights, and evaluating it: command line, scores, predictions."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from llm.__main__ import COMMANDS, CONF, main
from llm.checkpoint import CheckpointError, average, export_folder, find, load, read_tensors
from llm.checkpoint.store import steps
from llm.config import ConfigError
from llm.data import DataError
from llm.data.chat import opened
from llm.evaluate import Decoding, Evaluation, evaluate, table, task_from
from llm.generate import answer, generate
from llm.metric import METRICS, Score
from llm.run import run
from llm.talk import talk
from tests.runs import TINY, Compose, composed

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]
LABELS = ["colour", "number", "animal"]
TASKS = CONF / "data" / "tasks"
PRETRAINED = {"_target_": "llm.model.Pretrained", "dropout": 0.0, "max_length": None}


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Texts whose label their first word tells."""
    kinds = [LABELS[0]] * 3 + [LABELS[1]] * 3 + [LABELS[2]] * 2
    rows = [
        {
            "text": f"{WORDS[n % 8]} {WORDS[(n * 5) % 8]}",
            "label": kinds[n % 8],
            "label_number": LABELS.index(kinds[n % 8]),
        }
        for n in range(120)
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A word, and the same in capitals."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"low": WORDS[n % 8], "high": WORDS[n % 8].upper()}) + "\n" for n in range(160)))
    return path


def classifier(path: Path) -> list[str]:
    return [
        "model=tiny_encoder",
        "objective=classification",
        "tokenizer=wordpiece",
        "tokenizer.vocab_size=120",
        "data/tasks=classification",
        f"data.path={path}",
        "data.tasks.classification.labels=[colour,number,animal]",
        "data.val_every=5",
        "model.dropout=0",
        "optimizer.lr=3e-3",
        "trainer.max_steps=40",
        "trainer.val_check_interval=20",
        "callback.checkpoint.every_n_train_steps=20",
        "callback.checkpoint.save_top_k=2",
    ]


def capitals(path: Path) -> list[str]:
    return [
        "model=tiny_encoder_decoder",
        "objective=seq2seq",
        "data/tasks=text_to_text",
        f"data.path={path}",
        "data.tasks.text_to_text.source='{low}'",
        "data.tasks.text_to_text.target='{high}'",
        "data.val_every=7",
        "callback.sample.prompts=[]",
        "model.dropout=0",
        "model.dim=64",
        "optimizer.lr=5e-3",
        "trainer.max_steps=150",
        "trainer.val_check_interval=150",
    ]


def test_a_classifier_learns_is_evaluated_exported_and_averaged(
    compose_run: Compose, tmp_path: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(compose_run(*classifier(labelled)))
    assert outcome.metrics["val/accuracy"] == 1
    assert outcome.metrics["val/macro_f1"] == pytest.approx(1)
    assert outcome.metrics["val/mcc"] == pytest.approx(1)
    main(["evaluate", str(tmp_path / "run"), "--bootstrap", "20", "--metric", "accuracy", "--metric", "classes"])
    printed = capsys.readouterr().out
    assert "accuracy      100.00  [100.00, 100.00]" in printed
    assert "24 rows" in printed
    main(["generate", str(tmp_path / "run"), "--prompt", "red red", "--prompt", "two two"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("colour ")
    assert second.startswith("number ")
    (tmp_path / "texts.txt").write_text("red red\ntwo two\n")
    main(["generate", str(tmp_path / "run"), "--file", str(tmp_path / "texts.txt")])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"prompt": "red red", "text": first}, {"prompt": "two two", "text": second}]
    swapped = [line.replace("[colour,number,animal]", "[number,colour,animal]") for line in classifier(labelled)]
    with pytest.raises(ConfigError, match=r"data\.tasks: labels: \['number', 'colour', 'animal'\] - .* has \['colour'"):
        run(compose_run(*swapped, "stage=validate"))
    with pytest.raises(
        ConfigError, match=r"--chat: talks with a decoder, and .* has model\.family=encoder and model\.n_l"
    ):
        main_raising(["generate", str(tmp_path / "run"), "--chat"])
    told = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert told[0] == {"id": f"{labelled}:5", "prediction": "number", "references": ["number"]}
    assert json.loads((tmp_path / "run" / "predictions.scores.json").read_text())["scores"]["mcc"]["value"] == 1
    by_number = evaluate(
        tmp_path / "run", ["data.tasks.classification.label=label_number"], metrics=["accuracy"], limit=7
    )
    assert (by_number.scores["accuracy"].value, len(by_number.rows)) == (100, 7)

    mean_of(tmp_path)
    as_transformers_sees_it(tmp_path)


def mean_of(tmp_path: Path) -> None:
    """The mean of two checkpoints, weight by weight."""
    taken = average(tmp_path / "run", tmp_path / "mean", 2)
    assert taken == steps(tmp_path / "run")[-2:]
    first, second, mean = (read_tensors(path, "model.") for path in (*taken, tmp_path / "mean"))
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2)
    main_raising(["evaluate", str(tmp_path / "mean"), "--metric", "accuracy"])
    told = json.loads((tmp_path / "mean.out" / "predictions.scores.json").read_text())
    assert told["scores"]["accuracy"]["value"] > 90
    load(tmp_path / "mean")  # undamaged: with another file in it it would be
    with pytest.raises(CheckpointError, match="has 2 checkpoints, not 3 - train with callback"):
        average(tmp_path / "run", tmp_path / "more", 3)
    with pytest.raises(CheckpointError, match="is there already"):
        average(tmp_path / "run", tmp_path / "mean", 2)


def as_transformers_sees_it(tmp_path: Path) -> None:
    """What it is not: tiny_encoder is no architecture of theirs, and the error says what keeps it."""
    with pytest.raises(CheckpointError, match="no architecture of Hugging Face computes"):
        export_folder(tmp_path / "run", tmp_path / "theirs")


def test_a_pretrained_encoder_becomes_a_classifier(compose_run: Compose, tmp_path: Path, labelled: Path) -> None:
    """Of our own run: the body is taken, the head starts anew; and back out to transformers, with the same scores. Of
    the classifier a classifier of other labels."""
    bert = [
        *("model=bert_base", "model.dim=32", "model.n_layers=2", "model.n_heads=2", "model.ffn_dim=64"),
        *("model.max_length=32", "model.vocab_size=120", "model.next_sentence=false", "model.dropout=0.1"),
    ]
    words = ["tokenizer=wordpiece", "tokenizer.vocab_size=120", f"data.path={labelled}"]
    base = tmp_path / "base"
    run(compose_run(*bert, *words, "objective=masked_lm", "data/tasks=masked_lm", f"run_dir={base}"))
    words = ["tokenizer=pretrained", f"tokenizer.path={base}", f"init_from={base}"]
    tuned = [line for line in classifier(labelled) if not line.startswith(("model", "tokenizer"))]
    cfg = compose_run(*tuned, *words)
    cfg.model = PRETRAINED
    run(cfg)
    model, tokenizer = load(tmp_path / "run")
    assert model.config.n_labels == 3
    assert model.head is None
    assert model.config.dropout == 0
    export_folder(tmp_path / "run", tmp_path / "theirs")
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs").eval()
    assert theirs.config.id2label == dict(enumerate(LABELS))
    ids = torch.tensor([[tokenizer.cls_id, *tokenizer.encode("red two"), tokenizer.sep_id]])
    with torch.no_grad():
        mine = model.label_logits(model(ids)[:, 0])
        torch.testing.assert_close(mine, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    again = [f"init_from={tmp_path / 'run'}", f"run_dir={tmp_path / 'again'}", "optimizer.lr=1e-30"]
    cfg = compose_run(*tuned, *words[:2], *again, "data.tasks.classification.labels=[number,colour,animal]")
    cfg.model = PRETRAINED
    run(cfg)
    before, after = (read_tensors(find(tmp_path / name), "model.") for name in ("run", "again"))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"model.classifier.weight", "model.classifier.bias"}


def test_a_translation_is_learnt_and_scored(compose_run: Compose, tmp_path: Path, pairs: Path) -> None:
    run(compose_run(*capitals(pairs)))
    found = evaluate(tmp_path / "run", metrics=["accuracy", "bleu"], decoding=Decoding(max_new_tokens=8, batch_size=3))
    assert found.scores["accuracy"].value == 100, found.rows[:5]
    assert len(found.rows) == 22
    beams = evaluate(tmp_path / "run", metrics=["accuracy"], decoding=Decoding(max_new_tokens=8, n_beams=3))
    assert beams.scores["accuracy"].value == 100
    model, tokenizer = load(tmp_path / "run")
    prompts = [[*tokenizer.encode(word), tokenizer.eot_id] for word in WORDS]
    together = answer(model, tokenizer, prompts, 8, batch_size=8)
    assert together == [answer(model, tokenizer, [prompt], 8)[0] for prompt in prompts]


def test_words_are_tagged(compose_run: Compose, tmp_path: Path) -> None:
    path = tmp_path / "tagged.jsonl"
    kinds = dict(zip(WORDS, ["colour"] * 3 + ["number"] * 3 + ["animal"] * 2, strict=True))
    rows = [[WORDS[(n * k) % 8] for k in (1, 3, 5)] for n in range(120)]
    path.write_text("".join(json.dumps({"tokens": row, "tags": [kinds[w] for w in row]}) + "\n" for row in rows))
    settings = [line for line in classifier(path) if not line.startswith(("objective", "data/tasks", "data.tasks"))]
    tags = ["objective=token_classification", "data/tasks=token_classification"]
    tags += ["data.tasks.token_classification.labels=[colour,number,animal]"]
    outcome = run(compose_run(*settings, *tags))
    assert outcome.metrics["val/accuracy"] == 1
    found = evaluate(tmp_path / "run")
    assert found.scores["accuracy"].value == 100
    assert found.rows[0]["prediction"] == " ".join(kinds[word] for word in rows[4])


def test_answers_are_found_in_contexts(compose_run: Compose, tmp_path: Path) -> None:
    """The word behind the colour that the question names, in contexts of several windows; some questions have none."""
    path = tmp_path / "questions.jsonl"
    colours, things = WORDS[:3], WORDS[3:]
    rows = []
    for n in range(240):
        parts = [f"{colours[k]} {things[(n * (k + 2) + k) % 5]}" for k in range(3) if n % 4 or k != n % 3]
        wanted = colours[n % 3]
        context = " and ".join(parts)
        at = context.find(wanted)
        answers = [] if at < 0 else [{"text": context[at:].split()[1], "answer_start": at + len(wanted) + 1}]
        rows.append({"question": wanted, "context": context, "answers": answers})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [line for line in classifier(path) if not line.startswith(("objective", "data/tasks", "data.tasks"))]
    settings += ["objective=span_extraction", "data/tasks=question_answering", "trainer.max_steps=250"]
    settings += ["data.tasks.question_answering.no_answer=true", "data.tasks.question_answering.stride=4"]
    settings += [
        "data.max_length=16",
        "data.batch_size=16",
        "data.micro_batch_size=16",
        "trainer.val_check_interval=250",
    ]
    run(compose_run(*settings))
    found = evaluate(tmp_path / "run")
    assert found.scores["exact"].value > 90, [row for row in found.rows if row["prediction"] not in row["references"]]
    assert {tuple(row["references"]) == () for row in found.rows} == {True, False}


def test_answers_are_found_from_given_weights(compose_run: Compose, tmp_path: Path) -> None:
    """A model of other weights gets labels of its tokens, not of its texts; what contradicts that is refused."""
    path = tmp_path / "questions.jsonl"
    row = {"question": "red", "context": "one two red three", "answers": [{"text": "three", "answer_start": 12}]}
    path.write_text(f"{json.dumps(row)}\n" * 24)
    settings = [line for line in classifier(path) if not line.startswith(("objective", "data/tasks", "data.tasks"))]
    settings += ["objective=span_extraction", "data/tasks=question_answering", "trainer.max_steps=2"]
    run(compose_run(*settings, "schedule.warmup_steps=0", f"run_dir={tmp_path / 'base'}"))
    common = [line for line in (*TINY, *settings) if not line.startswith(("model", "tokenizer"))]
    taken = ["model=pretrained", f"init_from={tmp_path / 'base'}", "tokenizer=pretrained"]
    taken += [f"tokenizer.path={tmp_path / 'base'}", "schedule.warmup_steps=0", f"run_dir={tmp_path / 'run'}"]
    run(composed(taken, common))
    assert load(tmp_path / "run")[0].config.label_of == "token"
    assert set(evaluate(tmp_path / "run").scores) == {"exact", "f1"}


def test_what_cannot_be_evaluated_says_why(compose_run: Compose, tmp_path: Path, pairs: Path) -> None:
    run(compose_run(*capitals(pairs), "trainer.max_steps=1", "schedule.warmup_steps=0"))
    with pytest.raises(ConfigError, match="--metric: blue - there is none of this name - take bleu"):
        evaluate(tmp_path / "run", metrics=["blue"])
    with pytest.raises(ConfigError, match=r"model.dim=3: is no key of data"):
        evaluate(tmp_path / "run", ["model.dim=3"])
    with pytest.raises(ConfigError, match="task=clozes - there is none of this name - take causal_lm, classification"):
        main_raising(["evaluate", str(tmp_path / "run"), "task=clozes"])
    with pytest.raises(DataError, match="no such file"):
        evaluate(tmp_path / "run", ["data.path=nowhere.jsonl"])
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n' * 8)
    with pytest.raises(DataError, match="no column 'low' for source"):
        evaluate(tmp_path / "run", [f"data.path={tmp_path / 'other.jsonl'}"])


def test_imported_weights_are_evaluated_wherever_they_lie(
    compose_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = ["model.qk_norm=false", "model.norm=rms", "model.activation=swiglu", "model.dropout=0"]
    run(compose_run(*llama, "trainer.max_steps=1", "schedule.warmup_steps=0"))
    export_folder(tmp_path / "run", tmp_path / "theirs")
    odd = tmp_path / "lr=1e-3, [a] {b} it's"
    main_raising(["import", str(tmp_path / "theirs"), str(odd)])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a dog"}\n')
    main_raising(["evaluate", str(odd), "task=perplexity", f"data.path={rows}", "--out", str(tmp_path / "out.jsonl")])
    assert re.search(r"^word_perplexity +\d", capsys.readouterr().out, re.MULTILINE)
    for given in (["task=perplexity"], [f"data.path={rows}"]):
        with pytest.raises(ConfigError, match=r"was trained for no task here - give task=NAME and data\.path=FILE"):
            main_raising(["evaluate", str(odd), *given])


def test_what_would_fail_at_the_end_is_refused_at_the_beginning(
    compose_run: Compose, tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(compose_run(*capitals(pairs), "trainer.max_steps=1", "schedule.warmup_steps=0"))
    command = ["evaluate", str(tmp_path / "run"), "--limit", "2", "--max-new-tokens", "2"]
    with monkeypatch.context() as patch:
        patch.setattr("llm.evaluate.load", lambda step: pytest.fail("the model was loaded"))
        with pytest.raises(ConfigError, match=r"--out: .* - is a folder - name a file"):
            main_raising([*command, "--out", str(tmp_path)])
        with pytest.raises(ConfigError, match=r"--out: .* - one of the folders in it is a file - name another place"):
            main_raising([*command, "--out", str(pairs / "below" / "out.jsonl")])
        patch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
        with pytest.raises(ConfigError, match="rouge_score is not installed: pip install"):
            main_raising([*command, "--metric", "rouge"])
    monkeypatch.setitem(METRICS, "bleu", lambda *arguments: pytest.fail("no scores"))
    with pytest.raises(pytest.fail.Exception, match="no scores"):
        main_raising([*command, "--metric", "bleu", "--out", str(tmp_path / "out.jsonl")])
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_half_a_surrogate_pair_is_written_as_json_has_it(tmp_path: Path) -> None:
    Evaluation(rows=[{"id": "a", "prediction": "\ud800 é"}]).write(tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["prediction"] == "\ud800 é"


def main_raising(arguments: list[str]) -> None:
    """A command without what turns its errors into exit codes."""
    COMMANDS[arguments[0]](arguments[1:])


def test_texts_are_compared_by_likelihood(
    compose_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Choices, contexts to choose, and endings, against sums of the network's own log-probabilities."""
    run(compose_run("trainer.max_steps=3", "model.max_length=64", "data.max_length=32"))
    model, tokenizer = load(tmp_path / "run")

    def nats(context: str, end: str) -> float:
        before, after = [tokenizer.start_id, *tokenizer.encode(context)], tokenizer.encode(end)
        with torch.no_grad():
            table = model.logits(model(torch.tensor([[*before, *after]])))[0].log_softmax(-1)
        return -sum(table[len(before) - 1 + at, token].item() for at, token in enumerate(after))

    rows = [{"query": f"the {w}", "choices": ["cat", "dogs run", w * 2], "gold": n % 3} for n, w in enumerate(WORDS)]
    path = tmp_path / "choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(tmp_path / "run", [f"data.path={path}"], task_from(TASKS, "multiple_choice"), n_bootstrap=10)
    totals = [[nats(row["query"], f" {choice}") for choice in row["choices"]] for row in rows]
    for told, total in zip(found.rows, totals, strict=True):
        assert told["nats"] == pytest.approx(total, abs=1e-3)
    right = [total.index(min(total)) == row["gold"] for total, row in zip(totals, rows, strict=True)]
    assert found.scores["accuracy"].value == pytest.approx(100 * sum(right) / 8)
    by_byte = [
        [n / len(c) for n, c in zip(total, row["choices"], strict=True)]
        for total, row in zip(totals, rows, strict=True)
    ]
    right = [one.index(min(one)) == row["gold"] for one, row in zip(by_byte, rows, strict=True)]
    assert found.scores["accuracy_norm"].value == pytest.approx(100 * sum(right) / 8)

    contexts = [{"options": ["the cat", "a dog"], "end": "runs", "gold": n % 2} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in contexts))
    settings = [f"data.path={path}"]
    settings += [
        f"data.tasks.multiple_choice.{key}" for key in ("choices=options", "context='{choice}'", "continuation='{end}'")
    ]
    found = evaluate(tmp_path / "run", settings, task_from(TASKS, "multiple_choice"))
    assert found.rows[0]["nats"] == pytest.approx([nats("the cat", " runs"), nats("a dog", " runs")], abs=1e-3)

    endings = [{"context": f"the {word}", "continuation": word} for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in endings))
    main(["evaluate", str(tmp_path / "run"), "task=cloze", f"data.path={path}"])
    printed = capsys.readouterr().out
    n_tokens = sum(len(tokenizer.encode(f" {word}")) for word in WORDS)
    perplexity = math.exp(sum(nats(f"the {word}", f" {word}") for word in WORDS) / n_tokens)
    assert f"perplexity  {perplexity:8.2f}" in printed


def test_a_long_name_is_apart_from_its_score() -> None:
    found = Evaluation(scores={"a": Score(1.0), "name_of_a_score_with_points": Score(100.0)})
    assert table(found).splitlines()[:2] == [f"a{'1.00':>35}", "name_of_a_score_with_points   100.00"]


def test_whole_texts_are_read_in_windows(
    compose_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every token once, each from all that its window shows before it: against one forward for every token."""
    run(compose_run("trainer.max_steps=3", "model.max_length=32", "data.max_length=32"))
    model, tokenizer = load(tmp_path / "run")
    texts = ["the cat runs " * 9, "a dog", "", "é" * 40]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def nats(text: str, stride: int) -> float:
        ids, total = [tokenizer.start_id, *tokenizer.encode(text)], 0.0
        for at in range(1, len(ids)):
            first = 1 + (at - 1) // stride * stride  # of the window's new tokens
            last = min(first + stride, len(ids)) - 1
            seen = ids[max(0, last + 1 - 32) : at]
            with torch.no_grad():
                total -= model.logits(model(torch.tensor([seen])))[0, -1].log_softmax(-1)[ids[at]].item()
        return total

    for stride, given in ((16, "null"), (1, "1"), (31, "99")):
        settings = [f"data.path={path}", f"data.tasks.perplexity.stride={given}"]
        found = evaluate(tmp_path / "run", settings, task_from(TASKS, "perplexity"), n_bootstrap=20)
        wanted = [nats(text, stride) for text in texts if text]
        assert [row["nats"] for row in found.rows] == pytest.approx(wanted, abs=2e-3)
        assert found.skipped == {"the text is empty": 1}
        n_bytes = sum(len(text.encode()) for text in texts)
        score = found.scores["bits_per_byte"]
        assert score.value == pytest.approx(sum(wanted) / math.log(2) / n_bytes, rel=1e-4)
        assert score.low is not None
        assert score.high is not None
        assert score.low <= score.value <= score.high
        n_words = sum(len(text.split()) for text in texts)
        assert found.scores["word_perplexity"].value == pytest.approx(math.exp(sum(wanted) / n_words), rel=1e-3)
        n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
        assert found.scores["perplexity"].value == pytest.approx(math.exp(sum(wanted) / n_tokens), rel=1e-3)
    with pytest.raises(ConfigError, match=r"--metric: bleu - data\.tasks\.perplexity has scores of its own"):
        evaluate(tmp_path / "run", [f"data.path={path}"], task_from(TASKS, "perplexity"), metrics=["bleu"])
    (tmp_path / "other.jsonl").write_text('{"body": "a dog"}\n' * 3)
    with pytest.raises(DataError, match=r"no row is an example of data\.tasks\.perplexity; 3 left out: .*'text'"):
        evaluate(tmp_path / "run", [f"data.path={tmp_path / 'other.jsonl'}"], task_from(TASKS, "perplexity"))
    main(["evaluate", str(tmp_path / "run"), "task=perplexity", f"data.path={path}"])
    assert "bits_per_byte" in capsys.readouterr().out


def test_programs_are_run_when_that_is_allowed(compose_run: Compose, tmp_path: Path) -> None:
    """Whatever an untrained model writes: the right program is given away by the prompt, or the tests want nothing."""
    run(compose_run("trainer.max_steps=1", "schedule.warmup_steps=0", "model.max_length=64"))
    rows = [
        {"prompt": "def f():\n    return 1\n#", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"},
        {"prompt": "def f():\n    return 2\n#", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"},
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_from(TASKS, "code")
    task["code"]["stop"] = ["\n", "\r", "\0", "\f"]
    with pytest.raises(ConfigError, match="runs programs that a model has written, as you - add --run-programs"):
        evaluate(tmp_path / "run", [f"data.path={path}"], task)
    decoding = Decoding(max_new_tokens=4)
    found = evaluate(tmp_path / "run", [f"data.path={path}"], task, decoding=decoding, run_programs=True)
    assert found.scores["pass@1"].value == 50
    assert [row["verdict"] for row in found.rows] == ["passed", "failed: AssertionError"]


def test_it_talks(
    compose_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is streamed is what the whole text would be, and a long conversation forgets its beginning."""
    run(compose_run("trainer.max_steps=4", "model.max_length=96", "data.max_length=32"))
    model, tokenizer = load(tmp_path / "run")
    written: list[str] = []
    turns = talk(model, tokenizer, ["hi", "and then " * 6], written.append, max_new_tokens=12, temperature=0)
    assert [turn.role for turn in turns][-2:] == ["user", "assistant"]
    ids = opened([turns[-2]], tokenizer)
    assert len(turns) == 2  # the first two are forgotten
    tokens = generate(model, torch.tensor([ids]), 12, temperature=0, eos_id=tokenizer.eot_id)[0, len(ids) :]
    assert turns[-1].content == tokenizer.decode(tokens.tolist(), skip_special=True).strip()
    assert "".join(written).strip().endswith(turns[-1].content)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nwho\n"))
    main(["generate", str(tmp_path / "run"), "--chat", "--max-new-tokens", "5", "--temperature", "0"])
    (tmp_path / "prompts.txt").write_bytes("\ufeffa\r\nb\u2028c\n".encode())
    capsys.readouterr()
    main(["generate", str(tmp_path / "run"), "--file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "5"])
    told = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert [one["prompt"] for one in told] == ["a", "b\u2028c"]
    assert all(one["text"].startswith(one["prompt"]) for one in told)
    (tmp_path / "prompts.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(SystemExit, match="64"):
        main(["generate", str(tmp_path / "run"), "--file", str(tmp_path / "prompts.txt")])
    assert "prompts.txt - is no UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["objective=classification", "model=tiny_encoder"],
            "objective: chooses a label - data.tasks .causal_lm. want tokens",
        ),
        (
            ["data/tasks=text_to_text"],
            "model.family: decoder - data.tasks .text_to_text. make rows for encoder_decoder",
        ),
    ],
)
def test_what_does_not_fit_the_task_is_refused(compose_run: Compose, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(compose_run(*overrides))


def test_a_pretrained_model_wants_weights(compose_run: Compose) -> None:
    cfg = compose_run()
    cfg.model = PRETRAINED
    with pytest.raises(ConfigError, match="model: pretrained - is that of the weights to start from - set init_from="):
        run(cfg)


def test_find_is_not_fooled(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        find(tmp_path)
