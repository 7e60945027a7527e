"""KServe and Feast as their manuals join them: `get_online_features(...).to_dict()` in a predictor, and a plain model.

    python -m benchmarks.serving.feast_to_dict --model DIR --feature-store DIR --port PORT [--look-ups 1]

One look-up: a row of keys (user, item, category) for each candidate, every feature by name, as Feast's documentation
has it. Three look-ups: the user, the items, and the user with each category among them, so that no key is asked for
twice; a reader who profiles the first gets there. The category of an item is known from the catalogue, which is held in
memory. Both leave out Feast's pandas path, which a feature service with an on-demand view takes: what that view
computes is computed here, by the same function.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

import feast
import kserve
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.serving.load import MODEL_NAME
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.features.request import ELAPSED_FEATURES, request_features
from evergreen.features.store import ITEMS
from evergreen.models.package import ModelPackage

TYPES = {
    ColumnKind.CATEGORICAL: pa.string(),
    ColumnKind.NUMERIC: pa.float64(),
    ColumnKind.SEQUENCE: pa.list_(pa.string()),
    ColumnKind.MULTI: pa.list_(pa.string()),
}

Columns = dict[str, list[Any]]


class FeastModel(kserve.Model):
    """Looks features up, scores, answers in the V1 protocol. What the ways have in common."""

    def __init__(self, model: Path, feature_store: Path) -> None:
        super().__init__(MODEL_NAME)
        self.package = ModelPackage.load(model)
        self.store = feast.FeatureStore(repo_path=str(feature_store))
        self.service = self.store.get_feature_service(self.package.info.feature_service)
        catalogue = pq.read_table(feature_store / ITEMS)
        self.category_of = dict(zip(catalogue["item_id"].to_pylist(), catalogue["category"].to_pylist(), strict=True))
        self.ready = True

    def features(self, instance: dict[str, Any], at: datetime) -> pa.Table:
        """(num_candidates) the columns that the model reads."""
        raise NotImplementedError

    def predict(self, payload: dict[str, Any], headers: Any = None, response_headers: Any = None) -> dict[str, Any]:
        return {"predictions": [self.answer(instance) for instance in payload["instances"]]}

    def answer(self, instance: dict[str, Any]) -> dict[str, Any]:
        candidates = instance["candidates"]
        at = datetime.fromisoformat(instance["event_timestamp"])
        scores = self.package.predict(self.features(instance, at)).tolist()
        ranked = sorted(zip(candidates, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))
        return {
            "user_id": instance["user_id"],
            "items": [
                {"item_id": item, "rank": rank, "probability": score}
                for rank, (item, score) in enumerate(ranked, start=1)
            ],
            "model_version": self.package.version,
            "event_timestamp": at.isoformat(),
        }


class FeastToDict(FeastModel):
    """One look-up."""

    def __init__(self, model: Path, feature_store: Path) -> None:
        super().__init__(model, feature_store)
        self.references: dict[tuple[str, ...], list[str]] = {}
        for view in self.service.feature_view_projections:
            if view.name != "request_context":
                keys = tuple(sorted(self.store.get_feature_view(view.name).join_keys))
                names = [f"{view.name}:{feature.name}" for feature in view.features]
                self.references.setdefault(keys, []).extend(names)

    def look_up(self, user_id: str, candidates: list[str]) -> Columns:
        """(num_candidates) stored features by name."""
        rows = [{"user_id": user_id, "item_id": item, "category": self.category_of[item]} for item in candidates]
        references = [name for names in self.references.values() for name in names]
        found: Columns = self.store.get_online_features(references, rows).to_dict()
        return found

    def features(self, instance: dict[str, Any], at: datetime) -> pa.Table:
        candidates = instance["candidates"]
        columns = self.look_up(instance["user_id"], candidates)
        columns |= {name: [value] * len(candidates) for name, value in instance["context"].items()}
        times = {name: pa.array(columns[name], pa.timestamp("us", tz="UTC")) for name in ELAPSED_FEATURES.values()}
        moment = request_features(at, pa.table(times))
        arrays = {
            feature.name: moment[feature.name]
            if feature.origin is FeatureOrigin.ON_DEMAND
            else _column(feature, columns[feature.name])
            for feature in self.package.info.features
        }
        return pa.table(arrays)


class FeastThreeLookUps(FeastToDict):
    """Each key once."""

    def look_up(self, user_id: str, candidates: list[str]) -> Columns:
        """(num_candidates) stored features by name."""
        categories = [self.category_of[item] for item in candidates]
        asked = sorted(set(categories))
        user = self._get(user_id=[user_id])
        by_category = self._get(category=asked, user_id=[user_id] * len(asked))
        place = {category: number for number, category in enumerate(asked)}
        row_of = [place[category] for category in categories]
        columns = {name: [values[row] for row in row_of] for name, values in by_category.items()}
        columns |= {name: values * len(candidates) for name, values in user.items()}
        return columns | self._get(item_id=candidates)

    def _get(self, **keys: list[str]) -> Columns:
        found: Columns = self.store.get_online_features(self.references[tuple(keys)], keys).to_dict()
        return found


def _column(feature: Feature, values: list[Any]) -> pa.Array:
    if feature.kind is ColumnKind.NUMERIC:
        return pa.array(np.array(values, dtype=np.float64), from_pandas=True)
    return pa.array(values, TYPES[feature.kind])


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of both predictors."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--feature-store", type=Path, required=True)
    options.add_argument("--port", type=int, required=True)
    return options


def serve(model: FeastModel, port: int) -> None:
    """Run a predictor as KServe does by default, without gRPC."""
    torch.set_num_threads(1)
    kserve.ModelServer(http_port=port, enable_grpc=False).start([model])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--look-ups", type=int, choices=(1, 3), default=1)
    arguments = options.parse_args()
    kind = FeastToDict if arguments.look_ups == 1 else FeastThreeLookUps
    serve(kind(arguments.model, arguments.feature_store), arguments.port)


if __name__ == "__main__":
    main()
