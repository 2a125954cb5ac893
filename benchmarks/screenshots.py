"""Pictures of a report at 1280 and 390 pixels: ``python -m benchmarks.screenshots report.html docs/``.

Needs Chromium with its driver, and selenium. Without a network: the page asks for nothing.
"""

import argparse
import base64
import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
)
WIDTHS = (1280, 390)


def browser() -> tuple[str, str] | None:
    """Chromium and its driver, where both are installed."""
    found = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    return found if found[0] and found[1] else None  # type: ignore[return-value]


@contextlib.contextmanager
def opened(path: Path, width: int = 1280, dark: bool = False) -> Iterator[Any]:
    """A driver that shows a page in a window of this width, in light or dark.

    Raises:
        ValueError: there is no browser.
    """
    from selenium import webdriver

    programs = browser()
    if programs is None:
        raise ValueError("chromium or chromedriver: not installed; on Debian apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
        try:
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            driver.execute_cdp_cmd("Network.enable", {})
            driver.get(path.resolve().as_uri())
            yield driver
        finally:
            driver.quit()


def shoot(driver: Any, path: Path, height: int | None = None, top: int = 0) -> None:
    """The page from ``top`` on as a PNG of few colours, rare ones among them; all of it, or ``height`` pixels."""
    from PIL import Image

    whole = driver.execute_script("return document.documentElement.scrollHeight")
    width = driver.execute_script("return innerWidth")
    area = {"x": 0, "y": top, "width": width, "height": min(height or whole, whole - top), "scale": 1}
    asked = {"captureBeyondViewport": True, "clip": area}
    data = base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", asked)["data"])
    Image.open(io.BytesIO(data)).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def main() -> None:
    """Both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path, help="where report-1280.png and report-390.png are written")
    parser.add_argument("--height", type=int, help="pixels from the top; the whole page without it")
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    for width in WIDTHS:
        path = given.folder / f"report-{width}.png"
        with opened(given.page, width, given.dark) as driver:
            shoot(driver, path, given.height)
        print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
