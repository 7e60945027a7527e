"""The report: one safe, self-contained, reproducible page."""

import re

import numpy as np
import pyarrow as pa
import pytest

from evergreen.evaluation.evaluate import EvaluationConfig, evaluate_models
from evergreen.evaluation.report import duration_words, metric_label, write_report


def x(table: pa.Table) -> np.ndarray:
    return table["x"].to_numpy()


@pytest.fixture(scope="module")
def evaluation(clicks, tmp_path_factory):
    return evaluate_models(
        clicks.training_set,
        [clicks.scorer("deepfm", x), clicks.scorer("popularity", lambda t: np.sqrt(x(t)) / 3)],
        tmp_path_factory.mktemp("report") / "evaluation",
        tables=clicks.tables,
        snapshot=clicks.snapshot,
        config=EvaluationConfig(latency_budget_ms=5_000, latency_repetitions=10, num_replicates=50),
    )


@pytest.fixture(scope="module")
def page(evaluation) -> str:
    return evaluation.report.read_text()


def test_page_needs_no_script_and_nothing_from_the_network(page):
    assert "<script" not in page
    assert not re.findall(r"https?:|@import|url\((?!#)", page)


def test_page_shows_the_verdict_the_figures_and_the_data(evaluation, page):
    assert page.index("deepfm") < page.index("Quality")
    for heading in ("Quality against latency", "ROC", "Reliability", "By day", "Slices", "Data"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg") == 6
    assert evaluation.result.snapshot_id in page
    assert "user_rate_1h" in page  # a dropped feature


def test_text_from_the_log_is_escaped(page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_figures_take_their_colours_from_the_page(page):
    svgs = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "var(--ink)" in svgs and "var(--m1)" in svgs
    assert not re.findall(r"#[0-9a-f]{6}(?![0-9a-f])", svgs)


def test_ids_of_the_figures_do_not_clash(page):
    ids = re.findall(r' id="([^"]+)"', page)
    assert ids
    assert len(ids) == len(set(ids))


def test_the_same_result_gives_the_same_bytes(evaluation, clicks, tmp_path):
    arguments = (evaluation.result, evaluation.curves(), clicks.training_set.manifest, clicks.snapshot.manifest)
    for name in ("a.html", "b.html"):
        write_report(*arguments, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes() == evaluation.report.read_bytes()


def test_names_for_people():
    assert [metric_label(m) for m in ("ndcg_at_10", "recall_at_5", "rmse")] == ["NDCG@10", "recall@5", "RMSE"]
    assert [duration_words(s) for s in (172_800, 5_400, 90.0)] == ["2 d", "90 min", "90 s"]
