"""Scores of written answers beside their references, by name: a line in TEXT_METRICS for each.

BLEU and chrF are sacrebleu's and ROUGE is rouge-score's (`pip install "lowrank[metrics]"`), since their numbers are
only worth comparing where everybody computes them alike; F1 is SQuAD's, over the words of the best reference.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from lowrank.data.rows import Kind
from lowrank.errors import ConfigError
from lowrank.train.answers import Answer
from lowrank.train.metrics import Figures

ARTICLES = re.compile(r"\b(a|an|the)\b")
UNSAID = str.maketrans("", "", string.punctuation)


def bleu(answers: Sequence[Answer]) -> Figures:
    """sacrebleu's corpus BLEU, 0 to 100."""
    return {"bleu": _corpus(_package("sacrebleu", "bleu").BLEU(), answers)}


def chrf(answers: Sequence[Answer]) -> Figures:
    """sacrebleu's corpus chrF, 0 to 100."""
    return {"chrf": _corpus(_package("sacrebleu", "chrf").CHRF(), answers)}


def rouge(answers: Sequence[Answer]) -> Figures:
    """rouge-score's F of ROUGE-1, -2 and -L, 0 to 1: the mean over answers of the best reference's."""
    names = ("rouge1", "rouge2", "rougeL")
    scorer = _package("rouge_score.rouge_scorer", "rouge").RougeScorer(names, use_stemmer=True)
    found = [scorer.score_multi(answer.references, answer.written) for answer in answers]
    return {name.lower(): _mean([scores[name].fmeasure for scores in found]) for name in names}


def f1(answers: Sequence[Answer]) -> Figures:
    """SQuAD's F1, 0 to 1: of words without articles and punctuation, the mean of the best reference's."""
    return {"f1": _mean([max(_overlap(answer.written, text) for text in answer.references) for answer in answers])}


TEXT_METRICS: dict[str, Callable[[Sequence[Answer]], Figures]] = {"bleu": bleu, "chrf": chrf, "f1": f1, "rouge": rouge}
NEEDS = {
    "bleu": ("sacrebleu", "sacrebleu"),
    "chrf": ("sacrebleu", "sacrebleu"),
    "rouge": ("rouge_score", "rouge-score"),
}


OF_KIND: dict[Kind, tuple[str, ...]] = {
    "completion": tuple(TEXT_METRICS),
    "chat": tuple(TEXT_METRICS),
    "classification": ("f1",),
}


def check_metrics(kind: Kind, names: Sequence[str]) -> None:
    """Raise ConfigError for what rows of this kind are not scored by, and where a package is not there."""
    known = OF_KIND.get(kind, ())
    for name in names:
        if name not in known:
            has = f"{', '.join(known)} can be asked for" if known else "nothing more can be asked for"
            raise ConfigError(f"--metrics {name}: rows of {kind} are not scored by it; {has}")
        if name in NEEDS and kind != "classification":
            _package(NEEDS[name][0], name)


def of_answers(answers: Sequence[Answer], names: Sequence[str]) -> Figures:
    """All figures of these names."""
    return {name: value for metric in names for name, value in TEXT_METRICS[metric](answers).items()}


def _package(module: str, metric: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(
            f"--metrics {metric} is computed by {NEEDS[metric][1]}, which is not installed: "
            'pip install "lowrank[metrics]"'
        ) from None


def _corpus(metric: Any, answers: Sequence[Answer]) -> float:
    """sacrebleu wants a list a reference, None where an answer has fewer."""
    most = max(len(answer.references) for answer in answers)
    filled = [[*answer.references, *[None] * (most - len(answer.references))] for answer in answers]
    references = [list(column) for column in zip(*filled, strict=True)]
    return float(metric.corpus_score([answer.written for answer in answers], references).score)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(UNSAID)).split()


def _overlap(written: str, wanted: str) -> float:
    """2·(words in common)/(words of both); where one says nothing, whether both do."""
    said, reference = _words(written), _words(wanted)
    if not said or not reference:
        return float(said == reference)
    return 2 * (Counter(said) & Counter(reference)).total() / (len(said) + len(reference))
