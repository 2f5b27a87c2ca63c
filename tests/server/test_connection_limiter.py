"""The cap on client connections: who is evicted, who is refused, what is counted."""

from prometheus_client import generate_latest

from proxy.observability.metrics import Metrics
from proxy.server.connection_limiter import ConnectionLimiter


class Connection:
    """A connection that remembers whether it was closed."""

    def __init__(self, limiter: ConnectionLimiter, listener: str = "listen[0]") -> None:
        self.listener = listener
        self.is_closed = False
        self.was_accepted = limiter.try_acquire(self, listener)

    def force_close(self) -> None:
        self.is_closed = True


def test_below_the_limit_every_connection_stays() -> None:
    limiter = ConnectionLimiter(2, Metrics())
    first, second = Connection(limiter), Connection(limiter)
    assert first.was_accepted
    assert second.was_accepted
    assert not first.is_closed


def test_a_connection_that_never_made_a_request_is_evicted_before_an_older_idle_one() -> None:
    limiter = ConnectionLimiter(2, Metrics())
    used, unused = Connection(limiter), Connection(limiter)
    limiter.mark_busy(used)
    limiter.mark_idle(used)
    assert Connection(limiter).was_accepted
    assert (used.is_closed, unused.is_closed) == (False, True)


def test_of_idle_connections_the_one_that_is_idle_longest_is_evicted() -> None:
    limiter = ConnectionLimiter(2, Metrics())
    first, second = Connection(limiter), Connection(limiter)
    for connection in (second, first):
        limiter.mark_busy(connection)
        limiter.mark_idle(connection)
    assert Connection(limiter).was_accepted
    assert (first.is_closed, second.is_closed) == (False, True)


def test_only_where_all_are_busy_a_new_one_is_refused() -> None:
    metrics = Metrics()
    limiter = ConnectionLimiter(1, metrics)
    busy = Connection(limiter)
    limiter.mark_busy(busy)
    refused = Connection(limiter, "listen[1]")
    assert not refused.was_accepted
    assert not busy.is_closed
    text = generate_latest(metrics.registry).decode()
    assert 'spapi_proxy_client_connections_closed_total{listener="listen[1]",reason="refused"} 1.0' in text
    limiter.release(refused, "listen[1]")
    limiter.release(busy, "listen[0]")
    assert Connection(limiter).was_accepted
