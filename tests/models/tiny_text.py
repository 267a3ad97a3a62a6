"""Text models of a few thousand random numbers, with tokenizers, as folders that `mmjax.load` takes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import hub
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.tasks import LanguageModel
from mmjax.text.tokenizer import Tokenizer
from mmjax.text.training import train_tokenizer

LINES = ["once upon a time there was a fruit", "name three fruits", "which of them is yellow?", "the sea is blue"]
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def random_params(kind, config, seed=0):
    """Normal values with standard deviation 0.4 in every leaf."""
    rng = np.random.default_rng(seed)
    shapes = kind.shapes(config)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), shapes)


def chat_tokenizer() -> Tokenizer:
    """A byte-level BPE with <s> and </s> around each turn of a chat."""
    trained = train_tokenizer(LINES, "byte_bpe", 300, ["<s>", "</s>"])
    return Tokenizer(trained.tokenizer, {"bos_token": "<s>", "eos_token": "</s>"}, {"default": CHAT})


def tiny_decoder(seed: int = 0) -> LanguageModel:
    """Two layers with grouped keys, and a vocabulary 16 ids larger than the tokenizer's."""
    tokenizer = chat_tokenizer()
    size = {"vocab_size": tokenizer.vocab_size + 16, "kv_heads": 1, "head_width": 6, "eos": tokenizer.eos}
    config = DecoderConfig.llama(12, 2, 2, 20, **size, pad=tokenizer.pad)
    params = random_params(LanguageModel, config, seed)
    # Ids that are no plain text are never the most probable: nearly every text encodes to the ids it was decoded from.
    plain = [tokenizer.decode([i]).isascii() and tokenizer.decode([i]).isprintable() for i in range(size["vocab_size"])]
    kernel = jnp.where(jnp.asarray(plain), params["head"]["kernel"], 0)
    return LanguageModel(config, {**params, "head": {"kernel": kernel}}, tokenizer=tokenizer)


def save_tiny_decoder(folder: pathlib.Path) -> None:
    hub.save(tiny_decoder(), folder)


def save_tiny_bert(folder: pathlib.Path) -> None:
    from mmjax.models.bert.network import BertConfig
    from mmjax.models.bert.tasks import BertModel
    from mmjax.text.training import train_wordpiece

    words = ["The capital of france is.", "He drove his to work."]
    tokenizer = train_wordpiece([*LINES, *words], 150)
    sizes = {"width": 12, "depth": 1, "heads": 2, "hidden": 16, "positions": 32}
    config = BertConfig(vocab_size=tokenizer.vocab_size, pooler=False, mlm=True, **sizes)
    hub.save(BertModel(config, random_params(BertModel, config), tokenizer=tokenizer), folder)
