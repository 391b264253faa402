"""Speed, measured: ops beside torch's own, models beside their originals."""
