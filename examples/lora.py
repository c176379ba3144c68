"""A text classifier of Hugging Face with LoRA adapters on three clients under record-level privacy."""

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

import fedveil as fv
from fedveil.tasks.adapters.transformers import TransformersTask

# With pretrained weights: AutoTokenizer.from_pretrained(...) and AutoModelForSequenceClassification.from_pretrained(...).
WORDS = ["[PAD]", "[UNK]", "a", "very", "good", "great", "bad", "awful", "film", "play", "song", "book"]
words = Tokenizer(models.WordLevel({word: row for row, word in enumerate(WORDS)}, "[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def model():
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertForSequenceClassification(BertConfig(**size, vocab_size=12, initializer_range=0.2))
    return get_peft_model(bert, LoraConfig("SEQ_CLS", r=4, target_modules=["query", "value"]))


def reviews(client):
    draw = [(7 * row + 3 * client) % 64 for row in range(300)]
    texts = [f"a {'very ' * (n % 3)}{WORDS[4 + n % 4]} {WORDS[8 + n // 16]}" for n in draw]
    data = Dataset.from_dict({"text": texts, "label": [int(n % 4 < 2) for n in draw]})
    data = data.map(lambda item: tokenizer(item["text"]), remove_columns="text")
    return fv.LazyExamples(data, collate=DataCollatorWithPadding(tokenizer))


if __name__ == "__main__":
    task = TransformersTask(model, [reviews(n) for n in range(3)], held_out=reviews(99), simulated=True)
    adam = {"name": "adam", "lr": 0.01}
    run = fv.simulate(task, privacy=fv.Record(target_delta=1e-3), cohort="all", num_rounds=20, optimizer=adam)
    print(run.metrics, run.epsilon)
