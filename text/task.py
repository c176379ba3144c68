"""Texts as a task: adapters of a frozen language model, trained on files of several owners, without code.

A record is one text, cut at a number of tokens; texts are never packed together. The model learns each next token and,
where the text is not cut, its end; or the class of each text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache, partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..base.refusal import Refusal
from ..privacy.statistics.holdout import holdout_mask
from ..tasks.classification import class_metrics
from ..tasks.data import Data, Examples, LazyExamples
from ..tasks.partition import Partition
from ..tasks.planted import ExposureProbe, Secret
from ..tasks.tables import person_hashes
from .adapters import SCALES, AdapterKeys, adapt
from .base import Base, open_base
from .files import Fields, TextRecord, clients_of, read_texts
from .loss import IGNORED, Scores, mean_loss, products, scores
from .model import TextModel, part_of, shared_copy, targets_of
from .prefix import States, padded_rows, prefix_states
from .secrets import check_lengths, code_losses, code_tree, planted, secrets_of

FILE = "text.json"  # that a run saves with its model
NATS, TOKENS, BYTES = "nats", "tokens", "bytes"  # metrics: sums over an example's tokens
SCORED = "_fedveil_scores"  # attribute of a model's outputs
ODD_TOKENS = 32  # of an odd text, at most: a loss of each is computed at every look of an audit
MOST_NATS = 20.0  # loss of a token above which a perplexity, 4.9e8 then, says only that the model diverged
SENTENCE = (
    "The sea is calm today, and we sail home to you tomorrow."  # public, to compare a model with its parts
)
TOLERANCES = {
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}  # of logits, relative to the largest
Item = tuple[Tensor, int]  # tokens of a text, shape (length,), and its class


@dataclass(frozen=True)
class TextForm:
    """Form of a text's inputs and of the model, on which a server and its clients agree.

    Attributes:
      base: SHA-256 of the frozen model, in hexadecimal.
      base_bits: bits of a frozen weight.
      tokens: number of tokens at which a text is cut.
      labels: classes; empty for a language model.
      adapter: keys of the adapters.
    """

    base: str
    base_bits: int
    tokens: int
    labels: tuple[str, ...]
    adapter: AdapterKeys

    def text(self) -> str:
        """Return the form as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class TextTask:
    """`Task` over texts: the mean over texts of the mean cross-entropy of a text's tokens; or that of classes.

    Attributes:
      base: frozen language model.
      form: what all clients share.
      clients: each client's examples; empty on a server, which has none.
      test: held-out examples; empty if the clients are real, since metrics on their texts would be a release.
      simulated: whether the texts are public or synthetic.
      text_field: field of a .jsonl record with its text, for predictions.
      cached: whether the outputs of the frozen first layers are the inputs.
      secrets: codes that clients' texts hold, and the controls.
      public: held-out texts, of which an audit makes odd ones.
    """

    base: Base
    form: TextForm
    clients: tuple[Data, ...]
    test: Data
    simulated: bool = False
    text_field: str = "text"
    cached: bool = False
    secrets: tuple[Secret, ...] = ()
    public: tuple[TextRecord, ...] = ()

    # Only simulated clients' texts are held out, and `held_out_file` is declared public.
    held_out_public = True

    @property
    def num_clients(self) -> int:
        return len(self.clients)

    @property
    def classes(self) -> int:
        """Number of classes; 0 of a language model."""
        return len(self.form.labels)

    def model(self) -> nn.Module:
        return shared_copy(text_model(self.base, self.form))

    @cached_property
    def _words(self) -> Tensor:
        return text_model(self.base, self.form).words.get_parameter("weight")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.classes:
            return nn.functional.cross_entropy(outputs, targets)
        return mean_loss(self._scores(outputs, targets))

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        if self.classes:
            return class_metrics(outputs.cpu(), targets.cpu())
        each = self._scores(outputs, targets)
        sizes = token_bytes(self.base).to(targets.device)[targets.clamp(min=0)]
        sums = {NATS: each.nats, TOKENS: each.tokens, BYTES: (sizes * (targets != IGNORED)).sum(1)}
        accuracy = each.hits / each.tokens.clamp(min=1)
        return {
            name: float(value.detach().double().mean())
            for name, value in {"accuracy": accuracy, **sums}.items()
        }

    def _scores(self, outputs: Tensor, targets: Tensor) -> Scores:
        """Return the scores of a batch; of an evaluation, which needs loss and metrics, they are computed once.

        The product with the vocabulary is most of its cost. The scores live as long as the outputs, to which they belong.
        """
        if torch.is_grad_enabled():
            return scores(outputs, self._words.to(outputs.device), targets)
        attributes = vars(outputs)
        batch, version, each = attributes.get(SCORED, (outputs, 0, None))
        if batch is not targets or version != outputs._version:
            each = scores(outputs, self._words.to(outputs.device), targets)
            attributes[SCORED] = targets, outputs._version, each
        return each

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return a run's metrics from their means over held-out data: of a language model `perplexity` and `bits_per_byte`.

        Perplexity is that of all tokens together, and bits count per byte of the texts' tokens after the first.
        """
        metrics = dict(means)
        nats, tokens, size = (metrics.pop(name, 0.0) for name in (NATS, TOKENS, BYTES))
        if tokens:
            metrics["perplexity"] = math.exp(min(nats / tokens, MOST_NATS))
        if size:
            metrics["bits_per_byte"] = nats / math.log(2) / size
        return metrics

    def client_data(self, client: int) -> Data:
        if not 0 <= client < self.num_clients:
            raise Refusal("client", client, f"clients run from 0 to {self.num_clients - 1}")
        return self.clients[client]

    def client_size(self, client: int) -> int:
        return len(self.clients[client])

    def held_out(self) -> Data:
        return self.test

    def memorisation_probe(self) -> ExposureProbe | None:
        """Return the probe of the secrets, if there are any."""
        return ExposureProbe(self) if self.secrets else None

    @torch.no_grad()
    def secret_losses(self, model: nn.Module, secret: Secret) -> NDArray[np.float64]:
        """Return the model's loss on each code, shape (candidates,); arguments as of `SecretTask.secret_losses`."""
        assert isinstance(model, TextModel)
        tree = code_tree(self.base, secret)
        if self.cached:
            inputs = frozen_states(self.base, self.form)(tree.rows)[:, : tree.length]
        else:
            inputs = padded_rows(tree.rows, tree.length, self.base.end)
        return code_losses(tree, model.states(inputs), model.words.get_parameter("weight"))

    def odd_examples(self, count: int, generator: np.random.Generator) -> Data:
        """Return held-out texts with their tokens in random order and random classes; arguments as of `OddTask`."""
        records = [self.public[row] for row in generator.integers(len(self.public), size=count)]
        items: list[Item] = []
        for text, _ in _items(records, self.base, self.form):
            tokens = text[:ODD_TOKENS]
            order = torch.from_numpy(generator.permutation(len(tokens)))
            items.append((tokens[order], int(generator.integers(max(1, self.classes)))))
        return _examples(items, self.base, self.form, self.cached)

    def beside_the_model(self) -> Mapping[str, bytes]:
        """Return the form, which is the preprocessing, as the file that a run saves with its model."""
        return {FILE: self.form.text().encode()}

    def encode(self, data: object) -> Tensor:
        """Return the model's inputs for a file or a folder of texts: tokens and, of a language model, their targets."""
        if not isinstance(data, str | Path):
            raise Refusal(
                "data", type(data).__name__, "give the path of a .txt or .jsonl file, or of a folder"
            )
        records = read_texts(Path(data), Fields(self.text_field))
        items = _items(records, self.base, replace(self.form, labels=()))
        rows, targets = _rows(items, self.base, self.form)
        if self.classes:
            return rows
        return torch.stack([rows, targets], 1)

    def decode(self, outputs: Tensor) -> dict[str, NDArray[Any]]:
        """Return predictions by column name: the likeliest label and its probability, or the text's perplexity."""
        if not self.classes:
            nats, tokens = outputs.detach().double().unbind(1)
            return {"perplexity": (nats / tokens.clamp(min=1)).clamp(max=MOST_NATS).exp().numpy()}
        probability, best = outputs.detach().softmax(1).max(1)
        return {"label": np.array(self.form.labels)[best.numpy()], "probability": probability.numpy()}


