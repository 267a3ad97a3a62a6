"""Tables of labelled texts: columns by name and number, quotes, what is refused, and their rows of pieces."""

import json

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.text.labelled_texts import LabelledText, class_names, classified_columns, read_labelled
from mmjax.text.training import train_wordpiece


def written(path, text):
    path.write_text(text, "utf-8")
    return path


def test_columns_by_name_and_by_number(tmp_path):
    # GLUE's quotation marks are characters like others, and may stand alone.
    tsv = written(tmp_path / "a.tsv", 'label\tsentence\tother\r\n1\ta "red hen\tx\r\n0\ttwo\ty\r\n')
    assert [(row.text, row.label) for row in read_labelled(tsv)] == [('a "red hen', "1"), ("two", "0")]
    bare = written(tmp_path / "b.tsv", "gj04\t1\t\tOne sleeps.\ngj04\t0\t*\tSleeps one.\n")
    assert [(row.text, row.label) for row in read_labelled(bare, "3", "1")] == [
        ("One sleeps.", "1"),
        ("Sleeps one.", "0"),
    ]
    table = written(tmp_path / "c.csv", 'a,b,score\n"x, ""y""\nz",w,2.5\nu,v,0\n')
    texts = read_labelled(table, "a", "score", "b")
    assert texts[0] == LabelledText('x, "y"\nz', "2.5", "w", f"{table}, line 3") and texts[1].location.endswith(
        "line 4"
    )
    lines = written(tmp_path / "d.jsonl", json.dumps({"text": "a\u2028b", "stars": 4}, ensure_ascii=False) + "\n\n")
    assert read_labelled(lines, "text", "stars") == [LabelledText("a\u2028b", "4", "", f"{lines}, line 1")]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.tsv", "text\tlabel\nx\t1\n", "a.tsv, line 1: no column 'sentence'; there are text, label"),
        ("a.tsv", "sentence\tlabel\nx\t1\n\ny\n", "a.tsv, line 4: 1 columns; expected 2 or more"),
        ("a.tsv", "sentence\tlabel\n  \t1\n", "a.tsv, line 2: column 'sentence' is empty"),
        ("a.tsv", "sentence\tlabel\n", "a.tsv: it has no records"),
        ("a.csv", 'sentence,label\nx,1\n"y" z,0\n', "a.csv, line 3: "),
        (
            "a.jsonl",
            '{"sentence": "x", "label": 1}\n{"sentence": "y"}\n',
            "a.jsonl, line 2: expected an object with sentence",
        ),
        ("a.jsonl", "[]\n", "a.jsonl, line 1: expected an object"),
        ("a.txt", "x", "expected a file name that ends in .tsv, .csv, .jsonl"),
    ],
)
def test_a_bad_record_is_refused_with_file_and_line(tmp_path, name, text, message):
    with pytest.raises(MmjaxError, match=message):
        read_labelled(written(tmp_path / name, text))


def test_not_utf_8_and_missing_files(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    for name in ("a.tsv", "b.tsv"):
        with pytest.raises(MmjaxError, match=name):
            read_labelled(tmp_path / name)


def test_classes_and_columns():
    texts = [LabelledText("the red hen", label, "a hen", f"line {i}") for i, label in enumerate(("10", "9", "10"))]
    assert class_names(texts) == ("9", "10")
    tokenizer = train_wordpiece(["the red hen and a hen"] * 3, 60)
    columns = classified_columns(texts, tokenizer, 9, ("9", "10"))
    assert columns["label"].tolist() == [1, 0, 1] and columns["label"].dtype == np.int32
    expected = tokenizer("the red hen", "a hen", 9)["input_ids"][0]
    np.testing.assert_array_equal(columns["input_ids"], np.stack([expected] * 3))
    assert classified_columns(texts, tokenizer, 9, ())["label"].dtype == np.float32
    with pytest.raises(MmjaxError, match="line 1: the label '9' is not among 10, 11"):
        classified_columns(texts, tokenizer, 9, ("10", "11"))
    with pytest.raises(MmjaxError, match="line 0: the label 'nan' is not a number"):
        classified_columns([LabelledText("x", "nan", location="line 0")], tokenizer, 9, ())
    with pytest.raises(MmjaxError, match="all 1 texts are of one class, '10'"):
        class_names(texts[:1])
