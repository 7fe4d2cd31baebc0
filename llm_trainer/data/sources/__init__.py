"""Sources of documents: files of many formats, the Hugging Face hub, and Python's own text."""
