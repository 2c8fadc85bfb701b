"""Which training passages do the words of a language model come from?

The script trains a small GPT-2 on chapters of Python's language reference (in ``pydoc_data``), with StrideCallback in
the Trainer. The model continues some prompts, and each continuation is attributed to the training passages. The prompt
is input only: its labels are -100, so only the continuation is attributed. Two checks use passages outside the training
set: how many of their top ten are of the same chapter, and how much one training step on those ten helps. The
comparison is with the ten passages that share the rarest words (TF-IDF), and with ten random ones. The script takes
under a minute on two CPU cores and writes TensorBoard texts, a report and the saved scores to ``runs/text``.
"""

import logging
import re
import textwrap
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate
from transformers import GPT2Config, GPT2LMHeadModel

from stride_lightning import StrideCallback, attribute

OUTPUT = Path("runs/text")
NUM_CHAPTERS, NUM_PER_CHAPTER, NUM_HELD_OUT = 12, 36, 40
VOCABULARY, LENGTH, LAYERS, WIDTH, EPOCHS, SEED = 768, 96, 2, 64, 12, 0
NUM_TOP, STEP = 10, 0.1
PROMPTS = (
    "The metaclass",
    "Return a copy of the string",
    "A future statement",
    "Dictionaries preserve",
    "When a module is first imported",
    "The debugger",
)


class Writer(L.LightningModule):
    """An ordinary LightningModule around a Hugging Face model; nothing in it knows about attribution."""

    def __init__(self, vocabulary):
        super().__init__()
        shape = {"n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "initializer_range": 0.05}
        self.gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **shape))

    def forward(self, input_ids, attention_mask):
        return self.gpt2(input_ids=input_ids, attention_mask=attention_mask).logits

    def training_step(self, batch, batch_idx=0):
        logits = self(batch["input_ids"], batch["attention_mask"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())  # -100 is left out
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def passages():
    """Chapters and texts of about 300 characters, in random order, without repeated paragraphs and tables."""
    chapters, seen = {}, set()
    for topic, text in sorted(topics.items(), key=lambda chapter: len(chapter[1])):  # long chapters repeat short ones
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
        new = [paragraph for paragraph in paragraphs if paragraph not in seen and "+--" not in paragraph]
        seen.update(new)
        chapters[topic] = [piece for piece in textwrap.wrap(" ".join(new), 300) if len(piece) > 100]
    longest = sorted(chapters, key=lambda topic: len(chapters[topic]))[-NUM_CHAPTERS:]
    pairs = [(topic, piece) for topic in longest for piece in chapters[topic][:NUM_PER_CHAPTER]]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(SEED))
    return [pairs[place] for place in order.tolist()]


def encoded(tokenizer, prompt, continuation=None):
    """An example for a language model; a prompt with a continuation has labels for the continuation only."""
    given = tokenizer.encode(prompt).ids
    more = [] if continuation is None else tokenizer.encode(continuation).ids
    ids = torch.tensor(given + more)[:LENGTH]
    labels = ids.clone()
    if continuation is not None:
        labels[: len(given)] = -100
    padding = (0, LENGTH - len(ids))
    mask = F.pad(torch.ones_like(ids), padding)
    return {"input_ids": F.pad(ids, padding), "attention_mask": mask, "labels": F.pad(labels, padding, value=-100)}


def continuation_of(model, tokenizer, prompt):
    """The model's continuation of a prompt, by its likeliest tokens."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    options = {"max_new_tokens": 30, "do_sample": False, "repetition_penalty": 1.1, "pad_token_id": 0}
    written = model.gpt2.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return tokenizer.decode(written[0, ids.shape[1] :].tolist())


def by_shared_words(queries, texts):
    """Cosines of TF-IDF vectors, the baseline that any method must beat."""
    words = TfidfVectorizer().fit(texts)
    return torch.tensor((words.transform(queries) @ words.transform(texts).T).toarray())


def helped_by_a_step(model, query, examples):
    """How much one step of gradient descent on some examples lowers the loss of a query, in nats."""

    def loss(of):
        batch = default_collate(of)
        logits = model(batch["input_ids"], batch["attention_mask"])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    weights = list(model.parameters())
    with torch.no_grad():
        before = loss([query])
    gradients = torch.autograd.grad(loss(examples), weights)
    with torch.no_grad():
        torch._foreach_add_(weights, gradients, alpha=-STEP)
        after = loss([query])
        torch._foreach_add_(weights, gradients, alpha=STEP)
    return float(before - after)


def main():
    started = time.perf_counter()
    torch.set_num_threads(1)  # for a network this small a second thread only waits
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    pairs = passages()
    held_out, train = pairs[:NUM_HELD_OUT], pairs[NUM_HELD_OUT:]
    chapters, texts = [topic for topic, _ in train], [text for _, text in train]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<end>"], show_progress=False)
    data = [encoded(tokenizer, text) for text in texts]

    L.seed_everything(SEED, verbose=False)
    model = Writer(tokenizer.get_vocab_size())
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[StrideCallback()],
        logger=TensorBoardLogger(OUTPUT.parent, name=OUTPUT.name),
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=4, shuffle=True))
    model.eval()

    said = [continuation_of(model, tokenizer, prompt) for prompt in PROMPTS]
    queries = [encoded(tokenizer, prompt, more) for prompt, more in zip(PROMPTS, said, strict=True)]
    attribution = attribute(model, queries, train_data=data)
    attribution.train_info = {"chapter": chapters, "text": texts}
    attribution.query_info["text"] = [f"{prompt} […]{more}" for prompt, more in zip(PROMPTS, said, strict=True)]
    print(f"\n{attribution}")
    for row, text in enumerate(attribution.query_info["text"]):
        print("\n" + textwrap.fill(text, 110))
        top = attribution[row].top_columns(3)
        for score, place in zip(top.proponent_scores[0].tolist(), top.proponents[0].tolist(), strict=True):
            source = f"{score:+.3f} {chapters[place]}: {texts[place]}"
            print(textwrap.fill(source, 110, initial_indent="  ", subsequent_indent=" " * 9, max_lines=3))

    folder = Path(trainer.log_dir)
    attribution.log(trainer.loggers)
    page = attribution.report(folder / "report.html", title="Where a language model's words come from")
    saved = attribution.save(folder / "scores")

    # The check: passages outside the training set, of known chapters.
    checks = [encoded(tokenizer, text) for _, text in held_out]
    ways = {
        "stride": attribute(model, checks, train_data=data, show_progress=False).scores,
        "shared words": by_shared_words([text for _, text in held_out], texts),
        "random": torch.rand(len(checks), len(data), generator=torch.Generator().manual_seed(SEED)),
    }
    print(f"\n{len(held_out)} held-out passages  of the same chapter  one step on them lowers the loss by")
    for name, scores in ways.items():
        tops = scores.topk(NUM_TOP).indices.tolist()
        same = [chapters[i] == topic for (topic, _), top in zip(held_out, tops, strict=True) for i in top]
        helped = [
            helped_by_a_step(model, query, [data[i] for i in top]) for query, top in zip(checks, tops, strict=True)
        ]
        mean = torch.tensor(helped).mean()
        print(f"{f'top {NUM_TOP}, {name}':<21}  {sum(same) / len(same):<19.0%}  {mean:+.4f} nats", flush=True)
    print(f"\nTraining, attribution and checks took {time.perf_counter() - started:.0f} s.")
    print(f"Page:   {page}\nScores: {saved}\nLook:   tensorboard --logdir {OUTPUT}")


if __name__ == "__main__":
    main()
