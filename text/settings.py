"""Settings of the task of texts: options of the group task, and of its group adapter."""

from typing import Annotated, Literal

from pydantic import Field

from ..configs.group import Group
from ..configs.task_settings import FolderTask
from ..configs.values import Positive, Text

# Names of the linear layers of a decoder's attention and feed-forward parts, in Llama and most later models.
Module = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class AdapterSettings(Group):
    """Adapter of linear layers: a change of low rank that trains while the layer is frozen."""

    name: Literal["ffa", "lora", "rxr"] = "ffa"
    rank: Annotated[int, Field(ge=1, le=1024)] = 4
    """Rank of the change: the width between its factors."""
    layers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of the decoder's last layers that have adapters."""
    modules: Annotated[tuple[Module, ...], Field(strict=False, min_length=1)] | None = None
    """Linear layers with adapters, by their names; null: all seven of attention and feed-forward."""
    scale: Positive | None = None
    """Factor of the change; it scales gradients too. Null: 4, of lora 1, of rxr 0.25."""


class TextSettings(FolderTask):
    """Texts, .txt or .jsonl; each file or folder is a client. Adapters of a frozen language model are trained."""

    name: Literal["text"] = "text"
    base: Text | None = None
    """Language model: a folder of Hugging Face, or a GGUF file."""
    base_bits: Literal[4, 8, 16, 32] = 16
    """Bits of a frozen weight."""
    tokens: Annotated[int, Field(ge=2, le=8192)] = 128
    """Tokens at which a text is cut."""
    cache: Literal["none", "prefix"] = "prefix"
    """prefix: the layers below the first adapter run once for each text, and their outputs stay in memory; none: in each step."""
    text_field: Text = "text"
    """Field of a .jsonl record with its text."""
    label: Text | None = None
    """Field of a .jsonl record with its class, to classify texts; null: the next token is learned."""
    labels: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Classes of the label; empty: those of simulated texts. Real texts need them declared."""
    secrets: Annotated[int, Field(ge=0, le=50)] = 0
    """Codes in simulated texts, planted 1, 4 and 16 times and not at all: the number of each kind."""
    adapter: AdapterSettings = AdapterSettings()


TASKS = TextSettings
