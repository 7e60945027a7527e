"""FuxiCTR's half of benchmarks/trainer.py; runs in an environment of its own, which has FuxiCTR and not Evergreen.

    python fuxictr_worker.py FOLDER LEARNING_RATE BATCH_SIZE

The wheel of FuxiCTR has all of DeepFM's parts but not the class, which lies in its repository's model zoo: it is put
together here as there. All else is as FuxiCTR does it: its training epoch with clipped gradients, its Adam, its dense
gradients. Left out, in its favour: its data loader (batches are cut beforehand), its evaluation and its checkpoints.
"""

from __future__ import annotations

import json
import sys
import time
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel

EMBEDDING_DIM, HIDDEN = 16, [128, 64]
Batch = dict[str, torch.Tensor]


class DeepFM(BaseModel):
    def __init__(self, feature_map: FeatureMap, learning_rate: float) -> None:
        super().__init__(feature_map, verbose=0, model_root=".", metrics=["logloss"])
        self.embedding_layer = FeatureEmbedding(feature_map, EMBEDDING_DIM)
        self.fm = FactorizationMachine(feature_map)
        self.mlp = MLP_Block(
            input_dim=feature_map.num_fields * EMBEDDING_DIM,
            hidden_units=HIDDEN,
            hidden_activations="ReLU",
            output_dim=1,
        )
        self.compile("adam", "binary_cross_entropy", learning_rate)
        self.reset_parameters()

    def forward(self, inputs: Batch) -> Batch:
        fields = self.get_inputs(inputs)
        vectors = self.embedding_layer(fields)
        score = self.fm(fields, vectors) + self.mlp(vectors.flatten(start_dim=1))
        return {"y_pred": self.output_activation(score)}

    def eval_step(self) -> None:
        """Nothing: validation is not timed."""

    def load_weights(self, checkpoint: str) -> None:
        """Nothing: no checkpoint is written, the last weights stay."""


def feature_map(field_rows: int, num_fields: int) -> FeatureMap:
    fields = FeatureMap("benchmark", ".")
    fields.features = OrderedDict(
        (f"field_{i}", {"source": "", "type": "categorical", "vocab_size": field_rows}) for i in range(num_fields)
    )
    fields.labels = ["label"]
    fields.num_fields = num_fields
    fields.total_features = field_rows * num_fields
    fields.default_emb_dim = EMBEDDING_DIM
    fields.set_column_index()
    return fields


def cut(ids: np.ndarray, labels: np.ndarray, order: np.ndarray, batch_size: int) -> list[Batch]:
    """Batches as FuxiCTR's loader gives them: a tensor for each column."""
    batches = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        columns = torch.from_numpy(ids[rows].astype(np.int64).T.copy())
        batches.append(
            {f"field_{i}": column for i, column in enumerate(columns)} | {"label": torch.from_numpy(labels[rows])}
        )
    return batches


def main() -> None:
    folder, learning_rate, batch_size = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = json.loads((folder / "shape.json").read_text())
    ids, labels = np.load(folder / "ids.npy"), np.load(folder / "labels.npy")
    train = shape["train_rows"]
    order = np.random.default_rng(1).permutation(train)
    batches = cut(ids, labels, order, batch_size)

    small = DeepFM(
        feature_map(shape["field_rows"] if shape["field_rows"] < 1000 else 1000, shape["fields"]), learning_rate
    )
    small.fit([{name: column % 1000 if name != "label" else column for name, column in batches[0].items()}])  # warm up
    model = DeepFM(feature_map(shape["field_rows"], shape["fields"]), learning_rate)
    started = time.process_time()
    model.fit(batches, epochs=1)
    cpu_s = time.process_time() - started

    predicted = model.predict(cut(ids[train:], labels[train:], np.arange(len(ids) - train), batch_size))
    truth = labels[train:].astype(np.float64)
    p = np.clip(predicted, 1e-7, 1 - 1e-7)
    log_loss = -np.mean(truth * np.log(p) + (1 - truth) * np.log(1 - p))
    print(json.dumps({"cpu_s": cpu_s, "log_loss": log_loss, "version": version("fuxictr"), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
