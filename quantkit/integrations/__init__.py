"""How other libraries load what quantkit writes."""
