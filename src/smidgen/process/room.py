"""How many tokens a row, a prompt and an answer may have beside the adapter's virtual ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smidgen.errors import UserError
from smidgen.process.models import longest_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smidgen.adapter import Adapter


class Room:
    """The lengths that fit.

    Attributes:
        positions: the most tokens that the model takes beside the virtual ones.
        row: the most tokens in a row, its answer included: what was wanted, or as many as fit.

    Args:
        model: with the adapter on it.
        tokenizer: the model's.
        adapter: its virtual tokens take positions.
        wanted: the recipe's `data.max_length`.

    Raises:
        UserError: more is wanted than the model takes, or the virtual tokens leave no room.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Adapter, wanted: int | None
    ) -> None:
        whole, virtual = longest_text(model, tokenizer), adapter.virtual_tokens
        self.positions = whole - virtual
        if self.positions <= 0:
            longest = max(adapter.methods, key=lambda method: method.virtual_tokens)
            raise UserError(
                f"{longest.title}'s length={longest.virtual_tokens} leaves no room for a text, as the model takes "
                f"{whole} tokens. Lower it."
            )
        if wanted is not None and wanted > self.positions:
            raise UserError(
                f"data.max_length={wanted} is more than the {self.positions} tokens that the model takes beside "
                f"{virtual} virtual ones. Lower it."
            )
        self.row = wanted or self.positions

    def answer(self, max_new_tokens: int) -> int:
        """The most tokens in an answer, whatever its prompt: a quarter of the model's at most."""
        return min(max_new_tokens, max(1, self.positions // 4))

    def prompt(self, max_new_tokens: int) -> int:
        """The most tokens in a prompt, such that an answer fits behind it."""
        return min(self.row, self.positions - self.answer(max_new_tokens))
