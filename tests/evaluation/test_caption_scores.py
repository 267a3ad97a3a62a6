"""Tokenised captions and scores, against Stanford's tokenizer and pycocoevalcap, recorded and live."""

import math
import random
import shutil

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.evaluation.caption_words import caption_words
from mmjax.evaluation.captions import CaptionsEvaluation, bleu, bleu_counts, caption_scores, cider, rouge_l
from mmjax.training.scores import metrics

# Recorded from stanford-corenlp 3.4.1 by pycocoevalcap 1.2's PTBTokenizer. Of 197 lines made to try it ours differ in
# 13 (telephone numbers, odd apostrophes), of 7,435 words of technical prose in 33 (version numbers).
RECORDED_WORDS = """
A man's dog isn't sitting, is it?
    a man 's dog is n't sitting is it
The U.S. flag (red/white) costs $4.50 - 50% off; #1!
    the u.s. flag -lrb- red/white -rrb- costs $ 4.50 50 % off # 1
boys' toys and the dog's-eye view. I'm gonna go. We've cannot.
    boys toys and the dog 's eye view i 'm gon na go we 've can not
"Hello," she said... 'twas 10:30 a.m. e.g. this
    hello she said 't was 10:30 a.m. e.g. this
It's a 3.5-inch t-shirt & a "quoted" phrase -- well— hmm–ok
    it 's a 3.5-inch t-shirt & a quoted phrase well hmm ok
Mr. Smith's car, No. 5, St. Louis. Dr. Who
    mr. smith 's car no. 5 st. louis dr. who
email a_b@c.com @home http://www.foo.com/bar. www.foo.com #sunny
    email a_b@c.com @home http://www.foo.com/bar www.foo.com #sunny
rock 'n' roll the '90s 90's o'clock jack-o'-lantern
    rock 'n' roll the '90s 90 's o'clock jack-o lantern
don't can't won't shan't y'all i'd you'll they've he'd've cannot gotta lemme
    do n't ca n't wo n't sha n't y' all i 'd you 'll they 've he 'd 've can not got ta lem me
[brackets] {braces} <tag> x </b>
    -lsb- brackets -rsb- -lcb- braces -rcb- <tag> x </b>
café naïve “smart quotes” it’s ‘single’
    café naïve smart quotes it 's single
a man, woman,and child ;semi:colon a: b
    a man woman and child semi colon a b
AT&T R&B b&w Q&A M&M's
    at&t r&b b & w q&a m&m 's
what?! really!! ok.. no.... wow!
    what ?! really !! ok no wow
12:30pm 5pm 3D 4x4 7-up -5 a- 2+2=4 ½ cup
    12:30 pm 5pm 3d 4x4 7-up -5 a 2 +2 = 4 1/2 cup
plan b. on a rd. at no. time. etc.
    plan b. on a rd. at no time etc.
u.s.-made P.M. Ph.D. J.K. Rowling tail.The end.
    u.s.-made p.m. ph.d. j.k. rowling tail.the end
5'6" tall 10' 5x7" 6ft. $5-10 £5 5¢
    5 6 tall 10 5x7 6ft $ 5-10 # 5 5 cents
a dog.,a cat a*b **bold** a~b |a| w/ w/o and/or :) 🙂
    a dog. a cat a * b ** bold ** a ~ b | a | w / w/o and/or :-rrb-
black-and-white two-story half-eaten 10-year-old dog(s) A!B
    black-and-white two-story half-eaten 10-year-old dog -lrb- s -rrb- a!b
"""
TEXTS, OUTPUTS = RECORDED_WORDS.strip().splitlines()[::2], RECORDED_WORDS.strip().splitlines()[1::2]
WORDS = {text: words.split() for text, words in zip(TEXTS, OUTPUTS)}
REFERENCES = [
    ["a man rides a horse on the beach", "a person riding a horse near the ocean"],
    ["two dogs play in the snow", "dogs running through snow together", "a pair of dogs in snow"],
    ["a red bus on a city street"],
]
CAPTIONS = ["a man riding a horse on a beach", "two dogs running in the snow", "a bus on a street"]
RECORDED = {"bleu_1": 0.852715, "bleu_2": 0.692603, "bleu_3": 0.510258, "bleu_4": 0.000059}
RECORDED |= {"rouge_l": 0.797451, "cider": 2.867715}


@pytest.mark.parametrize("text", WORDS)
def test_words_are_stanfords(text):
    assert caption_words(text) == WORDS[text]


def test_words_of_other_lines_are_stanfords_where_it_is_installed():
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    if shutil.which("java") is None:
        pytest.skip("no Java")
    rng, pool = random.Random(0), sorted({word for text in WORDS for word in text.split() if word.isascii()})
    made = [" ".join([*rng.choices(["dog", "on", "the", "man's", "street."], k=9), word]) + "." for word in pool]
    tokenized = tokenizer.tokenize({index: [{"caption": text}] for index, text in enumerate(made)})
    wrong = {
        text: tokenized[index][0]
        for index, text in enumerate(made)
        if tokenized[index][0].split() != caption_words(text)
    }
    assert not wrong


def test_words_tokenise_to_themselves():
    for text in WORDS:
        plain = [word for word in caption_words(text) if word.isalnum()]
        assert caption_words(" ".join(plain)) == plain
    assert caption_words("") == caption_words(' . , "" - ') == []


