"""The Feast repository: the one definition of every feature.

`evergreen.features.store.FeatureStore.create` copies these files beside the feature tables; `feast apply` reads them
there. Feast imports each file by its own name, so they import each other as `entities`, `sources`, `views`.
"""
