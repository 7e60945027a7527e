"""The page: one safe, self-contained, reproducible file that says what the results say."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from evergreen.contracts.decision import Verdict
from evergreen.laboratory.page import PAGE, write_page
from evergreen.laboratory.results import LoopResults
from evergreen.laboratory.story import tell
from evergreen.simulator.scenarios import SCENARIOS

_VOID = {"meta", "path", "br", "hr", "img", "link", "input"}


class _Reader(HTMLParser):
    """Collects ids and links, and holds every element to be closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name == "href"]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)


@pytest.fixture(scope="module")
def page(results, tmp_path_factory) -> str:
    return write_page(results, tmp_path_factory.mktemp("page")).read_text()


def _row(page: str, name: str) -> list[str]:
    """Marks of a strip."""
    cells = re.search(rf'<span class="name">{name}</span>\s*<div class="cells"[^>]*>(.*?)</div>\n', page)[1]
    return re.findall(r">([^<>]*)</div>", cells + "</div>")


def _changed(results: LoopResults, number: int, **update) -> LoopResults:
    """The same results with one day of the loop changed."""
    ours, *others = results.arms
    days = tuple(day.model_copy(update=update) if day.day == number else day for day in ours.days)
    return results.model_copy(update={"arms": (ours.model_copy(update={"days": days}), *others)})


def test_page_needs_no_script_and_nothing_from_the_network(page):
    assert "<script" not in page
    assert not re.findall(r"https?:|@import|url\((?!#)|src=", page)


def test_page_is_well_formed_and_its_inner_links_lead_somewhere(page):
    reader = _Reader(page)
    assert (reader.open, reader.unbalanced) == ([], [])
    assert len(reader.ids) == len(set(reader.ids)) == 14
    inner = {link[1:] for link in reader.links if link.startswith("#")}
    assert inner == set(reader.ids)


def test_links_are_relative_and_lead_to_what_the_results_name(results, page):
    outer = [link for link in _Reader(page).links if not link.startswith("#")]
    days = results.arm("ours").days
    named = {path for day in days for path in (day.page, day.report, day.decision)}
    package = days[6].retraining.package
    logs = {arm.logs["click log"] for arm in results.arms}
    assert set(outer) == {*named, *logs, f"{package}/", f"{package}/MODEL_CARD.md", "loop.json"}
    assert not any(link.startswith("/") or ":" in link for link in outer)


def test_odd_path_becomes_a_link_and_nothing_else(results, tmp_path):
    odd = _changed(results, 3, page='a b/#1?"x".html', report="javascript:alert(1)")
    links = _Reader(write_page(odd, tmp_path).read_text()).links
    assert {"a%20b/%231%3F%22x%22.html", "javascript%3Aalert%281%29"} <= set(links)


