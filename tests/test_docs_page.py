"""The page at `/docs`: its files, what they are allowed to do, and that a charge can be tried out in it."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from server import docs
from tests.browser import CHROMIUM, Page, browsing
from tests.support import RecordingGateway, until

CHARGE = "#operations-Payments-chargePayment"
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "frame-ancestors 'none'",
    "base-uri 'none'",
    "form-action 'none'",
}


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    """A tab of a real browser."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    async with browsing(tmp_path / "profile") as opened:
        yield opened


def is_guarded(answer: httpx.Response) -> bool:
    """Whether a browser is told to keep to itself what it gets here."""
    headers = answer.headers
    return (
        set(headers["Content-Security-Policy"].split("; ")) == POLICY
        and headers["X-Content-Type-Options"] == "nosniff"
        and headers["Referrer-Policy"] == "no-referrer"
    )


async def test_the_page_names_files_of_this_server_alone_and_holds_no_script(api: httpx.AsyncClient) -> None:
    answer = await api.get("/docs")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert is_guarded(answer)
    named = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert named
    for address in named:
        assert (await api.get(address)).status_code == 200
    assert not re.search(r"<script(?! src=)|<style|style=|\son\w+=|https?:", answer.text)


async def test_each_file_has_its_type_and_is_kept_for_good(api: httpx.AsyncClient) -> None:
    for name, path in docs.files().items():
        answer = await api.get(f"/docs/{docs.version()}/{name}")
        assert answer.content == path.read_bytes()
        assert answer.headers["Content-Type"] == TYPES[path.suffix]
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        assert is_guarded(answer)
        again = await api.head(f"/docs/{docs.version()}/{name}")
        assert (again.status_code, again.content) == (200, b"")


async def test_no_other_file_is_given_out(api: httpx.AsyncClient) -> None:
    here = f"/docs/{docs.version()}"
    for path in (
        *(f"{here}/index.html", f"{here}/__init__.py", f"{here}/", here, "/docs/", "/docs/0123456789ab/page.js"),
        *(f"{here}/../page.js", f"{here}/..%2fdocs.py", f"{here}/%2e%2e/docs.py", f"{here}/..\\docs.py"),
        *(
            f"{here}/%2fetc%2fpasswd",
            f"{here}//etc/passwd",
            f"{here}/page.js%00",
            f"{here}/PAGE.JS",
            f"{here}/page.js/",
        ),
    ):
        # As it stands: a client would tidy it up.
        url = api.base_url.copy_with(raw_path=path.encode())
        assert (await api.get(url)).status_code == 404, path


async def test_a_charge_is_tried_out_in_the_page(api: httpx.AsyncClient, page: Page, gateway: RecordingGateway) -> None:
    async def click(selector: str) -> None:
        await page.wait_for(f"document.querySelector('{CHARGE} {selector}') !== null")
        await page.run(f"document.querySelector('{CHARGE} {selector}').click()")

    await page.open(f"{api.base_url}/docs")
    for control in (".opblock-summary-control", ".try-out__btn", ".execute"):
        await click(control)
    answered = f"document.querySelector('{CHARGE} .live-responses-table .response .response-col_status')"
    await page.wait_for(f"{answered} !== null && /^\\d/.test({answered}.innerText)")
    assert (await page.run(f"{answered}.innerText")).strip() == "201"
    assert '"status": "COMPLETED"' in await page.run(
        f"document.querySelector('{CHARGE} .live-responses-table').innerText"
    )
    assert [str(charge.amount) for charge in gateway.charges] == ["1499.00"]
    assert page.complaints == []


async def test_every_operation_is_on_the_page_and_fits_a_phone(api: httpx.AsyncClient, page: Page) -> None:
    await page.resize(390, 844)
    await page.open(f"{api.base_url}/docs")
    operations = "document.querySelectorAll('.opblock')"
    await page.wait_for(f"{operations}.length > 0")
    documented = (await api.get("/openapi.json")).json()["paths"].values()
    assert await page.run(f"{operations}.length") == sum(len(path) - 1 for path in documented)
    await page.run("document.querySelectorAll('.opblock-summary-control').forEach(control => control.click())")
    await page.wait_for(f"document.querySelectorAll('.opblock-body').length === {operations}.length")
    assert await page.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.complaints == []


async def test_what_the_policy_forbids_is_noticed(api: httpx.AsyncClient, page: Page) -> None:
    await page.open(f"{api.base_url}/docs")
    await page.wait_for(f"document.querySelector('{CHARGE}') !== null")
    await page.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = true'}))")

    async def complained() -> bool:
        return any("script-src" in complaint for complaint in page.complaints)

    await until(complained)
    assert await page.run("window.ran") is None