@dataclass(frozen=True)
class TextKeys:
    """Keys of the task `text`.

    Attributes:
      folder: folder of the texts, in which each file or folder belongs to one client; empty on a server.
      base: language model, a folder of Hugging Face or a GGUF file.
      base_bits: bits of a frozen weight: 32, 16, 8 or 4.
      tokens: number of tokens at which a text is cut, at least 2.
      cache: prefix, to store the outputs of the layers below the first adapter; or none.
      text_field: field of a .jsonl record with its text.
      label: field of a .jsonl record with its class; empty for a language model.
      labels: classes; empty for those of simulated texts.
      adapter: keys of the adapters, as of `AdapterKeys`.
      saved: file `text.json` of a run, in place of `base_bits`, `tokens`, `labels` and `adapter`.
      simulated: whether the texts are public or synthetic.
      held_out_share: share of all clients' texts that are held out if they are simulated, in (0, 1); selected by a keyed
        hash of the text and of the number of equal texts before it, or of its person.
      held_out_file: public texts, on which the model is evaluated instead.
      person: field that identifies the person of a text, which the model never sees; empty without one.
      secrets: number of codes of each kind that are planted in simulated texts.
      num_clients: number of clients; 0 for the natural partition.
      partition: natural (one client per file or folder); iid deals simulated texts, and so do the others if these have
        labels.
      alpha: concentration of a dirichlet partition, above 0.
      seed: seed of the partition and of the secrets.
      data: on a device, its own file or folder, in place of `folder`.
    """

    folder: str = ""
    base: str = ""
    base_bits: int = 16
    tokens: int = 128
    cache: str = "prefix"
    text_field: str = "text"
    label: str = ""
    labels: Sequence[str] = ()
    adapter: Mapping[str, Any] = field(default_factory=dict[str, Any])
    saved: str = ""
    simulated: bool = False
    held_out_share: float = 0.2
    held_out_file: str = ""
    person: str = ""
    secrets: int = 0
    num_clients: int = 0
    partition: str = "natural"
    alpha: float = 0.5
    seed: int = 0
    data: str = ""

    @property
    def fields(self) -> Fields:
        """Names of the fields of .jsonl records."""
        return Fields(self.text_field, self.person, self.label)

    def paths(self) -> list[Path]:
        """Return the clients' files and folders."""
        if self.folder and not self.data:
            return clients_of(Path(self.folder), list(map(Path, filter(bool, [self.held_out_file]))))
        return list(map(Path, filter(bool, [self.data])))

    def form(self, base: Base, clients: Sequence[Sequence[TextRecord]]) -> TextForm:
        """Return what all clients share; refuse real texts without declared labels."""
        if self.saved:
            return read_form(Path(self.saved), base)
        form = TextForm(base.digest, self.base_bits, self.tokens, (), _adapter_keys(self.adapter))
        if not self.label:
            return form
        labels = tuple(self.labels)
        if not labels and not self.simulated:
            remedy = (
                "these texts are real, and classes taken from them would reveal them; declare the classes"
            )
            raise Refusal("task.labels", [], remedy)
        labels = labels or tuple(sorted({record.label for records in clients for record in records}))
        if len(labels) < 2:
            raise Refusal("task.labels", list(labels), "give at least two classes")
        return replace(form, labels=labels)


