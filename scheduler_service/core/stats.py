"""Counters of one executor's scheduling."""

from dataclasses import dataclass


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the executor joined.

    Attributes:
        handovers: running requests that left for another executor, or were to leave a draining one.
        computed_tokens, sampled_tokens: of settled steps, input tokens and output tokens.
        stale_tokens: sampled for requests that had already ended.
        audited_tokens, audit_mismatches: tokens sampled again when streams went on here, and those that differ.
    """

    preemptions: int = 0
    handovers: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    starved_us: int = 0
    device_us: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0
    stale_tokens: int = 0
    audited_tokens: int = 0
    audit_mismatches: int = 0
