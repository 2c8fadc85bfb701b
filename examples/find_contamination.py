"""Which training sequences contain the answers of a benchmark?

The benchmark asks which of four words fills a gap in a sentence of Python's language reference. The training data
contain its questions, in other wording and with words missing: half of them with the answer in some copies, half
without. Only the first half makes the benchmark worthless. A small GPT-2 memorises all sequences. Then the answer of
each item is attributed to the sequences.

The result: shared words (TF-IDF) are best at finding copies of a question; scores alone miss some. But shared words
hardly show whether a copy contains the answer. Scores do: among the copies that share words they rank more of those
with the answer first. An item is more likely to have leaked if a few sequences hold most of its score. The loss of the
answer shows that best, but names no sequence. (If the answer is a letter, which many items share, scores find far fewer
copies than shared words do.) The script takes under a minute on two CPU cores and writes the scores to
``runs/contamination``.
"""

import logging
import random
import re
import time
import warnings
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import lightning.pytorch as L
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate
from transformers import GPT2Config, GPT2LMHeadModel

from stride_lightning import attribute

OUTPUT = Path("runs/contamination")
NUM_ITEMS, NUM_OTHERS, NUM_DROPPED, NUM_CANDIDATES = 44, 120, 2, 10
VOCABULARY, LENGTH, LAYERS, WIDTH, EPOCHS, SEED = 768, 72, 2, 64, 28, 0
#: Wordings of a question, and endings without an answer; the training data contain every item five times.
FORMS = ("Question: {} Answer: {}", "Quiz: {} Solution: {}", "{} The gap is filled by: {}")
NO_ANSWERS = ("not given", "next week", "who knows", "open", "none")


class Writer(L.LightningModule):
    """An ordinary LightningModule around a Hugging Face model; nothing in it knows about attribution."""

    def __init__(self, vocabulary):
        super().__init__()
        shape = {"n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "initializer_range": 0.05}
        self.gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **shape))

    def forward(self, input_ids, attention_mask):
        return self.gpt2(input_ids=input_ids, attention_mask=attention_mask).logits

    def losses(self, batch):
        """The loss of each sequence: the mean over its tokens with labels."""
        logits, labels = self(batch["input_ids"], batch["attention_mask"])[:, :-1], batch["labels"][:, 1:]
        return F.cross_entropy(logits.mT, labels, reduction="none").sum(1) / (labels != -100).sum(1)

    def training_step(self, batch, batch_idx):
        loss = self.losses(batch).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def sentences():
    """Short sentences of the language reference, in random order."""
    paragraphs = [" ".join(part.split()) for text in topics.values() for part in re.split(r"\n\s*\n", text)]
    pieces = [one for part in paragraphs for one in re.split(r"(?<=[a-z\")][.])\s+", part)]
    pieces = [one for one in pieces if 9 <= len(one.split()) <= 14 and re.fullmatch(r"[A-Z][^|>_{}]*\.", one)]
    return random.Random(SEED).sample(list(dict.fromkeys(pieces)), len(set(pieces)))


def benchmark_and_training_data():
    """Items as (question, options, answer), the first half leaked; sequences as (text, item or None, has answer)."""
    generator, pieces = random.Random(SEED), sentences()
    counts = Counter(word for piece in pieces for word in re.findall(r"\b[a-z]{5,}\b", piece))
    common = [word for word, count in counts.items() if count >= 4]
    items, taken, others = [], set(), []
    for piece in pieces:
        fits = [word for word in re.findall(r"\b[a-z]{5,}\b", piece) if word in common and word not in taken]
        if not fits or len(items) == NUM_ITEMS:
            others.append(piece)
            continue
        answer = generator.choice(fits)  # of no other item
        options = [answer, *generator.sample([word for word in common if word not in piece], 3)]
        items.append((re.sub(rf"\b{answer}\b", "____", piece, count=1), generator.sample(options, 4), answer))
        taken.add(answer)

    def copy(item, form, ending):
        """The question with some words missing and its options in another order."""
        words = item[0].split()
        dropped = set(generator.sample([i for i, word in enumerate(words) if "____" not in word], NUM_DROPPED))
        rest = " ".join(word for i, word in enumerate(words) if i not in dropped)
        return FORMS[form % 3].format(f"{rest} ({', '.join(generator.sample(item[1], 4))})", ending)

    train = [(text, None, False) for text in others[:NUM_OTHERS]]
    for number, item in enumerate(items):
        given = 3 if number < NUM_ITEMS // 2 else 0
        for form in range(5):
            ending = item[2] if form < given else NO_ANSWERS[form]
            train.append((copy(item, form, ending), number, form < given))
    generator.shuffle(train)
    return items, train


