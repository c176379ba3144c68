"""Tiny language model in a folder of Hugging Face, and letters of clients, which tests of texts train on."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"  # token 0
WORDS = ("dear", "friend", "the", "sea", "is", "calm", "and", "we", "sail", "home", "to", "you", "tomorrow")
CLIENTS = 3


def write_base(folder: Path, layers: int = 2, words: Sequence[str] = WORDS) -> Path:
    """Write the model and its tokenizer, of random but equal values on every call, and return the folder."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = Decoder()
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)] * 8, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def letter(number: int) -> str:
    """Return a letter of six words, which differ by its number."""
    return " ".join(WORDS[(number * step + step) % len(WORDS)] for step in range(1, 7))


def write_letters(folder: Path, clients: int = CLIENTS, letters: int = 10) -> Path:
    """Write a file of letters for each client, with the fields text, writer and mood, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for client in range(clients):
        numbers = range(client * letters, (client + 1) * letters)
        records = [
            {"text": letter(n), "writer": f"writer {n // 2}", "mood": "calm" if n % 2 else "glad"}
            for n in numbers
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"client-{client}.jsonl").write_text(lines)
    return folder
