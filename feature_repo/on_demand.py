"""The on-demand view: what can only be known when the request comes."""

import pandas as pd
from feast import Field
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, String
from sources import request
from views import item_activity, item_profile, user_activity, user_profile

from evergreen.features.request import CALENDAR_FEATURES, ELAPSED_FEATURES


@on_demand_feature_view(
    name="request_context",
    sources=[
        request,
        user_activity[["user_last_event_timestamp", "user_last_positive_timestamp"]],
        item_activity[["item_last_positive_timestamp"]],
        user_profile[["user_first_seen"]],
        item_profile[["item_first_seen"]],
    ],
    schema=[Field(name=name, dtype=String) for name in CALENDAR_FEATURES]
    + [Field(name=name, dtype=Float64) for name in ELAPSED_FEATURES],
    mode="pandas",
    description="Hour and weekday (UTC), and seconds since what is stored with a time.",
)
def request_context(inputs: pd.DataFrame) -> pd.DataFrame:
    """Hour, weekday, recency and age at `request_timestamp`."""
    # Feast stores this function by its source and runs it elsewhere: it must bring its own imports.
    from evergreen.features.request import request_features_frame

    return request_features_frame(inputs)
