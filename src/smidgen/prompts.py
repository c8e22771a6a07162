"""Virtual tokens: where prompts and prefixes stand in the text, seen from the model's own `forward` and `generate`.

A prompt's virtual tokens are real positions of the sequence: a hook on the model's forward inserts placeholder ids (and
the matching mask, labels and token types), and a hook on the input embedding puts the learned rows in their place. The
outputs that have a column a token are cut back, so that batches and logits stay the text's own. `generate` inserts the
placeholders once, before it starts, so that every cache class, beam search and assisted decoding see an ordinary longer
prompt.

Of an encoder-decoder the encoder reads the text: it is there that the placeholders are inserted, its states are longer
by them, and the decoder's mask for these states is widened to match, in `generate` as well.

A prefix (keys and values in attention) inserts nothing, but occupies positions: the text's own start after it, as in
the paper and in peft.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smidgen.attention import install
from smidgen.delta import Delta
from smidgen.generating import Generate
from smidgen.hooks import active_deltas
from smidgen.layers import (
    counts_columns,
    is_causal,
    is_sharded,
    position_offset,
    positions,
    positions_follow_mask,
    text_reader,
)
from smidgen.placeholders import (
    IGNORED,
    Counts,
    check_padding,
    counted,
    cut,
    insert,
    insert_mask,
    placeholder,
    served_rows,
)
from smidgen.prompt_states import can_be_shared, put
from smidgen.stacking import active_adapters
from smidgen.threads import PerThread

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

_ALONG_THE_TEXT = {"logits": 3, "start_logits": 2, "end_logits": 2, "last_hidden_state": 3, "hidden_states": 3}
"""Outputs with a column for each token, and their dimensions: logits of classes have two."""


class VirtualTokens:
    """Inserts the placeholders and shifts the positions of one model, by hooks that it puts there.

    Attributes:
        model: the model.
        reader: the module that reads the text: the model itself, or its encoder.
        embedding: its input embedding; the prompts are its deltas.
        prefixes: one delta of each prefix; those active say how many positions are occupied.
        generating: whether `generate` runs, so that the placeholders are there already.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.reader = model, text_reader(model)
        self.embedding = self.reader.get_input_embeddings()
        self.prefixes: list[Delta] = []
        self.generating: PerThread[bool] = PerThread(False)
        self._limit = positions(model)
        self._follows_mask = positions_follow_mask(model)
        self._columns: PerThread[slice | None] = PerThread(None)
        self._alone: PerThread[bool] = PerThread(False)  # whether the pass is over the prompt
        self._lent: PerThread[bool] = PerThread(False)  # whether it has a cache that nobody asked for
        self._names = list(inspect.signature(type(self.reader).forward).parameters)[1:]
        self._looks_back = self.reader is model and "past_key_values" in self._names and is_causal(model)
        self._handles = [
            self.reader.register_forward_pre_hook(self.before, with_kwargs=True),
            self.reader.register_forward_hook(self.after, with_kwargs=True, always_call=True),
            self.embedding.register_forward_hook(self.embed),
        ]
        if self.reader is not model:
            decoder = model.get_decoder()
            self._decoder_names = list(inspect.signature(type(decoder).forward).parameters)[1:]
            self._handles.append(decoder.register_forward_pre_hook(self.widen, with_kwargs=True))
        elif hasattr(model, "generate"):
            vars(model)["generate"] = Generate(model, self)

    def remove(self, model: PreTrainedModel) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        if isinstance(vars(model).get("generate"), Generate):
            del vars(model)["generate"]

    def prompts(self) -> list[Delta]:
        """The active prompt deltas, in their order in the text."""
        return active_deltas(self.embedding)

    def counts(self, ids: Tensor) -> Counts:
        """How many placeholders the active prompts need in the rows of `ids`."""
        return counted(self.prompts(), ids)

    def start(self) -> int:
        """The column of the first placeholder.

        Raises:
            ValueError: prompts of different rows stand at different columns.
        """
        columns = {delta.column for delta in self.prompts()}
        if len(columns) > 1 and any(delta.route is not None for delta in self.prompts()):
            raise ValueError(
                "The prompts of this batch stand at different places, before the text and after its first token. Give "
                "them the same placement, or serve them in batches of their own."
            )
        return max(columns, default=0)  # type: ignore[type-var,return-value]

    def before(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Insert the placeholders into the arguments of `model.forward`, and shift positions by the prefix."""
        self._columns.reset(), self._lent.reset()  # of a pass that failed
        prefixes = [delta for delta in self.prefixes if delta.active and delta.virtual_tokens]
        if not self.prompts() and not prefixes:
            return None
        if prefixes:
            install(self.model)  # it may have been given another attn_implementation since
        shifts = "position_ids" in self._names  # otherwise positions are relative, or the model's own affair
        if not self.prompts() and not shifts:
            return None
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        if ids is None:
            raise ValueError("A prompt or prefix needs input_ids; inputs_embeds do not say where the text starts.")
        counts, occupied = self.counts(ids), counted(prefixes, ids)
        count, taken = counts.most, occupied.most if shifts else 0
        if count and inputs.get("return_dict") is False:
            raise ValueError("A prompt needs return_dict=True: a tuple does not say which outputs to cut to the text.")
        cached = int(cache.get_seq_length()) if cache is not None else 0
        if count and not cached and self._shares(inputs, count):
            self._begin_after(inputs, count)
            cached = count
        if count and not self.generating.get():
            self._insert(model, inputs, counts, cached)
        if taken:
            self._shift(model, inputs, occupied, cached)
        length = inputs["input_ids"].shape[1] + cached + taken
        if self._limit is not None and length > self._limit:
            virtual = count + taken
            raise ValueError(
                f"The text has {length - virtual} tokens and the adapter {virtual} virtual ones: more than the "
                f"{self._limit} positions of {type(model).__name__}. Shorten the text to "
                f"{self._limit - virtual} tokens."
            )
        if count:
            first = self.start() - cached
            self._columns.set(slice(max(first, 0), max(first + count, 0)))
        return (), inputs

    def _shares(self, inputs: dict[str, Any], count: int) -> bool:
        """Whether the prompt is the same for all rows of this pass, and sees nothing of their texts."""
        return (
            self._looks_back
            and not self._alone.get()
            and not is_sharded(self.model)  # whose parts are gathered for one pass at a time
            and not self.model.training
            and not self.start()
            and all(delta.route is None for delta in self.prompts())
            and can_be_shared(inputs, count)
            and (not self.generating.get() or (inputs["input_ids"].shape[1] > count and "past_key_values" in inputs))
        )

    def _begin_after(self, inputs: dict[str, Any], count: int) -> None:
        """Cache the prompt's keys and values, so that the pass is over the texts alone."""
        ids = inputs["input_ids"].new_full((1, count), placeholder(self.model))
        last = {"logits_to_keep": 1} if "logits_to_keep" in self._names else {}

        def compute(cache: DynamicCache) -> None:
            generating = self.generating.get()
            self.generating.set(True)
            self._alone.set(True)
            try:
                self.model(input_ids=ids, past_key_values=cache, use_cache=True, **last)
            finally:
                self.generating.set(generating)
                self._alone.reset()

        lent = inputs.get("use_cache") is False and inputs.get("past_key_values") is None
        put(self.model, inputs, compute, ",".join(adapter.name for adapter in active_adapters(self.model)))
        self._lent.set(lent)
        if self.generating.get():
            for name in ("input_ids", "position_ids", "token_type_ids"):
                if inputs.get(name) is not None:
                    inputs[name] = inputs[name][:, count:]

    def _insert(self, model: PreTrainedModel, inputs: dict[str, Any], counts: Counts, cached: int) -> None:
        ids, start, count = inputs["input_ids"], self.start(), counts.most
        missing = count - counts.each
        mask = inputs.get("attention_mask")
        if mask is None and counts.uneven:
            mask = ids.new_ones(ids.shape[0], ids.shape[1] + max(0, cached - count))
        if counts.uneven:
            self._need_positions(model, inputs, mask, counts, cached)
        if cached == 0:
            text = ids.shape[1]
            inputs["input_ids"] = insert(ids, start, count, placeholder(model))
            labels = inputs.get("labels")
            if isinstance(labels, Tensor) and labels.shape[1:] == (text,) and not labels.is_floating_point():
                inputs["labels"] = insert(labels, start, count, IGNORED)
                if counts.uneven and not start:
                    # a text without a prompt has nothing before its first token to say it from
                    inputs["labels"][counts.each == 0, count] = IGNORED
            for name in ("start_positions", "end_positions"):  # of an answer in the text
                if inputs.get(name) is not None:
                    inputs[name] = inputs[name] + count * (inputs[name] >= start)
            if inputs.get("token_type_ids") is not None:
                inputs["token_type_ids"] = insert(inputs["token_type_ids"], start, count, 0)
        if mask is not None:
            if mask.dim() != 2:
                raise ValueError(
                    "A prompt needs an attention_mask of shape (batch, length), got one that is already expanded."
                )
            check_padding(mask, start)
            inputs["attention_mask"] = insert_mask(mask, start, counts)
        if inputs.get("position_ids") is not None:
            positions, own = inputs["position_ids"], counts.each[:, None]
            if cached == 0:
                columns = torch.arange(count, device=ids.device) - missing[:, None]
                virtual = start + position_offset(model) + columns.clamp_min(0)
                positions = positions.expand(ids.shape[0], -1)
                positions = torch.cat([positions[:, :start], virtual, positions[:, start:] + own], dim=1)
            else:
                positions = positions + own
            inputs["position_ids"] = positions

    def _need_positions(
        self, model: PreTrainedModel, inputs: dict[str, Any], mask: Tensor | None, counts: Counts, cached: int
    ) -> None:
        """Say where the text stands in each row, which the model cannot count by itself if prompts differ in length."""
        takes_positions = "position_ids" in self._names
        if self.start() and not (takes_positions and not counts_columns(model)):
            raise ValueError(
                f"{type(model).__name__} counts distances by columns, so that its rows cannot have prompts of "
                "different lengths after the first token. Use placement='first', prompts of one length, or batches of "
                "their own."
            )
        if not takes_positions:
            if self._limit is None:
                return  # relative positions
            raise ValueError(
                f"{type(model).__name__} takes no position_ids, so that its rows cannot have prompts of different "
                "lengths. Give the prompts one length, or serve them in batches of their own."
            )
        if inputs.get("position_ids") is None:
            text = max(0, cached - counts.most)  # of the columns that are cached
            mask = mask if self._follows_mask else None
            inputs["position_ids"] = _own_positions(model, inputs["input_ids"], mask, text)

    def _shift(self, model: PreTrainedModel, inputs: dict[str, Any], occupied: Counts, cached: int) -> None:
        positions = inputs.get("position_ids")
        if positions is None:
            mask = inputs.get("attention_mask") if self._follows_mask else None
            positions = _own_positions(model, inputs["input_ids"], mask, cached)
        inputs["position_ids"] = positions + occupied.each[:, None]

    def widen(self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the decoder a mask of the encoder's states that has the placeholders' columns."""
        inputs = {**dict(zip(self._decoder_names, args, strict=False)), **kwargs}
        states, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
        if not self.prompts() or states is None:
            return None
        counts = self.counts(states)
        if mask is None and counts.uneven:
            mask = states.new_ones(states.shape[0], states.shape[1] - counts.most, dtype=torch.long)
        if mask is not None and mask.shape[-1] + counts.most == states.shape[1]:
            inputs["encoder_attention_mask"] = insert_mask(mask, self.start(), counts)
        return (), inputs

    def embed(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Put the learned rows in the place of the placeholders: (batch, length, hidden size)."""
        columns = self._columns.get()
        if columns is None and self.prompts() and self.reader is self.model:  # a decoder may share its encoder's
            raise ValueError(
                "A prompt is active, and the input embedding was called by something else than the model that the "
                "adapter is on, which inserts the placeholders. Call that model, or disable the adapter."
            )
        if columns is None or columns.stop == 0:
            return output
        rows = self._rows(layer, output)[:, columns.start - columns.stop :]
        return torch.cat([output[:, : columns.start], rows, output[:, columns.stop :]], dim=1)[:, : output.shape[1]]

    def _rows(self, layer: nn.Module, output: Tensor) -> Tensor:
        """The learned rows of each row of the batch, (batch, placeholders, hidden size); a short prompt's come last."""
        if all(delta.route is None for delta in self.prompts()):
            learned = torch.cat([delta(layer) for delta in self.prompts()]).to(output.dtype)
            return learned.expand(output.shape[0], -1, -1)
        counts = self.counts(output)
        rows = output.new_zeros(output.shape[0], counts.most, output.shape[2])
        column = counts.most - counts.each
        for delta in self.prompts():
            learned = delta(layer).to(output.dtype)
            index = served_rows(delta, output).to(output.device)
            columns = column[index][:, None] + torch.arange(len(learned), device=output.device)
            rows = rows.index_put((index[:, None], columns), learned.expand(len(index), -1, -1))
            column[index] += len(learned)
        return rows

    def after(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Cut the outputs back to the text's own columns."""
        columns = self._columns.reset()
        if self._lent.reset() and output is not None:
            output["past_key_values"] = None
        if columns is None or columns.stop == 0 or self.generating.get() or output is None:
            return output  # None: the forward pass failed
        if self.reader is not self.model:
            return output  # the decoder attends to the prompt's states
        length = kwargs["input_ids"].shape[1]
        for name, dimensions in _ALONG_THE_TEXT.items():
            value = output.get(name) if hasattr(output, "get") else None
            if isinstance(value, tuple):
                output[name] = tuple(cut(part, columns) for part in value)
            elif isinstance(value, Tensor) and value.dim() == dimensions and value.shape[1] == length:
                output[name] = cut(value, columns)
        return output


def _own_positions(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, cached: int) -> Tensor:
    """The positions that the model would give `ids` (batch, length) by itself.

    Where it counts them from the mask, that is `mask`, (batch, cached and new ones).
    """
    if mask is not None:
        return (mask.cumsum(1) * mask - 1).long()[:, cached:]
    offset = position_offset(model)
    if offset:
        real = (ids != offset - 1).int()  # the padding's id
        return ((real.cumsum(1) + cached) * real).long() + offset - 1
    return torch.arange(cached, cached + ids.shape[1], device=ids.device)[None].expand(ids.shape[0], -1)
