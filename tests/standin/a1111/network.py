"""Of the built-in extension Lora: what it knows of a file before it is read."""


class NetworkOnDisk:
    def __init__(self, name, filename, metadata=None):
        self.name, self.filename, self.metadata = name, filename, metadata or {}
