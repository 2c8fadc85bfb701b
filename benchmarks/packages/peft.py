"""peft: LoRA of a classifier of texts of transformers, in the LightningModule that users write around it."""

import lightning.pytorch as L
import peft
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

REQUIREMENTS = ["peft", "transformers"]


def texts(num, seed):
    """Token ids of different lengths; the class is whether the first token comes again."""
    draws = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(num):
        ids = torch.randint(1, 20, (int(torch.randint(5, 12, (), generator=draws)),), generator=draws)
        made.append({"input_ids": ids, "labels": int((ids[1:] == ids[0]).any())})
    return made


def collate(rows):
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


class LoRA(L.LightningModule):
    """A classifier whose base is frozen; LoRA's matrices and the head are trained."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = transformers.BertConfig(vocab_size=20, num_labels=2, max_position_embeddings=16, **sizes)
        base = transformers.BertForSequenceClassification(config)
        lora = peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, r=4, lora_alpha=8, lora_dropout=0.1)
        self.model = peft.get_peft_model(base, lora)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW((value for value in self.parameters() if value.requires_grad), lr=0.01)


def loaders():
    train = DataLoader(texts(40, 0), batch_size=8, shuffle=True, collate_fn=collate)
    return train, DataLoader(texts(5, 1), batch_size=8, collate_fn=collate)


def train(callbacks, folder):
    model, (train_loader, query_loader) = LoRA(), loaders()
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=4,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks(query_loader),
    )
    trainer.fit(model, train_loader)
    return {"module": model, "train_data": train_loader, "queries": query_loader}


def load(ckpt_path, folder):
    train_loader, query_loader = loaders()
    return {"module": LoRA.load_from_checkpoint(ckpt_path), "train_data": train_loader, "queries": query_loader}
