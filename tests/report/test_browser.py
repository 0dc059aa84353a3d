"""The page in a browser: it is laid out, complains about nothing and asks for nothing."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lxml import html
from support import tiny_models

from besa_cli.checkpoint.runs import Run
from besa_cli.jobs.stage import StageJob

Besa = Callable[..., Any]  # conftest.Outcome

_QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def browse(page: Path, home: Path, width: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["chromium", *_QUIET, f"--user-data-dir={home}", f"--window-size={width},900", "--enable-logging=stderr"]
    return subprocess.run(
        [*command, *words, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )


@pytest.mark.browser
def test_a_browser_shows_the_page_without_a_complaint(besa: Besa, workplace: Path) -> None:
    model = tiny_models.local(tiny_models.checkpoint(workplace / "source"))
    calibration = tiny_models.calibration_set(tiny_models.tokens())
    tiny_models.run(StageJob(Run(Path("besa-run")), model, calibration, tiny_models.request("besa")))
    assert besa("report", "--output", "page.html").code == 0
    page = workplace / "page.html"
    done = browse(page, workplace / "home", 390)
    assert re.findall(r"CONSOLE.*", done.stderr) == []
    document = html.fromstring(done.stdout)
    assert document.xpath("//h1")[0].text_content() == "besa-run"
    assert len(document.xpath("//table[@class='map']//button")) == 2 * 7

    # what a script finds in a copy without the policy: no part is wider than a phone, and a cell opens its rows
    script = """<script>
    const button = document.querySelector(".map button"); button.click();
    const rows = document.getElementById(button.getAttribute("popovertarget"));
    document.body.dataset.open = rows.matches(":popover-open");
    document.body.dataset.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
    document.body.dataset.ink = getComputedStyle(document.querySelector("figure svg text")).fill;
    </script></body>"""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text()).replace("</body>", script)
    (workplace / "tried.html").write_text(text)
    light = html.fromstring(browse(workplace / "tried.html", workplace / "home", 390).stdout).find("body")
    dark = html.fromstring(
        browse(workplace / "tried.html", workplace / "home", 390, "--blink-settings=preferredColorScheme=0").stdout
    ).find("body")
    assert (light.get("data-open"), light.get("data-wide")) == ("true", "false")
    assert light.get("data-ink") == "rgb(28, 39, 51)"
    assert dark.get("data-ink") == "rgb(230, 235, 241)"
