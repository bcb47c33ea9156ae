"""Corpora, token shards, and batches that depend on nothing but a seed and a step."""

from typing import TYPE_CHECKING, Any

from gpt2course.data.corpora import CORPORA, cache_dir, documents
from gpt2course.data.hub_stream import Document
from gpt2course.data.prepare import Prepared, prepare
from gpt2course.data.shards import TokenShard, TokenStream, write_shard

if TYPE_CHECKING:
    from gpt2course.data.batches import Batches

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


def __getattr__(name: str) -> Any:
    """`Batches` needs torch, which the processes that tokenise would otherwise each load for nothing."""
    if name == "Batches":
        from gpt2course.data.batches import Batches

        return Batches
    raise AttributeError(f"module 'gpt2course.data' has no attribute {name!r}")
