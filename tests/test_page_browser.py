"""The report page in a real browser: its first figure comes first, it asks for nothing, flips, slides, turns and sorts, by hand and by key, on a phone too.

Screenshots are kept in build/screenshots/. Skipped where no Chromium is installed (Debian: `apt-get install chromium`).
"""

import io
import re
import shutil
from pathlib import Path

import made_up_page
import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_report_scripts import ROOT, SCRIPTS

from dag.data.geometry import camera, normals_from_depth

SHOTS = ROOT / "build" / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Root has no sandbox, a server no graphics card: 3D is computed, and only 3D.
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader-webgl", "--enable-unsafe-swiftshader"]
PATIENCE = 300_000  # ms: of a machine that does much else
SEEDS = 200

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)}): the page cannot be opened")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import page

        made_up_page.make(root, SEEDS)
        (root / "index.html").write_text(page.build(made_up_page.sources(root, SEEDS)), encoding="utf-8")
    return root


class Opened:
    """The page in a window, with what it said and asked for."""

    def __init__(self, browser, study: Path, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "offline": True, **options})
        self.context.set_default_timeout(PATIENCE)
        self.view, self.complaints, self.requests = self.context.new_page(), [], []
        self.view.on("console", self._hear)
        self.view.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.view.on("request", lambda request: self.requests.append(request.url[:60]))
        self.view.goto(f"file://{study}/index.html", wait_until="domcontentloaded")
        self.view.wait_for_selector('body[data-ready="yes"][data-shown]', state="attached")

    def _hear(self, message) -> None:
        # That reading pixels back stalls a graphics driver is the screenshot's doing, not the page's.
        if message.type in ("error", "warning") and "GL Driver Message (OpenGL, Performance" not in message.text:
            self.complaints.append(message.text)

    def pixels(self, canvas: str) -> np.ndarray:
        """uint8 (s, s, 3) of a canvas."""
        read = "c => [c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        flat = self.view.locator(f"#{canvas}").evaluate(read)
        return np.array(flat[1:], np.uint8).reshape(flat[0], flat[0], 4)[..., :3]

    def picture(self, selector: str) -> np.ndarray:
        """uint8 (h, w, 3) of what is seen of an element."""
        return np.asarray(Image.open(io.BytesIO(self.view.locator(selector).screenshot())).convert("RGB"))

    def drawn(self, more_than: int = 0) -> int:
        """Waits for the point cloud to be drawn more often than so many times; how often it was."""
        count = "document.getElementById('cloud').dataset.drawn ?? 0"
        for _ in range(600):
            if (now := int(self.view.evaluate(count))) > more_than:
                return now
            self.view.wait_for_timeout(100)
        raise AssertionError(f"the cloud was drawn {now} times, expected more than {more_than}")

    def keep(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.view.screenshot(path=SHOTS / f"{name}.png")


@pytest.fixture(scope="module")
def opened(browser, study):
    return Opened(browser, study)


@pytest.fixture
def page(opened):
    """The page as it was opened, the first run of the first seed."""
    opened.view.evaluate("document.activeElement.blur(); $('stage').scrollIntoView({behavior: 'instant'}); state.run = 0; void chooseSeed(0)")
    opened.view.wait_for_selector('body[data-shown="baseline/0"]', state="attached")
    return opened


def test_the_first_figure_comes_first_and_nothing_is_asked_for(study, opened):
    assert (study / "index.html").stat().st_size < 15e6
    opened.drawn()
    opened.keep("top")
    assert opened.complaints == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in opened.requests)
    first, viewers = opened.view.evaluate("['first-figure', 'viewers'].map((name) => performance.getEntriesByName(name)[0].startTime / 1000)")
    assert first < viewers


def test_a_key_flips_image_depth_and_normals_of_the_same_seed(page, study):
    before = {kind: page.pixels(kind) for kind in ("image", "depth", "normals")}
    for name in ("dpg", "dcg", "both"):
        page.view.keyboard.press("ArrowRight")
        page.view.wait_for_selector(f'body[data-shown="{name}/0"]', state="attached")
        now = {kind: page.pixels(kind) for kind in before}
        assert all((now[kind] != before[kind]).any() for kind in before), name
        before = now
    page.view.keyboard.press("ArrowRight")  # there is nothing beyond the last
    assert page.view.locator("#run-name").text_content().startswith("Both (w_dc = ")
    with np.load(study / "samples/both.npz") as samples, np.load(study / "judged/both.npz") as judged:
        np.testing.assert_array_equal(before["image"], samples["images"][0])
        depth, everything = judged["judged"][0], [np.load(study / f"judged/{run}.npz")["judged"] for run in ("baseline", "dpg", "dcg", "both")]
    low, high = np.percentile(np.stack(everything), [1, 99])
    colours = matplotlib.colormaps["magma"](np.round(255 * np.clip((depth - low) / (high - low), 0, 1)).astype(int), bytes=True)[..., :3]
    assert np.abs(before["depth"].astype(int) - colours).max() <= 6  # a neighbouring colour where the code rounds
    normals = normals_from_depth(depth, camera(np.array([np.tan(np.radians(35))]), 32)[0]) * [1, 1, -1]
    assert np.abs(before["normals"] - 127.5 * (normals + 1)).max() <= 3


