"""Mappings: what they accept, and that what they refuse is named."""

from datetime import timedelta

import pytest

from evergreen.contracts.errors import MappingError
from evergreen.contracts.mapping import FeatureType, LogKind, Mapping, Role

GOOD = """
name = "shop"
kind = "impressions"
timestamp = { column = "ts", unit = "s" }
label = { column = "click" }
[columns]
user_id = "customer"
item_id = ["shop", "article"]
[item_features]
price = "numeric"
tags = { column = "item tags", type = "multi", separator = "," }
[context_features]
device = "categorical"
[split]
attribution_window = "15m"
"""


def test_shorthand_and_full_features_are_read() -> None:
    mapping = Mapping.load(GOOD)
    assert mapping.kind is LogKind.IMPRESSIONS
    assert mapping.features(Role.ITEM)["price"].column == "price"
    assert mapping.features(Role.ITEM)["tags"].type is FeatureType.MULTI
    assert mapping.split.attribution_window == timedelta(minutes=15)
    assert mapping.columns.item_id == ("shop", "article")
    assert list(mapping.all_features) == ["price", "tags", "device"]


def test_the_order_of_features_does_not_depend_on_the_text() -> None:
    swapped = GOOD.replace('price = "numeric"\n', "").replace(
        "[context_features]", 'price = "numeric"\n[context_features]'
    )
    assert list(Mapping.load(swapped).all_features) == list(Mapping.load(GOOD).all_features)


def test_digest_is_of_the_meaning_not_of_the_text() -> None:
    other = GOOD.replace('price = "numeric"', '# euros\nprice = { type = "numeric", column = "price" }')
    assert Mapping.load(GOOD).digest == Mapping.load(other).digest
    assert Mapping.load(GOOD).digest != Mapping.load(GOOD.replace('"15m"', '"16m"')).digest


def test_json_round_trip_keeps_everything() -> None:
    mapping = Mapping.load(GOOD)
    assert Mapping.model_validate_json(mapping.model_dump_json()) == mapping


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ('kind = "impressions"', 'kind = "clicks"'),
            "kind: Input should be 'impressions', 'interactions' or 'ratings'",
        ),
        (('kind = "impressions"', 'kind = "ratings"'), r'kind = "ratings" needs \[rating\]'),
        (('label = { column = "click" }', ""), r"needs \[label\]"),
        (('name = "shop"', 'nmae = "shop"'), "nmae: Extra inputs are not permitted"),
        (('price = "numeric"', 'price = "number"'), "item_features.price.type"),
        (('price = "numeric"', '"Price (EUR)" = "numeric"'), r"feature 'Price \(EUR\)': a name is lower case"),
        (('price = "numeric"', 'clicked = "numeric"'), "feature 'clicked': Evergreen itself uses this name"),
        (('device = "categorical"', 'price = "categorical"'), r"\['price'\] appear in more than one role"),
        (('attribution_window = "15m"', 'attribution_window = "soon"'), "split.attribution_window"),
        (('timestamp = { column = "ts", unit = "s" }', "timestamp = { unit = 's' }"), "either `column`, or `start`"),
        (("[columns]", "[columns"), "not valid TOML"),
        (('price = "numeric"', 'price = { column = "click", type = "numeric" }'), "the label"),
    ],
)
def test_a_broken_mapping_is_refused_with_the_key(change: tuple[str, str], message: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(MappingError, match=message):
        Mapping.load(GOOD.replace(*change))


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(MappingError, match=r"mapping 'movielenz'.*deskdrop, .*movielens"):
        Mapping.load("movielenz")


@pytest.mark.parametrize("name", Mapping.shipped())
def test_shipped_mappings_are_valid_and_named_like_their_file(name: str) -> None:
    mapping = Mapping.load(name)
    assert mapping.name == name
    assert mapping.description
