"""Experts of different vocabularies: laws over one, mapped onto laws over another.

Texts are tokenised by the *reference*; a mapped expert reads the partner of each token,
one by one (nothing is tokenised anew), and its next-token law is carried over to the
reference. A token's partner is the token of the same string, else of the same string
with the other word marker ("▁" of SentencePiece, "Ġ" of byte-level BPE), else the one of
least edit distance (MinED), the lowest id among equals.

The mapping moves probability and neither makes nor loses any. Of an expert token's
probability its exact partner keeps all but ``share_inexact``, which is split among the
tokens that have it as their nearest only; without an exact partner they have all of it;
and a token that is nobody's partner gives its probability to the reference token nearest
to it. No reference token is left at zero, where it would be a veto in the pool.

MinED is a guess about spelling, and a fusion by guesses is a bad one: where fewer than
``min_exact`` of either vocabulary match exactly, the mapping is refused unless asked for.

Reference:
    PackLLM (Mavromatis, Karypis, Karypis 2024, https://arxiv.org/abs/2404.11531) aligns
    by MinED too, but gathers logits, which counts a partner's mass once per token.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = [
    "VocabularyMap",
    "align_vocabularies",
    "check_same_vocabulary",
    "map_log_probs",
    "map_tokens",
    "map_vocabulary",
]

_MARKERS = ("\u2581", "\u0120")


class VocabularyMap(NamedTuple):
    """How one expert's tokens stand for those of the reference (host arrays).

    ``partner [reference]`` are the expert's tokens and ``log_share [reference]`` the part
    of their probability, as logarithm, that each reference token gets. ``orphans`` are the
    expert tokens without a partner and ``adopted_by`` the reference tokens that get
    theirs. ``exact_reference`` and ``exact_expert`` are the fractions of either vocabulary
    that match exactly. ``identity`` marks equal vocabularies: only padding is cropped.
    """

    partner: np.ndarray
    log_share: np.ndarray
    orphans: np.ndarray
    adopted_by: np.ndarray
    expert_size: int
    exact_reference: float
    exact_expert: float
    identity: bool

    @property
    def reference_size(self) -> int:
        """How many tokens the reference has."""
        return len(self.partner)


def map_vocabulary(
    reference: Sequence[str],
    expert: Sequence[str],
    *,
    pairs: Mapping[str, str] | None = None,
    min_exact: float = 0.9,
    share_inexact: float = 0.1,
) -> VocabularyMap:
    """Maps one expert's vocabulary onto the reference.

    Exact matches are looked up; MinED takes time proportional to the product of what is
    left and the other vocabulary (20 ms for a token against 150 000, so minutes where
    tens of thousands of tokens are left).

    Args:
        reference: token strings by id, without padding rows of the embedding.
        expert: likewise, of the expert.
        pairs: expert tokens by reference token that count as exact: what an end of text
            is called can not be told from its spelling.
        min_exact: the least fraction of each vocabulary that has to match exactly; 0
            takes any mapping.
        share_inexact: see the module's text, in (0, 1).

    Raises:
        ValueError: if a vocabulary is empty, a pair names an unknown token, or too few
            tokens match.

    Example:
        >>> mapping = map_vocabulary(["a", "▁b"], ["Ġb", "a"])
        >>> mapping.partner.tolist()
        [1, 0]
    """
    if not reference or not expert:
        raise ValueError(
            f"vocabularies of {len(reference)} and {len(expert)} tokens; expected at "
            "least one in each"
        )
    if not 0.0 < share_inexact < 1.0:
        raise ValueError(f"share_inexact {share_inexact}, expected a number in (0, 1)")
    partner = _exact_partners(reference, expert, pairs or {})
    matched = partner >= 0
    used = np.zeros(len(expert), bool)
    used[partner[matched]] = True
    exact = float(matched.mean()), float(used.mean())
    if min(exact) < min_exact:
        _refuse(reference, expert, matched, used, min_exact)
    partner = partner.copy()
    if not matched.all():
        nearest = _Nearest(expert)
        for token in map(int, np.flatnonzero(~matched)):
            partner[token] = nearest(reference[token])
    share = _shares(partner, matched, len(expert), share_inexact)
    orphans = np.setdiff1d(np.arange(len(expert)), partner)
    adopted_by = np.zeros(0, np.int32)
    if orphans.size:
        nearest = _Nearest(reference)
        adopted_by = np.array(
            [nearest(expert[token]) for token in map(int, orphans)], np.int32
        )
    identity = len(reference) == len(expert) and bool(
        (partner == np.arange(len(reference))).all() and matched.all()
    )
    return VocabularyMap(
        partner=partner.astype(np.int32),
        log_share=np.log(share).astype(np.float32),
        orphans=orphans.astype(np.int32),
        adopted_by=adopted_by,
        expert_size=len(expert),
        exact_reference=exact[0],
        exact_expert=exact[1],
        identity=identity,
    )


def align_vocabularies(
    vocabularies: Sequence[Sequence[str]],
    *,
    reference: int = 0,
    pairs: Mapping[str, str] | None = None,
    min_exact: float = 0.9,
    share_inexact: float = 0.1,
) -> tuple[VocabularyMap, ...]:
    """Maps every expert's vocabulary onto that of one of them.

    Args:
        vocabularies: token strings by id, of each expert.
        reference: index of the expert whose tokens the fusion speaks.
        pairs: as in `map_vocabulary`, for all experts.
        min_exact: as in `map_vocabulary`.
        share_inexact: as in `map_vocabulary`.

    Returns:
        What `fuse_language_models` takes as ``vocabulary``.

    Raises:
        ValueError: as `map_vocabulary`, or if there is no such reference.

    Example:
        >>> maps = align_vocabularies([["a", "b"], ["b", "a"]])
        >>> map_tokens(maps[1], jnp.array([0, 1])).tolist()  # "a" is the second's token 1
        [1, 0]
    """
    if not 0 <= reference < len(vocabularies):
        raise ValueError(
            f"reference {reference}, expected the index of one of the "
            f"{len(vocabularies)} vocabularies"
        )
    maps = []
    for index, vocabulary in enumerate(vocabularies):
        try:
            maps.append(
                map_vocabulary(
                    vocabularies[reference],
                    vocabulary,
                    pairs=None if index == reference else pairs,
                    min_exact=min_exact,
                    share_inexact=share_inexact,
                )
            )
        except ValueError as error:
            raise ValueError(f"expert {index}: {error}") from None
    return tuple(maps)


def check_same_vocabulary(vocabularies: Sequence[Sequence[str]]) -> None:
    """Checks that token ids mean the same to all experts.

    Raises:
        ValueError: at the first token that differs, with the way out.

    Example:
        >>> check_same_vocabulary([["a", "b"], ["a", "b"]])
    """
    for index, vocabulary in enumerate(vocabularies):
        first = vocabularies[0]
        if list(vocabulary) == list(first):
            continue
        rows = zip(first, vocabulary, strict=False)
        at = next((i for i, (a, b) in enumerate(rows) if a != b), None)
        where = (
            f"{len(vocabulary)} tokens against {len(first)}"
            if at is None
            else f"token {at} is {vocabulary[at]!r} against {first[at]!r}"
        )
        raise ValueError(
            f"the vocabulary of expert {index} differs from that of expert 0: {where}; "
            "fuse experts of one tokenizer, or map them onto one with "
            "align_vocabularies(vocabularies) and pass that as `vocabulary`"
        )


def map_tokens(mapping: VocabularyMap, tokens: Int[Array, "..."]) -> Int[Array, "..."]:
    """What the expert reads in place of reference tokens.

    Example:
        >>> maps = align_vocabularies([["a", "b"], ["b", "a"]])
        >>> map_tokens(maps[1], jnp.array([0, 0, 1])).tolist()
        [1, 1, 0]
    """
    return tokens if mapping.identity else jnp.asarray(mapping.partner)[tokens]


def map_log_probs(
    mapping: VocabularyMap, log_probs: Float[Array, "*batch expert"]
) -> Float[Array, "*batch reference"]:
    """Carries an expert's law over to the reference vocabulary; it still sums to one.

    Example:
        >>> maps = align_vocabularies([["a", "b"], ["b", "a"]])
        >>> jnp.exp(map_log_probs(maps[1], jnp.log(jnp.array([0.25, 0.75])))).round(2).tolist()
        [0.75, 0.25]
    """
    if mapping.identity:
        return log_probs
    share = jnp.asarray(mapping.log_share, log_probs.dtype)
    share = share.reshape((1,) * (log_probs.ndim - 1) + share.shape)
    direct = log_probs[..., jnp.asarray(mapping.partner)] + share
    if not mapping.orphans.size:
        return direct
    orphaned = jnp.exp(log_probs[..., jnp.asarray(mapping.orphans)])
    mass = jnp.zeros_like(direct).at[..., jnp.asarray(mapping.adopted_by)].add(orphaned)
    return jnp.logaddexp(direct, jnp.log(mass))


def _exact_partners(
    reference: Sequence[str], expert: Sequence[str], pairs: Mapping[str, str]
) -> np.ndarray:
    """The expert's id of each reference token, -1 where nothing matches exactly."""
    ids: dict[str, int] = {}
    for index, token in enumerate(expert):
        ids.setdefault(token, index)
    known = set(reference)
    for ours, theirs in pairs.items():
        if ours not in known or theirs not in ids:
            name, side = (
                (ours, "reference") if ours not in known else (theirs, "expert")
            )
            raise ValueError(
                f"pairs names {name!r}, which the {side} vocabulary does not have"
            )

    def partner(token: str) -> int:
        if token in pairs:
            return ids[pairs[token]]
        return ids.get(token, ids.get(_swap_marker(token), -1))

    return np.array([partner(token) for token in reference], np.int64)


