"""Page of a bundle against its report."""

from pathlib import Path

import pytest
from shared.bundles import Signed, list_anew, wrong

from fedveil.evidence.binding import page as page_module
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.signatures import FILE as SIGNATURES
from fedveil.evidence.binding.verify import verify_folder

pytestmark = pytest.mark.usefixtures("without_jinja")


MADE_AGAIN = page_module.page_again


def test_a_page_of_an_earlier_release_counts_by_its_signed_hash(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "page_again", MADE_AGAIN)
    (line,) = (each for each in verify_folder(signed.bundle, signed.knowledge) if each.name == "page")
    assert line.ok is None and "makes another page" in line.finding
    (line,) = (each for each in verify_folder(signed.run, Knowledge()) if each.name == "page")
    assert line.ok is False and "fedveil report makes it again" in line.finding


def test_a_number_of_the_page_is_named_where_every_hash_fits(copy: Path, signed: Signed) -> None:
    text = (copy / "report.html").read_text()
    (copy / "report.html").write_text(
        text.replace('data-ref="/run/clients">40<', 'data-ref="/run/clients">41<', 1)
    )
    list_anew(copy)
    (copy / SIGNATURES).unlink()
    assert "/run/clients" in wrong(verify_folder(copy, Knowledge()))["page"]
