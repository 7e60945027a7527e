"""Feature services: what a model reads, by name. Training and serving ask for the same one."""

from feast import FeatureService
from on_demand import request_context
from views import item_activity, item_profile, user_activity, user_category_activity, user_profile, user_recent

ranker_v1 = FeatureService(
    name="ranker_v1",
    features=[user_activity, item_activity, user_category_activity, user_profile, item_profile, request_context],
    description="Everything that is known about a user, an item and the moment of the request.",
)

retrieval_v1 = FeatureService(
    name="retrieval_v1",
    features=[
        user_activity[["user_history"]],
        user_profile,
        item_activity[["item_events_7d", "item_positives_7d", "item_rate_7d"]],
        item_profile,
    ],
    description="What candidates are found with: the user's history, and how items do of late.",
)

recent_v1 = FeatureService(
    name="recent_v1",
    features=[user_recent],
    description="What the user did in the last minutes, as the stream knows it.",
)
