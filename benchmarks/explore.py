"""Frame times of the page of `hexa explore` while it is panned and zoomed in headless Chromium.

Command line: `python -m benchmarks.explore PAGE.html`; any page of `hexa explore` will do.

Each frame pans, or zooms in or out, and the time between frames is that of the browser's own frame
clock, which ticks at 60 Hz at best. Prints one line of JSON per motion. Headless Chromium draws on
the CPU: a browser with a GPU is faster.
"""

import json
import sys

from benchmarks.browser import Browser, find_program

FRAMES = 240
MEASURE = """
(async () => {
  const { pan, zoom, showAll } = window.explore;
  const motions = {
    pan: (n) => pan(9 * Math.cos(n / 20), 9 * Math.sin(n / 20)),
    pan_zoomed: (n) => { if (n === 0) zoom(6); pan(14 * Math.cos(n / 20), 14 * Math.sin(n / 20)); },
    zoom: (n) => zoom(Math.floor(n / 60) % 2 ? 1 / 1.04 : 1.04),
  };
  const found = {};
  for (const [name, move] of Object.entries(motions)) {
    showAll();
    const times = [];
    await new Promise((done) => {
      let last = null, n = 0;
      const tick = (now) => {
        if (last !== null) times.push(now - last);
        last = now;
        if (n === FRAMES) return done();
        move(n++);
        requestAnimationFrame(tick);
      };
      requestAnimationFrame(tick);
    });
    const scripts = window.explore.frames.slice(-FRAMES).sort((a, b) => a - b);
    times.sort((a, b) => a - b);
    const at = (values, share) => Math.round(100 * values[Math.floor(share * (values.length - 1))]) / 100;
    found[name] = {
      frame_ms_median: at(times, 0.5), frame_ms_p95: at(times, 0.95),
      script_ms_median: at(scripts, 0.5), script_ms_p95: at(scripts, 0.95),
    };
  }
  return found;
})()
""".replace("FRAMES", str(FRAMES))


def measure(page: str) -> dict[str, dict[str, float]]:
    """Median and 95th percentile of milliseconds between frames, and of drawing, by motion."""
    program = find_program()
    if program is None:
        raise SystemExit("no Chromium is installed")
    browser = Browser(program)
    try:
        browser.open(page)
        browser.wait_for("document.documentElement.dataset.ready")
        return browser.evaluate(MEASURE)
    finally:
        browser.close()


if __name__ == "__main__":
    for motion, times in measure(sys.argv[1]).items():
        print(json.dumps({"motion": motion, **times}), flush=True)
