"""What a simulated world is made of: sizes, strengths and rates, validated with errors for people."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Self

from pydantic import AwareDatetime, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import InputError

_ONE_DAY = timedelta(days=1)


class ExplainedModel(JsonModel):
    """A model whose values people choose: what is wrong with them is told as an InputError."""

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            model = handler(data)
            model._check()
        except ValidationError as error:
            raise InputError("\n".join(_explanation(problem, cls) for problem in error.errors())) from error
        except ValueError as error:
            raise InputError(f"simulator: {error}") from error
        return model

    def _check(self) -> None:
        """Raise ValueError where values that are each in their range do not go together."""


class SimulatorConfig(ExplainedModel):
    """A world and how long it is watched. Equal configurations give equal bytes.

    Raises:
        InputError: a value is out of its range; names the value and the range.
    """

    num_users: int = Field(default=2_000, ge=20, le=5_000_000)
    """People, the crawler and the silent bot together."""
    num_items: int = Field(default=500, ge=50, le=1_000_000)
    """Items that exist at the start and items that are published later, together."""
    num_days: int = Field(default=30, ge=1, le=3_650)
    events_per_day: int = Field(default=10_000, ge=100, le=50_000_000)
    """Mean impressions a day, those of the crawler and the silent bot included; weekends are busier."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    start: AwareDatetime = datetime(2025, 1, 1, tzinfo=UTC)
    """First midnight (UTC) of the log."""

    num_categories: int = Field(default=12, ge=2, le=200)
    num_publishers: int = Field(default=24, ge=2, le=10_000)
    num_segments: int = Field(default=6, ge=2, le=100)
    taste_dimensions: int = Field(default=8, ge=2, le=128)

    click_rate: float = Field(default=0.017, gt=0, le=0.3)
    """Mean click probability of people on slates drawn at random on the first day. The logging policy learns and lifts
    it, the crawler adds its own: the default gives a log with about 2 % clicks."""
    position_bias_exponent: float = Field(default=0.6, ge=0, le=3)
    """eta in P(examined) = position ** -eta. 0: no position bias."""
    interaction_strength: float = Field(default=1.3, ge=0, le=5)
    """Standard deviation, in log-odds, of taste x item. 0: only main effects."""
    segment_taste_share: float = Field(default=0.6, ge=0, le=1)
    """Share of the variance of tastes that people of one segment have in common; the rest is personal."""
    taste_half_life_days: float = Field(default=30.0, gt=0, le=36_500)
    """Days until a person's own taste correlates 0.5 with what it was; a segment's takes three times as long."""
    item_age_days: float = Field(default=10.0, gt=0, le=36_500)
    """Time constant of an item's loss of appeal."""

    new_item_fraction: float = Field(default=0.4, ge=0, le=0.5)
    """Share of the items that are published during the log."""
    new_user_fraction: float = Field(default=0.2, ge=0, le=0.5)
    """Share of the users who come for the first time during the log."""
    rating_fraction: float = Field(default=0.3, ge=0, le=1)
    """Share of people's clicks that are followed by a rating."""

    slate_size_min: int = Field(default=5, ge=1, le=20)
    slate_size_max: int = Field(default=10, ge=1, le=20)

    personalised_fraction: float = Field(default=0.35, ge=0, le=0.95)
    """Share of impressions that the logging policy picks by the user's categories."""
    exploration_fraction: float = Field(default=0.25, ge=0.05, le=1)
    """Share that it picks uniformly at random; what is left goes by popularity. Above 0, or propensities vanish."""

    num_crawlers: int = Field(default=1, ge=0, le=5)
    """Bots that come on one night a week and click nearly everything within a second."""
    crawler_share: float = Field(default=0.005, ge=0, le=0.2)
    """Share of that day's impressions which the crawlers take."""
    num_silent_bots: int = Field(default=1, ge=0, le=5)
    """Bots that look all day long and never click."""
    silent_bot_share: float = Field(default=0.02, ge=0, le=0.2)

    num_fast_crawlers: int = Field(default=0, ge=0, le=100_000)
    """Planted bots, see `bots`; they and their impressions come on top of `num_users` and `events_per_day`."""
    num_farm_accounts: int = Field(default=0, ge=0, le=100_000)
    """Fresh accounts that a click farm uses, in campaigns of `accounts_per_campaign`."""
    accounts_per_campaign: int = Field(default=40, ge=2, le=10_000)
    num_mimics: int = Field(default=0, ge=0, le=100_000)
    """Bots with the pace and the hours of people."""
    mimic_click_rate: float = Field(default=0.12, gt=0, le=1)
    """What a mimic clicks of whatever it is shown, at any position."""

    @property
    def num_accounts(self) -> int:
        """People, bots and planted bots."""
        return self.num_users + self.num_fast_crawlers + self.num_farm_accounts + self.num_mimics

    def _check(self) -> None:
        if self.slate_size_min > self.slate_size_max:
            raise ValueError(
                f"slate_size_min={self.slate_size_min}: must not be above slate_size_max={self.slate_size_max}"
            )
        if self.personalised_fraction + self.exploration_fraction > 1:
            raise ValueError(
                f"personalised_fraction={self.personalised_fraction} and exploration_fraction="
                f"{self.exploration_fraction}: together they must be at most 1"
            )
        if self.start.utcoffset() or (self.start - datetime(1970, 1, 1, tzinfo=UTC)) % _ONE_DAY:
            raise ValueError(f"start={self.start.isoformat()}: must be a midnight in UTC, e.g. 2025-01-01T00:00:00Z")
        if not 1970 <= self.start.year <= 2200:
            raise ValueError(f"start={self.start.isoformat()}: must be in the years 1970 to 2200")


def _explanation(problem: Any, model: type[JsonModel]) -> str:
    """One validation problem as 'num_users=3: input should be greater than or equal to 20'."""
    message = problem["msg"].removeprefix("Value error, ")
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"simulator: {name}: no such setting; there are {', '.join(model.model_fields)}"
    return (
        f"simulator: {name}={problem['input']!r}: {message[0].lower()}{message[1:]}"
        if name
        else f"simulator: {message}"
    )
