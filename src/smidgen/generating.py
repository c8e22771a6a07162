"""`generate` on a model with prompts: their placeholders go in before it starts, and come out of its result."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smidgen.placeholders import check_padding, cut, insert, insert_mask

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from smidgen.prompts import VirtualTokens


class Generate:
    """Stands in for `model.generate`: inserts the placeholders before it and takes them out of its result."""

    def __init__(self, model: PreTrainedModel, tokens: VirtualTokens) -> None:
        self.model = model
        self.tokens = tokens

    def __call__(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """As `model.generate`, with ids in `inputs` or `input_ids`; gives the text's ids and the new ones."""
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        generate: Any = type(self.model).generate  # type: ignore[attr-defined]
        if not self.tokens.prompts():
            return generate(self.model, inputs, **kwargs)
        ids = kwargs.pop("input_ids", inputs)
        if ids is None or "inputs_embeds" in kwargs:
            raise ValueError(
                "A prompt needs input_ids to generate from; inputs_embeds do not say where the text starts."
            )
        counts, start = self.tokens.counts(ids), self.tokens.start()
        count = counts.most
        columns = slice(start, start + count)
        mask = kwargs.pop("attention_mask", None)
        if mask is None:
            mask = _guessed_mask(self.model, ids, kwargs)
        check_padding(mask, start)
        kwargs["attention_mask"] = insert_mask(mask, start, counts)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = insert(kwargs["token_type_ids"], start, count, 0)
        _check_readable(self.model, kwargs)
        self._lengthen(kwargs, count)
        self.tokens.generating.set(True)
        try:
            # the text's own last token, so that a repetition penalty sees no token that the text does not have
            result = generate(self.model, insert(ids, start, count, ids[:, -1:]), **kwargs)
        finally:
            self.tokens.generating.reset()
        if isinstance(result, Tensor):
            return cut(result, columns)
        result.sequences = cut(result.sequences, columns)
        return result

    def _lengthen(self, kwargs: dict[str, Any], count: int) -> None:
        """Raise the limits that count the prompt, wherever they are set, by the placeholders."""
        given = kwargs.get("generation_config")
        if given is not None:
            kwargs["generation_config"] = given = copy.deepcopy(given)
        for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            own = getattr(given or self.model.generation_config, name, None)
            if kwargs.get(name) is not None:
                kwargs[name] += count
            elif own and given is not None:
                setattr(given, name, own + count)
            elif own and kwargs.get(instead) is None:
                kwargs[name] = own + count


def _setting(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """A setting of `generate` from the most specific place: its argument, its configuration, the model's own."""
    given = kwargs.get("generation_config")
    for value in (kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None)):
        if value is not None:
            return value
    return None


def _check_readable(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Raise a ValueError for what would read the placeholders as if they were text."""
    readers = ("streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "no_repeat_ngram_size")
    for name in readers:
        if _setting(model, kwargs, name):
            raise ValueError(
                f"{name} would read a prompt's placeholders as if they were text. Generate without it; prefix tuning "
                "has no placeholders and takes it."
            )


def _guessed_mask(model: PreTrainedModel, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The mask that `generate` would make from `ids` alone: padding hidden, unless it doubles as the end of text."""
    pad, eos = (_setting(model, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    ends = eos if isinstance(eos, list) else [eos]
    return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()
