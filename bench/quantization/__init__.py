"""Fused networks in fp32, 16 and 8 bits side by side: what they move, and how often they are right."""
