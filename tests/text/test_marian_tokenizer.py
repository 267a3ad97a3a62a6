"""Marian's tokenizer: transformers' ids and texts from the same files."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.transformer.network import TransformerConfig
from mmjax.models.transformer.tasks import TransformerModel
from mmjax.text.marian import MarianTokenizer

spm = pytest.importorskip("sentencepiece")

ENGLISH = [
    "the quick brown fox jumps over the lazy dog and the other foxes jumped over it",
    "she sells sea shells by the sea shore; the shells she sells are sea shells",
    "to be or not to be, that is the question: 1,024 times, isn't it?",
]
GERMAN = [
    "der schnelle braune Fuchs springt über den faulen Hund und die anderen Füchse auch",
    "sie verkauft Muscheln am Meer; die Muscheln, die sie verkauft, sind Meeresmuscheln",
    "Sein oder Nichtsein, das ist hier die Frage: 1.024-mal, größer als 日本語",
]
TEXTS = [
    "the foxes sell shells",
    "  two  spaces   here ",
    "",
    " ",
    ">>de<< the dog",
    ">>de<<the dog>>de<< sells",
    ">>xx<< no such code, >>de<< in the midst",
    ">> not << a code",
    "a</s>b <unk> <pad>",
    "café 日本 🙂 tab\tend\nline \u200b\u00a0ﬁ Ａ e\u0301",
    "▁ and ▁▁ are pieces",
]


def train(texts: list[str], file: pathlib.Path, kind: str) -> list[str]:
    """A tiny model written to `file`; its pieces."""
    prefix = str(file.with_suffix(""))
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 3),
        model_prefix=prefix,
        model_type=kind,
        vocab_size=83,
        minloglevel=2,
        hard_vocab_limit=kind == "bpe",
    )
    pathlib.Path(prefix + ".model").rename(file)
    model = spm.SentencePieceProcessor(model_file=str(file))
    return [model.id_to_piece(id) for id in range(model.get_piece_size())]


def write_tokenizer(folder: pathlib.Path, separate: bool, kind: str = "unigram", **config: Any) -> pathlib.Path:
    """A folder as opus-mt's are: ids in another order than the models', some pieces missing, <pad> last."""
    folder.mkdir()
    pieces = train(ENGLISH, folder / "source.spm", kind), train(GERMAN, folder / "target.spm", kind)
    sides = [list(dict.fromkeys(side)) for side in (pieces if separate else ([*pieces[0], *pieces[1]],))]
    for name, side in zip(("vocab.json", "target_vocab.json"), sides):
        vocabulary = [piece for piece in sorted(side) if piece not in ("<s>", "</s>", "<unk>", "<pad>")][::-1]
        del vocabulary[5::11]
        ids = ["</s>", "<unk>", ">>de<<", *vocabulary, "<pad>"]
        (folder / name).write_text(json.dumps({piece: id for id, piece in enumerate(ids)}))
    settings = {"source_lang": "en", "target_lang": "de", "separate_vocabs": separate, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def random_texts(count: int) -> list[str]:
    """Words of both languages, marks, spaces and characters of everywhere, in any order."""
    rng = np.random.default_rng(7)
    words = " ".join(ENGLISH + GERMAN).split()
    others = [
        ">>de<<",
        "</s>",
        "<pad>",
        "  ",
        "\t",
        "。",
        "\u00a0",
        "\u0301",
        "Ⅷ",
        "½",
        "👩\u200d👧",
        "ا",
        "ñ",
        ">>",
        "<<",
    ]
    texts = []
    for _ in range(count):
        parts = [str(rng.choice(words if rng.random() < 0.6 else others)) for _ in range(rng.integers(1, 12))]
        parts += [chr(int(rng.integers(32, 0xD7FF))) for _ in range(rng.integers(3))]
        texts.append(("" if rng.random() < 0.3 else " ").join(parts))
    return texts


CASES: dict[str, dict[str, Any]] = {
    "one vocabulary": {"separate": False},
    "two vocabularies": {"separate": True},
    "bpe": {"separate": False, "kind": "bpe", "clean_up_tokenization_spaces": True, "eos_token": "</s>"},
    "more tokens": {"separate": False, "additional_special_tokens": ["<sep>"], "bos_token": "<begin>"},
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize("case", CASES)
def test_ids_and_texts_are_those_of_transformers(case: str, tmp_path: pathlib.Path):
    transformers = pytest.importorskip("transformers")
    folder = write_tokenizer(tmp_path / "folder", **CASES[case])
    reference, tokenizer = transformers.MarianTokenizer.from_pretrained(folder), MarianTokenizer.from_folder(folder)
    assert (tokenizer.eos, tokenizer.pad, tokenizer.unk) == (
        (reference.eos_token_id,),
        reference.pad_token_id,
        reference.unk_token_id,
    )
    assert tokenizer.vocab_size == len(reference)
    texts = [*TEXTS, *random_texts(200), "<sep> a<begin>b"]
    for tokenizer_of_side, expected in (
        (tokenizer, reference(texts)),
        (tokenizer.of_target, reference(text_target=texts)),
    ):
        assert tokenizer_of_side.encode(texts) == expected["input_ids"]
    batch, padded = tokenizer(texts[:7]), reference(texts[:7], padding=True)
    np.testing.assert_array_equal(batch[0], padded["input_ids"])
    np.testing.assert_array_equal(batch[1], padded["attention_mask"])
    cut = reference(texts, truncation=True, max_length=5)["input_ids"]
    assert [
        row[: sum(mask)] for row, mask in zip(*(x.tolist() for x in tokenizer(texts, length=5, truncate=True)))
    ] == cut
    sequences = (
        tokenizer.of_target.encode(random_texts(50)) + np.random.default_rng(0).integers(0, 50, (50, 9)).tolist()
    )
    if tokenizer.target_vocab is not None:
        # transformers takes the source's <pad> for the target's, which has another id.
        others = {tokenizer.pad, tokenizer.target_vocab["<pad>"]}
        sequences = [[id for id in row if id not in others] for row in sequences]
    for skip in (True, False):
        expected = reference.batch_decode(sequences, skip_special_tokens=skip, use_source_tokenizer=False)
        assert [tokenizer.decode(row, skip) for row in sequences] == expected
    # By default transformers decodes with the source's model where the vocabulary is one: the same text.
    assert [tokenizer.decode(row) for row in sequences] == reference.batch_decode(sequences, skip_special_tokens=True)


def marian_folder(folder: pathlib.Path, separate: bool) -> pathlib.Path:
    """A tiny model with random weights and its tokenizer, as Hugging Face lays them out."""
    write_tokenizer(folder, separate)
    sizes = [
        len(json.loads(file.read_text()))
        for file in (folder / "vocab.json", folder / "target_vocab.json")
        if file.is_file()
    ]
    config = TransformerConfig(
        vocab_size=sizes[0], target_vocab_size=sizes[1] if separate else None, shared_embeddings=not separate, width=14,
        encoder_depth=1, decoder_depth=1, encoder_heads=2, decoder_heads=2, encoder_hidden=19, decoder_hidden=23,
        output_bias=True, positions="concatenated", max_length=64, act="silu", fixed_pad=True, eos=0,
        pad=sizes[-1] - 1, start=sizes[-1] - 1, forced_eos=True,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    variables = tree.map_with_path(
        lambda path, leaf: (0.5 * rng.normal(size=leaf.shape) + path.endswith("scale")).astype(np.float32),
        TransformerModel.shapes(config),
    )
    mmjax.export(TransformerModel(config, variables["params"]), folder)
    return folder


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_a_folder_translates_as_in_transformers_and_is_written_back(tmp_path: pathlib.Path):
    transformers = pytest.importorskip("transformers")
    folder = marian_folder(tmp_path / "marian", separate=False)
    model = mmjax.load(folder)
    assert isinstance(model, TransformerModel) and isinstance(model.tokenizer, MarianTokenizer)
    texts = [">>de<< the fox", "she sells sea shells by the sea shore, isn't it?", "日本"]
    translations = model.translate(texts, num_beams=2, max_new_tokens=12)

    mmjax.export(model, tmp_path / "out")
    mmjax.save(model, tmp_path / "own")
    for target in (tmp_path / "out", tmp_path / "own"):
        for name in ("source.spm", "target.spm"):
            assert (target / name).read_bytes() == (folder / name).read_bytes()
        assert json.loads((target / "vocab.json").read_text()) == json.loads((folder / "vocab.json").read_text())
        assert not (target / "tokenizer.json").exists()
        again = mmjax.load(target).tokenizer
        assert again.encode(TEXTS) == model.tokenizer.encode(TEXTS)

    tokenizer = transformers.MarianTokenizer.from_pretrained(tmp_path / "out")
    reference = transformers.MarianMTModel.from_pretrained(tmp_path / "out").eval()
    ids = reference.generate(**tokenizer(texts, return_tensors="pt", padding=True), num_beams=2, max_new_tokens=12)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == translations


def test_two_vocabularies_translate_and_stop(tmp_path: pathlib.Path):
    model = mmjax.load(marian_folder(tmp_path / "two", separate=True))
    whole = model.generate("the fox jumps", max_new_tokens=12)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    assert model.generate("the fox jumps", max_new_tokens=12, stop=stop) == whole[: whole.index(stop)]
    mmjax.export(model, tmp_path / "out")
    assert mmjax.load(tmp_path / "out").generate("the fox jumps", max_new_tokens=12) == whole


def test_missing_and_broken_files_are_named(tmp_path: pathlib.Path):
    folder = write_tokenizer(tmp_path / "folder", False)
    tokenizer = MarianTokenizer.from_folder(folder)
    assert tokenizer.language_codes == (">>de<<",)
    with pytest.raises(MmjaxError, match="-100 is not an id"):
        tokenizer.decode([3, -100])
    spaced = [piece for piece in tokenizer.vocab if piece.startswith("▁")]
    assert spaced and all(
        tokenizer.token_bytes()[tokenizer.vocab[piece]] == b" " + piece[1:].encode() for piece in spaced
    )
    for name, text, message in (
        ("vocab.json", '{"</s>": 0}', "without '<unk>'"),
        ("vocab.json", '{"<unk>": "1"}', "vocab.json: should map every piece to an id"),
        ("target.spm", "nothing", "target.spm: not a SentencePiece model"),
        ("target.spm", None, "target.spm: no such file"),
    ):
        content = (folder / name).read_bytes()
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
        with pytest.raises(MmjaxError, match=message):
            MarianTokenizer.from_folder(folder)
        (folder / name).write_bytes(content)
