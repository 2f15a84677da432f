"""One line in the log for each request that has ended."""

import logging

from scheduler_service.api.records import RequestRecord

_log = logging.getLogger("baton.requests")


def log_request(record: RequestRecord) -> None:
    """Log a request's end at INFO, without the fields that do not apply; milliseconds count from its arrival."""
    fields = {
        "request_id": record.request_id,
        "outcome": record.outcome,
        "status": record.status,
        "field": record.field,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
        "queue_ms": _since_arrival(record, record.started_at),
        "ttft_ms": _since_arrival(record, record.first_token_at),
        "total_ms": _since_arrival(record, record.ended_at),
        "stalls": len(record.stalls),
        "executor_losses": record.executor_losses,
    }
    _log.info("request ended", extra={name: value for name, value in fields.items() if value not in (None, "")})


def _since_arrival(record: RequestRecord, moment: float | None) -> float | None:
    return None if moment is None else round((moment - record.arrived_at) * 1e3, 3)
