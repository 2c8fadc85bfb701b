"""Attributions for the report page, texts that would break it, and a reader of what was written."""

import json
from html.parser import HTMLParser

import torch

from stride_lightning.results.attribution import Attribution

SCORES = torch.tensor([[0.5, -0.25, 0.0, 0.012, -0.13], [0.0, 0.0, 3.0, -1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
POSITIONS = torch.tensor([10, 11, 12, 13, 14])
TARGETS = {"train_targets": torch.arange(5), "query_targets": torch.tensor([7, 10, 8])}
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "\"'`><svg onload=alert(3)>",
    "<!--<script>",
    "{{ data }} {% raw %} {# no comment #} &lt; \u2028 \u2029 \x00 \ud800 日本語 🎈",
]


def make_attribution(**options):
    return Attribution(SCORES, **({"train_indices": POSITIONS} | TARGETS | options))


def images(count, offset=0.0):
    return torch.stack([torch.full((1, 8, 8), offset + i / 20) for i in range(count)])


class Page(HTMLParser):
    """The tags of a page, and what its scripts and styles hold."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.held, self.attributes, self.inside = [], {}, [], ""
        self.text = path.read_text("utf-8")
        self.feed(self.text)
        self.data = json.loads(self.held["script application/json"])

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = " ".join([tag, *(value for name, value in attrs if name == "type")])

    def handle_data(self, data):
        self.held[self.inside] = self.held.get(self.inside, "") + data

    def handle_endtag(self, tag):
        self.inside = ""