def test_text_from_the_results_is_escaped(page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;no better&lt;/b&gt;" in page


def test_page_begins_with_the_story(results, page):
    story = tell(results)
    assert f'<div class="name">{story.headline}</div>' in page
    assert page.index(story.headline, page.index("<body")) < page.index("Day by day")
    assert "On day 7, 2 days after it began, 90\xa0% of the loss was won back." in page


def test_figure_has_a_line_for_each_policy_the_oracle_and_chance_and_marks_the_event(page):
    figure = page[page.index("<svg") : page.index("</svg>")]
    assert re.findall(r"<title>(.*?)</title>", figure) == [
        "at random",
        "an oracle",
        "retrained daily",
        "never retrained",
        "the loop",
    ]
    assert ">day 5: tastes shifted</div>" in page


def test_lines_are_to_scale(page):
    def heights(name: str) -> list[float]:
        path = re.search(rf'<title>{name}</title><path class="\w+" d="M(.*?)"', page)[1]
        return [100 - float(point.split()[1]) for point in path.split(" L")]

    oracle, loop = heights("an oracle"), heights("the loop")
    assert len(oracle) == len(loop) == 14
    assert [low / high for low, high in zip(loop, oracle, strict=True)] == pytest.approx(
        [0.75] * 5 + [0.50, 0.45] + [0.72] * 7, abs=1e-3
    )


def test_strips_have_a_mark_for_every_day(page):
    quiet = ["·"] * 5
    assert _row(page, "decision") == ["·", "·", "↻", "·", "·", "·", "↻", *["·"] * 7]
    assert _row(page, "model") == ["1", "2"]
    assert "span 7" in page
    assert _row(page, "features") == [*quiet, "▲", "▲", *["·"] * 7]
    assert _row(page, "predictions")[8] == "~"
    assert _row(page, "labels") == ["?", *["·"] * 13]
    assert _row(page, "quality") == ["?", *["0"] * 4, "+12", "+12", *["0"] * 7]


def test_change_is_marked_only_where_its_trigger_was_raised(page):
    cells = re.search(r'<span class="name">quality</span>\s*(.*)', page)[1]
    assert re.findall(r'class="(\w+)">\+12<', cells) == ["stable", "drifted"]


def test_every_evening_has_its_verdict_reason_training_gate_and_canary(page):
    evenings = re.findall(r'<li id="day-(\d+)"(.*?)</li>', page, flags=re.DOTALL)
    assert [int(number) for number, _ in evenings] == list(range(14))
    refused, released = evenings[2][1], evenings[6][1]
    assert "not released" in refused and "it did not come so far" in refused
    assert "released" in released and "not released" not in released
    for words in ("41,250 rows", "8,123 rows with 431 clicks", "-0.1100 (-0.1300 to -0.0900)", "200 requests", "p99"):
        assert words in released
    assert "held back: persistence" in evenings[5][1]


def test_table_holds_the_numbers_of_the_figure(results, page):
    table = page[page.index("The same numbers as a table") :]
    rows = re.findall(r"<tr><td>(\d+), .*?</tr>", table[: table.index("</table>")])
    assert rows == [str(day) for day in range(14)]
    cells = re.search(r"<tr><td>6, (.*?)</tr>", table)[1]
    for rate in ("3.60", "4.00", "4.80", "8.00", "2.00", "3.70"):
        assert f"<td>{rate}\xa0%</td>" in cells


def test_costs_are_a_row_for_each_policy(page):
    table = page[page.index("What it costs") :]
    rows = re.findall(r"<tr class=.*?</tr>", table)
    assert [re.findall(r"<td>([\d.]+)</td>", row) for row in rows] == [
        ["2", "1", "20.0"],
        ["0", "0", "0.0"],
        ["14", "14", "140.0"],
    ]


def test_alarm_and_rollback_are_in_the_strip_and_in_its_key(results, tmp_path):
    changed = _changed(results, 9, verdict=Verdict.ALARM)
    changed = _changed(changed, 10, verdict=Verdict.ROLLBACK)
    page = write_page(changed, tmp_path).read_text()
    assert _row(page, "decision")[9:11] == ["!", "↩"]
    assert "</i>alarm</li>" in page and "</i>rollback</li>" in page


@pytest.mark.parametrize("scenario", [*SCENARIOS, "of-my-own"])
def test_page_of_every_scenario_can_be_drawn(make_results, scenario, tmp_path):
    page = write_page(make_results(scenario), tmp_path).read_text()
    assert _Reader(page).unbalanced == []
    assert ('class="event"' in page) == (scenario not in ("stable", "seasonal", "of-my-own"))


def test_loop_of_one_day_without_clicks_can_be_drawn(make_results, tmp_path):
    results = make_results(policies=("ours",))
    (arm,) = results.arms
    day = arm.days[0].model_copy(
        update=dict.fromkeys(("click_rate", "expected_rate", "oracle_rate", "random_rate"), 0.0)
        | {"model_versions": {}}
    )
    one = results.model_copy(update={"arms": (arm.model_copy(update={"days": (day,)}),)})
    page = write_page(one, tmp_path).read_text()
    assert "nan" not in page and _Reader(page).unbalanced == []


def test_names_at_the_ends_of_lines_do_not_cover_each_other(make_results, tmp_path):
    page = write_page(make_results(), tmp_path).read_text()
    places = sorted(float(at) for at in re.findall(r'class="end \w+" style="top: ([\d.]+)%"', page))
    assert len(places) == 5
    assert min(below - above for above, below in pairwise(places)) >= 6.49
    assert places[0] >= 0 and places[-1] <= 100


def test_the_same_results_give_the_same_bytes(results, tmp_path):
    first = write_page(results, tmp_path).read_bytes()
    results.write(tmp_path / "loop.json")
    assert write_page(LoopResults.read(tmp_path / "loop.json"), tmp_path).read_bytes() == first
    assert (tmp_path / PAGE).exists()


def test_every_colour_is_there_in_light_and_dark(page):
    style = page[page.index("<style") : page.index("</style>")]
    light, dark = style[: style.index("@media")], style[style.index("@media") : style.index("* {")]
    used = set(re.findall(r"var\(--(\w[\w-]*)\)", page)) - {"color", "days", "left", "right"}
    assert used == set(re.findall(r"--([\w-]+): #", light)) == set(re.findall(r"--([\w-]+): #", dark))