def _swap_marker(token: str) -> str:
    first, second = _MARKERS
    if token.startswith(first):
        return second + token[1:]
    return first + token[1:] if token.startswith(second) else token


def _shares(
    partner: np.ndarray, matched: np.ndarray, expert_size: int, share_inexact: float
) -> np.ndarray:
    """The part of its partner's probability that each reference token gets."""
    exact = np.bincount(partner[matched], minlength=expert_size)[partner]
    inexact = np.bincount(partner[~matched], minlength=expert_size)[partner]
    both = (exact > 0) & (inexact > 0)
    kept = np.where(both, 1.0 - share_inexact, 1.0) / np.maximum(exact, 1)
    split = np.where(both, share_inexact, 1.0) / np.maximum(inexact, 1)
    return np.where(matched, kept, split)


def _refuse(
    reference: Sequence[str],
    expert: Sequence[str],
    matched: np.ndarray,
    used: np.ndarray,
    min_exact: float,
) -> None:
    without = [reference[token] for token in np.flatnonzero(~matched)[:5].tolist()]
    unused = [expert[token] for token in np.flatnonzero(~used)[:5].tolist()]
    least = np.floor(100 * min(matched.mean(), used.mean())) / 100
    raise ValueError(
        f"{matched.sum()} of {len(reference)} reference tokens have an exact match "
        f"(not {without}) and {used.sum()} of {len(expert)} expert tokens are one (not "
        f"{unused}); at least {min_exact:.0%} of both are asked for. Fuse experts of one "
        f"tokenizer, name `pairs`, or take the loss with min_exact={least:g}"
    )


