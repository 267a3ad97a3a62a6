"""experiments/bert_finetune_*.py on small files: trained, evaluated, loaded, called, and read by transformers."""

import json

import numpy as np
import pytest
from models.tiny_text import random_params

import mmjax
from mmjax import cli, hub
from mmjax.errors import MmjaxError
from mmjax.models.bert.network import BertConfig
from mmjax.models.bert.tasks import BertModel
from mmjax.text.training import train_wordpiece
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train

WORDS = ("red", "green", "blue", "hen", "cow", "dog", "runs", "sleeps", "and", "the")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A BERT with a tokenizer and two pretraining heads, which fine-tuning does not load."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = train_wordpiece([" ".join(WORDS), "what runs?"] * 2, 110)
    config = BertConfig(tokenizer.vocab_size, 12, 1, 2, 16, 32, mlm=True, nsp=True)
    hub.save(BertModel(config, random_params(BertModel, config), tokenizer=tokenizer), folder)
    return folder


def sentences(n=80):
    rng = np.random.default_rng(5)
    return [[*rng.choice(WORDS[:3], 1), *rng.choice(WORDS[3:6], 1), *rng.choice(WORDS[6:], 3)] for _ in range(n)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    every = sentences()
    rows = "".join(f"{number}\t{' '.join(words)}\t{words[1]}\n" for number, words in enumerate(every))
    (folder / "texts.tsv").write_text("id\tsentence\tlabel\n" + rows)
    rows = "".join(f"{' '.join(w[:2])},{' '.join(w[2:])},{len(w[1]) + 0.5}\n" for w in every)
    (folder / "pairs.csv").write_text("one,two,score\n" + rows)
    tagged = ([f"{word} {'B-ANIMAL' if i == 1 else 'O'}" for i, word in enumerate(words)] for words in every)
    (folder / "tags.txt").write_text("\n\n".join("\n".join(lines) for lines in tagged) + "\n")
    paragraphs = [
        {
            "context": " ".join(words),
            "qas": [
                {
                    "id": f"{i}",
                    "question": "what runs?",
                    "answers": [{"text": words[1], "answer_start": len(words[0]) + 1}],
                },
                {"id": f"{i} none", "question": "what?", "answers": [], "is_impossible": True},
            ],
        }
        for i, words in enumerate(every)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return folder


def recipe(repository, kind):
    return load_experiment(repository / "experiments" / f"bert_finetune_{kind}.py")


def run(repository, kind, pretrained, workdir, steps=60, **fields):
    config = recipe(repository, kind)(
        steps=steps, batch_size=16, init_from=str(pretrained), learning_rate=2e-2, dropout=0.0, length=16, **fields
    )
    file = repository / "experiments" / f"bert_finetune_{kind}.py"
    return config, train(config, workdir, lambda source: {}, str(file))


def reads_the_same(model, folder, kind, **inputs):
    """transformers has the same outputs on the exported folder."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    mmjax.export(model, folder, "hf")
    reference = getattr(transformers, kind).from_pretrained(folder)
    tensors = {name: torch.from_numpy(np.asarray(array, np.int64)) for name, array in inputs.items()}
    with torch.no_grad():
        out, outputs = reference(**tensors), model.forward(**inputs)
    for name in ("start_logits", "end_logits") if kind.endswith("Answering") else ("logits",):
        expected = out[name].numpy()
        np.testing.assert_allclose(outputs[name], expected, atol=1e-4 * np.abs(expected).max())
    assert mmjax.load(folder).labels == model.labels
    return reference.config


@pytest.mark.torch
def test_classes_of_texts(repository, pretrained, files, tmp_path, capsys):
    work = tmp_path / "work"
    config, metrics = run(repository, "classification", pretrained, work, data=str(files / "texts.tsv"))
    assert metrics["val/classification_top1"] == 100 and metrics["val/classification_n"] == len(config.examples[1])
    assert cli.main(["evaluate", str(work), "--task", "classification"]) == 0
    scores = json.loads((work / "evaluations" / "classification.json").read_text())["scores"]
    assert scores["classification_top1"]["value"] == 100 > scores["classification_top1"]["chance"]
    assert (
        cli.main(["classify", str(work), "red hen runs"]) == 0 and "hen" in capsys.readouterr().out.split("red hen")[1]
    )
    bert = mmjax.load(work)
    assert bert.config == config.network and bert.labels == ("cow", "dog", "hen")
    assert [row[0][0] for row in bert.classify(["red hen runs", "blue cow and the"])] == ["hen", "cow"]
    reference = reads_the_same(
        bert, tmp_path / "hf", "BertForSequenceClassification", **bert.tokenizer(["red hen runs"])
    )
    assert reference.id2label == {0: "cow", 1: "dog", 2: "hen"}


def test_numbers_for_pairs(repository, pretrained, files, tmp_path):
    columns = {"text": "one", "pair": "two", "label": "score", "regression": True}
    config, metrics = run(
        repository, "classification", pretrained, tmp_path, 4, data=str(files / "pairs.csv"), **columns
    )
    assert {"val/regression_spearman", "val/regression_pearson_low"} <= metrics.keys()
    assert config.train_columns["token_type_ids"].max() == 1 and config.network.classes == 1
    assert mmjax.load(tmp_path).classify("red hen", pairs="runs and")[0][0][0] == "0"


@pytest.mark.torch
def test_tags_of_words(repository, pretrained, files, tmp_path):
    work = tmp_path / "work"
    config, metrics = run(repository, "tokens", pretrained, work, data=str(files / "tags.txt"))
    assert metrics["val/tags_f1"] == 100 and metrics["val/tags_f1_chance"] == 100  # the words determine the tags
    assert config.class_labels == ("O", "B-ANIMAL")
    bert = mmjax.load(work)
    (sentence,) = bert.tag(["green dog sleeps"])
    assert [(word, tag) for word, tag, _ in sentence] == [("green", "O"), ("dog", "B-ANIMAL"), ("sleeps", "O")]
    assert all(0.5 < share <= 1 for _, _, share in sentence)
    assert bert.tag([["dog"] * 40], length=9)[0][39][:2] == ("dog", bert.tag([["dog"] * 7], length=9)[0][4][1])
    reference = reads_the_same(bert, tmp_path / "hf", "BertForTokenClassification", **bert.tokenizer(["red hen runs"]))
    assert reference.label2id == {"O": 0, "B-ANIMAL": 1}


@pytest.mark.torch
def test_answers_in_texts(repository, pretrained, files, tmp_path):
    work = tmp_path / "work"
    _, metrics = run(repository, "spans", pretrained, work, 150, data=str(files / "squad.json"))
    assert metrics["val/answers_f1"] > 95 and metrics["val/answers_f1_chance"] == 50
    bert = mmjax.load(work)
    options = {"length": 16, "null_threshold": 0.0}
    assert bert.answer("what runs?", "red dog runs and the", **options)[0][0][0] == "dog"
    assert bert.answer("what?", "red dog runs and the", **options)[0][0][0] == ""
    reads_the_same(bert, tmp_path / "hf", "BertForQuestionAnswering", **bert.tokenizer(["what?"], ["red dog"]))


def test_number_of_steps(repository, pretrained, files):
    made = recipe(repository, "classification")
    data = str(files / "texts.tsv")
    config = made(data=data, batch_size=8)
    train_on, held_out = config.examples
    assert len(train_on) + len(held_out) == 80 and config.steps == int(len(train_on) / 8 * 3) and len(held_out) > 2
    assert made(data=data, batch_size=8, epochs=5.0).steps == int(len(train_on) / 8 * 5)
    assert made(data=data, steps=7).steps == 7
    two_files = made(data=data, test=data, batch_size=8)
    assert two_files.steps == 30 and two_files.examples[0] == two_files.examples[1]
    assert {row.text for row in train_on}.isdisjoint(row.text for row in held_out)


def test_errors_are_reported(repository, pretrained, files, tmp_path):
    made = recipe(repository, "classification")
    with pytest.raises(MmjaxError, match="--init_from MODEL"):
        made(data=str(files / "texts.tsv")).method()
    (tmp_path / "test.tsv").write_text("sentence\tlabel\nthe cat\tcat\n")
    config = made(data=str(files / "texts.tsv"), test=str(tmp_path / "test.tsv"), init_from=str(pretrained))
    with pytest.raises(MmjaxError, match=r"test\.tsv, line 2: the label 'cat' is not among cow, dog, hen"):
        config.evaluations()
    (tmp_path / "one.tsv").write_text("sentence\tlabel\nthe cat\tcat\n")
    with pytest.raises(MmjaxError, match=r"one\.tsv: 1 examples"):
        made(data=str(tmp_path / "one.tsv"))
    with pytest.raises(MmjaxError, match=r"held_out=1\.5"):
        made(held_out=1.5)
