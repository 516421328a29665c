"""TensorBoard in a real browser: a run's tags, texts, images and hyperparameters are there to be seen.

Needs Debian's chromium and chromium-driver. Without them the test is skipped, unless
IBDISTILL_REQUIRE_BROWSER is set, as in CI. IBDISTILL_SCREENSHOTS names a folder for screenshots.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import IN_FULL, TRAIN, as_arguments, launch, tiny

from ibdistill.runtime.distributed import free_port

SHOWN = """
const seen = [];
const walk = node => {
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) {
    if (child.nodeType === Node.TEXT_NODE) seen.push(child.textContent.trim());
    else if (!['STYLE', 'SCRIPT', 'NOSCRIPT'].includes(child.nodeName)) walk(child);
  }
};
walk(document.body);
return seen.filter(text => text).join('\\n');
"""
IMAGES = """
const images = [];
const walk = node => {
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.children) {
    if (child.nodeName === 'IMG' && child.naturalWidth > 100) images.push(child.src);
    walk(child);
  }
};
walk(document.body);
return images.length;
"""
TAGS = ["loss/predict", "grad/norm", "speed/tokens_per_s", "eval/valid_demo_ece", "memory/peak_gib"]
TABS = {
    f"scalars&tagFilter={'%7C'.join(tag + '$' for tag in TAGS)}": TAGS,
    "timeseries": ["Pinned", "loss", "grad"],
    "text": ["config/text_summary", "test_demo/samples/text_summary", "predicted label", "max_steps: 12"],
    "images": ["test_demo/reliability", "valid_demo/accuracy_by_length"],
    "hparams": ["objective.beta", "run.seed", "eval/test_demo_accuracy", "ours/tensorboard"],
    "custom_scalars": ["training", "losses", "share of the gradient"],
}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in found.items() if path is None]
    if missing and not os.environ.get("IBDISTILL_REQUIRE_BROWSER"):
        pytest.skip(f"no {' and no '.join(missing)} (Debian: apt-get install chromium chromium-driver)")
    assert not missing, f"IBDISTILL_REQUIRE_BROWSER is set, but there is no {', '.join(missing)}"
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    # the sandbox and /dev/shm are what containers lack
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found["chromedriver"]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """TensorBoard on a finished run, bound to loopback."""
    logdir = tmp_path_factory.mktemp("runs")
    settings = {"run.eval_every": 6, "run.eval_limit": 20, "run.test_limit": 20, "objective.method": "ib"}
    log = tmp_path_factory.mktemp("log") / "log"
    arguments = as_arguments(tiny(logdir / "ours", **settings))
    assert launch([TRAIN, *arguments], log=log, env=IN_FULL) == 0, log.read_text()
    port = str(free_port())
    server = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
    with subprocess.Popen(
        [*server, "--port", port], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        base = f"http://127.0.0.1:{port}"
        try:
            wait(
                lambda: b"ours" in read(f"{base}/data/runs"),
                lambda: f"TensorBoard shows no run: {process.poll()}",
            )
            yield base
        finally:
            process.terminate()


def read(url: str) -> bytes:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
            return answer.read()
    except OSError:
        return b""


def wait(is_so, message, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline, message()
        time.sleep(0.5)


@pytest.mark.parametrize("tab", TABS, ids=lambda tab: tab.partition("&")[0])
def test_a_tab_shows_what_the_run_wrote(browser, address, tmp_path, tab):
    browser.get("about:blank")
    browser.get(f"{address}/#{tab}")

    def missing() -> list[str]:
        shown = browser.execute_script(SHOWN)
        return [text for text in TABS[tab] if text not in shown]

    try:
        wait(lambda: not missing(), lambda: f"{tab} does not show {missing()}")
        if tab == "images":
            wait(lambda: browser.execute_script(IMAGES) >= 4, lambda: "fewer than four figures are drawn")
    finally:
        folder = Path(os.environ.get("IBDISTILL_SCREENSHOTS") or tmp_path)
        folder.mkdir(parents=True, exist_ok=True)
        shot = folder / f"tensorboard-{tab.partition('&')[0]}.png"
        browser.save_screenshot(str(shot))
    assert shot.stat().st_size > 10_000
