"""The bundled Llama, its texts, and how they were made (README.md)."""
