"""Neuronal membranes in electron microscopy: sections and labels, augmentation, segmentation and its scores."""
