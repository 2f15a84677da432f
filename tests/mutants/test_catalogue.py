"""That every planted defect still finds the text that it changes; `make test-mutants` plants them."""

from tests.mutants.__main__ import ROOT, mutated
from tests.mutants.catalogue import MUTANTS


def test_every_mutant_finds_its_text() -> None:
    assert [mutant.name for mutant in MUTANTS if mutated(mutant, ROOT) is None] == []


def test_mutants_differ() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len({(m.path, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)
    assert all((ROOT / path).is_file() for mutant in MUTANTS for path in mutant.tests.split())
