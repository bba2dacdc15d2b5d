"""The page in a real browser."""

import json
import re
import time

import pytest
from axe_playwright_python.sync_playwright import Axe
from gradio_client import Client
from playwright.sync_api import expect

from querit import HUB_ID
from space_app import ranking
from space_app.measured import measured
from tests.space_app.test_inputs import beir, pack
from tests.space_app.test_views import HOSTILE

TIDE = [
    "Flour and water make dough. It rises.",
    "The Moon's pull raises the tide twice a day. The Sun helps it.",
    "Trains leave every hour. The last one goes at ten.",
]


def fill(page, query, documents):
    page.locator("#query textarea, #query input").first.fill(query)
    page.locator("#documents textarea").fill("\n".join(documents))


def rank(page, query="Why does the tide rise?", documents=TIDE):
    fill(page, query, documents)
    page.locator("#rank").click()
    expect(page.locator("#results .q-row")).to_have_count(len(documents))


def texts(page, selector="#results .q-row .q-text"):
    return [text.strip() for text in page.locator(selector).all_text_contents()]


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).first.click()


def test_ranking_shows_order_bars_and_places(open_page, models):
    page = open_page()
    expect(page.locator("#stop")).to_be_disabled()
    rank(page)
    expected = models.ranker("Nano")("Why does the tide rise?", TIDE)
    assert texts(page) == [TIDE[row["index"]] for row in expected]
    widths = page.locator("#results .q-bar > i").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width))")
    assert widths == pytest.approx([100 * row["probability"] for row in expected], abs=0.6)
    expect(page.locator("#results .q-summary")).to_contain_text(re.compile(r"3 documents in \d+\.\d\d s"))
    assert all(re.search(r"BM25 \d → \d", text) for text in page.locator("#results .q-move").all_text_contents())
    # One number, which has a name.
    numbers = page.locator("#results .q-score").all_inner_texts()
    assert all(re.fullmatch(r"relevance\s+([<>]?\d\d?%)", text.strip()) for text in numbers)


def test_enter_ranks_and_everything_can_be_reached_by_keyboard(open_page):
    page = open_page()
    fill(page, "Why does the tide rise?", TIDE)
    page.locator("#query textarea, #query input").first.press("Enter")
    expect(page.locator("#results .q-row")).to_have_count(3)
    page.locator("#rank").focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "q-why":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#results .q-explain")).to_be_visible()
    # The button that opened it still has the focus, and closes it.
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    page.keyboard.press("Enter")
    expect(page.locator("#results .q-explain")).to_have_count(0)


@pytest.mark.parametrize("name", ["中文", "Русский", "English → seven languages", "Deutsch → English, Français"])
def test_an_example_is_one_click(open_page, name):
    page = open_page()
    page.get_by_role("button", name=name, exact=True).click()
    expect(page.locator("#results .q-row").first).to_be_visible()
    assert texts(page)[0] in page.locator("#documents textarea").input_value()


def test_why_shows_the_passage_that_counted_and_its_best_sentence(open_page):
    page = open_page()
    page.get_by_role("button", name="A long document", exact=True).click()
    page.get_by_role("button", name="Why place 1").click()
    explanation = page.locator("#results .q-explain")
    expect(explanation).to_contain_text("The passage that counted")
    expect(explanation.locator("mark")).to_contain_text("fog horn stays silent")
    assert explanation.locator("li").count() > 3


