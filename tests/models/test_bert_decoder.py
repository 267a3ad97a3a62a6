"""BERT's block as BLIP and BLIP-2 use it: optional cross attention, queries, input embeddings, cached decoding."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.generation.engine import generate
from mmjax.generation.options import GenerationOptions
from mmjax.models.bert.checkpoint import hf_table
from mmjax.models.bert.decode import BertDecodable
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.nn.masks import contrastive_mask, grounded_mask, padding_mask
from mmjax.tree import flatten
from mmjax.weights.table import load_table

B, L, S, E, N = 3, 7, 5, 22, 4
DECODER = BertConfig(53, 35, 3, 5, 41, 19, types=0, pooler=False, mlm=True, cross_from=0, causal=True)
QFORMER = dataclasses.replace(DECODER, cross_every=2, query_feed_forward=True, mlm=False, causal=False)
LENGTHS = np.array([7, 4, 6])
MASK = (np.arange(L) < LENGTHS[:, None]).astype(np.int32)
IDS = np.random.default_rng(3).integers(5, 53, (B, L)).astype(np.int32) * MASK
CONTEXT = np.random.default_rng(4).normal(size=(B, S, E)).astype(np.float32)
CONTEXT_MASK = (np.arange(S) < np.array([[5], [2], [4]])).astype(np.int32)
QUERIES = np.random.default_rng(5).normal(size=(B, N, 35)).astype(np.float32)
SIZES = {"hidden_size": 35, "encoder_hidden_size": E, "intermediate_size": 41, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 5, "vocab_size": 53, "max_position_embeddings": 19}


def shapes(config: BertConfig) -> Any:
    def everything(bert: Bert) -> Any:
        queries = QUERIES if config.query_feed_forward else None
        n = N if config.query_feed_forward else 0
        x = bert.run(bert.embed(IDS, queries=queries), context=CONTEXT, queries=n)[-1]
        return bert.mlm_logits(x) if config.mlm else x

    return jax.eval_shape(lambda rng: Bert(config).init(rng, method=everything), jax.random.key(0))


def random_variables(config: BertConfig, seed: int = 7) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes(config))


def run(config: BertConfig, variables: Any, ids: Any, mask: Any, context: Any = CONTEXT, **options: Any) -> Any:
    queries = options.pop("embeds", None)
    n = 0 if queries is None else queries.shape[1]

    @jax.jit
    def states(variables: Any) -> Any:
        def forward(bert: Bert) -> Any:
            return bert.run(bert.embed(ids, queries=queries), mask, context, queries=n, **options)[-1]

        return Bert(config).apply(variables, method=forward)

    return states(variables)


# -------------------------------------------------------------------------------------------------------- transformers


def randomised(model: Any) -> Any:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def close(actual: Any, expected: Any, mask: Any = None) -> None:
    actual, expected = np.asarray(actual), expected.numpy()
    if mask is not None:
        actual, expected = actual[mask.astype(bool)], expected[mask.astype(bool)]
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def blip() -> Any:
    """(transformers' text decoder of BLIP, our variables)."""
    pytest.importorskip("torch")
    from transformers.models.blip.configuration_blip import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    fields = {"bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    reference = randomised(BlipTextLMHeadModel(BlipTextConfig(**SIZES, **fields)))
    state = {key: tensor.numpy() for key, tensor in reference.state_dict().items()}
    return reference, load_table(hf_table(DECODER), state, shapes(DECODER), "blip")


@pytest.mark.torch
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_context", [False, True], ids=["text", "multimodal"])
def test_blips_text_encoder_and_decoder(blip, causal, with_context):
    import torch

    reference, variables = blip
    # Without a mask of the context: transformers 5.24 does not pass it on to the scores.
    context = {"encoder_hidden_states": CONTEXT} if with_context else {}
    inputs = {"input_ids": IDS.astype(np.int64), "attention_mask": MASK, **context}
    with torch.no_grad():
        expected = reference.bert(**{name: torch.tensor(x) for name, x in inputs.items()}, is_decoder=causal)[0]
    config = dataclasses.replace(DECODER, causal=causal)
    actual = run(config, variables, IDS, MASK, CONTEXT if with_context else None)
    close(actual, expected, MASK)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "length_penalty": 0.0}], ids=["greedy", "beams"])
