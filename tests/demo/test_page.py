"""The page in a browser: it reads what is drawn, redraws it, and asks no other server."""

import base64
import os
import shutil
import subprocess
import threading
from urllib.parse import urlsplit

import build
import pytest
import torch

from tritoncaps.data import prepare_digit

for _package in ("onnx", "onnxscript"):
    pytest.importorskip(_package, reason=f"{_package} is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
expect.set_options(timeout=30_000)

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
# A 3 in hundredths of the drawing's side.
THREE = [
    (32, 24), (44, 17), (58, 18), (66, 27), (62, 40), (46, 48),
    (60, 52), (69, 63), (65, 76), (50, 83), (34, 80), (28, 74),
]  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The whole page, built and served."""
    if CHROMIUM is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)}")
    folder = tmp_path_factory.mktemp("page")
    if (build.PAGE / "runtime").is_dir():
        shutil.copytree(build.PAGE / "runtime", folder / "runtime")
    else:
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm is not installed")
        command = [npm, "view", build.RUNTIME, "version"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        # If the registry lacks the package (E404), the build has to fail.
        if asked.returncode != 0 and "E404" not in asked.stderr:
            pytest.skip(f"npm cannot ask its registry: {asked.stderr.splitlines()[:1]}")
    build.build(folder)
    server = build.server(folder, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def browser(address):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Open the page in a new window. In the end, no script has failed or asked another server."""
    faults, hosts, contexts = [], set(), []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(address)
        expect(page.locator("body")).to_have_attribute("data-state", "ready", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []
    assert hosts == {urlsplit(address).netloc}


@pytest.fixture
def bare_page(browser):
    """A page that has not gone anywhere, and may fail."""
    with browser.new_context() as context:
        yield context.new_page()


def places(page, points):
    """Points of the window, of points in hundredths of the drawing's side."""
    box = page.locator("#drawing").bounding_box()
    return [
        (box["x"] + x / 100 * box["width"], box["y"] + y / 100 * box["height"]) for x, y in points
    ]


def draw(page, points, end=True):
    """Draw a stroke by mouse."""
    first, *others = places(page, points)
    page.mouse.move(*first)
    page.mouse.down()
    for point in others:
        page.mouse.move(*point, steps=3)
    if end:
        page.mouse.up()


def pixels(page, canvas):
    """The grey values of a canvas, and its alpha, both (H, W) in 0 .. 255."""
    width, encoded = page.evaluate(
        """(id) => {
          const canvas = document.getElementById(id);
          const { width, height } = canvas;
          const copy = new OffscreenCanvas(width, height);
          const context = copy.getContext("2d", { willReadFrequently: true });
          context.drawImage(canvas, 0, 0);
          const { data } = context.getImageData(0, 0, width, height);
          let text = "";
          for (let k = 0; k < data.length; k += 4)
            text += String.fromCharCode(data[k], data[k + 3]);
          return [width, btoa(text)];
        }""",
        canvas,
    )
    values = torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.uint8)
    return values.int().view(-1, width, 2).unbind(-1)


def shown(page, canvas):
    grey, alpha = pixels(page, canvas)
    assert (alpha == 255).all(), f"nothing is shown on #{canvas}"
    return grey


def after(page, before):
    """The redrawn digit, once it is no longer the one before."""
    for _ in range(100):
        now = shown(page, "redrawn")
        if not now.equal(before):
            return now
        page.wait_for_timeout(50)
    raise AssertionError("the digit was not redrawn")


def test_a_drawn_three_is_read_and_redrawn(open_page):
    page = open_page()
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()
    draw(page, THREE)
    expect(page.get_by_role("status")).to_contain_text("It reads 3.")
    expect(page.locator("#answer")).to_have_text("3")
    expect(page.locator(".bar.is-answer .digit")).to_have_text("3")
    assert float(page.locator(".bar.is-answer .value").inner_text()) > 0.9

    # What the page has centred and scaled is what predict.py would make of the drawing.
    _, ink = pixels(page, "drawing")
    seen = prepare_digit((255 - ink)[None].byte())[0] * 255
    assert (shown(page, "seen") - seen).abs().max() <= 1
    redrawn = shown(page, "redrawn")
    assert redrawn.max() > 100

    slider = page.get_by_label("Dimension 5")
    read = slider.input_value()
    slider.fill("0.6")
    expect(page.locator("#dimension-5 + .value")).to_have_text("0.60")
    assert (after(page, redrawn) - redrawn).abs().max() > 50
    moved = shown(page, "redrawn")
    page.get_by_role("button", name="Reset the numbers").click()
    expect(slider).to_have_value(read)
    assert (after(page, moved) - redrawn).abs().max() <= 8  # a slider has steps of 0.01

    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_role("status")).to_have_text("The drawing is empty.")
    expect(page.locator("#answer")).to_be_empty()
    expect(slider).to_be_disabled()


