"""A small Hugging Face folder as chat models have them: its tokenizer begins every text with a token, it ends
a text with either of two, and it has a chat template.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, EOT = "<|bos|>", "<|eos|>", "<|eot|>"
BOS_ID, EOS_ID, EOT_ID = 256, 257, 258
VOCAB_SIZE = 260
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eot|>{% endfor %}"


def save_tokenizer(folder: Path, *, adds_bos: bool = True) -> None:
    """Bytes and three special tokens, the first of which begins every text; saved by transformers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS, EOT])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=[BOS, "$A"], special_tokens=[(BOS, BOS_ID)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


def save_chat_model(folder: Path, *, adds_bos: bool = True) -> None:
    """A model of random weights with that tokenizer and two ids that end a text; saved by transformers."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=BOS_ID,
        eos_token_id=[EOS_ID, EOT_ID],
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(shape)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=[EOS_ID, EOT_ID], max_new_tokens=77
    )
    model.save_pretrained(folder)
    save_tokenizer(folder, adds_bos=adds_bos)


def save_gpt2_files(folder: Path, texts: list[str], vocab_size: int = 400, **config: object) -> None:
    """`vocab.json` and `merges.txt` as GPT-2's first folders have them, and a config.json."""
    from tokenizers import trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab["<|endoftext|>"] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