def test_blips_decoder_writes_the_same_ids(blip, options):
    import torch

    reference, variables = blip
    prompt, new = IDS[:, :3].copy(), 9
    prompt[:, 0] = 1
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor(prompt).long(),
            encoder_hidden_states=torch.tensor(CONTEXT),
            attention_mask=torch.ones(prompt.shape).long(),
            max_new_tokens=new, do_sample=False, **options,
        )[:, 3:].numpy()  # fmt: skip
    inputs = {"input_ids": prompt, "encoder_hidden_states": CONTEXT}
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    settings = GenerationOptions(max_new_tokens=new, eos=(2,), pad=0, **options)
    actual = np.asarray(generate(BertDecodable(DECODER), variables, inputs, settings).ids[:, 0])
    np.testing.assert_array_equal(actual[:, : expected.shape[1]], expected)


QFORMER_NAMES = [
    (r"encoder\.layer\.(\d+)\.", r"bert.encoder.layer.\1."),
    (r"attention\.attention\.", "attention.self."),
]


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["queries", "text", "both"])
def test_blip2s_query_transformer(kind):
    import torch
    from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    fields = {"cross_attention_frequency": 2, "use_qformer_text_input": True}
    reference = randomised(Blip2QFormerModel(Blip2QFormerConfig(**SIZES, **fields)))
    state = {key: tensor.numpy() for key, tensor in reference.state_dict().items()}
    for pattern, new in QFORMER_NAMES:
        state = {re.sub(pattern, new, key): x for key, x in state.items()}
    queries = {key.replace("_query", ""): x for key, x in state.items() if "_query." in key}
    state = {key: x for key, x in state.items() if "_query." not in key}
    variables = random_variables(QFORMER)
    words = flatten(variables["params"])
    state |= {f"bert.embeddings.LayerNorm.{end}": state.pop(f"layernorm.{end}") for end in ("weight", "bias")}
    for name, native in (("word", "words"), ("position", "positions")):
        state[f"bert.embeddings.{name}_embeddings.weight"] = np.asarray(words[f"embeddings/{native}"])
    plain = dataclasses.replace(QFORMER, query_feed_forward=False)
    variables = load_table(hf_table(plain), state, shapes(plain), "qformer")
    for i in range(3):
        block, source = variables["params"]["encoder"][f"block_{i}"], f"bert.encoder.layer.{i}"
        for native, key in (("up", "intermediate"), ("down", "output")):
            dense = {"kernel": queries[f"{source}.{key}.dense.weight"].T, "bias": queries[f"{source}.{key}.dense.bias"]}
            block.setdefault("query_mlp", {})[native] = dense
        norm = {
            end: queries[f"{source}.output.LayerNorm.{key}"] for end, key in (("scale", "weight"), ("bias", "bias"))
        }
        block["query_norm"] = norm
    n = 0 if kind == "text" else N
    ids = None if kind == "queries" else IDS
    mask = np.concatenate([np.ones((B, n), np.int32), MASK[:, : 0 if ids is None else L]], 1)
    x = [QUERIES] if n else []
    x += [] if ids is None else [np.asarray(words["embeddings/words"][ids] + words["embeddings/positions"][:L])]
    with torch.no_grad():
        expected = reference(torch.tensor(np.concatenate(x, 1)), n, torch.tensor(mask), torch.tensor(CONTEXT))[0]
    native = run(QFORMER, variables, ids, mask, embeds=QUERIES if n else None)
    close(native, expected, mask)


# --------------------------------------------------------------------------------------------------- without reference


