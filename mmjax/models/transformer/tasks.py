"""The handle of the Transformer: the network on arrays, and translation of strings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.generation.decodable import Decodable
from mmjax.models.handle import Model
from mmjax.models.transformer.network import Transformer, TransformerConfig, TransformerDecodable
from mmjax.types import Array, ArrayLike


@dataclass
class TransformerModel(Model):
    """A Transformer with its weights; `tokenizer` is one of the `tokenizers` library, and ends its texts itself."""

    system: ClassVar[str] = "transformer"
    config_class: ClassVar[type] = TransformerConfig

    @classmethod
    def build(cls, config: TransformerConfig) -> nn.Module:
        return Transformer(config)

    @classmethod
    def example(cls, config: TransformerConfig) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct((1, 2), jnp.int32) for name in ("input_ids", "decoder_input_ids")}

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """encoder_last_hidden_state and encoder_hidden_states; with decoder_input_ids also logits [b, l, v] and
        decoder_hidden_states. The hidden states are those before and after each block."""
        ids, decoder_ids = inputs.get("input_ids"), inputs.get("decoder_input_ids")
        if ids is None:
            raise MmjaxError("the Transformer's forward needs input_ids")
        mask, decoder_mask = (
            None if name not in inputs else inputs[name].astype(bool)
            for name in ("attention_mask", "decoder_attention_mask")
        )
        out: Any = self.module.apply(variables, ids, mask, method="encode")
        memory, states = out
        told = {"encoder_last_hidden_state": memory, "encoder_hidden_states": tuple(states)}
        if decoder_ids is None:
            return told
        out = self.module.apply(variables, decoder_ids, memory, mask, decoder_mask, method="decode")
        return told | {"logits": out["logits"], "decoder_hidden_states": tuple(out["decoder_states"])}

    def forward(
        self,
        pixel_values: ArrayLike | None = None,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        decoder_input_ids: ArrayLike | None = None,
        decoder_attention_mask: ArrayLike | None = None,
    ) -> dict[str, Array]:
        """The network on ids [b, s] and, where given, on the decoder's [b, l]; see `outputs`. Compiled once a shape.

        The masks are 1 for a token. Without them nothing is padding: the decoder may begin with the id that pads.
        Raises MmjaxError for pixel_values, which a Transformer does not see, and for ids that are no matrix.
        """
        if pixel_values is not None:
            raise MmjaxError("a Transformer sees no pixel_values")
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        given |= {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
        inputs = {name: jnp.asarray(value) for name, value in given.items() if value is not None}
        for name, value in inputs.items():
            if value.ndim != 2:
                raise MmjaxError(f"{name} should be [b, l], they are {list(value.shape)}")
        return dict(self._compiled(self.variables, inputs))

    def decodable(self) -> Decodable:
        """What the generation engine drives."""
        return TransformerDecodable(self.config)
