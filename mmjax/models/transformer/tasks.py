"""TransformerModel: forward on arrays, and translation of strings."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.interface.generation import GeneratingModel
from mmjax.interface.inputs import TEXTS, Input
from mmjax.models.transformer.network import Transformer, TransformerConfig, TransformerDecodable
from mmjax.text.batches import Batches, Side
from mmjax.text.marian import SOURCE, MarianTokenizer
from mmjax.types import Array

LONGER = 50
"""The maximum of tokens by which a translation exceeds its source (section 6.1)."""


class TransformerModel(GeneratingModel):
    """A Transformer with its weights. Its tokenizer ends a text with its eos; it is of both languages, or Marian's."""

    padding_side: ClassVar[Side] = "right"
    """Positions count from the left, padding included."""

    system: ClassVar[str] = "transformer"
    config_class: ClassVar[type] = TransformerConfig

    @classmethod
    def build(cls, config: TransformerConfig) -> nn.Module:
        return Transformer(config)

    @classmethod
    def load_tokenizer(cls, file: pathlib.Path) -> Batches | None:
        """Marian's, where its source.spm lies beside (the extra sentencepiece reads it); else as of every model."""
        if file.with_name(SOURCE).is_file():
            return MarianTokenizer.from_folder(file.parent)
        return super().load_tokenizer(file)

    @classmethod
    def inputs(cls, config: TransformerConfig) -> Mapping[str, Input]:
        return TEXTS | {"decoder_input_ids": Input("b t"), "decoder_attention_mask": Input("b t")}

    @classmethod
    def example(cls, config: TransformerConfig) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct((1, 2), jnp.int32) for name in ("input_ids", "decoder_input_ids")}

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """encoder_last_hidden_state and encoder_hidden_states; with decoder_input_ids also logits [b, l, v] and
        decoder_hidden_states. The hidden states are those before and after each block.

        Without masks nothing is padding: the decoder may begin with the id that pads."""
        ids, decoder_ids = inputs["input_ids"], inputs.get("decoder_input_ids")
        mask, decoder_mask = (
            None if name not in inputs else inputs[name].astype(bool)
            for name in ("attention_mask", "decoder_attention_mask")
        )
        out: Any = self.module.apply(variables, ids, mask, method="encode")
        memory, states = out
        result = {"encoder_last_hidden_state": memory, "encoder_hidden_states": tuple(states)}
        if decoder_ids is None:
            return result
        out = self.module.apply(variables, decoder_ids, memory, mask, decoder_mask, method="decode")
        return result | {"logits": out["logits"], "decoder_hidden_states": tuple(out["decoder_states"])}

    # ------------------------------------------------------------------------------------------------------ generation

    def decodable(self) -> TransformerDecodable:
        return TransformerDecodable(self.config)

    def prompt_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        start = jnp.full((len(inputs["input_ids"]), 1), self.config.start, jnp.int32)
        return {**inputs, "decoder_input_ids": start}

    @property
    def eos(self) -> tuple[int, ...]:
        return (self.config.eos,)

    @property
    def num_logits(self) -> int:
        return self.config.outputs

    def fixed_options(self) -> dict[str, Any]:
        """Neither the padding nor the start is ever written."""
        never = tuple(sorted({self.config.pad, self.config.start} - {self.config.eos}))
        return {"suppress": never, "forced_eos": self.config.forced_eos}

    @property
    def max_prompt_length(self) -> int | None:
        return self.config.max_length

    def check_room(self, length: int, new_tokens: int) -> None:
        """`length` is the source's; the decoder's start counts as one of its tokens."""
        most, needed = self.config.max_length, max(length, 1 + new_tokens)
        if most is not None and needed > most:
            raise MmjaxError(f"a source of {length} tokens and {new_tokens} new ones: {most} a side is the most")

    def translate(
        self, texts: str | Sequence[str], num_beams: int = 4, max_new_tokens: int | None = None, **options: Any
    ) -> Any:
        """A string -> its translation; strings -> their translations.

        max_new_tokens: by default 50 more than the longest source has, as far as the model has positions.
        options: as of `generate`. Raises MmjaxError as `generate` does, and where there is no tokenizer.
        """
        if max_new_tokens is None:
            length = self._inputs(texts, None, True)[0].shape[1]
            max_new_tokens = min(length + LONGER, (self.config.max_length or length + LONGER + 1) - 1)
        return self.generate(texts, num_beams=num_beams, max_new_tokens=max_new_tokens, **options)
