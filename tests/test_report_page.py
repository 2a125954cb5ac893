"""The page in a real browser, without a network: errors, requests, contrast, width, and the numbers of tokens."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from reports import HOSTILE, compared

from benchmarks.screenshots import WIDTHS, browser, opened, shoot
from rlkl.report.build import report

selenium = pytest.importorskip("selenium", reason="selenium is not installed")
pytestmark = pytest.mark.skipif(browser() is None, reason="no chromium with its driver on this machine")

ARMS = {name: {"optimiser": {"learning_rate": 1e-3 * (k + 1)}} for k, name in enumerate(("reinforce", "ppo", "dpo"))}

CONTRAST = """
const luminance = ([r, g, b]) => [r, g, b].map((x) => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, k) => sum + x * [0.2126, 0.7152, 0.0722][k], 0);
const sheet = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
const canvas = sheet.getContext('2d', {willReadFrequently: true});
const rgba = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data]; };
const over = (top, under) => top.slice(0, 3).map((x, k) => (x * top[3] + under[k] * (255 - top[3])) / 255);
const ground = (element) => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
};
const low = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const parent = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || ['SCRIPT', 'STYLE'].includes(parent.tagName)) continue;
  if (!parent.getClientRects().length) continue;
  const style = getComputedStyle(parent), under = ground(parent);
  const ink = over(rgba(parent instanceof SVGElement ? style.fill : style.color), under);
  const [a, b] = [luminance(ink), luminance(under)].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) low.push([ratio, walker.currentNode.data.trim().slice(0, 40), parent.tagName]);
}
return low;
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a comparison with a failed run and hostile prompts."""
    folder = tmp_path_factory.mktemp("runs")
    made = compared(folder, ARMS, [0, 1, 2], lambda arm, seed, kl: 0.3 + len(arm) / 50 * kl**0.5 + 0.01 * seed)
    (made / "dpo,seed=2/final/README.md").unlink()
    (made / "dpo,seed=2/error.txt").write_text(f"RunError: {HOSTILE}\n")
    return report([made], folder / "report.html")


@pytest.fixture(params=[(w, d) for w in WIDTHS for d in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}", scope="module")
def each(request: pytest.FixtureRequest, path: Path) -> Iterator[Any]:
    """The page at both widths, light and dark."""
    with opened(path, *request.param) as driver:
        yield driver


@pytest.fixture(scope="module")
def page(path: Path) -> Iterator[Any]:
    """The page as most read it."""
    with opened(path) as driver:
        yield driver


def test_nothing_is_wrong_and_nothing_is_asked_for(each):
    messages = [json.loads(entry["message"])["message"] for entry in each.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    own = each.current_url  # not what the browser's empty first tab asks for
    assert [one["request"]["url"] for one in sent if one["documentURL"] == own] == [own]
    assert each.get_log("browser") == []


def test_no_text_is_hard_to_read(each):
    for details in each.find_elements("css selector", "details"):
        each.execute_script("arguments[0].open = true", details)
    for radio in each.find_elements("css selector", "input[name=measure]"):
        each.execute_script("arguments[0].click()", radio)
        assert each.execute_script(CONTRAST) == [], radio.get_attribute("value")


def test_the_page_is_no_wider_than_its_window_and_tables_scroll_in_their_boxes(each):
    for details in each.find_elements("css selector", "details"):
        each.execute_script("arguments[0].open = true", details)
    wide, window = each.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= window
    outside = """return [...document.querySelectorAll('table, pre')].filter((e) => e.scrollWidth > innerWidth
      && !e.closest('.scroll')).length"""
    assert each.execute_script(outside) == 0


def test_captions_of_wide_tables_stay_inside_the_window_wherever_the_table_is_scrolled(each):
    for details in each.find_elements("css selector", "details"):
        each.execute_script("arguments[0].open = true", details)
    cut = """return [...document.querySelectorAll('caption')].flatMap((caption) => {
      const box = caption.closest('.scroll'), text = document.createRange();
      text.selectNodeContents(caption);
      return [0, box.scrollWidth].map((left) => { box.scrollLeft = left;
        return [...text.getClientRects()].map((r) => [r.left, r.right]); }).flat();
    })"""
    seen = each.execute_script(cut)
    wide = """return [...document.querySelectorAll('caption')].filter(
      (e) => e.closest('.scroll').scrollWidth > e.closest('.scroll').clientWidth).length"""
    window = each.execute_script("return document.documentElement.clientWidth")
    assert each.execute_script(wide) >= (2 if window < 600 else 0)
    assert len(seen) > 10 and [ends for ends in seen if ends[0] < 0 or ends[1] > window + 0.5] == []


def test_hostile_samples_stay_text(page):
    assert page.title == "page – rlkl"
    assert HOSTILE in page.execute_script("return document.querySelector('.prompt h3').textContent")
    assert page.execute_script("return document.querySelectorAll('img').length") == 0


def test_pointing_at_a_token_shows_its_numbers(page):
    from selenium.webdriver.common.action_chains import ActionChains

    cell = page.find_elements("css selector", ".prompt:not([hidden]) .tokens")[1]
    token = cell.find_elements("css selector", "span")[3]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    ActionChains(page).move_to_element(token).perform()
    tip = page.find_element("id", "tip")
    data = page.execute_script(
        "return JSON.parse(document.getElementById('data').textContent).numbers[arguments[0]]", 1
    )
    assert tip.is_displayed()
    assert tip.text.splitlines()[0] == f"token 4: {token.text.strip()}"
    assert f"KL, nats: {data['kl'][3]:g}" in tip.text.splitlines()
    assert "log p of the reference: −1.5" in tip.text


def test_the_keyboard_goes_from_token_to_token(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.querySelectorAll('.prompt:not([hidden]) .tokens')[1].querySelector('span').focus()")
    tip = page.find_element("id", "tip")
    for key, place in (
        (Keys.ARROW_RIGHT, 2),
        (Keys.ARROW_RIGHT, 3),
        (Keys.ARROW_LEFT, 2),
        (Keys.END, 28),
        (Keys.HOME, 1),
    ):
        ActionChains(page).send_keys(key).perform()
        assert tip.text.startswith(f"token {place}: ")
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not tip.is_displayed()
    stops = "return [...document.querySelectorAll('.tokens')].map((g) => g.querySelectorAll('[tabindex=\"0\"]').length)"
    assert set(page.execute_script(stops)) == {1}


def test_a_tap_shows_the_numbers_inside_the_window(path):
    with opened(path, 390) as phone:
        token = phone.find_elements("css selector", ".prompt:not([hidden]) .tokens span")[5]
        phone.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
        token.click()
        box = phone.execute_script("return document.getElementById('tip').getBoundingClientRect().toJSON()")
    assert box["width"] > 50
    assert box["left"] >= 0 and box["right"] <= 390 and box["top"] >= 0 and box["bottom"] <= 900


def test_tokens_are_coloured_by_what_is_chosen(page):
    colours = (
        "return [...document.querySelectorAll('.tokens')[1].children].map((e) => getComputedStyle(e).backgroundColor)"
    )
    seen = {}
    for measure in ("kl", "advantage", "reward/gold", ""):
        page.execute_script(f"document.querySelector('input[name=measure][value=\"{measure}\"]').click()")
        seen[measure] = page.execute_script(colours)
    assert len(set(seen["kl"])) > 5
    assert len(set(seen["advantage"])) == 1
    assert seen["reward/gold"][-1] != seen["reward/gold"][0] == seen[""][0]
    assert len(set(seen[""])) == 1


def test_a_token_of_a_tenth_of_a_nat_is_seen_beside_an_arm_that_has_collapsed(tmp_path):
    folder = compared(tmp_path, ARMS, [0], lambda arm, seed, kl: 0.3)
    for arm, kl in (("reinforce", [-0.1, 0.1, 1.0]), ("ppo", [0.1, 0.5, 1.0]), ("dpo", [20.0, 5.0, 20.0])):
        path = folder / f"{arm},seed=0/samples.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["tokens"] = {"text": ["a", "b", "c"], "kl": kl if row["step"] else [0, 0, 0]}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = """return [...document.querySelectorAll('.tokens')].slice(1, 4).map((g) => [...g.children].map(
      (e) => e.style.backgroundColor.match(/(less|more)\\) (\\d+)%/).slice(1).join(' ')))"""
    with opened(report([folder], tmp_path / "page.html")) as page:
        seen = page.execute_script(shares)
        scale = page.find_element("css selector", ".scale").text
    assert seen == [["less 17", "more 17", "more 55"], ["more 17", "more 39", "more 55"], ["more 55"] * 3]
    assert scale.split("\n")[0] == "≤ −1" and "≥ 1" in scale and "on a √ scale" in scale


def test_a_word_of_several_tokens_stays_on_one_line(tmp_path):
    folder = compared(tmp_path, ARMS, [0], lambda arm, seed, kl: 0.3)
    for path in folder.glob("*/samples.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["tokens"] = {"text": ["a", *["  Bogot", "", "á"] * 9], "kl": [0.1] * 28}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tops = """const cell = document.querySelector('.prompt:not([hidden]) .tokens'), spans = [...cell.children].slice(1);
      cell.style.width = arguments[0] + 'px';
      const line = (e, k) => Math.round([...e.getClientRects()].at(k).bottom / 8);
      return spans.filter((e, k) => k % 3 < 2 && line(e, -1) !== line(spans[k + 1], 0)).length"""
    with opened(report([folder], tmp_path / "page.html")) as page:
        parts = page.execute_script("return document.querySelector('.part').getBoundingClientRect().toJSON()")
        assert [page.execute_script(tops, width) for width in range(90, 300, 7)] == [0] * 30
    assert parts["width"] > 2 and parts["height"] > 10


def test_one_seed_is_shown_at_a_time(page):
    shown = "return [...document.querySelectorAll('.prompt')].filter((e) => !e.hidden).map((e) => e.dataset.seed)"
    assert page.execute_script(shown) == ["0", "0"]
    page.execute_script(
        "const s = document.querySelector('.seed select'); s.value = '1'; s.dispatchEvent(new Event('change'))"
    )
    assert page.execute_script(shown) == ["1", "1"]
    page.execute_script(
        "const s = document.querySelector('.seed select'); s.value = '0'; s.dispatchEvent(new Event('change'))"
    )


def test_an_arm_can_be_hidden_in_every_figure(page):
    drawn = """return [...document.querySelectorAll('figure .arm-0')].filter(
      (e) => getComputedStyle(e).display !== 'none').length"""
    button = page.find_element("css selector", ".legend button")
    assert page.execute_script(drawn) > 8
    page.execute_script("arguments[0].click()", button)
    assert (page.execute_script(drawn), button.get_attribute("aria-pressed")) == (0, "false")
    page.execute_script("arguments[0].click()", button)
    assert page.execute_script(drawn) > 8


def test_colours_follow_the_scheme(path):
    strokes = (
        "return [...document.querySelectorAll('figure .arm-0 path')].map((e) => getComputedStyle(e).stroke).join()"
    )
    seen = []
    for dark in (False, True):
        with opened(path, dark=dark) as page:
            seen.append(page.execute_script(strokes))
    assert seen[0] != seen[1]


def test_screenshots_are_small_pictures_of_the_page(each, tmp_path):
    """``RLKL_SHOTS=folder`` keeps them, to be looked at."""
    width, dark = each.execute_script("return [innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]")
    file = Path(os.environ.get("RLKL_SHOTS") or tmp_path) / f"report-{width}{'-dark' if dark else ''}.png"
    shoot(each, file, 1500)
    image = Image.open(file).convert("L")
    assert image.size == (width, 1500)
    assert (image.getpixel((2, 2)) < 100) == dark
    assert 10_000 < file.stat().st_size < 300_000
