"""Figures of written answers: what is asked, what is counted, and what is said where a package is missing."""

import sys
from collections import Counter

import pytest
import torch

from lowrank.data.batches import collate
from lowrank.data.tokens import IGNORED, Example
from lowrank.errors import ConfigError
from lowrank.train.answers import Answer, answers
from lowrank.train.losses import NextToken
from lowrank.train.metrics import macro_f1, of_tokens
from lowrank.train.models import load_causal
from lowrank.train.text_metrics import TEXT_METRICS, check_metrics, of_answers
from train_models import WORDS, save_llama, tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_causal(save_llama(tmp_path_factory.mktemp("models") / "llama"), torch.float32).eval()


def greedy(model, prompt, length):
    """Token by token, from the whole row each time, to the end token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids[len(prompt) :]


def row(prompt, answer):
    return Example([*prompt, *answer], [IGNORED] * len(prompt) + list(answer))


PROMPTS = [[1, 8, 14, 3], [1, 5, 9], [1, 15, 4], [1, 22, 7, 6], [1, 8, 8, 8, 21]]


def test_what_is_written_is_what_the_model_writes_alone(llama):
    rows = [row(prompt, [WORDS.index("cat"), WORDS.index("red"), 2]) for prompt in PROMPTS]
    for batch_size in (1, 3):
        found = answers(llama, tokenizer(), 0, [2], rows, batch_size)
        for prompt, answer in zip(PROMPTS, found, strict=True):
            assert answer.written == tokenizer().decode(greedy(llama, prompt, 14), skip_special_tokens=True).strip()
            assert answer.references == ("cat red",)


def test_equal_prompts_are_asked_once_and_the_last_answer_of_a_row_is_asked_for(llama):
    cat, dog = WORDS.index("cat"), WORDS.index("dog")
    rows = [row(PROMPTS[0], [cat, 2]), row(PROMPTS[0], [dog, 2]), row(PROMPTS[0], [cat, 2])]
    rows.append(Example([1, 8, cat, 9, dog, 2], [IGNORED, IGNORED, cat, IGNORED, dog, 2]))
    first, last = answers(llama, tokenizer(), 0, [2], rows, 4)
    assert first.references == ("cat", "dog")
    assert last.references == ("dog",)
    assert last.written == tokenizer().decode(greedy(llama, [1, 8, cat, 9], 12), skip_special_tokens=True).strip()


def test_a_row_is_exact_where_the_model_would_write_it_word_for_word(llama):
    rows, wanted = [], 0
    for number, prompt in enumerate(PROMPTS):
        own = greedy(llama, prompt, 5)
        answer = own if number % 2 else [*own[:-1], (own[-1] + 1) % len(WORDS)]
        wanted += greedy(llama, prompt, len(answer)) == answer
        rows.append(row(prompt, answer))
    loss = NextToken()(llama, collate(rows, 0, CPU, True))
    figures = of_tokens(loss.tallies, loss.count)
    assert 0 < wanted < len(rows)
    assert figures["exact_match"] == wanted / len(rows)


@pytest.mark.parametrize(
    "written, references, f1",
    [
        ("the red cat", ["Red cat!"], 1.0),
        ("red dog", ["red cat", "a dog, red"], 1.0),
        ("red red cat", ["red cat dog"], 2 * 2 / 6),
        ("dog", ["cat"], 0.0),
        ("", ["the"], 1.0),
        ("", ["cat"], 0.0),
    ],
)
def test_f1_is_over_words_of_the_best_reference(written, references, f1):
    assert TEXT_METRICS["f1"]([Answer(written, tuple(references))])["f1"] == pytest.approx(f1)


def test_macro_f1_by_hand():
    # class 0: 2·2/(3 + 2), class 1: 2·1/(1 + 2), class 2: 0 of 1; class 3 is nowhere
    confusion = torch.tensor([[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert macro_f1(confusion) == pytest.approx((4 / 5 + 2 / 3) / 2)
    confusion[2, 0] = 1
    assert macro_f1(confusion) == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("name, package", [("bleu", "sacrebleu"), ("chrf", "sacrebleu"), ("rouge", "rouge-score")])
def test_a_missing_package_is_said_before_anything_is_computed(monkeypatch, name, package):
    for module in ("sacrebleu", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"--metrics {name} is computed by {package}.*lowrank\[metrics\]"):
        check_metrics("completion", [name])


@pytest.mark.parametrize("kind, name", [("text", "f1"), ("regression", "bleu"), ("chat", "blue"), ("preference", "f1")])
def test_what_a_kind_is_not_scored_by_is_said(kind, name):
    with pytest.raises(ConfigError, match=rf"--metrics {name}: rows of {kind} are not scored by it"):
        check_metrics(kind, [name])


def test_bleu_chrf_and_rouge_are_their_packages():
    sacrebleu, rouge = pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score.rouge_scorer")
    said = [Answer("the cat is very red today", ("the cat is red today", "a red cat")), Answer("a dog", ("the dog",))]
    found = of_answers(said, ["bleu", "chrf", "rouge"])
    hypotheses, references = [a.written for a in said], [["the cat is red today", "the dog"], ["a red cat", None]]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, references).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, references).score)
    scorer = rouge.RougeScorer(["rougeL"], use_stemmer=True)
    best = [max(scorer.score(text, a.written)["rougeL"].fmeasure for text in a.references) for a in said]
    assert found["rougel"] == pytest.approx(sum(best) / 2)


def grams(text, n):
    letters = "".join(text.split())
    return Counter(letters[i : i + n] for i in range(len(letters) - n + 1))


def chrf_by_hand(said):
    """Of one reference each: precision and recall over the corpus, their means over n = 1..6, then F with β = 2."""
    precisions, recalls = [], []
    for n in range(1, 7):
        pairs = [(grams(answer.written, n), grams(answer.references[0], n)) for answer in said]
        alike = sum((one & other).total() for one, other in pairs)
        precisions.append(alike / sum(one.total() for one, _ in pairs))
        recalls.append(alike / sum(other.total() for _, other in pairs))
    precision, recall = sum(precisions) / 6, sum(recalls) / 6
    return 100 * 5 * precision * recall / (4 * precision + recall)


def test_chrf_by_hand():
    pytest.importorskip("sacrebleu")
    said = [Answer("the cat is very red today", ("the cat is red today",)), Answer("a dog barks", ("the dog bites",))]
    assert of_answers(said, ["chrf"])["chrf"] == pytest.approx(chrf_by_hand(said))


def test_rouge_1_and_2_by_hand():
    pytest.importorskip("rouge_score")
    found = of_answers([Answer("the red cat", ("the cat sat", "no"))], ["rouge"])
    assert found["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))
    assert found["rouge2"] == 0.0
    assert found["rougel"] == pytest.approx(2 / 3)
