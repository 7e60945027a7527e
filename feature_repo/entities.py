"""Entities: what features are about. A key is a string, as in the event schema."""

from feast import Entity, ValueType

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING, description="Who asks.")
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING, description="What may be recommended.")
category = Entity(
    name="category", join_keys=["category"], value_type=ValueType.STRING, description="The item's category."
)
