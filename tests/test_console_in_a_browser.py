"""The console in a real browser: what people see, send and are told, live and after a restart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from playwright.sync_api import Locator, Page, WebSocketRoute, expect

from tests.browser import (
    NARROW,
    WIDE,
    chromium,
    needs_chromium,
    sign_in,
    take_pictures,
    watch,
)
from tests.live import LiveGateway

pytestmark = needs_chromium

# An agent that keeps the prompt and takes its time: until there is a file `go`.
AGENT = 'cat > "$0/prompt"; while [ ! -e "$0/go" ]; do sleep 0.05; done; echo "Seen by <b>me</b>"; '
# Until the page tries again, at the latest, while the gateway starts.
RECOVERY_MILLISECONDS = 20_000


def connection(page: Page) -> Locator:
    return page.locator("#connection")


def expect_live(page: Page) -> None:
    expect(connection(page)).to_have_text(
        "Live", use_inner_text=True, timeout=RECOVERY_MILLISECONDS
    )


def number(page: Page, title: str) -> Locator:
    return page.locator("#numbers button", has_text=title).locator("strong")


def session_link(page: Page, key: str) -> Locator:
    return page.locator("#sessions").get_by_role("link", name=re.compile(f"^{re.escape(key)}\\s"))


def items(page: Page, kind: str) -> Locator:
    return page.locator(f"#timeline [data-kind={kind}]")


def scrolls_sideways(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth > window.innerWidth"))


def tab_to(page: Page, target: Locator) -> None:
    """Press Tab until the target has the focus, which is seen at every stop."""
    seen = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
    for _ in range(80):
        page.keyboard.press("Tab")
        there, is_seen = target.evaluate(f"node => [node === document.activeElement, {seen}]")
        assert is_seen or page.evaluate("document.activeElement === document.body")
        if there:
            return
    raise AssertionError(f"{target} cannot be reached with the Tab key")


def test_what_happens_is_seen_and_steered_and_outlives_a_restart(
    live_gateway: LiveGateway, tmp_path: Path
) -> None:
    live_gateway.manage("agents", "set", "main", "--", "/bin/sh", "-c", AGENT, str(tmp_path))
    with chromium(live_gateway) as browser:
        page = browser.new_page()
        problems = watch(page)
        page.goto("/")
        sign_in(page, "admin", live_gateway.admin_password)
        expect_live(page)
        loads: list[Page] = []
        page.on("load", lambda page: loads.append(page))
        expect(page.get_by_text('manage.py system_event "Hello"')).to_be_visible()

        # An event comes from the command line, its heartbeat runs and ends.
        text = "<img src=x onerror=alert(1)> from the command line"
        live_gateway.manage("system_event", text, "--session-key", "hook:deploy")
        session_link(page, "agent:main:hook:deploy").click()
        expect(page.get_by_role("heading", name="agent:main:hook:deploy")).to_be_focused()
        expect(items(page, "event")).to_contain_text([text])
        expect(items(page, "heartbeat")).to_contain_text(["running"])
        expect(number(page, "Running")).to_have_text("1")
        (tmp_path / "go").touch()
        expect(items(page, "heartbeat")).to_contain_text(["delivered"])
        expect(items(page, "event")).to_contain_text(["delivered"])
        expect(number(page, "Running")).to_have_text("0")
        items(page, "heartbeat").locator("summary").click()
        words = items(page, "heartbeat").locator("details pre")
        expect(words).to_have_text([(tmp_path / "prompt").read_text(), "Seen by <b>me</b>"])

        # An event is sent with the form: it completes the key, and says what it means.
        form = page.get_by_role("form", name="Send an event")
        key = form.get_by_label("Session key")
        expect(key).to_have_value("agent:main:hook:deploy")
        key.fill("Depl")
        expect(page.locator("#keys option")).to_have_attribute("value", "agent:main:hook:deploy")
        key.fill("Hook:Form")
        expect(page.locator("#goes-to")).to_have_text("Goes to agent:main:hook:form (new)")
        form.get_by_label("Text").fill("from the form")
        form.get_by_role("button", name="Send").click()
        expect(page.locator("#receipt")).to_contain_text("Queued in agent:main:hook:form as event")
        page.locator("#receipt").get_by_role("link").click()
        expect(items(page, "event")).to_contain_text(["from the form"])
        expect(form.get_by_label("Text")).to_have_value("")

        # A key that is refused is explained as one types, and when it is sent all the same.
        why = 'session key "agent:ops:x" targets agent "ops" but the default agent is "main"'
        form.get_by_label("Agent").select_option("")
        key.fill("agent:ops:x")
        expect(page.locator("#goes-to")).to_contain_text(why)
        form.get_by_label("Text").fill("for nobody")
        form.get_by_role("button", name="Send").click()
        expect(page.get_by_role("alert").filter(has_text=why)).to_be_visible()
        expect(form.get_by_label("Text")).to_have_value("for nobody")
        take_pictures(page, "console-refused")

        # The gateway goes, something happens meanwhile, and it comes back.
        page.go_back()
        expect(page.get_by_role("heading", name="agent:main:hook:deploy")).to_be_visible()
        live_gateway.stop()
        lost = re.compile(r"Connection lost\s*; next try in \d+ s")
        expect(connection(page)).to_contain_text(lost)
        expect(page.get_by_role("button", name="Try now")).to_be_visible()
        form.get_by_role("button", name="Send").click()
        expect(page.get_by_role("alert").filter(has_text="Not sent")).to_be_visible()
        take_pictures(page, "console-lost")
        live_gateway.manage("system_event", "while it was away", "--session-key", "hook:deploy")
        live_gateway.start(port=live_gateway.port)
        expect_live(page)
        expect(items(page, "heartbeat")).to_contain_text(["delivered", "delivered"])
        expect(items(page, "event").locator("pre")).to_have_text(["while it was away", text])
        expect(page.locator("#sessions .code")).to_have_text(
            ["agent:main:hook:deploy", "agent:main:hook:form", "agent:main:main"]
        )
        expect(page.get_by_label(re.compile("^Throughput, .* 3 events delivered"))).to_be_visible()
        take_pictures(page, "console-session")

        # All heartbeats are paused, which asks first, and resumed.
        page.get_by_role("button", name="Pause heartbeats").click()
        page.get_by_role("dialog").get_by_role("button", name="Keep them running").click()
        page.get_by_role("button", name="Pause heartbeats").click()
        page.get_by_role("dialog").get_by_role("button", name="Pause heartbeats").click()
        expect(page.get_by_text("Heartbeats are paused")).to_be_visible()
        page.get_by_role("link", name="All sessions").click()
        key.fill("hook:form")
        form.get_by_label("Text").fill("while paused")
        form.get_by_role("button", name="Send").click()
        expect(session_link(page, "agent:main:hook:form")).to_contain_text("waiting")
        expect(number(page, "Waiting")).to_have_text("1")
        take_pictures(page, "console-paused")
        page.get_by_role("button", name="Resume").click()
        expect(page.get_by_text("Heartbeats are paused")).to_be_hidden()
        expect(session_link(page, "agent:main:hook:form")).to_contain_text("idle")
        expect(page.locator("#runs li")).to_have_count(4)
        take_pictures(page, "console-overview")

        walk_with_the_keyboard(page)
        assert loads == []
        stand_on_a_phone(page)
        # Of the time in which there was no gateway.
        assert [said for said in problems if "ERR_CONNECTION_REFUSED" not in said] == []


def walk_with_the_keyboard(page: Page) -> None:
    """Find a session, look into it, go back and send an event, without a mouse."""
    page.locator("body").evaluate("() => document.activeElement.blur()")
    tab_to(page, page.get_by_role("link", name="Skip to the sessions"))
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_label("Part of a session key"))
    page.keyboard.type("form")
    expect(page.locator("#sessions li")).to_have_count(1)
    link = session_link(page, "agent:main:hook:form")
    tab_to(page, link)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="agent:main:hook:form")).to_be_focused()
    tab_to(page, items(page, "heartbeat").locator("summary").first)
    page.keyboard.press("Enter")
    expect(items(page, "heartbeat").get_by_role("heading", name="Prompt")).to_be_visible()
    page.keyboard.press("Escape")
    expect(link).to_be_focused()
    expect(page.get_by_role("heading", name="Latest heartbeats")).to_be_visible()
    form = page.get_by_role("form", name="Send an event")
    tab_to(page, form.get_by_label("Text"))
    page.keyboard.press("Control+A")
    page.keyboard.type("by keyboard")
    tab_to(page, form.get_by_label("Session key"))
    page.keyboard.press("Control+A")
    page.keyboard.type("hook:keys")
    tab_to(page, form.get_by_role("button", name="Send"))
    page.keyboard.press("Enter")
    expect(page.locator("#receipt")).to_contain_text("agent:main:hook:keys")


def stand_on_a_phone(page: Page) -> None:
    """See one thing at a time, as wide as the screen."""
    page.set_viewport_size({"width": NARROW, "height": 800})
    assert not scrolls_sideways(page)
    page.get_by_label("Part of a session key").fill("deploy")
    session_link(page, "agent:main:hook:deploy").click()
    expect(items(page, "event")).to_have_count(2)
    expect(page.get_by_role("heading", name="Sessions")).to_be_hidden()
    assert not scrolls_sideways(page)
    page.reload()
    expect(items(page, "event")).to_have_count(2)
    page.get_by_role("link", name="All sessions").click()
    expect(page.get_by_role("heading", name="Sessions")).to_be_visible()
    page.set_viewport_size({"width": WIDE, "height": 900})


SEED = """
from django.contrib.auth.models import Permission, User
from wake.dispatch import WakeRequest, dispatch_batch
User.objects.create_user("guest", password="guest of ours", is_staff=True)
sender = User.objects.create_user("sender", password="sender of ours", is_staff=True)
wake = Permission.objects.filter(content_type__app_label="wake")
sender.user_permissions.add(wake.get(codename="change_session"))
texts = ["for all to see", *(f"event {number}" for number in range(60))]
dispatch_batch([WakeRequest(text, "cli", session_key="hook:open") for text in texts])
dispatch_batch([WakeRequest("x", "cli", session_key=f"hook:{number}") for number in range(60)])
"""


def test_each_user_gets_what_is_theirs(live_gateway: LiveGateway) -> None:
    live_gateway.manage("shell", "-v0", "-c", SEED)
    with chromium(live_gateway) as browser:
        page = browser.new_page()
        problems = watch(page)

        # Nobody signed in sees the login page.
        page.goto("/#session=agent:main:hook:open")
        expect(page).to_have_url(re.compile(r"/admin/login/\?next=/"))

        # Who may only look sees everything, cannot send or pause, and is told why.
        sign_in(page, "guest", "guest of ours")
        expect_live(page)
        expect(page.locator("#list-count")).to_have_text("50 of 62")
        page.get_by_role("button", name="Load more").click()
        expect(page.locator("#sessions li")).to_have_count(62)
        page.get_by_label("Part of a session key").fill("OPEN")
        expect(page.locator("#list-count")).to_have_text("1 of 1")
        session_link(page, "agent:main:hook:open").click()
        expect(items(page, "event")).to_have_count(50)
        page.get_by_role("button", name="Load older").click()
        expect(items(page, "event")).to_have_count(61)
        expect(items(page, "event").last).to_contain_text("for all to see")
        expect(page.get_by_role("button", name="Load older")).to_be_hidden()
        expect(page.get_by_text("You may watch, but not send")).to_be_visible()
        expect(page.get_by_role("button", name="Send")).to_have_count(0)
        expect(page.get_by_role("button", name="Pause heartbeats")).to_be_hidden()
        expect(page.get_by_role("link", name="Open in the admin")).to_be_hidden()
        take_pictures(page, "console-guest")

        # A gateway that is not heard of for some time is connected to again.
        page.clock.install()
        sockets: list[object] = []
        page.on("websocket", lambda socket: sockets.append(socket))
        page.reload()
        expect_live(page)
        page.clock.fast_forward("01:20")
        expect(connection(page)).to_contain_text("Connection lost")
        expect_live(page)
        assert len(sockets) == 2

        # The session ends while the page is open: it says so, and does not go on trying.
        other = browser.new_page()
        other.goto("/")
        other.get_by_role("button", name="Log out").click()
        expect(connection(page)).to_have_text("Signed out: sign in again", use_inner_text=True)
        tried = len(sockets)
        page.clock.fast_forward("10:00")
        expect(connection(page)).to_have_text("Signed out: sign in again", use_inner_text=True)
        assert len(sockets) == tried
        take_pictures(page, "console-signed-out")

        # Signing in again leads back to what was seen. Who may change sessions may send.
        page.get_by_role("link", name="sign in again").click()
        sign_in(page, "sender", "sender of ours")
        expect(page.get_by_role("heading", name="agent:main:hook:open")).to_be_visible()
        page.get_by_label("Text").fill("as I may")
        page.get_by_role("button", name="Send", exact=True).click()
        expect(items(page, "event").first).to_contain_text("as I may")
        expect(page.get_by_role("button", name="Pause heartbeats")).to_be_hidden()

        # What was told and did not come is read, and is there once.
        lost: list[str | bytes] = []
        page.route_web_socket(re.compile("/ws$"), lambda route: lose_a_message(route, lost))
        page.reload()
        expect_live(page)
        expect(items(page, "event")).to_have_count(50)
        page.get_by_label("Text").fill("lost on its way")
        page.get_by_role("button", name="Send", exact=True).click()
        expect(items(page, "event").locator("pre", has_text="lost on its way")).to_have_count(1)
        expect(items(page, "event").first).to_contain_text("lost on its way")
        assert len(lost) == 1

        wire = Wire()
        page.route_web_socket(re.compile("/ws$"), wire.connect)
        be_told_while_reading(page, wire)
        go_on_while_sending(page, wire)

        # Somebody else's page does not go on under their name.
        page.locator("body").evaluate("body => { body.dataset.user = 'guest' }")
        page.clock.fast_forward("01:20")
        expect(page.locator("body")).to_have_attribute(
            "data-user", "sender", timeout=RECOVERY_MILLISECONDS
        )
        expect_live(page)
        assert problems == []


def be_told_while_reading(page: Page, wire: Wire) -> None:
    """Begin with a history that is older than the first message that is told."""
    wire.holds = "sessions.history"
    page.reload()
    wire.wait_for_held(page)
    page.get_by_label("Text").fill("while it is read")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(items(page, "event").locator("pre")).to_have_text(["while it is read"])
    # What would be read after it is held as well.
    wire.release()
    expect(items(page, "event")).to_have_count(51)
    expect(items(page, "event").first).to_contain_text("while it is read")
    wire.holds = ""
    wire.release()


def go_on_while_sending(page: Page, wire: Wire) -> None:
    """Send impatiently, and type the next text before the answer is there."""
    wire.holds = "wake"
    wire.asked.clear()
    text = page.get_by_label("Text")
    text.fill("pressed twice")
    text.press("Control+Enter")
    text.press("Control+Enter")
    wire.wait_for_held(page)
    page.keyboard.down("Control")
    page.keyboard.down("Enter")
    text.fill("typed meanwhile")
    wire.release()
    expect(page.locator("#receipt")).to_contain_text("Queued in agent:main:hook:open as event")
    page.keyboard.down("Enter")  # held down: no other press
    page.keyboard.up("Enter")
    page.keyboard.up("Control")
    button = page.get_by_role("button", name="Send", exact=True)
    assert button.is_enabled()
    expect(text).to_have_value("typed meanwhile")
    wire.holds = ""
    button.click()
    expect(text).to_have_value("")
    expect(items(page, "event").first).to_contain_text("typed meanwhile")
    expect(items(page, "event").locator("pre", has_text="pressed twice")).to_have_count(1)
    # Equal events that wait become one: that each was sent once is seen here.
    assert wire.asked.count("wake") == 2


class Wire:
    """What goes between a page and the gateway; answers to one method can be held back."""

    def __init__(self) -> None:
        self.holds = ""
        self.asked: list[str] = []
        self._held: list[Callable[[], None]] = []

    def connect(self, route: WebSocketRoute) -> None:
        gateway = route.connect_to_server()
        methods: dict[str, str] = {}

        def ask(frame: str | bytes) -> None:
            request = json.loads(frame)
            methods[request["id"]] = request["method"]
            self.asked.append(request["method"])
            gateway.send(frame)

        def tell(frame: str | bytes) -> None:
            if self.holds and methods.get(json.loads(frame).get("id")) == self.holds:
                self._held.append(partial(route.send, frame))
            else:
                route.send(frame)

        route.on_message(ask)
        gateway.on_message(tell)

    def wait_for_held(self, page: Page) -> None:
        for _ in range(200):
            if self._held:
                return
            page.wait_for_timeout(50)
        raise AssertionError(f"nothing was asked with {self.holds}")

    def release(self) -> None:
        """Send on what is held; what comes from now on is held as before."""
        held, self._held = self._held, []
        for send in held:
            send()


def lose_a_message(route: WebSocketRoute, lost: list[str | bytes]) -> None:
    """Pass all on between a page and the gateway, but for the first message of a session."""
    gateway = route.connect_to_server()

    def pass_on(frame: str | bytes) -> None:
        if lost or '"event":"session.message"' not in str(frame):
            route.send(frame)
        else:
            lost.append(frame)

    gateway.on_message(pass_on)
