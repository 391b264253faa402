"""The file format: schemes, packing, config.json, writer and reader."""
