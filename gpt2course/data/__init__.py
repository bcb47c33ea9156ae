"""Corpora, token shards, and batches that depend on nothing but a seed and a step."""

from gpt2course.data.batches import Batches
from gpt2course.data.corpora import CORPORA, Document, cache_dir, documents
from gpt2course.data.prepare import Prepared, prepare
from gpt2course.data.shards import TokenShard, TokenStream, write_shard

__all__ = [
    "CORPORA",
    "Batches",
    "Document",
    "Prepared",
    "TokenShard",
    "TokenStream",
    "cache_dir",
    "documents",
    "prepare",
    "write_shard",
]