def test_scores_are_the_recorded_ones():
    scores = caption_scores(CAPTIONS, REFERENCES, intervals=False)
    assert {name: score.value / 100 for name, score in scores.items()} == pytest.approx(RECORDED, abs=5e-7)
    words = [text.split() for text in CAPTIONS], [[text.split() for text in texts] for texts in REFERENCES]
    assert cider(*words) == pytest.approx([2.784481, 2.543035, 3.275628], abs=5e-7)
    assert [rouge_l(*pair) for pair in zip(*words)] == pytest.approx([0.75, 0.833333, 0.809019], abs=5e-7)
    # Eight words, the nearer reference is the one of eight; "a" counts once more than any reference has it.
    assert bleu_counts(words[0][0], words[1][0]) == [8, 8, 8, 7, 6, 5, 7, 4, 2, 0]


VOCABULARY = ("a", "the", "man", "dog", "red", "on", "in", "street", "sits", "rides", "of", "two")


def random_caption(rng, shortest):
    return " ".join(rng.choices(VOCABULARY, k=rng.randint(shortest, 12)))


def test_scores_of_random_texts_are_pycocoevalcaps():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    rng = random.Random(3)
    for trial in range(24):
        n = rng.randint(2, 9)
        references = [[random_caption(rng, trial % 2) for _ in range(rng.randint(1, 5))] for _ in range(n)]
        captions = [random_caption(rng, 0) for _ in range(n)]
        expected_inputs, candidates = (
            dict(enumerate(references)),
            {index: [text] for index, text in enumerate(captions)},
        )
        expected = [*Bleu(4).compute_score(expected_inputs, candidates, verbose=0)[0]]
        expected += [metric.compute_score(expected_inputs, candidates)[0] for metric in (Rouge(), Cider())]
        values = [score.value / 100 for score in caption_scores(captions, references, intervals=False).values()]
        assert values == pytest.approx(expected, rel=1e-10, abs=1e-14)


def test_the_reference_itself_is_perfect_and_order_does_not_matter():
    exact = caption_scores([texts[0] for texts in REFERENCES], [texts[:1] for texts in REFERENCES])
    assert {name: score.value for name, score in exact.items()} == pytest.approx(
        dict.fromkeys(["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"], 100.0) | {"cider": 1000.0}
    )
    order = [2, 0, 1]
    turned = caption_scores([CAPTIONS[i] for i in order], [REFERENCES[i][::-1] for i in order])
    scores = caption_scores(CAPTIONS, REFERENCES)
    for name, score in scores.items():
        assert turned[name].value == pytest.approx(score.value)
        assert turned[name].low == pytest.approx(score.low) and score.low <= score.value <= score.high
    # A single image has no rare n-gram: ln(1 / 1) = 0.
    # The script's CIDEr of a single image is 0, whatever the caption.
    assert caption_scores(CAPTIONS[:1], REFERENCES[:1]).keys() == scores.keys() - {"cider"}
    assert caption_scores(["Two Dogs, running in the snow!"], REFERENCES[1:2])["rouge_l"].value == pytest.approx(
        83.3333
    )


def test_brevity_counts_against_bleu():
    """Half the reference's words, all right: precision 1, times exp(1 - 2)."""
    counts = np.array(bleu_counts(["a", "b", "c", "d"], [["a", "b", "c", "d", "e", "f", "g", "h"]]), float)
    assert bleu(counts) == pytest.approx([math.exp(-1)] * 4)
    assert bleu(np.array(bleu_counts([], [["a"]]), float)).tolist() == [0, 0, 0, 0]
    # Of references of three and of seven words, five is equally far from both: the shorter counts.
    assert bleu_counts(["a", "b", "c", "d", "e"], [["a", "b", "c", "d", "e", "f", "g"], ["a", "b", "c"]])[1] == 3


def test_invalid_corpora_are_refused():
    with pytest.raises(MmjaxError, match="1 captions for references of 2 images"):
        caption_scores(["a"], [["a"], ["b"]])
    with pytest.raises(MmjaxError, match="0 captions"):
        caption_scores([], [])
    with pytest.raises(MmjaxError, match=r"references\[1\]: expected a list of at least one text, not \[\]"):
        caption_scores(["a", "b"], [["a"], []])
    with pytest.raises(MmjaxError, match=r"references\[0\]: .* not 'a cat'"):
        caption_scores(["a"], ["a cat"])


def test_evaluation_in_the_loop_and_at_its_end():
    class State:
        step = 3

    made = CaptionsEvaluation(
        caption=lambda params, state: [*CAPTIONS[:2], params],
        references=REFERENCES,
        thumbnails=np.zeros((3, 5, 7, 3), np.uint8),
        attribution="By nobody",
        final_step=4,
    )
    early = metrics(made.run(CAPTIONS[2], State))
    assert early["captions_cider"] == pytest.approx(286.7715, abs=1e-3) and early["captions_n"] == 3
    assert not [name for name in early if name.endswith(("_low", "_examples", "_picture"))]
    State.step = 4
    late = metrics(made.run("a red bus on a city street", State))
    assert late["captions_cider"] > early["captions_cider"] and late["captions_bleu_4_low"] <= late["captions_bleu_4"]
    lines = late["captions_examples"].splitlines()
    assert lines[0] == "caption | a reference" and lines[3] == f"{REFERENCES[2][0]} | {REFERENCES[2][0]}"
    assert late["captions_picture"].dtype == np.uint8
    assert made.scores(CAPTIONS[2])["captions_rouge_l"].value == pytest.approx(79.7451, abs=1e-4)
