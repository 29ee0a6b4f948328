"""Textual inversions: words that stand for several vectors."""

from types import SimpleNamespace


class EmbeddingDatabase:
    def __init__(self):
        self.word_embeddings = {}

    def register_embedding(self, embedding, model):
        return self.register_embedding_by_name(embedding, model, embedding.name)

    def register_embedding_by_name(self, embedding, model, name):
        self.word_embeddings.pop(name, None)
        if embedding is not None:
            self.word_embeddings[name] = embedding


model_hijack = SimpleNamespace(embedding_db=EmbeddingDatabase(), comments=[], extra_generation_params={})
