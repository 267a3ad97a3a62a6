"""A tokenizer with Phi-3's tokens and xGen-MM's, shared by the tests."""

import dataclasses

from conftest import SHARED
from golden.llava import tokenizer_of
from safetensors.numpy import load_file
from tokenizers import AddedToken

from mmjax.models.xgen_mm.tasks import with_added_tokens
from mmjax.text.tokenizer import Tokenizer

VAULT = SHARED / "golden" / "llava_text.safetensors"
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")


def phi_tokenizer(rstrip: bool = False) -> Tokenizer:
    """The LLaMA tokenizer of LLaVA's vault with these tokens. rstrip: they swallow the line break after them."""
    tokenizer = tokenizer_of(load_file(VAULT)["inputs/sentencepiece_model"], legacy=False)
    tokenizer.tokenizer.add_special_tokens([AddedToken(name, special=True, rstrip=rstrip) for name in PHI])
    special = {**tokenizer.special, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return with_added_tokens(dataclasses.replace(tokenizer, special=special))
