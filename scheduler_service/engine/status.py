"""The cluster's state for a status query: numbers that exist anyway, gathered only when somebody asks."""

from scheduler_service.core.cluster import Cluster, ExecutorState
from scheduler_service.core.scheduler import Scheduler
from scheduler_service.engine.api_wire import EXECUTOR_STATES, ExecutorStatus, Status
from scheduler_service.engine.executor_registry import ExecutorRegistry
from scheduler_service.engine.executor_session import Loss, Session


def cluster_status(query_id: int, cluster: Cluster, registry: ExecutorRegistry, now: float) -> Status:
    """All executors that take plans, in the order in which they joined."""
    executors = [
        _executor_status(scheduler, registry.sessions[executor_id], cluster.state(executor_id))
        for executor_id, scheduler in cluster.executors.items()
    ]
    oldest = cluster.oldest_queued_at
    return Status(
        query_id=query_id,
        queued_requests=cluster.num_queued,
        executors=executors,
        oldest_queued_us=0 if oldest is None else max(0, round((now - oldest) * 1e6)),
        executor_losses={loss.value: registry.losses[loss] for loss in Loss},
        dropped_frames=dict(registry.dropped),
    )


def _executor_status(scheduler: Scheduler, session: Session, state: ExecutorState) -> ExecutorStatus:
    pool, stats, capacity = scheduler.kv.pool, scheduler.stats, scheduler.capacity
    return ExecutorStatus(
        executor_id=session.hello.executor_id,
        epoch=session.epoch,
        device=session.hello.device,
        running_requests=scheduler.num_running,
        waiting_requests=scheduler.num_waiting,
        max_rows=capacity.max_rows,
        total_blocks=pool.num_blocks,
        free_blocks=pool.num_free,
        cached_blocks=pool.num_evictable,
        used_blocks=pool.num_used,
        block_size=capacity.block_size,
        run_ahead=scheduler.run_ahead.depth,
        inflight_steps=len(scheduler.ledger),
        steps=scheduler.ledger.num_dispatched_steps,
        preemptions=stats.preemptions,
        prefix_hit_tokens=stats.prefix_hit_tokens,
        prefix_query_tokens=stats.prefix_query_tokens,
        starved_us=stats.starved_us,
        device_us=stats.device_us,
        stale_tokens=stats.stale_tokens,
        state=EXECUTOR_STATES[state],
        audited_tokens=stats.audited_tokens,
        audit_mismatches=stats.audit_mismatches,
        handovers=stats.handovers,
        computed_tokens=stats.computed_tokens,
        sampled_tokens=stats.sampled_tokens,
    )
