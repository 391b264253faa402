"""The report and the model card of an output: one page with pictures, and the hub's README.md."""
