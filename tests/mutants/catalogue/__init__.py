"""Defects of one line each, planted to see whether the tests would notice."""

from tests.mutants.catalogue import blocks_and_plans, callers, requests, sessions

MUTANTS = (*blocks_and_plans.MUTANTS, *requests.MUTANTS, *sessions.MUTANTS, *callers.MUTANTS)
