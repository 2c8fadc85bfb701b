"""Language models small enough to be retrained: texts, tokens, models, and the truth files that hold all of it.

A truth file (``.npz``, read without pickle) holds token ids and texts of training sequences and queries, what each was
cut from, the weights of a model trained on all of them, random half subsets and the losses of the queries under models
retrained on those, for every seed.
"""

import itertools
import json
import logging
import os
import shutil
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from stride_lightning import GroundTruth, retrain

MODELS = ("gpt2", "llama", "qwen2")


class Sequences(Dataset):
    """Rows of token ids as Hugging Face's models take them."""

    def __init__(self, ids):
        self.ids = ids.long()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index]}


class LanguageModel(L.LightningModule):
    """A Hugging Face model without dropout, trained by AdamW with one cycle of its learning rate.

    Args:
        shape: ``model``, ``vocabulary``, ``length``, ``width``, ``depth`` and ``heads``.
        num_steps: Of training.
        rate: Largest learning rate.
    """

    def __init__(self, shape, num_steps=1, rate=2e-3):
        super().__init__()
        self.net, self.num_steps, self.rate = make_network(**shape), num_steps, rate

    def forward(self, input_ids):
        return self.net(input_ids=input_ids, use_cache=False).logits

    def training_step(self, batch, batch_idx):
        ids = batch["input_ids"]
        return F.cross_entropy(self(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=self.num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_network(model, vocabulary, length, width, depth, heads):
    """An untrained model of a few layers."""
    import transformers

    transformers.logging.set_verbosity_error()
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if model == "gpt2":
        sizes = {"n_positions": length, "n_embd": width, "n_layer": depth, "n_head": heads}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(vocab_size=vocabulary, **sizes, **dropout, **ends)
        return transformers.GPT2LMHeadModel(config)
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    make_config, make_model = kinds[model]
    config = make_config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=length,
        tie_word_embeddings=False,
        **ends,
    )
    return make_model(config)


# ---------------------------------------------------------------- texts


def read_documents(path):
    """Texts and the label of each (None without): of an ``.npz`` with ``text`` and maybe ``offsets`` and ``y``.

    Without a path, Python's own help on its language: a text that every Python has.
    """
    if path is None:
        from pydoc_data.topics import topics

        return ["\n".join(topics.values())], None
    stored = np.load(path, allow_pickle=False)
    raw = stored["text"].tobytes()
    offsets = stored["offsets"] if "offsets" in stored else (0, len(raw))
    texts = [raw[start:stop].decode("utf-8", "ignore") for start, stop in itertools.pairwise(offsets)]
    return texts, stored.get("y")


def make_tokenizer(kind, documents, vocabulary):
    """Functions from text to ids and back, and the number of tokens: characters, or byte-level BPE."""
    if kind == "char":
        characters = sorted(set().union(*documents))
        number = {character: i for i, character in enumerate(characters)}
        encode = lambda text: [number[character] for character in text]  # noqa: E731
        return encode, lambda ids: "".join(characters[i] for i in ids), len(characters)
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents, vocab_size=vocabulary, show_progress=False)
    return lambda text: tokenizer.encode(text).ids, tokenizer.decode, tokenizer.get_vocab_size()


