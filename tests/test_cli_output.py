"""What commands print: whatever a file's author wrote into it."""

from __future__ import annotations

import pytest

from tailor_dcp.cli.output import complain, say


@pytest.mark.parametrize("name", ["a" + ".a" * 100_000, "w" * 1_000_000, "\x1b[2J" * 100_000])
def test_a_sentence_about_a_name_of_any_length_is_short(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its beginning and its end are there; rich's search for numbers and paths would take minutes for all of it."""
    say(f"note: {name} is not known")
    complain("tailor", f"{name} is not known")
    told = capsys.readouterr()
    for said, start in ((told.out, "note: "), (told.err, "tailor: ")):
        assert len(said) < 20_000
        assert said.startswith(start)
        assert said.endswith(" is not known\n")
        assert "\x1b" not in said


def test_a_name_between_colons_is_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    say("run a:x:b is good")
    assert capsys.readouterr().out == "run a:x:b is good\n"