def test_a_document_that_does_not_fit_is_marked(open_page):
    page = open_page()
    rank(page, "tide", ["The tide rises. " * 400, "Short."])
    expect(page.locator("#results")).to_contain_text("only its beginning was read")
    # One sentence, read whole: there is nothing to say why.
    assert page.locator("#results .q-row", has_text="Short.").locator(".q-why").count() == 0
    assert page.locator("#results .q-why").count() == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "\n".join(TIDE)),
        ("notes.json", json.dumps(TIDE)),
        ("rows.jsonl", "\n".join(json.dumps({"n": "1", "text": text}) for text in TIDE)),
    ],
)
def test_files_fill_the_box(open_page, tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    page = open_page()
    page.get_by_text("Documents from files").click()
    page.locator("#from-file input[type=file]").set_input_files(tmp_path / name)
    expect(page.locator("#from-file")).to_contain_text("3 documents in the box above")
    page.locator("#query textarea, #query input").first.fill("Why does the tide rise?")
    page.locator("#rank").click()
    expect(page.locator("#results .q-row")).to_have_count(3)


def test_a_column_of_a_table_is_chosen(open_page, tmp_path):
    (tmp_path / "t.csv").write_text("name,story\nA long name of a thing indeed,short\nAnother long name,brief\n")
    page = open_page()
    page.get_by_text("Documents from files").click()
    page.locator("#from-file input[type=file]").set_input_files(tmp_path / "t.csv")
    box = page.locator("#documents textarea")
    expect(box).to_have_value("A long name of a thing indeed\nAnother long name")
    page.locator("#column input").click()
    page.get_by_role("option", name="story").click()
    expect(box).to_have_value("short\nbrief")


def test_two_models_side_by_side(open_page):
    page = open_page()
    fill(page, "Why does the tide rise?", TIDE)
    tab(page, "Compare")
    page.locator("#left input").click()
    page.get_by_role("option", name="Nano").click()
    page.locator("#compare").click()
    cells = page.locator("#side-by-side .q-cell")
    expect(cells).to_have_count(6)
    expect(page.locator("#side-by-side .q-head")).to_contain_text("Nano")
    expect(page.locator("#side-by-side .q-head")).to_contain_text("Tiny")
    cells.first.hover()
    assert page.locator("#side-by-side .q-same-doc").count() == 2


def test_evaluate_draws_before_and_after(open_page, tmp_path):
    page = open_page()
    tab(page, "Evaluate")
    corpus = "\n".join(json.dumps({"_id": f"d{n}", "text": text}) for n, text in enumerate(TIDE))
    queries = '{"_id": "q", "text": "Why does the tide rise?"}'
    path = pack(tmp_path / "set.zip", beir(corpus, queries, "query-id\tcorpus-id\tscore\nq\td1\t1\n"))
    page.locator("#judged-file input[type=file]").set_input_files(path)
    expect(page.locator("#judged-file")).to_contain_text("set")
    page.locator("#evaluate").click()
    expect(page.locator("#outcome .q-big")).to_have_count(2)
    expect(page.locator("#outcome .q-dumbbells li")).to_have_count(1)
    expect(page.locator("#outcome .q-gain")).to_contain_text("points of nDCG@10")
    page.locator("#evaluate-examples").click()
    expect(page.locator("#outcome .q-dumbbells li")).to_have_count(12)
    # What the page's own examples gain is no measurement.
    expect(page.locator("#outcome")).to_contain_text("not a measurement")
    assert page.locator("#outcome .q-gain").count() == 0
    pack(path, beir(corpus=b" " * 100_000_000))
    page.locator("#judged-file").get_by_label("Clear").first.click()
    page.locator("#judged-file input[type=file]").set_input_files(path)
    expect(page.locator("#judged-file")).to_contain_text("set")
    page.locator("#evaluate").click()
    expect(page.locator("#outcome [role=alert]")).to_contain_text("unpacks to more than 20 MB")


def test_adapt_shows_the_command(open_page):
    page = open_page()
    tab(page, "Adapt")
    expect(page.get_by_text("--budget-minutes").first).to_be_visible()
    expect(page.get_by_text("QUERIT_SPACE_ADAPT_MINUTES=10 querit demo")).to_be_visible()


def test_a_link_opens_the_same_ranking(open_page):
    page = open_page()
    rank(page, "Why does the tide rise? <b>&", TIDE)
    first = texts(page)
    tab(page, "Share")
    link = page.locator("#link textarea, #link input").first
    expect(link).to_have_value(re.compile("#r="))
    other = open_page(fragment="#" + link.input_value().partition("#")[2])
    expect(other.locator("#results .q-row")).to_have_count(3)
    assert texts(other) == first
    assert other.locator("#query textarea, #query input").first.input_value() == "Why does the tide rise? <b>&"
    damaged = open_page(fragment="#r=AAAA")
    expect(damaged.locator("#results [role=alert]")).to_contain_text("link is damaged")


def test_results_can_be_downloaded_and_used_in_python(open_page):
    page = open_page()
    rank(page)
    tab(page, "Share")
    expect(page.locator("#python")).to_contain_text("pipeline")
    for name in ("csv", "json"):
        with page.expect_download() as download:
            page.locator(f"#{name}").click()
        content = download.value.path().read_text(encoding="utf-8-sig")
        assert TIDE[1] in content and download.value.suggested_filename == f"ranking.{name}"
    assert [row["place"] for row in json.loads(content)["results"]] == [1, 2, 3]


def test_errors_are_said_where_the_results_are(open_page):
    page = open_page()
    page.locator("#rank").click()
    alert = page.locator("#results [role=alert]")
    expect(alert).to_contain_text("Type a query")
    fill(page, "tide", [])
    page.locator("#rank").click()
    expect(alert).to_contain_text("Give documents to rank")
    fill(page, "tide", ["x"] * 201)
    page.locator("#rank").click()
    expect(alert).to_contain_text("201 documents; at most 200")
    rank(page)
    expect(alert).to_have_count(0)


def test_a_crash_leaves_the_page_working(open_page, monkeypatch):
    page = open_page()

    def crash(*args):
        raise RuntimeError("secret detail")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(ranking, "rank", crash)
        fill(page, "tide", TIDE)
        page.locator("#rank").click()
        expect(page.locator("#results [role=alert]")).to_contain_text("went wrong on our side")
        assert "secret" not in page.content()
    rank(page)


def test_hostile_text_is_shown_as_text(open_page):
    page = open_page()
    lines = [" ".join(text.split()) + " It rises. And it falls." for text in HOSTILE if "\ud800" not in text]
    rank(page, "<script>window.hacked = 1</script> ${window.hacked=1}", lines)
    shown = texts(page)
    assert "<script>window.hacked = 1</script> It rises. And it falls." in shown
    assert any("${window.hacked = 1}" in text for text in shown)
    assert any("{{constructor" in text for text in shown) and any("␀" in text and "␛" in text for text in shown)
    assert any(text.startswith("xxx") and text.endswith("…") for text in shown)
    whys = page.locator("#results .q-why").count()
    assert whys == len(lines)
    for number in range(whys):
        page.locator("#results .q-why").nth(number).click()
        expect(page.locator("#results .q-explain")).to_have_count(1)
        expect(page.locator("#results .q-row.q-open .q-why")).to_have_text("Hide")
    tab(page, "Compare")
    expect(page.locator("#side-by-side .q-cell")).to_have_count(2 * len(lines))
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('.q script, .q img, .q svg, .q style').length") == 0


def test_right_to_left_text_runs_so(open_page):
    page = open_page()
    rank(page, "مد البحر", ["يرتفع البحر مرتين في اليوم.", "The tide rises.", "הגאות עולה"])
    for text in page.locator("#results .q-text").all():
        rtl = bool(re.search("[\u0590-\u06ff]", text.inner_text()))
        assert text.evaluate("element => getComputedStyle(element).direction") == ("rtl" if rtl else "ltr")


@pytest.mark.parametrize("width", [390, 768])
def test_nothing_is_wider_than_the_screen(open_page, width):
    page = open_page(width, 844)
    for name, count in (("English → seven languages", 7), ("A long document", 4)):
        page.get_by_role("button", name=name, exact=True).click()
        expect(page.locator("#results .q-row")).to_have_count(count)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#results .q-why").first.click()
    expect(page.locator("#results .q-explain")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    rank(page, "w" * 300, ["x" * 500, "short"])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("Compare", "Share", "Evaluate", "Adapt", "About"):
        tab(page, name)
        if name == "Evaluate":
            page.locator("#evaluate-examples").click()
            expect(page.locator("#outcome .q-dumbbells")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_fault_in_what_we_show(open_page, dark):
    page = open_page(dark=dark)
    page.get_by_role("button", name="A long document", exact=True).click()
    page.get_by_role("button", name="Why place 1").click()
    expect(page.locator("#results .q-explain")).to_be_visible()

    def faults():
        # gradio's own controls are not ours to mend.
        found = Axe().run(page, ".q, .q-header").response["violations"]
        return [(v["id"], [node["html"][:120] for node in v["nodes"]]) for v in found]

    assert faults() == []
    tab(page, "Compare")
    expect(page.locator("#side-by-side .q-cell").first).to_be_visible()
    assert faults() == []
    tab(page, "Evaluate")
    page.locator("#evaluate-examples").click()
    expect(page.locator("#outcome .q-dumbbells")).to_be_visible()
    assert faults() == []
    tab(page, "About")
    assert faults() == []


def test_on_a_phone_the_page_goes_to_the_first_result(open_page):
    page = open_page(390, 844)
    rank(page, documents=[f"{text} {number}" for number in range(4) for text in TIDE])
    first = page.locator("#results .q-row").first
    expect(first).to_be_in_viewport(ratio=0.9)
    assert first.bounding_box()["y"] < 300
    # gradio's footer has one link there, and nothing beside it.
    assert page.locator("footer").inner_text().strip() == "Settings"


def test_another_file_clears_the_ranking_of_the_last(open_page, tmp_path):
    page = open_page()
    rank(page)
    tab(page, "Share")
    expect(page.locator("#link input, #link textarea").first).to_have_value(re.compile("#r="))
    (tmp_path / "other.txt").write_text("Salt is mined.\nSalt is dried.", encoding="utf-8")
    page.get_by_text("Documents from files").click()
    page.locator("#from-file input[type=file]").set_input_files(tmp_path / "other.txt")
    expect(page.locator("#documents textarea")).to_have_value("Salt is mined.\nSalt is dried.")
    expect(page.locator("#link input, #link textarea").first).to_have_value("")
    expect(page.locator("#csv")).to_be_disabled()
    tab(page, "Ranking")
    expect(page.locator("#results .q-empty")).to_be_visible()
    assert page.locator("#results .q-row").count() == 0


def test_an_instruction_is_offered_to_models_that_take_one(open_page):
    page = open_page()
    page.get_by_text("Options", exact=True).click()
    expect(page.locator("#reading")).to_be_visible()
    instruction = page.locator("#instruction")
    expect(instruction).to_be_hidden()
    for name, offered in (("Causal", True), ("Tiny", False)):
        page.locator("#model input").click()
        page.get_by_role("option", name=name).click()
        expect(instruction).to_be_visible(visible=offered)


def test_about_says_what_the_model_scores_and_where_its_card_is(open_page):
    page = open_page()
    tab(page, "About")
    about = page.locator(".q-about")
    for name, score in measured().systems:
        expect(about.locator(".q-scores tr", has_text=name).locator("td")).to_have_text(f"{score:.1f}")
    card = about.get_by_role("link", name="The card of Nano")
    expect(card).to_have_attribute("href", f"https://huggingface.co/{HUB_ID}")


def test_dark_is_dark(open_page):
    def lightness(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")

    assert max(lightness(open_page(dark=True))) < 60 and min(lightness(open_page())) > 200


def test_the_queue_shows_its_place_and_stop_frees_the_worker(open_page, site, monkeypatch):
    scored = []

    def slow(*args):
        scored.append(1)
        time.sleep(0.1)
        return score_pairs(*args)

    score_pairs = ranking.score_pairs
    monkeypatch.setattr(ranking, "score_pairs", slow)
    monkeypatch.setattr(ranking, "STEP_TOKENS", 16)
    page = open_page()
    others = [Client(site, verbose=False) for _ in range(2)]
    jobs = [other.submit("tide", [f"text {n}" for n in range(200)], model="Tiny", api_name="/rank") for other in others]
    while len(scored) < 4:
        time.sleep(0.05)
    fill(page, "Why does the tide rise?", [f"text {n}" for n in range(200)])
    page.locator("#rank").click()
    expect(page.locator("#results").locator("xpath=..")).to_contain_text(re.compile(r"queue: \d"))
    expect(page.locator("#stop")).to_be_enabled()
    for job in jobs:
        job.cancel()
    expect(page.locator("#results [role=progressbar]")).to_be_visible()
    page.locator("#stop").click()
    expect(page.locator("#results")).to_contain_text("Stopped.")
    expect(page.locator("#stop")).to_be_disabled()
    page.wait_for_timeout(600)
    stopped = len(scored)
    page.wait_for_timeout(600)
    assert len(scored) == stopped
    monkeypatch.undo()
    rank(page)
    expect(page.locator("#stop")).to_be_disabled()