def cut_passages(documents, labels, encode, length, num_train, num_queries, seed):
    """Ids of training sequences and queries, and the label of each: passages that do not overlap.

    With several documents, a fifth of them is held out and queries come from those alone.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    held_out = set(order[: len(order) // 5])
    passages = {True: [], False: []}
    for number, document in enumerate(documents):
        ids = torch.tensor(encode(document))
        rows = ids[: len(ids) // length * length].view(-1, length)
        label = -1 if labels is None else int(labels[number])
        passages[number in held_out] += [(row, label) for row in rows]
    if not held_out:
        mixed = torch.randperm(len(passages[False]), generator=generator).tolist()
        whole = [passages[False][i] for i in mixed]
        passages = {False: whole[:num_train], True: whole[num_train:]}
    parts = []
    for held, count in ((False, num_train), (True, num_queries)):
        candidates = passages[held]
        if len(candidates) < count:
            raise SystemExit(f"The text has {len(candidates)} passages of {length} tokens for {count}: ask for fewer.")
        chosen = [candidates[i] for i in torch.randperm(len(candidates), generator=generator)[:count].tolist()]
        parts += [torch.stack([row for row, _ in chosen]), np.array([label for _, label in chosen])]
    return parts


# ---------------------------------------------------------------- truth


def make_truth(arguments):
    """Cut the text, train the model and retrain it on random halves; what a truth file holds."""
    documents, labels = read_documents(arguments.data)
    encode, decode, vocabulary = make_tokenizer(arguments.tokenizer, documents, arguments.vocabulary)
    train, train_labels, queries, query_labels = cut_passages(
        documents, labels, encode, arguments.length, arguments.train, arguments.queries, arguments.seed
    )
    shape = {"model": arguments.model, "vocabulary": vocabulary, "length": arguments.length}
    shape |= {"width": arguments.width, "depth": arguments.depth, "heads": arguments.heads}
    num_steps = arguments.epochs * -(-len(train) // arguments.batch_size)
    fresh = lambda: LanguageModel(shape, num_steps, arguments.rate)  # noqa: E731
    loader = DataLoader(Sequences(train), batch_size=arguments.batch_size, shuffle=True)
    model = train_one(fresh, loader, arguments)
    # One after the other: trained at once, models read the sequences outside their halves too (which count nothing),
    # and operations of this size gain nothing from being batched over models. Losses are the same.
    truth = retrain(
        fresh,
        Sequences(queries),
        path=models_folder(arguments.retrained),
        train_data=loader,
        max_epochs=arguments.epochs,
        num_subsets=arguments.subsets,
        num_seeds=arguments.num_seeds,
        seed=arguments.seed,
        one_by_one=True,
        show_progress=arguments.progress,
    )
    return {
        "settings": np.array(json.dumps(settings_of(arguments))),
        "shape": np.array(json.dumps(shape)),
        "train": train.numpy().astype(np.int32),
        "queries": queries.numpy().astype(np.int32),
        "train_texts": np.array([decode(row) for row in train.tolist()]),
        "query_texts": np.array([decode(row) for row in queries.tolist()]),
        "train_labels": train_labels,
        "query_labels": query_labels,
        "masks": np.packbits(truth.masks.numpy(), axis=1),
        "losses": truth.losses_by_seed.numpy(),
        "seconds": np.array(truth.metadata["seconds"]),
        **{f"net.{name}": value.numpy() for name, value in model.net.state_dict().items()},
    }


def models_folder(path):
    """Where retrained models' losses stand until there is a truth file: a run that was killed goes on from there."""
    return path.with_name(f"{path.name}.models")


def train_one(fresh, loader, arguments):
    """The model of all training sequences."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.manual_seed(arguments.seed)
    model = fresh()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(max_epochs=arguments.epochs, accelerator="cpu", **quiet).fit(model, loader)
    return model


def settings_of(arguments):
    """What a truth depends on, as plain values."""
    names = "model tokenizer vocabulary length width depth heads train queries subsets num_seeds epochs batch_size rate"
    data = "pydoc_data.topics" if arguments.data is None else Path(arguments.data).stem
    return {"data": data, "seed": arguments.seed} | {name: getattr(arguments, name) for name in names.split()}


def save_truth(path, truth):
    """Write a truth file, all or nothing."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez_compressed(file, **truth)
    os.replace(part, path)
    shutil.rmtree(models_folder(path), ignore_errors=True)


def load_truth(path):
    """Everything in a truth file: arrays as they are, ``shape`` and ``settings`` as dictionaries."""
    with np.load(path, allow_pickle=False) as stored:
        truth = dict(stored)
    return truth | {name: json.loads(str(truth[name])) for name in ("settings", "shape")}


def open_truth(truth):
    """The model, its training data, the queries and the ground truth."""
    model = LanguageModel(truth["shape"])
    state = {name: torch.from_numpy(value) for name, value in truth.items() if name.startswith("net.")}
    model.load_state_dict(state)
    train, queries = (Sequences(torch.from_numpy(truth[name])) for name in ("train", "queries"))
    masks = torch.from_numpy(np.unpackbits(truth["masks"], axis=1, count=len(train)))
    losses = torch.from_numpy(truth["losses"])
    return model.eval(), train, queries, GroundTruth(masks, losses, seeds=list(range(len(losses))))