def test_colours_over_the_drawing_follow_the_chosen_capsule(open_page):
    page = open_page()
    draw(page, THREE)
    expect(page.get_by_role("status")).to_contain_text("It reads 3.")
    _, every = pixels(page, "shares")
    assert every.max() > 100
    page.get_by_role("button", name="Primary capsule 7").click()
    _, one = pixels(page, "shares")
    assert 0 < one.sum() < every.sum()
    page.get_by_role("button", name="Primary capsule 7").click()
    assert (pixels(page, "shares")[1] == every).all()
    page.get_by_label("Show the places").uncheck()
    assert pixels(page, "shares")[1].max() == 0


def test_the_examples_are_read(open_page):
    page = open_page()
    for digit in range(10):
        page.get_by_role("button", name=f"Example: {digit}").click()
        expect(page.get_by_role("status")).to_contain_text(f"It reads {digit}.")
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_role("status")).to_have_text("The drawing is empty.")


def test_a_one_is_drawn_by_keyboard(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Drawing area")).to_be_focused()
    expect(page.get_by_text("The arrow keys move the pen")).to_be_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    for _ in range(22):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    expect(page.get_by_role("status")).to_contain_text("It reads 1.")
    page.keyboard.press("Control+z")
    expect(page.get_by_role("status")).to_have_text("The drawing is empty.")


def test_a_finger_draws_on_a_phone(open_page):
    page = open_page(viewport={"width": 320, "height": 640}, has_touch=True, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    touch = page.context.new_cdp_session(page)
    for number, (x, y) in enumerate(places(page, THREE)):
        kind = "touchMove" if number else "touchStart"
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    expect(page.get_by_role("status")).to_contain_text("It reads 3.")
    assert page.evaluate("scrollY") == 0


def test_a_dot_is_ink(open_page):
    page = open_page()
    draw(page, [(50, 50)])
    expect(page.get_by_role("status")).to_contain_text("capsule's length")
    assert (pixels(page, "drawing")[1] > 0).sum() == pytest.approx(22**2 * torch.pi, rel=0.05)


def test_a_stroke_that_is_taken_back_while_it_is_drawn_ends(open_page):
    page = open_page()
    line = [(50, 20), (50, 80)]
    for control in ("Undo", "Clear", "Example: 1"):
        draw(page, line)
        draw(page, [(20, 20), (20, 50)], end=False)
        page.get_by_role("button", name=control).dispatch_event("click")
        left = pixels(page, "drawing")[1]
        page.mouse.move(*places(page, [(90, 90)])[0], steps=3)
        page.mouse.up()
        assert pixels(page, "drawing")[1].equal(left), control
        page.get_by_role("button", name="Clear").dispatch_event("click")
    draw(page, line, end=False)
    page.keyboard.press("Control+z")
    page.mouse.move(*places(page, [(90, 90)])[0], steps=3)
    page.mouse.up()
    expect(page.get_by_role("status")).to_have_text("The drawing is empty.")


def test_keys_do_not_draw_while_the_mouse_does(open_page):
    page = open_page()
    page.get_by_label("Drawing area").focus()
    draw(page, [(20, 20), (20, 50)], end=False)
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    page.mouse.move(*places(page, [(20, 80)])[0], steps=3)
    page.mouse.up()
    expect(page.get_by_role("status")).to_contain_text("It reads 1.")
    assert pixels(page, "drawing")[1][:, 280:].max() == 0  # the keys' pen is in the middle


def test_the_status_is_about_the_drawing_that_is_seen(open_page):
    page = open_page()
    status = page.get_by_role("status")
    draw(page, [(50, 20), (50, 80)], end=False)
    expect(page.locator("#answer")).to_have_text("1")
    expect(status).to_be_empty()
    page.mouse.up()
    expect(status).to_contain_text("It reads 1.")
    page.get_by_role("button", name="Clear").click()

    page.get_by_label("Drawing area").focus()
    page.keyboard.press("Space")
    for _ in range(22):
        page.keyboard.press("ArrowDown")
    expect(status).to_be_empty()
    page.keyboard.press("Tab")  # lifts the pen
    expect(status).to_contain_text("It reads 1.")
    page.get_by_role("button", name="Clear").click()

    rows = range(3, 102, 7)
    draw(page, [(x, y) for y in rows for x in (1, 120, 1)])
    expect(status).to_contain_text("There is too much ink to see a digit.")


def test_the_drawing_fits_on_a_low_screen(open_page):
    page = open_page()
    for width, height in [(568, 320), (640, 360), (740, 360)]:
        page.set_viewport_size({"width": width, "height": height})
        box = page.locator("#drawing").bounding_box()
        assert box["height"] == pytest.approx(box["width"], abs=0.5)
        assert box["height"] < height
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_redrawn_digit_is_in_sight_of_the_last_slider(open_page):
    page = open_page(viewport={"width": 360, "height": 480})
    page.locator("#dimension-16").evaluate("slider => slider.scrollIntoView({block: 'end'})")
    assert page.locator("#redrawn").bounding_box()["y"] >= 0


def test_high_contrast_keeps_the_bars(open_page):
    page = open_page(forced_colors="active")
    draw(page, THREE)
    expect(page.get_by_role("status")).to_contain_text("It reads 3.")
    fill = page.locator(".is-answer .fill")
    colour = "element => getComputedStyle(element).backgroundColor"
    assert fill.evaluate(colour) != page.locator("body").evaluate(colour)


@pytest.mark.parametrize(
    "file", ["runtime/*.mjs", "runtime/*.wasm", "models/encoder.onnx", "models/decoder.onnx"]
)
def test_a_file_that_is_missing_is_a_plain_message(address, bare_page, file):
    bare_page.route(f"**/{file}", lambda route: route.fulfill(status=404))
    bare_page.goto(address)
    status = bare_page.get_by_role("status")
    expect(status).to_contain_text("build it again with demo/build.py", timeout=60_000)
    draw(bare_page, THREE)
    expect(bare_page.get_by_role("button", name="Clear")).to_be_enabled()
    expect(status).to_contain_text("The networks do not run.")


def test_a_network_that_fails_while_it_runs_is_a_plain_message(address, bare_page):
    def swap(route):
        route.fulfill(response=route.fetch(url=f"{address}models/encoder.onnx"))

    bare_page.route("**/decoder.onnx", swap)
    bare_page.goto(address)
    expect(bare_page.locator("body")).to_have_attribute("data-state", "ready", timeout=60_000)
    draw(bare_page, THREE)
    expect(bare_page.locator("body")).to_have_attribute("data-state", "failed")
    bare_page.wait_for_timeout(200)  # in which the answer would have been said
    expect(bare_page.get_by_role("status")).to_contain_text("The networks do not run.")


def test_a_page_that_is_opened_as_a_file_says_what_it_needs(bare_page):
    bare_page.goto((build.PAGE / "index.html").resolve().as_uri())
    status = bare_page.get_by_role("status")
    expect(status).to_be_visible()
    expect(status).to_contain_text("a web server, such as python demo/build.py --open")


def pictures():
    """Pictures with all that the preparation distinguishes, (H, W), uint8."""
    generator = torch.Generator().manual_seed(0)

    def noise(height, width, most):
        return torch.randint(0, most + 1, (height, width), generator=generator)

    stroke = torch.full((90, 70), 250)
    stroke[12:71, 20:27] = 30
    stroke[60:66, 20:49] = 60
    tiny = noise(9, 7, 255)
    tiny[[0, -1]] = tiny[:, [0, -1]] = 0
    touching = torch.full((60, 100), 240)
    touching[30:40, :61] = 10
    return {
        "dark-on-bright": stroke,
        "bright-on-dark": 255 - stroke,
        "noisy-paper": (stroke - noise(90, 70, 12)).clamp(min=0),
        "enlarged": tiny,
        "touches-the-edge": touching,
        "off-centre": torch.nn.functional.pad(stroke, (0, 101, 37, 0), value=250),
    }


def test_the_page_prepares_pictures_as_python_does(open_page):
    page = open_page()
    for name, picture in pictures().items():
        height, width = picture.shape
        image = page.evaluate(
            """async ([values, width, height]) => {
              const { prepareDigit } = await import("./digit.js");
              return Array.from(prepareDigit(values, width, height).image);
            }""",
            [picture.flatten().tolist(), width, height],
        )
        expected = prepare_digit(picture[None].byte()).flatten()
        assert (torch.tensor(image) - expected).abs().max() < 1e-4, name
    blank = page.evaluate(
        """async () => (await import("./digit.js")).prepareDigit(Array(400).fill(250), 20, 20)"""
    )
    assert blank is None
