"""Eight bits for a fused model: calibration, scheme, lowering, proof and what is given back to 16 bits."""
