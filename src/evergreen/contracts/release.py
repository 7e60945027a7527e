"""Releases: which model package serves, since when, why, and which one served before.

    releases/
      packages/<version>/    every package that was released, as it was trained
      current                link to the one that serves: what `evergreen serve --model` is given
      history.jsonl          a `Release` a line, oldest first

Going back is one command, because the package before is still there.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import AwareDatetime, Field

from evergreen.contracts.artifact import JsonModel


class CanaryCheck(JsonModel):
    """One thing that a challenger must not do worse than it may."""

    name: str
    value: float | None
    """None: could not be measured, which is no pass."""
    limit: str
    """In words, e.g. "at most 50"."""
    passed: bool


class CanaryReport(JsonModel):
    """What a challenger did with requests that the champion has answered."""

    challenger: str
    champion: str | None
    """None for the first release: nothing to compare with."""
    num_requests: int
    checks: tuple[CanaryCheck, ...]
    error: str | None = None
    """Why there was no challenger to ask, or none any more; None: there was."""
    way: str | None = None
    """How a cluster let it out, in words; None: on a server of its own, on one machine."""

    @property
    def passed(self) -> bool:
        """Whether it may serve."""
        return self.error is None and all(check.passed for check in self.checks)

    @property
    def failures(self) -> str:
        """What stands against it, in words."""
        failed = [check for check in self.checks if not check.passed]
        values = ["not measured" if check.value is None else f"{check.value:.4g}" for check in failed]
        words = [f"{c.name} is {value}, {c.limit} allowed" for c, value in zip(failed, values, strict=True)]
        return "; ".join(words if self.error is None else [self.error, *words])


class ReleaseKind(StrEnum):
    """How a package came to serve."""

    RELEASE = "release"
    ROLLBACK = "rollback"


class Release(JsonModel):
    """A package that serves from a moment on."""

    version: str
    kind: ReleaseKind
    released_at: AwareDatetime
    reason: str = Field(min_length=1)
    previous: str | None
    """Version that served before; None for the first."""
    canary: CanaryReport | None = None
