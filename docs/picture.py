"""Take the picture of README: the page of the demonstration's plan, as headless Chromium shows it.

    python docs/picture.py

needs Chromium and its driver (Debian: chromium, chromium-driver), and selenium.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

from selenium import webdriver

from tp_planner.cli import app

HERE = Path(__file__).resolve().parent
MODEL = ["tp_planner.demo:build_gpt", "--layout", "gpt", "--mesh", "model=2", "--batch", "8", "--optimizer", "adamw"]
MODEL += ["--loss", "sparse_categorical_crossentropy"]
WIDTH, HEIGHT = 1200, 1700
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    """Write ``plan.png`` beside this file; return 1 where there is no browser."""
    browser, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if browser is None or driver is None:
        print("no Chromium or no chromedriver; install both (Debian: chromium, chromium-driver)")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "plan.html"
        app(["plan", *MODEL, "--html", str(page)], standalone_mode=False)
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={WIDTH},{HEIGHT}"):
            options.add_argument(argument)
        chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
        chromium.get(page.as_uri())
        chromium.save_screenshot(str(HERE / "plan.png"))
        chromium.quit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
