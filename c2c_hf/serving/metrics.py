"""What `/metrics` shows, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from .contexts import ContextStore
from .jobs import JobQueue


class Metrics:
    """Counts of one application.

    Args:
        queue: Its jobs.
        contexts: Its prefilled contexts.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, queue: JobQueue, contexts: ContextStore) -> None:
        self._registry = registry = CollectorRegistry()
        self.responses = Counter("c2c_responses", "Responses.", ("path", "status"), registry=registry)
        self.prompt_tokens = Counter("c2c_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter("c2c_generated_tokens", "Tokens of answers.", registry=registry)
        self.first_token_seconds = Histogram(
            "c2c_first_token_seconds",
            "From the request to the first piece of text.",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=registry,
        )
        for name, text, value in (
            ("c2c_running", "Requests that are answered now.", lambda: queue.num_running),
            ("c2c_waiting", "Requests that wait.", lambda: queue.num_waiting),
            ("c2c_contexts", "Prefilled contexts.", lambda: len(contexts)),
            ("c2c_context_bytes", "Size of their key/value states.", lambda: contexts.num_bytes),
        ):
            Gauge(name, text, registry=registry).set_function(value)

    def render(self) -> bytes:
        """Return the text."""
        return generate_latest(self._registry)