def test_queries_do_not_depend_on_the_text_that_reads_them():
    """In image-grounded generation and contrast the queries equal those of a pass without text."""
    variables = random_variables(QFORMER)
    alone = run(QFORMER, variables, None, None, embeds=QUERIES)
    text = run(QFORMER, variables, IDS, MASK)
    valid = padding_mask(np.concatenate([np.ones((B, N), np.int32), MASK], 1))
    grounded = run(QFORMER, variables, IDS, grounded_mask(N, L) & valid, embeds=QUERIES)
    contrast = run(QFORMER, variables, IDS, contrastive_mask(N, L) & valid, embeds=QUERIES)
    np.testing.assert_allclose(grounded[:, :N], alone, atol=2e-5)
    np.testing.assert_allclose(contrast[:, :N], alone, atol=2e-5)
    real = MASK.astype(bool)
    np.testing.assert_allclose(contrast[:, N:][real], text[real], atol=2e-5)
    assert np.abs(grounded[:, N:] - text)[real].max() > 0.1


def test_embeddings_in_are_the_ids_rows():
    variables = random_variables(dataclasses.replace(DECODER, types=2))
    words = variables["params"]["embeddings"]["words"]
    bert = Bert(dataclasses.replace(DECODER, types=2))
    np.testing.assert_array_equal(
        bert.apply(variables, None, MASK % 2, False, words[IDS], method="embed"),
        bert.apply(variables, IDS, MASK % 2, method="embed"),
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_are_the_whole_pass(side):
    """Greedy ids of padded prompts over padded contexts, against the argmax of the whole text's logits."""
    variables = random_variables(DECODER)
    shift = [0 if side == "right" else L - length for length in LENGTHS]
    ids, mask = (np.stack([np.roll(row, by) for row, by in zip(x, shift)]) for x in (IDS, MASK))
    inputs = {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": CONTEXT}
    inputs["encoder_attention_mask"] = CONTEXT_MASK
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    options = GenerationOptions(max_new_tokens=5, pad=0)
    written = np.asarray(generate(BertDecodable(DECODER), variables, inputs, options).ids[:, 0])
    whole, valid = (np.concatenate(pair, 1) for pair in ((ids, written), (mask, np.ones_like(written))))
    bert = Bert(DECODER)
    embeds = bert.apply(variables, whole, position_ids=np.maximum(np.cumsum(valid, 1) - 1, 0), method="embed")
    states = np.asarray(bert.apply(variables, embeds, valid, CONTEXT, CONTEXT_MASK, method="run")[-1])
    alone = whole[1:2, valid[1] == 1]  # padding takes no position and is not attended to
    cut = run(DECODER, variables, alone, np.ones_like(alone), CONTEXT[1:2, :2])
    np.testing.assert_allclose(states[1, valid[1] == 1], cut[0], atol=2e-5)
    logits = np.asarray(Bert(DECODER).apply(variables, states, method="mlm_logits"))
    last = L - 1 - np.argmax(mask[:, ::-1], 1)
    np.testing.assert_array_equal(logits[np.arange(B), last].argmax(-1), written[:, 0])
    np.testing.assert_array_equal(logits[:, L:-1].argmax(-1), written[:, 1:])


def test_what_cannot_generate_is_refused():
    with pytest.raises(MmjaxError, match="causal=False, mlm=True: a decoder needs both"):
        BertDecodable(dataclasses.replace(DECODER, causal=False))
    inputs = {"input_ids": jnp.asarray(IDS), "encoder_hidden_states": jnp.asarray(CONTEXT)}
    with pytest.raises(MmjaxError, match="7 \\+ 13 new tokens are more than positions=19"):
        BertDecodable(DECODER).prefill(random_variables(DECODER), inputs, 1, 13)
    with pytest.raises(MmjaxError, match="query_feed_forward=False was given 4 queries"):
        run(DECODER, random_variables(DECODER), IDS, MASK, embeds=QUERIES)
