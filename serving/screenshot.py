"""The README's picture of the page: `python serving/screenshot.py RUN LOG USER --out serving/page.png`.

Serves RUN, sends LOG's events (.csv or .parquet: user_id, item_id, timestamp), opens USER in a headless Chromium,
appends the third recommendation and explains the first.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("user")
    parser.add_argument("--out", type=Path, default=Path("serving/page.png"))
    args = parser.parse_args()
    ksa = str(Path(sys.executable).parent / "ksa")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        command = [ksa, "serve", str(args.run), "--port", "0", "--state-dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        url = server.stdout.readline().split()[1]
        subprocess.run([ksa, "events", str(args.log), "--url", url], check=True)
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 900}, color_scheme="light")
        page.goto(f"{url}/?user={args.user}")
        page.click("#items li:nth-child(3) .add")
        page.wait_for_selector(".move:not(:empty)")
        page.click("#items li:first-child .why")
        page.wait_for_selector("#reasons li")
        page.screenshot(path=str(args.out))
        browser.close()
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
