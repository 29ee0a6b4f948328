from backend.memory_management import get_free_memory

__all__ = ["get_free_memory"]