def _adapter_keys(keys: Mapping[str, Any]) -> AdapterKeys:
    """Return the keys of adapters from a dictionary of them."""
    scale = keys.get("scale") or SCALES[keys.get("name", "ffa")]
    values: dict[str, Any] = {**keys, "modules": tuple(keys.get("modules") or ()), "scale": scale}
    return AdapterKeys(**values)


def read_form(path: Path, base: Base) -> TextForm:
    """Return the form that a run has saved.

    Args:
      path: of the file FILE.
      base: must be that of the run.

    Raises:
      Refusal: the file is invalid, or the run had another base.
    """
    try:
        content = json.loads(path.read_bytes())
        labels, adapter = tuple(content["labels"]), _adapter_keys(content["adapter"])
        form = TextForm(content["base"], content["base_bits"], content["tokens"], labels, adapter)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Refusal(FILE, str(path), "is not the form of a run on texts; copy it again") from error
    if form.base != base.digest:
        raise Refusal("task.base", str(base.folder), "is not the language model of this run; name that one")
    return form


@wraps(TextKeys, assigned=(), updated=())
def load(*args: Any, **options: Any) -> TextTask:
    """Return the task; arguments as of `TextKeys`. Refuse an invalid value or text."""
    keys = TextKeys(*args, **options)
    if not keys.base:
        remedy = "name the language model, a folder of Hugging Face or a GGUF file, such as task.base=model"
        raise Refusal("task.base", None, remedy)
    base = open_base(keys.base)
    clients = [read_texts(path, keys.fields) for path in keys.paths()]
    if keys.partition != "natural":
        clients = _dealt(clients, keys)
    elif keys.num_clients not in (0, len(clients)) and keys.folder:
        remedy = f"{keys.folder} gives {len(clients)}, one per file or folder; leave it out"
        raise Refusal("task.num_clients", keys.num_clients, remedy)
    test: list[TextRecord] = []
    if keys.held_out_file:
        test = read_texts(Path(keys.held_out_file), replace(keys.fields, person=""))
    elif keys.simulated:
        clients, test = _split(clients, keys)
    form = keys.form(base, [*clients, test])
    secrets = secrets_of(keys.secrets, len(clients), keys.seed, keys.simulated, form.labels)
    check_lengths(secrets, base, form.tokens)
    clients = planted(clients, secrets, bool(keys.person))
    cached = keys.cache == "prefix"
    data = partial(_data, base=base, form=form, cached=cached)
    data_of_all = tuple(map(data, clients))
    return TextTask(
        base,
        form,
        data_of_all,
        data(test),
        keys.simulated,
        text_field=keys.text_field,
        cached=cached,
        secrets=secrets,
        public=tuple(test),
    )