class _Nearest:
    """Nearest token by edit distance, the lowest id among equals.

    Tokens are kept by length: two strings differ by at least the difference of their
    lengths, so the search ends at the first difference that the best one undercuts.
    """

    def __init__(self, tokens: Sequence[str]):
        rows: dict[int, list[int]] = {}
        plain = [_unify_marker(token) for token in tokens]
        for index, token in enumerate(plain):
            rows.setdefault(len(token), []).append(index)
        self._longest = max(rows)
        self._buckets = {
            length: (
                np.array(ids),
                np.array([_code_points(plain[i]) for i in ids]).reshape(
                    len(ids), length
                ),
            )
            for length, ids in rows.items()
        }

    def __call__(self, token: str) -> int:
        codes = _code_points(_unify_marker(token))
        best = (np.inf, -1)
        for gap in range(max(self._longest, len(codes)) + 1):
            for length in {len(codes) - gap, len(codes) + gap} & self._buckets.keys():
                ids, others = self._buckets[length]
                distances = _edit_distances(codes, others)
                row = int(np.argmin(distances))  # ids ascend within a bucket
                best = min(best, (int(distances[row]), int(ids[row])))
            if best[0] <= gap:
                break
        return best[1]


def _unify_marker(token: str) -> str:
    return _swap_marker(token) if token.startswith(_MARKERS[1]) else token


def _code_points(token: str) -> np.ndarray:
    return np.array([ord(character) for character in token], np.int32)


def _edit_distances(codes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Levenshtein distances from one string to many of one length ``[other, length]``."""
    steps = np.arange(others.shape[1] + 1)
    row = np.broadcast_to(steps, (len(others), len(steps)))
    for index, code in enumerate(codes):
        changed = np.empty_like(row)
        changed[:, 0] = index + 1
        substituted = row[:, :-1] + (others != code)
        changed[:, 1:] = np.minimum(row[:, 1:] + 1, substituted)
        # Insertions chain along the row; less the step, they are a running minimum.
        row = np.minimum.accumulate(changed - steps, axis=1) + steps
    return row[:, -1]