def test_slider_buttons_and_strip_choose_too(page):
    page.view.locator("#run").focus()
    page.view.keyboard.press("End")
    page.view.wait_for_selector('body[data-shown="both/0"]', state="attached")
    page.view.locator("#run-stops button", has_text="DCG").click()
    page.view.wait_for_selector('body[data-shown="dcg/0"]', state="attached")
    page.view.locator("#strip button").nth(0).focus()
    page.view.keyboard.press("ArrowRight")
    page.view.keyboard.press("ArrowRight")
    page.view.wait_for_selector('body[data-shown="dcg/2"]', state="attached")
    assert page.view.evaluate("document.activeElement.getAttribute('aria-label')") == "seed 2"
    page.view.keyboard.press("End")
    page.view.wait_for_selector(f'body[data-shown="dcg/{SEEDS - 1}"]', state="attached")
    page.view.locator("#stage").focus()
    page.view.keyboard.press("ArrowUp")
    page.view.wait_for_selector(f'body[data-shown="dcg/{SEEDS - 2}"]', state="attached")
    page.view.locator("#gallery").scroll_into_view_if_needed()
    page.keep("gallery")


def test_the_point_cloud_draws_turns_and_follows_the_flip(page):
    page.view.locator("#cloud").scroll_into_view_if_needed()
    count = page.drawn()
    ground = np.array([0x20, 0x26, 0x2E])
    first = page.picture("#cloud canvas")
    away = np.abs(first.astype(int) - ground).max(-1) > 12
    assert 0.15 < away.mean() < 0.95, away.mean()
    assert len(np.unique(first[away] // 16, axis=0)) > 20  # a room in its colours, not one shape
    page.view.locator("#cloud").focus()
    page.view.keyboard.press("ArrowRight")
    count = page.drawn(count)
    turned = page.picture("#cloud canvas")
    assert (turned != first).any(-1).mean() > 0.05
    page.view.locator("#run-stops button", has_text="Both").click()
    page.view.wait_for_selector('body[data-shown="both/0"]', state="attached")
    page.drawn(count)
    assert (page.picture("#cloud canvas") != turned).any(-1).mean() > 0.05


def test_the_sweep_slides_over_pictures_and_numbers(page, study):
    table = pd.read_csv(study / "tables/fig8_scale.csv").set_index("run")
    tile = "#sweep-tiles canvas >> nth=0"
    page.view.locator("#weight").focus()
    page.view.keyboard.press("Home")
    page.view.wait_for_selector('body[data-weight="sweep_0_0"]', state="attached")
    seen = [page.picture(tile)]
    for weight in (30, 100):
        page.view.keyboard.press("ArrowRight")
        page.view.wait_for_selector(f'body[data-weight="sweep_{weight}_0"]', state="attached")
        said = page.view.locator("#weight-readout").text_content()
        for column, digits in (("dfid", 1), ("dfid_low", 1), ("dfid_high", 1), ("fid", 2)):
            assert f"{table[column][f'sweep_{weight}_0']:.{digits}f}" in said
        page.view.wait_for_timeout(200)
        seen.append(page.picture(tile))
    assert all((a != b).any() for a, b in zip(seen, seen[1:], strict=False))
    page.view.locator("#ways label", has_text="both").click()
    assert page.view.locator("#levels li").count() == 5
    page.view.locator("#sweep").scroll_into_view_if_needed()
    page.keep("sweep")


def test_the_trajectory_is_scrubbed_from_noise_to_image(page, study):
    t = np.load(study / "samples/trajectory.npz")["t"]
    tiles = [f"#trajectory-tiles canvas >> nth={row * 4}" for row in range(4)]
    page.view.locator("#step").focus()
    page.view.keyboard.press("End")
    page.view.wait_for_selector(f'body[data-step="{t[-1]}"]', state="attached")
    page.view.wait_for_timeout(200)
    end = [page.picture(tile) for tile in tiles]
    page.view.keyboard.press("Home")
    page.view.wait_for_selector(f'body[data-step="{t[0]}"]', state="attached")
    page.view.wait_for_timeout(200)
    assert all((page.picture(tile) != last).any() for tile, last in zip(tiles, end, strict=True))
    page.view.keyboard.press("ArrowRight")
    page.keep("trajectory")


def test_a_heading_sorts_and_a_name_opens_the_card(page, study):
    exact = pd.read_csv(study / "tables/fig8_scale.csv", dtype=str, keep_default_na=False)
    heads = page.view.locator("#data-fig8_scale thead th")
    column = heads.all_text_contents().index(next(text for text in heads.all_text_contents() if text.strip() == "dFID ↓"))
    shown = f"[...document.querySelectorAll('#data-fig8_scale tbody tr')].map(row => Number(row.cells[{column}].dataset.raw.split('|')[0]))"
    heads.nth(column).locator("button").click()
    assert page.view.evaluate(shown) == sorted(map(float, exact["dfid"]))
    heads.nth(column).locator("button").press("Enter")
    assert page.view.evaluate(shown) == sorted(map(float, exact["dfid"]), reverse=True)
    page.keep("table")
    page.view.locator("#data-table1_guidance button.card", has_text=re.compile("^dpg$")).click()
    card = page.view.locator("#card").text_content()
    row = pd.read_csv(study / "tables/table1_guidance.csv", dtype=str).set_index("run").loc["dpg"]
    for text in (row["dfid"], row["dfid_diff_low"], "rule", "score", "paired by seed", "x86_64", "0123456789abcdef"):
        assert text in card
    page.keep("card")
    page.view.keyboard.press("Escape")
    assert not page.view.locator("#card").is_visible()


def test_a_phone_needs_no_sideways_scrolling(browser, study):
    phone = Opened(browser, study, viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True, is_mobile=True, color_scheme="dark")
    try:
        assert phone.view.evaluate("document.documentElement.scrollWidth") <= 360
        phone.keep("phone")
        for place in ("gallery", "sweep", "findings", "tables"):
            phone.view.evaluate("id => document.getElementById(id).scrollIntoView({behavior: 'instant'})", place)
            phone.view.wait_for_timeout(100)
            phone.keep(f"phone_{place}")
        edges = "[...document.querySelectorAll('#ledger td')].map(cell => cell.getBoundingClientRect()).map(box => [box.left, box.right])"
        assert all(0 <= left < right <= 360 for left, right in phone.view.evaluate(edges))
        phone.view.locator("#run-stops button").last.tap()
        phone.view.wait_for_selector('body[data-shown="both/0"]', state="attached")
        assert phone.complaints == []
    finally:
        phone.context.close()


def test_a_link_leads_to_its_section(browser, study):
    """Figures further up are drawn later, but have their place from the start."""
    fresh = Opened(browser, study)
    try:
        for place in ("ledger", "protocol", "figures", "tables"):
            fresh.view.locator(f".top nav a[href='#{place}']").click()
            fresh.view.wait_for_function("id => Math.abs(document.getElementById(id).getBoundingClientRect().top - 64) < 8", arg=place)
            fresh.view.wait_for_timeout(300)
            assert abs(fresh.view.evaluate("id => document.getElementById(id).getBoundingClientRect().top", place) - 64) < 8
    finally:
        fresh.context.close()


def test_the_button_changes_light_to_dark(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    seen = {"Auto": page.view.evaluate(ground)}
    for name in ("Light", "Dark"):
        page.view.locator("#theme").click()
        assert page.view.locator("#theme").text_content() == name
        seen[name] = page.view.evaluate(ground)
    page.keep("dark")
    assert seen["Light"] != seen["Dark"]
    page.view.locator("#theme").click()
    assert page.view.evaluate(ground) == seen["Auto"]


def test_everything_has_a_name_and_headings_go_down_in_steps(page):
    nameless = """[...document.querySelectorAll('button, input, select, img, [role=img], [role=region], [role=group], a[href]')]
      .filter(one => !(one.getAttribute('aria-label') || one.getAttribute('alt') || one.textContent.trim() || one.labels?.length || one.title))
      .map(one => one.outerHTML.slice(0, 90))"""
    assert page.view.evaluate(nameless) == []
    levels = page.view.evaluate("[...document.querySelectorAll('main h1, main h2, main h3, main h4')].map(head => Number(head.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = page.view.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))
    targets = page.view.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map(one => one.getAttribute('href').slice(1))")
    assert set(targets) <= set(ids)


def test_without_3d_the_rest_works(browser, study):
    context = browser.new_context(offline=True)
    context.set_default_timeout(PATIENCE)
    context.add_init_script("""const real = HTMLCanvasElement.prototype.getContext;
      HTMLCanvasElement.prototype.getContext = function (kind, ...more) { return kind === '2d' ? real.call(this, kind, ...more) : null; };""")
    view = context.new_page()
    view.goto(f"file://{study}/index.html", wait_until="domcontentloaded")
    view.wait_for_selector('body[data-ready="yes"][data-shown]', state="attached")
    assert "WebGL is off" in view.locator("#cloud").text_content()
    view.evaluate("$('stage').scrollIntoView({behavior: 'instant'})")
    view.keyboard.press("ArrowRight")
    view.wait_for_selector('body[data-shown="dpg/0"]', state="attached")
    context.close()
