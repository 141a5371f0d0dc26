import re
from html.parser import HTMLParser

import pytest

from p2d_cli.core.aer import HeadMap, MetricValue, SeedGroup
from p2d_cli.reporting.html import aer_html
from p2d_cli.reporting.table import columns

HOSTILE = "<script>alert(1)</script>\"'&<!-- ${x} {{ 7 * 7 }} {% raw %} é 漢"
VOID = {"meta", "br", "line", "circle", "polyline", "polygon", "rect", "path"}
GROUP = SeedGroup(
    name="p2d", members=(0,), seeds=(0, 1), aer=0.12, speedup=1 / 0.12, str_ratio=0.1,
    metrics={"exact_match": MetricValue(0.6, 0.5, 0.7, 50)}, ranges={"exact_match": (0.55, 0.65)},
    is_control=False, is_reference=False,
)  # fmt: skip


class Page(HTMLParser):
    """Elements in order, with their attributes and text; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.parents = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "attributes": dict(attributes), "text": "", "inside": [e["tag"] for e in self.open]}
        assert len(element["attributes"]) == len(attributes)
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}.items()
        return [e for e in self.elements if e["tag"] == tag and wanted <= e["attributes"].items()]


def test_the_page_needs_nothing_but_itself(report):
    text = aer_html(report)
    page = Page(text)
    assert {e["tag"] for e in page.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "embed"})
    targets = {e["attributes"]["id"] for e in page.elements if "id" in e["attributes"]}
    links = {value for e in page.elements for key, value in e["attributes"].items() if key in {"href", "src"}}
    assert links
    assert links <= {f"#{target}" for target in targets}
    assert not any(key.startswith("on") for e in page.elements for key in e["attributes"])
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_every_colour_of_the_light_page_has_one_in_the_dark(report):
    light, dark = re.findall(r":root \{(.*?)\}", aer_html(report), flags=re.DOTALL)
    assert set(re.findall(r"(--[\w-]+):", light)) == set(re.findall(r"(--[\w-]+):", dark))


def test_the_table_holds_every_figure(report):
    page = Page(aer_html(report))
    shown = columns(report)
    for number, row in enumerate(report.rows, start=1):
        assert page.all("tr", id=f"run-{number}")[0]["text"].startswith(f"{number}{row.name}")
    cells = [e["text"] for e in page.all("td") if "data-label" in e["attributes"]]
    assert cells == [column.cell(row) for row in report.rows for column in shown]


def test_the_plot_names_each_scored_run_on_hover(report):
    page = Page(aer_html(report))
    assert len(page.all("svg", class_="wide")) == len(page.all("svg", class_="narrow")) == 1
    titles = [e["text"].splitlines()[0] for e in page.all("title") if "svg" in e["inside"]]
    scored = [row.name for row in report.rows if row.metrics and not row.is_reference]
    assert titles == scored * 2  # once in the wide plot, once in the narrow one; the reference was cut short
    hollow = [e for e in page.all("circle", class_="marker control") if e["inside"][-1] == "a"]
    assert len(hollow) == 2
    assert "1 of the 6 runs have no such score" in page.all("figcaption")[0]["text"]


def test_stage_times_are_drawn_to_scale(row, make_report):
    page = Page(aer_html(make_report(row("a", 500.0), row("b", 800.0), row("c", 0.0))))
    widths = {}
    for element in page.all("span"):
        if element["attributes"].get("class", "").startswith("piece"):
            name, what = element["attributes"]["title"].split(": ")
            widths[name, what.split()[0]] = float(re.fullmatch(r"width:([\d.]+)%", element["attributes"]["style"])[1])
    assert widths["a", "mine-data"] == pytest.approx(3 * widths["a", "score-heads"], abs=0.01)
    assert widths["b", "train"] / widths["a", "train"] == pytest.approx(1.6, abs=0.001)
    assert not any(name == "c" for name, _ in widths)
    assert "torn end" not in aer_html(make_report(row("a", 500.0)))


def test_a_reference_that_dwarfs_the_others_is_cut_and_said_so(row, make_report):
    reference = row("long", 1000.0, score_heads_seconds=0.0, mine_data_seconds=0.0, train_seconds=1000.0,
                    is_reference=True)  # fmt: skip
    report = make_report()
    page = Page(aer_html(type(report)(report.reference, (row("a", 50.0), reference), (), ())))
    assert len(page.all("span", class_="piece train cut")) == 1
    assert "1,000 s" in page.all("span", class_="total")[1]["text"]
    assert any("torn end" in e["text"] for e in page.all("p"))


def test_whatever_comes_from_a_report_is_escaped(row, make_report):
    value = MetricValue(0.5, 0.4, 0.6, 3)
    hostile = row(HOSTILE, 10.0, metrics={HOSTILE: value, "exact_match": value}, mixed=(HOSTILE,), path=HOSTILE)
    text = aer_html(make_report(hostile, warnings=(HOSTILE,), flags=(HOSTILE,)))
    page = Page(text)
    assert not page.all("script")
    assert "<!-- " not in text
    assert page.all("code")[0]["text"] == HOSTILE
    assert [e["text"] for e in page.all("li") if e["text"] == HOSTILE] == [HOSTILE, HOSTILE]


def test_warnings_come_first_and_many_are_folded(row, make_report):
    warnings = tuple(f"warning {number}" for number in range(10))
    text = aer_html(make_report(row("a"), warnings=warnings))
    page = Page(text)
    assert [e["text"] for e in page.all("li") if e["text"].startswith("warning")] == list(warnings)
    folded = page.all("details")[0]["text"]
    assert folded.startswith("4 more")
    assert "warning 5" not in folded
    assert text.index("warning 0") < text.index("<svg")


def test_a_report_without_scores_still_makes_a_page(row, make_report):
    report = make_report()
    page = Page(aer_html(type(report)(report.reference, (row("a", score=None),), (), ())))
    assert not page.all("svg")
    assert any("No run has a score" in e["text"] for e in page.all("p"))


def test_other_scores_have_their_own_table(row, make_report):
    value = MetricValue(0.5, 0.4, 0.6, 3)
    page = Page(aer_html(make_report(row("a", metrics={"exact_match": value, "token_f1": value}))))
    assert any(e["text"] == "Other scores" for e in page.all("h2"))
    assert any(e["text"] == "token_f1" for e in page.all("th"))
    assert not any(e["text"] == "Other scores" for e in Page(aer_html(make_report(row("a")))).all("h2"))


def test_runs_of_several_seeds_stand_first(row, make_report):
    page = Page(aer_html(make_report(row("a"), groups=(GROUP,))))
    [table] = page.all("table", class_="main seeds")
    for words in ("p2d", "0.600 [0.500, 0.700]", "0.550 to 0.650", "0.120", "8.33×"):
        assert words in table["text"]
    titles = [e["text"] for e in page.all("h2")]
    assert titles.index("Over seeds") < titles.index("All runs, lowest AER first")


def test_runs_of_several_seeds_are_one_point(row, make_report):
    page = Page(aer_html(make_report(row("p2d, seed 0"), row("p2d, seed 1"), groups=(GROUP,))))
    points = [e for e in page.all("a") if e["attributes"]["href"].startswith("#group-")]
    assert len(points) == 2, "one in each of the two sizes of the plot"
    assert all(e["text"].startswith("p2d\nAER 0.120 (8.33×)\nexact_match 0.600 [0.500, 0.700]") for e in points)
    [line] = [e for e in page.all("tr") if e["attributes"].get("id") == "group-1"]
    assert "p2d" in line["text"]
    assert any("are one point" in e["text"] for e in page.all("figcaption"))


def test_heads_are_drawn_side_by_side(row, make_report):
    maps = (
        HeadMap("pad", "a", 2, 3, (4,), "013589", ("one", "two", "three", "four")),
        HeadMap(HOSTILE, "b", 1, 2, (0, 1), "90", (HOSTILE,)),
    )
    page = Page(aer_html(make_report(row("a"), head_maps=maps)))
    first, second = (e for e in page.all("figure") if "maps" in str(e["inside"]) or e["text"].count(" heads"))
    assert first["text"].split("\n")[0] == "pad: 1 of 6 headsone, two, three and 1 more"
    assert HOSTILE in second["text"]
    chosen = [e["attributes"]["d"] for e in page.all("path", class_="chosen")]
    assert chosen == ["M1 1h8v8h-8z", "M11 11h8v8h-8z", "M1 1h8v8h-8zM11 1h8v8h-8z"], "the legend's first"
    assert not page.all("path", class_="all")
    assert not page.all("path", class_="best")
    shades = [float(e["attributes"]["opacity"]) for e in page.all("path", class_="level")]
    assert shades == pytest.approx([1 / 9, 3 / 9, 5 / 9, 8 / 9, 1.0, 1.0], abs=0.01)


def test_heads_that_read_have_marks_of_their_own_and_a_legend(row, make_report):
    trained = HeadMap("pad", "a", 2, 3, (4,), "013589", ("one",))
    reading = HeadMap("readout", "b", 2, 3, (5,), "013589", ("two",), reads_all=(0, 2), reads_best=(2, 4, 5))
    page = Page(aer_html(make_report(row("a"), head_maps=(trained, reading))))
    [legend] = page.all("ul", class_="legend marks")
    assert [line for line in legend["text"].split("\n") if line] == [
        "selected for training",
        "reads all rows",
        "reads those that the others found best",
    ]
    first, second = (e["text"] for e in page.all("figure") if " heads" in e["text"])
    assert "rows" not in first
    assert "2 read all rows, 3 the best" in second

    def middles(mark):
        """Return the heads of the second map that carry a mark, by the middles of its circles."""
        drawn = page.all("path", class_=mark)[-1]["attributes"]["d"]
        found = re.findall(r"M([\d.]+) ([\d.]+)a([\d.]+) ", drawn)
        return [int((float(y) - 5) / 10) * 3 + int((float(x) + float(radius) - 5) / 10) for x, y, radius in found]

    assert middles("all") == [0, 2]
    assert middles("best") == [2, 4, 5]
    assert len(page.all("path", class_="all")) == len(page.all("path", class_="best")) == 2
    alone = Page(aer_html(make_report(row("a"), head_maps=(trained,)))).all("ul", class_="legend marks")[0]["text"]
    assert "selected for training" in alone
    assert "read" not in alone


def test_the_recipe_is_shown_as_it_is(report):
    page = Page(aer_html(report, recipe="[grid]\nheads = ['<b>']\n"))
    assert page.all("pre")[0]["text"] == "[grid]\nheads = ['<b>']\n"
    assert not Page(aer_html(report)).all("pre")
