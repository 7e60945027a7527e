"""The report: one safe, self-contained, reproducible page."""

import re

import numpy as np
import pyarrow as pa
import pytest

from evergreen.contracts.evaluation import BASE_RATE
from evergreen.evaluation.evaluate import EvaluationConfig, evaluate_models
from evergreen.evaluation.figures import Series
from evergreen.evaluation.ranking import RECENT_POPULARITY
from evergreen.evaluation.report import duration_words, metric_label, write_report
from evergreen.models.registry import MODEL_NAMES


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
    for heading in ("Quality against latency", "ROC", "Reliability", "By day", "Warm and cold", "Data"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg") == 6
    assert evaluation.result.snapshot_id in page
    assert "user_rate_1h" in page  # a dropped feature


def test_warm_and_cold_is_one_table_with_a_row_for_every_model(evaluation, page):
    table = page[page.index("<h2>Warm and cold</h2>") :]
    table = table[: table.index("</section>")]
    parts = [part for part in evaluation.result.slices if part.dimension in ("user", "item")]
    header = table[table.index("<thead>") : table.index("</thead>")]
    assert re.findall(r"<th>(.*?)</th>", header) == ["model", *(part.name for part in parts)]
    assert [name for name in ("base rate", "popularity", "deepfm") if name in table] == [
        "base rate",
        "popularity",
        "deepfm",
    ]
    for part in parts:
        for estimate in part.models.values():
            assert f"{estimate.value:,.4f}" in table
    assert "new items left out: 0 rows, at least 100 are needed." in table


def test_picture_of_quality_against_latency_has_the_budget_and_names_what_is_over_it(clicks, evaluation, tmp_path):
    slow = evaluation.result.models[-1]
    latency = slow.latency.model_copy(update={"p99_ms": 9_000.0, "within_budget": False})
    models = (*evaluation.result.models[:-1], slow.model_copy(update={"latency": latency}))
    result = evaluation.result.model_copy(update={"models": models})
    write_report(
        result, evaluation.curves(), clicks.training_set.manifest, clicks.snapshot.manifest, tmp_path / "a.html"
    )
    page, before = (tmp_path / "a.html").read_text(), evaluation.report.read_text()
    assert "budget 5000 ms</text>" in page
    assert f"Over the budget, hollow: {slow.name}." in page
    assert "No model is over the budget of 5000 ms." in before


def test_text_from_the_log_is_escaped(page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_figures_take_their_colours_from_the_page(page):
    svgs = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "var(--ink)" in svgs and "var(--m1)" in svgs
    assert not re.findall(r"#[0-9a-f]{6}(?![0-9a-f])", svgs)


def test_every_model_of_the_registry_has_a_colour_of_its_own_in_light_and_dark(page):
    needed = {BASE_RATE, RECENT_POPULARITY, *MODEL_NAMES}
    for number in range(len(needed)):
        colours = re.findall(rf"--m{number}: (#[0-9a-f]{{6}});", page)
        assert len(set(colours)) == 2
    assert len({Series("model", number).css for number in range(len(needed))}) == len(needed)


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