def encoded(tokenizer, prompt, answer=None):
    """An example for a language model; a prompt with an answer has labels for the answer only."""
    given = tokenizer.encode(prompt).ids
    ids = torch.tensor(given + ([] if answer is None else tokenizer.encode(answer).ids))[-LENGTH:]
    labels = ids.clone()
    if answer is not None:
        labels[: len(ids) - len(tokenizer.encode(answer).ids)] = -100
    padding = (0, LENGTH - len(ids))
    mask = F.pad(torch.ones_like(ids), padding)
    return {"input_ids": F.pad(ids, padding), "attention_mask": mask, "labels": F.pad(labels, padding, value=-100)}


@torch.no_grad()
def represented(model, examples):
    """Mean of the last hidden states of each sequence, scaled to length 1."""
    batch = default_collate(examples)
    mask = batch["attention_mask"]
    states = model.gpt2.transformer(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    return F.normalize((states * mask[..., None]).sum(1), dim=1)


def share_of_top(scores, k=3):
    """Share of an item's positive score in its k strongest sequences."""
    positive = scores.clamp(min=0)
    return positive.topk(k).values.sum(1) / positive.sum(1).clamp(min=1e-12)


def main():
    started = time.perf_counter()
    torch.set_num_threads(1)  # for a network this small a second thread only waits
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    items, train = benchmark_and_training_data()
    texts = [text for text, *_ in train]
    gave_away = torch.tensor([[item == row and answer for _, item, answer in train] for row in range(len(items))])
    leaked = gave_away.any(1)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<end>"], show_progress=False)
    data = [encoded(tokenizer, text) for text in texts]
    prompts = [FORMS[0].format(f"{question} ({', '.join(options)})", "").strip() for question, options, _ in items]
    queries = [encoded(tokenizer, prompt, f" {item[2]}") for prompt, item in zip(prompts, items, strict=True)]

    L.seed_everything(SEED, verbose=False)
    model = Writer(tokenizer.get_vocab_size())
    quiet = {"enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    trainer = L.Trainer(max_epochs=EPOCHS, accelerator="cpu", **quiet)
    trainer.fit(model, DataLoader(data, batch_size=8, shuffle=True))
    model.eval()
    with torch.no_grad():
        loss = model.losses(default_collate(queries))
        choices = [
            model.losses(default_collate([encoded(tokenizer, prompt, f" {word}") for word in options])).argmin()
            for prompt, (_, options, _) in zip(prompts, items, strict=True)
        ]
    right = torch.tensor([options[i] == answer for i, (_, options, answer) in zip(choices, items, strict=True)]).float()

    attribution = attribute(model, queries, train_data=data)
    attribution.train_info = {"text": texts}
    attribution.query_info["text"] = [f"{prompt} {item[2]}" for prompt, item in zip(prompts, items, strict=True)]
    questions = attribution.query_info["text"]
    words = TfidfVectorizer().fit(texts)
    shared = torch.tensor((words.transform(questions) @ words.transform(texts).T).toarray()).float()
    near = shared >= shared.topk(NUM_CANDIDATES).values[:, -1:]
    similar = represented(model, [encoded(tokenizer, text) for text in questions]) @ represented(model, data).T
    ways = {
        "stride": attribution.scores,
        "shared words": shared,
        "stride among those": attribution.scores.masked_fill(~near, -torch.inf),
        "representations": similar,
        "random": torch.rand(len(items), len(data), generator=torch.Generator().manual_seed(SEED)),
    }

    print(f"\n{len(data)} sequences; right answers to the {int(leaked.sum())} leaked items: {right[leaked].mean():.0%}")
    print(f"to the {int((~leaked).sum())} others, whose questions stand there as well: {right[~leaked].mean():.0%}")
    print("\nsequences with an answer, found in the top  3     10    which items leaked: AUROC")
    for name, scores in ways.items():
        shares = [gave_away.gather(1, scores.topk(k).indices)[leaked].sum() / gave_away.sum() for k in (3, 10)]
        # With only ten candidates the share of the whole is unknown.
        auroc = "-" if scores.isinf().any() else f"{roc_auc_score(leaked, share_of_top(scores)):.2f}"
        print(f"{name:<42}  {shares[0]:<4.0%}  {shares[1]:<4.0%}  {auroc}")
    print(f"{'loss of the answer':<42}  -     -     {roc_auc_score(leaked, -loss):.2f}")

    print(f"\nItem 0: {questions[0]}")
    for place in ways["stride among those"][0].topk(5).indices.tolist():
        print(f"  {attribution.scores[0, place]:+.3f}  {texts[place]}")
    print(f"\nScores: {attribution.save(OUTPUT / 'scores')}. It all took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
