"""This module has the sizes of known transformers, which `gpt` takes by name. It needs no torch.

A size is num_layers, width, num_heads, context, vocab_size. From 124m to 175b the sizes are those
of GPT-2 and GPT-3 (Brown et al. 2020, https://arxiv.org/abs/2005.14165, table 2.1), 70b is Llama
2's largest, 530b Megatron-Turing NLG (https://arxiv.org/abs/2201.11990), 1t from Narayanan et al.
2021 (https://arxiv.org/abs/2104.04473, table 1)."""

BYTES = 257  # the byte tokenizer's vocabulary: 256 values and the end of a document
GPT2_VOCABULARY = 50257
CONTEXT = 1024  # where neither a preset nor the job says it
MOST_LAYERS = 10_000  # of the models of today, the deepest have some hundreds
SIZES = ("num_layers", "width", "num_heads", "context", "vocab_size")

PRESETS: dict[str, tuple[int, int, int, int, int]] = {
    "1m": (5, 128, 4, 128, BYTES),
    "10m": (6, 384, 6, 256, BYTES),
    "50m": (8, 512, 8, 512, GPT2_VOCABULARY),
    "124m": (12, 768, 12, 1024, GPT2_VOCABULARY),
    "350m": (24, 1024, 16, 1024, GPT2_VOCABULARY),
    "760m": (24, 1536, 16, 2048, GPT2_VOCABULARY),
    "1.3b": (24, 2048, 16, 2048, GPT2_VOCABULARY),
    "2.7b": (32, 2560, 32, 2048, GPT2_VOCABULARY),
    "6.7b": (32, 4096, 32, 2048, GPT2_VOCABULARY),
    "13b": (40, 5120, 40, 2048, GPT2_VOCABULARY),
    "30b": (48, 7168, 56, 2048, GPT2_VOCABULARY),
    "70b": (80, 8192, 64, 4096, GPT2_VOCABULARY),
    "175b": (96, 12288, 96, 2048, GPT2_VOCABULARY),
    "530b": (105, 20480, 128, 2048, GPT2_VOCABULARY),
    "1t": (128, 25600, 160, 2048, GPT2_VOCABULARY),
}
