"""What is wrong with a page as a browser shows it: overflow, labels that overlap or are cut off, errors, requests."""

from contextlib import contextmanager
from time import monotonic

import httpx

WAIT = 200_000  # milliseconds: a busy machine is slow

#: Runs in the page; gives sentences about what is wrong with its layout.
LAYOUT = """
() => {
  const wrong = [], width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) wrong.push(`page is ${document.documentElement.scrollWidth} wide`);
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    const scrolls = element.parentElement.closest(".scroll, pre");
    if (box.width && !scrolls && (box.right > width + 1 || box.left < -1))
      wrong.push(`<${element.tagName.toLowerCase()}> reaches from ${box.left} to ${box.right}`);
  }
  let labels = 0;
  for (const svg of document.querySelectorAll("figure svg")) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    labels += texts.length;
    texts.forEach(([words, box], place) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1
          || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        wrong.push(`"${words}" is cut off`);
      for (const [others, other] of texts.slice(place + 1)) {
        const wide = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const tall = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        if (wide > 1 && tall > 2) wrong.push(`"${words}" lies on "${others}"`);
      }
    });
  }
  return {wrong, labels};
}
"""

#: Runs before a page's own scripts; counts the answers and the timers that it waits for.
RESTING = """
(() => {
  const { setTimeout, clearTimeout, fetch } = window, { json } = Response.prototype, timers = new Set();
  let open = 0;
  window.setTimeout = (work, wait, ...given) => {
    const timer = setTimeout(() => { timers.delete(timer); work(...given); }, wait);
    timers.add(timer);
    return timer;
  };
  window.clearTimeout = (timer) => { timers.delete(timer); clearTimeout(timer); };
  const counted = (answer) => {
    open += 1;
    answer.catch(() => null).finally(() => setTimeout(() => { open -= 1; })); // once the page has dealt with it
    return answer;
  };
  window.fetch = (...given) => counted(fetch(...given));
  Response.prototype.json = function () { return counted(json.call(this)); };
  window.atRest = () => !open && !timers.size;
})();
"""


def look(browser, address, *, width, scheme="light", media="screen"):
    """Open a page and list what is wrong with it.

    Returns:
        Sentences, and how many labels of figures were seen.
    """
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(120_000)  # for a busy machine
    wrong = []

    def watch(route, request):
        if request.url == address or request.url.startswith("data:"):
            route.continue_()
        else:
            wrong.append(f"asks for {request.url}")
            route.abort()

    try:
        context.route("**/*", watch)
        page = context.new_page()
        page.on("console", lambda said: wrong.append(f"console: {said.text}") if said.type != "log" else None)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.emulate_media(media=media, color_scheme=scheme)
        page.goto(address)
        found = page.evaluate(LAYOUT)
        return [*wrong, *found["wrong"]], found["labels"]
    finally:
        context.close()


@contextmanager
def looked_at(browser, address, *, width=1280, scheme="light", path=""):
    """A page that must ask for nothing elsewhere and report nothing wrong."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    wrong = []
    try:
        # Matches nothing the page asks for, but keeps the browser's interception on from the first request to the last:
        # where a test removes its only route and adds another, Chromium turns it off and on, and lets requests through.
        context.route("**/never-asked-for", lambda route: route.abort())
        page = context.new_page()
        page.add_init_script(RESTING)
        page.set_default_timeout(WAIT)
        page.on("request", lambda r: None if r.url.startswith(address) else wrong.append(f"asks for {r.url}"))
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address + path)
        yield page, wrong
        assert wrong == []
    finally:
        context.close()


def at_rest(page):
    """Wait until the page waits for nothing: what is drawn now stays until somebody does something."""
    page.wait_for_function("() => atRest()")


class Held(list):
    """Routes of questions that are not answered until the test says so, the oldest first."""

    def __init__(self, page, where):
        super().__init__()
        self.page, self.holds = page, True
        page.route(where, self.hold)

    def hold(self, route):
        if self.holds:
            self.append(route)
        else:
            route.continue_()

    def wait(self):
        end = monotonic() + WAIT / 1000
        while not self:
            assert monotonic() < end, "no question came to be held"
            self.page.wait_for_timeout(20)

    def answer_one(self):
        self.wait()
        self.pop(0).continue_()

    def answer_all(self):
        """These, and those that come after."""
        self.wait()
        self.holds = False
        while self:
            self.pop(0).continue_()


def names(page, letter="a"):
    return page.locator(f"#list-{letter} .item .name").all_inner_texts()


def titles(address, model, **body):
    answer = httpx.post(f"{address}recommend", json={"model": model, "k": 10, **body}, timeout=WAIT / 1000).json()
    return [row["title"] for row in answer["items"]]


def shows(page, expected, letter="a"):
    """Wait until a list shows these titles, in order."""
    page.wait_for_function(
        "([letter, wanted]) => JSON.stringify([...document.querySelectorAll(`#list-${letter} .item .name`)]"
        ".map(one => one.textContent)) === JSON.stringify(wanted)",
        arg=[letter, expected],
    )
