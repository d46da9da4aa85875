"""docs/compatibility.md says what the facts say, and the facts hold what is promised."""

import compatibility


def test_the_page_is_made_from_the_facts():
    assert compatibility.PAGE.read_text() == compatibility.page(compatibility.releases()), "run `python tests/compatibility.py --page`"


def test_four_releases_have_run():
    assert [facts["transformers"].rsplit(".", 1)[0] for facts in compatibility.releases()] == ["5.24", "5.23", "5.17", "4.57"]


def test_nothing_is_left_to_masked_scatter_and_nothing_leaks():
    for facts in compatibility.releases():
        for name, row in facts["families"].items():
            if "left_out" in row:
                continue
            where = facts["transformers"], name
            assert row["scatters"][1] == 0 and row["reads"][1] <= row["reads"][0], where
            before, after = row.get("graphs", [0, 0])
            assert after <= before, where
            if facts["transformers"].startswith("5"):
                for implementation in ("sdpa", "eager"):
                    assert row.get("packed", {}).get(implementation, "isolated").startswith("isolated"), where


def test_the_release_of_the_constraints_has_every_family():
    facts = next(facts for facts in compatibility.releases() if facts["transformers"].startswith("5.23."))
    assert len(facts["families"]) >= 45 and not any("left_out" in row for row in facts["families"].values())
    assert sum("packed" in row for row in facts["families"].values()) >= 16
