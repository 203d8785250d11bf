"""The cross-domain matrix: experts, other models and rules on every domain's held-out text."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import _lm_text
from experiments._lm import Prepared, Window
from experiments._lm_drawn import drawn_divergences
from experiments._lm_experts import Experts, select_experts
from experiments._lm_intervals import (
    MIXED,
    accuracy_table,
    bits_per_byte_table,
    summarize_file,
)
from experiments._lm_rules import NamedRule
from experiments._lm_score import Request, Scorer, Scores, to_requests, wrong_requests
from experiments._progress import Progress
from experiments._tables import Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Settings of ``--score``.

    Attributes:
        models: other models that are scored alone: a generalist, a soup.
        num_windows: of each file, the first ones; none is all.
        choices: also ask for the right continuation among four (reads four times as much).
        baseline: a method that the others are compared with, by name.
        drawn: texts drawn from the pool to estimate KL(Q || P) of experts and EMSelect.
        drawn_tokens: in each of those texts.
        num_resamples: of the bootstrap.
        shown: mixed windows that mixed.html shows, token by token.
    """

    models: tuple[str, ...] = ()
    num_windows: int | None = None
    choices: bool = False
    baseline: str = ""
    drawn: int = 0
    drawn_tokens: int = 64
    num_resamples: int = 2000
    shown: int = 2


class Matrix:
    """Measures one file of windows at a time, so that a killed run repeats little.

    Args:
        every: the experts, then the models that are scored alone.
        count: how many of them are experts.
        rules: how the experts are fused.
        prepared: what train_lm_experts held out.
        options: what is measured.
        same_tokens: whether the models' tokenizer is the one of the prepared text.

    Raises:
        ValueError: if two methods have one name, the baseline has none, or a window does
            not fit into the models' context.
    """

    def __init__(
        self,
        every: Experts,
        count: int,
        rules: Sequence[NamedRule],
        prepared: Prepared,
        options: ScoreOptions,
        *,
        same_tokens: bool,
    ) -> None:
        self._experts = select_experts(every, slice(count))
        others = (
            select_experts(every, slice(count, None)) if every.names[count:] else None
        )
        self._rules, self._options = rules, options
        self._scorer = Scorer(self._experts, rules, others)
        self._windows = prepared.windows
        self._requests = {
            name: to_requests(windows, every.tokenizer, same_tokens=same_tokens)
            for name, windows in prepared.windows.items()
        }
        for requests in self._requests.values():
            self._scorer.check(requests)
        self.files = tuple(prepared.windows)
        methods = [*self._scorer.names, *(rule.label for rule in rules)]
        if len(set(methods)) < len(methods):
            raise ValueError(f"two methods have one name: {', '.join(methods)}")
        if options.baseline and options.baseline not in methods:
            raise ValueError(
                f"--scoring.baseline={options.baseline} is none of {', '.join(methods)}"
            )

    def measure(self, name: str) -> dict[str, Any]:
        """One file of windows: sums by cluster of documents, mean weights and divergences
        of each rule, and what there is to show of mixed windows."""
        windows = self._windows[name][: self._options.num_windows]
        requests = self._requests[name][: len(windows)]
        wrong, pairs = wrong_requests(windows, requests)
        asks = self._options.choices and bool(wrong)
        total = len(requests) + len(wrong) * asks
        done = [0]
        with Progress(total, description=f"score {name}", unit="window") as bar:

            def on_batch(count: int) -> None:
                done[0] += count
                bar.update(done[0])

            shown = self._options.shown if name == MIXED else 0
            scores = self._scorer(requests, num_traces=shown, on_batch=on_batch)
            correct = None
            if asks:
                others = self._scorer(wrong, on_batch=on_batch)
                correct = right_answers(_log_probs(scores), _log_probs(others), pairs)
        return {
            **summarize_file(windows, _log_probs(scores), correct),
            "weights": {k: v.weights.mean(0).tolist() for k, v in scores.rules.items()},
            "divergence": {
                k: v.divergence.mean(0).tolist() for k, v in scores.rules.items()
            },
            "passages": self._passages(windows, requests, scores),
        }

    def draw(self, key: jax.Array) -> dict[str, Any]:
        """`drawn_divergences` after held-out prompts, every domain's in turn."""
        files = [self._requests[name] for name in self.files if name != MIXED]
        longest = max(map(len, files))
        prompts = [
            file[i][0] for i in range(longest) for file in files if i < len(file)
        ]
        chosen = prompts[: self._options.drawn]
        return drawn_divergences(self._experts, chosen, key, self._options.drawn_tokens)

    def result(
        self, files: Mapping[str, Any], drawn: Any, *, seed: int
    ) -> dict[str, Any]:
        """What ``result.json`` holds."""
        parts = {name: [file] for name, file in files.items()}
        options = {
            "baseline": self._options.baseline,
            "seed": seed,
            "num_resamples": self._options.num_resamples,
        }
        bits, bits_apart = bits_per_byte_table(parts, **options)
        right, right_apart = accuracy_table(parts, **options)
        keys = ("clusters", "windows", "bytes", "log_prob", "asked", "correct")
        return {
            "mode": "score",
            "experts": list(self._experts.names),
            "models": list(self._scorer.names[len(self._experts.names) :]),
            "rules": [rule.label for rule in self._rules],
            "bits_per_byte": bits,
            "accuracy": right,
            "baseline": self._options.baseline,
            "difference": {"bits_per_byte": bits_apart, "accuracy": right_apart},
            "weights": {name: file["weights"] for name, file in files.items()},
            "divergence": {name: file["divergence"] for name, file in files.items()},
            "drawn": drawn,
            "documents": {
                name: {key: file[key] for key in keys if key in file}
                for name, file in files.items()
            },
            "passages": [p for file in files.values() for p in file["passages"]],
        }

    def _passages(
        self, windows: Sequence[Window], requests: Sequence[Request], scores: Scores
    ) -> list[dict[str, Any]]:
        found = []
        for window, (_, tokens), traces in zip(
            windows, requests, scores.traces, strict=False
        ):
            texts = _lm_text.token_texts(tokens, self._experts.tokenizer.decode)
            for rule in self._rules:
                trace = traces[rule.label]
                found.append(
                    {
                        "rule": rule.label,
                        "moves": rule.moves,
                        "name": " → ".join(window.domains),
                        "prompt": window.prompt,
                        "token_texts": texts,
                        **{
                            field: value[: len(tokens)]
                            for field, value in trace._asdict().items()
                        },
                    }
                )
        return found


