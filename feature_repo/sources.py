"""Sources: the feature tables as Parquet in data/, a stream of clicks, and what a request brings.

Paths are relative to this repository, so that the folder can be moved or shipped as it is.
"""

from feast import Field, FileSource, PushSource, RequestSource
from feast.types import UnixTimestamp


def _table(name: str) -> FileSource:
    return FileSource(name=name, path=f"data/{name}.parquet", timestamp_field="event_timestamp")


user_activity_table = _table("user_activity")
item_activity_table = _table("item_activity")
user_category_activity_table = _table("user_category_activity")
user_profile_table = _table("user_profile")
item_profile_table = _table("item_profile")
user_recent_table = _table("user_recent")

# `evergreen stream` pushes what users did in the last minutes.
recent_clicks = PushSource(name="recent_clicks", batch_source=user_recent_table)

request = RequestSource(name="request", schema=[Field(name="request_timestamp", dtype=UnixTimestamp)])
