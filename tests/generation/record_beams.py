"""What beam searches of several transformers give, for test_beam_rules.py: run once a version, it adds to beams.json.

    pip install --no-deps --target OLD transformers==4.15.0
    PYTHONPATH=OLD python tests/generation/record_beams.py

with 4.15.0, 4.33.2, 4.37.2 and 5. The old ones run under Python 3.11 and PyTorch 2.13 with an old huggingface_hub
(0.17.3, for 4.37.2 0.20.3) and tokenizers (0.13.3, for 4.37.2 0.15.2) in OLD, and their dependency_versions_check.py
emptied but for `deps = {}` and a `dep_version_check` that does nothing.

The model is a chain as in markov.py: logits = table[last id] * (1 + RATE * ids read), where two texts of the same
transitions do not tie. Id 0 ends, 6 begins, 7 pads and is never likely.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
NEW_FROM = 0 if VERSION >= (5, 0) else 1
"""Where the new ids begin after embeddings: BOS is in front of them in old versions."""
# Of version 5 alone: before it a model could generate as it was.
BASES = (PreTrainedModel,) if hasattr(PreTrainedModel, "generate") else (PreTrainedModel, transformers.GenerationMixin)
FILE = pathlib.Path(__file__).with_name("beams.json")
V, EOS, BOS, PAD = 8, 0, 6, 7
RATE = 0.1
ITEMS = 12
TRIALS = [
    {"num_beams": 3, "length_penalty": 1.0},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 2, "length_penalty": -1.0},
    {"num_beams": 3, "length_penalty": 2.0},
    {"num_beams": 4, "length_penalty": 1.0, "early_stopping": True},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": -0.5, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": 1.0, "min_new_tokens": 3},
    {"num_beams": 2, "length_penalty": 0.7, "eos": [EOS, 1]},
    {"num_beams": 3, "length_penalty": 1.0, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "min_new_tokens": 5},
    {"num_beams": 4, "length_penalty": 1.5},
    {"num_beams": 3, "length_penalty": 1.0, "repetition_penalty": 1.5, "embeds": True},
    {"num_beams": 4, "length_penalty": 1.0, "num_beam_groups": 2, "diversity_penalty": 0.8},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.5, "early_stopping": True},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.5, "pad": EOS},
    {"num_beams": 4, "length_penalty": 2.0, "num_beam_groups": 2, "diversity_penalty": 0.4, "eos": [EOS, 2],
     "early_stopping": "never"},
]  # fmt: skip


class Chain(*BASES):
    config_class = PretrainedConfig

    def __init__(self, table):
        super().__init__(PretrainedConfig(**{"vocab_size": V, "num_hidden_layers": 1, "use_cache": False}))
        self.table = torch.nn.Parameter(torch.tensor(table, dtype=torch.float32))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, **_):
        """Embeddings are a prompt's ids as numbers; the BOS that old versions use instead is not processed."""
        if inputs_embeds is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        return {"input_ids": torch.cat([inputs_embeds[..., 0].long(), input_ids[:, NEW_FROM:]], 1)}

    def forward(self, input_ids, inputs_embeds=None, attention_mask=None, **_):
        read = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).sum(-1, keepdim=True)
        return CausalLMOutput(logits=(self.table[input_ids[:, -1]] * (1 + RATE * read))[:, None])


def find(model, trial, prompts):
    """Ids as digits, up to the end, and scores, of all beams of all items; None: the version has no such search."""
    options = {"length_penalty": 1.0, "early_stopping": False, "eos": [EOS], "pad": PAD, "max_new_tokens": 8, **trial}
    eos, pad, capacity = options.pop("eos"), options.pop("pad"), options.pop("max_new_tokens")
    least, embeds = options.pop("min_new_tokens", 0), options.pop("embeds", False)
    groups = "num_beam_groups" in options
    if VERSION >= (5, 0) and groups:
        return None
    if VERSION < (4, 33) and (groups or embeds or len(eos) > 1 or options["early_stopping"] == "never"):
        return None
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    if VERSION >= (5, 0):
        options |= {"max_new_tokens": capacity, "min_new_tokens": least}
    else:
        prompt_length = NEW_FROM if embeds else width
        options |= {"max_length": prompt_length + capacity, "min_length": prompt_length + least}
    if embeds:
        options["inputs_embeds"] = ids[..., None].float()
    else:
        options["input_ids"] = ids
    outputs = model.generate(
        attention_mask=mask, num_return_sequences=options["num_beams"], do_sample=False, bos_token_id=BOS,
        eos_token_id=eos if len(eos) > 1 else eos[0], pad_token_id=pad, return_dict_in_generate=True,
        output_scores=True, **options,
    )  # fmt: skip
    new = outputs.sequences[:, NEW_FROM if embeds else width :].tolist()
    texts = [row[: next((i + 1 for i, id in enumerate(row) if id in eos), capacity)] for row in new]
    beams = [["".join(map(str, t)), round(float(s), 5)] for t, s in zip(texts, outputs.sequences_scores)]
    k = options["num_beams"]
    return [beams[i : i + k] for i in range(0, len(beams), k)]


def main():
    rng = np.random.default_rng(5)
    table = rng.normal(size=(V, V)) * 1.4
    table[:, PAD] = -30
    table[:, EOS] += 0.5
    table = table.round(2).tolist()
    # Version 5 takes the padding of embeddings for new ids that no penalty is for: these prompts are equally long.
    lengths = [[3] * ITEMS if "embeds" in trial else rng.integers(1, 6, ITEMS) for trial in TRIALS]
    prompts = [[rng.integers(1, 7, length).tolist() for length in of_trial] for of_trial in lengths]
    model = Chain(table).eval()
    with torch.no_grad():
        results = [find(model, trial, texts) for trial, texts in zip(TRIALS, prompts)]
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {"found": {}}
    written = {"made by": "record_beams.py", "rate": RATE, "bos": BOS, "eos": [EOS], "pad": PAD, "table": table}
    written |= {"trials": TRIALS, "prompts": [["".join(map(str, p)) for p in texts] for texts in prompts]}
    written["found"] = recorded["found"] | {transformers.__version__: results}
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in written.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
