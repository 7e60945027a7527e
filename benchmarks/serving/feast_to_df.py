"""KServe and Feast the obvious way: a feature service, a row for each candidate, `to_df()`, the eager model.

python -m benchmarks.serving.feast_to_df --model DIR --feature-store DIR --port PORT
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pyarrow as pa

from benchmarks.serving.feast_to_dict import TYPES, FeastModel, parser, serve


class FeastToDf(FeastModel):
    """One look-up, `to_df`."""

    def features(self, instance: dict[str, Any], at: datetime) -> pa.Table:
        rows = [
            {
                "user_id": instance["user_id"],
                "item_id": item,
                "category": self.category_of[item],
                "request_timestamp": at,
            }
            for item in instance["candidates"]
        ]
        frame = self.store.get_online_features(self.service, rows).to_df()
        for name, value in instance["context"].items():
            frame[name] = value
        features = self.package.info.features
        return pa.Table.from_pandas(
            frame[[feature.name for feature in features]],
            schema=pa.schema([(feature.name, TYPES[feature.kind]) for feature in features]),
            preserve_index=False,
        )


def main() -> None:
    arguments = parser(__doc__).parse_args()
    serve(FeastToDf(arguments.model, arguments.feature_store), arguments.port)


if __name__ == "__main__":
    main()