def score_table(
    table: Mapping[str, Mapping[str, Any]],
    difference: Mapping[str, Mapping[str, Any]],
    *,
    baseline: str = "",
    best: str = "min",
) -> tuple[list[dict[str, Any]], list[Column]]:
    """A row per method, a column per domain; the mean over the domains last, and its
    difference to a baseline."""
    domains = list(table)
    rows = [
        {"method": method, **{domain: table[domain][method] for domain in domains}}
        for method in next(iter(table.values()), {})
    ]
    columns = [Column(domain, domain, 3, best) for domain in domains]
    if baseline:
        apart = difference[domains[-1]]
        rows = [{**row, "difference": apart[row["method"]]} for row in rows]
        columns.append(Column("difference", f"{domains[-1]} − {baseline}", 3))
    return rows, [Column("method", "method"), *columns]


def _log_probs(scores: Scores) -> dict[str, Any]:
    rules = {label: score.log_prob for label, score in scores.rules.items()}
    return scores.models | rules


def right_answers(
    own: Mapping[str, np.ndarray], wrong: Mapping[str, np.ndarray], pairs: np.ndarray
) -> dict[str, np.ndarray]:
    """Whether a prompt speaks more for its own continuation than for each wrong one.

    What speaks for a continuation is how much likelier it is after this prompt than, on
    average of ``log p``, after all prompts that it was offered to, its own among them. By
    ``log p`` alone the plainest text would be the answer to everything; less its ``log p``
    without a prompt, rules that weigh experts by the prompt would be two laws at once.

    Args:
        own: log-probabilities of the right continuations, ``[window]`` by method.
        wrong: of the wrong ones, ``[wrong answer]``.
        pairs: from `wrong_requests`.
    """
    asked, source = pairs.T
    found = {}
    for name, log_prob in own.items():
        total, count = log_prob.astype(float), np.ones(len(log_prob))
        np.add.at(total, source, wrong[name])
        np.add.at(count, source, 1.0)
        usual = total / count
        best = np.full(len(log_prob), -np.inf)
        np.maximum.at(best, asked, wrong[name] - usual[source])
        found[name] = log_prob - usual > best  # a tie is not right
    return found
