"""Dense and retrieval tasks on data of their own."""
