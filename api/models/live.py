"""Which model answers now: one reference that is swapped whole.

A request takes the reference once and keeps it, so its answer and its version label come from the same model,
and a model that was swapped out lives until its last request is done. Only the event loop's thread swaps.
"""

from collections.abc import Callable

from api.models.classifier import Classifier


class LiveModel:
    """The model that answers, or what the server waits for."""

    def __init__(self) -> None:
        self.current: Classifier | None = None
        self.num_swaps = 0
        self.waiting_for = "the first look into the registry"
        self.has_looked = False
        """Whether the registry has been looked into once: from then on the server is up."""
        self.is_stopping = False
        self.followers: list[Callable[[Classifier], None]] = []
        """Called after a swap, with the model that is live now."""

    @property
    def version(self) -> int | None:
        return self.current.version if self.current else None

    @property
    def is_ready(self) -> bool:
        """A model is live (it has answered its warm-up), and the server is not about to stop."""
        return self.current is not None and not self.is_stopping

    def swap(self, classifier: Classifier) -> None:
        """Let a warm `classifier` answer from the next request on."""
        self.current = classifier
        self.num_swaps += 1
        for follow in self.followers:
            follow(classifier)
