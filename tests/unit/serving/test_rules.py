from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from evergreen.contracts.errors import InputError
from evergreen.serving.rules import AnswerRules, best_first

NO_CATEGORY = -1


def test_items_of_equal_score_keep_the_order_of_their_ids() -> None:
    assert best_first(np.array([0.5, 0.5, 0.9, 0.5]), 3, categories=None, diversity=0).tolist() == [2, 0, 1]


def test_the_best_of_many_are_those_of_a_whole_sort() -> None:
    scores = np.random.default_rng(5).integers(0, 400, 20_000) / 400
    best = best_first(scores, 150, categories=None, diversity=0)
    assert best.tolist() == sorted(range(20_000), key=lambda i: (-scores[i], i))[:150]


def greedy(scores: NDArray[np.float64], categories: NDArray[np.int64], diversity: float) -> list[int]:
    """Marginal relevance as the paper has it, one item after the other."""
    low, high = scores.min(), scores.max()
    relevance = (scores - low) / (high - low) if high > low else scores * 0
    left, chosen, seen = list(range(len(scores))), [], set()
    while left:
        gains = [(1 - diversity) * relevance[i] - diversity * (categories[i] in seen) for i in left]
        chosen.append(left.pop(int(np.argmax(np.round(gains, 12)))))
        if categories[chosen[-1]] != NO_CATEGORY:
            seen.add(categories[chosen[-1]])
    return chosen


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(NO_CATEGORY, 4)), min_size=1, max_size=25),
    st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]),
)
def test_one_sort_gives_the_order_of_the_greedy_choice(items: list[tuple[int, int]], diversity: float) -> None:
    scores = np.array([score / 20 for score, _ in items])
    categories = np.array([category for _, category in items])
    order = best_first(scores, len(items), categories=categories, diversity=diversity)
    low, high = scores.min(), scores.max()
    relevance = (scores - low) / (high - low) if high > low else scores * 0

    def gains(chosen: list[int]) -> list[float]:
        """What each choice was worth when it was made: equal choices may come in either order."""
        seen: set[int] = set()
        worth = []
        for i in chosen:
            worth.append((1 - diversity) * relevance[i] - diversity * (categories[i] in seen))
            seen |= {categories[i]} - {NO_CATEGORY}
        return worth

    np.testing.assert_allclose(gains(order.tolist()), gains(greedy(scores, categories, diversity)), atol=1e-9)


def test_rules_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text('blocked_items = ["i17"]\ndiversity = 0.2\n')
    assert AnswerRules.load(file) == AnswerRules(blocked_items=frozenset({"i17"}), diversity=0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("diversity = 2", "diversity=2: .*less than or equal to 1"),
        ("blocked = []", "rules are: blocked_items, "),
        ("= 3", "cannot be read as TOML"),
    ],
)
def test_file_that_holds_no_rules_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"rules\.toml: .*{message}"):
        AnswerRules.load(file)


@pytest.mark.parametrize("target", ["no_such_module:rule", "math:no_such_function", "math:pi"])
def test_hook_that_does_not_exist_is_named(target: str) -> None:
    with pytest.raises(InputError, match=target):
        AnswerRules(hooks=(target,)).resolve()
