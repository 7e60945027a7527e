"""Features of rows without Feast, whose import takes seconds."""

from __future__ import annotations

import pyarrow as pa

from evergreen.contracts.feature_tables import FeatureTables
from evergreen.features.point_in_time import join_features
from evergreen.features.request import request_features

_TIME = "event_timestamp"


class Joined:
    """The values that the feature store gives; `test_feast_gives_what_the_join_gives` holds both equal."""

    def __init__(self, tables: FeatureTables) -> None:
        self._tables = tables

    def historical(self, spine: pa.Table, service: str = "ranker_v1", *, known_at: pa.Array | None = None) -> pa.Table:
        if known_at is None:
            return join_features(spine, self._tables)
        place, times = spine.column_names.index(_TIME), spine[_TIME]
        joined = join_features(spine.set_column(place, _TIME, known_at), self._tables)
        of_request = request_features(times, joined)  # how long ago is still counted to the row
        for name in of_request.column_names:
            joined = joined.set_column(joined.column_names.index(name), name, of_request[name])
        return joined.set_column(place, _TIME, times)