def released(folder: Path, task: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and options of the task of a run on texts, which stores the form of its inputs.

    Args:
      folder: of the run.
      task: keys of its task.
    """
    options = {name: task[name] for name in ("base", "text_field") if name in task}
    return "text", {"saved": str(folder / FILE), **options}


def _dealt(clients: Sequence[Sequence[TextRecord]], keys: TextKeys) -> list[list[TextRecord]]:
    """Return the texts of all clients, dealt anew by a partition."""
    if not keys.simulated:
        remedy = "real texts stay with their owners; use natural, or set task.simulated=true"
        raise Refusal("partition", keys.partition, remedy)
    if not keys.label and keys.partition != "iid":
        remedy = "needs classes, and these texts have none; use iid or natural, or name task.label"
        raise Refusal("partition", keys.partition, remedy)
    pool = [record for records in clients for record in records]
    partition = Partition(keys.partition, keys.num_clients or len(clients), keys.alpha, keys.seed)
    _, codes = np.unique([record.label for record in pool], return_inverse=True)
    return [[pool[row] for row in share] for share in partition.shares(codes)]


def _split(
    clients: Sequence[Sequence[TextRecord]], keys: TextKeys
) -> tuple[list[list[TextRecord]], list[TextRecord]]:
    """Return the clients' training texts, and the held-out ones of all: single texts, or whole persons."""
    share = keys.held_out_share
    if not 0 < share < 1:
        raise Refusal("task.held_out_share", share, "give a number above 0 and below 1")
    units = [[record.person or record.text for record in records] for records in clients]
    hashes = np.concatenate([person_hashes(each) for each in units])
    mask = holdout_mask(hashes, share, independent=True, group_equal_rows=bool(keys.person))
    masks = np.split(mask, np.cumsum([len(records) for records in clients])[:-1])
    pairs = [list(zip(records, part, strict=True)) for records, part in zip(clients, masks, strict=True)]
    test = [record for each in pairs for record, is_held_out in each if is_held_out]
    if not test:
        remedy = "holds out no text; increase it, or set task.held_out_file"
        raise Refusal("task.held_out_share", share, remedy)
    return [[record for record, is_held_out in each if not is_held_out] for each in pairs], test


# --- texts as examples --------------------------------------------------------------------------------------------


def _data(records: Sequence[TextRecord], base: Base, form: TextForm, cached: bool) -> Data:
    """Return a client's texts as examples: tokens in memory, or batches of hidden states that are computed once.

    Args:
      records: texts of the client.
      base: gives the tokenizer.
      form: tokens and labels.
      cached: whether the outputs of the frozen first layers are the inputs.
    """
    data = _examples(_items(records, base, form), base, form, cached)
    return replace(data, persons=[record.person for record in records if record.person] or None)


def _examples(items: Sequence[Item], base: Base, form: TextForm, cached: bool) -> Data:
    """Return texts as examples without persons; arguments as of `_data`."""
    if cached:
        return LazyExamples(items, collate=_collate(base, form))
    return Examples(*_rows(items, base, form))


def _items(records: Sequence[TextRecord], base: Base, form: TextForm) -> list[Item]:
    """Return tokens and class of each text, which ends with the end token where it is not cut; refuse another label."""
    codes = {label: code for code, label in enumerate(form.labels)}
    if codes and (others := {record.label for record in records} - codes.keys()):
        remedy = f"{len(others)} labels of the texts are not among them; add them, or correct the texts"
        raise Refusal("task.labels", list(codes), remedy)
    encode = base.tokenizer.encode
    texts = [[*encode(record.text).ids, base.end][: form.tokens] for record in records]
    pairs = zip(texts, records, strict=True)
    return [(torch.tensor(text), codes.get(record.label, 0)) for text, record in pairs]


def _rows(items: Sequence[Item], base: Base, form: TextForm) -> tuple[Tensor, Tensor]:
    """Return rows of tokens, shape (n, tokens), and targets: next tokens, or classes of shape (n,)."""
    texts, codes = [text for text, _ in items], [code for _, code in items]
    rows = padded_rows(texts, form.tokens, base.end)
    if form.labels:
        return rows, torch.tensor(codes, dtype=torch.int64)
    return rows, targets_of(rows, torch.tensor(list(map(len, texts)), dtype=torch.int64))


@lru_cache(maxsize=4)
def _collate(base: Base, form: TextForm) -> Callable[[list[Item]], tuple[Tensor, Tensor]]:
    """Return the function that makes a batch of hidden states, one object for all clients, whose data can be joined."""
    return partial(_cached_batch, base=base, form=form)


def _cached_batch(items: Sequence[Item], base: Base, form: TextForm) -> tuple[Tensor, Tensor]:
    """Return hidden states of the frozen first layers, and targets as of `_rows`."""
    return frozen_states(base, form)([text for text, _ in items]), _rows(items, base, form)[1]


@lru_cache(maxsize=4)
def token_bytes(base: Base) -> Tensor:
    """Return the number of a text's bytes that each token stands for, shape (words,), int64; 0 for special tokens."""
    plan = json.loads(base.tokenizer.to_str())
    special = {each["id"] for each in plan.get("added_tokens", ()) if each.get("special")}
    by_bytes = "ByteLevel" in json.dumps([plan.get("decoder"), plan.get("pre_tokenizer")])
    size_of = {True: len, False: _bytes_of}[by_bytes]
    sizes = torch.zeros(text_words(base), dtype=torch.int64)
    for token, number in base.tokenizer.get_vocab().items():
        if number not in special and number < len(sizes):
            sizes[number] = size_of(token)
    return sizes


def _bytes_of(token: str) -> int:
    """Return the number of bytes of a token of characters, in which a bar stands for a space, and <0x0A> for one byte."""
    return len(re.sub("^<0x[0-9A-F]{2}>$", " ", token).replace("\u2581", " ").encode())


def text_words(base: Base) -> int:
    """Return the number of words of the model's vocabulary, of which the tokenizer may use fewer."""
    return max(int(base.config.get("vocab_size", 0)), base.tokenizer.get_vocab_size())


# --- models, which a process loads once -----------------------------------------------------------------------------


@lru_cache(maxsize=2)
def text_model(base: Base, form: TextForm) -> TextModel:
    """Return the model, of which `shared_copy` makes copies; refuse an architecture that cannot be trained in parts."""
    whole: Any = shared_copy(base.model(form.base_bits))
    words, decoder = whole.get_output_embeddings(), whole.get_decoder()
    if "bias" in words.state_dict() or not hasattr(decoder, "layers"):  # GPT-2 names them h
        remedy = "its head has a bias, or its decoder's layers another name; use a model such as Llama"
        raise Refusal("task.base", str(base.folder), remedy)
    tokens = torch.tensor([base.tokenizer.encode(SENTENCE).ids[: form.tokens]])
    with torch.no_grad():
        logits = whole(input_ids=tokens, use_cache=False).logits.float()
    first = adapt(decoder, form.adapter)
    model = TextModel(decoder, words, first, base.end, len(form.labels)).eval()
    with torch.no_grad():
        own = products(model.states(tokens)[0], words.weight)
        if form.labels:
            ends = torch.tensor([base.end])
            starts = [torch.cat([tokens[0, :size], ends]) for size in range(tokens.shape[1])]
            model.balance(torch.stack([model.states(text[None])[0, -1] for text in starts]))
    if not _close(own, logits, words.weight.dtype):
        remedy = "its logits are not a product of hidden states and a head; use a model such as Llama"
        raise Refusal("task.base", str(base.folder), remedy)
    return model


@lru_cache(maxsize=2)
def frozen_states(base: Base, form: TextForm) -> States:
    """Return the function that computes the outputs of the frozen first layers, each text's once in this process.

    Raises:
      Refusal: the model's last layers, on these outputs, do not compute what the whole model computes.
    """
    model = text_model(base, form)
    first = len(model.decoder.layers) - form.adapter.layers
    width = model.words.get_parameter("weight").shape[1]
    states = prefix_states(part_of(base_decoder(base, form), 0, first), form.tokens, width)
    text = torch.tensor(base.tokenizer.encode(SENTENCE).ids[: form.tokens])
    with torch.no_grad():
        whole, parts = model.states(text[None]), model.states(states([text]))[:, : len(text)]
    if not _close(parts, whole, model.words.get_parameter("weight").dtype):
        remedy = "this architecture changes what enters its first layer; use task.cache=none"
        raise Refusal("task.cache", "prefix", remedy)
    return states


def base_decoder(base: Base, form: TextForm) -> Any:
    """Return the decoder of the base, without adapters."""
    whole: Any = base.model(form.base_bits)
    return whole.get_decoder()


def _close(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Return whether numbers that were computed in a type are equal within its rounding."""
    tolerance = max(TOLERANCES[dtype], TOLERANCES[torch.float16]) * float(other.abs().max())
    return bool(((one - other).abs() <= tolerance).all())
