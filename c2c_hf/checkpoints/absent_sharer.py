"""`AbsentSharer`: stands for a sharer that runs elsewhere."""

from typing import Any, NoReturn

from torch import nn


class AbsentSharer(nn.Module):
    """Holds a sharer's configuration and no weights; what it has read comes as `sharer_caches`.

    Args:
        config: The sharer's configuration.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to run.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`sharer_caches` must be given, since the sharers were left out (`load_sharers=False`); let them read the "
            "text elsewhere with `SharerCache.prefill`, or load them here."
        )

    get_input_embeddings = forward
