"""How large a page of ``corm view`` is, how fast it opens and how fast the slider moves, in headless Chromium.

    pip install playwright                                  # and Chromium, from the system's packages
    corm record --tokens 4096 --out trace
    corm view trace --policy corm:window=256,recent=256 --policy h2o:budget=0.25 --out view.html
    python benchmarks/viewer_speed.py view.html [--picture docs/viewer.png --time 2100 --token 386]

Times are measured on this machine, without a graphics card, from a move of the slider until its frame has been painted.
The script prints the median and the largest of 60 moves.
"""

import argparse
import shutil
import statistics
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
MOVE = """async times => {
  const slider = document.getElementById('time');
  const taken = [];
  for (const time of times) {
    const begin = performance.now();
    slider.value = time;
    slider.dispatchEvent(new Event('input'));
    await new Promise(done => requestAnimationFrame(() => {      // the message arrives after painting
      const channel = new MessageChannel();
      channel.port1.onmessage = () => { taken.push(performance.now() - begin); done(); };
      channel.port2.postMessage(0);
    }));
  }
  return taken;
}"""


def report(name: str, milliseconds: list[float]) -> None:
    print(f"{name}: median {statistics.median(milliseconds):.0f} ms, largest {max(milliseconds):.0f} ms")


def opened(browser, file: Path) -> tuple[Page, float]:
    page = browser.new_page(viewport={"width": 1440, "height": 820})
    page.goto(file.resolve().as_uri())
    page.wait_for_selector("body[data-ready]")
    return page, page.evaluate("new Promise(done => requestAnimationFrame(() => done(performance.now())))")


def draw(page: Page, path: Path, time: int, token: int) -> None:
    """Draws the page at one time, with a token chosen; in 256 colours, so that the file is small."""
    from PIL import Image

    page.evaluate(MOVE, [time])
    chosen = page.locator(f".text .token[data-token='{token}']").first
    chosen.scroll_into_view_if_needed()
    chosen.click()
    page.wait_for_timeout(300)
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="as corm view made it")
    parser.add_argument("--picture", type=Path, help="draw the page into this PNG file")
    parser.add_argument("--time", type=int, default=2100, help="position of the slider in the picture")
    parser.add_argument("--token", type=int, default=386, help="token that is chosen in the picture")
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        loads = []
        for _ in range(3):
            page, load = opened(browser, options.page)
            loads.append(load)
        tokens = page.locator(".panel").first.locator(".text .token").count()
        print(f"{options.page}: {options.page.stat().st_size / 2**20:.2f} MiB, {tokens:,} tokens")
        report("from opening to the first whole frame", loads)
        report("slider to the next query", page.evaluate(MOVE, [max(1, tokens // 2 + i - 60) for i in range(60)]))
        report("slider to a distant query", page.evaluate(MOVE, [(i * 7919) % tokens + 1 for i in range(60)]))
        if options.picture:
            draw(opened(browser, options.page)[0], options.picture, options.time, options.token)


if __name__ == "__main__":
    main()
