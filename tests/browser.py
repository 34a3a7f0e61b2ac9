"""Pages in a browser without a window: what they draw, what they ask the network for, what they complain about."""

import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

PROBE = """<script>
  window.problems = [];
  addEventListener("error", event => problems.push(event.message));
  addEventListener("securitypolicyviolation", event => problems.push(event.blockedURI));
  addEventListener("load", () => {
    const seen = (() => { LOOK })();
    const requests = performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:"));
    const images = [...document.images].map(image => image.naturalWidth);
    const said = JSON.stringify({seen, problems, images, requests});
    document.body.replaceChildren(Object.assign(document.createElement("pre"), {id: "said", textContent: said}));
  });
</script>"""


def in_browser(source, folder):
    """What a script in a page put into the element #said, as JSON."""
    page = folder / "page.html"
    page.write_text(source)
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom".split()
    command = [CHROMIUM, *options, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)[1]))


def watched(source, folder, look):
    """{problems, requests, images: their widths, seen: what `look`, a body in JavaScript, returns} of a loaded page."""
    return in_browser(source.replace("<style>", PROBE.replace("LOOK", look) + "<style>", 1), folder)
